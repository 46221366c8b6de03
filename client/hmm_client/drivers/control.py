"""How another process tells a driver process what its device shall do: JSON lines on a socket.

A driver in the kernel has ioctls; these have lines, on a socket or, for `hmmctl certify`, on standard input.  A request
names an operation and its arguments, the reply comes when it is done, in any order; bytes travel as base64.

    > {"id": 1, "op": "read", "device": 0, "minor": 0, "address": 140737488281600, "size": 4}
    < {"id": 1, "result": {"data": "AAAAAA==", "nsys_pages": 1, "nfaulted_sys_pages": 1, ...}}
    > {"id": 2, "op": "read", "device": 0, "minor": 0, "address": 0, "size": 4}
    < {"id": 2, "error": {"errno": "EFAULT", "message": "nothing is mapped at 0x0", "address": 0}}

A UNIX socket is for its owner alone; over TCP only those are served who show a certificate of the same authority.

**Absent**: what a device can do (each driver's own table of operations); the other end (`remote.py`).
"""

from __future__ import annotations

import asyncio
import base64
import errno as errnos
import inspect
import json
import logging
import os
import reprlib
import signal
import socket
import ssl
import stat
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import click

from hmm.errors import HmmError, InvalidRequestError, NoSuchObjectError, errno_name
from hmm_client.channel import DaemonError, UnavailableError, as_target, default_target
from hmm_client.client import Client
from hmm_client.commands.connection import Where, where_options

T = TypeVar("T")
Operation = Callable[..., Awaitable[Any]]
Device = Callable[[Client], Awaitable[Mapping[str, Operation]]]

LINE_BYTES = 16 << 20
STANDARD_INPUT = "-"
"""Where orders come from instead of a socket."""
RETRY_S = 0.2
"""Between two looks for a daemon."""
_LOG = logging.getLogger(__name__)


def encode(data: bytes) -> str:
    """Bytes as JSON holds them."""
    return base64.b64encode(data).decode()


def decode(text: str) -> bytes:
    """What `encode` made."""
    return base64.b64decode(text, validate=True)


def host_and_port(place: str | Path) -> tuple[str, int] | None:
    """The parts of HOST:PORT; None for a path."""
    host, _, port = str(place).rpartition(":")
    return (host, int(port)) if host and port.isascii() and port.isdecimal() and "/" not in host else None


def tls_context(ca: str | Path, certificate: str | Path, key: str | Path, *, server: bool = False) -> ssl.SSLContext:
    """TLS for a control socket over TCP, where both ends show certificates of one authority.

    Args:
        ca, certificate, key: PEM files: the authority, one's own certificate and its key.
        server: for the driver's end.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH if server else ssl.Purpose.SERVER_AUTH, cafile=ca)
    context.load_cert_chain(certificate, key)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


class Mirrored(dict[int, T]):
    """What a driver has for each process that it was told to mirror; the errors are those of who asks for another."""

    def __missing__(self, process: int) -> T:
        raise NoSuchObjectError(f"process {process} is not mirrored")


class Control:
    """Serves the operations of one driver.

    Args:
        operations: by name; called with the request's other fields as keywords.  Arguments that are annotated as int,
            str or bool are nothing else.
    """

    def __init__(self, operations: Mapping[str, Operation]) -> None:
        self._operations = operations
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    @asynccontextmanager
    async def serving(self, place: str | Path, tls: ssl.SSLContext | None = None) -> AsyncIterator[None]:
        """Serve until the block ends.

        Args:
            place: the path of a UNIX socket, which only its owner can open; or HOST:PORT.
            tls: for HOST:PORT.

        Raises:
            OSError: one cannot listen there.
        """
        server = await self._listen(place, tls)
        try:
            await server.start_serving()
            yield
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for writer in self._connections.values():
                writer.close()
            await asyncio.gather(*self._connections, return_exceptions=True)
            if host_and_port(place) is None:
                _unlink(Path(place))

    async def _listen(self, place: str | Path, tls: ssl.SSLContext | None) -> asyncio.Server:
        if tcp := host_and_port(place):
            return await asyncio.start_server(self._serve, *tcp, ssl=tls, limit=LINE_BYTES, start_serving=False)
        _require_free(Path(place))
        server = await asyncio.start_unix_server(self._serve, place, limit=LINE_BYTES, start_serving=False)
        _make_private(Path(place))
        return server

    async def serve_standard_input(self) -> None:
        """Serve the lines of standard input on standard output, until the former ends."""
        reader = asyncio.StreamReader(limit=LINE_BYTES)
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        await self._take(reader, _say)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection: asyncio.Task[None] | None = asyncio.current_task()
        assert connection is not None
        self._connections[connection] = writer
        try:
            await self._take(reader, writer.write)
        finally:
            writer.close()
            del self._connections[connection]

    async def _take(self, reader: asyncio.StreamReader, say: Callable[[bytes], None]) -> None:
        """Take requests while there are any, and wait until all are answered; one that is too long is the last."""
        async with asyncio.TaskGroup() as under_way:
            try:
                while line := await reader.readline():
                    task = under_way.create_task(self._handle(line, say))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
            except ValueError:  # of readline(): where the next request begins is not known
                say(_reply(None, _error("EINVAL", f"a request is longer than {LINE_BYTES:,} bytes")))
            except OSError:
                pass  # whoever asked is gone

    async def _handle(self, line: bytes, say: Callable[[bytes], None]) -> None:
        request_id = None
        try:
            request = _request(line)
            request_id = request.pop("id", None)
            answer = {"result": await self._operation(request)(**request)}
        except HmmError as error:
            answer = _error(errno_name(error.errno), error.message, error.address)
        except DaemonError as error:
            answer = _error("EIO", str(error))
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            answer = _error("EINVAL", f"{type(error).__name__}: {error}")
        except Exception as error:  # noqa: BLE001 - whoever asked waits for an answer
            _LOG.exception("a request cannot be handled")
            answer = _error("EIO", repr(error))
        with suppress(OSError):  # whoever asked is gone
            say(_reply(request_id, answer))

    def _operation(self, request: dict[str, Any]) -> Operation:
        """Take the operation out of a request, the rest of which are its arguments."""
        name = request.pop("op", None)
        operation = self._operations.get(name) if isinstance(name, str) else None
        if operation is None:
            raise InvalidRequestError(f"there is no operation {_short(name)}; there are {', '.join(self._operations)}")
        signature = inspect.signature(operation)
        try:
            signature.bind(**request)
        except TypeError as error:
            raise InvalidRequestError(f"{name}({', '.join(signature.parameters)}): {error}") from None
        for argument, value in request.items():
            parameter = signature.parameters.get(argument)  # None: the operation takes whatever it is given
            wanted = None if parameter is None else _PLAIN.get(parameter.annotation)
            if wanted is not None and type(value) is not wanted:
                raise InvalidRequestError(f"{name}: {argument} is of type {wanted.__name__}, not {_short(value)}")
        return operation


_PLAIN: Mapping[object, type] = {kind: kind for kind in (bool, int, str)} | {"bool": bool, "int": int, "str": str}
"""Annotations that mean what JSON has; they are strings where a module postpones them."""
_short = reprlib.repr


def _request(line: bytes) -> dict[str, Any]:
    try:
        request = json.loads(line)
    except ValueError as error:
        raise InvalidRequestError(f"a request is one line of JSON: {error}") from None
    if not isinstance(request, dict):
        raise InvalidRequestError(f"a request is a JSON object, not {_short(request)}")
    return request


def _error(errno: str, message: str, address: int | None = None) -> dict[str, Any]:
    return {"error": {"errno": errno, "message": message, "address": address}}


def _reply(request_id: object, answer: Mapping[str, Any]) -> bytes:
    return json.dumps({"id": request_id, **answer}).encode() + b"\n"


def _help(make: Device) -> str:
    # The head of the module's docstring; what it was learned from is for readers of the code.
    return (sys.modules[make.__module__].__doc__ or "").partition("\n\n**Source**")[0]


def _say(line: bytes) -> None:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)


def _require_free(path: Path) -> None:
    """Remove a socket that nobody serves any more.

    Raises:
        OSError: somebody serves it, or something else is there (EADDRINUSE, EEXIST).
    """
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise FileExistsError(errnos.EEXIST, "there is something, and it is no socket", str(path))
    with socket.socket(socket.AF_UNIX) as probe, suppress(ConnectionRefusedError):
        probe.connect(str(path))
        raise OSError(errnos.EADDRINUSE, os.strerror(errnos.EADDRINUSE), str(path))
    path.unlink()


def _make_private(path: Path) -> None:
    path.chmod(0o600)


def driver_command(name: str, make: Device, certified: Device | None = None) -> click.Command:
    """The command line of a driver process: connect, register, serve until SIGTERM.

    Args:
        name: of the driver, for people and for its control socket.
        make: registers the devices; returns their operations.
        certified: the same with the operations of `hmm_client.certify`; None: it cannot be certified.
    """

    @click.command(help=_help(make), context_settings={"max_content_width": 120})
    @where_options
    @click.option(
        "--control",
        metavar="PLACE",
        help="Where to be told what to do: a UNIX socket's path, or HOST:PORT, which takes --tls-ca, --tls-certificate "
        f"and --tls-key.  [default: {name}.sock beside hmmd's socket]",
    )
    @click.option(
        "--patience",
        type=click.FloatRange(min=0),
        default=0.0,
        show_default=True,
        metavar="SECONDS",
        help="How long to wait, at the start, for an hmmd that does not listen yet.",
    )
    @click.option("--certified", "on_stdin", is_flag=True, help="Take orders of `hmmctl certify` on standard input.")
    def command(where: Where, control: str | None, patience: float, on_stdin: bool) -> None:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
        if on_stdin:
            if certified is None:
                raise click.UsageError(f"{name} cannot be certified")
            sys.exit(asyncio.run(_Process(name, certified, where, patience).run(STANDARD_INPUT, None)))
        target = as_target(where.target) if where.target else default_target()
        place = control or str(Path(target.removeprefix("unix:")).with_name(f"{name}.sock"))
        sys.exit(asyncio.run(_Process(name, make, where, patience).run(place, _control_tls(where, place))))

    return command


def _control_tls(where: Where, place: str) -> ssl.SSLContext | None:
    if host_and_port(place) is None:
        return None
    if not (where.ca and where.certificate and where.key):
        raise click.UsageError(f"--control {place} takes --tls-ca, --tls-certificate and --tls-key")
    return tls_context(where.ca, where.certificate, where.key, server=True)


class _Process:
    """The life of a driver process: wait for the daemon, register, serve until SIGTERM or the session's end."""

    def __init__(self, name: str, make: Device, where: Where, patience_s: float) -> None:
        self._name = name
        self._make = make
        self._where = where
        self._patience_s = patience_s
        self._stop = asyncio.Event()

    async def run(self, place: str, tls: ssl.SSLContext | None) -> int:
        """Returns: an exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stop.set)
        began = time.monotonic()
        while not self._stop.is_set():
            try:
                return await self._serve(place, tls)
            except UnavailableError as error:
                if time.monotonic() - began >= self._patience_s:
                    _LOG.error("%s: %s", self._name, error)
                    return 1
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), RETRY_S)
            except TimeoutError:
                _LOG.error("%s: hmmd did not answer within %g s", self._name, self._where.timeout_s)
                return 1
            except (DaemonError, HmmError, OSError) as error:
                _LOG.error("%s: %s", self._name, error)
                return 1
        return 0

    async def _serve(self, place: str, tls: ssl.SSLContext | None) -> int:
        async with self._where.connect(name=self._name) as client:
            async with asyncio.timeout(self._where.timeout_s):
                operations = await self._make(client)
            control = Control(operations)
            if place == STANDARD_INPUT:
                _say(json.dumps({"ready": {"orders": list(operations)}}).encode() + b"\n")
                return await self._until(client, control.serve_standard_input())
            async with control.serving(place, tls):
                click.echo("ready")
                return await self._until(client)

    async def _until(self, client: Client, *ends: Coroutine[Any, Any, object]) -> int:
        session = await client.session()
        await self._first(session.wait_lost(), self._stop.wait(), *ends)
        if session.lost:
            _LOG.error("the session has ended: %s", session.lost)
            return 1
        return 0

    async def _first(self, *waits: Coroutine[Any, Any, object]) -> None:
        tasks = [asyncio.create_task(wait) for wait in waits]
        ended, going_on = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in going_on:
            task.cancel()
        await asyncio.gather(*going_on, return_exceptions=True)
        for task in ended:
            task.result()
