"""The writer: one write at a time, begun at once, and everything that waits with the next one."""

from __future__ import annotations

import asyncio

import grpc.aio
import pytest

from hmm_proto.writer import Writer


class _Stream:
    """What is to be told, what was written of it, and when each write is done."""

    def __init__(self) -> None:
        self.words: list[bytes] = []
        self.is_over = False
        self.written: list[bytes] = []
        self.writes: list[asyncio.Future[None]] = []

    def take(self) -> bytes | None:
        words, self.words = self.words, []
        return b" ".join(words) if words else None

    async def write(self, message: bytes) -> None:
        assert all(write.done() for write in self.writes), "two writes overlap"
        self.written.append(message)
        self.writes.append(asyncio.get_running_loop().create_future())
        await self.writes[-1]

    def writer(self) -> Writer:
        return Writer(self.take, lambda: self.is_over, self.write)


async def test_message_leaves_at_once_when_it_is_flushed() -> None:
    """Whoever gathers what belongs together begins to write it: no turn of the loop lies between."""
    stream = _Stream()
    writer = stream.writer()
    writer.gather()
    for word in (b"a", b"b"):
        stream.words.append(word)
        writer.wake()
    assert not stream.written
    writer.flush()
    assert stream.written == [b"a b"]


async def test_message_leaves_in_the_next_turn_when_nobody_flushes() -> None:
    """What there is to tell before the writer, and in one turn, goes together."""
    stream = _Stream()
    stream.words.append(b"before")
    writer = stream.writer()
    stream.words.append(b"a")
    writer.wake()
    assert not stream.written
    await asyncio.sleep(0)
    assert stream.written == [b"before a"]


async def test_writes_do_not_overlap() -> None:
    """What comes during a write goes together when it is done."""
    stream = _Stream()
    writer = stream.writer()
    for word in (b"a", b"b", b"c"):
        stream.words.append(word)
        writer.flush()
    assert stream.written == [b"a"]
    stream.writes[0].set_result(None)
    await asyncio.sleep(0)
    assert stream.written == [b"a", b"b c"]


async def test_writer_ends_when_the_last_message_has_left() -> None:
    """Not when it begins to leave."""
    stream = _Stream()
    writer = stream.writer()
    stream.words.append(b"bye")
    stream.is_over = True
    writer.flush()
    assert stream.written == [b"bye"]
    assert not writer.ended.done()
    stream.writes[0].set_result(None)
    await writer.ended


@pytest.mark.parametrize("error", [grpc.aio.UsageError(), asyncio.InvalidStateError(), asyncio.CancelledError()])
async def test_writer_ends_when_the_stream_has_ended(error: BaseException) -> None:
    """Whatever there is to tell then is not written, and nobody gets an error for it."""
    stream = _Stream()
    writer = stream.writer()
    stream.words.append(b"a")
    writer.flush()
    stream.writes[0].set_exception(error)
    await writer.ended
    stream.words.append(b"b")
    writer.flush()
    assert stream.written == [b"a"]


async def test_writer_closes_in_the_middle_of_a_write() -> None:
    """The write is given up, and no other begins when it would have been done."""
    stream = _Stream()
    writer = stream.writer()
    stream.words.append(b"a")
    writer.flush()
    writer.close()
    assert writer.ended.done()
    stream.words.append(b"b")
    stream.writes[0].set_result(None)
    await asyncio.sleep(0)
    writer.close()
    assert stream.written == [b"a"]


async def test_bug_ends_the_writer_and_not_who_has_something_to_tell() -> None:
    """Who waits for the end gets it."""

    async def write(_: bytes) -> None:
        raise AssertionError("a bug")

    stream = _Stream()
    writer = Writer(stream.take, lambda: False, write)
    stream.words.append(b"a")
    writer.flush()
    with pytest.raises(AssertionError, match="a bug"):
        await writer.ended
