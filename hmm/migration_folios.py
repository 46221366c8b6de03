"""Large folios in a migration: which of them move as one, and how the others are split.

    what is met                              linux-6.12             linux-7
    a huge page, selected as one             split                  moves as one
    a huge page otherwise                    split                  split if it is selected
    a large folio mapped by page entries     stays                  split if it is selected
    a huge page with small destinations                             split when it is unmapped already
    a block without a page table             a hole for each page   a hole for all of it, where selected as one
    the huge zero page                       split                  a hole; split when small pages take its place

What cannot be split stays, and with it what lies behind it in its block.  A huge page of a file never moves as one, and
is mapped nowhere when it was split.

**Source**: Linux mm/migrate_device.c, 7.0: migrate_vma_collect_huge_pmd(), migrate_vma_collect_pmd(),
migrate_vma_collect_hole(), migrate_vma_split_unmapped_folio(); 6.12: migrate_vma_collect_pmd().

**Invariants**: those of huge_split.py.

**Absent**: the destinations (device_pages.py); sizes between a page and a block.

Differs: a huge page of coherent memory is selected as its small pages are, by SELECT_DEVICE_COHERENT and its owner; the
kernel selects it by SELECT_SYSTEM, and its drivers leave it alone then, so that it never comes back by their request.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt

from hmm import cpu_pte
from hmm.ascending import distinct
from hmm.events import Cause
from hmm.frames import PageFlag, Region, RegionKind
from hmm.huge_fault import has_table
from hmm.huge_split import block_of, huge_blocks, split_folio, split_pmds
from hmm.large_folio import are_compound
from hmm.migration import COMPOUND, VALID, Migration, Positions, Select
from hmm.migration_entries import HeldPages, entries_of, range_of
from hmm.operation import Operation
from hmm.units import (
    PAGE_SIZE,
    PMD_MASK,
    PMD_PAGES,
    PMD_SIZE,
    Address,
    AddressRange,
    Entries,
    Pfns,
    all_but,
    block_starts,
)
from hmm.zone_device import are_in, sole_region

__all__ = [
    "all_or_none",
    "are_all_selected",
    "are_selected",
    "are_whole",
    "have_room",
    "map_by_pages",
    "split_large",
    "split_unmapped",
    "split_zero_pages",
]

_Mask = npt.NDArray[np.bool_]
_NOT_HUGE = all_but(cpu_pte.HUGE)
_NOT_COMPOUND = all_but(COMPOUND)


def are_selected(migration: Migration, pfns: Pfns) -> _Mask:
    """bool[n]: which frames are of a kind that the migration selects."""
    return are_in(migration.space.frames, pfns, partial(_selects, migration))


def are_all_selected(migration: Migration, pfns: Pfns) -> bool:
    """Whether the migration selects all of the frames, and they are in one region."""
    sole = sole_region(migration.space.frames, pfns)
    return sole is not None and _selects(migration, sole)


def _selects(migration: Migration, region: Region) -> bool:
    if region.kind is RegionKind.SYSTEM:
        return Select.SYSTEM in migration.select
    kind = Select.DEVICE_PRIVATE if region.kind is RegionKind.DEVICE_PRIVATE else Select.DEVICE_COHERENT
    return kind in migration.select and region.owner == migration.owner


def _positions_of(heads: Positions) -> Positions:
    """The positions of all pages of blocks that begin at these: int64[n * PMD_PAGES]."""
    return (heads[:, np.newaxis] + np.arange(PMD_PAGES)).reshape(-1)


def all_or_none(mask: _Mask, whole: _Mask) -> None:
    """Set `mask` for all pages of what moves as one when it is set for one of them.

    Args:
        mask: bool[n], changed in place.
        whole: bool[n], the pages that move as parts of blocks; so many consecutive ones are one block.
    """
    parts = np.flatnonzero(whole)
    if parts.size:
        mask[parts] = np.repeat(mask[parts].reshape(-1, PMD_PAGES).any(axis=1), PMD_PAGES)


# ---- before anything is collected


def split_large(migration: Migration) -> Operation[_Mask]:
    """Split the large folios that are not to move as such.

    Returns: bool[n], the pages that have to stay where they are as a folio could not be split.

    Cost: O(blocks + folios), and that of `split_folio` for each that is split.
    """
    left = np.zeros(migration.addresses.size, np.bool_)
    if not migration.space.huge:
        return left
    if migration.space.semantics.migration_splits:
        yield from _split_all(migration)
    elif not _move_as_one(migration):
        yield from _split_selected(migration, left)
        yield from _split_mapped_by_pages(migration, left)
    return left


def _split_all(migration: Migration) -> Operation[None]:
    """Whatever is selected; what cannot be split is left out when pages are collected, as part of a large folio."""
    space = migration.space
    for block in _huge_blocks(migration):
        if migration.vma_now is None:
            return
        entry = space.table.get(block.start)
        if cpu_pte.is_huge_zero(entry):
            yield from split_pmds(space, (block,))
        elif cpu_pte.is_huge(entry):
            yield from split_folio(space, block.start)


def _move_as_one(migration: Migration) -> bool:
    """Whether all of the pages are in huge pages that are asked for as such."""
    span = range_of(migration.addresses) if Select.COMPOUND in migration.select else None
    if migration.vma.backing is not None or span is None or (span.start | span.end) & ~PMD_MASK:
        return False
    table = migration.space.table
    return all(table.get(start) & cpu_pte.HUGE for start in range(span.start, span.end, PMD_SIZE))


def _split_selected(migration: Migration, left: _Mask) -> Operation[None]:
    space = migration.space
    for block in _huge_blocks(migration):
        if migration.vma_now is None:
            return
        entry = space.table.get(block.start)
        if not cpu_pte.is_huge(entry) or not _is_selected(migration, entry):
            continue
        anonymous = migration.vma.backing is None
        if anonymous and Select.COMPOUND in migration.select and _has_all_of(migration, block.start):
            continue
        if not (yield from split_folio(space, block.start)):
            _leave(migration, left, block.start)


def _split_mapped_by_pages(migration: Migration, left: _Mask) -> Operation[None]:
    space, frames = migration.space, migration.space.frames
    entries = entries_of(space.table, migration.addresses)
    if int(np.bitwise_and.reduce(entries)) & cpu_pte.HUGE:
        return
    movable = cpu_pte.holds_frame(entries) & ~cpu_pte.is_device_exclusive(entries) & ~cpu_pte.is_huge(entries)
    positions = np.flatnonzero(movable)
    pfns = cpu_pte.cpu_pfn(entries[positions])
    large = are_compound(frames, pfns)
    if not large.any():
        return
    large &= are_selected(migration, pfns)
    _, first = np.unique(pfns[large] // PMD_PAGES, return_index=True)
    for position in np.sort(positions[large][first]).tolist():
        if migration.vma_now is None:
            return
        address = int(migration.addresses[position])
        entry = space.table.get(address)
        large_still = cpu_pte.holds_frame(entry) and frames.flags_of(cpu_pte.cpu_pfn(entry)) & PageFlag.COMPOUND
        if large_still and not left[position] and not (yield from split_folio(space, address)):
            _leave(migration, left, address)


def _leave(migration: Migration, left: _Mask, address: Address) -> None:
    # migrate_vma_collect_skip(addr, end), up to the end of the block.
    first, last = np.searchsorted(migration.addresses, (address, (address & PMD_MASK) + PMD_PAGES * PAGE_SIZE))
    left[first:last] = True


def _huge_blocks(migration: Migration) -> list[AddressRange]:
    starts = distinct(block_starts(migration.addresses)).tolist()
    return [block for start in starts for block in huge_blocks(migration.space, AddressRange(start, start + 1))]


def _has_all_of(migration: Migration, start: Address) -> bool:
    """Whether all of a block is to be migrated."""
    return _is_block(migration, int(migration.addresses.searchsorted(np.uint64(start))), start)


def _is_block(migration: Migration, at: int, start: Address) -> bool:
    """Whether the words from `at` on are those of all of a block."""
    addresses, last = migration.addresses, at + PMD_PAGES - 1
    return last < addresses.size and int(addresses[last]) == start + (PMD_PAGES - 1) * PAGE_SIZE


def _is_selected(migration: Migration, entry: int) -> bool:
    frames = migration.space.frames
    return cpu_pte.holds_frame(entry) and _selects(migration, frames.region_of(cpu_pte.cpu_pfn(entry)))


# ---- when pages are collected


def are_whole(migration: Migration, entries: Entries) -> _Mask:
    """Which pages move as parts of blocks: of huge pages, of the huge zero page, and where a block has no page table.

    Args:
        entries: uint64[n], what stands at the migration's addresses.

    Returns: bool[n], whole blocks.

    Cost: O(blocks).
    """
    found = np.zeros(entries.size, np.bool_)
    space = migration.space
    if not migration.starts.size or space.semantics.migration_splits:
        return found
    anonymous = migration.vma.backing is None
    for head in migration.starts.tolist():
        start = int(migration.addresses[head])
        if not _is_block(migration, head, start):
            continue
        entry, block = int(entries[head]), slice(head, head + PMD_PAGES)
        if cpu_pte.is_huge_zero(entry):
            found[block] = anonymous and Select.SYSTEM in migration.select
        elif cpu_pte.is_huge(entry):
            found[block] = anonymous and _is_selected(migration, entry)
        else:
            found[block] = anonymous and not entry and not has_table(space, start)
    return found


# ---- when pages are unmapped


def split_unmapped(migration: Migration, held: HeldPages) -> Operation[None]:
    """Split what was to move as one and got small destinations; mirrors hear of it, as the blocks' mapping changes.

    Args:
        held: the pages of the migration.
    """
    heads = migration.heads
    if not heads.size:
        return
    heads = heads[(migration.dst[heads] & np.uint64(VALID | COMPOUND)) == VALID]
    if not heads.size:
        return
    framed = _positions_of(heads[(migration.src[heads] & np.uint64(VALID)) != 0])
    if framed.size:
        starts = migration.addresses[framed[::PMD_PAGES]].tolist()
        spans = tuple(AddressRange(start, start + PMD_PAGES * PAGE_SIZE) for start in starts)
        with migration.space.notifier.invalidation(spans, Cause.HUGE_PAGE_SPLIT) as bracket:
            yield from bracket.deliver()
            map_by_pages(held, np.isin(held.pfns, migration.source_pfns(framed)))
    migration.src[_positions_of(heads)] &= _NOT_COMPOUND


def map_by_pages(held: HeldPages, chosen: _Mask) -> None:
    """Make small pages of large folios that have migration entries only: folio_split_unmapped().

    Args:
        chosen: bool[n], which of the held pages; all of a folio.
    """
    if not np.count_nonzero(chosen):
        return
    for place, entries in held.standing():
        small = chosen[place.pages]
        place.space.table.store(place.addresses[small], entries[small] & _NOT_HUGE)
    held.fresh = None
    held.frames.clear_flags(held.pfns[chosen], PageFlag.COMPOUND)


# ---- where nothing was


def split_zero_pages(migration: Migration, holes: Positions) -> Operation[None]:
    """Map the huge zero page by page entries where small pages are about to take its place."""
    if not migration.space.huge:
        return
    small = holes[(migration.src[holes] & np.uint64(COMPOUND)) == 0]
    starts = distinct(block_starts(migration.addresses[small])).tolist()
    zero = [start for start in starts if cpu_pte.is_huge_zero(migration.space.table.get(start))]
    yield from split_pmds(migration.space, map(block_of, zero))


def have_room(migration: Migration, holes: Positions, entries: Entries) -> _Mask:
    """For those of the holes that move as parts of blocks: whether nothing has come into their block meanwhile.

    Args:
        entries: uint64[n], what stands there now.
    """
    space, free = migration.space, np.ones(holes.size, np.bool_)
    for at in np.flatnonzero((migration.src[holes] & np.uint64(COMPOUND)) != 0)[::PMD_PAGES].tolist():
        start = int(migration.addresses[holes[at]])
        taken = has_table(space, start) and not cpu_pte.is_huge_zero(int(entries[at]))
        free[at : at + PMD_PAGES] = not taken
    return free
