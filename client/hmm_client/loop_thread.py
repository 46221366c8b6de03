"""An event loop on a thread of its own, for those who do not have one.

There is one for the whole process, since gRPC's asyncio support wants no more than one loop; it is started when it is
first needed and ends with the process.

**Source**: grpc/grpc#25364.

**Absent**: what runs there (`sync.py`).
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

import uvloop

T = TypeVar("T")


class LoopThread:
    """A running loop."""

    _shared: LoopThread | None = None
    _lock = threading.Lock()

    def __init__(self, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
        self._loop = loop
        self._thread = thread
        self._process = os.getpid()

    @classmethod
    def shared(cls) -> LoopThread:
        """The loop of this process."""
        with cls._lock:
            if cls._shared is None:
                loop = uvloop.new_event_loop()
                thread = threading.Thread(target=loop.run_forever, name="hmm_client", daemon=True)
                thread.start()
                cls._shared = cls(loop, thread)
            return cls._shared

    @classmethod
    def running(cls) -> LoopThread:
        """The loop of the caller, for what other threads want from it."""
        return cls(asyncio.get_running_loop(), threading.current_thread())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there and wait for its end; an interrupted wait cancels it.

        Context variables go along: what is called from a driver's callback is known to be.

        Raises:
            RuntimeError: called on the loop's own thread, which would wait for itself; or in a child of fork(2), where
                neither the thread nor gRPC goes on.
        """
        if os.getpid() != self._process:
            work.close()
            raise RuntimeError(
                "hmm_client does not survive fork(2): let the child exec a program of its own"
                " (multiprocessing: the start method spawn)"
            )
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("a blocking call on the event loop's own thread would wait for ever")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise
