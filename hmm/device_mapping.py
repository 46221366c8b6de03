"""A driver's device file in a process's memory: what its mmap puts into the page table at once.

    VM_MIXEDMAP    zeroed pages of the mapping's own, with struct page: vm_insert_page()
    VM_PFNMAP      registers: frame numbers that are nobody's memory: remap_pfn_range()

There is no fault handler: a page that is dropped stays away, and touching it is SIGBUS.

**Source**: Linux mm/memory.c, vm_insert_page(), remap_pfn_range(); lib/test_hmm.c, dmirror_fops_mmap().

**Absent**: what a register does.
"""

from __future__ import annotations

import numpy as np

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.errors import OutOfFramesError
from hmm.fault_pages import READ_ONLY
from hmm.file import File, FileKind
from hmm.units import PAGE_SHIFT, AddressRange
from hmm.vma import Mapping, VmFlag

__all__ = ["map_device"]


def map_device(space: AddressSpace, span: AddressRange, mapping: Mapping) -> None:
    """Fill the page table for a mapping of a device file that is about to be made; others are left alone.

    Args:
        span: page-aligned, without entries.

    Raises:
        OutOfFramesError: too few frames or directories; nothing was changed (ENOMEM).

    Cost: O(pages), vectorised.
    """
    file = mapping.backing
    if not isinstance(file, File) or file.kind is not FileKind.DEVICE:
        return
    index = np.arange(span.start >> PAGE_SHIFT, span.end >> PAGE_SHIFT) + mapping.delta
    flags = READ_ONLY | (cpu_pte.WRITE if mapping.shared and mapping.writable else 0)
    if mapping.has(VmFlag.PFNMAP):
        pfns = index + file.first_register
        space.table.fill(span.start, span.end, cpu_pte.cpu_entry(pfns, flags | cpu_pte.SPECIAL))
    elif mapping.has(VmFlag.MIXEDMAP):
        pfns = space.frames.allocate(span.npages)
        try:
            space.table.fill(span.start, span.end, cpu_pte.cpu_entry(pfns, flags))
        except OutOfFramesError:
            space.frames.put(pfns)
            raise
        space.frames.belong(pfns, file.id, index)
        space.frames.map_new(pfns)
