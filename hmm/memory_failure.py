"""Memory failure: frames that lost their contents are taken from everybody, by request (MADV_HWPOISON).

The frame is never used again.  Every entry that named it becomes one whose touch is SIGBUS (BUS_MCEERR_AR), after all
mirrors were told; a page of shared memory stays in its file, and is SIGBUS for whoever maps it anew, and EIO for read
and write.  A page that is in swap as well is read from there again.

    what stands there           becomes of the call
    a small page                goes on with the next
    a huge page                 is split, and loses the page asked for; the rest of it is passed over
    the zero page, a page of a  ends: EBUSY, from the second time on EHWPOISON; it stays mapped, and goes on to be
    driver's own                used, as nobody knows what it is
    a page of a file, or in     ends: EBUSY, after it was lost like others
    swap as well, that is pinned
    a page in coherent memory   ends: ENXIO, as the device's driver would have to deal with it
    a lost page                 ends: EFAULT

**Source**: Linux mm/madvise.c (madvise_inject_error()), mm/memory-failure.c (memory_failure(),
hwpoison_user_mappings(), identify_page_state(), mf_generic_kill_procs()), mm/rmap.c (try_to_unmap_one() with
TTU_HWPOISON), 6.12.

**Invariants**: no entry that can be reached by the CPU or a device names a frame with PageFlag.HWPOISON, but of a
driver's own page, and while a call waits for the frame's lock, or for the mirrors that it has told.

**Absent**: hugetlb pages (EOPNOTSUPP), unpoisoning; the signal that the kernel sends at once to who had the page dirty,
as there are no signals: the touch gets it.

Differs: what a device takes for itself while this waits for the page is taken from it, as in 7.0.  In 6.12 such a page
is mapped nowhere: its device, and then the CPU, go on with what is lost.
"""

from __future__ import annotations

import errno as errnos
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.errors import (
    EHWPOISON,
    BadAddressError,
    HmmError,
    InvalidRequestError,
    NoSuchObjectError,
    OutOfFramesError,
    RangeBusyError,
)
from hmm.events import Cause
from hmm.fault import bring_in
from hmm.fault_pages import Stop
from hmm.file import FILE_SIZE_MAX, File, FileKind
from hmm.frames import ZERO_PFN, Frames, PageFlag
from hmm.huge_split import split_folio
from hmm.migration_entries import FindPlaces, HeldPages, replace, unmap_everywhere, wait_on_locked
from hmm.notifier import Breaking
from hmm.operation import Operation
from hmm.rmap import Places, anonymous_places, file_places, merged_places
from hmm.swap import area_of
from hmm.units import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE, Address, AddressRange, Entries, Pfn, Pfns, page_numbers
from hmm.vma import Vma, VmFlag
from hmm.zone_device import owners

__all__ = [
    "are_drivers",
    "are_plain",
    "elsewhere",
    "inject_memory_failure",
    "leading",
    "memory_at",
    "not_had",
    "places_of",
    "touch",
    "until_repeated",
    "within",
]

_ELSEWHERE = np.uint64(cpu_pte.DEVICE | cpu_pte.EXCLUSIVE | cpu_pte.SWAP | cpu_pte.MIGRATION)
_SOFT_DIRTY = np.uint64(cpu_pte.SOFT_DIRTY)


def inject_memory_failure(space: AddressSpace, piece: AddressRange) -> Operation[Address]:
    """Poison the first pages of a piece, which are brought in by a read first.

    Returns: where to go on.

    Raises:
        BadAddressError: a page cannot be had, or is lost already (EFAULT); another call is taking it, or a huge page
            cannot be split, as somebody refers to it, or it is the zero page for the second time (EHWPOISON).
        RangeBusyError: a page is the zero page, or a driver's; or of a file, or in swap as well, and somebody refers
            to it: it is poisoned, and those behind it are not (EBUSY).
        NoSuchObjectError: a page is in coherent memory of a device (ENXIO).
        InvalidRequestError: hugetlb memory (EOPNOTSUPP).
        OutOfFramesError: a page could not be brought in (ENOMEM).
        The pages below `error.address` are poisoned.

    Cost: O(pages + VMAs), vectorised; huge pages one at a time.
    """
    vma = memory_at(space, piece.start)
    part = within(vma, piece)
    coming = elsewhere(space, vma, part)
    entries = space.table.read(part.start, part.end)
    first = leading(coming | _can_be_taken(space.frames, vma, entries))
    if not first:
        return (yield from _inject_one(space, vma, part.start))
    if coming[:first].any():
        stop = yield from bring_in(space, AddressRange(part.start, part.start + (first << PAGE_SHIFT)), write=False)
        first = first if stop is None else (stop.address - part.start) >> PAGE_SHIFT
        if not first:
            return (yield from _inject_one(space, vma, part.start))
        vma = memory_at(space, part.start)  # other memory may have been mapped meanwhile
        first = min(first, (vma.end - part.start) >> PAGE_SHIFT)
        entries = space.table.read(part.start, part.start + (first << PAGE_SHIFT))
    pfns = cpu_pte.cpu_pfn(entries[:first])
    first = min(first, leading(_can_be_taken(space.frames, vma, entries[:first])), until_repeated(pfns))
    first = min(first, leading(~_are_referenced(space.frames, pfns[:first])) + 1)
    end = part.start + (first << PAGE_SHIFT)
    if first:
        addresses = np.arange(part.start, end, PAGE_SIZE, dtype=np.uint64)
        touch(space.frames, pfns[:first], coming[:first])
        yield from _memory_failure(space, vma, addresses, pfns[:first])
    return end


def memory_at(space: AddressSpace, address: Address) -> Vma:
    """The VMA there, whose pages get_user_pages_fast() can have.

    Raises:
        BadAddressError: there is none, or it permits no reading and the page is not there (EFAULT).
        InvalidRequestError: hugetlb memory (EOPNOTSUPP).

    Source: Linux mm/gup.c, gup_fast_pte_range(), which asks the entry alone, then check_vma_flags().
    """
    vma = space.vmas.find(address)
    if vma is None or vma.has(VmFlag.IO | VmFlag.PFNMAP) or not (vma.readable or _is_there(space, vma, address)):
        raise BadAddressError(f"madvise: {address:#x} is not memory that can be had", address=address)
    if vma.has(VmFlag.HUGETLB):
        raise InvalidRequestError(f"madvise: {vma} is hugetlb memory", errnos.EOPNOTSUPP, address=address)
    return vma


def _is_there(space: AddressSpace, vma: Vma, address: Address) -> bool:
    """Whether the CPU may read a page though its mapping does not permit it: x86 reads what may be written or run."""
    entry = space.table.get(address)
    return vma.has(VmFlag.WRITE | VmFlag.EXEC) and cpu_pte.is_present(entry) and not cpu_pte.is_special(entry)


def within(vma: Vma, span: AddressRange) -> AddressRange:
    """The part of a range that lies in its first VMA; one page where only pages that are there can be had."""
    return AddressRange(span.start, min(span.end, vma.end if vma.readable else span.start + PAGE_SIZE))


def elsewhere(space: AddressSpace, vma: Vma, span: AddressRange) -> npt.NDArray[np.bool_]:
    """bool[n]: which pages of a part of a VMA have to come from a device, a file or swap first."""
    entries = space.table.read(span.start, span.end)
    coming: npt.NDArray[np.bool_] = (entries & _ELSEWHERE) != 0
    if vma.backing is not None:
        coming |= entries == 0
    return coming


def not_had(stop: Stop) -> HmmError:
    """Why a page could not be brought in (EFAULT, ENOMEM)."""
    if stop.signal is None:
        return OutOfFramesError(f"madvise: {stop.address:#x}: memory ran out", address=stop.address)
    return BadAddressError(f"madvise: {stop.address:#x}: {stop.signal.value}", address=stop.address)


def places_of(space: AddressSpace, vma: Vma, indices: Pfns, pfns: Pfns) -> FindPlaces:
    """What finds where small pages of one VMA may be mapped: their page offsets and frames, int64[n] each."""
    frames = space.frames
    anonymous, root = frames.test_flags(pfns, PageFlag.ANON), space.anon_vma_root(vma.anon_vma)

    def places() -> Iterator[Places]:
        if anonymous.any():
            relatives = [space.relatives[number] for number in sorted(space.relatives)]
            yield from anonymous_places(relatives, indices, vma.backing, root)
            yield from merged_places(frames, pfns)
        if isinstance(vma.backing, File) and not anonymous.all():
            yield from file_places(vma.backing.mapping_spaces(), indices, vma.backing)

    return places


def touch(frames: Frames, pfns: Pfns, came: npt.NDArray[np.bool_]) -> None:
    """What get_user_pages_fast() leaves of looking: gup_fast_pte_range() for pages that are there, else FOLL_TOUCH."""
    frames.set_flags(pfns[~came], PageFlag.REFERENCED)
    frames.mark_accessed(pfns[came])


def _after_split(space: AddressSpace, vma: Vma, address: Address, pfn: Pfn) -> tuple[Vma | None, Entries]:
    """Where a page is whose folio was split, and uint64[1]: its entry; of a file's, which has none, the page cache's.

    Args:
        vma: where it was.  A file's page is the file's, though other memory may have been mapped there meanwhile.
    """
    if not isinstance(vma.backing, File):
        return space.vmas.find(address), space.table.read(address, address + PAGE_SIZE)
    offset = vma.page_offset(address) << PAGE_SHIFT
    cached = vma.backing.pages.get(offset) if offset < FILE_SIZE_MAX else 0
    return vma, np.array([cached if cpu_pte.cpu_pfn(cached) == pfn else 0], np.uint64)


def leading(mask: npt.NDArray[np.bool_]) -> int:
    """How many of the first ones are set."""
    return mask.size if mask.all() else int(mask.argmin())


def are_plain(frames: Frames, entries: Entries) -> npt.NDArray[np.bool_]:
    """bool[n]: which entries map small pages of system memory."""
    pfns = np.where(cpu_pte.is_present(entries), cpu_pte.cpu_pfn(entries), ZERO_PFN)
    plain: npt.NDArray[np.bool_] = (pfns != ZERO_PFN) & ~cpu_pte.is_special(entries)
    plain &= ~frames.test_flags(pfns, PageFlag.COMPOUND | PageFlag.HWPOISON) & (owners(frames, pfns) == 0)
    return plain


def are_drivers(frames: Frames, vma: Vma, pfns: Pfns) -> npt.NDArray[np.bool_]:
    """bool[n]: which pages of a VMA a driver has mapped, that are on no list: of its file, and not copied."""
    of_driver = isinstance(vma.backing, File) and vma.backing.kind is FileKind.DEVICE
    drivers: npt.NDArray[np.bool_] = ~frames.test_flags(pfns, PageFlag.ANON) & of_driver
    return drivers


def _can_be_taken(frames: Frames, vma: Vma, entries: Entries) -> npt.NDArray[np.bool_]:
    return are_plain(frames, entries) & ~are_drivers(frames, vma, cpu_pte.cpu_pfn(entries))


def until_repeated(pfns: Pfns) -> int:
    """How many of the first frames differ: one that is mapped twice is lost when it is met again."""
    firsts = np.unique(pfns, return_index=True)[1]
    return pfns.size if firsts.size == pfns.size else leading(np.isin(np.arange(pfns.size), firsts))


def _inject_one(space: AddressSpace, vma: Vma, address: Address) -> Operation[Address]:
    """A page that is no small page of system memory.  Returns: where to go on."""
    if vma.readable:
        stop = yield from bring_in(space, AddressRange(address, address + PAGE_SIZE), write=False)
        if stop is not None:
            raise not_had(stop)
    frames, entry = space.frames, space.table.get(address)
    pfn = cpu_pte.cpu_pfn(entry)
    if cpu_pte.is_special(entry) and not entry & cpu_pte.HUGE:
        if frames.zero_page_poisoned:
            raise BadAddressError(f"memory failure: {address:#x} is the zero page again", EHWPOISON, address=address)
        frames.zero_page_poisoned = True
        raise RangeBusyError(f"memory failure: {address:#x} is the zero page", address=address)
    if owners(frames, np.array([pfn]))[0]:
        raise NoSuchObjectError(f"memory failure: {address:#x} is in a device's memory", errnos.ENXIO, address=address)
    _require_sound(frames, pfn, address)
    if are_drivers(frames, memory_at(space, address), np.array([pfn]))[0]:
        frames.get(np.array([pfn]))  # for ever
        frames.poison(np.array([pfn]))
        raise RangeBusyError(f"memory failure: {address:#x} is a driver's page", address=address)  # me_unknown()
    if not entry & cpu_pte.HUGE and not frames.flags_of(pfn) & PageFlag.COMPOUND:
        return address  # it is now
    before = memory_at(space, address)
    if cpu_pte.is_special(entry) or not (yield from split_folio(space, address, lost=True)):
        message = f"memory failure: the huge page at {address:#x} is in use"
        raise BadAddressError(message, EHWPOISON, address=address)
    whole, entries = _after_split(space, before, address, pfn)
    if cpu_pte.is_present(entries)[0]:
        _require_sound(frames, int(cpu_pte.cpu_pfn(entries)[0]), address)
    if whole is not None and not whole.has(VmFlag.HUGETLB) and are_plain(frames, entries)[0]:
        yield from _memory_failure(space, whole, np.array([address], np.uint64), cpu_pte.cpu_pfn(entries))
    return address + PMD_SIZE


def _require_sound(frames: Frames, pfn: int, address: Address) -> None:
    """TestSetPageHWPoison()."""
    if frames.flags_of(pfn) & PageFlag.HWPOISON:
        message = f"memory failure: {address:#x} is being taken from everybody already"
        raise BadAddressError(message, EHWPOISON, address=address)


def _memory_failure(space: AddressSpace, vma: Vma, addresses: Entries, pfns: Pfns) -> Operation[None]:
    """memory_failure() for small pages of one VMA; the reference that it takes is never dropped.

    Args:
        addresses: uint64[n], ascending.
        pfns: int64[n], unique.
    """
    frames = space.frames
    indices = page_numbers(addresses) + vma.mapping.delta
    places = places_of(space, vma, indices, pfns)
    held = HeldPages(frames, pfns, indices, places)
    frames.get(pfns)
    frames.poison(pfns)
    yield from _wait_for_lock(space, addresses, pfns)
    what = f"memory failure at {int(addresses[0]):#x}"
    with Breaking(space.notifiers.values(), what), frames.locks.lock(pfns, space.current.operation_id):
        try:
            yield from unmap_everywhere(held, cause=Cause.MEMORY_FAILURE, certain=True)
            while frames.mapcount[pfns].any():  # mremap or fork took them along meanwhile, to where nobody was told
                found = yield from unmap_everywhere(
                    held, only_where_mapped=True, cause=Cause.MEMORY_FAILURE, certain=True
                )
                if not found:
                    break
        except BaseException:
            frames.unpoison(pfns)
            replace(held, pfns)
            raise
        referenced = _are_referenced(frames, pfns, mine=1)
        for place in places():
            _lose(held, place)
        _leave_swap_cache(frames, pfns)
    if referenced.any():
        address = int(addresses[referenced.argmax()])
        raise RangeBusyError(f"memory failure: somebody still refers to the page at {address:#x}", address=address)


def _wait_for_lock(space: AddressSpace, addresses: Entries, pfns: Pfns) -> Operation[None]:
    """folio_lock(); who may not wait gives the pages up again."""
    try:
        while (yield from wait_on_locked(space, addresses, pfns)):
            pass
    except BaseException:
        space.frames.unpoison(pfns)
        space.frames.put(pfns)
        raise


def _are_referenced(frames: Frames, pfns: Pfns, mine: int = 0) -> npt.NDArray[np.bool_]:
    """bool[n]: to which pages of files, or in swap as well, somebody refers but entries: has_extra_refcount().

    Nobody asks that of others: me_pagecache_clean().
    """
    referenced = frames.refcount[pfns] - frames.mapcount[pfns] - mine > 1
    referenced &= ~frames.test_flags(pfns, PageFlag.ANON) | (frames.private[pfns] != 0)
    found: npt.NDArray[np.bool_] = referenced
    return found


def _lose(held: HeldPages, place: Places) -> None:
    """What stands in for the pages becomes what a touch fails at; of pages that are in swap, the way there."""
    table, pfns = place.space.table, held.pfns[place.pages]
    entries = table.lookup(place.addresses)
    ours = cpu_pte.is_migration(entries) & (cpu_pte.cpu_pfn(entries) == pfns)
    slots = held.frames.private[pfns[ours]]
    # "Soft-dirty" goes along to swap only: try_to_unmap_one().
    flags = np.where(slots != 0, np.uint64(cpu_pte.SWAP) | (entries[ours] & _SOFT_DIRTY), np.uint64(cpu_pte.POISON))
    table.store(place.addresses[ours], cpu_pte.cpu_entry(np.where(slots != 0, slots, pfns[ours]), flags))
    if slots.any():
        area_of(held.frames).duplicate(slots[slots != 0])


def _leave_swap_cache(frames: Frames, pfns: Pfns) -> None:
    """me_swapcache_clean()."""
    cached = pfns[frames.private[pfns] != 0]
    if cached.size:
        area_of(frames).cached[frames.private[cached]] = 0
        frames.private[cached] = 0
        frames.put(cached)
