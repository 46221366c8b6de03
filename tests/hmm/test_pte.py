"""Entry bits of mirror tables, as of patch 18 of the 2015 series."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hmm import pte
from hmm.units import Entries

BITS = list(enumerate(["valid_dev", "valid_dma", "valid_pfn", "select", "write", "dirty"]))
PATTERNS = [0, pte.MASK_ALL, 0xABC_D000_0000_0000 | 0x15, 0x123_4567_8000 | 0x2A]


def _helper(name: str) -> Callable[..., Any]:
    helper: Callable[..., Any] = getattr(pte, f"pte_{name}")
    return helper


def _entries(*values: int) -> Entries:
    return np.array(values, np.uint64)


def test_layout_is_the_one_of_patch_18() -> None:
    """VALID_DEV 0, VALID_DMA 1, VALID_PFN 2, SELECT 3, WRITE 4, DIRTY 5; the driver's bits from 8."""
    flags = [pte.VALID_DEV, pte.VALID_DMA, pte.VALID_PFN, pte.SELECT, pte.WRITE, pte.DIRTY]
    assert flags == [1, 2, 4, 8, 16, 32]
    assert pte.VALID == 7
    assert pte.HW_SHIFT == 8
    assert pte.DRIVER_MASK == 0xF00


@pytest.mark.parametrize(("position", "bit"), BITS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_helpers_touch_their_bit_alone_in_an_int(position: int, bit: str, pattern: int) -> None:
    """Each helper tests, sets or clears one bit and leaves the rest of the word."""
    mask = 1 << position
    assert _helper(f"test_{bit}")(pattern) is bool(pattern & mask)
    assert _helper(f"set_{bit}")(pattern) == pattern | mask
    assert _helper(f"clear_{bit}")(pattern) == pattern & ~mask


@pytest.mark.parametrize(("position", "bit"), BITS)
def test_helpers_change_arrays_in_place(position: int, bit: str) -> None:
    """On an array a helper acts as the kernel's does through a pointer, and gives the array back."""
    mask = 1 << position
    entries = _entries(*PATTERNS)
    assert _helper(f"test_{bit}")(entries).tolist() == [bool(word & mask) for word in PATTERNS]
    assert _helper(f"set_{bit}")(entries) is entries
    assert entries.tolist() == [word | mask for word in PATTERNS]
    assert _helper(f"clear_{bit}")(entries) is entries
    assert entries.tolist() == [word & ~mask for word in PATTERNS]


@pytest.mark.parametrize(("position", "bit"), BITS)
def test_test_and_change_reports_what_was_there(position: int, bit: str) -> None:
    """test_and_set and test_and_clear answer with the state before, as the kernel's bit operations do."""
    mask = 1 << position
    before = [bool(word & mask) for word in PATTERNS]
    entries = _entries(*PATTERNS)
    assert _helper(f"test_and_set_{bit}")(entries).tolist() == before
    assert entries.tolist() == [word | mask for word in PATTERNS]
    entries = _entries(*PATTERNS)
    assert _helper(f"test_and_clear_{bit}")(entries).tolist() == before
    assert entries.tolist() == [word & ~mask for word in PATTERNS]


def test_helpers_write_through_a_view() -> None:
    """A run of a walk is a view, and a helper applied to it changes the table."""
    memory = np.zeros(8, np.uint64)
    pte.pte_set_dirty(memory[2:4])
    assert memory.tolist() == [0, 0, pte.DIRTY, pte.DIRTY, 0, 0, 0, 0]


def test_pfn_round_trips() -> None:
    """hmm_pte_from_pfn() and hmm_pte_pfn()."""
    assert pte.pte_from_pfn(0x123) == 0x123 << 12 | pte.VALID_PFN
    assert pte.pte_pfn(pte.pte_from_pfn(0x123)) == 0x123
    entries = pte.pte_from_pfn(np.array([0, 5, (1 << 51) - 1]))
    assert entries.dtype == np.uint64
    assert pte.pte_pfn(entries).tolist() == [0, 5, (1 << 51) - 1]
    assert pte.pte_pfn(entries).dtype == np.int64


@pytest.mark.parametrize(
    ("make", "read", "valid"),
    [
        (pte.pte_from_dma_addr, pte.pte_dma_addr, pte.VALID_DMA),
        (pte.pte_from_dev_addr, pte.pte_dev_addr, pte.VALID_DEV),
    ],
)
def test_address_round_trips_without_the_offset_in_the_page(
    make: Callable[..., Any], read: Callable[..., Any], valid: int
) -> None:
    """hmm_pte_from_dma_addr() and hmm_pte_from_dev_addr() mask the address to its page."""
    address = 0xFEDC_BA98_7654_3210
    assert make(address) == 0xFEDC_BA98_7654_3000 | valid
    assert read(make(address)) == 0xFEDC_BA98_7654_3000
    entries = make(_entries(address, 0x1FFF))
    assert read(entries).tolist() == [0xFEDC_BA98_7654_3000, 0x1000]


@pytest.mark.parametrize(
    ("read", "valid", "sentinel"),
    [
        (pte.pte_pfn, pte.VALID_PFN, 0),
        (pte.pte_dma_addr, pte.VALID_DMA, 0),
        (pte.pte_dev_addr, pte.VALID_DEV, (1 << 64) - 1),
    ],
)
def test_value_is_a_sentinel_when_its_own_valid_bit_is_clear(
    read: Callable[..., Any], valid: int, sentinel: int
) -> None:
    """pte_pfn and pte_dma_addr give 0, pte_dev_addr all ones, when the entry is of another kind."""
    other = 0x55 << 12 | (pte.VALID & ~valid) | pte.WRITE
    assert read(other) == sentinel
    values = read(_entries(other, 0x55 << 12 | valid))
    assert values.tolist()[0] == sentinel
    assert values.tolist()[1] != sentinel


def test_set_driver_changes_valid_entries_only() -> None:
    """Driver bits may be changed only on valid entries; HMM overwrites them elsewhere."""
    valid = pte.pte_from_pfn(7) | pte.WRITE | 0x300
    transient = 9 << 12 | pte.SELECT
    entries = _entries(valid, 0, transient)
    assert pte.pte_set_driver(entries, 0xA) is entries
    assert pte.pte_driver(entries).tolist() == [0xA, 0, 0]
    assert entries.tolist() == [valid & ~pte.DRIVER_MASK | 0xA00, 0, transient]
    assert pte.pte_set_driver(valid, 0xA) == entries[0]
    assert pte.pte_set_driver(transient, 0xA) == transient
    assert pte.pte_driver(valid) == 3


def test_set_driver_takes_bits_per_entry() -> None:
    """Each entry can get bits of its own."""
    entries = pte.pte_from_pfn(np.arange(4))
    pte.pte_set_driver(entries, np.arange(4, dtype=np.uint64))
    assert pte.pte_driver(entries).tolist() == [0, 1, 2, 3]
    assert pte.pte_pfn(entries).tolist() == [0, 1, 2, 3]


def test_masks_preserve_what_the_series_says() -> None:
    """~WRITE keeps value, DIRTY and driver bits; all ones keep everything; 0 erases driver bits too."""
    entry = pte.pte_set_driver(pte.pte_from_pfn(3) | pte.WRITE | pte.DIRTY, 0xF)
    assert entry & pte.MASK_ALL == entry
    protected = entry & pte.MASK_WRITE_PROTECT
    assert protected == entry - pte.WRITE
    assert pte.pte_driver(protected) == 0xF
    assert entry & pte.MASK_NONE == 0


def test_directory_entry_names_a_row() -> None:
    """A directory entry is the place of its directory's first word; zero names none."""
    assert pte.pde_from_row(3) == 1536
    assert pte.pde_row(1536) == 3
    assert pte.pde_row(0) == 0
    assert pte.pde_row(pte.pde_from_row(np.arange(5))).tolist() == [0, 1, 2, 3, 4]
