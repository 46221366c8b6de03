"""Reclaim: whoever runs out of system memory puts pages out to swap, those first that were not used for longest.

Without swap nothing goes but what was freed lazily, from the first time on that something was.

    look       which entries of which address spaces name which frames, and which of these could go
    age        the oldest of the inactive list: what was used since is kept, or becomes active; the rest is chosen
    tell       every mirror of every place where a chosen page is mapped; the ranges are busy from here
    split      huge pages, one at a time, when nothing else could go
    swap out   at once, what is still as it was: contents to slots, entries to swap entries, frames free

It takes no turn and holds nothing that others could wait for but notifier brackets: it ends when drivers answer.  Who
finds that all which could go is others' already waits for them.  Frames that come free belong to who reclaimed them,
until it yields: so whoever has made room goes on by a page at least.

Pages in locked mappings, pinned, referenced or locked by anybody else, or about to change in another way (an
invalidation of their range runs) stay where they are.  So does what a device has to itself in 6.12, where it is mapped
nowhere and referred to; in 7.0 it stays mapped, and goes.

**Source**: Linux mm/vmscan.c (shrink_inactive_list(), shrink_active_list(), folio_check_references(),
shrink_folio_list(), too_many_isolated()), mm/rmap.c (folio_referenced_one(), try_to_unmap_one()), mm/shmem.c
(shmem_writepage()), mm/madvise.c (madvise_cold_or_pageout_pte_range()); 6.12.

**Invariants**: only what was told of is unmapped; a page is freed when every entry that named it names its slot, or
nothing where it can be had again from its file; contents are in the slot before the first entry names it.

**Absent**: which calls run out (fault.py and others, by `Frames.make_room`); page cache of files on disks: all files
are shared memory, so their pages go to swap as well; the memory of devices (device_pages.py).

Differs: the kernel finds the entries of a page by the reverse map, one page at a time; here all page tables are looked
through once for a batch of pages, as its multi-generational LRU does to age them.  Pages come to the lists when memory
is first short, in order of their frame numbers, which is that of their allocation.  One event for all pages of an
address space, where the kernel sends one per page.  Of merged pages only those go that one entry names: what comes back
for several may be needed at several offsets (ksm_might_need_to_copy()).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.ascending import unique
from hmm.errors import TimedOutError, WouldDeadlockError
from hmm.events import Cause
from hmm.file import File
from hmm.file_folio import is_folio_at, large_folios, split_file_folio
from hmm.frames import SYSTEM_REGION, Frames, PageFlag
from hmm.huge_split import split_folio
from hmm.large_folio import belong_to, heads_of
from hmm.operation import Await, Current, Operation, WaitFor
from hmm.rmap import walk_order
from hmm.swap import area_of, free_slots
from hmm.swap_area import Slots
from hmm.units import (
    PAGE_SHIFT,
    PAGE_SIZE,
    PIECE_PAGES,
    PMD_PAGES,
    PMD_SHIFT,
    WHOLE_SPACE,
    AddressRange,
    Entries,
    MirrorId,
    Pfns,
    SpaceId,
    all_but,
    spans_of,
)
from hmm.vma import Vma, VmFlag

__all__ = ["Reclaim", "is_lazily_free"]

_CLUSTER = 32
"""SWAP_CLUSTER_MAX: no fewer pages are reclaimed at once, unless memory is tiny."""
_LARGEST = 8192
"""No more are."""
_ROUNDS = 16
"""MAX_RECLAIM_RETRIES: how often in a row memory may be taken away by others before it counts as none."""

_ON_LISTS = np.uint16(PageFlag.ANON | PageFlag.SWAPBACKED)
_LRU = np.uint16(PageFlag.LRU)
_ACTIVE = np.uint16(PageFlag.ACTIVE)
_NOT_ACCESSED = all_but(cpu_pte.ACCESSED)
_SOFT_DIRTY = np.uint64(cpu_pte.SOFT_DIRTY)
_SWAPPED = np.uint64(cpu_pte.SWAP)
_OWN_SWAPPED = np.uint64(cpu_pte.SWAP | cpu_pte.SWP_EXCLUSIVE)

_Mask = npt.NDArray[np.bool_]
_Counts = npt.NDArray[np.int64]


@dataclass(slots=True)
class _Mapped:
    """Entries of one address space that name frames of system memory: uint64[n] addresses and entries, int64[n]."""

    space: AddressSpace
    addresses: Entries
    entries: Entries
    pfns: Pfns

    def of(self, chosen: _Mask) -> _Mapped:
        """Those of them that are chosen: bool[n]."""
        return _Mapped(self.space, self.addresses[chosen], self.entries[chosen], self.pfns[chosen])

    @property
    def spans(self) -> tuple[AddressRange, ...]:
        """Where they are."""
        return spans_of(self.addresses)


@dataclass(slots=True)
class _Look:
    """All of system memory at a moment.

    Attributes:
        mapped: one for every address space.
        accessed: int64[frames], how many entries that name a frame were used since they were last looked at; those in
            mappings that are read once, or anywhere (MADV_SEQUENTIAL, MADV_RANDOM), do not count.
        evictable: bool[frames], frames that could go.
    """

    mapped: list[_Mapped]
    accessed: _Counts
    evictable: _Mask


@dataclass(slots=True, eq=False)
class Reclaim:
    """Reclaim of one machine's system memory: to its swap area, or where it has none of what was freed lazily.

    Args:
        spaces, files: all that there are, by id.
        answering: the mirror from inside whose callback the current call was made, 0 for none: its driver answers
            nothing before that call has ended.

    Attributes:
        running: the operations that are reclaiming.
        ended: how many reclaims have ended.
        reclaimed: how many pages they freed.
    """

    frames: Frames
    spaces: Mapping[SpaceId, AddressSpace]
    files: Mapping[int, File]
    current: Current
    answering: Callable[[], MirrorId] = lambda: 0
    running: list[int] = field(default_factory=list)
    ended: int = 0
    reclaimed: int = 0

    # ---- what others call

    def make_room(self, wanted: int) -> Operation[bool]:
        """Free frames of system memory until `wanted` are free.

        Returns: whether some came free; until the caller yields they are its own.  False when there were enough: then
            it is not memory that is lacking.

        Cost: O(everything mapped), vectorised, for a batch; mirrors of what goes are waited for.
        Source: Linux mm/page_alloc.c, __alloc_pages_slowpath().
        """
        frames = self.frames
        total = frames.regions[SYSTEM_REGION].total
        batch = min(max(_CLUSTER, total >> 5), frames.batch_pages, _LARGEST)
        if frames.available >= wanted:
            return False
        progress = False
        for _ in range(_ROUNDS):
            if frames.available >= wanted:
                return True
            before = frames.available
            if not (yield from self._shrink(max(batch, wanted - before))):
                if not self.running:
                    break
                yield Await(WaitFor.MEMORY, ticket=self.ended)
            progress |= frames.available > before
        return progress

    def begin(self) -> None:
        """Have whoever runs out of memory reclaim, from now on: there is something that could go."""
        self.frames.make_room = self.make_room

    @property
    def takes_folios(self) -> bool:
        """Whether swap has a run of slots for a large folio: get_swap_pages().  Slots are not in runs here."""
        return self.frames.swap is not None and self.frames.swap.free >= PMD_PAGES

    def page_out(self, space: AddressSpace, spans: Iterable[AddressRange]) -> Operation[None]:
        """Put out the pages of ranges, used or not, that no other process maps: MADV_PAGEOUT.

        Those that there is no slot for become active; pages of files lose their entries all the same.

        Cost: O(entries), vectorised; mirrors of what goes are waited for.
        Source: Linux mm/vmscan.c, reclaim_pages().
        """
        for span in spans:
            for piece in space.table.populated(span.start, span.end, PMD_PAGES if space.huge else PIECE_PAGES):
                for folio in self._whole_folios(space, piece):
                    if not self.frames.flags_of(int(folio.pfns[0])) & PageFlag.ANON:
                        yield from self._put_out_of_file(folio)
                    elif is_lazily_free(self.frames, folio.entries):
                        gone = yield from self._put_out([folio], folio.pfns)
                        if gone and space.thp:  # its page table stays, as it went page by page: seen on 6.18
                            space.tables.add(int(folio.addresses[0]) >> PMD_SHIFT)
                mapped = self._mapped_once(space, piece)
                self.frames.clear_flags(mapped.pfns, PageFlag.REFERENCED)
                pfns = np.sort(mapped.pfns[~self._are_kept_for_pins(mapped.pfns)])
                stays = ~np.isin(pfns, self._affordable(pfns))
                self.frames.set_flags(pfns[stays], PageFlag.ACTIVE)
                stays &= self.frames.test_flags(pfns, PageFlag.ANON)
                yield from self._put_out([mapped.of(np.isin(mapped.pfns, pfns[~stays]))], pfns[~stays])

    def _put_out_of_file(self, folio: _Mapped) -> Operation[None]:
        """Unmap a huge page of a file, and put its pages out by themselves; without swap it stays where it is."""
        frames, pfns = self.frames, folio.pfns
        file = self.files.get(int(frames.mapping[pfns[0]]))
        if file is None or _barred(folio).any():
            return
        offset = int(frames.index[pfns[0]]) << PAGE_SHIFT
        with ExitStack() as brackets:
            for part in (yield from self._tell([folio], brackets)):
                now = _as_it_is(part)
                if now.pfns.size and is_folio_at(file, offset, pfns):
                    part.space.keep_tables(int(now.addresses[0]), int(now.addresses[-1]) + PAGE_SIZE)
                    frames.set_flags(now.pfns[cpu_pte.is_dirty(now.entries)], PageFlag.DIRTY)
                    part.space.table.clear_many(now.addresses)
                    frames.unmap(now.pfns)
        if not is_folio_at(file, offset, pfns) or frames.mapcount[pfns].any():
            return
        if frames.swap is None or not (yield from split_file_folio(file, offset)):
            frames.set_flags(pfns, PageFlag.ACTIVE)  # AOP_WRITEPAGE_ACTIVATE of shmem_writepage()
            return
        kept = pfns[frames.refcount[pfns] > 0]  # not those behind the end of the file
        yield from self._put_out([], self._affordable(kept))

    def deactivate(self, space: AddressSpace, spans: Iterable[AddressRange]) -> None:
        """Make pages of ranges that no other process maps unused, and the active ones inactive: MADV_COLD.

        Source: Linux mm/swap.c, lru_deactivate(): these are the last to go of the inactive ones.
        """
        for span in spans:
            for piece in space.table.populated(span.start, span.end, PMD_PAGES if space.huge else PIECE_PAGES):
                for mapped in (self._mapped_once(space, piece), *self._whole_folios(space, piece)):
                    space.table.store(mapped.addresses, mapped.entries & _NOT_ACCESSED)
                    self.frames.rotate(mapped.pfns[self.frames.test_flags(mapped.pfns, PageFlag.ACTIVE)])
                    self.frames.clear_flags(mapped.pfns, PageFlag.ACTIVE | PageFlag.REFERENCED)

    # ---- one batch

    def _shrink(self, wanted: int) -> Operation[int]:
        """Put out up to `wanted` pages.  Returns: how many went."""
        look = self._look()
        victims = self._affordable(self._age(look, wanted))
        while not victims.size and self.frames.swap is not None and (yield from self._split_one(look.mapped)):
            look = self._look()
            victims = self._affordable(self._age(look, wanted))
        chosen = np.zeros(look.evictable.size, np.bool_)
        chosen[victims] = True
        mapped = [part.of(chosen[part.pfns]) for part in look.mapped]
        return (yield from self._put_out([part for part in mapped if part.pfns.size], np.sort(victims)))

    def _split_one(self, mapped: list[_Mapped]) -> Operation[bool]:
        """Split a huge page, so that its pages can go.  Returns: False when there is none that could be."""
        for part in mapped:
            if self.answering() in part.space.notifier.subscribers:
                continue
            open_to_split = part.of(~_locked(part) & self.frames.test_flags(part.pfns, PageFlag.COMPOUND))
            heads = open_to_split.pfns // PMD_PAGES
            _, firsts, counts = np.unique(heads, return_index=True, return_counts=True)
            for address, npages in zip(open_to_split.addresses[firsts].tolist(), counts.tolist(), strict=True):
                if not cpu_pte.is_present(part.space.table.get(address)):
                    continue
                try:
                    goes_out = npages == PMD_PAGES and self.takes_folios
                    if (yield from split_folio(part.space, address, goes_out=goes_out)):
                        return True
                except (TimedOutError, WouldDeadlockError):
                    break
        for number in sorted(self.files):
            for offset, folio in large_folios(self.files[number]):
                unmapped = not self.frames.mapcount[folio].any()
                if unmapped and (yield from split_file_folio(self.files[number], offset)):
                    return True
        return False

    def _look(self) -> _Look:
        frames = self.frames
        top = frames.regions[SYSTEM_REGION].top
        named, accessed, barred = np.zeros(top, np.int64), np.zeros(top, np.int64), np.zeros(top, np.bool_)
        mapped = []
        for number in sorted(self.spaces):
            part = _mapped(self.spaces[number], top)
            if not part.pfns.size:
                continue
            mapped.append(part)
            named += np.bincount(part.pfns, minlength=top)
            accessed += np.bincount(part.pfns[_young(part)], minlength=top)
            barred[part.pfns[_barred(part)]] = True
        refcount, mapcount, flags = frames.refcount[:top], frames.mapcount[:top], frames.flags[:top]
        anonymous, cached = (flags & np.uint16(PageFlag.ANON)) != 0, frames.private[:top] != 0
        evictable = ((flags & _ON_LISTS) != 0) & ((flags & np.uint16(PageFlag.COMPOUND)) == 0)
        evictable &= ((flags & np.uint16(PageFlag.KSM)) == 0) | (mapcount == 1)
        if frames.swap is None:
            evictable &= (flags & np.uint16(PageFlag.SWAPBACKED)) == 0
        fresh = np.flatnonzero(evictable & ((flags & _LRU) == 0))
        frames.set_flags(fresh, PageFlag.LRU)
        frames.rotate(fresh)
        evictable &= (named == mapcount) & (refcount == mapcount + cached + ~anonymous) & (frames.pincount[:top] == 0)
        return _Look(mapped, accessed, evictable & ~barred)

    def _age(self, look: _Look, wanted: int) -> Pfns:
        """The pages to go, the oldest first: shrink_inactive_list(), and shrink_active_list() where it is needed."""
        frames, accessed, evictable = self.frames, look.accessed, look.evictable.copy()
        cleared = np.zeros(evictable.size, np.bool_)
        victims: list[Pfns] = []
        while wanted > 0:
            is_active = (frames.flags[: evictable.size] & _ACTIVE) != 0
            inactive, active = np.flatnonzero(evictable & ~is_active), np.flatnonzero(evictable & is_active)
            if active.size and inactive.size < max(wanted, active.size):
                batch = self._oldest(active, wanted)
                frames.clear_flags(batch, PageFlag.ACTIVE)
                frames.rotate(batch)
                accessed[batch], cleared[batch] = 0, True
                continue
            if not inactive.size:
                break
            batch = self._oldest(inactive, wanted)
            goes = self._check_references(batch, accessed[batch])
            accessed[batch], cleared[batch] = 0, True
            victims.append(batch[goes])
            evictable[batch[goes]] = False
            wanted -= int(np.count_nonzero(goes))
        _clear_accessed(look.mapped, cleared)
        return np.concatenate(victims) if victims else np.empty(0, np.int64)

    def _oldest(self, pfns: Pfns, count: int) -> Pfns:
        stamps = self.frames.lru[pfns]
        if pfns.size > count:
            chosen = np.argpartition(stamps, count - 1)[:count]
            pfns, stamps = pfns[chosen], stamps[chosen]
        return pfns[np.argsort(stamps)]

    def _check_references(self, pfns: Pfns, accessed: _Counts) -> _Mask:
        """bool[n]: which inactive pages go; those that were used get a second chance: folio_check_references()."""
        frames = self.frames
        referenced = frames.test_flags(pfns, PageFlag.REFERENCED)
        used = accessed > 0
        frames.clear_flags(pfns, PageFlag.REFERENCED)
        frames.set_flags(pfns[used], PageFlag.REFERENCED)
        frames.set_flags(pfns[used & (referenced | (accessed > 1))], PageFlag.ACTIVE)
        frames.rotate(pfns[used])
        goes: _Mask = ~used
        return goes

    def _affordable(self, victims: Pfns) -> Pfns:
        """Those for which there are slots, in order."""
        frames = self.frames
        needs_slot = (frames.private[victims] == 0) & frames.test_flags(victims, PageFlag.SWAPBACKED)
        affordable: Pfns = victims[~needs_slot | (np.cumsum(needs_slot) <= free_slots(frames))]
        return affordable

    # ---- out

    def _put_out(self, mapped: list[_Mapped], victims: Pfns) -> Operation[int]:
        """Tell the mirrors, then put out what is still as it was.  Returns: how many pages went.

        Args:
            mapped: the entries that name the victims.
            victims: int64[n], ascending; a large folio comes by itself.
        """
        locks, operation = self.frames.locks, self.current.operation_id
        victims = victims[~locks.are_locked(victims)]  # folio_trylock()
        if not victims.size:
            return 0
        self.frames.get(victims)
        self.running.append(operation)
        freed = 0
        try:
            with ExitStack() as brackets, locks.lock(victims, operation):
                told = yield from self._tell(mapped, brackets)
                freed = self._swap_out(told, victims)
        finally:
            self.frames.put(victims)
            self.running.remove(operation)
            self.ended += 1
            self.reclaimed += freed
        return freed

    def _tell(self, mapped: list[_Mapped], brackets: ExitStack) -> Operation[list[_Mapped]]:
        """Returns: the parts whose mirrors all know; until somebody else runs, these only may change."""
        bracketed, silent = [], []
        for part in mapped:
            notifier = part.space.notifier
            if not notifier.subscribers:
                silent.append(part)
            elif self.answering() not in notifier.subscribers:
                bracket = brackets.enter_context(notifier.invalidation(part.spans, Cause.RECLAIM))
                try:
                    yield from bracket.deliver()
                except (TimedOutError, WouldDeadlockError):
                    continue  # a driver that does not answer keeps its pages
                bracketed.append(part)
        # While drivers were waited for, spaces may have ended, and others may have been mirrored.
        told = bracketed + [part for part in silent if not part.space.notifier.subscribers]
        return [part for part in told if self.spaces.get(part.space.id) is part.space]

    def _swap_out(self, told: list[_Mapped], victims: Pfns) -> int:
        """Free what nobody else has come to use meanwhile: shrink_folio_list(), try_to_unmap_one().

        A large folio goes, or stays, as one: what is written or held of it is all of it, as flags and references are
        the folio's.  Source: Linux mm/huge_memory.c, __discard_anon_folio_pmd_locked().
        """
        frames = self.frames
        now = [_as_it_is(part) for part in told]
        named, written = np.zeros(victims.size, np.int64), frames.test_flags(victims, PageFlag.DIRTY)
        for part in now:
            positions = victims.searchsorted(part.pfns)
            named += np.bincount(positions, minlength=victims.size)
            written[positions[cpu_pte.is_dirty(part.entries)]] = True
        folio = frames.test_flags(victims, PageFlag.COMPOUND)
        if (folio & written).any():
            frames.set_flags(victims[folio], PageFlag.DIRTY)
            written |= folio
        anonymous = frames.test_flags(victims, PageFlag.ANON)
        cached, of_file = frames.private[victims] != 0, self._of_files(victims)
        free = (named == frames.mapcount[victims]) & (frames.pincount[victims] == 0)
        free &= frames.refcount[victims] == named + cached + of_file + 1
        free &= ~folio | free[folio].all()
        free &= np.where(anonymous, (named > 0) | cached, of_file)  # whose last entry went meanwhile is free anyway
        lazy = anonymous & ~frames.test_flags(victims, PageFlag.SWAPBACKED)
        kept = free & lazy & written  # written since MADV_FREE: not this time
        free &= ~kept
        self._keep_written(now, victims, kept)
        blank = free & of_file & ~written
        blank[blank] = frames.are_zero(victims[blank])
        needs_slot = free & ~lazy & ~cached & ~blank
        free &= ~needs_slot | (np.cumsum(needs_slot) <= free_slots(frames))
        needs_slot &= free
        slots = frames.private[victims]
        if needs_slot.any():
            slots[needs_slot] = self._write(victims[needs_slot], np.where(of_file, 1, named)[needs_slot])
        frames.set_flags(victims[of_file & ~free & written], PageFlag.DIRTY)
        unmapped = free | (of_file & (named == frames.mapcount[victims]))
        for part in now:
            positions = victims.searchsorted(part.pfns)
            self._unmap(part.of(unmapped[positions]), slots, lazy | of_file, positions[unmapped[positions]])
        self._leave_caches(victims[free & of_file], slots[free & of_file], blank[free & of_file])
        self._leave_swap_cache(victims[free & cached], named[free & cached])
        return int(np.count_nonzero(free))

    def _keep_written(self, now: list[_Mapped], victims: Pfns, kept: _Mask) -> None:
        """Lazily freed pages stay that somebody has written; who has not, and is met before that one, loses them.

        Source: Linux mm/rmap.c, try_to_unmap_one(), which aborts the walk at the first dirty entry.
        """
        if not kept.any():
            return
        frames, going = self.frames, kept & ~self.frames.test_flags(victims, PageFlag.DIRTY)
        frames.set_flags(victims[kept], PageFlag.SWAPBACKED)
        nothing_left = np.ones(victims.size, np.bool_)
        for part in _in_walk_order(part.of(kept[victims.searchsorted(part.pfns)]) for part in now):
            positions = victims.searchsorted(part.pfns)
            dirty = cpu_pte.is_dirty(part.entries)
            frames.set_flags(part.pfns[dirty & going[positions]], PageFlag.DIRTY)
            going[positions[dirty]] = False
            lost = going[positions]
            self._unmap(part.of(lost), victims, nothing_left, positions[lost])

    def _write(self, pfns: Pfns, counts: _Counts) -> Slots:
        """Slots with the contents of pages, named by so many entries: swap_writepage()."""
        area = area_of(self.frames)
        slots = area.allocate(counts.astype(np.int32))
        area.load(slots, self.frames, pfns)
        return slots

    def _unmap(self, part: _Mapped, slots: Slots, nothing_left: _Mask, positions: npt.NDArray[np.intp]) -> None:
        """Swap entries in the place of entries; none where the page is to be had elsewhere, or not at all."""
        flags = np.where(self.frames.test_flags(part.pfns, PageFlag.ANON_EXCLUSIVE), _OWN_SWAPPED, _SWAPPED)
        entries = cpu_pte.cpu_entry(slots[positions], flags | (part.entries & _SOFT_DIRTY))
        entries[nothing_left[positions]] = 0
        part.space.table.store(part.addresses, entries)
        self.frames.unmap(part.pfns)

    def _of_files(self, pfns: Pfns) -> _Mask:
        """bool[n]: which pages are in the cache of the file that they say."""
        found = np.zeros(pfns.size, np.bool_)
        for file, which in self._by_file(pfns[~self.frames.test_flags(pfns, PageFlag.ANON)]):
            entries = file.pages.lookup(self._offsets(which))
            held = cpu_pte.is_present(entries) & (cpu_pte.cpu_pfn(entries) == which)
            found[pfns.searchsorted(which[held])] = True
        return found

    def _by_file(self, pfns: Pfns) -> Iterable[tuple[File, Pfns]]:
        owners = self.frames.mapping[pfns]
        for number in unique(owners).tolist():
            if number in self.files:
                yield self.files[number], pfns[owners == number]

    def _offsets(self, pfns: Pfns) -> Entries:
        offsets: Entries = (self.frames.index[pfns] << PAGE_SHIFT).view(np.uint64)
        return offsets

    def _leave_caches(self, pfns: Pfns, slots: Slots, blank: _Mask) -> None:
        """Page caches get swap entries, or holes where nothing was written: shmem_delete_from_page_cache()."""
        for file, which in self._by_file(pfns):
            positions = pfns.searchsorted(which)
            entries = cpu_pte.cpu_entry(slots[positions], cpu_pte.SWAP)
            entries[blank[positions]] = 0
            file.pages.store(self._offsets(which), entries)
            self.frames.put(which)

    def _leave_swap_cache(self, pfns: Pfns, named: _Counts) -> None:
        """Pages that are in their slots already: entries that named them name these: __delete_from_swap_cache()."""
        if not pfns.size:
            return
        frames, area = self.frames, area_of(self.frames)
        slots = frames.private[pfns]
        area.counts[slots] += named.astype(np.int32)
        area.cached[slots] = 0
        frames.private[pfns] = 0
        frames.put(pfns)

    def _mapped_once(self, space: AddressSpace, span: AddressRange) -> _Mapped:
        """Pages of a range that one entry names, and could go."""
        frames = self.frames
        part = _mapped(space, frames.regions[SYSTEM_REGION].top, span)
        chosen = ~frames.test_flags(part.pfns, PageFlag.COMPOUND) & (frames.mapcount[part.pfns] == 1)
        chosen &= ~_barred(part) & cpu_pte.is_present(part.entries)
        return part.of(chosen & frames.test_flags(part.pfns, PageFlag.ANON | PageFlag.SWAPBACKED))

    def _are_kept_for_pins(self, pfns: Pfns) -> _Mask:
        """bool[n]: which pages get no slot because they are pinned; all others lose their entries first."""
        frames = self.frames
        in_swap = (PageFlag.ANON | PageFlag.SWAPBACKED)._value_
        wants_slot = (frames.flags[pfns] & in_swap == in_swap) & (frames.private[pfns] == 0)
        kept: _Mask = wants_slot & (frames.pincount[pfns] > 0)
        return kept

    def _whole_folios(self, space: AddressSpace, span: AddressRange) -> list[_Mapped]:
        """Huge pages that a part of a block maps all of, and nobody else any."""
        if not space.huge:
            return []
        frames = self.frames
        part = _mapped(space, frames.regions[SYSTEM_REGION].top, span)
        folios = [part.of(belong_to(frames, part.pfns, head)) for head in heads_of(frames, part.pfns)]
        return [one for one in folios if one.pfns.size == PMD_PAGES == int(frames.mapcount[one.pfns].sum())]


def is_lazily_free(frames: Frames, entries: Entries) -> bool:
    """Whether entries map a huge page as one that may go without being written: __discard_anon_folio_pmd_locked()."""
    pfn, flags = cpu_pte.cpu_pfn(int(entries[0])), int(entries[0]) & (cpu_pte.HUGE | cpu_pte.DIRTY)
    return flags == cpu_pte.HUGE and not frames.flags_of(pfn) & (PageFlag.SWAPBACKED | PageFlag.DIRTY)


def _mapped(space: AddressSpace, top: int, span: AddressRange = WHOLE_SPACE) -> _Mapped:
    addresses, entries = space.table.valid(span.start, span.end)
    pfns = cpu_pte.cpu_pfn(entries)
    mine = cpu_pte.holds_frame(entries) & (pfns < top)
    return _Mapped(space, addresses[mine], entries[mine], pfns[mine])


def _as_it_is(part: _Mapped) -> _Mapped:
    """What of it names the same page still, and has not been locked."""
    entries = part.space.table.lookup(part.addresses)
    same = cpu_pte.holds_frame(entries) & ~cpu_pte.is_special(entries) & (cpu_pte.cpu_pfn(entries) == part.pfns)
    return _Mapped(part.space, part.addresses, entries, part.pfns).of(same & ~_locked(part))


def _in_walk_order(parts: Iterable[_Mapped]) -> list[_Mapped]:
    """Entries of private pages, VMA by VMA as the reverse map comes to them: rmap_walk_anon()."""
    found: list[tuple[tuple[int, ...], SpaceId, _Mapped]] = []
    for part in parts:
        for vma in _vmas_of(part):
            mine = part.of(_inside(part.addresses, [vma.span]))
            if mine.addresses.size:
                found.append((walk_order(part.space, vma), part.space.id, mine))
    return [mine for _, _, mine in sorted(found, key=lambda one: one[:2])]


def _barred(part: _Mapped) -> _Mask:
    """bool[n]: which entries keep their page where it is: those in locked and in changing ranges, of locked pages."""
    space = part.space
    busy = [span for running in space.notifier.invalidations for span in running.spans]
    barred = space.frames.locks.are_locked(part.pfns) | _locked(part) | _inside(part.addresses, busy)
    return barred | cpu_pte.is_device_exclusive(part.entries) if space.semantics.exclusive_ranges else barred


def _locked(part: _Mapped) -> _Mask:
    """bool[n]: which entries are in locked mappings."""
    return _inside(part.addresses, [vma.span for vma in _vmas_of(part) if vma.has(VmFlag.LOCKED)])


def _vmas_of(part: _Mapped) -> Iterable[Vma]:
    """Those that its entries lie in, and those between: who asks for a part of many does not go through all."""
    if not part.addresses.size:
        return ()
    return part.space.vmas.overlapping(AddressRange(int(part.addresses[0]), int(part.addresses[-1]) + PAGE_SIZE))


def _inside(addresses: Entries, spans: list[AddressRange]) -> _Mask:
    inside = np.zeros(addresses.size, np.bool_)
    for span in spans:
        low, high = addresses.searchsorted(np.array((span.start, span.end), np.uint64)).tolist()
        inside[low:high] = True
    return inside


def _young(part: _Mapped) -> _Mask:
    """bool[n]: which entries were used, where that counts: vma_has_recency()."""
    young: _Mask = (part.entries & np.uint64(cpu_pte.ACCESSED)) != 0
    if not part.space.has_read_hints:
        return young
    return young & ~_inside(part.addresses, [vma.span for vma in _vmas_of(part) if not vma.mapping.has_recency])


def _clear_accessed(mapped: list[_Mapped], cleared: _Mask) -> None:
    """What folio_referenced() leaves: the processor says anew what is used."""
    for part in mapped:
        young = cleared[part.pfns] & _young(part)
        if young.any():
            part.space.table.store(part.addresses[young], part.entries[young] & _NOT_ACCESSED)
