"""Today's helpers for DMA: from the words of a range fault to DMA addresses, and what a device does there.

    faulted = range_fault(...)               words with VALID
    dma_map_pfns(addresses, words)           DMA addresses; the words get DMA_MAPPED
    read_dma(), write_dma()                  the device
    dma_unmap_pfns(addresses, words)         in the callback, before it is answered

DMA_MAPPED survives a range fault that is given the words again, so that a page that is faulted for writing later keeps
its DMA address.  The driver unmaps: what it has still mapped when it has answered an event that took the page is
reported (`ViolationKind.DMA_MAPPING_KEPT`) and stays mapped, but no access goes through it.  An event that leaves the
page where it is takes the right to write, until the page is faulted and mapped once more.

**Source**: Linux mm/hmm.c, hmm_dma_map_pfn(), hmm_dma_unmap_pfn(), hmm_dma_map_alloc(); 6.16.

**Invariants**: no access reaches a frame that the address no longer means, or that its mapping does not permit.

**Absent**: memory of a device that another may reach (P2PDMA, P2PDMA_BUS); where mappings are kept (dma_map.py).

Differs: many pages at once; all of them or none.  The kernel maps what it is given: here words that are out of date,
or that say nothing of a page, are refused.
"""

from __future__ import annotations

import errno as errnos

import numpy as np
import numpy.typing as npt

from hmm import cpu_pte, pte
from hmm.ascending import unique
from hmm.dma_map import DmaMap
from hmm.errors import AccessDeniedError, BadAddressError, InvalidRequestError
from hmm.frame_access import read_frames, require_there, write_frames
from hmm.interval_notifier import IntervalMirror
from hmm.range_fault import DMA_MAPPED, ERROR, STICKY, VALID, WRITE, word_pfns
from hmm.units import Entries, Pfns
from hmm.violation import ViolationKind
from hmm.zone_device import are_private

__all__ = ["dma_map_pfns", "dma_unmap_pfns", "read_dma", "write_dma"]

_MAPPED = np.uint64(VALID | DMA_MAPPED)


def dma_map_pfns(
    mirror: IntervalMirror, addresses: Entries, words: Entries, since: int | None = None
) -> tuple[Entries, Entries]:
    """Map pages for DMA in both directions.

    Args:
        addresses: uint64[n], each another page.
        words: uint64[n], what a range fault said of them; not changed.
        since: the last event that the driver had heard of when it looked at the words; None: it does not say.

    Returns: uint64[n] twice: the words with DMA_MAPPED, and the DMA addresses.  Pages that are mapped keep theirs, and
        may be written from now on as their word says.

    Raises:
        InvalidRequestError: the device does no DMA (EOPNOTSUPP); not as many words as pages, a page twice, a word
            without VALID, a word with DMA_MAPPED for a page that is not mapped, or a page whose last mapping reaches
            another frame (EINVAL).
        BadAddressError: a word is out of date, or names private memory of the device, which has no address on a bus
            (EFAULT), `error.address`.
        OutOfFramesError: the IOMMU cannot map so many pages (ENOMEM).

    Nothing was mapped then.  Cost: O(n log n), vectorised.
    """
    dma = _dma(mirror, "map", addresses, words)
    valid = (words & np.uint64(VALID | ERROR)) == np.uint64(VALID)
    _require(valid, addresses, "map", "has a word that says of no frame")
    pfns = word_pfns(words)
    entries = require_there(mirror, addresses, pfns, since, write=False)
    private = are_private(mirror.space.frames, pfns)
    if private.any():
        address = int(addresses[private][0])
        raise BadAddressError(f"DMA map: {address:#x} is in private memory of {mirror.device}", address=address)
    before = dma.lookup(addresses)
    mapped = before != 0
    _require(mapped | ((words & _MAPPED) != _MAPPED), addresses, "map", "is not mapped, and its word says so")
    _require(~mapped | (dma.domain.pfns(before) == pfns), addresses, "map", "is still mapped to another frame")
    writable = cpu_pte.is_writable(entries) & ((words & np.uint64(WRITE)) != 0)
    mirror.note_mapping(addresses)
    return words | np.uint64(DMA_MAPPED), dma.map(addresses, pfns, writable)


def dma_unmap_pfns(mirror: IntervalMirror, addresses: Entries, words: Entries) -> Entries:
    """Unmap the pages whose word has VALID and DMA_MAPPED; others are left alone.

    Args:
        addresses: uint64[n], each another page.
        words: uint64[n]; not changed.

    Returns: uint64[n], the words; DMA_MAPPED is gone from those of the pages that were unmapped.

    Raises:
        InvalidRequestError: as `dma_map_pfns`, or a page that is not mapped has such a word (EINVAL); nothing was
            unmapped.

    Cost: O(n log n), vectorised.
    """
    dma = _dma(mirror, "unmap", addresses, words)
    mine = (words & _MAPPED) == _MAPPED
    _require(~mine | (dma.lookup(addresses) != 0), addresses, "unmap", "is not mapped, and its word says so")
    dma.unmap(addresses[mine])
    return np.where(mine, words & ~np.uint64(STICKY), words)


def read_dma(
    mirror: IntervalMirror, pages: Entries, since: int | None = None, *, offset: int = 0, length: int | None = None
) -> bytes:
    """As `frame_access.read_frames`, of pages named by DMA address, uint64[n].

    Raises: also
        InvalidRequestError: the device does no DMA (EOPNOTSUPP).
        BadAddressError: nothing is mapped, or no more, at the DMA address `error.address` (EFAULT).
    """
    addresses, pfns = _translate(mirror, pages, since, write=False)
    return read_frames(mirror, addresses, pfns, since, offset=offset, length=length)


def write_dma(
    mirror: IntervalMirror, pages: Entries, data: bytes, since: int | None = None, *, offset: int = 0
) -> None:
    """As `frame_access.write_frames`, of pages named by DMA address, uint64[n].

    Raises: as `read_dma`; also AccessDeniedError: the DMA address `error.address` was not mapped for writing (EACCES).
    """
    addresses, pfns = _translate(mirror, pages, since, write=True)
    write_frames(mirror, addresses, pfns, data, since, offset=offset)


def _translate(mirror: IntervalMirror, pages: Entries, since: int | None, *, write: bool) -> tuple[Entries, Pfns]:
    """What stands behind DMA addresses: uint64[n] addresses and int64[n] frames."""
    dma = _require_dma(mirror)
    addresses = dma.domain.addresses(pages)
    gone = addresses == 0
    if gone.any():
        page, count = int(pages[gone][0]), int(np.count_nonzero(gone))
        former = int(dma.domain.former_addresses(pages[gone])[0])
        if former:
            violation = mirror.report_stale(former, count, pte.VALID, write=write, since=since)
        else:
            violation = mirror.report(ViolationKind.FOREIGN_FRAME, page, count, write=write, taking=None)
        after = f": {former:#x} was taken by {violation.taking}" if violation.taking else ""
        error = BadAddressError(f"device access: nothing is mapped for DMA at {page:#x}{after}", address=page)
        error.violation = violation
        raise error
    writable = dma.are_writable(addresses) if write else ~gone
    if not writable.all():
        address, page = int(addresses[~writable][0]), int(pages[~writable][0])
        denied = AccessDeniedError(
            f"device write: {address:#x} was not mapped for writing at {page:#x}", errnos.EACCES, address=page
        )
        count = int(np.count_nonzero(~writable))
        denied.violation = mirror.report_stale(address, count, pte.WRITE, write=True, since=since)
        raise denied
    return addresses, dma.domain.pfns(pages)


def _dma(mirror: IntervalMirror, operation: str, addresses: Entries, words: Entries) -> DmaMap:
    dma = _require_dma(mirror)
    if words.size != addresses.size:
        raise InvalidRequestError(f"DMA {operation}: {words.size} words for {addresses.size} pages")
    if unique(addresses).size != addresses.size:
        raise InvalidRequestError(f"DMA {operation}: a page is named twice")
    return dma


def _require_dma(mirror: IntervalMirror) -> DmaMap:
    if mirror.dma is None:
        raise InvalidRequestError(f"DMA: {mirror.device} does none", errnos.EOPNOTSUPP)
    return mirror.dma


def _require(good: npt.NDArray[np.bool_], addresses: Entries, operation: str, rule: str) -> None:
    if not good.all():
        address = int(addresses[~good][0])
        raise InvalidRequestError(f"DMA {operation}: {address:#x} {rule}", address=address)
