"""mprotect: what the CPU may do with a range.

The VMAs change first, piece by piece up to the first that may not; then the mirrors are told once of all that
changed; then the entries follow.  An entry loses WRITE and gets it back at once where a write would need no fault:
in shared mappings, and for private pages that belong to this process alone.  A page on a device loses its permission
to be written for good, so that the driver is asked before it is written again; and it counts as written no longer.

**Source**: Linux mm/mprotect.c (do_mprotect_pkey(), mprotect_fixup(), change_pte_range(), can_change_pte_writable()),
mm/mmap.c (vma_wants_writenotify()), 6.12.

**Invariants**: no writable entry remains in a mapping that does not permit writing.

**Absent**: protection keys; write notification of shared files, whose pages are upgraded like shared memory's.

Differs: one event for the call, where the kernel sends one per VMA; locked pages that become writable are copied when
all VMAs have changed, not VMA by VMA.
"""

from __future__ import annotations

import errno as errnos
from enum import IntFlag

import numpy as np
import numpy.typing as npt

from hmm import cpu_pte
from hmm.address_space import NOT_TOLD, AddressSpace
from hmm.errors import AccessDeniedError, BadAddressError, HmmError, InvalidRequestError
from hmm.events import Cause
from hmm.frames import ZERO_PFN, Frames, PageFlag
from hmm.huge_split import cut
from hmm.hugetlb import told_span
from hmm.operation import Operation, Pause
from hmm.populate import populate
from hmm.units import PUD_SIZE, TASK_SIZE, Address, AddressRange, Entries, all_but, is_page_aligned, page_up
from hmm.vma import ACCESS_FLAGS, Prot, Vma, VmFlag, vm_flags
from hmm.vma_edit import modify_flags

__all__ = ["ProtGrow", "mprotect"]


class ProtGrow(IntFlag):
    """PROT_GROWSDOWN and PROT_GROWSUP, to be added to the protection given to mprotect()."""

    DOWN = 0x0100_0000
    UP = 0x0200_0000


# Plain integers: the operators of an IntFlag cost most of a microsecond each.
_PROT_READ, _PROT_WRITE = int(Prot.READ), int(Prot.WRITE)
_DOWN, _UP = int(ProtGrow.DOWN), int(ProtGrow.UP)
_GROW = _DOWN | _UP
_ACCESS = int(ACCESS_FLAGS)
_KNOWN = _ACCESS | 0x8  # PROT_SEM
_PUD_MASK = -PUD_SIZE
_ACCOUNT = int(VmFlag.ACCOUNT)
_RESERVING = int(VmFlag.ACCOUNT | VmFlag.WRITE | VmFlag.HUGETLB | VmFlag.SHARED | VmFlag.NORESERVE)
_LOCKED = int(VmFlag.LOCKED)
_LOCKED_OR_COPIED = int(VmFlag.WRITE | VmFlag.SHARED | VmFlag.LOCKED)
_KEEP = all_but(cpu_pte.WRITE)
_WRITE = np.uint64(cpu_pte.WRITE)
_DEVICE_WRITABLE = np.uint64(cpu_pte.DEVICE | cpu_pte.WRITE)
_SOFT_DIRTY, _DIRTIED = np.uint64(cpu_pte.SOFT_DIRTY), np.uint64(cpu_pte.DIRTY | cpu_pte.SOFT_DIRTY)
_NOT_SOFT_DIRTY = all_but(cpu_pte.SOFT_DIRTY)
_PRESENT = np.uint64(cpu_pte.PRESENT)
_FRAMED = np.uint64(cpu_pte.PRESENT | cpu_pte.SPECIAL)


def mprotect(space: AddressSpace, start: Address, length: int, prot: int) -> Operation[int]:
    """Change the protection of a range.

    Args:
        start: page-aligned.
        length: bytes, rounded up to pages; 0 does nothing.
        prot: Prot values, with ProtGrow.DOWN from the start of a stack on.

    Returns: 0.

    Raises:
        InvalidRequestError: a start within a page, an unknown protection, PROT_GROWSDOWN of a mapping that does not
            grow downwards; PROT_GROWSUP, as nothing grows upwards (EINVAL).
        BadAddressError: a part is not mapped; what lies below it was changed (ENOMEM).
        AccessDeniedError: a mapping may never permit this; what lies below it was changed (EACCES).
        OutOfFramesError: too many VMAs; what lies below was changed (ENOMEM).
        TimedOutError: a mirror with policy FAIL did not answer; nothing was changed (ETIMEDOUT).

    Cost: O(VMAs + directories + entries), vectorised.
    """
    prot = int(prot)
    grow, prot = prot & _GROW, prot & ~_GROW
    if grow == _GROW or not is_page_aligned(start):
        raise InvalidRequestError(f"mprotect: {start:#x} is not the start of a page, or grows both ways", address=start)
    if not length:
        return 0
    end = start + page_up(length)
    if end >= 1 << 64:
        raise BadAddressError(f"mprotect: {length:#x} bytes at {start:#x} end nowhere", errnos.ENOMEM, address=start)
    if prot & ~_KNOWN:
        raise InvalidRequestError(f"mprotect: unknown protection {prot:#x}")
    prot &= _ACCESS
    with space.notifier.turn() as turn:
        yield from turn.wait()
        span = _grown(space, AddressRange(start, end), grow)
        turn.hold(span)
        plan, refused = _planned(space, span, prot)
        yield from cut(space, (piece for piece, _ in plan))
        changed, error = _change_vmas(space, plan)
        try:
            yield from _change_protection(space, changed, _cause(prot))
        except NOT_TOLD:
            _change_vmas_back(space, changed)
            raise
    for piece in changed:
        # A private locked mapping that becomes writable: the copies are made now.
        if prot & _PROT_WRITE and piece.mapping.flags._value_ & _LOCKED_OR_COPIED == _LOCKED:
            yield from populate(space, piece.span)
    if error := error or refused:
        raise error
    return 0


def _cause(prot: int) -> Cause:
    if not prot & _PROT_READ:
        return Cause.MPROTECT_NONE
    return Cause.MPROTECT_WRITE if prot & _PROT_WRITE else Cause.MPROTECT_READ


def _grown(space: AddressSpace, span: AddressRange, grow: int) -> AddressRange:
    """The range after PROT_GROWSDOWN or PROT_GROWSUP."""
    vma = space.vmas.find_next(span.start)
    if vma is None or vma.start >= span.end or (vma.start > span.start and not grow & _DOWN):
        raise BadAddressError(f"mprotect: nothing is mapped at {span.start:#x}", errnos.ENOMEM, address=span.start)
    if not grow:
        return span
    if grow & _UP or not vma.has(VmFlag.GROWSDOWN):
        raise InvalidRequestError(f"mprotect: {vma} does not grow that way", address=span.start)
    return AddressRange(vma.start, span.end)


def _planned(space: AddressSpace, span: AddressRange, prot: int) -> tuple[list[tuple[Vma, VmFlag]], HmmError | None]:
    """What is to be changed in `span`, up to the first VMA that may not.

    Returns: the parts and their new flags; and what the call fails with behind them.
    """
    plan: list[tuple[Vma, VmFlag]] = []
    at = span.start
    for piece in space.vmas.mapped_pieces(span):
        if piece.start != at:
            break
        at = piece.end
        old = piece.mapping.flags._value_
        if prot & ~(old >> 4):  # VM_MAYREAD and so on
            denied = f"mprotect: {piece} may not become {Prot(prot)!r}"
            return plan, AccessDeniedError(denied, errnos.EACCES, address=piece.start)
        new = _new_flags(piece, prot)
        if new != old:
            plan.append((piece, vm_flags(new)))
    if at < span.end:
        return plan, BadAddressError(f"mprotect: nothing is mapped at {at:#x}", errnos.ENOMEM, address=at)
    return plan, None


def _change_vmas(space: AddressSpace, plan: list[tuple[Vma, VmFlag]]) -> tuple[list[Vma], HmmError | None]:
    """Give parts of VMAs their new flags, until there would be too many VMAs.

    Returns: the parts that changed, as they were; and what the call fails with.
    """
    for number, (piece, flags) in enumerate(plan):
        try:
            modify_flags(space, piece, flags)
        except HmmError as error:
            return [changed for changed, _ in plan[:number]], error
    return [changed for changed, _ in plan], None


def _change_vmas_back(space: AddressSpace, changed: list[Vma]) -> None:
    """Give parts of VMAs the flags that they had.

    Not by `modify_flags`: halfway there may be more VMAs than the limit, and there are as many as before in the end.
    """
    for piece in changed:
        now = space.vmas.find(piece.start)
        assert now is not None
        space.vmas.assign(piece.span, now.mapping.with_flags(piece.mapping.flags))


def _new_flags(piece: Vma, prot: int) -> int:
    """vm_flags after the change; VM_ACCOUNT as mprotect_fixup() keeps it."""
    old = piece.mapping.flags._value_
    new = old & ~_ACCESS | prot
    if new == old:
        return old
    if prot & _PROT_WRITE:
        return new if old & _RESERVING else new | _ACCOUNT
    if old & _ACCOUNT and piece.mapping.anonymous and not piece.anon_vma:
        return new & ~_ACCOUNT
    return new


def _change_protection(space: AddressSpace, changed: list[Vma], cause: Cause) -> Operation[None]:
    """Tell the mirrors of what may have entries, then change these: change_protection()."""
    pieces = [(piece, span) for piece in changed if (span := _told_part(space, piece))]
    if not pieces:
        return
    told = tuple(told_span(space, piece) if piece.has(VmFlag.HUGETLB) else span for piece, span in pieces)
    with space.notifier.invalidation(told, cause) as invalidation:
        yield from invalidation.deliver()
        parts = (part for _, span in pieces for part in space.table.parts(span.start, span.end))
        for number, part in enumerate(parts):
            if number:
                yield Pause()
            _change_entries(space, part)


def _told_part(space: AddressSpace, piece: Vma) -> AddressRange | None:
    """`piece` from its first 1 GiB on that has page tables, for whatever page, as change_pud_range() tells of it.

    Of hugetlb memory all is told, with tables or without: hugetlb_change_protection().
    """
    span = piece.span
    if piece.has(VmFlag.HUGETLB):
        return span
    around = span.start & _PUD_MASK, min(-(-span.end & _PUD_MASK), TASK_SIZE)
    first = next(space.table.populated(*around), None)
    return first and AddressRange(max(span.start, first.start & _PUD_MASK), span.end)


def _change_entries(space: AddressSpace, span: AddressRange) -> None:
    """change_pte_range() for a part of one VMA, which has its new flags."""
    vma = space.vmas.find(span.start)
    assert vma is not None
    shared, frames = vma.shared, space.frames
    by_fault = vma.has(VmFlag.HUGETLB) and not shared  # hugetlb_change_protection() leaves it to that
    upgrades, tracked = vma.writable and not by_fault, not (space.is_soft_dirty(vma) or vma.has(VmFlag.HUGETLB))

    noticed = _DIRTIED if shared else _SOFT_DIRTY
    has_devices = len(frames.regions) > 1

    def change(entries: Entries) -> None:
        if has_devices:  # of their private pages: "We do not preserve soft-dirtiness"
            entries[(entries & _DEVICE_WRITABLE) == _DEVICE_WRITABLE] &= _NOT_SOFT_DIRTY
        entries &= _KEEP
        if upgrades:
            upgradable = _upgradable(entries, frames, shared=shared)
            if tracked:  # the next write is to be seen: vma_wants_writenotify(), pte_needs_soft_dirty_wp()
                upgradable &= (entries & noticed) == noticed
            entries |= upgradable * _WRITE

    space.table.update(span.start, span.end, change)


def _upgradable(entries: Entries, frames: Frames, *, shared: bool) -> npt.NDArray[np.bool_]:
    """can_change_pte_writable(): a write needs no fault, as the page is shared anyway or this process's alone."""
    if shared:
        return cpu_pte.is_present(entries)
    framed = (entries & _FRAMED) == _PRESENT
    return frames.test_flags(np.where(framed, cpu_pte.cpu_pfn(entries), ZERO_PFN), PageFlag.ANON_EXCLUSIVE)
