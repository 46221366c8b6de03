"""The open streams of events: which mirrors each one serves, what it was sent, what it has answered.

Every mirror is served by exactly one stream, named by its epoch.  When a stream ends, for whatever reason, its
mirrors are fenced at once: nobody is left who could stop their devices.  What the driver had to itself goes back at
once as well: pages that are exclusive to a mirror or on their way, pins.  Its mirrors and devices stay known for a
lease and are then removed.

**Invariants**: an event is sent to a mirror once and in the order of its sequence; an answer counts only when it is
the first to an event that was sent, on the stream that it was sent on; a stream's window is free again when it has
answered everything.

**Absent**: what is written when (mailbox.py), deadlines (executor.py), when a silent driver is given up (leases.py),
gRPC.
"""

from __future__ import annotations

import asyncio
import errno as errnos
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from hmm.commands_device import unregister_device, unregister_mirror
from hmm.commands_hmm import EXCLUSIVE_PAGES, detach, give_back_exclusive
from hmm.commands_process import unpin
from hmm.dispatch import Audience, Dispatch
from hmm.errors import AccessDeniedError, InvalidRequestError, OutOfFramesError
from hmm.events import EventState, Reason
from hmm.operation_record import Caller, OperationRecord
from hmm.receiver import DeadlinePolicy
from hmm.units import DeviceId, MirrorId
from hmm_proto import convert, wire
from hmm_proto.v1 import event_pb2, inspection_pb2, session_pb2
from hmm_server.answers import Answers, Plain, Spans
from hmm_server.config import Config
from hmm_server.device_totals import Totals
from hmm_server.executor import Executor
from hmm_server.holds import Point
from hmm_server.leases import Leases
from hmm_server.logs import about
from hmm_server.mailbox import Mailbox, News, Posting, Window
from hmm_server.observers import Observers
from hmm_server.operation_log import Ended
from hmm_server.served import Group, ServedMirror, Stream
from hmm_server.views import operation_status

PROTOCOL_VERSION = 1
GROUPINGS_KEPT = 256
"""Audiences of which it is known which streams serve them."""
AGAIN_S = 0.1
"""Without a lease: how long after the first try a device that was in use is tried to be removed again."""
REJECTIONS_KEPT = 256
"""Answers that were rejected and can be asked for."""
_EVENT = wire.tag(session_pb2.SessionResponse, "events")
_ENTRIES = wire.tag(event_pb2.Event, "entries")
_REASONS = {reason: reason.name for reason in Reason}
log = logging.getLogger(__name__)


class Streams:
    """All streams of one daemon, and the mirrors they serve."""

    def __init__(self, executor: Executor, observers: Observers, config: Config) -> None:
        self.executor = executor
        self.observers = observers
        self.config = config
        self.open: dict[int, Stream] = {}
        self.served: dict[MirrorId, ServedMirror] = {}
        self.leases = Leases(executor.machine, config.holding_lease_s, self.open, self.disconnect, executor.pump)
        self.totals = Totals(executor.machine, self.served)
        self.rejected = 0
        self.rejections: deque[tuple[Stream, event_pb2.ProtocolViolation, int]] = deque(maxlen=REJECTIONS_KEPT)
        self._groups: dict[Audience, list[Group]] = {}
        self._departing: list[Mailbox] = []
        # A restarted daemon is an epoch change: its epochs start beyond all of the one before.
        self._epochs = itertools.count(time.time_ns() >> 10)
        self._loop = asyncio.get_running_loop()
        executor.router = self

    # ---- streams

    def connect(self, owner: str, name: str, pid: int, credit: int) -> Stream:
        """Open a stream.  Its first message is a Welcome.

        Raises:
            OutOfFramesError: too many streams (LIMIT).
        """
        if len(self.open) >= self.config.streams:
            raise OutOfFramesError(f"streams: the limit of {self.config.streams} is reached", reason="LIMIT")
        granted = min(credit or self.config.credit, self.config.credit)
        window = Window(granted, self.config.queue_bytes, self.config.part_bytes)
        stream = Stream(next(self._epochs), owner, name, pid, Mailbox(window, self._send), time.monotonic())
        self.open[stream.epoch] = stream
        stream.mailbox.welcome(
            event_pb2.Welcome(
                epoch=stream.epoch,
                credit=granted,
                queue_bytes=window.queue_bytes,
                message_bytes=self.config.message_bytes,
                acknowledgement_deadline_ms=round(self.executor.acknowledgement_s * 1000),
                protocol_version=PROTOCOL_VERSION,
                lease_ms=round(self.config.holding_lease_s * 1000),
            )
        )
        self.leases.watch()
        log.info("%s is open", stream, extra=stream.fields)
        return stream

    def disconnect(self, stream: Stream, why: str) -> None:
        """A stream has ended: fence its mirrors, and forget what it held when its lease ends."""
        if not stream.open:
            return
        self._drop_groups()
        stream.open = False
        stream.mailbox.close(why)
        del self.open[stream.epoch]
        log.info("%s has ended: %s; it had %d mirrors", stream, why, len(stream.mirrors), extra=stream.fields)
        for mirror_id in list(stream.mirrors):  # a call that waited for one may end here, and unregister it
            self.executor.fence(mirror_id, f"{stream} has ended: {why}")
        for pin_id in list(stream.pins):
            self._start(stream.owner, stream.name, unpin, pin_id)
        stream.pins.clear()
        self.executor.pump()
        if stream.mirrors or stream.devices:
            self._forget_later(stream)

    def _forget_later(self, stream: Stream) -> None:
        self._loop.call_later(self.config.lease_s, self._expire, stream)

    @contextmanager
    def connected(self, owner: str, name: str, pid: int, credit: int) -> Iterator[Stream]:
        """A stream that is open until the end of the block."""
        stream = self.connect(owner, name, pid, credit)
        try:
            yield stream
        finally:
            self.disconnect(stream, "its client has ended it")

    def find(self, epoch: int, owner: str) -> Stream:
        """Look an open stream up by its epoch, which is a sign of its driver.

        Raises:
            InvalidRequestError: there is none (EINVAL).
            AccessDeniedError: it belongs to another owner (EPERM).
        """
        stream = self.open.get(epoch)
        if stream is None:
            raise InvalidRequestError(f"epoch {epoch} names no stream that is open")
        if stream.owner != owner:
            raise AccessDeniedError(f"stream {epoch} belongs to another owner", errnos.EPERM, reason="NOT_OWNER")
        stream.heard_s = time.monotonic()
        return stream

    def attach(self, stream: Stream, mirror_id: MirrorId) -> None:
        """Let a stream serve a mirror from now on; a call that was held may have outlived its stream."""
        receiver = self.executor.machine.receivers[mirror_id]
        self._drop_groups()
        self.served[mirror_id] = stream.mirrors[mirror_id] = ServedMirror(mirror_id, stream, receiver)
        if not stream.open:
            self.executor.fence(mirror_id, f"{stream} has ended")
            self._forget_later(stream)

    def own(self, stream: Stream, device_id: DeviceId) -> None:
        """A device was registered on a stream, and goes with it."""
        stream.devices.append(device_id)
        if not stream.open:
            self._forget_later(stream)

    def hear(self, mirror_id: MirrorId, owner: str) -> None:
        """A call that came on no session names a mirror: a sign of the driver, if it comes from the same owner."""
        served = self.served.get(mirror_id)
        if served is not None and served.stream.owner == owner:
            served.stream.heard_s = time.monotonic()

    def detach(self, mirror_id: MirrorId) -> None:
        """A mirror no longer exists."""
        served = self.served.get(mirror_id)
        if served is not None:
            self._free(mirror_id, list(served.outstanding))
            self._drop_groups()
            self.totals.keep(served)
            del self.served[mirror_id]
            served.stream.mirrors.pop(mirror_id, None)

    def forget_device(self, device_id: DeviceId) -> None:
        """A device no longer exists."""
        for stream in self.open.values():
            if device_id in stream.devices:
                stream.devices.remove(device_id)

    def hold(self, stream: Stream, pin_id: int) -> None:
        """A pin lasts as long as this stream."""
        if stream.open:
            stream.pins.append(pin_id)
        else:
            self._start(stream.owner, stream.name, unpin, pin_id)

    def let_go(self, pin_id: int) -> None:
        """A pin no longer exists."""
        for stream in self.open.values():
            if pin_id in stream.pins:
                stream.pins.remove(pin_id)

    def holder(self, mirror_id: MirrorId, pin_id: int) -> Stream | None:
        """Whose the exclusive pages of a mirror are, or a pin; None when the stream has ended."""
        if mirror_id:
            served = self.served.get(mirror_id)
            return served.stream if served else None
        return next((stream for stream in self.open.values() if pin_id in stream.pins), None)

    def _start(self, owner: str, name: str, command: Callable[..., Any], number: int) -> None:
        if not self.executor.draining:
            self.executor.start(lambda _: None, Caller(owner, name), command, number)

    def _expire(self, stream: Stream) -> None:
        owner = Caller(stream.owner, stream.name)
        if self.executor.draining:
            return
        for mirror_id in list(stream.mirrors):
            remove = unregister_mirror if mirror_id in self.executor.machine.mirrors else detach
            self._remove(remove, mirror_id, owner, self.executor.machine.receivers, self.detach)
        for device_id in stream.devices:
            self._remove(unregister_device, device_id, owner, self.executor.machine.devices, self.forget_device)

    def _remove(
        self,
        remove: Callable[..., Any],
        number: int,
        owner: Caller,
        existing: Mapping[int, object],
        forget: Callable[[int], None],
    ) -> None:
        # It may be in use yet: a mirror by a migration that is about to end; a device by a mirror on another stream,
        # or by one that waits for its last callbacks.
        def ended(record: OperationRecord[None]) -> None:
            if record.error is None or number not in existing:
                forget(number)
                return
            again_s = max(self.config.lease_s, AGAIN_S)
            self._loop.call_later(again_s, self._remove, remove, number, owner, existing, forget)

        if not self.executor.draining:
            self.executor.start(ended, owner, remove, number)

    # ---- events out: what the executor asks of a router

    def route(self, dispatch: Dispatch, mirror_ids: Sequence[MirrorId]) -> list[MirrorId]:
        """Post an event to the streams that serve its mirrors, once for each stream.

        Args:
            mirror_ids: all of the audience, or those of them to whom it goes now.

        Returns: the mirrors that no open stream serves.
        """
        if len(mirror_ids) == 1:
            served = self.served.get(mirror_ids[0])
            if served is None or not served.stream.open:
                return [mirror_ids[0]]
            sequences = [dispatch.sequence_of(mirror_ids[0])]
            self._post(served.stream, Posting(self._news(dispatch), mirror_ids, sequences, dispatch))
            return []
        groups = self._groups_of(dispatch.audience) if mirror_ids is dispatch.audience.ids else None
        if groups is None:
            return self._route_some(dispatch, mirror_ids)
        news, sequences = self._news(dispatch), dispatch.sequences
        for group in groups:
            own = sequences if group.is_whole else [sequences[position] for position in group.positions]
            posting = Posting(news, group.mirror_ids, own, dispatch, group if len(own) > 1 else None)
            self._post(group.stream, posting)
        return []

    def _post(self, stream: Stream, posting: Posting) -> None:
        stream.mailbox.post(posting)
        self._departing.append(stream.mailbox)

    def depart(self) -> None:
        """Let leave what was posted: the drivers can go about it while the caller goes on."""
        departing, self._departing = self._departing, []
        for mailbox in departing:
            mailbox.begin()

    def _route_some(self, dispatch: Dispatch, mirror_ids: Sequence[MirrorId]) -> list[MirrorId]:
        unserved = []
        by_stream: dict[Stream, list[MirrorId]] = {}
        for mirror_id in mirror_ids:
            served = self.served.get(mirror_id)
            if served is None or not served.stream.open:
                unserved.append(mirror_id)
            else:
                by_stream.setdefault(served.stream, []).append(mirror_id)
        news = self._news(dispatch)
        for stream, its in by_stream.items():
            self._post(stream, Posting(news, its, [dispatch.sequence_of(mirror_id) for mirror_id in its], dispatch))
        return unserved

    def _groups_of(self, audience: Audience) -> list[Group] | None:
        """Those who hear an event, by stream; None when somebody is not served."""
        groups = self._groups.get(audience)
        if groups is not None:
            return groups
        by_stream: dict[Stream, list[int]] = {}
        for position, mirror_id in enumerate(audience.ids):
            served = self.served.get(mirror_id)
            if served is None or not served.stream.open:
                return None
            by_stream.setdefault(served.stream, []).append(position)
        if len(self._groups) >= GROUPINGS_KEPT:
            self._drop_groups()
        groups = self._groups[audience] = [
            Group(
                stream,
                [self.served[audience.ids[position]] for position in positions],
                positions,
                is_whole=len(by_stream) == 1,
            )
            for stream, positions in by_stream.items()
        ]
        for group in groups:
            group.stream.groups.append(group)
        return groups

    def _drop_groups(self) -> None:
        if self._groups:
            for stream in self.open.values():
                stream.drop_groups()
        self._groups.clear()

    def _news(self, dispatch: Dispatch) -> News:
        machine = self.executor.machine
        event, record = dispatch.event, machine.operations[dispatch.operation_id]
        space = machine.spaces.get(event.space_id)
        notifier_seq = space.notifier.sequence if space else 0
        return News(event, record.name, record.caller.name, notifier_seq, time.monotonic())

    def _send(self, posting: Posting) -> bytes | None:
        # The mailbox calls this as the event leaves: from now on it can be answered.
        assert posting.dispatch is not None
        if len(posting.dispatch.waiting) != len(posting.dispatch.sequences):
            self._leave_out_settled(posting, posting.dispatch)
            if not posting.mirror_ids:
                return None
        group, mirror_ids, news = posting.group, posting.mirror_ids, posting.news
        if not news.encoded:
            news.encoded = _encoded(news)
        own = event_pb2.Event()
        if group is None:
            own.mirror_ids.extend(mirror_ids)
        own.event_sequences.extend(posting.sequences)
        posting.sent_s = time.monotonic()
        if group.has_deadline if group is not None else self._has_deadline(mirror_ids):
            left_s = news.made_s + self.executor.acknowledgement_s - posting.sent_s
            own.deadline_ms = max(1, round(left_s * 1000))
        parts = [news.encoded, own.SerializeToString()]
        if group is not None:
            parts.append(group.encoded)
        entries = news.event.entries
        told = wire.message(_EVENT, *parts, *((_ENTRIES, wire.varint(len(entries)), entries) if entries else ()))
        posting.size_bytes = len(told)
        self._note_sent(posting)
        if self.executor.holds.placed:
            self.executor.come_to(Point.EVENT_SENT, news.event.operation_id, mirror_ids)
        if self.observers.watchers:
            event = event_pb2.Event.FromString(b"".join(parts))
            self.observers.publish(lambda: inspection_pb2.Observation(event=event))
        return told

    def _note_sent(self, posting: Posting) -> None:
        event, group, mirror_ids = posting.news.event, posting.group, posting.mirror_ids
        reason = "" if event.reason is None else _REASONS[event.reason]
        told = posting.size_bytes, len(event.spans), event.npages, reason
        posting.waiting = set(mirror_ids) if group is None else set(group.everybody)
        if group is not None:
            group.sequences = posting.sequences
            group.traffic.note_sent(*told)
            group.stream.postings.append(posting)
            return
        served = [self.served[mirror_id] for mirror_id in mirror_ids]
        for one, sequence in zip(served, posting.sequences, strict=True):
            one.last_sent = sequence
            one.own_traffic.note_sent(*told)
        if len(served) > 1:
            served[0].stream.postings.append(posting)
        else:
            served[0].alone[posting.sequences[0]] = posting

    def _leave_out_settled(self, posting: Posting, dispatch: Dispatch) -> None:
        # A mirror that was fenced or unregistered while the event waited for the window.
        if dispatch.waiting.issuperset(posting.mirror_ids):
            return
        served = self.served
        pairs = [
            (mirror_id, sequence)
            for mirror_id, sequence in zip(posting.mirror_ids, posting.sequences, strict=True)
            if mirror_id in served and sequence in served[mirror_id].receiver.unanswered  # abandoned ones included
        ]
        posting.mirror_ids = [mirror_id for mirror_id, _ in pairs]
        posting.sequences = [sequence for _, sequence in pairs]
        posting.group = None

    def _has_deadline(self, mirror_ids: Iterable[MirrorId]) -> bool:
        receivers = self.executor.machine.receivers
        for mirror_id in mirror_ids:
            mirror = receivers.get(mirror_id)
            if mirror is not None and mirror.policy is not DeadlinePolicy.BLOCK:
                return True
        return False

    def settled(self, mirror_id: MirrorId, sequences: Sequence[int], state: EventState) -> None:
        """These events have ended without an answer.  Fenced ones free their part of the window."""
        if state is EventState.FENCED:
            self._free(mirror_id, sequences)
        for sequence in sequences:
            self.observers.publish(partial(_settled, mirror_id, sequence, state))

    def _free(self, mirror_id: MirrorId, sequences: Iterable[int]) -> None:
        served = self.served.get(mirror_id)
        if served is not None:
            for sequence in sequences:
                served.settle(sequence)

    def lost(self, mirror_id: MirrorId, why: str) -> None:
        """A mirror was fenced: what it has to itself goes back."""
        mirror = self.executor.machine.receivers[mirror_id]
        if mirror.counters[EXCLUSIVE_PAGES]:
            self._start(mirror.owner, mirror.device.name, give_back_exclusive, mirror_id)
        self.observers.publish(
            lambda: inspection_pb2.Observation(mirror_lost=inspection_pb2.MirrorLost(mirror_id=mirror_id, why=why))
        )

    def ended(self, ended: Ended) -> None:
        """A call has ended."""
        if self.observers.watchers:
            self.observers.publish(lambda: inspection_pb2.Observation(operation=operation_status(ended)))

    # ---- answers in

    def acknowledge(self, stream: Stream, message: event_pb2.Acknowledgements) -> list[event_pb2.ProtocolViolation]:
        """Take the answers of a driver.

        Returns: those that were rejected; the others count.
        """
        answers = Answers(
            self.executor.machine, stream, self._answered, self._acknowledged, self._acknowledged_together
        )
        violations = answers.take(message)
        self.rejected += answers.rejected
        for violation in violations:
            self.rejections.append((stream, violation, time.time_ns()))
            log.warning(
                "%s: answer to event %d of mirror %d rejected: %s",
                *(stream, violation.event_sequence, violation.mirror_id, violation.rule),
                extra=stream.fields | about(mirror=self.executor.machine.receivers.get(violation.mirror_id)),
            )
        self.executor.pump()
        return violations

    def _answered(self, served: ServedMirror, sequence: int, errno: int, dirty: Spans, results: bytes) -> None:
        self.executor.answer(served.id, sequence, errno, dirty, results)
        self._note_answered([(served, sequence)], errno)

    def _acknowledged(self, plain: Plain) -> None:
        self.executor.acknowledge([(served.id, sequence) for served, sequence in plain])
        self._note_answered(plain, 0)

    def _note_answered(self, answers: Plain, errno: int) -> None:
        now_s, now_ns = time.monotonic(), time.time_ns()
        for served, sequence in answers:
            posting = served.settle(sequence)
            if posting is None:
                continue
            if self.executor.holds.placed:
                self.executor.come_to(Point.ACKNOWLEDGED, posting.event.operation_id, (served.id,))
            latency_s = now_s - posting.sent_s
            served.note_answer(sequence, latency_s, now_ns)
            if not self.observers.watchers:
                continue
            assert posting.dispatch is not None
            state = posting.dispatch.state_of(served.id)
            if state is not EventState.ABANDONED:  # which was told when it came about
                self.observers.publish(partial(_settled, served.id, sequence, state, errno, latency_s))

    def _acknowledged_together(self, posting: Posting) -> None:
        """All of a group have answered an event, which nobody had answered before."""
        group, dispatch = posting.group, posting.dispatch
        assert group is not None
        assert dispatch is not None
        self.executor.machine.acknowledge_together(dispatch.operation_id, group.mirror_ids)
        posting.waiting.clear()
        group.stream.release(posting)
        if self.executor.holds.placed:
            self.executor.come_to(Point.ACKNOWLEDGED, dispatch.operation_id, group.mirror_ids)
        latency_s = time.monotonic() - posting.sent_s
        group.traffic.note_answer(latency_s)
        group.answered.append((posting.sequences, time.time_ns()))
        if self.observers.watchers:
            for mirror_id, sequence in zip(group.mirror_ids, posting.sequences, strict=True):
                told = partial(_settled, mirror_id, sequence, EventState.ACKNOWLEDGED, 0, latency_s)
                self.observers.publish(told)


def _settled(
    mirror_id: MirrorId, sequence: int, state: EventState, errno: int = 0, latency_s: float = 0.0
) -> inspection_pb2.Observation:
    return inspection_pb2.Observation(
        settled=inspection_pb2.EventSettled(
            mirror_id=mirror_id,
            event_sequence=sequence,
            state=convert.event_state_to_proto(state),
            errno=errno,
            latency_us=round(latency_s * 1e6),
        )
    )


def _encoded(news: News) -> bytes:
    message = convert.event_to_proto(news.event, entries=False)
    message.caller, message.operation, message.notifier_seq = news.caller, news.operation, news.notifier_seq
    return message.SerializeToString()
