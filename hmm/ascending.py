"""Arrays in ascending order: told, made, counted and searched.

numpy does this for arrays in any order, at ten times the price: since 2.3 its sets of numbers are hashed.  The first
call of some of its functions also imports a package, for thirty milliseconds, in the middle of somebody's request.

**Source**: our own.

**Invariants**: what is returned may be what was given; nobody writes to either.

**Absent**: ranges (spans.py).
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

__all__ = ["among", "distinct", "is_ascending", "tally", "unique"]

T = TypeVar("T", bound=np.integer[Any])


def is_ascending(values: npt.NDArray[np.integer[Any]]) -> bool:
    """True when every value is above the one before.  Cost: O(n)."""
    # count_nonzero() takes a fraction of the time of any() on short arrays.
    return not np.count_nonzero(values[1:] <= values[:-1])


def unique(values: npt.NDArray[T]) -> npt.NDArray[T]:
    """The values in ascending order, each once, as np.unique().

    Cost: O(n) when they are so already, else that of sorting.
    """
    return values if is_ascending(values) else distinct(np.sort(values))


def distinct(values: npt.NDArray[T]) -> npt.NDArray[T]:
    """The values without repetitions, where equal values are adjacent.  Cost: O(n)."""
    if values.size < 2:
        return values
    keep = np.empty(values.size, np.bool_)
    keep[0] = True
    np.not_equal(values[1:], values[:-1], out=keep[1:])
    return values[keep]


def tally(values: npt.NDArray[T]) -> tuple[npt.NDArray[T], npt.NDArray[np.int32]]:
    """Count values, at least one, of which equal ones are adjacent.

    Returns: the k distinct values, and int32[k], how often each occurs.
    """
    first = np.empty(values.size, np.bool_)
    first[0] = True
    np.not_equal(values[1:], values[:-1], out=first[1:])
    starts = first.nonzero()[0]
    times = np.empty(starts.size, np.int32)
    np.subtract(starts[1:], starts[:-1], out=times[:-1], casting="same_kind")
    times[-1] = values.size - starts[-1]
    return values[starts], times


def among(values: npt.NDArray[T], some: npt.NDArray[T]) -> npt.NDArray[np.bool_]:
    """bool[n]: which values are in `some`, which are ascending; as np.isin().

    Cost: O(n) when they are the same, else O(n log m), kinder to the cache when the values ascend too.
    """
    if not some.size:
        return np.zeros(values.size, np.bool_)
    if np.array_equal(values, some):
        return np.ones(values.size, np.bool_)
    found: npt.NDArray[np.bool_] = some[np.minimum(some.searchsorted(values), some.size - 1)] == values
    return found
