"""The memory that holds all directories of one page table.

Directories are the rows of one array, `uint64[n, 512]`. The array is reserved once, as memory that the
operating system commits when it is first written, by pages, behind the first 10 MiB by huge pages. So it
never moves under a view, and an unused table costs nothing. A directory is named by its *offset*, the index
of its first entry in the flat array; the offset is what a directory entry of the parent holds (`hmm.pte`,
pde). Offset 0 is therefore "no directory", and at the same time a real row: the NULL directory, all zero,
whose every entry leads back to itself. A walk over absent directories needs no branch; it ends in a zero.

A directory in use has a count of its entries in use (non-zero words), and is *held* by the walks that look at
it. When neither is left it is unlinked from its parent, which loses an entry, and so on upwards. The kernel
adds both numbers up in one reference count; here they are apart, because the number of entries is also used
as such.

Who holds a directory may write its entries directly. Its count is then derived again (`settle()`), at the
latest when it is let go.

**Source**: the hmm_pt patch of the 2015 series (hmm_pt_directory_ref(), hmm_pt_iter_unprotect_directory()).

**Invariants** (`check()`): the NULL directory is all zero; a directory without entries in use is all zero, so
that a free one needs no clearing; every row below `top` but the NULL directory is either in use or on the
free stack, once.

**Absent**: which address a directory serves. Locks: one thread at a time uses a table.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from contextlib import suppress
from typing import cast

import numpy as np
import numpy.typing as npt

from hmm.ascending import tally
from hmm.errors import OutOfFramesError
from hmm.page_geometry import DIRECTORY_ENTRIES, DIRECTORY_MASK, DIRECTORY_SHIFT
from hmm.units import PAGE_SIZE, Entries

__all__ = ["NULL", "ROOT", "DirectoryArena", "Offsets", "count_used"]

Offsets = npt.NDArray[np.int64]

count_used = cast("Callable[[npt.ArrayLike], int]", np.count_nonzero)  # declared as np.intp, which it is not
"""How many of some entries are in use."""

NULL = 0
"""Offset of the NULL directory."""
ROOT = DIRECTORY_ENTRIES
"""Offset of the root directory."""
_ROOT_ROW = ROOT >> DIRECTORY_SHIFT

_MAP_NORESERVE = 0x4000  # not in Python 3.11's mmap module
_COUNT_BYTES = 4
_OFFSET_BYTES = 8
_SMALL_ROWS = 2560  # 10 MiB of directories: a huge page for the few behind them costs a fifth more at most


class DirectoryArena:
    """Directories of one table: their words, their counts, who holds them, and which are free.

    Attributes:
        entries: uint64[n * 512], all directories one after the other.
        index: the same memory as int64, for use as offsets (numpy casts an unsigned index array).
        rows: the same memory as uint64[n, 512].
        words: the same memory as a memoryview, four times faster for one word.
        counts: int32[n], entries in use of each row.
        count: `counts` as a memoryview.
        held: per row, how many walks hold it; few, so a dict.
        near, near_leaf: number and offset of the leaf that was found last (`DirectoryTree.leaf()`); the number is -1
            for none, and whenever a directory has been freed since.
    """

    __slots__ = (
        "_free",
        "_free_stack",
        "_nfree",
        "_parent",
        "_parents",
        "_peak",
        "_reserved",
        "_top",
        "count",
        "counts",
        "entries",
        "held",
        "index",
        "max_directories",
        "near",
        "near_leaf",
        "rows",
        "words",
    )

    def __init__(self, max_directories: int) -> None:
        assert max_directories >= 1, max_directories
        nrows = max_directories + 1
        counts_bytes = -(-nrows * _COUNT_BYTES // PAGE_SIZE) * PAGE_SIZE
        offsets_bytes = -(-nrows * _OFFSET_BYTES // PAGE_SIZE) * PAGE_SIZE
        rows_at = counts_bytes + 2 * offsets_bytes
        try:
            memory = mmap.mmap(-1, rows_at + nrows * PAGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        except (OSError, OverflowError) as error:  # more than there is, more than a size can say
            raise OutOfFramesError(f"no address space for {max_directories} directories") from error
        # A huge page per small table would make a thousand of them cost gigabytes; in a large one, scattered pages
        # are found in a third less time. A kernel without huge pages refuses the advice, and does not need it.
        with suppress(OSError):
            memory.madvise(mmap.MADV_NOHUGEPAGE)
            if nrows > _SMALL_ROWS:
                memory.madvise(mmap.MADV_HUGEPAGE, rows_at + _SMALL_ROWS * PAGE_SIZE)
        # Nobody closes the mapping: it goes with the last view of it.
        self.counts = np.frombuffer(memory, np.int32, nrows)
        self.count = self.counts.data
        self._parents: Offsets = np.frombuffer(memory, np.int64, nrows, counts_bytes)
        self._parent = self._parents.data
        self._free: Offsets = np.frombuffer(memory, np.int64, nrows, counts_bytes + offsets_bytes)
        self._free_stack = self._free.data
        self.entries: Entries = np.frombuffer(memory, np.uint64, nrows << DIRECTORY_SHIFT, rows_at)
        self.index: Offsets = self.entries.view(np.int64)
        self.rows: Entries = self.entries.reshape(nrows, DIRECTORY_ENTRIES)
        self.words = self.entries.data
        self._nfree = 0
        self._top = self._peak = 2  # the NULL directory and the root are always there
        self._reserved = 0
        self.held: dict[int, int] = {}
        self.max_directories = max_directories
        self.near, self.near_leaf = -1, NULL

    # -- how much is used

    @property
    def directories(self) -> int:
        """Directories in use, the root included."""
        return self._top - 1 - self._nfree

    @property
    def available(self) -> int:
        """Directories that can still be allocated and are not promised to anybody."""
        return self.max_directories + 1 - self._top + self._nfree - self._reserved

    @property
    def touched_bytes(self) -> int:
        """Bytes that directories and their records occupy, in use or kept for the next time.

        The last huge page of a large table may reach beyond them.
        """
        return max(self._top, self._peak) * (PAGE_SIZE + _COUNT_BYTES + 2 * _OFFSET_BYTES)

    # -- allocation

    def require(self, ndirectories: int) -> None:
        """Check that so many directories can be allocated.

        Raises:
            OutOfFramesError: not enough left; nothing was changed (ENOMEM).
        """
        if ndirectories > self.max_directories + 1 - self._top + self._nfree - self._reserved:
            raise OutOfFramesError(
                f"{ndirectories} directories needed, {self.available} of {self.max_directories} left"
            )

    def reserve(self, ndirectories: int) -> None:
        """Promise directories to a walk that allocates as it goes; raises as `require()`."""
        self.require(ndirectories)
        self._reserved += ndirectories

    def unreserve(self, ndirectories: int) -> None:
        """Take back a promise, or the part of it that was not used."""
        self._reserved -= ndirectories

    def allocate_path(self, page: int, shifts: tuple[int, ...]) -> int:
        """Go down from the root, and allocate the directories that are not there; the caller has required them.

        Args:
            shifts: per step, the lowest bit of `page` in the index of the entry to follow.

        Returns: the offset of the last directory.
        """
        words, count, parent, free = self.words, self.count, self._parent, self._free_stack
        nfree, top, offset = self._nfree, self._top, ROOT
        for shift in shifts:
            slot = offset | page >> shift & DIRECTORY_MASK
            offset = words[slot]
            if not offset:
                if nfree:
                    nfree -= 1
                    offset = free[nfree]
                else:
                    offset = top << DIRECTORY_SHIFT
                    top += 1
                words[slot] = offset
                count[slot >> DIRECTORY_SHIFT] += 1
                parent[offset >> DIRECTORY_SHIFT] = slot
        assert top <= self.max_directories + 1, "directories were not required beforehand"
        self._nfree, self._top = nfree, top
        return offset

    def new_children(self, slots: Offsets) -> Offsets:
        """Allocate a directory for each of `slots`, distinct absent entries, parents in ascending groups.

        Returns: int64[n], their offsets; ascending where fresh memory is used.
        """
        offsets = self._take(slots)
        self.index[slots] = offsets
        first, last = slots.item(0) >> DIRECTORY_SHIFT, slots.item(-1) >> DIRECTORY_SHIFT
        if first == last:  # all below one directory
            self.count[first] += slots.size
        else:
            parents, gained = tally(slots >> DIRECTORY_SHIFT)
            self.counts[parents] += gained
        return offsets

    def new_siblings(self, slot: int, number: int) -> None:
        """Allocate a directory for each of so many absent entries of one parent, from `slot` on."""
        self.index[slot : slot + number] = self._take(np.arange(slot, slot + number))
        self.count[slot >> DIRECTORY_SHIFT] += number

    def _take(self, slots: Offsets) -> Offsets:
        # Directories that are about to be linked at slots.
        number = slots.size
        reused = min(number, self._nfree)
        top, fresh = self._top, number - reused
        assert top + fresh <= self.max_directories + 1, "directories were not required beforehand"
        offsets = np.arange(top << DIRECTORY_SHIFT, top + fresh << DIRECTORY_SHIFT, DIRECTORY_ENTRIES)
        self._parents[top : top + fresh] = slots[reused:]
        self._top = top + fresh
        if reused:
            # The stack was filled backwards, so that what was freed in order comes out in order.
            again = self._free[self._nfree - reused : self._nfree][::-1]
            self._parents[again >> DIRECTORY_SHIFT] = slots[:reused]
            self._nfree -= reused
            offsets = np.concatenate((again, offsets))
        return offsets

    # -- release

    def hold(self, offset: int) -> None:
        """Keep a directory from being freed until `release()`; the caller may write its entries."""
        row = offset >> DIRECTORY_SHIFT
        self.held[row] = self.held.get(row, 0) + 1

    def release(self, offset: int) -> bool:
        """Undo one `hold()`: count the entries again, and free the directory if nothing keeps it.

        Returns: True when the directory was freed.
        """
        row = offset >> DIRECTORY_SHIFT
        self.count[row] = used = count_used(self.rows[row])
        if self.held[row] > 1:
            self.held[row] -= 1
            return False
        del self.held[row]
        if used:
            return False
        self.drop_if_empty(row)
        return offset != ROOT

    def settle(self) -> None:
        """Derive the counts of held directories again, whose entries may have been written directly."""
        for row in self.held:
            self.count[row] = count_used(self.rows[row])

    def lose(self, row: int, number: int) -> None:
        """Count so many entries in use less of a directory, and free it if none is left and nobody holds it."""
        count = self.count
        count[row] -= number
        if not count[row]:
            self.drop_if_empty(row)

    def drop_if_empty(self, row: int) -> None:
        """Free a directory that has no entry in use and is not held, and so on towards the root."""
        words, count, parent, free = self.words, self.count, self._parent, self._free_stack
        held, nfree = self.held, self._nfree
        while not count[row] and row != _ROOT_ROW and row not in held:
            slot = parent[row]
            words[slot] = NULL
            free[nfree] = row << DIRECTORY_SHIFT
            nfree += 1
            row = slot >> DIRECTORY_SHIFT
            count[row] -= 1
        self._nfree = nfree
        self.near = -1
        if nfree == self._top - 2:
            self._start_over()

    def drop_all_empty(self, rows: Offsets) -> None:
        """The same for many distinct rows without entries, in address order.

        Cost: O(rows), vectorised per level.
        """
        for row in self.held:
            rows = rows[rows != row]
        while rows.size > 1:
            slots = self._parents[rows]
            self.index[slots] = NULL
            self.near = -1
            np.left_shift(rows[::-1], DIRECTORY_SHIFT, out=self._free[self._nfree : self._nfree + rows.size])
            self._nfree += rows.size
            first, last = int(slots[0]) >> DIRECTORY_SHIFT, int(slots[-1]) >> DIRECTORY_SHIFT
            if first == last:  # all below one directory
                self.count[first] -= rows.size
                rows = slots[:1] >> DIRECTORY_SHIFT
                break
            parents, lost = tally(slots >> DIRECTORY_SHIFT)
            left = self.counts.take(parents)
            left -= lost
            self.counts[parents] = left
            rows = parents[left == 0]
        for row in rows.tolist():
            self.drop_if_empty(row)

    def _start_over(self) -> None:
        # Only the root is left. Directories are given out in order again, so that what is stored in order lies
        # in order, which is the fastest to go through.
        self._peak = max(self._peak, self._top)
        self._top = 2
        self._nfree = 0

    # -- checking

    def image(self) -> object:
        """Everything that `check()` looks at, as a value.  Cost: O(directories), a copy."""
        used = max(self._top, self._peak)
        rows, counts, parents = self.rows[:used].tobytes(), self.counts[:used].tobytes(), self._parents[:used].tobytes()
        return rows, counts, parents, self._free[: self._nfree].tobytes(), self._top, self._reserved, *self.held.items()

    def check(self, in_use: npt.NDArray[np.bool_]) -> None:
        """Assert the invariants of this module.

        Args:
            in_use: bool[top], the rows that the tree reaches; see `top`.
        """
        free = self._free[: self._nfree] >> DIRECTORY_SHIFT
        free_once = np.bincount(free, minlength=self._top)
        assert not self.rows[NULL].any(), "the NULL directory was written"
        assert not self.rows[free].any(), "a free directory is not empty"
        assert not self.counts[free].any(), "a free directory has a count"
        assert not in_use[NULL], "the NULL directory is linked"
        assert not self.rows[self._top : self._peak].any(), "a directory to be used again is not empty"
        assert not self.counts[self._top : self._peak].any(), "a directory to be used again has a count"
        assert (free_once[1:] + in_use[1:] == 1).all(), "a directory leaked, or is free and in use"
        assert all(in_use[row] and holders > 0 for row, holders in self.held.items()), self.held
        assert 0 <= self._reserved <= self.max_directories - self.directories, self._reserved

    @property
    def top(self) -> int:
        """Rows that have ever been used are below this one."""
        return self._top

    def parent_slots(self, offsets: Offsets) -> Offsets:
        """int64[n]: where each of these directories is linked."""
        slots: Offsets = self._parents[offsets >> DIRECTORY_SHIFT]
        return slots
