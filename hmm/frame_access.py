"""A device of today touches memory: by address and frame number, as its driver's own table has them.

The kernel lets a driver use any page that it once got; here every access is checked against what the CPU's table
says of that address now, and against what the driver has acknowledged already, so that a driver that keeps an outdated
translation is found out, and told which event had taken it.

**Source**: our own; it stands for the device's own page-table walk and DMA.

**Invariants**: no access reaches a frame that the address no longer means.

**Absent**: where drivers keep translations; who took what (sanitizer.py).
"""

from __future__ import annotations

import errno as errnos

import numpy as np
import numpy.typing as npt

from hmm import cpu_pte, pte
from hmm.errors import AccessDeniedError, BadAddressError, HmmError, InvalidRequestError
from hmm.events import EventState
from hmm.frames import ZERO_PFN, PageFlag
from hmm.huge_fault import blocks_of, mark_huge
from hmm.interval_notifier import IntervalMirror
from hmm.spans import inside
from hmm.units import PAGE_SIZE, Entries, Pfns
from hmm.violation import Violation, ViolationKind
from hmm.zone_device import owners

__all__ = ["read_frames", "require_there", "write_frames"]


def read_frames(
    mirror: IntervalMirror,
    addresses: Entries,
    pfns: Pfns,
    since: int | None = None,
    *,
    offset: int = 0,
    length: int | None = None,
) -> bytes:
    """Read pages, or a part of them.

    Args:
        addresses: uint64[n], page-aligned.
        pfns: int64[n], what the driver believes to be there.
        since: the last event that the driver had heard of when the access began; None: it does not say.
        offset: the first byte, of the pages one behind the other.
        length: how many bytes, of every page at least one; None: all that there are.

    Returns: the bytes; ones if the access was refused and the mirror is lenient.

    Raises:
        InvalidRequestError: a page without a byte of the part, or a part that is not in them (EINVAL).
        BadAddressError: a page is no longer there (EFAULT), `error.address`; nothing was read.

    Cost: O(n), vectorised, and the copying.
    """
    length = _part("read", addresses.size, offset, length)
    try:
        require_there(mirror, addresses, pfns, since, write=False)
    except HmmError:
        if mirror.lenient:
            return b"\xff" * length
        raise
    return mirror.space.frames.read_through(pfns, offset, length)


def write_frames(
    mirror: IntervalMirror, addresses: Entries, pfns: Pfns, data: bytes, since: int | None = None, *, offset: int = 0
) -> None:
    """Write pages, or a part of them, and make the CPU's entries dirty; where it cannot use them, the pages.

    Args:
        data: the bytes, for every page at least one.
        offset: where they go, in the pages one behind the other.

    Raises: as `read_frames`; and
        AccessDeniedError: a page may not be written (EACCES); nothing was written.
    """
    _part("write", addresses.size, offset, len(data))
    try:
        entries = require_there(mirror, addresses, pfns, since, write=True)
    except HmmError:
        if mirror.lenient:
            return
        raise
    space = mirror.space
    given = np.frombuffer(data, np.uint8)
    if given.size < addresses.size * PAGE_SIZE:
        pages = space.frames.gather(pfns)
        pages.reshape(-1)[offset : offset + given.size] = given
    else:
        pages = given.reshape(-1, PAGE_SIZE)
    space.frames.scatter(pfns, pages)
    present = cpu_pte.is_present(entries)
    space.table.store(addresses[present], entries[present] | np.uint64(cpu_pte.DIRTY))
    space.frames.set_flags(pfns[~present], PageFlag.DIRTY)
    if space.huge:
        partly = addresses[present & cpu_pte.is_huge(entries) & ~cpu_pte.is_dirty(entries)]
        for start in blocks_of(partly):
            mark_huge(space, start, cpu_pte.DIRTY)


def _part(operation: str, npages: int, offset: int, length: int | None) -> int:
    """How many bytes from `offset` are accessed: of every page at least one, and none beyond."""
    size = npages * PAGE_SIZE
    wanted = size - offset if length is None else length
    last = size - PAGE_SIZE  # the first byte of the last page
    if not (0 <= offset < PAGE_SIZE and last < offset + wanted <= size) and size + offset + wanted:
        raise InvalidRequestError(f"device {operation}: {wanted} bytes from {offset} are no part of {npages} pages")
    return wanted


def require_there(mirror: IntervalMirror, addresses: Entries, pfns: Pfns, since: int | None, *, write: bool) -> Entries:
    """The CPU's entries, uint64[n], of pages that a device uses; refused where they are not what the driver believes.

    Args, Raises: as `read_frames`; to write, as `write_frames`.
    """
    space = mirror.space
    entries = space.table.lookup(addresses)
    zero = cpu_pte.is_special(entries) & (pfns == ZERO_PFN)
    there: npt.NDArray[np.bool_] = (cpu_pte.holds_frame(entries) | zero) & (cpu_pte.cpu_pfn(entries) == pfns)
    private = there & cpu_pte.is_device_private(entries)
    if private.any():
        there[private] = owners(space.frames, pfns[private]) == mirror.device.id
    for sent in mirror.unsettled.values():
        given_up = sent.state is EventState.ACKNOWLEDGED and not sent.unfinished
        if given_up and sent.event.initiator != mirror.id:
            there &= ~inside(addresses, sent.event.spans)
    if not there.all():
        address = int(addresses[~there][0])
        violation = _report(mirror, ~there, address, since, write=write)
        after = f": taken by {violation.taking}" if violation.taking else ""
        error = BadAddressError(
            f"device access: the translation of {address:#x} is out of date in {mirror}{after}", address=address
        )
        error.violation = violation
        raise error
    writable = cpu_pte.is_writable(entries)
    if write and not writable.all():
        address = int(addresses[~writable][0])
        denied = AccessDeniedError(f"device write: {address:#x} is read-only", errnos.EACCES, address=address)
        count = int(np.count_nonzero(~writable))
        denied.violation = mirror.report_stale(address, count, pte.WRITE, write=True, since=since)
        raise denied
    return entries


def _report(
    mirror: IntervalMirror, bad: npt.NDArray[np.bool_], address: int, since: int | None, *, write: bool
) -> Violation:
    count = int(np.count_nonzero(bad))
    if mirror.taken_by(address, pte.VALID) is None:
        return mirror.report(ViolationKind.FOREIGN_FRAME, address, count, write=write, taking=None)
    return mirror.report_stale(address, count, pte.VALID, write=write, since=since)
