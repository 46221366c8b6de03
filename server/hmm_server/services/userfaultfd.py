"""UserfaultfdService: streams of page faults for those who handle them, and what they do about them.

**Invariants**: a userfaultfd is open exactly as long as the stream that it came with.

**Absent**: what the calls do (`hmm.commands_userfaultfd`); when a userfault has come (executor.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc

from hmm import commands_userfaultfd as commands
from hmm.operation_record import Caller, OperationRecord
from hmm.uffdio import Filled
from hmm_proto import convert
from hmm_proto.status import to_call_result
from hmm_proto.v1 import types_pb2, userfaultfd_pb2
from hmm_server.callers import caller_from
from hmm_server.calls import Call, Invocation, invoke, rpc
from hmm_server.executor import Executor, resolve
from hmm_server.process_calls import DATA_BYTES_MAX, require_at_most

FAULTS_MAX = 1024
"""Page faults in one message."""

Context = grpc.aio.ServicerContext[Any, Any]


def _copy(q: userfaultfd_pb2.UffdCopyRequest) -> Invocation:
    require_at_most("copy: bytes", len(q.data), DATA_BYTES_MAX)
    return invoke(commands.uffd_copy, q.userfaultfd_id, q.address, q.data, q.mode)


def _filled(filled: Filled | None, result: types_pb2.CallResult) -> tuple[types_pb2.CallResult, int]:
    if filled is None:
        return result, 0
    if filled.error is not None:
        result = to_call_result(filled.error, result.operation_id, tuple(result.fenced_mirrors))
    return result, filled.done


def _copy_response(filled: Filled | None, result: types_pb2.CallResult) -> userfaultfd_pb2.UffdCopyResponse:
    result, done = _filled(filled, result)
    return userfaultfd_pb2.UffdCopyResponse(result=result, bytes_copied=done)


def _zeropage_response(filled: Filled | None, result: types_pb2.CallResult) -> userfaultfd_pb2.UffdZeropageResponse:
    result, done = _filled(filled, result)
    return userfaultfd_pb2.UffdZeropageResponse(result=result, bytes_zeroed=done)


def _continue_response(filled: Filled | None, result: types_pb2.CallResult) -> userfaultfd_pb2.UffdContinueResponse:
    result, done = _filled(filled, result)
    return userfaultfd_pb2.UffdContinueResponse(result=result, bytes_mapped=done)


_REGISTER: Call[Any, Any] = Call(
    lambda q: invoke(commands.uffd_register, q.userfaultfd_id, convert.range_from_proto(q.range), q.mode),
    lambda value, result: userfaultfd_pb2.UffdRegisterResponse(result=result, ioctls=value or 0),
)
_UNREGISTER: Call[Any, Any] = Call(
    lambda q: invoke(commands.uffd_unregister, q.userfaultfd_id, convert.range_from_proto(q.range)),
    lambda _, result: userfaultfd_pb2.UffdUnregisterResponse(result=result),
)
_COPY: Call[Any, Any] = Call(_copy, _copy_response)
_ZEROPAGE: Call[Any, Any] = Call(
    lambda q: invoke(commands.uffd_zeropage, q.userfaultfd_id, convert.range_from_proto(q.range), q.mode),
    _zeropage_response,
)
_CONTINUE: Call[Any, Any] = Call(
    lambda q: invoke(commands.uffd_continue, q.userfaultfd_id, convert.range_from_proto(q.range), q.mode),
    _continue_response,
)
_WAKE: Call[Any, Any] = Call(
    lambda q: invoke(commands.uffd_wake, q.userfaultfd_id, convert.range_from_proto(q.range)),
    lambda _, result: userfaultfd_pb2.UffdWakeResponse(result=result),
)


class UserfaultfdService:
    """Userfaultfds."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor

    UffdRegister = rpc(_REGISTER)
    UffdUnregister = rpc(_UNREGISTER)
    UffdCopy = rpc(_COPY)
    UffdZeropage = rpc(_ZEROPAGE)
    UffdContinue = rpc(_CONTINUE)
    UffdWake = rpc(_WAKE)

    async def OpenUserfaultfd(
        self, request: userfaultfd_pb2.OpenUserfaultfdRequest, context: Context
    ) -> AsyncIterator[userfaultfd_pb2.OpenUserfaultfdResponse]:
        caller = caller_from(context.invocation_metadata())
        number = await self._create(caller, request)
        caller = replace(caller, callback=None)  # the stream may outlive it
        came = self.executor.userfaultfds[number] = asyncio.Event()
        try:
            yield userfaultfd_pb2.OpenUserfaultfdResponse(userfaultfd_id=number)
            space = self.executor.machine.userfaultfds[number]
            while not (self.executor.draining or space.notifier.closed):
                if faults := await self._read(caller, number):
                    yield userfaultfd_pb2.OpenUserfaultfdResponse(faults=faults)
                else:
                    await came.wait()
                    came.clear()
        finally:
            del self.executor.userfaultfds[number]
            self._close(caller, number)

    async def _create(self, caller: Caller, request: userfaultfd_pb2.OpenUserfaultfdRequest) -> int:
        # A call that is held may outlive its stream: nobody would ever close what it makes.
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def then(record: OperationRecord[int]) -> None:
            if ended.cancelled() and record.error is None:
                self._close(replace(caller, callback=None), record.result)
            resolve(ended)

        command, args = commands.create_userfaultfd, (request.process_id, request.features)
        record = self.executor.start(then, caller, command, *args)
        await self.executor.wait(record, ended, None)
        return record.result

    def _close(self, caller: Caller, number: int) -> None:
        if not self.executor.draining:
            self.executor.start(lambda _: None, caller, commands.close_userfaultfd, number)

    async def _read(self, caller: Caller, number: int) -> list[userfaultfd_pb2.Userfault]:
        record = await self.executor.call(caller, commands.read_userfaults, number, FAULTS_MAX)
        return [
            userfaultfd_pb2.Userfault(
                address=message.address,
                page_count=message.npages,
                write=message.write,
                operation_id=message.operation_id,
                minor=message.minor,
            )
            for message in record.result
        ]
