"""Entries of the CPU page table.

An entry is one word: flags in bits 0 to 11, a frame number from bit 12 up. The word 0 is an empty entry
(`pte_none()`); every other word is in use, whether or not it can be reached by the CPU. As in the kernel an
entry is either *present* (it translates an address) or *non-present* (it records where the page is: on a
device, held exclusively by a device, in swap, being migrated, or lost).

All functions work on uint64 arrays elementwise, and on Python ints one entry at a time.

**Source**: Linux include/linux/pgtable.h (present entries), include/linux/swapops.h (device-private,
device-exclusive, migration and swap entries, hardware poison).

**Invariants** (kept by the address space, which writes the entries): exactly one of `PRESENT`, `DEVICE`,
`EXCLUSIVE`, `SWAP`, `MIGRATION`, `POISON` is set in an entry that is in use; `SPECIAL` occurs only with `PRESENT`,
`HUGE` with it, `DEVICE` and `MIGRATION`, and in swap entries the bit of `ACCESSED` is `SWP_EXCLUSIVE`.

**Absent**: who may reach a page (that is the VMA's protection), and what a frame number means.

Differs: the kernel packs a swap type and offset into a non-present entry; here the kind is a flag and the
rest of the word is the frame or slot number, so that one shift serves every kind.
"""

from __future__ import annotations

from functools import lru_cache
from typing import overload

import numpy as np
import numpy.typing as npt

from hmm.units import Entries, Pfns

__all__ = [
    "ACCESSED",
    "DEVICE",
    "DIRTY",
    "EXCLUSIVE",
    "FLAGS",
    "HUGE",
    "MIGRATION",
    "NON_PRESENT",
    "PFN_MAX",
    "PFN_SHIFT",
    "POISON",
    "PRESENT",
    "SOFT_DIRTY",
    "SPECIAL",
    "SWAP",
    "SWP_EXCLUSIVE",
    "WRITE",
    "are_plain",
    "cpu_entry",
    "cpu_flags",
    "cpu_pfn",
    "having",
    "holds_frame",
    "is_device_exclusive",
    "is_device_private",
    "is_dirty",
    "is_huge",
    "is_huge_zero",
    "is_hwpoison",
    "is_migration",
    "is_none",
    "is_poison",
    "is_present",
    "is_special",
    "is_swap",
    "is_writable",
]

PRESENT = 1 << 0
WRITE = 1 << 1
DIRTY = 1 << 2
ACCESSED = 1 << 3
SOFT_DIRTY = 1 << 4
HUGE = 1 << 5
SPECIAL = 1 << 6
"""A mapping without struct page: the zero page, a device's registers."""
DEVICE = 1 << 7
"""The page is in device-private memory; the frame number names the device's frame."""
EXCLUSIVE = 1 << 8
"""A device holds the page for atomic access; the frame number still names the system frame."""
SWAP = 1 << 9
"""The page is in swap; the frame number names the slot."""
SWP_EXCLUSIVE = ACCESSED
"""Of a swap entry: the page is this process's alone (`pte_swp_exclusive()`)."""
MIGRATION = 1 << 10
"""A migration owns the page; whoever touches it waits."""
POISON = 1 << 11
"""The contents are lost; a touch is SIGBUS.  The frame number names the frame, 0 where a device had the page."""

PFN_SHIFT = 12
FLAGS = (1 << PFN_SHIFT) - 1
PFN_MAX = (1 << 52) - 1
NON_PRESENT = DEVICE | EXCLUSIVE | SWAP | MIGRATION | POISON

# numpy takes an array without dimensions twice as fast as an int
_SHIFT, _NONE = np.array(PFN_SHIFT, np.uint64), np.array(0, np.uint64)

Mask = npt.NDArray[np.bool_]


@overload
def cpu_entry(pfns: int, flags: int) -> int: ...
@overload
def cpu_entry(pfns: Pfns | Entries, flags: int | Entries) -> Entries: ...
@overload
def cpu_entry(pfns: Pfns | slice, flags: int) -> Entries: ...
def cpu_entry(pfns: int | Pfns | Entries | slice, flags: int | Entries) -> int | Entries:
    """Build entries from frame numbers and flags (`pfn_pte()`, `make_device_private_entry()` and so on).

    Args:
        pfns: frame numbers, 0 to PFN_MAX; int, or int64[n] or uint64[n], or a slice of consecutive ones.
        flags: bits 0 to 11; for an array of frames one int for all, or uint64[n].

    Returns: int for an int, else uint64[n].
    """
    if isinstance(pfns, int):
        return pfns << PFN_SHIFT | int(flags)
    if isinstance(pfns, slice):
        first, behind = pfns.start << PFN_SHIFT | int(flags), pfns.stop << PFN_SHIFT
        return np.arange(first, behind, 1 << PFN_SHIFT, dtype=np.uint64)
    entries: Entries = pfns.view(np.uint64) << _SHIFT
    entries |= _word(flags) if isinstance(flags, int) else flags
    return entries


@lru_cache(maxsize=64)
def _word(flags: int) -> Entries:
    return np.array(flags, np.uint64)  # without dimensions


@overload
def cpu_pfn(entries: int) -> int: ...
@overload
def cpu_pfn(entries: Entries) -> Pfns: ...
def cpu_pfn(entries: int | Entries) -> int | Pfns:
    """Frame numbers of entries, whatever their kind; int for an int, else int64[n] (an index dtype)."""
    if isinstance(entries, int):
        return entries >> PFN_SHIFT
    return (entries >> _SHIFT).view(np.int64)


@overload
def cpu_flags(entries: int) -> int: ...
@overload
def cpu_flags(entries: Entries) -> Entries: ...
def cpu_flags(entries: int | Entries) -> int | Entries:
    """Bits 0 to 11 of entries."""
    if isinstance(entries, int):
        return entries & FLAGS
    return entries & _word(FLAGS)


@overload
def _any_of(entries: int, bits: int) -> bool: ...
@overload
def _any_of(entries: Entries, bits: int) -> Mask: ...
def _any_of(entries: int | Entries, bits: int) -> bool | Mask:
    if isinstance(entries, int):
        return entries & bits != 0
    found: Mask = (entries & _word(bits)) != _NONE
    return found


@overload
def is_none(entries: int) -> bool: ...
@overload
def is_none(entries: Entries) -> Mask: ...
def is_none(entries: int | Entries) -> bool | Mask:
    """Whether entries are empty (`pte_none()`)."""
    return entries == 0


@overload
def is_present(entries: int) -> bool: ...
@overload
def is_present(entries: Entries) -> Mask: ...
def is_present(entries: int | Entries) -> bool | Mask:
    """Whether entries translate an address (`pte_present()`)."""
    return _any_of(entries, PRESENT)


@overload
def is_writable(entries: int) -> bool: ...
@overload
def is_writable(entries: Entries) -> Mask: ...
def is_writable(entries: int | Entries) -> bool | Mask:
    """Whether entries permit writing (`pte_write()`)."""
    return _any_of(entries, WRITE)


@overload
def is_dirty(entries: int) -> bool: ...
@overload
def is_dirty(entries: Entries) -> Mask: ...
def is_dirty(entries: int | Entries) -> bool | Mask:
    """Whether entries record a write (`pte_dirty()`)."""
    return _any_of(entries, DIRTY)


@overload
def is_huge(entries: int) -> bool: ...
@overload
def is_huge(entries: Entries) -> Mask: ...
def is_huge(entries: int | Entries) -> bool | Mask:
    """Whether entries are part of a huge one (`pmd_trans_huge()`, or of hugetlb)."""
    return _any_of(entries, HUGE)


@overload
def is_huge_zero(entries: int) -> bool: ...
@overload
def is_huge_zero(entries: Entries) -> Mask: ...
def is_huge_zero(entries: int | Entries) -> bool | Mask:
    """Whether entries are part of the huge zero page (`is_huge_zero_pmd()`)."""
    if isinstance(entries, int):
        return entries & (HUGE | SPECIAL) == HUGE | SPECIAL
    found: Mask = (entries & np.uint64(HUGE | SPECIAL)) == HUGE | SPECIAL
    return found


@overload
def is_special(entries: int) -> bool: ...
@overload
def is_special(entries: Entries) -> Mask: ...
def is_special(entries: int | Entries) -> bool | Mask:
    """Whether entries map memory without struct page (`pte_special()`)."""
    return _any_of(entries, SPECIAL)


@overload
def is_device_private(entries: int) -> bool: ...
@overload
def is_device_private(entries: Entries) -> Mask: ...
def is_device_private(entries: int | Entries) -> bool | Mask:
    """Whether the pages are in device memory (`is_device_private_entry()`)."""
    return _any_of(entries, DEVICE)


@overload
def is_device_exclusive(entries: int) -> bool: ...
@overload
def is_device_exclusive(entries: Entries) -> Mask: ...
def is_device_exclusive(entries: int | Entries) -> bool | Mask:
    """Whether a device holds the pages exclusively (`is_device_exclusive_entry()`)."""
    return _any_of(entries, EXCLUSIVE)


@overload
def is_swap(entries: int) -> bool: ...
@overload
def is_swap(entries: Entries) -> Mask: ...
def is_swap(entries: int | Entries) -> bool | Mask:
    """Whether the pages are in swap (`is_swap_pte()`, without the special kinds)."""
    return _any_of(entries, SWAP)


@overload
def is_migration(entries: int) -> bool: ...
@overload
def is_migration(entries: Entries) -> Mask: ...
def is_migration(entries: int | Entries) -> bool | Mask:
    """Whether a migration owns the pages (`is_migration_entry()`)."""
    return _any_of(entries, MIGRATION)


@overload
def is_poison(entries: int) -> bool: ...
@overload
def is_poison(entries: Entries) -> Mask: ...
def is_poison(entries: int | Entries) -> bool | Mask:
    """Whether the contents are lost (`is_hwpoison_entry()`)."""
    return _any_of(entries, POISON)


def is_hwpoison(entries: Entries) -> Mask:
    """Whether entries name a frame whose contents are lost, and not a page that was lost with its device."""
    found: Mask = is_poison(entries) & (cpu_pfn(entries) != 0)
    return found


@overload
def holds_frame(entries: int) -> bool: ...
@overload
def holds_frame(entries: Entries) -> Mask: ...
def holds_frame(entries: int | Entries) -> bool | Mask:
    """Whether entries count as a mapping of a frame: present with a struct page, or with a device."""
    if isinstance(entries, int):
        return entries & (PRESENT | DEVICE | EXCLUSIVE) != 0 and not entries & SPECIAL
    return _any_of(entries, PRESENT | DEVICE | EXCLUSIVE) & ~_any_of(entries, SPECIAL)


def having(entries: Entries, bits: int) -> Entries:
    """Those of some entries, uint64[n], that have one of `bits`: the same array where all have a certain one.

    Cost: one pass when they do, as is usual.
    """
    if int(np.bitwise_and.reduce(entries)) & bits:
        return entries
    return entries[_any_of(entries, bits)]


def are_plain(entries: Entries) -> bool:
    """Whether all entries map pages with a struct page, all by the CPU or all with a device: most do.

    Cost: two passes.
    """
    each, some = int(np.bitwise_and.reduce(entries)), int(np.bitwise_or.reduce(entries))
    return each & (PRESENT | DEVICE) != 0 and not some & SPECIAL
