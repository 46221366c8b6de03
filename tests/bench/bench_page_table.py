"""The page table against a radix table in plain C, compiled on the spot.

Run it as `python tests/bench/bench_page_table.py [--quick]`. Both tables do the same work in turns. A figure of a round
is the best of its repetitions, for what others do on the machine only adds; a ratio is the median of the rounds'. The
C side is timed inside C.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter_ns
from typing import Literal, Protocol

import numpy as np
from measurement import Row, alone, compared, keep_memory, print_rows

from hmm.page_table import PageTable
from hmm.units import PAGE_SHIFT, Entries

LAST = (1 << 47) - 4097
BASE = 0x7F00_0000_0000
PFN_VALID, WRITE = 1 << 2, 1 << 4
VALID = 0b111
SCATTERED_ANYWHERE = 65_536
"""Pages, each with directories of its own, that fit in memory."""
ALL = (1 << 64) - 1


class Subject(Protocol):
    """A table under measurement: every call gives its nanoseconds."""

    def populate(self, start: int, end: int, entries: Entries) -> float:
        """Store an entry for every page."""

    def lookup(self, start: int, end: int, out: Entries) -> float:
        """Read every entry."""

    def protect(self, start: int, end: int) -> float:
        """Take WRITE from every entry."""

    def clear(self, start: int, end: int) -> float:
        """Clear every entry and free directories."""

    def store_many(self, addresses: Entries, entries: Entries) -> float:
        """Store scattered entries."""

    def lookup_many(self, addresses: Entries, out: Entries) -> float:
        """Read scattered entries."""

    def clear_many(self, addresses: Entries) -> float:
        """Clear scattered entries and free directories."""


def _clocked(call: Callable[[], object]) -> float:
    began = perf_counter_ns()
    call()
    return perf_counter_ns() - began


_CLOCK_NS = min(_clocked(lambda: None) for _ in range(1000))


def _timed(call: Callable[[], object]) -> float:
    """Nanoseconds of a call, without those of looking at the clock."""
    return _clocked(call) - _CLOCK_NS


class Arena:
    """`hmm.page_table`."""

    def __init__(self) -> None:
        self.table = PageTable(LAST)

    def populate(self, start: int, end: int, entries: Entries) -> float:
        """`fill()` with an entry per page."""
        return _timed(lambda: self.table.fill(start, end, entries))

    def lookup(self, start: int, end: int, out: Entries) -> float:
        """`read()`."""
        return _timed(lambda: self.table.read(start, end, out))

    def protect(self, start: int, end: int) -> float:
        """`apply_mask()` as after an event, with the check that entries stay valid."""
        return _timed(lambda: self.table.apply_mask(start, end, ALL & ~WRITE, VALID))

    def clear(self, start: int, end: int) -> float:
        """`clear()`."""
        return _timed(lambda: self.table.clear(start, end))

    def store_many(self, addresses: Entries, entries: Entries) -> float:
        """`store()`."""
        return _timed(lambda: self.table.store(addresses, entries))

    def lookup_many(self, addresses: Entries, out: Entries) -> float:
        """`lookup()`."""
        return _timed(lambda: self.table.lookup(addresses, out))

    def clear_many(self, addresses: Entries) -> float:
        """`clear_many()`."""
        return _timed(lambda: self.table.clear_many(addresses))


class Radix:
    """radix.c."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name in ("populate", "lookup", "protect", "clear", "store_many", "lookup_many", "clear_many"):
            getattr(library, f"radix_{name}").restype = ctypes.c_double
        library.radix_new.restype = ctypes.c_void_p
        library.radix_directories.restype = ctypes.c_uint64
        self._table = ctypes.c_void_p(library.radix_new())

    @property
    def directories(self) -> int:
        """Directories in use."""
        number: int = self._library.radix_directories(self._table)
        return number

    def close(self) -> None:
        """Give the memory back; the table must be empty."""
        self._library.radix_free(self._table)

    def populate(self, start: int, end: int, entries: Entries) -> float:
        """A walk per directory, an entry at a time."""
        return self._call("populate", start, end, _pointer(entries))

    def lookup(self, start: int, end: int, out: Entries) -> float:
        """A memcpy per directory."""
        return self._call("lookup", start, end, _pointer(out))

    def protect(self, start: int, end: int) -> float:
        """A loop over each directory."""
        return self._call("protect", start, end, ALL & ~WRITE)

    def clear(self, start: int, end: int) -> float:
        """A loop over each directory, which is then freed."""
        return self._call("clear", start, end)

    def store_many(self, addresses: Entries, entries: Entries) -> float:
        """A walk per address."""
        return self._call("store_many", _pointer(addresses), _pointer(entries), addresses.size)

    def lookup_many(self, addresses: Entries, out: Entries) -> float:
        """A walk per address."""
        return self._call("lookup_many", _pointer(addresses), _pointer(out), addresses.size)

    def clear_many(self, addresses: Entries) -> float:
        """A walk per address."""
        return self._call("clear_many", _pointer(addresses), addresses.size)

    def _call(self, name: str, *arguments: int | ctypes.c_void_p) -> float:
        words = [ctypes.c_uint64(word) if isinstance(word, int) else word for word in arguments]
        taken: float = getattr(self._library, f"radix_{name}")(self._table, *words)
        return taken


def _pointer(array: Entries) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def compile_radix(folder: str) -> ctypes.CDLL:
    """Compile radix.c into a folder and load it."""
    library = Path(folder) / "radix.so"
    source = Path(__file__).with_name("radix.c")
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
    return ctypes.CDLL(str(library))


def _agree(arena: Arena, radix: Radix) -> None:
    """Let both do the same and compare, for a yardstick that does other work measures nothing."""
    start, end = BASE + 5 * 4096, BASE + 3000 * 4096
    scattered = np.arange(0, 1 << 46, 12_345_678_848, dtype=np.uint64)
    outs = []
    for subject in (arena, radix):
        out, many = np.zeros(2995, np.uint64), np.zeros(scattered.size, np.uint64)
        subject.populate(start, end, np.arange(2995, dtype=np.uint64) << np.uint64(12) | np.uint64(PFN_VALID | WRITE))
        subject.store_many(scattered, scattered | np.uint64(PFN_VALID))
        subject.protect(start, end - 100 * 4096)
        subject.clear(start, start + 1000 * 4096)
        subject.clear_many(scattered[::2].copy())
        subject.lookup(start, end, out)
        subject.lookup_many(scattered, many)
        outs.append(np.concatenate((out, many)))
        subject.clear_many(scattered)
        subject.clear(start, end)
    assert np.array_equal(outs[0], outs[1]), "the tables disagree"
    assert arena.table.directories == radix.directories == 1


# -- dense ranges


def _dense_cycle(subject: Subject, npages: int, entries: Entries, out: Entries) -> dict[str, float]:
    start, end = BASE, BASE + (npages << PAGE_SHIFT)
    return {
        "populate": subject.populate(start, end, entries),
        "populate again": subject.populate(start, end, entries),
        "lookup": subject.lookup(start, end, out),
        "write-protect": subject.protect(start, end),
        "invalidate and free": subject.clear(start, end),
    }


def _dense(arena: Arena, radix: Radix, rounds: int, sizes: tuple[int, ...]) -> Iterator[Row]:
    for npages in sizes:
        entries = np.arange(npages, dtype=np.uint64) << np.uint64(PAGE_SHIFT) | np.uint64(PFN_VALID | WRITE)
        out = np.zeros(npages, np.uint64)
        repeat = 3 if npages > 1 << 20 else 10 if npages > 1 << 12 else 200
        _dense_cycle(radix, npages, entries, out)
        _dense_cycle(arena, npages, entries, out)
        figures: dict[str, tuple[list[float], list[float]]] = {}
        for _ in range(rounds):
            theirs, ours = [], []
            for _ in range(repeat):
                theirs.append(_dense_cycle(radix, npages, entries, out))
                ours.append(_dense_cycle(arena, npages, entries, out))
            for name in ours[0]:
                mine, yardstick = figures.setdefault(name, ([], []))
                mine.append(min(cycle[name] for cycle in ours))
                yardstick.append(min(cycle[name] for cycle in theirs))
        for name, (mine, yardstick) in figures.items():
            yield _dense_row(name, npages, mine, yardstick)


def _dense_row(name: str, npages: int, ours: list[float], yardstick: list[float]) -> Row:
    title = f"{name}, {npages:,} pages"
    if npages > 512:
        per_page = [taken / npages for taken in ours], [taken / npages for taken in yardstick]
        return compared(title, "ns/page", *per_page, 1.2)
    target = 4.0 if npages == 512 else 3.0 if name == "populate" else None
    microseconds = [taken / 1000 for taken in ours], [taken / 1000 for taken in yardstick]
    return compared(title, "µs", *microseconds, target, "value")


# -- scattered pages


def _scattered(arena: Arena, radix: Radix, rounds: int, sizes: tuple[int, ...]) -> Iterator[Row]:
    chance = np.random.default_rng(1)
    for span, span_bits in (("1 GiB", 30), ("64 GiB", 36), ("47 bit", 47)):
        for number in sizes:
            if number > SCATTERED_ANYWHERE and span != "64 GiB":
                continue  # 1 GiB has fewer pages; anywhere a directory for each page does not fit in memory
            # One after the other, so that each finds its directories in the cache.
            times, repeat = (1, 2) if number > SCATTERED_ANYWHERE else (rounds, 4)
            figures: dict[str, tuple[list[float], list[float]]] = {}
            for _ in range(times):
                pages = np.unique(chance.integers(0, (1 << span_bits) - 4096 >> PAGE_SHIFT, number))
                addresses = pages.astype(np.uint64) << np.uint64(PAGE_SHIFT)
                cycles: tuple[list[dict[str, float]], list[dict[str, float]]] = ([], [])
                for subject, column in ((radix, 1), (arena, 0)):
                    for _ in range(repeat):
                        shuffled = chance.permutation(addresses)
                        cycles[column].append(_scattered_cycle(subject, addresses, shuffled))
                for name in cycles[0][0]:
                    for column, figure in enumerate(figures.setdefault(name, ([], []))):
                        figure.append(min(cycle[name] for cycle in cycles[column]) / addresses.size)
            for name, (mine, yardstick) in figures.items():
                target, target_of = _scattered_target(name, span, number)
                title = f"{name}, {number:,} page{'s' * (number > 1)} over {span}"
                yield compared(title, "ns/page", mine, yardstick, target, target_of)


def _scattered_cycle(subject: Subject, addresses: Entries, shuffled: Entries) -> dict[str, float]:
    entries = addresses | np.uint64(PFN_VALID | WRITE)
    out = np.zeros(addresses.size, np.uint64)
    start, end = int(addresses[0]), int(addresses[-1]) + 4096
    repeat = 3 if addresses.size <= SCATTERED_ANYWHERE else 1
    return {
        "populate": subject.store_many(addresses, entries),
        "lookup sorted": min(subject.lookup_many(addresses, out) for _ in range(repeat)),
        "lookup shuffled": min(subject.lookup_many(shuffled, out) for _ in range(repeat)),
        "write-protect": subject.protect(start, end),
        "invalidate and free": subject.clear_many(addresses),
    }


def _scattered_target(name: str, span: str, number: int) -> tuple[float | None, Literal["ratio", "value"]]:
    if number < 4096 or name in ("lookup shuffled", "write-protect"):
        return None, "ratio"
    if name == "lookup sorted":
        if number > SCATTERED_ANYWHERE:
            return None, "ratio"
        return 1.2 if number > 4096 else 2.0 if span == "1 GiB" else 3.0, "ratio"
    return 100.0, "value"


# -- one page, walks, memory, growth


def _one_page(rounds: int) -> Iterator[Row]:
    table = PageTable(LAST)
    table.fill(BASE, BASE + (1 << 30), PFN_VALID)
    address, other = BASE + 0x1234_5000, BASE + (9 << 30)

    def repeated(call: Callable[[], object], times: int) -> list[float]:
        def loop() -> None:
            for _ in range(times):
                call()

        return [_timed(loop) / times / 1000 for _ in range(rounds)]

    def come_and_go() -> None:
        table.set(other, 5)
        table.set(other, 0)

    yield alone("get, 1 page", "µs", repeated(lambda: table.get(address), 5000), 0.4)
    yield alone("set, 1 page", "µs", repeated(lambda: table.set(address, 5), 5000), 3)
    yield alone("set and clear with 3 directories", "µs", repeated(come_and_go, 1000))
    whole = BASE, BASE + (1 << 30)
    walk = [taken / 512 * 1000 for taken in repeated(lambda: sum(1 for _ in table.walk(*whole)), 1)]
    yield alone("walk 1 GiB, per directory", "ns", walk)
    entries = [taken / 262_144 * 1000 for taken in repeated(lambda: sum(1 for _ in table.entries(*whole)), 1)]
    yield alone("entries of 1 GiB, one by one", "ns/page", entries)
    chunks = [taken / 262_144 * 1000 for taken in repeated(lambda: sum(1 for _ in table.chunks(*whole)), 1)]
    yield alone("snapshot of the entries in use of 1 GiB", "ns/page", chunks, 2.5)


def _memory() -> Iterator[Row]:
    before = _resident_bytes()
    table = PageTable(LAST)
    npages = 1 << 20
    table.fill(BASE, BASE + (npages << PAGE_SHIFT), PFN_VALID)
    yield alone("memory, 4 GiB dense", "bytes/page", [(_resident_bytes() - before) / npages], 8.7)
    del table
    before = _resident_bytes()
    tables = [PageTable(LAST) for _ in range(1000)]
    yield alone("memory of 1,000 empty tables", "MB", [(_resident_bytes() - before) / 1e6])
    for table in tables:
        table.fill(BASE, BASE + (16 << PAGE_SHIFT), PFN_VALID)
    yield alone("memory of 1,000 tables of 16 pages", "MB", [(_resident_bytes() - before) / 1e6], 40)
    yield alone("making a table", "µs", [_timed(lambda: PageTable(LAST)) / 1000 for _ in range(500)], 100)


def _resident_bytes() -> int:
    gc.collect()
    resident = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(resident) * 4096


def _growth(rounds: int) -> Iterator[Row]:
    small, large = Arena(), Arena()
    small.table.fill(BASE, BASE + (1 << 30), PFN_VALID)
    steps = []
    for at in range(64):
        start = BASE + (at << 30)
        began = perf_counter_ns()
        large.table.fill(start, start + (1 << 30), PFN_VALID)
        steps.append(perf_counter_ns() - began)
    yield alone("growing by 1 GiB: slowest of 64 steps / median", "x", [max(steps) / median(steps)])
    chance = np.random.default_rng(2)
    random = np.unique(chance.integers(0, 1 << 24, 4096)).astype(np.uint64) << np.uint64(PAGE_SHIFT)
    entries = np.full(262_144, PFN_VALID, np.uint64)
    out = np.zeros(262_144, np.uint64)
    figures: dict[str, tuple[list[float], list[float]]] = {}
    for _ in range(rounds):
        for arena, column, addresses in ((small, 1, random & np.uint64((1 << 30) - 1)), (large, 0, random)):
            within = np.unique(addresses) + np.uint64(BASE)
            cycle = {
                "random lookup of 4,096 pages": median(arena.lookup_many(within, out[: within.size]) for _ in range(9)),
                **_dense_cycle(arena, 262_144, entries, out),
            }
            for name, taken in cycle.items():
                figures.setdefault(name, ([], []))[column].append(taken / 1000)
    for name, (mine, yardstick) in figures.items():
        target = 4.0 if name.startswith("random") else 1.5
        yield compared(f"64 GiB mapped / 1 GiB mapped: {name}", "µs", mine, yardstick, target)


def measure(quick: bool) -> Iterator[Row]:
    """All rows; `quick` leaves out the largest sizes and takes fewer rounds."""
    keep_memory()
    rounds = 3 if quick else 9
    with tempfile.TemporaryDirectory() as folder:
        radix, arena = Radix(compile_radix(folder)), Arena()
        _agree(arena, radix)
        dense = (1, 512, 262_144) if quick else (1, 512, 262_144, 4_194_304)
        scattered = (1, 256, 4096) if quick else (1, 256, 4096, SCATTERED_ANYWHERE, 4_194_304)
        yield from _dense(arena, radix, rounds, dense)
        yield from _scattered(arena, radix, rounds, scattered)
        radix.close()
        del arena
    yield from _one_page(rounds)
    yield from _memory()
    if not quick:
        yield from _growth(rounds)


def main() -> int:
    """Print all rows; 1 when a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, without the largest sizes")
    return 0 if print_rows(measure(parser.parse_args().quick)) else 1


if __name__ == "__main__":
    sys.exit(main())
