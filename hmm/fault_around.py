"""Fault-around: a read fault on a file maps the cached pages near it too.

**Source**: Linux mm/memory.c (do_fault_around()), mm/filemap.c (filemap_map_pages()), 6.12.

**Invariants**: only pages that are in the cache, inside the file and not yet mapped are mapped; nothing is
allocated but directories of the page table.

**Absent**: reading ahead: what is not in the cache stays so.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.ascending import among
from hmm.file import File
from hmm.frames import PageFlag
from hmm.units import PAGE_SHIFT, PMD_PAGES, Entries, page_numbers
from hmm.vma import Vma

__all__ = ["map_around"]

_Pages = npt.NDArray[np.int64]


def map_around(space: AddressSpace, vma: Vma, file: File, addresses: Entries, flags: int) -> None:
    """Map what the cache has around pages that are read for the first time.

    Args:
        vma: whole; a mapping of `file`.
        addresses: uint64[n], n >= 1, pages without an entry, ascending; also one behind the end of the file.
        flags: of the entries.

    Raises:
        OutOfFramesError: too few directories left; nothing was changed (ENOMEM).

    Cost: O(n * fault_around_pages), vectorised.
    """
    shift = vma.mapping.delta
    pages = page_numbers(addresses)
    candidates = _window_pages(space, vma, file, pages)
    offsets = (candidates + shift) << PAGE_SHIFT
    candidates = candidates[(offsets >= 0) & (offsets < file.size_bytes)]
    if not candidates.size:
        return
    cached = file.pages.lookup(((candidates + shift) << PAGE_SHIFT).view(np.uint64))
    present = cpu_pte.is_present(cached)
    if space.frames.poisoned:  # filemap_map_pages() passes over PageHWPoison()
        present[present] = ~space.frames.test_flags(cpu_pte.cpu_pfn(cached[present]), PageFlag.HWPOISON)
    around = (candidates << PAGE_SHIFT).view(np.uint64)
    chosen = present & (space.table.lookup(around) == 0)
    pfns = cpu_pte.cpu_pfn(cached[chosen])
    space.table.store(around[chosen], cpu_pte.cpu_entry(pfns, flags))
    space.frames.map(pfns)


def _window_pages(space: AddressSpace, vma: Vma, file: File, pages: _Pages) -> _Pages:
    # Windows begin at multiples of their size, except that the first one of a VMA begins with the VMA and keeps its
    # size: so it may reach into the second.  What it maps there does not fault any more.
    size, first = space.fault_around_pages, vma.start >> PAGE_SHIFT
    if first & (size - 1) and int(pages[0]) < (first | (size - 1)) + 1:
        head = np.arange(first, _window_end(vma, first, size), dtype=np.int64)
        served = file.cached(((head + vma.mapping.delta) << PAGE_SHIFT).view(np.uint64))
        pages = pages[(pages > (first | (size - 1))) & ~among(pages, head[served])]
    else:
        head = np.empty(0, np.int64)
    starts = pages & ~(size - 1)
    starts = starts[np.concatenate(([True], starts[1:] != starts[:-1]))] if starts.size else starts
    rest = (starts[:, None] + np.arange(size, dtype=np.int64)).reshape(-1)
    rest = rest[rest < vma.end >> PAGE_SHIFT]
    return np.concatenate((head, rest[~among(rest, head)])) if head.size else rest


def _window_end(vma: Vma, first: int, size: int) -> int:
    return min(first + size, (first | (PMD_PAGES - 1)) + 1, vma.end >> PAGE_SHIFT)
