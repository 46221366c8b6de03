"""How driver processes are told what to do: lines on a socket, and a command line."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

import hmm_client
from hmm.units import PAGE_SIZE, AddressRange
from hmm_client.drivers import dummy, rdma
from hmm_client.drivers.control import LINE_BYTES, Control, decode, encode, tls_context
from hmm_client.drivers.remote import RemoteDriver, RemoteError
from hmm_client.embedded import EmbeddedDaemon

if TYPE_CHECKING:
    from tests.conftest import Daemon


async def ask(path: Path, *lines: str) -> list[dict[str, Any]]:
    """Send lines to a control socket; the replies, in order of their ids."""
    reader, writer = await asyncio.open_unix_connection(path)
    writer.writelines(line.encode() + b"\n" for line in lines)
    replies = [json.loads(await reader.readline()) for _ in lines]
    writer.close()
    return sorted(replies, key=lambda reply: reply["id"] or 0)


async def test_control_socket_serves_operations_as_lines(tmp_path: Path, client: hmm_client.Client) -> None:
    """Results, errors of the model with errno and address, and lines that make no sense: each gets its reply."""
    process = await client.create_process("program")
    mapped = await process.mmap(PAGE_SIZE)
    path = tmp_path / "control.sock"
    async with Control(await rdma.operations(client)).serving(path):
        assert path.stat().st_mode & 0o777 == 0o600
        registering = {"id": 1, "op": "reg_mr", "process": process.id, "address": mapped.address, "length": 4096}
        (registered,) = await ask(path, json.dumps(registering))
        key = registered["result"]["key"]
        write = {"id": 1, "op": "post_write", "key": key, "address": mapped.address, "data": encode(b"line")}
        (written,) = await ask(path, json.dumps(write))
        assert written == {"id": 1, "result": None}
        read = {"id": 1, "op": "post_read", "key": key, "address": mapped.address, "length": 4}
        beyond = {"id": 2, "op": "reg_mr", "process": process.id, "address": mapped.span.end, "length": 4096}
        replies = await ask(
            path, json.dumps(read), json.dumps(beyond), '{"id": 3, "op": "nothing"}', '{"id": 4, "op": "statistics"}'
        )
        assert decode(replies[0]["result"]["data"]) == b"line"
        assert (replies[1]["error"]["errno"], replies[1]["error"]["address"]) == ("EFAULT", mapped.span.end)
        assert replies[2]["error"]["errno"] == "EINVAL"
        assert replies[3]["result"]["writes"] == 1
        (nonsense,) = await ask(path, "not JSON")
        assert nonsense["error"]["errno"] == "EINVAL"
    assert not path.exists()


async def double(number: int) -> int:
    """An operation that takes a while."""
    await asyncio.sleep(0)
    return 2 * number


async def test_request_is_answered_when_its_operation_fails_in_an_unforeseen_way(tmp_path: Path) -> None:
    """Whoever asked for a range that cannot be waits for a reply, and gets one."""

    async def measure(start: int, end: int) -> int:
        return AddressRange(start, end).size_bytes

    async with Control({"measure": measure}).serving(tmp_path / "control.sock"):
        (reply,) = await ask(tmp_path / "control.sock", '{"id": 1, "op": "measure", "start": -1, "end": 5}')
        assert reply["error"]["errno"] == "EIO"


@pytest.mark.parametrize(
    ("request_line", "message"),
    [
        ("not JSON", "a request is one line of JSON: "),
        ("[1]", "a request is a JSON object, not [1]"),
        ('{"number": 1}', "there is no operation None; there are double"),
        ('{"op": ["double"], "number": 1}', "there is no operation ['double']; there are double"),
        ('{"op": "halve", "number": 1}', "there is no operation 'halve'; there are double"),
        ('{"op": "double"}', "double(number): missing a required argument: 'number'"),
        ('{"op": "double", "number": 1, "more": 2}', "double(number): got an unexpected keyword argument 'more'"),
        ('{"op": "double", "number": "0x10"}', "double: number is of type int, not '0x10'"),
        ('{"op": "double", "number": true}', "double: number is of type int, not True"),
    ],
)
async def test_request_is_refused_by_name_when_it_makes_no_sense(
    tmp_path: Path, request_line: str, message: str
) -> None:
    """The message says what there is and what was wrong, in the words of the request and not of Python."""
    async with Control({"double": double}).serving(tmp_path / "control.sock"):
        (reply,) = await ask(tmp_path / "control.sock", request_line)
        assert reply["error"]["errno"] == "EINVAL"
        assert reply["error"]["message"].startswith(message)


async def test_operation_may_take_whatever_it_is_given(tmp_path: Path) -> None:
    """Its arguments have no names then, and no types."""

    async def count(**anything: int) -> int:
        return len(anything)

    async with Control({"count": count}).serving(tmp_path / "control.sock"):
        (reply,) = await ask(tmp_path / "control.sock", '{"id": 1, "op": "count", "one": 1, "two": "2"}')
        assert reply == {"id": 1, "result": 2}


async def test_control_takes_no_place_of_somebody_elses(tmp_path: Path) -> None:
    """A file stays where it is, as does the socket of a driver that lives; one that nobody serves is replaced."""
    path = tmp_path / "control.sock"
    path.write_text("not a socket")
    with pytest.raises(FileExistsError, match=r"no socket.*control\.sock"):
        async with Control({}).serving(path):
            pass
    assert path.read_text() == "not a socket"
    path.unlink()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    async with Control({"double": double}).serving(path):
        with pytest.raises(OSError, match=r"in use.*control\.sock"):
            async with Control({}).serving(path):
                pass
        (reply,) = await ask(path, '{"id": 1, "op": "double", "number": 21}')
        assert reply == {"id": 1, "result": 42}


async def test_requests_are_answered_when_their_sender_has_said_all(tmp_path: Path) -> None:
    """As `nc -N` does it: the end of what is asked is not the end of the answers."""
    async with Control({"double": double}).serving(tmp_path / "control.sock"):
        reader, writer = await asyncio.open_unix_connection(tmp_path / "control.sock")
        writer.write(b'{"id": 1, "op": "double", "number": 21}\n')
        writer.write_eof()
        assert json.loads(await reader.read()) == {"id": 1, "result": 42}
        writer.close()


async def test_connections_are_closed_when_nothing_is_served_any_more(tmp_path: Path) -> None:
    """Whoever has one, and asks for nothing or waits for an answer, hears of the end at once."""

    async def wait() -> None:
        await asyncio.Event().wait()

    async with Control({"wait": wait}).serving(tmp_path / "control.sock"):
        idle, idle_writer = await asyncio.open_unix_connection(tmp_path / "control.sock")
        waiting, waiting_writer = await asyncio.open_unix_connection(tmp_path / "control.sock")
        waiting_writer.write(b'{"id": 1, "op": "wait"}\n{"id": 2, "op": "nothing"}\n')
        assert json.loads(await waiting.readline())["id"] == 2
    async with asyncio.timeout(60):
        assert await idle.read() == await waiting.read() == b""
    for writer in (idle_writer, waiting_writer):
        writer.close()


async def test_request_that_is_too_long_is_answered_and_ends_its_connection_alone(tmp_path: Path) -> None:
    """Where the next one begins is not known; other connections go on."""
    async with Control({"double": double}).serving(tmp_path / "control.sock"):
        reader, writer = await asyncio.open_unix_connection(tmp_path / "control.sock")
        writer.write(bytes(LINE_BYTES + 1))
        reply = json.loads(await reader.readline())
        assert reply["id"] is None
        assert "longer than 16,777,216 bytes" in reply["error"]["message"]
        writer.close()
        async with RemoteDriver.connected(tmp_path / "control.sock") as remote:
            assert await remote.call("double", number=21) == 42


TLS = Path(__file__).parents[1] / "server" / "tls"


async def test_control_over_tcp_serves_who_shows_a_certificate(free_port: int) -> None:
    """Both ends show certificates of one authority; who shows none is cut off."""
    place = f"localhost:{free_port}"
    authority = TLS / "authority.pem"
    server = tls_context(authority, TLS / "server.pem", TLS / "server.key", server=True)
    client = tls_context(authority, TLS / "client.pem", TLS / "client.key")
    async with Control({"double": double}).serving(place, server):
        async with RemoteDriver.connected(place, client) as remote:
            assert await remote.call("double", number=21) == 42
            with pytest.raises(RemoteError) as caught:
                await remote.call("nothing")
            assert caught.value.errno == "EINVAL"
        with pytest.raises(OSError, match=r"certificate|went away|reset|gone"):
            async with RemoteDriver.connected(place, ssl.create_default_context(cafile=authority)) as stranger:
                await stranger.call("double", number=21)


async def test_call_ends_when_its_driver_goes_away(tmp_path: Path) -> None:
    """Calls under way and later ones raise ConnectionError."""
    path = tmp_path / "control.sock"

    async def close_after_a_line(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.close()

    async with await asyncio.start_unix_server(close_after_a_line, path), RemoteDriver.connected(path) as remote:
        for _ in range(2):
            with pytest.raises(ConnectionError):
                await remote.call("anything")


def test_control_over_tcp_is_refused_without_certificates() -> None:
    """What a device does is nobody else's business: there is no control over TCP in plain text."""
    done = CliRunner().invoke(dummy.main, ["--control", "localhost:7001"])
    assert done.exit_code == 2
    assert "--tls-certificate" in done.output


def test_commands_say_what_they_are() -> None:
    """`--help` shows the head of the module's docstring."""
    assert dummy.main.help is not None
    assert dummy.main.help.startswith("The dummy driver of the 2015 series")
    assert "**Source**" not in dummy.main.help


@pytest.mark.slow
def test_driver_process_ends_in_good_order_when_it_is_told_to(shared_daemon: Daemon, tmp_path: Path) -> None:
    """It says when it is ready, serves beside the daemon's socket, and exits 0 at SIGTERM."""
    command = [sys.executable, "-m", "hmm_client.drivers.prefetch", f"--target={shared_daemon.target}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == b"ready\n"
        assert shared_daemon.socket.with_name("prefetch.sock").is_socket()
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(timeout=60) == 0
    assert not shared_daemon.socket.with_name("prefetch.sock").exists()


@pytest.mark.slow
def test_driver_process_fails_when_there_is_no_daemon(tmp_path: Path) -> None:
    """Exit code 1, and a line that names the target; whoever started it may try again."""
    command = [sys.executable, "-m", "hmm_client.drivers.rdma", f"--target={tmp_path}/nobody.sock"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "nobody.sock" in done.stderr


@pytest.mark.slow
def test_patient_driver_waits_for_its_daemon(tmp_path: Path) -> None:
    """Started before the daemon, it becomes ready with it, and ends with 1 after it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HMMD_")}
    command = [sys.executable, "-m", "hmm_client.drivers.dummy", f"--target={tmp_path}/hmmd.sock", "--patience=60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as driver:
        daemon = [sys.executable, "-m", "hmm_server", f"--socket={tmp_path}/hmmd.sock"]
        with subprocess.Popen(daemon, stdout=subprocess.DEVNULL, env=environment) as served:
            assert driver.stdout is not None
            assert driver.stdout.readline() == b"ready\n"
            served.send_signal(signal.SIGTERM)
        assert driver.wait(timeout=60) == 1


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["dummy", "rdma", "prefetch", "dmirror"])
async def test_driver_process_ends_with_a_line_when_its_daemon_is_killed(tmp_path: Path, driver: str) -> None:
    """Exit code 1 and why, whatever the driver was doing; nothing of asyncio's."""
    daemon = await asyncio.to_thread(EmbeddedDaemon, tmp_path)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"hmm_client.drivers.{driver}", f"--target={daemon.target}"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    daemon.process.kill()
    _, said = await process.communicate()
    daemon.stop()
    assert process.returncode == 1
    assert re.fullmatch(rb"hmm_client.drivers.control: the session has ended: [^\n]*\n", said)
