"""The socket: for its owner alone, one daemon at a time, stale ones replaced."""

from __future__ import annotations

import socket
import stat
from pathlib import Path
from typing import Any

import pytest

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
