"""Physical memory: frames, who counts on them, and what they hold.

A frame's record, `struct page`, is spread over parallel arrays indexed by frame number, of which only what
is touched is committed.  Frame 0 is the zero page; counting it has no effect.

A frame lives while it has references.  An entry of a CPU page table is one reference and one of the map
count; the page cache of a file is a reference; so is whoever keeps a frame across a wait.

**Source**: Linux include/linux/mm_types.h (struct page), include/linux/page-flags.h, mm/rmap.c
(folio_add_new_anon_rmap(), folio_remove_rmap_pte()), include/linux/mm.h (get_page(), put_page()).

**Invariants** (`check()`): a free frame has no reference, no flag and belongs to nobody; a frame in use has a
reference.  No frame is mapped or pinned more often than it is referenced.  `ANON_EXCLUSIVE` implies `ANON`.  The bytes
of each frame have a row of their own.

**Absent**: page tables, files, reclaim.

Differs: the count of pins is exact, where the kernel adds 1024 to a small folio's reference count; every frame has its
own counts and flags, also in a large folio, and is free when nobody refers to it, though others of its folio live on.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from hmm.ascending import unique
from hmm.folio_lock import FolioLocks
from hmm.frame_allocator import SYSTEM_REGION, FrameAllocator, Region, RegionKind, listed
from hmm.frame_contents import ZERO_PFN, FrameContents, MemoryProvider, anonymous_memory, as_index, as_slice
from hmm.page_flags import MOVES, Flags, PageFlag, accessed, accessed_word, flag_word
from hmm.swap_area import SwapArea
from hmm.units import PMD_PAGES, MirrorId, Pfn, Pfns

__all__ = [
    "SYSTEM_REGION",
    "ZERO_PFN",
    "Frames",
    "PageFlag",
    "Region",
    "RegionKind",
    "RegionStatistics",
    "listed",
]

MakeRoom: TypeAlias = Callable[[int], Generator[Any, Any, bool]]
"""Frees as many frames of system memory as it is asked for, or fewer.  Returns: whether it freed any, or need not."""

# numpy stores an array without dimensions faster than an int
_NONE, _FIRST, _TRUE = np.array(0, np.int32), np.array(1, np.int32), np.array(True)
_ONE = np.int32(1)  # ufunc.at is an order of magnitude slower when the types differ


@dataclass(frozen=True, slots=True)
class RegionStatistics:
    """Frames of a region, the zero page not counted."""

    number: int
    owner: int
    kind: RegionKind
    total: int
    free: int
    used: int
    mapped: int
    high_water: int


class Frames(FrameContents):
    """The frames of the system and of all devices.

    Args:
        system_frames: frames of system memory, the zero page included.
        reserve_frames: frame numbers kept for the memory of devices.
        provider: gives the memory of the contents.

    Attributes:
        refcount, mapcount, pincount: int32[n]; to be changed by the methods only.
        flags: uint16[n], PageFlag.
        index: int64[n], page->index: page offset in the file, or linear index of an anonymous page.
        mapping: int64[n], page->mapping: id of the file, or of the address space that a private page was made in, 0 for
            none or where it does not matter.
        zone_device_data: int64[n], of a device's frame in use: the mirror that put the page there, 0 for none; of a
            page that a device has to itself: the mirror that took it.
        private: int64[n], page->private: the slot of a page in the swap cache, else 0.
        lru: int64[n], page->lru: the order of pages of one kind, the oldest first; of frames with PageFlag.LRU, and of
            a device's.
        swap: where contents go while memory is short; None: nowhere.
        failing_copies: by mirror, that the copy of the nth page from now on fails, to its device or back; once.
        zero_page_poisoned: a memory failure was injected into the zero page, which goes on to be used.
        ksm_places: finds where frames with PageFlag.KSM are mapped; None while there never was one.
        pinned: how many pins there are.
        poisoned: how many frames have PageFlag.HWPOISON: what they held is lost, or has moved, and
            they are never used again.
        locks: which frames one call has to itself.
        make_room: how who runs out of system memory gets some: an operation that returns whether it is worth trying
            again; None when nothing can be reclaimed.

    All methods take frame numbers as int64[n].
    """

    def __init__(
        self,
        system_frames: int,
        reserve_frames: int = 1 << 22,
        provider: MemoryProvider = anonymous_memory,
    ) -> None:
        nframes = system_frames + reserve_frames
        super().__init__(nframes, provider)
        self._allocator = FrameAllocator(system_frames, nframes)
        self._system = self._allocator.system
        self.refcount: npt.NDArray[np.int32] = _column(np.int32, nframes)
        self.mapcount: npt.NDArray[np.int32] = _column(np.int32, nframes)
        self.pincount: npt.NDArray[np.int32] = _column(np.int32, nframes)
        self.flags: Flags = _column(np.uint16, nframes)
        self.index: npt.NDArray[np.int64] = _column(np.int64, nframes)
        self.mapping: npt.NDArray[np.int64] = _column(np.int64, nframes)
        self.zone_device_data: npt.NDArray[np.int64] = _column(np.int64, nframes)
        self.private: npt.NDArray[np.int64] = _column(np.int64, nframes)
        self.lru: npt.NDArray[np.int64] = _column(np.int64, nframes)
        self._youngest = 0
        self.swap: SwapArea | None = None
        self.failing_copies: dict[MirrorId, int] = {}
        self.make_room: MakeRoom | None = None
        self.ksm_places: Callable[[Pfns], Iterator[Any]] | None = None
        self.pinned = 0
        self.poisoned = 0
        self.zero_page_poisoned = False
        self.locks = FolioLocks()
        # One element of a memoryview costs a quarter of one of an array.
        self._refcount = self.refcount.data
        self._mapcount = self.mapcount.data
        self._flags = self.flags.data
        self._mapping = self.mapping.data

    # -- regions

    @property
    def available(self) -> int:
        """Frames of system memory that can be allocated."""
        return self._system.available

    def fail_allocation(self, nth: int) -> None:
        """From the nth page of system memory on nothing can be allocated (1 is the next, 0 ends it).  For tests."""
        self._system.failing = nth

    @property
    def batch_pages(self) -> int:
        """How many pages are worth having in memory at once where memory is reclaimed: an eighth of it."""
        return max(2, self._system.total >> 3)

    @property
    def regions(self) -> list[Region]:
        """All regions, in the order they were added; the first is system memory."""
        return self._allocator.regions

    @property
    def used_end(self) -> Pfn:
        """The frame numbers from here on were never used."""
        return self._allocator.used_end

    def region(self, number: int) -> Region:
        """The region of that number.

        Raises:
            NoSuchObjectError: there is none (any more) (ENODEV).
        """
        return self._allocator.region(number)

    def region_of(self, pfn: Pfn) -> Region:
        """The region that holds a frame."""
        return self._allocator.region_of(pfn)

    def add_region(
        self, frames: int, owner: int, kind: RegionKind = RegionKind.DEVICE_PRIVATE, *, remote: bool = False
    ) -> Region:
        """Give a device memory of its own: consecutive frame numbers, all free.

        Raises:
            OutOfFramesError: no such run of frame numbers is left (ENOMEM).

        Source: Linux mm/memremap.c, memremap_pages().
        """
        return self._allocator.add_region(frames, owner, kind, remote=remote)

    def remove_region(self, number: int) -> None:
        """Take a device's memory away; its frames must be free.

        Raises:
            NoSuchObjectError: there is no such region (ENODEV).
            InUseError: frames of it are in use (EBUSY).

        Source: Linux mm/memremap.c, memunmap_pages(), which waits for the last reference instead.
        """
        region = self._allocator.remove_region(number)
        self._discard(region.start, region.top)

    # -- life and death

    def allocate(self, count: int, region: int = SYSTEM_REGION) -> Pfns:
        """Take frames that read as zeroes, with one reference each.

        Returns: int64[count], ascending; mostly consecutive.

        Raises:
            OutOfFramesError: fewer are free; nothing was changed (ENOMEM).

        Cost: 5 us, and 1 ns per page.  Source: Linux mm/page_alloc.c, alloc_pages_bulk_noprof().
        """
        where = self._take(count, region)
        if region != SYSTEM_REGION:
            self._rotate(where, count)
        return listed(where)

    def allocate_mapped(self, count: int, flags: PageFlag) -> Pfns:
        """Take frames of system memory for as many page-table entries, each frame's only reference.

        It is `allocate`, `map_new` and the frames' first flags in one pass; `unmap` undoes it.

        Returns, Raises: as `allocate`.

        Cost: 6 us, and 1 ns per page.  Source: Linux mm/rmap.c, folio_add_new_anon_rmap().
        """
        return listed(self.allocate_mapped_run(count, flags))

    def allocate_mapped_run(self, count: int, flags: PageFlag) -> Pfns | slice:
        """The same as an index: a slice of frames that are consecutive, as most are, is not written down one by one."""
        where = self._take(count, SYSTEM_REGION)
        self.mapcount[where] = _FIRST
        self.flags[where] = flag_word(flags._value_)
        return where

    def allocate_huge(self, flags: PageFlag) -> Pfns | None:
        """Take a large folio of system memory for one entry of a page directory.

        Each frame has the one reference and the map count that `allocate_mapped` would give it.

        Returns, Cost: as `allocate_folio`.
        """
        pfns = self.allocate_folio()
        if pfns is not None:
            where = slice(int(pfns[0]), int(pfns[0]) + PMD_PAGES)
            self.mapcount[where] = 1
            self.flags[where] |= np.uint16(flags)
        return pfns

    def allocate_folio(self, region: int = SYSTEM_REGION) -> Pfns | None:
        """Take a naturally aligned run of PMD_PAGES frames that are one large folio, with one reference each.

        Returns: int64[PMD_PAGES]; None when no such run is free.

        Cost: 10 us; O(frames ever used) when all frames have been used before.
        """
        taken = self._allocator.take_run(region)
        if taken is None:
            return None
        first, reused = taken
        where = slice(first, first + PMD_PAGES)
        self.refcount[where] = 1
        self.flags[where] = PageFlag.COMPOUND
        if reused:
            self._stale[where] = True
        if region != SYSTEM_REGION:
            self._rotate(where, PMD_PAGES)
        return np.arange(first, first + PMD_PAGES)

    def _take(self, count: int, region: int) -> Pfns | slice:
        """Frames with a reference each, as an index."""
        where, reused = self._allocator.take(count, region)
        self.refcount[where] = _FIRST
        if reused:
            self._stale[where if reused == count else listed(where)[:reused]] = _TRUE
        return where

    def allocate_one(self, region: int = SYSTEM_REGION) -> Pfn:
        """Take one frame that reads as zeroes, with one reference.

        Raises:
            OutOfFramesError: none is free (ENOMEM).

        Cost: 0.4 us.
        """
        pfn, reused = self._allocator.take_one(region)
        if reused:
            self._stale_view[pfn] = True
        self._refcount[pfn] = 1
        return pfn

    def allocate_mapped_one(self, flags: PageFlag) -> Pfn:
        """`allocate_mapped` for one frame.

        Cost: 0.6 us.
        """
        pfn, reused = self._allocator.take_one(SYSTEM_REGION)
        if reused:
            self._stale_view[pfn] = True
        self._refcount[pfn] = self._mapcount[pfn] = 1
        self._flags[pfn] = flags._value_
        return pfn

    def get(self, pfns: Pfns) -> None:
        """Take a reference to each; a repeated frame gets as many.

        Cost: 1 ns per page for consecutive frames, 5 ns otherwise.  Source: include/linux/mm.h, get_page().
        """
        self._get(*_counted(pfns))

    def _get(self, pfns: Pfns, where: Pfns | slice) -> None:
        assert np.count_nonzero(self.refcount[where]) == pfns.size, "a reference to a free frame"
        _add(self.refcount, where)

    def put(self, pfns: Pfns) -> Pfns:
        """Drop a reference to each; frames without any left are free.

        Returns: int64[m], the frames that were freed, ascending.

        Cost: as `get`, and 5 ns per frame freed.  Source: include/linux/mm.h, put_page().
        """
        return self._put(*_counted(pfns))

    def _put(self, pfns: Pfns, where: Pfns | slice, mapped: int = 1) -> Pfns:
        # `mapped` is 0 where none of them can be mapped.
        left, alive = _subtract(self.refcount, where, "a frame was put that nobody held")
        if alive == pfns.size:
            return pfns[:0]
        if alive:
            pfns = unique(pfns[left == 0])
            where = as_index(pfns)
        elif not isinstance(where, slice):
            pfns = where = unique(pfns)
        assert not mapped or not np.count_nonzero(self.mapcount[where]), "a frame is freed while mapped"
        self._free(pfns, where)
        return pfns

    def put_last(self, pfns: Pfns) -> None:
        """Drop the only reference of frames that are not mapped: int64[n], unique.

        Cost: 5 ns per page.
        """
        if pfns.size:
            where = as_index(pfns)
            if not isinstance(where, slice):
                pfns = where = unique(pfns)
            self.refcount[where] = _NONE
            self._free(pfns, where)

    def _free(self, pfns: Pfns, where: Pfns | slice) -> None:
        self.flags[where] = 0
        self.mapping[where] = 0
        self._allocator.give_back(pfns)

    def put_one(self, pfn: Pfn) -> bool:
        """Drop a reference.

        Returns: True when it was the last one and the frame is free.
        """
        if pfn == ZERO_PFN:
            return False
        left = self._refcount[pfn] - 1
        assert left >= 0, f"frame {pfn:#x} was put and nobody held it"
        self._refcount[pfn] = left
        if left:
            return False
        assert not self._mapcount[pfn], f"frame {pfn:#x} is freed while mapped"
        self._flags[pfn] = 0
        self._mapping[pfn] = 0
        self._allocator.give_back_one(pfn)
        return True

    def move(self, targets: Pfns, sources: Pfns) -> None:
        """Let contents go from `sources[i]` to `targets[i]`, as `copy` for frames that are about to be let go.

        Nothing is copied of a frame that the caller alone refers to: then it holds what the target held.

        Args:
            targets: int64[n], unique, in use.
            sources: int64[n], others.

        Cost: 15 ns per page; that of `copy` for pages that others refer to.  Source: Linux mm/migrate.c,
        folio_migrate_copy().
        """
        alone = self.refcount[sources] == 1
        if np.count_nonzero(alone) == alone.size:
            self.exchange(targets, sources)
            return
        self.exchange(targets[alone], sources[alone])
        self.copy(targets[~alone], sources[~alone])

    def migrate(self, targets: Pfns, sources: Pfns, index: Pfns, *, filled: bool = False) -> bool:
        """Let pages go from `sources` to `targets`: what they hold, as `move`, their flags, and page->mapping.

        Args:
            targets, sources: as for `move`.
            index: int64[n], page->index of the pages.
            filled: somebody has put into the targets what they are to hold.

        Returns: whether the caller alone refers to all of the sources.

        Cost: 30 ns per page; as `move` for pages that others refer to.  Source: Linux mm/migrate.c,
        folio_migrate_flags(), folio_migrate_mapping().
        """
        to, since = as_index(targets), as_index(sources)
        alone = int(np.count_nonzero(self.refcount[since] == _FIRST)) == sources.size
        if alone and not filled:
            self.exchange(targets, sources)
        elif not filled:
            self.move(targets, sources)
        self.flags[to] = self.flags[since] & MOVES
        self.mapping[to] = self.mapping[since]
        self.index[to] = index
        return alone

    # -- the reverse map's counts

    def map(self, pfns: Pfns) -> None:
        """Count a page-table entry more for each, and the reference that goes with it.

        Cost: twice that of `get`.  Source: Linux mm/rmap.c, folio_add_file_rmap_ptes().
        """
        pfns, where = _counted(pfns)
        self._get(pfns, where)
        _add(self.mapcount, where)

    def map_new(self, pfns: Pfns) -> None:
        """Count the first page-table entry of frames just allocated, whose reference becomes the entry's.

        Args:
            pfns: int64[n], unique, not mapped.

        Cost: 1 ns per page.  Source: Linux mm/rmap.c, folio_add_new_anon_rmap().
        """
        where = as_index(pfns)
        assert not np.count_nonzero(self.mapcount[where]), "a new frame is mapped already"
        self.mapcount[where] = 1

    def unmap(self, pfns: Pfns) -> Pfns:
        """Count a page-table entry less for each, and drop the reference that went with it.

        Returns: int64[m], the frames that were freed, ascending.

        Cost: twice that of `put`.  Source: Linux mm/rmap.c, folio_remove_rmap_ptes().
        """
        pfns, where = _counted(pfns)
        _, mapped = _subtract(self.mapcount, where, "unmapped, and not mapped")
        return self._put(pfns, where, mapped)

    def take_back(self, allocated: Pfn | Pfns | slice) -> None:
        """Undo `allocate_mapped` or its like: an injected failure is as far away again as it was before."""
        pfns = np.array([allocated]) if isinstance(allocated, int) else listed(allocated)
        self.unmap(pfns)
        if self._system.failing:
            self._system.failing += pfns.size

    def detach(self, pfns: Pfns | slice) -> None:
        """Count a page-table entry less for each; the reference that went with it stays, and is the caller's.

        Args:
            pfns: int64[n], or the slice of consecutive ones; without the zero page.

        Cost: as `get`.
        """
        _subtract(self.mapcount, as_index(pfns), "unmapped, and not mapped")

    def attach(self, pfns: Pfns) -> None:
        """Undo `detach`: count a page-table entry more for each; a reference of the caller's becomes the entry's.

        Cost: as `get`.
        """
        _add(self.mapcount, as_index(pfns))

    def unmap_one(self, pfn: Pfn) -> bool:
        """`unmap` for one frame.

        Returns: True when the frame is free.
        """
        if pfn == ZERO_PFN:
            return False
        left = self._mapcount[pfn] - 1
        assert left >= 0, f"frame {pfn:#x} was unmapped and is not mapped"
        self._mapcount[pfn] = left
        return self.put_one(pfn)

    def pin(self, pfns: Pfns) -> None:
        """Keep frames where they are: a reference each, and a count that says it is for DMA.

        Source: Linux mm/gup.c, try_grab_folio() with FOLL_PIN.
        """
        pfns, where = _counted(pfns)
        self._get(pfns, where)
        _add(self.pincount, where)
        self.pinned += pfns.size

    def unpin(self, pfns: Pfns) -> Pfns:
        """Undo `pin`.

        Returns: int64[m], the frames that were freed, ascending.

        Source: Linux mm/gup.c, unpin_user_pages().
        """
        pfns, where = _counted(pfns)
        _subtract(self.pincount, where, "unpinned, and not pinned")
        self.pinned -= pfns.size
        return self._put(pfns, where)

    # -- what a frame is

    def set_flags(self, pfns: Pfns | slice, flags: PageFlag) -> None:
        """Set flags of frames in use: int64[n], or the slice of consecutive frames."""
        self.flags[as_index(pfns)] |= np.uint16(flags)

    def clear_flags(self, pfns: Pfns, flags: PageFlag) -> None:
        """Clear flags."""
        self.flags[as_index(pfns)] &= ~np.uint16(flags)

    def test_flags(self, pfns: Pfns, flags: PageFlag) -> npt.NDArray[np.bool_]:
        """Which frames have one of `flags`.

        Returns: bool[n].
        """
        result: npt.NDArray[np.bool_] = (self.flags[pfns] & np.uint16(flags)) != 0
        return result

    def all_have(self, pfns: Pfns, flags: PageFlag) -> bool:
        """True when every frame has all of `flags`.

        Cost: 0.2 ns per page for consecutive frames.
        """
        common = np.bitwise_and.reduce(self.flags[as_index(pfns)])
        return int(common) & flags._value_ == flags._value_

    def flags_of(self, pfn: Pfn) -> int:
        """The flags of one frame, as a plain integer."""
        return self._flags[pfn]

    def set_flags_one(self, pfn: Pfn, flags: PageFlag) -> None:
        """`set_flags` for one frame."""
        self._flags[pfn] |= flags._value_

    def mark_accessed(self, pfns: Pfns, times: int = 1, *, dirty: bool = False, unevictable: bool = False) -> None:
        """Use pages so often: referenced, active, both, and then no more: folio_mark_accessed().

        Args:
            dirty: they were written too.
            unevictable: they are on no list, and only become referenced.
        """
        if not pfns.size:
            return
        where = as_index(pfns)
        flags = self.flags[where]
        if np.count_nonzero(flags == flags[0]) == flags.size:  # as of most that came together
            self.flags[where] = accessed_word(int(flags[0]), times, dirty, unevictable)
        else:
            self.flags[where] = accessed(flags, times, dirty, unevictable)

    def belong(self, pfns: Pfns, mapping: int, index: Pfns, flags: PageFlag = PageFlag.NONE) -> None:
        """Say whose pages frames are: page->mapping, page->index, and the flags they have from now on.

        Args:
            mapping, index: as the attributes; index: int64[n].

        Cost: 2 ns per page for consecutive frames.
        """
        where = as_index(pfns)
        self.mapping[where] = mapping
        self.index[where] = index
        self.flags[where] = flags

    def poison(self, pfns: Pfns) -> None:
        """Note that the contents of frames are lost: int64[n], unique, with a reference that keeps them for ever.

        Source: Linux mm/memory-failure.c, TestSetPageHWPoison().
        """
        self.set_flags(pfns, PageFlag.HWPOISON)
        self.poisoned += pfns.size

    def unpoison(self, pfns: Pfns) -> None:
        """Undo `poison`."""
        self.clear_flags(pfns, PageFlag.HWPOISON)
        self.poisoned -= pfns.size

    def rotate(self, pfns: Pfns) -> None:
        """Put frames at the young end of their list, in this order.

        Source: Linux include/linux/mm_inline.h, lruvec_add_folio().
        """
        self._rotate(pfns, pfns.size)

    def _rotate(self, where: Pfns | slice, count: int) -> None:
        self.lru[where] = np.arange(self._youngest + 1, self._youngest + 1 + count)
        self._youngest += count

    # -- looking at all of it

    def statistics(self) -> list[RegionStatistics]:
        """Numbers of every region, in the order they were added.

        Cost: O(frames ever used), vectorised.
        """
        return [
            RegionStatistics(
                number=region.number,
                owner=region.owner,
                kind=region.kind,
                total=region.total,
                free=region.free,
                used=region.used,
                mapped=int(np.count_nonzero(self.mapcount[region.first : region.top])),
                high_water=region.high_water,
            )
            for region in self.regions
        ]

    def image(self) -> tuple[object, ...]:
        """Everything that `check()` looks at, as a value (`checked.HasImage`).  Cost: O(frames ever used), a copy."""
        used = self.used_end
        columns = (self.refcount, self.mapcount, self.pincount, self.flags, self.mapping, self.private, self._shift)
        return *(column[:used].tobytes() for column in columns), *self._allocator.image(), *super().image()

    def check(self) -> None:
        """Assert all invariants.

        Cost: O(frames ever used), vectorised.
        """
        super().check()
        self._allocator.check()
        self.locks.check()
        everyone = np.arange(self.used_end)
        assert np.array_equal(np.sort(self._places(everyone)), everyone), "two frames share a row"
        assert int(self.pincount[: self.used_end].sum()) == self.pinned, "pins are miscounted"
        for region in self.regions:
            free = self._allocator.free_mask(region)
            frames = slice(region.first, region.top)
            refcount, mapcount, pincount = self.refcount[frames], self.mapcount[frames], self.pincount[frames]
            flags = self.flags[frames]
            assert (refcount[~free] > 0).all(), f"{region}: a frame in use has no reference"
            for column in (refcount, mapcount, pincount, flags, self.mapping[frames], self.private[frames]):
                assert not column[free].any(), f"{region}: a free frame is counted, flagged or owned"
            assert (mapcount >= 0).all(), f"{region}: mapped less than never"
            assert (pincount >= 0).all(), f"{region}: pinned less than never"
            assert (refcount >= np.maximum(mapcount, pincount)).all(), f"{region}: too few references"
            exclusive = (flags & np.uint16(PageFlag.ANON_EXCLUSIVE)) != 0
            anonymous = (flags & np.uint16(PageFlag.ANON)) != 0
            assert not (exclusive & ~anonymous).any(), f"{region}: exclusive and not anonymous"
            merged = (flags & np.uint16(PageFlag.KSM)) != 0
            assert not (exclusive & merged).any(), f"{region}: a merged page is somebody's alone"


def _column(dtype: type[np.number[Any]], nframes: int) -> npt.NDArray[Any]:
    size = np.dtype(dtype).itemsize
    return np.frombuffer(anonymous_memory(nframes * size), dtype, nframes)


def _counted(pfns: Pfns) -> tuple[Pfns, Pfns | slice]:
    """The frames without the zero page, and the index that selects them."""
    run = as_slice(pfns)
    if run is None:
        if np.count_nonzero(pfns) < pfns.size:
            pfns = pfns[pfns != ZERO_PFN]
        return pfns, pfns
    if run.start == ZERO_PFN and pfns.size:
        return pfns[1:], slice(ZERO_PFN + 1, run.stop)
    return pfns, run


def _add(counts: npt.NDArray[np.int32], where: Pfns | slice) -> None:
    if isinstance(where, slice):
        counts[where] += _ONE
    else:
        np.add.at(counts, where, _ONE)


def _subtract(counts: npt.NDArray[np.int32], where: Pfns | slice, negative: str) -> tuple[npt.NDArray[np.int32], int]:
    """Count down; `negative` is what it means when a count was 0.

    Returns: int32[n], what is left of each, and how many of these are not 0.
    """
    if isinstance(where, slice):
        left = counts[where]
        left -= _ONE
    else:
        np.subtract.at(counts, where, _ONE)
        left = counts[where]
    number = int(np.count_nonzero(left))
    assert not number or not np.count_nonzero(left < 0), negative
    return left, number
