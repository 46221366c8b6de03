"""What a mirror hears and what an answer does to its table."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from machine_world import START, World, error_of, span

from hmm import commands_device as devices
from hmm import commands_process as processes
from hmm import pte
from hmm.errors import TimedOutError
from hmm.events import Cause, Delivery, Event, EventState, EventType
from hmm.mirror import DeadlinePolicy, MirrorState
from hmm.operation import Await, WaitFor
from hmm.page_table import PageTable
from hmm.units import PAGE_SIZE, AddressRange
from hmm.vma import Prot


def test_mirror_does_not_hear_of_a_migration_that_it_asked_for() -> None:
    """hmm_migrate(): the mirror that migrates is told by the copy callbacks; every other hears MIGRATE."""
    world = World(mirrors=2)
    notifier = world.machine.spaces[1].notifier
    asking, other = world.mirrors
    invalidation = notifier.invalidation((span(0),), Cause.MIGRATE_TO_DEVICE, initiator=asking)
    assert [listener.id for listener in notifier.listeners(invalidation._event())] == [other]


def test_answer_kills_nobody_when_the_mirror_was_fenced_after_it() -> None:
    """An error on an invalidation ends a mirror by MUNMAP and release; a lost one is told neither."""
    world = World(mirrors=2)
    unmapping = world.start(processes.munmap, world.pid, START, PAGE_SIZE)
    failing, other = world.sent()
    world.machine.answer(failing.mirror_id, failing.sequence, errno.EIO)
    world.machine.fence(failing.mirror_id, "its stream has ended")
    assert not world.machine.mirrors[failing.mirror_id].unsettled
    world.machine.answer(other.mirror_id, other.sequence)
    world.resume(unmapping)
    assert unmapping.result == 0
    assert not world.sent()
    assert world.machine.receivers[failing.mirror_id].state is MirrorState.LOST


def test_fence_leaves_nothing_unsettled() -> None:
    """Nobody will apply what a lost mirror was told."""
    world = World()
    unmapping = world.start(processes.munmap, world.pid, START, PAGE_SIZE)
    mirror = world.machine.mirrors[world.mirrors[0]]
    assert mirror.unsettled
    world.machine.fence(mirror.id, "no answer")
    assert not mirror.unsettled
    world.resume(unmapping)
    world.machine.check()


def test_fault_has_entries_of_a_range_whose_invalidation_was_abandoned() -> None:
    """The change was not made: what the mirror has there holds."""
    world = World(policy=DeadlinePolicy.FAIL)
    (mirror,) = world.mirrors
    unmapping = world.start(processes.munmap, world.pid, START, PAGE_SIZE)
    (owed,) = world.sent()
    world.machine.abandon(mirror, owed.sequence)
    world.resume(unmapping)
    assert isinstance(error_of(unmapping), TimedOutError)
    world.machine.answer(mirror, owed.sequence)
    faulted = world.do(devices.fault, mirror, [span(0)], write=True)
    assert faulted.entries[0] & pte.VALID
    assert not world.machine.mirrors[mirror].unsettled


@pytest.mark.parametrize("write", [False, True])
def test_faults_wait_while_their_mappings_are_being_changed(write: bool) -> None:
    """mmap_lock held for writing: neither a CPU's nor a device's fault looks at VMAs that are half changed."""
    world = World()
    world.do(processes.touch, world.pid, span(0), write=True)
    protecting = world.start(processes.mprotect, world.pid, START, PAGE_SIZE, Prot.READ)
    (told,) = world.sent()
    for command, target in ((devices.fault, world.mirrors[0]), (processes.touch, world.pid)):
        pages = [span(0, 2)] if command is devices.fault else span(0, 2)
        waiting = world.start(command, target, pages, write=write)
        assert isinstance(waiting.request, Await)
        assert waiting.request.wait_for is WaitFor.EDITS
    elsewhere = world.start(processes.touch, world.pid, span(8), write=write)
    assert elsewhere.done
    world.machine.answer(told.mirror_id, told.sequence)
    world.settle()
    assert protecting.result == 0
    assert not world.machine.operations


def test_scattered_fault_goes_on_behind_a_hole_that_was_made_while_it_waited() -> None:
    """Each pass ends with the VMA that is there then: hmm_mirror_fault() trims to it."""
    world = World()
    (mirror,) = world.mirrors
    world.do(processes.touch, world.pid, span(0), write=True)
    forking = world.start(processes.fork, world.pid)
    (told,) = world.sent()
    pages = np.array([span(page).start for page in range(0, 16, 2)], np.uint64)
    fault = world.start(devices.fault, mirror, pages, write=True)
    unmapping = world.start(processes.munmap, world.pid, span(4).start, 2 * PAGE_SIZE)
    world.machine.answer(told.mirror_id, told.sequence)
    world.resume(forking)
    world.resume(unmapping)
    world.settle()
    parts = fault.result.parts
    assert [(part.end, part.error is None) for part in parts] == [
        (span(3).start, True),
        (span(4).start, False),
        (span(15).start, True),
    ]
    assert [bool(entry) for entry in fault.result.entries] == [page != 4 for page in range(0, 16, 2)]


def test_fault_of_a_single_page_keeps_dirty_and_the_drivers_bits() -> None:
    """The short way for one page does what the long one does."""
    world = World()
    (mirror,) = world.mirrors
    world.do(devices.fault, mirror, [span(0)], write=True)
    world.do(devices.set_driver_bits, mirror, span(0), 5)
    world.do(devices.dirty_range, mirror, span(0))
    (before,) = world.do(devices.read_table, mirror, span(0)).tolist()
    world.do(devices.fault, mirror, [span(0)], write=True)
    (after,) = world.do(devices.read_table, mirror, span(0)).tolist()
    assert (after, pte.pte_driver(after), bool(after & pte.DIRTY)) == (before, 5, True)


MANY = tuple(span(page) for page in range(1, 128, 3))
"""Ranges with gaps between them."""


@pytest.mark.parametrize("dma", [False, True])
@pytest.mark.parametrize("etype", [EventType.MUNMAP, EventType.WRITE_PROTECT, EventType.ISDIRTY])
def test_settle_does_the_same_for_many_ranges_as_for_one_after_the_other(etype: EventType, *, dma: bool) -> None:
    """Whether ranges look for entries or entries for ranges; dirty reaches the frames either way."""
    seen = []
    for at_a_time in (1, len(MANY)):
        world = World(mirrors=0)
        world.do(processes.mmap, world.pid, START, 128 * PAGE_SIZE, 3, 0x32)
        device = world.do(devices.register_device, "gpu", dma=dma)
        number = world.do(devices.register_mirror, device, world.pid)
        world.do(devices.fault, number, [AddressRange(START, START + 128 * PAGE_SIZE)], write=True)
        world.do(devices.dirty_range, number, span(0, 20))
        mirror = world.machine.mirrors[number]
        for first in range(0, len(MANY), at_a_time):
            event = Event(0, 1, 99 + first, etype, None, None, MANY[first : first + at_a_time])
            delivery = Delivery(number, 1, event, 0, EventState.ACKNOWLEDGED)
            assert mirror.settle(delivery)
        mirror.table.check()
        tables = [mirror.table, *(mirror.domain.tables if mirror.domain else ())]
        flags = world.machine.frames.flags[:256].tolist()
        seen.append((flags, [_entries(table) for table in tables]))
    assert seen[0] == seen[1]


def _entries(table: PageTable) -> list[tuple[int, int]]:
    addresses, entries = table.valid(0, table.last + 1)
    return list(zip(addresses.tolist(), entries.tolist(), strict=True))
