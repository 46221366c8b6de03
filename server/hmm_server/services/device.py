"""DeviceService: devices and mirrors for clients that make one call at a time.

**Absent**: what the calls do (`hmm.commands_device`), how requests become commands (device_calls.py).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from hmm_proto import convert
from hmm_proto.v1 import device_pb2
from hmm_server.callers import NAME_LENGTH_MAX, caller_from
from hmm_server.device_side import DeviceSide
from hmm_server.streams import Streams

Context = grpc.aio.ServicerContext[Any, Any]


def _rpc(name: str) -> Any:
    async def rpc(self: DeviceService, request: Any, context: Context) -> Any:
        return await self.side.make(caller_from(context.invocation_metadata()), name, request)

    return rpc


class DeviceService:
    """Devices, mirrors, faults and accesses."""

    def __init__(self, side: DeviceSide, streams: Streams) -> None:
        self.side = side
        self._streams = streams

    RegisterDevice = _rpc("register_device")
    UnregisterDevice = _rpc("unregister_device")
    RegisterMirror = _rpc("register_mirror")
    UnregisterMirror = _rpc("unregister_mirror")
    Fault = _rpc("fault")
    Migrate = _rpc("migrate")
    ReadCopy = _rpc("read_copy")
    WriteCopy = _rpc("write_copy")
    DeviceRead = _rpc("device_read")
    DeviceWrite = _rpc("device_write")
    DirtyRange = _rpc("dirty_range")
    DiscardRange = _rpc("discard_range")
    SetDriverBits = _rpc("set_driver_bits")

    async def ReadTable(
        self, request: device_pb2.ReadTableRequest, context: Context
    ) -> AsyncIterator[device_pb2.ReadTableResponse]:
        async for start, entries in self.side.table_parts(caller_from(context.invocation_metadata()), request):
            yield device_pb2.ReadTableResponse(start=start, entries=convert.entries_to_proto(entries))

    async def WatchEvents(
        self, request: device_pb2.WatchEventsRequest, context: Context
    ) -> AsyncIterator[device_pb2.WatchEventsResponse]:
        caller = caller_from(context.invocation_metadata())
        name = request.name[:NAME_LENGTH_MAX] or caller.name
        with self._streams.connected(caller.token, name, 0, request.credit) as stream:
            while (message := await stream.mailbox.take()) is not None:
                response = device_pb2.WatchEventsResponse.FromString(message)  # the same fields there
                response.DiscardUnknownFields()
                yield response

    async def Acknowledge(
        self, request: device_pb2.AcknowledgeRequest, context: Context
    ) -> device_pb2.AcknowledgeResponse:
        answers = request.acknowledgements
        stream = self._streams.find(answers.epoch, caller_from(context.invocation_metadata()).token)
        return device_pb2.AcknowledgeResponse(violations=self._streams.acknowledge(stream, answers))
