"""Answers on their way: what a session's drivers have finished and the daemon has not yet been told.

Plain answers are packed: per mirror a mark "everything up to here", and single numbers above it.  Answers that say
more (an errno, dirty pages) are messages of their own, and a mark never runs over one of the same batch: the daemon
takes the first answer to an event, and that must be the one that says more.

**Source**: proto/hmm_proto/v1/event.proto, Acknowledgements.

**Invariants**: every event is answered in the batch after it was finished, and its first answer says all of it; a
mirror's mark only rises.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hmm.units import MirrorId
from hmm_proto.v1 import event_pb2


@dataclass(slots=True, eq=False)
class _Mirror:
    """What one mirror has finished.

    Attributes:
        mark: everything up to it is finished.
        told: the mark that the daemon knows.
        above: what is finished above the mark.
        singles: of these, and of repeats, what is to be told.
        answered: events whose own answer is to be told.
    """

    mark: int = 0
    told: int = 0
    above: set[int] = field(default_factory=set)
    singles: list[int] = field(default_factory=list)
    answered: list[int] = field(default_factory=list)


class AcknowledgementLedger:
    """The answers of one session."""

    def __init__(self) -> None:
        self._mirrors: dict[MirrorId, _Mirror] = {}
        self._touched: dict[MirrorId, _Mirror] = {}
        self._answers: list[event_pb2.Answer] = []

    def __bool__(self) -> bool:
        return bool(self._touched)

    def done(self, mirror_id: MirrorId, sequence: int, answer: event_pb2.Answer | None = None) -> None:
        """Note that a mirror has finished an event, and with `answer` what else it has to say.

        Saying it again does no harm.
        """
        mirror = self._mirrors.get(mirror_id)
        if mirror is None:
            mirror = self._mirrors[mirror_id] = _Mirror()
        self._touched[mirror_id] = mirror
        if sequence == mirror.mark + 1 and answer is None and not mirror.above:
            mirror.mark = sequence  # most are: in order, with nothing to say
            return
        if answer is not None:
            mirror.answered.append(sequence)
            self._answers.append(answer)
        elif sequence != mirror.mark + 1:
            mirror.singles.append(sequence)
        if sequence > mirror.mark:
            mirror.above.add(sequence)
            while mirror.mark + 1 in mirror.above:
                mirror.mark += 1
                mirror.above.discard(mirror.mark)

    def take(self) -> event_pb2.Acknowledgements:
        """Everything that was noted since the last time, as one message."""
        message = event_pb2.Acknowledgements(answers=self._answers)
        mirror_ids, marks = [], []
        for mirror_id, mirror in self._touched.items():
            mark = mirror.mark
            if mirror.singles or mirror.answered:
                mark = min(mark, min(mirror.answered, default=mark + 1) - 1)
                self._take_singles(message, mirror_id, mirror, mark)
            if mark > mirror.told:
                mirror.told = mark
                mirror_ids.append(mirror_id)
                marks.append(mark)
        message.mirror_ids.extend(mirror_ids)
        message.acknowledged_up_to.extend(marks)
        self._touched.clear()
        self._answers.clear()
        return message

    @staticmethod
    def _take_singles(message: event_pb2.Acknowledgements, mirror_id: MirrorId, mirror: _Mirror, mark: int) -> None:
        # The mark that is told stops below an answer: what is plain beyond that is told by number.
        beyond = set(range(max(mark, mirror.told) + 1, mirror.mark + 1)).difference(mirror.answered)
        numbers = sorted(beyond.union(number for number in mirror.singles if not mirror.told < number <= mark))
        message.single_mirror_ids.extend([mirror_id] * len(numbers))
        message.single_sequences.extend(numbers)
        mirror.singles.clear()
        mirror.answered.clear()

    def forget(self, mirror_id: MirrorId) -> None:
        """The mirror is gone; its numbers are not needed any more."""
        self._mirrors.pop(mirror_id, None)
