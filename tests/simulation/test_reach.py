"""What seeds come to: every kind of event, every answer, and memory that is short."""

from __future__ import annotations

from collections import Counter

import pytest

from hmm.events import EventType
from hmm.testing import simulate
from hmm.testing_coverage import Coverage
from hmm.testing_swap import simulate_swap

pytestmark = pytest.mark.slow


def test_simulate_comes_to_every_event_and_every_way_to_answer() -> None:
    """The workload reaches all 2015 event types of this model, all final states of an event, and faults that retry."""
    coverage = Coverage()
    for seed in range(60):
        coverage.add(simulate(seed).coverage)
    kinds = {kind for kind in EventType if kind.is_invalidation} - {EventType.ISDIRTY}
    kinds |= {EventType.RELEASE, EventType.DEVICE_RFAULT, EventType.DEVICE_WFAULT}
    assert {kind.name for kind in kinds} <= {heard for _, who, heard in coverage.events if who == "mirror"}
    assert {"done", "EIO", "EAGAIN", "lost, fence", "lost, fail", "late", "repeated"} <= set(coverage.answers)
    assert coverage.callers["killed"] > 0
    assert coverage.retries > 0


def test_simulate_reclaims_pages_that_devices_use() -> None:
    """Where memory is short the workload reaches reclaim, and fills the swap area."""
    seen: Counter[str] = Counter()
    for seed in range(10):
        machine = simulate_swap(seed).machine
        assert machine.reclaim is not None
        assert machine.frames.swap is not None
        seen["pages"] += machine.reclaim.reclaimed
        seen["slots"] = max(seen["slots"], machine.frames.swap.high_water)
    assert seen["pages"] > 50
    assert seen["slots"] > 12
