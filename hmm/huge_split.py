"""Huge pages in pieces: the mapping of one (a block), or the page itself (a folio), in every page table.

    split_pmds     a block is mapped by page entries from now on; the page stays one      __split_huge_pmd()
    cut            the same where VMAs are about to be cut inside a block                 vma_adjust_trans_huge()
    split_folio    the page becomes small ones, wherever it is mapped                     split_folio()

Mirrors hear of all of it: they may map the block as one.  Of a cut they hear today even where nothing huge is mapped.

**Source**: Linux mm/huge_memory.c, mm/migrate.c (try_to_map_unused_to_zeropage()), 6.12.

**Invariants**: those of large_folio.py; an entry keeps its frame and permission, but for the pages of a split folio
that hold nothing but zeroes: they become the zero page, unless they are in a device's private memory.  Entries of pages
of files go.

**Absent**: splitting in the background, when memory runs out; what becomes of folios of files (file_folio.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.ascending import unique
from hmm.events import Cause
from hmm.file import File
from hmm.file_folio import split_file_folio
from hmm.frames import ZERO_PFN, PageFlag
from hmm.large_folio import are_compound, can_split, members
from hmm.operation import Operation
from hmm.rmap import Places, anonymous_places, in_walk_order
from hmm.units import (
    PAGE_SHIFT,
    PMD_MASK,
    PMD_PAGES,
    PMD_SHIFT,
    PMD_SIZE,
    PUD_SHIFT,
    PUD_SIZE,
    TASK_SIZE,
    Address,
    AddressRange,
    Entries,
    Pfn,
    Pfns,
    all_but,
    page_numbers,
    pmd_up,
    spans_of_pages,
)
from hmm.vma import Vma, VmFlag
from hmm.zone_device import are_private

__all__ = [
    "block_of",
    "cut",
    "folio_places",
    "has_directory",
    "huge_blocks",
    "keep_small",
    "ours",
    "split_folio",
    "split_pmds",
    "whole_blocks",
]

_NOT_HUGE = all_but(cpu_pte.HUGE)
_NOT_EXCLUSIVE = all_but(cpu_pte.EXCLUSIVE | cpu_pte.WRITE)
_HUGETLB = int(PageFlag.HUGETLB)
_SOFT_DIRTY = np.uint64(cpu_pte.SOFT_DIRTY)
_ZERO_PAGE = np.uint64(cpu_pte.cpu_entry(ZERO_PFN, cpu_pte.PRESENT | cpu_pte.ACCESSED | cpu_pte.SPECIAL))


def block_of(address: Address) -> AddressRange:
    """The aligned 2 MiB that hold an address."""
    return AddressRange(address & PMD_MASK, (address & PMD_MASK) + PMD_SIZE)


def whole_blocks(span: AddressRange) -> tuple[Address, Address]:
    """Start and end of the blocks that share a byte with `span`: a block's page table is of all VMAs in it."""
    return span.start & PMD_MASK, min(pmd_up(span.end), TASK_SIZE)


def huge_blocks(space: AddressSpace, span: AddressRange) -> list[AddressRange]:
    """The blocks that share a byte with `span` and are mapped by a huge page that may be split, ascending.

    Those of hugetlb memory may not.  Cost: O(blocks).
    """
    if not space.huge:
        return []
    starts = range(span.start & PMD_MASK, span.end, PMD_SIZE)
    return [block_of(start) for start in starts if _may_split(space, start)]


def _may_split(space: AddressSpace, start: Address) -> bool:
    entry = space.table.get(start)
    return bool(entry & cpu_pte.HUGE) and not space.frames.flags_of(cpu_pte.cpu_pfn(entry)) & _HUGETLB


def split_pmds(space: AddressSpace, blocks: Iterable[AddressRange]) -> Operation[None]:
    """Map blocks by page entries after the mirrors were told; those that are not huge (any more) are left out."""
    spans = tuple(block for block in blocks if _may_split(space, block.start))
    if not spans:
        return
    with space.notifier.invalidation(spans, Cause.HUGE_PAGE_SPLIT) as bracket:
        yield from bracket.deliver()
        for block in spans:
            space.split_huge_pmd(block.start)


def keep_small(space: AddressSpace, blocks: Iterable[AddressRange]) -> None:
    """Give blocks that were split page tables, empty where that was a file's huge page, so that none comes again.

    Source: Linux mm/gup.c, follow_pmd_mask() with FOLL_SPLIT_PMD.
    """
    space.tables.update(block.start >> PMD_SHIFT for block in blocks)


def cut(space: AddressSpace, pieces: Iterable[Vma]) -> Operation[bool]:
    """Prepare for cutting `pieces` out of the VMAs that they are parts of.

    Args:
        pieces: ascending.

    Returns: whether it may have waited, and what was known of the VMAs is out of date.

    Cost: O(pieces); nothing where nobody listens and nothing is huge.
    """
    if not space.huge and not space.notifier.subscribers:
        return False
    blocks = [block_of(start) for start in sorted(set(_blocks_cut(space, pieces)))]
    if not blocks:
        return False
    if space.huge:
        yield from split_pmds(space, blocks)
    populated = tuple(block for block in blocks if has_directory(space, block.start))
    if populated:
        with space.notifier.invalidation(populated, Cause.VMA_CUT) as bracket:
            yield from bracket.deliver()
    for block in blocks:  # one that was empty may have got a huge page meanwhile
        space.split_huge_pmd(block.start)
    return True


def _blocks_cut(space: AddressSpace, pieces: Iterable[Vma]) -> Iterator[Address]:
    # As split_huge_pmd_if_needed(): inside a block that lies in one VMA; hugetlb's may_split() refuses that before.
    for piece in pieces:
        whole = space.vmas.find(piece.start)
        assert whole is not None
        if whole.has(VmFlag.HUGETLB):
            continue
        for edge in (piece.start, piece.end):
            start = edge & PMD_MASK
            if start != edge and whole.start <= start and start + PMD_SIZE <= whole.end:
                yield start


def has_directory(space: AddressSpace, address: Address) -> bool:
    """Whether the 1 GiB of an address has a directory, where mm_find_pmd() finds a block's entry, empty or not."""
    start = address & -PUD_SIZE
    if start >> PUD_SHIFT in space.directories:
        return True
    if space.table.holds(start, min(start + PUD_SIZE, TASK_SIZE)):
        return True
    return any(number << PMD_SHIFT & -PUD_SIZE == start for number in space.tables)


# ---- folios


def folio_places(space: AddressSpace, vma: Vma, head: Pfn, index: int) -> list[Places]:
    """Where a folio could be mapped, in the order of the reverse map, up to the last place where it is.

    Args:
        space, vma: where it was met.
        index: page offset of its first page.

    Source: Linux mm/rmap.c, rmap_walk_anon() that ends when folio_not_mapped().
    """
    relatives = space.relatives.values()
    pfns = np.arange(head, head + PMD_PAGES)
    root = space.anon_vma_root(vma.anon_vma)
    places = in_walk_order(anonymous_places(relatives, np.arange(index, index + PMD_PAGES), vma.backing, root))
    places = [place for place in places if place.space.may_map(pfns[place.pages]).any()]
    while places and not ours(places[-1], head)[1].any():
        places.pop()
    return places


def ours(place: Places, head: Pfn) -> tuple[Entries, npt.NDArray[np.bool_]]:
    """The entries of one place, and bool[n], which of them name a page of the folio."""
    entries = place.space.table.lookup(place.addresses)
    pfns = np.arange(head, head + PMD_PAGES)[place.pages]
    naming: npt.NDArray[np.bool_] = cpu_pte.holds_frame(entries) & (cpu_pte.cpu_pfn(entries) == pfns)
    return entries, naming & are_compound(place.space.frames, pfns)


def split_folio(
    space: AddressSpace, address: Address, *, hold: bool = False, lost: bool = False, goes_out: bool = False
) -> Operation[bool]:
    """Make small pages of the large folio that is mapped at `address`, in all address spaces.

    Args:
        hold: the caller refers to the page at `address`: that reference is counted when the folio was split.
        lost: the page at `address` has lost its contents: it does not become the zero page.
        goes_out: to swap, where the kernel puts the folio as it is: no page becomes the zero page.

    Returns: False, and nothing was changed, when somebody holds a reference, or it is not there (any more).

    Raises: TimedOutError: a mirror with policy FAIL did not answer; nothing was changed.

    Cost: that of reading 2 MiB; O(VMAs).  Source: Linux mm/huge_memory.c, split_huge_page_to_list_to_order().
    """
    frames, folio = space.frames, _folio_at(space, address)
    if folio is None:
        return False
    vma, head, index = folio
    page = cpu_pte.cpu_pfn(space.table.get(address))
    if isinstance(vma.backing, File) and not frames.flags_of(page) & PageFlag.ANON:
        return (yield from split_file_folio(vma.backing, index << PAGE_SHIFT, hold=page if hold else 0))
    places = folio_places(space, vma, head, index)
    if not _can_split(space, places, head):
        return False
    with ExitStack() as brackets:
        for relative, spans in _concerned(places):
            yield from brackets.enter_context(relative.notifier.invalidation(spans, Cause.HUGE_PAGE_SPLIT)).deliver()
        now = _folio_at(space, address)
        if now is None or now[1:] != (head, index):  # others may have its frames
            return False
        places = folio_places(space, now[0], head, index)
        if not _can_split(space, places, head):
            return False
        pfns = members(frames, head)
        zero = np.zeros(PMD_PAGES, np.bool_)
        if not goes_out and not are_private(frames, pfns[:1]).any():
            zero[pfns - head] = frames.are_zero(pfns)
        if frames.poisoned:
            zero[pfns - head] &= ~frames.test_flags(pfns, PageFlag.HWPOISON)
        page = cpu_pte.cpu_pfn(space.table.get(address))
        zero[page - head] &= not lost
        if hold:
            frames.get(np.array([page]))
        gone = [(place.space, _remap(place, head, zero)) for place in places]
        frames.clear_flags(pfns, PageFlag.COMPOUND)
        for one, entries in gone:
            one.drop(entries)
    return True


def _folio_at(space: AddressSpace, address: Address) -> tuple[Vma, Pfn, int] | None:
    """The large folio that is mapped at an address: where, its first frame, and the page offset of that."""
    vma, entry = space.vmas.find(address), space.table.get(address)
    pfn = cpu_pte.cpu_pfn(entry)
    if vma is None or not cpu_pte.holds_frame(entry) or not space.frames.flags_of(pfn) & PageFlag.COMPOUND:
        return None
    head = pfn // PMD_PAGES * PMD_PAGES
    return vma, head, vma.page_offset(address) - (pfn - head)


def _can_split(space: AddressSpace, places: list[Places], head: Pfn) -> bool:
    if not can_split(space.frames, head):
        return False
    # What a device has to itself is referenced and not mapped, in 6.12.
    return not space.semantics.exclusive_ranges or not any(
        (cpu_pte.is_device_exclusive(entries) & own).any() for entries, own in (ours(p, head) for p in places)
    )


def _concerned(places: list[Places]) -> list[tuple[AddressSpace, tuple[AddressRange, ...]]]:
    """Whom try_to_migrate() tells of what: every VMA where the folio could be, and the block that its start lies in."""
    told: dict[int, tuple[AddressSpace, list[Pfns]]] = {}
    for place in places:
        pages = page_numbers(place.addresses)
        block = np.arange(PMD_PAGES) + (int(pages[0]) & -PMD_PAGES)
        told.setdefault(place.space.id, (place.space, []))[1].extend((pages, block))
    return [(one, spans_of_pages(unique(np.concatenate(parts)))) for one, parts in told.values()]


def _remap(place: Places, head: Pfn, zero: npt.NDArray[np.bool_]) -> Entries:
    """remap_page() for one VMA: the CPU gets back what devices had to themselves, to read it until it faults.

    Returns: entries that became the zero page, whose frames are to be let go of.
    """
    entries, own = ours(place, head)
    addresses, entries = place.addresses[own], entries[own]
    small = entries & _NOT_HUGE
    taken = cpu_pte.is_device_exclusive(small)
    small[taken] = (small[taken] & _NOT_EXCLUSIVE) | np.uint64(cpu_pte.PRESENT)
    empty = zero[cpu_pte.cpu_pfn(entries) - head]
    if place.vma.has(VmFlag.LOCKED):
        empty[:] = False
    small[empty] = _ZERO_PAGE | (small[empty] & _SOFT_DIRTY)
    place.space.table.store(addresses, small)
    return entries[empty]
