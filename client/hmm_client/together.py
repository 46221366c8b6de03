"""Mirrors of one session that hear the same events, and whose drivers are done when they return.

An event for many of them is noted once, and answered once; what each of them has heard is looked up when somebody asks.
A driver that leaves `Driver.update` as it is has nothing to stop, and is not called; the others are called for each of
their mirrors, one after the other, and who has more to say than that it is done says it for itself.

**Source**: our own; the daemon's half is `hmm_server/served.py`.

**Invariants**: a mirror has heard what its groups have heard, and what it was told by itself.

**Absent**: which mirrors those are, and when they change (session.py); the answers (acknowledgements.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from hmm.units import Entries, MirrorId
from hmm_client.event import Change

Numbers: TypeAlias = npt.NDArray[np.int64]

REMEMBERED_EVENTS = 256
"""How far back a mirror can tell whether the result of a fault is stale; older results count as stale."""


class Member(Protocol):
    """What is needed of a mirror."""

    @property
    def is_idle(self) -> bool:
        """True when its driver has nothing to do for a change, and need not be called."""

    def hear(self, sequence: int, change: Change) -> bool:
        """Let the driver handle a change; True when it is done with nothing to say."""

    def leave(self, group: Together, heard: list[tuple[int, Change]], forgotten: int) -> None:
        """It hears with these others no more; what it heard with them, ascending, is its own."""


class Together:
    """Some mirrors of one session.

    Attributes:
        ids: theirs.
        everybody: `ids` as a set.
        positions: where they are in the events that concern them; None: these name nobody else.
        others: where those are that have to be told by themselves.
        slots: where the ledger has their marks.
    """

    __slots__ = (
        *("_callers", "_forgotten", "_index", "_recent"),
        *("everybody", "ids", "members", "others", "positions", "slots"),
    )

    def __init__(
        self, members: Sequence[Member], ids: list[MirrorId], slots: list[int], positions: list[int], named: int
    ) -> None:
        """Make a group.

        Args:
            named: how many mirrors the events name that concern it.
        """
        self.members = members
        self.ids = ids
        self.slots = np.array(slots, np.int64)
        self.positions = np.array(positions, np.int64) if len(positions) < named else None
        self.others = sorted(set(range(named)).difference(positions))
        self.everybody = frozenset(ids)
        self._callers = [(position, member) for position, member in enumerate(members) if not member.is_idle]
        self._index = {mirror_id: position for position, mirror_id in enumerate(ids)}
        self._recent: deque[tuple[Numbers, Change]] = deque()
        self._forgotten = np.zeros(len(ids), np.int64)

    def note(self, sequences: Numbers, change: Change) -> None:
        """All have heard of a change; `sequences` is int64[n], its number for each."""
        self._recent.append((sequences, change))
        if len(self._recent) > REMEMBERED_EVENTS:
            self._forgotten = self._recent.popleft()[0]

    def call(self, sequences: Numbers, change: Change) -> list[int]:
        """Call the drivers that have something to do.  Returns: who is not done, or has more to say, by position."""
        if not self._callers:
            return []
        numbers = sequences.tolist()
        return [position for position, member in self._callers if not member.hear(numbers[position], change)]

    def heard_by(self, mirror_id: MirrorId) -> int:
        """The last event that a member has heard with the others."""
        return int(self._recent[-1][0][self._index[mirror_id]]) if self._recent else 0

    def has_heard_since(self, mirror_id: MirrorId, event_sequence: int, starts: Entries, ends: Entries) -> bool:
        """As `Receiver.has_heard_since`, of what a member has heard with the others."""
        position = self._index[mirror_id]
        if event_sequence < self._forgotten[position]:
            return True
        for sequences, change in reversed(self._recent):
            if sequences[position] <= event_sequence:
                return False
            if change.overlaps(starts, ends):
                return True
        return False

    def drop(self) -> None:
        """Leave with each what all have heard."""
        for position, member in enumerate(self.members):
            heard = [(int(sequences[position]), change) for sequences, change in self._recent]
            member.leave(self, heard, int(self._forgotten[position]))
