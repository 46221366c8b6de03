"""Arrays in ascending order (hmm/ascending.py), against numpy's own functions for arrays in any order."""

from __future__ import annotations

import numpy as np
import pytest

from hmm.ascending import among, distinct, is_ascending, tally, unique

RANDOM = np.random.default_rng(7)
ARRAYS = [
    np.array(values, np.int64) for values in ([], [5], [1, 2, 9], [2, 2], [3, 1, 3, 2], RANDOM.integers(0, 99, 300))
]


@pytest.mark.parametrize("values", ARRAYS, ids=len)
def test_unique_gives_what_numpy_gives_when_values_are_in_any_order(values: np.ndarray) -> None:
    """The values come in ascending order and each of them once."""
    assert np.array_equal(unique(values), np.unique(values))
    assert unique(values).dtype == values.dtype


@pytest.mark.parametrize("values", ARRAYS, ids=len)
def test_is_ascending_is_true_when_no_value_repeats_or_falls(values: np.ndarray) -> None:
    """An array is ascending when it is its own sorted set."""
    assert is_ascending(values) == np.array_equal(values, np.unique(values))


@pytest.mark.parametrize("values", ARRAYS, ids=len)
def test_distinct_and_tally_give_each_value_once_when_equal_ones_are_adjacent(values: np.ndarray) -> None:
    """Runs of equal values count as one."""
    values = np.sort(values)
    expected, times = np.unique(values, return_counts=True)
    assert np.array_equal(distinct(values), expected)
    if values.size:
        assert [array.tolist() for array in tally(values)] == [expected.tolist(), times.tolist()]


@pytest.mark.parametrize("some", ARRAYS, ids=len)
@pytest.mark.parametrize("values", ARRAYS, ids=len)
def test_among_finds_what_is_there_when_some_are_ascending(values: np.ndarray, some: np.ndarray) -> None:
    """Values below, between and above those searched are not among them."""
    assert np.array_equal(among(values, unique(some)), np.isin(values, some))
    assert among(unique(some), unique(some)).all()
