"""Interval notifiers: subscriptions, sequences, read sections (hmm-modern: mmu_interval_notifier)."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest
from area import BASE
from machine_world import START, World, error_of

from hmm import commands_device, commands_hmm, commands_process, cpu_pte
from hmm.errors import (
    BadAddressError,
    DeviceLostError,
    HmmError,
    InvalidRequestError,
    NoSuchObjectError,
    RangeBusyError,
    Signal,
    TimedOutError,
    WouldDeadlockError,
)
from hmm.events import Reason
from hmm.madvise import Advice
from hmm.operation import Await, WaitFor
from hmm.operation_record import Caller
from hmm.range_fault import REQ_FAULT, word_pfns
from hmm.receiver import DeadlinePolicy
from hmm.testing_drivers import IntervalDrivers
from hmm.units import PAGE_SIZE, TASK_SIZE
from hmm.unmapped_area import MapFlag


def unmap(bench: Any, at: int, npages: int = 1) -> None:
    """munmap pages of the window."""
    span = bench.span(at, npages)
    bench.call(commands_process.munmap, bench.process, span.start, span.size_bytes)


def begin(bench: Any, number: int = 1) -> int:
    """mmu_interval_read_begin()."""
    sequence: int = bench.call(commands_hmm.read_begin, bench.mirror, number)
    return sequence


def retry(bench: Any, sequence: int, number: int = 1) -> bool:
    """mmu_interval_read_retry()."""
    moved: bool = bench.call(commands_hmm.read_retry, bench.mirror, number, sequence)
    return moved


@pytest.mark.parametrize(("start", "length"), [(BASE, 0), ((1 << 64) - PAGE_SIZE, 2 * PAGE_SIZE)])
def test_insert_fails_when_the_range_is_empty_or_wraps(bench: Any, start: int, length: int) -> None:
    """A length of 0, and an end behind all addresses, are EOVERFLOW."""
    with pytest.raises(InvalidRequestError) as error:
        bench.call(commands_hmm.insert_notifier, bench.mirror, start, length)
    assert error.value.errno == errno.EOVERFLOW


def test_insert_fails_when_the_process_has_exited(bench: Any) -> None:
    """A subscription needs an address space with users: EINVAL."""
    bench.call(commands_process.exit_process, bench.process)
    with pytest.raises(InvalidRequestError) as error:
        bench.call(commands_hmm.insert_notifier, bench.mirror, BASE, PAGE_SIZE)
    assert error.value.errno == errno.EINVAL


def test_read_section_holds_when_nothing_happened(bench: Any) -> None:
    """A fresh subscription does not block, and its sequence stays."""
    assert not retry(bench, begin(bench))


def test_read_section_is_to_be_repeated_when_its_range_was_invalidated(bench: Any) -> None:
    """The sequence moves with an overlapping invalidation."""
    sequence = begin(bench)
    unmap(bench, 3)
    assert retry(bench, sequence)
    assert not retry(bench, begin(bench))


def test_read_section_holds_when_the_invalidation_is_elsewhere(bench: Any) -> None:
    """A change outside of the range of the subscription neither moves it nor is told."""
    number = bench.call(commands_hmm.insert_notifier, bench.mirror, BASE, 2 * PAGE_SIZE)
    sequence = begin(bench, number)
    unmap(bench, 5)
    assert not retry(bench, sequence, number)


def test_event_carries_the_whole_range_when_the_subscription_is_smaller(bench: Any) -> None:
    """The range is that of the event and not clipped to the subscription."""
    bench.call(commands_hmm.remove_notifier, bench.mirror, bench.notifier)
    bench.call(commands_hmm.insert_notifier, bench.mirror, BASE + PAGE_SIZE, 100)
    unmap(bench, 0, 4)
    assert [event.spans for event in bench.heard.events] == [(bench.span(0, 4),)]


def test_removed_subscription_hears_nothing(bench: Any) -> None:
    """Behind remove no callback comes; removing twice is ENOENT."""
    bench.call(commands_hmm.remove_notifier, bench.mirror, bench.notifier)
    unmap(bench, 0)
    assert bench.heard.events == []
    with pytest.raises(NoSuchObjectError):
        bench.call(commands_hmm.remove_notifier, bench.mirror, bench.notifier)


def test_read_begin_waits_when_the_range_is_being_invalidated(bench: Any) -> None:
    """From the callback to the end of the invalidation a read section cannot begin."""
    machine = bench.local.machine
    call = machine.start(Caller(), commands_process.munmap, bench.process, BASE, PAGE_SIZE)
    reader = machine.start(Caller(), commands_hmm.read_begin, bench.mirror, bench.notifier)
    assert isinstance(reader.request, Await)
    assert reader.request.wait_for is WaitFor.SEQUENCE
    assert machine.blockers(reader) == [call.id]
    (delivery,) = machine.take_outbox()
    machine.answer(bench.mirror, delivery.sequence)
    machine.resume(call.id)
    machine.resume(reader.id)
    assert call.done
    assert not retry(bench, reader.result)
    machine.check()


def test_insert_is_deferred_when_an_invalidation_runs(bench: Any) -> None:
    """A subscription made meanwhile blocks readers until the end and hears nothing of what started before it."""
    machine = bench.local.machine
    call = machine.start(Caller(), commands_process.munmap, bench.process, BASE, PAGE_SIZE)
    number = bench.call(commands_hmm.insert_notifier, bench.mirror, BASE, PAGE_SIZE)
    reader = machine.start(Caller(), commands_hmm.read_begin, bench.mirror, number)
    assert not reader.done
    (delivery,) = machine.take_outbox()
    machine.answer(bench.mirror, delivery.sequence)
    machine.resume(call.id)
    machine.resume(reader.id)
    assert reader.done
    bench.map(1)
    sequence = begin(bench, number)
    unmap(bench, 0)
    assert retry(bench, sequence, number)


def test_remove_waits_when_an_invalidation_runs(bench: Any) -> None:
    """When remove returns, no callback is running."""
    machine = bench.local.machine
    call = machine.start(Caller(), commands_process.munmap, bench.process, BASE, PAGE_SIZE)
    removal = machine.start(Caller(), commands_hmm.remove_notifier, bench.mirror, bench.notifier)
    assert not removal.done
    (delivery,) = machine.take_outbox()
    machine.answer(bench.mirror, delivery.sequence)
    machine.resume(call.id)
    machine.resume(removal.id)
    assert removal.done


def test_remove_does_not_wait_when_what_changes_concerns_a_mirror_of_2015_alone(bench: Any) -> None:
    """mn_itree_inv_start_range() makes the sequence odd only if a subscription overlaps."""
    machine = bench.local.machine
    old = bench.call(commands_device.register_mirror, bench.call(commands_device.register_device, "old"), bench.process)
    bench.call(commands_hmm.remove_notifier, bench.mirror, bench.notifier)
    number = bench.call(commands_hmm.insert_notifier, bench.mirror, bench.span(8).start, PAGE_SIZE)
    call = machine.start(Caller(), commands_process.munmap, bench.process, BASE, PAGE_SIZE)
    (told,) = machine.take_outbox()
    assert told.mirror_id == old
    removal = machine.start(Caller(), commands_hmm.remove_notifier, bench.mirror, number)
    assert removal.done
    machine.answer(old, told.sequence)
    machine.resume(call.id)
    machine.check()


def test_remove_fails_when_called_inside_a_callback(bench: Any) -> None:
    """It would wait for the callback that it is called from: EDEADLK."""
    errors: list[HmmError] = []

    def remove(_: object) -> None:
        try:
            bench.call(commands_hmm.remove_notifier, bench.mirror, bench.notifier)
        except WouldDeadlockError as error:
            errors.append(error)

    bench.heard.meanwhile = remove
    unmap(bench, 0)
    assert len(errors) == 1


def test_exit_releases_unmaps_and_keeps_the_subscription(bench: Any) -> None:
    """The last user's exit is RELEASE of all addresses, then unmap_vmas() of them; the driver still has to detach."""
    bench.call(commands_process.exit_process, bench.process)
    assert bench.heard.reasons == [Reason.RELEASE, Reason.UNMAP]
    assert all(event.spans[0].end == TASK_SIZE for event in bench.heard.events)
    bench.call(commands_hmm.detach, bench.mirror)
    assert not bench.local.machine.receivers


def test_exit_unmaps_nothing_when_nothing_is_mapped(bench: Any) -> None:
    """exit_mmap() ends before unmap_vmas() where there is no VMA: RELEASE is all that is told."""
    process = bench.call(commands_process.create_process, "empty")
    _, heard = bench.attach(bench.device, process)
    bench.call(commands_process.exit_process, process)
    assert heard.reasons == [Reason.RELEASE]


def test_detach_changes_nothing_when_an_owed_answer_does_not_come(bench: Any) -> None:
    """The driver is still there, and has to be told: mmu_interval_notifier_remove() comes when nothing is owed."""
    machine = bench.local.machine
    mirror = bench.call(commands_hmm.attach, bench.device, bench.process, policy=DeadlinePolicy.FAIL)
    number = bench.call(commands_hmm.insert_notifier, mirror, 0, TASK_SIZE)
    unmapping = machine.start(Caller(), commands_process.munmap, bench.process, BASE, PAGE_SIZE)
    told, owed = machine.take_outbox()
    machine.answer(told.mirror_id, told.sequence)
    machine.abandon(mirror, owed.sequence)
    machine.resume(unmapping.id)
    leaving = machine.start(Caller(), commands_hmm.detach, mirror)
    machine.expire(leaving.id)
    assert isinstance(leaving.error, TimedOutError)
    assert list(machine.receivers[mirror].notifiers) == [number]
    machine.answer(mirror, owed.sequence)
    machine.start(Caller(), commands_process.munmap, bench.process, BASE, PAGE_SIZE)
    assert [delivery.mirror_id for delivery in machine.take_outbox()] == [bench.mirror, mirror]


@pytest.mark.parametrize("leave", [commands_hmm.detach, commands_hmm.remove_notifier])
def test_leaving_changes_nothing_when_an_event_is_abandoned_meanwhile(bench: Any, leave: Any) -> None:
    """No callback may run for a notifier that is gone: until the answer came, it is there, and hears of changes."""
    machine = bench.local.machine
    mirror = bench.call(commands_hmm.attach, bench.device, bench.process, policy=DeadlinePolicy.FAIL)
    numbers = [bench.call(commands_hmm.insert_notifier, mirror, at, PAGE_SIZE) for at in (0, BASE)]
    unmapping = machine.start(Caller(), commands_process.munmap, bench.process, BASE, PAGE_SIZE)
    told, owed = machine.take_outbox()
    machine.answer(told.mirror_id, told.sequence)
    arguments = (mirror,) if leave is commands_hmm.detach else (mirror, numbers[1])
    leaving = machine.start(Caller(), leave, *arguments)
    machine.abandon(mirror, owed.sequence)
    for record in (unmapping, leaving):
        if machine.is_ready(record):
            machine.resume(record.id)
    assert isinstance(unmapping.error, TimedOutError)
    assert not leaving.done
    machine.expire(leaving.id)
    assert isinstance(leaving.error, TimedOutError)
    assert list(machine.receivers[mirror].notifiers) == numbers
    machine.answer(mirror, owed.sequence)
    again = machine.start(Caller(), commands_process.munmap, bench.process, BASE, PAGE_SIZE)
    assert [delivery.mirror_id for delivery in machine.take_outbox()] == [bench.mirror, mirror]
    machine.answer(bench.mirror, 2)
    machine.answer(mirror, owed.sequence + 1)
    machine.resume(again.id)
    assert machine.start(Caller(), leave, *arguments).done
    left = machine.receivers[mirror].notifiers if mirror in machine.receivers else ()
    assert numbers[1] not in left


def test_removing_does_not_wait_for_an_abandoned_event_of_another_range(bench: Any) -> None:
    """mmu_interval_notifier_remove() promises nothing of callbacks for other notifiers."""
    machine = bench.local.machine
    mirror = bench.call(commands_hmm.attach, bench.device, bench.process, policy=DeadlinePolicy.FAIL)
    other, _ = [bench.call(commands_hmm.insert_notifier, mirror, at, PAGE_SIZE) for at in (0, BASE)]
    unmapping = machine.start(Caller(), commands_process.munmap, bench.process, BASE, PAGE_SIZE)
    told, owed = machine.take_outbox()
    machine.answer(told.mirror_id, told.sequence)
    machine.abandon(mirror, owed.sequence)
    machine.resume(unmapping.id)
    assert machine.start(Caller(), commands_hmm.remove_notifier, mirror, other).done


def test_device_has_stopped_when_its_driver_detaches(bench: Any) -> None:
    """It hears nothing of what begins after running invalidations have ended, even before detach returns."""
    machine = bench.local.machine
    drivers = IntervalDrivers(machine)
    other = bench.call(commands_hmm.attach, bench.device, bench.process)
    bench.call(commands_hmm.insert_notifier, other, 0, TASK_SIZE)
    bench.write(0, b"x")
    drivers.finished(
        machine.start(
            Caller(), commands_hmm.range_fault_unlocked, bench.mirror, bench.notifier, bench.span(0), REQ_FAULT
        )
    )
    leaving, heard = None, []
    for at in (1, 0):
        unmapping = machine.start(Caller(), commands_process.munmap, bench.process, BASE + at * PAGE_SIZE, PAGE_SIZE)
        told = machine.take_outbox()
        heard.append([delivery.mirror_id for delivery in told])
        machine.answer(told[0].mirror_id, told[0].sequence)
        leaving = leaving or machine.start(Caller(), commands_hmm.detach, bench.mirror)
        drivers.check([leaving])
        for delivery in told[1:]:
            machine.answer(delivery.mirror_id, delivery.sequence)
        machine.resume(unmapping.id)
    assert heard == [[bench.mirror, other], [other]]
    assert leaving is not None
    assert not leaving.done
    drivers.check([leaving])


def test_own_migration_does_not_disturb_a_filtered_section(bench: Any) -> None:
    """A driver that filters its own migrations is not made to repeat its read sections by them."""
    bench.write(0, b"x")
    filtered = bench.call(commands_hmm.insert_notifier, bench.mirror, 0, TASK_SIZE, filtered=True)
    own, other = begin(bench, filtered), begin(bench)
    bench.to_device(0, 1)
    assert not retry(bench, own, filtered)
    assert retry(bench, other)


def test_commands_fail_when_the_mirror_is_one_of_2015(bench: Any) -> None:
    """A mirror with a table in the daemon has no interval notifiers, and the other way round: ENODEV."""
    old = bench.call(commands_device.register_mirror, bench.call(commands_device.register_device, "old"), bench.process)
    with pytest.raises(NoSuchObjectError):
        bench.call(commands_hmm.read_begin, old, 1)
    with pytest.raises(NoSuchObjectError):
        bench.call(commands_device.read_table, bench.mirror, bench.span(0))


def two_mirrors(bench: Any, *, two_pass: tuple[bool, bool]) -> tuple[int, int]:
    """Two mirrors with a subscription each to everything; the bench's own has none."""
    bench.call(commands_hmm.remove_notifier, bench.mirror, bench.notifier)
    mirrors = []
    for passes in two_pass:
        mirror = bench.call(commands_hmm.attach, bench.device, bench.process)
        bench.call(commands_hmm.insert_notifier, mirror, 0, TASK_SIZE, two_pass=passes)
        mirrors.append(mirror)
    return mirrors[0], mirrors[1]


def test_second_pass_comes_when_all_have_started(bench: Any) -> None:
    """mn_itree_finish_pass(): all starts first; then those who have not finished, in the order of their starts."""
    first, second = two_mirrors(bench, two_pass=(True, True))
    machine, span = bench.local.machine, bench.span(0, 2)
    record = machine.start(Caller(), commands_process.munmap, bench.process, span.start, span.size_bytes)
    starts = machine.take_outbox()
    assert [start.mirror_id for start in starts] == [first, second]
    assert not any(start.event.finishes for start in starts)
    machine.answer(second, 1, errno.EINPROGRESS)
    assert not machine.ready()
    machine.answer(first, 1, errno.EINPROGRESS)
    machine.resume(record.id)
    finishes = machine.take_outbox()
    assert [(one.mirror_id, one.sequence, one.event.finishes) for one in finishes] == [
        (first, 2, starts[0].event.revision), (second, 2, starts[0].event.revision)
    ]  # fmt: skip
    assert finishes[0].event.spans == (span,)
    assert bench.local.machine.processes[bench.process].space.notifier.sequence & 1
    for one in finishes:
        machine.answer(one.mirror_id, one.sequence)
    machine.resume(record.id)
    assert record.result == 0
    machine.check()


def test_second_pass_is_left_out_when_the_first_did_all(bench: Any) -> None:
    """A start without a token has done the whole job; a fenced mirror is not called again."""
    first, second = two_mirrors(bench, two_pass=(True, True))
    machine, span = bench.local.machine, bench.span(0, 2)
    record = machine.start(Caller(), commands_process.munmap, bench.process, span.start, span.size_bytes)
    machine.take_outbox()
    machine.answer(first, 1, errno.EINPROGRESS)
    machine.fence(first, "gone")
    machine.answer(second, 1)
    machine.resume(record.id)
    assert record.result == 0
    assert not machine.take_outbox()
    machine.check()


def test_mirror_is_not_ended_when_it_was_lost_while_others_finished(bench: Any) -> None:
    """Its error on the first pass is its end, of which it is told after the second pass; by then it may be gone."""
    first, second = two_mirrors(bench, two_pass=(True, False))
    machine, span = bench.local.machine, bench.span(0, 2)
    gpu = bench.call(commands_device.register_device, "gpu")
    mirror = bench.call(commands_device.register_mirror, gpu, bench.process)
    record = machine.start(Caller(), commands_process.munmap, bench.process, span.start, span.size_bytes)
    answers = {first: errno.EINPROGRESS, second: 0, mirror: errno.EIO}
    for told in machine.take_outbox():
        machine.answer(told.mirror_id, told.sequence, answers[told.mirror_id])
    machine.resume(record.id)
    (finish,) = machine.take_outbox()
    machine.fence(mirror, "gone")
    bench.call(commands_device.unregister_mirror, mirror)
    machine.answer(finish.mirror_id, finish.sequence)
    machine.resume(record.id)
    assert record.result == 0
    assert not machine.take_outbox()
    machine.check()


def test_lost_mirror_is_refused_in_the_name_of_the_call(bench: Any) -> None:
    """What looks a mirror up for any call leaves the call's name to who knows it (`HmmError.named`)."""
    bench.local.machine.fence(bench.mirror, "no answer in time")
    with pytest.raises(DeviceLostError) as caught:
        bench.call(commands_hmm.find_vma, bench.mirror, bench.span(0).start)
    error = caught.value.named("find vma")
    assert error.message == f"find vma: mirror {bench.mirror} (card) was fenced: no answer in time"


def test_mirror_with_one_pass_cannot_put_it_off(bench: Any) -> None:
    """EINPROGRESS is no answer there: it counts as done, and as a bug of the driver."""
    first, second = two_mirrors(bench, two_pass=(False, False))
    machine, span = bench.local.machine, bench.span(0, 2)
    record = machine.start(Caller(), commands_process.munmap, bench.process, span.start, span.size_bytes)
    for mirror in (first, second):
        machine.answer(mirror, 1, errno.EINPROGRESS)
    machine.resume(record.id)
    assert record.result == 0
    assert machine.receivers[first].counters["undocumented_errors"] == 1


def test_reaping_fails_when_a_driver_refuses(bench: Any) -> None:
    """process_mrelease(): EAGAIN; the refused range is still there, and those who agreed have lost their sections."""
    first, second = two_mirrors(bench, two_pass=(True, False))
    bench.write(0, b"kept")
    machine = bench.local.machine
    sequences = [bench.call(commands_hmm.read_begin, mirror, 1) for mirror in (first, second)]
    record = machine.start(Caller(), commands_process.process_mrelease, bench.process)
    deliveries = machine.take_outbox()
    assert [(one.event.reason, one.event.blockable) for one in deliveries] == [(Reason.UNMAP, False)] * 2
    machine.answer(second, deliveries[1].sequence, errno.EAGAIN)
    machine.answer(first, deliveries[0].sequence, errno.EINPROGRESS)
    machine.resume(record.id)
    (finish,) = machine.take_outbox()  # what has started finishes, although nothing will be changed
    assert finish.mirror_id == first
    machine.answer(first, finish.sequence)
    machine.resume(record.id)
    with pytest.raises(RangeBusyError) as refused:
        assert record.result
    assert refused.value.errno == errno.EAGAIN
    assert cpu_pte.is_present(bench.entry(0))
    assert all(
        bench.call(commands_hmm.read_retry, mirror, 1, sequence)
        for mirror, sequence in zip((first, second), sequences, strict=True)
    )
    machine.check()


def test_driver_uses_a_page_when_it_could_not_give_it_up_at_once(bench: Any) -> None:
    """mn_hlist_invalidate_range_start(): a callback that may not block and fails has given up nothing."""
    first, second = two_mirrors(bench, two_pass=(False, False))
    bench.write(0, b"kept")
    machine = bench.local.machine
    where = np.array([BASE], np.uint64), cpu_pte.cpu_pfn(np.array([bench.entry(0)], np.uint64))
    machine.start(Caller(), commands_process.process_mrelease, bench.process)
    deliveries = machine.take_outbox()
    machine.answer(first, deliveries[0].sequence)
    assert error_of(machine.start(Caller(), commands_hmm.read_frames, first, *where)).errno == errno.EFAULT
    machine.answer(second, deliveries[1].sequence, errno.EAGAIN)
    assert machine.start(Caller(), commands_hmm.read_frames, second, *where).result[:4] == b"kept"


def test_reaping_goes_on_when_a_driver_refuses_to_finish_what_it_has_started(bench: Any) -> None:
    """The second pass cannot fail: an error counts as done, and as a bug of the driver."""
    first, second = two_mirrors(bench, two_pass=(True, False))
    bench.write(0, b"gone")
    machine = bench.local.machine
    record = machine.start(Caller(), commands_process.process_mrelease, bench.process)
    started, done = machine.take_outbox()
    machine.answer(first, started.sequence, errno.EINPROGRESS)
    machine.answer(second, done.sequence)
    machine.resume(record.id)
    (finish,) = machine.take_outbox()
    machine.answer(first, finish.sequence, errno.EAGAIN)
    machine.resume(record.id)
    assert (record.done, record.error, bench.entry(0)) == (True, None, 0)
    counters = machine.receivers[first].counters
    assert (counters["undocumented_errors"], counters["refused"]) == (1, 0)


def test_reaped_memory_is_gone_and_nothing_comes_any_more(bench: Any) -> None:
    """MMF_UNSTABLE: a touch is SIGBUS, a device's fault EFAULT; shared memory stays; the process can still exit."""
    shared = MapFlag.SHARED | MapFlag.FIXED | MapFlag.ANONYMOUS
    bench.map(1, at=20, flags=shared)
    bench.write(0, b"private")
    bench.write(20, b"shared")
    bench.call(commands_process.process_mrelease, bench.process)
    assert bench.heard.events[-1].spans == (bench.span(0, 16),)
    assert bench.entry(0) == 0
    assert bench.read(20, 6) == b"shared"
    accessed = bench.call(commands_process.read_memory, bench.process, bench.span(0).start, 1)
    assert accessed.signal is Signal.BUS_ADRERR
    faulted = bench.call(commands_hmm.range_fault_unlocked, bench.mirror, bench.notifier, bench.span(0), REQ_FAULT)
    assert faulted.error.errno == errno.EFAULT
    bench.call(commands_process.exit_process, bench.process)
    bench.local.machine.check()


def test_holes_are_not_migrated_when_the_process_is_reaped(bench: Any) -> None:
    """migrate_vma_insert_page() asks check_stable_address_space()."""
    bench.call(commands_process.process_mrelease, bench.process)
    assert not bench.to_device(0, 4).src.any()
    assert [bench.entry(at) for at in range(4)] == [0] * 4
    assert bench.used == 0
    bench.local.machine.check()


def test_device_may_use_a_page_until_its_driver_has_finished(bench: Any) -> None:
    """A start only begins to stop the device; it may use what it has until the second pass is answered."""
    first, second = two_mirrors(bench, two_pass=(True, False))
    bench.write(0, b"kept")
    machine, span = bench.local.machine, bench.span(0)
    faulted = bench.call(commands_hmm.range_fault_unlocked, first, 1, span, REQ_FAULT)
    reached = (first, np.array([span.start], np.uint64), word_pfns(faulted.words))
    record = machine.start(Caller(), commands_process.munmap, bench.process, span.start, span.size_bytes)
    machine.take_outbox()
    machine.answer(first, 1, errno.EINPROGRESS)
    assert bench.call(commands_hmm.read_frames, *reached)[:4] == b"kept"
    machine.answer(second, 1)
    machine.resume(record.id)
    (finish,) = machine.take_outbox()
    assert machine.start(Caller(), commands_hmm.read_frames, *reached).result[:4] == b"kept"
    machine.answer(first, finish.sequence)
    late = machine.start(Caller(), commands_hmm.read_frames, *reached)
    assert isinstance(late.error, BadAddressError)
    machine.resume(record.id)
    assert record.result == 0


def test_nothing_changes_when_a_driver_that_may_fail_the_call_does_not_finish_in_time(bench: Any) -> None:
    """DeadlinePolicy.FAIL holds for the second pass too: until its answer the device may use the pages."""
    bench.call(commands_hmm.remove_notifier, bench.mirror, bench.notifier)
    mirror = bench.call(commands_hmm.attach, bench.device, bench.process, policy=DeadlinePolicy.FAIL)
    bench.call(commands_hmm.insert_notifier, mirror, 0, TASK_SIZE, two_pass=True)
    bench.write(0, b"kept")
    machine, span = bench.local.machine, bench.span(0)
    record = machine.start(Caller(), commands_process.munmap, bench.process, span.start, span.size_bytes)
    machine.take_outbox()
    machine.answer(mirror, 1, errno.EINPROGRESS)
    machine.resume(record.id)
    (finish,) = machine.take_outbox()
    machine.abandon(mirror, finish.sequence)
    machine.resume(record.id)
    assert isinstance(record.error, TimedOutError)
    assert cpu_pte.is_present(bench.entry(0))
    machine.answer(mirror, finish.sequence)
    machine.check()


def test_remove_that_fails_leaves_alone_what_another_call_is_removing() -> None:
    """What is being removed hears nothing that begins when the running invalidations have ended, whoever else tried."""
    world = World(mirrors=0)
    card = world.do(commands_device.register_device, "card")
    mirror = world.do(commands_hmm.attach, card, world.pid)
    number = world.do(commands_hmm.insert_notifier, mirror, START, PAGE_SIZE)
    world.do(commands_process.write_memory, world.pid, START, b"x")
    page = (world.pid, START, PAGE_SIZE, Advice.DONTNEED)
    running = world.start(commands_process.madvise, *page)
    (told,) = world.sent()
    removing = world.start(commands_hmm.remove_notifier, mirror, number)
    inside = Caller(name="driver", callback=(mirror, told.sequence))
    assert isinstance(error_of(world.start(commands_hmm.remove_notifier, mirror, number, caller=inside)), HmmError)
    world.machine.answer(mirror, told.sequence)
    world.resume(running)
    assert running.done
    assert not removing.done
    assert world.start(commands_process.madvise, *page).done
    assert world.sent() == []
