"""A scenario's driver that is a process of its own: it takes orders, and can be killed, stopped and let go on.

**Source**: what `hmm_client.certify` asks of a driver.

**Invariants**: it has ended when the scenario has.

**Absent**: what it does with its events; scripts are for drivers of the scenario's own (`driver.py`).
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Awaitable, Sequence
from typing import Self, TypeVar

from hmm.errors import InvalidRequestError
from hmm_client.certify.driver_process import DriverGoneError, DriverProcess, DriverSilentError, RefusalError
from hmm_client.client import Client
from hmm_client.process import Process
from hmm_proto.v1 import inspection_pb2

T = TypeVar("T")
ANSWER_S = 60.0
"""How long an order may take; steps say themselves how long they wait."""


class ProgramError(Exception):
    """What it was asked for ended with an error.

    Attributes:
        errno: by name; "gone" when the program has ended.
        message: what it says.
    """

    def __init__(self, errno: str, message: str = "") -> None:
        super().__init__(errno)
        self.errno = errno
        self.message = message


class Program:
    """A running driver.  Made by `start`.

    Attributes:
        ids: of the mirrors that it has made.
    """

    def __init__(self, process: DriverProcess, client: Client) -> None:
        self.ids: set[int] = set()
        self._process = process
        self._client = client

    @classmethod
    async def start(cls, command: Sequence[str], client: Client) -> Self:
        """Start it, and wait until it says that it is ready.

        Raises:
            InvalidRequestError: it does not start.
        """
        first, *rest = command
        started = [sys.executable if first == "python" else first, *rest]
        try:
            process = await DriverProcess.start(started, client.channel.target, ANSWER_S)
        except (DriverGoneError, DriverSilentError) as error:
            raise InvalidRequestError(f"{' '.join(command)}: {error}") from None
        return cls(process, client)

    async def mirror(self, process: Process) -> None:
        """Let it mirror a process."""
        await _answer(self._process.mirror(process.id))
        answer = await self._client.channel.request(
            self._client.inspection.ListDevices, inspection_pb2.ListDevicesRequest()
        )
        mirrors = [mirror for device in answer.devices for mirror in device.mirrors]
        self.ids |= {mirror.mirror_id for mirror in mirrors if mirror.driver_pid == self._process.pid}

    async def unmirror(self, process: Process) -> None:
        """Let it mirror a process no more."""
        await _answer(self._process.unmirror(process.id))

    async def read(self, process: Process, address: int, length: int) -> bytes:
        """Let its device read."""
        return await _answer(self._process.read(process.id, address, length))

    async def write(self, process: Process, address: int, data: bytes) -> None:
        """Let its device write."""
        await _answer(self._process.write(process.id, address, data))

    async def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        await self._process.kill()

    async def stop(self) -> None:
        """SIGSTOP: it hears nothing and answers nothing, until `go_on`."""
        self._process.signal(signal.SIGSTOP)

    async def go_on(self) -> None:
        """SIGCONT."""
        self._process.signal(signal.SIGCONT)

    async def end(self) -> None:
        """End its standard input: it leaves in good order.

        Raises:
            ProgramError: it did not.
        """
        if not await self._process.leave():
            raise ProgramError("gone", "it did not leave with exit code 0")


async def _answer(order: Awaitable[T]) -> T:
    try:
        return await order
    except RefusalError as error:
        errno, _, message = str(error).partition(": ")
        raise ProgramError(errno, message) from None
    except (DriverGoneError, DriverSilentError) as error:
        raise ProgramError("gone", str(error)) from None
