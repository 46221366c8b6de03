"""Fakes for tests: devices that remember their translations.

`DeviceModel` is the device at the far end of a mirror of 2015: it uses what it was told until its driver answers that
it no longer does.  `IntervalDrivers` are drivers of today's kernel, with tables of their own: they program what a range
fault told them if nothing was invalidated meanwhile, and stop using it when they answer an invalidation, or remove the
notifier that would tell them.  So they see what the model of the daemon cannot see by itself: an event that was never
sent, or an edit that came before the answer.

**Source**: our own; Linux Documentation/mm/hmm.rst, the pattern of hmm_range_fault() under mmu_interval_read_retry().

**Invariants**: as long as a device may use a translation, the CPU's table has the same frame at that address, with no
less permission (invariants 1, 3 and 12 of the project, seen from the device); once a driver has answered an event, its
device gets through nothing older (invariant 5).

**Absent**: what pages hold (testing_contents.py); the bytes of drivers that copy (testing_memory.py).
"""

from __future__ import annotations

import errno as errnos
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hmm import commands_hmm, cpu_pte, pte
from hmm.checked import Checked
from hmm.commands_device import DeviceFaulted, DeviceMigrated
from hmm.commands_hmm import RangeFaulted
from hmm.errors import BadAddressError
from hmm.events import Delivery, Event, EventState, EventType
from hmm.frames import Frames, PageFlag
from hmm.interval_notifier import IntervalMirror
from hmm.machine import Machine
from hmm.mirror import Mirror
from hmm.operation_record import Caller, OperationRecord
from hmm.range_fault import DMA_MAPPED, VALID, WRITE, word_pfns
from hmm.receiver import MirrorState, Receiver
from hmm.spans import inside, overlap
from hmm.testing_coverage import Coverage
from hmm.testing_memory import CarriedMemory
from hmm.units import PAGE_MASK, PAGE_SIZE, AddressRange, Entries, MirrorId, Pfns

__all__ = ["AccessAfterAnswerError", "DeviceModel", "IntervalDrivers", "LostTranslationError", "StaleTranslationError"]


class AccessAfterAnswerError(AssertionError):
    """A device got through where its driver had answered that it no longer would."""


@dataclass(slots=True)
class GivenUp:
    """Events that were answered, and whose change has still to be made: nothing may be reached through them.

    Attributes:
        by_mask: pages may be read whose entries stay, as those of mirrors of 2015.
    """

    by_mask: bool = False
    events: dict[tuple[MirrorId, int], Event] = field(default_factory=dict)

    def add(self, receiver: Receiver, delivery: Delivery) -> None:
        """A driver is about to answer; too late if the event was abandoned, and then nothing changes."""
        owed = receiver.unanswered.get(delivery.sequence)
        if owed is not None and owed.state is EventState.SENT:
            self.events[receiver.id, delivery.sequence] = delivery.event

    def require_access(self, receiver: Receiver | None, pages: Entries, *, write: bool) -> None:
        """Raise AccessAfterAnswerError when an access that succeeded should not have: uint64[n], its pages."""
        if receiver is None:
            return
        unsettled = receiver.unsettled
        self.events = {key: one for key, one in self.events.items() if key[0] != receiver.id or key[1] in unsettled}
        for (mirror_id, sequence), event in self.events.items():
            keeps = self.by_mask and event.pte_mask != pte.MASK_NONE and not write
            if mirror_id != receiver.id or keeps or event.initiator == mirror_id:
                continue
            if inside(pages, event.spans).any():
                raise AccessAfterAnswerError(f"{receiver} reached pages after its answer to event {sequence}: {event}")


class LostTranslationError(AssertionError):
    """A device still uses a translation that the CPU's table no longer has."""


@dataclass(slots=True)
class DeviceModel:
    """What devices may use at the moment through mirrors of 2015.

    Attributes:
        translations: mirror -> page address -> (frame, may write).
        discarded: what a driver discarded by itself, with the last event sent before: it programs none of these
            pages from an older event that it has still to answer.
        checked: what was checked already, of the machine too.
        changes: how often translations of a mirror may have changed.
        given_up: what devices said they no longer use, where that change has still to be made.
    """

    machine: Machine
    memory: CarriedMemory
    checked: Checked = field(default_factory=Checked)
    translations: dict[MirrorId, dict[int, tuple[int, bool]]] = field(default_factory=dict)
    discarded: dict[MirrorId, list[tuple[int, AddressRange]]] = field(default_factory=dict)
    changes: Counter[MirrorId] = field(default_factory=Counter)
    given_up: GivenUp = field(default_factory=lambda: GivenUp(by_mask=True))

    def answering(self, delivery: Delivery, errno: int) -> bytes:
        """The driver handled an event and is about to answer: the device has done what the event asks."""
        if errno or delivery.mirror_id not in self.machine.mirrors:
            return b""
        held = self.translations.setdefault(delivery.mirror_id, {})
        self.changes[delivery.mirror_id] += 1
        event = delivery.event
        if event.etype is EventType.RELEASE:
            held.clear()
        elif event.etype in (EventType.DEVICE_RFAULT, EventType.DEVICE_WFAULT):
            self._program(delivery.mirror_id, event.spans, np.frombuffer(event.entries, "<u8"))
            for sequence, span in self.discarded.get(delivery.mirror_id, ()):
                if delivery.sequence <= sequence:
                    for address in range(span.start, span.end, PAGE_SIZE):
                        held.pop(address, None)
        else:
            _give_up(held, event)
            self.given_up.add(self.machine.mirrors[delivery.mirror_id], delivery)
        return self.memory.carry(delivery.mirror_id, event) if event.copy else b""

    def finished(self, record: OperationRecord[Any]) -> None:
        """A fault of a mirror that gets no update for its own faults tells the device by its result."""
        result = None if record.error else record.result
        if record.name in ("device_read", "device_write") and not record.error:
            pages = [page for address, length in record.arguments[1] for page in _pages(address, length)]
            mirror = self.machine.mirrors.get(record.arguments[0])
            self.given_up.require_access(mirror, np.array(pages, np.uint64), write=record.name == "device_write")
        if record.name == "discard_range" and not record.error:
            mirror_id, span = record.arguments[0], record.arguments[1]
            sequence = self.machine.mirrors[mirror_id].sequence
            self.discarded.setdefault(mirror_id, []).append((sequence, span))
        if isinstance(result, DeviceFaulted | DeviceMigrated):
            mirror_id, target = record.arguments[0], record.arguments[1]
            target = (target,) if isinstance(target, AddressRange) else target
            mirror = self.machine.mirrors.get(mirror_id)
            if mirror is not None and not mirror.update_on_fault and not mirror.owes:
                spans = tuple(target) if not isinstance(target, np.ndarray) else _single_pages(target)
                self._program(mirror_id, spans, result.entries)

    def check(self) -> None:
        """Raise LostTranslationError when a device could reach a frame that is no longer its page's."""
        for mirror_id, held in self.translations.items():
            mirror = self.machine.mirrors.get(mirror_id)
            _forget_ended(self.machine.frames, mirror, held)
            if mirror is None or not held:
                continue
            table = mirror.space.table
            state = (self.changes[mirror_id], self.checked.number(table))
            if self.checked.is_new((DeviceModel, mirror_id), *state):
                _check_mirrored(mirror, held, table.lookup(np.fromiter(held, np.uint64, len(held))))

    def _program(self, mirror_id: MirrorId, spans: tuple[AddressRange, ...], entries: Any) -> None:
        mirror = self.machine.mirrors[mirror_id]
        held = self.translations.setdefault(mirror_id, {})
        self.changes[mirror_id] += 1
        addresses = [address for span in spans for address in range(span.start, span.end, PAGE_SIZE)]
        pfns = mirror.pfns(np.asarray(entries, np.uint64)).tolist()
        for address, entry, pfn in zip(addresses, np.asarray(entries).tolist(), pfns, strict=True):
            if entry & pte.VALID:
                held[address] = (pfn, bool(entry & pte.WRITE))


def _check_mirrored(mirror: Mirror, held: dict[int, tuple[int, bool]], entries: Entries) -> None:
    # `entries` are the CPU's of the addresses that are held.
    pfns, writable = np.array(list(held.values()), np.int64).T
    on_device = cpu_pte.is_device_private(entries) | cpu_pte.is_migration(entries)
    good = (cpu_pte.is_present(entries) | on_device) & (cpu_pte.cpu_pfn(entries) == pfns)
    good &= (writable == 0) | on_device | cpu_pte.is_writable(entries)
    if not good.all():
        at = int(good.argmin())
        raise LostTranslationError(
            f"{mirror} uses frame {pfns[at]} at {list(held)[at]:#x}{' for writing' if writable[at] else ''}, "
            f"the CPU's entry is {int(entries[at]):#x}"
        )


def _forget_ended(frames: Frames, mirror: Receiver | None, held: dict[int, tuple[int, bool]]) -> None:
    """Take out of what a device holds that which it need not have been told to give up."""
    if mirror is None or mirror.state is not MirrorState.LIVE:
        held.clear()  # the daemon lets no access through any more
    elif mirror.awaits_late_answer():
        if not mirror.space.users:  # a death goes on without those who do not answer in time
            held.clear()
        pages, pfns = list(held), np.array([pfn for pfn, _ in held.values()], np.int64)
        for at in np.flatnonzero(frames.test_flags(pfns, PageFlag.HWPOISON)).tolist():  # and so does lost memory
            del held[pages[at]]


def _give_up(held: dict[int, tuple[int, bool]], event: Event) -> None:
    spans = [(span.start, span.end) for span in event.spans]
    for address in [address for address in held if any(start <= address < end for start, end in spans)]:
        if event.pte_mask == pte.MASK_NONE:
            del held[address]
        elif event.pte_mask == pte.MASK_WRITE_PROTECT:
            held[address] = (held[address][0], False)


def _pages(address: int, length: int) -> range:
    return range(address & PAGE_MASK, address + length, PAGE_SIZE)


def _single_pages(addresses: Any) -> tuple[AddressRange, ...]:
    return tuple(AddressRange(address, address + PAGE_SIZE) for address in addresses.tolist())


class StaleTranslationError(AssertionError):
    """A driver that does as it is told has a translation that no longer holds."""


@dataclass(slots=True)
class IntervalDrivers:
    """The tables of all drivers of today's interface.

    Attributes:
        held: mirror -> page address -> (frame, may write).
        by: mirror -> page address -> the notifier that would tell of a change.
        exclusive: mirror -> the pages that its device has to itself, and may use as long as the CPU does not.
        former: what a driver gave up lately, in the same form as `held`.
        given_up: as of `DeviceModel`.
        forgets: whether a driver forgets to unmap what it has mapped for DMA.
        coverage: where drivers' own calls are counted.
    """

    machine: Machine
    held: dict[MirrorId, dict[int, tuple[int, bool]]] = field(default_factory=dict)
    by: dict[MirrorId, dict[int, int]] = field(default_factory=dict)
    exclusive: dict[MirrorId, set[int]] = field(default_factory=dict)
    former: dict[MirrorId, dict[int, tuple[int, bool]]] = field(default_factory=dict)
    given_up: GivenUp = field(default_factory=GivenUp)
    forgets: Callable[[], bool] = lambda: False
    coverage: Coverage = field(default_factory=Coverage)

    def answering(self, delivery: Delivery, errno: int) -> None:
        """A driver has stopped to use what an event is about; not yet if it has only started to, or refuses."""
        if errno not in (errnos.EINPROGRESS, errnos.EAGAIN):
            self._drop(delivery.mirror_id, lambda page: _meets(delivery, page))
            self._unmap(delivery)
            receiver = self.machine.receivers.get(delivery.mirror_id)
            if isinstance(receiver, IntervalMirror):
                self.given_up.add(receiver, delivery)

    def _unmap(self, delivery: Delivery) -> None:
        mirror = self.machine.receivers.get(delivery.mirror_id)
        if not isinstance(mirror, IntervalMirror) or mirror.dma is None or mirror.state is not MirrorState.LIVE:
            return
        pages = mirror.dma.within(delivery.event.spans)
        if not pages.size or self.forgets():
            return
        caller = Caller(name="driver", token=mirror.owner)
        words = np.full(pages.size, VALID | DMA_MAPPED, np.uint64)
        self.coverage.ended(self.machine.start(caller, commands_hmm.dma_unmap, mirror.id, pages, words))

    def finished(self, record: OperationRecord[Any]) -> None:
        """A range fault gives translations; a notifier that goes takes them."""
        if record.name in ("read_frames", "write_frames"):
            self._require_access(record)
            if record.error is None:
                self._require_no_access(record)
        elif record.error is not None:
            return
        elif isinstance(record.result, RangeFaulted) and record.name == "range_fault_unlocked":
            self._program(record.arguments[0], record.arguments[1], record.arguments[2], record.result)
        elif record.name == "make_exclusive":
            self._have(record.arguments[0], record.arguments[1], record.result)
        elif record.name == "remove_notifier":
            self._drop_notified(*record.arguments)

    def check(self, running: Iterable[OperationRecord[Any]]) -> None:
        """Raise StaleTranslationError when a device could reach a frame that is no longer its page's."""
        for record in running:  # it may hear nothing more before these return
            if record.name == "remove_notifier":
                self._drop_notified(*record.arguments)
            elif record.name == "detach":
                self._drop_leaving(*record.arguments)
        for mirror_id, held in self.held.items():
            mirror = self.machine.receivers.get(mirror_id)
            _forget_ended(self.machine.frames, mirror, held)
            if mirror is not None and held:
                entries = mirror.space.table.lookup(np.fromiter(held, np.uint64, len(held)))
                alone = self.exclusive.get(mirror_id, set())
                _check_held(mirror_id, held, entries, np.array([page in alone for page in held]))

    def _program(self, mirror_id: MirrorId, number: int, span: AddressRange, faulted: RangeFaulted) -> None:
        mirror = self.machine.receivers.get(mirror_id)
        notifier = mirror.notifiers.get(number) if isinstance(mirror, IntervalMirror) else None
        if mirror is None or notifier is None or faulted.error is not None or notifier.filtered or notifier.leaving:
            return
        if notifier.sequence != faulted.notifier_seq:  # read_retry()
            return
        held, by = self.held.setdefault(mirror_id, {}), self.by.setdefault(mirror_id, {})
        frames = word_pfns(faulted.words).tolist()
        for page, word, pfn in zip(range(span.start, span.end, PAGE_SIZE), faulted.words.tolist(), frames, strict=True):
            if word & VALID and notifier.span.start <= page and page + PAGE_SIZE <= notifier.span.end:
                held[page], by[page] = (pfn, bool(word & WRITE)), number
                self.exclusive.get(mirror_id, set()).discard(page)

    def _have(self, mirror_id: MirrorId, span: AddressRange, pfns: Pfns) -> None:
        # The entries are taken in the step in which the call ends: nothing can have come between.
        mirror = self.machine.receivers.get(mirror_id)
        for notifier in mirror.notifiers.values() if isinstance(mirror, IntervalMirror) else ():
            if notifier.filtered or notifier.leaving or notifier.deferred == notifier.sequence:
                continue
            for page, pfn in zip(range(span.start, span.end, PAGE_SIZE), pfns.tolist(), strict=False):
                if pfn and notifier.span.start <= page and page + PAGE_SIZE <= notifier.span.end:
                    self.held.setdefault(mirror_id, {})[page] = pfn, True
                    self.by.setdefault(mirror_id, {})[page] = notifier.id
                    self.exclusive.setdefault(mirror_id, set()).add(page)

    def _require_access(self, record: OperationRecord[Any]) -> None:
        mirror = self.machine.receivers.get(record.arguments[0])
        if mirror is None or not isinstance(record.error, BadAddressError):
            return
        held, named = self.held.get(mirror.id, {}), zip(*(one.tolist() for one in record.arguments[1:3]), strict=True)
        if any(held.get(page, (-1, False))[0] != pfn for page, pfn in named):
            return  # it was given up
        if not any(sent.state is EventState.ABANDONED for sent in mirror.unanswered.values()):
            raise StaleTranslationError(f"{mirror} may not use what it holds: {record.error}")

    def _require_no_access(self, record: OperationRecord[Any]) -> None:
        mirror_id, pages, pfns = record.arguments[:3]
        mirror, write = self.machine.receivers[mirror_id], record.name == "write_frames"
        self.given_up.require_access(mirror, pages, write=write)
        entries = mirror.space.table.lookup(pages)
        good = cpu_pte.cpu_pfn(entries) == pfns
        good &= cpu_pte.is_writable(entries) | (not write)
        if not good.all():
            raise StaleTranslationError(f"{mirror} reached frame {pfns[~good][0]} at {int(pages[~good][0]):#x}")

    def _drop_notified(self, mirror_id: MirrorId, number: int) -> None:
        self._drop(mirror_id, lambda page: self.by[mirror_id][page] == number)

    def _drop_leaving(self, mirror_id: MirrorId) -> None:
        mirror = self.machine.receivers.get(mirror_id)
        notifiers = mirror.notifiers.values() if isinstance(mirror, IntervalMirror) else ()
        staying = {notifier.id for notifier in notifiers if not notifier.leaving}
        self._drop(mirror_id, lambda page: self.by[mirror_id][page] not in staying)

    def _drop(self, mirror_id: MirrorId, which: Callable[[int], bool]) -> None:
        held = self.held.get(mirror_id, {})
        for page in [page for page in held if which(page)]:
            self.former.setdefault(mirror_id, {})[page] = held.pop(page)
            self.exclusive.get(mirror_id, set()).discard(page)


def _meets(delivery: Delivery, page: int) -> bool:
    return overlap((AddressRange(page, page + PAGE_SIZE),), delivery.event.spans)


def _check_held(mirror_id: MirrorId, held: dict[int, tuple[int, bool]], entries: Entries, alone: Any) -> None:
    pfns, writable = np.array(list(held.values()), np.int64).T
    good = cpu_pte.holds_frame(entries) | cpu_pte.is_special(entries)
    good &= ~alone | cpu_pte.is_device_exclusive(entries)
    good &= (cpu_pte.cpu_pfn(entries) == pfns) & ((writable == 0) | cpu_pte.is_writable(entries))
    if not good.all():
        at = int(good.argmin())
        how = " alone" if alone[at] else " for writing" if writable[at] else ""
        raise StaleTranslationError(
            f"mirror {mirror_id} uses frame {pfns[at]} at {list(held)[at]:#x}{how}, the CPU's entry is "
            f"{int(entries[at]):#x}"
        )
