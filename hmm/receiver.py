"""Who receives events: the numbering, the answers and the life of one driver's tie to one address space.

What the mirrors of 2015 (mirror.py) and the interval notifiers of today (interval_notifier.py) have in common.
Events are numbered densely per receiver; each reaches one final state; `low_water` says up to where all have.  What
was sent to many is kept once for all of them, with the notifier of their address space (dispatch.py); here is what
was sent to one alone, and what it owes.

**Source**: our own; it stands for the certainty that a function call gives inside one kernel.

**Invariants**: event sequences are dense and each has one final state; the low-water mark is monotone; revisions
ascend with sequences.

**Absent**: which events are heard and what they do (the subclasses), transport, deadlines.
"""

from __future__ import annotations

import errno as errnos
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum

from hmm import pte
from hmm.address_space import AddressSpace
from hmm.checked import Checked
from hmm.device import Device
from hmm.dispatch import Audience, Dispatch
from hmm.errors import DeviceLostError, InvalidRequestError, NoSuchObjectError
from hmm.events import IS_INVALIDATION, TAKES, Delivery, Event, EventState, EventType
from hmm.operation import Await, WaitFor
from hmm.sanitizer import History, Reports, kind_of_stale
from hmm.spans import Spans, overlap
from hmm.subscriber import Home
from hmm.units import WHOLE_SPACE, Address, AddressRange, MirrorId, ProcessId
from hmm.violation import Taking, Violation, ViolationKind

__all__ = ["EVENTS_OF", "DeadlinePolicy", "MirrorState", "Receiver"]

EVENTS_OF = tuple(f"events_{etype.name.lower()}" for etype in EventType)
"""The counter of events of each type."""


class DeadlinePolicy(Enum):
    """What happens when a driver does not answer in time."""

    FENCE = "fence"
    BLOCK = "block"
    FAIL = "fail"


class MirrorState(Enum):
    """LIVE until released (by exit, unregistering or its own error) or lost (fenced)."""

    LIVE = "live"
    RELEASED = "released"
    LOST = "lost"


@dataclass(slots=True, eq=False)
class Receiver(ABC):
    """One driver's tie to the address space of one process.

    Attributes:
        owner: the token of whoever registered it.
        sequence: of the last event sent.
        leaving: the operation that is about to release it: it still hears of changes and gives up what it has, but gets
            nothing new.  0: none.
        counters: some of `counted`; see there.
        lenient: a refused access succeeds for the device, which reads ones and whose writes go nowhere, as behind an
            IOMMU; False: it fails.
        lost_because: why it was fenced, or ended by its own error.
        history: what its driver gave up lately.
        reports: what its device did that it must not.
        home: its part of its device's memory.
        failing_allocation: the nth allocation from now on fails that is made to migrate pages for it; 0: none.  For
            tests.
    """

    id: MirrorId
    device: Device
    space: AddressSpace
    process_id: ProcessId
    owner: str
    policy: DeadlinePolicy = DeadlinePolicy.FENCE
    state: MirrorState = MirrorState.LIVE
    lost_because: str = ""
    leaving: int = 0
    sequence: int = 0
    counters: Counter[str] = field(default_factory=Counter)
    lenient: bool = False
    history: History = field(default_factory=History)
    reports: Reports = field(default_factory=Reports)
    home: Home | None = None
    failing_allocation: int = 0
    _owed: dict[int, Dispatch] = field(default_factory=dict)  # sent to it alone, or abandoned
    _alone: Audience | None = None

    def __str__(self) -> str:
        return f"mirror {self.id} ({self.device.name})"

    @property
    def span(self) -> AddressRange:
        """All addresses of the address space."""
        return WHOLE_SPACE

    # ---- the life cycle

    def require_live(self, operation: str = "") -> None:
        """Raise unless the driver still hears.

        Args:
            operation: what it is for; empty where who called knows that (`HmmError.named`).

        Raises:
            DeviceLostError: it was fenced (ENODEV).
            NoSuchObjectError: it was released: its process exited, or its own error killed it (ENODEV).
        """
        if self.state is MirrorState.LIVE:
            return
        who = f"{operation}: {self}" if operation else str(self)
        if self.state is MirrorState.LOST:
            raise DeviceLostError(f"{who} was fenced: {self.lost_because}")
        why = f": {self.lost_because}" if self.lost_because else ""
        raise NoSuchObjectError(f"{who} was released{why}", errnos.ENODEV)

    def require_access(self, address: Address, *, write: bool, since: int | None) -> None:
        """Raise unless a device may still access anything.

        Raises: as `require_live`, with `error.violation`.
        """
        try:
            self.require_live("device access")
        except DeviceLostError as error:
            kind = ViolationKind.ACCESS_AFTER_FENCE
            error.violation = self.report(kind, address, 1, write=write, taking=self.taken_by(address, pte.VALID))
            raise
        except NoSuchObjectError as error:
            error.violation = self.report_stale(address, 1, pte.VALID, write=write, since=since)
            raise

    def taken_by(self, address: Address, bits: int) -> Taking | None:
        """What took some of `bits` of the entry of an address last, as `History.last`."""
        return self.history.last(self.id, address, bits, self.unsettled, self.space.notifier.past)

    def report(
        self, kind: ViolationKind, address: Address, pages: int, *, write: bool, taking: Taking | None
    ) -> Violation:
        """Note what the device did that it must not; `address` is of the first of so many pages."""
        operation_id = self.space.notifier.current.operation_id
        violation = Violation(
            kind, self.id, self.device.id, self.device.name, address, pages, write, operation_id, taking
        )  # fmt: skip
        self.reports.add(violation)
        return violation

    def report_stale(self, address: Address, pages: int, bits: int, *, write: bool, since: int | None) -> Violation:
        """As `report`, of an access whose translation lacks some of `bits`; history says what took them."""
        taking = self.taken_by(address, bits)
        kind = kind_of_stale(taking, since)
        if bits == pte.WRITE and kind is not ViolationKind.EARLY_ACKNOWLEDGEMENT:
            kind = ViolationKind.READ_ONLY_WRITE  # it had the page and has it still
        return self.report(kind, address, pages, write=write, taking=taking)

    def release(self, state: MirrorState, why: str = "") -> None:
        """Stop hearing: no further events."""
        self.leaving = 0
        if self.state is not MirrorState.LIVE:
            return
        self.space.notifier.unsubscribe(self.id)
        self.state = state
        self.lost_because = why

    # ---- what the notifier needs of a subscriber

    def kill(self) -> None:
        """Unsubscribe for good: the driver has been told to give everything up."""
        self.release(MirrorState.RELEASED, self.lost_because)

    @abstractmethod
    def hears(self, event: Event) -> bool:
        """Whether this event has to be delivered."""

    def awaits_late_answer(self) -> bool:
        """True while an abandoned event is unanswered: nothing new is sent before that."""
        return bool(self.abandoned)

    @property
    def abandoned(self) -> list[Dispatch]:
        """The events that it has still to answer and nobody waits for any more."""
        return [sent for sent in self._owed.values() if sent.state_of(self.id) is EventState.ABANDONED]

    @property
    def is_selective(self) -> bool:
        """Whether it has to be asked about every event."""
        return False

    @property
    def may_abandon(self) -> bool:
        """Whether a change that it does not answer in time is not made (policy FAIL)."""
        return self.policy is DeadlinePolicy.FAIL

    def settling(self, spans: Spans) -> list[int]:
        """The operations that have told it of a change of these ranges that has not been made yet."""
        return [sent.operation_id for sent in self.unsettled.values() if overlap(sent.event.spans, spans)]

    def has_two_passes(self, event: Event) -> bool:  # noqa: ARG002 - for those who override it
        """Whether the driver may only start with what `event` asks for, and finish when all have started."""
        return False

    def holds(self, spans: Spans) -> bool:  # noqa: ARG002 - for those who keep a table
        """Whether there is anything that a change of these ranges may concern."""
        return True

    @abstractmethod
    def settle(self, delivery: Delivery) -> bool:
        """Apply a final state; False when the driver's own error is its end."""

    def heard_late(self, event: Event, dirty: tuple[AddressRange, ...]) -> None:  # noqa: B027 - nothing for most
        """An abandoned event was answered after all; the change that it told of was not made."""

    # ---- numbering and answers

    @property
    def alone(self) -> Audience:
        """This one and nobody else."""
        if self._alone is None:
            self._alone = Audience((self,))
        return self._alone

    def prepare(self, event: Event) -> None:  # noqa: B027 - nothing for most
        """An event is about to be sent to it; called of those who are selective."""

    def note_sent(self, dispatch: Dispatch) -> None:
        """An event is on its way to it alone."""
        self._owed[self.sequence] = dispatch
        self.counters[EVENTS_OF[dispatch.event.etype]] += 1

    @property
    def owes(self) -> bool:
        """Whether the driver has still to answer an event, abandoned ones included."""
        running = self.space.notifier.dispatches
        return bool(self._owed) or (bool(running) and any(self.id in sent.waiting for sent in running))

    def callbacks(self) -> Await:
        """The wait for its callbacks that run.  Not for later ones: a busy process would keep its mirror for ever."""
        return Await(WaitFor.CALLBACKS, self.space.id, ticket=self.sequence, mirror_id=self.id)

    @property
    def unanswered(self) -> dict[int, Delivery]:
        """The events that the driver has still to answer, abandoned ones included, by sequence, ascending."""
        owed = dict(self._owed)
        owed.update((sent.sequence_of(self.id), sent) for sent in self._dispatches() if self.id in sent.waiting)
        return {sequence: owed[sequence].delivery(self.id) for sequence in sorted(owed)}

    @property
    def unsettled(self) -> dict[int, Delivery]:
        """The invalidations that were sent and whose effect is not applied yet; others may still have to answer."""
        if not self.space.notifier.dispatches or self.state is not MirrorState.LIVE:
            return {}
        sent = [one.delivery(self.id) for one in self._dispatches() if IS_INVALIDATION[one.event.etype]]
        return {one.sequence: one for one in sent if one.state not in (EventState.FENCED, EventState.ABANDONED)}

    @property
    def low_water(self) -> int:
        """Up to here it has answered everything."""
        return next(iter(self.unanswered), self.sequence + 1) - 1

    def _dispatches(self) -> list[Dispatch]:
        return [sent for sent in self.space.notifier.dispatches if self.id in sent.audience.index]

    def _find(self, sequence: int) -> Dispatch | None:
        """The event of that number, if it is still to be answered."""
        owed = self._owed.get(sequence)
        if owed is not None:
            return owed
        for sent in self.space.notifier.dispatches:
            if self.id in sent.waiting and sent.sequence_of(self.id) == sequence:
                return sent
        return None

    def counted(self) -> Counter[str]:
        """Everything that was counted: events by type and by outcome, faults, bytes, ..."""
        self.space.notifier.fold()
        counted = Counter(self.counters)
        waiting = sum(sent.state is EventState.SENT for sent in self.unanswered.values())
        others = sum(counted[state.value] for state in (EventState.REFUSED, EventState.FENCED, EventState.ABANDONED))
        counted[EventState.ACKNOWLEDGED.value] = self.sequence - waiting - others
        return +counted

    def answer(self, sequence: int, errno: int, dirty: tuple[AddressRange, ...], results: bytes = b"") -> None:
        """Record a driver's answer; one that was given before, or comes too late, changes nothing.

        Raises:
            InvalidRequestError: the event was never sent to this receiver, or it wants a result for each page (EINVAL).
        """
        if not 0 < sequence <= self.sequence:
            raise InvalidRequestError(
                f"acknowledge: event {sequence} was never sent to {self}; the last one is {self.sequence}"
            )
        sent = self._find(sequence)
        if sent is None:
            self.counters["repeated_answers"] += 1
            return
        event = sent.event
        if sent.outcomes and sent.state_of(self.id) is EventState.ABANDONED:
            self.counters["late_answers"] += 1
            self._forget(sequence)
            self.heard_late(event, dirty)
            return
        wanted = event.npages if event.copy and not errno else 0
        if len(results) != wanted and not errno:
            raise InvalidRequestError(
                f"acknowledge: event {sequence} of {self} wants {wanted} results and got {len(results)}"
            )
        unfinished = errno == errnos.EINPROGRESS and self.has_two_passes(event)
        state = EventState.ACKNOWLEDGED
        if errno == errnos.EAGAIN and not event.blockable and not event.finishes:
            # Only the OOM reaper's events may be refused; elsewhere an error is an answer, and kills the mirror.
            state = EventState.REFUSED
            self.counters[state._value_] += 1
        elif errno:
            errno = 0 if unfinished else self._accepted(errno)
        if state is not EventState.ACKNOWLEDGED or errno or dirty or results or unfinished:
            sent.outcomes[self.id] = Delivery(
                self.id, sequence, event, sent.operation_id, state, errno, dirty, results, unfinished
            )
        sent.waiting.remove(self.id)
        self._owed.pop(sequence, None)
        if len(sent.sequences) == 1 and TAKES[event.etype] and sent.acknowledged_as(self.id):
            self.history.add(sent.delivery(self.id))

    def finish(self, sequence: int, state: EventState) -> None:
        """Give an unanswered event a final state other than a driver's answer (fenced, abandoned)."""
        sent = self._find(sequence)
        if sent is None or self.id not in sent.waiting:
            return
        sent.waiting.remove(self.id)
        sent.outcomes[self.id] = Delivery(self.id, sequence, sent.event, sent.operation_id, state)
        self.counters[state._value_] += 1
        if state is EventState.ABANDONED:
            self._owed[sequence] = sent
            self.space.notifier.owing.add(self.id)
        else:
            self._owed.pop(sequence, None)

    def forget_answers(self) -> None:
        """No answer counts any more."""
        for sequence in list(self._owed):
            self._forget(sequence)

    def _forget(self, sequence: int) -> None:
        del self._owed[sequence]
        if not self.awaits_late_answer():
            self.space.notifier.owing.discard(self.id)

    def _accepted(self, errno: int) -> int:
        # hmm_mirror_update(): of errors ENOMEM and EIO are documented; others are warned of and become EIO.
        if errno in (errnos.ENOMEM, errnos.EIO):
            return errno
        self.counters["undocumented_errors"] += 1
        return errnos.EIO

    def check(self, _: Checked) -> None:
        """Assert the invariants of the numbering."""
        assert self.state is not MirrorState.LOST or not self.owes, f"{self} is lost and owes answers"
        assert all(0 < sequence <= self.sequence for sequence in self.unanswered), f"{self} owes what was never sent"
        assert (self.id in self.space.notifier.owing) == self.awaits_late_answer(), f"{self}: is an answer owed?"


def send(event: Event, audience: Audience, operation_id: int) -> Dispatch:
    """Number an event, for each of an audience densely from 1, and note that it is on its way."""
    receivers = audience.receivers
    for receiver in audience.selective:
        receiver.prepare(event)
    first = receivers[0]
    if len(receivers) == 1:
        first.sequence += 1
        dispatch = Dispatch(event, operation_id, audience, [first.sequence], {first.id})
        first.note_sent(dispatch)
    else:
        for receiver in receivers:
            receiver.sequence += 1
        sequences = [receiver.sequence for receiver in receivers]
        dispatch = Dispatch(event, operation_id, audience, sequences, set(audience.everybody))
        audience.counters[EVENTS_OF[event.etype]] += 1
    first.space.notifier.note_sent(dispatch)
    return dispatch


def note_answered(dispatch: Dispatch) -> None:
    """All have answered, and what that means is done before anything else happens."""
    if len(dispatch.sequences) > 1 or IS_INVALIDATION[dispatch.event.etype]:
        dispatch.audience.receivers[0].space.notifier.dispatches.remove(dispatch)
