"""Batch operations of a page table: scattered pages.

A batch is an array of addresses, each of which stands for the page that holds it. Where their entries are is found
with one gather per level, for all of them at once; levels that the whole batch shares are walked once. Changes
want the pages in ascending order, so that pages of one directory stand together; what comes in another order is
sorted, and given back as it came. Consecutive pages are a range.

**Source**: the hmm_pt patch of the 2015 series for what each operation does to the directory counts.

**Invariants**: after each function all counts are exact and no empty directory is left but the root and held
ones; a function that raises has changed nothing.

**Absent**: the short ways for few pages (`hmm.page_table`).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hmm.ascending import is_ascending, tally
from hmm.directory_arena import count_used
from hmm.directory_tree import DirectoryTree, Pages
from hmm.errors import InvalidRequestError
from hmm.page_geometry import DIRECTORY_SHIFT
from hmm.page_range import clear_range, fill_range, read_range
from hmm.units import PAGE_SHIFT, PIECE_PAGES, Entries

__all__ = ["clear_addresses", "lookup_addresses", "store_addresses"]

_ZERO = np.uint64(0)
_TO_ROW = np.array(DIRECTORY_SHIFT)
_TO_PAGE = np.array(PAGE_SHIFT, np.uint64)
_PIECE = 1 << 13  # whose temporaries stay in the cache


def lookup_addresses(tree: DirectoryTree, addresses: Entries, out: Entries) -> None:
    """Copy the entries for addresses to `out`, uint64[n], 0 where there is none; see `PageTable.lookup()`.

    Args:
        addresses: uint64[n], n > 0, any order, repetitions allowed.
    """
    first, last = addresses.item(0) >> PAGE_SHIFT, addresses.item(-1) >> PAGE_SHIFT
    if last - first == addresses.size - 1 and is_ascending(addresses >> _TO_PAGE):
        tree.geometry.check(last << PAGE_SHIFT)
        read_range(tree, first, last + 1, out)
        return
    # Finding where the bounds are takes a third of the time of reducing to them.
    low, high = addresses.item(addresses.argmin()), addresses.item(addresses.argmax())
    tree.geometry.check(high)
    low, high = low >> PAGE_SHIFT, high >> PAGE_SHIFT
    directory = tree.shared_directory(low, high, addresses.size)
    for at in range(0, addresses.size, _PIECE):
        pages = (addresses[at : at + _PIECE] >> _TO_PAGE).view(np.int64)
        slots = tree.descend(pages, low, *directory)
        tree.entries.take(slots, out=out[at : at + _PIECE], mode="clip")  # any other mode copies `out` first


def store_addresses(tree: DirectoryTree, addresses: Entries, entries: int | Entries) -> Entries:
    """Store entries for addresses; see `PageTable.store()`.

    Args:
        addresses: uint64[n], n > 0, each in another page.
        entries: one for all, not 0, or uint64[n], of which zeros clear.

    Returns: uint64[n], the entries before.
    """
    pages, order = _distinct_pages(tree, addresses)
    if order is not None and not isinstance(entries, int):
        entries = entries[order]
    span = _span_of(pages)
    if span is not None:
        old = np.empty(pages.size, np.uint64)
        read_range(tree, *span, old)
        fill_range(tree, *span, entries, in_use=isinstance(entries, int))
    elif isinstance(entries, int) or count_used(entries) == entries.size:
        old = _store_pages(tree, pages, entries)
    else:
        old = _store_or_clear(tree, pages, entries)
    return _unsorted(old, order)


def clear_addresses(tree: DirectoryTree, addresses: Entries) -> Entries:
    """Clear the pages of addresses and free what becomes empty; see `PageTable.clear_many()`.

    Args:
        addresses: uint64[n], n > 0, each in another page.

    Returns: uint64[n], the entries before, 0 where there was none.
    """
    pages, order = _distinct_pages(tree, addresses)
    span = _span_of(pages)
    if span is None:
        return _unsorted(_clear_pages(tree, pages), order)
    old = np.empty(pages.size, np.uint64)
    read_range(tree, *span, old)
    clear_range(tree, *span)
    return _unsorted(old, order)


# -- pages in order


def _distinct_pages(tree: DirectoryTree, addresses: Entries) -> tuple[Pages, npt.NDArray[np.int64] | None]:
    # Page numbers, ascending, and the order that made them so unless they were.
    pages: Pages = (addresses >> _TO_PAGE).view(np.int64)
    order = None
    if not is_ascending(pages):
        order = pages.argsort()
        pages = pages[order]
        if not is_ascending(pages):
            raise InvalidRequestError("two addresses are in one page")
    tree.geometry.check(pages.item(-1) << PAGE_SHIFT)
    return pages, order


def _span_of(pages: Pages) -> tuple[int, int] | None:
    # The first page and the one behind the last, where these, ascending and distinct, are consecutive.
    first, end = pages.item(0), pages.item(-1) + 1
    return (first, end) if end - first == pages.size else None


def _unsorted(values: Entries, order: npt.NDArray[np.int64] | None) -> Entries:
    if order is None:
        return values
    result = np.empty_like(values)
    result[order] = values
    return result


# -- storing and clearing; pages are int64[n], n > 0, ascending and distinct


def _store_or_clear(tree: DirectoryTree, pages: Pages, entries: Entries) -> Entries:
    kept = entries != _ZERO
    old = np.empty(pages.size, np.uint64)
    if kept.any():
        old[kept] = _store_pages(tree, pages[kept], entries[kept])
    old[~kept] = _clear_pages(tree, pages[~kept])
    return old


def _store_pages(tree: DirectoryTree, pages: Pages, entries: Entries | int) -> Entries:
    # Store entries that are not 0; those before.
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


def _clear_pages(tree: DirectoryTree, pages: Pages) -> Entries:
    # Clear pages, and free what becomes empty; the entries before.
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
