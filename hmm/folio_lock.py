"""The lock of pages: while they are moved, taken for a device, or lose their contents, one call alone has them.

Whoever finds a page locked passes over it, or waits until it is unlocked, and then looks at it again.

**Source**: Linux mm/filemap.c, folio_lock(), folio_unlock(), migration_entry_wait_on_locked(); include/linux/pagemap.h,
folio_trylock().

**Invariants**: no frame is locked twice; a migration entry names a locked frame.

**Absent**: the waiting (migration_entries.py, machine.py); locks that are taken and given back without a wait in
between, which nobody could see.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt

from hmm.units import Pfn, Pfns

__all__ = ["FolioLock", "FolioLocks"]


@dataclass(slots=True, eq=False)
class FolioLock:
    """Some frames that an operation has locked, int64[n]: made by `FolioLocks.lock`, held while its `with` block runs.

    Attributes:
        ticket: what those wait for who want one of the frames.
    """

    locks: FolioLocks
    operation_id: int
    pfns: Pfns
    ticket: int = 0

    def __enter__(self) -> Self:
        self.locks.enlist(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.locks.held.remove(self)

    def keep(self, pfns: Pfns) -> None:
        """Unlock all frames but these: whoever waits for one of them looks again, and waits anew."""
        self.locks.held.remove(self)
        self.pfns = pfns
        self.locks.enlist(self)


@dataclass(slots=True, eq=False)
class FolioLocks:
    """Which frames are locked, and by whom: a short list, ordered by arrival."""

    held: list[FolioLock] = field(default_factory=list)
    _tickets: int = 0

    def lock(self, pfns: Pfns, operation_id: int) -> FolioLock:
        """Lock frames that nobody has locked, while a `with` block runs: int64[n]."""
        return FolioLock(self, operation_id, pfns)

    def enlist(self, lock: FolioLock) -> None:
        """Number a lock: it is held from now on."""
        self._tickets += 1
        lock.ticket = self._tickets
        self.held.append(lock)

    def are_locked(self, pfns: Pfns) -> npt.NDArray[np.bool_]:
        """Which frames are locked: bool[n].  Cost: 1 us when nothing is, else that of sorting all that is."""
        if not self.held:
            return np.zeros(pfns.size, np.bool_)
        return np.isin(pfns, np.concatenate([lock.pfns for lock in self.held]))

    def of(self, pfn: Pfn) -> FolioLock | None:
        """The lock of a frame."""
        return next((lock for lock in self.held if (lock.pfns == pfn).any()), None)

    def holders(self, ticket: int) -> list[int]:
        """The operation that holds a lock, if it still does."""
        return [lock.operation_id for lock in self.held if lock.ticket == ticket]

    def check(self) -> None:
        """Assert that no frame is in two locks."""
        if len(self.held) > 1:
            locked = np.sort(np.concatenate([np.unique(lock.pfns) for lock in self.held]))
            twice = locked[1:][locked[1:] == locked[:-1]]
            assert not twice.size, f"frame {twice[0]} is locked twice"
