"""Entry bits of the CPU page table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hmm import cpu_pte

PREDICATES: list[tuple[Callable[..., Any], int]] = [
    (cpu_pte.is_present, cpu_pte.PRESENT),
    (cpu_pte.is_writable, cpu_pte.WRITE),
    (cpu_pte.is_dirty, cpu_pte.DIRTY),
    (cpu_pte.is_special, cpu_pte.SPECIAL),
    (cpu_pte.is_device_private, cpu_pte.DEVICE),
    (cpu_pte.is_device_exclusive, cpu_pte.EXCLUSIVE),
    (cpu_pte.is_swap, cpu_pte.SWAP),
    (cpu_pte.is_migration, cpu_pte.MIGRATION),
    (cpu_pte.is_poison, cpu_pte.POISON),
]


def test_flags_are_twelve_distinct_bits() -> None:
    """Flags fill the bits below the frame number, one each."""
    flags = [
        cpu_pte.PRESENT,
        cpu_pte.WRITE,
        cpu_pte.DIRTY,
        cpu_pte.ACCESSED,
        cpu_pte.SOFT_DIRTY,
        cpu_pte.HUGE,
        cpu_pte.SPECIAL,
        cpu_pte.DEVICE,
        cpu_pte.EXCLUSIVE,
        cpu_pte.SWAP,
        cpu_pte.MIGRATION,
        cpu_pte.POISON,
    ]
    assert flags == [1 << position for position in range(12)]
    assert sum(flags) == cpu_pte.FLAGS


@pytest.mark.parametrize(("predicate", "flag"), PREDICATES)
def test_predicate_reads_its_flag(predicate: Callable[..., Any], flag: int) -> None:
    """Each predicate answers for its own flag, whatever else the entry holds."""
    others = 77 << 12 | (cpu_pte.FLAGS & ~flag)
    assert predicate(flag) is True
    assert predicate(others) is False
    assert predicate(np.array([flag, others, 0], np.uint64)).tolist() == [True, False, False]


def test_entry_round_trips_pfn_and_flags() -> None:
    """The frame number begins at bit 12 and is read back whatever the flags are."""
    flags = cpu_pte.PRESENT | cpu_pte.WRITE
    assert cpu_pte.cpu_entry(9, flags) == 9 << 12 | 3
    assert cpu_pte.cpu_pfn(9 << 12 | 3) == 9
    assert cpu_pte.cpu_flags(9 << 12 | 3) == 3
    pfns = np.array([0, 1, cpu_pte.PFN_MAX])
    entries = cpu_pte.cpu_entry(pfns, flags)
    assert entries.dtype == np.uint64
    assert cpu_pte.cpu_pfn(entries).tolist() == pfns.tolist()
    assert cpu_pte.cpu_pfn(entries).dtype == np.int64
    assert cpu_pte.cpu_flags(entries).tolist() == [flags] * 3


def test_entry_takes_flags_per_page() -> None:
    """A batch may differ in its flags."""
    flags = np.array([cpu_pte.PRESENT, cpu_pte.SWAP], np.uint64)
    entries = cpu_pte.cpu_entry(np.array([4, 5]), flags)
    assert entries.tolist() == [4 << 12 | cpu_pte.PRESENT, 5 << 12 | cpu_pte.SWAP]


def test_none_is_the_zero_word_alone() -> None:
    """pte_none(): an entry of frame 0 with a flag is in use."""
    assert cpu_pte.is_none(0) is True
    assert cpu_pte.is_none(cpu_pte.PRESENT) is False
    assert cpu_pte.is_none(np.array([0, 1], np.uint64)).tolist() == [True, False]


def test_holds_frame_leaves_out_pages_without_struct_page() -> None:
    """vm_normal_page(): the zero page and device mappings are present but count no frame."""
    words = [
        cpu_pte.PRESENT,
        cpu_pte.DEVICE,
        cpu_pte.EXCLUSIVE,
        cpu_pte.PRESENT | cpu_pte.SPECIAL,
        cpu_pte.SWAP,
        0,
    ]
    expected = [True, True, True, False, False, False]
    assert [cpu_pte.holds_frame(word) for word in words] == expected
    assert cpu_pte.holds_frame(np.array(words, np.uint64)).tolist() == expected


def test_having_leaves_out_entries_without_the_bits() -> None:
    """One bit of those named is enough, and what all have need not be looked for in each."""
    words = np.array([cpu_pte.PRESENT, cpu_pte.PRESENT | cpu_pte.DIRTY, cpu_pte.SWAP | cpu_pte.DIRTY, 0], np.uint64)
    assert cpu_pte.having(words, cpu_pte.DIRTY).tolist() == words[1:3].tolist()
    assert cpu_pte.having(words, cpu_pte.PRESENT | cpu_pte.SWAP).tolist() == words[:3].tolist()
    assert cpu_pte.having(words[1:3], cpu_pte.DIRTY | cpu_pte.HUGE).tolist() == words[1:3].tolist()
    assert cpu_pte.having(words, cpu_pte.POISON).size == 0


def test_are_plain_holds_where_all_pages_are_of_one_kind() -> None:
    """Huge pages are as good as small ones; what is not there, special or of another kind is not plain."""
    present, device = cpu_pte.PRESENT, cpu_pte.DEVICE | cpu_pte.HUGE
    for words in ([present, present | cpu_pte.HUGE], [device, device]):
        assert cpu_pte.are_plain(np.array(words, np.uint64))
    for word in (device, present | cpu_pte.SPECIAL, cpu_pte.EXCLUSIVE, cpu_pte.SWAP, 0):
        assert not cpu_pte.are_plain(np.array([present, word], np.uint64))
