"""The machine: its inputs one at a time, and what an operation that waits looks like meanwhile."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from machine_world import RW, START, World, error_of, span

from hmm import commands_device as devices
from hmm import commands_file as files
from hmm import commands_hmm as today
from hmm import commands_process as processes
from hmm.errors import (
    AccessDeniedError,
    ConflictError,
    DeviceLostError,
    InvalidRequestError,
    NoSuchObjectError,
    OutOfFramesError,
    TimedOutError,
    WouldDeadlockError,
)
from hmm.events import EventType
from hmm.frames import PageFlag
from hmm.inspection import pending
from hmm.limits import Limits
from hmm.mirror import DeadlinePolicy, MirrorState
from hmm.operation import Deliver
from hmm.operation_record import Caller
from hmm.units import PAGE_SIZE, WHOLE_SPACE, AddressRange
from hmm.unmapped_area import MapFlag


def test_munmap_frees_only_after_every_mirror_has_answered() -> None:
    """The rule of the house: sent to all at once, all awaited, then the frames go."""
    world = World(mirrors=2)
    for mirror in world.mirrors:
        world.do(devices.fault, mirror, [span(0, 4)], write=True)
    record = world.start(processes.munmap, world.pid, START, 4 * PAGE_SIZE)
    used = world.machine.frames.available
    first, second = world.sent()
    assert [first.event.etype, first.event.spans] == [EventType.MUNMAP, (span(0, 4),)]
    assert first.event == second.event
    world.machine.answer(first.mirror_id, first.sequence)
    assert not world.machine.ready()
    assert world.machine.frames.available == used
    assert isinstance(record.request, Deliver)
    world.machine.answer(second.mirror_id, second.sequence)
    world.resume(record)
    assert record.result == 0
    assert world.machine.frames.available == used + 4
    assert [mirror.counted()["acknowledged"] for mirror in world.machine.mirrors.values()] == [2, 2]


def test_answer_changes_nothing_when_it_is_repeated() -> None:
    """Repeats are harmless and counted."""
    world = World()
    world.start(processes.munmap, world.pid, START, PAGE_SIZE)
    (delivery,) = world.sent()
    world.machine.answer(delivery.mirror_id, delivery.sequence)
    world.machine.answer(delivery.mirror_id, delivery.sequence)
    world.settle()
    assert world.machine.mirrors[delivery.mirror_id].counters["repeated_answers"] == 1


def test_answer_is_refused_when_the_event_was_never_sent() -> None:
    """An acknowledgement of the future is an error that names the last event."""
    world = World()
    with pytest.raises(InvalidRequestError, match="never sent to mirror 1"):
        world.machine.answer(world.mirrors[0], 1)
    with pytest.raises(NoSuchObjectError, match="no mirror 99"):
        world.machine.answer(99, 1)


def test_event_numbers_are_dense_per_mirror_and_the_low_water_mark_is_monotone() -> None:
    """A gap would be a lost event; answers may come in any order."""
    world = World()
    mirror = world.machine.mirrors[world.mirrors[0]]
    records = [world.start(processes.madvise, world.pid, span(n).start, PAGE_SIZE, 4) for n in (0, 2, 4)]
    for n in (0, 2, 4):
        world.start(devices.fault, mirror.id, [span(n)], write=True)
    del records
    marks = []
    while deliveries := world.sent():
        for delivery in reversed(deliveries):
            world.machine.answer(delivery.mirror_id, delivery.sequence)
            marks.append(mirror.low_water)
        for record in world.machine.ready():
            world.machine.resume(record.id)
    assert marks == sorted(marks)
    assert mirror.low_water == mirror.sequence


def test_fence_ends_every_wait_and_drops_the_table() -> None:
    """A lost mirror holds nobody up; what it had recorded as dirty reaches the frames."""
    world = World()
    mirror = world.mirrors[0]
    world.do(devices.fault, mirror, [span(0, 2)], write=True)
    world.do(devices.device_write, mirror, [(START, 8)], b"12345678")
    record = world.start(processes.munmap, world.pid, START, PAGE_SIZE)
    world.machine.fence(mirror, "no answer")
    world.resume(record)
    assert record.fenced == (mirror,)
    assert world.machine.mirrors[mirror].state is MirrorState.LOST
    assert not world.machine.mirrors[mirror].table.count
    refused = world.start(devices.fault, mirror, [span(1)], write=False)
    assert isinstance(error_of(refused), DeviceLostError)
    assert "no answer" in str(refused.error)
    world.machine.check()


def test_abandon_fails_the_call_and_changes_nothing_when_the_policy_is_fail() -> None:
    """FAIL: ETIMEDOUT, the address space as it was; the late answer is counted."""
    world = World(policy=DeadlinePolicy.FAIL)
    mirror = world.mirrors[0]
    world.do(processes.write_memory, world.pid, START, b"kept")
    record = world.start(processes.munmap, world.pid, START, PAGE_SIZE)
    (delivery,) = world.sent()
    world.machine.abandon(mirror, delivery.sequence)
    world.resume(record)
    assert isinstance(error_of(record), TimedOutError)
    assert world.do(processes.read_memory, world.pid, START, 4).data == b"kept"
    waiting = world.start(processes.munmap, world.pid, START, PAGE_SIZE)
    assert not world.sent(), "nothing new is sent before the late answer"
    assert not world.machine.ready()
    world.machine.answer(mirror, delivery.sequence)
    assert world.machine.mirrors[mirror].counters["late_answers"] == 1
    world.settle()
    assert waiting.result == 0


def test_error_kills_the_mirror_and_no_other_when_it_answers_an_invalidation() -> None:
    """2015: an error of `update` on an invalidation ends that mirror: MUNMAP of everything, then `release`."""
    world = World(mirrors=2)
    world.do(devices.fault, world.mirrors[0], [span(0)], write=False)
    record = world.start(processes.munmap, world.pid, START, PAGE_SIZE)
    first, second = world.sent()
    world.machine.answer(first.mirror_id, first.sequence, errno.EIO)
    world.machine.answer(second.mirror_id, second.sequence)
    heard = []
    while not record.done:
        world.resume(record)
        for delivery in world.sent():
            heard.append((delivery.mirror_id, delivery.event.etype, delivery.event.spans))
            world.machine.answer(delivery.mirror_id, delivery.sequence)
    killed, other = world.mirrors
    assert heard == [(killed, EventType.MUNMAP, (WHOLE_SPACE,)), (killed, EventType.RELEASE, ())]
    assert record.result == 0
    states = [world.machine.mirrors[mirror].state for mirror in (killed, other)]
    assert states == [MirrorState.RELEASED, MirrorState.LIVE]
    refused = world.start(devices.fault, killed, [span(1)], write=False)
    assert error_of(refused).errno == errno.ENODEV


def test_undocumented_errno_counts_as_eio() -> None:
    """hmm_mirror_update(): 0, ENOMEM and EIO are documented, others are warned of and become EIO."""
    world = World()
    record = world.start(devices.fault, world.mirrors[0], [span(0)], write=True)
    (delivery,) = world.sent()
    world.machine.answer(delivery.mirror_id, delivery.sequence, errno.EPERM)
    world.settle()
    (part,) = record.result.parts
    assert part.error is not None
    assert part.error.errno == errno.EIO
    assert world.machine.mirrors[world.mirrors[0]].state is MirrorState.LIVE, "an error on a fault kills nothing"
    assert world.machine.mirrors[world.mirrors[0]].counters["undocumented_errors"] == 1


def test_calls_that_change_vmas_wait_for_their_turn_in_order_of_arrival() -> None:
    """As under mmap_lock: the second and third wait although their ranges are elsewhere."""
    world = World()
    calls = [world.start(processes.munmap, world.pid, span(n).start, PAGE_SIZE) for n in (0, 4, 8)]
    order = []
    while not all(call.done for call in calls):
        for delivery in world.sent():
            order.append(delivery.operation_id)
            world.machine.answer(delivery.mirror_id, delivery.sequence)
        for record in world.machine.ready():
            world.machine.resume(record.id)
    assert order == [call.id for call in calls]


def test_fault_elsewhere_is_not_held_up_by_a_pending_invalidation() -> None:
    """A slow mirror delays what overlaps it, never a fault of another range."""
    world = World(mirrors=2)
    world.start(processes.munmap, world.pid, START, PAGE_SIZE)
    (slow, _) = world.sent()
    fault = world.start(devices.fault, world.mirrors[1], [span(8, 2)], write=True)
    (update,) = world.sent()
    world.machine.answer(update.mirror_id, update.sequence)
    world.resume(fault)
    assert fault.done
    assert slow.mirror_id == world.mirrors[0]


def test_fault_waits_for_an_overlapping_invalidation_or_answers_ebusy() -> None:
    """Conflict protocol: a fault never starts inside a running invalidation (hmm_fault_start())."""
    world = World(mirrors=2)
    world.do(processes.write_memory, world.pid, START, b"x" * 4 * PAGE_SIZE)
    advice = world.start(processes.madvise, world.pid, START, 4 * PAGE_SIZE, 4)
    (first, second) = world.sent()
    impatient = world.start(devices.fault, world.mirrors[1], [span(1)], write=False, wait=False)
    assert error_of(impatient).errno == errno.EBUSY
    patient = world.start(devices.fault, world.mirrors[1], [span(1)], write=False)
    assert not patient.done
    assert world.machine.blockers(patient) == [advice.id]
    for delivery in (first, second):
        world.machine.answer(delivery.mirror_id, delivery.sequence)
    world.settle()
    assert patient.result.parts[0].error is None


def test_invalidation_waits_until_an_overlapping_fault_has_updated_its_driver() -> None:
    """For any overlap update(fault) completes strictly before update(invalidation) (2015 conflict protocol)."""
    world = World()
    fault = world.start(devices.fault, world.mirrors[0], [span(0, 2)], write=True)
    (update,) = world.sent()
    unmap = world.start(processes.munmap, world.pid, START, PAGE_SIZE)
    assert not world.sent()
    assert world.machine.blockers(unmap) == [fault.id]
    world.machine.answer(update.mirror_id, update.sequence)
    world.settle()
    assert fault.done
    assert unmap.result == 0


def test_call_from_inside_a_callback_fails_with_edeadlk_when_it_could_never_finish() -> None:
    """A VMA-changing call, and a fault of the same range; both name the operations concerned."""
    world = World()
    world.do(devices.fault, world.mirrors[0], [span(0, 4)], write=True)
    advice = world.start(processes.munmap, world.pid, START, PAGE_SIZE)
    (delivery,) = world.sent()
    inside = Caller(callback=(delivery.mirror_id, delivery.sequence))
    nested = world.start(processes.munmap, world.pid, span(8).start, PAGE_SIZE, caller=inside)
    assert isinstance(error_of(nested), WouldDeadlockError)
    assert f"operation {advice.id}" in str(nested.error)
    leaving = world.start(devices.unregister_mirror, world.mirrors[0], caller=inside)
    assert error_of(leaving).errno == errno.EDEADLK
    world.machine.answer(delivery.mirror_id, delivery.sequence)
    world.settle()
    assert advice.result == 0


def test_fault_of_another_range_from_inside_a_callback_is_legal() -> None:
    """Only what can never finish is refused."""
    world = World(mirrors=1)
    advice = world.start(processes.munmap, world.pid, START, PAGE_SIZE)
    (delivery,) = world.sent()
    inside = Caller(callback=(delivery.mirror_id, delivery.sequence))
    fault = world.start(devices.fault, world.mirrors[0], [span(8)], write=True, caller=inside)
    (update,) = world.sent()
    world.machine.answer(update.mirror_id, update.sequence)
    world.machine.answer(delivery.mirror_id, delivery.sequence)
    world.settle()
    assert fault.done
    assert advice.done


def test_blocking_fault_of_the_same_range_from_inside_a_callback_fails() -> None:
    """It would wait for the invalidation whose callback it is made from."""
    world = World()
    world.do(processes.write_memory, world.pid, START, b"x")
    world.start(processes.madvise, world.pid, START, PAGE_SIZE, 4)
    (delivery,) = world.sent()
    inside = Caller(callback=(delivery.mirror_id, delivery.sequence))
    fault = world.start(devices.fault, world.mirrors[0], [span(0)], write=False, caller=inside)
    assert isinstance(error_of(fault), WouldDeadlockError)
    world.settle()


def test_unregister_waits_for_running_callbacks_and_takes_everything_back_before_it_releases() -> None:
    """hmm_mirror_unregister(): MUNMAP of everything, then `release`; no callback runs once it has returned."""
    world = World()
    mirror = world.machine.mirrors[world.mirrors[0]]
    world.do(devices.fault, mirror.id, [span(0, 4)], write=True)
    world.start(processes.munmap, world.pid, START, PAGE_SIZE)
    (running,) = world.sent()
    leaving = world.start(devices.unregister_mirror, mirror.id)
    assert not world.sent()
    world.machine.answer(mirror.id, running.sequence)
    world.resume(leaving)
    (taking,) = world.sent()
    assert (taking.event.etype, taking.event.spans) == (EventType.MUNMAP, (WHOLE_SPACE,))
    assert error_of(world.start(devices.fault, mirror.id, [span(8)], write=False)).errno == errno.ENODEV
    frames, (pfn,) = world.machine.frames, mirror.pfns(mirror.table.read(span(2).start, span(3).start))
    frames.clear_flags(np.array([pfn]), PageFlag.DIRTY)
    world.machine.answer(mirror.id, taking.sequence, dirty=(span(2),))
    world.resume(leaving)
    assert frames.test_flags(np.array([pfn]), PageFlag.DIRTY)[0], "what the device wrote is not lost"
    (release,) = world.sent()
    assert release.event.etype is EventType.RELEASE
    world.machine.answer(mirror.id, release.sequence)
    world.settle()
    assert leaving.done
    assert mirror.id not in world.machine.mirrors


def test_unregister_does_not_wait_for_callbacks_that_begin_after_it() -> None:
    """A process that is always busy does not keep its mirror."""
    world = World()
    world.do(processes.write_memory, world.pid, START, b"x" * 16 * PAGE_SIZE)
    world.do(processes.fork, world.pid)
    copying = [world.start(processes.write_memory, world.pid, span(n).start, b"y") for n in range(2)]
    first, second = world.sent()
    leaving = world.start(devices.unregister_mirror, world.mirrors[0])
    world.machine.answer(first.mirror_id, first.sequence)
    assert leaving not in world.machine.ready()
    copying.append(world.start(processes.write_memory, world.pid, span(2).start, b"y"))
    (later,) = world.sent()
    world.machine.answer(second.mirror_id, second.sequence)
    world.resume(leaving)
    (taking,) = world.sent()
    assert taking.sequence == later.sequence + 1
    world.machine.answer(taking.mirror_id, taking.sequence)
    world.resume(leaving)
    world.settle()
    assert not leaving.done, "the callback that began meanwhile is still running"
    world.machine.answer(later.mirror_id, later.sequence)
    world.settle()
    assert leaving.done
    assert all(call.result.done == 1 for call in copying)
    world.machine.check()


def test_unregister_releases_once_when_the_process_exits_meanwhile() -> None:
    """List membership makes `release` come once only."""
    world = World()
    leaving = world.start(devices.unregister_mirror, world.mirrors[0])
    ending = world.start(processes.exit_process, world.pid)
    heard = []
    while deliveries := world.sent():
        for delivery in reversed(deliveries):
            heard.append(delivery.event.etype)
            world.machine.answer(delivery.mirror_id, delivery.sequence)
        for record in reversed(world.machine.ready()):
            world.machine.resume(record.id)
    world.settle()
    assert heard.count(EventType.RELEASE) == 1
    assert (leaving.error, ending.error) == (None, None)
    assert not world.machine.mirrors


def test_unregister_twice_at_the_same_time_ends_both() -> None:
    """The second finds nothing left to do."""
    world = World()
    world.start(processes.munmap, world.pid, START, PAGE_SIZE)
    calls = [world.start(devices.unregister_mirror, world.mirrors[0]) for _ in range(2)]
    world.settle()
    assert [call.error for call in calls] == [None, None]


def test_exit_tells_every_mirror_of_munmap_and_then_release() -> None:
    """hmm_notifier_release(), v4: MUNMAP of everything, then release, then the frames go."""
    world = World(mirrors=2)
    world.do(devices.fault, world.mirrors[0], [span(0, 4)], write=True)
    available = world.machine.frames.available
    ending = world.start(processes.exit_process, world.pid)
    heard = []
    while deliveries := world.sent():
        heard += [(delivery.mirror_id, delivery.event.etype) for delivery in deliveries]
        assert world.machine.frames.available == available
        for delivery in deliveries:
            world.machine.answer(delivery.mirror_id, delivery.sequence)
        for record in world.machine.ready():
            world.machine.resume(record.id)
    one, two = world.mirrors
    munmap, release = EventType.MUNMAP, EventType.RELEASE
    assert heard == [(one, munmap), (two, munmap), (one, release), (two, release)]
    world.settle()
    assert ending.done
    assert world.machine.frames.available == available + 4
    assert error_of(world.start(devices.fault, one, [span(0)], write=False)).errno == errno.ENODEV


def test_abandoned_update_fails_the_fault_and_leaves_the_mirror_live() -> None:
    """Policy FAIL: ETIMEDOUT for the caller; later events reach the mirror once the late answer has come."""
    world = World(policy=DeadlinePolicy.FAIL)
    mirror = world.mirrors[0]
    fault = world.start(devices.fault, mirror, [span(0)], write=True)
    (update,) = world.sent()
    world.machine.abandon(mirror, update.sequence)
    world.resume(fault)
    (part,) = fault.result.parts
    assert isinstance(part.error, TimedOutError)
    assert world.machine.mirrors[mirror].state is MirrorState.LIVE
    world.machine.answer(mirror, update.sequence)
    assert world.do(processes.munmap, world.pid, START, PAGE_SIZE) == 0
    world.machine.check()


def test_truncation_goes_on_when_a_space_unmaps_the_file_meanwhile() -> None:
    """While one space is told, another one may unmap the file, and is not looked for any more."""
    world = World()
    file = world.do(files.open_file, "f", create=True)
    world.do(files.write_file, file, 0, b"x" * PAGE_SIZE)
    other = world.do(processes.create_process, "other")
    for pid in (world.pid, other):
        world.do(processes.mmap, pid, span(32).start, PAGE_SIZE, RW, MapFlag.SHARED | MapFlag.FIXED, file, 0)
        world.do(processes.touch, pid, span(32), write=True)
    truncation = world.start(files.truncate_file, file, 0)
    assert not truncation.done
    assert world.start(processes.munmap, other, span(32).start, PAGE_SIZE).done
    world.settle()
    assert truncation.error is None
    world.machine.check()


def test_exit_goes_on_when_a_mirror_with_policy_fail_does_not_answer() -> None:
    """A death cannot be taken back."""
    world = World(policy=DeadlinePolicy.FAIL)
    ending = world.start(processes.exit_process, world.pid)
    for _ in range(2):
        for delivery in world.sent():
            world.machine.abandon(delivery.mirror_id, delivery.sequence)
        while ready := world.machine.ready():
            world.machine.resume(ready[0].id)
    assert ending.error is None
    assert not world.machine.spaces


def test_threads_share_the_space_until_the_last_one_exits() -> None:
    """CLONE_VM: exit of one user sends nothing."""
    world = World()
    thread = world.do(processes.clone_thread, world.pid)
    world.do(processes.exit_process, world.pid)
    assert world.do(processes.read_memory, thread, START, 1).done == 1
    assert not world.machine.mirrors[world.mirrors[0]].sequence
    world.do(processes.exit_process, thread)
    assert world.machine.mirrors[world.mirrors[0]].sequence == 2


def test_exec_leaves_the_mirrors_with_the_old_space() -> None:
    """exec_mmap(): the mirrored address space ends, the process goes on with an empty one."""
    world = World()
    world.do(processes.exec_process, world.pid, "other")
    assert world.machine.mirrors[world.mirrors[0]].state is MirrorState.RELEASED
    assert world.machine.processes[world.pid].name == "other"
    assert world.do(processes.read_memory, world.pid, START, 1).signal is not None


def test_register_mirror_is_refused_when_the_device_mirrors_the_space_already() -> None:
    """One mirror per (device, mm): EINVAL; the posted code let duplicates through."""
    world = World()
    again = world.start(devices.register_mirror, world.devices[0], world.pid)
    assert error_of(again).errno == errno.EINVAL
    thread = world.do(processes.clone_thread, world.pid)
    shared = world.start(devices.register_mirror, world.devices[0], thread)
    assert isinstance(error_of(shared), ConflictError)


def test_unregister_device_is_refused_while_it_has_mirrors() -> None:
    """hmm_device_unregister(): EBUSY."""
    world = World()
    refused = world.start(devices.unregister_device, world.devices[0])
    assert (error_of(refused).errno, error_of(refused).reason) == (errno.EBUSY, "IN_USE")
    world.do(devices.unregister_mirror, world.mirrors[0])
    world.do(devices.unregister_device, world.devices[0])
    assert error_of(world.start(devices.unregister_device, world.devices[0])).errno == errno.ENODEV


def test_unregister_device_is_refused_when_a_mirror_came_while_its_memory_was_emptied() -> None:
    """EBUSY, and the device stays; who unregistered it meanwhile as well finds none any more."""
    world = World(limits=Limits(frames=64, device_frames=16))
    card = world.do(devices.register_device, "card", memory_pages=8)
    first = world.do(today.attach, card, world.pid)
    world.do(processes.write_memory, world.pid, START, b"page")
    world.do(today.migrate_to_device, first, span(0))
    world.do(today.detach, first)
    refused = world.start(devices.unregister_device, card)
    assert not refused.done
    second = world.do(today.attach, card, world.pid)
    assert error_of(refused).errno == errno.EBUSY
    assert world.do(today.migrate_to_device, second, span(0)).src.any()
    world.do(today.detach, second)
    calls = [world.start(devices.unregister_device, card) for _ in range(2)]
    world.settle()
    (refusal,) = [error_of(call) for call in calls if call.error is not None]
    assert (refusal.errno, refusal.message) == (errno.ENODEV, f"there is no device {card}")
    world.machine.check()


@pytest.mark.breaks_invariants
def test_check_finds_dma_addresses_that_a_mirror_has_left_mapped() -> None:
    """They are all unmapped when the device's last mirror goes."""
    world = World(mirrors=0)
    card = world.do(devices.register_device, "card", dma=True)
    world.do(devices.unregister_mirror, world.do(devices.register_mirror, card, world.pid))
    world.machine.check()
    iommu = world.machine.device(card).iommu
    assert iommu is not None
    iommu.reserve(1)
    with pytest.raises(AssertionError, match="1 pages mapped for DMA, and no mirror"):
        world.machine.check()


def test_unregister_that_fails_leaves_a_mirror_to_who_else_is_ending_it() -> None:
    """A driver whose answer was its end gets no more entries, though it did not answer another call in time."""
    world = World(policy=DeadlinePolicy.FAIL)
    machine, (mirror,) = world.machine, world.mirrors
    world.do(devices.fault, mirror, [span(0)], write=True)
    leaving = world.start(devices.unregister_mirror, mirror)
    (owed,) = world.sent()
    unmapping = world.start(processes.munmap, world.pid, START, PAGE_SIZE)
    (refused,) = world.sent()
    machine.answer(mirror, refused.sequence, errno.EIO)
    world.resume(unmapping)
    machine.abandon(mirror, owed.sequence)
    world.resume(leaving)
    assert error_of(leaving).errno == errno.ETIMEDOUT
    assert not unmapping.done
    assert error_of(world.start(devices.fault, mirror, [span(1)], write=True)).errno == errno.ENODEV
    world.settle()
    machine.answer(mirror, owed.sequence)
    world.settle()
    assert unmapping.done
    machine.check()


def test_lookup_is_refused_when_the_object_belongs_to_another_token() -> None:
    """EPERM: a process, device or mirror belongs to the token that created it."""
    world = World()
    mine, yours = Caller(token="mine"), Caller(token="yours")
    pid = world.do(processes.create_process, "mine", caller=mine)
    device = world.do(devices.register_device, "mine", caller=mine)
    mirror = world.do(devices.register_mirror, device, pid, caller=mine)
    for command, arguments in (
        (processes.munmap, (pid, START, PAGE_SIZE)),
        (devices.unregister_device, (device,)),
        (devices.unregister_mirror, (mirror,)),
    ):
        refused = world.start(command, *arguments, caller=yours)
        assert isinstance(error_of(refused), AccessDeniedError)
        assert refused.error.errno == errno.EPERM
    world.do(devices.unregister_mirror, mirror, caller=mine)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (processes.munmap, (9, START, PAGE_SIZE)),
        (devices.register_mirror, (9, 1)),
        (devices.register_mirror, (1, 9)),
        (devices.unregister_mirror, (9,)),
        (devices.fault, (9, [AddressRange(START, START + PAGE_SIZE)])),
        (processes.mmap, (1, 0, PAGE_SIZE, RW, MapFlag.PRIVATE, 9)),
    ],
)
def test_lookup_fails_when_there_is_no_such_object(command: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """ESRCH, ENODEV or EBADF, and nothing is changed."""
    world = World()
    options = {"write": False} if command is devices.fault else {}
    record = world.start(command, *arguments, **options)
    assert isinstance(error_of(record), NoSuchObjectError)


def test_limits_are_enomem_one_past_the_last() -> None:
    """Processes, devices and mirrors are counted."""
    world = World(mirrors=2, limits=Limits(frames=256, device_frames=0, processes=2, devices=2, mirrors=2))
    world.do(processes.create_process)
    assert isinstance(error_of(world.start(processes.create_process)), OutOfFramesError)
    assert isinstance(error_of(world.start(processes.fork, world.pid)), OutOfFramesError)
    assert isinstance(error_of(world.start(processes.vfork, world.pid)), OutOfFramesError)
    assert isinstance(error_of(world.start(devices.register_device, "three")), OutOfFramesError)
    assert isinstance(error_of(world.start(devices.register_mirror, 1, 2)), OutOfFramesError)


def test_pending_says_who_waits_for_whom() -> None:
    """One that waits for a driver, one for its turn."""
    world = World()
    first = world.start(processes.munmap, world.pid, START, PAGE_SIZE, caller=Caller(name="harness"))
    second = world.start(processes.munmap, world.pid, span(4).start, PAGE_SIZE)
    driver, queue = pending(world.machine)
    assert (driver.operation_id, driver.caller, driver.name) == (first.id, "harness", "munmap")
    assert driver.answers == ((world.mirrors[0], 1),)
    assert "munmap [0x10000000, 0x10001000)" in driver.request
    assert (queue.operation_id, queue.operations, queue.cycle) == (second.id, (first.id,), False)
    world.settle()
    assert not pending(world.machine)


def test_pending_shows_a_cycle_through_a_callback() -> None:
    """Two callbacks that wait for each other's invalidation: the second call with the mark fails at once."""
    world = World(mirrors=2)
    world.do(processes.write_memory, world.pid, START, b"x" * 16 * PAGE_SIZE)
    world.do(processes.fork, world.pid)
    world.start(processes.write_memory, world.pid, span(0).start, b"y")
    world.start(processes.write_memory, world.pid, span(8).start, b"y")
    sent = {(delivery.mirror_id, delivery.event.spans[0]): delivery for delivery in world.sent()}
    one = sent.get((world.mirrors[0], span(0)))
    two = sent.get((world.mirrors[1], span(8)))
    assert one is not None
    assert two is not None
    inside_one, inside_two = (Caller(callback=(d.mirror_id, d.sequence)) for d in (one, two))
    waiting = world.start(devices.fault, world.mirrors[0], [span(8)], write=False, caller=inside_one)
    assert not any(blocked.cycle for blocked in pending(world.machine))
    last = world.start(devices.fault, world.mirrors[1], [span(0)], write=False, caller=inside_two)
    assert isinstance(error_of(last), WouldDeadlockError)
    assert not waiting.done
    for delivery in (one, two):
        world.machine.answer(delivery.mirror_id, delivery.sequence)
    world.settle()


@pytest.mark.breaks_invariants
def test_internal_error_marks_the_space_broken_and_never_goes_on_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug of ours inside a bracket: the call ends with it, later calls on that space are refused."""
    world = World()
    monkeypatch.setattr(type(world.machine.spaces[1]), "zap", lambda *_: 1 / 0)
    world.do(processes.write_memory, world.pid, START, b"x")
    record = world.start(processes.munmap, world.pid, START, PAGE_SIZE)
    world.settle()
    assert isinstance(record.error, ZeroDivisionError)
    assert "munmap" in world.machine.spaces[1].notifier.broken
    refused = world.start(processes.munmap, world.pid, span(4).start, PAGE_SIZE)
    world.settle()
    assert isinstance(refused.error, AssertionError)
