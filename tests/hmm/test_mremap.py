"""mremap: growing, shrinking, moving, and what happens to entries and mirrors."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest
from area import BASE, PRIVATE, RW, SHARED, at, fill, layout, letters, pages

from hmm import cpu_pte
from hmm.address_space import MMAP_BASE, AddressSpace
from hmm.cpu_access import touch
from hmm.errors import BadAddressError, HmmError, InvalidRequestError, OutOfFramesError, Signal, TimedOutError
from hmm.events import Cause, EventState, EventType, Reason
from hmm.mman import MapFlag, munmap
from hmm.mremap import MremapFlag, mremap
from hmm.operation import WaitFor
from hmm.units import PAGE_SIZE, PIECE_PAGES, PMD_SIZE, TASK_SIZE, AddressRange
from hmm.vma import Prot, VmFlag

MAYMOVE, DONTUNMAP = MremapFlag.MAYMOVE, MremapFlag.DONTUNMAP
FIXED = MremapFlag.FIXED | MAYMOVE


def remap(world: Any, space: AddressSpace, old: tuple[int, int], new_npages: int, flags: int = 0, to: int = 0) -> int:
    """mremap of pages [first, last), to page `to`; returns a page."""
    first, last = old
    call = mremap(space, at(first), (last - first) * PAGE_SIZE, new_npages * PAGE_SIZE, flags, at(to))
    address: int = world.run(call)
    return (address - BASE) // PAGE_SIZE


# ---- in place


def test_mremap_does_nothing_when_the_length_stays(world: Any, space: AddressSpace) -> None:
    """The old address, even when the range is not one VMA."""
    world.map(space, 2)
    assert remap(world, space, (0, 2), 2) == 0
    assert remap(world, space, (0, 9), 9, MAYMOVE) == 0
    assert layout(space) == "0-2:rw-p"


def test_mremap_unmaps_the_tail_when_it_shrinks(world: Any, space: AddressSpace) -> None:
    """As munmap of the rest, over whatever is there; one event."""
    world.map(space, 4, at=0)
    world.map(space, 2, Prot.READ, at=5)
    fill(world, space, 0, "abcd")
    listener = world.listen(space)
    assert remap(world, space, (0, 6), 2) == 0
    assert layout(space) == "0-2:rw-p 6-7:r--p"
    assert [(event.cause, event.spans) for event in listener.events] == [(Cause.MUNMAP, (pages(2, 6),))]
    assert letters(world, space, 0, 2) == "ab"


def test_mremap_grows_in_place_when_there_is_room(world: Any, space: AddressSpace) -> None:
    """The VMA grows, its new pages are fresh, nobody hears of it; a continuation of it above is merged."""
    world.map(space, 2, at=0)
    world.map(space, 1, at=4)
    listener = world.listen(space)
    assert remap(world, space, (1, 2), 2) == 1
    assert layout(space) == "0-3:rw-p 4-5:rw-p"
    assert remap(world, space, (0, 3), 4) == 0
    assert layout(space) == "0-5:rw-p"
    fill(world, space, 0, "ab")
    assert remap(world, space, (0, 5), 6) == 0
    assert letters(world, space, 0, 6) == "ab...."
    assert not listener.events


def test_mremap_grows_a_file_mapping_when_there_is_room(world: Any, space: AddressSpace) -> None:
    """The offsets go on."""
    world.map(space, 2, Prot.READ, SHARED, world.file(8), offset=1)
    assert remap(world, space, (0, 2), 4) == 0
    (vma,) = space.vmas
    assert (vma.npages, vma.page_offset(at(3))) == (4, 4)


def test_mremap_does_not_grow_when_something_is_above(world: Any, space: AddressSpace) -> None:
    """ENOMEM without MREMAP_MAYMOVE; also inside of a VMA and at the end of the address space."""
    world.map(space, 2, at=0)
    world.map(space, 1, Prot.READ, at=3)
    for old, new in (((0, 2), 4), ((0, 1), 2)):
        with pytest.raises(OutOfFramesError) as error:
            remap(world, space, old, new)
        assert error.value.errno == errno.ENOMEM
    top = (TASK_SIZE - BASE) // PAGE_SIZE
    world.map(space, 2, at=top - 2)
    with pytest.raises(OutOfFramesError):
        remap(world, space, (top - 2, top), 3)
    assert remap(world, space, (0, 2), 3) == 0
    assert layout(space).startswith("0-3:rw-p 3-4:r--p")


def test_mremap_brings_pages_in_when_locked_memory_grows(world: Any, space: AddressSpace) -> None:
    """What is added to a VM_LOCKED mapping is populated, here and at another place."""
    world.map(space, 2, flags=PRIVATE | MapFlag.LOCKED, at=0)
    assert world.frames.available == 1021
    remap(world, space, (0, 2), 4)
    assert world.frames.available == 1019
    moved = remap(world, space, (0, 4), 6, FIXED, 10)
    assert world.frames.available == 1017
    assert space.vmas.find(at(moved)).has(VmFlag.LOCKED)  # type: ignore[union-attr]


# ---- moves


def test_mremap_moves_when_it_cannot_grow(world: Any, space: AddressSpace) -> None:
    """MREMAP_MAYMOVE: to where mmap would put it, contents and all."""
    world.map(space, 2, at=0)
    world.map(space, 1, Prot.READ, at=2)
    fill(world, space, 0, "ab")
    free = world.frames.available
    to = remap(world, space, (0, 2), 3, MAYMOVE)
    assert at(to) == MMAP_BASE - 3 * PAGE_SIZE
    assert layout(space) == f"2-3:r--p {to}-{to + 3}:rw-p"
    assert letters(world, space, to, to + 3) == "ab."
    assert world.frames.available == free
    assert world.run(touch(space, pages(0, 1), write=False)).signal is Signal.SEGV_MAPERR


def test_mremap_aligns_to_huge_pages_when_it_moves_whole_ones(world: Any, space: AddressSpace) -> None:
    """get_unmapped_area() with the file of the mapping: the rules are those of mmap."""
    world.map(space, 512)
    world.map(space, 1, Prot.READ, at=512)
    to = remap(world, space, (0, 512), 1024, MAYMOVE)
    assert at(to) % PMD_SIZE == 0


def test_mremap_moves_to_the_address_when_it_is_fixed(world: Any, space: AddressSpace) -> None:
    """What was there is unmapped first, in one event over all of it; then the old range, for the move and for good."""
    world.map(space, 4, at=0)
    world.map(space, 2, Prot.READ, at=8)
    fill(world, space, 0, "abcd")
    listener = world.listen(space)
    assert remap(world, space, (1, 3), 2, FIXED, 7) == 7
    assert layout(space) == "0-1:rw-p 3-4:rw-p 7-9:rw-p 9-10:r--p"
    assert letters(world, space, 7, 9) == "bc"
    assert [(event.cause, event.spans) for event in listener.events] == [
        (Cause.MUNMAP, (pages(7, 9),)),
        (Cause.MREMAP_MOVE, (pages(1, 3),)),
        (Cause.MUNMAP, (pages(1, 3),)),
    ]
    assert [event.etype for event in listener.events] == [EventType.MUNMAP, EventType.MIGRATE, EventType.MUNMAP]
    assert {event.reason for event in listener.events} == {Reason.UNMAP}


def test_mremap_moves_and_resizes_when_both_are_asked_for(world: Any, space: AddressSpace) -> None:
    """A smaller target loses the tail before the move, a larger one has fresh pages behind."""
    world.map(space, 3, at=0)
    fill(world, space, 0, "abc")
    listener = world.listen(space)
    assert remap(world, space, (0, 3), 2, FIXED, 10) == 10
    assert layout(space) == "10-12:rw-p"
    assert [event.spans for event in listener.events] == [(pages(2, 3),), (pages(0, 2),), (pages(0, 2),)]
    assert remap(world, space, (10, 12), 3, FIXED, 5) == 5
    assert letters(world, space, 5, 8) == "ab."


def test_mremap_moves_entries_as_they_are(world: Any, space: AddressSpace) -> None:
    """Pages on a device, held by one, write-protected: set_ptes() of what was there."""
    world.map(space, 5)
    fill(world, space, 0, "a")
    flags = (cpu_pte.DEVICE | cpu_pte.WRITE, cpu_pte.EXCLUSIVE, cpu_pte.SWAP)
    for number, flag in enumerate(flags):
        space.table.set(at(number + 1), cpu_pte.cpu_entry(500 + number, flag))
    before = space.table.read(at(0), at(5))
    remap(world, space, (0, 5), 5, FIXED, 20)
    assert np.array_equal(space.table.read(at(20), at(25)), before)
    assert not space.table.read(at(0), at(5)).any()


def test_mremap_keeps_the_linear_index_when_pages_were_touched(world: Any, space: AddressSpace) -> None:
    """copy_vma(): private memory takes its index along, untouched memory gets that of its new place."""
    world.map(space, 2, at=0)
    fill(world, space, 0, "a")
    world.map(space, 2, Prot.READ, at=4)
    remap(world, space, (0, 2), 2, FIXED, 10)
    remap(world, space, (4, 6), 2, FIXED, 14)
    touched, untouched = space.vmas
    assert (touched.mapping.delta, untouched.mapping.delta) == (-10, 0)
    assert touched.anon_vma
    remap(world, space, (10, 12), 2, FIXED, 0)
    assert next(iter(space.vmas)).mapping.delta == 0


def test_mremap_moves_file_mappings_when_they_are_shared(world: Any, space: AddressSpace) -> None:
    """The offset stays with the pages."""
    file = world.file(8)
    world.map(space, 2, RW, SHARED, file, at=0, offset=3)
    fill(world, space, 0, "ab")
    remap(world, space, (1, 2), 1, FIXED, 9)
    first, second = space.vmas
    assert (first.page_offset(at(0)), second.page_offset(at(9))) == (3, 4)
    assert letters(world, space, 9, 10) == "b"
    file.close()
    world.run(munmap(space, at(0), PAGE_SIZE))
    assert letters(world, space, 9, 10) == "b"


def test_mremap_maps_again_when_the_old_length_is_zero(world: Any, space: AddressSpace) -> None:
    """Shared memory gets a second mapping and keeps the first; nobody hears of it."""
    world.map(space, 2, RW, SHARED, world.file(4), at=0)
    fill(world, space, 0, "ab")
    listener = world.listen(space)
    assert remap(world, space, (1, 1), 1, FIXED, 9) == 9
    assert layout(space) == "0-2:rw-s 9-10:rw-s"
    assert letters(world, space, 9, 10) == "b"
    to = remap(world, space, (0, 0), 2, MAYMOVE)
    assert letters(world, space, to, to + 2) == "ab"
    assert not listener.events


def test_mremap_moves_into_its_continuation_when_nothing_was_touched(world: Any, space: AddressSpace) -> None:
    """The new VMA merges with the one it came from, which then loses the old range."""
    world.map(space, 4)
    assert remap(world, space, (0, 2), 2, FIXED, 4) == 4
    assert layout(space) == "2-6:rw-p"


def test_mremap_tells_from_the_start_of_the_block_when_it_moves_from_there(world: Any, space: AddressSpace) -> None:
    """try_realign_addr() moves both ends down where nothing lies below them; the range that is told begins there."""
    block = PMD_SIZE // PAGE_SIZE
    first = -BASE // PAGE_SIZE % block + 10  # ten pages into a block
    npages, to = block + 100, first + 4 * block
    world.map(space, npages, at=first)
    listener = world.listen(space)
    remap(world, space, (first, first + npages), npages, FIXED, to)
    world.map(space, 1, at=to - 5)
    remap(world, space, (to, to + npages), npages, FIXED, first)
    move, removal = (Cause.MREMAP_MOVE, Cause.MUNMAP)
    assert [(event.cause, event.spans) for event in listener.events] == [
        (move, (pages(first - 10, first + npages),)),
        (removal, (pages(first, first + npages),)),
        (move, (pages(to, to + npages),)),
        (removal, (pages(to, to + npages),)),
    ]


# ---- MREMAP_DONTUNMAP


def test_mremap_leaves_an_empty_mapping_when_it_is_not_to_unmap(world: Any, space: AddressSpace) -> None:
    """The pages go, the VMA stays without private pages of its own; one event."""
    world.map(space, 2)
    fill(world, space, 0, "ab")
    listener = world.listen(space)
    assert remap(world, space, (0, 2), 2, FIXED | DONTUNMAP, 6) == 6
    assert layout(space) == "0-2:rw-p 6-8:rw-p"
    assert [(event.cause, event.spans) for event in listener.events] == [(Cause.MREMAP_MOVE, (pages(0, 2),))]
    assert [vma.anon_vma for vma in space.vmas] == [0, 1]
    assert letters(world, space, 0, 2) == ".."
    assert letters(world, space, 6, 8) == "ab"


def test_mremap_takes_a_hint_when_it_is_not_to_unmap(world: Any, space: AddressSpace) -> None:
    """Without MREMAP_FIXED the target is a hint, as for mmap."""
    world.map(space, 1)
    assert remap(world, space, (0, 1), 1, MAYMOVE | DONTUNMAP, 6) == 6
    fill(world, space, 6, "a")
    to = remap(world, space, (0, 1), 1, MAYMOVE | DONTUNMAP, 6)
    assert at(to) == MMAP_BASE - PAGE_SIZE


def test_mremap_keeps_the_family_when_only_a_part_moved(world: Any, space: AddressSpace) -> None:
    """unlink_anon_vmas() only when the whole VMA was moved."""
    world.map(space, 3)
    fill(world, space, 0, "abc")
    remap(world, space, (0, 2), 2, FIXED | DONTUNMAP, 6)
    assert [vma.anon_vma for vma in space.vmas] == [1, 1]
    assert letters(world, space, 0, 3) == "..c"


def test_mremap_unlocks_what_it_leaves_behind(world: Any, space: AddressSpace) -> None:
    """VM_LOCKED goes with the pages; what does not move is split off first and stays locked (move_vma(), 6.12.117)."""
    world.map(space, 3, flags=PRIVATE | MapFlag.LOCKED)
    remap(world, space, (0, 2), 2, FIXED | DONTUNMAP, 6)
    assert layout(space) == "0-2:rw-p 2-3:rw-p 6-8:rw-p"
    assert [vma.has(VmFlag.LOCKED) for vma in space.vmas] == [False, True, True]


@pytest.mark.parametrize("to", [2, 6])
def test_mremap_keeps_the_copy_apart_when_it_is_beside_its_source(world: Any, space: AddressSpace, to: int) -> None:
    """With MREMAP_DONTUNMAP no VMA merges with itself, touched or not (copy_vma(), 6.12.117)."""
    world.map(space, 2, at=4)
    remap(world, space, (4, 6), 2, FIXED | DONTUNMAP, to)
    assert layout(space) == f"{min(4, to)}-{min(4, to) + 2}:rw-p {max(4, to)}-{max(4, to) + 2}:rw-p"


def test_mremap_joins_the_copy_with_its_other_neighbour_when_untouched(world: Any, space: AddressSpace) -> None:
    """Only the source is no partner for a merge."""
    world.map(space, 2, at=0)
    world.map(space, 2, at=4)
    remap(world, space, (0, 2), 2, FIXED | DONTUNMAP, 2)
    assert layout(space) == "0-2:rw-p 2-6:rw-p"


def test_mremap_leaves_the_linear_index_of_the_address_when_all_of_a_touched_vma_moved(
    world: Any, space: AddressSpace
) -> None:
    """What is left was never touched, so vm_pgoff is that of its address, and it merges (move_vma(), 6.12.117)."""
    world.map(space, 2, at=8)
    fill(world, space, 8, "ab")
    remap(world, space, (8, 10), 2, FIXED, 0)
    remap(world, space, (0, 2), 2, FIXED | DONTUNMAP, 6)
    world.map(space, 1, at=2)
    assert layout(space) == "0-3:rw-p 6-8:rw-p"


# ---- errors


@pytest.mark.parametrize(
    ("flags", "old", "new", "to"),
    [
        (8, 1, 1, 0),
        (MremapFlag.FIXED, 1, 1, 4),
        (DONTUNMAP, 1, 1, 4),
        (FIXED | DONTUNMAP, 2, 1, 4),
        (MAYMOVE, 1, 0, 0),
        (FIXED, 2, 2, 1),
        (FIXED, 1, 2, -1),
        (FIXED, 1, 1, TASK_SIZE // PAGE_SIZE),
    ],
)
def test_mremap_fails_when_the_request_is_wrong(
    world: Any, space: AddressSpace, flags: int, old: int, new: int, to: int
) -> None:
    """Flags that contradict each other, no new length, a target that overlaps or lies outside (EINVAL)."""
    world.map(space, 2)
    with pytest.raises(InvalidRequestError) as error:
        remap(world, space, (0, old), new, flags, to)
    assert error.value.errno == errno.EINVAL
    assert layout(space) == "0-2:rw-p"


@pytest.mark.parametrize(
    ("start", "length", "target"),
    [(BASE + 1, PAGE_SIZE, BASE), (BASE, PAGE_SIZE, BASE + 4 * PAGE_SIZE + 1), (BASE, 2 * TASK_SIZE, BASE)],
)
def test_mremap_fails_when_an_address_is_none(
    world: Any, space: AddressSpace, start: int, length: int, target: int
) -> None:
    """A start or target within a page, a target that cannot be so long (EINVAL)."""
    world.map(space, 2)
    with pytest.raises(InvalidRequestError) as error:
        world.run(mremap(space, start, PAGE_SIZE, length, FIXED, target))
    assert error.value.errno == errno.EINVAL


@pytest.mark.parametrize(("old", "new"), [(TASK_SIZE, PAGE_SIZE), (TASK_SIZE, 1)])
def test_mremap_fails_when_it_shrinks_from_outside(world: Any, space: AddressSpace, old: int, new: int) -> None:
    """The tail is unmapped by munmap, with munmap's EINVAL."""
    world.map(space, 2)
    with pytest.raises(InvalidRequestError) as error:
        world.run(mremap(space, BASE, old, new, 0))
    assert error.value.errno == errno.EINVAL


def test_mremap_fails_when_nothing_is_mapped(world: Any, space: AddressSpace) -> None:
    """EFAULT, before the target is looked at."""
    world.map(space, 2)
    with pytest.raises(BadAddressError) as error:
        remap(world, space, (2, 3), 1, FIXED, 2)
    assert error.value.errno == errno.EFAULT


@pytest.mark.parametrize(("flags", "new", "left"), [(MAYMOVE, 5, "8-10:rw-p"), (FIXED, 3, "9-10:rw-p")])
def test_mremap_fails_when_it_reaches_out_of_the_vma(
    world: Any, space: AddressSpace, flags: int, new: int, left: str
) -> None:
    """One VMA at a time (EFAULT); what MREMAP_FIXED found at its target has gone before."""
    world.map(space, 2, at=0)
    world.map(space, 2, Prot.READ, at=2)
    world.map(space, 2, at=8)
    with pytest.raises(BadAddressError) as error:
        remap(world, space, (0, 3), new, flags, 6)
    assert error.value.errno == errno.EFAULT
    assert layout(space) == f"0-2:rw-p 2-4:r--p {left}"


def test_mremap_fails_when_private_memory_is_to_be_mapped_twice(world: Any, space: AddressSpace) -> None:
    """An old length of 0 is for shared mappings (EINVAL)."""
    world.map(space, 2)
    with pytest.raises(InvalidRequestError) as error:
        remap(world, space, (0, 0), 1, MAYMOVE)
    assert error.value.errno == errno.EINVAL


def test_mremap_does_not_resize_when_the_driver_forbids_it(world: Any, space: AddressSpace) -> None:
    """VM_DONTEXPAND: EFAULT for a new length, EINVAL for MREMAP_DONTUNMAP, and a plain move is fine."""
    world.map(space, 2, RW, SHARED, world.device_file(VmFlag.MIXEDMAP | VmFlag.DONTEXPAND))
    fill(world, space, 0, "a")
    with pytest.raises(BadAddressError) as error:
        remap(world, space, (0, 2), 3)
    assert error.value.errno == errno.EFAULT
    with pytest.raises(InvalidRequestError) as refused:
        remap(world, space, (0, 2), 2, FIXED | DONTUNMAP, 8)
    assert refused.value.errno == errno.EINVAL
    assert remap(world, space, (0, 2), 2, FIXED, 8) == 8
    assert letters(world, space, 8, 9) == "a"


def test_mremap_does_not_grow_in_place_when_the_mapping_never_merges(world: Any, space: AddressSpace) -> None:
    """vma_merge_extend() fails for VM_MIXEDMAP (ENOMEM)."""
    world.map(space, 2, RW, SHARED, world.device_file(VmFlag.MIXEDMAP))
    with pytest.raises(OutOfFramesError) as error:
        remap(world, space, (0, 2), 3)
    assert error.value.errno == errno.ENOMEM
    assert layout(space) == "0-2:rw-s"


def test_mremap_fails_when_there_would_be_too_many_vmas(world: Any) -> None:
    """A move wants room for four VMAs more, with a target for six, before it begins (ENOMEM)."""
    space = world.space(vmas=6)
    world.map(space, 2, at=0)
    world.map(space, 1, Prot.READ, at=2)
    assert remap(world, space, (0, 2), 3, MAYMOVE)
    with pytest.raises(OutOfFramesError):
        remap(world, space, (2, 3), 1, FIXED, 20)
    world.map(space, 1, Prot.READ, at=6)
    with pytest.raises(OutOfFramesError) as error:
        remap(world, space, (2, 3), 5, MAYMOVE)
    assert error.value.errno == errno.ENOMEM
    assert len(space.vmas) == 3


@pytest.mark.parametrize(("new", "flags"), [(3, 0), (3, MAYMOVE), (2, FIXED | DONTUNMAP)])
def test_mremap_fails_when_the_address_space_is_limited(world: Any, new: int, flags: int) -> None:
    """RLIMIT_AS holds for growth, and for the second mapping of MREMAP_DONTUNMAP (ENOMEM)."""
    space = world.space(address_bytes=2 * PAGE_SIZE)
    world.map(space, 2)
    with pytest.raises(OutOfFramesError) as error:
        remap(world, space, (0, 2), new, flags, 8)
    assert error.value.errno == errno.ENOMEM
    assert layout(space) == "0-2:rw-p"


@pytest.mark.parametrize(("directories", "flags"), [(7, FIXED), (8, FIXED), (8, FIXED | DONTUNMAP)])
def test_mremap_moves_back_when_directories_run_out(world: Any, directories: int, flags: int) -> None:
    """At the first piece or half-way through: entries return to where they were, and the new mapping goes (ENOMEM)."""
    space = world.space(directories=directories)
    npages = 3 * PIECE_PAGES
    world.map(space, npages)
    # The second piece has one directory here and needs two at a place that is not aligned like it.
    for page in (0, PIECE_PAGES, PIECE_PAGES + 511, 2 * PIECE_PAGES):
        fill(world, space, page, "a")
    before = space.table.read(at(0), at(npages))
    listener = world.listen(space)
    new = (1 << 39) // PAGE_SIZE + 256
    with pytest.raises(OutOfFramesError) as error:
        remap(world, space, (0, npages), npages, flags, new)
    assert error.value.errno == errno.ENOMEM
    assert layout(space) == f"0-{npages}:rw-p"
    assert np.array_equal(space.table.read(at(0), at(npages)), before)
    space.table.check()
    # move_vma() calls move_page_tables() for what had moved, then do_vmi_munmap(), each of which tells.
    told = [(event.cause, event.spans[0]) for event in listener.events if event.spans[0].start == at(new)]
    moved = 0 if directories == 7 else PIECE_PAGES
    back = [(Cause.MREMAP_MOVE, AddressRange(at(new), at(new + moved)))] if moved else []
    assert told == [*back, (Cause.MUNMAP, AddressRange(at(new), at(new + npages)))]


def test_mremap_changes_nothing_when_a_mirror_does_not_answer(world: Any, space: AddressSpace) -> None:
    """Policy FAIL: the mapping stays where it is, with its pages."""
    world.map(space, 2)
    fill(world, space, 0, "ab")
    listener = world.listen(space)
    listener.state = EventState.ABANDONED
    with pytest.raises(TimedOutError):
        remap(world, space, (0, 2), 2, FIXED, 8)
    assert layout(space) == "0-2:rw-p"
    listener.events.clear()
    listener.state = EventState.ACKNOWLEDGED

    def meanwhile() -> None:
        world.meanwhile = lambda: setattr(listener, "state", EventState.ABANDONED)

    world.meanwhile = meanwhile
    with pytest.raises(TimedOutError):
        remap(world, space, (0, 2), 2, FIXED, 8)
    assert [event.cause for event in listener.events] == [Cause.MREMAP_MOVE, Cause.MUNMAP]
    assert layout(space) == "0-2:rw-p"
    assert letters(world, space, 0, 2) == "ab"


@pytest.mark.parametrize("page", [0, 8])
def test_mremap_keeps_faults_out_when_it_waits_for_mirrors(world: Any, space: AddressSpace, page: int) -> None:
    """Neither the old nor the new place is touched until the entries have moved."""
    world.map(space, 2)
    fill(world, space, 0, "a")
    world.listen(space)
    fault = touch(space, pages(page, page + 1), write=False)
    waiting = world.start_meanwhile(fault)
    remap(world, space, (0, 2), 2, FIXED, 8)
    assert waiting == [WaitFor.EDITS]
    assert world.run(fault).signal is (None if page else Signal.SEGV_MAPERR)


def test_mremap_pauses_when_there_is_much_to_move(world: Any, space: AddressSpace) -> None:
    """A long move lets others go first between its pieces."""
    npages = 3 * PIECE_PAGES
    world.map(space, npages, Prot.READ)
    world.run(touch(space, pages(0, npages), write=False))
    paused = world.pauses
    remap(world, space, (0, npages), npages, FIXED, 4 * PIECE_PAGES)
    assert world.pauses == paused + 2
    assert space.table.read(at(4 * PIECE_PAGES), at(4 * PIECE_PAGES) + npages * PAGE_SIZE).all()


def test_mremap_wraps_lengths_when_they_round_to_nothing(world: Any, space: AddressSpace) -> None:
    """PAGE_ALIGN() of the largest length is 0: no new length (EINVAL), and an old length of 0."""
    world.map(space, 1, RW, SHARED, world.file(1))
    with pytest.raises(HmmError) as error:
        world.run(mremap(space, BASE, PAGE_SIZE, (1 << 64) - 1, 0))
    assert error.value.errno == errno.EINVAL
    assert world.run(mremap(space, BASE, (1 << 64) - 1, PAGE_SIZE, MAYMOVE)) == MMAP_BASE - PAGE_SIZE
