"""Hugetlb memory: the pool, reservations, faults, fork, and the calls that must not cut a page."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hmm import commands_device, commands_hmm, commands_process, cpu_pte, range_fault
from hmm.clear_refs import ClearRefs
from hmm.errors import HmmError, OutOfFramesError, Signal
from hmm.events import Cause, Reason
from hmm.limits import Limits
from hmm.local import Local
from hmm.machine import Machine
from hmm.madvise import Advice
from hmm.mremap import MremapFlag
from hmm.units import PAGE_SIZE, PMD_PAGES, PMD_SIZE, PUD_SIZE
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot, VmFlag

BLOCK = PMD_PAGES
RW = Prot.READ | Prot.WRITE
ANONYMOUS = MapFlag.FIXED | MapFlag.ANONYMOUS | MapFlag.HUGETLB
PRIVATE, SHARED = MapFlag.PRIVATE | ANONYMOUS, MapFlag.SHARED | ANONYMOUS


@pytest.fixture
def bench(make_bench: Callable[..., Any]) -> Any:
    """A process on a machine with four huge pages set aside."""
    bench = make_bench(frames=8 * BLOCK)
    assert bench.local.machine.hugetlb.free == 0
    return make_bench(frames=8 * BLOCK, hugetlb_pages=4)


def free(bench: Any) -> tuple[int, int]:
    """Huge pages that nobody uses, and how many of them are reserved; the machine's invariants hold."""
    bench.local.machine.check()
    pool = bench.local.machine.hugetlb
    return pool.free, pool.reserved


def refused(bench: Any, command: Any, *args: Any) -> int | None:
    """The errno of a call that fails."""
    with pytest.raises(HmmError) as raised:
        bench.call(command, bench.process, *args)
    return raised.value.errno


def place(bench: Any, at: int, npages: int) -> tuple[int, int]:
    """Address and length of pages of the window."""
    span = bench.span(at, npages)
    return span.start, span.size_bytes


def test_mmap_reserves_and_faults_take_what_is_reserved(bench: Any) -> None:
    """hugetlb_reserve_pages(); the length is rounded up to huge pages, and maps shows the file."""
    bench.map(BLOCK + 1, flags=PRIVATE)
    assert free(bench) == (4, 2)
    bench.write(3, b"x")
    assert free(bench) == (3, 1)
    assert bench.read(BLOCK, 1) == b"\0"
    entry = bench.entry(BLOCK)
    assert cpu_pte.is_huge(entry)
    assert not cpu_pte.is_writable(entry)  # private: until it is written
    bench.write(BLOCK, b"y")
    assert cpu_pte.is_writable(bench.entry(2 * BLOCK - 1))
    vma = bench.local.machine.process(bench.process).space.vmas.find(bench.span(0).start)
    assert (vma.npages, vma.name) == (2 * BLOCK, "/anon_hugepage (deleted)")
    bench.call(commands_process.munmap, bench.process, *place(bench, 0, 2 * BLOCK))
    assert free(bench) == (4, 0)


def test_mmap_fails_when_the_pool_cannot_keep_its_pages(bench: Any) -> None:
    """ENOMEM when it is made, not when it is touched; without a reservation the touch is SIGBUS."""
    bench.map(3 * BLOCK, flags=PRIVATE)
    other = 4 * BLOCK
    assert refused(bench, commands_process.mmap, *place(bench, other, 2 * BLOCK), RW, PRIVATE) == errno.ENOMEM
    bench.map(2 * BLOCK, at=other, flags=PRIVATE | MapFlag.NORESERVE)
    done = bench.call(commands_process.write_memory, bench.process, bench.span(other).start, b"x" * (PMD_SIZE + 1))
    assert (done.done, done.signal) == (PMD_SIZE, Signal.BUS_ADRERR)
    assert free(bench) == (3, 3)
    bench.call(commands_process.exit_process, bench.process)
    assert free(bench) == (4, 0)


def test_mmap_refuses_what_is_not_of_whole_pages(bench: Any) -> None:
    """hugetlb_get_unmapped_area(); without an address, one that is aligned is found."""
    start, length = place(bench, 1, BLOCK)
    assert refused(bench, commands_process.mmap, start, length, RW, PRIVATE) == errno.EINVAL
    one_gib = MapFlag(30 << 26)
    assert refused(bench, commands_process.mmap, *place(bench, 0, BLOCK), RW, PRIVATE | one_gib) == errno.EINVAL
    flags = PRIVATE & ~MapFlag.FIXED
    mapped = bench.call(commands_process.mmap, bench.process, 0, PAGE_SIZE, RW, flags)
    assert mapped.address % PMD_SIZE == 0


@pytest.mark.parametrize(("at", "npages"), [(1, BLOCK), (0, 1), (BLOCK - 1, 2)])
def test_calls_do_not_cut_a_page(bench: Any, at: int, npages: int) -> None:
    """hugetlb_vm_op_split(): EINVAL, and nothing has changed; __split_vma() asks it before vma_adjust_trans_huge()."""
    bench.map(2 * BLOCK, flags=PRIVATE)
    bench.write(0, b"x")
    bench.heard.events.clear()
    span = place(bench, at, npages)
    assert refused(bench, commands_process.munmap, *span) == errno.EINVAL
    assert refused(bench, commands_process.mprotect, *span, Prot.READ) == errno.EINVAL
    assert refused(bench, commands_process.madvise, *span, Advice.DONTFORK) == errno.EINVAL
    assert not bench.heard.events
    assert bench.read(0, 1) == b"x"
    assert len(bench.local.machine.process(bench.process).space.vmas) == 1


@pytest.mark.parametrize(
    ("command", "argument"),
    [
        (commands_process.munmap, ()),
        (commands_process.mprotect, (Prot.READ,)),
        (commands_process.madvise, (Advice.DONTFORK,)),
        (commands_process.mmap, (RW, MapFlag.PRIVATE | MapFlag.FIXED | MapFlag.ANONYMOUS)),
    ],
)
def test_cut_at_the_start_stays_when_that_at_the_end_is_within_a_page(
    bench: Any, command: Any, argument: tuple[Any, ...]
) -> None:
    """vms_gather_munmap_vmas() and vma_modify() have split there when hugetlb_vm_op_split() refuses the other."""
    bench.map(3 * BLOCK, flags=PRIVATE)
    bench.write(BLOCK, b"x")
    assert refused(bench, command, *place(bench, BLOCK, BLOCK + 1), *argument) == errno.EINVAL
    vmas = bench.local.machine.process(bench.process).space.vmas
    assert [vma.npages for vma in vmas] == [BLOCK, 2 * BLOCK]
    assert len({vma.flags for vma in vmas}) == 1
    assert (bench.read(BLOCK, 1), free(bench)) == (b"x", (3, 2))


def test_cut_in_another_mapping_stays_when_that_at_the_end_is_within_a_page(bench: Any) -> None:
    """vms_gather_munmap_vmas() splits the first VMA, whatever it is; reattach_vmas() puts no VMAs together."""
    bench.map(2, at=BLOCK - 2)
    bench.map(BLOCK, at=BLOCK, flags=PRIVATE)
    assert refused(bench, commands_process.munmap, *place(bench, BLOCK - 1, 2)) == errno.EINVAL
    vmas = bench.local.machine.process(bench.process).space.vmas.overlapping(bench.span(BLOCK - 2, BLOCK + 2))
    assert [vma.npages for vma in vmas] == [1, 1, BLOCK]


def test_mprotect_looks_for_room_before_it_looks_at_pages(make_bench: Callable[..., Any]) -> None:
    """split_vma() returns ENOMEM before it asks may_split(); a cut that there was room for stays."""
    bench = make_bench(frames=8 * BLOCK, hugetlb_pages=4)
    space = bench.local.machine.process(bench.process).space
    space.limits = replace(space.limits, vmas=2)
    bench.map(3 * BLOCK, flags=PRIVATE)
    assert refused(bench, commands_process.mprotect, *place(bench, BLOCK, BLOCK + 1), Prot.READ) == errno.ENOMEM
    assert [vma.npages for vma in space.vmas] == [BLOCK, 2 * BLOCK]
    assert refused(bench, commands_process.mprotect, *place(bench, 1, 1), Prot.READ) == errno.ENOMEM


def test_discard_rounds_down_to_whole_pages(bench: Any) -> None:
    """madvise_dontneed_free_valid_vma(); it must begin with a page."""
    bench.map(2 * BLOCK, flags=PRIVATE)
    bench.write(0, b"x")
    bench.write(BLOCK, b"y")
    bench.call(commands_process.madvise, bench.process, *place(bench, 0, BLOCK + 1), Advice.DONTNEED)
    assert (bench.entry(0), bench.read(BLOCK, 1)) == (0, b"y")
    assert refused(bench, commands_process.madvise, *place(bench, 1, BLOCK), Advice.DONTNEED) == errno.EINVAL
    assert free(bench)[0] == 3


@pytest.mark.parametrize("advice", [Advice.COLD, Advice.PAGEOUT])
def test_pages_are_not_on_the_lists_that_advice_moves_them_in(bench: Any, advice: Advice) -> None:
    """can_madv_lru_vma()."""
    bench.map(BLOCK, flags=PRIVATE)
    assert refused(bench, commands_process.madvise, *place(bench, 0, BLOCK), advice) == errno.EINVAL


def test_mprotect_leaves_writing_to_a_fault(bench: Any) -> None:
    """hugetlb_change_protection() upgrades nothing; the page is its process's own, so the fault copies nothing."""
    bench.map(BLOCK, flags=PRIVATE)
    bench.write(0, b"x")
    before = cpu_pte.cpu_pfn(bench.entry(0))
    for prot in (Prot.READ, RW):
        bench.call(commands_process.mprotect, bench.process, *place(bench, 0, BLOCK), prot)
        assert not cpu_pte.is_writable(bench.entry(0))
    bench.write(0, b"y")
    assert cpu_pte.cpu_pfn(bench.entry(0)) == before


def test_mprotect_tells_of_all_hugetlb_memory_when_nothing_was_touched(bench: Any) -> None:
    """hugetlb_change_protection() asks for no page tables before it tells, unlike change_pud_range()."""
    bench.map(BLOCK, flags=PRIVATE)
    told = len(bench.heard.events)
    bench.call(commands_process.mprotect, bench.process, *place(bench, 0, BLOCK), Prot.READ)
    assert [(event.cause, event.spans) for event in bench.heard.events[told:]] == [
        (Cause.MPROTECT_READ, (bench.span(0, BLOCK),))
    ]


def test_dumps_of_hugetlb_memory_can_be_asked_for(bench: Any) -> None:
    """madvise_vma_behavior(): VM_DONTEXPAND is in VM_SPECIAL, but MADV_DODUMP passes over that for hugetlb memory."""
    bench.map(BLOCK, flags=PRIVATE)
    for advice, expected in (Advice.DONTDUMP, True), (Advice.DODUMP, False):
        bench.call(commands_process.madvise, bench.process, *place(bench, 0, BLOCK), advice)
        (vma,) = bench.local.machine.process(bench.process).space.vmas
        assert vma.has(VmFlag.DONTDUMP) is expected


def test_read_of_shared_hugetlb_memory_leaves_it_dirty(bench: Any) -> None:
    """make_huge_pte() is huge_pte_mkdirty() where the mapping is shared and writable, whatever the access was."""
    bench.map(BLOCK, flags=SHARED)
    bench.map(BLOCK, at=BLOCK, prot=Prot.READ, flags=SHARED)
    bench.read(0, 1)
    bench.read(BLOCK, 1)
    assert [bool(cpu_pte.is_dirty(bench.entry(at))) for at in (0, BLOCK)] == [True, False]


def test_mprotect_makes_shared_hugetlb_memory_writable_when_writes_are_watched(bench: Any) -> None:
    """vma_wants_writenotify(): hugetlb memory does not support soft-dirty tracking."""
    bench.map(BLOCK, prot=Prot.READ, flags=SHARED)
    bench.read(0, 1)
    bench.call(commands_process.clear_refs, bench.process, ClearRefs.SOFT_DIRTY)
    bench.call(commands_process.mprotect, bench.process, *place(bench, 0, BLOCK), RW)
    assert cpu_pte.is_writable(bench.entry(0))


@pytest.mark.parametrize("kind", [PRIVATE, SHARED])
def test_mmap_brings_hugetlb_memory_in_when_it_is_to_be_locked(bench: Any, kind: MapFlag) -> None:
    """do_mmap() populates for the VM_LOCKED that was asked for; mmap_region() clears it by vma_supports_mlock()."""
    bench.map(BLOCK, flags=kind | MapFlag.LOCKED)
    assert cpu_pte.is_huge(bench.entry(0))
    assert not next(iter(bench.local.machine.process(bench.process).space.vmas)).has(VmFlag.LOCKED)


def test_mmap_takes_shared_validate_for_hugetlb_memory(bench: Any) -> None:
    """ksys_mmap_pgoff() makes a file before do_mmap() looks at MAP_TYPE: LEGACY_MAP_MASK has MAP_HUGETLB."""
    bench.map(BLOCK, flags=MapFlag.SHARED_VALIDATE | ANONYMOUS)
    assert next(iter(bench.local.machine.process(bench.process).space.vmas)).has(VmFlag.SHARED)
    assert free(bench) == (4, 1)


def test_child_shares_and_copies_whole_pages(bench: Any) -> None:
    """hugetlb_wp(): mirrors hear of the copied page; a child has no reservation, and gets SIGBUS from an empty pool."""
    bench.map(2 * BLOCK, flags=PRIVATE)
    bench.write(0, b"x")
    child = bench.call(commands_process.fork, bench.process)
    bench.write(0, b"p")
    assert bench.heard.events[-1].cause is Cause.COPY_ON_WRITE
    assert bench.heard.events[-1].spans == (bench.span(0, BLOCK),)
    assert bench.read(0, 1, child) == b"x"
    assert free(bench) == (2, 1)
    bench.map(BLOCK, at=4 * BLOCK, flags=PRIVATE)
    done = bench.call(commands_process.write_memory, child, bench.span(BLOCK).start, b"c")
    assert done.signal is Signal.BUS_ADRERR
    bench.call(commands_process.exit_process, child)
    assert free(bench) == (3, 2)


def test_nobody_hears_of_a_copy_when_the_pool_has_no_page_for_it(bench: Any) -> None:
    """hugetlb_wp() tells of the copy when it has a page: alloc_hugetlb_folio() comes first."""
    bench.map(3 * BLOCK, flags=PRIVATE)
    bench.write(0, b"x" * (2 * PMD_SIZE + 1))
    child = bench.call(commands_process.fork, bench.process)
    bench.attach(bench.device, child)
    bench.heard.events.clear()
    done = bench.call(commands_process.write_memory, bench.process, bench.span(0).start, b"y" * 2 * PMD_SIZE)
    assert (done.done, done.signal) == (PMD_SIZE, Signal.BUS_ADRERR)
    assert [event.spans for event in bench.heard.events] == [(bench.span(0, BLOCK),)]


@pytest.mark.parametrize("long_term", [False, True])
def test_pin_for_reading_copies_a_page_that_a_child_maps(bench: Any, long_term: bool) -> None:
    """gup_must_unshare() in follow_huge_pmd(), hugetlb_wp() for FAULT_FLAG_UNSHARE: EFAULT where there is no page."""
    bench.map(3 * BLOCK, flags=PRIVATE)
    bench.write(0, b"x" * 3 * PMD_SIZE)
    child = bench.call(commands_process.fork, bench.process)
    bench.heard.events.clear()
    before = cpu_pte.cpu_pfn(bench.entry(0))
    bench.call(commands_process.pin, bench.process, bench.span(3, 2), write=False, long_term=long_term)
    assert cpu_pte.cpu_pfn(bench.entry(0)) != before
    assert not cpu_pte.is_writable(bench.entry(0))
    assert [(event.cause, event.spans) for event in bench.heard.events] == [
        (Cause.COPY_ON_WRITE, (bench.span(0, BLOCK),))
    ]
    bench.call(commands_process.pin, child, bench.span(3), write=False, long_term=long_term)
    assert cpu_pte.cpu_pfn(bench.entry(0, child)) == before  # nobody else maps it any more
    with pytest.raises(HmmError) as raised:
        bench.call(commands_process.pin, bench.process, bench.span(2 * BLOCK - 1), write=False, long_term=long_term)
    assert raised.value.errno == errno.EFAULT
    bench.local.machine.check()


def test_mirrors_hear_of_whole_gibibytes_when_processes_may_share_their_tables(bench: Any) -> None:
    """adjust_range_if_pmd_sharing_possible(): not before the first whole GiB of a VMA, and of no private one."""
    gib = PUD_SIZE // PAGE_SIZE
    first = gib - bench.span(0).start // PAGE_SIZE % gib
    flags = MapFlag.NORESERVE
    bench.map(2 * gib, at=first - BLOCK, flags=SHARED | flags)
    bench.map(2 * gib, at=first + 4 * gib, flags=PRIVATE | flags)
    bench.heard.events.clear()

    def told(at: int, npages: int, command: Any = commands_process.madvise, *args: Any) -> list[tuple[Any, Any]]:
        bench.call(command, bench.process, *place(bench, at, npages), *(args or (Advice.DONTNEED,)))
        heard = [(event.reason, event.spans) for event in bench.heard.events]
        bench.heard.events.clear()
        return heard

    assert told(first - BLOCK, BLOCK) == [(Reason.CLEAR, (bench.span(first - BLOCK, BLOCK),))]
    assert told(first - BLOCK, 2 * BLOCK) == [(Reason.CLEAR, (bench.span(first - BLOCK, gib + BLOCK),))]
    assert told(first + BLOCK, BLOCK) == [(Reason.CLEAR, (bench.span(first, gib),))]
    assert told(first + gib, BLOCK) == [(Reason.CLEAR, (bench.span(first + gib, BLOCK),))]
    assert told(first + 5 * gib, BLOCK) == [(Reason.CLEAR, (bench.span(first + 5 * gib, BLOCK),))]
    assert told(first + BLOCK, BLOCK, commands_process.madvise, Advice.REMOVE) == [
        (Reason.CLEAR, (bench.span(first, gib),))
    ]
    move = PMD_SIZE, MremapFlag.MAYMOVE | MremapFlag.FIXED, bench.span(first + 8 * gib).start
    assert told(first + BLOCK, BLOCK, commands_process.mremap, *move)[0] == (
        Reason.CLEAR,
        (bench.span(first, gib),),
    )


def test_shared_mapping_shows_the_same_pages_to_a_child(bench: Any) -> None:
    """They are the file's, which goes with its last mapping."""
    bench.map(BLOCK, flags=SHARED)
    child = bench.call(commands_process.fork, bench.process)
    bench.write(0, b"x")
    assert bench.read(0, 1, child) == b"x"
    assert free(bench) == (3, 0)
    bench.call(commands_process.exit_process, bench.process)
    assert free(bench) == (3, 0)
    bench.call(commands_process.exit_process, child)
    assert free(bench) == (4, 0)


def test_fork_copies_a_page_that_is_pinned(bench: Any) -> None:
    """copy_hugetlb_page_range()."""
    bench.map(BLOCK, flags=PRIVATE)
    bench.write(0, b"x")
    bench.call(commands_process.pin, bench.process, bench.span(7), write=True)
    child = bench.call(commands_process.fork, bench.process)
    assert free(bench) == (2, 0)
    assert cpu_pte.is_writable(bench.entry(0))
    assert bench.read(0, 1, child) == b"x"


def test_mremap_moves_and_shrinks_by_whole_pages(bench: Any) -> None:
    """It does not grow; the new address must be one of a page."""
    bench.map(2 * BLOCK, flags=PRIVATE)
    bench.write(0, b"x")
    move = MremapFlag.MAYMOVE | MremapFlag.FIXED
    old = place(bench, 0, BLOCK)
    assert refused(bench, commands_process.mremap, *old, 2 * PMD_SIZE, 1) == errno.EINVAL
    assert refused(bench, commands_process.mremap, *old, PMD_SIZE, move, bench.span(BLOCK + 1).start) == errno.EINVAL
    bench.call(commands_process.mremap, bench.process, *old, PMD_SIZE, move, bench.span(4 * BLOCK).start)
    assert bench.read(4 * BLOCK, 1) == b"x"
    assert free(bench) == (3, 1)
    assert bench.entry(0) == 0


def test_first_word_counts_when_devices_ask_for_a_hugetlb_page(bench: Any) -> None:
    """hmm_vma_walk_hugetlb_entry() looks at that of the first page that is asked about, and at no other."""
    bench.map(BLOCK, flags=PRIVATE)
    bench.read(0, 1)
    both = range_fault.REQ_FAULT | range_fault.REQ_WRITE

    def fault(*words: int) -> list[int]:
        sequence = bench.call(commands_hmm.read_begin, bench.mirror, bench.notifier)
        asked = bench.mirror, bench.notifier, sequence, bench.span(8, 2), 0, both, np.array(words, np.uint64)
        found = bench.call(commands_hmm.range_fault, *asked).words
        return (found & np.uint64(range_fault.VALID | range_fault.WRITE)).tolist()

    assert fault(0, both) == [range_fault.VALID] * 2
    assert fault(both, 0) == [range_fault.VALID | range_fault.WRITE] * 2


def test_words_have_an_order_when_a_hugetlb_page_is_not_there(bench: Any) -> None:
    """hmm_vma_walk_hugetlb_entry() adds it to whatever the entry is, and a page's place in it; without a table: 0."""
    bench.map(2 * BLOCK, flags=PRIVATE)

    def snapshot() -> list[int]:
        sequence = bench.call(commands_hmm.read_begin, bench.mirror, bench.notifier)
        found: list[int] = bench.call(
            commands_hmm.range_fault, bench.mirror, bench.notifier, sequence, bench.span(8, 2), 0
        ).words.tolist()
        return found

    assert snapshot() == [0, 0]
    bench.read(BLOCK, 1)
    order = 9 << range_fault.ORDER_SHIFT
    assert snapshot() == [order | 8, order | 9]


def test_devices_see_huge_pages_that_cannot_leave(bench: Any) -> None:
    """Order 9; no migration (EINVAL), no exclusive access (check_vma_flags()); of 2015: mapped by small entries."""
    bench.map(BLOCK, flags=PRIVATE)
    sequence = bench.call(commands_hmm.read_begin, bench.mirror, bench.notifier)
    flags = range_fault.REQ_FAULT | range_fault.REQ_WRITE
    words = bench.call(commands_hmm.range_fault, bench.mirror, bench.notifier, sequence, bench.span(8, 2), flags).words
    assert ((words >> np.uint64(range_fault.ORDER_SHIFT)) & np.uint64(31)).tolist() == [9, 9]
    assert (words & np.uint64(range_fault.WRITE)).all()
    with pytest.raises(HmmError) as raised:
        bench.to_device(0, 4)
    assert raised.value.errno == errno.EINVAL
    with pytest.raises(HmmError) as raised:
        bench.call(commands_hmm.make_exclusive, bench.mirror, bench.span(0, 2))
    assert raised.value.errno == errno.EOPNOTSUPP
    old = bench.call(commands_device.register_device, "old")
    mirror = bench.call(commands_device.register_mirror, old, bench.process)
    bench.local.attach(mirror, type(bench.heard)())
    bench.call(commands_device.fault, mirror, (bench.span(0, 8),), write=True, wait=True)
    assert free(bench) == (3, 0)


def test_machine_is_not_made_when_the_pool_does_not_fit() -> None:
    """The pages are set aside at once."""
    with pytest.raises(HmmError) as raised:
        Local(Machine(Limits(frames=2 * BLOCK, device_frames=0, hugetlb_pages=2)))
    assert raised.value.errno == errno.ENOMEM


def test_discarded_page_is_reserved_again_for_the_process_that_reserved_it(bench: Any) -> None:
    """__unmap_hugepage_range(): lest somebody steal it; not without a reservation, nor what a child still maps."""
    bench.map(2 * BLOCK, flags=PRIVATE)
    bench.write(0, b"x")
    assert free(bench) == (3, 1)
    bench.call(commands_process.madvise, bench.process, *place(bench, 0, BLOCK), Advice.DONTNEED)
    assert free(bench) == (4, 2)
    bench.write(0, b"x")
    child = bench.call(commands_process.fork, bench.process)
    bench.call(commands_process.madvise, bench.process, *place(bench, 0, BLOCK), Advice.DONTNEED)
    assert free(bench) == (3, 1)
    bench.call(commands_process.madvise, child, *place(bench, 0, BLOCK), Advice.DONTNEED)
    assert free(bench) == (4, 1)
    bench.map(BLOCK, at=4 * BLOCK, flags=PRIVATE | MapFlag.NORESERVE)
    bench.write(4 * BLOCK, b"x")
    bench.call(commands_process.madvise, bench.process, *place(bench, 4 * BLOCK, BLOCK), Advice.DONTNEED)
    assert free(bench) == (4, 1)


def test_mprotect_does_not_account_hugetlb_memory(bench: Any) -> None:
    """mprotect_fixup(): VM_ACCOUNT does not come with VM_WRITE where VM_HUGETLB is."""
    bench.map(BLOCK, prot=Prot.READ, flags=PRIVATE)
    bench.call(commands_process.mprotect, bench.process, *place(bench, 0, BLOCK), RW)
    assert not next(iter(bench.local.machine.process(bench.process).space.vmas)).has(VmFlag.ACCOUNT)


def test_mapping_over_reserved_pages_uses_their_reservations(bench: Any) -> None:
    """mmap_region() unmaps first; hugetlbfs_file_mmap() reserves then, and leaves a gap when it cannot."""
    bench.map(4 * BLOCK, flags=PRIVATE)
    bench.map(4 * BLOCK, flags=PRIVATE)
    assert free(bench) == (4, 4)
    start, length = place(bench, 3 * BLOCK, 5 * BLOCK)
    assert refused(bench, commands_process.mmap, start, length, RW, PRIVATE) == errno.ENOMEM
    assert free(bench) == (4, 3)
    (vma,) = bench.local.machine.process(bench.process).space.vmas
    assert vma.npages == 3 * BLOCK


def test_fault_fails_with_enomem_and_keeps_the_reservation_when_directories_run_out() -> None:
    """hugetlb_fault(): huge_pte_alloc() comes first, and its failure is VM_FAULT_OOM and not SIGBUS."""
    local = Local(Machine(Limits(frames=4 * BLOCK, hugetlb_pages=2, directories=5)))
    process = local.call(commands_process.create_process, "p")
    starts = [1 << 32, 1 << 40]  # below one directory of the root each
    for start in starts:
        local.call(commands_process.mmap, process, start, PMD_SIZE, RW, PRIVATE)
    local.call(commands_process.write_memory, process, starts[0], b"x")
    with pytest.raises(OutOfFramesError) as caught:
        local.call(commands_process.write_memory, process, starts[1], b"x")
    assert (caught.value.errno, caught.value.address) == (errno.ENOMEM, starts[1])
    pool = local.machine.hugetlb
    assert (pool.free, pool.reserved) == (1, 1)
    local.machine.check()


def test_mincore_asks_the_file_where_there_is_no_directory(bench: Any) -> None:
    """walk_hugetlb_range(): an empty entry is not resident, mincore_hugetlb(); without one it is pte_hole()."""
    bench.map(2 * BLOCK, flags=SHARED)
    bench.write(0, b"x")
    child = bench.call(commands_process.fork, bench.process)  # shared memory is not copied

    def resident() -> str:
        found = bench.call(commands_process.mincore, child, *place(bench, 1, 2 * BLOCK - 1))
        return "".join(str(found[page]) for page in (0, BLOCK - 2, BLOCK - 1, 2 * BLOCK - 2))

    assert resident() == "1100"
    bench.call(commands_process.touch, child, bench.span(BLOCK, BLOCK), write=False)
    assert resident() == "0011"
