"""Seeded interleavings of processes whose equal pages are merged, while devices use, take and move them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from hmm import ksm
from hmm.frames import Frames
from hmm.ksm import Ksm
from hmm.testing import SimulationError
from hmm.testing_ksm import simulate_merging
from hmm.units import Pfns


@pytest.mark.slow
def test_simulate_comes_to_merged_pages() -> None:
    """Pages are merged while mirrors listen."""
    events = sum((simulate_merging(seed).coverage.events for seed in range(1, 5)), Counter[tuple[str, str, str]]())
    assert sum(count for (cause, _, _), count in events.items() if cause == "page merging") > 2


def found(seeds: range) -> str:
    """What the first failing seed says; empty when none fails."""
    for seed in seeds:
        try:
            simulate_merging(seed)
        except SimulationError as error:
            return str(error)
    return ""


def test_simulate_finds_pages_that_are_merged_and_not_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: what a page holds is not compared again when mirrors have answered, and checksums are all the same."""

    def equal(_: Frames, pfns: Pfns, __: Pfns) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        return np.ones(pfns.size, np.bool_)

    def checksums(_: Frames, pfns: Pfns) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
        return np.ones(pfns.size, np.uint64)

    monkeypatch.setattr(ksm, "_equal", equal)
    monkeypatch.setattr(Frames, "checksums", checksums)
    assert found(range(1, 30))


def test_simulate_finds_a_merged_page_that_is_written_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: merged pages go on to be the one process's that had them, so that a write needs no copy."""

    def exclusive(self: Ksm, pages: ksm._Pages, targets: Pfns, fresh: Pfns) -> int:
        merged = replace(self, pages, targets, fresh)
        self.frames.set_flags(fresh, ksm.PageFlag.ANON_EXCLUSIVE)
        return merged

    replace = Ksm._replace
    monkeypatch.setattr(Ksm, "_replace", exclusive)
    assert found(range(1, 30))
