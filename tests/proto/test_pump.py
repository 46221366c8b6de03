"""The pump: when a write begins, and what becomes of what comes meanwhile."""

from __future__ import annotations

import asyncio

import pytest

from hmm_proto.pump import Pump, Write


class BrokenError(Exception):
    """What a write raises when its stream has ended."""


class Stream:
    """Writes what waits, all together; each write lasts until `complete`."""

    def __init__(self) -> None:
        self.waiting: list[str] = []
        self.written: list[list[str]] = []
        self.under_way: list[asyncio.Future[None]] = []
        self.pump = Pump(self._next_write, (BrokenError,))

    def tell(self, *words: str) -> None:
        """Something to write."""
        self.waiting += words
        self.pump.wake()

    def complete(self, error: Exception | None = None) -> None:
        """End the write that is under way."""
        (future,) = self.under_way
        self.under_way.clear()
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    def _next_write(self) -> Write | None:
        words, self.waiting = self.waiting, []
        return self._write(words) if words else None

    async def _write(self, words: list[str]) -> None:
        assert not self.under_way
        self.written.append(words)
        self.under_way.append(asyncio.get_running_loop().create_future())
        await self.under_way[0]


async def _turn() -> None:
    await asyncio.sleep(0)


async def test_write_has_all_that_came_in_the_same_turn_when_woken() -> None:
    """Whoever wakes the pump again and again before the loop goes on makes one message."""
    stream = Stream()
    stream.tell("a")
    stream.tell("b")
    assert not stream.written
    await _turn()
    assert stream.written == [["a", "b"]]


async def test_write_begins_at_once_when_it_is_asked_to() -> None:
    """No turn of the loop lies between `begin` and the write; what had been woken finds nothing to do."""
    stream = Stream()
    stream.tell("a")
    stream.pump.begin()
    assert stream.written == [["a"]]
    await _turn()
    assert stream.written == [["a"]]


async def test_what_comes_during_a_write_follows_together_when_that_one_is_over() -> None:
    """Two writes never overlap: neither `wake` nor `begin` begins one while one is under way."""
    stream = Stream()
    stream.tell("a")
    await _turn()
    stream.tell("b")
    stream.pump.begin()
    stream.tell("c")
    await _turn()
    assert stream.written == [["a"]]
    stream.complete()
    await _turn()
    assert stream.written == [["a"], ["b", "c"]]


async def test_nothing_is_written_when_held_until_it_is_released() -> None:
    """Whoever holds the pump decides when what it causes leaves, and needs no turn of the loop for that."""
    stream = Stream()
    stream.pump.held = True
    stream.tell("a")
    stream.pump.begin()
    await _turn()
    assert not stream.written
    stream.tell("b")
    stream.pump.release()
    assert stream.written == [["a", "b"]]


async def test_pump_does_not_look_when_nobody_has_woken_it() -> None:
    """Whoever has something to write says so."""
    stream = Stream()
    stream.waiting.append("a")
    stream.pump.held = True
    stream.pump.release()
    assert not stream.written


async def test_pump_looks_again_when_woken_while_it_found_nothing() -> None:
    """What comes while the next write is looked for, and comes too late for that look, is not forgotten."""
    stream = Stream()
    looked = []

    def look() -> Write | None:
        looked.append(len(looked))
        if len(looked) == 1:
            stream.tell("a")
            return None
        return stream._next_write()

    stream.pump = Pump(look, (BrokenError,))
    stream.pump.wake()
    await _turn()
    await _turn()
    assert stream.written == [["a"]]


async def test_no_write_begins_while_the_next_one_is_looked_for() -> None:
    """Whoever is asked what to write may ask for a write in turn: there is still one write at a time."""
    stream = Stream()

    def look() -> Write | None:
        write = stream._next_write()
        if not stream.written:
            stream.tell("b")
            stream.pump.begin()
        return write

    stream.pump = Pump(look, (BrokenError,))
    stream.tell("a")
    await _turn()
    assert stream.written == [["a"]]
    stream.complete()
    await _turn()
    assert stream.written == [["a"], ["b"]]


async def test_pump_ends_in_good_order_when_the_stream_has_ended() -> None:
    """Nothing is written on a broken stream, and nobody is told of it twice: its reader says why."""
    stream = Stream()
    stream.tell("a")
    await _turn()
    stream.complete(BrokenError())
    await stream.pump.ended
    stream.tell("b")
    await _turn()
    assert stream.written == [["a"]]


async def test_pump_ends_with_the_error_when_a_write_hits_a_bug() -> None:
    """What is no end of the stream is raised by `ended`."""
    stream = Stream()
    stream.tell("a")
    await _turn()
    stream.complete(KeyError("bug"))
    with pytest.raises(KeyError, match="bug"):
        await stream.pump.ended


async def test_write_under_way_goes_to_its_end_when_the_pump_is_finished() -> None:
    """`finish` begins no more writes; the one that has begun is not broken off."""
    stream = Stream()
    stream.tell("a")
    await _turn()
    stream.tell("b")
    stream.pump.finish()
    stream.complete()
    await _turn()
    assert stream.pump.ended.done()
    assert stream.written == [["a"]]
    assert not stream.under_way
