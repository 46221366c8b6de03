"""Seeded interleavings in bulk, on all CPUs: `python tests/simulation [FIRST:END] [TOWN...]`, as `make simulate` does.

Goes on after a failure.  Exit status 1 when a seed failed; each that did is named as soon as it is known.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product

from hmm.testing import SimulationError
from hmm.testing_swap import TOWNS

BATCH = 25
"""Seeds that a process runs before it reports."""
SHOWN = 500
"""Characters of what a failure says; arguments can be long."""


def run(town: str, seeds: range) -> list[str]:
    """Run some seeds.  Returns: what those that failed say."""
    failures = []
    for seed in seeds:
        try:
            TOWNS[town](seed)
        except SimulationError as error:
            failures.append(f"{town}: {error}")
    return failures


def _seeds(text: str) -> range:
    first, _, end = text.partition(":")
    return range(int(first), int(end or int(first) + 1))


def main() -> None:
    """Run the seeds asked for in the towns asked for."""
    parser = argparse.ArgumentParser(prog="python tests/simulation", description=__doc__)
    parser.add_argument("seeds", type=_seeds, nargs="?", default="0:10000", metavar="FIRST:END")
    parser.add_argument("towns", nargs="*", metavar="TOWN", help=f"{', '.join(TOWNS)}; default: all")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), metavar="N", help="default: one per CPU")
    options = parser.parse_args()
    if unknown := set(options.towns) - set(TOWNS):
        parser.error(f"there is no town {', '.join(sorted(unknown))}; there are {', '.join(TOWNS)}")
    seeds: range = options.seeds
    towns = options.towns or list(TOWNS)
    batches = [seeds[at : at + BATCH] for at in range(0, len(seeds), BATCH)]
    total = len(seeds) * len(towns)
    began, failed, done = time.monotonic(), 0, 0
    with ProcessPoolExecutor(options.processes) as pool:
        under_way = {pool.submit(run, town, batch): len(batch) for batch, town in product(batches, towns)}
        for future in as_completed(under_way):
            before, done = done, done + under_way.pop(future)
            failures = future.result()
            failed += len(failures)
            for failure in failures:
                print(f"\r{failure if len(failure) <= SHOWN else failure[:SHOWN] + ' ...'}", flush=True)
            if sys.stderr.isatty():
                print(f"\r{done} of {total} runs", end="", file=sys.stderr, flush=True)
            elif done * 10 // total > before * 10 // total:
                print(f"{done} of {total} runs", file=sys.stderr, flush=True)
    took_s = time.monotonic() - began
    print(f"\r{done} runs of {', '.join(towns)} in {took_s:.0f} s: {failed or 'none'} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
