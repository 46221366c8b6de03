"""A mirror: one device's view of one address space, with the page table that the daemon keeps for it (2015).

The driver hears of a change first and answers; then the event's mask is applied to the entries of the range: dirty
is propagated, DMA mappings whose VALID bit goes are unmapped, directories without entries are freed.

**Source**: linux-mm, "HMM: introduce heterogeneous memory management v4" (life cycle), "HMM: add per mirror page table
v4" (hmm_mirror_update_pt), "HMM: add dirty flag helper v3", "HMM: DMA map memory on behalf of device driver v2".

**Invariants**: an entry names the frame that the CPU's entry at this address names, and permits writing only if that
one does, or its page is in the device's memory and its VMA permits it; a mirror that is not LIVE has an empty table.
The entry of a page in the device's memory goes only with the page.

**Absent**: numbering and answers (receiver.py), filling the table (device_fault.py), pages in the device's memory
(mirror_memory.py), transport.

Differs: an error on an event of a range kills the mirror as in the posted code, but its table is emptied with
dirty propagated; the posted code dropped the recorded dirty bits of device entries.  Discarding a range leaves the
entries of pages in the device's memory, which in the posted code were lost with them.  References are numbers: a mirror
is found by its own until its driver has unregistered it, or its lease has ended, and every call looks it up anew; where
hmm_mirror_ref() fails there is no such mirror (ENODEV), and nothing is left for ops->free() to do.
"""

from __future__ import annotations

import errno as errnos
from dataclasses import dataclass, field

import numpy as np

from hmm import cpu_pte, pte
from hmm.ascending import unique
from hmm.checked import Checked
from hmm.errors import NoSuchObjectError, errno_name
from hmm.events import IS_INVALIDATION, Delivery, Event, EventState, EventType
from hmm.frames import ZERO_PFN, PageFlag
from hmm.iommu import Domain
from hmm.notifier import FILLED_SHIFT, filled_blocks
from hmm.page_table import PageTable
from hmm.receiver import DeadlinePolicy, MirrorState, Receiver
from hmm.spans import Spans, inside
from hmm.units import PAGE_SHIFT, TASK_SIZE, AddressRange, Entries, Pfn, Pfns, page_numbers
from hmm.violation import ViolationKind

__all__ = ["DeadlinePolicy", "Mirror", "MirrorState"]

_NOTHING = np.empty(0, np.uint64)
_NOTED = pte.DIRTY | pte.VALID_DMA
"""What others have to know of an entry that changes."""
_FEW = 16
"""Up to so many ranges of an event are applied one by one."""


@dataclass(slots=True, eq=False)
class Mirror(Receiver):
    """`struct hmm_mirror`: registered by a driver, bound to the address space of one process.

    Attributes:
        update_on_fault: the mirror's own faults are delivered to it as events too.
        directories: limit of its table.
        owed: uint64[n], ascending: pages that the device wrote without setting DIRTY, and that its driver has not
            reported yet.
    """

    update_on_fault: bool = True
    directories: int = 1 << 18
    table: PageTable = field(init=False)
    domain: Domain | None = field(init=False)
    owed: Entries = field(default_factory=lambda: np.empty(0, np.uint64))
    _first_pfn: Pfn = field(init=False)

    def __post_init__(self) -> None:
        self.table = PageTable(TASK_SIZE - 1, max_directories=self.directories)
        self.domain = Domain(self.device.iommu) if self.device.iommu else None
        self._first_pfn = self.space.frames.region(self.device.region).start if self.device.region else 0

    # ---- the life cycle

    def require_filling(self, operation: str) -> None:
        """Raise unless entries may be added.

        Raises: as `require_live`; also NoSuchObjectError: it is about to be released (ENODEV).
        """
        if self.state is not MirrorState.LIVE:
            self.require_live(operation)
        if self.leaving:
            raise NoSuchObjectError(f"{operation}: {self} is being released", errnos.ENODEV)

    def release(self, state: MirrorState, why: str = "") -> None:
        """Stop mirroring: no further events, no entries.  Recorded dirty is propagated first."""
        if self.state is not MirrorState.LIVE:
            return
        if self.home is not None:
            self.home.leave()
        self.apply(self.span, pte.MASK_NONE)
        self.owed = self.owed[:0]
        Receiver.release(self, state, why)

    # ---- events: what the notifier needs of a subscriber

    def hears(self, event: Event) -> bool:
        """A 2015 mirror hears every change of its space that has a 2015 type, but not its own migrations."""
        return event.etype is not EventType.NONE and event.initiator != self.id

    def holds(self, spans: Spans) -> bool:
        """Whether it has entries in these ranges, or between them where they are many, or owes reports."""
        if self.owed.size:
            return True
        if len(spans) > _FEW:
            return self.table.holds(spans[0].start, spans[-1].end)
        return any(self.table.holds(span.start, span.end) for span in spans)

    def settle(self, delivery: Delivery) -> bool:
        """Apply a final state; False when it is an error, which is the end of the mirror.

        Source: hmm_mirror_update(): the mask is applied whatever the driver answered.
        """
        assert self.state is MirrorState.LIVE, f"{self} hears nothing any more"
        if delivery.state is EventState.REFUSED:
            return True
        event = delivery.event
        if self.owed.size or not self.table.is_empty:
            for span in delivery.dirty:
                self.mark_dirty(span)
            if self.owed.size and IS_INVALIDATION[event.etype]:
                self._require_reported(event.spans, delivery.sequence)
            self._apply_all(event.spans, event.etype.pte_mask, on_device=_reaches_device(event))
        if delivery.errno and IS_INVALIDATION[event.etype]:
            self.leaving = self.space.notifier.current.operation_id
            answer = f"its driver answered {event.etype.name} #{delivery.sequence} with {errno_name(delivery.errno)}"
            self.lost_because = self.lost_because or answer
            return False
        return True

    def heard_late(self, event: Event, dirty: tuple[AddressRange, ...]) -> None:  # noqa: ARG002 - the same for all
        """The entries are still there, so that what the device wrote through them is recorded."""
        for span in dirty:
            self.mark_dirty(span)

    # ---- entries

    def apply(self, span: AddressRange, mask: int, *, on_device: bool = True) -> None:
        """Apply an event's mask: `entry &= mask`, after propagating dirty and before unmapping what it clears.

        Args:
            on_device: False leaves the entries of pages in the device's memory as they are.

        Cost: O(entries + directories), vectorised, in pieces.  Source: hmm_mirror_update_pt(), hmm_pte_update().
        """
        if mask == pte.MASK_ALL:
            return
        kept = _NOTHING if on_device or self.home is None else self.on_device(span)
        entries_kept = self.table.lookup(kept) if kept.size else kept
        for part in self.table.parts(span.start, span.end):
            if self.table.either(part.start, part.end) & _NOTED:
                entries = self.table.read(part.start, part.end)
                self._propagate_dirty(entries)
                if mask == pte.MASK_NONE:
                    self.unmap(entries)
            self.table.apply_mask(part.start, part.end, mask & ~pte.DIRTY)
        if kept.size:
            self.table.store(kept, entries_kept)

    def on_device(self, span: AddressRange) -> Entries:
        """uint64[n]: the addresses of a range whose pages are in the device's memory, ascending."""
        addresses, entries = self.table.valid(span.start, span.end)
        found: Entries = addresses[pte.pte_test_valid_dev(entries)]
        return found

    def _apply_all(self, spans: Spans, mask: int, *, on_device: bool) -> None:
        # Of many ranges those are looked for that hold entries, and not the other way round.
        if len(spans) <= _FEW:
            for span in spans:
                self.apply(span, mask, on_device=on_device)
        elif mask != pte.MASK_ALL:
            for found, held in self.table.chunks(spans[0].start, spans[-1].end):
                ours = inside(found, spans)
                if not on_device:
                    ours &= ~pte.pte_test_valid_dev(held)
                addresses, entries = found[ours], held[ours]
                self._propagate_dirty(entries)
                if mask == pte.MASK_NONE:
                    self.table.clear_many(addresses)
                    self.unmap(entries)
                else:
                    self.table.store(addresses, entries & np.uint64(mask & ~pte.DIRTY))

    def mark_dirty(self, span: AddressRange) -> None:
        """Set DIRTY on the entries of a range that are valid and writable.

        Source: hmm_mirror_range_dirty().  Differs: the posted code asked for VALID_DMA and VALID_PFN at once,
        which no entry has, so that it never marked anything.
        """
        self.table.update(span.start, span.end, _set_dirty)
        if self.owed.size:
            reported = slice(*np.searchsorted(self.owed, np.array([span.start, span.end], np.uint64)))
            self.owed = np.delete(self.owed, reported)

    def discard(self, span: AddressRange) -> None:
        """Drop the entries of a range without telling the driver, who has stopped the device there already.

        Source: hmm_mirror_range_discard().
        """
        self.history.discarded(self.sequence, span, self.space.notifier.current.operation_id)
        if self.owed.size:
            self._require_reported((span,), self.sequence)
        self.apply(span, pte.MASK_NONE, on_device=False)

    def entries_on_device(self, pfns: Pfns) -> Entries:
        """uint64[n]: entries of frames of the device's memory."""
        return pte.pte_from_dev_addr(((pfns - self._first_pfn) << PAGE_SHIFT).view(np.uint64))

    def owe(self, addresses: Entries) -> None:
        """The device wrote these pages, uint64[n], and set no DIRTY: its driver has to report them."""
        self.owed = unique(np.concatenate((self.owed, addresses)))

    def _require_reported(self, spans: tuple[AddressRange, ...], sequence: int) -> None:
        # What is given up now without a report is lost: the page will be taken for clean.
        given_up = inside(self.owed, spans)
        if given_up.any():
            address = int(self.owed[given_up][0])
            taking = self.taken_by(address, pte.WRITE)
            if taking is None or taking.sequence != sequence:
                taking = None
            kind, pages = ViolationKind.DIRTY_NOT_REPORTED, int(given_up.sum())
            self.owed = self.owed[~given_up]
            self.report(kind, address, pages, write=True, taking=taking)

    def pfns(self, entries: Entries) -> Pfns:
        """int64[n]: the frame that each entry reaches, through the IOMMU if need be; 0 for the zero page or none."""
        pfns = pte.pte_pfn(entries)
        if self.home is not None:
            own = pte.pte_test_valid_dev(entries)
            pfns[own] = page_numbers(pte.pte_dev_addr(entries[own])) + self._first_pfn
        if self.domain:
            dma = pte.pte_test_valid_dma(entries)
            if dma.any():
                pfns[dma] = self.domain.pfns(pte.pte_dma_addr(entries[dma]))
        return pfns

    def _propagate_dirty(self, entries: Entries) -> None:
        found = entries.item() if entries.size == 1 else int(np.bitwise_or.reduce(entries))
        if found & pte.DIRTY:
            pfns = self.pfns(entries[pte.pte_test_dirty(entries)])
            self.space.frames.set_flags(pfns[pfns != ZERO_PFN], PageFlag.DIRTY)

    def unmap(self, entries: Entries) -> None:
        """Unmap for DMA what entries that leave the table name."""
        if self.domain:
            mapped = entries[pte.pte_test_valid_dma(entries)]
            if mapped.size:
                self.domain.unmap(pte.pte_dma_addr(mapped))

    def check(self, checked: Checked) -> None:
        """Assert the invariants of this mirror against the CPU's table."""
        Receiver.check(self, checked)
        own = [checked.number(table) for table in (self.table, *(self.domain.tables if self.domain else ()))]
        if checked.is_new(self.table, *own):
            self.table.check()
            if self.domain:
                self.domain.check()
        space = (checked.number(self.space.table), checked.number(self.space.vmas))
        if checked.is_new(self, self.state, *space, *own):
            self._check_entries(*checked.look(self.table, self.table.in_use))

    def _check_entries(self, addresses: Entries, entries: Entries) -> None:
        filled = self.space.notifier.filled.get(self.id, 0)
        blocks = unique(addresses >> np.uint64(FILLED_SHIFT)).tolist()
        assert all(filled_blocks(block << FILLED_SHIFT, block + 1 << FILLED_SHIFT) & filled for block in blocks), (
            f"{self} has entries that nobody clears"
        )
        if self.state is not MirrorState.LIVE:
            assert not addresses.size, f"{self} is {self.state.value} and still has entries"
        valid = (entries & np.uint64(pte.VALID)) != 0
        assert valid.all() or self.space.notifier.copies, (
            f"{self} has entries without a value, and nothing is on its way"
        )
        addresses, entries = addresses[valid], entries[valid]
        cpu = self.space.table.lookup(addresses)
        own = pte.pte_test_valid_dev(entries)
        moving = cpu_pte.is_migration(cpu) & (bool(self.space.notifier.copies) or own)
        there = moving | np.where(own, cpu_pte.is_device_private(cpu), cpu_pte.is_present(cpu))
        assert there.all(), f"{self} reaches pages that the CPU table no longer has"
        assert np.array_equal(cpu_pte.cpu_pfn(cpu), self.pfns(entries)), f"{self} reaches other frames than the CPU"
        writes = pte.pte_test_write(entries)
        assert cpu_pte.is_writable(cpu[writes & ~own]).all(), f"{self} may write where the CPU may not"
        self._check_writable(addresses[writes & own])
        dirty = pte.pte_test_dirty(entries)
        assert writes[dirty].all(), f"{self} has dirty entries that do not permit writing"
        if self.domain:
            mapped = pte.pte_test_valid_dma(entries)
            assert int(mapped.sum()) == self.domain.frames.count, f"{self} leaks DMA mappings"

    def _check_writable(self, addresses: Entries) -> None:
        changing = [span for running in self.space.notifier.invalidations for span in running.spans]
        for address in addresses.tolist():
            vma = self.space.vmas.find(address)
            permitted = (vma is not None and vma.writable) or any(address in span for span in changing)
            assert permitted, f"{self} may write {address:#x} in its device's memory and the mapping does not permit it"


def _reaches_device(event: Event) -> bool:
    # Fork leaves the device what it has; what does not discard pages has brought them back already.
    if event.etype.pte_mask == pte.MASK_NONE:
        return event.cause is not None and event.cause.discards
    return event.etype is not EventType.FORK


def _set_dirty(entries: Entries) -> None:
    writable = (entries & np.uint64(pte.WRITE)) != 0
    valid = (entries & np.uint64(pte.VALID)) != 0
    entries[writable & valid] |= np.uint64(pte.DIRTY)
