"""/proc/PID/smaps: what each mapping costs."""

from __future__ import annotations

import pytest
from machine_world import FIXED, RW, START, span

from hmm import commands_file as files
from hmm import commands_process as processes
from hmm.clear_refs import ClearRefs
from hmm.limits import Limits
from hmm.local import Local
from hmm.machine import Machine
from hmm.madvise import Advice
from hmm.smaps import MemoryUse, memory_use, vm_flag_letters
from hmm.units import PAGE_SIZE, PMD_SIZE
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot

KIB = 1024
SHARED = MapFlag.SHARED | MapFlag.FIXED


class Process:
    """One with sixteen private pages, on a machine with swap."""

    def __init__(self) -> None:
        self.local = Local(Machine(Limits(frames=256, swap_pages=64, device_frames=0)))
        self.pid = self.call(processes.create_process, "p")
        self.call(processes.mmap, self.pid, START, 16 * PAGE_SIZE, RW, FIXED)

    def call(self, command: object, *arguments: object, **options: object) -> int:
        """A call."""
        return self.local.call(command, *arguments, **options)  # type: ignore[arg-type]

    def use(self, first: int = 0, pid: int = 0) -> MemoryUse:
        """Of the mapping of a page."""
        space = self.local.machine.processes[pid or self.pid].space
        vma = space.vmas.find(span(first).start)
        assert vma is not None
        return memory_use(space, vma)

    def write(self, first: int, npages: int, pid: int = 0) -> None:
        """The CPU writes."""
        self.call(processes.write_memory, pid or self.pid, span(first).start, b"x" * npages * PAGE_SIZE)


@pytest.mark.parametrize(("advice", "referenced"), [(None, 2), (Advice.RANDOM, 0), (Advice.SEQUENTIAL, 0)])
def test_use_of_pages_does_not_count_where_it_says_nothing_of_the_next(advice: Advice | None, referenced: int) -> None:
    """zap_present_folio_ptes() marks no page accessed that a VMA without vma_has_recency() used."""
    process = Process()
    file = process.call(files.open_file, "f", create=True)
    process.call(files.write_file, file, 0, bytes(2 * PAGE_SIZE))
    process.call(processes.mmap, process.pid, span(20).start, 2 * PAGE_SIZE, RW, SHARED, file)
    process.call(processes.mmap, process.pid, span(24).start, 2 * PAGE_SIZE, RW, SHARED, file)
    process.call(processes.read_pages, process.pid, span(20, 2), 0)
    process.call(processes.clear_refs, process.pid, ClearRefs.ALL)
    if advice is not None:
        process.call(processes.madvise, process.pid, span(24).start, 2 * PAGE_SIZE, advice)
    process.call(processes.read_pages, process.pid, span(24, 2), 0)
    process.call(processes.madvise, process.pid, span(24).start, PAGE_SIZE, Advice.DONTNEED)
    process.call(processes.munmap, process.pid, span(24).start, 2 * PAGE_SIZE)
    assert process.use(20).referenced == referenced * PAGE_SIZE
    process.local.machine.check()


def test_pages_are_private_until_they_are_shared() -> None:
    """smaps_account(): a page that two map counts half for each, and as shared for both."""
    process = Process()
    process.write(0, 4)
    use = process.use()
    assert (use.rss, use.pss, use.private_dirty, use.anonymous) == (16 * KIB,) * 4
    assert (use.shared_dirty, use.swap, use.locked, use.anon_huge) == (0, 0, 0, 0)
    child = process.call(processes.fork, process.pid)
    process.write(0, 1, child)
    use = process.use()
    assert (use.rss, use.pss, use.pss_dirty) == (16 * KIB, 10 * KIB, 10 * KIB)
    assert (use.private_dirty, use.shared_dirty) == (4 * KIB, 12 * KIB)


def test_zero_page_costs_nothing() -> None:
    """vm_normal_page() knows no zero page."""
    process = Process()
    process.call(processes.touch, process.pid, span(0, 4), write=False)
    assert process.use() == MemoryUse()


def test_pages_in_swap_are_counted_and_divided() -> None:
    """smaps_pte_entry(): swap entries, by swp_swapcount()."""
    process = Process()
    process.write(0, 4)
    process.call(processes.madvise, process.pid, START, 2 * PAGE_SIZE, Advice.PAGEOUT)
    use = process.use()
    assert (use.rss, use.swap, use.swap_pss) == (8 * KIB, 8 * KIB, 8 * KIB)
    process.call(processes.fork, process.pid)
    assert (process.use().swap, process.use().swap_pss) == (8 * KIB, 4 * KIB)


def test_pages_of_files_in_swap_are_counted_where_they_are_mapped() -> None:
    """shmem_swap_usage(): what the cache has in swap, although no entry says so."""
    process = Process()
    file = process.call(files.open_file, "f", create=True)
    process.call(files.write_file, file, 0, b"y" * 4 * PAGE_SIZE)
    shared = MapFlag.SHARED | MapFlag.FIXED
    process.call(processes.mmap, process.pid, span(32).start, 4 * PAGE_SIZE, RW, shared, file)
    process.call(processes.touch, process.pid, span(32, 4), write=False)
    assert (process.use(32).rss, process.use(32).anonymous) == (16 * KIB, 0)
    process.call(processes.madvise, process.pid, span(32).start, 4 * PAGE_SIZE, Advice.PAGEOUT)
    assert (process.use(32).rss, process.use(32).swap) == (0, 16 * KIB)


def test_locked_and_lazily_freed_pages_are_told_apart() -> None:
    """Locked is the pss of a VM_LOCKED mapping; LazyFree is what is clean and not backed by swap."""
    process = Process()
    process.write(0, 4)
    process.call(processes.madvise, process.pid, START, 2 * PAGE_SIZE, Advice.FREE)
    assert (process.use().lazy_free, process.use().private_clean) == (8 * KIB, 8 * KIB)
    process.call(processes.mlock, process.pid, START, 16 * PAGE_SIZE)
    assert process.use().locked == 64 * KIB


def test_populated_pages_count_as_used_in_the_child_too() -> None:
    """get_user_pages() with FOLL_TOUCH marks the frame: folio_mark_accessed(); a touch leaves it at the entry."""
    process = Process()
    process.write(0, 2)
    process.call(processes.madvise, process.pid, span(2).start, 2 * PAGE_SIZE, Advice.POPULATE_WRITE)
    assert process.use().referenced == 16 * KIB
    child = process.call(processes.fork, process.pid)
    assert process.use(pid=child).referenced == 8 * KIB


def test_populate_leaves_the_entry_when_the_page_is_there() -> None:
    """follow_page_pte(): the frame is marked; the second time it becomes active, and is not referenced any more."""
    process = Process()
    process.write(0, 4)
    shown = []
    for advice in (0, Advice.POPULATE_READ, Advice.POPULATE_READ, Advice.POPULATE_WRITE):
        if advice:
            process.call(processes.madvise, process.pid, START, 4 * PAGE_SIZE, advice)
        else:
            process.call(processes.clear_refs, process.pid, ClearRefs.ALL)
        shown.append(process.use().referenced)
    assert shown == [0, 16 * KIB, 0, 16 * KIB]


def test_page_that_somebody_wrote_is_dirty_for_all_who_map_it() -> None:
    """fault_dirty_shared_page(): the page itself is dirty, also where an entry is clean."""
    process = Process()
    flags = MapFlag.SHARED | MapFlag.ANONYMOUS | MapFlag.FIXED
    process.call(processes.mmap, process.pid, span(32).start, 2 * PAGE_SIZE, RW, flags)
    process.write(32, 1)
    child = process.call(processes.fork, process.pid)
    process.call(processes.read_pages, child, span(32, 2), 0)
    assert (process.use(32, child).shared_dirty, process.use(32, child).private_clean) == (4 * KIB, 4 * KIB)


def test_locked_pages_do_not_become_active() -> None:
    """folio_mark_accessed() has no effect on what is on no list: folio_test_unevictable()."""
    process = Process()
    process.call(processes.madvise, process.pid, START, 2 * PAGE_SIZE, Advice.POPULATE_WRITE)
    process.call(processes.mlock, process.pid, START, 4 * PAGE_SIZE)
    child = process.call(processes.fork, process.pid)
    assert process.use(pid=child).referenced == 16 * KIB


def test_flags_have_the_kernels_letters() -> None:
    """show_smap_vma_flags()."""
    process = Process()
    process.write(0, 1)
    process.call(processes.mprotect, process.pid, START, 16 * PAGE_SIZE, Prot.READ)
    space = process.local.machine.processes[process.pid].space
    vma = space.vmas.find(START)
    assert vma is not None
    assert vm_flag_letters(space, vma) == "rd mr mw me ac sd"


def test_page_of_a_file_is_dirty_when_the_file_was_written() -> None:
    """mm/shmem.c, shmem_write_end(), shmem_undo_range(): written, or zeroed in part; a hole that is read is clean."""
    process = Process()
    number = process.call(files.open_file, "f", create=True)
    process.call(files.write_file, number, 0, b"x" * PAGE_SIZE)
    process.call(files.truncate_file, number, 3 * PAGE_SIZE)
    process.call(processes.mmap, process.pid, START, 3 * PAGE_SIZE, RW, MapFlag.PRIVATE | MapFlag.FIXED, number)
    process.call(processes.read_memory, process.pid, START, 3 * PAGE_SIZE)
    assert (process.use().private_dirty, process.use().private_clean) == (4 * KIB, 8 * KIB)
    process.call(files.punch_file, number, PAGE_SIZE, 100)
    assert (process.use().private_dirty, process.use().private_clean) == (8 * KIB, 4 * KIB)


def test_hugetlb_pages_count_apart() -> None:
    """smaps_hugetlb_range(): in Shared_Hugetlb or Private_Hugetlb, and nowhere else."""
    local = Local(Machine(Limits(frames=2048, device_frames=0, hugetlb_pages=2)))
    pid = local.call(processes.create_process, "p")
    flags = FIXED | MapFlag.HUGETLB
    local.call(processes.mmap, pid, START, 2 * PMD_SIZE, RW, flags)
    local.call(processes.touch, pid, span(0), write=True)
    vma = next(iter(local.machine.processes[pid].space.vmas))
    assert memory_use(local.machine.processes[pid].space, vma) == MemoryUse(private_hugetlb=PMD_SIZE)
    local.call(processes.fork, pid)
    assert memory_use(local.machine.processes[pid].space, vma) == MemoryUse(shared_hugetlb=PMD_SIZE)


def test_page_that_comes_back_from_swap_is_clean_until_it_is_written() -> None:
    """do_swap_page(), should_try_to_free_swap(): only a write fault lets folio_free_swap() mark the page dirty."""
    process = Process()
    process.write(0, 2)
    process.call(processes.madvise, process.pid, START, 2 * PAGE_SIZE, Advice.PAGEOUT)
    assert process.use().swap == 8 * KIB
    process.call(processes.read_memory, process.pid, START, 1)
    process.call(processes.write_memory, process.pid, START + PAGE_SIZE, b"x")
    assert (process.use().private_clean, process.use().private_dirty) == (4 * KIB, 4 * KIB)


def test_page_that_lost_its_contents_may_be_shared() -> None:
    """smaps_account(): of entries that are not present nobody says how often; those of devices' memory are."""
    local = Local(Machine(Limits(frames=256, device_frames=0), capable=True))
    pid = local.call(processes.create_process, "p")
    local.call(processes.mmap, pid, START, 16 * PAGE_SIZE, RW, FIXED)
    local.call(processes.write_memory, pid, START, b"x" * 2 * PAGE_SIZE)
    local.call(processes.madvise, pid, START, PAGE_SIZE, Advice.HWPOISON)
    space = local.machine.processes[pid].space
    use = memory_use(space, next(iter(space.vmas)))
    assert (use.rss, use.pss) == (8 * KIB, 8 * KIB)
    assert (use.shared_clean + use.shared_dirty, use.private_dirty) == (4 * KIB, 4 * KIB)


def test_page_of_a_file_counts_as_used_when_the_file_was_or_somebody_unmapped_it() -> None:
    """folio_mark_accessed() in shmem_get_folio_gfp() for a write, shmem_file_read_iter(), zap_present_folio_ptes()."""
    process = Process()
    number = process.call(files.open_file, "f", create=True)
    process.call(files.truncate_file, number, 3 * PAGE_SIZE)
    shared = MapFlag.SHARED | MapFlag.FIXED
    process.call(processes.mmap, process.pid, START, 3 * PAGE_SIZE, RW, shared, number)
    child = process.call(processes.fork, process.pid)

    def used_after(command: object, *arguments: object) -> int:
        process.call(processes.touch, process.pid, span(0, 3), write=False)
        process.call(processes.clear_refs, process.pid, ClearRefs.ALL)
        process.call(command, *arguments)
        return process.use().referenced

    assert used_after(files.write_file, number, 0, b"x") == 4 * KIB
    assert used_after(files.read_file, number, 0, PAGE_SIZE + 1) == 8 * KIB
    assert used_after(files.read_file, number, 1, PAGE_SIZE - 1) == 0
    process.call(processes.touch, child, span(0, 2), write=False)
    assert used_after(processes.exit_process, child) == 8 * KIB
