"""A device of today touches memory: by address and frame number, as its driver's own table has them.

The kernel lets a driver use any page that it once got; here every access is checked against what the CPU's table
says of that address now, so that a driver that keeps an outdated translation is found out.

**Source**: our own; it stands for the device's own page-table walk and DMA.

**Invariants**: no access reaches a frame that the address no longer means.

**Absent**: where drivers keep translations.
"""

from __future__ import annotations

import errno as errnos

import numpy as np
import numpy.typing as npt

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.errors import AccessDeniedError, BadAddressError
from hmm.frames import ZERO_PFN
from hmm.units import PAGE_SIZE, DeviceId, Entries, Pfns
from hmm.zone_device import owners

__all__ = ["read_frames", "write_frames"]


def read_frames(space: AddressSpace, addresses: Entries, pfns: Pfns, device_id: DeviceId) -> bytes:
    """Read whole pages.

    Args:
        addresses: uint64[n], page-aligned.
        pfns: int64[n], what the driver believes to be there.

    Raises:
        BadAddressError: a page is no longer there (EFAULT), `error.address`; nothing was read.

    Cost: O(n), vectorised, and the copying.
    """
    _require_there(space, addresses, pfns, device_id)
    return space.frames.gather(pfns).tobytes()


def write_frames(space: AddressSpace, addresses: Entries, pfns: Pfns, data: bytes, device_id: DeviceId) -> None:
    """Write whole pages, and make their entries dirty.

    Args:
        data: n * 4096 bytes.

    Raises: as `read_frames`; and
        AccessDeniedError: a page may not be written (EACCES); nothing was written.
    """
    entries = _require_there(space, addresses, pfns, device_id)
    writable = cpu_pte.is_writable(entries)
    if not writable.all():
        address = int(addresses[~writable][0])
        raise AccessDeniedError(f"device write: {address:#x} is read-only", errnos.EACCES, address=address)
    space.frames.scatter(pfns, np.frombuffer(data, np.uint8).reshape(-1, PAGE_SIZE))
    space.table.store(addresses, entries | np.uint64(cpu_pte.DIRTY))


def _require_there(space: AddressSpace, addresses: Entries, pfns: Pfns, device_id: DeviceId) -> Entries:
    entries = space.table.lookup(addresses)
    zero = cpu_pte.is_special(entries) & (pfns == ZERO_PFN)
    there: npt.NDArray[np.bool_] = (cpu_pte.holds_frame(entries) | zero) & (cpu_pte.cpu_pfn(entries) == pfns)
    private = there & cpu_pte.is_device_private(entries)
    if private.any():
        there[private] = owners(space.frames, pfns[private]) == device_id
    if not there.all():
        address = int(addresses[~there][0])
        raise BadAddressError(f"device access: the translation of {address:#x} is out of date", address=address)
    return entries
