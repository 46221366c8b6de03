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
from hmm.events import Event, EventType
from hmm.units import Address, AddressRange
from hmm.violation import Taking, Violation, ViolationKind

__all__ = ["History", "Reports", "kind_of_stale"]

EVENTS_KEPT = 256
"""Events that a mirror's history goes back."""
RANGES_KEPT = 1 << 16
"""Ranges of all these events together; a single event may have more."""
VIOLATIONS_KEPT = 64
"""Violations of one mirror that are kept in full, the first ones: the others mostly follow from them."""


@dataclass(frozen=True, slots=True)
class _Taken:
    sequence: int
    etype: EventType
    mask: int
    cause: str
    operation_id: int
    spans: tuple[AddressRange, ...]

    def holding(self, address: Address) -> AddressRange | None:
        """The range that holds an address.  Cost: O(log ranges)."""
        if self.etype is EventType.RELEASE:
            return AddressRange(0, 1 << 63)
        index = bisect_right(self.spans, address, key=_start) - 1
        return self.spans[index] if index >= 0 and address < self.spans[index].end else None


def _start(span: AddressRange) -> Address:
    return span.start


class History:
    """What took translations of one mirror lately: events that its driver acknowledged, ranges that it discarded."""

    __slots__ = ("_nranges", "_taken")

    def __init__(self) -> None:
        self._taken: deque[_Taken] = deque()
        self._nranges = 0

    def acknowledged(self, sequence: int, event: Event, operation_id: int) -> None:
        """The driver has answered an event and uses what it took no more."""
        mask = event.etype.pte_mask if event.etype is not EventType.NONE else pte.MASK_NONE
        if mask != pte.MASK_ALL:
            cause = event.cause.value if event.cause else event.etype.name.lower()
            self._add(_Taken(sequence, event.etype, mask, cause, operation_id, event.spans))

    def discarded(self, sequence: int, span: AddressRange, operation_id: int) -> None:
        """The driver has dropped a range by itself; `sequence` is that of the last event it was sent."""
        self._add(_Taken(sequence, EventType.NONE, pte.MASK_NONE, "", operation_id, (span,)))

    def _add(self, taken: _Taken) -> None:
        self._taken.append(taken)
        self._nranges += len(taken.spans)
        while len(self._taken) > EVENTS_KEPT or (self._nranges > RANGES_KEPT and len(self._taken) > 1):
            self._nranges -= len(self._taken.popleft().spans)

    def last(self, address: Address, bits: int, unsettled: Container[int]) -> Taking | None:
        """What took some of `bits` of the entry of an address last; None: nothing that is remembered.

        Args:
            bits: of an entry, such as pte.WRITE.
            unsettled: sequences of events whose change was not made yet.

        Cost: O(EVENTS_KEPT * log ranges).
        """
        for taken in reversed(self._taken):
            if taken.mask & bits != bits and (span := taken.holding(address)) is not None:
                name = taken.etype.name if taken.cause else "DISCARD"
                settled = taken.sequence not in unsettled
                return Taking(
                    taken.sequence, name, taken.cause, taken.operation_id, span.start, span.end, settled
                )  # fmt: skip
        return None


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
