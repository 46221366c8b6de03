"""Slots of the swap area: who names them, and when they are free."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from hmm.errors import OutOfFramesError
from hmm.swap_area import SwapArea


def counts(*numbers: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """As `allocate` takes them."""
    return np.array(numbers, np.int32)


def test_allocate_leaves_the_header_alone() -> None:
    """Slot 0 holds the header of the area and stands for no slot: mm/swapfile.c, setup_swap_map_and_extents()."""
    area = SwapArea(3)
    assert area.allocate(counts(1, 1, 1)).tolist() == [1, 2, 3]
    area.check()


def test_allocate_fails_and_changes_nothing_when_slots_run_out() -> None:
    """get_swap_pages() gives what there is; here it is all or nothing."""
    area = SwapArea(2)
    area.allocate(counts(1))
    with pytest.raises(OutOfFramesError):
        area.allocate(counts(1, 1))
    assert (area.used, area.free, area.total) == (1, 1, 2)
    area.check()


def test_put_frees_a_slot_when_its_last_entry_goes() -> None:
    """swap_free() drops one of the references that swap_duplicate() took."""
    area = SwapArea(4)
    slots = area.allocate(counts(1, 2))
    area.duplicate(slots[:1])
    assert area.put(slots).tolist() == []
    assert area.put(slots).tolist() == slots.tolist()
    assert (area.used, area.high_water) == (0, 2)
    area.check()


def test_duplicate_refuses_a_free_slot() -> None:
    """swap_duplicate() of a slot that nothing names is a bug: "Bad swap offset entry"."""
    with pytest.raises(AssertionError, match="free swap slot"):
        SwapArea(2).duplicate(np.array([1]))


def test_contents_are_in_the_file_when_the_area_has_one(tmp_path: Path) -> None:
    """The area is a mapping of a file when its provider gives one."""
    path = tmp_path / "swap"

    def provider(size_bytes: int) -> mmap.mmap:
        with path.open("w+b") as file:
            file.truncate(size_bytes)
            return mmap.mmap(file.fileno(), size_bytes)

    area = SwapArea(2, provider)
    area.scatter(area.allocate(counts(1)), np.full((1, 4096), 7, np.uint8))
    assert path.read_bytes() == bytes(4096) + b"\7" * 4096 + bytes(4096)
