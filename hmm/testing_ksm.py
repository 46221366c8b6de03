"""Random calls where pages hold the same and are merged, while others write, move and share them.

**Source**: our own.

**Invariants**: those of the machine, which the simulation checks after every step; what pages hold.

**Absent**: which pages are equal: a call that writes fills all its pages with one of a few bytes.
"""

from __future__ import annotations

from hmm import commands_process, testing_devices
from hmm.address_space import Thp
from hmm.madvise import Advice
from hmm.scheduler import Call, Scheduler
from hmm.testing import simulate
from hmm.testing_calls import fork_process
from hmm.testing_town import Makers, Town
from hmm.units import PAGE_SIZE

__all__ = ["simulate_merging"]

_BYTES = 2
"""So few that most pages have an equal."""


def _mergeable(town: Town) -> Call | None:
    process = town.process()
    if process is None:
        return None
    span = town.mapped(town.machine.processes[process].space) if town.choose(3) else town.span(town.pages)
    advice = Advice.MERGEABLE if town.choose(5) else Advice.UNMERGEABLE
    return Call(commands_process.madvise, (process, span.start, span.size_bytes, advice))


def _fill(town: Town) -> Call | None:
    process = town.process()
    if process is None:
        return None
    span = town.mapped(town.machine.processes[process].space, private=True)
    data = bytes([1 + town.choose(_BYTES)]) * (span.npages * PAGE_SIZE)
    return Call(commands_process.write_memory, (process, span.start, data))


def _scan(town: Town) -> Call | None:
    return Call(commands_process.scan_ksm, (1 + town.choose(3),))


MERGING_CALLS: Makers = ((_mergeable, 24), (_fill, 32), (_scan, 24))
"""What makes pages equal, and merges them, and how often."""


def simulate_merging(seed: int, *, ncalls: int = 80) -> Scheduler:
    """As `testing_devices.simulate_devices`, with pages that are merged; on every fourth seed with huge pages.

    Raises: as `simulate`.
    """
    thp = Thp.NEVER if seed % 4 else Thp.ALWAYS
    limits = testing_devices.LARGE_WITH_DEVICES if thp else testing_devices.SMALL_WITH_DEVICES
    more = testing_devices.DEVICE_CALLS + MERGING_CALLS
    first = (_mergeable, _fill, _fill, fork_process, _scan)
    return simulate(seed, ncalls=ncalls, limits=limits, more=more, first=first, thp=thp)
