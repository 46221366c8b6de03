"""What a call of the test driver has moved or taken, and what others took before its reply was entered.

**Source**: Linux lib/test_hmm.c, dmirror_migrate_finalize_and_map(), dmirror_atomic_map().

**Absent**: the calls (`hmm_client.drivers.dmirror`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hmm.commands_hmm import Migrated
from hmm.events import Event, Reason
from hmm.migration import COMPOUND as MIGRATE_COMPOUND
from hmm.migration import MIGRATE, VALID
from hmm.migration import PFN_SHIFT as MIGRATE_PFN_SHIFT
from hmm.migration import WRITE as MIGRATE_WRITE
from hmm.page_table import PageTable
from hmm.spans import Spans, inside
from hmm.units import PMD_PAGES, AddressRange, Entries, MirrorId, Pfns
from hmm_client.drivers.dmirror.entries import entries_in, page_addresses


@dataclass(slots=True, eq=False)
class Moving:
    """A call that moves or takes pages: what others take between its own event and its reply.

    Attributes:
        reason: of its own event, which comes when nothing has been moved yet.
        operation_id: of its own event; 0 before it.
        before: uint64[npages], what the table had when that came.
    """

    span: AddressRange
    reason: Reason
    operation_id: int = 0
    before: Entries | None = None
    taken: list[Spans] = field(default_factory=list)

    def hear(self, event: Event, mirror_id: MirrorId, table: PageTable) -> None:
        """An event comes."""
        if not self.operation_id:
            own = event.initiator == mirror_id or self.reason is Reason.EXCLUSIVE  # which names nobody
            if own and event.reason is self.reason and event.overlaps(self.span):
                self.operation_id = event.operation_id
                self.before = entries_in(table, self.span)
        elif event.operation_id != self.operation_id:
            self.taken.append(event.spans)
        elif event.reason is not self.reason and self.before is not None:  # a huge page was split
            pages = page_addresses(self.span, self.before.size)
            self.before[inside(pages, event.spans)] = 0


def are_moved(moved: Migrated) -> npt.NDArray[np.bool_]:
    """bool[n]: which words of a migration are of pages that have been moved; of a huge page the first one."""
    moved_words: npt.NDArray[np.bool_] = (moved.src & np.uint64(MIGRATE) != 0) & (moved.dst & np.uint64(VALID) != 0)
    return moved_words


@dataclass(frozen=True, slots=True)
class Moved:
    """The pages that a migration has moved, those inside huge ones too.

    Attributes:
        pages: counted from the start of its range.
        pfns: where they are now.
        writable: what the word says.
        framed: they were somewhere before.
    """

    pages: npt.NDArray[np.intp]
    pfns: Pfns
    writable: npt.NDArray[np.bool_]
    framed: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, moved: Migrated) -> Moved:
        """Give all pages of a huge one what its word says."""
        first = np.flatnonzero(are_moved(moved))
        words = moved.dst[first]
        counts = np.where(words & np.uint64(MIGRATE_COMPOUND), PMD_PAGES, 1)
        within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        pfns = (words >> np.uint64(MIGRATE_PFN_SHIFT)).view(np.int64)
        writable, framed = words & np.uint64(MIGRATE_WRITE) != 0, moved.src[first] & np.uint64(VALID) != 0
        return cls(
            np.repeat(first, counts) + within,
            np.repeat(pfns, counts) + within,
            np.repeat(writable, counts),
            np.repeat(framed, counts),
        )
