"""Random calls of today's drivers that map what they hold for DMA, and of their devices.

**Source**: our own.

**Absent**: what drivers hold, and unmap when they answer (testing_drivers.py).
"""

from __future__ import annotations

import numpy as np

from hmm import commands_hmm
from hmm.interval_notifier import IntervalMirror
from hmm.mirror import MirrorState
from hmm.range_fault import DMA_MAPPED, VALID, WRITE
from hmm.scheduler import Call
from hmm.testing_town import Makers, Town
from hmm.units import PAGE_SIZE, Entries, MirrorId

__all__ = ["DMA_CALLS", "holder"]

_MOST = 4
"""Pages of one call."""


def holder(town: Town) -> MirrorId | None:
    """One whose driver holds translations."""
    return town.pick(mirror for mirror in _living(town) if town.held.get(mirror))


def _living(town: Town) -> list[MirrorId]:
    live = MirrorState.LIVE
    return [mirror for mirror in town.interval_mirrors() if town.machine.receivers[mirror].state is live]


def _map(town: Town) -> Call | None:
    mirror = town.pick(one for one in _living(town) if town.held.get(one) and _mapped(town, one) is not None)
    if mirror is None:
        return None
    held = list(town.held[mirror].items())
    some = held[town.choose(len(held)) :][: 1 + town.choose(_MOST)]
    words = [VALID | (WRITE if writable else 0) | pfn for _, (pfn, writable) in some]
    pages = np.array([page for page, _ in some], np.uint64)
    return Call(commands_hmm.dma_map, (mirror, pages, np.array(words, np.uint64)))


def _mapped(town: Town, mirror: MirrorId) -> Entries | None:
    """uint64[n]: the pages that it has mapped; None: its device does no DMA."""
    receiver = town.machine.receivers[mirror]
    if not isinstance(receiver, IntervalMirror) or receiver.dma is None:
        return None
    return receiver.dma.table.in_use()[0]


def _some(town: Town) -> tuple[MirrorId, Entries, Entries] | None:
    """A mirror, some pages that it has mapped, and their DMA addresses, uint64[n] each."""
    mapped = {mirror: pages for mirror in _living(town) if (pages := _mapped(town, mirror)) is not None and pages.size}
    mirror = town.pick(mapped)
    if mirror is None:
        return None
    pages = mapped[mirror][town.choose(mapped[mirror].size) :][: 1 + town.choose(_MOST)]
    receiver = town.machine.receivers[mirror]
    assert isinstance(receiver, IntervalMirror)
    assert receiver.dma is not None
    return mirror, pages, receiver.dma.lookup(pages)


def _read(town: Town) -> Call | None:
    some = _some(town)
    return None if some is None else Call(commands_hmm.read_dma, (some[0], some[2]))


def _write(town: Town) -> Call | None:
    some = _some(town)
    if some is None:
        return None
    mirror, pages, addresses = some
    return Call(commands_hmm.write_dma, (mirror, addresses, bytes([1 + town.choose(255)]) * (pages.size * PAGE_SIZE)))


def _unmap(town: Town) -> Call | None:
    some = _some(town)
    if some is None or town.choose(2):
        return None
    mirror, pages, _ = some
    return Call(commands_hmm.dma_unmap, (mirror, pages, np.full(pages.size, VALID | DMA_MAPPED, np.uint64)))


DMA_CALLS: Makers = ((_map, 24), (_read, 12), (_write, 12), (_unmap, 3))
"""What makes them, and how often."""
