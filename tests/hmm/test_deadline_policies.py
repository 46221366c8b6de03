"""Drivers that do not answer in time, under the policy FAIL: what a call that could not finish leaves behind."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from machine_world import START, World, error_of, span

from hmm import commands_device as devices
from hmm import commands_process as processes
from hmm import pte
from hmm.errors import TimedOutError
from hmm.events import Delivery, EventType
from hmm.mirror import DeadlinePolicy
from hmm.operation import Await, WaitFor
from hmm.operation_record import OperationRecord
from hmm.units import PAGE_SIZE


def owing(*, faulted: bool = False) -> tuple[World, Delivery]:
    """A mirror that has not answered a munmap, which has failed for it."""
    world = World(policy=DeadlinePolicy.FAIL)
    if faulted:
        world.do(devices.fault, world.mirrors[0], [span(0)], write=True)
    unmapping = world.start(processes.munmap, world.pid, START, PAGE_SIZE)
    (owed,) = world.sent()
    world.machine.abandon(owed.mirror_id, owed.sequence)
    world.resume(unmapping)
    assert isinstance(error_of(unmapping), TimedOutError)
    return world, owed


def test_fault_sends_nothing_to_a_mirror_that_owes_an_answer() -> None:
    """After an abandoned event a mirror gets no new event until the answer came, not even one of its own faults."""
    world, owed = owing()
    fault = world.start(devices.fault, world.mirrors[0], [span(8)], write=True)
    assert not world.sent()
    assert world.machine.unanswered(fault) == [(owed.mirror_id, owed.sequence)]
    world.machine.answer(owed.mirror_id, owed.sequence)
    world.settle()
    assert fault.result.parts[0].error is None


def test_fault_times_out_when_the_owed_answer_does_not_come() -> None:
    """The wait for a late answer is under the deadline as well."""
    world, _ = owing()
    fault = world.start(devices.fault, world.mirrors[0], [span(8)], write=True)
    world.machine.expire(fault.id)
    assert error_of(fault).errno == errno.ETIMEDOUT
    assert not world.machine.spaces[1].notifier.faults


def test_fault_of_another_mirror_is_not_held_up_by_a_mirror_that_owes_an_answer() -> None:
    """It has nothing to tell the mirror that owes."""
    world, _ = owing()
    device = world.do(devices.register_device, "other")
    other = world.do(devices.register_mirror, device, world.pid)
    (part,) = world.do(devices.fault, other, [span(0)], write=True).parts
    assert part.error is None


def test_exit_goes_on_when_an_owed_answer_does_not_come() -> None:
    """A death cannot be taken back: when the deadline passes the mirror is told all the same, and nothing leaks."""
    world, _ = owing(faulted=True)
    ending = world.start(processes.exit_process, world.pid)
    assert isinstance(ending.request, Await)
    assert ending.request.wait_for is WaitFor.LATE_ANSWERS
    world.machine.expire(ending.id)
    heard = []
    while deliveries := world.sent():
        heard += [delivery.event.etype for delivery in deliveries]
        for delivery in deliveries:
            world.machine.abandon(delivery.mirror_id, delivery.sequence)
        while ready := world.machine.ready():
            world.machine.resume(ready[0].id)
    assert heard == [EventType.MUNMAP, EventType.RELEASE]
    assert (ending.error, world.machine.spaces) == (None, {})
    assert world.machine.frames.statistics()[0].used == 0


def test_unregistering_times_out_when_an_owed_answer_does_not_come() -> None:
    """It waits for callbacks that run, and under the policy FAIL for those that were abandoned, but not for ever."""
    world, owed = owing()
    leaving = world.start(devices.unregister_mirror, world.mirrors[0])
    world.machine.expire(leaving.id)
    assert isinstance(error_of(leaving), TimedOutError)
    assert world.mirrors[0] in world.machine.mirrors
    world.machine.answer(owed.mirror_id, owed.sequence)
    world.do(devices.unregister_mirror, world.mirrors[0])


def test_late_answer_brings_its_dirty_pages() -> None:
    """Dirty is never lost: the call changed nothing, so the entries that were written through are still there."""
    world, owed = owing(faulted=True)
    mirror = world.machine.mirrors[world.mirrors[0]]
    world.machine.answer(mirror.id, owed.sequence, dirty=(span(0),))
    assert mirror.table.get(START) & pte.DIRTY
    assert mirror.counters["late_answers"] == 1


def test_mlock_times_out_when_a_copy_cannot_be_told_of() -> None:
    """Locking brings pages in, which breaks copy-on-write; without the answer the zero page stays."""
    world = World(policy=DeadlinePolicy.FAIL)
    locking = _locking(world, processes.mlock, START, PAGE_SIZE)
    assert error_of(locking).errno == errno.ETIMEDOUT
    world.machine.check()


def test_mlockall_succeeds_when_a_copy_cannot_be_told_of() -> None:
    """mm_populate() ignores errors: what was to be locked is locked, so the call has not failed."""
    world = World(policy=DeadlinePolicy.FAIL)
    locking = _locking(world, processes.mlockall, 1)
    assert locking.result == 0
    world.machine.check()


def _locking(world: World, command: Callable[..., Any], *arguments: int) -> OperationRecord[Any]:
    world.do(processes.read_memory, world.pid, START, PAGE_SIZE)
    locking = world.start(command, world.pid, *arguments)
    (telling,) = world.sent()
    assert telling.event.etype is EventType.MIGRATE
    world.machine.abandon(telling.mirror_id, telling.sequence)
    world.resume(locking)
    return locking
