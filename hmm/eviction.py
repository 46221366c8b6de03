"""Pages leave the memory of a device for system memory, whoever has mapped them.

    evict            everything that is in a device's memory: migrate_device_range()
    make_room        what went there longest ago, when more is to go there than there is room for
    move_to_system   these frames, as before a pin for long: migrate_device_coherent_folio()

What a mirror of 2015 has put on its device it gives up itself (mirror_memory.py).

**Source**: Linux mm/migrate_device.c, 6.12; the drivers of devices decide what goes.

**Invariants**: nothing is lost when a page cannot be moved: it stays where it is.

**Absent**: pages that go and come back by request or by touch (device_pages.py).

Differs: a large folio that finds no run of frames in system memory moves by small pages, where the kernel's test driver
follows a null pointer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.ascending import is_ascending
from hmm.device_pages import Wanted
from hmm.errors import OutOfFramesError
from hmm.frames import Frames, Region
from hmm.large_folio import are_compound, belong_to, heads_of, with_folios
from hmm.migration import Positions
from hmm.migration_entries import HeldPages, replace, unmap_everywhere
from hmm.migration_folios import map_by_pages
from hmm.notifier import Breaking
from hmm.operation import Operation, Pause
from hmm.rmap import Places, anonymous_places, merged_places
from hmm.subscriber import Home
from hmm.swap import some_room
from hmm.units import PIECE_PAGES, PMD_PAGES, WHOLE_SPACE, AddressRange, Pfns, SpaceId
from hmm.vma import Backing
from hmm.zone_device import failing_copies, used_frames

__all__ = ["evict", "make_room", "move_to_system"]


def evict(frames: Frames, spaces: Mapping[SpaceId, AddressSpace], region: Region, operation_id: int) -> Operation[int]:
    """Move everything in a device's memory to system memory, whoever has mapped it.

    Args:
        spaces: all that there are, by id; kept up while the call waits, as all such arguments here.
        operation_id: whose locks the pages have meanwhile.

    Returns: number of pages moved.

    Raises:
        OutOfFramesError: system memory ran out; what was moved stays moved (ENOMEM).
        TimedOutError: a mirror with policy FAIL did not answer (ETIMEDOUT).

    Cost: O(VMAs + pages), vectorised.  Source: Linux mm/migrate_device.c, migrate_device_range().
    """
    step = min(PIECE_PAGES, frames.batch_pages) if frames.make_room else PIECE_PAGES
    moved = 0
    for home in _homes(spaces, region):
        moved += yield from home.vacate((WHOLE_SPACE,))
    for first in range(region.first, region.top, step):
        used = used_frames(frames, region.number)
        pfns = used[(used >= first) & (used < first + step)]
        if pfns.size:
            moved += yield from move_to_system(frames, spaces, pfns, operation_id)
            yield Pause()
    return moved


def make_room(
    space: AddressSpace,
    spaces: Mapping[SpaceId, AddressSpace],
    span: AddressRange,
    region: Region,
    wanted: Wanted | None = None,
) -> Operation[int]:
    """Move out of a device's memory what went there longest ago, so that a range fits, or as much as there can be room.

    It is tried once: others who want room at the same time may take it, and then less of the range fits.

    Args:
        space, span: what is about to be moved there; what it has there already stays.
        spaces: all that there are, by id.
        wanted: as for `migrate_to_device`.

    Returns: number of pages moved; less than were needed when pages are in use, or system memory runs out.

    Raises: TimedOutError: a mirror with policy FAIL did not answer (ETIMEDOUT).

    Cost: as `evict`, for the pages that move.  Source: the device's driver does it, as nouveau_dmem_evict_chunk() and
    svm_range_evict() of amdgpu do.
    """
    frames, moved = space.frames, 0
    pfns = cpu_pte.cpu_pfn(space.table.read(span.start, span.end))
    if wanted is not None:
        pfns = pfns[wanted]
    there = pfns[(pfns >= region.start) & (pfns < region.end)]
    needed = min(pfns.size - there.size, region.total - there.size) - region.free
    if needed <= 0:
        return 0
    used = used_frames(frames, region.number)
    used = used[(frames.pincount[used] == 0) & ~np.isin(used, there)]
    oldest = used[np.argsort(frames.lru[used], kind="stable")[:needed]]
    if are_compound(frames, oldest).any():
        oldest = with_folios(frames, oldest)
    try:
        for home in _homes(spaces, region):
            moved += yield from home.give_up(oldest)
        step = frames.batch_pages if frames.make_room else PIECE_PAGES
        for first in range(0, oldest.size, step):
            part = oldest[first : first + step]
            moved += yield from move_to_system(frames, spaces, part, space.current.operation_id)
    except OutOfFramesError:
        pass  # as much as there is room for
    return moved


def move_to_system(
    frames: Frames, spaces: Mapping[SpaceId, AddressSpace], pfns: Pfns, operation_id: int
) -> Operation[int]:
    """Move frames of devices to system memory, as far as nobody else uses them; where memory is reclaimed, a batch.

    Large folios stay large where a run of frames is free; otherwise they are split.

    Args:
        spaces: those that may map them, by id; a child that fork adds meanwhile is one.
        pfns: int64[n], unique.
        operation_id: as for `evict`.

    Returns: number of pages moved.

    Raises: as `evict`.

    Source: Linux mm/migrate_device.c, migrate_device_pfns(), migrate_device_coherent_folio(), which leaves it to the
    driver to find memory for a large folio.
    """
    if pfns.size > frames.available:  # before they are taken: reclaim may wait for a driver that touches one of them
        yield from some_room(frames, pfns.size)
    pfns = pfns[(frames.mapcount[pfns] > 0) & ~frames.locks.are_locked(pfns) & ~_have_homes(frames, spaces, pfns)]
    if not pfns.size:
        return 0
    if frames.make_room:
        pfns = pfns[: frames.batch_pages]
    asked = pfns
    if are_compound(frames, pfns).any():
        pfns = with_folios(frames, pfns)
    pfns = pfns[np.argsort(frames.index[pfns], kind="stable")]
    indices = frames.index[pfns]

    def places() -> Iterator[Places]:
        for space in (spaces[number] for number in sorted(spaces)):
            backings = {vma.backing.id if vma.backing else 0: vma.backing for vma in space.vmas if vma.anon_vma}
            for backing in backings.values():
                yield from _places(space, indices, backing)
        yield from merged_places(frames, pfns)

    frames.get(pfns)
    held, targets = HeldPages(frames, pfns, indices, places), pfns
    room = np.zeros(pfns.size, np.int64)
    notifiers = [space.notifier for space in spaces.values()]
    with Breaking(notifiers, f"moving {pfns.size} pages off a device"), frames.locks.lock(pfns, operation_id):
        try:
            room = _allocate(frames, pfns, np.isin(pfns, asked, assume_unique=True))
            yield from unmap_everywhere(held, only_where_mapped=True)
            free = (frames.mapcount[pfns] == 0) & (frames.refcount[pfns] == 1)
            for folio in _folios_among(frames, pfns):
                free[folio] = free[folio].all()
            map_by_pages(held, free & are_compound(frames, pfns) & ~are_compound(frames, room))
            targets = np.where(free & (room != 0), room, pfns)
            if frames.failing_copies:
                moved = targets != pfns
                failed = pfns[moved][failing_copies(frames, frames.zone_device_data[pfns[moved]])]
                stays = np.isin(pfns, with_folios(frames, failed))
                targets[stays] = pfns[stays]
        finally:
            replace(held, targets)
            frames.put(room[(room != 0) & (targets != room)])
    return int(np.count_nonzero(targets != pfns))


def _homes(spaces: Mapping[SpaceId, AddressSpace], region: Region) -> Iterator[Home]:
    """What mirrors of 2015 have in a device's memory, which they alone give up; others may come and go meanwhile."""
    for space in list(spaces.values()):
        for subscriber in list(space.notifier.subscribers.values()):
            if subscriber.home is not None and subscriber.home.region is region:
                yield subscriber.home


def _have_homes(frames: Frames, spaces: Mapping[SpaceId, AddressSpace], pfns: Pfns) -> npt.NDArray[np.bool_]:
    """bool[n]: which pages a mirror of 2015 has there, which alone gives them up."""
    subscribers = [one for space in spaces.values() for one in space.notifier.subscribers.values()]
    return np.isin(frames.zone_device_data[pfns], [one.id for one in subscribers if one.home is not None])


def _places(space: AddressSpace, indices: Pfns, backing: Backing | None) -> Iterator[Places]:
    """`anonymous_places` for pages of many processes, of which some have the same offset: those one after the other."""
    if is_ascending(indices):
        yield from anonymous_places([space], indices, backing)
        return
    repetition = np.arange(indices.size) - np.searchsorted(indices, indices)
    for number in range(int(repetition.max()) + 1):
        chosen = np.flatnonzero(repetition == number)
        for place in anonymous_places([space], indices[chosen], backing):
            yield Places(space, place.vma, place.addresses, chosen[place.pages])


def _folios_among(frames: Frames, pfns: Pfns) -> list[Positions]:
    """Where the pages of each large folio are."""
    return [np.flatnonzero(belong_to(frames, pfns, head)) for head in heads_of(frames, pfns)]


def _allocate(frames: Frames, pfns: Pfns, asked: npt.NDArray[np.bool_]) -> Pfns:
    """Destinations for the pages that are asked for: int64[n], 0 for the others.

    Before anybody is told: while mirrors are waited for, others may take what is free.
    """
    count = int(np.count_nonzero(asked))
    if count > frames.available:
        raise OutOfFramesError(f"evict: {count} pages have to move and {frames.available} frames are free")
    room = np.zeros(pfns.size, np.int64)
    for folio in _folios_among(frames, pfns):
        if folio.size == PMD_PAGES and asked[folio].all() and (run := frames.allocate_folio()) is not None:
            room[folio] = run[pfns[folio] % PMD_PAGES]
    small = asked & (room == 0)
    room[small] = frames.allocate(int(np.count_nonzero(small)))
    return room
