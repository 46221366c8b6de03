"""Streams, the mirrors that each one serves, and what of these is told and answered together.

The mirrors of one stream that hear the same event are a `Group`: they are named in one message and mostly answered by
one.  What was sent to all of a group, and answered by all at once, is kept with the group and added to its mirrors'
own figures when somebody asks, or when the group is dropped.

**Invariants**: an event that left for one mirror alone is in `ServedMirror.alone` until it is answered, one for many in
`Stream.postings` until all have answered.

**Absent**: when groups are made and dropped (streams.py), which answers count (answers.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from hmm.dispatch import EVENTS_KEPT
from hmm.receiver import DeadlinePolicy, Receiver
from hmm.units import DeviceId, MirrorId
from hmm_proto.v1 import event_pb2
from hmm_server.mailbox import Mailbox, Posting
from hmm_server.traffic import Traffic


@dataclass(slots=True, eq=False)
class ServedMirror:
    """One mirror as its stream sees it.

    Attributes:
        receiver: the mirror itself.
        alone: events that left for it and no other mirror, and are not answered, by sequence.
        last_sent: the last event that left for it, as far as it is not with a group.
        own_traffic: what was not counted for a group.
        answered_ns: when the last events were answered, nanoseconds since 1970, by sequence; as far as it is not with
            a group.
    """

    id: MirrorId
    stream: Stream
    receiver: Receiver
    last_sent: int = 0
    alone: dict[int, Posting] = field(default_factory=dict)
    own_traffic: Traffic = field(default_factory=Traffic)
    rejected: int = 0
    answered_ns: dict[int, int] = field(default_factory=dict)

    @property
    def sent_up_to(self) -> int:
        """The last event that left for it."""
        return max([self.last_sent, *(group.last_sent(self.id) for group in self.groups)])

    @property
    def groups(self) -> list[Group]:
        """Those that it is in."""
        return [group for group in self.stream.groups if self.id in group.index]

    @property
    def outstanding(self) -> dict[int, Posting]:
        """The events that left for it and are not answered, by sequence, ascending."""
        found = dict(self.alone)
        for posting in self.stream.postings:
            if self.id in posting.waiting:
                found[posting.sequence_of(self.id)] = posting
        return {sequence: found[sequence] for sequence in sorted(found)}

    @property
    def traffic(self) -> Traffic:
        """All that was counted."""
        for group in self.groups:
            group.fold()
        return self.own_traffic

    def find(self, sequence: int) -> Posting | None:
        """An event that left and is not answered."""
        posting = self.alone.get(sequence)
        if posting is not None:
            return posting
        for posting in self.stream.postings:
            if self.id in posting.waiting and posting.sequence_of(self.id) == sequence:
                return posting
        return None

    def settle(self, sequence: int) -> Posting | None:
        """An event was answered, or will not be; its part of the window is free when all have.  Returns: the event."""
        posting = self.alone.pop(sequence, None) or self.find(sequence)
        if posting is None:
            return None
        posting.waiting.remove(self.id)
        if not posting.waiting:
            self.stream.release(posting)
        return posting

    def note_answer(self, sequence: int, seconds: float, now_ns: int) -> None:
        """Count one answer, that came so long after its event was sent; `now_ns` since 1970."""
        self.remember(sequence, now_ns)
        self.own_traffic.note_answer(seconds)

    def remember(self, sequence: int, answered_ns: int) -> None:
        """Note when an event was answered."""
        if len(self.answered_ns) >= EVENTS_KEPT:
            del self.answered_ns[next(iter(self.answered_ns))]
        self.answered_ns[sequence] = answered_ns

    def when_answered(self, sequence: int) -> int:
        """When an event was answered, nanoseconds since 1970; 0: that is not remembered."""
        times = [group.when_answered(self.id, sequence) for group in self.groups]
        return max([self.answered_ns.get(sequence, 0), *times])


class Group:
    """The mirrors of one stream that hear the same events.

    Attributes:
        is_whole: no other stream serves anybody who hears these events.
        index: where in `mirror_ids` each of them is.
        everybody: `mirror_ids` as a set.
        positions: where they are among all who hear it.
        encoded: `mirror_ids` as a part of a message.
        has_deadline: whether somebody's answers have one.
        traffic: what was counted for each of them, and is not in their own figures yet.
        sequences: of the last event that left for all of them, theirs in order; empty before the first.
        answered: the last events that all of them have answered at once: their sequences, and when.
    """

    __slots__ = (
        *("answered", "encoded", "everybody", "has_deadline", "index", "is_whole", "mirror_ids", "positions", "served"),
        *("sequences", "stream", "traffic"),
    )

    def __init__(self, stream: Stream, served: list[ServedMirror], positions: list[int], *, is_whole: bool) -> None:
        self.stream = stream
        self.served = served
        self.positions = positions
        self.is_whole = is_whole
        self.mirror_ids = [one.id for one in served]
        self.index = {mirror_id: position for position, mirror_id in enumerate(self.mirror_ids)}
        self.everybody = frozenset(self.mirror_ids)
        self.encoded = event_pb2.Event(mirror_ids=self.mirror_ids).SerializeToString()
        self.has_deadline = any(one.receiver.policy is not DeadlinePolicy.BLOCK for one in served)
        self.traffic = Traffic()
        self.sequences: Sequence[int] = ()
        self.answered: deque[tuple[Sequence[int], int]] = deque(maxlen=EVENTS_KEPT)

    @property
    def owes_alone(self) -> bool:
        """Whether one of them has still to answer an event that only it heard."""
        return any(one.alone for one in self.served)

    def last_sent(self, mirror_id: MirrorId) -> int:
        """The number that the last event for all has for one of them."""
        return self.sequences[self.index[mirror_id]] if self.sequences else 0

    def when_answered(self, mirror_id: MirrorId, sequence: int) -> int:
        """When all answered that event of one of them, nanoseconds since 1970; 0: that is not known."""
        position = self.index[mirror_id]
        return next((now_ns for sequences, now_ns in self.answered if sequences[position] == sequence), 0)

    def fold(self) -> None:
        """Add what was counted for all to the figures of each."""
        if self.traffic:
            for one in self.served:
                one.own_traffic.add(self.traffic)
            self.traffic = Traffic()

    def drop(self) -> None:
        """Leave everything that was noted for all with each."""
        self.fold()
        for position, one in enumerate(self.served):
            one.last_sent = max(one.last_sent, self.last_sent(one.id))
            for sequences, now_ns in self.answered:
                one.remember(sequences[position], now_ns)


@dataclass(slots=True, eq=False)
class Stream:
    """One open stream of events: a driver process.

    Attributes:
        epoch: names it; answers that name another are rejected.
        owner: the token of whoever opened it.
        postings: events that left for more than one mirror and are not answered by all, in order.
        groups: its mirrors by what they hear.
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
    postings: list[Posting] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    devices: list[DeviceId] = field(default_factory=list)
    pins: list[int] = field(default_factory=list)
    open: bool = True

    @property
    def fields(self) -> dict[str, object]:
        """Who it is, as `extra` of a log call."""
        return {"driver": self.name, "pid": self.pid}

    def __str__(self) -> str:
        return f"stream {self.epoch} ({self.name or 'unnamed'}, pid {self.pid})"

    def release(self, posting: Posting) -> None:
        """An event was answered by all: its part of the window is free again."""
        if len(posting.mirror_ids) > 1:
            self.postings.remove(posting)
        self.mailbox.release(posting)

    def drop_groups(self) -> None:
        """Who hears what together is no longer so."""
        for group in self.groups:
            group.drop()
        self.groups.clear()
        for posting in (*self.postings, *self.mailbox.events):
            posting.group = None
