"""Fixtures of all tests: daemons, as processes, on sockets of their own."""

from __future__ import annotations

import asyncio
import importlib
import os
import pkgutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from coverage import Coverage
from hypothesis import HealthCheck, settings

import hmm
import hmm_client
from hmm_client.embedded import as_flags

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background; it would be inherited
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run, however long one takes: a busy machine, or chance, is no failure.
settings.register_profile("hmmd", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("hmmd")

TESTS = Path(__file__).parent
MEASURING = Coverage.current()  # while it runs: nobody knows it once it is stopped
MEASURED = ("hmm", "simulation/test_towns.py")
TIMEOUT_S = 60.0
"""Far more than anything takes; a busy machine is no failure."""
PATIENCE: dict[str, object] = {
    "acknowledgement_s": 600.0,
    "fault_s": 600.0,
    "holding_lease_s": 600.0,
    "ping_timeout_ms": 600_000,
}
"""Settings of daemons unless others are asked for: what drivers, faults and connections may take on a busy machine."""

SOON_S = 2.0
"""A deadline that tests wait for: time enough for drivers that answer at once."""


@dataclass
class Daemon:
    """A running hmmd.

    Attributes:
        socket: where it listens.
        process: the process itself.
        targets: everywhere it listens: the socket first, then TCP if it was asked for.
    """

    socket: Path
    process: asyncio.subprocess.Process
    targets: list[str]
    clients: list[hmm_client.Client] = field(default_factory=list)

    @classmethod
    async def start(cls, socket: Path, **settings: object) -> Daemon:
        """Start one that is patient unless `settings` say otherwise, and wait until it serves."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "hmm_server", f"--socket={socket}", "--until-fd=0", *as_flags(PATIENCE | settings)),
            env={name: value for name, value in os.environ.items() if not name.startswith("HMMD_")},
            stdin=asyncio.subprocess.PIPE,  # closed by the kernel, should these tests be killed
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), TIMEOUT_S)
        assert line.startswith(f"hmmd serving unix:{socket}".encode()), f"the daemon did not start: {line!r}"
        return cls(socket, process, line.decode().split()[2:])

    @property
    def target(self) -> str:
        """Where clients connect."""
        return f"unix:{self.socket}"

    def connect(self, name: str = "test", token: str = "") -> hmm_client.Client:
        """A client that is closed when the daemon is stopped."""
        client = hmm_client.connect(self.target, token, name=name)
        self.clients.append(client)
        return client

    async def stop(self) -> int:
        """End it as an init system does; returns its exit code."""
        for client in self.clients:
            await client.close()
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(self.process.wait(), TIMEOUT_S)


@pytest.fixture
def free_port() -> int:
    """A TCP port that nobody listens on, and that the kernel gives to nobody who has not asked for this one."""
    given_first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in range(given_first - 1 - os.getpid() % 1000, 1024, -1):
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port
    pytest.fail("no port is free")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collecting is not measured, it would take half as long again; what runs when hmm is imported is."""
    if MEASURING is not None:
        for module in pkgutil.walk_packages(hmm.__path__, "hmm."):
            importlib.import_module(module.name)
        MEASURING.stop()
    return (yield)


@pytest.fixture(scope="module", autouse=True)
def measured_where_hmm_is_tested(request: pytest.FixtureRequest) -> Iterator[None]:
    """Coverage of hmm is that of its own tests and of the towns; tracing the others would only take time."""
    os.environ.pop("COVERAGE_PROCESS_CONFIG", None)  # which `start` sets: daemons and commands are not measured
    if MEASURING is None or not any(request.path.is_relative_to(TESTS / name) for name in MEASURED):
        yield
        return
    MEASURING.start()
    yield
    MEASURING.stop()


@pytest.fixture
async def start_daemon(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Daemon]]]:
    """Starts patient daemons: call it with the settings of hmm_server.config as keywords."""
    daemons: list[Daemon] = []

    async def start(**settings: object) -> Daemon:
        daemon = await Daemon.start(tmp_path / f"hmmd{len(daemons)}.sock", **settings)
        daemons.append(daemon)
        return daemon

    yield start
    for daemon in daemons:
        assert await daemon.stop() == 0


@pytest.fixture
async def daemon(request: pytest.FixtureRequest, start_daemon: Callable[..., Awaitable[Daemon]]) -> Daemon:
    """A patient daemon for one test, with the settings, if any, that the test is parametrized with."""
    return await start_daemon(**getattr(request, "param", {}))


@pytest.fixture(scope="session")
async def start_session_daemon(
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Callable[..., Awaitable[Daemon]]]:
    """Starts daemons that last until the end of all tests."""
    daemons: list[Daemon] = []

    async def start(**settings: object) -> Daemon:
        daemons.append(await Daemon.start(tmp_path_factory.mktemp("d") / "hmmd.sock", **settings))
        return daemons[-1]

    yield start
    for daemon in daemons:
        assert await daemon.stop() == 0


@pytest.fixture(scope="session")
async def shared_daemon(start_session_daemon: Callable[..., Awaitable[Daemon]]) -> Daemon:
    """A patient daemon, for all tests that do not mind what else is in it."""
    return await start_session_daemon()


@pytest.fixture(scope="session")
async def harness_daemon(start_session_daemon: Callable[..., Awaitable[Daemon]]) -> Daemon:
    """A patient daemon that holds calls and injects failures."""
    return await start_session_daemon(harness=True, lease_s=600.0, drain_s=0.1)


@pytest.fixture(scope="session")
async def hasty_daemon(start_session_daemon: Callable[..., Awaitable[Daemon]]) -> Daemon:
    """A daemon whose drivers have to answer soon."""
    return await start_session_daemon(acknowledgement_s=SOON_S)
