"""Soft offlining: a page changes its frame, nobody loses anything, and who has it hears of it."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest
from machine_world import FIXED, RW, START, World, error_of, span, start_migration_of_a_shared_page

from hmm import commands_device as devices
from hmm import commands_file as files
from hmm import commands_hmm as hmm
from hmm import commands_process as processes
from hmm import cpu_pte
from hmm.address_space import AddressSpace, Thp
from hmm.events import Cause, EventType, Reason
from hmm.frames import PageFlag, RegionKind
from hmm.limits import Limits
from hmm.madvise import Advice
from hmm.mirror import DeadlinePolicy
from hmm.mlock import MlockFlag
from hmm.units import PAGE_SIZE, PMD_PAGES, PMD_SIZE
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot

EVERYTHING = 1 << 47
SHARED = MapFlag.SHARED | MapFlag.FIXED


def made(**limits: int) -> World:
    """A process that may give frames up, with a mirror."""
    world = World(limits=Limits(**({"frames": 256, "device_frames": 64, "swap_pages": 64} | limits)))
    world.machine.capable = True
    return world


@pytest.fixture
def world() -> World:
    """The same with room in a device's memory, and swap."""
    return made()


def write(world: World, first: int, data: bytes, pid: int = 0) -> None:
    """The CPU fills pages, one for each byte."""
    whole = b"".join(bytes([byte]) * PAGE_SIZE for byte in data)
    world.do(processes.write_memory, pid or world.pid, span(first).start, whole)


def read(world: World, first: int, npages: int = 1, pid: int = 0) -> bytes:
    """The first byte of each page, which all of it is."""
    data = world.do(processes.read_memory, pid or world.pid, span(first).start, npages * PAGE_SIZE).data
    pages = [data[at : at + PAGE_SIZE] for at in range(0, len(data), PAGE_SIZE)]
    assert all(page == page[:1] * PAGE_SIZE for page in pages)
    return bytes(page[0] for page in pages)


def start(world: World, first: int, npages: int = 1, pid: int = 0) -> Any:
    """MADV_SOFT_OFFLINE."""
    where = span(first, npages)
    return world.start(processes.madvise, pid or world.pid, where.start, where.size_bytes, Advice.SOFT_OFFLINE)


def offline(world: World, first: int, npages: int = 1, pid: int = 0) -> int:
    """The same.  Returns: 0, or its errno; the machine's invariants hold."""
    record = start(world, first, npages, pid)
    world.settle()
    world.machine.check()
    return (record.error and error_of(record).errno) or 0


def space(world: World, pid: int = 0) -> AddressSpace:
    """Of a process."""
    found: AddressSpace = world.machine.processes[pid or world.pid].space
    return found


def entries(world: World, first: int, npages: int = 1, pid: int = 0) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The CPU's."""
    where = span(first, npages)
    return space(world, pid).table.read(where.start, where.end)


def pfns(world: World, first: int, npages: int = 1, pid: int = 0) -> list[int]:
    """The frames that they name."""
    found: list[int] = cpu_pte.cpu_pfn(entries(world, first, npages, pid)).tolist()
    return found


def given_up(world: World) -> set[int]:
    """The frames that are never used again."""
    frames = world.machine.frames
    used = np.arange(frames.used_end)
    lost = used[frames.test_flags(used, PageFlag.HWPOISON)]
    assert frames.poisoned == lost.size
    assert (frames.refcount[lost] == 1).all()
    return set(lost.tolist())


def a_file(world: World, data: bytes, at: int, flags: MapFlag = SHARED) -> int:
    """A file of a page for each byte, mapped at a page of the window."""
    file: int = world.do(files.open_file, "f", create=True)
    world.do(files.write_file, file, 0, b"".join(bytes([byte]) * PAGE_SIZE for byte in data))
    world.do(processes.mmap, world.pid, span(at).start, len(data) * PAGE_SIZE, RW, flags, file)
    return file


def test_page_goes_on_in_another_frame(world: World) -> None:
    """page_handle_poison(): the old one is not used again; contents, permissions and state of the page stay."""
    write(world, 0, b"abc")
    before, flags = pfns(world, 0, 3), cpu_pte.cpu_flags(entries(world, 0, 3)).tolist()
    assert offline(world, 0, 2) == 0
    after = pfns(world, 0, 3)
    assert not {*before[:2]} & {*after}
    assert after[2] == before[2]
    assert cpu_pte.cpu_flags(entries(world, 0, 3)).tolist() == flags
    assert given_up(world) == {*before[:2]}
    assert read(world, 0, 3) == b"abc"
    assert offline(world, 0, 2) == 0
    assert given_up(world) == {*before[:2], *after[:2]}


def test_drivers_hear_before_the_page_goes_and_find_it_elsewhere(world: World) -> None:
    """try_to_migrate() tells of CLEAR without an owner; in 2015 of MIGRATE."""
    write(world, 0, b"abc")
    world.do(devices.mirror_fault, world.mirrors[0], span(0, 3), EventType.DEVICE_WFAULT)
    mirror = world.do(hmm.attach, world.do(devices.register_device, "card"), world.pid)
    world.do(hmm.insert_notifier, mirror, 0, EVERYTHING)
    record = start(world, 1, 2)
    told = world.sent()
    assert not record.done
    assert [one.mirror_id for one in told] == [world.mirrors[0], mirror]
    assert [one.event.spans for one in told] == [(span(1, 2),)] * 2
    event = told[0].event
    assert (event.cause, event.etype, event.reason, event.owner) == (
        Cause.SOFT_OFFLINE, EventType.MIGRATE, Reason.CLEAR, 0
    )  # fmt: skip
    for one in told:
        world.machine.answer(one.mirror_id, one.sequence)
    world.settle()
    assert record.done
    world.do(devices.mirror_fault, world.mirrors[0], span(0, 3), EventType.DEVICE_WFAULT)
    assert bytes(world.do(devices.device_read, world.mirrors[0], [(span(1).start, 1), (span(2).start, 1)])) == b"bc"


def test_page_that_is_shared_by_fork_moves_for_all(world: World) -> None:
    """rmap_walk(): child and parent go on sharing it, and copy it when they write."""
    write(world, 0, b"ab")
    child = world.do(processes.fork, world.pid)
    (old, _) = pfns(world, 0, 2)
    assert offline(world, 0, pid=child) == 0
    assert pfns(world, 0) == pfns(world, 0, pid=child) != [old]
    write(world, 0, b"x", child)
    assert (read(world, 0, 2), read(world, 0, 2, child)) == (b"ab", b"xb")
    assert given_up(world) == {old}


def test_page_of_a_file_moves_in_its_page_cache(world: World) -> None:
    """folio_migrate_mapping(): who maps it, reads it or writes it later has the new frame."""
    file = a_file(world, b"abcd", 32)
    assert read(world, 32, 4) == b"abcd"
    child = world.do(processes.fork, world.pid)
    assert read(world, 32, 4, child) == b"abcd"
    before = pfns(world, 32, 4)
    assert offline(world, 33, 2) == 0
    assert given_up(world) == {*before[1:3]}
    assert pfns(world, 32, 4) == pfns(world, 32, 4, child)
    world.do(files.write_file, file, PAGE_SIZE, b"B" * PAGE_SIZE)
    write(world, 34, b"C", child)
    assert read(world, 32, 4) == b"aBCd"
    assert world.do(files.read_file, file, 2 * PAGE_SIZE, 1) == b"C"
    world.do(files.truncate_file, file, 0)
    world.machine.check()


def test_copy_of_a_file_moves_and_the_file_stays(world: World) -> None:
    """Copies that a process has to itself are private memory."""
    file = a_file(world, b"ab", 32, MapFlag.PRIVATE | MapFlag.FIXED)
    write(world, 32, b"x")
    assert read(world, 33) == b"b"
    assert offline(world, 32, 2) == 0
    assert read(world, 32, 2) == b"xb"
    assert world.do(files.read_file, file, 0, 1) == b"a"


def test_page_that_is_in_swap_as_well_keeps_its_slot(world: World) -> None:
    """folio_migrate_mapping() of a page in the swap cache: who still has it in swap finds it at its new place."""
    write(world, 0, b"a")
    world.do(processes.madvise, world.pid, START, PAGE_SIZE, Advice.PAGEOUT)
    child = world.do(processes.fork, world.pid)
    assert read(world, 0) == b"a"
    assert offline(world, 0) == 0
    assert len(given_up(world)) == 1
    assert cpu_pte.is_swap(entries(world, 0, pid=child)).all()
    assert read(world, 0, pid=child) == b"a"
    assert pfns(world, 0) == pfns(world, 0, pid=child)


def test_merged_page_moves_for_all_who_have_it(world: World) -> None:
    """rmap_walk_ksm()."""
    write(world, 0, b"aaaa")
    world.do(processes.madvise, world.pid, START, 4 * PAGE_SIZE, Advice.MERGEABLE)
    world.do(processes.scan_ksm, 2)
    assert len({*pfns(world, 0, 4)}) == 1
    assert offline(world, 1) == 0
    assert len({*pfns(world, 0, 4)}) == 1
    write(world, 2, b"b")
    assert read(world, 0, 4) == b"aaba"


def test_page_comes_back_from_a_device_first(world: World) -> None:
    """get_user_pages_fast() touches it."""
    card = world.do(devices.register_device, "card", memory_pages=8)
    mirror = world.do(hmm.attach, card, world.pid)
    write(world, 0, b"ab")
    world.do(hmm.migrate_to_device, mirror, span(0, 2))
    assert offline(world, 0, 2) == 0
    assert len(given_up(world)) == 2
    assert read(world, 0, 2) == b"ab"


def test_call_ends_at_a_page_that_somebody_refers_to(world: World) -> None:
    """migrate_pages() gives it up: EBUSY, it is where it was, and what lies before it has moved."""
    write(world, 0, b"abcd")
    before = pfns(world, 0, 4)
    pin = world.do(processes.pin, world.pid, span(2), write=True)
    assert offline(world, 0, 4) == errno.EBUSY
    assert given_up(world) == {*before[:2]}
    assert pfns(world, 0, 4)[2:] == before[2:]
    assert read(world, 0, 4) == b"abcd"
    world.do(processes.unpin, pin)
    assert offline(world, 2, 2) == 0
    assert given_up(world) == {*before}


@pytest.mark.parametrize(("prot", "expected"), [(Prot.WRITE, 0), (Prot.EXEC, 0), (Prot(0), errno.EFAULT)])
def test_page_that_is_there_moves_when_its_mapping_permits_no_reading(prot: Prot, expected: int) -> None:
    """gup_fast_pte_range() asks the entry, check_vma_flags() the VMA: what is not there is EFAULT."""
    world = made()
    write(world, 0, b"ab")
    world.do(processes.mprotect, world.pid, START, 4 * PAGE_SIZE, prot)
    before = pfns(world, 0, 2)
    assert offline(world, 0, 2) == expected
    assert given_up(world) == (set() if expected else {*before})
    assert offline(world, 2) == errno.EFAULT
    world.do(processes.mprotect, world.pid, START, 4 * PAGE_SIZE, RW)
    assert read(world, 0, 4) == b"ab\0\0"
    assert offline(world, 1, 2) == errno.EIO  # the zero page


def test_zero_page_is_passed_over_when_it_is_lost(world: World) -> None:
    """soft_offline_page(): PageHWPoison() is 0, before HWPoisonHandlable() is asked."""
    write(world, 2, b"c")
    before = pfns(world, 2, 1)
    assert offline(world, 0, 3) == errno.EIO
    failed = world.start(processes.madvise, world.pid, START, PAGE_SIZE, Advice.HWPOISON)
    assert error_of(failed).errno == errno.EBUSY  # and is lost from now on
    assert offline(world, 0, 3) == 0
    assert given_up(world) == {*before}
    assert read(world, 0, 3) == b"\0\0c"


def test_huge_page_is_split_when_its_mapping_permits_no_reading() -> None:
    """gup_fast_pmd_leaf(): pmd_access_permitted() asks the entry."""
    world = made(frames=8 * PMD_PAGES)
    at = (-(-START // PMD_SIZE) * PMD_SIZE - START) // PAGE_SIZE
    space(world).thp = Thp.ALWAYS
    where = span(at, PMD_PAGES)
    world.do(processes.mmap, world.pid, where.start, where.size_bytes, Prot.WRITE, FIXED)
    world.do(processes.write_pages, world.pid, where, 0, b"h" * PMD_PAGES)
    assert space(world).table.get(where.start) & cpu_pte.HUGE
    lost = pfns(world, at, 1)
    assert offline(world, at) == 0
    assert given_up(world) == {*lost}


@pytest.mark.parametrize("what", ["zero page", "coherent memory", "nothing mapped", "behind the end", "hugetlb"])
def test_call_ends_at_a_page_that_cannot_move(what: str) -> None:
    """HWPoisonHandlable(), pfn_to_online_page(): EIO; what cannot be had is EFAULT; what lies before it has moved."""
    world = made(frames=2048, hugetlb_pages=1)
    expected, at = errno.EIO, 15
    write(world, 14, b"a")
    if what == "coherent memory":
        card = world.do(devices.register_device, "card", memory_pages=8, kind=RegionKind.DEVICE_COHERENT)
        mirror = world.do(hmm.attach, card, world.pid)
        write(world, 15, b"b")
        world.do(hmm.migrate_to_device, mirror, span(15))
    elif what == "nothing mapped":
        expected, at = errno.EFAULT, 16
        write(world, 15, b"b")
    elif what == "behind the end":
        expected = errno.EFAULT
        world.do(files.truncate_file, a_file(world, b"a", 15), 0)
    elif what == "hugetlb":
        expected, at = errno.EOPNOTSUPP, 16
        write(world, 15, b"b")
        start_of_it = -(-span(16).start // PMD_SIZE) * PMD_SIZE
        world.do(processes.mmap, world.pid, span(16).start, start_of_it - span(16).start, RW, FIXED)
        world.do(processes.mmap, world.pid, start_of_it, PMD_SIZE, RW, FIXED | MapFlag.HUGETLB)
        at = (start_of_it - START) // PAGE_SIZE
        write(world, at - 1, b"c")
        assert offline(world, at - 1, 2) == expected
        assert len(given_up(world)) == 1
        return
    assert offline(world, 14, 3) == expected
    assert len(given_up(world)) == at - 14
    assert read(world, 14) == b"a"


@pytest.mark.parametrize("shared", [False, True])
def test_frame_of_a_huge_page_is_given_up_when_it_held_nothing(*, shared: bool) -> None:
    """The split maps the zero page; migrate_folio_unmap() finds nothing to move, page_handle_poison() gives it up.

    Where it stays mapped, as somebody has it locked, it moves.
    """
    world = made(frames=4096)
    first = 2 * PMD_PAGES
    space(world).thp = Thp.ALWAYS
    world.do(processes.mmap, world.pid, span(first).start, PMD_SIZE, RW, FIXED)
    write(world, first, b"a")
    (before,) = pfns(world, first + 1)
    if shared:
        child = world.do(processes.fork, world.pid)
        world.do(processes.mlock, child, span(first).start, PMD_SIZE, MlockFlag.ONFAULT)
        assert pfns(world, first + 1, pid=child) == [before]
    assert offline(world, first + 1) == 0
    assert given_up(world) == {before}
    assert pfns(world, first + 1) == [0]
    if shared:
        assert pfns(world, first + 1, pid=child) not in ([0], [before])
    assert read(world, first) == b"a"


def test_huge_page_is_split_and_one_page_of_it_moves() -> None:
    """try_to_split_thp_page(): EBUSY when somebody refers to it; the rest of it is passed over: page_size()."""
    world = made(frames=4096)
    first = 2 * PMD_PAGES
    space(world).thp = Thp.ALWAYS
    world.do(processes.mmap, world.pid, span(first).start, PMD_SIZE + PAGE_SIZE, RW, FIXED)
    write(world, first, b"ab")
    write(world, first + PMD_PAGES, b"c")
    before = pfns(world, first, 2)
    pin = world.do(processes.pin, world.pid, span(first), write=True)
    assert offline(world, first) == errno.EBUSY
    assert cpu_pte.is_huge(entries(world, first)).all()
    world.do(processes.unpin, pin)
    assert offline(world, first, PMD_PAGES + 1) == 0
    assert not cpu_pte.is_huge(entries(world, first)).any()
    assert len(given_up(world)) == 2
    assert before[0] in given_up(world)
    assert pfns(world, first + 1) == before[1:]
    assert read(world, first, 2) + read(world, first + PMD_PAGES) == b"abc"


def test_call_fails_when_no_frame_is_left() -> None:
    """alloc_migration_target() finds none: ENOMEM, and the pages before it have moved."""
    world = made(frames=16, swap_pages=0)
    write(world, 0, bytes(range(1, 13)))
    assert offline(world, 0, 12) == errno.ENOMEM
    moved = given_up(world)
    assert 0 < len(moved) < 12
    assert offline(world, 0) == errno.ENOMEM
    assert given_up(world) == moved
    assert read(world, 0, 12) == bytes(range(1, 13))


def test_memory_is_reclaimed_for_new_frames() -> None:
    """__GFP_RETRY_MAYFAIL: others go to swap."""
    world = made(frames=16, swap_pages=16)
    write(world, 0, bytes(range(1, 13)))
    for page in range(3):
        assert offline(world, page) == 0
    assert len(given_up(world)) == 3
    assert read(world, 0, 12) == bytes(range(1, 13))


def test_page_of_a_file_that_is_truncated_meanwhile_goes(world: World) -> None:
    """Its frame is free but for the call, which gives it up: unmap_and_move(), "folio was freed from under us"."""
    file = a_file(world, b"ab", 32)
    assert read(world, 32, 2) == b"ab"
    (old, _) = pfns(world, 32, 2)
    world.do(hmm.insert_notifier, world.do(hmm.attach, world.devices[0], world.pid), 0, EVERYTHING)
    record = start(world, 32)
    owed = world.sent()
    assert owed
    truncating = world.start(files.truncate_file, file, 0)
    for one in owed:
        world.machine.answer(one.mirror_id, one.sequence)
    world.settle()
    assert record.done
    assert truncating.done
    assert record.error is None
    world.machine.check()
    assert given_up(world) == {old}
    assert entries(world, 32, 2).tolist() == [0, 0]


def test_page_is_where_it_was_when_a_driver_does_not_answer() -> None:
    """With policy FAIL nothing is changed."""
    world = World(policy=DeadlinePolicy.FAIL, limits=Limits(frames=256, device_frames=0))
    world.machine.capable = True
    write(world, 0, b"a")
    world.do(devices.mirror_fault, world.mirrors[0], span(0), EventType.DEVICE_WFAULT)
    before = entries(world, 0).tolist()
    record = start(world, 0)
    (owed,) = world.sent()
    world.machine.abandon(owed.mirror_id, owed.sequence)
    world.settle()
    assert error_of(record).errno == errno.ETIMEDOUT
    assert entries(world, 0).tolist() == before
    assert not given_up(world)
    world.machine.answer(owed.mirror_id, owed.sequence)
    world.machine.check()


def test_call_waits_for_a_migration_that_has_the_page(world: World) -> None:
    """folio_lock(); its reference keeps the page where it is: the migration puts it back."""
    machine = world.machine
    write(world, 0, b"a")
    moving, child, slow, owed = start_migration_of_a_shared_page(world)
    record = start(world, 0, pid=child)
    assert machine.blockers(record) == [moving.id]
    machine.answer(slow, owed.sequence)
    for told in world.settle(slow):
        machine.answer(slow, told.sequence)
    world.settle()
    assert record.done
    assert record.error is None
    assert [int(word) for word in moving.result.src] == [0]
    machine.check()
    assert len(given_up(world)) == 1
    assert read(world, 0) == read(world, 0, pid=child) == b"a"
