"""msync, and the write-back of files that it asks for.

Write-back makes the pages of a file clean: whoever writes to one of them afterwards takes a fault first.  So every
mirror of every process that maps the range is told, and then their entries lose WRITE and DIRTY.

**Source**: Linux mm/msync.c, fs/sync.c (vfs_fsync_range()), mm/rmap.c (folio_mkclean(), page_mkclean_one()),
mm/page-writeback.c (folio_clear_dirty_for_io()), 6.12.

**Invariants**: after a write-back no shared mapping of the range has a writable or a dirty entry.

**Absent**: a disk: what is written back stays where it was.  Shared memory has none either, in the kernel and here, and
is never written back.

Differs: one event per space for all its mappings, from the first to the last page that is cleaned, where the kernel
sends one per page and mapping.
"""

from __future__ import annotations

import errno as errnos
from contextlib import ExitStack
from enum import IntFlag

import numpy as np

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.errors import BadAddressError, InvalidRequestError, RangeBusyError
from hmm.events import Cause
from hmm.file import FILE_SIZE_MAX, File, FileKind
from hmm.file_folio import folio_at
from hmm.frames import PageFlag
from hmm.operation import Operation
from hmm.units import (
    PAGE_SHIFT,
    PAGE_SIZE,
    PMD_MASK,
    ULONG_MAX,
    Address,
    AddressRange,
    Entries,
    is_page_aligned,
    page_up,
    pmd_up,
)
from hmm.vma import VmFlag

__all__ = ["MsyncFlag", "msync", "write_back"]

_CLEANED = np.uint64(cpu_pte.WRITE | cpu_pte.DIRTY)


class MsyncFlag(IntFlag):
    """The MS_ flags of msync()."""

    ASYNC = 1
    INVALIDATE = 2
    SYNC = 4


def msync(space: AddressSpace, start: Address, length: int, flags: int) -> Operation[int]:
    """Write shared file mappings back.

    Args:
        start: page-aligned.
        length: bytes, rounded up to pages; 0 does nothing.
        flags: MsyncFlag values; only MS_SYNC writes back.

    Returns: 0.

    Raises:
        InvalidRequestError: a start within a page, unknown flags, or MS_SYNC with MS_ASYNC (EINVAL).
        BadAddressError: a part is not mapped; the other parts were written back, unless MS_ASYNC (ENOMEM).
        InvalidRequestError: MS_SYNC of a shared mapping of a device, whose driver has no fsync(); what lies below it
            was written back (EINVAL).
        RangeBusyError: MS_INVALIDATE of a locked mapping (EBUSY).
        TimedOutError: a mirror with policy FAIL did not answer (ETIMEDOUT).

    Cost: O(VMAs) and that of `write_back`.
    """
    both = int(MsyncFlag.SYNC | MsyncFlag.ASYNC)
    if not is_page_aligned(start) or flags & ~(both | int(MsyncFlag.INVALIDATE)) or flags & both == both:
        raise InvalidRequestError(f"msync: flags {flags:#x} at {start:#x}", address=start)
    end = start + (page_up(length) & ULONG_MAX)
    if end > ULONG_MAX:
        raise BadAddressError(f"msync: {length:#x} bytes at {start:#x} end nowhere", errnos.ENOMEM, address=start)
    at, hole = start, None
    while at < end:
        vma = space.vmas.find_next(at)
        if vma is None or vma.start > at:
            hole = at if hole is None else hole
            if vma is None or vma.start >= end or flags == MsyncFlag.ASYNC:
                break
        if flags & MsyncFlag.INVALIDATE and vma.has(VmFlag.LOCKED):
            raise RangeBusyError(f"msync: {vma} is locked", errnos.EBUSY, address=vma.start)
        piece = vma.clip(at, end)
        if flags & MsyncFlag.SYNC and isinstance(piece.backing, File) and piece.shared:
            if piece.backing.kind is FileKind.DEVICE:
                raise InvalidRequestError(f"msync: {piece} has nothing to be written back to", address=piece.start)
            shift = piece.mapping.delta << PAGE_SHIFT
            yield from write_back(piece.backing, piece.start + shift, piece.end + shift)
        at = piece.end
    if hole is not None:
        raise BadAddressError(f"msync: nothing is mapped at {hole:#x}", errnos.ENOMEM, address=hole)
    return 0


def write_back(file: File, start: int, end: int) -> Operation[None]:
    """Make the pages of [start, end), page-aligned bytes of `file`, clean; of a huge page all.

    Raises:
        TimedOutError: a mirror with policy FAIL did not answer; nothing was changed (ETIMEDOUT).

    Cost: O(VMAs of the spaces that map the file + entries), vectorised.
    """
    end = min(end, FILE_SIZE_MAX)
    if file.kind is not FileKind.FILE or start >= end:
        return
    start = start & PMD_MASK if folio_at(file, start) is not None else start
    end = pmd_up(end) if folio_at(file, end - PAGE_SIZE) is not None else end
    told: list[tuple[AddressSpace, AddressRange]] = []
    with ExitStack() as brackets:
        for space in file.mapping_spaces():
            spans = tuple(span for part in _shared_spans(file, space, start, end) if (span := _dirty(space, part)))
            if spans:
                invalidation = brackets.enter_context(space.notifier.invalidation(spans, Cause.WRITE_BACK))
                yield from invalidation.deliver()
                told += [(space, span) for span in spans]
        # Only what was told of, and still is a mapping of the file: VMAs may have changed meanwhile.
        for space, span in told:
            for part in _shared_spans(file, space, start, end):
                _clean(space, part.intersect(span))
        entries = file.pages.valid(start, end)[1]
        file.frames.clear_flags(cpu_pte.cpu_pfn(cpu_pte.having(entries, cpu_pte.PRESENT)), PageFlag.DIRTY)


def _shared_spans(file: File, space: AddressSpace, start: int, end: int) -> list[AddressRange]:
    """Where `space` maps the bytes [start, end) of the file for all to see."""
    return [part.span for part in file.mapped_parts(space, start, end) if part.shared]


def _dirty(space: AddressSpace, span: AddressRange) -> AddressRange | None:
    """From the first to the last page of `span` that has been or can be written."""
    first = last = -1
    for addresses, entries in space.table.chunks(span.start, span.end):
        written = addresses[(entries & _CLEANED) != 0]
        if written.size:
            first = int(written[0]) if first < 0 else first
            last = int(written[-1])
    return AddressRange(first, last + PAGE_SIZE) if first >= 0 else None


def _clean(space: AddressSpace, span: AddressRange) -> None:
    """page_mkclean_one(); a huge page that has come across an edge meanwhile is left alone."""
    if not span:
        return
    start = pmd_up(span.start) if cpu_pte.is_huge(space.table.get(span.start)) else span.start
    end = span.end & PMD_MASK if cpu_pte.is_huge(space.table.get(span.end - PAGE_SIZE)) else span.end
    if start >= end:
        return

    def clean(entries: Entries) -> None:
        entries &= ~_CLEANED

    space.table.update(start, end, clean)
