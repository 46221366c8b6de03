"""Device faults that race with changes of the address space: what was decided before a wait is decided again."""

from __future__ import annotations

import errno

import numpy as np
from machine_world import RW, START, World, error_of, span

from hmm import commands_device as devices
from hmm import commands_file as files
from hmm import commands_process as processes
from hmm.madvise import Advice
from hmm.operation import Await, WaitFor
from hmm.units import PAGE_SIZE
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot


def test_scattered_fault_leaves_out_pages_whose_mapping_was_cut_off_while_it_waited() -> None:
    """The VMA is looked up again after a wait: pages that it no longer holds are faulted by the rules of theirs."""
    world = World()
    world.do(processes.write_memory, world.pid, START, b"x" * 16 * PAGE_SIZE)
    dropping = world.start(processes.madvise, world.pid, START, PAGE_SIZE, Advice.DONTNEED)
    (event,) = world.sent()
    pages = np.arange(START, span(16).start, PAGE_SIZE, dtype=np.uint64)[[0, 2, 4, 6, 8, 9, 11, 13, 14]]
    fault = world.start(devices.fault, world.mirrors[0], pages, write=False)
    assert isinstance(fault.request, Await)
    assert fault.request.wait_for is WaitFor.INVALIDATIONS
    protecting = world.start(processes.mprotect, world.pid, span(8).start, 4 * PAGE_SIZE, Prot.NONE)
    world.machine.answer(event.mirror_id, event.sequence)
    world.resume(dropping)
    world.resume(protecting)
    (event,) = world.sent()
    world.machine.answer(event.mirror_id, event.sequence)
    world.resume(protecting)
    world.settle()
    assert [part.error.errno if part.error else 0 for part in fault.result.parts] == [0, errno.EACCES, 0]
    assert (fault.result.entries != 0).tolist() == [True] * 4 + [False] * 3 + [True] * 2
    assert not world.do(devices.read_table, world.mirrors[0], span(8, 4)).any()
    world.machine.check()


def test_scattered_fault_of_a_hole_is_one_failure() -> None:
    """However many pages of it are asked for: the mapping that ends it, or the end of all, is found at once."""
    world = World()
    pages = np.array([span(n).start for n in (15, 100, 105, 200, 300)], np.uint64)
    world.do(processes.mmap, world.pid, span(200).start, PAGE_SIZE, 3, 0x32)
    result = world.do(devices.fault, world.mirrors[0], pages, write=True)
    assert [part.error.errno if part.error else 0 for part in result.parts] == [0, errno.EFAULT, 0, errno.EFAULT]
    assert (result.entries != 0).tolist() == [True, False, False, True, False]


def test_fault_answers_ebusy_when_it_may_not_wait_for_a_call_that_changes_the_mapping() -> None:
    """A fault that asked not to wait gets EBUSY, whatever it would have to wait for."""
    world = World()
    world.do(processes.write_memory, world.pid, START, b"x")
    world.start(processes.mprotect, world.pid, START, PAGE_SIZE, Prot.READ)
    impatient = world.start(devices.fault, world.mirrors[0], [span(0)], write=False, wait=False)
    assert error_of(impatient).errno == errno.EBUSY
    assert error_of(impatient).notifier_seq is not None
    elsewhere = world.start(devices.fault, world.mirrors[0], [span(8)], write=False, wait=False)
    world.settle()
    assert elsewhere.result.parts[0].error is None


def test_fault_is_enodev_when_the_process_exits_while_it_waits() -> None:
    """A mirror may outlive its mm binding; faults then give ENODEV, those under way too."""
    world = World()
    world.do(processes.write_memory, world.pid, START, b"x")
    world.start(processes.exit_process, world.pid)
    waiting = world.start(devices.fault, world.mirrors[0], [span(0)], write=False)
    assert not waiting.done
    world.settle()
    assert error_of(waiting).errno == errno.ENODEV


def test_fault_changes_nothing_when_one_of_its_ranges_makes_no_sense() -> None:
    """A malformed request is refused before anything of it is done."""
    world = World()
    beyond = span(0, 1 << 36)
    refused = world.start(devices.fault, world.mirrors[0], [span(0), beyond], write=True)
    assert error_of(refused).errno == errno.EINVAL
    assert not world.sent()
    assert not world.machine.mirrors[world.mirrors[0]].table.count


def test_revisions_ascend_in_the_order_in_which_events_are_sent() -> None:
    """A change that had to wait for a device fault is numbered when its event is made, not when the wait began."""
    world = World()
    mirror = world.mirrors[0]
    world.do(processes.write_memory, world.pid, START, b"x" * 16 * PAGE_SIZE)
    world.do(processes.fork, world.pid)
    world.start(devices.fault, mirror, [span(0)], write=False)
    (update,) = world.sent()
    world.start(processes.write_memory, world.pid, span(0).start, b"y")
    world.start(processes.write_memory, world.pid, span(8).start, b"y")
    (elsewhere,) = world.sent()
    world.machine.answer(mirror, update.sequence)
    for record in world.machine.ready():
        world.machine.resume(record.id)
    for record in world.machine.ready():
        world.machine.resume(record.id)
    (delayed,) = world.sent()
    assert delayed.sequence == elsewhere.sequence + 1
    assert delayed.event.revision > elsewhere.event.revision


def test_fault_ends_where_it_filled_when_the_mapping_was_cut_off_before_the_page_that_failed() -> None:
    """Of a page behind the end of its file it knows when it waits, and the mapping ends before that page then."""
    world = World(mirrors=2)
    file = world.do(files.open_file, "file", create=True)
    world.do(files.write_file, file, 0, b"a" * 4 * PAGE_SIZE)
    world.do(processes.mmap, world.pid, START, 6 * PAGE_SIZE, RW, MapFlag.PRIVATE | MapFlag.FIXED, file)
    world.do(processes.read_memory, world.pid, START, 4 * PAGE_SIZE)
    mirror, other = world.mirrors
    world.do(devices.fault, other, [span(0)], write=False)
    faulting = world.start(devices.fault, mirror, [span(0, 6)], write=True, whole=False)
    copying = world.sent()
    discarding = world.start(processes.madvise, world.pid, START, PAGE_SIZE, Advice.DONTNEED)
    unmapping = world.start(processes.munmap, world.pid, span(2).start, 4 * PAGE_SIZE)
    discarded = world.sent()
    for record, told in ((faulting, copying), (discarding, discarded), (unmapping, [])):
        for delivery in told:
            world.machine.answer(delivery.mirror_id, delivery.sequence)
        world.resume(record)
    world.settle()
    (part,) = faulting.result.parts
    assert (part.end, part.error) == (span(2).start, None)
    assert np.flatnonzero(faulting.result.entries).tolist() == [0, 1]
    world.machine.check()
