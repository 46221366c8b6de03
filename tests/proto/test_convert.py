"""Values of the core survive the wire; messages that make no sense are refused."""

from __future__ import annotations

import errno as errnos
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hmm.errors import InvalidRequestError, Signal
from hmm.events import Cause, Event, EventType, Reason
from hmm.file import FileKind
from hmm.frames import RegionKind
from hmm.mirror import DeadlinePolicy
from hmm.units import TASK_SIZE, AddressRange
from hmm_proto import convert
from hmm_proto.v1 import range_pb2

SPANS = (AddressRange(0x1000, 0x3000), AddressRange(0x5000, TASK_SIZE))


def test_ranges_return_equal_spans_when_decoded() -> None:
    """Ranges survive singly and as packed arrays, the empty list included."""
    assert convert.range_from_proto(convert.range_to_proto(SPANS[0])) == SPANS[0]
    assert convert.ranges_from_proto(convert.ranges_to_proto(SPANS)) == SPANS
    assert convert.ranges_from_proto(convert.ranges_to_proto(())) == ()


@pytest.mark.parametrize(
    ("starts", "ends"),
    [
        ([0x1000], []),
        ([0x2000], [0x1000]),
        ([0x1000], [TASK_SIZE + 1]),
        ([0x3000, 0x1000], [0x4000, 0x2000]),
        ([0x1000, 0x2000], [0x3000, 0x4000]),
    ],
    ids=["lengths", "backwards", "beyond", "descending", "overlapping"],
)
def test_ranges_are_malformed_when_they_make_no_sense(starts: list[int], ends: list[int]) -> None:
    """What is no list of ranges is refused with EINVAL before anything is done."""
    with pytest.raises(InvalidRequestError) as caught:
        convert.ranges_from_proto(range_pb2.AddressRanges(starts=starts, ends=ends))
    assert (caught.value.errno, caught.value.reason) == (errnos.EINVAL, "MALFORMED")


@pytest.mark.parametrize(("start", "end"), [(0x1000, 0x1000), (0x1001, 0x2000), (0x1000, 0x2001)])
def test_page_ranges_are_malformed_when_empty_or_unaligned(start: int, end: int) -> None:
    """Ranges of pages are page-aligned and not empty."""
    with pytest.raises(InvalidRequestError):
        convert.page_ranges_from_proto(range_pb2.AddressRanges(starts=[start], ends=[end]))


def test_entries_are_little_endian() -> None:
    """Page arrays travel as little-endian uint64, eight bytes each."""
    entries = np.array([1, 1 << 63], np.uint64)
    data = convert.entries_to_proto(entries)
    assert data == (1).to_bytes(8, "little") + (1 << 63).to_bytes(8, "little")
    assert np.array_equal(convert.entries_from_proto(data), entries)
    assert convert.entries_from_proto(b"").size == 0


def test_entries_are_malformed_when_cut_short() -> None:
    """Half an entry is no entry."""
    with pytest.raises(InvalidRequestError):
        convert.entries_from_proto(b"1234567")


def test_enums_return_equal_member_when_decoded() -> None:
    """Every member of every enum survives, absent reasons and signals included."""
    for etype in EventType:
        assert convert.event_type_from_proto(convert.event_type_to_proto(etype)) is etype
    for reason in (None, *Reason):
        assert convert.reason_from_proto(convert.reason_to_proto(reason)) is reason
    for policy in DeadlinePolicy:
        assert convert.policy_from_proto(convert.policy_to_proto(policy)) is policy
    for kind in FileKind:
        assert convert.file_kind_from_proto(convert.file_kind_to_proto(kind)) is kind
    for memory in (RegionKind.DEVICE_PRIVATE, RegionKind.DEVICE_COHERENT):
        assert convert.memory_kind_from_proto(convert.memory_kind_to_proto(memory)) is memory
    for signal in Signal:
        assert convert.signal_from_proto(convert.signal_to_proto(signal, 0x1000)) == (signal, 0x1000)
    assert convert.signal_from_proto(convert.signal_to_proto(None, None)) is None


@pytest.mark.parametrize(
    "decode",
    [
        convert.event_type_from_proto,
        convert.reason_from_proto,
        convert.policy_from_proto,
        convert.file_kind_from_proto,
        convert.memory_kind_from_proto,
    ],
)
def test_enums_are_malformed_when_number_is_unknown(decode: Callable[[int], object]) -> None:
    """A number of a newer version is refused and not guessed at."""
    with pytest.raises(InvalidRequestError):
        decode(99)


def test_zero_stands_for_the_default() -> None:
    """A client that sets neither policy nor kind gets FENCE, a regular file and private memory."""
    assert convert.policy_from_proto(0) is DeadlinePolicy.FENCE
    assert convert.file_kind_from_proto(0) is FileKind.FILE
    assert convert.memory_kind_from_proto(0) is RegionKind.DEVICE_PRIVATE


@pytest.mark.parametrize("cause", [None, *Cause])
def test_event_returns_equal_value_when_decoded(cause: Cause | None) -> None:
    """What a driver's library decodes is the event that the core made."""
    told = cause.told if cause else None
    event = Event(
        operation_id=9,
        space_id=3,
        revision=17,
        etype=told.etype if told else EventType.DEVICE_WFAULT,
        reason=told.reason if told else None,
        cause=cause,
        spans=SPANS,
        owner=5,
        blockable=cause is not Cause.EXIT,
        entries=b"" if cause else bytes(16),
    )
    message = convert.event_to_proto(event)
    assert convert.event_from_proto(message) == event
    assert message.pte_mask == event.etype.pte_mask & (1 << 64) - 1


@pytest.mark.parametrize(
    "field",
    [
        {"owner": 5},
        {"initiator": 6},
        {"copy": 7},
        {"keeps": True},
        {"finishes": 8},
        {"blockable": False},
        {"spans": ()},
    ],
)
def test_event_returns_equal_value_when_one_field_is_set(field: dict[str, Any]) -> None:
    """What most events do not have travels alone as well."""
    event = Event(9, 3, 17, EventType.MUNMAP, None, None, SPANS)._replace(**field)
    message = convert.event_to_proto(event)
    assert convert.event_from_proto(message) == event
    assert message.wants_answer == bool(event.copy)
