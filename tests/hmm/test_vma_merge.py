"""When neighbouring VMAs become one: the rules of mm/vma.c, one by one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from hmm.units import PAGE_SIZE, AddressRange
from hmm.vma import (
    MAY_FLAGS,
    Mapping,
    Prot,
    Vma,
    VmFlag,
    anon_vma_compatible,
    canonical,
    mergeable,
    merged,
)
from hmm.vma_map import VmaMap

RW = VmFlag.READ | VmFlag.WRITE | MAY_FLAGS
ANON = Mapping(RW)


@dataclass(eq=False)
class Thing:
    """An object that can be mapped."""

    id: int
    name: str


FILE = Thing(1, "/usr/lib/libc.so.6")
OTHER = Thing(2, "/usr/lib/libc.so.6")


def pages(start: int, end: int) -> AddressRange:
    """The addresses of pages [start, end)."""
    return AddressRange(start * PAGE_SIZE, end * PAGE_SIZE)


def cuts(vmas: VmaMap) -> list[tuple[int, int]]:
    """First and last page boundary of every VMA."""
    vmas.check()
    return [(vma.start // PAGE_SIZE, vma.end // PAGE_SIZE) for vma in vmas]


@pytest.mark.parametrize(
    ("existing", "added", "expected"),
    [
        pytest.param(ANON, Mapping(RW), True, id="equal"),
        pytest.param(ANON, Mapping(RW | VmFlag.SOFTDIRTY), True, id="soft-dirty-is-not-compared"),
        pytest.param(ANON, Mapping(RW | VmFlag.ACCOUNT), False, id="accounted-differs"),
        pytest.param(ANON, Mapping(VmFlag.READ | MAY_FLAGS), False, id="access-differs"),
        pytest.param(ANON, Mapping(RW, FILE), False, id="file-and-anonymous"),
        pytest.param(Mapping(RW, FILE, 5), Mapping(RW, FILE, 5), True, id="file-continued"),
        pytest.param(Mapping(RW, FILE, 5), Mapping(RW, FILE, 6), False, id="file-not-continued"),
        pytest.param(Mapping(RW, FILE), Mapping(RW, OTHER), False, id="files-of-equal-name"),
        pytest.param(Mapping(RW, None, 3, 7), Mapping(RW), False, id="anonymous-moved"),
        pytest.param(Mapping(RW, None, 0, 7), Mapping(RW), True, id="touched-grows-over-untouched"),
        pytest.param(Mapping(RW), Mapping(RW, None, 0, 7), False, id="untouched-not-over-touched"),
        pytest.param(Mapping(RW, None, 0, 7), Mapping(RW, None, 0, 7), True, id="same-family"),
        pytest.param(Mapping(RW, None, 0, 7), Mapping(RW, None, 0, 8), False, id="two-families"),
        pytest.param(Mapping(RW, None, 0, 7, cloned=True), Mapping(RW), False, id="forked-not-over-untouched"),
        pytest.param(
            Mapping(RW, None, 0, 7, cloned=True), Mapping(RW, None, 0, 7, cloned=True), True, id="forked-same"
        ),
        pytest.param(Mapping(RW | VmFlag.GROWSDOWN), Mapping(RW | VmFlag.GROWSDOWN), True, id="stack"),
    ],
)
def test_merge_is_permitted_when_the_kernel_permits_it(existing: Mapping, added: Mapping, expected: bool) -> None:
    """A VMA grows over a neighbour by is_mergeable_vma() and is_mergeable_anon_vma() (mm/vma.c, 6.12)."""
    assert mergeable(existing, added) is expected


@pytest.mark.parametrize("flag", [VmFlag.IO, VmFlag.DONTEXPAND, VmFlag.PFNMAP, VmFlag.MIXEDMAP])
def test_merge_is_refused_when_the_mapping_is_special(flag: VmFlag) -> None:
    """VM_SPECIAL mappings never merge, not even with themselves (vma_merge_new_range())."""
    special = Mapping(RW | flag, FILE)
    assert not mergeable(special, special)
    vmas = VmaMap()
    vmas.assign(pages(0, 2), special)
    vmas.assign(pages(2, 4), special)
    assert cuts(vmas) == [(0, 2), (2, 4)]


def test_merged_mapping_has_the_flags_asked_for_and_the_family_of_either_side() -> None:
    """The VMA that two become has the VM_SOFTDIRTY that the caller says, and the one anon_vma there is."""
    touched = Mapping(RW, None, 0, 7, cloned=True)
    soft = Mapping(RW | VmFlag.SOFTDIRTY)
    assert merged(soft, touched, soft.flags) == Mapping(RW | VmFlag.SOFTDIRTY, None, 0, 7, cloned=True)
    assert merged(touched, soft, soft.flags) == Mapping(RW | VmFlag.SOFTDIRTY, None, 0, 7, cloned=True)
    assert merged(touched, soft, touched.flags) is touched
    assert merged(touched, ANON, ANON.flags) is touched


def test_assign_joins_both_sides_when_they_fit() -> None:
    """A mapping that fills the hole between two equal ones makes one VMA of three."""
    vmas = VmaMap()
    vmas.assign(pages(0, 2), ANON)
    vmas.assign(pages(4, 6), ANON)
    vmas.assign(pages(2, 4), ANON)
    assert cuts(vmas) == [(0, 6)]


def test_assign_joins_the_lower_side_only_when_the_sides_do_not_go_together() -> None:
    """Two neighbours with families of their own do not merge across a new mapping: can_vma_merge_right()."""
    vmas = VmaMap()
    vmas.assign(pages(0, 2), Mapping(RW, None, 0, 7))
    vmas.assign(pages(4, 6), Mapping(RW, None, 0, 8))
    vmas.assign(pages(2, 4), ANON)
    assert cuts(vmas) == [(0, 4), (4, 6)]


def test_assign_joins_the_upper_side_when_the_lower_one_differs() -> None:
    """The right merge alone: the upper VMA grows downwards and keeps its family."""
    vmas = VmaMap()
    vmas.assign(pages(0, 2), Mapping(VmFlag.READ | MAY_FLAGS))
    vmas.assign(pages(4, 6), Mapping(RW, None, 0, 8))
    vmas.assign(pages(2, 4), ANON)
    assert cuts(vmas) == [(0, 2), (2, 6)]
    assert vmas.find(3 * PAGE_SIZE) == Vma(2 * PAGE_SIZE, 6 * PAGE_SIZE, Mapping(RW, None, 0, 8))


def test_assign_joins_touched_below_and_untouched_above() -> None:
    """The new mapping takes the lower side's family along and still reaches the upper, untouched side."""
    vmas = VmaMap()
    vmas.assign(pages(0, 2), Mapping(RW, None, 0, 7))
    vmas.assign(pages(4, 6), ANON)
    vmas.assign(pages(2, 4), ANON)
    assert cuts(vmas) == [(0, 6)]
    assert next(iter(vmas)).anon_vma == 7


def test_assign_does_not_join_vmas_outside_of_its_edges() -> None:
    """Neighbours that could merge stay apart until an operation touches the place where they meet."""
    vmas = VmaMap()
    vmas.assign(pages(0, 2), ANON)
    vmas.assign(pages(2, 4), ANON, merge=False)
    vmas.assign(pages(6, 8), ANON)
    assert cuts(vmas) == [(0, 2), (2, 4), (6, 8)]
    vmas.assign(pages(4, 6), ANON)
    assert cuts(vmas) == [(0, 2), (2, 8)]


def test_assign_cuts_exactly_when_merging_is_off() -> None:
    """With merge=False the span begins and ends a VMA, whatever stands beside it."""
    vmas = VmaMap()
    vmas.assign(pages(0, 6), ANON)
    vmas.assign(pages(2, 4), ANON, merge=False)
    assert cuts(vmas) == [(0, 2), (2, 4), (4, 6)]


def test_protect_and_unprotect_restores_one_vma() -> None:
    """mprotect of the middle splits in three, and undoing it merges all again."""
    vmas = VmaMap()
    vmas.assign(pages(0, 6), ANON)
    vmas.assign(pages(2, 4), ANON.with_prot(Prot.READ))
    assert cuts(vmas) == [(0, 2), (2, 4), (4, 6)]
    assert [vma.perms for vma in vmas] == ["rw-p", "r--p", "rw-p"]
    vmas.assign(pages(2, 4), ANON)
    assert cuts(vmas) == [(0, 6)]


def test_replace_joins_its_pieces_and_the_neighbours() -> None:
    """mremap pastes pieces, which merge with each other and at both ends."""
    vmas = VmaMap()
    vmas.assign(pages(0, 2), ANON)
    vmas.assign(pages(8, 10), ANON)
    read = ANON.with_prot(Prot.READ)
    vmas.replace(pages(2, 8), [(8192, 16384, ANON), (16384, 20480, read), (20480, 32768, read)])
    assert cuts(vmas) == [(0, 4), (4, 8), (8, 10)]


def test_erase_leaves_the_outer_parts() -> None:
    """munmap of the middle cuts a VMA in two that continue the file where they did."""
    vmas = VmaMap()
    vmas.assign(pages(10, 20), Mapping(RW, FILE, delta=-10))
    vmas.erase(pages(13, 15))
    assert cuts(vmas) == [(10, 13), (15, 20)]
    assert [vma.offset_bytes // PAGE_SIZE for vma in vmas] == [0, 5]
    vmas.erase(pages(30, 40))
    vmas.erase(pages(0, 40))
    assert cuts(vmas) == []


def test_family_is_set_without_merging() -> None:
    """anon_vma_prepare() changes one VMA only, even when its neighbour has the same family from now on."""
    vmas = VmaMap()
    vmas.assign(pages(0, 2), Mapping(RW, None, 0, 7))
    vmas.assign(pages(2, 4), ANON, merge=False)
    upper = vmas.find(2 * PAGE_SIZE)
    assert upper
    assert vmas.set_anon_vma(upper, 7).anon_vma == 7
    assert cuts(vmas) == [(0, 2), (2, 4)]
    assert [vma.anon_vma for vma in vmas] == [7, 7]


def test_family_of_a_neighbour_is_shared_when_only_access_differs() -> None:
    """find_mergeable_anon_vma() reuses a neighbour's anon_vma, the upper one first, if mprotect could merge them."""
    vmas = VmaMap()
    read = ANON.with_prot(Prot.READ)
    vmas.assign(pages(0, 2), Mapping(read.flags, None, 0, 7))
    vmas.assign(pages(2, 4), ANON)
    middle = vmas.find(2 * PAGE_SIZE)
    assert middle
    assert vmas.find_mergeable_anon_vma(middle) == 7
    vmas.assign(pages(4, 6), Mapping(read.flags, None, 0, 8))
    assert vmas.find_mergeable_anon_vma(middle) == 8


def test_family_of_a_neighbour_is_not_shared_when_it_came_through_fork() -> None:
    """A neighbour whose chain holds its parent's anon_vma too is not reused: reusable_anon_vma()."""
    vmas = VmaMap()
    read = ANON.with_prot(Prot.READ)
    vmas.assign(pages(0, 2), Mapping(read.flags, None, 0, 7, cloned=True))
    vmas.assign(pages(2, 4), ANON)
    vmas.assign(pages(4, 6), Mapping(read.flags, None, 0, 8, cloned=True))
    middle = vmas.find(2 * PAGE_SIZE)
    assert middle
    assert vmas.find_mergeable_anon_vma(middle) == 0


def test_family_of_a_neighbour_is_not_shared_when_they_could_never_merge() -> None:
    """Flags beside the access, the object, the offset and the place must agree: anon_vma_compatible()."""
    below = Vma(0, PAGE_SIZE, ANON)

    def above(mapping: Mapping, start: int = PAGE_SIZE) -> bool:
        return anon_vma_compatible(below, Vma(start, start + PAGE_SIZE, mapping))

    assert above(ANON.with_prot(Prot.EXEC))
    assert not above(ANON.with_flags(RW | VmFlag.LOCKED))
    assert not above(Mapping(RW, FILE))
    assert not above(ANON.moved(-PAGE_SIZE))
    assert not above(ANON, 2 * PAGE_SIZE)
    alone = VmaMap()
    alone.assign(AddressRange(0, PAGE_SIZE), ANON)
    assert alone.find_mergeable_anon_vma(below) == 0


def test_canonical_layout_forgets_cuts_that_say_nothing() -> None:
    """Neighbours with equal permissions and continued object are one line; files must continue their offsets."""
    vmas = [
        Vma(0, 4096, Mapping(RW, None, 0, 7)),
        Vma(4096, 8192, Mapping(RW | VmFlag.ACCOUNT, None, 3, 8)),
        Vma(8192, 12288, ANON.with_prot(Prot.READ)),
        Vma(16384, 20480, ANON.with_prot(Prot.READ)),
        Vma(20480, 24576, Mapping(RW, FILE, -5)),
        Vma(24576, 28672, Mapping(RW, FILE, -5, 9)),
        Vma(28672, 32768, Mapping(RW, FILE, -6)),
        Vma(32768, 36864, Mapping(RW, OTHER, -6)),
    ]
    assert [(vma.start >> 12, vma.end >> 12) for vma in canonical(vmas)] == [
        (0, 2),
        (2, 3),
        (4, 5),
        (5, 7),
        (7, 8),
        (8, 9),
    ]
