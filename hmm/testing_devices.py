"""Random calls of devices that have memory, to be mixed into the workloads of testing.py.

**Source**: our own.

**Invariants**: those of the machine, which the simulation checks after every step.

**Absent**: a model of what the devices themselves use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from hmm import commands_device, commands_hmm, commands_process
from hmm.address_space import AddressSpace, Thp
from hmm.frames import RegionKind
from hmm.interval_notifier import IntervalMirror, IntervalNotifier
from hmm.limits import Limits
from hmm.madvise import Advice
from hmm.mirror import DeadlinePolicy
from hmm.range_fault import REQ_FAULT, REQ_WRITE
from hmm.scheduler import Call, Scheduler
from hmm.semantics import LINUX_6_12, LINUX_7
from hmm.testing import simulate
from hmm.testing_calls import fork_process
from hmm.testing_dma import DMA_CALLS, holder
from hmm.testing_failures import FAILURES_OF_DEVICES, FAILURES_OF_MIGRATIONS
from hmm.testing_huge_files import FIRST_HUGE_FILES, HUGE_FILE_CALLS
from hmm.testing_town import NEAR, Maker, Makers, Town, register_mirror
from hmm.units import PAGE_SIZE, PMD_PAGES, PMD_SIZE, AddressRange, DeviceId, MirrorId
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot, VmFlag

__all__ = [
    "COMPOUND",
    "COMPOUND_CALLS",
    "DEVICE_CALLS",
    "FIRST_COMPOUND",
    "HUGE_CALLS",
    "LARGE_WITH_DEVICES",
    "MIRROR_CALLS",
    "SMALL_WITH_DEVICES",
    "TOWNS",
    "simulate_compound",
    "simulate_devices",
    "simulate_huge_files",
    "simulate_huge_pages",
]

SMALL_WITH_DEVICES = Limits(frames=400, device_frames=64, processes=8, directories=1 << 10)
"""As `testing.SMALL`, with frame numbers for a few small devices."""
LARGE_WITH_DEVICES = Limits(frames=4200, device_frames=64, hugetlb_pages=2, processes=8, directories=1 << 10)
"""As much as a few huge pages need, too little for those of all processes."""
COMPOUND = Limits(frames=4200, device_frames=2048, hugetlb_pages=2, processes=8, directories=1 << 10)
"""With devices that a huge page fits into."""
_DEVICE_PAGES = 12
_RUN_AND_A_LITTLE = PMD_PAGES + 100
_REQUESTS = (0, REQ_FAULT, REQ_FAULT | REQ_WRITE)
_HUGE_ADVICE = (Advice.COLLAPSE, Advice.COLLAPSE, Advice.HUGEPAGE, Advice.NOHUGEPAGE, Advice.FREE, Advice.PAGEOUT)


def _policy(town: Town) -> DeadlinePolicy:
    return (DeadlinePolicy.FENCE, DeadlinePolicy.BLOCK, DeadlinePolicy.FAIL)[town.choose(3)]


def _device(town: Town) -> DeviceId | None:
    return town.pick(device.id for device in town.machine.devices.values() if device.region)


def _register(town: Town) -> Call | None:
    if len(town.machine.devices) > town.devices:
        return None
    kind = RegionKind.DEVICE_PRIVATE if town.choose(4) else RegionKind.DEVICE_COHERENT
    options = {"memory_pages": _DEVICE_PAGES, "evicts": town.choose(2) == 0, "kind": kind, "dma": town.choose(3) > 0}
    return Call(commands_device.register_device, ("with memory",), options)


def _unregister(town: Town) -> Call | None:
    device = _device(town)
    return None if device is None or town.choose(3) else Call(commands_device.unregister_device, (device,))


def _attach(town: Town) -> Call | None:
    device, process = _device(town), town.process()
    if device is None or process is None or len(town.interval_mirrors()) > town.processes:
        return None
    return Call(commands_hmm.attach, (device, process), {"policy": _policy(town)})


def _detach(town: Town) -> Call | None:
    mirror = town.pick(town.interval_mirrors())
    return None if mirror is None or town.choose(3) else Call(commands_hmm.detach, (mirror,))


def _insert(town: Town) -> Call | None:
    mirror, span = town.pick(town.interval_mirrors()), town.span(16)
    if mirror is None:
        return None
    if town.choose(3):
        span = AddressRange(town.start, town.start + town.pages * PAGE_SIZE)
    options = {"two_pass": town.choose(2) == 0, "filtered": town.choose(4) == 0}
    return Call(commands_hmm.insert_notifier, (mirror, span.start, span.size_bytes), options)


def _subscription(town: Town) -> tuple[MirrorId, int] | None:
    subscribed = [mirror for mirror in town.interval_mirrors() if _notifiers(town, mirror)]
    mirror = town.pick(subscribed)
    if mirror is None:
        return None
    number = town.pick(_notifiers(town, mirror))
    assert number is not None
    return mirror, number


def _notifiers(town: Town, mirror: MirrorId) -> dict[int, IntervalNotifier]:
    receiver = town.machine.receivers[mirror]
    assert isinstance(receiver, IntervalMirror)
    return receiver.notifiers


def _remove(town: Town) -> Call | None:
    subscription = _subscription(town)
    return None if subscription is None or town.choose(2) else Call(commands_hmm.remove_notifier, subscription)


def _read_section(town: Town) -> Call | None:
    subscription = _subscription(town)
    if subscription is None:
        return None
    if town.choose(2):
        return Call(commands_hmm.read_begin, subscription)
    sequence = _notifiers(town, subscription[0])[subscription[1]].sequence
    return Call(commands_hmm.read_retry, (*subscription, sequence))


def _range_fault(town: Town) -> Call | None:
    subscription = _subscription(town)
    if subscription is None:
        return None
    span, flags = town.mapped(_space(town, subscription[0])), _REQUESTS[town.choose(len(_REQUESTS))]
    if town.choose(3):
        return Call(commands_hmm.range_fault_unlocked, (*subscription, span, flags))
    sequence = _notifiers(town, subscription[0])[subscription[1]].sequence
    return Call(commands_hmm.range_fault, (*subscription, sequence, span, flags))


def _space(town: Town, mirror: MirrorId) -> AddressSpace:
    return town.machine.receivers[mirror].space


def _reach(town: Town) -> Call | None:
    mirror = holder(town)
    return None if mirror is None else _access(town, mirror, town.held[mirror])


def _reach_former(town: Town) -> Call | None:
    """What a device that makes mistakes does: it uses what its driver has given up."""
    mirror = town.pick(mirror for mirror in town.former if mirror in town.machine.receivers)
    return None if mirror is None else _access(town, mirror, town.former[mirror])


def _access(town: Town, mirror: MirrorId, held: Mapping[int, tuple[int, bool]]) -> Call | None:
    writes = town.choose(2) == 0
    pages = [page for page in held if held[page][1] or not writes][: 1 + town.choose(4)]
    if not pages:
        return None
    reached = (np.array(pages, np.uint64), np.array([held[page][0] for page in pages], np.int64))
    if not writes:
        return Call(commands_hmm.read_frames, (mirror, *reached))
    return Call(commands_hmm.write_frames, (mirror, *reached, bytes([1 + town.choose(255)]) * PAGE_SIZE * len(pages)))


def _find(town: Town) -> Call | None:
    mirror = town.pick(town.interval_mirrors())
    return None if mirror is None else Call(commands_hmm.find_vma, (mirror, town.span().start))


def _frames(town: Town) -> Call | None:
    device = _device(town)
    return None if device is None else Call(commands_hmm.device_frames, (device,))


def _to_device(town: Town) -> Call | None:
    mirror = town.pick(town.interval_mirrors())
    if mirror is None:
        return None
    return Call(commands_hmm.migrate_to_device, (mirror, town.mapped(_space(town, mirror), private=True)))


def _to_system(town: Town) -> Call | None:
    mirror = town.pick(town.interval_mirrors())
    if mirror is None:
        return None
    return Call(commands_hmm.migrate_to_system, (mirror, town.mapped(_space(town, mirror), private=True)))


def _evict(town: Town) -> Call | None:
    device = _device(town)
    return None if device is None or town.choose(3) else Call(commands_hmm.evict_device, (device,))


def _exclusive(town: Town) -> Call | None:
    mirror, owned = town.pick(town.interval_mirrors()), town.choose(2) == 0
    if mirror is None:
        return None
    span = town.mapped(_space(town, mirror), private=town.choose(8) > 0)
    return Call(commands_hmm.make_exclusive, (mirror, span), {"owned": owned})


def _give_back(town: Town) -> Call | None:
    mirror = town.pick(town.interval_mirrors())
    return None if mirror is None or town.choose(2) else Call(commands_hmm.give_back_exclusive, (mirror,))


DEVICE_CALLS: Makers = (
    (_register, 6), (_unregister, 1), (_attach, 10), (_detach, 1), (_insert, 8), (_remove, 2), (_read_section, 4),
    (_range_fault, 24), (_reach, 12), (_reach_former, 4), (_find, 1), (_frames, 1), (_to_device, 20), (_to_system, 6),
    (_evict, 2), (_exclusive, 10), (_give_back, 2), *DMA_CALLS, *FAILURES_OF_DEVICES,
)  # fmt: skip
"""What makes calls of devices with memory through today's interface, and how often."""
SUBSCRIBED: tuple[Maker, ...] = (_register, _attach, _insert, _range_fault)
"""What makes the first ones."""


def _block(town: Town) -> AddressRange:
    start = town.start + town.choose(town.pages // PMD_PAGES) * PMD_SIZE
    return AddressRange(start, start + PMD_SIZE)


def _map_block(town: Town) -> Call | None:
    process, span = town.process(), _block(town)
    if process is None:
        return None
    flags = MapFlag.PRIVATE | MapFlag.FIXED | MapFlag.ANONYMOUS
    if town.choose(4) == 0:
        flags = (MapFlag.PRIVATE, MapFlag.SHARED)[town.choose(2)] | MapFlag.FIXED | MapFlag.ANONYMOUS | MapFlag.HUGETLB
    return Call(commands_process.mmap, (process, span.start, span.size_bytes, Prot.READ | Prot.WRITE, flags))


def _near(town: Town, block: AddressRange) -> int:
    place = town.choose(2 * NEAR)
    return block.start + (place if place < NEAR else PMD_PAGES - 1 - place + NEAR) * PAGE_SIZE


def _touch_block(town: Town) -> Call | None:
    process, page = town.process(), _near(town, _block(town))
    if process is None:
        return None
    if town.choose(4):
        return Call(commands_process.write_memory, (process, page, bytes([1 + town.choose(255)]) * PAGE_SIZE))
    return Call(commands_process.read_memory, (process, page, PAGE_SIZE))


def _advise_block(town: Town) -> Call | None:
    process, span = town.process(), _block(town)
    if process is None:
        return None
    advice = _HUGE_ADVICE[town.choose(len(_HUGE_ADVICE))]
    return Call(commands_process.madvise, (process, span.start, span.size_bytes, advice))


def _register_large(town: Town) -> Call | None:
    call = _register(town)
    return call and replace(call, options={**call.options, "memory_pages": _RUN_AND_A_LITTLE})


def _move_blocks(town: Town) -> Call | None:
    mirror, block = town.pick(town.interval_mirrors()), _block(town)
    if mirror is None:
        return None
    span = block if town.choose(3) else town.mapped(_space(town, mirror), private=True)
    command = commands_hmm.migrate_to_device if town.choose(3) else commands_hmm.migrate_to_system
    return Call(command, (mirror, span), {"compound": True})


COMPOUND_CALLS: Makers = (
    (_register_large, 12), (_move_blocks, 80), *DMA_CALLS, *FAILURES_OF_MIGRATIONS,
)  # fmt: skip
"""What moves huge pages to devices and back as such, and maps for DMA, and how often."""
FIRST_COMPOUND: tuple[Maker, ...] = (_register_large, _attach, _insert, _touch_block)
"""What makes the first ones."""


def _map_hugetlb(town: Town) -> Call | None:
    process, span = town.process(), _block(town)
    flags = MapFlag.PRIVATE | MapFlag.FIXED | MapFlag.ANONYMOUS | MapFlag.HUGETLB
    place = (process, span.start, span.size_bytes)
    return None if process is None else Call(commands_process.mmap, (*place, Prot.READ | Prot.WRITE, flags))


def _use_hugetlb(town: Town) -> Call | None:
    """Private hugetlb memory is mapped, then written, and then forked."""
    processes = {
        process.id: vma
        for process in town.machine.processes.values()
        for vma in process.space.vmas
        if vma.has(VmFlag.HUGETLB) and not vma.shared
    }
    process = town.pick(processes)
    if process is None:
        return _map_hugetlb(town)
    vma, space = processes[process], town.machine.processes[process].space
    if space.table.get(vma.start) and len(town.machine.processes) < town.processes:
        return Call(commands_process.fork, (process,))
    return Call(commands_process.write_memory, (process, vma.start, bytes([1 + town.choose(255)]) * PAGE_SIZE))


HUGE_CALLS: Makers = ((_map_block, 16), (_touch_block, 32), (_advise_block, 20), (fork_process, 4), (_use_hugetlb, 8))
"""What makes room for huge pages and brings them in, and how often."""


def simulate_devices(seed: int) -> Scheduler:
    """As `testing.simulate`, with devices that have memory."""
    return simulate(seed, ncalls=80, limits=SMALL_WITH_DEVICES, more=DEVICE_CALLS, first=SUBSCRIBED)


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
    return register_mirror(town, device, process)


def _homes(town: Town) -> list[MirrorId]:
    return [mirror.id for mirror in town.machine.mirrors.values() if mirror.home is not None]


def _migrate(town: Town) -> Call | None:
    mirror = town.pick(_homes(town))
    if mirror is None:
        return None
    return Call(commands_device.migrate, (mirror, town.mapped(_space(town, mirror), 4, private=True)))


def _migrate_back(town: Town) -> Call | None:
    mirror = town.pick(_homes(town))
    if mirror is None:
        return None
    return Call(commands_device.migrate_back, (mirror, town.mapped(_space(town, mirror), private=True)))


def _unregister_home(town: Town) -> Call | None:
    mirror = town.pick(_homes(town))
    return None if mirror is None or town.choose(2) else Call(commands_device.unregister_mirror, (mirror,))


MIRROR_CALLS: Makers = (
    (_register_card, 8), (_mirror_card, 12), (_migrate, 48), (_migrate_back, 8), (_evict, 2), (_unregister_home, 2),
    (_unregister, 2), *FAILURES_OF_DEVICES,
)  # fmt: skip
"""What makes calls of mirrors of 2015 whose devices have memory, and how often."""
WITH_CARDS: tuple[Maker, ...] = (_register_card, _mirror_card, _migrate)
"""What makes the first ones."""


def simulate_mirror_memory(seed: int) -> Scheduler:
    """A run with pages of mirrors in the memory of devices, whose drivers carry them, refuse and lose copies.

    Raises: as `simulate`.
    """
    return simulate(seed, ncalls=80, limits=SMALL_WITH_DEVICES, more=MIRROR_CALLS, first=WITH_CARDS)


def simulate_huge_pages(seed: int) -> Scheduler:
    """As `simulate_devices`, with huge pages at first touch, on every third seed where MADV_HUGEPAGE was given."""
    thp = Thp.ALWAYS if seed % 3 else Thp.MADVISE
    first = (*SUBSCRIBED, _touch_block, _touch_block, _to_device, fork_process)
    return simulate(seed, ncalls=80, limits=LARGE_WITH_DEVICES, more=DEVICE_CALLS + HUGE_CALLS, first=first, thp=thp)


def simulate_compound(seed: int) -> Scheduler:
    """As `simulate_huge_pages`, with huge pages that move to devices and back as such, as Linux 7 does."""
    thp = Thp.ALWAYS if seed % 3 else Thp.MADVISE
    first = (*FIRST_COMPOUND, _move_blocks, _move_blocks, fork_process)
    more = DEVICE_CALLS + HUGE_CALLS + COMPOUND_CALLS
    return simulate(seed, ncalls=80, limits=COMPOUND, more=more, first=first, thp=thp, semantics=LINUX_7)


def simulate_huge_files(seed: int) -> Scheduler:
    """As `simulate_huge_pages`, with huge pages of files too; on every second seed with swap, or as Linux 7 does."""
    thp = Thp.ALWAYS if seed % 3 else Thp.MADVISE
    first = (*FIRST_HUGE_FILES, *SUBSCRIBED, fork_process)
    more, limits = DEVICE_CALLS + HUGE_CALLS + HUGE_FILE_CALLS, LARGE_WITH_DEVICES
    if seed % 4 == 1:
        limits = replace(limits, swap_pages=4096)
    semantics = LINUX_7 if seed % 4 == 3 else LINUX_6_12
    return simulate(seed, ncalls=80, limits=limits, more=more, first=first, thp=thp, semantics=semantics)


TOWNS: Mapping[str, Callable[[int], Scheduler]] = {
    "mirrors": simulate,
    "devices": simulate_devices,
    "memory": simulate_mirror_memory,
    "huge": simulate_huge_pages,
    "compound": simulate_compound,
    "huge-files": simulate_huge_files,
}
"""What a seed can be run in: by name, all workloads there are."""
