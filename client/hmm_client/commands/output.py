"""What commands print: tables for people, JSON for programs.

A table on a terminal has a heading in bold and is no wider than the terminal; elsewhere it is plain columns, two spaces
apart, all of them and at full length, that tools can cut.

**Invariants**: stdout carries results only; with `--format json` every line of it is one JSON value.

**Absent**: colours where no terminal is, or NO_COLOR is set.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

TEXT = "text"
JSON = "json"
_NOTHING = ("", "-", "0", "0 B")
_SHORTEST = 8
"""To how many characters a text may be cut."""


def format_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--format text|json`; the command gets it as `form`."""
    return click.option(
        "--format",
        "form",
        type=click.Choice([TEXT, JSON]),
        default=TEXT,
        help="Text for people, or JSON, one value a line.",
    )(command)


def junit_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--junit FILE`; the command gets it as `junit`.  That it cannot be written there is said before the work."""
    path = click.Path(path_type=Path, dir_okay=False, writable=True)
    text = "Write the report as JUnit XML, too."
    return click.option("--junit", type=path, callback=_with_folder, metavar="FILE", help=text)(command)


def _with_folder(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    if path is not None and not os.access(path.parent, os.W_OK | os.X_OK):
        raise click.BadParameter(f"{path.parent} is no folder that can be written to", context, parameter)
    return path


def print_json(value: object) -> None:
    """One value, on one line."""
    click.echo(json.dumps(value, ensure_ascii=False, separators=(",", ":")))


def print_table(
    heads: Sequence[str], rows: Iterable[Sequence[object]], *, spare: Sequence[str] = (), empty: str = "nothing"
) -> None:
    """Rows below a heading; columns whose heading begins with `>` are flushed right.

    Args:
        spare: columns that a narrow terminal can do without, the first to go first.
        empty: what to say when there are no rows.
    """
    terminal = sys.stdout.isatty()
    lines = table_lines(heads, rows, shutil.get_terminal_size().columns if terminal else None, spare)
    if len(lines) == 1:
        click.echo(empty)
        return
    click.echo(click.style(lines[0], bold=True) if terminal else lines[0])
    for line in lines[1:]:
        click.echo(line)


def table_lines(
    heads: Sequence[str], rows: Iterable[Sequence[object]], width: int | None, spare: Sequence[str] = ()
) -> list[str]:
    """The lines of a table, its heading first.

    Where it is too wide, it loses columns of `spare`, those first in which nothing stands; then long texts are cut.

    Args:
        heads: as for `print_table`.
        width: of the terminal, in characters; None: as wide as it comes.
    """
    shown = [[_shown(cell) for cell in row] for row in rows]
    columns = [list(column) for column in zip(heads, *shown, strict=True)]
    if width is not None:
        columns = _fitted(columns, width, spare)
    padded = []
    for head, *cells in columns:
        column = [head.lstrip(">"), *cells]
        wide = max(map(len, column))
        padded.append([cell.rjust(wide) if head.startswith(">") else cell.ljust(wide) for cell in column])
    return ["  ".join(line).rstrip() for line in zip(*padded, strict=True)]


def _fitted(columns: list[list[str]], width: int, spare: Sequence[str]) -> list[list[str]]:
    def excess() -> int:
        return sum(map(_width, columns)) + 2 * (len(columns) - 1) - width

    by_head = {column[0].lstrip(">"): column for column in columns}
    for head in sorted(spare, key=lambda head: any(cell not in _NOTHING for cell in by_head[head][1:])):
        if excess() <= 0:
            break
        columns.remove(by_head[head])
    for column in sorted((column for column in columns if not column[0].startswith(">")), key=_width, reverse=True):
        room = max(_SHORTEST, _width(column) - max(0, excess()))
        column[1:] = [cell if len(cell) <= room else f"{cell[: room - 1]}…" for cell in column[1:]]
    return columns


def _width(column: Sequence[str]) -> int:
    return max(len(column[0].lstrip(">")), *map(len, column[1:])) if len(column) > 1 else len(column[0].lstrip(">"))


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


def counted(number: float, one: str, several: str = "") -> str:
    """A number of things for people: `1 page`, `1,234 pages`; `several` where an s does not do."""
    return f"{number:,.0f} {one if number == 1 else several or f'{one}s'}"


def latency(microseconds: float) -> str:
    """A time for people, three digits of it: `1.52 ms`; `-` where nothing was measured."""
    if not microseconds:
        return "-"
    value, unit = (microseconds / 1000, "ms") if microseconds < 999_500 else (microseconds / 1_000_000, "s")
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


def driver_of(name: str, pid: int) -> str:
    """Who serves a mirror: `load (pid 4711)`."""
    return f"{name} (pid {pid})" if pid else name or "-"


def _shown(cell: object) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    return printable(str(cell))


def printable(text: str) -> str:
    """A text on one line that leaves the terminal as it is: what clients call their things may hold anything."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def on_devices(pages: Iterable[tuple[str, int]]) -> str:
    """Where pages are that are not in system memory, from device names and numbers: "(gpu0: 16 pages)"."""
    words = [f"{name}: {counted(count, 'page')}" for name, count in pages]
    return f"({', '.join(words)})" if words else ""
