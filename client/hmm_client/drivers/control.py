"""How another process tells a driver process what its device shall do: JSON lines on a socket.

A driver in the kernel has ioctls; these have lines.  A request names an operation and its arguments, the reply comes
when it is done, in any order; bytes travel as base64.

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
import json
import logging
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import click

from hmm.errors import HmmError, errno_name
from hmm_client.channel import DaemonError, as_target, default_target
from hmm_client.client import Client
from hmm_client.commands.connection import Where, where_options

Operation = Callable[..., Awaitable[Any]]
Device = Callable[[Client], Awaitable[Mapping[str, Operation]]]

LINE_BYTES = 16 << 20
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
    return (host, int(port)) if host and port.isdecimal() and "/" not in host else None


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


class Control:
    """Serves the operations of one driver.

    Args:
        operations: by name; called with the request's other fields as keywords.
    """

    def __init__(self, operations: Mapping[str, Operation]) -> None:
        self._operations = operations
        self._tasks: set[asyncio.Task[None]] = set()

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
            if host_and_port(place) is None:
                _unlink(Path(place))

    async def _listen(self, place: str | Path, tls: ssl.SSLContext | None) -> asyncio.Server:
        if tcp := host_and_port(place):
            return await asyncio.start_server(self._serve, *tcp, ssl=tls, limit=LINE_BYTES, start_serving=False)
        _unlink(Path(place))
        server = await asyncio.start_unix_server(self._serve, place, limit=LINE_BYTES, start_serving=False)
        _make_private(Path(place))
        return server

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            task = asyncio.create_task(self._handle(line, writer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        writer.close()

    async def _handle(self, line: bytes, writer: asyncio.StreamWriter) -> None:
        request_id = None
        try:
            request = json.loads(line)
            request_id = request.pop("id", None)
            reply = {"result": await self._operations[request.pop("op")](**request)}
        except HmmError as error:
            reply = {"error": {"errno": errno_name(error.errno), "message": error.message, "address": error.address}}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reply = {"error": {"errno": "EINVAL", "message": repr(error), "address": None}}
        writer.write(json.dumps({"id": request_id} | reply).encode() + b"\n")
        await writer.drain()


def _help(make: Device) -> str:
    # The head of the module's docstring; what it was learned from is for readers of the code.
    return (sys.modules[make.__module__].__doc__ or "").partition("\n\n**Source**")[0]


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)


def _make_private(path: Path) -> None:
    path.chmod(0o600)


def driver_command(name: str, make: Device) -> click.Command:
    """The command line of a driver process: connect, register, serve until SIGTERM.

    Args:
        name: of the driver, for people and for its control socket.
        make: registers the devices; returns their operations.
    """

    @click.command(help=_help(make), context_settings={"max_content_width": 120})
    @where_options
    @click.option(
        "--control",
        metavar="PLACE",
        help="Where to be told what to do: a UNIX socket's path, or HOST:PORT, which takes --tls-ca, --tls-certificate "
        f"and --tls-key.  [default: {name}.sock beside hmmd's socket]",
    )
    def command(where: Where, control: str | None) -> None:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
        target = as_target(where.target) if where.target else default_target()
        place = control or str(Path(target.removeprefix("unix:")).with_name(f"{name}.sock"))
        sys.exit(asyncio.run(_run(name, make, where, place, _control_tls(where, place))))

    return command


def _control_tls(where: Where, place: str) -> ssl.SSLContext | None:
    if host_and_port(place) is None:
        return None
    if not (where.ca and where.certificate and where.key):
        raise click.UsageError(f"--control {place} takes --tls-ca, --tls-certificate and --tls-key")
    return tls_context(where.ca, where.certificate, where.key, server=True)


async def _run(name: str, make: Device, where: Where, place: str, tls: ssl.SSLContext | None) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        async with where.connect(name=name) as client:
            async with asyncio.timeout(where.timeout_s):
                operations = await make(client)
            async with Control(operations).serving(place, tls):
                click.echo("ready")
                return await _wait(client, stop)
    except TimeoutError:
        _LOG.error("%s: hmmd did not answer within %g s", name, where.timeout_s)
    except (DaemonError, HmmError, OSError) as error:
        _LOG.error("%s: %s", name, error)
    return 1


async def _wait(client: Client, stop: asyncio.Event) -> int:
    session = await client.session()
    stopped, ended = asyncio.create_task(stop.wait()), asyncio.create_task(session.wait_lost())
    await asyncio.wait({stopped, ended}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    ended.cancel()
    if session.lost:
        _LOG.error("the session has ended: %s", session.lost)
        return 1
    return 0
