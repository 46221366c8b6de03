"""The cases that joined the kernel's selftest after 6.12, in both variants, with the events that they imply.

They run under a daemon with the semantics `linux-7`, with the test driver of that kernel.

**Source**: Linux tools/testing/selftests/mm/hmm-tests.c, 2026.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from selftest_rig import ALL, HUGE, HUGE_PAGES, RW, SHARED, failed, ints, ramp, succeeded

from hmm.madvise import Advice
from hmm.mremap import MremapFlag
from hmm.semantics import LINUX_7
from hmm.units import PAGE_SIZE
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot
from hmm_client import sync
from hmm_client.drivers.dmirror import LINUX_7_CORRECTED, Flag, Profile
from hmm_client.embedded import PATIENCE, embedded_daemon

OFFSETS = (0, HUGE // 4, HUGE // 2)
SIZES = (HUGE // 4, HUGE // 2, HUGE, 2 * HUGE, 4 * HUGE, 8 * HUGE, *([128 * HUGE] if ALL else []))
ROUNDS = 5 if ALL else 2
WHOLE = [(0, HUGE_PAGES)]
OWN = ("MIGRATE own", WHOLE)
NOTHING = np.zeros(HUGE // 4, np.int32)


@pytest.fixture(scope="module")
def selftest_client() -> Iterator[sync.Client]:
    """A client of a daemon that models a kernel as new as these cases."""
    settings = PATIENCE | {"acknowledgement_s": 600.0, "semantics": LINUX_7.name}
    settings["harness"] = True  # FLAGS lets allocations fail
    with embedded_daemon(**settings) as target, sync.connect(target, name="selftest") as client:
        yield client


@pytest.fixture(scope="module")
def selftest_profile() -> Profile:
    """The driver of that kernel."""
    return LINUX_7_CORRECTED


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
    """Read-only memory that was never touched moves, as one page: zeroes on the device."""
    a = aligned(hmm, Prot.READ)
    hmm.mirror.events.clear()
    succeeded(hmm.mirror.migrate_to_device(a, HUGE_PAGES), HUGE_PAGES, NOTHING)
    assert hmm.mirror.heard(a) == [OWN, OWN]
    assert set(hmm.snapshot(a, HUGE_PAGES)) == {0x45 if hmm.coherent else 0x25}


def test_migrate_anon_huge_zero(hmm: Any) -> None:
    """So does memory that shows the huge zero page."""
    a = aligned(hmm, Prot.READ)
    assert hmm.load(a, 1)[0] == 0
    hmm.mirror.events.clear()
    succeeded(hmm.mirror.migrate_to_device(a, HUGE_PAGES), HUGE_PAGES, NOTHING)
    assert hmm.mirror.heard(a) == [OWN, OWN]
    assert np.array_equal(hmm.load(a, HUGE_PAGES), NOTHING)


def test_migrate_anon_huge_free(hmm: Any) -> None:
    """MADV_FREE of what is on the device, and a clean end."""
    a = aligned(hmm)
    hmm.store(a, ramp(HUGE_PAGES))
    succeeded(hmm.mirror.migrate_to_device(a, HUGE_PAGES), HUGE_PAGES, ramp(HUGE_PAGES))
    hmm.mirror.events.clear()
    hmm.process.madvise(a, HUGE, Advice.FREE)
    hmm.unmap(a, HUGE_PAGES)
    assert hmm.mirror.heard(a)[0] == ("CLEAR", WHOLE)


def test_migrate_anon_huge_fault(hmm: Any) -> None:
    """A collapsed huge page moves as one, and comes back as one; the page map says that it is away meanwhile."""
    a = hmm.map_aligned()
    hmm.store(a, ramp(HUGE_PAGES))
    hmm.process.madvise(a, HUGE, Advice.COLLAPSE)
    assert set(hmm.snapshot(a, HUGE_PAGES)) == {0x06}
    hmm.mirror.events.clear()
    succeeded(hmm.mirror.migrate_to_device(a, HUGE_PAGES), HUGE_PAGES, ramp(HUGE_PAGES))
    assert hmm.mirror.heard(a) == [OWN]
    assert set(hmm.snapshot(a, HUGE_PAGES)) == {0x46 if hmm.coherent else 0x26}
    if not hmm.coherent:
        words = hmm.process.pagemap(hmm.span(a, HUGE_PAGES))
        assert set((words >> np.uint64(62)).tolist()) == {0b01}  # swap and not present
    assert np.array_equal(hmm.load(a, HUGE_PAGES), ramp(HUGE_PAGES))
    assert hmm.mirror.heard(a) == ([] if hmm.coherent else [OWN])
    assert set(hmm.snapshot(a, HUGE_PAGES)) == {0x46 if hmm.coherent else 0x06}


@pytest.mark.parametrize("advice", [Advice.NOHUGEPAGE, Advice.HUGEPAGE])
@pytest.mark.parametrize("offset", OFFSETS)
def test_migrate_partial_unmap_fault(hmm: Any, advice: Advice, offset: int) -> None:
    """What is left after half of it was unmapped comes back whole."""
    a = aligned(hmm, advice=advice)
    hmm.store(a, ramp(HUGE_PAGES))
    succeeded(hmm.mirror.migrate_to_device(a, HUGE_PAGES), HUGE_PAGES, ramp(HUGE_PAGES))
    hmm.mirror.events.clear()
    hmm.unmap(a + offset, HUGE_PAGES // 2)
    unmapped = [(offset // PAGE_SIZE, offset // PAGE_SIZE + HUGE_PAGES // 2)]
    assert hmm.mirror.heard(a)[-1] == ("UNMAP", unmapped)  # after CLEAR of the block that is cut
    for first, last in ((0, offset), (offset + HUGE // 2, HUGE)):
        if first < last:
            found = hmm.load(a + first, (last - first) // PAGE_SIZE)
            assert np.array_equal(found, ramp(HUGE_PAGES)[first // 4 : last // 4])


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("keep", [MremapFlag(0), MremapFlag.DONTUNMAP])
@pytest.mark.parametrize("advice", [Advice.NOHUGEPAGE, Advice.HUGEPAGE])
def test_migrate_remap_fault(hmm: Any, before: bool, keep: MremapFlag, advice: Advice) -> None:
    """Memory that is moved before or after its migration is found at its new address."""
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
        succeeded(hmm.mirror.migrate_to_device(address, HUGE_PAGES), HUGE_PAGES, ramp(HUGE_PAGES))
        if not before:
            hmm.mirror.events.clear()
            hmm.process.mremap(*move, new_address=to)
            heard = hmm.mirror.heard(a)
            assert heard[0] == ("UNMAP", WHOLE)
            assert (("UNMAP", WHOLE) in heard[1:]) == (not keep)
            assert {spans[0] for _, spans in heard} == {(0, HUGE_PAGES)}  # nothing is told of the new place
        assert np.array_equal(hmm.load(to, HUGE_PAGES), ramp(HUGE_PAGES))
        hmm.process.munmap(a, 4 * HUGE)


def test_migrate_anon_huge_err(hmm: Any) -> None:
    """An allocation that fails, on the device or on the way back: small pages move instead."""
    a = aligned(hmm)
    hmm.store(a, ramp(HUGE_PAGES))
    hmm.mirror.events.clear()
    hmm.mirror.flags(a, Flag.FAIL_ALLOC)
    succeeded(hmm.mirror.migrate_to_device(a, HUGE_PAGES), HUGE_PAGES, ramp(HUGE_PAGES))
    assert hmm.mirror.heard(a) == [OWN, ("CLEAR", WHOLE)]  # split_huge_pmd_address()
    assert set(hmm.snapshot(a, HUGE_PAGES)) == {0x42 if hmm.coherent else 0x22}
    assert hmm.load(a, HUGE_PAGES)[2048] == 2048
    hmm.unmap(a, HUGE_PAGES)
    a = aligned(hmm)
    hmm.store(a, ramp(HUGE_PAGES))
    succeeded(hmm.mirror.migrate_to_device(a, HUGE_PAGES), HUGE_PAGES, ramp(HUGE_PAGES))
    hmm.mirror.flags(a, Flag.FAIL_ALLOC)
    assert hmm.mirror.migrate_to_system(a, HUGE_PAGES).cpages == HUGE_PAGES
    assert set(hmm.snapshot(a, HUGE_PAGES)) == {0x02}
    assert hmm.load(a, HUGE_PAGES)[2048] == 2048


def test_migrate_anon_huge_zero_err(hmm: Any) -> None:
    """The same where nothing was, or the huge zero page."""
    for touched in (False, True):
        a = aligned(hmm, Prot.READ)
        if touched:
            assert hmm.load(a, 1)[0] == 0
        hmm.mirror.events.clear()
        hmm.mirror.flags(a, Flag.FAIL_ALLOC)
        succeeded(hmm.mirror.migrate_to_device(a, HUGE_PAGES), HUGE_PAGES, NOTHING)
        assert hmm.mirror.heard(a) == [OWN, OWN, *([("CLEAR", WHOLE)] if touched else [])]
        assert set(hmm.snapshot(a, HUGE_PAGES)) == {0x41 if hmm.coherent else 0x21}
        assert np.array_equal(hmm.load(a, HUGE_PAGES), NOTHING)
        hmm.unmap(a, HUGE_PAGES)


def test_flags_are_ended_by_other_flags(hmm: Any) -> None:
    """The command replaces them all, and cannot say none: the number of pages carries them."""
    a = aligned(hmm)
    hmm.store(a, ramp(HUGE_PAGES))
    hmm.mirror.flags(a, Flag.FAIL_ALLOC)
    hmm.mirror.flags(a, 2)
    succeeded(hmm.mirror.migrate_to_device(a, HUGE_PAGES), HUGE_PAGES, ramp(HUGE_PAGES))
    assert set(hmm.snapshot(a, HUGE_PAGES)) == {0x46 if hmm.coherent else 0x26}
    failed(errno.EINVAL, hmm.mirror.flags, a, 0)
    b = hmm.map(2)
    hmm.store(b, ramp(2))
    hmm.mirror.flags(b, Flag.FAIL_ALLOC)
    failed(errno.ENOENT, hmm.mirror.migrate_to_device, b, 2)
    assert hmm.snapshot(b, 2) == [0x02, 0x42 if hmm.coherent else 0x22]


@pytest.mark.parametrize("advice", [Advice.NOHUGEPAGE, Advice.HUGEPAGE])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.slow
def test_benchmark_thp_migration(hmm: Any, size: int, advice: Advice) -> None:
    """There and back, once to warm up and then again and again, in sizes from a quarter of a huge page on."""
    npages = size // PAGE_SIZE
    a = hmm.map(npages)
    hmm.process.madvise(a, size, advice)
    filling = bytes(range(256)) * (1 << 12)  # k & 0xFF
    for at in range(0, size, len(filling)):
        hmm.process.write(a + at, filling[: size - at])
    for _ in range(1 + ROUNDS):
        hmm.mirror.migrate_to_device(a, npages)
        hmm.mirror.migrate_to_system(a, npages)
    first = min(size, len(filling))
    assert hmm.process.read(a, first) == filling[:first]
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
    failed(errno.EOPNOTSUPP, hmm.mirror.exclusive, a, 6)
    assert hmm.mirror.heard(a) == [("EXCLUSIVE", [(0, 2)])]
    assert hmm.snapshot(a, 6) == [0x00, 0x00, 0x02, 0x02, 0x02, 0x02]
