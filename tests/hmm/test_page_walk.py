"""Walks: what the review of the 2015 iterator asked for, and the bugs of the posted one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from hmm import directory_tree
from hmm.errors import InvalidRequestError, OutOfFramesError
from hmm.page_table import PageTable, Run

PAGE = 1 << 12
LEAF = 1 << 21
UPPER = 1 << 30
LAST = (1 << 47) - 4097


@pytest.fixture
def table() -> PageTable:
    """An empty table of a process's address space."""
    return PageTable(LAST)


def _starts(table: PageTable, start: int = 0, end: int = LAST + 1) -> list[int]:
    return [run.start for run in table.walk(start, end)]


class TestWalk:
    """`walk()`: directories that hold entries in use, each once."""

    def test_walk_gives_nothing_when_table_is_empty(self, table: PageTable) -> None:
        """The iterator gives what exists, not every index of the range."""
        assert _starts(table) == []

    def test_walk_gives_each_directory_once_ascending(self, table: PageTable) -> None:
        """One run per directory of page entries, whatever the order in which they came."""
        for address in (5 * UPPER, 0, 3 * LEAF, 7 * LEAF + 9 * PAGE):
            table.set(address, 1)
        assert _starts(table) == [0, 3 * LEAF, 7 * LEAF, 5 * UPPER]

    def test_walk_clips_runs_to_the_range(self, table: PageTable) -> None:
        """The first and the last run are cut where the range is; the entries line up with the address."""
        table.fill(0, 3 * LEAF, np.arange(1, 1537, dtype=np.uint64))
        runs = list(table.walk(LEAF - 2 * PAGE, 2 * LEAF + PAGE))
        assert [(run.start, run.end, run.entries.size) for run in runs] == [
            (LEAF - 2 * PAGE, LEAF, 2),
            (LEAF, 2 * LEAF, 512),
            (2 * LEAF, 2 * LEAF + PAGE, 1),
        ]
        assert runs[0].entries.tolist() == [511, 512]
        assert {run.level for run in runs} == {3}

    def test_walk_skips_directory_when_its_entries_are_outside_the_range(self, table: PageTable) -> None:
        """A directory whose entries in use all lie before the range gives no run."""
        table.set(0, 1)
        table.set(LEAF, 1)
        assert _starts(table, PAGE, 2 * LEAF) == [LEAF]

    def test_walk_gives_runs_that_write_to_the_table(self, table: PageTable) -> None:
        """A run is the directory's memory: a driver sets DIRTY through it."""
        table.set(3 * PAGE, 5)
        for run in table.walk(0, LEAF):
            run.entries[3] |= 8
        assert table.get(3 * PAGE) == 13

    def test_walk_frees_directory_when_consumer_clears_it_through_the_run(self, table: PageTable) -> None:
        """Counts are derived again when the walk moves on, so a directory that was emptied goes."""
        table.fill(0, 3 * LEAF, 1)
        for run in table.walk(0, 3 * LEAF):
            if run.start == LEAF:
                run.entries[:] = 0
        table.check()
        assert table.directory_count(3) == 2
        assert _starts(table) == [0, 2 * LEAF]

    @pytest.mark.parametrize(
        ("start", "end"),
        [(1, PAGE), (0, PAGE + 1), (PAGE, 0), (-PAGE, PAGE), (0, LAST + 1 + PAGE)],
    )
    @pytest.mark.parametrize("name", ["walk", "populate"])
    def test_walk_refuses_what_is_not_a_range_of_pages(self, table: PageTable, name: str, start: int, end: int) -> None:
        """A bad range is an error at the call, before the first step."""
        walk: Callable[[int, int], object] = getattr(table, name)
        with pytest.raises(InvalidRequestError):
            walk(start, end)

    def test_walk_of_empty_range_gives_nothing(self, table: PageTable) -> None:
        """An empty range is in order, at both ends of the table too."""
        table.set(0, 1)
        for at in (0, PAGE, LAST + 1):
            assert _starts(table, at, at) == []
            assert list(table.populate(at, at)) == []
        table.check()


class TestHoles:
    """Absent directories are skipped inside, by as much as is absent and no more."""

    @pytest.mark.parametrize("hole", [PAGE, LEAF, UPPER, 1 << 39])
    @pytest.mark.parametrize("level_span", [LEAF, UPPER, 1 << 39])
    def test_walk_finds_directory_behind_hole_of_any_level(self, table: PageTable, hole: int, level_span: int) -> None:
        """The posted walk went on behind the containing directory, and missed what followed a hole in it."""
        table.set(0, 1)
        behind = -(-hole // level_span) * level_span
        table.set(behind, 2)
        addresses = [address for address, _ in table.entries(0, LAST + 1)]
        assert addresses == [0, behind]
        assert _starts(table, PAGE, LAST + 1) == ([behind] if behind >= LEAF else [PAGE])

    def test_walk_from_inside_hole_finds_neighbour(self, table: PageTable) -> None:
        """A 2 MiB hole hides 2 MiB: the walk starts in one and finds the next leaf of the same directory."""
        table.set(5 * LEAF, 1)
        table.set(UPPER - PAGE, 1)
        assert _starts(table, LEAF + 3 * PAGE, UPPER) == [5 * LEAF, UPPER - LEAF]

    def test_posted_skip_rule_misses_live_directories(self, table: PageTable, monkeypatch: pytest.MonkeyPatch) -> None:
        """With the rule of the v3 walk, to the end of the containing directory, entries are lost to the walk."""
        table.set(5 * LEAF, 1)
        assert _starts(table) == [5 * LEAF]

        def after_containing_directory(page: int, shift: int, absent: int) -> int:
            del absent
            return ((page >> shift + 9) + 1) << shift + 9

        monkeypatch.setattr(directory_tree, "after_hole", after_containing_directory)
        assert _starts(table) == []

    def test_walk_costs_levels_when_one_entry_is_at_the_end(
        self, table: PageTable, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A lone entry at the end of the range is reached in a step per level, not 511 round trips."""
        table.set(LAST, 1)
        holes = []
        skip = directory_tree.after_hole

        def counted(page: int, shift: int, absent: int) -> int:
            holes.append((shift, absent))
            return skip(page, shift, absent)

        monkeypatch.setattr(directory_tree, "after_hole", counted)
        assert _starts(table) == [LAST & ~(LEAF - 1)]
        assert [absent for _, absent in holes] == [255, 511, 511]

    def test_walk_costs_directories_when_table_is_sparse(
        self, table: PageTable, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Crossing holes takes at most a step per level for each directory met."""
        for number in range(20):
            table.set(number * 37 * UPPER, 1)
        steps = 0
        skip = directory_tree.after_hole

        def counted(page: int, shift: int, absent: int) -> int:
            nonlocal steps
            steps += 1
            return skip(page, shift, absent)

        monkeypatch.setattr(directory_tree, "after_hole", counted)
        assert len(_starts(table)) == 20
        assert steps <= 20 * 6


class TestHolding:
    """A walk holds one directory, and lets go of it by itself."""

    def test_walk_holds_the_directory_of_its_run_alone(self, table: PageTable) -> None:
        """At most one directory per level is protected; what is above is kept by its children."""
        table.fill(0, 2 * LEAF, 1)
        for run in table.walk(0, 2 * LEAF):
            assert table.statistics().held == 1
            assert table.reference_count(run.start, 3) == 512 + 1
            assert table.reference_count(run.start, 2) == 2
            assert table.reference_count(run.start, 0) == 1
        assert table.statistics().held == 0
        assert table.reference_count(0, 3) == 512

    def test_walk_lets_go_when_consumer_breaks_off(self, table: PageTable) -> None:
        """No call ends the walk; leaving the loop does."""
        table.fill(0, 2 * LEAF, 1)
        for _ in table.walk(0, 2 * LEAF):
            break
        assert table.statistics().held == 0
        for _ in table.populate(4 * LEAF, 6 * LEAF):
            break
        assert table.statistics().held == 0
        table.check()
        assert table.directory_count(3) == 2

    def test_walk_lets_go_when_consumer_raises(self, table: PageTable) -> None:
        """An exception that passes through the loop ends the walk too."""
        table.fill(0, 2 * LEAF, 1)

        def fail(run: Run) -> int:
            raise KeyError(run.start)

        with pytest.raises(KeyError):
            table.visit(0, 2 * LEAF, fail)
        assert table.statistics().held == 0
        table.check()

    def test_walk_never_started_holds_nothing(self, table: PageTable) -> None:
        """A walk protects nothing, and populate reserves nothing, before the first step."""
        table.set(0, 1)
        walks = [table.walk(0, LEAF), table.populate(0, LEAF)]
        assert table.statistics().held == 0
        del walks
        table.check()

    def test_run_keeps_its_directory_when_entries_go_beneath_the_walk(self, table: PageTable) -> None:
        """Entries may be cleared beneath a walker: the directory stays until the walk moves on, then goes."""
        table.fill(0, 3 * LEAF, 1)
        seen = []
        for run in table.walk(0, 3 * LEAF):
            seen.append(run.start)
            if run.start == 0:
                table.clear(0, 2 * LEAF)
                assert table.directory_count(3) == 2
                table.fill(UPPER, UPPER + 8 * LEAF, 7)  # would take the directory if it had been freed
                assert not run.entries.any()
                table.check()
        assert seen == [0, 2 * LEAF]
        table.check()
        assert table.directory_count(3) == 1 + 8

    def test_walk_sees_what_is_added_ahead(self, table: PageTable) -> None:
        """Each step starts at the root, so that nothing of the way is remembered that may be stale."""
        table.set(0, 1)
        seen = []
        for run in table.walk(0, LAST + 1):
            seen.append(run.start)
            if run.start == 0:
                table.set(3 * UPPER, 1)
        assert seen == [0, 3 * UPPER]

    def test_run_does_not_move_when_table_grows(self, table: PageTable) -> None:
        """The directories are reserved once: thousands more do not move the one that is held."""
        table.set(0, 1)
        for run in table.walk(0, LEAF):
            where = run.entries.ctypes.data
            table.fill(UPPER, UPPER + 4096 * LEAF, 3)
            assert table.directories > 4096
            run.entries[1] = 9
            assert run.entries.ctypes.data == where
        assert table.get(PAGE) == 9
        table.check()

    def test_two_walks_of_one_table_hold_apart(self, table: PageTable) -> None:
        """Counts of protection add up; the directory goes with the last walk."""
        table.set(0, 1)
        outer = table.walk(0, LEAF)
        inner = table.walk(0, LEAF)
        next(outer)
        next(inner)
        assert table.reference_count(0, 3) == 3
        table.clear(0, LEAF)
        inner.close()
        assert table.directory_count(3) == 1
        table.check()
        outer.close()
        assert table.directory_count(3) == 0
        table.check()

    def test_walks_of_different_tables_nest(self, table: PageTable) -> None:
        """A mirror table may be populated inside a walk of the CPU's table."""
        mirror = PageTable(LAST)
        table.fill(LEAF - PAGE, LEAF + PAGE, 4)
        for run in table.walk(0, LAST + 1):
            for target in mirror.populate(run.start, run.end):
                target.entries[:] = run.entries
        assert list(mirror.entries(0, LAST + 1)) == list(table.entries(0, LAST + 1))
        mirror.check()
        assert table.statistics().held == mirror.statistics().held == 0

    def test_ranges_are_exact_when_a_held_run_was_written(self, table: PageTable) -> None:
        """Range operations between two steps see what the consumer wrote through the run."""
        for run in table.populate(0, LEAF):
            run.entries[5:9] = 3
            assert table.valid(0, LEAF)[1].tolist() == [3, 3, 3, 3]
            assert table.count == 4
            assert table.clear(5 * PAGE, 7 * PAGE) == 2
            table.check()
        assert table.count == 2


class TestPopulate:
    """`populate()`: every page, allocating."""

    def test_populate_covers_every_page_without_gaps(self, table: PageTable) -> None:
        """`next_alloc` is contiguous, across directories of every level."""
        start, end = UPPER - 3 * PAGE, UPPER + LEAF + 2 * PAGE
        at = start
        for run in table.populate(start, end):
            assert run.start == at
            run.entries[:] = 1
            at = run.end
        assert at == end
        assert table.count == 3 + 512 + 2
        table.check()

    def test_populate_leaves_nothing_when_no_entry_is_gained(self, table: PageTable) -> None:
        """A directory that gained no entry is gone again, and its parents with it."""
        for run in table.populate(0, 2 * UPPER):
            assert table.directories >= 4
            del run
        assert table.directories == 1
        table.check()

    def test_populate_keeps_directories_that_gained_an_entry(self, table: PageTable) -> None:
        """Only the directories with an entry stay."""
        for run in table.populate(0, 4 * LEAF):
            if run.start == 2 * LEAF:
                run.entries[7] = 1
        assert list(table.entries(0, LAST + 1)) == [(2 * LEAF + 7 * PAGE, 1)]
        assert table.directory_count(3) == 1
        table.check()

    def test_populate_keeps_what_is_there(self, table: PageTable) -> None:
        """Existing entries are given, not replaced."""
        table.set(LEAF, 5)
        runs = {run.start: int(run.entries[0]) for run in table.populate(0, 2 * LEAF)}
        assert runs == {0: 0, LEAF: 5}
        assert table.directory_count(3) == 1

    def test_populate_touches_nothing_when_directories_do_not_suffice(self) -> None:
        """Running out is found for the whole range at the first step (ENOMEM)."""
        table = PageTable(LAST, max_directories=8)
        table.set(0, 1)
        walk = table.populate(LEAF, 6 * LEAF)
        with pytest.raises(OutOfFramesError):
            next(walk)
        table.check()
        assert table.directories == 4
        assert table.count == 1

    def test_populate_takes_the_last_directory(self) -> None:
        """Exactly as many as are needed are enough."""
        table = PageTable(LAST, max_directories=8)
        table.set(0, 1)
        for run in table.populate(LEAF, 5 * LEAF):
            run.entries[0] = 1
        assert table.directories == 8
        table.check()

    def test_populate_refuses_range_larger_than_any_arena(self, table: PageTable) -> None:
        """The whole address space needs more directories than any table has, and that is found at once."""
        with pytest.raises(OutOfFramesError):
            next(table.populate(0, LAST + 1))
        table.check()

    def test_populate_keeps_its_promise_when_others_ask_meanwhile(self) -> None:
        """Directories found at the first step cannot be taken by others between the steps."""
        table = PageTable(LAST, max_directories=7)
        table.set(0, 1)
        walk = table.populate(LEAF, 3 * LEAF)
        next(walk).entries[0] = 1
        with pytest.raises(OutOfFramesError):
            table.fill(UPPER, UPPER + LEAF, 1)
        next(walk).entries[0] = 1
        walk.close()
        assert table.count == 3
        table.check()
        table.set(9 * LEAF, 1)
        assert table.directories == 7

    def test_populate_gets_emptied_directories_back(self) -> None:
        """Steps that leave nothing behind do not use the promise up, however many they are."""
        table = PageTable(LAST, max_directories=12)
        for run in table.populate(UPPER - 4 * LEAF, UPPER + 4 * LEAF):
            if run.start == UPPER + 3 * LEAF:
                run.entries[0] = 1
        assert table.count == 1
        table.check()
        assert table.directories == 4

    @pytest.mark.parametrize(("at", "directories"), [(0, 7), (UPPER - 2 * LEAF, 9)])
    def test_populate_promises_no_more_than_the_rest_needs(self, at: int, directories: int) -> None:
        """What a step leaves behind empty is for anybody again, but for the directories above the next one."""
        table = PageTable(LAST, max_directories=directories)
        if not at:
            table.set(UPPER - LEAF, 1)
        end = at + 3 * LEAF
        for run in table.populate(at, end):
            if run.end == end:
                table.fill(5 * LEAF, 7 * LEAF, 1)
        assert table.count == 2 * 512 + (not at)
        table.check()
        table.fill(10 * LEAF, (10 + directories - table.directories) * LEAF, 1)
        assert table.directories == directories

    def test_populate_fails_late_only_when_the_consumer_used_directories_up(self) -> None:
        """What the consumer frees and gives away itself cannot be promised."""
        table = PageTable(LAST, max_directories=6)
        table.set(LEAF, 1)
        walk = table.populate(0, 2 * LEAF)
        next(walk).entries[0] = 1
        table.clear(LEAF, 2 * LEAF)
        table.set(2 * LEAF, 1)
        table.set(3 * LEAF, 1)
        with pytest.raises(OutOfFramesError):
            next(walk)
        table.check()
        assert table.count == 3


class TestEntries:
    """`entries()`: Mark Hairgrove's `hmm_pt_iter_next(iter, &ptep)`."""

    def test_entries_gives_those_in_use(self, table: PageTable) -> None:
        """Only valid entries, ascending, with their addresses."""
        expected = [(0, 1), (511 * PAGE, 2), (LEAF, 3), (LAST & ~4095, 4)]
        for address, entry in reversed(expected):
            table.set(address, entry)
        assert list(table.entries(0, LAST + 1)) == expected

    def test_entries_is_a_snapshot_per_directory(self, table: PageTable) -> None:
        """An entry may be cleared beneath the walker, who has been told of it before."""
        table.fill(0, 4 * PAGE, 1)
        table.set(LEAF, 1)
        seen = []
        for address, _ in table.entries(0, LAST + 1):
            if address == 0:
                table.clear(0, LAST + 1)
            seen.append(address)
        assert seen == [0, PAGE, 2 * PAGE, 3 * PAGE]
        table.check()
        assert table.directories == 1

    def test_entries_lets_go_when_consumer_breaks_off(self, table: PageTable) -> None:
        """The walk beneath ends with the iterator."""
        table.fill(0, LEAF, 1)
        for _ in table.entries(0, LEAF):
            assert table.statistics().held == 1
            break
        assert table.statistics().held == 0

    def test_entries_reach_the_last_page_of_64_bits(self) -> None:
        """Addresses beyond 2^63 come out unsigned, and the end 2^64 does not wrap."""
        table = PageTable((1 << 64) - 1)
        top = (1 << 64) - PAGE
        table.set(top, 7)
        table.set(0, 6)
        assert list(table.entries(0, 1 << 64)) == [(0, 6), (top, 7)]
        (run,) = table.walk(top, 1 << 64)
        assert (run.start, run.end, run.level) == (top, 1 << 64, 5)


class TestVisit:
    """`visit()`: hmm_pt_walk(), a callback on top of the walk."""

    def test_visit_calls_back_per_run(self, table: PageTable) -> None:
        """The callback sees the runs of the walk, and a result of None goes on."""
        table.fill(0, 2 * LEAF, 1)
        starts: list[int] = []
        assert table.visit(0, 2 * LEAF, lambda run: starts.append(run.start)) == 0
        assert starts == [0, LEAF]

    def test_visit_stops_when_callback_returns_nonzero(self, table: PageTable) -> None:
        """As in mm_walk, a result that is not 0 ends the walk and is the walk's result."""
        table.fill(0, 3 * LEAF, 1)
        starts: list[int] = []

        def stop_at_second(run: Run) -> int:
            starts.append(run.start)
            return -5 if run.start else 0

        assert table.visit(0, 3 * LEAF, stop_at_second) == -5
        assert starts == [0, LEAF]
        assert table.statistics().held == 0


class TestCursor:
    """`cursor()`: explicit addresses, for several tables in lock-step."""

    def test_lookup_gives_entries_to_the_end_of_the_directory(self, table: PageTable) -> None:
        """lookup() of v3: the entries from the address on, and where to go next."""
        table.fill(0, LEAF, np.arange(1, 513, dtype=np.uint64))
        with table.cursor() as cursor:
            cursor.seek(3 * PAGE + 5)
            view = cursor.lookup()
            assert view is not None
            assert view.size == 509
            assert view[0] == 4
            assert cursor.address == 3 * PAGE
            assert cursor.next_address == LEAF

    def test_lookup_gives_none_and_the_end_of_the_hole(self, table: PageTable) -> None:
        """An absent directory is told apart from an empty entry, with the next address that has one."""
        table.set(9 * LEAF + PAGE, 1)
        with table.cursor() as cursor:
            cursor.seek(LEAF)
            assert cursor.lookup() is None
            assert cursor.next_address == 9 * LEAF
            cursor.seek(10 * LEAF)
            assert cursor.lookup() is None
            assert cursor.next_address == LAST + 1

    def test_cursor_holds_until_another_directory_is_sought(self, table: PageTable) -> None:
        """A ptep of the 2015 iterator stays valid until the next call for another directory, or fini."""
        table.fill(0, 2 * LEAF, 1)
        cursor = table.cursor()
        cursor.seek(0)
        cursor.lookup()
        cursor.seek(PAGE)
        cursor.lookup()
        assert table.reference_count(0, 3) == 513
        table.clear(0, LEAF)
        assert table.directory_count(3) == 2
        cursor.seek(LEAF)
        assert table.directory_count(3) == 1
        cursor.lookup()
        cursor.close()
        cursor.close()
        assert table.statistics().held == 0
        table.check()

    def test_populate_allocates_and_frees_what_gained_nothing(self, table: PageTable) -> None:
        """populate() of v3 gives a directory, which disappears at fini when it gained no entry."""
        with table.cursor() as cursor:
            cursor.seek(5 * LEAF)
            assert cursor.populate().size == 512
            assert cursor.lookup() is not None
            assert cursor.populate().size == 512
            assert table.directory_count(3) == 1
            cursor.seek(6 * LEAF + PAGE)
            assert table.directories == 1
            cursor.populate()[0] = 3
            assert cursor.next_address == 7 * LEAF
        assert list(table.entries(0, LAST + 1)) == [(6 * LEAF + PAGE, 3)]
        table.check()

    def test_populate_changes_nothing_when_directories_are_out(self) -> None:
        """ENOMEM leaves the cursor usable."""
        table = PageTable(LAST, max_directories=5)
        table.set(0, 1)
        with table.cursor() as cursor:
            cursor.seek(UPPER)
            with pytest.raises(OutOfFramesError):
                cursor.populate()
            table.check()
            cursor.seek(LEAF)
            cursor.populate()[0] = 1
        assert table.count == 2

    def test_seek_refuses_address_behind_the_table(self, table: PageTable) -> None:
        """An address that the table does not have is an error of the caller."""
        cursor = table.cursor()
        for address in (LAST + 1, -1):
            with pytest.raises(InvalidRequestError):
                cursor.seek(address)

    def test_view_ends_with_the_table(self) -> None:
        """The last directory may have more entries than the table has pages."""
        table = PageTable(LEAF + 3 * PAGE - 1)
        with table.cursor() as cursor:
            cursor.seek(LEAF)
            assert cursor.populate().size == 3
            assert cursor.next_address == table.last + 1

    def test_cursors_walk_tables_with_different_gaps_in_lock_step(self, table: PageTable) -> None:
        """Loops over several tables need explicit addresses: here, pages that both tables have."""
        other = PageTable(LAST)
        for page in (0, 5, 512 * 3, 512 * 512 * 4):
            table.set(page * PAGE, 1)
        for page in (5, 512 * 2, 512 * 512 * 4):
            other.set(page * PAGE, 2)
        common = []
        with table.cursor() as left, other.cursor() as right:
            address = 0
            while address <= LAST:
                left.seek(address)
                right.seek(address)
                ours, theirs = left.lookup(), right.lookup()
                if ours is None or theirs is None:
                    address = max(left.next_address, right.next_address)
                    continue
                both = np.flatnonzero((ours != 0) & (theirs != 0))
                common += [address // PAGE + int(position) for position in both]
                address = left.next_address
        assert common == [5, 512 * 512 * 4]
        assert table.statistics().held == other.statistics().held == 0


class TestLevelZero:
    """A table of one directory, whose root holds the page entries."""

    def test_walk_gives_the_root(self) -> None:
        """With llevel 0 the posted iterator indexed a directory of level -1."""
        table = PageTable(LEAF - 1)
        assert table.llevel == 0
        table.set(5 * PAGE, 1)
        (run,) = table.walk(PAGE, LEAF)
        assert (run.start, run.level, run.entries.size) == (PAGE, 0, 511)
        table.check()

    def test_root_is_never_freed(self) -> None:
        """The root is not counted: it stays without entries and without walks."""
        table = PageTable(LEAF - 1)
        for run in table.populate(0, LEAF):
            run.entries[:] = 1
            run.entries[:] = 0
        with table.cursor() as cursor:
            cursor.populate()[3] = 1
        table.clear(0, LEAF)
        assert table.directories == 1
        table.check()
