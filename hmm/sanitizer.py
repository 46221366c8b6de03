"""The driver sanitizer: what took which translation of a mirror, and what a device did in spite of it.

A device reaches memory only through what it was given, and every access is checked.  When one is refused, the history
of its mirror says what had taken the translation; the sequence that the access names says whether it was begun before
the driver heard of that (then the driver has acknowledged too early) or afterwards (then the device goes on using what
it gave up).

**Source**: our own; the idea is KASAN's (mm/kasan): refuse, and say who freed it.

**Invariants**: the history is bounded, in events and in ranges; a violation that is not kept is counted.

**Absent**: the checks (device_access.py, frame_access.py, mirror.py); clocks and drivers' names (the daemon adds them).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Container
from dataclasses import dataclass, field

from hmm import pte
from hmm.events import Delivery, Event, EventType
from hmm.units import Address, AddressRange
from hmm.violation import Taking, Violation, ViolationKind

__all__ = ["History", "Reports", "kind_of_stale"]

EVENTS_KEPT = 256
"""Events that a mirror's history goes back."""
RANGES_KEPT = 1 << 16
"""Ranges of all these events together; a single event may have more."""
VIOLATIONS_KEPT = 64
"""Violations of one mirror that are kept in full, the first ones: the others mostly follow from them."""


_MOVING = (EventType.COPY_TO_DEVICE, EventType.COPY_FROM_DEVICE)
_TAKES = tuple(etype is EventType.NONE or etype.pte_mask != pte.MASK_ALL or etype in _MOVING for etype in EventType)
"""Which types of events take something; NONE has a reason of today, and there it takes everything."""


class History:
    """What took translations of one mirror lately: events that its driver acknowledged, ranges that it discarded."""

    __slots__ = ("_nranges", "_taken")

    def __init__(self) -> None:
        self._taken: deque[Delivery] = deque()
        self._nranges = 0

    def acknowledged(self, delivery: Delivery) -> None:
        """The driver has answered an event and uses what it took no more."""
        if _TAKES[delivery.event.etype]:
            self._add(delivery)

    def discarded(self, sequence: int, span: AddressRange, operation_id: int) -> None:
        """The driver has dropped a range by itself; `sequence` is that of the last event it was sent."""
        event = Event(operation_id, 0, 0, EventType.NONE, None, None, (span,))
        self._add(Delivery(0, sequence, event, operation_id))

    def _add(self, taken: Delivery) -> None:
        self._taken.append(taken)
        self._nranges += len(taken.event.spans)
        while len(self._taken) > EVENTS_KEPT or (self._nranges > RANGES_KEPT and len(self._taken) > 1):
            self._nranges -= len(self._taken.popleft().event.spans)

    def last(self, address: Address, bits: int, unsettled: Container[int]) -> Taking | None:
        """What took some of `bits` of the entry of an address last; None: nothing that is remembered.

        Args:
            bits: of an entry, such as pte.WRITE.
            unsettled: sequences of events whose change was not made yet.

        Cost: O(EVENTS_KEPT * log ranges).
        """
        for taken in reversed(self._taken):
            event = taken.event
            mask = pte.MASK_NONE if event.etype is EventType.NONE else event.pte_mask
            if mask & bits != bits and (span := _holding(event, address)) is not None:
                name, cause = _in_words(event)
                settled = taken.sequence not in unsettled
                return Taking(taken.sequence, name, cause, taken.operation_id, span.start, span.end, settled)
        return None


def _holding(event: Event, address: Address) -> AddressRange | None:
    """The range of an event that holds an address.  Cost: O(log ranges)."""
    if event.etype is EventType.RELEASE:
        return AddressRange(0, 1 << 63)
    index = bisect_right(event.spans, address, key=_start) - 1
    return event.spans[index] if index >= 0 and address < event.spans[index].end else None


def _start(span: AddressRange) -> Address:
    return span.start


def _in_words(event: Event) -> tuple[str, str]:
    """What took something, and why; a driver's own discard has no cause."""
    if event.cause is not None:
        return event.etype.name, event.cause.value
    return ("DISCARD", "") if event.etype is EventType.NONE else (event.etype.name, event.etype.name.lower())


def kind_of_stale(taking: Taking | None, since: int | None) -> ViolationKind:
    """Which rule an access breaks whose translation is gone.

    Args:
        taking: what took it.
        since: the last event that the driver had heard when the access began; None: it does not say.  Then an access
            that comes before the change was made counts as one that was under way when the driver acknowledged.
    """
    if taking is None:
        return ViolationKind.NO_TRANSLATION
    early = since < taking.sequence if since is not None else not taking.settled
    return ViolationKind.EARLY_ACKNOWLEDGEMENT if early else ViolationKind.USE_AFTER_INVALIDATION


@dataclass(slots=True, eq=False)
class Reports:
    """The violations of one mirror.

    Attributes:
        kept: the first ones, in full.
        counts: all of them, by kind.
    """

    kept: list[Violation] = field(default_factory=list)
    counts: Counter[ViolationKind] = field(default_factory=Counter)

    def add(self, violation: Violation) -> None:
        """Count a violation, and keep it if there is room."""
        self.counts[violation.kind] += 1
        if len(self.kept) < VIOLATIONS_KEPT:
            self.kept.append(violation)
