"""Truncation: the end of a file moves, or a hole is made in it, under the feet of those who map it.

Every address space that maps a part of the range is told first and gives up its entries, then the pages go.  No VMA
lock is taken: VMAs stay, and a touch of an address that lies behind the end is answered with SIGBUS.

Truncation takes private copies too (`even_cows`), as they stand for bytes that the file no longer has; a hole
leaves them, as they are no longer the file's.

A large folio that lies across an edge is split first.  Where somebody refers to it, it cannot be: then its part of the
range is zeroed and stays in the cache, even behind the end of the file.

**Source**: Linux mm/truncate.c (truncate_pagecache(), truncate_inode_partial_folio()), mm/memory.c
(unmap_mapping_range()), mm/shmem.c (shmem_setattr(), shmem_fallocate(), shmem_undo_range()).

**Invariants**: when an operation is done no CPU entry names a page of the file that the cache has not, and no
mirror one that it was not told about.

**Absent**: reading and writing (file.py); quotas.

Differs: a space is told of all its mappings by one event, not by one per VMA; of a folio that is split before, not
after.
"""

from __future__ import annotations

import errno as errnos
from bisect import bisect_right
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from itertools import accumulate

import numpy as np

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.errors import InvalidRequestError, NoSuchObjectError, TimedOutError, WouldDeadlockError
from hmm.events import Cause
from hmm.file import FILE_SIZE_MAX, File, FileKind, zero
from hmm.file_folio import Told, can_split, folio_at, split_file_folio, tell_everywhere
from hmm.frames import ZERO_PFN, PageFlag
from hmm.huge_split import huge_blocks
from hmm.hugetlb import told_span
from hmm.operation import Operation
from hmm.units import PAGE_SIZE, PMD_MASK, PMD_SIZE, AddressRange, Entries, all_but, page_down, page_up
from hmm.vma import Vma

__all__ = ["punch", "truncate"]


def truncate(file: File, size_bytes: int) -> Operation[None]:
    """Set the size of a file, which no other call changes meanwhile (`file.locked`).

    Pages behind the new end go, with all entries that map them and the private copies made of them; the rest
    of the last page is zeroed, at the old size as well.  A larger size adds a hole.  Mirrors hear of pages that go.

    Raises:
        InvalidRequestError: a negative size, or a device file (EINVAL); above FILE_SIZE_MAX (EFBIG).
        TimedOutError: a mirror with policy FAIL did not answer; the size is what it was (ETIMEDOUT).

    Cost: O(pages dropped + entries dropped + VMAs of the spaces that map the file).
    Source: Linux mm/shmem.c, shmem_setattr().
    """
    if file.kind is FileKind.DEVICE or size_bytes < 0:
        raise InvalidRequestError(f"truncate: {file} cannot have a size of {size_bytes} bytes")
    if size_bytes > FILE_SIZE_MAX:
        raise InvalidRequestError(f"truncate: {size_bytes:#x} bytes are too many for a file", errnos.EFBIG)
    before, file.size_bytes = file.size_bytes, size_bytes
    if size_bytes > before:
        return
    # The size comes first: from here on no touch brings back what is about to go.
    hole = page_up(size_bytes)
    if before > hole:
        try:
            yield from _drop(file, hole, FILE_SIZE_MAX, even_cows=True)
        except (TimedOutError, WouldDeadlockError):
            file.size_bytes = before
            raise
    yield from zero(file, size_bytes, hole)


def punch(file: File, start: int, length: int) -> Operation[None]:
    """Make a hole in a file and keep its size: fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE), as `truncate`.

    Whole pages go with the entries that map them; private copies stay.  Parts of pages are zeroed.  A hole that ends
    in the first page makes everybody unmap all that follows it, though no page goes.

    Raises:
        InvalidRequestError: a negative offset, or no length (EINVAL); above FILE_SIZE_MAX (EFBIG).
        NoSuchObjectError: a device file (ENODEV).
        TimedOutError: a mirror with policy FAIL did not answer; the pages are still there (ETIMEDOUT).

    Cost: as `truncate`.  Source: Linux mm/shmem.c, shmem_fallocate(); fs/open.c, vfs_fallocate().
    """
    if start < 0 or length <= 0:
        raise InvalidRequestError(f"punch: {file} cannot have a hole of {length} bytes at {start}")
    if file.kind is FileKind.DEVICE:
        raise NoSuchObjectError(f"punch: {file} has no pages", errnos.ENODEV)
    end = start + length
    if end > FILE_SIZE_MAX:
        raise InvalidRequestError(f"punch: {end:#x} is behind the end of any file", errnos.EFBIG)
    first, last = page_up(start), page_down(end)
    if first < last:
        yield from _drop(file, first, last, even_cows=False)
    elif not last:  # the last byte before page 0 is behind all others, and everything is unmapped up to there
        yield from _unmap(file, first, FILE_SIZE_MAX, even_cows=False)
    if last < first:
        yield from zero(file, start, end)
    else:
        yield from zero(file, start, first)
        yield from zero(file, last, end)


def _drop(file: File, start: int, end: int, *, even_cows: bool) -> Operation[None]:
    """Unmap whole pages, and take them out of the cache."""
    while True:
        for offset in _across(file, start, end):
            yield from split_file_folio(file, offset)
        with ExitStack() as brackets:
            yield from _tell(file, brackets, start, end, even_cows=even_cows)
            stuck = _across(file, start, end)
            if any(can_split(file, offset) for offset in stuck):  # a collapse came between
                continue
            _zap_all(file, start, end, even_cows=even_cows)
            for offset in stuck:
                low, high = max(start, offset & PMD_MASK), min(end, (offset & PMD_MASK) + PMD_SIZE)
                file.frames.clear(cpu_pte.cpu_pfn(file.pages.read(low, high)))
                start, end = (high, end) if low == start else (start, low)
            if start < end:
                file.drop_pages(start, end)
            return


def _unmap(file: File, start: int, end: int, *, even_cows: bool) -> Operation[None]:
    """unmap_mapping_range()."""
    with ExitStack() as brackets:
        yield from _tell(file, brackets, start, end, even_cows=even_cows)
        _zap_all(file, start, end, even_cows=even_cows)


def _tell(file: File, brackets: ExitStack, start: int, end: int, *, even_cows: bool) -> Operation[None]:
    # All spaces are told before one of them is changed, so that nothing is when one of the mirrors does not answer.
    yield from tell_everywhere(file, brackets, Cause.TRUNCATE, partial(_untold, file, start, end, even_cows=even_cows))


def _zap_all(file: File, start: int, end: int, *, even_cows: bool) -> None:
    for space in file.mapping_spaces():
        for part in file.mapped_parts(space, start, end):
            _zap(space, part, even_cows=even_cows)


def _across(file: File, start: int, end: int) -> list[int]:
    """Offsets of pages at the edges of a range in large folios that are not all in it: none, one or two."""
    edges = [start] if start & ~PMD_MASK else []
    edges += [end - PAGE_SIZE] if end & ~PMD_MASK and (not edges or edges[0] & PMD_MASK != end & PMD_MASK) else []
    return [offset for offset in edges if folio_at(file, offset) is not None]


def _untold(file: File, start: int, end: int, told: Told, *, even_cows: bool) -> Told:
    # At first every mapping of the range, as the kernel; later only what has come to hold entries: it looks twice.
    new = {}
    for space in file.mapping_spaces():
        spans = tuple(_told_span(space, part) for part in file.mapped_parts(space, start, end))
        if space.id in told:
            is_told = _inside_one_of(told[space.id])
            spans = tuple(
                span for span in spans if not is_told(span) and _doomed(space, span, even_cows=even_cows)[0].size
            )
        if spans:
            new[space.id] = spans
    return new


def _told_span(space: AddressSpace, part: Vma) -> AddressRange:
    """A part of a VMA, with all of the huge pages that lie across its edges: __split_huge_pmd()."""
    span = told_span(space, part)
    for edge in (span.start, span.end - PAGE_SIZE) if space.huge else ():
        for block in huge_blocks(space, AddressRange(edge, edge + PAGE_SIZE)):
            span = AddressRange(min(span.start, block.start), max(span.end, block.end))
    return span


def _inside_one_of(known: Iterable[AddressRange]) -> Callable[[AddressRange], bool]:
    # Whether a range lies in one of others, which may overlap: in that, of those that begin before it, which ends last.
    ordered = sorted((span.start, span.end) for span in known)
    starts = [start for start, _ in ordered]
    reached = list(accumulate([end for _, end in ordered], max))

    def is_inside(span: AddressRange) -> bool:
        before = bisect_right(starts, span.start)
        return before > 0 and span.end <= reached[before - 1]

    return is_inside


def _doomed(space: AddressSpace, span: AddressRange, *, even_cows: bool) -> tuple[Entries, Entries]:
    # Addresses and entries that have to go: zap_present_pte(), should_zap_folio().
    addresses, entries = space.table.valid(span.start, span.end)
    if not even_cows and entries.size:
        framed = cpu_pte.holds_frame(entries) | cpu_pte.is_migration(entries)
        own = framed & space.frames.test_flags(np.where(framed, cpu_pte.cpu_pfn(entries), ZERO_PFN), PageFlag.ANON)
        own |= cpu_pte.is_swap(entries)  # only private pages leave an entry behind when they go to swap
        own |= cpu_pte.is_poison(entries)  # zap_nonpresent_ptes() asks should_zap_cows()
        return addresses[~own], entries[~own]
    return addresses, entries


def _zap(space: AddressSpace, part: Vma, *, even_cows: bool) -> None:
    if even_cows:
        space.zap(part.start, part.end)
        return
    if space.huge:
        space.split_edges(part.start, part.end)
    if space.keeps_tables:
        space.keep_tables(part.start, part.end)
    addresses, _ = _doomed(space, part.span, even_cows=False)
    entries = space.table.clear_many(addresses)
    space.drop(entries if part.mapping.has_recency else entries & all_but(cpu_pte.ACCESSED))
