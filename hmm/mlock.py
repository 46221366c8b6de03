"""The mlock family: memory that is brought in and stays.

A lock is a flag of the VMA, which splits and merges it, and the population that comes with it.  Reclaim leaves pages of
locked mappings where they are (reclaim.py).

**Source**: Linux mm/mlock.c (do_mlock(), apply_vma_lock_flags(), mlock_fixup(), apply_mlockall_flags()), 6.12.

**Invariants**: no VMA of VM_SPECIAL is locked.

**Absent**: RLIMIT_MEMLOCK and the right to lock: every caller has CAP_IPC_LOCK.
"""

from __future__ import annotations

import errno as errnos
from enum import IntFlag

from hmm.address_space import AddressSpace
from hmm.errors import BadAddressError, InvalidRequestError, OutOfFramesError, RangeBusyError
from hmm.huge_split import cut
from hmm.operation import Operation
from hmm.populate import populate
from hmm.units import ULONG_MAX, WHOLE_SPACE, Address, AddressRange, page_down, page_up
from hmm.vma import LOCKED_FLAGS, Vma, VmFlag, vm_flags
from hmm.vma_edit import modify_flags

__all__ = ["MclFlag", "MlockFlag", "mlock", "mlock2", "mlockall", "munlock", "munlockall"]

_NOT_LOCKED = ~int(LOCKED_FLAGS)


class MlockFlag(IntFlag):
    """The MLOCK_ flags of mlock2()."""

    ONFAULT = 1


class MclFlag(IntFlag):
    """The MCL_ flags of mlockall()."""

    CURRENT = 1
    FUTURE = 2
    ONFAULT = 4


def mlock(space: AddressSpace, start: Address, length: int) -> Operation[int]:
    """Lock a range and bring its pages in.

    Args:
        start: rounded down to a page.
        length: bytes; the end is rounded up to a page.

    Returns: 0.

    Raises:
        InvalidRequestError: the range ends nowhere (EINVAL).
        BadAddressError: a part is not mapped, and what lies below it was locked and not brought in; or a page
            cannot be brought in, and all of the range was locked (ENOMEM).
        OutOfFramesError: too many VMAs (ENOMEM).
        RangeBusyError: no frame is left; all of the range was locked (EAGAIN).

    Cost: O(VMAs) and that of touching every page.
    """
    return _mlock(space, start, length, VmFlag.LOCKED)


def mlock2(space: AddressSpace, start: Address, length: int, flags: int) -> Operation[int]:
    """Lock a range; with MLOCK_ONFAULT without bringing its pages in.

    Returns, Raises: as `mlock`; InvalidRequestError: an unknown flag (EINVAL).
    """
    if flags & ~int(MlockFlag.ONFAULT):
        raise InvalidRequestError(f"mlock2: unknown flags {flags:#x}")
    return _mlock(space, start, length, LOCKED_FLAGS if flags else VmFlag.LOCKED)


def _mlock(space: AddressSpace, start: Address, length: int, flags: VmFlag) -> Operation[int]:
    span = _lockable(start, length)
    if not span:
        return 0
    with space.notifier.turn() as turn:
        yield from turn.wait()
        yield from _apply_lock_flags(space, span, flags)
    try:
        yield from populate(space, span, ignore_errors=False)
    except OutOfFramesError as error:
        raise RangeBusyError(f"mlock: {error.message}", errnos.EAGAIN) from error
    except BadAddressError as error:
        raise BadAddressError(f"mlock: {error.message}", errnos.ENOMEM, address=error.address) from error
    return 0


def munlock(space: AddressSpace, start: Address, length: int) -> Operation[int]:
    """Unlock a range; its pages stay.

    Returns, Raises: as `mlock`, but no page is brought in.
    """
    span = _lockable(start, length)
    if not span:
        return 0
    with space.notifier.turn() as turn:
        yield from turn.wait()
        yield from _apply_lock_flags(space, span, VmFlag.NONE)
    return 0


def mlockall(space: AddressSpace, flags: int) -> Operation[int]:
    """Lock what is mapped (MCL_CURRENT), what will be (MCL_FUTURE), or both; MCL_ONFAULT without bringing it in.

    Returns: 0.

    Raises:
        InvalidRequestError: no flag, MCL_ONFAULT alone, or an unknown one (EINVAL).

    Cost: O(VMAs) and that of touching every page.
    """
    if not flags or flags == MclFlag.ONFAULT or flags & ~int(MclFlag.CURRENT | MclFlag.FUTURE | MclFlag.ONFAULT):
        raise InvalidRequestError(f"mlockall: flags {flags:#x}")
    lock = LOCKED_FLAGS if flags & MclFlag.ONFAULT else VmFlag.LOCKED
    with space.notifier.turn() as turn:
        yield from turn.wait()
        space.default_flags &= ~LOCKED_FLAGS
        if flags & MclFlag.FUTURE:
            space.default_flags |= lock
        if flags & MclFlag.CURRENT:
            yield from _lock_all(space, lock)
    if flags & MclFlag.CURRENT:
        yield from populate(space, WHOLE_SPACE)
    return 0


def munlockall(space: AddressSpace) -> Operation[int]:
    """Unlock everything, mapped now or later.

    Returns: 0.

    Cost: O(VMAs).
    """
    with space.notifier.turn() as turn:
        yield from turn.wait()
        space.default_flags &= ~LOCKED_FLAGS
        yield from _lock_all(space, VmFlag.NONE)
    return 0


def _lockable(start: Address, length: int) -> AddressRange:
    length = page_up((length + start - page_down(start)) & ULONG_MAX) & ULONG_MAX
    span = AddressRange(page_down(start), page_down(start) + length)
    if span.end > ULONG_MAX:
        raise InvalidRequestError(f"mlock: {length:#x} bytes at {start:#x} end nowhere", address=start)
    return span


def _apply_lock_flags(space: AddressSpace, span: AddressRange, flags: VmFlag) -> Operation[None]:
    """Up to the first hole, in order of address: apply_vma_lock_flags()."""
    at = span.start
    for piece in space.vmas.mapped_pieces(span):
        if piece.start != at:
            break
        yield from _fixup(space, piece, flags)
        at = piece.end
    if at < span.end:
        raise BadAddressError(f"mlock: nothing is mapped at {at:#x}", errnos.ENOMEM, address=at)


def _lock_all(space: AddressSpace, flags: VmFlag) -> Operation[None]:
    for vma in list(space.vmas):
        yield from _fixup(space, vma, flags)


def _fixup(space: AddressSpace, piece: Vma, flags: VmFlag) -> Operation[None]:
    """mlock_fixup()."""
    old = piece.flags._value_
    new = (old & _NOT_LOCKED) | flags._value_
    if new != old and not piece.mapping.special:
        yield from cut(space, (piece,))
        modify_flags(space, piece, vm_flags(new))
