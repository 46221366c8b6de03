"""A driver as a process of its own: started, stopped, killed, and its output kept.

    with DriverProcess([sys.executable, "my_driver.py"], target) as driver:
        driver.wait_for_line("ready")
        driver.stop()                     # SIGSTOP: it hears nothing and answers nothing, until go_on()

The driver finds the daemon in $HMMD_SOCKET, where every client of hmm_client looks first.

**Invariants**: it has ended when its block has.

**Absent**: what the driver does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

END_S = 5.0
"""How long it may take to end after SIGTERM."""
POLL_S = 0.01


class DriverProcess:
    """A driver's process.

    Attributes:
        process: the process itself.
        output: file with what it has printed, on both streams; a temporary one is gone when it has ended.
    """

    def __init__(self, command: Sequence[str], target: str, *, output: Path | None = None) -> None:
        """Start it.

        Args:
            target: where the daemon listens.
            output: where its output goes; None: to a temporary file.
        """
        self._temporary = tempfile.NamedTemporaryFile(prefix="hmm-driver-") if output is None else None  # noqa: SIM115
        self.output = output or Path(self._temporary.name if self._temporary else "")
        self._text: str | None = None
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HMM")}
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                env=environment | {"HMMD_SOCKET": target, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self._text if self._text is not None else self.output.read_text(errors="replace")

    def wait_for_line(self, line: str, within_s: float = 60.0) -> None:
        """Wait until it has printed a line.

        Raises:
            TimeoutError: it did not, or it ended before; the text has what it printed instead.
        """
        until_s = time.monotonic() + within_s
        while line not in self.text.splitlines():
            ended = self.process.poll()
            if ended is not None or time.monotonic() > until_s:
                why = f"it ended with {ended}" if ended is not None else f"waited {within_s:g} s"
                raise TimeoutError(f"the driver did not print {line!r} ({why}):\n{self.text}")
            time.sleep(POLL_S)

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """SIGSTOP."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    def wait(self, within_s: float = 60.0) -> int:
        """Wait for its end.  Returns: its exit code, negative for a signal.

        Raises:
            subprocess.TimeoutExpired: it has not ended.
        """
        return self.process.wait(within_s)

    def end(self) -> int:
        """End it in good order, or else by force.  Returns: its exit code."""
        if self.process.poll() is None:
            self.go_on()
            self.process.terminate()
            try:
                self.process.wait(END_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        code = self.process.wait()
        if self._temporary is not None and self._text is None:
            self._text = self.text
            self._temporary.close()
        return code
