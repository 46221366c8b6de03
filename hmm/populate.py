"""Bringing pages of mappings in ahead of use: MAP_POPULATE, mlock, growing locked memory.

**Source**: Linux mm/gup.c (__mm_populate(), populate_vma_page_range()), 6.12.

**Invariants**: no VMA changes; the caller has given its turn up.

**Absent**: how a page is brought in (fault.py).
"""

from __future__ import annotations

from hmm.address_space import AddressSpace
from hmm.errors import BadAddressError, OutOfFramesError, TimedOutError, WouldDeadlockError
from hmm.fault import fault_in
from hmm.operation import Operation
from hmm.units import AddressRange
from hmm.vma import ACCESS_FLAGS, VmFlag

__all__ = ["populate"]

_LEFT_OUT = VmFlag.IO | VmFlag.PFNMAP | VmFlag.LOCKONFAULT


def populate(space: AddressSpace, span: AddressRange, *, ignore_errors: bool = True) -> Operation[None]:
    """Bring in every page of `span` that is mapped; writable private pages as if they were written.

    Holes, VM_IO, VM_PFNMAP and VM_LOCKONFAULT mappings are left out.

    Args:
        ignore_errors: go on with the next VMA after an error, as mmap does.

    Raises (unless ignored):
        BadAddressError: a mapping without any access, or a page behind the end of its file (EFAULT).
        OutOfFramesError: no frame is left (ENOMEM).
        TimedOutError: a mirror with policy FAIL did not answer for a page to be copied (ETIMEDOUT).
        WouldDeadlockError: made inside a callback that it would wait for (EDEADLK).
    """
    at = span.start
    while at < span.end:
        vma = space.vmas.find_next(at)
        if vma is None or vma.start >= span.end:
            return
        piece = vma.clip(at, span.end)
        at = piece.end
        if piece.has(_LEFT_OUT):
            continue
        try:
            if not piece.has(ACCESS_FLAGS):
                raise BadAddressError(f"{piece} permits no access", address=piece.start)
            write = piece.writable and not piece.shared
            yield from fault_in(space, piece.span, write=write)
        except (BadAddressError, OutOfFramesError, TimedOutError, WouldDeadlockError):
            if not ignore_errors:
                raise
