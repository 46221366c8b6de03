"""A driver in another language: JavaScript, from the proto files alone, with no line of ours beneath it."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hmm.units import PAGE_SIZE
from hmm_client import Advice, Process, Prot

if TYPE_CHECKING:
    from tests.conftest import Daemon

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # the first one may have to install packages

HERE = Path(__file__).with_name("javascript")
TIMEOUT_S = 60.0
"""Far more than anything takes; a busy machine is no failure."""
SOON_S = 0.3
FOREVER_S = 600.0


class JavaScriptDriver:
    """The driver as a process: one JSON line for each thing that its device shall do."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._reader: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, daemon: Daemon) -> JavaScriptDriver:
        """Start it, and wait until it has registered its device."""
        process = await asyncio.create_subprocess_exec(
            *("node", HERE / "driver.js"),
            env=os.environ | {"HMMD_SOCKET": str(daemon.socket)},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        driver = cls(process)
        assert process.stdout is not None
        first = await asyncio.wait_for(process.stdout.readline(), TIMEOUT_S)
        assert json.loads(first)["ready"]["device"] > 0
        driver._reader = asyncio.create_task(driver._read(process.stdout))
        return driver

    async def _read(self, stdout: asyncio.StreamReader) -> None:
        while line := await stdout.readline():
            reply = json.loads(line)
            self._waiting.pop(reply["id"]).set_result(reply)

    async def ask(self, op: str, **arguments: object) -> dict[str, Any]:
        """Make one operation.  Returns: its answer, `result` or `error`."""
        assert self.process.stdin is not None
        number = next(self._numbers)
        reply = self._waiting[number] = asyncio.get_running_loop().create_future()
        self.process.stdin.write(json.dumps({"id": number, "op": op} | arguments).encode() + b"\n")
        answer: dict[str, Any] = await asyncio.wait_for(reply, TIMEOUT_S)
        return answer

    async def result(self, op: str, **arguments: object) -> Any:
        """Make one operation that must succeed."""
        answer = await self.ask(op, **arguments)
        assert "error" not in answer, answer
        return answer["result"]

    async def read(self, process: Process, address: int, length: int) -> bytes:
        """Let the device read memory."""
        return base64.b64decode((await self.result("read", process=process.id, address=address, length=length))["data"])

    async def write(self, process: Process, address: int, data: bytes) -> None:
        """Let the device write memory."""
        await self.result("write", process=process.id, address=address, data=base64.b64encode(data).decode())

    async def heard(self) -> list[str]:
        """Types of the events that it has heard."""
        return [event["type"] for event in (await self.result("state"))["heard"]]

    async def leave(self) -> int:
        """End its standard input, as a user who is done with it; its exit code."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return await asyncio.wait_for(self.process.wait(), TIMEOUT_S)

    async def stop(self) -> None:
        """End it, however it is."""
        if self._reader is not None:
            self._reader.cancel()
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


@pytest.fixture
async def start_javascript(packages: None) -> AsyncIterator[Callable[..., Awaitable[JavaScriptDriver]]]:
    """Starts the driver: `await start_javascript(daemon)`."""
    drivers: list[JavaScriptDriver] = []

    async def start(daemon: Daemon) -> JavaScriptDriver:
        drivers.append(await JavaScriptDriver.start(daemon))
        return drivers[-1]

    yield start
    for driver in drivers:
        await driver.stop()


Start = Callable[..., Awaitable[JavaScriptDriver]]


async def test_driver_sees_what_the_cpu_sees_when_it_faults_and_is_invalidated(
    daemon: Daemon, start_javascript: Start
) -> None:
    """Mirror, fault, write, be told of mprotect, discard, fork and munmap, acknowledge, fault again."""
    driver = await start_javascript(daemon)
    process = await daemon.connect("program").create_process("program")
    mapped = await process.mmap(8 * PAGE_SIZE)
    await process.write(mapped.address, b"from the CPU")
    await driver.result("mirror", process=process.id)
    assert await driver.read(process, mapped.address, 12) == b"from the CPU"
    await driver.write(process, mapped.address + PAGE_SIZE - 4, b"from the device")
    assert await process.read(mapped.address + PAGE_SIZE - 4, 15) == b"from the device"

    await process.madvise(mapped.address, PAGE_SIZE, Advice.DONTNEED)
    assert await driver.read(process, mapped.address, 4) == bytes(4)
    child = await process.fork()
    await driver.write(process, mapped.address + PAGE_SIZE, b"parent")
    assert await child.read(mapped.address + PAGE_SIZE, 6) == b" the d"
    await process.mprotect(mapped.address, PAGE_SIZE, Prot.READ)
    refused = await driver.ask("write", process=process.id, address=mapped.address, data="AAAA")
    assert refused["error"]["errno"] == "EACCES"
    await process.munmap(mapped.address, 8 * PAGE_SIZE)
    refused = await driver.ask("read", process=process.id, address=mapped.address, length=1)
    assert refused["error"]["errno"] == "EFAULT"
    # Forking tells of the fault's copy-on-write too: the write after it finds its page shared.
    assert await driver.heard() == ["MIGRATE", "FORK", "MIGRATE", "WRITE_PROTECT", "MUNMAP"]


async def test_driver_is_told_of_the_end_when_the_process_exits(daemon: Daemon, start_javascript: Start) -> None:
    """2015: MUNMAP of everything, then release; the mirror can be unregistered, and the driver leaves with code 0."""
    driver = await start_javascript(daemon)
    process = await daemon.connect("program").create_process("program")
    mapped = await process.mmap(2 * PAGE_SIZE)
    await driver.result("mirror", process=process.id)
    await driver.write(process, mapped.address, b"x")
    await process.exit()
    assert await driver.heard() == ["MUNMAP", "RELEASE"]
    await driver.result("unmirror", process=process.id)
    assert (await driver.result("state"))["rejected"] == []
    assert await driver.leave() == 0


async def test_driver_learns_that_it_was_fenced_when_it_was_stopped(
    start_daemon: Callable[..., Awaitable[Daemon]], start_javascript: Start
) -> None:
    """SIGSTOP beyond the deadline: munmap names the mirror, and the driver's next access ends with ENODEV."""
    daemon = await start_daemon(acknowledgement_s=SOON_S)
    driver = await start_javascript(daemon)
    process = await daemon.connect("program").create_process("program")
    mapped = await process.mmap(2 * PAGE_SIZE)
    mirror = (await driver.result("mirror", process=process.id))["mirror"]
    await driver.write(process, mapped.address, b"x")
    driver.process.send_signal(signal.SIGSTOP)
    assert (await process.munmap(mapped.address, PAGE_SIZE)).fenced_mirrors == (mirror,)
    driver.process.send_signal(signal.SIGCONT)
    refused = await driver.ask("read", process=process.id, address=mapped.address + PAGE_SIZE, length=1)
    assert refused["error"]["errno"] == "ENODEV"
    assert str(mirror) in (await driver.result("state"))["lost"]


@pytest.mark.parametrize(
    "daemon", [{"acknowledgement_s": FOREVER_S, "fault_s": FOREVER_S}], indirect=True, ids=["patient"]
)
async def test_driver_gets_its_answers_right_when_changes_and_accesses_race(
    daemon: Daemon, start_javascript: Start
) -> None:
    """Reads and writes while pages are discarded beneath them: nothing is refused, no answer is rejected.

    Faults give way to all fifty changes: on a busy machine that takes them longer than they have by default.
    """
    driver = await start_javascript(daemon)
    process = await daemon.connect("program").create_process("program")
    mapped = await process.mmap(16 * PAGE_SIZE)
    await driver.result("mirror", process=process.id)

    async def access(number: int) -> dict[str, Any]:
        address = mapped.address + number % 16 * PAGE_SIZE
        return await driver.ask("write", process=process.id, address=address, data="AAAA")

    async def discard(number: int) -> None:
        await process.madvise(mapped.address + number % 8 * PAGE_SIZE, 8 * PAGE_SIZE, Advice.DONTNEED)

    answers, _ = await asyncio.gather(
        asyncio.gather(*(access(number) for number in range(200))),
        asyncio.gather(*(discard(number) for number in range(50))),
    )
    assert [answer for answer in answers if "error" in answer] == []
    state = await driver.result("state")
    assert (state["rejected"], state["lost"]) == ([], {})
