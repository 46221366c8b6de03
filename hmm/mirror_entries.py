"""A mirror's entries, from the CPU's: the same frames with the same permission, or DMA addresses in their place.

**Source**: linux-mm, "HMM: add device page fault support v3", hmm_mirror_fault_pmd(); "HMM: DMA map memory on behalf of
device driver v2".

**Invariants**: an entry permits writing only if the CPU's does, or is of a page in the device's own memory; what was
dirty stays so.

**Absent**: when entries may be written (device_fault.py, mirror_migrate.py).

A page in the device's own memory stays there: its entry is valid already, and a write fault that the VMA permits sets
WRITE ("HMM: allow to get pte entry from device memory", patch 19).

Differs: the posted code did not upgrade WRITE in an entry that was mapped for DMA already; this does.
"""

from __future__ import annotations

from typing import overload

import numpy as np

from hmm import cpu_pte, pte
from hmm.fault import addresses_of
from hmm.iommu import Domain
from hmm.mirror import Mirror
from hmm.page_table import PageTable
from hmm.units import PAGE_MASK, PAGE_SIZE, ULONG_MAX, AddressRange, Entries

__all__ = ["entries_of", "held_for_writing", "install"]

_PFN_MASK = PAGE_MASK & ULONG_MAX
_TO_WRITE = pte.WRITE.bit_length() - cpu_pte.WRITE.bit_length()
"""Both kinds of entries have the frame number at the same place; WRITE has to be moved."""
_KEPT = pte.DIRTY | pte.DRIVER_MASK
"""What a fault leaves alone in a mirror's entry."""
_IN_SYSTEM = pte.VALID_PFN | pte.VALID_DMA
_STAYING = _KEPT | pte.VALID_DMA
"""With one of these an entry is not simply written anew."""
# numpy takes an array without dimensions twice as fast as an int
_PFN, _VALID, _WRITABLE = (np.array(bits, np.uint64) for bits in (_PFN_MASK, pte.VALID_PFN, pte.VALID_PFN | pte.WRITE))


def entries_of(table: PageTable, target: AddressRange | Entries) -> Entries:
    """uint64[n]: what a table has for a range, or for scattered pages."""
    return table.read(target.start, target.end) if isinstance(target, AddressRange) else table.lookup(target)


def install(
    mirror: Mirror, target: AddressRange | Entries, present: Entries | None = None, *, write: bool
) -> Entries | None:
    """Copy frame and permission of every page into the mirror; what was dirty or the driver's own stays.

    Args:
        present: uint64[npages], the CPU's entries of these pages, which are overwritten; None: to be read.

    Returns: uint64[npages], what the mirror has now; None if that is not known.
    """
    table, cpu, domain = mirror.table, mirror.space.table, mirror.domain
    asked = target
    if mirror.home is not None and mirror.home.region.used:
        target = _permit_on_device(mirror, target, write)
        present = present if target is asked else None
    if not domain and isinstance(target, AddressRange) and target.end - target.start == PAGE_SIZE:
        page = target.start
        word = _mirrored(cpu.get(page), write) | table.get(page) & _KEPT
        table.set(page, word)
        return np.array((word,), np.uint64)
    entries = _mirrored(entries_of(cpu, target) if present is None else present, write)
    if domain:
        _map_for_dma(domain, entries, entries_of(table, target), target)
    if isinstance(target, AddressRange):
        if not domain and table.either(target.start, target.end) & _KEPT:
            entries |= table.read(target.start, target.end) & np.uint64(_KEPT)
        table.fill(target.start, target.end, entries, in_use=True)
    else:
        kept = table.store(target, entries) & np.uint64(_KEPT)  # only storing them has to find where they are
        if not domain and np.count_nonzero(kept):
            entries |= kept
            table.store(target, entries)
    return entries if target is asked else None


def held_for_writing(mirror: Mirror, target: AddressRange | Entries) -> Entries | None:
    """uint64[npages]: what the mirror has, if it has all of it for writing; else None.

    Then so has the CPU, and no entry would change.  Where pages are on their way between memories, entries of a mirror
    may outlast the CPU's for a while.
    """
    if mirror.space.notifier.copies:
        return None
    first = mirror.table.get(target.start if isinstance(target, AddressRange) else int(target[0]))
    if not (first & pte.WRITE and first & _IN_SYSTEM):
        return None
    if isinstance(target, AddressRange) and target.end - target.start == PAGE_SIZE:
        return np.array((first,), np.uint64)
    entries = entries_of(mirror.table, target)
    held = int(np.bitwise_and.reduce(entries))
    return entries if held & pte.WRITE and held & _IN_SYSTEM else None


def _permit_on_device(mirror: Mirror, target: AddressRange | Entries, write: bool) -> AddressRange | Entries:
    """Let the device write what it has, if it is to: the VMA permits it.  Returns: the pages in system memory."""
    addresses = addresses_of(target)
    entries = mirror.table.lookup(addresses)
    own = pte.pte_test_valid_dev(entries)
    if not own.any():
        return target
    if write:
        mirror.table.store(addresses[own], pte.pte_set_write(entries[own]))
    rest: Entries = addresses[~own]
    return rest


@overload
def _mirrored(cpu: int, writable: bool) -> int: ...
@overload
def _mirrored(cpu: Entries, writable: bool) -> Entries: ...
def _mirrored(cpu: int | Entries, writable: bool) -> int | Entries:
    """Entries of a mirror from the CPU's, in place in an array; `writable` when all are known to be."""
    if isinstance(cpu, int):
        return cpu & _PFN_MASK | (cpu & cpu_pte.WRITE) << _TO_WRITE | pte.VALID_PFN
    if writable:
        cpu &= _PFN
        cpu |= _WRITABLE
        return cpu
    permitted = cpu & np.uint64(cpu_pte.WRITE)
    permitted <<= np.uint64(_TO_WRITE)
    cpu &= _PFN
    cpu |= _VALID
    cpu |= permitted
    return cpu


def _map_for_dma(domain: Domain, entries: Entries, old: Entries, target: AddressRange | Entries) -> None:
    """Turn the frame numbers that are new into DMA addresses; WRITE and DIRTY survive, the driver's bits do not.

    Args:
        old: what the mirror had; of what is mapped for DMA already everything stays.
    """
    if int(np.bitwise_or.reduce(old)) & _STAYING:
        entries |= old & np.uint64(_KEPT)
        mapped = pte.pte_test_valid_dma(old)
        entries[mapped] = old[mapped] | (entries[mapped] & np.uint64(pte.WRITE))
    fresh = ~pte.pte_test_valid_dma(entries)
    if fresh.any():
        iovas = domain.map(pte.pte_pfn(entries[fresh]), addresses_of(target)[fresh])
        entries[fresh] = pte.pte_from_dma_addr(iovas) | (entries[fresh] & np.uint64(pte.WRITE | pte.DIRTY))
