"""Where mappings go."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from hmm.address_space import MMAP_BASE, AddressSpace
from hmm.errors import AccessDeniedError, HmmError, InvalidRequestError, OutOfFramesError
from hmm.file import FileKind
from hmm.semantics import LINUX_7
from hmm.units import PAGE_SIZE, PMD_SIZE, TASK_SIZE, AddressRange, page_up
from hmm.unmapped_area import MMAP_MIN_ADDR, MapFlag, get_unmapped_area, place
from hmm.vma import STACK_GUARD_GAP, Mapping, VmFlag

PRIVATE = MapFlag.PRIVATE | MapFlag.ANONYMOUS
SHARED = MapFlag.SHARED | MapFlag.ANONYMOUS


def fill(space: AddressSpace, start: int, end: int, flags: VmFlag = VmFlag.READ) -> None:
    """Map [start, end)."""
    space.vmas.assign(AddressRange(start, end), Mapping(flags))


def test_place_fills_from_the_top_when_there_is_no_hint(space: AddressSpace) -> None:
    """Mappings grow downwards from mmap_base: arch_get_unmapped_area_topdown()."""
    first = place(space, 3 * PAGE_SIZE)
    assert first == MMAP_BASE - 3 * PAGE_SIZE
    fill(space, first, MMAP_BASE)
    assert place(space, 1) == first - PAGE_SIZE


def test_place_takes_the_highest_hole_when_one_is_long_enough(space: AddressSpace) -> None:
    """A hole between two mappings is used before the space below them."""
    fill(space, MMAP_BASE - 2 * PAGE_SIZE, MMAP_BASE)
    fill(space, MMAP_BASE - 9 * PAGE_SIZE, MMAP_BASE - 5 * PAGE_SIZE)
    assert place(space, 3 * PAGE_SIZE) == MMAP_BASE - 5 * PAGE_SIZE
    assert place(space, 4 * PAGE_SIZE) == MMAP_BASE - 13 * PAGE_SIZE


@pytest.mark.parametrize("hint", [1 << 40, (1 << 40) + 123])
def test_place_takes_the_hint_when_it_is_free(space: AddressSpace, hint: int) -> None:
    """A hint is rounded down to a page and honoured."""
    assert place(space, PAGE_SIZE, hint) == 1 << 40


def test_place_ignores_the_hint_when_it_is_taken(space: AddressSpace) -> None:
    """A hint into something mapped is as good as none."""
    fill(space, 1 << 40, (1 << 40) + PAGE_SIZE)
    assert place(space, PAGE_SIZE, 1 << 40) == MMAP_BASE - PAGE_SIZE


def test_place_raises_the_hint_when_it_is_below_the_minimum(space: AddressSpace) -> None:
    """round_hint_to_min(): a small hint becomes mmap_min_addr, none stays none."""
    assert place(space, PAGE_SIZE, PAGE_SIZE) == MMAP_MIN_ADDR
    assert place(space, PAGE_SIZE, 17) == MMAP_BASE - PAGE_SIZE


def test_place_ignores_the_hint_when_it_ends_behind_the_address_space(space: AddressSpace) -> None:
    """mmap_address_hint_valid()."""
    assert place(space, 2 * PAGE_SIZE, TASK_SIZE - PAGE_SIZE) == MMAP_BASE - 2 * PAGE_SIZE


def test_place_keeps_the_guard_gap_when_a_stack_is_above(space: AddressSpace) -> None:
    """Nothing is put within stack_guard_gap below a mapping that grows downwards, by hint or without."""
    stack = 1 << 40
    fill(space, stack, stack + PAGE_SIZE, VmFlag.READ | VmFlag.GROWSDOWN)
    gap = stack - STACK_GUARD_GAP
    assert place(space, PAGE_SIZE, gap - PAGE_SIZE) == gap - PAGE_SIZE
    assert place(space, PAGE_SIZE, gap) == MMAP_BASE - PAGE_SIZE
    fill(space, stack + PAGE_SIZE, MMAP_BASE)
    assert place(space, PAGE_SIZE) == gap - PAGE_SIZE


def test_place_searches_from_the_bottom_when_the_area_is_full(space: AddressSpace) -> None:
    """Above a third of the address space, and up to its end: arch_get_unmapped_area()."""
    third = page_up(TASK_SIZE // 3)
    fill(space, MMAP_MIN_ADDR, MMAP_BASE)
    assert place(space, PAGE_SIZE) == MMAP_BASE
    space.vmas.erase(AddressRange(third, third + PAGE_SIZE))
    fill(space, MMAP_BASE, TASK_SIZE)
    assert place(space, PAGE_SIZE) == third
    with pytest.raises(OutOfFramesError) as error:
        place(space, 2 * PAGE_SIZE)
    assert error.value.errno == errno.ENOMEM


def test_place_uses_the_low_gigabyte_when_asked_to(space: AddressSpace) -> None:
    """MAP_32BIT: the second GiB, from the bottom; a hint in it is honoured."""
    assert place(space, PAGE_SIZE, flags=PRIVATE | MapFlag.LOW_2G) == 1 << 30
    assert place(space, PAGE_SIZE, 3 << 29, PRIVATE | MapFlag.LOW_2G) == 3 << 29
    fill(space, 1 << 30, (1 << 31) - PAGE_SIZE)
    assert place(space, PAGE_SIZE, flags=PRIVATE | MapFlag.LOW_2G) == (1 << 31) - PAGE_SIZE
    with pytest.raises(OutOfFramesError):
        place(space, 2 * PAGE_SIZE, flags=PRIVATE | MapFlag.LOW_2G)


def test_place_stays_above_four_gigabytes_when_asked_to(space: AddressSpace) -> None:
    """MAP_ABOVE4G limits the search; what is left is the search from the bottom."""
    space.mmap_base = (1 << 32) + PAGE_SIZE
    assert place(space, PAGE_SIZE, flags=PRIVATE | MapFlag.ABOVE4G) == 1 << 32
    fill(space, 1 << 32, (1 << 32) + PAGE_SIZE)
    assert place(space, PAGE_SIZE, flags=PRIVATE | MapFlag.ABOVE4G) > 1 << 40


def test_place_aligns_to_huge_pages_when_the_length_is_a_multiple(space: AddressSpace) -> None:
    """Private anonymous memory of whole 2 MiB without a hint; shared memory and other lengths are not aligned."""
    fill(space, MMAP_BASE - PAGE_SIZE, MMAP_BASE)
    top = MMAP_BASE - PAGE_SIZE
    assert place(space, 2 * PMD_SIZE) % PMD_SIZE == 0
    assert place(space, 2 * PMD_SIZE) == (top - 2 * PMD_SIZE) // PMD_SIZE * PMD_SIZE
    assert place(space, 2 * PMD_SIZE, flags=SHARED) == top - 2 * PMD_SIZE
    assert place(space, PMD_SIZE + PAGE_SIZE) == top - PMD_SIZE - PAGE_SIZE
    assert place(space, PMD_SIZE, (1 << 40) + PAGE_SIZE) == (1 << 40) + PAGE_SIZE


def test_place_leaves_no_hole_when_the_padded_area_is_aligned_already(space: AddressSpace) -> None:
    """The area searched is 2 MiB longer; when it begins aligned, its upper end is used."""
    assert MMAP_BASE % PMD_SIZE
    space.mmap_base = 1 << 40
    assert place(space, PMD_SIZE) == (1 << 40) - PMD_SIZE


def test_place_aligns_the_offset_when_a_regular_file_is_mapped(world: Any, space: AddressSpace) -> None:
    """Address and offset agree modulo 2 MiB where an aligned 2 MiB of the file is mapped: thp_get_unmapped_area()."""
    file = world.file(4096)
    for offset in (0, PAGE_SIZE, PMD_SIZE, PMD_SIZE + 5 * PAGE_SIZE):
        start = place(space, 2 * PMD_SIZE, 0, MapFlag.PRIVATE, file, offset)
        assert (start - offset) % PMD_SIZE == 0
        assert start + 2 * PMD_SIZE <= MMAP_BASE
    assert place(space, PMD_SIZE, 0, MapFlag.PRIVATE, file, PAGE_SIZE) == MMAP_BASE - PMD_SIZE
    assert place(space, PMD_SIZE, 1 << 40, MapFlag.PRIVATE, file) == 1 << 40


def test_place_does_not_align_when_the_file_is_shared_memory(world: Any, space: AddressSpace) -> None:
    """shmem_get_unmapped_area() with huge=never."""
    file = world.file(4096, FileKind.SHARED_MEMORY)
    assert place(space, PMD_SIZE, 0, MapFlag.SHARED, file) == MMAP_BASE - PMD_SIZE


@pytest.mark.parametrize("flags", [SHARED, SHARED | MapFlag.LOW_2G, SHARED | MapFlag.ABOVE4G])
def test_place_rounds_the_hint_down_when_hugetlb_memory_is_mapped(
    world: Any, space: AddressSpace, flags: MapFlag
) -> None:
    """hugetlb_get_unmapped_area() of arch/x86/mm/hugetlbpage.c, which asks for no other flag than MAP_FIXED."""
    file = world.file(kind=FileKind.HUGETLB)
    assert place(space, PMD_SIZE, (1 << 40) + PMD_SIZE - 1, flags, file) == 1 << 40
    fill(space, 1 << 40, (1 << 40) + PAGE_SIZE)
    found = place(space, PMD_SIZE, (1 << 40) + PAGE_SIZE, flags, file)
    assert (found, found % PMD_SIZE) == ((MMAP_BASE - PMD_SIZE) & -PMD_SIZE, 0)
    with pytest.raises(AccessDeniedError) as raised:
        place(space, PMD_SIZE, MMAP_MIN_ADDR, flags, file)
    assert raised.value.errno == errno.EPERM


def test_place_aligns_to_huge_pages_when_the_file_is_a_device(world: Any, space: AddressSpace) -> None:
    """__get_unmapped_area() (6.12) treats a file without get_unmapped_area() as private anonymous memory."""
    device = world.file(0, FileKind.DEVICE)
    for flags in (MapFlag.SHARED, MapFlag.PRIVATE):
        assert place(space, 2 * PMD_SIZE, 0, flags, device) % PMD_SIZE == 0
        assert place(space, 2 * PMD_SIZE, 0, flags, device, 3 * PAGE_SIZE) % PMD_SIZE == 3 * PAGE_SIZE
        assert place(space, PMD_SIZE + PAGE_SIZE, 0, flags, device) == MMAP_BASE - PMD_SIZE - PAGE_SIZE
        hint = (1 << 40) + PAGE_SIZE
        assert place(space, PMD_SIZE, hint, flags, device) == hint


def test_place_rounds_the_hint_up_when_hugetlb_memory_is_mapped_today(world: Any, space: AddressSpace) -> None:
    """hugetlb_get_unmapped_area() of fs/hugetlbfs/inode.c, which asks for the same flags as others.  Tried on 6.18."""
    file, space.semantics = world.file(kind=FileKind.HUGETLB), LINUX_7
    assert place(space, PMD_SIZE, (1 << 40) + PAGE_SIZE, SHARED, file) == (1 << 40) + PMD_SIZE
    assert place(space, PMD_SIZE, MMAP_MIN_ADDR, SHARED, file) == PMD_SIZE
    low = place(space, PMD_SIZE, 0, SHARED | MapFlag.LOW_2G, file)
    assert 1 << 30 <= low < 1 << 31


def test_place_does_not_align_when_only_the_plain_length_fits(space: AddressSpace) -> None:
    """The failure may be due to the padding: it is tried once more without."""
    hole = (1 << 40) + PAGE_SIZE
    fill(space, MMAP_MIN_ADDR, TASK_SIZE)
    space.vmas.erase(AddressRange(hole, hole + PMD_SIZE))
    assert place(space, PMD_SIZE) == hole


RECORDED = (
    # The first calls of a recording of CPython on Linux 6.18: length, flags, whether of a file, and the address.
    (8192, PRIVATE, False, 0x7FCD129FE000),
    (6003000, MapFlag.PRIVATE, True, 0x7FCD12400000),
    (37807, MapFlag.PRIVATE, True, 0x7FCD129F4000),
    (1974096, MapFlag.PRIVATE, True, 0x7FCD1221E000),
    (913680, MapFlag.PRIVATE, True, 0x7FCD1213E000),
    (8192, PRIVATE, False, 0x7FCD129F2000),
)
RECORDED_AFTER_UNMAPPING = (
    (353616, MapFlag.PRIVATE, True, 0x7FCD120E7000),
    (27028, MapFlag.SHARED, True, 0x7FCD129F7000),
    (1048576, PRIVATE, False, 0x7FCD11FE7000),
    (266240, PRIVATE, False, 0x7FCD11FA6000),
    (135168, PRIVATE, False, 0x7FCD129D1000),
    (16384, PRIVATE, False, 0x7FCD129CD000),
)


def test_place_agrees_with_the_kernel_when_a_program_starts(world: Any, space: AddressSpace) -> None:
    """Every address that the kernel chose for a dynamically linked program is chosen here."""
    fill(space, 0x7FCD12A00000, 0x7FCD12A3D000)
    space.mmap_base = 0x7FCD12A3D000
    file = world.file(1 << 14)
    for step in (RECORDED, RECORDED_AFTER_UNMAPPING):
        for length, flags, of_file, address in step:
            assert hex(place(space, length, 0, flags, file if of_file else None)) == hex(address)
            fill(space, address, page_up(address + length))
        space.vmas.erase(AddressRange(0x7FCD129F4000, 0x7FCD129FE000))


@pytest.mark.parametrize(
    ("address", "length", "kind", "number"),
    [
        (0, TASK_SIZE + PAGE_SIZE, OutOfFramesError, errno.ENOMEM),
        (TASK_SIZE, PAGE_SIZE, OutOfFramesError, errno.ENOMEM),
        (TASK_SIZE - PAGE_SIZE + 1, PAGE_SIZE, OutOfFramesError, errno.ENOMEM),
        ((1 << 40) + 1, PAGE_SIZE, InvalidRequestError, errno.EINVAL),
        (MMAP_MIN_ADDR - PAGE_SIZE, PAGE_SIZE, AccessDeniedError, errno.EPERM),
        (0, PAGE_SIZE, AccessDeniedError, errno.EPERM),
    ],
)
def test_get_unmapped_area_fails_when_a_fixed_address_is_no_place(
    space: AddressSpace, address: int, length: int, kind: type[HmmError], number: int
) -> None:
    """The errors of __get_unmapped_area(), in its order: too long, unaligned, below mmap_min_addr."""
    with pytest.raises(kind) as error:
        get_unmapped_area(space, length, address, MapFlag.FIXED, None, 0)
    assert error.value.errno == number


def test_low_addresses_are_given_when_they_are_asked_for_by_whoever_may(space: AddressSpace) -> None:
    """security/commoncap.c, cap_mmap_addr(): CAP_SYS_RAWIO.  round_hint_to_min() knows no such exception."""
    space.low_addresses = True
    assert place(space, PAGE_SIZE, 0, PRIVATE | MapFlag.FIXED) == 0
    assert place(space, PAGE_SIZE, PAGE_SIZE, PRIVATE | MapFlag.FIXED_NOREPLACE) == PAGE_SIZE
    assert place(space, PAGE_SIZE, PAGE_SIZE, PRIVATE) == MMAP_MIN_ADDR
    fill(space, MMAP_MIN_ADDR, TASK_SIZE)
    with pytest.raises(OutOfFramesError):
        place(space, PAGE_SIZE, 0, PRIVATE)


def test_place_returns_the_fixed_address_when_something_is_there(space: AddressSpace) -> None:
    """MAP_FIXED is not a question; MAP_FIXED_NOREPLACE implies it and is judged later."""
    fill(space, 1 << 40, (1 << 40) + PAGE_SIZE)
    assert place(space, PAGE_SIZE, 1 << 40, PRIVATE | MapFlag.FIXED) == 1 << 40
    assert place(space, PAGE_SIZE, 1 << 40, PRIVATE | MapFlag.FIXED_NOREPLACE) == 1 << 40
