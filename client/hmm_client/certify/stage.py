"""Where one trial takes place: processes, the driver that mirrors them, and what must hold between the two.

A check that fails is a finding, and the trial goes on: the shortest way to a second error may lead through the first.

**Invariants**: after `take` the processes are gone, and the driver has been asked to let those go that it mirrors.

**Absent**: what happens (`adversities`, `storm`).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress

from hmm.errors import HmmError, TimedOutError
from hmm.units import PAGE_SIZE, AddressRange
from hmm_client.certify.driver_process import DriverGoneError, DriverProcess, DriverSilentError, RefusalError
from hmm_client.certify.findings import Auditor, Finding, causes_first, of_driver, of_mirror
from hmm_client.channel import DaemonError
from hmm_client.client import Client
from hmm_client.commands.pending import calls_that_wait
from hmm_client.harness import Harness
from hmm_client.process import Process
from hmm_proto.v1 import inspection_pb2

SAYS_S = 5.0
"""How long the daemon may take to say what is pending."""


class Stage:
    """One trial.

    Attributes:
        harness: holds calls, and makes memory run out.
        forgiven: rules whose breaking is the adversity's own doing.
        overtaken: operations that took a page away while the driver's fault of it was under way.
    """

    def __init__(
        self, driver: DriverProcess, client: Client, auditor: Auditor, replace_daemon: Callable[[], Awaitable[Client]]
    ) -> None:
        self.driver = driver
        self.client = client
        self.auditor = auditor
        self.harness = Harness(client)
        self._replace_daemon = replace_daemon
        self.forgiven: set[str] = set()
        self.overtaken: set[int] = set()
        self.findings: list[Finding] = []
        self._processes: list[Process] = []
        self._mirrored: list[Process] = []  # those of them that the driver has to let go

    def find(self, rule: str, detail: str) -> None:
        """Something is wrong."""
        self.findings.append(Finding(rule, detail))

    # ---- processes

    async def process(self, name: str = "victim") -> Process:
        """A new process that the driver mirrors."""
        process = await self.client.create_process(name)
        await self.adopt(process)
        return process

    async def adopt(self, process: Process) -> None:
        """Let the driver mirror a process that was made otherwise.

        Raises:
            RefusalError: it does not.  That is a finding, and the trial is over: nothing it could show has a cause
                of its own.
        """
        self._processes.append(process)
        try:
            await self.driver.mirror(process.id)
        except RefusalError as error:
            self.find("access-failed", f"it does not mirror {process!r}: {error}")
            raise
        self._mirrored.append(process)

    def keep(self, process: Process) -> None:
        """This process is mirrored: it has to be let go of in the end."""
        self._processes.append(process)
        self._mirrored.append(process)

    async def region(self, process: Process, pages: int) -> AddressRange:
        """Anonymous memory in which every page begins with its own number."""
        span = (await process.mmap(pages * PAGE_SIZE)).span
        for index in range(pages):
            await process.write(span.start + index * PAGE_SIZE, stamp(index))
        return span

    # ---- what must hold

    async def device_reads(self, process: Process, address: int, expected: bytes) -> None:
        """The device has to see these bytes."""
        try:
            seen = await self.driver.read(process.id, address, len(expected))
        except RefusalError as error:
            self.find("access-failed", f"reading {address:#x}, which is mapped: {error}")
        else:
            if seen != expected:
                self.find("wrong-data", f"at {address:#x} the device reads {seen.hex()}, the CPU {expected.hex()}")

    async def device_writes(self, process: Process, address: int, data: bytes) -> None:
        """The device has to be able to write these bytes, and the CPU has to see them."""
        try:
            await self.driver.write(process.id, address, data)
        except RefusalError as error:
            self.find("access-failed", f"writing {address:#x}, which is writable: {error}")
        else:
            await self.cpu_reads(process, address, data)

    async def cpu_reads(self, process: Process, address: int, expected: bytes) -> None:
        """The CPU has to see these bytes."""
        seen = await process.read(address, len(expected))
        if seen != expected:
            self.find("wrong-data", f"at {address:#x} the CPU reads {seen.hex()}, not the device's {expected.hex()}")

    async def device_cannot(self, process: Process, address: int, *, write: bool = False) -> None:
        """The device must not be able to access this byte."""
        try:
            if write:
                await self.driver.write(process.id, address, b"\xee")
            else:
                await self.driver.read(process.id, address, 1)
        except RefusalError:
            return
        self.find("access-succeeded", f"{'writing' if write else 'reading'} {address:#x} is not permitted")

    async def device_may(self, process: Process, address: int, *, write: bool) -> None:
        """The device accesses something that may or may not be there: whatever comes of it is right."""
        try:
            if write:
                await self.driver.write(process.id, address, stamp(address))
            else:
                await self.driver.read(process.id, address, 8)
        except RefusalError:
            pass

    async def device_migrates(self, process: Process, span: AddressRange, *, may_fail: bool = False) -> None:
        """The device has to be able to move pages of this range to its memory; how many it does is its own business.

        Raises:
            RefusalError: it has answered and not finalized.  That is a finding, and the trial is over: the driver is
                killed, since whoever touches the pages would wait for it.
        """
        try:
            await self.driver.migrate(process.id, span.start, span.end)
        except RefusalError as error:
            if not may_fail:
                self.find("access-failed", f"migrating {span}, which is mapped: {error}")
        for held in await self.auditor.unfinalized(span):
            self.find("unfinalized", f"migration {held.migration_id} of {span} goes on after its order was answered")
            self.forgiven.add("died")
            await self.driver.kill()
            raise RefusalError(f"migration {held.migration_id} is not finalized")

    # ---- the end

    async def take(self, run: Callable[[Stage], Awaitable[None]]) -> None:
        """Let it happen; then end the processes, let the driver let go of them, and look at what is left.

        Raises:
            HmmError, DaemonError: a question was refused, or the daemon is gone.
        """
        try:
            with suppress(RefusalError):  # see `adopt`, `device_migrates`
                await run(self)
        except TimedOutError as error:
            self.find("unanswered", str(error))  # a mirror whose policy is FAIL
        except HmmError as error:
            self.find("unfinished", f"a call of the trial failed: {error}")
        except (DriverGoneError, DriverSilentError) as error:
            self.failed(error)
        try:
            await self._finish()
        except (DriverGoneError, DriverSilentError) as error:
            self.failed(error)
        self.findings += await self.auditor.reported(self.overtaken)

    async def give_up(self, after_s: float) -> None:
        """It takes too long: find out who waits for whom, of whoever says so in time."""
        rule, lines = "unfinished", [f"still under way after {after_s:g} s"]
        try:
            async with asyncio.timeout(SAYS_S):
                self.findings += await self.auditor.reported(self.overtaken)
                pending = await self.auditor.pending()
        except (TimeoutError, DaemonError) as error:
            why = str(error) or f"it has not answered within {SAYS_S:g} s"
            lines.append(f"hmmd does not say what is pending: {why}")
        else:
            lines += calls_that_wait(pending)
            rule = "unanswered" if _is_owed(pending) else rule
        lines += [f"the driver has not answered {order}" for order in self.driver.unanswered]
        self.find(rule, "\n".join(lines))

    @property
    def verdict(self) -> tuple[Finding, ...]:
        """What was wrong."""
        return causes_first(finding for finding in self.findings if finding.rule not in self.forgiven)

    def failed(self, error: DriverGoneError | DriverSilentError) -> None:
        """The driver is gone, or does not answer."""
        self.findings.append(of_driver(error))

    async def _finish(self) -> None:
        spaces = await self.auditor.spaces(process.id for process in self._processes)
        for status in await self.auditor.mirrors(spaces):
            self.findings += of_mirror(status, alive=True)
        for process in self._processes:
            await self._exit(process)
        for status in await self.auditor.mirrors(spaces):
            self.findings += of_mirror(status, alive=False)
        for process in self._mirrored:
            try:
                await self.driver.unmirror(process.id)
            except RefusalError as error:
                self.find("leaked-mirror", f"it does not let go of {process!r}: {error}")
        for status in await self.auditor.mirrors(spaces):
            if status.state != "lost":
                self.find("leaked-mirror", f"mirror {status.mirror_id} is still registered after unmirror")

    async def _exit(self, process: Process) -> None:
        with suppress(HmmError):  # the adversity may have ended it
            await process.exit()

    async def kill_daemon(self) -> None:
        """End the daemon at once; another one takes its place, with nothing of this one's processes."""
        self.findings += await self.auditor.reported()
        self._processes.clear()
        self._mirrored.clear()
        await self.client.close()
        self.client = await self._replace_daemon()
        self.auditor = Auditor(self.client)
        self.harness = Harness(self.client)


def stamp(number: int) -> bytes:
    """Eight bytes that tell numbers apart and are never all zeroes."""
    return (number & 0xFFFF_FFFF).to_bytes(4, "little") + b"hmm!"


def _is_owed(pending: inspection_pb2.GetPendingResponse) -> bool:
    """Whether a driver owes an answer for which it has no deadline: that of a mirror whose policy is BLOCK."""
    events = [event for operation in pending.operations for event in operation.events]
    return any(event.driver_pid != os.getpid() and not event.HasField("deadline_ms") for event in events)
