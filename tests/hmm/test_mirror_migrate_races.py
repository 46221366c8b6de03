"""Migrations of 2015 in the middle of something else: what waits, what gives way, and what is met on the way."""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from machine_world import FIXED, RW, START, World, error_of, span

from hmm import commands_device as devices
from hmm import commands_process as processes
from hmm import cpu_pte, pte
from hmm.address_space import Thp
from hmm.errors import OutOfFramesError
from hmm.events import Delivery, EventType
from hmm.limits import Limits
from hmm.local import Local
from hmm.machine import Machine
from hmm.madvise import Advice
from hmm.mirror import DeadlinePolicy
from hmm.operation_record import OperationRecord
from hmm.testing_memory import CarriedMemory
from hmm.units import PAGE_SIZE, PMD_PAGES, PMD_SIZE, AddressRange

WITH_MEMORY = Limits(frames=256, device_frames=256)


class Cards(World):
    """A world with devices whose drivers copy when the test says so."""

    def __init__(self, cards: int = 1, policy: DeadlinePolicy = DeadlinePolicy.FENCE) -> None:
        super().__init__(mirrors=0, limits=WITH_MEMORY)
        self.memory = CarriedMemory(self.machine)
        for number in range(cards):
            card = self.do(devices.register_device, f"card{number}", memory_pages=16, driver_copies=True)
            self.mirrors.append(self.do(devices.register_mirror, card, self.pid, policy=policy, update_on_fault=False))
        self.do(processes.write_memory, self.pid, START, b"".join(bytes([1 + n]) * PAGE_SIZE for n in range(16)))

    def carry(self, delivery: Delivery) -> None:
        """Answer one event as a driver that does what it is asked."""
        event = delivery.event
        results = self.memory.carry(delivery.mirror_id, event) if event.copy else b""
        self.machine.answer(delivery.mirror_id, delivery.sequence, results=results)

    def settle(self) -> None:
        """Carry everything and resume everything, until nothing moves."""
        while True:
            deliveries = self.machine.take_outbox()
            for delivery in deliveries:
                self.carry(delivery)
            ready = self.machine.ready()
            if not ready and not deliveries:
                return
            for record in ready:
                if not record.done and self.machine.is_ready(record):
                    self.machine.resume(record.id)

    def only(self, etype: EventType) -> Delivery:
        """The one event in the outbox, of that type."""
        (delivery,) = self.sent()
        assert delivery.event.etype is etype
        return delivery

    def first(self, first: int, npages: int = 1) -> list[int]:
        """The first byte of pages, as a CPU reads them."""
        data = self.do(processes.read_memory, self.pid, span(first).start, npages * PAGE_SIZE).data
        return list(data[::PAGE_SIZE])

    def waits_for(self, record: OperationRecord[Any]) -> list[int]:
        """The operations that a call waits for."""
        return self.machine.blockers(record)


def test_cpu_waits_when_the_page_is_locked() -> None:
    """A locked entry is skipped and refaulted: whoever touches it goes on when its owner has finished."""
    world = Cards()
    moving = world.start(devices.migrate, world.mirrors[0], span(0, 2))
    copy = world.only(EventType.COPY_TO_DEVICE)
    reading = world.start(processes.read_memory, world.pid, START, 1)
    assert world.waits_for(reading) == [moving.id]
    world.carry(copy)
    world.resume(moving)
    assert (moving.result.moved.npages, reading.done) == (2, False)
    world.settle()
    assert reading.result.data == b"\x01"
    world.machine.check()


@pytest.mark.parametrize("command", [processes.munmap, processes.madvise])
def test_change_waits_when_pages_are_being_copied(command: Any) -> None:
    """It tells nobody and changes nothing before; the driver hears of it when its copy has an answer."""
    world = Cards()
    moving = world.start(devices.migrate, world.mirrors[0], span(0, 2))
    copy = world.only(EventType.COPY_TO_DEVICE)
    more = (Advice.DONTNEED,) if command is processes.madvise else ()
    changing = world.start(command, world.pid, START, PAGE_SIZE, *more)
    assert (world.waits_for(changing), world.sent()) == ([moving.id], [])
    world.carry(copy)
    world.settle()
    assert (changing.result, moving.result.moved.npages) == (0, 2)
    assert world.machine.frames.region(1).used == 1
    world.machine.check()


def test_migration_gives_way_when_a_change_comes_before_its_copy() -> None:
    """Everything is put back, the change is made, and the migration starts over with what is there then."""
    world = Cards(cards=2)
    world.do(devices.fault, world.mirrors[1], [span(0, 2)], write=True)
    moving = world.start(devices.migrate, world.mirrors[0], span(0, 2))
    told = world.only(EventType.MIGRATE)
    changing = world.start(processes.madvise, world.pid, START, PAGE_SIZE, Advice.DONTNEED)
    assert world.waits_for(changing) == [moving.id]
    world.carry(told)
    world.resume(moving)
    assert world.waits_for(moving) == [changing.id]
    world.settle()
    assert (changing.result, moving.result.moved.npages) == (0, 2)
    assert world.first(0, 2) == [0, 2]
    world.machine.check()


def test_discard_that_was_told_keeps_the_page_from_coming_back() -> None:
    """The driver has freed it: who touches it meanwhile waits for the end of the discard, and reads zeroes."""
    world = Cards(cards=2)
    world.do(devices.migrate, world.mirrors[0], span(0))
    world.do(devices.fault, world.mirrors[1], [span(1)], write=True)
    discarding = world.start(processes.madvise, world.pid, START, 2 * PAGE_SIZE, Advice.DONTNEED)
    first, second = world.sent()
    world.carry(first)
    reading = world.start(processes.read_memory, world.pid, START, 1)
    assert (reading.done, world.waits_for(reading)) == (False, [discarding.id])
    world.carry(second)
    world.settle()
    assert reading.result.data == b"\0"
    world.machine.check()


def test_pages_of_two_mirrors_come_back_each_from_its_device() -> None:
    """The posted code assumed one mirror for an address space: a second one tripped an assertion."""
    world = Cards(cards=2)
    for number, mirror in enumerate(world.mirrors):
        world.do(devices.migrate, mirror, span(2 * number, 2))
    assert world.first(0, 5) == [1, 2, 3, 4, 5]
    child = world.do(processes.fork, world.pid)
    assert world.do(processes.read_memory, child, START, 1).data == b"\x01"
    world.machine.check()


def test_cpu_that_waited_finds_the_page_on_another_device() -> None:
    """Between its touch and its turn another device has taken the page: it is asked of that one."""
    world = Cards(cards=2)
    first, second = world.mirrors
    world.machine.mirrors[first].update_on_fault = True
    world.do(devices.migrate, first, span(0))
    faulting = world.start(devices.fault, first, [span(0)], write=True)
    update = world.only(EventType.DEVICE_WFAULT)
    reading = world.start(processes.read_memory, world.pid, START, 1)
    moving = world.start(devices.migrate, second, span(0))
    world.carry(update)
    world.resume(faulting)
    world.resume(moving)
    back = world.only(EventType.COPY_FROM_DEVICE)
    world.resume(reading)
    for delivery in (back, None, None):
        world.carry(delivery or world.sent()[0])
        world.resume(moving)
    assert moving.result.moved.npages == 1
    world.settle()
    assert reading.result.data == b"\x01"
    world.machine.check()


def test_discard_brings_pages_back_first_when_it_may_yet_fail() -> None:
    """With policy FAIL nothing is changed if nobody answers: then the driver may not have freed the page."""
    world = Cards(policy=DeadlinePolicy.FAIL)
    world.do(devices.migrate, world.mirrors[0], span(0))
    discarding = world.start(processes.madvise, world.pid, START, PAGE_SIZE, Advice.DONTNEED)
    back = world.only(EventType.COPY_FROM_DEVICE)
    world.carry(back)
    world.resume(discarding)
    told = world.only(EventType.MIGRATE)
    world.machine.abandon(told.mirror_id, told.sequence)
    world.resume(discarding)
    assert error_of(discarding).errno == errno.ETIMEDOUT
    world.carry(told)
    assert world.first(0) == [1]
    world.machine.check()


@pytest.mark.parametrize("bring", [False, True])
def test_abandoned_copy_leaves_the_device_what_it_did_not_bring(bring: bool) -> None:
    """FAIL: ETIMEDOUT and the page is where it was; what was brought already is back."""
    world = Cards(policy=DeadlinePolicy.FAIL)
    world.do(devices.migrate, world.mirrors[0], span(0))
    reading = world.start(processes.read_memory, world.pid, START, 1)
    back = world.only(EventType.COPY_FROM_DEVICE)
    if bring:
        world.memory.carry(back.mirror_id, back.event)
    world.machine.abandon(back.mirror_id, back.sequence)
    world.resume(reading)
    used = world.machine.frames.region(1).used
    if bring:
        assert (reading.result.data, used) == (b"\x01", 0)
    else:
        assert (error_of(reading).errno, used) == (errno.ETIMEDOUT, 1)
    world.machine.answer(back.mirror_id, back.sequence, results=b"\0")
    assert world.first(0) == [1]
    world.machine.check()


def test_migration_changes_nothing_when_the_mirrors_directories_run_out() -> None:
    """A failure before anything is locked needs no cleanup (the posted code ran it all the same until v10)."""
    machine = Machine(Limits(frames=64, device_frames=64))
    local = Local(machine)
    pid = local.call(processes.create_process)
    machine.limits = replace(machine.limits, directories=6)  # of the mirror's table alone
    card = local.call(devices.register_device, "card", memory_pages=8)
    mirror = local.call(devices.register_mirror, card, pid)
    for number in range(3):
        at = (number << 30) + START
        local.call(processes.mmap, pid, at, PAGE_SIZE, RW, FIXED)
        local.call(processes.write_memory, pid, at, b"x")
        try:
            local.call(devices.migrate, mirror, AddressRange(at, at + PAGE_SIZE))
        except OutOfFramesError:
            break
    else:
        pytest.fail("there was room for everything")
    machine.check()
    assert local.call(processes.read_memory, pid, at, 1).data == b"x"
    assert machine.frames.region(1).used == number


def test_migrate_splits_huge_pages() -> None:
    """Pages move one by one: what does not move stays, as small pages."""
    machine = Machine(Limits(frames=4 * PMD_PAGES, device_frames=64))
    local = Local(machine)
    pid = local.call(processes.create_process, thp=Thp.ALWAYS)
    local.call(processes.mmap, pid, PMD_SIZE, 2 * PMD_SIZE, RW, FIXED)
    local.call(processes.write_memory, pid, PMD_SIZE, b"huge")
    local.call(processes.read_memory, pid, 2 * PMD_SIZE, 1)
    space = machine.processes[pid].space
    assert cpu_pte.is_huge(space.table.get(PMD_SIZE))
    card = local.call(devices.register_device, "card", memory_pages=16)
    mirror = local.call(devices.register_mirror, card, pid)
    for start in (PMD_SIZE, 2 * PMD_SIZE):
        moved = local.call(devices.migrate, mirror, AddressRange(start, start + 4 * PAGE_SIZE))
        assert (moved.moved.npages, moved.moved.error) == (4, None)
        assert not cpu_pte.is_huge(space.table.get(start + PMD_SIZE - PAGE_SIZE))
    machine.check()
    assert local.call(processes.read_memory, pid, PMD_SIZE, 4).data == b"huge"
    machine.check()


def test_migrate_brings_pages_in_from_swap() -> None:
    """What was swapped out is faulted in first, and then moves."""
    machine = Machine(Limits(frames=64, device_frames=64, swap_pages=64))
    local = Local(machine)
    pid = local.call(processes.create_process)
    local.call(processes.mmap, pid, START, 8 * PAGE_SIZE, RW, FIXED)
    local.call(processes.write_memory, pid, START, b"swapped")
    local.call(processes.madvise, pid, START, PAGE_SIZE, Advice.PAGEOUT)
    assert cpu_pte.is_swap(machine.processes[pid].space.table.get(START))
    card = local.call(devices.register_device, "card", memory_pages=16)
    mirror = local.call(devices.register_mirror, card, pid)
    assert local.call(devices.migrate, mirror, span(0)).moved.npages == 1
    machine.check()
    assert local.call(processes.read_memory, pid, START, 7).data == b"swapped"


def test_pages_come_back_when_system_memory_has_to_be_reclaimed_first() -> None:
    """Oversubscribed memory makes room by swapping others out."""
    machine = Machine(Limits(frames=24, device_frames=64, swap_pages=64))
    local = Local(machine)
    pid = local.call(processes.create_process)
    local.call(processes.mmap, pid, START, 40 * PAGE_SIZE, RW, FIXED)
    card = local.call(devices.register_device, "card", memory_pages=16)
    mirror = local.call(devices.register_mirror, card, pid)
    for number in range(40):
        local.call(processes.write_memory, pid, START + number * PAGE_SIZE, bytes([1 + number]))
        if number < 16:
            local.call(devices.migrate, mirror, span(number))
    for number in range(40):
        assert local.call(processes.read_memory, pid, START + number * PAGE_SIZE, 1).data == bytes([1 + number])
    machine.check()
    assert not pte.pte_test_valid_dev(np.array(local.call(devices.read_table, mirror, span(0, 16)))).any()


def test_fault_leaves_out_pages_that_the_driver_has_brought_back() -> None:
    """The driver has answered for them, and the mirror still has its entries until the reader goes on."""
    world = Cards()
    world.start(processes.munmap, world.pid, START, PAGE_SIZE)
    world.start(devices.migrate, world.mirrors[0], span(1))
    world.settle()
    reading = world.start(processes.read_memory, world.pid, span(1).start, 1)
    world.carry(world.only(EventType.COPY_FROM_DEVICE))
    fault = world.start(devices.fault, world.mirrors[0], [span(0, 2)], write=False)
    assert fault.result.parts[0].error is not None  # it ends at the hole, and shows what there is all the same
    assert not fault.result.entries.any()
    world.settle()
    assert reading.result.data == bytes([2])
