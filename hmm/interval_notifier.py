"""Interval notifiers: how today's drivers hear of changes, and know that what they read is still so.

A driver subscribes to ranges of an address space.  A change calls it back and makes the sequence of the address space
odd until all running changes have ended; a read section begins by noting the sequence of its subscription and must be
repeated when that has moved:

    sequence = read_begin()        waits while the range is being invalidated
    ... look at the page table ...
    if read_retry(sequence): start over, else program the device

The driver keeps its own table: of it nothing is known here, but what is mapped for DMA.

A subscription may have two passes: its driver answers that it has only started (EINPROGRESS), and is called once more
when all drivers have started, so that many devices stop at the same time.

**Source**: Linux mm/mmu_notifier.c: __mmu_interval_notifier_insert(), mmu_interval_notifier_remove(),
mmu_interval_read_begin(), mn_itree_inv_start_range(), mn_itree_inv_end(), 6.12; the two passes of 7.1.

**Invariants**: the sequence of a subscription is odd; it equals that of the address space exactly while an
invalidation that it was told of is running, or one that ran when it was inserted.

**Absent**: signals and memory that inserting may run into (EINTR, ENOMEM).

Differs: a driver that ignores its own migrations says so once, by `filtered`, and not by leaving the sequence as it is
in the callback.  The sequence moves when the event is sent, not when the driver is called.
"""

from __future__ import annotations

import errno as errnos
from collections.abc import Sequence
from dataclasses import dataclass, field

from hmm import pte
from hmm.checked import Checked
from hmm.dma_map import DmaMap
from hmm.errors import InvalidRequestError, NoSuchObjectError, WouldDeadlockError
from hmm.events import Delivery, Event, EventState, Reason
from hmm.iommu import Domain
from hmm.operation import Await, Operation, WaitFor
from hmm.receiver import MirrorState, Receiver
from hmm.units import PAGE_SIZE, ULONG_MAX, Address, AddressRange, Entries
from hmm.violation import ViolationKind
from hmm.zone_device import forget_holder

__all__ = ["IntervalMirror", "IntervalNotifier"]


@dataclass(slots=True, eq=False)
class IntervalNotifier:
    """`struct mmu_interval_notifier`: one range.

    Attributes:
        filtered: what this mirror itself asked for does not disturb read sections.
        two_pass: its driver may start with an invalidation, and finish when all drivers have started.
        sequence: of the last invalidation it was told of.
        deferred: the sequence until whose end it hears nothing, as it was inserted while that lasted; 0 for none.
        leaving: the sequence behind which it hears nothing, as it was removed while that lasted; 0 for none.
    """

    id: int
    span: AddressRange
    filtered: bool
    sequence: int
    deferred: int = 0
    leaving: int = 0
    two_pass: bool = False

    def concerned(self, event: Event, sequence: int) -> bool:
        """Whether the driver has to hear of `event` for this range; `sequence` is that of the address space."""
        return self.deferred != sequence and self.leaving in (0, sequence) and event.overlaps(self.span)


@dataclass(slots=True, eq=False)
class IntervalMirror(Receiver):
    """A driver's interval notifiers in one address space, called back through one stream.

    Attributes:
        dma: what it has mapped for DMA; None when its device does none.
    """

    notifiers: dict[int, IntervalNotifier] = field(default_factory=dict)
    last_notifier: int = 0
    dma: DmaMap | None = field(init=False)

    def __post_init__(self) -> None:
        self.dma = DmaMap(Domain(self.device.iommu)) if self.device.iommu else None

    def release(self, state: MirrorState, why: str = "") -> None:
        """Hear nothing any more; pages that it put on its device come back without it, nothing stays mapped for DMA."""
        if self.dma is not None:
            self.dma.unmap_all()
        forget_holder(self.space.frames, self.id)
        Receiver.release(self, state, why)

    # ---- subscriptions

    def insert(
        self, start: Address, length: int, *, filtered: bool = False, two_pass: bool = False
    ) -> IntervalNotifier:
        """Subscribe to [start, start + length); overlapping subscriptions are fine.

        Raises:
            InvalidRequestError: no length, or an end beyond all addresses (EOVERFLOW); the process has exited
                (EINVAL).

        Source: __mmu_interval_notifier_insert().
        """
        if length <= 0 or start < 0 or start + length - 1 > ULONG_MAX:
            raise InvalidRequestError(f"insert: {length:#x} bytes at {start:#x} are no range", errnos.EOVERFLOW)
        if not self.space.users:
            raise InvalidRequestError(f"insert: the address space of {self} is gone")
        core = self.space.notifier
        deferred = core.sequence if core.sequence & 1 else 0
        if core.invalidations:
            core.sequence |= 1
        sequence = core.sequence if core.invalidations else core.sequence - 1
        self.last_notifier += 1
        notifier = IntervalNotifier(
            self.last_notifier, AddressRange(start, start + length), filtered, sequence, deferred, two_pass=two_pass
        )
        self.notifiers[notifier.id] = notifier
        return notifier

    def remove(self, numbers: Sequence[int]) -> Operation[None]:
        """Unsubscribe; when it returns no callback for these ranges is running and none will come.

        What comes before the end of running invalidations is still heard.  With the policy FAIL everything is, until
        nothing runs and no abandoned event is unanswered: who failed to answer is still subscribed, and missed nothing.

        Raises:
            NoSuchObjectError: there is no such subscription (ENOENT).
            WouldDeadlockError: called from inside a callback (EDEADLK); all are still subscribed.
            TimedOutError: its policy is FAIL, and it still owes the answer to an abandoned event for one of these
                ranges (ETIMEDOUT); all are still subscribed.

        Source: mmu_interval_notifier_remove().
        """
        notifiers = [self.notifier(number) for number in numbers]
        yield from self._hear_out(notifiers) if self.may_abandon else self._leave(notifiers)
        for number in numbers:
            self.notifiers.pop(number, None)

    def _leave(self, notifiers: Sequence[IntervalNotifier]) -> Operation[None]:
        sequence = self.space.notifier.sequence
        if not sequence & 1 or all(notifier.deferred == sequence for notifier in notifiers):
            return
        before = [notifier.leaving for notifier in notifiers]  # another call may be removing them
        for notifier in notifiers:
            notifier.leaving = sequence
        try:
            yield Await(WaitFor.SEQUENCE, self.space.id, ticket=sequence)
        except WouldDeadlockError:
            for notifier, leaving in zip(notifiers, before, strict=True):
                notifier.leaving = leaving
            raise

    def _hear_out(self, notifiers: Sequence[IntervalNotifier]) -> Operation[None]:
        while True:
            sequence = self.space.notifier.sequence
            if sequence & 1 and any(notifier.deferred != sequence for notifier in notifiers):
                yield Await(WaitFor.SEQUENCE, self.space.id, ticket=sequence)
            elif any(sent.event.overlaps(notifier.span) for sent in self.abandoned for notifier in notifiers):
                yield self.callbacks()
            else:
                return

    def notifier(self, number: int) -> IntervalNotifier:
        """The subscription of that number.

        Raises:
            NoSuchObjectError: there is none (ENOENT).
        """
        notifier = self.notifiers.get(number)
        if notifier is None:
            raise NoSuchObjectError(f"{self} has no interval notifier {number}", errnos.ENOENT)
        return notifier

    # ---- read sections

    def read_begin(self, number: int) -> Operation[int]:
        """Begin a read section.  Returns: what `read_retry` has to be asked with; it may be outdated already.

        Source: mmu_interval_read_begin(); it waits once and does not loop.
        """
        sequence = self.notifier(number).sequence
        if sequence == self.space.notifier.sequence:
            yield Await(WaitFor.SEQUENCE, self.space.id, ticket=sequence)
        return sequence

    def read_retry(self, number: int, sequence: int) -> bool:
        """Whether an invalidation came meanwhile, so that everything read has to be thrown away."""
        return self.notifier(number).sequence != sequence

    # ---- events

    def hears(self, event: Event) -> bool:
        """Every change with a reason of today that overlaps a subscription, its own device's included."""
        sequence = self.space.notifier.sequence
        return event.reason is not None and any(
            notifier.concerned(event, sequence) for notifier in self.notifiers.values()
        )

    @property
    def is_selective(self) -> bool:
        """It hears what concerns its subscriptions."""
        return True

    def prepare(self, event: Event) -> None:
        """An event is about to be sent; from now on read sections over its ranges have to be repeated."""
        if event.reason is not None:
            sequence = self.space.notifier.sequence
            for notifier in self.notifiers.values():
                ignored = notifier.filtered and event.initiator == self.id
                if notifier.concerned(event, sequence) and not ignored:
                    notifier.sequence = sequence

    def has_two_passes(self, event: Event) -> bool:
        """Whether a subscription with two passes is concerned, and this is the first."""
        return (
            event.reason is not None
            and not event.finishes
            and any(notifier.two_pass and event.overlaps(notifier.span) for notifier in self.notifiers.values())
        )

    def settle(self, delivery: Delivery) -> bool:
        """Look whether the driver has unmapped what was taken; else an answer has no effect, and is no error here."""
        if self.dma is not None and delivery.state is EventState.ACKNOWLEDGED and not delivery.unfinished:
            self._require_unmapped(self.dma, delivery)
        if delivery.errno and delivery.state is not EventState.REFUSED:
            self.counters[f"refused_{delivery.event.etype.name.lower()}"] += 1
        return True

    def note_mapping(self, addresses: Entries) -> None:
        """Pages, uint64[n], are about to be mapped for DMA: from now on its answers are looked at."""
        if addresses.size:
            span = AddressRange(int(addresses.min()), int(addresses.max()) + PAGE_SIZE)
            self.space.notifier.note_filling(self.id, span)

    def _require_unmapped(self, dma: DmaMap, delivery: Delivery) -> None:
        # Its own migration is for its driver to sort out; after RELEASE comes UNMAP.  Where pages stay, mappings may.
        event = delivery.event
        mapped = dma.within(event.spans)
        if not mapped.size or event.initiator == self.id or event.reason is Reason.RELEASE:
            return
        if event.pte_mask != pte.MASK_NONE:
            dma.write_protect(mapped)
            return
        address = int(mapped[0])
        taking = self.taken_by(address, pte.VALID)
        self.report(ViolationKind.DMA_MAPPING_KEPT, address, mapped.size, write=False, taking=taking)

    def check(self, checked: Checked) -> None:
        """Assert the invariants of the subscriptions and DMA mappings."""
        Receiver.check(self, checked)
        if self.dma is not None:
            tables = (self.dma.table, *self.dma.domain.tables)
            if checked.is_new(self, self.state, *(checked.number(table) for table in tables)):
                self.dma.check()
                assert self.state is MirrorState.LIVE or self.dma.table.is_empty, f"{self} is gone and maps for DMA"
        for notifier in self.notifiers.values():
            assert notifier.sequence & 1, f"{self}: an even sequence"
            assert notifier.sequence <= self.space.notifier.sequence, f"{self}: a sequence of the future"
