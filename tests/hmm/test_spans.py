"""Many ranges at a time: the same answers as one by one, without looking at all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hmm.spans import are_ascending, bounds, inside, overlap, union
from hmm.units import AddressRange

edges = st.lists(st.integers(0, 300), unique=True, max_size=120).map(sorted)


def spans_of(edges: list[int]) -> tuple[AddressRange, ...]:
    """Ascending, disjoint ranges."""
    return tuple(AddressRange(a, b) for a, b in zip(edges[::2], edges[1::2], strict=False))


class Counted(tuple[AddressRange, ...]):  # noqa: SLOT001
    """Ranges that count how often one of them is looked at."""

    looks: int

    def __getitem__(self, index: Any) -> Any:
        """Count one."""
        self.looks = getattr(self, "looks", 0) + 1
        return super().__getitem__(index)

    def __iter__(self) -> Any:
        """Count all."""
        self.looks = getattr(self, "looks", 0) + len(self)
        return super().__iter__()


@given(edges, edges)
def test_overlap_finds_what_comparing_each_with_each_finds(left: list[int], right: list[int]) -> None:
    """Few with many, many with many, touching ranges that share no byte."""
    ours, theirs = spans_of(left), spans_of(right)
    assert overlap(ours, theirs) == any(mine.overlaps(other) for mine in ours for other in theirs)


@given(st.lists(st.integers(0, 300), max_size=50), edges)
def test_inside_finds_what_comparing_each_with_each_finds(addresses: list[int], given: list[int]) -> None:
    """Starts are inside, ends are not."""
    spans = spans_of(given)
    found = inside(np.array(addresses, np.uint64), spans)
    assert found.tolist() == [any(address in span for span in spans) for address in addresses]


def test_overlap_looks_at_few_ranges_when_one_is_compared_with_many() -> None:
    """O(log n): a waiting fault of 131,072 ranges is compared with every change anew."""
    many = Counted(spans_of(list(range(1 << 18))))
    for start in (0, 77_777, (1 << 18) - 2):
        assert overlap((AddressRange(start, start + 2),), many)
    assert not overlap((AddressRange(77_777, 77_778),), many)
    assert many.looks < 4 * 25


def test_overlap_looks_at_every_range_once_or_twice_when_many_are_compared_with_many() -> None:
    """O(m + n): it was O(m * n)."""
    left = Counted(spans_of(list(range(1 << 15))))
    right = Counted(spans_of(list(range(1, 1 << 15))))
    assert not overlap(left, right)
    assert left.looks <= 2 * len(left)
    assert right.looks <= 2 * len(right)


def test_bounds_gives_starts_and_ends() -> None:
    """In the order of the ranges."""
    starts, ends = bounds(spans_of([1, 2, 5, 9]))
    assert (starts.tolist(), ends.tolist()) == ([1, 5], [2, 9])


def test_are_ascending_is_false_when_ranges_overlap() -> None:
    """Ranges that touch are disjoint."""
    assert are_ascending((*spans_of([0, 5, 5, 9]), AddressRange(9, 10)))
    assert not are_ascending((AddressRange(0, 5), AddressRange(4, 6)))


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(1, 20)), max_size=12))
def test_union_holds_the_same_bytes(parts: list[tuple[int, int]]) -> None:
    """Whatever order the ranges are in, and however they overlap."""
    spans = union(AddressRange(start, start + length) for start, length in parts)
    assert are_ascending(spans)
    there = {byte for start, length in parts for byte in range(start, start + length)}
    assert {byte for span in spans for byte in range(span.start, span.end)} == there
