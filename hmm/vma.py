"""Virtual memory areas: what is mapped where in one address space.

A VMA is a stretch of addresses with one `Mapping`: flags, what stands behind it, and at which page offset.
The offset is kept relative to the address (`delta`), so that it is constant inside a mapping: a split needs
no arithmetic, and two neighbours continue each other exactly when their deltas are equal.

Neighbours become one VMA at the edges of the operation that touched them, and only there, as in the kernel;
the rules are those of Linux 6.12.  One operation, `VmaMap.replace`, does it all: mmap assigns a mapping,
munmap erases, mprotect assigns a changed mapping to every piece, mremap erases here and replaces there.

Source: Linux include/linux/mm.h, mm/vma.c, mm/mmap.c (6.12).
Invariants: VMAs are page-aligned, ascending, disjoint and in the address space; what `IntervalMap` promises.
Absent: pages, page tables, limits and accounting; the memory policy, userfaultfd and names of anonymous VMAs,
    which the kernel compares too before it merges; vm_ops->close(), which forbids it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntFlag
from functools import partial
from typing import NamedTuple, Protocol

from hmm.interval import IntervalMap
from hmm.units import PAGE_SHIFT, TASK_SIZE, Address, AddressRange, is_page_aligned

STACK_GUARD_GAP = 256 << PAGE_SHIFT
"""Bytes kept free below a VMA that grows downwards (the kernel's parameter stack_guard_gap)."""


class Prot(IntFlag):
    """The PROT_ values of mmap() and mprotect()."""

    NONE = 0
    READ = 1
    WRITE = 2
    EXEC = 4


class VmFlag(IntFlag):
    """The VM_ flags of a VMA, with the kernel's bits (include/linux/mm.h)."""

    NONE = 0
    READ = 0x1
    WRITE = 0x2
    EXEC = 0x4
    SHARED = 0x8
    MAYREAD = 0x10
    MAYWRITE = 0x20
    MAYEXEC = 0x40
    MAYSHARE = 0x80
    GROWSDOWN = 0x100
    PFNMAP = 0x400
    LOCKED = 0x2000
    IO = 0x4000
    SEQ_READ = 0x8000
    RAND_READ = 0x1_0000
    DONTCOPY = 0x2_0000
    DONTEXPAND = 0x4_0000
    LOCKONFAULT = 0x8_0000
    ACCOUNT = 0x10_0000
    NORESERVE = 0x20_0000
    HUGETLB = 0x40_0000
    SYNC = 0x80_0000
    WIPEONFORK = 0x200_0000
    DONTDUMP = 0x400_0000
    SOFTDIRTY = 0x800_0000
    MIXEDMAP = 0x1000_0000
    HUGEPAGE = 0x2000_0000
    NOHUGEPAGE = 0x4000_0000
    MERGEABLE = 0x8000_0000
    STACK = GROWSDOWN


ACCESS_FLAGS = VmFlag.READ | VmFlag.WRITE | VmFlag.EXEC
"""VM_ACCESS_FLAGS."""
MAY_FLAGS = VmFlag.MAYREAD | VmFlag.MAYWRITE | VmFlag.MAYEXEC
"""What mprotect may grant."""
SPECIAL_FLAGS = VmFlag.IO | VmFlag.DONTEXPAND | VmFlag.PFNMAP | VmFlag.MIXEDMAP
"""VM_SPECIAL: mappings that never merge and that mlock and mremap treat apart."""
LOCKED_FLAGS = VmFlag.LOCKED | VmFlag.LOCKONFAULT
"""VM_LOCKED_MASK."""

# Plain integers: the operators of an IntFlag cost a microsecond each, and these stand in every fault's way.
_READ, _WRITE, _EXEC, _SHARED, _ACCESS, _MAYSHARE = 0x1, 0x2, 0x4, 0x8, 0x7, 0x80
_SPECIAL = int(SPECIAL_FLAGS)
_NOT_SOFTDIRTY = ~int(VmFlag.SOFTDIRTY)
_NOT_COMPARED_FOR_ANON = ~int(ACCESS_FLAGS | VmFlag.SOFTDIRTY)
_PERMS = tuple(
    ("r" if bits & 1 else "-") + ("w" if bits & 2 else "-") + ("x" if bits & 4 else "-") + ("s" if bits & 8 else "p")
    for bits in range(16)
)


class Backing(Protocol):
    """What stands behind a mapping other than private anonymous memory: a file, shared memory, a device file.

    Two mappings have the same backing when it is the same object.
    """

    @property
    def id(self) -> int:
        """Number of the object, positive, unique in the machine."""

    @property
    def name(self) -> str:
        """The name that /proc/PID/maps shows."""


@dataclass(frozen=True, slots=True)
class Mapping:
    """What a VMA says of each of its pages.

    Attributes:
        flags: VM_ flags.
        backing: the object mapped; None for private anonymous memory.
        delta: page offset in the object minus page number of the address, constant in the mapping.  The
            page offset of private anonymous memory is its linear index, the page number where it was first
            mapped: the delta is 0 until mremap moves a VMA that has an `anon_vma`.
        anon_vma: id of the family of private pages; 0 while no private page was ever faulted in.
        cloned: the VMA came through fork with its `anon_vma`, so that it has its ancestors' too.
    """

    flags: VmFlag
    backing: Backing | None = None
    delta: int = 0
    anon_vma: int = 0
    cloned: bool = False

    def has(self, flags: VmFlag) -> bool:
        """True when one of `flags` is set."""
        return bool(self.flags._value_ & flags._value_)

    def with_flags(self, flags: VmFlag) -> Mapping:
        """The same mapping with other flags."""
        return Mapping(flags, self.backing, self.delta, self.anon_vma, self.cloned)

    def with_prot(self, prot: Prot) -> Mapping:
        """The same mapping with the access that mprotect(prot) gives it."""
        return self.with_flags(VmFlag((self.flags._value_ & ~_ACCESS) | (prot._value_ & _ACCESS)))

    def with_anon_vma(self, anon_vma: int, *, cloned: bool = False) -> Mapping:
        """The same mapping with another family of private pages."""
        return Mapping(self.flags, self.backing, self.delta, anon_vma, cloned)

    def moved(self, offset_bytes: int) -> Mapping:
        """The mapping that shows the same pages of its object `offset_bytes` higher in the address space."""
        return replace(self, delta=self.delta - (offset_bytes >> PAGE_SHIFT))

    @property
    def prot(self) -> Prot:
        """What the CPU may do."""
        return Prot(self.flags._value_ & _ACCESS)

    @property
    def perms(self) -> str:
        """The four letters of /proc/PID/maps, such as "rw-p"."""
        return _PERMS[(self.flags._value_ & _ACCESS) | (8 if self.flags._value_ & _MAYSHARE else 0)]

    @property
    def readable(self) -> bool:
        """VM_READ."""
        return bool(self.flags._value_ & _READ)

    @property
    def writable(self) -> bool:
        """VM_WRITE."""
        return bool(self.flags._value_ & _WRITE)

    @property
    def executable(self) -> bool:
        """VM_EXEC."""
        return bool(self.flags._value_ & _EXEC)

    @property
    def shared(self) -> bool:
        """VM_SHARED: writes go to the object."""
        return bool(self.flags._value_ & _SHARED)

    @property
    def anonymous(self) -> bool:
        """vma_is_anonymous(): private memory with no object behind it."""
        return self.backing is None

    @property
    def special(self) -> bool:
        """VM_SPECIAL: never merges."""
        return bool(self.flags._value_ & _SPECIAL)


class Vma(NamedTuple):
    """The mapping of the bytes [start, end); `struct vm_area_struct`.

    A value: it says what was mapped when it was looked up and does not follow later changes.
    """

    start: Address
    end: Address
    mapping: Mapping

    def __str__(self) -> str:
        return f"[{self.start:#x}, {self.end:#x}) {self.mapping.perms} {self.name or 'anon'}"

    @property
    def span(self) -> AddressRange:
        """The bytes of the VMA."""
        return AddressRange(self.start, self.end)

    @property
    def npages(self) -> int:
        """vma_pages()."""
        return (self.end - self.start) >> PAGE_SHIFT

    @property
    def flags(self) -> VmFlag:
        """vm_flags."""
        return self.mapping.flags

    @property
    def backing(self) -> Backing | None:
        """vm_file; None for private anonymous memory."""
        return self.mapping.backing

    @property
    def anon_vma(self) -> int:
        """Id of the family of private pages, 0 when there is none yet."""
        return self.mapping.anon_vma

    @property
    def prot(self) -> Prot:
        """What the CPU may do."""
        return self.mapping.prot

    @property
    def perms(self) -> str:
        """The four letters of /proc/PID/maps."""
        return self.mapping.perms

    @property
    def readable(self) -> bool:
        """VM_READ."""
        return self.mapping.readable

    @property
    def writable(self) -> bool:
        """VM_WRITE."""
        return self.mapping.writable

    @property
    def executable(self) -> bool:
        """VM_EXEC."""
        return self.mapping.executable

    @property
    def shared(self) -> bool:
        """VM_SHARED."""
        return self.mapping.shared

    @property
    def name(self) -> str:
        """What /proc/PID/maps shows behind the numbers; "" for private anonymous memory."""
        return self.mapping.backing.name if self.mapping.backing else ""

    @property
    def offset_bytes(self) -> int:
        """The offset that /proc/PID/maps shows: in the object, 0 for private anonymous memory."""
        return self.page_offset(self.start) << PAGE_SHIFT if self.mapping.backing else 0

    def has(self, flags: VmFlag) -> bool:
        """True when one of `flags` is set."""
        return self.mapping.has(flags)

    def page_offset(self, address: Address) -> int:
        """The page offset of `address` in the object; its linear index in private anonymous memory.

        Source: Linux include/linux/pagemap.h, linear_page_index().
        """
        return (address >> PAGE_SHIFT) + self.mapping.delta

    def clip(self, start: Address, end: Address) -> Vma:
        """The part in [start, end), which must share a byte with the VMA."""
        return Vma(max(start, self.start), min(end, self.end), self.mapping)


# Vma(...) passes through a generated function and takes thrice as long.
_new_vma = partial(tuple.__new__, Vma)


def mergeable(existing: Mapping, added: Mapping) -> bool:
    """True when a VMA may grow over an adjacent stretch that gets the mapping `added`.

    The relation has a direction: a VMA without private pages may not grow over a stretch that has some, and
    one that came through fork grows over nothing that lacks its `anon_vma`.

    Source: Linux mm/vma.c, is_mergeable_vma(), is_mergeable_anon_vma(), can_vma_merge_after() (6.12).
    """
    flags = added.flags._value_
    if existing is added or flags & _SPECIAL:
        return not flags & _SPECIAL
    return (
        not (existing.flags._value_ ^ flags) & _NOT_SOFTDIRTY
        and existing.backing is added.backing
        and existing.delta == added.delta
        and (
            existing.anon_vma == added.anon_vma
            or (existing.anon_vma != 0 and not added.anon_vma and not existing.cloned)
        )
    )


def merged(a: Mapping, b: Mapping) -> Mapping:
    """The mapping of the VMA that two mergeable neighbours become."""
    if a is b:
        return a
    if b.anon_vma and not a.anon_vma:
        a = a.with_anon_vma(b.anon_vma, cloned=b.cloned)
    flags = a.flags._value_ | b.flags._value_
    return a if flags == a.flags._value_ else a.with_flags(VmFlag(flags))


def _merges_upwards(grown: Mapping, added: Mapping, above: Mapping) -> bool:
    """True when `added`, which may have merged into the VMA below it, `grown`, merges with the one above as well.

    That each side goes with what is added does not mean that the sides go together.

    Source: Linux mm/vma.c, can_vma_merge_right().
    """
    if not mergeable(above, added):
        return False
    a, b = grown.anon_vma, above.anon_vma
    return a == b or not a or not b


def anon_vma_compatible(below: Vma, above: Vma) -> bool:
    """True when two neighbours may use one `anon_vma`, because mprotect could make them one VMA.

    Source: Linux mm/vma.c, anon_vma_compatible().
    """
    a, b = below.mapping, above.mapping
    return (
        below.end == above.start
        and a.backing is b.backing
        and a.delta == b.delta
        and not (a.flags._value_ ^ b.flags._value_) & _NOT_COMPARED_FOR_ANON
    )


def canonical(vmas: Iterable[Vma]) -> list[Vma]:
    """The same mappings in as few VMAs as /proc/PID/maps could show them in.

    Where the kernel has cut depends on the history of private pages; what it has mapped does not.  So
    layouts are compared after neighbours with equal permissions and the same object, at continued offsets,
    became one.
    """
    result: list[Vma] = []
    for vma in vmas:
        if result:
            below, a, b = result[-1], result[-1].mapping, vma.mapping
            continued = a.backing is b.backing and (a.backing is None or a.delta == b.delta)
            if below.end == vma.start and continued and a.perms == b.perms:
                result[-1] = Vma(below.start, vma.end, a)
                continue
        result.append(vma)
    return result


def _guarded_start(vma: Vma | None, stack_guard: int) -> int:
    """vm_start_gap(): up to where something else may be mapped below `vma`."""
    if vma is None:
        return TASK_SIZE
    return vma.start - stack_guard if vma.has(VmFlag.GROWSDOWN) else vma.start


class VmaMap(IntervalMap[Vma]):
    """The VMAs of one address space, ascending; the kernel's mm_mt.

    `find(address)` gives the VMA that holds an address, `find_next(address)` is find_vma(),
    `find_prev(address)` gives the last VMA that starts below an address, `len()` is map_count and iteration
    goes upwards.

    Cost: `find` and changes O(log n).
    """

    __slots__ = ()

    def __init__(self, limit: Address = TASK_SIZE) -> None:
        super().__init__(limit)

    def overlapping(self, span: AddressRange) -> list[Vma]:
        """The VMAs that share a byte with `span`, whole."""
        return self.between(span.start, span.end)

    def mapped_pieces(self, span: AddressRange) -> list[Vma]:
        """What is mapped in `span`, the outer VMAs clipped to it."""
        vmas = self.between(span.start, span.end)
        if vmas:
            vmas[0] = vmas[0].clip(span.start, span.end)
            vmas[-1] = vmas[-1].clip(span.start, span.end)
        return vmas

    def pieces(self, span: AddressRange) -> list[tuple[Address, Address, Mapping | None]]:
        """All of `span` as (start, end, mapping), ascending, without a gap; the mapping of a hole is None."""
        pieces: list[tuple[Address, Address, Mapping | None]] = []
        at = span.start
        for start, end, mapping in self.mapped_pieces(span):
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

    def covers(self, span: AddressRange) -> bool:
        """True when every byte of `span` is mapped."""
        return self.first_hole(span) is None

    def assign(self, span: AddressRange, mapping: Mapping, *, merge: bool = True) -> None:
        """Map `span` anew, whatever was there; see `replace`."""
        self.replace(span, ((span.start, span.end, mapping),), merge=merge)

    def erase(self, span: AddressRange) -> None:
        """Unmap `span`; VMAs that reach out of it keep their outer parts."""
        self.replace(span, ())

    def replace(
        self, span: AddressRange, vmas: Sequence[tuple[Address, Address, Mapping]], *, merge: bool = True
    ) -> None:
        """Make `vmas`, ascending and inside `span`, all that is mapped there.

        The new VMAs merge with each other and with the neighbours of `span` where the kernel would merge a
        new VMA (mmap, brk, mremap) or one whose flags changed (mprotect, madvise, mlock).  Those leave a VMA
        alone that has the wanted flags already: so must their caller.

        Args:
            span: page-aligned, not empty.
            merge: False to keep the given cuts, so that `span` begins and ends a VMA.

        Cost: O(log n) plus the VMAs replaced.
        Source: Linux mm/vma.c, vma_merge_new_range(), vma_merge_existing_range().
        """
        start, end = span.start, span.end
        assert not vmas or (start <= vmas[0][0] and vmas[-1][1] <= end), (span, vmas)
        slot = self._touching(start, end)
        touched = self._items(slot)
        result: list[Vma] = []
        # The VMA that may still grow upwards; it becomes an object when it cannot.
        low = high = 0
        grown = added = None
        if touched and touched[0].start < start:
            low, high, grown = touched[0].start, start, touched[0].mapping
        for piece_start, piece_end, added in vmas:
            if grown and merge and high == piece_start and mergeable(grown, added):
                grown = merged(grown, added)
            else:
                if grown:
                    result.append(_new_vma((low, high, grown)))
                low, grown = piece_start, added
            high = piece_end
        if touched and touched[-1].end > end:
            above = touched[-1].mapping
            if grown and added and merge and high == end and _merges_upwards(grown, added, above):
                grown = merged(grown, above)
            else:
                if grown:
                    result.append(_new_vma((low, high, grown)))
                low, grown = end, above
            high = touched[-1].end
        if grown:
            result.append(_new_vma((low, high, grown)))
        self._splice(slot, result)

    def set_mapping(self, vma: Vma, mapping: Mapping) -> Vma:
        """Change the mapping of one whole VMA in place; its neighbours stay apart.

        Returns: the VMA as it is now.
        """
        changed = Vma(vma.start, vma.end, mapping)
        self._exchange(vma, changed)
        return changed

    def set_anon_vma(self, vma: Vma, anon_vma: int, *, cloned: bool = False) -> Vma:
        """Give one VMA its family of private pages, without merging: anon_vma_prepare().

        Returns: the VMA as it is now.
        """
        return self.set_mapping(vma, vma.mapping.with_anon_vma(anon_vma, cloned=cloned))

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
