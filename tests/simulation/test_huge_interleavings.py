"""Seeded interleavings with huge pages: brought in, cut, split, copied, moved, migrated, taken and pinned."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hmm import collapse_file, huge_fault, migration_folios, mprotect, truncate
from hmm.address_space import AddressSpace
from hmm.testing import SimulationError
from hmm.testing_devices import simulate_compound, simulate_huge_files, simulate_huge_pages
from hmm.units import Address


def found(seeds: range, town: Callable[[int], object] = simulate_huge_pages) -> str:
    """What the first failing seed says; empty when none fails."""
    for seed in seeds:
        try:
            town(seed)
        except SimulationError as error:
            return str(error)
    return ""


def test_simulate_finds_a_huge_page_that_is_changed_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: mprotect cuts VMAs inside a block, and the block stays."""
    monkeypatch.setattr(mprotect, "cut", lambda *_: iter(()))
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


def test_simulate_finds_a_huge_page_that_moved_by_small_ones_and_is_still_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: what gets small destinations keeps its huge entry."""
    monkeypatch.setattr(migration_folios, "map_by_pages", lambda *_: None)
    assert "huge page" in found(range(50), simulate_compound)


def test_simulate_finds_pages_of_a_file_that_are_mapped_beside_the_huge_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a collapse leaves the entries of the small pages that it replaces."""
    monkeypatch.setattr(collapse_file, "unmap_place", lambda *_: None)
    assert found(range(50), simulate_huge_files)


def test_simulate_finds_a_huge_page_of_a_file_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: truncation does not look whether a huge page lies across its edge."""
    monkeypatch.setattr(truncate, "_across", lambda *_: [])
    assert "huge page" in found(range(50), simulate_huge_files)
