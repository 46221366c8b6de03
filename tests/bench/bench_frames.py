"""Frames against the same work in bare numpy.

Run it as `python tests/bench/bench_frames.py [--quick]`. Ours and the yardstick take turns, round by round; a figure
is nanoseconds per page, a ratio the median of the rounds. The yardsticks count nothing they need not count: one
array of counters without checks, one memcpy of as many bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from time import perf_counter_ns

import numpy as np
from measurement import Row, alone, compared, print_rows

from hmm.frames import Frames, PageFlag
from hmm.units import PAGE_SIZE, PIECE_PAGES, Pfns

POOL_FRAMES = 4 * PIECE_PAGES


def _each(call: Callable[[], object], npages: int, repetitions: int) -> float:
    """Nanoseconds per page: the best of some repetitions."""
    best = float("inf")
    for _ in range(repetitions):
        began = perf_counter_ns()
        call()
        best = min(best, perf_counter_ns() - began)
    return best / npages


def _rounds(
    rounds: int, npages: int, ours: Callable[[], object], yardstick: Callable[[], object]
) -> tuple[list[float], list[float]]:
    repetitions = 5 if npages > 4096 else 50
    mine, theirs = [], []
    for _ in range(rounds):
        mine.append(_each(ours, npages, repetitions))
        theirs.append(_each(yardstick, npages, repetitions))
    return mine, theirs


def _life(frames: Frames, rounds: int) -> Iterator[Row]:
    counters = np.zeros(POOL_FRAMES, np.int32)
    for npages in (1, 512, PIECE_PAGES):

        def bare(npages: int = npages) -> None:
            taken = np.arange(npages)
            counters[:npages] = 1
            assert taken.size == npages

        def allocate_and_put(npages: int = npages) -> None:
            frames.put(frames.allocate(npages))

        def map_and_unmap(npages: int = npages) -> None:
            frames.unmap(frames.allocate_mapped(npages, PageFlag.ANON))

        allocated: list[float] = []
        for _ in range(10 * rounds):
            began = perf_counter_ns()
            taken = frames.allocate(npages)
            allocated.append((perf_counter_ns() - began) / npages)
            frames.put(taken)
        target = 3.0 if npages == PIECE_PAGES else None
        yield alone(f"allocate {npages}, used before", "ns/page", allocated, target)
        for name, ours in (("allocate and put", allocate_and_put), ("allocate mapped and unmap", map_and_unmap)):
            yield compared(f"{name} {npages} / an array and a count", "ns/page", *_rounds(rounds, npages, ours, bare))


def _one(frames: Frames, rounds: int) -> Iterator[Row]:
    times = 2000

    def one() -> None:
        for _ in range(times):
            frames.put_one(frames.allocate_one())

    def as_arrays() -> None:
        for _ in range(times):
            frames.put(frames.allocate(1))

    figures = _rounds(rounds, times, one, as_arrays)
    yield compared("allocate_one and put_one / as arrays of one", "ns", *figures, target=0.2)


def _counts(frames: Frames, rounds: int) -> Iterator[Row]:
    counters = np.zeros(POOL_FRAMES, np.int32)
    one = np.int32(1)
    for npages in (512, PIECE_PAGES):
        taken = frames.allocate(npages)
        scattered = np.random.default_rng(1).permutation(taken)

        def bare_scattered(scattered: Pfns = scattered) -> None:
            np.add.at(counters, scattered, one)
            np.subtract.at(counters, scattered, one)

        def bare_run(taken: Pfns = taken) -> None:
            run = counters[taken[0] : taken[-1] + 1]
            run += one
            run -= one

        for name, pfns, bare, target in (
            ("scattered", scattered, bare_scattered, 3.0 if npages == PIECE_PAGES else None),
            ("consecutive", taken, bare_run, None),
        ):

            def get_and_put(pfns: Pfns = pfns) -> None:
                frames.get(pfns)
                frames.put(pfns)

            figures = _rounds(rounds, npages, get_and_put, bare)
            yield compared(f"get and put {npages} {name} / bare counting", "ns/page", *figures, target=target)
        frames.put(taken)


def _contents(frames: Frames, rounds: int) -> Iterator[Row]:
    npages = 512
    taken = frames.allocate(2 * npages)
    scattered = np.random.default_rng(2).permutation(taken)
    targets, sources = scattered[:npages], scattered[npages:]
    buffer = np.ones((npages, PAGE_SIZE), np.uint8)
    other = np.ones((npages, PAGE_SIZE), np.uint8)
    frames.scatter(taken[:npages], buffer)
    frames.scatter(taken[npages:], buffer)

    def memcpy() -> None:
        buffer[...] = other

    for name, ours, target in (
        ("copy 512 scattered", lambda: frames.copy(targets, sources), 4.0),
        ("copy 512 consecutive", lambda: frames.copy(taken[:npages], taken[npages:]), 2.0),
        ("gather 512 scattered", lambda: frames.gather(sources, buffer), 3.0),
        ("scatter 512 scattered", lambda: frames.scatter(targets, buffer), 3.0),
    ):
        yield compared(f"{name} / memcpy", "ns/page", *_rounds(rounds, npages, ours, memcpy), target=target)

    def zero() -> None:
        buffer[...] = 0

    figures = _rounds(rounds, npages, lambda: frames.clear(taken[:npages]), zero)
    yield compared("clear 512, not read yet / memset", "ns/page", *figures, target=0.25)
    frames.put(taken)


def measure(quick: bool) -> Iterator[Row]:
    """All rows; `quick` takes fewer rounds."""
    rounds = 3 if quick else 9
    frames = Frames(POOL_FRAMES, 0)
    frames.put(frames.allocate(2 * PIECE_PAGES))
    yield from _life(frames, rounds)
    yield from _one(frames, rounds)
    yield from _counts(frames, rounds)
    yield from _contents(frames, rounds)
    frames.check()


def main() -> int:
    """Print all rows; 1 when a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    return 0 if print_rows(measure(parser.parse_args().quick)) else 1


if __name__ == "__main__":
    sys.exit(main())
