"""Pinning: pages are brought in and kept where they are, for DMA by devices that cannot fault.

A pinned private page must be the one that its process keeps: what is shared by fork is copied first, even when it is
only to be read, and for a long pin what is still the file's or the zero page.  A page that is there is not used by
being pinned: its entry stays as old or clean as it was.

A page in the private memory of a device comes back first, as at every touch.  One in coherent memory stays there for
a short pin, and is moved to system memory for a long one: a device's memory must be able to be emptied.

**Source**: Linux mm/gup.c (pin_user_pages() with and without FOLL_LONGTERM, without FOLL_TOUCH, check_vma_flags(),
gup_must_unshare(), migrate_longterm_unpinnable_folios()), mm/memory.c (wp_page_copy() for FAULT_FLAG_UNSHARE), 6.12.

**Invariants**: a pinned anonymous page is exclusive to the process that it was pinned for.

**Absent**: movable zones of system memory, RLIMIT_MEMLOCK.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.ascending import unique
from hmm.errors import BadAddressError, InvalidRequestError, RangeBusyError
from hmm.events import Cause
from hmm.eviction import move_to_system
from hmm.fault import bring_in, lacking, pieces, raise_stop
from hmm.fault_pages import By, copy_unshared, prepare_anon_vma
from hmm.frames import ZERO_PFN, PageFlag
from hmm.huge_fault import reuse_huge
from hmm.huge_split import block_of, keep_small, split_pmds
from hmm.hugetlb_fault import unshare
from hmm.migration_entries import wait_on_locked
from hmm.operation import Operation, Pause
from hmm.units import PAGE_SHIFT, PMD_PAGES, AddressRange, Entries, Pfns, SpaceId, is_page_aligned, spans_of_pages
from hmm.vma import Vma, VmFlag
from hmm.zone_device import owners

__all__ = ["Pin", "pin_user_pages"]

_NOTHING = np.empty(0, np.intp)


@dataclass(frozen=True, slots=True, eq=False)
class Pin:
    """Pages that stay where they are until they are unpinned, whatever becomes of their process.

    Attributes:
        pfns: int64[n], their frames.
        owner: the token of whoever pinned them.
        long_term: they were moved out of memory that has to stay movable first.
    """

    pfns: Pfns
    space_id: SpaceId
    span: AddressRange
    owner: str
    long_term: bool


def pin_user_pages(space: AddressSpace, span: AddressRange, *, write: bool, long_term: bool = True) -> Operation[Pfns]:
    """Pin the pages of a range.

    Args:
        span: page-aligned.
        long_term: FOLL_LONGTERM: out of devices' memory; pages of private mappings that are the process's own.

    Returns: int64[npages], their frames, to be given to `Frames.unpin`.

    Raises:
        InvalidRequestError: an empty or unaligned range (EINVAL).
        BadAddressError: a page is not mapped, or not for this access, or has nothing behind it (EFAULT); nothing stays
            pinned.
        OutOfFramesError: memory ran out (ENOMEM); nothing stays pinned.
        RangeBusyError: a page cannot be moved out of a device's memory (EBUSY); nothing stays pinned.

    Cost: O(pages), vectorised.
    """
    if not span or not is_page_aligned(span.start | span.end):
        raise InvalidRequestError(f"pin: {span} is not a range of pages")
    pinned: list[Pfns] = []
    try:
        at = span.start
        while at < span.end:
            end = min(span.end, _permitting(space, at, write).end)
            piece = next(iter(pieces(AddressRange(at, end))))
            assert isinstance(piece, AddressRange)
            while at < piece.end:
                pinned.append((yield from _pin(space, AddressRange(at, piece.end), write, long_term)))
                at += pinned[-1].size << PAGE_SHIFT
            if at < end:
                yield Pause()
    except BaseException:
        for pfns in pinned:
            space.frames.unpin(pfns)
        raise
    return np.concatenate(pinned)


def _permitting(space: AddressSpace, address: int, write: bool) -> Vma:
    """check_vma_flags()."""
    vma = space.vmas.find(address)
    if vma is None:
        raise BadAddressError(f"pin: nothing is mapped at {address:#x}", address=address)
    if vma.has(VmFlag.IO | VmFlag.PFNMAP) or not (vma.writable if write else vma.readable):
        raise BadAddressError(f"pin: {vma} does not permit it", address=address)
    return vma


def _pin(space: AddressSpace, piece: AddressRange, write: bool, long_term: bool) -> Operation[Pfns]:
    # As many of the first pages of `piece` as are there at once.
    wanted = np.uint64(cpu_pte.PRESENT | (cpu_pte.WRITE if write else 0))
    while True:
        target = lacking(space, piece, write=write)
        if target is not None:
            stop = yield from bring_in(space, target, write=write, by=By.GUP)
            if stop is not None:
                if stop.address == piece.start:
                    raise_stop(stop, write=write)
                piece = AddressRange(piece.start, stop.address)
        # What was waited for may have come with other mappings, and what was there may have gone.
        span = AddressRange(piece.start, min(piece.end, _permitting(space, piece.start, write).end))
        entries = space.table.read(span.start, span.end)
        gone = np.flatnonzero((entries & wanted) != wanted)
        if gone.size:
            entries = entries[: gone[0]]
            if not entries.size:
                continue
        piece = AddressRange(piece.start, piece.start + (entries.size << PAGE_SHIFT))
        shared = np.zeros(entries.size, np.bool_) if write else _to_be_unshared(space, piece, entries, long_term)
        if not shared.any():
            pfns = cpu_pte.cpu_pfn(entries)
            on_device = np.flatnonzero(owners(space.frames, pfns)) if long_term else _NOTHING
            if not on_device.size:
                space.frames.pin(pfns)
                return pfns
            yield from _move_off_device(space, _addresses(piece, on_device), pfns[on_device])
        elif not (yield from _keep_huge(space, piece, entries, shared)):
            yield from _unshare(space, piece, np.flatnonzero(shared))


def _addresses(piece: AddressRange, which: npt.NDArray[np.intp]) -> Entries:
    return ((which + (piece.start >> PAGE_SHIFT)) << PAGE_SHIFT).view(np.uint64)


def _move_off_device(space: AddressSpace, addresses: Entries, pfns: Pfns) -> Operation[None]:
    """migrate_device_coherent_folio(), which waits for the lock; then the pages have to be looked at again."""
    if (yield from wait_on_locked(space, addresses, pfns)):
        return
    if not (yield from move_to_system(space.frames, space.relatives, unique(pfns), space.current.operation_id)):
        raise RangeBusyError(f"pin: pages from {int(addresses[0]):#x} on are in use in a device's memory")


def _to_be_unshared(
    space: AddressSpace, piece: AddressRange, entries: Entries, long_term: bool
) -> npt.NDArray[np.bool_]:
    """gup_must_unshare(): pages of private mappings that this process does not have to itself.

    A short pin does not mind pages of files and the zero page, as it need not see what is written afterwards.
    """
    vma = space.vmas.find(piece.start)
    assert vma is not None
    if vma.flags & (VmFlag.SHARED | VmFlag.MAYWRITE) != VmFlag.MAYWRITE:
        return np.zeros(entries.size, np.bool_)
    pfns = cpu_pte.cpu_pfn(entries)
    shared: npt.NDArray[np.bool_] = ~cpu_pte.is_writable(entries)
    shared &= ~space.frames.test_flags(pfns, PageFlag.ANON_EXCLUSIVE)
    if not long_term:
        shared &= space.frames.test_flags(pfns, PageFlag.ANON)
    return shared


def _keep_huge(
    space: AddressSpace, piece: AddressRange, entries: Entries, shared: npt.NDArray[np.bool_]
) -> Operation[bool]:
    """do_huge_pmd_wp_page() for FAULT_FLAG_UNSHARE: a huge page nobody else has becomes exclusive, others are split.

    Hugetlb pages are copied, one at a time.  Where a file's huge page was, its pages come by small entries; the kernel
    maps it again each time.

    Returns: whether there were any, so that the pages have to be looked at again.
    """
    pages = np.flatnonzero(shared & cpu_pte.is_huge(entries)) + (piece.start >> PAGE_SHIFT)
    starts = unique(pages // PMD_PAGES * PMD_PAGES << PAGE_SHIFT).tolist()
    vma = space.vmas.find(piece.start)
    if starts and vma is not None and vma.has(VmFlag.HUGETLB):
        yield from unshare(space, vma, starts[0])
        return True
    alien = [start for start in starts if not reuse_huge(space, start, space.table.get(start))]
    yield from split_pmds(space, map(block_of, alien))
    keep_small(space, map(block_of, alien))
    for start in alien:
        assert not cpu_pte.is_huge(space.table.get(start)), f"the huge page at {start:#x} was not split"
    return bool(starts)


def _unshare(space: AddressSpace, piece: AddressRange, which: npt.NDArray[np.intp]) -> Operation[None]:
    """do_wp_page() for FAULT_FLAG_UNSHARE: a page nobody else has becomes exclusive, others are copied."""
    frames = space.frames
    addresses = _addresses(piece, which)
    pages = which + (piece.start >> PAGE_SHIFT)
    entries = space.table.lookup(addresses)
    pfns = np.where(cpu_pte.is_special(entries), ZERO_PFN, cpu_pte.cpu_pfn(entries))
    alone = frames.test_flags(pfns, PageFlag.ANON) & (frames.refcount[pfns] == 1)
    alone &= ~frames.test_flags(pfns, PageFlag.COMPOUND | PageFlag.KSM)
    frames.set_flags(pfns[alone], PageFlag.ANON_EXCLUSIVE)
    space.claim(pfns[alone], piece.start)
    pages, addresses = pages[~alone], addresses[~alone]
    if not pages.size:
        return
    if frames.available < pages.size and frames.make_room:
        yield from frames.make_room(pages.size)
    with space.notifier.invalidation(spans_of_pages(pages), Cause.COPY_ON_WRITE) as bracket:
        yield from bracket.deliver()
        now = space.table.lookup(addresses)
        same = now == entries[~alone]
        vma = space.vmas.find(int(addresses[same.argmax()]))
        if vma is None or not same.any():
            return
        same &= addresses < np.uint64(vma.end)
        prepare_anon_vma(space, vma)
        copy_unshared(space, addresses[same], now[same])
