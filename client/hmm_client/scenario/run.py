"""Taking the steps of a scenario on a daemon.

**Invariants**: the steps are taken in order; one that fails its expectation does not stop the others; no step waits
longer than it says.

**Absent**: starting a daemon; what a file may say (`format`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from hmm.errors import HmmError, SegmentationFault, errno_name
from hmm.mremap import MremapFlag
from hmm.units import AddressRange, page_up
from hmm.unmapped_area import MapFlag
from hmm_client.client import Client
from hmm_client.device import Device
from hmm_client.file import File
from hmm_client.mirror import Mirror
from hmm_client.process import Process
from hmm_client.results import Completed, Mapped
from hmm_client.scenario.driver import Behaviour, ScenarioDriver
from hmm_client.scenario.format import Expectation, Scenario, Step
from hmm_proto.v1 import inspection_pb2

PENDING_S = 5.0
"""How long `pending` waits for what it expects: a step in the background needs a moment to get there."""
POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class StepReport:
    """What came of one step.

    Attributes:
        found: in words.
        wrong: every expectation that was not met, in words.
    """

    step: Step
    seconds: float
    found: str
    wrong: tuple[str, ...]


@dataclass(slots=True)
class _Driven:
    """A driver, what it serves, and its own connection."""

    client: Client
    device: Device
    driver: ScenarioDriver
    mirrors: dict[str, Mirror] = field(default_factory=dict)


@dataclass(slots=True)
class _Outcome:
    """How a step ended."""

    error: str = ""
    signal: str = ""
    data: bytes | None = None
    fenced: frozenset[str] = frozenset()


async def run_scenario(scenario: Scenario, connect: Callable[[str], Client]) -> AsyncIterator[StepReport]:
    """Take the steps of a scenario, and report each as it ends.

    Args:
        connect: makes a client of the name given.

    Raises:
        HmmError: it could not be set up.
    """
    async with AsyncExitStack() as stack:
        run = _Run(scenario, connect, stack)
        await run.start()
        for step in scenario.steps:
            yield await run.take(step)


class _Run:
    """One scenario under way."""

    def __init__(self, scenario: Scenario, connect: Callable[[str], Client], stack: AsyncExitStack) -> None:
        self._scenario = scenario
        self._connect = connect
        self._stack = stack
        self._processes: dict[str, Process] = {}
        self._files: dict[str, File] = {}
        self._driven: dict[str, _Driven] = {}
        self._labels: dict[str, AddressRange] = {}
        self._background: dict[str, tuple[asyncio.Task[_Outcome], dict[str, int]]] = {}

    async def start(self) -> None:
        """Make what the scenario declares."""
        scenario = self._scenario
        self._client = await self._stack.enter_async_context(self._connect(scenario.path.stem))
        self._stack.push_async_callback(self._end)
        for name in scenario.processes:
            self._processes[name] = await self._client.create_process(name)
        for name, size_bytes in scenario.files.items():
            self._files[name] = await self._client.open_file(name, create=True)
            await self._files[name].truncate(size_bytes)
        for name, spec in scenario.drivers.items():
            client = await self._stack.enter_async_context(self._connect(name))
            device = await client.register_device(name, dma=spec.dma)
            driven = self._driven[name] = _Driven(client, device, ScenarioDriver(spec.behaviour))
            for process in spec.mirrors:
                driven.mirrors[process] = await device.mirror(
                    self._processes[process], driven.driver, policy=spec.policy
                )

    async def _end(self) -> None:
        for driven in self._driven.values():
            driven.driver.behave(Behaviour())
        for task, _ in self._background.values():
            task.cancel()
        await asyncio.gather(*(task for task, _ in self._background.values()), return_exceptions=True)

    # ---- one step

    async def take(self, step: Step) -> StepReport:
        """Take one step and compare it with what was expected."""
        began = time.monotonic()
        if step.kind == "pending":
            found, wrong = await self._pending(step)
            return StepReport(step, time.monotonic() - began, found, wrong)
        if step.kind == "wait":
            task, heard = self._background.pop(step.subject)
        else:
            heard = {name: len(driven.driver.heard) for name, driven in self._driven.items()}
            task = asyncio.create_task(self._outcome(step))
        if step.background:
            self._background[step.background] = task, heard
            await asyncio.sleep(0)
            return StepReport(step, time.monotonic() - began, "goes on in the background", ())
        done, _ = await asyncio.wait({task}, timeout=step.expectation.within_s)
        seconds = time.monotonic() - began
        if not done:
            task.cancel()
            return StepReport(step, seconds, "nothing yet", (f"it did not end within {seconds:.1f} s",))
        outcome = task.result()
        events = {name: driven.driver.heard[heard.get(name, 0) :] for name, driven in self._driven.items()}
        return StepReport(step, seconds, _in_words(outcome, events), _compare(step.expectation, outcome, events))

    async def _outcome(self, step: Step) -> _Outcome:
        try:
            result = await self._calls(step)
        except SegmentationFault as error:
            return _Outcome(signal=error.signal.value)
        except HmmError as error:
            return _Outcome(error=errno_name(error.errno))
        if isinstance(result, Completed):
            return _Outcome(fenced=self._names(result.fenced_mirrors))
        return _Outcome(data=result if isinstance(result, bytes) else None)

    def _names(self, mirror_ids: tuple[int, ...]) -> frozenset[str]:
        return frozenset(
            name
            for name, driven in self._driven.items()
            if any(mirror.id in mirror_ids for mirror in driven.mirrors.values())
        )

    def _calls(self, step: Step) -> Coroutine[Any, Any, object]:
        match step.kind:
            case "process":
                return self._process_call(self._processes[step.subject], step)
            case "driver":
                return self._driver_call(self._driven[step.subject], step)
            case _:
                return self._file_call(self._files[step.subject], step)

    # ---- calls

    async def _process_call(self, process: Process, step: Step) -> object:
        given = step.arguments
        result: object = None
        match step.call:
            case "mmap":
                result = self._label(given["as"], await self._mmap(process, step))
            case "mremap":
                result = self._label(given["as"], await self._mremap(process, step))
            case "fork":
                self._processes[given["as"]] = await process.fork()
            case "exit":
                result = await process.exit()
            case "write":
                result = await process.write(self._address(given["at"]), given["data"])
            case _:
                result = await self._range_call(process, step, self._span(given))
        return result

    async def _range_call(self, process: Process, step: Step, span: AddressRange) -> object:
        given = step.arguments
        match step.call:
            case "munmap":
                return await process.munmap(span.start, span.size_bytes)
            case "mprotect":
                return await process.mprotect(span.start, span.size_bytes, given["prot"])
            case "madvise":
                return await process.madvise(span.start, span.size_bytes, given["advice"])
            case "read":
                return await process.read(span.start, span.size_bytes)
            case _:
                return await process.touch(span.start, span.size_bytes, write=given["write"])

    async def _mmap(self, process: Process, step: Step) -> Mapped:
        given = step.arguments
        file = self._files[given["file"]] if given["file"] else None
        flags = given["flags"] or MapFlag.PRIVATE
        flags |= MapFlag(0) if file else MapFlag.ANONYMOUS
        address = self._address(given["at"]) if given["at"] else 0
        return await process.mmap(
            given["length"], given["prot"], flags, address=address, file=file, offset=given["offset"]
        )

    async def _mremap(self, process: Process, step: Step) -> Mapped:
        span, to = self._span(step.arguments), step.arguments["to"]
        flags = MremapFlag.MAYMOVE | (MremapFlag.FIXED if to else MremapFlag(0))
        target = self._address(to) if to else 0
        new_length = step.arguments["new_length"]
        return await process.mremap(span.start, span.size_bytes, new_length, flags, new_address=target)

    async def _driver_call(self, driven: _Driven, step: Step) -> object:
        given = step.arguments
        match step.call:
            case "behave":
                driven.driver.behave(Behaviour(given["on_update"], given["delay_s"]))
            case "die":
                await driven.client.close()
            case "mirror":
                process = self._processes[given["process"]]
                mirror = await driven.device.mirror(process, driven.driver, policy=given["policy"])
                driven.mirrors[given["process"]] = mirror
            case _:
                return await self._mirror_call(driven.mirrors[given["mirrors"] or next(iter(driven.mirrors))], step)
        return None

    async def _mirror_call(self, mirror: Mirror, step: Step) -> object:
        given = step.arguments
        match step.call:
            case "unregister":
                await mirror.unregister()
            case "write":
                await mirror.write([(self._address(given["at"]), len(given["data"]))], given["data"])
            case "fault":
                await mirror.fault(self._span(given).page_aligned(), write=given["write"], wait=given["wait"])
            case _:
                span = self._span(given)
                return await mirror.read([(span.start, span.size_bytes)])
        return None

    async def _file_call(self, file: File, step: Step) -> object:
        given = step.arguments
        match step.call:
            case "truncate":
                return await file.truncate(given["size"])
            case "punch":
                return await file.punch(given["offset"], given["length"])
            case _:
                await file.write(given["offset"], given["data"])
                return None

    # ---- places

    def _label(self, name: str | None, mapped: Mapped) -> Mapped:
        if name:
            self._labels[name] = AddressRange(mapped.address, page_up(mapped.address + mapped.length))
        return mapped

    def _address(self, place: str) -> int:
        label, _, offset = (part.strip() for part in place.partition("+"))
        start = self._labels[label].start if label in self._labels else int(label, 16)
        return start + (int(offset, 0) if offset else 0)

    def _span(self, given: Any) -> AddressRange:
        start = self._address(given["at"])
        if given["length"] is not None:
            return AddressRange(start, start + given["length"])
        label = given["at"].partition("+")[0].strip()
        return AddressRange(start, max(start, self._labels[label].end) if label in self._labels else start + 1)

    # ---- who owes an answer

    async def _pending(self, step: Step) -> tuple[str, tuple[str, ...]]:
        until = time.monotonic() + min(PENDING_S, step.expectation.within_s)
        while True:
            answer: inspection_pb2.GetPendingResponse = await self._client.channel.request(
                self._client.inspection.GetPending, inspection_pb2.GetPendingRequest()
            )
            owing = {event.mirror_id for operation in answer.operations for event in operation.events}
            found = self._names(tuple(owing))
            words = " ".join(sorted(found)) or "nobody"
            if found == step.drivers or time.monotonic() > until:
                wrong = () if found == step.drivers else (f"an answer is owed by {words}",)
                return f"{words} owes an answer", wrong
            await asyncio.sleep(POLL_S)


def _compare(expected: Expectation, found: _Outcome, events: dict[str, list[str]]) -> tuple[str, ...]:
    wrong = []
    for name in ("error", "signal"):
        wanted, got = getattr(expected, name), getattr(found, name)
        if wanted != got:
            wrong.append(f"{name} {got or 'none'} instead of {wanted or 'none'}")
    if expected.data is not None and expected.data != found.data:
        wrong.append(f"data {found.data!r} instead of {expected.data!r}")
    if expected.fenced != found.fenced:
        wrong.append(f"fenced {sorted(found.fenced)} instead of {sorted(expected.fenced)}")
    for name, wanted_events in expected.events.items():
        if list(wanted_events) != events[name]:
            wrong.append(f"{name} heard {events[name]} instead of {list(wanted_events)}")
    return tuple(wrong)


def _in_words(outcome: _Outcome, events: dict[str, list[str]]) -> str:
    parts = [outcome.error or outcome.signal or "done"]
    parts += [f"fenced {' '.join(sorted(outcome.fenced))}"] if outcome.fenced else []
    parts += [f"{name} heard {' '.join(heard)}" for name, heard in events.items() if heard]
    return "; ".join(parts)
