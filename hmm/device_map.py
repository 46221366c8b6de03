"""What a driver's mmap puts into the page table at once: pages of its own, or registers.

Such mappings have no fault handler, so every entry is there from the start; what is unmapped or discarded later
stays away.

**Source**: Linux mm/memory.c (vm_insert_page(), remap_pfn_range()), 6.12.

**Invariants**: pages (VM_MIXEDMAP) are counted like any other; registers (VM_PFNMAP) are entries without struct page.

**Absent**: what the driver keeps for itself: a page lives as long as it is mapped.
"""

from __future__ import annotations

import numpy as np

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.errors import OutOfFramesError
from hmm.fault_pages import READ_ONLY
from hmm.file import File
from hmm.operation import Operation, Pause
from hmm.units import PAGE_SHIFT, PIECE_BYTES, AddressRange
from hmm.vma import Mapping, VmFlag
from hmm.vma_edit import zap

__all__ = ["map_device"]


def map_device(space: AddressSpace, span: AddressRange, mapping: Mapping) -> Operation[None]:
    """Fill `span`, just mapped from a device file, as its driver does.

    Raises:
        OutOfFramesError: too few frames or directories; `span` is empty and still mapped (ENOMEM).

    Cost: O(pages), vectorised.
    """
    if not isinstance(mapping.backing, File) or not mapping.has(VmFlag.MIXEDMAP | VmFlag.PFNMAP):
        return
    # vm_page_prot of a private mapping does not permit writing: the first write makes a copy.
    flags = READ_ONLY | (cpu_pte.WRITE if mapping.shared and mapping.writable else 0)
    try:
        for start in range(span.start, span.end, PIECE_BYTES):
            if start != span.start:
                yield Pause()
            piece = AddressRange(start, min(start + PIECE_BYTES, span.end))
            if mapping.has(VmFlag.PFNMAP):
                _map_registers(space, piece, mapping.backing.first_register + mapping.delta, flags)
            else:
                frames = space.frames
                if frames.available < piece.npages and frames.make_room:
                    yield from frames.make_room(piece.npages)
                _map_pages(space, piece, flags)
    except OutOfFramesError:
        yield from zap(space, span)
        raise


def _map_pages(space: AddressSpace, span: AddressRange, flags: int) -> None:
    pfns = space.frames.allocate(span.npages)
    try:
        space.table.fill(span.start, span.end, cpu_pte.cpu_entry(pfns, flags))
    except OutOfFramesError:
        space.frames.put(pfns)
        raise
    space.frames.map_new(pfns)


def _map_registers(space: AddressSpace, span: AddressRange, shift: int, flags: int) -> None:
    first = (span.start >> PAGE_SHIFT) + shift
    pfns = np.arange(first, first + span.npages, dtype=np.int64)
    space.table.fill(span.start, span.end, cpu_pte.cpu_entry(pfns, flags | cpu_pte.SPECIAL))
