"""/proc/PID/pagemap: what each page of a range is backed by, one 64-bit word per page.

    0-54  PFN             the frame; 0 for a page that is not present; of one in swap 0-4 the area, 0, and 5-54 its slot
    55    SOFT_DIRTY      written, or mapped, since the bits were cleared (clear_refs.py)
    56    MMAP_EXCLUSIVE  present, and mapped exactly once
    61    FILE            a page of a file or of shared memory
    62    SWAP            not present: in swap, on a device, taken from the CPU by one, or lost
    63    PRESENT

**Source**: Linux fs/proc/task_mmu.c (pte_to_pagemap_entry(), pagemap_pte_hole()),
Documentation/admin-guide/mm/pagemap.rst, 6.12.

**Invariants**: nothing is changed by looking.

**Absent**: the type and offset of pages that are with a device, userfaultfd's bit.
"""

from __future__ import annotations

import numpy as np

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.errors import InvalidRequestError
from hmm.frames import PageFlag
from hmm.units import PAGE_SHIFT, TASK_SIZE, AddressRange, Entries, is_page_aligned
from hmm.vma import VmFlag

__all__ = ["FILE", "MMAP_EXCLUSIVE", "PFN_MASK", "PRESENT", "SOFT_DIRTY", "SWAP", "SWAP_OFFSET_SHIFT", "pagemap"]

PFN_MASK = (1 << 55) - 1
SWAP_OFFSET_SHIFT = 5
SOFT_DIRTY = 1 << 55
MMAP_EXCLUSIVE = 1 << 56
FILE = 1 << 61
SWAP = 1 << 62
PRESENT = 1 << 63


def pagemap(space: AddressSpace, span: AddressRange) -> Entries:
    """The words of a range; 0 where nothing is mapped, or nothing is behind it yet.

    Returns: uint64[npages].

    Raises:
        InvalidRequestError: an unaligned range, or one beyond the address space (EINVAL).

    Cost: O(npages), vectorised.
    """
    if not is_page_aligned(span.start | span.end) or span.end > TASK_SIZE:
        raise InvalidRequestError(f"pagemap: {span} is not a range of pages", address=span.start)
    entries = space.table.read(span.start, span.end)
    words = np.zeros(entries.size, np.uint64)
    present = cpu_pte.is_present(entries)
    held = np.flatnonzero(cpu_pte.holds_frame(entries) | cpu_pte.is_hwpoison(entries))
    pfns = cpu_pte.cpu_pfn(entries[held])
    here = present[held]
    words[present] = np.uint64(PRESENT)
    words[held[here]] |= pfns[here].view(np.uint64) & np.uint64(PFN_MASK)
    swapped = cpu_pte.is_swap(entries)
    slots = cpu_pte.cpu_pfn(entries[swapped]).view(np.uint64)
    words[swapped] = np.uint64(SWAP) | (slots << np.uint64(SWAP_OFFSET_SHIFT))
    away = (entries & np.uint64(cpu_pte.NON_PRESENT)) != 0
    words[away] |= np.uint64(SWAP)
    words[held[~space.frames.test_flags(pfns, PageFlag.ANON)]] |= np.uint64(FILE)
    words[cpu_pte.is_huge_zero(entries)] |= np.uint64(FILE)  # a page, and not anonymous: pagemap_pmd_range()
    words[held[here & (space.frames.mapcount[pfns] == 1)]] |= np.uint64(MMAP_EXCLUSIVE)
    words[(entries & np.uint64(cpu_pte.SOFT_DIRTY)) != 0] |= np.uint64(SOFT_DIRTY)
    for vma in space.vmas.mapped_pieces(span):
        first = (vma.start - span.start) >> PAGE_SHIFT
        if vma.has(VmFlag.PFNMAP):  # registers show as a hole: walk_page_test()
            words[first : first + vma.npages] = 0
        if space.is_soft_dirty(vma):  # all of a new mapping is, whether or not it was written
            words[first : first + vma.npages] |= np.uint64(SOFT_DIRTY)
        elif vma.has(VmFlag.HUGETLB):  # pagemap_hugetlb_range() knows of nothing else
            words[first : first + vma.npages] &= ~np.uint64(SOFT_DIRTY)
    return words
