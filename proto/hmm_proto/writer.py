"""Writes what a stream has to say: one message after the other, the first of them at once.

A write of grpc.aio hands its message over in its first step, and then waits until it has left.  A task would make that
step in the loop's next turn, after it was woken; here whoever has something to tell makes it.  So a reply leaves in the
turn in which its call was read, and an answer in that in which its event came.

**Source**: the protocol of asyncio's futures, which `asyncio.Task` follows too: what a coroutine waits for, it yields.

**Invariants**: one write at a time, since of two that overlap one message is lost; messages leave in the order in which
they were taken.

**Absent**: what is written, and reading: `hmm_server.session`, `hmm_client.session`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import grpc.aio

_ENDED = (
    *(grpc.aio.AioRpcError, grpc.aio.InternalError, grpc.aio.UsageError),
    *(asyncio.InvalidStateError, asyncio.CancelledError),
)
"""What a write raises when the stream has ended beneath it."""


class Writer:
    """The only one that writes to a stream.

    Attributes:
        ended: resolved when nothing more will be written.
    """

    def __init__(
        self,
        take: Callable[[], bytes | None],
        is_over: Callable[[], bool],
        write: Callable[[bytes], Coroutine[Any, Any, None]],
    ) -> None:
        """Write what there is to tell, and what will be.

        Args:
            take: gives the next message; None when there is nothing to tell.
            is_over: when there is nothing to tell, whether there will not be either.
            write: of a message; done when the next one may follow.
        """
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._take = take
        self._is_over = is_over
        self._write = write
        self._writing: Coroutine[Any, Any, None] | None = None
        self._gathers = False
        self.wake()

    def wake(self) -> None:
        """There is something to tell: it goes in the loop's next turn, together with what comes until then."""
        if self._writing is None and not self._gathers:
            self._gathers = True
            self._loop.call_soon(self.flush)

    def gather(self) -> None:
        """Leave what there will be to tell to a `flush` that follows, so that it goes together."""
        self._gathers = True

    def flush(self) -> None:
        """Begin to write what there is to tell; if a write is under way its end does that."""
        self._gathers = False
        if self._writing is None and not self.ended.done():
            self._proceed()

    def close(self) -> None:
        """Write nothing more; what is under way may or may not arrive."""
        if not self.ended.done():
            self.ended.set_result(None)
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.close()

    def _proceed(self, _: asyncio.Future[Any] | None = None) -> None:
        try:
            while self._writing is not None or self._begin():
                assert self._writing is not None
                try:
                    waits_for: asyncio.Future[Any] = self._writing.send(None)
                except StopIteration:
                    self._writing = None
                else:
                    waits_for._asyncio_future_blocking = False  # noqa: SLF001 - as a task says that it took the future
                    waits_for.add_done_callback(self._proceed)
                    return
        except _ENDED:
            self.close()  # whoever reads says why
        except Exception as error:  # noqa: BLE001 - it ends the session, not whoever had something to tell
            self._writing = None
            self.ended.set_exception(error)

    def _begin(self) -> bool:
        if self.ended.done():
            return False
        message = self._take()
        if message is not None:
            self._writing = self._write(message)
        elif self._is_over():
            self.ended.set_result(None)
        return message is not None
