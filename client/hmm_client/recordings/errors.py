"""What is wrong with an input, and where.

Absent: failures of the replay itself; an input that can be read is no error here, however strange its calls.
"""

from __future__ import annotations

from pathlib import Path


class InputError(Exception):
    """An input that cannot be used; its text begins with the file and, where known, the line.

    Attributes:
        path: the file or folder concerned; None when there is none.
        line: 1-based number of the line; None when the whole file is meant.
    """

    def __init__(self, text: str, path: Path | None = None, line: int | None = None) -> None:
        self.path = path
        self.line = line
        where = "" if path is None else f"{path}: " if line is None else f"{path}:{line}: "
        super().__init__(where + text)


class RecordingError(InputError):
    """A recording of a program that cannot be made, read or understood."""


class TraceError(InputError):
    """A kernel trace that cannot be read."""
