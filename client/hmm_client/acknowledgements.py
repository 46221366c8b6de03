"""Answers on their way: what a session's drivers have finished and the daemon has not yet been told.

Plain answers are packed: per mirror a mark "everything up to here", and single numbers above it.  Answers that say
more (an errno, dirty pages) are messages of their own, and a mark never runs over one of the same batch: the daemon
takes the first answer to an event, and that must be the one that says more.

**Source**: proto/hmm_proto/v1/event.proto, Acknowledgements.

**Invariants**: every event is answered in the batch after it was finished, and its first answer says all of it; a
mirror's mark only rises.

Marks are in one array, so that an event which many mirrors have finished at once is noted, and told, at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hmm.units import MirrorId
from hmm_proto.v1 import event_pb2

_FIRST_SLOTS = 64


@dataclass(slots=True, eq=False)
class _Irregular:
    """What one mirror has finished out of order, or with more to say.

    Attributes:
        above: what is finished above the mark.
        singles: of these, and of repeats, what is to be told.
        answered: events whose own answer is to be told.
    """

    above: set[int] = field(default_factory=set)
    singles: list[int] = field(default_factory=list)
    answered: list[int] = field(default_factory=list)


class AcknowledgementLedger:
    """The answers of one session.

    Attributes (by slot, one for each mirror):
        _marks: everything up to it is finished.
        _told: the mark that the daemon knows.
    """

    def __init__(self) -> None:
        self._slots: dict[MirrorId, int] = {}
        self._free: list[int] = []
        self._allot(np.zeros(0, np.int64), np.zeros(0, np.int64))
        self._irregular: dict[MirrorId, _Irregular] = {}
        self._touched: dict[MirrorId, int] = {}
        self._together: list[tuple[Sequence[int], Sequence[int]]] = []
        self._answers: list[event_pb2.Answer] = []
        self._gone: list[MirrorId] = []

    def __bool__(self) -> bool:
        return bool(self._touched or self._together)

    def slot(self, mirror_id: MirrorId) -> int:
        """Where a mirror's mark is, until it is forgotten."""
        slot = self._slots.get(mirror_id)
        if slot is None:
            if not self._free:
                self._allot(self._marks, self._told)
            slot = self._slots[mirror_id] = self._free.pop()
        return slot

    def _allot(self, marks: npt.NDArray[np.int64], told: npt.NDArray[np.int64]) -> None:
        used = marks.size
        added = np.zeros(used or _FIRST_SLOTS, np.int64)
        self._marks, self._told = np.concatenate([marks, added]), np.concatenate([told, added])
        self._mark = self._marks.data  # the same, four times faster for one
        self._free += range(self._marks.size - 1, used - 1, -1)

    def done(self, mirror_id: MirrorId, sequence: int, answer: event_pb2.Answer | None = None) -> None:
        """Note that a mirror has finished an event, and with `answer` what else it has to say.

        Saying it again does no harm.
        """
        slot = self._slots.get(mirror_id)
        if slot is None:
            slot = self.slot(mirror_id)
        self._touched[mirror_id] = slot
        mark: int = self._mark[slot]
        if sequence == mark + 1 and answer is None and mirror_id not in self._irregular:
            self._mark[slot] = sequence  # most are: in order, with nothing to say
            return
        mirror = self._irregular.setdefault(mirror_id, _Irregular())
        if answer is not None:
            mirror.answered.append(sequence)
            self._answers.append(answer)
        elif sequence != mark + 1:
            mirror.singles.append(sequence)
        if sequence > mark:
            mirror.above.add(sequence)
            while mark + 1 in mirror.above:
                mark += 1
                mirror.above.discard(mark)
            self._mark[slot] = mark

    def done_together(
        self,
        slots: npt.NDArray[np.int64],
        numbers: npt.NDArray[np.int64],
        mirror_ids: Sequence[MirrorId],
        sequences: Sequence[int],
    ) -> None:
        """Note that mirrors have finished an event each, which for all of them `is_next`.

        Args:
            slots, numbers: as there.
            mirror_ids, sequences: the same two, as they are to be written down.
        """
        self._marks[slots] = numbers
        self._told[slots] = numbers
        self._together.append((mirror_ids, sequences))

    def is_next(
        self, slots: npt.NDArray[np.int64], numbers: npt.NDArray[np.int64], mirror_ids: frozenset[MirrorId]
    ) -> bool:
        """Whether mirrors have finished all that came before an event, and have no more to say.

        Args:
            slots: int64[n], of the mirrors.
            numbers: int64[n], the event's number for each.
        """
        if self._irregular and not self._irregular.keys().isdisjoint(mirror_ids):
            return False
        return np.array_equal(self._marks[slots] + 1, numbers)

    def take(self) -> event_pb2.Acknowledgements:
        """Everything that was noted since the last time, as one message."""
        message = event_pb2.Acknowledgements()
        if self._answers:
            message.answers.extend(self._answers)
            self._answers.clear()
        mirror_ids, marks = message.mirror_ids, message.acknowledged_up_to
        for together_ids, sequences in self._together:
            mirror_ids.extend(together_ids)
            marks.extend(sequences)
        for mirror_id, slot in self._touched.items():
            mark, told = self._mark[slot], int(self._told[slot])
            mirror = self._irregular.get(mirror_id)
            if mirror is not None and (mirror.singles or mirror.answered):
                mark = self._take_singles(message, mirror_id, mirror, mark, told)
            if mark > told:
                self._told[slot] = mark
                mirror_ids.append(mirror_id)
                marks.append(mark)
        self._touched.clear()
        self._together.clear()
        for mirror_id in self._gone:
            self.forget(mirror_id)
        self._gone.clear()
        return message

    def _take_singles(
        self, message: event_pb2.Acknowledgements, mirror_id: MirrorId, mirror: _Irregular, mark: int, told: int
    ) -> int:
        """Tell what the mark cannot.  Returns: the mark that can be told."""
        # It stops below an answer: what is plain beyond that is told by number.
        tellable = min(mark, min(mirror.answered, default=mark + 1) - 1)
        beyond = set(range(max(tellable, told) + 1, mark + 1)).difference(mirror.answered)
        numbers = sorted(beyond.union(number for number in mirror.singles if not told < number <= tellable))
        message.single_mirror_ids.extend([mirror_id] * len(numbers))
        message.single_sequences.extend(numbers)
        mirror.singles.clear()
        mirror.answered.clear()
        if not mirror.above:
            del self._irregular[mirror_id]
        return tellable

    def forget(self, mirror_id: MirrorId) -> None:
        """The mirror is gone; its numbers are not needed any more when they were told."""
        if mirror_id in self._touched:
            self._gone.append(mirror_id)
            return
        slot = self._slots.pop(mirror_id, None)
        self._irregular.pop(mirror_id, None)
        if slot is not None:
            self._marks[slot] = self._told[slot] = 0
            self._free.append(slot)
