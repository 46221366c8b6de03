"""Migrations whose steps a driver takes, through both faces of the client library and a real daemon."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner

import hmm_client
from hmm.errors import InvalidRequestError, NoSuchObjectError, RangeBusyError, TimedOutError
from hmm.migration import MIGRATE, Select, pfns_of
from hmm.receiver import DeadlinePolicy
from hmm.units import PAGE_SIZE, AddressRange
from hmm_client import Device, IntervalDriver, IntervalMirror, Process, sync
from hmm_client.cli import main
from hmm_client.migration import Migration
from hmm_proto.v1 import inspection_pb2

if TYPE_CHECKING:
    from tests.conftest import Daemon

PAGES = 4


class Scene:
    """A process with four pages, of which the last is a hole, and a card with eight that is attached to it."""

    client: hmm_client.Client
    process: Process
    card: Device
    mirror: IntervalMirror
    span: AddressRange

    async def read(self) -> bytes:
        """The first bytes of each page, as a CPU has them."""
        pages = [await self.process.read(self.span.start + at * PAGE_SIZE, 4) for at in range(PAGES)]
        return b" ".join(pages)

    async def until_pending(self, *names: str) -> None:
        """Wait until these calls, oldest first, and no others of this process have not ended."""
        ask, nothing = self.client.inspection.GetPending, inspection_pb2.GetPendingRequest()
        while True:
            answer = await self.client.channel.request(ask, nothing)
            if tuple(one.name for one in answer.operations if one.space_id == self.mirror.space_id) == names:
                return

    async def on_devices(self) -> int:
        """Pages of the process that are in the memory of devices."""
        maps = await self.process.maps()
        return sum(count for line in maps.lines for _, count in line.on_devices)


@asynccontextmanager
async def scene_at(daemon: Daemon) -> AsyncIterator[Scene]:
    """One of these."""
    one = Scene()
    async with hmm_client.connect(daemon.target, name="test") as one.client:
        one.process = await one.client.create_process("test")
        one.span = (await one.process.mmap(PAGES * PAGE_SIZE)).span
        for at in range(PAGES - 1):
            await one.process.write(one.span.start + at * PAGE_SIZE, b"pag%d" % at)
        one.card = await one.client.register_device("card", memory_pages=8)
        one.mirror = await one.card.attach(one.process, IntervalDriver())
        yield one


@pytest.fixture
async def scene(shared_daemon: Daemon) -> AsyncIterator[Scene]:
    """One for each test, on a daemon that is patient."""
    async with scene_at(shared_daemon) as one:
        yield one


async def test_pages_move_there_and_back_when_their_driver_takes_the_steps(scene: Scene) -> None:
    """There by the device's copy engine, back through the driver's hands."""
    async with scene.mirror.migrate_vma(scene.span) as migration:
        assert migration.movable.tolist() == [0, 1, 2, 3]
        assert migration.lease_s > 0
        dst = migration.destinations(await migration.allocate(PAGES))
        await migration.copy(dst)
        assert (await migration.pages(dst) & np.uint64(MIGRATE)).all()
        moved = await migration.finalize()
    assert moved.dst.tolist() == dst.tolist()
    assert await scene.on_devices() == PAGES
    async with scene.mirror.migrate_vma(scene.span, select=Select.DEVICE_PRIVATE) as migration:
        frames = await migration.allocate_system(2)
        data = await migration.read(pfns_of(migration.src[:2]))
        await migration.write(frames, data.replace(b"pag", b"PAG"))
        await migration.renew()
        await migration.pages(migration.destinations(frames))
    assert await scene.on_devices() == PAGES - 2
    assert await scene.read() == b"PAG0 PAG1 pag2 " + bytes(4)


async def test_pages_are_where_they_were_when_the_block_raises(scene: Scene) -> None:
    """The exception goes on; it can be before or behind `pages`."""
    span = AddressRange(scene.span.start, scene.span.end - PAGE_SIZE)

    async def fail(migration: Migration, *, reaches_pages: bool) -> None:
        async with migration:
            dst = migration.destinations(await migration.allocate(PAGES - 1))
            if reaches_pages:
                await migration.pages(dst)
            raise ZeroDivisionError

    for reaches_pages in (False, True):
        migration = scene.mirror.migrate_vma(span)
        with pytest.raises(ZeroDivisionError):
            await fail(migration, reaches_pages=reaches_pages)
        assert migration.over
        assert await scene.on_devices() == 0
        with pytest.raises(NoSuchObjectError, match="has ended: it was given up"):
            await migration.renew()
    assert await scene.read() == b"pag0 pag1 pag2 " + bytes(4)


async def test_pages_are_where_they_were_when_the_task_is_cancelled(scene: Scene) -> None:
    """Inside the block, and while setup waits: then it is given up as soon as it is there."""
    begun, never = asyncio.Event(), asyncio.Event()

    async def migrate() -> None:
        async with scene.mirror.migrate_vma(scene.span):
            begun.set()
            await never.wait()

    task = asyncio.create_task(migrate())
    await begun.wait()
    unmapping = asyncio.create_task(scene.process.munmap(scene.span.end - PAGE_SIZE, PAGE_SIZE))
    await scene.until_pending("migrate_vma_setup", "munmap")
    first_page = AddressRange(scene.span.start, scene.span.start + PAGE_SIZE)
    second = asyncio.create_task(scene.mirror.migrate_vma(first_page).set_up())
    await scene.until_pending("migrate_vma_setup", "munmap", "migrate_vma_setup")
    second.cancel()
    task.cancel()
    for ended in (task, second):
        with pytest.raises(asyncio.CancelledError):
            await ended
    await unmapping
    await scene.process.munmap(scene.span.start, PAGE_SIZE)  # which waits for the second to be given up


async def test_steps_are_refused_when_they_cannot_be(scene: Scene) -> None:
    """With the daemon's words, or before they leave."""
    async with scene.mirror.migrate_vma(scene.span) as migration:
        frames = await migration.allocate(2)
        with pytest.raises(InvalidRequestError, match="3 more frames for migration"):
            await migration.allocate(3)
        with pytest.raises(InvalidRequestError, match="is given twice"):
            await migration.pages(migration.destinations(frames[[0, 0]]))
        with pytest.raises(InvalidRequestError, match="5 frames for the 4 pages"):
            migration.destinations(np.arange(5))
        with pytest.raises(InvalidRequestError, match="1 bytes are not those of 2 frames"):
            await migration.write(frames, b"x")
        with pytest.raises(hmm_client.ArgumentError, match="count=-1"):
            await migration.allocate(-1)
    assert await scene.on_devices() == 0


async def test_migration_begins_again_when_it_is_over(scene: Scene) -> None:
    """As another one, which its block finalizes as it did the first; not before."""
    migration = scene.mirror.migrate_vma(scene.span)
    async with migration:
        first = migration.id
        with pytest.raises(InvalidRequestError, match=f"migration {first} of .* is not over yet"):
            await migration.set_up()
    setting_up = asyncio.create_task(migration.set_up())
    await asyncio.sleep(0)
    with pytest.raises(InvalidRequestError, match="is not over yet"):
        await migration.set_up()
    await setting_up
    assert not migration.over
    await migration.abort()
    async with migration:
        assert migration.id > first
        await migration.pages(migration.destinations(await migration.allocate(PAGES)))
    assert migration.over
    assert await scene.on_devices() == PAGES
    await scene.process.munmap(scene.span.start, PAGE_SIZE)  # nobody holds mmap_lock


async def test_block_finalizes_what_is_set_up_when_it_caught_the_error_of_a_step(scene: Scene) -> None:
    """Nothing has moved where `pages` was refused; nothing is left to do where the migration had ended."""
    async with scene.mirror.migrate_vma(scene.span) as migration:
        with pytest.raises(InvalidRequestError, match=r"frame 0 for .* was not allocated"):
            await migration.pages(migration.destinations(np.zeros(1, np.int64)))
        assert not migration.over
    assert migration.over
    assert await scene.on_devices() == 0
    async with scene.mirror.migrate_vma(scene.span) as migration:
        same = scene.mirror.migrate_vma(scene.span)
        same.id = migration.id
        await same.abort()
        assert not migration.over
        with pytest.raises(NoSuchObjectError, match="has ended: it was given up"):
            await migration.renew()
        assert migration.over
    assert await scene.read() == b"pag0 pag1 pag2 " + bytes(4)


@pytest.mark.slow
async def test_migration_is_over_when_another_driver_does_not_answer_in_time(hasty_daemon: Daemon) -> None:
    """Its policy is FAIL: `pages` has failed, everything is where it was, and the block has nothing to do."""
    answer = asyncio.Event()

    class Hung(IntervalDriver):
        async def invalidate(self, _: Any) -> None:
            await answer.wait()

    async with scene_at(hasty_daemon) as scene:
        other = await scene.client.register_device("other")
        hung = await other.attach(scene.process, Hung(), policy=DeadlinePolicy.FAIL)
        async with scene.mirror.migrate_vma(scene.span) as migration:
            await hung.insert(scene.span.end - PAGE_SIZE, PAGE_SIZE)
            frames = await migration.allocate(PAGES)
            with pytest.raises(TimedOutError):
                await migration.pages(migration.destinations(frames))
            assert migration.over
        answer.set()
        assert await scene.on_devices() == 0


async def test_second_step_is_refused_when_one_is_under_way(scene: Scene) -> None:
    """Steps are taken one at a time."""
    other = await scene.client.register_device("other")
    hold = asyncio.Event()

    class Slow(IntervalDriver):
        async def invalidate(self, _: Any) -> None:
            await hold.wait()

    slow = await other.attach(scene.process, Slow())
    async with scene.mirror.migrate_vma(scene.span) as migration:
        await slow.insert(scene.span.end - PAGE_SIZE, PAGE_SIZE)
        frames = await migration.allocate(PAGES)
        filling = asyncio.create_task(migration.pages(migration.destinations(frames)))
        await asyncio.sleep(0)  # it is sent first
        with pytest.raises(RangeBusyError, match="is busy with pages"):
            await migration.finalize()
        hold.set()
        await filling


async def test_pages_move_to_another_device_when_that_is_attached_too(scene: Scene) -> None:
    """Device to device, without system memory in between."""
    await scene.mirror.migrate_to_device(scene.span)
    other = await scene.client.register_device("other", memory_pages=8)
    await other.attach(scene.process, IntervalDriver())
    async with scene.mirror.migrate_vma(scene.span, select=Select.DEVICE_PRIVATE) as migration:
        dst = migration.destinations(await migration.allocate(PAGES, device=other))
        await migration.copy(dst)
        await migration.pages(dst)
    maps = await scene.process.maps()
    assert [line.on_devices for line in maps.lines if line.on_devices] == [(("other", PAGES),)]
    assert await scene.read() == b"pag0 pag1 pag2 " + bytes(4)


async def test_pending_shows_who_has_to_go_on_when_a_cpu_waits(scene: Scene, shared_daemon: Daemon) -> None:
    """For people: the driver, its migration, and what is left of its lease."""
    async with scene.mirror.migrate_vma(scene.span) as migration:
        reading = asyncio.create_task(scene.process.read(scene.span.start, 4))
        shown = ""
        while "read_memory" not in shown:
            arguments = ["pending", "--target", shared_daemon.target]
            shown = (await asyncio.to_thread(CliRunner().invoke, main, arguments, catch_exceptions=False)).output
        assert f"has to go on with migration {migration.id}: 600.0 s of its lease left" in shown
        assert f"migration {migration.id}, mirror {scene.mirror.id}" in shown
    assert await reading == b"pag0"


@pytest.fixture
def blocking(shared_daemon: Daemon) -> Iterator[sync.Client]:
    """A client without await."""
    with sync.connect(shared_daemon.target, name="test") as client:
        yield client


def test_pages_move_when_a_blocking_driver_takes_the_steps(blocking: sync.Client) -> None:
    """As with await."""
    process = blocking.create_process("test")
    mapped = process.mmap(2 * PAGE_SIZE)
    process.write(mapped.address, b"page")
    card = blocking.register_device("card", memory_pages=8)
    mirror = card.attach(process, sync.IntervalDriver())
    with mirror.migrate_vma(mapped.span) as migration:
        assert isinstance(migration.aio, Migration)
        frames = migration.allocate(migration.movable.size)
        dst = migration.destinations(frames)
        migration.copy(dst)
        assert migration.read(frames)[:4] == b"page"
        assert (migration.pages(dst) & np.uint64(MIGRATE)).all()
        assert migration.id
        assert migration.lease_s > 0
        assert not migration.over
    assert migration.over

    def fail() -> None:
        with mirror.migrate_vma(mapped.span, select=Select.DEVICE_PRIVATE) as migration:
            migration.pages(migration.destinations(migration.allocate_system(2)))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert process.maps().lines[0].on_devices == (("card", 2),)
    assert process.read(mapped.address, 4) == b"page"
