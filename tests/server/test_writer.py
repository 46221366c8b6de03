"""The writer: one write at a time, begun at once, and everything that waits with the next one."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from hmm_proto.v1 import event_pb2, session_pb2
from hmm_server.mailbox import Mailbox, Window
from hmm_server.writer import Writer


class _Stream:
    """What is written, and when each write is done."""

    def __init__(self) -> None:
        self.written: list[session_pb2.SessionResponse] = []
        self.writes: list[asyncio.Future[None]] = []

    async def write(self, data: bytes) -> None:
        assert all(write.done() for write in self.writes), "two writes overlap"
        self.written.append(session_pb2.SessionResponse.FromString(data))
        self.writes.append(asyncio.get_running_loop().create_future())
        await self.writes[-1]

    @property
    def rules(self) -> list[list[str]]:
        """What was told, message by message."""
        return [[violation.rule for violation in message.violations] for message in self.written]


def _tell(mailbox: Mailbox, rule: str) -> None:
    mailbox.reject([event_pb2.ProtocolViolation(rule=rule)])


@pytest.fixture
async def stream() -> _Stream:
    """Nothing is written to it yet."""
    return _Stream()


@pytest.fixture
async def mailbox() -> Mailbox:
    """It is empty."""
    return Mailbox(Window(8, 1 << 20, 1 << 16), lambda _: None)


async def test_message_leaves_at_once_when_flushed(mailbox: Mailbox, stream: _Stream) -> None:
    """Whoever gathers what belongs together begins to write it: no turn of the loop lies between."""
    writer = Writer(mailbox, stream.write)
    writer.gather()
    _tell(mailbox, "a")
    _tell(mailbox, "b")
    assert not stream.written
    writer.flush()
    assert stream.rules == [["a", "b"]]


async def test_message_leaves_in_the_next_turn_when_nobody_flushes(mailbox: Mailbox, stream: _Stream) -> None:
    """What is told in one turn goes together."""
    _tell(mailbox, "before")
    writer = Writer(mailbox, stream.write)
    _tell(mailbox, "a")
    await asyncio.sleep(0)
    assert stream.rules == [["before", "a"]]
    writer.close()


async def test_writes_do_not_overlap(mailbox: Mailbox, stream: _Stream) -> None:
    """What comes during a write goes together when it is done."""
    writer = Writer(mailbox, stream.write)
    for rule in "abc":
        writer.gather()
        _tell(mailbox, rule)
        writer.flush()
    assert stream.rules == [["a"]]
    stream.writes[0].set_result(None)
    await asyncio.sleep(0)
    assert stream.rules == [["a"], ["b", "c"]]


async def test_writer_ends_after_the_farewell(mailbox: Mailbox, stream: _Stream) -> None:
    """It is the last message, and has to have left."""
    writer = Writer(mailbox, stream.write)
    mailbox.close("enough")
    await asyncio.sleep(0)
    assert [message.bye.reason for message in stream.written] == ["enough"]
    assert not writer.ended.done()
    stream.writes[0].set_result(None)
    await writer.ended


async def test_writer_ends_when_the_stream_has_ended(mailbox: Mailbox, stream: _Stream) -> None:
    """Whatever is told then is not written."""
    writer = Writer(mailbox, stream.write)
    _tell(mailbox, "a")
    await asyncio.sleep(0)
    stream.writes[0].set_exception(grpc.aio.UsageError())
    await writer.ended
    _tell(mailbox, "b")
    await asyncio.sleep(0)
    assert stream.rules == [["a"]]


async def test_error_of_the_mailbox_ends_the_writer(mailbox: Mailbox, stream: _Stream) -> None:
    """Who told something does not get it; who waits for the end does."""

    async def write(_: bytes) -> None:
        raise AssertionError("a bug")

    writer = Writer(mailbox, write)
    writer.gather()
    _tell(mailbox, "a")
    writer.flush()
    with pytest.raises(AssertionError, match="a bug"):
        await writer.ended
    assert not stream.written
