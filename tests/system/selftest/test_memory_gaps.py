"""What the kernel's own selftest leaves out of memory management: cases for its gaps, in both variants.

**Source**: Linux mm/swapfile.c, mm/vmscan.c, mm/ksm.c, mm/memory-failure.c, mm/oom_kill.c, fs/proc/task_mmu.c, 6.12.

**Absent**: gaps of the driver's commands (test_gaps.py).
"""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest
from selftest_rig import RW, SHARED, Mirror, failed, ints, ramp, succeeded

from hmm import pagemap
from hmm.clear_refs import ClearRefs
from hmm.errors import RangeBusyError, SegmentationFault, Signal
from hmm.events import Event, Reason
from hmm.ksm import KsmPass
from hmm.madvise import Advice
from hmm.units import PAGE_SIZE
from hmm.vma import Prot
from hmm_client.drivers.dmirror import Card
from hmm_client.harness import Harness

FOUR = 4 * PAGE_SIZE


def scan_ksm(rig: Any) -> KsmPass:
    """Merge equal pages."""
    done: KsmPass = rig.client.loop.run(Harness(rig.client.aio).scan_ksm())
    return done


def words(rig: Any, a: int, npages: int, bit: int) -> str:
    """For each page, whether /proc/PID/pagemap has a bit set."""
    found = rig.process.pagemap(rig.span(a, npages)).tolist()
    return "".join("x" if word & bit else "-" for word in found)


def lost(rig: Any, a: int) -> None:
    """Check that a touch of a page is SIGBUS."""
    with pytest.raises(SegmentationFault) as fault:
        rig.process.read(a, 1)
    assert (fault.value.signal, fault.value.address) == (Signal.BUS_POISON, a)


# ---- swap


def test_mirrored_page_goes_to_swap_and_comes_back_for_the_device(hmm: Any) -> None:
    """try_to_unmap() tells CLEAR; a snapshot shows nothing and brings nothing in, a device fault does."""
    a = hmm.map(4)
    hmm.store(a, ramp(4))
    succeeded(hmm.mirror.read(a, 4), 4, ramp(4), faults=1)
    hmm.process.madvise(a, FOUR, Advice.PAGEOUT)
    assert hmm.mirror.heard(a) == [("CLEAR", [(0, 4)])]
    assert hmm.snapshot(a, 4) == [0] * 4
    assert words(hmm, a, 4, pagemap.SWAP) == "xxxx"
    succeeded(hmm.mirror.read(a, 4), 4, ramp(4), faults=1)
    assert hmm.mirror.heard(a) == []
    assert hmm.snapshot(a, 4) == [0x02] * 4  # pte_swp_exclusive(): it is this process's alone, as before


def test_page_in_swap_is_written_by_the_device(hmm: Any) -> None:
    """hmm_vma_fault() with a write: do_swap_page() makes it writable at once."""
    a = hmm.map(4)
    hmm.store(a, ramp(4))
    hmm.process.madvise(a, FOUR, Advice.PAGEOUT)
    succeeded(hmm.mirror.write(a, (-ramp(4)).tobytes()), 4, faults=1)
    assert np.array_equal(hmm.load(a, 4), -ramp(4))


def test_page_in_swap_stays_there_when_it_is_to_move(hmm: Any) -> None:
    """migrate_vma_collect_pmd() selects no swap entry; the next touch makes it movable."""
    a = hmm.map(4)
    hmm.store(a, ramp(4))
    hmm.process.madvise(a, FOUR, Advice.PAGEOUT)
    failed(errno.ENOENT, hmm.mirror.migrate_to_device, a, 4)
    assert words(hmm, a, 4, pagemap.SWAP) == "xxxx"
    assert np.array_equal(hmm.load(a, 4), ramp(4))
    succeeded(hmm.mirror.migrate_to_device(a, 4), 4, ramp(4))


def test_page_on_a_device_is_not_put_out(hmm: Any) -> None:
    """madvise_cold_or_pageout_pte_range() passes over what is not present, and over a device's frames."""
    a = hmm.map(4)
    hmm.store(a, ramp(4))
    succeeded(hmm.mirror.migrate_to_device(a, 4), 4, ramp(4))
    hmm.mirror.events.clear()
    hmm.process.madvise(a, FOUR, Advice.PAGEOUT)
    assert hmm.mirror.heard(a) == []
    assert hmm.snapshot(a, 4) == [0x42 if hmm.coherent else 0x22] * 4


# ---- KSM


def test_mirror_hears_of_pages_that_are_merged(hmm: Any) -> None:
    """write_protect_page() and replace_page(): CLEAR; the device reads what is shared, and a write of it copies."""
    a = hmm.map(4)
    hmm.store(a, np.zeros(4 * PAGE_SIZE // 4, np.int32))
    hmm.process.madvise(a, FOUR, Advice.MERGEABLE)
    succeeded(hmm.mirror.write(a, bytes(FOUR)), 4)
    hmm.mirror.events.clear()
    assert scan_ksm(hmm).sharing == 3
    assert hmm.mirror.heard(a) == [("CLEAR", [(0, 4)])]
    succeeded(hmm.mirror.read(a, 4), 4, np.zeros(4 * PAGE_SIZE // 4, np.int32), faults=1)
    assert hmm.snapshot(a, 4) == [0x01] * 4
    succeeded(hmm.mirror.write(a, ramp(1).tobytes()), 1, faults=1)
    assert hmm.mirror.heard(a) == [("CLEAR", [(0, 1)])]
    assert hmm.snapshot(a, 4) == [0x02, 0x01, 0x01, 0x01]
    assert not hmm.load(a + PAGE_SIZE, 3).any()


def test_merged_pages_move_to_the_device_and_back(hmm: Any) -> None:
    """folio_trylock() fails where the page is met again: one is selected, and all its mappings move with it."""
    a = hmm.map(4)
    hmm.store(a, np.ones(4 * PAGE_SIZE // 4, np.int32))
    hmm.process.madvise(a, FOUR, Advice.MERGEABLE)
    scan_ksm(hmm)
    failed(errno.ENOENT, hmm.mirror.migrate_to_device, a, 4)
    assert hmm.snapshot(a, 4) == [0x41 if hmm.coherent else 0x21] * 4
    hmm.store(a, ramp(1))
    assert np.array_equal(hmm.load(a, 1), ramp(1))
    assert (hmm.load(a + PAGE_SIZE, 3) == 1).all()


def test_unmerged_pages_are_told_of_and_copied(hmm: Any) -> None:
    """MADV_UNMERGEABLE: break_ksm() for each page."""
    a = hmm.map(4)
    hmm.store(a, np.ones(4 * PAGE_SIZE // 4, np.int32))
    hmm.process.madvise(a, FOUR, Advice.MERGEABLE)
    scan_ksm(hmm)
    hmm.mirror.events.clear()
    hmm.process.madvise(a, FOUR, Advice.UNMERGEABLE)
    assert ("CLEAR", [(0, 4)]) in hmm.mirror.heard(a)
    assert hmm.snapshot(a, 4) == [0x01] * 4
    assert words(hmm, a, 4, pagemap.MMAP_EXCLUSIVE) == "xxxx"


# ---- hwpoison


def test_lost_page_is_an_error_for_cpu_and_device(hmm: Any) -> None:
    """CLEAR; SIGBUS for the CPU; nothing in a snapshot, EFAULT for READ and WRITE; it neither moves nor is taken."""
    a = hmm.map(4)
    hmm.store(a, ramp(4))
    succeeded(hmm.mirror.read(a, 4), 4, ramp(4))
    hmm.mirror.events.clear()
    hmm.process.madvise(a + PAGE_SIZE, PAGE_SIZE, Advice.HWPOISON)
    assert hmm.mirror.heard(a) == [("CLEAR", [(1, 2)])]
    lost(hmm, a + PAGE_SIZE)
    assert hmm.snapshot(a, 4) == [0x02, 0, 0x02, 0x02]
    failed(errno.EFAULT, hmm.mirror.read, a, 4)
    failed(errno.EFAULT, hmm.mirror.write, a, ramp(4).tobytes())
    failed(errno.EBUSY, hmm.mirror.exclusive, a, 4)  # and the page before it is taken all the same
    failed(errno.ENOENT, hmm.mirror.migrate_to_device, a, 4)
    local = 0x42 if hmm.coherent else 0x22
    assert hmm.snapshot(a, 4) == [0, 0, local, local]
    hmm.unmap(a + PAGE_SIZE, 1)
    assert np.array_equal(hmm.load(a, 1), ramp(1))


def test_page_that_changes_its_frame_is_faulted_in_again(hmm: Any) -> None:
    """CLEAR before it goes; the device finds it elsewhere, and goes on.  A page of coherent memory cannot move: EIO."""
    a = hmm.map(4)
    hmm.store(a, ramp(4))
    succeeded(hmm.mirror.read(a, 4), 4, ramp(4), faults=1)
    hmm.mirror.events.clear()
    hmm.process.madvise(a + PAGE_SIZE, 2 * PAGE_SIZE, Advice.SOFT_OFFLINE)
    assert hmm.mirror.heard(a) == [("CLEAR", [(1, 3)])]
    succeeded(hmm.mirror.read(a, 4), 4, ramp(4), faults=1)
    succeeded(hmm.mirror.migrate_to_device(a, 1), 1, ramp(1))
    if hmm.coherent:
        failed(errno.EIO, hmm.process.madvise, a, PAGE_SIZE, Advice.SOFT_OFFLINE)
    else:
        hmm.process.madvise(a, PAGE_SIZE, Advice.SOFT_OFFLINE)
    assert hmm.snapshot(a, 4) == [0x42 if hmm.coherent else 0x02, *[0x02] * 3]
    assert np.array_equal(hmm.load(a, 4), ramp(4))


def test_page_on_a_device_fails_where_the_kernel_can_tell(hmm: Any) -> None:
    """A private page is faulted back, and lost there; of coherent memory mf_generic_kill_procs() is ENXIO."""
    a = hmm.map(2)
    hmm.store(a, ramp(2))
    succeeded(hmm.mirror.migrate_to_device(a, 2), 2, ramp(2))
    if hmm.coherent:
        failed(errno.ENXIO, hmm.process.madvise, a, PAGE_SIZE, Advice.HWPOISON)
        assert np.array_equal(hmm.load(a, 2), ramp(2))
    else:
        hmm.process.madvise(a, PAGE_SIZE, Advice.HWPOISON)
        lost(hmm, a)
        assert hmm.snapshot(a, 2) == [0, 0x22]


def test_lost_page_is_lost_to_child_and_mirror_of_the_child(hmm: Any) -> None:
    """fork shares the page, rmap_walk() finds both, and both mirrors are told."""
    a = hmm.map(2)
    hmm.store(a, ramp(2))
    child = hmm.process.fork()
    mirror = hmm.open(hmm.mirror.card, child)
    succeeded(mirror.read(a, 2), 2, ramp(2))
    hmm.mirror.events.clear()
    hmm.process.madvise(a, PAGE_SIZE, Advice.HWPOISON)
    assert (hmm.mirror.heard(a), mirror.heard(a)) == ([("CLEAR", [(0, 1)])],) * 2
    failed(errno.EFAULT, mirror.read, a, 2)
    with pytest.raises(SegmentationFault):
        child.read(a, 1)
    mirror.close()
    child.exit()


# ---- SOFT_DIRTY


def test_device_writes_are_seen_by_who_watches(hmm: Any) -> None:
    """clear_refs_write() tells SOFT_DIRTY of everything; reads leave the bit, a write faults again and sets it."""
    a = hmm.map(4)
    hmm.store(a, ramp(4))
    succeeded(hmm.mirror.write(a, ramp(4).tobytes()), 4)
    hmm.mirror.events.clear()
    hmm.process.clear_refs(ClearRefs.SOFT_DIRTY)
    ((reason, ((first, _),)),) = hmm.mirror.heard(0)
    assert (reason, first) == ("SOFT_DIRTY", 0)
    succeeded(hmm.mirror.read(a, 4), 4, ramp(4), faults=1)
    assert hmm.snapshot(a, 4) == [0x01] * 4
    assert words(hmm, a, 4, pagemap.SOFT_DIRTY) == "----"
    succeeded(hmm.mirror.write(a + PAGE_SIZE, ramp(1).tobytes()), 1, faults=1)
    assert words(hmm, a, 4, pagemap.SOFT_DIRTY) == "-x--"


def test_device_writes_to_shared_memory_are_seen_by_who_watches(hmm: Any) -> None:
    """vma_wants_writenotify(): a read fault leaves watched shared memory read-only, for devices as for the CPU."""
    a = hmm.map(4, flags=SHARED)
    hmm.store(a, ramp(4))
    hmm.process.clear_refs(ClearRefs.SOFT_DIRTY)
    hmm.process.madvise(a, FOUR, Advice.DONTNEED)
    succeeded(hmm.mirror.read(a, 4), 4, ramp(4), faults=1)
    assert hmm.snapshot(a, 4) == [0x01] * 4
    succeeded(hmm.mirror.write(a, ramp(1, 5).tobytes()), 1, faults=1)
    assert words(hmm, a, 4, pagemap.SOFT_DIRTY) == "x---"


def test_exclusive_page_counts_as_written_when_it_comes_back(hmm: Any) -> None:
    """restore_exclusive_pte(): pte_mkdirty(), as the device may have written."""
    a = hmm.map(4)
    hmm.store(a, ramp(4))
    succeeded(hmm.mirror.exclusive(a, 4), 4, ramp(4))
    hmm.process.clear_refs(ClearRefs.SOFT_DIRTY)
    assert words(hmm, a, 4, pagemap.SOFT_DIRTY) == "----"
    hmm.load(a, 2)
    assert words(hmm, a, 4, pagemap.SOFT_DIRTY) == "xx--"


def test_soft_dirty_goes_with_a_page_to_the_device_and_back(hmm: Any) -> None:
    """migrate_vma_collect_pmd(), remove_migration_pte(): pte_swp_mksoft_dirty() carries the bit."""
    a = hmm.map(4)
    hmm.store(a, ramp(4))
    hmm.process.clear_refs(ClearRefs.SOFT_DIRTY)
    hmm.store(a, ramp(1))
    succeeded(hmm.mirror.migrate_to_device(a, 4), 4, ramp(4))
    assert words(hmm, a, 4, pagemap.SOFT_DIRTY) == "x---"
    hmm.load(a, 4)
    assert words(hmm, a, 4, pagemap.SOFT_DIRTY) == "x---"


# ---- invalidation that may not block


class BusyMirror(Mirror):
    """A driver that holds its lock: mutex_trylock() fails, and dmirror_interval_invalidate() returns false."""

    def __init__(self, card: Card, process_id: int) -> None:
        self.locked = True
        super().__init__(card, process_id)

    def update(self, event: Event) -> None:
        """Give nothing up while it would have to wait for the lock."""
        if self.locked and not event.blockable:
            raise BlockingIOError(errno.EAGAIN, "the lock is taken")
        super().update(event)


def test_reaping_is_refused_while_the_driver_holds_its_lock(hmm: Any) -> None:
    """mn_itree_inv_start_range(): EAGAIN and nothing is unmapped; when the lock is free the private memory goes."""
    process = hmm.client.create_process("killed")
    mirror = BusyMirror(hmm.mirror.card, process.id)
    a = process.mmap(FOUR).address
    process.write(a, ramp(4).tobytes())
    succeeded(mirror.read(a, 4), 4, ramp(4))
    mirror.events.clear()
    with pytest.raises(RangeBusyError) as refused:
        process.mrelease()
    assert refused.value.errno == errno.EAGAIN
    assert mirror.events == []
    assert np.array_equal(ints(process.read(a, FOUR)), ramp(4))
    mirror.locked = False
    process.mrelease()
    assert [(event.reason, event.blockable) for event in mirror.events] == [(Reason.UNMAP, False)]
    with pytest.raises(SegmentationFault):
        process.read(a, 1)
    mirror.close()
    process.exit()


# ---- protection and advice that tell of more or less than they change


def test_mirror_hears_nothing_where_nothing_changes(hmm: Any) -> None:
    """mprotect to what it is, an untouched gigabyte, hints: change_pud_range() and madvise tell nobody."""
    a = hmm.map(4)
    hmm.store(a, ramp(4))
    hmm.mirror.events.clear()
    hmm.protect(a, 4, RW)
    for advice in (Advice.WILLNEED, Advice.COLD, Advice.DONTDUMP, Advice.DODUMP):
        hmm.process.madvise(a, FOUR, advice)
    assert hmm.mirror.heard(a) == []
    untouched = (a & -(1 << 30)) - (4 << 30)
    hmm.process.mmap(FOUR, RW, address=untouched)
    hmm.protect(untouched, 4, Prot.READ)
    assert hmm.mirror.heard(a) == []
