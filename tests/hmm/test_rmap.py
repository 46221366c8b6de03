"""The reverse map: in which order VMAs are visited that could map a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from hmm.address_space import AddressSpace
from hmm.cpu_access import touch
from hmm.file import File
from hmm.madvise import Advice, madvise
from hmm.mman import MapFlag, munmap
from hmm.mprotect import mprotect
from hmm.mremap import MremapFlag, mremap
from hmm.rmap import anonymous_places, file_places, in_walk_order
from hmm.units import PAGE_SHIFT, PAGE_SIZE, AddressRange
from hmm.vma import Prot

BASE = 1 << 40
SHARED = MapFlag.SHARED | MapFlag.FIXED
RW = Prot.READ | Prot.WRITE


def at(page: int) -> int:
    """The address of a page of the window."""
    return BASE + page * PAGE_SIZE


def visited_of_file(file: File, spaces: Sequence[AddressSpace], index: int = 0) -> list[tuple[int, int]]:
    """The VMAs with a page of a file as (which of the spaces, page of the window where the VMA begins)."""
    found = in_walk_order(file_places(spaces, np.array([index]), file))
    return [(spaces.index(place.space), (place.vma.start - BASE) >> PAGE_SHIFT) for place in found]


def visited(spaces: Sequence[AddressSpace], address: int, file: File | None = None) -> list[int]:
    """Which of the spaces, in the order of their VMAs with the private page of an address or an offset in a file."""
    indices = np.array([0 if file else address >> PAGE_SHIFT])
    return [spaces.index(place.space) for place in in_walk_order(anonymous_places(spaces, indices, file))]


def write(world: Any, space: AddressSpace, page: int, npages: int = 1) -> None:
    """Touch pages for writing."""
    world.run(touch(space, AddressRange(at(page), at(page + npages)), write=True))


def test_walk_comes_to_vmas_as_they_were_mapped_when_they_begin_at_one_offset(world: Any, space: AddressSpace) -> None:
    """vma_interval_tree_insert() puts a VMA to the right of all that begin where it does."""
    file, other = world.file(8), world.space()
    world.map(other, 2, flags=SHARED, file=file, at=4)
    world.map(space, 2, flags=SHARED, file=file, at=9)
    world.map(space, 2, flags=SHARED, file=file, at=0)
    assert visited_of_file(file, [space, other]) == [(1, 4), (0, 9), (0, 0)]


def test_walk_comes_to_a_lower_offset_first_when_vmas_begin_at_several(world: Any, space: AddressSpace) -> None:
    """The tree is ordered by vm_pgoff before anything else: mm/interval_tree.c."""
    file = world.file(8)
    world.map(space, 2, flags=SHARED, file=file, at=0, offset=3)
    world.map(space, 4, flags=SHARED, file=file, at=10, offset=1)
    assert visited_of_file(file, [space], 3) == [(0, 10), (0, 0)]


@pytest.mark.parametrize("change", ["shrunk", "cut", "grown", "grown by mremap", "merged"])
def test_walk_comes_last_to_a_vma_when_its_extent_was_changed(world: Any, space: AddressSpace, change: str) -> None:
    """vma_prepare() takes a VMA out of the trees, vma_complete() inserts it anew: mm/vma.c."""
    file, other = world.file(8), world.space()
    world.map(space, 4, flags=SHARED, file=file)
    world.map(space, 2, Prot.READ, flags=SHARED, file=file, at=4, offset=4)
    world.map(other, 4, flags=SHARED, file=file)
    assert visited_of_file(file, [space, other]) == [(0, 0), (1, 0)]
    match change:
        case "shrunk":
            world.run(munmap(space, at(3), PAGE_SIZE))
        case "cut":
            world.run(mprotect(space, at(2), PAGE_SIZE, Prot.READ))
        case "grown":
            world.map(space, 1, flags=SHARED, file=file, at=4, offset=4)
        case "grown by mremap":
            world.run(munmap(space, at(4), 2 * PAGE_SIZE))
            world.run(mremap(space, at(0), 4 * PAGE_SIZE, 5 * PAGE_SIZE, MremapFlag(0)))
        case _:
            world.run(mprotect(space, at(4), 2 * PAGE_SIZE, RW))
    assert visited_of_file(file, [space, other]) == [(1, 0), (0, 0)]


def test_walk_finds_a_vma_where_it_was_when_all_of_it_got_other_flags(world: Any, space: AddressSpace) -> None:
    """Without a cut or a merge vma_modify() inserts nothing: mprotect_fixup(), madvise_update_vma()."""
    file, other = world.file(8), world.space()
    for one in (space, other):
        world.map(one, 4, flags=SHARED, file=file)
        world.map(one, 1, flags=SHARED, file=file, at=4, offset=6)
    world.run(mprotect(space, at(0), 4 * PAGE_SIZE, Prot.READ))
    world.run(madvise(space, at(0), 4 * PAGE_SIZE, Advice.DONTFORK))
    assert visited_of_file(file, [space, other]) == [(0, 0), (1, 0)]


def test_walk_finds_a_neighbour_where_it_was_when_something_apart_was_mapped(world: Any, space: AddressSpace) -> None:
    """What does not merge leaves the VMAs at both sides alone."""
    file, other = world.file(8), world.space()
    world.map(space, 2, flags=SHARED, file=file, at=0)
    world.map(space, 2, flags=SHARED, file=file, at=3)
    world.map(other, 2, flags=SHARED, file=file)
    world.map(space, 1, Prot.READ, at=2)
    world.run(munmap(space, at(2), PAGE_SIZE))
    assert visited_of_file(file, [space, other]) == [(0, 0), (0, 3), (1, 0)]


def test_walk_comes_last_to_a_vma_when_another_stood_in_its_place(world: Any, space: AddressSpace) -> None:
    """MAP_FIXED unmaps what is there and makes a new VMA: mmap_region()."""
    file, other = world.file(8), world.space()
    for one in (space, other, space):
        world.map(one, 4, flags=SHARED, file=file)
    assert visited_of_file(file, [space, other]) == [(1, 0), (0, 0)]


def test_walk_comes_to_children_behind_their_parent_when_the_vma_is_of_a_file(world: Any, space: AddressSpace) -> None:
    """vma_interval_tree_insert_after(): the youngest child is the nearest, before whatever was mapped since."""
    file, stranger = world.file(8), world.space()
    for one in (space, stranger):
        world.map(one, 4, flags=SHARED, file=file)
    elder = world.fork(space)
    younger = world.fork(space)
    grandchild = world.fork(elder)
    spaces = [space, stranger, elder, younger, grandchild]
    assert [number for number, _ in visited_of_file(file, spaces)] == [0, 3, 2, 4, 1]
    world.run(mprotect(elder, at(1), PAGE_SIZE, Prot.READ))
    assert [number for number, _ in visited_of_file(file, spaces)] == [0, 3, 4, 1, 2]


def test_walk_comes_last_to_the_youngest_child_when_the_pages_are_private(world: Any, space: AddressSpace) -> None:
    """anon_vma_fork() inserts a child's VMA as any other: mm/rmap.c, anon_vma_clone()."""
    world.map(space, 4)
    write(world, space, 0, 4)
    elder = world.fork(space)
    younger = world.fork(space)
    spaces = [space, elder, younger]
    assert visited(spaces, at(0)) == [0, 1, 2]
    world.run(munmap(elder, at(3), PAGE_SIZE))
    assert visited(spaces, at(0)) == [0, 2, 1]
    world.run(mprotect(space, at(0), PAGE_SIZE, Prot.READ))
    world.run(mprotect(space, at(0), PAGE_SIZE, RW))
    assert visited(spaces, at(0)) == [2, 1, 0]


def test_walk_orders_private_pages_by_their_first_when_the_vma_is_of_a_file(world: Any, space: AddressSpace) -> None:
    """A VMA comes into the tree of its file when it is mapped, into that of private pages when it has the first one."""
    file, other = world.file(8), world.space()
    for one in (space, other):
        world.map(one, 4, flags=MapFlag.PRIVATE | MapFlag.FIXED, file=file)
    for one in (other, space):
        write(world, one, 0)
    assert visited_of_file(file, [space, other]) == [(0, 0), (1, 0)]
    assert visited([space, other], at(0), file) == [1, 0]


def test_walk_comes_last_to_a_vma_when_it_was_moved(world: Any, space: AddressSpace) -> None:
    """copy_vma() makes a new VMA: mm/vma.c."""
    file, other = world.file(8), world.space()
    for one in (space, other):
        world.map(one, 4, flags=SHARED, file=file)
    move = MremapFlag.MAYMOVE | MremapFlag.FIXED
    world.run(mremap(space, at(0), 4 * PAGE_SIZE, 4 * PAGE_SIZE, move, at(16)))
    assert visited_of_file(file, [space, other]) == [(1, 0), (0, 16)]
