"""The cases of the kernel's own selftest as of 6.12, in both variants, with the events that they imply.

Every test bears the name of the kernel's and expects exactly what that asserts; the events, which the kernel's suite
never looks at, are those that its code sends.  One event tells of a whole call here.

**Source**: Linux tools/testing/selftests/mm/hmm-tests.c, 6.12.
"""

from __future__ import annotations

import errno
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from selftest_rig import (
    BUFFER,
    HUGE_PAGES,
    INTS,
    PAGES,
    PRIVATE,
    RW,
    SHARED,
    failed,
    ints,
    ramp,
    succeeded,
)  # fmt: skip

from hmm.errors import BadAddressError
from hmm.madvise import Advice
from hmm.units import PAGE_SIZE
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot, VmFlag
from hmm_client import FileKind

WHOLE = [(0, PAGES)]
READ_PAGES = (1 << 20) // PAGE_SIZE  # the client reads memory in parts of 1 MiB


def migrations(npages: int, first: int = 0, batch: int = 64) -> list[tuple[str, list[tuple[int, int]]]]:
    """One MIGRATE of the mirror's own for each chunk of a call."""
    end = first + npages
    return [("MIGRATE own", [(at, min(at + batch, end))]) for at in range(first, end, batch)]


def file_of(hmm: Any, tmp_path: Path, data: bytes = b"") -> Any:
    """A file of the daemon with this content, or of the size of the buffer."""
    file = hmm.client.open_file(str(tmp_path / "file"), create=True)
    file.truncate(BUFFER)
    file.write(0, data)
    return file


def test_open_close(hmm: Any) -> None:
    """Devices can be opened and closed."""
    hmm.open(hmm.cards[3]).close()


def test_anon_read(hmm: Any) -> None:
    """Untouched pages, a zero page and written pages are read in one pass."""
    a = hmm.map()
    hmm.store(a + 2 * PAGE_SIZE, ramp()[2 * INTS :])
    hmm.protect(a, PAGES, Prot.READ)
    assert ints(hmm.process.read(a + PAGE_SIZE, 4))[0] == 0
    expected = ramp()
    expected[: 2 * INTS] = 0
    succeeded(hmm.mirror.read(a, PAGES), PAGES, expected, faults=1)
    hmm.unmap(a)
    assert hmm.mirror.heard(a) == [("PROTECTION_VMA", WHOLE), ("UNMAP", WHOLE)]


def test_anon_read_prot(hmm: Any) -> None:
    """PROT_NONE memory cannot be read by a device: EFAULT, and nothing is copied."""
    a = hmm.map()
    hmm.store(a, ramp())
    hmm.protect(a, PAGES, Prot.NONE)
    failed(errno.EFAULT, hmm.mirror.read, a, PAGES)
    hmm.protect(a, PAGES, Prot.READ)
    assert np.array_equal(hmm.load(a), ramp())


def test_anon_write(hmm: Any) -> None:
    """The device writes to memory that nobody has touched."""
    a = hmm.map()
    succeeded(hmm.mirror.write(a, ramp().tobytes()), PAGES, faults=1)
    assert np.array_equal(hmm.load(a), ramp())
    assert hmm.mirror.heard(a) == []


def test_anon_write_prot(hmm: Any) -> None:
    """EPERM where the mapping is read-only; then the zero page that was read is replaced, which the device hears."""
    a = hmm.map(prot=Prot.READ)
    succeeded(hmm.mirror.read(a, 1), 1, faults=1)
    failed(errno.EPERM, hmm.mirror.write, a, ramp().tobytes())
    assert not hmm.load(a).any()
    assert hmm.mirror.heard(a) == []
    hmm.protect(a, PAGES, RW)
    hmm.mirror.events.clear()
    succeeded(hmm.mirror.write(a, ramp().tobytes()), PAGES, faults=1)
    assert np.array_equal(hmm.load(a), ramp())
    assert hmm.mirror.heard(a)[0] == ("CLEAR", [(0, 64)])  # the CPU's read has put the zero page everywhere


def test_anon_write_of_an_unread_page_is_told_nobody(hmm: Any) -> None:
    """Of a range in which one page is the zero page only that one is told of."""
    a = hmm.map(prot=Prot.READ)
    succeeded(hmm.mirror.read(a, 1), 1)
    hmm.protect(a, PAGES, RW)
    assert hmm.mirror.heard(a) == [("PROTECTION_VMA", WHOLE)]
    succeeded(hmm.mirror.write(a, ramp().tobytes()), PAGES, faults=1)
    assert hmm.mirror.heard(a) == [("CLEAR", [(0, 1)])]


def test_anon_write_child(hmm: Any) -> None:
    """The child's device writes to the child's copies; the parent keeps what it had."""
    a = hmm.map()
    hmm.store(a, ramp())
    hmm.mirror.events.clear()
    child = hmm.process.fork()
    assert hmm.mirror.heard(a) == [("PROTECTION_PAGE", WHOLE)]
    assert np.array_equal(ints(child.read(a, BUFFER)), ramp())
    mirror = hmm.open(hmm.cards[0], child)
    succeeded(mirror.write(a, (-ramp()).tobytes()), PAGES, faults=1)
    told = mirror.heard(a)
    assert {reason for reason, _ in told} == {"CLEAR"}
    assert min(span for _, spans in told for span in spans)[0] == 0
    assert np.array_equal(ints(child.read(a, BUFFER)), -ramp())
    mirror.close()
    child.exit()
    assert np.array_equal(hmm.load(a), ramp())


def test_anon_write_child_shared(hmm: Any) -> None:
    """Shared memory: what the child's device writes is the parent's as well; fork tells nobody."""
    a = hmm.map(flags=SHARED)
    hmm.store(a, ramp())
    hmm.mirror.events.clear()
    child = hmm.process.fork()
    assert np.array_equal(ints(child.read(a, BUFFER)), ramp())
    mirror = hmm.open(hmm.cards[0], child)
    succeeded(mirror.write(a, (-ramp()).tobytes()), PAGES, faults=1)
    assert np.array_equal(ints(child.read(a, BUFFER)), -ramp())
    assert mirror.heard(a) == []
    mirror.close()
    child.exit()
    assert np.array_equal(hmm.load(a), -ramp())
    assert hmm.mirror.heard(a) == []


def test_anon_write_huge(hmm: Any) -> None:
    """A range that may become one huge page is written in one pass."""
    a = hmm.map_aligned()
    hmm.process.madvise(a, HUGE_PAGES * PAGE_SIZE, Advice.HUGEPAGE)
    succeeded(hmm.mirror.write(a, ramp(HUGE_PAGES).tobytes()), HUGE_PAGES, faults=1)
    assert np.array_equal(hmm.load(a, HUGE_PAGES), ramp(HUGE_PAGES))
    assert hmm.mirror.heard(a) == []


def test_anon_write_hugetlbfs(hmm: Any) -> None:
    """The device writes to a page of the pool in one pass; only its end is told, in one event."""
    a = hmm.map(HUGE_PAGES, flags=PRIVATE | MapFlag.HUGETLB)
    succeeded(hmm.mirror.write(a, ramp(HUGE_PAGES).tobytes()), HUGE_PAGES, faults=1)
    assert np.array_equal(hmm.load(a, HUGE_PAGES), ramp(HUGE_PAGES))
    assert hmm.mirror.heard(a) == []
    hmm.unmap(a, HUGE_PAGES)
    assert hmm.mirror.heard(a) == [("UNMAP", [(0, HUGE_PAGES)])]


def test_file_read(hmm: Any, tmp_path: Path) -> None:
    """The device reads pages of a file that are mapped read-only and shared."""
    file = file_of(hmm, tmp_path, ramp().tobytes())
    a = hmm.map(prot=Prot.READ, flags=MapFlag.SHARED, file=file)
    succeeded(hmm.mirror.read(a, PAGES), PAGES, ramp(), faults=1)
    assert hmm.mirror.heard(a) == []


def test_file_write(hmm: Any, tmp_path: Path) -> None:
    """What the device writes is in the file."""
    file = file_of(hmm, tmp_path)
    a = hmm.map(flags=MapFlag.SHARED, file=file)
    succeeded(hmm.mirror.write(a, ramp().tobytes()), PAGES, faults=1)
    assert np.array_equal(hmm.load(a), ramp())
    assert np.array_equal(ints(file.read(0, BUFFER)), ramp())
    assert hmm.mirror.heard(a) == []


def test_migrate(hmm: Any) -> None:
    """Written pages move to the device, which reads them there."""
    a = hmm.map()
    hmm.store(a, ramp())
    succeeded(hmm.mirror.migrate_to_device(a, PAGES), PAGES, ramp())
    assert hmm.mirror.heard(a) == migrations(PAGES)


def test_migrate_file_private(hmm: Any, tmp_path: Path) -> None:
    """Copies of a private file mapping are anonymous, and move."""
    a = hmm.map(flags=MapFlag.PRIVATE, file=file_of(hmm, tmp_path))
    hmm.store(a, ramp())
    succeeded(hmm.mirror.migrate_to_device(a, PAGES), PAGES, ramp())
    assert hmm.mirror.heard(a) == migrations(PAGES)


def test_migrate_fault(hmm: Any) -> None:
    """The CPU brings a half back; the second call moves that half only, and the other half still counts."""
    a = hmm.map()
    hmm.store(a, ramp())
    succeeded(hmm.mirror.migrate_to_device(a, PAGES), PAGES, ramp())
    hmm.mirror.events.clear()
    half = PAGES // 2
    assert np.array_equal(hmm.load(a, half), ramp(half))
    touched = [("MIGRATE own", [(0, half // 2)]), ("MIGRATE own", [(half // 2, half)])]  # read in two parts of 1 MiB
    assert hmm.mirror.heard(a) == ([] if hmm.coherent else touched)
    succeeded(hmm.mirror.migrate_to_device(a, PAGES), PAGES, ramp())


def test_migrate_release(hmm: Any) -> None:
    """RELEASE empties the device: by frame and not by address, so nobody owns the event."""
    a = hmm.map()
    hmm.store(a, ramp())
    succeeded(hmm.mirror.migrate_to_device(a, PAGES), PAGES, ramp())
    hmm.mirror.events.clear()
    hmm.mirror.release(a, PAGES)
    assert hmm.mirror.heard(a) == [("CLEAR", WHOLE)]
    assert np.array_equal(hmm.load(a, PAGES // 2), ramp(PAGES // 2))


def test_close_tells_of_what_it_brings_back(hmm: Any) -> None:
    """dmirror_fops_release() empties the device, of all its mirrors: CLEAR, and nobody's own."""
    a = hmm.map(8)
    hmm.store(a, ramp(8))
    closing = hmm.open(hmm.mirror.card)
    succeeded(closing.migrate_to_device(a, 8), 8, ramp(8))
    hmm.mirror.events.clear()
    closing.close()
    assert hmm.mirror.heard(a) == [("CLEAR", [(0, 8)])]
    assert hmm.snapshot(a, 8) == [0x02] * 8


def test_migrate_shared(hmm: Any) -> None:
    """Shared memory never moves; what is tried is told, and nothing more, as its holes are not filled."""
    a = hmm.map(flags=SHARED)
    failed(errno.ENOENT, hmm.mirror.migrate_to_device, a, PAGES)
    assert hmm.mirror.heard(a) == migrations(PAGES)


def test_migrate_mixed(hmm2: Any) -> None:
    """PROT_NONE and holes are EINVAL; zero, read-only and writable pages move; the other device cannot take them."""
    first, second = hmm2.mirrors
    a = hmm2.map(6, Prot.NONE)
    failed(errno.EINVAL, second.migrate_to_device, a, 6)
    hmm2.unmap(a + PAGE_SIZE, 1)
    second.events.clear()
    failed(errno.EINVAL, second.migrate_to_device, a, 3)
    assert second.heard(a) == []
    two, three, four, five = (a + page * PAGE_SIZE for page in range(2, 6))
    hmm2.protect(two, 1, Prot.READ)
    assert hmm2.load(two, 1)[0] == 0
    hmm2.protect(three, 1, RW)
    hmm2.process.write(three, np.int32(3).tobytes())
    hmm2.protect(three, 1, Prot.READ)
    hmm2.protect(four, 2, RW)
    for page in (four, five):
        hmm2.process.write(page, np.int32(3).tobytes())
    succeeded(second.migrate_to_device(two, 4), 4)
    first.events.clear()
    failed(errno.ENOENT, first.migrate_to_device, five, 1)
    assert first.heard(a) == [("MIGRATE own", [(5, 6)])]


def test_migrate_multiple(hmm: Any) -> None:
    """To the device and back, ten times."""
    for _ in range(10):
        a = hmm.map()
        hmm.store(a, ramp())
        succeeded(hmm.mirror.migrate_to_device(a, PAGES), PAGES, ramp())
        assert hmm.mirror.heard(a) == migrations(PAGES)
        if hmm.coherent:
            succeeded(hmm.mirror.migrate_to_system(a, PAGES), PAGES)
        assert np.array_equal(hmm.load(a), ramp())
        back = migrations(PAGES, batch=64 if hmm.coherent else READ_PAGES)
        assert hmm.mirror.heard(a) == back
        hmm.unmap(a)
        assert hmm.mirror.heard(a) == [("UNMAP", WHOLE)]


def test_anon_read_multiple(hmm: Any) -> None:
    """No stale data at an address that is used again."""
    for offset in range(10):
        a = hmm.map()
        hmm.store(a, ramp(offset=offset))
        succeeded(hmm.mirror.read(a, PAGES), PAGES, ramp(offset=offset), faults=1)
        hmm.unmap(a)
        assert hmm.mirror.heard(a) == [("UNMAP", WHOLE)]


def test_anon_teardown(hmm: Any) -> None:
    """A read while half of the buffer is unmapped: what was there, or an error; no hang."""
    for offset in range(10):
        a = hmm.map()
        hmm.store(a, ramp(offset=offset))
        thread = threading.Thread(target=hmm.unmap, args=(a + BUFFER // 2, PAGES // 2))
        thread.start()
        with suppress(BadAddressError):
            succeeded(hmm.mirror.read(a, PAGES), PAGES, ramp(offset=offset), faults=1)
        thread.join()
        hmm.unmap(a)


def test_mixedmap(hmm: Any) -> None:
    """A page of the driver itself, mapped privately, is readable."""
    file = hmm.client.open_file("hmm_dmirror", kind=FileKind.DEVICE, vm_flags=VmFlag.MIXEDMAP)
    a = hmm.map(1, flags=MapFlag.PRIVATE, file=file)
    assert hmm.snapshot(a, 1) == [0x01]
    hmm.unmap(a, 1)
    file.close()


def test_snapshot(hmm2: Any) -> None:
    """A byte for every kind of page; private memory of the other device looks like nothing."""
    first, second = hmm2.mirrors
    a = hmm2.map(7, Prot.NONE)
    pages = [a + page * PAGE_SIZE for page in range(7)]
    hmm2.unmap(pages[1], 1)
    hmm2.protect(pages[2], 1, Prot.READ)
    assert hmm2.load(pages[2], 1)[0] == 0
    hmm2.protect(pages[3], 1, RW)
    hmm2.process.write(pages[3], np.int32(3).tobytes())
    hmm2.protect(pages[3], 1, Prot.READ)
    hmm2.protect(pages[4], 3, RW)
    hmm2.process.write(pages[4], np.int32(3).tobytes())
    succeeded(first.migrate_to_device(pages[5], 1), 1)
    succeeded(second.migrate_to_device(pages[6], 1), 1)
    devices = [0x42, 0x52] if hmm2.coherent else [0x22, 0x00]
    assert hmm2.snapshot(a, 7, first) == [0xFF, 0xFF, 0x11, 0x01, 0x02, *devices]
    # A page that was never touched is told of twice: collected, and filled on the device.
    fives, sixes = [("MIGRATE own", [(5, 6)])] * 2, [("MIGRATE", [(6, 7)])] * 2
    assert first.heard(a)[-4:] == fives + sixes


def test_compound(hmm: Any) -> None:
    """Every page of a page of the pool shows its size; mprotect tells of it all."""
    a = hmm.map(HUGE_PAGES, flags=PRIVATE | MapFlag.HUGETLB)
    hmm.store(a, ramp(HUGE_PAGES))
    assert hmm.snapshot(a, HUGE_PAGES) == [0x06] * HUGE_PAGES
    assert hmm.mirror.heard(a) == []
    hmm.protect(a, HUGE_PAGES, Prot.READ)
    assert hmm.snapshot(a, HUGE_PAGES) == [0x05] * HUGE_PAGES
    assert hmm.mirror.heard(a) == [("PROTECTION_VMA", [(0, HUGE_PAGES)])]


def test_double_map(hmm2: Any) -> None:
    """The migration of one device takes the page from the other, whose read brings private pages back."""
    first, second = hmm2.mirrors
    a = hmm2.map(6)
    hmm2.store(a, ramp(6))
    hmm2.protect(a, 6, Prot.READ)
    succeeded(first.read(a, 6), 6, ramp(6), faults=1)
    succeeded(second.read(a, 6), 6, ramp(6), faults=1)
    for mirror in hmm2.mirrors:
        mirror.events.clear()
    succeeded(second.migrate_to_device(a, 6), 6, ramp(6))
    assert (first.heard(a), second.heard(a)) == ([("MIGRATE", [(0, 6)])], [("MIGRATE own", [(0, 6)])])
    succeeded(first.read(a, 6), 6, ramp(6), faults=1)
    assert first.heard(a) == ([] if hmm2.coherent else [("MIGRATE", [(0, 6)])])
    assert second.heard(a) == ([] if hmm2.coherent else [("MIGRATE own", [(0, 6)])])


def told_of(heard: Any, reason: str) -> list[int]:
    """The pages that events of one reason told of, in their order; there are no others."""
    assert {why for why, _ in heard} <= {reason}
    return [page for _, spans in heard for start, end in spans for page in range(start, end)]


def test_exclusive(hmm: Any) -> None:
    """The CPU's accesses take all pages back, and find what was there; each page is told of once, both times."""
    a = hmm.map()
    hmm.store(a, ramp())
    succeeded(hmm.mirror.exclusive(a, PAGES), PAGES, ramp())
    assert told_of(hmm.mirror.heard(a), "EXCLUSIVE") == list(range(PAGES))
    assert np.array_equal(hmm.load(a), ramp())
    assert told_of(hmm.mirror.heard(a), "EXCLUSIVE") == list(range(PAGES))
    hmm.store(a, ramp(offset=1))
    assert np.array_equal(hmm.load(a), ramp(offset=1))
    hmm.mirror.check_exclusive(a, PAGES)


def test_exclusive_mprotect(hmm: Any) -> None:
    """mprotect takes the device's exclusive entries; it may not write any more."""
    a = hmm.map()
    hmm.store(a, ramp())
    succeeded(hmm.mirror.exclusive(a, PAGES), PAGES, ramp())
    hmm.mirror.events.clear()
    hmm.protect(a, PAGES, Prot.READ)
    failed(errno.EPERM, hmm.mirror.write, a, ramp().tobytes())
    assert hmm.mirror.heard(a) == [("PROTECTION_VMA", WHOLE)]


def test_exclusive_cow(hmm: Any) -> None:
    """fork takes exclusive pages back; afterwards parent and child write to pages of their own."""
    a = hmm.map()
    hmm.store(a, ramp())
    succeeded(hmm.mirror.exclusive(a, PAGES), PAGES)
    hmm.mirror.events.clear()
    child = hmm.process.fork()
    assert hmm.mirror.heard(a) == [("PROTECTION_PAGE", WHOLE)]
    mirror = hmm.open(hmm.mirror.card, child)
    for process in (child, hmm.process):
        assert np.array_equal(ints(process.read(a, BUFFER)), ramp())
        process.write(a, ramp(offset=1).tobytes())
        assert np.array_equal(ints(process.read(a, BUFFER)), ramp(offset=1))
    assert told_of(mirror.heard(a), "CLEAR") == list(range(PAGES))  # the child copies; then the parent is alone
    assert hmm.mirror.heard(a) == []
    mirror.close()
    child.exit()


def test_hmm_gup_test(hmm: Any) -> None:
    """Pinning brings private pages back; coherent ones stay for a short pin and come back for a long one."""
    a = hmm.map(4)
    hmm.store(a, ramp(4))
    succeeded(hmm.mirror.migrate_to_device(a, 4), 4, ramp(4))
    hmm.mirror.events.clear()
    pins = [hmm.process.pin(hmm.span(a + page * PAGE_SIZE, 1), write=True, long_term=page >= 2) for page in range(4)]
    assert hmm.snapshot(a, 4) == ([0x42, 0x42, 0x02, 0x02] if hmm.coherent else [0x02] * 4)
    for pin in pins:
        pin.unpin()
    assert np.array_equal(hmm.load(a, 4), ramp(4))
    reason, back = ("CLEAR", (2, 3)) if hmm.coherent else ("MIGRATE own", (0, 1, 2, 3))
    assert hmm.mirror.heard(a) == [(reason, [(page, page + 1)]) for page in back]


def test_hmm_cow_in_device(hmm: Any) -> None:
    """The parent writes to pages that were on the device at fork: they are in system memory afterwards."""
    a = hmm.map(4)
    hmm.store(a, ramp(4))
    succeeded(hmm.mirror.migrate_to_device(a, 4), 4, ramp(4))
    child = hmm.process.fork()
    listener = hmm.open(hmm.cards[2 if hmm.coherent else 0], child)
    hmm.mirror.events.clear()
    hmm.store(a, ramp(4))
    parents, childs = hmm.mirror.heard(a), listener.heard(a)
    copied = ("CLEAR", [(0, 4)])
    assert parents[-1] == copied
    if hmm.coherent:
        assert (parents, childs) == ([copied], [])
    else:
        assert parents[0] == ("MIGRATE own", [(0, 4)])
        assert childs == [copied]
    listener.close()
    child.exit()
    assert hmm.snapshot(a, 4) == [0x02] * 4


def test_exit_tells_release_and_then_unmap(hmm: Any) -> None:
    """mmu_notifier_release(), then unmap_vmas() of everything, to whoever is still subscribed."""
    process = hmm.client.create_process("leaving")
    mirror = hmm.open(hmm.cards[0], process)
    process.mmap(BUFFER, RW, PRIVATE)
    process.exit()
    assert [reason for reason, _ in mirror.heard(0)] == ["RELEASE", "UNMAP"]
    mirror.close()
