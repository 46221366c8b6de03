"""The page table against a dictionary, under random operations, with all invariants checked after each."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hmm.errors import OutOfFramesError
from hmm.page_table import PageTable
from hmm.units import Entries

PAGE_SHIFT = 12
ALL = (1 << 64) - 1
WRITE = 1 << 4
VALID = 0b111
LASTS = [ALL, 1 << 48, (1 << 47) - 4097, (1 << 30) + 5, (1 << 21) - 1]
MAX_DIRECTORIES = 120

# Around the borders of directories of every level, and lengths on both sides of every special case.
ANCHORS = [0, 511, 512 * 8, 512 * 512 - 700, (1 << 27) - 300, (1 << 36) - 5, 1 << 51]
LENGTHS = [1, 2, 7, 9, 511, 512, 513, 512 * 9 + 3]
WORDS = st.one_of(st.integers(1, 0xFFF), st.integers(1, ALL))


class PageTableMachine(RuleBasedStateMachine):
    """Operations on a table, and on a dictionary from page numbers to entries."""

    @initialize(last=st.sampled_from(LASTS))
    def make(self, last: int) -> None:
        """Start with an empty table; few directories, so that they run out now and then."""
        self.table = PageTable(last, max_directories=MAX_DIRECTORIES)
        self.model: dict[int, int] = {}
        self.npages = (self.table.last >> PAGE_SHIFT) + 1
        self.walks = ExitStack()
        self.walking = 0

    def teardown(self) -> None:
        """Whatever was done, a table that is cleared and not walked has its root alone."""
        if hasattr(self, "table"):
            self.walks.close()
            self.table.check()
            self.table.clear(0, self.table.last + 1)
            self.table.check()
            assert self.table.directories == 1

    @invariant()
    def holds(self) -> None:
        """All counts balance."""
        if hasattr(self, "table"):
            self.table.check()
            assert self.table.count == len(self.model)

    # -- drawing

    def _span(self, data: st.DataObject) -> tuple[int, int]:
        anchor = min(data.draw(st.sampled_from(ANCHORS)), self.npages - 1)
        page = data.draw(st.integers(max(anchor - 600, 0), min(anchor + 600, self.npages - 1)))
        return page, min(page + data.draw(st.sampled_from(LENGTHS)), self.npages)

    def _pages(self, data: st.DataObject) -> list[int]:
        known = st.sampled_from(sorted(self.model)) if self.model else st.just(0)
        near = st.sampled_from([min(anchor, self.npages - 1) for anchor in ANCHORS])
        anywhere = st.integers(0, self.npages - 1)
        return data.draw(st.lists(st.one_of(known, near, anywhere), unique=True, max_size=40))

    def _words(self, data: st.DataObject, number: int) -> Entries:
        seed = data.draw(st.integers(0, 1 << 32))
        density = data.draw(st.sampled_from([0.0, 0.01, 0.5, 1.0]))
        chance = np.random.default_rng(seed)
        words = chance.integers(1, ALL, number, dtype=np.uint64, endpoint=True)
        words[chance.random(number) >= density] = 0
        return words

    def _assign(self, page: int, words: list[int]) -> None:
        for number, word in enumerate(words, page):
            if word:
                self.model[number] = word
            else:
                self.model.pop(number, None)

    def _in(self, page: int, end: int) -> list[tuple[int, int]]:
        return sorted((number, self.model[number]) for number in self.model if page <= number < end)

    # -- operations

    @rule(data=st.data(), word=st.one_of(st.just(0), WORDS))
    def set_one(self, data: st.DataObject, word: int) -> None:
        """Exchange one entry."""
        page, _ = self._span(data)
        try:
            old = self.table.set(page << PAGE_SHIFT, word)
        except OutOfFramesError:
            assert word
            return
        assert old == self.model.get(page, 0)
        self._assign(page, [word])

    @rule(data=st.data(), same=st.booleans())
    def fill(self, data: st.DataObject, same: bool) -> None:
        """Store a range: one word, or one for each page."""
        page, end = self._span(data)
        words = self._words(data, end - page)
        word = int(words[0])
        try:
            self.table.fill(page << PAGE_SHIFT, end << PAGE_SHIFT, word if same else words)
        except OutOfFramesError:
            return
        self._assign(page, [word] * (end - page) if same else words.tolist())

    @rule(data=st.data(), collect=st.booleans())
    def clear(self, data: st.DataObject, collect: bool) -> None:
        """Clear a range, or everything."""
        page, end = (0, self.npages) if data.draw(st.integers(0, 9)) == 0 else self._span(data)
        expected = self._in(page, end)
        start, stop = page << PAGE_SHIFT, end << PAGE_SHIFT
        if collect:
            assert self.table.zap(start, stop).tolist() == [word for _, word in expected]
        else:
            assert self.table.clear(start, stop) == len(expected)
        for number, _ in expected:
            del self.model[number]

    @rule(data=st.data(), mask=st.sampled_from([ALL & ~WRITE, ALL & ~1, 0]), valid=st.sampled_from([VALID, ALL]))
    def apply_mask(self, data: st.DataObject, mask: int, valid: int) -> None:
        """Apply an event's mask."""
        page, end = self._span(data)
        masked = [(number, word & mask) for number, word in self._in(page, end)]
        lost = [number for number, word in masked if not word & valid]
        assert self.table.apply_mask(page << PAGE_SHIFT, end << PAGE_SHIFT, mask, valid) == len(lost)
        self.model.update(masked)
        for number in lost:
            del self.model[number]

    @rule(data=st.data(), kept=st.sampled_from([ALL & ~WRITE, 0xFFF, 2]))
    def update(self, data: st.DataObject, kept: int) -> None:
        """Let a function change a range in place; what it makes zero is gone."""
        page, end = self._span(data)

        def keep(entries: Entries) -> None:
            entries &= np.uint64(kept)

        before = self._in(page, end)
        lost = [number for number, word in before if not word & kept]
        assert self.table.update(page << PAGE_SHIFT, end << PAGE_SHIFT, keep) == len(lost)
        self.model.update((number, word & kept) for number, word in before)
        for number in lost:
            del self.model[number]

    @rule(data=st.data(), step=st.sampled_from([2, 13, 512 * 3]), number=st.sampled_from([60, 1100]))
    def many_pages(self, data: st.DataObject, step: int, number: int) -> None:
        """Store, look up in another order, and clear again pages that lie apart, so many that order is looked for."""
        first, _ = self._span(data)
        pages = [page for page in range(first, self.npages, step)[:number] if page not in self.model]
        addresses = np.array(pages, np.uint64) << np.uint64(PAGE_SHIFT)
        words = np.arange(1, len(pages) + 1, dtype=np.uint64)
        order = np.random.default_rng(first).permutation(len(pages))
        try:
            assert not self.table.store(addresses, words).any()
        except OutOfFramesError:
            words[:] = 0
        self.table.check()
        assert np.array_equal(self.table.lookup(addresses[order]), words[order])
        kept = data.draw(st.integers(0, len(pages)))
        assert np.array_equal(self.table.clear_many(addresses[kept:]), words[kept:])
        for page, word in zip(pages[:kept], words.tolist(), strict=False):
            self._assign(page, [word])

    @rule(data=st.data(), ascending=st.booleans())
    def store(self, data: st.DataObject, ascending: bool) -> None:
        """Store a batch."""
        pages = self._pages(data)
        if ascending:
            pages.sort()
        words = self._words(data, len(pages))
        try:
            old = self.table.store(np.array(pages, np.uint64) << np.uint64(PAGE_SHIFT), words)
        except OutOfFramesError:
            return
        assert old.tolist() == [self.model.get(page, 0) for page in pages]
        for page, word in zip(pages, words.tolist(), strict=True):
            self._assign(page, [word])

    @rule(data=st.data(), ascending=st.booleans())
    def clear_many(self, data: st.DataObject, ascending: bool) -> None:
        """Clear a batch."""
        pages = self._pages(data)
        if ascending:
            pages.sort()
        old = self.table.clear_many(np.array(pages, np.uint64) << np.uint64(PAGE_SHIFT))
        assert old.tolist() == [self.model.pop(page, 0) for page in pages]

    @rule(data=st.data())
    def populate(self, data: st.DataObject) -> None:
        """Allocate as a walk goes, and use every other run."""
        page, end = self._span(data)
        at, use = page, data.draw(st.booleans())
        try:
            for run in self.table.populate(page << PAGE_SHIFT, end << PAGE_SHIFT):
                assert run.start == at << PAGE_SHIFT
                at += run.entries.size
                use = not use
                if use:
                    run.entries[::7] = 5
                    self._assign(run.start >> PAGE_SHIFT, run.entries.tolist())
        except OutOfFramesError:
            assert at == page
        else:
            assert at == end

    # -- walks that stay open while the table changes

    @precondition(lambda self: self.walking < 3)
    @rule(data=st.data())
    def hold_a_run(self, data: st.DataObject) -> None:
        """Stop in the middle of a walk; it holds its directory from now on."""
        page, end = self._span(data)
        walk = self.table.walk(page << PAGE_SHIFT, end << PAGE_SHIFT)
        self.walks.callback(walk.close)
        self.walking += 1
        next(walk, None)

    @precondition(lambda self: self.walking < 3)
    @rule(data=st.data())
    def hold_a_cursor(self, data: st.DataObject) -> None:
        """Leave a cursor at a directory, perhaps a new and empty one."""
        page, _ = self._span(data)
        cursor = self.walks.enter_context(self.table.cursor())
        self.walking += 1
        cursor.seek(page << PAGE_SHIFT)
        try:
            cursor.populate()
        except OutOfFramesError:
            assert cursor.lookup() is None

    @rule()
    def end_walks(self) -> None:
        """Let go of all."""
        self.walks.close()
        self.walking = 0

    # -- reading

    @rule(data=st.data(), step=st.sampled_from([1, 512, 1000, 1 << 15]))
    def read(self, data: st.DataObject, step: int) -> None:
        """All ways to read a range agree."""
        page, end = self._span(data)
        start, stop = page << PAGE_SHIFT, end << PAGE_SHIFT
        expected = self._in(page, end)
        snapshot = self.table.read(start, stop)
        assert [(page + int(at), int(snapshot[at])) for at in np.flatnonzero(snapshot)] == expected
        assert self.table.common(start, stop) == int(np.bitwise_and.reduce(snapshot))
        assert self.table.either(start, stop) == int(np.bitwise_or.reduce(snapshot))
        view = self.table.view(start, stop)
        assert view is None or (np.array_equal(view, snapshot) and not view.flags.writeable)
        addressed = [(number << PAGE_SHIFT, word) for number, word in expected]
        assert list(self.table.entries(start, stop)) == addressed
        addresses, entries = self.table.valid(start, stop)
        assert list(zip(addresses.tolist(), entries.tolist(), strict=True)) == addressed
        if step > 1 or end - page < 1000:
            parts = list(self.table.populated(start, stop, step))
            assert all(0 < part.npages <= step for part in parts)
            within = [self._in(part.start >> PAGE_SHIFT, part.end >> PAGE_SHIFT) for part in parts]
            assert [pair for pairs in within for pair in pairs] == expected
            assert all(within)
            pieces = self.table.chunks(start, stop, step)
            assert [pair for piece in pieces for pair in zip(*map(list, piece), strict=True)] == addressed

    @rule(data=st.data())
    def lookup(self, data: st.DataObject) -> None:
        """A batch in any order, and each page of it alone."""
        pages = self._pages(data)
        found = self.table.lookup(np.array(pages, np.uint64) << np.uint64(PAGE_SHIFT)).tolist()
        assert found == [self.model.get(page, 0) for page in pages]
        assert found == [self.table.get(page << PAGE_SHIFT) for page in pages]


@pytest.mark.slow
def test_table_equals_dictionary_under_random_operations() -> None:
    """Every call has the effect it has on a dictionary of pages, and after each all counts balance."""
    run_state_machine_as_test(
        PageTableMachine,
        settings=settings(
            max_examples=40,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
