"""Replaying a recorded program on a daemon, call by call, and comparing the layout it ends with.

    async with connect() as client:
        replayed = await replay(Recording.load("recordings/sqlite"), client, devices)
    assert not replayed.differences

Every call is made where the kernel made it take effect: mappings go to the recorded addresses (what the daemon would
have chosen is counted apart), and a call must end as it did, with the same errno.  The first process is compared with
its recorded last layout; children are processes of their own, whose layout is not known behind an exec.

**Source**: the steps of `hmm_client.recordings`; Linux mm/mmap.c for what a call means.

**Invariants**: a step of a process whose layout is known either ends as recorded or is a difference.

**Absent**: devices (`replay_devices`); tables and progress (`hmm_client.commands.replay`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from hmm.errors import HmmError, NoSuchObjectError, errno_name
from hmm.units import AddressRange, page_up
from hmm.unmapped_area import MapFlag
from hmm_client.client import Client
from hmm_client.file import File
from hmm_client.process import Process
from hmm_client.recordings import (
    FIRST,
    Appear,
    Area,
    Difference,
    Exec,
    Exit,
    Failed,
    Fork,
    Ignored,
    Map,
    ProcessIndex,
    Recording,
    Remap,
    Step,
    Thread,
    ThreadExit,
    Unknown,
    Unmap,
    Vfork,
    canonical,
    compare,
)
from hmm_client.replay_calls import make, reached

GROWTH_BYTES = 8 << 20
"""How far an area grows at most: RLIMIT_STACK, unless a program had another."""


class Devices(Protocol):
    """Whoever mirrors the program."""

    async def attach(self, process: Process) -> None:
        """Mirror a process from now on."""

    async def follow(self, process: Process, span: AddressRange) -> None:
        """The program is here now, or will be with its next call."""

    async def idle(self) -> None:
        """Finish what is under way."""

    async def settle(self) -> None:
        """The program has ended, its memory is still there: finish, check and count."""


@dataclass(frozen=True, slots=True)
class CallDifference:
    """A call that ended otherwise than recorded.

    Attributes:
        line: of the log.
        call: its text.
        expected, found: how it ended there and here.
    """

    line: int
    call: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.call}\n  expected {self.expected}\n     found {self.found}"


@dataclass(slots=True)
class Replayed:
    """What became of a recording.

    Attributes:
        calls: made or, if they change no layout, passed over.
        vmas: of the first process at the end, in canonical form.
        processes: made, threads not counted.
        placed: mappings for which the daemon would have chosen another address than the kernel did.
        layout: where the last layout of the first process differs from the kernel's.
        outcomes: calls that ended otherwise.
        unknown: calls of which it is not known what they do.
    """

    program: str
    calls: int = 0
    vmas: int = 0
    processes: int = 0
    placed: list[str] = field(default_factory=list)
    layout: list[Difference] = field(default_factory=list)
    outcomes: list[CallDifference] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    @property
    def differences(self) -> int:
        """All that differs."""
        return len(self.layout) + len(self.outcomes)


async def replay(
    recording: Recording, client: Client, devices: Devices, advanced: Callable[[int], None] = lambda _: None
) -> Replayed:
    """Replay a recording to its end.

    Args:
        client: the program's side.
        advanced: called with the number of steps taken since the last time.

    Raises:
        RecordingError: the last layout of the first process is not known, so that nothing can be compared.

    Cost: one round trip per call, and what the devices do.
    """
    recording.require_comparable()
    run = _Run(recording, client, devices)
    await run.start()
    for step in recording.plan.steps:
        if run.may_have_ended(step):
            await run.compare()
        await run.take(step)
        advanced(1)
    return await run.finish()


class _DifferenceFoundError(Exception):
    """A call ended otherwise than recorded."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(expected, found)
        self.expected = expected
        self.found = found


class _Run:
    """One replay under way.

    Attributes:
        processes: live processes by their number in the plan.
        threads: live threads by their id in the log, and whose they are.
    """

    def __init__(self, recording: Recording, client: Client, devices: Devices) -> None:
        self._recording = recording
        self._client = client
        self._devices = devices
        self._files: dict[str, File] = {}
        self._made: list[str] = []
        self.processes: dict[ProcessIndex, Process] = {}
        self.threads: dict[int, tuple[ProcessIndex, Process]] = {}
        self._found = False
        self._growing = [AddressRange(area.start, area.end) for area in recording.initial if area.grows_down]
        self.done = Replayed(recording.program)
        started = recording.log.calls[0].name == "execve"  # it made the layout that the replay begins with
        self.done.calls = len(recording.log.calls) - started

    # ---- the beginning and the end

    async def start(self) -> None:
        """The first process, with the layout it began with."""
        recording = self._recording
        for name, size_bytes in recording.file_sizes().items():
            await self._open(name, size_bytes)
        process = await self._client.create_process(
            recording.program,
            mmap_base=recording.mmap_base,
            brk_start=page_up(recording.brk_start or 0),
            low_addresses=True,  # what the program was not allowed to do failed there, and is not repeated
        )
        for area in recording.initial:
            await self._place(process, area)
        await self._add(FIRST, process)
        for area in recording.initial:
            await self._devices.follow(process, AddressRange(area.start, area.end))

    async def finish(self) -> Replayed:
        """End what is still there."""
        if FIRST in self.processes:
            await self._end()
        for index in list(self.processes):
            await self._exit(index)
        for file in self._files.values():
            await file.close()
        for name in self._made:
            with suppress(NoSuchObjectError):  # another replay of the same files may have ended before
                await self._client.unlink_file(name)
        return self.done

    async def _open(self, name: str, size_bytes: int) -> None:
        try:
            file = await self._client.open_file(name)
        except NoSuchObjectError:
            file = await self._client.open_file(name, create=True)
            self._made.append(name)
        self._files[name] = file
        if (await file.status()).size_bytes < size_bytes:
            await file.truncate(size_bytes)

    async def _place(self, process: Process, area: Area) -> None:
        flags = MapFlag.SHARED if area.is_shared else MapFlag.PRIVATE
        if area.grows_down:
            flags |= MapFlag.GROWSDOWN
        file = self._files.get(area.source or "")
        await process.place(area.start, area.end, area.prot, flags, file=file, offset=area.offset if file else 0)

    async def _add(self, index: ProcessIndex, process: Process) -> None:
        self.processes[index] = process
        self.done.processes += 1
        await self._devices.attach(process)

    def may_have_ended(self, step: Step) -> bool:
        """Whether the last layout may have been read before this step, and was not found yet."""
        plan = self._recording.plan
        return (
            not self._found and plan.ending is not None and step.call.end_line > plan.ending and FIRST in self.processes
        )

    async def compare(self) -> None:
        """Compare the layout of the first process with the last one recorded, if it was not that before."""
        if self._found:
            return
        maps = await self.processes[FIRST].maps()
        found = [Area(line.start, line.end, line.permissions, line.offset, line.file_name) for line in maps.lines]
        self.done.layout = compare(self._recording.final, found)
        self.done.vmas = len(canonical(found))
        self._found = not self.done.layout

    async def _end(self) -> None:
        await self._devices.idle()
        await self.compare()  # first: who reads what the program wrote can grow its stack
        await self._devices.settle()

    async def _exit(self, index: ProcessIndex) -> None:
        for pid in [pid for pid, (owner, _) in self.threads.items() if owner == index]:
            await self.threads.pop(pid)[1].exit()
        await self.processes.pop(index).exit()

    # ---- steps

    async def take(self, step: Step) -> None:
        """Take one step; note if it ends otherwise than recorded."""
        try:
            await self._take(step)
        except HmmError as error:
            if not step.partial:
                self._differs(step, "success", str(error))
        except _DifferenceFoundError as difference:
            if not step.partial:
                self._differs(step, difference.expected, difference.found)

    def _differs(self, step: Step, expected: str, found: str) -> None:
        self.done.outcomes.append(CallDifference(step.call.line, step.call.text, expected, found))

    async def _take(self, step: Step) -> None:
        match step:
            case Ignored():
                pass
            case Unknown():
                self.done.unknown.append(f"line {step.call.line}: {step.call.text}")
            case Failed():
                await self._fail(step)
            case Fork() | Vfork() | Appear() | Exec() | Exit():
                await self._live(step)
            case Thread():
                self.threads[step.pid] = step.process, await self.processes[step.process].thread()
            case ThreadExit():
                if step.pid in self.threads:  # the first thread can end before the others; its process goes on
                    await self.threads.pop(step.pid)[1].exit()
            case _:
                await self._call(self.processes[step.process], step)

    async def _live(self, step: Fork | Vfork | Appear | Exec | Exit) -> None:
        """Births, deaths, and changes of the address space."""
        match step:
            case Fork(child=index):
                await self._add(index, await self.processes[step.process].fork())
            case Vfork(child=index):
                await self._add(index, await self.processes[step.process].vfork())
            case Appear(process=index):
                await self._add(index, await self._client.create_process(f"{self.done.program} {index}"))
            case Exec(process=index, program=program, brk_start=brk_start):
                await self.processes[index].exec(program, brk_start=page_up(brk_start or 0))
                await self._devices.attach(self.processes[index])
            case Exit(process=index):
                if index == FIRST:
                    await self._end()
                await self._exit(index)

    async def _fail(self, step: Failed) -> None:
        if step.attempt is None:
            return
        try:
            await self._call(self.processes[step.process], step.attempt)
        except HmmError as error:
            if errno_name(error.errno) != step.errno:
                raise _DifferenceFoundError(step.errno, str(error)) from error
        else:
            raise _DifferenceFoundError(step.errno, "success")

    async def _call(self, process: Process, step: Step) -> None:
        before, after = reached(step)
        if before:
            await self._devices.follow(process, before)
        if self._takes_from_growing(step):
            await self._devices.idle()
        found = await make(process, step, self._files)
        if found.expected != found.found:
            raise _DifferenceFoundError(found.expected, found.found)
        if found.placement and not step.partial:
            self.done.placed.append(f"line {step.call.line}: {step.call.text}: here {found.placement:#x}")
        if after:
            await self._devices.follow(process, after)

    def _takes_from_growing(self, step: Step) -> bool:
        """Whether a call may take memory from an area that grows: a CPU that still looks there would bring it back."""
        match step:
            case Map(flags=flags, recorded=start, length=length) if flags & MapFlag.GROWSDOWN:
                self._growing.append(AddressRange(start, page_up(start + length)))
            case Unmap(address=start, length=length) | Remap(address=start, length=length):
                end = start + length
                return any(start < area.end and area.start - GROWTH_BYTES < end for area in self._growing)
        return False
