"""Starts `hmmd`: from here on signals end it quietly, while all the rest is loaded.

**Absent**: what the command does (command.py).
"""

from __future__ import annotations

import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command."""
    for number in (signal.SIGTERM, signal.SIGINT):  # the first process of a container has no default actions
        signal.signal(number, _end_before_serving)
    from hmm_server.command import command  # noqa: PLC0415 - takes nearly all of the time until it serves

    command(prog_name="hmmd")


def _end_before_serving(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the interface
    sys.exit(0)


if __name__ == "__main__":
    main()
