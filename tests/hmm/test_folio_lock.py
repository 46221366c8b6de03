"""Locks of pages: who has which, and what is left when some are unlocked."""

from __future__ import annotations

import numpy as np
import pytest

from hmm.folio_lock import FolioLocks
from hmm.units import Pfns


def frames(*pfns: int) -> Pfns:
    """Frame numbers."""
    return np.array(pfns, np.int64)


def test_lock_is_held_while_its_block_runs() -> None:
    """Others see which frames are locked, and by whom; nothing is left of it behind the block."""
    locks = FolioLocks()
    with locks.lock(frames(3, 1), 7) as lock:
        assert locks.are_locked(frames(1, 2, 3)).tolist() == [True, False, True]
        assert locks.of(3) is lock
        assert locks.of(2) is None
        assert locks.holders(lock.ticket) == [7]
    assert not locks.are_locked(frames(1, 2, 3)).any()
    assert not locks.holders(lock.ticket)


def test_waiters_look_again_when_a_part_is_unlocked() -> None:
    """What stays locked has a new ticket: whoever waited does not know which part was wanted."""
    locks = FolioLocks()
    with locks.lock(frames(1, 2, 3), 7) as lock:
        before = lock.ticket
        lock.keep(frames(2))
        assert not locks.holders(before)
        assert locks.holders(lock.ticket) == [7]
        assert locks.are_locked(frames(1, 2, 3)).tolist() == [False, True, False]


def test_check_finds_a_frame_that_two_have_locked() -> None:
    """A frame that is twice in one lock, as a page that is mapped twice may be, is locked once."""
    locks = FolioLocks()
    with locks.lock(frames(1, 2, 2), 7), locks.lock(frames(3), 8):
        locks.check()
        with locks.lock(frames(2), 9), pytest.raises(AssertionError, match="frame 2"):
            locks.check()
