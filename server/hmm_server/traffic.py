"""What was sent, and how fast it was answered: of one mirror, or of many that were told and answered together.

**Invariants**: adding up the traffic of a mirror and that of its groups gives what the mirror has heard.

**Absent**: who is in a group (served.py); events by type and outcome, which the core counts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from dataclasses import dataclass, field

LATENCIES_KEPT = 1024
LATENCY_BOUNDS_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
"""Upper bounds of the buckets that latencies are counted in, seconds."""


@dataclass(slots=True, eq=False)
class Traffic:
    """Events that were sent, and their answers.

    Attributes:
        latencies_s: from sending to answering, of the last events.
        latency_buckets: answers by latency: one for each of LATENCY_BOUNDS_S, and one for all beyond.
    """

    bytes_sent: int = 0
    ranges: int = 0
    pages: int = 0
    events_by_reason: Counter[str] = field(default_factory=Counter)
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=LATENCIES_KEPT))
    latency_count: int = 0
    latency_sum_s: float = 0.0
    latency_max_s: float = 0.0
    latency_buckets: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BOUNDS_S) + 1))

    def note_sent(self, nbytes: int, nranges: int, npages: int, reason: str) -> None:
        """An event has left; `reason` is empty where today's kernel would not tell."""
        self.bytes_sent += nbytes
        self.ranges += nranges
        self.pages += npages
        if reason:
            self.events_by_reason[reason] += 1

    def note_answer(self, seconds: float) -> None:
        """Count one answer, that came so long after its event was sent."""
        self.latency_buckets[bisect_left(LATENCY_BOUNDS_S, seconds)] += 1
        self.latencies_s.append(seconds)
        self.latency_count += 1
        self.latency_sum_s += seconds
        if seconds > self.latency_max_s:  # noqa: PLR1730 - max() would cost more than the rest
            self.latency_max_s = seconds

    def add(self, other: Traffic) -> None:
        """Add what was counted elsewhere."""
        self.bytes_sent += other.bytes_sent
        self.ranges += other.ranges
        self.pages += other.pages
        self.events_by_reason.update(other.events_by_reason)
        self.latencies_s.extend(other.latencies_s)
        self.latency_count += other.latency_count
        self.latency_sum_s += other.latency_sum_s
        self.latency_max_s = max(self.latency_max_s, other.latency_max_s)
        self.latency_buckets = [a + b for a, b in zip(self.latency_buckets, other.latency_buckets, strict=True)]

    def __bool__(self) -> bool:
        return bool(self.bytes_sent or self.latency_count)
