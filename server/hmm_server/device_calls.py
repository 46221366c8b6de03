"""The calls of the device side, by the names that they have on a session.

**Absent**: how they are made (calls.py), what they do (`hmm.commands_device`), streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from hmm import commands_device
from hmm.commands_device import DeviceFaulted
from hmm.device_access import Manner, Segment
from hmm.machine import Machine
from hmm.units import PAGE_SHIFT, TASK_SIZE, AddressRange, Entries
from hmm_proto import convert
from hmm_proto.status import to_call_result
from hmm_proto.v1 import device_pb2, types_pb2
from hmm_server.callers import NAME_LENGTH_MAX
from hmm_server.calls import Call, Invocation, invoke
from hmm_server.process_calls import DATA_BYTES_MAX, require_at_most

Result = types_pb2.CallResult
_NO_ENTRIES = np.empty(0, np.uint64)


def _register_device(q: device_pb2.RegisterDeviceRequest) -> Invocation:
    if len(q.name) > NAME_LENGTH_MAX:
        raise convert.malformed(f"register device: the name has more than {NAME_LENGTH_MAX} characters")
    return invoke(
        commands_device.register_device,
        q.name,
        dma=q.dma,
        memory_pages=q.memory_pages,
        kind=convert.memory_kind_from_proto(q.memory_kind),
    )


def register_device_response(machine: Machine, device_id: int) -> device_pb2.RegisterDeviceResponse:
    """What a driver wants to know of its new device."""
    number = machine.devices[device_id].region
    if not number:
        return device_pb2.RegisterDeviceResponse(device_id=device_id)
    region = machine.frames.region(number)
    return device_pb2.RegisterDeviceResponse(device_id=device_id, first_pfn=region.start, end_pfn=region.end)


def _register_mirror(q: device_pb2.RegisterMirrorRequest) -> Invocation:
    return invoke(
        commands_device.register_mirror,
        *(q.device_id, q.process_id),
        policy=convert.policy_from_proto(q.policy),
        update_on_fault=not q.no_fault_events,
        lenient=q.report_only,
    )


def register_mirror_response(machine: Machine, mirror_id: int) -> device_pb2.RegisterMirrorResponse:
    """What a driver wants to know of its new mirror."""
    mirror = machine.mirrors[mirror_id]
    return device_pb2.RegisterMirrorResponse(
        mirror_id=mirror_id,
        space_id=mirror.space.id,
        policy=convert.policy_to_proto(mirror.policy),
        address_end=TASK_SIZE,
    )


def _fault(q: device_pb2.FaultRequest) -> Invocation:
    return invoke(
        commands_device.fault,
        *(q.mirror_id, fault_target(q)),
        write=q.write,
        wait=not q.no_wait,
        whole=not q.first_mapping_only,
    )


def fault_target(q: device_pb2.FaultRequest) -> tuple[AddressRange, ...] | Entries:
    """The ranges or the pages of a fault.

    Raises:
        InvalidRequestError: neither or both are given, or they are malformed (EINVAL).
    """
    spans = convert.page_ranges_from_proto(q.ranges)
    if bool(spans) == bool(q.pages):
        raise convert.malformed("fault: either ranges or pages are needed")
    return spans or convert.pages_from_proto(q.pages)


def fault_pages(q: device_pb2.FaultRequest) -> int:
    """How many pages a fault asks for."""
    ranges = q.ranges
    return (len(q.pages) >> 3) + ((sum(ranges.ends) - sum(ranges.starts)) >> PAGE_SHIFT)


DESCRIBED: Mapping[str, Callable[[Machine, int], Any]] = {
    "register_device": register_device_response,
    "register_mirror": register_mirror_response,
}
"""Responses that say more of a new object than its number."""


class FaultResult(NamedTuple):
    """The response to a fault, but for its entries, uint64[npages]: these are copied once, into what leaves."""

    response: device_pb2.FaultResponse
    entries: Entries

    def whole(self) -> device_pb2.FaultResponse:
        """The response with its entries."""
        self.response.entries = convert.entries_to_proto(self.entries)
        return self.response

    def parts(self, part_bytes: int) -> Iterator[tuple[device_pb2.FaultResponse, bytes, bool]]:
        """Cut the entries of a long reply; everything else is in the last part.

        Yields: a response, its entries, whether more follow.
        """
        step = max(1, part_bytes >> 3)
        last = max(0, self.entries.size - 1) // step * step
        for start in range(0, last, step):
            entries = self.entries[start : start + step]
            yield device_pb2.FaultResponse(), convert.entries_to_proto(entries), True
        yield self.response, convert.entries_to_proto(self.entries[last:]), False


def _fault_response(faulted: DeviceFaulted | None, result: Result) -> FaultResult:
    if faulted is None:
        return FaultResult(device_pb2.FaultResponse(result=result), _NO_ENTRIES)
    errors = [part.error for part in faulted.parts]
    failed = next((error for error in errors if error is not None), None)
    if failed is not None:
        result = to_call_result(failed, result.operation_id, tuple(result.fenced_mirrors))
    response = device_pb2.FaultResponse(
        result=result,
        range_ends=[part.end for part in faulted.parts],
        range_errnos=[error.errno if error else 0 for error in errors],
        notifier_seq=faulted.notifier_seq,
        last_event_sequence=faulted.event_sequence,
        retries=sum([part.retries for part in faulted.parts]),
    )
    return FaultResult(response, faulted.entries)


def _segments(q: device_pb2.DeviceReadRequest | device_pb2.DeviceWriteRequest) -> list[Segment]:
    if len(q.addresses) != len(q.lengths):
        raise convert.malformed(f"device access: {len(q.addresses)} addresses and {len(q.lengths)} lengths")
    require_at_most("device access: bytes", sum(q.lengths), DATA_BYTES_MAX)
    return list(zip(q.addresses, q.lengths, strict=True))


def _manner(q: device_pb2.DeviceReadRequest | device_pb2.DeviceWriteRequest, untracked: bool = False) -> Manner:
    return Manner(
        dma=q.dma,
        named=convert.entries_from_proto(q.entries) if q.entries else None,
        since=q.heard_sequence if q.HasField("heard_sequence") else None,
        untracked=untracked,
    )


CALLS: Mapping[str, Call[Any, Any]] = {
    "register_device": Call(
        _register_device,
        lambda value, _: device_pb2.RegisterDeviceResponse(device_id=value),
        is_kernel_call=False,
    ),
    "unregister_device": Call(
        lambda q: invoke(commands_device.unregister_device, q.device_id),
        lambda _, __: device_pb2.UnregisterDeviceResponse(),
        is_kernel_call=False,
    ),
    "register_mirror": Call(
        _register_mirror,
        lambda value, _: device_pb2.RegisterMirrorResponse(mirror_id=value),
        is_kernel_call=False,
    ),
    "unregister_mirror": Call(
        lambda q: invoke(commands_device.unregister_mirror, q.mirror_id),
        lambda _, result: device_pb2.UnregisterMirrorResponse(result=result),
    ),
    "fault": Call(_fault, _fault_response),
    "device_read": Call(
        lambda q: invoke(commands_device.device_read, q.mirror_id, _segments(q), _manner(q)),
        lambda value, result: device_pb2.DeviceReadResponse(result=result, data=value or b""),
    ),
    "device_write": Call(
        lambda q: invoke(commands_device.device_write, q.mirror_id, _segments(q), q.data, _manner(q, q.untracked)),
        lambda _, result: device_pb2.DeviceWriteResponse(result=result),
    ),
    "dirty_range": Call(
        lambda q: invoke(commands_device.dirty_range, q.mirror_id, convert.range_from_proto(q.range)),
        lambda _, __: device_pb2.DirtyRangeResponse(),
        is_kernel_call=False,
    ),
    "discard_range": Call(
        lambda q: invoke(commands_device.discard_range, q.mirror_id, convert.range_from_proto(q.range)),
        lambda _, __: device_pb2.DiscardRangeResponse(),
        is_kernel_call=False,
    ),
    "read_table": Call(
        lambda q: invoke(commands_device.read_table, q.mirror_id, convert.range_from_proto(q.range)),
        lambda value, _: device_pb2.ReadTableResponse(entries=convert.entries_to_proto(value)),
        is_kernel_call=False,
    ),
    "set_driver_bits": Call(
        lambda q: invoke(commands_device.set_driver_bits, q.mirror_id, convert.range_from_proto(q.range), q.bits),
        lambda _, __: device_pb2.SetDriverBitsResponse(),
        is_kernel_call=False,
    ),
    "inject_dma_failure": Call(
        lambda q: invoke(commands_device.inject_dma_failure, q.device_id, q.nth),
        lambda _, __: device_pb2.InjectDmaFailureResponse(),
        is_kernel_call=False,
    ),
}
