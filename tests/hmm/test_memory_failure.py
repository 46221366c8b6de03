"""Memory failure: who loses a page, who hears of it, and what is left of it."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from machine_world import FIXED, RW, START, World, error_of, span, start_migration_of_a_shared_page

from hmm import commands_device as devices
from hmm import commands_file as files
from hmm import commands_hmm as hmm
from hmm import commands_process as processes
from hmm import cpu_pte, pagemap
from hmm.address_space import Thp
from hmm.errors import EHWPOISON, Signal, WouldDeadlockError
from hmm.events import Cause, EventType, Reason
from hmm.frames import PageFlag, RegionKind
from hmm.limits import Limits
from hmm.madvise import Advice
from hmm.migration import MIGRATE
from hmm.mirror import MirrorState
from hmm.mremap import MremapFlag
from hmm.operation_record import Caller
from hmm.range_fault import REQ_FAULT, VALID
from hmm.smaps import memory_use
from hmm.units import PAGE_SIZE, PMD_PAGES, PMD_SIZE
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot, VmFlag

SHARED = MapFlag.SHARED | MapFlag.ANONYMOUS | MapFlag.FIXED
EVERY_EVENT = 1 << 47


@pytest.fixture
def world() -> World:
    """A process that may inject memory failures, with a mirror, and room in a device's memory."""
    world = World(limits=Limits(frames=256, device_frames=64, swap_pages=64))
    world.machine.capable = True
    return world


def write(world: World, first: int, npages: int = 1, byte: int = 7, pid: int = 0) -> None:
    """The CPU fills pages."""
    world.do(processes.write_memory, pid or world.pid, span(first).start, bytes([byte]) * npages * PAGE_SIZE)


def poison(world: World, first: int, npages: int = 1) -> int:
    """MADV_HWPOISON.  Returns: 0, or its errno; the machine's invariants hold."""
    where = span(first, npages)
    record = world.start(processes.madvise, world.pid, where.start, where.size_bytes, Advice.HWPOISON)
    world.settle()
    world.machine.check()
    return (record.error and error_of(record).errno) or 0


def signals(world: World, npages: int, first: int = 0, pid: int = 0) -> list[Signal | None]:
    """What a read of each page gets."""
    reads = [world.do(processes.read_memory, pid or world.pid, span(first + n).start, 1) for n in range(npages)]
    return [read.signal for read in reads]


def entry(world: World, page: int, pid: int = 0) -> int:
    """The CPU's."""
    found: int = world.machine.processes[pid or world.pid].space.table.get(span(page).start)
    return found


def test_failure_is_refused_when_the_process_is_not_capable() -> None:
    """madvise_inject_error(): EPERM, and nothing is brought in."""
    world = World()
    assert poison(world, 0) == errno.EPERM
    assert entry(world, 0) == 0


def test_touch_is_a_bus_error_when_the_memory_failed(world: World) -> None:
    """hwpoison_user_mappings(): a hwpoison entry; do_swap_page() is VM_FAULT_HWPOISON, other pages stay."""
    write(world, 0, 4)
    used = world.machine.frames.regions[0].used
    assert poison(world, 1, 2) == 0
    assert signals(world, 4) == [None, Signal.BUS_POISON, Signal.BUS_POISON, None]
    touched = world.do(processes.write_memory, world.pid, span(0).start, b"x" * 3 * PAGE_SIZE)
    assert (touched.done, touched.signal, touched.address) == (PAGE_SIZE, Signal.BUS_POISON, span(1).start)
    assert world.machine.frames.regions[0].used == used  # the frames are never given back
    world.do(processes.munmap, world.pid, START, 4 * PAGE_SIZE)
    world.machine.check()
    assert world.machine.frames.regions[0].used == used - 2
    assert world.machine.frames.poisoned == 2


def test_every_process_loses_the_page_and_its_child_gets_the_entry(world: World) -> None:
    """rmap_walk() finds all mappings; copy_nonpresent_pte() copies the entry."""
    write(world, 0)
    child = world.do(processes.fork, world.pid)
    assert poison(world, 0) == 0
    assert signals(world, 1, pid=child) == [Signal.BUS_POISON]
    grandchild = world.do(processes.fork, child)
    assert signals(world, 1, pid=grandchild) == [Signal.BUS_POISON]
    assert cpu_pte.cpu_pfn(entry(world, 0, grandchild)) == cpu_pte.cpu_pfn(entry(world, 0))


def test_failure_is_counted_once_when_two_calls_inject_it(world: World) -> None:
    """TestSetPageHWPoison(): the second call gets EHWPOISON, and one frame is lost."""
    write(world, 0, 2)
    first = world.start(processes.madvise, world.pid, START, PAGE_SIZE, Advice.HWPOISON)
    second = world.start(processes.madvise, world.pid, START, 2 * PAGE_SIZE, Advice.HWPOISON)
    world.settle()
    assert first.result == 0
    assert error_of(second).errno == EHWPOISON
    assert world.machine.frames.poisoned == 1
    assert signals(world, 2) == [Signal.BUS_POISON, None]


def test_mirror_is_ended_when_its_driver_fails_to_give_the_page_up(world: World) -> None:
    """hmm_mirror_update(): an error is the end of the mirror, also where the change cannot be taken back."""
    write(world, 0)
    world.do(devices.fault, world.mirrors[0], [span(0)], write=True)
    record = world.start(processes.madvise, world.pid, START, PAGE_SIZE, Advice.HWPOISON)
    (delivery,) = world.sent()
    world.machine.answer(delivery.mirror_id, delivery.sequence, errno.EIO)
    world.settle()
    assert record.done
    assert world.machine.mirrors[world.mirrors[0]].state is MirrorState.RELEASED
    assert signals(world, 1) == [Signal.BUS_POISON]


def test_mirrors_are_told_before_the_page_goes(world: World) -> None:
    """try_to_unmap_one(): CLEAR, in every process that could map it; the device's next fault is EFAULT."""
    write(world, 0, 2)
    world.do(devices.fault, world.mirrors[0], [span(0, 2)], write=True)
    record = world.start(processes.madvise, world.pid, START, PAGE_SIZE, Advice.HWPOISON)
    (delivery,) = world.sent()
    assert (delivery.event.etype, delivery.event.reason, delivery.event.spans) == (
        EventType.MIGRATE, Reason.CLEAR, (span(0),),
    )  # fmt: skip
    assert cpu_pte.is_present(entry(world, 0))
    world.machine.answer(delivery.mirror_id, delivery.sequence)
    world.settle()
    assert record.error is None
    (faulted,) = world.do(devices.fault, world.mirrors[0], [span(0, 2)], write=False).parts
    assert faulted.error is not None
    assert (faulted.error.errno, faulted.end) == (errno.EFAULT, START)
    world.machine.check()


def test_range_fault_shows_nothing_and_fails_where_it_is_wanted(world: World) -> None:
    """hmm_vma_handle_pte(): 0 in a snapshot, EFAULT for everything that is no kind of page that could come back."""
    write(world, 0, 2)
    mirror = world.do(hmm.attach, world.devices[0], world.pid)
    world.do(hmm.insert_notifier, mirror, 0, EVERY_EVENT)
    poison(world, 1)
    sequence = world.do(hmm.read_begin, mirror, 1)
    words = world.do(hmm.range_fault, mirror, 1, sequence, span(0, 2)).words.tolist()
    assert [bool(word & VALID) for word in words] == [True, False]
    failed = world.do(hmm.range_fault, mirror, 1, sequence, span(0, 2), default_flags=REQ_FAULT)
    assert (failed.error.errno, failed.error.address) == (errno.EFAULT, span(1).start)


def test_migration_leaves_lost_pages_alone(world: World) -> None:
    """migrate_vma_collect_pmd(): not an entry of a device's page, so it is not selected."""
    device = world.do(devices.register_device, "card", memory_pages=16)
    mirror = world.do(hmm.attach, device, world.pid)
    write(world, 0, 3)
    poison(world, 1)
    moved = world.do(hmm.migrate_to_device, mirror, span(0, 3))
    assert [bool(word) for word in moved.src.tolist()] == [True, False, True]
    assert signals(world, 3) == [None, Signal.BUS_POISON, None]


def test_page_comes_back_from_a_device_before_it_fails(world: World) -> None:
    """get_user_pages_fast() faults it back; what a device has to itself as well."""
    device = world.do(devices.register_device, "card", memory_pages=16)
    mirror = world.do(hmm.attach, device, world.pid)
    write(world, 0, 3)
    world.do(hmm.migrate_to_device, mirror, span(0, 2))
    world.do(hmm.make_exclusive, mirror, span(2))
    assert poison(world, 0, 3) == 0
    assert signals(world, 3) == [Signal.BUS_POISON] * 3
    assert world.machine.frames.regions[1].used == 0


def test_page_in_coherent_memory_is_refused(world: World) -> None:
    """mf_generic_kill_procs(): ENXIO, as nobody knows how to tell the device; pages before it are lost."""
    device = world.do(devices.register_device, "c", memory_pages=16, kind=RegionKind.DEVICE_COHERENT)
    mirror = world.do(hmm.attach, device, world.pid)
    write(world, 0, 3)
    world.do(hmm.migrate_to_device, mirror, span(1))
    assert poison(world, 0, 3) == errno.ENXIO
    assert signals(world, 3) == [Signal.BUS_POISON, None, None]


def test_failure_ends_at_the_first_page_that_cannot_fail(world: World) -> None:
    """The zero page is the kernel's (EBUSY), a lost page cannot be had again, nor a hole (EFAULT)."""
    write(world, 0, 2)
    assert poison(world, 0, 4) == errno.EBUSY
    assert entry(world, 3) == 0
    assert poison(world, 1) == errno.EFAULT
    assert poison(world, 15, 2) == EHWPOISON  # TestSetPageHWPoison(): it is the same zero page
    write(world, 15)
    assert poison(world, 15, 2) == errno.EFAULT
    assert signals(world, 1, first=15) == [Signal.BUS_POISON]


def test_page_that_is_there_fails_when_its_mapping_permits_no_reading(world: World) -> None:
    """gup_fast_pte_range() asks the entry, check_vma_flags() the VMA: what is not there is EFAULT."""
    write(world, 0, 2)
    world.do(processes.mprotect, world.pid, START, 4 * PAGE_SIZE, Prot.WRITE)
    assert poison(world, 0, 4) == errno.EFAULT
    assert signals(world, 3) == [Signal.BUS_POISON, Signal.BUS_POISON, None]


def test_page_of_a_drivers_own_stays_mapped(world: World) -> None:
    """memory_failure() finds no LRU page, and me_unknown() does nothing: EBUSY, then EHWPOISON; a copy is lost.

    identify_page_state(), kill_accessing_process(), Linux 6.12.
    """
    device = world.do(files.open_device_file, "card", VmFlag.MIXEDMAP)
    shared = MapFlag.SHARED | MapFlag.FIXED
    world.do(processes.mmap, world.pid, START, 2 * PAGE_SIZE, RW, shared, device)
    private = MapFlag.PRIVATE | MapFlag.FIXED
    world.do(processes.mmap, world.pid, span(2).start, 2 * PAGE_SIZE, RW, private, device)
    write(world, 0, 3)
    notifier = world.machine.processes[world.pid].space.notifier
    before, sequence = entry(world, 0), notifier.sequence
    assert [poison(world, 0, 2), poison(world, 0)] == [errno.EBUSY, EHWPOISON]
    assert notifier.sequence == sequence  # nobody was told
    assert signals(world, 4) == [None] * 4
    assert entry(world, 0) & ~cpu_pte.ACCESSED == before & ~cpu_pte.ACCESSED
    assert poison(world, 2, 2) == errno.EBUSY
    assert signals(world, 4) == [None, None, Signal.BUS_POISON, None]
    frames = world.machine.frames
    lost = cpu_pte.cpu_pfn(before)
    world.do(processes.munmap, world.pid, START, 4 * PAGE_SIZE)
    world.settle()
    assert (frames.poisoned, frames.refcount[lost]) == (3, 1)
    world.machine.check()


@pytest.mark.parametrize("around", [1, 16])
def test_shared_memory_keeps_the_lost_page(world: World, around: int) -> None:
    """shmem_error_remove_folio() leaves it in the cache: __do_fault() is VM_FAULT_HWPOISON, read and write EIO."""
    world.machine.processes[world.pid].space.fault_around_pages = around
    file = world.do(files.open_file, "f", create=True)
    world.do(files.write_file, file, 0, b"s" * 4 * PAGE_SIZE)
    flags = MapFlag.SHARED | MapFlag.FIXED
    world.do(processes.mmap, world.pid, span(32).start, 4 * PAGE_SIZE, RW, flags, file)
    assert poison(world, 33) == 0
    world.do(processes.madvise, world.pid, span(32).start, 4 * PAGE_SIZE, Advice.DONTNEED)
    assert signals(world, 4, first=32) == [None, Signal.BUS_POISON, None, None]
    assert world.do(files.read_file, file, 0, 4 * PAGE_SIZE) == b"s" * PAGE_SIZE
    for call in ((files.read_file, PAGE_SIZE, 8), (files.write_file, PAGE_SIZE, b"x")):
        record = world.start(call[0], file, *call[1:])
        world.settle()
        assert error_of(record).errno == errno.EIO
    assert world.do(files.write_file, file, 0, b"y" * 2 * PAGE_SIZE) == PAGE_SIZE
    world.do(files.punch_file, file, PAGE_SIZE, PAGE_SIZE)
    world.do(processes.madvise, world.pid, span(32).start, 4 * PAGE_SIZE, Advice.DONTNEED)
    assert signals(world, 4, first=32) == [None] * 4


def test_failure_ends_at_a_page_of_a_file_that_is_pinned_and_that_one_is_lost(world: World) -> None:
    """me_pagecache_clean(): has_extra_refcount() asks it of pages of files, whoever maps them, and of no others."""
    file = world.do(files.open_file, "f", create=True)
    world.do(files.write_file, file, 0, b"s" * 4 * PAGE_SIZE)
    flags = MapFlag.SHARED | MapFlag.FIXED
    world.do(processes.mmap, world.pid, span(32).start, 4 * PAGE_SIZE, RW, flags, file)
    world.do(processes.pin, world.pid, span(33), write=True)
    assert poison(world, 32, 4) == errno.EBUSY
    assert signals(world, 4, first=32) == [Signal.BUS_POISON, Signal.BUS_POISON, None, None]


def test_hole_in_a_file_leaves_entries_of_lost_pages(world: World) -> None:
    """zap_nonpresent_ptes(): a hole takes no entry that may stand for a private copy: should_zap_cows()."""
    file = world.do(files.open_file, "f", create=True)
    world.do(files.write_file, file, 0, b"s" * 2 * PAGE_SIZE)
    world.do(processes.mmap, world.pid, span(32).start, 2 * PAGE_SIZE, RW, MapFlag.PRIVATE | MapFlag.FIXED, file)
    write(world, 32)
    assert poison(world, 32) == 0
    world.do(files.punch_file, file, 0, PAGE_SIZE)
    assert signals(world, 2, first=32) == [Signal.BUS_POISON, None]
    world.do(files.truncate_file, file, 0)
    assert entry(world, 32) == 0


def test_page_that_is_in_swap_as_well_is_read_again(world: World) -> None:
    """me_swapcache_clean(): entries name the slot, and the frame alone is lost."""
    write(world, 0, 1, byte=9)
    child = world.do(processes.fork, world.pid)
    world.do(processes.munmap, child, START, PAGE_SIZE)
    world.do(processes.madvise, world.pid, START, PAGE_SIZE, Advice.PAGEOUT)
    child = world.do(processes.fork, world.pid)
    assert poison(world, 0) == 0
    assert world.machine.frames.poisoned == 1
    for pid in (world.pid, child):
        assert world.do(processes.read_memory, pid, START, 1).data == b"\x09"


def test_proc_shows_lost_pages(world: World) -> None:
    """is_pfn_swap_entry(): they are counted by smaps, swap in pagemap, and resident for mincore."""
    write(world, 0, 2)
    poison(world, 1)
    words = world.do(processes.pagemap, world.pid, span(0, 2)).tolist()
    assert [bool(word & pagemap.SWAP) for word in words] == [False, True]
    assert not words[1] & pagemap.PRESENT
    assert not entry(world, 1) & cpu_pte.SOFT_DIRTY  # make_hwpoison_entry() has nothing else
    assert world.do(processes.mincore, world.pid, START, 2 * PAGE_SIZE).tolist() == [1, 1]
    space = world.machine.processes[world.pid].space
    vma = space.vmas.find(START)
    assert vma is not None
    assert memory_use(space, vma).rss == 2 * PAGE_SIZE


def test_populate_says_that_a_page_is_lost(world: World) -> None:
    """faultin_page_range() with FOLL_HWPOISON: EHWPOISON."""
    write(world, 0)
    poison(world, 0)
    record = world.start(processes.madvise, world.pid, START, PAGE_SIZE, Advice.POPULATE_READ)
    world.settle()
    assert error_of(record).errno == EHWPOISON


def huge(world: World) -> int:
    """A huge page of which two small pages were written.  Returns: its first page."""
    first = 2 * PMD_PAGES
    world.machine.processes[world.pid].space.thp = Thp.ALWAYS
    world.do(processes.mmap, world.pid, span(first).start, PMD_SIZE, RW, FIXED)
    write(world, first, 2)
    return first


@pytest.fixture
def large() -> World:
    """The same with memory for huge pages."""
    world = World(limits=Limits(frames=2048, device_frames=0))
    world.machine.capable = True
    return world


def test_huge_page_is_split_and_loses_one_page(large: World) -> None:
    """try_to_split_thp_page(); madvise_inject_error() goes on behind the huge page, as it was one when it looked."""
    first = huge(large)
    assert poison(large, first, 3) == 0
    assert signals(large, 3, first=first) == [Signal.BUS_POISON, None, None]
    assert not entry(large, first + 1) & cpu_pte.HUGE


def test_page_of_a_huge_page_is_lost_though_it_held_nothing(large: World) -> None:
    """try_to_map_unused_to_zeropage() leaves PageHWPoison() alone."""
    first = huge(large)
    large.do(processes.write_memory, large.pid, span(first).start, bytes(3 * PAGE_SIZE))
    assert poison(large, first + 1) == 0
    assert signals(large, 3, first=first) == [None, Signal.BUS_POISON, None]
    assert cpu_pte.is_special(entry(large, first))


def test_huge_page_is_not_split_when_somebody_refers_to_it(large: World) -> None:
    """memory_failure(): EHWPOISON, MF_MSG_UNSPLIT_THP."""
    first = huge(large)
    large.do(processes.pin, large.pid, span(first + 1), write=True)
    assert poison(large, first) == EHWPOISON
    assert signals(large, 1, first=first) == [None]


def test_huge_page_of_others_stays_whole_when_it_got_the_frames_while_drivers_were_told(large: World) -> None:
    """A folio is split for who has it mapped still: the kernel holds a reference of it from the look-up on."""
    first = huge(large)
    pfn = cpu_pte.cpu_pfn(entry(large, first))
    splitting = large.start(processes.madvise, large.pid, span(first).start, PAGE_SIZE, Advice.HWPOISON)
    (told,) = large.sent()
    large.do(processes.munmap, large.pid, span(first).start, PMD_SIZE)
    other = large.do(processes.create_process, "other", thp=Thp.ALWAYS)
    large.do(processes.mmap, other, START, PMD_SIZE, RW, FIXED)
    large.do(processes.write_memory, other, START, b"x")
    assert cpu_pte.cpu_pfn(large.machine.processes[other].space.table.get(START)) == pfn
    large.machine.answer(told.mirror_id, told.sequence)
    large.settle()
    large.machine.check()
    assert error_of(splitting).errno == EHWPOISON


def test_pinned_page_is_lost_to_its_process(world: World) -> None:
    """try_to_unmap() asks nobody who refers to it; the frame is not used again when it is unpinned."""
    write(world, 0)
    pin = world.do(processes.pin, world.pid, span(0), write=True)
    pfn = cpu_pte.cpu_pfn(entry(world, 0))
    assert poison(world, 0) == 0
    world.do(processes.unpin, pin)
    world.machine.check()
    assert world.machine.frames.refcount[pfn] == 1
    assert world.machine.frames.test_flags(np.array([pfn]), PageFlag.HWPOISON).all()


def test_page_is_lost_where_mremap_took_it_while_drivers_were_told(world: World) -> None:
    """The reverse map meets the old place before the new one, and each is told: mm/rmap.c, try_to_unmap_one()."""
    (mirror,) = world.mirrors
    there = span(20)
    world.do(processes.write_memory, world.pid, START, b"x")
    failing = world.start(processes.madvise, world.pid, START, PAGE_SIZE, Advice.HWPOISON)
    (told,) = world.sent()
    moving = MremapFlag.MAYMOVE | MremapFlag.FIXED
    world.do(processes.mremap, world.pid, START, PAGE_SIZE, PAGE_SIZE, moving, there.start)
    world.do(devices.fault, mirror, [there], write=True)
    world.machine.answer(told.mirror_id, told.sequence)
    world.resume(failing)
    (told,) = world.sent()
    assert (told.mirror_id, told.event.spans) == (mirror, (there,))
    world.machine.answer(told.mirror_id, told.sequence)
    world.settle()
    assert failing.result == 0
    world.machine.check()
    assert cpu_pte.is_poison(world.machine.processes[world.pid].space.table.get(there.start))
    assert world.machine.mirrors[mirror].table.is_empty


def test_lost_page_counts_as_used_because_the_call_looked_it_up(world: World) -> None:
    """madvise_inject_error(): get_user_pages_fast() marks the page, as gup_fast_pte_range() or by FOLL_TOUCH."""
    write(world, 0, 2)
    world.do(processes.clear_refs, world.pid, 1)
    assert poison(world, 0) == 0
    file = world.do(files.open_file, "f", create=True)
    world.do(files.truncate_file, file, PAGE_SIZE)
    world.do(processes.mmap, world.pid, span(20).start, PAGE_SIZE, RW, MapFlag.SHARED | MapFlag.FIXED, file)
    assert poison(world, 20) == 0
    space = world.machine.processes[world.pid].space
    assert [memory_use(space, vma).referenced for vma in space.vmas] == [PAGE_SIZE, PAGE_SIZE]


def test_failure_is_that_of_what_is_mapped_when_drivers_have_answered(world: World) -> None:
    """Other memory that was mapped there while the page was brought in is lost to all that map it.

    Source: Linux mm/madvise.c, madvise_inject_error(): the page that get_user_pages_fast() has found.
    """
    card = world.do(devices.register_device, "card", memory_pages=8)
    attached = world.do(hmm.attach, card, world.pid)
    write(world, 0)
    world.do(hmm.migrate_to_device, attached, span(0))
    injecting = world.start(processes.madvise, world.pid, START, PAGE_SIZE, Advice.HWPOISON)
    (told,) = world.sent()
    world.do(processes.mmap, world.pid, START, PAGE_SIZE, RW, SHARED)
    world.machine.answer(told.mirror_id, told.sequence)
    world.settle()
    assert injecting.result == 0
    world.machine.check()
    assert signals(world, 1) == [Signal.BUS_POISON]


def test_failure_waits_for_a_migration_that_has_the_page_and_then_takes_it(world: World) -> None:
    """The reference that it has keeps the page where it is: the migration puts it back, and unlocks it.

    Source: Linux mm/memory-failure.c, folio_lock() of memory_failure().
    """
    machine = world.machine
    write(world, 0)
    moving, child, slow, owed = start_migration_of_a_shared_page(world)
    failing = world.start(processes.madvise, child, START, PAGE_SIZE, Advice.HWPOISON)
    assert machine.blockers(failing) == [moving.id]
    machine.answer(slow, owed.sequence)
    for told in world.settle(slow):
        machine.answer(slow, told.sequence)
    world.settle()
    assert failing.done
    assert failing.error is None
    assert [int(word) for word in moving.result.src] == [0]
    machine.check()
    assert signals(world, 1) == signals(world, 1, pid=child) == [Signal.BUS_POISON]


def test_failure_waits_for_a_device_that_takes_the_page_and_then_takes_it_from_there(world: World) -> None:
    """make_device_exclusive_range() has the page locked, and does not ask whether it failed: try_to_unmap_one()."""
    machine = world.machine
    write(world, 0, 2)
    slow, mirror = (
        world.do(hmm.attach, world.do(devices.register_device, name), world.pid) for name in ("slow", "card")
    )
    for one in (slow, mirror):
        world.do(hmm.insert_notifier, one, START, 2 * PAGE_SIZE)
    taking = world.start(hmm.make_exclusive, mirror, span(1))
    (owed,) = world.settle(slow)
    failing = world.start(processes.madvise, world.pid, START + PAGE_SIZE, PAGE_SIZE, Advice.HWPOISON)
    assert machine.blockers(failing) == [taking.id]
    machine.answer(slow, owed.sequence)
    (told,) = world.settle(slow)
    assert taking.result.tolist() != [0]
    assert told.event.cause is Cause.MEMORY_FAILURE
    machine.answer(slow, told.sequence)
    world.settle()
    assert failing.done
    assert failing.error is None
    machine.check()
    assert signals(world, 2) == [None, Signal.BUS_POISON]


def test_failure_leaves_a_page_to_the_migration_that_has_it_when_it_may_not_wait(world: World) -> None:
    """Called inside the callback that the migration waits for: EDEADLK, and the page moves."""
    machine = world.machine
    write(world, 0)
    moving, child, slow, owed = start_migration_of_a_shared_page(world)
    inside = Caller(name="driver", callback=(slow, owed.sequence))
    failing = world.start(processes.madvise, child, START, PAGE_SIZE, Advice.HWPOISON, caller=inside)
    assert isinstance(error_of(failing), WouldDeadlockError)
    machine.check()
    machine.answer(slow, owed.sequence)
    world.settle()
    assert int(moving.result.src[0]) & MIGRATE
    machine.check()
    assert signals(world, 1) == signals(world, 1, pid=child) == [None]
