"""Starting, and what an idle daemon occupies: hmmctl, hmmd, a thousand mirrors.

Times are those of whole processes, interpreter included, the quietest round; memory is what is resident.  Modules are
compiled in a round before, as pip does when it installs them, whatever PYTHONDONTWRITEBYTECODE says.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import hmm_client  # before grpc, which reads the environment that this sets

# isort: split

import uvloop
from measurement import Row, alone, print_rows

MIRRORS = 1000
DEVICES = 250
MIB = 1 << 20


@contextmanager
def daemon(socket: Path, environment: dict[str, str]) -> Iterator[tuple[int, float]]:
    """A daemon; gives its pid, and the milliseconds until it served."""
    command = [sys.executable, "-m", "hmm_server", f"--socket={socket}", "--log-level=error"]
    began = perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            took_ms = (perf_counter() - began) * 1e3
            assert line.startswith(b"hmmd serving"), line
            yield process.pid, took_ms
        finally:
            process.terminate()


def resident_mib(pid: int) -> float:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / MIB


def help_ms(environment: dict[str, str]) -> float:
    """Milliseconds of `hmmctl --help`."""
    program = Path(sys.executable).with_name("hmmctl")
    began = perf_counter()
    subprocess.run([program, "--help"], check=True, stdout=subprocess.DEVNULL, env=environment)
    return (perf_counter() - began) * 1e3


@contextmanager
def compiled() -> Iterator[dict[str, str]]:
    """An environment in which the modules of both commands are compiled."""
    with tempfile.TemporaryDirectory() as directory:
        environment = os.environ | {"PYTHONPYCACHEPREFIX": directory, "PYTHONDONTWRITEBYTECODE": ""}
        help_ms(environment)
        with daemon(Path(directory, "hmmd"), environment):
            pass
        yield environment


async def growth_mib(target: str, pid: int) -> tuple[float, float]:
    """What the daemon has more: with a client and its devices and processes, and then with a thousand mirrors."""
    async with hmm_client.connect(target, name="bench") as client:
        idle = resident_mib(pid)
        devices = [await client.register_device("bench") for _ in range(DEVICES)]
        processes = [await client.create_process("bench") for _ in range(MIRRORS // DEVICES)]
        before = resident_mib(pid)
        for process in processes:
            for device in devices:
                await device.mirror(process, hmm_client.Driver())
        return before - idle, resident_mib(pid) - before


def measure(quick: bool) -> Iterator[Row]:
    """Start times and memory."""
    with compiled() as environment:
        yield from _measure(3 if quick else 7, environment)


def _measure(rounds: int, environment: dict[str, str]) -> Iterator[Row]:
    yield alone("hmmctl --help", "ms", [help_ms(environment) for _ in range(rounds)], 150.0)
    started: list[float] = []
    idle: list[float] = []
    first: list[float] = []
    mirrors: list[float] = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as directory:
            socket = Path(directory, "hmmd")
            with daemon(socket, environment) as (pid, took_ms):
                started.append(took_ms)
                idle.append(resident_mib(pid))
                devices_mib, mirrors_mib = uvloop.run(growth_mib(f"unix:{socket}", pid))
                first.append(devices_mib)
                mirrors.append(mirrors_mib)
    yield alone("hmmd, until it serves", "ms", started, 1000.0)
    yield alone("hmmd, idle", "MiB", idle, 60.0)
    yield alone(f"hmmd, the first client with {DEVICES} devices, in addition", "MiB", first)
    yield alone(f"hmmd, {MIRRORS} mirrors, in addition", "MiB", mirrors, 40.0)


if __name__ == "__main__":
    print_rows(measure("--quick" in sys.argv))
