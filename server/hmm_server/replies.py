"""Replies: responses on their way, some with arrays that have a word for each page.

A reply on a session is written down once, when it is given: its arrays are copied once, into the message that leaves.

**Invariants**: all arrays of one reply are equally long; parts put together are the whole.

**Absent**: which calls have such replies (device_calls.py, hmm_calls.py), when they leave (mailbox.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from google.protobuf.message import Message

from hmm.units import Entries
from hmm_proto import convert, wire
from hmm_proto.v1 import session_pb2

Arrays: TypeAlias = Mapping[str, Entries]
"""Fields of a response, and the words that belong in them."""
NO_ARRAYS: Arrays = MappingProxyType({})
FEW = 64
"""Arrays up to this length are copied with their message: that is sooner done than keeping them out of it."""
_REPLY = wire.tag(session_pb2.SessionResponse, "replies")
_REQUEST_ID = wire.number_tag(session_pb2.SessionReply, "request_id")
_MORE = wire.number_tag(session_pb2.SessionReply, "more") + wire.varint(True)


def encoded(request_id: int, name: str, response: Message, arrays: Arrays = NO_ARRAYS, *, more: bool = False) -> bytes:
    """A SessionResponse with one reply in it, as it travels; many of them in a row are one with many replies.

    Args:
        name: which field of SessionReply `response` is.
        more: it is a part of the reply, and not the last one.

    Cost: one copy of the arrays.
    """
    head = _REQUEST_ID + wire.varint(request_id) + (_MORE if more else b"")
    return wire.nested(_REPLY, head, wire.tag(session_pb2.SessionReply, name), response, arrays)


def without_entries(response: Any) -> Any:
    """The response to a caller who does not want entries."""
    if isinstance(response, ArrayReply):
        return response.response
    response.ClearField("entries")
    return response


class ArrayReply(NamedTuple):
    """A response without its arrays, and the arrays, uint64[npages] each, by the names of their fields."""

    response: Any
    arrays: Arrays

    def whole(self) -> Any:
        """The response with its arrays."""
        for name, array in self.arrays.items():
            setattr(self.response, name, convert.entries_to_proto(array))
        return self.response

    def parts(self, part_bytes: int) -> Sequence[tuple[Any, Arrays, bool]]:
        """Cut a long reply; everything but the arrays is in the last part.

        Returns: for each part a response, its arrays, whether more follow.
        """
        arrays = self.arrays
        if not arrays:
            return ((self.response, NO_ARRAYS, False),)
        npages = next(iter(arrays.values())).size
        step = max(1, (part_bytes >> 3) // len(arrays))
        if npages <= step:
            return ((self.whole(), NO_ARRAYS, False),) if npages <= FEW else ((self.response, arrays, False),)
        last = (npages - 1) // step * step
        parts = [(type(self.response)(), self._slice(start, start + step), True) for start in range(0, last, step)]
        return (*parts, (self.response, self._slice(last, npages), False))

    def _slice(self, start: int, end: int) -> Arrays:
        return {name: array[start:end] for name, array in self.arrays.items()}
