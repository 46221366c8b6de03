"""The page table: single pages, ranges, batches, and what they leave behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import numpy as np
import pytest

from hmm.errors import InvalidRequestError, OutOfFramesError
from hmm.page_table import PageTable
from hmm.units import Entries

PAGE = 1 << 12
LEAF = 1 << 21
UPPER = 1 << 30
LAST = (1 << 47) - 4097
ALL = (1 << 64) - 1
LASTS = [ALL, 1 << 48, (1 << 48) - 1, LAST, UPPER + 5, UPPER - 1, LEAF - 1, 3 * PAGE, 0]

# Within a leaf, across two, across few, across many with ragged ends, whole leaves, across an upper directory.
SPANS = [
    (PAGE, 2 * PAGE),
    (5 * PAGE, 9 * PAGE),
    (LEAF - PAGE, LEAF + PAGE),
    (LEAF - PAGE, 2 * LEAF + PAGE),
    (LEAF + 7 * PAGE, 5 * LEAF + 3 * PAGE),
    (LEAF - 3 * PAGE, 70 * LEAF + 5 * PAGE),
    (0, 64 * LEAF),
    (UPPER - 40 * LEAF, UPPER + 40 * LEAF),
]
# In one leaf, in one upper directory, over several, everywhere; few and many.
BATCHES = [
    [3],
    [1, 5, 511],
    list(range(0, 512, 7)),
    list(range(100, 200_000, 777)),
    list(range(5, 1 << 27, 1_234_567)),
    list(range(0, 1 << 35, 123_456_789)),
]


@pytest.fixture
def table() -> PageTable:
    """An empty table of a process's address space."""
    return PageTable(LAST)


def _addresses(*pages: int) -> Entries:
    return np.array(pages, np.uint64) << np.uint64(12)


def _expected(leaves: list[int]) -> Entries:
    entries = np.zeros((5, 512), np.uint64)
    for leaf in leaves:
        entries[leaf] = _numbers(1 + leaf * 512, 512)
    return entries.reshape(-1)


def _numbers(first: int, number: int) -> Entries:
    return np.arange(first, first + number, dtype=np.uint64)


class TestGeometry:
    """The table shows its shape."""

    def test_table_shows_levels_of_its_last_address(self, table: PageTable) -> None:
        """`last` is inclusive and rounded up to the end of its page."""
        assert (table.last, table.llevel, table.root_entries) == (LAST, 3, 256)
        assert table.shifts == (39, 30, 21, 12)
        assert PageTable(0).last == 4095

    @pytest.mark.parametrize(("last", "directories"), [(-1, 1), (1 << 64, 1), (LAST, 0)])
    def test_table_is_refused_when_out_of_range(self, last: int, directories: int) -> None:
        """A table has at most 64 bits of addresses and at least its root."""
        with pytest.raises(InvalidRequestError):
            PageTable(last, max_directories=directories)

    @pytest.mark.parametrize("directories", [1 << 40, 1 << 52, 1 << 64])
    def test_table_is_refused_when_address_space_does_not_suffice(self, directories: int) -> None:
        """The reservation fails as an allocation does, not as an error of the host, whatever was asked for."""
        with pytest.raises(OutOfFramesError):
            PageTable(LAST, max_directories=directories)

    @pytest.mark.parametrize("last", LASTS)
    def test_table_serves_its_first_and_last_page(self, last: int) -> None:
        """Every geometry works at both of its ends, by page, by range and by batch."""
        table = PageTable(last)
        top = table.last & ~4095
        assert table.set(top, 9) == 0
        assert table.set(0, 9 if top == 0 else 8) in (0, 9)
        assert table.get(table.last) == 9
        assert table.read(top, top + PAGE).tolist() == [9]
        assert table.valid(0, top + PAGE)[0].tolist() == sorted({0, top})
        many = np.full(9, top, np.uint64)
        assert table.lookup(many).tolist() == [9] * 9
        table.check()
        assert table.directory_count(table.llevel) == len({0, top >> 21})
        table.clear(0, table.last + 1)
        table.check()
        assert table.directories == 1


class TestOnePage:
    """`get()` and `set()`."""

    @pytest.mark.parametrize("last", [ALL, LAST, LEAF - 1])
    def test_set_returns_the_entry_before(self, last: int) -> None:
        """Storing is an exchange; the page of the address is meant, not the byte."""
        table = PageTable(last)
        assert table.get(0x5123) == 0
        assert table.set(0x5123, 7) == 0
        assert table.set(0x5FFF, ALL) == 7
        assert table.get(0x5000) == ALL
        assert table.get(0x6000) == 0
        assert table.set(0x5000, 0) == ALL
        assert table.set(0x5000, 0) == 0
        table.check()
        assert table.directories == 1

    @pytest.mark.parametrize("last", [ALL, LAST])
    @pytest.mark.parametrize(
        "forget",
        [
            lambda table: [table.set(address, 0) for address in (0, LEAF)],
            lambda table: table.clear(0, 2 * LEAF),
            lambda table: table.clear_many(_addresses(0, 512)),
            lambda table: table.zap(0, 40 * LEAF),
        ],
    )
    def test_get_finds_nothing_when_the_directory_has_gone_to_another_range(
        self, last: int, forget: Callable[[PageTable], object]
    ) -> None:
        """A directory that was found once is freed, and serves other addresses."""
        table = PageTable(last)
        for address in (0, LEAF):
            table.set(address, 7)
            assert table.get(address) == 7
        forget(table)
        table.fill(UPPER, UPPER + 2 * LEAF, 9)
        assert [table.get(address) for address in (0, LEAF, UPPER, UPPER + LEAF)] == [0, 0, 9, 9]
        table.check()

    def test_set_counts_entries_in_use(self, table: PageTable) -> None:
        """An entry that is not zero keeps its directory, whatever its bits mean."""
        transient = 8
        table.set(0, transient)
        table.set(PAGE, 1)
        assert table.reference_count(0, 3) == 2
        table.set(PAGE, 3)
        assert table.reference_count(0, 3) == 2
        table.set(PAGE, 0)
        assert table.reference_count(0, 3) == 1
        assert table.count == 1
        table.check()

    def test_reference_count_is_zero_without_directory(self, table: PageTable) -> None:
        """What is not there is kept by nothing."""
        assert table.reference_count(UPPER, 3) == 0
        assert table.reference_count(UPPER, 1) == 0
        assert table.reference_count(UPPER, 0) == 0

    @pytest.mark.parametrize("address", [-1, LAST + 1, ALL])
    def test_page_outside_the_table_is_refused(self, table: PageTable, address: int) -> None:
        """Addresses are checked, since an index beyond the root would reach other directories."""
        with pytest.raises(InvalidRequestError):
            table.get(address)
        with pytest.raises(InvalidRequestError):
            table.set(address, 1)
        with pytest.raises(InvalidRequestError):
            table.reference_count(address, 0)


class TestDirectories:
    """Directories come with their first entry and go with their last."""

    def test_directories_come_and_go_with_entries(self, table: PageTable) -> None:
        """Aggressive pruning, as the posted table intended: an empty directory takes its parents along."""
        assert table.directories == 1
        table.set(0, 1)
        assert [table.directory_count(level) for level in range(4)] == [1, 1, 1, 1]
        table.set(UPPER, 1)
        assert [table.directory_count(level) for level in range(4)] == [1, 1, 2, 2]
        table.set(0, 0)
        assert [table.directory_count(level) for level in range(4)] == [1, 1, 1, 1]
        table.set(UPPER, 0)
        assert table.directories == 1
        table.check()

    def test_freed_directories_are_used_again(self, table: PageTable) -> None:
        """Memory grows with the peak, not with the number of calls."""
        for _ in range(5):
            table.fill(0, 100 * LEAF, 1)
            table.clear(0, 100 * LEAF)
        assert table.memory_bytes < 110 * 4200
        table.check()

    def test_directories_are_freed_once_when_they_came_out_of_order(self, table: PageTable) -> None:
        """A parent loses one entry for each child, wherever the children are in memory."""
        pages = (3 * 512, 300 * UPPER // PAGE, 512, 2 * 512, 301 * UPPER // PAGE, 0)
        for clear in (
            lambda: table.clear_many(_addresses(*sorted(pages))),
            lambda: table.clear(0, LAST + 1),
            lambda: table.apply_mask(0, LAST + 1, ALL & ~1, 1),
            lambda: table.apply_mask(0, LAST + 1, ALL & ~1),
        ):
            for page in pages:
                table.set(page * PAGE, 1)
            clear()
            table.check()
            assert table.directories == 1

    def test_emptied_table_gives_its_directories_out_in_order_again(self, table: PageTable) -> None:
        """With the last entry the arena starts over, so that order in memory is not lost for good."""
        for address in (9 * LEAF, 0, 5 * LEAF):
            table.set(address, 1)
        table.clear(0, LEAF)
        table.set(7 * LEAF, 1)
        table.clear(0, LAST + 1)
        table.check()
        table.fill(0, 20 * LEAF, 1)
        leaves = table._tree.directories_at(3)
        assert (leaves[1:] - leaves[:-1] == 512).all()
        table.check()

    def test_level_that_does_not_exist_is_refused(self, table: PageTable) -> None:
        """Levels are 0 to llevel."""
        for level in (-1, 4):
            with pytest.raises(InvalidRequestError):
                table.directory_count(level)
            with pytest.raises(InvalidRequestError):
                table.reference_count(0, level)

    def test_statistics_add_up(self, table: PageTable) -> None:
        """Directories per level, entries, holders and the limit."""
        table.fill(0, 3 * LEAF, 1)
        table.set(UPPER, 1)
        statistics = table.statistics()
        assert statistics.directories == (1, 1, 2, 4)
        assert statistics.entries == table.count == 3 * 512 + 1
        assert statistics.held == 0
        assert statistics.directories_max == 1 << 18
        assert statistics.memory_bytes == table.memory_bytes

    @pytest.mark.parametrize(
        "use",
        [
            lambda table: table.set(UPPER, 1),
            lambda table: table.fill(UPPER, UPPER + 2 * PAGE, 1),
            lambda table: table.fill(0, 4 * LEAF, 1),
            lambda table: table.fill(PAGE, 600 * LEAF, 1),
            lambda table: table.fill(0, 600 * LEAF, _numbers(1, 600 * 512)),
            lambda table: table.fill(0, 4 * LEAF, np.tile(np.array([0, 1], np.uint64), 1024)),
            lambda table: table.store(_addresses(0, 512, 1024, 512 * 512), 1),
            lambda table: table.store(_addresses(512, 512 * 512), np.array([1, 1], np.uint64)),
            lambda table: table.fill(0, LAST + 1, 1),
        ],
    )
    def test_running_out_of_directories_changes_nothing(self, use: Callable[[PageTable], object]) -> None:
        """ENOMEM is found before anything is touched."""
        table = PageTable(LAST, max_directories=6)
        table.set(0, 5)
        table.set(LEAF, 6)
        with pytest.raises(OutOfFramesError) as caught:
            use(table)
        assert "ENOMEM" in str(caught.value)
        table.check()
        assert list(table.entries(0, LAST + 1)) == [(0, 5), (LEAF, 6)]
        assert table.directories == 5

    def test_last_directory_can_be_used(self) -> None:
        """The limit is what can be used, not one less."""
        table = PageTable(LAST, max_directories=6)
        table.fill(0, 3 * LEAF, 1)
        table.check()
        assert table.directories == 6
        table.fill(0, 3 * LEAF, _numbers(1, 3 * 512))
        table.store(_addresses(0, 512, 1024), 7)
        table.check()

    def test_fill_needs_no_directory_for_zeros(self) -> None:
        """Zeros in an array need no directory, so they do not count against the limit."""
        table = PageTable(LAST, max_directories=4)
        entries = np.zeros(10 * 512, np.uint64)
        entries[3 * 512 + 5] = 1
        table.fill(0, 10 * LEAF, entries)
        table.check()
        assert list(table.entries(0, LAST + 1)) == [(3 * LEAF + 5 * PAGE, 1)]
        table.fill(0, 10 * LEAF, np.zeros(10 * 512, np.uint64))
        table.check()
        assert table.directories == 1

    def test_require_says_before_anything_is_stored_whether_it_can_be(self) -> None:
        """Directories that are there already are not asked for again; nothing is allocated."""
        table = PageTable(LAST, max_directories=5)
        table.set(0, 1)
        table.require(0, 2 * LEAF)
        assert table.directories == 4
        with pytest.raises(OutOfFramesError):
            table.require(0, 3 * LEAF)
        table.require(3 * LEAF, 3 * LEAF)
        table.fill(0, 2 * LEAF, 1)
        table.check()

    def test_table_is_freed_without_a_collection(self) -> None:
        """Nothing refers back to the table: its memory goes with the last reference, views or not."""
        gc.disable()
        try:
            table = PageTable(LAST)
            table.fill(0, LEAF, 3)
            (run,) = table.walk(0, LEAF)
            alive = weakref.ref(table)
            del table
            assert alive() is None
            assert run.entries[0] == 3
        finally:
            gc.enable()


class TestRanges:
    """`read`, `view`, `valid`, `fill`, `clear`, `zap`, `update`, `apply_mask`."""

    def test_view_shows_entries_where_they_lie_when_they_lie_in_order(self, table: PageTable) -> None:
        """A part of a leaf, and many leaves in order, are seen without a copy; leaves that lie apart are not."""
        many = 40
        table.fill(0, many * LEAF, _numbers(1, many * 512))
        for start, end in ((3 * PAGE, 7 * PAGE), (0, LEAF), (5 * PAGE, many * LEAF - PAGE)):
            view = table.view(start, end)
            assert view is not None
            assert np.array_equal(view, table.read(start, end))
            with pytest.raises(ValueError, match="read-only"):
                view[0] = 1
        table.set(4 * PAGE, 77)
        seen = table.view(3 * PAGE, 7 * PAGE)
        assert seen is not None
        assert seen[1] == 77
        assert table.view(0, 2 * UPPER) is None
        absent, nothing = table.view(UPPER, UPPER + PAGE), table.view(PAGE, PAGE)
        assert absent is not None
        assert not absent.any()
        assert nothing is not None
        assert not nothing.size

    def test_read_gives_zeros_for_holes_when_it_goes_over_directories_of_leaves(self, table: PageTable) -> None:
        """Leaves in order, out of order and absent, below three directories of leaves and one that is absent."""
        held = [(UPPER - 20 * LEAF, 20), (UPPER, 3), (UPPER + 40 * LEAF, 1), (UPPER + 30 * LEAF, 2), (3 * UPPER, 12)]
        expected = np.zeros(4 * UPPER // PAGE, np.uint64)
        for number, (start, leaves) in enumerate(held, 1):
            entries = _numbers(number, leaves * 512)
            table.fill(start, start + leaves * LEAF, entries)
            expected[start // PAGE : start // PAGE + entries.size] = entries
        for start, end in (
            (UPPER - 9 * LEAF, UPPER + 9 * LEAF),
            (UPPER - LEAF + PAGE, 3 * UPPER + 11 * LEAF + PAGE),
            (0, 4 * UPPER),
        ):
            assert np.array_equal(table.read(start, end), expected[start // PAGE : end // PAGE])

    @pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
    def test_valid_gives_what_is_in_use_when_the_table_ends_with_the_range(self, order: list[int]) -> None:
        """Three leaves up to the last address of 64 bits, in order in memory or not, full and with a hole."""
        table, start, end = PageTable(ALL), (1 << 64) - 3 * LEAF, 1 << 64
        expected = np.arange(start, ALL, PAGE, dtype=np.uint64)
        for leaf in order:
            table.fill(start + leaf * LEAF, start + (leaf + 1) * LEAF, _numbers(1 + leaf * 512, 512))
        for first in (0, 3):
            addresses, entries = table.valid(start + first * PAGE, end)
            assert np.array_equal(addresses, expected[first:])
            assert np.array_equal(entries, _numbers(1 + first, expected.size - first))
        table.clear(start + LEAF + PAGE, start + LEAF + 3 * PAGE)
        addresses, entries = table.valid(start, end)
        assert np.array_equal(addresses, np.delete(expected, [513, 514]))
        assert np.array_equal(entries, np.delete(_numbers(1, 1536), [513, 514]))
        table.check()

    @pytest.mark.parametrize(("start", "end"), SPANS)
    def test_fill_stores_array_that_read_gives_back(self, table: PageTable, start: int, end: int) -> None:
        """A range written is the range read, and its neighbours stay empty."""
        entries = _numbers(1, (end - start) // PAGE)
        table.fill(start, end, entries)
        table.check()
        assert np.array_equal(table.read(start, end), entries)
        around = table.read(max(start - 2 * PAGE, 0), end + 2 * PAGE)
        assert np.count_nonzero(around) == entries.size
        addresses, values = table.valid(0, LAST + 1)
        assert addresses[0] == start
        assert addresses[-1] == end - PAGE
        assert np.array_equal(values, entries)

    @pytest.mark.parametrize(("start", "end"), SPANS)
    def test_fill_stores_one_entry_everywhere(self, table: PageTable, start: int, end: int) -> None:
        """One value for all pages; storing again changes no count."""
        table.fill(start, end, 3)
        table.fill(start, end, ALL)
        table.check()
        assert table.count == (end - start) // PAGE
        assert (table.read(start, end) == ALL).all()

    @pytest.mark.parametrize(("start", "end"), SPANS)
    def test_fill_clears_where_entries_are_zero(self, table: PageTable, start: int, end: int) -> None:
        """Zeros clear, and a directory of zeros alone is freed or never made."""
        npages = (end - start) // PAGE
        entries = _numbers(1, npages)
        entries[npages // 3 :] = 0
        entries[::3] = 0
        table.fill(start, end, entries)
        table.check()
        assert np.array_equal(table.read(start, end), entries)
        table.fill(start, end, 1)
        table.fill(start, end, entries)
        table.check()
        assert table.count == np.count_nonzero(entries)
        table.fill(start, end, np.zeros(npages, np.uint64))
        table.check()
        assert table.directories == 1

    @pytest.mark.parametrize(("start", "end"), SPANS)
    def test_clear_empties_the_range_alone(self, table: PageTable, start: int, end: int) -> None:
        """What is cleared is counted; entries before and behind stay."""
        table.fill(0, end + LEAF, 1)
        assert table.clear(start, end) == (end - start) // PAGE
        table.check()
        assert not table.read(start, end).any()
        assert table.count == start // PAGE + 512
        assert table.clear(start, end) == 0

    @pytest.mark.parametrize(("start", "end"), SPANS)
    def test_zap_returns_what_the_range_held(self, table: PageTable, start: int, end: int) -> None:
        """The caller gets the entries to let the frames go, in address order."""
        entries = _numbers(1, (end - start) // PAGE)
        entries[1::5] = 0
        table.fill(start, end, entries)
        held = table.zap(start, end)
        assert np.array_equal(held, entries[entries != 0])
        table.check()
        assert table.directories == 1

    @pytest.mark.parametrize(("start", "end"), SPANS)
    @pytest.mark.parametrize("scattered", [False, True])
    def test_apply_mask_keeps_the_masked_bits(self, table: PageTable, start: int, end: int, scattered: bool) -> None:
        """`pte &= mask`, wherever the directories are in memory."""
        if scattered:
            for address in range(end & ~(LEAF - 1), start - 1, -2 * LEAF):
                table.set(address, 0x11)
        table.fill(start, end, 0x17)
        assert table.apply_mask(start, end, ALL & ~0x10) == 0
        table.check()
        assert (table.read(start, end) == 0x7).all()
        assert table.apply_mask(start, end, ALL & ~0x1, 0x7) == 0
        assert (table.read(start, end) == 0x6).all()

    @pytest.mark.parametrize(("start", "end"), SPANS)
    def test_apply_mask_clears_entries_that_keep_no_valid_bit(self, table: PageTable, start: int, end: int) -> None:
        """An entry without a VALID bit after the event is erased, and its directory with it."""
        npages = (end - start) // PAGE
        entries = np.full(npages, 0x18, np.uint64)  # no valid bit: a transient
        entries[::2] = 0x11
        table.fill(start, end, entries)
        assert table.apply_mask(start, end, ALL & ~0x10, valid=0x7) == npages // 2
        table.check()
        assert table.count == npages - npages // 2
        assert (table.valid(start, end)[1] == 1).all()
        assert table.apply_mask(start, end, ALL & ~0x1) == npages - npages // 2
        table.check()
        assert table.directories == 1

    def test_apply_mask_of_zero_clears(self, table: PageTable) -> None:
        """MASK_NONE erases all, driver bits too."""
        table.fill(0, 2 * LEAF, 0xF07)
        assert table.apply_mask(0, 3 * LEAF, 0) == 1024
        assert table.directories == 1

    @pytest.mark.parametrize(("start", "end"), SPANS)
    def test_update_changes_entries_in_place(self, table: PageTable, start: int, end: int) -> None:
        """A function sees the entries as arrays, zeros included, and what it zeroes is cleared."""
        entries = _numbers(1, (end - start) // PAGE)
        table.fill(start, end, entries)

        def keep_odd(view: Entries) -> None:
            view *= view & np.uint64(1)

        assert table.update(start, end, keep_odd) == entries.size // 2
        table.check()
        keep_odd(entries)
        assert np.array_equal(table.read(start, end), entries)

    def test_single_page_is_a_range_too(self, table: PageTable) -> None:
        """Ranges of one page have a short way of their own, with the same results."""
        span = (5 * PAGE, 6 * PAGE)
        assert table.zap(*span).size == table.valid(*span)[0].size == 0
        assert table.apply_mask(*span, ALL & ~0x10) == 0
        table.set(5 * PAGE, 0x19)
        assert table.apply_mask(*span, ALL & ~0x10, valid=0x7) == 0
        assert [column.tolist() for column in table.valid(*span)] == [[5 * PAGE], [0x9]]
        assert table.zap(*span).tolist() == [0x9]
        table.set(5 * PAGE, 0x18)
        assert table.apply_mask(*span, ALL & ~0x10, valid=0x7) == 1
        table.check()
        assert table.directories == 1

    def test_zap_of_many_directories_gives_sparse_entries_too(self, table: PageTable) -> None:
        """Full directories and sparse ones come out in the order of their addresses."""
        entries = _numbers(1, 200 * 512)
        entries[150 * 512 :: 3] = 0
        table.fill(0, 200 * LEAF, entries)
        assert np.array_equal(table.zap(0, 200 * LEAF), entries[entries != 0])
        assert table.directories == 1
        table.check()

    def test_ranges_skip_absent_directories(self, table: PageTable) -> None:
        """A range over the whole space costs the directories it meets."""
        for address in (0, 3 * UPPER + 5 * PAGE, 1 << 46, LAST & ~4095):
            table.set(address, 9)
        assert table.update(0, LAST + 1, lambda view: view.fill(0) if not view.any() else None) == 0
        assert table.valid(0, LAST + 1)[0].size == 4
        assert table.clear(PAGE, LAST + 1) == 3
        table.check()
        assert list(table.entries(0, LAST + 1)) == [(0, 9)]
        assert table.valid(LEAF, LAST + 1)[0].size == 0
        assert table.valid(UPPER, 2 * UPPER)[0].size == 0
        assert table.clear(1 << 40, 2 << 40) == 0

    def test_read_gives_zeros_for_holes(self, table: PageTable) -> None:
        """A snapshot has one word per page, 0 where there is nothing, between leaves too."""
        table.fill(3 * LEAF, 4 * LEAF, 5)
        table.set(90 * LEAF, 6)
        snapshot = table.read(PAGE, 100 * LEAF + PAGE)
        expected = np.zeros(100 * 512, np.uint64)
        expected[3 * 512 - 1 : 4 * 512 - 1] = 5
        expected[90 * 512 - 1] = 6
        assert np.array_equal(snapshot, expected)

    def test_read_writes_into_given_array(self, table: PageTable) -> None:
        """`out` is filled whatever it held, and returned."""
        table.set(PAGE, 5)
        out = np.full(3, 77, np.uint64)
        assert table.read(0, 3 * PAGE, out) is out
        assert out.tolist() == [0, 5, 0]
        many = np.full(20 * 512, 77, np.uint64)
        table.read(0, 20 * LEAF, many)
        assert np.count_nonzero(many) == 1

    @pytest.mark.parametrize(
        "out",
        [np.zeros(2, np.uint64), np.zeros(3, np.int64), np.zeros((3, 1), np.uint64), np.zeros(6, np.uint64)[::2]],
    )
    def test_read_refuses_array_that_does_not_fit(self, table: PageTable, out: Entries) -> None:
        """`out` is contiguous uint64 with one word per page."""
        with pytest.raises(InvalidRequestError):
            table.read(0, 3 * PAGE, out)

    @pytest.mark.parametrize("entries", [np.ones(3, np.uint64), np.ones(2, np.int64), np.ones((2, 1), np.uint64)])
    def test_fill_refuses_array_that_does_not_fit(self, table: PageTable, entries: Entries) -> None:
        """One uint64 per page."""
        with pytest.raises(InvalidRequestError):
            table.fill(0, 2 * PAGE, entries)

    def test_fill_takes_strided_array(self, table: PageTable) -> None:
        """The source need not be contiguous."""
        entries = _numbers(1, 2 * 600 * 8)[::2]
        table.fill(PAGE, PAGE + entries.size * PAGE, entries)
        assert np.array_equal(table.read(PAGE, PAGE + entries.size * PAGE), entries)
        table.check()

    def test_fill_of_zero_clears(self, table: PageTable) -> None:
        """The entry 0 is no entry."""
        table.fill(0, 3 * LEAF, 1)
        table.fill(PAGE, 2 * LEAF, 0)
        table.check()
        assert table.count == 1 + 512

    def test_empty_range_does_nothing(self, table: PageTable) -> None:
        """Empty ranges are in order and change nothing."""
        table.set(0, 1)
        assert table.read(0, 0).size == 0
        assert table.valid(PAGE, PAGE)[0].size == 0
        assert list(table.chunks(0, 0)) == []
        table.fill(0, 0, 1)
        table.fill(0, 0, np.empty(0, np.uint64))
        assert table.clear(0, 0) == table.apply_mask(0, 0, 0) == 0
        assert table.update(0, 0, lambda view: view.fill(0)) == 0
        assert table.zap(0, 0).size == 0
        assert table.count == 1

    @pytest.mark.parametrize(("start", "end"), [(1, PAGE), (0, 5), (PAGE, 0), (-PAGE, 0), (0, LAST + 1 + PAGE)])
    def test_range_outside_the_table_is_refused(self, table: PageTable, start: int, end: int) -> None:
        """Ranges are whole pages of the table, for every call."""
        calls: list[Callable[[int, int], object]] = [
            table.read,
            table.valid,
            table.clear,
            table.zap,
            table.chunks,
        ]
        for call in calls:
            with pytest.raises(InvalidRequestError):
                call(start, end)
        with pytest.raises(InvalidRequestError):
            table.fill(start, end, 1)
        with pytest.raises(InvalidRequestError):
            table.apply_mask(start, end, 1)


class TestChunks:
    """`chunks()`: valid entries, a bounded range at a time."""

    @pytest.mark.parametrize("step", [1, 7, 512, 1000, 1 << 15])
    def test_chunks_give_what_valid_gives(self, table: PageTable, step: int) -> None:
        """The pieces put together are the entries in use of the range."""
        table.fill(LEAF - 3 * PAGE, LEAF + 5 * PAGE, 1)
        table.set(UPPER, 2)
        table.set(3 * UPPER + 9 * PAGE, 3)
        pieces = list(table.chunks(PAGE, LAST + 1, step))
        addresses, entries = table.valid(PAGE, LAST + 1)
        assert np.array_equal(np.concatenate([piece[0] for piece in pieces]), addresses)
        assert np.array_equal(np.concatenate([piece[1] for piece in pieces]), entries)
        assert all(0 < piece[0].size <= step for piece in pieces)

    def test_chunks_see_changes_between_pieces(self, table: PageTable) -> None:
        """Nothing is remembered across a piece, so a consumer may zap as it goes."""
        table.fill(0, 4 * LEAF, 1)
        table.set(UPPER, 1)
        seen = 0
        for addresses, _ in table.chunks(0, LAST + 1, 512):
            seen += addresses.size
            table.clear(0, 3 * LEAF)
        assert seen == 512 + 512 + 1
        table.check()

    def test_chunks_refuse_step_that_does_not_advance(self, table: PageTable) -> None:
        """A step has at least one page."""
        with pytest.raises(InvalidRequestError):
            table.chunks(0, LEAF, 0)


class TestBatches:
    """`lookup`, `store`, `clear_many`: scattered pages."""

    @pytest.mark.parametrize("pages", BATCHES)
    @pytest.mark.parametrize("reverse", [False, True])
    def test_store_and_clear_many_return_the_entries_before(
        self, table: PageTable, pages: list[int], reverse: bool
    ) -> None:
        """Batches in any order; results are in the order of the request."""
        if reverse:
            pages = list(pages)
            pages.reverse()
        addresses = _addresses(*pages)
        values = _numbers(1, len(pages))
        assert not table.store(addresses, values).any()
        table.check()
        assert table.count == len(pages)
        assert table.lookup(addresses).tolist() == values.tolist()
        assert table.store(addresses, 77).tolist() == values.tolist()
        table.check()
        absent = addresses ^ np.uint64(PAGE)
        both = np.unique(np.concatenate((addresses, absent)))[:: -1 if reverse else 1]
        old = table.clear_many(both)
        expected = [77 if address in set(addresses.tolist()) else 0 for address in both.tolist()]
        assert old.tolist() == expected
        table.check()
        assert table.directories == 1

    @pytest.mark.parametrize("pages", BATCHES)
    def test_lookup_gives_zero_for_absent_pages(self, table: PageTable, pages: list[int]) -> None:
        """Absent pages read as zero through the NULL directory, repeated or not."""
        table.set(0x1234_5000, 5)
        addresses = np.tile(_addresses(*pages), 3)
        expected = [5 if page == 0x1_2345 else 0 for page in pages] * 3
        assert table.lookup(addresses).tolist() == expected
        assert table.lookup(addresses + np.uint64(123)).tolist() == expected
        table.check()

    def test_lookup_writes_into_given_array(self, table: PageTable) -> None:
        """`out` is filled, few pages or many, and returned."""
        table.set(PAGE, 5)
        for number in (2, 200):
            out = np.full(number, 77, np.uint64)
            assert table.lookup(_addresses(*range(number)), out) is out
            assert out.tolist() == [0, 5] + [0] * (number - 2)
            with pytest.raises(InvalidRequestError):
                table.lookup(_addresses(*range(number)), out[:1])

    def test_lookup_of_many_pages_goes_in_pieces(self, table: PageTable) -> None:
        """A batch of any size is one answer, in the order of the request."""
        pages = np.random.default_rng(3).permutation(20_000)
        table.fill(0, 20_000 * PAGE, _numbers(1, 20_000))
        found = table.lookup(pages.astype(np.uint64) << np.uint64(12))
        assert np.array_equal(found, pages.astype(np.uint64) + np.uint64(1))

    @pytest.mark.parametrize("one", [True, False])
    def test_store_and_clear_of_many_pages_go_in_pieces(self, table: PageTable, one: bool) -> None:
        """A batch of any size is one change, also where a directory lies in two pieces and some pages are there."""
        addresses = np.arange(40_000, dtype=np.uint64) * np.uint64(3 * PAGE)
        table.store(addresses[:30_000:2], 7)
        there = np.where((np.arange(40_000) < 30_000) & (np.arange(40_000) % 2 == 0), 7, 0)
        entries = _numbers(1, 40_000)
        assert np.array_equal(table.store(addresses, 9 if one else entries), there)
        table.check()
        assert table.count == 40_000
        assert np.array_equal(table.clear_many(addresses), np.full(40_000, 9) if one else entries)
        table.check()
        assert table.directories == 1

    @pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [0, 1, 3, 4], [0, 3, 2, 1, 4], [1, 2, 3]])
    def test_lookup_finds_leaves_in_any_order_of_memory(self, table: PageTable, order: list[int]) -> None:
        """Directories that lie in order are found by one addition, others by a walk, with the same result."""
        for leaf in order:
            table.fill(UPPER + leaf * LEAF, UPPER + (leaf + 1) * LEAF, _numbers(1 + leaf * 512, 512))
        addresses = np.uint64(UPPER) + (_numbers(0, 5 * 512) << np.uint64(12))
        assert np.array_equal(table.lookup(addresses), table.read(UPPER, UPPER + 5 * LEAF))
        assert np.array_equal(table.lookup(addresses[512:2048]), table.read(UPPER + LEAF, UPPER + 4 * LEAF))
        assert np.array_equal(table.clear_many(addresses), _expected(order))
        table.check()
        assert table.directories == 1

    @pytest.mark.parametrize("last", [ALL, LAST, 8 * UPPER - 1])
    @pytest.mark.parametrize("apart", [None, 0, 3, 7])
    def test_lookup_finds_directories_above_leaves_in_any_order_of_memory(self, last: int, apart: int | None) -> None:
        """Those that one batch allocated lie in order, one that came first lies apart, one may not be there."""
        table = PageTable(last)
        pages = np.unique(np.random.default_rng(7).integers(0, 8 << 18, 2000)).astype(np.uint64)
        addresses, entries = pages << np.uint64(12), pages + np.uint64(1)
        if apart is not None:
            table.set(apart * UPPER, 77)
        table.store(addresses, entries)
        if apart is not None:
            table.set(apart * UPPER, 0)
        table.check()
        shuffled = np.random.default_rng(8).permutation(pages.size)
        assert np.array_equal(table.lookup(addresses[shuffled]), entries[shuffled])
        found, held = table.valid(0, 8 * UPPER)
        assert np.array_equal(found, addresses)
        assert np.array_equal(held, entries)
        everything = table.read(0, 8 * UPPER)
        assert np.array_equal(everything[pages.astype(np.int64)], entries)
        assert np.count_nonzero(everything) == pages.size
        table.clear(4 * UPPER, 5 * UPPER)
        entries[pages >> np.uint64(18) == 4] = 0
        assert np.array_equal(table.lookup(addresses), entries)
        assert np.array_equal(table.clear_many(addresses[shuffled]), entries[shuffled])
        table.check()
        assert table.directories == 1

    def test_store_of_zeros_clears(self, table: PageTable) -> None:
        """The entry 0 is no entry, in a batch too."""
        table.store(_addresses(1, 600, 70000), 9)
        assert table.store(_addresses(600, 1, 5), np.array([0, 4, 0], np.uint64)).tolist() == [9, 9, 0]
        table.check()
        assert list(table.entries(0, LAST + 1)) == [(PAGE, 4), (70000 * PAGE, 9)]
        assert table.store(_addresses(1, 70000), 0).tolist() == [4, 9]
        assert table.directories == 1
        assert table.store(_addresses(3, 4), np.zeros(2, np.uint64)).tolist() == [0, 0]
        assert table.directories == 1
        table.check()

    @pytest.mark.parametrize("step", [1, 30])
    def test_store_counts_only_what_is_new(self, table: PageTable, step: int) -> None:
        """A batch over pages that are partly there adds the others to the counts, consecutive or not."""
        pages = _addresses(*range(500, 500 + 40 * step, step))
        table.store(pages[::2], 1)
        assert table.store(pages, 2).tolist() == [1, 0] * 20
        table.check()
        assert table.count == 40
        mixed = np.tile(np.array([0, 3], np.uint64), 20)
        assert table.store(pages, mixed).tolist() == [2] * 40
        table.check()
        assert table.count == 20
        assert table.apply_mask(0, int(pages[-1]) + PAGE, ALL & ~2, valid=1) == 0
        assert table.store(pages, np.zeros(40, np.uint64)).tolist() == [0, 1] * 20
        assert not table.clear_many(pages).any()
        assert table.directories == 1
        table.check()

    def test_batch_keeps_its_order_when_consecutive_pages_come_in_another_one(self, table: PageTable) -> None:
        """What is stored as a range is given, and given back, in the order of the addresses."""
        order = np.random.default_rng(5).permutation(40)
        pages = _addresses(*range(500, 540)) + np.uint64(8)
        assert not table.store(pages[order], _numbers(1, 40)[order]).any()
        assert table.lookup(pages).tolist() == list(range(1, 41))
        assert table.store(pages[order], 7).tolist() == (order + 1).tolist()
        assert table.store(pages, _numbers(1, 40)).tolist() == [7] * 40
        assert table.clear_many(pages[order]).tolist() == (order + 1).tolist()
        assert table.directories == 1
        table.check()

    def test_lookup_reads_each_page_when_one_comes_twice_and_one_is_left_out(self, table: PageTable) -> None:
        """As many addresses as there are pages from the first to the last are not always a range."""
        table.store(_addresses(*range(500, 520)), _numbers(1, 20))
        pages = [500, 500, *range(502, 520)]
        assert table.lookup(_addresses(*pages)).tolist() == [page - 499 for page in pages]
        assert table.lookup(_addresses(*pages) + np.uint64(8)).tolist() == [page - 499 for page in pages]
        ascending = _addresses(*pages) + np.array([0, 8, *[0] * 18], np.uint64)
        assert table.lookup(ascending).tolist() == [page - 499 for page in pages]

    def test_empty_batch_does_nothing(self, table: PageTable) -> None:
        """A batch of no pages is in order."""
        empty = np.empty(0, np.uint64)
        assert table.lookup(empty).size == 0
        assert table.store(empty, 1).size == 0
        assert table.clear_many(empty).size == 0
        assert table.directories == 1

    def test_batch_refuses_two_addresses_in_one_page(self, table: PageTable) -> None:
        """Which of two values would win is not defined."""
        twice = np.tile(_addresses(*range(20)), 2)
        for addresses in (_addresses(5, 5), _addresses(7, 5, 7), np.array([PAGE, PAGE + 8], np.uint64), twice):
            with pytest.raises(InvalidRequestError):
                table.store(addresses, 1)
            with pytest.raises(InvalidRequestError):
                table.clear_many(addresses)
        assert table.directories == 1

    @pytest.mark.parametrize("number", [1, 20])
    def test_batch_refuses_address_outside_the_table(self, table: PageTable, number: int) -> None:
        """An index beyond the root would reach other directories."""
        addresses = np.arange(number, dtype=np.uint64) * np.uint64(PAGE) + np.uint64(LAST + 1)
        for call in (table.lookup, table.clear_many):
            with pytest.raises(InvalidRequestError):
                call(addresses)
        with pytest.raises(InvalidRequestError):
            table.store(addresses, 1)

    def test_batch_reaches_the_top_of_64_bits(self) -> None:
        """Addresses beyond 2^63 are ordinary."""
        table = PageTable(ALL)
        addresses = np.array([ALL & ~4095, 1 << 63, 0], np.uint64)
        table.store(addresses, _numbers(1, 3))
        table.check()
        assert table.lookup(np.tile(addresses, 5)).tolist() == [1, 2, 3] * 5
        assert table.valid(0, 1 << 64)[0].tolist() == sorted(addresses.tolist())
        assert table.clear_many(addresses).tolist() == [1, 2, 3]
        assert table.directories == 1

    def test_store_refuses_wrong_number_of_entries(self, table: PageTable) -> None:
        """One entry per address, or one for all."""
        with pytest.raises(InvalidRequestError):
            table.store(_addresses(1, 2), np.ones(3, np.uint64))


class TestCheck:
    """`check()` finds what is wrong."""

    @pytest.mark.parametrize("spoil", ["count", "null", "parent", "leak", "free", "end", "twice", "wild"])
    def test_check_fails_when_an_invariant_is_broken(self, spoil: str) -> None:
        """Each invariant is asserted: the check that never fails proves nothing."""
        table = PageTable(LAST)
        table.fill(0, 3 * LEAF, 1)
        table.clear(2 * LEAF, 3 * LEAF)
        table.check()
        tree = table._tree
        arena = tree.arena
        leaf = tree.leaf(0)
        slot = int(arena.parent_slots(np.array([leaf]))[0])
        if spoil == "count":
            arena.count[leaf >> 9] += 1
        elif spoil == "null":
            arena.words[5] = 1
        elif spoil == "parent":
            arena._parent[leaf >> 9] += 1
        elif spoil == "leak":
            arena._nfree -= 1
        elif spoil == "free":
            arena.rows[int(arena._free[0]) >> 9, 3] = 1
        elif spoil == "end":
            arena.words[512 + 300] = 1
        elif spoil == "twice":
            arena.words[slot + 7] = leaf
            arena.count[slot >> 9] += 1
        else:
            arena.words[slot + 7] = leaf + 5
            arena.count[slot >> 9] += 1
        with pytest.raises(AssertionError):
            table.check()
