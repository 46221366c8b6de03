"""Seeded interleavings in bulk, on all CPUs: `python tests/simulation [FIRST:END] [TOWN...]`, as `make simulate` does.

The seeds are dealt out to all towns in turn; where towns are named, each of them runs every seed.  Goes on after a
failure.  Exit status 1 when a seed failed; each that did is named as soon as it is known.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field

from hmm.testing import SimulationError
from hmm.testing_coverage import Coverage
from hmm.testing_swap import TOWNS
from hmm_client.commands.output import print_table
from hmm_client.commands.progress import Progress

BATCH = 20
"""Seeds that a process runs before it reports."""
SHOWN = 500
"""Characters of what a failure says; arguments can be long."""


@dataclass
class Report:
    """What came of some seeds in one town."""

    town: str
    seeds: int = 0
    failures: list[str] = field(default_factory=list)
    coverage: Coverage = field(default_factory=Coverage)
    cpu_s: float = 0.0

    def add(self, other: Report) -> None:
        """Count another's seeds as well."""
        self.seeds += other.seeds
        self.failures += other.failures
        self.coverage.add(other.coverage)
        self.cpu_s += other.cpu_s

    def row(self) -> Sequence[object]:
        """As a line of the summary."""
        coverage = self.coverage
        counts = (self.seeds, coverage.operations, coverage.events.total(), coverage.steps, len(self.failures))
        return self.town, *(f"{count:,}" for count in counts), f"{self.cpu_s:.0f} s"


def run(town: str, seeds: Iterable[int]) -> Report:
    """Run some seeds in one town."""
    report, began = Report(town), time.process_time()
    for seed in seeds:
        report.seeds += 1
        try:
            report.coverage.add(TOWNS[town](seed).coverage)
        except SimulationError as error:
            report.failures.append(f"{town}: {error}")
    report.cpu_s = time.process_time() - began
    return report


def batches(seeds: range, towns: Sequence[str]) -> list[tuple[str, range]]:
    """What is to be run, in an order in which all towns come on alike."""
    dealt = {town: seeds if towns else seeds[number :: len(TOWNS)] for number, town in enumerate(TOWNS)}
    most = max(len(some) for some in dealt.values())
    chosen = towns or list(TOWNS)
    return [(town, dealt[town][at : at + BATCH]) for at in range(0, most, BATCH) for town in chosen if dealt[town][at:]]


def print_summary(reports: Mapping[str, Report], took_s: float) -> None:
    """One line per town, and all together."""
    total = Report("all")
    for report in reports.values():
        total.add(report)
    rows = [report.row() for report in (*reports.values(), total)]
    print_table(("town", "seeds", "operations", "events", "steps", "failed", "CPU"), rows)
    print(f"{took_s:.0f} s")


def print_coverage(coverage: Coverage) -> None:
    """What the runs came to, and what they never came to."""
    outcomes: dict[str, list[str]] = {}
    for (name, how), count in sorted(coverage.calls.items(), key=lambda item: (item[0][0], -item[1])):
        outcomes.setdefault(name, []).append(f"{how} {count}")
    inside = {name: sum(n for (one, _), n in coverage.inside.items() if one == name) for name in outcomes}
    print_table(
        ("call", "inside callbacks", "outcomes"), [(name, inside[name], ", ".join(outcomes[name])) for name in outcomes]
    )
    print()
    print_table(("because of", "who", "hears", "events"), [(*key, n) for key, n in sorted(coverage.events.items())])
    print()
    print_table(("answers", "count"), sorted(coverage.answers.items()))
    print()
    print_table(("callers", "count"), sorted(coverage.callers.items()))
    print(f"\nnever called: {', '.join(coverage.never_called) or 'none'}")
    print(f"never told of: {', '.join(coverage.never_told) or 'nothing'}\n")


def _seeds(text: str) -> range:
    first, _, end = text.partition(":")
    return range(int(first), int(end or int(first) + 1))


def main() -> None:
    """Run the seeds asked for in the towns asked for."""
    parser = argparse.ArgumentParser(prog="python tests/simulation", description=__doc__)
    parser.add_argument("seeds", type=_seeds, nargs="?", default="0:10000", metavar="FIRST:END")
    parser.add_argument("towns", nargs="*", metavar="TOWN", help=f"{', '.join(TOWNS)}; all: every one of them")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), metavar="N", help="default: one per CPU")
    parser.add_argument("--coverage", action="store_true", help="show which calls ended how, and who heard of what")
    options = parser.parse_args()
    towns = list(TOWNS) if options.towns == ["all"] else options.towns
    if unknown := set(towns) - set(TOWNS):
        parser.error(f"there is no town {', '.join(sorted(unknown))}; there are {', '.join(TOWNS)}")
    work = batches(options.seeds, towns)
    reports = {town: Report(town) for town in towns or TOWNS}
    began = time.monotonic()
    total = sum(len(seeds) for _, seeds in work)
    # What is there from the beginning need not be looked at by every garbage collection.
    with ProcessPoolExecutor(options.processes, initializer=gc.freeze) as pool, Progress("seeds", total) as progress:
        failed = 0
        for future in as_completed([pool.submit(run, town, seeds) for town, seeds in work]):
            report = future.result()
            for failure in report.failures:
                print(f"\r{failure if len(failure) <= SHOWN else failure[:SHOWN] + ' ...'}", flush=True)
            failed += len(report.failures)
            reports[report.town].add(report)
            progress.advance(report.seeds, f"{failed} failed" if failed else "")
    if options.coverage:
        everything = Coverage()
        for report in reports.values():
            everything.add(report.coverage)
        print_coverage(everything)
    print_summary(reports, time.monotonic() - began)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
