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
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field

from hmm import pte
from hmm.dispatch import Dispatch, Past
from hmm.events import Delivery, Event, EventType
from hmm.units import Address, AddressRange, MirrorId
from hmm.violation import Taking, Violation, ViolationKind

__all__ = ["History", "Reports", "kind_of_stale"]

VIOLATIONS_KEPT = 64
"""Violations of one mirror that are kept in full, the first ones: the others mostly follow from them."""


class History:
    """What took translations of one mirror lately, and of no other: ranges that it discarded, events for it alone."""

    __slots__ = ("_taken",)

    def __init__(self) -> None:
        self._taken: Past[Delivery] = Past()

    def add(self, delivery: Delivery) -> None:
        """The driver has answered an event that only it heard, and uses what it took no more."""
        self._taken.add(delivery)

    def discarded(self, sequence: int, span: AddressRange, operation_id: int) -> None:
        """The driver has dropped a range by itself; `sequence` is that of the last event it was sent."""
        event = Event(operation_id, 0, 0, EventType.NONE, None, None, (span,))
        self._taken.add(Delivery(0, sequence, event, operation_id))

    def last(
        self, mirror_id: MirrorId, address: Address, bits: int, unsettled: Container[int], past: Past[Dispatch]
    ) -> Taking | None:
        """What took some of `bits` of the entry of an address last; None: nothing that is remembered.

        Args:
            bits: of an entry, such as pte.WRITE.
            unsettled: sequences of events whose change was not made yet.
            past: what others heard as well.

        Cost: O(EVENTS_KEPT * log ranges).
        """
        found: tuple[int, Event, AddressRange] | None = None
        for taken in self._taken.backwards():
            if (span := _taken_of(taken.event, address, bits)) is not None:
                found = taken.sequence, taken.event, span
                break
        for dispatch in past.backwards():
            sequence = dispatch.acknowledged_as(mirror_id)
            if sequence is None:
                continue
            if found is not None and sequence <= found[0]:
                break
            if (span := _taken_of(dispatch.event, address, bits)) is not None:
                found = sequence, dispatch.event, span
                break
        if found is None:
            return None
        sequence, event, span = found
        name, cause = _in_words(event)
        return Taking(sequence, name, cause, event.operation_id, span.start, span.end, sequence not in unsettled)


def _taken_of(event: Event, address: Address, bits: int) -> AddressRange | None:
    """The range of an event that holds an address, if it took some of `bits`."""
    mask = pte.MASK_NONE if event.etype is EventType.NONE else event.pte_mask
    return _holding(event, address) if mask & bits != bits else None


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
