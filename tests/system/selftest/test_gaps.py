"""What the kernel's own selftest leaves out: cases for its gaps, in both variants.

    the stream of callbacks                         `heard` in all files here
    non-blockable invalidation                      test_memory_gaps.py, tests/hmm/today/test_interval_notifier.py
    races of read sections, requests of single      tests/client/test_client_interval_mirror.py,
      pages, deadlines, errors of insert and remove   tests/hmm/today/test_interval_notifier.py, test_range_fault.py
    a device uses pages in its own memory           here: its own page
    migration in part, pins, hugetlb, no room       here: migration is partial
    MADV_DONTNEED, mremap, death of the process     here
    swap, KSM, hwpoison, SOFT_DIRTY                 test_memory_gaps.py
    SIGBUS from migrate_to_ram                      here: the driver cannot bring it back
    processes that share a device's page            here: shared by fork
    exclusive access of another device, EPERM       here
    arguments                                       here

**Source**: Linux lib/test_hmm.c, mm/hmm.c, mm/migrate_device.c, mm/rmap.c, 6.12; seen in recordings of that kernel.

**Absent**: helpers that map results for DMA, which the interface of intervals does not have.
"""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest
from selftest_rig import DEVICE_PAGES, HUGE, HUGE_PAGES, PRIVATE, RW, SHARED, failed, ints, ramp, succeeded

from hmm.errors import SegmentationFault, Signal
from hmm.madvise import Advice
from hmm.mremap import MremapFlag
from hmm.units import PAGE_SIZE, TASK_SIZE
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot
from hmm_client.drivers.dmirror import CLEAN
from hmm_client.harness import Harness


def on_device(rig: Any, npages: int = 8) -> int:
    """Pages with a ramp, moved to the first mirror's device.  Returns: the address."""
    a: int = rig.map(npages)
    rig.store(a, ramp(npages))
    succeeded(rig.mirror.migrate_to_device(a, npages), npages, ramp(npages))
    rig.mirror.events.clear()
    return a


def local(rig: Any, access: int) -> int:
    """The byte of a page in the first mirror's memory."""
    return (0x40 if rig.coherent else 0x20) | access


@pytest.mark.parametrize("name", ["read", "migrate_to_device", "migrate_to_system", "snapshot", "exclusive",
                                  "check_exclusive", "release"])  # fmt: skip
def test_arguments_are_refused_when_they_name_no_pages(hmm: Any, name: str) -> None:
    """dmirror_fops_unlocked_ioctl(): an address inside a page, no pages, an end beyond all addresses: EINVAL."""
    a = hmm.map(2)
    for address, npages in ((a + 1, 1), (a, 0), (a, 1 << 52), (TASK_SIZE - PAGE_SIZE, 2)):
        failed(errno.EINVAL, getattr(hmm.mirror, name), address, npages)
    failed(errno.EINVAL, hmm.mirror.write, a + 1, bytes(PAGE_SIZE))
    failed(errno.EINVAL, hmm.mirror.write, a, b"")


def test_dead_process_is_refused_when_its_mirror_lives_on(hmm: Any) -> None:
    """mmget_not_zero() fails: EINVAL; reading and writing, which loop for ever in the kernel, are EFAULT."""
    process = hmm.client.create_process("short-lived")
    mirror = hmm.open(hmm.mirror.card, process)
    a = process.mmap(4 * PAGE_SIZE).address
    process.write(a, b"x")
    succeeded(mirror.read(a, 1), 1)
    process.exit()
    for name in ("migrate_to_device", "migrate_to_system", "snapshot", "exclusive"):
        failed(errno.EINVAL, getattr(mirror, name), a, 1)
    failed(errno.EFAULT, mirror.read, a, 1)
    failed(errno.EFAULT, mirror.write, a, bytes(PAGE_SIZE))
    mirror.check_exclusive(a, 1)
    mirror.close()


def test_pages_are_freed_when_the_process_dies_with_them_on_the_device(hmm: Any) -> None:
    """exit drops the last mapping: dev_pagemap_ops.folio_free(); the device is empty."""
    process = hmm.client.create_process("dying")
    mirror = hmm.open(hmm.mirror.card, process)
    a = process.mmap(4 * PAGE_SIZE).address
    succeeded(mirror.migrate_to_device(a, 4), 4)
    process.exit()
    mirror.close()
    b = hmm.map(DEVICE_PAGES)
    succeeded(hmm.mirror.migrate_to_device(b, DEVICE_PAGES), DEVICE_PAGES)


def test_migration_is_partial_when_a_page_is_pinned(hmm: Any) -> None:
    """migrate_vma_check_page(): ENOENT for the call, and all other pages have moved."""
    a = hmm.map(4)
    hmm.store(a, ramp(4))
    pin = hmm.process.pin(hmm.span(a + PAGE_SIZE, 1), write=True)
    failed(errno.ENOENT, hmm.mirror.migrate_to_device, a, 4)
    device = local(hmm, 2)
    assert hmm.snapshot(a, 4) == [device, 0x02, device, device]
    pin.unpin()
    succeeded(hmm.mirror.migrate_to_device(a, 4), 4, ramp(4))


def test_migration_is_partial_when_the_device_is_full(hmm: Any) -> None:
    """dmirror_devmem_alloc_page() fails: what does not fit stays where it is, and the call says ENOENT."""
    a = hmm.map(DEVICE_PAGES + 4)
    failed(errno.ENOENT, hmm.mirror.migrate_to_device, a, DEVICE_PAGES + 4)
    shown = hmm.snapshot(a, DEVICE_PAGES + 4)
    assert shown == [local(hmm, 2)] * DEVICE_PAGES + [0] * 4


def test_migration_moves_what_lies_before_a_hole(hmm: Any) -> None:
    """Part by part: EINVAL at the hole, with the parts below it on the device."""
    a = hmm.map(130)
    hmm.store(a, ramp(130))
    hmm.unmap(a + 100 * PAGE_SIZE, 1)
    failed(errno.EINVAL, hmm.mirror.migrate_to_device, a, 130)
    assert hmm.snapshot(a, 102) == [local(hmm, 2)] * 100 + [0xFF, 0x02]


def test_discarded_pages_leave_the_device(hmm: Any) -> None:
    """MADV_DONTNEED frees them; what is read afterwards is new; MADV_FREE leaves private ones alone."""
    a = on_device(hmm)
    hmm.process.madvise(a, 4 * PAGE_SIZE, Advice.DONTNEED)
    assert hmm.mirror.heard(a) == [("CLEAR", [(0, 4)])]
    hmm.process.madvise(a + 4 * PAGE_SIZE, 4 * PAGE_SIZE, Advice.FREE)
    if not hmm.coherent:
        assert hmm.snapshot(a, 8) == [0] * 4 + [local(hmm, 2)] * 4
    expected = ramp(8)
    expected[: 4 * PAGE_SIZE // 4] = 0
    assert np.array_equal(hmm.load(a, 8), expected)


def test_device_reads_its_own_page_when_its_entry_was_taken(hmm: Any) -> None:
    """After fork or mprotect the page is still on the device: it is read there and does not move."""
    a = on_device(hmm)
    hmm.protect(a, 8, Prot.READ)
    succeeded(hmm.mirror.read(a, 8), 8, ramp(8), faults=1)
    assert hmm.snapshot(a, 8) == [local(hmm, 1)] * 8


def test_device_writes_its_own_page_when_it_has_become_read_only(hmm: Any) -> None:
    """hmm_range_fault() does not enforce writing there: EFAULT as the kernel's driver has it; a better one goes on."""
    a = on_device(hmm)
    hmm.protect(a, 8, Prot.READ)
    hmm.protect(a, 8, RW)
    if not hmm.coherent:
        failed(errno.EFAULT, hmm.mirror.write, a, ramp(8, 5).tobytes())
    hmm.mirror._profile = CLEAN
    succeeded(hmm.mirror.write(a, ramp(8, 5).tobytes()), 8)
    assert np.array_equal(hmm.load(a, 8), ramp(8, 5))


def test_page_shared_by_fork_comes_back_for_both(hmm: Any) -> None:
    """One touch migrates it for all; the other process hears CLEAR, and finds the same contents."""
    a = on_device(hmm)
    child = hmm.process.fork()
    mirror = hmm.open(hmm.mirror.card, child)
    succeeded(mirror.read(a, 8), 8, ramp(8), faults=1)
    hmm.mirror.events.clear()
    assert np.array_equal(hmm.load(a, 8), ramp(8))
    if not hmm.coherent:
        assert hmm.mirror.heard(a)[0] == ("MIGRATE own", [(0, 8)])
        assert mirror.heard(a) == [("CLEAR", [(0, 8)])]
    assert np.array_equal(ints(child.read(a, 8 * PAGE_SIZE)), ramp(8))
    mirror.close()
    child.exit()


def test_touch_is_a_bus_error_when_the_driver_cannot_bring_the_page_back(hmm: Any) -> None:
    """dmirror_devmem_fault() returns VM_FAULT_SIGBUS: pages before it came back, it stays; the next touch succeeds."""
    a = on_device(hmm)
    if hmm.coherent:  # there a CPU does not fault
        hmm.client.loop.run(Harness(hmm.client.aio).fail_migrate_to_ram(hmm.mirror.card, 1))
        assert np.array_equal(hmm.load(a, 8), ramp(8))
        return
    hmm.client.loop.run(Harness(hmm.client.aio).fail_migrate_to_ram(hmm.mirror.card, 3))
    with pytest.raises(SegmentationFault) as fault:
        hmm.load(a, 8)
    assert (fault.value.signal, fault.value.address) == (Signal.BUS_ADRERR, a + 2 * PAGE_SIZE)
    assert hmm.snapshot(a, 8) == [0x02] * 2 + [local(hmm, 2)] * 6
    assert np.array_equal(hmm.load(a, 8), ramp(8))


def test_device_of_another_driver_fails_where_the_page_cannot_come_back(hmm2: Any) -> None:
    """hmm_vma_fault(): VM_FAULT_SIGBUS of the owner's migrate_to_ram() is EFAULT for who faults it."""
    first, second = hmm2.mirrors
    a = hmm2.map(2)
    hmm2.store(a, ramp(2))
    succeeded(first.migrate_to_device(a, 2), 2, ramp(2))
    if not hmm2.coherent:
        hmm2.client.loop.run(Harness(hmm2.client.aio).fail_migrate_to_ram(first.card, 1))
        failed(errno.EFAULT, second.read, a, 2)
    succeeded(second.read(a, 2), 2, ramp(2))


def test_check_exclusive_is_refused_while_a_page_is_held(hmm: Any) -> None:
    """EPERM until the CPU has touched it."""
    a = hmm.map(4)
    hmm.store(a, ramp(4))
    succeeded(hmm.mirror.exclusive(a, 4), 4, ramp(4))
    failed(errno.EPERM, hmm.mirror.check_exclusive, a, 4)
    assert hmm.snapshot(a, 4) == [0] * 4
    hmm.load(a, 4)
    hmm.mirror.check_exclusive(a, 4)
    assert hmm.snapshot(a, 4) == [0x02] * 4


def test_exclusive_access_passes_from_device_to_device(hmm2: Any) -> None:
    """make_device_exclusive() faults the page in, which revokes it from the other first."""
    first, second = hmm2.mirrors
    a = hmm2.map(4)
    hmm2.store(a, ramp(4))
    succeeded(first.exclusive(a, 4), 4, ramp(4))
    first.events.clear()
    succeeded(second.exclusive(a, 4), 4, ramp(4))
    assert first.heard(a) == [("EXCLUSIVE", [(0, 4)])] * 2
    first.check_exclusive(a, 4)
    failed(errno.EPERM, second.check_exclusive, a, 4)


def test_exclusive_access_is_refused_when_the_page_is_not_private(hmm: Any) -> None:
    """Shared memory and read-only memory are EBUSY in 6.12, whatever the cause."""
    failed(errno.EBUSY, hmm.mirror.exclusive, hmm.map(2, flags=SHARED), 2)
    failed(errno.EBUSY, hmm.mirror.exclusive, hmm.map(2, Prot.READ), 2)
    failed(errno.EBUSY, hmm.mirror.exclusive, HUGE, 1)


def test_mremap_takes_the_old_entries_and_enters_no_new_ones(hmm: Any) -> None:
    """UNMAP of the old range; the pages stay on the device at their new address."""
    a = on_device(hmm)
    to = hmm.map(16) + 8 * PAGE_SIZE
    hmm.mirror.events.clear()
    hmm.process.mremap(a, 8 * PAGE_SIZE, 8 * PAGE_SIZE, MremapFlag.MAYMOVE | MremapFlag.FIXED, new_address=to)
    assert ("UNMAP", [(0, 8)]) in hmm.mirror.heard(a)
    assert hmm.snapshot(to, 8) == [local(hmm, 2)] * 8
    succeeded(hmm.mirror.read(to, 8), 8, ramp(8), faults=1)


def test_hugetlb_page_stays_when_it_is_asked_to_move(hmm: Any) -> None:
    """migrate_vma_setup() refuses such a VMA before anybody is told: EINVAL."""
    a = hmm.map(HUGE_PAGES, flags=PRIVATE | MapFlag.HUGETLB)
    hmm.store(a, ramp(HUGE_PAGES))
    failed(errno.EINVAL, hmm.mirror.migrate_to_device, a, HUGE_PAGES)
    assert hmm.mirror.heard(a) == []
    assert hmm.snapshot(a, HUGE_PAGES) == [0x06] * HUGE_PAGES


def test_hugetlb_page_is_copied_whole_when_a_device_writes_it_after_fork(hmm: Any) -> None:
    """copy_hugetlb_page_range() tells the parent CLEAR, not PROTECTION_PAGE; hugetlb_wp() CLEAR of the huge page."""
    whole = ("CLEAR", [(0, HUGE_PAGES)])
    a = hmm.map(HUGE_PAGES, flags=PRIVATE | MapFlag.HUGETLB)
    hmm.store(a, ramp(HUGE_PAGES))
    child = hmm.process.fork()
    assert hmm.mirror.heard(a) == [whole]
    mirror = hmm.open(hmm.mirror.card, child)
    succeeded(mirror.write(a, (-ramp(1)).tobytes()), 1, faults=1)
    assert (hmm.mirror.heard(a), mirror.heard(a)) == ([], [whole])
    assert np.array_equal(ints(child.read(a, PAGE_SIZE)), -ramp(1))
    assert np.array_equal(hmm.load(a, HUGE_PAGES), ramp(HUGE_PAGES))
    mirror.close()
    child.exit()
