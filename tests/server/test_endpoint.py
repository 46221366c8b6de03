"""The socket: for its owner alone, one daemon at a time, stale ones replaced."""

from __future__ import annotations

import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from hmm_server.callers import Tokens
from hmm_server.config import Config, ConfigError
from hmm_server.daemon import Daemon
from hmm_server.endpoint import EndpointError, claimed


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short path: a socket's has at most 107 bytes."""
    return tmp_path_factory.mktemp("e") / "new" / "s"


async def test_socket_is_for_its_owner_alone(place: Path) -> None:
    """The directory is made with mode 0700, the socket with 0600; the socket goes with the daemon."""
    async with Daemon(Config()).serving(place):
        assert _modes(place.parent) == {".": 0o700, "s": 0o600, "s.lock": 0o600}
    assert _modes(place.parent) == {".": 0o700, "s.lock": 0o600}


def _modes(directory: Path) -> dict[str, int]:
    return {
        str(path.relative_to(directory)): stat.S_IMODE(path.stat().st_mode)
        for path in (directory, *directory.iterdir())
    }


def test_claim_is_refused_when_another_daemon_lives(place: Path) -> None:
    """Two daemons cannot serve one socket; when the first has ended the second can."""
    with claimed(place), pytest.raises(EndpointError, match="another hmmd serves it"), claimed(place):
        pass
    with claimed(place) as path:
        assert path == place


def test_stale_socket_is_replaced(place: Path) -> None:
    """A socket that a killed daemon left behind is in nobody's way."""
    place.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(place))
    assert place.exists()
    with claimed(place):
        assert not place.exists()


def test_socket_is_removed_when_serving_fails(place: Path) -> None:
    """A daemon that cannot serve its TCP port leaves no socket behind that nobody listens on."""

    def fail(path: Path) -> None:
        path.touch()
        raise EndpointError("the port is taken")

    with pytest.raises(EndpointError, match="taken"), claimed(place) as path:
        fail(path)
    assert not place.exists()


def test_claim_is_refused_when_something_else_is_there(place: Path) -> None:
    """A file that is no socket is not thrown away."""
    place.parent.mkdir()
    place.write_text("precious")
    with pytest.raises(EndpointError, match="no socket"), claimed(place):
        pass
    assert place.read_text() == "precious"


def test_claim_is_refused_when_somebody_else_serves_it(place: Path) -> None:
    """A socket that another program listens on is not taken from it."""
    place.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(place))
        other.listen()
        with pytest.raises(EndpointError, match="somebody else serves it"), claimed(place):
            pass
        assert place.is_socket()


@pytest.mark.parametrize(
    ("path", "message"), [(Path("/proc/none/s"), "/proc/none"), (Path("/" + "x" * 107), "at most 107 bytes")]
)
def test_claim_is_refused_when_the_place_cannot_be_used(path: Path, message: str) -> None:
    """The error says which part of the path is at fault."""
    with pytest.raises(EndpointError, match=message), claimed(path):
        pass


async def test_tcp_is_served_beside_the_socket(place: Path) -> None:
    """Port 0 becomes a free port, which the daemon tells; a port that is taken is an error."""
    async with Daemon(Config(tcp="127.0.0.1:0", tcp_plaintext=True)).serving(place) as daemon:
        unix, tcp = daemon.targets
        assert unix == f"unix:{place}"
        assert int(tcp.rpartition(":")[2]) > 0
        with pytest.raises(EndpointError, match=r"127\.0\.0\.1"):
            async with Daemon(Config(tcp=tcp, tcp_plaintext=True)).serving(place.with_name("t")):
                pass


async def test_tcp_says_why_when_it_cannot_be_served(place: Path) -> None:
    """The reason is the system's, not the transport's advice to look into its log."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = Config(tcp=f"127.0.0.1:{taken.getsockname()[1]}", tcp_plaintext=True)
        with pytest.raises(EndpointError, match=rf"^{config.tcp}: Address already in use$"):
            async with Daemon(config).serving(place):
                pass


async def test_tcp_is_refused_when_the_host_is_no_name(place: Path) -> None:
    """What cannot be asked for is no different from what is not found."""
    with pytest.raises(EndpointError, match=r"^a\.\.b:80: 'a\.\.b' is no name of a host$"):
        async with Daemon(Config(tcp="a..b:80", tcp_plaintext=True)).serving(place):
            pass


async def test_tls_is_refused_when_files_are_no_certificates(place: Path, tmp_path: Path) -> None:
    """The error names the setting and the file; gRPC would only say that it failed to bind."""
    wrong = tmp_path / "cert.pem"
    wrong.write_text("no certificate")
    config = Config(tcp="127.0.0.1:0", tls_certificate=str(wrong), tls_key=str(wrong))
    with pytest.raises(ConfigError, match=rf"^tls_certificate: {wrong} is no certificate in PEM"):
        async with Daemon(config).serving(place):
            pass


@pytest.mark.parametrize("setting", ["frames", "device_frames", "swap_pages"])
@pytest.mark.parametrize("pages", [1 << 44, 1 << 80])
async def test_memory_is_refused_when_nobody_has_as_much(setting: str, pages: int) -> None:
    """The error says what was asked for, and not what the system's call makes of it."""
    with pytest.raises(ConfigError, match=rf"there is no address space for .*{pages}"):
        Daemon(Config(**{setting: pages}))  # type: ignore[arg-type]


def test_token_file_is_refused_when_it_is_no_text(tmp_path: Path) -> None:
    """The error names the file."""
    tokens = tmp_path / "tokens"
    tokens.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=f"^token_file: {tokens}: "):
        Tokens(str(tokens))


async def test_tls_is_refused_when_files_are_missing(place: Path) -> None:
    """A certificate that is not there is an error of the configuration."""
    config = Config(tcp="127.0.0.1:0", tls_certificate="/none/cert.pem", tls_key="/none/key.pem")
    with pytest.raises(ConfigError, match=r"/none/key\.pem"):
        async with Daemon(config).serving(place):
            pass


async def test_token_file_is_demanded_of_every_call(serve: Any, tmp_path: Path, decode: Any) -> None:
    """With a token file only its tokens are accepted; health checks need none."""
    import grpc  # noqa: PLC0415
    from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: PLC0415

    tokens = tmp_path / "tokens"
    tokens.write_text("one\ntwo\n")
    served = await serve(token_file=str(tokens))
    assert await served.new_process(metadata=(("hmm-token", "two"),)) == 1
    for metadata in ((), (("hmm-token", "three"),)):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.new_process(metadata=metadata)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    health = health_pb2_grpc.HealthStub(served.channel)
    assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(ConfigError, match="token_file"):
        Daemon(Config(token_file="/none"))
