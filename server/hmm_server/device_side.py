"""Makes the calls of devices, for the services and for sessions: limits, mirrors and their streams, parts of tables.

**Invariants**: a mirror is served by its stream before any event for it can be routed, and is forgotten by it when
it is gone.

**Absent**: what the calls do (device_calls.py and `hmm.commands_device`), how replies travel.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from hmm import commands_device
from hmm.machine import Caller, OperationRecord
from hmm.units import PAGE_SHIFT, PAGE_SIZE, Address, AddressRange, MirrorId
from hmm_proto import convert
from hmm_proto.v1 import device_pb2
from hmm_server.answers import Stream
from hmm_server.config import Config
from hmm_server.device_calls import CALLS, DESCRIBED, FaultResult, fault_pages
from hmm_server.executor import Executor, resolve
from hmm_server.process_calls import require_at_most
from hmm_server.reports import complete
from hmm_server.streams import Streams

ACCESSES = frozenset({"device_read", "device_write"})
Result = Any
"""A response, or the exception that says why there is none."""


class DeviceSide:
    """The calls of devices on one daemon."""

    def __init__(self, executor: Executor, streams: Streams, config: Config) -> None:
        self.executor = executor
        self.streams = streams
        self.config = config

    def start(
        self, caller: Caller, name: str, request: Any, stream: Stream | None, then: Callable[[Result], None]
    ) -> OperationRecord[Any]:
        """Start a call; `then` gets its response, or the exception it ended with, possibly before this returns.

        Args:
            stream: the one that the call came on, which serves the mirrors it registers; None: no session.

        Raises:
            HmmError: the request makes no sense, or asks for too much at a time.
            DrainingError: the daemon is ending.
        """
        on_session = stream
        if name == "fault":
            require_at_most("fault: pages", fault_pages(request), self.config.fault_pages)
        elif name == "register_mirror" and stream is None:
            stream = self.streams.find(request.epoch, caller.token)
        invocation = CALLS[name].invocation(request)
        ended = partial(self._ended, name, request, stream, then)
        record = self.executor.start(ended, caller, invocation.command, *invocation.arguments, **invocation.keywords)
        if on_session and not self.executor.is_over(record):
            self.executor.running[record.id].epoch = on_session.epoch
        return record

    async def make(self, caller: Caller, name: str, request: Any) -> Any:
        """Make a call that came on no session, and wait for its response.

        Raises:
            HmmError: the call was not made, or a fault has not ended within its deadline.
            DrainingError: the daemon is ending.
        """
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        results: list[Result] = []

        def then(result: Result) -> None:
            results.append(result)
            resolve(ended)

        record = self.start(caller, name, request, None, then)
        await self.executor.wait(record, ended, self.patience_s(name, request))
        (result,) = results
        if isinstance(result, BaseException):
            raise result
        return result.whole() if isinstance(result, FaultResult) else result

    def patience_s(self, name: str, request: Any) -> float | None:
        """How long the caller waits, in seconds: faults have a deadline, other calls end by those of their events."""
        if name != "fault":
            return None
        return request.deadline_ms / 1000 if request.deadline_ms else self.config.fault_s

    def _ended(
        self,
        name: str,
        request: Any,
        stream: Stream | None,
        then: Callable[[Result], None],
        record: OperationRecord[Any],
    ) -> None:
        if record.error is None:
            self._note(name, request, stream, record)
        try:
            response = CALLS[name].respond(record)
        except Exception as error:  # noqa: BLE001 - handed on: whoever asked decides what becomes of it
            then(error)
        else:
            if name in ACCESSES and response.result.HasField("violation"):
                complete(self.streams, response.result.violation)
            if name in DESCRIBED:
                response = DESCRIBED[name](self.executor.machine, record.result)
            elif name == "fault" and request.omit_entries:
                response = response._replace(entries=response.entries[:0])
            then(response)

    def _note(self, name: str, request: Any, stream: Stream | None, record: OperationRecord[Any]) -> None:
        if name == "register_mirror":
            assert stream is not None
            self.streams.attach(stream, record.result)
        elif name == "unregister_mirror":
            self.streams.detach(request.mirror_id)
        elif name == "register_device" and stream is not None:
            stream.devices.append(record.result)
        elif name == "unregister_device":
            self.streams.forget_device(request.device_id)

    # ---- tables

    async def table_parts(
        self, caller: Caller, request: device_pb2.ReadTableRequest
    ) -> AsyncIterator[tuple[Address, bytes]]:
        """The entries of a range in parts: where each begins, and its entries.  Holes are left out.

        Raises:
            HmmError: as `commands_device.read_table`.
        """
        span = convert.range_from_proto(request.range)
        position = span.start
        step = self.config.part_bytes >> 3 << PAGE_SHIFT
        await self._read(caller, request.mirror_id, AddressRange(position, min(span.end, position + PAGE_SIZE)))
        while (start := self._next_directory(request.mirror_id, AddressRange(position, span.end))) is not None:
            position = min(span.end, start + step)
            yield start, await self._read(caller, request.mirror_id, AddressRange(start, position))

    async def _read(self, caller: Caller, mirror_id: MirrorId, span: AddressRange) -> bytes:
        record = await self.executor.call(caller, commands_device.read_table, mirror_id, span)
        return convert.entries_to_proto(record.result)

    def _next_directory(self, mirror_id: MirrorId, span: AddressRange) -> int | None:
        mirror = self.executor.machine.mirrors.get(mirror_id)
        if mirror is None or not span:
            return None
        walk = mirror.table.walk(span.start, span.end)
        run = next(walk, None)
        walk.close()
        return None if run is None else run.start
