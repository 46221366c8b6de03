"""Faults on many pages of one VMA at once: what comes to stand in the CPU's page table.

    no entry     anonymous   read   the zero page, read-only                            do_anonymous_page()
                             write  a new page of its own                               do_anonymous_page()
                 file        read   the page of the file, writable if the VMA is shared do_read_fault()
                 shared      write  the page of the file                                do_shared_fault()
                 private     write  a copy of the page of the file                      do_cow_fault()
    read-only    shared      write  becomes writable                                    wp_page_shared()
                 private     write  becomes writable if nobody else has the page;       do_wp_page()
                                    else a copy of it, of which mirrors are told
    not present              any    for others to resolve                               do_swap_page()

What is missing in a VMA registered with a userfaultfd, and no page of shared memory yet either, is none of this: its
handler brings it in (handle_userfault()).  So it is with a page of shared memory that has no entry yet where minor
faults are registered.

An `Attempt` does for its pages all that can be done without waiting, and says what it has to wait for.

**Source**: Linux mm/memory.c, 6.12: handle_pte_fault() and the functions named above.

**Invariants**: what is done is done for whole pages: entry, frame and counts agree whenever an attempt
returns; the pages before the one that `stop` names are done or waited for.

**Absent**: the check of the VMA's protection, waiting, huge pages.

Differs: when directories of the page table run out, none of the pages handled in the same step is done.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.ascending import among, unique
from hmm.errors import OutOfFramesError, Signal
from hmm.fault_around import map_around
from hmm.file import File, FileKind
from hmm.file_folio import fits, folio_at
from hmm.frames import ZERO_PFN, PageFlag
from hmm.units import (
    PAGE_SHIFT,
    PAGE_SIZE,
    PMD_SIZE,
    PUD_SHIFT,
    Address,
    AddressRange,
    Entries,
    Pfns,
    block_starts,
    page_numbers,
)
from hmm.userfaultfd import UserfaultFeature
from hmm.vma import Vma, VmFlag

__all__ = [
    "ANON_PAGE",
    "DIRTIED",
    "READ_ONLY",
    "WRITTEN",
    "ZERO_PAGE",
    "Attempt",
    "By",
    "Stop",
    "Strangers",
    "copy_unshared",
    "file_flags",
    "fill_empty",
    "prepare_anon_vma",
]

READ_ONLY = cpu_pte.PRESENT | cpu_pte.ACCESSED
DIRTIED = cpu_pte.DIRTY | cpu_pte.SOFT_DIRTY
WRITTEN = READ_ONLY | cpu_pte.WRITE | DIRTIED
ZERO_PAGE = cpu_pte.cpu_entry(ZERO_PFN, READ_ONLY | cpu_pte.SPECIAL)
ANON_PAGE = PageFlag.ANON | PageFlag.ANON_EXCLUSIVE | PageFlag.SWAPBACKED
"""Flags of a private page that one process has to itself."""

_READING = np.array(READ_ONLY, np.uint64)
_WRITING = np.array(WRITTEN & ~cpu_pte.SOFT_DIRTY, np.uint64)
"""What the entry of a page that needs no fault has."""
_WHOSE = np.uint16(PageFlag.ANON | PageFlag.COMPOUND | PageFlag.KSM)
_SMALL_ANON = np.uint16(PageFlag.ANON)
_EXCLUSIVE = np.uint16(PageFlag.ANON | PageFlag.ANON_EXCLUSIVE)

_Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Stop:
    """Where handling faults ended, and why.

    Attributes:
        address: of the first page that was not handled.
        signal: None when memory ran out, or the handler of a userfaultfd is to bring the page in.
        userfaultfd: that one's number; 0 for none.
        npages: how many pages its handler is to bring in there, in a row.
        minor: they are there, and only not mapped.
    """

    address: Address
    signal: Signal | None
    userfaultfd: int = 0
    npages: int = 1
    minor: bool = False


@dataclass(frozen=True, slots=True)
class Strangers:
    """Pages of one VMA whose entries are not present: uint64[n] addresses and entries, ascending."""

    vma: Vma
    addresses: Entries
    entries: Entries

    def which(self, chosen: npt.NDArray[np.bool_]) -> Strangers:
        """Some of them; chosen: bool[n]."""
        return Strangers(self.vma, self.addresses[chosen], self.entries[chosen])

    def unchanged(self, space: AddressSpace) -> Strangers:
        """Those that are as they were found: whoever waited looks for them again before it uses what they name."""
        return self.which(space.table.lookup(self.addresses) == self.entries)


class By(Enum):
    """Who touches pages, and so what becomes of an entry that permits the access."""

    CPU = auto()
    """It does not fault: the entry becomes dirty, but not soft-dirty; and a stack may grow down to it."""
    FAULT = auto()
    """handle_mm_fault() for whoever asks: as if it had faulted."""
    GUP = auto()
    """get_user_pages(): follow_page_pte() finds the page, and leaves the entry as it is."""


@dataclass(slots=True)
class Attempt:
    """Faults handled as far as possible without waiting.

    Attributes:
        told: pages of which every mirror knows that they are about to be replaced, ascending; None for all,
            because nobody listens.
        by: who touches the pages.
        stop: the first page that cannot be handled.
        copies: pages that can be copied only after mirrors have been told; ascending arrays.
        strangers: entries that somebody else has to resolve first.
        splits: where huge pages start that have to be mapped by page entries first.
    """

    space: AddressSpace
    write: bool
    told: Entries | None
    by: By = By.FAULT
    stop: Stop | None = None
    copies: list[Entries] = field(default_factory=list)
    strangers: list[Strangers] = field(default_factory=list)
    splits: list[Address] = field(default_factory=list)

    @property
    def used_bits(self) -> int:
        """What an entry that lets a page be written says when it has been: pte_mkdirty(), or _PAGE_DIRTY alone."""
        return cpu_pte.DIRTY if self.by is By.CPU else DIRTIED

    @property
    def available(self) -> int:
        """Frames that may be used: those for copies that wait are spoken for, as they come first."""
        free = self.space.frames.available
        return free - sum(addresses.size for addresses in self.copies) if self.copies else free

    # ---- ranges that hold nothing

    def fill_empty(self, vma: Vma, span: AddressRange) -> None:
        """Handle all of `span`, a part of the private anonymous VMA `vma` that holds no entry.

        Cost: 4 ns per page when writing, 1 ns when reading.
        """
        space = self.space
        if vma.mapping.userfaultfd:
            self.leave_to_handler(vma, span.start, span.npages)
            return
        npages = min(span.npages, self.available) if self.write else span.npages
        end = span.start + (npages << PAGE_SHIFT)
        try:
            if npages:
                fill_empty(space, vma, AddressRange(span.start, end), write=self.write)
            if end < span.end:
                self.stop = Stop(end, None)
        except OutOfFramesError:
            self.stop = Stop(span.start, None)

    # ---- pages that a userfaultfd's handler brings in

    def leave_to_handler(self, vma: Vma, address: Address, npages: int, *, minor: bool = False) -> None:
        """Stop at the first of `npages` pages of a registered VMA that are missing, or not mapped: handle_userfault().

        Args:
            minor: they are there.
        """
        if self.write and not vma.shared:
            prepare_anon_vma(self.space, vma)
        userfaultfd = self.space.userfaultfds[vma.mapping.userfaultfd]
        if userfaultfd.features & UserfaultFeature.SIGBUS:
            self.stop = Stop(address, Signal.BUS_ADRERR)
        else:
            self.stop = Stop(address, None, userfaultfd.id, npages, minor)

    # ---- any pages of one VMA

    def fault(self, vma: Vma, addresses: Entries, entries: Entries) -> None:
        """Handle pages of one VMA, as far as the first that cannot be.

        Args:
            vma: whole; it permits the access.
            addresses: uint64[n], pages of the VMA, ascending.
            entries: uint64[n], their entries.

        Cost: O(n), vectorised.
        """
        wanted = _WRITING if self.write else _READING
        lacking = (entries & wanted) != wanted
        number = np.count_nonzero(lacking)
        if not number:
            return
        if number < entries.size:
            addresses, entries = addresses[lacking], entries[lacking]
        part = _Part(self, vma, addresses, entries)
        try:
            part.handle()
        except OutOfFramesError:
            self.stop = Stop(int(addresses[0]), None)


class _Kinds(NamedTuple):
    # bool[n] each, disjoint: what is to be done about each page of a part; None: about no page.
    empty: _Mask | None
    strange: _Mask | None
    upgrade: _Mask | None
    copy: _Mask | None
    waiting: _Mask | None
    used: _Mask | None

    def up_to(self, n: int) -> _Kinds:
        return _Kinds(*(None if mask is None else _some(mask[:n]) for mask in self))


def _some(mask: _Mask) -> _Mask | None:
    return mask if np.count_nonzero(mask) else None


@dataclass(slots=True)
class _Part:
    # Pages of one VMA that all lack something.
    attempt: Attempt
    vma: Vma
    addresses: Entries
    entries: Entries

    @property
    def space(self) -> AddressSpace:
        return self.attempt.space

    @property
    def file(self) -> File | None:
        backing = self.vma.mapping.backing
        return backing if isinstance(backing, File) else None

    @property
    def private_write(self) -> bool:
        return self.attempt.write and not self.vma.shared

    def handle(self) -> None:
        self._fault_around()
        self._cut_at_signal()
        if self.vma.mapping.userfaultfd:
            self._cut_at_userfault()
        kinds = self._up_to_limit(self._classify())
        if kinds.strange is not None:
            strangers = Strangers(self.vma, self.addresses[kinds.strange], self.entries[kinds.strange])
            self.attempt.strangers.append(strangers)
        if kinds.waiting is not None:
            self.attempt.copies.append(self.addresses[kinds.waiting])
        if kinds.empty is not None:
            self._fill(self.addresses[kinds.empty])
        if kinds.upgrade is not None:
            self._upgrade(self.addresses[kinds.upgrade], self.entries[kinds.upgrade])
        if kinds.copy is not None:
            self._copy(self.addresses[kinds.copy], self.entries[kinds.copy])
        if kinds.used is not None and self.attempt.by is not By.GUP:
            self._mark(self.addresses[kinds.used], self.entries[kinds.used])

    # -- how far it goes

    def _offsets(self, addresses: Entries) -> Entries:
        shift = self.vma.mapping.delta << PAGE_SHIFT
        return (addresses.view(np.int64) + shift).view(np.uint64)

    def _cut(self, at: int, signal: Signal | None) -> None:
        self.attempt.stop = Stop(int(self.addresses[at]), signal)
        self.addresses, self.entries = self.addresses[:at], self.entries[:at]

    def _cut_at_signal(self) -> None:
        if self.file is None and not int(np.bitwise_or.reduce(self.entries)) & cpu_pte.POISON:
            return
        empty = self.entries == 0
        failing = cpu_pte.is_poison(self.entries)
        behind = None
        if self.file is not None and empty.any():
            behind = empty & self._behind_end(self.file)
            failing |= behind
            if self.space.frames.poisoned and not self.vma.has(VmFlag.UFFD_MINOR):
                failing |= empty & self.file.poisoned(self._offsets(self.addresses))
        if not failing.any():
            return
        at = int(failing.argmax())
        if empty[at] and self.private_write:
            # do_cow_fault() prepares for the copy before it finds that there is nothing to copy.
            prepare_anon_vma(self.space, self.vma)
        self.space.directories.add(int(self.addresses[at]) >> PUD_SHIFT)  # __handle_mm_fault() has made it
        self._cut(at, Signal.BUS_ADRERR if behind is not None and behind[at] else Signal.BUS_POISON)

    def _cut_at_userfault(self) -> None:
        # What has no entry: missing where shared memory has no page yet either, else minor.
        empty = self.entries == 0
        there = np.zeros(empty.size, np.bool_)
        if self.file is not None and empty.any():
            there[empty] = self.file.pages.lookup(self._offsets(self.addresses[empty])) != 0
        waiting = np.zeros(empty.size, np.bool_)
        if self.vma.has(VmFlag.UFFD_MISSING):
            waiting |= empty & ~there
        if self.vma.has(VmFlag.UFFD_MINOR):
            waiting |= there
        if not waiting.any():
            return
        at = int(waiting.argmax())
        pages = page_numbers(self.addresses[at:])
        run = waiting[at:] & (there[at:] == there[at]) & (pages - pages[0] == np.arange(pages.size))
        npages = run.size if run.all() else int(run.argmin())
        self.attempt.leave_to_handler(self.vma, int(self.addresses[at]), npages, minor=bool(there[at]))
        self.addresses, self.entries = self.addresses[:at], self.entries[:at]

    def _behind_end(self, file: File) -> _Mask:
        # The pages for which shmem_fault() has nothing; a driver's mapping has no fault handler at all.
        if file.kind is FileKind.DEVICE:
            return np.ones(self.addresses.size, np.bool_)
        behind: _Mask = self._offsets(self.addresses) >= np.uint64(file.size_bytes)
        return behind

    def _up_to_limit(self, kinds: _Kinds) -> _Kinds:
        # The pages that there is memory for.
        available = self.attempt.available
        if 2 * self.addresses.size <= available:
            return kinds
        costs = np.zeros(self.addresses.size, np.int64)
        for copied in (kinds.copy, kinds.waiting):
            if copied is not None:
                costs[copied] = 1
        if kinds.empty is not None:
            costs[kinds.empty] = self.private_write
            if self.file is not None:
                costs[kinds.empty] += ~self.file.cached(self._offsets(self.addresses[kinds.empty]))
        at = int(np.cumsum(costs).searchsorted(available, side="right"))
        if at == self.addresses.size:
            return kinds
        self._cut(at, None)
        return kinds.up_to(at)

    # -- what is to be done

    def _classify(self) -> _Kinds:
        present = cpu_pte.is_present(self.entries)
        there = np.count_nonzero(present)
        empty = strange = protected = used = None
        if there < present.size:
            nothing = self.entries == 0
            empty, strange = _some(nothing), _some(~(nothing | present))
        if there and self.attempt.write:
            protected = _some(present & ~cpu_pte.is_writable(self.entries))
        if there:
            used = _some(present) if protected is None else _some(present & ~protected)
        if protected is None or self.vma.shared:
            return _Kinds(empty, strange, protected, None, None, used)
        return _Kinds(empty, strange, *self._classify_protected(protected), used)

    def _classify_protected(self, protected: _Mask) -> tuple[_Mask | None, _Mask | None, _Mask | None]:
        # What becomes writable, what is copied, and what is copied when mirrors have been told.
        upgrade = protected & self._reusable(protected)
        copy, told = protected & ~upgrade, self.attempt.told
        if told is None:
            return _some(upgrade), _some(copy), None
        known = copy & among(self.addresses, told)
        return _some(upgrade), _some(known), _some(copy & ~known)

    def _reusable(self, protected: _Mask) -> _Mask:
        # PageAnonExclusive() || wp_can_reuse_anon_folio(), which gives pages of large folios back rather.
        frames = self.space.frames
        framed = protected & ~cpu_pte.is_special(self.entries)
        pfns = np.where(framed, cpu_pte.cpu_pfn(self.entries), ZERO_PFN)
        flags = frames.flags[pfns]
        alone: _Mask = ((flags & _WHOSE) == _SMALL_ANON) & (frames.refcount[pfns] == 1)
        alone |= (flags & _EXCLUSIVE) == _EXCLUSIVE
        return alone

    # -- what is done

    def _fault_around(self) -> None:
        if self.space.fault_around_pages == 1 or self.attempt.write or self.file is None:
            return
        if self.vma.has(VmFlag.UFFD_MINOR):  # uffd_disable_fault_around()
            return
        empty = self.addresses[self.entries == 0]
        # The page that gets a signal has its neighbours mapped before.
        behind = np.flatnonzero(self._offsets(empty) >= np.uint64(self.file.size_bytes))
        faulting = empty[: behind[0] + 1] if behind.size else empty
        if faulting.size and self.file.kind is not FileKind.DEVICE:
            map_around(self.space, self.vma, self.file, faulting, file_flags(self.space, self.vma, write=False))
            self.entries = self.space.table.lookup(self.addresses)

    def _fill(self, addresses: Entries) -> None:
        table, frames = self.space.table, self.space.frames
        if self.private_write:
            prepare_anon_vma(self.space, self.vma)
        if self.file is None:
            if self.private_write:
                self._install(addresses, None)
            else:
                table.store(addresses, ZERO_PAGE)
            return
        if self.file.huge and not self.private_write:
            addresses = self._with_folios(addresses, self.file)
        cached = self.file.grab(self._offsets(addresses))
        if self.private_write:
            self._install(addresses, cached)
        else:
            flags = file_flags(self.space, self.vma, write=self.attempt.write)
            table.store(addresses, cpu_pte.cpu_entry(cached, flags))
            frames.map(cached)
            if self.attempt.write:
                frames.set_flags(cached, PageFlag.DIRTY)  # fault_dirty_shared_page()

    def _with_folios(self, addresses: Entries, file: File) -> Entries:
        # finish_fault(): memory without a name gets all of a large folio by page entries, where nothing stands yet.
        if file.named or self.vma.mapping.userfaultfd:
            return addresses
        blocks = [
            np.arange(start, start + PMD_SIZE, PAGE_SIZE, dtype=np.uint64)
            for start in unique(block_starts(addresses)).tolist()
            if fits(self.vma, start)
            and not self.space.table.holds(start, start + PMD_SIZE)
            and folio_at(file, self.vma.page_offset(start) << PAGE_SHIFT) is not None
        ]
        return unique(np.concatenate((addresses, *blocks))) if blocks else addresses

    def _install(self, addresses: Entries, sources: Pfns | None) -> Entries:
        # New private pages, with the contents of others or zeroes; returns the entries before.
        frames = self.space.frames
        pfns = frames.allocate_mapped(addresses.size, ANON_PAGE)
        try:
            before = self.space.table.store(addresses, cpu_pte.cpu_entry(pfns, WRITTEN))
        except OutOfFramesError:
            frames.take_back(pfns)
            raise
        self.space.claim(pfns, self.vma.start)
        if sources is not None:
            frames.copy(pfns, sources)
        return before

    def _upgrade(self, addresses: Entries, entries: Entries) -> None:
        # As wp_page_reuse(), for registers by way of wp_pfn_shared().
        if not self.vma.shared:
            self.space.frames.set_flags(cpu_pte.cpu_pfn(entries), PageFlag.ANON_EXCLUSIVE)
            self.space.claim(cpu_pte.cpu_pfn(entries), self.vma.start)
        else:
            pfns = cpu_pte.cpu_pfn(entries)
            self.space.frames.set_flags(pfns[~cpu_pte.is_special(entries)], PageFlag.DIRTY)  # fault_dirty_shared_page()
        self.space.table.store(addresses, entries | np.uint64(WRITTEN))

    def _copy(self, addresses: Entries, entries: Entries) -> None:
        # As wp_page_copy().  What has no struct page is the zero page, or registers without bytes.
        prepare_anon_vma(self.space, self.vma)
        sources = np.where(cpu_pte.is_special(entries), ZERO_PFN, cpu_pte.cpu_pfn(entries))
        self.space.drop(self._install(addresses, sources if sources.any() else None), replaced=True)

    def _mark(self, addresses: Entries, entries: Entries) -> None:
        # As handle_pte_fault() for an entry that is there; or what the processor itself does when it uses one.
        bits = READ_ONLY | (self.attempt.used_bits if self.attempt.write else 0)
        self.space.table.store(addresses, entries | np.uint64(bits))


def file_flags(space: AddressSpace, vma: Vma, *, write: bool) -> int:
    """Flags of the entry of a file's page, when it is mapped at a touch: mk_pte() with vm_page_prot."""
    if not vma.shared or not vma.writable:
        return READ_ONLY
    if write:
        return WRITTEN
    # vma_wants_writenotify(): where writes are watched, the first one is to fault.
    return READ_ONLY | cpu_pte.WRITE if space.is_soft_dirty(vma) else READ_ONLY


def fill_empty(space: AddressSpace, vma: Vma, span: AddressRange, *, write: bool) -> None:
    """Bring in all of `span`, which holds no entry: do_anonymous_page().

    Args:
        vma: whole; private anonymous memory that no userfaultfd has registered, and that permits the access.
        span: a part of it, not empty.

    Raises:
        OutOfFramesError: too few frames or directories are left; no page was brought in (ENOMEM).

    Cost: 2 us for one page; 5 us for more, and 4 ns per page when writing, 1 ns when reading.
    """
    start, end = span.start, span.end
    if not write:
        space.table.fill(start, end, ZERO_PAGE)
        return
    if end - start == PAGE_SIZE:
        prepare_anon_vma(space, vma)
        pfn = space.frames.allocate_mapped_one(ANON_PAGE)
        try:
            space.table.set(start, pfn << cpu_pte.PFN_SHIFT | WRITTEN)
        except OutOfFramesError:
            space.frames.take_back(pfn)
            raise
        space.claim(pfn, start)
        return
    pfns = space.frames.allocate_mapped_run(span.npages, ANON_PAGE)  # first: when it fails, nothing was changed
    prepare_anon_vma(space, vma)
    try:
        space.table.fill(start, end, cpu_pte.cpu_entry(pfns, WRITTEN), in_use=True)
    except OutOfFramesError:
        space.frames.take_back(pfns)
        raise
    space.claim(pfns, start)


def prepare_anon_vma(space: AddressSpace, vma: Vma) -> None:
    """Give a VMA a family of private pages unless it has one; a neighbour's, if they could merge later.

    Args:
        vma: whole; its `anon_vma` may be out of date.

    Source: Linux mm/rmap.c, __anon_vma_prepare().
    """
    if vma.mapping.anon_vma:
        return
    now = space.vmas.find_again(vma.start)
    assert now is not None
    if not now.anon_vma:
        space.vmas.set_anon_vma(now, space.vmas.find_mergeable_anon_vma(now) or space.new_anon_vma())


def copy_unshared(space: AddressSpace, addresses: Entries, entries: Entries) -> None:
    """Give a process private pages of its own that it may only read: wp_page_copy() for FAULT_FLAG_UNSHARE.

    Args:
        addresses: uint64[n], n >= 1, ascending, in one VMA that has an `anon_vma`; mirrors have been told.
        entries: uint64[n], what stands there: present entries.

    Raises:
        OutOfFramesError: too few frames are free; nothing was changed (ENOMEM).

    Cost: O(n), vectorised, and the copying.
    """
    copies = space.frames.allocate_mapped(addresses.size, ANON_PAGE)
    space.frames.copy(copies, np.where(cpu_pte.is_special(entries), ZERO_PFN, cpu_pte.cpu_pfn(entries)))
    space.claim(copies, int(addresses[0]))
    flags = np.uint64(READ_ONLY) | (entries & np.uint64(cpu_pte.SOFT_DIRTY))
    space.table.store(addresses, cpu_pte.cpu_entry(copies, flags))
    space.drop(entries, replaced=True)
