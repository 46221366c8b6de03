"""Frames that belong to devices: which of some frames do, and to whom.

**Source**: Linux include/linux/memremap.h: is_zone_device_page(), is_device_private_page(), page->pgmap->owner.

**Absent**: who is free (frame_allocator.py).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hmm.frames import Frames, Region, RegionKind
from hmm.units import MirrorId, Pfns

__all__ = ["are_private", "are_remote", "forget_holder", "owners", "used_frames"]


def owners(frames: Frames, pfns: Pfns) -> Pfns:
    """The device that each frame belongs to, 0 for system memory.

    Returns: int64[n].

    Cost: O(n * regions), vectorised.
    """
    found = np.zeros(pfns.size, np.int64)
    for region in _regions_with(frames, pfns):
        found[(pfns >= region.start) & (pfns < region.end)] = region.owner
    return found


def are_private(frames: Frames, pfns: Pfns) -> npt.NDArray[np.bool_]:
    """Which frames the CPU cannot reach: bool[n].  Cost: as `owners`."""
    found = np.zeros(pfns.size, np.bool_)
    for region in _regions_with(frames, pfns):
        if region.kind is RegionKind.DEVICE_PRIVATE:
            found |= (pfns >= region.start) & (pfns < region.end)
    return found


def are_remote(frames: Frames, pfns: Pfns) -> npt.NDArray[np.bool_]:
    """Which frames have their contents with a driver: bool[n].  Cost: as `owners`."""
    found = np.zeros(pfns.size, np.bool_)
    for region in _regions_with(frames, pfns):
        if region.remote:
            found |= (pfns >= region.start) & (pfns < region.end)
    return found


def _regions_with(frames: Frames, pfns: Pfns) -> list[Region]:
    """The memories of devices that could have some of the frames: none, mostly."""
    regions = frames.regions
    return regions[1:] if pfns.size and np.maximum.reduce(pfns) >= regions[0].end else []


def used_frames(frames: Frames, region_number: int) -> Pfns:
    """The frames of a region that are in use: int64[n], ascending.  Cost: O(frames of it ever used)."""
    region = frames.region(region_number)
    return np.flatnonzero(frames.refcount[region.first : region.top]) + region.first


def forget_holder(frames: Frames, mirror_id: MirrorId) -> None:
    """Nobody is to be told any more when pages that this mirror put on a device come back."""
    for region in frames.regions[1:]:
        holders = frames.zone_device_data[region.first : region.top]
        holders[holders == mirror_id] = 0
