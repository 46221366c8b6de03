"""Frames against dictionaries, under random operations, with all invariants checked after each."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from hmm.errors import ConflictError, OutOfFramesError
from hmm.frames import SYSTEM_REGION, ZERO_PFN, Frames, PageFlag
from hmm.units import PAGE_SIZE, Pfns

SYSTEM_FRAMES = 24
RESERVE_FRAMES = 20
PICKS = st.lists(st.integers(0, 10**6), max_size=12)


def array(numbers: list[int]) -> Pfns:
    """Frame numbers as the methods take them."""
    return np.array(numbers, np.int64)


class FramesMachine(RuleBasedStateMachine):
    """Operations on frames, and on counters of references, entries and fill bytes."""

    @initialize()
    def make(self) -> None:
        """Few frames, so that they run out and are used again."""
        self.frames = Frames(SYSTEM_FRAMES, RESERVE_FRAMES)
        self.references: Counter[int] = Counter()
        self.entries: Counter[int] = Counter()
        self.fill: dict[int, int] = {}
        self.regions = {SYSTEM_REGION: range(1, SYSTEM_FRAMES)}

    @invariant()
    def holds(self) -> None:
        """Counts and capacity agree with the model."""
        if not hasattr(self, "frames"):
            return
        self.frames.check()
        used = sorted(self.references)
        assert self.frames.refcount[used].tolist() == [self.references[pfn] for pfn in used]
        assert self.frames.mapcount[used].tolist() == [self.entries[pfn] for pfn in used]
        for region in self.frames.regions:
            mine = self.regions[region.number]
            assert region.used == sum(pfn in mine for pfn in used)
            assert region.used + region.free == region.total == len(mine)

    def teardown(self) -> None:
        """Whatever was done, letting everything go leaves every frame free and zero."""
        if hasattr(self, "frames"):
            entries, references = sorted(self.entries.elements()), sorted(self.references.elements())
            others = list((Counter(references) - Counter(entries)).elements())
            self.frames.unmap(array(entries))
            self.frames.put(array(others))
            self.frames.check()
            assert all(region.used == 0 for region in self.frames.regions)
            taken = self.frames.allocate(self.frames.available)
            assert taken.tolist() == list(range(1, SYSTEM_FRAMES))
            assert not self.frames.gather(taken).any()

    def pick(self, picks: list[int], among: list[int]) -> list[int]:
        """Frames out of `among`, repetitions possible."""
        return [among[pick % len(among)] for pick in picks] if among else []

    def took(self, pfns: list[int], number: int) -> None:
        """Fresh frames: unused so far, in the region, zero."""
        for pfn in pfns:
            assert pfn in self.regions[number]
            assert pfn not in self.references
            self.references[pfn] = 1
            self.fill[pfn] = 0

    def freed(self, pfns: list[int]) -> list[int]:
        """What the model frees after references were dropped."""
        gone = sorted({pfn for pfn in pfns if not self.references[pfn]})
        for pfn in gone:
            del self.references[pfn], self.fill[pfn]
        return gone

    @rule(count=st.integers(0, 16), number=st.integers(0, 6), mapped=st.booleans())
    def allocate(self, count: int, number: int, mapped: bool) -> None:
        """Some frames, or ENOMEM and nothing changed."""
        if number not in self.regions:
            return
        mapped = mapped and number == SYSTEM_REGION
        free = self.frames.region(number).free
        try:
            if mapped:
                pfns = self.frames.allocate_mapped(count, PageFlag.ANON).tolist()
            else:
                pfns = self.frames.allocate(count, number).tolist()
        except OutOfFramesError:
            assert count > free
            return
        assert pfns == sorted(pfns)
        assert len(pfns) == count <= free
        self.took(pfns, number)
        if mapped:
            self.entries.update(pfns)

    @rule(number=st.integers(0, 6))
    def allocate_one(self, number: int) -> None:
        """One frame, or ENOMEM."""
        if number not in self.regions:
            return
        free = self.frames.region(number).free
        try:
            self.took([self.frames.allocate_one(number)], number)
        except OutOfFramesError:
            assert free == 0

    @rule(picks=PICKS, zero=st.booleans(), entry=st.booleans())
    def take_references(self, picks: list[int], zero: bool, entry: bool) -> None:
        """get or map of frames in use; repetitions count."""
        pfns = self.pick(picks, sorted(self.references))
        named = [*pfns, ZERO_PFN] if zero else pfns
        (self.frames.map if entry else self.frames.get)(array(named))
        self.references.update(pfns)
        if entry:
            self.entries.update(pfns)

    @rule(picks=PICKS, zero=st.booleans(), entry=st.booleans(), one=st.booleans())
    def drop_references(self, picks: list[int], zero: bool, entry: bool, one: bool) -> None:
        """put or unmap of references that are there; frames without any left are free."""
        held = self.entries if entry else self.references - self.entries
        pfns = list((Counter(self.pick(picks, sorted(held))) & held).elements())
        named = [ZERO_PFN, *pfns] if zero else pfns
        if one:
            drop = self.frames.unmap_one if entry else self.frames.put_one
            gone = sorted(pfn for pfn in named if drop(pfn))
        else:
            gone = (self.frames.unmap if entry else self.frames.put)(array(named)).tolist()
        self.references.subtract(pfns)
        if entry:
            self.entries = self.entries - Counter(pfns)
        assert gone == self.freed(pfns)

    @rule(picks=PICKS, value=st.integers(0, 255), how=st.sampled_from(["scatter", "write", "clear", "part"]))
    def write(self, picks: list[int], value: int, how: str) -> None:
        """Fill frames, in every way there is."""
        pfns = sorted(set(self.pick(picks, sorted(self.references))), key=lambda pfn: pfn * 7 % 11)
        if how == "clear":
            value = 0
            self.frames.clear(array(pfns))
        elif how == "scatter":
            self.frames.scatter(array(pfns), np.full((len(pfns), PAGE_SIZE), value, np.uint8))
        else:
            for pfn in pfns:
                if how == "part":
                    self.frames.write(pfn, 0, bytes([value]) * 100)
                    assert self.frames.read(pfn, 100, PAGE_SIZE - 100) == bytes([self.fill[pfn]]) * (PAGE_SIZE - 100)
                    self.frames.write(pfn, 100, bytes([value]) * (PAGE_SIZE - 100))
                else:
                    self.frames.write(pfn, 0, bytes([value]) * PAGE_SIZE)
        self.fill.update(dict.fromkeys(pfns, value))

    @rule(picks=PICKS)
    def copy(self, picks: list[int]) -> None:
        """Copy some frames to others; the zero page is among the sources."""
        pfns = list(dict.fromkeys(self.pick(picks, sorted(self.references))))
        half = len(pfns) // 2
        targets, sources = pfns[:half], [*pfns[half : half + half - 1], ZERO_PFN][:half]
        self.frames.copy(array(targets), array(sources))
        values = [self.fill.get(pfn, 0) for pfn in sources]
        self.fill.update(zip(targets, values, strict=True))

    @rule(picks=PICKS)
    def move(self, picks: list[int]) -> None:
        """Contents of some frames go to others; what nobody else refers to holds what the other one held."""
        pfns = list(dict.fromkeys(self.pick(picks, sorted(self.references))))
        half = len(pfns) // 2
        targets, sources = pfns[:half], pfns[half : 2 * half]
        self.frames.move(array(targets), array(sources))
        for target, source in zip(targets, sources, strict=True):
            was, self.fill[target] = self.fill[target], self.fill[source]
            if self.references[source] == 1:
                self.fill[source] = was

    @rule(picks=PICKS, column=st.booleans())
    def read(self, picks: list[int], column: bool) -> None:
        """What is read is what was written, and zeroes otherwise."""
        pfns = self.pick(picks, [ZERO_PFN, *sorted(self.references)])
        expected = np.array([self.fill.get(pfn, 0) for pfn in pfns], np.uint8)
        if column:
            assert self.frames.read_bytes(array(pfns), 77).tolist() == expected.tolist()
        else:
            got = self.frames.gather(array(pfns))
            assert (got == expected[:, None]).all()

    @rule(frames=st.integers(1, 12))
    def add_region(self, frames: int) -> None:
        """Device memory, at numbers that no other region has."""
        try:
            region = self.frames.add_region(frames, owner=1)
        except OutOfFramesError:
            return
        mine = range(region.start, region.end)
        assert len(mine) == frames
        assert all(not set(mine) & set(other) for other in self.regions.values())
        assert region.end <= SYSTEM_FRAMES + RESERVE_FRAMES
        self.regions[region.number] = mine

    @rule(pick=st.integers(0, 10))
    def remove_region(self, pick: int) -> None:
        """Only when none of its frames is in use."""
        numbers = [number for number in self.regions if number != SYSTEM_REGION]
        if not numbers:
            return
        number = numbers[pick % len(numbers)]
        used = any(pfn in self.regions[number] for pfn in self.references)
        try:
            self.frames.remove_region(number)
        except ConflictError:
            assert used
        else:
            assert not used
            del self.regions[number]


@pytest.mark.slow
def test_frames_equal_the_model_after_any_operations() -> None:
    """Whatever is allocated, counted, written and let go, in any order."""
    run_state_machine_as_test(FramesMachine, settings=settings(max_examples=120, stateful_step_count=40, deadline=None))
