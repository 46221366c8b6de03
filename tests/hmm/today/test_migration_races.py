"""Migrations that others get into: what they do to the entries that stand in for pages on their way."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from area import at, pages
from machine_world import FIXED, START, World, error_of, span

from hmm import commands_device, commands_hmm, commands_process, cpu_pte
from hmm.errors import NoSuchObjectError, TimedOutError, WouldDeadlockError
from hmm.events import Cause, EventType
from hmm.frames import Frames, RegionKind
from hmm.inspection import pending
from hmm.limits import Limits
from hmm.migration import MIGRATE, PFN_SHIFT, VALID
from hmm.mirror import DeadlinePolicy
from hmm.mremap import MremapFlag
from hmm.operation import Operation, Pause
from hmm.operation_record import Caller
from hmm.range_fault import REQ_FAULT, word_pfns
from hmm.units import PAGE_SIZE, MirrorId
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot


def page_on_a_card() -> tuple[World, MirrorId]:
    """A process whose first page of the area is in a device's memory, and the mirror that it was put there by."""
    world = World(mirrors=0, limits=Limits(frames=64, device_frames=16))
    card = world.do(commands_device.register_device, "card", memory_pages=8)
    attached = world.do(commands_hmm.attach, card, world.pid)
    flags = MapFlag.PRIVATE | MapFlag.ANONYMOUS | MapFlag.FIXED
    world.do(commands_process.mmap, world.pid, at(0), PAGE_SIZE, Prot.READ | Prot.WRITE, flags)
    world.do(commands_process.write_memory, world.pid, at(0), b"page")
    world.do(commands_hmm.migrate_to_device, attached, pages(0, 1))
    return world, attached


def test_migration_puts_its_page_back_when_the_range_is_being_unmapped() -> None:
    """A VMA that munmap has taken out is known to the reverse map until its entries are gone.

    A mirror that does not answer can bring it back, and there may be no migration entry then.
    Source: Linux mm/vma.c: the VMAs leave the tree first, unlink_anon_vmas() comes with free_pgtables().
    """
    world, _ = page_on_a_card()
    machine, parent = world.machine, world.pid
    child = world.do(commands_process.fork, parent)
    other = world.do(commands_device.register_device, "other")
    for process in (parent, child):
        world.do(commands_device.register_mirror, other, process, policy=DeadlinePolicy.FAIL)

    touching = world.start(commands_process.touch, parent, pages(0, 1), write=False)
    for _ in range(2):  # of the parent: that the page comes back, and that a page of several spaces goes
        (delivery,) = world.sent()
        machine.answer(delivery.mirror_id, delivery.sequence)
        world.resume(touching)
    assert cpu_pte.is_migration(machine.processes[parent].space.table.get(at(0)))
    unmapping = world.start(commands_process.munmap, parent, at(0), PAGE_SIZE)
    told = world.sent()
    (owed,) = [delivery for delivery in told if delivery.operation_id == unmapping.id]
    while answered := [delivery for delivery in told if delivery.operation_id == touching.id]:
        for delivery in answered:
            machine.answer(delivery.mirror_id, delivery.sequence)
        world.resume(touching)
        told = world.sent()
    machine.abandon(owed.mirror_id, owed.sequence)
    world.resume(unmapping)
    assert isinstance(error_of(unmapping), TimedOutError)
    world.settle()
    machine.check()
    assert world.do(commands_process.read_memory, parent, at(0), 4).data == b"page"


def test_pin_unshares_its_pages_when_one_before_them_was_mapped_anew_meanwhile() -> None:
    """Whether a page has to be the process's own is a question of the mapping that it is in when it is pinned.

    Source: Linux mm/gup.c: __get_user_pages() looks the VMA up anew for each page that it had to wait for.
    """
    world = World(mirrors=0, limits=Limits(frames=64, device_frames=16))
    machine, parent = world.machine, world.pid
    card = world.do(commands_device.register_device, "card", memory_pages=8)
    attached = world.do(commands_hmm.attach, card, parent)
    world.do(commands_hmm.insert_notifier, attached, at(0), 2 * PAGE_SIZE)
    flags = MapFlag.PRIVATE | MapFlag.ANONYMOUS | MapFlag.FIXED
    world.do(commands_process.mmap, parent, at(0), 2 * PAGE_SIZE, Prot.READ | Prot.WRITE, flags)
    world.do(commands_process.write_memory, parent, at(0), b"a" * 2 * PAGE_SIZE)
    world.do(commands_hmm.migrate_to_device, attached, pages(0, 1))
    world.do(commands_process.fork, parent)

    pinning = world.start(commands_process.pin, parent, pages(0, 2), write=False)
    shared = MapFlag.SHARED | MapFlag.ANONYMOUS | MapFlag.FIXED
    world.start(commands_process.mmap, parent, at(0), PAGE_SIZE, Prot.READ | Prot.WRITE, shared)
    world.settle()
    assert pinning.result
    before = machine.processes[parent].space.table.get(at(1))
    world.do(commands_process.write_memory, parent, at(1), b"b")
    after = machine.processes[parent].space.table.get(at(1))
    assert cpu_pte.cpu_pfn(after) == cpu_pte.cpu_pfn(before)
    machine.check()


def test_eviction_leaves_a_page_that_a_device_has_to_itself_and_whoever_touches_it_waits() -> None:
    """What is exclusive is mapped nowhere: nobody is told of it, and it stays.  It is locked all the same.

    Source: Linux mm/memory.c: folio_lock_or_retry() of remove_device_exclusive_entry().
    """
    world = World(limits=Limits(frames=64, device_frames=16))
    machine, (mirror,) = world.machine, world.mirrors
    card = world.do(commands_device.register_device, "card", memory_pages=8, kind=RegionKind.DEVICE_COHERENT)
    attached = world.do(commands_hmm.attach, card, world.pid)
    world.do(commands_process.write_memory, world.pid, START, b"a" * 2 * PAGE_SIZE)
    world.do(commands_hmm.migrate_to_device, attached, span(0, 2))
    world.do(commands_hmm.make_exclusive, attached, span(1))
    evicting = world.start(commands_hmm.evict_device, card)
    (told,) = world.sent()
    assert (told.mirror_id, told.event.spans) == (mirror, (span(0),))

    faulting = world.start(commands_device.fault, mirror, [span(1)], write=True)
    assert machine.blockers(faulting) == [evicting.id]
    machine.answer(told.mirror_id, told.sequence)
    world.resume(evicting)
    machine.check()
    world.settle()
    assert evicting.result == 1
    assert faulting.done
    assert world.do(commands_hmm.evict_device, card) == 1
    assert world.do(commands_process.read_memory, world.pid, START, 2 * PAGE_SIZE).data == b"a" * 2 * PAGE_SIZE
    machine.check()


def test_fork_fails_when_a_page_that_a_device_has_to_itself_is_locked() -> None:
    """try_restore_exclusive_pte() does not wait for the lock: copy_pte_range() is EBUSY, and dup_mmap() ENOMEM."""
    world = World(limits=Limits(frames=64, device_frames=16))
    machine, (mirror,) = world.machine, world.mirrors
    card = world.do(commands_device.register_device, "card", memory_pages=8, kind=RegionKind.DEVICE_COHERENT)
    attached = world.do(commands_hmm.attach, card, world.pid)
    world.do(commands_process.write_memory, world.pid, START, b"a" * 2 * PAGE_SIZE)
    world.do(commands_hmm.migrate_to_device, attached, span(0, 2))
    world.do(commands_hmm.make_exclusive, attached, span(1))
    evicting = world.start(commands_hmm.evict_device, card)
    (told,) = world.sent()
    forking = world.start(commands_process.fork, world.pid)
    for one in world.sent():
        machine.answer(one.mirror_id, one.sequence)
    world.resume(forking)
    assert error_of(forking).errno == errno.ENOMEM
    assert len(machine.processes) == 1
    assert cpu_pte.is_device_exclusive(machine.processes[world.pid].space.table.get(span(1).start))
    machine.answer(mirror, told.sequence)
    world.settle()
    assert evicting.done
    child = world.do(commands_process.fork, world.pid)
    assert world.do(commands_process.read_memory, child, START, 2 * PAGE_SIZE).data == b"a" * 2 * PAGE_SIZE
    machine.check()


def test_touch_inside_a_callback_fails_when_the_page_is_referred_to_by_who_waits_for_it() -> None:
    """An eviction holds the page and waits for the driver, which waits for the page: EDEADLK, and no turning round."""
    world, attached = page_on_a_card()
    machine = world.machine
    world.do(commands_hmm.insert_notifier, attached, at(0), PAGE_SIZE)
    evicting = world.start(commands_hmm.evict_device, machine.receivers[attached].device.id)
    (told,) = world.sent()
    caller = Caller(name="driver", callback=(attached, told.sequence))
    reading = machine.start(caller, commands_process.read_memory, world.pid, at(0), 4)
    for _ in range(10):
        for delivery in world.sent():
            machine.answer(delivery.mirror_id, delivery.sequence)
        if not reading.done:
            machine.resume(reading.id)
    assert isinstance(error_of(reading), WouldDeadlockError)
    machine.answer(attached, told.sequence)
    world.settle()
    assert evicting.result == 1
    assert world.do(commands_process.read_memory, world.pid, at(0), 4).data == b"page"


@pytest.mark.parametrize("how", ["evict", "make room"])
def test_eviction_finds_its_entries_when_a_fork_took_them_along_meanwhile(how: str) -> None:
    """The child that comes while mirrors are told has the entries that stand in for the page, and gets the page.

    Source: Linux mm/rmap.c: rmap_walk_anon() of remove_migration_ptes() meets the VMAs that fork has added since.
    """
    world = World(mirrors=0, limits=Limits(frames=64, device_frames=16))
    machine, parent = world.machine, world.pid
    card = world.do(commands_device.register_device, "card", memory_pages=1, evicts=True)
    attached = world.do(commands_hmm.attach, card, parent)
    world.do(commands_process.write_memory, parent, START, b"page")
    world.do(commands_hmm.migrate_to_device, attached, span(0))
    relative = world.do(commands_process.fork, parent)
    for process in (parent, relative):
        world.do(commands_hmm.insert_notifier, world.do(commands_hmm.attach, card, process), START, PAGE_SIZE)

    if how == "evict":
        moving = world.start(commands_hmm.evict_device, card)
    else:
        moving = world.start(commands_hmm.migrate_to_device, attached, span(1))
    for delivery in world.sent():  # of the parent; the next ones are of its relative
        machine.answer(delivery.mirror_id, delivery.sequence)
    world.resume(moving)
    assert cpu_pte.is_migration(machine.processes[parent].space.table.get(START))
    owed = world.sent()
    child = world.do(commands_process.fork, parent)
    assert cpu_pte.is_migration(machine.processes[child].space.table.get(START))
    for delivery in owed:
        machine.answer(delivery.mirror_id, delivery.sequence)
    world.settle()
    assert moving.done
    machine.check()
    for process in (parent, relative, child):
        assert world.do(commands_process.read_memory, process, START, 4).data == b"page"


@pytest.mark.parametrize("how", ["fork", "fork and exit", "mremap"])
def test_touch_inside_a_callback_fails_when_others_took_along_what_stands_in_for_its_page(how: str) -> None:
    """It waits for the migration where the page was, and that for the callback: EDEADLK, and no turning round."""
    world = World(mirrors=0, limits=Limits(frames=64, device_frames=16))
    machine, parent = world.machine, world.pid
    card = world.do(commands_device.register_device, "card", memory_pages=8)
    attached = world.do(commands_hmm.attach, card, parent)
    world.do(commands_process.write_memory, parent, START, b"page")
    world.do(commands_hmm.migrate_to_device, attached, span(0))
    reading = world.start(commands_process.read_memory, parent, START, 4)
    (told,) = world.sent()
    assert told.event.etype is EventType.COPY_FROM_DEVICE
    if how != "mremap":
        process, there = world.do(commands_process.fork, parent), START
        if how == "fork and exit":
            world.do(commands_process.exit_process, parent)
    else:
        process, there = parent, at(0)
        moving = MremapFlag.MAYMOVE | MremapFlag.FIXED
        world.do(commands_process.mremap, parent, START, PAGE_SIZE, PAGE_SIZE, moving, there)
    inside = world.start(
        commands_process.read_memory,
        process,
        there,
        4,
        caller=Caller(name="driver", callback=(attached, told.sequence)),
    )
    outside = world.start(commands_process.read_memory, process, there, 4)
    assert isinstance(error_of(inside), WouldDeadlockError)
    assert not machine.is_ready(outside)
    machine.answer(attached, told.sequence)
    world.settle()
    assert outside.result.data == b"page"
    if how == "fork and exit":
        assert isinstance(error_of(reading), NoSuchObjectError)
    else:
        assert reading.result.data == (b"page" if how == "fork" else b"")
    machine.check()


def test_relatives_get_their_page_back_when_both_touch_it_at_once() -> None:
    """Only one migration has a page, or each puts back what the other took, and neither ever ends.

    Source: Linux mm/migrate_device.c: folio_trylock() of migrate_vma_collect_pmd().
    """
    world, _ = page_on_a_card()
    machine, parent = world.machine, world.pid
    child = world.do(commands_process.fork, parent)
    other = world.do(commands_device.register_device, "other")
    world.do(commands_device.register_mirror, other, parent)
    touches = [world.start(commands_process.read_memory, process, at(0), 4) for process in (parent, child)]
    told = 0
    while sent := world.sent():
        for delivery in sent:
            machine.answer(delivery.mirror_id, delivery.sequence)
            for ready in machine.ready():
                machine.resume(ready.id)
        told += len(sent)
    for ready in machine.ready():
        machine.resume(ready.id)
    assert told == 3  # that each wants the page; and that one gets it
    machine.check()
    assert [touch.done and touch.result.data for touch in touches] == [b"page", b"page"]


def test_fork_shares_what_is_there_when_it_waited_for_memory_in_vain() -> None:
    """Pages that came back from a device meanwhile are not what they were when memory was asked for."""
    world = World(mirrors=0, limits=Limits(frames=64, device_frames=16))
    machine, parent = world.machine, world.pid
    frames = machine.frames
    card = world.do(commands_device.register_device, "card", memory_pages=8)
    attached = world.do(commands_hmm.attach, card, parent)
    world.do(commands_process.write_memory, parent, START, b"a" * 2 * PAGE_SIZE)
    pin = world.do(commands_process.pin, parent, span(0), write=True)
    world.do(commands_hmm.migrate_to_device, attached, span(1))
    hog = world.do(commands_process.create_process, "hog")
    flags = MapFlag.PRIVATE | MapFlag.ANONYMOUS | MapFlag.FIXED
    world.do(commands_process.mmap, hog, START, frames.available * PAGE_SIZE, Prot.READ | Prot.WRITE, flags)
    world.do(commands_process.touch, hog, span(0, frames.available), write=True)

    def wait_in_vain(_: int) -> Operation[bool]:
        yield Pause()
        return False

    frames.make_room = wait_in_vain
    forking = world.start(commands_process.fork, parent)
    assert isinstance(machine.operations[forking.id].request, Pause)
    world.start(commands_process.unpin, pin)
    world.start(commands_process.exit_process, hog)
    world.start(commands_hmm.evict_device, card)
    assert cpu_pte.is_present(machine.processes[parent].space.table.get(START + PAGE_SIZE))
    world.settle()
    machine.check()
    assert world.do(commands_process.read_memory, forking.result, START, 2 * PAGE_SIZE).data == b"a" * 2 * PAGE_SIZE


@pytest.mark.parametrize("policy", [DeadlinePolicy.FENCE, DeadlinePolicy.FAIL])
def test_detach_waits_for_a_migration_when_the_process_has_ended_meanwhile(policy: DeadlinePolicy) -> None:
    """What is under way in an address space outlives its last user, and whoever waits for it waits to its end.

    Source: Linux include/linux/sched/mm.h, mmgrab(); mm/mmu_notifier.c, mmu_interval_notifier_remove().
    """
    world, _ = page_on_a_card()
    machine, parent = world.machine, world.pid
    child = world.do(commands_process.fork, parent)
    card = world.do(commands_device.register_device, "other")
    slow, quick = (world.do(commands_hmm.attach, card, child, policy=policy) for _ in range(2))
    for mirror in (slow, quick):
        world.do(commands_hmm.insert_notifier, mirror, at(0), PAGE_SIZE)
    reading = world.start(commands_process.read_memory, parent, at(0), 4)
    (owed,) = world.settle(slow)
    ending = world.start(commands_process.exit_process, child)
    while not ending.done:
        for told in world.settle(slow):
            machine.answer(slow, told.sequence)
    leaving = world.start(commands_hmm.detach, quick)
    assert not leaving.done
    assert machine.blockers(leaving) == [reading.id]
    assert not machine.is_ready(leaving)
    machine.answer(slow, owed.sequence)
    world.settle()
    assert leaving.done
    assert reading.result.data == b"page"
    machine.check()


def test_eviction_passes_over_a_page_when_a_touch_is_bringing_it_back() -> None:
    """One migration alone has a page, though it is still mapped elsewhere: the other tells nobody, and undoes nothing.

    Source: Linux mm/migrate_device.c: folio_trylock() of migrate_device_pfn_lock().
    """
    world, _ = page_on_a_card()
    machine, parent = world.machine, world.pid
    (card,) = machine.devices
    child = world.do(commands_process.fork, parent)
    slow = world.do(commands_hmm.attach, card, child)
    world.do(commands_hmm.insert_notifier, slow, at(0), PAGE_SIZE)
    reading = world.start(commands_process.read_memory, parent, at(0), 4)
    (owed,) = world.settle(slow)
    evicting = world.start(commands_hmm.evict_device, card)
    assert not world.settle(slow)
    assert evicting.result == 0
    machine.answer(slow, owed.sequence)
    assert not world.settle(slow)
    assert reading.result.data == b"page"
    machine.check()


def test_one_of_two_relatives_gets_its_page_back_when_both_drivers_ask_at_once() -> None:
    """The second one passes over what the first one has, and the page comes.

    Source: Linux mm/migrate_device.c: folio_trylock() of migrate_vma_collect_pmd().
    """
    world = World(mirrors=0, limits=Limits(frames=64, device_frames=16))
    machine, parent = world.machine, world.pid
    card = world.do(commands_device.register_device, "card", memory_pages=8, kind=RegionKind.DEVICE_COHERENT)
    attached = world.do(commands_hmm.attach, card, parent)
    world.do(commands_process.write_memory, parent, START, b"page")
    world.do(commands_hmm.migrate_to_device, attached, span(0))
    child = world.do(commands_process.fork, parent)
    slow = world.do(commands_hmm.attach, card, child)
    world.do(commands_hmm.insert_notifier, slow, START, PAGE_SIZE)
    first = world.start(commands_hmm.migrate_to_system, attached, span(0))
    (owed,) = world.settle(slow)
    second = world.start(commands_hmm.migrate_to_system, slow, span(0))
    for told in world.settle(slow):
        machine.answer(slow, told.sequence)
    world.resume(second)
    machine.answer(slow, owed.sequence)
    world.settle()
    assert [int(moving.result.src[0]) & MIGRATE for moving in (first, second)] == [MIGRATE, 0]
    machine.check()


def test_touch_inside_a_callback_ends_when_an_eviction_waits_for_memory() -> None:
    """Whoever wants room for pages has not taken them yet: reclaim may wait for a driver that touches one of them."""
    world = World(limits=Limits(frames=12, swap_pages=64, device_frames=16))
    machine, (mirror,) = world.machine, world.mirrors
    card = world.do(commands_device.register_device, "card", memory_pages=2)
    attached = world.do(commands_hmm.attach, card, world.pid)
    world.do(commands_process.write_memory, world.pid, START, b"a" * 2 * PAGE_SIZE)
    world.do(commands_hmm.migrate_to_device, attached, span(0, 2))
    world.do(commands_process.touch, world.pid, span(2, machine.frames.available - 1), write=True)
    world.do(commands_device.fault, mirror, (span(2, 4),), write=False)
    assert machine.frames.available == 1
    evicting = world.start(commands_hmm.evict_device, card)
    (told,) = world.sent()
    assert (told.mirror_id, told.event.cause) == (mirror, Cause.RECLAIM)
    inside = world.start(
        commands_process.read_memory,
        world.pid,
        START,
        1,
        caller=Caller(name="driver", callback=(mirror, told.sequence)),
    )
    while copies := world.sent():
        for delivery in copies:
            machine.answer(delivery.mirror_id, delivery.sequence)
        world.resume(inside)
    assert inside.result.data == b"a"
    machine.answer(told.mirror_id, told.sequence)
    world.settle()
    assert evicting.result == 1
    machine.check()


def test_touch_inside_a_callback_fails_when_an_eviction_has_its_page_and_has_not_told_its_process_yet() -> None:
    """All processes whose pages are taken are busy at once: EDEADLK, and no turning round."""
    world, _ = page_on_a_card()
    machine = world.machine
    (card,) = machine.devices
    slow = world.do(commands_hmm.attach, card, world.pid)
    world.do(commands_hmm.insert_notifier, slow, at(0), PAGE_SIZE)
    stranger = world.do(commands_process.create_process, "stranger")
    flags = MapFlag.PRIVATE | MapFlag.ANONYMOUS | MapFlag.FIXED
    world.do(commands_process.mmap, stranger, at(1), PAGE_SIZE, Prot.READ | Prot.WRITE, flags)
    world.do(commands_process.write_memory, stranger, at(1), b"other")
    world.do(commands_hmm.migrate_to_device, world.do(commands_hmm.attach, card, stranger), pages(1, 2))
    evicting = world.start(commands_hmm.evict_device, card)
    (owed,) = world.settle(slow)
    driver = Caller(name="driver", callback=(slow, owed.sequence))
    inside = world.start(commands_process.read_memory, stranger, at(1), 5, caller=driver)
    for told in world.sent():
        machine.answer(told.mirror_id, told.sequence)
    if not inside.done:
        world.resume(inside)
    assert isinstance(error_of(inside), WouldDeadlockError)
    machine.answer(slow, owed.sequence)
    world.settle()
    assert evicting.result == 2
    assert world.do(commands_process.read_memory, stranger, at(1), 5).data == b"other"
    machine.check()


def test_touch_tells_who_has_its_page_when_another_put_it_there_meanwhile() -> None:
    """The driver that has the page copies it, and not the one that had it when the touch began.

    Source: Linux mm/memory.c, do_swap_page(): migrate_to_ram() is of the folio that is locked.
    """
    world, first = page_on_a_card()
    machine, process = world.machine, world.pid
    (card,) = machine.devices
    before, after = (world.do(commands_hmm.attach, card, process) for _ in range(2))
    flags = MapFlag.PRIVATE | MapFlag.ANONYMOUS | MapFlag.FIXED
    world.do(commands_process.mmap, process, at(1), PAGE_SIZE, Prot.READ | Prot.WRITE, flags)
    world.do(commands_process.write_memory, process, at(1), b"other")
    world.do(commands_hmm.migrate_to_device, before, pages(1, 2))
    touching = world.start(commands_process.touch, process, pages(0, 2), write=False)
    (owed,) = world.settle(first)
    world.do(commands_process.read_memory, process, at(1), 1)
    world.do(commands_hmm.migrate_to_device, after, pages(1, 2))
    machine.answer(first, owed.sequence)
    copies = world.settle(after)
    assert [delivery.event.etype for delivery in copies] == [EventType.COPY_FROM_DEVICE]
    machine.answer(after, copies[0].sequence)
    world.settle()
    assert touching.done
    machine.check()


@pytest.mark.parametrize("first", [0, 1])
def test_first_of_two_migrations_has_a_page_of_system_memory_when_relatives_move_it_at_once(first: int) -> None:
    """The second one finds the page locked and passes over it, and the first one moves it for both.

    Source: Linux mm/migrate_device.c: folio_trylock() of migrate_vma_collect_pmd().
    """
    world = World(mirrors=0, limits=Limits(frames=64, device_frames=16))
    machine, parent = world.machine, world.pid
    card = world.do(commands_device.register_device, "card", memory_pages=8)
    world.do(commands_process.write_memory, parent, START, b"page")
    relatives = (parent, world.do(commands_process.fork, parent))
    mirrors = [world.do(commands_hmm.attach, card, process) for process in relatives]
    for mirror in mirrors:
        world.do(commands_hmm.insert_notifier, mirror, START, 2 * PAGE_SIZE)
    slow = mirrors[1 - first]
    winning = world.start(commands_hmm.migrate_to_device, mirrors[first], span(0))
    (owed,) = world.settle(slow)
    assert owed.event.cause is Cause.MIGRATE_SHARED
    losing = world.start(commands_hmm.migrate_to_device, slow, span(0, 2))
    (whole,) = world.settle(slow)
    machine.answer(slow, whole.sequence)
    (hole,) = world.settle(slow)
    assert hole.event.spans == (span(1),)
    machine.check()
    machine.answer(slow, owed.sequence)
    world.settle()
    assert int(winning.result.src[0]) & MIGRATE
    assert machine.frames.region_of(int(winning.result.dst[0]) >> PFN_SHIFT).owner == card
    machine.answer(slow, hole.sequence)
    world.settle()
    assert [int(word) for word in losing.result.src] == [0, MIGRATE]
    machine.check()
    tables = [machine.processes[process].space.table for process in relatives]
    assert all(cpu_pte.is_device_private(table.get(START)) for table in tables)
    for process in relatives:
        assert world.do(commands_process.read_memory, process, START, 4).data == b"page"


def test_touch_waits_for_the_migration_that_has_its_page_and_pending_says_for_which() -> None:
    """Until the page is unlocked, and not until the range is quiet.

    Source: Linux mm/filemap.c, migration_entry_wait_on_locked().
    """
    world = World(mirrors=0, limits=Limits(frames=64, device_frames=16))
    machine, parent = world.machine, world.pid
    card = world.do(commands_device.register_device, "card", memory_pages=8)
    world.do(commands_process.write_memory, parent, START, b"page")
    child = world.do(commands_process.fork, parent)
    slow = world.do(commands_hmm.attach, card, child)
    world.do(commands_hmm.insert_notifier, slow, START, PAGE_SIZE)
    moving = world.start(commands_hmm.migrate_to_device, world.do(commands_hmm.attach, card, parent), span(0))
    (owed,) = world.settle(slow)
    reading = world.start(commands_process.read_memory, parent, START, 4)
    (waiting,) = [blocked for blocked in pending(machine) if blocked.operation_id == reading.id]
    assert waiting.operations == (moving.id,)
    assert waiting.request == f"the lock of a page that is on its way {span(0)}"
    machine.answer(slow, owed.sequence)
    world.resume(moving)
    world.settle()
    assert reading.result.data == b"page"
    machine.check()


def test_read_section_begins_while_a_migration_of_its_range_goes_on() -> None:
    """The range is busy until its pages are collected, and not until they have moved.

    A range fault waits for the page, and has it in the memory of its own device, where it needs no fault.
    Source: Linux mm/migrate_device.c, mmu_notifier_invalidate_range_end() of migrate_vma_collect(); mm/hmm.c,
    migration_entry_wait() of hmm_vma_handle_pte().
    """
    world = World(mirrors=0, limits=Limits(frames=64, device_frames=16))
    machine, parent = world.machine, world.pid
    card = world.do(commands_device.register_device, "card", memory_pages=8)
    world.do(commands_process.write_memory, parent, START, b"page")
    slow = world.do(commands_hmm.attach, card, world.do(commands_process.fork, parent))
    world.do(commands_hmm.insert_notifier, slow, START, PAGE_SIZE)
    mirror = world.do(commands_hmm.attach, card, parent)
    notifier = world.do(commands_hmm.insert_notifier, mirror, START, PAGE_SIZE)
    moving = world.start(commands_hmm.migrate_to_device, mirror, span(0))
    (owed,) = world.settle(slow)
    sequence = world.do(commands_hmm.read_begin, mirror, notifier)
    faulting = world.start(commands_hmm.range_fault, mirror, notifier, sequence, span(0), REQ_FAULT)
    assert machine.blockers(faulting) == [moving.id]
    machine.answer(slow, owed.sequence)
    world.settle()
    assert int(moving.result.src[0]) & MIGRATE
    words = faulting.result.require()
    assert word_pfns(words).tolist() == [int(moving.result.dst[0]) >> PFN_SHIFT]
    machine.check()


def test_migration_gives_back_a_page_in_use_before_it_tells_of_holes() -> None:
    """What cannot be moved is mapped and unlocked at once, and not when the migration ends.

    Source: Linux mm/migrate_device.c, the end of migrate_device_unmap(); __migrate_device_pages() comes later.
    """
    world = World(mirrors=0, limits=Limits(frames=64, device_frames=16))
    machine, process = world.machine, world.pid
    table = machine.processes[process].space.table
    card = world.do(commands_device.register_device, "card", memory_pages=8)
    world.do(commands_process.write_memory, process, START, b"page")
    referenced = np.array([cpu_pte.cpu_pfn(table.get(START))])
    machine.frames.get(referenced)
    attached = world.do(commands_hmm.attach, card, process)
    slow = world.do(commands_hmm.attach, world.do(commands_device.register_device, "other"), process)
    world.do(commands_hmm.insert_notifier, slow, START + PAGE_SIZE, PAGE_SIZE)
    migrating = world.start(commands_hmm.migrate_to_device, attached, span(0, 2))
    (whole,) = world.settle(slow)
    machine.answer(slow, whole.sequence)
    (holes,) = world.settle(slow)
    assert holes.event.spans == (span(1),)
    assert cpu_pte.is_present(table.get(START))
    assert world.do(commands_process.read_memory, process, START, 4).data == b"page"
    machine.check()
    machine.answer(slow, holes.sequence)
    world.settle()
    assert [int(word) & MIGRATE for word in migrating.result.src] == [0, MIGRATE]
    machine.frames.put(referenced)
    machine.check()


def test_migration_leaves_a_page_in_the_swap_cache_when_a_relative_has_it_in_swap() -> None:
    """It is unmapped, and put back when it cannot leave its slot: its word has no MIGRATE, but the page.

    Source: Linux mm/migrate_device.c, __migrate_device_pages(): folio_free_swap().
    """
    world = World(mirrors=0, limits=Limits(frames=64, swap_pages=64, device_frames=16))
    machine, parent = world.machine, world.pid
    card = world.do(commands_device.register_device, "card", memory_pages=8)
    world.do(commands_process.write_memory, parent, START, b"page")
    child = world.do(commands_process.fork, parent)
    hog = world.do(commands_process.create_process, "hog")
    world.do(commands_process.mmap, hog, at(0), 64 * PAGE_SIZE, Prot.READ | Prot.WRITE, FIXED)
    world.do(commands_process.touch, hog, pages(0, 64), write=True)
    world.do(commands_process.exit_process, hog)
    space = machine.processes[parent].space
    assert cpu_pte.is_swap(space.table.lookup(np.array([START], np.uint64)))[0]
    assert world.do(commands_process.read_memory, parent, START, 4).data == b"page"
    pfn = cpu_pte.cpu_pfn(space.table.get(START))
    assert machine.frames.private[pfn]
    migrated = world.do(commands_hmm.migrate_to_device, world.do(commands_hmm.attach, card, parent), span(0))
    assert int(migrated.src[0]) == pfn << PFN_SHIFT | VALID
    assert cpu_pte.cpu_pfn(space.table.get(START)) == pfn
    assert machine.frames.regions[1].free == 8
    machine.check()
    assert world.do(commands_process.read_memory, child, START, 4).data == b"page"


@pytest.mark.parametrize("how", ["migrate", "evict"])
def test_migration_breaks_its_address_space_when_a_bug_ends_it(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What may be half done is not used quietly, also when no range is busy any more."""
    world, attached = page_on_a_card()
    machine = world.machine
    space = machine.processes[world.pid].space

    def allocate(*_: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(Frames, "allocate", allocate)
    if how == "migrate":
        moving = world.start(commands_hmm.migrate_to_system, attached, pages(0, 1))
    else:
        moving = world.start(commands_hmm.evict_device, machine.receivers[attached].device.id)
    world.settle()
    assert isinstance(moving.error, ZeroDivisionError)
    assert "planted" in space.notifier.broken


def test_long_pin_waits_for_the_eviction_that_has_its_page() -> None:
    """It would move the page off the device itself, waits for the lock, and finds it in system memory.

    Source: Linux mm/migrate_device.c, folio_lock() of migrate_device_coherent_folio(); mm/gup.c, which tries again.
    """
    world = World(mirrors=0, limits=Limits(frames=64, device_frames=16))
    machine, process = world.machine, world.pid
    card = world.do(commands_device.register_device, "card", memory_pages=8, kind=RegionKind.DEVICE_COHERENT)
    slow = world.do(commands_hmm.attach, card, process)
    world.do(commands_process.write_memory, process, START, b"page")
    world.do(commands_hmm.migrate_to_device, slow, span(0))
    world.do(commands_hmm.insert_notifier, slow, START, PAGE_SIZE)
    evicting = world.start(commands_hmm.evict_device, card)
    (owed,) = world.settle(slow)
    pinning = world.start(commands_process.pin, process, span(0), write=True)
    assert machine.blockers(pinning) == [evicting.id]
    machine.answer(slow, owed.sequence)
    world.settle()
    assert evicting.result == 1
    assert pinning.result
    assert machine.frames.pincount[cpu_pte.cpu_pfn(machine.processes[process].space.table.get(START))] == 1
    machine.check()
