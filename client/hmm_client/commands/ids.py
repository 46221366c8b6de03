"""Numbers of processes, devices and mirrors on the command line.

**Absent**: whether there is one of that number; the daemon says so.
"""

from __future__ import annotations

import click

ID_MAX = (1 << 64) - 1
DIGITS_MAX = len(str(ID_MAX))


class Id(click.ParamType[int]):
    """A number that the daemon gave out: decimal, 1 to 2^64 - 1."""

    name = "number"

    def __init__(self, whose: str) -> None:
        self._whose = whose

    def convert(self, value: object, parameter: click.Parameter | None, context: click.Context | None) -> int:
        """The number."""
        text = str(value)
        if not (text.isascii() and text.isdecimal() and len(text) <= DIGITS_MAX and 1 <= int(text) <= ID_MAX):
            self.fail(f"{text} is no number of a {self._whose}; `hmmctl ps` shows them", parameter, context)
        return int(text)


PROCESS = Id("process")
DEVICE = Id("device")
MIRROR = Id("mirror")
