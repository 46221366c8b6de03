"""An emulated IOMMU: the addresses a device uses when it does DMA.

Each mirror of a DMA device has a domain.  An I/O virtual address (iova) is never handed out twice, so that a
device that goes on using an unmapped one is always caught and never reaches somebody else's page.

**Source**: Linux include/linux/dma-mapping.h, dma_map_page() and dma_mapping_error(); "HMM: DMA map memory on behalf
of device driver v2" says when a mirror maps and unmaps.

**Invariants**: the two tables of a domain have the same keys; `mapped_pages` of an Iommu is the sum over its domains.

**Absent**: when to map (mirror.py).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from hmm.errors import OutOfFramesError
from hmm.page_table import PageTable
from hmm.units import PAGE_SHIFT, Entries, Pfns

IOVA_LAST = (1 << 48) - 1
REMEMBERED_PAGES = 1 << 16
"""Pages of the latest mappings of one domain whose addresses are remembered after they are unmapped."""
_IN_USE = np.uint64(1)
_SHIFT = np.uint64(PAGE_SHIFT)


@dataclass(slots=True, eq=False)
class Iommu:
    """What all domains of one device share.

    Attributes:
        limit_pages: mappings beyond this many fail, as with a bounce buffer of that size.
        failing: how many more calls of `map` until one fails; 0 for never.  For fault injection.
    """

    limit_pages: int
    failing: int = 0
    mapped_pages: int = 0
    next_iova: int = 1 << 32

    def reserve(self, npages: int) -> int:
        """Take `npages` consecutive iovas that were never used before.

        Raises:
            OutOfFramesError: the mapping fails (ENOMEM): the limit is reached, or a failure was injected.
        """
        if self.failing:
            self.failing -= 1
            if not self.failing:
                raise OutOfFramesError(f"DMA mapping of {npages} pages failed: a failure was injected")
        if self.mapped_pages + npages > self.limit_pages:
            raise OutOfFramesError(
                f"DMA mapping of {npages} pages failed: {self.mapped_pages} of {self.limit_pages} pages are mapped"
            )
        base = self.next_iova
        self.next_iova += npages << PAGE_SHIFT
        self.mapped_pages += npages
        return base


@dataclass(slots=True, eq=False)
class Domain:
    """One mirror's iovas: which frame each reaches, and which address of the mirror it stands for."""

    iommu: Iommu
    frames: PageTable = field(default_factory=lambda: PageTable(IOVA_LAST))
    origins: PageTable = field(default_factory=lambda: PageTable(IOVA_LAST))
    _mapped: deque[tuple[int, Entries]] = field(default_factory=deque)
    _remembered: int = 0

    def map(self, pfns: Pfns, addresses: Entries) -> Entries:
        """Map frames for bidirectional DMA.

        Args:
            pfns: int64[n]; addresses: uint64[n], the mirror addresses they stand for.

        Returns: uint64[n], the iova of each.

        Raises:
            OutOfFramesError: as `Iommu.reserve`; nothing was mapped (ENOMEM).

        Cost: O(n), vectorised.  Source: dma_map_page(..., DMA_BIDIRECTIONAL).
        """
        start = self.iommu.reserve(pfns.size)
        end = start + (pfns.size << PAGE_SHIFT)
        self.frames.fill(start, end, (pfns.astype(np.uint64) << _SHIFT) | _IN_USE)
        self.origins.fill(start, end, addresses | _IN_USE)
        self._mapped.append((start, addresses))
        self._remembered += addresses.size
        while self._remembered > REMEMBERED_PAGES and len(self._mapped) > 1:
            self._remembered -= self._mapped.popleft()[1].size
        return np.arange(start, end, 1 << PAGE_SHIFT, dtype=np.uint64)

    def unmap(self, iovas: Entries) -> None:
        """Unmap; each iova must be mapped.  Cost: O(n log n), vectorised.  Source: dma_unmap_page()."""
        iovas = np.sort(iovas)
        old = self.frames.clear_many(iovas)
        assert old.all(), "an iova was unmapped twice"
        self.origins.clear_many(iovas)
        self.iommu.mapped_pages -= iovas.size

    def pfns(self, iovas: Entries) -> Pfns:
        """int64[n]: the frame behind each iova; 0 where nothing is mapped."""
        return (self.frames.lookup(iovas) >> _SHIFT).astype(np.int64)

    def addresses(self, iovas: Entries) -> Entries:
        """uint64[n]: the mirror address behind each iova; 0 where nothing is mapped."""
        return self.origins.lookup(iovas) & ~_IN_USE

    def former_addresses(self, iovas: Entries) -> Entries:
        """uint64[n]: the mirror address that each iova stands or stood for; 0 where it never did, or too long ago.

        Cost: O(n log n + mappings remembered).
        """
        found = np.zeros(iovas.size, np.uint64)
        for start, addresses in self._mapped:
            index = (iovas.astype(np.int64) - start) >> PAGE_SHIFT
            inside = (index >= 0) & (index < addresses.size)
            found[inside] = addresses[index[inside]]
        return found

    @property
    def tables(self) -> tuple[PageTable, PageTable]:
        """All that this domain knows."""
        return self.frames, self.origins

    def check(self) -> None:
        """Assert the invariants of this domain."""
        self.frames.check()
        self.origins.check()
        mapped, _ = self.frames.in_use()
        assert np.array_equal(mapped, self.origins.in_use()[0])
