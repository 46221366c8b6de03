"""The page table: a radix tree of 512-entry directories, from addresses to 64-bit entries.

It is the `hmm_pt` of the 2015 series, with the calls that its review asked for. One class serves the CPU's
tables, the mirrors' and the page caches of files (by offset), so an entry is any word here: 0 is *no entry*,
everything else is *in use* and keeps its directory alive, whether some owner calls it valid or not. Addresses
are in bytes; ranges are half-open and made of whole pages; arrays are uint64.

    many pages of a range    walk populate entries chunks    what to do with them is the caller's
                             populated parts holds
                             read view valid common either   done here, at the speed of memory
                             require fill clear zap
                             apply_mask update
    scattered pages          lookup store clear_many
    one page                 get set
    several tables at once   cursor

**Source**: the hmm_pt patch of the 2015 series ("HMM: add HMM page table") and Mark Hairgrove's review of it.

**Invariants** (`check()`): those of `hmm.directory_tree` and `hmm.directory_arena`. A call that raises has
changed nothing.

**Absent**: the meaning of entries (`hmm.pte`, `hmm.cpu_pte`), locks, atomic bit operations (one thread at a
time uses a table), huge entries above the leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

from hmm.directory_arena import ROOT, count_used
from hmm.directory_tree import DirectoryTree
from hmm.errors import InvalidRequestError
from hmm.page_batch import clear_addresses, lookup_addresses, store_addresses
from hmm.page_geometry import DIRECTORY_ENTRIES, DIRECTORY_MASK, DIRECTORY_SHIFT, LAST_MAX, Geometry
from hmm.page_range import (
    any_bits,
    clear_range,
    common_bits,
    fill_range,
    mask_range,
    read_range,
    update_range,
    valid_in_range,
    view_range,
    zap_range,
)
from hmm.page_walk import Cursor, Run, populate_runs, walk_runs
from hmm.units import PAGE_SHIFT, PAGE_SIZE, PIECE_BYTES, PIECE_PAGES, ULONG_MAX, Address, AddressRange, Entries

__all__ = ["Cursor", "PageTable", "Run", "TableStatistics"]

_WORD = np.dtype(np.uint64)
_WITHIN_PAGE = PAGE_SIZE - 1
_SCALAR_PAGES = 8  # so many pages one by one cost less than one vector step


@dataclass(frozen=True, slots=True)
class TableStatistics:
    """Size of a table.

    Attributes:
        directories: per level, root first.
        entries: page entries in use.
        held: directories held by walks and cursors.
        directories_max: limit for all levels together.
        memory_bytes: see `PageTable.memory_bytes`.
    """

    directories: tuple[int, ...]
    entries: int
    held: int
    directories_max: int
    memory_bytes: int


class PageTable:
    """A page table for the addresses 0 to `last`.

    Attributes:
        geometry: levels, shifts, spans.
    """

    __slots__ = ("__weakref__", "_arena", "_end", "_four_levels", "_tree", "_words", "geometry")

    def __init__(self, last: Address, *, max_directories: int = 1 << 18) -> None:
        """Make an empty table.

        Args:
            last: last address, inclusive; rounded up to the end of its page; at most 2^64 - 1.
            max_directories: limit of directories, the root included. Address space for all of them is
                reserved, memory is taken when they are used.

        Raises:
            InvalidRequestError: `last` or `max_directories` is out of range (EINVAL).
            OutOfFramesError: no address space left for so many directories (ENOMEM).

        Cost: some tens of microseconds.
        """
        if not 0 <= last <= LAST_MAX or max_directories < 1:
            raise InvalidRequestError(f"no page table has last={last:#x}, max_directories={max_directories}")
        self.geometry = Geometry.covering(last)
        self._tree = DirectoryTree(self.geometry, max_directories)
        self._arena = self._tree.arena
        self._words = self._tree.words
        self._end = self.geometry.end
        self._four_levels = self.geometry.levels == 4

    # -- geometry

    @property
    def last(self) -> Address:
        """Last address of the table, the last byte of a page."""
        return self.geometry.last

    @property
    def llevel(self) -> int:
        """The level of page entries; 0 is the root."""
        return self.geometry.llevel

    @property
    def shifts(self) -> tuple[int, ...]:
        """Per level, the lowest address bit of its index."""
        return self.geometry.shifts

    @property
    def root_entries(self) -> int:
        """Number of entries of the root that can be in use."""
        return self.geometry.root_entries

    def _pages(self, start: Address, end: Address) -> tuple[int, int]:
        if (start | end) & _WITHIN_PAGE or not 0 <= start <= end <= self._end:
            raise InvalidRequestError(f"[{start:#x}, {end:#x}) is not a range of pages of the table", address=start)
        return start >> PAGE_SHIFT, end >> PAGE_SHIFT

    # -- walks

    def walk(self, start: Address, end: Address) -> Generator[Run, None, None]:
        """Iterate over what exists in a range (`hmm_pt_iter_next()` of the review).

        Gives one run per directory that holds entries in use, ascending, clipped to the range. The caller may
        write the run's entries, and may change the table between and during steps; what is ahead is seen as
        it is when the walk gets there. A run is valid until the next step. The walk holds one directory, and
        lets go by itself when it ends, is broken off, or an exception passes.

        Raises:
            InvalidRequestError: not a range of pages of the table (EINVAL).

        Cost: O(directories met), a few microseconds each; O(levels) to cross a hole.
        """
        return walk_runs(self._tree, *self._pages(start, end))

    def populate(self, start: Address, end: Address) -> Generator[Run, None, None]:
        """Iterate over all pages of a range, allocating (`hmm_pt_iter_next_alloc()` of the review).

        As `walk()`, but the runs cover the range without gaps. A directory that has gained no entry when the
        walk moves on is freed.

        Raises:
            InvalidRequestError: not a range of pages of the table (EINVAL).
            OutOfFramesError: too few directories left for all of the range, found at the first step, before
                anything is allocated (ENOMEM). Later steps can raise it only if the caller itself used
                directories up.

        Cost: O(directories), a few microseconds each.
        """
        return populate_runs(self._tree, *self._pages(start, end))

    def entries(self, start: Address, end: Address) -> Iterator[tuple[Address, int]]:
        """Iterate over the entries in use of a range (`hmm_pt_iter_next(iter, &ptep)` of the review).

        Each directory is copied when the iteration reaches it: an entry may have been changed since.

        Returns: pairs (address in bytes, entry), ascending.

        Cost: O(directories met) + 0.1 µs per entry.
        """
        runs = map(Run.in_use, self.walk(start, end))
        return chain.from_iterable(
            zip(addresses.tolist(), entries.tolist(), strict=True) for addresses, entries in runs
        )

    def visit(self, start: Address, end: Address, callback: Callable[[Run], int | None]) -> int:
        """Call back for each run of `walk()`, for drivers (`hmm_pt_walk()`).

        Args:
            callback: may write the run's entries; a result that is not 0 or None ends the walk, as in
                mm_walk.

        Returns: the callback's last result, 0 when it was None.
        """
        for run in self.walk(start, end):
            result = callback(run)
            if result:
                return result
        return 0

    def cursor(self) -> Cursor:
        """A cursor at address 0, for walks of several tables in lock-step; a context manager."""
        return Cursor(self._tree)

    # -- ranges

    def read(self, start: Address, end: Address, out: Entries | None = None) -> Entries:
        """Copy the entries of a range.

        Args:
            out: C-contiguous uint64[npages] to write into instead of a new array.

        Returns: uint64[npages], 0 where there is no entry.

        Cost: that of copying memory.
        """
        page, stop = self._pages(start, end)
        if stop - page == 1 and out is None:
            return np.array((self.get(start),), np.uint64)
        out = _fitting(out, stop - page)
        if page < stop:
            read_range(self._tree, page, stop, out)
        return out

    def view(self, start: Address, end: Address) -> Entries | None:
        """The entries of a range as they lie in the table: for a look at once, before the table changes.

        Returns: uint64[npages], read-only; None where leaves lie apart, and the range has to be read.

        Cost: O(levels), and O(directories) of a range of many.
        """
        page, stop = self._pages(start, end)
        if page == stop:
            return np.empty(0, np.uint64)
        entries = view_range(self._tree, page, stop)
        if entries is not None:
            entries.flags.writeable = False
        return entries

    def common(self, start: Address, end: Address) -> int:
        """The bits that all entries of a range have; 0 when a page has no entry.

        Cost: that of reading memory.
        """
        page, stop = self._pages(start, end)
        if stop - page <= 1:
            return self.get(start) if page < stop else ULONG_MAX
        return common_bits(self._tree, page, stop)

    def either(self, start: Address, end: Address) -> int:
        """The bits that at least one entry of a range has.

        Cost: that of reading memory.
        """
        page, stop = self._pages(start, end)
        if stop - page <= 1:
            return self.get(start) if page < stop else 0
        return any_bits(self._tree, page, stop)

    def valid(self, start: Address, end: Address) -> tuple[Entries, Entries]:
        """The entries in use of a range: uint64[n] addresses in bytes, ascending, and uint64[n] entries.

        Cost: O(directories met) + O(n); for large ranges `chunks()` is faster, since its memory is reused.
        """
        page, stop = self._pages(start, end)
        if page == stop:
            return np.empty(0, np.uint64), np.empty(0, np.uint64)
        return valid_in_range(self._tree, page, stop)

    def chunks(self, start: Address, end: Address, step: int = PIECE_PAGES) -> Iterator[tuple[Entries, Entries]]:
        """The same in pieces of at most `step` pages; pieces without an entry are left out.

        The table may be changed between pieces.
        """
        return (self.valid(part.start, part.end) for part in self.populated(start, end, step))

    def populated(self, start: Address, end: Address, step: int = PIECE_PAGES) -> Iterator[AddressRange]:
        """The parts of a range that hold entries in use, ascending, each at most `step` pages long.

        A part begins in the directory of its first entry.  The table may be changed between parts.

        Cost: O(directories met); holes are skipped.
        """
        if step < 1:
            raise InvalidRequestError(f"a step of {step} pages does not advance")
        page, stop = self._pages(start, end)
        if stop - page == 1:
            return iter((AddressRange(start, end),) if self.get(start) else ())
        return self._populated(page, stop, step)

    def _populated(self, page: int, end: int, step: int) -> Iterator[AddressRange]:
        while (page := self._next_populated(page, end, step)) < end:
            stop = min((page // step + 1) * step, end)
            yield AddressRange(page << PAGE_SHIFT, stop << PAGE_SHIFT)
            page = stop

    def _next_populated(self, page: int, end: int, step: int) -> int:
        # From where on something of a leaf, cut at multiples of `step`, is in use; `end` when nothing is.
        tree = self._tree
        while True:
            page, leaf = tree.next_leaf(page, end)
            if not leaf:
                return end
            looked = min((page | DIRECTORY_MASK) + 1, (page // step + 1) * step, end)
            first = leaf | page & DIRECTORY_MASK
            if count_used(tree.entries[first : first + looked - page]):
                return page
            page = looked

    def parts(self, start: Address, end: Address) -> Iterable[AddressRange]:
        """All of a range that may hold entries in use: `populated()`, but what is one piece anyway comes as it is.

        Cost: O(1) for one piece, else as `populated()`.
        """
        if end - start <= PIECE_BYTES and start // PIECE_BYTES == (end - 1) // PIECE_BYTES:
            return (AddressRange(start, end),)
        return self.populated(start, end)

    def holds(self, start: Address, end: Address) -> bool:
        """Whether an entry of a range is in use.  Cost: O(directories met without one); holes are skipped."""
        page, stop = self._pages(start, end)
        if stop - page == 1:
            return self.get(start) != 0
        if page >> DIRECTORY_SHIFT == stop - 1 >> DIRECTORY_SHIFT and not self._tree.leaf(page):
            return False
        return self._next_populated(page, stop, DIRECTORY_ENTRIES) < stop

    def require(self, start: Address, end: Address) -> None:
        """Check that there are directories for entries in all of a range, for who has to know before he has them.

        Raises:
            OutOfFramesError: too few are left (ENOMEM).

        Cost: O(directories of the range).
        """
        page, stop = self._pages(start, end)
        if page < stop:
            self._tree.require_range(page, stop)

    def fill(self, start: Address, end: Address, entries: int | Entries, *, in_use: bool = False) -> None:
        """Store an entry in every page of a range.

        Args:
            entries: one for all pages, or uint64[npages]. Zeros clear; no directory is kept for zeros alone.
            in_use: the caller knows that none of them is 0, and they are not looked at.

        Raises:
            InvalidRequestError: not a range of pages of the table, or another number of entries (EINVAL).
            OutOfFramesError: too few directories left; nothing was changed (ENOMEM).

        Cost: that of copying memory.
        """
        page, stop = self._pages(start, end)
        if not isinstance(entries, int):
            _check_entries(entries, stop - page)
        elif entries:
            in_use = True
        else:
            self.clear(start, end)
            return
        if stop - page == 1:
            self.set(start, entries if isinstance(entries, int) else entries.item())
        elif page < stop:
            fill_range(self._tree, page, stop, entries, in_use=in_use)

    def clear(self, start: Address, end: Address) -> int:
        """Clear a range and free the directories that become empty.

        Returns: number of entries that were in use.

        Cost: that of writing memory.
        """
        page, stop = self._pages(start, end)
        if stop - page == 1:
            return 1 if self.set(start, 0) else 0
        return clear_range(self._tree, page, stop) if page < stop else 0

    def zap(self, start: Address, end: Address) -> Entries:
        """Clear a range and free the directories that become empty.

        Returns: uint64[n], the entries that were in use, in the order of their addresses.

        Cost: O(directories met) plus that of copying memory.
        """
        page, stop = self._pages(start, end)
        if stop - page <= 1:
            entry = self.set(start, 0) if page < stop else 0
            return np.array([entry] if entry else [], np.uint64)
        return zap_range(self._tree, page, stop)

    def update(self, start: Address, end: Address, function: Callable[[Entries], object]) -> int:
        """Let `function` change the entries of a range in place, many at a time.

        Args:
            function: gets uint64 arrays of one or two dimensions, which also hold zeros. Zeros must stay
                zeros; an entry that becomes zero is cleared. It must not raise, and not use the table.

        Returns: number of entries that were cleared.

        Cost: O(directories met) plus that of the function.
        """
        page, stop = self._pages(start, end)
        return update_range(self._tree, page, stop, function) if page < stop else 0

    def apply_mask(self, start: Address, end: Address, mask: int, valid: int = ULONG_MAX) -> int:
        """Apply `entry &= mask` to a range, as an event does to a mirror after its driver has answered.

        Args:
            mask: bits that stay; 0 clears.
            valid: an entry that keeps none of these bits is cleared.

        Returns: number of entries that were cleared.

        Cost: that of reading and writing memory. Source: hmm_mirror_update_pte() of the 2015 series.
        """
        if not mask & valid:
            return self.clear(start, end)
        page, stop = self._pages(start, end)
        if stop - page == 1:
            return self._mask_one(start, mask, valid)
        return mask_range(self._tree, page, stop, mask, valid) if page < stop else 0

    def _mask_one(self, address: Address, mask: int, valid: int) -> int:
        entry = self.get(address)
        if not entry:
            return 0
        entry &= mask
        kept = entry & valid != 0
        self.set(address, entry if kept else 0)
        return 0 if kept else 1

    # -- scattered pages

    def lookup(self, addresses: Entries, out: Entries | None = None) -> Entries:
        """The entries for many addresses.

        Args:
            addresses: uint64[n], any order, repetitions allowed; each stands for the page that holds it.
            out: C-contiguous uint64[n] to write into instead of a new array.

        Returns: uint64[n], 0 where there is no entry.

        Raises:
            InvalidRequestError: an address is not in the table (EINVAL).

        Cost: O(n), one gather per level that the addresses do not share; ascending order is kinder to the
            cache, and consecutive pages are read as a range.
        """
        out = _fitting(out, addresses.size)
        if addresses.size <= _SCALAR_PAGES:
            out[:] = [self.get(address) for address in addresses.tolist()]
            return out
        lookup_addresses(self._tree, addresses, out)
        return out

    def store(self, addresses: Entries, entries: int | Entries) -> Entries:
        """Store entries for many pages.

        Args:
            addresses: uint64[n], each in another page; ascending order is the fast case.
            entries: one for all, or uint64[n]. Zeros clear.

        Returns: uint64[n], the entries before.

        Raises:
            InvalidRequestError: an address is not in the table, or two are in one page (EINVAL).
            OutOfFramesError: too few directories left; nothing was changed (ENOMEM).

        Cost: O(n), one gather per level; O(n log n) when the addresses are not ascending; consecutive pages are
            stored as a range.
        """
        if not isinstance(entries, int):
            _check_entries(entries, addresses.size)
        elif not entries:
            return self.clear_many(addresses)
        if addresses.size <= _SCALAR_PAGES:
            few = self._few_pages(addresses)
            if len(few) * self.llevel <= self._tree.arena.available:
                words = [entries] * len(few) if isinstance(entries, int) else entries.tolist()
                return np.array(list(map(self.set, few, words)), np.uint64)
        return store_addresses(self._tree, addresses, entries)

    def clear_many(self, addresses: Entries) -> Entries:
        """Clear many pages and free the directories that become empty.

        Args:
            addresses: uint64[n], each in another page; ascending order is the fast case.

        Returns: uint64[n], the entries before, 0 where there was none.

        Raises:
            InvalidRequestError: an address is not in the table, or two are in one page (EINVAL).
        """
        if addresses.size <= _SCALAR_PAGES:
            return np.array([self.set(page, 0) for page in self._few_pages(addresses)], np.uint64)
        return clear_addresses(self._tree, addresses)

    def _few_pages(self, addresses: Entries) -> list[Address]:
        few: list[Address] = addresses.tolist()
        if len({address >> PAGE_SHIFT for address in few}) < len(few):
            raise InvalidRequestError("two addresses are in one page")
        if few:
            self.geometry.check(max(few))
        return few

    # -- one page

    def get(self, address: Address) -> int:
        """The entry for the page of `address`, 0 when there is none.

        Raises:
            InvalidRequestError: `address` is not in the table (EINVAL).
        """
        if not 0 <= address < self._end:
            self.geometry.check(address)
        words, arena, number = self._words, self._arena, address >> 21
        if number == arena.near:
            return words[arena.near_leaf | address >> 12 & 511]
        if self._four_levels:  # as DirectoryTree.leaf()
            leaf = words[words[words[ROOT | address >> 39] | address >> 30 & 511] | number & 511]
            if leaf:
                arena.near, arena.near_leaf = number, leaf
            return words[leaf | address >> 12 & 511]
        page = address >> PAGE_SHIFT
        return words[self._tree.leaf(page) | page & DIRECTORY_MASK]

    def set(self, address: Address, entry: int) -> int:
        """Store the entry for the page of `address`; 0 clears, and frees directories that become empty.

        Returns: the entry before.

        Raises:
            InvalidRequestError: `address` is not in the table (EINVAL).
            OutOfFramesError: no directories left; nothing was changed (ENOMEM).
        """
        if not 0 <= address < self._end:
            self.geometry.check(address)
        page = address >> PAGE_SHIFT
        tree = self._tree
        leaf = tree.leaf(page)
        if not leaf:
            if not entry:
                return 0
            leaf = tree.leaf_allocate(page)
        slot = leaf | page & DIRECTORY_MASK
        words = self._words
        old = words[slot]
        words[slot] = entry
        if entry:
            if not old:
                tree.arena.count[leaf >> DIRECTORY_SHIFT] += 1
        elif old:
            tree.arena.lose(leaf >> DIRECTORY_SHIFT, 1)
        return old

    # -- size and checking

    @property
    def directories(self) -> int:
        """Directories in use, the root included."""
        return self._tree.arena.directories

    @property
    def count(self) -> int:
        """Page entries in use. Cost: O(directories)."""
        tree = self._tree
        tree.settle()
        leaves = tree.directories_at(self.llevel)
        return int(tree.counts[leaves >> DIRECTORY_SHIFT].sum())

    @property
    def memory_bytes(self) -> int:
        """Memory that the table occupies: directories in use or kept for reuse, and their records."""
        return self._tree.arena.touched_bytes

    def directory_count(self, level: int) -> int:
        """Directories in use at `level`. Cost: O(directories)."""
        self._check_level(level)
        return int(self._tree.directories_at(level).size)

    def reference_count(self, address: Address, level: int) -> int:
        """What keeps the directory of `level` for `address`: its entries in use plus the walks that hold it.

        Returns: 0 when there is no such directory.

        Raises:
            InvalidRequestError: the table has no such address or level (EINVAL).
        """
        self.geometry.check(address)
        self._check_level(level)
        offset = ROOT
        for shift in self._tree.upper_shifts[:level]:
            offset = self._words[offset | address >> PAGE_SHIFT >> shift & DIRECTORY_MASK]
        row = offset >> DIRECTORY_SHIFT
        self._tree.settle()
        return self._tree.arena.count[row] + self._tree.arena.held.get(row, 0)

    def _check_level(self, level: int) -> None:
        if not 0 <= level <= self.llevel:
            raise InvalidRequestError(f"the table has no level {level}")

    def statistics(self) -> TableStatistics:
        """Sizes. Cost: O(directories)."""
        tree = self._tree
        levels = (tree.directories_at(level) for level in range(self.geometry.levels))
        return TableStatistics(
            directories=tuple(int(level.size) for level in levels),
            entries=self.count,
            held=len(tree.arena.held),
            directories_max=tree.arena.max_directories,
            memory_bytes=self.memory_bytes,
        )

    @property
    def is_empty(self) -> bool:
        """Whether nothing is in use.  Cost: O(1)."""
        arena = self._tree.arena
        return not arena.count[ROOT >> DIRECTORY_SHIFT] and not arena.held

    def in_use(self) -> tuple[Entries, Entries]:
        """All entries in use: as `valid` of everything.  Cost: O(directories + entries)."""
        return self.valid(0, self.last + 1)

    def image(self) -> object:
        """All of the table's state, as a value (`checked.HasImage`).  Cost: O(directories), a copy."""
        return self._tree.arena.image()

    def check(self) -> None:
        """Assert all invariants. Cost: O(directories)."""
        self._tree.check()


def _check_entries(entries: Entries, number: int) -> None:
    if entries.shape != (number,) or entries.dtype != _WORD:
        raise InvalidRequestError(f"entries must be uint64[{number}], not {entries.dtype}{entries.shape}")


def _fitting(out: Entries | None, number: int) -> Entries:
    if out is None:
        return np.empty(number, np.uint64)
    if out.shape != (number,) or out.dtype != _WORD or not out.flags.c_contiguous:
        raise InvalidRequestError(f"out must be a contiguous uint64[{number}]")
    return out
