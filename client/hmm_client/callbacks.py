"""Running a driver's callbacks: in order, marked, and answered when they return.

A mirror's events are handled one after the other.  While an update waits for a call of its own, the next events are
started all the same: one of them may be what that call waits for (a fault ends in an event to the mirror that faults).

A call that is made inside a callback says so, on any thread and in any task that the callback awaits: the running
`Callback` travels in a context variable, and the library marks calls with it.  A call that could only end after the
callback then fails at once with EDEADLK.

**Source**: proto/hmm_proto/v1/session.proto: whoever waits for a call of its own must go on answering.

**Invariants**: every event that was delivered is finished exactly once, unless its callback is cancelled.

**Absent**: how answers travel (`acknowledgements.py`, `session.py`).
"""

from __future__ import annotations

import asyncio
import errno as errnos
import inspect
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Executor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar, copy_context
from typing import TYPE_CHECKING, Any

import numpy as np

from hmm.errors import HmmError
from hmm.events import EventType
from hmm.units import MirrorId
from hmm_client.driver import Driver
from hmm_proto.convert import entries_to_proto, ranges_to_proto
from hmm_proto.v1 import event_pb2

if TYPE_CHECKING:
    from hmm_client.event import Event

_LOG = logging.getLogger(__name__)


class Callback:
    """One update under way."""

    __slots__ = ("_calls", "_owner", "active", "event")

    def __init__(self, event: Event, owner: Callbacks) -> None:
        self.event = event
        self.active = True
        self._owner = owner
        self._calls = 0

    def __str__(self) -> str:
        return f"{self.event.mirror.id}:{self.event.sequence}"

    @property
    def is_waiting(self) -> bool:
        """True while a call that was made inside is under way."""
        return self._calls > 0

    @contextmanager
    def waiting(self) -> Iterator[Callback]:
        """Around a call made inside."""
        self._calls += 1
        self._owner.proceed()
        try:
            yield self
        finally:
            self._calls -= 1


_current: ContextVar[Callback | None] = ContextVar("hmm_client.callback", default=None)


_OUTSIDE: AbstractContextManager[None] = nullcontext()


def current() -> Callback | None:
    """The callback that a call of the library is made in, None outside of one; the call is made `waiting` in it."""
    callback = _current.get()
    return callback if callback is not None and callback.active else None


def waiting() -> AbstractContextManager[Callback | None]:
    """Around every call of the library: gives the callback that it is made in, None outside of one."""
    callback = current()
    return _OUTSIDE if callback is None else callback.waiting()


class Callbacks:
    """The callbacks of one mirror.

    Attributes:
        heard: the last event whose callback has begun.
        driver_is_idle: its `update` is that of the base class: there is nothing to be done.
        is_direct: its `update` is a plain function that runs in the loop, or there is nothing to be done.

    Args:
        driver: whose `update` and `release` are called.
        finish: called once for each event, with the answer, None for a plain one.
        executor: where plain functions run; None: in the loop itself.
        concurrent: start each event at once, without waiting for those before it.
        busy: the mirrors whose callbacks are running; this one's is entered there.
    """

    def __init__(
        self,
        driver: Driver,
        finish: Callable[[Event, event_pb2.Answer | None], None],
        *,
        executor: Executor | None = None,
        concurrent: bool = False,
        busy: set[MirrorId] | None = None,
    ) -> None:
        self.driver_is_idle = type(driver).update is Driver.update and "update" not in vars(driver)
        self._busy = set() if busy is None else busy
        self._driver = driver
        self._finish = finish
        self._executor = None if inspect.iscoroutinefunction(driver.update) else executor
        self._concurrent = concurrent
        in_the_loop = self._executor is None and not inspect.iscoroutinefunction(driver.update)
        self.is_direct = self.driver_is_idle or in_the_loop
        self._queue: deque[Event] = deque()
        self._running: dict[Callback, asyncio.Task[None]] = {}
        self.heard = 0

    def deliver(self, event: Event) -> None:
        """Handle an event, now or after those before it."""
        if self._queue or (self._running and not self._may_start()):
            self._queue.append(event)
        else:
            self._start(event)

    def run(self, event: Event) -> bool:
        """Let the driver handle a change at once; nothing of its mirror is under way.

        Returns: True when it is done with nothing to say, which is not told to `finish`.
        """
        try:
            result = self._driver.update(event)
        except Exception as error:  # noqa: BLE001 - whatever a driver raises is its answer
            self._finish(event, _refusal(event, error))
            return False
        if result is None:
            return True
        self._conclude(event, result)
        return False

    def proceed(self) -> None:
        """Start what may be started: something has ended or waits."""
        while self._queue and self._may_start():
            self._start(self._queue.popleft())

    def drop(self) -> None:
        """Forget the events that were not started: nobody waits for them any more."""
        self._queue.clear()

    async def cancel(self) -> None:
        """End everything; what is not finished stays unanswered."""
        self.drop()
        tasks = [task for task in self._running.values() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _may_start(self) -> bool:
        return self._concurrent or all(callback.is_waiting for callback in self._running)

    def _start(self, event: Event) -> None:
        if self._executor is not None:
            self._start_task(event, self._executor)
            return
        try:
            result = self._call(event)
        except Exception as error:  # noqa: BLE001 - whatever a driver raises is its answer
            self.heard = event.sequence
            self._finish(event, _refusal(event, error))
            return
        self._conclude(event, result)

    def _conclude(self, event: Event, result: Any) -> None:
        if result is not None and inspect.isawaitable(result):
            self._start_task(event, result)
            return
        self.heard = event.sequence
        try:
            answer = None if result is None and not event.wants_answer else _answer(event, result)
        except Exception as error:  # noqa: BLE001 - what it returned is no answer: as good as an exception
            answer = _refusal(event, error)
        self._finish(event, answer)

    def _call(self, event: Event) -> Any:
        if event.type is EventType.RELEASE:
            return self._driver.release(event.mirror)
        if event.copy:
            return self._carry(event)
        return self._driver.update(event)

    def _carry(self, event: Event) -> Any:
        # The device stops using the pages first, except those of a fork, which it keeps.
        to_device = event.type is EventType.COPY_TO_DEVICE
        copy = self._driver.copy_to_device if to_device else self._driver.copy_from_device
        stopped = None if event.keeps else self._driver.update(event)
        return _then(stopped, copy, event) if inspect.isawaitable(stopped) else copy(event)

    def _start_task(self, event: Event, work: Executor | Awaitable[Any]) -> None:
        callback = Callback(event, self)
        context = copy_context()
        context.run(_current.set, callback)
        loop = asyncio.get_running_loop()
        if isinstance(work, Executor):
            thread_context = context.copy()
            work = loop.run_in_executor(work, lambda: thread_context.run(self._call, event))
        self._busy.add(event.mirror.id)
        self._running[callback] = loop.create_task(self._run(callback, work), context=context)

    async def _run(self, callback: Callback, work: Awaitable[Any]) -> None:
        event = callback.event
        self.heard = max(self.heard, event.sequence)  # what is awaited now begins in this very step
        try:
            result = await work
            answer = _answer(event, await result if inspect.isawaitable(result) else result)
        except Exception as error:  # noqa: BLE001 - whatever a driver raises is its answer
            answer = _refusal(event, error)
        finally:
            callback.active = False
            del self._running[callback]
            if not self._running:
                self._busy.discard(event.mirror.id)
        self._finish(event, answer)
        self.proceed()


async def _then(stopped: Awaitable[Any], copy: Callable[[Event], Any], event: Event) -> Any:
    await stopped
    results = copy(event)
    return await results if inspect.isawaitable(results) else results


def _answer(event: Event, written: Any) -> event_pb2.Answer | None:
    """What a callback returned, as an answer; None when there is nothing to say but that it is done."""
    if written is None and not event.wants_answer:
        return None
    answer = event_pb2.Answer(mirror_id=event.mirror.id, event_sequence=event.sequence)
    if event.copy:
        answer.results = bytes(event.npages) if written is None else bytes(written)
    elif isinstance(written, np.ndarray):
        answer.dirty_pages = entries_to_proto(written)
    elif written is not None:
        answer.dirty.CopyFrom(ranges_to_proto(written))
    return answer


def _refusal(event: Event, error: Exception) -> event_pb2.Answer:
    """What a callback raised, as an answer: the errno of an OSError or HmmError, EIO for everything else.

    Faults, copies to the device and events that may not block can be refused; what else is raised goes to the log.
    """
    number = error.errno if isinstance(error, OSError | HmmError) else None
    if not number:
        _LOG.error("%r: the driver failed, the answer is EIO", event, exc_info=error)
    elif not (event.is_fault or event.type is EventType.COPY_TO_DEVICE or isinstance(error, BlockingIOError)):
        _LOG.warning("%r: the driver answered with an error, which ends a mirror of 2015: %s", event, error)
    return event_pb2.Answer(mirror_id=event.mirror.id, event_sequence=event.sequence, errno=number or errnos.EIO)
