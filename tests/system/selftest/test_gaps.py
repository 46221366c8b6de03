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
    helpers for DMA                                 here: mapped for DMA
    arguments                                       here

**Source**: Linux lib/test_hmm.c, mm/hmm.c, mm/migrate_device.c, mm/rmap.c, 6.12; seen in recordings of that kernel.
The helpers for DMA are of 6.16, mm/hmm.c; the kernel's test driver does not call them.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from selftest_rig import DEVICE_PAGES, HUGE, HUGE_PAGES, PRIVATE, RW, SHARED, failed, ints, ramp, succeeded

from hmm.errors import (
    AccessDeniedError,
    BadAddressError,
    InvalidRequestError,
    OutOfFramesError,
    SegmentationFault,
    Signal,
)
from hmm.frames import RegionKind
from hmm.madvise import Advice
from hmm.mremap import MremapFlag
from hmm.range_fault import DMA_MAPPED, REQ_FAULT, REQ_WRITE
from hmm.units import PAGE_SIZE, TASK_SIZE, AddressRange
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot
from hmm_client import sync
from hmm_client.drivers.dmirror import CLEAN
from hmm_client.harness import Harness
from hmm_proto.v1 import inspection_pb2, violation_pb2


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
    for address, npages in ((a + 1, 1), (a, 0), (a, 1 << 52)):
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


class Nic(sync.IntervalDriver):
    """The driver of a device that does DMA: it unmaps what an event takes, before it answers.

    Attributes:
        words: uint64[8], of the pages from `start` on.
    """

    def __init__(self, rig: Any, npages: int = 8) -> None:
        self.rig, self.start = rig, rig.map(npages)
        rig.store(self.start, ramp(npages))
        kind = RegionKind.DEVICE_COHERENT if rig.coherent else RegionKind.DEVICE_PRIVATE
        self.device = rig.client.register_device("nic", dma=True, memory_pages=16, kind=kind)
        self.mirror = self.device.attach(rig.process, self)
        self.notifier = self.mirror.insert(0, TASK_SIZE)
        self.span = AddressRange(self.start, self.start + npages * PAGE_SIZE)
        self.addresses = np.arange(self.start, self.span.end, PAGE_SIZE, dtype=np.uint64)
        self.words = np.zeros(npages, np.uint64)
        self.forgetful = False

    def invalidate(self, event: sync.Event) -> None:
        """hmm_dma_unmap_pfn() for each page, as drivers/infiniband/core/umem_odp.c does."""
        taken = np.zeros(self.words.size, np.bool_)
        for span in event.spans:
            taken |= (self.addresses >= span.start) & (self.addresses < span.end)
        if not self.forgetful and taken.any():
            self.mirror.dma_unmap(self.addresses[taken], self.words[taken])
            self.words[taken] = 0

    def have(self, flags: int) -> Any:
        """Fault all pages, and map them.  Returns: uint64[8], their DMA addresses."""
        words = self.notifier.fault(self.span, flags, words=self.words).words
        mapped = self.mirror.dma_map(self.addresses, words)
        self.words[:] = mapped.words
        return mapped.dma_addresses

    def reported(self) -> list[int]:
        """The kinds of what its device did that it must not."""
        aio = self.rig.client.aio
        request = inspection_pb2.GetViolationsRequest(mirror_id=self.mirror.id)
        answer = self.rig.client.loop.run(aio.channel.request(aio.inspection.GetViolations, request))
        return [violation.kind for mirror in answer.mirrors for violation in mirror.violations]


@pytest.fixture
def nic(hmm: Any) -> Iterator[Nic]:
    """One of these, with eight pages that hold a ramp."""
    nic = Nic(hmm)
    yield nic
    nic.mirror.detach()


def test_pages_mapped_for_dma_keep_their_addresses_when_they_are_faulted_for_writing(nic: Any) -> None:
    """hmm_dma_map_pfn(): DMA_MAPPED is sticky, so that READ becomes WRITE without a new mapping."""
    nic.rig.protect(nic.start, 8, Prot.READ)
    before = nic.have(REQ_FAULT)
    assert np.array_equal(ints(nic.mirror.read_dma(before)), ramp(8))
    with pytest.raises(AccessDeniedError):
        nic.mirror.write_dma(before, ramp(8, 5).tobytes())
    nic.forgetful = True  # more may be done with pages that stay
    nic.rig.protect(nic.start, 8, RW)
    assert np.array_equal(nic.have(REQ_FAULT | REQ_WRITE), before)
    nic.mirror.write_dma(before, ramp(8, 5).tobytes())
    assert np.array_equal(nic.rig.load(nic.start, 8), ramp(8, 5))
    assert nic.reported() == [violation_pb2.VIOLATION_KIND_READ_ONLY_WRITE]


def test_pages_mapped_for_dma_are_unmapped_before_they_go(nic: Any) -> None:
    """hmm_dma_unmap_pfn(): false for what is not mapped; a DMA address is never another page's."""
    before = nic.have(REQ_FAULT)
    nic.rig.process.madvise(nic.start, 4 * PAGE_SIZE, Advice.DONTNEED)
    assert np.array_equal((nic.words & np.uint64(DMA_MAPPED)) != 0, [False] * 4 + [True] * 4)
    assert np.array_equal(nic.mirror.dma_unmap(nic.addresses, nic.words) & np.uint64(DMA_MAPPED), [0] * 8)
    nic.words &= ~np.uint64(DMA_MAPPED)
    assert nic.reported() == []
    assert not np.isin(nic.have(REQ_FAULT | REQ_WRITE), before).any()
    with pytest.raises(BadAddressError):
        nic.mirror.read_dma(before[:1])
    assert nic.reported() == [violation_pb2.VIOLATION_KIND_USE_AFTER_INVALIDATION]


def test_page_mapped_for_dma_is_reported_when_its_driver_forgets_it(nic: Any) -> None:
    """The device would go on writing to a page of somebody else: the daemon finds that at the answer, and refuses."""
    before = nic.have(REQ_FAULT | REQ_WRITE)
    nic.forgetful = True
    nic.rig.process.madvise(nic.start, PAGE_SIZE, Advice.DONTNEED)
    assert nic.reported() == [violation_pb2.VIOLATION_KIND_DMA_MAPPING_KEPT]
    with pytest.raises(BadAddressError):
        nic.mirror.write_dma(before, ramp(8).tobytes())
    with pytest.raises(InvalidRequestError):
        nic.have(REQ_FAULT)
    nic.words[:] = nic.mirror.dma_unmap(nic.addresses, nic.words)
    assert nic.have(REQ_FAULT).size == 8


def test_mapping_for_dma_fails_when_the_iommu_does_and_leaves_nothing(nic: Any) -> None:
    """DMA_MAPPING_ERROR; the next time it succeeds."""
    nic.rig.client.loop.run(Harness(nic.rig.client.aio).fail_dma_mapping(nic.device.aio, 1))
    with pytest.raises(OutOfFramesError):
        nic.have(REQ_FAULT)
    assert not (nic.words & np.uint64(DMA_MAPPED)).any()
    assert np.array_equal(ints(nic.mirror.read_dma(nic.have(REQ_FAULT))), ramp(8))


def test_page_in_memory_of_the_device_is_mapped_for_dma_when_the_cpu_can_reach_it(nic: Any) -> None:
    """Coherent memory has addresses on the bus; private memory has none."""
    nic.mirror.migrate_to_device(nic.span)
    if not nic.rig.coherent:
        with pytest.raises(BadAddressError):
            nic.have(REQ_FAULT)
        return
    assert np.array_equal(ints(nic.mirror.read_dma(nic.have(REQ_FAULT))), ramp(8))
