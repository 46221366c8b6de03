"""What happened in seeded runs: which calls ended how, which events were sent for which cause, how they were answered.

A workload that never comes to a rule does not test it; this says so.

**Source**: our own.

**Absent**: lines and branches of the code (coverage.py).
"""

from __future__ import annotations

import errno as errnos
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hmm.commands import COMMANDS
from hmm.commands_device import DeviceFaulted, DeviceMigrated
from hmm.commands_hmm import Migrated, RangeFaulted
from hmm.cpu_access import Accessed
from hmm.events import Cause, Delivery
from hmm.migration import MIGRATE
from hmm.operation_record import OperationRecord
from hmm.receiver import Receiver

__all__ = ["Coverage", "outcome"]


@dataclass(slots=True)
class Coverage:
    """Counts over any number of runs.

    Attributes:
        calls: (command, outcome), outcomes as `outcome` says.
        inside: the same of the calls that were made from inside callbacks, which are in `calls` too.
        events: (what happened, "mirror" or "interval notifier", what that heard).
        answers: how events were answered, and how often drivers misbehaved.
        callers: how often they did not wait for the end of their calls.
        retries: how often device faults of either kind started over.
        steps: choices made.
    """

    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    inside: Counter[tuple[str, str]] = field(default_factory=Counter)
    events: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    callers: Counter[str] = field(default_factory=Counter)
    retries: int = 0
    steps: int = 0

    def ended(self, record: OperationRecord[Any]) -> None:
        """A call has ended."""
        how = (record.name, outcome(record))
        self.calls[how] += 1
        if record.caller.callback is not None:
            self.inside[how] += 1
        if isinstance(record.value, RangeFaulted):
            self.retries += record.value.retries
        elif isinstance(record.value, DeviceFaulted):
            self.retries += sum(part.retries for part in record.value.parts)

    def sent(self, delivery: Delivery, receiver: Receiver | None) -> None:
        """An event is on its way."""
        event = delivery.event
        what = event.what.replace("_", " ")
        keeps_table = receiver is not None and hasattr(receiver, "table")
        if keeps_table:
            self.events[what, "mirror", event.etype.name] += 1
        else:
            heard = event.reason.name if event.reason is not None else event.etype.name
            passes = " (second pass)" if event.finishes else "" if event.blockable else " (may not block)"
            self.events[what, "interval notifier", heard + passes] += 1

    def add(self, other: Coverage) -> None:
        """Count what another has counted, too."""
        self.calls += other.calls
        self.inside += other.inside
        self.events += other.events
        self.answers += other.answers
        self.callers += other.callers
        self.retries += other.retries
        self.steps += other.steps

    @property
    def operations(self) -> int:
        """Calls that ended."""
        return self.calls.total()

    @property
    def never_called(self) -> list[str]:
        """The commands that no call was of."""
        called = {name for name, _ in self.calls}
        return [name for name in COMMANDS if name not in called]

    @property
    def never_told(self) -> list[str]:
        """The causes that nobody who could hear of them was told of."""
        told = {what for what, *_ in self.events}
        return [cause.value for cause in Cause if cause.value not in told and cause is not Cause.MUNLOCK]


def outcome(record: OperationRecord[Any]) -> str:
    """How a call ended: "done"; the name of an errno, of the call or of what it stopped at; a signal; what moved."""
    result: Any = record.value
    error = record.error or getattr(result, "error", None)
    if isinstance(result, DeviceFaulted):
        error = next((part.error for part in result.parts if part.error is not None), None)
    if isinstance(result, Accessed) and result.signal is not None:
        return result.signal.name
    if isinstance(result, Migrated):
        selected, moved = (int(np.count_nonzero(words)) for words in (result.src, result.src & _MIGRATE))
        return _moved(moved, selected)
    if isinstance(result, DeviceMigrated):
        error = result.moved.error
        return _moved(result.moved.npages, result.moved.span.npages) + (f" and {_name_of(error)}" if error else "")
    return _name_of(error) if error is not None else "done"


_MIGRATE = np.uint64(MIGRATE)


def _moved(moved: int, of: int) -> str:
    return "moved none" if not moved else "moved all" if moved >= of else "moved some"


def _name_of(error: BaseException) -> str:
    number = getattr(error, "errno", 0)
    return "EDEADLK" if number == errnos.EDEADLK else errnos.errorcode.get(number, type(error).__name__)
