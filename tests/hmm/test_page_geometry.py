"""Shape of the radix table: levels, shifts, spans."""

from __future__ import annotations

import pytest

from hmm.page_geometry import LAST_MAX, Geometry


@pytest.mark.parametrize(
    ("last", "shifts", "root_entries"),
    [
        ((1 << 47) - 4097, (39, 30, 21, 12), 256),
        ((1 << 48) - 1, (39, 30, 21, 12), 512),
        (1 << 48, (48, 39, 30, 21, 12), 2),
        ((1 << 64) - 1, (57, 48, 39, 30, 21, 12), 128),
        ((1 << 21) - 1, (12,), 512),
        (1 << 21, (21, 12), 2),
        ((1 << 30) - 1, (21, 12), 512),
        (4095, (12,), 1),
        (0, (12,), 1),
    ],
)
def test_covering_chooses_the_levels_of_the_posted_code(last: int, shifts: tuple[int, ...], root_entries: int) -> None:
    """The number of levels and root entries follow from the last address, as in hmm_pt_init()."""
    geometry = Geometry.covering(last)
    assert geometry.shifts == shifts
    assert geometry.llevel == len(shifts) - 1
    assert geometry.levels == len(shifts)
    assert geometry.root_entries == root_entries


@pytest.mark.parametrize("last", [0, 1, 4095, 4096, (1 << 47) - 4097, LAST_MAX])
def test_covering_rounds_last_up_to_the_end_of_its_page(last: int) -> None:
    """`last` is inclusive, and a page that begins in the table ends in it (v3; v1 rounded down)."""
    geometry = Geometry.covering(last)
    assert geometry.last == last | 4095
    assert geometry.end == (last | 4095) + 1


@pytest.mark.parametrize("last", [-1, 1 << 64])
def test_covering_asserts_when_last_is_no_address(last: int) -> None:
    """A table covers at most 64 bits of addresses."""
    with pytest.raises(AssertionError):
        Geometry.covering(last)


def test_index_takes_nine_bits_per_level() -> None:
    """`hmm_pt_index()`: (address >> shift[level]) & 511."""
    geometry = Geometry.covering((1 << 48) - 1)
    address = 3 << 39 | 5 << 30 | 7 << 21 | 9 << 12 | 11
    assert [geometry.index(address, level) for level in range(4)] == [3, 5, 7, 9]


def test_entry_span_is_what_one_entry_covers() -> None:
    """v1's hmm_pt_level_start() and hmm_pt_level_end(): the span of an entry, end exclusive."""
    geometry = Geometry.covering((1 << 47) - 4097)
    address = 0x7F12_3456_7890
    assert geometry.entry_span(address, 3) == (0x7F12_3456_7000, 0x7F12_3456_8000)
    assert geometry.entry_span(address, 2) == (0x7F12_3440_0000, 0x7F12_3460_0000)


def test_directory_span_is_the_entry_of_the_level_above() -> None:
    """v3's helpers: the span of the directory that holds an address; the root covers the table."""
    geometry = Geometry.covering((1 << 47) - 4097)
    address = 0x7F12_3456_7890
    for level in range(1, 4):
        assert geometry.directory_span(address, level) == geometry.entry_span(address, level - 1)
    assert geometry.directory_span(address, 0) == (0, (1 << 47) - 4096)


def test_spans_are_cut_at_the_end_of_the_table() -> None:
    """The last entry of each level may cover addresses that the table does not have."""
    geometry = Geometry.covering((1 << 47) - 4097)
    for level in range(3):
        assert geometry.entry_span(geometry.last, level)[1] == geometry.end


def test_spans_do_not_wrap_at_the_top_of_64_bits() -> None:
    """hmm_pt_level_next() compared minus one, because the end of the last entry is 2^64."""
    geometry = Geometry.covering(LAST_MAX)
    for level in range(6):
        assert geometry.entry_span(LAST_MAX, level)[1] == 1 << 64
