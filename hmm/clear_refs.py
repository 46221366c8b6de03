"""/proc/PID/clear_refs: forget which pages were used (1, 2, 3) or written (4), to see which are from now on.

Forgetting what was written takes the permission to write from every present entry: the next write faults, and says so
by the soft-dirty bit (pagemap.py).  A page in a device's private memory keeps its permission, so that what a processor
writes to it later is missed.  Mirrors hear of it, as their devices' writes have to fault too.

**Source**: Linux fs/proc/task_mmu.c (clear_refs_write(), clear_soft_dirty(), pte_is_pinned(), clear_refs_test_walk()),
Documentation/admin-guide/mm/soft-dirty.rst, 6.12.

**Invariants**: after forgetting what was written no present entry permits writing, unless its page is private, small
and pinned, or of hugetlb memory, which is not watched.

**Absent**: resetting the peak of resident memory (5), which is not counted.
"""

from __future__ import annotations

from enum import IntEnum
from functools import partial

import numpy as np

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.errors import InvalidRequestError
from hmm.events import Cause
from hmm.frames import PageFlag
from hmm.large_folio import are_pinned
from hmm.operation import Operation, Pause
from hmm.units import WHOLE_SPACE, Entries, all_but
from hmm.vma import Vma, VmFlag

__all__ = ["ClearRefs", "clear_refs"]

_NOT_ACCESSED = all_but(cpu_pte.ACCESSED)
_NOT_WRITTEN = all_but(cpu_pte.SOFT_DIRTY | cpu_pte.WRITE)
_NOT_SOFT_DIRTY = all_but(cpu_pte.SOFT_DIRTY)
_WRITABLE = np.uint64(cpu_pte.PRESENT | cpu_pte.WRITE)
_ASKED = np.uint64(cpu_pte.PRESENT | cpu_pte.WRITE | cpu_pte.SPECIAL | cpu_pte.HUGE)
"""pte_is_pinned() asks of small writable pages; clear_soft_dirty_pmd() asks of none."""
_HUGE_ON_DEVICE = np.uint64(cpu_pte.HUGE | cpu_pte.DEVICE)
"""clear_soft_dirty_pmd() of 7.2 leaves them as they are."""
_PASSED_OVER = VmFlag.PFNMAP | VmFlag.HUGETLB
"""clear_refs_test_walk(), and clear_refs_walk_ops, which has no hugetlb_entry."""


class ClearRefs(IntEnum):
    """What is written to the file."""

    ALL = 1
    ANON = 2
    MAPPED = 3
    SOFT_DIRTY = 4


def clear_refs(space: AddressSpace, what: int) -> Operation[None]:
    """Forget.

    Args:
        what: a ClearRefs: which pages were used, of all, anonymous or file mappings; or which were written.

    Raises:
        InvalidRequestError: another number (EINVAL).
        TimedOutError: a mirror with policy FAIL did not answer; nothing was changed (ETIMEDOUT).

    Cost: O(VMAs + directories + entries), vectorised.
    """
    if what not in ClearRefs._value2member_map_:
        raise InvalidRequestError(f"clear_refs: {what}")
    with space.notifier.turn() as turn:
        yield from turn.wait()
        if what == ClearRefs.SOFT_DIRTY:
            turn.hold(WHOLE_SPACE)
            with space.notifier.invalidation((WHOLE_SPACE,), Cause.CLEAR_SOFT_DIRTY) as invalidation:
                yield from invalidation.deliver()
                yield from _forget_writes(space)
        else:
            for vma in list(space.vmas):
                if _concerned(vma, what):
                    _forget_uses(space, vma)


def _concerned(vma: Vma, what: int) -> bool:
    if vma.has(_PASSED_OVER):
        return False
    return what == ClearRefs.ALL or (vma.backing is None) == (what == ClearRefs.ANON)


def _forget_uses(space: AddressSpace, vma: Vma) -> None:
    addresses, entries = space.table.valid(vma.start, vma.end)
    present = cpu_pte.is_present(entries) & ~cpu_pte.is_special(entries)
    space.table.store(addresses[present], entries[present] & _NOT_ACCESSED)
    space.frames.clear_flags(cpu_pte.cpu_pfn(entries[present]), PageFlag.REFERENCED)


def _forget_writes(space: AddressSpace) -> Operation[None]:
    space.tracks_writes = True
    for vma in list(space.vmas):
        if vma.has(VmFlag.SOFTDIRTY):
            space.vmas.set_mapping(vma, vma.mapping.with_flags(vma.flags & ~VmFlag.SOFTDIRTY))

    def forget(entries: Entries, *, shared: bool) -> None:
        present = cpu_pte.is_present(entries)
        kept = np.full(entries.size, not shared)
        kept &= (entries & _ASKED) == _WRITABLE
        kept[kept] = are_pinned(space.frames, cpu_pte.cpu_pfn(entries[kept]))
        entries[present & ~kept] &= _NOT_WRITTEN
        entries[~present & ((entries & _HUGE_ON_DEVICE) != _HUGE_ON_DEVICE)] &= _NOT_SOFT_DIRTY

    watched = [vma for vma in space.vmas if not vma.has(_PASSED_OVER)]
    pieces = ((vma, piece) for vma in watched for piece in space.table.populated(vma.start, vma.end))
    for number, (vma, piece) in enumerate(pieces):
        if number:
            yield Pause()
        space.table.update(piece.start, piece.end, partial(forget, shared=vma.shared))
