"""An address space: what is mapped, the CPU's page table, and the bracket round every edit.

Models `struct mm_struct`.  The state only: the calls that change it are in mman.py, mremap.py, madvise.py,
fault.py and fork.py, which are generators over this class.

**Source**: Linux include/linux/mm_types.h, struct mm_struct; mm/memory.c, zap_pte_range().

**Invariants**: every present entry of the CPU table lies in a VMA; a frame's map count is the number of CPU entries
of all spaces that name it.

**Absent**: processes (registry.py), who hears of changes (notifier.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from hmm import cpu_pte
from hmm.anon_vma import AnonVma, Family, Forest, first_family
from hmm.checked import Checked
from hmm.errors import OutOfFramesError, TimedOutError, WouldDeadlockError
from hmm.frames import Frames, PageFlag
from hmm.notifier import Notifier
from hmm.operation import Await, Current
from hmm.page_table import PageTable
from hmm.semantics import LINUX_6_12, Semantics
from hmm.swap import free_entries, slots_of
from hmm.units import (
    PAGE_SIZE,
    PMD_MASK,
    PMD_PAGES,
    PMD_SHIFT,
    PMD_SIZE,
    PUD_SHIFT,
    TASK_SIZE,
    Address,
    AddressRange,
    Entries,
    Pfn,
    Pfns,
    SpaceId,
    all_but,
)
from hmm.userfaultfd import Userfaultfd
from hmm.vma import UFFD_FLAGS, Vma, VmFlag
from hmm.vma_map import VmaMap

MMAP_BASE = TASK_SIZE - (1 << 27)
"""Top of the area that mmap fills downwards: below the largest gap kept for the stack's growth (mmap_base())."""
_ANON = int(PageFlag.ANON)
_HUGETLB = int(PageFlag.HUGETLB)
_HUGE_KINDS = cpu_pte.PRESENT | cpu_pte.DEVICE | cpu_pte.MIGRATION
_NOT_ACCESSED = all_but(cpu_pte.ACCESSED)
_USED = cpu_pte.DIRTY | cpu_pte.ACCESSED
_NOT_HUGE = all_but(cpu_pte.HUGE)
_NOT_SOFT_DIRTY = all_but(cpu_pte.SOFT_DIRTY)


class Thp(IntEnum):
    """Where a first touch may bring in a huge page: /sys/kernel/mm/transparent_hugepage/enabled, per address space."""

    NEVER = 0
    MADVISE = 1
    ALWAYS = 2


@dataclass(frozen=True, slots=True)
class SpaceLimits:
    """What one address space may hold.

    Attributes:
        vmas: `vm.max_map_count`.
        address_bytes: RLIMIT_AS.
        stack_bytes: RLIMIT_STACK: how far a VMA may grow downwards.
        directories: of its CPU page table.
    """

    vmas: int = 65530
    address_bytes: int = TASK_SIZE
    stack_bytes: int = 8 << 20
    directories: int = 1 << 18


NOT_TOLD: Final = OutOfFramesError, TimedOutError, WouldDeadlockError
"""Why a change of VMAs is taken back before anything else was changed: there was no room for pages that had to come
back from a device first, a mirror with policy FAIL did not answer, or the call was made inside a callback that it would
wait for."""


@dataclass(slots=True, eq=False)
class Restoring:
    """Unmapped VMAs as they were: they come back when the change could not be told; nothing else was changed then.

    A userfaultfd that was closed meanwhile does not.
    """

    space: AddressSpace
    span: AddressRange
    pieces: list[Vma]

    def __enter__(self) -> list[Vma]:
        return self.pieces

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, NOT_TOLD):
            known = (0, *self.space.userfaultfds)
            self.space.vmas.replace(
                self.span,
                [
                    (start, end, mapping if mapping.userfaultfd in known else mapping.with_userfaultfd(0))
                    for start, end, mapping, *_ in self.pieces
                ],
            )


@dataclass(slots=True, eq=False)
class AddressSpace:
    """One process's memory: VMAs, CPU page table, notifier, program break.

    Attributes:
        fault_around_pages: how many cached pages of a file a read fault maps at most, a power of two up to 512;
            1 for the one touched alone, 16 in a kernel that was not told otherwise (fault_around_bytes).
        thp: where a first touch may bring in a huge page.
        low_addresses: whether calls may name addresses below vm.mmap_min_addr: its callers have CAP_SYS_RAWIO.
        huge: whether entries may have `cpu_pte.HUGE`; cleared never, so that spaces without pay one test.
        tables: the numbers (address >> PMD_SHIFT) of blocks that have a page table though no entry may be left in it;
            a huge page comes only where there is none.  Kept where `keeps_tables`.
        directories: the numbers (address >> PUD_SHIFT) of pieces of 1 GiB that have a directory of such blocks though
            no entry and no page table may be left in it.  Kept where `keeps_tables`.
        unstable: a part of it was reaped: nothing can be brought in any more (MMF_UNSTABLE).
        semantics: the kernel whose rules hold, where kernels differ.
        has_read_hints: whether a VMA was ever said to be read once or anywhere (MADV_SEQUENTIAL, MADV_RANDOM).
        tracks_writes: what was written has been forgotten once (clear_refs.py): from then on VmFlag.SOFTDIRTY marks new
            VMAs; before all of them are.
        last_anon_vma: the newest family of private pages.
        anon_vmas: of the families that came by fork, the trees that their VMAs are in.
        relatives: the live spaces that may share private pages with this one by fork, itself included, by id.
        notifiers: of the relatives, of those too that have ended with changes under way.
        lineage: the spaces that this one was forked from, the oldest first, and itself.
        userfaultfds: those that can be registered with VMAs of this space, by number.
        detached: VMAs that are being unmapped: no address is found in them, but their entries are still there.
    """

    id: SpaceId
    frames: Frames
    current: Current
    limits: SpaceLimits = field(default_factory=SpaceLimits)
    mmap_base: Address = MMAP_BASE
    brk_start: Address = 0
    brk_end: Address = 0
    default_flags: VmFlag = VmFlag.NONE  # mlockall(MCL_FUTURE)
    users: int = 1
    fault_around_pages: int = 1
    thp: Thp = Thp.NEVER
    low_addresses: bool = False
    huge: bool = False
    tables: set[int] = field(default_factory=set)
    directories: set[int] = field(default_factory=set)
    unstable: bool = False
    semantics: Semantics = LINUX_6_12
    has_read_hints: bool = False
    tracks_writes: bool = False
    last_anon_vma: int = 0
    anon_vmas: dict[int, Family] = field(default_factory=dict)
    relatives: dict[SpaceId, AddressSpace] = field(default_factory=dict)
    notifiers: WeakValueDictionary[SpaceId, Notifier] = field(default_factory=WeakValueDictionary)
    lineage: tuple[SpaceId, ...] = ()
    userfaultfds: dict[int, Userfaultfd] = field(default_factory=dict)
    detached: Sequence[Vma] = ()
    vmas: VmaMap = field(init=False)
    table: PageTable = field(init=False)
    notifier: Notifier = field(init=False)

    def __post_init__(self) -> None:
        self.vmas = VmaMap(self.current.insertions)
        self.table = PageTable(TASK_SIZE - 1, max_directories=self.limits.directories)
        self.notifier = Notifier(self.id, self.current)
        self.relatives[self.id], self.notifiers[self.id] = self, self.notifier
        self.lineage = (self.id,)

    def join(self, parent: AddressSpace) -> None:
        """Become a relative of `parent`, whose private pages this space is about to share."""
        self.relatives, self.notifiers = parent.relatives, parent.notifiers
        self.relatives[self.id], self.notifiers[self.id] = self, self.notifier
        self.lineage = (*parent.lineage, self.id)

    @property
    def vmas_with_entries(self) -> list[Vma]:
        """All VMAs that pages may be mapped in, ascending, those included that are being unmapped.

        Source: Linux mm/vma.c, vms_gather_munmap_vmas(): out of the tree, still known to the reverse map.
        """
        vmas = [*self.vmas, *self.detached]
        if self.detached:
            vmas.sort(key=lambda vma: vma.start)
        return vmas

    def claim(self, pfns: Pfn | Pfns | slice, address: Address) -> None:
        """Note that private pages of the VMA at `address` are this space's own: its parents can never come to map them.

        Of a space without relatives nothing need be noted, as all that may ever map its pages descend from it.

        Source: Linux mm/rmap.c, __folio_set_anon(), folio_move_anon_rmap().
        """
        if len(self.relatives) > 1:
            vma = self.vmas.find_again(address) if self.anon_vmas else None
            self.frames.mapping[pfns] = self.id if vma is None else self.family(vma.anon_vma).own.space_id

    def may_map(self, pfns: Pfns) -> npt.NDArray[np.bool_]:
        """bool[n]: which private pages this space, or one that it was forked from, has made."""
        makers = self.frames.mapping[pfns]
        possible: npt.NDArray[np.bool_] = (makers == 0) | np.isin(makers, self.lineage)
        return possible

    def new_anon_vma(self) -> int:
        """A family of private pages that no VMA of this space has yet."""
        self.last_anon_vma += 1
        return self.last_anon_vma

    @property
    def forest(self) -> Forest:
        """The trees of all relatives."""
        spaces = self.relatives.values()
        return Forest(one.family(vma.anon_vma) for one in spaces for vma in one.vmas_with_entries if vma.anon_vma)

    def inherit_anon_vma(self, family: Family, forest: Forest) -> int:
        """The number that the child of a VMA gets, whose family is given: anon_vma_fork()."""
        number = self.new_anon_vma()
        self.anon_vmas[number] = forest.child(family, self.id, number)
        return number

    def family(self, anon_vma: int) -> Family:
        """The trees that the VMAs of a family are in."""
        return self.anon_vmas.get(anon_vma) or first_family(self.id, anon_vma)

    def anon_vma_root(self, anon_vma: int) -> AnonVma:
        """The oldest ancestor of a family, with which it shares its tree of VMAs: anon_vma->root."""
        return self.family(anon_vma).trees[0]

    @property
    def new_flags(self) -> VmFlag:
        """What every new VMA of this space has: what mlockall says, and VM_SOFTDIRTY."""
        return self.default_flags | VmFlag.SOFTDIRTY if self.tracks_writes else self.default_flags

    def is_soft_dirty(self, vma: Vma) -> bool:
        """Whether all of a VMA counts as written: it is new since that was last forgotten."""
        return not self.tracks_writes or vma.has(VmFlag.SOFTDIRTY)

    @property
    def keeps_tables(self) -> bool:
        """Whether a huge page may come: at a first touch, from a migration that fills holes, or from a file."""
        return self.thp is not Thp.NEVER or self.huge or not self.semantics.migration_splits

    def zap(self, start: Address, end: Address) -> int:
        """Drop every entry of [start, end) and the frames that only it held.

        Returns: number of entries dropped.

        Cost: O(directories + entries), vectorised.  Source: mm/memory.c, zap_pte_range().
        """
        if self.huge:
            self.split_edges(start, end)
        if self.keeps_tables:
            self.keep_tables(start, end)
        if end - start == PAGE_SIZE and not self.has_read_hints:
            entry = self.table.set(start, 0)
            self._drop_one(entry)
            return 1 if entry else 0
        if self.has_read_hints:
            return sum(self._zap_part(vma.clip(start, end)) for vma in self._with_entries(start, end))
        entries = self.table.zap(start, end)
        self.drop(entries)
        return entries.size

    def _with_entries(self, start: Address, end: Address) -> list[Vma]:
        return [vma for vma in self.vmas_with_entries if vma.start < end and start < vma.end]

    def _zap_part(self, part: Vma) -> int:
        entries = self.table.zap(part.start, part.end)
        self.drop(entries if part.mapping.has_recency else entries & _NOT_ACCESSED)
        return entries.size

    def split_edges(self, start: Address, end: Address) -> None:
        """Map what lies across an edge of [start, end) by page entries, so that the range can be changed by itself."""
        if start & ~PMD_MASK:
            self.split_huge_pmd(start)
        if end & ~PMD_MASK and end < TASK_SIZE:
            self.split_huge_pmd(end)

    def split_huge_pmd(self, address: Address) -> None:
        """Map the block of an address by page entries if it is mapped by a huge one; by none if that is a file's page.

        Whoever calls it has told the mirrors.  What was written ever counts as written since that was last forgotten.
        Source: Linux mm/huge_memory.c, __split_huge_pmd_locked(), __split_huge_zero_page_pmd().
        """
        entry = self.table.get(address)
        if not entry & cpu_pte.HUGE or self.frames.flags_of(cpu_pte.cpu_pfn(entry)) & _HUGETLB:
            return
        start = address & PMD_MASK
        if self.is_huge_of_file(entry):
            pfns = cpu_pte.cpu_pfn(self.table.zap(start, start + PMD_SIZE))
            self.directories.add(start >> PUD_SHIFT)
            for bit, flag in ((cpu_pte.DIRTY, PageFlag.DIRTY), (cpu_pte.ACCESSED, PageFlag.REFERENCED)):
                if entry & bit:
                    self.frames.set_flags(pfns, flag)
            self.frames.unmap(pfns)
        else:
            self.table.update(start, start + PMD_SIZE, _become_small)

    def is_huge_of_file(self, entry: int) -> bool:
        """Whether an entry maps a huge page of a file, which a touch finds again, and not of hugetlb memory."""
        if entry & (cpu_pte.HUGE | cpu_pte.PRESENT | cpu_pte.SPECIAL) != cpu_pte.HUGE | cpu_pte.PRESENT:
            return False
        return not self.frames.flags_of(cpu_pte.cpu_pfn(entry)) & (_ANON | _HUGETLB)

    def keep_tables(self, start: Address, end: Address) -> None:
        """Note that the page tables of [start, end) stay when their entries go, as they do until they are unmapped.

        Cost: O(blocks that hold entries).
        """
        for run in self.table.walk(start, end):
            self.directories.add(run.start >> PUD_SHIFT)
            if not int(run.entries[0]) & cpu_pte.HUGE:
                self.tables.add(run.start >> PMD_SHIFT)

    def retract_table(self, start: Address) -> None:
        """Free the page table of a block that has no entry, not the directory above it: retract_page_tables()."""
        self.tables.discard(start >> PMD_SHIFT)
        self.directories.add(start >> PUD_SHIFT)

    def free_tables(self, span: AddressRange) -> None:
        """Free the page tables of blocks that no VMA is left in, of a range that was unmapped: free_pgtables()."""
        for numbers, shift in (self.tables, PMD_SHIFT), (self.directories, PUD_SHIFT):
            if numbers:
                self._free_unused(span, numbers, shift)

    def _free_unused(self, span: AddressRange, numbers: set[int], shift: int) -> None:
        below, above = self.vmas.find_prev(span.start), self.vmas.find_next(span.start)
        first, end = span.start >> shift, (span.end - 1 >> shift) + 1
        if below is not None and below.end > first << shift:
            first += 1
        if above is not None and above.start < end << shift:
            end -= 1
        if end - first < len(numbers):
            numbers.difference_update(range(first, end))
        else:
            numbers -= {number for number in numbers if first <= number < end}

    def drop(self, entries: Entries, *, replaced: bool = False) -> None:
        """Let go of the frames and swap slots that CPU entries named; `entries` are no longer in any table.

        Of a page that is not anonymous a dirty entry makes its frame dirty, and one that was used counts as a use:
        zap_present_folio_ptes().  Not when a copy replaces it: wp_page_copy().

        Cost: O(n), vectorised; 2 ns per page for consecutive private pages.
        """
        if not entries.size:
            return
        every, some = int(np.bitwise_and.reduce(entries)), int(np.bitwise_or.reduce(entries))
        if some & cpu_pte.SPECIAL or not cpu_pte.holds_frame(every):
            if some & cpu_pte.SWAP:
                free_entries(self.frames, slots_of(entries))
            entries = entries[cpu_pte.holds_frame(entries)]
        pfns = cpu_pte.cpu_pfn(entries)
        freed = self.frames.unmap(pfns)
        if some & _USED and freed.size < pfns.size and not replaced:
            named = ~self.frames.test_flags(pfns, PageFlag.ANON)
            if named.any():
                named &= self.frames.refcount[pfns] > 0
                self._note_use(entries if named.all() else entries[named])

    def _note_use(self, entries: Entries) -> None:
        self.frames.set_flags(cpu_pte.cpu_pfn(cpu_pte.having(entries, cpu_pte.DIRTY)), PageFlag.DIRTY)
        self.frames.mark_accessed(cpu_pte.cpu_pfn(cpu_pte.having(entries, cpu_pte.ACCESSED)))

    def _drop_one(self, entry: int) -> None:
        if cpu_pte.holds_frame(entry):
            pfn = cpu_pte.cpu_pfn(entry)
            if entry & _USED and not self.frames.flags_of(pfn) & _ANON:
                self._note_use(np.array([entry], np.uint64))
            self.frames.unmap_one(pfn)
        elif entry & cpu_pte.SWAP:
            free_entries(self.frames, np.array([cpu_pte.cpu_pfn(entry)]))

    def awaits_handler(self, request: Await) -> bool:
        """Whether what waits for a userfaultfd's handler has to go on waiting; nobody does in a space that ends."""
        userfaultfd = self.userfaultfds.get(request.userfaultfd)
        ending = self.notifier.closed or self.unstable
        return userfaultfd is not None and request.ticket in userfaultfd.faults and not ending

    def restoring(self, span: AddressRange) -> Restoring:
        """Put the VMAs of `span`, which the `with` block unmaps, back when their change could not be told."""
        return Restoring(self, span, self.vmas.mapped_pieces(span))

    def check(self, checked: Checked) -> None:
        """Assert the invariants of this address space: tables, and that entries lie in VMAs.

        While a range is being unmapped its VMAs are gone already and its entries are still there.
        """
        table, vmas = checked.number(self.table), checked.number(self.vmas)
        if checked.is_new(self.table, table):
            self.table.check()
        if checked.is_new(self.vmas, vmas):
            self.vmas.check()
            self._check_userfaultfds()
        self.notifier.check()
        leaving = tuple(span for running in self.notifier.invalidations for span in running.spans)
        if checked.is_new(self, table, vmas, leaving, checked.number(self.frames) if self.huge else 0):
            self._check_entries(leaving, *checked.look(self.table, self.table.in_use))

    def _check_userfaultfds(self) -> None:
        for vma in self.vmas:
            number = vma.mapping.userfaultfd
            assert bool(number) == vma.has(UFFD_FLAGS), f"{vma} is registered by halves"
            assert not number or number in self.userfaultfds, f"{vma} is with userfaultfd {number}, which is closed"

    def _check_entries(self, leaving: tuple[AddressRange, ...], addresses: Entries, entries: Entries) -> None:
        bounds = np.array([(vma.start, vma.end) for vma in self.vmas] or [(0, 0)], np.uint64)
        below = np.searchsorted(bounds[:, 0], addresses, "right") - 1
        inside = (below >= 0) & (addresses < bounds[below, 1])
        for address in addresses[~inside].tolist():
            assert any(address in span for span in leaving), f"{address:#x} has an entry and no VMA"
        if not int(np.bitwise_or.reduce(entries)) & cpu_pte.HUGE:
            return
        for run in self.table.walk(0, TASK_SIZE):
            if int(np.bitwise_or.reduce(run.entries)) & cpu_pte.HUGE:
                self._check_huge(AddressRange(run.start, run.end), run.entries, leaving)

    def _check_huge(self, span: AddressRange, entries: Entries, leaving: tuple[AddressRange, ...]) -> None:
        """A huge mapping is whole and aligned, of one VMA, with the same flags and the frames of one folio in order."""
        assert self.huge, f"{span} is mapped by a huge page"
        assert span.npages == PMD_PAGES, f"{span} is a part of a huge page"
        assert not span.start & ~PMD_MASK, f"{span} is a huge page and not aligned"
        flags, pfns = cpu_pte.cpu_flags(entries), cpu_pte.cpu_pfn(entries)
        assert (flags == flags[0]).all(), f"{span} is a huge page with different flags"
        assert flags[0] & np.uint64(_HUGE_KINDS), f"{span} is a huge page of a kind that is small"
        if flags[0] & np.uint64(cpu_pte.SPECIAL):
            assert not pfns.any(), f"{span} is neither a huge page nor the huge zero page"
        else:
            assert (pfns == pfns[0] + np.arange(PMD_PAGES)).all(), f"{span} is a huge page in pieces"
            kind = PageFlag.HUGETLB if self.frames.flags_of(int(pfns[0])) & _HUGETLB else PageFlag.COMPOUND
            assert self.frames.all_have(pfns, kind), f"{span} is a huge page of small ones"
            exclusive = self.frames.test_flags(pfns, PageFlag.ANON_EXCLUSIVE)
            assert (exclusive == exclusive[0]).all(), f"{span} is a huge page that is partly exclusive"
        vma = self.vmas.find(span.start)
        inside = vma is not None and span.end <= vma.end
        assert inside or any(span.overlaps(other) for other in leaving), f"{span} is a huge page across VMAs"


def _become_small(entries: Entries) -> None:
    # "NOTE: this may set soft-dirty too on some archs": on x86, pte_mkdirty() does.  The zero page has neither bit.
    entries &= _NOT_HUGE
    if int(entries[0]) & cpu_pte.SPECIAL:
        entries &= _NOT_SOFT_DIRTY
    elif int(entries[0]) & cpu_pte.DIRTY:
        entries |= np.uint64(cpu_pte.SOFT_DIRTY)
