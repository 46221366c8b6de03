"""proto/README.md: what it shows is run, and every scenario that comes with hmmd is named there with its rule."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from document import run_document

from hmm_client.scenario import library

README = Path(__file__).parents[2] / "proto/README.md"


@pytest.mark.slow
def test_protocol_by_hand_runs_as_shown(tmp_path: Path) -> None:
    """A driver from the stubs alone, and scenarios by name."""
    assert run_document(README, tmp_path) >= 5


def test_every_scenario_is_named_with_a_rule() -> None:
    """Whoever reads a rule finds the scenario that shows it; no name has gone stale."""
    named = set(re.findall(r"`([a-z]+(?:-[a-z]+){1,})`", README.read_text()))
    assert named - {"hmm-in-callback"} == set(library.names())
