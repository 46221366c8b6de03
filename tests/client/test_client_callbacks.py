"""Callbacks of one mirror: when they start, where they run, and what becomes of them in the end."""

from __future__ import annotations

import asyncio
import errno as errnos
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from hmm.errors import OutOfFramesError
from hmm_client import Driver, Event
from hmm_client.callbacks import Callbacks, waiting
from hmm_client.event import Change
from hmm_proto.v1 import event_pb2, types_pb2

MIRROR: Any = SimpleNamespace(id=5)


def event(sequence: int) -> Event:
    """An event without ranges."""
    return Event(MIRROR, sequence, Change(event_pb2.Event(type=types_pb2.EVENT_TYPE_MIGRATE)))


class Answers:
    """Where answers arrive: sequence and errno, in order."""

    def __init__(self) -> None:
        self.all: list[tuple[int, int]] = []
        self.arrived = asyncio.Event()

    def __call__(self, event: Event, answer: event_pb2.Answer | None) -> None:
        """One answer."""
        self.all.append((event.sequence, answer.errno if answer else 0))
        self.arrived.set()

    async def wait_for(self, count: int) -> list[tuple[int, int]]:
        """All answers, once there are so many."""
        while len(self.all) < count:
            self.arrived.clear()
            await self.arrived.wait()
        return self.all


async def test_plain_update_is_answered_before_deliver_returns() -> None:
    """A plain function runs in the loop, at once: its answer is there when the reader goes on."""
    answers = Answers()
    callbacks = Callbacks(Driver(), answers)
    callbacks.deliver(event(1))
    callbacks.deliver(event(2))
    assert answers.all == [(1, 0), (2, 0)]


@pytest.mark.parametrize(
    ("error", "errno"),
    [
        (OSError(errnos.ENOMEM, "no room"), errnos.ENOMEM),
        (OutOfFramesError("no room"), errnos.ENOMEM),
        (OSError("without a number"), errnos.EIO),
        (KeyError("a bug"), errnos.EIO),
    ],
)
async def test_exception_is_the_answer(error: Exception, errno: int) -> None:
    """The errno of an exception that has one, EIO for all others; from plain functions and coroutines."""

    class Plain(Driver):
        def update(self, event: Event) -> None:
            raise error

    class Coroutine(Driver):
        async def update(self, event: Event) -> None:
            raise error

    for driver in (Plain(), Coroutine()):
        answers = Answers()
        Callbacks(driver, answers).deliver(event(1))
        assert await answers.wait_for(1) == [(1, errno)]


async def test_nonsense_that_an_update_returns_is_answered_as_an_exception_is() -> None:
    """It is the driver's mistake: it must not end the session, nor leave the event unanswered."""

    class Plain(Driver):
        def update(self, event: Event) -> Any:
            return True

    class Coroutine(Driver):
        async def update(self, event: Event) -> Any:
            return True

    with ThreadPoolExecutor(1) as executor:
        for driver, where in ((Plain(), None), (Plain(), executor), (Coroutine(), None)):
            answers = Answers()
            Callbacks(driver, answers, executor=where).deliver(event(1))
            assert await answers.wait_for(1) == [(1, errnos.EIO)]
    answers = Answers()
    assert not Callbacks(Plain(), answers).run(event(1))
    assert answers.all == [(1, errnos.EIO)]


async def test_plain_update_runs_on_a_thread_when_there_is_an_executor() -> None:
    """The loop stays free; one mirror's events stay in order there too."""
    threads = []

    class Threaded(Driver):
        def update(self, event: Event) -> None:
            threads.append(threading.current_thread())

    answers = Answers()
    with ThreadPoolExecutor(4) as executor:
        callbacks = Callbacks(Threaded(), answers, executor=executor)
        for sequence in range(1, 6):
            callbacks.deliver(event(sequence))
        assert await answers.wait_for(5) == [(sequence, 0) for sequence in range(1, 6)]
    assert threading.current_thread() not in threads


async def test_call_from_a_thread_is_known_to_be_made_in_its_callback() -> None:
    """The callback goes along from its thread to the loop that makes the call, whatever else runs meanwhile."""
    inside = []

    class Calling(Driver):
        def update(self, event: Event) -> None:
            inside.append((event.sequence, asyncio.run_coroutine_threadsafe(made_in(), loop).result()))

    async def made_in() -> str:
        with waiting() as callback:
            return str(callback)

    loop = asyncio.get_running_loop()
    answers = Answers()
    with ThreadPoolExecutor(4) as executor:
        callbacks = Callbacks(Calling(), answers, executor=executor)
        for sequence in range(1, 6):
            callbacks.deliver(event(sequence))
        await answers.wait_for(5)
    assert sorted(inside) == [(sequence, f"5:{sequence}") for sequence in range(1, 6)]


async def test_nothing_is_answered_when_callbacks_are_cancelled() -> None:
    """What runs is cancelled, what waits is dropped; a callback that closes its own client is spared."""
    started = asyncio.Event()

    class Hanging(Driver):
        async def update(self, event: Event) -> None:
            started.set()
            await asyncio.Event().wait()

    answers = Answers()
    callbacks = Callbacks(Hanging(), answers)
    callbacks.deliver(event(1))
    callbacks.deliver(event(2))
    await started.wait()
    await callbacks.cancel()
    assert answers.all == []

    class Closing(Driver):
        async def update(self, event: Event) -> None:
            await own.cancel()

    own = Callbacks(Closing(), answers)
    own.deliver(event(1))
    assert await answers.wait_for(1) == [(1, 0)]


async def test_call_outside_of_callbacks_is_in_none() -> None:
    """Nothing is marked that is not made inside an update."""
    with waiting() as callback:
        assert callback is None


async def test_event_is_heard_when_its_callback_begins() -> None:
    """What an access names as heard: a plain function's event at once, a coroutine's with its first step."""

    class Slow(Driver):
        async def update(self, event: Event) -> None:
            seen.append(callbacks.heard)
            await asyncio.sleep(0)

    answers, seen = Answers(), list[int]()
    callbacks = Callbacks(Driver(), answers)
    for sequence in (1, 2):
        callbacks.deliver(event(sequence))
        assert callbacks.heard == sequence
    callbacks = Callbacks(Slow(), answers)
    callbacks.deliver(event(3))
    assert callbacks.heard == 0  # the device's table is not changed yet
    await answers.wait_for(3)
    assert (seen, callbacks.heard) == ([3], 3)
