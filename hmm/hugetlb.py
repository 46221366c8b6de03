"""Hugetlb memory: huge pages that were set aside, and the files that hand them out (mmap with MAP_HUGETLB).

A pool holds a reference of each of its pages, so a page is free when there is no other.  A mapping reserves what it
may need when it is made (unless MAP_NORESERVE), so that its faults find a page; a fault without a reservation that
finds no page is SIGBUS.

**Source**: Linux mm/hugetlb.c (hugetlb_reserve_pages(), hugetlb_vm_op_close(), dequeue_hugetlb_folio_vma()),
fs/hugetlbfs/inode.c, 6.12.

**Invariants**: no more pages are reserved than are free.

**Absent**: faults (hugetlb_fault.py); pools of several sizes or nodes; surplus pages; named files of hugetlbfs; page
tables that processes share (huge_pmd_share()), but mirrors are told as if there were some.

Differs: the pool does not grow, and takes its pages when the machine is made.  A page that its owner gives up while it
is pinned is not reserved again; the kernel does that when it is free.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.errors import InvalidRequestError, OutOfFramesError
from hmm.file import File
from hmm.frames import Frames, PageFlag
from hmm.units import (
    PAGE_SHIFT,
    PMD_MASK,
    PMD_PAGES,
    PMD_SHIFT,
    PMD_SIZE,
    PUD_SIZE,
    Address,
    AddressRange,
    Pfns,
    SpaceId,
)
from hmm.vma import Vma, VmFlag

__all__ = [
    "HUGETLB_VM_FLAGS",
    "HugetlbFile",
    "HugetlbPool",
    "discard_pages",
    "require_whole_page",
    "told_span",
    "unreserve",
]

HUGETLB_VM_FLAGS = VmFlag.HUGETLB | VmFlag.DONTEXPAND


class HugetlbPool:
    """The huge pages of a machine.

    Attributes:
        reserved: how many of the free ones are spoken for.
    """

    def __init__(self, frames: Frames, npages: int) -> None:
        """Take `npages` huge pages.  Raises: OutOfFramesError: there is not so much memory in one piece (ENOMEM)."""
        self.frames = frames
        self.reserved = 0
        heads = []
        for _ in range(npages):
            pfns = frames.allocate_huge(PageFlag.NONE)
            if pfns is None:
                raise OutOfFramesError(f"{npages} huge pages are more than the machine has")
            frames.mapcount[pfns] = 0
            frames.flags[pfns] = PageFlag.HUGETLB
            heads.append(int(pfns[0]))
        self.heads = np.array(heads, np.int64)

    @property
    def free(self) -> int:
        """Pages that nobody uses, reserved or not."""
        return int(np.count_nonzero(self.frames.refcount[self.heads] == 1))

    def reserve(self, npages: int) -> None:
        """Keep pages for later.  Raises: OutOfFramesError: fewer are free and not reserved (ENOMEM)."""
        if not self.has(npages):
            raise OutOfFramesError(f"{npages} huge pages are wanted, {self.free - self.reserved} are free")
        self.reserved += npages

    def has(self, npages: int) -> bool:
        """Whether so many are free and not reserved."""
        return npages <= self.free - self.reserved

    def take(self, flags: PageFlag, *, reserved: bool) -> Pfns | None:
        """A page that reads as zeroes; who takes it counts its mappings and references.

        Args:
            reserved: it is one of those kept.

        Returns: int64[PMD_PAGES]; None when none is to be had.
        """
        free = self.heads[self.frames.refcount[self.heads] == 1]
        if not free.size or (not reserved and free.size <= self.reserved):
            return None
        self.reserved -= reserved
        pfns = np.arange(int(free[0]), int(free[0]) + PMD_PAGES)
        self.frames.flags[pfns] = flags | PageFlag.HUGETLB
        self.frames.mapping[pfns] = 0
        self.frames.clear(pfns)
        return pfns

    def check(self) -> None:
        """Assert the invariants."""
        assert 0 <= self.reserved <= self.free, f"{self.reserved} huge pages are reserved, {self.free} are free"


@dataclass(slots=True, eq=False)
class HugetlbFile(File):
    """The unnamed file behind one mapping of hugetlb memory.

    Attributes:
        owner: the address space whose private mapping has the reservations; 0 of a shared one, where all have them, and
            of one without (MAP_NORESERVE).
        reserved: which of its pages, by number, are reserved and not in use.
    """

    pool: HugetlbPool = field(kw_only=True)
    owner: SpaceId = 0
    reserved: set[int] = field(default_factory=set)

    def reserve(self) -> None:
        """Reserve all of its pages.  Raises: as `HugetlbPool.reserve`."""
        numbers = set(range(self.size_bytes >> PMD_SHIFT))
        self.pool.reserve(len(numbers))
        self.reserved = numbers

    def take(self, space: AddressSpace, number: int, flags: PageFlag) -> Pfns | None:
        """A page for page `number`, as `HugetlbPool.take`."""
        reserved = number in self.reserved and self.owner in (0, space.id)
        pfns = self.pool.take(flags, reserved=reserved)
        if reserved:
            self.reserved.discard(number)
        return pfns

    def may_take(self, space: AddressSpace, number: int, others: int) -> bool:
        """Whether `take` finds a page after it has found so many others that are not reserved."""
        return (number in self.reserved and self.owner in (0, space.id)) or self.pool.has(others + 1)

    def restore(self, number: int) -> None:
        """Reserve a page again that has just become free."""
        self.reserved.add(number)
        self.pool.reserved += 1

    def unreserve(self, numbers: Iterable[int]) -> None:
        """Give reservations back."""
        given = self.reserved.intersection(numbers)
        self.reserved -= given
        self.pool.reserved -= len(given)

    def release_unused(self) -> bool:
        """As `File`; what was reserved is free again."""
        unused = File.release_unused(self)
        if unused:
            self.unreserve(list(self.reserved))
        return unused


def told_span(space: AddressSpace, piece: Vma) -> AddressRange:
    """What mirrors are told of when a part of a VMA is about to change: of hugetlb memory GiBs that may share a table.

    Source: Linux mm/hugetlb.c, adjust_range_if_pmd_sharing_possible().
    """
    if not piece.has(VmFlag.HUGETLB) or not piece.has(VmFlag.MAYSHARE):
        return piece.span
    whole = space.vmas.find(piece.start) or piece
    first, end = -(-whole.start // PUD_SIZE) * PUD_SIZE, whole.end & -PUD_SIZE
    if piece.end <= first or piece.start >= end:
        return piece.span
    start = piece.start & -PUD_SIZE if piece.start > first else piece.start
    return AddressRange(start, -(-piece.end // PUD_SIZE) * PUD_SIZE if piece.end < end else piece.end)


def discard_pages(space: AddressSpace, vma: Vma) -> None:
    """Drop the pages of a part of a VMA of hugetlb memory; those that were the process's own are reserved for it again.

    Cost: O(huge pages).  Source: Linux mm/hugetlb.c, __unmap_hugepage_range().
    """
    file = vma.backing
    assert isinstance(file, HugetlbFile), vma
    for start in range(vma.start, vma.end, PMD_SIZE):
        entry = space.table.get(start)
        space.zap(start, start + PMD_SIZE)
        head = cpu_pte.cpu_pfn(entry)
        own = entry and file.owner == space.id and file.frames.flags_of(head) & PageFlag.ANON
        if own and file.frames.refcount[head] == 1:
            file.restore(vma.page_offset(start) >> (PMD_SHIFT - PAGE_SHIFT))


def require_whole_page(vma: Vma, address: Address) -> None:
    """Refuse to cut a mapping of hugetlb memory within a page: hugetlb_vm_op_split().

    Args:
        address: within `vma`, or one of its edges, which are never within a page.

    Raises: InvalidRequestError: it is within a huge page (EINVAL).
    """
    if address & ~PMD_MASK and vma.has(VmFlag.HUGETLB):
        raise InvalidRequestError(f"{vma} cannot be cut at {address:#x}, within a huge page", address=address)


def unreserve(space: AddressSpace, vmas: Iterable[Vma]) -> None:
    """Parts of VMAs went: what the space had reserved for itself there is free: hugetlb_vm_op_close()."""
    for vma in vmas:
        file = vma.backing
        if isinstance(file, HugetlbFile) and file.owner == space.id:
            first = vma.page_offset(vma.start) >> (PMD_SHIFT - PAGE_SHIFT)
            file.unreserve(range(first, first + (vma.npages >> (PMD_SHIFT - PAGE_SHIFT))))
