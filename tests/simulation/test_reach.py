"""What seeds come to: every kind of event, every answer, and memory that is short."""

from __future__ import annotations

from collections import Counter

import pytest

from hmm.events import EventType
from hmm.testing import simulate
from hmm.testing_coverage import Coverage
from hmm.testing_swap import simulate_swap

pytestmark = pytest.mark.slow


def missed(coverage: Coverage) -> set[str]:
    """What seeds did not come to: 2015 event types of this model, final states of an event, kills, and retries."""
    kinds = {kind for kind in EventType if kind.is_invalidation} - {EventType.ISDIRTY}
    kinds |= {EventType.RELEASE, EventType.DEVICE_RFAULT, EventType.DEVICE_WFAULT}
    heard = {heard for _, who, heard in coverage.events if who == "mirror"}
    answers = {"done", "EIO", "EAGAIN", "lost, fence", "lost, fail", "late", "repeated"}
    counts = {"killed": coverage.callers["killed"], "retries": coverage.retries}
    missed = {kind.name for kind in kinds} - heard
    return missed | (answers - set(coverage.answers)) | {name for name, count in counts.items() if not count}


def test_simulate_comes_to_every_event_and_every_way_to_answer() -> None:
    """A few dozen seeds reach everything; no more of them run than it takes."""
    coverage = Coverage()
    for seed in range(60):
        coverage.add(simulate(seed).coverage)
        if not missed(coverage):
            return
    assert not missed(coverage)


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
