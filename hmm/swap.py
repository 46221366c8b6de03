"""Swap entries and the swap cache: between frames and the slots of the swap area.

A page is in the swap cache while it is in memory and entries still name its slot: `Frames.private` is the slot, the
cache holds a reference, and the page has not changed since it was written.  When the last entry of a slot goes, the
page leaves the cache and the slot is free.

**Source**: Linux mm/swap_state.c (add_to_swap_cache(), delete_from_swap_cache()), mm/swapfile.c
(free_swap_and_cache(), folio_free_swap()), include/linux/swapops.h, 6.12.

**Invariants** (invariants.py): a slot is named by as many entries as it counts; `Frames.private` and
`SwapArea.cached` name each other.

**Absent**: when pages go out (reclaim.py) and who brings them in (swap_in.py, file.py).

Differs: the kernel leaves a page in the swap cache after its last entry was brought in, until the page is written or
half of swap is used; here it leaves at once, and is written again when it goes out again.
"""

from __future__ import annotations

from hmm import cpu_pte
from hmm.frames import Frames, PageFlag
from hmm.operation import Operation
from hmm.swap_area import Slots, SwapArea
from hmm.units import Entries, Pfns

__all__ = ["area_of", "free_entries", "free_slots", "read_in", "slots_of", "some_room"]


def some_room(frames: Frames, npages: int) -> Operation[bool]:
    """Reclaim system memory for so many pages, or for a batch when that is less.

    Returns: whether any came free; if so, there is room until the caller yields.
    """
    if frames.make_room is None:
        return False
    return (yield from frames.make_room(min(npages, frames.batch_pages)))


def area_of(frames: Frames) -> SwapArea:
    """The swap area; to be asked for by those only who have met a swap entry."""
    assert frames.swap is not None, "a swap entry, and there is no swap area"
    return frames.swap


def free_slots(frames: Frames) -> int:
    """How many pages could still be put out."""
    return frames.swap.free if frames.swap is not None else 0


def slots_of(entries: Entries) -> Slots:
    """int64[m]: the slots that the swap entries among `entries` name."""
    return cpu_pte.cpu_pfn(cpu_pte.having(entries, cpu_pte.SWAP))


def free_entries(frames: Frames, slots: Slots, *, dirty: bool = True) -> None:
    """Swap entries went: their slots are named once less, and free when nothing names them.

    Args:
        dirty: a page that leaves the swap cache is dirty from now on: folio_free_swap().

    Cost: O(n), vectorised.  Source: Linux mm/swapfile.c, free_swap_and_cache().
    """
    if not slots.size:
        return
    area = area_of(frames)
    freed = area.put(slots)
    pfns = area.cached[freed]
    pfns = pfns[pfns != 0]
    if pfns.size:
        area.cached[freed] = 0
        frames.private[pfns] = 0
        if dirty:
            frames.set_flags(pfns, PageFlag.DIRTY)
        frames.put(pfns)


def read_in(frames: Frames, slots: Slots) -> Pfns:
    """Take a frame for each slot and fill it from there.

    Args:
        slots: int64[n], unique.

    Returns: int64[n], with one reference each.

    Raises:
        OutOfFramesError: too few frames are free; nothing was changed (ENOMEM).

    Cost: O(n), and the copying.  Source: Linux mm/page_io.c, swap_read_folio().
    """
    pfns = frames.allocate(slots.size)
    frames.load(pfns, area_of(frames), slots)
    return pfns
