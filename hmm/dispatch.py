"""Dispatches: one event on its way to all who hear it, and how each of them answered.

What is the same for all who hear an event is kept once: who they are (`Audience`), who has not answered yet, what was
counted.  Only what differs is kept for each: the event's number, and an outcome that says more than "done".

**Source**: our own; what a loop over `mmu_notifier_subscriptions` is inside one kernel.

**Invariants**: who waits has no outcome, unless the event was abandoned and the answer is still owed; an audience
never changes.

**Absent**: what an answer means (receiver.py), what follows when all have answered (notifier.py).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from hmm.events import Delivery, Event, EventState
from hmm.units import MirrorId

__all__ = ["EVENTS_KEPT", "Audience", "Dispatch", "Hearer", "Past"]

EVENTS_KEPT = 256
"""Events that are remembered."""
RANGES_KEPT = 1 << 16
"""Ranges of all these events together; a single event may have more."""


class Hearer(Protocol):
    """What is needed of whoever hears events."""

    counters: Counter[str]
    sequence: int

    @property
    def id(self) -> MirrorId:
        """Names it."""

    @property
    def home(self) -> Any:
        """Its part of its device's memory; None for none.  It never changes."""

    @property
    def is_selective(self) -> bool:
        """Whether it hears some events only, and has to be told what is about to be sent to it."""


class Audience:
    """Those who hear the same event, in order of registration.

    Attributes:
        index: where in `ids` each of them is.
        everybody: `ids` as a set.
        homes: the parts of devices' memory that go with their tables.
        selective: those of `receivers` that hear some events only.
        counters: what was counted for each of them since the last `fold`.
    """

    __slots__ = ("counters", "everybody", "homes", "ids", "index", "receivers", "selective")

    def __init__(self, receivers: tuple[Any, ...]) -> None:
        self.receivers = receivers
        self.ids: tuple[MirrorId, ...] = tuple([receiver.id for receiver in receivers])
        self.index = {mirror_id: position for position, mirror_id in enumerate(self.ids)}
        self.everybody = frozenset(self.ids)
        self.homes = tuple([receiver.home for receiver in receivers if receiver.home is not None])
        self.selective = tuple([receiver for receiver in receivers if receiver.is_selective])
        self.counters: Counter[str] = Counter()

    def fold(self) -> None:
        """Add what was counted for all to the counters of each."""
        if self.counters:
            for receiver in self.receivers:
                receiver.counters.update(self.counters)
            self.counters.clear()


@dataclass(slots=True, eq=False)
class Dispatch:
    """One event for all who hear it, from its sending to the last answer.

    Attributes:
        operation_id: the call that waits for the answers.
        sequences: the event's number for each of the audience, in the same order.
        waiting: those who have not answered.
        outcomes: how the others ended, except those who have answered and had no more to say.
    """

    event: Event
    operation_id: int
    audience: Audience
    sequences: list[int]
    waiting: set[MirrorId]
    outcomes: dict[MirrorId, Delivery] = field(default_factory=dict)

    def acknowledge(self, mirror_ids: Sequence[MirrorId]) -> None:
        """So many of those who waited have answered, and had no more to say.  Cost: O(1) for all at once."""
        if len(mirror_ids) == len(self.waiting) == len(self.sequences):
            self.waiting.clear()
        else:
            self.waiting.difference_update(mirror_ids)

    def unanswered(self) -> list[tuple[MirrorId, int]]:
        """Who has still to answer, and the event's number for each."""
        if not self.waiting:
            return []
        told = zip(self.audience.ids, self.sequences, strict=True)
        return [(mirror_id, sequence) for mirror_id, sequence in told if mirror_id in self.waiting]

    def sequence_of(self, mirror_id: MirrorId) -> int:
        """The event's number for one of the audience."""
        return self.sequences[self.audience.index[mirror_id]]

    def delivery(self, mirror_id: MirrorId) -> Delivery:
        """How it stands with one of the audience."""
        outcome = self.outcomes.get(mirror_id)
        if outcome is not None:
            return outcome
        state = EventState.SENT if mirror_id in self.waiting else EventState.ACKNOWLEDGED
        return Delivery(mirror_id, self.sequence_of(mirror_id), self.event, self.operation_id, state)

    def deliveries(self) -> list[Delivery]:
        """How it stands with each of the audience."""
        return [self.delivery(mirror_id) for mirror_id in self.audience.ids]

    def state_of(self, mirror_id: MirrorId) -> EventState:
        """As `delivery(mirror_id).state`."""
        outcome = self.outcomes.get(mirror_id)
        if outcome is not None:
            return outcome.state
        return EventState.SENT if mirror_id in self.waiting else EventState.ACKNOWLEDGED

    def acknowledged_as(self, mirror_id: MirrorId) -> int | None:
        """The event's number for one that has stopped using what it took; None: not one of those."""
        if mirror_id not in self.audience.index or mirror_id in self.waiting:
            return None
        outcome = self.outcomes.get(mirror_id)
        if outcome is not None and (outcome.state is not EventState.ACKNOWLEDGED or outcome.unfinished):
            return None
        return self.sequence_of(mirror_id)

    def in_order(self) -> list[Delivery]:
        """The outcomes, in order of registration."""
        if len(self.outcomes) < 2:
            return list(self.outcomes.values())
        return [self.outcomes[mirror_id] for mirror_id in self.audience.ids if mirror_id in self.outcomes]

    def check(self) -> None:
        """Assert that nobody is counted twice or missing."""
        assert self.waiting <= self.audience.everybody
        assert self.outcomes.keys() <= self.audience.everybody
        assert self.waiting.isdisjoint(self.outcomes), f"{self.event} is answered by who has not answered"


class HasEvent(Protocol):
    """What a memory of events is made of."""

    @property
    def event(self) -> Event:
        """The event."""


T = TypeVar("T", bound=HasEvent)


class Past(Generic[T]):
    """The last events of some kind, as many as EVENTS_KEPT and RANGES_KEPT permit."""

    __slots__ = ("_events", "_nranges")

    def __init__(self) -> None:
        self._events: deque[T] = deque()
        self._nranges = 0

    def add(self, one: T) -> None:
        """Remember one, and forget the oldest if need be."""
        self._events.append(one)
        self._nranges += len(one.event.spans)
        while len(self._events) > EVENTS_KEPT or (self._nranges > RANGES_KEPT and len(self._events) > 1):
            self._nranges -= len(self._events.popleft().event.spans)

    def backwards(self) -> Iterator[T]:
        """From the last one to the oldest."""
        return reversed(self._events)
