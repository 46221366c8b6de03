"""The mailbox: what leaves when, in which order, and how much may be under way."""

from __future__ import annotations

import asyncio

import pytest

from hmm.events import Event, EventType
from hmm.units import AddressRange
from hmm_proto import convert
from hmm_proto.v1 import device_pb2, event_pb2, session_pb2
from hmm_server.mailbox import Mailbox, News, Posting, Window
from hmm_server.replies import encoded

PAGE = 4096


def _posting(number: int, entries: bytes = b"") -> Posting:
    spans = (AddressRange(number * PAGE, (number + 1) * PAGE),)
    event = Event(number, 1, number, EventType.MUNMAP, None, None, spans, entries=entries)
    return Posting(News(event, "munmap", "", 1, 0.0), mirror_ids=[1], sequences=[number])


def _send(posting: Posting) -> bytes | None:
    if not posting.mirror_ids:
        return None
    message = session_pb2.SessionResponse(events=[convert.event_to_proto(posting.event)]).SerializeToString()
    posting.size_bytes = len(message)
    return message


def _mailbox(credit: int = 256, queue_bytes: int = 1 << 20, part_bytes: int = 1 << 16) -> Mailbox:
    return Mailbox(Window(credit, queue_bytes, part_bytes), _send)


def _reply(request_id: int, size: int = 0) -> bytes:
    return encoded(request_id, "device_read", device_pb2.DeviceReadResponse(data=bytes(size)))


async def _take(mailbox: Mailbox) -> session_pb2.SessionResponse:
    message = await mailbox.take()
    assert message is not None
    return session_pb2.SessionResponse.FromString(message)


def _revisions(message: session_pb2.SessionResponse) -> list[int]:
    return [event.revision for event in message.events]


async def test_take_returns_everything_that_waits_as_one_message() -> None:
    """A message costs more than what is in it: welcome, events, replies and violations go together."""
    mailbox = _mailbox()
    mailbox.welcome(event_pb2.Welcome(epoch=7))
    for number in (1, 2, 3):
        mailbox.post(_posting(number))
        mailbox.reply(_reply(number))
    mailbox.reject([event_pb2.ProtocolViolation(rule="no")])
    message = await _take(mailbox)
    assert (message.welcome.epoch, _revisions(message), len(message.violations)) == (7, [1, 2, 3], 1)
    assert [reply.request_id for reply in message.replies] == [1, 2, 3]
    assert not message.HasField("bye")


async def test_a_reply_that_leaves_alone_is_not_copied() -> None:
    """It was written down as the message that leaves."""
    mailbox = _mailbox()
    reply = _reply(1, 100)
    mailbox.reply(reply)
    assert await mailbox.take() is reply


async def test_take_waits_until_there_is_something() -> None:
    """The writer sleeps while nothing waits, and wakes with the first thing to tell."""
    mailbox = _mailbox()
    taking = asyncio.ensure_future(_take(mailbox))
    await asyncio.sleep(0)
    assert not taking.done()
    mailbox.post(_posting(1))
    mailbox.begin()
    assert _revisions(await taking) == [1]


async def test_events_wait_when_credit_is_used_up() -> None:
    """At most `credit` events are unanswered; one more leaves for each that is released."""
    mailbox = _mailbox(credit=2)
    postings = [_posting(number) for number in range(1, 5)]
    for posting in postings:
        mailbox.post(posting)
    assert _revisions(await _take(mailbox)) == [1, 2]
    taking = asyncio.ensure_future(_take(mailbox))
    await asyncio.sleep(0)
    assert not taking.done()
    mailbox.release(postings[0])
    assert _revisions(await taking) == [3]
    assert (mailbox.in_flight, len(mailbox.events)) == (2, 1)


async def test_events_wait_when_bytes_are_used_up() -> None:
    """Unanswered events have a bound in bytes; one that is larger leaves when it has the stream for itself."""
    mailbox = _mailbox(queue_bytes=2000)
    large, small = _posting(1, bytes(4000)), _posting(2)
    mailbox.post(large)
    mailbox.post(small)
    assert _revisions(await _take(mailbox)) == [1]
    assert mailbox.in_flight_bytes > 4000
    mailbox.release(large)
    assert _revisions(await _take(mailbox)) == [2]
    mailbox.release(small)
    assert (mailbox.in_flight, mailbox.in_flight_bytes) == (0, 0)


async def test_events_are_left_out_when_nobody_has_to_hear_of_them() -> None:
    """An event whose mirrors were fenced while it waited does not leave, and uses no credit."""
    mailbox = _mailbox(credit=1)
    gone = _posting(1)
    gone.mirror_ids = []
    mailbox.post(gone)
    mailbox.post(_posting(2))
    assert _revisions(await _take(mailbox)) == [2]


async def test_events_pass_replies_that_wait() -> None:
    """Replies leave in parts; an event that comes meanwhile is in the next message, ahead of the rest."""
    mailbox = _mailbox(part_bytes=1000)
    for number in range(3):
        mailbox.reply(_reply(number, 900))
    assert len((await _take(mailbox)).replies) == 1
    mailbox.post(_posting(1))
    message = await _take(mailbox)
    assert (_revisions(message), [reply.request_id for reply in message.replies]) == ([1], [1])


async def test_room_waits_until_replies_were_read() -> None:
    """Whoever has large things to add waits while replies pile up."""
    mailbox = _mailbox(queue_bytes=100, part_bytes=50)
    mailbox.reply(_reply(1, 200))
    assert mailbox.is_full
    waiting = asyncio.ensure_future(mailbox.room())
    await asyncio.sleep(0)
    assert not waiting.done()
    await _take(mailbox)
    await waiting
    assert not mailbox.is_full


async def test_close_flushes_replies_and_drops_events() -> None:
    """The farewell is the last message: replies that wait leave before it, events do not."""
    mailbox = _mailbox(part_bytes=10)
    mailbox.post(_posting(1))
    mailbox.reply(_reply(1, 100))
    mailbox.reply(_reply(2, 100))
    mailbox.close("enough")
    mailbox.post(_posting(2))
    mailbox.reply(_reply(3))
    mailbox.close("twice")
    first, second = await _take(mailbox), await _take(mailbox)
    assert ([len(first.replies), len(second.replies)], first.HasField("bye")) == ([1, 1], False)
    assert second.bye.reason == "enough"
    assert not first.events
    assert not second.events
    assert await mailbox.take() is None


@pytest.mark.parametrize("reason", ["", "enough"])
async def test_take_ends_after_close_when_nothing_waits(reason: str) -> None:
    """A closed mailbox ends its writer, whether it waits or comes later."""
    mailbox = _mailbox()
    taking = asyncio.ensure_future(mailbox.take())
    await asyncio.sleep(0)
    mailbox.close(reason)
    message = await taking
    assert (session_pb2.SessionResponse.FromString(message).bye.reason if message else "") == reason
    assert await mailbox.take() is None
