"""A daemon of one's own: started as a process on a temporary socket, ended with the block.

    with embedded_daemon() as target:
        asyncio.run(use(target))

**Invariants**: when the block ends the daemon has ended and its socket is gone.

**Absent**: the daemon itself (`hmm_server`), which this package does not import.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_S = 30.0
"""How long the daemon may take until it serves."""
END_S = 20.0
"""How long it may take to end after SIGTERM: more than its own `drain_s`."""


class EmbeddedDaemonError(Exception):
    """The daemon did not start; why, it has said on stderr."""


@contextmanager
def embedded_daemon(**settings: object) -> Iterator[str]:
    """Start a daemon and end it with the block.

    Args:
        settings: of the daemon, by their names in its configuration, e.g. `frames=4096`.

    Yields: where it listens, for `connect`.

    Raises:
        EmbeddedDaemonError: it did not start.
    """
    with tempfile.TemporaryDirectory(prefix="hmmd-") as folder:
        socket = Path(folder, "hmmd.sock")
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        process = subprocess.Popen(
            [sys.executable, "-m", "hmm_server", f"--socket={socket}", "--log-level=warning", *flags],
            env={name: value for name, value in os.environ.items() if not name.startswith("HMMD_")},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,  # what it warns of goes to our stderr
            start_new_session=True,  # Ctrl-C is for us; we end it in good order
        )
        try:
            _wait_until_it_serves(process)
            yield f"unix:{socket}"
        finally:
            _end(process)


def _wait_until_it_serves(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], START_S)
    if not readable or not process.stdout.readline():
        raise EmbeddedDaemonError(f"hmmd did not start within {START_S:g} s" if not readable else "hmmd did not start")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
