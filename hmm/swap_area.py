"""A swap area: where the contents of pages go while system memory is short, one page to a slot.

A slot is named by the entries that stand in the place of its page, in page tables of CPUs and in the page caches of
files, and lives while there is one.  The first slot of an area is its header: no page is ever there, so that 0 stands
for no slot.

A page that was brought in while entries still name its slot is in the *swap cache*: whoever touches another of these
entries gets the same page, and not a copy of it.

**Source**: Linux mm/swapfile.c (swap_map, get_swap_pages(), swap_duplicate(), swap_free()), mm/swap_state.c
(swapper_spaces); the memory of the slots stands for the partition or file.

**Invariants** (`check()`): a slot is free exactly when nothing names it; only slots in use have a cached page.

**Absent**: which entries name a slot, and the pages that are cached (swap.py); priorities, several areas, clusters,
discarding.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from hmm.ascending import unique
from hmm.frame_allocator import SYSTEM_REGION, FrameAllocator, listed
from hmm.frame_contents import FrameContents, MemoryProvider, anonymous_memory
from hmm.units import Pfns

__all__ = ["Slots", "SwapArea"]

Slots: TypeAlias = npt.NDArray[np.int64]
"""Numbers of slots, int64[n]."""

_ONE = np.int32(1)


class SwapArea(FrameContents):
    """Slots for `npages` pages.

    Args:
        provider: gives the memory of the slots, a mapping of a file, say; it is asked for `npages + 1` pages.

    Attributes:
        counts: int32[npages + 1], how many entries name a slot (swap_map).
        cached: int64[npages + 1], the frame with the contents of a slot, 0 for none (the swap cache).
    """

    def __init__(self, npages: int, provider: MemoryProvider = anonymous_memory) -> None:
        super().__init__(npages + 1, provider)
        self._allocator = FrameAllocator(npages + 1, npages + 1)
        self._region = self._allocator.system
        self.counts: npt.NDArray[np.int32] = np.zeros(npages + 1, np.int32)
        self.cached: Pfns = np.zeros(npages + 1, np.int64)

    @property
    def total(self) -> int:
        """Slots that can be in use at a time."""
        return self._region.total

    @property
    def free(self) -> int:
        """Slots that can be allocated."""
        return self._region.free

    @property
    def used(self) -> int:
        """Slots in use."""
        return self._region.used

    @property
    def high_water(self) -> int:
        """Most slots that were in use at a time."""
        return self._region.high_water

    def allocate(self, counts: npt.NDArray[np.int32]) -> Slots:
        """Take slots that `counts[i]` entries are about to name.

        Returns: int64[n], ascending.

        Raises:
            OutOfFramesError: fewer are free; nothing was changed (ENOMEM).

        Cost: O(n), vectorised.  Source: Linux mm/swapfile.c, get_swap_pages().
        """
        where, _ = self._allocator.take(counts.size, SYSTEM_REGION)
        self.counts[where] = counts
        return listed(where)

    def duplicate(self, slots: Slots) -> None:
        """One entry more names each.  Source: Linux mm/swapfile.c, swap_duplicate()."""
        assert np.count_nonzero(self.counts[slots]) == slots.size, "an entry for a free swap slot"
        np.add.at(self.counts, slots, _ONE)

    def put(self, slots: Slots) -> Slots:
        """One entry less names each; those that none names any more are free.

        Returns: int64[m], the slots that were freed, ascending; their cached pages are the caller's to let go of.

        Source: Linux mm/swapfile.c, swap_free().
        """
        np.subtract.at(self.counts, slots, _ONE)
        assert not np.count_nonzero(self.counts[slots] < 0), "a swap slot was freed that nothing named"
        freed: Slots = unique(slots[self.counts[slots] == 0])
        if freed.size:
            self._allocator.give_back(freed)
        return freed

    def image(self) -> tuple[object, ...]:
        """Everything that `check()` looks at, as a value (`checked.HasImage`).  Cost: O(slots), a copy."""
        return self.counts.tobytes(), self.cached.tobytes(), *self._allocator.image(), *super().image()

    def check(self) -> None:
        """Assert the invariants.  Cost: O(slots ever used), vectorised."""
        super().check()
        self._allocator.check()
        free = self._allocator.free_mask(self._region)
        used = self.counts[self._region.first : self._region.top] > 0
        assert np.array_equal(used, ~free), "a swap slot is free and named, or neither"
        assert not self.counts[self._region.top :].any(), "a swap slot that was never used is named"
        assert not self.cached[self.counts == 0].any(), "a free swap slot has a cached page"
