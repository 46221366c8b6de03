"""What a benchmark yields: rows that compare two measurements of one run.

A benchmark is a module with a function `measure(quick: bool) -> Iterator[Row]`. Speeds of a shared machine drift by a
factor of two from hour to hour, so what counts is the ratio to a baseline that was measured in turns with it; absolute
figures stand beside it.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a benchmark.

    Attributes:
        name: what was measured, unique within a benchmark.
        value: the figure of ours, over the rounds.
        unit: unit of `value` and `baseline`.
        baseline: the same work done by the yardstick; None when there is none.
        ratio: median over the rounds of ours / yardstick; None without a yardstick.
        target: what must not be exceeded; None for a row that gives context.
        spread: lowest and highest of the rounds, of the ratio if there is one, else of the value.
        target_of: whether the target is one of the ratio or of the value.
    """

    name: str
    value: float
    unit: str
    baseline: float | None
    ratio: float | None
    target: float | None
    spread: tuple[float, float]
    target_of: Literal["ratio", "value"] = "ratio"

    @property
    def met(self) -> bool:
        """Whether the target is met; True for a row without one."""
        figure = self.ratio if self.target_of == "ratio" else self.value
        return self.target is None or (figure is not None and figure <= self.target)


def compared(
    name: str,
    unit: str,
    ours: Sequence[float],
    yardstick: Sequence[float],
    target: float | None = None,
    target_of: Literal["ratio", "value"] = "ratio",
) -> Row:
    """A row from figures of the same rounds, ours and the yardstick's.

    The values are medians, unless the target is an absolute one: then they are those of the quietest round, since
    what others do on the machine is no part of the work.
    """
    typical = median if target_of == "ratio" else min
    ratios = [mine / theirs for mine, theirs in zip(ours, yardstick, strict=True)]
    spread = (min(ratios), max(ratios))
    return Row(name, typical(ours), unit, typical(yardstick), median(ratios), target, spread, target_of)


def alone(name: str, unit: str, figures: Sequence[float], target: float | None = None) -> Row:
    """A row without a yardstick: the quietest round."""
    return Row(name, min(figures), unit, None, None, target, (min(figures), max(figures)), "value")


def keep_memory() -> None:
    """As the daemon does: what large results occupied is not given back to the kernel between two requests."""
    libc = ctypes.CDLL(None)
    for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
        libc.mallopt(parameter, 1 << 30)


def print_rows(rows: Iterable[Row]) -> bool:
    """Print rows as they come; True when every target was met."""
    sys.stdout.write(f"{'':60} {'ours':>10} {'baseline':>10} {'ratio':>7}  {'spread':>15}  target\n")
    met = True
    for row in rows:
        baseline = "" if row.baseline is None else f"{row.baseline:.2f}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        spread = f"{row.spread[0]:.2f}..{row.spread[1]:.2f}"
        figures = f"{row.value:10.2f} {baseline:>10} {ratio:>7}  {spread:>15}"
        sys.stdout.write(f"{row.name:60} {figures}  {_target(row)}  [{row.unit}]\n")
        sys.stdout.flush()
        met = met and row.met
    return met


def _target(row: Row) -> str:
    if row.target is None:
        return "-"
    unit = "x" if row.target_of == "ratio" else f" {row.unit}"
    return f"<= {row.target:g}{unit} {'ok' if row.met else 'MISSED'}"
