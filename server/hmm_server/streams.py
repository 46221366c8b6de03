"""The open streams of events: which mirrors each one serves, what it was sent, what it has answered.

Every mirror is served by exactly one stream, named by its epoch.  When a stream ends, for whatever reason, its
mirrors are fenced at once: nobody is left who could stop their devices.  What the driver had to itself goes back at
once as well: pages that are exclusive to a mirror, pins.  Its mirrors and devices stay known for a lease and are then
removed.

**Invariants**: an event is sent to a mirror once and in the order of its sequence; an answer counts only when it is
the first to an event that was sent, on the stream that it was sent on; a stream's window is free again when it has
answered everything.

**Absent**: what is written when (mailbox.py), deadlines (executor.py), gRPC.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from hmm.commands_device import unregister_device, unregister_mirror
from hmm.commands_hmm import EXCLUSIVE_PAGES, detach, give_back_exclusive
from hmm.commands_process import unpin
from hmm.errors import InvalidRequestError, OutOfFramesError
from hmm.events import Delivery, Event, EventState
from hmm.machine import Caller, OperationRecord
from hmm.receiver import DeadlinePolicy
from hmm.units import DeviceId, MirrorId
from hmm_proto import convert
from hmm_proto.v1 import event_pb2, inspection_pb2
from hmm_server.answers import Answers, Plain, ServedMirror, Spans, Stream
from hmm_server.config import Config
from hmm_server.device_totals import Totals
from hmm_server.executor import Executor
from hmm_server.holds import Point
from hmm_server.logs import about
from hmm_server.mailbox import Mailbox, Posting, Window
from hmm_server.observers import Observers
from hmm_server.operation_log import Ended
from hmm_server.views import operation_status

PROTOCOL_VERSION = 1
REJECTIONS_KEPT = 256
"""Answers that were rejected and can be asked for."""
log = logging.getLogger(__name__)


class Streams:
    """All streams of one daemon, and the mirrors they serve."""

    def __init__(self, executor: Executor, observers: Observers, config: Config) -> None:
        self.executor = executor
        self.observers = observers
        self.config = config
        self.open: dict[int, Stream] = {}
        self.served: dict[MirrorId, ServedMirror] = {}
        self.totals = Totals(executor.machine, self.served)
        self.rejected = 0
        self.rejections: deque[tuple[Stream, event_pb2.ProtocolViolation, int]] = deque(maxlen=REJECTIONS_KEPT)
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
            )
        )
        log.info("%s is open", stream, extra=stream.fields)
        return stream

    def disconnect(self, stream: Stream, why: str) -> None:
        """A stream has ended: fence its mirrors, and forget what it held when its lease ends."""
        if not stream.open:
            return
        stream.open = False
        stream.mailbox.close(why)
        del self.open[stream.epoch]
        log.info("%s has ended: %s; it had %d mirrors", stream, why, len(stream.mirrors), extra=stream.fields)
        for mirror_id in stream.mirrors:
            self.executor.fence(mirror_id, f"{stream} has ended: {why}")
        for pin_id in list(stream.pins):
            self._start(stream.owner, stream.name, unpin, pin_id)
        stream.pins.clear()
        self.executor.pump()
        if stream.mirrors or stream.devices:
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
        """Look an open stream up by its epoch.

        Raises:
            InvalidRequestError: there is none, or it is not the caller's (EINVAL).
        """
        stream = self.open.get(epoch)
        if stream is None or stream.owner != owner:
            raise InvalidRequestError(f"epoch {epoch} names no stream that is open and yours")
        return stream

    def attach(self, stream: Stream, mirror_id: MirrorId) -> None:
        """Let a stream serve a mirror from now on."""
        receiver = self.executor.machine.receivers[mirror_id]
        self.served[mirror_id] = stream.mirrors[mirror_id] = ServedMirror(mirror_id, stream, receiver)

    def detach(self, mirror_id: MirrorId) -> None:
        """A mirror no longer exists."""
        served = self.served.get(mirror_id)
        if served is not None:
            self._free(mirror_id, list(served.outstanding))
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
            self.executor.start(partial(self._gone, mirror_id), owner, remove, mirror_id)
        for device_id in stream.devices:
            self.executor.start(lambda _: None, owner, unregister_device, device_id)

    def _gone(self, mirror_id: MirrorId, _: OperationRecord[None]) -> None:
        self.detach(mirror_id)

    # ---- events out: what the executor asks of a router

    def route(self, deliveries: Sequence[Delivery]) -> list[MirrorId]:
        """Post every event to the streams that serve its mirrors, once for each stream.

        Returns: the mirrors that no open stream serves.
        """
        unserved = []
        postings: list[tuple[Stream, Posting]] = []
        event: Event | None = None
        by_stream: dict[Stream, Posting] = {}
        for delivery in deliveries:
            mirror_id = delivery.mirror_id
            served = self.served.get(mirror_id)
            if served is None or not served.stream.open:
                unserved.append(mirror_id)
                continue
            if delivery.event is not event:  # those of one event come one after the other
                event = delivery.event
                by_stream = {}
            posting = by_stream.get(served.stream)
            if posting is None:
                posting = by_stream[served.stream] = self._posting(delivery)
                postings.append((served.stream, posting))
            posting.mirror_ids.append(mirror_id)
            posting.sequences.append(delivery.sequence)
        for stream, posting in postings:
            posting.remaining = len(posting.mirror_ids)
            stream.mailbox.post(posting)
        return unserved

    def _posting(self, delivery: Delivery) -> Posting:
        machine = self.executor.machine
        record = machine.operations[delivery.operation_id]
        space = machine.spaces.get(delivery.event.space_id)
        notifier_seq = space.notifier.sequence if space else 0
        return Posting(delivery.event, record.name, record.caller.name, notifier_seq, time.monotonic())

    def _send(self, posting: Posting) -> event_pb2.Event | None:
        # The mailbox calls this as the event leaves: from now on it can be answered.
        self._leave_out_settled(posting)
        if not posting.remaining:
            return None
        event = convert.event_to_proto(posting.event)
        event.mirror_ids.extend(posting.mirror_ids)
        event.event_sequences.extend(posting.sequences)
        event.caller = posting.caller
        event.operation = posting.operation
        event.notifier_seq = posting.notifier_seq
        posting.sent_s = time.monotonic()
        if self._has_deadline(posting.mirror_ids):
            left_s = posting.made_s + self.executor.acknowledgement_s - posting.sent_s
            event.deadline_ms = max(1, round(left_s * 1000))
        posting.size_bytes = event.ByteSize()
        spans, reason = posting.event.spans, posting.event.reason
        npages = sum([span.npages for span in spans])
        name = "" if reason is None else reason.name
        for mirror_id, sequence in zip(posting.mirror_ids, posting.sequences, strict=True):
            self.served[mirror_id].note_sent(sequence, posting, len(spans), npages, name)
        if self.executor.holds:
            self.executor.come_to(Point.EVENT_SENT, posting.event.operation_id, posting.mirror_ids)
        if self.executor.holds:
            self.executor.come_to(Point.EVENT_SENT, posting.event.operation_id, posting.mirror_ids)
        self.observers.publish(lambda: inspection_pb2.Observation(event=_without_entries(event)))
        return event

    def _leave_out_settled(self, posting: Posting) -> None:
        # A mirror that was fenced or unregistered while the event waited for the window.
        served, receivers = self.served, self.executor.machine.receivers
        pairs = [
            (mirror_id, sequence)
            for mirror_id, sequence in zip(posting.mirror_ids, posting.sequences, strict=True)
            if mirror_id in served and sequence in receivers[mirror_id].unanswered
        ]
        if len(pairs) == posting.remaining:
            return
        posting.mirror_ids = [mirror_id for mirror_id, _ in pairs]
        posting.sequences = [sequence for _, sequence in pairs]
        posting.remaining = len(pairs)

    def _has_deadline(self, mirror_ids: Iterable[MirrorId]) -> bool:
        mirrors = (self.executor.machine.receivers.get(mirror_id) for mirror_id in mirror_ids)
        return any(mirror is not None and mirror.policy is not DeadlinePolicy.BLOCK for mirror in mirrors)

    def settled(self, mirror_id: MirrorId, sequences: Sequence[int], state: EventState) -> None:
        """These events have ended without an answer.  Fenced ones free their part of the window."""
        if state is EventState.FENCED:
            self._free(mirror_id, sequences)
        for sequence in sequences:
            self.observers.publish(partial(_settled, mirror_id, sequence, state))

    def _free(self, mirror_id: MirrorId, sequences: Iterable[int]) -> None:
        served = self.served.get(mirror_id)
        for sequence in sequences:
            posting = served.outstanding.pop(sequence, None) if served else None
            if served and posting:
                posting.remaining -= 1
                if not posting.remaining:
                    served.stream.mailbox.release(posting)

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
        self.observers.publish(lambda: inspection_pb2.Observation(operation=operation_status(ended)))

    # ---- answers in

    def acknowledge(self, stream: Stream, message: event_pb2.Acknowledgements) -> list[event_pb2.ProtocolViolation]:
        """Take the answers of a driver.

        Returns: those that were rejected; the others count.
        """
        stream.heard_s = time.monotonic()
        violations = Answers(self.executor.machine, stream, self._answered, self._acknowledged).take(message)
        self.rejected += len(violations)
        self.rejections.extend((stream, violation, time.time_ns()) for violation in violations)
        for violation in violations:
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
            posting = served.outstanding.pop(sequence, None)
            if posting is None:
                continue
            if self.executor.holds:
                self.executor.come_to(Point.ACKNOWLEDGED, posting.event.operation_id, (served.id,))
            latency_s = now_s - posting.sent_s
            served.note_answer(sequence, latency_s, now_ns)
            posting.remaining -= 1
            if not posting.remaining:
                served.stream.mailbox.release(posting)
            if self.observers.watchers:
                self.observers.publish(
                    partial(_settled, served.id, sequence, EventState.ACKNOWLEDGED, errno, latency_s)
                )


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


def _without_entries(event: event_pb2.Event) -> event_pb2.Event:
    copy = event_pb2.Event()
    copy.CopyFrom(event)
    copy.entries = b""
    return copy
