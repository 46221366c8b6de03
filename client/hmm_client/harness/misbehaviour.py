"""Misbehaviour: a driver's events come late or not at all, and its answers are wrong, as a script says.

It stands between a mirror and its driver, whatever driver that is, and can be changed at any time:

    script = Misbehaviour()
    mirror = await device.mirror(process, MyDriver(), misbehaviour=script)
    script.behave(hold())                 # from now on every event that takes something back is held
    unmapping = asyncio.create_task(process.munmap(...))
    await script.wait_held()              # the driver has not seen it, its device still uses the pages
    script.release()

A script is a list of acts, used up one event at a time, the last one for good.  It concerns events that take something
back, unless `only` names others:

    act             the driver                              the daemon
    answer()        gets the event                          gets the answer
    delay(s)        gets it `s` seconds later               gets the answer then
    hold()          gets it after `release()`               gets the answer then
    hang()          never gets it                           gets no answer
    late()          gets it when the deadline has passed    gets an answer that no longer counts
    refuse(errno)   never gets it                           gets the errno
    twice()         gets it                                 gets the answer two times
    out_of_order()  gets it                                 gets the answer after that to the mirror's next event
    drop_stream()   never gets it                           finds the stream broken
    stop_reading()  gets it                                 gets the answer, and nobody reads what comes then
    kill_process()  dies of SIGKILL                         finds the connection broken
    stop_process()  stops by SIGSTOP                        hears nothing more

**Source**: the table of liveness in proto/README.md; the misbehaving tests of `tests/system`.

**Invariants**: events of a mirror reach its driver in order; what is behind one that is held, delayed or hangs waits
for it, as it does with a driver that handles one event after the other.

**Absent**: failures that the daemon has to make: allocations and DMA mappings (`holds.py`).
"""

from __future__ import annotations

import asyncio
import errno as errnos
import os
import signal
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import Enum

from hmm.events import EventType
from hmm.units import MirrorId
from hmm_client.event import Event
from hmm_proto.v1 import event_pb2

FAULTS = frozenset({EventType.DEVICE_RFAULT, EventType.DEVICE_WFAULT})
"""Types of the events that a device fault ends in."""
TAKING_BACK = frozenset(EventType) - FAULTS - {EventType.RELEASE, EventType.COPY_FROM_DEVICE, EventType.COPY_TO_DEVICE}
"""Types of the events that take something back."""
LATE_FACTOR = 1.5
"""A late answer comes after so many times the deadline."""

Deliver = Callable[[Event], None]
Answer = Callable[[Event, event_pb2.Answer | None], None]


class Kind(Enum):
    """What can be done with an event; the names of acts in scenario files."""

    ANSWER = "answer"
    DELAY = "delay"
    HOLD = "hold"
    HANG = "hang"
    LATE = "late"
    REFUSE = "refuse"
    TWICE = "twice"
    OUT_OF_ORDER = "out_of_order"
    DROP_STREAM = "drop_stream"
    STOP_READING = "stop_reading"
    KILL_PROCESS = "kill_process"
    STOP_PROCESS = "stop_process"


@dataclass(frozen=True, slots=True)
class Act:
    """What is done with one event.

    Attributes:
        seconds: DELAY: before the driver gets it.
        errno: REFUSE: the answer.
    """

    kind: Kind
    seconds: float = 0.0
    errno: int = errnos.EIO


def answer() -> Act:
    """Behave."""
    return Act(Kind.ANSWER)


def delay(seconds: float) -> Act:
    """Hand the event over that much later."""
    return Act(Kind.DELAY, seconds)


def hold() -> Act:
    """Hand the event over after `Misbehaviour.release`."""
    return Act(Kind.HOLD)


def hang() -> Act:
    """Never hand it over, never answer."""
    return Act(Kind.HANG)


def late() -> Act:
    """Hand it over when its deadline has passed, and answer then."""
    return Act(Kind.LATE)


def refuse(errno: int = errnos.EIO) -> Act:
    """Answer with an errno, and do nothing."""
    return Act(Kind.REFUSE, errno=errno)


def twice() -> Act:
    """Answer two times."""
    return Act(Kind.TWICE)


def out_of_order() -> Act:
    """Answer after the answer to the mirror's next event."""
    return Act(Kind.OUT_OF_ORDER)


def drop_stream() -> Act:
    """Break the session's stream, without Bye."""
    return Act(Kind.DROP_STREAM)


def stop_reading() -> Act:
    """Answer, and read nothing more from the stream until `Session.go_on_reading`."""
    return Act(Kind.STOP_READING)


def kill_process() -> Act:
    """SIGKILL to this process; only for a driver in a process of its own."""
    return Act(Kind.KILL_PROCESS)


def stop_process() -> Act:
    """SIGSTOP to this process; only for a driver in a process of its own."""
    return Act(Kind.STOP_PROCESS)


def nth(number: int, act: Act) -> tuple[Act, ...]:
    """A script: behave, but for the `number`th event (1 is the next one).

    Raises:
        ValueError: there is no such event.
    """
    if number < 1:
        raise ValueError(f"there is no event number {number}: 1 is the next one")
    return (*(answer(),) * (number - 1), act, answer())


@dataclass(slots=True)
class _Mirror:
    """What waits on the way to and from one mirror's driver."""

    queue: deque[tuple[Event, Deliver, Answer]] = field(default_factory=deque)
    busy: bool = False
    acts: dict[int, Act] = field(default_factory=dict)
    unordered: tuple[Event, event_pb2.Answer | None] | None = None
    task: asyncio.Task[None] | None = None


class Misbehaviour:
    """A script for the mirrors that it is given to (`Device.mirror(..., misbehaviour=...)`).

    Attributes:
        taken: every event that the script was asked about, with what was done.
        held: events that wait for `release`.
        own_process: the driver has a process of its own, which may be killed or stopped.
    """

    def __init__(self, *acts: Act, own_process: bool = False) -> None:
        self.taken: list[tuple[Event, Act]] = []
        self.held: list[Event] = []
        self.own_process = own_process
        self._scripts: dict[frozenset[EventType], deque[Act]] = {}
        self._mirrors: dict[MirrorId, _Mirror] = {}
        self._released = asyncio.Event()
        self._changed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        if acts:
            self.behave(*acts)

    # ---- what the test says

    def behave(self, *acts: Act, only: Collection[EventType] | None = None) -> None:
        """Do so from now on: one act for each event, the last for all that follow.  What is held stays held.

        Args:
            only: types of the events that the script is for; None: those that take something back.  Scripts for other
                types stay as they are; where several concern an event, the one that was given first counts.

        Raises:
            ValueError: no act; or one that ends this process, which is not the driver's own.
        """
        if not acts:
            raise ValueError("a script has at least one act")
        if not self.own_process and {act.kind for act in acts} & {Kind.KILL_PROCESS, Kind.STOP_PROCESS}:
            raise ValueError("this process would be killed: Misbehaviour(own_process=True) says that it may be")
        self._scripts[TAKING_BACK if only is None else frozenset(only)] = deque(acts)

    def release(self) -> None:
        """Hand over what is held.  May be called on any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._release)

    async def wait_held(self, count: int = 1) -> list[Event]:
        """Wait until so many events are held.  Returns: these events."""
        while len(self.held) < count:
            self._changed.clear()
            await self._changed.wait()
        return list(self.held)

    async def wait_taken(self, count: int = 1) -> list[Event]:
        """Wait until the script was asked about so many events, from its beginning on.  Returns: all of them."""
        while len(self.taken) < count:
            self._changed.clear()
            await self._changed.wait()
        return [event for event, _ in self.taken]

    # ---- what mirrors say

    def deliver(self, event: Event, deliver: Deliver, answer: Answer) -> None:
        """An event came; `deliver` hands it to the driver, `answer` answers it without the driver."""
        self._loop = asyncio.get_running_loop()
        mirror = self._mirrors.setdefault(event.mirror.id, _Mirror())
        if mirror.busy:
            mirror.queue.append((event, deliver, answer))
        else:
            self._take(mirror, event, deliver, answer)

    def finish(self, event: Event, result: event_pb2.Answer | None, answer: Answer) -> None:
        """The driver has finished an event: send its answer, as often and whenever the script says."""
        mirror = self._mirrors.setdefault(event.mirror.id, _Mirror())
        act = mirror.acts.pop(event.sequence, None)
        if act is not None and act.kind is Kind.OUT_OF_ORDER:
            mirror.unordered, before = (event, result), mirror.unordered
            if before is not None:
                answer(*before)
            return
        if act is not None and act.kind is Kind.TWICE:
            # A plain answer that comes again would be left out as known; one with a message of its own never is.
            result = result or event_pb2.Answer(mirror_id=event.mirror.id, event_sequence=event.sequence)
            answer(event, result)
        answer(event, result)
        if mirror.unordered is not None:
            before, mirror.unordered = mirror.unordered, None
            answer(*before)

    def forget(self, mirror_id: MirrorId) -> None:
        """A mirror has ended: what waits for it is dropped."""
        mirror = self._mirrors.pop(mirror_id, None)
        if mirror is not None:
            mirror.queue.clear()
            if mirror.task is not None and mirror.task is not asyncio.current_task():
                mirror.task.cancel()
        self.held = [event for event in self.held if event.mirror.id != mirror_id]

    # ---- acting

    def _take(self, mirror: _Mirror, event: Event, deliver: Deliver, answer: Answer) -> None:
        script = next((script for types, script in self._scripts.items() if event.type in types), None)
        if script is None:
            deliver(event)
            return
        act = script.popleft() if len(script) > 1 else script[0]
        self.taken.append((event, act))
        match act.kind:
            case Kind.DELAY | Kind.HOLD | Kind.HANG | Kind.LATE:
                mirror.busy = True
                if act.kind is Kind.HOLD:
                    self.held.append(event)
                mirror.task = asyncio.ensure_future(self._deliver_later(mirror, event, act, deliver))
            case Kind.REFUSE:
                answer(
                    event, event_pb2.Answer(mirror_id=event.mirror.id, event_sequence=event.sequence, errno=act.errno)
                )
            case Kind.DROP_STREAM:
                event.mirror.session.drop()
            case Kind.KILL_PROCESS:
                os.kill(os.getpid(), signal.SIGKILL)
            case _:
                if act.kind is Kind.STOP_PROCESS:
                    os.kill(os.getpid(), signal.SIGSTOP)
                if act.kind is Kind.STOP_READING:
                    event.mirror.session.stop_reading()
                mirror.acts[event.sequence] = act
                deliver(event)
        self._changed.set()

    async def _deliver_later(self, mirror: _Mirror, event: Event, act: Act, deliver: Deliver) -> None:
        match act.kind:
            case Kind.DELAY:
                await asyncio.sleep(act.seconds)
            case Kind.LATE:
                await asyncio.sleep(LATE_FACTOR * _deadline_s(event))
            case Kind.HOLD:
                while event in self.held:
                    await self._released.wait()
            case _:
                await asyncio.get_running_loop().create_future()
        mirror.task, mirror.busy = None, False
        deliver(event)
        while mirror.queue and not mirror.busy:
            self._take(mirror, *mirror.queue.popleft())

    def _release(self) -> None:
        self.held.clear()
        self._released.set()
        self._released = asyncio.Event()


def _deadline_s(event: Event) -> float:
    """When the answer is due; under BLOCK, when it would be."""
    if event.deadline_s is not None:
        return event.deadline_s
    deadline_ms: int = event.mirror.session.welcome.acknowledgement_deadline_ms
    return deadline_ms / 1000
