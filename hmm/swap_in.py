"""Swap-in: a page that is in swap is touched, and comes back.

No mirror is told, as none can have an entry for a page that is in swap.

**Source**: Linux mm/memory.c, do_swap_page(); mm/madvise.c, swapin_walk_pmd_entry(), force_shm_swapin_readahead();
6.12.

**Invariants**: those of swap.py.

**Absent**: pages of files, which faults find in the page cache (file.py); reading ahead.

Differs: `read_ahead` brings pages of files into the page cache, where the kernel leaves them in the swap cache.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.ascending import unique
from hmm.errors import OutOfFramesError
from hmm.fault import RESOLVERS
from hmm.fault_pages import DIRTIED, READ_ONLY, Strangers
from hmm.file import FILE_SIZE_MAX, File
from hmm.frames import Frames, PageFlag
from hmm.operation import Operation
from hmm.swap import area_of, free_entries, read_in, slots_of, some_room
from hmm.swap_area import Slots
from hmm.units import PAGE_SHIFT, PIECE_PAGES, AddressRange, Entries, Pfns
from hmm.vma import Vma, VmFlag

__all__ = ["read_ahead"]

_NOT_EXCLUSIVE = PageFlag.ANON | PageFlag.SWAPBACKED


def _swap_in(space: AddressSpace, touched: Strangers, write: bool) -> Operation[None]:
    """do_swap_page() for pages of one VMA: as many of the first ones as there is room for.

    Raises:
        OutOfFramesError: there is not one frame for them (ENOMEM).
    """
    frames, addresses = space.frames, touched.addresses
    costs = _costs(space, addresses, write)
    if costs[0] > frames.available:
        if not (yield from some_room(frames, 2 * addresses.size)) and not frames.available:
            raise OutOfFramesError("a page cannot come back from swap: memory ran out", address=int(addresses[0]))
        costs = _costs(space, addresses, write)
    costs[0] = min(costs[0], frames.available)
    addresses = addresses[np.cumsum(costs) <= frames.available]
    vma = space.vmas.find(int(addresses[0]))
    entries = space.table.lookup(addresses)
    swapped = cpu_pte.is_swap(entries)
    if vma is not None and swapped.any():
        swapped &= addresses < np.uint64(vma.end)
        _map(space, vma, addresses[swapped], entries[swapped], write)


def _costs(space: AddressSpace, addresses: Entries, write: bool) -> npt.NDArray[np.int64]:
    """How many frames each page needs: none when it is in the swap cache, one more when it will be copied at once."""
    entries = space.table.lookup(addresses)
    swapped = cpu_pte.is_swap(entries)
    costs = np.zeros(entries.size, np.int64)
    costs[swapped] = area_of(space.frames).cached[slots_of(entries)] == 0
    if write:
        costs += swapped & ((entries & np.uint64(cpu_pte.SWP_EXCLUSIVE)) == 0)
    return costs


def _map(space: AddressSpace, vma: Vma, addresses: Entries, entries: Entries, write: bool) -> None:
    frames, slots = space.frames, cpu_pte.cpu_pfn(entries)
    marked = (entries & np.uint64(cpu_pte.SWP_EXCLUSIVE)) != 0
    pfns = _cache(frames, slots)
    leaves = _leave_swap_cache(frames, vma, slots, pfns, write)
    frames.map(pfns)
    free_entries(frames, slots, dirty=False)
    frames.set_flags(pfns[leaves & (frames.private[pfns] == 0)], PageFlag.DIRTY)  # folio_free_swap()
    # do_swap_page(): a page that this process alone has, by the marker, or as there is no other reference.
    exclusive = marked | (leaves & (frames.refcount[pfns] == 1))
    flags = (entries & np.uint64(cpu_pte.SOFT_DIRTY)) | np.uint64(READ_ONLY)
    if vma.writable:
        tracked = not write and not space.is_soft_dirty(vma)  # pte_needs_soft_dirty_wp()
        writable = exclusive & ((flags & np.uint64(cpu_pte.SOFT_DIRTY)) != 0) if tracked else exclusive
        flags[writable] |= np.uint64(cpu_pte.WRITE | (DIRTIED if write else 0))
    frames.set_flags(pfns[exclusive], PageFlag.ANON_EXCLUSIVE)
    space.claim(pfns[exclusive], vma.start)
    space.table.store(addresses, cpu_pte.cpu_entry(pfns, flags))


def _leave_swap_cache(frames: Frames, vma: Vma, slots: Slots, pfns: Pfns, write: bool) -> npt.NDArray[np.bool_]:
    """bool[n]: which pages leave the swap cache if these were the last entries: should_try_to_free_swap().

    Those that are to be written and that nobody maps; in locked memory all; so too while half of swap is used.
    """
    if vma.has(VmFlag.LOCKED):
        return np.ones(slots.size, np.bool_)
    area = area_of(frames)
    last = area.counts[slots] == 1
    full: npt.NDArray[np.bool_] = 2 * (area.free + np.cumsum(last) - last) < area.total  # vm_swap_full()
    return full | (frames.refcount[pfns] == 1) if write else full


def _cache(frames: Frames, slots: Slots) -> Pfns:
    """The pages of slots, from the swap cache or read into it: swapin_readahead()."""
    area = area_of(frames)
    pfns = area.cached[slots]
    absent = pfns == 0
    if absent.any():
        fresh, missing = read_in(frames, slots[absent]), slots[absent]
        frames.set_flags(fresh, _NOT_EXCLUSIVE)
        frames.private[fresh] = missing
        area.cached[missing] = fresh
        pfns[absent] = fresh
    return pfns


RESOLVERS[cpu_pte.SWAP] = _swap_in


# ---- ahead of use


def read_ahead(space: AddressSpace, span: AddressRange) -> Operation[None]:
    """Bring what is in swap of a range into memory, and map none of it, as far as there is room: MADV_WILLNEED.

    Of a mapping of a file these are the file's pages; private copies stay where they are.

    Args:
        span: page-aligned, a part of one VMA.

    Cost: O(entries), vectorised, and the copying.  Source: Linux mm/madvise.c, madvise_willneed().
    """
    vma = space.vmas.find(span.start)
    if space.frames.swap is None or vma is None:
        return
    if isinstance(vma.backing, File):
        yield from _read_file_ahead(space, vma.clip(span.start, span.end), vma.backing)
        return
    for addresses, entries in space.table.chunks(span.start, min(span.end, vma.end), PIECE_PAGES):
        swapped = addresses[cpu_pte.is_swap(entries)]
        if swapped.size:
            yield from _read_ahead(space, swapped)


def _read_ahead(space: AddressSpace, addresses: Entries) -> Operation[None]:
    frames = space.frames
    if frames.available < addresses.size:
        yield from some_room(frames, addresses.size)
    entries = space.table.lookup(addresses)
    slots = unique(cpu_pte.cpu_pfn(entries[cpu_pte.is_swap(entries)]))
    slots = slots[area_of(frames).cached[slots] == 0]
    _cache(frames, slots[: frames.available])


def _read_file_ahead(space: AddressSpace, piece: Vma, file: File) -> Operation[None]:
    frames, shift = space.frames, piece.mapping.delta << PAGE_SHIFT
    start, end = piece.start + shift, min(piece.end + shift, FILE_SIZE_MAX)
    for offsets, entries in file.pages.chunks(start, end, PIECE_PAGES) if start < end else ():
        swapped = offsets[cpu_pte.is_swap(entries)]
        if frames.available < swapped.size:
            yield from some_room(frames, swapped.size)
        swapped = swapped[cpu_pte.is_swap(file.pages.lookup(swapped))]
        if swapped.size:
            file.grab(swapped[: frames.available])
