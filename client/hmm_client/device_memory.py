"""A device's own memory, as a driver that copies keeps it: bytes under the addresses that the daemon names.

**Source**: linux-mm, "HMM/dummy: add fake device memory to dummy HMM device driver".

**Invariants**: after a copy was answered, the pages that it reports as done are where it was told to put them.

**Absent**: which addresses are in use, which the daemon knows; the device's table (`device_table.py`).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hmm import pte
from hmm.units import PAGE_SHIFT, PAGE_SIZE, Entries
from hmm_client.driver import TableDriver
from hmm_client.event import Event

Pages = npt.NDArray[np.uint8]
"""uint8[n, 4096]"""


class DeviceMemory:
    """Pages of a device, all zero at first; committed as they are used.

    Attributes:
        pages: uint8[npages, 4096], by page number in the device's memory.
    """

    def __init__(self, npages: int) -> None:
        self.pages: Pages = np.zeros((npages, PAGE_SIZE), np.uint8)

    async def take(self, event: Event) -> None:
        """Carry out COPY_TO_DEVICE."""
        data = await event.read_pages()
        self.pages[_numbers(event.device_addresses)] = np.frombuffer(data, np.uint8).reshape(-1, PAGE_SIZE)

    async def give(self, event: Event) -> None:
        """Carry out COPY_FROM_DEVICE."""
        await event.write_pages(self.pages[_numbers(event.device_addresses)].tobytes())

    def read(self, entries: Entries) -> Pages:
        """A copy of the pages that entries with VALID_DEV name."""
        return self.pages[_numbers(pte.pte_dev_addr(entries))]

    def write(self, entries: Entries, offset: int, data: bytes) -> None:
        """Write bytes into the pages that entries name, from `offset` bytes into the first one on."""
        pages = self.read(entries)
        pages.reshape(-1)[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
        self.pages[_numbers(pte.pte_dev_addr(entries))] = pages

    def write_slots(self, entries: Entries, offset: int, data: Pages) -> None:
        """Write a few bytes, uint8[n, m], at the same place of each page that entries name."""
        self.pages[_numbers(pte.pte_dev_addr(entries)), offset : offset + data.shape[1]] = data


def _numbers(addresses: Entries) -> npt.NDArray[np.int64]:
    return (addresses >> np.uint64(PAGE_SHIFT)).view(np.int64)


class MemoryDriver(TableDriver):
    """Base of drivers whose device has page tables and memory of its own, and copies.

    Attributes:
        memory: of the one device that the driver serves.
    """

    def __init__(self, npages: int) -> None:
        super().__init__()
        self.memory = DeviceMemory(npages)

    async def copy_to_device(self, event: Event) -> None:
        """Take the pages."""
        await self.memory.take(event)

    async def copy_from_device(self, event: Event) -> None:
        """Give the pages back."""
        await self.memory.give(event)
