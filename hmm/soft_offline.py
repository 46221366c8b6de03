"""Soft offlining: frames that are about to fail are given up, and what they hold goes on in others (MADV_SOFT_OFFLINE).

Nothing is lost and no process notices, but a page changes its frame while everybody may have it: every mirror is told
before its entry goes (CLEAR), as of each migration within system memory, and finds the new frame when it faults again.
The old frame is never used again.

    what stands there           becomes of the call
    a small page                moves, and goes on with the next; of a file it moves in the page cache as well
    a huge page                 is split, and the page asked for moves; the rest of it is passed over.  If it held
                                nothing, the zero page is there now, and its frame is given up without a move
    a page that is pinned, or   ends: EBUSY; the page is where it was
    referenced otherwise
    the zero page, a page of    ends: EIO, as they are on no list of pages that could be moved
    coherent memory, or of a
    driver's own
    the zero page that is lost  goes on with the next

**Source**: Linux mm/memory-failure.c (soft_offline_page(), soft_offline_in_use_page(), page_handle_poison()),
mm/migrate.c (migrate_pages(), folio_migrate_mapping()), 6.12.

**Invariants**: when the call ends, however it ends, no migration entry of it is left; a frame that was given up is
mapped nowhere, in no page cache, and has one reference, for ever.

**Absent**: hugetlb pages (EOPNOTSUPP); trying several times to move a page that somebody refers to; page cache that
nobody maps, which is dropped and not moved.
"""

from __future__ import annotations

import errno as errnos

import numpy as np
import numpy.typing as npt

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.errors import BadAddressError, HmmError, OutOfFramesError, RangeBusyError
from hmm.events import Cause
from hmm.fault import bring_in
from hmm.file import File
from hmm.frames import ZERO_PFN, Frames, PageFlag
from hmm.huge_split import split_folio
from hmm.memory_failure import (
    are_drivers,
    are_plain,
    elsewhere,
    leading,
    memory_at,
    not_had,
    places_of,
    touch,
    until_repeated,
    within,
)
from hmm.migration_entries import HeldPages, replace, unmap_everywhere, wait_on_locked
from hmm.notifier import Breaking
from hmm.operation import Operation
from hmm.swap import area_of, some_room
from hmm.units import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE, Address, AddressRange, Entries, Pfns, page_numbers
from hmm.vma import Vma
from hmm.zone_device import owners

__all__ = ["soft_offline"]

_Mask = npt.NDArray[np.bool_]


def soft_offline(space: AddressSpace, piece: AddressRange) -> Operation[Address]:
    """Move the first pages of a piece, which are brought in by a read first, to other frames, and give theirs up.

    Returns: where to go on.

    Raises:
        BadAddressError: a page cannot be had (EFAULT), or is no page that could be moved (EIO).
        RangeBusyError: somebody refers to a page, or to the huge page that it is part of (EBUSY).
        InvalidRequestError: hugetlb memory (EOPNOTSUPP).
        OutOfFramesError: no frame was left for a page, or for bringing it in (ENOMEM).
        TimedOutError: a mirror with policy FAIL did not answer (ETIMEDOUT).
        The pages below `error.address` have moved.

    Cost: O(pages + VMAs), vectorised; huge pages one at a time.
    """
    vma = memory_at(space, piece.start)
    part = within(vma, piece)
    if space.frames.available < 2 * part.npages:  # to be brought in, and to move to
        yield from some_room(space.frames, 2 * part.npages)
        vma = memory_at(space, part.start)
        part = within(vma, part)
    coming = elsewhere(space, vma, part)
    first = leading(coming | are_plain(space.frames, space.table.read(part.start, part.end)))
    first = max(1, min(first, space.frames.available // 2))
    part = AddressRange(part.start, part.start + (first << PAGE_SHIFT))
    stop = (yield from bring_in(space, part, write=False)) if vma.readable else None
    if stop is not None:
        if stop.address == part.start:
            raise not_had(stop)
        part = AddressRange(part.start, stop.address)
    vma = memory_at(space, part.start)  # other memory may have been mapped meanwhile
    part = within(vma, part)
    entries = space.table.read(part.start, part.end)
    pfns = cpu_pte.cpu_pfn(entries)
    first = min(leading(are_plain(space.frames, entries) & ~are_drivers(space.frames, vma, pfns)), until_repeated(pfns))
    if not first:
        return (yield from _offline_one(space, part.start, int(entries[0])))
    first = min(first, leading(~_are_referenced(space.frames, pfns[:first])) + 1)
    addresses = np.arange(part.start, part.start + (first << PAGE_SHIFT), PAGE_SIZE, dtype=np.uint64)
    touch(space.frames, pfns[:first], coming[:first])
    moved = yield from _move(space, vma, addresses, pfns[:first])
    return part.start + (moved << PAGE_SHIFT)


def _offline_one(space: AddressSpace, address: Address, entry: int) -> Operation[Address]:
    """A page that is no small page of system memory.  Returns: where to go on."""
    frames, pfn = space.frames, cpu_pte.cpu_pfn(entry)
    if pfn == ZERO_PFN and cpu_pte.is_special(entry) and not entry & cpu_pte.HUGE and frames.zero_page_poisoned:
        return address + PAGE_SIZE  # PageHWPoison(): there is nothing left to do
    large = not cpu_pte.is_special(entry) and frames.flags_of(pfn) & PageFlag.COMPOUND
    if not large or owners(frames, np.array([pfn]))[0]:
        raise BadAddressError(f"soft offline: {address:#x} is no page that could move", errnos.EIO, address=address)
    before = memory_at(space, address)
    if not (yield from split_folio(space, address, hold=True)):
        raise RangeBusyError(f"soft offline: the huge page at {address:#x} is in use", errnos.EBUSY, address=address)
    # A file's page is the file's, though other memory may have been mapped here meanwhile.
    page, vma = np.array([pfn]), before if before.backing is not None else space.vmas.find(address)
    assert vma is not None, "the huge page was mapped there"
    if frames.refcount[pfn] == 1:  # it held nothing, and everybody has the zero page instead: migrate_folio_unmap()
        frames.poison(page)
    else:
        frames.put(page)
        yield from _move(space, vma, np.array([address], np.uint64), page)
    return address + PMD_SIZE


def _move(space: AddressSpace, vma: Vma, addresses: Entries, pfns: Pfns) -> Operation[int]:
    """Move small pages of one VMA up to the first that cannot be moved.

    Args:
        addresses: uint64[n], n > 0, ascending.
        pfns: int64[n], unique.

    Returns: how many have moved, at least one.

    Raises: RangeBusyError, OutOfFramesError: not even the first one could be moved.
    """
    frames = space.frames
    indices = page_numbers(addresses) + vma.mapping.delta
    held = HeldPages(frames, pfns, indices, places_of(space, vma, indices, pfns))
    targets, count, what = pfns, 0, f"soft offline at {int(addresses[0]):#x}"
    room = frames.allocate(min(pfns.size, frames.available))
    frames.get(pfns)
    try:
        while (yield from wait_on_locked(space, addresses, pfns)):  # folio_lock()
            pass
    except BaseException:
        frames.put(np.concatenate((pfns, room)))
        raise
    with Breaking(space.notifiers.values(), what), frames.locks.lock(pfns, space.current.operation_id):
        try:
            again = False
            while frames.mapcount[pfns].any():  # mremap or fork may take them along, to where nobody was told
                if not (yield from unmap_everywhere(held, only_where_mapped=again, cause=Cause.SOFT_OFFLINE)):
                    break
                again = True
            cached = _are_cached(frames, vma, indices, pfns)
            alone = (frames.mapcount[pfns] == 0) & (frames.refcount[pfns] == 1 + cached)
            count = min(leading(alone), room.size)
            targets = np.concatenate((room[:count], pfns[count:]))
            _move_in_caches(frames, vma, indices[:count], pfns[:count], targets[:count], cached[:count])
        finally:
            frames.get(pfns[:count])  # for ever
            replace(held, targets)
            frames.put(room[count:])
    frames.poison(pfns[:count])
    if not count:
        raise _error(int(addresses[0]), full=not room.size)
    return count


def _error(address: Address, *, full: bool) -> HmmError:
    if full:
        return OutOfFramesError(f"soft offline: no frame for the page at {address:#x}", address=address)
    return RangeBusyError(f"soft offline: somebody refers to the page at {address:#x}", errnos.EBUSY, address=address)


def _are_referenced(frames: Frames, pfns: Pfns) -> _Mask:
    """bool[n]: to which pages somebody refers but entries and caches."""
    cached = ~frames.test_flags(pfns, PageFlag.ANON) | (frames.private[pfns] != 0)
    referenced: _Mask = frames.refcount[pfns] != frames.mapcount[pfns] + cached
    return referenced


def _are_cached(frames: Frames, vma: Vma, indices: Pfns, pfns: Pfns) -> _Mask:
    """bool[n]: which pages are in the page cache, from where they may have been truncated meanwhile, or in swap's."""
    cached: _Mask = frames.private[pfns] != 0
    if isinstance(vma.backing, File):
        entries = vma.backing.pages.lookup((indices << PAGE_SHIFT).view(np.uint64))
        cached |= cpu_pte.is_present(entries) & (cpu_pte.cpu_pfn(entries) == pfns)
    return cached


def _move_in_caches(frames: Frames, vma: Vma, indices: Pfns, pfns: Pfns, targets: Pfns, cached: _Mask) -> None:
    """folio_migrate_mapping(): caches name the new frames, and refer to them.

    Args:
        indices, pfns, targets: int64[n]; cached: bool[n], which of them are in a cache.
    """
    if not cached.any():
        return
    frames.get(targets[cached])
    slots = frames.private[pfns]
    swapped = slots != 0
    if swapped.any():
        area_of(frames).cached[slots[swapped]] = targets[swapped]
        frames.private[targets[swapped]], frames.private[pfns[swapped]] = slots[swapped], 0
    of_file = cached & ~swapped
    if of_file.any():
        assert isinstance(vma.backing, File)
        offsets = (indices[of_file] << PAGE_SHIFT).view(np.uint64)
        entries = vma.backing.pages.lookup(offsets) & np.uint64(cpu_pte.FLAGS)
        vma.backing.pages.store(offsets, cpu_pte.cpu_entry(targets[of_file], entries))
    frames.put(pfns[cached])
