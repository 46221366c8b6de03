"""Random calls where memory is short: everybody needs pages that somebody else has, and swap is full at times.

**Source**: our own.

**Invariants**: those of the machine, which the simulation checks after every step.

**Absent**: what pages hold (testing_contents.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hmm import commands_process, testing_devices, testing_ksm, testing_steps, testing_userfaultfd
from hmm.limits import Limits
from hmm.madvise import Advice
from hmm.scheduler import Call, Scheduler
from hmm.testing import simulate
from hmm.testing_calls import munlock_all
from hmm.testing_files import write_file
from hmm.testing_town import Makers, Town

__all__ = [
    "TOWNS",
    "simulate_swap",
]

SHORT_OF_MEMORY = Limits(frames=25, swap_pages=48, device_frames=64, processes=8, directories=1 << 10)
"""Fewer frames than two processes use, and fewer slots than all of them could."""
_ADVICE = (Advice.PAGEOUT, Advice.PAGEOUT, Advice.COLD, Advice.WILLNEED, Advice.FREE, Advice.DONTNEED)


def _advise(town: Town) -> Call | None:
    process, span = town.process(), town.span(12)
    advice = _ADVICE[town.choose(len(_ADVICE))]
    return None if process is None else Call(commands_process.madvise, (process, span.start, span.size_bytes, advice))


def _fill(town: Town) -> Call | None:
    process, span, write = town.process(), town.span(town.pages), town.choose(3) > 0
    return None if process is None else Call(commands_process.touch, (process, span), {"write": write})


SWAP_CALLS: Makers = ((_advise, 24), (_fill, 48), (munlock_all, 6), (write_file, 8))
"""What makes calls that need memory or give it back, and how often."""


def simulate_swap(seed: int, *, ncalls: int = 60) -> Scheduler:
    """`testing.simulate` with little memory, and swap.

    Raises: as there.
    """
    return simulate(seed, ncalls=ncalls, limits=SHORT_OF_MEMORY, more=SWAP_CALLS)


def simulate_swap_and_devices(seed: int, *, ncalls: int = 60) -> Scheduler:
    """`simulate_swap` with devices that have memory of their own.

    Raises: as there.
    """
    more = SWAP_CALLS + testing_devices.DEVICE_CALLS
    first = testing_devices.SUBSCRIBED
    return simulate(seed, ncalls=ncalls, limits=SHORT_OF_MEMORY, more=more, first=first)


def simulate_swap_and_mirror_memory(seed: int, *, ncalls: int = 60) -> Scheduler:
    """`simulate_swap` with pages of mirrors in the memory of their devices.

    Raises: as there.
    """
    more = SWAP_CALLS + testing_devices.MIRROR_CALLS
    first = testing_devices.WITH_CARDS
    return simulate(seed, ncalls=ncalls, limits=SHORT_OF_MEMORY, more=more, first=first)


def simulate_swap_and_steps(seed: int, *, ncalls: int = 100) -> Scheduler:
    """`simulate_swap_and_devices`, whose drivers take the steps of migrations.

    Raises: as there.
    """
    more = SWAP_CALLS + testing_devices.DEVICE_CALLS + testing_steps.step_calls()
    first = testing_devices.SUBSCRIBED
    return simulate(seed, ncalls=ncalls, limits=SHORT_OF_MEMORY, more=more, first=first)


TOWNS: Mapping[str, Callable[[int], Scheduler]] = {
    **testing_devices.TOWNS,
    "userfaultfd": testing_userfaultfd.simulate_userfaultfds,
    "merging": testing_ksm.simulate_merging,
    "steps": testing_steps.simulate_steps,
    "swap": simulate_swap,
    "swap-devices": simulate_swap_and_devices,
    "swap-memory": simulate_swap_and_mirror_memory,
    "swap-steps": simulate_swap_and_steps,
}
"""What a seed can be run in: by name, all workloads there are."""
