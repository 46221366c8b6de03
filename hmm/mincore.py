"""mincore: which pages of a range are in memory.

A page counts when a touch of it needs no contents from elsewhere: it is mapped, or on a device, or in the page cache
of the file that is mapped there, or in the swap cache.

**Source**: Linux mm/mincore.c (mincore_pte_range(), mincore_hugetlb(), __mincore_unmapped_range()), 6.12.

**Invariants**: nothing changes.

**Absent**: the answer for files that the caller does not own.
"""

from __future__ import annotations

import errno as errnos

import numpy as np
import numpy.typing as npt

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.errors import BadAddressError, InvalidRequestError
from hmm.file import FILE_SIZE_MAX, File
from hmm.huge_split import has_directory
from hmm.operation import Operation, Pause
from hmm.swap import area_of, slots_of
from hmm.units import (
    PAGE_SHIFT,
    PIECE_BYTES,
    PMD_MASK,
    PMD_PAGES,
    PMD_SIZE,
    TASK_SIZE,
    Address,
    AddressRange,
    is_page_aligned,
    page_up,
)
from hmm.vma import Vma, VmFlag

__all__ = ["mincore"]


def mincore(space: AddressSpace, start: Address, length: int) -> Operation[npt.NDArray[np.uint8]]:
    """Tell which pages are resident.

    Args:
        start: page-aligned.
        length: bytes, rounded up to pages.

    Returns: uint8[npages], 1 for a resident page.

    Raises:
        InvalidRequestError: a start within a page (EINVAL).
        BadAddressError: a part is not mapped, or outside the address space (ENOMEM).

    Cost: O(npages), vectorised.
    """
    if not is_page_aligned(start):
        raise InvalidRequestError(f"mincore: {start:#x} is not the start of a page", address=start)
    end = start + page_up(length)
    if end > TASK_SIZE:
        raise BadAddressError(f"mincore: {end:#x} is outside the address space", errnos.ENOMEM, address=start)
    resident = np.zeros((end - start) >> PAGE_SHIFT, np.uint8)
    for at in range(start, end, PIECE_BYTES):
        if at != start:
            yield Pause()
        span = AddressRange(at, min(at + PIECE_BYTES, end))
        hole = space.vmas.first_hole(span)
        if hole is not None:
            raise BadAddressError(f"mincore: nothing is mapped at {hole.start:#x}", errnos.ENOMEM, address=hole.start)
        for piece in space.vmas.mapped_pieces(span):
            first = (piece.start - start) >> PAGE_SHIFT
            resident[first : first + piece.npages] = _resident(space, piece)
    return resident


def _resident(space: AddressSpace, piece: Vma) -> npt.NDArray[np.bool_]:
    entries = space.table.read(piece.start, piece.end)
    found: npt.NDArray[np.bool_] = entries != 0
    swapped = cpu_pte.is_swap(entries)
    if swapped.any():
        found[swapped] = area_of(space.frames).cached[slots_of(entries)] != 0
    if isinstance(piece.backing, File):
        shift = piece.mapping.delta << PAGE_SHIFT
        first, stop = piece.start + shift, min(piece.end + shift, FILE_SIZE_MAX)
        if first < stop:
            unmapped = entries[: (stop - first) >> PAGE_SHIFT] == 0  # the file is not asked for private pages in swap
            if piece.has(VmFlag.HUGETLB):
                unmapped &= ~_have_entries(space, piece)[: unmapped.size]
            found[: unmapped.size] |= unmapped & cpu_pte.is_present(piece.backing.pages.read(first, stop))
    return found


def _have_entries(space: AddressSpace, piece: Vma) -> npt.NDArray[np.bool_]:
    """bool[n]: which pages of hugetlb memory have an entry, if an empty one, which says that they are not resident.

    Source: Linux mm/pagewalk.c, walk_hugetlb_range(); mm/hugetlb.c, huge_pte_offset().
    """
    blocks = range(piece.start & PMD_MASK, piece.end, PMD_SIZE)
    have = np.repeat([has_directory(space, start) for start in blocks], PMD_PAGES)
    before = (piece.start & ~PMD_MASK) >> PAGE_SHIFT
    return have[before : before + piece.npages]
