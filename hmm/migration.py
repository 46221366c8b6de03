"""`struct migrate_vma`: pages of one VMA on their way, a source word and a destination word for each.

    VALID      there is a page                       MIGRATE    it is to be moved; behind `pages` it was
    WRITE      it may be written                     COMPOUND   it moves with all of its huge page

The kernel gives only the first page of a huge one that moves as one its words; here all have theirs, and
`Migration.arrays` says it the kernel's way.

**Source**: Linux include/linux/migrate.h; MIGRATE_PFN_COMPOUND and MIGRATE_VMA_SELECT_COMPOUND as of 7.0.

**Invariants**: COMPOUND stands in the words of whole blocks.

**Absent**: what is done with them (migrate.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntFlag

import numpy as np
import numpy.typing as npt

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.events import Cause
from hmm.migration_entries import range_of
from hmm.units import (
    PMD_MASK,
    PMD_PAGES,
    AddressRange,
    DeviceId,
    Entries,
    MirrorId,
    Pfns,
    all_but,
    page_numbers,
    spans_of,
)
from hmm.vma import Vma

__all__ = [
    "COMPOUND",
    "MIGRATE",
    "NOT_MIGRATE",
    "PFN_SHIFT",
    "VALID",
    "WRITE",
    "Migration",
    "Positions",
    "Select",
    "Selection",
    "migrate_pfn",
    "moving_frames",
    "narrowed",
    "pfns_of",
    "source_words",
]

VALID = 1 << 0
"""There is a page."""
MIGRATE = 1 << 1
"""It is to be moved; behind `pages` it was."""
WRITE = 1 << 3
COMPOUND = 1 << 4
"""It is part of a huge page that moves as one."""
PFN_SHIFT = 6
NOT_MIGRATE = all_but(MIGRATE)
"""All of a word but MIGRATE."""

Positions = npt.NDArray[np.intp]
Selection = Positions | slice
"""Which of some pages: their positions, or a slice of them, which selects without copying."""
# numpy takes arrays without dimensions in half the time of scalars
_SHIFT = np.array(PFN_SHIFT, np.uint64)
_VALID = np.array(VALID, np.uint64)
_ON_ITS_WAY = np.array(VALID | MIGRATE, np.uint64)
_COMPOUND = np.array(COMPOUND, np.uint64)
_HOLE = np.array(MIGRATE, np.uint64)
_MOVES_AS_ONE = np.array(MIGRATE | COMPOUND, np.uint64)
_PTE_WRITE = np.array(cpu_pte.WRITE, np.uint64)
_WRITE_SHIFT = np.array((WRITE // cpu_pte.WRITE).bit_length() - 1, np.uint64)
_NOWHERE = np.empty(0, np.intp)
_INSIDE_BLOCK = np.array(~PMD_MASK, np.uint64)


class Select(IntFlag):
    """MIGRATE_VMA_SELECT_: what of the range is collected, besides holes; COMPOUND: huge pages as such."""

    SYSTEM = 1
    DEVICE_PRIVATE = 2
    DEVICE_COHERENT = 4
    COMPOUND = 8


def migrate_pfn(pfns: Pfns) -> Entries:
    """Destination words of frames."""
    words: Entries = pfns.view(np.uint64) << _SHIFT
    words |= _VALID
    return words


def pfns_of(words: Entries) -> Pfns:
    """int64[n]: the frames of words, 0 where there is none."""
    return (words >> _SHIFT).view(np.int64)


def moving_frames(src: Entries, dst: Entries) -> tuple[Pfns, Pfns]:
    """What whoever chose the destinations has to copy: the frames, and where to, int64[n] each.

    Args:
        src, dst: uint64[n], as a driver has them (`Migration.arrays`); a hole, and what stays, needs no copy.
    """
    both = np.flatnonzero(src & dst & np.uint64(VALID))
    compound = (src[both] & dst[both] & np.uint64(COMPOUND)) != 0
    run = np.arange(PMD_PAGES)
    found = []
    for words in (src, dst):
        pfns = pfns_of(words[both])
        large = (pfns[compound][:, np.newaxis] + run).reshape(-1)
        found.append(np.concatenate((pfns[~compound], large)))
    return found[0], found[1]


def source_words(entries: Entries, pfns: Pfns) -> Entries:
    """Source words of pages that are to be moved, from the entries that map them and their frames."""
    words: Entries = pfns.view(np.uint64) << _SHIFT
    words |= (entries & _PTE_WRITE) << _WRITE_SHIFT
    words |= _ON_ITS_WAY
    return words


def narrowed(which: Selection, mask: npt.NDArray[np.bool_]) -> Positions:
    """Those of some pages, beginning with the first if they are a slice, that `mask`, bool[n], says."""
    return mask.nonzero()[0] if isinstance(which, slice) else which[mask]


@dataclass(slots=True, eq=False)
class Migration:
    """Some pages of one VMA on their way.

    Attributes:
        addresses: uint64[n], ascending.
        owner: the device whose pages are selected, and whose drivers know of the migration.
        initiator: the mirror that asked for it, or that put the pages where they have to come back from.
        src, dst: uint64[n], words.
        starts: where blocks begin, if huge pages may move as such.
        has_holes: whether one of the addresses may have no page, or none that could move, once they are collected.
        failed: the first of the addresses that stays because its copy failed.
        filled: whoever chooses the destinations fills them as well.
    """

    space: AddressSpace
    vma: Vma
    addresses: Entries
    select: Select
    owner: DeviceId
    cause: Cause
    initiator: MirrorId
    src: Entries = field(init=False)
    dst: Entries = field(init=False)
    starts: Positions = field(init=False)
    has_holes: bool = True
    failed: int | None = None
    filled: bool = False

    def __post_init__(self) -> None:
        self.src = np.zeros(self.addresses.size, np.uint64)
        self.dst = np.zeros(self.addresses.size, np.uint64)
        as_one = Select.COMPOUND in self.select
        self.starts = ((self.addresses & _INSIDE_BLOCK) == 0).nonzero()[0] if as_one else _NOWHERE

    @property
    def pages(self) -> Positions:
        """Which of the addresses have a page that is on its way."""
        found: Positions = ((self.src & _ON_ITS_WAY) == _ON_ITS_WAY).nonzero()[0]
        return found

    @property
    def holes(self) -> Positions:
        """Which of the addresses have none and are on their way."""
        found: Positions = ((self.src & _ON_ITS_WAY) == _HOLE).nonzero()[0]
        return found

    @property
    def heads(self) -> Positions:
        """Where huge pages begin that are on their way as one, and holes as large."""
        if not self.starts.size:
            return _NOWHERE
        found: Positions = self.starts[(self.src[self.starts] & _MOVES_AS_ONE) == _MOVES_AS_ONE]
        return found

    def source_pfns(self, which: Selection) -> Pfns:
        """int64[n]: the frames of `src`."""
        return pfns_of(self.src[which])

    def target_pfns(self, which: Selection) -> Pfns:
        """int64[n]: the frames of `dst`; 0 where there is none."""
        return pfns_of(self.dst[which])

    @property
    def spans(self) -> tuple[AddressRange, ...]:
        """The pages as ranges."""
        span = range_of(self.addresses)
        if span is not None:
            return (span,)
        return spans_of(self.addresses)

    def indices(self, which: Selection) -> Pfns:
        """int64[n]: page->index of pages of this VMA."""
        return page_numbers(self.addresses[which]) + self.vma.mapping.delta

    @property
    def vma_now(self) -> Vma | None:
        """The VMA as it is now; None if it is no longer where it was."""
        now, was = self.space.vmas.find(int(self.addresses[0])), self.vma.mapping
        same = now is not None and now.backing is was.backing and now.mapping.delta == was.delta
        return now if same and now is not None and int(self.addresses[-1]) < now.end else None

    @property
    def arrays(self) -> tuple[Entries, Entries]:
        """`src` and `dst` as the kernel's arrays are: of what moves as one only the first word is there."""
        if not self.starts.size:
            return self.src, self.dst
        shown = (self.src & _COMPOUND) == 0
        shown[self.starts] = True
        if np.count_nonzero(shown) == shown.size:
            return self.src, self.dst
        return self.src * shown, self.dst * shown
