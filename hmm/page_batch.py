"""Batch operations of a page table: scattered pages.

A batch is an array of page numbers. Where their entries are is found with one gather per level, for all of
them at once; levels that the whole batch shares are walked once. Changes want pages in ascending order, so
that pages of one directory stand together.

**Source**: the hmm_pt patch of the 2015 series for what each operation does to the directory counts.

**Invariants**: after each function all counts are exact and no empty directory is left but the root and held
ones; a function that raises has changed nothing.

**Absent**: bounds and order of the pages, which the caller has checked.
"""

from __future__ import annotations

import numpy as np

from hmm.ascending import tally
from hmm.directory_arena import count_used
from hmm.directory_tree import DirectoryTree, Pages
from hmm.page_geometry import DIRECTORY_SHIFT
from hmm.units import PAGE_SHIFT, PIECE_PAGES, Entries

__all__ = ["clear_pages", "lookup_addresses", "store_pages"]

_ZERO = np.uint64(0)
_TO_ROW = np.array(DIRECTORY_SHIFT)
_TO_PAGE = np.array(PAGE_SHIFT, np.uint64)
_PIECE = 1 << 13  # whose temporaries stay in the cache


def lookup_addresses(tree: DirectoryTree, addresses: Entries, low: int, high: int, out: Entries) -> None:
    """Copy the entries of the pages of addresses to `out`, uint64[n], 0 where there is none.

    Args:
        addresses: uint64[n], bytes, any order, repetitions allowed.
        low, high: the smallest and the largest of their page numbers.
    """
    directory = tree.shared_directory(low, high, addresses.size)
    for at in range(0, addresses.size, _PIECE):
        pages = (addresses[at : at + _PIECE] >> _TO_PAGE).view(np.int64)
        slots = tree.descend(pages, low, *directory)
        tree.entries.take(slots, out=out[at : at + _PIECE], mode="clip")  # any other mode copies `out` first


def store_pages(tree: DirectoryTree, pages: Pages, entries: Entries | int) -> Entries:
    """Store entries that are not 0.

    Args:
        pages: int64[n], n > 0, ascending and distinct.
        entries: one for all, or uint64[n].

    Returns: uint64[n], the entries before.

    Raises:
        OutOfFramesError: too few directories left; nothing was changed (ENOMEM).
    """
    tree.settle()
    tree.require_leaves(pages)
    if pages.size <= PIECE_PAGES:
        return _store_piece(tree, pages, entries)
    old = np.empty(pages.size, np.uint64)
    for at in range(0, pages.size, _PIECE):
        piece = slice(at, at + _PIECE)
        old[piece] = _store_piece(tree, pages[piece], entries if isinstance(entries, int) else entries[piece])
    return old


def _store_piece(tree: DirectoryTree, pages: Pages, entries: Entries | int) -> Entries:
    slots, new = tree.slots_allocate(pages)
    old: Entries = np.zeros(pages.size, np.uint64) if new else tree.entries.take(slots)
    tree.entries[slots] = entries
    already = 0 if new else count_used(old)
    if already:
        if already == old.size:
            return old
        slots = slots[old == _ZERO]
    rows, gained = tally(slots >> _TO_ROW)
    tree.counts[rows] += gained
    return old


def clear_pages(tree: DirectoryTree, pages: Pages) -> Entries:
    """Clear pages and free what becomes empty.

    Args:
        pages: int64[n], n > 0, ascending and distinct.

    Returns: uint64[n], the entries before, 0 where there was none.
    """
    tree.settle()
    if pages.size <= PIECE_PAGES:
        return _clear_piece(tree, pages)
    old = np.empty(pages.size, np.uint64)
    for at in range(0, pages.size, _PIECE):
        old[at : at + _PIECE] = _clear_piece(tree, pages[at : at + _PIECE])
    return old


def _clear_piece(tree: DirectoryTree, pages: Pages) -> Entries:
    slots = tree.slots(pages, pages.item(0), pages.item(-1))
    old: Entries = tree.entries.take(slots)
    used = count_used(old)
    if used < old.size:
        if not used:
            return old
        slots = slots[old != _ZERO]  # the others may be in the NULL directory, which nobody writes
    tree.entries[slots] = _ZERO
    rows, lost = tally(slots >> _TO_ROW)
    counts = tree.counts.take(rows)
    counts -= lost
    tree.counts[rows] = counts
    if np.count_nonzero(counts) < counts.size:
        tree.arena.drop_all_empty(rows[counts == 0])
    return old
