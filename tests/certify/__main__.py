"""Storms against each of our drivers, on all CPUs: `python tests/certify [FIRST:END] [DRIVER...]`, or `make certify`.

Every driver meets all adversities and the storms of these seeds.  Goes on after a failure.  Exit status 1 when
something was wrong; what it was is said as soon as it is known, with the command that shows it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hmm_client.certify import Trial, certify
from hmm_client.commands.output import print_table
from hmm_client.commands.progress import Progress

OURS = ("dummy", "rdma", "prefetch", "dmirror")
DRIVERS = (*OURS, "javascript")
JAVASCRIPT = Path(__file__).parents[1] / "system" / "javascript" / "driver.js"


def command(driver: str) -> list[str]:
    """Starts one of them."""
    if driver == "javascript":
        return ["node", str(JAVASCRIPT)]
    return [sys.executable, "-m", f"hmm_client.drivers.{driver}", "--certified"]


def say(driver: str, trial: Trial) -> None:
    """What a trial has shown, and how to see it again."""
    which = f"--only {trial.name}" if trial.seed is None else f"--only plain --seeds {trial.seed}"
    for finding in trial.findings:
        print(f"\r{driver} {trial.name}: {finding}", flush=True)
    started_by = "python" if driver in OURS else "node"
    print(f"  hmmctl certify {which} -- {started_by} {' '.join(command(driver)[1:])}", flush=True)
    if trial.shortest:
        print(f"  shortest: {'; '.join(map(str, trial.shortest))}", flush=True)


def run(driver: str, seeds: range, jobs: int) -> Sequence[object]:
    """Certify one driver.  Returns: its line of the summary."""
    began, failed = time.monotonic(), list[Trial]()

    with Progress(driver, len(seeds)) as progress:

        def told(trial: Trial) -> None:
            if trial.findings:
                failed.append(trial)
                say(driver, trial)
            if trial.seed is not None:
                progress.advance(1, f"{len(failed)} failed" if failed else "")

        certificate = asyncio.run(certify(command(driver), seeds=seeds, jobs=jobs, told=told))
    storms = [trial for trial in certificate.trials if trial.seed is not None]
    median_ms = sorted(trial.seconds for trial in storms)[len(storms) // 2] * 1000 if storms else 0.0
    which = " ".join(trial.name if trial.seed is None else str(trial.seed) for trial in failed)
    others = sum(trial.seed is None and not trial.skipped for trial in certificate.trials)
    took_s = time.monotonic() - began
    return driver, others, f"{len(storms):,}", len(failed), f"{median_ms:.0f} ms", f"{took_s:.0f} s", which


def _seeds(text: str) -> range:
    first, _, end = text.partition(":")
    return range(int(first), int(end or int(first) + 1))


def main() -> None:
    """Certify the drivers asked for."""
    parser = argparse.ArgumentParser(prog="python tests/certify", description=__doc__)
    parser.add_argument("seeds", type=_seeds, nargs="?", default="0:1000", metavar="FIRST:END")
    parser.add_argument("drivers", nargs="*", metavar="DRIVER", help=f"{', '.join(DRIVERS)}; default: all of them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="default: one per CPU")
    options = parser.parse_args()
    if unknown := set(options.drivers) - set(DRIVERS):
        parser.error(f"there is no driver {', '.join(sorted(unknown))}; there are {', '.join(DRIVERS)}")
    rows: list[Sequence[object]] = []
    try:
        for driver in options.drivers or DRIVERS:
            rows.append(run(driver, options.seeds, options.jobs))  # noqa: PERF401 - kept when it is interrupted
    except KeyboardInterrupt:
        left = [driver for driver in options.drivers or DRIVERS if driver not in [row[0] for row in rows]]
        print(f"\rstopped; not done: {' '.join(left)}", flush=True)
    print_table(("driver", "adversities", "storms", "failed", "a storm", "time", "which"), rows)
    done = len(rows) == len(options.drivers or DRIVERS)
    sys.exit(0 if done and not any(row[3] for row in rows) else 1)


if __name__ == "__main__":
    main()
