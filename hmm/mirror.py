"""A mirror: one device's view of one address space, with the page table that the daemon keeps for it (2015).

The driver hears of a change first and answers; then the event's mask is applied to the entries of the range: dirty
is propagated, DMA mappings whose VALID bit goes are unmapped, directories without entries are freed.

Source: linux-mm, "HMM: introduce heterogeneous memory management v4" (life cycle), "HMM: add per mirror page table
v4" (hmm_mirror_update_pt), "HMM: add dirty flag helper v3", "HMM: DMA map memory on behalf of device driver v2".
Invariants: an entry names the frame that the CPU's entry at this address names, and permits writing only if that
one does; a mirror that is not LIVE has an empty table; event sequences are dense and each has one final state.
Absent: filling the table (device_fault.py), transport.

Differs: an error on an event of a range kills the mirror as in the posted code, but its table is emptied with
dirty propagated; the posted code dropped the recorded dirty bits of device entries.
"""

from __future__ import annotations

import errno as errnos
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from hmm import cpu_pte, pte
from hmm.address_space import AddressSpace
from hmm.device import Device
from hmm.errors import DeviceLostError, InvalidRequestError, NoSuchObjectError
from hmm.events import Event, EventState, EventType, Outcome, Reason
from hmm.frames import PageFlag
from hmm.iommu import Domain
from hmm.page_table import PageTable
from hmm.units import TASK_SIZE, AddressRange, Entries, MirrorId, Pfns, ProcessId


class DeadlinePolicy(Enum):
    """What happens when a driver does not answer in time."""

    FENCE = "fence"
    BLOCK = "block"
    FAIL = "fail"


class MirrorState(Enum):
    """LIVE until released (by exit, unregistering or its own error) or lost (fenced)."""

    LIVE = "live"
    RELEASED = "released"
    LOST = "lost"


@dataclass(slots=True, eq=False)
class SentEvent:
    """An event on its way: sent to one mirror for one operation, until its final state."""

    event: Event
    operation_id: int
    state: EventState = EventState.SENT
    errno: int = 0
    dirty: tuple[AddressRange, ...] = ()


@dataclass(slots=True, eq=False)
class Mirror:
    """`struct hmm_mirror`: registered by a driver, bound to the address space of one process.

    Attributes:
        unanswered: the events that the driver has still to answer, abandoned ones included.
        unsettled: the invalidations that were sent and whose mask is not applied yet; other mirrors may still have
            to answer.
    """

    id: MirrorId
    device: Device
    space: AddressSpace
    process_id: ProcessId
    owner: str
    policy: DeadlinePolicy = DeadlinePolicy.FENCE
    update_on_fault: bool = True
    directories: int = 1 << 18
    state: MirrorState = MirrorState.LIVE
    lost_because: str = ""
    sequence: int = 0
    low_water: int = 0
    unanswered: dict[int, SentEvent] = field(default_factory=dict)
    unsettled: dict[int, SentEvent] = field(default_factory=dict)
    counters: Counter[str] = field(default_factory=Counter)
    table: PageTable = field(init=False)
    domain: Domain | None = field(init=False)

    def __post_init__(self) -> None:
        self.table = PageTable(TASK_SIZE - 1, max_directories=self.directories)
        self.domain = Domain(self.device.iommu) if self.device.iommu else None

    def __str__(self) -> str:
        return f"mirror {self.id} ({self.device.name})"

    # ---- the life cycle

    def require_live(self, operation: str) -> None:
        """Raise unless the mirror still mirrors.

        Raises:
            DeviceLostError: it was fenced (ENODEV).
            NoSuchObjectError: it was released: its process exited, or its own error killed it (ENODEV).
        """
        if self.state is MirrorState.LOST:
            raise DeviceLostError(f"{operation}: {self} was fenced: {self.lost_because}")
        if self.state is MirrorState.RELEASED:
            raise NoSuchObjectError(f"{operation}: {self} was released", errnos.ENODEV)

    def release(self, state: MirrorState, why: str = "") -> None:
        """Stop mirroring: no further events, no entries.  Recorded dirty is propagated first."""
        if self.state is not MirrorState.LIVE:
            return
        self.space.notifier.subscribers.pop(self.id, None)
        self.apply(self.span, pte.MASK_NONE)
        self.unsettled.clear()
        self.state = state
        self.lost_because = why

    @property
    def span(self) -> AddressRange:
        """All addresses of the mirror."""
        return AddressRange(0, TASK_SIZE)

    # ---- events: what the notifier needs of a subscriber

    def hears(self, event: Event) -> bool:
        """A 2015 mirror hears every change of its space that has a 2015 type, but not those of its own device."""
        return event.etype is not EventType.NONE and not (
            event.owner == self.device.id and event.reason in (Reason.MIGRATE, Reason.EXCLUSIVE)
        )

    def awaits_late_answer(self) -> bool:
        """True while an abandoned event is unanswered: nothing new is sent before that."""
        return any(sent.state is EventState.ABANDONED for sent in self.unanswered.values())

    def settle(self, event: Event, outcome: Outcome) -> bool:
        """Apply a final state: the mask on success; False when the driver's error killed the mirror."""
        self.unsettled.pop(outcome.sequence, None)
        if self.state is not MirrorState.LIVE or outcome.state is EventState.FENCED:
            return True
        for span in outcome.dirty:
            self.mark_dirty(span)
        if outcome.errno and event.etype.is_invalidation:
            self.release(MirrorState.RELEASED)
            return False
        for span in event.spans:
            self.apply(span, event.etype.pte_mask)
        return True

    # ---- events: numbering and answers

    def send(self, event: Event, operation_id: int) -> int:
        """Number an event for this mirror.  Returns: its sequence, dense from 1."""
        self.sequence += 1
        sent = self.unanswered[self.sequence] = SentEvent(event, operation_id)
        if event.etype.is_invalidation:
            self.unsettled[self.sequence] = sent
        self.counters[f"events_{event.etype.name.lower()}"] += 1
        return self.sequence

    def answer(self, sequence: int, errno: int, dirty: tuple[AddressRange, ...]) -> SentEvent | None:
        """Record a driver's answer.  Returns: the event that it finishes, None when it changes nothing.

        Raises:
            InvalidRequestError: the event was never sent to this mirror (EINVAL).
        """
        if not 0 < sequence <= self.sequence:
            raise InvalidRequestError(
                f"acknowledge: event {sequence} was never sent to {self}; the last one is {self.sequence}"
            )
        sent = self.unanswered.get(sequence)
        if sent is None:
            self.counters["repeated_answers"] += 1
            return None
        if sent.state is EventState.ABANDONED:
            self.counters["late_answers"] += 1
            self._forget(sequence)
            return None
        sent.state, sent.errno, sent.dirty = self._verdict(sent.event, errno), self._accepted(errno), dirty
        self.counters[sent.state.value] += 1
        self._forget(sequence)
        return sent

    def finish(self, sequence: int, state: EventState) -> SentEvent | None:
        """Give an unanswered event a final state other than a driver's answer (fenced, abandoned)."""
        sent = self.unanswered.get(sequence)
        if sent is None or sent.state is not EventState.SENT:
            return None
        sent.state = state
        self.counters[state.value] += 1
        self.unsettled.pop(sequence, None)
        if state is not EventState.ABANDONED:
            self._forget(sequence)
        return sent

    def _forget(self, sequence: int) -> None:
        del self.unanswered[sequence]
        self.low_water = min(self.unanswered, default=self.sequence + 1) - 1

    def _verdict(self, event: Event, errno: int) -> EventState:
        # Only the OOM reaper's events may be refused; elsewhere an error is an answer, and kills the mirror.
        refusing = errno == errnos.EAGAIN and not event.blockable
        return EventState.REFUSED if refusing else EventState.ACKNOWLEDGED

    def _accepted(self, errno: int) -> int:
        # hmm_mirror_update(): 0, ENOMEM and EIO are documented; others are warned of and become EIO.
        if errno in (0, errnos.ENOMEM, errnos.EIO):
            return errno
        self.counters["undocumented_errors"] += 1
        return errnos.EIO

    # ---- entries

    def apply(self, span: AddressRange, mask: int) -> None:
        """Apply an event's mask: `entry &= mask`, after propagating dirty and before unmapping what it clears.

        Cost: O(entries + directories), vectorised, in pieces.  Source: hmm_mirror_update_pt(), hmm_pte_update().
        """
        if mask == pte.MASK_ALL or not self.table.directories:
            return
        for addresses, entries in self.table.chunks(span.start, span.end):
            self._propagate_dirty(addresses, entries)
            if mask == pte.MASK_NONE and self.domain:
                self._unmap(self.domain, entries)
        if mask == pte.MASK_NONE:
            self.table.clear(span.start, span.end)
        else:
            self.table.apply_mask(span.start, span.end, mask & ~pte.DIRTY)

    def mark_dirty(self, span: AddressRange) -> None:
        """Set DIRTY on the entries of a range that are valid and writable.

        Source: hmm_mirror_range_dirty().  Differs: the posted code asked for VALID_DMA and VALID_PFN at once,
        which no entry has, so that it never marked anything.
        """
        self.table.update(span.start, span.end, _set_dirty)

    def discard(self, span: AddressRange) -> None:
        """Drop the entries of a range without telling the driver, who has stopped the device there already.

        Source: hmm_mirror_range_discard().
        """
        self.apply(span, pte.MASK_NONE)

    def pfns(self, entries: Entries) -> Pfns:
        """int64[n]: the frame that each entry reaches, through the IOMMU if need be; 0 for the zero page or none."""
        pfns = pte.pte_pfn(entries)
        if self.domain:
            dma = pte.pte_test_valid_dma(entries)
            if dma.any():
                pfns[dma] = self.domain.pfns(pte.pte_dma_addr(entries[dma]))
        return pfns

    def _propagate_dirty(self, addresses: Entries, entries: Entries) -> None:
        dirty = addresses[(entries & np.uint64(pte.DIRTY)) != 0]
        if not dirty.size:
            return
        cpu = self.space.table.lookup(dirty)
        pfns = cpu_pte.cpu_pfn(cpu[cpu_pte.is_present(cpu) & ~cpu_pte.is_special(cpu)])
        self.space.frames.set_flags(pfns, PageFlag.DIRTY)

    @staticmethod
    def _unmap(domain: Domain, entries: Entries) -> None:
        mapped = entries[pte.pte_test_valid_dma(entries)]
        if mapped.size:
            domain.unmap(pte.pte_dma_addr(mapped))

    def check(self) -> None:
        """Assert the invariants of this mirror against the CPU's table."""
        self.table.check()
        assert self.low_water == min(self.unanswered, default=self.sequence + 1) - 1
        addresses, entries = self.table.valid(0, TASK_SIZE)
        if self.state is not MirrorState.LIVE:
            assert not addresses.size, f"{self} is {self.state.value} and still has entries"
        cpu = self.space.table.lookup(addresses)
        assert cpu_pte.is_present(cpu).all(), f"{self} reaches pages that the CPU table no longer has"
        assert np.array_equal(cpu_pte.cpu_pfn(cpu), self.pfns(entries)), (
            f"{self} reaches other frames than the CPU"
        )
        writes = pte.pte_test_write(entries)
        assert cpu_pte.is_writable(cpu[writes]).all(), f"{self} may write where the CPU may not"
        dirty = pte.pte_test_dirty(entries)
        assert writes[dirty].all(), f"{self} has dirty entries that do not permit writing"
        if self.domain:
            self.domain.check()
            mapped = pte.pte_test_valid_dma(entries)
            assert int(mapped.sum()) == self.domain.frames.count, f"{self} leaks DMA mappings"


def _set_dirty(entries: Entries) -> None:
    writable = (entries & np.uint64(pte.WRITE)) != 0
    valid = (entries & np.uint64(pte.VALID)) != 0
    entries[writable & valid] |= np.uint64(pte.DIRTY)
