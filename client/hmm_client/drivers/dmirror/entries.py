"""Entries of the test driver's own table: for each page the frame, and what the device may do with it.

    bits 0 and 1  Tag    bit 2  in use    from bit 12 on  the frame

**Source**: Linux lib/test_hmm.c, the tagged page pointers of dmirror->pt.

**Absent**: the table itself (`hmm.page_table`); when entries come and go (`hmm_client.drivers.dmirror`).
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

from hmm.page_table import PageTable
from hmm.units import PAGE_SHIFT, PAGE_SIZE, TASK_SIZE, AddressRange, Entries, Pfns

TAG = np.uint64(3)
"""Where the tag is."""
_IN_USE = 1 << 2
_PFN_SHIFT = np.uint64(12)


class Tag(IntEnum):
    """What a table entry permits: DPT_XA_TAG_."""

    NONE = 0
    WRITE = 1
    ATOMIC = 2


def table_entries(pfns: Pfns, tags: npt.NDArray[np.uint64]) -> Entries:
    """The entries of pages, int64[n], uint64[n] tags."""
    entries: Entries = (pfns.view(np.uint64) << _PFN_SHIFT) | np.uint64(_IN_USE) | tags
    return entries


def entry_pfns(entries: Entries) -> Pfns:
    """int64[n]: the frames of entries."""
    return (entries >> _PFN_SHIFT).view(np.int64)


def page_addresses(span: AddressRange, count: int) -> Entries:
    """uint64[count]: the addresses of the first pages of a range."""
    return np.arange(span.start, span.start + (count << PAGE_SHIFT), PAGE_SIZE, dtype=np.uint64)


def addresses_at(span: AddressRange, pages: npt.NDArray[np.intp]) -> Entries:
    """The addresses of pages counted from the start of a range."""
    return np.uint64(span.start) + (pages << PAGE_SHIFT).view(np.uint64)


def leading(mask: npt.NDArray[np.bool_]) -> int:
    """How many are true before the first that is not."""
    return mask.size if mask.all() else int(mask.argmin())


def part_inside(span: AddressRange) -> AddressRange:
    """The part of a range that is in the address space."""
    return AddressRange(min(span.start, TASK_SIZE), min(span.end, TASK_SIZE))


def entries_in(table: PageTable, span: AddressRange) -> Entries:
    """The entries of the part of a range that is in the address space; those of the rest are missing."""
    part = part_inside(span)
    return table.read(part.start, part.end) if part else np.empty(0, np.uint64)
