"""A device touches memory: scatter/gather reads and writes, checked against the mirror's table.

This is how every device of the emulator reaches memory, as through its own MMU: by mirror address, or by DMA
address through the IOMMU.  An access through an entry that is not valid, that does not permit writing, or whose
invalidation the driver has acknowledged already, is refused; nothing of that access is done.

**Source**: our own; the dirty bit is set as a device that tracks it would (linux-mm, "HMM: add dirty flag helper v3").

**Invariants**: a read returns the last write ordered before it, because there is one copy of every page.

**Absent**: faulting (device_fault.py): an access never faults pages in.
"""

from __future__ import annotations

import errno as errnos
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hmm import pte
from hmm.errors import AccessDeniedError, BadAddressError, InvalidRequestError
from hmm.events import EventState
from hmm.mirror import Mirror
from hmm.uio import copy_to_frames
from hmm.units import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, TASK_SIZE, AddressRange, Entries, Pfns

Segment = tuple[int, int]
"""(address, length in bytes)"""
Bytes = npt.NDArray[np.uint8]


def device_read(mirror: Mirror, segments: Sequence[Segment], *, dma: bool = False) -> bytes:
    """Gather bytes from memory.

    Args:
        segments: (address, length) in order; by mirror address, or by DMA address when `dma`.

    Returns: the bytes of all segments, one after the other.

    Raises:
        BadAddressError: a page has no valid entry (EFAULT), `error.address` names it; nothing was read.
        InvalidRequestError: an empty segment or one beyond the address space (EINVAL).
        DeviceLostError, NoSuchObjectError: the mirror no longer mirrors (ENODEV).

    Cost: O(bytes + segments), vectorised over pages.
    """
    pages = _pages(segments)
    pfns = _translate(mirror, pages, write=False, dma=dma)
    data = mirror.space.frames.gather(pfns)
    mirror.counters["bytes_read"] += sum(length for _, length in segments)
    return _slice(data, segments)


def device_write(mirror: Mirror, segments: Sequence[Segment], data: bytes, *, dma: bool = False) -> None:
    """Scatter bytes to memory and set DIRTY in the entries written through.

    Args, Raises, Cost: as `device_read`; also
        AccessDeniedError: an entry does not permit writing (EACCES); nothing was written.
        InvalidRequestError: `data` is not as long as the segments together (EINVAL).
    """
    if sum(length for _, length in segments) != len(data):
        raise InvalidRequestError(f"device write: {len(data)} bytes for segments of another total length")
    pages = _pages(segments)
    pfns = _translate(mirror, pages, write=True, dma=dma)
    frames, position, page = mirror.space.frames, 0, 0
    if all(length == PAGE_SIZE and not address & ~PAGE_MASK for address, length in segments):
        frames.scatter(pfns, np.frombuffer(data, np.uint8).reshape(-1, PAGE_SIZE))
    else:
        for address, length in segments:
            npages = AddressRange(address, address + length).npages
            part = memoryview(data)[position : position + length]
            copy_to_frames(frames, pfns[page : page + npages], address & ~PAGE_MASK, part)
            page, position = page + npages, position + length
    _mark_dirty(mirror, pages, dma)
    mirror.counters["bytes_written"] += len(data)


def _pages(segments: Sequence[Segment]) -> Entries:
    """uint64[n]: the pages of all segments, segment after segment."""
    if not segments:
        return np.empty(0, np.uint64)
    for address, length in segments:
        if length <= 0 or address < 0 or address + length > 1 << 63:
            raise InvalidRequestError(f"device access: segment ({address:#x}, {length}) is empty or out of range")
    starts = np.array([address & PAGE_MASK for address, _ in segments], np.uint64)
    counts = np.array([AddressRange(a, a + n).npages for a, n in segments], np.int64)
    firsts = np.concatenate(([0], np.cumsum(counts)[:-1]))
    within = np.arange(int(counts.sum()), dtype=np.int64) - np.repeat(firsts, counts)
    pages: Entries = np.repeat(starts, counts) + (within.astype(np.uint64) << np.uint64(PAGE_SHIFT))
    return pages


def _translate(mirror: Mirror, pages: Entries, *, write: bool, dma: bool) -> Pfns:
    """int64[n]: the frame of each page, each checked against the mirror's table."""
    mirror.require_live("device access")
    addresses = _origins(mirror, pages) if dma else pages
    if addresses.size and int(addresses.max()) >= TASK_SIZE:
        raise InvalidRequestError(f"device access: {int(addresses.max()):#x} is beyond the address space")
    entries = mirror.table.lookup(addresses)
    valid = (entries & np.uint64(pte.VALID)) != 0
    if dma:
        valid &= (entries & np.uint64(PAGE_MASK & ((1 << 64) - 1))) == pages
    _require(mirror, pages, valid, "has no valid entry")
    if write:
        writable = (entries & np.uint64(pte.WRITE)) != 0
        if not writable.all():
            address = int(pages[~writable][0])
            mirror.counters["refused_accesses"] += 1
            raise AccessDeniedError(
                f"device write: the entry of {address:#x} in {mirror} is read-only",
                errnos.EACCES,
                address=address,
            )
    for sequence, sent in mirror.unsettled.items():
        if sent.state is EventState.SENT or (sent.event.etype.pte_mask != pte.MASK_NONE and not write):
            continue
        for span in sent.event.spans:
            stale = (addresses >= span.start) & (addresses < span.end)
            _require(mirror, pages, ~stale, f"was given up when event {sequence} was acknowledged")
    return mirror.pfns(entries)


def _require(mirror: Mirror, pages: Entries, good: npt.NDArray[np.bool_], rule: str) -> None:
    if not good.all():
        address = int(pages[~good][0])
        mirror.counters["refused_accesses"] += 1
        raise BadAddressError(f"device access: {address:#x} {rule} in {mirror}", address=address)


def _origins(mirror: Mirror, pages: Entries) -> Entries:
    if mirror.domain is None:
        raise InvalidRequestError(f"device access: {mirror.device} does no DMA")
    addresses = mirror.domain.addresses(pages)
    _require(mirror, pages, addresses != 0, "is not mapped for DMA")
    return addresses


def _slice(data: Bytes, segments: Sequence[Segment]) -> bytes:
    flat = data.reshape(-1)
    if all(length == PAGE_SIZE and not address & ~PAGE_MASK for address, length in segments):
        return flat.tobytes()
    parts, page = [], 0
    for address, length in segments:
        start = (page << PAGE_SHIFT) + (address & ~PAGE_MASK)
        parts.append(flat[start : start + length])
        page += AddressRange(address, address + length).npages
    return np.concatenate(parts).tobytes() if parts else b""


def _mark_dirty(mirror: Mirror, pages: Entries, dma: bool) -> None:
    addresses = np.unique(_origins(mirror, pages) if dma else pages)
    mirror.table.store(addresses, mirror.table.lookup(addresses) | np.uint64(pte.DIRTY))
