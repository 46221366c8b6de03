"""Seeded interleavings where memory is short, with and without devices that have memory."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack

import pytest

from hmm.operation import Operation
from hmm.reclaim import Reclaim
from hmm.swap_area import Slots, SwapArea
from hmm.testing import SimulationError
from hmm.testing_swap import simulate_swap, simulate_swap_and_devices

SEEDS, BATCH = 40, 20


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_simulate_holds_every_invariant_when_memory_is_short(first: int) -> None:
    """No interleaving loses a page or a slot, or waits for ever: somebody who needs memory gets it, or ENOMEM."""
    for seed in range(first, first + BATCH):
        simulate_swap(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_simulate_holds_every_invariant_when_devices_have_memory_and_the_system_is_short_of_it(first: int) -> None:
    """Migrations, evictions and pins need memory that others are reclaiming."""
    for seed in range(first, first + BATCH):
        simulate_swap_and_devices(seed)


def test_simulate_reclaims_pages_that_devices_use() -> None:
    """The workload reaches reclaim, often while somebody else reclaims, and fills the swap area."""
    seen: Counter[str] = Counter()
    for seed in range(10):
        machine = simulate_swap(seed).machine
        assert machine.reclaim is not None
        assert machine.frames.swap is not None
        seen["pages"] += machine.reclaim.reclaimed
        seen["slots"] = max(seen["slots"], machine.frames.swap.high_water)
    assert seen["pages"] > 50
    assert seen["slots"] > 20


def found(seeds: range) -> str:
    """What the first failing seed says; empty when none fails."""
    for seed in seeds:
        try:
            simulate_swap(seed)
        except SimulationError as error:
            return str(error)
    return ""


def test_simulate_finds_a_page_that_goes_before_its_mirrors_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: reclaim tells nobody; a device goes on using a frame that is somebody else's."""

    def tell(_: Reclaim, mapped: list[object], __: ExitStack) -> Operation[list[object]]:
        yield from ()
        return mapped

    monkeypatch.setattr(Reclaim, "_tell", tell)
    assert found(range(100))


def test_simulate_finds_a_slot_that_is_freed_while_an_entry_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the first entry that goes takes the slot with it."""
    put = SwapArea.put

    def eager(area: SwapArea, slots: Slots) -> Slots:
        area.counts[slots] = 1
        return put(area, slots)

    monkeypatch.setattr(SwapArea, "put", eager)
    assert found(range(100))


def test_simulate_finds_a_fork_that_does_not_count_swap_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the child's entries name slots that go with the parent's."""
    monkeypatch.setattr(SwapArea, "duplicate", lambda *_: None)
    assert found(range(100))
