"""Drivers that hang, die, stop, refuse, answer twice, too late or too soon, or call from inside their own callbacks.

Each ends as the protocol says, and meanwhile `GetPending` names whoever everybody waits for.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import pytest

from hmm.errors import SegmentationFault, Signal, TimedOutError
from hmm.units import PAGE_SIZE
from hmm_client import Advice, Process
from hmm_client.results import Completed, Mapped
from hmm_proto.v1 import inspection_pb2, types_pb2

if TYPE_CHECKING:
    from tests.conftest import Daemon
    from tests.system.conftest import DriverProcess

pytestmark = pytest.mark.slow

SIZE = 16 * PAGE_SIZE
TIMEOUT_S = 60.0
"""Far more than anything takes; a busy machine is no failure."""
PAUSE_S = 0.01
"""Between two questions whether it is so."""
SOON_S = 0.5
"""A deadline for drivers that do not answer at all; nobody can look in time at what waits for them."""
IN_TIME_S = 3.0
"""A deadline for drivers that answer at first."""

StartDaemon = Callable[..., Awaitable["Daemon"]]
StartDriver = Callable[..., Awaitable["DriverProcess"]]


class Scene:
    """A program with some memory, and a driver that mirrors it and has faulted all of it in."""

    def __init__(self, daemon: Daemon, process: Process, mapped: Mapped, driver: DriverProcess) -> None:
        self.daemon = daemon
        self.client = process.client
        self.process = process
        self.mapped = mapped
        self.driver = driver
        self.mirror = 0

    async def munmap(self) -> Completed:
        """Unmap the first half."""
        return await self.process.munmap(self.mapped.address, SIZE // 2)

    async def discard(self) -> Completed:
        """Discard the first half, which stays mapped."""
        return await self.process.madvise(self.mapped.address, SIZE // 2, Advice.DONTNEED)

    async def pending(self) -> inspection_pb2.GetPendingResponse:
        """Who waits for whom."""
        response: inspection_pb2.GetPendingResponse = await self.client.channel.request(
            self.client.inspection.GetPending, inspection_pb2.GetPendingRequest()
        )
        return response

    async def waiting(self, name: str) -> inspection_pb2.PendingOperation:
        """Wait until a call of that name is pending and its event has left for the driver, and return it."""
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                for operation in (await self.pending()).operations:
                    sent = [event for event in operation.events if event.state == types_pb2.EVENT_STATE_SENT]
                    if operation.name == name and sent:
                        return operation
                await asyncio.sleep(PAUSE_S)

    async def mirror_statistics(self) -> inspection_pb2.MirrorStatistics:
        """Counters of the mirror."""
        response: inspection_pb2.GetStatisticsResponse = await self.client.channel.request(
            self.client.inspection.GetStatistics, inspection_pb2.GetStatisticsRequest()
        )
        (statistics,) = [one for one in response.mirrors if one.mirror_id == self.mirror]
        return statistics

    def named_meanwhile(self, operation: inspection_pb2.PendingOperation) -> None:
        """Assert that the pending operation says exactly who has to answer."""
        (event,) = operation.events
        assert event.mirror_id == self.mirror
        assert event.driver_name == "misbehaving"
        assert event.driver_pid == self.driver.process.pid
        assert event.state == types_pb2.EVENT_STATE_SENT


@pytest.fixture(scope="module")
def daemon_with(start_session_daemon: StartDaemon) -> Callable[..., Awaitable[Daemon]]:
    """Daemons by their settings: a scene minds nothing of those before it."""
    daemons: dict[tuple[tuple[str, object], ...], Daemon] = {}

    async def find(**settings: object) -> Daemon:
        key = tuple(settings.items())
        if key not in daemons:
            daemons[key] = await start_session_daemon(**settings)
        return daemons[key]

    return find


@pytest.fixture
async def set_up(daemon_with: StartDaemon, start_misbehaving: StartDriver) -> Callable[..., Awaitable[Scene]]:
    """Makes scenes: `await set_up(policy="fence", acknowledgement_s=SOON_S)`, on a patient daemon unless told so."""

    async def make(*, policy: str = "fence", **settings: object) -> Scene:
        daemon = await daemon_with(**settings)
        driver = await start_misbehaving(daemon)
        client = daemon.connect("program")
        process = await client.create_process("program")
        mapped = await process.mmap(SIZE)
        await process.write(mapped.address, b"before")
        scene = Scene(daemon, process, mapped, driver)
        answers_faults = settings.get("acknowledgement_s") != SOON_S
        scene.mirror = await driver.call("mirror", process=process.id, policy=policy, fault_events=answers_faults)
        assert await driver.call("fault", mirror=scene.mirror, start=mapped.address, end=mapped.span.end) == 16
        return scene

    return make


SetUp = Callable[..., Awaitable[Scene]]


@pytest.mark.parametrize(
    ("policy", "how"), [("fence", "hangs"), ("fail", "hangs"), ("block", "hangs"), ("fence", "is stopped")]
)
async def test_pending_names_the_driver_when_it_does_not_answer(set_up: SetUp, policy: str, how: str) -> None:
    """Whoever everybody waits for, whatever comes of it in the end: here its death."""
    scene = await set_up(policy=policy)
    if how == "hangs":
        await scene.driver.call("behave", how="hang")
    else:
        scene.driver.signal(signal.SIGSTOP)
    unmapping = asyncio.ensure_future(scene.munmap())
    scene.named_meanwhile(await scene.waiting("munmap"))
    scene.driver.signal(signal.SIGKILL)
    assert (await unmapping).fenced_mirrors == (scene.mirror,)


async def test_hanging_driver_is_fenced_when_the_deadline_passes(set_up: SetUp) -> None:
    """FENCE: the call completes and names the mirror; the driver's later accesses get DEVICE_LOST."""
    scene = await set_up(acknowledgement_s=SOON_S)
    await scene.driver.call("behave", how="hang")
    assert (await scene.munmap()).fenced_mirrors == (scene.mirror,)
    with pytest.raises(Exception, match="ENODEV"):
        await scene.driver.call("read", mirror=scene.mirror, address=scene.mapped.address + SIZE // 2, length=1)
    assert str(scene.mirror) in (await scene.driver.call("state"))["lost"]


async def test_hanging_driver_is_waited_for_when_its_policy_is_block(set_up: SetUp) -> None:
    """BLOCK: the call waits, as the kernel does; pending shows no deadline; it completes once the driver answers."""
    scene = await set_up(policy="block", acknowledgement_s=0.05)
    await scene.driver.call("behave", how="hang")
    unmapping = asyncio.ensure_future(scene.munmap())
    operation = await scene.waiting("munmap")
    while operation.age_ms < 200:
        operation = await scene.waiting("munmap")
    scene.named_meanwhile(operation)
    assert not operation.events[0].HasField("deadline_ms")
    assert operation.events[0].policy == types_pb2.DEADLINE_POLICY_BLOCK
    await scene.driver.call("go_on")
    assert (await unmapping).fenced_mirrors == ()


async def test_call_fails_and_changes_nothing_when_the_hanging_drivers_policy_is_fail(set_up: SetUp) -> None:
    """FAIL: ETIMEDOUT, memory as before; the late answer is counted, and then the mirror hears events again."""
    scene = await set_up(policy="fail", acknowledgement_s=IN_TIME_S)
    await scene.driver.call("behave", how="hang")
    with pytest.raises(TimedOutError):
        await scene.munmap()
    assert await scene.process.read(scene.mapped.address, 6) == b"before"
    assert (await scene.mirror_statistics()).abandoned == 1
    await scene.driver.call("go_on")
    assert (await scene.munmap()).fenced_mirrors == ()
    statistics = await scene.mirror_statistics()
    assert statistics.stale_answers == 1
    state = await scene.driver.call("state")
    assert [event["operation"] for event in state["events"] if event["type"] == "MUNMAP"] == ["munmap", "munmap"]


async def test_dead_driver_is_fenced_at_once_when_it_is_killed(set_up: SetUp) -> None:
    """SIGKILL: the broken stream fences its mirrors long before any deadline; calls that wait complete."""
    scene = await set_up()
    await scene.driver.call("behave", how="hang")
    unmapping = asyncio.ensure_future(scene.munmap())
    scene.named_meanwhile(await scene.waiting("munmap"))
    scene.driver.signal(signal.SIGKILL)
    assert (await unmapping).fenced_mirrors == (scene.mirror,)
    assert await scene.driver.ended() == -signal.SIGKILL
    assert not (await scene.pending()).operations
    await scene.process.write(scene.mapped.address + SIZE // 2, b"goes on")


async def test_stopped_driver_is_fenced_when_the_deadline_passes(set_up: SetUp) -> None:
    """SIGSTOP: the deadline for answers ends the waiting; when the driver goes on it learns that its mirror is lost."""
    scene = await set_up(acknowledgement_s=SOON_S)
    scene.driver.signal(signal.SIGSTOP)
    assert (await scene.munmap()).fenced_mirrors == (scene.mirror,)
    scene.driver.signal(signal.SIGCONT)
    with pytest.raises(Exception, match="ENODEV"):
        await scene.driver.call("read", mirror=scene.mirror, address=scene.mapped.address + SIZE // 2, length=1)


async def test_stopped_driver_is_fenced_when_it_answers_no_pings(set_up: SetUp) -> None:
    """SIGSTOP with a long deadline: the transport's ping finds the driver dead, and its mirrors are fenced."""
    scene = await set_up(keepalive_ms=300, ping_timeout_ms=2000)
    scene.driver.signal(signal.SIGSTOP)
    assert (await scene.munmap()).fenced_mirrors == (scene.mirror,)
    scene.driver.signal(signal.SIGCONT)
    assert await scene.driver.ended() == 1


async def test_refusing_driver_is_killed_when_it_refuses_an_invalidation(
    set_up: SetUp, start_misbehaving: StartDriver
) -> None:
    """2015: an error on an invalidation kills that mirror and no other; the call completes."""
    scene = await set_up()
    good = await start_misbehaving(scene.daemon)
    spared = await good.call("mirror", process=scene.process.id)
    await good.call("fault", mirror=spared, start=scene.mapped.address, end=scene.mapped.span.end)
    await scene.driver.call("behave", how="refuse")
    assert (await scene.munmap()).fenced_mirrors == ()
    state = await scene.driver.call("state")
    assert state["released"] == [scene.mirror]
    with pytest.raises(Exception, match="ENODEV"):
        await scene.driver.call("read", mirror=scene.mirror, address=scene.mapped.address + SIZE // 2, length=1)
    assert await good.call("read", mirror=spared, address=scene.mapped.address + SIZE // 2, length=1)


async def test_fault_fails_and_nothing_is_killed_when_the_driver_refuses_it(set_up: SetUp) -> None:
    """2015: an error on a fault goes to whoever faults, and kills nothing."""
    scene = await set_up()
    await scene.driver.call("behave", how="refuse_fault")
    with pytest.raises(Exception, match="ENOMEM"):
        await scene.driver.call(
            "fault", mirror=scene.mirror, start=scene.mapped.address, end=scene.mapped.span.end, write=True
        )
    await scene.driver.call("behave", how="answer")
    assert await scene.driver.call("read", mirror=scene.mirror, address=scene.mapped.address, length=6)


async def test_second_answer_changes_nothing_when_an_event_was_answered(set_up: SetUp) -> None:
    """Repeats are harmless; they are counted."""
    scene = await set_up()
    await scene.munmap()
    heard = (await scene.driver.call("state"))["events"][-1]
    await scene.driver.call("say", mirror=scene.mirror, sequence=heard["sequence"])
    await scene.driver.call("say", mirror=scene.mirror, sequence=heard["sequence"])
    half = scene.mapped.address + SIZE // 2
    assert await scene.driver.call("read", mirror=scene.mirror, address=half, length=1)
    await scene.process.munmap(half, SIZE // 2)
    statistics = await scene.mirror_statistics()
    assert (statistics.rejected_answers, statistics.stale_answers) == (0, 2)


async def test_answer_is_rejected_when_its_event_was_never_sent(set_up: SetUp) -> None:
    """An answer of the future is an error of the protocol: rejected and counted; the session goes on."""
    scene = await set_up()
    await scene.driver.call("say", mirror=scene.mirror, sequence=1000)
    assert await scene.driver.call("read", mirror=scene.mirror, address=scene.mapped.address, length=1)
    assert (await scene.mirror_statistics()).rejected_answers == 1
    await scene.driver.call("behave", how="hang")
    unmapping = asyncio.ensure_future(scene.munmap())
    await scene.waiting("munmap")
    await scene.driver.call("go_on")
    assert (await unmapping).fenced_mirrors == ()


async def test_late_answer_is_rejected_when_the_mirror_was_fenced(set_up: SetUp) -> None:
    """The answer that comes after the deadline does not bring the mirror back; the driver hears that it is lost."""
    scene = await set_up(acknowledgement_s=SOON_S)
    await scene.driver.call("behave", how="hang")
    assert (await scene.munmap()).fenced_mirrors == (scene.mirror,)
    await scene.driver.call("go_on")
    async with asyncio.timeout(TIMEOUT_S):
        while not (state := await scene.driver.call("state"))["lost"]:
            pass
    assert "DEVICE_LOST" in state["lost"][str(scene.mirror)]
    assert (await scene.mirror_statistics()).rejected_answers == 1


@pytest.mark.parametrize("call", ["fault", "munmap"])
async def test_call_inside_a_callback_fails_at_once_when_it_could_never_end(set_up: SetUp, call: str) -> None:
    """A fault on the event's range, or a call that changes VMAs of that space: EDEADLK, and the callback goes on."""
    scene = await set_up()
    await scene.driver.call("behave", how=call)
    assert (await scene.discard()).fenced_mirrors == ()
    assert (await scene.driver.call("state"))["inside"] == ["EDEADLK"]


async def test_fault_inside_a_callback_succeeds_when_it_is_elsewhere(set_up: SetUp) -> None:
    """Calls on other ranges are legal inside a callback, also when they end in an event to the same driver."""
    scene = await set_up()
    half = scene.mapped.address + SIZE // 2
    await scene.driver.call("behave", how="fault", start=half, end=half + PAGE_SIZE)
    assert (await scene.munmap()).fenced_mirrors == ()
    state = await scene.driver.call("state")
    assert state["inside"] == ["0"]
    assert state["events"][-1]["type"] == "DEVICE_RFAULT"


async def test_pending_names_both_when_a_fault_inside_a_callback_is_not_marked(set_up: SetUp) -> None:
    """Without the mark the daemon cannot know: the two wait for one another, here until the driver is killed."""
    scene = await set_up()
    await scene.driver.call("behave", how="fault_unmarked")
    discarding = asyncio.ensure_future(scene.discard())
    madvise = await scene.waiting("madvise")
    async with asyncio.timeout(TIMEOUT_S):
        while not (faults := [one for one in (await scene.pending()).operations if one.name == "fault"]):
            pass
    assert madvise.operation_id in faults[0].blocked_by
    scene.driver.signal(signal.SIGKILL)
    assert (await discarding).fenced_mirrors == (scene.mirror,)


async def test_deadline_ends_a_fault_inside_a_callback_that_is_not_marked(set_up: SetUp) -> None:
    """It fences the mirror, whose fault ends as that of a lost one."""
    scene = await set_up(acknowledgement_s=SOON_S)
    await scene.driver.call("behave", how="fault_unmarked")
    assert (await scene.discard()).fenced_mirrors == (scene.mirror,)
    async with asyncio.timeout(TIMEOUT_S):
        while not (state := await scene.driver.call("state"))["inside"]:
            pass
    assert state["inside"] == ["ENODEV"]


async def test_calls_end_when_the_daemon_drains_while_a_driver_hangs(set_up: SetUp) -> None:
    """SIGTERM: calls that wait are given time, then whoever they wait for is fenced, also under BLOCK; exit code 0."""
    scene = await set_up(policy="block", acknowledgement_s=0.05, drain_s=0.2)
    await scene.driver.call("behave", how="hang")
    unmapping = asyncio.ensure_future(scene.munmap())
    await scene.waiting("munmap")
    scene.daemon.process.send_signal(signal.SIGTERM)
    assert (await unmapping).fenced_mirrors == (scene.mirror,)
    assert await scene.daemon.process.wait() == 0


# ---- with pages on board


async def on_board(set_up: SetUp, **settings: object) -> Scene:
    """A scene whose first half is in the driver's memory."""
    scene = await set_up(**settings)
    start = scene.mapped.address
    assert await scene.driver.call("migrate", mirror=scene.mirror, start=start, end=start + SIZE // 2) == 8
    return scene


async def is_lost(scene: Scene, page: int = 0) -> bool:
    """Whether a CPU that touches a page gets SIGBUS: its contents are lost, and nobody says they were zeroes."""
    with pytest.raises(SegmentationFault) as caught:
        await scene.process.read(scene.mapped.address + page * PAGE_SIZE, 1)
    return caught.value.signal is Signal.BUS_POISON


async def test_pages_are_lost_with_a_driver_that_is_killed(set_up: SetUp) -> None:
    """What was in its memory alone is poison at once; the rest of the process goes on."""
    scene = await on_board(set_up)
    scene.driver.signal(signal.SIGKILL)
    assert await scene.driver.ended() == -signal.SIGKILL
    assert await is_lost(scene)
    assert await scene.process.read(scene.mapped.address + SIZE // 2, 1) == b"\0"
    await scene.discard()
    assert await scene.process.read(scene.mapped.address, 6) == bytes(6)


async def test_cpu_that_waits_for_a_page_gets_sigbus_when_the_driver_is_killed(set_up: SetUp) -> None:
    """In the middle of a copy: pending names who has the page, and its death ends the waiting."""
    scene = await on_board(set_up)
    await scene.driver.call("behave", how="hang")
    reading = asyncio.ensure_future(scene.process.read(scene.mapped.address, 6))
    operation = await scene.waiting("read_memory")
    scene.named_meanwhile(operation)
    assert "copy from device by its driver" in operation.waits_for
    scene.driver.signal(signal.SIGKILL)
    with pytest.raises(SegmentationFault, match="BUS_POISON"):
        await reading


async def test_pages_are_lost_when_a_driver_hangs_in_a_copy(set_up: SetUp) -> None:
    """FENCE: the deadline ends it, and all that the driver had is lost with it."""
    scene = await on_board(set_up, acknowledgement_s=IN_TIME_S)
    await scene.driver.call("behave", how="hang")
    with pytest.raises(SegmentationFault, match="BUS_POISON"):
        await scene.process.read(scene.mapped.address, 6)
    assert await is_lost(scene, page=7)
    with pytest.raises(Exception, match="ENODEV"):
        await scene.driver.call("read", mirror=scene.mirror, address=scene.mapped.address + SIZE // 2, length=1)


async def test_pages_stay_when_a_hanging_drivers_policy_is_fail(set_up: SetUp) -> None:
    """FAIL: the read ends with ETIMEDOUT and the page is where it was; once the driver answers it can be read."""
    scene = await on_board(set_up, policy="fail", acknowledgement_s=IN_TIME_S)
    await scene.driver.call("behave", how="hang")
    with pytest.raises(TimedOutError):
        await scene.process.read(scene.mapped.address, 6)
    await scene.driver.call("go_on")
    assert await scene.process.read(scene.mapped.address, 6) == b"before"


async def test_page_is_lost_and_nothing_else_when_its_copy_fails(set_up: SetUp) -> None:
    """A result that is not 0: this page is poison, the mirror lives and gives the others back."""
    scene = await on_board(set_up)
    await scene.driver.call("behave", how="break_pages")
    assert await is_lost(scene)
    await scene.driver.call("behave", how="answer")
    assert await scene.process.read(scene.mapped.address + PAGE_SIZE, 1) == b"\0"
    start = scene.mapped.address + SIZE // 2
    assert await scene.driver.call("fault", mirror=scene.mirror, start=start, end=start + PAGE_SIZE) == 1


async def test_mirror_is_killed_when_it_answers_a_copy_with_an_error(set_up: SetUp) -> None:
    """An error instead of results: everything the driver has is lost, and `release` ends its mirror."""
    scene = await on_board(set_up)
    await scene.driver.call("behave", how="refuse")
    assert await is_lost(scene)
    assert await is_lost(scene, page=7)
    assert (await scene.driver.call("state"))["released"] == [scene.mirror]


async def test_driver_that_leaves_in_good_order_loses_nothing(set_up: SetUp) -> None:
    """Unregistering writes back first."""
    scene = await on_board(set_up)
    await scene.driver.call("unregister", mirror=scene.mirror)
    assert await scene.process.read(scene.mapped.address, 6) == b"before"


async def test_migration_moves_nothing_when_the_driver_hangs_in_its_copy(set_up: SetUp) -> None:
    """On the way there nothing is lost: the pages never left."""
    scene = await set_up(acknowledgement_s=SOON_S)
    await scene.driver.call("behave", how="hang")
    start = scene.mapped.address
    with pytest.raises(Exception, match="ENODEV"):
        await scene.driver.call("migrate", mirror=scene.mirror, start=start, end=start + PAGE_SIZE)
    assert await scene.process.read(start, 6) == b"before"
