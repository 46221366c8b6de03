"""Collapsing a block of a file: its small pages become one large folio of the page cache, for all who map the file.

    no page in memory or swap     EINVAL                                              SCAN_TRUNCATED
    somebody refers to a page     EAGAIN                                              SCAN_PAGE_COUNT, SCAN_PAGE_LRU
    no run of frames is free      ENOMEM                                              alloc_charge_folio()
    small pages                   are unmapped everywhere and copied, holes zeroed    collapse_file()
    page tables without an entry  go, unless the VMA has private pages                retract_page_tables()
    one large folio               is mapped by a huge entry, here                     collapse_pte_mapped_thp()

Where others map the file the next touch maps the huge page.

**Source**: Linux mm/khugepaged.c, 6.12.

**Invariants**: those of file_folio.py; mirrors have heard of a page before it is replaced.

**Absent**: the blocks of a call (collapse.py).

Differs: one event for each address space, where the kernel sends one for each page and mapping, and one for each page
table that goes.  The ranges are the same.
"""

from __future__ import annotations

import errno as errnos
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.errors import OutOfFramesError
from hmm.events import Cause
from hmm.file import FILE_SIZE_MAX, File, FileKind
from hmm.file_folio import Told, covers, fits, folio_at, is_folio_at, mapped_places, tell_everywhere, unmap_place
from hmm.frames import PageFlag
from hmm.huge_fault import has_table, map_huge_of_file
from hmm.huge_split import block_of, has_directory
from hmm.operation import Operation
from hmm.rmap import Places
from hmm.swap import some_room
from hmm.units import (
    PAGE_SHIFT,
    PMD_MASK,
    PMD_PAGES,
    PMD_SIZE,
    Address,
    AddressRange,
    Entries,
    Pfns,
    spans_of,
)
from hmm.vma import SPECIAL_FLAGS, Vma, VmFlag

__all__ = ["Failure", "allows_collapse", "collapse_block_of_file"]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a block cannot be collapsed, and whether others are tried after it: enum scan_result."""

    errno: int
    why: str
    ends: bool = False


_REFERENCED = Failure(errnos.EAGAIN, "somebody refers to a page")
_TRUNCATED = Failure(errnos.EINVAL, "the file has no page there", ends=True)
_NO_ROOM = Failure(errnos.ENOMEM, "no run of frames is free", ends=True)
_NOT_BACK = Failure(errnos.EINVAL, "a page cannot be brought back from swap", ends=True)
_MISSED = Failure(errnos.EBUSY, "a userfaultfd misses a page", ends=True)
_CHANGED = Failure(errnos.EINVAL, "no VMA that may have huge pages covers it", ends=True)
_NO_DIRECTORY = Failure(errnos.EINVAL, "there is no page table")
_GONE = Failure(errnos.EINVAL, "the huge page has been split")
_NOT_MAPPED = Failure(errnos.EINVAL, "it cannot be mapped by a huge entry", ends=True)
_ELSEWHERE = Failure(errnos.EINVAL, "a private page is elsewhere")
_PRIVATE = Failure(errnos.EINVAL, "there is a private page", ends=True)
_NOTHING: Entries = np.zeros(PMD_PAGES, np.uint64)


def allows_collapse(vma: Vma) -> bool:
    """thp_vma_allowable_order() of a mapping of a file, whatever the settings are."""
    file = vma.backing
    if not isinstance(file, File) or file.kind not in (FileKind.FILE, FileKind.SHARED_MEMORY):
        return False
    return not vma.has(VmFlag.NOHUGEPAGE | SPECIAL_FLAGS) and fits(vma, vma.end - PMD_SIZE & PMD_MASK)


def collapse_block_of_file(space: AddressSpace, vma: Vma, start: Address) -> Operation[Failure | None]:
    """Make one huge page of the pages of a file that a VMA can map at `start`, and map it there.

    Args:
        vma: whole; it allows that.

    Raises: TimedOutError: a mirror with policy FAIL did not answer; nothing was changed.

    Cost: O(VMAs of the spaces that map the file), and the copying.
    Source: Linux mm/khugepaged.c, hpage_collapse_scan_file().
    """
    file, offset = vma.backing, vma.page_offset(start) << PAGE_SHIFT
    assert isinstance(file, File), vma
    if folio_at(file, offset) is None:
        failure = _scan(file, offset)
        if failure is not None:
            return failure
        folio = file.frames.allocate_folio()
        if folio is None:
            return _NO_ROOM
        try:
            failure = yield from _collapse_into(file, offset, folio)
        finally:
            if not is_folio_at(file, offset, folio):
                file.frames.put(folio)
        if failure is not None:
            return failure
    return (yield from _map(space, vma, start))


# ---- the page cache


def _cached(file: File, offset: int) -> Entries:
    return file.pages.read(offset, offset + PMD_SIZE) if offset < FILE_SIZE_MAX else _NOTHING


def _scan(file: File, offset: int) -> Failure | None:
    frames = file.frames
    pfns = cpu_pte.cpu_pfn(cpu_pte.having(_cached(file, offset), cpu_pte.PRESENT))
    busy = frames.refcount[pfns] != frames.mapcount[pfns] + 1
    busy |= frames.locks.are_locked(pfns) | frames.test_flags(pfns, PageFlag.HWPOISON)  # on no list of pages
    return _REFERENCED if busy.any() else None


def _collapse_into(file: File, offset: int, folio: Pfns) -> Operation[Failure | None]:
    """collapse_file()."""
    if not _cached(file, offset).any():
        return _TRUNCATED
    if not (yield from _swap_in(file, offset)):
        return _NOT_BACK
    with ExitStack() as brackets:
        yield from tell_everywhere(file, brackets, Cause.COLLAPSE, partial(_untold, file, offset))
        return _replace(file, offset, folio)


def _swap_in(file: File, offset: int) -> Operation[bool]:
    """Bring all of a block back from swap.  Returns: whether there was room for it."""
    for _ in range(2):
        entries = _cached(file, offset)
        swapped = np.flatnonzero(cpu_pte.is_swap(entries))
        try:
            file.grab((swapped.astype(np.uint64) << np.uint64(PAGE_SHIFT)) + np.uint64(offset))
        except OutOfFramesError:
            if not (yield from some_room(file.frames, swapped.size)):
                return False
        else:
            return True
    return False


def _frames_in(file: File, offset: int) -> Pfns:
    """int64[PMD_PAGES]: the frames of pages in memory, else 0."""
    entries = _cached(file, offset)
    return np.where(cpu_pte.is_present(entries), cpu_pte.cpu_pfn(entries), 0)


def _untold(file: File, offset: int, told: Told) -> Told:
    """What try_to_unmap() of each page tells of, and retract_page_tables()."""
    new: Told = {}
    if folio_at(file, offset) is not None:
        return new
    for place, mapped in mapped_places(file, offset, _frames_in(file, offset)):
        spans = spans_of(place.addresses[mapped]) if mapped.any() else ()
        if _is_retracted(place):
            spans = (block_of(int(place.addresses[0])),)
        known = told.get(place.space.id, ())
        fresh = tuple(span for span in spans if not covers(known, span))
        if fresh:
            new[place.space.id] = new.get(place.space.id, ()) + fresh
    return new


def _is_retracted(place: Places) -> bool:
    """Whether the page table of a place goes: it is of all of the block, and no private page may be in it."""
    start = int(place.addresses[0])
    return fits(place.vma, start) and not place.vma.anon_vma and has_table(place.space, start)


def _replace(file: File, offset: int, folio: Pfns) -> Failure | None:
    """collapse_file() from where mirrors have been told."""
    if folio_at(file, offset) is not None:  # another call has made one meanwhile
        return None
    entries, frames = _cached(file, offset), file.frames
    if not entries.any():
        return _TRUNCATED
    failure = _scan(file, offset)
    if failure is not None:
        return failure
    if cpu_pte.is_swap(entries).any():
        return _NOT_BACK
    pfns = _frames_in(file, offset)
    places = [place for place, _ in mapped_places(file, offset, pfns)]
    for place in places:
        unmap_place(place, pfns)
    there = np.flatnonzero(pfns)
    if there.size < PMD_PAGES and any(place.vma.has(VmFlag.UFFD_MISSING) for place in places):
        return _MISSED
    frames.copy(folio[there], pfns[there])
    pages = np.arange(PMD_PAGES) + (offset >> PAGE_SHIFT)
    frames.belong(folio, file.id, pages, PageFlag.COMPOUND | PageFlag.SWAPBACKED | PageFlag.DIRTY)
    file.pages.fill(offset, offset + PMD_SIZE, cpu_pte.cpu_entry(folio, cpu_pte.PRESENT))
    file.become_huge()
    frames.put(pfns[there])
    for place in places:
        if _is_retracted(place):
            place.space.retract_table(int(place.addresses[0]))
    return None


# ---- the page table of the caller


def _map(space: AddressSpace, vma: Vma, start: Address) -> Operation[Failure | None]:
    """collapse_pte_mapped_thp(); `vma`: as it was when the block was looked at."""
    block = AddressRange(start, start + PMD_SIZE)
    with space.notifier.turn() as turn:
        yield from turn.wait()
        turn.hold(block)
        failure = _in_the_way(space, vma, start)
        if failure is None and not cpu_pte.is_huge(space.table.get(start)) and has_table(space, start):
            with space.notifier.invalidation((block,), Cause.COLLAPSE) as bracket:
                yield from bracket.deliver()
                failure = _in_the_way(space, vma, start)
                return failure or _install(space, start)
        return failure or _install(space, start)


def _in_the_way(space: AddressSpace, before: Vma, start: Address) -> Failure | None:
    vma = space.vmas.find(start)
    if vma is None or vma.backing is not before.backing or not allows_collapse(vma) or not fits(vma, start):
        return _CHANGED
    entries = space.table.read(start, start + PMD_SIZE)
    if cpu_pte.is_huge(int(entries[0])):
        return None
    assert isinstance(vma.backing, File), vma
    folio = folio_at(vma.backing, vma.page_offset(start) << PAGE_SHIFT)
    if folio is None:
        return _GONE
    if not has_directory(space, start):
        return _NO_DIRECTORY
    strange = (entries != 0) & (~cpu_pte.is_present(entries) | (cpu_pte.cpu_pfn(entries) != folio))
    if not strange.any():
        return None
    return _PRIVATE if cpu_pte.is_present(int(entries[strange.argmax()])) else _ELSEWHERE


def _install(space: AddressSpace, start: Address) -> Failure | None:
    """Map the huge page by a huge entry, in the place of entries of its pages."""
    vma = space.vmas.find(start)
    assert vma is not None
    assert isinstance(vma.backing, File), vma
    if cpu_pte.is_huge(space.table.get(start)):
        return None
    space.frames.unmap(cpu_pte.cpu_pfn(space.table.zap(start, start + PMD_SIZE)))
    space.retract_table(start)
    return None if map_huge_of_file(space, vma, vma.backing, start, write=False) else _NOT_MAPPED
