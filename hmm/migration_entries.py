"""Migration entries: they stand in for a page while it is being moved, in every page table that had it.

Whoever touches such an entry waits until the move has ended.  The page is held by one reference of the migration
alone, so that what is mapped nowhere else and referenced by nobody else cannot change.  When the move ends, the
entries that are still there become entries of the new page, or of the old one; an entry that was unmapped or moved
meanwhile is found, or not, where the reverse map says.

**Source**: Linux mm/rmap.c (try_to_migrate_one()), mm/migrate.c (remove_migration_pte()), include/linux/swapops.h.

**Invariants**: outside of a running migration no table holds a migration entry.

**Absent**: which pages move, where to, and who is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.events import Cause
from hmm.fault import RESOLVERS
from hmm.fault_pages import Strangers
from hmm.frames import Frames, PageFlag
from hmm.operation import Await, Operation, Pause, WaitFor
from hmm.rmap import Places
from hmm.units import PAGE_SHIFT, Entries, Pfns, spans_of_pages
from hmm.zone_device import are_private

__all__ = ["FindPlaces", "HeldPages", "entries_of", "replace", "stand_in", "unmap_everywhere"]

_CARRIED = cpu_pte.WRITE | cpu_pte.DIRTY | cpu_pte.ACCESSED | cpu_pte.SOFT_DIRTY
_MAPPED = np.uint64(cpu_pte.PRESENT | cpu_pte.DEVICE)
_PAGE_STATE = PageFlag.ANON | PageFlag.ANON_EXCLUSIVE | PageFlag.SWAPBACKED | PageFlag.DIRTY

FindPlaces = Callable[[], Iterator[Places]]
"""Where the pages of a migration could be mapped now."""


@dataclass(frozen=True, slots=True)
class HeldPages:
    """Pages that a migration holds a reference of.

    Attributes:
        pfns: int64[n].
        places: finds what may map them; its slices select from `pfns`.
    """

    frames: Frames
    pfns: Pfns
    places: FindPlaces


def stand_in(space: AddressSpace, addresses: Entries, entries: Entries) -> None:
    """Put migration entries in the place of entries that map frames held by the migration.

    Args:
        addresses: uint64[n], unique.
        entries: uint64[n], what stands there: present, or of a device's private page.

    Cost: O(n), vectorised.
    """
    frames, pfns = space.frames, cpu_pte.cpu_pfn(entries)
    written = pfns[cpu_pte.is_dirty(entries)]
    frames.set_flags(written, PageFlag.DIRTY)
    flags = (entries & np.uint64(_CARRIED)) | np.uint64(cpu_pte.MIGRATION)
    space.table.store(addresses, cpu_pte.cpu_entry(pfns, flags))
    frames.unmap(pfns)


def unmap_everywhere(held: HeldPages, brackets: ExitStack, *, only_where_mapped: bool = False) -> Operation[None]:
    """Replace every entry that maps one of the pages, in all address spaces, after their mirrors were told.

    Only pages that are mapped are looked for.  The ranges stay busy until `brackets` is closed.

    Args:
        only_where_mapped: do not tell those who could map a page and do not.

    Raises: TimedOutError: a mirror with policy FAIL did not answer; some entries were replaced already.

    Cost: O(VMAs + pages), vectorised; one event per address space.
    Source: Linux mm/rmap.c, try_to_migrate().  Every VMA where a page could be is told, as there.
    """
    frames = held.frames
    mapped = frames.mapcount[held.pfns] > 0
    if not mapped.any():
        return
    of_file = ~frames.test_flags(held.pfns, PageFlag.ANON)
    told: dict[int, tuple[AddressSpace, list[Entries]]] = {}
    for place in held.places():
        chosen = mapped[place.pages] & (of_file[place.pages] | place.space.may_map(held.pfns[place.pages]))
        if only_where_mapped:
            entries = place.space.table.lookup(place.addresses)
            chosen = chosen & _names(entries, held.pfns[place.pages])
        if chosen.any():
            told.setdefault(place.space.id, (place.space, []))[1].append(place.addresses[chosen])
    for space, parts in told.values():
        pages = np.unique((np.concatenate(parts) >> np.uint64(PAGE_SHIFT)).view(np.int64))
        notifier = space.notifier
        bracket = brackets.enter_context(notifier.invalidation(spans_of_pages(pages), Cause.MIGRATE_SHARED))
        yield from bracket.deliver()
        for place in [place for place in held.places() if place.space is space]:
            entries = space.table.lookup(place.addresses)
            naming = _names(entries, held.pfns[place.pages])
            stand_in(space, place.addresses[naming], entries[naming])


def replace(held: HeldPages, targets: Pfns) -> None:
    """End the migration: entries of `held.pfns[i]` become entries of `targets[i]`, which may be the same frame.

    What the page was (anonymous, exclusive to one process, dirty) goes with it.  The migration's reference of the old
    frame is dropped, and that of the new one, if it is another.

    Cost: O(VMAs + pages), vectorised.  Source: Linux mm/migrate.c, remove_migration_ptes().
    """
    frames, pfns = held.frames, held.pfns
    moved = targets != pfns
    frames.flags[targets[moved]] = frames.flags[pfns[moved]] & np.uint32(_PAGE_STATE)
    frames.mapping[targets[moved]] = frames.mapping[pfns[moved]]
    kinds = np.where(are_private(frames, targets), np.uint64(cpu_pte.DEVICE), np.uint64(cpu_pte.PRESENT))
    for place in held.places():
        table = place.space.table
        entries = table.lookup(place.addresses)
        ours = cpu_pte.is_migration(entries) & (cpu_pte.cpu_pfn(entries) == pfns[place.pages])
        if ours.any():
            new = targets[place.pages][ours]
            flags = (entries[ours] & np.uint64(_CARRIED)) | kinds[place.pages][ours]
            table.store(place.addresses[ours], cpu_pte.cpu_entry(new, flags))
            frames.map(new)
    frames.put(pfns)
    frames.put(targets[moved])


def entries_of(space: AddressSpace, addresses: Entries) -> Entries:
    """uint64[n]: the entries at page addresses, ascending; a range is read at once."""
    if addresses.size and int(addresses[-1] - addresses[0]) >> PAGE_SHIFT == addresses.size - 1:
        start = int(addresses[0])
        return space.table.read(start, start + (addresses.size << PAGE_SHIFT))
    return space.table.lookup(addresses)


def _names(entries: Entries, pfns: Pfns) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    mapped = ((entries & _MAPPED) != 0) & ~cpu_pte.is_special(entries)
    result: np.ndarray[tuple[int, ...], np.dtype[np.bool_]] = mapped & (cpu_pte.cpu_pfn(entries) == pfns)
    return result


def _wait(space: AddressSpace, pages: Strangers, _write: bool) -> Operation[None]:
    # migration_entry_wait(): the range is busy until the migration has ended; not where fork or mremap took an entry.
    spans = spans_of_pages((pages.addresses >> np.uint64(PAGE_SHIFT)).view(np.int64))
    if space.notifier.copies_overlap(spans):
        yield Await(WaitFor.COPIES, space.id, spans)
    elif space.notifier.invalidations_overlap(spans):
        yield Await(WaitFor.INVALIDATIONS, space.id, spans)
    else:
        yield Pause()


RESOLVERS[cpu_pte.MIGRATION] = _wait
