"""Answers on their way: what a session's drivers have finished and the daemon has not yet been told.

Plain answers are packed: per mirror a mark "everything up to here", and single numbers above it.  Answers that say
more (an errno, dirty pages) are messages of their own, and a mark never runs over one of the same batch: the daemon
takes the first answer to an event, and that must be the one that says more.

**Source**: proto/hmm_proto/v1/event.proto, Acknowledgements.

**Invariants**: every event is answered in exactly one batch; a mirror's mark only rises.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hmm.units import MirrorId
from hmm_proto.v1 import event_pb2


@dataclass(slots=True)
class _Mirror:
    """What one mirror has finished: everything up to `mark`, and `above` it."""

    mark: int = 0
    above: set[int] = field(default_factory=set)
    unsent: list[int] = field(default_factory=list)
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
        """Note that a mirror has finished an event, and with `answer` what else it has to say."""
        mirror = self._mirrors.get(mirror_id)
        if mirror is None:
            mirror = self._mirrors[mirror_id] = _Mirror()
        self._touched[mirror_id] = mirror
        if sequence == mirror.mark + 1 and not mirror.above:
            mirror.mark = sequence
        elif sequence > mirror.mark:  # else it is said again, which does no harm
            mirror.above.add(sequence)
            while mirror.mark + 1 in mirror.above:
                mirror.mark += 1
                mirror.above.discard(mirror.mark)
        if answer is not None:
            mirror.answered.append(sequence)
            self._answers.append(answer)
        else:
            mirror.unsent.append(sequence)

    def take(self) -> event_pb2.Acknowledgements:
        """Everything that was noted since the last time, as one message."""
        message = event_pb2.Acknowledgements(answers=self._answers)
        marks, marked, singles, single = message.acknowledged_up_to, message.mirror_ids, message.single_sequences, []
        for mirror_id, mirror in self._touched.items():
            mark = min(mirror.mark, min(mirror.answered, default=mirror.mark + 1) - 1)
            if mirror.unsent and min(mirror.unsent) <= mark:
                marked.append(mirror_id)
                marks.append(mark)
            above = [sequence for sequence in mirror.unsent if sequence > mark]
            singles.extend(above)
            single += [mirror_id] * len(above)
            mirror.unsent.clear()
            mirror.answered.clear()
        message.single_mirror_ids.extend(single)
        self._touched.clear()
        self._answers.clear()
        return message

    def forget(self, mirror_id: MirrorId) -> None:
        """The mirror is gone; its numbers are not needed any more."""
        self._mirrors.pop(mirror_id, None)
