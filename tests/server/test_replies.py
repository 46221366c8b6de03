"""Replies as they travel: written by hand, read by protobuf."""

from __future__ import annotations

import numpy as np
import pytest

from hmm_proto.v1 import device_pb2, hmm_pb2, session_pb2, types_pb2
from hmm_server.replies import ArrayReply, encoded

PART_BYTES = 64


def _read(written: bytes) -> list[session_pb2.SessionReply]:
    return list(session_pb2.SessionResponse.FromString(written).replies)


@pytest.mark.parametrize("request_id", [0, 1, 127, 128, 300, (1 << 64) - 1])
@pytest.mark.parametrize("more", [False, True])
def test_reply_is_read_as_protobuf_would_have_written_it(request_id: int, more: bool) -> None:
    """Its number, whether more follows, and the response, under the name of the call."""
    response = device_pb2.FaultResponse(result=types_pb2.CallResult(operation_id=9), range_ends=[4096, 8192])
    (reply,) = _read(encoded(request_id, "fault", response, more=more))
    assert reply == session_pb2.SessionReply(request_id=request_id, more=more, fault=response)


def test_replies_in_a_row_are_one_message() -> None:
    """What the mailbox joins is one message with all of them, in order."""
    written = b"".join(encoded(number, "dirty_range", device_pb2.DirtyRangeResponse()) for number in range(3))
    assert [reply.request_id for reply in _read(written)] == [0, 1, 2]
    assert all(reply.WhichOneof("reply") == "dirty_range" for reply in _read(written))


@pytest.mark.parametrize("npages", [0, 1, 7, 8, 9, 16, 17, 1000])
def test_parts_of_a_reply_are_its_arrays_in_order(npages: int) -> None:
    """Parts are as long as they may be; everything but the entries is in the last."""
    entries = np.arange(npages, dtype=np.uint64) << np.uint64(50)
    whole = ArrayReply(device_pb2.FaultResponse(retries=3), {"entries": entries})
    written = b"".join(
        encoded(5, "fault", response, arrays, more=more) for response, arrays, more in whole.parts(PART_BYTES)
    )
    parts = _read(written)
    assert b"".join(part.fault.entries for part in parts) == entries.tobytes()
    assert [part.more for part in parts] == [True] * (len(parts) - 1) + [False]
    assert [part.fault.retries for part in parts] == [0] * (len(parts) - 1) + [3]
    assert len(parts) == max(1, -(-npages // 8))


def test_parts_of_two_arrays_share_the_room() -> None:
    """A part holds as many entries of one array as of the other."""
    src = np.arange(10, dtype=np.uint64)
    whole = ArrayReply(hmm_pb2.MigrateToDeviceResponse(), {"src": src, "dst": src + np.uint64(100)})
    written = b"".join(
        encoded(1, "migrate_to_device", response, arrays, more=more)
        for response, arrays, more in whole.parts(PART_BYTES)
    )
    parts = [reply.migrate_to_device for reply in _read(written)]
    assert [len(part.src) for part in parts] == [len(part.dst) for part in parts] == [32, 32, 16]
    assert b"".join(part.dst for part in parts) == (src + np.uint64(100)).tobytes()


def test_array_that_is_not_contiguous_is_written_in_its_order() -> None:
    """Every other entry of an array travels as these entries."""
    entries = np.arange(8, dtype=np.uint64)[::2]
    whole = ArrayReply(device_pb2.FaultResponse(), {"entries": entries})
    ((response, arrays, more),) = whole.parts(PART_BYTES)
    (reply,) = _read(encoded(1, "fault", response, arrays, more=more))
    assert reply.fault.entries == entries.tobytes()
