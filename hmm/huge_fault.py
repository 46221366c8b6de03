"""Faults on huge pages: what comes to stand in the CPU's page table for a whole block of 2 MiB.

    no page table   read    the huge zero page                                         do_huge_pmd_anonymous_page()
                    write   a new huge page
    read-only       write   becomes writable if nobody else has the page;              do_huge_pmd_wp_page()
                            else the block is split, and its pages are copied one by one

    no page table   file has a huge page: that, unless a private page is written       do_set_pmd()
    read-only       write   of a file: is unmapped, and comes as if it never was there wp_huge_pmd()

Where a huge page cannot be had (the VMA does not cover the block, or no run of frames is free) small pages come.

An entry of a huge page is one entry per page with `cpu_pte.HUGE`, so that everything else works on pages.

**Source**: Linux mm/memory.c (__handle_mm_fault()), mm/huge_memory.c (do_huge_pmd_anonymous_page(),
do_huge_pmd_wp_page(), __thp_vma_allowable_orders()), 6.12.  With a page table huge pages of files are mapped by page
entries (fault_pages.py).

**Invariants**: a huge page comes only where the block has no page table.

**Absent**: how huge pages of files are made (collapse_file.py); sizes between a page and a block; khugepaged.
"""

from __future__ import annotations

import numpy as np

from hmm import cpu_pte
from hmm.address_space import AddressSpace, Thp
from hmm.ascending import unique
from hmm.errors import OutOfFramesError
from hmm.fault_pages import ANON_PAGE, READ_ONLY, WRITTEN, ZERO_PAGE, Attempt, By, file_flags, prepare_anon_vma
from hmm.file import File
from hmm.file_folio import fits, folio_at
from hmm.frames import PageFlag
from hmm.units import PAGE_SHIFT, PMD_MASK, PMD_PAGES, PMD_SHIFT, PMD_SIZE, Address, AddressRange, Entries, block_starts
from hmm.vma import Vma, VmFlag

__all__ = ["blocks_of", "fault_huge", "has_table", "map_huge_of_file", "mark_huge", "reuse_huge"]

_HUGE_ZERO_PAGE = ZERO_PAGE | cpu_pte.HUGE


def fault_huge(attempt: Attempt, vma: Vma, target: AddressRange | Entries) -> None:
    """Handle what of `target` is to be handled by blocks; blocks that must be split first are in `attempt.splits`.

    Args:
        vma: whole; it permits the access.
        target: a part of it, a range or uint64[n] ascending page addresses.

    Cost: O(blocks), some 20 us for each that gets a huge page.
    """
    space = attempt.space
    allowed = _allows_huge(space, vma)
    if not allowed and not space.huge:
        return
    file = vma.backing if isinstance(vma.backing, File) and vma.backing.huge else None
    for start in blocks_of(target):
        entry = space.table.get(start)
        if entry & cpu_pte.HUGE:
            if entry & cpu_pte.PRESENT:
                _touch(attempt, start, entry)
        elif file is not None:
            if not (attempt.write and not vma.shared) and not has_table(space, start):
                _fault_file(attempt, vma, file, start, _first_of(target, start))
        elif allowed and vma.start <= start and start + PMD_SIZE <= vma.end and not has_table(space, start):
            if vma.mapping.userfaultfd:
                prepare_anon_vma(space, vma)  # and the page that is touched is for the handler to bring in
            else:
                _install(space, vma, start, attempt.write)


def _first_of(target: AddressRange | Entries, start: Address) -> Address:
    """The first page of a target that is not below `start`."""
    if isinstance(target, AddressRange):
        return max(target.start, start)
    return int(target[target.searchsorted(np.uint64(start))])


def _fault_file(attempt: Attempt, vma: Vma, file: File, start: Address, touched: Address) -> None:
    """finish_fault() where there is no page table; what is not mapped by a huge entry is left to small pages."""
    offset = vma.page_offset(touched) << PAGE_SHIFT
    if offset < file.size_bytes and not vma.has(VmFlag.UFFD_MINOR):
        map_huge_of_file(attempt.space, vma, file, start, write=attempt.write)


def map_huge_of_file(space: AddressSpace, vma: Vma, file: File, start: Address, *, write: bool) -> bool:
    """Map the large folio of a file's page cache at `start`, a block without a page table: do_set_pmd().

    Returns: whether it is mapped: there is one, it fits into the VMA, which may have huge pages, and nothing of it is
        lost.
    """
    if not fits(vma, start) or vma.has(VmFlag.NOHUGEPAGE):
        return False
    folio = folio_at(file, vma.page_offset(start) << PAGE_SHIFT)
    if folio is None or (space.frames.poisoned and space.frames.test_flags(folio, PageFlag.HWPOISON).any()):
        return False
    flags = file_flags(space, vma, write=write)
    try:
        space.table.fill(start, start + PMD_SIZE, cpu_pte.cpu_entry(folio, flags | cpu_pte.HUGE))
    except OutOfFramesError:
        return False  # no directory: the small page finds that out
    space.tables.discard(start >> PMD_SHIFT)
    space.frames.map(folio)
    if write:
        space.frames.set_flags(folio, PageFlag.DIRTY)
    return True


def _allows_huge(space: AddressSpace, vma: Vma) -> bool:
    """Whether a first touch in this VMA may bring in huge pages: thp_vma_allowable_order()."""
    if not space.thp or vma.backing is not None or vma.has(VmFlag.NOHUGEPAGE):
        return False
    return space.thp is Thp.ALWAYS or vma.has(VmFlag.HUGEPAGE)


def blocks_of(target: AddressRange | Entries) -> list[Address]:
    """Where the blocks start that hold pages of a target, ascending."""
    if isinstance(target, AddressRange):
        return list(range(target.start & PMD_MASK, target.end, PMD_SIZE))
    starts: list[Address] = unique(block_starts(target)).tolist()
    return starts


def has_table(space: AddressSpace, start: Address) -> bool:
    """Whether the block has a page table: its entry in the directory above is not pmd_none()."""
    if start >> PMD_SHIFT in space.tables:
        return True
    return space.table.holds(start, start + PMD_SIZE)


def _install(space: AddressSpace, vma: Vma, start: Address, write: bool) -> None:
    """do_huge_pmd_anonymous_page(); nothing when there is no memory for it, as small pages may do."""
    prepare_anon_vma(space, vma)
    try:
        if not write:
            space.table.fill(start, start + PMD_SIZE, _HUGE_ZERO_PAGE)
            space.huge = True
            return
        pfns = space.frames.allocate_huge(ANON_PAGE)
        if pfns is None:
            return
        try:
            space.table.fill(start, start + PMD_SIZE, cpu_pte.cpu_entry(pfns, WRITTEN | cpu_pte.HUGE))
        except OutOfFramesError:
            space.frames.unmap(pfns)
            raise
    except OutOfFramesError:
        return  # no directory: the small page finds that out
    space.claim(pfns, start)
    space.huge = True


def _touch(attempt: Attempt, start: Address, entry: int) -> None:
    """A block that a huge page is mapped at."""
    space = attempt.space
    if attempt.write and not entry & cpu_pte.WRITE:
        if not reuse_huge(space, start, entry):
            attempt.splits.append(start)
            return
        bits = WRITTEN
    elif attempt.by is By.GUP:
        return
    else:
        bits = READ_ONLY | (attempt.used_bits if attempt.write else 0)
    if entry & bits != bits:
        mark_huge(space, start, bits)


def reuse_huge(space: AddressSpace, start: Address, entry: int) -> bool:
    """Make a huge page that is mapped at `start` by `entry` its process's own if it is, or if nobody else refers to it.

    Returns: whether it is; then it may become writable.
    """
    if entry & cpu_pte.SPECIAL:
        return False
    frames, head = space.frames, cpu_pte.cpu_pfn(entry)
    if frames.flags_of(head) & PageFlag.ANON_EXCLUSIVE:
        return True
    if (frames.refcount[head : head + PMD_PAGES] != 1).any():
        return False
    pfns = np.arange(head, head + PMD_PAGES)
    frames.set_flags(pfns, PageFlag.ANON_EXCLUSIVE)
    space.claim(pfns, start)
    return True


def mark_huge(space: AddressSpace, address: Address, bits: int) -> None:
    """Set flags in the entry of the huge page that an address lies in."""
    start = address & PMD_MASK

    def mark(entries: Entries) -> None:
        entries |= np.uint64(bits)

    space.table.update(start, start + PMD_SIZE, mark)
