"""Files: named bytes that several address spaces may map, and their page cache.

Models `struct inode` with its `struct address_space` for a memfd or tmpfs file, which is what all files here
are: the page cache is the only copy, a page that was never written is a hole, and a hole costs nothing until
a mapping touches it.  Unnamed shared memory is such a file without a name.  A device file has no pages of its
own: its driver says how it is mapped.

A file's pages live while a handle is open or a VMA maps it.  `mappers` names the address spaces that may map
it: a space enters at mmap and fork, and leaves when a look at its VMAs shows no mapping.  So whoever unmaps
only has to call `release_unused()`, and what one call misses the next one finds.

**Source**: Linux mm/shmem.c (shmem_file_read_iter(), shmem_file_write_iter(), shmem_evict_inode()).

**Invariants** (`check()`): every page of the cache is a frame on which the cache holds a reference; none lies
behind `size_bytes`, unless it is part of a large folio that begins before it or could not be split when the file was
truncated; the bytes of the last page behind `size_bytes` are zero unless a mapping wrote them.  A large folio is whole,
aligned and in order.

**Absent**: truncation and holes (truncate.py), page faults (fault.py), large folios (file_folio.py), names and
directories, access rights.

Differs: the kernel asks whether a file has a name when it is mapped (shmem_mmap()).  A file ends at 256 TiB at the
latest (EFBIG beyond), where four levels of directories end.
"""

from __future__ import annotations

import errno as errnos
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.errors import BadAddressError, InvalidRequestError, OutOfFramesError
from hmm.frames import ZERO_PFN, Frames, PageFlag
from hmm.operation import Await, Operation, Pause, WaitFor
from hmm.page_table import PageTable
from hmm.swap import area_of, free_entries, slots_of, some_room
from hmm.uio import copy_from_frames, copy_to_frames
from hmm.units import (
    PAGE_SHIFT,
    PAGE_SIZE,
    PIECE_BYTES,
    PMD_PAGES,
    Address,
    Entries,
    Pfn,
    Pfns,
    SpaceId,
    page_down,
    page_numbers,
    page_up,
)
from hmm.vma import Vma, VmFlag

__all__ = ["FILE_SIZE_MAX", "File", "FileKind", "locked", "read", "write", "zero"]

T = TypeVar("T")

FILE_SIZE_MAX = 1 << 48
"""Largest size in bytes: a page cache of four levels ends here."""
_OFFSET = PAGE_SIZE - 1


class FileKind(Enum):
    """What stands behind a mapping of the file."""

    FILE = "file"
    SHARED_MEMORY = "shared memory"
    DEVICE = "device"
    HUGETLB = "hugetlb"


@dataclass(slots=True, eq=False)
class File:
    """A file: its size, its page cache, who holds it.

    Attributes:
        id: positive, unique in the machine.
        name: what /proc/PID/maps shows.
        size_bytes: end of the file.  A device file has none: no access is behind it.
        vm_flags: of a device file: what its driver's mmap adds to the VMA.  With MIXEDMAP every mmap gets
            zeroed pages of its own; with PFNMAP the VMA shows registers, frame numbers without struct page.
        first_register: with PFNMAP: the frame number at offset 0, positive.
        opens: open handles; a name in a file system counts as one.
        calls: calls that work on it and have not ended; to them it is open, whoever closes it.
        locked_by: the operation that is changing the file, by write, truncation or a hole (inode_lock()); 0 for none.
        named: whether it has a name in a file system; without, as shared anonymous memory and memfds, a touch of a
            large folio maps all of it.
        huge: whether the page cache may hold large folios; cleared never, so that files without pay one test.
        mappers: the address spaces that may map the file, by id.
        pages: the page cache: an entry per page that is no hole, addressed by the offset in bytes.
    """

    id: int
    name: str
    kind: FileKind
    frames: Frames
    size_bytes: int = 0
    vm_flags: VmFlag = VmFlag.NONE
    first_register: Pfn = 1 << 36
    opens: int = 0
    calls: int = 0
    locked_by: int = 0
    max_directories: int = 1 << 16
    named: bool = False
    huge: bool = False
    mappers: dict[SpaceId, AddressSpace] = field(default_factory=dict)
    pages: PageTable = field(init=False)

    def __post_init__(self) -> None:
        self.pages = PageTable(FILE_SIZE_MAX - 1, max_directories=self.max_directories)

    def __str__(self) -> str:
        return f"{self.kind.value} {self.id} ({self.name or 'unnamed'})"

    @property
    def npages(self) -> int:
        """Pages up to the end of the file; the last one may be partial."""
        return page_up(self.size_bytes) >> PAGE_SHIFT

    @property
    def resident_pages(self) -> int:
        """Pages in memory.  Cost: O(directories of the page cache), and O(pages) when there is swap."""
        if self.frames.swap is None:
            return self.pages.count
        return int(np.count_nonzero(cpu_pte.is_present(self.pages.in_use()[1])))

    # ---- who holds it

    def open(self) -> None:
        """Count one handle more."""
        self.opens += 1

    def close(self) -> bool:
        """Count one handle less.

        Returns: True when the file's pages were let go of, because nothing else holds it.
        """
        assert self.opens > 0, self
        self.opens -= 1
        return self.release_unused()

    def mapped_by(self, space: AddressSpace) -> None:
        """Note that VMAs of `space` map the file, or are about to."""
        self.mappers[space.id] = space
        space.huge |= self.huge

    def become_huge(self) -> None:
        """Note that the page cache may hold large folios from now on, and those who map it huge pages."""
        self.huge = True
        for space in self.mappers.values():
            space.huge = True

    def mapping_spaces(self) -> list[AddressSpace]:
        """The address spaces with a VMA that maps the file, by ascending id.

        Cost: O(VMAs of `mappers`).  Source: the kernel keeps them in `i_mmap`.
        """
        for space_id in sorted(self.mappers):
            if not self._is_mapped_in(self.mappers[space_id]):
                del self.mappers[space_id]
        return [self.mappers[space_id] for space_id in sorted(self.mappers)]

    def mapped_parts(self, space: AddressSpace, start: int, end: int) -> list[Vma]:
        """The parts of VMAs of `space` that map the bytes [start, end) of the file, page-aligned; ascending.

        Cost: O(VMAs).  Source: Linux include/linux/mm.h, vma_interval_tree_foreach().
        """
        parts = []
        for vma in space.vmas_with_entries:
            if vma.mapping.backing is self:
                shift = vma.mapping.delta << PAGE_SHIFT
                low, high = max(vma.start, start - shift), min(vma.end, end - shift)
                if low < high:
                    parts.append(vma.clip(low, high))
        return parts

    def _is_mapped_in(self, space: AddressSpace) -> bool:
        return any(vma.mapping.backing is self for vma in space.vmas_with_entries)

    def release_unused(self) -> bool:
        """Let go of all pages when no handle is open, no call works on the file, and no VMA maps it.

        To be called once the entries of an unmapped range are gone, not when its VMAs are: until then a
        mirror that does not answer can bring them back.

        Returns: True when the file is unused, and its pages are gone.

        Cost: nothing while a handle is open; else O(VMAs of `mappers`).
        """
        if self.opens or self.calls or self.mapping_spaces():
            return False
        self.drop_pages(0, FILE_SIZE_MAX)
        return True

    # ---- the page cache

    def grab(self, offsets: Entries) -> Pfns:
        """The frames of pages of the file, allocated where there is a hole or the page is in swap.

        Args:
            offsets: uint64[n], bytes, page-aligned, ascending and unique, below FILE_SIZE_MAX.

        Returns: int64[n]; no reference is taken for the caller.

        Raises:
            OutOfFramesError: too few frames or directories; nothing was changed (ENOMEM).

        Cost: O(n), vectorised.  Source: Linux mm/shmem.c, shmem_get_folio_gfp() with SGP_CACHE.
        """
        entries = self.pages.lookup(offsets)
        absent = ~cpu_pte.is_present(entries)
        nabsent = int(np.count_nonzero(absent))
        if not nabsent:
            return cpu_pte.cpu_pfn(entries)
        missing = offsets if nabsent == offsets.size else offsets[absent]
        pfns = self.frames.allocate(nabsent)
        fresh = cpu_pte.cpu_entry(pfns, cpu_pte.PRESENT)
        try:
            before = self.pages.store(missing, fresh)
        except OutOfFramesError:
            self.frames.put(pfns)
            raise
        self.frames.belong(pfns, self.id, page_numbers(missing), PageFlag.SWAPBACKED)
        self._swap_in(pfns, before)
        entries[absent] = fresh
        return cpu_pte.cpu_pfn(entries)

    def _swap_in(self, pfns: Pfns, before: Entries) -> None:
        # shmem_swapin_folio(): `before` is what stood in the place of `pfns`, holes and swap entries.
        swapped = cpu_pte.is_swap(before)
        if swapped.any():
            slots = slots_of(before)
            self.frames.load(pfns[swapped], area_of(self.frames), slots)
            self.frames.set_flags(pfns[swapped], PageFlag.DIRTY)
            free_entries(self.frames, slots)

    def cached(self, offsets: Entries) -> npt.NDArray[np.bool_]:
        """bool[n]: which pages are in memory; `offsets` as for `grab`."""
        return cpu_pte.is_present(self.pages.lookup(offsets))

    def poisoned(self, offsets: Entries) -> npt.NDArray[np.bool_]:
        """bool[n]: which pages are in memory that lost its contents.

        Args:
            offsets: uint64[n], bytes, page-aligned; also behind the end of the file.
        """
        entries = self.pages.lookup(np.minimum(offsets, np.uint64(FILE_SIZE_MAX - PAGE_SIZE)))
        pfns = np.where(cpu_pte.is_present(entries), cpu_pte.cpu_pfn(entries), ZERO_PFN)
        return self.frames.test_flags(pfns, PageFlag.HWPOISON)

    def drop_pages(self, start: int, end: int) -> None:
        """Take the pages of [start, end), page-aligned bytes, out of the cache.

        Source: Linux mm/truncate.c, truncate_inode_pages_range().
        """
        entries = self.pages.zap(start, end)
        self.frames.put(cpu_pte.cpu_pfn(cpu_pte.having(entries, cpu_pte.PRESENT)))
        free_entries(self.frames, slots_of(entries))

    def zero(self, start: int, end: int) -> None:
        """Fill [start, end), bytes inside one page, with zeroes; a hole is zero already."""
        entry = self.pages.get(start)
        if cpu_pte.is_swap(entry):
            area_of(self.frames).write(cpu_pte.cpu_pfn(entry), start & _OFFSET, bytes(end - start))
        elif entry:
            self.frames.write(cpu_pte.cpu_pfn(entry), start & _OFFSET, bytes(end - start))
            self.frames.set_flags_one(cpu_pte.cpu_pfn(entry), PageFlag.DIRTY)

    def check(self) -> None:
        """Assert the invariants.  Cost: O(pages of the cache)."""
        self.pages.check()
        offsets, entries = self.pages.in_use()
        assert np.unique(entries).size == entries.size, f"{self} has a frame twice"
        there = cpu_pte.is_present(entries)
        held = cpu_pte.cpu_pfn(entries[there])
        assert (self.frames.refcount[held] > 0).all(), f"{self} has a free frame"
        large = np.zeros(offsets.size, np.bool_)
        large[there] = self.frames.test_flags(held, PageFlag.COMPOUND)
        assert self.huge or not large.any(), f"{self} has a large folio"
        assert (large | (offsets < self.size_bytes)).all(), f"{self} has pages behind its end"
        pages = page_numbers(offsets[large])
        counts = np.unique(pages // PMD_PAGES, return_counts=True)[1]
        assert (counts == PMD_PAGES).all(), f"{self} has a large folio in parts"
        pfns = cpu_pte.cpu_pfn(entries[large])
        assert (pfns % PMD_PAGES == pages % PMD_PAGES).all(), f"{self} has a large folio that is not aligned"
        heads = (pfns // PMD_PAGES).reshape(-1, PMD_PAGES)
        assert (heads == heads[:, :1]).all(), f"{self} has a large folio of several"


def locked(file: File, operation_id: int, call: Operation[T]) -> Operation[T]:
    """Make a call that changes a file when no other is doing so: inode_lock().

    Source: Linux fs/open.c, do_truncate(); mm/shmem.c, shmem_file_write_iter(), shmem_fallocate().
    """
    while file.locked_by:
        yield Await(WaitFor.FILE, file_id=file.id)
    file.locked_by = operation_id
    try:
        return (yield from call)
    finally:
        file.locked_by = 0


def zero(file: File, start: int, end: int) -> Operation[None]:
    """Fill [start, end), bytes inside one page, with zeroes; a page in swap is brought in, where there is room for it.

    Source: Linux mm/shmem.c, shmem_get_partial_folio().
    """
    if start < end:
        swapped = cpu_pte.is_swap(file.pages.read(page_down(start), page_up(end)))
        if swapped.any():
            yield from _swap_in(file, page_down(start), swapped)
        file.zero(start, end)


def read(file: File, start: int, length: int) -> Operation[bytes]:
    """Read bytes of a file, as pread() does: short at its end; holes read as zeroes and stay holes.

    Raises:
        InvalidRequestError: a negative offset or length, or a device file, which cannot be read (EINVAL).
        OutOfFramesError: not one page could be brought in from swap (ENOMEM).
        BadAddressError: the first page is in memory that lost its contents (EIO).

    Cost: that of copying the bytes.  Source: Linux mm/shmem.c, shmem_file_read_iter().
    """
    _require_bytes(file, "read", start, length)
    parts: list[bytes] = []
    at, end = start, start + length
    while at < min(end, file.size_bytes):
        stop = min(end, file.size_bytes, (at // PIECE_BYTES + 1) * PIECE_BYTES)
        entries = file.pages.read(page_down(at), page_up(stop))
        swapped = cpu_pte.is_swap(entries)
        if swapped[0]:
            if not (yield from _swap_in(file, page_down(at), swapped)):
                if parts:
                    break
                raise OutOfFramesError(f"read: {file} at {at:#x}: memory ran out", address=at)
            continue
        if swapped.any():
            entries = entries[: int(swapped.argmax())]
            stop = page_down(at) + entries.size * PAGE_SIZE
        if file.frames.poisoned:
            lost = file.frames.test_flags(cpu_pte.cpu_pfn(entries), PageFlag.HWPOISON)
            if lost[0]:
                if parts:
                    break
                raise BadAddressError(f"read: {file} at {at:#x}: the page is lost", errnos.EIO, address=at)
            if lost.any():
                entries = entries[: int(lost.argmax())]
                stop = page_down(at) + entries.size * PAGE_SIZE
        # A hole is entry 0, whose frame number is that of the zero page.
        pfns = cpu_pte.cpu_pfn(entries)
        parts.append(copy_from_frames(file.frames, pfns, at & _OFFSET, stop - at))
        begun = pfns[1:] if at & _OFFSET else pfns
        file.frames.mark_accessed(begun[begun != ZERO_PFN])
        at = stop
        if at < min(end, file.size_bytes):
            yield Pause()
    return b"".join(parts)


def _swap_in(file: File, start: Address, swapped: npt.NDArray[np.bool_]) -> Operation[bool]:
    # Bring in as many as there is room for of the pages from `start` on, up to the first that is not in swap.
    # Returns: False when there is no room for one.
    npages = swapped.size if swapped.all() else int(swapped.argmin())
    frames = file.frames
    if not frames.available and not (yield from some_room(frames, npages)):
        return False
    end = start + min(npages, frames.available) * PAGE_SIZE
    offsets = np.arange(start, end, PAGE_SIZE, dtype=np.uint64)
    # Others may have gone further or truncated the file, while there was no room.
    file.grab(offsets[cpu_pte.is_swap(file.pages.lookup(offsets))])
    return True


def write(file: File, start: int, data: bytes) -> Operation[int]:
    """Write bytes to a file, as pwrite() does: fills holes, and moves the end when it writes behind it.

    Returns: number of bytes written; less than given when frames ran out half way, or the file cannot be that long.

    Raises:
        InvalidRequestError: a negative offset, or a device file (EINVAL); behind FILE_SIZE_MAX (EFBIG).
        OutOfFramesError: not one page could be written (ENOMEM).
        BadAddressError: the first page is in memory that lost its contents (EIO).

    Cost: that of copying the bytes.
    Source: Linux mm/shmem.c, shmem_write_begin(), shmem_write_end(); fs/read_write.c, generic_write_checks_count().
    """
    _require_bytes(file, "write", start, len(data))
    if data and start >= FILE_SIZE_MAX:
        raise InvalidRequestError(f"write: {file} cannot grow beyond {FILE_SIZE_MAX:#x} bytes", errnos.EFBIG)
    data = data[: FILE_SIZE_MAX - start]
    done = 0
    while done < len(data):
        at = start + done
        stop = min(start + len(data), (at // PIECE_BYTES + 1) * PIECE_BYTES)
        try:
            pfns = _grab_most(file, page_down(at), page_up(stop))
        except OutOfFramesError:
            if (yield from some_room(file.frames, (page_up(stop) - page_down(at)) >> PAGE_SHIFT)):
                continue
            if done:
                return done
            raise
        if file.frames.poisoned and (lost := file.frames.test_flags(pfns, PageFlag.HWPOISON)).any():
            pfns = pfns[: int(lost.argmax())]
            if not pfns.size and done:
                return done
            if not pfns.size:
                raise BadAddressError(f"write: {file} at {at:#x}: the page is lost", errnos.EIO, address=at)
        wanted, stop = stop, min(stop, page_down(at) + pfns.size * PAGE_SIZE)
        copy_to_frames(file.frames, pfns, at & _OFFSET, memoryview(data)[done : done + stop - at])
        file.frames.set_flags(pfns, PageFlag.DIRTY)
        file.frames.mark_accessed(pfns)
        file.size_bytes = max(file.size_bytes, stop)
        done += stop - at
        if stop < wanted and not file.frames.make_room:
            return done
        if done < len(data):
            yield Pause()
    return done


def _grab_most(file: File, start: Address, end: Address) -> Pfns:
    # The frames of as many pages from `start` on as there is memory for, at least one.
    offsets = np.arange(start, end, PAGE_SIZE, dtype=np.uint64)
    try:
        return file.grab(offsets)
    except OutOfFramesError:
        absent = np.flatnonzero(~cpu_pte.is_present(file.pages.read(start, end)))
        fit = min(file.frames.available, absent.size - 1)
        if fit <= 0 and not absent[0]:
            raise
        return file.grab(offsets[: absent[fit]])


def _require_bytes(file: File, operation: str, start: int, length: int) -> None:
    if file.kind is FileKind.DEVICE:
        raise InvalidRequestError(f"{operation}: {file} has no contents of its own")
    if start < 0 or length < 0:
        raise InvalidRequestError(f"{operation}: offset {start} or length {length} is negative")
