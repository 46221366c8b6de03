"""Faults on hugetlb memory: by huge pages, from the pool.

    no entry    shared    the page of the file, writable if the VMA is
                private   a new page of its own; read-only until it is written
    read-only   shared    becomes writable
                private   becomes writable if nobody else has it; else a copy of it, of which mirrors are told

**Source**: Linux mm/hugetlb.c: hugetlb_fault(), hugetlb_no_page(), hugetlb_wp(), copy_hugetlb_page_range(), 6.12.

**Invariants**: those of huge pages.

**Absent**: the pool and its reservations (hugetlb.py).

Differs: when the owner of a reservation finds no page for a copy it gets SIGBUS, where the kernel takes the page from
the children that share it.
"""

from __future__ import annotations

import numpy as np

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.errors import OutOfFramesError, SegmentationFault, Signal
from hmm.events import Cause
from hmm.fault_pages import READ_ONLY, WRITTEN, Attempt, By, Stop, prepare_anon_vma
from hmm.frames import PageFlag
from hmm.huge_fault import blocks_of, mark_huge
from hmm.hugetlb import HugetlbFile
from hmm.operation import Operation
from hmm.units import PAGE_SHIFT, PAGE_SIZE, PMD_PAGES, PMD_SHIFT, PMD_SIZE, Address, AddressRange, Entries, Pfns
from hmm.vma import Vma, VmFlag

__all__ = ["copy_pinned_pages", "fault_hugetlb", "unshare"]

_PRIVATE_PAGE = PageFlag.ANON | PageFlag.ANON_EXCLUSIVE


def fault_hugetlb(attempt: Attempt, vma: Vma, target: AddressRange | Entries) -> None:
    """Handle faults on a part of a VMA of hugetlb memory; pages to be copied wait in `attempt.copies`.

    Where the pool has no page it stops with SIGBUS, and as out of memory where there is no directory for one.

    Cost: O(huge pages).
    """
    for start in blocks_of(target):
        entry = attempt.space.table.get(start)
        try:
            done = _install(attempt, vma, start) if not entry else _touch(attempt, vma, start, entry)
        except OutOfFramesError:
            attempt.stop = Stop(max(start, _first(target)), None)
            return
        if not done:
            attempt.stop = Stop(max(start, _first(target)), Signal.BUS_ADRERR)
            return


def _first(target: AddressRange | Entries) -> Address:
    return target.start if isinstance(target, AddressRange) else int(target[0])


def _file(vma: Vma) -> HugetlbFile:
    file = vma.backing
    assert isinstance(file, HugetlbFile), vma
    return file


def _number(vma: Vma, start: Address) -> int:
    return vma.page_offset(start) >> (PMD_SHIFT - PAGE_SHIFT)


def _map(space: AddressSpace, start: Address, pfns: Pfns, flags: int) -> None:
    space.table.fill(start, start + PMD_SIZE, cpu_pte.cpu_entry(pfns, flags | cpu_pte.HUGE))
    space.frames.map(pfns)
    space.huge = True


def _install(attempt: Attempt, vma: Vma, start: Address) -> bool:
    """huge_pte_alloc(), hugetlb_no_page()."""
    space, file = attempt.space, _file(vma)
    space.table.require(start, start + PMD_SIZE)  # before a page is taken, and with it a reservation
    if vma.shared:
        pfns = _cached(space, file, _number(vma, start))
        flags = WRITTEN if vma.writable else READ_ONLY  # make_huge_pte(), for a read as well
    else:
        prepare_anon_vma(space, vma)
        pfns = file.take(space, _number(vma, start), _PRIVATE_PAGE)
        flags = WRITTEN if attempt.write else READ_ONLY
    if pfns is None:
        return False
    _map(space, start, pfns, flags)
    if not vma.shared:
        space.claim(pfns, start)
    return True


def _cached(space: AddressSpace, file: HugetlbFile, number: int) -> Pfns | None:
    """The page of the file, from now on in its cache."""
    offset = number << PMD_SHIFT
    entries = file.pages.read(offset, offset + PMD_SIZE)
    if entries.any():
        return cpu_pte.cpu_pfn(entries)
    pfns = file.take(space, number, PageFlag.NONE)
    if pfns is not None:
        file.pages.fill(offset, offset + PMD_SIZE, cpu_pte.cpu_entry(pfns, cpu_pte.PRESENT))
        space.frames.get(pfns)
    return pfns


def _touch(attempt: Attempt, vma: Vma, start: Address, entry: int) -> bool:
    """A page that is there."""
    space = attempt.space
    if attempt.by is By.GUP and (not attempt.write or entry & cpu_pte.WRITE):
        return True
    if not attempt.write or entry & cpu_pte.WRITE or vma.shared:
        mark_huge(space, start, WRITTEN if attempt.write else READ_ONLY)
        return True
    if _keep(space, start, entry):
        mark_huge(space, start, WRITTEN)
        return True
    return _copy(attempt, vma, start)


def _keep(space: AddressSpace, start: Address, entry: int) -> bool:
    """Make a private page its process's own if nobody else maps it.  Returns: whether it is."""
    frames, head = space.frames, cpu_pte.cpu_pfn(entry)
    alone = frames.flags_of(head) & PageFlag.ANON_EXCLUSIVE or int(frames.mapcount[head]) == 1
    if not (frames.flags_of(head) & PageFlag.ANON and alone):
        return False
    pfns = np.arange(head, head + PMD_PAGES)
    frames.set_flags(pfns, PageFlag.ANON_EXCLUSIVE)
    space.claim(pfns, start)
    return True


def _copy(attempt: Attempt, vma: Vma, start: Address) -> bool:
    """hugetlb_wp()."""
    space = attempt.space
    if attempt.told is not None and not np.isin(np.uint64(start), attempt.told):
        waiting = sum(_is_hugetlb(space, int(pages[0])) for pages in attempt.copies)
        if not _file(vma).may_take(space, _number(vma, start), waiting):
            return False  # mirrors are told when there is a page to copy to
        attempt.copies.append(np.arange(start, start + PMD_SIZE, PAGE_SIZE, dtype=np.uint64))
        return True
    return _replace(space, vma, start, WRITTEN)


def _replace(space: AddressSpace, vma: Vma, start: Address, flags: int) -> bool:
    """Map a copy in the place of a page.  Returns: whether there was a page for it."""
    pfns = _file(vma).take(space, _number(vma, start), _PRIVATE_PAGE)
    if pfns is None:
        return False
    old = space.table.read(start, start + PMD_SIZE)
    space.frames.copy(pfns, cpu_pte.cpu_pfn(old))
    _map(space, start, pfns, flags)
    space.claim(pfns, start)
    space.drop(old)
    return True


def unshare(space: AddressSpace, vma: Vma, start: Address) -> Operation[None]:
    """Give a process the private page that it has at `start` to itself, to be read: hugetlb_wp(), FAULT_FLAG_UNSHARE.

    When the page has changed while mirrors were told it is left alone.

    Raises: SegmentationFault: the pool has no page for a copy (EFAULT).
    """
    entry = space.table.get(start)
    if _keep(space, start, entry):
        return
    done = _file(vma).may_take(space, _number(vma, start), 0)
    if done:
        block = AddressRange(start, start + PMD_SIZE)
        with space.notifier.invalidation((block,), Cause.COPY_ON_WRITE) as bracket:
            yield from bracket.deliver()
            now = space.vmas.find(start)
            if now is None or space.table.get(start) != entry:
                return
            done = _replace(space, now, start, READ_ONLY)
    if not done:
        raise SegmentationFault(f"no huge page is free for a copy of {start:#x}", Signal.BUS_ADRERR, start)


def _is_hugetlb(space: AddressSpace, address: Address) -> bool:
    return bool(space.frames.flags_of(cpu_pte.cpu_pfn(space.table.get(address))) & PageFlag.HUGETLB)


def copy_pinned_pages(parent: AddressSpace, child: AddressSpace, vma: Vma, addresses: Entries) -> None:
    """The child gets copies of pages that devices use of the parent's: copy_hugetlb_page_range().

    Raises: OutOfFramesError: the pool has no page, or there is no directory for one (ENOMEM).
    """
    for start in blocks_of(addresses):
        child.table.require(start, start + PMD_SIZE)
        pfns = _file(vma).take(child, _number(vma, start), _PRIVATE_PAGE)
        if pfns is None:
            raise OutOfFramesError(f"fork: no huge page is free for a copy of the one at {start:#x}", address=start)
        parent.frames.copy(pfns, cpu_pte.cpu_pfn(parent.table.read(start, start + PMD_SIZE)))
        _map(child, start, pfns, WRITTEN if vma.has(VmFlag.WRITE) else READ_ONLY)
        child.claim(pfns, start)
