"""How far a long command has come: a bar where there is a terminal, lines where there is none."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from contextlib import suppress

import pytest

from hmm_client.commands import progress

LONG = """
from hmm_client.commands.progress import Progress
with Progress("traces", 3) as shown:
    for name in ("first", "second", "third"):
        shown.advance(1, name)
print("done")
"""


def test_progress_is_a_bar_that_goes_when_there_is_a_terminal() -> None:
    """It is drawn on stderr in one place, with a count, and taken away in the end; results stay alone on stdout."""
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", LONG],
        stdout=subprocess.PIPE,
        stderr=theirs,
        check=True,
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # the end of a terminal whose other side is closed
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    assert done.stdout == b"done\n"
    assert b"traces" in shown
    assert b"3/3" in shown
    assert shown.rstrip().endswith(b"\x1b[2K")  # the line is cleared


def test_progress_is_plain_lines_when_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole lines on stderr without control characters, and none sooner than some seconds after the last."""
    monkeypatch.setattr(progress, "LINE_EVERY_S", float("inf"))
    with progress.Progress("traces", 2) as shown:
        shown.advance(1, "first")
        assert capsys.readouterr() == ("", "")
        monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
        shown.advance(1, "second")
    assert capsys.readouterr() == ("", "traces: 2 of 2 second\n")
