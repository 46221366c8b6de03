"""Huge pages that move to a device and back as one, as of Linux 7: COMPOUND."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from blocks import BLOCK, BLOCK_BYTES, RW, advise, heard, move, protect, shown, space, unmap

from hmm import commands_device, commands_failures, commands_hmm, commands_process, cpu_pte, range_fault
from hmm.address_space import Thp
from hmm.clear_refs import ClearRefs
from hmm.commands_hmm import Migrated
from hmm.errors import RangeBusyError
from hmm.events import Cause, EventType, Reason
from hmm.frames import RegionKind
from hmm.madvise import Advice
from hmm.migration import COMPOUND, MIGRATE, VALID, WRITE
from hmm.pagemap import PRESENT, SWAP, pagemap
from hmm.semantics import LINUX_6_12, LINUX_7
from hmm.smaps import memory_use
from hmm.units import PAGE_SIZE
from hmm.vma import Prot

TO_DEVICE, BACK, SPLIT = Cause.MIGRATE_TO_DEVICE, Cause.MIGRATE_TO_SYSTEM, Cause.HUGE_PAGE_SPLIT
DATA = np.arange(1, 1 + BLOCK * PAGE_SIZE // 4, dtype=np.int32).tobytes()


def make_linux_7(make_bench: Callable[..., Any], frames: int = 10 * BLOCK, memory_pages: int = 3 * BLOCK) -> Any:
    """A process that gets huge pages, with two blocks mapped, and a device with memory; room for another device."""
    options = {"thp": Thp.ALWAYS, "mapped_pages": 2 * BLOCK, "more_memory_pages": 2 * BLOCK}
    return make_bench(frames=frames, memory_pages=memory_pages, semantics=LINUX_7, **options)


@pytest.fixture
def bench(make_bench: Callable[..., Any]) -> Any:
    """A process that gets huge pages, with two blocks mapped, and a device with memory for three."""
    return make_linux_7(make_bench)


def to_device(bench: Any, at: int = 0, npages: int = BLOCK, **more: Any) -> Migrated:
    """Migrate pages, huge ones as such."""
    migrated: Migrated = bench.call(
        commands_hmm.migrate_to_device, bench.mirror, bench.span(at, npages), compound=True, **more
    )
    return migrated


def to_system(bench: Any, at: int = 0, npages: int = BLOCK) -> Migrated:
    """And back."""
    migrated: Migrated = bench.call(commands_hmm.migrate_to_system, bench.mirror, bench.span(at, npages), compound=True)
    return migrated


def huge_on_device(bench: Any) -> None:
    """Write a huge page and move it."""
    bench.write(0, DATA)
    to_device(bench)
    assert shown(bench) == "D512 .512"
    bench.heard.events.clear()


def words(bench: Any, at: int, npages: int, mirror: int = 0, flags: int = 0) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """What a range fault says."""
    number = 1
    mirror = mirror or bench.mirror
    sequence = bench.call(commands_hmm.read_begin, mirror, number)
    span = bench.span(at, npages)
    found: np.ndarray[Any, np.dtype[np.uint64]] = bench.call(
        commands_hmm.range_fault, mirror, number, sequence, span, flags
    ).require()
    return found


# ---- there


@pytest.mark.parametrize(("first", "left"), [(True, "D512 .512"), (False, "W512 .512")])
def test_first_page_decides_whether_a_huge_page_gets_a_destination(bench: Any, first: bool, left: str) -> None:
    """Its first word is the huge page's: what stands for the others in `dst` is not looked at, and it stays huge."""
    bench.write(0, DATA)
    wanted = np.full(BLOCK, not first)
    wanted[0] = first
    to_device(bench, wanted=wanted)
    assert shown(bench) == left
    assert bench.read(0, len(DATA)) == DATA


def test_migration_moves_a_huge_page_as_one(bench: Any) -> None:
    """migrate_vma_collect_huge_pmd(): one word with COMPOUND for it, one event, and the entry stays huge."""
    bench.write(0, DATA)
    migrated = to_device(bench)
    assert shown(bench) == "D512 .512"
    assert int(migrated.src[0]) & (VALID | MIGRATE | WRITE | COMPOUND) == VALID | MIGRATE | WRITE | COMPOUND
    assert int(migrated.dst[0]) & (VALID | WRITE | COMPOUND) == VALID | WRITE | COMPOUND
    assert not migrated.src[1:].any()
    assert not migrated.dst[1:].any()
    assert heard(bench) == [(TO_DEVICE, [(0, 512)])]
    assert bench.read(0, len(DATA)) == DATA


def test_migration_splits_when_the_kernel_or_its_driver_is_older(make_bench: Callable[..., Any]) -> None:
    """Without MIGRATE_VMA_SELECT_COMPOUND a huge page is split, and 6.12 knows no such thing."""
    for semantics, compound in ((LINUX_7, False), (LINUX_6_12, True)):
        bench = make_bench(
            frames=10 * BLOCK, memory_pages=BLOCK, thp=Thp.ALWAYS, mapped_pages=2 * BLOCK, semantics=semantics
        )
        bench.write(0, b"x" * BLOCK * PAGE_SIZE)
        bench.call(commands_hmm.migrate_to_device, bench.mirror, bench.span(0, BLOCK), compound=compound)
        assert shown(bench) == "d512 .512"
        assert heard(bench) == [(TO_DEVICE, [(0, 512)]), (SPLIT, [(0, 512)])]


def test_migration_splits_when_it_is_of_a_part(bench: Any) -> None:
    """The block is not in the range: its folio is split, in the range and outside."""
    bench.write(0, b"x" * BLOCK * PAGE_SIZE)
    to_device(bench, 1, BLOCK)
    assert shown(bench) == "w1 d512 .511"


def test_migration_leaves_a_huge_page_that_it_does_not_select(bench: Any) -> None:
    """migrate_vma_collect_skip(), where 6.12 splits it."""
    bench.write(0, b"x")
    bench.to_system(100, 1)
    assert shown(bench) == "W512 .512"
    assert heard(bench) == [(BACK, [(100, 101)])]


def test_migration_splits_a_folio_that_is_mapped_by_page_entries(bench: Any) -> None:
    """migrate_vma_split_folio(), where 6.12 passes over its pages; what holds nothing becomes the zero page."""
    bench.write(0, b"x" * 8 * PAGE_SIZE)
    protect(bench, 100, 1, Prot.READ)
    bench.heard.events.clear()
    to_device(bench, 0, 4)
    assert shown(bench) == "d4 w4 z504 .512"
    assert heard(bench) == [(TO_DEVICE, [(0, 4)]), (SPLIT, [(0, 512)])]


def test_migration_leaves_what_is_behind_a_folio_that_cannot_be_split(bench: Any) -> None:
    """migrate_vma_collect_skip(addr, end): small pages and holes of the block too."""
    bench.write(0, b"x")
    advise(bench, 0, 10, Advice.DONTNEED)
    bench.write(1, b"y")
    advise(bench, 300, 4, Advice.DONTNEED)
    bench.call(commands_process.pin, bench.process, bench.span(400), write=True)
    to_device(bench, 0, 2 * BLOCK)
    assert shown(bench) == "d10 w290 .4 w208 D512"


def test_migration_leaves_a_huge_page_when_it_is_pinned(bench: Any) -> None:
    """It can neither move as one nor be split."""
    bench.write(0, b"x")
    bench.call(commands_process.pin, bench.process, bench.span(300), write=True)
    assert not to_device(bench).src.any()
    assert shown(bench) == "W512 .512"
    assert heard(bench) == [(TO_DEVICE, [(0, 512)])]


def test_migration_makes_one_page_of_a_block_without_a_page_table(bench: Any) -> None:
    """migrate_vma_insert_huge_pmd_page(): a hole as large, a second event, writable as its VMA is."""
    migrated = to_device(bench)
    assert shown(bench) == "D512 .512"
    assert int(migrated.src[0]) == MIGRATE | COMPOUND
    assert heard(bench) == [(TO_DEVICE, [(0, 512)]), (TO_DEVICE, [(0, 512)])]
    protect(bench, BLOCK, BLOCK, Prot.READ)
    to_device(bench, BLOCK)
    assert shown(bench) == "D512 E512"
    assert bench.read(700, 1) == b"\0"


def test_migration_makes_small_pages_where_a_block_has_a_page_table(bench: Any) -> None:
    """pmd_none() is false: each entry is a hole."""
    bench.write(0, b"x")
    advise(bench, 3, 1, Advice.DONTNEED)  # splits the mapping
    advise(bench, 0, BLOCK, Advice.DONTNEED)
    to_device(bench)
    assert shown(bench) == "d512 .512"


def test_migration_makes_huge_pages_of_holes_whatever_the_setting_for_first_touches_is(
    make_bench: Callable[..., Any],
) -> None:
    """migrate_vma_collect_hole() asks for the page table alone, which stays when the pages are discarded."""
    bench = make_bench(frames=4 * BLOCK, memory_pages=2 * BLOCK, mapped_pages=2 * BLOCK, semantics=LINUX_7)
    bench.write(0, b"x")
    advise(bench, 0, 1, Advice.DONTNEED)
    to_device(bench, 0, 2 * BLOCK)
    assert shown(bench) == "d512 D512"
    bench.read(BLOCK, 1)
    assert shown(bench) == "d512 W512"


def test_migration_takes_the_huge_zero_page_for_a_hole(bench: Any) -> None:
    """As one it is replaced; small pages split it first, and those that are not asked for stay zero pages."""
    bench.read(0, 1)
    bench.read(BLOCK, 1)
    bench.heard.events.clear()
    to_device(bench)
    assert shown(bench) == "D512 Z512"
    assert heard(bench) == [(TO_DEVICE, [(0, 512)]), (TO_DEVICE, [(0, 512)])]
    to_device(bench, BLOCK, 2)
    assert shown(bench) == "D512 d2 z510"
    part = [(512, 514)]
    assert heard(bench) == [(TO_DEVICE, part), (TO_DEVICE, part), (SPLIT, [(512, 1024)])]


def test_migration_moves_by_small_pages_when_no_run_of_frames_is_free(make_bench: Callable[..., Any]) -> None:
    """migrate_vma_split_unmapped_folio(): mirrors hear of the split, and as many pages move as there is room for."""
    bench = make_bench(
        frames=10 * BLOCK, memory_pages=BLOCK + 100, thp=Thp.ALWAYS, mapped_pages=3 * BLOCK, semantics=LINUX_7
    )
    bench.write(0, b"x" * 2 * BLOCK * PAGE_SIZE)
    to_device(bench, 0, 2 * BLOCK)
    assert shown(bench) == "D512 d100 w412"
    assert heard(bench) == [(TO_DEVICE, [(0, 1024)]), (SPLIT, [(512, 1024)])]
    assert not to_device(bench, 2 * BLOCK).src.any()  # no frame at all is free: nothing is split
    assert shown(bench) == "D512 d100 w412"


@pytest.mark.parametrize("written", [True, False])
def test_migration_moves_by_small_pages_when_the_allocation_fails(bench: Any, written: bool) -> None:
    """HMM_DMIRROR_FLAG_FAIL_ALLOC fails one allocation, of a page or of a huge one; the next one is fine."""
    if written:
        bench.write(0, b"x" * BLOCK * PAGE_SIZE)
    bench.call(commands_failures.inject_migration_failure, bench.mirror, 1)
    to_device(bench, 0, 2 * BLOCK)
    assert shown(bench) == "d512 D512"
    assert (SPLIT in [cause for cause, _ in heard(bench)]) == written


def test_migration_leaves_one_small_page_when_its_allocation_fails(bench: Any) -> None:
    """To the device that page is passed over; back, the driver stops there."""
    bench.write(0, b"x" * BLOCK * PAGE_SIZE)
    bench.call(commands_failures.inject_migration_failure, bench.mirror, 1)
    to_device(bench, 0, 4)
    assert shown(bench, 6) == "w1 d3 w2"
    bench.call(commands_failures.inject_migration_failure, bench.mirror, 1)
    to_system(bench, 1, 2)
    assert shown(bench, 6) == "w1 d3 w2"
    to_system(bench, 1, 2)
    assert shown(bench, 6) == "w3 d1 w2"
    bench.call(commands_failures.inject_migration_failure, bench.mirror, 1)
    assert bench.read(3, 1) == b"x"  # it is touched again


def test_a_read_only_page_stays_read_only(bench: Any) -> None:
    """The word has no WRITE, and nor has the entry."""
    bench.write(0, b"x")
    protect(bench, 0, BLOCK, Prot.READ)
    assert not int(to_device(bench).src[0]) & WRITE
    assert shown(bench) == "E512 .512"
    bench.read(0, 1)
    assert shown(bench) == "R512 .512"


# ---- and back


def test_touching_one_page_brings_the_huge_page_back(bench: Any) -> None:
    """do_huge_pmd_device_private(): one event of all of it, and one that tells its driver to stop."""
    huge_on_device(bench)
    bench.write(5, b"y")
    assert shown(bench) == "W512 .512"
    events = bench.heard.events
    assert [event.etype for event in events] == [EventType.MIGRATE, EventType.COPY_FROM_DEVICE]
    assert [(event.cause, event.initiator) for event in events] == [(BACK, bench.mirror)] * 2
    assert all(event.spans == (bench.span(0, BLOCK),) for event in events)
    assert bench.read(0, 5 * PAGE_SIZE) == DATA[: 5 * PAGE_SIZE]
    assert bench.used == 0


def test_touching_comes_back_by_small_pages_when_no_run_is_free(make_bench: Callable[..., Any]) -> None:
    """As when the driver cannot allocate a large folio: it is split once it is unmapped."""
    bench = make_linux_7(make_bench, 2 * BLOCK, BLOCK)
    bench.write(0, DATA)
    to_device(bench)
    advise(bench, BLOCK, BLOCK, Advice.NOHUGEPAGE)
    for page in range(BLOCK, BLOCK + 300):
        bench.write(page, b"z")
    bench.heard.events.clear()
    assert bench.read(0, len(DATA)) == DATA
    assert shown(bench) == "w812 .212"
    assert SPLIT in [cause for cause, _ in heard(bench)]


def test_touching_comes_back_by_small_pages_when_the_allocation_fails(bench: Any) -> None:
    """The flag of the mirror that put the page there counts."""
    huge_on_device(bench)
    bench.call(commands_failures.inject_migration_failure, bench.mirror, 1)
    assert bench.read(0, len(DATA)) == DATA
    assert shown(bench) == "w512 .512"


def test_migration_back_moves_a_huge_page_as_one(bench: Any) -> None:
    """One word, and its driver, which asked, hears no copy."""
    huge_on_device(bench)
    migrated = to_system(bench)
    assert shown(bench) == "W512 .512"
    assert np.count_nonzero(migrated.src) == np.count_nonzero(migrated.dst) == 1
    assert heard(bench) == [(BACK, [(0, 512)])]
    huge_on_device(bench)
    to_system(bench, 3, 4)
    assert shown(bench) == "d3 w4 d505 .512"
    assert heard(bench) == [(BACK, [(3, 7)]), (SPLIT, [(0, 512)])]
    assert bench.read(0, len(DATA)) == DATA


def test_pages_of_a_folio_that_is_mapped_by_page_entries_come_back_one_by_one(bench: Any) -> None:
    """migrate_vma_split_folio() of what was partly unmapped: mirrors hear of all that is left of it."""
    huge_on_device(bench)
    unmap(bench, 0, BLOCK // 2)
    assert shown(bench) == ".256 d256 .512"
    assert bench.used == BLOCK // 2
    bench.heard.events.clear()
    assert bench.read(300, 8) == DATA[300 * PAGE_SIZE :][:8]
    assert shown(bench) == ".256 d44 w1 d211 .512"
    assert [cause for cause, _ in heard(bench)] == [BACK, SPLIT, BACK]


def test_eviction_keeps_a_huge_page_whole(bench: Any) -> None:
    """dmirror_device_evict_chunk(): COMPOUND for what is a large folio, wherever it is mapped."""
    huge_on_device(bench)
    child = bench.call(commands_process.fork, bench.process)
    assert shown(bench) == shown(bench, process=child) == "E512 .512"
    assert bench.call(commands_hmm.evict_device, bench.device) == BLOCK
    assert shown(bench) == shown(bench, process=child) == "R512 .512"
    assert bench.read(0, len(DATA), child) == DATA
    assert bench.used == 0


def test_eviction_splits_when_no_run_is_free(make_bench: Callable[..., Any]) -> None:
    """The kernel's driver cannot yet; ours moves the pages one by one."""
    bench = make_linux_7(make_bench, 2 * BLOCK, BLOCK)
    bench.write(0, DATA)
    to_device(bench)
    advise(bench, BLOCK, BLOCK, Advice.NOHUGEPAGE)
    for page in range(BLOCK, BLOCK + 300):
        bench.write(page, b"z")
    assert bench.call(commands_hmm.evict_device, bench.device) == BLOCK
    assert shown(bench) == "w812 .212"
    assert bench.read(0, len(DATA)) == DATA


def test_making_room_moves_whole_huge_pages_out(make_bench: Callable[..., Any]) -> None:
    """What went there longest ago; the device has room for one."""
    bench = make_linux_7(make_bench)
    card = bench.call(commands_device.register_device, "evicting", memory_pages=BLOCK, evicts=True)
    mirror, _ = bench.attach(card, bench.process)
    bench.write(0, DATA)
    bench.call(commands_hmm.migrate_to_device, mirror, bench.span(0, BLOCK), compound=True)
    assert shown(bench) == "D512 .512"
    bench.call(commands_hmm.migrate_to_device, mirror, bench.span(BLOCK, 8), compound=True)
    assert shown(bench) == "W512 d8 .504"
    bench.call(commands_hmm.migrate_to_device, mirror, bench.span(0, BLOCK), compound=True)
    assert shown(bench) == "D512 w8 .504"


def test_huge_page_counts_as_written_when_its_device_had_no_room(make_bench: Callable[..., Any]) -> None:
    """remove_migration_pmd(): pmd_mkdirty() comes last and makes it soft-dirty; remove_migration_pte() undoes that."""
    bench = make_linux_7(make_bench, memory_pages=1)
    bench.map(2, at=4 * BLOCK)
    bench.write(4 * BLOCK, bytes(2 * PAGE_SIZE))
    to_device(bench, 4 * BLOCK, 1)
    bench.write(0, DATA)
    bench.call(commands_process.clear_refs, bench.process, ClearRefs.SOFT_DIRTY)
    for at, npages in ((0, BLOCK), (4 * BLOCK + 1, 1)):
        assert not to_device(bench, at, npages).src[0] & np.uint64(MIGRATE)
    assert shown(bench) == "R512 .512"
    assert bench.entry(0) & cpu_pte.SOFT_DIRTY
    assert not bench.entry(4 * BLOCK + 1) & cpu_pte.SOFT_DIRTY


# ---- looked at


def test_snapshot_shows_the_order_of_the_own_huge_page(bench: Any) -> None:
    """hmm_vma_handle_absent_pmd(): VALID, order 9; of another device's it is ERROR, where a small page is 0."""
    huge_on_device(bench)
    found = words(bench, 10, 20)
    order = 9 << range_fault.ORDER_SHIFT
    assert (found & np.uint64(order | range_fault.VALID | range_fault.WRITE)).tolist() == [
        order | range_fault.VALID | range_fault.WRITE
    ] * 20
    first = cpu_pte.cpu_pfn(bench.entry(0))
    assert range_fault.word_pfns(found).tolist() == list(range(first + 10, first + 30))
    card = bench.call(commands_device.register_device, "other", memory_pages=8)
    other, _ = bench.attach(card, bench.process)
    assert words(bench, 10, 20, other).tolist() == [range_fault.ERROR] * 20
    with pytest.raises(RangeBusyError):
        words(bench, 10, 1, other, range_fault.REQ_FAULT)  # it comes back
    assert shown(bench) == "W512 .512"


def test_pagemap_shows_swap(bench: Any) -> None:
    """The swap bit and not the present bit, for every page."""
    huge_on_device(bench)
    found = pagemap(space(bench), bench.span(0, BLOCK))
    assert ((found & np.uint64(SWAP | PRESENT)) == np.uint64(SWAP)).all()


def test_coherent_huge_page_is_used_by_the_cpu_where_it_is(bench: Any) -> None:
    """It is present; its own driver moves it back as one, and nobody else selects it."""
    card = bench.call(commands_device.register_device, "coherent", memory_pages=BLOCK, kind=RegionKind.DEVICE_COHERENT)
    mirror, _ = bench.attach(card, bench.process)
    bench.write(0, DATA)
    bench.call(commands_hmm.migrate_to_device, mirror, bench.span(0, BLOCK), compound=True)
    assert shown(bench) == "W512 .512"
    first = cpu_pte.cpu_pfn(bench.entry(0))
    assert bench.read(0, len(DATA)) == DATA
    assert not to_device(bench).src.any()
    assert cpu_pte.cpu_pfn(bench.entry(0)) == first
    bench.call(commands_hmm.migrate_to_system, mirror, bench.span(0, BLOCK), compound=True)
    assert shown(bench) == "W512 .512"
    assert cpu_pte.cpu_pfn(bench.entry(0)) != first


# ---- changed while it is there


def test_child_shares_a_huge_page_on_the_device(bench: Any) -> None:
    """copy_huge_pmd(): both entries are read-only; one touch brings it back for both, the other hears CLEAR of it."""
    huge_on_device(bench)
    child = bench.call(commands_process.fork, bench.process)
    _, heard_by_child = bench.attach(bench.device, child)
    bench.heard.events.clear()
    assert bench.read(0, 1, child) == DATA[:1]
    assert shown(bench) == shown(bench, process=child) == "R512 .512"
    assert bench.heard.reasons == [Reason.CLEAR, None]
    assert heard_by_child.reasons == [Reason.MIGRATE]
    bench.write(3, b"p")
    assert shown(bench) == "r3 w1 r508 .512"
    assert bench.read(3, 1, child) == DATA[3 * PAGE_SIZE :][:1]


def test_mprotect_makes_it_read_only_or_splits_it(bench: Any) -> None:
    """change_huge_pmd() takes WRITE; a part is cut out first, and the mapping alone is split."""
    huge_on_device(bench)
    protect(bench, 0, BLOCK, RW | Prot.EXEC)
    assert shown(bench) == "E512 .512"
    protect(bench, 10, 1, Prot.READ)
    assert shown(bench) == "d512 .512"
    assert bench.used == BLOCK


def test_mremap_moves_it_as_it_is_or_splits_it(bench: Any) -> None:
    """move_huge_pmd()."""
    huge_on_device(bench)
    move(bench, 0, BLOCK, BLOCK)
    assert shown(bench) == ".512 D512"
    move(bench, BLOCK, 256, 0)
    assert shown(bench) == "d256 .512 d256"
    assert bench.read(0, 1) == DATA[:1]


@pytest.mark.parametrize("advice", [Advice.FREE, Advice.COLD, Advice.PAGEOUT])
def test_advice_that_is_about_present_pages_leaves_it_alone(bench: Any, advice: Advice) -> None:
    """madvise_free_huge_pmd() and the others pass over what is not present, of all of it or of a part."""
    huge_on_device(bench)
    advise(bench, 0, BLOCK, advice)
    advise(bench, 3, 5, advice)
    assert shown(bench) == "D512 .512"
    assert bench.read(0, len(DATA)) == DATA


def test_dontneed_frees_all_of_it_or_a_part(bench: Any) -> None:
    """zap_huge_pmd(), or after a split of the mapping zap_pte_range()."""
    huge_on_device(bench)
    advise(bench, 10, 2, Advice.DONTNEED)
    assert shown(bench) == "d10 .2 d500 .512"
    assert bench.used == BLOCK - 2
    advise(bench, 0, BLOCK, Advice.DONTNEED)
    assert bench.used == 0


def test_exclusive_access_brings_all_of_it_back(bench: Any) -> None:
    """get_user_pages(FOLL_WRITE | FOLL_SPLIT_PMD): a touch, and then the mapping is split; any page can be taken."""
    huge_on_device(bench)
    assert bench.call(commands_hmm.make_exclusive, bench.mirror, bench.span(10, 4)).all()
    assert shown(bench) == "w10 x4 w498 .512"
    assert bench.used == 0


def test_splitting_a_folio_gives_back_what_a_device_has_to_itself(bench: Any) -> None:
    """try_to_migrate_one() of today takes exclusive entries too, and they come back read-only, as mapped entries."""
    bench.write(0, DATA)
    assert bench.call(commands_hmm.make_exclusive, bench.mirror, bench.span(10, 4)).all()
    bench.heard.events.clear()
    to_device(bench, 0, 2)
    assert shown(bench) == "d2 w8 r4 w498 .512"
    assert heard(bench) == [(TO_DEVICE, [(0, 2)]), (SPLIT, [(0, 512)])]
    bench.write(11, DATA[11 * PAGE_SIZE :][:8])
    assert heard(bench) == []
    assert bench.read(0, len(DATA)) == DATA


def test_soft_dirty_bit_stays_as_it_is_but_when_it_is_write_protected(bench: Any) -> None:
    """Its entry is no migration entry: clear_soft_dirty_pmd() and move_soft_dirty_pmd() leave its bit alone.

    copy_huge_non_present_pmd() gives it to the child, and only change_non_present_huge_pmd() forgets it.
    """

    def bit(at: int = 0, process: int = 0) -> bool:
        return bool(bench.entry(at, process) & cpu_pte.SOFT_DIRTY)

    huge_on_device(bench)
    bench.call(commands_process.clear_refs, bench.process, ClearRefs.SOFT_DIRTY)
    assert bit()
    child = bench.call(commands_process.fork, bench.process)
    assert (bit(), bit(0, child)) == (True, True)
    bench.call(commands_process.exit_process, child)
    to_system(bench)
    bench.write(0, DATA)
    to_device(bench)
    protect(bench, 0, BLOCK, Prot.READ)
    assert shown(bench) == "E512 .512"
    assert not bit()
    move(bench, 0, BLOCK, BLOCK)
    assert shown(bench) == ".512 E512"
    assert not bit(BLOCK)


def test_smaps_counts_it_as_shared(bench: Any) -> None:
    """smaps_pmd_entry() takes small pages of devices for present, and not huge ones: maybe shared."""
    huge_on_device(bench)
    (vma, *_) = space(bench).vmas
    use = memory_use(space(bench), vma)
    assert (use.rss, use.pss, use.anon_huge) == (BLOCK_BYTES,) * 3
    assert use.private_dirty + use.private_clean == 0


def test_collapse_is_refused(bench: Any) -> None:
    """check_pmd_state(): SCAN_NO_PTE_TABLE."""
    huge_on_device(bench)
    with pytest.raises(Exception, match="device's memory"):
        advise(bench, 0, BLOCK, Advice.COLLAPSE)
    assert shown(bench) == "D512 .512"


def test_exit_frees_it(bench: Any) -> None:
    """exit_mmap()."""
    huge_on_device(bench)
    bench.call(commands_process.exit_process, bench.process)
    bench.local.machine.check()
    assert bench.used == 0
