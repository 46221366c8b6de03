"""Containers, as tests use them: started with Docker's command line, looked into, signalled.

Whatever waits here waits for what the engine says, asked again and again; each question takes a process, so a few times
a second.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
IMAGE = os.environ.get("HMMD_IMAGE", "hmmd")
TIMEOUT_S = 180.0
"""Far more than anything takes; a busy machine is no failure."""
CONFINED = ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--network=none")
SERVICE = "com.docker.compose.service"
"""The label in which compose keeps its name of a container."""
PAUSE_S = 0.2
"""Between two questions: each takes a tenth of a second of CPU."""
SERVING = "hmmd serving "
"""How the line begins that a daemon prints when it serves."""


def docker(*arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `docker`, in the project's folder."""
    done = subprocess.run(
        ["docker", *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=ROOT,
        env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0 or not check, f"docker {' '.join(arguments)}: {done.returncode}: {done.stderr}"
    return done


def until(condition: Callable[[], bool], what: str) -> None:
    """Ask until it is so."""
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end, f"not within {TIMEOUT_S:g} s: {what}"
        time.sleep(PAUSE_S)


@dataclass(frozen=True)
class Container:
    """One that was started, and may have ended."""

    id: str

    def inspect(self) -> dict[str, Any]:
        """All that the engine knows of it."""
        (found,) = json.loads(docker("inspect", self.id).stdout)
        return dict(found)

    def state(self) -> dict[str, Any]:
        """Whether it runs, since when, and how it ended."""
        return dict(self.inspect()["State"])

    @property
    def health(self) -> str:
        """What its last probes found."""
        return str(self.state()["Health"]["Status"])

    def wait_until_healthy(self) -> None:
        """Wait for a probe that succeeds."""
        until(lambda: self.health == "healthy", f"{self.id} is healthy; {self.logs()[-2000:]}")

    def wait_until_serving(self, times: int = 1) -> None:
        """Wait for the line that says so, of its daemon's first start or a later one."""
        until(lambda: self.logs().count(SERVING) >= times, f"{self.id} serves; {self.logs()[-2000:]}")

    def logs(self) -> str:
        """What it has printed, on both streams."""
        done = docker("logs", self.id)
        return done.stdout + done.stderr

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command inside."""
        return docker("exec", self.id, *command, check=False)

    def python(self, program: str) -> str:
        """Run Python inside; what it printed."""
        done = self.run("python", "-c", program)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def status(self) -> dict[str, str]:
        """/proc/1/status: what the kernel says of its first process."""
        lines = self.python("print(open('/proc/1/status').read())").splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send its first process a signal as if from nowhere: the engine must not know that somebody wanted it."""
        program = f"import os; os.kill({self.state()['Pid']}, {int(number)})"
        docker("run", "--rm", "--pid=host", "--user=0", "--network=none", IMAGE, "python", "-c", program)

    def stop(self) -> int:
        """End it as an orchestrator does, with SIGTERM and then SIGKILL; its exit code."""
        docker("stop", "--time=60", self.id)
        return int(self.state()["ExitCode"])


@dataclass(frozen=True)
class Event:
    """One line of `docker events`."""

    service: str
    action: str
    time_ns: int


@dataclass
class Stack:
    """What one compose file describes, running."""

    file: str
    environment: dict[str, str]
    began: float = field(default_factory=time.time)
    services: dict[str, Container] = field(default_factory=dict)

    def compose(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `docker compose` on the file."""
        return docker("compose", "-p", "hmmd", "-f", self.file, *arguments, **self.environment)

    def service(self, name: str) -> Container:
        """Its container, which is the same one however often it is started again."""
        if name not in self.services:
            self.services[name] = Container(self.compose("ps", "-q", name).stdout.strip())
        return self.services[name]

    def events_until(self, service: str, action: str) -> list[Event]:
        """Everything that was started, or became healthy, since the stack was, up to this."""
        filters = ("--filter=event=start", "--filter=event=health_status", "--filter=type=container")
        command = ["docker", "events", f"--since={int(self.began)}", *filters, "--format={{json .}}"]
        events = []
        # No --until: Podman 4 has no events before a moment that is past.
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as stream:
            assert stream.stdout is not None
            for line in stream.stdout:
                events.append(_event(json.loads(line)))
                if (events[-1].service, events[-1].action) == (service, action):
                    break
            stream.terminate()
        return events


def _event(line: dict[str, Any]) -> Event:
    """As Docker puts it, or as Podman does; of health Podman 4.3 tells one probe late."""
    if "Actor" in line:
        return Event(line["Actor"]["Attributes"].get(SERVICE, ""), line["Action"], line["timeNano"])
    health = f": {line['health_status']}" if "health_status" in line else ""
    moment = datetime.fromisoformat(line["Time"]).timestamp()
    return Event(line["Attributes"].get(SERVICE, ""), line["Status"] + health, int(moment * 1e9))
