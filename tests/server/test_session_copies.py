"""Copies on a session: events that ask for results, and their data (protocol rules 3 and 10d)."""

from __future__ import annotations

import asyncio
import errno as errnos
from typing import Any

import pytest

from hmm_proto.v1 import device_pb2, process_pb2, range_pb2, types_pb2

PAGE = 4096
BASE = 0x10000000000
NPAGES = 4


@pytest.fixture
async def carrying(served: Any) -> tuple[Any, Any, int, int]:
    """A daemon, a session whose driver copies, a process with four written pages, and a mirror."""
    pid = await served.new_process()
    await served.mmap(pid, BASE, BASE + NPAGES * PAGE)
    data = b"".join(bytes([1 + number]) * PAGE for number in range(NPAGES))
    await served.process.WriteMemory(process_pb2.WriteMemoryRequest(process_id=pid, address=BASE, data=data))
    driver = await served.driver()
    device = device_pb2.RegisterDeviceRequest(name="card", memory_pages=16, driver_copies=True)
    registered = await driver.make("register_device", device)
    request = device_pb2.RegisterMirrorRequest(device_id=registered.device_id, process_id=pid, no_fault_events=True)
    return served, driver, pid, (await driver.make("register_mirror", request)).mirror_id


def migrate_request(mirror: int, **fields: Any) -> device_pb2.MigrateRequest:
    """All pages of the process."""
    span = range_pb2.AddressRange(start=BASE, end=BASE + NPAGES * PAGE)
    return device_pb2.MigrateRequest(mirror_id=mirror, range=span, **fields)


async def test_copy_is_answered_by_as_many_results_as_pages(carrying: Any) -> None:
    """`acknowledged_up_to` does not cover it, a plain answer or too few results are rejected; it stays unanswered."""
    _, driver, _, mirror = carrying
    migrating = await driver.send("migrate", migrate_request(mirror))
    event = await driver.events.get()
    assert (event.type, event.copy, event.wants_answer) == (types_pb2.EVENT_TYPE_COPY_TO_DEVICE, 1, True)
    assert len(event.entries) == 8 * NPAGES
    sequence = event.event_sequences[0]
    await driver.acknowledge(event)
    await driver.answer(single_mirror_ids=[mirror], single_sequences=[sequence])
    assert "wants 4 results" in (await driver.violations.get()).rule
    short = {"mirror_id": mirror, "event_sequence": sequence, "results": bytes(3)}
    await driver.answer(answers=[short])
    assert "and 3 came" in (await driver.violations.get()).rule
    assert not migrating.done()
    read = device_pb2.ReadCopyRequest(mirror_id=mirror, copy=event.copy, first_page=1, page_count=2)
    assert (await driver.make("read_copy", read)).data == bytes([2]) * PAGE + bytes([3]) * PAGE
    await driver.answer(answers=[{**short, "results": bytes([0, 0, errnos.EIO, 0])}])
    response = (await migrating).migrate
    assert (response.result.errno, response.moved_pages) == (0, 3)


async def test_copies_are_refused_when_they_are_malformed(carrying: Any) -> None:
    """Copies that nobody waits for, and more than a message holds."""
    _, driver, _, mirror = carrying
    nothing = await driver.make("read_copy", device_pb2.ReadCopyRequest(mirror_id=mirror, copy=7, page_count=1))
    assert nothing.errno == errnos.ENOENT
    large = await driver.make("read_copy", device_pb2.ReadCopyRequest(mirror_id=mirror, copy=7, page_count=257))
    assert (large.errno, large.reason) == (errnos.E2BIG, "LIMIT")
    brought = device_pb2.WriteCopyRequest(mirror_id=mirror, copy=7, data=bytes(PAGE))
    assert (await driver.make("write_copy", brought)).errno == errnos.ENOENT


async def test_answers_and_events_pass_data_that_is_not_read(carrying: Any) -> None:
    """Data is sent when it is asked for, and events go ahead of it: a copy never delays what others wait for."""
    served, driver, pid, mirror = carrying
    other = await driver.mirror(pid)
    await driver.fault(other, BASE + (NPAGES - 1) * PAGE, BASE + NPAGES * PAGE)
    span = range_pb2.AddressRange(start=BASE, end=BASE + 2 * PAGE)
    migrating = await driver.send("migrate", device_pb2.MigrateRequest(mirror_id=mirror, range=span))
    events = {}
    for _ in range(2):
        event = await driver.events.get()
        events[event.type] = event
        if event.type == types_pb2.EVENT_TYPE_MIGRATE:
            await driver.acknowledge(event)
    copy = events[types_pb2.EVENT_TYPE_COPY_TO_DEVICE]
    reads = [
        await driver.send("read_copy", device_pb2.ReadCopyRequest(mirror_id=mirror, copy=copy.copy, page_count=2))
        for _ in range(20)
    ]
    unmapping = asyncio.ensure_future(served.munmap(pid, BASE + (NPAGES - 1) * PAGE, BASE + NPAGES * PAGE))
    event = await driver.events.get()
    answers = [
        {"mirror_id": number, "event_sequence": sequence}
        for number, sequence in zip(event.mirror_ids, event.event_sequences, strict=True)
    ]
    await driver.answer(answers=answers)
    assert (await unmapping).result.errno == 0
    assert not migrating.done()
    assert {len((await read).read_copy.data) for read in reads} == {2 * PAGE}
    await driver.answer(answers=[{"mirror_id": mirror, "event_sequence": copy.event_sequences[0], "results": bytes(2)}])
    assert (await migrating).migrate.moved_pages == 2


async def test_pending_names_the_driver_that_has_to_copy(carrying: Any) -> None:
    """A CPU that waits for a page is shown with the event, its mirror and the driver."""
    served, driver, pid, mirror = carrying
    migrating = await driver.send("migrate", migrate_request(mirror))
    event = await driver.events.get()
    done = {"mirror_id": mirror, "event_sequence": event.event_sequences[0], "results": bytes(NPAGES)}
    await driver.answer(answers=[done])
    await migrating
    request = process_pb2.ReadMemoryRequest(process_id=pid, address=BASE, length=1)
    reading = asyncio.ensure_future(served.process.ReadMemory(request))
    back = await driver.events.get()
    assert back.type == types_pb2.EVENT_TYPE_COPY_FROM_DEVICE
    (operation,) = (await served.pending()).operations
    assert operation.name == "read_memory"
    assert operation.waits_for.startswith("acknowledgement of copy from device by its driver")
    (blocking,) = operation.events
    assert (blocking.mirror_id, blocking.driver_name) == (mirror, "probe")
    write = device_pb2.WriteCopyRequest(mirror_id=mirror, copy=back.copy, data=b"x" * PAGE)
    await driver.make("write_copy", write)
    await driver.answer(answers=[{"mirror_id": mirror, "event_sequence": back.event_sequences[0], "results": b"\0"}])
    assert (await reading).data == b"x"
