"""madvise: what each advice does, to which mappings, and how far a call gets that fails."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from area import BASE, PRIVATE, RW, SHARED, at, fill, letters, pages

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.cpu_access import touch
from hmm.errors import (
    EHWPOISON,
    AccessDeniedError,
    BadAddressError,
    HmmError,
    InvalidRequestError,
    NoSuchObjectError,
    OutOfFramesError,
    RangeBusyError,
    TimedOutError,
)
from hmm.events import Cause, EventState, EventType, Reason
from hmm.file import FILE_SIZE_MAX
from hmm.madvise import Advice, madvise
from hmm.mman import MapFlag
from hmm.operation import WaitFor
from hmm.units import PAGE_SIZE, PIECE_PAGES, PMD_PAGES
from hmm.vma import MAY_FLAGS, Mapping, Prot, VmFlag


def advise(world: Any, space: AddressSpace, first: int, last: int, advice: int) -> int:
    """madvise of pages [first, last)."""
    result: int = world.run(madvise(space, at(first), (last - first) * PAGE_SIZE, advice))
    return result


def special_flags(space: AddressSpace) -> list[tuple[int, VmFlag]]:
    """First page and flags of every VMA, without access, MAY and accounting."""
    usual = VmFlag.READ | VmFlag.WRITE | MAY_FLAGS | VmFlag.ACCOUNT
    return [((vma.start - BASE) // PAGE_SIZE, vma.flags & ~usual) for vma in space.vmas]


# ---- the request


@pytest.mark.parametrize("advice", [5, 7, 26, 99, 102, -1])
def test_madvise_fails_when_the_advice_is_unknown(world: Any, space: AddressSpace, advice: int) -> None:
    """EINVAL, even for no length at all."""
    with pytest.raises(InvalidRequestError) as error:
        world.run(madvise(space, BASE, 0, advice))
    assert error.value.errno == errno.EINVAL


@pytest.mark.parametrize(("start", "length"), [(BASE + 1, 0), (BASE + 1, PAGE_SIZE), (BASE, (1 << 64) - 1)])
def test_madvise_fails_when_the_range_is_none(world: Any, space: AddressSpace, start: int, length: int) -> None:
    """A start within a page, a length that rounds to nothing (EINVAL)."""
    with pytest.raises(InvalidRequestError) as error:
        world.run(madvise(space, start, length, Advice.DONTNEED))
    assert error.value.errno == errno.EINVAL


def test_madvise_does_nothing_when_there_is_no_length(world: Any, space: AddressSpace) -> None:
    """0, whatever is mapped there."""
    assert world.run(madvise(space, BASE, 0, Advice.POPULATE_READ)) == 0


@pytest.mark.parametrize("advice", [Advice.HWPOISON, Advice.SOFT_OFFLINE])
def test_madvise_refuses_when_it_needs_privileges(world: Any, space: AddressSpace, advice: Advice) -> None:
    """madvise_inject_error(): EPERM."""
    world.map(space, 1)
    with pytest.raises(AccessDeniedError) as error:
        advise(world, space, 0, 1, advice)
    assert error.value.errno == errno.EPERM


def test_madvise_waits_when_another_call_has_its_turn(world: Any, space: AddressSpace) -> None:
    """VMAs do not change while it looks at them."""
    world.map(space, 1)
    with space.notifier.turn():
        call = madvise(space, BASE, PAGE_SIZE, Advice.DONTNEED)
        assert world.start(call).wait_for is WaitFor.TURN
    assert world.run(call) == 0


# ---- flags of the VMA


@pytest.mark.parametrize(
    ("advice", "flag", "opposite"),
    [
        (Advice.RANDOM, VmFlag.RAND_READ, Advice.NORMAL),
        (Advice.SEQUENTIAL, VmFlag.SEQ_READ, Advice.NORMAL),
        (Advice.DONTFORK, VmFlag.DONTCOPY, Advice.DOFORK),
        (Advice.WIPEONFORK, VmFlag.WIPEONFORK, Advice.KEEPONFORK),
        (Advice.DONTDUMP, VmFlag.DONTDUMP, Advice.DODUMP),
        (Advice.MERGEABLE, VmFlag.MERGEABLE, Advice.UNMERGEABLE),
    ],
)
def test_madvise_marks_the_range_when_the_advice_is_a_flag(
    world: Any, space: AddressSpace, advice: Advice, flag: VmFlag, opposite: Advice
) -> None:
    """VMAs are cut for it, and whole again when it is taken back."""
    world.map(space, 4)
    listener = world.listen(space)
    assert advise(world, space, 1, 3, advice) == 0
    assert special_flags(space) == [(0, VmFlag.NONE), (1, flag), (3, VmFlag.NONE)]
    assert advise(world, space, 1, 3, advice) == 0
    assert advise(world, space, 0, 4, opposite) == 0
    assert special_flags(space) == [(0, VmFlag.NONE)]
    assert not listener.events


def test_madvise_replaces_the_mark_when_two_exclude_each_other(world: Any, space: AddressSpace) -> None:
    """Random or sequential, huge pages or none."""
    world.map(space, 1)
    for advice in (Advice.RANDOM, Advice.SEQUENTIAL, Advice.HUGEPAGE, Advice.NOHUGEPAGE):
        advise(world, space, 0, 1, advice)
    assert special_flags(space) == [(0, VmFlag.SEQ_READ | VmFlag.NOHUGEPAGE)]
    advise(world, space, 0, 1, Advice.HUGEPAGE)
    assert special_flags(space) == [(0, VmFlag.SEQ_READ | VmFlag.HUGEPAGE)]


def test_madvise_passes_over_what_cannot_be_merged(world: Any, space: AddressSpace) -> None:
    """vma_ksm_compatible(): MERGEABLE of shared memory is 0 and changes nothing."""
    world.map(space, 1, RW, SHARED, world.file(1), at=0)
    world.map(space, 1, at=1)
    assert advise(world, space, 0, 2, Advice.MERGEABLE) == 0
    assert special_flags(space) == [(0, VmFlag.SHARED | VmFlag.MAYSHARE), (1, VmFlag.MERGEABLE)]


def test_madvise_applies_to_all_mapped_parts_when_there_are_holes(world: Any, space: AddressSpace) -> None:
    """madvise_walk_vmas(): ENOMEM at the end, for a hole at either end or between."""
    world.map(space, 1, at=1)
    world.map(space, 1, at=3)
    with pytest.raises(BadAddressError) as error:
        advise(world, space, 0, 4, Advice.DONTFORK)
    assert (error.value.errno, error.value.address) == (errno.ENOMEM, at(0))
    assert special_flags(space) == [(1, VmFlag.DONTCOPY), (3, VmFlag.DONTCOPY)]
    with pytest.raises(BadAddressError) as error:
        advise(world, space, 3, 5, Advice.DOFORK)
    assert error.value.errno == errno.ENOMEM
    assert special_flags(space) == [(1, VmFlag.DONTCOPY), (3, VmFlag.NONE)]


@pytest.mark.parametrize(
    ("advice", "flags"),
    [
        (Advice.WIPEONFORK, VmFlag.NONE),
        (Advice.DOFORK, VmFlag.IO),
        (Advice.DODUMP, VmFlag.MIXEDMAP),
        (Advice.COLD, VmFlag.LOCKED),
        (Advice.PAGEOUT, VmFlag.PFNMAP),
        (Advice.DONTNEED, VmFlag.LOCKED),
        (Advice.DONTNEED, VmFlag.PFNMAP),
        (Advice.DONTNEED_LOCKED, VmFlag.PFNMAP),
        (Advice.FREE, VmFlag.NONE),
    ],
)
def test_madvise_stops_when_a_mapping_does_not_take_the_advice(
    world: Any, space: AddressSpace, advice: Advice, flags: VmFlag
) -> None:
    """EINVAL at once, though there was a hole before; what lies below got the advice, what lies above did not."""
    world.map(space, 1, at=0)
    space.vmas.assign(pages(2, 3), Mapping(VmFlag.READ | MAY_FLAGS | flags, world.file(1)))
    world.map(space, 1, at=3)
    fill(world, space, 0, "a")
    fill(world, space, 3, "b")
    listener = world.listen(space)
    with pytest.raises(InvalidRequestError) as error:
        advise(world, space, 0, 4, advice)
    assert (error.value.errno, error.value.address) == (errno.EINVAL, at(2))
    assert all(event.spans == (pages(0, 1),) for event in listener.events)
    assert letters(world, space, 3, 4) == "b"
    assert special_flags(space)[2] == (3, VmFlag.NONE)


def test_madvise_fails_when_there_are_too_many_vmas(world: Any) -> None:
    """ENOMEM of a split becomes EAGAIN."""
    space = world.space(vmas=2)
    world.map(space, 3)
    with pytest.raises(RangeBusyError) as error:
        advise(world, space, 1, 2, Advice.DONTFORK)
    assert error.value.errno == errno.EAGAIN
    advise(world, space, 0, 3, Advice.DONTFORK)


@pytest.mark.parametrize("advice", [Advice.WILLNEED, Advice.COLD, Advice.PAGEOUT])
def test_madvise_accepts_hints(world: Any, space: AddressSpace, advice: Advice) -> None:
    """They change nothing, and nobody hears of them; a hole is ENOMEM."""
    world.map(space, 2)
    fill(world, space, 0, "a")
    listener = world.listen(space)
    assert advise(world, space, 0, 2, advice) == 0
    with pytest.raises(BadAddressError) as error:
        advise(world, space, 0, 3, advice)
    assert error.value.errno == errno.ENOMEM
    assert letters(world, space, 0, 1) == "a"
    assert not listener.events
    assert special_flags(space) == [(0, VmFlag.NONE)]


# ---- DONTNEED and FREE


def test_madvise_drops_pages_when_they_are_not_needed(world: Any, space: AddressSpace) -> None:
    """DONTNEED: private memory reads as zeroes again, a copy of a file's page as the file, shared memory stays."""
    file = world.file(2)
    world.map(space, 2, at=0)
    world.map(space, 1, RW, SHARED, file, at=2)
    world.map(space, 1, RW, PRIVATE, file, at=3)
    fill(world, space, 0, "abcd")
    listener = world.listen(space)
    assert advise(world, space, 1, 4, Advice.DONTNEED) == 0
    (event,) = listener.events
    assert (event.cause, event.etype, event.reason) == (Cause.MADV_DONTNEED, EventType.MIGRATE, Reason.CLEAR)
    assert event.spans == (pages(1, 2), pages(2, 3), pages(3, 4))
    assert letters(world, space, 0, 4) == "a.cc"


def test_madvise_drops_locked_pages_when_told_that_they_are(world: Any, space: AddressSpace) -> None:
    """DONTNEED_LOCKED."""
    world.map(space, 1, flags=PRIVATE | MapFlag.LOCKED)
    fill(world, space, 0, "a")
    assert advise(world, space, 0, 1, Advice.DONTNEED_LOCKED) == 0
    assert letters(world, space, 0, 1) == "."


def test_madvise_drops_all_mapped_parts_when_there_is_a_hole(world: Any, space: AddressSpace) -> None:
    """ENOMEM, and every page is gone."""
    world.map(space, 1, at=0)
    world.map(space, 1, at=2)
    fill(world, space, 0, "a")
    fill(world, space, 2, "b")
    with pytest.raises(BadAddressError) as error:
        advise(world, space, 0, 3, Advice.DONTNEED)
    assert error.value.errno == errno.ENOMEM
    assert letters(world, space, 0, 1) + letters(world, space, 2, 3) == ".."


def test_madvise_tells_nobody_when_nothing_is_mapped(world: Any, space: AddressSpace) -> None:
    """ENOMEM without an event."""
    listener = world.listen(space)
    with pytest.raises(BadAddressError):
        advise(world, space, 0, 1, Advice.DONTNEED)
    assert not listener.events


def test_madvise_keeps_pages_when_a_mirror_does_not_answer(world: Any, space: AddressSpace) -> None:
    """Policy FAIL: nothing is discarded."""
    world.map(space, 1)
    fill(world, space, 0, "a")
    world.listen(space).state = EventState.ABANDONED
    with pytest.raises(TimedOutError):
        advise(world, space, 0, 1, Advice.DONTNEED)
    assert letters(world, space, 0, 1) == "a"


def test_madvise_makes_pages_clean_when_they_are_free_to_go(world: Any, space: AddressSpace) -> None:
    """FREE: reclaim may take them; nobody reclaims, so the contents stay, and device entries are left alone."""
    world.map(space, 5)
    fill(world, space, 0, "a")
    others = (cpu_pte.DEVICE | cpu_pte.WRITE, cpu_pte.EXCLUSIVE, cpu_pte.POISON)
    for number, flags in enumerate(others):
        space.table.set(at(number + 1), cpu_pte.cpu_entry(500, flags))
    listener = world.listen(space)
    assert advise(world, space, 0, 5, Advice.FREE) == 0
    (event,) = listener.events
    assert (event.cause, event.etype, event.reason) == (Cause.MADV_FREE, EventType.MIGRATE, Reason.CLEAR)
    entry = space.table.get(at(0))
    assert cpu_pte.is_writable(entry)
    assert not entry & (cpu_pte.DIRTY | cpu_pte.ACCESSED)
    assert [cpu_pte.cpu_flags(space.table.get(at(page))) for page in (1, 2, 3)] == [*others[:2], 0]
    assert letters(world, space, 0, 1) == "a"


@pytest.mark.parametrize("advice", [Advice.DONTNEED, Advice.FREE])
def test_madvise_pauses_when_there_is_much_to_discard(world: Any, space: AddressSpace, advice: Advice) -> None:
    """A long call lets others go first between its pieces."""
    npages = 3 * PIECE_PAGES
    world.map(space, npages)
    world.run(touch(space, pages(0, npages), write=False))
    paused = world.pauses
    advise(world, space, 0, npages, advice)
    assert world.pauses == paused + 2


# ---- REMOVE


def test_madvise_makes_a_hole_in_the_file_when_it_is_removed(world: Any, space: AddressSpace) -> None:
    """fallocate(FALLOC_FL_PUNCH_HOLE): all who map the file read zeroes; private copies stay."""
    file = world.file(4)
    world.map(space, 3, RW, SHARED, file, at=0, offset=1)
    world.map(space, 4, RW, PRIVATE, file, at=8)
    fill(world, space, 0, "bcd")
    fill(world, space, 10, "x")
    listener = world.listen(space)
    assert advise(world, space, 1, 3, Advice.REMOVE) == 0
    assert letters(world, space, 0, 3) == "b.."
    assert letters(world, space, 8, 12) == ".bx."
    assert {event.cause for event in listener.events} == {Cause.TRUNCATE}
    assert file.size_bytes == 4 * PAGE_SIZE


def test_madvise_removes_all_mapped_parts_when_there_are_holes(world: Any, space: AddressSpace) -> None:
    """ENOMEM at the end."""
    file = world.file(3)
    world.map(space, 1, RW, SHARED, file, at=1)
    world.map(space, 1, RW, SHARED, file, at=3, offset=2)
    for page in (1, 3):
        fill(world, space, page, "a")
    for first, last in ((0, 4), (3, 5)):
        with pytest.raises(BadAddressError) as error:
            advise(world, space, first, last, Advice.REMOVE)
        assert error.value.errno == errno.ENOMEM
    assert letters(world, space, 1, 2) + letters(world, space, 3, 4) == ".."


def test_madvise_removes_nothing_when_it_is_behind_any_file(world: Any, space: AddressSpace) -> None:
    """A mapping may reach further than files do; there is nothing to remove."""
    file = world.file(1)
    delta = (FILE_SIZE_MAX - BASE) // PAGE_SIZE
    space.vmas.assign(pages(0, 2), Mapping(VmFlag.SHARED | MAY_FLAGS, file, delta - 1))
    assert advise(world, space, 0, 2, Advice.REMOVE) == 0
    assert advise(world, space, 1, 2, Advice.REMOVE) == 0


@pytest.mark.parametrize(
    ("flags", "of_file", "kind", "number"),
    [
        (VmFlag.WRITE, False, InvalidRequestError, errno.EINVAL),
        (VmFlag.SHARED | VmFlag.LOCKED, True, InvalidRequestError, errno.EINVAL),
        (VmFlag.WRITE, True, AccessDeniedError, errno.EACCES),
    ],
)
def test_madvise_does_not_remove_when_the_mapping_is_not_shared(
    world: Any, space: AddressSpace, flags: VmFlag, of_file: bool, kind: type[HmmError], number: int
) -> None:
    """Private memory has no file, a locked mapping is not touched, a private one may not punch holes."""
    space.vmas.assign(pages(0, 1), Mapping(flags | MAY_FLAGS, world.file(1) if of_file else None))
    with pytest.raises(kind) as error:
        advise(world, space, 0, 1, Advice.REMOVE)
    assert error.value.errno == number


def test_madvise_does_not_remove_when_it_is_a_device(world: Any, space: AddressSpace) -> None:
    """vfs_fallocate() of a device file: ENODEV."""
    world.map(space, 1, RW, SHARED, world.device_file(VmFlag.MIXEDMAP))
    with pytest.raises(NoSuchObjectError) as error:
        advise(world, space, 0, 1, Advice.REMOVE)
    assert error.value.errno == errno.ENODEV


# ---- POPULATE


def test_madvise_brings_pages_in_when_told_to_populate(world: Any, space: AddressSpace) -> None:
    """For reading the zero page, for writing pages of their own, across VMAs."""
    world.map(space, 2, at=0)
    world.map(space, 2, RW, SHARED, world.file(2), at=2)
    assert advise(world, space, 0, 4, Advice.POPULATE_READ) == 0
    assert world.frames.available == 1021
    assert space.table.read(at(0), at(4)).all()
    assert advise(world, space, 0, 4, Advice.POPULATE_WRITE) == 0
    assert world.frames.available == 1019


@pytest.mark.parametrize(
    ("advice", "prot", "number"),
    [
        (Advice.POPULATE_WRITE, Prot.READ, errno.EINVAL),
        (Advice.POPULATE_READ, Prot.NONE, errno.EINVAL),
        (Advice.POPULATE_READ, Prot.WRITE, errno.EINVAL),
    ],
)
def test_madvise_does_not_populate_when_the_access_is_not_permitted(
    world: Any, space: AddressSpace, advice: Advice, prot: Prot, number: int
) -> None:
    """EINVAL; the pages of the VMA before are in."""
    world.map(space, 1, at=0)
    world.map(space, 1, prot, at=1)
    with pytest.raises(InvalidRequestError) as error:
        advise(world, space, 0, 2, advice)
    assert error.value.errno == number
    assert [bool(entry) for entry in space.table.read(at(0), at(2))] == [True, False]


def test_madvise_does_not_populate_registers(world: Any, space: AddressSpace) -> None:
    """VM_IO and VM_PFNMAP: EINVAL."""
    world.map(space, 1, RW, SHARED, world.device_file(VmFlag.PFNMAP | VmFlag.IO))
    with pytest.raises(InvalidRequestError):
        advise(world, space, 0, 1, Advice.POPULATE_READ)


def test_madvise_populates_up_to_the_hole_when_there_is_one(world: Any, space: AddressSpace) -> None:
    """ENOMEM; nothing behind the hole is brought in."""
    world.map(space, 1, at=0)
    world.map(space, 1, at=2)
    with pytest.raises(BadAddressError) as error:
        advise(world, space, 0, 3, Advice.POPULATE_WRITE)
    assert error.value.errno == errno.ENOMEM
    assert [bool(entry) for entry in space.table.read(at(0), at(3))] == [True, False, False]


def test_madvise_fails_when_a_page_cannot_be_brought_in(world: Any, space: AddressSpace) -> None:
    """Behind the end of a file EFAULT, lost contents EHWPOISON, no memory ENOMEM."""
    world.map(space, 2, RW, SHARED, world.file(1), at=0)
    with pytest.raises(BadAddressError) as error:
        advise(world, space, 0, 2, Advice.POPULATE_READ)
    assert (error.value.errno, error.value.address) == (errno.EFAULT, at(1))
    world.map(space, 1, at=2)
    space.table.set(at(2), cpu_pte.cpu_entry(0, cpu_pte.POISON))
    with pytest.raises(BadAddressError) as error:
        advise(world, space, 2, 3, Advice.POPULATE_WRITE)
    assert error.value.errno == EHWPOISON
    world.map(space, 2000, at=3)
    with pytest.raises(OutOfFramesError) as lacking:
        advise(world, space, 3, 2003, Advice.POPULATE_WRITE)
    assert lacking.value.errno == errno.ENOMEM


@pytest.mark.parametrize(("npages", "offset"), [(16, 0), (1024, 1)])
def test_madvise_refuses_to_collapse_when_no_block_of_a_file_fits(
    world: Any, space: AddressSpace, npages: int, offset: int
) -> None:
    """thp_vma_suitable_order(): a block of addresses inside the VMA, and at a multiple of its size in the file."""
    world.map(space, npages, RW, SHARED, world.file(2), at=0, offset=offset)
    with pytest.raises(InvalidRequestError):
        advise(world, space, 0, npages, Advice.COLLAPSE)


def test_madvise_refuses_to_collapse_less_than_a_block_of_a_file(world: Any, space: AddressSpace) -> None:
    """madvise_collapse(): EINVAL where the end lies before the first block; between two blocks there is none to do."""
    block = PMD_PAGES
    world.map(space, 2 * block, RW, SHARED, world.file(2 * block), at=0)
    with pytest.raises(InvalidRequestError):
        advise(world, space, 1, block - 1, Advice.COLLAPSE)
    advise(world, space, 1, block, Advice.COLLAPSE)
