"""Random calls of devices that have memory, to be mixed into the workloads of testing.py.

**Source**: our own.

**Invariants**: those of the machine, which the simulation checks after every step.

**Absent**: a model of what the devices themselves use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hmm import commands_device, commands_hmm, commands_process
from hmm.interval_notifier import IntervalMirror
from hmm.machine import Limits
from hmm.range_fault import REQ_FAULT, REQ_WRITE
from hmm.scheduler import Call, Scheduler
from hmm.testing import Makers, Town, simulate
from hmm.units import DeviceId, MirrorId

__all__ = ["DEVICE_CALLS", "SMALL_WITH_DEVICES", "TOWNS", "simulate_devices"]

SMALL_WITH_DEVICES = Limits(frames=400, device_frames=64, processes=8, directories=1 << 10)
"""As `testing.SMALL`, with frame numbers for a few small devices."""
_DEVICE_PAGES = 12
_REQUESTS = (0, REQ_FAULT, REQ_FAULT | REQ_WRITE)


def _mirrors(town: Town) -> list[MirrorId]:
    return [receiver.id for receiver in town.machine.receivers.values() if isinstance(receiver, IntervalMirror)]


def _device(town: Town) -> DeviceId | None:
    return town.pick(device.id for device in town.machine.devices.values() if device.region)


def _register(town: Town) -> Call | None:
    if len(town.machine.devices) > town.devices:
        return None
    return Call(commands_device.register_device, ("with memory",), {"memory_pages": _DEVICE_PAGES})


def _unregister(town: Town) -> Call | None:
    device = _device(town)
    return None if device is None or town.choose(3) else Call(commands_device.unregister_device, (device,))


def _attach(town: Town) -> Call | None:
    device, process = _device(town), town.process()
    if device is None or process is None or len(_mirrors(town)) > town.processes:
        return None
    return Call(commands_hmm.attach, (device, process))


def _detach(town: Town) -> Call | None:
    mirror = town.pick(_mirrors(town))
    return None if mirror is None or town.choose(3) else Call(commands_hmm.detach, (mirror,))


def _insert(town: Town) -> Call | None:
    mirror, span = town.pick(_mirrors(town)), town.span(16)
    return None if mirror is None else Call(commands_hmm.insert_notifier, (mirror, span.start, span.size_bytes))


def _subscription(town: Town) -> tuple[MirrorId, int] | None:
    mirror = town.pick(_mirrors(town))
    if mirror is None:
        return None
    receiver = town.machine.receivers[mirror]
    assert isinstance(receiver, IntervalMirror)
    number = town.pick(receiver.notifiers)
    return None if number is None else (mirror, number)


def _remove(town: Town) -> Call | None:
    subscription = _subscription(town)
    return None if subscription is None else Call(commands_hmm.remove_notifier, subscription)


def _read_begin(town: Town) -> Call | None:
    subscription = _subscription(town)
    return None if subscription is None else Call(commands_hmm.read_begin, subscription)


def _range_fault(town: Town) -> Call | None:
    subscription = _subscription(town)
    if subscription is None:
        return None
    receiver = town.machine.receivers[subscription[0]]
    assert isinstance(receiver, IntervalMirror)
    sequence = receiver.notifiers[subscription[1]].sequence
    flags = _REQUESTS[town.choose(len(_REQUESTS))]
    return Call(commands_hmm.range_fault, (*subscription, sequence, town.span(), flags))


def _to_device(town: Town) -> Call | None:
    mirror, span = town.pick(_mirrors(town)), town.span()
    return None if mirror is None else Call(commands_hmm.migrate_to_device, (mirror, span))


def _to_system(town: Town) -> Call | None:
    mirror, span = town.pick(_mirrors(town)), town.span()
    return None if mirror is None else Call(commands_hmm.migrate_to_system, (mirror, span))


def _evict(town: Town) -> Call | None:
    device = _device(town)
    return None if device is None or town.choose(3) else Call(commands_hmm.evict_device, (device,))


def _exclusive(town: Town) -> Call | None:
    mirror, span, owned = town.pick(_mirrors(town)), town.span(), town.choose(2) == 0
    return None if mirror is None else Call(commands_hmm.make_exclusive, (mirror, span), {"owned": owned})


def _pin(town: Town) -> Call | None:
    process, span, write = town.process(), town.span(3), town.choose(2) == 0
    if process is None or len(town.machine.pins) > town.processes:
        return None
    return Call(commands_process.pin, (process, span), {"write": write})


def _unpin(town: Town) -> Call | None:
    number = town.pick(town.machine.pins)
    return None if number is None else Call(commands_process.unpin, (number,))


DEVICE_CALLS: Makers = (
    (_register, 3), (_unregister, 1), (_attach, 4), (_detach, 1), (_insert, 3), (_remove, 1), (_read_begin, 2),
    (_range_fault, 6), (_to_device, 10), (_to_system, 3), (_evict, 1), (_exclusive, 4), (_pin, 2), (_unpin, 2),
)  # fmt: skip
"""What makes calls of devices, and how often."""


def simulate_devices(seed: int) -> Scheduler:
    """As `testing.simulate`, with devices that have memory."""
    return simulate(seed, ncalls=80, limits=SMALL_WITH_DEVICES, more=DEVICE_CALLS)


TOWNS: Mapping[str, Callable[[int], Scheduler]] = {"mirrors": simulate, "devices": simulate_devices}
"""What a seed can be run in: by name, all workloads there are."""
