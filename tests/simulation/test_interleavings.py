"""Seeded interleavings: thousands of short runs, every invariant after every step, planted bugs found.

`make simulate` runs ten thousand seeds.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hmm import directory_tree, vma_edit
from hmm.address_space import AddressSpace
from hmm.events import Cause, Event, EventType
from hmm.journal import digest
from hmm.machine import Machine
from hmm.notifier import Invalidation, Notifier, Subscriber
from hmm.operation import Operation
from hmm.testing import SimulationError, simulate

SEEDS, BATCH = 120, 40


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_simulate_holds_every_invariant_for_every_seed(first: int) -> None:
    """No interleaving of calls and answers breaks an invariant of the model, and its inputs replay to its state."""
    for seed in range(first, first + BATCH):
        simulate(seed)


def test_simulate_does_the_same_when_the_seed_is_the_same() -> None:
    """A seed is a whole run."""
    once, again = simulate(7), simulate(7)
    assert once.steps == again.steps
    assert digest(once.machine) == digest(again.machine)


def found_by(seeds: range) -> str:
    """The report of the first seed that fails."""
    for seed in seeds:
        try:
            simulate(seed)
        except SimulationError as error:
            return str(error)
    pytest.fail(f"no seed of {seeds} found the planted bug")


def test_simulate_finds_a_mirror_that_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the last mirror is missing from every list of those to be told."""
    listeners = Notifier.listeners

    def forgetful(notifier: Notifier, event: Event) -> list[Subscriber]:
        return listeners(notifier, event)[:-1]

    monkeypatch.setattr(Notifier, "listeners", forgetful)
    assert "seed" in found_by(range(100))


def test_simulate_finds_a_frame_that_is_freed_before_its_acknowledgement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: munmap zaps first and tells the mirrors afterwards."""
    spaces: dict[int, AddressSpace] = {}
    new_space, deliver = Machine.new_space, Invalidation.deliver

    def remembering(machine: Machine) -> AddressSpace:
        space = new_space(machine)
        spaces[id(space.notifier)] = space
        return space

    def hasty(invalidation: Invalidation) -> Operation[object]:
        if invalidation.cause is Cause.MUNMAP:
            for span in invalidation.spans:
                spaces[id(invalidation.notifier)].zap(span.start, span.end)
        return (yield from deliver(invalidation))

    monkeypatch.setattr(Machine, "new_space", remembering)
    monkeypatch.setattr(Invalidation, "deliver", hasty)
    assert "seed" in found_by(range(100))


def test_simulate_finds_the_skip_bug_of_the_third_posted_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a missing entry makes a walk go on behind the directory that holds it (hmm_pt v3)."""

    def behind_the_directory(page: int, shift: int, _: int) -> int:
        return ((page >> (shift + 9)) + 1) << (shift + 9)

    monkeypatch.setattr(directory_tree, "after_hole", behind_the_directory)
    assert "seed" in found_by(range(100))


def test_simulate_finds_a_value_that_crosses_a_yield(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: entries looked up before the mirrors are told are what is dropped afterwards."""

    def remembering_zap(space: AddressSpace, span: object) -> Iterator[object]:
        entries = space.table.zap(span.start, span.end)  # type: ignore[attr-defined]
        yield from ()
        space.drop(entries)
        space.drop(entries[:1])

    monkeypatch.setattr(vma_edit, "zap", remembering_zap)
    assert "seed" in found_by(range(100))


def test_simulate_covers_every_event_and_every_way_to_answer() -> None:
    """The workload reaches all 2015 event types of this model and all final states of an event."""
    counted: set[str] = set()
    for seed in range(40):
        for mirror in simulate(seed).machine.mirrors.values():
            counted |= set(mirror.counted())
    kinds = {kind for kind in EventType if kind.is_invalidation} - {EventType.ISDIRTY}
    kinds |= {EventType.RELEASE, EventType.DEVICE_RFAULT, EventType.DEVICE_WFAULT}
    assert {f"events_{kind.name.lower()}" for kind in kinds} <= counted
    assert {"acknowledged", "fenced", "abandoned", "late_answers", "repeated_answers", "retries"} <= counted
