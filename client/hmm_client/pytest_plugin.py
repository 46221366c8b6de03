"""The plugin of pytest, loaded by itself where hmmd is installed: a daemon, a process, devices and mirrors as fixtures.

    def test_my_driver_forgets_what_is_unmapped(hmm):
        process = hmm.process()
        heap = process.mmap(16 * 4096).span
        mirror = hmm.mirror(process, MyDriver())
        ...

    fixture            scope     is
    hmm_daemon         function  a daemon of the test's own; settings: @pytest.mark.hmm_daemon(frames=4096)
    hmm_shared_daemon  session   one for all tests that ask for it; settings by overriding `hmm_shared_settings`
    hmm_seed           function  a number, from the test's node id, or --hmm-seed
    hmm                function  a `SyncRig` on hmm_daemon           hmm_shared      the same on hmm_shared_daemon
    hmm_aio            function  a `Rig` on hmm_daemon               hmm_aio_shared  the same on hmm_shared_daemon
    hmm_process        function  a process of `hmm`
    hmm_device         function  a device of `hmm`
    hmm_mirror         function  makes mirrors of hmm_process on hmm_device: `hmm_mirror(MyDriver())`

Both daemons are started with `harness`.  `hmm_aio` needs pytest-asyncio (`pip install 'hmmd[pytest]'`).  A test that
fails is reported with its seed, what was pending on its daemons at that moment, and their logs.  The summary says how
long daemons took to start.

**Source**: pytest's hooks.

**Invariants**: without one of these fixtures a test costs nothing, not even an import.

**Absent**: what the fixtures are (`hmm_client.harness`, `hmm_client.embedded`).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zlib
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from hmm_client.embedded import EmbeddedDaemon
    from hmm_client.harness import Rig, SyncRig
    from hmm_client.sync import Device, Driver, Mirror, Process

LOG_BYTES = 64 << 10
"""So much of a daemon's log is shown, from its end."""
ASK_S = 60.0
"""How long a daemon may take to say what is pending."""
DAEMONS = pytest.StashKey[list[tuple["EmbeddedDaemon", int]]]()
SEED = pytest.StashKey[int]()
STARTED = pytest.StashKey[list[float]]()
"""How long each daemon took to serve, seconds."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --hmm-seed."""
    group = parser.getgroup("hmm", "drivers of hmmd")
    group.addoption("--hmm-seed", type=int, metavar="N", help="seed of all tests; default: of each, from its node id")


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", "hmm_daemon(**settings): settings of the daemon of the test's own")


# ---- daemons


def _start(config: pytest.Config, folder: Path, settings: dict[str, Any]) -> EmbeddedDaemon:
    from hmm_client.embedded import PATIENCE, EmbeddedDaemon  # noqa: PLC0415 - who uses no fixture does not pay

    settings = PATIENCE | {"harness": True, "drain_s": 0.5} | settings
    daemon = EmbeddedDaemon(folder, log=folder / "hmmd.log", **settings)
    config.stash.setdefault(STARTED, []).append(daemon.started_s)
    return daemon


@pytest.fixture
def hmm_daemon(request: pytest.FixtureRequest) -> Iterator[EmbeddedDaemon]:
    """A daemon of the test's own."""
    marker = request.node.get_closest_marker("hmm_daemon")
    with tempfile.TemporaryDirectory(prefix="hmmd-") as folder:  # the path of a socket must be short
        daemon = _start(request.config, Path(folder), dict(marker.kwargs) if marker else {})
        _watch(request.node, daemon, 0)
        yield daemon
        daemon.stop()


@pytest.fixture(scope="session")
def hmm_shared_settings() -> dict[str, Any]:
    """Settings of the shared daemon; override it in conftest.py."""
    return {}


@pytest.fixture(scope="session")
def _hmm_session_daemon(pytestconfig: pytest.Config, hmm_shared_settings: dict[str, Any]) -> Iterator[EmbeddedDaemon]:
    with tempfile.TemporaryDirectory(prefix="hmmd-") as folder:
        daemon = _start(pytestconfig, Path(folder), hmm_shared_settings)
        yield daemon
        daemon.stop()


@pytest.fixture
def hmm_shared_daemon(request: pytest.FixtureRequest, _hmm_session_daemon: EmbeddedDaemon) -> EmbeddedDaemon:
    """One daemon for all tests that do not mind what else is in it."""
    assert _hmm_session_daemon.log is not None
    _watch(request.node, _hmm_session_daemon, _hmm_session_daemon.log.stat().st_size)
    return _hmm_session_daemon


def _watch(item: pytest.Item, daemon: EmbeddedDaemon, log_start: int) -> None:
    """Report the test with this daemon's log, from a position in bytes on, and what is pending on it."""
    item.stash.setdefault(DAEMONS, []).append((daemon, log_start))


# ---- what tests use


@pytest.fixture
def hmm_seed(request: pytest.FixtureRequest) -> int:
    """A seed: of --hmm-seed, or this test's own, the same in every run."""
    given: int | None = request.config.getoption("--hmm-seed")
    seed = zlib.crc32(request.node.nodeid.encode()) if given is None else given
    request.node.stash[SEED] = seed
    return seed


@pytest.fixture
def hmm(hmm_daemon: EmbeddedDaemon, hmm_seed: int) -> Iterator[SyncRig]:
    """Processes, devices, mirrors and holds on a daemon of the test's own, without await."""
    yield from _sync_rig(hmm_daemon, hmm_seed)


@pytest.fixture
def hmm_shared(hmm_shared_daemon: EmbeddedDaemon, hmm_seed: int) -> Iterator[SyncRig]:
    """Processes, devices, mirrors and holds on the shared daemon, without await."""
    yield from _sync_rig(hmm_shared_daemon, hmm_seed)


def _sync_rig(daemon: EmbeddedDaemon, seed: int) -> Iterator[SyncRig]:
    from hmm_client.harness import SyncRig  # noqa: PLC0415 - who uses no fixture does not pay

    with SyncRig(daemon.target, seed=seed) as rig:
        yield rig


@pytest.fixture
def hmm_process(hmm: SyncRig) -> Process:
    """A process with an empty address space."""
    return hmm.process()


@pytest.fixture
def hmm_device(hmm: SyncRig) -> Device:
    """A device with a stream of its own."""
    return hmm.device()


@pytest.fixture
def hmm_mirror(hmm: SyncRig, hmm_process: Process, hmm_device: Device) -> Callable[..., Mirror]:
    """Makes mirrors: `hmm_mirror(MyDriver(), misbehaviour=...)`; of another process or device if it is given."""

    def make(driver: Driver | None = None, *, process: Process | None = None, **options: Any) -> Mirror:
        return hmm.mirror(process or hmm_process, driver, **{"device": hmm_device} | options)

    return make


if find_spec("pytest_asyncio"):
    import pytest_asyncio

    @pytest_asyncio.fixture
    async def hmm_aio(hmm_daemon: EmbeddedDaemon, hmm_seed: int) -> AsyncIterator[Rig]:
        """Processes, devices, mirrors and holds on a daemon of the test's own, with await."""
        async with _rig(hmm_daemon, hmm_seed) as rig:
            yield rig

    @pytest_asyncio.fixture
    async def hmm_aio_shared(hmm_shared_daemon: EmbeddedDaemon, hmm_seed: int) -> AsyncIterator[Rig]:
        """Processes, devices, mirrors and holds on the shared daemon, with await."""
        async with _rig(hmm_shared_daemon, hmm_seed) as rig:
            yield rig

    def _rig(daemon: EmbeddedDaemon, seed: int) -> Rig:
        from hmm_client.harness import Rig  # noqa: PLC0415 - who uses no fixture does not pay

        return Rig(daemon.target, seed=seed)


# ---- reports


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Attach seed, pending operations and logs to the report of a test that fails."""
    report = yield
    if report.failed and call.when in ("setup", "call"):
        if SEED in item.stash:
            report.sections.append(("hmm seed", f"run it again with --hmm-seed={item.stash[SEED]}"))
        for daemon, start in item.stash.get(DAEMONS, []):
            report.sections.append(("hmmd pending", _pending(daemon)))
            title = f"hmmd log (it served after {daemon.started_s:.2f} s)"
            report.sections.append((title, daemon.read_log(start)[-LOG_BYTES:]))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how long daemons took to start, unless tests are to be quiet."""
    started: list[float] = config.stash.get(STARTED, [])
    started.sort()
    if started and config.get_verbosity() >= 0:
        median_s, count = started[len(started) // 2], len(started)
        daemons = "daemon" if count == 1 else "daemons"
        terminalreporter.write_line(
            f"hmmd: {count} {daemons}, served after {median_s:.2f} s, the slowest after {started[-1]:.2f} s"
        )


def _pending(daemon: EmbeddedDaemon) -> str:
    # From a process of its own: the test's loop may hang, and its threads may wait for this very daemon.
    if not daemon.is_alive:
        return f"the daemon has ended: exit code {daemon.process.returncode}"
    command = [sys.executable, "-m", "hmm_client.cli", "pending", "--target", daemon.target]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, check=False)
    except subprocess.TimeoutExpired:
        return f"the daemon did not answer within {ASK_S:g} s"
    return (asked.stdout + asked.stderr).rstrip()
