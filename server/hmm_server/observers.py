"""Everything that happens, told to whoever watches: lossy, counted, and never in anybody's way.

Each watcher has a buffer, bounded in number and in bytes; what does not fit is dropped and counted, and the count is
told where the dropped ones would have been.  They wait serialised: a message takes more than 1,600 bytes otherwise,
whatever it says.  Without watchers an observation costs a test.

**Invariants**: publishing never waits.

**Absent**: what is published (streams.py and executor.py decide); the page and the terminal that show it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hmm_proto.v1 import inspection_pb2

BATCH_OBSERVATIONS = 512
"""Observations in one message ..."""
BATCH_BYTES = 1 << 20
"""... and their bytes, unless one alone has more."""

Accepts = Callable[[inspection_pb2.Observation], bool]


class Watcher:
    """One stream of observations.

    Attributes:
        dropped: how many did not fit.
    """

    def __init__(self, entries: int, size_bytes: int, accepts: Accepts) -> None:
        self.accepts = accepts
        self.dropped = 0
        self._buffer: deque[tuple[bytes, int]] = deque()  # an observation, and how many were dropped before it
        self._bytes = 0
        self._entries = entries
        self._bytes_max = size_bytes
        self._wake = asyncio.Event()
        self._closed = False

    def put(self, observation: bytes) -> None:
        """Keep an observation, or drop and count it."""
        if len(self._buffer) >= self._entries or self._bytes + len(observation) > self._bytes_max:
            self.dropped += 1
        else:
            self._buffer.append((observation, self.dropped))
            self._bytes += len(observation)
        self._wake.set()

    def close(self) -> None:
        """Nothing more will happen."""
        self._closed = True
        self._wake.set()

    async def take(self) -> inspection_pb2.WatchResponse | None:
        """What has happened since the last time, as soon as there is something; None when nothing more will."""
        await self._wake.wait()
        if self._closed and not self._buffer:
            return None
        return self.take_now()

    def take_now(self) -> inspection_pb2.WatchResponse:
        """What has happened since the last time, as much as fits into a message."""
        observations = [inspection_pb2.Observation.FromString(data) for data in self._next()]
        dropped = self._buffer[0][1] if self._buffer else self.dropped
        message = inspection_pb2.WatchResponse(observations=observations, dropped=dropped)
        if not self._buffer and not self._closed:
            self._wake.clear()
        return message

    def _next(self) -> list[bytes]:
        taken: list[bytes] = []
        size_bytes = 0
        before = self._buffer[0][1] if self._buffer else 0
        while self._buffer and len(taken) < BATCH_OBSERVATIONS:
            data, dropped = self._buffer[0]
            if taken and (size_bytes + len(data) > BATCH_BYTES or dropped > before):
                break
            taken.append(data)
            size_bytes += len(data)
            self._buffer.popleft()
        self._bytes -= size_bytes
        return taken


class Observers:
    """All watchers of one daemon."""

    def __init__(self, entries: int, size_bytes: int) -> None:
        self.watchers: list[Watcher] = []
        self._limits = entries, size_bytes

    @contextmanager
    def watch(self, accepts: Accepts) -> Iterator[Watcher]:
        """Watch from now to the end of the block."""
        watcher = Watcher(*self._limits, accepts)
        self.watchers.append(watcher)
        try:
            yield watcher
        finally:
            self.watchers.remove(watcher)

    def publish(self, make: Callable[[], inspection_pb2.Observation]) -> None:
        """Tell every watcher; `make` is called only when there is one."""
        if not self.watchers:
            return
        observation = make()
        observation.time_ns = time.time_ns()
        accepting = [watcher for watcher in self.watchers if watcher.accepts(observation)]
        if accepting:
            data = observation.SerializeToString()
            for watcher in accepting:
                watcher.put(data)

    def close(self) -> None:
        """Let every watcher end."""
        for watcher in self.watchers:
            watcher.close()
