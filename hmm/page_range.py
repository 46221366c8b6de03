"""Range operations of a page table: whole directories at a time.

A range is the part of a leaf at its beginning, whole leaves, and the part of a leaf at its end. Whole leaves
are rows of the arena, and one gather or scatter of rows moves all of them at the speed of memory, wherever
they lie in the arena. A range of few leaves is done leaf by leaf instead, since a vector step costs more than
a leaf; and what needs temporaries goes in pieces that stay in the cache.

Positions are page numbers; [page, end) is not empty and lies in the table, which the caller has checked.

**Source**: the hmm_pt patch of the 2015 series for what each operation does to the directory counts.

**Invariants**: after each function all counts are exact and no empty directory is left but the root and held
ones; a function that raises has changed nothing.

**Absent**: scattered pages (`hmm.page_batch`) and the short ways for one page (`hmm.page_table`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, reduce
from itertools import pairwise
from operator import or_
from typing import NamedTuple, TypeAlias

import numpy as np

from hmm.directory_arena import Offsets, count_used
from hmm.directory_tree import DirectoryTree, Pages
from hmm.page_geometry import DIRECTORY_ENTRIES, DIRECTORY_MASK, DIRECTORY_SHIFT
from hmm.units import PAGE_SHIFT, PAGE_SIZE, ULONG_MAX, Entries

__all__ = [
    "any_bits",
    "clear_range",
    "common_bits",
    "fill_range",
    "mask_range",
    "read_range",
    "update_range",
    "valid_in_range",
    "view_range",
    "zap_range",
]

_FEW_LEAVES = 8  # up to here leaf by leaf is faster
_PARENT_PAGES = DIRECTORY_ENTRIES << DIRECTORY_SHIFT  # below one directory of leaves
_PIECE_ROWS = 64  # 2^15 pages: read, with temporaries that stay in the cache
_CHANGE_ROWS = 128  # changed, mostly without temporaries
_COPY_ROWS = 512  # stored or copied, without temporaries
_RUN_ROWS = 8  # rows in order that make it worth to treat them as one
_ZERO = np.uint64(0)
_NO_ENTRIES = np.empty(0, np.uint64)
_OFFSETS = np.arange(DIRECTORY_ENTRIES, dtype=np.uint64) << np.uint64(PAGE_SHIFT)

Change: TypeAlias = Callable[[Entries], int]
"""Changes entries in place, and returns how many it cleared that were in use."""


class _Part(NamedTuple):
    # What a range has of one leaf: its first page in it, its row, a view of its entries.
    page: int
    row: int
    view: Entries


def _view(tree: DirectoryTree, leaf: int, page: int, end: int) -> Entries:
    # The entries of [page, end), all in this leaf; nobody writes those of the NULL directory.
    first = leaf | page & DIRECTORY_MASK
    return tree.entries[first : first + end - page]


def _few_parts(tree: DirectoryTree, page: int, end: int) -> Iterator[_Part] | None:
    # What there is of [page, end), leaf by leaf, if these are few; the caller may free what it was given.
    few = (end - 1 >> DIRECTORY_SHIFT) - (page >> DIRECTORY_SHIFT) < _FEW_LEAVES
    return _parts(tree, page, end) if few else None


def _parts(tree: DirectoryTree, page: int, end: int) -> Iterator[_Part]:
    while True:
        page, leaf = tree.next_leaf(page, end)
        if not leaf:
            return
        stop = min((page | DIRECTORY_MASK) + 1, end)
        yield _Part(page, leaf >> DIRECTORY_SHIFT, _view(tree, leaf, page, stop))
        page = stop


def _split(tree: DirectoryTree, page: int, end: int) -> tuple[list[_Part], Pages, Offsets]:
    # What there is of [page, end), many leaves: the ragged parts, and the numbers and rows of whole leaves.
    numbers, offsets = tree.leaves(page, end)
    ragged: list[_Part] = []
    if numbers.size and page & DIRECTORY_MASK and numbers[0] == page >> DIRECTORY_SHIFT:
        leaf = int(offsets[0])
        view = _view(tree, leaf, page, (page | DIRECTORY_MASK) + 1)
        ragged.append(_Part(page, leaf >> DIRECTORY_SHIFT, view))
        numbers, offsets = numbers[1:], offsets[1:]
    if numbers.size and end & DIRECTORY_MASK and numbers[-1] == end >> DIRECTORY_SHIFT:
        leaf, first = int(offsets[-1]), end & ~DIRECTORY_MASK
        ragged.append(_Part(first, leaf >> DIRECTORY_SHIFT, _view(tree, leaf, first, end)))
        numbers, offsets = numbers[:-1], offsets[:-1]
    return ragged, numbers, offsets >> DIRECTORY_SHIFT


def _pieces(rows: Offsets, most: int) -> Iterator[tuple[slice, slice | Offsets]]:
    # Rows in pieces of at most so many: the positions in `rows`, and the rows as an index of the arena. Rows
    # that lie one after the other give slices, hence views; where they hardly do, a piece is gathered.
    breaks = (rows[1:] - rows[:-1] != 1).nonzero()[0]
    if breaks.size * _RUN_ROWS > rows.size:
        for first in range(0, rows.size, _PIECE_ROWS):
            piece = slice(first, first + _PIECE_ROWS)
            yield piece, rows[piece]
        return
    for start, end in pairwise([0, *(breaks + 1).tolist(), rows.size]):
        for first in range(start, end, most):
            piece = slice(first, min(first + most, end))
            row = int(rows[first])
            yield piece, slice(row, row + piece.stop - first)


# -- reading


def view_range(tree: DirectoryTree, page: int, end: int) -> Entries | None:
    """The entries of [page, end) where they lie, uint64[end - page]; None where they lie apart."""
    if page >> DIRECTORY_SHIFT == end - 1 >> DIRECTORY_SHIFT:
        return _view(tree, tree.leaf(page), page, end)
    offset, level = tree.shared_directory(page, end - 1, end - page)
    return _view(tree, offset, page, end) if level == tree.llevel else None


def read_range(tree: DirectoryTree, page: int, end: int, out: Entries) -> None:
    """Copy the entries of [page, end) to `out`, uint64[end - page], C-contiguous; 0 where there is none."""
    if page >> DIRECTORY_SHIFT == end - 1 >> DIRECTORY_SHIFT:
        out[...] = _view(tree, tree.leaf(page), page, end)
        return
    parts = _few_parts(tree, page, end)
    if parts is not None:
        at = page
        for part in parts:
            out[at - page : part.page - page] = _ZERO
            at = part.page + part.view.size
            out[part.page - page : at - page] = part.view
        out[at - page :] = _ZERO
        return
    offset, level = tree.shared_directory(page, end - 1, end - page)
    if level == tree.llevel:  # leaves that lie in order are as good as one
        out[:] = _view(tree, offset, page, end)
        return
    if level < tree.llevel - 1:  # of one directory of leaves after the other: what lies in order does so below one
        at = page
        while at < end:
            stop = min((at // _PARENT_PAGES + 1) * _PARENT_PAGES, end)
            read_range(tree, at, stop, out[at - page : stop - page])
            at = stop
        return
    _gather(tree, page, end, out)


def _gather(tree: DirectoryTree, page: int, end: int, out: Entries) -> None:
    # Copy entries of many leaves, wherever these lie.
    ragged, numbers, rows = _split(tree, page, end)
    first, stop = page + DIRECTORY_MASK >> DIRECTORY_SHIFT, end >> DIRECTORY_SHIFT
    before, behind = (first << DIRECTORY_SHIFT) - page, (stop << DIRECTORY_SHIFT) - page
    whole = out[before:behind].reshape(-1, DIRECTORY_ENTRIES)
    if rows.size == stop - first:
        for piece, index in _pieces(rows, _COPY_ROWS):
            if isinstance(index, slice):
                whole[piece] = tree.rows[index]
            else:
                np.take(tree.rows, index, axis=0, out=whole[piece], mode="clip")  # other modes copy `out` first
    else:
        whole[:] = _ZERO
        for piece, index in _pieces(rows, _PIECE_ROWS):
            whole[numbers[piece] - first] = tree.rows[index]
    out[:before] = _ZERO
    out[behind:] = _ZERO
    for part in ragged:
        out[part.page - page : part.page - page + part.view.size] = part.view


def common_bits(tree: DirectoryTree, page: int, end: int) -> int:
    """The bits that all entries of [page, end) have; 0 when a page has no entry."""
    if page >> DIRECTORY_SHIFT == end - 1 >> DIRECTORY_SHIFT:
        leaf = tree.leaf(page)
        return int(np.bitwise_and.reduce(_view(tree, leaf, page, end))) if leaf else 0
    offset, level = tree.shared_directory(page, end - 1, end - page)
    if level == tree.llevel:  # leaves that lie in order are as good as one
        return int(np.bitwise_and.reduce(_view(tree, offset, page, end)))
    ragged, numbers, rows = _split(tree, page, end)
    if numbers.size + len(ragged) < (end - 1 >> DIRECTORY_SHIFT) - (page >> DIRECTORY_SHIFT) + 1:
        return 0
    common = ULONG_MAX
    for part in ragged:
        common &= int(np.bitwise_and.reduce(part.view))
    for _, index in _pieces(rows, _COPY_ROWS):
        common &= int(np.bitwise_and.reduce(tree.rows[index], axis=None))
    return common


def any_bits(tree: DirectoryTree, page: int, end: int) -> int:
    """The bits that at least one entry of [page, end) has."""
    if page >> DIRECTORY_SHIFT == end - 1 >> DIRECTORY_SHIFT:
        leaf = tree.leaf(page)
        return int(np.bitwise_or.reduce(_view(tree, leaf, page, end))) if leaf else 0
    offset, level = tree.shared_directory(page, end - 1, end - page)
    if level == tree.llevel:  # leaves that lie in order are as good as one
        return int(np.bitwise_or.reduce(_view(tree, offset, page, end)))
    few = _few_parts(tree, page, end)
    if few is not None:
        return reduce(or_, [int(np.bitwise_or.reduce(part.view)) for part in few], 0)
    ragged, _, rows = _split(tree, page, end)
    found = [int(np.bitwise_or.reduce(part.view)) for part in ragged]
    found += [int(np.bitwise_or.reduce(tree.rows[index], axis=None)) for _, index in _pieces(rows, _COPY_ROWS)]
    return reduce(or_, found, 0)


def valid_in_range(tree: DirectoryTree, page: int, end: int) -> tuple[Entries, Entries]:
    """The entries in use of [page, end): uint64[n] addresses in bytes, ascending, and uint64[n] entries."""
    if page >> DIRECTORY_SHIFT == end - 1 >> DIRECTORY_SHIFT:
        return _in_use(page, _view(tree, tree.leaf(page), page, end))
    offset, level = tree.shared_directory(page, end - 1, end - page)
    if level == tree.llevel:  # leaves that lie in order are as good as one
        return _in_use(page, _view(tree, offset, page, end))
    tree.settle()
    parts = _few_parts(tree, page, end)
    if parts is not None:
        return _joined([_in_use(part.page, part.view) for part in parts])
    ragged, numbers, rows = _split(tree, page, end)
    head = [_in_use(page, part.view) for part in ragged if part.page == page]
    tail = [_in_use(part.page, part.view) for part in ragged if part.page != page]
    # One allocation for the whole result: fresh memory costs more than the walk.
    counts = tree.counts.take(rows)
    number = int(counts.sum()) + sum(entries.size for _, entries in head + tail)
    addresses, entries = np.empty(number, np.uint64), np.empty(number, np.uint64)
    at = _put(addresses, entries, 0, head)
    for piece, index in _pieces(rows, _PIECE_ROWS):
        stop = at + int(counts[piece].sum())
        _put_rows(numbers[piece], tree.rows[index], addresses[at:stop], entries[at:stop])
        at = stop
    _put(addresses, entries, at, tail)
    return addresses, entries


def _put(addresses: Entries, entries: Entries, at: int, pieces: list[tuple[Entries, Entries]]) -> int:
    for some_addresses, some_entries in pieces:
        stop = at + some_entries.size
        addresses[at:stop] = some_addresses
        entries[at:stop] = some_entries
        at = stop
    return at


def _put_rows(numbers: Pages, block: Entries, addresses: Entries, entries: Entries) -> None:
    # What leaves with these numbers and entries hold, into arrays that have just the room for it.
    starts = numbers << DIRECTORY_SHIFT + PAGE_SHIFT
    if entries.size == block.size:
        entries.reshape(block.shape)[:] = block
        np.add(starts.view(np.uint64)[:, np.newaxis], _OFFSETS, out=addresses.reshape(block.shape))
        return
    block = block.reshape(-1)
    positions = block.nonzero()[0]
    np.take(block, positions, out=entries, mode="clip")
    leaves = positions >> DIRECTORY_SHIFT
    positions &= DIRECTORY_MASK
    positions <<= PAGE_SHIFT
    positions += starts[leaves]
    addresses[:] = positions.view(np.uint64)


def _joined(pieces: list[tuple[Entries, Entries]]) -> tuple[Entries, Entries]:
    pieces.append((_NO_ENTRIES, _NO_ENTRIES))
    addresses, entries = zip(*pieces, strict=True)
    return np.concatenate(addresses), np.concatenate(entries)


def _in_use(page: int, view: Entries) -> tuple[Entries, Entries]:
    if count_used(view) == view.size:
        addresses = np.arange(page << PAGE_SHIFT, page + view.size << PAGE_SHIFT, PAGE_SIZE, dtype=np.uint64)
        return addresses, view.copy()
    positions = view.nonzero()[0]
    entries = view[positions]
    positions += page
    positions <<= PAGE_SHIFT
    return positions.view(np.uint64), entries


# -- clearing


def clear_range(tree: DirectoryTree, page: int, end: int) -> int:
    """Clear [page, end) and free what becomes empty; the number of entries that were in use."""
    tree.settle()
    if page >> DIRECTORY_SHIFT == end - 1 >> DIRECTORY_SHIFT:
        leaf = tree.leaf(page)
        return _clear_view(tree, leaf >> DIRECTORY_SHIFT, _view(tree, leaf, page, end))
    parts = _few_parts(tree, page, end)
    if parts is not None:
        return sum([_clear_view(tree, part.row, part.view) for part in parts])
    ragged, _, rows = _split(tree, page, end)
    cleared = sum([_clear_view(tree, part.row, part.view) for part in ragged])
    return cleared + _clear_rows(tree, rows)


def zap_range(tree: DirectoryTree, page: int, end: int) -> Entries:
    """Clear [page, end), free what becomes empty; uint64[n], what was in use, in the order of addresses."""
    tree.settle()
    if page >> DIRECTORY_SHIFT == end - 1 >> DIRECTORY_SHIFT:
        leaf = tree.leaf(page)
        return _zap_view(tree, leaf >> DIRECTORY_SHIFT, _view(tree, leaf, page, end))
    parts = _few_parts(tree, page, end)
    if parts is not None:
        return np.concatenate([_NO_ENTRIES, *(_zap_view(tree, part.row, part.view) for part in parts)])
    ragged, _, rows = _split(tree, page, end)
    if not ragged:
        return _zap_rows(tree, rows)
    head = [_zap_view(tree, part.row, part.view) for part in ragged if part.page == page]
    tail = [_zap_view(tree, part.row, part.view) for part in ragged if part.page != page]
    return np.concatenate([*head, _zap_rows(tree, rows), *tail])


def _zap_view(tree: DirectoryTree, row: int, view: Entries) -> Entries:
    held = view.copy()
    used = _clear_view(tree, row, view)
    return held if used == held.size else held[held.nonzero()]


def _zap_rows(tree: DirectoryTree, rows: Offsets) -> Entries:
    counts = tree.counts.take(rows)
    held = np.empty(int(counts.sum()), np.uint64)
    at = 0
    for piece, index in _pieces(rows, _PIECE_ROWS):
        block = tree.rows[index].reshape(-1)
        stop = at + int(counts[piece].sum())
        if stop - at == block.size:
            held[at:stop] = block
        else:
            np.take(block, block.nonzero()[0], out=held[at:stop], mode="clip")
        tree.rows[index] = _ZERO  # while they are in the cache
        at = stop
    _drop_rows(tree, rows)
    return held


def _clear_view(tree: DirectoryTree, row: int, view: Entries) -> int:
    used = _used(tree, row, view)
    if used:
        view.fill(0)
        tree.arena.lose(row, used)
    return used


def _used(tree: DirectoryTree, row: int, view: Entries) -> int:
    # How many entries of a part of a leaf are in use; nobody has to look at those of a full or an empty one.
    count = tree.arena.count[row]
    if count == DIRECTORY_ENTRIES:
        return view.size
    return count_used(view) if count else 0


def _clear_rows(tree: DirectoryTree, rows: Offsets) -> int:
    cleared = int(tree.counts.take(rows).sum())
    for _, index in _pieces(rows, _COPY_ROWS):
        tree.rows[index] = _ZERO
    _drop_rows(tree, rows)
    return cleared


def _drop_rows(tree: DirectoryTree, rows: Offsets) -> None:
    # Free rows that were cleared.
    tree.counts[rows] = 0
    tree.arena.drop_all_empty(rows)


# -- storing


def fill_range(tree: DirectoryTree, page: int, end: int, source: int | Entries, *, in_use: bool) -> None:
    """Store entries in all of [page, end); zeros clear.

    Args:
        source: one entry for all pages, or uint64[end - page].
        in_use: none of them is 0.

    Raises:
        OutOfFramesError: too few directories left; nothing was changed (ENOMEM).
    """
    tree.settle()
    if page >> DIRECTORY_SHIFT == end - 1 >> DIRECTORY_SHIFT:
        _fill_part(tree, page, end, source, in_use=in_use)
        return
    by_leaf = False
    if isinstance(source, int):
        tree.require_range(page, end)
    elif not tree.has_room(page, end):
        by_leaf = True  # directories may run out: allocate none for zeros, not even for a moment
        tree.require_leaves(source.nonzero()[0] + page)
    at = page
    while at < end:
        stop = min((at | DIRECTORY_MASK) + 1, end)
        if by_leaf or at & DIRECTORY_MASK or stop & DIRECTORY_MASK:
            part = source if isinstance(source, int) else source[at - page : stop - page]
            _fill_part(tree, at, stop, part, in_use=in_use)
        else:
            stop = min((at | _PARENT_PAGES - 1) + 1, end & ~DIRECTORY_MASK)
            part = source if isinstance(source, int) else source[at - page : stop - page]
            _fill_rows(tree, at, stop, part, in_use=in_use)
        at = stop


def _fill_part(tree: DirectoryTree, page: int, end: int, source: int | Entries, *, in_use: bool) -> None:
    # Within one leaf.
    used = end - page if in_use else count_used(source)
    leaf = tree.leaf_allocate(page) if used else tree.leaf(page)
    if not leaf:
        return
    row, first = leaf >> DIRECTORY_SHIFT, leaf | page & DIRECTORY_MASK
    stop = first + end - page
    count = tree.arena.count
    if there := count[row]:
        used -= end - page if there == DIRECTORY_ENTRIES else count_used(tree.entries[first:stop])
    tree.entries[first:stop] = source
    if used > 0:
        count[row] = there + used
    elif used:
        tree.arena.lose(row, -used)


def _fill_rows(tree: DirectoryTree, page: int, end: int, source: int | Entries, *, in_use: bool) -> None:
    # Whole leaves below one directory.
    rows = tree.leaves_allocate(page, end) >> DIRECTORY_SHIFT
    if isinstance(source, int):
        for _, index in _pieces(rows, _COPY_ROWS):
            tree.rows[index] = source
    elif in_use:
        block = source.reshape(-1, DIRECTORY_ENTRIES)
        for piece, index in _pieces(rows, _COPY_ROWS):
            tree.rows[index] = block[piece]
    else:
        block, least = source.reshape(-1, DIRECTORY_ENTRIES), ULONG_MAX
        for piece, index in _pieces(rows, _CHANGE_ROWS):
            least = min(least, int(np.minimum.reduce(block[piece], axis=None)))
            tree.rows[index] = block[piece]  # while they are in the cache
        if not least:
            used = np.count_nonzero(block, axis=1)
            tree.counts[rows] = used
            tree.arena.drop_all_empty(rows[used == 0])
            return
    tree.counts[rows] = DIRECTORY_ENTRIES


# -- changing


def update_range(tree: DirectoryTree, page: int, end: int, function: Callable[[Entries], object]) -> int:
    """Let `function` change the entries of [page, end) in place, many at a time, and free what becomes empty.

    Args:
        function: gets uint64 arrays, of one or two dimensions, that also hold zeros, which must stay zeros.
            It must not raise and not use the table.

    Returns: how many entries in use became zero.
    """

    def change(entries: Entries) -> int:
        used = count_used(entries)
        function(entries)
        return used - count_used(entries)

    return _change_range(tree, page, end, change)


def mask_range(tree: DirectoryTree, page: int, end: int, mask: int, valid: int) -> int:
    """Apply `entry &= mask` to [page, end), and clear entries that keep no bit of `valid`.

    Returns: how many entries in use were cleared.
    """
    keep, needed = _constants(mask, mask & valid)
    if page >> DIRECTORY_SHIFT == end - 1 >> DIRECTORY_SHIFT:
        leaf = tree.leaf(page)
        if not leaf:
            return 0
        tree.settle()
        lost = _mask(_view(tree, leaf, page, end), keep, needed)
        if lost:
            tree.arena.lose(leaf >> DIRECTORY_SHIFT, lost)
        return lost

    def change(entries: Entries) -> int:
        if entries.ndim > 1 and np.bitwise_and.reduce(entries.reshape(-1)) & needed:
            entries &= keep
            return 0  # all are in use and have a valid bit in common, the usual case
        return _mask(entries, keep, needed)

    return _change_range(tree, page, end, change)


def _mask(entries: Entries, keep: Entries, needed: Entries) -> int:
    # How many entries in use were cleared.
    still_valid = entries & needed
    number = count_used(still_valid)
    lost = 0
    if number < entries.size:
        lost = count_used(entries) - number
        if lost:
            np.copyto(entries, _ZERO, where=still_valid == _ZERO)
    entries &= keep
    return lost


@lru_cache(maxsize=64)
def _constants(*words: int) -> tuple[Entries, ...]:
    # The few masks that there are; numpy takes an array without dimensions twice as fast as an int.
    return tuple(np.array(word, np.uint64) for word in words)


def _change_range(tree: DirectoryTree, page: int, end: int, change: Change) -> int:
    tree.settle()
    if page >> DIRECTORY_SHIFT == end - 1 >> DIRECTORY_SHIFT:
        leaf = tree.leaf(page)
        return _change_view(tree, leaf >> DIRECTORY_SHIFT, _view(tree, leaf, page, end), change) if leaf else 0
    parts = _few_parts(tree, page, end)
    if parts is not None:
        return sum([_change_view(tree, part.row, part.view, change) for part in parts])
    ragged, _, rows = _split(tree, page, end)
    lost = sum([_change_view(tree, part.row, part.view, change) for part in ragged])
    emptied = []
    for piece, index in _pieces(rows, _CHANGE_ROWS):
        entries = tree.rows[index]
        lost_here = change(entries)
        if not isinstance(index, slice):
            tree.rows[index] = entries
        if lost_here:
            used = np.count_nonzero(entries, axis=1)
            tree.counts[index] = used
            emptied.append(rows[piece][used == 0])
            lost += lost_here
    if emptied:
        tree.arena.drop_all_empty(np.concatenate(emptied))
    return lost


def _change_view(tree: DirectoryTree, row: int, view: Entries, change: Change) -> int:
    lost = change(view)
    if lost:
        tree.arena.lose(row, lost)
    return lost
