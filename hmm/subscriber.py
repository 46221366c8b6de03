"""What a notifier asks of those who hear of changes.

**Source**: struct mmu_notifier_ops and mmu_interval_notifier_ops of Linux; the rest is our own.

**Invariants**: none; mirror.py and interval_notifier.py have those of their kind.

**Absent**: who hears of what, and when (notifier.py); numbering and answers (receiver.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from hmm.dispatch import Hearer
from hmm.events import Delivery, Event
from hmm.frames import Region
from hmm.operation import Operation
from hmm.spans import Spans
from hmm.units import Entries, Pfns

__all__ = ["HasSpans", "Home", "Subscriber"]


class HasSpans(Protocol):
    """Ranges that are worked out when somebody asks for them: many pages here and there are as many objects."""

    @property
    def spans(self) -> Spans:
        """Ascending and disjoint."""


class Home(Protocol):
    """Where a mirror's pages are that its device has in its memory (mirror_memory.py)."""

    @property
    def region(self) -> Region:
        """The memory."""

    def leave(self) -> None:
        """The mirror ends: what its driver alone has is lost, what the daemon has stays where it is."""

    def has_pages(self, spans: Spans) -> bool:
        """Whether a page of these ranges is there."""

    def vacate(self, spans: Spans) -> Operation[int]:
        """Bring back all that is there of these ranges.  Returns: number of pages."""

    def give_up(self, pfns: Pfns) -> Operation[int]:
        """Bring back the pages that are in frames of the memory, int64[n].  Returns: number of pages."""

    def bring_back(self, addresses: Entries) -> Operation[None]:
        """Bring pages back, as far as they are there: uint64[n] addresses, ascending."""

    def copy_out(self, spans: Spans, take: Callable[[Entries, Pfns], None]) -> Operation[None]:
        """Copy the pages of these ranges for somebody else, who takes addresses and frames (0: lost) part by part."""


class Subscriber(Hearer, Protocol):
    """What the notifier needs of a mirror or an interval subscription.

    Attributes:
        failing_allocation: the nth allocation from now on fails that is made to migrate pages for it; 0: none.
    """

    failing_allocation: int

    @property
    def home(self) -> Home | None:
        """Its part of its device's memory; None when there is none that goes with its table."""

    @property
    def is_selective(self) -> bool:
        """Whether it has to be asked about every event; those who are not hear all, but for what they ask for."""

    @property
    def may_abandon(self) -> bool:
        """Whether a change that it does not answer in time is not made."""

    def settling(self, spans: Spans) -> list[int]:
        """The operations that have told it of a change of these ranges that has not been made yet."""

    def hears(self, event: Event) -> bool:
        """Whether this event has to be delivered to this subscriber."""

    def awaits_late_answer(self) -> bool:
        """Whether an abandoned event is still unanswered, so that nothing new may be sent."""

    def settle(self, delivery: Delivery) -> bool:
        """Apply what the answer means; False when the subscriber's own error is its end.

        Who answered that it was done, and is not in `Notifier.filled`, need not be settled.
        """

    def holds(self, spans: Spans) -> bool:
        """Whether there is anything that a change of these ranges may concern."""

    def kill(self) -> None:
        """Unsubscribe for good: it has been told to give everything up."""
