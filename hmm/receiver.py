"""Who receives events: the numbering, the answers and the life of one driver's tie to one address space.

What the mirrors of 2015 (mirror.py) and the interval notifiers of today (interval_notifier.py) have in common.
Events are numbered densely per receiver; each reaches one final state; `low_water` says up to where all have.

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
from hmm.errors import DeviceLostError, InvalidRequestError, NoSuchObjectError
from hmm.events import IS_INVALIDATION, Delivery, Event, EventState, EventType
from hmm.notifier import Home
from hmm.sanitizer import History, Reports, kind_of_stale
from hmm.spans import Spans, overlap
from hmm.units import TASK_SIZE, Address, AddressRange, MirrorId, ProcessId
from hmm.violation import Taking, Violation, ViolationKind

__all__ = ["DeadlinePolicy", "MirrorState", "Receiver"]

_EVENTS_OF = tuple(f"events_{etype.name.lower()}" for etype in EventType)
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
        revision: of the last event of this address space that was sent; pages on a device may be touched from others.
        unanswered: the events that the driver has still to answer, abandoned ones included.
        leaving: about to be released: it still hears of changes and gives up what it has, but gets nothing new.
        unsettled: the invalidations that were sent and whose effect is not applied yet; others may still have to
            answer.
        lenient: a refused access succeeds for the device, which reads ones and whose writes go nowhere, as behind an
            IOMMU; False: it fails.
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
    leaving: bool = False
    sequence: int = 0
    revision: int = 0
    low_water: int = 0
    unanswered: dict[int, Delivery] = field(default_factory=dict)
    unsettled: dict[int, Delivery] = field(default_factory=dict)
    counters: Counter[str] = field(default_factory=Counter)
    lenient: bool = False
    history: History = field(default_factory=History)
    reports: Reports = field(default_factory=Reports)
    home: Home | None = None
    failing_allocation: int = 0

    def __str__(self) -> str:
        return f"mirror {self.id} ({self.device.name})"

    @property
    def span(self) -> AddressRange:
        """All addresses of the address space."""
        return AddressRange(0, TASK_SIZE)

    # ---- the life cycle

    def require_live(self, operation: str) -> None:
        """Raise unless the driver still hears.

        Raises:
            DeviceLostError: it was fenced (ENODEV).
            NoSuchObjectError: it was released: its process exited, or its own error killed it (ENODEV).
        """
        if self.state is MirrorState.LOST:
            raise DeviceLostError(f"{operation}: {self} was fenced: {self.lost_because}")
        if self.state is MirrorState.RELEASED:
            raise NoSuchObjectError(f"{operation}: {self} was released", errnos.ENODEV)

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
        return self.history.last(address, bits, self.unsettled)

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
        self.leaving = False
        if self.state is not MirrorState.LIVE:
            return
        self.space.notifier.subscribers.pop(self.id, None)
        self.unsettled.clear()
        self.state = state
        self.lost_because = why

    # ---- what the notifier needs of a subscriber

    def kill(self) -> None:
        """Unsubscribe for good: the driver has been told to give everything up."""
        self.release(MirrorState.RELEASED)

    @abstractmethod
    def hears(self, event: Event) -> bool:
        """Whether this event has to be delivered."""

    def awaits_late_answer(self) -> bool:
        """True while an abandoned event is unanswered: nothing new is sent before that."""
        return bool(self.unanswered) and any(sent.state is EventState.ABANDONED for sent in self.unanswered.values())

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

    @abstractmethod
    def settle(self, delivery: Delivery) -> bool:
        """Apply a final state; False when the driver's own error is its end."""

    def heard_late(self, event: Event, dirty: tuple[AddressRange, ...]) -> None:  # noqa: B027 - nothing for most
        """An abandoned event was answered after all; the change that it told of was not made."""

    # ---- numbering and answers

    def send(self, event: Event, operation_id: int) -> Delivery:
        """Number an event for this receiver, densely from 1."""
        self.sequence = sequence = self.sequence + 1
        if event.space_id == self.space.id:
            assert event.revision > self.revision, f"{self} hears of revision {event.revision} after {self.revision}"
            self.revision = event.revision
        sent = self.unanswered[sequence] = Delivery(self.id, sequence, event, operation_id)
        if IS_INVALIDATION[event.etype]:
            self.unsettled[sequence] = sent
        self.counters[_EVENTS_OF[event.etype]] += 1
        return sent

    def answer(
        self, sequence: int, errno: int, dirty: tuple[AddressRange, ...], results: bytes = b""
    ) -> Delivery | None:
        """Record a driver's answer.  Returns: the event that it finishes, None when it changes nothing.

        Raises:
            InvalidRequestError: the event was never sent to this receiver, or it wants a result for each page (EINVAL).
        """
        if not 0 < sequence <= self.sequence:
            raise InvalidRequestError(
                f"acknowledge: event {sequence} was never sent to {self}; the last one is {self.sequence}"
            )
        sent = self.unanswered.get(sequence)
        if sent is None:
            self.counters["repeated_answers"] += 1
            return None
        if sent.state is EventState.ABANDONED:
            self.counters["late_answers"] += 1
            self._forget(sequence)
            self.heard_late(sent.event, dirty)
            return None
        wanted = sent.event.npages if sent.event.copy and not errno else 0
        if len(results) != wanted and not errno:
            raise InvalidRequestError(
                f"acknowledge: event {sequence} of {self} wants {wanted} results and got {len(results)}"
            )
        if errno == errnos.EINPROGRESS and self.has_two_passes(sent.event):
            sent.state, sent.unfinished = EventState.ACKNOWLEDGED, True
        elif errno == errnos.EAGAIN and not sent.event.blockable:
            # Only the OOM reaper's events may be refused; elsewhere an error is an answer, and kills the mirror.
            sent.state, sent.errno = EventState.REFUSED, errno
        elif errno:
            sent.state, sent.errno = EventState.ACKNOWLEDGED, self._accepted(errno)
        else:
            sent.state = EventState.ACKNOWLEDGED
        sent.dirty, sent.results = dirty, results
        self.counters[sent.state._value_] += 1
        self._forget(sequence)
        if sent.state is EventState.ACKNOWLEDGED and not sent.unfinished:
            self.history.acknowledged(sent)
        return sent

    def finish(self, sequence: int, state: EventState) -> Delivery | None:
        """Give an unanswered event a final state other than a driver's answer (fenced, abandoned)."""
        sent = self.unanswered.get(sequence)
        if sent is None or sent.state is not EventState.SENT:
            return None
        sent.state = state
        self.counters[state._value_] += 1
        self.unsettled.pop(sequence, None)
        if state is not EventState.ABANDONED:
            self._forget(sequence)
        return sent

    def _forget(self, sequence: int) -> None:
        del self.unanswered[sequence]
        self.low_water = next(iter(self.unanswered)) - 1 if self.unanswered else self.sequence  # they ascend

    def _accepted(self, errno: int) -> int:
        # hmm_mirror_update(): 0, ENOMEM and EIO are documented; others are warned of and become EIO.
        if errno in (0, errnos.ENOMEM, errnos.EIO):
            return errno
        self.counters["undocumented_errors"] += 1
        return errnos.EIO

    def check(self, _: Checked) -> None:
        """Assert the invariants of the numbering."""
        assert self.state is MirrorState.LIVE or not self.unsettled, f"{self} is gone and has something to settle"
        assert self.low_water == min(self.unanswered, default=self.sequence + 1) - 1
