"""Bringing pages of mappings in ahead of use: MAP_POPULATE, mlock, growing locked memory, MADV_POPULATE.

No processor uses the pages, so that a page which is there already is used by its frame alone: the entry stays as old
or clean as it was.

**Source**: Linux mm/gup.c (__mm_populate(), populate_vma_page_range(), faultin_page_range(), follow_page_pte() with
FOLL_TOUCH), mm/huge_memory.c (touch_pmd()), mm/swap.c (folio_mark_accessed()), 6.12.

**Invariants**: no VMA changes; the caller has given its turn up.

**Absent**: how a page is brought in (fault.py).
"""

from __future__ import annotations

import numpy as np

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.ascending import unique
from hmm.errors import (
    BadAddressError,
    OutOfFramesError,
    SegmentationFault,
    TimedOutError,
    WouldDeadlockError,
)
from hmm.fault import fault_in, pieces
from hmm.frames import PageFlag
from hmm.huge_fault import mark_huge
from hmm.operation import Operation, Pause
from hmm.units import PAGE_SIZE, PMD_MASK, AddressRange
from hmm.vma import ACCESS_FLAGS, VmFlag

__all__ = ["get_user_pages", "populate"]

_LEFT_OUT = VmFlag.IO | VmFlag.PFNMAP | VmFlag.LOCKONFAULT


def populate(space: AddressSpace, span: AddressRange, *, ignore_errors: bool = True) -> Operation[None]:
    """Bring in every page of `span` that is mapped; writable private pages as if they were written.

    Holes, VM_IO, VM_PFNMAP and VM_LOCKONFAULT mappings are left out.

    Args:
        ignore_errors: go on with the next VMA after an error, as mmap does.

    Raises (unless ignored):
        BadAddressError: a mapping without any access, or a page behind the end of its file (EFAULT).
        OutOfFramesError: no frame is left (ENOMEM).
        TimedOutError: a mirror with policy FAIL did not answer for a page to be copied (ETIMEDOUT).
        WouldDeadlockError: made inside a callback that it would wait for (EDEADLK).
    """
    at = span.start
    while at < span.end:
        vma = space.vmas.find_next(at)
        if vma is None or vma.start >= span.end:
            return
        piece = vma.clip(at, span.end)
        at = piece.end
        if piece.has(_LEFT_OUT):
            continue
        try:
            if not piece.has(ACCESS_FLAGS):
                raise BadAddressError(f"{piece} permits no access", address=piece.start)
            write = piece.writable and not piece.shared
            yield from get_user_pages(space, piece.span, write=write)
        except (BadAddressError, OutOfFramesError, TimedOutError, WouldDeadlockError):
            if not ignore_errors:
                raise


def get_user_pages(space: AddressSpace, span: AddressRange, *, write: bool) -> Operation[None]:
    """Bring in what is missing of a range, and note that all of it was used.

    Args:
        span: page-aligned, a part of one VMA that permits the access.

    Raises: as `fault_in`.

    Cost: that of `fault_in`, and 5 ns per page.
    """
    wanted = np.uint64(cpu_pte.PRESENT | (cpu_pte.WRITE if write else 0))
    for number, piece in enumerate(pieces(span)):
        assert isinstance(piece, AddressRange)
        if number:
            yield Pause()
        missing = (space.table.read(piece.start, piece.end) & wanted) != wanted
        end = piece.end
        try:
            if missing.all():
                yield from fault_in(space, piece, write=write)
            elif missing.any():
                addresses = np.uint64(piece.start) + np.flatnonzero(missing).astype(np.uint64) * np.uint64(PAGE_SIZE)
                yield from fault_in(space, addresses, write=write)
        except (OutOfFramesError, SegmentationFault) as error:
            end = error.address or piece.start
            raise
        finally:
            _mark_accessed(space, AddressRange(piece.start, end), write)


def _mark_accessed(space: AddressSpace, span: AddressRange, write: bool) -> None:
    """Use pages as get_user_pages() does: folio_mark_accessed().

    A page used twice becomes active, unless it is locked; those written are dirty themselves.
    """
    frames = space.frames
    addresses, entries = space.table.valid(span.start, span.end)
    if space.huge:
        huge = cpu_pte.is_huge(entries)
        for start in unique(addresses[huge] & np.uint64(PMD_MASK & (1 << 64) - 1)).tolist():
            mark_huge(space, start, cpu_pte.ACCESSED | (cpu_pte.DIRTY | cpu_pte.SOFT_DIRTY if write else 0))
        entries = entries[~huge]
    entries = entries[cpu_pte.is_present(entries) & ~cpu_pte.is_special(entries)]
    pfns = cpu_pte.cpu_pfn(entries)
    if write:
        frames.set_flags(pfns[~cpu_pte.is_dirty(entries)], PageFlag.DIRTY)
    referenced = frames.test_flags(pfns, PageFlag.REFERENCED)
    again = pfns[referenced & ~frames.test_flags(pfns, PageFlag.ACTIVE)]
    frames.set_flags(pfns[~referenced], PageFlag.REFERENCED)
    vma = space.vmas.find(span.start)
    if vma is not None and vma.has(VmFlag.LOCKED):  # folio_test_unevictable()
        return
    frames.set_flags(again, PageFlag.ACTIVE)
    frames.clear_flags(again, PageFlag.REFERENCED)
