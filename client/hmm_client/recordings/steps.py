"""What a recorded program did, step by step: the vocabulary between a recording and whatever replays it.

A step concerns one process of the plan, numbered from 0 (the first) in order of creation; threads act as the
process they belong to.  Lengths are as the program gave them, addresses are recorded ones, and prot, flags and
advice are numbers with the kernel's values, unknown bits included.

Source: the manual pages of the calls.
Invariants: a step is a value; it refers to no other.
Absent: layouts: a step says what was asked for and what the kernel answered, never what lies where.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from hmm_client.recordings.strace import Call

ProcessIndex: TypeAlias = int


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a step comes from.

    Attributes:
        process: number of the process in the plan.
        call: the call in the log, for messages; of a step that no call caused, the one at which it shows.
        partial: the process's layout is not known in full, since what its exec mapped was not recorded, or since
            other threads changed it while fork copied it; calls may fail here that succeeded there, memory may be
            handed out where some lies here, and nothing is compared.
    """

    process: ProcessIndex
    call: Call
    partial: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """One step; the subclasses say what it does."""

    origin: Origin

    @property
    def process(self) -> ProcessIndex:
        """Number of the process concerned."""
        return self.origin.process

    @property
    def call(self) -> Call:
        """The recorded call."""
        return self.origin.call

    @property
    def partial(self) -> bool:
        """True when the process's layout is not known in full."""
        return self.origin.partial


@dataclass(frozen=True, slots=True)
class Map(Step):
    """mmap, shmat, map_shadow_stack or io_setup succeeded.

    Attributes:
        address: the hint or demand; 0 for none.
        length: bytes as asked; already rounded to huge pages where MAP_HUGETLB does so; 0 where the recording does
            not say it, of System V segments and of the rings of io_setup.
        flags: MAP_ flags of an equivalent mmap.
        source: name of the file or object; None for anonymous memory.
        offset: bytes into the source.
        recorded: where the kernel put it.
    """

    address: int
    length: int
    prot: int
    flags: int
    source: str | None
    offset: int
    recorded: int


@dataclass(frozen=True, slots=True)
class RemapFile(Step):
    """remap_file_pages: the shared file area at `address` shows the file from byte `offset` on."""

    address: int
    length: int
    offset: int


@dataclass(frozen=True, slots=True)
class Unmap(Step):
    """munmap succeeded."""

    address: int
    length: int


@dataclass(frozen=True, slots=True)
class Detach(Step):
    """shmdt or io_destroy succeeded: what is left of the object at `address` goes, and nothing that lies between."""

    address: int


@dataclass(frozen=True, slots=True)
class Protect(Step):
    """mprotect or pkey_mprotect succeeded; `prot` may hold PROT_GROWSDOWN."""

    address: int
    length: int
    prot: int


@dataclass(frozen=True, slots=True)
class Remap(Step):
    """mremap succeeded.

    Attributes:
        target: the fifth argument; 0 when there is none.
        recorded: where the area is now.
    """

    address: int
    length: int
    new_length: int
    flags: int
    target: int
    recorded: int


@dataclass(frozen=True, slots=True)
class Advise(Step):
    """madvise succeeded."""

    address: int
    length: int
    advice: int


@dataclass(frozen=True, slots=True)
class Brk(Step):
    """brk, which never fails: it answers with the break as it is then.

    Attributes:
        address: the break asked for; 0 asks what it is.
        recorded: the answer; another than `address` when it was not granted.
    """

    address: int
    recorded: int


@dataclass(frozen=True, slots=True)
class Lock(Step):
    """mlock or mlock2 succeeded; `flags` may hold MLOCK_ONFAULT."""

    address: int
    length: int
    flags: int


@dataclass(frozen=True, slots=True)
class Unlock(Step):
    """munlock succeeded."""

    address: int
    length: int


@dataclass(frozen=True, slots=True)
class LockAll(Step):
    """mlockall succeeded; `flags` are MCL_ flags."""

    flags: int


@dataclass(frozen=True, slots=True)
class UnlockAll(Step):
    """munlockall succeeded."""


@dataclass(frozen=True, slots=True)
class Sync(Step):
    """msync succeeded; `flags` are MS_ flags."""

    address: int
    length: int
    flags: int


@dataclass(frozen=True, slots=True)
class Fork(Step):
    """The process made `child`, with a copy of its address space."""

    child: ProcessIndex


@dataclass(frozen=True, slots=True)
class Vfork(Step):
    """The process made `child`, which uses the same address space until its own Exec or Exit."""

    child: ProcessIndex


@dataclass(frozen=True, slots=True)
class Thread(Step):
    """The process has one thread more; `pid` is the thread's id in the log."""

    pid: int


@dataclass(frozen=True, slots=True)
class ThreadExit(Step):
    """The process has one thread less, and others left."""

    pid: int


@dataclass(frozen=True, slots=True)
class Appear(Step):
    """A process of which the log does not show who made it; its layout is partial from the start."""


@dataclass(frozen=True, slots=True)
class Exec(Step):
    """The process's address space is replaced by one that was not recorded; it is partial from here on.

    Attributes:
        program: path of the program.
        brk_start: the break it starts with; None when the log does not show it.
    """

    program: str
    brk_start: int | None


@dataclass(frozen=True, slots=True)
class GrowStack(Step):
    """The stack, or a MAP_GROWSDOWN area, grew from `end` down to `start` by faults, without a call, before this step.

    A write to the byte at `start` has the same effect.
    """

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Exit(Step):
    """The process ended; `status` is None when a signal ended it or the log does not show how."""

    status: int | None


@dataclass(frozen=True, slots=True)
class Failed(Step):
    """A call that failed.

    Attributes:
        errno: name of the error.
        attempt: the same call as if it had succeeded, when its effects follow from the layout alone (mprotect over a
            hole changes what lies before the hole and answers ENOMEM): replay it, and expect `errno`.  None when
            nothing changed, or when the error came from what a layout does not show (limits, file modes).
    """

    errno: str
    attempt: Step | None


@dataclass(frozen=True, slots=True)
class Interrupted(Step):
    """mprotect, pkey_mprotect, mlock, mlock2 or munlock failed; the mappings below what stopped it have been changed.

    Attributes:
        errno: name of the error: ENOMEM (a hole, a limit, or memory that cannot be locked), EACCES (the file does not
            permit it), EPERM (sealed).
        attempt: the whole call.
        sealed: [start, end) of everything that the process has sealed.
        writable: names of the files that were mapped to be shared and written before; so they may be written.
    """

    errno: str
    attempt: Protect | Lock | Unlock
    sealed: tuple[tuple[int, int], ...] = ()
    writable: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Ignored(Step):
    """A call that is known and changes no layout; `why` says so in a few words."""

    why: str


@dataclass(frozen=True, slots=True)
class Unknown(Step):
    """A call of which it is not known what it does to the layout: report it."""
