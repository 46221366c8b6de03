"""Huge pages of files: large folios in a page cache, where they are mapped, and how they become small pages again.

A collapse makes one (collapse_file.py); from then on whoever touches its block first maps it by a huge entry, where
the mapping lies so that it can.  No entry of a file's page need be kept, as a touch finds the page again: a mapping
that is to be split is dropped (`AddressSpace.split_huge_pmd`), and so are all when the folio itself is.

**Source**: Linux mm/huge_memory.c (split_huge_page_to_list_to_order(), unmap_folio(), __split_huge_page()), mm/rmap.c
(try_to_unmap_one()), 6.12.

**Invariants** (`File.check`): a large folio in a page cache is whole and aligned, and its pages are in order.

**Absent**: files that are no shared memory, as without CONFIG_READ_ONLY_THP_FOR_FS; huge pages at a first touch, as
with shmem_enabled=never.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from hmm import cpu_pte
from hmm.events import Cause
from hmm.file import FILE_SIZE_MAX, File
from hmm.frames import PageFlag
from hmm.operation import Operation
from hmm.rmap import Places, file_places, in_walk_order
from hmm.spans import union
from hmm.units import (
    PAGE_SHIFT,
    PAGE_SIZE,
    PMD_MASK,
    PMD_PAGES,
    PMD_SIZE,
    Address,
    AddressRange,
    Entries,
    Pfn,
    Pfns,
    SpaceId,
    page_up,
)
from hmm.vma import Vma

__all__ = [
    "Told",
    "can_split",
    "covers",
    "fits",
    "folio_at",
    "is_folio_at",
    "large_folios",
    "mapped_places",
    "naming",
    "split_file_folio",
    "tell_everywhere",
    "unmap_place",
]

Told: TypeAlias = dict[SpaceId, tuple[AddressRange, ...]]
"""What each address space has been told of."""
_Mask = npt.NDArray[np.bool_]


def folio_at(file: File, offset: int) -> Pfns | None:
    """The large folio that holds the page at an offset in bytes: int64[PMD_PAGES]; None where there is none."""
    if not file.huge or offset >= FILE_SIZE_MAX:
        return None
    entry = file.pages.get(offset)
    pfn = cpu_pte.cpu_pfn(entry)
    if not cpu_pte.is_present(entry) or not file.frames.flags_of(pfn) & PageFlag.COMPOUND:
        return None
    head: Pfn = pfn // PMD_PAGES * PMD_PAGES
    return np.arange(head, head + PMD_PAGES)


def is_folio_at(file: File, offset: int, folio: Pfns) -> bool:
    """Whether a certain large folio holds the page at an offset, still or already."""
    now = folio_at(file, offset)
    return now is not None and bool(now[0] == folio[0])


def large_folios(file: File) -> Iterator[tuple[int, Pfns]]:
    """The large folios of a page cache, each with its offset in bytes, ascending.  Cost: O(pages of the cache)."""
    if file.huge:
        offsets, _ = file.pages.valid(0, FILE_SIZE_MAX)
        for offset in offsets[offsets & np.uint64(PMD_SIZE - 1) == 0].tolist():
            folio = folio_at(file, offset)
            if folio is not None:
                yield offset, folio


def fits(vma: Vma, start: Address) -> bool:
    """Whether a VMA can map a huge page of its file at `start`, aligned: thp_vma_suitable_order()."""
    return not vma.mapping.delta % PMD_PAGES and vma.start <= start and start + PMD_SIZE <= vma.end


# ---- where it is mapped


def naming(place: Places, pfns: Pfns) -> _Mask:
    """bool[n]: which entries of a place name the frames of its pages; `pfns`: of all pages, 0 for none."""
    entries = place.space.table.lookup(place.addresses)
    found: _Mask = cpu_pte.holds_frame(entries) & (cpu_pte.cpu_pfn(entries) == pfns[place.pages])
    return found


def mapped_places(file: File, offset: int, pfns: Pfns) -> list[tuple[Places, _Mask]]:
    """Where the pages of a block could be mapped, in the order of the reverse map.

    Args:
        offset: of the block, in bytes.
        pfns: int64[PMD_PAGES], the frames of its pages, 0 for none.

    Returns: with each place bool[n], which of its pages are mapped there or in a later one: a walk for a page ends when
        that is mapped nowhere any more.

    Source: Linux mm/rmap.c, rmap_walk_file(), try_to_unmap() with folio_not_mapped().
    """
    indices = np.arange(PMD_PAGES) + (offset >> PAGE_SHIFT)
    later, found = np.zeros(PMD_PAGES, np.bool_), []
    for place in reversed(in_walk_order(file_places(file.mapping_spaces(), indices, file))):
        later[place.pages] |= naming(place, pfns)
        found.append((place, later[place.pages].copy()))
    return found[::-1]


def unmap_place(place: Places, pfns: Pfns) -> None:
    """Drop the entries of a place that name the frames of its pages; page tables stay: try_to_unmap_one().

    Args:
        pfns: as for `naming`; whoever calls it has told the mirrors of the place.
    """
    space, mine = place.space, naming(place, pfns)
    addresses = place.addresses[mine]
    if not addresses.size:
        return
    space.keep_tables(int(addresses[0]), int(addresses[-1]) + PAGE_SIZE)
    entries = space.table.clear_many(addresses)
    space.frames.set_flags(cpu_pte.cpu_pfn(cpu_pte.having(entries, cpu_pte.DIRTY)), PageFlag.DIRTY)
    space.frames.unmap(cpu_pte.cpu_pfn(entries))


def tell_everywhere(
    file: File, brackets: ExitStack, cause: Cause, untold: Callable[[Told], Mapping[SpaceId, tuple[AddressRange, ...]]]
) -> Operation[None]:
    """Tell all address spaces that map a file, before one of them is changed.

    Args:
        brackets: holds the invalidations.
        untold: says what is still to be told, given what was; while some are told, pages may be mapped or moved.
    """
    told: Told = {}
    while new := untold(told):
        for space_id, spans in new.items():
            space = file.mappers.get(space_id)
            if space is None:  # it unmapped the file while another space was being told
                continue
            told[space_id] = told.get(space_id, ()) + spans
            invalidation = brackets.enter_context(space.notifier.invalidation(union(spans), cause))
            yield from invalidation.deliver()


def covers(told: tuple[AddressRange, ...], span: AddressRange) -> bool:
    """Whether a range lies in one that was told."""
    return any(one.start <= span.start and span.end <= one.end for one in told)


# ---- in pieces


def split_file_folio(file: File, offset: int, *, hold: Pfn = 0) -> Operation[bool]:
    """Make small pages of the large folio that holds the page at an offset; nobody maps them then.

    Pages behind the end of the file go.

    Args:
        hold: a page that the caller refers to: that reference is counted when the folio was split; 0 for none.

    Returns: False, and nothing was changed, when somebody refers to it, or it is none.

    Raises: TimedOutError: a mirror with policy FAIL did not answer; nothing was changed.

    Cost: O(VMAs of the spaces that map the file).
    """
    folio, start = folio_at(file, offset), offset & PMD_MASK
    if folio is None or not can_split(file, offset):
        return False
    with ExitStack() as brackets:
        yield from tell_everywhere(file, brackets, Cause.HUGE_PAGE_SPLIT, partial(_untold, file, start, folio))
        if not is_folio_at(file, start, folio) or not can_split(file, offset):
            return False
        if hold:
            file.frames.get(np.array([hold]))
        for place, _ in mapped_places(file, start, folio):
            unmap_place(place, folio)
        file.frames.clear_flags(folio, PageFlag.COMPOUND)
        behind = max(start, page_up(file.size_bytes))
        if behind < start + PMD_SIZE:
            file.drop_pages(behind, start + PMD_SIZE)
    return True


def can_split(file: File, offset: int) -> bool:
    """Whether a large folio is there, and nobody but the cache and page-table entries refers to it: can_split_folio().

    Nor may a call have it locked.
    """
    frames, folio = file.frames, folio_at(file, offset)
    if folio is None:
        return False
    alone = (frames.refcount[folio] == frames.mapcount[folio] + 1) & ~frames.locks.are_locked(folio)
    return bool(alone.all())


def _untold(file: File, start: int, folio: Pfns, told: Told) -> Told:
    new: Told = {}
    for place, mapped in mapped_places(file, start, folio):
        span = _span_of(place.addresses)
        if mapped.any() and not covers(told.get(place.space.id, ()), span):
            new[place.space.id] = (*new.get(place.space.id, ()), span)
    return new


def _span_of(addresses: Entries) -> AddressRange:
    return AddressRange(int(addresses[0]), int(addresses[-1]) + PAGE_SIZE)
