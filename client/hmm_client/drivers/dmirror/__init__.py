"""The kernel's HMM test driver: /dev/hmm_dmirror with its ioctls, over today's interface.

    card = Card(hmm, pages=1 << 16)             one device; `hmm` is the model in this process, or a daemon
    handle = card.open(process_id)              mirrors that process from now on
    handle.write(address, data).faults          the device writes, faulting pages in where its table has none
    handle.migrate_to_device(address, npages).data

A handle keeps a table of its own: for each page the frame, and whether the device may write to it or has it for
itself.  The table is all that reads and writes look at; what it lacks is faulted in, and every event takes from it.
Where the kernel's driver enters pages while they are locked, events may overtake a reply: what one has taken meanwhile
is not entered.

`python -m hmm_client.drivers.dmirror` is the driver as a process (`__main__.py`).

A `Profile` says how true to the kernel's driver it is.  `LINUX_6_12_CORRECTED` and `LINUX_7_CORRECTED` repeat what
that does with batches, error codes and neighbouring pages, with the two corrections that keep it from following
dangling pointers; `CLEAN`, the default, is what its author would want.

**Source**: Linux lib/test_hmm.c, lib/test_hmm_uapi.h, 6.12 and 7.0; READ_UNLOCKED as posted in 2026.

**Invariants**: an access goes through the table; no entry outlives the event that takes it away.

**Absent**: mapping the device file (its pages are ordinary ones); what is needed of the model (`interface.py`), what
the ioctls give (`uapi.py`), what a profile says (`profile.py`), entries of the table (`entries.py`), what has moved
(`moving.py`).
"""

from __future__ import annotations

import errno as errnos
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from time import monotonic
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from hmm import range_fault as words_of
from hmm.commands_hmm import Migrated
from hmm.errors import (
    AccessDeniedError,
    BadAddressError,
    HmmError,
    InvalidRequestError,
    NoSuchObjectError,
    OutOfFramesError,
    RangeBusyError,
)
from hmm.events import Event, EventType, Reason
from hmm.frames import RegionKind
from hmm.page_table import PageTable
from hmm.spans import inside
from hmm.units import (
    PAGE_SHIFT,
    PAGE_SIZE,
    PMD_SHIFT,
    TASK_SIZE,
    ULONG_MAX,
    Address,
    AddressRange,
    Entries,
    Pfns,
    ProcessId,
    is_page_aligned,
)
from hmm_client.drivers.dmirror.entries import (
    TAG,
    Tag,
    addresses_at,
    entries_in,
    entry_pfns,
    leading,
    page_addresses,
    part_inside,
    table_entries,
)
from hmm_client.drivers.dmirror.interface import Hmm, Observer
from hmm_client.drivers.dmirror.moving import Moved, Moving, are_moved
from hmm_client.drivers.dmirror.profile import CLEAN, LINUX_6_12_CORRECTED, LINUX_7_CORRECTED, Profile
from hmm_client.drivers.dmirror.uapi import Flag, Reply, Snapshot

__all__ = [
    "CLEAN",
    "LINUX_6_12_CORRECTED",
    "LINUX_7_CORRECTED",
    "Card",
    "Flag",
    "Handle",
    "Hmm",
    "Observer",
    "Profile",
    "Reply",
    "Snapshot",
    "Tag",
    "load",
]


_RangeFault: TypeAlias = Callable[[AddressRange, int, float], tuple[Entries, int]]
"""Faults a range with flags until a deadline in seconds.  Returns: its words, and the sequence that they hold for."""


_LOCAL = {
    RegionKind.DEVICE_PRIVATE: Snapshot.DEV_PRIVATE_LOCAL,
    RegionKind.DEVICE_COHERENT: Snapshot.DEV_COHERENT_LOCAL,
}


_NOT_HAD = (errnos.EFAULT, errnos.ENOMEM, errnos.EOPNOTSUPP)
"""What get_user_pages_remote() fails with where a page cannot be had for writing, or is hugetlb memory."""
_PAGES_MAX = 1 << 26
"""There are no buffers for more: 256 GiB of bytes."""


class Card:
    """One device, /dev/hmm_dmirror<n>.

    Attributes:
        frames: of its memory, from the first to behind the last.
        others: the other devices of the driver, whose memory it knows: page->pgmap.
    """

    def __init__(
        self,
        hmm: Hmm,
        name: str = "dmirror",
        *,
        pages: int = 1 << 16,
        kind: RegionKind = RegionKind.DEVICE_PRIVATE,
        profile: Profile = CLEAN,
    ) -> None:
        self.hmm = hmm
        self.profile = profile
        self.pages = pages
        self.kind = kind
        self.id = hmm.register_device(name, pages, kind)
        self.frames = hmm.device_frames(self.id)
        self.others: Sequence[Card] = ()

    def open(self, process_id: ProcessId) -> Handle:
        """Open the device file: mirror a process."""
        return Handle(self, process_id)

    def evict(self) -> None:
        """Move everything that is in the device's memory to system memory: dmirror_device_remove_chunks()."""
        self.hmm.evict_device(self.id)

    def shown(self, words: Entries) -> bytes:
        """dmirror_mkentry(): a byte for each word."""
        valid = (words & np.uint64(words_of.VALID)) != 0
        shown = np.where(words & np.uint64(words_of.WRITE), Snapshot.WRITE, Snapshot.READ).astype(np.uint8)
        pfns = words_of.word_pfns(words)
        first, end = self.frames
        huge = (words >> np.uint64(words_of.ORDER_SHIFT)) & np.uint64(31) == PMD_SHIFT - PAGE_SHIFT
        shown[valid & (pfns == 0) & ~huge] |= np.uint8(Snapshot.ZERO)  # the huge zero page is another page
        shown[valid & huge] |= np.uint8(Snapshot.PMD)
        own = valid & (pfns >= first) & (pfns < end)
        shown[own] |= np.uint8(_LOCAL[self.kind])
        for other in self.others:
            if other.kind is RegionKind.DEVICE_COHERENT:
                first, end = other.frames
                shown[valid & (pfns >= first) & (pfns < end)] |= np.uint8(Snapshot.DEV_COHERENT_REMOTE)
        shown[~valid] = Snapshot.NONE
        shown[(words & np.uint64(words_of.ERROR)) != 0] = Snapshot.ERROR
        return shown.tobytes()


def load(hmm: Hmm, *, pages: int = 1 << 16, profile: Profile = CLEAN) -> list[Card]:
    """Load the driver: four devices, 0 and 1 with private memory, 2 and 3 with coherent; hmm_dmirror_init()."""
    kinds = (RegionKind.DEVICE_PRIVATE,) * 2 + (RegionKind.DEVICE_COHERENT,) * 2
    cards = [
        Card(hmm, f"dmirror{number}", pages=pages, kind=kind, profile=profile) for number, kind in enumerate(kinds)
    ]
    for card in cards:
        card.others = [other for other in cards if other is not card]
    return cards


class Handle:
    """One open file of the device: a mirror of the process that opened it, for as long as it is open."""

    def __init__(self, card: Card, process_id: ProcessId) -> None:
        self.card = card
        self._hmm = card.hmm
        self._profile = card.profile
        self._table = PageTable(TASK_SIZE - 1)
        self._lock = RLock()  # dmirror->mutex; in one process an event comes in the midst of a call of the same thread
        self._moving: list[Moving] = []  # calls that move or take pages
        self.id = card.hmm.attach(card.id, process_id, self.update)
        filtered = self._profile.ignores_own_migrations
        try:
            self._notifier = self._hmm.insert_notifier(self.id, 0, TASK_SIZE, filtered=filtered)
        except BaseException:
            self._hmm.detach(self.id)
            raise

    def close(self) -> None:
        """Close the file: all pages of the device go back to system memory, whoever put them there."""
        self._hmm.detach(self.id)
        self.card.evict()
        self._table.clear(0, TASK_SIZE)

    # ---- events

    def update(self, event: Event) -> None:
        """Handle an event: dmirror_interval_invalidate(), and the table's part of dmirror_devmem_fault()."""
        with self._lock:
            self._update(event)

    def _update(self, event: Event) -> None:
        for moving in self._moving:
            moving.hear(event, self.id, self._table)
        back = event.etype is EventType.COPY_FROM_DEVICE
        own = event.reason is Reason.MIGRATE and event.initiator == self.id
        if own and not back and self._profile.ignores_own_migrations:
            return
        beyond = PAGE_SIZE if self._profile.end_included and not back else 0
        for span in event.spans:
            self._table.clear(span.start, min(span.end + beyond, TASK_SIZE))

    # ---- ioctls

    def read(self, address: Address, npages: int) -> Reply:
        """HMM_DMIRROR_READ: the device reads pages.

        Raises:
            BadAddressError: a page cannot be had (EFAULT); nothing is read then.
            InvalidRequestError: an address inside a page, no pages, or an end beyond all addresses (EINVAL).
            OutOfFramesError: too many pages for any buffer (ENOMEM).
        """
        return self._read(_checked("read", address, npages), self._range_fault)

    def read_unlocked(self, address: Address, npages: int) -> Reply:
        """HMM_DMIRROR_READ_UNLOCKED: as `read`; it waits for pages that a userfaultfd's handler has to bring in."""
        return self._read(_checked("read", address, npages), self._range_fault_unlocked)

    def write(self, address: Address, data: bytes) -> Reply:
        """HMM_DMIRROR_WRITE: the device writes whole pages.

        Raises: as `read`; what lies below the page that cannot be had may be written.
            InvalidRequestError: as `read`; or a part of a page (EINVAL).
            AccessDeniedError: a page may not be written (EPERM).
        """
        if not is_page_aligned(len(data)):
            raise InvalidRequestError(f"write: {len(data):,} bytes are no whole pages", address=address)
        span = _checked("write", address, len(data) >> PAGE_SHIFT)
        faults, at = 0, span.start
        while (at := self._write_mapped(AddressRange(at, span.end), data[at - span.start :])) < span.end:
            self._fault(AddressRange(at, span.end), self._range_fault, write=True)
            faults += 1
        return Reply(span.npages, faults)

    def migrate_to_device(self, address: Address, npages: int) -> Reply:
        """HMM_DMIRROR_MIGRATE_TO_DEV: move pages to the device and read them there.

        Raises:
            InvalidRequestError: a part is not mapped or may not be read, or the process has exited (EINVAL); what lies
                below it was moved.
            NoSuchObjectError: the table has no entry for a page afterwards, whether it was moved or not (ENOENT).
        """
        span = _checked("migrate", address, npages)
        for part in self._readable_parts(span):
            with self._listening(part, Reason.MIGRATE) as moving:
                with _alive("migrate"):
                    moved = self._hmm.migrate_to_device(self.id, part, compound=self._profile.compound)
                self._enter(part, moved, moving)
        return self._read_back(span)

    def migrate_to_system(self, address: Address, npages: int) -> Reply:
        """HMM_DMIRROR_MIGRATE_TO_SYS: move the device's own pages back.  A huge page counts as one.

        Raises: InvalidRequestError: as `migrate_to_device`.
        """
        span = _checked("migrate", address, npages)
        count = 0
        for part in self._readable_parts(span):
            with _alive("migrate"):
                moved = self._hmm.migrate_to_system(self.id, part, compound=self._profile.compound)
            self._table.clear_many(addresses_at(part, Moved.of(moved).pages))
            count += int(np.count_nonzero(are_moved(moved)))
        return Reply(count)

    def snapshot(self, address: Address, npages: int) -> Reply:
        """HMM_DMIRROR_SNAPSHOT: what the CPU's table shows of each page, without faulting anything in.

        Raises: InvalidRequestError: as `read`, or the process has exited (EINVAL).
        """
        span = _checked("snapshot", address, npages)
        parts = []
        for batch in self._batches(span):
            with _alive("snapshot"):
                parts.append(self.card.shown(self._range_fault(batch, 0, self._deadline())[0]))
        return Reply(npages, 0, b"".join(parts))

    def exclusive(self, address: Address, npages: int) -> Reply:
        """HMM_DMIRROR_EXCLUSIVE: take pages from the CPU, and read them.

        Raises:
            InvalidRequestError: as `read`, or the process has exited (EINVAL).
            HmmError: a page cannot be taken; what lies below it was, and stays.
        """
        span = _checked("exclusive", address, npages)
        for batch in self._batches(span):
            if self._profile.exclusive_errno:
                self._take(batch)
            else:
                self._take_one_by_one(batch)
        return self._read_back(span)

    def check_exclusive(self, address: Address, npages: int) -> Reply:
        """HMM_DMIRROR_CHECK_EXCLUSIVE.

        Raises: AccessDeniedError: the device has a page of the range for itself (EPERM).
        """
        span = _checked("check", address, npages)
        if ((entries_in(self._table, span) & TAG) == Tag.ATOMIC).any():
            raise AccessDeniedError(f"{span} has pages held exclusively", errnos.EPERM)
        return Reply()

    def release(self, address: Address, npages: int) -> Reply:
        """HMM_DMIRROR_RELEASE: empty the memory of the whole device; the range is only looked at."""
        _checked("release", address, npages)
        self.card.evict()
        return Reply()

    def flags(self, address: Address, npages: int) -> Reply:
        """HMM_DMIRROR_FLAGS: what goes wrong from now on; FAIL_ALLOC is over when one allocation has failed.

        Args:
            npages: the flags, which the ioctl takes there, so that none cannot be said.

        Raises: InvalidRequestError: an address inside a page, or no flags (EINVAL).
        """
        _checked("flags", address, npages)
        self._hmm.fail_migration(self.id, 1 if npages & Flag.FAIL_ALLOC else 0)
        return Reply()

    # ---- what no ioctl does: the device accesses any bytes, as one access

    def load(self, address: Address, length: int) -> bytes:
        """The device reads bytes.

        Raises:
            BadAddressError: a page cannot be had (EFAULT); nothing is read then.
            InvalidRequestError: no bytes, or none of the address space (EINVAL).
        """
        with self._reachable(address, length, write=False) as (pages, pfns):
            return self._hmm.read_frames(self.id, pages, pfns, offset=address % PAGE_SIZE, length=length)

    def store(self, address: Address, data: bytes) -> None:
        """The device writes bytes.

        Raises: as `load`, where nothing is written; also
            AccessDeniedError: a page may not be written (EPERM).
        """
        with self._reachable(address, len(data), write=True) as (pages, pfns):
            self._hmm.write_frames(self.id, pages, pfns, data, offset=address % PAGE_SIZE)

    @contextmanager
    def _reachable(self, address: Address, length: int, *, write: bool) -> Iterator[tuple[Entries, Pfns]]:
        # All pages at a time, and nothing is taken before the block ends.
        if length <= 0 or not 0 <= address <= TASK_SIZE - length:
            raise InvalidRequestError(f"device access: {length} bytes at {address:#x}", address=address)
        span = AddressRange(address, address + length).page_aligned()
        while True:
            with self._lock:
                entries = self._table.read(span.start, span.end)
                usable = (entries & TAG) == Tag.WRITE if write else entries != 0
                if usable.all():
                    yield page_addresses(span, span.npages), entry_pfns(entries)
                    return
            self._fault(span, self._range_fault, write=write)

    # ---- the table

    def _store(self, span: AddressRange, pfns: Pfns, tags: npt.NDArray[np.uint64]) -> None:
        self._table.fill(span.start, span.end, table_entries(pfns, tags))

    def _read(self, span: AddressRange, fault: _RangeFault) -> Reply:
        parts: list[bytes] = []
        faults, at = 0, span.start
        while (at := self._read_mapped(AddressRange(at, span.end), parts)) < span.end:
            self._fault(AddressRange(at, span.end), fault, write=False)
            faults += 1
        return Reply(span.npages, faults, b"".join(parts))

    def _read_mapped(self, span: AddressRange, parts: list[bytes]) -> Address:
        """dmirror_do_read(): up to the first page without an entry.  Returns: its address."""
        with self._lock:
            entries = entries_in(self._table, span)
            count = leading(entries != 0)
            if count:
                parts.append(self._hmm.read_frames(self.id, page_addresses(span, count), entry_pfns(entries[:count])))
        return span.start + (count << PAGE_SHIFT)

    def _write_mapped(self, span: AddressRange, data: bytes) -> Address:
        """dmirror_do_write(): up to the first page without an entry for writing.  Returns: its address."""
        with self._lock:
            entries = entries_in(self._table, span)
            count = leading((entries & TAG) == Tag.WRITE)
            if count:
                self._hmm.write_frames(
                    self.id, page_addresses(span, count), entry_pfns(entries[:count]), data[: count << PAGE_SHIFT]
                )
        return span.start + (count << PAGE_SHIFT)

    def _read_back(self, span: AddressRange) -> Reply:
        parts: list[bytes] = []
        at = self._read_mapped(span, parts)
        if at < span.end:
            raise NoSuchObjectError(f"the device has no page at {at:#x}", errnos.ENOENT, address=at)
        return Reply(span.npages, 0, b"".join(parts))

    @contextmanager
    def _listening(self, span: AddressRange, reason: Reason) -> Iterator[Moving]:
        # Around a call whose reply is entered.
        moving = Moving(span, reason)
        with self._lock:
            self._moving.append(moving)
        try:
            yield moving
        finally:
            with self._lock:
                self._moving.remove(moving)

    def _enter(self, part: AddressRange, moved: Migrated, moving: Moving) -> None:
        if moving.before is None:
            return  # the device has them all
        entered = Moved.of(moved)
        written = entered.writable if self._profile.tags_holes else entered.writable & entered.framed
        entries = np.zeros(part.npages, np.uint64) if self._profile.ignores_own_migrations else moving.before
        entries[entered.pages] = table_entries(
            entered.pfns, np.where(written, np.uint64(Tag.WRITE), np.uint64(Tag.NONE))
        )
        pages = np.flatnonzero(entries)
        self._store_kept(addresses_at(part, pages), entries[pages], moving)

    def _store_kept(self, addresses: Entries, entries: Entries, moving: Moving) -> None:
        with self._lock:
            for spans in moving.taken:
                kept = ~inside(addresses, spans)
                addresses, entries = addresses[kept], entries[kept]
            self._table.store(addresses, entries)

    # ---- faulting

    def _fault(self, span: AddressRange, fault: _RangeFault, *, write: bool) -> None:
        """dmirror_fault(): fault a range in, batch by batch.

        The kernel's driver never comes to an end when the process has exited; here that is EFAULT.
        """
        flags = words_of.REQ_FAULT | (words_of.REQ_WRITE if write else 0)
        for batch in self._batches(span):
            deadline = self._deadline()
            try:
                while not self._fault_batch(batch, fault, flags, deadline, write=write):
                    pass
            except NoSuchObjectError as error:
                raise BadAddressError(error.message, address=batch.start) from error

    def _fault_batch(
        self, batch: AddressRange, fault: _RangeFault, flags: int, deadline: float, *, write: bool
    ) -> bool:
        """Returns: False when the range changed before its pages could be entered."""
        words, sequence = fault(batch, flags, deadline)
        with self._lock:
            if self._hmm.read_retry(self.id, self._notifier, sequence):
                return False
            count = self._map(batch, words, write=write)
        if count < batch.npages:
            self._own_page_is_read_only(AddressRange(batch.start + (count << PAGE_SHIFT), batch.end))
        return True

    def _deadline(self) -> float:
        return monotonic() + self._profile.range_timeout_s

    def _range_fault(self, span: AddressRange, flags: int, deadline: float) -> tuple[Entries, int]:
        """dmirror_range_fault(), dmirror_range_snapshot(): repeated while changes overtake it, until the deadline."""
        inside_space = part_inside(span)
        while True:
            _require_before(deadline, span)
            sequence, words = self._hmm.read_begin(self.id, self._notifier), np.empty(0, np.uint64)
            try:
                if inside_space:
                    words = self._hmm.range_fault(self.id, self._notifier, sequence, inside_space, flags)
                return _with_outside(words, span, flags), sequence
            except RangeBusyError:
                continue

    def _range_fault_unlocked(self, span: AddressRange, flags: int, deadline: float) -> tuple[Entries, int]:
        inside_space = part_inside(span)
        if not inside_space:
            return self._range_fault(span, flags, deadline)
        while True:
            _require_before(deadline, span)
            try:
                words, sequence = self._hmm.range_fault_unlocked(self.id, self._notifier, inside_space, flags)
                return _with_outside(words, span, flags), sequence
            except RangeBusyError:
                continue

    def _map(self, span: AddressRange, words: Entries, *, write: bool) -> int:
        """dmirror_do_fault(): enter what was faulted.  Returns: how many pages, up to the first that is read-only."""
        writable = (words & np.uint64(words_of.WRITE)) != 0
        count = leading(writable) if write else writable.size
        tags = np.where(writable, np.uint64(Tag.WRITE), np.uint64(Tag.NONE))[:count]
        if count:
            part = AddressRange(span.start, span.start + (count << PAGE_SHIFT))
            self._store(part, words_of.word_pfns(words[:count]), tags)
        return count

    def _own_page_is_read_only(self, span: AddressRange) -> None:
        if not self._profile.faults_own_pages_back:
            raise BadAddressError(f"the device's own page at {span.start:#x} is read-only", address=span.start)
        self.migrate_to_system(span.start, 1)
        self._fault(span, self._range_fault, write=True)

    # ---- pieces

    def _batches(self, span: AddressRange) -> Iterator[AddressRange]:
        step = self._profile.batch_pages << PAGE_SHIFT
        for at in range(span.start, span.end, step):
            yield AddressRange(at, min(at + step, span.end))

    def _readable_parts(self, span: AddressRange) -> Iterator[AddressRange]:
        """What one migration each can move: within a VMA, at most a batch, looked up when it is its turn."""
        at = span.start
        while at < span.end:
            with _alive("migrate"):
                vma = self._hmm.find_vma(self.id, at) if at < TASK_SIZE else None
            if vma is None or not vma.readable:
                raise InvalidRequestError(f"migrate: nothing readable is mapped at {at:#x}", address=at)
            part = AddressRange(at, min(span.end, at + (self._profile.migrate_pages << PAGE_SHIFT), vma.end))
            yield part
            at = part.end

    def _take(self, batch: AddressRange) -> None:
        """Take one batch from the CPU: make_device_exclusive_range() and dmirror_atomic_map()."""
        with self._listening(batch, Reason.EXCLUSIVE) as moving:
            try:
                with _alive("exclusive"):
                    pfns = self._make_exclusive(batch)
            except HmmError as error:
                if error.errno not in _NOT_HAD:
                    raise
                raise self._not_taken(batch.start, self._profile.exclusive_errno) from error
            if pfns.size == batch.npages and self._enter_taken(batch, pfns, moving):
                return
        missing = int((pfns == 0).argmax()) if not pfns.all() else pfns.size
        raise self._not_taken(batch.start + (missing << PAGE_SHIFT), self._profile.exclusive_errno)

    def _take_one_by_one(self, batch: AddressRange) -> None:
        """make_device_exclusive() for each page, up to the first that it refuses."""
        at = batch.start
        while at < batch.end:
            part = AddressRange(at, batch.end)
            with self._listening(part, Reason.EXCLUSIVE) as moving:
                with _alive("exclusive"):
                    pfns = self._make_exclusive(part)
                complete = self._enter_taken(part, pfns, moving)
            if not complete:
                raise self._not_taken(at + (int((pfns == 0).argmax()) << PAGE_SHIFT), errnos.EOPNOTSUPP)
            at += pfns.size << PAGE_SHIFT

    def _make_exclusive(self, span: AddressRange) -> Pfns:
        if span.start >= TASK_SIZE:
            raise BadAddressError(f"exclusive access: nothing is mapped at {span.start:#x}", address=span.start)
        return self._hmm.make_exclusive(self.id, part_inside(span))

    def _enter_taken(self, span: AddressRange, pfns: Pfns, moving: Moving) -> bool:
        """Enter pages that were taken, from the start of a range.  Returns: whether they were all."""
        taken = np.flatnonzero(pfns)
        tags = np.full(taken.size, Tag.ATOMIC, np.uint64)
        self._store_kept(addresses_at(span, taken), table_entries(pfns[taken], tags), moving)
        return taken.size == pfns.size

    @staticmethod
    def _not_taken(address: Address, number: int) -> HmmError:
        message = f"exclusive access: {address:#x} cannot be taken from the CPU"
        kind = RangeBusyError if number == errnos.EBUSY else InvalidRequestError
        return kind(message, number, address=address)


def _checked(operation: str, address: Address, npages: int) -> AddressRange:
    """dmirror_fops_unlocked_ioctl(): the range may lie outside the address space, where nothing is mapped."""
    if not is_page_aligned(address) or npages <= 0 or not 0 <= address <= ULONG_MAX - (npages << PAGE_SHIFT):
        raise InvalidRequestError(f"{operation}: {npages:,} pages at {address:#x} are no range of pages")
    if npages > _PAGES_MAX:
        raise OutOfFramesError(f"{operation}: {npages:,} pages are too many for any buffer")
    return AddressRange(address, address + (npages << PAGE_SHIFT))


def _require_before(deadline: float, span: AddressRange) -> None:
    if monotonic() > deadline:
        raise RangeBusyError(f"range fault: {span} was changed again and again", address=span.start)


def _with_outside(words: Entries, span: AddressRange, flags: int) -> Entries:
    """What hmm_range_fault() says of a range, some of which may be outside the address space: hmm_vma_walk_hole().

    Args:
        words: uint64[n], of the part inside.

    Raises: BadAddressError: pages outside are asked for (EFAULT).
    """
    outside = span.npages - words.size
    if not outside:
        return words
    if flags & words_of.REQ_FAULT:
        address = span.start + (words.size << PAGE_SHIFT)
        raise BadAddressError(f"range fault: {address:#x} is outside the address space", address=address)
    return np.concatenate((words, np.full(outside, words_of.ERROR, np.uint64)))


@contextmanager
def _alive(operation: str) -> Iterator[None]:
    # A process that has exited has no memory to look at: mmget_not_zero() fails.
    try:
        yield
    except NoSuchObjectError as error:
        raise InvalidRequestError(f"{operation}: {error.message}") from error
