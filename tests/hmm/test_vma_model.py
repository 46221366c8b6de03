"""The map of VMAs against a plain list, under random operations, over many chunks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hmm import interval
from hmm.units import PAGE_SIZE, TASK_SIZE, AddressRange
from hmm.vma import MAY_FLAGS, SPECIAL_FLAGS, Mapping, Vma, VmFlag
from hmm.vma_map import VmaMap

NPAGES = 120


@dataclass(eq=False)
class Thing:
    """An object that can be mapped."""

    id: int
    name: str


FILE = Thing(1, "file")
MAPPINGS = [
    Mapping(VmFlag.READ | MAY_FLAGS),
    Mapping(VmFlag.READ | VmFlag.WRITE | MAY_FLAGS),
    Mapping(VmFlag.READ | VmFlag.WRITE | VmFlag.SOFTDIRTY | MAY_FLAGS),
    Mapping(VmFlag.READ | VmFlag.WRITE | MAY_FLAGS, None, 0, 1),
    Mapping(VmFlag.READ | VmFlag.WRITE | MAY_FLAGS, None, 0, 2),
    Mapping(VmFlag.READ | VmFlag.WRITE | MAY_FLAGS, None, 0, 2, cloned=True),
    Mapping(VmFlag.READ | MAY_FLAGS, FILE, 0),
    Mapping(VmFlag.READ | MAY_FLAGS, FILE, 1),
    Mapping(VmFlag.READ | VmFlag.PFNMAP | VmFlag.DONTEXPAND, FILE, 0),
]


class Model:
    """The rules of mm/vma.c over a list of (start, end, mapping), written down as directly as possible."""

    def __init__(self) -> None:
        self.vmas: list[tuple[int, int, Mapping]] = []

    def erase(self, start: int, end: int) -> None:
        """Cut everything that overlaps."""
        parts = []
        for s, e, mapping in self.vmas:
            parts += [(a, b, mapping) for a, b in ((s, min(e, start)), (max(s, end), e)) if a < b]
        self.vmas = parts

    def assign(self, start: int, end: int, mapping: Mapping) -> None:
        """munmap, then vma_merge_new_range() or a new VMA."""
        self.erase(start, end)
        below = next((vma for vma in self.vmas if vma[1] == start), None)
        above = next((vma for vma in self.vmas if vma[0] == end), None)
        left = below is not None and self.fits(below[2], mapping)
        right = above is not None and self.fits(above[2], mapping)
        if left and right and below and above:
            families = {below[2].anon_vma, above[2].anon_vma} - {0}
            right = len(families) <= 1
        joined = [vma for vma, join in ((below, left), ((start, end, mapping), True), (above, right)) if join and vma]
        self.vmas = [vma for vma in self.vmas if vma not in joined]
        first, *others = [vma[2] for vma in joined]
        for other in others:
            if other.anon_vma and not first.anon_vma:
                first = replace(first, anon_vma=other.anon_vma, cloned=other.cloned)
        self.vmas.append((joined[0][0], joined[-1][1], replace(first, flags=mapping.flags)))
        self.vmas.sort(key=lambda vma: vma[0])

    @staticmethod
    def fits(neighbour: Mapping, added: Mapping) -> bool:
        """is_mergeable_vma() && is_mergeable_anon_vma() && the offset continues."""
        if added.flags & SPECIAL_FLAGS:
            return False
        if (neighbour.flags ^ added.flags) & ~VmFlag.SOFTDIRTY:
            return False
        if neighbour.backing is not added.backing or neighbour.delta != added.delta:
            return False
        chain_is_singular = neighbour.anon_vma != 0 and not neighbour.cloned
        if (not neighbour.anon_vma or not added.anon_vma) and chain_is_singular:
            return True
        return neighbour.anon_vma == added.anon_vma


def view(vmas: list[Vma]) -> list[tuple[int, int, Mapping]]:
    """VMAs in pages."""
    return [(vma.start // PAGE_SIZE, vma.end // PAGE_SIZE, vma.mapping) for vma in vmas]


def span(start: int, end: int) -> AddressRange:
    """The addresses of pages."""
    return AddressRange(start * PAGE_SIZE, end * PAGE_SIZE)


SPANS = st.tuples(st.integers(0, NPAGES - 1), st.integers(1, 12)).map(
    lambda pair: (pair[0], min(pair[0] + pair[1], NPAGES))
)
STEPS = st.lists(st.tuples(SPANS, st.none() | st.sampled_from(MAPPINGS)), max_size=60)


@pytest.fixture(params=[2, 12, interval.CHUNK])
def chunk_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Small chunks, so that a few dozen VMAs fill many of them and every border is crossed."""
    monkeypatch.setattr(interval, "CHUNK", request.param)
    return int(request.param)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(steps=STEPS, low=st.integers(0, NPAGES), size=st.integers(1, 20), length=st.integers(0, NPAGES))
def test_map_equals_a_list_after_any_operations(
    chunk_size: int,
    steps: list[tuple[tuple[int, int], Mapping | None]],
    low: int,
    size: int,
    length: int,
) -> None:
    """Every assignment and erasure cuts and merges as the kernel does, and every look-up agrees."""
    vmas, model = VmaMap(), Model()
    for (start, end), mapping in steps:
        if mapping is None:
            vmas.erase(span(start, end))
            model.erase(start, end)
        else:
            vmas.assign(span(start, end), mapping)
            model.assign(start, end, mapping)
        vmas.check()
        assert view(list(vmas)) == model.vmas
    assert_views_agree(vmas, model, low, min(low + length, NPAGES))
    assert_holes_agree(vmas, model, size, (low, min(low + length, NPAGES)))


def assert_views_agree(vmas: VmaMap, model: Model, low: int, high: int) -> None:
    """find, find_next, find_prev at every page; the views of one range."""
    assert len(vmas) == len(model.vmas)
    for page in range(NPAGES + 1):
        address = page * PAGE_SIZE
        at = [vma for vma in model.vmas if vma[0] <= page < vma[1]]
        above = [vma for vma in model.vmas if vma[1] > page]
        below = [vma for vma in model.vmas if vma[0] < page]
        assert view([vma for vma in [vmas.find(address)] if vma]) == at
        assert view([vma for vma in [vmas.find_next(address)] if vma]) == above[:1]
        assert view([vma for vma in [vmas.find_prev(address)] if vma]) == below[-1:]
    overlapping = [vma for vma in model.vmas if vma[0] < high and vma[1] > low and low < high]
    clipped = [(max(s, low), min(e, high), mapping) for s, e, mapping in overlapping]
    assert view(vmas.overlapping(span(low, high))) == overlapping
    assert view(vmas.mapped_pieces(span(low, high))) == clipped
    pieces = vmas.pieces(span(low, high))
    assert [(s // PAGE_SIZE, e // PAGE_SIZE, m) for s, e, m in pieces if m is not None] == clipped
    assert all(a[1] == b[0] for a, b in pairwise(pieces))
    covered = {page for s, e, _ in model.vmas for page in range(s, e)}
    assert (vmas.first_hole(span(low, high)) is None) == covered.issuperset(range(low, high))


def assert_holes_agree(vmas: VmaMap, model: Model, size: int, window: tuple[int, int]) -> None:
    """The highest and the lowest hole, against a look at every page."""
    low, high = window
    covered = {page for s, e, _ in model.vmas for page in range(s, e)}
    starts = [at for at in range(low, high - size + 1) if covered.isdisjoint(range(at, at + size))]
    args = (size * PAGE_SIZE, low * PAGE_SIZE, high * PAGE_SIZE)
    top, bottom = vmas.highest_hole(*args), vmas.lowest_hole(*args)
    assert (top.end // PAGE_SIZE - size if top else None) == (starts[-1] if starts else None)
    assert (bottom.start // PAGE_SIZE if bottom else None) == (starts[0] if starts else None)
    for hole in (top, bottom):
        if hole:
            above = [vma for vma in model.vmas if vma[0] >= hole.end // PAGE_SIZE]
            assert view([hole.above] if hole.above else []) == above[:1]
    vmas.check()


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(steps=STEPS, where=SPANS, target=st.integers(0, NPAGES))
def test_replace_puts_pieces_back_when_they_were_taken_out(
    chunk_size: int, steps: list[tuple[tuple[int, int], Mapping | None]], where: tuple[int, int], target: int
) -> None:
    """Taking the mapped pieces of a range out and pasting them elsewhere moves what each page shows."""
    vmas = VmaMap()
    for (start, end), mapping in steps:
        if mapping is not None:
            vmas.assign(span(start, end), mapping, merge=False)
    start, end = where
    pieces = vmas.mapped_pieces(span(start, end))
    shift = (NPAGES + target - start) * PAGE_SIZE
    before = list(vmas)
    moved = [Vma(vma.start + shift, vma.end + shift, vma.mapping) for vma in pieces]
    vmas.replace(span(NPAGES + target, NPAGES + target + end - start), [vma[:3] for vma in moved], merge=False)
    vmas.check()
    assert list(vmas) == before + moved
    if pieces:
        whole = vmas.overlapping(span(start, end))
        extent = AddressRange(whole[0].start, whole[-1].end)
        vmas.erase(span(start, end))
        vmas.replace(extent, [vma[:3] for vma in whole], merge=False)
        assert list(vmas) == before + moved, "what was cut out comes back as it was"
        vmas.check()


def test_map_holds_the_kernels_limit_of_vmas() -> None:
    """65,530 VMAs (vm.max_map_count) built from both ends, cut, and erased again."""
    vmas = VmaMap()
    count = 65530
    mapping = MAPPINGS[1]
    for at in range(count // 2):
        vmas.assign(span(4 * at, 4 * at + 3), mapping)
        top = 4 * (count - at)
        vmas.assign(span(top - 4, top - 1), mapping)
    vmas.check()
    assert len(vmas) == count
    found = vmas.find(4 * 40000 * PAGE_SIZE)
    assert found == Vma(4 * 40000 * PAGE_SIZE, (4 * 40000 + 3) * PAGE_SIZE, mapping)
    assert vmas.unmapped_area_topdown(2 * PAGE_SIZE, 0, 4 * count * PAGE_SIZE) is None
    vmas.erase(span(4 * 1000 + 1, 4 * (count - 1000) + 1))
    vmas.check()
    assert len(vmas) == 2001
    vmas.assign(AddressRange(0, TASK_SIZE), mapping)
    vmas.check()
    assert len(vmas) == 1


@pytest.mark.parametrize(
    ("first", "last"), [(0, 600), (0, 250), (0, 590), (3, 590), (130, 597), (257, 380), (129, 255)]
)
def test_erase_leaves_a_sound_structure_when_whole_chunks_go(first: int, last: int) -> None:
    """What little is left of the chunks at both ends of a large hole joins the chunk beside it."""
    mapping = MAPPINGS[1]
    vmas = VmaMap()
    for at in range(600):
        vmas.assign(span(2 * at, 2 * at + 1), mapping)
    vmas.erase(span(2 * first, 2 * last))
    vmas.check()
    left = [at for at in range(600) if not first <= at < last]
    assert [vma.start // PAGE_SIZE for vma in vmas] == [2 * at for at in left]
    hole = vmas.highest_hole(2 * PAGE_SIZE, 0, 1200 * PAGE_SIZE)
    assert hole
    assert (hole.start, hole.end) == (max(2 * first - 1, 0) * PAGE_SIZE, 2 * last * PAGE_SIZE)
