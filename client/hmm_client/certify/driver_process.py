"""The driver that is certified, as a process: what it is asked, one JSON line each, and how it ends.

**Invariants**: whatever it prints, an order is answered, or fails with one of the errors below; of a line at most
LINE_BYTES are kept.  It leads a process group, so that what it has started itself ends with it: a shell's child, say.

**Absent**: what it is asked when (`adversities`), what its answers mean (`findings`).
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

START_S = 30.0
"""How long it may take to say that it is ready."""
SHOWN_CHARACTERS = 80
"""How much is shown of what is no answer."""
ANSWER_S = 20.0
"""How long it may take to answer one line; longer than any deadline of the daemon's."""
LEAVE_S = 10.0
"""How long it may take to leave when its standard input has ended."""
LINE_BYTES = 16 << 20
"""How long a line may be: what is longer is not read."""


class DriverGoneError(Exception):
    """The process has ended, or never began."""


class DriverSilentError(Exception):
    """It does not answer, or what it says is no answer."""


class RefusalError(Exception):
    """It answered with an error: the access is not possible."""


@dataclass(frozen=True, slots=True)
class _Order:
    """What it was told to do, and the answer to come."""

    what: str
    answer: asyncio.Future[dict[str, Any]]
    since: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        return f"{self.what}, for {time.monotonic() - self.since:.1f} s"


class DriverProcess:
    """A running driver.  Made by `start`.

    Attributes:
        offers: the orders that it takes, as far as it has said.
    """

    def __init__(self, process: asyncio.subprocess.Process, answer_s: float = ANSWER_S) -> None:
        self._process = process
        self._answer_s = answer_s
        self._numbers = itertools.count(1)
        self._waiting: dict[int, _Order] = {}
        self.offers: frozenset[str] = frozenset()
        self._instead = ""  # what it printed that is no answer, for messages
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, command: Sequence[str], socket: str, answer_s: float = ANSWER_S) -> DriverProcess:
        """Start it, and wait until it says that it is ready.

        Args:
            answer_s: how long it may take to answer a line.

        Raises:
            DriverGoneError: there is no such command, or it ended.
            DriverSilentError: it is not ready in time.
        """
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HMM")}
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                env=environment | {"HMMD_SOCKET": socket},
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=LINE_BYTES,
                start_new_session=True,
            )
        except OSError as error:
            raise DriverGoneError(f"it cannot be started: {error.strerror}") from error
        driver = cls(process, answer_s)
        try:
            async with asyncio.timeout(START_S):
                await driver._ready
        except TimeoutError:
            await driver.kill()
            instead = driver._instead or ", nor anything else (does it flush?)"
            raise DriverSilentError(f'it did not print {{"ready": {{}}}} within {START_S:g} s{instead}') from None
        except asyncio.CancelledError:
            await driver.kill()  # it is a process: nobody else would end it
            raise
        return driver

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        return self._process.returncode is not None

    @property
    def unanswered(self) -> list[str]:
        """The orders that it has not answered, and for how long, the oldest first."""
        return [str(order) for order in self._waiting.values()]

    # ---- what it can be asked

    async def mirror(self, process_id: int) -> None:
        """Mirror a process."""
        await self._ask("mirror", process=process_id)

    async def unmirror(self, process_id: int) -> None:
        """Mirror it no more."""
        await self._ask("unmirror", process=process_id)

    async def read(self, process_id: int, address: int, length: int) -> bytes:
        """Let the device read.  Raises: RefusalError."""
        result = await self._ask("read", process=process_id, address=address, length=length)
        data = result.get("data")
        try:
            return base64.b64decode(data)  # type: ignore[arg-type]  # whatever it is
        except (TypeError, ValueError):
            raise DriverSilentError(f"it answered 'read' without bytes in base64: {_shown(data)}") from None

    async def write(self, process_id: int, address: int, data: bytes) -> None:
        """Let the device write.  Raises: RefusalError."""
        await self._ask("write", process=process_id, address=address, data=base64.b64encode(data).decode())

    async def migrate(self, process_id: int, start: int, end: int) -> None:
        """Let it move pages to the memory of its device, step by step.  Raises: RefusalError."""
        await self._ask("migrate", process=process_id, start=start, end=end)

    async def _ask(self, op: str, **arguments: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        if self._reader.done():
            raise DriverGoneError(self._how_it_ended())
        number = next(self._numbers)
        what = f"{op} of process {arguments['process']}"
        order = self._waiting[number] = _Order(what, asyncio.get_running_loop().create_future())
        self._process.stdin.write(json.dumps({"id": number, "op": op} | arguments).encode() + b"\n")
        try:
            async with asyncio.timeout(self._answer_s):
                reply = await order.answer
        except TimeoutError:
            raise DriverSilentError(f"it has not answered {op!r} within {self._answer_s:g} s{self._instead}") from None
        finally:
            self._waiting.pop(number, None)
        if "error" in reply:
            error = reply["error"]
            raise RefusalError(f"{error.get('errno')}: {error.get('message')}" if isinstance(error, dict) else error)
        result = reply.get("result")
        return result if isinstance(result, dict) else {}

    async def _read(self) -> None:
        async for line in self._lines():
            reply = _object(line)
            if reply is None:
                self._instead = f"; it printed {_shown(line.decode(errors='replace').strip())}"
                continue
            if "ready" in reply and not self._ready.done():
                self.offers = _orders(reply["ready"])
                self._ready.set_result(None)
            number = reply.get("id")
            order = self._waiting.get(number) if isinstance(number, int) else None
            if order is not None and not order.answer.done():
                order.answer.set_result(reply)
        await self._process.wait()
        gone = DriverGoneError(self._how_it_ended())
        futures: list[asyncio.Future[Any]] = [self._ready, *(order.answer for order in self._waiting.values())]
        for future in futures:
            if not future.done():
                future.set_exception(gone)
                future.exception()  # whoever waits gets it; nobody else has to

    async def _lines(self) -> AsyncIterator[bytes]:
        """Its lines, but for those that are too long, which are left out."""
        assert self._process.stdout is not None
        rest = False  # of a line that is too long
        while True:
            try:
                line = await self._process.stdout.readuntil(b"\n")
            except asyncio.IncompleteReadError as end:
                if end.partial and not rest:
                    yield end.partial
                return
            except asyncio.LimitOverrunError as overrun:
                await self._process.stdout.readexactly(overrun.consumed)
                self._instead = f"; it printed a line of over {LINE_BYTES >> 20} MiB, which is not read"
                rest = True
                continue
            if not rest:
                yield line
            rest = False

    def _how_it_ended(self) -> str:
        code = self._process.returncode
        if code is not None and code < 0:
            return f"it was killed by {signal.Signals(-code).name}"
        return f"it ended with exit code {code}"

    # ---- how it ends

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, to what it has started as well."""
        if not self._reader.done():  # somebody is there, or nobody else can have the number
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    async def wait(self, seconds: float) -> bool:
        """Wait for its end.  Returns: whether it has ended."""
        await asyncio.wait({self._reader}, timeout=seconds)
        return self._reader.done()

    async def leave(self) -> bool:
        """End its standard input and wait.  Returns: whether it left by itself, with exit code 0."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        if not await self.wait(LEAVE_S):
            await self.kill()
            return False
        return self._process.returncode == 0

    async def kill(self) -> None:
        """End it, however it is."""
        self.signal(signal.SIGKILL)
        if not await self.wait(LEAVE_S):  # who has left its group holds its standard output open
            self._reader.cancel()
            await asyncio.wait({self._reader})


def _shown(printed: object) -> str:
    text = repr(printed)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _orders(ready: object) -> frozenset[str]:
    orders = ready.get("orders") if isinstance(ready, dict) else None
    return frozenset(order for order in orders if isinstance(order, str)) if isinstance(orders, list) else frozenset()


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        reply = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return reply if isinstance(reply, dict) else None
