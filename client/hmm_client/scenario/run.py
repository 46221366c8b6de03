"""Taking the steps of a scenario on a daemon.

**Invariants**: the steps are taken in order; one that fails its expectation does not stop the others; no step waits
longer than it says; what the scenario made ends with it.

**Absent**: starting a daemon; what a file may say (`format.py`); what steps do (`actions.py`).
"""

from __future__ import annotations

import asyncio
import errno as errnos
import itertools
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass

from hmm.errors import HmmError, SegmentationFault, errno_name
from hmm.units import PAGE_SHIFT
from hmm_client.arguments import ArgumentError
from hmm_client.channel import DaemonError
from hmm_client.client import Client
from hmm_client.harness.holds import HoldEndedError
from hmm_client.interval_driver import IntervalDriver
from hmm_client.results import Completed
from hmm_client.scenario.actions import Actions
from hmm_client.scenario.driver import FAULT_NAMES, Driven, ScenarioDriver, Script
from hmm_client.scenario.model import DriverSpec, Expectation, Interface, Scenario, Step
from hmm_client.scenario.program import Program, ProgramError
from hmm_proto.v1 import inspection_pb2

EVENTUALLY_S = 5.0
"""How long what is looked at may take to become what is expected: a step in the background needs a moment."""
POLL_S = 0.02
_RUNS = itertools.count(1)


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
class _Outcome:
    """How a step ended.

    Attributes:
        why: what the error says.
    """

    error: str = ""
    signal: str = ""
    data: bytes | None = None
    entries: int | None = None
    retry: bool | None = None
    fenced: frozenset[str] = frozenset()
    why: str = ""


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
        self._background: dict[str, tuple[asyncio.Task[_Outcome], dict[str, int]]] = {}

    async def start(self) -> None:
        """Make what the scenario declares."""
        scenario = self._scenario
        self._client = await self._stack.enter_async_context(self._connect(scenario.name))
        self._actions = Actions(self._client)
        self._stack.push_async_callback(self._end)
        for name in scenario.processes:
            self._actions.processes[name] = await self._client.create_process(name)
        run = f"{scenario.name}-{os.getpid()}-{next(_RUNS)}"
        for name, size_bytes in scenario.files.items():
            file = self._actions.files[name] = await self._client.open_file(f"{run}-{name}", create=True)
            await file.truncate(size_bytes)
        for name, spec in scenario.drivers.items():
            client = await self._stack.enter_async_context(self._connect(name))
            client.credit = spec.credit
            device = await client.register_device(name, dma=spec.dma, memory_pages=spec.memory >> PAGE_SHIFT)
            script = Script(spec.interface)
            driven = self._actions.driven[name] = Driven(client, device, ScenarioDriver(spec.inside), script)
            driven.behave(spec.on_update, spec.on_fault)
            for process in spec.mirrors:
                await self._tie(driven, process, spec)
        for name, program in scenario.programs.items():
            self._actions.programs[name] = await Program.start(program.command, self._client)

    async def _tie(self, driven: Driven, name: str, spec: DriverSpec) -> None:
        process = self._actions.processes[name]
        if spec.interface is Interface.TODAY:
            driven.attached[name] = await driven.device.attach(
                process, IntervalDriver(), policy=spec.policy, misbehaviour=driven.script
            )
        else:
            driven.mirrors[name] = await driven.device.mirror(
                process, driven.driver, policy=spec.policy, misbehaviour=driven.script
            )

    async def _end(self) -> None:
        for hold in self._actions.holds.values():
            with suppress(HoldEndedError, DaemonError):
                await hold.__aexit__(None, None, None)
        for program in self._actions.programs.values():
            await program.kill()
        for driven in self._actions.driven.values():
            await driven.client.close()
        for userfaultfd in self._actions.userfaultfds.values():
            with suppress(HmmError, DaemonError):
                await userfaultfd.close()
        for task, _ in self._background.values():
            task.cancel()
        await asyncio.gather(*(task for task, _ in self._background.values()), return_exceptions=True)
        for process in self._actions.processes.values():
            with suppress(HmmError, DaemonError):
                await process.exit()

    # ---- one step

    async def take(self, step: Step) -> StepReport:
        """Take one step and compare it with what was expected."""
        began = time.monotonic()
        if step.kind == "pending":
            found, wrong = await self._eventually(step, self._pending)
            return StepReport(step, time.monotonic() - began, found, wrong)
        if step.call == "counters":
            found, wrong = await self._eventually(step, self._counters)
            return StepReport(step, time.monotonic() - began, found, wrong)
        if step.kind == "give_up":
            given_up, _ = self._background.pop(step.subject)
            given_up.cancel()
            await asyncio.gather(given_up, return_exceptions=True)
            return StepReport(step, time.monotonic() - began, "nobody waits for it any more", ())
        if step.kind == "wait":
            task, heard = self._background.pop(step.subject)
        else:
            heard = {name: len(driven.script.came) for name, driven in self._actions.driven.items()}
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
        outcome, events = task.result(), self._events(step.expectation, heard)
        return StepReport(step, seconds, _in_words(outcome, events), _compare(step.expectation, outcome, events))

    async def _outcome(self, step: Step) -> _Outcome:
        try:
            result = await self._actions.take(step)
        except SegmentationFault as error:
            return _Outcome(signal=error.signal.value, why=error.message)
        except HmmError as error:
            return _Outcome(error=errno_name(error.errno), why=error.message)
        except ArgumentError as error:
            return _Outcome(error=errno_name(errnos.EINVAL), why=str(error))
        except ProgramError as error:
            return _Outcome(error=error.errno, why=error.message)
        except HoldEndedError as error:
            return _Outcome(error=str(error))
        return self._result(step, result)

    def _result(self, step: Step, result: object) -> _Outcome:
        match result:
            case Completed():
                return _Outcome(fenced=self._names(result.fenced_mirrors))
            case bool():
                return _Outcome(retry=result)
            case int() if step.kind == "driver":
                return _Outcome(entries=result)
            case bytes():
                return _Outcome(data=result)
            case _:
                return _Outcome()

    def _names(self, mirror_ids: tuple[int, ...]) -> frozenset[str]:
        known = self._actions.driven | self._actions.programs
        return frozenset(name for name, one in known.items() if one.ids & set(mirror_ids))

    def _events(self, expected: Expectation, heard: dict[str, int]) -> dict[str, list[str]]:
        events = {}
        for name, driven in self._actions.driven.items():
            faults = bool(FAULT_NAMES & set(expected.events.get(name, ())))
            events[name] = driven.script.heard_since(heard.get(name, 0), faults=faults)
        return events

    # ---- what is looked at

    async def _eventually(
        self, step: Step, look: Callable[[Step], Awaitable[tuple[str, tuple[str, ...]]]]
    ) -> tuple[str, tuple[str, ...]]:
        until = time.monotonic() + min(EVENTUALLY_S, step.expectation.within_s)
        while True:
            found, wrong = await look(step)
            if not wrong or time.monotonic() > until:
                return found, wrong
            await asyncio.sleep(POLL_S)

    async def _pending(self, step: Step) -> tuple[str, tuple[str, ...]]:
        answer: inspection_pb2.GetPendingResponse = await self._client.channel.request(
            self._client.inspection.GetPending, inspection_pb2.GetPendingRequest()
        )
        processes = {process.id for process in self._actions.processes.values()}
        mine = [one for one in answer.operations if not one.process_id or one.process_id in processes]
        owing = self._names(tuple(event.mirror_id for operation in mine for event in operation.events))
        names = [operation.name for operation in mine]
        words = " ".join(sorted(owing)) or "nobody"
        wrong = []
        if owing != step.arguments["owing"]:
            wrong.append(f"an answer is owed by {words}")
        if step.arguments["operations"] is not None and names != list(step.arguments["operations"]):
            wrong.append(f"pending are {names} instead of {list(step.arguments['operations'])}")
        return f"{words} owes an answer; pending: {' '.join(names) or 'nothing'}", tuple(wrong)

    async def _counters(self, step: Step) -> tuple[str, tuple[str, ...]]:
        mirror = self._actions.driven[step.subject].mirror(step.arguments["mirrors"])
        answer: inspection_pb2.GetStatisticsResponse = await self._client.channel.request(
            self._client.inspection.GetStatistics, inspection_pb2.GetStatisticsRequest()
        )
        mine = next((one for one in answer.mirrors if one.mirror_id == mirror.id), inspection_pb2.MirrorStatistics())
        found = {name: getattr(mine, name) for name in step.expectation.counters}
        wrong = [
            f"{name} is {found[name]} instead of {count}"
            for name, count in step.expectation.counters.items()
            if found[name] != count
        ]
        return ", ".join(f"{name} {count}" for name, count in found.items()) or "nothing asked for", tuple(wrong)


def _compare(expected: Expectation, found: _Outcome, events: dict[str, list[str]]) -> tuple[str, ...]:
    wrong = []
    for name in ("error", "signal"):
        wanted, got = getattr(expected, name), getattr(found, name)
        if wanted != got:
            why = f": {found.why}" if got and found.why else ""
            wrong.append(f"{name} {got or 'none'} instead of {wanted or 'none'}{why}")
    for name in ("data", "entries", "retry"):
        wanted, got = getattr(expected, name), getattr(found, name)
        if wanted is not None and wanted != got:
            wrong.append(f"{name} {got!r} instead of {wanted!r}")
    if expected.fenced != found.fenced:
        wrong.append(f"fenced {sorted(found.fenced)} instead of {sorted(expected.fenced)}")
    for name, wanted_events in expected.events.items():
        if list(wanted_events) != events[name]:
            wrong.append(f"{name} heard {events[name]} instead of {list(wanted_events)}")
    return tuple(wrong)


def _in_words(outcome: _Outcome, events: dict[str, list[str]]) -> str:
    parts = [outcome.error or outcome.signal or "done"]
    parts += [f"fenced {' '.join(sorted(outcome.fenced))}"] if outcome.fenced else []
    parts += [f"{outcome.entries} entr{'y' if outcome.entries == 1 else 'ies'}"] if outcome.entries is not None else []
    parts += ["retry" if outcome.retry else "no retry"] if outcome.retry is not None else []
    parts += [f"{name} heard {' '.join(heard)}" for name, heard in events.items() if heard]
    return "; ".join(parts)
