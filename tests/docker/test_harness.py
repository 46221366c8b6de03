"""The harness of the compose files, without containers: it passes with right drivers, and fails without."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import Daemon

pytestmark = pytest.mark.slow
HARNESS = Path(__file__).resolve().parents[2] / "docker" / "harness.py"
DRIVERS = {"dummy": "hmm_client.drivers.dummy", "rdma": "hmm_client.drivers.rdma"}


def run_harness(daemon: Daemon, *options: str, drivers: dict[str, str] = DRIVERS) -> subprocess.CompletedProcess[str]:
    """Run it beside a daemon and drivers, by the names that it knows them under."""
    with ExitStack() as stack:
        places = {name: f"--{name}={daemon.socket.with_name(name)}" for name in DRIVERS}
        for name, module in drivers.items():
            control = f"--control={daemon.socket.with_name(name)}"
            command = [sys.executable, "-m", module, f"--target={daemon.target}", control]
            driver = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
            stack.callback(driver.terminate)
            assert driver.stdout is not None
            assert driver.stdout.readline() == b"ready\n"
        command = [sys.executable, str(HARNESS), *places.values(), f"--target={daemon.target}", *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=os.environ)


async def test_harness_ends_with_0_when_all_holds(start_daemon: Callable[..., Awaitable[Daemon]]) -> None:
    """Five checks for each process."""
    done = run_harness(await start_daemon(), "--rounds=3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "harness: 15 checks in 3 rounds, 0 failed"


async def test_harness_ends_with_1_when_a_driver_stays_away(start_daemon: Callable[..., Awaitable[Daemon]]) -> None:
    """It waits for as long as it was told to."""
    done = run_harness(await start_daemon(), "--patience=0.5", drivers={"dummy": DRIVERS["dummy"]})
    assert done.returncode == 1
    assert "rdma" in done.stderr
