"""Pages of a mirror in its device's memory, and their way back (2015).

Such a page has its entry in the mirror's table, VALID_DEV with an address of the device's memory, and an entry in the
CPU's table that the CPU cannot use.  It comes back when a CPU touches it, when another device or process wants it,
before its mapping moves or becomes unreadable, by its driver's request, and before its mirror is unregistered.  fork
gives the child copies and leaves the device what it has.

    lock      the CPU's entries become migration entries: whoever touches them waits
    tell      COPY_FROM_DEVICE: the driver stops using the pages, and carries the bytes if it has them
    unlock    entries of the new page; of the device again where memory ran out; poison where the copy failed

Who has the bytes is the device's choice.  By frames: the daemon, so that a copy needs nothing from the driver, and a
driver that dies takes nothing with it.  By its driver (a *remote* region): then copies are carried by the driver, by
`read_copy` and `write_copy` from inside the callback, and what only a lost driver had is lost: poison.

**Source**: linux-mm, "HMM: CPU page fault on migrated memory", "HMM: add helpers for migration back to system memory",
"HMM: add mirror fault support for system to device memory migration", "HMM: fork copy migrated memory into system
memory for child process", "HMM: new callback for copying memory from and to device memory".

**Invariants**: a page is in the device's memory exactly if its mirror's entry says so; nothing of the range is changed
or told to anybody while it is being copied; no page that was lost reads as zeroes.

**Absent**: the way there (mirror_migrate.py), which of its frames a device uses (frame_allocator.py).

Differs: the posted code left the mirror an entry of the new page; here the device faults again.  It rewrote the
parent's entries at fork, assumed that an address space has one mirror, locked poison again at fork, and lost the pages
of a mirror that was unregistered.  The daemon keeps the books of the device's memory and says where a page goes, where
the posted driver did.
"""

from __future__ import annotations

import errno as errnos
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hmm import cpu_pte, pte
from hmm.device_pages import lose
from hmm.dispatch import Dispatch
from hmm.errors import InvalidRequestError, NoSuchObjectError, OutOfFramesError, TimedOutError
from hmm.events import Cause, Delivery, Event, EventState, EventType
from hmm.fault_pages import ANON_PAGE
from hmm.frames import PageFlag, Region
from hmm.migration_entries import CARRIED, are_names_of, entries_of, index_of, put_entries, stand_in
from hmm.mirror import Mirror, MirrorState
from hmm.operation import Await, Deliver, Operation, Pause, WaitFor
from hmm.swap import some_room
from hmm.units import PAGE_SIZE, PIECE_PAGES, AddressRange, Entries, Pfns, spans_of
from hmm.zone_device import failing_copies, forget_holder

__all__ = ["COPY_PAGES", "Copy", "MirrorMemory"]

COPY_PAGES = 512
"""Pages of one event that a driver carries: as many as a page has room for entries, as posted."""
_LOST = np.int64(-1)

Mask = npt.NDArray[np.bool_]
Take = Callable[[Entries, Pfns], None]
"""Gets uint64[n] addresses and int64[n] frames with copies of their pages, 0 where the copy failed."""


@dataclass(slots=True, eq=False)
class Copy:
    """Pages that a driver carries between system memory and its device's, while it handles the event.

    Attributes:
        addresses: uint64[n], ascending.
        pfns: int64[n], the frames in system memory: where from, or where to.
        filled: bool[n], the pages that it has brought; None on the way to the device.
    """

    addresses: Entries
    pfns: Pfns
    filled: Mask | None = None


@dataclass(slots=True, eq=False)
class MirrorMemory:
    """A mirror's part of its device's memory.

    Attributes:
        copies: what the driver carries at the moment, by the number that its event names.
    """

    mirror: Mirror
    region: Region
    copies: dict[int, Copy] = field(default_factory=dict)
    last_copy: int = 0

    def has_pages(self, spans: tuple[AddressRange, ...]) -> bool:
        """Whether a page of these ranges is there.  Cost: O(entries of the mirror in the ranges)."""
        return self.region.used > 0 and any(self.mirror.on_device(span).size for span in spans)

    def leave(self) -> None:
        """The mirror ends: what its driver alone has is lost, what the daemon has stays until it is touched."""
        if self.region.remote:
            addresses = self.mirror.on_device(self.mirror.span)
            self.mirror.table.clear_many(addresses)
            lose(self.mirror.space, addresses)
        else:
            forget_holder(self.mirror.space.frames, self.mirror.id)

    # ---- back

    def vacate(self, spans: tuple[AddressRange, ...]) -> Operation[int]:
        """Bring back all that is there of these ranges.

        Returns: number of pages that left the device's memory.

        Raises: as `bring_back`.
        """
        npages = 0
        for span in spans:
            again = False
            while (addresses := self.mirror.on_device(span)).size:
                if again:
                    yield Pause()  # others may have to get on first
                again = True
                npages += addresses.size
                yield from self.bring_back(addresses)
        return npages

    def give_up(self, pfns: Pfns) -> Operation[int]:
        """Bring back the pages that are in some frames of the device's memory.

        Args:
            pfns: int64[n].

        Returns: number of pages that left it.

        Raises: as `bring_back`.
        """
        addresses = self.mirror.on_device(self.mirror.span)
        chosen = addresses[np.isin(self.mirror.pfns(self.mirror.table.lookup(addresses)), pfns)]
        yield from self.bring_back(chosen)
        return chosen.size

    def bring_back(self, addresses: Entries) -> Operation[None]:
        """Bring pages back, as far as they are there.

        Args:
            addresses: uint64[n], ascending and unique.

        Raises:
            OutOfFramesError: no frame was left for the rest, which stays where it is (ENOMEM).
            TimedOutError: the driver did not answer, and its policy is FAIL: nothing was changed (ETIMEDOUT).

        Cost: O(n), vectorised, and the copying; one event for each COPY_PAGES pages that a driver carries.
        Source: hmm_migrate_back(), hmm_handle_cpu_fault().
        """
        step = COPY_PAGES if self.region.remote else PIECE_PAGES
        for first in range(0, addresses.size, step):
            yield from self._bring_back(addresses[first : first + step])

    def _bring_back(self, addresses: Entries) -> Operation[None]:
        mirror, space = self.mirror, self.mirror.space
        spans = spans_of(addresses)
        yield from self._wait(spans)
        while mirror.state is MirrorState.LIVE and not space.frames.available:
            if not (yield from some_room(space.frames, addresses.size)):
                raise OutOfFramesError(f"no frame for a page that has to leave {mirror}", address=spans[0].start)
            yield from self._wait(spans)
        if mirror.state is not MirrorState.LIVE:
            return
        with space.notifier.copying(spans):
            locked, homes = self._lock(addresses)
            if locked.size:
                with space.frames.locks.lock(homes, space.current.operation_id):
                    yield from self._return(locked, homes)
        if not locked.size and self._holds_any(addresses):
            # Its driver has given it up already, and whoever discards it has not come to it yet.
            assert space.notifier.invalidations_overlap(spans), f"{spans[0]} is on no device of {mirror}, nor anywhere"
            yield Await(WaitFor.INVALIDATIONS, space.id, spans)

    def _wait(self, spans: tuple[AddressRange, ...]) -> Operation[None]:
        mirror, notifier = self.mirror, self.mirror.space.notifier
        while mirror.state is MirrorState.LIVE:
            if notifier.edits_overlap(spans, notifier.current.operation_id):
                yield Await(WaitFor.EDITS, notifier.space_id, spans)
            elif notifier.copies_overlap(spans, notifier.current.operation_id):
                yield from notifier.wait_for_copies(spans)
            elif notifier.faults_overlap(spans):
                yield from notifier.back_off(spans)  # the device is being told of entries that are about to go
            elif mirror.settling(spans):
                yield Await(WaitFor.SETTLED, notifier.space_id, spans, mirror_id=mirror.id)
            elif mirror.awaits_late_answer():
                yield Await(WaitFor.LATE_ANSWERS, notifier.space_id, spans, mirror_id=mirror.id)
            else:
                return

    def _holds_any(self, addresses: Entries) -> bool:
        # By the CPU's table; another device may have taken what was here.
        space = self.mirror.space
        entries = space.table.lookup(addresses)
        pfns = cpu_pte.cpu_pfn(entries[cpu_pte.is_device_private(entries)])
        return bool((space.frames.zone_device_data[pfns] == self.mirror.id).any())

    def _lock(self, addresses: Entries) -> tuple[Entries, Pfns]:
        """Put migration entries in the place of those of the pages that are there.

        Returns: their addresses, and int64[n], where they are.
        """
        mirror, space = self.mirror, self.mirror.space
        cpu, own = entries_of(space.table, addresses), entries_of(mirror.table, addresses)
        here = index_of(cpu_pte.is_device_private(cpu) & pte.pte_test_valid_dev(own))
        addresses, homes = addresses[here], cpu_pte.cpu_pfn(cpu[here])
        stand_in(space, addresses, cpu[here], homes)
        return addresses, homes

    def _return(self, addresses: Entries, homes: Pfns) -> Operation[None]:
        frames = self.mirror.space.frames
        now = homes.copy()
        try:
            targets = frames.allocate(min(addresses.size, frames.available))
            count = targets.size
            try:
                outcome, came = yield from self._carry_back(addresses[:count], homes[:count], targets)
            except BaseException:
                frames.put(targets)
                raise
            if np.count_nonzero(came) < came.size:
                frames.put(targets[~came])
            stays = outcome.state is EventState.ABANDONED
            now[:count] = np.where(came, targets, homes[:count] if stays else _LOST)
        finally:
            self._unlock(addresses, homes, now)
        if stays and not came.all():
            raise TimedOutError(f"the driver of {self.mirror} did not give {spans_of(addresses)[0]} back in time")

    def _carry_back(self, addresses: Entries, homes: Pfns, targets: Pfns) -> Operation[tuple[Delivery, Mask]]:
        outcome, came = yield from self.carry(EventType.COPY_FROM_DEVICE, addresses, homes, targets)
        if outcome.errno:
            yield from self._kill()  # before anything else gets these pages: it may not have stopped using them
        if not self.region.remote and outcome.state is not EventState.ABANDONED:
            came = self.copy_pages(targets, homes)
        return outcome, came

    def _unlock(self, addresses: Entries, homes: Pfns, now: Pfns) -> None:
        """Entries of pages that are back name `now`, of the lost ones nothing; the others are what they were."""
        mirror, space, frames = self.mirror, self.mirror.space, self.mirror.space.frames
        stays, live = now == homes, mirror.state is MirrorState.LIVE
        if not live and self.region.remote:
            now, stays = np.where(stays, _LOST, now), np.zeros(stays.size, np.bool_)
        elif not live:
            frames.zone_device_data[homes[stays]] = 0
        entries = entries_of(space.table, addresses)
        ours = are_names_of(entries, homes)
        lost = now == _LOST
        came = index_of(~stays & ~lost)
        kinds = np.where(stays, np.uint64(cpu_pte.DEVICE), np.uint64(cpu_pte.PRESENT | cpu_pte.DIRTY))
        new = cpu_pte.cpu_entry(np.where(lost, 0, now), (entries & CARRIED) | kinds)
        new[lost] = cpu_pte.POISON
        there = index_of(ours)
        put_entries(space.table, addresses[there], new[there])
        frames.flags[now[came]] = np.uint16(ANON_PAGE | PageFlag.DIRTY)
        frames.index[now[came]], frames.mapping[now[came]] = frames.index[homes[came]], frames.mapping[homes[came]]
        frames.map_new(now[ours & ~lost])
        if not isinstance(there, slice):
            frames.put(now[~ours & ~stays & ~lost])
        frames.put(homes[index_of(~(ours & stays))])
        if live:
            mirror.table.clear_many(addresses[~stays])

    def _kill(self) -> Operation[None]:
        if self.mirror.state is MirrorState.LIVE:
            notifier = self.mirror.space.notifier
            self.mirror.leaving = notifier.current.operation_id
            yield from notifier.end((self.mirror.id,), self.mirror.leaving)

    # ---- copies for others

    def copy_out(self, spans: tuple[AddressRange, ...], take: Take) -> Operation[None]:
        """Copy the pages of these ranges, and leave them where they are: for the child of a fork.

        Args:
            take: gets the copies, a part at a time, and with each frame its only reference.

        Raises:
            OutOfFramesError: no room for copies (ENOMEM).
            TimedOutError: as `bring_back`.

        Source: hmm_mm_fork().
        """
        frames = self.mirror.space.frames
        for span in spans:
            addresses = self.mirror.on_device(span)
            for first in range(0, addresses.size, COPY_PAGES):
                part = addresses[first : first + COPY_PAGES]
                if frames.available < part.size and frames.make_room:
                    yield from frames.make_room(part.size)
                yield from self._wait(spans_of(part))
                with self.mirror.space.notifier.copying(spans_of(part)):
                    outcome = yield from self._copy_out(part, take)
                if outcome is not None and outcome.errno:
                    yield from self._kill()

    def _copy_out(self, addresses: Entries, take: Take) -> Operation[Delivery | None]:
        frames = self.mirror.space.frames
        own = self.mirror.table.lookup(addresses)
        addresses, own = addresses[pte.pte_test_valid_dev(own)], own[pte.pte_test_valid_dev(own)]
        if not addresses.size:
            return None
        homes, targets = self.mirror.pfns(own), frames.allocate(addresses.size)
        if not self.region.remote:
            came = self.copy_pages(targets, homes, keeps=True)
            frames.put(targets[~came])
            take(addresses, np.where(came, targets, 0))
            return None
        try:
            outcome, came = yield from self.carry(EventType.COPY_FROM_DEVICE, addresses, homes, targets, keeps=True)
        except BaseException:
            frames.put(targets)
            raise
        if outcome.state is EventState.ABANDONED:
            frames.put(targets)
            raise TimedOutError(f"fork: the driver of {self.mirror} did not copy {spans_of(addresses)[0]} in time")
        frames.put(targets[~came])
        take(addresses, np.where(came, targets, 0))
        return outcome

    def copy_pages(self, targets: Pfns, sources: Pfns, *, keeps: bool = False) -> Mask:
        """Copy pages to the device's memory or back, where the driver does not carry them.

        Args:
            keeps: they stay as well; otherwise those that are copied are about to be let go.

        Returns: bool[n], those that were copied: all but the ones made to fail (`Frames.failing_copies`).
        """
        frames = self.mirror.space.frames
        copied = np.ones(targets.size, np.bool_)
        if frames.failing_copies:
            copied[failing_copies(frames, np.full(targets.size, self.mirror.id, np.int64))] = False
        which = index_of(copied)
        (frames.copy if keeps else frames.move)(targets[which], sources[which])
        return copied

    # ---- what the driver does

    def carry(
        self, etype: EventType, addresses: Entries, homes: Pfns, pfns: Pfns, *, keeps: bool = False
    ) -> Operation[tuple[Delivery, Mask]]:
        """Tell the driver of pages on their way, and let it carry them if it has the bytes.

        Args:
            etype: COPY_TO_DEVICE or COPY_FROM_DEVICE.
            homes, pfns: int64[n], their frames on the device and in system memory.

        Returns: its answer, and bool[n], the pages that it carried.
        """
        mirror, space = self.mirror, self.mirror.space
        number = 0
        copy = Copy(addresses, pfns, None if etype is EventType.COPY_TO_DEVICE else np.zeros(pfns.size, np.bool_))
        if self.region.remote:
            number = self.last_copy = self.last_copy + 1
            self.copies[number] = copy
        entries = pte.pte_set_select(mirror.entries_on_device(homes))
        event = Event(
            operation_id=space.current.operation_id,
            space_id=space.id,
            revision=space.notifier.next_revision(),
            etype=etype,
            reason=None,
            cause=Cause.FORK if keeps else _CAUSES[etype],
            spans=spans_of(addresses),
            owner=mirror.device.id,
            entries=entries.astype("<u8", copy=False).tobytes(),
            initiator=mirror.id,
            copy=number,
            keeps=keeps,
        )
        try:
            dispatch: Dispatch = yield Deliver(event, (mirror.id,))
        finally:
            self.copies.pop(number, None)
        outcome = dispatch.delivery(mirror.id)
        carried = np.zeros(pfns.size, np.bool_)
        if number and outcome.state is EventState.ACKNOWLEDGED:
            if not outcome.errno:
                carried = np.frombuffer(outcome.results, np.uint8) == 0
                carried &= True if copy.filled is None else copy.filled
        elif copy.filled is not None:
            carried = copy.filled  # whoever brought a page and was lost before it answered has brought it
        return outcome, carried

    def read_copy(self, number: int, first: int, npages: int) -> bytes:
        """Bytes of pages on their way to the device; asked for when the device has stopped writing to them.

        From then on the mirror's entries of these pages do not permit writing.

        Args:
            number: `Event.copy`.
            first, npages: which of the event's pages.

        Raises:
            NoSuchObjectError: the copy has ended, or there is none of that number (ENOENT).
            InvalidRequestError: it has no such pages, or they come from the device (EINVAL).
        """
        addresses, pfns, filled = self._part(number, first, npages)
        if filled is not None:
            raise InvalidRequestError(f"read copy: copy {number} of {self.mirror} brings pages from the device")
        for span in spans_of(addresses):
            self.mirror.apply(span, pte.MASK_WRITE_PROTECT, on_device=False)
        data = self.mirror.space.frames.read_through(pfns, 0, pfns.size * PAGE_SIZE)
        self.mirror.counters["bytes_copied_to_device"] += len(data)
        return data

    def write_copy(self, number: int, first: int, data: bytes) -> None:
        """Bytes of pages that come back from the device.

        Args: as `read_copy`; `data` are whole pages.

        Raises:
            NoSuchObjectError: as `read_copy`.
            InvalidRequestError: it has no such pages, they go to the device, or a part of a page (EINVAL).
        """
        npages, rest = divmod(len(data), PAGE_SIZE)
        _, pfns, filled = self._part(number, first, npages)
        if filled is None or rest:
            raise InvalidRequestError(f"write copy: {len(data)} bytes for copy {number} of {self.mirror}")
        self.mirror.space.frames.scatter(pfns, np.frombuffer(data, np.uint8).reshape(-1, PAGE_SIZE))
        filled[:] = True
        self.mirror.counters["bytes_copied_from_device"] += len(data)

    def _part(self, number: int, first: int, npages: int) -> tuple[Entries, Pfns, Mask | None]:
        copy = self.copies.get(number)
        if copy is None:
            raise NoSuchObjectError(f"{self.mirror} carries no copy {number} at the moment", errnos.ENOENT)
        if first < 0 or npages < 1 or first + npages > copy.pfns.size:
            raise InvalidRequestError(
                f"copy {number} of {self.mirror} has {copy.pfns.size} pages, not {first}+{npages}"
            )
        part = slice(first, first + npages)
        return copy.addresses[part], copy.pfns[part], None if copy.filled is None else copy.filled[part]


_CAUSES = {EventType.COPY_TO_DEVICE: Cause.MIGRATE_TO_DEVICE, EventType.COPY_FROM_DEVICE: Cause.MIGRATE_TO_SYSTEM}
