"""A device's own page table: what its hardware would walk.

The daemon keeps a table for each mirror; a real device has another, in its own memory and format, which its driver
brings in line with the mirror's at every event.  This one has the format of the mirror's.

**Source**: 2015: the private `hmm_pt` that the dummy driver keeps for each mirror.

**Invariants**: after an event was applied it permits nothing that the mirror's table does not permit.

**Absent**: who applies events when (`driver.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hmm import pte
from hmm.events import EventType
from hmm.page_table import PageTable
from hmm.units import PAGE_MASK, PAGE_SIZE, TASK_SIZE, Entries

if TYPE_CHECKING:
    from hmm_client.event import Event

_WORD = (1 << 64) - 1


class DeviceTable:
    """Entries of one mirror as its device knows them.

    Attributes:
        pages: the radix table, for whoever wants to walk it.
    """

    def __init__(self) -> None:
        self.pages = PageTable(TASK_SIZE - 1)

    def apply(self, event: Event) -> None:
        """Take over what an event says: entries after a fault, otherwise `entry &= pte_mask` in its ranges.

        A fork leaves the device what is in its own memory: the child gets copies.

        Cost: O(directories touched), vectorised; a few microseconds for each range.
        """
        if event.is_fault:
            self.program(event.pages, event.entries)
        elif event.type is EventType.FORK:
            for span in event.spans:
                self.pages.update(span.start, span.end, _protect_system_pages)
        elif event.pte_mask != pte.MASK_ALL:
            for span in event.spans:
                self.pages.apply_mask(span.start, span.end, event.pte_mask, pte.VALID)

    def program(self, addresses: Entries, entries: Entries) -> None:
        """Store what a fault brought in.

        Args:
            addresses: uint64[n], page-aligned, unique.
            entries: uint64[n]; pages whose entry is 0 have none afterwards.
        """
        self.pages.store(addresses, entries)

    def missing(self, address: int, length: int, *, write: bool) -> Entries:
        """uint64[n]: the pages of [address, address + length) that the device cannot access like that, ascending."""
        first, behind = address & PAGE_MASK, (address + length + PAGE_SIZE - 1) & PAGE_MASK
        entries = self.pages.read(first, behind)
        usable = (entries & np.uint64(pte.VALID)) != 0
        if write:
            usable &= (entries & np.uint64(pte.WRITE)) != 0
        return np.flatnonzero(~usable).astype(np.uint64) * np.uint64(PAGE_SIZE) + np.uint64(first)


def _protect_system_pages(entries: Entries) -> None:
    protected = (entries & np.uint64(pte.VALID_DEV)) == 0
    entries[protected] &= np.uint64(pte.MASK_WRITE_PROTECT)
