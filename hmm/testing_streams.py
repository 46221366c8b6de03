"""What drivers and callers see of the order of things: numbers of events, answers, and who waits for whom.

**Source**: our own; linux-mm, `hmm_mirror_update()`.

**Invariants**: the events of a mirror are numbered densely from 1 and come in that order; what was answered once is not
owed again, and the low-water mark never falls; of everything that waits it can be said what it waits for.

**Absent**: what events say, and what devices make of it (testing_drivers.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hmm.events import Delivery
from hmm.machine import Machine
from hmm.units import MirrorId

__all__ = ["BrokenStreamError", "Streams"]


class BrokenStreamError(AssertionError):
    """Events are out of order, an answer is forgotten, or something waits for nothing."""


@dataclass(slots=True)
class Streams:
    """All that was sent, by mirror.

    Attributes:
        last: the number of the event that came last.
        low_water: up to here everything was answered.
    """

    machine: Machine
    last: dict[MirrorId, int] = field(default_factory=dict)
    low_water: dict[MirrorId, int] = field(default_factory=dict)
    _owed: dict[MirrorId, frozenset[int]] = field(default_factory=dict)

    def sent(self, delivery: Delivery) -> None:
        """An event has come.  Raises: BrokenStreamError: others should have come before."""
        mirror_id, expected = delivery.mirror_id, self.last.get(delivery.mirror_id, 0) + 1
        if delivery.sequence != expected:
            raise BrokenStreamError(f"mirror {mirror_id} got event {delivery.sequence}, not {expected}")
        self.last[mirror_id] = expected
        self._owed[mirror_id] = self._owed.get(mirror_id, frozenset()) | {expected}

    def check(self) -> None:
        """Raise BrokenStreamError when an answer is forgotten, or something waits for nothing."""
        for mirror_id, receiver in self.machine.receivers.items():
            owed, known = frozenset(receiver.unanswered), self._owed.get(mirror_id, frozenset())
            if owed == known:
                continue
            low_water, before = receiver.low_water, self.low_water.get(mirror_id, 0)
            if owed - known or low_water < before:
                raise BrokenStreamError(f"mirror {mirror_id} owes {sorted(owed)} after {sorted(known)}")
            self._owed[mirror_id], self.low_water[mirror_id] = owed, low_water
        ready = {record.id for record in self.machine.ready()}
        for record in self.machine.operations.values():
            named = record.id in ready or record.waits_for_handler or record.waits_for_driver
            if not (named or self.machine.blockers(record) or self.machine.unanswered(record)):
                raise BrokenStreamError(f"{record.name} waits for nobody: {record.request}")
