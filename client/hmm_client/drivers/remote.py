"""A driver in another process, as its applications drive it: the other end of `control.py`.

    async with RemoteDriver.connected("/run/hmmd/dummy.sock") as dummy:
        await dummy.call("expose_mm", device=0, minor=0, process=process.id)

**Invariants**: every call ends: with its result, its error, or ConnectionError when the driver is gone.

**Absent**: what a driver can be asked for (`operations` of each), starting it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from hmm_client.drivers.control import LINE_BYTES, host_and_port


class RemoteError(Exception):
    """An operation of a driver failed.

    Attributes:
        errno: by name, e.g. "EFAULT".
        address: the failing address in bytes, if there is one.
    """

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(f"{error['errno']}: {error['message']}")
        self.errno: str = error["errno"]
        self.address: int | None = error["address"]


class RemoteDriver:
    """One connection to a driver's control socket.  Made by `connected`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count(1)
        self._gone = False

    @classmethod
    @asynccontextmanager
    async def connected(cls, place: str | Path, tls: ssl.SSLContext | None = None) -> AsyncIterator[RemoteDriver]:
        """A connection that is closed with the block.

        Args:
            place: the driver's --control: a path, or HOST:PORT, which takes `control.tls_context`.

        Raises:
            ConnectionError: nobody listens there, or they do not accept each other's certificates.
        """
        try:
            if tcp := host_and_port(place):
                reader, writer = await asyncio.open_connection(*tcp, ssl=tls, limit=LINE_BYTES)
            else:
                reader, writer = await asyncio.open_unix_connection(place, limit=LINE_BYTES)
        except OSError as error:
            raise ConnectionError(f"{place}: {error.strerror or error}") from error
        driver = cls(reader, writer)
        replies = asyncio.create_task(driver._read_replies())
        try:
            yield driver
        finally:
            replies.cancel()
            await asyncio.gather(replies, return_exceptions=True)
            writer.close()

    async def call(self, op: str, **arguments: object) -> Any:
        """Make one operation and wait for its result.

        Raises:
            RemoteError: it failed.
            ConnectionError: the driver went away before it answered.
        """
        if self._gone:
            raise ConnectionResetError(f"{op}: the driver is gone")
        number = next(self._numbers)
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._writer.write(json.dumps({"id": number, "op": op} | arguments).encode() + b"\n")
        try:
            return await future
        finally:
            del self._waiting[number]

    async def _read_replies(self) -> None:
        try:
            while line := await self._reader.readline():
                self._take(json.loads(line))
        except OSError:
            pass  # as good as its end
        finally:
            self._gone = True
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(ConnectionResetError("the driver went away before it answered"))

    def _take(self, reply: dict[str, Any]) -> None:
        future = self._waiting.get(reply["id"])
        if future is None or future.done():
            return  # whoever asked has stopped waiting
        if "error" in reply:
            future.set_exception(RemoteError(reply["error"]))
        else:
            future.set_result(reply["result"])
