"""Values of the core <-> messages of hmm.v1, side by side: `..._to_proto`, and `..._from_proto` where one is read.

**Invariants**: converting there and back gives an equal value; what a message may hold and the core does not (an
enum value of a newer client, a range that ends before it starts, an array of half an entry) is an
InvalidRequestError with reason MALFORMED, raised before anything is done.

**Absent**: errors (status.py); requests of single calls, which the services read where they make the call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

from hmm.address_space import Thp
from hmm.errors import InvalidRequestError, Signal
from hmm.events import Cause, Event, EventState, EventType, Reason, pte_mask_of
from hmm.file import FileKind
from hmm.frames import RegionKind
from hmm.receiver import DeadlinePolicy
from hmm.units import PAGE_SHIFT, PAGE_SIZE, TASK_SIZE, AddressRange, Entries, spans_of_pages
from hmm_proto.v1 import event_pb2, file_pb2, range_pb2, types_pb2

_LITTLE_ENDIAN = np.dtype("<u8")
_FEW = 512
E = TypeVar("E", bound=Enum)
N = TypeVar("N", bound=int)


def malformed(message: str) -> InvalidRequestError:
    """The error of a message that makes no sense, whatever the state of the daemon."""
    return InvalidRequestError(message, reason="MALFORMED")


# ---- ranges


def range_to_proto(span: AddressRange) -> range_pb2.AddressRange:
    """One range."""
    return range_pb2.AddressRange(start=span.start, end=span.end)


def range_from_proto(message: range_pb2.AddressRange) -> AddressRange:
    """One range, which may be empty.

    Raises:
        InvalidRequestError: it ends before it starts, or beyond every address space (EINVAL).
    """
    return _range(message.start, message.end)


def ranges_to_proto(spans: Iterable[AddressRange]) -> range_pb2.AddressRanges:
    """Many ranges, as two arrays."""
    spans = tuple(spans)
    return range_pb2.AddressRanges(starts=[span.start for span in spans], ends=[span.end for span in spans])


def ranges_from_proto(message: range_pb2.AddressRanges) -> tuple[AddressRange, ...]:
    """Many ranges.

    Raises:
        InvalidRequestError: arrays of different lengths, ranges that are not ascending and disjoint (EINVAL).
    """
    starts, ends = message.starts, message.ends
    if len(starts) != len(ends):
        raise malformed(f"{len(starts)} starts and {len(ends)} ends of ranges")
    spans = tuple(map(_range, starts, ends))
    if len(spans) > 1 and any(left.end > right.start for left, right in pairwise(spans)):
        raise malformed("ranges that overlap or do not ascend")
    return spans


def page_ranges_from_proto(message: range_pb2.AddressRanges) -> tuple[AddressRange, ...]:
    """Many ranges of whole pages, none of them empty.

    Raises:
        InvalidRequestError: as `ranges_from_proto`; a range is empty or not page-aligned (EINVAL).
    """
    starts, ends = message.starts, message.ends
    if len(starts) == 1 == len(ends):  # most are
        start, end = starts[0], ends[0]
        if start < end <= TASK_SIZE and not (start | end) & (PAGE_SIZE - 1):
            return (AddressRange(start, end),)
    spans = ranges_from_proto(message)
    for span in spans:
        if not span or (span.start | span.end) & (PAGE_SIZE - 1):
            raise malformed(f"{span} is empty or not page-aligned")
    return spans


def _range(start: int, end: int) -> AddressRange:
    if not start <= end <= TASK_SIZE:
        raise malformed(f"[{start:#x}, {end:#x}) is no range of an address space")
    return AddressRange(start, end)


# ---- numbers in texts


def number_from_text(text: str) -> int:
    """A number of 64 bits, in decimal digits.

    Raises:
        InvalidRequestError: it is none (EINVAL).
    """
    if text.isascii() and text.isdecimal() and len(text) <= _DIGITS_MAX and (number := int(text)) <= _NUMBER_MAX:
        return number
    raise malformed(f"{text[:32]!r} is no number of 64 bits")


_NUMBER_MAX = (1 << 64) - 1
_DIGITS_MAX = len(str(_NUMBER_MAX))


# ---- arrays


def entries_to_proto(entries: Entries) -> bytes:
    """uint64[n] as little-endian bytes.  Cost: one copy."""
    return (entries if entries.dtype is _LITTLE_ENDIAN else entries.astype(_LITTLE_ENDIAN)).tobytes()


def entries_as_bytes(entries: Entries) -> bytes | memoryview:
    """The same; without a copy if they are many, contiguous, and numbers are little-endian here.  None may be empty."""
    if entries.size <= _FEW:
        return entries_to_proto(entries)  # sooner done
    return np.ascontiguousarray(entries, _LITTLE_ENDIAN).data.cast("B")


def entries_from_proto(data: bytes) -> Entries:
    """Little-endian bytes as uint64[n], read-only and without a copy.

    Raises:
        InvalidRequestError: not a whole number of entries (EINVAL).
    """
    if len(data) % 8:
        raise malformed(f"{len(data)} bytes are no whole number of 8-byte entries")
    return np.frombuffer(data, "<u8").astype(np.uint64, copy=False)


def entries_of_parts(parts: Iterable[Any], name: str) -> Entries:
    """As `entries_from_proto`: the array of that name in a reply that has come in parts."""
    return entries_from_proto(b"".join([getattr(part, name) for part in parts]))


def pages_from_proto(data: bytes) -> Entries:
    """Addresses of scattered pages: uint64[n], bytes, page-aligned, ascending and unique.

    Raises:
        InvalidRequestError: they are not (EINVAL).
    """
    pages = entries_from_proto(data)
    unaligned = int(np.bitwise_or.reduce(pages)) & (PAGE_SIZE - 1)
    if unaligned or np.count_nonzero(pages[1:] <= pages[:-1]) or (pages.size and pages[-1] >= TASK_SIZE):
        raise malformed("page addresses that are unaligned, do not ascend or are beyond the address space")
    return pages


def page_spans_from_proto(data: bytes) -> tuple[AddressRange, ...]:
    """The same as ranges, neighbours joined."""
    return spans_of_pages((pages_from_proto(data) >> np.uint64(PAGE_SHIFT)).astype(np.int64))


# ---- enumerations: 0 stands for what the comments of the .proto say that it stands for


def _inverse(numbers: Mapping[E, N]) -> dict[int, E]:
    return {number: member for member, number in numbers.items()}


def _member(members: Mapping[int, E], number: int, name: str) -> E:
    if number not in members:
        raise malformed(f"{name} {number} is not known here")
    return members[number]


_EVENT_TYPES = {etype: types_pb2.EventType.Value(f"EVENT_TYPE_{etype.name}") for etype in EventType if etype}
_EVENT_TYPES[EventType.NONE] = types_pb2.EVENT_TYPE_UNSPECIFIED
_REASONS = {reason: types_pb2.Reason.Value(f"REASON_{reason.name}") for reason in Reason}
_EVENT_STATES = {state: types_pb2.EventState.Value(f"EVENT_STATE_{state.name}") for state in EventState}
_POLICIES = {policy: types_pb2.DeadlinePolicy.Value(f"DEADLINE_POLICY_{policy.name}") for policy in DeadlinePolicy}
_SIGNALS = {signal: types_pb2.Signal.Value(f"SIGNAL_{signal.name}") for signal in Signal}
_FILE_KINDS = {
    FileKind.FILE: file_pb2.FILE_KIND_REGULAR,
    FileKind.SHARED_MEMORY: file_pb2.FILE_KIND_SHARED_MEMORY,
    FileKind.DEVICE: file_pb2.FILE_KIND_DEVICE,
    FileKind.HUGETLB: file_pb2.FILE_KIND_HUGETLB,
}

_MEMORY_KINDS = {
    RegionKind.DEVICE_PRIVATE: types_pb2.MEMORY_KIND_PRIVATE,
    RegionKind.DEVICE_COHERENT: types_pb2.MEMORY_KIND_COHERENT,
}

_HUGE_PAGES = {thp: types_pb2.HugePages.Value(f"HUGE_PAGES_{thp.name}") for thp in Thp}

_EVENT_TYPE_MEMBERS = _inverse(_EVENT_TYPES)
_REASON_MEMBERS = _inverse(_REASONS)
_POLICY_MEMBERS = {**_inverse(_POLICIES), 0: DeadlinePolicy.FENCE}
_SIGNAL_MEMBERS = _inverse(_SIGNALS)
_FILE_KIND_MEMBERS = {**_inverse(_FILE_KINDS), 0: FileKind.FILE}
_MEMORY_KIND_MEMBERS = {**_inverse(_MEMORY_KINDS), 0: RegionKind.DEVICE_PRIVATE}

_HUGE_PAGES_MEMBERS = {**_inverse(_HUGE_PAGES), 0: Thp.NEVER}


def event_type_to_proto(etype: EventType) -> types_pb2.EventType.ValueType:
    """What to do; NONE is 0."""
    return _EVENT_TYPES[etype]


def event_type_from_proto(number: int) -> EventType:
    """What to do.  Raises: InvalidRequestError for a number of another version (EINVAL)."""
    return _member(_EVENT_TYPE_MEMBERS, number, "event type")


def reason_to_proto(reason: Reason | None) -> types_pb2.Reason.ValueType:
    """Why; None is 0."""
    return types_pb2.REASON_UNSPECIFIED if reason is None else _REASONS[reason]


def reason_from_proto(number: int) -> Reason | None:
    """Why.  Raises: InvalidRequestError for a number of another version (EINVAL)."""
    return _member(_REASON_MEMBERS, number, "reason") if number else None


def event_state_to_proto(state: EventState) -> types_pb2.EventState.ValueType:
    """How far an event has come."""
    return _EVENT_STATES[state]


def policy_to_proto(policy: DeadlinePolicy) -> types_pb2.DeadlinePolicy.ValueType:
    """What happens at a deadline."""
    return _POLICIES[policy]


def policy_from_proto(number: int) -> DeadlinePolicy:
    """What happens at a deadline; 0 is FENCE.  Raises: InvalidRequestError for an unknown number (EINVAL)."""
    return _member(_POLICY_MEMBERS, number, "deadline policy")


def thp_to_proto(thp: Thp) -> types_pb2.HugePages.ValueType:
    """Where a first touch may bring in a huge page."""
    return _HUGE_PAGES[thp]


def thp_from_proto(number: int) -> Thp:
    """Where a first touch may bring in a huge page; 0 is NEVER.  Raises: InvalidRequestError: unknown (EINVAL)."""
    return _member(_HUGE_PAGES_MEMBERS, number, "huge pages")


def signal_to_proto(signal: Signal | None, address: int | None) -> types_pb2.SignalReport:
    """The signal that stopped an access; an empty message for none."""
    if signal is None:
        return types_pb2.SignalReport()
    return types_pb2.SignalReport(signal=_SIGNALS[signal], address=address or 0)


def signal_from_proto(message: types_pb2.SignalReport) -> tuple[Signal, int] | None:
    """The signal that stopped an access, and where; None for none."""
    if not message.signal:
        return None
    return _member(_SIGNAL_MEMBERS, message.signal, "signal"), message.address


def file_kind_to_proto(kind: FileKind) -> file_pb2.FileKind.ValueType:
    """What stands behind a file."""
    return _FILE_KINDS[kind]


def file_kind_from_proto(number: int) -> FileKind:
    """What stands behind a file; 0 is FILE.  Raises: InvalidRequestError for an unknown number (EINVAL)."""
    return _member(_FILE_KIND_MEMBERS, number, "file kind")


def memory_kind_to_proto(kind: RegionKind) -> types_pb2.MemoryKind.ValueType:
    """Who can reach the memory of a device."""
    return _MEMORY_KINDS[kind]


def memory_kind_from_proto(number: int) -> RegionKind:
    """Who can reach it; 0 is DEVICE_PRIVATE.  Raises: InvalidRequestError for an unknown number (EINVAL)."""
    return _member(_MEMORY_KIND_MEMBERS, number, "memory kind")


# ---- events


@cache
def _kind(etype: EventType, reason: Reason | None, cause: Cause | None, keeps: bool) -> event_pb2.Event:
    # What all events of a kind say; nobody writes to it.
    return event_pb2.Event(
        type=event_type_to_proto(etype),
        reason=reason_to_proto(reason),
        cause=cause.value if cause is not None else "",
        pte_mask=pte_mask_of(etype, keeps) & _MASK,
        keeps=keeps,
    )


def event_to_proto(event: Event, *, entries: bool = True) -> event_pb2.Event:
    """What the core knows of an event; who hears of it, under which numbers and until when, is the daemon's to add.

    Args:
        entries: False leaves them out, for who writes them down without copying them into a message first.
    """
    message = event_pb2.Event()
    message.CopyFrom(_kind(event.etype, event.reason, event.cause, event.keeps))
    message.operation_id, message.space_id, message.revision = event.operation_id, event.space_id, event.revision
    starts, ends = message.ranges.starts, message.ranges.ends
    for span in event.spans:
        starts.append(span.start)
        ends.append(span.end)
    # Most events have nothing of what follows, and a test costs less than a field.
    if entries and event.entries:
        message.entries = event.entries
    if event.copy:
        message.copy = event.copy
        message.wants_answer = True
    if event.owner or event.initiator:
        message.owner, message.initiator = event.owner, event.initiator
    if event.finishes:
        message.finishes = event.finishes
    if not event.blockable:
        message.non_blockable = True
    return message


_MASK = (1 << 64) - 1
_CAUSES = {cause.value: cause for cause in Cause}


def event_from_proto(message: event_pb2.Event) -> Event:
    """An event as the core has it; a cause of a newer daemon is None.

    Raises:
        InvalidRequestError: an event type or reason of another version (EINVAL).
    """
    return Event(
        operation_id=message.operation_id,
        space_id=message.space_id,
        revision=message.revision,
        etype=event_type_from_proto(message.type),
        reason=reason_from_proto(message.reason),
        cause=_CAUSES.get(message.cause),
        spans=ranges_from_proto(message.ranges),
        owner=message.owner,
        blockable=not message.non_blockable,
        entries=message.entries,
        initiator=message.initiator,
        copy=message.copy,
        keeps=message.keeps,
        finishes=message.finishes,
    )
