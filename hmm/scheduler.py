"""The seeded scheduler: interleaves operations and drivers' answers, checks every invariant after every step.

Each step is one choice among everything that could happen next: start a call, resume an operation that is ready,
let a driver answer one of the events it has, lose a driver, let a caller go, or a lease end.  Choices come in through
`choose(n)`, a number from 0 to n-1, so that a seed is a whole run and a run can be replayed, enumerated or shortened.

**Source**: our own; the idea is that of deterministic simulation testing.

**Invariants**: the same choices make the same run.

**Absent**: what is called (the workload decides), randomness, time.
"""

from __future__ import annotations

import errno as errnos
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from hmm import commands_hmm
from hmm.checked import Checked
from hmm.events import Delivery, Event, EventState, EventType
from hmm.machine import Machine
from hmm.mirror import DeadlinePolicy, MirrorState
from hmm.operation import Await, WaitFor
from hmm.operation_record import Caller, OperationRecord
from hmm.receiver import Receiver
from hmm.testing_coverage import Coverage
from hmm.units import MirrorId

Choose = Callable[[int], int]


@dataclass(frozen=True, slots=True)
class Call:
    """A command to be started, with its arguments."""

    command: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


class StuckError(AssertionError):
    """Operations wait and nothing that could happen would let them go on: a deadlock of the model."""


@dataclass(frozen=True, slots=True)
class Odds:
    """How often drivers misbehave, each as one choice in so many; 0 for never.

    Attributes:
        refuse: answer with an error.
        lose: never answer; the deadline passes and the mirror's policy decides.
        repeat: answer once more.
        start_only: only start with an event, where there is a second pass.
        inside: make a call from inside a callback, which is answered when the call has ended.
        deny: refuse what may be refused, an event that must not block.
        kill: the caller of what waits for a userfaultfd's handler is killed, before that one does anything.
        leave: the caller of a call that did not end at once is killed some time.
        impatient: the caller of a range fault that did not end at once has a deadline.
        lapse: the lease of a migration ends as it waits for its driver.
    """

    refuse: int = 25
    lose: int = 15
    repeat: int = 20
    inside: int = 5
    start_only: int = 2
    deny: int = 3
    kill: int = 10
    leave: int = 15
    impatient: int = 2
    lapse: int = 100


@dataclass(slots=True, eq=False)
class Scheduler:
    """Runs a workload on a machine, one choice at a time.

    Attributes:
        workload: the next call to be started, or None when there is nothing more to start.
        finished: called with each operation that ended.
        sending: called with each event on its way to a driver.
        checking: called after every step, beside the machine's own check.
        answering: called before a driver's answer to a delivery is given, with its errno; the driver's model reacts
            here, and returns the results of a copy.
        handling: what the handler of a userfaultfd does about an operation that waits for it; None: nothing, and the
            operation is killed.
        parallel: how many operations may be under way at once.
        coverage: what happened so far.
    """

    machine: Machine
    choose: Choose
    workload: Iterator[Call]
    finished: Callable[[OperationRecord[Any]], None] = lambda _: None
    sending: Callable[[Delivery], None] = lambda _: None
    answering: Callable[[Delivery, int], bytes] = lambda _, __: b""
    handling: Callable[[OperationRecord[Any]], Call | None] = lambda _: None
    checking: Callable[[], None] = lambda: None
    parallel: int = 4
    odds: Odds = field(default_factory=Odds)
    coverage: Coverage = field(default_factory=Coverage)
    mailboxes: dict[MirrorId, list[Delivery]] = field(default_factory=dict)
    running: list[OperationRecord[Any]] = field(default_factory=list)
    checked: Checked = field(default_factory=Checked)
    _exhausted: bool = False
    _abandoned: set[tuple[MirrorId, int]] = field(default_factory=set)
    _leaving: list[OperationRecord[Any]] = field(default_factory=list)

    def run(self, limit: int = 100_000) -> None:
        """Run until the workload is exhausted and every operation has ended.

        Raises:
            StuckError: nothing can happen any more although operations wait.
            AssertionError: an invariant does not hold, or `limit` steps were not enough.
        """
        while self.step():
            assert self.coverage.steps < limit, f"{limit} steps and still running: {self._describe()}"

    def go_on(self, workload: Iterator[Call]) -> None:
        """Run more calls when all others have ended.  Raises: as `run`."""
        self.workload, self._exhausted = workload, False
        self.run()

    @property
    def steps(self) -> int:
        """Choices made so far."""
        return self.coverage.steps

    def step(self) -> bool:
        """Make one choice and check everything.  Returns: False when all is done."""
        self._collect()
        options = self._options()
        if not options:
            if self.running:
                raise StuckError(f"nothing can happen any more: {self._describe()}")
            return False
        options[self.choose(len(options))]()
        self.coverage.steps += 1
        self._collect()
        self.machine.check(self.checked)
        self.checking()
        return True

    def _collect(self) -> None:
        for delivery in self.machine.take_outbox():
            self.mailboxes.setdefault(delivery.mirror_id, []).append(delivery)
            self.coverage.sent(delivery, self.machine.receivers.get(delivery.mirror_id))
            self.sending(delivery)
        for record in [record for record in self.running if record.done]:
            self.running.remove(record)
            if record.error is not None and not hasattr(record.error, "errno"):
                raise record.error
            self.coverage.ended(record)
            self.finished(record)

    def _options(self) -> list[Callable[[], None]]:
        options: list[Callable[[], None]] = []
        if sum(not record.replied for record in self.running) < self.parallel and not self._exhausted:
            options.append(self._start)
        options += [partial(self.machine.resume, record.id) for record in self.machine.ready()]
        options += [partial(self._answer, mirror_id) for mirror_id in self.mailboxes if self._answerable(mirror_id)]
        options += [
            partial(self.machine.expire, record.id) for record in self.running if self._waits_for_owed_answers(record)
        ]
        unhandled = [one for one in self.running if one.waits_for_handler and not self.machine.is_ready(one)]
        options += [partial(self._handle, record) for record in unhandled]
        options += [partial(self._lapse, number) for number, one in self.machine.migrations.items() if one.is_idle]
        options += [partial(self._leave, record) for record in self._leaving if not record.done]
        return options

    def _answerable(self, mirror_id: MirrorId) -> list[Delivery]:
        # A driver answers an event when the calls made from inside its callback have ended.
        busy = [record.caller.callback for record in self.running if not record.replied]
        return [one for one in self.mailboxes[mirror_id] if (one.mirror_id, one.sequence) not in busy]

    def _waits_for_owed_answers(self, record: OperationRecord[Any]) -> bool:
        request = record.request
        if not isinstance(request, Await) or request.wait_for not in (WaitFor.LATE_ANSWERS, WaitFor.CALLBACKS):
            return False
        owed = self.machine.unanswered(record)
        receivers = self.machine.receivers
        return bool(owed) and all(
            receivers[mirror_id].unanswered[sequence].state is EventState.ABANDONED for mirror_id, sequence in owed
        )

    def _start(self) -> None:
        call = next(self.workload, None)
        if call is None:
            self._exhausted = True
            return
        caller = Caller(name="simulation", callback=self._callback())
        record = self.machine.start(caller, call.command, *call.arguments, **call.options)
        self.running.append(record)
        has_deadline = call.command is commands_hmm.range_fault_unlocked
        if not record.done and self._happens(self.odds.impatient if has_deadline else self.odds.leave):
            self._leaving.append(record)

    def _callback(self) -> tuple[MirrorId, int] | None:
        handled = [delivery for waiting in self.mailboxes.values() for delivery in waiting]
        if not handled or not self._happens(self.odds.inside):
            return None
        delivery = handled[self.choose(len(handled))]
        return delivery.mirror_id, delivery.sequence

    def _handle(self, record: OperationRecord[Any]) -> None:
        call = None if self._happens(self.odds.kill) else self.handling(record)
        if call is None:
            self.coverage.callers["killed as it waited for a handler"] += 1
            self.machine.kill(record.id)
        else:
            handler = Caller(name="handler")
            self.running.append(self.machine.start(handler, call.command, *call.arguments, **call.options))

    def _lapse(self, number: int) -> None:
        if self._happens(2 if self._exhausted else self.odds.lapse):
            self.coverage.callers["driver was too slow"] += 1
            self.machine.end_migration(number, "its driver was too slow")

    def _leave(self, record: OperationRecord[Any]) -> None:
        self._leaving.remove(record)
        if record.name == commands_hmm.range_fault_unlocked.__name__:
            self.coverage.callers["out of patience"] += 1
            self.machine.time_out(record.id)
        else:
            self.coverage.callers["killed"] += 1
            self.machine.kill(record.id)

    def _answer(self, mirror_id: MirrorId) -> None:
        # A driver may answer its events in any order.
        waiting = self._answerable(mirror_id)
        delivery = waiting[self.choose(len(waiting))]
        self.mailboxes[mirror_id].remove(delivery)
        mirror = self.machine.receivers.get(mirror_id)
        if mirror is None or mirror.state is MirrorState.LOST:
            return
        if self._happens(self.odds.lose):
            self.coverage.answers[f"lost, {mirror.policy.value}"] += 1
            self._lose(delivery, mirror.policy)
            return
        late = (mirror_id, delivery.sequence) in self._abandoned
        errno = self._errno(mirror, delivery.event)
        results = self.answering(delivery, errno)
        self.machine.answer(mirror_id, delivery.sequence, errno, results=results)
        self.coverage.answers["late" if late else errnos.errorcode.get(errno, "done")] += 1
        if self._happens(self.odds.repeat) and mirror_id in self.machine.receivers:
            self.coverage.answers["repeated"] += 1
            self.machine.answer(mirror_id, delivery.sequence)

    def _errno(self, mirror: Receiver, event: Event) -> int:
        if mirror.has_two_passes(event) and self._happens(self.odds.start_only):
            return errnos.EINPROGRESS
        if not event.blockable and not event.finishes and self._happens(self.odds.deny):
            return errnos.EAGAIN
        refusing = event.etype is not EventType.RELEASE and self._happens(self.odds.refuse)
        return errnos.EIO if refusing else 0

    def _lose(self, delivery: Delivery, policy: DeadlinePolicy) -> None:
        if policy is DeadlinePolicy.FENCE:
            self.machine.fence(delivery.mirror_id, "no answer in time")
        elif policy is DeadlinePolicy.FAIL:
            self.machine.abandon(delivery.mirror_id, delivery.sequence)
            self._abandoned.add((delivery.mirror_id, delivery.sequence))
            self.mailboxes[delivery.mirror_id].append(delivery)
        else:
            self.mailboxes[delivery.mirror_id].append(delivery)

    def _happens(self, one_in: int) -> bool:
        return bool(one_in) and self.choose(one_in) == 0

    def _describe(self) -> str:
        return "; ".join(f"{record.name}{record.arguments} waits for {record.request}" for record in self.running)
