"""The map of VMAs against the simplest map there is: two flat lists, one of starts, one of values.

Run it as `python tests/bench/bench_vma.py [--quick]`. Both maps do the same work in turns, round by round; a figure is
the time of one operation, a ratio the median of the rounds. The flat lists know nothing of merging: they replace a
value by another and back, which is the least that a split and a merge can be.
"""

from __future__ import annotations

import argparse
import random
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from statistics import median
from time import perf_counter_ns

from measurement import Row, alone, compared, print_rows

from hmm.units import PAGE_SIZE, AddressRange
from hmm.vma import MAY_FLAGS, Mapping, Prot, VmFlag
from hmm.vma_map import VmaMap

BASE = 1 << 40
STRIDE = 4 * PAGE_SIZE
PARTS, PART = 20, 100
"""Operations are timed a hundred at a time: what is shorter than a time slice is interrupted seldom."""
VMAS_MAX = 65530
"""vm.max_map_count."""
TARGETS_US = {"find": 0.5, "split, merge": 2.5}
"""What one operation may take there, whatever the lists do."""
RW = Mapping(VmFlag.READ | VmFlag.WRITE | MAY_FLAGS)
READ = RW.with_prot(Prot.READ)


class FlatLists:
    """A piecewise constant function: starts, and the value from each start on; None where nothing is mapped."""

    def __init__(self) -> None:
        self.starts = [0]
        self.values: list[object] = [None]

    def find(self, address: int) -> tuple[int, int, object]:
        """The piece that holds an address."""
        index = bisect_right(self.starts, address)
        return self.starts[index - 1], self.starts[index], self.values[index - 1]

    def assign(self, start: int, end: int, value: object) -> None:
        """Give [start, end) a value; equal neighbours become one."""
        first = bisect_left(self.starts, start)
        stop = bisect_right(self.starts, end, first)
        tail = self.values[stop - 1]
        starts: list[int] = []
        values: list[object] = []
        before = self.values[first - 1] if first else self
        for at, given in ((start, value), (end, tail)):
            if given != before:
                starts.append(at)
                values.append(given)
                before = given
        self.starts[first:stop] = starts
        self.values[first:stop] = values

    def highest_hole(self, size: int, high: int) -> int | None:
        """A look at every piece from the top."""
        end = high
        for index in range(bisect_left(self.starts, high) - 1, -1, -1):
            start = self.starts[index]
            if self.values[index] is None and end - start >= size:
                return end - size
            end = start
        return None


def _each(call: Callable[[int], object], times: int) -> float:
    """Microseconds of one of `times` operations that a call does for one part of the addresses."""
    figures = []
    for part in range(PARTS):
        began = perf_counter_ns()
        call(part)
        figures.append((perf_counter_ns() - began) / times / 1000)
    return median(figures)


def _rounds(
    rounds: int, times: int, ours: Callable[[int], object], yardstick: Callable[[int], object]
) -> tuple[list[float], list[float]]:
    mine, theirs = [], []
    for _ in range(rounds):
        mine.append(_each(ours, times))
        theirs.append(_each(yardstick, times))
    return mine, theirs


class Work:
    """What is done to both maps, each holding `count` VMAs of three pages with a hole of one page between."""

    def __init__(self, count: int) -> None:
        self.vmas, self.flat = VmaMap(), FlatLists()
        for at in range(BASE, BASE + count * STRIDE, STRIDE):
            self.vmas.assign(AddressRange(at, at + STRIDE - PAGE_SIZE), RW)
            self.flat.assign(at, at + STRIDE - PAGE_SIZE, RW.perms)
        self.end = BASE + count * STRIDE - PAGE_SIZE
        chance = random.Random(count)
        addresses = [BASE + chance.randrange(count) * STRIDE + PAGE_SIZE for _ in range(PARTS * PART)]
        self.addresses = [addresses[at : at + PART] for at in range(0, PARTS * PART, PART)]
        self.spans = [[AddressRange(at, at + PAGE_SIZE) for at in part] for part in self.addresses]

    def find(self, part: int) -> None:
        """One look-up per address."""
        for address in self.addresses[part]:
            self.vmas.find(address)

    def find_flat(self, part: int) -> None:
        """The same in the flat lists."""
        for address in self.addresses[part]:
            self.flat.find(address)

    def protect(self, part: int) -> None:
        """A split and a merge per address."""
        for span in self.spans[part]:
            self.vmas.assign(span, READ)
            self.vmas.assign(span, RW)

    def protect_flat(self, part: int) -> None:
        """The same in the flat lists."""
        for address in self.addresses[part]:
            self.flat.assign(address, address + PAGE_SIZE, READ.perms)
            self.flat.assign(address, address + PAGE_SIZE, RW.perms)

    def unmap(self, part: int) -> None:
        """A hole made and filled per address."""
        for span in self.spans[part]:
            self.vmas.erase(span)
            self.vmas.assign(span, RW)

    def unmap_flat(self, part: int) -> None:
        """The same in the flat lists."""
        for address in self.addresses[part]:
            self.flat.assign(address, address + PAGE_SIZE, None)
            self.flat.assign(address, address + PAGE_SIZE, RW.perms)

    def search(self, _: int) -> None:
        """A search for two pages, which fit below all VMAs only."""
        assert self.vmas.unmapped_area_topdown(2 * PAGE_SIZE, PAGE_SIZE, self.end) == BASE - 2 * PAGE_SIZE

    def search_flat(self, _: int) -> None:
        """The same in the flat lists."""
        assert self.flat.highest_hole(2 * PAGE_SIZE, self.end) == BASE - 2 * PAGE_SIZE


def measure(quick: bool) -> Iterator[Row]:
    """All rows; `quick` takes fewer rounds."""
    rounds = 3 if quick else 9
    for count in (10, 1000, VMAS_MAX):
        work = Work(count)
        for name, times, ours, yardstick, target in (
            ("find", PART, work.find, work.find_flat, 1.25),
            ("split, merge", 2 * PART, work.protect, work.protect_flat, 0.5),
            ("munmap, mmap in the middle", 2 * PART, work.unmap, work.unmap_flat, 0.5),
            ("top-down search, no gap between", 1, work.search, work.search_flat, 0.05),
        ):
            figures = _rounds(rounds, times, ours, yardstick)
            yield compared(f"{name}, {count} VMAs", "µs", *figures, target=target if count == VMAS_MAX else None)
            if count == VMAS_MAX and name in TARGETS_US:
                yield alone(f"{name}, {count} VMAs, one", "µs", figures[0], TARGETS_US[name])


def main() -> int:
    """Print all rows; 1 when a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    return 0 if print_rows(measure(parser.parse_args().quick)) else 1


if __name__ == "__main__":
    sys.exit(main())
