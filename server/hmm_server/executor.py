"""Runs the machine's operations on the event loop: starts them, delivers their events, takes answers, keeps time.

Everything happens on the loop's thread, one input at a time, so there are no locks.  After every input `pump` resumes
what has become ready, until nothing is; operations that only pause between two pieces of their work go on in the
loop's next turn, so that one long call does not stop anybody's heartbeat.  One that has given its caller the result
and goes on, as a migration does that waits for its driver, is over for its caller.

A caller that gives up does not end its operation: it runs to its end, and `OperationLog` remembers how that was.  Only
for the handler of a userfaultfd it does not wait any longer, as nothing bounds that.

**Invariants**: every event handed to the router is answered, fenced or abandoned at the latest when its deadline
passes, and a second later where the daemon itself was late, unless the mirror's policy is BLOCK; every started
operation is pending or in the log.

**Absent**: streams and their windows (streams.py); gRPC; what a call means; which calls are held (holds.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, Protocol, TypeVar

from hmm.dispatch import Dispatch
from hmm.errors import HmmError, TimedOutError
from hmm.events import EventState
from hmm.machine import Command, Machine
from hmm.operation import Await, Deliver, Pause, WaitFor
from hmm.operation_record import Caller, OperationRecord
from hmm.receiver import DeadlinePolicy
from hmm.units import AddressRange, MirrorId, SpaceId
from hmm_server.holds import Going, Hold, Holds, Point
from hmm_server.logs import about
from hmm_server.operation_log import Ended, OperationLog

T = TypeVar("T")
P = ParamSpec("P")
Then = Callable[[OperationRecord[T]], None]
LATE_S = 0.05
"""A deadline that is noticed so late has passed without the daemon having looked for answers ..."""
GRACE_PART = 0.05
GRACE_S = 1.0
"""... and is put off once, by this part of itself, and so much at most."""
_ENDING = frozenset({"exit_process", "exec_process"})
"""Calls that may end a process."""
log = logging.getLogger(__name__)


class DrainingError(Exception):
    """The daemon is ending and starts no more calls."""


class Router(Protocol):
    """Whoever brings events to drivers."""

    def route(self, dispatch: Dispatch, mirror_ids: Sequence[MirrorId]) -> list[MirrorId]:
        """Send an event on its way to some of its audience.  Returns: the mirrors that nobody serves any more."""

    def depart(self) -> None:
        """All events that are to be sent now are on their way."""

    def settled(self, mirror_id: MirrorId, sequences: Sequence[int], state: EventState) -> None:
        """These events have ended without an answer: fenced, or abandoned."""

    def lost(self, mirror_id: MirrorId, why: str) -> None:
        """A mirror was fenced."""

    def ended(self, ended: Ended) -> None:
        """A call has ended."""


@dataclass(slots=True)
class Running:
    """An operation that has not ended.

    Attributes:
        started_s: on the monotonic clock.
        then: gets the record once it is over; None: it did, or nobody asked for it.
        event_s: when its present event was made; the deadline counts from here.
        due_s: the deadline, on the monotonic clock; 0 when nobody's answer is waited for.
        put_off: it was, because the daemon itself was late.
        given_up: its caller no longer waits.
        epoch: the stream that the call came on; 0 for none.
        space_id: the address space that it concerns; 0 where nobody has to know.
    """

    record: OperationRecord[Any]
    started_s: float
    then: Then[Any] | None = None
    event_s: float = 0.0
    due_s: float = 0.0
    put_off: bool = False
    given_up: bool = False
    epoch: int = 0
    space_id: SpaceId = 0


class Executor:
    """The asyncio runner of one machine.

    Attributes:
        userfaultfds: by number, what is set when there may be something for the handler, the end of its process or of
            the daemon included.
    """

    def __init__(self, machine: Machine, operations: OperationLog, acknowledgement_s: float) -> None:
        self.machine = machine
        self.operations = operations
        self.acknowledgement_s = acknowledgement_s
        self.running: dict[int, Running] = {}
        self.holds = Holds(machine)
        self.draining = False
        self.router: Router | None = None
        self.userfaultfds: dict[int, asyncio.Event] = {}
        self._loop = asyncio.get_running_loop()
        self._pumping = False
        self._continuing = False
        self._impatient = False
        self._clock: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    # ---- calls

    def start(
        self, then: Then[T], caller: Caller, command: Command[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> OperationRecord[T]:
        """Start a command; `then` gets its record once it is over, possibly before this returns.

        Raises:
            DrainingError: the daemon is ending.
        """
        record = self.begin(caller, command, *args, **kwargs)
        self.tell(record, then)
        return record

    def tell(self, record: OperationRecord[T], then: Then[T]) -> None:
        """Let `then` have the record of a call that was begun, once it is over, now if it is; then go on."""
        if self.is_over(record):
            then(record)
        else:
            self.running[record.id].then = then
        self.pump()

    def begin(self, caller: Caller, command: Command[P, T], *args: P.args, **kwargs: P.kwargs) -> OperationRecord[T]:
        """Start a command; what `tell` does has to follow.

        Raises:
            DrainingError: the daemon is ending.
        """
        if self.draining:
            raise DrainingError
        started_s = time.monotonic()
        placed = self.holds.placed
        space_id = self.holds.space_of_call(command, args) if placed else 0
        record = self.machine.start(caller, command, *args, **kwargs)
        if record.done and not (placed and self._stays(Point.BEFORE_END, record, space_id)):
            self._end(record, started_s)
        else:
            self.running[record.id] = Running(record, started_s, space_id=space_id)
            self._idle.clear()
            if not record.done:
                self._advanced(record)
        return record

    def is_over(self, record: OperationRecord[Any]) -> bool:
        """Whether a call has ended, or goes on without its caller, and that one has been told."""
        return record.replied or (record.done and record.id not in self.running)

    async def call(
        self, caller: Caller, command: Command[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> OperationRecord[T]:
        """Run a command and wait for its end.  When the waiting is cancelled, the operation goes on.

        Returns: its record; errors of the call are in it and not raised.
        """
        return await self.call_within(None, caller, command, *args, **kwargs)

    async def call_within(
        self, seconds: float | None, caller: Caller, command: Command[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> OperationRecord[T]:
        """As `call`, but wait no longer than that; then the operation goes on alone.

        Raises:
            TimedOutError: it has not ended in time (ETIMEDOUT).
        """
        ended: asyncio.Future[None] = self._loop.create_future()
        record = self.start(lambda _: resolve(ended), caller, command, *args, **kwargs)
        await self.wait(record, ended, seconds)
        return record

    async def wait(self, record: OperationRecord[Any], ended: asyncio.Future[None], seconds: float | None) -> None:
        """Wait for the end of an operation, whose `then` resolves `ended`.

        Raises:
            TimedOutError: it has not ended in time (ETIMEDOUT).
        """
        if not await self.has_ended(record, ended, seconds):
            raise self.give_up(record, seconds or 0)

    async def has_ended(self, record: OperationRecord[Any], ended: asyncio.Future[None], seconds: float | None) -> bool:
        """Wait no longer than that for the end of an operation.  Returns: whether it came."""
        if self.is_over(record):
            return True
        try:
            if seconds is None:
                await ended
                return True
            async with asyncio.timeout(seconds):
                await ended
        except TimeoutError:
            return self.is_over(record)
        finally:
            self.forsake(record)
        return True

    def time_out(self, record: OperationRecord[Any]) -> None:
        """End a range fault as soon as that is possible: at once, if it waits for nobody's answer."""
        self.machine.time_out(record.id)
        if record.done:
            self._advanced(record)
            self.pump()

    def give_up(self, record: OperationRecord[Any], seconds: float) -> TimedOutError:
        """Note that the caller's patience ended before the operation did.  Returns: the caller's error."""
        self.forsake(record)
        return TimedOutError(f"{record.name}: operation {record.id} has not ended within {seconds:g} s; it goes on")

    def forsake(self, record: OperationRecord[Any]) -> None:
        """Nobody waits for an operation's end any more: it goes on alone, but waits for no handler of userfaults."""
        if self.is_over(record):
            return
        self.running[record.id].given_up = True
        if not record.done:
            self._kill(record)
            self.pump()

    def _kill(self, record: OperationRecord[Any]) -> None:
        request = record.request
        self.machine.kill(record.id)
        if record.request is not request:
            self._advanced(record)

    # ---- inputs from drivers

    def answer(
        self, mirror_id: MirrorId, sequence: int, errno: int, dirty: tuple[AddressRange, ...], results: bytes = b""
    ) -> None:
        """A driver has answered one event; `pump` has to follow.

        Raises: as `Machine.answer`.
        """
        self.machine.answer(mirror_id, sequence, errno, dirty, results)

    def acknowledge(self, answers: Sequence[tuple[MirrorId, int]]) -> None:
        """Drivers have answered events, (mirror, sequence) each, and had no more to say; `pump` has to follow.

        Raises: as `Machine.answer`.
        """
        self.machine.acknowledge(answers)

    def fence(self, mirror_id: MirrorId, why: str, record: OperationRecord[Any] | None = None) -> None:
        """Give a mirror up; `pump` has to follow.

        Args:
            record: the call that waited for it, where that is why.
        """
        mirror = self.machine.receivers.get(mirror_id)
        if mirror is None:
            return
        unanswered = list(mirror.unanswered)
        self.machine.fence(mirror_id, why)
        log.info("%s is lost: %s", mirror, why, extra=about(record, mirror))
        assert self.router is not None
        self.router.settled(mirror_id, unanswered, EventState.FENCED)
        self.router.lost(mirror_id, why)

    # ---- running

    def pump(self) -> None:
        """Deliver what is to be delivered and resume what is ready, until neither is left."""
        if self._pumping or not self.running:
            return
        self._pumping = True
        try:
            while self.running and (self._deliver() or self._resume()):
                pass
        finally:
            self._pumping = False

    def _deliver(self) -> bool:
        dispatches = self.machine.take_dispatches()
        if not dispatches:
            return False
        going = [(dispatch, dispatch.audience.ids) for dispatch in dispatches]
        if self.holds.placed:
            going = self.holds.withhold(dispatches)
        self._route(going)
        return bool(going)

    def _route(self, going: Sequence[Going]) -> None:
        assert self.router is not None
        for dispatch, mirror_ids in going:
            running = self.running.get(dispatch.operation_id)
            if running is not None:
                self._set_deadline(running)
            for mirror_id in self.router.route(dispatch, mirror_ids):
                self.fence(mirror_id, "nobody serves it", running.record if running else None)
        self.router.depart()
        if self._impatient:
            self._fence_waited_for()

    def _resume(self) -> bool:
        all_ready = self.machine.ready()
        ready = [record for record in all_ready if not isinstance(record.request, Pause)]
        if len(ready) < len(all_ready) and not self._continuing:
            self._continuing = True
            self._loop.call_soon(self._continue)
        if self.holds.placed:
            ready = [record for record in ready if not self._stays(_point_of(record), record)]
        for record in ready:
            if record is ready[0] or self.machine.is_ready(record):
                self._advance(record)
        return bool(ready)

    def _continue(self) -> None:
        self._continuing = False
        for running in list(self.running.values()):
            if isinstance(running.record.request, Pause):
                self._advance(running.record)
        self.pump()

    def _advance(self, record: OperationRecord[Any]) -> None:
        running = self.running[record.id]
        running.due_s = 0.0
        self.machine.resume(record.id)
        self._advanced(record)

    def _advanced(self, record: OperationRecord[Any]) -> None:
        if record.replied:
            self._told(self.running[record.id])
        if record.done:
            if not self._stays(Point.BEFORE_END, record, self.running[record.id].space_id):
                self._leave(record)
        elif isinstance(record.request, Await):
            self._waits(record, record.request)

    def _waits(self, record: OperationRecord[Any], request: Await) -> None:
        if _awaits_owed_answers(record):
            self._set_deadline(self.running[record.id])
        elif request.userfaultfd and self.draining:
            self._kill(record)
        elif request.userfaultfd in self.userfaultfds:
            self.userfaultfds[request.userfaultfd].set()
        elif record.waits_for_driver and self.draining:
            self._end_migrations()

    def _told(self, running: Running) -> None:
        """A call has replied: its caller is told, once; if that one has gone, nobody could take the next step."""
        record, then, running.then = running.record, running.then, None
        if then is not None and running.given_up and record.waits_for_driver:
            assert isinstance(record.request, Await)
            self.machine.end_migration(record.request.ticket, "its caller had given up before it was set up")
        if then is not None:
            then(record)

    def _end_migrations(self) -> None:
        for number in self.machine.migrations:
            self.machine.end_migration(number, "the daemon is ending")

    def _leave(self, record: OperationRecord[Any]) -> None:
        running = self.running.pop(record.id)
        if not self.running:
            self._idle.set()
        self._end(record, running.started_s)
        if running.then is not None:
            running.then(record)

    def _end(self, record: OperationRecord[Any], started_s: float) -> None:
        if record.error is not None:
            vars(record.error)["operation_id"] = record.id  # of an HmmError, or of a bug's exception, for the guard
            if not isinstance(record.error, HmmError):
                log.error(
                    *("operation %d (%s) hit a bug", record.id, record.name),
                    exc_info=record.error,
                    extra=about(record),
                )
        ended = self.operations.note(record, time.monotonic() - started_s)
        if log.isEnabledFor(logging.DEBUG):
            _tell(record, ended)
        assert self.router is not None
        self.router.ended(ended)
        if self.userfaultfds and record.name in _ENDING:
            self._wake_handlers()

    def _wake_handlers(self) -> None:
        for came in self.userfaultfds.values():
            came.set()

    # ---- holds

    def come_to(self, point: Point, operation_id: int, mirror_ids: Iterable[MirrorId]) -> None:
        """A call's event has left for mirrors, or was acknowledged by them."""
        running = self.running.get(operation_id)
        if running is not None:
            for mirror_id in mirror_ids:
                self.holds.keeps(point, running.record, mirror_id=mirror_id)

    def release(self, hold: Hold, why: str) -> None:
        """End a hold; the call that it keeps goes on as far as it can."""
        if not self.holds.remove(hold, why):
            return
        if hold.reached.done():
            record = hold.reached.result()
            log.debug("operation %d (%s) is let go: %s", record.id, record.name, why, extra=about(record))
            if record.done and record.id in self.running:
                self._leave(record)
        withheld = [going for going in hold.withheld if going[0].operation_id in self.machine.operations]
        if withheld:
            self._route(withheld)
        self.pump()

    def _stays(self, point: Point, record: OperationRecord[Any], space_id: SpaceId = 0) -> bool:
        return bool(self.holds.placed) and self.holds.keeps(point, record, space_id)

    # ---- deadlines

    def _set_deadline(self, running: Running) -> None:
        running.event_s = time.monotonic()
        running.due_s, running.put_off = running.event_s + self.acknowledgement_s, False
        if self._clock is None:  # one for all: most are answered long before, and would only stop theirs
            self._clock = self._loop.call_later(self.acknowledgement_s, self._look_at_deadlines)

    def _look_at_deadlines(self) -> None:
        now_s = time.monotonic()
        try:
            for running in list(self.running.values()):
                if not 0 < running.due_s <= now_s:
                    continue
                if now_s - running.due_s > LATE_S and not running.put_off:
                    # The daemon was stopped, or busy: answers that came in time are read first.
                    running.due_s = now_s + min(GRACE_S, GRACE_PART * self.acknowledgement_s)
                    running.put_off = True
                else:
                    self._deadline(running)
        finally:
            due_s = min([running.due_s for running in self.running.values() if running.due_s], default=0.0)
            self._clock = self._loop.call_later(due_s - now_s, self._look_at_deadlines) if due_s else None

    def _deadline(self, running: Running) -> None:
        running.due_s = 0.0
        record = running.record
        if _awaits_owed_answers(record):
            self._owed_too_long(running)
        else:
            for mirror_id, sequence in self.machine.unanswered(record):
                self._too_late(record, mirror_id, sequence)
        self.pump()

    def _owed_too_long(self, running: Running) -> None:
        # Unregistering also waits for events that have deadlines of their own: only abandoned ones are owed.
        record = running.record
        waited_for = self.machine.unanswered(record)
        states = {self.machine.receivers[mirror_id].unanswered[sequence].state for mirror_id, sequence in waited_for}
        if EventState.SENT in states:
            self._set_deadline(running)
        else:
            self.machine.expire(record.id)
            self._advanced(record)

    def _too_late(self, record: OperationRecord[Any], mirror_id: MirrorId, sequence: int) -> None:
        mirror = self.machine.receivers[mirror_id]
        sent = mirror.unanswered.get(sequence)
        if sent is None or sent.state is not EventState.SENT:
            return
        if mirror.policy is DeadlinePolicy.BLOCK:
            return
        log.warning(
            "operation %d (%s): %s did not answer event %d within %g s",
            *(record.id, record.name, mirror, sequence, self.acknowledgement_s),
            extra=about(record, mirror),
        )
        if mirror.policy is DeadlinePolicy.FENCE:
            self.fence(mirror_id, f"event {sequence} was not answered within {self.acknowledgement_s:g} s", record)
        else:
            self.machine.abandon(mirror_id, sequence)
            assert self.router is not None
            self.router.settled(mirror_id, (sequence,), EventState.ABANDONED)

    # ---- the end

    async def drain(self, seconds: float) -> None:
        """Start nothing more, end all holds; wait for what runs, and after `seconds` fence whoever it waits for.

        Nobody can handle userfaults any more, or take the next step of a migration: what waits for that ends at once.
        """
        self.draining = True
        self._end_migrations()
        self._wake_handlers()
        for running in list(self.running.values()):
            if _awaited_userfaultfd(running.record):
                self._kill(running.record)
        for hold in list(self.holds.placed.values()):
            self.release(hold, "the daemon is ending")
        self.pump()
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            self._impatient = True
            self._fence_waited_for()
            self.pump()
        await self._idle.wait()

    def _fence_waited_for(self) -> None:
        for mirror in list(self.machine.receivers.values()):
            if mirror.unanswered:
                self.fence(mirror.id, "the daemon is ending")


def _tell(record: OperationRecord[Any], ended: Ended) -> None:
    milliseconds = round(ended.duration_s * 1e3, 3)
    how = {"errno": ended.error.errno if ended.error else 0, "reason": ended.reason, "duration_ms": milliseconds}
    log.debug(
        "operation %d (%s) by %s: %s after %.3f ms",
        *(record.id, record.name, record.caller.name or "unnamed", ended.error or ended.reason or "done"),
        milliseconds,
        extra=about(record) | how,
    )


def resolve(ended: asyncio.Future[None]) -> None:
    """Wake whoever waits, if anybody still does."""
    if not ended.done():
        ended.set_result(None)


def _awaited_userfaultfd(record: OperationRecord[Any]) -> int:
    return record.request.userfaultfd if isinstance(record.request, Await) else 0


def _point_of(record: OperationRecord[Any]) -> Point:
    return Point.BEFORE_EDIT if isinstance(record.request, Deliver) else Point.AFTER_WAIT


def _awaits_owed_answers(record: OperationRecord[Any]) -> bool:
    return isinstance(record.request, Await) and record.request.wait_for in (WaitFor.LATE_ANSWERS, WaitFor.CALLBACKS)
