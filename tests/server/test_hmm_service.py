"""HmmService: today's interface one call at a time, with a plain stream of events."""

from __future__ import annotations

import asyncio
import errno as errnos
from typing import Any

import grpc
import numpy as np
import pytest

from hmm.migration import MIGRATE
from hmm.range_fault import DMA_MAPPED, REQ_FAULT, REQ_WRITE, VALID
from hmm_proto.v1 import (
    device_pb2,
    event_pb2,
    hmm_pb2,
    inspection_pb2,
    process_pb2,
    range_pb2,
    types_pb2,
    violation_pb2,
)

PAGE = 4096
BASE = 0x10000000000
END = BASE + 4 * PAGE
WHOLE = range_pb2.AddressRange(start=BASE, end=END)


class Attached:
    """A process with four pages, a device with eight, and a mirror with one subscription, served by a plain stream."""

    served: Any
    stream: Any
    epoch: int
    pid: int
    device: device_pb2.RegisterDeviceResponse
    mirror: int
    notifier: int

    async def acknowledge(self, event: event_pb2.Event) -> None:
        """Answer an event."""
        answers = event_pb2.Acknowledgements(
            epoch=self.epoch, mirror_ids=event.mirror_ids, acknowledged_up_to=event.event_sequences
        )
        await self.served.device.Acknowledge(device_pb2.AcknowledgeRequest(acknowledgements=answers))

    async def event(self) -> event_pb2.Event:
        """The next event."""
        (event,) = (await self.stream.read()).events
        assert isinstance(event, event_pb2.Event)
        return event


@pytest.fixture
async def attached(served: Any) -> Attached:
    """One of these."""
    one = Attached()
    one.served, one.pid = served, await served.new_process()
    await served.mmap(one.pid, BASE, END)
    one.stream = served.device.WatchEvents(device_pb2.WatchEventsRequest(name="simple"))
    one.epoch = (await one.stream.read()).welcome.epoch
    one.device = await served.device.RegisterDevice(device_pb2.RegisterDeviceRequest(name="card", memory_pages=8))
    made = await served.hmm.Attach(
        hmm_pb2.AttachRequest(device_id=one.device.device_id, process_id=one.pid, epoch=one.epoch)
    )
    assert made.policy == types_pb2.DEADLINE_POLICY_FENCE
    one.mirror = made.mirror_id
    inserted = await served.hmm.InsertNotifier(
        hmm_pb2.InsertNotifierRequest(mirror_id=one.mirror, start=BASE, length=END - BASE, filtered=True)
    )
    one.notifier = inserted.notifier_id
    return one


async def test_driver_needs_nothing_but_unary_calls_and_a_stream(attached: Attached) -> None:
    """Begin, fault, retry; migrate and hear of it; the words come whole."""
    hmm = attached.served.hmm
    where = {"mirror_id": attached.mirror, "notifier_id": attached.notifier}
    begun = await hmm.ReadBegin(hmm_pb2.ReadBeginRequest(**where))
    fault = hmm_pb2.RangeFaultRequest(**where, range=WHOLE, default_flags=REQ_FAULT, notifier_seq=begun.notifier_seq)
    faulted = await hmm.RangeFault(fault)
    assert (np.frombuffer(faulted.words, "<u8") & np.uint64(VALID)).all()
    retry = hmm_pb2.ReadRetryRequest(**where, notifier_seq=begun.notifier_seq)
    assert not (await hmm.ReadRetry(retry)).retry
    migrating = asyncio.ensure_future(
        hmm.MigrateToDevice(hmm_pb2.MigrateToDeviceRequest(mirror_id=attached.mirror, range=WHOLE))
    )
    event = await attached.event()
    assert (event.reason, event.initiator) == (types_pb2.REASON_MIGRATE, attached.mirror)
    assert event.notifier_seq % 2 == 1
    await attached.acknowledge(event)
    await attached.acknowledge(await attached.event())  # holes are filled: told once more
    moved = await migrating
    assert (np.frombuffer(moved.src, "<u8") & np.uint64(MIGRATE)).all()
    pages = np.arange(BASE, END, PAGE, dtype="<u8")
    pfns = (np.frombuffer(moved.dst, "<u8") >> np.uint64(6)).astype("<u8")
    assert attached.device.first_pfn <= int(pfns[0]) < attached.device.end_pfn
    write = hmm_pb2.WriteFramesRequest(
        mirror_id=attached.mirror, pages=pages.tobytes(), pfns=pfns.tobytes(), data=b"d" * (END - BASE)
    )
    assert (await hmm.WriteFrames(write)).result.errno == 0
    read = hmm_pb2.ReadFramesRequest(mirror_id=attached.mirror, pages=pages[:1].tobytes(), pfns=pfns[:1].tobytes())
    assert (await hmm.ReadFrames(read)).data == b"d" * PAGE
    stale = hmm_pb2.ReadFramesRequest(mirror_id=attached.mirror, pages=pages[:1].tobytes(), pfns=pfns[1:2].tobytes())
    violation = (await hmm.ReadFrames(stale)).result.violation
    assert violation.kind == violation_pb2.VIOLATION_KIND_USE_AFTER_INVALIDATION
    assert (violation.address, violation.taking.operation) == (BASE, "migrate_to_device")
    detached = await hmm.Detach(hmm_pb2.DetachRequest(mirror_id=attached.mirror))
    assert detached.result.errno == 0


async def test_driver_maps_for_dma_and_is_reported_when_it_forgets_to_unmap(attached: Attached) -> None:
    """hmm_dma_map_pfn() and hmm_dma_unmap_pfn() by unary calls; a kept mapping is found at the answer, and named."""
    served, hmm = attached.served, attached.served.hmm
    device = await served.device.RegisterDevice(device_pb2.RegisterDeviceRequest(name="nic", dma=True))
    attach = hmm_pb2.AttachRequest(device_id=device.device_id, process_id=attached.pid, epoch=attached.epoch)
    mirror = (await hmm.Attach(attach)).mirror_id
    insert = hmm_pb2.InsertNotifierRequest(mirror_id=mirror, start=BASE, length=END - BASE)
    notifier = (await hmm.InsertNotifier(insert)).notifier_id
    fault = hmm_pb2.RangeFaultRequest(
        mirror_id=mirror, notifier_id=notifier, range=WHOLE, default_flags=REQ_FAULT | REQ_WRITE
    )
    words = (await hmm.RangeFault(fault)).words
    pages = np.arange(BASE, END, PAGE, dtype="<u8").tobytes()
    mapped = await hmm.DmaMap(hmm_pb2.DmaMapRequest(mirror_id=mirror, pages=pages, words=words))
    assert (np.frombuffer(mapped.words, "<u8") & np.uint64(DMA_MAPPED)).all()
    where = {"mirror_id": mirror, "dma": True}
    write = hmm_pb2.WriteFramesRequest(**where, pages=mapped.dma_addresses[:16], data=b"d", offset=PAGE - 1)
    assert (await hmm.WriteFrames(write)).result.errno == errnos.EINVAL  # the second page would get none
    write.data = b"da"
    assert (await hmm.WriteFrames(write)).result.errno == 0
    read = hmm_pb2.ReadFramesRequest(**where, pages=mapped.dma_addresses[8:16], length=1)
    assert (await hmm.ReadFrames(read)).data == b"a"
    unmap = hmm_pb2.DmaUnmapRequest(mirror_id=mirror, pages=pages[:8], words=mapped.words[:8])
    left = (await hmm.DmaUnmap(unmap)).words
    assert not int.from_bytes(left, "little") & DMA_MAPPED
    gone = hmm_pb2.ReadFramesRequest(**where, pages=mapped.dma_addresses[:8], length=1)
    assert (await hmm.ReadFrames(gone)).result.errno == errnos.EFAULT
    unmapping = served.munmap(attached.pid, BASE, END)
    event = await attached.event()
    await attached.acknowledge(event)
    await unmapping
    answer = await served.inspection.GetViolations(inspection_pb2.GetViolationsRequest(mirror_id=mirror))
    kept = answer.mirrors[0].violations[-1]
    assert (kept.kind, kept.address, kept.pages) == (violation_pb2.VIOLATION_KIND_DMA_MAPPING_KEPT, BASE + PAGE, 3)
    assert kept.taking.operation == "munmap"


async def test_pin_ends_with_the_stream_that_holds_it(attached: Attached, decode: Any) -> None:
    """Whoever calls says by which stream it lives; when that ends the pages may move again."""
    served = attached.served
    pin = hmm_pb2.PinPagesRequest(process_id=attached.pid, range=WHOLE, write=True, epoch=attached.epoch)
    first, second = await served.hmm.PinPages(pin), await served.hmm.PinPages(pin)
    assert [holding.pin_id for holding in (await served.pending()).holdings] == [first.pin_id, second.pin_id]
    await served.hmm.UnpinPages(hmm_pb2.UnpinPagesRequest(pin_id=first.pin_id))
    with pytest.raises(grpc.aio.AioRpcError) as again:
        await served.hmm.UnpinPages(hmm_pb2.UnpinPagesRequest(pin_id=first.pin_id))
    assert decode(again).errno == errnos.ENOENT
    attached.stream.cancel()
    await served.until(lambda: not served.daemon.machine.pins)


async def test_lost_mirrors_go_when_the_lease_ends(serve: Any) -> None:
    """Of both interfaces: then the device can go as well."""
    served = await serve(lease_s=0)
    driver = await served.driver()
    pid = await served.new_process()
    device = await driver.make("register_device", device_pb2.RegisterDeviceRequest(name="card"))
    attach = hmm_pb2.AttachRequest(device_id=device.device_id, process_id=pid)
    assert (await driver.make("attach", attach)).mirror_id
    await driver.bye()
    await served.until(lambda: not served.daemon.machine.receivers and not served.daemon.machine.devices)


async def test_device_goes_with_its_last_mirror_when_another_stream_serves_that(serve: Any) -> None:
    """The lease of who registered it may end long before: nothing that nobody owns any more is left behind."""
    served = await serve(lease_s=0)
    first, second = await served.driver(), await served.driver()
    pid = await served.new_process()
    device = await first.make("register_device", device_pb2.RegisterDeviceRequest(name="card"))
    attach = hmm_pb2.AttachRequest(device_id=device.device_id, process_id=pid)
    assert (await second.make("attach", attach)).mirror_id
    ended = served.daemon.executor.operations.ended_by_name
    await first.bye()
    await served.until(lambda: ended["unregister_device"])
    assert served.daemon.machine.devices
    await second.bye()
    await served.until(lambda: not served.daemon.machine.devices)


def _frames(**fields: Any) -> hmm_pb2.WriteFramesRequest:
    return hmm_pb2.WriteFramesRequest(**{"mirror_id": 1, "pages": bytes(8), "pfns": bytes(8), "data": b"x"} | fields)


MALFORMED = grpc.StatusCode.INVALID_ARGUMENT
TOO_MUCH = grpc.StatusCode.RESOURCE_EXHAUSTED
FAR = range_pb2.AddressRange(start=0, end=1 << 31)


@pytest.mark.parametrize(
    ("method", "request_", "code"),
    [
        ("Attach", hmm_pb2.AttachRequest(device_id=1, process_id=1), MALFORMED),
        ("PinPages", hmm_pb2.PinPagesRequest(process_id=1), MALFORMED),
        ("RangeFault", hmm_pb2.RangeFaultRequest(mirror_id=1, range=WHOLE, words=b"123"), MALFORMED),
        ("RangeFault", hmm_pb2.RangeFaultRequest(mirror_id=1, range=FAR), TOO_MUCH),
        ("MigrateToDevice", hmm_pb2.MigrateToDeviceRequest(mirror_id=1, range=FAR), TOO_MUCH),
        ("MigrateToSystem", hmm_pb2.MigrateToSystemRequest(mirror_id=1, range=FAR), TOO_MUCH),
        ("WriteFrames", _frames(pfns=b""), MALFORMED),
        ("WriteFrames", _frames(pages=(1).to_bytes(8, "little")), MALFORMED),
        ("WriteFrames", _frames(pages=(1 << 60).to_bytes(8, "little")), MALFORMED),
        ("WriteFrames", _frames(dma=True), MALFORMED),
        ("DmaMap", hmm_pb2.DmaMapRequest(mirror_id=1, pages=(1).to_bytes(8, "little"), words=bytes(8)), MALFORMED),
        ("DmaMap", hmm_pb2.DmaMapRequest(mirror_id=1, pages=bytes(8 << 17), words=bytes(8 << 17)), TOO_MUCH),
        ("WriteFrames", _frames(pages=bytes(8 * 257), pfns=bytes(8 * 257)), TOO_MUCH),
    ],
)
async def test_calls_are_refused_when_they_make_no_sense(
    attached: Attached, method: str, request_: Any, code: grpc.StatusCode
) -> None:
    """Nothing is done: no stream, no words, too much, or arrays that do not fit together."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await getattr(attached.served.hmm, method)(request_)
    assert refused.value.code() is code


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 0), (0, 4097), (4096, 1), (1, 4096)])
async def test_writing_frames_fails_when_bytes_are_no_part_of_the_pages(
    attached: Attached, offset: int, nbytes: int
) -> None:
    """EINVAL: of every page at least one byte, and none beyond."""
    answer = await attached.served.hmm.WriteFrames(_frames(offset=offset, data=bytes(nbytes)))
    assert answer.result.errno == errnos.EINVAL


@pytest.mark.parametrize(
    ("method", "request_", "number"),
    [
        ("ReadBegin", hmm_pb2.ReadBeginRequest(mirror_id=9, notifier_id=1), errnos.ENODEV),
        ("EvictDevice", hmm_pb2.EvictDeviceRequest(device_id=9), errnos.ENODEV),
        ("PinPages", hmm_pb2.PinPagesRequest(process_id=9), errnos.ESRCH),
    ],
)
async def test_calls_are_refused_when_the_object_does_not_exist(
    attached: Attached, decode: Any, method: str, request_: Any, number: int
) -> None:
    """NOT_FOUND with the kernel's errno; mirrors of 2015 have no interval notifiers."""
    if method == "PinPages":
        request_.epoch = attached.epoch
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await getattr(attached.served.hmm, method)(request_)
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    assert decode(refused).errno == number


async def test_pins_of_other_owners_are_refused(attached: Attached) -> None:
    """A pin is its token's; the empty token's are everybody's."""
    served = attached.served
    mine = (("hmm-token", "mine"),)
    driver = await served.driver(token="mine")
    pid = await served.new_process(metadata=mine)
    request = process_pb2.MmapRequest(process_id=pid, length=PAGE, prot=3, flags=0x22)
    mapped = await served.process.Mmap(request, metadata=mine)
    span = range_pb2.AddressRange(start=mapped.address, end=mapped.address + PAGE)
    pinned = await driver.make("pin_pages", hmm_pb2.PinPagesRequest(process_id=pid, range=span))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.hmm.UnpinPages(hmm_pb2.UnpinPagesRequest(pin_id=pinned.pin_id))
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert (await served.pending()).holdings == []
