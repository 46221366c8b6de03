"""Which frames are free: regions of frame numbers, each with a stack of frames that were used before.

There is one space of frame numbers, as in the kernel: system memory first, and above it a region for the
memory of every device that has some (ZONE_DEVICE).  A region hands out the frames that were used before
first, since their memory is committed, and then those that never were, upwards.  What is freed together
comes back together and in ascending order, so that most allocations are one run of consecutive frames.

**Source**: Linux mm/page_alloc.c, mm/memremap.c (memremap_pages(), memunmap_pages()), kernel/resource.c
(request_free_mem_region()).

**Invariants** (`check()`): the free stack of a region holds frames of the region below its `top`, each
once; those above its `loose` ones are consecutive, the lowest on top; regions do not overlap.

**Absent**: what a frame holds and who refers to it.
"""

from __future__ import annotations

import errno as errnos
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from hmm.ascending import is_ascending
from hmm.errors import InUseError, NoSuchObjectError, OutOfFramesError
from hmm.frame_contents import ZERO_PFN, anonymous_memory
from hmm.units import PMD_PAGES, Pfn, Pfns

SYSTEM_REGION = 0
"""The number of the region that is system memory."""


def listed(where: Pfns | slice) -> Pfns:
    """The frames of an index one by one, int64[n]."""
    return np.arange(where.start, where.stop) if isinstance(where, slice) else where


class RegionKind(Enum):
    """What memory a region is; enum memory_type of include/linux/memremap.h."""

    SYSTEM = "system"
    DEVICE_PRIVATE = "device private"
    DEVICE_COHERENT = "device coherent"


@dataclass(slots=True, eq=False)
class Region:
    """Consecutive frames [start, end) of one owner.

    Attributes:
        number: name of the region, never given again.
        owner: id of the device; 0 for the system.
        first: the first frame that can be allocated: `start`, but behind the zero page.
        top: the first frame that was never used.
        nfree: frames on the free stack.
        loose: how many of them lie below those on top that are known to be one run, in order.
        high_water: most frames that were in use at a time.
        failing: the nth page from now on cannot be allocated, nor any behind it; 0: no failure is injected.
        failing_touches: the nth page from now on that is touched here cannot come back (VM_FAULT_SIGBUS of its device's
            migrate_to_ram()); 0: no failure is injected.
        remote: what the frames hold is with the device's driver; the bytes here mean nothing.
        searched: no run is among the frames on the free stack.
    """

    number: int
    start: Pfn
    end: Pfn
    owner: int
    kind: RegionKind
    first: Pfn
    top: Pfn
    nfree: int = 0
    loose: int = 0
    high_water: int = 0
    failing: int = 0
    failing_touches: int = 0
    remote: bool = False
    searched: bool = False

    def __str__(self) -> str:
        return f"{self.kind.value} memory" + (f" of device {self.owner}" if self.owner else "")

    @property
    def total(self) -> int:
        """Frames that can be in use at a time; the zero page is not one of them."""
        return self.end - self.first

    @property
    def used(self) -> int:
        """Frames in use."""
        return self.top - self.first - self.nfree

    @property
    def free(self) -> int:
        """Frames that are not in use."""
        return self.end - self.top + self.nfree

    @property
    def available(self) -> int:
        """Frames that can be allocated: those that are free, or fewer where a failure is injected."""
        free = self.end - self.top + self.nfree
        return min(free, self.failing - 1) if self.failing else free

    def count_down(self, count: int) -> None:
        """Let `count` pages be allocated, or fail as injected.

        Raises:
            OutOfFramesError: the failing page is one of them; nothing was changed (ENOMEM).

        Source: Linux lib/fault-inject.c, fail_page_alloc; /proc/PID/fail-nth.
        """
        if count >= self.failing:
            raise OutOfFramesError(f"{self}: the allocation of {count} frames failed: a failure was injected")
        self.failing -= count


class FrameAllocator:
    """Free frames, by region.

    Args:
        system_frames: size of the system's region in frames, the zero page included.
        nframes: size of the space of frame numbers.
    """

    def __init__(self, system_frames: int, nframes: int) -> None:
        assert 1 < system_frames <= nframes, (system_frames, nframes)
        self._nframes = nframes
        # The stacks of all regions in one array: each has its part at its own frame numbers, and grows downwards, so
        # that frames that are pushed in order lie, and are popped, in order.
        word = np.dtype(np.uint32 if nframes <= 1 << 32 else np.uint64)
        self._stack = np.frombuffer(anonymous_memory(nframes * word.itemsize), word, nframes)
        self._stack_view = self._stack.data
        first = ZERO_PFN + 1
        self.system = Region(SYSTEM_REGION, 0, system_frames, 0, RegionKind.SYSTEM, first, first)
        self._regions = {SYSTEM_REGION: self.system}
        self._next_number = SYSTEM_REGION + 1
        self._removed_top: Pfn = 0  # of regions that are gone

    @property
    def regions(self) -> list[Region]:
        """All regions, in the order they were added."""
        return list(self._regions.values())

    @property
    def used_end(self) -> Pfn:
        """The frame numbers from here on were never used."""
        return max(self._removed_top, *(region.top for region in self._regions.values()))

    def region(self, number: int) -> Region:
        """The region of that number.

        Raises:
            NoSuchObjectError: there is none (any more) (ENODEV).
        """
        region = self._regions.get(number)
        if region is None:
            raise NoSuchObjectError(f"memory region {number} does not exist", errnos.ENODEV)
        return region

    def add_region(self, frames: int, owner: int, kind: RegionKind, *, remote: bool = False) -> Region:
        """Reserve consecutive frame numbers, at the lowest place where they fit; aligned to PMD_PAGES if it can be.

        Raises:
            OutOfFramesError: no such run of frame numbers is left (ENOMEM).

        Cost: O(regions).  Source: Linux kernel/resource.c, request_free_mem_region().
        """
        assert frames > 0, frames
        start = self._gap(frames, PMD_PAGES) if frames >= PMD_PAGES else None
        if start is None:
            start = self._gap(frames, 1)
        if start is None:
            raise OutOfFramesError(f"{kind.value} memory: no {frames} consecutive frame numbers are left")
        region = Region(self._next_number, start, start + frames, owner, kind, start, start, remote=remote)
        self._next_number += 1
        self._regions[region.number] = region
        return region

    def _gap(self, frames: int, unit: int) -> Pfn | None:
        """The lowest multiple of `unit` where so many frame numbers are free."""
        start = 0
        for region in sorted(self._regions.values(), key=lambda region: region.start):
            if region.start - start >= frames:
                break
            start = -(-region.end // unit) * unit
        return start if start + frames <= self._nframes else None

    def remove_region(self, number: int) -> Region:
        """Release the frame numbers of a region whose frames are all free.

        Raises:
            NoSuchObjectError: there is none (ENODEV).
            InUseError: frames of it are in use (EBUSY).
        """
        assert number != SYSTEM_REGION, "system memory stays"
        region = self.region(number)
        if region.used:
            raise InUseError(f"remove {region}: {region.used} frames are in use")
        del self._regions[number]
        self._removed_top = max(self._removed_top, region.top)
        return region

    def take(self, count: int, number: int) -> tuple[Pfns | slice, int]:
        """Allocate frames.

        Returns: an index of frames: a slice when they are consecutive, else int64[count], ascending; and how many of
        them were used before, which are the first ones.

        Raises:
            OutOfFramesError: fewer are free; nothing was changed (ENOMEM).

        Cost: 1 ns per page.
        """
        region = self._regions.get(number) or self.region(number)
        top = region.top
        if count > region.end - top + region.nfree:
            raise OutOfFramesError(f"{region}: {count} frames wanted, {region.free} of {region.total} free")
        if region.failing:
            region.count_down(count)
        reused = min(count, region.nfree)
        popped = self._pop(region, reused) if reused else slice(top, top)
        region.top = top + count - reused
        region.high_water = max(region.high_water, region.used)
        if reused == count:
            return popped, reused
        if isinstance(popped, slice) and popped.stop == top:
            return slice(popped.start, region.top), reused
        return np.concatenate((listed(popped), np.arange(top, region.top))), reused

    def _pop(self, region: Region, count: int) -> Pfns | slice:
        """Take frames from the stack, which holds as many."""
        at, ordered = region.end - region.nfree, region.nfree - region.loose
        region.nfree -= count
        if count <= ordered:
            first = self._stack_view[at]
            return slice(first, first + count)
        popped = self._stack[at : at + count]
        first, last = int(popped[0]), int(popped[-1])
        if last - first == count - 1 and popped.argmin() == 0 and popped.argmax() == count - 1:
            return slice(first, last + 1)  # as many as that are all of them, in whatever order, for none is there twice
        pfns = popped.astype(np.int64)
        if not is_ascending(popped):
            pfns.sort()
        return pfns

    def take_one(self, number: int) -> tuple[Pfn, bool]:
        """Allocate one frame.

        Returns: the frame, and whether it was used before.

        Raises:
            OutOfFramesError: none is free (ENOMEM).
        """
        region = self._regions.get(number) or self.region(number)
        if region.failing:
            region.count_down(1)
        if region.nfree:
            pfn, reused = self._stack_view[region.end - region.nfree], True
            region.nfree -= 1
        elif region.top < region.end:
            pfn, reused = region.top, False
            region.top = pfn + 1
        else:
            raise OutOfFramesError(f"{region}: none of {region.total} frames is free")
        used = region.top - region.first - region.nfree
        if used > region.high_water:  # noqa: PLR1730 - max() would cost as much as the rest
            region.high_water = used
        return pfn, reused

    def take_run(self, number: int) -> tuple[Pfn, bool] | None:
        """Allocate a naturally aligned run of PMD_PAGES frames of a region.

        Returns: the first frame, and whether the run was used before; None when no such run is free.

        Cost: that of looking at PMD_PAGES frames when they are on top of the stack or were never used; else O(frames
        ever used), at most once between two times that frames are freed.

        Source: Linux mm/page_alloc.c, alloc_pages() of order HPAGE_PMD_ORDER.
        """
        region = self.region(number)
        first = self._run_on_top(region)
        if first is None:
            first = -(-region.top // PMD_PAGES) * PMD_PAGES
            if first + PMD_PAGES <= region.end:
                if first > region.top:
                    self._push(region, np.arange(region.top, first))
                region.top = first + PMD_PAGES
                region.high_water = max(region.high_water, region.used)
                return first, False
            first = self._scattered_run(region)
        if first is None:
            return None
        region.high_water = max(region.high_water, region.used)
        return first, True

    def _run_on_top(self, region: Region) -> Pfn | None:
        """Pop a run that was freed as one, if it is what stands on top."""
        if region.nfree < PMD_PAGES:
            return None
        run = self._free_frames(region)[:PMD_PAGES]
        first = int(run[0])
        if first % PMD_PAGES or int(run[-1]) != first + PMD_PAGES - 1 or not is_ascending(run):
            return None
        region.nfree -= PMD_PAGES
        return first

    def _scattered_run(self, region: Region) -> Pfn | None:
        """Take a run whose frames were freed one by one out of the stack."""
        if region.nfree < PMD_PAGES or region.searched:
            return None
        region.searched = True
        stack = self._free_frames(region)
        blocks, counts = np.unique(stack // PMD_PAGES, return_counts=True)
        whole = blocks[counts == PMD_PAGES]
        if not whole.size:
            return None
        region.searched = False  # there may be another one
        first = int(whole[0]) * PMD_PAGES
        rest = stack[(stack < first) | (stack >= first + PMD_PAGES)]
        region.nfree = region.loose = rest.size
        self._free_frames(region)[:] = rest
        return first

    def _free_frames(self, region: Region) -> npt.NDArray[np.unsignedinteger[Any]]:
        """The frames on the stack of a region, that on top first, as a view."""
        return self._stack[region.end - region.nfree : region.end]

    def give_back(self, pfns: Pfns) -> None:
        """Free frames of any regions.

        Args:
            pfns: int64[n], ascending and unique.

        Cost: 1 ns per page.
        """
        last = self.region_of(int(pfns[-1]))
        if pfns[0] >= last.start:
            self._push(last, pfns)
            return
        for region in self._regions.values():
            low, high = pfns.searchsorted((region.start, region.end))
            if low < high:
                self._push(region, pfns[low:high])

    def _push(self, region: Region, pfns: Pfns) -> None:
        region.searched = False
        first, last = int(pfns[0]), int(pfns[-1])
        if last - first >= pfns.size:
            region.loose = region.nfree + pfns.size
        elif not self._continues(region, last):
            region.loose = region.nfree
        region.nfree += pfns.size
        self._free_frames(region)[: pfns.size] = pfns

    def give_back_one(self, pfn: Pfn) -> None:
        """Free one frame."""
        region = self.system if pfn < self.system.end else self.region_of(pfn)
        region.searched = False
        if not self._continues(region, pfn):
            region.loose = region.nfree
        region.nfree += 1
        self._stack_view[region.end - region.nfree] = pfn

    def _continues(self, region: Region, last: Pfn) -> bool:
        """Whether a run that ends with `last` makes one with those on top of the stack."""
        return region.nfree > region.loose and self._stack_view[region.end - region.nfree] == last + 1

    def region_of(self, pfn: Pfn) -> Region:
        """The region that holds a frame, which must be in one.

        Cost: O(regions).
        """
        for region in self._regions.values():
            if region.start <= pfn < region.end:
                return region
        raise AssertionError(f"frame {pfn:#x} is in no region")

    def free_mask(self, region: Region) -> npt.NDArray[np.bool_]:
        """Which of the frames from `first` to `top` are on the free stack, each once.

        Returns: bool[top - first].

        Cost: O(frames ever used).
        """
        stack = self._free_frames(region)
        assert ((stack >= region.first) & (stack < region.top)).all(), f"{region}: foreign frames"
        free = np.zeros(region.top - region.first, np.bool_)
        free[stack.astype(np.int64) - region.first] = True
        assert np.count_nonzero(free) == stack.size, f"{region}: a frame is free twice"
        return free

    def image(self) -> tuple[object, ...]:
        """Everything that `check()` and `free_mask()` look at, as a value.  Cost: O(frames ever used), a copy."""
        return tuple(
            (region.start, region.end, region.top, region.loose, self._free_frames(region).tobytes())
            for region in self._regions.values()
        )

    def check(self) -> None:
        """Assert that regions do not overlap, their numbers fit, and runs are runs.

        Cost: O(regions), and O(frames of the runs on top).
        """
        end = 0
        for region in sorted(self._regions.values(), key=lambda region: region.start):
            assert end <= region.start <= region.first <= region.top <= region.end, region
            assert 0 <= region.used <= region.high_water <= region.total, region
            run = self._free_frames(region)[: max(region.nfree - region.loose, 0)].astype(np.int64)
            assert np.array_equal(run, np.arange(run.size) + run[:1]), f"{region}: what is on top is no run"
            end = region.end
        assert end <= self._nframes
