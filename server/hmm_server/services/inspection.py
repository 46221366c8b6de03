"""InspectionService: what exists and who waits, to those who may see it.

**Absent**: how it is shown (views.py, waits.py, counters.py).
"""

from __future__ import annotations

import errno as errnos
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from hmm import inspection
from hmm.errors import AccessDeniedError, NoSuchObjectError, OutOfFramesError
from hmm.machine import Machine
from hmm.mirror import Mirror
from hmm.page_table import PageTable
from hmm.registry import Process
from hmm.units import TASK_SIZE, WHOLE_SPACE, Entries, Pfns
from hmm_proto import convert
from hmm_proto.v1 import inspection_pb2
from hmm_server import counters, reports, views
from hmm_server.callers import caller_from
from hmm_server.config import Config
from hmm_server.executor import Executor, Running
from hmm_server.observers import Observers
from hmm_server.paging import fitting, mappings_of, page_of
from hmm_server.process_calls import require_at_most
from hmm_server.streams import Streams
from hmm_server.waits import Sees, Waits

Context = grpc.aio.ServicerContext[Any, Any]
USES_IN_PART = 100
"""So many mappings are measured for one answer; drivers go on being heard between two."""


class InspectionService:
    """Looks on."""

    def __init__(self, executor: Executor, streams: Streams, observers: Observers, config: Config) -> None:
        self._executor = executor
        self._streams = streams
        self._observers = observers
        self._config = config
        self._waits = Waits(executor, streams)
        self._started_s = time.monotonic()

    @property
    def _machine(self) -> Machine:
        return self._executor.machine

    # ---- lists

    async def ListProcesses(
        self, request: inspection_pb2.ListProcessesRequest, context: Context
    ) -> inspection_pb2.ListProcessesResponse:
        sees = _sees(context)
        machine = self._machine
        visible = [process.id for process in machine.processes.values() if sees(process.owner)]
        page = page_of(visible, request, self._config.list_entries)
        busy = [one.space_id for one in inspection.pending(machine)]
        processes = [machine.processes[process_id] for process_id in page.keys]
        return inspection_pb2.ListProcessesResponse(
            processes=[
                views.process_status(machine, process, busy.count(process.space.id), sees) for process in processes
            ],
            next_page_token=page.next_token,
        )

    async def ListDevices(
        self,
        request: inspection_pb2.ListDevicesRequest,
        context: Context,
    ) -> inspection_pb2.ListDevicesResponse:
        sees = _sees(context)
        machine, served = self._machine, self._streams.served
        return inspection_pb2.ListDevicesResponse(
            devices=[
                views.device_status(
                    machine,
                    device,
                    [
                        views.mirror_status(mirror, served.get(mirror.id))
                        for mirror in machine.receivers.values()
                        if mirror.device is device and sees(mirror.owner)
                    ],
                )
                for device in machine.devices.values()
                if sees(device.owner)
            ]
        )

    # ---- one process, one table

    async def GetMaps(self, request: inspection_pb2.GetMapsRequest, context: Context) -> inspection_pb2.GetMapsResponse:
        space = self._process(request.process_id, context).space
        mappings, token = mappings_of(
            space.vmas,
            request,
            self._config.list_entries,
            self._config.part_bytes,
            lambda vma: views.mapping(self._machine, space, vma),
        )
        return inspection_pb2.GetMapsResponse(
            mappings=mappings,
            brk_start=space.brk_start,
            brk_end=space.brk_end,
            mmap_base=space.mmap_base,
            next_page_token=token,
        )

    async def GetMemoryUse(
        self, request: inspection_pb2.GetMemoryUseRequest, context: Context
    ) -> inspection_pb2.GetMemoryUseResponse:
        space = self._process(request.process_id, context).space
        mappings, token = mappings_of(
            space.vmas,
            request,
            min(self._config.list_entries, USES_IN_PART),
            self._config.part_bytes,
            lambda vma: views.mapping_use(self._machine, space, vma),
        )
        return inspection_pb2.GetMemoryUseResponse(mappings=mappings, next_page_token=token)

    async def GetPageTable(
        self, request: inspection_pb2.GetPageTableRequest, context: Context
    ) -> AsyncIterator[inspection_pb2.GetPageTableResponse]:
        span = convert.range_from_proto(request.range) if request.HasField("range") else WHOLE_SPACE
        table, frames = self._table(request, context)
        for part in views.directory_parts(self._machine, table, span, frames):
            yield part

    async def WalkAddress(
        self, request: inspection_pb2.WalkAddressRequest, context: Context
    ) -> inspection_pb2.WalkAddressResponse:
        space = self._process(request.process_id, context).space
        if request.address >= TASK_SIZE:
            raise convert.malformed(f"walk: {request.address:#x} is beyond the address space")
        vma = space.vmas.find(request.address)
        sees = _sees(context)
        mirrors = [mirror for mirror in self._machine.mirrors.values() if mirror.space is space and sees(mirror.owner)]
        return inspection_pb2.WalkAddressResponse(
            mapping=views.mapping(self._machine, space, vma) if vma else None,
            walks=[
                views.cpu_walk(self._machine, space, request.address),
                *(views.mirror_walk(self._machine, mirror, request.address) for mirror in mirrors),
            ],
        )

    # ---- what happens, what waits, what has been

    async def Watch(
        self, request: inspection_pb2.WatchRequest, context: Context
    ) -> AsyncIterator[inspection_pb2.WatchResponse]:
        named = len(request.process_ids) + len(request.mirror_ids)
        require_at_most("watch: processes and mirrors", named, self._config.list_entries)
        if len(self._observers.watchers) >= self._config.watchers:
            raise OutOfFramesError(f"watch: the limit of {self._config.watchers} is reached", reason="LIMIT")
        spaces = {self._process(process_id, context).space.id for process_id in request.process_ids}
        for mirror_id in request.mirror_ids:
            self._require_mirror(mirror_id, context)
        with self._observers.watch(self._filter(request, spaces, _sees(context))) as watcher:
            yield inspection_pb2.WatchResponse()
            while (message := await watcher.take()) is not None:
                yield message

    async def GetPending(
        self,
        request: inspection_pb2.GetPendingRequest,
        context: Context,
    ) -> inspection_pb2.GetPendingResponse:
        return self._waits.pending(time.monotonic(), _sees(context))

    async def GetStatistics(
        self,
        request: inspection_pb2.GetStatisticsRequest,
        context: Context,
    ) -> inspection_pb2.GetStatisticsResponse:
        sees, served = _sees(context), self._streams.served
        return inspection_pb2.GetStatisticsResponse(
            daemon=counters.daemon_statistics(self._streams, time.monotonic() - self._started_s),
            mirrors=[
                counters.mirror_statistics(mirror, served.get(mirror.id))
                for mirror in self._machine.receivers.values()
                if sees(mirror.owner)
            ],
        )

    async def GetViolations(
        self, request: inspection_pb2.GetViolationsRequest, context: Context
    ) -> inspection_pb2.GetViolationsResponse:
        sees = _sees(context)
        self._require_mirror(request.mirror_id, context)
        device = self._machine.devices.get(request.device_id)
        if device is not None:
            _require(sees, device.owner, str(device))
        chosen = {
            receiver.id: (receiver, gone)
            for receiver, gone in reports.receivers(self._machine)
            if sees(receiver.owner)
            and receiver.reports.counts
            and request.mirror_id in (0, receiver.id)
            and request.device_id in (0, receiver.device.id)
        }
        page = page_of(chosen, request, self._config.list_entries)
        told = (reports.mirror_report(self._streams, chosen[key][0], gone=chosen[key][1]) for key in page.keys)
        mirrors = fitting(told, self._config.part_bytes)
        more = str(mirrors[-1].mirror_id) if len(mirrors) < len(page.keys) else page.next_token
        devices = {receiver.id: receiver.device.id for receiver, _ in reports.receivers(self._machine)}
        rejections = [
            inspection_pb2.RejectedAnswer(
                epoch=stream.epoch, driver_name=stream.name, violation=violation, time_ns=time_ns
            )
            for stream, violation, time_ns in self._streams.rejections
            if sees(stream.owner)
            and request.mirror_id in (0, violation.mirror_id)
            and request.device_id in (0, devices.get(violation.mirror_id))
        ]
        return inspection_pb2.GetViolationsResponse(
            mirrors=mirrors,
            rejected_answers=[] if request.page_token else rejections,
            next_page_token=more,
        )

    async def GetOperation(
        self, request: inspection_pb2.GetOperationRequest, context: Context
    ) -> inspection_pb2.GetOperationResponse:
        operation_id = request.operation_id
        running, ended = self._executor.running.get(operation_id), self._executor.operations.get(operation_id)
        owner = running.record.caller.token if running else ended.owner if ended else None
        if owner is None:
            raise NoSuchObjectError(
                f"operation {operation_id} never was, or is no longer remembered", errnos.ENOENT, reason="OPERATION"
            )
        _require(_sees(context), owner, f"operation {operation_id}")
        status = self._running(running) if running else views.operation_status(ended) if ended else None
        return inspection_pb2.GetOperationResponse(operation=status)

    def _running(self, running: Running) -> inspection_pb2.OperationStatus:
        record = running.record
        return inspection_pb2.OperationStatus(
            operation_id=record.id,
            name=record.name,
            caller=record.caller.name,
            duration_us=round((time.monotonic() - running.started_s) * 1e6),
        )

    # ---- look-ups: an operation is none of them, so ownership is looked at here

    def _process(self, process_id: int, context: Context) -> Process:
        process = self._machine.process(process_id)
        _require(_sees(context), process.owner, str(process))
        return process

    def _require_mirror(self, mirror_id: int, context: Context) -> None:
        # One that is gone, or is still to come, is nobody's.
        receiver = self._machine.receivers.get(mirror_id)
        if receiver is not None:
            _require(_sees(context), receiver.owner, str(receiver))

    def _mirror(self, mirror_id: int, context: Context) -> Mirror:
        mirror = self._machine.mirror(mirror_id)
        _require(_sees(context), mirror.owner, str(mirror))
        return mirror

    def _table(
        self, request: inspection_pb2.GetPageTableRequest, context: Context
    ) -> tuple[PageTable, Callable[[Entries], Pfns]]:
        if request.WhichOneof("table") is None:
            raise convert.malformed("page table: a process or a mirror is needed")
        if request.HasField("mirror_id"):
            mirror = self._mirror(request.mirror_id, context)
            return mirror.table, mirror.pfns
        return self._process(request.process_id, context).space.table, views.cpu_frames

    def _filter(
        self, request: inspection_pb2.WatchRequest, spaces: set[int], sees: Sees
    ) -> Callable[[inspection_pb2.Observation], bool]:
        wanted = set(request.mirror_ids)

        def accepts(observation: inspection_pb2.Observation) -> bool:
            kind = observation.WhichOneof("what")
            if kind == "operation":
                ended = self._executor.operations.get(observation.operation.operation_id)
                return request.operations and ended is not None and sees(ended.owner)
            mirror_ids = observation.event.mirror_ids if kind == "event" else [_mirror_of(observation)]
            mirrors = [
                self._machine.receivers[mirror_id] for mirror_id in mirror_ids if mirror_id in self._machine.receivers
            ]
            return any(
                sees(mirror.owner) and (not wanted or mirror.id in wanted) and (not spaces or mirror.space.id in spaces)
                for mirror in mirrors
            )

        return accepts


def _mirror_of(observation: inspection_pb2.Observation) -> int:
    if observation.HasField("settled"):
        return observation.settled.mirror_id
    return observation.mirror_lost.mirror_id


def _sees(context: Context) -> Sees:
    token = caller_from(context.invocation_metadata()).token
    return lambda owner: owner in ("", token)


def _require(sees: Sees, owner: str, what: str) -> None:
    if not sees(owner):
        raise AccessDeniedError(f"{what} belongs to another owner", errnos.EPERM, reason="NOT_OWNER")
