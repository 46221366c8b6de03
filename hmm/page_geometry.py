"""Shape of a radix page table: how many levels, and which bits of an address choose an entry at each.

Every directory has 512 entries. The root has as many as the last address needs, and the number of levels
follows from it, so that a table for a small object is one directory and a table for all of 64 bits has six
levels:

    last        shifts                  llevel  root entries
    2^21 - 1    12                      0       512
    2^48 - 1    39 30 21 12             3       512
    2^64 - 1    57 48 39 30 21 12       5       128

Level 0 is the root; `llevel` is the level whose entries are page entries. Addresses are Python ints and ends
are exclusive, so that the end of a table of 64 bits is 2^64 and nothing wraps.

**Source**: the hmm_pt patch of the 2015 series (hmm_pt_init(), hmm_pt_level_start(), hmm_pt_level_end()).

**Invariants**: 0 <= llevel < MAX_LEVELS; shifts fall by 9 and end at PAGE_SHIFT; 1 <= root_entries <= 512.

**Absent**: the directories themselves.

Differs: the posted code spoke of inclusive ends and masked a directory at level 0 by `mask[-1]`; a table of
one level (llevel 0) made its iterator index a directory of level -1. Both are ordinary cases here.
"""

from __future__ import annotations

from dataclasses import dataclass

from hmm.errors import InvalidRequestError
from hmm.units import PAGE_SHIFT, PAGE_SIZE, ULONG_MAX, Address

__all__ = ["DIRECTORY_ENTRIES", "DIRECTORY_MASK", "DIRECTORY_SHIFT", "LAST_MAX", "MAX_LEVELS", "Geometry"]

DIRECTORY_SHIFT = PAGE_SHIFT - 3
DIRECTORY_ENTRIES = 1 << DIRECTORY_SHIFT
DIRECTORY_MASK = DIRECTORY_ENTRIES - 1
MAX_LEVELS = 6
LAST_MAX = ULONG_MAX


@dataclass(frozen=True, slots=True)
class Geometry:
    """Levels of a table that covers the addresses 0 to `last`, inclusive.

    Attributes:
        last: last address, the last byte of a page.
        shifts: per level, the lowest address bit that its index uses; root first.
    """

    last: Address
    shifts: tuple[int, ...]

    @classmethod
    def covering(cls, last: Address) -> Geometry:
        """The geometry whose last page holds `last`; 0 <= last < 2^64."""
        assert 0 <= last <= LAST_MAX, last
        pages_msb = max((last >> PAGE_SHIFT).bit_length() - 1, 0)
        top = pages_msb // DIRECTORY_SHIFT * DIRECTORY_SHIFT + PAGE_SHIFT
        return cls(last | (PAGE_SIZE - 1), tuple(range(top, PAGE_SHIFT - 1, -DIRECTORY_SHIFT)))

    @property
    def end(self) -> Address:
        """First address after the table; 2^64 for a table of all addresses."""
        return self.last + 1

    @property
    def llevel(self) -> int:
        """The level of page entries (the posted code's name: last level)."""
        return len(self.shifts) - 1

    @property
    def levels(self) -> int:
        """Number of levels, 1 to MAX_LEVELS."""
        return len(self.shifts)

    @property
    def root_entries(self) -> int:
        """Number of entries of the root that can be in use, 1 to 512."""
        return (self.last >> self.shifts[0]) + 1

    def check(self, address: Address) -> None:
        """Check that the table has an address.

        Raises:
            InvalidRequestError: it has not (EINVAL).
        """
        if not 0 <= address <= self.last:
            raise InvalidRequestError(f"address {address:#x} is not in the page table", address=address)

    def index(self, address: Address, level: int) -> int:
        """Index of the entry for `address` in its directory of `level` (`hmm_pt_index()`)."""
        return address >> self.shifts[level] & DIRECTORY_MASK

    def entry_span(self, address: Address, level: int) -> tuple[Address, Address]:
        """The [start, end) of the entry of `level` that holds `address`, cut at the end of the table."""
        shift = self.shifts[level]
        start = address >> shift << shift
        return start, min(start + (1 << shift), self.end)

    def directory_span(self, address: Address, level: int) -> tuple[Address, Address]:
        """The [start, end) of the directory of `level` that holds `address`; the root's is the table."""
        return (0, self.end) if level == 0 else self.entry_span(address, level - 1)
