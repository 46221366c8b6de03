"""Files: page cache, reading and writing, and how long contents live."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest

from hmm import file as files
from hmm.address_space import AddressSpace
from hmm.errors import InvalidRequestError, OutOfFramesError
from hmm.file import FILE_SIZE_MAX, File, FileKind
from hmm.fork import exit_mmap
from hmm.mman import MapFlag, munmap
from hmm.units import PAGE_SIZE, PIECE_BYTES
from hmm.vma import VmFlag

SHARED = MapFlag.SHARED | MapFlag.FIXED
FREE = 1023


def read(world: Any, file: File, start: int, length: int) -> bytes:
    """Read a file to the end of the operation."""
    data: bytes = world.run(files.read(file, start, length))
    return data


def write(world: Any, file: File, start: int, data: bytes) -> int:
    """Write a file to the end of the operation."""
    done: int = world.run(files.write(file, start, data))
    file.check()
    return done


def test_read_is_short_when_the_file_ends(world: Any) -> None:
    """Reading across the end gives what there is, behind it nothing: shmem_file_read_iter()."""
    file = world.file()
    assert write(world, file, 0, b"0123456789") == 10
    assert file.size_bytes == 10
    assert read(world, file, 8, 100) == b"89"
    assert read(world, file, 10, 1) == b""
    assert read(world, file, 1 << 47, 1) == b""


def test_read_gives_zeroes_and_allocates_nothing_when_there_is_a_hole(world: Any) -> None:
    """A hole is read from the zero page: shmem_file_read_iter()."""
    file = world.file(npages=100)
    assert read(world, file, 5, 3 * PAGE_SIZE) == bytes(3 * PAGE_SIZE)
    assert world.frames.available == FREE


def test_write_keeps_the_rest_when_it_covers_parts_of_pages(world: Any) -> None:
    """Bytes before and after the ones written stay: shmem_write_begin() zeroes a new page first."""
    file = world.file()
    write(world, file, 0, b"a" * (3 * PAGE_SIZE))
    write(world, file, PAGE_SIZE - 2, b"b" * (PAGE_SIZE + 4))
    expected = b"a" * (PAGE_SIZE - 2) + b"b" * (PAGE_SIZE + 4) + b"a" * (PAGE_SIZE - 2)
    assert read(world, file, 0, 3 * PAGE_SIZE) == expected
    assert world.frames.available == FREE - 3


def test_write_moves_the_end_when_it_is_behind_it(world: Any) -> None:
    """The file grows to the last byte written, and a hole lies between."""
    file = world.file()
    write(world, file, 5 * PAGE_SIZE + 7, b"x")
    assert file.size_bytes == 5 * PAGE_SIZE + 8
    assert file.npages == 6
    assert world.frames.available == FREE - 1
    assert read(world, file, 5 * PAGE_SIZE, 8) == bytes(7) + b"x"


def test_write_of_nothing_changes_nothing_when_it_is_behind_the_end(world: Any) -> None:
    """A write of no bytes does not move the end."""
    file = world.file()
    assert write(world, file, 100, b"") == 0
    assert file.size_bytes == 0


def test_write_is_short_when_frames_run_out(world: Any) -> None:
    """What fits is written and counted; the file ends behind it: generic_perform_write()."""
    file = world.file()
    assert write(world, file, 10, b"x" * (1100 * PAGE_SIZE)) == FREE * PAGE_SIZE - 10
    assert file.size_bytes == FREE * PAGE_SIZE
    assert world.frames.available == 0
    assert write(world, file, 0, b"y" * (FREE * PAGE_SIZE + 1)) == FREE * PAGE_SIZE


def test_write_fails_when_not_one_page_fits(world: Any) -> None:
    """Without a frame for the first page the call fails and changes nothing (ENOMEM)."""
    world.frames.allocate(FREE)
    file = world.file()
    with pytest.raises(OutOfFramesError):
        write(world, file, 0, b"x")
    assert file.size_bytes == 0
    file.check()


def test_write_is_short_when_directories_run_out(world: Any) -> None:
    """Pages without a directory are not written, and no frame is lost."""
    file = world.file(max_directories=4)
    assert write(world, file, 0, b"x" * (512 * PAGE_SIZE)) == 512 * PAGE_SIZE
    with pytest.raises(OutOfFramesError):
        write(world, file, 1 << 30, b"x")
    assert world.frames.available == FREE - 512


def test_write_pauses_between_pieces_when_it_is_large(world: Any) -> None:
    """A write across the border of two pieces lets others go first."""
    file = world.file()
    start = PIECE_BYTES - PAGE_SIZE
    assert write(world, file, start, b"x" * (2 * PAGE_SIZE)) == 2 * PAGE_SIZE
    assert world.pauses == 1
    assert read(world, file, start - 1, 2 * PAGE_SIZE + 5) == b"\0" + b"x" * (2 * PAGE_SIZE)
    assert world.pauses == 2


def test_write_is_short_when_frames_run_out_between_pieces(world: Any) -> None:
    """The pieces before the one that found no frame stay written."""
    world.frames.allocate(FREE - 1)
    file = world.file()
    start = PIECE_BYTES - PAGE_SIZE
    assert write(world, file, start, b"x" * (2 * PAGE_SIZE)) == PAGE_SIZE
    assert file.size_bytes == PIECE_BYTES


@pytest.mark.parametrize(("start", "length"), [(-1, 1), (0, -1)])
def test_read_is_refused_when_the_range_is_negative(world: Any, start: int, length: int) -> None:
    """pread() with a negative offset or length is EINVAL."""
    with pytest.raises(InvalidRequestError):
        read(world, world.file(), start, length)


def test_write_is_refused_when_the_file_would_grow_too_long(world: Any) -> None:
    """Behind the largest size a file cannot be written: EFBIG."""
    file = world.file()
    with pytest.raises(InvalidRequestError) as refused:
        write(world, file, FILE_SIZE_MAX, b"x")
    assert refused.value.errno == errno.EFBIG
    assert write(world, file, FILE_SIZE_MAX - 1, b"x") == 1
    assert write(world, file, FILE_SIZE_MAX - 1, b"xyz") == 1  # generic_write_checks_count()
    assert write(world, file, FILE_SIZE_MAX + 5, b"") == 0


def test_read_and_write_are_refused_when_it_is_a_device_file(world: Any) -> None:
    """A driver without read and write methods answers EINVAL."""
    file = world.device_file(VmFlag.MIXEDMAP)
    with pytest.raises(InvalidRequestError):
        read(world, file, 0, 1)
    with pytest.raises(InvalidRequestError):
        write(world, file, 0, b"x")


def test_close_frees_the_pages_when_it_was_the_last_handle(world: Any) -> None:
    """Contents live as long as a handle is open: shmem_evict_inode()."""
    file = world.file()
    write(world, file, 0, b"x" * 5000)
    file.open()
    assert not file.close()
    assert read(world, file, 0, 1) == b"x"
    assert file.close()
    assert world.frames.available == FREE


def test_close_keeps_the_pages_when_the_file_is_mapped(world: Any, space: AddressSpace) -> None:
    """A mapping holds the file when nobody has it open any more; munmap of the last one frees the pages."""
    file = world.file()
    write(world, file, 0, b"x" * (2 * PAGE_SIZE))
    start = world.map(space, 2, flags=SHARED, file=file)
    assert not file.close()
    assert world.frames.available == FREE - 2
    world.run(munmap(space, start, PAGE_SIZE))
    assert world.frames.available == FREE - 2
    world.run(munmap(space, start + PAGE_SIZE, PAGE_SIZE))
    assert world.frames.available == FREE
    assert file.mappers == {}


def test_exit_keeps_the_pages_when_another_process_maps_the_file(world: Any, space: AddressSpace) -> None:
    """Shared memory lives until the last process that maps it is gone."""
    world.map(space, 4, flags=SHARED)
    (shared,) = (vma.backing for vma in space.vmas)
    assert isinstance(shared, File)
    shared.grab(np.arange(0, 4 * PAGE_SIZE, PAGE_SIZE, dtype=np.uint64))
    child = world.fork(space)
    assert [mapper.id for mapper in shared.mapping_spaces()] == [space.id, child.id]
    world.run(exit_mmap(space))
    assert world.frames.available == FREE - 4
    assert [mapper.id for mapper in shared.mapping_spaces()] == [child.id]
    world.run(exit_mmap(child))
    assert world.frames.available == FREE


def test_mapped_parts_are_of_every_vma_when_a_file_is_mapped_twice(world: Any, space: AddressSpace) -> None:
    """What maps some bytes of one file, and of no other, ascending, and no more of it."""
    file, other = world.file(), world.file()
    world.map(space, 2, flags=SHARED, file=file, at=8)
    world.map(space, 2, flags=SHARED, file=other, at=4)
    world.map(space, 2, flags=SHARED, file=file, at=0, offset=7)
    assert [vma.offset_bytes >> 12 for vma in file.mapped_parts(space, 0, FILE_SIZE_MAX)] == [7, 0]
    (part,) = file.mapped_parts(space, PAGE_SIZE, 7 * PAGE_SIZE)
    assert (part.npages, part.offset_bytes) == (1, PAGE_SIZE)


def test_str_names_kind_and_number_when_a_file_is_printed(world: Any) -> None:
    """Messages name a file by what it is."""
    assert str(world.file()) == "file 1 (file)"
    assert str(world.shared_memory(0)) == "shared memory 2 (unnamed)"
    assert world.file().kind is FileKind.FILE
