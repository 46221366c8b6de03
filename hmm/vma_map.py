"""The VMAs of one address space, in order: look up, cut, merge, and find room.

Neighbours become one VMA at the edges of the operation that touched them, and only there, as in the kernel;
the rules are those of Linux 6.12.  One operation, `VmaMap.replace`, does it all: mmap assigns a mapping,
munmap erases, mprotect assigns a changed mapping to every piece, mremap erases here and replaces there.
A VMA whose extent it makes or changes is inserted into the reverse map anew (rmap.py), all others stay where they are.

**Source**: Linux mm/vma.c, mm/mmap.c (6.12).

**Invariants**: VMAs are page-aligned, ascending, disjoint and in the address space; what `IntervalMap` promises.

**Absent**: limits and accounting; where a mapping without an address is placed (unmapped_area.py).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from operator import itemgetter

from hmm.interval import IntervalMap
from hmm.units import TASK_SIZE, Address, AddressRange, is_page_aligned
from hmm.vma import (
    STACK_GUARD_GAP,
    Mapping,
    Vma,
    VmFlag,
    anon_vma_compatible,
    mergeable,
    merged,
    merges_upwards,
    new_vma,
)

_START = itemgetter(0)


def _guarded_start(vma: Vma | None, stack_guard: int) -> int:
    """vm_start_gap(): up to where something else may be mapped below `vma`."""
    if vma is None:
        return TASK_SIZE
    return vma.start - stack_guard if vma.has(VmFlag.GROWSDOWN) else vma.start


def _in_place(vmas: list[Vma], first: int, stop: int, piece: tuple[Address, Address, Mapping]) -> Vma | None:
    """The one of VMAs `first` to `stop` that has the extent of a piece, with the piece's mapping."""
    at = bisect_left(vmas, piece[0], first, stop, key=_START)
    if at < stop and vmas[at][:2] == piece[:2]:
        return new_vma((*piece, *vmas[at][3:]))
    return None


class VmaMap(IntervalMap[Vma]):
    """The VMAs of one address space, ascending; the kernel's mm_mt.

    `find(address)` gives the VMA that holds an address, `find_next(address)` is find_vma(),
    `find_prev(address)` gives the last VMA that starts below an address, `len()` is map_count and iteration
    goes upwards.

    Args:
        serials: the machine's numbers of insertions into the reverse map, ascending.

    Attributes:
        moved: whether anonymous memory may lie elsewhere than at its linear index, since some was moved once.

    Cost: `find` and changes O(log n).
    """

    __slots__ = ("_serials", "moved")

    def __init__(self, serials: Iterator[int] | None = None, limit: Address = TASK_SIZE) -> None:
        super().__init__(limit)
        self._serials = count(1) if serials is None else serials
        self.moved = False

    def overlapping(self, span: AddressRange) -> list[Vma]:
        """The VMAs that share a byte with `span`, whole."""
        return self.between(span.start, span.end)

    def mapped_pieces(self, span: AddressRange) -> list[Vma]:
        """What is mapped in `span`, the outer VMAs clipped to it."""
        vmas = self.between(span.start, span.end)
        if vmas:
            vmas[0] = vmas[0].clip(span.start, span.end)
        if len(vmas) > 1:
            vmas[-1] = vmas[-1].clip(span.start, span.end)
        return vmas

    def pieces(self, span: AddressRange) -> list[tuple[Address, Address, Mapping | None]]:
        """All of `span` as (start, end, mapping), ascending, without a gap; the mapping of a hole is None."""
        pieces: list[tuple[Address, Address, Mapping | None]] = []
        at = span.start
        for start, end, mapping, _, _ in self.mapped_pieces(span):
            if at < start:
                pieces.append((at, start, None))
            pieces.append((start, end, mapping))
            at = end
        if at < span.end:
            pieces.append((at, span.end, None))
        return pieces

    def first_hole(self, span: AddressRange) -> AddressRange | None:
        """From the first unmapped byte of `span` up to the next VMA, even behind `span`; None: no hole."""
        at = span.start
        for vma in self.between(span.start, span.end):
            if at < vma.start:
                return AddressRange(at, vma.start)
            at = vma.end
        if at >= span.end:
            return None
        above = self.find_next(at)
        return AddressRange(at, above.start if above else max(span.end, self._limit))

    def assign(
        self,
        span: AddressRange,
        mapping: Mapping,
        *,
        merge: bool = True,
        apart_from: Vma | None = None,
        moved: bool = False,
    ) -> None:
        """Map `span` anew, whatever was there; see `replace`."""
        self.replace(span, ((span.start, span.end, mapping),), merge=merge, apart_from=apart_from, moved=moved)

    def erase(self, span: AddressRange) -> None:
        """Unmap `span`; VMAs that reach out of it keep their outer parts."""
        self.replace(span, ())

    def replace(
        self,
        span: AddressRange,
        vmas: Sequence[tuple[Address, Address, Mapping]],
        *,
        merge: bool = True,
        apart_from: Vma | None = None,
        moved: bool = False,
    ) -> None:
        """Make `vmas`, ascending and inside `span`, all that is mapped there.

        The new VMAs merge with each other and with the neighbours of `span` where the kernel would merge a
        new VMA (mmap, brk, mremap) or one whose flags changed (mprotect, madvise, mlock).  Those leave a VMA
        alone that has the wanted flags already: so must their caller.

        A VMA that keeps its extent keeps its place in the reverse map; all others of the result are the last there, as
        after vma_prepare() and vma_complete().

        Args:
            span: page-aligned, not empty.
            merge: False to keep the given cuts, so that `span` begins and ends a VMA.
            apart_from: the one neighbour that is not merged with.
            moved: what merges has the VM_SOFTDIRTY of the neighbour that takes it in, as copy_vma() and
                vma_merge_extend() set no flags; else its own, as mmap_region() and mprotect_fixup() set them.

        Cost: O(log n) plus the VMAs replaced.
        Source: Linux mm/vma.c, vma_merge_new_range(), vma_merge_existing_range().
        """
        start, end = span.start, span.end
        assert not vmas or (start <= vmas[0][0] and vmas[-1][1] <= end), (span, vmas)
        number, first, stop, below, above = self._touching(start, end)
        serial = next(self._serials)
        result: list[Vma] = []
        joins_below = merge and not (apart_from and apart_from.end == start)
        joins_above = merge and not (apart_from and apart_from.start == end)
        # The VMA that may still grow upwards; it becomes an object when it cannot, or stays the one that it was.
        low = high = 0
        inner = first
        grown = added = same = None
        if below:
            inner += 1
            low, high, grown = below[0], start, below[2]
            same = below if below[1] == start else None
        for piece_start, piece_end, added in vmas:
            if grown and joins_below and high == piece_start and mergeable(grown, added):
                grown, same = merged(grown, added, (grown if moved else added).flags), None
            else:
                if grown:
                    result.append(same or new_vma((low, high, grown, serial, serial)))
                low, grown, same = piece_start, added, None
                if inner < stop:
                    same = _in_place(self._chunks[number].items, inner, stop, (piece_start, piece_end, added))
            if added.delta and added.backing is None:
                self.moved = True
            high = piece_end
            joins_below = merge
        if above:
            if grown and added and joins_above and high == end and merges_upwards(grown, added, above[2]):
                grown, same = merged(grown, above[2], (above[2] if moved and low == start else grown).flags), None
            else:
                if grown:
                    result.append(same or new_vma((low, high, grown, serial, serial)))
                low, grown, same = end, above[2], above if above[0] == end else None
            high = above[1]
        if grown:
            result.append(same or new_vma((low, high, grown, serial, serial)))
        self._splice(number, first, stop, result)

    def rejoin(self, whole: Vma) -> None:
        """Put back a VMA that was cut in pieces, with its place in the reverse map."""
        number, first, stop, below, above = self._touching(whole.start, whole.end)
        self._splice(number, first, stop, [vma for vma in (below, whole, above) if vma])

    def inherit(self, vmas: Iterable[Vma], mapping_of: Callable[[Vma], Mapping]) -> None:
        """Make a parent's VMAs, ascending, all that is mapped here, with mappings of their own: dup_mmap().

        In the trees of their files they come directly behind their parents, in those of private pages last.

        Source: Linux kernel/fork.c, dup_mmap(), vma_interval_tree_insert_after(); mm/rmap.c, anon_vma_fork().
        """
        assert not len(self), "the child maps something"
        inherited = [new_vma((vma[0], vma[1], mapping_of(vma), vma[3], next(self._serials))) for vma in vmas]
        self.moved = any(vma.mapping.delta and vma.mapping.backing is None for vma in inherited)
        self._splice(0, 0, 0, inherited)

    def set_mapping(self, vma: Vma, mapping: Mapping) -> Vma:
        """Change the mapping of one whole VMA in place; its neighbours stay apart.

        Returns: the VMA as it is now.
        """
        changed = Vma(vma.start, vma.end, mapping, vma.inserted, vma.chained)
        self._exchange(vma, changed)
        return changed

    def set_anon_vma(self, vma: Vma, anon_vma: int, *, cloned: bool = False) -> Vma:
        """Give one VMA its family of private pages, without merging: anon_vma_prepare().

        Returns: the VMA as it is now.
        """
        mapping = vma.mapping.with_anon_vma(anon_vma, cloned=cloned)
        changed = Vma(vma.start, vma.end, mapping, vma.inserted, next(self._serials))
        self._exchange(vma, changed)
        return changed

    def find_mergeable_anon_vma(self, vma: Vma) -> int:
        """The `anon_vma` that `vma` should share with a neighbour, to merge later; 0 when there is none.

        Source: Linux mm/vma.c, find_mergeable_anon_vma(), which asks the next VMA first.
        """
        above = self.find(vma.end)
        if above and anon_vma_compatible(vma, above) and above.anon_vma and not above.mapping.cloned:
            return above.anon_vma
        below = self.find_prev(vma.start)
        if below and anon_vma_compatible(below, vma) and not below.mapping.cloned:
            return below.anon_vma
        return 0

    def unmapped_area_topdown(
        self,
        length: int,
        low: Address,
        high: Address,
        *,
        align: int = 0,
        align_offset: int = 0,
        stack_guard: int = STACK_GUARD_GAP,
    ) -> Address | None:
        """The highest address in [low, high) where `length` bytes fit.

        Args:
            length: bytes, page-aligned, positive.
            align: a power of two, or 0: the address is `align_offset` modulo `align`.
            stack_guard: bytes kept free below VMAs that grow downwards.

        Returns: the start; None when nothing fits (ENOMEM).

        Source: Linux mm/vma.c, unmapped_area_topdown().
        """
        mask = align - 1 if align else 0
        while True:
            hole = self.highest_hole(length + mask, low, high)
            if hole is None:
                return None
            start = hole.end - length
            start -= (start - align_offset) & mask
            above_start = _guarded_start(hole.above, stack_guard)
            if start + length <= above_start:
                return start
            high = max(above_start, low)

    def unmapped_area(
        self,
        length: int,
        low: Address,
        high: Address,
        *,
        align: int = 0,
        align_offset: int = 0,
        stack_guard: int = STACK_GUARD_GAP,
    ) -> Address | None:
        """The lowest address in [low, high) where `length` bytes fit; as `unmapped_area_topdown`.

        Source: Linux mm/vma.c, unmapped_area().
        """
        mask = align - 1 if align else 0
        while True:
            hole = self.lowest_hole(length + mask, low, high)
            if hole is None:
                return None
            start = hole.start + ((align_offset - hole.start) & mask)
            # The kernel asks for room for the worst alignment here, wherever the start came to lie.
            if hole.above is None or start + length + mask - 1 <= _guarded_start(hole.above, stack_guard):
                return start
            low = hole.above.end

    def is_free(self, span: AddressRange, *, stack_guard: int = STACK_GUARD_GAP) -> bool:
        """True when nothing is mapped in `span` and no stack above it needs it as its guard.

        Source: Linux mm/mmap.c, generic_get_unmapped_area_topdown(): the check of the caller's hint.
        """
        return span.end <= _guarded_start(self.find_next(span.start), stack_guard)

    def check(self) -> None:
        """Assert all invariants.

        Cost: O(n).
        """
        super().check()
        for vma in self:
            assert is_page_aligned(vma.start), vma
            assert is_page_aligned(vma.end), vma
            assert vma.mapping.anon_vma or not vma.mapping.cloned, vma
            assert vma.page_offset(vma.start) >= 0, vma
            assert self.moved or not vma.mapping.delta or vma.mapping.backing is not None, vma
