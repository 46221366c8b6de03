"""Random failures, as harnesses inject them: of memory, of allocations, of copies and of DMA.

**Source**: our own.

**Absent**: drivers that misbehave, and callers that go (scheduler.py).
"""

from __future__ import annotations

import numpy as np

from hmm import commands_failures, commands_process
from hmm.frames import PageFlag
from hmm.madvise import Advice
from hmm.scheduler import Call
from hmm.testing_town import Makers, Town
from hmm.units import PAGE_SIZE, DeviceId

__all__ = ["FAILURES", "FAILURES_OF_DEVICES", "FAILURES_OF_MIGRATIONS"]

_FAILED_FRAMES = 4
"""As many frames are lost at the most: they never come back."""


def _fail_allocation(town: Town) -> Call | None:
    return None if town.choose(3) else Call(commands_failures.inject_allocation_failure, (1 + town.choose(6),))


def _fail_dma(town: Town) -> Call | None:
    device = town.pick(device.id for device in town.machine.devices.values() if device.iommu is not None)
    if device is None or town.choose(3):
        return None
    return Call(commands_failures.inject_dma_failure, (device, 1 + town.choose(3)))


def _fail_memory(town: Town) -> Call | None:
    process, frames = town.process(), town.machine.frames
    if process is None:
        return None
    lost = np.count_nonzero(frames.test_flags(np.arange(frames.used_end), PageFlag.HWPOISON))
    if lost >= _FAILED_FRAMES:
        return None
    span = town.mapped(town.machine.processes[process].space, 2)
    length = min(span.size_bytes, 2 * PAGE_SIZE)
    advice = town.pick((Advice.HWPOISON, Advice.SOFT_OFFLINE))
    return Call(commands_process.madvise, (process, span.start, length, advice))


FAILURES: Makers = ((_fail_allocation, 1), (_fail_dma, 1), (_fail_memory, 2))
"""What makes those of processes and mirrors of 2015, and how often."""


def _with_memory(town: Town, *, carried: bool) -> list[DeviceId]:
    """The devices that have memory; `carried`: also those whose drivers copy."""
    regions = {device.id: device.region for device in town.machine.devices.values() if device.region}
    return [number for number, region in regions.items() if carried or not town.machine.frames.region(region).remote]


def _fail_copy(town: Town) -> Call | None:
    copied = _with_memory(town, carried=False)
    mirror = town.pick(number for number, one in town.machine.receivers.items() if one.device.id in copied)
    return None if mirror is None else Call(commands_failures.inject_copy_failure, (mirror, town.choose(6)))


def _fail_touch(town: Town) -> Call | None:
    device = town.pick(_with_memory(town, carried=True))
    return None if device is None else Call(commands_failures.inject_touch_failure, (device, town.choose(4)))


FAILURES_OF_DEVICES: Makers = ((_fail_copy, 3), (_fail_touch, 2))
"""Those of devices that have memory."""


def _fail_migration(town: Town) -> Call | None:
    mirror = town.pick(town.interval_mirrors())
    return None if mirror is None else Call(commands_failures.inject_migration_failure, (mirror, town.choose(3)))


FAILURES_OF_MIGRATIONS: Makers = ((_fail_migration, 10),)
"""Those of migrations that today's drivers ask for."""
