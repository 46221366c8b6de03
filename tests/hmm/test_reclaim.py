"""Reclaim and swap: which pages go, who hears of it, and how they come back."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from machine_world import FIXED, RW, START, World, span

from hmm import commands_device as devices
from hmm import commands_file as files
from hmm import commands_hmm as hmm
from hmm import commands_process as processes
from hmm import cpu_pte
from hmm.address_space import Thp
from hmm.clear_refs import ClearRefs
from hmm.errors import HmmError, OutOfFramesError
from hmm.events import EventType, Reason
from hmm.file import FILE_SIZE_MAX
from hmm.frames import PageFlag
from hmm.interval_notifier import IntervalMirror
from hmm.limits import Limits
from hmm.local import Local
from hmm.machine import Machine
from hmm.madvise import Advice
from hmm.mlock import MlockFlag
from hmm.operation import Await, WaitFor
from hmm.operation_record import Caller
from hmm.range_fault import REQ_FAULT, VALID
from hmm.receiver import DeadlinePolicy
from hmm.semantics import LINUX_6_12, LINUX_7, Semantics
from hmm.smaps import MemoryUse, memory_use
from hmm.swap_area import SwapArea
from hmm.units import PAGE_SIZE, AddressRange
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot

SMALL = Limits(frames=33, swap_pages=256, device_frames=64, directories=1 << 8)


@dataclass
class Memory:
    """A process with 64 writable pages on a machine with 32 frames."""

    limits: Limits = SMALL
    semantics: Semantics = LINUX_6_12
    local: Local = field(init=False)
    pid: int = field(init=False)

    def __post_init__(self) -> None:
        self.local = Local(Machine(self.limits, semantics=self.semantics))
        self.pid = self.call(processes.create_process, "p")
        self.call(processes.mmap, self.pid, START, 64 * PAGE_SIZE, RW, FIXED)

    @property
    def machine(self) -> Machine:
        """What the commands change."""
        return self.local.machine

    @property
    def swap(self) -> SwapArea:
        """The swap area."""
        assert self.machine.frames.swap is not None
        return self.machine.frames.swap

    def call(self, command: Any, *arguments: Any, **options: Any) -> Any:
        """A call, after which the machine is checked."""
        try:
            return self.local.call(command, *arguments, **options)
        finally:
            self.machine.check()

    def write(self, where: AddressRange, byte: int = 1, pid: int = 0) -> None:
        """Fill pages."""
        assert self.call(processes.write_memory, pid or self.pid, where.start, bytes([byte]) * where.size_bytes)

    def read(self, where: AddressRange, pid: int = 0) -> list[int]:
        """The first byte of each page."""
        return list(self.call(processes.read_pages, pid or self.pid, where, 0).data)

    def advise(self, where: AddressRange, advice: Advice, pid: int = 0) -> None:
        """madvise()."""
        self.call(processes.madvise, pid or self.pid, where.start, where.size_bytes, advice)

    def entries(self, where: AddressRange, pid: int = 0) -> list[int]:
        """Of the CPU's table."""
        table = self.machine.processes[pid or self.pid].space.table
        entries: list[int] = table.read(where.start, where.end).tolist()
        return entries

    def swapped(self, where: AddressRange, pid: int = 0) -> list[bool]:
        """Which pages are in swap."""
        return [cpu_pte.is_swap(entry) for entry in self.entries(where, pid)]

    def use(self) -> MemoryUse:
        """What smaps says of the window."""
        space = self.machine.processes[self.pid].space
        vma = space.vmas.find(START)
        assert vma is not None
        return memory_use(space, vma)

    def fork(self) -> int:
        """A child."""
        child: int = self.call(processes.fork, self.pid)
        return child


def test_write_goes_on_when_memory_is_full_and_there_is_swap() -> None:
    """More memory than there is can be written and read back: mm/vmscan.c, mm/memory.c do_swap_page()."""
    memory = Memory()
    memory.call(processes.write_pages, memory.pid, span(0, 64), 0, bytes(range(64)))
    assert memory.read(span(0, 64)) == list(range(64))
    assert memory.swap.used >= 32


def test_write_fails_when_memory_and_swap_are_full() -> None:
    """When nothing can be reclaimed it is ENOMEM at the page, and what was written before is there."""
    memory = Memory(Limits(frames=33, swap_pages=8, device_frames=0))
    with pytest.raises(OutOfFramesError) as caught:
        memory.write(span(0, 64))
    assert caught.value.errno == errno.ENOMEM
    assert caught.value.address == span(40).start
    there = [not swapped for swapped in memory.swapped(span(0, 40))]
    assert [memory.read(span(page)) for page in range(40) if there[page]] == [[1]] * 32


def test_write_fails_as_before_when_there_is_no_swap() -> None:
    """Without a swap area private pages stay: can_reclaim_anon_pages()."""
    memory = Memory(Limits(frames=33, device_frames=0))
    memory.advise(span(0, 64), Advice.PAGEOUT)
    with pytest.raises(OutOfFramesError):
        memory.write(span(0, 64))


def test_reclaim_takes_the_pages_that_were_not_used_for_longest() -> None:
    """Pages used since they were last looked at get a second chance: folio_check_references()."""
    memory = Memory()
    memory.write(span(0, 32))
    memory.write(span(32, 2))  # everything was used: the oldest go, and all have been looked at
    memory.read(span(8, 4))
    memory.write(span(36, 12))
    assert not any(memory.swapped(span(8, 4)))
    assert all(memory.swapped(span(4, 4)))


def test_reclaim_leaves_locked_and_pinned_pages() -> None:
    """Pages of VM_LOCKED are unevictable, and folio_maybe_dma_pinned() ones are kept: shrink_folio_list()."""
    memory = Memory()
    memory.call(processes.mlock, memory.pid, span(0, 4).start, 4 * PAGE_SIZE)
    memory.call(processes.pin, memory.pid, span(4, 4), write=True)
    memory.write(span(8, 56))
    memory.advise(span(4, 60), Advice.PAGEOUT)
    assert memory.swapped(span(0, 64)) == [False] * 8 + [True] * 56


def test_reclaim_unmaps_shared_memory_that_is_pinned_and_leaves_it_in_its_file() -> None:
    """Pins keep private pages from a slot; of others shrink_folio_list() asks only when nobody maps them any more."""
    memory = Memory()
    flags = MapFlag.SHARED | MapFlag.ANONYMOUS | MapFlag.FIXED
    memory.call(processes.mmap, memory.pid, span(64).start, 4 * PAGE_SIZE, RW, flags)
    memory.write(span(64, 2), 5)
    memory.call(processes.pin, memory.pid, span(64), write=True)
    memory.advise(span(64, 2), Advice.PAGEOUT)
    assert memory.entries(span(64, 2)) == [0, 0]
    assert memory.call(processes.mincore, memory.pid, span(64).start, 2 * PAGE_SIZE).tolist() == [1, 0]
    assert memory.swap.used == 1


def test_reclaim_leaves_pages_that_a_device_has_to_itself() -> None:
    """They are mapped nowhere, so that nothing unmaps them, and their entries refer to them: __remove_mapping()."""
    memory = Memory()
    device = memory.call(devices.register_device, "gpu")
    mirror = memory.call(hmm.attach, device, memory.pid)
    memory.call(hmm.make_exclusive, mirror, span(0, 2))
    memory.write(span(2, 60))
    assert all(cpu_pte.is_device_exclusive(entry) for entry in memory.entries(span(0, 2)))


def test_reclaim_takes_pages_that_a_device_has_to_itself_today() -> None:
    """try_to_unmap_one() finds them by their exclusive entries, as they stay mapped; they stay the process's own.

    Source: Linux 7.0, mm/rmap.c, make_device_exclusive(), which removes no mapping.
    """
    memory = Memory(semantics=LINUX_7)
    device = memory.call(devices.register_device, "gpu")
    mirror = memory.call(hmm.attach, device, memory.pid)
    memory.call(hmm.insert_notifier, mirror, START, 64 * PAGE_SIZE)
    memory.write(span(0, 2), 9)
    pfns = np.concatenate([memory.call(hmm.make_exclusive, mirror, span(page)) for page in (0, 1)])
    assert pfns.all()
    pages = np.array([START, START + PAGE_SIZE], np.uint64)
    memory.call(hmm.write_frames, mirror, pages, pfns, b"\5" * 2 * PAGE_SIZE)
    memory.write(span(2, 60))
    assert all(memory.swapped(span(0, 2)))
    assert all(entry & cpu_pte.SWP_EXCLUSIVE for entry in memory.entries(span(0, 2)))
    with pytest.raises(HmmError):
        memory.call(hmm.read_frames, mirror, pages, pfns)
    assert memory.read(span(0, 2)) == [5, 5]


def test_pageout_passes_over_pages_that_a_device_has_to_itself() -> None:
    """madvise_cold_or_pageout_pte_range(): their entries are not present."""
    memory = Memory()
    device = memory.call(devices.register_device, "gpu")
    mirror = memory.call(hmm.attach, device, memory.pid)
    memory.call(hmm.make_exclusive, mirror, span(0))
    memory.write(span(1))
    memory.advise(span(0, 2), Advice.PAGEOUT)
    assert memory.swapped(span(0, 2)) == [False, True]


def test_pages_that_go_out_are_locked_until_they_have_gone() -> None:
    """shrink_folio_list() holds the lock of each: nobody takes one of them for a device, or moves it there."""
    world = World(limits=SMALL)
    write = world.start(processes.write_memory, world.pid, START, bytes(8 * PAGE_SIZE))
    world.settle()
    assert write.done
    going = world.start(processes.madvise, world.pid, START, 4 * PAGE_SIZE, Advice.PAGEOUT)
    told = world.sent()
    assert not going.done
    space = world.machine.processes[world.pid].space
    pfns = cpu_pte.cpu_pfn(space.table.read(START, START + 8 * PAGE_SIZE))
    assert world.machine.frames.locks.are_locked(pfns).tolist() == [True] * 4 + [False] * 4
    for one in told:
        world.machine.answer(one.mirror_id, one.sequence)
    world.settle()
    assert going.done
    assert not world.machine.frames.locks.held


def test_mirrors_are_told_before_a_page_goes_out() -> None:
    """try_to_unmap_one() sends CLEAR, and the notifier of 2015 had MIGRATE for it; the entry stays until the answer."""
    world = World(limits=SMALL)
    world.do(devices.fault, world.mirrors[0], [span(0, 4)], write=True)
    paging = world.start(processes.madvise, world.pid, START, 4 * PAGE_SIZE, Advice.PAGEOUT)
    (delivery,) = world.sent()
    event = delivery.event
    assert (event.etype, event.reason, event.spans) == (EventType.MIGRATE, Reason.CLEAR, (span(0, 4),))
    table = world.machine.processes[world.pid].space.table
    assert all(cpu_pte.is_present(entry) for entry in table.read(span(0).start, span(4).start).tolist())
    world.machine.answer(delivery.mirror_id, delivery.sequence)
    world.settle()
    assert paging.done
    assert all(cpu_pte.is_swap(entry) for entry in table.read(span(0).start, span(4).start).tolist())
    world.machine.check()


def test_swap_in_is_not_told_to_anybody() -> None:
    """do_swap_page() sends nothing: nobody can have an entry for what is in swap."""
    memory = Memory()
    device = memory.call(devices.register_device, "gpu")
    mirror = memory.call(devices.register_mirror, device, memory.pid)
    memory.write(span(0, 8))
    memory.advise(span(0, 8), Advice.PAGEOUT)
    before = memory.machine.mirrors[mirror].sequence
    memory.read(span(0, 4))
    memory.write(span(4, 4), 2)
    assert memory.machine.mirrors[mirror].sequence == before


def test_device_fault_brings_pages_in() -> None:
    """A device's fault is a CPU's: hmm_vma_fault() and hmm_mirror_fault() call handle_mm_fault()."""
    memory = Memory()
    memory.write(span(0, 60), 5)
    device = memory.call(devices.register_device, "gpu")
    mirror = memory.call(devices.register_mirror, device, memory.pid)
    (done,) = memory.call(devices.fault, mirror, [span(0, 64)], write=False).parts
    assert (done.error, done.end) == (None, span(64).start)
    (done,) = memory.call(devices.fault, mirror, [span(20, 2)], write=True).parts
    assert memory.call(devices.device_read, mirror, [(span(20).start, 1)]) == b"\5"


def test_device_faults_succeed_when_all_of_memory_is_fought_for() -> None:
    """Two devices fault more than there is at the same time: both end, whoever answers first."""
    world = World(mirrors=2, limits=Limits(frames=10, swap_pages=64, device_frames=0))
    faults = [world.start(devices.fault, mirror, [span(0, 16)], write=True) for mirror in world.mirrors]
    world.settle()
    assert [fault.result.parts[0].end for fault in faults] == [span(16).start] * 2
    world.machine.check()


def test_snapshot_shows_nothing_where_a_page_is_in_swap() -> None:
    """hmm_vma_handle_pte(): a swap entry is no page, and is faulted when it is asked for."""
    memory = Memory()
    memory.write(span(0, 2), 9)
    device = memory.call(devices.register_device, "gpu")
    mirror = memory.call(hmm.attach, device, memory.pid)
    number = memory.call(hmm.insert_notifier, mirror, START, 16 * PAGE_SIZE)
    memory.advise(span(0, 2), Advice.PAGEOUT)
    receiver = memory.machine.receivers[mirror]
    assert isinstance(receiver, IntervalMirror)
    sequence = memory.call(hmm.read_begin, mirror, number)
    assert memory.call(hmm.range_fault, mirror, number, sequence, span(0, 2)).words.tolist() == [0, 0]
    words = memory.call(hmm.range_fault, mirror, number, sequence, span(0, 2), REQ_FAULT).words
    assert ((words & np.uint64(VALID)) != 0).all()


def test_fork_counts_the_entries_of_both_when_pages_are_in_swap() -> None:
    """copy_nonpresent_pte() calls swap_duplicate() and takes the exclusive marker away."""
    memory = Memory()
    memory.write(span(0, 4), 3)
    memory.advise(span(0, 4), Advice.PAGEOUT)
    (first, *_) = memory.entries(span(0, 4))
    assert first & cpu_pte.SWP_EXCLUSIVE
    child = memory.fork()
    assert memory.entries(span(0, 4)) == memory.entries(span(0, 4), child)
    assert not memory.entries(span(0))[0] & cpu_pte.SWP_EXCLUSIVE
    assert memory.swap.counts[cpu_pte.cpu_pfn(first)] == 2
    memory.write(span(0, 4), 4, child)
    assert (memory.read(span(0, 4)), memory.read(span(0, 4), child)) == ([3] * 4, [4] * 4)


def test_swapped_page_is_shared_again_when_both_processes_read_it() -> None:
    """The second finds the page of the first in the swap cache: swap_cache_get_folio()."""
    memory = Memory()
    memory.write(span(0), 3)
    memory.advise(span(0), Advice.PAGEOUT)
    child = memory.fork()
    memory.read(span(0))
    assert (memory.swap.used, memory.swapped(span(0), child)) == (1, [True])
    memory.read(span(0), child)
    assert memory.entries(span(0)) == memory.entries(span(0), child)
    assert not cpu_pte.is_writable(memory.entries(span(0))[0])
    assert memory.swap.used == 0


def test_exclusive_page_is_writable_at_once_when_it_comes_back() -> None:
    """do_swap_page() maps a page that is marked exclusive with the permission of its VMA."""
    memory = Memory()
    memory.write(span(0))
    memory.advise(span(0), Advice.PAGEOUT)
    memory.read(span(0))
    assert cpu_pte.is_writable(memory.entries(span(0))[0])
    memory.advise(span(0), Advice.PAGEOUT)
    memory.call(processes.mprotect, memory.pid, START, PAGE_SIZE, Prot.READ)
    memory.read(span(0))
    assert not cpu_pte.is_writable(memory.entries(span(0))[0])


@pytest.mark.parametrize("locked", [False, True])
def test_page_that_nobody_else_has_is_writable_at_once_when_it_is_read_back_into_locked_memory(locked: bool) -> None:
    """should_try_to_free_swap() is true for VM_LOCKED, so that do_swap_page() finds one reference; else for writes."""
    memory = Memory()
    memory.write(span(0))
    memory.advise(span(0), Advice.PAGEOUT)
    memory.call(processes.exit_process, memory.fork())
    if locked:
        memory.call(processes.mlock, memory.pid, START, PAGE_SIZE, MlockFlag.ONFAULT)
    memory.read(span(0))
    assert cpu_pte.is_writable(memory.entries(span(0))[0]) is locked


@pytest.mark.parametrize(("nothers", "full"), [(3, False), (4, True)])
def test_page_that_nobody_else_has_is_writable_at_once_when_swap_is_half_full(nothers: int, full: bool) -> None:
    """vm_swap_full(): should_try_to_free_swap() is true for reads as well; folio_free_swap() makes the page dirty."""
    memory = Memory(replace(SMALL, swap_pages=8))
    memory.write(span(0, 1 + nothers))
    memory.advise(span(0, 1 + nothers), Advice.PAGEOUT)
    memory.call(processes.exit_process, memory.fork())  # no entry is marked as exclusive any more
    memory.read(span(0))
    (entry,) = memory.entries(span(0))
    assert cpu_pte.is_writable(entry) is full
    assert bool(memory.machine.frames.flags_of(cpu_pte.cpu_pfn(entry)) & PageFlag.DIRTY) is full


def test_page_is_clean_for_others_when_it_is_copied_for_a_write() -> None:
    """should_try_to_free_swap() asks for no reference but the swap cache's, so that only the copy has been written."""
    memory = Memory()
    memory.write(span(0))
    memory.advise(span(0), Advice.PAGEOUT)
    child = memory.fork()
    memory.read(span(0))
    memory.write(span(0), 2, child)
    assert memory.read(span(0)) == [1]
    (entry,) = memory.entries(span(0))
    assert not memory.machine.frames.flags_of(cpu_pte.cpu_pfn(entry)) & PageFlag.DIRTY


def test_soft_dirty_survives_swap() -> None:
    """pte_swp_mksoft_dirty() carries the bit out, do_swap_page() back in."""
    memory = Memory()
    memory.write(span(0))
    memory.advise(span(0), Advice.PAGEOUT)
    assert memory.entries(span(0))[0] & cpu_pte.SOFT_DIRTY
    memory.read(span(0))
    assert memory.entries(span(0))[0] & cpu_pte.SOFT_DIRTY


@pytest.mark.parametrize("way", ["munmap", "dontneed", "free", "exit", "map over"])
def test_slots_are_freed_when_their_entries_go(way: str) -> None:
    """zap_nonpresent_ptes() and madvise_free_pte_range() call free_swap_and_cache()."""
    memory = Memory()
    memory.write(span(0, 16))
    memory.advise(span(0, 16), Advice.PAGEOUT)
    assert memory.swap.used == 16
    match way:
        case "munmap":
            memory.call(processes.munmap, memory.pid, START, 16 * PAGE_SIZE)
        case "dontneed":
            memory.advise(span(0, 16), Advice.DONTNEED)
        case "free":
            memory.advise(span(0, 16), Advice.FREE)
        case "exit":
            memory.call(processes.exit_process, memory.pid)
        case _:
            memory.call(processes.mmap, memory.pid, START, 16 * PAGE_SIZE, RW, FIXED)
    assert memory.swap.used == 0


def test_entries_move_and_are_protected_like_any_other() -> None:
    """move_ptes() moves swap entries, and change_pte_range() leaves them but for their markers."""
    memory = Memory()
    memory.write(span(0, 2), 6)
    memory.advise(span(0, 2), Advice.PAGEOUT)
    before = memory.entries(span(0, 2))
    memory.call(processes.mprotect, memory.pid, START, 2 * PAGE_SIZE, Prot.READ)
    memory.call(processes.mremap, memory.pid, START, 2 * PAGE_SIZE, 2 * PAGE_SIZE, 3, span(80).start)
    assert memory.entries(span(80, 2)) == before
    assert memory.read(span(80, 2)) == [6, 6]


def test_page_that_was_freed_lazily_goes_without_being_written() -> None:
    """MADV_FREE: a page that is still clean is discarded and reads as zeroes; one written since is kept."""
    memory = Memory()
    memory.write(span(0, 2), 8)
    memory.advise(span(0, 2), Advice.FREE)
    memory.write(span(1), 9)
    memory.advise(span(0, 2), Advice.PAGEOUT)
    assert memory.entries(span(0)) == [0]
    assert memory.swap.used == 0
    assert memory.read(span(0, 2)) == [0, 9]


def test_page_that_others_map_is_freed_lazily_when_it_is_clean_itself() -> None:
    """madvise_free_pte_range(): the entry is clean, the page may go; the child, who wrote it last, keeps it.

    try_to_unmap_one() drops the entry of the parent, comes to the dirty one of the child, and ends.
    """
    memory = Memory()
    memory.write(span(0, 2), 8)
    child = memory.fork()
    memory.advise(span(0), Advice.FREE)
    assert memory.use().lazy_free == PAGE_SIZE
    assert cpu_pte.is_dirty(memory.entries(span(0), child)[0])
    memory.write(span(32, 31), 1)
    assert memory.read(span(0, 2)) == [0, 8]
    assert memory.read(span(0, 2), child) == [8, 8]


def test_page_that_others_map_is_lost_to_who_is_met_before_the_one_that_wrote_it() -> None:
    """rmap_walk_anon() goes by the offset at which VMAs begin: the child's comes first once the parent's is cut."""
    memory = Memory()
    memory.write(span(0, 2), 8)
    child = memory.fork()
    memory.advise(span(1), Advice.FREE, pid=child)
    memory.advise(span(0), Advice.DONTDUMP)
    memory.write(span(32, 31), 1)
    assert memory.read(span(0, 2)) == [8, 8]
    assert memory.read(span(0, 2), child) == [8, 0]


def test_page_that_others_map_is_left_alone_when_it_is_dirty_itself() -> None:
    """madvise_free_pte_range(): folio_test_dirty() and more than one mapping; so is what is in the swap cache."""
    memory = Memory()
    memory.write(span(0), 8)
    memory.advise(span(0), Advice.FREE)
    memory.advise(span(0), Advice.POPULATE_WRITE)  # set_page_dirty(), as the entry is clean
    memory.fork()
    before = memory.entries(span(0))
    memory.advise(span(0), Advice.FREE)
    assert memory.entries(span(0)) == before
    assert memory.use().lazy_free == 0


def test_page_that_others_map_is_left_alone_when_it_was_read_from_swap() -> None:
    """madvise_free_pte_range(): it is in the swap cache still, where a read fault leaves it, and another maps it."""
    memory = Memory()
    memory.write(span(0), 8)
    memory.advise(span(0), Advice.PAGEOUT)
    assert memory.read(span(0)) == [8]
    child = memory.fork()
    memory.advise(span(0), Advice.FREE)
    assert memory.use().lazy_free == 0
    memory.write(span(32, 31), 1)
    assert memory.read(span(0)) == memory.read(span(0), child) == [8]


NO_SWAP = Limits(frames=33, device_frames=0, directories=1 << 8)


def test_pageout_drops_what_was_freed_lazily_when_there_is_no_swap() -> None:
    """shrink_folio_list(): add_to_swap() fails for all others, which become active; mirrors hear of what goes."""
    memory = Memory(NO_SWAP)
    memory.write(span(0, 4), 8)
    memory.advise(span(0, 2), Advice.FREE)
    memory.write(span(1), 9)
    memory.advise(span(0, 4), Advice.PAGEOUT)
    assert memory.entries(span(0)) == [0]
    assert memory.read(span(0, 4)) == [0, 9, 8, 8]
    flags = memory.machine.frames.test_flags(np.array([cpu_pte.cpu_pfn(memory.entries(span(2))[0])]), PageFlag.ACTIVE)
    assert flags.all()


def test_pageout_takes_the_entries_of_files_when_there_is_no_swap() -> None:
    """shrink_folio_list() unmaps before it finds that shmem_writepage() can put the page nowhere: seen on 6.18."""
    memory = Memory(NO_SWAP)
    flags = MapFlag.SHARED | MapFlag.ANONYMOUS | MapFlag.FIXED
    memory.call(processes.mmap, memory.pid, span(64).start, 4 * PAGE_SIZE, RW, flags)
    memory.write(span(64, 4), 5)
    memory.advise(span(64, 4), Advice.PAGEOUT)
    assert memory.entries(span(64, 4)) == [0] * 4
    assert memory.read(span(64, 4)) == [5] * 4


@pytest.mark.parametrize("swap_pages", [0, 64])
def test_page_of_a_file_that_nobody_wrote_leaves_a_hole(swap_pages: int) -> None:
    """shrink_folio_list() writes no clean page of shared memory: __remove_mapping() frees it.  Seen on 6.18."""
    memory = Memory(Limits(frames=33, swap_pages=swap_pages, device_frames=0, directories=1 << 8))
    flags = MapFlag.SHARED | MapFlag.ANONYMOUS | MapFlag.FIXED
    memory.call(processes.mmap, memory.pid, span(64).start, 4 * PAGE_SIZE, RW, flags)
    memory.read(span(64, 4))
    memory.write(span(65), 5)
    memory.advise(span(64, 4), Advice.PAGEOUT)
    resident = memory.call(processes.mincore, memory.pid, span(64).start, 4 * PAGE_SIZE).tolist()
    assert resident == [0, int(not swap_pages), 0, 0]
    assert memory.machine.frames.regions[0].used == int(not swap_pages)
    assert memory.read(span(64, 4)) == [0, 5, 0, 0]


def test_page_that_was_freed_lazily_already_stays_as_used_as_it_was() -> None:
    """folio_mark_lazyfree() does nothing to what is not backed by swap (any more).  Seen on 6.18."""
    memory = Memory(NO_SWAP)
    memory.write(span(0, 2), 8)
    memory.advise(span(0, 2), Advice.FREE)
    memory.advise(span(0), Advice.POPULATE_READ)
    memory.advise(span(0, 2), Advice.FREE)
    assert memory.use().referenced == PAGE_SIZE


def test_pageout_forgets_that_pages_were_used() -> None:
    """madvise_cold_or_pageout_pte_range(): folio_clear_referenced(), whatever becomes of the page then."""
    memory = Memory(NO_SWAP)
    memory.advise(span(0, 2), Advice.POPULATE_WRITE)
    memory.call(processes.clear_refs, memory.pid, ClearRefs.ALL)
    memory.advise(span(0, 2), Advice.POPULATE_WRITE)
    assert memory.use().referenced == 2 * PAGE_SIZE
    memory.advise(span(0), Advice.PAGEOUT)
    assert memory.use().referenced == PAGE_SIZE


def test_cold_pages_are_old_when_there_is_no_swap() -> None:
    """madvise_cold_or_pageout_pte_range() clears the accessed bit, whatever may become of the page."""
    memory = Memory(NO_SWAP)
    memory.write(span(0, 2), 8)
    memory.advise(span(0), Advice.COLD)
    young = [bool(entry & cpu_pte.ACCESSED) for entry in memory.entries(span(0, 2))]
    assert young == [False, True]


def test_write_takes_what_was_freed_lazily_when_there_is_no_swap() -> None:
    """Lazily freed pages are on the list of files' pages, which is reclaimed with swap or without."""
    memory = Memory(NO_SWAP)
    memory.write(span(0, 32), 8)
    with pytest.raises(OutOfFramesError):
        memory.write(span(32), 8)
    memory.advise(span(0, 4), Advice.FREE)
    memory.write(span(32, 4), 7)
    assert memory.read(span(32, 4)) == [7] * 4
    assert memory.read(span(0, 5)) == [0] * 4 + [8]
    with pytest.raises(OutOfFramesError):
        memory.write(span(40), 8)


def test_pages_of_files_go_to_swap_and_come_back() -> None:
    """shmem_writepage() puts a swap entry into the page cache, and every mapping loses the page."""
    memory = Memory()
    file = memory.call(files.open_file, "f", create=True)
    data = b"".join(bytes([value]) * PAGE_SIZE for value in range(1, 21))
    memory.call(files.write_file, file, 0, data)
    shared = MapFlag.SHARED | MapFlag.FIXED
    memory.call(processes.mmap, memory.pid, span(100).start, 20 * PAGE_SIZE, RW, shared, file)
    memory.write(span(100), 77)
    memory.read(span(100, 20))
    memory.advise(span(100, 20), Advice.PAGEOUT)
    assert not any(memory.entries(span(100, 20)))
    assert memory.machine.files[file].resident_pages == 0
    assert memory.read(span(100, 20)) == [77, *range(2, 21)]
    assert memory.call(files.read_file, file, 0, 20 * PAGE_SIZE) == b"\x4d" * PAGE_SIZE + data[PAGE_SIZE:]
    memory.call(files.truncate_file, file, PAGE_SIZE + 10)
    memory.call(files.truncate_file, file, 3 * PAGE_SIZE)
    assert memory.call(files.read_file, file, PAGE_SIZE, 20) == b"\2" * 10 + bytes(10)


def test_hole_leaves_private_copies_that_are_in_swap() -> None:
    """zap_nonpresent_ptes(): should_zap_cows() is false for a hole that is punched."""
    memory = Memory()
    file = memory.call(files.open_file, "f", create=True)
    memory.call(files.write_file, file, 0, bytes(2 * PAGE_SIZE))
    private = MapFlag.PRIVATE | MapFlag.FIXED
    memory.call(processes.mmap, memory.pid, span(100).start, 2 * PAGE_SIZE, RW, private, file)
    memory.write(span(100), 5)
    memory.advise(span(100, 2), Advice.PAGEOUT)
    memory.call(files.punch_file, file, 0, 2 * PAGE_SIZE)
    assert memory.read(span(100, 2)) == [5, 0]


def test_mincore_and_willneed_agree_about_the_swap_cache() -> None:
    """mincore_pte_range() counts a page that is in the swap cache; swapin_walk_pmd_entry() brings it there."""
    memory = Memory()
    memory.write(span(0, 4), 2)
    memory.advise(span(0, 4), Advice.PAGEOUT)
    length = 4 * PAGE_SIZE
    assert memory.call(processes.mincore, memory.pid, START, length).tolist() == [0] * 4
    memory.advise(span(0, 2), Advice.WILLNEED)
    assert memory.call(processes.mincore, memory.pid, START, length).tolist() == [1, 1, 0, 0]
    assert all(memory.swapped(span(0, 4)))
    memory.write(span(8, 32))
    assert memory.read(span(0, 4)) == [2] * 4


def test_mincore_and_willneed_ask_the_file_for_no_private_copy_in_swap() -> None:
    """mincore_pte_range() asks the swap cache alone; madvise_willneed() of a file brings in the file's own pages."""
    memory = Memory()
    file = memory.call(files.open_file, "f", create=True)
    memory.call(files.write_file, file, 0, bytes(4 * PAGE_SIZE))
    private = MapFlag.PRIVATE | MapFlag.FIXED
    memory.call(processes.mmap, memory.pid, span(100).start, 4 * PAGE_SIZE, RW, private, file)
    memory.write(span(100, 2), 5)
    memory.advise(span(100, 2), Advice.PAGEOUT)
    for advice in (None, Advice.WILLNEED):
        if advice is not None:
            memory.advise(span(100, 4), advice)
        found = memory.call(processes.mincore, memory.pid, span(100).start, 4 * PAGE_SIZE)
        assert found.tolist() == [0, 0, 1, 1]
    assert memory.read(span(100, 4)) == [5, 5, 0, 0]


def test_willneed_passes_over_what_lies_behind_the_end_of_any_file() -> None:
    """shmem_swapin_range() finds nothing in the page cache there."""
    memory = Memory()
    file = memory.call(files.open_file, "f", create=True)
    private = MapFlag.PRIVATE | MapFlag.FIXED
    offset = FILE_SIZE_MAX - PAGE_SIZE
    memory.call(processes.mmap, memory.pid, span(100).start, 4 * PAGE_SIZE, RW, private, file, offset)
    memory.advise(span(100, 4), Advice.WILLNEED)
    memory.advise(span(102, 2), Advice.WILLNEED)


def test_punching_a_part_of_a_page_brings_it_in_from_swap() -> None:
    """shmem_get_partial_folio() reads the page back, and truncate_inode_partial_folio() zeroes it in memory."""
    memory = Memory()
    file = memory.call(files.open_file, "f", create=True)
    memory.call(files.write_file, file, 0, b"x" * 3 * PAGE_SIZE)
    shared = MapFlag.SHARED | MapFlag.FIXED
    memory.call(processes.mmap, memory.pid, span(100).start, 3 * PAGE_SIZE, RW, shared, file)
    memory.read(span(100, 3))
    memory.advise(span(100, 3), Advice.PAGEOUT)
    assert files.status(memory.machine, file).resident_pages == 0
    memory.call(files.punch_file, file, 1, 2)
    assert files.status(memory.machine, file).resident_pages == 1
    memory.call(files.truncate_file, file, 3 * PAGE_SIZE - 1)
    assert files.status(memory.machine, file).resident_pages == 2
    data = memory.call(files.read_file, file, 0, 3 * PAGE_SIZE)
    assert (data[:4], data[-2:], len(data)) == (b"x\0\0x", b"xx", 3 * PAGE_SIZE - 1)


def test_cold_pages_go_first() -> None:
    """MADV_COLD: folio_deactivate() puts pages where they are reclaimed unless they are used."""
    memory = Memory()
    memory.write(span(0, 32))
    memory.advise(span(20, 8), Advice.COLD)
    memory.write(span(40, 4))
    assert all(memory.swapped(span(20, 4)))
    assert not any(memory.swapped(span(0, 20)))


def test_cold_pages_that_were_active_are_the_last_of_the_inactive_ones_to_go() -> None:
    """lru_deactivate() puts them at the head of the inactive list; others it leaves where they are."""
    memory = Memory()
    memory.write(span(0, 8))
    space = memory.machine.processes[memory.pid].space
    pfns = cpu_pte.cpu_pfn(space.table.read(START, START + 8 * PAGE_SIZE))
    frames = memory.machine.frames
    frames.set_flags(pfns[:2], PageFlag.ACTIVE | PageFlag.LRU)
    before = frames.lru[pfns].copy()
    memory.advise(span(0, 4), Advice.COLD)
    assert frames.lru[pfns[2:]].tolist() == before[2:].tolist()
    assert before.max() < frames.lru[pfns[0]] < frames.lru[pfns[1]]
    assert not frames.test_flags(pfns, PageFlag.ACTIVE).any()


@pytest.mark.parametrize("advice", [Advice.SEQUENTIAL, Advice.RANDOM])
def test_use_of_pages_does_not_count_where_it_says_nothing_of_the_next(advice: Advice) -> None:
    """invalid_folio_referenced_vma(): folio_referenced() asks no VMA without vma_has_recency(), nor clears its bits."""
    memory = Memory()
    memory.write(span(0, 32))
    memory.advise(span(20, 8), advice)
    memory.write(span(40, 4))
    assert all(memory.swapped(span(20, 4)))
    assert not any(memory.swapped(span(0, 20)))


def test_pageout_leaves_what_another_process_maps() -> None:
    """madvise_cold_or_pageout_pte_range(): folio_likely_mapped_shared() ones are left."""
    memory = Memory()
    memory.write(span(0, 2))
    memory.fork()
    memory.write(span(1), 2)
    memory.advise(span(0, 2), Advice.PAGEOUT)
    assert memory.swapped(span(0, 2)) == [False, True]


def test_pageout_takes_a_merged_page_that_one_entry_names() -> None:
    """madvise_cold_or_pageout_pte_range() asks for the map count, not whether the page was merged: rmap_walk_ksm()."""
    memory = Memory()
    memory.write(span(0, 3), 7)
    memory.advise(span(0, 3), Advice.MERGEABLE)
    for _ in range(3):
        memory.call(processes.scan_ksm)
    space = memory.machine.processes[memory.pid].space
    assert space.frames.test_flags(cpu_pte.cpu_pfn(space.table.read(START, START + PAGE_SIZE)), PageFlag.KSM).all()
    memory.advise(span(0, 3), Advice.PAGEOUT)
    assert not any(memory.swapped(span(0, 3)))
    memory.write(span(1, 2), 8)
    memory.advise(span(0), Advice.PAGEOUT)
    assert memory.swapped(span(0)) == [True]
    assert memory.read(span(0)) == [7]


def test_call_waits_for_others_that_reclaim_when_they_have_all_pages() -> None:
    """too_many_isolated(): who finds nothing left to take waits for those who took it, and does not fail."""
    world = World(limits=Limits(frames=9, swap_pages=64, device_frames=0))
    world.do(devices.fault, world.mirrors[0], [span(0, 8)], write=True)
    paging = world.start(processes.madvise, world.pid, START, 8 * PAGE_SIZE, Advice.PAGEOUT)
    (delivery,) = world.sent()
    writing = world.start(processes.write_memory, world.pid, span(8).start, b"x")
    assert isinstance(writing.request, Await)
    assert writing.request.wait_for is WaitFor.MEMORY
    assert world.machine.blockers(writing) == [paging.id]
    world.machine.answer(delivery.mirror_id, delivery.sequence)
    world.settle()
    assert writing.result.done == 1
    world.machine.check()


def test_call_from_inside_a_callback_reclaims_nothing_that_this_driver_would_have_to_answer_for() -> None:
    """Its driver answers when the call has ended: there it is ENOMEM, and not a circle."""
    world = World(limits=Limits(frames=9, swap_pages=64, device_frames=0))
    world.do(devices.fault, world.mirrors[0], [span(0, 8)], write=True)
    world.start(processes.munmap, world.pid, span(15).start, PAGE_SIZE)
    (delivery,) = world.sent()
    inside = Caller(callback=(delivery.mirror_id, delivery.sequence))
    writing = world.start(processes.write_memory, world.pid, span(8).start, b"x", caller=inside)
    assert isinstance(writing.error, OutOfFramesError)
    world.machine.answer(delivery.mirror_id, delivery.sequence)
    world.settle()
    assert world.do(processes.write_memory, world.pid, span(8).start, b"x").done == 1


def test_pages_of_a_driver_that_does_not_answer_stay() -> None:
    """Policy FAIL: what was not acknowledged is not unmapped; who needed memory goes on without it, or fails."""
    world = World(policy=DeadlinePolicy.FAIL, limits=Limits(frames=9, swap_pages=64, device_frames=0))
    world.do(devices.fault, world.mirrors[0], [span(0, 8)], write=True)
    writing = world.start(processes.write_memory, world.pid, span(8).start, b"x")
    (delivery,) = world.sent()
    world.machine.abandon(delivery.mirror_id, delivery.sequence)
    world.resume(writing)
    while not writing.done:
        world.machine.expire(writing.id)
    assert isinstance(writing.error, HmmError)
    table = world.machine.processes[world.pid].space.table
    assert all(cpu_pte.is_present(entry) for entry in table.read(span(0).start, span(8).start).tolist())
    world.machine.check()


def test_pages_come_back_from_a_device_when_memory_is_full() -> None:
    """migrate_to_ram() allocates like any fault, and reclaims if it has to."""
    memory = Memory()
    device = memory.call(devices.register_device, "gpu", memory_pages=16)
    mirror = memory.call(hmm.attach, device, memory.pid)
    memory.write(span(0, 16), 4)
    memory.call(hmm.migrate_to_device, mirror, span(0, 16))
    memory.write(span(16, 48))
    assert memory.read(span(0, 16)) == [4] * 16
    memory.call(hmm.migrate_to_device, mirror, span(0, 16))
    memory.write(span(16, 48))
    assert memory.call(hmm.evict_device, device) == 16
    assert memory.read(span(0, 16)) == [4] * 16


def test_huge_page_is_split_when_nothing_else_could_go() -> None:
    """shrink_folio_list() splits a large folio that has no place in swap as one; mirrors are told of both steps."""
    memory = Memory(Limits(frames=1100, swap_pages=600, device_frames=0))
    memory.pid = memory.call(processes.create_process, "huge", thp=Thp.ALWAYS)
    memory.call(processes.mmap, memory.pid, 0x4000_0000, 512 * PAGE_SIZE, RW, FIXED)
    block = AddressRange(0x4000_0000, 0x4000_0000 + 512 * PAGE_SIZE)
    memory.write(block, 7)
    assert memory.entries(AddressRange(block.start, block.start + PAGE_SIZE))[0] & cpu_pte.HUGE
    memory.call(processes.mmap, memory.pid, 0x5000_0000, 590 * PAGE_SIZE, RW, FIXED)
    small = AddressRange(0x5000_0000, 0x5000_0000 + 590 * PAGE_SIZE)
    memory.write(small)
    memory.call(processes.mlock, memory.pid, small.start, small.size_bytes)
    assert not any(memory.swapped(small))
    assert any(memory.swapped(block))
    assert memory.read(block) == [7] * 512


@pytest.mark.parametrize("slots", [512, 511])
def test_pageout_puts_a_huge_page_out(slots: int) -> None:
    """As one, if add_to_swap() finds the slots; else split by shrink_folio_list(): all zero is the zero page then."""
    memory = Memory(Limits(frames=1100, swap_pages=slots, device_frames=0))
    memory.pid = memory.call(processes.create_process, "huge", thp=Thp.ALWAYS)
    memory.call(processes.mmap, memory.pid, 0x4000_0000, 512 * PAGE_SIZE, RW, FIXED)
    block = AddressRange(0x4000_0000, 0x4000_0000 + 512 * PAGE_SIZE)
    memory.write(AddressRange(block.start, block.start + 2 * PAGE_SIZE), 7)
    memory.advise(block, Advice.PAGEOUT)
    assert memory.swapped(block) == [True] * 2 + [slots == 512] * 510
    assert memory.read(block) == [7] * 2 + [0] * 510


@pytest.mark.parametrize("npages", [512, 511])
def test_huge_page_that_was_freed_lazily_goes_without_being_written(npages: int) -> None:
    """madvise_free_huge_pmd() marks a whole one, madvise_free_pte_range() the pages of one that it split."""
    memory = Memory(Limits(frames=1100, swap_pages=600, device_frames=0))
    memory.pid = memory.call(processes.create_process, "huge", thp=Thp.ALWAYS)
    memory.call(processes.mmap, memory.pid, 0x4000_0000, 512 * PAGE_SIZE, RW, FIXED)
    block = AddressRange(0x4000_0000, 0x4000_0000 + 512 * PAGE_SIZE)
    freed = AddressRange(block.start, block.start + npages * PAGE_SIZE)
    memory.write(block, 7)
    memory.advise(freed, Advice.FREE)
    space = memory.machine.process(memory.pid).space
    assert [memory_use(space, vma).lazy_free for vma in space.vmas] == [npages * PAGE_SIZE]
    memory.advise(block, Advice.PAGEOUT)
    assert memory.swap.used == 512 - npages
    assert memory.read(block) == [0] * npages + [7] * (512 - npages)
