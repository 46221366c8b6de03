"""Huge pages of files: made by MADV_COLLAPSE, mapped at a touch, split; and what mirrors hear of it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from area import BASE
from blocks import BLOCK, BLOCK_BYTES, RW, advise, heard, move, protect, shown, space, unmap

from hmm import commands_file, commands_hmm, commands_process, commands_userfaultfd, cpu_pte, range_fault
from hmm.address_space import Thp
from hmm.errors import HmmError, Signal
from hmm.events import Cause
from hmm.file import File
from hmm.file_folio import folio_at
from hmm.frames import PageFlag
from hmm.madvise import Advice
from hmm.pagemap import FILE, pagemap
from hmm.smaps import memory_use
from hmm.uffdio import RegisterMode
from hmm.units import PAGE_SIZE, PUD_SIZE
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot

SHARED, PRIVATE = MapFlag.SHARED | MapFlag.FIXED, MapFlag.PRIVATE | MapFlag.FIXED
TABLE_AT = 4 * BLOCK
"""Where a page of other memory is: the directory of the 1 GiB is there before anything else is."""


@pytest.fixture
def bench(make_bench: Callable[..., Any]) -> Any:
    """A process with one page of other memory, and a device with memory."""
    made = make_bench(frames=12 * BLOCK, memory_pages=2 * BLOCK, thp=Thp.ALWAYS, mapped_pages=1)
    unmap(made, 0, 1)
    made.map(1, at=TABLE_AT)
    made.write(TABLE_AT, b"x")
    return made


@pytest.fixture
def handle(bench: Any) -> int:
    """A file of two blocks, of which every 64th page was written with its number."""
    number: int = bench.call(commands_file.open_file, "memfd", create=True)
    for page in range(0, 2 * BLOCK, 64):
        bench.call(commands_file.write_file, number, page * PAGE_SIZE, bytes([page // 64 + 1]) * PAGE_SIZE)
    bench.call(commands_file.truncate_file, number, 2 * BLOCK_BYTES)
    return number


def map_file(
    bench: Any, handle: int, at: int = 0, npages: int = 2 * BLOCK, *, offset: int = 0, process: int = 0, **how: Any
) -> None:
    """Map a part of the file at page `at`: shared and writable, unless `how` says else."""
    prot, flags = how.get("prot", RW), how.get("flags", SHARED)
    where = process or bench.process, BASE + at * PAGE_SIZE, npages * PAGE_SIZE
    bench.call(commands_process.mmap, *where, prot, flags, handle, offset * PAGE_SIZE)
    bench.heard.events.clear()


def collapse(bench: Any, at: int = 0, npages: int = BLOCK, process: int = 0) -> None:
    """MADV_COLLAPSE."""
    span = bench.span(at, npages)
    bench.call(commands_process.madvise, process or bench.process, span.start, span.size_bytes, Advice.COLLAPSE)


def refused(bench: Any, at: int = 0, npages: int = BLOCK) -> int | None:
    """The errno of MADV_COLLAPSE."""
    with pytest.raises(HmmError) as raised:
        collapse(bench, at, npages)
    bench.local.machine.check()
    return raised.value.errno


def cache(bench: Any, handle: int) -> File:
    """The file."""
    found: File = bench.local.machine.files[handle]
    return found


def is_large(bench: Any, handle: int, block: int = 0) -> bool:
    """Whether a block of the file is one huge page."""
    return folio_at(cache(bench, handle), block * BLOCK_BYTES) is not None


def expect_contents(bench: Any, at: int = 0, npages: int = 2 * BLOCK, process: int = 0) -> None:
    """The pages of the file at `at` read as they were written."""
    data = bench.read(at, npages * PAGE_SIZE, process)
    first = np.frombuffer(data, np.uint8)[::PAGE_SIZE]
    written = np.arange(npages)
    assert np.array_equal(first, np.where(written % 64, 0, written // 64 + 1))


# ---- made


def test_collapse_makes_one_huge_page_of_a_block_of_a_file(bench: Any, handle: int) -> None:
    """collapse_file(), collapse_pte_mapped_thp(): holes become zeroes, the block is mapped as one; it is dirty."""
    map_file(bench, handle)
    bench.read(64, 1)
    assert shown(bench) == ".64 w1 .959"
    collapse(bench)
    assert shown(bench) == "W512 .512"
    assert is_large(bench, handle)
    assert not cpu_pte.is_dirty(bench.entry(0))  # set_huge_pmd(): as for a read
    assert bench.local.machine.frames.test_flags(np.array([cpu_pte.cpu_pfn(bench.entry(5))]), PageFlag.DIRTY).all()
    expect_contents(bench)
    resident = bench.call(commands_process.mincore, bench.process, bench.span(0).start, 2 * BLOCK_BYTES)
    assert resident[:BLOCK].all()
    assert (pagemap(space(bench), bench.span(0, BLOCK)) & np.uint64(FILE)).all()
    use = memory_use(space(bench), next(iter(space(bench).vmas)))
    assert (use.shmem_pmd, use.anon_huge, use.private_dirty) == (BLOCK_BYTES, 0, BLOCK_BYTES + 8 * PAGE_SIZE)
    collapse(bench)  # SCAN_PMD_MAPPED


def test_collapse_tells_of_mapped_pages_and_of_the_page_table(bench: Any, handle: int) -> None:
    """try_to_unmap() tells of a page, retract_page_tables() of the block; where there is no table nothing is told."""
    map_file(bench, handle)
    collapse(bench, BLOCK)
    assert heard(bench) == []
    bench.read(64, 1)
    collapse(bench)
    assert heard(bench) == [(Cause.COLLAPSE, [(0, 512)])]
    assert bench.heard.reasons == []


def test_range_fault_gives_the_order_of_a_huge_page_of_a_file(bench: Any, handle: int) -> None:
    """hmm_vma_handle_pmd()."""
    map_file(bench, handle)
    collapse(bench)
    sequence = bench.call(commands_hmm.read_begin, bench.mirror, bench.notifier)
    words = bench.call(commands_hmm.range_fault, bench.mirror, bench.notifier, sequence, bench.span(510, 4), 0).words
    assert ((words >> np.uint64(range_fault.ORDER_SHIFT)) & np.uint64(31)).tolist() == [9, 9, 0, 0]


def test_collapse_of_a_file_says_why_it_is_refused(bench: Any, handle: int) -> None:
    """madvise_collapse_errno(): an empty block, one at another offset, one that may not be huge, a pinned page."""
    map_file(bench, handle)
    map_file(bench, handle, 2 * BLOCK, 2 * BLOCK - 8, offset=8)
    assert refused(bench, 2 * BLOCK) == errno.EINVAL  # thp_vma_suitable_order()
    advise(bench, 0, 2 * BLOCK, Advice.NOHUGEPAGE)
    assert refused(bench) == errno.EINVAL
    advise(bench, 0, 2 * BLOCK, Advice.HUGEPAGE)
    bench.call(commands_file.punch_file, handle, 0, BLOCK_BYTES)
    assert refused(bench, 0, 2 * BLOCK) == errno.EINVAL  # SCAN_TRUNCATED ends it
    assert not is_large(bench, handle, 1)
    bench.write(3, b"a")
    pin = bench.call(commands_process.pin, bench.process, bench.span(3), write=True)
    assert refused(bench, 0, 2 * BLOCK) == errno.EAGAIN  # SCAN_PAGE_COUNT does not
    assert is_large(bench, handle, 1)
    bench.call(commands_process.unpin, pin)
    collapse(bench)
    assert bench.read(3, 1) == b"a"


def test_collapse_of_a_file_needs_a_run_of_frames(make_bench: Callable[..., Any]) -> None:
    """alloc_charge_folio() comes before the pages are looked at: ENOMEM, and nothing is told."""
    bench = make_bench(frames=BLOCK + 300, mapped_pages=1)
    bench.map(BLOCK, at=BLOCK, flags=SHARED | MapFlag.ANONYMOUS)
    bench.write(BLOCK, bytes(200 * PAGE_SIZE))
    assert refused(bench, BLOCK) == errno.ENOMEM
    assert heard(bench) == []


def test_collapse_of_a_file_is_refused_where_a_userfaultfd_misses_a_page(bench: Any, handle: int) -> None:
    """collapse_file(): SCAN_EXCEED_NONE_PTE, and what was mapped is not any more; without a hole it does not matter."""
    map_file(bench, handle)
    bench.read(64, 1)
    fd = bench.call(commands_userfaultfd.create_userfaultfd, bench.process)
    bench.call(commands_userfaultfd.uffd_register, fd, bench.span(0, 2 * BLOCK), RegisterMode.MISSING)
    assert refused(bench) == errno.EBUSY
    assert shown(bench) == ".1024"
    bench.call(commands_file.write_file, handle, 0, bytes(BLOCK_BYTES))
    collapse(bench)
    assert shown(bench) == "W512 .512"


def test_collapse_succeeds_for_the_file_but_fails_for_the_caller_without_a_directory(bench: Any, handle: int) -> None:
    """collapse_pte_mapped_thp(): find_pmd_or_thp_or_none() is SCAN_PMD_NULL; the next touch maps the huge page."""
    at = (PUD_SIZE - BASE % PUD_SIZE) // PAGE_SIZE
    map_file(bench, handle, at)
    assert refused(bench, at) == errno.EINVAL
    assert is_large(bench, handle)
    bench.read(at + 7, 1)
    assert bench.entry(at) & cpu_pte.HUGE


def test_collapse_again_maps_a_huge_page_that_is_there(bench: Any, handle: int) -> None:
    """SCAN_PTE_MAPPED_HUGEPAGE: without a page table, or by one huge entry in the place of small ones."""
    map_file(bench, handle)
    collapse(bench)
    advise(bench, 0, BLOCK, Advice.DONTNEED)
    heard(bench)
    assert shown(bench) == ".1024"
    collapse(bench)
    assert shown(bench) == "W512 .512"
    assert heard(bench) == []
    advise(bench, 0, BLOCK, Advice.NOHUGEPAGE)
    advise(bench, 0, BLOCK, Advice.DONTNEED)
    bench.read(5, 1)
    assert shown(bench) == ".5 w1 .1018"  # vma_thp_disabled() in do_set_pmd()
    advise(bench, 0, BLOCK, Advice.HUGEPAGE)
    heard(bench)
    collapse(bench)
    assert shown(bench) == "W512 .512"
    assert heard(bench) == [(Cause.COLLAPSE, [(0, 512)])]


def test_collapse_fails_for_the_caller_where_a_private_page_is(bench: Any, handle: int) -> None:
    """collapse_pte_mapped_thp(): SCAN_FAIL; the file's block is one huge page all the same."""
    map_file(bench, handle, flags=PRIVATE)
    bench.write(3, b"p")
    bench.read(64, 1)
    assert refused(bench) == errno.EINVAL
    assert shown(bench) == ".3 w1 .1020"
    assert is_large(bench, handle)
    bench.read(64, 1)
    assert shown(bench) == ".3 w1 .60 r1 .959"


def test_collapse_maps_a_private_mapping_of_a_file_read_only(bench: Any, handle: int) -> None:
    """set_huge_pmd() with vm_page_prot."""
    map_file(bench, handle, flags=PRIVATE)
    collapse(bench)
    assert shown(bench) == "R512 .512"
    expect_contents(bench)


def test_collapse_makes_a_huge_page_across_the_end_of_the_file(make_bench: Callable[..., Any]) -> None:
    """finish_fault() lets shmem be mapped by a huge entry across i_size; a touch behind it that finds none fails."""
    bench = make_bench(frames=6 * BLOCK, thp=Thp.ALWAYS, mapped_pages=1)
    handle = bench.call(commands_file.open_file, "memfd", create=True)
    bench.call(commands_file.write_file, handle, 0, b"a" * PAGE_SIZE)
    bench.map(1, at=TABLE_AT)
    bench.write(TABLE_AT, b"x")
    map_file(bench, handle, BLOCK, BLOCK)
    collapse(bench, BLOCK)
    assert bench.read(BLOCK, BLOCK_BYTES) == b"a" * PAGE_SIZE + bytes(BLOCK_BYTES - PAGE_SIZE)
    bench.local.machine.check()
    advise(bench, BLOCK, BLOCK, Advice.DONTNEED)
    where = bench.process, bench.span(BLOCK + 1).start, 1
    assert bench.call(commands_process.read_memory, *where).signal is Signal.BUS_ADRERR
    bench.read(BLOCK, 1)
    assert bench.call(commands_process.read_memory, *where).data == b"\0"


# ---- others


def test_collapse_unmaps_the_pages_everywhere_and_others_map_the_huge_page_at_a_touch(bench: Any, handle: int) -> None:
    """retract_page_tables() of all who map the block; filemap_map_pmd(), do_set_pmd()."""
    map_file(bench, handle)
    bench.write(64, b"\2")
    child = bench.call(commands_process.fork, bench.process)
    bench.read(0, 1, child)
    collapse(bench)
    assert shown(bench, process=child) == ".1024"
    bench.read(64, 1, child)
    assert shown(bench, process=child) == "W512 .512"
    bench.write(0, b"\1", child)
    assert shown(bench) == "W512 .512"
    expect_contents(bench, process=child)


def test_fork_leaves_huge_pages_of_files_to_the_child_to_find(bench: Any, handle: int) -> None:
    """copy_huge_pmd(): nothing is copied of a VMA that is not anonymous, private or not."""
    map_file(bench, handle, flags=PRIVATE)
    bench.write(BLOCK, b"p")
    collapse(bench)
    child = bench.call(commands_process.fork, bench.process)
    assert shown(bench, process=child) == ".512 r1 .511"
    assert shown(bench) == "R512 r1 .511"
    bench.read(9, 1, child)
    assert shown(bench, process=child) == "R512 r1 .511"


# ---- touched


def test_private_write_to_a_huge_page_of_a_file_unmaps_it_and_copies_one_page(bench: Any, handle: int) -> None:
    """wp_huge_pmd(): __split_huge_pmd() drops the entry of a file's page; do_cow_fault(), and page entries then."""
    map_file(bench, handle, flags=PRIVATE)
    collapse(bench)
    heard(bench)
    bench.write(5, b"p")
    assert shown(bench) == ".5 w1 .1018"
    assert heard(bench) == [(Cause.HUGE_PAGE_SPLIT, [(0, 512)])]
    bench.read(64, 1)
    assert shown(bench) == ".5 w1 .58 r1 .959"
    assert is_large(bench, handle)


def test_watched_write_to_a_huge_page_of_a_file_maps_it_anew(bench: Any, handle: int) -> None:
    """vma_wants_writenotify(); wp_huge_pmd() unmaps, do_shared_fault() maps the huge page writable."""
    map_file(bench, handle)
    collapse(bench)
    bench.call(commands_process.clear_refs, bench.process, 4)
    assert shown(bench) == "R512 .512"
    heard(bench)
    bench.write(5, b"p")
    assert shown(bench) == "W512 .512"
    assert heard(bench) == [(Cause.HUGE_PAGE_SPLIT, [(0, 512)])]


def test_shared_memory_without_a_name_is_mapped_as_a_whole_by_page_entries(bench: Any) -> None:
    """finish_fault(): all of a large folio where the block has a page table and no entry; of other files one page."""
    bench.map(BLOCK, flags=SHARED | MapFlag.ANONYMOUS)
    bench.write(5, b"a")
    collapse(bench)
    advise(bench, 0, BLOCK, Advice.NOHUGEPAGE)
    advise(bench, 0, BLOCK, Advice.DONTNEED)
    bench.read(5, 1)
    assert shown(bench, BLOCK) == "w512"
    advise(bench, 0, 100, Advice.DONTNEED)
    bench.read(5, 1)
    assert shown(bench, BLOCK) == ".5 w1 .94 w412"


# ---- in pieces


def test_part_of_a_huge_page_of_a_file_takes_the_rest_along_when_it_is_unmapped(bench: Any, handle: int) -> None:
    """__split_huge_pmd_locked(): the rest is found again when it is touched, by a huge entry where it can be."""
    map_file(bench, handle)
    collapse(bench)
    advise(bench, 3, 1, Advice.DONTNEED)
    assert shown(bench) == ".1024"
    expect_contents(bench)
    assert shown(bench) == "W512 w512"
    unmap(bench, 100, 1)
    assert shown(bench) == ".512 w512"
    bench.read(5, 1)
    assert shown(bench) == ".5 w1 .506 w512"
    assert is_large(bench, handle)


def test_mprotect_changes_a_huge_page_of_a_file_as_a_whole_or_drops_it(bench: Any, handle: int) -> None:
    """change_huge_pmd(); vma_adjust_trans_huge() where the VMA is cut inside it."""
    map_file(bench, handle)
    collapse(bench)
    protect(bench, 0, BLOCK, Prot.READ)
    assert shown(bench) == "R512 .512"
    protect(bench, 0, BLOCK, RW)
    assert shown(bench) == "W512 .512"
    protect(bench, 10, 10, Prot.READ)
    assert shown(bench) == ".1024"


def test_mremap_moves_a_huge_page_of_a_file_where_it_stays_aligned(bench: Any, handle: int) -> None:
    """move_huge_pmd(); elsewhere __split_huge_pmd()."""
    map_file(bench, handle)
    collapse(bench)
    move(bench, 0, BLOCK, 2 * BLOCK)
    assert shown(bench, 4 * BLOCK) == ".1024 W512 .512"
    move(bench, 2 * BLOCK, BLOCK, 5)
    assert shown(bench, 4 * BLOCK) == ".2048"
    expect_contents(bench, 5, BLOCK)


@pytest.mark.parametrize("kept", [100, 0])
def test_truncation_splits_the_huge_page_across_the_end(bench: Any, handle: int, kept: int) -> None:
    """truncate_inode_partial_folio(): split, and small pages from then on; a block that goes as a whole just goes."""
    map_file(bench, handle)
    collapse(bench)
    before = bench.local.machine.frames.available
    bench.call(commands_file.truncate_file, handle, kept * PAGE_SIZE)
    assert shown(bench) == ".1024"
    assert bench.local.machine.frames.available == before + BLOCK - kept + BLOCK // 64
    assert not is_large(bench, handle)
    if kept:
        expect_contents(bench, 0, kept)
        assert shown(bench) == "w100 .924"
    where = bench.process, bench.span(kept).start, 1
    assert bench.call(commands_process.read_memory, *where).signal is Signal.BUS_ADRERR


def test_punch_splits_the_huge_page_and_leaves_a_hole(bench: Any, handle: int) -> None:
    """As above; who maps the rest loses its entries, and private copies stay."""
    map_file(bench, handle)
    map_file(bench, handle, 2 * BLOCK, flags=PRIVATE)
    collapse(bench)
    bench.write(2 * BLOCK + 65, b"p")
    heard(bench)
    bench.call(commands_file.punch_file, handle, 64 * PAGE_SIZE, 64 * PAGE_SIZE)
    assert shown(bench, 4 * BLOCK) == ".1089 w1 .958"
    assert {cause for cause, _ in heard(bench)} == {Cause.HUGE_PAGE_SPLIT, Cause.TRUNCATE}
    assert bench.read(64, 1) == b"\0"
    assert bench.read(128, 1) == b"\3"


def test_mirrors_hear_of_all_mappings_of_a_huge_page_in_order_of_address(bench: Any, handle: int) -> None:
    """try_to_unmap(): the reverse map is ordered by the offset in the file."""
    half = BLOCK // 2
    map_file(bench, handle, 2 * BLOCK, BLOCK)
    collapse(bench, 2 * BLOCK)
    map_file(bench, handle, 0, half, offset=half)
    map_file(bench, handle, BLOCK, half)
    for at in (0, BLOCK):
        bench.read(at, 1)
    bench.call(commands_file.truncate_file, handle, 100 * PAGE_SIZE)
    assert heard(bench)[0] == (Cause.HUGE_PAGE_SPLIT, [(0, half), (BLOCK, BLOCK + half), (2 * BLOCK, 3 * BLOCK)])


def test_a_hole_leaves_the_page_tables(bench: Any, handle: int) -> None:
    """zap_pte_range() frees none: what is mapped next to them finds the directory that they are in."""
    at = (PUD_SIZE - BASE % PUD_SIZE) // PAGE_SIZE
    map_file(bench, handle, at, BLOCK)
    bench.read(at, 1)
    bench.call(commands_file.punch_file, handle, 0, BLOCK_BYTES)
    map_file(bench, handle, at + BLOCK, BLOCK, offset=BLOCK)
    collapse(bench, at + BLOCK)
    assert bench.entry(at + BLOCK) & cpu_pte.HUGE


def test_truncation_zeroes_what_it_cannot_split_off(bench: Any, handle: int) -> None:
    """truncate_inode_partial_folio(): a dirty folio that somebody refers to stays, with zeroes behind the end."""
    map_file(bench, handle)
    collapse(bench)
    pin = bench.call(commands_process.pin, bench.process, bench.span(3), write=True)
    bench.call(commands_file.truncate_file, handle, 100 * PAGE_SIZE)
    assert is_large(bench, handle)
    assert shown(bench) == ".1024"
    bench.read(64, 1)
    assert shown(bench) == "W512 .512"
    assert bench.read(128, 1) == b"\0"
    assert bench.read(64, 1) == b"\2"
    bench.call(commands_process.unpin, pin)
    bench.call(commands_file.truncate_file, handle, 90 * PAGE_SIZE)
    assert not is_large(bench, handle)
    assert bench.call(commands_file.read_file, handle, 64 * PAGE_SIZE, 1) == b"\2"
    bench.local.machine.check()


def test_pageout_of_a_huge_page_of_a_file_puts_its_pages_into_swap(make_bench: Callable[..., Any]) -> None:
    """shrink_folio_list(), shmem_writepage() where no run of slots can be had; a collapse brings them back."""
    bench = make_bench(frames=6 * BLOCK, thp=Thp.ALWAYS, mapped_pages=1, swap_pages=2 * BLOCK)
    bench.map(1, at=TABLE_AT)
    bench.write(TABLE_AT, b"x")
    bench.map(BLOCK, at=BLOCK, flags=SHARED | MapFlag.ANONYMOUS)
    bench.write(BLOCK + 5, b"a")
    collapse(bench, BLOCK)
    advise(bench, BLOCK, BLOCK, Advice.PAGEOUT)
    assert shown(bench) == ".1024"
    span = bench.span(BLOCK, BLOCK)
    assert not bench.call(commands_process.mincore, bench.process, *edges_and_size(span)).any()
    collapse(bench, BLOCK)
    assert shown(bench) == ".512 W512"
    assert bench.read(BLOCK + 5, 1) == b"a"


def test_pageout_without_swap_unmaps_a_huge_page_of_a_file(bench: Any, handle: int) -> None:
    """shrink_folio_list(): try_to_unmap() comes before shmem_writepage() finds no swap; the page stays."""
    map_file(bench, handle)
    collapse(bench)
    heard(bench)
    advise(bench, 0, BLOCK, Advice.PAGEOUT)
    assert shown(bench) == ".1024"
    assert heard(bench) == [(Cause.RECLAIM, [(0, 512)])]
    assert is_large(bench, handle)
    expect_contents(bench)


def edges_and_size(span: Any) -> tuple[int, int]:
    """Start and length."""
    return span.start, span.size_bytes


# ---- devices


def test_migration_splits_a_huge_page_of_a_file_and_leaves_it(bench: Any, handle: int) -> None:
    """migrate_vma_collect_pmd(): split_folio() unmaps it; a hole of a file is none that a device may fill."""
    map_file(bench, handle)
    collapse(bench)
    bench.to_device(0, 4)
    assert shown(bench) == ".1024"
    assert not is_large(bench, handle)
    expect_contents(bench)


def test_exclusive_access_maps_a_huge_page_of_a_file_by_page_entries(bench: Any, handle: int) -> None:
    """follow_pmd_mask() with FOLL_SPLIT_PMD; folio_make_device_exclusive() then refuses pages of files."""
    map_file(bench, handle)
    collapse(bench)
    assert not bench.call(commands_hmm.make_exclusive, bench.mirror, bench.span(3)).any()
    assert shown(bench) == ".3 w1 .1020"
    assert is_large(bench, handle)


@pytest.mark.parametrize("advice", [Advice.HWPOISON, Advice.SOFT_OFFLINE])
def test_a_lost_page_of_a_huge_page_of_a_file_is_split_off(bench: Any, handle: int, advice: Advice) -> None:
    """try_to_split_thp_page(): the page is in the cache, and mapped nowhere."""
    bench.local.machine.capable = True
    map_file(bench, handle)
    collapse(bench)
    frame = cpu_pte.cpu_pfn(bench.entry(64))
    advise(bench, 64, 1, advice)
    assert shown(bench) == ".1024"
    assert not is_large(bench, handle)
    assert bench.local.machine.frames.flags_of(frame) & PageFlag.HWPOISON
    where = bench.process, bench.span(64).start, 1
    done = bench.call(commands_process.read_memory, *where)
    if advice is Advice.HWPOISON:
        assert done.signal is Signal.BUS_POISON
    else:
        assert done.data == b"\2"
