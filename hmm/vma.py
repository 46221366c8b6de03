"""Virtual memory areas: what is mapped at some addresses, and when two neighbours are one.

A VMA is a stretch of addresses with one `Mapping`: flags, what stands behind it, and at which page offset.
The offset is kept relative to the address (`delta`), so that it is constant inside a mapping: a split needs
no arithmetic, and two neighbours continue each other exactly when their deltas are equal.

**Source**: Linux include/linux/mm.h, mm/vma.c (6.12).

**Absent**: where VMAs are kept (vma_map.py); pages and page tables; the memory policy and names of anonymous
VMAs, which the kernel compares too before it merges; vm_ops->close(), which forbids it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntFlag
from functools import lru_cache, partial
from typing import NamedTuple, Protocol

from hmm.units import PAGE_SHIFT, Address, AddressRange

STACK_GUARD_GAP = 256 << PAGE_SHIFT
"""Bytes kept free below a VMA that grows downwards (the kernel's parameter stack_guard_gap)."""


class Flags(IntFlag):
    """Bits that can be asked for at a quarter of what the operators of an IntFlag cost."""

    def has(self, flags: Flags) -> bool:
        """True when one of `flags` is set."""
        return bool(self._value_ & flags._value_)


class Prot(Flags):
    """The PROT_ values of mmap() and mprotect()."""

    NONE = 0
    READ = 1
    WRITE = 2
    EXEC = 4


class VmFlag(Flags):
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
    UFFD_MISSING = 0x200
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
    UFFD_MINOR = 0x40_0000_0000
    STACK = GROWSDOWN


protection, vm_flags = lru_cache(maxsize=64)(Prot), lru_cache(maxsize=1024)(VmFlag)
"""They make flags of bits; `VmFlag(bits)` takes seven times as long, also for bits that it has met before."""
ACCESS_FLAGS = VmFlag.READ | VmFlag.WRITE | VmFlag.EXEC
"""VM_ACCESS_FLAGS."""
MAY_FLAGS = VmFlag.MAYREAD | VmFlag.MAYWRITE | VmFlag.MAYEXEC
"""What mprotect may grant."""
SPECIAL_FLAGS = VmFlag.IO | VmFlag.DONTEXPAND | VmFlag.PFNMAP | VmFlag.MIXEDMAP
"""VM_SPECIAL: mappings that never merge and that mlock and mremap treat apart."""
UFFD_FLAGS = VmFlag.UFFD_MISSING | VmFlag.UFFD_MINOR
"""__VM_UFFD_FLAGS: what a userfaultfd's handler does for a mapping."""
LOCKED_FLAGS = VmFlag.LOCKED | VmFlag.LOCKONFAULT
"""VM_LOCKED_MASK."""

# Plain integers: the operators of an IntFlag cost a microsecond each, and these stand in every fault's way.
_READ, _WRITE, _EXEC, _SHARED, _ACCESS, _MAYSHARE = 0x1, 0x2, 0x4, 0x8, 0x7, 0x80
_SPECIAL = int(SPECIAL_FLAGS)
_NO_RECENCY = int(VmFlag.SEQ_READ | VmFlag.RAND_READ)
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


@dataclass(frozen=True, slots=True, init=False)
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
        userfaultfd: with one of UFFD_FLAGS the userfaultfd whose handler brings pages in, else 0.
    """

    flags: VmFlag
    backing: Backing | None = None
    delta: int = 0
    anon_vma: int = 0
    cloned: bool = False
    userfaultfd: int = 0

    def __init__(
        self,
        flags: VmFlag,
        backing: Backing | None = None,
        delta: int = 0,
        anon_vma: int = 0,
        cloned: bool = False,
        userfaultfd: int = 0,
    ) -> None:
        _set_flags(self, flags)
        _set_backing(self, backing)
        _set_delta(self, delta)
        _set_anon_vma(self, anon_vma)
        _set_cloned(self, cloned)
        _set_userfaultfd(self, userfaultfd)

    def has(self, flags: VmFlag) -> bool:
        """True when one of `flags` is set."""
        return bool(self.flags._value_ & flags._value_)

    def with_flags(self, flags: VmFlag) -> Mapping:
        """The same mapping with other flags."""
        return Mapping(flags, self.backing, self.delta, self.anon_vma, self.cloned, self.userfaultfd)

    def with_prot(self, prot: Prot) -> Mapping:
        """The same mapping with the access that mprotect(prot) gives it."""
        return self.with_flags(vm_flags((self.flags._value_ & ~_ACCESS) | (prot._value_ & _ACCESS)))

    def with_anon_vma(self, anon_vma: int, *, cloned: bool = False) -> Mapping:
        """The same mapping with another family of private pages."""
        return Mapping(self.flags, self.backing, self.delta, anon_vma, cloned, self.userfaultfd)

    def with_userfaultfd(self, number: int, modes: VmFlag = VmFlag.NONE) -> Mapping:
        """The same mapping, registered with a userfaultfd for some of UFFD_FLAGS; with none for 0.

        Source: Linux include/linux/userfaultfd_k.h, userfaultfd_set_ctx(), userfaultfd_reset_ctx().
        """
        return replace(self, flags=(self.flags & ~UFFD_FLAGS) | modes, userfaultfd=number)

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
    def has_recency(self) -> bool:
        """vma_has_recency(): that a page was used says that it will be."""
        return not self.flags._value_ & _NO_RECENCY

    @property
    def special(self) -> bool:
        """VM_SPECIAL: never merges."""
        return bool(self.flags._value_ & _SPECIAL)


# As for AddressRange: every VMA that is made or changed makes one.
_set_flags, _set_backing, _set_delta, _set_anon_vma, _set_cloned, _set_userfaultfd = (
    vars(Mapping)[name].__set__ for name in Mapping.__slots__
)


class Vma(NamedTuple):
    """The mapping of the bytes [start, end); `struct vm_area_struct`.

    A value: it says what was mapped when it was looked up and does not follow later changes.

    Attributes:
        inserted: when it was last put into the tree of its file's VMAs, as one of the machine's serial numbers; a child
            of fork has its parent's.
        chained: the same for the trees of its private pages.
    """

    start: Address
    end: Address
    mapping: Mapping
    inserted: int = 0
    chained: int = 0

    def __eq__(self, other: object) -> bool:
        """Whether both map the same, wherever the reverse map has them."""
        return isinstance(other, Vma) and self[:3] == other[:3]

    def __hash__(self) -> int:
        return hash(self[:3])

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
        return bool(self.mapping.flags._value_ & flags._value_)

    def page_offset(self, address: Address) -> int:
        """The page offset of `address` in the object; its linear index in private anonymous memory.

        Source: Linux include/linux/pagemap.h, linear_page_index().
        """
        return (address >> PAGE_SHIFT) + self.mapping.delta

    def clip(self, start: Address, end: Address) -> Vma:
        """The part in [start, end), which must share a byte with the VMA."""
        first, stop, mapping, inserted, chained = self
        if start <= first and stop <= end:
            return self
        return new_vma((max(first, start), min(end, stop), mapping, inserted, chained))


new_vma = partial(tuple.__new__, Vma)
"""Makes a Vma of a tuple; `Vma(...)` passes through a generated function and takes thrice as long."""


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
        and existing.userfaultfd == added.userfaultfd
        and (
            existing.anon_vma == added.anon_vma
            or (existing.anon_vma != 0 and not added.anon_vma and not existing.cloned)
        )
    )


def merged(a: Mapping, b: Mapping, flags: VmFlag) -> Mapping:
    """The mapping of the VMA that two mergeable neighbours become.

    Args:
        flags: those of one of them, for VM_SOFTDIRTY.
    """
    if a is b:
        return a
    if b.anon_vma and not a.anon_vma:
        a = a.with_anon_vma(b.anon_vma, cloned=b.cloned)
    return a if flags._value_ == a.flags._value_ else a.with_flags(flags)


def merges_upwards(grown: Mapping, added: Mapping, above: Mapping) -> bool:
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
