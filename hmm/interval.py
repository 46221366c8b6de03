"""Ordered, disjoint intervals: the structure beneath the map of VMAs.

An interval is a tuple that begins with integers `start < end`.  They lie in chunks of at most `2 * CHUNK`, each a few
parallel lists, below one list of the addresses that the chunks begin at: a B-tree of two levels.  Lists move kilobytes
with one memmove, so this beats balanced trees written in Python at every size a process may have (65,530 VMAs).
The interval that a fault found last is remembered until the map changes, since the next one mostly finds it again.

Every chunk also keeps the size of the hole below each interval and an upper bound of these sizes, so that the
search for a hole skips chunks: the kernel's maple tree keeps the same number in its nodes.

**Source**: Linux lib/maple_tree.c, mas_empty_area() and mas_empty_area_rev(), for the search of holes.

**Invariants**: intervals are ascending and disjoint; the first chunk begins at 0, each ends where the next one begins,
and no interval lies in two; no chunk is empty, unless the map is, or above `2 * CHUNK`; `holes` are exact and `largest`
is never below their maximum; the count is the number of intervals; the one remembered is one of them.

**Absent**: what an interval means, and when two neighbours are one.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

CHUNK = 128

Interval: TypeAlias = tuple[int, int, *tuple[Any, ...]]
"""The integers [start, end), never empty, and whatever else."""

_NOTHING: Any = 0, 0
"""What was found last when there is no such interval: it holds no key."""

T = TypeVar("T", bound=Interval)


class _Chunk(Generic[T]):
    """Consecutive intervals, where each starts, and the free space below it; no hole is larger than `largest`."""

    __slots__ = ("holes", "items", "largest", "starts")

    def __init__(self, items: list[T], starts: list[int], holes: list[int]) -> None:
        self.items = items
        self.starts = starts
        self.holes = holes
        self.largest = max(holes, default=0)


class Hole(NamedTuple, Generic[T]):
    """Free space [start, end), and the first interval above it."""

    start: int
    end: int
    above: T | None


class IntervalMap(Generic[T]):
    """Disjoint intervals in ascending order.

    Args:
        limit: end of the space; the hole above the last interval ends here.

    Cost: look-ups O(log n); a change O(log n + CHUNK) plus the intervals it replaces.
    """

    __slots__ = ("_chunks", "_count", "_firsts", "_found", "_limit")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._firsts: list[int] = [0]
        self._chunks: list[_Chunk[T]] = [_Chunk([], [], [])]
        self._count = 0
        self._found: T = _NOTHING

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[T]:
        """All intervals, ascending; the map must not change meanwhile."""
        return chain.from_iterable([chunk.items for chunk in self._chunks])

    def find(self, key: int) -> T | None:
        """The interval that holds `key`."""
        chunk = self._chunks[bisect_right(self._firsts, key) - 1]
        index = bisect_right(chunk.starts, key)
        if index:
            item = chunk.items[index - 1]
            if key < item[1]:
                return item
        return None

    def find_again(self, key: int) -> T | None:
        """As `find`, for who asks for the same interval time and again.

        Cost: 0.1 us for the one that was found so last, else a tenth more than `find`.
        """
        found = self._found
        if found[0] <= key < found[1]:
            return found
        item = self.find(key)
        if item is not None:
            self._found = item
        return item

    def find_next(self, key: int) -> T | None:
        """The first interval that ends above `key`: the one that holds it, or the next one.

        Source: Linux mm/mmap.c, find_vma().
        """
        number = bisect_right(self._firsts, key) - 1
        chunk = self._chunks[number]
        index = bisect_right(chunk.starts, key)
        if index and key < chunk.items[index - 1][1]:
            return chunk.items[index - 1]
        if index < len(chunk.items):
            return chunk.items[index]
        return self._chunks[number + 1].items[0] if number + 1 < len(self._chunks) else None

    def find_prev(self, key: int) -> T | None:
        """The last interval that starts below `key`.

        Source: Linux mm/mmap.c, find_vma_prev(), when `key` is in no interval or the start of one.
        """
        number = bisect_left(self._firsts, key, 1) - 1
        chunk = self._chunks[number]
        index = bisect_left(chunk.starts, key)
        if index:
            return chunk.items[index - 1]
        return self._chunks[number - 1].items[-1] if number else None

    def between(self, start: int, end: int) -> list[T]:
        """The intervals that share an integer with [start, end), whole.

        Cost: O(log n) plus the intervals returned.
        """
        if start >= end:
            return []
        firsts = self._firsts
        number = bisect_right(firsts, start) - 1
        chunk = self._chunks[number]
        first = bisect_right(chunk.starts, start)
        if first and chunk.items[first - 1][1] > start:
            first -= 1
        if number + 1 == len(firsts) or end <= firsts[number + 1]:
            return chunk.items[first : bisect_left(chunk.starts, end, first)]
        items = chunk.items[first:]
        *whole, last = self._chunks[number + 1 : bisect_left(firsts, end)]
        for chunk in whole:
            items += chunk.items
        return items + last.items[: bisect_left(last.starts, end)]

    def highest_hole(self, size: int, low: int, high: int) -> Hole[T] | None:
        """The highest free space of at least `size` in [low, high), clipped to it.

        Cost: O(chunks) comparisons, and one look at every hole of the few chunks that may hold the answer.
        Source: Linux lib/maple_tree.c, mas_empty_area_rev().
        """
        assert size > 0
        start, end = max(low, self._end_before(len(self._chunks))), min(high, self._limit)
        if end - start >= size:
            return Hole(start, end, None)
        for chunk in reversed(self._chunks[: bisect_left(self._firsts, high) + 1]):
            if chunk.largest < size:
                continue
            starts, holes = chunk.starts, chunk.holes
            for at in range(len(holes) - 1, -1, -1):
                if holes[at] >= size:
                    start, end = max(starts[at] - holes[at], low), min(starts[at], high)
                    if end - start >= size:
                        return Hole(start, end, chunk.items[at])
            chunk.largest = max(holes, default=0)
            if starts and starts[0] <= low:
                break
        return None

    def lowest_hole(self, size: int, low: int, high: int) -> Hole[T] | None:
        """The lowest free space of at least `size` in [low, high), clipped to it.

        Cost: as `highest_hole`.  Source: Linux lib/maple_tree.c, mas_empty_area().
        """
        assert size > 0
        for chunk in self._chunks[bisect_right(self._firsts, low) - 1 :]:
            if chunk.largest < size:
                continue
            starts = chunk.starts
            for at, hole in enumerate(chunk.holes):
                if hole >= size:
                    start, end = max(starts[at] - hole, low), min(starts[at], high)
                    if end - start >= size:
                        return Hole(start, end, chunk.items[at])
            chunk.largest = max(chunk.holes, default=0)
            if starts and starts[-1] >= high:
                break
        start, end = max(low, self._end_before(len(self._chunks))), min(high, self._limit)
        return Hole(start, end, None) if end - start >= size else None

    def _touching(self, start: int, end: int) -> tuple[int, int, int, T | None, T | None]:
        """The intervals that overlap [start, end) or end or begin at its ends, maybe none.

        Returns: number of the one chunk that they lie in, index of the first one there and behind the last one; the
            interval that begins below `start` and the one that ends above `end`, which may be the same.
        """
        firsts = self._firsts
        number = bisect_left(firsts, start, 1) - 1
        if number + 1 < len(firsts) and firsts[number + 1] <= end:
            self._join(number, bisect_right(firsts, end))
        chunk = self._chunks[number]
        starts, items = chunk.starts, chunk.items
        first = bisect_left(starts, start)
        stop = bisect_right(starts, end, first)
        below = above = None
        if first and items[first - 1][1] >= start:
            first -= 1
            below = items[first]
        if stop > first and items[stop - 1][1] > end:
            above = items[stop - 1]
        return number, first, stop, below, above

    def _splice(self, number: int, first: int, stop: int, items: Sequence[T]) -> None:
        """Replace intervals `first` to `stop` of a chunk; the new ones, ascending, fit between their neighbours."""
        self._found = _NOTHING
        chunk = self._chunks[number]
        present = chunk.items
        end = present[first - 1][1] if first else self._end_before(number)
        ended = present[stop - 1][1] if stop else end
        starts, holes = [], []
        for item in items:
            start = item[0]
            hole = start - end
            starts.append(start)
            holes.append(hole)
            if hole > chunk.largest:  # noqa: PLR1730 - max() would cost more than the rest of the loop
                chunk.largest = hole
            end = item[1]
        present[first:stop] = items
        chunk.starts[first:stop] = starts
        chunk.holes[first:stop] = holes
        if end != ended:
            self._measure(number, first + len(items), end)
        self._count += len(items) - (stop - first)
        if not 0 < len(present) <= 2 * CHUNK:
            self._balance(number)

    def _measure(self, number: int, index: int, end: int) -> None:
        """Measure the hole below one interval anew, the first one of the next chunk if need be; it begins at `end`."""
        chunk = self._chunks[number]
        if index == len(chunk.items):
            if number + 1 == len(self._chunks):
                return
            chunk, index = self._chunks[number + 1], 0
        hole = chunk.holes[index] = chunk.starts[index] - end
        chunk.largest = max(chunk.largest, hole)

    def _exchange(self, item: T, changed: T) -> None:
        """Put `changed` in the place of `item`, which it equals in extent."""
        assert item[:2] == changed[:2], (item, changed)
        start = item[0]
        chunk = self._chunks[bisect_right(self._firsts, start) - 1]
        index = bisect_left(chunk.starts, start)
        assert chunk.items[index] == item, (chunk.items[index], item)
        chunk.items[index] = changed
        self._found = _NOTHING

    def _join(self, number: int, stop: int) -> None:
        """Make one chunk of chunks `number` to `stop`, however long it becomes."""
        joined: _Chunk[T] = _Chunk([], [], [])
        for chunk in self._chunks[number:stop]:
            joined.items += chunk.items
            joined.starts += chunk.starts
            joined.holes += chunk.holes
            joined.largest = max(joined.largest, chunk.largest)
        self._chunks[number:stop] = [joined]
        del self._firsts[number + 1 : stop]

    def _balance(self, number: int) -> None:
        """Join a chunk that has become empty with a neighbour; divide one that has become too long."""
        if not self._chunks[number].items and len(self._chunks) > 1:
            number = max(number - 1, 0)
            self._join(number, number + 2)
        chunk = self._chunks[number]
        size = len(chunk.items)
        if size > 2 * CHUNK:
            step = -(-size // (size // CHUNK))
            parts = [slice(at, at + step) for at in range(0, size, step)]
            self._chunks[number : number + 1] = [
                _Chunk(chunk.items[part], chunk.starts[part], chunk.holes[part]) for part in parts
            ]
            self._firsts[number + 1 : number + 1] = chunk.starts[step::step]

    def _end_before(self, number: int) -> int:
        """Where the last interval below chunk `number` ends; 0 when there is none."""
        below = self._chunks[number - 1].items if number else ()
        return below[-1][1] if below else 0

    def image(self) -> object:
        """All of the map's state, as a value (`checked.HasImage`).  Cost: O(n), a copy."""
        chunks = ((*chunk.starts, *chunk.items, *chunk.holes, chunk.largest) for chunk in self._chunks)
        return self._count, *self._firsts, *chunks

    def check(self) -> None:
        """Assert all invariants of the structure.

        Cost: O(n).
        """
        end = count = 0
        assert self._firsts[0] == 0
        for first, chunk in zip(self._firsts, self._chunks, strict=True):
            assert end <= first, (end, first)
            assert chunk.items or len(self._chunks) == 1
            assert len(chunk.items) <= 2 * CHUNK, len(chunk.items)
            assert chunk.starts == [item[0] for item in chunk.items]
            assert max(chunk.holes, default=0) <= chunk.largest, (max(chunk.holes), chunk.largest)
            for item, hole in zip(chunk.items, chunk.holes, strict=True):
                assert max(first, end) <= item[0] < item[1] <= self._limit, (end, item)
                assert hole == item[0] - end, (item, hole)
                end = item[1]
            count += len(chunk.items)
        assert count == self._count, (count, self._count)
        if self._found is not _NOTHING:
            assert self.between(*self._found[:2]) == [self._found], self._found
