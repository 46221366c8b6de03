"""Misbehaviour: any driver's events late, its answers wrong, per mirror, and changed while it runs."""

from __future__ import annotations

import asyncio
import errno as errnos
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest

from hmm.errors import DeviceLostError, HmmError, TimedOutError
from hmm.events import EventType
from hmm.units import PAGE_SIZE
from hmm_client import Advice, DeadlinePolicy, Event, Mirror, Process, TableDriver, sync
from hmm_client.harness import (
    FAULTS,
    Act,
    Misbehaviour,
    delay,
    drop_stream,
    hang,
    hold,
    kill_process,
    late,
    nth,
    out_of_order,
    refuse,
    stop_reading,
    twice,
)
from hmm_proto.v1 import inspection_pb2

if TYPE_CHECKING:
    from tests.conftest import Daemon

NPAGES = 16
SIZE = NPAGES * PAGE_SIZE
TIMEOUT_S = 60.0
"""Far more than anything takes; a busy machine is no failure."""


class Recorder(TableDriver):
    """Notes what it heard, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[str, int]] = []
        self.lost_because = ""
        self.is_lost = asyncio.Event()

    def update(self, event: Event) -> None:
        """Note and apply."""
        if not event.is_fault:
            self.heard.append((event.type.name, event.sequence))
        super().update(event)

    def lost(self, mirror: Mirror, why: str) -> None:
        """Note."""
        self.lost_because = why
        self.is_lost.set()


class Scene:
    """A process with memory, and a mirror of it with a script."""

    def __init__(self, daemon: Daemon) -> None:
        self.client = daemon.connect("program")
        self.gpu = daemon.connect("gpu")
        self.driver = Recorder()
        self.script = Misbehaviour()
        self.process: Process
        self.mirror: Mirror
        self.base = 0

    async def set_up(self, policy: DeadlinePolicy) -> Scene:
        """Map, write, mirror, fault everything in."""
        self.process = await self.client.create_process("program")
        mapped = await self.process.mmap(SIZE)
        self.base = mapped.address
        await self.process.write(self.base, b"before")
        device = await self.gpu.register_device("gpu")
        self.mirror = await device.mirror(self.process, self.driver, policy=policy, misbehaviour=self.script)
        await self.mirror.fault(mapped.span, write=True)
        return self

    async def discard(self, page: int = 0) -> Any:
        """MADV_DONTNEED of one page."""
        return await self.process.madvise(self.base + page * PAGE_SIZE, PAGE_SIZE, Advice.DONTNEED)

    async def statistics(self) -> inspection_pb2.MirrorStatistics:
        """Counters of the mirror."""
        request = inspection_pb2.GetStatisticsRequest()
        response = await self.client.channel.request(self.client.inspection.GetStatistics, request)
        (mine,) = [one for one in response.mirrors if one.mirror_id == self.mirror.id]
        assert isinstance(mine, inspection_pb2.MirrorStatistics)
        return mine


SetUp = Callable[..., Awaitable[Scene]]


@pytest.fixture
async def set_up(harness_daemon: Daemon, hasty_daemon: Daemon) -> AsyncIterator[SetUp]:
    """Makes scenes: `await set_up(hasty=True)` on a daemon whose drivers have to answer soon."""
    scenes: list[Scene] = []

    async def make(policy: DeadlinePolicy = DeadlinePolicy.FENCE, *, hasty: bool = False) -> Scene:
        scene = await Scene(hasty_daemon if hasty else harness_daemon).set_up(policy)
        scenes.append(scene)
        return scene

    yield make
    for scene in scenes:
        await scene.gpu.close()
        await scene.client.close()


async def test_driver_has_not_heard_when_its_event_is_held(set_up: SetUp) -> None:
    """The device still uses the pages; after release the driver hears, and the call ends."""
    scene = await set_up()
    scene.script.behave(hold())
    discarding = asyncio.ensure_future(scene.discard())
    (held,) = await scene.script.wait_held()
    assert held.type is EventType.MIGRATE
    assert scene.driver.heard == []
    assert await scene.mirror.read([(scene.base, 6)]) == b"before"
    scene.script.release()
    assert (await discarding).fenced_mirrors == ()
    assert scene.driver.heard == [("MIGRATE", held.sequence)]


async def test_events_stay_in_order_when_the_first_is_held(set_up: SetUp) -> None:
    """What comes behind a held event waits for it, although the script has been changed meanwhile."""
    scene = await set_up()
    other = await scene.process.mmap(PAGE_SIZE)
    file = await scene.client.open_file("shared", create=True)
    await file.truncate(PAGE_SIZE)
    await scene.mirror.fault(other.span, write=True)
    scene.script.behave(hold())
    first = asyncio.ensure_future(scene.discard())
    await scene.script.wait_held()
    scene.script.behave(delay(0))
    second = asyncio.ensure_future(scene.process.munmap(other.address, PAGE_SIZE))
    scene.script.release()
    await asyncio.gather(first, second)
    assert [name for name, _ in scene.driver.heard] == ["MIGRATE", "MUNMAP"]
    assert [act for _, act in scene.script.taken] == [hold(), delay(0)]


async def test_call_takes_as_long_as_the_answer_when_it_is_delayed(set_up: SetUp) -> None:
    """A slow driver is waited for."""
    scene = await set_up()
    scene.script.behave(delay(0.1))
    began = asyncio.get_running_loop().time()
    await scene.discard()
    assert asyncio.get_running_loop().time() - began >= 0.1


@pytest.mark.slow
async def test_mirror_is_fenced_when_its_driver_hangs(set_up: SetUp) -> None:
    """FENCE: the call names the mirror; the driver never hears of the event."""
    scene = await set_up(hasty=True)
    scene.script.behave(hang())
    assert (await scene.discard()).fenced_mirrors == (scene.mirror.id,)
    assert scene.driver.heard == []
    with pytest.raises(DeviceLostError):
        await scene.mirror.read([(scene.base, 1)])


@pytest.mark.slow
async def test_answer_is_rejected_when_it_is_late_and_the_mirror_was_fenced(set_up: SetUp) -> None:
    """The driver hears late, and from the rejection that it is lost."""
    scene = await set_up(hasty=True)
    scene.script.behave(late())
    assert (await scene.discard()).fenced_mirrors == (scene.mirror.id,)
    await asyncio.wait_for(scene.driver.is_lost.wait(), TIMEOUT_S)
    assert "DEVICE_LOST" in scene.driver.lost_because
    assert (await scene.statistics()).rejected_answers == 1


@pytest.mark.slow
async def test_late_answer_is_counted_when_the_policy_is_fail(set_up: SetUp) -> None:
    """FAIL: the call failed and changed nothing; the late answer is stale, and the mirror hears events again."""
    scene = await set_up(DeadlinePolicy.FAIL, hasty=True)
    scene.script.behave(*nth(1, late()))
    with pytest.raises(TimedOutError):
        await scene.discard()
    await scene.discard()
    assert (await scene.statistics()).stale_answers == 1
    assert [name for name, _ in scene.driver.heard] == ["MIGRATE", "MIGRATE"]


async def test_mirror_is_killed_when_its_driver_refuses(set_up: SetUp) -> None:
    """2015: an errno on an invalidation kills the mirror; the call completes."""
    scene = await set_up()
    scene.script.behave(refuse(errnos.ENOMEM))
    assert (await scene.discard()).fenced_mirrors == ()
    assert scene.driver.heard == []
    assert scene.mirror.released
    assert set((await scene.statistics()).events_by_type) == {"DEVICE_WFAULT", "MIGRATE", "MUNMAP", "RELEASE"}


async def test_fault_fails_when_the_nth_of_its_events_is_refused(set_up: SetUp) -> None:
    """`only` and `nth`: the third fault's event is refused, and nothing is killed."""
    scene = await set_up()
    scene.script.behave(*nth(3, refuse(errnos.ENOMEM)), only=FAULTS)
    ends = []
    for _ in range(4):
        try:
            await scene.mirror.fault((await scene.process.mmap(PAGE_SIZE)).span)
            ends.append(0)
        except HmmError as error:
            ends.append(error.errno)
    assert ends == [0, 0, errnos.ENOMEM, 0]


async def test_second_answer_is_counted_when_it_comes_twice(set_up: SetUp) -> None:
    """Repeats are harmless."""
    scene = await set_up()
    scene.script.behave(twice())
    await scene.discard(0)
    await scene.discard(1)
    statistics = await scene.statistics()
    assert (statistics.acknowledged, statistics.rejected_answers) == (3, 0)
    assert statistics.stale_answers >= 1


async def test_answers_count_when_they_come_out_of_order(set_up: SetUp) -> None:
    """An answer waits for that to the mirror's next event, here a fault's; then both calls have ended."""
    scene = await set_up()
    other = await scene.process.mmap(PAGE_SIZE)
    scene.script.behave(*nth(1, out_of_order()))
    first = asyncio.ensure_future(scene.discard())
    await scene.script.wait_taken()
    assert scene.driver.heard
    assert not first.done()
    await scene.mirror.fault(other.span)
    assert (await first).fenced_mirrors == ()
    assert (await scene.statistics()).rejected_answers == 0


async def test_mirrors_are_fenced_at_once_when_the_stream_is_dropped(set_up: SetUp) -> None:
    """A stream that ends without Bye is a death; the call does not wait for a deadline."""
    scene = await set_up()
    scene.script.behave(drop_stream())
    assert (await scene.discard()).fenced_mirrors == (scene.mirror.id,)
    await asyncio.wait_for(scene.driver.is_lost.wait(), TIMEOUT_S)
    assert scene.driver.lost_because


@pytest.mark.slow
async def test_mirror_is_fenced_when_its_driver_stops_reading(set_up: SetUp) -> None:
    """Answers go out, events are not read: the deadline is the only detector."""
    scene = await set_up(hasty=True)
    scene.script.behave(stop_reading())
    assert (await scene.discard(0)).fenced_mirrors == ()
    assert (await scene.discard(1)).fenced_mirrors == (scene.mirror.id,)
    assert len(scene.driver.heard) == 1
    scene.mirror.session.go_on_reading()
    await asyncio.wait_for(scene.script.wait_taken(2), TIMEOUT_S)


async def test_session_is_closed_when_its_reader_was_cancelled_while_it_did_not_read(set_up: SetUp) -> None:
    """As a loop that ends does with all its tasks, before whoever made the session closes it."""
    scene = await set_up()
    scene.script.behave(stop_reading())
    await scene.discard(0)
    session = scene.mirror.session
    assert session._reader is not None
    session._reader.cancel()
    await asyncio.wait([session._reader])
    await session.close()
    assert session.lost


async def test_script_is_refused_when_it_would_end_the_wrong_process() -> None:
    """Killing and stopping are for drivers in processes of their own."""
    with pytest.raises(ValueError, match="this process would be killed"):
        Misbehaviour(kill_process())
    with pytest.raises(ValueError, match="at least one act"):
        Misbehaviour().behave()
    acts: tuple[Act, ...] = (kill_process(),)
    assert Misbehaviour(*acts, own_process=True).own_process


async def test_synchronous_driver_is_held_and_released_from_another_thread(daemon: Daemon) -> None:
    """`hmm_client.sync` takes the same scripts."""
    script = Misbehaviour(hold())

    def use() -> int:
        with sync.connect(daemon.target) as client:
            process = client.create_process("program")
            mapped = process.mmap(SIZE)
            mirror = client.register_device("gpu").mirror(process, sync.Driver(), misbehaviour=script)
            mirror.fault(mapped.span)
            loop = asyncio.new_event_loop()
            unmapping = loop.run_in_executor(None, process.munmap, mapped.address, SIZE)
            while not script.held:
                pass
            entries = mirror.read_table(mapped.span)
            script.release()
            loop.run_until_complete(unmapping)
            loop.close()
            return int((entries != 0).sum())

    assert await asyncio.to_thread(use) == NPAGES


@pytest.mark.parametrize("number", [0, -1])
def test_nth_is_refused_when_there_is_no_such_event(number: int) -> None:
    """Events are counted from 1; 0 is not taken for the next one."""
    with pytest.raises(ValueError, match=f"no event number {number}: 1 is the next one"):
        nth(number, hang())
