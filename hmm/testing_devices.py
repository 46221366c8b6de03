"""Random calls of devices that have memory, to be mixed into the workloads of testing.py.

**Source**: our own.

**Invariants**: those of the machine, which the simulation checks after every step.

**Absent**: a model of what the devices themselves use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hmm import commands_device, commands_hmm, commands_process
from hmm.address_space import AddressSpace, Thp
from hmm.interval_notifier import IntervalMirror
from hmm.machine import Limits
from hmm.mirror import DeadlinePolicy
from hmm.range_fault import REQ_FAULT, REQ_WRITE
from hmm.scheduler import Call, Scheduler
from hmm.testing import Makers, Town, fork_process, simulate
from hmm.units import PAGE_SHIFT, PAGE_SIZE, PMD_PAGES, PMD_SIZE, AddressRange, DeviceId, MirrorId
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot

__all__ = [
    "DEVICE_CALLS",
    "HUGE_CALLS",
    "LARGE_WITH_DEVICES",
    "MIRROR_CALLS",
    "SMALL_WITH_DEVICES",
    "TOWNS",
    "simulate_devices",
    "simulate_huge_pages",
    "simulate_mirror_memory",
]

SMALL_WITH_DEVICES = Limits(frames=400, device_frames=64, processes=8, directories=1 << 10)
"""As `testing.SMALL`, with frame numbers for a few small devices."""
LARGE_WITH_DEVICES = Limits(frames=4200, device_frames=64, hugetlb_pages=2, processes=8, directories=1 << 10)
"""As much as a few huge pages need, too little for those of all processes."""
_DEVICE_PAGES = 12
_REQUESTS = (0, REQ_FAULT, REQ_FAULT | REQ_WRITE)


def _mirrors(town: Town) -> list[MirrorId]:
    return [receiver.id for receiver in town.machine.receivers.values() if isinstance(receiver, IntervalMirror)]


def _device(town: Town) -> DeviceId | None:
    return town.pick(device.id for device in town.machine.devices.values() if device.region)


def _register(town: Town) -> Call | None:
    if len(town.machine.devices) > town.devices:
        return None
    options = {"memory_pages": _DEVICE_PAGES, "evicts": town.choose(2) == 0}
    return Call(commands_device.register_device, ("with memory",), options)


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
    options = {"two_pass": town.choose(2) == 0}
    return (
        None if mirror is None else Call(commands_hmm.insert_notifier, (mirror, span.start, span.size_bytes), options)
    )


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


def _block(town: Town) -> AddressRange:
    start = town.start + town.choose(town.pages // PMD_PAGES) * PMD_SIZE
    return AddressRange(start, start + PMD_SIZE)


def _map_block(town: Town) -> Call | None:
    process, span = town.process(), _block(town)
    if process is None:
        return None
    flags = MapFlag.PRIVATE | MapFlag.FIXED | MapFlag.ANONYMOUS
    if town.choose(5) == 0:
        flags = (MapFlag.PRIVATE, MapFlag.SHARED)[town.choose(2)] | MapFlag.FIXED | MapFlag.ANONYMOUS | MapFlag.HUGETLB
    return Call(commands_process.mmap, (process, span.start, span.size_bytes, Prot.READ | Prot.WRITE, flags))


def _touch_block(town: Town) -> Call | None:
    process, span = town.process(), _block(town)
    page = span.start + town.choose(PMD_PAGES) * PAGE_SIZE
    if process is None:
        return None
    if town.choose(4):
        return Call(commands_process.write_memory, (process, page, bytes([1 + town.choose(255)])))
    return Call(commands_process.read_memory, (process, page, 1))


HUGE_CALLS: Makers = ((_map_block, 8), (_touch_block, 16))
"""What makes room for huge pages and brings them in, and how often."""


def simulate_devices(seed: int) -> Scheduler:
    """As `testing.simulate`, with devices that have memory."""
    return simulate(seed, ncalls=80, limits=SMALL_WITH_DEVICES, more=DEVICE_CALLS)


def _cards(town: Town) -> list[DeviceId]:
    return [device.id for device in town.machine.devices.values() if device.region]


def _register_card(town: Town) -> Call | None:
    if len(_cards(town)) >= town.devices:
        return None
    options = {"memory_pages": _DEVICE_PAGES // 2, "driver_copies": town.choose(3) > 0, "dma": town.choose(3) == 0}
    options["evicts"] = town.choose(2) == 0
    return Call(commands_device.register_device, ("card",), options)


def _mirror_card(town: Town) -> Call | None:
    device, process = town.pick(_cards(town)), town.process()
    if device is None or process is None:
        return None
    policy = (DeadlinePolicy.FENCE, DeadlinePolicy.BLOCK, DeadlinePolicy.FAIL)[town.choose(3)]
    options = {"policy": policy, "update_on_fault": town.choose(2) == 0}
    return Call(commands_device.register_mirror, (device, process), options)


def _homes(town: Town) -> list[MirrorId]:
    return [mirror.id for mirror in town.machine.mirrors.values() if mirror.home is not None]


def _private(town: Town, space: AddressSpace) -> AddressRange | None:
    """Some pages of private memory: most of what is somewhere else cannot move."""
    vmas = [vma for vma in space.vmas if vma.backing is None and vma.readable]
    if not vmas:
        return None
    vma = vmas[town.choose(len(vmas))]
    touched = space.table.valid(vma.start, vma.end)[0].tolist()
    page = touched[town.choose(len(touched))] if touched and town.choose(4) else vma.start
    first = (page - vma.start) >> PAGE_SHIFT
    npages = min(1 + town.choose(4), vma.npages - first)
    return AddressRange(vma.start + first * PAGE_SIZE, vma.start + (first + npages) * PAGE_SIZE)


def _migrate(town: Town) -> Call | None:
    mirror = town.pick(_homes(town))
    span = None if mirror is None else _private(town, town.machine.mirrors[mirror].space)
    return None if span is None else Call(commands_device.migrate, (mirror, span))


def _migrate_back(town: Town) -> Call | None:
    mirror, span = town.pick(_homes(town)), town.span()
    return None if mirror is None else Call(commands_device.migrate_back, (mirror, span))


def _write_page(town: Town) -> Call | None:
    process = town.process()
    span = None if process is None else _private(town, town.machine.processes[process].space)
    if span is None:
        return None
    data = bytes([1 + town.choose(255)]) * span.size_bytes
    return Call(commands_process.write_memory, (process, span.start, data))


def _unregister_home(town: Town) -> Call | None:
    mirror = town.pick(_homes(town))
    return None if mirror is None or town.choose(2) else Call(commands_device.unregister_mirror, (mirror,))


MIRROR_CALLS: Makers = (
    (_register_card, 4), (_mirror_card, 6), (_migrate, 24), (_migrate_back, 2), (_write_page, 12), (_evict, 1),
    (_unregister_home, 1), (_unregister, 1), (_pin, 1), (_unpin, 1),
)  # fmt: skip
"""What makes calls of mirrors of 2015 whose devices have memory."""


def simulate_mirror_memory(seed: int) -> Scheduler:
    """A run with pages of mirrors in the memory of devices, whose drivers carry them, refuse and lose copies.

    Raises: as `simulate`.
    """
    first = (_register_card, _mirror_card, _migrate)
    return simulate(seed, ncalls=80, limits=SMALL_WITH_DEVICES, more=MIRROR_CALLS, first=first, contents=True)


def simulate_huge_pages(seed: int) -> Scheduler:
    """As `simulate_devices`, with huge pages at first touch, on every third seed where MADV_HUGEPAGE was given."""
    thp = Thp.ALWAYS if seed % 3 else Thp.MADVISE
    first = (_register, _attach, _touch_block, _touch_block, fork_process)
    return simulate(seed, ncalls=80, limits=LARGE_WITH_DEVICES, more=DEVICE_CALLS + HUGE_CALLS, first=first, thp=thp)


TOWNS: Mapping[str, Callable[[int], Scheduler]] = {
    "mirrors": simulate,
    "devices": simulate_devices,
    "memory": simulate_mirror_memory,
    "huge": simulate_huge_pages,
}
"""What a seed can be run in: by name, all workloads there are."""
