"""Exclusive access: a device takes pages away from the CPU for atomic operations, until the CPU wants them back.

The page stays where it is.  Its entry becomes one that the CPU cannot use; the first touch, by the CPU or through any
device's fault, tells every mirror and makes the entry what it was, with the permission that its VMA now gives.

Who took a page stands with its frame, which the page keeps wherever it is mapped: what a driver that is gone had to
itself is given back.

**Source**: Linux mm/rmap.c (make_device_exclusive_range(), page_make_device_exclusive_one()), mm/memory.c
(remove_device_exclusive_entry(), restore_exclusive_pte()), 6.12.

**Invariants**: only private pages that one process has to itself are held exclusively.

**Absent**: who uses the pages meanwhile.

Differs: one event for all pages of a call, where the kernel sends one per page; under linux-7 pages behind the one at
which it stops are brought in all the same, where a driver of that kernel has not asked for them yet.
"""

from __future__ import annotations

import errno as errnos
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.errors import AccessDeniedError, BadAddressError, HmmError, InvalidRequestError, OutOfFramesError
from hmm.events import Cause
from hmm.fault import RESOLVERS, bring_in, lacking
from hmm.fault_pages import DIRTIED, By, Strangers
from hmm.frames import Frames, PageFlag
from hmm.huge_split import folio_places, huge_blocks, keep_small, ours, split_pmds
from hmm.large_folio import are_compound, heads_of, members, with_folios
from hmm.migration_entries import entries_of, index_of, put_entries, wait_on_locked
from hmm.operation import Await, Operation, WaitFor
from hmm.populate import mark_accessed
from hmm.rmap import Places, anonymous_places, in_walk_order, walk_order
from hmm.spans import inside, overlap
from hmm.units import (
    PAGE_SHIFT,
    PAGE_SIZE,
    PIECE_PAGES,
    PMD_PAGES,
    PMD_SIZE,
    AddressRange,
    DeviceId,
    Entries,
    MirrorId,
    Pfn,
    Pfns,
    SpaceId,
    all_but,
    is_page_aligned,
    spans_of,
    spans_of_pages,
)
from hmm.vma import Vma, VmFlag

__all__ = ["give_back", "held_exclusively", "make_device_exclusive_range", "restored"]

_EXCLUSIVE = np.uint64(cpu_pte.EXCLUSIVE)
_NOT_WRITABLE = all_but(cpu_pte.WRITE)
_KEPT = all_but(cpu_pte.PRESENT | cpu_pte.ACCESSED | cpu_pte.DIRTY)
_PRESENT = np.uint64(cpu_pte.PRESENT)
_WRITABLE = np.uint64(cpu_pte.PRESENT | cpu_pte.WRITE)

_Told = tuple[SpaceId, AddressRange]


def make_device_exclusive_range(
    space: AddressSpace, span: AddressRange, owner: DeviceId = 0, initiator: MirrorId = 0, *, holder: MirrorId = 0
) -> Operation[Pfns]:
    """Fault pages in for writing and take them from the CPU.

    Args:
        span: page-aligned, at most PIECE_PAGES pages.
        owner, initiator: what the event carries, so that a driver knows its own.
        holder: whose pages they are from now on, for `held_exclusively`.

    Returns: int64[m], the frames of the pages that were brought in, m < npages when that stopped early; 0 for those
    that stay the CPU's, because they are not private memory, or inside a large folio.  Under linux-7 it stops before
    the first that is not private memory.

    Raises:
        InvalidRequestError: an empty, unaligned or too long range (EINVAL); the first page is hugetlb memory, or, under
            linux-7, not private memory (EOPNOTSUPP).
        BadAddressError: nothing is mapped at the first page, or it is behind the end of its file (EFAULT).
        AccessDeniedError: the first page may not be written (EFAULT).
        OutOfFramesError: memory ran out at the first page (ENOMEM).

    Cost: O(pages), vectorised.
    """
    if not span or not is_page_aligned(span.start | span.end) or span.npages > PIECE_PAGES:
        raise InvalidRequestError(f"exclusive access: {span} is not a range of up to {PIECE_PAGES} pages")
    while True:
        got = yield from _get_user_pages(space, span)
        yield from split_pmds(space, huge_blocks(space, got))
        pages, pfns = _suitable(space, got)
        if not space.semantics.exclusive_ranges:
            got, pages, pfns = _up_to_refusal(got, pages, pfns)
            if (yield from wait_on_locked(space, _addresses_of(pages), pfns)):
                continue
        else:  # folio_trylock()
            free = ~space.frames.locks.are_locked(pfns)
            pages, pfns = pages[free], pfns[free]
        if not pages.size:
            return np.zeros(got.npages, np.int64)
        taken = yield from _take(space, pages, pfns, owner, initiator)
        if taken is None and space.notifier.invalidations_overlap((got,)):
            yield Await(WaitFor.INVALIDATIONS, space.id, (got,))
        if taken is not None:
            _note_holder(space, pfns, holder)
            result = np.zeros(got.npages, np.int64)
            result[(pages - (got.start >> PAGE_SHIFT))[taken]] = pfns[taken]
            return result


def _note_holder(space: AddressSpace, pfns: Pfns, holder: MirrorId) -> None:
    frames = space.frames
    frames.zone_device_data[pfns] = holder
    for head in heads_of(frames, pfns) if space.huge and space.semantics.exclusive_ranges else ():
        frames.zone_device_data[members(frames, head)] = holder


def held_exclusively(space: AddressSpace, mirror_id: MirrorId) -> Entries:
    """The pages that a mirror has to itself: uint64[n] addresses, ascending.  Cost: O(pages mapped)."""
    addresses, entries = space.table.in_use()
    exclusive = np.flatnonzero(cpu_pte.is_device_exclusive(entries))
    holders = space.frames.zone_device_data[cpu_pte.cpu_pfn(entries[exclusive])]
    held: Entries = addresses[exclusive[holders == mirror_id]]
    return held


def give_back(space: AddressSpace, addresses: Entries) -> Operation[None]:
    """Let the CPU have pages again, as if it had touched them; those that it has already are left alone.

    Args:
        addresses: uint64[n], page-aligned, ascending.

    Cost: O(n + VMAs), vectorised.
    """
    at = 0
    while at < addresses.size:
        vma = space.vmas.find_next(int(addresses[at]))
        if vma is None:
            return
        first, at = np.searchsorted(addresses, (vma.start, vma.end)).tolist()
        if first < at:
            chosen = addresses[first:at]
            yield from _revoke(space, Strangers(vma, chosen, space.table.lookup(chosen)))


def _get_user_pages(space: AddressSpace, span: AddressRange) -> Operation[AddressRange]:
    """Bring pages in for writing, as get_user_pages_remote(FOLL_WRITE | FOLL_SPLIT_PMD).

    Huge pages are split before anybody looks whether they could become writable as they are, but not before they are
    back from a device.

    Returns: the part that is in, by small pages.
    """
    end = _writable_end(space, span)
    blocks = huge_blocks(space, AddressRange(span.start, end))
    away = [max(one.start, span.start) for one in blocks if cpu_pte.is_device_private(space.table.get(one.start))]
    if away:
        yield from bring_in(space, np.array(away, np.uint64), write=False, by=By.GUP)
    blocks = huge_blocks(space, AddressRange(span.start, end))
    while True:
        yield from split_pmds(space, blocks)
        keep_small(space, blocks)
        target = lacking(space, AddressRange(span.start, end), write=True)
        stop = None
        if target is not None:
            stop = yield from bring_in(space, target, write=True, may_retry=False, by=By.GUP)
        blocks = huge_blocks(space, AddressRange(span.start, end))
        blocks = [block for block in blocks if space.is_huge_of_file(space.table.get(block.start))]
        if not blocks:
            break
    if stop is not None and stop.address == span.start:
        where = f"exclusive access: {span.start:#x}"
        if stop.signal is None:
            raise OutOfFramesError(f"{where}: memory ran out", address=span.start)
        raise BadAddressError(f"{where}: {stop.signal.value}", address=span.start)
    got = AddressRange(span.start, end if stop is None else stop.address)
    for vma in space.vmas.mapped_pieces(got):
        mark_accessed(space, vma.span, write=True)
    return got


def _writable_end(space: AddressSpace, span: AddressRange) -> int:
    """How far check_vma_flags() lets the pages be had for writing."""
    at = span.start
    while at < span.end:
        vma = space.vmas.find(at)
        error: HmmError | None = None
        if vma is None:
            error = BadAddressError(f"exclusive access: nothing is mapped at {at:#x}", address=at)
        elif vma.has(VmFlag.HUGETLB):
            error = InvalidRequestError(f"exclusive access: {vma} cannot be split", errnos.EOPNOTSUPP, address=at)
        elif not vma.writable or vma.has(VmFlag.IO | VmFlag.PFNMAP):
            error = AccessDeniedError(f"exclusive access: {vma} may not be written", errnos.EFAULT, address=at)
        if error is not None:
            if at == span.start:
                raise error
            return at
        assert vma is not None
        at = vma.end
    return span.end


def _suitable(space: AddressSpace, span: AddressRange) -> tuple[Pfns, Pfns]:
    """Page numbers and frames of the private pages of a range, of a folio maybe the first one only: int64[n] each."""
    entries = space.table.read(span.start, span.end)
    pfns = cpu_pte.cpu_pfn(entries)
    if cpu_pte.are_plain(entries) and cpu_pte.is_present(int(entries[0])):
        private = space.frames.test_flags(pfns, PageFlag.ANON)
    else:
        private = cpu_pte.is_present(entries) & ~cpu_pte.is_special(entries)
        private[private] = space.frames.test_flags(pfns[private], PageFlag.ANON)
    if space.huge and space.semantics.exclusive_ranges:
        private[private] = ~_are_tails(space.frames, pfns[private])
    chosen = private.nonzero()[0]
    return chosen + (span.start >> PAGE_SHIFT), pfns[chosen]


def _are_tails(frames: Frames, pfns: Pfns) -> npt.NDArray[np.bool_]:
    tails: npt.NDArray[np.bool_] = are_compound(frames, pfns) & (pfns % PMD_PAGES != 0)
    return tails


def _up_to_refusal(got: AddressRange, pages: Pfns, pfns: Pfns) -> tuple[AddressRange, Pfns, Pfns]:
    """What make_device_exclusive(), called page by page, gets before the first page that is refused."""
    expected = np.arange(pages.size) + (got.start >> PAGE_SHIFT)
    count = int(np.flatnonzero(pages != expected)[0]) if (pages != expected).any() else pages.size
    if not count:
        message = f"exclusive access: {got.start:#x} is not private memory"
        raise InvalidRequestError(message, errnos.EOPNOTSUPP, address=got.start)
    return AddressRange(got.start, got.start + (count << PAGE_SHIFT)), pages[:count], pfns[:count]


def _take(
    space: AddressSpace, pages: Pfns, pfns: Pfns, owner: DeviceId, initiator: MirrorId
) -> Operation[npt.NDArray[np.bool_] | None]:
    """Tell everybody who could map the pages, then take them.

    Returns: bool[n], which of them no page table maps any more; None when they changed meanwhile.
    """
    addresses = _addresses_of(pages)
    spans = spans_of_pages(pages)
    space.frames.get(pfns)
    try:
        with ExitStack() as brackets, space.frames.locks.lock(_folios(space, pfns), space.current.operation_id):
            bracket = space.notifier.invalidation(spans, Cause.EXCLUSIVE, owner=owner, initiator=initiator)
            yield from brackets.enter_context(bracket).deliver()
            heads: list[int] = []
            if space.semantics.exclusive_ranges:
                yield from _tell_before(space, pages, pfns, owner, initiator)
                heads = np.flatnonzero(are_compound(space.frames, pfns)).tolist() if space.huge else []
            told: list[list[_Told]] = []
            for at in heads:
                of_folio = _tell_of_folio(space, int(pages[at]), int(pfns[at]), owner, initiator, brackets)
                told.append((yield from of_folio))
            entries = entries_of(space.table, addresses)
            # Who forks meanwhile shares the pages, or is about to; the kernel's caller holds mmap_lock.
            if space.notifier.edits_overlap(spans, space.current.operation_id):
                return None
            ours = (entries & _WRITABLE == _WRITABLE) & (cpu_pte.cpu_pfn(entries) == pfns)
            if _is_taken_back(space, spans) or not ours.all() or cpu_pte.is_huge(entries).any():
                return None
            taken = np.ones(pfns.size, np.bool_)
            taken[heads] = False
            small = index_of(taken)
            _set_exclusive(space, addresses[small], entries[small])
            for at, known in zip(heads, told, strict=True):
                taken[at] = _take_folio(space, int(pages[at]), int(pfns[at]), known)
            return taken
    finally:
        space.frames.put(pfns)


def _folios(space: AddressSpace, pfns: Pfns) -> Pfns:
    """Frames of pages that this space maps, and all others of their large folios."""
    return with_folios(space.frames, pfns) if space.huge else pfns


def _addresses_of(pages: Pfns) -> Entries:
    return (pages << PAGE_SHIFT).view(np.uint64)


def _set_exclusive(space: AddressSpace, addresses: Entries, entries: Entries) -> None:
    """Put exclusive entries in the place of present ones: page_make_device_exclusive_one().

    That a page was written is its folio's from now on; that it was used is forgotten.
    """
    written = cpu_pte.cpu_pfn(cpu_pte.having(entries, cpu_pte.DIRTY))
    space.frames.set_flags(_folios(space, written), PageFlag.DIRTY)
    put_entries(space.table, addresses, (entries & _KEPT) | _EXCLUSIVE, in_use=True)


def _is_taken_back(space: AddressSpace, spans: tuple[AddressRange, ...]) -> bool:
    """Whether somebody else is changing these pages: the device's driver has been told already, for the last time.

    The kernel holds the lock of the page from here until the driver has it, and there until the page is back.
    """
    mine = space.current.operation_id
    return any(one.operation_id != mine and overlap(one.spans, spans) for one in space.notifier.invalidations)


def _folio_places(space: AddressSpace, page: int, head: Pfn) -> list[Places]:
    vma = space.vmas.find(page << PAGE_SHIFT)
    # It may have been unmapped meanwhile.
    return [] if vma is None else folio_places(space, vma, head, page + vma.mapping.delta)


def _tell_of_folio(
    space: AddressSpace, page: int, head: Pfn, owner: DeviceId, initiator: MirrorId, brackets: ExitStack
) -> Operation[list[_Told]]:
    """As page_make_device_exclusive_one() does of a large folio: from its first page in each VMA on, 2 MiB.

    Returns: what stays busy until `brackets` is closed, so that no device gets any of it.
    """
    told: list[_Told] = []
    for place in _folio_places(space, page, head):
        start = int(place.addresses[0])
        span = AddressRange(start, min(place.vma.end, start + PMD_SIZE))
        bracket = place.space.notifier.invalidation((span,), Cause.EXCLUSIVE, owner=owner, initiator=initiator)
        yield from brackets.enter_context(bracket).deliver()
        told.append((place.space.id, span))
    return told


def _take_folio(space: AddressSpace, page: int, head: Pfn, told: list[_Told]) -> bool:
    """Take what is mapped of a large folio where that was told, in each VMA up to the first page that was taken before.

    Returns: whether nothing of it is mapped any more.
    """
    frames, taken = space.frames, 0
    for place in _folio_places(space, page, head):
        entries, own = ours(place, head)
        before = own & cpu_pte.is_device_exclusive(entries)
        now = own & ~before
        if before.any():
            now[int(before.argmax()) :] = False
        known = tuple(sorted(span for number, span in told if number == place.space.id))
        now &= inside(place.addresses, known) if known else False
        _set_exclusive(place.space, place.addresses[now], entries[now])
        taken += int(np.count_nonzero(before | now))
    return taken == int(frames.mapcount[members(frames, head)].sum())


def _tell_before(space: AddressSpace, pages: Pfns, pfns: Pfns, owner: DeviceId, initiator: MirrorId) -> Operation[None]:
    """rmap_walk() tells every VMA where the pages could be, up to the one where they are: those that come before it."""
    whole = AddressRange(int(pages[0]) << PAGE_SHIFT, (int(pages[-1]) + 1) << PAGE_SHIFT)
    for vma in space.vmas.mapped_pieces(whole):
        if vma.backing is None and len(space.relatives) == 1 and not space.vmas.moved:
            continue  # nothing else can be at these offsets
        low, high = np.searchsorted(pages, (vma.start >> PAGE_SHIFT, vma.end >> PAGE_SHIFT)).tolist()
        now = space.vmas.find(vma.start)
        if now is None or (now.backing, now.mapping.delta) != (vma.backing, vma.mapping.delta):
            continue  # it went while others were told
        own, root = walk_order(space, now), space.anon_vma_root(now.anon_vma)
        indices = pages[low:high] + vma.mapping.delta
        others = anonymous_places(space.relatives.values(), indices, vma.backing, root)
        for place in in_walk_order(others):
            if walk_order(place.space, place.vma) >= own:
                break
            concerned = place.addresses[place.space.may_map(pfns[low:high][place.pages])]
            if not concerned.size:
                continue
            spans = spans_of(concerned)
            notifier = place.space.notifier
            with notifier.invalidation(spans, Cause.EXCLUSIVE, owner=owner, initiator=initiator) as bracket:
                yield from bracket.deliver()


def _wait_and_revoke(space: AddressSpace, touched: Strangers, _write: bool) -> Operation[None]:
    """The CPU gets pages back that it touched, when nobody has them locked: remove_device_exclusive_entry()."""
    if not (yield from wait_on_locked(space, touched.addresses, cpu_pte.cpu_pfn(touched.entries))):
        yield from _revoke(space, touched)


def _revoke(space: AddressSpace, touched: Strangers) -> Operation[None]:
    spans = spans_of(touched.addresses)
    with space.notifier.invalidation(spans, Cause.EXCLUSIVE) as bracket:
        yield from bracket.deliver()
        entries = entries_of(space.table, touched.addresses)
        held = index_of(cpu_pte.is_device_exclusive(entries))
        addresses = touched.addresses[held]
        put_entries(space.table, addresses, restored(space, addresses, entries[held]), in_use=True)


def restored(space: AddressSpace, addresses: Entries, entries: Entries) -> Entries:
    """What exclusive entries become when the CPU gets them back: restore_exclusive_pte().

    Args:
        addresses: uint64[n], ascending; entries: uint64[n], all exclusive.
    """
    given: Entries = (entries & ~_EXCLUSIVE) | _PRESENT
    if not addresses.size:
        return given
    for vma in space.vmas.mapped_pieces(AddressRange(int(addresses[0]), int(addresses[-1]) + PAGE_SIZE)):
        first, behind = np.searchsorted(addresses, (vma.start, vma.end)).tolist()
        part = given[first:behind]
        writable = _were_writable(space, vma, part)
        part[writable] |= np.uint64(DIRTIED | cpu_pte.WRITE)  # its device may have written
        if not vma.writable:
            writable[:] = False
        part[~writable] &= _NOT_WRITABLE
    return given


def _were_writable(space: AddressSpace, vma: Vma, entries: Entries) -> npt.NDArray[np.bool_]:
    """bool[n]: which pages of a VMA the CPU may write when it has them back, if the VMA permits it."""
    if space.semantics.exclusive_remembers_write:
        return cpu_pte.is_writable(entries)
    # As can_change_pte_writable() has it.
    writable = space.frames.test_flags(cpu_pte.cpu_pfn(entries), PageFlag.ANON_EXCLUSIVE)
    if not vma.writable:
        writable[:] = False
    elif not space.is_soft_dirty(vma):  # the next write is to be seen
        writable &= (entries & np.uint64(cpu_pte.SOFT_DIRTY)) != 0
    return writable


RESOLVERS[cpu_pte.EXCLUSIVE] = _wait_and_revoke
