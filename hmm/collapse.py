"""Collapsing: the small pages of a block become one huge page, by request (MADV_COLLAPSE).

Pages that are elsewhere are brought in, holes and zero pages become zeroes, pages that others share are copied: the
huge page is its process's own.  Pages of files stay the file's (collapse_file.py).  A block that cannot be collapsed is
passed over, and told in the end.

**Source**: Linux mm/khugepaged.c (madvise_collapse(), hpage_collapse_scan_pmd(), collapse_huge_page()), 6.12.

**Invariants**: mirrors have heard of a block before its pages are replaced.

**Absent**: khugepaged, which does it unasked.
"""

from __future__ import annotations

import errno as errnos

import numpy as np
import numpy.typing as npt

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.collapse_file import Failure, allows_collapse, collapse_block_of_file
from hmm.errors import HmmError, InvalidRequestError, OutOfFramesError, RangeBusyError
from hmm.events import Cause
from hmm.fault import bring_in
from hmm.fault_pages import ANON_PAGE, WRITTEN
from hmm.frames import PageFlag
from hmm.huge_fault import has_table
from hmm.huge_split import has_directory
from hmm.large_folio import belong_to, heads_of, members
from hmm.operation import Operation
from hmm.units import PAGE_SIZE, PMD_MASK, PMD_SHIFT, PMD_SIZE, AddressRange, Entries, Pfns, pmd_up
from hmm.vma import SPECIAL_FLAGS, Vma, VmFlag
from hmm.zone_device import owners

__all__ = ["collapse"]


_MISSED = Failure(errnos.EBUSY, "a userfaultfd misses a page", ends=True)


def collapse(space: AddressSpace, vma: Vma) -> Operation[None]:
    """Collapse the blocks that lie in a part of one VMA.

    Raises:
        InvalidRequestError: the VMA cannot have huge pages or never had a page, or a block has no page table, no page
            that may be written, or pages that are no memory of its own; or a mapping of a file lies so that no huge
            page fits, or the file has no page there (EINVAL).
        OutOfFramesError: no run of frames is free (ENOMEM); the blocks before it are collapsed, and nobody heard of it.
        RangeBusyError: somebody else refers to a page (EAGAIN); all other blocks are collapsed.  A userfaultfd misses a
            page (EBUSY, SCAN_EXCEED_NONE_PTE); the blocks before it are collapsed.
        TimedOutError: a mirror with policy FAIL did not answer (ETIMEDOUT).

    Cost: O(blocks), and the copying; of files O(VMAs of the spaces that map it) for each block.
    """
    first, end = pmd_up(vma.start), vma.end & PMD_MASK
    if not _allowed(space.vmas.find(vma.start)) or end < first:
        raise InvalidRequestError(f"collapse: no huge page can come in {vma}", address=vma.start)
    failed: tuple[AddressRange, Failure] | None = None
    for start in range(first, end, PMD_SIZE):
        block = AddressRange(start, start + PMD_SIZE)
        now = space.vmas.find(start)
        if now is not None and allows_collapse(now) and block.end <= now.end:
            failure = yield from collapse_block_of_file(space, now, start)
        else:
            failure = yield from _collapse(space, block)
        if failure is not None:
            failed = (block, failure)
            if failure.ends:
                break
    if failed is not None:
        raise _error(*failed)


def _error(block: AddressRange, failure: Failure) -> HmmError:
    message = f"collapse: {block}: {failure.why}"
    match failure.errno:
        case errnos.ENOMEM:
            return OutOfFramesError(message, address=block.start)
        case errnos.EAGAIN | errnos.EBUSY:
            return RangeBusyError(message, failure.errno, address=block.start)
    return InvalidRequestError(message, address=block.start)


def _allowed(vma: Vma | None) -> bool:
    """thp_vma_allowable_order(), whatever the setting for first touches is."""
    if vma is None:
        return False
    if vma.backing is not None:
        return allows_collapse(vma)
    if not vma.anon_vma or vma.has(VmFlag.NOHUGEPAGE | SPECIAL_FLAGS):
        return False
    return vma.end - PMD_SIZE & PMD_MASK >= vma.start


def _collapse(space: AddressSpace, block: AddressRange) -> Operation[Failure | None]:
    entries = space.table.read(block.start, block.end)
    if cpu_pte.is_huge(entries).any():
        return _away(entries)
    failure = _scan(space, block, entries)
    if failure is not None:
        return failure
    folio = space.frames.allocate_folio()  # before anything is brought in or told: alloc_charge_folio()
    if folio is None:
        return Failure(errnos.ENOMEM, "no run of frames is free", ends=True)
    collapsed = False
    try:
        failure = yield from _collapse_into(space, block, folio)
        collapsed = failure is None and cpu_pte.cpu_pfn(space.table.get(block.start)) == int(folio[0])
    finally:
        if not collapsed:
            space.frames.put(folio)
    return failure


def _collapse_into(space: AddressSpace, block: AddressRange, folio: Pfns) -> Operation[Failure | None]:
    """collapse_huge_page()."""
    entries = space.table.read(block.start, block.end)
    away = np.flatnonzero((entries != 0) & ~cpu_pte.is_present(entries))
    if away.size:
        addresses = np.uint64(block.start) + away.astype(np.uint64) * np.uint64(PAGE_SIZE)
        stop = yield from bring_in(space, addresses, write=False)
        if stop is not None:
            return Failure(errnos.EINVAL, f"{stop.address:#x} cannot be brought in", ends=True)
    with space.notifier.turn() as turn:
        yield from turn.wait()
        turn.hold(block)
        with space.notifier.invalidation((block,), Cause.COLLAPSE) as bracket:
            yield from bracket.deliver()
            return _replace(space, block, folio)


def _away(entries: Entries) -> Failure | None:
    """find_pmd_or_thp_or_none() of a huge page: it is there already, in the memory of a device, or on its way."""
    if cpu_pte.is_present(int(entries[0])):
        return None
    return Failure(errnos.EINVAL, "the huge page is in a device's memory, or on its way")


def _scan(space: AddressSpace, block: AddressRange, entries: Entries) -> Failure | None:
    """hpage_collapse_scan_pmd(): what is in the way, of pages the first."""
    vma = space.vmas.find(block.start)
    if vma is None or block.end > vma.end or not _allowed(vma):
        return Failure(errnos.EINVAL, "no VMA that may have huge pages covers it", ends=True)
    if not has_table(space, block.start):
        # SCAN_PMD_NONE; without a directory above SCAN_PMD_NULL, which does not end it
        return Failure(errnos.EINVAL, "there is no page table", ends=has_directory(space, block.start))
    return _in_the_way(space, vma, entries)


def _in_the_way(space: AddressSpace, vma: Vma, entries: Entries) -> Failure | None:
    present = cpu_pte.is_present(entries) & ~cpu_pte.is_special(entries)
    here = entries[present]
    pfns = cpu_pte.cpu_pfn(here)
    alien = owners(space.frames, pfns) != 0
    failing = np.zeros(entries.size, np.bool_)
    failing[present] = alien | _are_referenced(space, pfns, entries)
    if vma.mapping.userfaultfd:
        failing |= cpu_pte.is_special(entries) | (entries == 0)
    if failing.any():
        at = int(failing.argmax())
        if not present[at]:
            return _MISSED
        if alien[np.count_nonzero(present[:at])]:
            return Failure(errnos.EINVAL, "a page is in a device's memory")
        return Failure(errnos.EAGAIN, "somebody refers to a page")
    assert space.frames.all_have(pfns, PageFlag.ANON), f"{vma} has pages that are not private"
    if not cpu_pte.is_writable(here).any():
        return Failure(errnos.EINVAL, "no page may be written")
    return None


def _are_referenced(space: AddressSpace, pfns: Pfns, entries: Entries) -> npt.NDArray[np.bool_]:
    """bool[n]: to which frames, or folios with them, somebody refers but page-table entries: is_refcount_suitable().

    Args:
        entries: all of the block.
    """
    frames = space.frames

    def found(some: Pfns) -> npt.NDArray[np.bool_]:
        referenced: npt.NDArray[np.bool_]
        referenced = frames.refcount[some] != frames.mapcount[some] + (frames.private[some] != 0)
        return referenced

    referenced = found(pfns)
    # What a device has to itself is referenced and not mapped, in 6.12.
    held = entries[cpu_pte.is_device_exclusive(entries)] if space.semantics.exclusive_ranges else entries[:0]
    for head in heads_of(frames, pfns):
        if found(members(frames, head)).any() or belong_to(frames, cpu_pte.cpu_pfn(held), head).any():
            referenced |= belong_to(frames, pfns, head)
    return referenced


def _replace(space: AddressSpace, block: AddressRange, folio: Pfns) -> Failure | None:
    """collapse_huge_page() from where mirrors have been told."""
    frames = space.frames
    entries = space.table.read(block.start, block.end)
    if cpu_pte.is_huge(entries).any():
        return _away(entries)
    failure = _scan(space, block, entries)
    if failure is not None:
        return failure
    if ((entries != 0) & ~cpu_pte.is_present(entries)).any():
        return Failure(errnos.EINVAL, "a page went elsewhere meanwhile")
    framed = np.flatnonzero((entries != 0) & ~cpu_pte.is_special(entries))
    frames.copy(folio[framed], cpu_pte.cpu_pfn(entries[framed]))
    vma = space.vmas.find(block.start)
    assert vma is not None
    flags = WRITTEN if vma.writable else WRITTEN & ~cpu_pte.WRITE
    frames.map_new(folio)
    frames.set_flags(folio, ANON_PAGE)
    space.table.fill(block.start, block.end, cpu_pte.cpu_entry(folio, flags | cpu_pte.HUGE))
    space.claim(folio, block.start)
    space.huge = True
    space.tables.discard(block.start >> PMD_SHIFT)
    space.drop(entries[entries != 0])
    return None
