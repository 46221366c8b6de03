"""What the calls that change VMAs have in common: limits, split and merge of a part, unmapping.

Models the part of the kernel that has moved to mm/vma.c.  Everything here expects that the caller has the turn.

**Source**: Linux mm/vma.c (vma_modify(), do_vmi_align_munmap()), mm/mmap.c (may_expand_vm()), mm/memory.c
(unmap_vmas()), 6.12.

**Invariants**: a call that may not cut has changed no mapping; at most a VMA stays cut where its part starts, as the
kernel cuts it there before it finds that the second cut is one too many, or within a huge page.

**Absent**: which parts are changed and why; locked-memory and data limits, memory accounting.
"""

from __future__ import annotations

from collections.abc import Iterable

from hmm.address_space import AddressSpace, Restoring
from hmm.errors import InvalidRequestError, OutOfFramesError
from hmm.events import Cause
from hmm.file import File
from hmm.huge_split import cut
from hmm.hugetlb import require_whole_page, unreserve
from hmm.operation import Operation, Pause
from hmm.units import TASK_SIZE, Address, AddressRange
from hmm.vma import Mapping, Vma, VmFlag

__all__ = ["cut_out", "may_expand", "modify", "modify_flags", "unmap", "zap"]


def may_expand(space: AddressSpace, length: int, replaced: AddressRange | None = None) -> bool:
    """Whether `length` bytes more may be mapped under RLIMIT_AS, when what is mapped in `replaced` goes.

    Cost: nothing without a limit, else O(VMAs).  Source: Linux mm/mmap.c, may_expand_vm().
    """
    limit = space.limits.address_bytes
    if limit >= TASK_SIZE:
        return True
    gone = space.vmas.mapped_pieces(replaced) if replaced else ()
    return sum(vma.end - vma.start for vma in space.vmas) - sum(vma.end - vma.start for vma in gone) + length <= limit


def modify_flags(space: AddressSpace, piece: Vma, flags: VmFlag) -> None:
    """As `modify`, for other flags: vma_modify_flags().

    Args:
        piece: what it has besides flags may be out of date: a touch may have given the VMA an anon_vma since.
    """
    now = space.vmas.find(piece.start)
    assert now is not None
    modify(space, piece, now.mapping.with_flags(flags))


def modify(space: AddressSpace, piece: Vma, mapping: Mapping) -> None:
    """Give a part of one VMA another mapping, merging it with its neighbours or cutting it out.

    Args:
        piece: as the map has it now, clipped to the part that changes; `cut` was done for it.

    Raises:
        InvalidRequestError: hugetlb memory would be cut within a page (EINVAL); at the end: the cut at the start stays.
        OutOfFramesError: the cuts would make too many VMAs (ENOMEM), and likewise.

    Source: Linux mm/vma.c, vma_modify(), split_vma().
    """
    vmas = space.vmas
    whole = vmas.find(piece.start)
    assert whole is not None
    before = len(vmas)
    if before < space.limits.vmas:  # split_vma() looks at that first
        require_whole_page(whole, piece.start)
    if before + (whole.start < piece.start) < space.limits.vmas:
        _require_whole_end(space, piece.start, whole, piece.end)
    vmas.assign(piece.span, mapping)
    if len(vmas) <= max(before, space.limits.vmas):
        return
    if len(vmas) - before == 2 and before < space.limits.vmas:
        _cut_at(space, whole, piece.start)
    else:
        vmas.rejoin(whole)
    raise OutOfFramesError(f"{piece} cannot be cut out of {whole}: the space has {before} VMAs already")


def _cut_at(space: AddressSpace, whole: Vma, at: Address) -> None:
    # The kernel cuts at the start first, and leaves that cut when the one at the end fails.
    pieces = [(whole.start, at, whole.mapping), (at, whole.end, whole.mapping)]
    space.vmas.replace(whole.span, pieces, merge=False)


def _require_whole_end(space: AddressSpace, start: Address, last: Vma, end: Address) -> None:
    """Refuse to cut `last` within a huge page; then what begins at `start` has been cut there."""
    try:
        require_whole_page(last, end)
    except InvalidRequestError:
        first = space.vmas.find(start)
        if first is not None and first.start < start:
            _cut_at(space, first, start)
        raise


def zap(space: AddressSpace, span: AddressRange) -> Operation[None]:
    """Drop every entry of `span` and the frames that only they held, with a pause between pieces.

    Cost: O(directories + entries), vectorised.
    """
    for number, piece in enumerate(space.table.parts(span.start, span.end)):
        if number:
            yield Pause()
        space.zap(piece.start, piece.end)


def unmap(space: AddressSpace, span: AddressRange) -> Operation[None]:
    """Remove what is mapped in `span`: one event over all of it, unless nothing is mapped there.

    The VMAs go first, then every mirror is told, then the entries go, and files that nobody holds any more.

    Raises:
        InvalidRequestError: hugetlb memory would be cut within a page (EINVAL); at the end: the cut at the start stays.
        OutOfFramesError: a hole in one VMA would make one VMA too many (ENOMEM).
        TimedOutError: a mirror with policy FAIL did not answer; nothing was changed (ETIMEDOUT).

    Cost: O(VMAs + directories + entries).  Source: Linux mm/vma.c, do_vmi_align_munmap().
    """
    pieces = yield from _prepare(space, span)
    if not pieces:
        return
    with Restoring(space, span, pieces), space.notifier.invalidation((span,), Cause.MUNMAP) as invalidation:
        assert not space.detached, "VMAs are changed by one call at a time"
        space.detached = pieces  # nobody finds them by address any more; the reverse map still does
        space.vmas.erase(span)
        try:
            yield from invalidation.deliver()
            yield from zap(space, span)
            if space.tables or space.directories:
                space.free_tables(AddressRange(pieces[0].start, pieces[-1].end))
        finally:
            space.detached = ()
    unreserve(space, pieces)
    release_files(pieces)


def cut_out(space: AddressSpace, span: AddressRange) -> Operation[None]:
    """Cut the VMAs at the edges of `span`, and leave it there: an unmapping that goes no further.

    Raises: as `unmap`.

    Source: Linux mm/vma.c, vms_gather_munmap_vmas(), reattach_vmas().
    """
    pieces = yield from _prepare(space, span)
    if pieces:
        space.vmas.replace(span, [(start, end, mapping) for start, end, mapping, *_ in pieces], merge=False)


def _prepare(space: AddressSpace, span: AddressRange) -> Operation[list[Vma]]:
    """Make sure that the VMAs can be cut at the edges of `span`.  Returns: what is mapped there."""
    pieces = space.vmas.mapped_pieces(span)
    if not pieces:
        return pieces
    if len(space.vmas) >= space.limits.vmas:
        _require_no_hole(space, span, pieces[0])
    first, last = pieces[0], pieces[-1]
    require_whole_page(first, span.start)
    if (yield from cut(space, pieces if len(pieces) == 1 else (first, last))):
        pieces = space.vmas.mapped_pieces(span)
    _require_whole_end(space, span.start, last, last.end)
    return pieces


def _require_no_hole(space: AddressSpace, span: AddressRange, piece: Vma) -> None:
    # A hole in a VMA makes two of it.
    whole = space.vmas.find(piece.start)
    assert whole is not None
    if whole.start < span.start and span.end < whole.end:
        raise OutOfFramesError(f"no hole {span} in {whole}: the space has {len(space.vmas)} VMAs already")


def release_files(vmas: Iterable[Vma]) -> None:
    """Let go of the pages of files that were mapped by VMAs now gone, if nobody else holds them."""
    files = {file.id: file for vma in vmas if isinstance(file := vma.mapping.backing, File)}
    for number in sorted(files):
        files[number].release_unused()
