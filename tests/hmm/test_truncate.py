"""Truncation and holes, under the feet of those who map the file."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from hmm import cpu_pte
from hmm import file as files
from hmm.address_space import AddressSpace
from hmm.cpu_access import read_memory, read_pages, touch, write_memory
from hmm.errors import InvalidRequestError, NoSuchObjectError, Signal, TimedOutError
from hmm.events import Cause, EventState, EventType, Reason
from hmm.file import FILE_SIZE_MAX, File
from hmm.fork import fork
from hmm.mman import MapFlag, mmap, munmap
from hmm.mremap import MremapFlag, mremap
from hmm.truncate import punch, truncate
from hmm.units import PAGE_SIZE, AddressRange
from hmm.vma import Prot, VmFlag

SHARED = MapFlag.SHARED | MapFlag.FIXED
FREE = 1023


def filled(world: Any, npages: int) -> File:
    """A file whose page k consists of the letter k."""
    file: File = world.file()
    data = b"".join(bytes([65 + k]) * PAGE_SIZE for k in range(npages))
    assert world.run(files.write(file, 0, data)) == len(data)
    return file


def pages(start: int, npages: int) -> AddressRange:
    """So many pages from `start` on."""
    return AddressRange(start, start + npages * PAGE_SIZE)


def letters(world: Any, space: AddressSpace, start: int, npages: int) -> str:
    """The first byte of each page, as far as they can be read."""
    data: bytes = world.run(read_pages(space, pages(start, npages), 0)).data
    return data.replace(b"\0", b".").decode()


def test_truncate_zeroes_the_rest_of_the_page_when_the_end_is_inside(world: Any, space: AddressSpace) -> None:
    """What was behind the new end in its page reads as zeroes, for those who map it too: shmem_undo_range()."""
    file = filled(world, 3)
    start = world.map(space, 3, flags=SHARED, file=file)
    world.run(touch(space, pages(start, 3), write=False))
    world.run(truncate(file, PAGE_SIZE + 2))
    assert world.run(read_memory(space, start + PAGE_SIZE, 4)).data == b"BB\0\0"
    assert file.size_bytes == PAGE_SIZE + 2
    assert world.frames.available == FREE - 2
    file.check()


def test_truncate_tells_nobody_when_no_page_goes(world: Any, space: AddressSpace) -> None:
    """shmem_setattr() unmaps where the old end lies behind the page of the new one."""
    file = filled(world, 2)
    start = world.map(space, 3, flags=SHARED, file=file)
    world.run(touch(space, pages(start, 2), write=True))
    listener = world.listen(space)
    for size in (2 * PAGE_SIZE, 2 * PAGE_SIZE - 7, PAGE_SIZE + 1, 2 * PAGE_SIZE):
        world.run(truncate(file, size))
    assert not listener.events
    world.run(truncate(file, PAGE_SIZE))
    assert [event.cause for event in listener.events] == [Cause.TRUNCATE]
    file.check()


def test_truncate_zeroes_the_rest_of_the_last_page_when_the_size_stays(world: Any, space: AddressSpace) -> None:
    """shmem_setattr() calls shmem_truncate_range() for the size that a file has: what a mapping wrote there goes."""
    file = filled(world, 1)
    world.run(truncate(file, 2))
    start = world.map(space, 1, flags=SHARED, file=file)
    world.run(write_memory(space, start, b"abcd"))
    world.run(truncate(file, 3))
    assert world.run(read_memory(space, start, 4)).data == b"abcd"
    world.run(truncate(file, 3))
    assert world.run(read_memory(space, start, 4)).data == b"abc\0"


def test_truncate_unmaps_all_spaces_when_the_file_shrinks(world: Any, space: AddressSpace) -> None:
    """Every mapping of a page behind the end loses it, and a touch is SIGBUS: unmap_mapping_range()."""
    file = filled(world, 4)
    other = world.space()
    start = world.map(space, 4, flags=SHARED, file=file)
    elsewhere = world.map(other, 3, flags=SHARED, file=file, at=50, offset=1)
    world.run(touch(space, pages(start, 4), write=True))
    world.run(touch(other, pages(elsewhere, 3), write=True))
    world.run(truncate(file, 2 * PAGE_SIZE))
    assert world.frames.available == FREE - 2
    accessed = world.run(touch(space, pages(start, 4), write=False))
    assert (accessed.done, accessed.signal, accessed.address) == (2, Signal.BUS_ADRERR, start + 2 * PAGE_SIZE)
    assert world.run(touch(other, pages(elsewhere, 3), write=True)).done == 1
    world.frames.check()


def test_truncate_takes_private_copies_when_the_file_shrinks(world: Any, space: AddressSpace) -> None:
    """even_cows: a private copy of a page that the file no longer has goes with it."""
    file = filled(world, 3)
    start = world.map(space, 3, file=file)
    world.run(write_memory(space, start, b"x"))
    world.run(write_memory(space, start + 2 * PAGE_SIZE, b"x"))
    world.run(truncate(file, PAGE_SIZE))
    assert letters(world, space, start, 3) == "x"
    world.run(truncate(file, 3 * PAGE_SIZE))
    assert letters(world, space, start, 3) == "x.."


def test_truncate_adds_a_hole_when_the_file_grows(world: Any, space: AddressSpace) -> None:
    """Growing tells nobody and allocates nothing; what was SIGBUS reads as zeroes."""
    file = filled(world, 1)
    listener = world.listen(space)
    start = world.map(space, 3, flags=SHARED, file=file)
    assert world.run(touch(space, pages(start, 3), write=False)).done == 1
    world.run(truncate(file, 3 * PAGE_SIZE))
    assert world.frames.available == FREE - 1
    assert letters(world, space, start, 3) == "A.."
    assert listener.events == []


def test_truncate_tells_every_mirror_once_when_a_file_is_mapped_in_pieces(world: Any, space: AddressSpace) -> None:
    """One event per space, CLEAR and MUNMAP, for all of its mappings behind the end, touched or not."""
    file, child = filled(world, 8), world.space()
    world.map(space, 4, flags=SHARED, file=file, at=0, offset=0)
    world.map(space, 4, flags=SHARED, file=file, at=10, offset=6)
    world.map(space, 2, flags=SHARED, file=file, at=20, offset=1)
    world.run(fork(space, child))
    listeners = [world.listen(space), world.listen(child)]
    world.run(truncate(file, 3 * PAGE_SIZE))
    base = 1 << 40
    for listener in listeners:
        (event,) = listener.events
        assert event.spans == (pages(base + 3 * PAGE_SIZE, 1), pages(base + 10 * PAGE_SIZE, 4))
        assert (event.cause, event.etype, event.reason) == (Cause.TRUNCATE, EventType.MUNMAP, Reason.CLEAR)


def test_truncate_keeps_frames_until_mirrors_have_answered(world: Any, space: AddressSpace) -> None:
    """No frame is freed while a mirror may still reach it; the size is the new one before, so nothing comes back."""
    file = filled(world, 2)
    start = world.map(space, 2, flags=SHARED, file=file)
    world.run(touch(space, pages(start, 2), write=True))
    world.listen(space)
    seen = []

    def meanwhile() -> None:
        seen.append((world.frames.available, space.table.get(start) != 0, file.size_bytes))

    world.meanwhile = meanwhile
    world.run(truncate(file, 0))
    assert seen == [(FREE - 2, True, 0)]
    assert world.frames.available == FREE


def test_truncate_restores_the_size_when_a_mirror_does_not_answer(world: Any, space: AddressSpace) -> None:
    """With policy FAIL nothing has changed: neither the size nor the entries of another space, told before."""
    file, child = filled(world, 2), world.space()
    start = world.map(space, 2, file=file)
    world.run(write_memory(space, start, b"x"))
    world.run(fork(space, child))
    world.listen(space)
    world.listen(child).state = EventState.ABANDONED
    with pytest.raises(TimedOutError):
        world.run(truncate(file, 0))
    assert file.size_bytes == 2 * PAGE_SIZE
    assert letters(world, space, start, 2) == "xB"
    assert letters(world, child, start, 2) == "xB"
    assert not space.notifier.invalidations


def test_truncate_tells_again_when_pages_were_mapped_meanwhile(world: Any, space: AddressSpace) -> None:
    """A hole's pages that come to be mapped elsewhere while mirrors are told are told too, before they go."""
    file = filled(world, 4)
    start = world.map(space, 4, flags=SHARED, file=file)
    world.run(touch(space, pages(start, 4), write=False))
    listener = world.listen(space)

    def map_elsewhere() -> None:
        again = world.map(space, 4, flags=SHARED, file=file, at=100)
        world.run(touch(space, pages(again, 4), write=False))

    world.meanwhile = map_elsewhere
    world.run(punch(file, PAGE_SIZE, 2 * PAGE_SIZE))
    first, second = listener.events
    assert first.spans == (pages(start + PAGE_SIZE, 2),)
    assert second.spans == (pages(start + 101 * PAGE_SIZE, 2),)
    assert letters(world, space, start + 100 * PAGE_SIZE, 4) == "A..D"
    world.frames.check()


def test_truncate_finds_private_copies_when_they_were_moved_meanwhile(world: Any, space: AddressSpace) -> None:
    """Copies that mremap carries away while mirrors are told are told at their new place, and go."""
    file = filled(world, 2)
    start = world.map(space, 2, file=file)
    world.run(write_memory(space, start, b"x" * (2 * PAGE_SIZE)))
    listener = world.listen(space)
    elsewhere = start + 100 * PAGE_SIZE
    moving = MremapFlag.MAYMOVE | MremapFlag.FIXED
    world.meanwhile = lambda: world.run(mremap(space, start, 2 * PAGE_SIZE, 2 * PAGE_SIZE, moving, elsewhere))
    world.run(truncate(file, PAGE_SIZE))
    told = [event.spans for event in listener.events if event.cause is Cause.TRUNCATE]
    assert told == [(pages(start + PAGE_SIZE, 1),), (pages(elsewhere + PAGE_SIZE, 1),)]
    assert letters(world, space, elsewhere, 2) == "x"
    world.frames.check()


def test_truncate_is_done_when_the_mapping_goes_meanwhile(world: Any, space: AddressSpace) -> None:
    """A space that unmaps the file while its mirrors are told needs nothing more."""
    file = filled(world, 2)
    start = world.map(space, 2, flags=SHARED, file=file)
    world.run(touch(space, pages(start, 2), write=False))
    world.listen(space)
    world.meanwhile = lambda: world.run(munmap(space, start, 2 * PAGE_SIZE))
    world.run(truncate(file, 0))
    assert world.frames.available == FREE
    assert file.mappers == {}


def test_punch_zeroes_parts_and_drops_whole_pages(world: Any, space: AddressSpace) -> None:
    """PUNCH_HOLE | KEEP_SIZE: whole pages become holes, parts of pages are zeroed, the size stays."""
    file = filled(world, 4)
    start = world.map(space, 4, flags=SHARED, file=file)
    world.run(touch(space, pages(start, 4), write=False))
    world.run(punch(file, PAGE_SIZE - 1, 2 * PAGE_SIZE + 2))
    assert world.frames.available == FREE - 2
    assert world.run(files.read(file, PAGE_SIZE - 2, 2)) == b"A\0"
    assert world.run(files.read(file, 3 * PAGE_SIZE, 2)) == b"\0D"
    assert letters(world, space, start, 4) == "A..."
    assert file.size_bytes == 4 * PAGE_SIZE


@pytest.mark.parametrize(("start", "length"), [(5, 3), (PAGE_SIZE - 3, 5), (0, 10), (PAGE_SIZE - 2, 2)])
def test_punch_zeroes_bytes_when_no_whole_page_is_inside(world: Any, start: int, length: int) -> None:
    """A hole inside one page, or across the border of two, only zeroes."""
    file = filled(world, 2)
    world.run(punch(file, start, length))
    data = world.run(files.read(file, 0, 2 * PAGE_SIZE))
    expected = bytearray(b"A" * PAGE_SIZE + b"B" * PAGE_SIZE)
    expected[start : start + length] = bytes(length)
    assert data == bytes(expected)
    assert world.frames.available == FREE - 2


@pytest.mark.parametrize(("start", "length", "left"), [(0, 1, 0), (1, 1, 1), (0, PAGE_SIZE - 1, 0), (PAGE_SIZE, 1, 4)])
def test_punch_unmaps_all_that_follows_when_it_ends_in_the_first_page(
    world: Any, space: AddressSpace, start: int, length: int, left: int
) -> None:
    """shmem_fallocate() compares the last byte to unmap, -1 there, as an unsigned number; seen on 6.12.117."""
    file = filled(world, 4)
    at = world.map(space, 4, flags=SHARED, file=file)
    private = world.map(space, 4, file=file, at=10)
    world.run(touch(space, pages(at, 4), write=True))
    world.run(touch(space, pages(private, 2), write=True))
    listener = world.listen(space)
    world.run(punch(file, start, length))
    assert [entry != 0 for entry in space.table.read(at, at + 4 * PAGE_SIZE).tolist()] == [k < left for k in range(4)]
    assert space.table.valid(private, private + 4 * PAGE_SIZE)[0].size == 2
    assert bool(listener.events) == (left < 4)
    assert letters(world, space, at, 4).replace(".", "A") in ("ABCD", "AACD")
    file.check()


def test_punch_leaves_private_copies_when_the_page_goes(world: Any, space: AddressSpace) -> None:
    """even_cows=0: a copied private page is no longer the file's; one that was only read is."""
    file = filled(world, 3)
    start = world.map(space, 3, file=file)
    world.run(write_memory(space, start, b"x"))
    assert letters(world, space, start, 3) == "xBC"
    world.run(punch(file, 0, 2 * PAGE_SIZE))
    assert letters(world, space, start, 3) == "x.C"
    world.frames.check()


def test_punch_leaves_private_copies_that_are_being_migrated(world: Any, space: AddressSpace) -> None:
    """zap_pte_range() asks should_zap_folio() of a migration entry's page: private ones stay."""
    file = filled(world, 2)
    start = world.map(space, 2, file=file)
    world.run(write_memory(space, start, b"x"))
    before = space.table.get(start)
    migrating = cpu_pte.cpu_entry(cpu_pte.cpu_pfn(before), cpu_pte.MIGRATION)
    space.table.set(start, migrating)
    world.run(punch(file, 0, 2 * PAGE_SIZE))
    assert space.table.get(start) == migrating


def test_punch_does_nothing_when_the_range_is_behind_the_end(world: Any) -> None:
    """A hole in a hole."""
    file = filled(world, 1)
    world.run(punch(file, 10 * PAGE_SIZE, PAGE_SIZE))
    assert file.size_bytes == PAGE_SIZE


@pytest.mark.parametrize("size_bytes", [-1, FILE_SIZE_MAX + 1])
def test_truncate_is_refused_when_the_size_is_impossible(world: Any, size_bytes: int) -> None:
    """ftruncate(): EINVAL below 0, EFBIG above the largest size."""
    file = filled(world, 1)
    with pytest.raises(InvalidRequestError) as refused:
        world.run(truncate(file, size_bytes))
    assert refused.value.errno == (errno.EINVAL if size_bytes < 0 else errno.EFBIG)
    assert file.size_bytes == PAGE_SIZE


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [(-1, 1, errno.EINVAL), (0, 0, errno.EINVAL), (0, -1, errno.EINVAL), (1, FILE_SIZE_MAX, errno.EFBIG)],
)
def test_punch_is_refused_when_the_range_is_impossible(world: Any, start: int, length: int, expected: int) -> None:
    """vfs_fallocate(): EINVAL for a negative offset or no length, EFBIG behind the largest size."""
    with pytest.raises(InvalidRequestError) as refused:
        world.run(punch(filled(world, 1), start, length))
    assert refused.value.errno == expected


def test_truncate_and_punch_are_refused_when_it_is_a_device_file(world: Any, space: AddressSpace) -> None:
    """A device file has no size, whether it is mapped or not: EINVAL; vfs_fallocate() has ENODEV for it."""
    file = world.device_file(VmFlag.MIXEDMAP)
    world.run(mmap(space, 0, PAGE_SIZE, Prot.READ, MapFlag.SHARED, file))
    with pytest.raises(InvalidRequestError):
        world.run(truncate(file, 0))
    with pytest.raises(InvalidRequestError):
        world.run(punch(file, 0, 0))
    with pytest.raises(NoSuchObjectError) as refused:
        world.run(punch(file, 0, 1))
    assert refused.value.errno == errno.ENODEV
