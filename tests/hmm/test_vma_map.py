"""Looking VMAs up, and what a VMA says of itself."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from hmm.units import PAGE_SIZE, TASK_SIZE, AddressRange
from hmm.vma import MAY_FLAGS, STACK_GUARD_GAP, Mapping, Prot, Vma, VmFlag
from hmm.vma_map import VmaMap

R = Mapping(VmFlag.READ | MAY_FLAGS)
RW = Mapping(VmFlag.READ | VmFlag.WRITE | MAY_FLAGS)
STACK = Mapping(RW.flags | VmFlag.GROWSDOWN)
GUARD_PAGES = STACK_GUARD_GAP // PAGE_SIZE


@dataclass(eq=False)
class Thing:
    """An object that can be mapped."""

    id: int
    name: str


def pages(start: int, end: int) -> AddressRange:
    """The addresses of pages [start, end)."""
    return AddressRange(start * PAGE_SIZE, end * PAGE_SIZE)


def layout(*parts: tuple[int, int, Mapping]) -> VmaMap:
    """A map with VMAs at these pages."""
    vmas = VmaMap()
    for start, end, mapping in parts:
        vmas.assign(pages(start, end), mapping)
    vmas.check()
    return vmas


def numbers(found: list[Vma]) -> list[tuple[int, int]]:
    """VMAs as page numbers."""
    return [(vma.start // PAGE_SIZE, vma.end // PAGE_SIZE) for vma in found]


@pytest.fixture
def three() -> VmaMap:
    """Pages 2 to 4 and 4 to 6 side by side, a hole, and 9 to 12."""
    return layout((2, 4, RW), (4, 6, R), (9, 12, RW))


def test_find_returns_the_vma_only_when_it_holds_the_address(three: VmaMap) -> None:
    """vma_lookup(): the start is inside, the end is not."""
    for page, expected in ((1, None), (2, 2), (3, 2), (4, 4), (6, None), (9, 9), (11, 9), (12, None)):
        found = three.find(page * PAGE_SIZE)
        assert (found and found.start // PAGE_SIZE) == expected, page
    assert three.find(2 * PAGE_SIZE - 1) is None
    assert VmaMap().find(0) is None


def test_find_next_returns_the_first_vma_that_ends_above(three: VmaMap) -> None:
    """find_vma(): the VMA that holds the address, or the next one above it."""
    for page, expected in ((0, 2), (2, 2), (3, 2), (4, 4), (6, 9), (8, 9), (11, 9), (12, None)):
        found = three.find_next(page * PAGE_SIZE)
        assert (found and found.start // PAGE_SIZE) == expected, page
    assert VmaMap().find_next(0) is None


def test_find_prev_returns_the_last_vma_that_starts_below(three: VmaMap) -> None:
    """find_vma_prev(): what stands below a hole or below the start of a VMA."""
    for page, expected in ((0, None), (2, None), (3, 2), (4, 2), (6, 4), (9, 4), (10, 9), (99, 9)):
        found = three.find_prev(page * PAGE_SIZE)
        assert (found and found.start // PAGE_SIZE) == expected, page


def test_overlapping_returns_whole_vmas_and_pieces_are_clipped(three: VmaMap) -> None:
    """The three views of a range: whole VMAs, their parts inside, and these with the holes."""
    span = pages(3, 10)
    assert numbers(three.overlapping(span)) == [(2, 4), (4, 6), (9, 12)]
    assert numbers(three.mapped_pieces(span)) == [(3, 4), (4, 6), (9, 10)]
    assert [(s // PAGE_SIZE, e // PAGE_SIZE, m) for s, e, m in three.pieces(span)] == [
        (3, 4, RW),
        (4, 6, R),
        (6, 9, None),
        (9, 10, RW),
    ]
    assert [(s // PAGE_SIZE, e // PAGE_SIZE, m) for s, e, m in three.pieces(pages(0, 3))] == [
        (0, 2, None),
        (2, 3, RW),
    ]
    assert three.pieces(pages(6, 9)) == [(6 * PAGE_SIZE, 9 * PAGE_SIZE, None)]


def test_pieces_of_nothing_are_none(three: VmaMap) -> None:
    """An empty range overlaps nothing, wherever it lies."""
    for page in (0, 2, 3, 6, 12):
        assert three.overlapping(pages(page, page)) == []
        assert three.pieces(pages(page, page)) == []
        assert three.first_hole(pages(page, page)) is None


def test_one_piece_is_clipped_at_both_ends(three: VmaMap) -> None:
    """A range inside one VMA."""
    assert numbers(three.mapped_pieces(pages(10, 11))) == [(10, 11)]


def test_first_hole_reaches_to_the_next_vma_when_the_range_is_not_covered(three: VmaMap) -> None:
    """The extent of a hole lets a caller skip all of it, also behind its range."""
    assert three.first_hole(pages(2, 6)) is None
    assert three.first_hole(pages(0, 4)) == pages(0, 2)
    assert three.first_hole(pages(3, 7)) == pages(6, 9)
    assert three.first_hole(pages(3, 20)) == pages(6, 9)
    assert three.first_hole(pages(11, 13)) == AddressRange(12 * PAGE_SIZE, TASK_SIZE)


def test_number_and_order_of_vmas(three: VmaMap) -> None:
    """len() is map_count; iteration goes upwards."""
    assert len(three) == 3
    assert numbers(list(three)) == [(2, 4), (4, 6), (9, 12)]


def test_vma_describes_a_file_mapping_as_proc_maps_does() -> None:
    """Offset, permissions and name of a shared file mapping."""
    flags = VmFlag.READ | VmFlag.WRITE | VmFlag.SHARED | VmFlag.MAYSHARE | MAY_FLAGS
    vma = Vma(8 * PAGE_SIZE, 10 * PAGE_SIZE, Mapping(flags, Thing(3, "/tmp/data"), delta=-5))
    assert (vma.npages, vma.perms, vma.name, vma.offset_bytes) == (2, "rw-s", "/tmp/data", 3 * PAGE_SIZE)
    assert vma.page_offset(9 * PAGE_SIZE + 7) == 4
    assert vma.shared
    assert vma.readable
    assert vma.writable
    assert not vma.executable
    assert vma.span == pages(8, 10)
    assert vma.prot == Prot.READ | Prot.WRITE
    assert vma.flags == flags
    assert vma.backing is vma.mapping.backing
    assert str(vma) == "[0x8000, 0xa000) rw-s /tmp/data"


def test_vma_shows_may_share_when_a_shared_mapping_may_not_be_written() -> None:
    """A read-only shared mapping of a read-only file loses VM_SHARED and still shows 's' (show_map_vma())."""
    vma = Vma(0, PAGE_SIZE, Mapping(VmFlag.READ | VmFlag.MAYREAD | VmFlag.MAYSHARE, Thing(3, "f")))
    assert (vma.perms, vma.shared) == ("r--s", False)


def test_vma_describes_private_anonymous_memory_as_proc_maps_does() -> None:
    """Anonymous memory has no name and no offset; its page offset is its linear index."""
    vma = Vma(8 * PAGE_SIZE, 10 * PAGE_SIZE, RW)
    assert (vma.perms, vma.name, vma.offset_bytes, vma.anon_vma) == ("rw-p", "", 0, 0)
    assert vma.page_offset(9 * PAGE_SIZE) == 9
    assert vma.mapping.anonymous
    assert not vma.mapping.special
    assert str(vma) == "[0x8000, 0xa000) rw-p anon"


def test_mapping_keeps_its_pages_when_it_moves() -> None:
    """mremap: the same page of the object is found at the new address."""
    file = Thing(1, "f")
    mapping = Mapping(VmFlag.READ, file, delta=-8)
    old, new = Vma(8 * PAGE_SIZE, 9 * PAGE_SIZE, mapping), 30 * PAGE_SIZE
    moved = Vma(new, new + PAGE_SIZE, mapping.moved(new - old.start))
    assert moved.page_offset(new) == old.page_offset(old.start) == 0


def test_mapping_changes_access_alone_when_protected() -> None:
    """mprotect leaves every flag but VM_READ, VM_WRITE and VM_EXEC."""
    mapping = Mapping(RW.flags | VmFlag.LOCKED | VmFlag.ACCOUNT, None, 0, 5, cloned=True)
    protected = mapping.with_prot(Prot.EXEC)
    assert protected.flags == VmFlag.EXEC | MAY_FLAGS | VmFlag.LOCKED | VmFlag.ACCOUNT
    assert (protected.anon_vma, protected.cloned) == (5, True)
    assert protected.prot == Prot.EXEC
    assert protected.executable
    assert protected.has(VmFlag.LOCKED | VmFlag.IO)
    assert not protected.has(VmFlag.IO | VmFlag.PFNMAP)


def test_area_is_searched_from_the_top() -> None:
    """unmapped_area_topdown(): the highest hole that is long enough, and its upper end."""
    vmas = layout((10, 20, RW), (22, 30, RW), (33, 40, RW))

    def area(npages: int, low: int = 0, high: int = 40) -> int | None:
        found = vmas.unmapped_area_topdown(npages * PAGE_SIZE, low * PAGE_SIZE, high * PAGE_SIZE)
        return None if found is None else found // PAGE_SIZE

    assert area(3) == 30
    assert area(2) == 31
    assert area(4) == 6
    assert area(2, high=32) == 30
    assert area(2, high=31) == 20
    assert area(11) is None
    assert area(4, low=7) is None
    assert area(10) == 0
    assert area(5, high=100) == 95
    assert area(61, high=100) is None


def test_area_is_searched_from_the_bottom() -> None:
    """unmapped_area(): the lowest hole that is long enough, and its lower end."""
    vmas = layout((10, 20, RW), (22, 30, RW), (33, 40, RW))

    def area(npages: int, low: int = 0, high: int = 100) -> int | None:
        found = vmas.unmapped_area(npages * PAGE_SIZE, low * PAGE_SIZE, high * PAGE_SIZE)
        return None if found is None else found // PAGE_SIZE

    assert area(3) == 0
    assert area(3, low=8) == 30
    assert area(2, low=8) == 8
    assert area(2, low=9) == 20
    assert area(11) == 40
    assert area(60) == 40
    assert area(61) is None
    assert area(3, low=8, high=32) is None
    assert area(3, low=8, high=5) is None


@pytest.mark.parametrize(("align_pages", "offset_pages"), [(1, 0), (4, 0), (8, 0), (8, 3), (16, 5)])
def test_area_is_aligned_when_asked_for(align_pages: int, offset_pages: int) -> None:
    """The address is the wanted one modulo the alignment, and room for the worst case was looked for."""
    vmas = layout((50, 60, RW), (100, 110, RW))
    align, offset = align_pages * PAGE_SIZE, offset_pages * PAGE_SIZE
    length = 5 * PAGE_SIZE
    for search in (vmas.unmapped_area_topdown, vmas.unmapped_area):
        found = search(length, 20 * PAGE_SIZE, 100 * PAGE_SIZE, align=align, align_offset=offset)
        assert found is not None
        assert (found - offset) % align == 0
        assert vmas.first_hole(AddressRange(found, found + length)) is not None
        assert not vmas.overlapping(AddressRange(found, found + length))
    # A hole of 40 pages has no room for 26 with an alignment of 16, wherever it begins: 26 + 15 > 40.
    assert vmas.unmapped_area(26 * PAGE_SIZE, pages(60, 100).start, pages(60, 100).end, align=16 << 12) is None


def test_area_keeps_the_guard_below_a_stack() -> None:
    """stack_guard_gap: nothing is placed in the 256 pages below a VMA that grows downwards."""
    vmas = layout((1000, 1010, STACK))
    high = 1000 * PAGE_SIZE
    assert vmas.unmapped_area_topdown(PAGE_SIZE, 0, high) == (1000 - GUARD_PAGES - 1) * PAGE_SIZE
    assert vmas.unmapped_area_topdown(PAGE_SIZE, 0, high, stack_guard=0) == 999 * PAGE_SIZE
    assert vmas.unmapped_area_topdown(PAGE_SIZE, (1000 - GUARD_PAGES) * PAGE_SIZE, high) is None
    low = (1000 - GUARD_PAGES - 2) * PAGE_SIZE
    assert vmas.unmapped_area(2 * PAGE_SIZE, low, 2 * high) == low
    assert vmas.unmapped_area(3 * PAGE_SIZE, low, 2 * high) == 1010 * PAGE_SIZE
    assert vmas.unmapped_area(3 * PAGE_SIZE, low, high) is None


def test_area_below_a_guard_that_reaches_the_next_vma() -> None:
    """A hole shorter than the guard of the stack above is not used at all."""
    vmas = layout((800, 900, RW), (1000, 1010, STACK))
    found = vmas.unmapped_area_topdown(PAGE_SIZE, 0, 1000 * PAGE_SIZE)
    assert found == (1000 - GUARD_PAGES - 1) * PAGE_SIZE


def test_hint_is_free_only_outside_of_vmas_and_guards() -> None:
    """A hint is taken if the range is free and ends below vm_start_gap() of the next VMA."""
    vmas = layout((10, 20, RW), (1000, 1010, STACK))
    assert vmas.is_free(pages(5, 10))
    assert not vmas.is_free(pages(5, 11))
    assert not vmas.is_free(pages(12, 13))
    assert not vmas.is_free(pages(19, 22))
    assert vmas.is_free(pages(20, 1000 - GUARD_PAGES))
    assert not vmas.is_free(pages(20, 1001 - GUARD_PAGES))
    assert vmas.is_free(pages(20, 1000), stack_guard=0)
    assert vmas.is_free(pages(1010, 2000))


def test_check_notices_a_map_that_was_damaged(three: VmaMap) -> None:
    """The invariants are asserted, not assumed."""
    chunk = three._chunks[0]
    chunk.holes[1] += 1
    with pytest.raises(AssertionError):
        three.check()
    chunk.holes[1] -= 1
    chunk.largest = 0
    with pytest.raises(AssertionError):
        three.check()
    chunk.largest = 1 << 40
    three._firsts[0] += 1
    with pytest.raises(AssertionError):
        three.check()
    three._firsts[0] -= 1
    three.check()
    three._count += 1
    with pytest.raises(AssertionError):
        three.check()


def test_set_mapping_needs_the_vma_as_it_is(three: VmaMap) -> None:
    """A VMA is a value: one that is no longer in the map cannot be changed."""
    stale = Vma(2 * PAGE_SIZE, 3 * PAGE_SIZE, RW)
    with pytest.raises(AssertionError):
        three.set_mapping(stale, R)
