"""The command line and where it connects: tokens, TLS, a daemon that does not answer, and what of it is watched."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from test_hmmctl import Done, hmmctl

import hmm_client

if TYPE_CHECKING:
    from tests.conftest import Daemon

TLS = Path(__file__).parents[1] / "server" / "tls"
PAUSE_S = 0.01
"""Between two changes of something that is watched, or will be soon."""
pytestmark = pytest.mark.slow
StartDaemon = Callable[..., Awaitable["Daemon"]]


async def test_command_sees_what_its_token_owns(start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """--token or $HMMD_TOKEN; without it what belongs to that token is refused."""
    daemon = await start_daemon()
    process = await daemon.connect(token="mine").create_process("mine")
    refused = await hmmctl("maps", process.id, "-t", daemon.target)
    assert (refused.code, refused.stdout) == (4, "")
    assert refused.stderr.startswith("hmmctl: EPERM: ")
    assert (await hmmctl("maps", process.id, "-t", daemon.target, "--token", "mine")).code == 0
    monkeypatch.setenv("HMMD_TOKEN", "mine")
    assert (await hmmctl("maps", process.id, "-t", daemon.target)).code == 0


async def test_command_connects_with_certificates(start_daemon: StartDaemon) -> None:
    """TLS on both sides; who shows no certificate of its own finds no daemon."""
    daemon = await start_daemon(
        tcp="127.0.0.1:0",
        tls_certificate=TLS / "server.pem",
        tls_key=TLS / "server.key",
        tls_client_ca=TLS / "authority.pem",
    )
    where = ("ps", "-t", daemon.targets[1], "--tls-ca", TLS / "authority.pem")
    known = await hmmctl(*where, "--tls-certificate", TLS / "client.pem", "--tls-key", TLS / "client.key")
    assert (known.code, known.stdout.splitlines()[0]) == (0, "no processes")
    assert (await hmmctl(*where)).code == 3
    half = await hmmctl(*where, "--tls-certificate", TLS / "client.pem")
    assert half.code == 2
    assert "belong together" in half.stderr


async def test_command_ends_when_the_daemon_does_not_answer_in_time(start_daemon: StartDaemon) -> None:
    """--timeout is how long an answer may take; a daemon that is stopped gives none."""
    daemon = await start_daemon()
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        done = await hmmctl("ps", "-t", daemon.target, "--timeout", "0.5")
    finally:
        daemon.process.send_signal(signal.SIGCONT)
    assert done.code == 3
    assert done.stdout == ""


@pytest.mark.parametrize("option", ["--process", "--mirror"])
async def test_watch_shows_what_it_was_asked_for_alone(start_daemon: StartDaemon, option: str) -> None:
    """Of two processes that go on changing, the events and answers of one."""
    daemon = await start_daemon()
    client = daemon.connect()
    device = await client.register_device("gpu")
    watched, other = [await client.create_process(name) for name in ("watched", "other")]
    mirrors = [await device.mirror(process, hmm_client.Driver()) for process in (other, watched)]
    number = watched.id if option == "--process" else mirrors[1].id
    watching: asyncio.Task[Done] = asyncio.create_task(
        hmmctl("watch", option, number, "--count", 4, "-t", daemon.target, "--format", "json")
    )
    while not watching.done():
        for process in (other, watched):
            mapped = await process.mmap(4096)
            await process.munmap(mapped.address, 4096)
        await asyncio.sleep(PAUSE_S)
    done = await watching
    assert done.code == 0
    heard = [value["event"]["mirror_ids"] for value in done.values if "event" in value]
    assert heard
    assert {mirror for ids in heard for mirror in ids} == {mirrors[1].id}


async def test_command_connects_with_the_systems_authorities(start_daemon: StartDaemon) -> None:
    """--tls: the daemon's certificate is signed by one of those, or it is no daemon of ours."""
    daemon = await start_daemon(tcp="127.0.0.1:0", tls_certificate=TLS / "server.pem", tls_key=TLS / "server.key")
    where = ("health", "--tls", "-t", daemon.targets[1])
    assert (await hmmctl(*where)).code == 1
    done = await hmmctl(*where, environment={"GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(TLS / "authority.pem")})
    assert (done.code, done.stdout) == (0, "serving\n")


async def test_watch_shows_calls_when_it_is_told_to(start_daemon: StartDaemon) -> None:
    """--operations: calls that end are shown; --count says how many lines there are."""
    daemon = await start_daemon()
    process = await daemon.connect(name="program").create_process("watched")
    watching = asyncio.create_task(hmmctl("watch", "--operations", "--count", 1, "-t", daemon.target))
    while not watching.done():
        await process.mmap(4096)
        await asyncio.sleep(PAUSE_S)
    done = await watching
    assert done.code == 0
    assert " by program: done after " in done.stdout
    assert len(done.stdout.splitlines()) == 1


async def test_top_ends_when_the_daemon_answers_no_more(start_daemon: StartDaemon) -> None:
    """One that is stopped between two readings; --timeout is for each of them."""
    daemon = await start_daemon()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hmm_client.cli", "top", "--format", "json", "--interval", "0.1", "--timeout", "2"),
        *("-t", daemon.target),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert await process.stdout.readline()
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        _, said = await process.communicate()
    finally:
        daemon.process.send_signal(signal.SIGCONT)
    assert (process.returncode, said.decode()) == (3, f"hmmctl: {daemon.target} did not answer within 2 s\n")
