"""Many ranges at a time: a fault of scattered pages, a fork of thousands of VMAs.

**Source**: our own; the kernel keeps such ranges in interval trees (include/linux/interval_tree_generic.h).

**Invariants**: everything here but `union` takes ranges that are ascending and disjoint, as events and faults have
them.

**Absent**: a map from ranges to values (interval.py).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from hmm.units import Address, AddressRange, Entries

__all__ = ["Spans", "are_ascending", "bounds", "inside", "meets", "overlap", "union"]

Spans = tuple[AddressRange, ...]

_FEW = 16
"""Up to so many are gone through one by one."""


def bounds(spans: Spans) -> tuple[Entries, Entries]:
    """uint64[n] starts and uint64[n] ends.  Cost: O(n)."""
    starts, ends = [span.start for span in spans], [span.end for span in spans]
    return np.array(starts, np.uint64), np.array(ends, np.uint64)


def overlap(left: Spans, right: Spans) -> bool:
    """True when a range of `left` shares a byte with one of `right`.

    Cost: O(log n) for each of a few, O(m + n) for many.
    """
    if len(left) == 1 == len(right):
        return left[0].overlaps(right[0])
    few, many = (left, right) if len(left) <= len(right) else (right, left)
    if len(few) <= _FEW:
        return any(meets(span, many) for span in few)
    starts, ends = bounds(few)
    other_starts, other_ends = bounds(many)
    after = np.searchsorted(other_ends, starts, side="right")
    met = after < other_ends.size
    return bool((other_starts[after[met]] < ends[met]).any())


def meets(span: AddressRange, spans: Spans) -> bool:
    """True when a range shares a byte with one of `spans`.  Cost: O(log n)."""
    if len(spans) == 1:
        return spans[0].overlaps(span)
    index = bisect_right(spans, span.start, key=_end)
    return index < len(spans) and spans[index].start < span.end


def inside(addresses: Entries, spans: Spans) -> npt.NDArray[np.bool_]:
    """bool[n]: which of uint64[n] addresses lie in one of the ranges.  Cost: O(n log k), vectorised."""
    if len(spans) == 1:
        found: npt.NDArray[np.bool_] = (addresses >= spans[0].start) & (addresses < spans[0].end)
        return found
    starts, ends = bounds(spans)
    at = np.searchsorted(starts, addresses, side="right") - 1
    found = at >= 0
    found[found] = addresses[found] < ends[at[found]]
    return found


def union(spans: Iterable[AddressRange]) -> Spans:
    """Ranges in any order, which may overlap, as ascending ones that do not.  Cost: that of sorting them."""
    found: list[AddressRange] = []
    for span in sorted(spans):
        if found and span.start < found[-1].end:
            found[-1] = AddressRange(found[-1].start, max(found[-1].end, span.end))
        else:
            found.append(span)
    return tuple(found)


def are_ascending(spans: Spans) -> bool:
    """Whether they are what everything here takes."""
    return all(before.end <= after.start for before, after in pairwise(spans))


def _end(span: AddressRange) -> Address:
    return span.end
