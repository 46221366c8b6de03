"""madvise: discarding, populating and marking ranges.

An advice is applied to one VMA after the other, in order of address.  Holes are skipped and told at the end (ENOMEM);
a VMA that may not get the advice ends the call at once.  What lies below was changed in both cases.

    flags      DONTFORK DOFORK WIPEONFORK KEEPONFORK ... are flags of the VMA, which they split and merge
    discard    DONTNEED FREE: one event for the call, then the entries go or become clean
    file       REMOVE punches a hole into the file that is mapped
    populate   POPULATE_READ POPULATE_WRITE bring every page in
    collapse   COLLAPSE makes huge pages of small ones
    merging    MERGEABLE and UNMERGEABLE are flags too; the second copies what was merged
    failure    HWPOISON takes pages away as if their memory had failed; SOFT_OFFLINE moves them before it does
    reclaim    WILLNEED brings in what is in swap; PAGEOUT puts out what there is swap for, and drops what was freed
               lazily; COLD makes pages the next to go

**Source**: Linux mm/madvise.c (do_madvise(), madvise_walk_vmas(), madvise_vma_behavior()), mm/huge_memory.c
(hugepage_madvise()), mm/ksm.c (ksm_madvise()), 6.12.

**Invariants**: those of the calls it is made of.

**Absent**: when pages are merged (ksm.py); the guard regions of 6.13.

Differs: one event for the call, where the kernel sends one per VMA.  What is freed lazily shows it at once; the kernel
waits until a CPU's batch of such pages is full (folio_mark_lazyfree()).  WILLNEED, DONTNEED, FREE, COLD and PAGEOUT
wait for a migration of the process that its driver has not finalized; the kernel takes mmap_lock for reading as that
does, and drops migration entries too (madvise_need_mmap_write(), zap_pte_range()).
"""

from __future__ import annotations

import errno as errnos
from collections.abc import Callable, Iterator
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from hmm import cpu_pte, fault
from hmm.address_space import AddressSpace
from hmm.collapse import collapse
from hmm.errors import (
    EHWPOISON,
    AccessDeniedError,
    BadAddressError,
    HmmError,
    InvalidRequestError,
    NoSuchObjectError,
    OutOfFramesError,
    RangeBusyError,
    SegmentationFault,
    Signal,
)
from hmm.events import Cause
from hmm.file import FILE_SIZE_MAX, File, FileKind, locked
from hmm.frames import ZERO_PFN, PageFlag
from hmm.huge_split import cut, huge_blocks, split_folio, split_pmds
from hmm.hugetlb import discard_pages, told_span
from hmm.ksm import unmerge
from hmm.large_folio import belong_to, heads_of, likely_mapped_shared
from hmm.memory_failure import inject_memory_failure
from hmm.operation import Operation, Pause
from hmm.populate import get_user_pages
from hmm.reclaim import Reclaim, is_lazily_free
from hmm.soft_offline import soft_offline
from hmm.swap_in import read_ahead
from hmm.truncate import punch
from hmm.units import (
    PAGE_SHIFT,
    PMD_MASK,
    PMD_PAGES,
    Address,
    AddressRange,
    Entries,
    Pfns,
    all_but,
    is_page_aligned,
    page_up,
    pmd_up,
)
from hmm.vma import SPECIAL_FLAGS, Vma, VmFlag, vm_flags
from hmm.vma_edit import modify_flags, zap
from hmm.zone_device import owners

__all__ = ["Advice", "madvise"]


class Advice(IntEnum):
    """The MADV_ values."""

    NORMAL = 0
    RANDOM = 1
    SEQUENTIAL = 2
    WILLNEED = 3
    DONTNEED = 4
    FREE = 8
    REMOVE = 9
    DONTFORK = 10
    DOFORK = 11
    MERGEABLE = 12
    UNMERGEABLE = 13
    HUGEPAGE = 14
    NOHUGEPAGE = 15
    DONTDUMP = 16
    DODUMP = 17
    WIPEONFORK = 18
    KEEPONFORK = 19
    COLD = 20
    PAGEOUT = 21
    POPULATE_READ = 22
    POPULATE_WRITE = 23
    DONTNEED_LOCKED = 24
    COLLAPSE = 25
    HWPOISON = 100
    SOFT_OFFLINE = 101


_READ_HINTS = VmFlag.SEQ_READ | VmFlag.RAND_READ
_FLAGS: dict[Advice, tuple[VmFlag, VmFlag]] = {
    Advice.NORMAL: (VmFlag.NONE, _READ_HINTS),
    Advice.RANDOM: (VmFlag.RAND_READ, VmFlag.SEQ_READ),
    Advice.SEQUENTIAL: (VmFlag.SEQ_READ, VmFlag.RAND_READ),
    Advice.DONTFORK: (VmFlag.DONTCOPY, VmFlag.NONE),
    Advice.DOFORK: (VmFlag.NONE, VmFlag.DONTCOPY),
    Advice.MERGEABLE: (VmFlag.MERGEABLE, VmFlag.NONE),
    Advice.UNMERGEABLE: (VmFlag.NONE, VmFlag.MERGEABLE),
    Advice.HUGEPAGE: (VmFlag.HUGEPAGE, VmFlag.NOHUGEPAGE),
    Advice.NOHUGEPAGE: (VmFlag.NOHUGEPAGE, VmFlag.HUGEPAGE),
    Advice.DONTDUMP: (VmFlag.DONTDUMP, VmFlag.NONE),
    Advice.DODUMP: (VmFlag.NONE, VmFlag.DONTDUMP),
    Advice.WIPEONFORK: (VmFlag.WIPEONFORK, VmFlag.NONE),
    Advice.KEEPONFORK: (VmFlag.NONE, VmFlag.WIPEONFORK),
}
"""Advice that is nothing but flags of the VMA: what is set, what is cleared."""

_UNMERGEABLE = SPECIAL_FLAGS | VmFlag.SHARED | VmFlag.MAYSHARE | VmFlag.HUGETLB

_NOT_DISCARDED = VmFlag.PFNMAP | VmFlag.LOCKED

_NOT_LRU = VmFlag.LOCKED | VmFlag.PFNMAP | VmFlag.HUGETLB
"""can_madv_lru_vma() is false for these."""


def _begins_in_page(vma: Vma) -> bool:
    return vma.has(VmFlag.HUGETLB) and bool(vma.start & ~PMD_MASK)


_REFUSED: dict[Advice, Callable[[Vma], bool]] = {
    Advice.DOFORK: lambda vma: vma.has(VmFlag.IO),
    Advice.WIPEONFORK: lambda vma: not vma.mapping.anonymous,
    Advice.DODUMP: lambda vma: vma.mapping.special and not vma.has(VmFlag.HUGETLB),
    Advice.DONTNEED: lambda vma: vma.has(_NOT_DISCARDED) or _begins_in_page(vma),
    Advice.DONTNEED_LOCKED: lambda vma: vma.has(VmFlag.PFNMAP) or _begins_in_page(vma),
    Advice.FREE: lambda vma: vma.has(_NOT_DISCARDED) or not vma.mapping.anonymous,
    Advice.COLD: lambda vma: vma.has(_NOT_LRU),
    Advice.PAGEOUT: lambda vma: vma.has(_NOT_LRU),
}
"""The VMAs that may not get an advice (EINVAL)."""

_FORGOTTEN = cpu_pte.SWAP | cpu_pte.POISON
_SWAPBACKED, _NOT_DIRTY = np.uint16(PageFlag.SWAPBACKED), ~np.uint16(PageFlag.DIRTY)
_LAZILY_FREE = ~np.uint16(PageFlag.SWAPBACKED | PageFlag.REFERENCED | PageFlag.ACTIVE)
_CLEAN = all_but(cpu_pte.DIRTY | cpu_pte.ACCESSED)


def madvise(
    space: AddressSpace,
    start: Address,
    length: int,
    advice: int,
    reclaim: Reclaim | None = None,
    *,
    capable: bool = False,
) -> Operation[int]:
    """Say what is to become of a range.

    Args:
        start: page-aligned.
        length: bytes, rounded up to pages; 0 does nothing.
        reclaim: of the machine.
        capable: the process may inject memory failures.

    Returns: 0.

    Raises:
        InvalidRequestError: unknown advice, a start within a page, a range that ends nowhere, or a mapping that may
            not get the advice; POPULATE of a mapping without the permission (EINVAL).
        BadAddressError: a part is not mapped; all others got the advice, or with POPULATE those below (ENOMEM).
            POPULATE met a page that cannot be brought in (EFAULT), or one whose contents are lost (EHWPOISON).
        AccessDeniedError: REMOVE of a mapping that is not shared and writable (EACCES); HWPOISON and SOFT_OFFLINE of
            a process that is not capable of it (EPERM).
        NoSuchObjectError: REMOVE of a device's mapping (ENODEV).
        RangeBusyError: too many VMAs (EAGAIN).
        OutOfFramesError: POPULATE found no frame (ENOMEM).
        TimedOutError: a mirror with policy FAIL did not answer; nothing was discarded (ETIMEDOUT).
        COLLAPSE: as `collapse`.  HWPOISON: as `inject_memory_failure`.
        SOFT_OFFLINE: as `soft_offline`.

    Cost: O(VMAs + directories + entries), vectorised.
    """
    try:
        known = Advice(advice)
    except ValueError:
        raise InvalidRequestError(f"madvise: unknown advice {advice}") from None
    end = start + page_up(length)
    if not is_page_aligned(start) or end >= 1 << 64:
        raise InvalidRequestError(f"madvise: {length:#x} bytes at {start:#x}", address=start)
    span = AddressRange(start, end)
    if not span:
        return 0
    match known:
        case Advice.POPULATE_READ | Advice.POPULATE_WRITE:
            yield from _populate(space, span, write=known is Advice.POPULATE_WRITE)
        case Advice.HWPOISON | Advice.SOFT_OFFLINE:
            yield from _inject(space, span, known, capable=capable)
        case Advice.REMOVE:
            yield from _remove(space, span)
        case Advice.COLLAPSE:
            yield from _collapse(space, span)
        case _:
            with space.notifier.turn() as turn:
                yield from turn.wait()
                yield from _apply(space, span, known, reclaim)
    return 0


def _inject(space: AddressSpace, span: AddressRange, advice: Advice, *, capable: bool) -> Operation[None]:
    """madvise_inject_error()."""
    if not capable:
        raise AccessDeniedError(f"madvise: {advice.name} needs CAP_SYS_ADMIN", errnos.EPERM)
    inject, at = inject_memory_failure if advice is Advice.HWPOISON else soft_offline, span.start
    while at < span.end:
        if at > span.start:
            yield Pause()
        piece = next(iter(fault.pieces(AddressRange(at, span.end))))
        assert isinstance(piece, AddressRange)
        at = yield from inject(space, piece)


def _apply(space: AddressSpace, span: AddressRange, advice: Advice, reclaim: Reclaim | None) -> Operation[None]:
    pieces, error = _advisable(space, span, advice)
    match advice:
        case Advice.DONTNEED | Advice.DONTNEED_LOCKED:
            yield from _discard(space, _whole(pieces), Cause.MADV_DONTNEED)
        case Advice.FREE:
            yield from _discard(space, pieces, Cause.MADV_FREE)
            if reclaim is not None:
                reclaim.begin()
        case Advice.WILLNEED:
            for piece in pieces:
                yield from read_ahead(space, piece.span)
        case Advice.COLD | Advice.PAGEOUT:
            yield from _retire(space, pieces, reclaim, out=advice is Advice.PAGEOUT)
        case _:
            yield from _change_flags(space, pieces, advice)
    if error is not None:
        raise error


def _advisable(space: AddressSpace, span: AddressRange, advice: Advice) -> tuple[list[Vma], HmmError | None]:
    """The parts of `span` that get the advice, and what the call fails with after that."""
    pieces = space.vmas.mapped_pieces(span)
    refused = _REFUSED.get(advice)
    if refused:
        for number, piece in enumerate(pieces):
            if refused(piece):
                message = f"madvise: {piece} does not take {advice.name}"
                return pieces[:number], InvalidRequestError(message, address=piece.start)
    hole = space.vmas.first_hole(span)
    return pieces, _no_mapping(hole.start) if hole else None


def _no_mapping(address: Address) -> BadAddressError:
    return BadAddressError(f"madvise: nothing is mapped at {address:#x}", errnos.ENOMEM, address=address)


def _change_flags(space: AddressSpace, pieces: list[Vma], advice: Advice) -> Operation[None]:
    added, removed = (flags._value_ for flags in _FLAGS[advice])
    space.has_read_hints |= vm_flags(added).has(_READ_HINTS)
    for piece in pieces:
        if advice is Advice.MERGEABLE and piece.has(_UNMERGEABLE):
            continue
        old = piece.flags._value_
        new = (old & ~removed) | added
        if new == old:
            continue
        try:
            if advice is Advice.UNMERGEABLE:
                yield from unmerge(space, piece)
            yield from cut(space, (piece,))
            modify_flags(space, piece, vm_flags(new))
        except OutOfFramesError as error:
            raise RangeBusyError(f"madvise: {error.message}", errnos.EAGAIN, address=piece.start) from error


def _whole(pieces: list[Vma]) -> list[Vma]:
    """The pieces, those of hugetlb memory only as far as whole pages go: madvise_dontneed_free_valid_vma()."""
    ends = [piece.end & PMD_MASK if piece.has(VmFlag.HUGETLB) else piece.end for piece in pieces]
    return [Vma(piece.start, end, piece.mapping) for piece, end in zip(pieces, ends, strict=True) if piece.start < end]


def _discard(space: AddressSpace, pieces: list[Vma], cause: Cause) -> Operation[None]:
    """Tell every mirror, then drop the pages (DONTNEED), or make them clean so that reclaim may (FREE)."""
    if not pieces:
        return
    told = tuple(told_span(space, piece) for piece in pieces)
    with space.notifier.invalidation(told, cause) as invalidation:
        yield from invalidation.deliver()
        for piece in pieces:
            if cause is Cause.MADV_FREE:
                yield from _make_clean(space, piece)
            elif piece.has(VmFlag.HUGETLB):
                discard_pages(space, piece)
            else:
                blocks = huge_blocks(space, piece.span)
                yield from split_pmds(space, [one for one in blocks if one.start < piece.start or one.end > piece.end])
                yield from zap(space, piece.span)


def _retire(space: AddressSpace, pieces: list[Vma], reclaim: Reclaim | None, *, out: bool) -> Operation[None]:
    """madvise_cold_or_pageout_pte_range(): large folios are split even where there is no swap to put pages into.

    COLD leaves those whole that lie in the range; PAGEOUT splits them as well, unless they were freed lazily:
    shrink_folio_list() does, when no run of slots can be had (add_to_swap()).  Where one can they go out in one piece,
    which shows in that their empty pages go out too (`Reclaim.takes_folios`).
    """
    for piece in pieces if space.huge else ():
        for part in space.table.populated(piece.start, piece.end, PMD_PAGES):
            yield from _split_folios(space, part, whole=out, reclaim=reclaim)
    if reclaim is None:
        return
    spans = [piece.span for piece in pieces]
    if out:
        yield from reclaim.page_out(space, spans)
    else:
        reclaim.deactivate(space, spans)


def _split_folios(
    space: AddressSpace, part: AddressRange, *, whole: bool, reclaim: Reclaim | None = None
) -> Operation[None]:
    """Split the folios that a part of a block maps, unless others map them as well.

    Args:
        whole: those as well that the part maps all of.
        reclaim: where these go next; None: nowhere.
    """
    frames = space.frames
    entries = space.table.read(part.start, part.end)
    pfns = _framed(entries)
    for head in heads_of(frames, pfns):
        mapped = np.flatnonzero(belong_to(frames, pfns, head))
        if mapped.size == PMD_PAGES:
            alone = int(frames.mapcount[pfns[mapped]].sum()) == PMD_PAGES
            private = frames.flags_of(head) & PageFlag.ANON  # Reclaim.page_out() splits those of files
            chosen = whole and alone and bool(private) and not is_lazily_free(frames, entries[mapped])
        else:
            chosen = not likely_mapped_shared(frames, head)
        if chosen:
            goes_out = mapped.size == PMD_PAGES and reclaim is not None and reclaim.takes_folios
            yield from split_folio(space, part.start + (int(mapped[0]) << PAGE_SHIFT), goes_out=goes_out)


def _make_clean(space: AddressSpace, vma: Vma) -> Operation[None]:
    """madvise_free_pte_range(): what is present, or in swap; those on a device are left alone; lost ones forgotten."""
    if space.huge:
        yield from _make_blocks_clean(space, vma)
        return
    for number, piece in enumerate(space.table.populated(vma.start, vma.end)):
        if number:
            yield Pause()
        entries = space.table.read(piece.start, piece.end)
        chosen, pfns = _free_to_go(space, entries)
        _free_lazily(space, piece, entries, chosen, pfns[chosen])


def _free_to_go(space: AddressSpace, entries: Entries) -> tuple[npt.NDArray[np.bool_], Pfns]:
    """The small pages that madvise_free_pte_range() does not pass over: bool[n]; and the frames of all, int64[n].

    What is in the swap cache has other entries still; what is dirty itself stays if others map it.  So does what was
    read from swap and not written since, which has left the cache here and not in the kernel.
    """
    frames, pfns = space.frames, _framed(entries)
    chosen = pfns != ZERO_PFN
    if frames.swap is not None:
        chosen &= frames.private[pfns] == 0
    from_swap = frames.test_flags(pfns, PageFlag.SWAPBACKED) & ~cpu_pte.is_dirty(entries)
    chosen &= ~(frames.test_flags(pfns, PageFlag.DIRTY) | from_swap) | (frames.mapcount[pfns] == 1)
    if len(frames.regions) > 1:
        chosen &= owners(frames, pfns) == 0
    return chosen, pfns


def _free_lazily(
    space: AddressSpace, span: AddressRange, entries: Entries, chosen: npt.NDArray[np.bool_], pfns: Pfns
) -> None:
    """Chosen pages may go without being written, swap entries and lost pages go now: folio_mark_lazyfree()."""
    if int(np.bitwise_or.reduce(entries)) & _FORGOTTEN:
        space.drop(entries[cpu_pte.is_swap(entries)])
        entries[cpu_pte.is_swap(entries) | cpu_pte.is_poison(entries)] = 0
    entries[chosen] &= _CLEAN
    space.table.fill(span.start, span.end, entries)
    flags = space.frames.flags[pfns] & _NOT_DIRTY
    flags[(flags & _SWAPBACKED) != 0] &= _LAZILY_FREE  # others are on the list of such pages already
    space.frames.flags[pfns] = flags


def _make_blocks_clean(space: AddressSpace, vma: Vma) -> Operation[None]:
    """The same where there are large folios: block by block.

    Those of which only a part is to be made clean are split, unless others map them as well; then, or when they cannot
    be split, they stay as they are.
    """
    frames = space.frames
    for piece in space.table.populated(vma.start, vma.end, PMD_PAGES):
        yield from _split_folios(space, piece, whole=False)
        entries = space.table.read(piece.start, piece.end)
        chosen, pfns = _free_to_go(space, entries)
        for head in heads_of(frames, pfns):
            mapped = np.flatnonzero(belong_to(frames, pfns, head))
            chosen[mapped] = mapped.size == PMD_PAGES == int(frames.mapcount[pfns[mapped]].sum())
        _free_lazily(space, piece, entries, chosen, pfns[chosen])


def _framed(entries: Entries) -> Pfns:
    """The frames of present entries; the zero page for others."""
    return np.where(cpu_pte.is_present(entries) & ~cpu_pte.is_special(entries), cpu_pte.cpu_pfn(entries), ZERO_PFN)


def _pieces(space: AddressSpace, span: AddressRange) -> Iterator[Vma]:
    """The mapped parts of a range, each looked up when it is asked for: madvise_walk_vmas().

    Raises: BadAddressError: there was a hole; what lies behind it was handed out before (ENOMEM).
    """
    at, hole = span.start, None
    while at < span.end:
        vma = space.vmas.find_next(at)
        if vma is None or vma.start > at:
            hole = at if hole is None else hole
            if vma is None or vma.start >= span.end:
                break
        piece = vma.clip(at, span.end)
        yield piece
        at = piece.end
    if hole is not None:
        raise _no_mapping(hole)


def _remove(space: AddressSpace, span: AddressRange) -> Operation[None]:
    """MADV_REMOVE: without a turn, as the kernel gives its lock up for each hole that it punches."""
    for piece in _pieces(space, span):
        file = piece.backing
        if piece.has(VmFlag.LOCKED) or not isinstance(file, File):
            raise InvalidRequestError(f"madvise: {piece} has nothing to remove", address=piece.start)
        if not (piece.shared and piece.has(VmFlag.MAYWRITE)):
            raise AccessDeniedError(f"madvise: {piece} may not be written", errnos.EACCES, address=piece.start)
        if file.kind is FileKind.DEVICE:
            raise NoSuchObjectError(f"madvise: {file} has no pages", errnos.ENODEV, address=piece.start)
        offset = piece.page_offset(piece.start) << PAGE_SHIFT
        length = min(piece.end - piece.start, FILE_SIZE_MAX - offset)
        if file.kind is FileKind.HUGETLB:  # what is less than a page is only zeroed there
            begin, offset = offset, pmd_up(offset)
            length = (begin + length & PMD_MASK) - offset
        if length > 0:
            yield from locked(file, space.current.operation_id, punch(file, offset, length))


def _collapse(space: AddressSpace, span: AddressRange) -> Operation[None]:
    """MADV_COLLAPSE: without a turn, as pages may have to be brought in."""
    for piece in _pieces(space, span):
        yield from collapse(space, piece)


def _populate(space: AddressSpace, span: AddressRange, *, write: bool) -> Operation[None]:
    """MADV_POPULATE_READ and _WRITE: madvise_populate()."""
    at = span.start
    while at < span.end:
        vma = space.vmas.find(at)
        if vma is None:
            raise _no_mapping(at)
        if vma.has(VmFlag.IO | VmFlag.PFNMAP) or not (vma.writable if write else vma.readable):
            raise InvalidRequestError(f"madvise: {vma} cannot be populated", address=at)
        piece = vma.clip(at, span.end)
        try:
            yield from get_user_pages(space, piece.span, write=write)
        except SegmentationFault as error:
            number = EHWPOISON if error.signal is Signal.BUS_POISON else errnos.EFAULT
            raise BadAddressError(f"madvise: {error.message}", number, address=error.address) from error
        at = piece.end
