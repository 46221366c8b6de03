"""Fakes for tests: a device that remembers its translations, and seeded workloads.

`DeviceModel` is the device at the far end: it uses what it was told until its driver answers that it no longer
does.  So it sees what the model of the daemon cannot see by itself: an event that was never sent, or an edit that
came before the answer.

**Source**: our own.

**Invariants**: as long as a device may use a translation, the CPU's table has the same frame at that address, with no
less permission (invariant 1 and 3 of the project, seen from the device).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from hmm import commands_device, commands_file, commands_process, cpu_pte, pte
from hmm.address_space import Thp
from hmm.checked import Checked
from hmm.commands_device import DeviceFaulted, DeviceMigrated
from hmm.events import Delivery, Event, EventType
from hmm.journal import digest, replay
from hmm.machine import Limits, Machine, OperationRecord
from hmm.madvise import Advice
from hmm.mirror import DeadlinePolicy, Mirror, MirrorState
from hmm.scheduler import Call, Choose, Scheduler
from hmm.testing_memory import CarriedMemory, Contents
from hmm.units import PAGE_SIZE, PMD_PAGES, TASK_SIZE, AddressRange, Entries, MirrorId
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot

_WORD = (1 << 64) - 1


class LostTranslationError(AssertionError):
    """A device still uses a translation that the CPU's table no longer has."""


@dataclass(slots=True)
class DeviceModel:
    """What one device may use at the moment, per mirror: page address -> (frame, may write).

    Attributes:
        discarded: what a driver discarded by itself, with the last event sent before: it programs none of these
            pages from an older event that it has still to answer.
        checked: what was checked already, of the machine too.
        changes: how often translations of a mirror may have changed.
    """

    machine: Machine
    checked: Checked = field(default_factory=Checked)
    translations: dict[MirrorId, dict[int, tuple[int, bool]]] = field(default_factory=dict)
    discarded: dict[MirrorId, list[tuple[int, AddressRange]]] = field(default_factory=dict)
    changes: Counter[MirrorId] = field(default_factory=Counter)
    memory: CarriedMemory = field(init=False)

    def __post_init__(self) -> None:
        self.memory = CarriedMemory(self.machine)

    def answering(self, delivery: Delivery) -> bytes:
        """The driver handled an event and is about to answer: the device has done what the event asks."""
        held = self.translations.setdefault(delivery.mirror_id, {})
        self.changes[delivery.mirror_id] += 1
        event = delivery.event
        if event.etype is EventType.RELEASE:
            held.clear()
        elif event.etype in (EventType.DEVICE_RFAULT, EventType.DEVICE_WFAULT):
            self._program(delivery.mirror_id, event.spans, np.frombuffer(event.entries, "<u8"))
            for sequence, span in self.discarded.get(delivery.mirror_id, ()):
                if delivery.sequence <= sequence:
                    for address in range(span.start, span.end, PAGE_SIZE):
                        held.pop(address, None)
        else:
            _give_up(held, event)
        return self.memory.carry(delivery.mirror_id, event) if event.copy else b""

    def finished(self, record: OperationRecord[Any]) -> None:
        """A fault of a mirror that gets no update for its own faults tells the device by its result."""
        result = None if record.error else record.result
        if record.name == "discard_range" and not record.error:
            mirror_id, span = record.arguments[0], record.arguments[1]
            sequence = self.machine.mirrors[mirror_id].sequence
            self.discarded.setdefault(mirror_id, []).append((sequence, span))
        if isinstance(result, DeviceFaulted | DeviceMigrated):
            mirror_id, target = record.arguments[0], record.arguments[1]
            target = (target,) if isinstance(target, AddressRange) else target
            mirror = self.machine.mirrors.get(mirror_id)
            if mirror is not None and not mirror.update_on_fault and not mirror.unanswered:
                spans = tuple(target) if not isinstance(target, np.ndarray) else _single_pages(target)
                self._program(mirror_id, spans, result.entries)

    def check(self) -> None:
        """Raise LostTranslationError when a device could reach a frame that is no longer its page's."""
        for mirror_id, held in self.translations.items():
            mirror = self.machine.mirrors.get(mirror_id)
            if mirror is None or mirror.state is not MirrorState.LIVE:
                held.clear()  # the daemon lets no access through any more
                continue
            table = mirror.space.table
            state = (self.changes[mirror_id], self.checked.number(table))
            if held and self.checked.is_new((DeviceModel, mirror_id), *state):
                _check_held(mirror, held, table.lookup(np.fromiter(held, np.uint64, len(held))))

    def _program(self, mirror_id: MirrorId, spans: tuple[AddressRange, ...], entries: Any) -> None:
        mirror = self.machine.mirrors[mirror_id]
        held = self.translations.setdefault(mirror_id, {})
        self.changes[mirror_id] += 1
        addresses = [address for span in spans for address in range(span.start, span.end, PAGE_SIZE)]
        pfns = mirror.pfns(np.asarray(entries, np.uint64)).tolist()
        for address, entry, pfn in zip(addresses, np.asarray(entries).tolist(), pfns, strict=True):
            if entry & pte.VALID:
                held[address] = (pfn, bool(entry & pte.WRITE))


def _check_held(mirror: Mirror, held: dict[int, tuple[int, bool]], entries: Entries) -> None:
    # `entries` are the CPU's of the addresses that are held.
    pfns, writable = np.array(list(held.values()), np.int64).T
    on_device = cpu_pte.is_device_private(entries) | cpu_pte.is_migration(entries)
    good = (cpu_pte.is_present(entries) | on_device) & (cpu_pte.cpu_pfn(entries) == pfns)
    good &= (writable == 0) | on_device | cpu_pte.is_writable(entries)
    if not good.all():
        at = int(good.argmin())
        raise LostTranslationError(
            f"{mirror} uses frame {pfns[at]} at {list(held)[at]:#x}{' for writing' if writable[at] else ''}, "
            f"the CPU's entry is {int(entries[at]):#x}"
        )


def _give_up(held: dict[int, tuple[int, bool]], event: Event) -> None:
    for address in [address for address in held if event.overlaps(AddressRange(address, address + PAGE_SIZE))]:
        if event.pte_mask == pte.MASK_NONE:
            del held[address]
        elif event.pte_mask == pte.MASK_WRITE_PROTECT:
            held[address] = (held[address][0], False)


def _single_pages(addresses: Any) -> tuple[AddressRange, ...]:
    return tuple(AddressRange(address, address + PAGE_SIZE) for address in addresses.tolist())


def choices(seed: int) -> Choose:
    """The choices of a seed: numbers from a generator of our own (splitmix64), the same everywhere and always."""
    state = seed & _WORD

    def choose(n: int) -> int:
        nonlocal state
        state = (state + 0x9E3779B97F4A7C15) & _WORD
        mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _WORD
        return (mixed ^ (mixed >> 31)) % n

    return choose


SMALL = Limits(frames=400, device_frames=0, processes=8, directories=1 << 10)
"""Limits of a simulated machine: little enough that checking everything is cheap, and that memory runs out."""


_NEAR = 6
"""How far from the edge of a block calls go, in pages."""

Maker: TypeAlias = "Callable[[Town], Call | None]"
Makers: TypeAlias = "tuple[tuple[Maker, int], ...]"
"""What makes random calls, and how often each does."""


@dataclass(frozen=True, slots=True)
class Town:
    """Where a random workload takes place: a window of few pages, so that everything overlaps.

    Attributes:
        processes, devices: as many are kept alive at the most.
        pages: of the window, at `start` of every process.
        thp: where first touches bring in huge pages; then calls are about whole blocks, or pages near the edges of one.
        more: what else makes calls.
        first: what makes calls before all others.
    """

    machine: Machine
    choose: Choose
    processes: int = 3
    devices: int = 2
    pages: int = 24
    start: int = 0x1000_0000
    more: Makers = ()
    first: tuple[Maker, ...] = ()
    thp: Thp = Thp.NEVER

    def calls(self, ncalls: int) -> Iterator[Call]:
        """`ncalls` calls, each made at the moment it is started, so that it fits the state of that moment."""
        yield from self._first_calls()
        makers = [maker for maker, weight in _WEIGHTS + self.more for _ in range(weight)]
        made = 0
        while made < ncalls:
            call = makers[self.choose(len(makers))](self)
            if call is not None:
                made += 1
                yield call

    def _first_calls(self) -> Iterator[Call]:
        # Somebody to talk to: without it most of a short run would be calls that find nothing.
        yield Call(commands_process.create_process, ("simulated",), {"thp": self.thp})
        (process,) = self.machine.processes
        shared_pages = _NEAR if self.thp else self.pages // 3
        for npages, kind in ((self.pages, MapFlag.PRIVATE), (shared_pages, MapFlag.SHARED)):
            flags = kind | MapFlag.FIXED | MapFlag.ANONYMOUS
            place = (process, self.start, npages * PAGE_SIZE)
            yield Call(commands_process.mmap, (*place, Prot.READ | Prot.WRITE, flags))
        for dma in (False, True):
            yield Call(commands_device.register_device, ("simulated",), {"dma": dma})
        for device in list(self.machine.devices):
            yield _mirror(self, device, process)
        yield from filter(None, (maker(self) for maker in self.first))

    def span(self, most: int = 5) -> AddressRange:
        """One to `most` pages of the window, or whole blocks of it."""
        if not self.thp:
            first = self.choose(self.pages)
            npages = min(1 + self.choose(most), self.pages - first)
        elif self.choose(2):
            edge = self.choose(self.pages // PMD_PAGES + 1) * PMD_PAGES
            first = min(max(edge - _NEAR + self.choose(2 * _NEAR), 0), self.pages - 1)
            npages = min(1 + self.choose(most), self.pages - first)
        else:
            first = self.choose(self.pages // PMD_PAGES) * PMD_PAGES
            npages = min((1 + self.choose(2)) * PMD_PAGES, self.pages - first)
        start = self.start + first * PAGE_SIZE
        return AddressRange(start, start + npages * PAGE_SIZE)

    def pick(self, ids: Iterable[int]) -> int | None:
        """One of some identifiers; None when there is none."""
        known = list(ids)
        return known[self.choose(len(known))] if known else None

    def process(self) -> int | None:
        """A live process."""
        return self.pick(self.machine.processes)

    def mirror(self) -> int | None:
        """A registered mirror, live or not."""
        return self.pick(self.machine.mirrors)


class SimulationError(AssertionError):
    """A seed whose run broke an invariant; the message says how to run it again."""


def simulate(
    seed: int,
    *,
    ncalls: int = 60,
    limits: Limits = SMALL,
    more: Makers = (),
    first: tuple[Maker, ...] = (),
    thp: Thp = Thp.NEVER,
    contents: bool = False,
) -> Scheduler:
    """One seeded run: random calls by several processes and devices, drivers that delay, refuse and lose answers.

    Every invariant is checked after every step, and at the end that replaying the inputs gives the same state.

    Args:
        contents: also that pages hold what was written to them, wherever they are.

    Raises:
        SimulationError: something did not hold; names the seed.
    """
    choose = choices(seed)
    machine = Machine(limits, recording=True)
    devices = DeviceModel(machine)
    scheduler = Scheduler(
        machine,
        choose,
        Town(machine, choose, pages=2 * PMD_PAGES if thp else 24, more=more, first=first, thp=thp).calls(ncalls),
        finished=devices.finished,
        answering=devices.answering,
        checking=devices.check,
        checked=devices.checked,
    )
    if contents:
        _watch(scheduler, Contents(machine, devices.memory))
    try:
        scheduler.run()
        assert machine.inputs is not None
        assert digest(replay(machine.inputs, limits)) == digest(machine), "replaying the inputs gives another state"
    except Exception as error:
        raise SimulationError(f"seed {seed} after {scheduler.steps} steps: {error!r}") from error
    return scheduler


def _watch(scheduler: Scheduler, contents: Contents) -> None:
    devices_finished, devices_check = scheduler.finished, scheduler.checking

    def fails(event: Event, _: int) -> bool:
        failing = scheduler.choose(20) == 0
        if failing:
            contents.losing.add(event.space_id)
        return failing

    def finished(record: OperationRecord[Any]) -> None:
        devices_finished(record)
        contents.finished(record)

    def checking() -> None:
        devices_check()
        contents.check(scheduler.running)

    contents.memory.fails = fails
    scheduler.finished, scheduler.checking = finished, checking


def _create(town: Town) -> Call | None:
    if len(town.machine.processes) >= town.processes:
        return None
    return Call(commands_process.create_process, ("simulated",), {"thp": town.thp})


def fork_process(town: Town) -> Call | None:
    """A child of some process, or a thread of it."""
    process = town.process()
    if process is None or len(town.machine.processes) >= town.processes:
        return None
    share = town.choose(4) == 0
    return Call(commands_process.clone_thread if share else commands_process.fork, (process,))


def _exit(town: Town) -> Call | None:
    process = town.process()
    return None if process is None or town.choose(4) else Call(commands_process.exit_process, (process,))


def _mmap(town: Town) -> Call | None:
    process, span = town.process(), town.span(16)
    if process is None:
        return None
    shared = MapFlag.SHARED if town.choose(3) == 0 else MapFlag.PRIVATE
    file = town.pick(town.machine.file_names.values()) if town.choose(3) == 0 else None
    flags = shared | MapFlag.FIXED | (MapFlag(0) if file else MapFlag.ANONYMOUS)
    if town.choose(5) == 0:
        flags |= MapFlag.POPULATE
    prot = (Prot.READ | Prot.WRITE, Prot.READ | Prot.WRITE, Prot.READ, Prot.NONE)[town.choose(4)]
    offset = town.choose(4) * PAGE_SIZE if file else 0
    return Call(commands_process.mmap, (process, span.start, span.size_bytes, prot, flags, file or 0, offset))


def _munmap(town: Town) -> Call | None:
    process, span = town.process(), town.span()
    return None if process is None else Call(commands_process.munmap, (process, span.start, span.size_bytes))


def _mprotect(town: Town) -> Call | None:
    process, span = town.process(), town.span()
    prot = (Prot.READ | Prot.WRITE, Prot.READ, Prot.NONE)[town.choose(3)]
    return None if process is None else Call(commands_process.mprotect, (process, span.start, span.size_bytes, prot))


def _mremap(town: Town) -> Call | None:
    process, old, new = town.process(), town.span(), town.span()
    if process is None:
        return None
    flags = (0, 1, 3, 3, 7)[town.choose(5)]  # none, MAYMOVE, MAYMOVE|FIXED twice, with DONTUNMAP
    length = old.size_bytes if flags == 7 else new.size_bytes
    target = new.start if flags > 1 else 0
    return Call(commands_process.mremap, (process, old.start, old.size_bytes, length, flags, target))


def _madvise(town: Town) -> Call | None:
    process, span = town.process(), town.span()
    advice = [Advice.DONTNEED, Advice.DONTNEED, Advice.FREE, Advice.REMOVE, Advice.DONTFORK, Advice.WIPEONFORK]
    advice += [Advice.HUGEPAGE, Advice.NOHUGEPAGE, Advice.COLLAPSE, Advice.COLLAPSE] if town.thp else []
    chosen = advice[town.choose(len(advice))]
    return None if process is None else Call(commands_process.madvise, (process, span.start, span.size_bytes, chosen))


def _write(town: Town) -> Call | None:
    process, span = town.process(), town.span()
    data = bytes([1 + town.choose(255)]) * (span.size_bytes - 100)
    return None if process is None else Call(commands_process.write_memory, (process, span.start + 50, data))


def _read(town: Town) -> Call | None:
    process, span = town.process(), town.span()
    return None if process is None else Call(commands_process.read_memory, (process, span.start, span.size_bytes))


def _open(town: Town) -> Call | None:
    return Call(commands_file.open_file, (f"file{town.choose(2)}",), {"create": True})


def _truncate(town: Town) -> Call | None:
    file = town.pick(town.machine.file_names.values())
    return None if file is None else Call(commands_file.truncate_file, (file, town.choose(12) * PAGE_SIZE // 2))


def _punch(town: Town) -> Call | None:
    file = town.pick(town.machine.file_names.values())
    offset = town.choose(6) * PAGE_SIZE
    return None if file is None else Call(commands_file.punch_file, (file, offset, (1 + town.choose(3)) * PAGE_SIZE))


def _exec(town: Town) -> Call | None:
    process = town.process()
    return None if process is None or town.choose(4) else Call(commands_process.exec_process, (process, "other"))


def _msync(town: Town) -> Call | None:
    process, span = town.process(), town.span()
    return None if process is None else Call(commands_process.msync, (process, span.start, span.size_bytes, 4))


def _mlock(town: Town) -> Call | None:
    process, span = town.process(), town.span()
    return None if process is None else Call(commands_process.mlock, (process, span.start, span.size_bytes))


def _register_device(town: Town) -> Call | None:
    if len(town.machine.devices) >= town.devices:
        return None
    return Call(commands_device.register_device, ("simulated",), {"dma": town.choose(2) == 0})


def _register_mirror(town: Town) -> Call | None:
    device, process = town.pick(town.machine.devices), town.process()
    if device is None or process is None:
        return None
    return _mirror(town, device, process)


def _mirror(town: Town, device: int, process: int) -> Call:
    policy = (DeadlinePolicy.FENCE, DeadlinePolicy.BLOCK, DeadlinePolicy.FAIL)[town.choose(3)]
    options = {"policy": policy, "update_on_fault": town.choose(2) == 0}
    return Call(commands_device.register_mirror, (device, process), options)


def _unregister_mirror(town: Town) -> Call | None:
    mirror = town.mirror()
    return None if mirror is None or town.choose(3) else Call(commands_device.unregister_mirror, (mirror,))


def _fault(town: Town) -> Call | None:
    mirror, span = town.mirror(), town.span()
    if mirror is None:
        return None
    options = {"write": town.choose(2) == 0, "whole": town.choose(2) == 0, "wait": town.choose(4) != 0}
    if town.choose(3):
        return Call(commands_device.fault, (mirror, (span,)), options)
    step = (1 + town.choose(3)) * PAGE_SIZE
    return Call(commands_device.fault, (mirror, np.arange(town.start, span.end, step, dtype=np.uint64)), options)


def _device_write(town: Town) -> Call | None:
    mirror = town.mirror()
    if mirror is None:
        return None
    known, _ = town.machine.mirrors[mirror].table.valid(0, TASK_SIZE)
    address = int(known[town.choose(known.size)]) if known.size else town.span().start
    data = bytes([1 + town.choose(255)]) * 64
    return Call(commands_device.device_write, (mirror, ((address + 32, 64),), data))


def _dirty(town: Town) -> Call | None:
    mirror, span = town.mirror(), town.span()
    return None if mirror is None else Call(commands_device.dirty_range, (mirror, span))


def _discard(town: Town) -> Call | None:
    mirror, span = town.mirror(), town.span()
    return None if mirror is None or town.choose(3) else Call(commands_device.discard_range, (mirror, span))


_WEIGHTS: Makers = (
    (_create, 2), (fork_process, 3), (_exit, 1), (_exec, 1), (_mmap, 5), (_munmap, 2), (_mprotect, 3), (_mremap, 2),
    (_madvise, 3), (_write, 6), (_read, 3), (_open, 1), (_truncate, 1), (_punch, 1), (_msync, 1), (_mlock, 1),
    (_register_device, 1), (_register_mirror, 4), (_unregister_mirror, 1), (_fault, 12), (_device_write, 4),
    (_dirty, 1), (_discard, 1),
)  # fmt: skip
