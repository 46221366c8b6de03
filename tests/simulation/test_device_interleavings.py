"""Seeded interleavings with devices that have memory: migration, eviction, exclusive access, pins, read sections."""

from __future__ import annotations

import pytest

from hmm import device_pages
from hmm.interval_notifier import IntervalMirror
from hmm.mirror import MirrorState
from hmm.receiver import Receiver
from hmm.testing import SimulationError
from hmm.testing_devices import simulate_devices

SEEDS, BATCH = 60, 20


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_simulate_holds_every_invariant_when_pages_are_on_devices(first: int) -> None:
    """No interleaving loses a page, leaves a migration entry that counts, or waits for ever; replay agrees."""
    for seed in range(first, first + BATCH):
        simulate_devices(seed)


def found(seeds: range) -> str:
    """What the first failing seed says; empty when none fails."""
    for seed in seeds:
        try:
            simulate_devices(seed)
        except SimulationError as error:
            return str(error)
    return ""


def test_simulate_finds_a_call_to_a_driver_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: pages of a lost mirror still name it as the one to be told; somebody waits for ever."""

    def release(self: IntervalMirror, state: MirrorState, why: str = "") -> None:
        Receiver.release(self, state, why)

    monkeypatch.setattr(IntervalMirror, "release", release)
    assert found(range(200))


def test_simulate_finds_a_migration_that_leaves_its_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: an eviction forgets to put its pages back; their map counts are wrong, or they are lost."""

    def replace(*_: object) -> None:
        """Nothing is put back."""

    monkeypatch.setattr(device_pages, "replace", replace)
    assert found(range(200))
