"""A device touches memory: scatter/gather reads and writes, checked against the mirror's table.

This is how every device of the emulator reaches memory, as through its own MMU: by mirror address, or by DMA
address through the IOMMU.  A device that has a table of its own names its translations as well, and these are checked
too.  An access through an entry that is not valid, that does not permit writing, or whose invalidation the driver has
acknowledged already, is refused, and reported with what had taken the translation; nothing of that access is done.

**Source**: our own; the dirty bit is set as a device that tracks it would (linux-mm, "HMM: add dirty flag helper v3").

**Invariants**: a read returns the last write ordered before it, because there is one copy of every page.

**Absent**: faulting (device_fault.py): an access never faults pages in; who took what (sanitizer.py).
"""

from __future__ import annotations

import errno as errnos
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hmm import pte
from hmm.ascending import unique
from hmm.errors import AccessDeniedError, BadAddressError, HmmError, InvalidRequestError
from hmm.events import EventState
from hmm.mirror import Mirror, MirrorState
from hmm.spans import inside
from hmm.uio import copy_to_frames
from hmm.units import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, TASK_SIZE, AddressRange, Entries, Pfns, all_but
from hmm.violation import Violation, ViolationKind

Segment = tuple[int, int]
"""(address, length in bytes)"""
Bytes = npt.NDArray[np.uint8]
_DMA_ADDRESS = all_but(PAGE_SIZE - 1)
_TRANSLATION = _DMA_ADDRESS | np.uint64(pte.VALID)
"""The bits of an entry that say where an access goes."""
REFUSED_BYTE = b"\xff"
"""What a device reads where its access was refused and it is not told: as from a bus where nobody answers."""


@dataclass(frozen=True, slots=True)
class Manner:
    """How a device makes an access.

    Attributes:
        dma: segments are named by DMA address.
        named: uint64[npages], the entries that the device goes by, for all pages of all segments; None: it has no
            table of its own, and uses the mirror's.
        since: the last event that the driver had heard of when the access began; None: it does not say.
        untracked: a write sets no DIRTY: the driver reports what was written.
    """

    dma: bool = False
    named: Entries | None = None
    since: int | None = None
    untracked: bool = False


PLAIN = Manner()


def device_read(mirror: Mirror, segments: Sequence[Segment], manner: Manner = PLAIN) -> bytes:
    """Gather bytes from memory.

    Args:
        segments: (address, length) in order; by mirror address, or by DMA address.

    Returns: the bytes of all segments, one after the other; ones if the access was refused and the mirror is lenient.

    Raises:
        BadAddressError: a page has no valid entry, or not the one that was named (EFAULT), `error.address` names it;
            nothing was read.
        InvalidRequestError: an empty segment or one beyond the address space, or as many entries are not named as
            there are pages (EINVAL).
        DeviceLostError, NoSuchObjectError: the mirror no longer mirrors (ENODEV).

    Cost: O(bytes + segments), vectorised over pages.
    """
    pages = _pages(segments)
    total = sum(length for _, length in segments)
    pfns = _permitted(mirror, pages, manner, write=False)
    if pfns is None:
        return REFUSED_BYTE * total
    data = mirror.space.frames.gather(pfns)
    mirror.counters["bytes_read"] += total
    return _slice(data, segments)


def device_write(mirror: Mirror, segments: Sequence[Segment], data: bytes, manner: Manner = PLAIN) -> None:
    """Scatter bytes to memory and set DIRTY in the entries written through.

    Args, Raises, Cost: as `device_read`; also
        AccessDeniedError: an entry does not permit writing (EACCES); nothing was written.
        InvalidRequestError: `data` is not as long as the segments together (EINVAL).
    """
    if sum(length for _, length in segments) != len(data):
        raise InvalidRequestError(f"device write: {len(data)} bytes for segments of another total length")
    pages = _pages(segments)
    pfns = _permitted(mirror, pages, manner, write=True)
    if pfns is None:
        return
    frames, position, page = mirror.space.frames, 0, 0
    if all(length == PAGE_SIZE and not address & ~PAGE_MASK for address, length in segments):
        frames.scatter(pfns, np.frombuffer(data, np.uint8).reshape(-1, PAGE_SIZE))
    else:
        for address, length in segments:
            npages = AddressRange(address, address + length).npages
            part = memoryview(data)[position : position + length]
            copy_to_frames(frames, pfns[page : page + npages], address & ~PAGE_MASK, part)
            page, position = page + npages, position + length
    _note_written(mirror, pages, manner)
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


def _permitted(mirror: Mirror, pages: Entries, manner: Manner, *, write: bool) -> Pfns | None:
    """int64[n]: the frame of each page; None if the access is refused and the device is not told."""
    try:
        return _translate(mirror, pages, manner, write=write)
    except HmmError as error:
        if error.violation is None:
            raise
        mirror.counters["refused_accesses"] += 1
        if mirror.lenient and mirror.state is MirrorState.LIVE:
            return None
        raise


def _translate(mirror: Mirror, pages: Entries, manner: Manner, *, write: bool) -> Pfns:
    """int64[n]: the frame of each page, each checked against the mirror's table."""
    mirror.require_access(int(pages[0]) if pages.size else 0, write=write, since=manner.since)
    addresses = _origins(mirror, pages, manner, write=write) if manner.dma else pages
    if addresses.size and int(addresses.max()) >= TASK_SIZE:
        raise InvalidRequestError(f"device access: {int(addresses.max()):#x} is beyond the address space")
    entries = mirror.table.lookup(addresses)
    check = _Check(mirror, pages, addresses, manner, write)
    valid = (entries & np.uint64(pte.VALID)) != 0
    if manner.dma:
        valid &= (entries & _DMA_ADDRESS) == pages
    check.require(valid, pte.VALID, "has no valid entry")
    writable = (entries & np.uint64(pte.WRITE)) != 0
    if manner.named is not None:
        if manner.named.size != pages.size:
            raise InvalidRequestError(f"device access: {manner.named.size} entries are named for {pages.size} pages")
        check.require_named((entries ^ manner.named) & _TRANSLATION == 0)
        writable &= (manner.named & np.uint64(pte.WRITE)) != 0
    if write:
        check.require(writable, pte.WRITE, "has a read-only entry")
    if mirror.home is not None and mirror.home.region.remote:
        here = ~pte.pte_test_valid_dev(entries)
        if not here.all():
            address = int(pages[~here][0])
            raise BadAddressError(f"device access: {address:#x} is in {mirror.device}'s own memory", address=address)
    for sequence, sent in mirror.unsettled.items():
        if sent.state is EventState.SENT or (sent.event.etype.pte_mask != pte.MASK_NONE and not write):
            continue
        stale = inside(addresses, sent.event.spans)
        bits = pte.VALID if sent.event.etype.pte_mask == pte.MASK_NONE else pte.WRITE
        check.require(~stale, bits, f"was given up when event {sequence} was acknowledged")
    return mirror.pfns(entries)


@dataclass(frozen=True, slots=True)
class _Check:
    """One access, by the pages that the device named and the addresses that these stand for."""

    mirror: Mirror
    pages: Entries
    addresses: Entries
    manner: Manner
    write: bool

    def require(self, good: npt.NDArray[np.bool_], bits: int, rule: str) -> None:
        """Refuse the access unless every page is good; `bits` is what the others lack."""
        if good.all():
            return
        address, pages = int(self.addresses[~good][0]), int(np.count_nonzero(~good))
        violation = self.mirror.report_stale(address, pages, bits, write=self.write, since=self.manner.since)
        self._refuse(good, rule, violation)

    def require_named(self, good: npt.NDArray[np.bool_]) -> None:
        """Refuse the access unless every page is reached by the entry that the device names."""
        if good.all():
            return
        address, pages = int(self.addresses[~good][0]), int(np.count_nonzero(~good))
        mirror, since = self.mirror, self.manner.since
        if mirror.taken_by(address, pte.VALID) is None:
            kind = ViolationKind.FOREIGN_FRAME
            violation = mirror.report(kind, address, pages, write=self.write, taking=None)
        else:
            violation = mirror.report_stale(address, pages, pte.VALID, write=self.write, since=since)
        self._refuse(good, "is not reached by the entry that was named", violation)

    def require_given(self, good: npt.NDArray[np.bool_]) -> None:
        """Refuse the access unless every page was once this mirror's."""
        address, pages = int(self.addresses[~good][0]), int(np.count_nonzero(~good))
        kind = ViolationKind.FOREIGN_FRAME
        violation = self.mirror.report(kind, address, pages, write=self.write, taking=None)
        self._refuse(good, "was never mapped for DMA, or too long ago,", violation)

    def _refuse(self, good: npt.NDArray[np.bool_], rule: str, violation: Violation) -> None:
        page = int(self.pages[~good][0])
        after = f": taken by {violation.taking}" if violation.taking else ""
        message = f"device {'write' if self.write else 'read'}: {page:#x} {rule} in {self.mirror}{after}"
        error: HmmError
        if violation.kind is ViolationKind.READ_ONLY_WRITE:
            error = AccessDeniedError(message, errnos.EACCES, address=page)
        else:
            error = BadAddressError(message, address=page)
        error.violation = violation
        raise error


def _origins(mirror: Mirror, pages: Entries, manner: Manner, *, write: bool) -> Entries:
    if mirror.domain is None:
        raise InvalidRequestError(f"device access: {mirror.device} does no DMA")
    addresses = mirror.domain.addresses(pages)
    mapped = addresses != 0
    if not mapped.all():
        former = mirror.domain.former_addresses(pages)
        known = mapped | (former != 0)
        check = _Check(mirror, pages, np.where(known, former, pages), manner, write)
        if known.all():
            check.require(mapped, pte.VALID, "is not mapped for DMA any more")
        check.require_given(known)
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


def _note_written(mirror: Mirror, pages: Entries, manner: Manner) -> None:
    addresses = unique(mirror.domain.addresses(pages) if manner.dma and mirror.domain else pages)
    if manner.untracked:
        mirror.owe(addresses)
    else:
        mirror.table.store(addresses, mirror.table.lookup(addresses) | np.uint64(pte.DIRTY))
