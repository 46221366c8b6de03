"""The answers of one message: which count, and which rule the others break.

**Invariants**: an answer counts only when it is the first to an event that was sent on this stream, and only while
the mirror lives; what an answer has to say is never covered by a plain one.

**Absent**: what an answer does (`Machine.answer`), and the window that it frees (streams.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from hmm.errors import HmmError
from hmm.machine import Machine
from hmm.receiver import MirrorState
from hmm.units import AddressRange, MirrorId
from hmm_proto import convert
from hmm_proto.v1 import event_pb2
from hmm_server.mailbox import Posting
from hmm_server.served import ServedMirror, Stream

ANSWERS_MAX = 1 << 16
"""Answers in one message, and the ranges in them."""
REJECTIONS_TOLD = 64
"""Rejected answers of one message that are told one by one."""
Spans = tuple[AddressRange, ...]
Plain: TypeAlias = list[tuple[ServedMirror, int]]


class Answers:
    """The answers of one message.

    Attributes:
        rejected: how many do not count.
    """

    def __init__(
        self,
        machine: Machine,
        stream: Stream,
        answered: Callable[[ServedMirror, int, int, Spans, bytes], None],
        acknowledged: Callable[[Plain], None],
        together: Callable[[Posting], None],
    ) -> None:
        """Prepare to take answers.

        Args:
            answered: does what an answer that counts does: mirror, event sequence, errno, dirty ranges, results.
            acknowledged: does it for all that say nothing but that the event was handled.
            together: does it for an event that all of a group say this of.
        """
        self._machine = machine
        self._stream = stream
        self._answered = answered
        self._acknowledged = acknowledged
        self._together = together
        self.rejected = 0
        self._violations: list[event_pb2.ProtocolViolation] = []

    def take(self, message: event_pb2.Acknowledgements) -> list[event_pb2.ProtocolViolation]:
        """Take those that count.  Returns: the others."""
        # Read once: protobuf makes an object for each look at an array, as long as nobody has one.
        mirror_ids, marks = message.mirror_ids, message.acknowledged_up_to
        single_ids, singles = message.single_mirror_ids, message.single_sequences
        if message.epoch not in (0, self._stream.epoch):
            self._reject(0, 0, f"epoch {message.epoch} is not this stream's, {self._stream.epoch}")
        elif len(mirror_ids) != len(marks) or len(single_ids) != len(singles):
            self._reject(0, 0, "as many mirrors as event sequences are needed")
        elif message.ByteSize() > ANSWERS_MAX and (number := _size(message)) > ANSWERS_MAX:
            self._reject(0, 0, f"{number} answers and ranges are more than {ANSWERS_MAX} at a time; none was taken")
        else:
            for answer in message.answers:
                self._take_answer(answer)
            plain = self._singles(single_ids, singles) if single_ids else []
            self._take_marks(mirror_ids[:], marks[:], plain)
            if plain:
                self._acknowledged(plain)
        if self.rejected > REJECTIONS_TOLD:
            more = f"{self.rejected - REJECTIONS_TOLD} more answers of the same message were rejected"
            self._violations.append(event_pb2.ProtocolViolation(rule=more))
        return self._violations

    def _singles(self, mirror_ids: Sequence[MirrorId], sequences: Sequence[int]) -> Plain:
        """Those that are told by number."""
        plain: Plain = []
        for mirror_id, sequence in zip(mirror_ids, sequences, strict=True):
            if (served := self._find(mirror_id, sequence)) and self._is_enough(served, sequence, 0):
                plain.append((served, sequence))
        return plain

    def _take_marks(self, mirror_ids: list[MirrorId], marks: list[int], plain: Plain) -> None:
        """Those below marks: take what many have answered together, and add the rest to `plain`."""
        taken = 0
        while self._stream.postings and taken < len(mirror_ids):
            together = self._take_together(mirror_ids, marks, taken)
            if not together:
                break
            taken += together
        for mirror_id, up_to in zip(mirror_ids[taken:], marks[taken:], strict=True):
            served = self._find(mirror_id, up_to)
            if served is None:
                continue
            outstanding = served.outstanding if self._stream.postings else served.alone
            for sequence, posting in outstanding.items():  # ascending
                if sequence > up_to:
                    break
                if not posting.news.event.copy:
                    plain.append((served, sequence))

    def _take_together(self, mirror_ids: list[MirrorId], marks: list[int], first: int) -> int:
        """Take what is usual of an event that many have heard: all of a group have finished it, and all before it.

        Returns: how many of the marks, from `first` on, were taken.
        """
        earlier: list[Posting] = []
        for posting in self._stream.postings:
            group = posting.group
            number = len(group.mirror_ids) if group is not None else 0
            if group is None or mirror_ids[first : first + number] != group.mirror_ids:
                earlier.append(posting)
            elif (
                marks[first : first + number] != posting.sequences
                or len(posting.waiting) != number
                or posting.event.copy
                or not posting.is_awaited
                or not all(other.waiting.isdisjoint(group.everybody) for other in earlier)
                or (self._stream.mailbox.in_flight > len(self._stream.postings) and group.owes_alone)
            ):
                return 0
            else:
                self._together(posting)
                return number
        return 0

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
        posting = served.find(sequence)
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
        mirror = served.receiver
        if mirror_id not in self._machine.receivers:
            rule = f"{mirror} is unregistered"
        elif mirror.state is MirrorState.LOST:
            rule = f"DEVICE_LOST: {mirror} was fenced: {mirror.lost_because}"
        elif sequence > served.last_sent and sequence > served.sent_up_to:
            rule = f"event {sequence} was never sent; the last one is {served.sent_up_to}"
        else:
            return served
        served.rejected += 1
        self._reject(mirror_id, sequence, rule)
        return None

    def _reject(self, mirror_id: MirrorId, sequence: int, rule: str) -> None:
        self.rejected += 1
        if self.rejected <= REJECTIONS_TOLD:
            violation = event_pb2.ProtocolViolation(mirror_id=mirror_id, event_sequence=sequence, rule=rule)
            self._violations.append(violation)


def _size(message: event_pb2.Acknowledgements) -> int:
    # Each takes more than a byte.
    ranges = sum([len(answer.dirty.starts) for answer in message.answers])
    return len(message.mirror_ids) + len(message.single_mirror_ids) + len(message.answers) + ranges
