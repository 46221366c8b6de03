"""The answers of one message: which count, and which rule the others break.

**Invariants**: an answer counts only when it is the first to an event that was sent on this stream, and only while
the mirror lives; what an answer has to say is never covered by a plain one.

**Absent**: what an answer does (`Machine.answer`), and the window that it frees (streams.py).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from hmm.errors import HmmError
from hmm.machine import Machine
from hmm.receiver import MirrorState, Receiver
from hmm.sanitizer import EVENTS_KEPT
from hmm.units import AddressRange, DeviceId, MirrorId
from hmm_proto import convert
from hmm_proto.v1 import event_pb2
from hmm_server.mailbox import Mailbox, Posting

LATENCIES_KEPT = 1024
LATENCY_BOUNDS_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
"""Upper bounds of the buckets that latencies are counted in, seconds."""

Spans = tuple[AddressRange, ...]
Plain: TypeAlias = "list[tuple[ServedMirror, int]]"


@dataclass(slots=True, eq=False)
class ServedMirror:
    """One mirror as its stream sees it.

    Attributes:
        receiver: the mirror itself.
        sent_up_to: the last event that left for it.
        outstanding: events that left and are not answered, by sequence.
        latencies_s: from sending to answering, of the last events.
        latency_buckets: answers by latency: one for each of LATENCY_BOUNDS_S, and one for all beyond.
        answered_ns: when the last events were answered, nanoseconds since 1970, by sequence.
    """

    id: MirrorId
    stream: Stream
    receiver: Receiver
    sent_up_to: int = 0
    outstanding: dict[int, Posting] = field(default_factory=dict)
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=LATENCIES_KEPT))
    latency_count: int = 0
    latency_sum_s: float = 0.0
    latency_max_s: float = 0.0
    bytes_sent: int = 0
    ranges: int = 0
    pages: int = 0
    events_by_reason: Counter[str] = field(default_factory=Counter)
    rejected: int = 0
    latency_buckets: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BOUNDS_S) + 1))
    answered_ns: dict[int, int] = field(default_factory=dict)

    def note_sent(self, sequence: int, posting: Posting, nranges: int, npages: int, reason: str) -> None:
        """An event has left for this mirror."""
        self.sent_up_to = sequence
        self.outstanding[sequence] = posting
        self.bytes_sent += posting.size_bytes
        self.ranges += nranges
        self.pages += npages
        if reason:
            self.events_by_reason[reason] += 1

    def note_answer(self, sequence: int, seconds: float, now_ns: int) -> None:
        """Count one answer, that came so long after its event was sent; `now_ns` since 1970."""
        if len(self.answered_ns) >= EVENTS_KEPT:
            del self.answered_ns[next(iter(self.answered_ns))]
        self.answered_ns[sequence] = now_ns
        self.latency_buckets[bisect_left(LATENCY_BOUNDS_S, seconds)] += 1
        self.latencies_s.append(seconds)
        self.latency_count += 1
        self.latency_sum_s += seconds
        if seconds > self.latency_max_s:  # noqa: PLR1730 - max() would cost more than the rest
            self.latency_max_s = seconds


@dataclass(slots=True, eq=False)
class Stream:
    """One open stream of events: a driver process.

    Attributes:
        epoch: names it; answers that name another are rejected.
        owner: the token of whoever opened it.
        devices: registered on it: they go when its lease ends.
        pins: that it holds: they go with it.
        heard_s: when something was last heard of the driver, on the monotonic clock.
    """

    epoch: int
    owner: str
    name: str
    pid: int
    mailbox: Mailbox
    heard_s: float
    mirrors: dict[MirrorId, ServedMirror] = field(default_factory=dict)
    devices: list[DeviceId] = field(default_factory=list)
    pins: list[int] = field(default_factory=list)
    open: bool = True

    @property
    def fields(self) -> dict[str, object]:
        """Who it is, as `extra` of a log call."""
        return {"driver": self.name, "pid": self.pid}

    def __str__(self) -> str:
        return f"stream {self.epoch} ({self.name or 'unnamed'}, pid {self.pid})"


class Answers:
    """The answers of one message."""

    def __init__(
        self,
        machine: Machine,
        stream: Stream,
        answered: Callable[[ServedMirror, int, int, Spans, bytes], None],
        acknowledged: Callable[[Plain], None],
    ) -> None:
        """Prepare to take answers.

        Args:
            answered: does what an answer that counts does: mirror, event sequence, errno, dirty ranges, results.
            acknowledged: does it for all that say nothing but that the event was handled.
        """
        self._machine = machine
        self._stream = stream
        self._answered = answered
        self._acknowledged = acknowledged
        self._violations: list[event_pb2.ProtocolViolation] = []

    def take(self, message: event_pb2.Acknowledgements) -> list[event_pb2.ProtocolViolation]:
        """Take those that count.  Returns: the others."""
        if message.epoch not in (0, self._stream.epoch):
            self._reject(0, 0, f"epoch {message.epoch} is not this stream's, {self._stream.epoch}")
        elif len(message.mirror_ids) != len(message.acknowledged_up_to) or (
            len(message.single_mirror_ids) != len(message.single_sequences)
        ):
            self._reject(0, 0, "as many mirrors as event sequences are needed")
        else:
            self._take(message)
        return self._violations

    def _take(self, message: event_pb2.Acknowledgements) -> None:
        for answer in message.answers:
            self._take_answer(answer)
        plain: Plain = []
        for mirror_id, sequence in zip(message.single_mirror_ids, message.single_sequences, strict=True):
            if (served := self._find(mirror_id, sequence)) and self._is_enough(served, sequence, 0):
                plain.append((served, sequence))
        for mirror_id, up_to in zip(message.mirror_ids, message.acknowledged_up_to, strict=True):
            served = self._find(mirror_id, up_to)
            if served is None or not served.outstanding:
                continue
            for sequence, posting in served.outstanding.items():  # ascending
                if sequence > up_to:
                    break
                if not posting.event.copy:
                    plain.append((served, sequence))
        if plain:
            self._acknowledged(plain)

    def _take_answer(self, answer: event_pb2.Answer) -> None:
        served = self._find(answer.mirror_id, answer.event_sequence)
        if served is None:
            return
        try:
            dirty = convert.page_ranges_from_proto(answer.dirty) + convert.page_spans_from_proto(answer.dirty_pages)
        except HmmError as error:
            self._reject(answer.mirror_id, answer.event_sequence, error.message)
            return
        if answer.errno or self._is_enough(served, answer.event_sequence, len(answer.results)):
            self._answered(served, answer.event_sequence, answer.errno, dirty, answer.results)

    def _is_enough(self, served: ServedMirror, sequence: int, results: int) -> bool:
        # An event that asks for results is answered by as many, and by nothing less.
        posting = served.outstanding.get(sequence)
        wanted = posting.event.npages if posting is not None and posting.event.copy else 0
        if results == wanted or posting is None:
            return True
        served.rejected += 1
        self._reject(served.id, sequence, f"event {sequence} wants {wanted} results, and {results} came")
        return False

    def _find(self, mirror_id: MirrorId, sequence: int) -> ServedMirror | None:
        served = self._stream.mirrors.get(mirror_id)
        if served is None:
            self._reject(mirror_id, sequence, f"mirror {mirror_id} is not served by this stream")
            return None
        mirror = self._machine.receivers[mirror_id]
        if mirror.state is MirrorState.LOST:
            rule = f"DEVICE_LOST: {mirror} was fenced: {mirror.lost_because}"
        elif sequence > served.sent_up_to:
            rule = f"event {sequence} was never sent; the last one is {served.sent_up_to}"
        else:
            return served
        served.rejected += 1
        self._reject(mirror_id, sequence, rule)
        return None

    def _reject(self, mirror_id: MirrorId, sequence: int, rule: str) -> None:
        self._violations.append(event_pb2.ProtocolViolation(mirror_id=mirror_id, event_sequence=sequence, rule=rule))
