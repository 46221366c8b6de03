"""An event for many mirrors whose drivers have nothing to do: noted once, answered once, and still heard by each."""

from __future__ import annotations

import asyncio
import errno as errnos
from collections.abc import Awaitable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import pytest

import hmm_client
from hmm.units import PAGE_SIZE, AddressRange
from hmm_client import Driver, Event, Mirror
from hmm_client.session import FEW_MIRRORS
from hmm_client.together import REMEMBERED_EVENTS
from hmm_proto.v1 import device_pb2, event_pb2, range_pb2, types_pb2

if TYPE_CHECKING:
    from tests.client.conftest import ScriptedDaemon

Scripted: TypeAlias = "tuple[ScriptedDaemon, hmm_client.Client]"
START = 0x7000_0000_0000
SPAN = AddressRange(START, START + 4 * PAGE_SIZE)
MANY = FEW_MIRRORS + 2
FIRST = 31


class Counting(Driver):
    """Counts what it is told."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, int]] = []

    def update(self, event: Event) -> None:
        """Count."""
        self.heard.append((event.mirror.id, event.sequence))


class Leaving(Driver):
    """Takes its time to stop."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()

    async def release(self, mirror: Mirror) -> None:
        """Wait."""
        await self.go_on.wait()


class Scene:
    """Mirrors of one session, with ids from FIRST on."""

    def __init__(self, scripted: Scripted) -> None:
        self.daemon, self.client = scripted
        self.mirrors: list[Mirror] = []

    async def set_up(self, *drivers: Driver) -> None:
        """A device, and a mirror for each driver."""
        registering = asyncio.ensure_future(self.client.register_device("gpu"))
        await self.daemon.received()
        call = await self.daemon.called("register_device")
        self.daemon.reply(call, register_device=device_pb2.RegisterDeviceResponse(device_id=4))
        self.device = await registering
        for driver in drivers:
            await self.add(driver)

    async def add(self, driver: Driver) -> Mirror:
        """One mirror more."""
        mirroring = asyncio.ensure_future(self.device.mirror(self.client.process(12), driver))
        response = device_pb2.RegisterMirrorResponse(mirror_id=FIRST + len(self.mirrors), space_id=2)
        self.daemon.reply(await self.daemon.called("register_mirror"), register_mirror=response)
        self.mirrors.append(await mirroring)
        return self.mirrors[-1]

    def tell(
        self,
        sequences: list[int],
        *,
        first: int = 0,
        start: int = START,
        etype: types_pb2.EventType.ValueType = types_pb2.EVENT_TYPE_MIGRATE,
    ) -> None:
        """One event for as many mirrors as there are sequences."""
        ranges = range_pb2.AddressRanges(starts=[start], ends=[start + PAGE_SIZE])
        event = event_pb2.Event(
            mirror_ids=[mirror.id for mirror in self.mirrors[first : first + len(sequences)]],
            event_sequences=sequences,
            type=etype,
            ranges=None if etype == types_pb2.EVENT_TYPE_RELEASE else ranges,
        )
        self.daemon.send(events=[event])

    async def answered(self) -> dict[int, int]:
        """What the next message acknowledges, by mirror: of events in a row, which one message may answer, the last."""
        message = await self.daemon.acknowledged()
        assert not message.single_mirror_ids
        assert not message.answers
        marks: dict[int, int] = {}
        for mirror_id, up_to in zip(message.mirror_ids, message.acknowledged_up_to, strict=True):
            assert marks.get(mirror_id, 0) < up_to
            marks[mirror_id] = up_to
        return marks

    @property
    def ids(self) -> list[int]:
        """Of all mirrors."""
        return [mirror.id for mirror in self.mirrors]


@pytest.fixture
async def scene(scripted: Scripted) -> Scene:
    """As many mirrors as are told together, none of whose drivers does anything."""
    scene = Scene(scripted)
    await scene.set_up(*(Driver() for _ in range(MANY)))
    return scene


async def test_event_is_heard_and_answered_by_each_when_all_are_told_together(scene: Scene) -> None:
    """Each under its own number; `heard` says so to accesses and faults."""
    for turn in (1, 2, 3):
        scene.tell([turn] * MANY)
        assert await scene.answered() == dict.fromkeys(scene.ids, turn)
        assert [mirror.heard for mirror in scene.mirrors] == [turn] * MANY


async def test_numbers_differ_when_one_has_heard_something_alone(scene: Scene) -> None:
    """What one mirror heard by itself, before and between, keeps its place."""
    scene.tell([1], first=2)
    assert await scene.answered() == {FIRST + 2: 1}
    scene.tell([1, 1, 2] + [1] * (MANY - 3))
    assert await scene.answered() == dict.fromkeys(scene.ids, 1) | {FIRST + 2: 2}
    scene.tell([3], first=2)
    assert await scene.answered() == {FIRST + 2: 3}
    assert scene.mirrors[2].heard == 3
    scene.tell([2, 2, 4] + [2] * (MANY - 3))
    assert await scene.answered() == dict.fromkeys(scene.ids, 2) | {FIRST + 2: 4}


async def test_update_is_called_of_those_drivers_that_have_one(scripted: Scripted) -> None:
    """In one event for both kinds, everybody answers."""
    scene = Scene(scripted)
    counting = Counting()
    await scene.set_up(*(counting if number in (1, 4) else Driver() for number in range(MANY)))
    for turn in (1, 2):
        scene.tell([turn] * MANY)
        assert await scene.answered() == dict.fromkeys(scene.ids, turn)
    assert counting.heard == [(FIRST + 1, 1), (FIRST + 4, 1), (FIRST + 1, 2), (FIRST + 4, 2)]


async def test_driver_answers_for_itself_when_it_has_more_to_say(scripted: Scripted) -> None:
    """One fails, one reports pages, one has to wait; the others are answered for at once, and the next event too."""
    scene, go_on = Scene(scripted), asyncio.Event()

    class Failing(Driver):
        def update(self, event: Event) -> None:
            raise OSError(errnos.ENOMEM, "no memory")

    class Reporting(Driver):
        def update(self, event: Event) -> tuple[AddressRange, ...]:
            return event.spans

    class Waiting(Driver):
        def update(self, event: Event) -> Awaitable[None]:
            return self._wait()

        async def _wait(self) -> None:
            await go_on.wait()

    await scene.set_up(Failing(), Reporting(), Waiting(), *(Counting() for _ in range(MANY - 3)))
    scene.tell([1] * MANY)
    message = await scene.daemon.acknowledged()
    assert dict(zip(message.mirror_ids, message.acknowledged_up_to, strict=True)) == dict.fromkeys(scene.ids[3:], 1)
    assert [(one.mirror_id, one.errno, len(one.dirty.starts)) for one in message.answers] == [
        (FIRST, errnos.ENOMEM, 0),
        (FIRST + 1, 0, 1),
    ]
    assert [mirror.heard for mirror in scene.mirrors] == [1] * MANY
    go_on.set()
    assert await scene.answered() == {FIRST + 2: 1}


async def test_event_waits_for_the_callback_before_it_when_one_is_running(scripted: Scripted) -> None:
    """A release that takes its time: the next event is answered by the others at once, by this one in order."""
    scene, leaving = Scene(scripted), Leaving()
    await scene.set_up(leaving, *(Driver() for _ in range(MANY - 1)))
    scene.tell([1], etype=types_pb2.EVENT_TYPE_RELEASE)
    scene.tell([2] + [1] * (MANY - 1))
    assert await scene.answered() == dict.fromkeys(scene.ids[1:], 1)
    leaving.go_on.set()
    assert await scene.answered() == {FIRST: 2}


async def test_fault_result_is_stale_when_what_was_told_together_takes_it_back(scene: Scene) -> None:
    """Only where ranges overlap; the same holds after the group has changed, and beyond what is remembered."""
    mirror = scene.mirrors[3]
    faulting = asyncio.ensure_future(mirror.fault(SPAN))
    response = device_pb2.FaultResponse(
        result=types_pb2.CallResult(operation_id=7),
        range_ends=[SPAN.end],
        range_errnos=[0],
        entries=np.full(4, 4, "<u8").tobytes(),
        last_event_sequence=0,
    )
    scene.daemon.reply(await scene.daemon.called("fault"), fault=response)
    faulted = await faulting
    scene.tell([1] * MANY, start=SPAN.end)
    await scene.answered()
    assert not mirror.is_stale(faulted)
    await scene.add(Driver())
    assert mirror.heard == 1
    assert not mirror.is_stale(faulted)
    scene.tell([2] * MANY + [1])
    await scene.answered()
    assert mirror.is_stale(faulted)
    assert not mirror.has_heard_since(2, faulted.starts, faulted.ends)
    for turn in range(3, REMEMBERED_EVENTS + 3):
        scene.tell([turn] * MANY + [turn - 1], start=SPAN.end)
    while mirror.heard < REMEMBERED_EVENTS + 2:
        await scene.answered()
    beyond = np.array([SPAN.end + 8 * PAGE_SIZE], np.uint64)
    assert mirror.has_heard_since(1, beyond, beyond + np.uint64(PAGE_SIZE))
    assert not mirror.has_heard_since(2, beyond, beyond + np.uint64(PAGE_SIZE))


async def test_mirror_is_told_by_itself_when_somebody_stands_between(scene: Scene) -> None:
    """Whoever is placed before one of the drivers gets its event; the others are answered for."""
    scene.tell([1] * MANY)
    await scene.answered()
    held: list[Event] = []

    class Between:
        def deliver(self, event: Event, deliver: object, answer: object) -> None:
            held.append(event)

        def finish(self, event: Event, result: object, answer: object) -> None:
            raise AssertionError

        def forget(self, mirror_id: int) -> None:
            held.clear()

    scene.mirrors[0].between = Between()  # type: ignore[assignment]
    scene.tell([2] * MANY)
    assert await scene.answered() == dict.fromkeys(scene.ids[1:], 2)
    assert [(event.mirror.id, event.sequence) for event in held] == [(FIRST, 2)]
