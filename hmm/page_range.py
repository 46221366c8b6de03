"""Range operations of a page table: whole directories at a time.

A range is the part of a leaf at its beginning, whole leaves, and the part of a leaf at its end. Whole leaves
are rows of the arena, and one gather or scatter of rows moves all of them at the speed of memory, wherever
they lie in the arena. A range of few leaves is done leaf by leaf instead, since a vector step costs more than
a leaf; and what needs temporaries goes in pieces that stay in the cache.

Positions are page numbers; [page, end) is not empty and lies in the table, which the caller has checked.

**Source**: the hmm_pt patch of the 2015 series for what each operation does to the directory counts.

**Invariants**: after each function all counts are exact and no empty directory is left but the root and held
ones; a function that raises has changed nothing.

**Absent**: single pages and scattered pages; see `hmm.page_table`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from hmm.directory_arena import Offsets
from hmm.directory_tree import DirectoryTree, Pages
from hmm.page_geometry import DIRECTORY_ENTRIES, DIRECTORY_MASK, DIRECTORY_SHIFT
from hmm.units import PAGE_SHIFT, Entries

__all__ = ["clear_range", "fill_range", "read_range", "update_range", "valid_in_range"]

_FEW_LEAVES = 8  # up to here leaf by leaf is faster
_PIECE_ROWS = 64  # 2^15 pages
_FILL_ROWS = 512
_PAGES_TO_ADDRESS = np.uint64(PAGE_SHIFT)


class _Edge:
    """Part of one leaf: its first page, its row, a view of its entries."""

    __slots__ = ("page", "row", "view")

    def __init__(self, tree: DirectoryTree, leaf: int, page: int, end: int) -> None:
        self.page = page
        self.row = leaf >> DIRECTORY_SHIFT
        self.view = tree.entries[leaf | page & DIRECTORY_MASK : (leaf | end - 1 & DIRECTORY_MASK) + 1]


def _is_few(page: int, end: int) -> bool:
    return (end - 1 >> DIRECTORY_SHIFT) - (page >> DIRECTORY_SHIFT) < _FEW_LEAVES


def _parts(tree: DirectoryTree, page: int, end: int) -> Iterator[_Edge]:
    """What there is of [page, end), leaf by leaf. The caller may free the leaf that it was given."""
    while True:
        page, leaf = tree.next_leaf(page, end)
        if not leaf:
            return
        stop = min((page | DIRECTORY_MASK) + 1, end)
        yield _Edge(tree, leaf, page, stop)
        page = stop


def _split(tree: DirectoryTree, page: int, end: int) -> tuple[list[_Edge], Pages, Offsets]:
    """What there is of [page, end): the ragged parts, and the numbers and rows of whole leaves."""
    numbers, offsets = tree.leaves(page, end)
    edges: list[_Edge] = []
    if numbers.size and page & DIRECTORY_MASK and numbers[0] == page >> DIRECTORY_SHIFT:
        edges.append(_Edge(tree, int(offsets[0]), page, (page | DIRECTORY_MASK) + 1))
        numbers, offsets = numbers[1:], offsets[1:]
    if numbers.size and end & DIRECTORY_MASK and numbers[-1] == end >> DIRECTORY_SHIFT:
        edges.append(_Edge(tree, int(offsets[-1]), end & ~DIRECTORY_MASK, end))
        numbers, offsets = numbers[:-1], offsets[:-1]
    return edges, numbers, offsets >> DIRECTORY_SHIFT


def _row_index(rows: Offsets) -> slice | Offsets:
    """Rows as an index of the arena: a slice, hence a view, when they lie one after the other."""
    first, number = int(rows[0]), rows.size
    if int(rows[-1]) - first == number - 1 and (number <= 2 or bool((rows[1:] - rows[:-1] == 1).all())):
        return slice(first, first + number)
    return rows


def read_range(tree: DirectoryTree, page: int, end: int, out: Entries) -> None:
    """Copy the entries of [page, end) to `out`, uint64[end - page], C-contiguous; 0 where there is none."""
    if _is_few(page, end):
        out[:] = 0
        for part in _parts(tree, page, end):
            out[part.page - page : part.page - page + part.view.size] = part.view
        return
    edges, numbers, rows = _split(tree, page, end)
    first, stop = page + DIRECTORY_MASK >> DIRECTORY_SHIFT, end >> DIRECTORY_SHIFT
    whole = out[(first << DIRECTORY_SHIFT) - page : (stop << DIRECTORY_SHIFT) - page].reshape(
        -1, DIRECTORY_ENTRIES
    )
    if rows.size == stop - first:
        np.take(tree.rows, rows, axis=0, out=whole, mode="clip")  # any other mode copies `out` first
    else:
        whole[:] = 0
        for at in range(0, rows.size, _PIECE_ROWS):
            whole[numbers[at : at + _PIECE_ROWS] - first] = tree.rows[rows[at : at + _PIECE_ROWS]]
    out[: (first << DIRECTORY_SHIFT) - page] = 0
    out[(stop << DIRECTORY_SHIFT) - page :] = 0
    for edge in edges:
        out[edge.page - page : edge.page - page + edge.view.size] = edge.view


def valid_in_range(tree: DirectoryTree, page: int, end: int) -> tuple[Entries, Entries]:
    """The entries in use of [page, end): uint64[n] addresses in bytes, ascending, and uint64[n] entries."""
    tree.settle()
    if _is_few(page, end):
        return _collect([(part.page, part.view) for part in _parts(tree, page, end)])
    edges, numbers, rows = _split(tree, page, end)
    head = [(edge.page, edge.view) for edge in edges if edge.page == page]
    tail = [(edge.page, edge.view) for edge in edges if edge.page != page]
    # One allocation for the whole result: fresh memory costs more than the walk.
    number = int(tree.counts.take(rows).sum()) + sum(edge.view.size for edge in edges)
    addresses, entries = np.empty(number, np.uint64), np.empty(number, np.uint64)
    filled = 0
    pieces = (
        _collect_rows(tree, numbers[at : at + _PIECE_ROWS], rows[at : at + _PIECE_ROWS])
        for at in range(0, rows.size, _PIECE_ROWS)
    )
    for some_addresses, some_entries in (_collect(head), *pieces, _collect(tail)):
        stop = filled + some_entries.size
        addresses[filled:stop] = some_addresses
        entries[filled:stop] = some_entries
        filled = stop
    return addresses[:filled], entries[:filled]


def _collect(views: list[tuple[int, Entries]]) -> tuple[Entries, Entries]:
    addresses, entries = [], []
    for page, view in views:
        positions = view.nonzero()[0]
        entries.append(view[positions])
        positions += page
        addresses.append(positions.view(np.uint64) << _PAGES_TO_ADDRESS)
    if len(views) == 1:
        return addresses[0], entries[0]
    empty = np.empty(0, np.uint64)
    return np.concatenate([empty, *addresses]), np.concatenate([empty, *entries])


def _collect_rows(tree: DirectoryTree, numbers: Pages, rows: Offsets) -> tuple[Entries, Entries]:
    entries = tree.rows[_row_index(rows)].reshape(-1)
    positions = entries.nonzero()[0]
    if positions.size < entries.size:
        entries = entries[positions]
    pages = numbers[positions >> DIRECTORY_SHIFT]
    pages <<= DIRECTORY_SHIFT
    positions &= DIRECTORY_MASK
    pages |= positions
    pages <<= PAGE_SHIFT
    return pages.view(np.uint64), entries


def clear_range(tree: DirectoryTree, page: int, end: int) -> int:
    """Clear [page, end) and free what becomes empty; the number of entries that were in use."""
    tree.settle()
    if _is_few(page, end):
        return sum(_clear_part(tree, part) for part in _parts(tree, page, end))
    edges, _, rows = _split(tree, page, end)
    cleared = sum(_clear_part(tree, edge) for edge in edges)
    return cleared + _clear_rows(tree, rows)


def _clear_part(tree: DirectoryTree, part: _Edge) -> int:
    used = int(np.count_nonzero(part.view))
    if used:
        part.view[:] = 0
        _lose(tree, part.row, used)
    return used


def _lose(tree: DirectoryTree, row: int, number: int) -> None:
    count = tree.arena.count
    count[row] -= number
    if not count[row]:
        tree.arena.drop_if_empty(row)


def _clear_rows(tree: DirectoryTree, rows: Offsets) -> int:
    if not rows.size:
        return 0
    cleared = int(tree.counts.take(rows).sum())
    index = _row_index(rows)
    tree.rows[index] = 0
    tree.counts[index] = 0
    tree.arena.drop_all_empty(rows)
    return cleared


def fill_range(tree: DirectoryTree, page: int, end: int, source: int | Entries) -> None:
    """Store entries in all of [page, end); zeros clear.

    Args:
        source: one entry for all pages, not 0, or uint64[end - page].

    Raises:
        OutOfFramesError: too few directories left; nothing was changed (ENOMEM).
    """
    tree.settle()
    if page >> DIRECTORY_SHIFT == end - 1 >> DIRECTORY_SHIFT:
        _fill_part(tree, page, end, source)
        return
    if isinstance(source, int) or source.all():
        tree.require_range(page, end)
    else:
        positions = source.nonzero()[0]
        tree.require_leaves(positions + page >> DIRECTORY_SHIFT)
    at = page
    while at < end:
        stop = min((at | DIRECTORY_MASK) + 1, end)
        if at & DIRECTORY_MASK or stop & DIRECTORY_MASK:
            _fill_part(tree, at, stop, source if isinstance(source, int) else source[at - page : stop - page])
        else:
            stop = min(((at >> DIRECTORY_SHIFT) + _FILL_ROWS) << DIRECTORY_SHIFT, end & ~DIRECTORY_MASK)
            _fill_rows(tree, at, stop, source if isinstance(source, int) else source[at - page : stop - page])
        at = stop


def _fill_part(tree: DirectoryTree, page: int, end: int, source: int | Entries) -> None:
    # Within one leaf.
    used = end - page if isinstance(source, int) else int(np.count_nonzero(source))
    leaf = tree.leaf(page)
    if not leaf:
        if not used:
            return
        leaf = tree.leaf_allocate(page)
    part = _Edge(tree, leaf, page, end)
    count = tree.arena.count
    if count[part.row]:
        used -= int(np.count_nonzero(part.view))
    part.view[:] = source
    _lose(tree, part.row, -used)


def _fill_rows(tree: DirectoryTree, page: int, end: int, source: int | Entries) -> None:
    # Whole leaves.
    first, stop = page >> DIRECTORY_SHIFT, end >> DIRECTORY_SHIFT
    numbers = np.arange(first, stop)
    if isinstance(source, int):
        index = _row_index(tree.leaves_allocate(numbers) >> DIRECTORY_SHIFT)
        tree.rows[index] = source
        tree.counts[index] = DIRECTORY_ENTRIES
        return
    block = source.reshape(-1, DIRECTORY_ENTRIES)
    if np.count_nonzero(source) == source.size:
        index = _row_index(tree.leaves_allocate(numbers) >> DIRECTORY_SHIFT)
        tree.rows[index] = block
        tree.counts[index] = DIRECTORY_ENTRIES
        return
    used = np.count_nonzero(block, axis=1)
    present, offsets = tree.leaves(page, end)
    emptied = offsets[used[present - first] == 0] >> DIRECTORY_SHIFT
    filled = used.nonzero()[0]
    if filled.size:
        rows = tree.leaves_allocate(numbers[filled]) >> DIRECTORY_SHIFT
        tree.rows[rows] = block[filled]
        tree.counts[rows] = used[filled]
    _clear_rows(tree, emptied)


def update_range(tree: DirectoryTree, page: int, end: int, function: Callable[[Entries], object]) -> int:
    """Let `function` change the entries of [page, end) in place, many at a time, and free what becomes empty.

    Args:
        function: gets uint64 arrays, of one or two dimensions, that also hold zeros, which must stay zeros.
            It must not raise and not use the table.

    Returns: how many entries in use became zero.
    """
    tree.settle()
    if _is_few(page, end):
        return sum(_update_part(tree, part, function) for part in _parts(tree, page, end))
    edges, _, rows = _split(tree, page, end)
    lost = sum(_update_part(tree, edge, function) for edge in edges)
    emptied: list[Offsets] = []
    for at in range(0, rows.size, _PIECE_ROWS):
        piece = rows[at : at + _PIECE_ROWS]
        index = _row_index(piece)
        entries = tree.rows[index]
        function(entries)
        if not isinstance(index, slice):
            tree.rows[piece] = entries
        used_before = tree.counts.take(piece)
        before, after = int(used_before.sum()), int(np.count_nonzero(entries))
        if after != before:
            used = np.count_nonzero(entries, axis=1)
            tree.counts[piece] = used
            emptied.append(piece[used == 0])
            lost += before - after
    if emptied:
        tree.arena.drop_all_empty(np.concatenate(emptied))
    return lost


def _update_part(tree: DirectoryTree, part: _Edge, function: Callable[[Entries], object]) -> int:
    before = int(np.count_nonzero(part.view))
    function(part.view)
    lost = before - int(np.count_nonzero(part.view))
    if lost:
        _lose(tree, part.row, lost)
    return lost
