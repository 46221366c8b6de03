"""Pages in the memory of devices: there and back.

    to the device    migrate_to_device   by its driver's request
    back             migrate_to_system   by its driver's request
                     RESOLVERS[DEVICE]   a CPU, or another device, touches the page: migrate_to_ram()

The frames of devices have bytes like all others, so what a page holds goes with it here, and not by the driver.  Before
a page leaves because it was touched, the mirror that put it there is told to stop using it (COPY_FROM_DEVICE).

A huge page goes there as one where that is asked for, comes back as one when it is touched, and by small pages where no
run of frames is free.

A copy fails where that was injected: the page stays where it is, and the huge page that it is part of.  Whoever
touched it gets SIGBUS.

What a mirror of 2015 has put on its device comes back by way of that mirror (mirror_memory.py).

**Source**: Linux mm/migrate_device.c, mm/memory.c (do_swap_page()), lib/test_hmm.c (dmirror_devmem_fault()), 6.12;
drivers/gpu/drm/nouveau/nouveau_dmem.c (nouveau_dmem_migrate_copy_one(), nouveau_dmem_migrate_to_ram()) for copies that
fail; mm/huge_memory.c (do_huge_pmd_device_private()), 7.0.

**Invariants**: a device's frame in use is mapped as a device's page or held by a migration; nothing is lost when a
page cannot be moved: it stays where it is.

**Absent**: the steps of a migration (migrate.py); eviction (eviction.py); swap.

Differs: a large folio that a device has no memory left for moves by small pages as far as there is room, where the
kernel's test driver follows a null pointer.
"""

from __future__ import annotations

from functools import partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.ascending import unique
from hmm.errors import OutOfFramesError, SegmentationFault, Signal
from hmm.events import Cause, Event, EventType
from hmm.fault import RESOLVERS
from hmm.fault_pages import Strangers
from hmm.frames import SYSTEM_REGION, Frames, Region, RegionKind
from hmm.migrate import migrate_vma, run
from hmm.migration import (
    COMPOUND,
    MIGRATE,
    NOT_MIGRATE,
    VALID,
    WRITE,
    Migration,
    Positions,
    Select,
    migrate_pfn,
)
from hmm.migration_entries import wait_on_locked
from hmm.operation import Deliver, Operation, Pause
from hmm.swap import some_room
from hmm.units import (
    PAGE_SHIFT,
    PAGE_SIZE,
    PMD_MASK,
    PMD_PAGES,
    PMD_SIZE,
    ULONG_MAX,
    AddressRange,
    DeviceId,
    Entries,
    MirrorId,
    Pfns,
    block_starts,
    spans_of,
)
from hmm.zone_device import are_remote, failing_copies, owners

__all__ = ["Wanted", "lose", "migrate_to_device", "migrate_to_system"]

Wanted: TypeAlias = npt.NDArray[np.bool_]
"""Of each page of a range whether a driver gives it a destination."""

_PRIVATE = Select.DEVICE_PRIVATE | Select.COMPOUND
_MIGRATE = np.array(MIGRATE, np.uint64)
_VALID = np.array(VALID, np.uint64)
_WRITE = np.array(WRITE, np.uint64)
_COMPOUND = np.uint64(COMPOUND)


def migrate_to_device(
    space: AddressSpace,
    span: AddressRange,
    region: Region,
    mirror_id: MirrorId,
    *,
    compound: bool = False,
    wanted: Wanted | None = None,
) -> Operation[Migration]:
    """Move what can be moved of a range to a device's memory, in ascending order as far as there is room.

    Args:
        mirror_id: who is told when a page has to come back.
        compound: huge pages move as such, where the kernel that is modelled can do that and a run of frames is free.
        wanted: bool[npages], the pages that get a destination; None for all.  The others are taken out of the page
            tables and put back, as by a driver that leaves `dst` 0; the first page of a huge one decides for all of it.

    Returns, Raises, Cost: as `migrate_vma`.
    """

    def copy(migration: Migration) -> Operation[None]:
        pages = _chosen(migration, (migration.src & _MIGRATE).nonzero()[0], wanted)[: region.free]
        failing = _failing(migration, pages)
        if failing is not None and not migration.src[pages[failing]] & _COMPOUND:
            pages = np.delete(pages, failing)
        if pages.size:
            pfns = _allocate_for(migration, pages, region.number, failing=failing)
            space.frames.zone_device_data[pfns] = mirror_id
            _leave_failed(migration, pages, pfns)
            if migration.vma.writable and migration.has_holes:
                hole = (migration.src[pages] & _VALID) == 0
                migration.dst[pages[hole]] |= _WRITE
        return
        yield Pause()  # makes this function a generator

    select = Select.SYSTEM | Select.COMPOUND if compound else Select.SYSTEM
    return (yield from migrate_vma(space, span, copy, select=select, owner=region.owner, initiator=mirror_id))


def migrate_to_system(
    space: AddressSpace,
    span: AddressRange,
    region: Region,
    mirror_id: MirrorId,
    *,
    compound: bool = False,
    wanted: Wanted | None = None,
) -> Operation[Migration]:
    """Move what a device has of a range back to system memory, as far as there is room.

    Args:
        mirror_id: who asks.
        compound, wanted: as for `migrate_to_device`.

    Returns, Raises, Cost: as `migrate_vma`.
    """
    copy = _to_system if wanted is None else partial(_to_system, wanted=wanted)
    select = _select(region) | Select.COMPOUND if compound else _select(region)
    return (yield from migrate_vma(space, span, copy, select=select, owner=region.owner, initiator=mirror_id))


def _chosen(migration: Migration, pages: Positions, wanted: Wanted | None) -> Positions:
    """Those of the pages that get a destination."""
    if wanted is None:
        return pages
    into = (migration.addresses[pages] & np.uint64(~PMD_MASK & ULONG_MAX)) >> np.uint64(PAGE_SHIFT)
    into[migration.src[pages] & _COMPOUND == 0] = 0
    return pages[wanted[pages - into.view(np.int64)]]


def _select(region: Region) -> Select:
    return Select.DEVICE_PRIVATE if region.kind is RegionKind.DEVICE_PRIVATE else Select.DEVICE_COHERENT


def _to_system(migration: Migration, wanted: Wanted | None = None) -> Operation[None]:
    frames, pages = migration.space.frames, _chosen(migration, migration.pages, wanted)
    if frames.available < pages.size:
        yield from some_room(frames, pages.size)
        pages = _chosen(migration, migration.pages, wanted)[: frames.available]
    failing = _failing(migration, pages)
    if failing is not None and not migration.src[pages[failing]] & _COMPOUND:
        pages = pages[:failing]
    if pages.size:
        _allocate_for(migration, pages, SYSTEM_REGION, failing=failing)
        _leave_failed(migration, pages, migration.source_pfns(pages))


def _failing(migration: Migration, pages: Positions) -> int | None:
    """For which of the pages an allocation was made to fail, counted as huge pages and small ones.

    Source: Linux lib/test_hmm.c, HMM_DMIRROR_FLAG_FAIL_ALLOC.
    """
    mirror = migration.space.notifier.subscribers.get(migration.initiator)
    if mirror is None or not mirror.failing_allocation:
        return None
    tails = (migration.src[pages] & _COMPOUND != 0) & (migration.addresses[pages] & np.uint64(~PMD_MASK) != 0)
    units = np.flatnonzero(~tails)
    nth = mirror.failing_allocation
    mirror.failing_allocation = max(0, nth - units.size)
    return int(units[nth - 1]) if nth <= units.size else None


def _leave_failed(migration: Migration, pages: Positions, homes: Pfns) -> None:
    """Leave pages where they are whose copy, or clearing of a hole, failed, and all of a huge page with one of them.

    Args:
        homes: int64[n], the frames of the pages on the device.
    """
    frames = migration.space.frames
    if not frames.failing_copies:
        return
    for at in pages[failing_copies(frames, frames.zone_device_data[homes])].tolist():
        first, end = at, at + 1
        if migration.src[at] & _COMPOUND:
            first = at - (int(migration.addresses[at]) & ~PMD_MASK) // PAGE_SIZE
            end = first + PMD_PAGES
        migration.src[first:end] &= NOT_MIGRATE
        migration.failed = first if migration.failed is None else migration.failed


def _allocate_for(migration: Migration, pages: Positions, region: int, *, failing: int | None) -> Pfns:
    """Allocate a destination for each page; that of a hole reads as zeroes.

    A huge page that moves as one gets small destinations when no run of frames is free.

    Args:
        failing: as is so by order for the one that begins there.

    Returns: int64[n] frames.
    """
    frames, src, heads = migration.space.frames, migration.src[pages], migration.heads
    if heads.size:
        pfns = _folios(migration, pages.searchsorted(heads), pages.size, region, failing=failing)
        small = pfns == 0
        if number := int(np.count_nonzero(small)):
            pfns[small] = frames.allocate(number, region)
        words = migrate_pfn(pfns) | (src & _WRITE) | ~small * _COMPOUND
    else:
        pfns = frames.allocate(pages.size, region)
        words = migrate_pfn(pfns) | (src & _WRITE)
    migration.dst[pages] = words
    return pfns


def _folios(migration: Migration, heads: Positions, npages: int, region: int, *, failing: int | None) -> Pfns:
    """Large folios for what moves as one and begins at `heads`: int64[npages], 0 for pages that get none."""
    pfns = np.zeros(npages, np.int64)
    for at in heads.tolist():
        if at == failing:
            continue
        if at + PMD_PAGES > npages:
            break
        folio = migration.space.frames.allocate_folio(region)
        if folio is None:
            break
        pfns[at : at + PMD_PAGES] = folio
    return pfns


# ---- back by touch


def _bring_back(space: AddressSpace, touched: Strangers, _write: bool) -> Operation[None]:
    """migrate_to_ram() for pages of one VMA that were touched; of a huge page for all of it.

    Raises:
        OutOfFramesError: there is not one frame for them (ENOMEM).
        SegmentationFault: an injected failure: the first page, or its copy, fails; it stays where it is (EFAULT).
    """
    frames = space.frames
    pfns = cpu_pte.cpu_pfn(touched.entries)
    if are_remote(frames, pfns).any() or any(one.home for one in space.notifier.subscribers.values()):
        touched = yield from _through_homes(space, touched)
    if cpu_pte.is_huge(touched.entries).any():
        touched = _with_blocks(space, touched)
    for device_id, mirror_id, addresses in _by_holder(frames, touched):
        if not frames.available and not (yield from some_room(frames, addresses.size)):
            raise OutOfFramesError("a page cannot come back from a device: memory ran out", address=int(addresses[0]))
        chosen = addresses[: frames.available]
        if not chosen.size:
            yield Pause()  # others were quicker to take what there was
            continue
        chosen = _before_failure(space, device_id, chosen)
        migration = Migration(space, touched.vma, chosen, _PRIVATE, device_id, Cause.MIGRATE_TO_SYSTEM, mirror_id)
        yield from run(migration, _tell_and_copy)
        if migration.failed is not None:
            address = int(migration.addresses[migration.failed])
            if address == touched.addresses[0]:
                raise SegmentationFault(f"the copy of {address:#x} from the device failed", Signal.BUS_ADRERR, address)
            frames.failing_copies[mirror_id] = 1  # a CPU comes to those before it first
        elif not migration.pages.size:
            entries = space.table.lookup(chosen)
            there = cpu_pte.is_device_private(entries)
            yield from wait_on_locked(space, chosen[there], cpu_pte.cpu_pfn(entries[there]))


def _by_holder(frames: Frames, touched: Strangers) -> list[tuple[DeviceId, MirrorId, Entries]]:
    """Pages of devices by device and by the mirror that put them there, both ascending: uint64[n] addresses of each."""
    pfns = cpu_pte.cpu_pfn(touched.entries)
    devices, holders = owners(frames, pfns), frames.zone_device_data[pfns]
    return [
        (device_id, mirror_id, touched.addresses[(devices == device_id) & (holders == mirror_id)])
        for device_id in unique(devices).tolist()
        for mirror_id in unique(holders[devices == device_id]).tolist()
    ]


def _before_failure(space: AddressSpace, device_id: DeviceId, addresses: Entries) -> Entries:
    """Those that can come back of some pages of a device; the first of them cannot when it is the one to fail."""
    for region in space.frames.regions[1:]:
        if region.owner != device_id or not region.failing_touches:
            continue
        count = min(region.failing_touches - 1, addresses.size)
        region.failing_touches -= count
        if count < addresses.size and space.table.get(int(addresses[count])) & cpu_pte.HUGE:
            count = int(addresses.searchsorted(block_starts(addresses[count])))
        if not count:
            region.failing_touches = 0
            address = int(addresses[0])
            raise SegmentationFault(f"{region}: {address:#x} cannot come back", Signal.BUS_ADRERR, address)
        addresses = addresses[:count]
    return addresses


def _with_blocks(space: AddressSpace, touched: Strangers) -> Strangers:
    """The pages, and all others of the huge pages that some of them belong to: do_huge_pmd_device_private()."""
    huge = cpu_pte.is_huge(touched.entries)
    starts = unique(block_starts(touched.addresses[huge]))
    blocks = starts[:, np.newaxis] + np.arange(0, PMD_SIZE, PAGE_SIZE, dtype=np.uint64)
    addresses: Entries = np.concatenate((touched.addresses[~huge], blocks.reshape(-1)))
    addresses = unique(addresses)
    entries = space.table.lookup(addresses)
    there = cpu_pte.is_device_private(entries)
    return Strangers(touched.vma, addresses[there], entries[there])


def _through_homes(space: AddressSpace, touched: Strangers) -> Operation[Strangers]:
    """Let mirrors bring back what they have, and poison what nobody has.  Returns: the rest."""
    frames, subscribers = space.frames, space.notifier.subscribers
    pfns = cpu_pte.cpu_pfn(touched.entries)
    holders, remote = frames.zone_device_data[pfns], are_remote(frames, pfns)
    rest = np.ones(pfns.size, np.bool_)
    for holder in unique(holders).tolist():
        subscriber = subscribers.get(holder)
        mine = holders == holder
        if subscriber is not None and subscriber.home is not None:
            rest &= ~mine
            yield from subscriber.home.bring_back(touched.addresses[mine])
        elif (mine & remote).any():
            # Its driver is gone, and whoever discards the page has not come to it yet.
            rest &= ~(mine & remote)
            lose(space, touched.which(mine & remote).unchanged(space).addresses)  # other holders were waited for
    return touched.which(rest).unchanged(space)


def lose(space: AddressSpace, addresses: Entries) -> None:
    """The contents of pages in a device's memory are lost: whoever touches them gets SIGBUS.

    Args:
        addresses: uint64[n], unique; those that are not in a device's memory are left alone.
    """
    entries = space.table.lookup(addresses)
    gone = cpu_pte.is_device_private(entries)
    space.table.store(addresses[gone], cpu_pte.POISON)
    space.drop(entries[gone])


def _tell_and_copy(migration: Migration) -> Operation[None]:
    # While others were told, the mirror may have gone.
    pages = migration.pages
    holders = migration.space.frames.zone_device_data[migration.source_pfns(pages)]
    migration.src[pages[(holders != 0) & (holders != migration.initiator)]] &= NOT_MIGRATE  # put there again by another
    held = pages[holders == migration.initiator]
    if migration.initiator and held.size:
        yield Deliver(_copy_event(migration, migration.addresses[held]), (migration.initiator,))
    yield from _to_system(migration)
    if migration.failed is not None:  # and not to those behind it
        migration.src[migration.failed :] &= NOT_MIGRATE


def _copy_event(migration: Migration, addresses: Entries) -> Event:
    space = migration.space
    return Event(
        operation_id=space.current.operation_id,
        space_id=space.id,
        revision=space.notifier.next_revision(),
        etype=EventType.COPY_FROM_DEVICE,
        reason=None,
        cause=Cause.MIGRATE_TO_SYSTEM,
        spans=spans_of(addresses),
        owner=migration.owner,
        initiator=migration.initiator,
    )


RESOLVERS[cpu_pte.DEVICE] = _bring_back
