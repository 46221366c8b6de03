"""What waits to be written to one stream, and how much of it may be under way.

Whoever has something to tell appends and goes on; one writer for each stream takes everything that is ready as one
message.  Events are taken only as far as the stream's window reaches: `credit` unanswered events and `queue_bytes` of
them.  Beyond it they wait here, and with them the operations that made them, under the operations' own deadlines.

**Source**: two overlapping writes on one gRPC stream lose a message, so there is one writer; flow control of HTTP/2
lets megabytes pass to a client that never reads, so there is a window.

**Invariants**: events leave in the order in which they were posted; `in_flight` and `in_flight_bytes` are those of
the events that left and are not answered by all their mirrors.

**Absent**: which mirrors a stream serves and what answers mean (streams.py); gRPC.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hmm.dispatch import Dispatch
from hmm.events import Event
from hmm.units import MirrorId
from hmm_proto.v1 import event_pb2, session_pb2

if TYPE_CHECKING:
    from hmm_server.served import Group

BATCH_EVENTS = 256
"""Events in one message."""
VIOLATIONS_MAX = 256
"""Rejected answers that wait; further ones are only counted."""


@dataclass(slots=True, eq=False)
class News:
    """One event as all streams tell it whose mirrors have to hear of it.

    Attributes:
        made_s: when the core made it, on the monotonic clock.
        encoded: all that is the same for everybody but the entries, as a part of an `Event`; empty until it leaves.
    """

    event: Event
    operation: str
    caller: str
    notifier_seq: int
    made_s: float
    encoded: bytes = b""


@dataclass(slots=True, eq=False)
class Posting:
    """One event for all mirrors of one stream that have to hear of it.

    Attributes:
        sequences: the event's number for each of `mirror_ids`.
        sent_s: when it left, on the monotonic clock; 0 while it waits.
        size_bytes: as sent; 0 while it waits.
        dispatch: what it is a part of.
        group: `mirror_ids`, if they are all of a group.
        waiting: mirrors for which it left, and that have not answered.
    """

    news: News
    mirror_ids: Sequence[MirrorId]
    sequences: Sequence[int]
    dispatch: Dispatch | None = None
    group: Group | None = None
    sent_s: float = 0.0
    size_bytes: int = 0
    waiting: set[MirrorId] = field(default_factory=set)

    @property
    def event(self) -> Event:
        """What happens."""
        return self.news.event

    @property
    def is_awaited(self) -> bool:
        """Whether the call that made it waits for all of its mirrors."""
        if self.dispatch is None:
            return False
        waiting = self.dispatch.waiting
        return len(waiting) == len(self.dispatch.sequences) or waiting.issuperset(self.mirror_ids)

    def sequence_of(self, mirror_id: MirrorId) -> int:
        """The event's number for one of its mirrors."""
        return self.sequences[self.group.index[mirror_id] if self.group else self.mirror_ids.index(mirror_id)]


@dataclass(frozen=True, slots=True)
class Window:
    """How much of one stream may be under way.

    Attributes:
        credit: events that are sent and not answered.
        queue_bytes: of these events together; also of the replies that wait for the writer.
        part_bytes: after which a message is closed.
    """

    credit: int
    queue_bytes: int
    part_bytes: int


class Mailbox:
    """The outgoing half of one stream.

    Attributes:
        reply_bytes: of the replies that wait.
        reply_bytes_max: small replies have filled as much again as large ones may: with so many waiting nothing more
            may be asked for until some are read.
        wake: called whenever there may be something to tell; as it is made, it wakes whoever waits in `take`.
        begin: called when there is something to tell and nothing will be added for now; the same, as it is made.
    """

    def __init__(self, window: Window, send: Callable[[Posting], bytes | None]) -> None:
        """Make an empty mailbox.

        Args:
            send: writes a posting down as it leaves, as a SessionResponse with one event in it, and notes that it left,
                and its size; None when nobody has to hear of it any longer.
        """
        self.window = window
        self.events: deque[Posting] = deque()
        self.in_flight = 0
        self.in_flight_bytes = 0
        self.reply_bytes = 0
        self.reply_bytes_max = 2 * window.queue_bytes
        self.closed = False
        self._send = send
        self._welcome: event_pb2.Welcome | None = None
        self._replies: deque[bytes] = deque()
        self._violations: list[event_pb2.ProtocolViolation] = []
        self._farewell = ""
        self._waiting: asyncio.Future[None] | None = None
        self._room = asyncio.Event()
        self.wake: Callable[[], None] = self._wake_taker
        self.begin: Callable[[], None] = self._wake_taker

    # ---- what is to be told

    def welcome(self, welcome: event_pb2.Welcome) -> None:
        """The first thing to be told."""
        self._welcome = welcome
        self.wake()

    def post(self, posting: Posting) -> None:
        """An event; it leaves when the window permits.  Whoever posts it asks the writer to `begin`."""
        if not self.closed:
            self.events.append(posting)

    def reply(self, reply: bytes) -> None:
        """The reply to a call, or a part of it, as `replies.encoded` writes it."""
        if not self.closed:
            self._replies.append(reply)
            self.reply_bytes += len(reply)
            self.wake()

    def reject(self, violations: list[event_pb2.ProtocolViolation]) -> None:
        """Answers that were rejected."""
        if violations and not self.closed:
            self._violations += violations[: VIOLATIONS_MAX - len(self._violations)]
            self.wake()

    def close(self, why: str) -> None:
        """Let nothing in any more; replies that wait still leave, then a farewell.  Events that wait do not."""
        if not self.closed:
            self.closed = True
            self._farewell = why
            self.events.clear()
            self.wake()
            self._room.set()

    def release(self, posting: Posting) -> None:
        """All mirrors of an event have answered, or will not: its part of the window is free again."""
        self.in_flight -= 1
        self.in_flight_bytes -= posting.size_bytes
        if self.events:
            self.wake()

    @property
    def is_full(self) -> bool:
        """True when replies wait that the client does not read: nothing large may be added."""
        return self.reply_bytes >= self.window.queue_bytes

    # ---- the writer

    async def take(self) -> bytes | None:
        """The next message, as soon as there is something to tell; None after the farewell."""
        while (message := self.next()) is None and not self.closed:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
            self._waiting = None
        return message

    def next(self) -> bytes | None:
        """The next message, as it travels; None when there is nothing to tell.  Wakes when something is left.

        An event or a reply that leaves alone is not copied.
        """
        parts: list[bytes] = []
        if self._welcome or self._violations:
            first = session_pb2.SessionResponse(welcome=self._welcome, violations=self._violations)
            parts.append(first.SerializeToString())
            self._welcome, self._violations = None, []
        if self.events:
            self._take_events(parts)
        if self._replies:
            self._take_replies(parts)
        if self._farewell and not self._replies:
            bye, self._farewell = session_pb2.Bye(reason=self._farewell), ""
            parts.append(session_pb2.SessionResponse(bye=bye).SerializeToString())
        if self._replies or self.closed or (self.events and self._may_send()):
            self.wake()
        return b"".join(parts) if parts else None

    def _wake_taker(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def room(self) -> None:
        """Wait until the client has read enough for something large to be added."""
        while self.is_full and not self.closed:
            self._room.clear()
            await self._room.wait()

    def _may_send(self) -> bool:
        # An event that is larger than the window leaves when it has the stream for itself.
        if not self.in_flight:
            return True
        room = self.window.queue_bytes - self.in_flight_bytes
        return self.in_flight < self.window.credit and _size_estimate(self.events[0]) <= room

    def _take_events(self, parts: list[bytes]) -> None:
        number = size = 0
        while self.events and number < BATCH_EVENTS and size < self.window.part_bytes and self._may_send():
            posting = self.events.popleft()
            event = self._send(posting)
            if event is None:
                continue
            self.in_flight += 1
            self.in_flight_bytes += posting.size_bytes
            number += 1
            size += posting.size_bytes
            parts.append(event)

    def _take_replies(self, parts: list[bytes]) -> None:
        if self.reply_bytes >= self.window.queue_bytes:
            self._room.set()
        if self.reply_bytes <= self.window.part_bytes:
            parts += self._replies
            self._replies.clear()
            self.reply_bytes = 0
            return
        size = 0
        while self._replies and (not size or size + len(self._replies[0]) <= self.window.part_bytes):
            reply = self._replies.popleft()
            size += len(reply)
            parts.append(reply)
        self.reply_bytes -= size


def _size_estimate(posting: Posting) -> int:
    # Numbers are at most ten bytes each; what is fixed stays well below 256 bytes.
    return 256 + len(posting.event.entries) + 16 * len(posting.event.spans) + 20 * len(posting.mirror_ids)
