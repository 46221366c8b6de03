"""A daemon of one's own: started as a process on a temporary socket, ended with the block.

    with embedded_daemon() as target:
        asyncio.run(use(target))

`EmbeddedDaemon` has more to say: where its log is, and whether it lives.

**Invariants**: when the block ends the daemon has ended and its socket is gone; when we are killed it ends by itself.

**Absent**: the daemon itself (`hmm_server`), which this package does not import.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

START_S = 60.0
"""How long the daemon may take until it serves."""
END_S = 20.0
"""How long it may take to end after SIGTERM: more than its own `drain_s`."""
PATIENCE: dict[str, object] = {"fault_s": 15.0, "ping_timeout_ms": 60_000}
"""Settings for tests of drivers: on a slow machine a fault that waits does not hang, nor does whoever answers no ping;
a driver that is stopped and goes on has lost its mirrors by the deadline, and not its session."""


class EmbeddedDaemonError(Exception):
    """The daemon did not start; why, it has said on stderr, or in its log."""


def as_flags(settings: Mapping[str, object]) -> list[str]:
    """Settings of the daemon, by their names in its configuration, as flags of `hmmd`."""
    flags = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags.append(f"--{flag}={value}")
    return flags


class EmbeddedDaemon:
    """A daemon that runs as a process of ours.

    Attributes:
        socket: where it listens.
        log: where its log goes; None: to our stderr.
        process: the process itself.
        started_s: how long it took to serve, seconds.
    """

    def __init__(self, folder: Path, *, log: Path | None = None, **settings: object) -> None:
        """Start one, and wait until it serves.

        Args:
            folder: for its socket; the path of a UNIX socket has at most 107 characters.
            settings: by their names in its configuration, e.g. `frames=4096`.

        Raises:
            EmbeddedDaemonError: it did not start.
        """
        self.socket = folder / "hmmd.sock"
        self.log = log
        began_s = time.monotonic()
        stderr = None if log is None else log.open("wb")
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "hmm_server", f"--socket={self.socket}", "--until-fd=0", *as_flags(settings)],
                env={name: value for name, value in os.environ.items() if not name.startswith("HMMD_")},
                stdin=subprocess.PIPE,  # closed by the kernel, should we be killed
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,  # Ctrl-C is for us; we end it in good order
            )
        finally:
            if stderr is not None:
                stderr.close()
        try:
            self._wait_until_it_serves()
        except BaseException:  # an interrupt too
            self.stop()
            raise
        self.started_s = time.monotonic() - began_s

    @property
    def target(self) -> str:
        """Where clients connect."""
        return f"unix:{self.socket}"

    @property
    def is_alive(self) -> bool:
        """False when it has ended, whoever ended it."""
        return self.process.poll() is None

    def read_log(self, start: int = 0) -> str:
        """What it has logged, from a position in bytes on."""
        if self.log is None:
            return ""
        with self.log.open("rb") as file:
            file.seek(start)
            return file.read().decode(errors="replace")

    def stop(self) -> int:
        """End it in good order, or else by force.  Returns: its exit code."""
        if self.is_alive:
            self.process.send_signal(signal.SIGCONT)  # should somebody have stopped it
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        return self.process.returncode

    def _wait_until_it_serves(self) -> None:
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], START_S)
        if not readable or not self.process.stdout.readline():
            within = "" if readable else f" within {START_S:g} s"
            said = f": {self.read_log().strip()}" if self.log else ""
            raise EmbeddedDaemonError(f"hmmd did not start{within}{said}")


@contextmanager
def embedded_daemon(**settings: object) -> Iterator[str]:
    """Start a daemon and end it with the block.  What it warns of goes to our stderr.

    Args:
        settings: of the daemon, by their names in its configuration, e.g. `frames=4096`.

    Yields: where it listens, for `connect`.

    Raises:
        EmbeddedDaemonError: it did not start.
    """
    with tempfile.TemporaryDirectory(prefix="hmmd-") as folder:
        daemon = EmbeddedDaemon(Path(folder), log=None, **{"log_level": "warning"} | settings)
        try:
            yield daemon.target
        finally:
            daemon.stop()
