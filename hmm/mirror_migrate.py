"""Pages of a mirror move to the memory of its device, by a fault of the driver's (2015).

    lock       the CPU's entries of the range become migration entries; empty ones and the zero page too, which move as
               fresh pages of zeroes.  A page with references beside its mappings stays where it is, silently
    tell       MIGRATE to every other mirror; one that answers with an error is killed
    copy       frames of the device as far as there are some; COPY_TO_DEVICE: the driver stops using the pages, and
               carries their bytes unless the daemon does
    unlock     a page that moved has an entry with VALID_DEV in the mirror, all others are what they were
    update     the mirror's entries of the range, to its driver, as at the end of every fault

A change of the range that comes meanwhile waits; before the copy has begun it makes the fault give way and start over.
Huge pages are split first.  Pages that are not in system memory are brought in first: from swap, and from the memory of
another device, whose driver is asked for them (COPY_FROM_DEVICE) before this one gets them.

**Source**: linux-mm, "HMM: add mirror fault support for system to device memory migration v3", hmm_mirror_fault(),
hmm_mirror_handle_fault_migrate(); "HMM: mm add helper to update page table when migrating memory to device v2",
mm_hmm_migrate(), mm_hmm_migrate_cleanup().

**Invariants**: when the operation ends, however it ends, no migration entry of it is left; a page that did not move has
the entry that it had, and an error of the driver's copy moves none.

**Absent**: the way back and the carrying (mirror_memory.py); which pages leave a full device (eviction.py).

Differs: a private page that several processes share since a fork moves as a copy, which is what the next write would
have made of it; the others keep the page.  The posted code swapped the tests for the zero page and for no page, and
installed entries with VALID_DEV although the driver had answered with an error.
"""

from __future__ import annotations

import errno as errnos
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hmm import cpu_pte, pte
from hmm.address_space import AddressSpace
from hmm.device_fault import bring_in, mirrorable_vma, update, wait_to_start
from hmm.errors import (
    BadAddressError,
    HmmError,
    InvalidRequestError,
    OutOfFramesError,
    TimedOutError,
)
from hmm.events import Cause, EventState, EventType
from hmm.fault_pages import ANON_PAGE, prepare_anon_vma
from hmm.frames import ZERO_PFN, PageFlag
from hmm.huge_split import huge_blocks, split_folio, split_pmds
from hmm.migration_entries import CARRIED, are_names_of, entries_of, index_of, put_entries, stand_in
from hmm.mirror import Mirror, MirrorState
from hmm.mirror_entries import install
from hmm.mirror_memory import COPY_PAGES, MirrorMemory
from hmm.operation import Await, Operation, WaitFor
from hmm.units import PAGE_SIZE, AddressRange, Entries, Pfns, is_page_aligned, page_numbers
from hmm.vma import SPECIAL_FLAGS, Vma, VmFlag

__all__ = ["MIGRATE_PAGES_MAX", "MakeRoom", "Moved", "migrate_range"]

MIGRATE_PAGES_MAX = COPY_PAGES
"""Pages of one fault: as many as a page has room for entries, as posted."""

MakeRoom = Callable[[AddressRange], Operation[int]]
"""Asked once for room in the device's memory, before a migration of a range that would not fit; may do nothing."""

Mask = npt.NDArray[np.bool_]
_NOTHING = np.empty(0, np.uint64)
_AWAY = cpu_pte.DEVICE | cpu_pte.EXCLUSIVE | cpu_pte.SWAP | cpu_pte.MIGRATION


@dataclass(frozen=True, slots=True)
class Moved:
    """What a migration to a device did.

    Attributes:
        span: as asked for.
        end: how far it went: to the end of the VMA that holds the start.
        npages: pages that moved; others were there already, or stay in system memory.
        error: why it stopped, or OutOfFramesError (ENOMEM) when the device had no room for all; None on success.
    """

    span: AddressRange
    end: int
    npages: int = 0
    error: HmmError | None = None


def migrate_range(memory: MirrorMemory, span: AddressRange, make_room: MakeRoom | None = None) -> Operation[Moved]:
    """Move what can be moved of a range to the device's memory, in ascending order, as far as there is room.

    Args:
        span: page-aligned, at most MIGRATE_PAGES_MAX pages; what lies behind the end of its first VMA is not looked at.

    Returns: what was moved; errors of the range itself and of the driver's copy are in the result.

    Raises:
        InvalidRequestError: empty, unaligned or too long; or not private anonymous memory (EINVAL).
        BadAddressError: nothing is mapped there (EFAULT).
        AccessDeniedError: the mapping is not readable (EACCES).
        DeviceLostError, NoSuchObjectError: the mirror no longer mirrors (ENODEV).
        TimedOutError: another mirror with policy FAIL did not answer; nothing was moved (ETIMEDOUT).

    Cost: O(pages), vectorised, and the copying; an event to others that mirror the range, one for the driver's copy,
    one for the update.
    """
    if not span or not is_page_aligned(span.start | span.end) or span.npages > MIGRATE_PAGES_MAX:
        raise InvalidRequestError(
            f"migrate: {span} is empty, not page-aligned, or more than {MIGRATE_PAGES_MAX} pages", address=span.start
        )
    mirror, notifier = memory.mirror, memory.mirror.space.notifier
    mirror.counters["migrations"] += 1
    while True:
        yield from wait_to_start(mirror, (span,), wait=True)
        mirror.require_filling("migrate")
        notifier.note_filling(mirror.id, span)
        notifier.require_usable()
        vma = _movable_vma(mirror.space, span)
        part = AddressRange(span.start, min(span.end, vma.end))
        if notifier.copies_overlap((part,)):
            yield from notifier.wait_for_copies((part,))
        elif notifier.invalidations_overlap((part,)):
            yield Await(WaitFor.INVALIDATIONS, notifier.space_id, (part,))
        elif notifier.faults_overlap((part,)):
            yield from notifier.back_off((part,))  # its driver is being told of entries that are about to go
        elif blocks := huge_blocks(mirror.space, part):
            yield from _split(mirror.space, blocks)
        elif (away := _away(mirror, part)).size:
            failed = yield from bring_in(mirror, away, write=False)
            if failed is not None:
                return Moved(span, failed.address or part.start, error=failed)
        elif make_room is not None and _wanted(mirror, part) > memory.region.free:
            yield from make_room(part)
            make_room = None
            continue
        else:
            attempt = yield from _attempt(memory, vma, part)
            if attempt is not None:
                moved, error = attempt
                mirror.counters["migrated_pages"] += moved
                return Moved(span, part.end, moved, error)
        mirror.counters["retries"] += 1


def _movable_vma(space: AddressSpace, span: AddressRange) -> Vma:
    vma = space.vmas.find(span.start)
    if vma is not None and (vma.backing is not None or vma.has(SPECIAL_FLAGS | VmFlag.HUGETLB)):
        raise InvalidRequestError(f"migrate: {vma} is not private anonymous memory", address=span.start)
    return mirrorable_vma(space, span.start, span.end, write=False)


def _split(space: AddressSpace, blocks: list[AddressRange]) -> Operation[None]:
    """Pages move one by one: a huge one is split, or if somebody holds it, mapped by page entries."""
    start = blocks[0].start
    if cpu_pte.is_huge_zero(space.table.get(start)) or not (yield from split_folio(space, start)):
        yield from split_pmds(space, blocks[:1])


def _away(mirror: Mirror, span: AddressRange) -> Entries:
    """uint64[n]: the pages that are neither in system memory nor in the device's own."""
    if not mirror.space.table.either(span.start, span.end) & _AWAY:
        return _NOTHING
    addresses, entries = mirror.space.table.valid(span.start, span.end)
    away = (entries & np.uint64(_AWAY)) != 0
    away &= ~pte.pte_test_valid_dev(mirror.table.lookup(addresses))
    found: Entries = addresses[away]
    return found


def _wanted(mirror: Mirror, span: AddressRange) -> int:
    entries = mirror.space.table.read(span.start, span.end)
    return int(np.count_nonzero((entries == 0) | cpu_pte.is_present(entries)))


@dataclass(slots=True)
class _Locked:
    """Pages whose entries in the CPU's table are migration entries.

    Attributes:
        addresses: uint64[n], ascending.
        entries: uint64[n], what stood there: an entry of a frame, of the zero page, or nothing.
        targets: int64[n], frames of the device; 0 for pages that stay.
        pfns: int64[n], their frames, 0 for the zero page or none.
        framed: bool[n], those that are in a frame of system memory.
    """

    addresses: Entries
    entries: Entries
    targets: Pfns = field(init=False)
    pfns: Pfns = field(init=False)
    framed: Mask = field(init=False)

    def __post_init__(self) -> None:
        self.targets = np.zeros(self.entries.size, np.int64)
        self.pfns = cpu_pte.cpu_pfn(self.entries)
        self.framed = self.pfns != ZERO_PFN


def _attempt(memory: MirrorMemory, vma: Vma, span: AddressRange) -> Operation[tuple[int, HmmError | None] | None]:
    """Move what can be moved.  Returns: how many pages, and why not all; None to start over."""
    mirror, notifier = memory.mirror, memory.mirror.space.notifier
    with notifier.copying((span,)) as copying:
        owner, initiator = mirror.device.id, mirror.id
        with notifier.invalidation((span,), Cause.MIGRATE_TO_DEVICE, owner=owner, initiator=initiator) as bracket:
            locked = _lock(mirror, vma, span)
            try:
                with mirror.space.frames.locks.lock(locked.pfns[locked.framed], notifier.current.operation_id):
                    yield from bracket.deliver()
                    mirror.require_filling("migrate")
                    if copying.backoff:
                        return None
                    error = yield from _copy(memory, locked)
            finally:
                moved = _unlock(memory, vma, locked)
        if mirror.state is MirrorState.LIVE:
            _mirror_the_rest(mirror, locked)
            if mirror.update_on_fault and not mirror.leaving:
                entries = mirror.table.read(span.start, span.end)
                yield from update(mirror, (span,), entries, write=False)
    return moved, error


def _lock(mirror: Mirror, vma: Vma, span: AddressRange) -> _Locked:
    space = mirror.space
    addresses = np.arange(span.start, span.end, PAGE_SIZE, dtype=np.uint64)
    entries = space.table.read(span.start, span.end)
    if not cpu_pte.are_plain(entries) or not cpu_pte.is_present(int(entries[0])) or space.frames.locks.held:
        empty = (entries == 0) | (cpu_pte.is_special(entries) & (cpu_pte.cpu_pfn(entries) == ZERO_PFN))
        if vma.mapping.userfaultfd:
            empty[:] = False  # as migrate_vma_insert_page(): its handler brings them in
        chosen = empty | (cpu_pte.is_present(entries) & ~cpu_pte.is_special(entries))
        chosen &= ~space.frames.locks.are_locked(cpu_pte.cpu_pfn(entries))
        addresses, entries = addresses[chosen], entries[chosen]
    locked = _Locked(addresses, entries)
    prepare_anon_vma(space, vma)
    _keep_places(mirror, addresses)
    framed = index_of(locked.framed)
    if not isinstance(framed, slice):
        space.table.store(addresses[~framed], cpu_pte.MIGRATION)
    stand_in(space, addresses[framed], entries[framed], locked.pfns[framed])
    return locked


def _keep_places(mirror: Mirror, addresses: Entries) -> None:
    # So that the mirror's directories cannot run out when the pages are on the device already.
    entries = entries_of(mirror.table, addresses)
    mirror.table.store(addresses[entries == 0], pte.SELECT)


def _movable(mirror: Mirror, locked: _Locked) -> npt.NDArray[np.intp]:
    # Who has a page beside those that map it, and the swap cache, would go on using the old one.
    frames, framed = mirror.space.frames, locked.framed
    pfns = locked.pfns
    known = frames.mapcount[pfns] + (frames.private[pfns] != 0) + 1
    referenced = framed & (frames.refcount[pfns] != known)
    movable: npt.NDArray[np.intp] = (~referenced).nonzero()[0]
    return movable


def _copy(memory: MirrorMemory, locked: _Locked) -> Operation[HmmError | None]:
    """Give as many pages as there is room for a frame of the device with their contents, in ascending order."""
    mirror, frames = memory.mirror, memory.mirror.space.frames
    movable = _movable(mirror, locked)
    fitting = movable[: memory.region.free]
    full = None
    if fitting.size < movable.size:
        full = OutOfFramesError(
            f"migrate: no room in the memory of {mirror.device} for {movable.size - fitting.size} pages",
            address=int(locked.addresses[movable[fitting.size]]),
            reason="DEVICE_MEMORY",
        )
    if not fitting.size:
        return full
    homes = frames.allocate(fitting.size, memory.region.number)
    try:
        carried, error = yield from _carry(memory, locked, fitting, homes)
    except BaseException:
        frames.put(homes)
        raise
    if np.count_nonzero(carried) < carried.size:
        frames.put(homes[~carried])
    locked.targets[fitting] = np.where(carried, homes, 0)
    return error or full


def _carry(
    memory: MirrorMemory, locked: _Locked, fitting: npt.NDArray[np.intp], homes: Pfns
) -> Operation[tuple[Mask, HmmError | None]]:
    """Fill frames of the device.  Returns: bool[n], the pages that are there, and the driver's error."""
    mirror, addresses, pfns = memory.mirror, locked.addresses[fitting], locked.pfns[fitting]
    carried: Mask = np.ones(fitting.size, np.bool_)
    error: HmmError | None = None
    if memory.region.remote or int(np.bitwise_or.reduce(entries_of(mirror.table, addresses))) & pte.VALID:
        outcome, carried = yield from memory.carry(EventType.COPY_TO_DEVICE, addresses, homes, pfns)
        mirror.require_live("migrate")
        if outcome.state is EventState.ABANDONED:
            error = TimedOutError(f"migrate: the driver of {mirror} did not answer for {fitting.size} pages in time")
        elif outcome.errno == errnos.ENOMEM:
            error = OutOfFramesError(f"migrate: the driver of {mirror} answered ENOMEM", reason="DEVICE_MEMORY")
        elif outcome.errno:
            error = BadAddressError(f"migrate: the driver of {mirror} answered EIO", errnos.EIO)
    if not memory.region.remote and error is None:
        carried = memory.copy_pages(homes, pfns)
    return carried, error


def _unlock(memory: MirrorMemory, vma: Vma, locked: _Locked) -> int:
    """Entries of pages that moved name the device's frame, the others what they named before.  Returns: how many."""
    mirror, space, frames = memory.mirror, memory.mirror.space, memory.mirror.space.frames
    live = mirror.state is MirrorState.LIVE
    if not live and memory.region.remote:
        frames.put(locked.targets[locked.targets != 0])
        locked.targets[:] = 0
    addresses, saved, pfns, framed = locked.addresses, locked.entries, locked.pfns, locked.framed
    now = entries_of(space.table, addresses)
    ours = are_names_of(now, pfns)
    moved = locked.targets != 0
    fresh = cpu_pte.WRITE if vma.writable else 0
    flags = np.where(framed, now & CARRIED, np.uint64(fresh | cpu_pte.DIRTY)) | np.uint64(cpu_pte.DEVICE)
    new = np.where(moved, cpu_pte.cpu_entry(locked.targets, flags), saved)
    there = index_of(ours)
    put_entries(space.table, addresses[there], new[there])
    came, stays = moved & ours, ours & ~moved
    _take_over(memory, vma, locked, came)
    if np.count_nonzero(stays):
        frames.map(pfns[framed & stays])
    frames.put(pfns[index_of(framed)])
    if not isinstance(there, slice):
        frames.put(locked.targets[moved & ~ours])
    if live:
        _set_entries(mirror, locked, came, new)
    return int(np.count_nonzero(came))


def _take_over(memory: MirrorMemory, vma: Vma, locked: _Locked, moved: Mask) -> None:
    """The frames of the device become what those of the system were."""
    mirror, space, frames = memory.mirror, memory.mirror.space, memory.mirror.space.frames
    which = index_of(moved)
    homes, pfns = locked.targets[which], locked.pfns[which]
    frames.flags[homes] = np.uint16(ANON_PAGE) | (frames.flags[pfns] & np.uint16(PageFlag.DIRTY))
    frames.index[homes] = page_numbers(locked.addresses[which]) + vma.mapping.delta
    frames.zone_device_data[homes] = mirror.id if mirror.state is MirrorState.LIVE else 0
    space.claim(homes, vma.start)
    frames.map_new(homes)


def _set_entries(mirror: Mirror, locked: _Locked, moved: Mask, cpu: Entries) -> None:
    """The mirror's entries of pages that moved; the others permit what they permitted before."""
    addresses, frames = locked.addresses, mirror.space.frames
    entries = entries_of(mirror.table, addresses)
    written = moved & pte.pte_test_dirty(entries)
    frames.set_flags(locked.targets[written], PageFlag.DIRTY)
    mirror.unmap(entries[moved])
    valid = (entries & np.uint64(pte.VALID)) != 0
    writable = cpu_pte.is_writable(cpu)
    entries[~valid] = 0
    entries[valid & writable] |= np.uint64(pte.WRITE)
    entries[moved] = mirror.entries_on_device(locked.targets[moved])
    entries[moved & writable] |= np.uint64(pte.WRITE)
    put_entries(mirror.table, addresses, entries)


def _mirror_the_rest(mirror: Mirror, locked: _Locked) -> None:
    """The device may use the pages that stay as well; without room for their entries it faults them later."""
    kept = locked.addresses[locked.framed & (locked.targets == 0)]
    if not kept.size:
        return
    present = kept[cpu_pte.is_present(mirror.space.table.lookup(kept))]
    if present.size and not mirror.leaving:
        with suppress(OutOfFramesError):
            install(mirror, present, write=False)
