"""mremap: a mapping grows, shrinks or moves, and takes its page-table entries along as they are.

Entries of pages on a device or held exclusively by one move like any other; the mirrors' tables do not follow, they
lose the old range.  What is moved entry by entry, or as a huge page, counts as written from then on; what goes with its
whole page table stays as it was, and so does VM_SOFTDIRTY.

A move makes the new VMA, tells the mirrors of the old range, once for the move and once more for its removal unless
it stays (MREMAP_DONTUNMAP), moves the entries and removes the old VMA.  So a mirror that does not answer leaves
everything as it was.

**Source**: Linux mm/mremap.c (SYSCALL mremap, mremap_to(), vma_to_resize(), move_vma(), move_page_tables(),
move_soft_dirty_pte(), move_normal_pmd()), mm/ksm.c (ksm_madvise()), mm/vma.c (copy_vma(), vma_merge_extend()),
6.12.117.

**Invariants**: an entry is at its old or its new address, and nobody faults on either while it moves.

**Absent**: RLIMIT_MEMLOCK (EAGAIN), moves of several VMAs at once (6.17).

Differs: both events are sent before the first entry moves.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag

import numpy as np

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.errors import BadAddressError, InvalidRequestError, OutOfFramesError
from hmm.events import Cause
from hmm.file import File
from hmm.huge_split import block_of, cut, huge_blocks, split_pmds, whole_blocks
from hmm.hugetlb import told_span
from hmm.ksm import unmerge
from hmm.notifier import Turn
from hmm.operation import Operation, Pause
from hmm.populate import populate
from hmm.units import (
    PAGE_SHIFT,
    PMD_MASK,
    PMD_SHIFT,
    PMD_SIZE,
    PUD_SIZE,
    TASK_SIZE,
    ULONG_MAX,
    Address,
    AddressRange,
    Entries,
    is_page_aligned,
    page_up,
    pmd_up,
)
from hmm.unmapped_area import MapFlag, get_unmapped_area
from hmm.vma import LOCKED_FLAGS, Mapping, Vma, VmFlag
from hmm.vma_edit import may_expand, release_files, unmap

__all__ = ["MremapFlag", "mremap"]

_HUGE_ON_DEVICE = np.uint64(cpu_pte.HUGE | cpu_pte.DEVICE)
_SOFT_DIRTY = np.uint64(cpu_pte.SOFT_DIRTY)
_UNRESIZABLE = VmFlag.DONTEXPAND | VmFlag.PFNMAP


class MremapFlag(IntFlag):
    """The MREMAP_ flags."""

    MAYMOVE = 1
    FIXED = 2
    DONTUNMAP = 4


_ALL_FLAGS = int(MremapFlag.MAYMOVE | MremapFlag.FIXED | MremapFlag.DONTUNMAP)


@dataclass(frozen=True, slots=True)
class _Remap:
    """One request: lengths in bytes, page-aligned."""

    start: Address
    old_length: int
    new_length: int
    flags: int
    target: Address

    @property
    def old(self) -> AddressRange:
        return AddressRange(self.start, self.start + self.old_length)

    @property
    def dontunmap(self) -> bool:
        return bool(self.flags & MremapFlag.DONTUNMAP)

    def __str__(self) -> str:
        return f"mremap of {self.old} to {self.new_length:#x} bytes"


def mremap(
    space: AddressSpace, start: Address, old_length: int, new_length: int, flags: int, target: Address = 0
) -> Operation[Address]:
    """Resize or move a part of one VMA.

    Args:
        start: page-aligned.
        old_length, new_length: bytes, rounded up to pages; an old length of 0 maps shared memory once more.
        flags: MremapFlag values.
        target: with MREMAP_FIXED the new address, with MREMAP_DONTUNMAP alone a hint.

    Returns: the address, new or old.

    Raises:
        InvalidRequestError: addresses within pages, unknown or contradicting flags, a new length of 0, a target
            outside the address space or overlapping the old range; a second mapping of private memory;
            MREMAP_DONTUNMAP of a mapping that may not be resized (EINVAL).
        BadAddressError: nothing is mapped at `start`, the old range is not inside one VMA, or the mapping may not
            be resized; then what MREMAP_FIXED found at the target is gone already (EFAULT).
        OutOfFramesError: no room to grow in place without MREMAP_MAYMOVE, no room at all, too many VMAs, RLIMIT_AS,
            or too few directories (ENOMEM).
        TimedOutError: a mirror with policy FAIL did not answer; the old range was not changed (ETIMEDOUT).

    Cost: O(directories + entries) of what moves or goes, vectorised.
    """
    request = _checked(start, old_length, new_length, flags, target)
    with space.notifier.turn() as turn:
        yield from turn.wait()
        request = _by_huge_pages(request, _require_vma(space, request))
        if flags & (MremapFlag.FIXED | MremapFlag.DONTUNMAP):
            address = yield from _remap_to(space, turn, request)
        elif request.old_length >= request.new_length:
            yield from _shrink(space, request)
            return start
        else:
            address = yield from _grow(space, turn, request)
        moved = space.vmas.find(address)
        locked = moved is not None and moved.has(VmFlag.LOCKED)
    if locked and request.new_length > request.old_length:
        yield from populate(space, AddressRange(address + request.old_length, address + request.new_length))
    return address


def _checked(start: Address, old_length: int, new_length: int, flags: int, target: Address) -> _Remap:
    request = _Remap(start, page_up(old_length) & ULONG_MAX, page_up(new_length) & ULONG_MAX, flags, target)
    if flags & ~_ALL_FLAGS or (flags & MremapFlag.FIXED and not flags & MremapFlag.MAYMOVE):
        raise InvalidRequestError(f"{request}: flags {flags:#x}")
    if request.dontunmap and (not flags & MremapFlag.MAYMOVE or old_length != new_length):
        raise InvalidRequestError(f"{request}: MREMAP_DONTUNMAP moves and does not resize")
    if not is_page_aligned(start) or not request.new_length:
        raise InvalidRequestError(f"{request}: no length, or a start within a page", address=start)
    return request


def _require_vma(space: AddressSpace, request: _Remap) -> Vma:
    vma = space.vmas.find(request.start)
    if vma is None:
        raise BadAddressError(f"{request}: nothing is mapped there", address=request.start)
    return vma


def _by_huge_pages(request: _Remap, vma: Vma) -> _Remap:
    """Hugetlb memory is measured in its own pages, and does not grow."""
    if not vma.has(VmFlag.HUGETLB):
        return request
    old, new = map(pmd_up, (request.old_length, request.new_length))
    if (request.start | request.target) & ~PMD_MASK or new > old:
        raise InvalidRequestError(f"{request}: not of whole huge pages, or it would grow", address=request.start)
    return _Remap(request.start, old, new, request.flags, request.target)


def _shrink(space: AddressSpace, request: _Remap) -> Operation[None]:
    start, length = request.start + request.new_length, request.old_length - request.new_length
    if not length:
        return
    if start > TASK_SIZE or length > TASK_SIZE - start:
        raise InvalidRequestError(f"{request}: it ends outside the address space", address=start)
    yield from unmap(space, AddressRange(start, start + length))


def _remap_to(space: AddressSpace, turn: Turn, request: _Remap) -> Operation[Address]:
    """MREMAP_FIXED and MREMAP_DONTUNMAP: mremap_to()."""
    target, length = request.target, request.new_length
    if not is_page_aligned(target) or length > TASK_SIZE or target > TASK_SIZE - length:
        raise InvalidRequestError(f"{request}: the target {target:#x} is no place for it", address=target)
    if request.start + request.old_length > target and target + length > request.start:
        raise InvalidRequestError(f"{request}: the target {target:#x} overlaps it", address=target)
    # Checked before anything is unmapped, so that the move can hardly fail afterwards.
    if len(space.vmas) + 2 >= space.limits.vmas - 3:
        raise OutOfFramesError(f"{request}: the space has {len(space.vmas)} VMAs already")
    map_flags = MapFlag(0)
    if request.flags & MremapFlag.FIXED:
        map_flags = MapFlag.FIXED
        turn.hold(AddressRange(target, target + length))
        yield from unmap(space, AddressRange(target, target + length))
    if request.old_length > length:
        yield from _shrink(space, request)
        request = _Remap(request.start, length, length, request.flags, target)
    vma = _vma_to_resize(space, request)
    if request.dontunmap and not may_expand(space, length):
        raise OutOfFramesError(f"{request}: more than RLIMIT_AS allows")
    return (yield from _move_vma(space, turn, vma, request, map_flags))


def _vma_to_resize(space: AddressSpace, request: _Remap) -> Vma:
    """The VMA, once it is sure that the request fits it: vma_to_resize()."""
    vma = _require_vma(space, request)
    if not request.old_length and not vma.has(VmFlag.SHARED | VmFlag.MAYSHARE):
        raise InvalidRequestError(f"{request}: private memory is not mapped twice", address=vma.start)
    if request.dontunmap and vma.has(_UNRESIZABLE):
        raise InvalidRequestError(f"{request}: {vma} is not to be expanded", address=vma.start)
    if request.old_length > vma.end - request.start:
        raise BadAddressError(f"{request}: it reaches out of {vma}", address=vma.end)
    if request.old_length == request.new_length:
        return vma
    if vma.has(_UNRESIZABLE):
        raise BadAddressError(f"{request}: {vma} is not to be expanded", address=vma.start)
    if not may_expand(space, request.new_length - request.old_length):
        raise OutOfFramesError(f"{request}: more than RLIMIT_AS allows")
    return vma


def _grow(space: AddressSpace, turn: Turn, request: _Remap) -> Operation[Address]:
    vma = _vma_to_resize(space, request)
    if request.old.end == vma.end:
        growth = AddressRange(vma.end, request.start + request.new_length)
        if growth.end <= TASK_SIZE and not space.vmas.overlapping(growth):
            if vma.mapping.special:
                raise OutOfFramesError(f"{request}: {vma} never merges, not even with its continuation")
            space.vmas.assign(growth, vma.mapping, moved=True)
            return request.start
    if not request.flags & MremapFlag.MAYMOVE:
        raise OutOfFramesError(f"{request}: no room to grow in place", address=vma.end)
    free = _Remap(request.start, request.old_length, request.new_length, request.flags, 0)
    return (yield from _move_vma(space, turn, vma, free, MapFlag(0)))


def _move_vma(space: AddressSpace, turn: Turn, vma: Vma, request: _Remap, map_flags: MapFlag) -> Operation[Address]:
    """Move `request.old` to `request.target`, or wherever there is room: move_vma()."""
    file = vma.backing if isinstance(vma.backing, File) else None
    if vma.has(VmFlag.MAYSHARE):
        map_flags |= MapFlag.SHARED
    offset = vma.page_offset(request.start) << PAGE_SHIFT
    start = get_unmapped_area(space, request.new_length, request.target, map_flags, file, offset)
    if len(space.vmas) >= space.limits.vmas - 3:
        raise OutOfFramesError(f"{request}: the space has {len(space.vmas)} VMAs already")
    old, new = request.old, AddressRange(start, start + request.new_length)
    turn.hold(old, new)
    if old and vma.has(VmFlag.MERGEABLE):  # lest merged pages turn up elsewhere; the flag stays
        yield from unmerge(space, vma.clip(old.start, old.end))
    if request.dontunmap and vma.has(LOCKED_FLAGS):
        yield from cut(space, (vma.clip(old.start, old.end),))
        vma = _require_vma(space, request)  # a touch beside the part may have given it an anon_vma
        space.vmas.assign(old, vma.mapping, merge=False)  # what stays locked is a VMA of its own
        vma = vma.clip(old.start, old.end)
    with space.restoring(new):
        apart = vma if request.dontunmap else None
        space.vmas.assign(new, _copied(vma, start - request.start), apart_from=apart, moved=True)
        if old:
            yield from _tell_and_move(space, old, new, dontunmap=request.dontunmap)
    _forget_userfaultfd(space, new)
    if request.dontunmap:
        _left_behind(space, old)
    return start


def _copied(vma: Vma, shift: int) -> Mapping:
    """The mapping at the new place: copy_vma().

    Private memory that was never touched has no place of its own yet, and merges better with the linear index of
    its new address.
    """
    if vma.mapping.anonymous and not vma.anon_vma:
        return Mapping(vma.flags, userfaultfd=vma.mapping.userfaultfd)
    return vma.mapping.moved(shift)


def _tell_and_move(space: AddressSpace, old: AddressRange, new: AddressRange, *, dontunmap: bool) -> Operation[None]:
    vma = space.vmas.find(old.start)
    assert vma is not None
    huge = vma.has(VmFlag.HUGETLB)
    told = told_span(space, vma.clip(old.start, old.end)) if huge else _from_where_it_begins(space, old, new)
    notifier, cause = space.notifier, Cause.MREMAP_MOVE_HUGETLB if huge else Cause.MREMAP_MOVE
    with notifier.invalidation((told,), cause) as move:
        yield from move.deliver()
        yield from split_pmds(
            space, [block for block in huge_blocks(space, old) if not _moves_whole(space, block, old, new)]
        )
        if dontunmap:
            yield from _move_or_return(space, old, new)
            return
        yield from cut(space, space.vmas.mapped_pieces(old))
        with notifier.invalidation((old,), Cause.MUNMAP) as removal:
            yield from removal.deliver()
            yield from _move_or_return(space, old, new)
            gone = space.vmas.mapped_pieces(old)
            space.vmas.erase(old)
            space.free_tables(old)
    release_files(gone)


def _from_where_it_begins(space: AddressSpace, old: AddressRange, new: AddressRange) -> AddressRange:
    """What move_page_tables() tells of."""
    return AddressRange(_realigned(space, old, new.start - old.start), old.end)


def _moves_whole(space: AddressSpace, block: AddressRange, old: AddressRange, new: AddressRange) -> bool:
    """Whether a huge page can be moved as one: move_huge_pmd(), where both places hold all of it."""
    shift = new.start - old.start
    inside = old.start <= block.start and block.end <= old.end
    return inside and not shift & ~PMD_MASK and (block.start + shift) >> PMD_SHIFT not in space.tables


def _move_or_return(space: AddressSpace, old: AddressRange, new: AddressRange) -> Operation[None]:
    """Move the entries; when directories run out half-way, back to where they were, and the new VMA goes."""
    if space.keeps_tables:
        _move_tables(space, old, new)
    moved = yield from _move_entries(space, old, new.start)
    if moved == old.end:
        return
    back = AddressRange(new.start, new.start + moved - old.start)
    if back:
        with space.notifier.invalidation((back,), Cause.MREMAP_MOVE, certain=True) as bracket:
            yield from bracket.deliver()
            yield from _move_entries(space, back, old.start)
    yield from unmap(space, new)
    raise OutOfFramesError(f"mremap of {old}: directories run out at {moved:#x}", address=moved)


def _move_tables(space: AddressSpace, old: AddressRange, new: AddressRange) -> None:
    """Which blocks have page tables afterwards: move_page_tables() moves one as a whole where it can."""
    space.keep_tables(*whole_blocks(old))
    shift = new.start - old.start
    at = _realigned(space, old, shift)
    while at < old.end:
        block, target = block_of(at), block_of(at + shift)
        stop = min(block.end, target.end - shift, old.end)
        number, other = block.start >> PMD_SHIFT, target.start >> PMD_SHIFT
        if number in space.tables and not space.table.get(block.start) & cpu_pte.HUGE:
            if stop - at == PMD_SIZE and other not in space.tables:
                space.tables.discard(number)
            space.tables.add(other)
        at = stop


def _realigned(space: AddressSpace, old: AddressRange, shift: int) -> Address:
    """Where the move begins: at the start of the block when nothing else lies there: try_realign_addr()."""
    start, offset = old.start & PMD_MASK, old.start & ~PMD_MASK
    if not offset or shift & ~PMD_MASK or old.size_bytes < PMD_SIZE - offset:
        return old.start
    for first in (old.start, old.start + shift):
        vma, below = space.vmas.find(first), space.vmas.find_prev(first)
        if vma is None or vma.start != first or (below is not None and below.end > first - offset):
            return old.start
    return start


def _move_entries(space: AddressSpace, old: AddressRange, target: Address) -> Operation[Address]:
    """move_page_tables(): every piece is moved whole or not at all.

    Returns: how far it came: not to the end when there were no directories.
    """
    tables = _whole_tables(space, old, target - old.start) if space.tracks_writes else None
    for number, piece in enumerate(space.table.populated(old.start, old.end)):
        if number:
            yield Pause()
        start = target + piece.start - old.start
        entries = space.table.read(piece.start, piece.end)
        moved = _written(entries, piece.start, tables) if tables else entries
        space.table.clear(piece.start, piece.end)
        try:
            space.table.fill(start, start + piece.size_bytes, moved)
        except OutOfFramesError:
            space.table.fill(piece.start, piece.end, entries)
            return piece.start
    return old.end


def _whole_tables(space: AddressSpace, old: AddressRange, shift: int) -> tuple[AddressRange, AddressRange]:
    """What moves with its page tables, and of that with its directories of 1 GiB: move_normal_pmd(), ..._pud()."""
    vma = space.vmas.find(old.start)
    if vma is not None and vma.has(VmFlag.HUGETLB):  # move_huge_pte() marks nothing
        return old, old
    start = _realigned(space, old, shift)
    first, second = [_aligned_part(start, old.end, size, shift) for size in (PMD_SIZE, PUD_SIZE)]
    return first, second


def _aligned_part(start: Address, end: Address, size: int, shift: int) -> AddressRange:
    """The aligned pieces of `size` bytes inside a range that stay aligned when they are moved by `shift`."""
    first, last = -(-start // size) * size, end & -size
    return AddressRange(first, last) if first < last and not shift & (size - 1) else AddressRange(start, start)


def _written(entries: Entries, start: Address, tables: tuple[AddressRange, AddressRange]) -> Entries:
    """Entries as they are where they were moved to: move_soft_dirty_pte(), move_soft_dirty_pmd().

    The latter does not mark what is in a device's private memory.
    """
    tables_of_pages, directories = [
        np.clip((span.start - start, span.end - start), 0, entries.size << PAGE_SHIFT) >> PAGE_SHIFT for span in tables
    ]
    marked = (entries != 0) & ((entries & _HUGE_ON_DEVICE) != _HUGE_ON_DEVICE)
    marked[slice(*tables_of_pages)] &= cpu_pte.is_huge(entries[slice(*tables_of_pages)])
    marked[slice(*directories)] = False
    return np.where(marked, entries | _SOFT_DIRTY, entries)


def _forget_userfaultfd(space: AddressSpace, new: AddressRange) -> None:
    """What has moved is registered with no userfaultfd, nor is what it merged with: mremap_userfaultfd_prep()."""
    vma = space.vmas.find(new.start)
    assert vma is not None
    if vma.mapping.userfaultfd:
        space.vmas.set_mapping(vma, vma.mapping.with_userfaultfd(0))


def _left_behind(space: AddressSpace, old: AddressRange) -> None:
    """What MREMAP_DONTUNMAP leaves at the old place: not locked, and as if never touched if all of it moved."""
    vma = space.vmas.find(old.start)
    assert vma is not None
    mapping = vma.mapping
    if mapping.has(LOCKED_FLAGS):
        mapping = mapping.with_flags(mapping.flags & ~LOCKED_FLAGS)
    if mapping.anon_vma and vma.span == old:
        mapping = mapping.with_anon_vma(0)
        if mapping.anonymous:
            mapping = mapping.moved(mapping.delta << PAGE_SHIFT)
    if mapping is not vma.mapping:
        space.vmas.set_mapping(vma, mapping)
