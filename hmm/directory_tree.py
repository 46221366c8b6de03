"""The radix tree over a directory arena: from addresses to directories.

Positions are page numbers (address >> PAGE_SHIFT) here, so that the end of a table of 64 bits is an ordinary
integer of numpy. A *leaf* is a directory of page entries, a leaf's *number* is page >> 9.

Three ways lead to leaves: one page at a time (`leaf()`, `next_leaf()`), all of a range (`leaves()`, level by
level with one gather each), and those of a batch of pages (`slots()`, one gather per level; levels that the
whole batch shares are walked once).

**Source**: the hmm_pt patch of the 2015 series (hmm_pt_iter_lookup(), hmm_pt_iter_walk(),
hmm_pt_iter_populate()).

**Invariants** (`check()`): an entry above the leaves is absent or names a directory that names it as its
parent; no directory is linked twice; the count of a directory is its number of entries in use, and is not
zero unless the directory is the root or held.

**Absent**: what a page entry means; the bounds of the table, which the caller has checked.

Differs: the posted walk, on meeting an absent entry, went on at the end of the *directory that contains* it
(a 2 MiB hole skipped up to 1 GiB), and so could miss live directories, hence invalidations. See
`after_hole()`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hmm.ascending import distinct
from hmm.directory_arena import ROOT, DirectoryArena, Offsets, count_used
from hmm.page_geometry import DIRECTORY_ENTRIES, DIRECTORY_MASK, DIRECTORY_SHIFT, Geometry
from hmm.pte import pde_from_row, pde_row
from hmm.units import PAGE_SHIFT

__all__ = ["DirectoryTree", "Pages", "after_hole"]

Pages = npt.NDArray[np.int64]

_NONE = np.empty(0, np.int64)
_INDEX_MASK = np.array(DIRECTORY_MASK)  # numpy takes an array without dimensions twice as fast as an int
_IN_ORDER_PAGES = 1024  # from here on it pays to see whether the directories of a batch lie in order
_GATHER_ROWS = 256  # directories looked at together: 1 MiB, which stays in the cache


def after_hole(page: int, shift: int, absent: int) -> int:
    """The first page behind a hole of `absent` entries, 2^shift pages each, from that of `page` on."""
    return ((page >> shift) + absent) << shift


class DirectoryTree:
    """Directories of a table, by page number.

    Attributes:
        arena: their memory. Its arrays are repeated here, for they never move and are used everywhere.
        llevel: the level of page entries.
        upper_shifts: per level above the leaves, log2 of the pages that an entry covers; root first.
    """

    __slots__ = (
        "_shifts",
        "arena",
        "counts",
        "entries",
        "four_levels",
        "geometry",
        "index",
        "llevel",
        "rows",
        "upper_shifts",
        "words",
    )

    def __init__(self, geometry: Geometry, max_directories: int) -> None:
        self.geometry = geometry
        self.arena = DirectoryArena(max_directories)
        self.upper_shifts = tuple(shift - PAGE_SHIFT for shift in geometry.shifts[:-1])
        self._shifts = tuple(np.array(shift) for shift in self.upper_shifts)
        self.four_levels = geometry.levels == 4
        self.llevel = geometry.llevel
        self.counts = self.arena.counts
        self.entries = self.arena.entries
        self.index = self.arena.index
        self.rows = self.arena.rows
        self.words = self.arena.words

    def settle(self) -> None:
        """Make all counts exact, also those of directories whose entries a walk's caller writes."""
        if self.arena.held:
            self.arena.settle()

    # -- one page

    def leaf(self, page: int) -> int:
        """Offset of the leaf that holds `page`, or NULL."""
        arena = self.arena
        if page >> DIRECTORY_SHIFT == arena.near:
            return arena.near_leaf
        words = self.words
        if self.four_levels:  # a process's address space: the same, unrolled
            offset = words[words[ROOT | page >> 27] | page >> 18 & 511]
            offset = words[offset | page >> 9 & 511]
        else:
            offset = ROOT
            for shift in self.upper_shifts:
                offset = words[offset | page >> shift & DIRECTORY_MASK]
        if offset:
            arena.near, arena.near_leaf = page >> DIRECTORY_SHIFT, offset
        return offset

    def absent_levels(self, page: int) -> int:
        """How many directories the way down to the leaf of `page` lacks, 0 to llevel."""
        words = self.words
        offset = ROOT
        for level, shift in enumerate(self.upper_shifts):
            offset = words[offset | page >> shift & DIRECTORY_MASK]
            if not offset:
                return len(self.upper_shifts) - level
        return 0

    def leaf_allocate(self, page: int) -> int:
        """Offset of the leaf that holds `page`, with the directories down to it allocated as needed.

        Raises:
            OutOfFramesError: no directories left; nothing was changed (ENOMEM).
        """
        arena, number = self.arena, page >> DIRECTORY_SHIFT
        if number == arena.near:
            return arena.near_leaf
        if arena.available < self.llevel:
            arena.require(self.absent_levels(page))
        arena.near_leaf = leaf = arena.allocate_path(page, self.upper_shifts)
        arena.near = number
        return leaf

    def next_leaf(self, page: int, end: int) -> tuple[int, int]:
        """Find the first page in [page, end) that has a leaf.

        Returns: the page and the offset of its leaf; (end, NULL) when there is none.

        Cost: O(levels) plus O(levels) per directory without a leaf that is met on the way; a hole inside a
        directory is one array scan, however long.
        """
        words = self.words
        if page < end and (leaf := self.leaf(page)):
            return page, leaf
        while page < end:
            offset = ROOT
            for shift in self.upper_shifts:
                slot = offset | page >> shift & DIRECTORY_MASK
                offset = words[slot]
                if not offset:
                    wanted = (end - 1 >> shift) - (page >> shift) + 1
                    page = after_hole(page, shift, self._absent_entries(slot, wanted))
                    break
            else:
                return page, offset
        return end, 0

    def _absent_entries(self, slot: int, wanted: int) -> int:
        # Absent entries from `slot` on in its directory, as far as somebody wants to know.
        behind = min((slot | DIRECTORY_MASK) + 1, slot + wanted)
        if behind - slot <= 2:
            return 1
        present = self.index[slot:behind].nonzero()[0]
        return int(present[0]) if present.size else behind - slot

    # -- a range

    def leaves(self, page: int, end: int) -> tuple[Pages, Offsets]:
        """The leaves that hold a page of [page, end), which reaches over more than one leaf.

        Returns: int64[n] leaf numbers (page >> 9), ascending, and int64[n] their offsets.

        Cost: O(directories met), one gather per level.
        """
        offset, level = self.shared_directory(page, end - 1, 0)
        first, last = (bound >> self.upper_shifts[level] for bound in (page, end - 1))
        children = self.index[(offset | first & DIRECTORY_MASK) : (offset | last & DIRECTORY_MASK) + 1]
        present = children.nonzero()[0]
        numbers, offsets = present + first, children[present]
        for shift in self.upper_shifts[level + 1 :]:
            numbers, offsets = self._children(numbers, offsets, page >> shift, end - 1 >> shift)
        return numbers, offsets

    def _children(self, numbers: Pages, offsets: Offsets, low: int, high: int) -> tuple[Pages, Offsets]:
        # The children, with numbers in [low, high], of the directories with these numbers and offsets.
        rows = self.index.reshape(-1, DIRECTORY_ENTRIES)
        found_numbers: list[Pages] = []
        found_offsets: list[Offsets] = []
        for at in range(0, offsets.size, _GATHER_ROWS):
            children = rows[offsets[at : at + _GATHER_ROWS] >> DIRECTORY_SHIFT].reshape(-1)
            present = children.nonzero()[0]
            found_offsets.append(children[present])
            parents = numbers[at : at + _GATHER_ROWS][present >> DIRECTORY_SHIFT]
            found_numbers.append(parents << DIRECTORY_SHIFT | present & DIRECTORY_MASK)
        if not found_numbers:
            return _NONE, _NONE
        numbers = np.concatenate(found_numbers)
        offsets = np.concatenate(found_offsets)
        start, stop = np.searchsorted(numbers, (low, high + 1))
        return numbers[start:stop], offsets[start:stop]

    def directories_at(self, level: int) -> Offsets:
        """Offsets of all directories at `level`, in address order. Cost: O(directories above)."""
        offsets = np.array([ROOT])
        for _ in range(level):
            children = self.index.reshape(-1, DIRECTORY_ENTRIES)[pde_row(offsets)]
            offsets = children[children != 0]
        return offsets

    # -- a batch of pages

    def slots(self, pages: Pages, low: int, high: int) -> Offsets:
        """Where the entries of pages are, as indices into `entries`; in the NULL directory without a leaf.

        Args:
            pages: int64[n], any order.
            low, high: the smallest and the largest of them, or wider bounds.

        Cost: one gather per level that the pages do not share.
        """
        return self.descend(pages, low, *self.shared_directory(low, high, pages.size))

    def shared_directory(self, low: int, high: int, number: int) -> tuple[int, int]:
        """The lowest directory that holds all of [low, high], as offset and level, for `descend()`.

        Directories that lie in order in the arena are as good as one; for many pages it pays to look.
        """
        offset, level = ROOT, 0
        for shift in self.upper_shifts:
            first = offset | low >> shift & DIRECTORY_MASK
            last = first + (high >> shift) - (low >> shift)
            if first != last and (number < _IN_ORDER_PAGES or not self._are_in_order(first, last)):
                break
            offset = self.words[first]
            level += 1
        return offset, level

    def _are_in_order(self, first: int, last: int) -> bool:
        # Whether the directories linked from slot to slot lie one after the other in the arena.
        if not self.words[first] or self.words[last] - self.words[first] != pde_from_row(last - first):
            return False
        linked = self.index[first : last + 1]
        return not np.count_nonzero(linked[1:] - linked[:-1] != DIRECTORY_ENTRIES)

    def descend(self, pages: Pages, low: int, offset: int, level: int) -> Offsets:
        """The slots of pages, int64[n], all of them in the directory at `offset` and `level`, as is `low`."""
        slots = self._first_slots(pages, low, offset, level)
        for below in range(level + 1, self.llevel + 1):
            self._next_slots(self.index.take(slots), below, pages, slots)
        return slots

    def slots_allocate(self, pages: Pages) -> tuple[Offsets, bool]:
        """The slots of pages, with directories allocated as needed.

        Args:
            pages: int64[n], n > 0, ascending; may repeat. The caller has required their directories.

        Returns: int64[n], and whether all of the leaves are new, hence empty.
        """
        low, high = pages.item(0), pages.item(-1)
        shared = tuple(shift for shift in self.upper_shifts if not (low ^ high) >> shift)
        offset, level = self.arena.allocate_path(low, shared), len(shared)
        slots, new = self._first_slots(pages, low, offset, level), False
        for below in range(level + 1, self.llevel + 1):
            offsets, new = self._children_allocate(slots, new)
            self._next_slots(offsets, below, pages, slots)
        return slots, new

    def _children_allocate(self, slots: Offsets, new: bool) -> tuple[Offsets, bool]:
        # The directories that are linked at slots of directories that are all `new` or not, allocated as needed,
        # and whether they are all new.
        there = 0
        if new:
            absent = distinct(slots)
        else:
            offsets: Offsets = self.index.take(slots)
            there = count_used(offsets)
            if there == offsets.size:
                return offsets, False
            absent = distinct(slots[offsets == 0] if there else slots)
        children = self.arena.new_children(absent)
        return children if absent.size == slots.size else self.index.take(slots), not there

    def _first_slots(self, pages: Pages, low: int, offset: int, level: int) -> Offsets:
        # Where the entries for pages are in the one directory that holds all of them. They agree in the bits above
        # its index, so that one addition puts the index into the directory, with these bits taken away.
        if level == self.llevel:
            shift, slots = 0, pages.copy()
        else:
            shift, slots = self.upper_shifts[level], pages >> self._shifts[level]
        slots += np.array(offset - (low >> shift & ~DIRECTORY_MASK))
        return slots

    def _next_slots(self, offsets: Offsets, level: int, pages: Pages, out: Offsets) -> None:
        # Where the entries for pages are in directories of `level`, one for each page.
        if level == self.llevel:
            np.bitwise_and(pages, _INDEX_MASK, out)
        else:
            np.right_shift(pages, self._shifts[level], out)
            out &= _INDEX_MASK
        out |= offsets

    def leaves_allocate(self, page: int, end: int) -> Offsets:
        """Offsets of all leaves of [page, end), which begins and ends with a leaf, allocated as needed.

        Args:
            page, end: of one directory above the leaves. The caller has required the directories.

        Returns: int64[n], a view.
        """
        offset = self.arena.allocate_path(page, self.upper_shifts[:-1])
        first = offset | page >> DIRECTORY_SHIFT & DIRECTORY_MASK
        offsets = self.index[first : first + (end - page >> DIRECTORY_SHIFT)]
        there = np.count_nonzero(offsets)
        if not there:
            self.arena.new_siblings(first, offsets.size)
        elif there < offsets.size:
            self.arena.new_children((offsets == 0).nonzero()[0] + first)
        return offsets

    # -- how many directories a request needs

    def require_range(self, page: int, end: int) -> None:
        """Check that leaves for all of [page, end), not empty, can be allocated; raises as `require()`."""
        if not self.has_room(page, end):
            self.arena.require(self.missing_in_range(page, end))

    def has_room(self, page: int, end: int) -> bool:
        """Whether [page, end) could be allocated even if none of it were there."""
        at_most = 0
        for shift in self.upper_shifts:
            at_most += (end - 1 >> shift) - (page >> shift) + 1
        return at_most <= self.arena.available

    def missing_in_range(self, page: int, end: int) -> int:
        """Directories that leaves for all of [page, end), not empty, need beyond those that are there.

        Returns: the exact number, or for a range that no arena could hold a lower bound that none can
            satisfy.
        """
        first, last = page >> DIRECTORY_SHIFT, end - 1 >> DIRECTORY_SHIFT
        if first == last:
            return self.absent_levels(page)
        if last - first >= 2 * self.arena.max_directories:
            return last - first
        return self.missing(np.arange(first, last + 1))

    def require_leaves(self, pages: Pages) -> None:
        """Check that the leaves of these pages, ascending, can be allocated; raises as `require()`."""
        if pages.size * len(self.upper_shifts) > self.arena.available:
            self.arena.require(self.missing(distinct(pages >> DIRECTORY_SHIFT)))

    def missing(self, numbers: Pages) -> int:
        """Directories to allocate for the leaves with these numbers, which are distinct and ascending."""
        pages = numbers << DIRECTORY_SHIFT
        offsets = np.full(pages.size, ROOT)
        total = 0
        for shift in self.upper_shifts:
            # Below an absent directory the walk stays in the NULL directory, and everything is absent.
            offsets = self.index.take(offsets | pages >> shift & DIRECTORY_MASK)
            total += distinct(pages[offsets == 0] >> shift).size
        return total

    # -- checking

    def check(self) -> None:
        """Assert the invariants of this module and of the arena. Cost: O(directories)."""
        arena = self.arena
        self.settle()
        in_use = np.zeros(arena.top, np.bool_)
        may_be_empty = np.zeros(arena.top, np.bool_)
        may_be_empty[[pde_row(ROOT), *arena.held]] = True
        rows = np.array([pde_row(ROOT)])
        for level in range(self.geometry.levels):
            assert not in_use[rows].any(), "a directory is linked twice"
            in_use[rows] = True
            if level < self.geometry.llevel:
                rows = self._checked_children(rows)
        rows = in_use.nonzero()[0]
        used = np.count_nonzero(self.rows[rows], axis=1)
        assert (used == self.counts[rows]).all(), (rows, used, self.counts[rows])
        assert (may_be_empty[rows] | (used > 0)).all(), "an empty directory is linked"
        near, arena.near = arena.near, -1
        assert near == -1 or self.leaf(near << DIRECTORY_SHIFT) == arena.near_leaf, "the leaf found last is another"
        self._check_end()
        arena.check(in_use)

    def _checked_children(self, rows: Pages) -> Pages:
        parents, positions = self.rows[rows].nonzero()
        slots = pde_from_row(rows[parents]) + positions
        children: Offsets = self.index[slots]
        assert not (children & DIRECTORY_MASK).any(), "an entry names no directory"
        assert (children < pde_from_row(self.arena.top)).all(), "an entry names no directory"
        # The parent that a directory names is one place, so that it is linked at most once too.
        assert (self.arena.parent_slots(children) == slots).all(), "a directory names another parent"
        return pde_row(children)

    def _check_end(self) -> None:
        # Nothing is in use behind the last address, in any directory on the way to it.
        last_page = self.geometry.last >> PAGE_SHIFT
        offset = ROOT
        for shift in (*self.upper_shifts, 0):
            slot = offset | last_page >> shift & DIRECTORY_MASK
            assert not self.entries[slot + 1 : offset + DIRECTORY_ENTRIES].any(), "in use behind the end"
            offset = self.words[slot]
            if not offset:
                break
