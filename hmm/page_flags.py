"""The flags of a frame.

**Source**: Linux include/linux/page-flags.h; mm/swap.c, folio_mark_accessed(); mm/migrate.c, folio_migrate_flags().

**Absent**: which frame has which (frames.py).
"""

from __future__ import annotations

from enum import IntFlag
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["MOVES", "Flags", "PageFlag", "accessed", "accessed_word", "flag_word"]

Flags: TypeAlias = npt.NDArray[np.uint16]


class PageFlag(IntFlag):
    """State of a frame; the kernel's PG_ names, whose bits depend on its configuration.

    `ANON` is PageAnon(), which the kernel keeps in a bit of page->mapping.  `COMPOUND` is PageCompound(): the frame is
    part of a large folio of PMD_PAGES frames; `large_folio.py` knows which.  `HUGETLB` is PageHuge(), `KSM` PageKsm():
    ksm.py has merged equal pages into it.
    """

    NONE = 0
    REFERENCED = 1 << 1
    DIRTY = 1 << 2
    LRU = 1 << 3
    ACTIVE = 1 << 4
    ANON = 1 << 5
    ANON_EXCLUSIVE = 1 << 6
    SWAPBACKED = 1 << 7
    HWPOISON = 1 << 8
    KSM = 1 << 10
    COMPOUND = 1 << 12
    HUGETLB = 1 << 13


_REFERENCED, _ACTIVE = np.uint16(PageFlag.REFERENCED), np.uint16(PageFlag.ACTIVE)
_USED = np.array((0, _REFERENCED, _ACTIVE, _REFERENCED | _ACTIVE), np.uint16)
"""The flags of a page that was used so often."""
_TWICE = np.uint8(2)
MOVES: Flags = np.array(
    PageFlag.ANON
    | PageFlag.ANON_EXCLUSIVE
    | PageFlag.SWAPBACKED
    | PageFlag.DIRTY
    | PageFlag.KSM
    | PageFlag.COMPOUND
    | PageFlag.REFERENCED
    | PageFlag.ACTIVE,
    np.uint16,
)
"""The flags that go with a page when it changes frames: folio_migrate_flags(), folio_migrate_mapping()."""


def accessed(flags: Flags, times: int, dirty: bool, unevictable: bool) -> Flags:
    """Flags of pages after they were used so often; see `Frames.mark_accessed`.

    Returns: uint16[n].
    """
    uses = ((flags & _REFERENCED) != 0) + _TWICE * ((flags & _ACTIVE) != 0)
    uses = np.maximum(uses, min(times, 1)) if unevictable else np.minimum(uses + min(times, 3), 3)
    unused = flags & ~(_REFERENCED | _ACTIVE)
    if dirty:
        unused |= np.uint16(PageFlag.DIRTY)
    used: Flags = unused | _USED[uses]
    return used


@lru_cache(maxsize=64)
def accessed_word(flags: int, times: int, dirty: bool, unevictable: bool) -> Flags:
    """`accessed` of one word, which numpy stores everywhere faster than a Python integer."""
    return flag_word(int(accessed(flag_word(flags), times, dirty, unevictable)))


@lru_cache(maxsize=64)
def flag_word(flags: int) -> Flags:
    """uint16 without dimensions, which numpy stores faster than a Python integer."""
    return np.array(flags, np.uint16)
