"""What drivers hold between calls: migrations whose steps they take, exclusive access and pins, and their leases."""

from __future__ import annotations

import asyncio
import errno as errnos
from contextlib import suppress
from typing import Any

import grpc
import numpy as np
import pytest

from hmm.errors import NoSuchObjectError
from hmm.migration import MIGRATE, VALID, migrate_pfn
from hmm_proto.v1 import device_pb2, event_pb2, hmm_pb2, inspection_pb2, process_pb2, range_pb2, session_pb2
from hmm_server.config import SECONDS_MAX
from hmm_server.leases import LOOKS

PAGE = 4096
BASE = 0x10000000000
WHOLE = range_pb2.AddressRange(start=BASE, end=BASE + 2 * PAGE)


class Holder:
    """A driver of a device with eight pages, on a session, and a process whose two pages it mirrors."""

    served: Any
    driver: Any
    pid: int
    device: int
    mirror: int

    @classmethod
    async def make(cls, served: Any) -> Holder:
        """One of these; the first page of the process holds "page", the other is a hole."""
        one = cls()
        one.served, one.driver, one.pid = served, await served.driver(), await served.new_process()
        await served.mmap(one.pid, WHOLE.start, WHOLE.end)
        await served.process.WriteMemory(process_pb2.WriteMemoryRequest(process_id=one.pid, address=BASE, data=b"page"))
        card = device_pb2.RegisterDeviceRequest(name="card", memory_pages=8)
        one.device = (await one.driver.make("register_device", card)).device_id
        attach = hmm_pb2.AttachRequest(device_id=one.device, process_id=one.pid)
        one.mirror = (await one.driver.make("attach", attach)).mirror_id
        return one

    @property
    def machine(self) -> Any:
        """The daemon's."""
        return self.served.daemon.machine

    def look(self, times: int) -> None:
        """As much time passes."""
        for _ in range(times):
            self.served.daemon.streams.leases.look()

    async def set_up(self) -> hmm_pb2.MigrateVmaSetupResponse:
        """Begin a migration of both pages."""
        request = hmm_pb2.MigrateVmaSetupRequest(mirror_id=self.mirror, range=WHOLE, select=1)
        return await self.driver.make("migrate_vma_setup", request)

    async def allocate(self, migration_id: int, count: int, device: int | None = None) -> np.ndarray:
        """Frames of the device, or of another; 0: of the system."""
        device = self.device if device is None else device
        request = hmm_pb2.MigrateVmaAllocateRequest(migration_id=migration_id, count=count, device_id=device)
        return np.frombuffer((await self.driver.make("migrate_vma_allocate", request)).pfns, np.int64)

    def read(self, length: int = 4) -> Any:
        """A CPU reads; the call, to be awaited."""
        return self.served.process.ReadMemory(
            process_pb2.ReadMemoryRequest(process_id=self.pid, address=BASE, length=length)
        )

    async def show_life(self) -> None:
        """Say nothing on the session, and wait until that was heard."""
        (stream,) = self.served.daemon.streams.open.values()
        heard = stream.heard_s
        await self.driver.call.write(session_pb2.SessionRequest())
        await self.served.until(lambda: stream.heard_s != heard)

    async def pin(self) -> int:
        """Pin both pages."""
        request = hmm_pb2.PinPagesRequest(process_id=self.pid, range=WHOLE, write=True)
        return (await self.driver.make("pin_pages", request)).pin_id


@pytest.fixture
async def holder(served: Any) -> Holder:
    """One on a daemon whose leases last as long as the test likes."""
    return await Holder.make(served)


def words(packed: bytes) -> np.ndarray:
    """uint64[n]."""
    return np.frombuffer(packed, np.uint64)


async def fill_hole(holder: Holder) -> tuple[Any, Any, Any]:
    """Its driver migrates both pages, up to the event for the hole that it fills.

    Returns: a second driver, which mirrors the hole; that event; the future reply to `pages`.
    """
    other = await holder.served.driver()
    card = (await other.make("register_device", device_pb2.RegisterDeviceRequest(name="other"))).device_id
    mirror = (await other.make("attach", hmm_pb2.AttachRequest(device_id=card, process_id=holder.pid))).mirror_id
    insert = hmm_pb2.InsertNotifierRequest(mirror_id=mirror, start=BASE + PAGE, length=PAGE)
    await other.make("insert_notifier", insert)
    setting_up = asyncio.ensure_future(holder.set_up())
    await other.acknowledge(await other.events.get())
    begun = await setting_up
    frames = await holder.allocate(begun.migration_id, 2)
    pages = hmm_pb2.MigrateVmaPagesRequest(migration_id=begun.migration_id, dst=migrate_pfn(frames).tobytes())
    filling = await holder.driver.send("migrate_vma_pages", pages)
    return other, await other.events.get(), filling


# ---- migrations


async def test_step_names_who_was_fenced_when_it_waited_for_that_driver(holder: Holder) -> None:
    """In its own reply and in no later one, as every call does."""
    _, event, filling = await fill_hole(holder)
    await holder.served.let_deadlines_pass()
    filled = (await filling).migrate_vma_pages
    assert list(filled.result.fenced_mirrors) == list(event.mirror_ids)
    (migration_id,) = holder.machine.migrations
    finalize = hmm_pb2.MigrateVmaFinalizeRequest(migration_id=migration_id)
    finalized = await holder.driver.make("migrate_vma_finalize", finalize)
    assert not finalized.result.fenced_mirrors
    assert (words(finalized.src) & MIGRATE).all()


async def test_pages_move_when_a_driver_takes_every_step(holder: Holder) -> None:
    """On a session: setup, allocate, copy, write, read, pages, finalize."""
    begun = await holder.set_up()
    assert begun.lease_ms == 600_000
    source, hole = words(begun.src)
    assert source & VALID
    assert hole == MIGRATE
    frames = await holder.allocate(begun.migration_id, 2)
    copy = hmm_pb2.MigrateVmaCopyRequest(
        migration_id=begun.migration_id,
        sources=(np.array([source]) >> np.uint64(6)).tobytes(),
        targets=frames[:1].tobytes(),
    )
    assert not (await holder.driver.make("migrate_vma_copy", copy)).result.errno
    write = hmm_pb2.WriteFramesRequest(
        mirror_id=holder.mirror, migration_id=begun.migration_id, pfns=frames[1:].tobytes(), data=b"hole", offset=8
    )
    assert not (await holder.driver.make("write_frames", write)).result.errno
    read = hmm_pb2.ReadFramesRequest(
        mirror_id=holder.mirror, migration_id=begun.migration_id, pfns=frames.tobytes(), length=PAGE + 16
    )
    data = (await holder.driver.make("read_frames", read)).data
    assert (data[:4], data[PAGE + 8 : PAGE + 12]) == (b"page", b"hole")
    pages = hmm_pb2.MigrateVmaPagesRequest(migration_id=begun.migration_id, dst=migrate_pfn(frames).tobytes())
    left = words((await holder.driver.make("migrate_vma_pages", pages)).src)
    assert (left & np.uint64(MIGRATE)).all()
    finalize = hmm_pb2.MigrateVmaFinalizeRequest(migration_id=begun.migration_id)
    moved = await holder.driver.make("migrate_vma_finalize", finalize)
    assert (words(moved.dst) >> np.uint64(6)).tolist() == frames.tolist()
    reading = asyncio.ensure_future(holder.read(PAGE + 12))
    await holder.driver.acknowledge(await holder.driver.events.get())  # migrate_to_ram()
    assert (await reading).data[PAGE + 8 :] == b"hole"


async def test_pages_move_when_the_calls_come_one_by_one(serve: Any) -> None:
    """The unary calls of HmmService do it as well, for a mirror that a plain stream serves."""
    served = await serve()
    pid = await served.new_process()
    await served.mmap(pid, WHOLE.start, WHOLE.end)
    stream = served.device.WatchEvents(device_pb2.WatchEventsRequest(name="simple"))
    epoch = (await stream.read()).welcome.epoch
    card = await served.device.RegisterDevice(device_pb2.RegisterDeviceRequest(name="card", memory_pages=8))
    attach = hmm_pb2.AttachRequest(device_id=card.device_id, process_id=pid, epoch=epoch)
    mirror = (await served.hmm.Attach(attach)).mirror_id
    setup = hmm_pb2.MigrateVmaSetupRequest(mirror_id=mirror, range=WHOLE, select=1)
    begun = await served.hmm.MigrateVmaSetup(setup)
    assert served.daemon.machine.migrations
    allocate = hmm_pb2.MigrateVmaAllocateRequest(migration_id=begun.migration_id, count=2, device_id=card.device_id)
    frames = np.frombuffer((await served.hmm.MigrateVmaAllocate(allocate)).pfns, np.int64)
    pages = hmm_pb2.MigrateVmaPagesRequest(migration_id=begun.migration_id, dst=migrate_pfn(frames).tobytes())
    assert not (await served.hmm.MigrateVmaPages(pages)).result.errno
    finalize = hmm_pb2.MigrateVmaFinalizeRequest(migration_id=begun.migration_id)
    assert len((await served.hmm.MigrateVmaFinalize(finalize)).dst) == 16
    assert not served.daemon.machine.migrations
    stream.cancel()


async def test_pending_names_the_driver_when_somebody_waits_for_its_migration(holder: Holder) -> None:
    """Who touches a page waits for the migration, and that for its driver, who is named, with what is left."""
    begun = await holder.set_up()
    reading = asyncio.ensure_future(holder.read())
    await holder.served.until(lambda: len(holder.machine.operations) == 2)
    answer = await holder.served.pending()
    moving, waiting = answer.operations
    assert moving.name == "migrate_vma_setup"
    assert not moving.abandoned_by_caller
    assert moving.waits_for.startswith(f"the next step of its driver, in migration {begun.migration_id}")
    assert (moving.migration.driver_name, moving.migration.driver_pid) == ("probe", 42)
    assert moving.migration.lease_ms == 600_000
    assert list(waiting.blocked_by) == [moving.operation_id]
    (held,) = answer.holdings
    assert (held.migration_id, held.mirror_id, held.page_count) == (begun.migration_id, holder.mirror, 2)
    holder.look(3)
    (held,) = (await holder.served.pending()).holdings
    assert held.lease_ms == 600_000 * (LOOKS - 2) // LOOKS
    await holder.driver.make("migrate_vma_finalize", hmm_pb2.MigrateVmaFinalizeRequest(migration_id=begun.migration_id))
    assert (await reading).data == b"page"


async def test_pages_are_where_they_were_when_a_driver_takes_no_step(serve: Any, decode: Any) -> None:
    """A hung driver whose process shows life all the time does not keep them; every later call is told why."""
    holder = await Holder.make(await serve(holding_lease_s=0.05))
    begun = await holder.set_up()
    frames = await holder.allocate(begun.migration_id, 2)
    reading = asyncio.ensure_future(holder.read())
    while holder.machine.migrations:
        await holder.show_life()
    assert (await reading).data == b"page"
    assert frames.size == 2
    assert not holder.machine.frames.regions[1].used
    late = hmm_pb2.MigrateVmaPagesRequest(migration_id=begun.migration_id, dst=migrate_pfn(frames).tobytes())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await holder.served.hmm.MigrateVmaPages(late)
    error = decode(caught)
    assert isinstance(error, NoSuchObjectError)
    assert (error.errno, error.reason) == (errnos.ENOENT, "MIGRATION_ENDED")
    assert "its driver took no step for 0.05 s, its lease" in error.message
    operation = await holder.served.inspection.GetOperation(
        inspection_pb2.GetOperationRequest(operation_id=begun.result.operation_id)
    )
    assert operation.operation.result.reason == "LEASE_ENDED"


@pytest.mark.parametrize(
    "step",
    [
        lambda one, number: one.driver.make(
            "migrate_vma_allocate", hmm_pb2.MigrateVmaAllocateRequest(migration_id=number)
        ),
        lambda one, number: one.driver.make("migrate_vma_copy", hmm_pb2.MigrateVmaCopyRequest(migration_id=number)),
        lambda one, number: one.driver.make("read_frames", hmm_pb2.ReadFramesRequest(migration_id=number)),
        lambda one, number: one.driver.make(
            "migrate_vma_pages", hmm_pb2.MigrateVmaPagesRequest(migration_id=number, dst=bytes(8))
        ),
    ],
    ids=["allocate", "copy", "read", "refused pages"],
)
async def test_lease_begins_anew_when_a_step_is_taken(holder: Holder, step: Any) -> None:
    """Each call that names the migration is one, even one that does nothing or is refused."""
    begun = await holder.set_up()
    holder.look(LOOKS)
    assert holder.machine.migrations
    await step(holder, begun.migration_id)
    holder.look(LOOKS)
    assert holder.machine.migrations
    holder.look(1)
    assert not holder.machine.migrations


async def test_lease_does_not_begin_anew_when_a_stranger_names_the_migration(holder: Holder) -> None:
    """Only its owner's steps count."""
    mine = await holder.served.driver(token="mine")
    pid = (
        await holder.served.process.CreateProcess(
            process_pb2.CreateProcessRequest(name="mine"), metadata=(("hmm-token", "mine"),)
        )
    ).process_id
    request = process_pb2.MmapRequest(process_id=pid, address=BASE, length=2 * PAGE, prot=3, flags=0x32)
    await holder.served.process.Mmap(request, metadata=(("hmm-token", "mine"),))
    card = device_pb2.RegisterDeviceRequest(name="card", memory_pages=8)
    device = (await mine.make("register_device", card)).device_id
    mirror = (await mine.make("attach", hmm_pb2.AttachRequest(device_id=device, process_id=pid))).mirror_id
    begun = await mine.make("migrate_vma_setup", hmm_pb2.MigrateVmaSetupRequest(mirror_id=mirror, range=WHOLE))
    holder.look(LOOKS)
    refused = await holder.driver.make(
        "migrate_vma_finalize", hmm_pb2.MigrateVmaFinalizeRequest(migration_id=begun.migration_id)
    )
    assert refused.reason == "NOT_OWNER"
    holder.look(1)
    assert not holder.machine.migrations


async def test_lease_does_not_run_when_the_migration_waits_for_somebody_else(holder: Holder) -> None:
    """While holes are filled others answer: its driver has done its part."""
    other, event, filling = await fill_hole(holder)
    holder.look(3 * LOOKS)
    await other.acknowledge(event)
    assert not (await filling).migrate_vma_pages.result.errno
    (number,) = holder.machine.migrations
    finalize = hmm_pb2.MigrateVmaFinalizeRequest(migration_id=number, abort=True)
    await holder.driver.make("migrate_vma_finalize", finalize)


async def test_lease_does_not_run_when_the_drivers_own_call_waits(serve: Any) -> None:
    """Its allocation waits for room, and that for another driver: it cannot take a step meanwhile."""
    holder = await Holder.make(await serve(frames=64, swap_pages=128))
    other = await holder.served.driver()
    card = (await other.make("register_device", device_pb2.RegisterDeviceRequest(name="other"))).device_id
    mirror = (await other.make("attach", hmm_pb2.AttachRequest(device_id=card, process_id=holder.pid))).mirror_id
    more, npages = BASE + 16 * PAGE, holder.machine.frames.available
    await holder.served.mmap(holder.pid, more, more + npages * PAGE)
    data = b"x" * (npages * PAGE)
    write = process_pb2.WriteMemoryRequest(process_id=holder.pid, address=more, data=data)
    await holder.served.process.WriteMemory(write)
    insert = hmm_pb2.InsertNotifierRequest(mirror_id=mirror, start=more, length=npages * PAGE)
    await other.make("insert_notifier", insert)
    begun = await holder.set_up()
    allocating = asyncio.ensure_future(holder.allocate(begun.migration_id, 2, 0))
    event = await other.events.get()
    holder.look(3 * LOOKS)
    assert begun.migration_id in holder.machine.migrations
    await other.acknowledge(event)
    assert (await allocating).size == 2
    finalize = hmm_pb2.MigrateVmaFinalizeRequest(migration_id=begun.migration_id)
    assert not (await holder.driver.make("migrate_vma_finalize", finalize)).result.errno


async def test_migration_is_given_up_when_nobody_waits_for_its_setup_any_more(holder: Holder) -> None:
    """Nobody knows of it who could take its next step."""
    begun = await holder.set_up()
    unmapping = asyncio.ensure_future(holder.served.munmap(holder.pid, BASE + PAGE, BASE + 2 * PAGE))
    await holder.served.until(lambda: len(holder.machine.operations) == 2)
    first = range_pb2.AddressRange(start=BASE, end=BASE + PAGE)
    request = hmm_pb2.MigrateVmaSetupRequest(mirror_id=holder.mirror, range=first, select=1)
    second = holder.served.hmm.MigrateVmaSetup(request)
    await holder.served.until(lambda: len(holder.machine.operations) == 3)
    second.cancel()
    running = holder.served.daemon.executor.running
    await holder.served.until(lambda: any(one.given_up for one in running.values()))
    finalize = hmm_pb2.MigrateVmaFinalizeRequest(migration_id=begun.migration_id)
    await holder.driver.make("migrate_vma_finalize", finalize)
    assert not (await unmapping).result.errno
    assert (await holder.read()).data == b"page"
    assert not holder.machine.migrations


@pytest.mark.parametrize("farewell", [False, True])
async def test_pages_are_where_they_were_when_the_session_ends(holder: Holder, farewell: bool) -> None:
    """Broken or in good order: nobody else could finalize."""
    await holder.set_up()
    reading = asyncio.ensure_future(holder.read())
    if farewell:
        await holder.driver.bye()
    else:
        holder.driver.call.cancel()
    assert (await reading).data == b"page"
    assert not holder.machine.migrations


async def test_mirror_and_device_go_when_their_driver_dies_in_a_step_that_waits_for_others(serve: Any) -> None:
    """The migration ends when these have answered, which may be long after the lease of the driver's registrations."""
    holder = await Holder.make(await serve(lease_s=0.0))
    other, event, _ = await fill_hole(holder)
    holder.driver.call.cancel()
    ended = holder.served.daemon.executor.operations.ended_by_name
    await holder.served.until(lambda: ended["detach"])  # for nothing: the migration has not ended
    assert holder.mirror in holder.machine.receivers
    await other.acknowledge(event)
    await other.acknowledge(await other.events.get())  # the page that was put there leaves the device
    await holder.served.until(lambda: holder.device not in holder.machine.devices)
    assert holder.mirror not in holder.machine.receivers
    assert holder.mirror not in holder.served.daemon.streams.served


async def test_drain_does_not_wait_for_drivers_that_would_have_to_take_a_step(holder: Holder) -> None:
    """They cannot any more: no call is taken."""
    await holder.set_up()
    reading = asyncio.ensure_future(holder.read())
    await holder.served.until(lambda: len(holder.machine.operations) == 2)
    await holder.served.daemon.executor.drain(600.0)
    assert (await reading).data == b"page"


async def test_pending_shows_a_circle_when_a_driver_waits_behind_its_own_migration(holder: Holder) -> None:
    """Setup queues behind a call that waits for the migration before: it seems to wait for itself, until that ends."""
    begun = await holder.set_up()
    unmapping = asyncio.ensure_future(holder.served.munmap(holder.pid, BASE + PAGE, BASE + 2 * PAGE))
    await holder.served.until(lambda: len(holder.machine.operations) == 2)
    request = hmm_pb2.MigrateVmaSetupRequest(
        mirror_id=holder.mirror, range=range_pb2.AddressRange(start=BASE, end=BASE + PAGE), select=1
    )
    second = await holder.driver.send("migrate_vma_setup", request)
    await holder.served.until(lambda: len(holder.machine.operations) == 3)
    (cycle,) = (await holder.served.pending()).cycles
    assert cycle.suspected
    assert len(cycle.operation_ids) == 3
    holder.look(LOOKS + 1)
    assert not (await unmapping).result.errno
    reply = (await second).migrate_vma_setup
    assert reply.migration_id not in (0, begun.migration_id)


# ---- pins and exclusive access


async def test_pin_stays_as_long_as_its_holder_shows_life(holder: Holder) -> None:
    """Whatever comes on the session counts; without anything the session ends, and says why."""
    await holder.pin()
    for _ in range(3):
        holder.look(LOOKS - 1)
        await holder.show_life()
    holder.look(LOOKS)
    assert holder.machine.pins
    holder.look(1)
    assert await holder.driver.ended == "nothing was heard of it for 600 s, the lease of pin 1"
    assert not holder.machine.pins
    assert holder.machine.receivers[holder.mirror].lost_because.endswith("the lease of pin 1")


async def test_exclusive_access_goes_back_when_its_holder_shows_no_life(holder: Holder) -> None:
    """As pins do; a mirror that has only faulted holds nothing."""
    request = hmm_pb2.MakeExclusiveRequest(mirror_id=holder.mirror, range=WHOLE)
    assert words((await holder.driver.make("make_exclusive", request)).pfns).all()
    holder.look(LOOKS + 1)
    assert "the exclusive access of mirror" in await holder.driver.ended
    assert (await holder.read()).data == b"page"


async def test_session_goes_on_when_it_is_silent_and_holds_nothing(holder: Holder) -> None:
    """Nobody is harmed: deadlines of events find out who hangs."""
    pin = await holder.pin()
    await holder.driver.make("unpin_pages", hmm_pb2.UnpinPagesRequest(pin_id=pin))
    holder.look(3 * LOOKS)
    assert holder.served.daemon.streams.open
    await holder.show_life()


async def test_plain_stream_keeps_its_pin_when_it_acknowledges_nothing_in_time(serve: Any) -> None:
    """A client with a plain stream shows life by Acknowledge; in a daemon with a short lease it would lose the pin."""
    served = await serve()
    pid = await served.new_process()
    await served.mmap(pid, WHOLE.start, WHOLE.end)
    stream = served.device.WatchEvents(device_pb2.WatchEventsRequest(name="simple"))
    welcome = (await stream.read()).welcome
    assert welcome.lease_ms == 600_000
    pin = hmm_pb2.PinPagesRequest(process_id=pid, range=WHOLE, write=True, epoch=welcome.epoch)
    await served.hmm.PinPages(pin)
    look = served.daemon.streams.leases.look
    for _ in range(2 * LOOKS):
        look()
        answers = event_pb2.Acknowledgements(epoch=welcome.epoch)
        await served.device.Acknowledge(device_pb2.AcknowledgeRequest(acknowledgements=answers))
    assert served.daemon.machine.pins
    for _ in range(LOOKS + 1):
        look()
    await served.until(lambda: not served.daemon.machine.pins)
    stream.cancel()


@pytest.mark.parametrize("sign", ["a mirror", "the stream", "somebody else's"])
async def test_plain_stream_shows_life_when_a_call_names_it_or_its_mirror(serve: Any, sign: str) -> None:
    """A driver that makes calls need not acknowledge beside them; what a stranger asks of its mirror counts nothing."""
    served = await serve()
    pid = await served.new_process()
    await served.mmap(pid, WHOLE.start, WHOLE.end)
    stream = served.device.WatchEvents(device_pb2.WatchEventsRequest(name="simple"))
    epoch = (await stream.read()).welcome.epoch
    card = (await served.device.RegisterDevice(device_pb2.RegisterDeviceRequest(name="card"))).device_id
    attach = hmm_pb2.AttachRequest(device_id=card, process_id=pid, epoch=epoch)
    mirror = (await served.hmm.Attach(attach)).mirror_id
    pin = hmm_pb2.PinPagesRequest(process_id=pid, range=WHOLE, write=True, epoch=epoch)
    await served.hmm.PinPages(pin)
    for _ in range(2 * LOOKS):
        served.daemon.streams.leases.look()
        if sign == "the stream":
            await served.hmm.PinPages(pin)
        elif sign == "a mirror":
            await served.hmm.FindVma(hmm_pb2.FindVmaRequest(mirror_id=mirror, address=BASE))
        else:
            request, stranger = hmm_pb2.FindVmaRequest(mirror_id=mirror, address=BASE), (("hmm-token", "stranger"),)
            with suppress(grpc.aio.AioRpcError):  # once the stream has ended
                await served.hmm.FindVma(request, metadata=stranger)
    assert bool(served.daemon.streams.open) is (sign != "somebody else's")
    stream.cancel()


async def test_pin_goes_when_its_holder_is_silent_for_its_lease(serve: Any) -> None:
    """By the clock."""
    holder = await Holder.make(await serve(holding_lease_s=0.05))
    await holder.pin()
    assert "nothing was heard of it for 0.05 s" in await holder.driver.ended
    assert not holder.machine.pins


async def test_sessions_open_when_the_lease_is_as_long_as_it_can_be(serve: Any) -> None:
    """Its Welcome says it in milliseconds, as that of a stream does."""
    served = await serve(holding_lease_s=SECONDS_MAX, acknowledgement_s=SECONDS_MAX)
    holder = await Holder.make(served)
    begun = await holder.set_up()
    assert begun.lease_ms == SECONDS_MAX * 1000
    stream = served.device.WatchEvents(device_pb2.WatchEventsRequest(name="simple"))
    welcome = (await stream.read()).welcome
    assert (welcome.lease_ms, welcome.acknowledgement_deadline_ms) == (SECONDS_MAX * 1000, SECONDS_MAX * 1000)
    stream.cancel()
