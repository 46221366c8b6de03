"""DeviceService: the simple way to be a driver, one call at a time, with a plain stream of events."""

from __future__ import annotations

import asyncio
import errno as errnos
from typing import Any

import grpc
import numpy as np
import pytest

from hmm import pte
from hmm_proto.v1 import device_pb2, event_pb2, process_pb2, range_pb2, types_pb2

PAGE = 4096
BASE = 0x10000000000
END = BASE + 4 * PAGE


@pytest.fixture
async def watched(served: Any) -> tuple[Any, Any, int, int, int]:
    """A daemon, an open stream of events, its epoch, a process with four pages, and a mirror served by the stream."""
    pid = await served.new_process()
    await served.mmap(pid, BASE, END)
    stream = served.device.WatchEvents(device_pb2.WatchEventsRequest(name="simple"))
    epoch = (await stream.read()).welcome.epoch
    device = await served.device.RegisterDevice(device_pb2.RegisterDeviceRequest(name="nic0"))
    mirror = await served.device.RegisterMirror(
        device_pb2.RegisterMirrorRequest(device_id=device.device_id, process_id=pid, epoch=epoch, no_fault_events=True)
    )
    return served, stream, epoch, pid, mirror.mirror_id


def _acknowledge(epoch: int, event: event_pb2.Event) -> device_pb2.AcknowledgeRequest:
    return device_pb2.AcknowledgeRequest(
        acknowledgements=event_pb2.Acknowledgements(
            epoch=epoch, mirror_ids=event.mirror_ids, acknowledged_up_to=event.event_sequences
        )
    )


async def test_watch_events_and_acknowledge_serve_a_mirror(watched: Any) -> None:
    """Events come on the stream, answers go by unary calls that name its epoch."""
    served, stream, epoch, pid, mirror = watched
    unmapping = asyncio.ensure_future(served.munmap(pid, BASE, END))
    (event,) = (await stream.read()).events
    assert list(event.mirror_ids) == [mirror]
    assert not unmapping.done()
    answered = await served.device.Acknowledge(_acknowledge(epoch, event))
    assert not answered.violations
    assert (await unmapping).result.errno == 0


async def test_acknowledge_reports_violations(watched: Any) -> None:
    """An answer to an event that was never sent comes back in the reply."""
    served, _, epoch, _, mirror = watched
    future = event_pb2.Event(mirror_ids=[mirror], event_sequences=[5])
    answered = await served.device.Acknowledge(_acknowledge(epoch, future))
    assert [(v.mirror_id, v.event_sequence) for v in answered.violations] == [(mirror, 5)]


@pytest.mark.parametrize("method", ["Acknowledge", "RegisterMirror"])
async def test_call_is_invalid_when_epoch_names_no_stream(watched: Any, decode: Any, method: str) -> None:
    """Answers and mirrors name a stream that is open; those of an old epoch are rejected."""
    served, _, epoch, pid, _ = watched
    request = (
        _acknowledge(epoch + 1, event_pb2.Event())
        if method == "Acknowledge"
        else device_pb2.RegisterMirrorRequest(device_id=1, process_id=pid, epoch=epoch + 1)
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(served.device, method)(request)
    assert decode(caught).errno == errnos.EINVAL


async def test_acknowledge_is_invalid_when_stream_belongs_to_another_token(watched: Any) -> None:
    """Nobody answers for another's stream."""
    served, _, epoch, _, mirror = watched
    event = event_pb2.Event(mirror_ids=[mirror], event_sequences=[1])
    with pytest.raises(grpc.aio.AioRpcError):
        await served.device.Acknowledge(_acknowledge(epoch, event), metadata=(("hmm-token", "other"),))


async def test_cancelled_stream_fences_its_mirrors(watched: Any) -> None:
    """The end of the stream is the death of the driver."""
    served, stream, _, pid, mirror = watched
    unmapping = asyncio.ensure_future(served.munmap(pid, BASE, END))
    await stream.read()
    stream.cancel()
    assert list((await unmapping).result.fenced_mirrors) == [mirror]


async def test_unary_calls_do_what_those_of_a_session_do(watched: Any) -> None:
    """Fault, write, read, dirty, table and discard, each as a call of its own."""
    served, _, _, pid, mirror = watched
    span = range_pb2.AddressRange(start=BASE, end=END)
    ranges = range_pb2.AddressRanges(starts=[BASE], ends=[END])
    faulted = await served.device.Fault(device_pb2.FaultRequest(mirror_id=mirror, ranges=ranges, write=True))
    wrote = await served.device.DeviceWrite(
        device_pb2.DeviceWriteRequest(mirror_id=mirror, addresses=[BASE + PAGE], lengths=[5], data=b"hello")
    )
    read = await served.device.DeviceRead(
        device_pb2.DeviceReadRequest(mirror_id=mirror, addresses=[BASE + PAGE], lengths=[5])
    )
    await served.device.DirtyRange(device_pb2.DirtyRangeRequest(mirror_id=mirror, range=span))
    await served.device.SetDriverBits(device_pb2.SetDriverBitsRequest(mirror_id=mirror, range=span, bits=3))
    table = device_pb2.ReadTableRequest(mirror_id=mirror, range=span)
    (part,) = [part async for part in served.device.ReadTable(table)]
    entries = np.frombuffer(part.entries, "<u8")
    await served.device.DiscardRange(device_pb2.DiscardRangeRequest(mirror_id=mirror, range=span))
    assert (faulted.result.errno, wrote.result.errno, read.data) == (0, 0, b"hello")
    assert pte.pte_test_dirty(entries).all()
    assert [part async for part in served.device.ReadTable(table)] == []
    seen = await served.process.ReadMemory(process_pb2.ReadMemoryRequest(process_id=pid, address=BASE + PAGE, length=5))
    assert seen.data == b"hello"


async def test_dma_addresses_reach_memory(watched: Any) -> None:
    """A device that does DMA has DMA addresses in its table, and reads by them."""
    served, _, epoch, pid, _ = watched
    device = await served.device.RegisterDevice(device_pb2.RegisterDeviceRequest(name="dma0", dma=True))
    registered = await served.device.RegisterMirror(
        device_pb2.RegisterMirrorRequest(device_id=device.device_id, process_id=pid, epoch=epoch, no_fault_events=True)
    )
    await served.process.WriteMemory(process_pb2.WriteMemoryRequest(process_id=pid, address=BASE, data=b"dma"))
    fault = device_pb2.FaultRequest(
        mirror_id=registered.mirror_id, ranges=range_pb2.AddressRanges(starts=[BASE], ends=[BASE + PAGE])
    )
    faulted = await served.device.Fault(fault)
    address = int(pte.pte_dma_addr(np.frombuffer(faulted.entries, "<u8"))[0])
    read = await served.device.DeviceRead(
        device_pb2.DeviceReadRequest(mirror_id=registered.mirror_id, addresses=[address], lengths=[3], dma=True)
    )
    assert read.data == b"dma"


async def test_register_device_tells_its_frames(watched: Any) -> None:
    """Frames of devices are apart from those of the system and of other devices; without memory there are none."""
    served, *_ = watched
    first, second = [
        await served.device.RegisterDevice(device_pb2.RegisterDeviceRequest(name=name, memory_pages=8))
        for name in ("first", "second")
    ]
    assert first.end_pfn - first.first_pfn == second.end_pfn - second.first_pfn == 8
    assert served.daemon.machine.frames.regions[0].end <= first.first_pfn < first.end_pfn <= second.first_pfn
    without = await served.device.RegisterDevice(device_pb2.RegisterDeviceRequest(name="without"))
    assert (without.first_pfn, without.end_pfn) == (0, 0)


async def test_register_mirror_tells_policy_and_space(watched: Any) -> None:
    """The reply tells what the daemon made of the request; FENCE is the default policy."""
    served, _, epoch, _, _ = watched
    pid = await served.new_process()
    registered = await served.device.RegisterMirror(
        device_pb2.RegisterMirrorRequest(device_id=1, process_id=pid, epoch=epoch)
    )
    assert registered.policy == types_pb2.DEADLINE_POLICY_FENCE
    assert registered.space_id == served.daemon.machine.processes[pid].space.id
    assert registered.address_end == (1 << 47) - PAGE


@pytest.mark.parametrize(
    ("method", "request_", "code"),
    [
        ("RegisterDevice", device_pb2.RegisterDeviceRequest(), grpc.StatusCode.INVALID_ARGUMENT),
        ("RegisterDevice", device_pb2.RegisterDeviceRequest(name="x" * 65), grpc.StatusCode.INVALID_ARGUMENT),
        ("UnregisterDevice", device_pb2.UnregisterDeviceRequest(device_id=1), grpc.StatusCode.FAILED_PRECONDITION),
        ("UnregisterMirror", device_pb2.UnregisterMirrorRequest(mirror_id=9), grpc.StatusCode.NOT_FOUND),
        ("DirtyRange", device_pb2.DirtyRangeRequest(mirror_id=1), grpc.StatusCode.INVALID_ARGUMENT),
        (
            "DeviceRead",
            device_pb2.DeviceReadRequest(mirror_id=1, addresses=[BASE]),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
        (
            "DeviceRead",
            device_pb2.DeviceReadRequest(mirror_id=1, addresses=[BASE], lengths=[(1 << 20) + 1]),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
        ),
    ],
    ids=["no name", "long name", "busy", "no mirror", "empty range", "lengths", "too long"],
)
async def test_call_ends_with_status_when_it_cannot_be_made(
    watched: Any, method: str, request_: Any, code: grpc.StatusCode
) -> None:
    """Requests that make no sense change nothing and are statuses."""
    served, _, _, _, _ = watched
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(served.device, method)(request_)
    assert caught.value.code() is code


async def test_read_table_ends_with_status_when_mirror_is_not_there(served: Any, decode: Any) -> None:
    """A stream of parts ends with the status that a unary call would have had."""
    request = device_pb2.ReadTableRequest(mirror_id=9, range=range_pb2.AddressRange(start=BASE, end=END))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(aiter(served.device.ReadTable(request)))
    assert decode(caught).errno == errnos.ENODEV


async def test_dma_fault_fails_when_the_device_has_too_much_mapped(serve: Any) -> None:
    """The setting `dma_pages`: ENOMEM for what is beyond it, as when dma_map_page() fails."""
    served = await serve(dma_pages=1)
    driver, pid = await served.driver(), await served.new_process()
    await served.mmap(pid, BASE, BASE + 2 * PAGE)
    device = await driver.make("register_device", device_pb2.RegisterDeviceRequest(name="nic", dma=True))
    mirroring = device_pb2.RegisterMirrorRequest(device_id=device.device_id, process_id=pid, no_fault_events=True)
    mirror = (await driver.make("register_mirror", mirroring)).mirror_id
    ranges = range_pb2.AddressRanges(starts=[BASE], ends=[BASE + 2 * PAGE])
    faulted = await driver.make("fault", device_pb2.FaultRequest(mirror_id=mirror, ranges=ranges))
    assert faulted.result.errno == errnos.ENOMEM
