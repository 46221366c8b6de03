"""Races written down: a call is held at a point, others run, it goes on; and it comes out the same every time."""

from __future__ import annotations

import asyncio
import errno as errnos
import re
import sys
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hmm.errors import (
    AccessDeniedError,
    InvalidRequestError,
    NoSuchObjectError,
    OutOfFramesError,
    RangeBusyError,
    SegmentationFault,
    Signal,
)
from hmm.ksm import KsmPass
from hmm.migration import MIGRATE
from hmm.units import PAGE_SIZE
from hmm_client import Advice, IntervalDriver, Mirror, Process, TableDriver
from hmm_client.harness import Harness, HoldEndedError, HoldPoint, SyncRig
from hmm_client.results import Mapped
from hmm_proto.v1 import inspection_pb2

if TYPE_CHECKING:
    from tests.conftest import Daemon

NPAGES = 16


class Scene:
    """A process with memory, and a mirror of it that has all of it."""

    def __init__(self, harness: Harness, process: Process, heap: Mapped, mirror: Mirror) -> None:
        self.harness = harness
        self.process = process
        self.heap = heap
        self.mirror = mirror

    async def munmap(self) -> object:
        """Unmap everything."""
        return await self.process.munmap(self.heap.address, NPAGES * PAGE_SIZE)

    async def discard(self) -> object:
        """Discard everything; it stays mapped."""
        return await self.process.madvise(self.heap.address, NPAGES * PAGE_SIZE, Advice.DONTNEED)


@pytest.fixture
async def scene(harness_daemon: Daemon) -> AsyncIterator[Scene]:
    """A scene whose deadlines are far away."""
    client = harness_daemon.connect("tests")
    process = await client.create_process("program")
    heap = await process.mmap(NPAGES * PAGE_SIZE)
    await process.write(heap.address, b"before")
    device = await client.register_device("gpu")
    mirror = await device.mirror(process, TableDriver())
    await mirror.fault(heap.span, write=True)
    yield Scene(Harness(client), process, heap, mirror)
    await client.close()


async def test_cpu_reads_the_old_bytes_when_the_call_is_held_before_the_edit(scene: Scene) -> None:
    """Every driver has answered, and nothing has gone."""
    async with scene.harness.hold(HoldPoint.BEFORE_EDIT, "madvise", process=scene.process) as hold:
        discarding = asyncio.ensure_future(scene.discard())
        assert await hold.reached() == hold.operation_id
        assert await scene.process.read(scene.heap.address, 6) == b"before"
    await discarding
    assert await scene.process.read(scene.heap.address, 6) == bytes(6)


async def test_fault_is_told_that_the_range_is_busy_when_an_invalidation_is_held(scene: Scene) -> None:
    """The conflict protocol of 2015: a fault that does not wait gets EBUSY, one that waits comes after it."""
    async with scene.harness.hold(HoldPoint.EVENT_SENT, "madvise", mirror=scene.mirror) as hold:
        discarding = asyncio.ensure_future(scene.discard())
        await hold.reached()
        with pytest.raises(RangeBusyError):
            await scene.mirror.fault(scene.heap.span, wait=False)
        faulting = asyncio.ensure_future(scene.mirror.fault(scene.heap.span))
        await hold.release()
    await asyncio.gather(discarding, faulting)
    assert await scene.mirror.read([(scene.heap.address, 6)]) == bytes(6)


async def test_release_says_so_when_the_lease_was_over(scene: Scene) -> None:
    """A race that did not happen as it is written down must not pass for one that did."""
    hold = scene.harness.hold(HoldPoint.BEFORE_END, "munmap", lease_s=0.01)
    await hold.__aenter__()
    await scene.munmap()
    with pytest.raises(HoldEndedError, match="its lease has ended"):
        await hold.release()


async def test_reached_says_so_when_nobody_came(scene: Scene) -> None:
    """A call that never comes to the point is found out by the lease."""
    with pytest.raises(HoldEndedError, match=r"nothing came to <hold \d+ of fork before the edit>"):
        async with scene.harness.hold(HoldPoint.BEFORE_EDIT, "fork", lease_s=0.01) as hold:
            await hold.reached()


async def test_hold_is_refused_when_it_makes_no_sense(scene: Scene, shared_daemon: Daemon) -> None:
    """No such process; a daemon that was not started for tests."""
    with pytest.raises(NoSuchObjectError):
        async with scene.harness.hold(HoldPoint.BEFORE_END, process=scene.process.client.process(1 << 40)):
            pass
    with pytest.raises(AccessDeniedError, match="start hmmd with --harness"):
        async with Harness(shared_daemon.connect()).hold(HoldPoint.BEFORE_END):
            pass


@pytest.mark.slow
async def test_pending_tells_people_who_holds_what(scene: Scene, harness_daemon: Daemon) -> None:
    """`hmmctl pending` names the hold of a call, and a hold that nothing has come to."""
    harness, process = scene.harness, scene.process
    async with (
        harness.hold(HoldPoint.BEFORE_EDIT, "munmap", process=process) as held,
        harness.hold(HoldPoint.BEFORE_END, "fork", process=process) as waiting,
    ):
        unmapping = asyncio.ensure_future(scene.munmap())
        await held.reached()
        command = (sys.executable, "-m", "hmm_client.cli", "pending", "--target", harness_daemon.target)
        hmmctl = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        printed, _ = await hmmctl.communicate()
    await unmapping
    text = printed.decode()
    assert re.search(rf"^  held by hold {held.id} of tests, before the edit, [\d.]+ s left$", text, re.MULTILINE)
    awaited = (
        rf"^hold {waiting.id} of tests, before the end, [\d.]+ s left: nothing has come, it is for fork of process \d+$"
    )
    assert re.search(awaited, text, re.MULTILINE)


async def test_memory_fails_and_pages_are_merged_on_demand(scene: Scene) -> None:
    """MADV_HWPOISON is permitted, and a pass of page merging is a call; statistics count both."""
    fresh = await scene.process.mmap(4 * PAGE_SIZE)
    await scene.process.madvise(fresh.address, 4 * PAGE_SIZE, Advice.MERGEABLE)
    await scene.process.write(fresh.address, b"abab" * PAGE_SIZE)
    assert await scene.harness.scan_ksm(1) == KsmPass(4, 0, 0, 0, 0, 4)
    assert await scene.harness.scan_ksm() == KsmPass(4, 4, 1, 3, 0, 0)
    (mapping,) = [one for one in await scene.process.smaps() if one.line.start == fresh.address]
    assert mapping.use.ksm == 4 * PAGE_SIZE
    await scene.process.madvise(fresh.address, PAGE_SIZE, Advice.HWPOISON)
    with pytest.raises(SegmentationFault) as caught:
        await scene.process.read(fresh.address, 1)
    assert caught.value.signal is Signal.BUS_POISON
    request = inspection_pb2.GetStatisticsRequest()
    daemon = (await scene.process.client.channel.request(scene.process.client.inspection.GetStatistics, request)).daemon
    assert (daemon.ksm_pages_shared, daemon.ksm_pages_sharing, daemon.frames_poisoned) == (0, 0, 1)


async def test_copy_fails_once_for_mirrors_of_both_interfaces(scene: Scene) -> None:
    """The second page of today's migration stays; what a mirror of 2015 cannot bring back is lost."""
    fresh = await scene.process.mmap(4 * PAGE_SIZE)
    await scene.process.write(fresh.address, b"copy" * PAGE_SIZE)
    client = scene.process.client
    card = await client.register_device("card", memory_pages=8)
    tie = await card.attach(scene.process, IntervalDriver())
    await scene.harness.fail_copy(tie, 2)
    moved = await tie.migrate_to_device(fresh.span)
    assert ((moved.src & np.uint64(MIGRATE)) != 0).tolist() == [True, False, True, True]
    await scene.harness.fail_copy(tie, 1)
    with pytest.raises(SegmentationFault) as caught:
        await scene.process.read(fresh.address, 4 * PAGE_SIZE)
    assert (caught.value.signal, caught.value.address) == (Signal.BUS_ADRERR, fresh.address)
    assert await scene.process.read(fresh.address, 4 * PAGE_SIZE) == b"copy" * PAGE_SIZE

    mirror = await (await client.register_device("old", memory_pages=8)).mirror(scene.process, TableDriver())
    assert (await mirror.migrate(fresh.span)).npages == 4
    await scene.harness.fail_copy(mirror, 3)
    assert (await mirror.migrate_back(fresh.span)).npages == 4
    assert await scene.process.read(fresh.address, 2 * PAGE_SIZE) == b"copy" * (PAGE_SIZE // 2)
    with pytest.raises(SegmentationFault) as caught:
        await scene.process.read(fresh.address + 2 * PAGE_SIZE, 1)
    assert caught.value.signal is Signal.BUS_POISON
    with pytest.raises(InvalidRequestError, match="no memory that pages are copied to here"):
        await scene.harness.fail_copy(scene.mirror, 1)


def test_copy_fails_once_when_the_rig_says_so(harness_daemon: Daemon) -> None:
    """The same without asyncio: the page stays, and the next migration takes it along."""
    with SyncRig(harness_daemon.target) as rig:
        process = rig.process()
        heap = process.mmap(2 * PAGE_SIZE)
        mirror = rig.mirror(process, device=rig.device(memory_pages=8))
        rig.fail_copy(mirror, 2)
        assert [mirror.migrate(heap.span).npages for _ in range(3)] == [1, 1, 0]


async def test_injected_failures_are_met_once(scene: Scene) -> None:
    """ENOMEM for the third page, and for a DMA mapping; the same again succeeds."""
    fresh = await scene.process.mmap(NPAGES * PAGE_SIZE)
    await scene.harness.fail_allocation(3)
    with pytest.raises(OutOfFramesError) as caught:
        await scene.process.touch(fresh.address, NPAGES * PAGE_SIZE, write=True)
    assert caught.value.address == fresh.address + 2 * PAGE_SIZE
    await scene.process.touch(fresh.address, NPAGES * PAGE_SIZE, write=True)

    card = await scene.process.client.register_device("card", dma=True)
    mirror = await card.mirror(scene.process, TableDriver())
    await scene.harness.fail_dma_mapping(card, 1)
    with pytest.raises(OutOfFramesError) as caught:
        await mirror.fault(fresh.span)
    assert caught.value.errno == errnos.ENOMEM
    await mirror.fault(fresh.span)
