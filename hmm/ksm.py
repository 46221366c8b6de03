"""Page merging: equal pages of memory that asked for it (MADV_MERGEABLE) become one that nobody may write.

    look       every private page of the mergeable mappings, and a checksum of what it holds
    choose     those that are as they were one pass ago; a page that was merged before takes equal ones in; else of two
               equal pages the later one becomes the merged page
    split      huge pages that the chosen ones are part of
    tell       every mirror of every place where a chosen page is mapped; the ranges are busy from here
    merge      at once, what is still as it was: entries name the merged page and are read-only

A write to a merged page copies it, even for the last who has it; MADV_UNMERGEABLE copies all of them.  No thread of its
own does this: somebody asks for a pass.

**Source**: Linux mm/ksm.c (scan_get_next_rmap_item(), cmp_and_merge_page(), try_to_merge_one_page(),
write_protect_page(), replace_page(), unmerge_ksm_pages(), rmap_walk_ksm()), mm/memory.c (wp_can_reuse_anon_folio()),
6.12.

**Invariants**: no entry that names a frame with PageFlag.KSM permits writing, and no process has it to itself.

**Absent**: pages of zeroes as the zero page (use_zero_pages), passing over pages that were never merged (smart_scan),
NUMA nodes; merged pages stay in memory when it is short.

Differs: processes are looked at in the order in which they were made, not that of their first MADV_MERGEABLE.  One
event for all pages of a process and a pass, where the kernel sends two per page.  Which entries name a merged page is
looked up in all page tables, instead of being kept.
"""

from __future__ import annotations

import errno as errnos
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.ascending import unique
from hmm.errors import InvalidRequestError, OutOfFramesError, TimedOutError, WouldDeadlockError
from hmm.events import Cause
from hmm.fault_pages import READ_ONLY, copy_unshared
from hmm.frames import SYSTEM_REGION, Frames, PageFlag
from hmm.huge_split import split_folio
from hmm.operation import Operation, Pause
from hmm.rmap import Places
from hmm.units import PMD_PAGES, Entries, Pfns, SpaceId, all_but, spans_of
from hmm.vma import Vma, VmFlag

__all__ = ["Ksm", "KsmPass", "unmerge"]

MAX_PAGE_SHARING = 256
"""How many entries a merged page may have before equal pages get another one."""
_COMPARED = 1024
"""Pages compared at once."""
_NEVER = np.int64(1 << 62)
_NOT_WRITABLE = all_but(cpu_pte.WRITE | cpu_pte.DIRTY)
_NOTHING = np.empty(0, np.uint64)

_Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class KsmPass:
    """What one pass did, and what there is now: the numbers of /sys/kernel/mm/ksm.

    Attributes:
        scanned: pages looked at.
        merged: entries that came to name a merged page.
        shared: merged pages.
        sharing: entries that name them, beyond one each: what is saved.
        unshared: pages that were as one pass ago, and nothing equals them.
        volatile: pages that were not, and are not merged.
    """

    scanned: int
    merged: int
    shared: int
    sharing: int
    unshared: int
    volatile: int


@dataclass(slots=True)
class _Pages:
    """Pages of one process that could be merged, or are: uint64[n] addresses and entries, int64[n] frames."""

    space: AddressSpace
    addresses: Entries
    entries: Entries
    pfns: Pfns

    def of(self, chosen: _Mask) -> _Pages:
        """Those of them that are chosen: bool[n]."""
        return _Pages(self.space, self.addresses[chosen], self.entries[chosen], self.pfns[chosen])


@dataclass(slots=True, eq=False)
class Ksm:
    """The merged pages of one machine.

    Args:
        spaces: all that there are, by id.

    Attributes:
        checksums: what the last pass found, by space: uint64[n] addresses, ascending, and checksums.
    """

    frames: Frames
    spaces: Mapping[SpaceId, AddressSpace]
    checksums: dict[SpaceId, tuple[Entries, Entries]] = field(default_factory=dict)

    def scan(self, passes: int = 1) -> Operation[KsmPass]:
        """Look at all mergeable memory, once or more often: what is to be merged has to stay as it is for one pass.

        Returns: what the last pass did; `merged` of all.

        Raises:
            InvalidRequestError: no passes (EINVAL).

        Cost: 2 us per page, as its bytes are read, and twice that if it is merged; mirrors are waited for.
        """
        if passes < 1:
            raise InvalidRequestError(f"ksm: {passes} passes")
        done = yield from self._pass(0)
        for _ in range(passes - 1):
            yield Pause()
            done = yield from self._pass(done.merged)
        return done

    def shared_and_sharing(self) -> tuple[int, int]:
        """Merged pages, and the entries that name them beyond one each.

        Cost: nothing before the first was merged, then O(frames ever used).
        """
        if self.frames.ksm_places is None:
            return 0, 0
        counts = self.frames.mapcount[self._merged()]
        return counts.size, int(np.maximum(counts - 1, 0).sum())

    def _merged(self) -> Pfns:
        merged = np.flatnonzero(self.frames.flags[: self.frames.used_end] & np.uint16(PageFlag.KSM))
        return merged[self.frames.mapcount[merged] > 0]

    # ---- one pass

    def _pass(self, merged_before: int) -> Operation[KsmPass]:
        looks = [look for number in sorted(self.spaces) if (look := _mergeable(self.spaces[number])).pfns.size]
        sums = [self.frames.checksums(look.pfns) for look in looks]
        steady = [self._steady(look, found) for look, found in zip(looks, sums, strict=True)]
        self.checksums = {look.space.id: (look.addresses, found) for look, found in zip(looks, sums, strict=True)}
        already = sum(int(np.count_nonzero(self.frames.test_flags(look.pfns, PageFlag.KSM))) for look in looks)
        targets = self._choose(looks, sums, steady)
        for look, aims in zip(looks, targets, strict=True):
            yield from self._split(look.of(aims != 0))
        merged = yield from self._merge(
            [(look.of(aims != 0), aims[aims != 0]) for look, aims in zip(looks, targets, strict=True)]
        )
        scanned = sum(look.pfns.size for look in looks)
        unchanged = sum(int(np.count_nonzero(one)) for one in steady)
        shared, sharing = self.shared_and_sharing()
        return KsmPass(
            scanned, merged_before + merged, shared, sharing, unchanged - merged, scanned - already - unchanged
        )

    def _steady(self, look: _Pages, sums: Entries) -> _Mask:
        """bool[n]: which pages hold what they did one pass ago, and are not merged yet."""
        addresses, before = self.checksums.get(look.space.id, (_NOTHING, _NOTHING))
        if not addresses.size:
            return np.zeros(sums.size, np.bool_)
        at = np.minimum(addresses.searchsorted(look.addresses), addresses.size - 1)
        steady: _Mask = (addresses[at] == look.addresses) & (before[at] == sums)
        return steady & ~self.frames.test_flags(look.pfns, PageFlag.KSM)

    def _choose(self, looks: list[_Pages], sums: list[Entries], steady: list[_Mask]) -> list[Pfns]:
        """int64[n] for each look: the frame that a page is to be merged into, 0 for none."""
        frames = self.frames
        chosen = [one & _unreferenced(frames, look) for look, one in zip(looks, steady, strict=True)]
        targets = [np.zeros(look.pfns.size, np.int64) for look in looks]
        if not looks:
            return targets
        merged = self._merged()
        merged = merged[(merged < frames.regions[SYSTEM_REGION].top) & (frames.mapcount[merged] < MAX_PAGE_SHARING)]
        found = _assign(
            np.concatenate([found[one] for found, one in zip(sums, chosen, strict=True)]),
            np.concatenate([look.pfns[one] for look, one in zip(looks, chosen, strict=True)]),
            _Stable.of(frames, merged),
        )
        ends = np.cumsum([np.count_nonzero(one) for one in chosen])
        for target, one, part in zip(targets, chosen, np.split(found, ends[:-1]), strict=True):
            target[one] = part
        return targets

    def _split(self, pages: _Pages) -> Operation[None]:
        """Split the huge pages that some are part of; those that cannot be are not merged."""
        compound = self.frames.test_flags(pages.pfns, PageFlag.COMPOUND)
        _, firsts = np.unique(pages.pfns[compound] // PMD_PAGES, return_index=True)
        for address in pages.addresses[compound][firsts].tolist():
            if cpu_pte.is_present(pages.space.table.get(address)):
                try:
                    yield from split_folio(pages.space, address)
                except (TimedOutError, WouldDeadlockError):
                    break

    def _merge(self, plan: list[tuple[_Pages, Pfns]]) -> Operation[int]:
        """Tell the mirrors, then merge what is still as it was.  Returns: how many entries name a merged page now."""
        with ExitStack() as brackets:
            told = []
            for pages, targets in plan:
                if not targets.size:
                    continue
                notifier = pages.space.notifier
                bracket = brackets.enter_context(notifier.invalidation(spans_of(pages.addresses), Cause.KSM))
                try:
                    yield from bracket.deliver()
                except (TimedOutError, WouldDeadlockError):
                    continue  # a driver that does not answer keeps its pages
                told.append((pages, targets))
            return self._merge_now([(pages, targets) for pages, targets in told if pages.space.id in self.spaces])

    def _merge_now(self, told: list[tuple[_Pages, Pfns]]) -> int:
        """try_to_merge_one_page(), for all pages whose mirrors know."""
        frames = self.frames
        now = [_as_they_are(pages, targets) for pages, targets in told]
        makers = [pages.pfns[targets == pages.pfns] for pages, targets in now]
        fresh = unique(np.concatenate(makers)) if makers else np.empty(0, np.int64)
        usable = np.concatenate((fresh, self._merged()))
        now = [(pages.of(one), targets[one]) for pages, targets in now for one in (np.isin(targets, usable),)]
        now = [
            (pages.of(one), targets[one]) for pages, targets in now for one in (_equal(frames, pages.pfns, targets),)
        ]
        fresh = fresh[np.isin(fresh, np.concatenate([t[t != p.pfns] for p, t in now]))] if now else fresh
        frames.clear_flags(fresh, PageFlag.ANON_EXCLUSIVE)
        frames.set_flags(fresh, PageFlag.KSM | PageFlag.DIRTY)
        frames.mark_accessed(fresh)
        frames.mapping[fresh] = 0
        if fresh.size:
            frames.ksm_places = self.places
        merged = [self._replace(pages, targets, fresh) for pages, targets in now]
        return sum(merged)

    def _replace(self, pages: _Pages, targets: Pfns, fresh: Pfns) -> int:
        """write_protect_page(), replace_page()."""
        space, frames = pages.space, self.frames
        own = targets == pages.pfns
        kept = own & np.isin(targets, fresh)
        space.table.store(pages.addresses[kept], pages.entries[kept] & _NOT_WRITABLE)
        given = pages.of(~own)
        frames.set_flags(given.pfns[cpu_pte.is_dirty(given.entries)], PageFlag.DIRTY)
        frames.map(targets[~own])
        space.table.store(given.addresses, cpu_pte.cpu_entry(targets[~own], READ_ONLY))
        space.drop(given.entries)
        return given.pfns.size + int(np.count_nonzero(kept))

    # ---- the reverse map

    def places(self, pfns: Pfns) -> Iterator[Places]:
        """Where merged pages are mapped, or a migration stands in for them: rmap_walk_ksm().

        Args:
            pfns: int64[n], unique.

        Cost: O(everything mapped).
        """
        order = np.argsort(pfns)
        ascending = pfns[order]
        for number in sorted(self.spaces):
            space = self.spaces[number]
            addresses, entries = space.table.in_use()
            named = cpu_pte.cpu_pfn(entries)
            at = np.minimum(ascending.searchsorted(named), ascending.size - 1)
            naming = (ascending[at] == named) & (cpu_pte.holds_frame(entries) | cpu_pte.is_migration(entries))
            addresses, which = addresses[naming], order[at[naming]]
            for vma in space.vmas_with_entries if addresses.size else ():
                low, high = addresses.searchsorted(np.array((vma.start, vma.end), np.uint64)).tolist()
                if low < high:
                    yield Places(space, vma, addresses[low:high], which[low:high])


@dataclass(frozen=True, slots=True)
class _Stable:
    """Merged pages that take more in: uint64[n] checksums, ascending and unique, int64[n] frames and room."""

    sums: Entries
    pfns: Pfns
    room: Pfns

    @classmethod
    def of(cls, frames: Frames, pfns: Pfns) -> _Stable:
        """Of pages with equal contents the one with the most entries: stable_node_dup()."""
        sums, counts = frames.checksums(pfns), frames.mapcount[pfns].astype(np.int64)
        order = np.lexsort((pfns, -counts, sums))
        sums, firsts = np.unique(sums[order], return_index=True)
        chosen = order[firsts]
        return cls(sums, pfns[chosen], MAX_PAGE_SHARING - counts[chosen])


def _assign(sums: Entries, pfns: Pfns, stable: _Stable) -> Pfns:
    """Where each page goes: cmp_and_merge_page() for all, in their order.

    Returns: int64[n], the frame that the page is merged into, which is its own for one that others are merged into.

    Cost: O(n log n) for every MAX_PAGE_SHARING equal pages.
    """
    targets = np.zeros(sums.size, np.int64)
    room = stable.room.copy()
    left = np.arange(sums.size)
    while left.size:
        order = left[np.argsort(sums[left], kind="stable")]
        found, own = sums[order], pfns[order]
        starts = np.flatnonzero(np.concatenate(([True], found[1:] != found[:-1])))
        group = np.repeat(np.arange(starts.size), np.diff(np.append(starts, found.size)))
        rank = np.arange(found.size) - starts[group]
        capacity, aims = _take_room(stable, room, found[starts])
        # A page that several processes share already is no second one: "Don't substitute a ksm page for a forked page".
        second = np.minimum.reduceat(np.where(own != own[starts][group], rank, _NEVER), starts)
        pairs = (capacity == 0) & (second < _NEVER)
        aims = np.where(pairs, own[np.minimum(starts + second, own.size - 1)], aims)
        member = np.where(
            pairs[group],
            (rank == 0) | ((rank >= second[group]) & (rank < second[group] + MAX_PAGE_SHARING - 1)),
            rank < capacity[group],
        )
        targets[order[member]] = aims[group][member]
        passed_over = pairs[group] & (rank < second[group])
        left = np.sort(order[(pairs | (capacity > 0))[group] & ~member & ~passed_over])
    return targets


def _take_room(stable: _Stable, room: Pfns, sums: Entries) -> tuple[Pfns, Pfns]:
    """How many pages of each content the merged page of that content takes in, from now on none; and that page."""
    if not stable.sums.size:
        return np.zeros(sums.size, np.int64), np.zeros(sums.size, np.int64)
    at = np.minimum(stable.sums.searchsorted(sums), stable.sums.size - 1)
    there = stable.sums[at] == sums
    capacity = np.where(there, room[at], 0)
    room[at[there]] = 0
    return capacity, np.where(there, stable.pfns[at], 0)


def _mergeable(space: AddressSpace) -> _Pages:
    """The private pages of the mergeable mappings of a process: scan_get_next_rmap_item()."""
    vmas = [vma for vma in space.vmas if vma.has(VmFlag.MERGEABLE) and vma.anon_vma]
    parts = [space.table.valid(vma.start, vma.end) for vma in vmas] or [(_NOTHING, _NOTHING)]
    addresses, entries = np.concatenate([a for a, _ in parts]), np.concatenate([e for _, e in parts])
    pfns = cpu_pte.cpu_pfn(entries)
    chosen = (
        cpu_pte.is_present(entries) & ~cpu_pte.is_special(entries) & (pfns < space.frames.regions[SYSTEM_REGION].top)
    )
    chosen[chosen] = space.frames.test_flags(pfns[chosen], PageFlag.ANON)
    return _Pages(space, addresses, entries, pfns).of(chosen)


def _unreferenced(frames: Frames, pages: _Pages) -> _Mask:
    """bool[n]: which pages write_protect_page() finds nobody to use but entries; read-only ones it does not ask."""
    pfns = pages.pfns
    asked = (pages.entries & np.uint64(cpu_pte.WRITE | cpu_pte.DIRTY)) != 0
    asked |= frames.test_flags(pfns, PageFlag.ANON_EXCLUSIVE)
    free: _Mask = frames.refcount[pfns] == frames.mapcount[pfns] + (frames.private[pfns] != 0)
    free |= ~asked
    return free


def _as_they_are(pages: _Pages, targets: Pfns) -> tuple[_Pages, Pfns]:
    """What of them is still there, and could be merged."""
    now = _mergeable(pages.space)
    at = np.minimum(now.addresses.searchsorted(pages.addresses), max(now.addresses.size - 1, 0))
    if not now.addresses.size:
        none = np.zeros(targets.size, np.bool_)
        return pages.of(none), targets[none]
    same = (now.addresses[at] == pages.addresses) & (now.pfns[at] == pages.pfns)
    current = _Pages(pages.space, pages.addresses, now.entries[at], pages.pfns)
    same &= _unreferenced(pages.space.frames, current)
    same &= ~pages.space.frames.test_flags(pages.pfns, PageFlag.COMPOUND | PageFlag.KSM)
    return current.of(same), targets[same]


def _equal(frames: Frames, pfns: Pfns, targets: Pfns) -> _Mask:
    """bool[n]: pages_identical()."""
    equal = np.zeros(pfns.size, np.bool_)
    for at in range(0, pfns.size, _COMPARED):
        part = slice(at, at + _COMPARED)
        equal[part] = (frames.gather(pfns[part]) == frames.gather(targets[part])).all(axis=1)
    return equal


def unmerge(space: AddressSpace, piece: Vma) -> Operation[None]:
    """Give a process copies of the merged pages of a part of one VMA, which stay read-only: unmerge_ksm_pages().

    Raises:
        OutOfFramesError: memory ran out (ENOMEM); the pages below `error.address` are copied.
        TimedOutError: a mirror with policy FAIL did not answer (ETIMEDOUT).

    Cost: O(entries), vectorised, and the copying.
    """
    frames = space.frames
    if frames.ksm_places is None:
        return
    for number, part in enumerate(space.table.populated(piece.start, piece.end)):
        if number:
            yield Pause()
        while (pages := _merged_pages(space, part.start, part.end)).pfns.size:
            if frames.available < pages.pfns.size and frames.make_room:
                yield from frames.make_room(pages.pfns.size)
            with space.notifier.invalidation(spans_of(pages.addresses), Cause.COPY_ON_WRITE) as bracket:
                yield from bracket.deliver()
                now = space.table.lookup(pages.addresses)
                pages = pages.of(now == pages.entries)
                fitting = pages.of(np.arange(pages.pfns.size) < frames.available)
                if fitting.pfns.size:  # else others were quicker while drivers were told, or there is no memory
                    copy_unshared(space, fitting.addresses, fitting.entries)
            if pages.pfns.size and not frames.available and _merged_pages(space, part.start, part.end).pfns.size:
                address = int(pages.addresses[-1])
                raise OutOfFramesError(f"unmerge: {address:#x}: memory ran out", errnos.ENOMEM, address=address)


def _merged_pages(space: AddressSpace, start: int, end: int) -> _Pages:
    addresses, entries = space.table.valid(start, end)
    pfns = cpu_pte.cpu_pfn(entries)
    merged = cpu_pte.is_present(entries) & ~cpu_pte.is_special(entries)
    merged[merged] = space.frames.test_flags(pfns[merged], PageFlag.KSM)
    return _Pages(space, addresses, entries, pfns).of(merged)
