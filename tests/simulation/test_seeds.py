"""Seeds that found something once, each in its town; `python tests/simulation SEED TOWN` runs one by itself."""

from __future__ import annotations

import pytest

from hmm.testing_swap import TOWNS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("town", "seed"),
    [
        ("devices", 690),  # a VMA that was being unmapped was out of the reverse map's sight
        ("devices", 915),
        ("devices", 853),  # a mirror whose error was its end was lost while others finished, and told nevertheless
        ("huge", 1171),  # an exec that was refused kept what others had mapped in the new address space
        ("memory", 521),  # a page that another device had taken meanwhile was looked for on the first
        ("memory", 789),
        ("memory", 20028),
        ("memory", 20039),  # a touch inside the last update of a mirror waited for that update
        ("swap-devices", 1092),  # a fault tried again and again while another call held the page
    ],
)
def test_simulate_holds_every_invariant_when_the_seed_once_broke_one(town: str, seed: int) -> None:
    """What was mended stays so."""
    TOWNS[town](seed)
