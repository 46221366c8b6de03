"""HarnessService: calls that are held at a point stay there, others go on, and a hold ends with its owner."""

from __future__ import annotations

import asyncio
import errno as errnos
from typing import Any

import grpc
import pytest

from hmm_proto.v1 import (
    device_pb2,
    harness_pb2,
    harness_pb2_grpc,
    hmm_pb2,
    process_pb2,
    range_pb2,
    types_pb2,
    userfaultfd_pb2,
)

PAGE = 4096
BASE = 0x10000000000
END = BASE + 16 * PAGE
HALF = BASE + 8 * PAGE
MINE = (("hmm-token", "mine"),)


class Scene:
    """A daemon with holds, a process, a driver that has faulted all of its memory in, and one hold at a time."""

    def __init__(self, served: Any) -> None:
        self.served = served
        self.harness: Any = harness_pb2_grpc.HarnessServiceStub(served.channel)
        self.pid = self.mirror = 0
        self.driver: Any = None

    async def set_up(self, **fields: Any) -> Scene:
        """Map, mirror and fault."""
        self.pid = await self.served.new_process()
        await self.served.mmap(self.pid, BASE, END)
        self.driver = await self.served.driver()
        self.mirror = await self.driver.mirror(self.pid, **fields)
        await self.driver.fault(self.mirror, BASE, END)
        return self

    async def hold(self, point: int, operation: str = "munmap", **fields: Any) -> tuple[Any, int]:
        """Place a hold.  Returns: its stream, and its id."""
        stream = self.harness.Hold(harness_pb2.HoldRequest(point=point, operation=operation, **fields))
        placed = await stream.read()
        return stream, placed.hold_id

    async def release(self, hold_id: int) -> None:
        """Let the call go on."""
        await self.harness.ReleaseHold(harness_pb2.ReleaseHoldRequest(hold_id=hold_id))

    def munmap(self) -> asyncio.Future[Any]:
        """Unmap the first half, meanwhile."""
        return asyncio.ensure_future(self.served.munmap(self.pid, BASE, HALF))

    def discard(self, start: int = BASE, end: int = HALF) -> asyncio.Future[Any]:
        """madvise(MADV_DONTNEED), meanwhile: the mapping stays."""
        request = process_pb2.MadviseRequest(process_id=self.pid, address=start, length=end - start, advice=4)
        return asyncio.ensure_future(self.served.process.Madvise(request))

    async def entry_count(self) -> int:
        """Entries of the mirror."""
        return (await self.served.mirror_status(self.mirror)).entry_count


@pytest.fixture
async def scene(serve: Any) -> Scene:
    """A scene with all of that, whose leases are long."""
    return await Scene(await serve(harness=True, lease_s=600.0)).set_up()


async def test_hold_keeps_the_event_back_when_before_event(scene: Scene) -> None:
    """The range is busy, a fault that does not wait gets EBUSY, and no driver has heard."""
    stream, hold_id = await scene.hold(harness_pb2.HOLD_POINT_BEFORE_EVENT, "munmap|madvise")
    discarding = scene.discard()
    assert (await stream.read()).operation == "madvise"
    busy = await scene.driver.fault(scene.mirror, BASE, HALF, no_wait=True)
    assert busy.result.errno == errnos.EBUSY
    assert scene.driver.events.empty()
    await scene.release(hold_id)
    await scene.driver.acknowledge(await scene.driver.events.get())
    assert (await discarding).result.errno == 0


async def test_hold_keeps_the_events_of_a_mirror_in_order_when_before_event(serve: Any) -> None:
    """What another call tells the same mirror waits behind the event that is held, and comes after it."""
    scene = Scene(await serve(harness=True))
    scene.pid = await scene.served.new_process()
    await scene.served.mmap(scene.pid, BASE, END)
    scene.driver = await scene.served.driver()
    scene.mirror = await scene.driver.mirror(scene.pid, no_fault_events=False)
    stream, hold_id = await scene.hold(harness_pb2.HOLD_POINT_BEFORE_EVENT, "madvise")
    discarding = scene.discard()
    await stream.read()
    faulting = asyncio.ensure_future(scene.driver.fault(scene.mirror, HALF, END))
    await scene.served.until(lambda: len(scene.served.daemon.executor.running) == 2)
    assert scene.driver.events.empty()
    await scene.release(hold_id)
    events = [await scene.driver.events.get(), await scene.driver.events.get()]
    assert [list(event.event_sequences) for event in events] == [[1], [2]]
    for event in events:
        await scene.driver.acknowledge(event)
    await asyncio.gather(discarding, faulting)


async def test_hold_stays_when_all_have_answered_and_it_is_at_event_sent(scene: Scene) -> None:
    """Answers are taken, and the call still waits."""
    stream, hold_id = await scene.hold(harness_pb2.HOLD_POINT_EVENT_SENT, process_id=scene.pid)
    unmapping = scene.munmap()
    assert (await stream.read()).operation_id
    await scene.driver.acknowledge(await scene.driver.events.get())
    await scene.served.until_answered(scene.mirror)
    assert not unmapping.done()
    await scene.release(hold_id)
    assert (await unmapping).result.errno == 0
    assert (await stream.read()).ended == "released"


async def test_hold_is_reached_by_one_mirror_when_acknowledged(scene: Scene) -> None:
    """One mirror has answered, the other has not, whose entries are all there."""
    other = await scene.driver.mirror(scene.pid, "gpu1")
    stream, hold_id = await scene.hold(harness_pb2.HOLD_POINT_ACKNOWLEDGED, mirror_id=other)
    unmapping = scene.munmap()
    await scene.driver.events.get()
    await scene.driver.answer(mirror_ids=[scene.mirror], acknowledged_up_to=[1])
    await scene.served.until_answered(scene.mirror)
    assert not scene.served.daemon.executor.holds.placed[hold_id].operation_id
    await scene.driver.answer(mirror_ids=[other], acknowledged_up_to=[1])
    assert (await stream.read()).operation == "munmap"
    assert await scene.entry_count() == 16
    await scene.release(hold_id)
    await unmapping


async def test_hold_shows_old_entries_when_before_the_edit(scene: Scene) -> None:
    """All have answered and nothing has changed yet: the mirror's entries and the mapping are there."""
    stream, hold_id = await scene.hold(harness_pb2.HOLD_POINT_BEFORE_EDIT)
    unmapping = scene.munmap()
    await scene.driver.acknowledge(await scene.driver.events.get())
    await stream.read()
    assert await scene.entry_count() == 16
    await scene.release(hold_id)
    await unmapping
    assert await scene.entry_count() == 8


async def test_hold_keeps_a_fault_when_it_has_waited(scene: Scene) -> None:
    """A fault that waited for an invalidation is held before it looks again; what it finds is what is there then."""
    first, edit = await scene.hold(harness_pb2.HOLD_POINT_BEFORE_EDIT, "madvise")
    discarding = scene.discard()
    await scene.driver.acknowledge(await scene.driver.events.get())
    await first.read()
    second, waited = await scene.hold(harness_pb2.HOLD_POINT_AFTER_WAIT, "fault")
    faulting = asyncio.ensure_future(scene.driver.fault(scene.mirror, BASE, HALF))
    await scene.served.until(lambda: len(scene.served.daemon.executor.running) == 2)
    await scene.release(edit)
    await discarding
    assert (await second.read()).operation == "fault"
    unmapping = scene.munmap()
    await scene.driver.acknowledge(await scene.driver.events.get())
    await unmapping
    await scene.release(waited)
    assert (await faulting).result.errno == errnos.EFAULT


async def test_hold_keeps_the_result_when_before_the_end(scene: Scene) -> None:
    """Everything is done, also for calls that never wait, and the caller does not know; pending says who keeps it."""
    stream, hold_id = await scene.hold(harness_pb2.HOLD_POINT_BEFORE_END, process_id=scene.pid)
    unmapping = scene.munmap()
    await scene.driver.acknowledge(await scene.driver.events.get())
    await stream.read()
    assert await scene.entry_count() == 8
    (operation,) = (await scene.served.pending()).operations
    assert (operation.held.hold_id, operation.held.point) == (hold_id, "before the end")
    assert not unmapping.done()
    await scene.release(hold_id)
    assert (await unmapping).result.errno == 0

    stream, hold_id = await scene.hold(harness_pb2.HOLD_POINT_BEFORE_END)
    unmapping = asyncio.ensure_future(scene.served.munmap(scene.pid, END, END + PAGE))
    await stream.read()
    assert not unmapping.done()
    await scene.release(hold_id)
    await unmapping


@pytest.mark.parametrize("name", ["register_device", "register_mirror"])
async def test_object_goes_when_its_stream_has_ended_before_the_end(serve: Any, name: str) -> None:
    """What a held call has registered has the lease of its stream, though nobody was told of it."""
    scene = await Scene(await serve(harness=True, lease_s=0.0)).set_up()
    machine = scene.served.daemon.machine
    device = (await scene.served.device.RegisterDevice(device_pb2.RegisterDeviceRequest(name="another"))).device_id
    requests: dict[str, Any] = {
        "register_device": device_pb2.RegisterDeviceRequest(name="late"),
        "register_mirror": device_pb2.RegisterMirrorRequest(device_id=device, process_id=scene.pid),
    }
    other = await scene.served.driver()
    stream, hold_id = await scene.hold(harness_pb2.HOLD_POINT_BEFORE_END, name, lease_ms=600_000)
    await other.send(name, requests[name])
    assert (await stream.read()).operation == name
    there = machine.devices if name == "register_device" else machine.receivers
    late = max(there)
    other.call.cancel()
    await scene.served.until(lambda: len(scene.served.daemon.streams.open) == 1)
    assert late in there
    await scene.release(hold_id)
    await scene.served.until(lambda: late not in there)


async def test_userfaultfd_goes_when_its_stream_has_ended_before_the_end(scene: Scene) -> None:
    """Nobody else could close what a held call has opened, and its handler is gone."""
    machine = scene.served.daemon.machine
    stream, hold_id = await scene.hold(harness_pb2.HOLD_POINT_BEFORE_END, "create_userfaultfd")
    opening = scene.served.userfaultfd.OpenUserfaultfd(userfaultfd_pb2.OpenUserfaultfdRequest(process_id=scene.pid))
    await stream.read()
    (number,) = machine.userfaultfds
    opening.cancel()
    await scene.served.until(lambda: any(running.given_up for running in scene.served.daemon.executor.running.values()))
    await scene.release(hold_id)
    await scene.served.until(lambda: number not in machine.userfaultfds)


async def test_calls_pass_when_the_hold_is_for_others(scene: Scene) -> None:
    """Another process, another call, another caller, and as many as `skip` says."""
    other = await scene.served.new_process()
    await scene.served.mmap(other, BASE, END)
    stream, hold_id = await scene.hold(harness_pb2.HOLD_POINT_BEFORE_END, process_id=other, caller="somebody", skip=1)
    somebody = (("hmm-caller", "somebody"),)
    unmapping = scene.munmap()
    await scene.driver.acknowledge(await scene.driver.events.get())
    await unmapping
    await scene.served.munmap(other, BASE, BASE + PAGE)
    await scene.served.munmap(other, BASE, BASE + PAGE, metadata=somebody)
    await scene.served.mmap(other, BASE, BASE + PAGE)
    held = asyncio.ensure_future(scene.served.munmap(other, BASE, BASE + PAGE, metadata=somebody))
    await stream.read()
    await scene.release(hold_id)
    await held


async def test_call_is_held_when_what_it_names_belongs_to_the_process(serve: Any) -> None:
    """Steps of a migration name that, and calls of a handler its userfaultfd; those of another process pass."""
    served = await serve(harness=True, lease_s=600.0)
    scene, driver = Scene(served), await served.driver()
    card = device_pb2.RegisterDeviceRequest(name="card", memory_pages=8)
    device = (await driver.make("register_device", card)).device_id
    pids, migrations, userfaultfds = [], [], []
    whole = range_pb2.AddressRange(start=BASE, end=END)
    for _ in range(2):
        pids.append(await served.new_process())
        await served.mmap(pids[-1], BASE, END)
        attach = hmm_pb2.AttachRequest(device_id=device, process_id=pids[-1])
        setup = hmm_pb2.MigrateVmaSetupRequest(range=whole, select=1)
        setup.mirror_id = (await driver.make("attach", attach)).mirror_id
        migrations.append((await driver.make("migrate_vma_setup", setup)).migration_id)
        stream = served.userfaultfd.OpenUserfaultfd(userfaultfd_pb2.OpenUserfaultfdRequest(process_id=pids[-1]))
        userfaultfds.append(((await stream.read()).userfaultfd_id, stream))
    end = harness_pb2.HOLD_POINT_BEFORE_END
    stream, hold_id = await scene.hold(end, "migrate_vma_finalize", process_id=pids[1])
    await driver.make("migrate_vma_finalize", hmm_pb2.MigrateVmaFinalizeRequest(migration_id=migrations[0]))
    finalizing = await driver.send(
        "migrate_vma_finalize", hmm_pb2.MigrateVmaFinalizeRequest(migration_id=migrations[1])
    )
    await stream.read()
    await scene.release(hold_id)
    await finalizing
    stream, hold_id = await scene.hold(end, "uffd_register", process_id=pids[1])
    register = served.userfaultfd.UffdRegister
    await register(userfaultfd_pb2.UffdRegisterRequest(userfaultfd_id=userfaultfds[0][0], range=whole, mode=1))
    registering = asyncio.ensure_future(
        register(userfaultfd_pb2.UffdRegisterRequest(userfaultfd_id=userfaultfds[1][0], range=whole, mode=1))
    )
    await stream.read()
    await scene.release(hold_id)
    assert not (await registering).result.errno


async def test_hold_ends_when_its_lease_does(scene: Scene) -> None:
    """Nothing is held by somebody who forgot it: the call goes on, and the owner is told why."""
    lease_ms, reached = 25, False
    while not reached:  # on a busy machine the lease may end before the call comes
        lease_ms *= 2
        stream, _ = await scene.hold(harness_pb2.HOLD_POINT_BEFORE_END, lease_ms=lease_ms)
        unmapping = asyncio.ensure_future(scene.served.munmap(scene.pid, END, END + PAGE))
        told = await stream.read()
        reached = told.operation == "munmap"
        assert (await unmapping).result.errno == 0
    assert not told.ended
    assert (await stream.read()).ended == "its lease has ended"


async def test_hold_ends_when_its_owner_is_gone(scene: Scene) -> None:
    """A stream that breaks takes its hold along."""
    stream, _ = await scene.hold(harness_pb2.HOLD_POINT_BEFORE_END)
    unmapping = asyncio.ensure_future(scene.served.munmap(scene.pid, END, END + PAGE))
    await stream.read()
    stream.cancel()
    assert (await unmapping).result.errno == 0
    assert not (await scene.served.pending()).holds


async def test_hold_ends_when_the_daemon_drains(scene: Scene) -> None:
    """An orderly shutdown waits for nobody's test."""
    stream, _ = await scene.hold(harness_pb2.HOLD_POINT_BEFORE_END)
    unmapping = asyncio.ensure_future(scene.served.munmap(scene.pid, END, END + PAGE))
    await stream.read()
    draining = asyncio.ensure_future(scene.served.daemon.executor.drain(1))
    assert (await unmapping).result.errno == 0
    assert (await stream.read()).ended == "the daemon is ending"
    await draining


async def test_mirror_is_fenced_when_its_deadline_passes_under_a_hold(serve: Any) -> None:
    """A hold does not stop the clock of drivers."""
    scene = await Scene(await serve(harness=True, acknowledgement_s=0.05)).set_up(
        policy=types_pb2.DEADLINE_POLICY_FENCE
    )
    stream, hold_id = await scene.hold(harness_pb2.HOLD_POINT_BEFORE_EDIT)
    unmapping = scene.munmap()
    await stream.read()
    assert (await scene.served.mirror_status(scene.mirror)).state == "lost"
    await scene.release(hold_id)
    assert list((await unmapping).result.fenced_mirrors) == [scene.mirror]


async def test_deadline_begins_anew_when_a_hold_lets_the_rest_of_an_event_go(serve: Any) -> None:
    """One mirror hears at once, one behind another event that is held: the clock that ran for the first has stopped."""
    served = await serve(harness=True)
    scene = Scene(served)
    scene.pid = await served.new_process()
    await served.mmap(scene.pid, BASE, END)
    driver = await served.driver()
    device = await driver.make("register_device", device_pb2.RegisterDeviceRequest(name="gpu"))
    mirrors = []
    for start in (BASE, HALF):
        attach = hmm_pb2.AttachRequest(device_id=device.device_id, process_id=scene.pid)
        mirrors.append((await driver.make("attach", attach)).mirror_id)
        insert = hmm_pb2.InsertNotifierRequest(mirror_id=mirrors[-1], start=start, length=END - start)
        await driver.make("insert_notifier", insert)
    stream, hold_id = await scene.hold(harness_pb2.HOLD_POINT_BEFORE_EVENT, "madvise")
    first = scene.discard(BASE, BASE + PAGE)
    await stream.read()
    page = range_pb2.AddressRange(start=HALF, end=HALF + PAGE)
    second = await driver.send("make_exclusive", hmm_pb2.MakeExclusiveRequest(mirror_id=mirrors[1], range=page))
    early = await driver.events.get()
    assert list(early.mirror_ids) == mirrors[1:]
    (running,) = [running for running in served.daemon.executor.running.values() if running.due_s]
    due_s = running.due_s
    await scene.release(hold_id)
    assert running.due_s > due_s
    await driver.acknowledge(early)
    for _ in range(2):
        await driver.acknowledge(await driver.events.get())
    assert ((await first).result.errno, (await second).make_exclusive.result.errno) == (0, 0)


async def test_answer_is_rejected_when_its_mirror_is_unregistered_under_a_hold(scene: Scene) -> None:
    """The mirror is gone before its driver is told; an answer for it does not end the session."""
    stream, hold_id = await scene.hold(harness_pb2.HOLD_POINT_BEFORE_END, "unregister_mirror")
    reply = await scene.driver.send("unregister_mirror", device_pb2.UnregisterMirrorRequest(mirror_id=scene.mirror))
    for _ in range(2):
        await scene.driver.acknowledge(await scene.driver.events.get())
    await stream.read()
    await scene.driver.answer(mirror_ids=[scene.mirror], acknowledged_up_to=[1])
    assert "is unregistered" in (await scene.driver.violations.get()).rule
    await scene.release(hold_id)
    assert (await reply).unregister_mirror.result.errno == 0


async def test_pending_names_a_hold_that_nobody_has_come_to(scene: Scene) -> None:
    """What waits for a call to come is shown, too."""
    await scene.hold(harness_pb2.HOLD_POINT_BEFORE_EDIT, process_id=scene.pid, lease_ms=600_000)
    (hold,) = (await scene.served.pending()).holds
    assert (hold.point, hold.awaits, hold.operation_id) == ("before the edit", f"munmap of process {scene.pid}", 0)
    assert 0 < hold.lease_ms <= 600_000


async def test_hold_is_refused_when_it_makes_no_sense(scene: Scene, decode: Any) -> None:
    """No point; a process, mirror, call or hold that there is not; a mirror where none counts; somebody else's."""
    end, sent = harness_pb2.HOLD_POINT_BEFORE_END, harness_pb2.HOLD_POINT_EVENT_SENT
    owner = await scene.served.driver(token="mine")
    theirs = await owner.mirror(await scene.served.new_process(metadata=MINE))
    for request, errno, message in (
        (harness_pb2.HoldRequest(), errnos.EINVAL, "a point is needed"),
        (harness_pb2.HoldRequest(point=end, process_id=99), errnos.ESRCH, "no process 99"),
        (harness_pb2.HoldRequest(point=sent, mirror_id=99), errnos.ENODEV, "no mirror 99"),
        (harness_pb2.HoldRequest(point=sent, mirror_id=theirs), errnos.EPERM, "belongs to another owner"),
        (harness_pb2.HoldRequest(point=end, mirror_id=scene.mirror), errnos.EINVAL, "'before the end' is the same"),
        (harness_pb2.HoldRequest(point=end, operation="munmap|exit"), errnos.EINVAL, "no call 'exit'; names are like"),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match=message) as caught:
            await scene.harness.Hold(request).read()
        assert decode(caught).errno == errno
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await scene.release(99)
    assert decode(caught).errno == errnos.ENOENT
    request = harness_pb2.HoldRequest(point=harness_pb2.HOLD_POINT_BEFORE_END)
    stream = scene.harness.Hold(request, metadata=MINE)
    placed = await stream.read()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await scene.release(placed.hold_id)
    assert decode(caught).reason == "NOT_OWNER"
    stream.cancel()


async def test_harness_is_refused_when_the_daemon_does_not_allow_it(served: Any, decode: Any) -> None:
    """A daemon that was not started for tests holds nothing and injects nothing."""
    harness: Any = harness_pb2_grpc.HarnessServiceStub(served.channel)
    kind = harness_pb2.FAILURE_KIND_PAGE_ALLOCATION
    for call in (
        harness.Hold(harness_pb2.HoldRequest(point=harness_pb2.HOLD_POINT_BEFORE_END)).read(),
        harness.ReleaseHold(harness_pb2.ReleaseHoldRequest(hold_id=1)),
        harness.InjectFailure(harness_pb2.InjectFailureRequest(kind=kind, nth=1)),
        harness.ScanKsm(harness_pb2.ScanKsmRequest()),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert decode(caught).reason == "HARNESS_OFF"


# ---- injected failures


async def test_nth_page_fails_once_when_an_allocation_failure_is_injected(scene: Scene) -> None:
    """The pages before it are there, as the kernel leaves them; the same access again succeeds."""
    await scene.served.mmap(scene.pid, END, END + 8 * PAGE)
    request = harness_pb2.InjectFailureRequest(kind=harness_pb2.FAILURE_KIND_PAGE_ALLOCATION, nth=4)
    await scene.harness.InjectFailure(request)
    touch = process_pb2.TouchRequest(process_id=scene.pid, address=END, length=8 * PAGE, write=True)
    failed = await scene.served.process.Touch(touch)
    assert failed.result.errno == errnos.ENOMEM
    assert failed.result.address == END + 3 * PAGE
    assert (await scene.served.process.Touch(touch)).result.errno == 0


async def test_dma_mapping_fails_when_its_failure_is_injected(scene: Scene) -> None:
    """ENOMEM to the device fault, as when dma_map_page() fails."""
    registered = await scene.driver.make("register_device", device_pb2.RegisterDeviceRequest(name="nic", dma=True))
    register = device_pb2.RegisterMirrorRequest(
        device_id=registered.device_id, process_id=scene.pid, no_fault_events=True
    )
    mirror = (await scene.driver.make("register_mirror", register)).mirror_id
    kind = harness_pb2.FAILURE_KIND_DMA_MAPPING
    await scene.harness.InjectFailure(
        harness_pb2.InjectFailureRequest(kind=kind, nth=1, device_id=registered.device_id)
    )
    assert (await scene.driver.fault(mirror, BASE, END)).result.errno == errnos.ENOMEM
    assert (await scene.driver.fault(mirror, BASE, END)).result.errno == 0
