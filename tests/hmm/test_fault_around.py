"""Fault-around: which pages of a file a read fault maps besides the one touched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hmm import file as files
from hmm.address_space import AddressSpace
from hmm.errors import OutOfFramesError, SegmentationFault
from hmm.fault import fault_in
from hmm.file import File
from hmm.mman import MapFlag
from hmm.units import PAGE_SIZE, AddressRange, Entries
from hmm.vma import VmFlag

SHARED = MapFlag.SHARED | MapFlag.FIXED


@pytest.fixture
def around(space: AddressSpace) -> AddressSpace:
    """A space with the kernel's default: 16 pages."""
    space.fault_around_pages = 16
    return space


def cached(world: Any, npages: int, *holes: int) -> File:
    """A file whose pages are in the cache, except for holes."""
    file: File = world.file(npages=npages)
    for number in range(npages):
        if number not in holes:
            world.run(files.write(file, number * PAGE_SIZE, b"x"))
    return file


def read(world: Any, space: AddressSpace, start: int, *numbers: int) -> None:
    """Touch pages for reading."""
    addresses: Entries = np.array([start + number * PAGE_SIZE for number in numbers], np.uint64)
    world.run(fault_in(space, addresses, write=False))


def mapped(space: AddressSpace, start: int, npages: int) -> list[int]:
    """The pages that are mapped."""
    present: list[int] = np.flatnonzero(space.table.read(start, start + npages * PAGE_SIZE)).tolist()
    return present


def test_read_maps_the_aligned_window_when_the_file_is_cached(world: Any, around: AddressSpace) -> None:
    """64 KiB, aligned by address: do_fault_around()."""
    file = cached(world, 64)
    start = world.map(around, 64, flags=SHARED, file=file)
    read(world, around, start, 20)
    assert mapped(around, start, 64) == list(range(16, 32))
    assert (world.frames.mapcount[world.frames.refcount == 2] == 1).all()
    world.frames.check()


def test_read_maps_one_page_when_fault_around_is_off(world: Any, space: AddressSpace) -> None:
    """With fault_around_bytes of one page only the page touched is mapped."""
    start = world.map(space, 64, flags=SHARED, file=cached(world, 64))
    read(world, space, start, 20)
    assert mapped(space, start, 64) == [20]


def test_write_maps_one_page_when_fault_around_is_on(world: Any, around: AddressSpace) -> None:
    """Only read faults map around."""
    start = world.map(around, 64, flags=SHARED, file=cached(world, 64))
    world.run(fault_in(around, AddressRange(start, start + PAGE_SIZE), write=True))
    assert mapped(around, start, 64) == [0]


def test_read_leaves_anonymous_memory_when_fault_around_is_on(world: Any, around: AddressSpace) -> None:
    """There is no cache behind private anonymous memory."""
    start = world.map(around, 64)
    read(world, around, start, 20, 21)
    assert mapped(around, start, 64) == [20, 21]


def test_read_leaves_a_drivers_file_alone_when_fault_around_is_on(world: Any, around: AddressSpace) -> None:
    """A driver without a fault handler has no cache to map from."""
    start = world.map(around, 4, flags=SHARED, file=world.device_file(VmFlag.MIXEDMAP))
    around.zap(start, start + 2 * PAGE_SIZE)
    with pytest.raises(SegmentationFault):
        read(world, around, start, 0)
    read(world, around, start, 2)
    assert mapped(around, start, 4) == [2, 3]


def test_read_skips_holes_but_for_its_own_page(world: Any, around: AddressSpace) -> None:
    """What is not in the cache is not mapped; the page touched is allocated: filemap_map_pages()."""
    file = cached(world, 32, 1, 2, 5)
    start = world.map(around, 32, flags=SHARED, file=file)
    free = world.frames.available
    read(world, around, start, 2)
    assert mapped(around, start, 32) == [0, 2, 3, 4, *range(6, 16)]
    assert world.frames.available == free - 1


def test_read_stays_in_the_vma_when_the_window_reaches_out(world: Any, around: AddressSpace) -> None:
    """The window is cut at the end of the VMA, and at its start keeps its size, into the next block."""
    start = world.map(around, 13, flags=SHARED, file=cached(world, 64), at=10)
    read(world, around, start, 1)
    assert mapped(around, start, 13) == list(range(13))
    start = world.map(around, 30, flags=SHARED, file=cached(world, 64), at=10)
    read(world, around, start, 1)
    assert mapped(around, start, 30) == list(range(16))
    read(world, around, start, 20)
    assert mapped(around, start, 30) == list(range(22))


def test_read_stays_in_the_page_table_when_the_window_reaches_out(world: Any, around: AddressSpace) -> None:
    """The window ends with the 2 MiB of one table of entries."""
    start = world.map(around, 20, flags=SHARED, file=cached(world, 64), at=505)
    read(world, around, start, 0)
    assert mapped(around, start, 20) == list(range(7))
    read(world, around, start, 7)
    assert mapped(around, start, 20) == list(range(20))


def test_read_maps_up_to_the_end_when_the_file_ends_in_the_window(world: Any, around: AddressSpace) -> None:
    """Pages behind the end of the file are not mapped, and touching them is SIGBUS with the neighbours mapped."""
    start = world.map(around, 16, flags=SHARED, file=cached(world, 6))
    with pytest.raises(SegmentationFault):
        read(world, around, start, 9)
    assert mapped(around, start, 16) == list(range(6))


def test_read_leaves_private_copies_when_they_are_in_the_window(world: Any, around: AddressSpace) -> None:
    """Only empty entries are filled, read-only in a private mapping."""
    start = world.map(around, 16, file=cached(world, 16))
    world.run(fault_in(around, AddressRange(start, start + PAGE_SIZE), write=True))
    own = around.table.get(start)
    read(world, around, start, 8)
    assert around.table.get(start) == own
    assert mapped(around, start, 16) == list(range(16))
    assert not (around.table.read(start + PAGE_SIZE, start + 16 * PAGE_SIZE) & np.uint64(2)).any()


def test_read_maps_nothing_when_the_mapping_begins_behind_the_file(world: Any, around: AddressSpace) -> None:
    """A window without a page of the file."""
    start = world.map(around, 16, flags=SHARED, file=cached(world, 2), offset=40)
    with pytest.raises(SegmentationFault):
        read(world, around, start, 3)
    assert mapped(around, start, 16) == []


def test_read_loses_nothing_when_directories_run_out(world: Any) -> None:
    """Mapping around needs directories like the page itself (ENOMEM)."""
    space = world.space(directories=3)
    space.fault_around_pages = 16
    start = world.map(space, 16, flags=SHARED, file=cached(world, 16))
    with pytest.raises(OutOfFramesError):
        read(world, space, start, 3)
    world.frames.check()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    at=st.integers(0, 40),
    npages=st.integers(1, 80),
    size=st.sampled_from([2, 4, 16, 32]),
    holes=st.sets(st.integers(0, 100), max_size=40),
    end=st.integers(0, 100),
    offset=st.integers(0, 20),
    touched=st.sets(st.integers(0, 79), min_size=1, max_size=12),
    dense=st.booleans(),
)
def test_read_maps_the_same_when_pages_come_one_by_one(
    at: int,
    npages: int,
    size: int,
    holes: set[int],
    end: int,
    offset: int,
    touched: set[int],
    dense: bool,
    request: pytest.FixtureRequest,
) -> None:
    """Many read faults together map what they map one after the other."""
    fixture = request.getfixturevalue("world")
    numbers = sorted(number for number in touched if number < npages) or [0]
    if dense:
        numbers = list(range(numbers[0], numbers[-1] + 1))
    results = []
    for together in (True, False):
        world = type(fixture)(type(fixture.frames)(1024, 64))
        space = world.space()
        space.fault_around_pages = size
        start = world.map(space, npages, flags=SHARED, file=cached(world, end, *holes), at=at, offset=offset)
        stopped = False
        for group in [numbers] if together else [[number] for number in numbers]:
            try:
                read(world, space, start, *group)
            except SegmentationFault:
                stopped = True
                break
        world.frames.check()
        results.append((stopped, mapped(space, start, npages), world.frames.available))
    assert results[0] == results[1]
