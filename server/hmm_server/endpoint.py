"""Where the daemon listens: a UNIX socket for its owner alone, and TCP with TLS.

The socket lies in a directory of mode 0700 and has mode 0600.  A lock beside it, held as long as the daemon lives,
says that it lives: a socket without one is stale and is replaced, unless somebody listens there.

**Source**: gRPC's local credentials do not look at the peer (grpc/grpc#28755), so the file mode is the access control.

**Absent**: tokens (callers.py).
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import grpc.aio

from hmm_server.config import Config, ConfigError

SOCKET_PATH_BYTES_MAX = 107
"""sun_path of sockaddr_un, without its final zero."""


class EndpointError(Exception):
    """The daemon cannot listen where it was told to; says why."""


class UnusablePlaceError(EndpointError):
    """The socket's directory cannot be used."""


@contextmanager
def claimed(path: Path) -> Iterator[Path]:
    """A place for the daemon's socket, claimed until the end of the block, when the socket is removed.

    Raises:
        EndpointError: another daemon lives there; UnusablePlaceError: the directory cannot be used.
    """
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
        raise EndpointError(f"{path}: a socket's path has at most {SOCKET_PATH_BYTES_MAX} bytes")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UnusablePlaceError(f"{path}: {error.strerror}: {error.filename}") from error
    try:
        _lock(lock, path)
        remove_stale(path)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(lock)


def _lock(lock: int, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise EndpointError(f"{path}: another hmmd serves it") from None


def remove_stale(path: Path) -> None:
    """Remove a socket that nobody serves any more.

    Raises:
        EndpointError: something else is there, or somebody serves it who is no hmmd.
    """
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise EndpointError(f"{path}: there is something, and it is no socket")
    if _is_served(path):
        raise EndpointError(f"{path}: somebody else serves it")
    path.unlink()


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        return probe.connect_ex(str(path)) in (0, errno.EAGAIN)  # EAGAIN: its queue is full


def listen(server: grpc.aio.Server, config: Config, path: Path) -> list[str]:
    """Bind the server's ports.

    Returns: gRPC targets for clients, the UNIX socket first.

    Raises:
        EndpointError: a port is taken, or a certificate cannot be used.
    """
    targets = [_listen_unix(server, path)]
    if config.tcp:
        targets.append(_listen_tcp(server, config))
    return targets


def _listen_unix(server: grpc.aio.Server, path: Path) -> str:
    target = f"unix:{path}"
    mask = os.umask(0o177)
    try:
        server.add_insecure_port(target)
    except RuntimeError as error:
        raise EndpointError(f"{target}: {error}") from error
    finally:
        os.umask(mask)
    return target


def _listen_tcp(server: grpc.aio.Server, config: Config) -> str:
    return _bind(server, config.tcp, _credentials(config) if config.tls_certificate else None)


def listen_for_health(server: grpc.aio.Server, config: Config) -> str:
    """Bind the port of a server that has the health service alone.

    Returns: its HOST:PORT.

    Raises:
        EndpointError: the port is taken.
    """
    return _bind(server, config.health_tcp, None)


def _bind(server: grpc.aio.Server, place: str, credentials: grpc.ServerCredentials | None) -> str:
    host, _, wanted = place.rpartition(":")
    _require_free(place, host.strip("[]"), int(wanted))
    try:
        port = server.add_secure_port(place, credentials) if credentials else server.add_insecure_port(place)
    except RuntimeError as error:
        raise EndpointError(f"{place}: {error}") from error
    return f"{host}:{port}"


def _require_free(place: str, host: str, port: int) -> None:
    # gRPC only says that it failed; why is found out here.
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except UnicodeError as error:
        raise EndpointError(f"{place}: {host!r} is no name of a host") from error
    except OSError as error:
        raise EndpointError(f"{place}: {error.strerror}") from error


def _credentials(config: Config) -> grpc.ServerCredentials:
    try:
        key, certificate = Path(config.tls_key).read_bytes(), Path(config.tls_certificate).read_bytes()
        authority = Path(config.tls_client_ca).read_bytes() if config.tls_client_ca else None
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from error
    _require_usable(config)
    return grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=authority is not None)


def _require_usable(config: Config) -> None:
    # gRPC only says that it failed to bind.
    import ssl  # noqa: PLC0415 - few serve TCP

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(config.tls_certificate, config.tls_key, password="")
    except ssl.SSLError as error:
        wrong = f"{config.tls_certificate} is no certificate in PEM, or {config.tls_key} is not its key, or encrypted"
        raise ConfigError(f"tls_certificate: {wrong}") from error
    try:
        if config.tls_client_ca:
            context.load_verify_locations(config.tls_client_ca)
    except ssl.SSLError as error:
        raise ConfigError(f"tls_client_ca: {config.tls_client_ca} holds no certificates in PEM") from error
