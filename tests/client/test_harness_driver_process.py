"""Drivers as processes of their own: killed, stopped and going on, from outside and by their own scripts."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hmm_client.harness import DriverProcess, SyncRig
from hmm_client.sync import Process
from hmm_proto.v1 import types_pb2

if TYPE_CHECKING:
    from tests.conftest import Daemon

pytestmark = pytest.mark.slow

PAGE = 4096
DRIVER = """
import signal
import sys

from hmm.units import AddressRange
from hmm_client import sync
from hmm_client.harness import Misbehaviour, answer, kill_process, stop_process

scripts = {"behave": answer(), "die": kill_process(), "stop": stop_process()}
process_id, start, script = int(sys.argv[1]), int(sys.argv[2]), scripts[sys.argv[3]]
with sync.connect(name="driver") as client:
    device = client.register_device("gpu")
    script = Misbehaviour(script, own_process=True)
    mirror = device.mirror(client.process(process_id), sync.Driver(), fault_events=False, misbehaviour=script)
    mirror.fault(AddressRange(start, start + 4096))
    print("ready")
    signal.pause()
"""

Start = Callable[[str], tuple[DriverProcess, Process, int]]


@pytest.fixture
def rig(request: pytest.FixtureRequest, harness_daemon: Daemon, hasty_daemon: Daemon) -> Iterator[SyncRig]:
    """A rig on a patient daemon, or on one whose drivers have to answer soon if the parameter is `hasty`."""
    daemon = hasty_daemon if getattr(request, "param", "") == "hasty" else harness_daemon
    with SyncRig(daemon.target) as rig:
        yield rig


@pytest.fixture
def start(rig: SyncRig, tmp_path: Path) -> Iterator[Start]:
    """Starts a driver of a new process, which has one page, and waits until it has faulted that page."""
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    drivers: list[DriverProcess] = []

    def run(how: str) -> tuple[DriverProcess, Process, int]:
        process = rig.process()
        address = process.mmap(PAGE).address
        command = [sys.executable, str(script), str(process.id), str(address), how]
        drivers.append(DriverProcess(command, rig.target))
        drivers[-1].wait_for_line("ready")
        return drivers[-1], process, address

    yield run
    for driver in drivers:
        driver.end()


def test_process_is_found_by_its_environment_and_ends_in_good_order(start: Start) -> None:
    """The driver finds the daemon in $HMMD_SOCKET; munmap waits for its answer; SIGTERM ends it."""
    driver, process, address = start("behave")
    assert process.munmap(address, PAGE).fenced_mirrors == ()
    assert driver.end() == -signal.SIGTERM
    assert driver.text == "ready\n"


def test_mirror_is_fenced_when_its_driver_is_killed(start: Start, rig: SyncRig) -> None:
    """SIGKILL from outside: nobody waits for it."""
    driver, process, address = start("behave")
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    process.munmap(address, PAGE)
    assert not [one for one in rig.pending().operations if one.process_id == process.id]


def test_mirror_is_fenced_when_its_driver_dies_of_the_event(start: Start) -> None:
    """SIGKILL to itself the moment it hears of munmap, which names it and ends."""
    driver, process, address = start("die")
    assert len(process.munmap(address, PAGE).fenced_mirrors) == 1
    assert driver.wait() == -signal.SIGKILL


@pytest.mark.parametrize("rig", ["hasty"], indirect=True)
@pytest.mark.parametrize("how", ["behave", "stop"])
def test_mirror_is_fenced_when_its_driver_is_stopped(start: Start, how: str) -> None:
    """SIGSTOP, from outside or at the event: its deadline ends the waiting."""
    driver, process, address = start(how)
    if how == "behave":
        driver.stop()
    assert len(process.munmap(address, PAGE).fenced_mirrors) == 1
    driver.go_on()


@pytest.mark.parametrize("how", ["behave", "stop"])
def test_pending_names_the_event_when_its_driver_is_stopped(start: Start, rig: SyncRig, how: str) -> None:
    """As long as it is stopped, and no longer: SIGKILL ends the waiting too."""
    driver, process, address = start(how)
    if how == "behave":
        driver.stop()
    unmapping = rig.background(process.munmap, address, PAGE)
    sent: list[str] = []
    while not sent:
        mine = [one for one in rig.pending().operations if one.process_id == process.id]
        events = [event for one in mine for event in one.events]
        sent = [event.driver_name for event in events if event.state == types_pb2.EVENT_STATE_SENT]
    assert sent == ["driver"]
    driver.kill()
    assert len(unmapping.result().fenced_mirrors) == 1


def test_wait_for_line_says_what_was_printed_instead(tmp_path: Path) -> None:
    """A driver that does not start is told from one that is slow."""
    output = tmp_path / "output"
    with DriverProcess([sys.executable, "-c", "print('oops')"], "unix:/nowhere", output=output) as driver:
        with pytest.raises(TimeoutError, match=r"did not print 'ready' \(it ended with 0\):\noops"):
            driver.wait_for_line("ready")
        assert driver.pid == driver.process.pid
