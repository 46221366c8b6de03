"""Large folios: PMD_PAGES frames that were allocated as one, and are dealt with as one until they are split.

A frame knows that it belongs to one (`PageFlag.COMPOUND`); which one follows from its number, as the run is naturally
aligned.  Frames that nobody maps any more leave their folio at once, so it may have fewer members than it began with.

**Source**: Linux include/linux/mm.h (folio_likely_mapped_shared(), folio_maybe_dma_pinned()), mm/huge_memory.c
(can_split_folio()), 6.12.

**Invariants**: the members of a folio are private pages, or pages of one file.

**Absent**: who maps a folio, and how it is split (huge_split.py); folios of other sizes.

Differs: a mapping by a huge entry counts as one of each frame, where the kernel counts it once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hmm.ascending import unique
from hmm.frames import Frames, PageFlag
from hmm.units import PMD_PAGES, Pfn, Pfns

__all__ = [
    "are_compound",
    "are_pinned",
    "belong_to",
    "can_split",
    "heads_of",
    "likely_mapped_shared",
    "members",
    "with_folios",
]


def are_compound(frames: Frames, pfns: Pfns) -> npt.NDArray[np.bool_]:
    """Which frames are part of a large folio: bool[n]."""
    return frames.test_flags(pfns, PageFlag.COMPOUND)


def heads_of(frames: Frames, pfns: Pfns) -> list[Pfn]:
    """The first frame numbers of the large folios that some of the frames belong to, ascending."""
    compound = pfns[are_compound(frames, pfns)]
    heads: list[Pfn] = unique(compound // PMD_PAGES * PMD_PAGES).tolist()
    return heads


def belong_to(frames: Frames, pfns: Pfns, head: Pfn) -> npt.NDArray[np.bool_]:
    """Which frames are part of a folio: bool[n].  Small pages may have taken frames that it let go of."""
    return are_compound(frames, pfns) & (pfns >= head) & (pfns < head + PMD_PAGES)


def members(frames: Frames, head: Pfn) -> Pfns:
    """The frames that are still part of a folio: int64[n], ascending."""
    run = np.arange(head, head + PMD_PAGES)
    return run[are_compound(frames, run)]


def with_folios(frames: Frames, pfns: Pfns) -> Pfns:
    """The frames, and all others of the large folios that some of them belong to: int64[n], ascending and unique."""
    large = pfns[are_compound(frames, pfns)]
    if not large.size:
        return unique(pfns)
    runs = (unique(large // PMD_PAGES) * PMD_PAGES)[:, np.newaxis] + np.arange(PMD_PAGES)
    others: Pfns = runs.reshape(-1)
    return unique(np.concatenate((pfns, others[are_compound(frames, others)])))


def are_pinned(frames: Frames, pfns: Pfns) -> npt.NDArray[np.bool_]:
    """Which frames are pinned, themselves or with the folio that they are part of: folio_maybe_dma_pinned()."""
    pinned: npt.NDArray[np.bool_] = frames.pincount[pfns] > 0
    for head in heads_of(frames, pfns):
        if frames.pincount[members(frames, head)].any():
            pinned |= belong_to(frames, pfns, head)
    return pinned


def can_split(frames: Frames, head: Pfn) -> bool:
    """Whether nobody refers to a folio but page-table entries: can_split_folio()."""
    pfns = members(frames, head)
    return bool(pfns.size) and bool((frames.refcount[pfns] == frames.mapcount[pfns]).all())


def likely_mapped_shared(frames: Frames, head: Pfn) -> bool:
    """folio_likely_mapped_shared(): a guess from the first page unless the counts say it."""
    pfns = members(frames, head)
    total = int(frames.mapcount[pfns].sum())
    if total <= 1:
        return False
    return total > PMD_PAGES or (int(pfns[0]) == head and int(frames.mapcount[head]) > 1)
