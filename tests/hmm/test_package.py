"""The package as a whole: what its documentation shows."""

from __future__ import annotations

import doctest

import hmm


def test_package_prints_what_its_documentation_shows() -> None:
    """Whoever types the example sees what stands there."""
    results = doctest.testmod(hmm)
    assert results.attempted > 10
    assert not results.failed
