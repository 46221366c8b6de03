"""Who must hear of a change to an address space, and in what order things may happen.

One Notifier per address space.  It keeps five lists, all of them short and ordered by arrival:

    subscribers     mirrors (2015) and drivers with interval notifiers (today)
    invalidations   running changes: in the list from before the callbacks until after the edit
    faults          device faults that are filling a mirror (2015 only)
    copies          pages on their way between system memory and a device (2015 only)
    turns           calls that change VMAs, served one at a time, as under mmap_lock held for writing; and those that
                    need them to stay as they are, several at a time, as under mmap_lock held for reading

The conflict protocol of 2015: a device fault starts only when no overlapping invalidation runs; an invalidation
asks overlapping device faults to back off and waits until they are gone, and only then calls the drivers.  So for
any overlap the driver's update for the fault is complete before its update for the invalidation, or never happens.
A copy is waited for as a device fault is.  What changes pages without discarding them takes back first what is in the
memory of a device that has to hear of it: its driver frees that memory when it hears.

**Source**: linux-mm, "mmu_notifier: keep track of active invalidation ranges v3" and "HMM: add device page fault
support v3" (hmm_fault_start, hmm_event_backoff); today: mm/mmu_notifier.c, mn_itree_inv_start_range().

**Invariants**: an invalidation and a device fault that overlap are never past their start together; `active` equals
the number of invalidations; the sequence is odd exactly while one of them concerned a subscription.

**Absent**: transport, deadlines, and what an entry means.
"""

from __future__ import annotations

import errno as errnos
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

from hmm.dispatch import Audience, Dispatch, Past
from hmm.errors import HmmError, NoSuchObjectError, RangeBusyError, TimedOutError, WouldDeadlockError
from hmm.events import IS_INVALIDATION, TAKES, Cause, Event, EventState, EventType
from hmm.operation import AT_ONCE, Await, Current, Deliver, Operation, WaitFor
from hmm.pte import MASK_NONE
from hmm.spans import Spans, are_ascending, overlap
from hmm.subscriber import HasSpans, Subscriber
from hmm.units import ULONG_MAX, WHOLE_SPACE, Address, AddressRange, MirrorId, SpaceId

FILLED_SHIFT = 30
"""log2 of the size of the blocks that are told apart where mirrors have entries: 1 GiB."""


def filled_blocks(start: Address, end: Address) -> int:
    """The blocks of a range as bits, those 64 blocks apart as the same: without a bit in common nothing overlaps."""
    first, last = start >> FILLED_SHIFT, end - 1 >> FILLED_SHIFT
    if last - first >= 63:
        return ULONG_MAX
    return sum([1 << (block & 63) for block in range(first, last + 1)])


@dataclass(slots=True, eq=False)
class Breaking:
    """While the `with` block runs, an internal error of ours leaves these address spaces half edited, and unusable."""

    notifiers: Iterable[Notifier]
    what: str

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None:
            for notifier in self.notifiers:
                notifier.note_failure(self.what, error)


@dataclass(slots=True, eq=False)
class Invalidation:
    """One running change: made by `Notifier.invalidation`, in the list while its `with` block runs."""

    notifier: Notifier
    operation_id: int
    cause: Cause
    spans: Spans
    owner: int = 0
    blockable: bool = True
    certain: bool = False
    initiator: MirrorId = 0

    def __enter__(self) -> Self:
        self.notifier.invalidations.append(self)
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        notifier = self.notifier
        if error is not None:
            notifier.note_failure(f"{self.cause.value} of {self.spans[0]}", error)
        notifier.invalidations.remove(self)
        if not notifier.invalidations and notifier.sequence & 1:
            notifier.sequence += 1

    def deliver(self) -> Operation[None]:
        """Tell every subscriber concerned and wait for all answers.

        Raises:
            TimedOutError: a mirror whose policy is FAIL did not answer (ETIMEDOUT); nothing was changed yet.

        Cost: of mirrors of 2015, some 50 ns each, and what their tables hold of the ranges; of others a test each.
        """
        notifier = self.notifier
        return self._deliver() if notifier.subscribers or notifier.copies else AT_ONCE

    def _deliver(self) -> Operation[None]:
        notifier = self.notifier
        if notifier.copies:
            yield from notifier.wait_for_copies(self.spans)
        if not notifier.subscribers:
            return
        event = self._event()
        audience = notifier.audience(event)
        if audience is None:
            return
        if notifier.faults:
            yield from notifier.back_off(event.spans)
            audience = notifier.audience(event)
        if notifier.owing:
            yield from self._late_answers(event)
            audience = notifier.audience(event)
        if audience is not None and audience.homes and event.etype.pte_mask == MASK_NONE:
            yield from self._vacate(event)
            audience = notifier.audience(event)
        if notifier.revision != event.revision:
            event = self._event()  # numbered when it is sent, so that revisions ascend
        if audience is not None:
            notifier.mark(event, audience)
            yield from notifier.broadcast(event, audience, certain=self.certain)

    def _late_answers(self, event: Event) -> Operation[None]:
        # A death is told in the end even to those who owe an answer, and goes on when some have been told; everything
        # else is not told to anybody.
        notifier = self.notifier
        try:
            while owing := [one for one in notifier.listeners(event) if one.awaits_late_answer()]:
                yield Await(WaitFor.LATE_ANSWERS, notifier.space_id, event.spans, mirror_id=owing[0].id)
        except TimedOutError:
            if not self.certain:
                raise
        except WouldDeadlockError:
            if not notifier.closed:
                raise

    def _vacate(self, event: Event) -> Operation[None]:
        # Nothing can get into a device's memory meanwhile, as the range is busy; but copies back may have begun.
        notifier = self.notifier
        while True:
            listeners = notifier.listeners(event)
            fallible = not self.certain and any(listener.may_abandon for listener in listeners)
            homes = [one.home for one in listeners if one.home is not None]
            filled = [home for home in homes if home.has_pages(event.spans)]
            if notifier.copies_overlap(event.spans, self.operation_id):
                yield from notifier.wait_for_copies(event.spans)
            elif filled and (fallible or not self.cause.discards):
                yield from filled[0].vacate(event.spans)
            else:
                return

    def _event(self) -> Event:
        told = self.cause.told
        return Event(
            operation_id=self.operation_id,
            space_id=self.notifier.space_id,
            revision=self.notifier.next_revision(),
            etype=told.etype,
            reason=told.reason,
            cause=self.cause,
            spans=self.spans,
            owner=self.owner,
            blockable=self.blockable,
            initiator=self.initiator,
        )


@dataclass(slots=True, eq=False)
class DeviceFault:
    """One device fault that is filling a mirror; `backoff` asks it to stop and start over."""

    operation_id: int
    mirror_id: MirrorId
    target: HasSpans
    backoff: bool = False

    @property
    def spans(self) -> Spans:
        """The ranges that it fills."""
        return self.target.spans


@dataclass(slots=True, eq=False)
class Copying:
    """Pages on their way to or from a device: in the list while its `with` block runs.

    Attributes:
        backoff: somebody wants to change the range; what has not begun to copy gives way.
    """

    notifier: Notifier
    operation_id: int
    spans: Spans
    backoff: bool = False

    def __enter__(self) -> Self:
        self.notifier.copies.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.notifier.copies.remove(self)


@dataclass(slots=True, eq=False)
class Turn:
    """A call's place in the queue of those that change VMAs, and the ranges it is changing.

    Attributes:
        shared: it changes none, and several such calls have their turn together.
    """

    notifier: Notifier
    operation_id: int
    ticket: int
    spans: Spans = ()
    shared: bool = False

    def __enter__(self) -> Self:
        self.notifier.turns.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.notifier.turns.remove(self)

    def wait(self) -> Operation[None]:
        """Wait until all earlier calls are done."""
        notifier = self.notifier
        if notifier.turns[0] is self or notifier.is_turn(self.ticket):
            notifier.require_usable()
            return AT_ONCE
        return self._wait()

    def _wait(self) -> Operation[None]:
        yield Await(WaitFor.TURN, self.notifier.space_id, ticket=self.ticket)
        self.notifier.require_usable()

    def hold(self, *spans: AddressRange) -> None:
        """Keep faults out of these ranges until the call ends."""
        self.spans = spans if len(spans) == 1 else tuple(sorted(spans))


@dataclass(slots=True, eq=False, weakref_slot=True)
class Notifier:
    """The subscribers and running changes of one address space.

    Attributes:
        filled: the mirrors of 2015 whose tables ever had entries, so that an answer may mean something for them; and
            where, as `filled_blocks`.
        owing: the subscribers that owe the answer to an abandoned event.
        dispatches: events that are under way; of those for a single subscriber only invalidations.
        past: what took something from many at once.
    """

    space_id: SpaceId
    current: Current
    subscribers: dict[MirrorId, Subscriber] = field(default_factory=dict)
    filled: dict[MirrorId, int] = field(default_factory=dict)
    owing: set[MirrorId] = field(default_factory=set)
    dispatches: list[Dispatch] = field(default_factory=list)
    past: Past[Dispatch] = field(default_factory=Past)
    invalidations: list[Invalidation] = field(default_factory=list)
    faults: list[DeviceFault] = field(default_factory=list)
    copies: list[Copying] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    revision: int = 0
    sequence: int = 2
    closed: bool = False
    broken: str = ""
    _tickets: int = 0
    _everybody: Audience | None = None
    _some: Audience | None = None
    _asks: bool = False
    _told_revision: int = 0

    def note_failure(self, what: str, error: BaseException) -> None:
        """A change has ended with an error; one that is a bug of ours leaves the address space half edited."""
        if not isinstance(error, (HmmError, GeneratorExit)):
            self.broken = f"{what} failed half-way: {error!r}"

    def require_usable(self) -> None:
        """Raise when the space has gone (ESRCH), or stop at once when an internal error left it half edited."""
        if self.closed:
            raise NoSuchObjectError(f"address space {self.space_id} is gone: its last process exited")
        assert not self.broken, f"address space {self.space_id} is broken: {self.broken}"

    # ---- subscribers

    def subscribe(self, subscriber: Subscriber) -> None:
        """From now on this one hears of changes."""
        self.subscribers[subscriber.id] = subscriber
        self._forget_audiences()

    def unsubscribe(self, mirror_id: MirrorId) -> None:
        """It hears nothing any more."""
        self.subscribers.pop(mirror_id, None)
        self.filled.pop(mirror_id, None)
        self._forget_audiences()

    def listeners(self, event: Event) -> list[Subscriber]:
        """Those who have to hear of `event`, in order of registration."""
        return [subscriber for subscriber in self.subscribers.values() if subscriber.hears(event)]

    def audience(self, event: Event) -> Audience | None:
        """As `listeners`, None for nobody.  Cost: O(1) where all are mirrors of 2015, and none of them asked for it."""
        everybody = self._everybody
        if everybody is None:
            if not self.subscribers:
                return None
            everybody = self._everybody = Audience(tuple(self.subscribers.values()))
            self._asks = any(subscriber.is_selective for subscriber in self.subscribers.values())
        if not self._asks and event.initiator not in everybody.index:
            return everybody if everybody.receivers[0].hears(event) else None
        listeners = tuple(self.listeners(event))
        if listeners == everybody.receivers:
            return everybody
        if self._some is None or self._some.receivers != listeners:
            if self._some is not None:
                self._some.fold()
            self._some = Audience(listeners) if listeners else None
        return self._some

    def audience_named(self, mirror_ids: tuple[MirrorId, ...]) -> Audience | None:
        """The one that `audience` gave last, if these are its `ids`."""
        return next((one for one in (self._everybody, self._some) if one is not None and one.ids is mirror_ids), None)

    def fold(self) -> None:
        """Add what was counted for all of an audience to the counters of each."""
        for audience in (self._everybody, self._some):
            if audience is not None:
                audience.fold()

    def _forget_audiences(self) -> None:
        self.fold()
        self._everybody = self._some = None

    # ---- events

    def note_sent(self, dispatch: Dispatch) -> None:
        """An event is on its way."""
        event = dispatch.event
        if event.space_id == self.space_id:
            assert event.revision > self._told_revision, f"revision {event.revision} after {self._told_revision}"
            self._told_revision = event.revision
        if len(dispatch.sequences) > 1:
            self.dispatches.append(dispatch)
            if TAKES[event.etype]:
                self.past.add(dispatch)
        elif IS_INVALIDATION[event.etype]:
            self.dispatches.append(dispatch)

    # ---- invalidations

    def invalidation(
        self,
        spans: Spans,
        cause: Cause,
        *,
        owner: int = 0,
        initiator: MirrorId = 0,
        blockable: bool = True,
        certain: bool = False,
    ) -> Invalidation:
        """Bracket a change: `deliver()` inside it, then edit; the range is busy from here to the end of the block.

        Args:
            owner, initiator: the device whose own migration or exclusive access this is, and its mirror.
            certain: the change cannot be taken back (exit): whatever a mirror's policy, it goes on.
        """
        return Invalidation(self, self.current.operation_id, cause, spans, owner, blockable, certain, initiator)

    def mark(self, event: Event, audience: Audience) -> None:
        """Make the sequence odd if a subscription hears of it: from now on its read sections must be repeated."""
        if event.reason is not None and audience.selective:
            self.sequence |= 1

    def back_off(self, spans: Spans) -> Operation[None]:
        """Ask overlapping device faults to give way, and wait until none is left."""
        while self.faults_overlap(spans):
            for fault in self.faults:
                if overlap(fault.spans, spans):
                    fault.backoff = True
            yield Await(WaitFor.FAULTS, self.space_id, spans)

    def broadcast(self, event: Event, audience: Audience, *, certain: bool = False) -> Operation[None]:
        """Send one event to all of an audience, wait for all, settle all; then end those whose own error is their end.

        Those who have only started are called again, when all have started, in the order in which they were told.

        Raises:
            RangeBusyError: one refused an event that may not block (EAGAIN); the others have given up the ranges.
        """
        dispatch: Dispatch = yield Deliver(event, audience.ids)
        if self.filled and event.spans:
            self._settle_plain(dispatch)
        if dispatch.outcomes:
            yield from self._take_outcomes(dispatch, certain=certain)

    def _settle_plain(self, dispatch: Dispatch) -> None:
        # Those who had no more to say than that they are done.  Of many most have nothing there.
        told, outcomes, spans = dispatch.audience.index, dispatch.outcomes, dispatch.event.spans
        changed, looks = filled_blocks(spans[0].start, spans[-1].end), len(told) > 1
        for mirror_id in [mirror_id for mirror_id, filled in self.filled.items() if filled & changed]:
            if mirror_id not in told or mirror_id in outcomes:
                continue
            subscriber = self.subscribers[mirror_id]
            if not looks or subscriber.holds(spans):
                subscriber.settle(dispatch.delivery(mirror_id))

    def _take_outcomes(self, dispatch: Dispatch, *, certain: bool) -> Operation[None]:
        event, deliveries = dispatch.event, dispatch.in_order()
        killed: list[MirrorId] = []
        abandoned: list[MirrorId] = []
        refused: list[MirrorId] = []
        for delivery in deliveries:
            subscriber = self.subscribers.get(delivery.mirror_id)
            if delivery.state is EventState.REFUSED:
                refused.append(delivery.mirror_id)
            if delivery.state is EventState.ABANDONED and not certain:
                abandoned.append(delivery.mirror_id)
            elif subscriber is not None and not subscriber.settle(delivery):
                killed.append(delivery.mirror_id)
        unfinished = tuple([delivery.mirror_id for delivery in deliveries if delivery.unfinished])
        if unfinished:
            late = yield from self._finish(event, unfinished)
            abandoned += [] if certain else late
            killed = [mirror_id for mirror_id in killed if mirror_id in self.subscribers]  # or lost meanwhile
        if killed and event.cause is not Cause.EXIT:  # which ends all of them
            yield from self.end(tuple(killed), event.operation_id)
        if refused:
            raise RangeBusyError(
                f"{event.what}: mirror {refused[0]} cannot give up {event.spans[0]} at once; those that could have "
                "done so",
                errnos.EAGAIN,
            )
        if abandoned:
            raise TimedOutError(
                f"{event.what}: mirror {abandoned[0]} did not acknowledge {event.spans[0]} in time; its policy is FAIL "
                "and nothing was changed"
            )

    def _finish(self, event: Event, mirror_ids: tuple[MirrorId, ...]) -> Operation[list[MirrorId]]:
        """The second pass: mn_itree_finish_pass().  Returns: those that have not finished in time."""
        living = tuple([mirror_id for mirror_id in mirror_ids if mirror_id in self.subscribers])
        if not living:
            return []
        second = event._replace(revision=self.next_revision(), finishes=event.revision)
        dispatch: Dispatch = yield Deliver(second, living)
        for delivery in dispatch.deliveries():
            subscriber = self.subscribers.get(delivery.mirror_id)
            if subscriber is not None:
                subscriber.settle(delivery)
        return [outcome.mirror_id for outcome in dispatch.in_order() if outcome.state is EventState.ABANDONED]

    def end(self, mirror_ids: tuple[MirrorId, ...], operation_id: int, *, certain: bool = True) -> Operation[None]:
        """End subscribers: MUNMAP of everything, which they answer while they still have it, then `release`.

        Those who are lost or ended by somebody else meanwhile are not told `release`.

        Args:
            certain: they end even if their policy is FAIL and they do not answer in time.

        Raises:
            TimedOutError: it is not certain, and one of them did not answer MUNMAP (ETIMEDOUT): none has ended.

        Source: hmm_mirror_kill().
        """
        event = Event(operation_id, self.space_id, self.next_revision(), EventType.MUNMAP, None, None, (WHOLE_SPACE,))
        dispatch: Dispatch = yield Deliver(event, mirror_ids)
        killed: list[MirrorId] = []
        deliveries = dispatch.deliveries()
        if not certain and any(delivery.state is EventState.ABANDONED for delivery in deliveries):
            raise TimedOutError(f"mirror {mirror_ids[0]} did not answer in time that it stops; its policy is FAIL")
        for delivery in deliveries:
            subscriber = self.subscribers.get(delivery.mirror_id)
            if subscriber is not None:
                subscriber.settle(delivery)
                subscriber.kill()
                killed.append(delivery.mirror_id)
        if killed:
            yield Deliver(self.release_event(operation_id), tuple(killed))

    def release_event(self, operation_id: int) -> Event:
        """The `release` callback: stop everything that uses this address space."""
        return Event(operation_id, self.space_id, self.next_revision(), EventType.RELEASE, None, None, ())

    def next_revision(self) -> int:
        """Number the next change of this address space."""
        self.revision += 1
        return self.revision

    # ---- device faults

    def note_filling(self, mirror_id: MirrorId, span: AddressRange) -> None:
        """A mirror's table is about to get entries: from now on what it hears of may concern them."""
        start, behind = span.start >> FILLED_SHIFT, span.end - 1 >> FILLED_SHIFT
        blocks = 1 << (start & 63) if start == behind else filled_blocks(span.start, span.end)
        self.filled[mirror_id] = self.filled.get(mirror_id, 0) | blocks

    def start_fault(self, mirror_id: MirrorId, target: HasSpans) -> DeviceFault:
        """Enlist a device fault; the caller has seen that nothing overlaps, and yields nothing in between."""
        assert not self.invalidations or not self.invalidations_overlap(target.spans)
        fault = DeviceFault(self.current.operation_id, mirror_id, target)
        self.faults.append(fault)
        return fault

    def end_fault(self, fault: DeviceFault) -> None:
        """Delist a device fault."""
        self.faults.remove(fault)

    # ---- copies

    def copying(self, spans: Spans) -> Copying:
        """Keep changes away from pages while they are copied: whoever delivers an event for them waits."""
        return Copying(self, self.current.operation_id, spans)

    def wait_for_copies(self, spans: Spans) -> Operation[None]:
        """Wait until no page of `spans` is being copied by another operation."""
        mine = self.current.operation_id
        while self.copies_overlap(spans, mine):
            for copying in self.copies:
                copying.backoff |= overlap(copying.spans, spans)
            yield Await(WaitFor.COPIES, self.space_id, spans, ticket=mine)

    # ---- turns

    def turn(self, *, shared: bool = False) -> Turn:
        """A call that changes VMAs: it is in the queue while its `with` block runs, however that ends.

        Args:
            shared: it needs VMAs to stay as they are, and may run beside others that do; they queue as the kernel's
                readers do, so that whoever changes VMAs gets his turn.  Source: kernel/locking/rwsem.c.
        """
        self._tickets += 1
        return Turn(self, self.current.operation_id, self._tickets, shared=shared)

    def wait_for_edits(self, spans: Spans) -> Operation[None]:
        """Wait until no call is changing the VMAs of these ranges; faults start with this."""
        while self.edits_overlap(spans, self.current.operation_id):
            yield Await(WaitFor.EDITS, self.space_id, spans)
        self.require_usable()

    # ---- conditions, for whoever resumes operations

    def faults_overlap(self, spans: Spans) -> bool:
        """True while a device fault fills a part of `spans`."""
        return bool(self.faults) and any(overlap(fault.spans, spans) for fault in self.faults)

    def copies_overlap(self, spans: Spans, operation_id: int = 0) -> bool:
        """True while a part of `spans` is being copied by another operation than `operation_id`."""
        return bool(self._copies(spans, operation_id))

    def _copies(self, spans: Spans, operation_id: int) -> list[int]:
        others = [copying for copying in self.copies if copying.operation_id != operation_id]
        return [copying.operation_id for copying in others if overlap(copying.spans, spans)]

    def invalidations_overlap(self, spans: Spans) -> bool:
        """True while a part of `spans` is being invalidated."""
        return bool(self.invalidations) and any(overlap(running.spans, spans) for running in self.invalidations)

    def edits_overlap(self, spans: Spans, operation_id: int = 0) -> bool:
        """True while the call whose turn it is, if it is another than `operation_id`, changes a part of `spans`."""
        return bool(self.turns) and self.turns[0].operation_id != operation_id and overlap(self.turns[0].spans, spans)

    def is_turn(self, ticket: int) -> bool:
        """True when the call with this ticket has to wait for none before it in the queue."""
        if self.turns[0].ticket == ticket:
            return True
        turn = next(turn for turn in self.turns if turn.ticket == ticket or not turn.shared)
        return turn.ticket == ticket and turn.shared

    def _before(self, ticket: int) -> list[int]:
        """The operations before a call in the queue that it has to wait for."""
        shared = next(turn.shared for turn in self.turns if turn.ticket == ticket)
        return [turn.operation_id for turn in self.turns if turn.ticket < ticket and not (shared and turn.shared)]

    def is_ready(self, request: Await) -> bool:
        """Whether an operation that waits for `request` may go on."""
        match request.wait_for:
            case WaitFor.TURN:
                return self.is_turn(request.ticket)
            case WaitFor.SEQUENCE:
                return self.sequence != request.ticket
            case WaitFor.LATE_ANSWERS:
                subscriber = self.subscribers.get(request.mirror_id)
                return subscriber is None or not subscriber.awaits_late_answer()
            case _:
                return not self.blockers(request)

    def blockers(self, request: Await) -> list[int]:  # noqa: PLR0911 - one for each condition
        """The operations that `request` waits for, in order of arrival."""
        match request.wait_for:
            case WaitFor.FAULTS:
                return [f.operation_id for f in self.faults if overlap(f.spans, request.spans)]
            case WaitFor.INVALIDATIONS:
                return [i.operation_id for i in self.invalidations if overlap(i.spans, request.spans)]
            case WaitFor.SETTLED:
                told = self.subscribers.get(request.mirror_id)
                return told.settling(request.spans) if told else []
            case WaitFor.EDITS:
                return [self.turns[0].operation_id] if self.edits_overlap(request.spans) else []
            case WaitFor.TURN:
                return self._before(request.ticket)
            case WaitFor.SEQUENCE:
                return [running.operation_id for running in self.invalidations]
            case WaitFor.COPIES:
                return self._copies(request.spans, request.ticket)
            case _:
                return []

    @property
    def holders(self) -> set[int]:
        """The operations that others may have to wait for."""
        return (
            {turn.operation_id for turn in self.turns}
            | {running.operation_id for running in self.invalidations}
            | {fault.operation_id for fault in self.faults}
            | {copying.operation_id for copying in self.copies}
        )

    def check(self) -> None:
        """Assert that what is compared with others is in the form that this takes."""
        for running in self.invalidations:
            assert are_ascending(running.spans), running
        for turn in self.turns:
            assert are_ascending(turn.spans), turn
