"""Entries of a mirror's page table, and of the directories above them.

An entry is one word. Bits 0 to 5 are HMM's, bits 8 to 11 the driver's own, and from bit 12 up is a value
whose meaning the VALID bit says: a frame number, an address of the device's bus (DMA), or an address of the
device's memory. The layout is the final one of the 2015 series:

    63                     12 11      8 7 6   5     4     3      2         1         0
    value                     driver    -   DIRTY WRITE SELECT VALID_PFN VALID_DMA VALID_DEV

At most one VALID bit is set. An entry without one but not zero is a transient that its owner is about to
replace; it keeps its place in the table. A value that is asked for under the wrong VALID bit reads as a
sentinel.

All functions take a uint64 array or a Python int. What changes entries does so in place in an array, as the
kernel's helpers do through a pointer, and returns the array; an int comes back changed.

After a driver has answered an event, HMM applies the event's mask, `entry &= mask`: MASK_ALL changes nothing;
MASK_WRITE_PROTECT takes WRITE away and keeps the value, DIRTY and the driver's bits; MASK_NONE erases all of
it.

**Source**: the 2015 series, include/linux/hmm_pt.h as of patch 18 of 36 ("HMM: add new HMM page table flag
(select flag)"): hmm_pte_*(), hmm_pde_*().

**Invariants**: none here; who writes entries keeps DIRTY only with WRITE, and at most one VALID bit.

**Absent**: where entries are kept (`hmm.page_table`), what frame numbers name; the CPU's entries
(`hmm.cpu_pte`).

Differs: the kernel's helpers are atomic, for DIRTY alone, which a device may set at any time. Here devices
set it by a message, in its turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt

from hmm.page_geometry import DIRECTORY_SHIFT
from hmm.units import PAGE_MASK, PAGE_SHIFT, ULONG_MAX, Entries, Pfns

Mask = npt.NDArray[np.bool_]

VALID_DEV = 1 << 0
"""The value is an address in the device's memory."""
VALID_DMA = 1 << 1
"""The value is an address on the device's bus."""
VALID_PFN = 1 << 2
"""The value is the number of a system frame."""
SELECT = 1 << 3
"""Chosen for the step that a migration or a DMA mapping is about to do."""
WRITE = 1 << 4
"""The device may write."""
DIRTY = 1 << 5
"""The device has written."""
VALID = VALID_DEV | VALID_DMA | VALID_PFN

HW_SHIFT = 8
"""Lowest bit of the driver's own (HMM_PTE_HW_SHIFT)."""
DRIVER_MASK = 0xF << HW_SHIFT

MASK_ALL = ULONG_MAX
MASK_WRITE_PROTECT = MASK_ALL & ~WRITE
MASK_NONE = 0

NO_DEV_ADDR = MASK_ALL
"""What `pte_dev_addr()` gives for an entry that is not in device memory."""


@dataclass(frozen=True, slots=True)
class _Bit:
    """The five helpers of one bit."""

    bit: int

    @overload
    def test(self, entries: int) -> bool: ...
    @overload
    def test(self, entries: Entries) -> Mask: ...
    def test(self, entries: int | Entries) -> bool | Mask:
        """Whether the bit is set; bool, or bool[n]."""
        if isinstance(entries, int):
            return entries & self.bit != 0
        found: Mask = (entries & np.uint64(self.bit)) != 0
        return found

    @overload
    def set(self, entries: int) -> int: ...
    @overload
    def set(self, entries: Entries) -> Entries: ...
    def set(self, entries: int | Entries) -> int | Entries:
        """Set the bit, in place in an array; returns the entries."""
        if isinstance(entries, int):
            return entries | self.bit
        entries |= np.uint64(self.bit)
        return entries

    @overload
    def clear(self, entries: int) -> int: ...
    @overload
    def clear(self, entries: Entries) -> Entries: ...
    def clear(self, entries: int | Entries) -> int | Entries:
        """Clear the bit, in place in an array; returns the entries."""
        if isinstance(entries, int):
            return entries & ~self.bit
        entries &= np.uint64(MASK_ALL & ~self.bit)
        return entries

    def test_and_set(self, entries: Entries) -> Mask:
        """Set the bit in an array; bool[n], where it was set before."""
        before = self.test(entries)
        self.set(entries)
        return before

    def test_and_clear(self, entries: Entries) -> Mask:
        """Clear the bit in an array; bool[n], where it was set before."""
        before = self.test(entries)
        self.clear(entries)
        return before


_valid_dev = _Bit(VALID_DEV)
pte_test_valid_dev = _valid_dev.test
pte_set_valid_dev = _valid_dev.set
pte_clear_valid_dev = _valid_dev.clear
pte_test_and_set_valid_dev = _valid_dev.test_and_set
pte_test_and_clear_valid_dev = _valid_dev.test_and_clear

_valid_dma = _Bit(VALID_DMA)
pte_test_valid_dma = _valid_dma.test
pte_set_valid_dma = _valid_dma.set
pte_clear_valid_dma = _valid_dma.clear
pte_test_and_set_valid_dma = _valid_dma.test_and_set
pte_test_and_clear_valid_dma = _valid_dma.test_and_clear

_valid_pfn = _Bit(VALID_PFN)
pte_test_valid_pfn = _valid_pfn.test
pte_set_valid_pfn = _valid_pfn.set
pte_clear_valid_pfn = _valid_pfn.clear
pte_test_and_set_valid_pfn = _valid_pfn.test_and_set
pte_test_and_clear_valid_pfn = _valid_pfn.test_and_clear

_select = _Bit(SELECT)
pte_test_select = _select.test
pte_set_select = _select.set
pte_clear_select = _select.clear
pte_test_and_set_select = _select.test_and_set
pte_test_and_clear_select = _select.test_and_clear

_write = _Bit(WRITE)
pte_test_write = _write.test
pte_set_write = _write.set
pte_clear_write = _write.clear
pte_test_and_set_write = _write.test_and_set
pte_test_and_clear_write = _write.test_and_clear

_dirty = _Bit(DIRTY)
pte_test_dirty = _dirty.test
pte_set_dirty = _dirty.set
pte_clear_dirty = _dirty.clear
pte_test_and_set_dirty = _dirty.test_and_set
pte_test_and_clear_dirty = _dirty.test_and_clear


# -- making entries


@overload
def pte_from_pfn(pfns: int) -> int: ...
@overload
def pte_from_pfn(pfns: Pfns | Entries) -> Entries: ...
def pte_from_pfn(pfns: int | Pfns | Entries) -> int | Entries:
    """Entries for system frames: int for an int, uint64[n] for int64[n] or uint64[n]."""
    if isinstance(pfns, int):
        return pfns << PAGE_SHIFT | VALID_PFN
    entries = pfns.astype(np.uint64)
    entries <<= np.uint64(PAGE_SHIFT)
    entries |= np.uint64(VALID_PFN)
    return entries


@overload
def pte_from_dma_addr(addresses: int) -> int: ...
@overload
def pte_from_dma_addr(addresses: Entries) -> Entries: ...
def pte_from_dma_addr(addresses: int | Entries) -> int | Entries:
    """Entries for pages at bus addresses, in bytes; bits within the page are dropped."""
    return _from_address(addresses, VALID_DMA)


@overload
def pte_from_dev_addr(addresses: int) -> int: ...
@overload
def pte_from_dev_addr(addresses: Entries) -> Entries: ...
def pte_from_dev_addr(addresses: int | Entries) -> int | Entries:
    """Entries for pages at addresses of the device's memory, in bytes; bits within the page are dropped."""
    return _from_address(addresses, VALID_DEV)


def _from_address(addresses: int | Entries, valid: int) -> int | Entries:
    if isinstance(addresses, int):
        return addresses & PAGE_MASK | valid
    entries = addresses & np.uint64(PAGE_MASK & MASK_ALL)
    entries |= np.uint64(valid)
    return entries


# -- reading values


@overload
def pte_pfn(entries: int) -> int: ...
@overload
def pte_pfn(entries: Entries) -> Pfns: ...
def pte_pfn(entries: int | Entries) -> int | Pfns:
    """Frame numbers; 0 where VALID_PFN is clear. int, or int64[n], an index dtype."""
    if isinstance(entries, int):
        return entries >> PAGE_SHIFT if entries & VALID_PFN else 0
    pfns: Pfns = (entries >> np.uint64(PAGE_SHIFT)).view(np.int64)
    pfns *= pte_test_valid_pfn(entries)
    return pfns


@overload
def pte_dma_addr(entries: int) -> int: ...
@overload
def pte_dma_addr(entries: Entries) -> Entries: ...
def pte_dma_addr(entries: int | Entries) -> int | Entries:
    """Bus addresses in bytes; 0 where VALID_DMA is clear."""
    if isinstance(entries, int):
        return entries & PAGE_MASK if entries & VALID_DMA else 0
    addresses = entries & np.uint64(PAGE_MASK & MASK_ALL)
    addresses *= pte_test_valid_dma(entries)
    return addresses


@overload
def pte_dev_addr(entries: int) -> int: ...
@overload
def pte_dev_addr(entries: Entries) -> Entries: ...
def pte_dev_addr(entries: int | Entries) -> int | Entries:
    """Addresses of device memory in bytes; NO_DEV_ADDR, all ones, where VALID_DEV is clear."""
    if isinstance(entries, int):
        return entries & PAGE_MASK if entries & VALID_DEV else NO_DEV_ADDR
    addresses = entries & np.uint64(PAGE_MASK & MASK_ALL)
    addresses[~pte_test_valid_dev(entries)] = NO_DEV_ADDR
    return addresses


# -- the driver's own bits


@overload
def pte_driver(entries: int) -> int: ...
@overload
def pte_driver(entries: Entries) -> Entries: ...
def pte_driver(entries: int | Entries) -> int | Entries:
    """The driver's own bits, as a number from 0 to 15."""
    if isinstance(entries, int):
        return (entries & DRIVER_MASK) >> HW_SHIFT
    return (entries & np.uint64(DRIVER_MASK)) >> np.uint64(HW_SHIFT)


@overload
def pte_set_driver(entries: int, bits: int) -> int: ...
@overload
def pte_set_driver(entries: Entries, bits: int | Entries) -> Entries: ...
def pte_set_driver(entries: int | Entries, bits: int | Entries) -> int | Entries:
    """Set the driver's own bits of valid entries; others stay, since HMM would overwrite them.

    Args:
        bits: 0 to 15; for an array one for all, or uint64[n].

    Returns: the entries, an array changed in place.
    """
    if isinstance(entries, int):
        if not entries & VALID:
            return entries
        return entries & ~DRIVER_MASK | int(bits) << HW_SHIFT
    changed = entries & np.uint64(MASK_ALL & ~DRIVER_MASK)
    changed |= np.asarray(bits, np.uint64) << np.uint64(HW_SHIFT)
    np.copyto(entries, changed, where=(entries & np.uint64(VALID)) != 0)
    return entries


# -- entries of the directories above


@overload
def pde_from_row(rows: int) -> int: ...
@overload
def pde_from_row(rows: Pfns) -> Pfns: ...
def pde_from_row(rows: int | Pfns) -> int | Pfns:
    """Directory entries that name these rows of the arena; 0, which is row 0, names no directory.

    Differs: the kernel's is the directory's frame number with a VALID bit. A row is shifted to where its
    first entry is in the arena, so that a walk adds an index and has the place of the next entry.
    """
    return rows << DIRECTORY_SHIFT


@overload
def pde_row(entries: int) -> int: ...
@overload
def pde_row(entries: Pfns) -> Pfns: ...
def pde_row(entries: int | Pfns) -> int | Pfns:
    """Rows of the arena that directory entries name; 0 for none."""
    return entries >> DIRECTORY_SHIFT
