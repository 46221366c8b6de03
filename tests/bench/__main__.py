"""All benchmarks, one after the other: `python tests/bench [--quick] [NAME...]`, as `make bench` does.

Exit status 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from measurement import print_rows


def main() -> None:
    """Run the benchmarks named, or all."""
    found = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
    parser = argparse.ArgumentParser(prog="python tests/bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller sizes")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which ones: {', '.join(found)}")
    options = parser.parse_args()
    if unknown := set(options.names) - set(found):
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}; there are {', '.join(found)}")
    sys.stdout.write(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}; ratios are medians of rounds\n")
    met = True
    for name in options.names or found:
        module = importlib.import_module(f"bench_{name}")
        sys.stdout.write(f"\n== {name}: {(module.__doc__ or '').splitlines()[0]}\n")
        met = print_rows(module.measure(options.quick)) and met
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
