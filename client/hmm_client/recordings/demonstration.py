"""The recording that ships with the package: a small program that uses its memory in many ways.

`demo/demo.py` is the program.  It grows its heap, moves a large buffer while it grows, shares memory with a forked
child, maps, grows and writes back a file, splits an area by protection changes, runs three threads and starts a
second program with vfork.

Absent: what to do with it.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def demo_folder() -> Path:
    """The folder of the demo recording, for `Recording.load`."""
    return Path(str(files("hmm_client.recordings") / "demo"))
