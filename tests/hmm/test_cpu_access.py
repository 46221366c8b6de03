"""CPU reads and writes: bytes, how far an access comes, what it leaves behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.clear_refs import ClearRefs, clear_refs
from hmm.cpu_access import read_memory, read_pages, touch, write_memory, write_pages
from hmm.errors import InvalidRequestError, OutOfFramesError, Signal
from hmm.mman import MapFlag, munmap
from hmm.mprotect import mprotect
from hmm.units import PAGE_SIZE, PIECE_BYTES, TASK_SIZE, AddressRange
from hmm.vma import Prot, VmFlag

SHARED = MapFlag.SHARED | MapFlag.FIXED
REGISTERS = VmFlag.IO | VmFlag.PFNMAP


def test_read_gives_what_was_written_when_it_crosses_pages(world: Any, space: AddressSpace) -> None:
    """Bytes come back, whatever the alignment; the rest of the pages is zero."""
    start = world.map(space, 4)
    data = bytes(range(256)) * 40
    written = world.run(write_memory(space, start + 100, data))
    assert (written.done, written.signal) == (len(data), None)
    whole = world.run(read_memory(space, start, 4 * PAGE_SIZE))
    assert whole.data == bytes(100) + data + bytes(4 * PAGE_SIZE - 100 - len(data))


@pytest.mark.parametrize(("offset", "length"), [(0, 200), (5, 190), (63, 2), (64, 64), (127, 3)])
def test_read_gives_all_bytes_when_they_are_many(world: Any, space: AddressSpace, offset: int, length: int) -> None:
    """Blocks of pages come together without a seam; here in pages and a few bytes more."""
    start = world.map(space, 204)
    data = np.arange(204 * PAGE_SIZE // 4, dtype=np.uint32).tobytes()
    world.run(write_memory(space, start, data))
    low, high = offset * PAGE_SIZE + 7, (offset + length) * PAGE_SIZE + 3
    assert world.run(read_memory(space, start + low, high - low)).data == data[low:high]


@pytest.mark.parametrize(("offset", "length"), [(0, 1), (4095, 1), (4095, 2), (0, 4096), (1, 8191), (4096, 4096)])
def test_write_changes_only_its_bytes_when_it_covers_parts(
    world: Any, space: AddressSpace, offset: int, length: int
) -> None:
    """What lies before and behind stays."""
    start = world.map(space, 2)
    world.run(write_memory(space, start, b"." * (2 * PAGE_SIZE)))
    world.run(write_memory(space, start + offset, b"x" * length))
    expected = bytearray(b"." * (2 * PAGE_SIZE))
    expected[offset : offset + length] = b"x" * length
    assert world.run(read_memory(space, start, 2 * PAGE_SIZE)).data == expected


def test_access_does_nothing_when_it_is_empty(world: Any, space: AddressSpace) -> None:
    """No bytes, no fault, also where nothing is mapped."""
    assert world.run(read_memory(space, 12345, 0)).signal is None
    assert world.run(write_memory(space, 12345, b"")).done == 0
    assert world.run(touch(space, AddressRange(4096, 4096), write=True)).done == 0


@pytest.mark.parametrize("write", [False, True])
def test_access_stops_at_the_page_when_it_gets_a_signal(world: Any, space: AddressSpace, write: bool) -> None:
    """The bytes before are transferred; the address is the first byte that could not be."""
    start = world.map(space, 2)
    length = 3 * PAGE_SIZE
    if write:
        accessed = world.run(write_memory(space, start + 10, b"x" * length))
        assert world.run(read_memory(space, start + PAGE_SIZE, PAGE_SIZE)).data == b"x" * PAGE_SIZE
    else:
        accessed = world.run(read_memory(space, start + 10, length))
        assert accessed.data == bytes(2 * PAGE_SIZE - 10)
    assert accessed.done == 2 * PAGE_SIZE - 10
    assert (accessed.signal, accessed.address) == (Signal.SEGV_MAPERR, start + 2 * PAGE_SIZE)


def test_access_names_its_own_address_when_the_first_page_fails(world: Any, space: AddressSpace) -> None:
    """The faulting address is that of the byte, not of its page."""
    accessed = world.run(read_memory(space, 123456789, 10))
    assert (accessed.done, accessed.signal, accessed.address) == (0, Signal.SEGV_MAPERR, 123456789)


@pytest.mark.parametrize("address", [TASK_SIZE, (1 << 64) - 5, 1 << 63])
def test_access_gets_a_signal_when_it_is_beyond_the_address_space(
    world: Any, space: AddressSpace, address: int
) -> None:
    """The kernel's half is not mapped for a process."""
    assert world.run(read_memory(space, address, 5)).signal is Signal.SEGV_MAPERR
    assert world.run(write_memory(space, address, b"12345")).address == address


@pytest.mark.parametrize(("address", "length"), [(-1, 1), (0, -1), ((1 << 64) - 1, 2)])
def test_access_is_refused_when_it_is_no_range_of_addresses(
    world: Any, space: AddressSpace, address: int, length: int
) -> None:
    """Nothing wraps (EINVAL)."""
    with pytest.raises(InvalidRequestError):
        world.run(read_memory(space, address, length))


def test_access_pauses_when_it_goes_on_to_another_piece(world: Any, space: AddressSpace) -> None:
    """A large access lets others go first; each piece is looked at anew."""
    start = world.map(space, 4, at=(PIECE_BYTES - 2 * PAGE_SIZE) // PAGE_SIZE)
    world.run(write_memory(space, start, b"x" * (4 * PAGE_SIZE)))
    assert world.pauses == 1
    operation = read_memory(space, start, 4 * PAGE_SIZE)
    operation.send(None)
    world.run(munmap(space, start, 4 * PAGE_SIZE))
    accessed = world.run(operation)
    assert (accessed.done, accessed.data) == (2 * PAGE_SIZE, b"x" * (2 * PAGE_SIZE))
    assert accessed.signal is Signal.SEGV_MAPERR


def test_access_fails_when_frames_run_out(world: Any, space: AddressSpace) -> None:
    """What fits has been written; the error names the page (ENOMEM)."""
    start = world.map(space, 4)
    world.frames.allocate(world.frames.available - 2)
    with pytest.raises(OutOfFramesError) as error:
        world.run(write_memory(space, start, b"x" * (4 * PAGE_SIZE)))
    assert error.value.address == start + 2 * PAGE_SIZE
    assert world.run(read_memory(space, start, 2 * PAGE_SIZE)).data == b"x" * (2 * PAGE_SIZE)


def test_access_marks_entries_when_it_uses_them(world: Any, space: AddressSpace) -> None:
    """A read sets accessed, a write dirty, as the processor does, also in entries that permit writing already."""
    start = world.map(space, 2, flags=SHARED)
    world.run(read_memory(space, start, 2 * PAGE_SIZE))
    assert not (space.table.read(start, start + 2 * PAGE_SIZE) & np.uint64(cpu_pte.DIRTY)).any()
    world.run(write_memory(space, start, b"x"))
    assert space.table.get(start) & cpu_pte.DIRTY
    assert not space.table.get(start + PAGE_SIZE) & cpu_pte.DIRTY
    space.table.set(start, space.table.get(start) & ~cpu_pte.ACCESSED)
    world.run(touch(space, AddressRange(start, start + 2 * PAGE_SIZE), write=False))
    assert space.table.get(start) & cpu_pte.ACCESSED


@pytest.mark.parametrize("write", [False, True])
def test_touch_counts_pages_when_it_is_stopped(world: Any, space: AddressSpace, write: bool) -> None:
    """Whole pages are touched, also when the range covers parts of them; no byte changes."""
    start = world.map(space, 3)
    world.run(write_memory(space, start, b"x"))
    accessed = world.run(touch(space, AddressRange(start + 10, start + 4 * PAGE_SIZE), write=write))
    assert (accessed.done, accessed.signal, accessed.address) == (3, Signal.SEGV_MAPERR, start + 3 * PAGE_SIZE)
    accessed = world.run(touch(space, AddressRange(start + 10, start + PAGE_SIZE + 1), write=write))
    assert (accessed.done, accessed.signal) == (2, None)
    assert world.run(read_memory(space, start, 2)).data == b"x\0"


def test_pages_are_read_and_written_byte_by_byte(world: Any, space: AddressSpace) -> None:
    """One byte of each page, in order, up to the first signal."""
    start = world.map(space, 4)
    span = AddressRange(start, start + 4 * PAGE_SIZE)
    written = world.run(write_pages(space, span, 7, np.arange(1, 5, dtype=np.uint8)))
    assert (written.done, written.signal) == (4, None)
    assert world.run(read_pages(space, span, 7)).data == b"\1\2\3\4"
    assert world.run(read_pages(space, span, 6)).data == bytes(4)
    world.run(mprotect(space, start + PAGE_SIZE, PAGE_SIZE, Prot.READ))
    written = world.run(write_pages(space, span, 0, np.full(4, 9, np.uint8)))
    assert (written.done, written.signal, written.address) == (1, Signal.SEGV_ACCERR, start + PAGE_SIZE)
    world.run(munmap(space, start + 2 * PAGE_SIZE, PAGE_SIZE))
    accessed = world.run(read_pages(space, span, 3))
    assert (accessed.done, accessed.data, accessed.address) == (2, bytes(2), start + 2 * PAGE_SIZE + 3)


def test_write_reaches_only_its_process_when_the_page_is_shared_after_fork(world: Any, space: AddressSpace) -> None:
    """Private memory is private, with one byte per page as with many."""
    start = world.map(space, 3)
    span = AddressRange(start, start + 3 * PAGE_SIZE)
    world.run(write_pages(space, span, 0, np.full(3, 1, np.uint8)))
    child = world.fork(space)
    world.run(write_pages(child, span, 0, np.full(3, 2, np.uint8)))
    assert world.run(read_pages(space, span, 0)).data == b"\1\1\1"
    assert world.run(read_pages(child, span, 0)).data == b"\2\2\2"
    world.frames.check()


# ---- a driver's registers


def test_registers_read_as_ones_when_nobody_answers(world: Any, space: AddressSpace) -> None:
    """Memory without struct page has no bytes here: reads give ones, writes are lost."""
    start = world.map(space, 1)
    world.map(space, 2, flags=SHARED, file=world.device_file(REGISTERS), at=1)
    world.map(space, 1, at=3)
    expected = bytes(4) + b"\xff" * (2 * PAGE_SIZE) + bytes(4)
    assert world.run(read_memory(space, start + PAGE_SIZE - 4, len(expected))).data == expected
    assert world.run(write_memory(space, start + PAGE_SIZE - 4, b"x" * len(expected))).done == len(expected)
    expected = b"xxxx" + b"\xff" * (2 * PAGE_SIZE) + b"xxxx"
    assert world.run(read_memory(space, start + PAGE_SIZE - 4, len(expected))).data == expected
    assert world.run(read_memory(space, start + PAGE_SIZE + 5, 1)).data == b"\xff"
    assert world.run(write_memory(space, start + PAGE_SIZE + 5, b"y")).done == 1


def test_registers_are_skipped_when_every_page_gets_a_byte(world: Any, space: AddressSpace) -> None:
    """One byte per page, with registers between."""
    start = world.map(space, 1)
    world.map(space, 1, flags=SHARED, file=world.device_file(REGISTERS), at=1)
    world.map(space, 1, at=2)
    span = AddressRange(start, start + 3 * PAGE_SIZE)
    assert world.run(write_pages(space, span, 5, np.array([1, 2, 3], np.uint8))).done == 3
    assert world.run(read_pages(space, span, 5)).data == b"\1\xff\3"


def test_registers_become_writable_again_when_writes_are_watched(world: Any, space: AddressSpace) -> None:
    """wp_pfn_shared(): they have no struct page that could be marked; some entries are writable and others are not."""
    start = world.map(space, 3, flags=SHARED, file=world.device_file(REGISTERS))
    world.run(clear_refs(space, ClearRefs.SOFT_DIRTY))

    def protect() -> None:
        for prot in Prot.READ, Prot.READ | Prot.WRITE:
            world.run(mprotect(space, start, 3 * PAGE_SIZE, prot))

    protect()
    world.run(write_memory(space, start + PAGE_SIZE, b"x"))  # which faults
    protect()
    assert [bool(space.table.get(start + at * PAGE_SIZE) & cpu_pte.WRITE) for at in range(3)] == [False, True, False]
    assert world.run(write_memory(space, start, bytes(3 * PAGE_SIZE))).done == 3 * PAGE_SIZE
    assert space.table.common(start, start + 3 * PAGE_SIZE) & cpu_pte.WRITE
    world.frames.check()


def test_registers_become_memory_when_a_private_mapping_is_written(world: Any, space: AddressSpace) -> None:
    """A private mapping of registers is copied on write, into a page of zeroes here."""
    start = world.map(space, 2, file=world.device_file(REGISTERS))
    world.run(write_memory(space, start + 1, b"x"))
    assert world.run(read_memory(space, start, 3)).data == b"\0x\0"
    assert world.run(read_memory(space, start + PAGE_SIZE, 1)).data == b"\xff"
    world.frames.check()
