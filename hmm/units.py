"""Units of the model: bytes, pages, ranges of addresses.

An *address* is a byte address in a process or a device; a *pfn* is the number of a frame and never an address.
Ranges are half-open and in bytes.  The names and values are those of x86-64 with four-level paging.

**Source**: Linux include/linux/mm.h, arch/x86/include/asm/page_types.h.

**Absent**: what is mapped where.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

ULONG_MAX = (1 << 64) - 1
PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
PAGE_MASK = ~(PAGE_SIZE - 1)
PMD_SHIFT = 21
PMD_SIZE = 1 << PMD_SHIFT
PMD_MASK = ~(PMD_SIZE - 1)
PMD_PAGES = 1 << (PMD_SHIFT - PAGE_SHIFT)
PUD_SHIFT = 30
PUD_SIZE = 1 << PUD_SHIFT
TASK_SIZE = (1 << 47) - PAGE_SIZE
"""End of a process's address space: x86-64 keeps the last page below 2^47 unmapped."""
PIECE_PAGES = 1 << 16
"""Large requests are cut into pieces of this many pages: temporaries stay in the cache."""
PIECE_BYTES = PIECE_PAGES << PAGE_SHIFT

Address: TypeAlias = int
Pfn: TypeAlias = int
ProcessId: TypeAlias = int
SpaceId: TypeAlias = int
DeviceId: TypeAlias = int
MirrorId: TypeAlias = int
Entries: TypeAlias = npt.NDArray[np.uint64]
Pfns: TypeAlias = npt.NDArray[np.int64]


def page_down(address: Address) -> Address:
    """The start of the page that holds `address`."""
    return address & PAGE_MASK


def page_up(address: Address) -> Address:
    """The first page boundary at or above `address`."""
    return (address + PAGE_SIZE - 1) & PAGE_MASK


def pmd_up(address: Address) -> Address:
    """The first boundary of 2 MiB at or above `address`."""
    return (address + PMD_SIZE - 1) & PMD_MASK


def is_page_aligned(value: int) -> bool:
    """True when `value` (an address or a length in bytes) is a multiple of the page size."""
    return not value & (PAGE_SIZE - 1)


@dataclass(frozen=True, slots=True, order=True, init=False)
class AddressRange:
    """The bytes [start, end) of an address space."""

    start: Address
    end: Address

    def __init__(self, start: Address, end: Address) -> None:
        assert 0 <= start <= end, (start, end)
        _set_start(self, start)
        _set_end(self, end)

    def __str__(self) -> str:
        return f"[{self.start:#x}, {self.end:#x})"

    def __bool__(self) -> bool:
        return self.start < self.end

    def __contains__(self, address: Address) -> bool:
        return self.start <= address < self.end

    @property
    def size_bytes(self) -> int:
        """Length in bytes."""
        return self.end - self.start

    @property
    def npages(self) -> int:
        """Number of pages touched by the range."""
        return (self.end + PAGE_SIZE - 1 >> PAGE_SHIFT) - (self.start >> PAGE_SHIFT)

    def overlaps(self, other: AddressRange) -> bool:
        """True when the two ranges share a byte."""
        return self.start < other.end and other.start < self.end

    def intersect(self, other: AddressRange) -> AddressRange:
        """The bytes in both ranges; empty when there are none."""
        if other.start <= self.start and self.end <= other.end:
            return self
        start = max(self.start, other.start)
        return AddressRange(start, max(start, min(self.end, other.end)))

    def page_aligned(self) -> AddressRange:
        """The smallest range of whole pages that holds this one."""
        if not (self.start | self.end) & (PAGE_SIZE - 1):
            return self
        return AddressRange(page_down(self.start), page_up(self.end))


# Every request makes some ranges, and what a frozen class generates takes thrice as long.
_set_start, _set_end = (vars(AddressRange)[name].__set__ for name in AddressRange.__slots__)

WHOLE_SPACE = AddressRange(0, TASK_SIZE)
# numpy takes an array without dimensions twice as fast as an int
_TO_PAGE, _TO_BLOCK = np.array(PAGE_SHIFT, np.uint64), np.array(PMD_MASK & ULONG_MAX, np.uint64)


def all_but(bits: int) -> Entries:
    """uint64, without dimensions: the word that keeps everything of another but `bits`."""
    return np.array(ULONG_MAX & ~bits, np.uint64)


def block_starts(addresses: Entries) -> Entries:
    """uint64[n]: where the aligned 2 MiB begin that hold addresses, uint64[n]."""
    starts: Entries = addresses & _TO_BLOCK
    return starts


def page_numbers(addresses: Entries) -> Pfns:
    """int64[n]: the numbers (address >> PAGE_SHIFT) of the pages that hold addresses, uint64[n]."""
    numbers: Pfns = (addresses >> _TO_PAGE).view(np.int64)
    return numbers


def spans_of(addresses: Entries) -> tuple[AddressRange, ...]:
    """The pages at addresses, uint64[n] ascending and unique, as ranges.  Cost: as `spans_of_pages`."""
    return spans_of_pages(page_numbers(addresses))


def spans_of_pages(pages: Pfns) -> tuple[AddressRange, ...]:
    """Runs of consecutive pages as ranges.

    Args:
        pages: int64[n], page numbers, ascending and unique.

    Cost: O(n) vectorised, plus one Python object per run.
    """
    if not pages.size:
        return ()
    first, last = int(pages[0]), int(pages[-1])
    if last - first == pages.size - 1:
        return (AddressRange(first << PAGE_SHIFT, last + 1 << PAGE_SHIFT),)
    breaks = np.flatnonzero(pages[1:] - pages[:-1] != 1)
    starts = pages[np.concatenate(([0], breaks + 1))] << PAGE_SHIFT
    ends = (pages[np.concatenate((breaks, [pages.size - 1]))] + 1) << PAGE_SHIFT
    return tuple(map(AddressRange, starts.tolist(), ends.tolist()))
