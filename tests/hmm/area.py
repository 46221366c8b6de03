"""The area that tests of the memory calls map in: its addresses, by page, and what is mapped there.

**Absent**: a machine and its processes (machine_world.py).
"""

from __future__ import annotations

from typing import Any

from hmm.address_space import AddressSpace
from hmm.cpu_access import read_memory, write_memory
from hmm.mman import MapFlag
from hmm.units import PAGE_SIZE, AddressRange
from hmm.vma import Prot

BASE = 1 << 40
RW = Prot.READ | Prot.WRITE
SHARED = MapFlag.SHARED | MapFlag.FIXED
PRIVATE = MapFlag.PRIVATE | MapFlag.FIXED


def at(page: int) -> int:
    """The address of a page of the area."""
    return BASE + page * PAGE_SIZE


def pages(first: int, last: int) -> AddressRange:
    """Pages [first, last) of the area."""
    return AddressRange(at(first), at(last))


def layout(space: AddressSpace) -> str:
    """What is mapped, in pages of the area, such as "0-3:rw-p"."""
    return " ".join(
        f"{(vma.start - BASE) // PAGE_SIZE}-{(vma.end - BASE) // PAGE_SIZE}:{vma.perms}" for vma in space.vmas
    )


def fill(world: Any, space: AddressSpace, first: int, text: str) -> None:
    """Write a letter into each page."""
    for number, letter in enumerate(text):
        assert world.run(write_memory(space, at(first + number), letter.encode())).signal is None


def letters(world: Any, space: AddressSpace, first: int, last: int) -> str:
    """The first byte of each page."""
    data = [world.run(read_memory(space, at(page), 1)).data for page in range(first, last)]
    return b"".join(data).replace(b"\0", b".").decode()
