"""Walks over a page table: what the review of the 2015 iterator asked for.

A walk gives *runs*: the entries of one leaf directory, clipped to the range, as a view that the caller may
read and write in place. Holes are skipped inside, at every level; no call returns an address that has
nothing. `walk()` gives the runs that hold an entry in use, `populate()` gives every page of the range,
allocating. A walk holds the one directory whose run it gave last, so that it cannot be freed or reused under
the caller, and lets go of it at the next step, at its end, when the caller breaks off, and when an exception
passes. What is above that directory is kept by its being linked. Between two steps the table may be changed
at will: each step starts at the root.

A `Cursor` is the 2015 iterator itself, one address at a time, for loops that go through several tables in
lock-step.

**Source**: Mark Hairgrove's review of "HMM: add HMM page table v2" (hmm_pt_iter_next(),
hmm_pt_iter_next_alloc()) and Jérôme Glisse's answer (hmm_pt_iter_walk(), hmm_pt_iter_populate()).

**Invariants**: a run is valid until the walk's next step; a directory that a walk populated and that gained
no entry is gone when the walk moves on; after a walk the directories it held are held no more.

**Absent**: whether an entry in use is valid in any sense; that is the caller's, as each caller has its own
rule.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple, Self

import numpy as np

from hmm.directory_arena import NULL, count_used
from hmm.directory_tree import DirectoryTree
from hmm.page_geometry import DIRECTORY_MASK
from hmm.units import PAGE_SHIFT, Address, Entries

__all__ = ["Cursor", "Run", "populate_runs", "walk_runs"]


class Run(NamedTuple):
    """Entries of consecutive pages, within one directory.

    Attributes:
        start: address of the first page, bytes.
        level: level of the directory in its table; page entries are at `llevel`.
        entries: uint64[n], a view; valid until the walk's next step.
    """

    start: Address
    level: int
    entries: Entries

    @property
    def end(self) -> Address:
        """First address after the run."""
        return self.start + (self.entries.size << PAGE_SHIFT)

    def in_use(self) -> tuple[Entries, Entries]:
        """The entries in use, copied: uint64[n] addresses in bytes, and uint64[n] entries."""
        positions = self.entries.nonzero()[0]
        addresses = positions.astype(np.uint64) << np.uint64(PAGE_SHIFT)
        addresses += np.uint64(self.start)
        return addresses, self.entries[positions]


def walk_runs(tree: DirectoryTree, page: int, end: int) -> Generator[Run, None, None]:
    """Runs of [page, end) that hold an entry in use, ascending; see `PageTable.walk()`."""
    arena, entries, llevel = tree.arena, tree.entries, tree.geometry.llevel
    while True:
        page, leaf = tree.next_leaf(page, end)
        if not leaf:
            return
        stop = min((page | DIRECTORY_MASK) + 1, end)
        run = entries[leaf | page & DIRECTORY_MASK : (leaf | stop - 1 & DIRECTORY_MASK) + 1]
        if count_used(run):
            arena.hold(leaf)
            try:
                yield Run(page << PAGE_SHIFT, llevel, run)
            finally:
                arena.release(leaf)
        page = stop


def populate_runs(tree: DirectoryTree, page: int, end: int) -> Generator[Run, None, None]:
    """Runs that cover all of [page, end), allocated; see `PageTable.populate()`."""
    if page == end:
        return
    arena, entries, llevel = tree.arena, tree.entries, tree.geometry.llevel
    promised = tree.missing_in_range(page, end)
    arena.reserve(promised)
    try:
        while page < end:
            taken = min(tree.absent_levels(page), promised)
            arena.unreserve(taken)
            promised -= taken
            leaf = tree.leaf_allocate(page)
            stop = min((page | DIRECTORY_MASK) + 1, end)
            run = entries[leaf | page & DIRECTORY_MASK : (leaf | stop - 1 & DIRECTORY_MASK) + 1]
            arena.hold(leaf)
            try:
                yield Run(page << PAGE_SHIFT, llevel, run)
            finally:
                freed = arena.release(leaf)
            if freed and stop < end:
                # Its parents may be gone too, and the next step needs those again that it shares.
                shared = sum([page >> shift == stop >> shift for shift in tree.upper_shifts])
                there = llevel - tree.absent_levels(stop)
                returned = min(max(shared - there, 0), arena.available)
                arena.reserve(returned)
                promised += returned
            page = stop
    finally:
        arena.unreserve(promised)


class Cursor:
    """One position in a table, for loops that walk several tables whose holes differ.

    The directory that the last `lookup()` or `populate()` found is held until another one is sought, or
    `close()`.
    """

    __slots__ = ("_leaf", "_next", "_page", "_tree")

    def __init__(self, tree: DirectoryTree) -> None:
        self._tree = tree
        self._page = 0
        self._next = 0
        self._leaf = NULL

    @property
    def address(self) -> Address:
        """Address of the page the cursor is at."""
        return self._page << PAGE_SHIFT

    @property
    def next_address(self) -> Address:
        """Where the last `lookup()` or `populate()` ends: the end of the view, or the end of the hole."""
        return self._next << PAGE_SHIFT

    def seek(self, address: Address) -> None:
        """Go to the page of `address`; lets go of the directory that is held unless the page is in it.

        Raises:
            InvalidRequestError: `address` is not in the table (EINVAL).
        """
        self._tree.geometry.check(address)
        page = address >> PAGE_SHIFT
        if page ^ self._page > DIRECTORY_MASK:
            self.close()
        self._page = self._next = page

    def lookup(self) -> Entries | None:
        """The entries from here to the end of their directory.

        Returns: uint64[n], n >= 1, a view that is valid until the cursor seeks another directory or is
            closed; None when there is no directory here. `next_address` then is the end of the hole, or of
            the table.
        """
        if not self._leaf:
            end = self._tree.geometry.end >> PAGE_SHIFT
            page, leaf = self._tree.next_leaf(self._page, end)
            if page != self._page:
                self._next = page
                return None
            self._hold(leaf)
        return self._view()

    def populate(self) -> Entries:
        """The same, with the directory allocated if there is none. It goes again if it gains no entry.

        Raises:
            OutOfFramesError: no directories left; nothing was changed (ENOMEM).
        """
        if not self._leaf:
            self._hold(self._tree.leaf_allocate(self._page))
        return self._view()

    def close(self) -> None:
        """Let go of the directory that is held. The cursor can be used again."""
        if self._leaf:
            leaf, self._leaf = self._leaf, NULL
            self._tree.arena.release(leaf)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hold(self, leaf: int) -> None:
        self._tree.arena.hold(leaf)
        self._leaf = leaf

    def _view(self) -> Entries:
        end = self._tree.geometry.end >> PAGE_SHIFT
        self._next = min((self._page | DIRECTORY_MASK) + 1, end)
        position = self._leaf | self._page & DIRECTORY_MASK
        return self._tree.entries[position : position + self._next - self._page]
