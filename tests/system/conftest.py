"""Driver processes for system tests: the drivers that are shipped, and one that misbehaves on demand."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hmm_client.drivers.remote import RemoteDriver

if TYPE_CHECKING:
    from tests.conftest import Daemon

TIMEOUT_S = 60.0
"""Far more than anything takes; a busy machine is no failure."""
JAVASCRIPT = Path(__file__).with_name("javascript")
INSTALL_S = 300
MISBEHAVING = Path(__file__).with_name("misbehaving_driver.py")
STEPPING = Path(__file__).with_name("stepping_driver.py")


@dataclass
class DriverProcess:
    """A driver that runs as a process of its own, and the connection to its control socket."""

    process: asyncio.subprocess.Process
    remote: RemoteDriver
    connection: AsyncExitStack

    async def call(self, op: str, **arguments: object) -> Any:
        """Make one operation and wait for its result; raises as RemoteDriver."""
        return await asyncio.wait_for(self.remote.call(op, **arguments), TIMEOUT_S)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        self.process.send_signal(number)

    async def ended(self) -> int:
        """Wait until the process has ended; its exit code."""
        return await asyncio.wait_for(self.process.wait(), TIMEOUT_S)

    async def stop(self) -> None:
        """End the process, however it is."""
        await self.connection.aclose()
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


@asynccontextmanager
async def driver_processes(folder: Path) -> AsyncIterator[Callable[..., Awaitable[DriverProcess]]]:
    """Starts driver processes with sockets in a folder, and ends them."""
    drivers: list[DriverProcess] = []

    async def start(daemon: Daemon, *command: str) -> DriverProcess:
        control = folder / f"control{len(drivers)}.sock"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, *command, f"--target={daemon.target}", f"--control={control}"),
            env={name: value for name, value in os.environ.items() if not name.startswith("HMM")},
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), TIMEOUT_S)
        assert line == b"ready\n", f"the driver did not start: {line!r}"
        connection = AsyncExitStack()
        remote = await connection.enter_async_context(RemoteDriver.connected(control))
        driver = DriverProcess(process, remote, connection)
        drivers.append(driver)
        return driver

    yield start
    for driver in drivers:
        await driver.stop()


@pytest.fixture
async def start_driver(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[DriverProcess]]]:
    """Starts driver processes: `await start_driver(daemon, "-m", "hmm_client.drivers.dummy")`."""
    async with driver_processes(tmp_path) as start:
        yield start


@pytest.fixture(scope="module")
async def start_lasting_driver(
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Callable[..., Awaitable[DriverProcess]]]:
    """Starts driver processes that last as long as the tests of a file."""
    async with driver_processes(tmp_path_factory.mktemp("drivers")) as start:
        yield start


@pytest.fixture
def start_misbehaving(
    start_driver: Callable[..., Awaitable[DriverProcess]],
) -> Callable[..., Awaitable[DriverProcess]]:
    """Starts drivers that do what a driver must not: `await start_misbehaving(daemon)`."""

    async def start(daemon: Daemon) -> DriverProcess:
        return await start_driver(daemon, str(MISBEHAVING))

    return start


@pytest.fixture
def start_stepping(
    start_driver: Callable[..., Awaitable[DriverProcess]],
) -> Callable[..., Awaitable[DriverProcess]]:
    """Starts drivers that take one step of a migration at a time: `await start_stepping(daemon)`."""

    async def start(daemon: Daemon) -> DriverProcess:
        return await start_driver(daemon, str(STEPPING))

    return start


@pytest.fixture(scope="session")
def packages() -> None:
    """What the driver imports, installed from its lock file."""
    lock, installed = JAVASCRIPT / "package-lock.json", JAVASCRIPT / "node_modules" / ".package-lock.json"
    assert shutil.which("node"), "the driver in JavaScript needs node and npm: apt-get install -y nodejs npm"
    folder = os.open(JAVASCRIPT, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # the tests may be shared by several processes
        if not installed.exists() or installed.stat().st_mtime < lock.stat().st_mtime:
            subprocess.run(["npm", "ci", "--silent"], cwd=JAVASCRIPT, check=True, timeout=INSTALL_S)
    finally:
        os.close(folder)
