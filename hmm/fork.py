"""fork and exit: what they do to address spaces.

fork gives the child the parent's VMAs, and of their pages only those that could not be faulted in again: private
pages, which both then share read-only until one of them writes.  Mirrors of the parent hear of exactly these VMAs
before their pages become read-only.  Of pages that a mirror has in its device's memory the child gets copies.

exec is an exit from one address space after entering another, empty one: whoever knows of processes makes the new
space and calls `exit_mmap` for the old one when its last user has left.

**Source**: Linux kernel/fork.c (dup_mmap()), mm/memory.c (copy_page_range()), mm/hugetlb.c
(copy_hugetlb_page_range()), mm/mmap.c (exit_mmap()), 6.12.

**Invariants**: after fork no private page is writable in both spaces, or counted as exclusive to one; the child has
the parent's VMAs with the parent's cuts.

**Absent**: processes (commands_process.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import partial

import numpy as np
import numpy.typing as npt

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.anon_vma import Forest
from hmm.ascending import among
from hmm.errors import HmmError, OutOfFramesError
from hmm.events import Cause
from hmm.exclusive import restored
from hmm.fault_pages import ANON_PAGE, DIRTIED, READ_ONLY, WRITTEN
from hmm.file import File
from hmm.frames import PageFlag
from hmm.huge_split import huge_blocks, split_pmds, whole_blocks
from hmm.hugetlb import unreserve
from hmm.hugetlb_fault import copy_pinned_pages
from hmm.large_folio import are_pinned
from hmm.operation import Operation, Pause
from hmm.page_table import PageTable
from hmm.swap import area_of, slots_of
from hmm.units import (
    PAGE_SHIFT,
    PAGE_SIZE,
    PIECE_PAGES,
    PMD_SHIFT,
    WHOLE_SPACE,
    AddressRange,
    Entries,
    Pfns,
    all_but,
    block_starts,
)
from hmm.vma import LOCKED_FLAGS, Mapping, Vma, VmFlag
from hmm.vma_edit import release_files, zap

__all__ = ["exit_mmap", "fork"]

_UNFAULTABLE = VmFlag.PFNMAP | VmFlag.MIXEDMAP
_LOCKED = int(LOCKED_FLAGS)
_SHARED, _MAYWRITE, _HUGETLB = int(VmFlag.SHARED), int(VmFlag.MAYWRITE), int(VmFlag.HUGETLB)
_COPIED = READ_ONLY | DIRTIED
_DEVICE_WRITABLE = np.uint64(cpu_pte.DEVICE | cpu_pte.WRITE)
_FORGETTING = _DEVICE_WRITABLE | np.uint64(cpu_pte.HUGE)


def fork(parent: AddressSpace, child: AddressSpace) -> Operation[None]:
    """Copy an address space.

    Args:
        child: new and empty; nobody else knows of it before the call returns.

    Raises:
        OutOfFramesError: no directories for the child's page table, or a page that a device has to itself is locked
            (ENOMEM); the child is empty again.  Pages of the parent stay read-only, as in the kernel, until they are
            written.
        TimedOutError: a mirror with policy FAIL did not answer, or did not copy a page of its device's; the child is
            empty again (ETIMEDOUT).
        NoSuchObjectError: the parent is gone (ESRCH).

    Cost: O(VMAs + directories + pages copied), vectorised.  Source: Linux kernel/fork.c, dup_mmap().
    """
    with parent.notifier.turn() as turn:
        yield from turn.wait()
        turn.hold(WHOLE_SPACE)
        vmas = [vma for vma in parent.vmas if not vma.has(VmFlag.DONTCOPY)]
        runs = list(_runs(parent.vmas))
        copied = [vma for run in runs for vma in run]
        private = [run for run in runs if _is_cow(run[0])]
        huge = tuple([vma.span for run in private if run[0].has(VmFlag.HUGETLB) for vma in run])
        small = tuple([vma.span for run in private if not run[0].has(VmFlag.HUGETLB) for vma in run])
        try:
            with ExitStack() as told:
                for spans, cause in ((small, Cause.FORK), (huge, Cause.FORK_HUGETLB)):
                    if spans:
                        yield from told.enter_context(parent.notifier.invalidation(spans, cause)).deliver()
                if small:
                    yield from _split_pinned(parent, copied)
                yield from _copy(parent, child, vmas, runs)
        except HmmError:
            yield from exit_mmap(child)
            raise


def exit_mmap(space: AddressSpace) -> Operation[None]:
    """Let go of everything that is mapped; mirrors have been told, and nobody uses the space any more.

    Cost: O(VMAs + directories + entries).  Source: Linux mm/mmap.c, exit_mmap().
    """
    yield from zap(space, WHOLE_SPACE)
    space.relatives.pop(space.id, None)
    vmas = list(space.vmas)
    if vmas:
        space.vmas.erase(AddressRange(vmas[0].start, vmas[-1].end))
    unreserve(space, vmas)
    release_files(vmas)


def _needs_copy(vma: Vma) -> bool:
    """Whether entries of the VMA could not be faulted in again by the child: vma_needs_copy()."""
    mapping = vma.mapping
    return (mapping.anon_vma != 0 or mapping.has(_UNFAULTABLE)) and not mapping.has(VmFlag.WIPEONFORK)


def _is_cow(vma: Vma) -> bool:
    """Whether what is written there is private: is_cow_mapping()."""
    return vma.flags._value_ & (_SHARED | _MAYWRITE) == _MAYWRITE


def _runs(vmas: Iterable[Vma]) -> Iterator[list[Vma]]:
    """The VMAs to be copied as they follow on each other, with nothing between that is not, and copied alike."""
    run: list[Vma] = []
    kind = 0
    for vma in vmas:
        copied = not vma.has(VmFlag.DONTCOPY) and _needs_copy(vma)
        now = vma.flags._value_ & (_SHARED | _MAYWRITE | _HUGETLB)
        if run and (not copied or now != kind):
            yield run
            run = []
        if copied:
            run.append(vma)
            kind = now
    if run:
        yield run


def _copy(parent: AddressSpace, child: AddressSpace, vmas: list[Vma], runs: list[list[Vma]]) -> Operation[None]:
    child.mmap_base, child.brk_start, child.brk_end = parent.mmap_base, parent.brk_start, parent.brk_end
    child.fault_around_pages = parent.fault_around_pages
    child.has_read_hints, child.tracks_writes = parent.has_read_hints, parent.tracks_writes
    child.thp, child.huge, child.low_addresses = parent.thp, parent.huge, parent.low_addresses
    child.join(parent)
    for vma in vmas:
        if isinstance(vma.backing, File):
            vma.backing.mapped_by(child)
    forest = parent.forest
    child.vmas.inherit(vmas, lambda vma: _childs_mapping(parent, child, vma, forest))
    given = yield from _copy_from_devices(parent, child, [vma for run in runs for vma in run])
    npages = 0
    # The turn keeps these VMAs as they are; their entries are read piece by piece.
    for run in runs:
        if parent.keeps_tables:
            for vma in run:
                _allocate_tables(parent, child, vma)
        for addresses, entries in _to_copy(parent, run):
            now = (yield from _with_room(parent, addresses, entries)) if parent.frames.make_room else entries
            if given:
                missing = child.table.lookup(addresses) == 0
                _share(parent, child, run, addresses[missing], now[missing])
            else:
                _share(parent, child, run, addresses, now)
            npages += addresses.size
            if npages >= PIECE_PAGES:
                npages = 0
                yield Pause()


def _to_copy(parent: AddressSpace, run: list[Vma]) -> Iterator[tuple[Entries, Entries]]:
    """The entries of VMAs, piece by piece; huge pages of files the child finds at a touch: copy_huge_pmd()."""
    for addresses, entries in parent.table.chunks(run[0].start, run[-1].end, PIECE_PAGES):
        if not parent.huge:
            yield addresses, entries
            continue
        huge = cpu_pte.is_huge(entries) & cpu_pte.is_present(entries) & ~cpu_pte.is_special(entries)
        huge[huge] = ~parent.frames.test_flags(cpu_pte.cpu_pfn(entries[huge]), PageFlag.ANON | PageFlag.HUGETLB)
        yield (addresses[~huge], entries[~huge]) if huge.any() else (addresses, entries)


def _copy_from_devices(parent: AddressSpace, child: AddressSpace, copied: list[Vma]) -> Operation[bool]:
    """Give the child copies of what mirrors have in their devices' memory.  Returns: whether there was any."""
    given = False
    homes = [one.home for one in parent.notifier.subscribers.values() if one.home is not None]
    spans = tuple([vma.span for vma in copied if _is_cow(vma)]) if homes else ()
    for home in homes:
        if home.has_pages(spans):
            given = True
            yield from home.copy_out(spans, partial(_give, child))
    return given


def _give(child: AddressSpace, addresses: Entries, copies: Pfns) -> None:
    """Map pages that were copied for the child alone; a copy that failed is poison."""
    frames, came = child.frames, copies != 0
    first, last = (child.vmas.find(int(addresses[end])) for end in (0, -1))
    assert first is not None
    assert last is not None
    frames.set_flags(copies[came], ANON_PAGE)
    flags = np.full(addresses.size, _COPIED, np.uint64)
    parts = [
        (vma, slice(*addresses.searchsorted((np.uint64(vma.start), np.uint64(vma.end)))))
        for vma in child.vmas.overlapping(AddressRange(first.start, last.end))
    ]
    for vma, part in parts:
        if vma.writable:
            flags[part] |= np.uint64(cpu_pte.WRITE)
    entries = cpu_pte.cpu_entry(copies, flags)
    entries[~came] = cpu_pte.POISON
    try:
        child.table.store(addresses, entries)
    except OutOfFramesError:
        frames.put(copies[came])
        raise
    frames.map_new(copies[came])
    for vma, part in parts:
        child.claim(copies[part][came[part]], vma.start)


def _allocate_tables(parent: AddressSpace, child: AddressSpace, vma: Vma) -> None:
    """Where the parent has a page table the child gets one, even if it stays empty: copy_pmd_range()."""
    parent.keep_tables(*whole_blocks(vma.span))
    first, end = vma.start >> PMD_SHIFT, (vma.end - 1 >> PMD_SHIFT) + 1
    child.tables |= {number for number in parent.tables if first <= number < end}
    child.directories |= parent.directories


def _with_room(parent: AddressSpace, addresses: Entries, entries: Entries) -> Operation[Entries]:
    """Reclaim memory for the pages that have to be copied at once.  Returns: the entries as they are then."""
    frames = parent.frames
    while frames.make_room and frames.available < (ncopies := int(np.count_nonzero(_pinned(parent, entries)))):
        more = yield from frames.make_room(ncopies)
        entries = parent.table.lookup(addresses)
        if not more:
            break
    return entries


def _childs_mapping(parent: AddressSpace, child: AddressSpace, vma: Vma, forest: Forest) -> Mapping:
    mapping = vma.mapping
    anon_vma = mapping.anon_vma
    if mapping.flags._value_ & _LOCKED:
        mapping = mapping.with_flags(mapping.flags & ~LOCKED_FLAGS)
    if mapping.userfaultfd:
        mapping = mapping.with_userfaultfd(0)  # dup_userfaultfd()
    if not anon_vma:
        return mapping
    if mapping.has(VmFlag.WIPEONFORK):
        return mapping.with_anon_vma(0)
    return mapping.with_anon_vma(child.inherit_anon_vma(parent.family(anon_vma), forest), cloned=True)


def _share(parent: AddressSpace, child: AddressSpace, run: list[Vma], addresses: Entries, entries: Entries) -> None:
    """Give the child the entries of some pages of VMAs that are copied alike: copy_pte_range()."""
    if not addresses.size:
        return
    if len(run) > 1 and parent.frames.pinned:
        _share_each(parent, child, run, addresses, entries)
        return
    vma = run[0]
    if _is_cow(vma):
        _stop_at_locked(parent, child, run, addresses, entries)
        entries = _given_back(parent, addresses, entries)
        pinned = _pinned(parent, entries)
        if pinned.any() and vma.has(VmFlag.HUGETLB):
            blocks = block_starts(addresses)
            pinned = among(blocks, blocks[pinned])
            copy_pinned_pages(parent, child, vma, addresses[pinned])
            addresses, entries = addresses[~pinned], entries[~pinned]
        elif pinned.any():
            _copy_pinned(parent, child, vma, addresses[pinned], entries[pinned])
            addresses, entries = addresses[~pinned], entries[~pinned]
        if not addresses.size:
            return
        shared = _read_only(entries)
        try:
            _store(child.table, addresses, shared & ~np.uint64(cpu_pte.ACCESSED))
        except OutOfFramesError:
            if len(run) == 1:
                _store(parent.table, addresses, shared)
                raise
            _share_each(parent, child, run, addresses, entries)  # as far as there are directories
            return
        if not np.array_equal(shared, entries):
            _store(parent.table, addresses, shared)
    else:
        shared = entries
        _store(child.table, addresses, shared & ~np.uint64(cpu_pte.ACCESSED | cpu_pte.DIRTY))
    plain = cpu_pte.are_plain(shared)
    pfns = cpu_pte.cpu_pfn(shared if plain else shared[cpu_pte.holds_frame(shared)])
    parent.frames.map(pfns)
    if not plain:
        slots = slots_of(shared)
        if slots.size:
            area_of(parent.frames).duplicate(slots)
        migrating = cpu_pte.cpu_pfn(shared[cpu_pte.is_migration(shared)])
        pfns = np.concatenate((pfns, migrating))
    parent.frames.clear_flags(pfns, PageFlag.ANON_EXCLUSIVE)


def _share_each(
    parent: AddressSpace, child: AddressSpace, run: list[Vma], addresses: Entries, entries: Entries
) -> None:
    """The same, one VMA after the other."""
    for vma in run:
        first, stop = addresses.searchsorted((np.uint64(vma.start), np.uint64(vma.end)))
        _share(parent, child, [vma], addresses[first:stop], entries[first:stop])


def _stop_at_locked(
    parent: AddressSpace, child: AddressSpace, run: list[Vma], addresses: Entries, entries: Entries
) -> None:
    """Fail at a page that a device has to itself and that is locked, when those before it are shared.

    Source: Linux mm/memory.c, try_restore_exclusive_pte(), which does not wait for the lock.
    """
    locks = parent.frames.locks
    held = np.flatnonzero(cpu_pte.is_device_exclusive(entries)) if locks.held else np.zeros(0, np.int64)
    stuck = held[locks.are_locked(cpu_pte.cpu_pfn(entries[held]))]
    if stuck.size:
        first = int(stuck[0])
        _share(parent, child, run, addresses[:first], entries[:first])
        where = int(addresses[first])
        raise OutOfFramesError(f"fork: a device has {where:#x} to itself, and somebody has it locked", address=where)


def _given_back(parent: AddressSpace, addresses: Entries, entries: Entries) -> Entries:
    """Let the CPU have what devices have to themselves: copy_nonpresent_pte().  Returns: the entries from now on."""
    held = cpu_pte.is_device_exclusive(entries)
    if held.any():
        entries = entries.copy()
        entries[held] = restored(parent, addresses[held], entries[held])
        parent.table.store(addresses[held], entries[held])
    return entries


def _split_pinned(parent: AddressSpace, copied: list[Vma]) -> Operation[None]:
    """Huge pages that must stay the parent's alone are copied by small pages: copy_huge_pmd()."""
    if not parent.huge:
        return
    blocks = [block for vma in copied for block in huge_blocks(parent, vma.span)]
    yield from split_pmds(parent, [block for block in blocks if _has_pinned(parent, block)])


def _has_pinned(parent: AddressSpace, block: AddressRange) -> bool:
    return bool(_pinned(parent, parent.table.read(block.start, block.end)).any())


def _pinned(parent: AddressSpace, entries: Entries) -> npt.NDArray[np.bool_]:
    """Pages that must stay the parent's alone, because devices use them: folio_needs_cow_for_dma()."""
    frames = parent.frames
    if not frames.pinned:
        return np.zeros(entries.size, np.bool_)
    pinned: npt.NDArray[np.bool_] = cpu_pte.holds_frame(entries)
    pfns = cpu_pte.cpu_pfn(entries[pinned])
    pinned[pinned] = are_pinned(frames, pfns) & frames.test_flags(pfns, PageFlag.ANON_EXCLUSIVE)
    return pinned


def _copy_pinned(parent: AddressSpace, child: AddressSpace, vma: Vma, addresses: Entries, entries: Entries) -> None:
    """The child gets copies at once, the parent keeps its pages: copy_present_page()."""
    frames = parent.frames
    copies = frames.allocate_mapped(addresses.size, ANON_PAGE)
    frames.copy(copies, cpu_pte.cpu_pfn(entries))
    flags = WRITTEN if vma.writable else _COPIED
    try:
        child.table.store(addresses, cpu_pte.cpu_entry(copies, flags))
    except OutOfFramesError:
        frames.take_back(copies)
        raise
    child.claim(copies, vma.start)


def _read_only(entries: Entries) -> Entries:
    shared: Entries = entries & ~np.uint64(cpu_pte.WRITE)
    if not int(np.bitwise_or.reduce(entries)) & (cpu_pte.SWAP | cpu_pte.DEVICE):
        return shared
    # copy_nonpresent_pte(), of pages in a device's memory: "We do not preserve soft-dirty information".  That of huge
    # ones copy_huge_non_present_pmd() does preserve.
    shared[(entries & _FORGETTING) == _DEVICE_WRITABLE] &= all_but(cpu_pte.SOFT_DIRTY)
    shared[cpu_pte.is_swap(entries)] &= ~np.uint64(cpu_pte.SWP_EXCLUSIVE)
    return shared


def _store(table: PageTable, addresses: Entries, entries: Entries) -> None:
    start, end = int(addresses[0]), int(addresses[-1]) + PAGE_SIZE
    if end - start == addresses.size << PAGE_SHIFT:
        table.fill(start, end, entries)
    else:
        table.store(addresses, entries)
