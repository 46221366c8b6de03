"""What a driver's mmap maps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from area import PRIVATE, RW, SHARED, at

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.cpu_access import read_memory, write_memory
from hmm.errors import OutOfFramesError
from hmm.file import FileKind
from hmm.madvise import Advice, madvise
from hmm.mman import munmap
from hmm.units import PAGE_SIZE, PIECE_PAGES
from hmm.vma import VmFlag

FREE = 1023


def flags(space: AddressSpace, page: int) -> int:
    """The flags of an entry that say what it permits."""
    return cpu_pte.cpu_flags(space.table.get(at(page))) & (cpu_pte.PRESENT | cpu_pte.WRITE | cpu_pte.SPECIAL)


def test_map_device_inserts_pages_when_the_driver_has_them(world: Any, space: AddressSpace) -> None:
    """vm_insert_page(): there without a fault, zeroed, young as vm_page_prot is, and gone with the mapping."""
    world.map(space, 2, RW, SHARED, world.device_file(VmFlag.MIXEDMAP))
    assert world.frames.available == FREE - 2
    assert cpu_pte.cpu_flags(space.table.get(at(0))) == cpu_pte.PRESENT | cpu_pte.WRITE | cpu_pte.ACCESSED
    assert world.run(read_memory(space, at(1), 1)).data == b"\0"
    world.run(munmap(space, at(0), 2 * PAGE_SIZE))
    assert world.frames.available == FREE


def test_map_device_gives_every_mapping_its_own_pages(world: Any, space: AddressSpace) -> None:
    """Two mappings of one device file share nothing."""
    file = world.device_file(VmFlag.MIXEDMAP)
    world.map(space, 1, RW, SHARED, file, at=0)
    world.map(space, 1, RW, SHARED, file, at=1)
    world.run(write_memory(space, at(0), b"x"))
    assert world.run(read_memory(space, at(1), 1)).data == b"\0"


def test_map_device_maps_read_only_when_the_mapping_is_private(world: Any, space: AddressSpace) -> None:
    """vm_page_prot of a private mapping has no write permission: a write makes a copy."""
    world.map(space, 1, RW, PRIVATE, world.device_file(VmFlag.MIXEDMAP))
    assert flags(space, 0) == cpu_pte.PRESENT
    assert world.run(write_memory(space, at(0), b"x")).signal is None
    assert flags(space, 0) == cpu_pte.PRESENT | cpu_pte.WRITE
    assert world.frames.available == FREE - 1


def test_map_device_maps_registers_when_they_have_no_pages(world: Any, space: AddressSpace) -> None:
    """remap_pfn_range(): consecutive frame numbers from the offset on, without struct page."""
    file = world.file(kind=FileKind.DEVICE, vm_flags=VmFlag.PFNMAP | VmFlag.IO, first_register=5000)
    world.map(space, 3, RW, SHARED, file, offset=2)
    assert cpu_pte.cpu_pfn(space.table.read(at(0), at(3))).tolist() == [5002, 5003, 5004]
    assert flags(space, 0) == cpu_pte.PRESENT | cpu_pte.WRITE | cpu_pte.SPECIAL
    assert world.frames.available == FREE
    world.run(munmap(space, at(0), 3 * PAGE_SIZE))
    assert not space.table.read(at(0), at(3)).any()


def test_map_device_maps_nothing_when_the_driver_does_not(world: Any, space: AddressSpace) -> None:
    """A driver without pages or registers leaves the range empty, and so do other files."""
    world.map(space, 1, RW, SHARED, world.device_file(VmFlag.DONTEXPAND), at=0)
    world.map(space, 1, RW, SHARED, world.file(1), at=1)
    assert not space.table.read(at(0), at(2)).any()


def test_map_device_pauses_when_there_is_much_to_map(world: Any, space: AddressSpace) -> None:
    """A long mapping lets others go first between its pieces."""
    file = world.file(kind=FileKind.DEVICE, vm_flags=VmFlag.PFNMAP, first_register=1)
    npages = 2 * PIECE_PAGES + 1
    world.map(space, npages, RW, SHARED, file)
    assert world.pauses == 2
    pfns = cpu_pte.cpu_pfn(space.table.read(at(0), at(npages)))
    assert np.array_equal(pfns, np.arange(1, npages + 1))


@pytest.mark.parametrize("npages", [FREE + 1, PIECE_PAGES + 1])
def test_map_device_maps_nothing_when_memory_runs_out(world: Any, space: AddressSpace, npages: int) -> None:
    """ENOMEM: no page stays behind."""
    with pytest.raises(OutOfFramesError):
        world.map(space, npages, RW, SHARED, world.device_file(VmFlag.MIXEDMAP))
    assert world.frames.available == FREE
    assert not len(space.vmas)


@pytest.mark.parametrize("vm_flags", [VmFlag.MIXEDMAP, VmFlag.PFNMAP])
def test_map_device_maps_nothing_when_directories_run_out(world: Any, vm_flags: VmFlag) -> None:
    """ENOMEM half-way: what the first pieces mapped is gone, too."""
    space = world.space(directories=4)
    with pytest.raises(OutOfFramesError):
        world.map(space, 520, RW, SHARED, world.device_file(vm_flags))
    assert world.frames.available == FREE
    assert space.table.directories == 1


def test_discarded_pages_of_a_driver_stay_away(world: Any, space: AddressSpace) -> None:
    """There is no fault handler that would bring them back."""
    world.map(space, 1, RW, SHARED, world.device_file(VmFlag.MIXEDMAP))
    world.run(madvise(space, at(0), PAGE_SIZE, Advice.DONTNEED))
    assert world.run(read_memory(space, at(0), 1)).signal is not None
