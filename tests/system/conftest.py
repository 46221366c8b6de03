"""Driver processes for system tests: the drivers that are shipped, and one that misbehaves on demand."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hmm_client.drivers.control import LINE_BYTES

if TYPE_CHECKING:
    from tests.conftest import Daemon

TIMEOUT_S = 30.0
"""Far more than anything takes; a busy machine is no failure."""
MISBEHAVING = Path(__file__).with_name("misbehaving_driver.py")


class ControlError(Exception):
    """An operation of a driver process failed.

    Attributes:
        errno: by name.
        address: the failing address, if there is one.
    """

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(f"{error['errno']}: {error['message']}")
        self.errno: str = error["errno"]
        self.address: int | None = error["address"]


@dataclass
class DriverProcess:
    """A driver that runs as a process of its own, and its control socket."""

    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    waiting: dict[int, asyncio.Future[Any]] = field(default_factory=dict)
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def call(self, op: str, **arguments: object) -> Any:
        """Make one operation and wait for its result.

        Raises:
            ControlError: it failed.
        """
        number = next(self.numbers)
        future = self.waiting[number] = asyncio.get_running_loop().create_future()
        self.writer.write(json.dumps({"id": number, "op": op} | arguments).encode() + b"\n")
        return await asyncio.wait_for(future, TIMEOUT_S)

    async def read_replies(self) -> None:
        """Hand replies to whoever waits for them, until the process ends."""
        while line := await self.reader.readline():
            reply = json.loads(line)
            future = self.waiting.pop(reply["id"])
            if future.done():
                continue
            if "error" in reply:
                future.set_exception(ControlError(reply["error"]))
            else:
                future.set_result(reply["result"])

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        self.process.send_signal(number)

    async def ended(self) -> int:
        """Wait until the process has ended; its exit code."""
        return await asyncio.wait_for(self.process.wait(), TIMEOUT_S)

    async def stop(self) -> None:
        """End the process, however it is."""
        for task in self.tasks:
            task.cancel()
        self.writer.close()
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


@pytest.fixture
async def start_driver(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[DriverProcess]]]:
    """Starts driver processes: `await start_driver(daemon, "-m", "hmm_client.drivers.dummy")`."""
    drivers: list[DriverProcess] = []

    async def start(daemon: Daemon, *command: str) -> DriverProcess:
        control = tmp_path / f"control{len(drivers)}.sock"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, *command, f"--target={daemon.target}", f"--control={control}"),
            env={name: value for name, value in os.environ.items() if not name.startswith("HMM")},
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), TIMEOUT_S)
        assert line == b"ready\n", f"the driver did not start: {line!r}"
        reader, writer = await asyncio.open_unix_connection(control, limit=LINE_BYTES)
        driver = DriverProcess(process, reader, writer)
        driver.tasks.append(asyncio.create_task(driver.read_replies()))
        drivers.append(driver)
        return driver

    yield start
    for driver in drivers:
        await driver.stop()


@pytest.fixture
async def dummy(start_driver: Callable[..., Awaitable[DriverProcess]], daemon: Daemon) -> DriverProcess:
    """The dummy driver, as a process of its own."""
    return await start_driver(daemon, "-m", "hmm_client.drivers.dummy")


@pytest.fixture
def start_misbehaving(
    start_driver: Callable[..., Awaitable[DriverProcess]],
) -> Callable[..., Awaitable[DriverProcess]]:
    """Starts drivers that do what a driver must not: `await start_misbehaving(daemon)`."""

    async def start(daemon: Daemon) -> DriverProcess:
        return await start_driver(daemon, str(MISBEHAVING))

    return start
