"""The reverse map: where pages may be mapped, found by their page offset.

A page does not know its page-table entries.  It knows its offset (page->index), and every VMA that could map it maps
it at that offset: so the candidates are computed, and the entry that stands there says whether it is so.

Private pages are looked for in the VMAs that have an `anon_vma`, in the address spaces that descend from a common
ancestor by fork; pages of a file in all VMAs of that file; merged pages everywhere (ksm.py).

**Source**: Linux mm/rmap.c: rmap_walk_anon(), rmap_walk_file(), vma_address().

**Invariants**: every entry that names a page is at one of the places found for it.

**Absent**: the entries.

Differs: the kernel finds VMAs by their `anon_vma`; here one mapped anew at the offset of a page is a candidate too,
until the caller asks whether both descend from one (`AddressSpace.anon_vma_root`).  VMAs that begin at the same offset
come in the order of their processes, where the kernel takes the order in which they were last inserted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from hmm.address_space import AddressSpace
from hmm.frames import Frames, PageFlag
from hmm.units import PAGE_SHIFT, Entries, Pfns
from hmm.vma import Backing, Vma

__all__ = ["Places", "anonymous_places", "file_places", "merged_places"]


@dataclass(frozen=True, slots=True)
class Places:
    """Where one VMA could map some of the pages asked for.

    Attributes:
        addresses: uint64[n], ascending.
        pages: which of the pages asked for, as an index of their array.
    """

    space: AddressSpace
    vma: Vma
    addresses: Entries
    pages: slice | Pfns


def anonymous_places(spaces: Iterable[AddressSpace], indices: Pfns, backing: Backing | None) -> Iterator[Places]:
    """Where private pages could be mapped.

    Args:
        spaces: relatives of the space that the pages were met in.
        indices: int64[n], page offsets, ascending.
        backing: of the VMA that the pages were met in; None for anonymous memory.

    Cost: O(n) for each VMA that matches.  Of memory of files, and where anonymous memory was moved, O(VMAs) beside it.
    """
    for space in spaces:
        for vma in _at_their_index(space, indices) if backing is None else space.vmas_with_entries:
            if vma.mapping.backing is backing and vma.mapping.anon_vma:
                yield from _in_vma(space, vma, indices)


def file_places(spaces: Iterable[AddressSpace], indices: Pfns, backing: Backing) -> Iterator[Places]:
    """Where pages of a file could be mapped.

    Args:
        spaces: those with VMAs that map the file.
        indices: int64[n], page offsets in the file, ascending.

    Cost: O(VMAs), and O(n) for each that matches.
    """
    for space in spaces:
        for vma in space.vmas_with_entries:
            if vma.mapping.backing is backing:
                yield from _in_vma(space, vma, indices)


def merged_places(frames: Frames, pfns: Pfns) -> Iterator[Places]:
    """Where those pages are mapped that page merging gave to processes which are not related.

    Cost: nothing without such pages, else O(everything mapped).
    """
    if frames.ksm_places is not None and frames.test_flags(pfns, PageFlag.KSM).any():
        yield from frames.ksm_places(pfns)


def _at_their_index(space: AddressSpace, indices: Pfns) -> list[Vma]:
    """All VMAs with anonymous memory of these offsets, ascending, and others."""
    if space.vmas.moved or space.detached or not indices.size:
        return space.vmas_with_entries
    return space.vmas.between(int(indices[0]) << PAGE_SHIFT, int(indices[-1]) + 1 << PAGE_SHIFT)


def _in_vma(space: AddressSpace, vma: Vma, indices: Pfns) -> Iterator[Places]:
    first, low, high = vma.page_offset(vma.start), 0, indices.size
    end = first + vma.npages
    if not high or end <= indices[0] or indices[-1] < first:
        return
    if indices[0] < first or end <= indices[-1]:
        low, high = np.searchsorted(indices, (first, end)).tolist()
    if low < high:
        addresses = (indices[low:high] - vma.mapping.delta) << PAGE_SHIFT
        yield Places(space, vma, addresses.view(np.uint64), slice(low, high))
