"""Migration of pages between system memory and the memory of a device: migrate_vma_setup(), _pages(), _finalize().

    setup      tell all mirrors; collect what may be moved; take it out of every page table; leave what others hold
    copy       whoever migrates allocates destinations and fills them
    pages      check each destination; fill holes of anonymous memory with theirs
    finalize   entries become entries of the new page, or of the old one where it stayed

Each page has a source word and a destination word, as the kernel's arrays.  A migration fails page by page: what
could not be moved has no MIGRATE in its source word when all is done.  The address range is busy throughout.

Only anonymous memory moves: pages of files come back to where they were, copies of them that a process has to
itself move like any other.  A hole is moved too, as if a page of zeroes were there.

**Source**: Linux mm/migrate_device.c, 6.12; Documentation/mm/hmm.rst.

**Invariants**: when the operation ends, however it ends, no migration entry of it is left, and every page taken out
is back in the tables it was taken from or has been replaced there.

**Absent**: which destinations are chosen (device_pages.py), huge pages as such: they are split first; the swap cache.

Differs: a page that several processes map makes one event per address space, not one per mapping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import IntFlag

import numpy as np
import numpy.typing as npt

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.errors import InvalidRequestError, OutOfFramesError
from hmm.events import Cause
from hmm.fault_pages import ANON_PAGE, prepare_anon_vma
from hmm.file import File
from hmm.frames import PageFlag
from hmm.huge_split import huge_blocks, split_folio, split_pmds
from hmm.large_folio import are_compound
from hmm.migration_entries import HeldPages, entries_of, range_of, replace, stand_in, unmap_everywhere
from hmm.notifier import Invalidation
from hmm.operation import Operation
from hmm.rmap import Places, anonymous_places, file_places, merged_places
from hmm.units import (
    PAGE_SHIFT,
    PAGE_SIZE,
    PMD_MASK,
    AddressRange,
    DeviceId,
    Entries,
    MirrorId,
    Pfns,
    is_page_aligned,
    spans_of_pages,
)
from hmm.vma import SPECIAL_FLAGS, Vma, VmFlag
from hmm.zone_device import are_private, owners

__all__ = ["MIGRATE", "PFN_SHIFT", "VALID", "WRITE", "Copy", "Migration", "Select", "migrate_pfn", "migrate_vma"]

VALID = 1 << 0
"""There is a page."""
MIGRATE = 1 << 1
"""It is to be moved; behind `pages` it was."""
WRITE = 1 << 3
PFN_SHIFT = 6

_Mask = npt.NDArray[np.bool_]
_Positions = npt.NDArray[np.intp]
_MIGRATE_WRITE = np.uint64(MIGRATE | WRITE)
_NOT_MIGRATE = np.uint64(~MIGRATE & (1 << 64) - 1)


class Select(IntFlag):
    """MIGRATE_VMA_SELECT_: what of the range is collected, besides holes."""

    SYSTEM = 1
    DEVICE_PRIVATE = 2
    DEVICE_COHERENT = 4


def migrate_pfn(pfns: Pfns) -> Entries:
    """Destination words of frames."""
    words: Entries = (pfns.view(np.uint64) << np.uint64(PFN_SHIFT)) | np.uint64(VALID)
    return words


Copy = Callable[["Migration"], Operation[None]]
"""Fills `dst` for the pages that it has destinations for, and their contents; holds a reference of each."""


@dataclass(slots=True, eq=False)
class Migration:
    """`struct migrate_vma`: some pages of one VMA on their way.

    Attributes:
        addresses: uint64[n], ascending.
        owner: the device whose pages are selected, and whose drivers know of the migration.
        initiator: the mirror that asked for it, or that put the pages where they have to come back from.
        src, dst: uint64[n], words of VALID, MIGRATE, WRITE and a frame number.
    """

    space: AddressSpace
    vma: Vma
    addresses: Entries
    select: Select
    owner: DeviceId
    cause: Cause
    initiator: MirrorId
    src: Entries = field(init=False)
    dst: Entries = field(init=False)

    def __post_init__(self) -> None:
        self.src = np.zeros(self.addresses.size, np.uint64)
        self.dst = np.zeros(self.addresses.size, np.uint64)

    @property
    def pages(self) -> _Positions:
        """Which of the addresses have a page that is on its way."""
        wanted = np.uint64(VALID | MIGRATE)
        return np.flatnonzero((self.src & wanted) == wanted)

    @property
    def holes(self) -> _Positions:
        """Which of the addresses have none and are on their way."""
        return np.flatnonzero((self.src & np.uint64(VALID | MIGRATE)) == MIGRATE)

    def source_pfns(self, which: _Positions) -> Pfns:
        """int64[n]: the frames of `src`."""
        return (self.src[which] >> np.uint64(PFN_SHIFT)).view(np.int64)

    def target_pfns(self, which: _Positions) -> Pfns:
        """int64[n]: the frames of `dst`; 0 where there is none."""
        return (self.dst[which] >> np.uint64(PFN_SHIFT)).view(np.int64)

    @property
    def spans(self) -> tuple[AddressRange, ...]:
        """The pages as ranges."""
        span = range_of(self.addresses)
        if span is not None:
            return (span,)
        return spans_of_pages((self.addresses >> np.uint64(PAGE_SHIFT)).view(np.int64))

    def indices(self, which: _Positions) -> Pfns:
        """int64[n]: page->index of pages of this VMA."""
        return (self.addresses[which] >> np.uint64(PAGE_SHIFT)).view(np.int64) + self.vma.mapping.delta


def migrate_vma(
    space: AddressSpace, span: AddressRange, copy: Copy, *, select: Select, owner: DeviceId, initiator: MirrorId
) -> Operation[Migration]:
    """Move pages of a range, as far as they can be moved.

    Args:
        span: page-aligned, inside one VMA.
        copy: allocates and fills destinations.
        owner: pgmap_owner: only pages of this device are selected for the way back.
        initiator: the mirror that asks.

    Returns: the migration; `src` says by MIGRATE what has been moved.

    Raises:
        InvalidRequestError: an empty or unaligned range, not in one VMA, or a VMA that nothing can be moved in
            (EINVAL).
        TimedOutError: a mirror with policy FAIL did not answer; nothing was moved (ETIMEDOUT).

    Cost: O(pages), vectorised, and the copying.  Source: Linux mm/migrate_device.c, migrate_vma_setup().
    """
    with space.notifier.turn() as turn:  # mmap_lock: VMAs stay as they are
        yield from turn.wait()
        vma = _checked(space, span)
        addresses = np.arange(span.start, span.end, PAGE_SIZE, dtype=np.uint64)
        cause = Cause.MIGRATE_TO_DEVICE if select & Select.SYSTEM else Cause.MIGRATE_TO_SYSTEM
        migration = Migration(space, vma, addresses, select, owner, cause, initiator)
        yield from run(migration, copy)
        return migration


def _checked(space: AddressSpace, span: AddressRange) -> Vma:
    vma = space.vmas.find(span.start)
    if not span or not is_page_aligned(span.start | span.end) or vma is None or span.end > vma.end:
        raise InvalidRequestError(f"migrate: {span} is not a range of pages of one VMA", address=span.start)
    if vma.has(SPECIAL_FLAGS | VmFlag.HUGETLB):
        raise InvalidRequestError(f"migrate: nothing can be moved in {vma}", address=span.start)
    return vma


def run(migration: Migration, copy: Copy) -> Operation[None]:
    """All steps of a migration whose pages are chosen; nothing is moved if their VMA is gone when mirrors were told."""
    with ExitStack() as brackets:
        yield from brackets.enter_context(_invalidation(migration, migration.spans)).deliver()
        yield from _split(migration)
        if not _still_there(migration):
            return
        taken = _collect(migration)
        held = _held(migration, taken)
        try:
            yield from unmap_everywhere(held, brackets)
            _leave_referenced(migration, taken, held)
            yield from copy(migration)
            _check_destinations(migration)
            yield from _fill_holes(migration)
        except BaseException:
            migration.src &= _NOT_MIGRATE
            raise
        finally:
            _finalize(migration, taken, held)


def _invalidation(migration: Migration, spans: tuple[AddressRange, ...]) -> Invalidation:
    return migration.space.notifier.invalidation(
        spans, migration.cause, owner=migration.owner, initiator=migration.initiator
    )


def _still_there(migration: Migration) -> bool:
    now = migration.space.vmas.find(int(migration.addresses[0]))
    was = migration.vma.mapping
    same = now is not None and now.backing is was.backing and now.mapping.delta == was.delta
    return same and now is not None and int(migration.addresses[-1]) < now.end


# ---- setup


def _split(migration: Migration) -> Operation[None]:
    """Huge pages are split, whether they are selected or not; those that cannot be stay: migrate_vma_collect_pmd()."""
    space = migration.space
    for block in _huge_blocks(migration) if space.huge else ():
        if not _still_there(migration):
            return
        entry = space.table.get(block.start)
        if cpu_pte.is_huge_zero(entry):
            yield from split_pmds(space, (block,))
        elif cpu_pte.is_huge(entry):
            yield from split_folio(space, migration.vma, block.start)


def _huge_blocks(migration: Migration) -> list[AddressRange]:
    starts = np.unique(migration.addresses & np.uint64(PMD_MASK & (1 << 64) - 1)).tolist()
    return [block for start in starts for block in huge_blocks(migration.space, AddressRange(start, start + 1))]


def _collect(migration: Migration) -> _Positions:
    """Say what is there, and put migration entries in the place of what is to be moved: migrate_vma_collect_pmd().

    Returns: which of the addresses have them.
    """
    space, frames = migration.space, migration.space.frames
    entries = entries_of(space, migration.addresses)
    framed = _framed(migration, entries)
    pfns = cpu_pte.cpu_pfn(entries[framed])
    wanted = _selected(migration, pfns)
    pinned = frames.pincount[pfns] > 0
    if np.count_nonzero(pinned):
        # folio_try_share_anon_rmap_pte() fails for pages pinned by the only process that has them.
        wanted &= ~(pinned & frames.test_flags(pfns, PageFlag.ANON_EXCLUSIVE))
    if frames.ksm_places is not None:  # of a page that is met again folio_trylock() fails
        again = np.ones(pfns.size, np.bool_)
        again[np.unique(pfns, return_index=True)[1]] = False
        wanted &= ~again
    if np.count_nonzero(wanted) < wanted.size:
        framed, pfns = framed[wanted], pfns[wanted]
    chosen = entries[framed]
    writable = (chosen & np.uint64(cpu_pte.WRITE)) != 0
    migration.src[framed] = migrate_pfn(pfns) | np.where(writable, _MIGRATE_WRITE, np.uint64(MIGRATE))
    stand_in(space, migration.addresses[framed], chosen)
    return framed


def _framed(migration: Migration, entries: Entries) -> _Positions:
    """Say which of the entries are holes.  Returns: which of them have a page that could move."""
    if cpu_pte.are_plain(entries):
        return np.arange(entries.size)
    holes = (entries == 0) if migration.vma.backing is None else np.zeros(entries.size, np.bool_)
    if migration.select & Select.SYSTEM:
        zero = cpu_pte.is_special(entries) & (cpu_pte.cpu_pfn(entries) == 0) & ~cpu_pte.is_huge(entries)
        holes |= zero
    migration.src[holes] = MIGRATE
    return np.flatnonzero(cpu_pte.holds_frame(entries) & ~cpu_pte.is_device_exclusive(entries))


def _selected(migration: Migration, pfns: Pfns) -> _Mask:
    frames, select, wanted = migration.space.frames, migration.select, np.zeros(pfns.size, np.bool_)
    of_device = owners(frames, pfns)
    if Select.SYSTEM in select:
        wanted |= (of_device == 0) & ~are_compound(frames, pfns)
    if Select.DEVICE_PRIVATE in select:
        wanted |= are_private(frames, pfns) & (of_device == migration.owner)
    if Select.DEVICE_COHERENT in select:
        wanted |= ~are_private(frames, pfns) & (of_device == migration.owner)
    return wanted


def _held(migration: Migration, taken: _Positions) -> HeldPages:
    """The collected pages, in the order of their addresses, which is that of their page offsets."""
    space, vma, frames = migration.space, migration.vma, migration.space.frames
    pfns, indices = migration.source_pfns(taken), migration.indices(taken)
    anonymous = frames.test_flags(pfns, PageFlag.ANON)

    def places() -> Iterator[Places]:
        relatives = [space.relatives[number] for number in sorted(space.relatives)]
        if anonymous.any():
            yield from anonymous_places(relatives, indices, vma.backing)
            yield from merged_places(frames, pfns)
        if isinstance(vma.backing, File) and not anonymous.all():
            yield from file_places(vma.backing.mapping_spaces(), indices, vma.backing)

    return HeldPages(frames, pfns, places)


def _leave_referenced(migration: Migration, taken: _Positions, held: HeldPages) -> None:
    """Leave the pages that somebody else still uses where they are: migrate_vma_check_page()."""
    frames, pfns = held.frames, held.pfns
    mapped, references = frames.mapcount[pfns] > 0, frames.refcount[pfns]
    if np.count_nonzero(mapped) or np.count_nonzero(references == 1) < pfns.size:
        cached = ~frames.test_flags(pfns, PageFlag.ANON)
        migration.src[taken[mapped | (references > 1 + cached)]] = 0


# ---- pages


def _check_destinations(migration: Migration) -> None:
    """Refuse what cannot be: pages of files in a device's memory; MIGRATE goes where nothing is moved."""
    if migration.vma.backing is None and np.count_nonzero(migration.dst) == migration.dst.size:
        return  # anonymous pages, and each has somewhere to go
    frames, pages = migration.space.frames, migration.pages
    sources, targets = migration.source_pfns(pages), migration.target_pfns(pages)
    refused = (targets == 0) | ((owners(frames, targets) != 0) & ~frames.test_flags(sources, PageFlag.ANON))
    migration.src[pages[refused]] &= _NOT_MIGRATE


def _fill_holes(migration: Migration) -> Operation[None]:
    """Put destinations where nothing was: migrate_vma_insert_page(); told once, from the first one on."""
    holes = migration.holes
    if not holes.size:
        return
    unfilled = migration.target_pfns(holes) == 0
    migration.src[holes[unfilled]] = 0
    holes = holes[~unfilled]
    if not holes.size:
        return
    rest = AddressRange(int(migration.addresses[holes[0]]), int(migration.addresses[-1]) + PAGE_SIZE)
    if migration.vma.backing is not None:
        migration.src[holes] = 0
        return
    with _invalidation(migration, (rest,)) as bracket:
        yield from bracket.deliver()
        filled = _insert(migration, holes, migration.target_pfns(holes))
    migration.src[holes[~filled]] = 0


def _insert(migration: Migration, holes: _Positions, pfns: Pfns) -> _Mask:
    space, frames = migration.space, migration.space.frames
    addresses = migration.addresses[holes]
    entries = space.table.lookup(addresses)
    free: _Mask = (entries == 0) | (cpu_pte.is_special(entries) & ~cpu_pte.is_huge(entries))
    private = are_private(frames, pfns)
    flags: Entries = np.where(private, np.uint64(cpu_pte.DEVICE), np.uint64(cpu_pte.PRESENT | cpu_pte.DIRTY))
    if migration.vma.writable:
        flags |= np.uint64(cpu_pte.WRITE)
    prepare_anon_vma(space, migration.vma)
    if migration.vma.mapping.userfaultfd:  # what is missing is for its handler to bring in
        return np.zeros(holes.size, np.bool_)
    try:
        space.table.store(addresses[free], cpu_pte.cpu_entry(pfns, flags)[free])
    except OutOfFramesError:
        return np.zeros(holes.size, np.bool_)
    frames.set_flags(pfns[free], ANON_PAGE)
    frames.map_new(pfns[free])
    space.claim(pfns[free])
    frames.index[pfns] = migration.indices(holes)
    return free


# ---- finalize


def _finalize(migration: Migration, taken: _Positions, held: HeldPages) -> None:
    """Entries of moved pages become entries of their destinations, all others what they were."""
    frames, targets = held.frames, migration.target_pfns(taken)
    stayed = (migration.src & np.uint64(MIGRATE)) == 0
    if np.count_nonzero(stayed):
        targets = np.where(stayed[taken], held.pfns, targets)
        spare = np.flatnonzero(stayed & (migration.dst != 0))
        frames.put(migration.target_pfns(spare))
        migration.dst[spare] = 0
    frames.index[targets] = migration.indices(taken)
    replace(held, targets)
