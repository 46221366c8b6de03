"""The calls of the device side, by the names that they have on a session.

**Absent**: how they are made (calls.py), what they do (`hmm.commands_device`), streams.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hmm import commands_device
from hmm.commands_device import DeviceFaulted, DeviceMigrated
from hmm.device_access import Manner, Segment
from hmm.machine import Machine
from hmm.units import PAGE_SHIFT, TASK_SIZE, AddressRange, Entries
from hmm_proto import convert
from hmm_proto.status import to_call_result
from hmm_proto.v1 import device_pb2, types_pb2
from hmm_server.calls import Call, Invocation, invoke
from hmm_server.process_calls import DATA_BYTES_MAX, require_at_most, require_name
from hmm_server.replies import FEW, ArrayReply

Result = types_pb2.CallResult
PIECES_MAX = 4096
"""Ranges of one fault, pieces of one access: each takes a step of its own, and may touch a page of its own."""


def _register_device(q: device_pb2.RegisterDeviceRequest) -> Invocation:
    require_name("register device", q.name)
    return invoke(
        commands_device.register_device,
        q.name,
        dma=q.dma,
        memory_pages=q.memory_pages,
        kind=convert.memory_kind_from_proto(q.memory_kind),
        driver_copies=q.driver_copies,
        evicts=q.evicts,
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
    """The ranges or the pages of a fault.

    Raises:
        InvalidRequestError: neither or both are given, or they are malformed (EINVAL).
    """
    pages, ranges = q.pages, q.ranges
    starts = ranges.starts  # protobuf makes an object for each look at an array, as long as nobody has one
    target: tuple[AddressRange, ...] | Entries
    if not pages:
        if len(starts) > PIECES_MAX:
            require_at_most("fault: ranges", len(starts), PIECES_MAX)
        target = convert.page_ranges_from_proto(ranges)
        npages = target[0].npages if len(target) == 1 else sum([span.npages for span in target])  # most are one
    elif not (starts or ranges.ends):
        target = convert.pages_from_proto(pages)
        npages = target.size
    else:
        npages = 0
    if not npages:
        raise convert.malformed("fault: either ranges or pages are needed")
    how = {"write": q.write, "wait": not q.no_wait, "whole": not q.first_mapping_only}
    return Invocation(commands_device.fault, (q.mirror_id, target), how, npages)


def _fault_response(faulted: DeviceFaulted | None, result: Result) -> device_pb2.FaultResponse | ArrayReply:
    if faulted is None:
        return device_pb2.FaultResponse(result=result)
    response = device_pb2.FaultResponse()  # what is an argument of a message takes twice as long
    response.notifier_seq, response.last_event_sequence = faulted.notifier_seq, faulted.event_sequence
    ends, errnos = response.range_ends, response.range_errnos
    failed, retries = None, 0
    for _, end, error, retried, _ in faulted.parts:
        ends.append(end)
        errnos.append(error.errno if error is not None else 0)
        failed = failed or error
        retries += retried
    if failed is not None:
        result = to_call_result(failed, result.operation_id, tuple(result.fenced_mirrors))
    response.result.CopyFrom(result)
    if retries:
        response.retries = retries
    if faulted.entries.size <= FEW:
        response.entries = convert.entries_to_proto(faulted.entries)
        return response
    return ArrayReply(response, {"entries": faulted.entries})


def _migrate(q: device_pb2.MigrateRequest) -> Invocation:
    command = commands_device.migrate_back if q.to_system else commands_device.migrate
    return invoke(command, q.mirror_id, convert.range_from_proto(q.range))


def _migrate_response(migrated: DeviceMigrated | None, result: Result) -> ArrayReply:
    if migrated is None:
        return ArrayReply(device_pb2.MigrateResponse(result=result), {})
    moved = migrated.moved
    if moved.error is not None:
        result = to_call_result(moved.error, result.operation_id, tuple(result.fenced_mirrors))
    response = device_pb2.MigrateResponse(
        result=result,
        end=moved.end,
        moved_pages=moved.npages,
        notifier_seq=migrated.notifier_seq,
        last_event_sequence=migrated.event_sequence,
    )
    return ArrayReply(response, {"entries": migrated.entries})


def _read_copy(q: device_pb2.ReadCopyRequest) -> Invocation:
    require_at_most("read copy: bytes", q.page_count << PAGE_SHIFT, DATA_BYTES_MAX)
    return invoke(commands_device.read_copy, q.mirror_id, q.copy, q.first_page, q.page_count)


def _write_copy(q: device_pb2.WriteCopyRequest) -> Invocation:
    require_at_most("write copy: bytes", len(q.data), DATA_BYTES_MAX)
    return invoke(commands_device.write_copy, q.mirror_id, q.copy, q.first_page, q.data)


def _segments(q: device_pb2.DeviceReadRequest | device_pb2.DeviceWriteRequest) -> list[Segment]:
    if len(q.addresses) != len(q.lengths):
        raise convert.malformed(f"device access: {len(q.addresses)} addresses and {len(q.lengths)} lengths")
    require_at_most("device access: pieces", len(q.addresses), PIECES_MAX)
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
    "migrate": Call(_migrate, _migrate_response),
    "read_copy": Call(
        _read_copy, lambda value, _: device_pb2.ReadCopyResponse(data=value or b""), is_kernel_call=False
    ),
    "write_copy": Call(_write_copy, lambda _, __: device_pb2.WriteCopyResponse(), is_kernel_call=False),
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
}
