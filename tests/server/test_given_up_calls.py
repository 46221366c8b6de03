"""Callers that give up, at every kind of call: nothing is left half done, and nothing is left (protocol rule 12)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from hmm_proto.v1 import (
    device_pb2,
    event_pb2,
    harness_pb2,
    harness_pb2_grpc,
    hmm_pb2,
    inspection_pb2,
    process_pb2,
    range_pb2,
    types_pb2,
    userfaultfd_pb2,
)

PAGE, DONTNEED = 4096, 4
BASE = 0x10000000000
END = BASE + 64 * PAGE
SPAN = range_pb2.AddressRange(start=BASE, end=END)
Give = Callable[["Stage"], Awaitable[Any]]


class Stage:
    """A process of 64 pages, and a driver with a mirror of either interface that answers when it is told to."""

    def __init__(self, served: Any) -> None:
        self.served = served
        self.handler: Any = None
        self.kept: Any = None

    async def set(self, policy: int = types_pb2.DEADLINE_POLICY_BLOCK) -> Stage:
        """Put everything in place."""
        served = self.served
        self.pid = await served.new_process()
        await served.mmap(self.pid, BASE, END)
        touching = process_pb2.TouchRequest(process_id=self.pid, address=BASE, length=END - BASE, write=True)
        await served.process.Touch(touching)
        self.driver = await served.driver()
        registering = device_pb2.RegisterDeviceRequest(name="gpu", memory_pages=64, driver_copies=True)
        device = (await self.driver.make("register_device", registering)).device_id
        mirroring = device_pb2.RegisterMirrorRequest(
            device_id=device, process_id=self.pid, no_fault_events=True, policy=policy
        )
        self.mirror = (await self.driver.make("register_mirror", mirroring)).mirror_id
        await self.driver.fault(self.mirror, BASE, END)
        today = (await self.driver.make("register_device", device_pb2.RegisterDeviceRequest(name="today"))).device_id
        attaching = hmm_pb2.AttachRequest(device_id=today, process_id=self.pid, policy=policy)
        self.interval = (await self.driver.make("attach", attaching)).mirror_id
        inserting = hmm_pb2.InsertNotifierRequest(mirror_id=self.interval, start=BASE, length=END - BASE)
        self.notifier = (await self.driver.make("insert_notifier", inserting)).notifier_id
        return self

    async def zapping(self) -> Any:
        """A call that takes all pages, and waits for the driver."""
        request = process_pb2.MadviseRequest(process_id=self.pid, address=BASE, length=END - BASE, advice=DONTNEED)
        return await self.under_way(self.served.process.Madvise(request))

    async def under_way(self, call: Any, number: int = 1) -> Any:
        """A call that has begun, when so many have."""
        await self.served.until(lambda: len(self.served.daemon.executor.running) == number)
        return call

    async def answer_everything(self) -> None:
        """Be a driver that answers, until it is cancelled."""
        while True:
            event = await self.driver.events.get()
            if event.wants_answer:
                npages = sum(event.ranges.ends) - sum(event.ranges.starts) >> 12
                copied = event_pb2.Answer(
                    mirror_id=event.mirror_ids[0], event_sequence=event.event_sequences[0], results=bytes(npages)
                )
                await self.driver.answer(answers=[copied])
            await self.driver.acknowledge(event)


async def madvise(stage: Stage) -> Any:
    """A call of a process, while a driver handles its event."""
    return await stage.zapping()


async def batch(stage: Stage) -> Any:
    """A batch, in its first call."""
    unmap = process_pb2.MunmapRequest(process_id=stage.pid, address=BASE, length=PAGE)
    batch_of_two = process_pb2.ExecuteRequest(calls=[process_pb2.Call(munmap=unmap)] * 2)
    return await stage.under_way(stage.served.process.Execute(batch_of_two))


async def fault(stage: Stage) -> Any:
    """A device fault, behind a call that waits for a driver."""
    await stage.zapping()
    ranges = range_pb2.AddressRanges(starts=[BASE], ends=[END])
    request = device_pb2.FaultRequest(mirror_id=stage.mirror, ranges=ranges, write=True, deadline_ms=60_000)
    return await stage.under_way(stage.served.device.Fault(request), 2)


async def migrate(stage: Stage) -> Any:
    """A migration, while its driver copies."""
    request = device_pb2.MigrateRequest(mirror_id=stage.mirror, range=SPAN)
    return await stage.under_way(stage.served.device.Migrate(request))


async def unregister(stage: Stage) -> Any:
    """A mirror that leaves, while its driver is told to stop."""
    request = device_pb2.UnregisterMirrorRequest(mirror_id=stage.mirror)
    return await stage.under_way(stage.served.device.UnregisterMirror(request))


async def detach(stage: Stage) -> Any:
    """A driver of today that leaves, while a callback runs."""
    await stage.zapping()
    return await stage.under_way(stage.served.hmm.Detach(hmm_pb2.DetachRequest(mirror_id=stage.interval)), 2)


async def read_begin(stage: Stage) -> Any:
    """A read section, while its range is invalidated."""
    await stage.zapping()
    reading = hmm_pb2.ReadBeginRequest(mirror_id=stage.interval, notifier_id=stage.notifier)
    return await stage.under_way(stage.served.hmm.ReadBegin(reading), 2)


async def range_fault(stage: Stage) -> Any:
    """A range fault in one call, while its range is invalidated."""
    await stage.zapping()
    request = hmm_pb2.RangeFaultRequest(
        mirror_id=stage.interval, notifier_id=stage.notifier, range=SPAN, deadline_ms=60_000
    )
    return await stage.under_way(stage.served.hmm.RangeFault(request), 2)


async def missing_page(stage: Stage) -> Any:
    """An access that waits for the handler of a userfaultfd."""
    pid = await stage.served.new_process()
    await stage.served.mmap(pid, BASE, END)
    opening = userfaultfd_pb2.OpenUserfaultfdRequest(process_id=pid)
    stage.handler = stage.served.userfaultfd.OpenUserfaultfd(opening)
    number = (await stage.handler.read()).userfaultfd_id
    await stage.served.userfaultfd.UffdRegister(
        userfaultfd_pb2.UffdRegisterRequest(userfaultfd_id=number, range=SPAN, mode=1)
    )
    touching = process_pb2.TouchRequest(process_id=pid, address=BASE, length=PAGE)
    return await stage.under_way(stage.served.process.Touch(touching))


async def handler(stage: Stage) -> Any:
    """The handler of a userfaultfd, while an access waits for it."""
    stage.kept = await missing_page(stage)
    return stage.handler


async def stream_memory(stage: Stage) -> Any:
    """Memory that is read in parts."""
    call = stage.served.process.StreamMemory(
        process_pb2.StreamMemoryRequest(process_id=stage.pid, address=BASE, length=END - BASE)
    )
    await call.read()
    return call


async def fill_memory(stage: Stage) -> Any:
    """Memory that is written in parts."""
    call = stage.served.process.FillMemory()
    await call.write(process_pb2.FillMemoryRequest(process_id=stage.pid, address=BASE, data=b"x"))
    return call


async def read_table(stage: Stage) -> Any:
    """A table that is read in parts."""
    call = stage.served.device.ReadTable(device_pb2.ReadTableRequest(mirror_id=stage.mirror, range=SPAN))
    await call.read()
    return call


async def watch(stage: Stage) -> Any:
    """Somebody who looks on."""
    call = stage.served.inspection.Watch(inspection_pb2.WatchRequest(operations=True))
    await call.read()
    return call


async def watch_events(stage: Stage) -> Any:
    """The simpler stream of events."""
    call = stage.served.device.WatchEvents(device_pb2.WatchEventsRequest(name="simple"))
    await call.read()
    return call


async def hold(stage: Stage) -> Any:
    """A hold, with a call in it."""
    harness: Any = harness_pb2_grpc.HarnessServiceStub(stage.served.channel)
    call = harness.Hold(harness_pb2.HoldRequest(point=harness_pb2.HOLD_POINT_BEFORE_END, operation="brk"))
    await call.read()
    stage.kept = stage.served.process.Brk(process_pb2.BrkRequest(process_id=stage.pid))
    await call.read()
    return call


async def session(stage: Stage) -> Any:
    """A driver, while it handles an event and a fault of its own waits behind that."""
    await stage.zapping()
    ranges = range_pb2.AddressRanges(starts=[BASE], ends=[END])
    await stage.driver.send("fault", device_pb2.FaultRequest(mirror_id=stage.mirror, ranges=ranges, deadline_ms=60_000))
    return await stage.under_way(stage.driver.call, 2)


KINDS: tuple[Give, ...] = (
    madvise, batch, fault, migrate, unregister, detach, read_begin, range_fault, missing_page, handler, stream_memory,
    fill_memory, read_table, watch, watch_events, hold, session,
)  # fmt: skip


@pytest.mark.parametrize("give", KINDS, ids=lambda give: give.__name__)
async def test_nothing_is_left_when_the_caller_gives_up(serve: Any, give: Give) -> None:
    """What the call began goes on to its end; then no call, no task and no stream of it is left."""
    served = await serve(harness=True, part_bytes=4096)
    daemon = served.daemon
    stage = await Stage(served).set()
    call = await give(stage)
    await asyncio.sleep(0)
    call.cancel()
    answering = asyncio.create_task(stage.answer_everything())
    async with asyncio.timeout(60):
        await served.until(lambda: not daemon.executor.running)
        assert not (await served.pending()).operations
        stage.driver.call.cancel()
        if stage.handler is not None:
            stage.handler.cancel()
        await daemon.guard.quiet()
    answering.cancel()
    assert not daemon.machine.operations
    assert not daemon.streams.open
    assert not daemon.executor.userfaultfds
    assert not daemon.executor.holds.placed
    assert not daemon.observers.watchers
    assert not [task for task in asyncio.all_tasks() if "hmm_server" in _file_of(task)]
    daemon.machine.check()


def _file_of(task: asyncio.Task[Any]) -> str:
    code = getattr(task.get_coro(), "cr_code", None)
    return code.co_filename if code else ""
