"""Migration of pages between system memory and the memory of a device: migrate_vma_setup(), _pages(), _finalize().

    setup      tell all mirrors; collect what may be moved; take it out of every page table; leave what others hold
    copy       whoever migrates allocates destinations
    pages      check each destination; fill holes of anonymous memory with theirs
    finalize   entries become entries of the new page, which takes the contents over, or of the old one where it stayed

Each page has a source word and a destination word, as the kernel's arrays.  A migration fails page by page: what
could not be moved has no MIGRATE in its source word when all is done.  The address range is busy until the pages are
collected.  Then they are locked: who touches one waits, and another migration passes over it.

Only anonymous memory moves: pages of files come back to where they were, copies of them that a process has to
itself move like any other.  A hole is moved too, as if a page of zeroes were there.  Huge pages move as such, or are
split (migration_folios.py).

**Source**: Linux mm/migrate_device.c, 6.12 and 7.0; Documentation/mm/hmm.rst.

**Invariants**: when the operation ends, however it ends, no migration entry of it is left, and every page taken out
is back in the tables it was taken from or has been replaced there.

**Absent**: which destinations are chosen (device_pages.py), who waits for whom (folio_lock.py).

Differs: a page that several processes map makes one event per address space, not one per mapping; a page of a file
does not move to another frame of system memory either, which no driver of the kernel asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from operator import or_

import numpy as np
import numpy.typing as npt

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.errors import InvalidRequestError, OutOfFramesError
from hmm.events import Cause
from hmm.fault_pages import ANON_PAGE, READ_ONLY, WRITTEN, prepare_anon_vma
from hmm.file import File
from hmm.frame_contents import as_index
from hmm.frames import PageFlag
from hmm.large_folio import are_compound, are_pinned
from hmm.migration import (
    COMPOUND,
    MIGRATE,
    NOT_MIGRATE,
    Migration,
    Positions,
    Select,
    Selection,
    narrowed,
    source_words,
)
from hmm.migration_entries import FindPlaces, Fresh, HeldPages, entries_of, replace, stand_in, unmap_everywhere
from hmm.migration_folios import (
    all_or_none,
    are_all_selected,
    are_selected,
    are_whole,
    have_room,
    split_large,
    split_unmapped,
    split_zero_pages,
)
from hmm.notifier import Breaking, Invalidation
from hmm.operation import Operation
from hmm.rmap import Places, anonymous_places, file_places, merged_places
from hmm.units import (
    PAGE_SIZE,
    AddressRange,
    DeviceId,
    Entries,
    MirrorId,
    Pfns,
    is_page_aligned,
)
from hmm.vma import SPECIAL_FLAGS, Vma, VmFlag
from hmm.zone_device import are_private

__all__ = ["Copy", "migrate_vma", "run"]

_Mask = npt.NDArray[np.bool_]
_COMPOUND = np.uint64(COMPOUND)
_MIGRATE = np.array(MIGRATE, np.uint64)
_IMMOVABLE = SPECIAL_FLAGS | VmFlag.HUGETLB
_NOWHERE = np.empty(0, np.intp)

Copy = Callable[[Migration], Operation[None]]
"""Fills `dst` for the pages that it has destinations for; holds a reference of each.  A huge page that moves as one may
get small destinations: it is split then."""


def migrate_vma(
    space: AddressSpace,
    span: AddressRange,
    copy: Copy,
    *,
    select: Select,
    owner: DeviceId,
    initiator: MirrorId,
    settle: Copy | None = None,
) -> Operation[Migration]:
    """Move pages of a range, as far as they can be moved.

    Args:
        span: page-aligned, inside one VMA.
        copy: allocates destinations.
        owner: pgmap_owner: only pages of this device are selected for the way back.
        initiator: the mirror that asks.
        settle: what comes between `pages` and `finalize`; what has no MIGRATE behind it stays where it is.

    Returns: the migration; `src` says by MIGRATE what has been moved.

    Raises:
        InvalidRequestError: an empty or unaligned range, not in one VMA, or a VMA that nothing can be moved in
            (EINVAL).
        TimedOutError: a mirror with policy FAIL did not answer; nothing was moved (ETIMEDOUT).

    Cost: O(pages), vectorised.  Source: Linux mm/migrate_device.c, migrate_vma_setup().
    """
    with space.notifier.turn(shared=True) as turn:  # mmap_lock for reading: VMAs stay as they are
        yield from turn.wait()
        vma = _checked(space, span)
        addresses = np.arange(span.start, span.end, PAGE_SIZE, dtype=np.uint64)
        cause = Cause.MIGRATE_TO_DEVICE if Select.SYSTEM in select else Cause.MIGRATE_TO_SYSTEM
        migration = Migration(space, vma, addresses, select, owner, cause, initiator)
        yield from run(migration, copy, settle)
        return migration


def _checked(space: AddressSpace, span: AddressRange) -> Vma:
    vma = space.vmas.find(span.start)
    if not span or not is_page_aligned(span.start | span.end) or vma is None or span.end > vma.end:
        raise InvalidRequestError(f"migrate: {span} is not a range of pages of one VMA", address=span.start)
    if vma.has(_IMMOVABLE):
        raise InvalidRequestError(f"migrate: nothing can be moved in {vma}", address=span.start)
    return vma


def run(migration: Migration, copy: Copy, settle: Copy | None = None) -> Operation[None]:
    """All steps of a migration whose pages are chosen; nothing is moved if their VMA is gone when mirrors were told."""
    with _invalidation(migration, migration.spans) as bracket:
        yield from bracket.deliver()
        left = yield from split_large(migration)
        vma = migration.vma_now
        if vma is None:
            return
        taken, held = _collect(migration, vma, left)
    space, locks, what = migration.space, held.frames.locks, migration.cause._value_
    with Breaking((space.notifier,), what), locks.lock(held.pfns, space.current.operation_id) as lock:
        try:
            if not held.are_all_alone:
                yield from unmap_everywhere(held)
                taken, held = _leave_referenced(migration, vma, taken, held)
                lock.keep(held.pfns)
            yield from copy(migration)
            yield from split_unmapped(migration, held)
            _check_destinations(migration)
            yield from _fill_holes(migration)
            if settle is not None:
                yield from settle(migration)
        except BaseException:
            migration.src &= NOT_MIGRATE
            raise
        finally:
            _finalize(migration, taken, held)


def _invalidation(migration: Migration, spans: tuple[AddressRange, ...]) -> Invalidation:
    return migration.space.notifier.invalidation(
        spans, migration.cause, owner=migration.owner, initiator=migration.initiator
    )


# ---- setup


def _collect(migration: Migration, vma: Vma, left: _Mask) -> tuple[Selection, HeldPages]:
    """Say what is there, and put migration entries in the place of what is to be moved: migrate_vma_collect_pmd().

    Args:
        vma: as it is now: a touch may have given it an `anon_vma` since the migration began.
        left: bool[n], what is to stay.

    Returns: which of the addresses have them, and the pages there.
    """
    space = migration.space
    entries = entries_of(space.table, migration.addresses)
    whole = are_whole(migration, entries)
    framed = _framed(migration, entries, left)
    chosen = entries[framed]
    pfns = cpu_pte.cpu_pfn(chosen)
    reasons = list(_reasons_to_stay(migration, pfns))
    # Where all pages move as parts of blocks none is in the way as part of a large folio.
    if space.huge and (np.count_nonzero(whole) < whole.size or np.count_nonzero(left)):
        reasons.append((are_compound(space.frames, pfns) & ~whole[framed]) | left[framed])
    if reasons and np.count_nonzero(wanted := ~reduce(or_, reasons)) < wanted.size:
        framed, chosen, pfns = narrowed(framed, wanted), chosen[wanted], pfns[wanted]
    migration.has_holes = not isinstance(framed, slice)
    migration.src[framed] = source_words(chosen, pfns)
    if migration.starts.size:
        migration.src |= (whole & (migration.src != 0)) * _COMPOUND
    addresses, indices = migration.addresses[framed], migration.indices(framed)
    put = stand_in(space, addresses, chosen, as_index(pfns))
    held = _hold(migration, vma, pfns, indices)
    held.fresh = Fresh(Places(space, vma, addresses, slice(0, pfns.size)), put, space.current.stretch)
    return framed, held


def _hold(migration: Migration, vma: Vma, pfns: Pfns, indices: Pfns) -> HeldPages:
    return HeldPages(migration.space.frames, pfns, indices, _finder(migration, vma, pfns, indices))


def _reasons_to_stay(migration: Migration, pfns: Pfns) -> Iterator[_Mask]:
    """Which pages stay, bool[n], for each reason that can be met."""
    frames = migration.space.frames
    if not are_all_selected(migration, pfns):
        yield ~are_selected(migration, pfns)
    if frames.locks.held:  # folio_trylock()
        yield frames.locks.are_locked(pfns)
    if frames.pinned:
        # folio_try_share_anon_rmap_pte() fails for pages pinned by the only process that has them.
        yield are_pinned(frames, pfns) & frames.test_flags(pfns, PageFlag.ANON_EXCLUSIVE)
    if frames.ksm_places is not None:  # of a page that is met again folio_trylock() fails
        again = np.ones(pfns.size, np.bool_)
        again[np.unique(pfns, return_index=True)[1]] = False
        yield again


def _framed(migration: Migration, entries: Entries, left: _Mask) -> Selection:
    """Say which of the entries are holes.  Returns: which of them have a page that could move."""
    if cpu_pte.are_plain(entries):
        return slice(0, entries.size)
    holes = (entries == 0) if migration.vma.backing is None else np.zeros(entries.size, np.bool_)
    if Select.SYSTEM in migration.select:
        holes |= cpu_pte.is_special(entries) & (cpu_pte.cpu_pfn(entries) == 0)
    migration.src[holes & ~left] = MIGRATE
    return np.flatnonzero(cpu_pte.holds_frame(entries) & ~cpu_pte.is_device_exclusive(entries))


def _finder(migration: Migration, vma: Vma, pfns: Pfns, indices: Pfns) -> FindPlaces:
    """What finds where collected pages may be mapped: frames and page offsets, int64[n]."""
    space, frames = migration.space, migration.space.frames
    private, cached = True, False
    if vma.backing is not None:
        anonymous = frames.test_flags(pfns, PageFlag.ANON)
        private, cached = bool(anonymous.any()), not anonymous.all()

    def places() -> Iterator[Places]:
        if private:
            relatives = [space.relatives[number] for number in sorted(space.relatives)]
            root = space.anon_vma_root(vma.anon_vma)
            yield from anonymous_places(relatives, indices, vma.backing, root)
            yield from merged_places(frames, pfns)
        if cached and isinstance(vma.backing, File):
            yield from file_places(vma.backing.mapping_spaces(), indices, vma.backing)

    return places


def _leave_referenced(migration: Migration, vma: Vma, taken: Selection, held: HeldPages) -> tuple[Selection, HeldPages]:
    """Put the pages back that somebody else still uses, and unlock them: migrate_vma_check_page().

    Returns: the others.
    """
    frames, pfns = held.frames, held.pfns
    cached = ~frames.test_flags(pfns, PageFlag.ANON) | (frames.private[pfns] != 0)
    kept = (frames.mapcount[pfns] > 0) | (frames.refcount[pfns] > 1 + cached)
    all_or_none(kept, (migration.src[taken] & _COMPOUND) != 0)
    if not np.count_nonzero(kept):
        return taken, held
    migration.src[narrowed(taken, kept)] = 0
    replace(_hold(migration, vma, pfns[kept], held.indices[kept]), pfns[kept])
    return narrowed(taken, ~kept), _hold(migration, vma, pfns[~kept], held.indices[~kept])


# ---- pages


def _check_destinations(migration: Migration) -> None:
    """Refuse what cannot be: pages of files; MIGRATE goes where nothing is moved.

    So it does of pages in the swap cache: as long as an entry names their slot, folio_free_swap() fails.
    """
    frames = migration.space.frames
    uncached = migration.vma.backing is None and frames.swap is None
    if uncached and np.count_nonzero(migration.dst) == migration.dst.size:
        return  # each has somewhere to go
    pages = migration.pages
    sources, targets = migration.source_pfns(pages), migration.target_pfns(pages)
    cached = ~frames.test_flags(sources, PageFlag.ANON) | (frames.private[sources] != 0)
    refused = (targets == 0) | cached
    migration.src[pages[refused]] &= NOT_MIGRATE


def _fill_holes(migration: Migration) -> Operation[None]:
    """Put destinations where nothing was: migrate_vma_insert_page(); told once, from the first one on."""
    holes = migration.holes if migration.has_holes else _NOWHERE
    if not holes.size:
        return
    unfilled = migration.target_pfns(holes) == 0
    migration.src[holes[unfilled]] = 0
    holes = holes[~unfilled]
    if not holes.size:
        return
    rest = AddressRange(int(migration.addresses[holes[0]]), int(migration.addresses[-1]) + PAGE_SIZE)
    with _invalidation(migration, (rest,)) as bracket:
        yield from bracket.deliver()
        yield from split_zero_pages(migration, holes)
        filled = _insert(migration, holes, migration.target_pfns(holes))
    migration.src[holes[~filled]] = 0


def _insert(migration: Migration, holes: Positions, pfns: Pfns) -> _Mask:
    space, frames = migration.space, migration.space.frames
    nothing = np.zeros(holes.size, np.bool_)
    if migration.vma.backing is not None:
        return nothing
    addresses = migration.addresses[holes]
    entries = space.table.lookup(addresses)
    whole = (migration.src[holes] & _COMPOUND) != 0
    free: _Mask = (entries == 0) | (cpu_pte.is_special(entries) & (whole | ~cpu_pte.is_huge(entries)))
    there, here = cpu_pte.DEVICE, READ_ONLY
    if migration.vma.writable:
        there, here = there | cpu_pte.WRITE, WRITTEN
    flags: Entries = np.where(are_private(frames, pfns), np.uint64(there), np.uint64(here))
    if np.count_nonzero(whole):
        free &= ~whole | have_room(migration, holes, entries)
        flags[whole] |= np.uint64(cpu_pte.HUGE)
        space.huge = True
    prepare_anon_vma(space, migration.vma)
    # What is missing is for its handler to bring in; check_stable_address_space().
    if migration.vma.mapping.userfaultfd or space.unstable:
        return nothing
    try:
        space.table.store(addresses[free], cpu_pte.cpu_entry(pfns, flags)[free])
    except OutOfFramesError:
        return nothing
    frames.set_flags(pfns[free], ANON_PAGE)
    frames.map_new(pfns[free])
    space.claim(pfns[free], int(addresses[0]))
    frames.index[pfns] = migration.indices(holes)
    return free


# ---- finalize


def _finalize(migration: Migration, taken: Selection, held: HeldPages) -> None:
    """Entries of moved pages become entries of their destinations, all others what they were."""
    targets = migration.target_pfns(taken)
    if not int(np.bitwise_and.reduce(migration.src)) & MIGRATE:
        stayed = (migration.src & _MIGRATE) == 0
        targets = np.where(stayed[taken], held.pfns, targets)
        spare = np.flatnonzero(stayed & (migration.dst != 0))
        held.frames.put(migration.target_pfns(spare))
        migration.dst[spare] = 0
    replace(held, targets, filled=migration.filled)
