"""Seeded interleavings with huge pages: brought in, cut, split, copied, moved, migrated, taken and pinned."""

from __future__ import annotations

import pytest

from hmm import huge_fault
from hmm.address_space import AddressSpace
from hmm.testing import SimulationError
from hmm.testing_devices import simulate_huge_pages
from hmm.units import Address

SEEDS, BATCH = 40, 10


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_simulate_holds_every_invariant_when_pages_are_huge(first: int) -> None:
    """No interleaving leaves a part of a huge page, or one across VMAs; replay agrees."""
    for seed in range(first, first + BATCH):
        simulate_huge_pages(seed)


def found(seeds: range) -> str:
    """What the first failing seed says; empty when none fails."""
    for seed in seeds:
        try:
            simulate_huge_pages(seed)
        except SimulationError as error:
            return str(error)
    return ""


def test_simulate_finds_a_huge_page_that_is_zapped_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: nothing is split before a part of it goes."""

    def split_huge_pmd(_: AddressSpace, __: Address) -> None:
        """Nothing is split."""

    monkeypatch.setattr(AddressSpace, "split_huge_pmd", split_huge_pmd)
    assert "huge page" in found(range(50))


def test_simulate_finds_a_huge_page_in_the_place_of_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the first time nobody looks whether a block has a page table; what it held is lost.

    Not every time: calls that wait until pages are there would then wait without a pause.
    """
    has_table = huge_fault.has_table
    passed: set[tuple[AddressSpace, Address]] = set()

    def has_table_at_second_sight(space: AddressSpace, block: Address) -> bool:
        seen = (space, block) in passed
        passed.add((space, block))
        return seen and has_table(space, block)

    monkeypatch.setattr(huge_fault, "has_table", has_table_at_second_sight)
    assert found(range(50))
