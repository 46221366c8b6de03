"""An event that many hear: kept once, and still each of them has its number, its answer, its counters and its past."""

from __future__ import annotations

import errno as errnos

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machine_world import FIXED, RW, START, World, span

from hmm import commands_device as devices
from hmm import commands_process as processes
from hmm.dispatch import EVENTS_KEPT, Past
from hmm.events import Cause, Event, EventState, EventType
from hmm.journal import digest
from hmm.mirror import DeadlinePolicy
from hmm.notifier import FILLED_SHIFT, filled_blocks
from hmm.operation_record import OperationRecord
from hmm.units import PAGE_SIZE, AddressRange


def _unmapping(world: World, page: int = 0) -> OperationRecord[int]:
    return world.start(processes.munmap, world.pid, START + page * PAGE_SIZE, PAGE_SIZE)


def test_numbers_stay_dense_for_each_when_one_also_hears_what_the_others_do_not() -> None:
    """What was sent to one alone shifts its numbers against those of the others, and nothing else."""
    world = World(mirrors=3)
    first, second, third = world.mirrors
    world.do(devices.fault, second, [span(4)], write=True)
    record = _unmapping(world)
    assert [(one.mirror_id, one.sequence) for one in world.sent()] == [(first, 1), (second, 2), (third, 1)]
    assert world.machine.unanswered(record) == [(first, 1), (second, 2), (third, 1)]
    world.machine.answer(second, 2)
    assert world.machine.unanswered(record) == [(first, 1), (third, 1)]
    assert [world.machine.mirrors[one].low_water for one in world.mirrors] == [0, 2, 0]


def test_acknowledge_together_does_the_same_as_one_answer_after_the_other() -> None:
    """By all of them, or by some of them after others; entries are cleared and every counter is the same."""
    digests, counted = set(), []
    for together in ((), (0, 1, 2, 3), (1, 2)):
        world = World(mirrors=4)
        for mirror in world.mirrors[::2]:
            world.do(devices.fault, mirror, [span(0)], write=True)
        record = _unmapping(world)
        sent = {delivery.mirror_id: delivery.sequence for delivery in world.sent()}
        for position, mirror in enumerate(world.mirrors):
            if position not in together:
                world.machine.answer(mirror, sent[mirror])
        if together:
            world.machine.acknowledge_together(record.id, [world.mirrors[position] for position in together])
        assert not world.machine.unanswered(record)
        world.resume(record)
        world.machine.check()
        digests.add(digest(world.machine))
        counted.append([dict(mirror.counted()) for mirror in world.machine.mirrors.values()])
    assert len(digests) == 1
    assert counted[0] == counted[1] == counted[2]
    assert counted[0][0] == {"faults": 1, "faulted_pages": 1, "events_device_wfault": 1, "events_munmap": 1} | {
        "acknowledged": 2
    }


def test_counters_of_a_mirror_are_its_own_when_others_come_and_go() -> None:
    """Who registers later has not heard what was counted for all before, and who leaves takes what it has heard."""
    world = World(mirrors=2)
    first, second = world.mirrors
    world.do(processes.munmap, world.pid, START, PAGE_SIZE)
    later = world.do(devices.register_mirror, world.do(devices.register_device, "late"), world.pid)
    world.do(processes.munmap, world.pid, START + PAGE_SIZE, PAGE_SIZE)
    world.do(devices.unregister_mirror, first)
    world.do(processes.munmap, world.pid, START + 2 * PAGE_SIZE, PAGE_SIZE)
    events = {one.id: one.counted()["events_munmap"] for one in world.machine.mirrors.values()}
    assert events == {second: 3, later: 2}


def test_fence_of_one_ends_nothing_but_its_own_part() -> None:
    """The others are still waited for, and their answers count."""
    world = World(mirrors=3)
    first, second, third = world.mirrors
    record = _unmapping(world)
    world.machine.fence(second, "silent")
    assert world.machine.unanswered(record) == [(first, 1), (third, 1)]
    world.machine.acknowledge_together(record.id, [first, third])
    world.resume(record)
    assert record.fenced == (second,)
    states = {number: dict(world.machine.receivers[number].counted()) for number in world.mirrors}
    assert states[second] == {"events_munmap": 1, "fenced": 1}
    assert states[first] == states[third] == {"events_munmap": 1, "acknowledged": 1}


def test_abandoned_answer_of_one_among_many_is_owed_by_it_alone() -> None:
    """The next event waits for its late answer, and not for the others'."""
    world = World(mirrors=2, policy=DeadlinePolicy.FAIL)
    first, second = world.mirrors
    record = _unmapping(world)
    world.machine.answer(first, 1)
    world.machine.abandon(second, 1)
    world.resume(record)
    assert record.error is not None
    assert {number: one.state for number, one in world.machine.mirrors[second].unanswered.items()} == {
        1: EventState.ABANDONED
    }
    again = _unmapping(world)
    assert world.machine.unanswered(again) == [(second, 1)]
    world.machine.answer(second, 1)
    world.settle()
    assert again.result == 0
    world.machine.check()


def test_refusal_of_one_is_its_own_outcome() -> None:
    """An error of one kills it; those who had no more to say stay, and lose only their entries."""
    world = World(mirrors=2)
    first, second = world.mirrors
    for mirror in world.mirrors:
        world.do(devices.fault, mirror, [span(0)], write=True)
    record = _unmapping(world)
    world.machine.answer(first, 2, errnos.EIO)
    world.machine.answer(second, 2)
    world.settle()
    assert record.result == 0
    assert [mirror.state.value for mirror in world.machine.mirrors.values()] == ["released", "live"]
    assert world.machine.mirrors[second].table.is_empty


def test_access_names_the_taking_event_under_the_mirrors_own_number_when_many_heard_it() -> None:
    """Of what was sent to many and to one alone the later one is named; who has not answered has lost nothing."""
    world = World(mirrors=2)
    first, second = world.mirrors
    world.do(devices.fault, second, [span(1)], write=True)
    record = _unmapping(world)
    world.sent()
    world.machine.answer(second, 2)
    bits = 1 << 0
    assert world.machine.mirrors[first].taken_by(START, bits) is None
    taken = world.machine.mirrors[second].taken_by(START, bits)
    assert taken is not None
    assert (taken.sequence, taken.settled, taken.operation_id) == (2, False, record.id)
    world.machine.answer(first, 1)
    world.resume(record)
    world.do(devices.discard_range, second, span(0))
    discarded = world.machine.mirrors[second].taken_by(START, bits)
    assert discarded is not None
    assert (discarded.event, discarded.sequence) == ("DISCARD", 2)
    taken = world.machine.mirrors[first].taken_by(START, bits)
    assert taken is not None
    assert (taken.sequence, taken.settled) == (1, True)


@pytest.mark.parametrize("cause", [Cause.MUNMAP, Cause.MPROTECT_READ, Cause.MIGRATE_TO_DEVICE])
def test_audience_is_everybody_but_the_mirror_that_asked(cause: Cause) -> None:
    """The same object as long as nobody comes or goes, so that whoever sends knows it again."""
    world = World(mirrors=3)
    notifier = world.machine.spaces[1].notifier
    event = notifier.invalidation((span(0),), cause)._event()
    everybody = notifier.audience(event)
    assert everybody is not None
    assert everybody.ids == tuple(world.mirrors)
    assert notifier.audience(event) is everybody
    asked = notifier.invalidation((span(0),), cause, initiator=world.mirrors[1])._event()
    others = notifier.audience(asked)
    assert others is not None
    assert others.ids == (world.mirrors[0], world.mirrors[2])
    assert notifier.audience(asked) is others
    world.do(devices.unregister_mirror, world.mirrors[0])
    changed = notifier.audience(event)
    assert changed is not None
    assert changed.ids == tuple(world.mirrors[1:])


def test_entries_go_only_from_mirrors_that_have_them_when_many_hear() -> None:
    """In the range, beside it, 64 blocks away, and in several blocks of it: who has nothing there loses nothing."""
    world = World(mirrors=5)
    block = 1 << FILLED_SHIFT
    for address in (START + 64 * block, START + block, START + 3 * block):
        world.do(processes.mmap, world.pid, address, PAGE_SIZE, RW, FIXED)
    pages = [[START], [START + 8 * PAGE_SIZE], [START + 64 * block], [START + block, START + 3 * block], []]
    for mirror, addresses in zip(world.mirrors, pages, strict=True):
        for address in addresses:
            world.do(devices.fault, mirror, [AddressRange(address, address + PAGE_SIZE)], write=True)

    def counts() -> list[int]:
        return [world.machine.mirrors[mirror].table.count for mirror in world.mirrors]

    assert counts() == [1, 1, 1, 2, 0]
    world.do(processes.munmap, world.pid, START, PAGE_SIZE)
    assert counts() == [0, 1, 1, 2, 0]
    world.do(processes.munmap, world.pid, START + block, 3 * block)
    assert counts() == [0, 1, 1, 0, 0]
    world.do(processes.munmap, world.pid, START, 65 * block)
    assert counts() == [0, 0, 0, 0, 0]
    world.machine.check()


@given(st.integers(0, 1 << 45), st.integers(1, 1 << 40), st.integers(0, 1 << 45), st.integers(1, 1 << 40))
def test_filled_blocks_share_a_bit_when_ranges_overlap(start: int, length: int, other: int, other_length: int) -> None:
    """Two ranges, however far and long."""
    shared = filled_blocks(start, start + length) & filled_blocks(other, other + other_length)
    assert shared or start + length <= other or other + other_length <= start
    assert filled_blocks(start, start + length) < 1 << 64


def test_past_forgets_the_oldest_when_it_is_full() -> None:
    """Bounded in events, whatever they are."""
    past: Past[_Remembered] = Past()
    for number in range(EVENTS_KEPT + 3):
        past.add(_Remembered(number))
    numbers = [one.event.revision for one in past.backwards()]
    assert numbers == list(range(EVENTS_KEPT + 2, 2, -1))


class _Remembered:
    def __init__(self, number: int) -> None:
        self.event = Event(0, 1, number, EventType.MUNMAP, None, None, (span(0),))


def test_events_that_end_several_at_once_are_counted_for_each() -> None:
    """Those who are killed are an audience for once: both hear MUNMAP of everything and RELEASE."""
    world = World(mirrors=3)
    record = _unmapping(world)
    for mirror in world.mirrors[:2]:
        world.machine.answer(mirror, 1, errnos.EIO)
    world.machine.answer(world.mirrors[2], 1)
    world.settle()
    assert record.result == 0
    counted = [world.machine.mirrors[mirror].counted() for mirror in world.mirrors]
    events = [(one["events_munmap"], one["events_release"], one["acknowledged"]) for one in counted]
    assert events == [(2, 1, 3), (2, 1, 3), (1, 0, 1)]
