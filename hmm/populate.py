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
from hmm.errors import (
    BadAddressError,
    OutOfFramesError,
    SegmentationFault,
    TimedOutError,
    WouldDeadlockError,
)
from hmm.fault import fault_in, lacking, pieces
from hmm.fault_pages import DIRTIED, READ_ONLY, By
from hmm.frames import PageFlag
from hmm.huge_fault import blocks_of, mark_huge
from hmm.large_folio import belong_to, heads_of, members
from hmm.operation import Operation, Pause
from hmm.units import AddressRange, Entries
from hmm.vma import ACCESS_FLAGS, VmFlag

__all__ = ["get_user_pages", "mark_accessed", "populate"]

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
    for number, piece in enumerate(pieces(span)):
        assert isinstance(piece, AddressRange)
        if number:
            yield Pause()
        end = piece.end
        try:
            missing: AddressRange | Entries | None = piece
            if space.table.holds(piece.start, piece.end):
                missing = lacking(space, piece, write=write)
            if missing is not None:
                yield from fault_in(space, missing, write=write, by=By.GUP)
        except (OutOfFramesError, SegmentationFault) as error:
            end = error.address or piece.start
            raise
        finally:
            mark_accessed(space, AddressRange(piece.start, end), write=write)


def mark_accessed(space: AddressSpace, span: AddressRange, *, write: bool) -> None:
    """Use pages that are there as get_user_pages() does: FOLL_TOUCH, folio_mark_accessed().

    A page used twice becomes active, unless it is locked; those written are dirty themselves.

    Args:
        span: page-aligned, a part of one VMA.

    Cost: 5 ns per page.
    """
    frames, table = space.frames, space.table
    if space.huge:
        addresses, entries = table.valid(span.start, span.end)
        huge = cpu_pte.is_huge(entries)
        # touch_pmd(): pmdp_set_access_flags() does nothing for a read.
        for start in blocks_of(addresses[huge]) if write else ():
            mark_huge(space, start, READ_ONLY | DIRTIED)
        entries = entries[~huge]
    else:
        entries = table.read(span.start, span.end)
    every, some = (int(bits.reduce(entries)) if entries.size else 0 for bits in (np.bitwise_and, np.bitwise_or))
    if some & cpu_pte.SPECIAL or not every & cpu_pte.PRESENT:
        entries = entries[cpu_pte.is_present(entries) & ~cpu_pte.is_special(entries)]
    pfns = cpu_pte.cpu_pfn(entries)
    clean = ~cpu_pte.is_dirty(entries) if write and not every & cpu_pte.DIRTY else np.zeros(pfns.size, np.bool_)
    vma = space.vmas.find(span.start)
    locked = vma is not None and vma.has(VmFlag.LOCKED)
    for head in heads_of(frames, pfns) if space.huge else ():  # what is said of a page is said of its folio
        mine = belong_to(frames, pfns, head)
        times, dirty = int(np.count_nonzero(mine)), bool(clean[mine].any())
        frames.mark_accessed(members(frames, head), times, dirty=dirty, unevictable=locked)
        pfns, clean = pfns[~mine], clean[~mine]
    if np.count_nonzero(clean):
        frames.set_flags(pfns[clean], PageFlag.DIRTY)
    frames.mark_accessed(pfns, unevictable=locked)
