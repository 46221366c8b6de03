"""Makes the calls of devices, for the services and for sessions: limits, mirrors and their streams, parts of tables.

**Invariants**: a mirror is served by its stream before any event for it can be routed, and is forgotten by it when
it is gone.

**Absent**: what the calls do (device_calls.py and `hmm.commands_device`), how replies travel.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from hmm import commands_device, commands_hmm
from hmm.errors import HmmError, TimedOutError
from hmm.machine import Machine
from hmm.operation_record import Caller, OperationRecord
from hmm.units import PAGE_SHIFT, PAGE_SIZE, Address, AddressRange, Entries, MirrorId
from hmm_proto import convert
from hmm_proto.status import is_not_made
from hmm_proto.v1 import device_pb2
from hmm_server.config import Config
from hmm_server.device_calls import CALLS as DEVICE_CALLS
from hmm_server.device_calls import register_device_response, register_mirror_response
from hmm_server.executor import Executor, resolve
from hmm_server.hmm_calls import CALLS as HMM_CALLS
from hmm_server.hmm_calls import attach_response
from hmm_server.process_calls import require_at_most
from hmm_server.replies import ArrayReply, without_entries
from hmm_server.reports import complete
from hmm_server.served import Stream
from hmm_server.streams import Streams

ACCESSES = frozenset({"device_read", "device_write", "read_frames", "write_frames"})
Result = Any
"""A response, or the exception that says why there is none."""
CALLS = {**DEVICE_CALLS, **HMM_CALLS}
_ATTACHING = frozenset({"register_mirror", "attach"})
_SERVED_BY_A_STREAM = _ATTACHING | {"pin_pages"}
_NOTED = _SERVED_BY_A_STREAM | {"unregister_mirror", "detach", "unpin_pages", "register_device", "unregister_device"}
"""What changes the things that a stream serves or holds."""
_STEPS = frozenset(name for name in CALLS if name.startswith("migrate_vma_")) | {"read_frames", "write_frames"}
"""Calls that may name a migration; each is a sign of its driver."""
_WITH_ENTRIES = frozenset({"fault", "migrate"})
"""Calls whose caller may not want the entries."""
_DESCRIBED: Mapping[str, Callable[[Machine, int], Any]] = {
    "register_device": register_device_response,
    "register_mirror": register_mirror_response,
    "attach": attach_response,
}
"""Responses that say more of a new object than its number."""


def _migration_of(record: OperationRecord[Any], request: Any) -> int:
    """The migration that a call is a step of; 0 where it names none, or was not made."""
    if isinstance(record.error, HmmError) and is_not_made(record.error):
        return 0
    number: int = getattr(request, "migration_id", 0)
    return number


class DeviceSide:
    """The calls of devices on one daemon."""

    def __init__(self, executor: Executor, streams: Streams, config: Config) -> None:
        self.executor = executor
        self.streams = streams
        self.config = config

    def begin(self, caller: Caller, name: str, request: Any) -> OperationRecord[Any]:
        """Start a call, as `Executor.begin`; once it is over, `response` has to be asked for.

        Raises:
            HmmError: the request makes no sense, or asks for too much at a time.
            DrainingError: the daemon is ending.
        """
        command, arguments, keywords, npages = CALLS[name].invocation(request)
        if npages > self.config.fault_pages:
            require_at_most(f"{name.replace('_', ' ')}: pages", npages, self.config.fault_pages)
        return self.executor.begin(caller, command, *arguments, **keywords)

    async def make(self, caller: Caller, name: str, request: Any) -> Any:
        """Make a call that came on no session, and wait for its response.

        Raises:
            HmmError: the call was not made, or a fault has not ended within its deadline.
            DrainingError: the daemon is ending.
        """
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        stream = self.streams.find(request.epoch, caller.token) if name in _SERVED_BY_A_STREAM else None
        self.streams.hear(getattr(request, "mirror_id", 0), caller.token)
        results: list[Result] = []

        def then(record: OperationRecord[Any]) -> None:
            try:
                results.append(self.response(name, request, stream, record))
            except Exception as error:  # noqa: BLE001 - raised below: whoever made the call decides what becomes of it
                results.append(error)
            resolve(ended)

        record = self.begin(caller, name, request)
        self.executor.tell(record, then)
        patience_s = self.patience_s(name, request)
        if await self.executor.has_ended(record, ended, patience_s):
            return self._response(results)
        error = self.give_up(record, patience_s or 0)
        if error is not None:
            raise error
        return self._response(results)

    @staticmethod
    def _response(results: list[Result]) -> Any:
        (result,) = results
        if isinstance(result, BaseException):
            raise result
        return result.whole() if isinstance(result, ArrayReply) else result

    def give_up(self, record: OperationRecord[Any], patience_s: float) -> TimedOutError | None:
        """The caller's patience has ended.

        Returns: its error; None when the call could be ended, and `then` has its response.
        """
        if record.name == commands_hmm.range_fault_unlocked.__name__ and not record.done:
            self.executor.time_out(record)
        return None if self.executor.is_over(record) else self.executor.give_up(record, patience_s)

    def patience_s(self, name: str, request: Any) -> float | None:
        """How long the caller waits, in seconds: faults have a deadline, other calls end by those of their events."""
        if name not in ("fault", "range_fault"):
            return None
        if name == "range_fault" and request.notifier_seq:
            return None
        return request.deadline_ms / 1000 if request.deadline_ms else self.config.fault_s

    def response(self, name: str, request: Any, stream: Stream | None, record: OperationRecord[Any]) -> Any:
        """The response to a call that has ended, to be asked for once, as soon as it has.

        Args:
            stream: the one that serves what the call has registered, or holds what it has pinned.

        Raises: what the call raised, when it was never made or is no kernel call.
        """
        if name in _NOTED and record.error is None:
            self._note(name, request, stream, record)
        if name in _STEPS and (migration_id := _migration_of(record, request)):
            self.streams.leases.renew(migration_id)
        response = CALLS[name].respond(record)
        if name in ACCESSES and response.result.HasField("violation"):
            complete(self.streams, response.result.violation)
        if name == "migrate_vma_setup":
            response.response.lease_ms = round(self.config.holding_lease_s * 1000)
        if name in _DESCRIBED:
            return _DESCRIBED[name](self.executor.machine, record.result)
        if name in _WITH_ENTRIES and request.omit_entries:
            return without_entries(response)
        return response

    def _note(self, name: str, request: Any, stream: Stream | None, record: OperationRecord[Any]) -> None:
        if name in _ATTACHING:
            assert stream is not None
            self.streams.attach(stream, record.result)
        elif name in ("unregister_mirror", "detach"):
            self.streams.detach(request.mirror_id)
        elif name == "pin_pages":
            assert stream is not None
            self.streams.hold(stream, record.result)
        elif name == "unpin_pages":
            self.streams.let_go(request.pin_id)
        elif name == "register_device" and stream is not None:
            self.streams.own(stream, record.result)
        elif name == "unregister_device":
            self.streams.forget_device(request.device_id)

    # ---- tables

    async def table_parts(
        self, caller: Caller, request: device_pb2.ReadTableRequest
    ) -> AsyncIterator[tuple[Address, Entries]]:
        """The entries of a range in parts: where each begins, and uint64[npages], its entries.  Holes are left out.

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

    async def _read(self, caller: Caller, mirror_id: MirrorId, span: AddressRange) -> Entries:
        return (await self.executor.call(caller, commands_device.read_table, mirror_id, span)).result

    def _next_directory(self, mirror_id: MirrorId, span: AddressRange) -> int | None:
        mirror = self.executor.machine.mirrors.get(mirror_id)
        if mirror is None or not span:
            return None
        walk = mirror.table.walk(span.start, span.end)
        run = next(walk, None)
        walk.close()
        return None if run is None else run.start
