"""Migration entries: they stand in for a page while it is being moved, in every page table that had it.

Whoever touches such an entry waits until the page is unlocked, when the move has ended.  The page is held by one
reference of the migration alone, so that what is mapped nowhere else and referenced by nobody else cannot change.  When
the move ends, the entries that are still there become entries of the new page, or of the old one; an entry that was
unmapped or moved meanwhile is found, or not, where the reverse map says.

**Source**: Linux mm/rmap.c (try_to_migrate_one()), mm/migrate.c (remove_migration_pte()), include/linux/swapops.h.

**Invariants**: outside of a running migration no table holds a migration entry.

**Absent**: which pages move, where to, and who is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.ascending import among, unique
from hmm.events import Cause
from hmm.fault import RESOLVERS
from hmm.fault_pages import Strangers
from hmm.frames import Frames, PageFlag, RegionKind
from hmm.operation import Await, Operation, WaitFor
from hmm.page_table import PageTable
from hmm.rmap import Places, in_walk_order
from hmm.units import (
    PAGE_SHIFT,
    PAGE_SIZE,
    ULONG_MAX,
    Address,
    AddressRange,
    Entries,
    Pfns,
    page_numbers,
    spans_of,
    spans_of_pages,
)
from hmm.zone_device import are_private, sole_region

__all__ = [
    "CARRIED",
    "FindPlaces",
    "Fresh",
    "HeldPages",
    "are_names_of",
    "entries_of",
    "index_of",
    "migration_entry_wait",
    "put_entries",
    "range_of",
    "replace",
    "stand_in",
    "unmap_everywhere",
    "wait_on_locked",
]

_CARRIED_BITS = cpu_pte.WRITE | cpu_pte.DIRTY | cpu_pte.ACCESSED | cpu_pte.SOFT_DIRTY | cpu_pte.HUGE
CARRIED = np.array(_CARRIED_BITS, np.uint64)  # numpy takes arrays without dimensions in half the time of scalars
"""What goes with an entry while a page is moved, to memory that the CPU reaches."""
_CARRIED_THERE = np.array(cpu_pte.WRITE | cpu_pte.SOFT_DIRTY | cpu_pte.HUGE, np.uint64)
"""To a device's private memory."""
_STANDS_IN = np.array(cpu_pte.MIGRATION, np.uint64)
_KEPT = np.array(ULONG_MAX & ~cpu_pte.FLAGS | _CARRIED_BITS, np.uint64)
_NAMES = np.array(ULONG_MAX & ~cpu_pte.FLAGS | cpu_pte.MIGRATION, np.uint64)
"""The kind of an entry, and its frame."""
_DEVICE, _PRESENT = np.array(cpu_pte.DEVICE, np.uint64), np.array(cpu_pte.PRESENT, np.uint64)
_HUGE_WRITTEN, _SOFT_DIRTY = np.uint64(cpu_pte.HUGE | cpu_pte.DIRTY), np.uint64(cpu_pte.SOFT_DIRTY)
_MAPPED = cpu_pte.PRESENT | cpu_pte.DEVICE
FindPlaces = Callable[[], Iterator[Places]]
"""Where the pages of a migration could be mapped now."""


class Fresh(NamedTuple):
    """All migration entries of some pages, just put in one place.

    Attributes:
        entries: uint64[n], as they were put.
        stretch: when (`Current.stretch`): while it lasts nobody else sees them.
    """

    place: Places
    entries: Entries
    stretch: int


@dataclass(slots=True, eq=False)
class HeldPages:
    """Pages that a migration holds a reference of.

    Attributes:
        pfns: int64[n].
        indices: int64[n], their page offsets, ascending.
        places: finds what may map them; its slices select from `pfns`.
        fresh: their entries, if it is known; whoever changes one, or adds one elsewhere, forgets it.
    """

    frames: Frames
    pfns: Pfns
    indices: Pfns
    places: FindPlaces
    fresh: Fresh | None = None

    def standing(self) -> Iterator[tuple[Places, Entries]]:
        """Where migration entries of the pages are, and the entries, uint64[n]."""
        fresh = self.fresh
        if fresh is not None and fresh.stretch == fresh.place.space.current.stretch:
            yield fresh.place, fresh.entries
            return
        for place in self.places():
            entries = entries_of(place.space.table, place.addresses)
            ours = are_names_of(entries, self.pfns[place.pages])
            number = np.count_nonzero(ours)
            if number:
                yield (place, entries) if number == ours.size else (place.which(ours), entries[ours])

    @property
    def are_all_alone(self) -> bool:
        """Whether nobody refers to one of the pages but the migration: then nobody maps one either."""
        return int(np.count_nonzero(self.frames.refcount[self.pfns] == 1)) == self.pfns.size


def stand_in(space: AddressSpace, addresses: Entries, entries: Entries, pfns: Pfns | slice) -> Entries:
    """Put migration entries in the place of entries that map frames, whose references become the migration's.

    Args:
        addresses: uint64[n], unique.
        entries: uint64[n], what stands there: present, or of a device's private page.
        pfns: int64[n], their frames, or the slice of them.

    Returns: uint64[n], the migration entries.

    Cost: O(n), vectorised.  Source: Linux mm/migrate_device.c, migrate_vma_collect_pmd(), which takes a reference and
    drops the entry's.
    """
    dirty = cpu_pte.having(entries, cpu_pte.DIRTY)
    space.frames.set_flags(pfns if dirty is entries else cpu_pte.cpu_pfn(dirty), PageFlag.DIRTY)
    put: Entries = (entries & _KEPT) | _STANDS_IN
    put_entries(space.table, addresses, put, in_use=True)
    space.frames.detach(pfns)
    return put


def unmap_everywhere(
    held: HeldPages,
    *,
    only_where_mapped: bool = False,
    cause: Cause = Cause.MIGRATE_SHARED,
    certain: bool = False,
) -> Operation[bool]:
    """Replace every entry that maps one of the pages, in all address spaces, after their mirrors were told.

    Only pages that are mapped are looked for.  An entry that came meanwhile where nobody was told stays, and with it
    the page.

    Args:
        only_where_mapped: do not tell those who could map a page and do not.
        cause, certain: of the events, as for `Notifier.invalidation`; what is certain takes pages that a device has to
            itself too.

    Returns: whether there was anything to be replaced.

    Raises: TimedOutError: a mirror with policy FAIL did not answer; some entries were replaced already.

    Cost: O(VMAs + pages), vectorised; one event per address space.
    Source: Linux mm/rmap.c, try_to_migrate().  Every VMA where a page could be is told, as there, up to the one that
    had the last mapping of the page (folio_not_mapped()).
    """
    frames = held.frames
    mappings = frames.mapcount[held.pfns]
    if not mappings.any():
        return False
    of_file = ~frames.test_flags(held.pfns, PageFlag.ANON)
    told: dict[int, tuple[AddressSpace, list[Entries]]] = {}
    for place in in_walk_order(held.places()):
        pfns = held.pfns[place.pages]
        possible = of_file[place.pages] if place.of_file else ~of_file[place.pages] & place.space.may_map(pfns)
        naming = _names(place.space, place.space.table.lookup(place.addresses), pfns, certain) & possible
        chosen = possible & (mappings[place.pages] > 0)
        if only_where_mapped:
            chosen &= naming
        if isinstance(place.pages, slice):  # merged pages may be in one VMA more than once
            mappings[place.pages] -= naming
        if chosen.any():
            told.setdefault(place.space.id, (place.space, []))[1].append(place.addresses[chosen])
    held.fresh = None
    for space, parts in told.values():
        pages = unique(page_numbers(np.concatenate(parts)))
        with space.notifier.invalidation(spans_of_pages(pages), cause, certain=certain) as bracket:
            yield from bracket.deliver()
            for place in [place for place in held.places() if place.space is space]:
                entries = space.table.lookup(place.addresses)
                naming = _names(space, entries, held.pfns[place.pages], certain)
                naming &= among(page_numbers(place.addresses), pages)
                named = held.pfns[place.pages][naming]
                stand_in(space, place.addresses[naming], entries[naming], named)
                frames.put(named)
    return bool(told)


def replace(held: HeldPages, targets: Pfns, *, filled: bool = False) -> None:
    """End the migration: entries of `held.pfns[i]` become entries of `targets[i]`, which may be the same frame.

    What the page holds and was (anonymous, exclusive to one process, dirty, used, part of a large folio) goes with it:
    of large folios the new frames are one too.  The migration's reference of the old frame is dropped, and that of the
    new one, if it is another: or passes to the entry where each page has one in one VMA.

    Args:
        filled: somebody has put into the new frames what they are to hold.

    Cost: O(VMAs + pages), vectorised.  Source: Linux mm/migrate.c, remove_migration_ptes().
    """
    frames, pfns = held.frames, held.pfns
    moved = targets != pfns
    if np.count_nonzero(moved) == moved.size:
        new, old, indices = targets, pfns, held.indices
    else:
        new, old, indices = targets[moved], pfns[moved], held.indices[moved]
    alone = frames.migrate(new, old, indices, filled=filled)
    referenced = targets
    for place, entries in held.standing():
        targeted = targets[place.pages]
        flags = _flags(frames, entries, targeted)
        if place.space.huge:
            # remove_migration_pmd() calls pmd_mkdirty() last, which makes the entry soft-dirty too.
            flags |= ((flags & _HUGE_WRITTEN) == _HUGE_WRITTEN) * _SOFT_DIRTY
        put_entries(place.space.table, place.addresses, cpu_pte.cpu_entry(targeted, flags), in_use=True)
        if isinstance(place.pages, slice) and targeted.size == referenced.size:  # merged pages may be there repeatedly
            frames.attach(targeted)
            referenced = targeted[:0]
        else:
            frames.map(targeted)
    if alone:
        frames.put_last(old)
    else:
        frames.put(old)
    if referenced.size:
        frames.put(referenced)


def _flags(frames: Frames, entries: Entries, pfns: Pfns) -> Entries:
    """Flags of entries that name these frames, from the migration entries in their place: remove_migration_pte().

    An entry of a page in a device's private memory says neither that it was used nor that it was written.
    """
    sole = sole_region(frames, pfns)
    if sole is None:
        private = are_private(frames, pfns)
        return np.where(private, (entries & _CARRIED_THERE) | _DEVICE, (entries & CARRIED) | _PRESENT)
    if sole.kind is RegionKind.DEVICE_PRIVATE:
        return (entries & _CARRIED_THERE) | _DEVICE
    return (entries & CARRIED) | _PRESENT


def entries_of(table: PageTable, addresses: Entries) -> Entries:
    """uint64[n]: the entries at page addresses, ascending and unique; a range is read at once."""
    bounds = _bounds(addresses)
    return table.lookup(addresses) if bounds is None else table.read(*bounds)


def put_entries(table: PageTable, addresses: Entries, entries: Entries, *, in_use: bool = False) -> None:
    """Store entries, uint64[n], at page addresses, ascending and unique; a range is filled at once.

    Args:
        in_use: none of them is 0.
    """
    bounds = _bounds(addresses)
    if bounds is None:
        table.store(addresses, entries)
    else:
        table.fill(*bounds, entries, in_use=in_use)


def range_of(addresses: Entries) -> AddressRange | None:
    """The range whose pages are at these addresses, uint64[n] ascending and unique, if they are consecutive."""
    bounds = _bounds(addresses)
    return None if bounds is None else AddressRange(*bounds)


def _bounds(addresses: Entries) -> tuple[Address, Address] | None:
    if not addresses.size:
        return None
    first, last = int(addresses[0]), int(addresses[-1])
    return (first, last + PAGE_SIZE) if (last - first) >> PAGE_SHIFT == addresses.size - 1 else None


def index_of(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_] | slice:
    """What selects the pages that a mask, bool[n], says: a slice, which copies nothing, for all of them."""
    return slice(0, mask.size) if np.count_nonzero(mask) == mask.size else mask


def are_names_of(entries: Entries, pfns: Pfns) -> npt.NDArray[np.bool_]:
    """bool[n]: which entries are the migration entries of these pages."""
    names: npt.NDArray[np.bool_] = (entries & _NAMES) == cpu_pte.cpu_entry(pfns, cpu_pte.MIGRATION)
    return names


def _names(space: AddressSpace, entries: Entries, pfns: Pfns, exclusive: bool) -> npt.NDArray[np.bool_]:
    # In 6.12 what a device has to itself is mapped nowhere: page_make_device_exclusive_one().
    bits = _MAPPED | (cpu_pte.EXCLUSIVE if exclusive or not space.semantics.exclusive_ranges else 0)
    mapped = ((entries & np.uint64(bits)) != 0) & ~cpu_pte.is_special(entries)
    result: npt.NDArray[np.bool_] = mapped & (cpu_pte.cpu_pfn(entries) == pfns)
    return result


def wait_on_locked(space: AddressSpace, addresses: Entries, pfns: Pfns) -> Operation[bool]:
    """Wait until the first locked one of some pages is unlocked.

    Args:
        addresses: uint64[n], where they are, or were.
        pfns: int64[n], their frames.

    Returns: whether one of them was locked.

    Source: Linux mm/filemap.c, folio_wait_bit_common().
    """
    locks = space.frames.locks
    locked = locks.are_locked(pfns)
    if not locked.any():
        return False
    first = int(locked.argmax())
    lock, start = locks.of(int(pfns[first])), int(addresses[first])
    assert lock is not None
    yield Await(WaitFor.FOLIO, space.id, (AddressRange(start, start + PAGE_SIZE),), lock.ticket)
    return True


def migration_entry_wait(space: AddressSpace, addresses: Entries, entries: Entries) -> Operation[None]:
    """Wait until the first of the pages is unlocked that migration entries stand in for; then all are to be looked at.

    Args:
        addresses, entries: uint64[n], as they are now; n > 0.

    Source: Linux mm/migrate.c.
    """
    spans = spans_of(addresses)
    if space.notifier.copies_overlap(spans):
        yield Await(WaitFor.COPIES, space.id, spans)
        return
    waited = yield from wait_on_locked(space, addresses, cpu_pte.cpu_pfn(entries))
    assert waited, f"nobody moves the pages that entries stand in for at {spans[0]}"


def _wait(space: AddressSpace, pages: Strangers, _write: bool) -> Operation[None]:
    yield from migration_entry_wait(space, pages.addresses, pages.entries)


RESOLVERS[cpu_pte.MIGRATION] = _wait
