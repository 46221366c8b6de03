"""How far a long command has come: a bar on a terminal, a plain line now and then elsewhere; always on stderr.

**Absent**: results, which go to stdout.
"""

from __future__ import annotations

import sys
import time
from typing import Any, Self

import click

LINE_EVERY_S = 5.0
"""Without a terminal: one line at most so often."""

BAR_CHARACTERS = 24
"""So long that in 80 columns there is room for what is done now."""


class Progress:
    """Progress towards a known total; to be used in `with`."""

    def __init__(self, what: str, total: int) -> None:
        self._what = what
        self._total = total
        self._done = 0
        self._said_at = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich import progress  # noqa: PLC0415 - not needed where no terminal is
            from rich.console import Console  # noqa: PLC0415

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(BAR_CHARACTERS),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                progress.TextColumn("{task.fields[now]}"),  # behind the rest, which its length must not move
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(self._what, total=self._total, now="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, steps: int = 1, what: str = "") -> None:
        """So many steps further; `what` says what is done now."""
        self._done += steps
        if self._bar is not None:
            self._bar.update(self._task, advance=steps, now=what)
            return
        now = time.monotonic()
        if now - self._said_at >= LINE_EVERY_S:
            self._said_at = now
            click.echo(f"{self._what}: {self._done} of {self._total} {what}".rstrip(), err=True)
