"""The image, running: who it is, what it may do, how it ends.  Also what is in it."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable

import pytest
from containers import CONFINED, IMAGE, ROOT, SERVING, Container, docker, until
from packaging.requirements import Requirement

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
MIB = 1 << 20
"""A memory cgroup's unit here."""


@pytest.fixture(scope="module")
def daemon(run_lasting_container: Callable[..., Container]) -> Container:
    """A daemon with every confinement and limits, serving."""
    container = run_lasting_container(*CONFINED, "--memory=512m", "--memory-swap=512m", "--pids-limit=48")
    container.wait_until_serving()
    return container


def test_process_is_not_root(daemon: Container) -> None:
    """Real, effective, saved and file system ids are the fixed ones."""
    status = daemon.status()
    assert status["Uid"].split() == ["10001"] * 4
    assert status["Gid"].split() == ["10001"] * 4


def test_process_has_no_capabilities(daemon: Container) -> None:
    """None effective, none to be had, and no way to gain any; system calls are filtered."""
    status = daemon.status()
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


def test_root_is_read_only(daemon: Container) -> None:
    """Nothing can be written but the socket's folder."""
    program = """
import errno
for path in ("/x", "/opt/hmmd/x", "/tmp/x", "/run/x"):
    try:
        open(path, "w")
    except OSError as error:
        print(errno.errorcode[error.errno])
open("/run/hmmd/x", "w")
"""
    assert daemon.python(program).split() == ["EROFS"] * 4


def test_memory_limit_bites(daemon: Container) -> None:
    """Who takes more than the container may have is killed; the daemon goes on."""
    assert daemon.inspect()["HostConfig"]["Memory"] == 512 * MIB
    greedy = daemon.run("python", "-c", f"bytearray(b'x') * {1024 * MIB}")
    assert greedy.returncode == 128 + signal.SIGKILL
    assert daemon.run("hmmctl", "health").stdout == "serving\n"


def test_process_limit_bites(daemon: Container) -> None:
    """A fork bomb stops at the limit; the daemon goes on."""
    program = """
import errno, os, signal
children = []
try:
    while len(children) < 100:
        child = os.fork()
        if not child:
            signal.pause()
        children.append(child)
except BlockingIOError as error:
    print(errno.errorcode[error.errno], len(children))
finally:
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
"""
    error, children = daemon.python(program).split()
    assert error == "EAGAIN"
    assert 0 < int(children) < 48
    assert daemon.run("hmmctl", "health").stdout == "serving\n"


def test_command_line_of_the_image_reaches_its_daemon(daemon: Container) -> None:
    """`docker exec` needs no options: the socket is where hmmctl looks."""
    done = daemon.run("hmmctl", "stats", "--format", "json")
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)


def test_log_is_lines_of_json(daemon: Container) -> None:
    """What collects logs needs no patterns; only the ready line is for people."""
    lines = [line for line in daemon.logs().splitlines() if not line.startswith(SERVING)]
    assert lines
    assert all({"time", "level", "message"} <= json.loads(line).keys() for line in lines)


def test_probe_finds_a_daemon_that_hangs(run_container: Callable[..., Container]) -> None:
    """A daemon that is there and answers nothing becomes unhealthy, and healthy again when it goes on."""
    probes = ("--health-interval=1s", "--health-timeout=5s", "--health-retries=1")
    container = run_container(*CONFINED, *probes)
    container.wait_until_healthy()
    container.kill(signal.SIGSTOP)
    until(lambda: container.health == "unhealthy", "it is unhealthy")
    container.kill(signal.SIGCONT)
    container.wait_until_healthy()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_daemon_ends_with_0_when_signalled(run_container: Callable[..., Container], number: signal.Signals) -> None:
    """As first process of its container it has no default actions of signals: it must handle them."""
    container = run_container(*CONFINED, f"--stop-signal={number.name}")
    container.wait_until_serving()
    assert container.stop() == 0
    assert "stopped" in container.logs()


def test_daemon_serves_again_when_restarted_after_a_kill(run_container: Callable[..., Container]) -> None:
    """The socket that a killed daemon left behind is replaced."""
    container = run_container(*CONFINED)
    container.wait_until_serving()
    container.kill()
    until(lambda: not container.state()["Running"], "it has ended")
    assert container.state()["ExitCode"] == 128 + signal.SIGKILL
    docker("start", container.id)
    container.wait_until_serving(2)
    docker("restart", container.id)
    container.wait_until_serving(3)


def test_daemon_says_what_is_wrong_when_it_cannot_start(run_container: Callable[..., Container]) -> None:
    """A setting that is not understood: exit code 2 and a line that names it."""
    container = run_container(*CONFINED, "--env=HMMD_FRAMES=many")
    until(lambda: not container.state()["Running"], "it has ended")
    assert container.state()["ExitCode"] == 2
    assert "HMMD_FRAMES" in container.logs()


def test_image_replays_a_program_by_itself() -> None:
    """The same image is a command line: a daemon of its own, two devices, and a recording, all confined."""
    done = docker("run", *CONFINED, "--rm", "--tmpfs=/tmp", IMAGE, "hmmctl", "replay")
    assert re.search(r"^differences +0$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("command", "printed"),
    [
        (("--version",), "hmmd, version "),
        (("hmmctl", "--version"), "hmmctl, version "),
        (("python", "-m", "hmm_client.drivers.dummy", "--help"), "Usage: "),
    ],
)
def test_image_runs_what_stands_behind_its_name(command: tuple[str, ...], printed: str) -> None:
    """Options of the daemon, or any command that is in it."""
    assert docker("run", *CONFINED, "--rm", IMAGE, *command).stdout.startswith(printed)


def test_first_process_is_the_daemon_itself(daemon: Container) -> None:
    """Signals reach it, and not a shell."""
    assert daemon.status()["Name"] == "hmmd"


def test_image_holds_what_is_locked_and_no_more() -> None:
    """The installed versions are those of requirements.lock; nothing that builds or installs came along."""
    program = """
import importlib.metadata as metadata, platform
print(platform.python_version())
for found in metadata.distributions():
    print(found.name.lower().replace("_", "-"), found.version)
"""
    run = ("run", *CONFINED, "--rm", IMAGE, "python")
    version, *installed = docker(*run, "-c", program).stdout.splitlines()
    lines = re.findall(r"^[\w.-]+==[^\\\n]+", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    there = {"python_full_version": version, "python_version": version.rpartition(".")[0]}
    locked = [lock for lock in map(Requirement, lines) if lock.marker is None or lock.marker.evaluate(there)]
    expected = {f"{lock.name} {str(lock.specifier).removeprefix('==')}" for lock in locked}
    assert {line for line in installed if not line.startswith("hmmd ")} == expected
    assert docker(*run, "-m", "pip", check=False).returncode == 1


def test_image_is_small() -> None:
    """The base, and no more than 150 MB on top."""
    size = int(docker("image", "inspect", "--format={{.Size}}", IMAGE).stdout)
    ours = int(docker("run", *CONFINED, "--rm", IMAGE, "du", "--summarize", "--bytes", "/opt/hmmd").stdout.split()[0])
    assert 0 < ours < 150e6
    assert size < 350e6


def test_nothing_is_compiled_at_a_start() -> None:
    """Nobody can write byte code here: what has none would be compiled at every start, and every probe is one."""
    program = """
import os, sys
from hmm_client.cli import main
try:
    main(["health"])
except SystemExit:
    pass
import hmm_server.command
specs = [module.__spec__ for module in list(sys.modules.values()) if getattr(module, "__spec__", None)]
files = [spec.cached for spec in specs if spec.has_location and (spec.origin or "").endswith(".py")]
print(len(files), *(file for file in files if not os.path.exists(file)))
"""
    count, *lacking = docker("run", *CONFINED, "--rm", IMAGE, "python", "-c", program).stdout.split()
    assert int(count) > 300
    assert lacking == []
