"""Seeds of every town: all that has to hold, holds after every step.  `make simulate` runs ten thousand."""

from __future__ import annotations

import pytest

from hmm.journal import digest
from hmm.testing import simulate
from hmm.testing_coverage import Coverage
from hmm.testing_swap import TOWNS

SEEDS = 6

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("town", TOWNS)
def test_simulate_holds_every_invariant_for_every_seed(town: str) -> None:
    """No interleaving breaks an invariant, loses a page or shows other bytes than the last ones; inputs replay."""
    coverage = Coverage()
    for seed in range(SEEDS):
        coverage.add(TOWNS[town](seed).coverage)
    assert coverage.operations > 60 * SEEDS
    assert coverage.answers["done"] > coverage.answers["EIO"] > 0
    assert {"mmap", "fork", "fault", "read_memory"} <= {name for name, _ in coverage.calls}


def test_simulate_does_the_same_when_the_seed_is_the_same() -> None:
    """A seed is a whole run."""
    once, again = simulate(7), simulate(7)
    assert once.steps == again.steps
    assert digest(once.machine) == digest(again.machine)
