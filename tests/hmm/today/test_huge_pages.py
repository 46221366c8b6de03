"""Huge pages: brought in, split, copied, moved; and what mirrors hear of it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from blocks import BLOCK, MOVE, RW, advise, edges, heard, move, protect, shown, space, unmap

from hmm import commands_device, commands_hmm, commands_process, commands_userfaultfd, cpu_pte, range_fault
from hmm.address_space import Thp
from hmm.errors import HmmError
from hmm.events import Cause, EventType, Reason
from hmm.frames import PageFlag
from hmm.large_folio import likely_mapped_shared
from hmm.madvise import Advice
from hmm.mirror import DeadlinePolicy
from hmm.mremap import MremapFlag
from hmm.pagemap import FILE, pagemap
from hmm.smaps import MemoryUse, memory_use
from hmm.units import PAGE_SIZE, PMD_SHIFT, PMD_SIZE, PUD_SIZE
from hmm.vma import Prot


@pytest.fixture
def bench(make_bench: Callable[..., Any]) -> Any:
    """A process that gets huge pages, with two blocks mapped, and a device with memory."""
    return make_bench(frames=8 * BLOCK, memory_pages=2 * BLOCK, thp=Thp.ALWAYS, mapped_pages=2 * BLOCK)


# ---- brought in


def test_write_brings_a_huge_page_when_the_block_is_empty(bench: Any) -> None:
    """do_huge_pmd_anonymous_page(): 512 consecutive, aligned frames; the range fault says order 9."""
    bench.write(5, b"x")
    assert shown(bench) == "W512 .512"
    assert bench.read(5, 1) == b"x"
    pfns = cpu_pte.cpu_pfn(space(bench).table.read(*edges(bench.span(0, BLOCK))))
    assert pfns[0] % BLOCK == 0
    assert (np.diff(pfns) == 1).all()
    sequence = bench.call(commands_hmm.read_begin, bench.mirror, bench.notifier)
    words = bench.call(commands_hmm.range_fault, bench.mirror, bench.notifier, sequence, bench.span(510, 4), 0).words
    orders = (words >> np.uint64(range_fault.ORDER_SHIFT)) & np.uint64(31)
    assert orders.tolist() == [9, 9, 0, 0]
    assert range_fault.word_pfns(words[:2]).tolist() == pfns[510:].tolist()
    assert bench.heard.events == []


def test_huge_page_is_asked_for_as_one_when_a_page_of_it_is_wanted(bench: Any) -> None:
    """hmm_vma_handle_pmd(): a write that one page is wanted for is one of all that are asked about."""
    bench.read(0, 1)
    sequence = bench.call(commands_hmm.read_begin, bench.mirror, bench.notifier)
    words = np.zeros(4, np.uint64)
    words[2] = range_fault.REQ_FAULT | range_fault.REQ_WRITE
    asked = bench.mirror, bench.notifier, sequence, bench.span(0, 4), 0, int(words[2]), words
    bench.call(commands_hmm.range_fault, *asked)
    assert cpu_pte.is_writable(space(bench).table.read(*edges(bench.span(0, 4)))).all()


def test_read_brings_the_huge_zero_page_when_the_block_is_empty(bench: Any) -> None:
    """It is no file, but is not anonymous either: pagemap_pmd_range() shows it as one."""
    assert bench.read(5, 2 * PAGE_SIZE) == bytes(2 * PAGE_SIZE)
    assert shown(bench) == "Z512 .512"
    assert (pagemap(space(bench), bench.span(0)) & np.uint64(FILE)).all()
    assert space(bench).vmas.find(bench.span(0).start).anon_vma  # vmf_anon_prepare() comes first


def test_write_splits_the_huge_zero_page_and_copies_one_page(bench: Any) -> None:
    """do_huge_pmd_wp_page() falls back to small pages; mirrors hear of the block, then of the page."""
    bench.read(0, 1)
    bench.write(3, b"x")
    assert shown(bench) == "z3 w1 z508 .512"
    assert heard(bench) == [(Cause.HUGE_PAGE_SPLIT, [(0, 512)]), (Cause.COPY_ON_WRITE, [(3, 4)])]


def test_write_splits_the_huge_zero_page_that_came_while_mirrors_were_told_of_a_copy(bench: Any) -> None:
    """What is looked at again after the wait is looked at as a whole, and no page is passed over."""
    bench.write(0, b"x")
    advise(bench, BLOCK - 1, 1, Advice.DONTNEED)
    bench.read(BLOCK - 1, 1)
    assert shown(bench) == "w511 z1 .512"
    bench.call(commands_hmm.detach, bench.mirror)
    mirror = bench.call(commands_hmm.attach, bench.device, bench.process)
    bench.local.attach(mirror, bench.heard)
    span = bench.span(0, BLOCK)
    bench.call(commands_hmm.insert_notifier, mirror, span.start, span.size_bytes)

    def meanwhile(_: Any) -> None:
        advise(bench, BLOCK, BLOCK, Advice.DONTNEED)
        bench.read(BLOCK, 1)

    bench.heard.meanwhile = meanwhile
    bench.write(BLOCK - 1, b"y" * 2 * PAGE_SIZE)
    assert shown(bench) == "w513 z511"
    assert bench.read(BLOCK - 1, 2 * PAGE_SIZE) == b"y" * 2 * PAGE_SIZE


def test_small_pages_come_when_the_vma_does_not_cover_the_block(make_bench: Callable[..., Any]) -> None:
    """thp_vma_suitable_order()."""
    bench = make_bench(frames=8 * BLOCK, thp=Thp.ALWAYS, mapped_pages=2 * BLOCK - 1)
    bench.write(BLOCK - 1, b"xy" * PAGE_SIZE)
    assert shown(bench) == "W512 w1 .511"


def test_small_pages_come_when_the_block_has_a_page_table(bench: Any) -> None:
    """pmd_none() is false once a small page was there, until all of the block is unmapped: free_pgtables()."""
    bench.write(0, b"x")
    advise(bench, 0, 1, Advice.DONTNEED)
    advise(bench, 0, BLOCK, Advice.DONTNEED)
    bench.write(1, b"x")
    assert shown(bench) == ".1 w1 .1022"
    unmap(bench, 0, 8)
    bench.map(8)
    bench.write(1, b"x")
    assert shown(bench) == ".1 w1 .1022"
    unmap(bench, 0, BLOCK)
    bench.map(BLOCK)
    bench.write(1, b"x")
    assert shown(bench) == "W512 .512"


def test_huge_page_comes_again_when_all_of_it_was_discarded(bench: Any) -> None:
    """zap_huge_pmd() leaves an empty entry of the directory, not a page table."""
    bench.write(0, b"x")
    advise(bench, 0, BLOCK, Advice.DONTNEED)
    assert shown(bench) == ".1024"
    bench.write(0, b"y")
    assert shown(bench) == "W512 .512"


def test_small_pages_come_when_no_run_of_frames_is_free(make_bench: Callable[..., Any]) -> None:
    """Without 512 aligned frames the fault falls back, and does not fail."""
    bench = make_bench(frames=2 * BLOCK, thp=Thp.ALWAYS, mapped_pages=2 * BLOCK)
    bench.write(0, b"x")
    bench.write(BLOCK, b"x")
    assert shown(bench) == "W512 w1 .511"


def test_allocate_takes_runs_that_were_freed_one_by_one(make_bench: Callable[..., Any]) -> None:
    """Frames come together again whatever the order in which they were freed."""
    bench = make_bench(frames=3 * BLOCK, thp=Thp.ALWAYS, mapped_pages=2 * BLOCK)
    bench.write(0, b"x")
    bench.write(BLOCK, b"x")
    for at in (*range(0, BLOCK, 2), *range(BLOCK - 1, 0, -2)):
        advise(bench, at, 1, Advice.DONTNEED)
    advise(bench, BLOCK, BLOCK, Advice.DONTNEED)
    advise(bench, 0, BLOCK, Advice.DONTNEED)
    unmap(bench, 0, BLOCK)
    bench.map(BLOCK)
    bench.write(BLOCK, b"x")
    bench.write(0, b"x")
    assert shown(bench) == "W1024"


@pytest.mark.parametrize(
    ("thp", "advice", "expected"),
    [
        (Thp.NEVER, Advice.HUGEPAGE, "w1 .1023"),
        (Thp.MADVISE, None, "w1 .1023"),
        (Thp.MADVISE, Advice.HUGEPAGE, "W512 .512"),
        (Thp.ALWAYS, Advice.NOHUGEPAGE, "w1 .1023"),
    ],
)
def test_setting_and_advice_decide_whether_huge_pages_come(
    make_bench: Callable[..., Any], thp: Thp, advice: Advice | None, expected: str
) -> None:
    """__thp_vma_allowable_orders()."""
    bench = make_bench(frames=8 * BLOCK, thp=thp, mapped_pages=2 * BLOCK)
    if advice is not None:
        advise(bench, 0, 2 * BLOCK, advice)
    bench.write(0, b"x")
    assert shown(bench) == expected


def test_program_that_is_executed_gets_huge_pages_where_the_one_before_got_them(bench: Any) -> None:
    """The setting is the system's, and prctl(PR_SET_THP_DISABLE) is inherited through execve()."""
    bench.call(commands_process.exec_process, bench.process, "other")
    bench.map(BLOCK)
    bench.write(0, b"x")
    assert shown(bench) == "W512 .512"


# ---- split


def test_mprotect_splits_when_it_changes_a_part(bench: Any) -> None:
    """The VMA is cut inside the block: mirrors hear of all of it first; permissions of the rest stay."""
    bench.write(0, b"x")
    protect(bench, 100, 8, Prot.READ)
    assert shown(bench) == "w100 r8 w404 .512"
    assert [cause for cause, _ in heard(bench)] == [Cause.HUGE_PAGE_SPLIT, Cause.VMA_CUT, Cause.MPROTECT_READ]
    protect(bench, 100, 8, RW)
    assert shown(bench) == "w512 .512"


def test_mprotect_leaves_a_huge_page_whole_when_it_changes_all_of_it(bench: Any) -> None:
    """change_huge_pmd(): read-only and back without a fault, as the page is this process's own."""
    bench.write(0, b"x")
    protect(bench, 0, BLOCK, Prot.READ)
    assert shown(bench) == "R512 .512"
    protect(bench, 0, BLOCK, RW)
    assert shown(bench) == "W512 .512"


def test_cut_is_told_today_when_nothing_huge_is_there(make_bench: Callable[..., Any]) -> None:
    """vma_adjust_trans_huge() does not look whether the block is huge; the mirrors of 2015 hear nothing."""
    bench = make_bench(frames=8 * BLOCK, mapped_pages=2 * BLOCK)
    bench.write(3, b"x")
    unmap(bench, 600, 4)
    assert heard(bench) == [(Cause.VMA_CUT, [(512, 1024)]), (Cause.MUNMAP, [(600, 604)])]
    unmap(bench, 0, 512)
    assert heard(bench) == [(Cause.MUNMAP, [(0, 512)])]
    assert Cause.VMA_CUT.told.etype is EventType.NONE


def test_mirror_of_2015_hears_of_a_split_as_munmap(bench: Any) -> None:
    """HSPLIT is MUNMAP: the device must not use the block as one any more."""
    old = bench.call(commands_device.register_device, "old")
    mirror = bench.call(commands_device.register_mirror, old, bench.process, policy=DeadlinePolicy.FENCE)
    driver = type(bench.heard)()
    bench.local.attach(mirror, driver)
    bench.call(commands_device.fault, mirror, (bench.span(0, 8),), write=True, wait=True)
    assert shown(bench) == "W512 .512"
    protect(bench, 3, 1, Prot.READ)
    assert [event.etype for event in driver.events if event.etype.is_invalidation] == [
        EventType.MUNMAP, EventType.WRITE_PROTECT,
    ]  # fmt: skip


def test_discard_splits_when_it_is_of_a_part(bench: Any) -> None:
    """zap_pmd_range(): told first of the advice, then of the block."""
    bench.write(0, b"x")
    advise(bench, 8, 4, Advice.DONTNEED)
    assert shown(bench) == "w8 .4 w500 .512"
    assert heard(bench) == [(Cause.MADV_DONTNEED, [(8, 12)]), (Cause.HUGE_PAGE_SPLIT, [(0, 512)])]


def test_free_splits_the_folio_when_it_is_of_a_part(bench: Any) -> None:
    """madvise_free_huge_pmd(): small pages from then on, and what is all zero becomes the zero page."""
    bench.write(0, b"x" * 3 * PAGE_SIZE)
    advise(bench, 1, 1, Advice.FREE)
    assert shown(bench) == "w3 z509 .512"
    assert not cpu_pte.is_dirty(bench.entry(1))
    assert cpu_pte.is_dirty(bench.entry(0))
    assert not bench.local.machine.frames.flags_of(cpu_pte.cpu_pfn(bench.entry(0))) & PageFlag.COMPOUND


def test_free_leaves_a_huge_page_alone_when_others_map_it(bench: Any) -> None:
    """folio_likely_mapped_shared()."""
    bench.write(0, b"x")
    bench.call(commands_process.fork, bench.process)
    advise(bench, 1, 1, Advice.FREE)
    assert shown(bench) == "R512 .512"
    assert cpu_pte.is_dirty(bench.entry(1))


def test_free_makes_a_huge_page_clean_when_it_is_of_all(bench: Any) -> None:
    """It stays huge; a device that writes makes all of it dirty again."""
    bench.write(0, b"x")
    advise(bench, 0, BLOCK, Advice.FREE)
    assert shown(bench) == "W512 .512"
    assert not cpu_pte.is_dirty(bench.entry(9))
    pfn = cpu_pte.cpu_pfn(bench.entry(9))
    addresses = np.array([bench.span(9).start], np.uint64)
    bench.call(commands_hmm.write_frames, bench.mirror, addresses, np.array([pfn]), b"y" * PAGE_SIZE)
    assert cpu_pte.is_dirty(bench.entry(500))
    assert shown(bench) == "W512 .512"


def take_a_frame_of_the_folio(bench: Any, at: int) -> None:
    """A small page comes into the frame that a huge page let go of."""
    frame = cpu_pte.cpu_pfn(bench.entry(at))
    advise(bench, at, 1, Advice.DONTNEED)
    bench.write(at, b"s")
    assert cpu_pte.cpu_pfn(bench.entry(at)) == frame


def test_free_splits_the_folio_when_a_small_page_took_one_of_its_frames(bench: Any) -> None:
    """madvise_free_pte_range(): the folio is not mapped as a whole, folio_pte_batch() ends before the small page."""
    bench.write(0, b"x")
    take_a_frame_of_the_folio(bench, 3)
    advise(bench, 0, BLOCK, Advice.FREE)
    assert shown(bench) == "w1 z2 w1 z508 .512"
    assert not cpu_pte.is_dirty(bench.entry(3))


def test_free_guesses_from_a_page_of_the_folio_who_maps_it(bench: Any) -> None:
    """folio_likely_mapped_shared() reads the count of the first page, whose frame a small page may have taken."""
    bench.write(0, b"x" * PAGE_SIZE * 2)
    frames, head = bench.local.machine.frames, cpu_pte.cpu_pfn(bench.entry(0))
    child = bench.call(commands_process.fork, bench.process)
    for span in (bench.span(2, BLOCK - 2), bench.span(0)):
        for process in (bench.process, child):
            bench.call(commands_process.madvise, process, span.start, span.size_bytes, Advice.DONTNEED)
    bench.write(0, b"s")
    assert cpu_pte.cpu_pfn(bench.entry(0)) == head
    bench.call(commands_process.fork, bench.process)
    assert (frames.mapcount[head], likely_mapped_shared(frames, head)) == (2, False)


@pytest.mark.parametrize("advice", [Advice.COLD, Advice.PAGEOUT])
def test_cold_and_pageout_split_the_folio_when_they_are_of_a_part(bench: Any, advice: Advice) -> None:
    """madvise_cold_or_pageout_pte_range(), whether or not there is swap."""
    bench.write(0, b"x" * 3 * PAGE_SIZE)
    advise(bench, 1, 1, advice)
    assert shown(bench) == "w3 z509 .512"
    assert heard(bench) == [(Cause.HUGE_PAGE_SPLIT, [(0, 512)])]
    bench.write(BLOCK, b"y")
    advise(bench, BLOCK + 4, 1, Advice.DONTNEED)
    advise(bench, BLOCK, BLOCK, advice)
    assert shown(bench) == "w3 z509 w1 z3 .1 z507"


def test_cold_leaves_a_huge_page_that_pageout_splits_when_they_are_of_all(bench: Any) -> None:
    """madvise_cold_or_pageout_pte_range() keeps it whole; shrink_folio_list() splits what gets no run of slots."""
    bench.write(0, b"x")
    advise(bench, 0, BLOCK, Advice.COLD)
    assert shown(bench) == "W512 .512"
    advise(bench, 0, BLOCK, Advice.PAGEOUT)
    assert shown(bench) == "w1 z511 .512"


@pytest.mark.parametrize("advice", [Advice.COLD, Advice.PAGEOUT])
def test_cold_and_pageout_leave_a_folio_alone_when_others_map_it(bench: Any, advice: Advice) -> None:
    """folio_likely_mapped_shared()."""
    bench.write(0, b"x")
    bench.call(commands_process.fork, bench.process)
    advise(bench, 1, 1, advice)
    advise(bench, 0, BLOCK, advice)
    assert shown(bench) == "R512 .512"


# ---- fork


def test_child_shares_a_huge_page_and_copies_one_of_its_pages(bench: Any) -> None:
    """copy_huge_pmd(); a write splits the writer's mapping alone, and the last one gets the page back whole."""
    bench.write(0, b"x")
    child = bench.call(commands_process.fork, bench.process)
    assert shown(bench) == shown(bench, process=child) == "R512 .512"
    bench.write(7, b"c", child)
    assert shown(bench, process=child) == "r7 w1 r504 .512"
    assert shown(bench) == "R512 .512"
    bench.call(commands_process.exit_process, child)
    bench.write(8, b"p")
    assert shown(bench) == "W512 .512"
    assert bench.read(0, 1) == b"x"


def test_pages_of_a_split_mapping_are_copied_though_nobody_else_maps_them(bench: Any) -> None:
    """wp_can_reuse_anon_folio() gives pages of large folios back rather."""
    bench.write(0, b"x")
    child = bench.call(commands_process.fork, bench.process)
    bench.write(7, b"p")
    bench.call(commands_process.exit_process, child)
    before = bench.entry(0)
    bench.write(0, b"y")
    assert cpu_pte.cpu_pfn(bench.entry(0)) != cpu_pte.cpu_pfn(before)
    assert shown(bench) == "w1 r6 w1 r504 .512"


def test_fork_copies_all_pages_of_a_folio_when_one_is_pinned(bench: Any) -> None:
    """folio_try_dup_anon_rmap_pmd() fails: the block is split, and pins are of folios."""
    bench.write(0, b"x")
    bench.call(commands_process.pin, bench.process, bench.span(3), write=True)
    child = bench.call(commands_process.fork, bench.process)
    assert shown(bench) == shown(bench, process=child) == "w512 .512"
    assert bench.read(0, 1, child) == b"x"


def test_fork_shares_a_small_page_when_it_took_a_frame_of_a_folio_that_is_pinned(bench: Any) -> None:
    """folio_maybe_dma_pinned() is asked of the small page's own folio, and neither answers for the other."""
    bench.write(0, b"x")
    bench.write(BLOCK, b"x")
    take_a_frame_of_the_folio(bench, 3)
    take_a_frame_of_the_folio(bench, BLOCK + 3)
    bench.call(commands_process.pin, bench.process, bench.span(7), write=True)
    bench.call(commands_process.pin, bench.process, bench.span(BLOCK + 3), write=True)
    child = bench.call(commands_process.fork, bench.process)
    frames = [[cpu_pte.cpu_pfn(bench.entry(at, one)) for at in (3, 4, BLOCK + 3, BLOCK + 4)] for one in (0, child)]
    assert [mine == other for mine, other in zip(*frames, strict=True)] == [True, False, False, True]


def test_child_gets_empty_page_tables_where_its_parent_has_some(bench: Any) -> None:
    """copy_pmd_range() allocates before it looks for entries."""
    bench.write(0, b"x")
    advise(bench, 0, 1, Advice.DONTNEED)
    advise(bench, 0, BLOCK, Advice.DONTNEED)
    child = bench.call(commands_process.fork, bench.process)
    bench.write(3, b"c", child)
    assert shown(bench, process=child) == ".3 w1 .1020"


def test_pin_for_reading_unshares_a_page_of_a_shared_huge_one(bench: Any) -> None:
    """gup_must_unshare(): split, and one copy that may not be written; alone, the page is simply the process's own."""
    bench.write(0, b"x")
    child = bench.call(commands_process.fork, bench.process)
    bench.call(commands_process.pin, bench.process, bench.span(3), write=False)
    assert shown(bench) == "r512 .512"
    bench.call(commands_process.pin, child, bench.span(3), write=False)
    assert shown(bench, process=child) == "r512 .512"
    bench.write(BLOCK, b"x")
    grandchild = bench.call(commands_process.fork, bench.process)
    bench.call(commands_process.exit_process, grandchild)
    bench.call(commands_process.pin, bench.process, bench.span(BLOCK), write=False)
    assert shown(bench) == "r512 R512"


# ---- moved


def test_mremap_moves_a_huge_page_as_it_is_when_both_places_are_blocks(bench: Any) -> None:
    """move_huge_pmd()."""
    bench.write(0, b"x")
    move(bench, 0, BLOCK, 2 * BLOCK)
    assert shown(bench, 3 * BLOCK) == ".1024 W512"
    assert Cause.HUGE_PAGE_SPLIT not in [cause for cause, _ in heard(bench)]


@pytest.mark.parametrize(
    ("at", "npages", "to", "expected"),
    [(0, 8, 2 * BLOCK, ".8 w504 .512 w8 .504"), (0, BLOCK, 2 * BLOCK + 1, ".1025 w511")],
)
def test_mremap_splits_when_the_page_cannot_move_whole(
    bench: Any, at: int, npages: int, to: int, expected: str
) -> None:
    """move_page_tables()."""
    bench.write(0, b"x")
    move(bench, at, npages, to)
    assert shown(bench, 3 * BLOCK) == expected
    assert (Cause.HUGE_PAGE_SPLIT, [(0, 512)]) in heard(bench)
    assert bench.read(to, 1) == b"x"


def test_mremap_takes_the_page_table_along_when_it_moves_a_block(bench: Any) -> None:
    """move_normal_pmd(): the old place may get a huge page then; by pages, both places have tables."""
    bench.write(0, b"x")
    advise(bench, 1, 1, Advice.DONTNEED)
    move(bench, 0, BLOCK, 2 * BLOCK, MOVE | MremapFlag.DONTUNMAP)
    bench.write(0, b"y")
    assert shown(bench, 3 * BLOCK) == "W512 .512 w1 .1 w510"
    move(bench, 0, 8, 3 * BLOCK, MOVE | MremapFlag.DONTUNMAP)
    bench.write(0, b"y")
    assert shown(bench, BLOCK) == "w1 .7 w504"


def leave_a_table(bench: Any) -> None:
    """The second block has a page table, for a page of a VMA of its own that fork does not copy."""
    protect(bench, BLOCK + 5, 1, Prot.READ)
    assert bench.read(BLOCK + 5, 1) == b"\0"


def test_mremap_allocates_a_page_table_when_the_block_has_one_for_another_vma(bench: Any) -> None:
    """move_page_tables(): get_old_pmd() looks at the entry of the block, whosever pages are in the table."""
    leave_a_table(bench)
    move(bench, BLOCK + 100, 1, 3)
    bench.write(0, b"x")
    assert shown(bench, BLOCK) == "w1 .511"


def test_fork_allocates_a_page_table_when_the_block_has_one_for_another_vma(bench: Any) -> None:
    """copy_pmd_range(): the entry of the block is not pmd_none(), though the VMA that is copied has no page there."""
    leave_a_table(bench)
    bench.write(0, b"x")
    child = bench.call(commands_process.fork, bench.process)
    assert bench.entry(BLOCK + 5, child) == 0
    assert space(bench, child).tables == {bench.span(BLOCK).start >> PMD_SHIFT}


# ---- migrated, taken


def test_migration_splits_and_maps_the_zero_page_where_nothing_was_written(bench: Any) -> None:
    """split_folio(), then try_to_map_unused_to_zeropage(); only the pages asked for move."""
    bench.write(0, b"x" * 4 * PAGE_SIZE)
    bench.to_device(2, 4)
    assert shown(bench) == "w2 d4 z506 .512"
    assert heard(bench)[:2] == [(Cause.MIGRATE_TO_DEVICE, [(2, 6)]), (Cause.HUGE_PAGE_SPLIT, [(0, 512)])]


def test_migration_splits_in_every_process_and_whatever_it_selects(bench: Any) -> None:
    """remap_page() of a folio that two processes map, though nothing of it is on the device."""
    bench.write(0, b"x")
    child = bench.call(commands_process.fork, bench.process)
    bench.to_system(100, 1)
    assert shown(bench) == shown(bench, process=child) == "r1 z511 .512"


def test_migration_splits_the_huge_zero_page(bench: Any) -> None:
    """Its pages are holes then."""
    bench.read(0, 1)
    bench.to_device(0, 2)
    assert shown(bench) == "d2 z510 .512"


def test_migration_leaves_a_huge_page_when_it_is_pinned(bench: Any) -> None:
    """can_split_folio() is false: nothing is told but the migration."""
    bench.write(0, b"x")
    bench.call(commands_process.pin, bench.process, bench.span(300), write=True)
    bench.to_device(0, 4)
    assert shown(bench) == "W512 .512"
    assert heard(bench) == [(Cause.MIGRATE_TO_DEVICE, [(0, 4)])]


def test_migration_leaves_pages_of_a_folio_that_is_mapped_in_pieces(bench: Any) -> None:
    """migrate_vma_collect_pmd() passes over PageTransCompound()."""
    bench.write(0, b"x")
    protect(bench, 100, 1, Prot.READ)
    migrated = bench.to_device(0, 4)
    assert not migrated.src.any()
    assert shown(bench) == "w100 r1 w411 .512"


def test_exclusive_access_refuses_pages_inside_a_huge_one(bench: Any) -> None:
    """FOLL_SPLIT_PMD, then PageTail()."""
    bench.write(0, b"x")
    assert not bench.call(commands_hmm.make_exclusive, bench.mirror, bench.span(10, 4)).any()
    assert shown(bench) == "w512 .512"
    assert heard(bench) == [(Cause.HUGE_PAGE_SPLIT, [(0, 512)])]


def test_exclusive_access_takes_all_of_a_folio_with_its_first_page(bench: Any) -> None:
    """page_make_device_exclusive_one() walks over the whole folio; each page comes back by itself."""
    bench.write(0, b"x")
    taken = bench.call(commands_hmm.make_exclusive, bench.mirror, bench.span(0, 2))
    assert (taken != 0).tolist() == [True, False]
    assert shown(bench) == "x512 .512"
    assert bench.read(0, 1) == b"x"
    assert shown(bench) == "w1 x511 .512"
    bench.write(3, b"y")
    bench.heard.events.clear()
    taken = bench.call(commands_hmm.make_exclusive, bench.mirror, bench.span(0))
    assert not taken.any()  # it stops at the first page that is taken already, and page 3 stays mapped
    assert shown(bench) == "x3 w1 x508 .512"
    assert (Cause.EXCLUSIVE, [(0, 512)]) in heard(bench)
    assert Reason.EXCLUSIVE is Cause.EXCLUSIVE.told.reason


def test_exclusive_pages_of_a_folio_are_given_back_together(bench: Any) -> None:
    """They all name their holder."""
    bench.write(0, b"x")
    bench.call(commands_hmm.make_exclusive, bench.mirror, bench.span(0))
    assert bench.call(commands_hmm.give_back_exclusive, bench.mirror) == BLOCK
    assert shown(bench) == "w512 .512"


def test_exclusive_access_copies_a_page_of_a_huge_one_that_was_shared(bench: Any) -> None:
    """The block is split before anybody looks whether all of it could be had: small pages can be taken."""
    bench.write(0, b"x")
    child = bench.call(commands_process.fork, bench.process)
    bench.call(commands_process.exit_process, child)
    assert bench.call(commands_hmm.make_exclusive, bench.mirror, bench.span(10, 2)).all()
    assert shown(bench) == "r10 x2 r500 .512"


def test_free_leaves_a_folio_alone_when_a_device_holds_some_of_it(bench: Any) -> None:
    """can_split_folio(): what is exclusive is referenced and not mapped."""
    bench.write(0, b"x")
    bench.call(commands_hmm.make_exclusive, bench.mirror, bench.span(0))
    bench.read(5, 1)
    advise(bench, 5, 1, Advice.FREE)
    assert shown(bench) == "x5 w1 x506 .512"
    assert cpu_pte.is_dirty(bench.entry(5))


# ---- collapsed


def small(bench: Any) -> None:
    """A block with small pages: two written, one of them on the device, one read."""
    protect(bench, 0, 1, Prot.READ)
    advise(bench, 0, BLOCK, Advice.NOHUGEPAGE)
    protect(bench, 0, 1, RW)
    bench.write(3, b"a")
    bench.write(4, b"b")
    bench.read(9, 1)
    bench.to_device(4, 1)
    advise(bench, 0, BLOCK, Advice.HUGEPAGE)
    bench.heard.events.clear()


def test_collapse_makes_one_huge_page_of_what_is_there(bench: Any) -> None:
    """collapse_huge_page(): what is elsewhere comes back first, holes become zeroes, mirrors hear of the block."""
    small(bench)
    assert shown(bench, BLOCK) == ".3 w1 d1 .4 z1 .502"
    advise(bench, 0, BLOCK, Advice.COLLAPSE)
    assert shown(bench) == "W512 .512"
    assert (bench.read(3, 1), bench.read(4, 1), bench.read(9, 1)) == (b"a", b"b", b"\0")
    assert heard(bench)[-1] == (Cause.COLLAPSE, [(0, 512)])
    assert bench.used == 0
    advise(bench, 0, BLOCK, Advice.COLLAPSE)  # SCAN_PMD_MAPPED


def test_collapse_gives_a_child_a_huge_page_of_its_own(bench: Any) -> None:
    """Pages that the parent shares are copied; a block without a writable page stays as it is."""
    bench.write(0, b"x")
    child = bench.call(commands_process.fork, bench.process)
    bench.write(7, b"c", child)
    span = bench.span(0, BLOCK)
    bench.call(commands_process.madvise, child, span.start, span.size_bytes, Advice.COLLAPSE)
    assert shown(bench, process=child) == "W512 .512"
    assert (bench.read(0, 1, child), bench.read(7, 1, child), bench.read(7, 1)) == (b"x", b"c", b"\0")
    assert shown(bench) == "R512 .512"


def refused(bench: Any, at: int, npages: int) -> int | None:
    """The errno of MADV_COLLAPSE, which has changed nothing."""
    before = shown(bench)
    with pytest.raises(HmmError) as raised:
        advise(bench, at, npages, Advice.COLLAPSE)
    assert shown(bench) == before
    return raised.value.errno


def test_collapse_is_refused_where_no_huge_page_can_come(bench: Any) -> None:
    """madvise_collapse_errno(): an untouched VMA or block, a part of a block, pages that nobody may write."""
    assert refused(bench, 0, BLOCK) == errno.EINVAL
    small(bench)
    assert refused(bench, BLOCK, BLOCK) == errno.EINVAL
    assert refused(bench, 1, 8) == errno.EINVAL
    protect(bench, 0, BLOCK, Prot.READ)
    assert refused(bench, 0, BLOCK) == errno.EINVAL


def test_collapse_may_be_tried_again_when_a_page_is_pinned(bench: Any) -> None:
    """is_refcount_suitable()."""
    small(bench)
    bench.call(commands_process.pin, bench.process, bench.span(3), write=True)
    assert refused(bench, 0, BLOCK) == errno.EAGAIN


def test_collapse_of_the_second_block_goes_on_where_the_first_has_no_directory(make_bench: Callable[..., Any]) -> None:
    """madvise_collapse(): SCAN_PMD_NULL (mm_find_pmd()) is passed over, SCAN_PMD_NONE ends it; EINVAL for both."""
    bench = make_bench(frames=8 * BLOCK, thp=Thp.MADVISE, mapped_pages=BLOCK)
    edge = PUD_SIZE // PAGE_SIZE - bench.span(0).start % PUD_SIZE // PAGE_SIZE
    bench.map(3 * BLOCK, at=edge - BLOCK)
    bench.write(edge + 3, b"a")
    with pytest.raises(HmmError) as raised:
        advise(bench, edge - BLOCK, 2 * BLOCK, Advice.COLLAPSE)
    assert raised.value.errno == errno.EINVAL
    assert cpu_pte.is_huge(bench.entry(edge))
    bench.write(edge + 2 * BLOCK - 1, b"b")
    advise(bench, edge, BLOCK, Advice.NOHUGEPAGE)
    bench.call(commands_process.munmap, bench.process, bench.span(edge).start, PMD_SIZE)
    bench.map(BLOCK, at=edge)
    with pytest.raises(HmmError) as raised:
        advise(bench, edge, 2 * BLOCK, Advice.COLLAPSE)
    assert raised.value.errno == errno.EINVAL
    assert not cpu_pte.is_huge(bench.entry(edge + BLOCK))


def test_collapse_is_refused_for_the_first_page_that_is_in_the_way(bench: Any) -> None:
    """hpage_collapse_scan_pmd() looks at one entry after the other: a page missed by a userfaultfd before a pin."""
    small(bench)
    bench.call(commands_process.pin, bench.process, bench.span(3), write=True)
    number = bench.call(commands_userfaultfd.create_userfaultfd, bench.process)
    bench.call(commands_userfaultfd.uffd_register, number, bench.span(0, BLOCK), 1)
    assert refused(bench, 0, BLOCK) == errno.EBUSY


def test_collapse_may_be_tried_again_when_a_device_has_the_first_page_of_a_folio_to_itself(bench: Any) -> None:
    """is_refcount_suitable(): page_make_device_exclusive_one() unmaps a page and keeps its reference."""
    bench.write(0, b"x")
    bench.call(commands_hmm.make_exclusive, bench.mirror, bench.span(0))
    bench.call(commands_process.write_memory, bench.process, bench.span(1).start, b"y")
    bench.heard.events.clear()
    assert refused(bench, 0, BLOCK) == errno.EAGAIN
    assert heard(bench) == []


def test_collapse_tells_nobody_when_no_run_of_frames_is_free(make_bench: Callable[..., Any]) -> None:
    """collapse_huge_page(): alloc_charge_folio() comes before pages are brought in, and before the notifiers."""
    bench = make_bench(frames=BLOCK, memory_pages=8, thp=Thp.MADVISE, mapped_pages=BLOCK)
    bench.write(3, b"ab")
    bench.write(4, b"c")
    bench.to_device(4, 1)
    bench.heard.events.clear()
    assert refused(bench, 0, BLOCK) == errno.ENOMEM
    assert heard(bench) == []


def use(bench: Any) -> MemoryUse:
    """What smaps says of the window."""
    vma = space(bench).vmas.find(bench.span(0).start)
    assert vma is not None
    return memory_use(space(bench), vma)


def test_cold_huge_page_is_old_and_whole(bench: Any) -> None:
    """madvise_cold_or_pageout_pte_range(): pmd_mkold() where all of it is cold and nobody else maps it."""
    bench.write(0, b"x")
    bench.write(BLOCK, b"x")
    advise(bench, 0, BLOCK, Advice.COLD)
    assert shown(bench) == f"W{2 * BLOCK}"
    assert use(bench).referenced == PMD_SIZE


def test_huge_page_that_was_freed_lazily_is_dropped_as_one(bench: Any) -> None:
    """try_to_unmap_one() of a clean one; its page table stays, so that small pages come next.  Seen on 6.18."""
    bench.write(0, b"x")
    advise(bench, 0, BLOCK, Advice.FREE)
    bench.heard.events.clear()
    advise(bench, 0, BLOCK, Advice.PAGEOUT)
    assert shown(bench) == f".{2 * BLOCK}"
    assert [(event.reason, event.spans) for event in bench.heard.events] == [(Reason.CLEAR, (bench.span(0, BLOCK),))]
    bench.write(0, b"y")
    assert shown(bench, 2) == "w1 .1"


def test_huge_page_that_was_freed_lazily_stays_whole_when_a_page_of_it_is_pinned(bench: Any) -> None:
    """__discard_anon_folio_pmd_locked(): references are the folio's, so it goes as one or not at all."""
    bench.write(3, b"x")
    advise(bench, 0, BLOCK, Advice.FREE)
    pin = bench.call(commands_process.pin, bench.process, bench.span(3), write=False)
    advise(bench, 0, BLOCK, Advice.PAGEOUT)
    assert shown(bench) == "W512 .512"
    assert not space(bench).tables  # nothing went page by page
    bench.call(commands_process.unpin, pin)
    advise(bench, 0, BLOCK, Advice.PAGEOUT)
    assert shown(bench) == f".{2 * BLOCK}"


def test_huge_page_that_was_freed_lazily_stays_whole_when_a_page_of_it_is_set_dirty(bench: Any) -> None:
    """__discard_anon_folio_pmd_locked(): a driver's set_page_dirty() while it is told makes the folio dirty."""
    bench.write(3, b"x")
    advise(bench, 0, BLOCK, Advice.FREE)
    frames, pfn = bench.local.machine.frames, cpu_pte.cpu_pfn(bench.entry(3))
    bench.heard.meanwhile = lambda _: frames.set_flags_one(pfn, PageFlag.DIRTY)
    advise(bench, 0, BLOCK, Advice.PAGEOUT)
    assert shown(bench) == "W512 .512"
    assert bench.read(3, 1) == b"x"
    pfns = cpu_pte.cpu_pfn(space(bench).table.read(*edges(bench.span(0, BLOCK))))
    assert frames.test_flags(pfns, PageFlag.DIRTY).all()
    assert frames.test_flags(pfns, PageFlag.SWAPBACKED).all()


def test_populate_makes_no_huge_page_young_that_is_only_read(bench: Any) -> None:
    """touch_pmd(): pmdp_set_access_flags() does nothing unless it is for a write.  Seen on 6.18."""
    bench.write(0, b"x")
    for advice, referenced in ((None, 0), (Advice.POPULATE_READ, 0), (Advice.POPULATE_WRITE, PMD_SIZE)):
        if advice is None:
            bench.call(commands_process.clear_refs, bench.process, 1)
        else:
            advise(bench, 0, BLOCK, advice)
        assert use(bench).referenced == referenced


def test_populate_uses_a_large_folio_as_one(bench: Any) -> None:
    """folio_mark_accessed() of one of its pages marks all that it has, and so does set_page_dirty()."""
    bench.write(0, b"x")
    protect(bench, 0, 1, Prot.READ)
    protect(bench, 0, 1, RW)
    bench.call(commands_process.clear_refs, bench.process, 1)
    advise(bench, 5, 1, Advice.POPULATE_READ)
    assert use(bench).referenced == PMD_SIZE
