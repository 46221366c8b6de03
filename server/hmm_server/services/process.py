"""ProcessService: one call of the core for each RPC, batches, and memory in streams.

**Absent**: what the calls do (`hmm.commands_process`), how requests become commands (process_calls.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import grpc

from hmm import commands_process
from hmm.errors import HmmError
from hmm.operation_record import Caller
from hmm.units import PAGE_SHIFT
from hmm_proto import convert
from hmm_proto.v1 import process_pb2, types_pb2
from hmm_server.callers import caller_from
from hmm_server.calls import BREATH_S, attempt, make, not_made, rpc
from hmm_server.config import Config
from hmm_server.executor import Executor
from hmm_server.interceptors import require_read
from hmm_server.process_calls import CALLS, require_at_most, require_name

SILENCE_S = 1.0
"""How long a client may write nothing while the end of its call waits for it to write all."""

Context = grpc.aio.ServicerContext[Any, Any]


class ProcessService:
    """Processes and their memory calls."""

    def __init__(self, executor: Executor, config: Config) -> None:
        self.executor = executor
        self._config = config

    async def CreateProcess(
        self, request: process_pb2.CreateProcessRequest, context: Context
    ) -> process_pb2.CreateProcessResponse:
        require_name("create process", request.name)
        record = await self.executor.call(
            caller_from(context.invocation_metadata()),
            commands_process.create_process,
            request.name,
            mmap_base=request.mmap_base,
            brk_start=request.brk_start,
            fault_around_pages=request.fault_around_pages or 1,
            thp=convert.thp_from_proto(request.huge_pages),
            low_addresses=request.low_addresses,
        )
        return process_pb2.CreateProcessResponse(process_id=record.result)

    # ---- memory in streams

    async def StreamMemory(
        self, request: process_pb2.StreamMemoryRequest, context: Context
    ) -> AsyncIterator[process_pb2.StreamMemoryResponse]:
        caller = caller_from(context.invocation_metadata())
        done = 0
        while done < request.length:
            part = process_pb2.ReadMemoryRequest(
                process_id=request.process_id,
                address=request.address + done,
                length=min(self._config.part_bytes, request.length - done),
            )
            read: process_pb2.ReadMemoryResponse = await make(self.executor, caller, CALLS["read_memory"], part)
            yield process_pb2.StreamMemoryResponse(result=read.result, data=read.data, signal=read.signal)
            if read.result.errno or read.signal.signal:
                return
            done += len(read.data)

    async def FillMemory(
        self, request_iterator: AsyncIterator[process_pb2.FillMemoryRequest], context: Context
    ) -> process_pb2.FillMemoryResponse:
        caller = caller_from(context.invocation_metadata())
        try:
            filled = await self._fill(caller, request_iterator)
        except HmmError:
            await _read_out(request_iterator)
            raise
        await _read_out(request_iterator)
        return filled

    async def _fill(
        self, caller: Caller, request_iterator: AsyncIterator[process_pb2.FillMemoryRequest]
    ) -> process_pb2.FillMemoryResponse:
        total = process_pb2.FillMemoryResponse()
        process_id = address = 0
        async for request in request_iterator:
            require_read(request)
            process_id, address = request.process_id or process_id, request.address or address
            part = process_pb2.WriteMemoryRequest(process_id=process_id, address=address, data=request.data)
            wrote: process_pb2.WriteMemoryResponse = await make(self.executor, caller, CALLS["write_memory"], part)
            total.result.CopyFrom(wrote.result)
            total.bytes_written += wrote.bytes_written
            address += wrote.bytes_written
            if wrote.result.errno or wrote.signal.signal:
                total.signal.CopyFrom(wrote.signal)
                break
        return total

    # ---- batches

    async def Execute(self, request: process_pb2.ExecuteRequest, context: Context) -> process_pb2.ExecuteResponse:
        require_at_most("execute: calls", len(request.calls), self._config.batch_calls)
        require_at_most("execute: bytes to be read", _bytes_read(request), self._config.message_bytes // 2)
        caller = caller_from(context.invocation_metadata())
        response = process_pb2.ExecuteResponse()
        breathed_s = time.monotonic()
        for call in request.calls:
            outcome = await self._outcome(caller, call)
            response.outcomes.append(outcome)
            if request.stop_at_error and _failed(outcome):
                break
            if time.monotonic() - breathed_s > BREATH_S:
                await asyncio.sleep(0)
                breathed_s = time.monotonic()
        return response

    async def _outcome(self, caller: Caller, call: process_pb2.Call) -> process_pb2.CallOutcome:
        name = call.WhichOneof("call")
        if name is None:
            return process_pb2.CallOutcome(not_made=not_made("execute", convert.malformed("a call of no known kind")))
        result = await attempt(self.executor, caller, name, CALLS[name], getattr(call, name))
        if isinstance(result, types_pb2.CallResult):
            return process_pb2.CallOutcome(not_made=result)
        return process_pb2.CallOutcome(**{name: result})

    # ---- one RPC for each call of a batch

    Fork = rpc(CALLS["fork"])
    Vfork = rpc(CALLS["vfork"])
    CloneThread = rpc(CALLS["clone_thread"])
    Exec = rpc(CALLS["exec"])
    Exit = rpc(CALLS["exit"])
    Mmap = rpc(CALLS["mmap"])
    Munmap = rpc(CALLS["munmap"])
    Mprotect = rpc(CALLS["mprotect"])
    Mremap = rpc(CALLS["mremap"])
    Madvise = rpc(CALLS["madvise"])
    Brk = rpc(CALLS["brk"])
    Msync = rpc(CALLS["msync"])
    Mlock = rpc(CALLS["mlock"])
    Munlock = rpc(CALLS["munlock"])
    Mlockall = rpc(CALLS["mlockall"])
    Munlockall = rpc(CALLS["munlockall"])
    Mincore = rpc(CALLS["mincore"])
    ProcessMrelease = rpc(CALLS["process_mrelease"])
    Pagemap = rpc(CALLS["pagemap"])
    ClearRefs = rpc(CALLS["clear_refs"])
    Place = rpc(CALLS["place"])
    ReadMemory = rpc(CALLS["read_memory"])
    WriteMemory = rpc(CALLS["write_memory"])
    Touch = rpc(CALLS["touch"])
    AccessPages = rpc(CALLS["access_pages"])


async def _read_out(request_iterator: AsyncIterator[Any]) -> None:
    # A client that still writes when its call ends sees only that writing failed, and not how the call ended.
    with suppress(StopAsyncIteration, TimeoutError):
        while True:
            async with asyncio.timeout(SILENCE_S):
                await anext(request_iterator)


def _bytes_read(request: process_pb2.ExecuteRequest) -> int:
    return sum(
        call.read_memory.length
        + call.access_pages.page_count
        + (call.mincore.length >> PAGE_SHIFT)
        + max(0, (call.pagemap.range.end - call.pagemap.range.start) >> PAGE_SHIFT << 3)
        for call in request.calls
    )


def _failed(outcome: process_pb2.CallOutcome) -> bool:
    name = outcome.WhichOneof("outcome")
    return name == "not_made" or bool(name and getattr(outcome, name).result.errno)
