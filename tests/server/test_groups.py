"""Mirrors of one driver that hear the same: told in one event, answered in one message, counted each for itself."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from hmm_proto.v1 import event_pb2, types_pb2

PAGE = 4096
BASE = 0x10000000000
END = BASE + 16 * PAGE


class Scene:
    """A process, and a driver that mirrors it on several devices."""

    def __init__(self, served: Any) -> None:
        self.served = served
        self.mirrors: list[int] = []

    async def set_up(self, mirrors: int, **fields: Any) -> None:
        """Map the process and register."""
        self.pid = await self.served.new_process()
        await self.served.mmap(self.pid, BASE, END)
        self.driver = await self.served.driver()
        for _ in range(mirrors):
            await self.add(**fields)

    async def add(self, **fields: Any) -> int:
        """One mirror more."""
        self.mirrors.append(await self.driver.mirror(self.pid, f"gpu{len(self.mirrors)}", **fields))
        return self.mirrors[-1]

    def unmap(self, page: int) -> asyncio.Future[Any]:
        """Begin to unmap a page."""
        return asyncio.ensure_future(self.served.munmap(self.pid, BASE + page * PAGE, BASE + (page + 1) * PAGE))

    async def unmapped(self, page: int) -> event_pb2.Event:
        """Unmap a page; all answer in one message."""
        unmapping = self.unmap(page)
        event: event_pb2.Event = await self.driver.events.get()
        await self.driver.acknowledge(event)
        assert (await unmapping).result.errno == 0
        return event

    async def counted(self) -> list[tuple[int, ...]]:
        """Of each mirror: events acknowledged, by type, by reason, ranges, latencies."""
        statistics = await self.served.statistics()
        return [
            (
                one.acknowledged,
                one.events_by_type["MUNMAP"],
                one.events_by_reason["UNMAP"],
                one.ranges,
                one.acknowledgement.count,
            )
            for one in statistics.mirrors
        ]

    @property
    def stream(self) -> Any:
        """The driver's stream in the daemon."""
        return next(iter(self.served.daemon.streams.open.values()))


@pytest.fixture
async def scene(served: Any) -> Scene:
    """Three mirrors."""
    scene = Scene(served)
    await scene.set_up(3)
    return scene


async def test_statistics_count_for_each_mirror_what_was_told_to_all(scene: Scene) -> None:
    """Also when one comes later, one answers for itself, and one leaves."""
    for page in range(3):
        await scene.unmapped(page)
    assert await scene.counted() == [(3, 3, 3, 3, 3)] * 3
    await scene.add()
    await scene.unmapped(3)
    assert await scene.counted() == [(4, 4, 4, 4, 4)] * 3 + [(1, 1, 1, 1, 1)]
    unmapping = scene.unmap(4)
    event = await scene.driver.events.get()
    for mirror_id, sequence in zip(event.mirror_ids, event.event_sequences, strict=True):
        await scene.driver.answer(mirror_ids=[mirror_id], acknowledged_up_to=[sequence])
    await unmapping
    assert await scene.counted() == [(5, 5, 5, 5, 5)] * 3 + [(2, 2, 2, 2, 2)]
    assert (scene.stream.postings, scene.stream.mailbox.in_flight) == ([], 0)


async def test_answer_to_an_event_that_was_never_sent_names_the_last_one_when_all_were_told_together(
    scene: Scene,
) -> None:
    """Numbers of what was told to all are known of each; a repeat does no harm."""
    event = await scene.unmapped(0)
    await scene.driver.acknowledge(event)
    await scene.driver.answer(mirror_ids=scene.mirrors, acknowledged_up_to=[1, 1, 2])
    violation = await scene.driver.violations.get()
    assert (violation.mirror_id, violation.rule) == (
        scene.mirrors[2],
        "event 2 was never sent; the last one is 1",
    )
    assert scene.driver.violations.empty()


async def test_pending_names_each_mirror_of_a_group_that_has_not_answered(scene: Scene) -> None:
    """And when one of them is lost, the answers of the others count."""
    unmapping = scene.unmap(0)
    event = await scene.driver.events.get()
    await scene.driver.answer(mirror_ids=event.mirror_ids[:1], acknowledged_up_to=event.event_sequences[:1])
    await scene.served.until_answered(scene.mirrors[0])
    (operation,) = (await scene.served.pending()).operations
    assert [(one.mirror_id, one.state) for one in operation.events] == [
        (mirror, types_pb2.EVENT_STATE_SENT) for mirror in scene.mirrors[1:]
    ]
    scene.served.daemon.executor.fence(scene.mirrors[2], "a test")
    await scene.driver.acknowledge(event)
    result = (await unmapping).result
    assert list(result.fenced_mirrors) == scene.mirrors[2:]
    assert (scene.stream.postings, scene.stream.mailbox.in_flight) == ([], 0)


async def test_one_message_answers_events_of_several_calls(scene: Scene) -> None:
    """`acknowledged_up_to` covers what came before, of other calls and of faults."""
    await scene.driver.fault(scene.mirrors[1], BASE + 8 * PAGE, END)
    first = scene.unmap(0)
    one = await scene.driver.events.get()
    other_pid = await scene.served.new_process()
    await scene.served.mmap(other_pid, BASE, END)
    elsewhere = [await scene.driver.mirror(other_pid, f"other{n}") for n in range(2)]
    second = asyncio.ensure_future(scene.served.munmap(other_pid, BASE, END))
    two = await scene.driver.events.get()
    assert list(two.mirror_ids) == elsewhere
    await scene.driver.answer(
        mirror_ids=[*one.mirror_ids, *two.mirror_ids],
        acknowledged_up_to=[*one.event_sequences, *two.event_sequences],
    )
    assert [(await call).result.errno for call in (first, second)] == [0, 0]
    assert (scene.stream.postings, scene.stream.mailbox.in_flight) == ([], 0)


async def test_mirrors_of_two_drivers_are_two_groups(scene: Scene) -> None:
    """Each driver is told of its own, under their own numbers, and both are waited for."""
    other = await scene.served.driver()
    theirs = [await other.mirror(scene.pid, f"theirs{n}") for n in range(2)]
    for page in range(2):
        unmapping = scene.unmap(page)
        ours, others = await scene.driver.events.get(), await other.events.get()
        assert (list(ours.mirror_ids), list(others.mirror_ids)) == (scene.mirrors, theirs)
        assert [*ours.event_sequences, *others.event_sequences] == [page + 1] * 5
        await other.acknowledge(others)
        await scene.served.until_answered(*theirs)
        (operation,) = (await scene.served.pending()).operations
        assert [one.mirror_id for one in operation.events] == scene.mirrors
        await scene.driver.acknowledge(ours)
        assert (await unmapping).result.errno == 0
    assert [counts[0] for counts in await scene.counted()] == [2] * 5


async def test_abandoned_event_still_leaves_when_the_window_opens(serve: Any) -> None:
    """It waited for credit beyond its deadline; its mirrors answer it late, and then hear of the next."""
    scene = Scene(await serve(credit=1))
    blocked = await scene.served.new_process()
    await scene.served.mmap(blocked, BASE, END)
    await scene.set_up(2, policy=types_pb2.DEADLINE_POLICY_FAIL)
    await scene.driver.mirror(blocked, "slow", policy=types_pb2.DEADLINE_POLICY_BLOCK)
    waiting = asyncio.ensure_future(scene.served.munmap(blocked, BASE, END))
    first = await scene.driver.events.get()
    abandoned = scene.unmap(0)
    await scene.served.until(lambda: len(scene.served.daemon.machine.operations) == 2)
    await scene.served.let_deadlines_pass()
    assert (await abandoned).result.errno
    await scene.driver.acknowledge(first)
    await waiting
    await scene.driver.acknowledge(await scene.driver.events.get())
    await scene.unmapped(0)
    assert [one.stale_answers for one in (await scene.served.statistics()).mirrors] == [1, 1, 0]
