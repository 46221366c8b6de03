"""Writes to /proc/PID/clear_refs, and what /proc/PID/pagemap says afterwards."""

from __future__ import annotations

from typing import Any

import pytest
from machine_world import FIXED, RW, START, World, span

from hmm import commands_device as devices
from hmm import commands_hmm as hmm
from hmm import commands_process as processes
from hmm import cpu_pte, pagemap
from hmm.address_space import Thp
from hmm.clear_refs import ClearRefs
from hmm.errors import AccessDeniedError, InvalidRequestError
from hmm.events import EventType, Reason
from hmm.limits import Limits
from hmm.madvise import Advice
from hmm.mremap import MremapFlag
from hmm.units import PAGE_SIZE, PMD_PAGES, PMD_SIZE
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot, VmFlag


def written(world: World, npages: int, first: int = 0, pid: int = 0) -> str:
    """For each page, whether /proc/PID/pagemap says that it was written."""
    words = world.do(processes.pagemap, pid or world.pid, span(first, npages)).tolist()
    return "".join("w" if word & pagemap.SOFT_DIRTY else "-" for word in words)


def forget(world: World, what: int = ClearRefs.SOFT_DIRTY) -> None:
    """The write to clear_refs."""
    world.do(processes.clear_refs, world.pid, what)
    world.machine.check()


def store(world: World, first: int, npages: int = 1) -> None:
    """The CPU writes."""
    world.do(processes.write_memory, world.pid, span(first).start, b"x" * npages * PAGE_SIZE)


def test_pages_count_as_written_when_they_were_written_since() -> None:
    """clear_soft_dirty() takes the bit and the permission; the next write faults and sets the bit."""
    world = World()
    store(world, 0, 4)
    assert written(world, 6) == "wwwwww"  # of a new mapping all pages are: VM_SOFTDIRTY
    forget(world)
    assert written(world, 6) == "------"
    world.do(processes.read_memory, world.pid, span(2).start, 1)
    store(world, 1)
    store(world, 5)
    assert written(world, 6) == "-w---w"


def test_new_mappings_count_as_written() -> None:
    """mmap_region() sets VM_SOFTDIRTY, so that who looks does not miss what was mapped over."""
    world = World()
    forget(world)
    world.do(processes.mmap, world.pid, span(4).start, 2 * PAGE_SIZE, RW, FIXED)
    assert "w" in written(world, 16)
    assert written(world, 2, first=4) == "ww"


def soft_dirty(world: World, npages: int) -> list[tuple[int, int, bool]]:
    """The VMAs of the window in pages, and whether they have VM_SOFTDIRTY ("sd" in VmFlags of smaps)."""
    vmas = world.machine.processes[world.pid].space.vmas.overlapping(span(0, npages))
    return [
        ((vma.start - START) // PAGE_SIZE, (vma.end - START) // PAGE_SIZE, vma.has(VmFlag.SOFTDIRTY)) for vma in vmas
    ]


def sparse_world(*places: int) -> World:
    """Two clean pages at 0, and two that were mapped since at each of the given places."""
    world = World()
    world.do(processes.munmap, world.pid, START, 16 * PAGE_SIZE)
    world.do(processes.mmap, world.pid, START, 2 * PAGE_SIZE, RW, FIXED)
    forget(world)
    for place in places:
        world.do(processes.mmap, world.pid, span(place).start, 2 * PAGE_SIZE, RW, FIXED)
    return world


def test_mprotect_gives_what_it_merges_with_the_flags_of_the_changed_part() -> None:
    """mprotect_fixup() resets the flags of the merged VMA to those of the part, VM_SOFTDIRTY with them."""
    world = sparse_world()
    world.do(processes.mmap, world.pid, span(2).start, 2 * PAGE_SIZE, Prot.READ, FIXED)
    assert soft_dirty(world, 4) == [(0, 2, False), (2, 4, True)]
    world.do(processes.mprotect, world.pid, START, 2 * PAGE_SIZE, Prot.READ)
    assert soft_dirty(world, 4) == [(0, 4, False)]
    world.machine.check()


def test_mprotect_makes_a_neighbour_soft_dirty_when_the_changed_part_is() -> None:
    """The same the other way round: madvise_update_vma(), mlock_fixup() and mprotect_fixup() are alike."""
    world = sparse_world()
    world.do(processes.mmap, world.pid, span(2).start, 2 * PAGE_SIZE, Prot.READ, FIXED)
    world.do(processes.mprotect, world.pid, span(2).start, 2 * PAGE_SIZE, RW)
    assert soft_dirty(world, 4) == [(0, 4, True)]


def test_mremap_leaves_the_flags_of_the_vma_that_takes_in_what_moved() -> None:
    """copy_vma() merges by vma_merge_new_range(), which sets no flags: what moved is not soft-dirty any more."""
    world = sparse_world(4)
    move = MremapFlag.MAYMOVE | MremapFlag.FIXED
    world.do(processes.mremap, world.pid, span(4).start, 2 * PAGE_SIZE, 2 * PAGE_SIZE, move, span(2).start)
    assert soft_dirty(world, 6) == [(0, 4, False)]
    upwards = sparse_world(6)
    upwards.do(processes.mremap, upwards.pid, START, 2 * PAGE_SIZE, 2 * PAGE_SIZE, move, span(4).start)
    assert soft_dirty(upwards, 8) == [(4, 8, True)]


def test_mremap_that_grows_a_vma_up_to_the_next_one_leaves_its_flags() -> None:
    """vma_merge_extend() sets no flags either: the VMA above has those of the one that grew."""
    world = sparse_world(4)
    world.do(processes.mremap, world.pid, START, 2 * PAGE_SIZE, 4 * PAGE_SIZE, 0)
    assert soft_dirty(world, 6) == [(0, 6, False)]


def test_mirrors_of_both_kinds_hear_of_the_whole_space() -> None:
    """clear_refs_write() sends SOFT_DIRTY over everything; the notifier of 2015 had WRITE_PROTECT for it."""
    world = World()
    world.do(devices.fault, world.mirrors[0], [span(0, 2)], write=True)
    clearing = world.start(processes.clear_refs, world.pid, ClearRefs.SOFT_DIRTY)
    (delivery,) = world.sent()
    assert (delivery.event.etype, delivery.event.reason) == (EventType.WRITE_PROTECT, Reason.SOFT_DIRTY)
    assert cpu_pte.is_writable(world.machine.processes[world.pid].space.table.get(START))
    world.machine.answer(delivery.mirror_id, delivery.sequence)
    world.settle()
    assert clearing.done
    world.machine.check()
    world.do(devices.fault, world.mirrors[0], [span(1)], write=True)
    assert written(world, 2) == "-w"


def test_mprotect_leaves_pages_read_only_that_are_watched() -> None:
    """can_change_pte_writable(): pte_needs_soft_dirty_wp() keeps the fault that would set the bit."""
    world = World()
    store(world, 0, 2)
    forget(world)
    for prot in (Prot.READ, RW):
        world.do(processes.mprotect, world.pid, START, 2 * PAGE_SIZE, prot)
    store(world, 1)
    assert written(world, 2) == "-w"


def test_mprotect_leaves_shared_pages_read_only_that_are_watched_and_clean() -> None:
    """can_change_pte_writable() of a VM_SHARED mapping is pte_dirty(), though mremap has made the entry soft-dirty."""
    world = World()
    forget(world)
    flags = MapFlag.SHARED | FIXED & ~MapFlag.PRIVATE
    world.do(processes.mmap, world.pid, span(4).start, 2 * PAGE_SIZE, RW, flags)
    forget(world)
    world.do(processes.read_memory, world.pid, span(4).start, 1)
    store(world, 5)
    move = MremapFlag.MAYMOVE | MremapFlag.FIXED
    world.do(processes.mremap, world.pid, span(4).start, 2 * PAGE_SIZE, 2 * PAGE_SIZE, move, span(20).start)
    for prot in (Prot.READ, RW):
        world.do(processes.mprotect, world.pid, span(20).start, 2 * PAGE_SIZE, prot)
    entries = [world.machine.processes[world.pid].space.table.get(span(page).start) for page in (20, 21)]
    assert [cpu_pte.is_writable(entry) for entry in entries] == [False, True]


def test_child_watches_as_its_parent_does() -> None:
    """fork copies flags of mappings and bits of entries."""
    world = World()
    store(world, 0, 2)
    forget(world)
    store(world, 0)
    child = world.do(processes.fork, world.pid)
    assert written(world, 2, pid=child) == "w-"


def test_pinned_pages_are_left_alone() -> None:
    """pte_is_pinned(): DMA writes them without a fault, so that the bit would lie."""
    world = World()
    store(world, 0, 2)
    world.do(processes.pin, world.pid, span(0), write=True)
    forget(world)
    assert written(world, 2) == "w-"


def test_pinned_pages_are_watched_when_they_are_read_only_or_shared() -> None:
    """pte_is_pinned() is false without pte_write(), and outside of is_cow_mapping()."""
    world = World()
    store(world, 0)
    world.do(processes.mmap, world.pid, span(1).start, PAGE_SIZE, RW, MapFlag.SHARED | FIXED & ~MapFlag.PRIVATE)
    store(world, 1)
    for page in range(2):
        world.do(processes.pin, world.pid, span(page), write=True)
    world.do(processes.mprotect, world.pid, span(0).start, PAGE_SIZE, Prot.READ)
    forget(world)
    assert written(world, 2) == "--"
    assert not cpu_pte.is_writable(world.machine.processes[world.pid].space.table.get(span(1).start))


def test_pinned_huge_pages_are_watched() -> None:
    """clear_soft_dirty_pmd() does not ask for pins."""
    world = World(limits=Limits(frames=8 * PMD_PAGES))
    world.machine.processes[world.pid].space.thp = Thp.ALWAYS
    first = 2 * PMD_PAGES
    world.do(processes.mmap, world.pid, span(first).start, PMD_SIZE, RW, FIXED)
    store(world, first)
    world.do(processes.pin, world.pid, span(first), write=True)
    assert cpu_pte.is_huge(world.machine.processes[world.pid].space.table.get(span(first).start))
    forget(world)
    assert written(world, PMD_PAGES, first=first) == "-" * PMD_PAGES


@pytest.mark.parametrize(("what", "left"), [(ClearRefs.ALL, 0), (ClearRefs.ANON, 0), (ClearRefs.MAPPED, 1)])
def test_uses_are_forgotten_of_the_mappings_that_were_meant(what: int, left: int) -> None:
    """clear_refs_pte_range() clears the accessed bits; nobody hears of it."""
    world = World()
    store(world, 0)
    before = world.machine.mirrors[world.mirrors[0]].sequence
    forget(world, what)
    entry = world.machine.processes[world.pid].space.table.get(START)
    assert bool(entry & cpu_pte.ACCESSED) == bool(left)
    assert world.machine.mirrors[world.mirrors[0]].sequence == before


def test_other_numbers_are_refused() -> None:
    """clear_refs_write(): EINVAL."""
    with pytest.raises(InvalidRequestError):
        forget(World(), 6)


def move(world: World, first: int, npages: int, to: int) -> None:
    """mremap() to another place, both counted in pages of the window."""
    flags = MremapFlag.MAYMOVE | MremapFlag.FIXED
    length = npages * PAGE_SIZE
    world.do(processes.mremap, world.pid, span(first).start, length, length, flags, span(to).start)
    world.machine.check()


def test_pages_that_were_moved_count_as_written() -> None:
    """move_ptes(), move_soft_dirty_pte(): so that who looks finds them at their new address."""
    world = World()
    store(world, 0, 4)
    forget(world)
    store(world, 1)
    move(world, 0, 8, 64)
    assert written(world, 8, first=64) == "wwww----"
    store(world, 65)


@pytest.mark.parametrize("npages", [PMD_PAGES, PMD_PAGES + 1])
def test_pages_that_move_with_their_page_table_stay_as_they_were(npages: int) -> None:
    """move_normal_pmd() moves the table and looks at no entry; what lies behind it is moved page by page."""
    first, to = 2 * PMD_PAGES, 8 * PMD_PAGES
    world = World(limits=Limits(frames=2048, device_frames=0))
    world.do(processes.mmap, world.pid, span(first).start, npages * PAGE_SIZE, RW, FIXED)
    store(world, first, npages)
    forget(world)
    store(world, first + 3)
    move(world, first, npages, to)
    assert written(world, 5, first=to) == "---w-"
    assert written(world, npages - PMD_PAGES, first=to + PMD_PAGES) == "w" * (npages - PMD_PAGES)


def test_huge_page_that_was_moved_counts_as_written() -> None:
    """move_huge_pmd(): move_soft_dirty_pmd()."""
    first, to = 2 * PMD_PAGES, 8 * PMD_PAGES
    world = World(limits=Limits(frames=2048, device_frames=0))
    world.machine.processes[world.pid].space.thp = Thp.ALWAYS
    world.do(processes.mmap, world.pid, span(first).start, PMD_SIZE, RW, FIXED)
    store(world, first)
    forget(world)
    move(world, first, PMD_PAGES, to)
    assert written(world, PMD_PAGES, first=to) == "w" * PMD_PAGES


def test_hugetlb_pages_are_not_watched() -> None:
    """clear_refs_walk_ops has no hugetlb_entry, and pagemap_hugetlb_range() shows VM_SOFTDIRTY alone."""
    world = World(limits=Limits(frames=2048, device_frames=0, hugetlb_pages=1))
    first = 2 * PMD_PAGES
    flags = FIXED | MapFlag.HUGETLB
    world.do(processes.mmap, world.pid, span(first).start, PMD_SIZE, RW, flags)
    store(world, first)
    before = world.machine.processes[world.pid].space.table.get(span(first).start)
    forget(world)
    assert world.machine.processes[world.pid].space.table.get(span(first).start) == before
    store(world, first)
    assert written(world, 2, first=first) == "--"


HUGE_PAGE = 2 * PMD_PAGES
"""Where the huge page of `world_with_huge_page` is."""


def world_with_huge_page(*, write: bool) -> World:
    """A process that got a huge page by a touch, and then forgot what was written."""
    world = World(limits=Limits(frames=2048, device_frames=0))
    world.machine.processes[world.pid].space.thp = Thp.ALWAYS
    world.do(processes.mmap, world.pid, span(HUGE_PAGE).start, PMD_SIZE, RW, FIXED)
    world.do(processes.touch, world.pid, span(HUGE_PAGE), write=write)
    forget(world)
    return world


def test_huge_page_that_is_mapped_by_pages_counts_as_written_when_it_ever_was() -> None:
    """__split_huge_pmd_locked(): pte_mkdirty() sets the soft-dirty bit on x86, which the huge entry had lost."""
    world = world_with_huge_page(write=True)
    assert written(world, 4, first=HUGE_PAGE) == "----"
    world.do(processes.munmap, world.pid, span(HUGE_PAGE + 3).start, PAGE_SIZE)
    assert written(world, 4, first=HUGE_PAGE) == "www-"


def test_huge_zero_page_that_is_mapped_by_pages_does_not_count_as_written() -> None:
    """__split_huge_zero_page_pmd() makes plain entries of the zero page."""
    world = world_with_huge_page(write=False)
    world.do(processes.munmap, world.pid, span(HUGE_PAGE + 3).start, PAGE_SIZE)
    assert written(world, 4, first=HUGE_PAGE) == "----"


def test_zero_page_counts_as_written_when_the_huge_page_did() -> None:
    """try_to_map_unused_to_zeropage(): what takes the place of an all-zero page of a split folio keeps the bit."""
    world = world_with_huge_page(write=True)
    store(world, HUGE_PAGE)
    world.do(processes.madvise, world.pid, span(HUGE_PAGE + 1).start, PAGE_SIZE, Advice.FREE)
    assert written(world, 4, first=HUGE_PAGE) == "wwww"
    space = world.machine.processes[world.pid].space
    assert space.table.get(span(HUGE_PAGE + 2).start) & cpu_pte.SPECIAL


@pytest.mark.parametrize("around", [1, 16])
def test_device_that_read_watched_shared_memory_faults_again_to_write(around: int) -> None:
    """vma_wants_writenotify(), vma_soft_dirty_enabled(): a read fault leaves the entry read-only, whoever faults."""
    world = World()
    world.machine.processes[world.pid].space.fault_around_pages = around
    flags = MapFlag.SHARED | MapFlag.ANONYMOUS | MapFlag.FIXED
    world.do(processes.mmap, world.pid, span(32).start, 4 * PAGE_SIZE, RW, flags)
    store(world, 32, 4)
    forget(world)
    world.do(processes.madvise, world.pid, span(32).start, 4 * PAGE_SIZE, Advice.DONTNEED)
    world.do(devices.fault, world.mirrors[0], [span(32, 4)], write=False)
    with pytest.raises(AccessDeniedError):
        world.do(devices.device_write, world.mirrors[0], [(span(33).start, 1)], b"d")
    world.do(devices.fault, world.mirrors[0], [span(33)], write=True)
    assert written(world, 4, first=32) == "-w--"


def test_page_counts_as_written_when_a_device_gives_it_back() -> None:
    """restore_exclusive_pte(): pte_mkdirty(), as nobody knows what the device did."""
    world = World()
    store(world, 0, 2)
    mirror = world.do(hmm.attach, world.devices[0], world.pid)
    world.do(hmm.make_exclusive, mirror, span(0, 2))
    forget(world)
    assert written(world, 2) == "--"
    world.do(processes.read_memory, world.pid, START, 1)
    assert written(world, 2) == "w-"
    world.do(processes.fork, world.pid)
    assert written(world, 2) == "ww"


@pytest.mark.parametrize("touched", [False, True])
def test_write_of_a_page_that_a_device_had_is_missed(touched: bool) -> None:
    """clear_soft_dirty() leaves its entry writable: no fault says what is written, and _PAGE_DIRTY is another bit."""
    world = World(limits=Limits(frames=256, device_frames=4))
    mirror = world.do(hmm.attach, world.do(devices.register_device, "card", memory_pages=4), world.pid)
    store(world, 0, 2)
    world.do(hmm.migrate_to_device, mirror, span(0))
    forget(world)
    if touched:
        world.do(processes.read_memory, world.pid, START, 1)
    store(world, 0, 2)
    assert written(world, 2) == "-w"
    world.do(processes.mprotect, world.pid, START, 2 * PAGE_SIZE, Prot.READ)
    world.do(processes.mprotect, world.pid, START, 2 * PAGE_SIZE, RW)
    store(world, 0)  # now the processor faults
    assert written(world, 2) == "ww"


@pytest.mark.parametrize("protects", [processes.mprotect, processes.fork])
def test_page_of_a_device_counts_as_written_no_longer_when_it_is_write_protected(protects: Any) -> None:
    """make_readable_device_private_entry(): "We do not preserve soft-dirtiness"; a page of the system's keeps it."""
    world = World(limits=Limits(frames=256, device_frames=4))
    device = world.do(devices.register_device, "card", memory_pages=4)
    mirror = world.do(hmm.attach, device, world.pid)
    forget(world)
    store(world, 0, 3)
    world.do(hmm.migrate_to_device, mirror, span(0, 2))
    assert written(world, 3) == "www"
    world.do(protects, world.pid, *((START, 3 * PAGE_SIZE, Prot.READ) if protects is processes.mprotect else ()))
    assert written(world, 3) == "--w"


@pytest.mark.parametrize("distance", [PMD_SIZE, 1 << 30])
def test_pages_that_are_moved_without_their_page_table_count_as_written(distance: int) -> None:
    """move_page_tables(): parts of a block go entry by entry, however far they go: move_soft_dirty_pte()."""
    world = World()
    store(world, 0, 4)
    forget(world)
    flags = MremapFlag.MAYMOVE | MremapFlag.FIXED
    world.do(
        processes.mremap, world.pid, span(1).start, 2 * PAGE_SIZE, 2 * PAGE_SIZE, flags, START + PAGE_SIZE + distance
    )
    assert written(world, 2, first=1 + distance // PAGE_SIZE) == "ww"
    assert written(world, 1, first=3) == "-"
