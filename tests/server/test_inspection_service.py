"""InspectionService: what exists, to those who may see it, and what happens, to whoever watches."""

from __future__ import annotations

import asyncio
import errno as errnos
from typing import Any

import grpc
import pytest

from hmm.address_space import AddressSpace
from hmm.madvise import Advice
from hmm_proto.v1 import device_pb2, event_pb2, file_pb2, inspection_pb2, process_pb2, range_pb2, types_pb2
from hmm_server.config import Config
from hmm_server.observers import BATCH_BYTES, BATCH_OBSERVATIONS, Watcher

PAGE = 4096
BASE = 0x10000000000
END = BASE + 4 * PAGE
MINE = (("hmm-token", "mine"),)


@pytest.fixture
async def mirrored(served: Any) -> tuple[Any, Any, int, int]:
    """A daemon, a driver, a process with four pages, all in the driver's mirror of it."""
    return await served.mirrored(4, filled=True)


async def test_list_processes_counts_what_each_holds(mirrored: Any) -> None:
    """`ps`: names, parents, mappings, pages and mirrors."""
    served, _, pid, mirror = mirrored
    (process,) = (await served.inspection.ListProcesses(inspection_pb2.ListProcessesRequest())).processes
    assert (process.process_id, process.name, process.vma_count, process.space_users) == (pid, "victim", 1, 1)
    assert (process.mapped_bytes, process.resident_pages, list(process.mirror_ids)) == (4 * PAGE, 4, [mirror])


async def test_lists_leave_out_what_belongs_to_another_token(served: Any) -> None:
    """With a token one sees one's own and what belongs to everybody; without one only the latter."""
    await served.new_process("mine", metadata=MINE)
    await served.new_process("everybody's")
    request = inspection_pb2.ListProcessesRequest()
    everybody = (await served.inspection.ListProcesses(request)).processes
    mine = (await served.inspection.ListProcesses(request, metadata=MINE)).processes
    assert [p.name for p in everybody] == ["everybody's"]
    assert [p.name for p in mine] == ["mine", "everybody's"]


async def test_mirrors_of_another_token_are_not_shown(served: Any) -> None:
    """Neither on a device of everybody, nor with a process of everybody."""
    pid = await served.new_process()
    await served.mmap(pid, BASE, END)
    anybody, owner = await served.driver(), await served.driver(token="mine")
    device = (await anybody.make("register_device", device_pb2.RegisterDeviceRequest(name="shared"))).device_id
    request = device_pb2.RegisterMirrorRequest(device_id=device, process_id=pid, no_fault_events=True)
    mirror = (await owner.make("register_mirror", request)).mirror_id
    for metadata, shown in ((MINE, [mirror]), ((), [])):
        devices = (await served.inspection.ListDevices(inspection_pb2.ListDevicesRequest(), metadata=metadata)).devices
        assert [one.mirror_id for one in devices[0].mirrors] == shown
        listed = await served.inspection.ListProcesses(inspection_pb2.ListProcessesRequest(), metadata=metadata)
        assert list(listed.processes[0].mirror_ids) == shown
        walk = inspection_pb2.WalkAddressRequest(process_id=pid, address=BASE)
        walked = await served.inspection.WalkAddress(walk, metadata=metadata)
        assert [one.mirror_id for one in walked.walks] == [0, *shown]


async def test_look_ups_are_denied_when_owned_by_another_token(served: Any, decode: Any) -> None:
    """Maps, walks and tables of others are PERMISSION_DENIED."""
    pid = await served.new_process(metadata=MINE)
    for call in (
        served.inspection.GetMaps(inspection_pb2.GetMapsRequest(process_id=pid)),
        served.inspection.WalkAddress(inspection_pb2.WalkAddressRequest(process_id=pid)),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert decode(caught).reason == "NOT_OWNER"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(aiter(served.inspection.GetPageTable(inspection_pb2.GetPageTableRequest(process_id=pid))))
    assert decode(caught).errno == errnos.EPERM


async def test_page_table_lists_directories_from_the_top(mirrored: Any) -> None:
    """`pagetable`: every directory of a walk with its level, span, entries and references."""
    served, _, pid, mirror = mirrored
    for table in ({"mirror_id": mirror}, {"process_id": pid}):
        request = inspection_pb2.GetPageTableRequest(**table)
        (part,) = [part async for part in served.inspection.GetPageTable(request)]
        leaf = part.directories[-1]
        assert part.level_count == 4
        assert [directory.level for directory in part.directories] == [0, 1, 2, 3]
        assert (leaf.start, leaf.end, leaf.valid_count) == (BASE, BASE + (1 << 21), 4)
    empty = inspection_pb2.GetPageTableRequest(mirror_id=mirror, range=range_pb2.AddressRange(start=0, end=PAGE))
    (part,) = [part async for part in served.inspection.GetPageTable(empty)]
    assert not part.directories
    with pytest.raises(grpc.aio.AioRpcError):
        await anext(aiter(served.inspection.GetPageTable(inspection_pb2.GetPageTableRequest())))


async def test_walk_shows_every_level_of_every_table(mirrored: Any) -> None:
    """`walk`: the CPU's table and each mirror's name the same frame; an unmapped address ends early."""
    served, driver, pid, mirror = mirrored
    await driver.make(
        "set_driver_bits",
        device_pb2.SetDriverBitsRequest(mirror_id=mirror, range=range_pb2.AddressRange(start=BASE, end=END), bits=3),
    )
    walked = await served.inspection.WalkAddress(inspection_pb2.WalkAddressRequest(process_id=pid, address=BASE + 5))
    cpu, device = walked.walks
    assert (walked.mapping.start, walked.mapping.permissions) == (BASE, "rw-p")
    assert [step.level for step in cpu.steps] == [0, 1, 2, 3]
    assert cpu.pfn == device.pfn > 0
    assert {"present", "write"} <= set(cpu.flags.split())
    assert (device.mirror_id, device.flags) == (mirror, "valid-pfn write driver=0x3")
    nowhere = await served.inspection.WalkAddress(inspection_pb2.WalkAddressRequest(process_id=pid, address=PAGE))
    assert not nowhere.HasField("mapping")
    assert [len(walk.steps) for walk in nowhere.walks] == [1, 1]
    assert nowhere.walks[0].flags == ""
    with pytest.raises(grpc.aio.AioRpcError):
        await served.inspection.WalkAddress(inspection_pb2.WalkAddressRequest(process_id=pid, address=1 << 47))


async def test_pending_shows_an_address_space_that_a_bug_has_broken(
    mirrored: Any, decode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a bug left half changed is never used quietly: its calls are INTERNAL, `pending` says why, others go on."""
    served, driver, pid, _ = mirrored

    def zap(*_: object, **__: object) -> None:
        raise ZeroDivisionError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(AddressSpace, "zap", zap)
        discard = process_pb2.MadviseRequest(process_id=pid, address=BASE, length=PAGE, advice=Advice.DONTNEED)
        discarding = asyncio.ensure_future(served.process.Madvise(discard))
        await driver.acknowledge(await driver.events.get())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await discarding
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    (broken,) = (await served.pending()).broken_spaces
    assert list(broken.process_ids) == [pid]
    assert "planted" in broken.because
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.mmap(pid, END, END + PAGE)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    (process,) = (await served.inspection.ListProcesses(inspection_pb2.ListProcessesRequest())).processes
    assert process.broken == broken.because
    other = await served.new_process("not concerned")
    await served.mmap(other, BASE, END)


async def test_watch_tells_events_answers_operations_and_losses(mirrored: Any) -> None:
    """`watch`: what was sent, how it was answered, which calls ended, who was lost."""
    served, driver, pid, mirror = mirrored
    watching = served.inspection.Watch(inspection_pb2.WatchRequest(process_ids=[pid], operations=True))
    await watching.read()
    unmapping = asyncio.ensure_future(served.munmap(pid, BASE, BASE + PAGE))
    await driver.acknowledge(await driver.events.get())
    await unmapping
    seen: list[Any] = []
    await _collect(watching, seen, lambda: any(one.HasField("operation") for one in seen))
    assert [one.WhichOneof("what") for one in seen] == ["event", "settled", "operation"]
    assert (seen[0].event.cause, seen[1].settled.state) == ("munmap", types_pb2.EVENT_STATE_ACKNOWLEDGED)
    assert (seen[2].operation.name, seen[2].operation.done) == ("munmap", True)
    driver.call.cancel()
    await _collect(watching, seen, lambda: seen[-1].HasField("mirror_lost"))
    assert seen[-1].mirror_lost.mirror_id == mirror


async def test_watch_tells_how_events_ended(serve: Any) -> None:
    """An event that may not block can be refused; one that was abandoned ends once, whenever its answer comes."""
    served = await serve()
    pid = await served.new_process()
    await served.mmap(pid, BASE, END)
    driver = await served.driver()
    mirror = await driver.mirror(pid, policy=types_pb2.DEADLINE_POLICY_FAIL)
    await driver.fault(mirror, BASE, END)
    watching = served.inspection.Watch(inspection_pb2.WatchRequest())
    await watching.read()
    unmapping = asyncio.ensure_future(served.munmap(pid, BASE, END))
    late = await driver.events.get()
    await served.let_deadlines_pass()
    assert (await unmapping).result.errno == errnos.ETIMEDOUT
    await driver.acknowledge(late)
    release = process_pb2.ProcessMreleaseRequest(process_id=pid)
    releasing = asyncio.ensure_future(served.process.ProcessMrelease(release))
    refused = await driver.events.get()
    answer = event_pb2.Answer(mirror_id=mirror, event_sequence=refused.event_sequences[0], errno=errnos.EAGAIN)
    await driver.answer(answers=[answer])
    assert (await releasing).result.errno == errnos.EAGAIN
    seen: list[tuple[int, int]] = []
    while len(seen) < 2:
        told = (await watching.read()).observations
        seen += [(one.settled.event_sequence, one.settled.state) for one in told if one.HasField("settled")]
    assert seen == [(1, types_pb2.EVENT_STATE_ABANDONED), (2, types_pb2.EVENT_STATE_REFUSED)]


async def test_watch_leaves_out_other_mirrors_and_owners(served: Any) -> None:
    """A watcher hears of what it asked for and may see."""
    pid = await served.new_process(metadata=MINE)
    request = process_pb2.MmapRequest(process_id=pid, address=BASE, length=PAGE, prot=3, flags=0x32)
    await served.process.Mmap(request, metadata=MINE)
    driver = await served.driver(token="mine")
    mirror = await driver.mirror(pid)
    foreign = served.inspection.Watch(inspection_pb2.WatchRequest(operations=True))
    other = served.inspection.Watch(inspection_pb2.WatchRequest(mirror_ids=[mirror + 1]), metadata=MINE)
    mine = served.inspection.Watch(inspection_pb2.WatchRequest(mirror_ids=[mirror]), metadata=MINE)
    for watching in (foreign, other, mine):
        await watching.read()
    unmapping = asyncio.ensure_future(served.munmap(pid, BASE, BASE + PAGE, metadata=MINE))
    await driver.acknowledge(await driver.events.get())
    await unmapping
    seen: list[Any] = []
    await _collect(mine, seen, lambda: any(one.HasField("settled") for one in seen))
    await served.new_process("visible")
    assert (await foreign.read()).observations[0].operation.name == "create_process"
    other.cancel()


async def test_watch_is_exhausted_when_there_are_too_many(serve: Any, decode: Any) -> None:
    """The number of watchers is limited."""
    served = await serve(watchers=1)
    first = served.inspection.Watch(inspection_pb2.WatchRequest())
    await first.read()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.inspection.Watch(inspection_pb2.WatchRequest()).read()
    assert decode(caught).reason == "LIMIT"


async def test_slow_watcher_loses_observations_and_slows_nobody(serve: Any) -> None:
    """A buffer that is full drops and counts; the calls that were not told of ended all the same."""
    served = await serve(watch_entries=2)
    with served.daemon.observers.watch(lambda _: True) as watcher:
        for _ in range(5):
            await served.new_process()
        message = await watcher.take()
    assert (len(message.observations), message.dropped) == (2, 3)


def test_watcher_gets_less_at_a_time_when_observations_are_large() -> None:
    """What is told at a time fits into a message, and what waits is bounded in bytes as well; the rest is counted."""
    limit = Config().watch_bytes
    watcher = Watcher(1000, limit, lambda _: True)
    ranges = range_pb2.AddressRanges(starts=range(20_000), ends=range(20_000))
    observation = inspection_pb2.Observation(event=event_pb2.Event(ranges=ranges))
    data = observation.SerializeToString()
    for _ in range(200):
        watcher.put(data)
    kept = limit // len(data)
    assert watcher.dropped == 200 - kept
    told = []
    while sum(told) < kept:
        message = watcher.take_now()
        assert message.observations[0] == observation
        told.append(len(message.observations))
    assert max(told) == BATCH_BYTES // len(data)


def test_watcher_is_told_what_it_lost_where_it_lost_it() -> None:
    """What was kept comes first; what comes when there is room again comes behind the loss."""
    watcher = Watcher(BATCH_OBSERVATIONS + 1, 1 << 20, lambda _: True)
    data = inspection_pb2.Observation(time_ns=1).SerializeToString()

    def told() -> tuple[int, int]:
        message = watcher.take_now()
        return len(message.observations), message.dropped

    for _ in range(BATCH_OBSERVATIONS + 8):
        watcher.put(data)
    assert told() == (BATCH_OBSERVATIONS, 0)
    watcher.put(data)
    assert [told(), told()] == [(1, 7), (1, 7)]


async def test_statistics_count_events_faults_and_latencies(mirrored: Any) -> None:
    """`stats`: counters of the daemon and of each mirror."""
    served, driver, pid, mirror = mirrored
    unmapping = asyncio.ensure_future(served.munmap(pid, BASE, BASE + 2 * PAGE))
    await driver.acknowledge(await driver.events.get())
    await unmapping
    await served.munmap(pid, BASE + 1, BASE + 1 + PAGE)
    statistics = await served.statistics()
    (of_mirror,) = statistics.mirrors
    assert (of_mirror.mirror_id, of_mirror.faults, of_mirror.fault_pages) == (mirror, 1, 4)
    assert dict(of_mirror.events_by_type) == {"MUNMAP": 1}
    assert dict(of_mirror.events_by_reason) == {"UNMAP": 1}
    assert (of_mirror.ranges, of_mirror.pages, of_mirror.acknowledged) == (1, 2, 1)
    assert of_mirror.bytes > 0
    latencies = of_mirror.acknowledgement
    assert latencies.count == 1
    assert 0 < latencies.p50_us <= latencies.max_us == latencies.sum_us
    daemon = statistics.daemon
    assert (daemon.processes, daemon.devices, daemon.mirrors, daemon.streams) == (1, 1, 1, 1)
    assert daemon.operations["munmap"] == 2
    assert daemon.errors["INVALID_ARGUMENT"] == 1
    assert daemon.frames_used == 2
    assert daemon.resident_bytes > 1 << 20


async def test_get_operation_tells_errors_as_the_caller_saw_them(served: Any) -> None:
    """What a call ended with can be asked for later, errno and reason included."""
    pid = await served.new_process()
    failed = (await served.munmap(pid, BASE + 1, BASE + 1 + PAGE)).result
    request = inspection_pb2.GetOperationRequest(operation_id=failed.operation_id)
    status = (await served.inspection.GetOperation(request)).operation
    assert status.result == failed


async def _collect(watching: Any, seen: list[Any], enough: Any) -> None:
    while not seen or not enough():
        seen += (await watching.read()).observations


async def listed(call: Any, request: Any) -> list[list[Any]]:
    """All pages of a list of mappings."""
    pages = []
    while True:
        answer = await call(request)
        pages.append(list(answer.mappings))
        if not answer.next_page_token:
            return pages
        request.page_token = answer.next_page_token


@pytest.mark.parametrize(("size", "lengths"), [(0, [3, 3, 2]), (2, [2, 2, 2, 2]), (9, [3, 3, 2])])
async def test_mappings_come_in_parts_when_there_are_many(serve: Any, size: int, lengths: list[int]) -> None:
    """Of `maps` and of what they cost: as many as asked for, and no more than the daemon's own bound; each once."""
    served = await serve(list_entries=3)
    pid = await served.new_process()
    starts = [BASE + number * PAGE for number in range(8)]
    for number, start in enumerate(starts):
        await served.mmap(pid, start, start + PAGE, 1 + 2 * (number % 2))
    maps = await listed(served.inspection.GetMaps, inspection_pb2.GetMapsRequest(process_id=pid, page_size=size))
    assert [len(page) for page in maps] == lengths
    assert [one.start for page in maps for one in page] == starts
    request = inspection_pb2.GetMemoryUseRequest(process_id=pid, page_size=size)
    uses = await listed(served.inspection.GetMemoryUse, request)
    assert [[one.mapping.start for one in page] for page in uses] == [[one.start for one in page] for page in maps]


async def test_mappings_fit_into_a_message_when_their_names_are_long(serve: Any) -> None:
    """A part ends where the daemon's parts end, but has one mapping at least."""
    served = await serve(part_bytes=4096)
    pid = await served.new_process()
    opened = await served.file.OpenFile(file_pb2.OpenFileRequest(name="n" * 1000, create=True))
    for number in range(8):
        mapping = process_pb2.MmapRequest(
            process_id=pid, address=BASE + number * PAGE, length=PAGE, prot=1 + 2 * (number % 2), flags=0x11,
            file_id=opened.file_id,
        )  # fmt: skip
        await served.process.Mmap(mapping)
    maps = await listed(served.inspection.GetMaps, inspection_pb2.GetMapsRequest(process_id=pid))
    assert [len(page) for page in maps] == [3, 3, 2]


async def test_listing_goes_on_where_it_was_when_mappings_change_meanwhile(serve: Any) -> None:
    """m_start(): behind the last address; what reaches over it is told whole, and what is gone is not told."""
    served = await serve(list_entries=1)
    pid = await served.new_process()
    for number in range(4):
        await served.mmap(pid, BASE + number * PAGE, BASE + (number + 1) * PAGE, 1 + 2 * (number % 2))
    request = inspection_pb2.GetMapsRequest(process_id=pid)
    first = await served.inspection.GetMaps(request)
    await served.mmap(pid, BASE, BASE + 2 * PAGE)  # one now, over the place that the listing has reached
    await served.process.Munmap(process_pb2.MunmapRequest(process_id=pid, address=BASE + 2 * PAGE, length=PAGE))
    request.page_token = first.next_page_token
    rest = await listed(served.inspection.GetMaps, request)
    assert [(one.start, one.end) for page in rest for one in page] == [
        (BASE, BASE + 2 * PAGE), (BASE + 3 * PAGE, BASE + 4 * PAGE),
    ]  # fmt: skip
