"""pagemap: what each page of a range is backed by."""

from __future__ import annotations

from typing import Any

import pytest
from area import at

from hmm import pagemap as bits
from hmm.address_space import AddressSpace
from hmm.clear_refs import ClearRefs, clear_refs
from hmm.cpu_access import touch
from hmm.errors import InvalidRequestError
from hmm.pagemap import pagemap
from hmm.units import PAGE_SIZE, TASK_SIZE, AddressRange
from hmm.unmapped_area import MapFlag
from hmm.vma import VmFlag

FLAGS = {"P": bits.PRESENT, "S": bits.SWAP, "F": bits.FILE, "1": bits.MMAP_EXCLUSIVE, "D": bits.SOFT_DIRTY}


def shown(space: AddressSpace, first: int, last: int) -> list[str]:
    """The flags of pages, as letters."""
    words = pagemap(space, AddressRange(at(first), at(last))).tolist()
    return ["".join(letter for letter, bit in FLAGS.items() if word & bit) for word in words]


def test_pagemap_tells_what_backs_a_page(world: Any, space: AddressSpace) -> None:
    """pte_to_pagemap_entry(): nothing, a page written, the zero page; the frame stands in the low bits."""
    world.map(space, 4)
    world.run(touch(space, AddressRange(at(1), at(2)), write=True))
    world.run(touch(space, AddressRange(at(2), at(3)), write=False))
    assert shown(space, 0, 5) == ["D", "P1D", "PD", "D", ""]  # all of a new mapping counts as written
    (word,) = pagemap(space, AddressRange(at(1), at(2))).tolist()
    assert word & bits.PFN_MASK == space.table.get(at(1)) >> 12


def test_pagemap_tells_file_pages_when_they_are_mapped(world: Any, space: AddressSpace) -> None:
    """PM_FILE: pages of files, until a private mapping has copied them."""
    file = world.file(2)
    world.map(space, 2, file=file)
    world.run(touch(space, AddressRange(at(0), at(2)), write=False))
    world.run(touch(space, AddressRange(at(1), at(2)), write=True))
    assert shown(space, 0, 2) == ["PF1D", "P1D"]


def test_pagemap_shows_registers_as_a_hole(world: Any, space: AddressSpace) -> None:
    """walk_page_test(): VM_PFNMAP goes to pagemap_pte_hole(), which knows of VM_SOFTDIRTY alone."""
    world.map(space, 1, flags=MapFlag.SHARED, file=world.device_file(VmFlag.IO | VmFlag.PFNMAP))
    assert space.table.get(at(0))
    assert shown(space, 0, 1) == ["D"]
    world.run(clear_refs(space, ClearRefs.SOFT_DIRTY))
    assert pagemap(space, AddressRange(at(0), at(1))).tolist() == [0]


@pytest.mark.parametrize(
    "span", [AddressRange(1, PAGE_SIZE), AddressRange(0, PAGE_SIZE + 1), AddressRange(0, TASK_SIZE + PAGE_SIZE)]
)
def test_pagemap_is_refused_when_the_range_is_none_of_pages(space: AddressSpace, span: AddressRange) -> None:
    """pagemap_read(): offsets are multiples of eight bytes, which stand for whole pages."""
    with pytest.raises(InvalidRequestError):
        pagemap(space, span)
