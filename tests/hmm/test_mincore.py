"""mincore: which pages are in memory."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest
from area import BASE, SHARED, at

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.cpu_access import touch
from hmm.errors import BadAddressError, InvalidRequestError
from hmm.file import FILE_SIZE_MAX
from hmm.mincore import mincore
from hmm.units import PAGE_SIZE, PIECE_PAGES, TASK_SIZE, AddressRange
from hmm.vma import Mapping, Prot, VmFlag


def resident(world: Any, space: AddressSpace, first: int, last: int) -> str:
    """A digit per page."""
    found = world.run(mincore(space, at(first), (last - first) * PAGE_SIZE))
    assert found.dtype == np.uint8
    return "".join(str(page) for page in found.tolist())


def test_mincore_counts_pages_when_they_are_mapped(world: Any, space: AddressSpace) -> None:
    """Private memory: what was touched, on whatever device it is now."""
    world.map(space, 5)
    world.run(touch(space, AddressRange(at(1), at(2)), write=True))
    world.run(touch(space, AddressRange(at(2), at(3)), write=False))
    space.table.set(at(4), cpu_pte.cpu_entry(500, cpu_pte.DEVICE))
    assert resident(world, space, 0, 5) == "01101"


def test_mincore_counts_pages_when_the_file_has_them(world: Any, space: AddressSpace) -> None:
    """__mincore_unmapped_range(): the page cache, at the offset that is mapped, touched or not."""
    file = world.file(8)
    file.grab(np.array([2, 4], np.uint64) << np.uint64(12))
    world.map(space, 4, Prot.READ, SHARED, file, at=0, offset=2)
    world.map(space, 1, at=4)
    assert resident(world, space, 0, 5) == "10100"


def test_mincore_counts_nothing_when_the_file_cannot_be_that_long(world: Any, space: AddressSpace) -> None:
    """A mapping may reach behind the end of any file."""
    offset = FILE_SIZE_MAX - PAGE_SIZE
    span = AddressRange(at(0), at(3))
    space.vmas.assign(span, Mapping(VmFlag.READ, world.file(1), (offset - BASE) // PAGE_SIZE))
    assert resident(world, space, 0, 3) == "000"
    assert resident(world, space, 1, 3) == "00"


def test_mincore_pauses_when_the_range_is_long(world: Any, space: AddressSpace) -> None:
    """Pieces fit together."""
    npages = 2 * PIECE_PAGES + 1
    world.map(space, npages)
    for page in (0, PIECE_PAGES, npages - 1):
        world.run(touch(space, AddressRange(at(page), at(page + 1)), write=False))
    paused = world.pauses
    found = world.run(mincore(space, at(0), npages * PAGE_SIZE))
    assert world.pauses == paused + 2
    assert np.flatnonzero(found).tolist() == [0, PIECE_PAGES, npages - 1]


def test_mincore_is_empty_when_there_is_no_length(world: Any, space: AddressSpace) -> None:
    """No pages, no answer, no error."""
    assert world.run(mincore(space, at(0), 0)).size == 0


def test_mincore_fails_when_there_is_a_hole(world: Any, space: AddressSpace) -> None:
    """ENOMEM."""
    world.map(space, 1, at=0)
    world.map(space, 1, at=2)
    with pytest.raises(BadAddressError) as error:
        resident(world, space, 0, 3)
    assert (error.value.errno, error.value.address) == (errno.ENOMEM, at(1))


@pytest.mark.parametrize(
    ("start", "length", "kind", "number"),
    [
        (BASE + 1, PAGE_SIZE, InvalidRequestError, errno.EINVAL),
        (BASE, TASK_SIZE, BadAddressError, errno.ENOMEM),
    ],
)
def test_mincore_fails_when_the_range_is_none(
    world: Any, space: AddressSpace, start: int, length: int, kind: type[Exception], number: int
) -> None:
    """A start within a page, an end outside the address space."""
    with pytest.raises(kind) as error:
        world.run(mincore(space, start, length))
    assert getattr(error.value, "errno", 0) == number
