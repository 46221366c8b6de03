"""Everything that happens, told to whoever watches: lossy, counted, and never in anybody's way.

Each watcher has a buffer, bounded in number and in bytes; what does not fit is dropped and counted.  Without watchers
an observation costs a test.

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
BUFFER_BYTES = 32 << 20
"""Bytes of observations that wait for one watcher; what comes then is dropped."""

Accepts = Callable[[inspection_pb2.Observation], bool]


class Watcher:
    """One stream of observations."""

    def __init__(self, entries: int, accepts: Accepts) -> None:
        self.accepts = accepts
        self.dropped = 0
        self._buffer: deque[tuple[inspection_pb2.Observation, int]] = deque()
        self._bytes = 0
        self._entries = entries
        self._wake = asyncio.Event()
        self._closed = False

    def put(self, observation: inspection_pb2.Observation) -> None:
        """Keep an observation, or drop and count it."""
        if len(self._buffer) >= self._entries or self._bytes >= BUFFER_BYTES:
            self.dropped += 1
        else:
            size_bytes = observation.ByteSize()
            self._buffer.append((observation, size_bytes))
            self._bytes += size_bytes
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
        message = inspection_pb2.WatchResponse(observations=self._next(), dropped=self.dropped)
        if not self._buffer and not self._closed:
            self._wake.clear()
        return message

    def _next(self) -> list[inspection_pb2.Observation]:
        taken: list[inspection_pb2.Observation] = []
        size_bytes = 0
        while self._buffer and len(taken) < BATCH_OBSERVATIONS:
            if taken and size_bytes + self._buffer[0][1] > BATCH_BYTES:
                break
            observation, its_bytes = self._buffer.popleft()
            taken.append(observation)
            size_bytes += its_bytes
        self._bytes -= size_bytes
        return taken


class Observers:
    """All watchers of one daemon."""

    def __init__(self, entries: int) -> None:
        self.watchers: list[Watcher] = []
        self._entries = entries

    @contextmanager
    def watch(self, accepts: Accepts) -> Iterator[Watcher]:
        """Watch from now to the end of the block."""
        watcher = Watcher(self._entries, accepts)
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
        for watcher in self.watchers:
            if watcher.accepts(observation):
                watcher.put(observation)

    def close(self) -> None:
        """Let every watcher end."""
        for watcher in self.watchers:
            watcher.close()
