"""Which pages a mirror of today's interface has mapped for DMA, at which DMA address, and whether for writing.

**Source**: Linux include/linux/hmm-dma.h, struct hmm_dma_map; dma-mapping.h, dma_map_phys(); 6.16.

**Invariants**: a page is mapped once; the domain maps what the table names, and nothing else.

**Absent**: the IOVA window that dma_iova_try_alloc() may give, in which DMA addresses are as consecutive as the pages:
it is as where the kernel gets none.

Differs: there is one map for each mirror and not one for each range, so that it need not be allocated or freed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hmm.errors import OutOfFramesError
from hmm.iommu import Domain
from hmm.page_table import PageTable
from hmm.spans import Spans, inside
from hmm.units import PAGE_SIZE, TASK_SIZE, Entries, Pfns, all_but

__all__ = ["DmaMap"]

_WRITE = 1
_DMA_ADDRESS = all_but(PAGE_SIZE - 1)

_Mask = npt.NDArray[np.bool_]


@dataclass(slots=True, eq=False)
class DmaMap:
    """`struct hmm_dma_map`.

    Attributes:
        domain: the DMA addresses.
        table: the DMA address of each page, with _WRITE in its low bits.
    """

    domain: Domain
    table: PageTable = field(default_factory=lambda: PageTable(TASK_SIZE - 1))

    def map(self, addresses: Entries, pfns: Pfns, writable: _Mask) -> Entries:
        """Map pages; a page that is mapped keeps its DMA address, and may be written from now on as `writable` says.

        Args:
            addresses: uint64[n], each in another page.
            pfns: int64[n], their frames; those of pages that are mapped are not looked at.
            writable: bool[n].

        Returns: uint64[n], their DMA addresses.

        Raises:
            OutOfFramesError: as `Domain.map`, or too few directories are left; nothing was mapped (ENOMEM).

        Cost: O(n log n), vectorised.
        """
        found = self.lookup(addresses)
        new = found == 0
        if new.any():
            found[new] = self.domain.map(pfns[new], addresses[new])
        try:
            self.table.store(addresses, found | writable.astype(np.uint64))
        except OutOfFramesError:
            self.domain.unmap(found[new])
            raise
        return found

    def unmap(self, addresses: Entries) -> None:
        """Unmap pages that are mapped.

        Args:
            addresses: uint64[n], each in another page.

        Cost: O(n log n), vectorised.
        """
        self.domain.unmap(self.table.clear_many(addresses) & _DMA_ADDRESS)

    def unmap_all(self) -> None:
        """Unmap everything."""
        self.unmap(self.table.in_use()[0])

    def lookup(self, addresses: Entries) -> Entries:
        """uint64[n]: the DMA address of each page; 0 where it is not mapped."""
        return self.table.lookup(addresses) & _DMA_ADDRESS

    def are_writable(self, addresses: Entries) -> _Mask:
        """bool[n]: which pages are mapped for writing."""
        writable: _Mask = (self.table.lookup(addresses) & np.uint64(_WRITE)) != 0
        return writable

    def within(self, spans: Spans) -> Entries:
        """uint64[n]: the pages of some ranges that are mapped, ascending."""
        if not spans:
            return np.empty(0, np.uint64)
        addresses, _ = self.table.valid(spans[0].start, min(spans[-1].end, TASK_SIZE))
        found: Entries = addresses[inside(addresses, spans)]
        return found

    def write_protect(self, addresses: Entries) -> None:
        """Let pages that are mapped no longer be written."""
        self.table.store(addresses, self.lookup(addresses))

    def check(self) -> None:
        """Assert the invariants."""
        self.table.check()
        self.domain.check()
        addresses, entries = self.table.in_use()
        assert self.domain.frames.count == addresses.size, "a DMA mapping is leaked"
        assert np.array_equal(self.domain.addresses(entries & _DMA_ADDRESS), addresses), "a DMA address is another's"
