"""Where the client looks for its daemon, and what it says when there is none."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest

import hmm_client
from hmm.units import PAGE_SIZE
from hmm_client.channel import as_target, default_target, tls_credentials
from hmm_client.harness import Harness, HoldPoint
from hmm_proto.v1 import inspection_pb2, process_pb2_grpc

if TYPE_CHECKING:
    from tests.conftest import Daemon

TLS = Path(__file__).parents[1] / "server" / "tls"


def test_default_target_follows_the_environment() -> None:
    """$HMMD_SOCKET, then the user's runtime directory, then the system's."""
    assert default_target({"HMMD_SOCKET": "/a/b.sock", "XDG_RUNTIME_DIR": "/run/user/1"}) == "unix:/a/b.sock"
    assert default_target({"XDG_RUNTIME_DIR": "/run/user/1"}) == "unix:/run/user/1/hmmd/hmmd.sock"
    assert default_target({}) == "unix:/run/hmmd/hmmd.sock"


@pytest.mark.parametrize(
    ("place", "target"),
    [
        ("/a.sock", "unix:/a.sock"),
        ("a.sock", "unix:a.sock"),
        ("unix:/a.sock", "unix:/a.sock"),
        ("localhost:1234", "localhost:1234"),
    ],
)
def test_as_target_makes_sockets_of_paths(place: str, target: str) -> None:
    """A path is a UNIX socket; everything else is gRPC's affair."""
    assert as_target(place) == target


async def test_call_says_that_nobody_listens_when_there_is_no_daemon(tmp_path: Path) -> None:
    """It is a ConnectionError that names the target, at once, for calls and for sessions."""
    async with hmm_client.connect(str(tmp_path / "nobody.sock")) as client:
        with pytest.raises(hmm_client.UnavailableError, match=r"nobody listens at unix:.*/nobody\.sock: No such file"):
            await client.create_process()
        with pytest.raises(ConnectionError):
            await client.register_device("gpu")


@pytest.mark.slow
async def test_call_says_that_nobody_answers_when_the_daemon_is_stopped(tmp_path: Path) -> None:
    """The kernel connects clients to a process that is stopped: this is told from nobody being there."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "stopped.sock"))
        listener.listen()
        async with hmm_client.connect(str(tmp_path / "stopped.sock")) as client:
            with pytest.raises(hmm_client.UnavailableError, match=r"stopped\.sock does not answer") as caught:
                await client.create_process()
    assert caught.value.silent


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
async def test_call_says_that_the_connection_broke_when_it_is_cut(tmp_path: Path, code: grpc.StatusCode) -> None:
    """A daemon that ends cuts calls that are still under way, and gRPC has two words for it."""

    class Ending(process_pb2_grpc.ProcessServiceServicer):
        async def CreateProcess(self, request: Any, context: Any) -> Any:  # noqa: N802 - the interface
            await context.abort(code, "cut")

    server = grpc.aio.server()
    process_pb2_grpc.add_ProcessServiceServicer_to_server(Ending(), server)
    server.add_insecure_port(f"unix:{tmp_path}/ending.sock")
    await server.start()
    async with hmm_client.connect(str(tmp_path / "ending.sock")) as client:
        with pytest.raises(hmm_client.UnavailableError, match=r"the connection to .*ending\.sock broke: cut") as caught:
            await client.create_process()
    assert caught.value.broke
    await server.stop(None)


async def test_call_says_that_its_client_is_closed_when_it_is(shared_daemon: Daemon) -> None:
    """A handle that is used after its client has ended has nobody to ask; closing again is no error."""
    async with hmm_client.connect(shared_daemon.target) as client:
        process = await client.create_process()
    await client.close()
    watching = client.channel.stream(client.inspection.Watch, inspection_pb2.WatchRequest())
    for call in (
        process.mmap(4096),
        client.register_device("gpu"),
        process.userfaultfd().open(),
        Harness(client).hold(HoldPoint.EVENT_SENT).__aenter__(),
        anext(watching),
    ):
        with pytest.raises(hmm_client.UnavailableError, match="this client is closed"):
            await call


async def test_call_under_way_says_that_its_client_is_closed_when_that_happens(shared_daemon: Daemon) -> None:
    """Nobody cancelled whoever waits for it; who is cancelled is told so."""
    async with hmm_client.connect(shared_daemon.target) as handler:
        process = await handler.create_process()
        heap = await process.mmap(4096)
        async with process.userfaultfd() as missing:
            await missing.register(heap.span)
            client = hmm_client.connect(shared_daemon.target)
            reads = [asyncio.create_task(client.process(process.id).read(heap.address, 1)) for _ in range(2)]
            assert await missing.read()
            reads[0].cancel()
            with pytest.raises(asyncio.CancelledError):
                await reads[0]
            await client.close()
            with pytest.raises(hmm_client.UnavailableError, match="this client is closed"):
                await reads[1]


def test_tls_credentials_are_read_from_files(tmp_path: Path) -> None:
    """Certificates are PEM files; one that is not there is an OSError."""
    assert hmm_client.tls_credentials(TLS / "authority.pem") is not None
    with pytest.raises(FileNotFoundError):
        hmm_client.tls_credentials(tmp_path / "none.pem")


@pytest.mark.slow
async def test_session_and_calls_travel_over_tls(start_daemon: Callable[..., Awaitable[Daemon]]) -> None:
    """TCP with certificates on both sides is as good as the socket; without the client's own, nobody answers."""
    daemon = await start_daemon(
        tcp="127.0.0.1:0",
        tls_certificate=TLS / "server.pem",
        tls_key=TLS / "server.key",
        tls_client_ca=TLS / "authority.pem",
    )
    known = hmm_client.tls_credentials(TLS / "authority.pem", TLS / "client.pem", TLS / "client.key")
    async with hmm_client.connect(daemon.targets[1], credentials=known) as client:
        process = await client.create_process("far away")
        mirror = await (await client.register_device("gpu")).mirror(process, hmm_client.Driver())
        mapped = await process.mmap(4096)
        await mirror.fault(mapped.span, write=True)
        await mirror.write([(mapped.address, 3)], b"tls")
        assert await process.read(mapped.address, 3) == b"tls"
        assert (await process.munmap(mapped.address, 4096)).fenced_mirrors == ()
    unknown = hmm_client.tls_credentials(TLS / "authority.pem")
    async with hmm_client.connect(daemon.targets[1], credentials=unknown) as client:
        with pytest.raises(hmm_client.UnavailableError):
            await client.create_process("nobody")


def test_import_does_not_load_grpc_before_it_is_needed() -> None:
    """`import hmm_client` is cheap, and sets what gRPC reads when it is imported; each public name can be fetched."""
    program = (
        "import sys, os, hmm_client; assert 'grpc' not in sys.modules;"
        "assert 'event_engine' in os.environ['GRPC_EXPERIMENTS'];"
        "[getattr(hmm_client, name) for name in hmm_client.__all__]; assert 'grpc' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hmm_client.nothing


@pytest.mark.slow
async def test_ready_returns_when_the_daemon_has_started(
    tmp_path: Path, start_daemon: Callable[..., Awaitable[Daemon]]
) -> None:
    """A client may be there before its daemon, and wait for it."""
    async with hmm_client.connect(str(tmp_path / "hmmd0.sock")) as client:
        waiting = asyncio.ensure_future(client.ready())
        with pytest.raises(hmm_client.UnavailableError):
            await client.create_process()
        assert not waiting.done()
        daemon = await start_daemon()
        assert daemon.target == client.channel.target
        await waiting
        await client.create_process()


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("nowhere.invalid:1", "nowhere.invalid:1 cannot be found"),
        ("unix:", "unix: cannot be found"),
        ("ipv4:nothing", "ipv4:nothing is no address"),
        (f"/{'x' * 107}", "a UNIX socket has at most 107 bytes"),
    ],
)
async def test_call_says_what_is_wrong_with_its_target_when_nobody_can_be_there(target: str, why: str) -> None:
    """A name without an address, and what is no address, are told from a daemon that does not run."""
    with pytest.raises(hmm_client.UnavailableError, match=why) as caught:
        async with hmm_client.connect(target) as client:
            await client.create_process()
    assert not caught.value.refused
    assert caught.value.target.endswith(target)


@pytest.mark.slow
async def test_call_says_what_is_wrong_with_tls_when_a_daemon_is_there(
    start_daemon: Callable[..., Awaitable[Daemon]],
) -> None:
    """It is there, and so nobody has to start one: a certificate is missing or not trusted, or it speaks no TLS."""
    files = {"tls_certificate": TLS / "server.pem", "tls_key": TLS / "server.key"}
    daemon = await start_daemon(tcp="127.0.0.1:0", **files, tls_client_ca=TLS / "authority.pem")
    ours = (TLS / "client.pem", TLS / "client.key")
    trusting, foreign = tls_credentials(TLS / "authority.pem"), tls_credentials(TLS / "client.pem", *ours)
    for target, credentials, why in (
        (daemon.targets[1], None, "closes the connection: it may want TLS, or another certificate of ours"),
        (daemon.targets[1], trusting, "closes the connection: it may want TLS, or another certificate of ours"),
        (daemon.targets[1], foreign, "is there, but its certificate is not trusted: unable to get local issuer"),
        (daemon.targets[0], trusting, "is there, but speaks no TLS"),
    ):
        async with hmm_client.connect(target, credentials=credentials) as client:
            with pytest.raises(hmm_client.UnavailableError, match=f"{target} {why}") as caught:
                await client.create_process()
        assert not caught.value.refused


async def test_client_has_a_name_when_it_has_other_letters(shared_daemon: Daemon) -> None:
    """Metadata is ASCII: a question mark stands for what is not, as long as a name may be.  A token has no other."""
    async with hmm_client.connect(
        shared_daemon.target, name="\N{LATIN SMALL LETTER U WITH DIAERESIS}\n" * 32
    ) as client:
        process = await client.create_process("\N{LATIN SMALL LETTER U WITH DIAERESIS}\n" * 32)
        mapped = await process.mmap(PAGE_SIZE)
        request = inspection_pb2.GetOperationRequest(operation_id=mapped.operation_id)
        status = await client.channel.request(client.inspection.GetOperation, request)
        assert status.operation.caller == "??" * 32
        await process.exit()
    with pytest.raises(ValueError, match="a token has printable characters"):
        hmm_client.connect(shared_daemon.target, "mine\n")
