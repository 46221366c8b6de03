"""Calls that a driver makes from inside its callback: those that could never end are refused, and change nothing."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from machine_world import RW, START, World, error_of, span

from hmm import commands_device as devices
from hmm import commands_file as files
from hmm import commands_hmm as hmm
from hmm import commands_process as processes
from hmm.errors import TimedOutError, WouldDeadlockError
from hmm.events import Delivery
from hmm.inspection import pending
from hmm.journal import digest
from hmm.madvise import Advice
from hmm.mirror import DeadlinePolicy
from hmm.operation_record import Caller
from hmm.units import PAGE_SIZE
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot

MAYMOVE_FIXED = 3
TO = span(64)


@pytest.fixture
def world() -> World:
    """A process with private pages, a page of a shared file and a heap, and one mirror."""
    world = World()
    file = world.do(files.open_file, "f", create=True)
    world.do(files.write_file, file, 0, b"x" * PAGE_SIZE)
    world.do(processes.mmap, world.pid, span(32).start, PAGE_SIZE, RW, MapFlag.SHARED | MapFlag.FIXED, file, 0)
    world.do(processes.write_memory, world.pid, START, b"kept")
    return world


def updating(world: World, page: int = 0) -> Delivery:
    """The update of a device fault of one page, which its driver is handling."""
    world.start(devices.fault, world.mirrors[0], [span(page)], write=True)
    (update,) = world.sent()
    return update


def inside(delivery: Delivery) -> Caller:
    """A call from inside that callback."""
    return Caller(callback=(delivery.mirror_id, delivery.sequence))


@pytest.mark.parametrize(
    ("page", "command", "arguments"),
    [
        (0, processes.munmap, (START, PAGE_SIZE)),
        (0, processes.mprotect, (START, PAGE_SIZE, Prot.READ)),
        (0, processes.madvise, (START, PAGE_SIZE, Advice.DONTNEED)),
        (0, processes.mremap, (START, PAGE_SIZE, PAGE_SIZE, MAYMOVE_FIXED, TO.start)),
        (32, processes.madvise, (span(32).start, PAGE_SIZE, Advice.REMOVE)),
        (0, processes.fork, ()),
        (0, processes.exec_process, ("other",)),
        (0, processes.exit_process, ()),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_call_changes_nothing_when_it_would_deadlock(
    world: World, page: int, command: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """A change of the range that is being faulted would wait for this very callback: EDEADLK, and nothing else."""
    update = updating(world, page)
    before = digest(world.machine)
    nested = world.start(command, world.pid, *arguments, caller=inside(update))
    assert error_of(nested).errno == errno.EDEADLK
    world.machine.check()
    assert digest(world.machine) == before
    world.machine.answer(update.mirror_id, update.sequence)
    world.settle()
    assert world.do(processes.read_memory, world.pid, START, 4).data == b"kept"
    world.do(processes.exit_process, world.pid)
    assert world.machine.frames.statistics()[0].used == 1, "the page of the file"


def test_truncation_changes_nothing_when_it_would_deadlock(world: World) -> None:
    """The size of the file is as before."""
    update = updating(world, 32)
    nested = world.start(files.truncate_file, 1, 0, caller=inside(update))
    assert isinstance(error_of(nested), WouldDeadlockError)
    assert world.machine.files[1].size_bytes == PAGE_SIZE


def test_munmap_of_another_range_succeeds_inside_the_callback_of_a_fault(world: World) -> None:
    """Only what can never finish is refused: no call that changes VMAs is under way."""
    update = updating(world)
    nested = world.start(processes.munmap, world.pid, span(8).start, PAGE_SIZE, caller=inside(update))
    world.settle()
    assert nested.result == 0


def test_call_waits_when_only_a_call_that_has_ended_stands_in_its_way() -> None:
    """What an operation waited for may be over before it goes on: it no longer counts as waiting for anybody."""
    world = World(mirrors=2)
    world.do(processes.write_memory, world.pid, START, b"x")
    editing = world.start(processes.mprotect, world.pid, START, PAGE_SIZE, Prot.READ)
    protecting = world.sent()
    waiting = world.start(devices.fault, world.mirrors[0], [span(0)], write=False)
    queued = world.start(processes.munmap, world.pid, span(8).start, PAGE_SIZE)
    for delivery in protecting:
        world.machine.answer(delivery.mirror_id, delivery.sequence)
    world.resume(editing)
    assert world.machine.blockers(waiting) == []
    world.settle()
    assert (waiting.error, queued.result) == (None, 0)


def test_waiting_call_is_refused_when_another_call_closes_the_circle() -> None:
    """It waited behind a call that could end; that one then comes to wait for the callback: EDEADLK to who said so."""
    world = World(mirrors=2)
    world.do(devices.fault, world.mirrors[1], [span(4)], write=True)
    first = world.start(processes.munmap, world.pid, span(4).start, PAGE_SIZE)
    deliveries = world.sent()
    update = updating(world)
    second = world.start(processes.munmap, world.pid, START, PAGE_SIZE)
    nested = world.start(processes.munmap, world.pid, span(8).start, PAGE_SIZE, caller=inside(update))
    assert (second.done, nested.done) == (False, False)
    for delivery in deliveries:
        world.machine.answer(delivery.mirror_id, delivery.sequence)
    world.resume(first)
    world.resume(second)
    assert world.machine.blockers(second) == [update.operation_id]
    world.resume(nested)
    assert error_of(nested).errno == errno.EDEADLK
    assert not world.machine.ready()
    world.machine.answer(update.mirror_id, update.sequence)
    world.settle()
    assert second.result == 0


def test_unregister_is_refused_when_who_ends_the_mirror_waits_for_the_callback(world: World) -> None:
    """A mirror whose error is its end is waited for by its name: who ends it waits for the second pass of others."""
    (mirror,), machine = world.mirrors, world.machine
    today = world.do(hmm.attach, world.do(devices.register_device, "npu"), world.pid)
    world.do(hmm.insert_notifier, today, START, PAGE_SIZE, two_pass=True)
    unmapping = world.start(processes.munmap, world.pid, START, PAGE_SIZE)
    for sent in world.sent():
        machine.answer(sent.mirror_id, sent.sequence, errno.EIO if sent.mirror_id == mirror else errno.EINPROGRESS)
    machine.resume(unmapping.id)
    (second,) = world.sent()
    refused = world.start(devices.unregister_mirror, mirror, caller=inside(second))
    assert error_of(refused).errno == errno.EDEADLK
    waiting = world.start(devices.unregister_mirror, mirror)
    assert machine.blockers(waiting) == [unmapping.id]
    machine.answer(second.mirror_id, second.sequence)
    world.settle()
    assert unmapping.done
    assert waiting.result is None


def test_exec_that_is_refused_lets_go_of_what_others_mapped_meanwhile() -> None:
    """Until then the new address space is the process's: what came to be there is freed with it."""
    world = World(mirrors=2)
    world.do(devices.fault, world.mirrors[1], [span(4)], write=True)
    first = world.start(processes.munmap, world.pid, span(4).start, PAGE_SIZE)
    deliveries = world.sent()
    update = updating(world)
    second = world.start(processes.munmap, world.pid, START, PAGE_SIZE)
    nested = world.start(processes.exec_process, world.pid, "other", caller=inside(update))
    assert not nested.done
    flags = MapFlag.PRIVATE | MapFlag.FIXED | MapFlag.ANONYMOUS
    world.do(processes.mmap, world.pid, START, PAGE_SIZE, Prot.READ | Prot.WRITE, flags)
    world.do(processes.write_memory, world.pid, START, b"new")
    for delivery in deliveries:
        world.machine.answer(delivery.mirror_id, delivery.sequence)
    world.resume(first)
    world.resume(second)
    world.resume(nested)
    world.settle()
    assert error_of(nested).errno == errno.EDEADLK
    assert len(world.machine.spaces) == 1
    world.machine.check()


def test_mark_counts_for_nobody_elses_callback() -> None:
    """Who claims to be inside a callback of somebody else's mirror cannot make that driver's calls fail."""
    world = World()
    mine = Caller(token="mine")
    device = world.do(devices.register_device, "mine", caller=mine)
    mirror = world.do(devices.register_mirror, device, world.pid, caller=mine)
    world.start(processes.munmap, world.pid, START, PAGE_SIZE)
    (delivery,) = [delivery for delivery in world.sent() if delivery.mirror_id == mirror]
    callback = (mirror, delivery.sequence)
    yours = Caller(token="yours", callback=callback)
    claimed = world.start(processes.munmap, world.pid, span(4).start, PAGE_SIZE, caller=yours)
    assert claimed.caller.callback is None
    assert not claimed.done
    marked = world.start(processes.munmap, world.pid, span(8).start, PAGE_SIZE, caller=replace(mine, callback=callback))
    assert isinstance(error_of(marked), WouldDeadlockError)


def test_pending_shows_calls_that_may_go_on_and_have_not_yet() -> None:
    """Between the end of a wait and the next step of who waited there is nothing that is waited for."""
    world = World()
    world.do(processes.write_memory, world.pid, START, b"x")
    editing = world.start(processes.mprotect, world.pid, START, PAGE_SIZE, Prot.READ)
    (protecting,) = world.sent()
    world.start(devices.fault, world.mirrors[0], [span(0)], write=False)
    world.machine.answer(protecting.mirror_id, protecting.sequence)
    world.resume(editing)
    (fault,) = pending(world.machine)
    assert (fault.name, fault.operations) == ("fault", ())
    world.settle()
    unmapping = world.start(processes.munmap, world.pid, START, PAGE_SIZE)
    (delivery,) = world.sent()
    first, second = (world.start(devices.unregister_mirror, world.mirrors[0]) for _ in range(2))
    world.machine.answer(delivery.mirror_id, delivery.sequence)
    world.resume(unmapping)
    world.resume(first)
    for _ in range(2):
        for delivery in world.sent():
            world.machine.answer(delivery.mirror_id, delivery.sequence)
        if not first.done:
            world.resume(first)
    (left,) = pending(world.machine)
    assert (left.operation_id, left.answers) == (second.id, ())


def test_exit_goes_on_when_the_late_answer_that_it_comes_to_wait_for_is_its_own_callbacks() -> None:
    """The event of that callback was given up when the end had been told to some already: it cannot be refused."""
    world = World()
    attached = world.do(hmm.attach, world.devices[0], world.pid, policy=DeadlinePolicy.FAIL)
    world.do(hmm.insert_notifier, attached, START, PAGE_SIZE)
    world.do(processes.write_memory, world.pid, START, b"there")
    taking = world.start(hmm.make_exclusive, attached, span(0))
    other, event = world.sent()
    assert event.mirror_id == attached
    world.machine.answer(other.mirror_id, other.sequence)
    ending = world.start(processes.exit_process, world.pid, caller=inside(event))
    world.machine.abandon(attached, event.sequence)
    world.settle()
    assert isinstance(error_of(taking), TimedOutError)
    assert (ending.done, ending.error) == (True, None)
    assert not world.machine.spaces
    world.machine.check()
