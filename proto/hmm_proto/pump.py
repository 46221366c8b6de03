"""What a stream has to tell, written one message at a time.

A task that waits for something to write costs two turns of the loop for each message: one until it runs, one more to
wait again.  A pump has none: it starts a write where it is asked to, and goes on when the transport says that the
write is over.

**Source**: two overlapping writes on one gRPC stream lose a message.

**Invariants**: at most one write is under way; writes begin in the order in which they were given; while one is under
way, what comes waits, to be written together; nobody is asked for a write who has not woken it.

**Absent**: what is written, and why a stream has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

Write: TypeAlias = Coroutine[Any, Any, object]
"""A write that has not begun."""


class Pump:
    """The writing half of a stream.

    Attributes:
        held: begins no write until `release`, which has to follow before anybody waits.
        ended: done when nothing is written any more: all was, or the stream has ended beneath it; or with the error of
            a bug.
    """

    def __init__(self, next_write: Callable[[], Write | None], endings: tuple[type[BaseException], ...]) -> None:
        """Write nothing yet.

        Args:
            next_write: what is to be written now; None when there is nothing now, or nothing any more.  It wakes the
                pump when it leaves something for the write after that.
            endings: what a write raises once the stream has ended.
        """
        self.held = False
        self._next_write = next_write
        self._endings: tuple[type[BaseException], ...] = (*endings, asyncio.CancelledError)
        self._loop = asyncio.get_running_loop()
        self._writing: Write | None = None
        self._woken = False
        self.ended: asyncio.Future[None] = self._loop.create_future()

    def wake(self) -> None:
        """There is something to write: it leaves in the loop's next turn at the latest, with what has come by then."""
        if not self._woken:
            self._woken = True
            if self._writing is None and not self.held:
                self._loop.call_soon(self._begin)

    def begin(self) -> None:
        """There is something to write, now, unless somebody holds it; if a write is under way it follows that one."""
        self._woken = True
        self._begin()

    def release(self) -> None:
        """Begin to write what there is after all."""
        self.held = False
        if self._woken and self._writing is None:
            self._go_on()

    def _begin(self) -> None:
        if not self.held:
            self.release()

    def finish(self) -> None:
        """Begin no more writes."""
        self._next_write = _nothing
        if not self.ended.done():
            self.ended.set_result(None)

    def _go_on(self, _: object = None) -> None:
        try:
            while self._writing is not None or self._woken:
                writing = self._writing
                if writing is None:
                    self.held, self._woken = True, False  # whoever is asked for a write may wake, and begins none
                    writing = self._writing = self._next_write()
                    self.held = False
                    if writing is None:
                        if self._woken:
                            self._loop.call_soon(self._begin)
                        return
                try:
                    waits_for = writing.send(None)
                except StopIteration:
                    self._writing = None
                else:
                    waits_for.add_done_callback(self._go_on)
                    return
        except self._endings:
            self.finish()
        except Exception as error:  # noqa: BLE001 - a bug, which whoever waits for the end gets to know
            self._next_write = _nothing
            if not self.ended.done():
                self.ended.set_exception(error)


def _nothing() -> None:
    return None


__all__ = ["Pump", "Write"]
