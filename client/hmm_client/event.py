"""What a driver is told: one change of an address space, as one mirror hears it.

One message tells all mirrors of a session; what they share is a `Change`, decoded once, and an `Event` is that change
under the number that it has for one mirror.

**Source**: proto/hmm_proto/v1/event.proto; 2015: `struct hmm_event`; today: `struct mmu_notifier_range`.

**Absent**: what to do about it (`driver.py`), answers (`acknowledgements.py`).
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Self

import numpy as np

from hmm import events, pte
from hmm.events import EventType, Reason
from hmm.units import PAGE_SIZE, AddressRange, Entries, MirrorId
from hmm_proto.convert import (
    entries_from_proto,
    event_from_proto,
    event_type_from_proto,
    ranges_from_proto,
    reason_from_proto,
)
from hmm_proto.v1 import event_pb2

_FAULTS = frozenset({EventType.DEVICE_RFAULT, EventType.DEVICE_WFAULT})


def pages_of(starts: Entries, ends: Entries) -> Entries:
    """uint64[n]: the addresses of all pages of uint64[k] page-aligned ranges, in order."""
    if starts.size == 1:
        return np.arange(starts[0], ends[0], PAGE_SIZE, dtype=np.uint64)
    counts = ((ends - starts) // np.uint64(PAGE_SIZE)).astype(np.int64)
    firsts = np.cumsum(counts) - counts
    within = np.arange(int(counts.sum()), dtype=np.int64) - np.repeat(firsts, counts)
    return np.repeat(starts, counts) + within.astype(np.uint64) * np.uint64(PAGE_SIZE)


class Change:
    """What all mirrors of one message hear."""

    def __init__(self, message: event_pb2.Event) -> None:
        self.message = message
        self.type = event_type_from_proto(message.type)
        self.is_fault = self.type in _FAULTS
        self.wants_answer = message.wants_answer
        self.invalidates = not self.is_fault and bool(message.ranges.starts)

    @cached_property
    def starts(self) -> Entries:
        """uint64[n]: first byte of each range."""
        return np.array(self.message.ranges.starts, np.uint64)

    @cached_property
    def ends(self) -> Entries:
        """uint64[n]: first byte behind each range."""
        return np.array(self.message.ranges.ends, np.uint64)

    @cached_property
    def spans(self) -> tuple[AddressRange, ...]:
        """The ranges: page-aligned, ascending, disjoint."""
        return ranges_from_proto(self.message.ranges)

    @cached_property
    def entries(self) -> Entries:
        """uint64[n], read-only: after a fault, the mirror's entries of all pages of the ranges."""
        return entries_from_proto(self.message.entries)

    def overlaps(self, starts: Entries, ends: Entries) -> bool:
        """True when a range shares a byte with one of uint64[n] ascending, disjoint ranges.  Cost: O(n log k)."""
        after = np.searchsorted(self.ends, starts, side="right")
        inside = after < self.ends.size
        return bool((self.starts[after[inside]] < ends[inside]).any())


class Event:
    """One change as one mirror hears it, to be finished before `Driver.update` returns.

    Attributes:
        mirror: who hears it: a `Mirror`, or an `IntervalMirror`.
        sequence: its number for that mirror, dense from 1.
    """

    __slots__ = ("_change", "mirror", "sequence")

    def __init__(self, mirror: Any, sequence: int, change: Change) -> None:
        self.mirror = mirror
        self.sequence = sequence
        self._change = change

    @classmethod
    def at(cls, event: Event, mirror: Any) -> Self:
        """The same event, with another handle of its mirror."""
        return cls(mirror, event.sequence, event._change)

    def __repr__(self) -> str:
        where = ", ".join(map(str, self.spans[:3])) + (" ..." if len(self.spans) > 3 else "")
        return f"<event {self.sequence} of {self.mirror}: {self.type.name} {where} by {self.operation}>"

    @property
    def value(self) -> events.Event:
        """The event as the core has it."""
        return event_from_proto(self._change.message)

    @property
    def type(self) -> EventType:
        """What to do, in the words of 2015."""
        return self._change.type

    @property
    def reason(self) -> Reason | None:
        """Why, in the words of today's kernel; None when today's kernel would not tell."""
        return reason_from_proto(self._change.message.reason)

    @property
    def cause(self) -> str:
        """What changed it, for people: "copy on write"."""
        return self._change.message.cause

    @property
    def pte_mask(self) -> int:
        """What is kept of every entry of the ranges: `entry &= pte_mask`."""
        return self._change.message.pte_mask

    @property
    def is_fault(self) -> bool:
        """True for the end of a fault of this mirror: `entries` are to be programmed."""
        return self._change.is_fault

    @property
    def spans(self) -> tuple[AddressRange, ...]:
        """Where: page-aligned, ascending, disjoint.  Empty for RELEASE."""
        return self._change.spans

    @property
    def starts(self) -> Entries:
        """uint64[n]: the starts of `spans`."""
        return self._change.starts

    @property
    def ends(self) -> Entries:
        """uint64[n]: the ends of `spans`."""
        return self._change.ends

    @property
    def pages(self) -> Entries:
        """uint64[npages]: the address of every page of `spans`."""
        return pages_of(self._change.starts, self._change.ends)

    @property
    def entries(self) -> Entries:
        """uint64[npages], read-only: after a fault, the entry of every page of `spans`; of a copy, its place there."""
        return self._change.entries

    @property
    def copy(self) -> int:
        """Names the pages that the driver is to carry, for COPY_TO_DEVICE and COPY_FROM_DEVICE; 0 for none."""
        return self._change.message.copy

    @property
    def keeps(self) -> bool:
        """True for COPY_FROM_DEVICE because of a fork: the device goes on using the pages."""
        return self._change.message.keeps

    @property
    def npages(self) -> int:
        """The number of pages of `spans`."""
        return sum(span.npages for span in self.spans)

    @property
    def device_addresses(self) -> Entries:
        """uint64[npages]: where in the device's memory the pages of a copy go, or are; in bytes."""
        return pte.pte_dev_addr(self._change.entries)

    def read_pages(self, first: int = 0, npages: int | None = None) -> Any:
        """The bytes of pages on their way to the device, once it has stopped writing them.

        Args:
            first, npages: which of the pages of `spans`; None: all from `first` on.

        Returns: 4096 bytes each; to be awaited, except in `hmm_client.sync`.

        Raises:
            NoSuchObjectError: the daemon no longer waits for this copy (ENOENT).
        """
        return self.mirror.read_copy(self.copy, first, self.npages - first if npages is None else npages)

    def write_pages(self, data: bytes, first: int = 0) -> Any:
        """Bring back pages from the device; they are no longer its own when this returns.

        Args:
            data: whole pages, for those of `spans` from `first` on.

        Returns: None; to be awaited, except in `hmm_client.sync`.

        Raises: as `read_pages`; then the device still has the pages.
        """
        return self.mirror.write_copy(self.copy, data, first)

    @property
    def blockable(self) -> bool:
        """False when an errno is accepted as an answer: the daemon's caller then tries again."""
        return not self._change.message.non_blockable

    @property
    def wants_answer(self) -> bool:
        """True when the daemon waits for an answer of its own to this event."""
        return self._change.wants_answer

    @property
    def owner(self) -> int:
        """The device whose own migration or exclusive access this is; 0 for nobody."""
        return self._change.message.owner

    @property
    def initiator(self) -> MirrorId:
        """The mirror that asked for it, or that put the pages where they have to come back from; 0 for none."""
        return self._change.message.initiator

    @property
    def finishes(self) -> int:
        """The revision of the event whose second pass this is; 0 for all others."""
        return self._change.message.finishes

    @property
    def operation_id(self) -> int:
        """The call that causes the change."""
        return self._change.message.operation_id

    @property
    def operation(self) -> str:
        """That call's name, for people."""
        return self._change.message.operation

    @property
    def caller(self) -> str:
        """The name of whoever made it, for people."""
        return self._change.message.caller

    @property
    def space_id(self) -> int:
        """The address space that changes."""
        return self._change.message.space_id

    @property
    def revision(self) -> int:
        """Counts the changes of that address space, ascending."""
        return self._change.message.revision

    @property
    def notifier_seq(self) -> int:
        """The address space's sequence, as today's kernel hands it to a callback; odd while it changes."""
        return self._change.message.notifier_seq

    @property
    def deadline_s(self) -> float | None:
        """Seconds from sending until the answer is due; None: no deadline."""
        return self._change.message.deadline_ms / 1000 or None

    def overlaps(self, span: AddressRange) -> bool:
        """True when a range of the event shares a byte with `span`."""
        return any(mine.overlaps(span) for mine in self.spans)
