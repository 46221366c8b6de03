"""Messages put together by hand: protobuf reads them as its own."""

from __future__ import annotations

import numpy as np
import pytest

from hmm_proto import wire
from hmm_proto.v1 import device_pb2, event_pb2, session_pb2


@pytest.mark.parametrize("number", [0, 1, 127, 128, 129, 16383, 16384, 1 << 32, (1 << 63) - 1, (1 << 64) - 1])
def test_numbers_are_written_as_protobuf_writes_them(number: int) -> None:
    """Seven bits to a byte, the lowest first; a tag before it."""
    tag = wire.number_tag(session_pb2.SessionCall, "request_id")
    message = session_pb2.SessionCall.FromString(tag + wire.varint(number))
    assert message == session_pb2.SessionCall(request_id=number)


@pytest.mark.parametrize("npages", [1, 15, 16, 17, 2047, 2048, 1 << 18])
def test_nested_message_has_its_arrays(npages: int) -> None:
    """Lengths of one byte and of several, at every level."""
    words = np.arange(npages, dtype=np.uint64) * np.uint64(0x0102030405060708)
    head = wire.number_tag(session_pb2.SessionReply, "request_id") + wire.varint(7)
    written = wire.nested(
        wire.tag(session_pb2.SessionResponse, "replies"),
        head,
        wire.tag(session_pb2.SessionReply, "fault"),
        device_pb2.FaultResponse(notifier_seq=4),
        {"entries": words},
    )
    expected = session_pb2.SessionResponse()
    reply = expected.replies.add(request_id=7)
    reply.fault.notifier_seq = 4
    reply.fault.entries = words.tobytes()
    assert session_pb2.SessionResponse.FromString(written) == expected


@pytest.mark.parametrize("nbytes", [0, 1, 100, 127, 128, 1 << 20])
def test_message_is_put_together_from_parts(nbytes: int) -> None:
    """What is repeated goes on in the next part; a field of bytes may be a part of its own."""
    entries = bytes(nbytes)
    one, other = event_pb2.Event(mirror_ids=[1, 300], revision=5), event_pb2.Event(mirror_ids=[7], deadline_ms=9)
    last = (wire.tag(event_pb2.Event, "entries"), wire.varint(nbytes), entries)
    begin = wire.tag(session_pb2.SessionResponse, "events")
    written = wire.message(begin, one.SerializeToString(), other.SerializeToString(), *last)
    expected = event_pb2.Event(mirror_ids=[1, 300, 7], revision=5, deadline_ms=9, entries=entries)
    assert session_pb2.SessionResponse.FromString(written + written).events[:] == [expected, expected]


def test_empty_message_is_there_when_it_is_nested() -> None:
    """A call without arguments is a call: its field is present and empty."""
    head = wire.number_tag(session_pb2.SessionCall, "request_id") + wire.varint(1)
    written = wire.nested(
        wire.tag(session_pb2.SessionRequest, "calls"),
        head,
        wire.tag(session_pb2.SessionCall, "discard_range"),
        device_pb2.DiscardRangeRequest(),
        {},
    )
    (call,) = session_pb2.SessionRequest.FromString(written).calls
    assert call.WhichOneof("call") == "discard_range"
