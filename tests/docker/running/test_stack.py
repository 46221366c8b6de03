"""Both compose files, running: a daemon, two drivers, and a harness, confined, named, and killed one after another.

Tests of one file share one stack, and each leaves it as it found it, everybody up and the harness making processes;
but for the last, which ends them.
"""

from __future__ import annotations

import pytest
from containers import Container, Stack, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
DRIVERS = ("dummy", "rdma")
SERVICES = ("hmmd", *DRIVERS, "harness")
MIB = 1 << 20


def rounds(harness: Container) -> int:
    """How many processes the harness has finished: the last check of each was printed."""
    return harness.logs().count("no device reads what munmap took")


def wait_for_rounds(harness: Container, count: int = 2) -> None:
    """Wait until the harness has finished more processes, all checks held."""
    before = rounds(harness)
    until(lambda: rounds(harness) >= before + count, f"{count} more rounds: {harness.logs()[-2000:]}")
    assert "FAIL" not in harness.logs()


def test_drivers_start_when_the_daemon_is_healthy_and_the_harness_after_them(stack: Stack) -> None:
    """The order is that of `depends_on`, by health."""
    wait_for_rounds(stack.service("harness"))
    first: dict[tuple[str, str], int] = {}
    for event in stack.events_until("harness", "start"):
        first.setdefault((event.service, event.action), event.time_ns)
    for driver in DRIVERS:
        assert first["hmmd", "start"] < first["hmmd", "health_status: healthy"] < first[driver, "start"]
        assert first[driver, "start"] < first[driver, "health_status: healthy"] < first["harness", "start"]


@pytest.mark.parametrize("name", SERVICES)
def test_service_is_confined(stack: Stack, name: str) -> None:
    """No root, no capabilities, nothing to write to but its sockets and /tmp."""
    container = stack.service(name)
    status = container.status()
    assert "0" not in status["Uid"].split()
    assert {status[kind] for kind in ("CapPrm", "CapEff", "CapBnd")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    done = container.run("python", "-c", "open('/opt/hmmd/x', 'w')")
    assert "Read-only file system" in done.stderr


@pytest.mark.parametrize(("name", "memory", "pids"), [("hmmd", 2048, 128), ("dummy", 256, 64), ("rdma", 256, 64)])
def test_service_has_the_limits_of_its_file(stack: Stack, name: str, memory: int, pids: int) -> None:
    """Memory, processes and share of a CPU; test_image.py shows that such limits bite."""
    host = stack.service(name).inspect()["HostConfig"]
    assert (host["Memory"], host["PidsLimit"]) == (memory * MIB, pids)
    assert host["NanoCpus"] == (1e9 if name == "hmmd" else 5e8)


def test_hosts_have_names_and_no_way_out(stack: Stack) -> None:
    """Over TCP they find one another by name; with a socket they have no network at all."""
    harness = stack.service("harness")
    if stack.file == "docker/compose.yaml":
        assert harness.python("import os; print(*os.listdir('/sys/class/net'))") == "lo"
        return
    program = """
import socket
for name in ("hmmd", "dummy", "rdma"):
    print(socket.gethostbyname(name))
try:
    socket.create_connection(("192.0.2.1", 80), 5)
except OSError as error:
    print(error.strerror)
"""
    *addresses, error = harness.python(program).splitlines()
    assert len(set(addresses)) == 3
    assert error == "Network is unreachable"


def test_harness_goes_on_when_a_driver_is_killed(stack: Stack) -> None:
    """Its mirrors are fenced, so the process ends without it; the engine starts it again, and it mirrors again."""
    name = "rdma" if "tcp" in stack.file else "dummy"
    driver, harness = stack.service(name), stack.service("harness")
    before = driver.inspect()["RestartCount"]
    driver.kill()
    until(lambda: driver.inspect()["RestartCount"] > before, f"{name} is started again")
    wait_for_rounds(harness)
    assert "munmap ended without the driver" in harness.logs()
    assert f"({name}, pid 1) has ended" in stack.service("hmmd").logs()
    assert harness.inspect()["RestartCount"] == 0


def test_everybody_comes_back_when_the_daemon_is_killed(stack: Stack) -> None:
    """Drivers notice, end with 1 and are started again until it serves; then the harness goes on."""
    daemon, harness = stack.service("hmmd"), stack.service("harness")
    drivers = {name: stack.service(name) for name in DRIVERS}
    before = {name: driver.inspect()["RestartCount"] for name, driver in drivers.items()}
    daemon.kill()
    for name, driver in drivers.items():
        until(lambda name=name, driver=driver: driver.inspect()["RestartCount"] > before[name], f"{name} has noticed")
        assert "the session has ended" in driver.logs()
    until(lambda: daemon.inspect()["RestartCount"] == 1, "the daemon is started again")
    daemon.wait_until_healthy()
    wait_for_rounds(harness)
    assert harness.inspect()["RestartCount"] == 0


def test_stack_serves_again_when_the_daemon_is_restarted_in_good_order(stack: Stack) -> None:
    """An upgrade is no more than this: drivers are told goodbye, come back, and mirror again."""
    stack.compose("restart", "--timeout=60", "hmmd")
    stack.service("hmmd").wait_until_healthy()
    wait_for_rounds(stack.service("harness"))


def test_everybody_ends_with_0_when_stopped(stack: Stack) -> None:
    """SIGTERM is enough for all of them; the harness sums up, and nothing it checked has failed."""
    containers = {name: stack.service(name) for name in SERVICES}
    assert containers["harness"].stop() == 0, containers["harness"].logs()[-2000:]
    assert "0 failed" in containers["harness"].logs().splitlines()[-1]
    assert {name: containers[name].stop() for name in ("rdma", "dummy", "hmmd")} == dict.fromkeys(SERVICES[:3], 0)
