"""Ordered, disjoint intervals: the structure beneath the map of VMAs.

An interval is a tuple that begins with integers `start < end`.  They lie in chunks of at most `2 * CHUNK`, each a few
parallel lists, below one list of the chunks' first starts: a B-tree of two levels.  Lists move kilobytes with
one memmove, so this beats balanced trees written in Python at every size a process may have (65,530 VMAs).
The interval that a fault found last is remembered until the map changes, since the next one mostly finds it again.

Every chunk also keeps the size of the hole below each interval and an upper bound of these sizes, so that the
search for a hole skips chunks: the kernel's maple tree keeps the same number in its nodes.

**Source**: Linux lib/maple_tree.c, mas_empty_area() and mas_empty_area_rev(), for the search of holes.

**Invariants**: intervals are ascending and disjoint; no chunk is empty or above `2 * CHUNK`; `holes` are exact
and `largest` is never below their maximum; the count is the number of intervals; the one remembered is one of them.

**Absent**: what an interval means, and when two neighbours are one.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

CHUNK = 128

Interval: TypeAlias = tuple[int, int, *tuple[Any, ...]]
"""The integers [start, end), never empty, and whatever else."""

_NOTHING: Any = 0, 0
"""What was found last when there is no such interval: it holds no key."""

T = TypeVar("T", bound=Interval)


class _Chunk(Generic[T]):
    """Consecutive intervals; `holes[i]` is the free space below `starts[i]`."""

    __slots__ = ("holes", "items", "largest", "starts")

    def __init__(self, items: Sequence[T], end_before: int) -> None:
        self.items: list[T] = []
        self.starts: list[int] = []
        self.holes: list[int] = []
        self.largest = 0
        self.replace(0, 0, items, end_before)

    def replace(self, first: int, stop: int, items: Sequence[T], end_before: int) -> int:
        """Put `items` in the place of intervals `first` to `stop`; `end_before` is where the one below ends.

        Returns: the end of the last one of `items`, or `end_before`.
        """
        ended = self.items[stop - 1][1] if stop else -1
        starts, holes = [], []
        largest = self.largest
        for item in items:
            start = item[0]
            hole = start - end_before
            end_before = item[1]
            starts.append(start)
            holes.append(hole)
            if hole > largest:  # noqa: PLR1730 - max() would cost more than the rest of the loop
                largest = hole
        self.largest = largest
        self.items[first:stop] = items
        self.starts[first:stop] = starts
        self.holes[first:stop] = holes
        if end_before != ended:
            follower = first + len(starts)
            if follower < len(self.starts):
                self.measure(follower, end_before)
        return end_before

    def measure(self, index: int, end_before: int) -> None:
        """Measure one hole anew."""
        hole = self.starts[index] - end_before
        self.holes[index] = hole
        if hole > self.largest:  # noqa: PLR1730 - as above
            self.largest = hole


Slot: TypeAlias = tuple[int, int, int, int]
"""Chunk and index of the first interval of some consecutive ones; chunk of the last one, and index behind it."""


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
        self._firsts: list[int] = []
        self._chunks: list[_Chunk[T]] = []
        self._count = 0
        self._found: T = _NOTHING

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[T]:
        """All intervals, ascending; the map must not change meanwhile."""
        for chunk in self._chunks:
            yield from chunk.items

    def find(self, key: int) -> T | None:
        """The interval that holds `key`."""
        number = bisect_right(self._firsts, key) - 1
        if number < 0:
            return None
        chunk = self._chunks[number]
        item = chunk.items[bisect_right(chunk.starts, key) - 1]
        return item if key < item[1] else None

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
        if number < 0:
            return self._chunks[0].items[0] if self._chunks else None
        chunk = self._chunks[number]
        index = bisect_right(chunk.starts, key)
        item = chunk.items[index - 1]
        if key < item[1]:
            return item
        if index < len(chunk.items):
            return chunk.items[index]
        return self._chunks[number + 1].items[0] if number + 1 < len(self._chunks) else None

    def find_prev(self, key: int) -> T | None:
        """The last interval that starts below `key`.

        Source: Linux mm/mmap.c, find_vma_prev(), when `key` is in no interval or the start of one.
        """
        number = bisect_left(self._firsts, key) - 1
        if number < 0:
            return None
        chunk = self._chunks[number]
        return chunk.items[bisect_left(chunk.starts, key) - 1]

    def between(self, start: int, end: int) -> list[T]:
        """The intervals that share an integer with [start, end), whole.

        Cost: O(log n) plus the intervals returned.
        """
        last = bisect_left(self._firsts, end) - 1
        if last < 0 or start >= end:
            return []
        number = max(bisect_right(self._firsts, start) - 1, 0) if last else 0
        chunk = self._chunks[number]
        first = bisect_right(chunk.starts, start)
        if first and chunk.items[first - 1][1] > start:
            first -= 1
        if number == last:
            return chunk.items[first : bisect_left(chunk.starts, end, first)]
        return self._items((number, first, last, bisect_left(self._chunks[last].starts, end)))

    def highest_hole(self, size: int, low: int, high: int) -> Hole[T] | None:
        """The highest free space of at least `size` in [low, high), clipped to it.

        Cost: O(chunks) comparisons, and one look at every hole of the few chunks that may hold the answer.
        Source: Linux lib/maple_tree.c, mas_empty_area_rev().
        """
        assert size > 0
        start, end = max(low, self._end_before(len(self._chunks), 0)), min(high, self._limit)
        if end - start >= size:
            return Hole(start, end, None)
        for chunk in reversed(self._chunks[: bisect_left(self._firsts, high) + 1]):
            if chunk.largest < size:
                continue
            for at in range(len(chunk.holes) - 1, -1, -1):
                if chunk.holes[at] >= size:
                    start, end = max(chunk.starts[at] - chunk.holes[at], low), min(chunk.starts[at], high)
                    if end - start >= size:
                        return Hole(start, end, chunk.items[at])
            chunk.largest = max(chunk.holes)
            if chunk.starts[0] <= low:
                break
        return None

    def lowest_hole(self, size: int, low: int, high: int) -> Hole[T] | None:
        """The lowest free space of at least `size` in [low, high), clipped to it.

        Cost: as `highest_hole`.  Source: Linux lib/maple_tree.c, mas_empty_area().
        """
        assert size > 0
        for chunk in self._chunks[max(bisect_right(self._firsts, low) - 1, 0) :]:
            if chunk.largest < size:
                continue
            for at, hole in enumerate(chunk.holes):
                if hole >= size:
                    start, end = max(chunk.starts[at] - hole, low), min(chunk.starts[at], high)
                    if end - start >= size:
                        return Hole(start, end, chunk.items[at])
            chunk.largest = max(chunk.holes)
            if chunk.starts[-1] >= high:
                break
        start, end = max(low, self._end_before(len(self._chunks), 0)), min(high, self._limit)
        return Hole(start, end, None) if end - start >= size else None

    def _touching(self, start: int, end: int) -> tuple[Slot, list[T]]:
        """The intervals that overlap [start, end) or end or begin at its ends, maybe none, and where they stand."""
        firsts = self._firsts
        if not firsts:
            return (0, 0, 0, 0), []
        number = bisect_left(firsts, start)
        if number:
            number -= 1
        chunk = self._chunks[number]
        starts, items = chunk.starts, chunk.items
        first = bisect_left(starts, start)
        if first and items[first - 1][1] >= start:
            first -= 1
        if number + 1 < len(firsts) and firsts[number + 1] <= end:
            last = bisect_right(firsts, end, number + 1) - 1
            slot = number, first, last, bisect_right(self._chunks[last].starts, end)
            return slot, self._items(slot)
        stop = bisect_right(starts, end, first)
        return (number, first, number, stop), items[first:stop]

    def _items(self, slot: Slot) -> list[T]:
        number, first, last, stop = slot
        chunks = self._chunks
        if number == last:
            return chunks[number].items[first:stop] if chunks else []
        items = chunks[number].items[first:]
        for chunk in chunks[number + 1 : last]:
            items += chunk.items
        return items + chunks[last].items[:stop]

    def _splice(self, slot: Slot, items: Sequence[T]) -> None:
        """Replace the intervals of a slot; the new ones are ascending and fit between their neighbours."""
        number, first, last, stop = slot
        chunks = self._chunks
        self._found = _NOTHING
        if number != last or not chunks:
            self._rebuild(slot, items)
            return
        chunk = chunks[number]
        more = len(items) - (stop - first)
        size = len(chunk.items) + more
        if not 0 < size <= 2 * CHUNK:
            self._rebuild(slot, items)
            return
        self._count += more
        end = chunk.replace(first, stop, items, chunk.items[first - 1][1] if first else self._end_before(number, 0))
        if not first:
            self._firsts[number] = chunk.starts[0]
        if first + len(items) == size and number + 1 < len(chunks):
            chunks[number + 1].measure(0, end)

    def _exchange(self, item: T, changed: T) -> None:
        """Put `changed` in the place of `item`, which it equals in extent."""
        assert item[:2] == changed[:2], (item, changed)
        start = item[0]
        chunk = self._chunks[bisect_right(self._firsts, start) - 1]
        index = bisect_left(chunk.starts, start)
        assert chunk.items[index] == item, (chunk.items[index], item)
        chunk.items[index] = changed
        self._found = _NOTHING

    def _rebuild(self, slot: Slot, items: Sequence[T]) -> None:
        """Replace whole chunks: those of the slot, and a neighbour when too little would be left of them."""
        number, first, last, stop = slot
        chunks = self._chunks
        before = chunks[number].items[:first] if chunks else []
        after = chunks[last].items[stop:] if chunks else []
        self._count += len(items) - len(self._items(slot))
        merged = [*before, *items, *after]
        lower, upper = number, last + 1
        if len(merged) < CHUNK // 4 and lower:
            lower -= 1
            merged = chunks[lower].items + merged
        if len(merged) < CHUNK // 4 and upper < len(chunks):
            merged = merged + chunks[upper].items
            upper += 1
        end = self._end_before(lower, 0)
        rebuilt: list[_Chunk[T]] = []
        step = CHUNK if len(merged) > 2 * CHUNK else 2 * CHUNK
        for at in range(0, len(merged), step):
            chunk = _Chunk(merged[at : at + step], end)
            end = chunk.items[-1][1]
            rebuilt.append(chunk)
        chunks[lower:upper] = rebuilt
        self._firsts[lower:upper] = [chunk.starts[0] for chunk in rebuilt]
        follower = lower + len(rebuilt)
        if follower < len(chunks):
            chunks[follower].measure(0, end)

    def _end_before(self, number: int, index: int) -> int:
        """Where the interval below interval `index` of chunk `number` ends; 0 below the first one."""
        if index:
            return self._chunks[number].items[index - 1][1]
        return self._chunks[number - 1].items[-1][1] if number else 0

    def image(self) -> object:
        """All of the map's state, as a value (`checked.HasImage`).  Cost: O(n), a copy."""
        chunks = ((*chunk.starts, *chunk.items, *chunk.holes, chunk.largest) for chunk in self._chunks)
        return self._count, *self._firsts, *chunks

    def check(self) -> None:
        """Assert all invariants of the structure.

        Cost: O(n).
        """
        end = count = 0
        assert len(self._firsts) == len(self._chunks)
        for first, chunk in zip(self._firsts, self._chunks, strict=True):
            assert 0 < len(chunk.items) <= 2 * CHUNK, len(chunk.items)
            assert first == chunk.starts[0]
            assert chunk.starts == [item[0] for item in chunk.items]
            assert len(chunk.holes) == len(chunk.items)
            assert max(chunk.holes) <= chunk.largest, (max(chunk.holes), chunk.largest)
            for item, hole in zip(chunk.items, chunk.holes, strict=True):
                assert end <= item[0] < item[1] <= self._limit, (end, item)
                assert hole == item[0] - end, (item, hole)
                end = item[1]
            count += len(chunk.items)
        assert count == self._count, (count, self._count)
        if self._found is not _NOTHING:
            assert self.between(*self._found[:2]) == [self._found], self._found
