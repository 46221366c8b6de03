"""msync and write-back."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from area import BASE, PRIVATE, RW, SHARED, at, pages

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.cpu_access import read_memory, touch, write_memory
from hmm.errors import BadAddressError, InvalidRequestError, RangeBusyError, TimedOutError
from hmm.events import Cause, EventState, EventType, Reason
from hmm.file import FILE_SIZE_MAX, File, FileKind
from hmm.frames import PageFlag
from hmm.mman import MapFlag, mmap, munmap
from hmm.msync import MsyncFlag, msync, write_back
from hmm.units import PAGE_SIZE
from hmm.vma import Prot, VmFlag


def sync(world: Any, space: AddressSpace, first: int, last: int, flags: int = MsyncFlag.SYNC) -> int:
    """msync of pages [first, last)."""
    result: int = world.run(msync(space, at(first), (last - first) * PAGE_SIZE, flags))
    return result


def entries(space: AddressSpace, first: int, last: int) -> str:
    """A letter per page: d dirty, w writable and clean, r read-only and clean, . nothing."""
    words = space.table.read(at(first), at(last)).tolist()
    return "".join(
        "d" if cpu_pte.is_dirty(word) else "w" if cpu_pte.is_writable(word) else "r" if word else "." for word in words
    )


@pytest.fixture
def file(world: Any) -> File:
    """A file of eight pages."""
    file: File = world.file(8)
    return file


def test_msync_cleans_pages_when_they_were_written(world: Any, space: AddressSpace, file: File) -> None:
    """Entries lose WRITE and DIRTY, so that the next write takes a fault; contents stay."""
    world.map(space, 4, RW, SHARED, file)
    world.run(touch(space, pages(0, 1), write=False))
    world.run(write_memory(space, at(1), b"x"))
    world.run(write_memory(space, at(3), b"y"))
    assert entries(space, 0, 4) == "wd.d"
    assert sync(world, space, 0, 3) == 0
    assert entries(space, 0, 4) == "rr.d"
    assert world.run(read_memory(space, at(1), 1)).data == b"x"
    world.run(write_memory(space, at(1), b"z"))
    assert entries(space, 1, 2) == "d"


def test_msync_tells_all_who_map_the_file(world: Any, space: AddressSpace, file: File) -> None:
    """folio_mkclean() looks at every shared mapping of the page: one event per space, from first to last page."""
    other = world.space()
    world.map(space, 8, RW, SHARED, file)
    world.map(other, 4, RW, SHARED, file, at=10, offset=4)
    world.map(other, 2, RW, PRIVATE, file, at=20, offset=4)
    for page in (2, 5):
        world.run(write_memory(space, at(page), b"x"))
    world.run(write_memory(other, at(12), b"x"))
    world.run(write_memory(other, at(20), b"x"))
    here, there = world.listen(space), world.listen(other)
    assert sync(world, space, 0, 8) == 0
    for listener, span in ((here, pages(2, 6)), (there, pages(12, 13))):
        (event,) = listener.events
        assert (event.cause, event.etype) == (Cause.WRITE_BACK, EventType.WRITE_PROTECT)
        assert (event.reason, event.spans) == (Reason.PROTECTION_PAGE, (span,))
    assert entries(space, 0, 8) == "..r..r.."
    assert entries(other, 10, 14) == "..r."
    assert entries(other, 20, 21) == "d"


def test_msync_forgets_what_was_written_before(world: Any, space: AddressSpace, file: File) -> None:
    """fault_dirty_shared_page() makes the page itself dirty, mapped or not; it is clean afterwards."""
    world.map(space, 2, RW, SHARED, file)
    world.run(touch(space, pages(0, 2), write=True))
    world.run(munmap(space, at(0), PAGE_SIZE))
    pfns = cpu_pte.cpu_pfn(file.pages.valid(0, FILE_SIZE_MAX)[1])
    assert world.frames.test_flags(pfns, PageFlag.DIRTY).all()
    world.run(write_back(file, 0, 2 * PAGE_SIZE))
    assert not world.frames.test_flags(pfns, PageFlag.DIRTY).any()


@pytest.mark.parametrize("flags", [0, MsyncFlag.ASYNC, MsyncFlag.INVALIDATE])
def test_msync_writes_nothing_back_when_it_is_not_to_wait(
    world: Any, space: AddressSpace, file: File, flags: int
) -> None:
    """Only MS_SYNC does."""
    world.map(space, 1, RW, SHARED, file)
    world.run(touch(space, pages(0, 1), write=True))
    listener = world.listen(space)
    assert sync(world, space, 0, 1, flags) == 0
    assert entries(space, 0, 1) == "d"
    assert not listener.events


def test_msync_writes_nothing_back_when_there_is_no_file(world: Any, space: AddressSpace) -> None:
    """Shared memory and private mappings have nothing to be written to."""
    world.map(space, 1, RW, SHARED, world.file(1, FileKind.SHARED_MEMORY), at=0)
    world.map(space, 1, at=1)
    world.map(space, 1, RW, PRIVATE, world.file(1), at=2)
    world.run(touch(space, pages(0, 3), write=True))
    listener = world.listen(space)
    assert sync(world, space, 0, 3) == 0
    assert entries(space, 0, 3) == "ddd"
    assert not listener.events


def test_msync_tells_nobody_when_nothing_can_have_been_written(world: Any, space: AddressSpace, file: File) -> None:
    """Untouched and read-only pages are clean."""
    world.map(space, 2, Prot.READ, SHARED, file)
    world.run(touch(space, pages(0, 1), write=False))
    listener = world.listen(space)
    assert sync(world, space, 0, 2) == 0
    assert not listener.events


def test_msync_goes_on_when_there_are_holes(world: Any, space: AddressSpace, file: File) -> None:
    """ENOMEM at the end, the other parts written back; MS_ASYNC ends at the first hole."""
    for page in (1, 3):
        world.map(space, 1, RW, SHARED, file, at=page, offset=page)
        world.run(touch(space, pages(page, page + 1), write=True))
    for first, last in ((0, 4), (3, 5), (4, 6)):
        with pytest.raises(BadAddressError) as error:
            sync(world, space, first, last)
        assert error.value.errno == errno.ENOMEM
    assert entries(space, 0, 4) == ".r.r"
    with pytest.raises(BadAddressError):
        sync(world, space, 0, 4, MsyncFlag.ASYNC)


def test_msync_refuses_to_invalidate_when_memory_is_locked(world: Any, space: AddressSpace, file: File) -> None:
    """MS_INVALIDATE: EBUSY."""
    world.map(space, 1, RW, SHARED | MapFlag.LOCKED, file)
    assert sync(world, space, 0, 1) == 0
    with pytest.raises(RangeBusyError) as error:
        sync(world, space, 0, 1, MsyncFlag.INVALIDATE)
    assert error.value.errno == errno.EBUSY


def test_msync_stops_when_it_meets_a_device(world: Any, space: AddressSpace, file: File) -> None:
    """vfs_fsync_range() is EINVAL without fsync(), as in dmirror_fops; private mappings and MS_ASYNC do not ask it."""
    device = File(9, "/dev/x", FileKind.DEVICE, world.frames, vm_flags=VmFlag.MIXEDMAP)
    for first, flags, what in (0, SHARED, file), (1, SHARED, device), (2, SHARED, world.file(1)), (3, PRIVATE, device):
        world.map(space, 1, RW, flags, what, at=first)
    for page in (0, 2):
        world.run(write_memory(space, at(page), b"x"))
    with pytest.raises(InvalidRequestError) as error:
        sync(world, space, 0, 3)
    assert (error.value.errno, error.value.address) == (errno.EINVAL, at(1))
    assert entries(space, 0, 1) + entries(space, 2, 3) == "rd"
    assert sync(world, space, 2, 4) == sync(world, space, 0, 4, MsyncFlag.ASYNC) == 0


@pytest.mark.parametrize(
    ("start", "flags"), [(BASE + 1, MsyncFlag.SYNC), (BASE, 8), (BASE, MsyncFlag.SYNC | MsyncFlag.ASYNC)]
)
def test_msync_fails_when_the_request_is_wrong(world: Any, space: AddressSpace, start: int, flags: int) -> None:
    """EINVAL, for no length as well."""
    with pytest.raises(InvalidRequestError) as error:
        world.run(msync(space, start, 0, flags))
    assert error.value.errno == errno.EINVAL


def test_msync_does_nothing_when_the_length_is_none(world: Any, space: AddressSpace) -> None:
    """0, also when it rounds to nothing; a range that ends nowhere is ENOMEM."""
    assert world.run(msync(space, BASE, 0, MsyncFlag.SYNC)) == 0
    assert world.run(msync(space, BASE, (1 << 64) - 1, MsyncFlag.SYNC)) == 0
    with pytest.raises(BadAddressError) as error:
        world.run(msync(space, BASE, (1 << 64) - PAGE_SIZE, MsyncFlag.SYNC))
    assert error.value.errno == errno.ENOMEM


def test_msync_writes_nothing_back_when_it_is_behind_any_file(world: Any, space: AddressSpace, file: File) -> None:
    """A mapping may reach further than files do."""
    world.run(mmap(space, BASE, PAGE_SIZE, RW, SHARED, file, FILE_SIZE_MAX))
    assert sync(world, space, 0, 1) == 0


def test_msync_changes_nothing_when_a_mirror_does_not_answer(world: Any, space: AddressSpace, file: File) -> None:
    """Policy FAIL: everything is as dirty as it was, for everybody."""
    other = world.space()
    for mapper in (space, other):
        world.map(mapper, 1, RW, SHARED, file)
        world.run(touch(mapper, pages(0, 1), write=True))
    world.listen(space)
    world.listen(other).state = EventState.ABANDONED
    with pytest.raises(TimedOutError):
        sync(world, space, 0, 1)
    assert entries(space, 0, 1) == entries(other, 0, 1) == "d"


def test_write_back_leaves_alone_what_it_told_nobody_of(world: Any, space: AddressSpace, file: File) -> None:
    """A page written while mirrors are told stays dirty; a range that is something else by now is not touched."""
    world.map(space, 4, RW, SHARED, file)
    world.run(touch(space, pages(0, 2), write=True))
    world.listen(space)

    def meanwhile() -> None:
        world.run(touch(space, pages(3, 4), write=True))
        world.map(space, 1, at=0)
        world.run(touch(space, pages(0, 1), write=True))

    world.meanwhile = meanwhile
    world.run(write_back(file, 0, 4 * PAGE_SIZE))
    assert entries(space, 0, 4) == "dr.d"
