"""What commands print: tables for people, JSON for programs.

A table on a terminal has a heading in bold; elsewhere it is plain columns, two spaces apart, that tools can cut.

**Invariants**: stdout carries results only; with `--format json` every line of it is one JSON value.

**Absent**: colours where no terminal is, or NO_COLOR is set.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import click

TEXT = "text"
JSON = "json"


def format_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--format text|json`; the command gets it as `form`."""
    return click.option(
        "--format",
        "form",
        type=click.Choice([TEXT, JSON]),
        default=TEXT,
        help="Text for people, or JSON, one value a line.",
    )(command)


def print_json(value: object) -> None:
    """One value, on one line."""
    click.echo(json.dumps(value, ensure_ascii=False, separators=(",", ":")))


def print_table(heads: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str = "nothing") -> None:
    """Rows below a heading; columns whose heading begins with `>` are flushed right.

    Args:
        empty: what to say when there are no rows.
    """
    cells = [[_shown(cell) for cell in row] for row in rows]
    if not cells:
        click.echo(empty)
        return
    names = [head.lstrip(">") for head in heads]
    right = [head.startswith(">") for head in heads]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    bold = sys.stdout.isatty()
    for number, row in enumerate([names, *cells]):
        padded = [
            cell.rjust(width) if flushed else cell.ljust(width)
            for cell, width, flushed in zip(row, widths, right, strict=True)
        ]
        line = "  ".join(padded).rstrip()
        click.echo(click.style(line, bold=True) if bold and number == 0 else line)


def print_pairs(pairs: Mapping[str, object]) -> None:
    """Names and values, one a line."""
    width = max(map(len, pairs), default=0)
    for name, value in pairs.items():
        click.echo(f"{name.ljust(width)}  {_shown(value)}".rstrip())


def size(number: int) -> str:
    """Bytes for people: `12.5 MiB`."""
    value = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _shown(cell: object) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    return str(cell)


def on_devices(pages: Iterable[tuple[str, int]]) -> str:
    """Where pages are that are not in system memory, from device names and numbers: "(gpu0: 16 pages)"."""
    words = [f"{name}: {count:,} page{'s' if count > 1 else ''}" for name, count in pages]
    return f"({', '.join(words)})" if words else ""
