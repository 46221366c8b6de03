"""The cases that joined the kernel's selftest after 6.12, as far as they do not need huge pages on the device itself.

They run under a daemon with the semantics `linux-7`.

**Source**: Linux tools/testing/selftests/mm/hmm-tests.c, 2026.

**Absent**: huge pages in device memory (migrate_anon_huge_fault's size bits, and the fallback to single pages when a
huge one cannot be allocated there): a migration splits them here, as in 6.12.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from selftest_rig import HUGE, HUGE_PAGES, RW, SHARED, failed, ints, ramp, succeeded

from hmm.madvise import Advice
from hmm.mremap import MremapFlag
from hmm.semantics import LINUX_7
from hmm.units import PAGE_SIZE
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot
from hmm_client import sync
from hmm_client.drivers.dmirror import CLEAN
from hmm_client.embedded import embedded_daemon

OFFSETS = (0, HUGE // 4, HUGE // 2)
NOTHING = np.zeros(HUGE // 4, np.int32)


@pytest.fixture(scope="module")
def selftest_client() -> Iterator[sync.Client]:
    """A client of a daemon that models a kernel as new as these cases."""
    with embedded_daemon(semantics=LINUX_7.name) as target, sync.connect(target, name="selftest") as client:
        yield client


def aligned(rig: Any, prot: Prot = RW, advice: Advice = Advice.HUGEPAGE) -> int:
    """The first huge page's worth of memory in twice as much, with advice."""
    address: int = rig.map_aligned(prot=prot)
    rig.process.madvise(address, HUGE, advice)
    return address


@pytest.mark.parametrize("advice", [Advice.NOHUGEPAGE, Advice.HUGEPAGE])
@pytest.mark.parametrize("migrate", [False, True])
def test_anon_write_child_huge(hmm: Any, migrate: bool, advice: Advice) -> None:
    """The child's device writes to copies, wherever the pages were at fork and whatever their size."""
    a = aligned(hmm, advice=advice)
    hmm.store(a, ramp(HUGE_PAGES))
    if migrate:
        succeeded(hmm.mirror.migrate_to_device(a, HUGE_PAGES), HUGE_PAGES, ramp(HUGE_PAGES))
    child = hmm.process.fork()
    assert np.array_equal(ints(child.read(a, HUGE)), ramp(HUGE_PAGES))
    mirror = hmm.open(hmm.cards[0], child)
    succeeded(mirror.write(a, (-ramp(HUGE_PAGES)).tobytes()), HUGE_PAGES, faults=1)
    assert np.array_equal(ints(child.read(a, HUGE)), -ramp(HUGE_PAGES))
    mirror.close()
    child.exit()
    assert np.array_equal(hmm.load(a, HUGE_PAGES), ramp(HUGE_PAGES))


def test_migrate_anon_huge_empty(hmm: Any) -> None:
    """Read-only memory that was never touched moves: zeroes on the device."""
    a = aligned(hmm, Prot.READ)
    succeeded(hmm.mirror.migrate_to_device(a, HUGE_PAGES), HUGE_PAGES, NOTHING)


def test_migrate_anon_huge_zero(hmm: Any) -> None:
    """So does memory that shows the huge zero page."""
    a = aligned(hmm, Prot.READ)
    assert hmm.load(a, 1)[0] == 0
    succeeded(hmm.mirror.migrate_to_device(a, HUGE_PAGES), HUGE_PAGES, NOTHING)
    assert np.array_equal(hmm.load(a, HUGE_PAGES), NOTHING)


def test_migrate_anon_huge_free(hmm: Any) -> None:
    """MADV_FREE of what is on the device, and a clean end."""
    a = aligned(hmm)
    hmm.store(a, ramp(HUGE_PAGES))
    succeeded(hmm.mirror.migrate_to_device(a, HUGE_PAGES), HUGE_PAGES, ramp(HUGE_PAGES))
    hmm.process.madvise(a, HUGE, Advice.FREE)
    hmm.unmap(a, HUGE_PAGES)


def test_migrate_anon_huge_fault(hmm: Any) -> None:
    """A collapsed huge page moves and comes back; the page map says that it is away meanwhile."""
    a = hmm.map_aligned()
    hmm.store(a, ramp(HUGE_PAGES))
    hmm.process.madvise(a, HUGE, Advice.COLLAPSE)
    assert set(hmm.snapshot(a, HUGE_PAGES)) == {0x06}
    succeeded(hmm.mirror.migrate_to_device(a, HUGE_PAGES), HUGE_PAGES, ramp(HUGE_PAGES))
    if not hmm.coherent:
        words = hmm.process.pagemap(hmm.span(a, HUGE_PAGES))
        assert set((words >> np.uint64(62)).tolist()) == {0b01}  # swap and not present
    assert np.array_equal(hmm.load(a, HUGE_PAGES), ramp(HUGE_PAGES))


@pytest.mark.parametrize("advice", [Advice.NOHUGEPAGE, Advice.HUGEPAGE])
@pytest.mark.parametrize("offset", OFFSETS)
def test_migrate_partial_unmap_fault(hmm: Any, advice: Advice, offset: int) -> None:
    """What is left after half of it was unmapped comes back whole."""
    a = aligned(hmm, advice=advice)
    hmm.store(a, ramp(HUGE_PAGES))
    succeeded(hmm.mirror.migrate_to_device(a, HUGE_PAGES), HUGE_PAGES, ramp(HUGE_PAGES))
    hmm.unmap(a + offset, HUGE_PAGES // 2)
    for first, last in ((0, offset), (offset + HUGE // 2, HUGE)):
        if first < last:
            found = hmm.load(a + first, (last - first) // PAGE_SIZE)
            assert np.array_equal(found, ramp(HUGE_PAGES)[first // 4 : last // 4])


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("keep", [MremapFlag(0), MremapFlag.DONTUNMAP])
@pytest.mark.parametrize("advice", [Advice.NOHUGEPAGE, Advice.HUGEPAGE])
def test_migrate_remap_fault(hmm: Any, before: bool, keep: MremapFlag, advice: Advice) -> None:
    """Memory that is moved before or after its migration is found at its new address.

    Pages of a huge page that is mapped by page entries, as it is at an unaligned address, stay as in 6.12: ENOENT.
    """
    for offset in OFFSETS:
        a = hmm.map_aligned(room=8)
        hmm.process.madvise(a, HUGE, advice)
        hmm.process.munmap(a + HUGE, 2 * HUGE)
        hmm.store(a, ramp(HUGE_PAGES))
        to = a + HUGE + offset
        move = (a, HUGE, HUGE, MremapFlag.MAYMOVE | MremapFlag.FIXED | keep)
        if before:
            hmm.process.mremap(*move, new_address=to)
        address = to if before else a
        hmm.mirror.events.clear()
        if before and offset and advice is Advice.HUGEPAGE:
            failed(errno.ENOENT, hmm.mirror.migrate_to_device, address, HUGE_PAGES)
        else:
            succeeded(hmm.mirror.migrate_to_device(address, HUGE_PAGES), HUGE_PAGES, ramp(HUGE_PAGES))
        if not before:
            hmm.mirror.events.clear()
            hmm.process.mremap(*move, new_address=to)
            assert hmm.mirror.heard(a)[0] == ("UNMAP", [(0, HUGE_PAGES)])
        assert np.array_equal(hmm.load(to, HUGE_PAGES), ramp(HUGE_PAGES))
        hmm.process.munmap(a, 4 * HUGE)


@pytest.mark.parametrize("advice", [Advice.NOHUGEPAGE, Advice.HUGEPAGE])
def test_benchmark_thp_migration(hmm: Any, advice: Advice) -> None:
    """There and back, again and again, in sizes from a quarter of a huge page to two of them."""
    for size in (HUGE // 4, HUGE // 2, HUGE, 2 * HUGE):
        npages = size // PAGE_SIZE
        a = hmm.map(npages)
        hmm.process.madvise(a, size, advice)
        hmm.store(a, ramp(npages))
        for _ in range(2):
            hmm.mirror.migrate_to_device(a, npages)
            hmm.mirror.migrate_to_system(a, npages)
        hmm.unmap(a, npages)


def test_userfaultfd_read(hmm: Any) -> None:
    """A device reads memory whose pages a handler brings in; the read that keeps the lock cannot wait for one."""
    a = hmm.map(4)
    asked: list[int] = []

    def bring(fault: Any) -> bytes:
        asked.append((fault.address - a) // PAGE_SIZE)
        return b"\xab" * PAGE_SIZE

    with hmm.process.userfaultfd() as uffd:
        uffd.register(hmm.span(a, 4))
        failed(errno.EFAULT, hmm.mirror.read, a, 4)
        assert asked == []
        uffd.serve(bring)
        reply = hmm.mirror.read_unlocked(a, 4)
        succeeded(reply, 4)
        assert reply.data == b"\xab" * 4 * PAGE_SIZE
        assert asked == [0, 1, 2, 3]
        assert hmm.mirror.heard(a) == []
        assert hmm.process.read(a, 4 * PAGE_SIZE) == reply.data
    hmm.unmap(a, 4)


def test_exclusive_access_ends_at_a_page_that_is_not_private(hmm: Any) -> None:
    """make_device_exclusive() takes one page, so a driver ends there: EOPNOTSUPP; 6.12 goes on behind it."""
    a = hmm.map(6)
    hmm.store(a, ramp(6))
    hmm.process.mmap(PAGE_SIZE, RW, SHARED | MapFlag.FIXED, address=a + 2 * PAGE_SIZE)
    hmm.mirror.events.clear()
    hmm.mirror._profile = CLEAN  # which keeps the errno
    failed(errno.EOPNOTSUPP, hmm.mirror.exclusive, a, 6)
    assert hmm.mirror.heard(a) == [("EXCLUSIVE", [(0, 2)])]
    assert hmm.snapshot(a, 6) == [0x00, 0x00, 0x02, 0x02, 0x02, 0x02]
