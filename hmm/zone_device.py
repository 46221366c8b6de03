"""Frames that belong to devices: which of some frames do, to whom, and which copies of pages there and back fail.

**Source**: Linux include/linux/memremap.h: is_zone_device_page(), is_device_private_page(), page->pgmap->owner.

**Absent**: who is free (frame_allocator.py).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from hmm.frames import SYSTEM_REGION, Frames, Region, RegionKind
from hmm.units import MirrorId, Pfns

__all__ = [
    "are_in",
    "are_private",
    "are_remote",
    "failing_copies",
    "forget_holder",
    "owners",
    "sole_region",
    "used_frames",
]


def owners(frames: Frames, pfns: Pfns) -> Pfns:
    """The device that each frame belongs to, 0 for system memory.

    Returns: int64[n].

    Cost: two passes when all belong to the same, O(n * regions) otherwise.
    """
    sole = sole_region(frames, pfns)
    if sole is not None:
        return np.full(pfns.size, sole.owner, np.int64)
    found = np.zeros(pfns.size, np.int64)
    for region in frames.regions[1:]:
        found[(pfns >= region.start) & (pfns < region.end)] = region.owner
    return found


def are_private(frames: Frames, pfns: Pfns) -> npt.NDArray[np.bool_]:
    """Which frames the CPU cannot reach: bool[n].  Cost: as `owners`."""
    return are_in(frames, pfns, lambda region: region.kind is RegionKind.DEVICE_PRIVATE)


def are_remote(frames: Frames, pfns: Pfns) -> npt.NDArray[np.bool_]:
    """Which frames have their contents with a driver: bool[n].  Cost: as `owners`."""
    return are_in(frames, pfns, lambda region: region.remote)


def are_in(frames: Frames, pfns: Pfns, condition: Callable[[Region], bool]) -> npt.NDArray[np.bool_]:
    """Which frames are in a region that satisfies a condition: bool[n].  Cost: as `owners`."""
    sole = sole_region(frames, pfns)
    if sole is not None:
        return np.full(pfns.size, condition(sole), np.bool_)
    found = np.zeros(pfns.size, np.bool_)
    for region in frames.regions:
        if condition(region):
            found |= (pfns >= region.start) & (pfns < region.end)
    return found


def sole_region(frames: Frames, pfns: Pfns) -> Region | None:
    """The region that all of the frames are in, if there is one.  Cost: one or two passes."""
    if not pfns.size:
        return frames.region(SYSTEM_REGION)
    # Finding where the bounds are takes a third of the time of reducing to them.
    region = frames.region_of(int(pfns[pfns.argmax()]))
    return region if not region.start or pfns[pfns.argmin()] >= region.start else None


def used_frames(frames: Frames, region_number: int) -> Pfns:
    """The frames of a region that are in use: int64[n], ascending.  Cost: O(frames of it ever used)."""
    region = frames.region(region_number)
    return np.flatnonzero(frames.refcount[region.first : region.top]) + region.first


def forget_holder(frames: Frames, mirror_id: MirrorId) -> None:
    """Nobody is to be told any more when pages that this mirror put on a device come back."""
    for region in frames.regions[1:]:
        holders = frames.zone_device_data[region.first : region.top]
        holders[holders == mirror_id] = 0
    frames.failing_copies.pop(mirror_id, None)


def failing_copies(frames: Frames, holders: Pfns) -> npt.NDArray[np.intp]:
    """Count pages that are copied to devices or back.

    Args:
        holders: int64[n], for whose mirror: whose driver puts the page on its device, or has put it there.

    Returns: intp[m], ascending, those of them whose copy was made to fail (`Frames.failing_copies`).

    Cost: O(n) for each mirror that has a failure to come.
    """
    failed = np.zeros(holders.size, np.bool_)
    for mirror_id, nth in list(frames.failing_copies.items()):
        pages = np.flatnonzero(holders == mirror_id)
        if pages.size < nth:
            frames.failing_copies[mirror_id] = nth - pages.size
        else:
            failed[pages[nth - 1]] = True
            del frames.failing_copies[mirror_id]
    return np.flatnonzero(failed)
