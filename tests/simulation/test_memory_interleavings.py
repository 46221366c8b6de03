"""Seeded interleavings with pages of mirrors in the memory of devices, whose drivers carry, refuse and lose copies."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from hmm import mirror_memory
from hmm.address_space import AddressSpace
from hmm.events import Cause, Event
from hmm.mirror import Mirror
from hmm.mirror_memory import MirrorMemory
from hmm.operation import Operation, Pause
from hmm.testing import SimulationError
from hmm.testing_devices import simulate_mirror_memory
from hmm.testing_swap import simulate_swap_and_mirror_memory
from hmm.units import AddressRange, Entries

SEEDS, BATCH = 60, 20


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_simulate_holds_every_invariant_when_drivers_carry_pages(first: int) -> None:
    """No interleaving loses a page that its driver did not lose, or shows other bytes than the last ones written."""
    for seed in range(first, first + BATCH):
        simulate_mirror_memory(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_simulate_holds_every_invariant_when_system_memory_is_short_too(first: int) -> None:
    """Pages come back from devices into memory that others have to be swapped out of."""
    for seed in range(first, first + BATCH):
        simulate_swap_and_mirror_memory(seed)


def found(seeds: Iterable[int]) -> str:
    """What the first failing seed says; empty when none fails."""
    for seed in seeds:
        try:
            simulate_mirror_memory(seed)
        except SimulationError as error:
            return str(error)
    return ""


def test_simulate_finds_lost_pages_that_read_as_zeroes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: pages of a driver that is gone are dropped instead of poisoned."""

    def drop(space: AddressSpace, addresses: Entries) -> None:
        space.drop(space.table.clear_many(addresses))

    monkeypatch.setattr(mirror_memory, "lose", drop)
    assert "holds" in found(range(60))


def test_simulate_finds_a_failed_page_that_is_taken_for_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the results of a copy are not looked at."""
    carry = MirrorMemory.carry

    def careless(self: MirrorMemory, *arguments: Any, **options: Any) -> Any:
        outcome, carried = yield from carry(self, *arguments, **options)
        return outcome, np.ones_like(carried)

    monkeypatch.setattr(MirrorMemory, "carry", careless)
    assert found(range(60))


def test_simulate_finds_pages_that_were_not_brought_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: mremap and mprotect go on although pages are on a device, whose driver frees them when it hears."""

    def vacate(_: MirrorMemory, __: tuple[AddressRange, ...]) -> Operation[int]:
        return 0
        yield Pause()  # makes this function a generator

    monkeypatch.setattr(MirrorMemory, "vacate", vacate)
    monkeypatch.setattr(MirrorMemory, "has_pages", lambda *_: False)
    assert found(range(60))


def test_simulate_finds_a_mirror_that_is_not_told_of_a_migration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: other mirrors go on using pages that have moved to a device."""
    hears = Mirror.hears

    def hears_less(self: Mirror, event: Event) -> bool:
        return hears(self, event) and event.cause is not Cause.MIGRATE_TO_DEVICE

    monkeypatch.setattr(Mirror, "hears", hears_less)
    assert found(range(60))
