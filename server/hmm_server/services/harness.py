"""HarnessService: holds and injected failures, for tests; refused unless the daemon was started for them.

**Absent**: what a hold does to calls (holds.py, executor.py), how a failure comes about (`hmm`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno as errnos
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from hmm.commands import COMMANDS
from hmm.commands_failures import (
    inject_allocation_failure,
    inject_copy_failure,
    inject_dma_failure,
    inject_migration_failure,
    inject_touch_failure,
)
from hmm.commands_process import scan_ksm
from hmm.errors import AccessDeniedError, NoSuchObjectError
from hmm_proto import convert
from hmm_proto.v1 import harness_pb2
from hmm_server import holds
from hmm_server.callers import caller_from
from hmm_server.config import Config
from hmm_server.executor import Executor
from hmm_server.holds import Breakpoint, Point
from hmm_server.process_calls import require_at_most

Context = grpc.aio.ServicerContext[Any, Any]
_PASSES = 2
"""One to see what pages hold, one to see that they still do."""
PASSES_MAX = 100
POINTS = {
    harness_pb2.HOLD_POINT_BEFORE_EVENT: Point.BEFORE_EVENT,
    harness_pb2.HOLD_POINT_EVENT_SENT: Point.EVENT_SENT,
    harness_pb2.HOLD_POINT_ACKNOWLEDGED: Point.ACKNOWLEDGED,
    harness_pb2.HOLD_POINT_BEFORE_EDIT: Point.BEFORE_EDIT,
    harness_pb2.HOLD_POINT_AFTER_WAIT: Point.AFTER_WAIT,
    harness_pb2.HOLD_POINT_BEFORE_END: Point.BEFORE_END,
}


class HarnessService:
    """Stops calls and breaks things, on demand."""

    def __init__(self, executor: Executor, config: Config) -> None:
        self._executor = executor
        self._config = config

    async def Hold(self, request: harness_pb2.HoldRequest, context: Context) -> AsyncIterator[harness_pb2.HoldResponse]:
        self._require_allowed()
        hold = self._place(request, context)
        left_s = hold.until_s - time.monotonic()
        lease = asyncio.get_running_loop().call_later(left_s, self._executor.release, hold, "its lease has ended")
        try:
            yield harness_pb2.HoldResponse(hold_id=hold.id)
            await asyncio.wait((hold.reached, hold.ended), return_when=asyncio.FIRST_COMPLETED)
            if hold.reached.done():
                yield _held(hold)
            await asyncio.wait((hold.ended,))  # a stream that breaks must not cancel it
        finally:
            lease.cancel()
            self._executor.release(hold, "its owner is gone")
        response = _held(hold)
        response.ended = hold.ended.result()
        yield response

    def _place(self, request: harness_pb2.HoldRequest, context: Context) -> holds.Hold:
        if request.point not in POINTS:
            raise convert.malformed("hold: a point is needed")
        point = POINTS[request.point]
        for name in request.operation.split("|") if request.operation else ():
            if name not in COMMANDS:
                import difflib  # noqa: PLC0415 - a fifth of a megabyte, for who mistypes a name

                near = " or ".join(difflib.get_close_matches(name, COMMANDS)) or "those that `hmmctl pending` shows"
                raise convert.malformed(f"hold: there is no call {name!r}; names are like {near}")
        if request.mirror_id and point not in (Point.EVENT_SENT, Point.ACKNOWLEDGED):
            raise convert.malformed(f"hold: {point.value!r} is the same point for all mirrors")
        caller = caller_from(context.invocation_metadata())
        machine = self._executor.machine
        process, mirror = machine.processes.get(request.process_id), machine.receivers.get(request.mirror_id)
        if request.process_id and process is None:
            raise NoSuchObjectError(f"hold: there is no process {request.process_id}", errnos.ESRCH)
        if request.mirror_id and mirror is None:
            raise NoSuchObjectError(f"hold: there is no mirror {request.mirror_id}", errnos.ENODEV)
        for named in (process, mirror):
            if named is not None and named.owner not in ("", caller.token):
                raise AccessDeniedError(f"hold: {named} belongs to another owner", errnos.EPERM, reason="NOT_OWNER")
        where = Breakpoint(
            point,
            request.operation,
            request.process_id,
            process.space.id if process else 0,
            request.mirror_id,
            request.caller,
        )
        lease_s = request.lease_ms / 1000 if request.lease_ms else self._config.lease_s
        return self._executor.holds.place(caller.token, caller.name, where, time.monotonic() + lease_s, request.skip)

    async def ReleaseHold(
        self, request: harness_pb2.ReleaseHoldRequest, context: Context
    ) -> harness_pb2.ReleaseHoldResponse:
        self._require_allowed()
        hold = self._executor.holds.placed.get(request.hold_id)
        if hold is None:
            raise NoSuchObjectError(f"hold {request.hold_id} is not in place (any more)", errnos.ENOENT, reason="HOLD")
        if hold.owner not in ("", caller_from(context.invocation_metadata()).token):
            raise AccessDeniedError(f"hold {hold.id} belongs to another owner", errnos.EPERM, reason="NOT_OWNER")
        self._executor.release(hold, "released")
        return harness_pb2.ReleaseHoldResponse()

    async def InjectFailure(
        self, request: harness_pb2.InjectFailureRequest, context: Context
    ) -> harness_pb2.InjectFailureResponse:
        self._require_allowed()
        caller = caller_from(context.invocation_metadata())
        match request.kind:
            case harness_pb2.FAILURE_KIND_PAGE_ALLOCATION:
                record = await self._executor.call(caller, inject_allocation_failure, request.nth)
            case harness_pb2.FAILURE_KIND_DMA_MAPPING:
                record = await self._executor.call(caller, inject_dma_failure, request.device_id, request.nth)
            case harness_pb2.FAILURE_KIND_MIGRATION:
                record = await self._executor.call(caller, inject_migration_failure, request.mirror_id, request.nth)
            case harness_pb2.FAILURE_KIND_MIGRATE_TO_RAM:
                record = await self._executor.call(caller, inject_touch_failure, request.device_id, request.nth)
            case harness_pb2.FAILURE_KIND_COPY:
                record = await self._executor.call(caller, inject_copy_failure, request.mirror_id, request.nth)
            case _:
                raise convert.malformed("inject failure: a kind is needed")
        assert record.result is None
        return harness_pb2.InjectFailureResponse()

    async def ScanKsm(self, request: harness_pb2.ScanKsmRequest, context: Context) -> harness_pb2.ScanKsmResponse:
        self._require_allowed()
        caller = caller_from(context.invocation_metadata())
        require_at_most("scan ksm: passes", request.passes, PASSES_MAX)
        record = await self._executor.call(caller, scan_ksm, request.passes or _PASSES)
        return harness_pb2.ScanKsmResponse(**dataclasses.asdict(record.result))

    def _require_allowed(self) -> None:
        if not self._config.harness:
            raise AccessDeniedError(
                "holds and injected failures are for tests: start hmmd with --harness",
                errnos.EPERM,
                reason="HARNESS_OFF",
            )


def _held(hold: holds.Hold) -> harness_pb2.HoldResponse:
    response = harness_pb2.HoldResponse(hold_id=hold.id)
    if hold.reached.done():
        record = hold.reached.result()
        response.operation_id, response.operation = record.id, record.name
    return response
