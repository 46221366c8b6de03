"""What memory calls depend on besides their arguments, and other calls have set: personality, break, kinds of files.

Source: Linux mm/mmap.c, do_mmap() (READ_IMPLIES_EXEC), ksys_mmap_pgoff() (files of hugetlb), SYSCALL_DEFINE1(brk);
    mm/mprotect.c, do_mprotect_pkey(); arch/x86/include/asm/page_types.h, VM_DATA_DEFAULT_FLAGS; kernel/sys.c,
    prctl_set_mm_map().
Absent: what no call of a recording says: files that lie where nothing may be executed, and hugetlbfs by its path.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hmm.units import page_up
from hmm_client.recordings import flags as kernel
from hmm_client.recordings.arguments import flag_names, flags, string
from hmm_client.recordings.decode import whole_huge_pages
from hmm_client.recordings.steps import Brk, Ignored, Interrupted, Map, Protect, Step, Unmap
from hmm_client.recordings.strace import Call

_BREAK_FLAGS = kernel.MAP["MAP_PRIVATE"] | kernel.MAP["MAP_ANONYMOUS"] | kernel.MAP["MAP_FIXED_NOREPLACE"]
_BREAK_PROT = kernel.PROT["PROT_READ"] | kernel.PROT["PROT_WRITE"]
_ASKS = "0xffffffff"


def reads_execute(call: Call, *, before: bool) -> bool:
    """Whether memory that a thread may read may be executed too, once a successful personality(2) has returned.

    Args:
        before: whether it was so until then.
    """
    return before if call.arguments[0] == _ASKS else "READ_IMPLIES_EXEC" in flag_names(call.arguments[0])


def made_executable(step: Step) -> Step:
    """A step of a thread whose readable memory may be executed."""
    if isinstance(step, Interrupted) and isinstance(step.attempt, Protect):
        return replace(step, attempt=replace(step.attempt, prot=_executable(step.attempt.prot)))
    return replace(step, prot=_executable(step.prot)) if isinstance(step, Map | Protect) else step


def _executable(prot: int) -> int:
    return prot | kernel.PROT["PROT_EXEC"] if prot & kernel.PROT["PROT_READ"] else prot


@dataclass(slots=True)
class Break:
    """The break of one address space.

    Attributes:
        end: where it is, in bytes; None as long as no call has told.
        apart: whether it is where brk(2) alone would not have put it, or what lies below it is not what brk(2) alone
            maps; from then on its steps map and unmap.
    """

    end: int | None = None
    apart: bool = False

    def step(self, step: Brk, *, executable: bool) -> Step:
        """The step of a brk(2), after those of this address space before it."""
        before, self.end = self.end, step.recorded
        granted = step.address == step.recorded
        self.apart = self.apart or (before is not None and (executable if granted else before != step.recorded))
        if not self.apart:
            return step
        if not granted or before is None:
            return Ignored(step.origin, "it tells where the break is")
        old, new = page_up(before), page_up(step.recorded)
        if new > old:
            prot = _executable(_BREAK_PROT) if executable else _BREAK_PROT
            return Map(step.origin, old, new - old, prot, _BREAK_FLAGS, None, 0, old)
        return Unmap(step.origin, new, old - new) if new < old else Ignored(step.origin, "the break stays in its page")


@dataclass(slots=True)
class HugeFiles:
    """The files of hugetlb that a recording tells of.

    Attributes:
        known: flags of mmap that say their page size, by the names that maps shows.
    """

    known: dict[str, int] = field(default_factory=dict)

    def created(self, call: Call) -> None:
        """Take note of a successful memfd_create(name, flags)."""
        bits = flags(call.arguments[1], kernel.MFD)
        if bits & kernel.MFD["MFD_HUGETLB"]:
            self.known[f"/memfd:{string(call.arguments[0])}"] = bits

    def whole(self, step: Step) -> Step:
        """A step; one that maps such a file maps whole huge pages of it."""
        if isinstance(step, Map) and step.source in self.known:
            return replace(step, length=whole_huge_pages(step.length, self.known[step.source]))
        return step
