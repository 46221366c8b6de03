"""How calls ended: counters of all, and the last ones in full, for callers that gave up waiting and ask later.

**Invariants**: at most `remembered` calls are kept, the latest.

**Absent**: calls that have not ended (executor.py has them).
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

from hmm.errors import HmmError
from hmm.operation_record import OperationRecord
from hmm.units import MirrorId
from hmm_proto.status import INTERNAL_REASON


@dataclass(slots=True, eq=False)
class Ended:
    """One call that has ended.

    Attributes:
        owner: the token of its caller; only it may ask.
        error: why it failed; None on success and for a bug of the daemon.
        reason: a constant for programs; empty on success.
        fenced: mirrors that were lost while it waited for them.
    """

    id: int
    name: str
    owner: str
    caller: str
    error: HmmError | None
    reason: str
    fenced: tuple[MirrorId, ...]
    duration_s: float


class OperationLog:
    """The calls of one daemon that have ended."""

    def __init__(self, remembered: int) -> None:
        self.ended_by_name: Counter[str] = Counter()
        self.errors_by_reason: Counter[str] = Counter()
        self._ended: deque[Ended] = deque(maxlen=remembered)

    def note(self, record: OperationRecord[Any], duration_s: float) -> Ended:
        """Count a call that has ended.  Returns: what is remembered of it."""
        error, reason, caller = None, "", record.caller
        if record.error is not None:
            error = record.error if isinstance(record.error, HmmError) else None
            reason = error.reason if error is not None else INTERNAL_REASON
            self.errors_by_reason[reason] += 1
        self.ended_by_name[record.name] += 1
        ended = Ended(record.id, record.name, caller.token, caller.name, error, reason, record.fenced, duration_s)
        self._ended.append(ended)
        return ended

    def get(self, operation_id: int) -> Ended | None:
        """A call that has ended, if it is still remembered.  Cost: O(calls that ended since)."""
        return next((ended for ended in reversed(self._ended) if ended.id == operation_id), None)
