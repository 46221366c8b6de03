"""Page merging: which pages become one, who hears of it, and what ends it."""

from __future__ import annotations

import numpy as np
import pytest
from machine_world import FIXED, RW, START, World, error_of, span

from hmm import commands_device as devices
from hmm import commands_hmm as hmm
from hmm import commands_process as processes
from hmm import cpu_pte
from hmm.address_space import Thp
from hmm.errors import InvalidRequestError
from hmm.events import EventType, Reason
from hmm.frames import PageFlag
from hmm.ksm import MAX_PAGE_SHARING, KsmPass
from hmm.limits import Limits
from hmm.madvise import Advice
from hmm.mirror import DeadlinePolicy
from hmm.mremap import MremapFlag
from hmm.smaps import memory_use
from hmm.units import PAGE_SIZE, PMD_PAGES, PMD_SIZE, AddressRange
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot, VmFlag


def write(world: World, first: int, text: str, pid: int = 0) -> None:
    """Fill one page after the other with a letter each."""
    data = b"".join(letter.encode() * PAGE_SIZE for letter in text)
    world.do(processes.write_memory, pid or world.pid, span(first).start, data)


def read(world: World, first: int, npages: int, pid: int = 0) -> str:
    """The first byte of each page."""
    found: bytes = world.do(processes.read_pages, pid or world.pid, span(first, npages), 0).data
    return found.decode()


def advise(world: World, where: AddressRange, advice: Advice, pid: int = 0) -> None:
    """madvise()."""
    world.do(processes.madvise, pid or world.pid, where.start, where.size_bytes, advice)


def scan(world: World, passes: int = 2) -> KsmPass:
    """Passes of the scanner; the machine's invariants hold."""
    done: KsmPass = world.do(processes.scan_ksm, passes)
    world.machine.check()
    return done


def frames(world: World, first: int, npages: int, pid: int = 0) -> list[int]:
    """The frame of each page."""
    table = world.machine.processes[pid or world.pid].space.table
    found: list[int] = cpu_pte.cpu_pfn(table.read(span(first, npages).start, span(first, npages).end)).tolist()
    return found


def entry(world: World, page: int, pid: int = 0) -> int:
    """The CPU's."""
    found: int = world.machine.processes[pid or world.pid].space.table.get(span(page).start)
    return found


@pytest.fixture
def world() -> World:
    """A process with sixteen pages that may be merged, mirrored."""
    world = World(limits=Limits(frames=1024, device_frames=64))
    advise(world, span(0, 16), Advice.MERGEABLE)
    return world


def test_equal_pages_become_one_that_nobody_may_write(world: World) -> None:
    """cmp_and_merge_page(): of two equal pages the one met later is kept, read-only; others name it."""
    write(world, 0, "abcab")
    before = frames(world, 0, 5)
    assert scan(world) == KsmPass(scanned=5, merged=4, shared=2, sharing=2, unshared=1, volatile=0)
    assert frames(world, 0, 5) == [before[3], before[4], before[2], before[3], before[4]]
    assert [cpu_pte.is_writable(entry(world, page)) for page in range(5)] == [False, False, True, False, False]
    assert read(world, 0, 5) == "abcab"
    assert world.machine.frames.regions[0].used == 3


def test_merged_page_counts_as_used_once_more(world: World) -> None:
    """try_to_merge_one_page() calls mark_page_accessed(): a page that was referenced before becomes active."""
    write(world, 0, "aa")
    (kept,) = frames(world, 1, 1)
    world.machine.frames.set_flags_one(kept, PageFlag.REFERENCED)
    scan(world)
    assert frames(world, 0, 2) == [kept, kept]
    active = world.machine.frames.test_flags(np.array([kept]), PageFlag.ACTIVE)
    assert active.all()


def test_pages_are_merged_when_they_stayed_as_they_were_for_a_pass(world: World) -> None:
    """cmp_and_merge_page() only notes the checksum of a page that has changed: it would change again."""
    write(world, 0, "aaaa")
    assert scan(world, 1).merged == 0
    write(world, 3, "b")
    assert scan(world, 1) == KsmPass(scanned=4, merged=3, shared=1, sharing=2, unshared=0, volatile=1)
    write(world, 3, "a")
    assert scan(world, 1).merged == 0
    assert scan(world, 1).merged == 1
    assert len(set(frames(world, 0, 4))) == 1


def test_write_copies_even_when_nobody_else_has_the_page(world: World) -> None:
    """wp_can_reuse_anon_folio() refuses folio_test_ksm(); mirrors hear CLEAR of the page."""
    write(world, 0, "aa")
    scan(world)
    (merged,) = set(frames(world, 0, 2))
    write(world, 0, "b")
    assert world.machine.frames.mapcount[merged] == 1
    write(world, 1, "c")
    assert merged not in frames(world, 0, 2)
    assert read(world, 0, 2) == "bc"
    assert not world.machine.frames.refcount[merged]
    assert scan(world).shared == 0


def test_pages_of_processes_that_are_not_related_are_merged(world: World) -> None:
    """One list of all processes that asked: pages of zeroes too, mapped shared or not at all they are left."""
    other = world.do(processes.create_process, "other")
    world.do(processes.mmap, other, START, 4 * PAGE_SIZE, RW, FIXED)
    shared = MapFlag.SHARED | MapFlag.ANONYMOUS | MapFlag.FIXED
    world.do(processes.mmap, other, span(8).start, 2 * PAGE_SIZE, RW, shared)
    advise(world, span(0, 4), Advice.MERGEABLE, other)
    advise(world, span(8, 2), Advice.MERGEABLE, other)
    write(world, 0, "ab")
    write(world, 0, "ba\0", other)
    write(world, 8, "ab", other)
    assert scan(world).merged == 4
    assert frames(world, 0, 2) == frames(world, 0, 2, other)[::-1]
    assert read(world, 0, 3, other) == "ba\0"
    world.do(processes.exit_process, other)
    world.machine.check()
    assert read(world, 0, 2) == "ab"


def test_mirrors_are_told_before_pages_are_merged(world: World) -> None:
    """write_protect_page() and replace_page(): CLEAR of every page; what a device wrote meanwhile keeps it apart."""
    write(world, 0, "xax")
    world.do(devices.fault, world.mirrors[0], [span(0, 3)], write=True)
    scan(world, 1)
    record = world.start(processes.scan_ksm)
    (delivery,) = world.sent()
    assert (delivery.event.etype, delivery.event.reason) == (EventType.MIGRATE, Reason.CLEAR)
    assert delivery.event.spans == (span(0), span(2))
    assert cpu_pte.is_writable(entry(world, 0))
    world.machine.answer(delivery.mirror_id, delivery.sequence)
    world.settle()
    assert record.result.merged == 2
    world.machine.check()
    world.do(devices.fault, world.mirrors[0], [span(0, 3)], write=False)
    assert world.do(devices.device_read, world.mirrors[0], [(span(2).start, 1)]) == b"x"


def test_pages_stay_apart_when_one_was_written_before_mirrors_had_answered(world: World) -> None:
    """pages_identical() is asked when the page is protected."""
    write(world, 0, "xax")
    world.do(devices.fault, world.mirrors[0], [span(0)], write=True)
    scan(world, 1)
    record = world.start(processes.scan_ksm)
    (delivery,) = world.sent()
    world.do(devices.device_write, world.mirrors[0], [(START, 1)], b"y")
    world.machine.answer(delivery.mirror_id, delivery.sequence)
    world.settle()
    assert record.result.merged == 0
    assert read(world, 0, 3) == "yax"
    world.machine.check()


def test_pages_of_a_driver_that_does_not_answer_stay() -> None:
    """A policy that fails calls fails no pass: its process is left out."""
    world = World(policy=DeadlinePolicy.FAIL)
    advise(world, span(0, 16), Advice.MERGEABLE)
    write(world, 0, "aa")
    scan(world, 1)
    record = world.start(processes.scan_ksm)
    (delivery,) = world.sent()
    world.machine.abandon(delivery.mirror_id, delivery.sequence)
    world.settle()
    assert record.result.merged == 0
    assert len(set(frames(world, 0, 2))) == 2


def test_pages_that_others_refer_to_are_left(world: World) -> None:
    """write_protect_page(): a count beyond the entries means DMA; pages of a device are none of ours."""
    device = world.do(devices.register_device, "card", memory_pages=16)
    mirror = world.do(hmm.attach, device, world.pid)
    write(world, 0, "aaaa")
    world.do(processes.pin, world.pid, span(0), write=True)
    world.do(hmm.migrate_to_device, mirror, span(1))
    world.do(hmm.make_exclusive, mirror, span(2))
    assert scan(world).merged == 0
    read(world, 0, 4)
    assert scan(world).merged == 3
    pinned = frames(world, 0, 1)[0]
    assert not world.machine.frames.test_flags(np.array([pinned]), PageFlag.KSM).any()


def test_pinning_a_merged_page_copies_it_first(world: World) -> None:
    """gup_must_unshare(): who reads by DMA must have the page that its process keeps."""
    write(world, 0, "aa")
    scan(world)
    (merged,) = set(frames(world, 0, 2))
    world.do(processes.pin, world.pid, span(0), write=False)
    world.do(processes.munmap, world.pid, span(1).start, PAGE_SIZE)
    world.machine.check()
    assert frames(world, 0, 1)[0] != merged
    assert read(world, 0, 1) == "a"


def test_unmergeable_copies_all_pages_and_leaves_them_read_only(world: World) -> None:
    """unmerge_ksm_pages(): handle_mm_fault() with FAULT_FLAG_UNSHARE for each; the flag goes."""
    write(world, 0, "abab")
    scan(world)
    record = world.start(processes.madvise, world.pid, START, 16 * PAGE_SIZE, Advice.UNMERGEABLE)
    (delivery,) = world.sent()
    assert (delivery.event.reason, delivery.event.spans) == (Reason.CLEAR, (span(0, 4),))
    world.machine.answer(delivery.mirror_id, delivery.sequence)
    world.settle()
    assert record.error is None
    assert len(set(frames(world, 0, 4))) == 4
    assert not any(cpu_pte.is_writable(entry(world, page)) for page in range(4))
    space = world.machine.processes[world.pid].space
    assert not any(vma.has(VmFlag.MERGEABLE) for vma in space.vmas)
    assert scan(world) == KsmPass(0, 0, 0, 0, 0, 0)
    write(world, 0, "cdcd")
    assert read(world, 0, 4) == "cdcd"


def test_unmergeable_has_nothing_to_copy_when_writes_did_while_drivers_were_told(world: World) -> None:
    """unmerge_ksm_pages(): a page that is merged no more is passed over."""
    write(world, 0, "aa")
    scan(world)
    unmerging = world.start(processes.madvise, world.pid, START, 2 * PAGE_SIZE, Advice.UNMERGEABLE)
    (told,) = world.sent()
    write(world, 0, "bb")
    world.machine.answer(told.mirror_id, told.sequence)
    world.settle()
    assert unmerging.result == 0
    assert read(world, 0, 2) == "bb"
    world.machine.check()


def test_unmergeable_fails_when_there_is_no_memory_for_the_copies() -> None:
    """madvise_vma_behavior() turns ENOMEM into EAGAIN; the pages below are copied, and the flag stays."""
    world = World(limits=Limits(frames=7, device_frames=0))
    advise(world, span(0, 16), Advice.MERGEABLE)
    write(world, 0, "aaaaaa")
    scan(world)
    world.do(processes.mmap, world.pid, span(32).start, 3 * PAGE_SIZE, RW, FIXED)
    write(world, 32, "xyz")
    record = world.start(processes.madvise, world.pid, START, 16 * PAGE_SIZE, Advice.UNMERGEABLE)
    world.settle()
    world.machine.check()
    assert error_of(record).errno == 11
    assert len(set(frames(world, 0, 6))) == 3


def test_child_shares_merged_pages(world: World) -> None:
    """ksm_fork(): the child's mappings are mergeable, its entries name the merged page."""
    write(world, 0, "aa")
    scan(world)
    child = world.do(processes.fork, world.pid)
    assert frames(world, 0, 2, child) == frames(world, 0, 2)
    done = scan(world)
    assert (done.merged, done.shared, done.sharing) == (0, 1, 3)
    write(world, 0, "bb", child)
    assert read(world, 0, 2) == "aa"


def test_page_that_fork_shares_is_no_second_page(world: World) -> None:
    """unstable_tree_search_insert(): "Don't substitute a ksm page for a forked page"."""
    write(world, 0, "a")
    child = world.do(processes.fork, world.pid)
    assert scan(world).merged == 0
    write(world, 1, "a", child)
    assert scan(world).merged == 2
    assert frames(world, 0, 1) == frames(world, 1, 1, child)
    assert scan(world).merged == 1
    assert frames(world, 0, 1, child) == frames(world, 1, 1, child)


def test_merged_page_has_a_limit_of_entries() -> None:
    """ksm_max_page_sharing: equal pages beyond it get another one, in the same pass."""
    world = World(limits=Limits(frames=2048, device_frames=0))
    npages = 2 * MAX_PAGE_SHARING + 1
    world.do(processes.mmap, world.pid, span(32).start, npages * PAGE_SIZE, RW, FIXED)
    advise(world, span(32, npages), Advice.MERGEABLE)
    write(world, 32, "a" * npages)
    done = scan(world)
    assert (done.merged, done.shared, done.unshared) == (2 * MAX_PAGE_SHARING, 2, 1)
    write(world, 32, "b")
    assert scan(world).merged == 1
    assert max(np.bincount(frames(world, 32, npages))) == MAX_PAGE_SHARING


def test_huge_page_is_split_when_pages_of_it_are_merged() -> None:
    """try_to_merge_one_page(): split_huge_page() first."""
    world = World(limits=Limits(frames=2048, device_frames=0))
    first = 2 * PMD_PAGES
    world.machine.processes[world.pid].space.thp = Thp.ALWAYS
    world.do(processes.mmap, world.pid, span(first).start, PMD_SIZE, RW, FIXED)
    advise(world, span(first, PMD_PAGES), Advice.MERGEABLE)
    data = np.repeat(np.arange(PMD_PAGES, dtype=np.uint64) + 1, 512)
    data[512 * 7 : 512 * 8] = data[0]
    world.do(processes.write_memory, world.pid, span(first).start, data.tobytes())
    assert scan(world).merged == 2
    found = frames(world, first, 8)
    assert found[0] == found[7]
    assert not entry(world, first + 1) & cpu_pte.HUGE
    assert world.do(processes.read_memory, world.pid, span(first).start, PMD_SIZE).data == data.tobytes()


def test_merged_pages_move_to_a_device_and_back_for_all(world: World) -> None:
    """rmap_walk_ksm(), folio_migrate_ksm(): it is selected once, and comes from wherever it is mapped."""
    other = world.do(processes.create_process, "other")
    world.do(processes.mmap, other, span(32).start, 2 * PAGE_SIZE, RW, FIXED)
    advise(world, span(32, 2), Advice.MERGEABLE, other)
    write(world, 0, "aba")
    write(world, 32, "aa", other)
    assert scan(world).merged == 4
    device = world.do(devices.register_device, "card", memory_pages=16)
    mirror = world.do(hmm.attach, device, world.pid)
    moved = world.do(hmm.migrate_to_device, mirror, span(0, 3))
    assert [bool(word) for word in moved.src.tolist()] == [True, True, False]
    world.machine.check()
    for page, pid in ((0, world.pid), (2, world.pid), (32, other), (33, other)):
        assert cpu_pte.is_device_private(entry(world, page, pid))
        assert not cpu_pte.is_writable(entry(world, page, pid))
    write(world, 33, "c", other)
    world.machine.check()
    assert cpu_pte.is_present(entry(world, 0))
    assert read(world, 32, 2, other) == "ac"
    assert read(world, 0, 3) == "aba"


def test_evicted_device_gives_merged_pages_back_to_all(world: World) -> None:
    """migrate_device_range() unmaps by the reverse map, merged pages too."""
    write(world, 0, "aa")
    scan(world)
    device = world.do(devices.register_device, "card", memory_pages=16)
    mirror = world.do(hmm.attach, device, world.pid)
    world.do(hmm.migrate_to_device, mirror, span(0))
    world.do(hmm.evict_device, device)
    world.machine.check()
    assert len(set(frames(world, 0, 2))) == 1
    assert read(world, 0, 2) == "aa"
    write(world, 0, "b")
    assert read(world, 0, 2) == "ba"


def test_evicted_device_counts_merged_pages_right_when_one_is_mapped_as_often_as_there_are_pages(world: World) -> None:
    """remove_migration_pte(): each entry takes a reference of its own page, however many the others have."""
    other = world.do(processes.create_process, "other")
    world.do(processes.mmap, other, span(32).start, 2 * PAGE_SIZE, RW, FIXED)
    advise(world, span(32, 2), Advice.MERGEABLE, other)
    write(world, 0, "aaa")
    write(world, 32, "bb", other)
    assert scan(world).merged == 5
    device = world.do(devices.register_device, "card", memory_pages=16)
    world.do(hmm.migrate_to_device, world.do(hmm.attach, device, world.pid), span(0))
    world.do(hmm.migrate_to_device, world.do(hmm.attach, device, other), span(32))
    assert world.do(hmm.evict_device, device) == 2
    world.machine.check()
    world.do(processes.munmap, world.pid, span(0).start, 3 * PAGE_SIZE)
    world.machine.check()
    assert read(world, 32, 2, other) == "bb"


def test_failure_of_a_merged_page_takes_it_from_all(world: World) -> None:
    """collect_procs_ksm(), rmap_walk_ksm(): the second address of the same page is lost when it is come to."""
    world.machine.capable = True
    write(world, 0, "aab")
    scan(world)
    record = world.start(processes.madvise, world.pid, START, 3 * PAGE_SIZE, Advice.HWPOISON)
    world.settle()
    world.machine.check()
    assert (error_of(record).errno, error_of(record).address) == (14, span(1).start)
    assert [cpu_pte.is_poison(entry(world, page)) for page in range(3)] == [True, True, False]


def test_merged_pages_stay_when_memory_is_short() -> None:
    """They are not put out; everything else is."""
    world = World(limits=Limits(frames=9, swap_pages=32, device_frames=0))
    advise(world, span(0, 2), Advice.MERGEABLE)
    write(world, 0, "aa")
    scan(world)
    write(world, 2, "bcdefghijklm")
    assert len(set(frames(world, 0, 2))) == 1
    assert cpu_pte.is_present(entry(world, 0))
    assert read(world, 0, 14) == "aabcdefghijklm"


def test_smaps_counts_merged_pages(world: World) -> None:
    """smaps_account(): folio_test_ksm(); they are shared, and anonymous."""
    write(world, 0, "aab")
    scan(world)
    space = world.machine.processes[world.pid].space
    vma = space.vmas.find(START)
    assert vma is not None
    use = memory_use(space, vma)
    assert (use.ksm, use.anonymous, use.rss) == (2 * PAGE_SIZE, 3 * PAGE_SIZE, 3 * PAGE_SIZE)
    assert (use.shared_dirty, use.private_dirty, use.pss) == (2 * PAGE_SIZE, PAGE_SIZE, 2 * PAGE_SIZE)


def test_mprotect_does_not_make_merged_pages_writable(world: World) -> None:
    """can_change_private_pte_writable(): only what is exclusive to the process."""
    write(world, 0, "aa")
    scan(world)
    for prot in (Prot.READ, RW):
        world.do(processes.mprotect, world.pid, START, 2 * PAGE_SIZE, prot)
    assert not cpu_pte.is_writable(entry(world, 0))
    write(world, 0, "b")
    assert read(world, 0, 2) == "ba"


def test_scan_is_refused_when_there_are_no_passes(world: World) -> None:
    """A number of passes below one: EINVAL."""
    with pytest.raises(InvalidRequestError):
        scan(world, 0)


def test_merged_page_is_copied_before_it_moves(world: World) -> None:
    """move_vma(): ksm_madvise(MADV_UNMERGEABLE) of what moves, so that merged pages do not turn up elsewhere."""
    write(world, 0, "aaaa")
    advise(world, span(0, 16), Advice.MERGEABLE)
    scan(world)
    assert len(set(frames(world, 0, 4))) == 1
    flags = MremapFlag.MAYMOVE | MremapFlag.FIXED
    world.do(processes.mremap, world.pid, span(1).start, PAGE_SIZE, PAGE_SIZE, flags, span(32).start)
    moved = frames(world, 32, 1)[0]
    assert moved not in frames(world, 0, 1)
    assert len({*frames(world, 0, 1), *frames(world, 2, 2)}) == 1
    assert read(world, 32, 1) == "a"
    scan(world)
    assert frames(world, 32, 1) == frames(world, 0, 1)  # it is mergeable as before
