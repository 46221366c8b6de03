"""The machine: the one door through which every input enters, and what is under way behind it.

Inputs are few, come one at a time, and can be written down: a command is started, a driver answers an event, a
mirror is fenced or an event abandoned (a deadline passed, a stream broke), an operation whose request is satisfied
is resumed.  The same inputs give the same state and the same outputs.  What has to be told to drivers collects in
the outbox.

Whoever runs a machine (local.py, scheduler.py, the server's executor) takes the outbox, feeds answers in, and
resumes what is ready, in an order of its own choosing.

**Source**: our own.

**Invariants**: an operation in `operations` waits for something; `check()` asserts all that there are (invariants.py).

**Absent**: what inputs are about (registry.py); clocks, deadlines, transport, randomness.
"""

from __future__ import annotations

import errno as errnos
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Concatenate, ParamSpec, TypeAlias, TypeVar

from hmm import invariants
from hmm.checked import Checked
from hmm.dispatch import Audience, Dispatch
from hmm.errors import (
    DeviceLostError,
    HmmError,
    OutOfFramesError,
    RangeBusyError,
    TimedOutError,
    WouldDeadlockError,
)
from hmm.events import Delivery, EventState
from hmm.frame_contents import MemoryProvider, anonymous_memory
from hmm.limits import Limits
from hmm.mirror import MirrorState
from hmm.operation import Await, Deliver, Operation, WaitFor
from hmm.operation_record import Caller, Input, OperationRecord
from hmm.receiver import note_answered, send
from hmm.registry import NOBODY, Registry
from hmm.semantics import LINUX_6_12, Semantics
from hmm.units import AddressRange, MirrorId

T = TypeVar("T")
P = ParamSpec("P")

_MAY_BE_CUT_SHORT = frozenset(
    {WaitFor.SEQUENCE, WaitFor.EDITS, WaitFor.INVALIDATIONS, WaitFor.FOLIO, WaitFor.USERFAULT}
)

Command: TypeAlias = Callable[Concatenate["Machine", P], Operation[T]]


class Machine(Registry):
    """What there is, and the operations that change it.

    Args:
        semantics: where kernels differ, which one's rules.
        recording: write every input down.
        swap_memory: gives the memory of the swap area; the default is private.
        capable: processes have CAP_SYS_ADMIN, and may inject memory failures.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        semantics: Semantics = LINUX_6_12,
        recording: bool = False,
        swap_memory: MemoryProvider = anonymous_memory,
        capable: bool = False,
    ) -> None:
        super().__init__(limits or Limits(), semantics, swap_memory, capable=capable)
        self.operations: dict[int, OperationRecord[Any]] = {}
        self.inputs: list[Input] | None = [] if recording else None
        self._inside: dict[int, OperationRecord[Any]] = {}  # operations that were called from inside callbacks
        self._outbox: list[Dispatch] = []

    # ---- inputs

    def start(self, caller: Caller, command: Command[P, T], *args: P.args, **kwargs: P.kwargs) -> OperationRecord[T]:
        """Start a command and run it to its first request or to its end.

        An error of the call is kept in the record and not raised here.  A mark that the call is made from inside a
        callback counts only for the caller's own mirrors: it makes others' calls fail.
        """
        if self.inputs is not None:
            self._note("start", caller, command, *args, **kwargs)
        if caller.callback is not None and not self.owns(caller.token, caller.callback[0]):
            caller = replace(caller, callback=None)
        record: OperationRecord[T] = OperationRecord(
            self.next_id("operation"), command.__name__, (*args, *kwargs.values()), caller,
            command(self, *args, **kwargs),
        )  # fmt: skip
        self.operations[record.id] = record
        if caller.callback is not None:
            self._inside[record.id] = record
        self._advance(record, None)
        return record

    def resume(self, operation_id: int) -> None:
        """Advance an operation whose request is satisfied to its next request or to its end."""
        if self.inputs is not None:
            self._note("resume", operation_id)
        record = self.operations[operation_id]
        assert self.is_ready(record), f"operation {operation_id} ({record.name}) is not ready"
        dispatch, record.dispatch = record.dispatch, None
        if dispatch is not None:
            note_answered(dispatch)
            if dispatch.outcomes:
                fenced = [one.mirror_id for one in dispatch.in_order() if one.state is EventState.FENCED]
                record.fenced += tuple(fenced)
        self._advance(record, dispatch, record.refusal)

    def answer(
        self,
        mirror_id: MirrorId,
        sequence: int,
        errno: int = 0,
        dirty: tuple[AddressRange, ...] = (),
        results: bytes = b"",
    ) -> None:
        """A driver's callback for one event returned `errno`.

        Repeats and late answers change nothing and are counted.

        Raises:
            InvalidRequestError: the event was never sent to this mirror, or it is a copy and `results` are not as many
                as its pages (EINVAL); it is still to be answered.
            NoSuchObjectError: there is no such mirror (ENODEV).
        """
        mirror = self.receiver(mirror_id)
        self._note("answer", mirror_id, sequence, errno, dirty, results)
        mirror.answer(sequence, errno, dirty, results)

    def acknowledge(self, answers: Sequence[tuple[MirrorId, int]]) -> None:
        """Drivers' callbacks returned 0: as many `answer`s, (mirror, event sequence) each, without more to say.

        Raises: as `answer`; those before are taken.
        """
        if self.inputs is not None:
            self._note("acknowledge", answers)
        receivers = self.receivers
        for mirror_id, sequence in answers:
            receiver = receivers.get(mirror_id) or self.receiver(mirror_id)
            receiver.answer(sequence, 0, ())

    def acknowledge_together(self, operation_id: int, mirror_ids: Sequence[MirrorId]) -> None:
        """As many `acknowledge`s of the event that an operation waits for and that several mirrors have heard.

        Args:
            mirror_ids: those who have not answered it yet, or some of them.

        Cost: O(1) when these are all of them.
        """
        self._note("acknowledge_together", operation_id, mirror_ids)
        dispatch = self.operations[operation_id].dispatch
        assert dispatch is not None
        assert len(dispatch.sequences) > 1, "what one alone was sent it answers by number"
        dispatch.acknowledge(mirror_ids)

    def fence(self, mirror_id: MirrorId, why: str) -> None:
        """Give a mirror up: its table is dropped and no operation waits for it any longer."""
        mirror = self.receivers[mirror_id]
        self._note("fence", mirror_id, why)
        for migration in self.migrations_of(mirror_id):
            migration.end(DeviceLostError(f"{migration}: {mirror} was fenced: {why}"))
        mirror.release(MirrorState.LOST, why)
        for sequence in mirror.unanswered:
            mirror.finish(sequence, EventState.FENCED)
        mirror.forget_answers()

    def abandon(self, mirror_id: MirrorId, sequence: int) -> None:
        """Stop waiting for one answer; the operation fails with ETIMEDOUT (policy FAIL)."""
        self._note("abandon", mirror_id, sequence)
        self.receivers[mirror_id].finish(sequence, EventState.ABANDONED)

    def expire(self, operation_id: int) -> None:
        """An operation has waited too long for the answers to abandoned events: it fails with ETIMEDOUT."""
        self._note("expire", operation_id)
        record = self.operations[operation_id]
        assert isinstance(record.request, Await), record.request
        assert record.request.wait_for in (WaitFor.LATE_ANSWERS, WaitFor.CALLBACKS), record.request
        late = ", ".join(f"mirror {mirror_id}" for mirror_id, _ in self.unanswered(record))
        error = TimedOutError(f"{record.name}: {late} still owes the answer to an abandoned event")
        self._advance(record, None, error)

    def time_out(self, operation_id: int) -> None:
        """The patience of a range fault's caller has ended: it ends with EBUSY where it waits, or when it would retry.

        What waits for drivers' answers goes on: events that are out are waited for to the end.
        """
        self._note("time_out", operation_id)
        record = self.operations[operation_id]
        record.timed_out = True
        if isinstance(record.request, Await) and record.request.wait_for in _MAY_BE_CUT_SHORT:
            self._advance(record, None, self._out_of_patience(record))

    def kill(self, operation_id: int) -> None:
        """The caller of an operation has gone, as a thread that gets SIGKILL: it does not wait for a userfault (EINTR).

        What waits for anything else goes on.
        """
        self._note("kill", operation_id)
        record = self.operations[operation_id]
        record.killed = True
        if record.waits_for_handler:
            self._advance(record, None, self._out_of_patience(record))

    def end_migration(self, number: int, why: str) -> None:
        """End a migration that waits for its driver for too long: its pages are where they were (ETIMEDOUT)."""
        self._note("end_migration", number, why)
        migration = self.migrations[number]
        migration.end(TimedOutError(f"{migration}: {why}", reason="LEASE_ENDED"))

    def take_dispatches(self) -> list[Dispatch]:
        """The events to be sent now, in order; each is handed out once."""
        outbox, self._outbox = self._outbox, []
        return outbox

    def take_outbox(self) -> list[Delivery]:
        """As `take_dispatches`, for each mirror."""
        return [delivery for dispatch in self.take_dispatches() for delivery in dispatch.deliveries()]

    # ---- running operations

    def is_ready(self, record: OperationRecord[Any]) -> bool:
        """Whether what the operation waits for has come about."""
        request = record.request
        if record.done or request is None:
            return False
        if record.refusal is not None:
            return True
        if isinstance(request, Deliver):
            return record.dispatch is not None and not record.dispatch.waiting
        return not isinstance(request, Await) or self._holds(request)

    def _holds(self, request: Await) -> bool:  # noqa: PLR0911 - one for each condition
        match request.wait_for:
            case WaitFor.CALLBACKS:
                mirror = self.receivers.get(request.mirror_id)
                return mirror is None or (mirror.low_water >= request.ticket and not mirror.leaving)
            case WaitFor.MEMORY:
                return self.reclaim.ended != request.ticket
            case WaitFor.FOLIO:
                return not self.frames.locks.holders(request.ticket)
            case WaitFor.DRIVER | WaitFor.STEP:
                migration = self.migrations.get(request.ticket)
                return migration is None or migration.is_ready(request.wait_for)
            case WaitFor.FILE:
                file = self.files.get(request.file_id)
                return file is None or not file.locked_by
            case WaitFor.USERFAULT:
                space = self.spaces.get(request.space_id)
                return space is None or not space.awaits_handler(request)
            case _:
                notifier = self.notifiers.get(request.space_id)
                return notifier is None or notifier.is_ready(request)

    def ready(self) -> list[OperationRecord[Any]]:
        """The operations that may be resumed now, oldest first.  Cost: O(operations that wait)."""
        return [record for record in self.operations.values() if self.is_ready(record)]

    def blockers(self, record: OperationRecord[Any]) -> list[int]:  # noqa: PLR0911 - one for each condition
        """The operations that this one waits for directly, not counting drivers' answers."""
        request = record.request
        if not isinstance(request, Await):
            return []
        match request.wait_for:
            case WaitFor.CALLBACKS:
                receiver = self.receivers.get(request.mirror_id)
                return [] if receiver is None or receiver.leaving in (0, record.id) else [receiver.leaving]
            case WaitFor.MEMORY:
                return list(self.reclaim.running)
            case WaitFor.FOLIO:
                return self.frames.locks.holders(request.ticket)
            case WaitFor.STEP:
                migration = self.migrations.get(request.ticket)
                return [] if migration is None else [migration.operation_id]
            case WaitFor.FILE:
                file = self.files.get(request.file_id)
                return [file.locked_by] if file is not None and file.locked_by else []
            case _:
                notifier = self.notifiers.get(request.space_id)
                return notifier.blockers(request) if notifier else []

    def unanswered(self, record: OperationRecord[Any]) -> list[tuple[MirrorId, int]]:
        """The (mirror, event sequence) pairs that the operation waits for directly."""
        request = record.request
        if record.dispatch is not None:
            return record.dispatch.unanswered()
        if not isinstance(request, Await) or request.wait_for not in (WaitFor.CALLBACKS, WaitFor.LATE_ANSWERS):
            return []
        receiver = self.receivers.get(request.mirror_id)
        if receiver is None:
            return []
        return [
            (request.mirror_id, sequence)
            for sequence, sent in receiver.unanswered.items()
            if sequence <= request.ticket or sent.state is EventState.ABANDONED or receiver.leaving
        ]

    def _advance(self, record: OperationRecord[T], reply: object, thrown: HmmError | None = None) -> None:
        self.current.operation_id = record.id
        self.current.stretch += 1
        self.caller = record.caller
        record.refusal = None
        generator = record.generator
        try:
            request = record.request = generator.throw(thrown) if thrown else generator.send(reply)
            while (error := self._refusal(record)) is not None:
                request = record.request = generator.throw(error)
        except StopIteration as stop:
            record.value = stop.value
            self._finished(record)
        except Exception as error:  # noqa: BLE001 - if it is a bug of ours: the caller sees INTERNAL, the space is broken
            record.value, record.error = None, error
            if isinstance(error, OutOfFramesError):
                self.frames.fail_allocation(0)  # an injected failure has been met
            self._finished(record)
        else:
            if isinstance(request, Deliver):
                self._deliver(record, request)
        self.current.operation_id = 0
        self.caller = NOBODY
        if self._inside:
            self._refuse_circles()

    def _refuse_circles(self) -> None:
        # A call that waited behind one that could end may find itself waiting for its own callback later.
        for record in self._inside.values():
            if isinstance(record.request, Await) and record.refusal is None and self.waits_for_itself(record):
                record.refusal = self._deadlock(record)

    def _finished(self, record: OperationRecord[Any]) -> None:
        record.request, record.done = None, True
        del self.operations[record.id]
        if self._inside:
            self._inside.pop(record.id, None)

    def _refusal(self, record: OperationRecord[Any]) -> HmmError | None:
        """Why an operation may not wait as it is about to."""
        request = record.request
        if isinstance(request, Deliver):
            return None
        if (record.killed or record.timed_out) and record.waits_for_handler:
            return self._out_of_patience(record)
        if record.caller.callback is not None and self.waits_for_itself(record):
            return self._deadlock(record)
        return None

    def _out_of_patience(self, record: OperationRecord[Any]) -> HmmError:
        request = record.request
        assert isinstance(request, Await)
        what = f"{record.name}: {request.spans[0]}" if request.spans else record.name
        if record.killed:
            return TimedOutError(f"{what} had no handler until its caller went", errnos.EINTR, reason="KILLED")
        return RangeBusyError(f"{what}: the range was busy until the deadline")

    def _deadlock(self, record: OperationRecord[Any]) -> WouldDeadlockError:
        assert record.caller.callback is not None
        mirror_id, sequence = record.caller.callback
        chain = ", ".join(f"operation {blocker}" for blocker in self.blockers(record)) or "this callback"
        return WouldDeadlockError(
            f"{record.name}: called from inside the callback for event {sequence} of mirror {mirror_id}, it would wait "
            f"for {chain}, which waits for that callback"
        )

    def waits_for_itself(self, record: OperationRecord[Any]) -> bool:
        """Whether an operation can never finish: it waits, through others and their callbacks, for itself.

        An operation waits for others and for drivers' answers; a driver answers when the calls made from inside its
        callback have ended.
        """
        inside: dict[tuple[MirrorId, int], list[int]] = {}
        for other in self._inside.values():
            assert other.caller.callback is not None
            inside.setdefault(other.caller.callback, []).append(other.id)
        seen: set[int] = set()
        queue = [record]
        while queue:
            waiting = queue.pop()
            following = self.blockers(waiting)
            for answer in self.unanswered(waiting):
                following += inside.get(answer, [])
            if record.id in following:
                return True
            fresh = [number for number in following if number not in seen and number in self.operations]
            seen.update(fresh)
            queue += [self.operations[number] for number in fresh]
        return False

    def _deliver(self, record: OperationRecord[Any], request: Deliver) -> None:
        receivers, mirror_ids = self.receivers, request.mirrors
        first = receivers[mirror_ids[0]]
        audience = first.alone if len(mirror_ids) == 1 else first.space.notifier.audience_named(mirror_ids)
        if audience is not None:
            record.dispatch = send(request.event, audience, record.id)
        else:
            audience = Audience(tuple([receivers[mirror_id] for mirror_id in mirror_ids]))
            record.dispatch = send(request.event, audience, record.id)
            audience.fold()  # nobody else knows of it
        self._outbox.append(record.dispatch)

    def reply(self, value: object) -> None:
        """Give the caller of the operation that is being advanced its value; the operation goes on."""
        record = self.operations[self.current.operation_id]
        record.value, record.replied = value, True
        self._inside.pop(record.id, None)

    def _note(self, method: str, /, *args: Any, **kwargs: Any) -> None:
        if self.inputs is not None:
            self.inputs.append(Input(method, args, tuple(kwargs.items())))

    @property
    def is_timed_out(self) -> bool:
        """Whether the patience of the caller of the operation that is being advanced has ended."""
        return self.operations[self.current.operation_id].timed_out

    def check(self, checked: Checked | None = None) -> None:
        """Assert every invariant (invariants.py).  Cost: O(everything mapped).

        Args:
            checked: what earlier checks of this machine saw; what has not changed since is not checked again.
        """
        invariants.check(self, self.operations.values(), checked or Checked())
