"""The reverse map: where pages may be mapped, found by their page offset.

A page does not know its page-table entries.  It knows its offset (page->index), and every VMA that could map it maps
it at that offset: so the candidates are computed, and the entry that stands there says whether it is so.

Private pages are looked for in the VMAs that have an `anon_vma`, in the address spaces that descend from a common
ancestor by fork; pages of a file in all VMAs of that file; merged pages everywhere (ksm.py).

The order in which they are visited is that of an interval tree: by the page offset at which a VMA begins, those alike
as they were last inserted (`Vma.inserted`, `Vma.chained`).  Whoever changes a VMA's extent inserts it anew; a child's
VMA comes directly behind its parent's among those of a file, and last among those with private pages.

**Source**: Linux mm/rmap.c: rmap_walk_anon(), rmap_walk_file(), vma_address(); mm/interval_tree.c; mm/vma.c,
vma_prepare(), vma_complete(); kernel/fork.c, dup_mmap().

**Invariants**: every entry that names a page is at one of the places found for it.

**Absent**: the entries.

Differs: the kernel finds VMAs by their `anon_vma`; here all that descend from the oldest ancestor of the page's are
candidates, in those spaces that have come from the one that made the page (`AddressSpace.may_map`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hmm.address_space import AddressSpace
from hmm.anon_vma import AnonVma
from hmm.frames import Frames, PageFlag
from hmm.units import PAGE_SHIFT, Entries, Pfns
from hmm.vma import Backing, Vma

__all__ = ["Places", "anonymous_places", "file_places", "in_walk_order", "merged_places", "walk_order"]


class Places(NamedTuple):
    """Where one VMA could map some of the pages asked for.

    Attributes:
        addresses: uint64[n], ascending.
        pages: which of the pages asked for, as an index of their array.
        of_file: whether it is for pages of the VMA's file, not for private ones.
    """

    space: AddressSpace
    vma: Vma
    addresses: Entries
    pages: slice | Pfns
    of_file: bool = False

    def which(self, mask: npt.NDArray[np.bool_]) -> Places:
        """Those that `mask`, bool[n], says."""
        pages = np.flatnonzero(mask) + self.pages.start if isinstance(self.pages, slice) else self.pages[mask]
        return Places(self.space, self.vma, self.addresses[mask], pages, self.of_file)


def walk_order(space: AddressSpace, vma: Vma, *, of_file: bool = False) -> tuple[int, ...]:
    """Where a VMA is in the tree of its file's VMAs, or in those of its private pages, as a key to sort by.

    Source: Linux mm/interval_tree.c, vma_interval_tree_insert(), vma_interval_tree_insert_after(): of a parent's
    children the youngest is the nearest.
    """
    first = vma.page_offset(vma.start)
    if not of_file:
        return first, vma.chained, vma.start
    return first, vma.inserted, vma.start, *(-number for number in space.lineage)


def in_walk_order(places: Iterable[Places]) -> list[Places]:
    """The places as the kernel's walks over the reverse map come to them, those of private pages first."""
    return sorted(places, key=lambda place: (place.of_file, walk_order(place.space, place.vma, of_file=place.of_file)))


def anonymous_places(
    spaces: Iterable[AddressSpace], indices: Pfns, backing: Backing | None, root: AnonVma | None = None
) -> Iterator[Places]:
    """Where private pages could be mapped.

    Args:
        spaces: relatives of the space that the pages were met in.
        indices: int64[n], page offsets, ascending.
        backing: of the VMA that the pages were met in; None for anonymous memory.
        root: of that VMA's `anon_vma` (`AddressSpace.anon_vma_root`); None if unknown: then one that was mapped anew at
            a page's offset is among the places too.

    Cost: O(n) for each VMA that matches.  Of memory of files, and where anonymous memory was moved, O(VMAs) beside it.
    """
    for space in spaces:
        for vma in _at_their_index(space, indices) if backing is None else space.vmas_with_entries:
            family = vma.mapping.anon_vma
            if vma.mapping.backing is backing and family and root in (None, space.anon_vma_root(family)):
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
                yield from _in_vma(space, vma, indices, of_file=True)


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


def _in_vma(space: AddressSpace, vma: Vma, indices: Pfns, *, of_file: bool = False) -> Iterator[Places]:
    first, low, high = vma.page_offset(vma.start), 0, indices.size
    end = first + vma.npages
    if not high or end <= indices[0] or indices[-1] < first:
        return
    if indices[0] < first or end <= indices[-1]:
        low, high = np.searchsorted(indices, (first, end)).tolist()
    if low < high:
        addresses = (indices[low:high] - vma.mapping.delta) << PAGE_SHIFT
        yield Places(space, vma, addresses.view(np.uint64), slice(low, high), of_file)
