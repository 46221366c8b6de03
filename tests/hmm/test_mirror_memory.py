"""Device memory of 2015: pages of a mirror in its device's memory, there and back.

Sources are the mails of the series, by patch: 16 (special entries), 19 (entries of device memory), 20-22 and 25-28
(migration); what they leave open, or had wrong, stands in the docstrings of `hmm.mirror_memory` and
`hmm.mirror_migrate`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hmm import commands_device as devices
from hmm import commands_failures, commands_file, cpu_pte, pte
from hmm import commands_hmm as today
from hmm import commands_process as processes
from hmm.errors import (
    AccessDeniedError,
    BadAddressError,
    ConflictError,
    HmmError,
    InvalidRequestError,
    NoSuchObjectError,
    OutOfFramesError,
    SegmentationFault,
    Signal,
    TimedOutError,
    WouldDeadlockError,
)
from hmm.events import Cause, Event, EventType
from hmm.frames import RegionKind
from hmm.limits import Limits
from hmm.local import Local
from hmm.machine import Machine
from hmm.madvise import Advice
from hmm.mirror import DeadlinePolicy, MirrorState
from hmm.operation_record import Caller
from hmm.testing_memory import CarriedMemory
from hmm.units import PAGE_SIZE, PMD_SIZE, AddressRange
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot

START = 0x1000_0000
RW = Prot.READ | Prot.WRITE
FIXED = MapFlag.PRIVATE | MapFlag.ANONYMOUS | MapFlag.FIXED


def span(first: int, npages: int = 1) -> AddressRange:
    """Pages of the window."""
    return AddressRange(START + first * PAGE_SIZE, START + (first + npages) * PAGE_SIZE)


def page(number: int) -> bytes:
    """Contents that no other page has."""
    return bytes([number % 251 + 1]) * PAGE_SIZE


class Driver:
    """A driver that copies, keeps what it hears, and does what a test wants done inside the callback."""

    def __init__(self, memory: CarriedMemory) -> None:
        self.memory = memory
        self.events: list[Event] = []
        self.errors: dict[EventType, int] = {}
        self.meanwhile: Callable[[Event], object] | None = None

    def update(self, mirror_id: int, event: Event) -> int | bytes:
        """Handle one event."""
        self.events.append(event)
        if self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile(event)
        if event.etype in self.errors:
            return self.errors[event.etype]
        return self.memory.carry(mirror_id, event) if event.copy else 0

    def release(self, _: int) -> None:
        """Nothing to stop."""

    def heard(self) -> list[str]:
        """The types of all events since it was last asked."""
        names = [event.etype.name for event in self.events]
        self.events.clear()
        return names


class Bench:
    """A process with a window of private pages, mirrored by devices with memory."""

    def __init__(
        self,
        *,
        copies: bool = True,
        frames: int = 400,
        memory_pages: int = 32,
        cards: int = 1,
        evicts: bool = False,
        hugetlb_pages: int = 0,
    ) -> None:
        self.local = Local(Machine(Limits(frames=frames, device_frames=1024, hugetlb_pages=hugetlb_pages)))
        self.machine = self.local.machine
        self.memory = CarriedMemory(self.machine)
        self.call = self.local.call
        self.pid: int = self.call(processes.create_process, "p")
        self.call(processes.mmap, self.pid, START, 16 * PAGE_SIZE, RW, FIXED)
        self.cards = [self._card(f"card{number}", memory_pages, copies, evicts) for number in range(cards)]
        self.drivers: list[Driver] = []
        self.mirrors = [self.mirror_of(card, self.pid) for card in self.cards]

    def _card(self, name: str, memory_pages: int, copies: bool, evicts: bool) -> int:
        return self.call(devices.register_device, name, memory_pages=memory_pages, driver_copies=copies, evicts=evicts)

    def mirror_of(self, card: int, pid: int, **options: Any) -> int:
        """Let a card mirror a process, with a driver of its own."""
        mirror = self.call(devices.register_mirror, card, pid, **options)
        self.drivers.append(Driver(self.memory))
        self.local.attach(mirror, self.drivers[-1])
        return mirror

    def write(self, first: int, npages: int = 1, pid: int = 0) -> None:
        """The CPU writes pages that no other page is like."""
        data = b"".join(map(page, range(first, first + npages)))
        self.call(processes.write_memory, pid or self.pid, span(first).start, data)

    def read(self, first: int, npages: int = 1, pid: int = 0) -> list[int]:
        """The CPU reads pages.  Returns: the first byte of each."""
        return list(self.bytes_at(span(first).start, npages * PAGE_SIZE, pid)[::PAGE_SIZE])

    def bytes_at(self, address: int, length: int, pid: int = 0) -> bytes:
        """The CPU reads; a signal is raised."""
        accessed = self.call(processes.read_memory, pid or self.pid, address, length)
        if accessed.signal is not None:
            raise SegmentationFault("read", accessed.signal, accessed.address)
        data: bytes = accessed.data
        return data

    def migrate(self, first: int, npages: int = 1, mirror: int = 0) -> devices.DeviceMigrated:
        """Move pages to the device."""
        return self.call(devices.migrate, mirror or self.mirrors[0], span(first, npages))

    def back(self, first: int, npages: int = 1, mirror: int = 0) -> devices.DeviceMigrated:
        """Bring pages back."""
        return self.call(devices.migrate_back, mirror or self.mirrors[0], span(first, npages))

    def where(self, first: int, npages: int = 1, mirror: int = 0) -> str:
        """Of each page: `d` on the device, `s` in system memory, `x` poison, `.` nothing, `?` anything else."""
        space = self.machine.processes[self.pid].space
        number = mirror or self.mirrors[0]
        entries = space.table.read(span(first).start, span(first, npages).end)
        on_device = (
            pte.pte_test_valid_dev(self.machine.mirrors[number].table.read(span(first).start, span(first, npages).end))
            if number in self.machine.mirrors
            else np.zeros(npages, np.bool_)
        )
        kinds = {cpu_pte.PRESENT: "s", cpu_pte.DEVICE: "d", cpu_pte.POISON: "x", 0: "."}
        kind = [kinds.get(entry & (cpu_pte.PRESENT | cpu_pte.NON_PRESENT), "?") for entry in entries.tolist()]
        return "".join(one if (one == "d") == bool(own) else "?" for one, own in zip(kind, on_device, strict=True))

    def fill(self) -> int:
        """Leave two frames of system memory.  Returns: the process that has all others."""
        filler: int = self.call(processes.create_process, "filler")
        free = self.machine.frames.available
        self.call(processes.mmap, filler, START, free * PAGE_SIZE, RW, FIXED)
        self.call(processes.write_memory, filler, START, b"x" * ((free - 2) * PAGE_SIZE))
        return filler

    def used(self, card: int = 0) -> int:
        """Frames of a card's memory that are in use."""
        return self.machine.frames.region(self.machine.devices[self.cards[card]].region).used

    def space(self) -> Any:
        """The process's address space."""
        return self.machine.processes[self.pid].space


@pytest.fixture(params=[True, False], ids=["driver-copies", "daemon-copies"])
def bench(request: pytest.FixtureRequest) -> Any:
    """A process and a card in both modes; everything is checked at the end."""
    made = Bench(copies=request.param)
    yield made
    made.machine.check()


@pytest.fixture
def carried() -> Any:
    """A process and a card whose driver copies."""
    made = Bench()
    yield made
    made.machine.check()


# ---- there


def test_migrate_moves_pages_when_they_are_private(bench: Bench) -> None:
    """The CPU's entries name no frame any more, the mirror's are addresses of the device's memory."""
    bench.write(0, 4)
    before = bench.machine.frames.available
    result = bench.migrate(0, 4)
    assert (result.moved.npages, result.moved.end, result.moved.error) == (4, span(0, 4).end, None)
    assert bench.where(0, 5) == "dddd."
    assert pte.pte_dev_addr(result.entries).tolist() == [0, PAGE_SIZE, 2 * PAGE_SIZE, 3 * PAGE_SIZE]
    assert pte.pte_test_write(result.entries).all()
    assert (bench.machine.frames.available - before, bench.used()) == (4, 4)


def test_migrate_tells_the_driver_its_entries_when_it_is_done(carried: Bench) -> None:
    """copy_to_device with the destinations, then the update that every fault ends with."""
    carried.write(0, 2)
    carried.migrate(0, 2)
    copy, update = carried.drivers[0].events
    assert (copy.etype, copy.cause, copy.copy) == (EventType.COPY_TO_DEVICE, Cause.MIGRATE_TO_DEVICE, 1)
    assert CarriedMemory.addresses(copy) == [0, PAGE_SIZE]
    assert update.etype is EventType.DEVICE_RFAULT
    assert pte.pte_test_valid_dev(np.frombuffer(update.entries, "<u8")).all()


def test_migrate_asks_nothing_of_the_driver_when_the_daemon_copies() -> None:
    """By frames the driver is asked to stop using what it has entries of, and else hears of its entries only."""
    bench = Bench(copies=False)
    bench.write(0, 2)
    bench.migrate(0, 2)
    assert bench.drivers[0].heard() == ["DEVICE_RFAULT"]
    bench.read(0)
    assert bench.drivers[0].heard() == ["COPY_FROM_DEVICE"]
    bench.call(devices.fault, bench.mirrors[0], [span(0, 2)], write=True)
    bench.drivers[0].heard()
    bench.migrate(0, 2)
    (stop, _) = bench.drivers[0].events
    assert (stop.etype, stop.copy) == (EventType.COPY_TO_DEVICE, 0)


def test_migrate_moves_empty_pages_and_the_zero_page_as_zeroes(bench: Bench) -> None:
    """What holds nothing moves as a fresh page of zeroes, and so does the zero page."""
    bench.read(1)
    result = bench.migrate(0, 3)
    assert (result.moved.npages, bench.where(0, 3)) == (3, "ddd")
    assert bench.read(0, 3) == [0, 0, 0]


def test_migrate_leaves_pages_where_they_are_when_somebody_else_uses_them(bench: Bench) -> None:
    """A page with more references than mappings is left alone silently; its neighbours move, and it is mirrored."""
    bench.write(0, 3)
    bench.call(processes.pin, bench.pid, span(1), write=True)
    result = bench.migrate(0, 3)
    assert (result.moved.npages, result.moved.error, bench.where(0, 3)) == (2, None, "dsd")
    assert pte.pte_test_valid_pfn(result.entries).tolist() == [False, True, False]


def test_migrate_copies_a_page_that_others_share_since_a_fork(bench: Bench) -> None:
    """A shared page is what the next write would copy: this process gets its own, on the device."""
    bench.write(0)
    child = bench.call(processes.fork, bench.pid)
    bench.migrate(0)
    assert bench.where(0) == "d"
    assert bench.read(0, pid=child) == [1]
    assert bench.read(0) == [1]


def test_migrate_tells_other_mirrors_first(bench: Bench) -> None:
    """HMM_MIGRATE to every other mirror: they drop their entries before anything is copied."""
    plain = bench.call(devices.register_device, "plain")
    other = bench.mirror_of(plain, bench.pid)
    bench.write(0, 2)
    bench.call(devices.fault, other, [span(0, 2)], write=True)
    bench.drivers[1].heard()
    bench.drivers[1].meanwhile = lambda _: bench.drivers[0].events.append(
        Event(0, 0, 0, EventType.NONE, None, None, ())
    )
    bench.migrate(0, 2)
    assert bench.drivers[1].heard() == ["MIGRATE"]
    assert bench.drivers[0].events[0].etype is EventType.NONE
    assert not bench.call(devices.read_table, other, span(0, 2)).any()


def test_migrate_kills_another_mirror_when_it_answers_with_an_error(bench: Bench) -> None:
    """Its error is its own end, and the pages move all the same."""
    plain = bench.call(devices.register_device, "plain")
    other = bench.mirror_of(plain, bench.pid)
    bench.write(0)
    bench.call(devices.fault, other, [span(0)], write=False)
    bench.drivers[1].errors[EventType.MIGRATE] = errno.EIO
    assert bench.migrate(0).moved.npages == 1
    assert bench.machine.mirrors[other].state is MirrorState.RELEASED


def test_migrate_leaves_the_pages_that_the_driver_did_not_take(carried: Bench) -> None:
    """Partial success returns 0: the pages without VALID_DEV keep their entries, and stay writable."""
    carried.write(0, 4)
    carried.call(devices.fault, carried.mirrors[0], [span(0, 4)], write=True)
    carried.memory.fails = lambda _, number: number in (1, 2)
    result = carried.migrate(0, 4)
    assert (result.moved.npages, result.moved.error, carried.where(0, 4)) == (2, None, "dssd")
    assert pte.pte_test_write(result.entries).all()
    assert carried.used() == 2
    carried.memory.fails = lambda _, __: False
    assert carried.read(0, 4) == [1, 2, 3, 4]


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOMEM, OutOfFramesError), (errno.EIO, BadAddressError)])
def test_migrate_moves_nothing_when_the_driver_answers_with_an_error(
    carried: Bench, number: int, kind: type[HmmError]
) -> None:
    """An error aborts: no entry with VALID_DEV is installed (the posted code did), and the mirror lives."""
    carried.write(0, 2)
    carried.drivers[0].errors[EventType.COPY_TO_DEVICE] = number
    result = carried.migrate(0, 2)
    assert isinstance(result.moved.error, kind)
    assert (result.moved.npages, carried.where(0, 2), carried.used()) == (0, "ss", 0)
    assert carried.machine.mirrors[carried.mirrors[0]].state is MirrorState.LIVE
    assert carried.read(0, 2) == [1, 2]


def test_migrate_moves_what_fits_when_the_device_is_full() -> None:
    """In ascending order as far as there is room; the error says what did not fit, and what moved has moved."""
    bench = Bench(memory_pages=3)
    bench.write(0, 5)
    result = bench.migrate(0, 5)
    assert isinstance(result.moved.error, OutOfFramesError)
    assert (result.moved.error.reason, result.moved.error.address) == ("DEVICE_MEMORY", span(3).start)
    assert (result.moved.npages, bench.where(0, 5), bench.used()) == (3, "dddss", 3)
    bench.machine.check()


def test_migrate_evicts_what_went_to_the_device_first_when_it_is_full() -> None:
    """A device that evicts gets all of what is to move, in the place of the oldest; what the range has there stays."""
    bench = Bench(memory_pages=3, evicts=True)
    bench.write(0, 5)
    bench.migrate(1, 1)
    bench.migrate(0, 1)
    bench.migrate(2, 1)
    assert bench.migrate(2, 3).moved.npages == 2
    assert bench.where(0, 5) == "ssddd"
    bench.machine.check()


@pytest.mark.parametrize(
    ("first", "npages", "kind"),
    [(0, 513, InvalidRequestError), (0, 0, InvalidRequestError), (17, 1, BadAddressError)],
    ids=["too-long", "empty", "hole"],
)
def test_migrate_fails_when_the_range_is_wrong(carried: Bench, first: int, npages: int, kind: type[HmmError]) -> None:
    """More than a page of entries, or nothing: EINVAL; nothing mapped: EFAULT."""
    with pytest.raises(kind):
        carried.migrate(first, npages)
    assert carried.drivers[0].heard() == []


def test_migrate_fails_when_memory_is_not_private_and_anonymous(carried: Bench) -> None:
    """Files and shared memory have vm_ops: EINVAL.  What may not be read: EACCES."""
    file = carried.call(commands_file.open_file, "f", create=True)
    carried.call(commands_file.truncate_file, file, PAGE_SIZE)
    for at, prot, flags, number in (
        (20, RW, MapFlag.PRIVATE, file),
        (21, RW, MapFlag.SHARED | MapFlag.ANONYMOUS, 0),
        (22, Prot.NONE, MapFlag.PRIVATE | MapFlag.ANONYMOUS, 0),
    ):
        carried.call(processes.mmap, carried.pid, span(at).start, PAGE_SIZE, prot, flags | MapFlag.FIXED, number)
    for at, kind in ((20, InvalidRequestError), (21, InvalidRequestError), (22, AccessDeniedError)):
        with pytest.raises(kind):
            carried.migrate(at)


def test_migrate_fails_when_memory_is_hugetlb() -> None:
    """v12 mirrors it and never moves it: EINVAL, and its driver hears nothing."""
    bench = Bench(frames=1024, hugetlb_pages=1)
    bench.call(processes.mmap, bench.pid, 8 * PMD_SIZE, PMD_SIZE, RW, FIXED | MapFlag.HUGETLB)
    bench.call(processes.write_memory, bench.pid, 8 * PMD_SIZE, b"there")
    with pytest.raises(InvalidRequestError):
        bench.call(devices.migrate, bench.mirrors[0], AddressRange(8 * PMD_SIZE, 8 * PMD_SIZE + PAGE_SIZE))
    assert bench.drivers[0].heard() == []


def test_migrate_ends_at_the_end_of_the_mapping(bench: Bench) -> None:
    """hmm_mirror_fault() trims the event to the VMA: the caller goes on from there."""
    assert bench.migrate(14, 4).moved.end == span(16).start
    assert bench.where(14, 2) == "dd"


def test_mirror_fault_takes_the_types_that_were_posted(carried: Bench) -> None:
    """Faults and COPY_TO_DEVICE; the way back is EINVAL there, and `migrate_back` here."""
    carried.write(0)
    mirror = carried.mirrors[0]
    assert carried.call(devices.mirror_fault, mirror, span(0), EventType.DEVICE_WFAULT).error is None
    assert carried.call(devices.mirror_fault, mirror, span(0), EventType.COPY_TO_DEVICE).npages == 1
    for etype in (EventType.COPY_FROM_DEVICE, EventType.MIGRATE):
        with pytest.raises(InvalidRequestError):
            carried.call(devices.mirror_fault, mirror, span(0), etype)


def test_migrate_fails_when_the_device_has_no_memory_for_it(carried: Bench) -> None:
    """A device without memory, or with memory that the CPU reaches, has nowhere for a mirror's pages: ENODEV."""
    for options in ({}, {"memory_pages": 4, "kind": RegionKind.DEVICE_COHERENT}):
        device = carried.call(devices.register_device, "other", **options)
        mirror = carried.call(devices.register_mirror, device, carried.pid)
        with pytest.raises(NoSuchObjectError):
            carried.migrate(0, mirror=mirror)


def test_register_refuses_copies_by_a_driver_when_the_memory_is_not_its_own(carried: Bench) -> None:
    """Memory that the CPU reaches has its bytes here; and there must be memory."""
    for options in ({"memory_pages": 4, "kind": RegionKind.DEVICE_COHERENT}, {}):
        with pytest.raises(InvalidRequestError):
            carried.call(devices.register_device, "x", driver_copies=True, **options)


def test_devices_with_memory_serve_one_interface(carried: Bench) -> None:
    """The pages of a mirror come back through it; a driver of today would take them without."""
    with pytest.raises(ConflictError):
        carried.call(today.attach, carried.cards[0], carried.pid)
    card = carried.call(devices.register_device, "modern", memory_pages=4)
    carried.call(today.attach, card, carried.pid)
    with pytest.raises(ConflictError):
        carried.call(devices.register_mirror, card, carried.pid)


# ---- the device on its own pages


def test_fault_leaves_the_device_its_own_pages(bench: Bench) -> None:
    """A read fault finds the entry valid; a write fault sets WRITE when the VMA permits it (patch 19)."""
    bench.write(0, 4)
    bench.migrate(1, 2)
    mirror = bench.mirrors[0]
    bench.call(processes.mprotect, bench.pid, START, 16 * PAGE_SIZE, Prot.READ)
    assert not pte.pte_test_write(bench.call(devices.read_table, mirror, span(1, 2))).any()
    faulted = bench.call(devices.fault, mirror, [span(0, 4)], write=False)
    assert pte.pte_test_valid_dev(faulted.entries).tolist() == [False, True, True, False]
    assert isinstance(bench.call(devices.fault, mirror, [span(1)], write=True).parts[0].error, AccessDeniedError)
    bench.call(processes.mprotect, bench.pid, START, 16 * PAGE_SIZE, RW)
    faulted = bench.call(devices.fault, mirror, [span(0, 4)], write=True)
    assert pte.pte_test_write(faulted.entries).all()
    assert bench.where(0, 4) == "sdds"


def test_fault_brings_in_what_is_missing_beside_pages_on_the_device(bench: Bench) -> None:
    """Empty pages around those on the device are faulted in, and those stay."""
    bench.migrate(1)
    faulted = bench.call(devices.fault, bench.mirrors[0], [span(0, 3)], write=True)
    assert (bench.where(0, 3), pte.pte_test_write(faulted.entries).all()) == ("sds", True)
    scattered = np.array([span(1).start, span(5).start], np.uint64)
    assert bench.call(devices.fault, bench.mirrors[0], scattered, write=False).parts[0].error is None
    assert bench.where(5) == "s"


def test_device_reads_and_writes_its_memory_when_the_daemon_has_the_bytes() -> None:
    """By frames an access goes through the entry as any other, and the CPU then sees it."""
    bench = Bench(copies=False)
    bench.write(0, 2)
    bench.migrate(0, 2)
    mirror, address = bench.mirrors[0], span(1).start
    assert bench.call(devices.device_read, mirror, [(address, 3)]) == page(1)[:3]
    bench.call(devices.device_write, mirror, [(address, 3)], b"new")
    assert bench.bytes_at(address, 3) == b"new"
    bench.machine.check()


def test_device_access_fails_when_its_driver_has_the_bytes(carried: Bench) -> None:
    """The daemon has nothing to read there: EFAULT, and nothing is done."""
    carried.write(0)
    carried.migrate(0)
    with pytest.raises(BadAddressError, match="own memory"):
        carried.call(devices.device_read, carried.mirrors[0], [(span(0).start, 1)])


def test_dirty_reaches_the_page_when_it_comes_back(bench: Bench) -> None:
    """What the device wrote is dirty in system memory; the posted code dropped it."""
    bench.write(0)
    bench.migrate(0)
    bench.call(devices.dirty_range, bench.mirrors[0], span(0))
    bench.read(0)
    assert cpu_pte.is_dirty(bench.space().table.get(span(0).start))


def test_discard_leaves_the_pages_that_are_on_the_device(bench: Bench) -> None:
    """Their entries are the only record of where they are; in the posted code they were lost."""
    bench.write(0, 2)
    bench.call(devices.fault, bench.mirrors[0], [span(0, 2)], write=False)
    bench.migrate(1)
    bench.call(devices.discard_range, bench.mirrors[0], span(0, 2))
    assert bench.call(devices.read_table, bench.mirrors[0], span(0)).tolist() == [0]
    assert bench.read(0, 2) == [1, 2]


# ---- back


def test_cpu_gets_a_page_back_when_it_touches_it(bench: Bench) -> None:
    """COPY_FROM_DEVICE for the touched page alone; the mirror's entry goes, the CPU's names a new page."""
    bench.write(0, 3)
    bench.migrate(0, 3)
    bench.drivers[0].heard()
    assert bench.read(1) == [2]
    assert bench.drivers[0].heard() == ["COPY_FROM_DEVICE"]
    assert (bench.where(0, 3), bench.used()) == ("dsd", 2)
    bench.write(2)
    assert bench.where(0, 3) == "dss"


def test_page_comes_back_with_what_the_device_wrote(carried: Bench) -> None:
    """The driver's bytes are the page's."""
    carried.write(0)
    carried.migrate(0)
    carried.memory.write(carried.cards[0], 0, b"from the device")
    assert carried.bytes_at(START, 15) == b"from the device"


def test_access_after_the_page_went_home_is_reported_with_the_copy_that_took_it(bench: Bench) -> None:
    """The device may use the page until its driver has answered COPY_FROM_DEVICE, and not afterwards."""
    bench.write(0)
    bench.migrate(0)
    bench.read(0)
    with pytest.raises(BadAddressError) as caught:
        bench.call(devices.device_read, bench.mirrors[0], [(START, 1)])
    assert caught.value.violation is not None
    assert caught.value.violation.taking is not None
    assert caught.value.violation.taking.event == "COPY_FROM_DEVICE"


def test_migrate_back_brings_what_is_there(bench: Bench) -> None:
    """By the driver's request, as far as pages of the range are on its device."""
    bench.write(0, 4)
    bench.migrate(1, 2)
    result = bench.back(0, 4)
    assert (result.moved.npages, bench.where(0, 4), bench.used()) == (2, "ssss", 0)
    assert bench.read(0, 4) == [1, 2, 3, 4]
    assert bench.back(0, 4).moved.npages == 0


def test_pages_stay_on_the_device_when_system_memory_is_full(bench: Bench) -> None:
    """Entries without a page go back to what they were; what found room is back, and the error is reported."""
    bench.write(0, 4)
    bench.migrate(0, 4)
    filler = bench.fill()
    result = bench.back(0, 4)
    assert isinstance(result.moved.error, OutOfFramesError)
    assert (result.moved.npages, result.moved.end, bench.where(0, 4)) == (2, span(2).start, "ssdd")
    with pytest.raises(OutOfFramesError):
        bench.read(3)
    bench.call(processes.exit_process, filler)
    assert bench.read(0, 4) == [1, 2, 3, 4]


def test_fork_gives_the_child_copies_and_leaves_the_device_its_pages(bench: Bench) -> None:
    """The driver copies only; the parent's entries keep WRITE (the posted code rewrote them)."""
    bench.write(0, 3)
    bench.migrate(0, 2)
    bench.drivers[0].heard()
    child = bench.call(processes.fork, bench.pid)
    assert (bench.where(0, 3), bench.used()) == ("dds", 2)
    assert pte.pte_test_write(bench.call(devices.read_table, bench.mirrors[0], span(0, 2))).all()
    assert bench.read(0, 3, pid=child) == [1, 2, 3]
    bench.call(processes.write_memory, child, START, b"child")
    assert bench.read(0, 3) == [1, 2, 3]


def test_fork_asks_for_copies_that_do_not_end_the_pages(carried: Bench) -> None:
    """COPY_FROM_DEVICE because of a fork keeps every entry: the device is not paused."""
    carried.write(0)
    carried.migrate(0)
    carried.drivers[0].heard()
    carried.call(processes.fork, carried.pid)
    fork, copy = carried.drivers[0].events
    assert (fork.etype, copy.etype, copy.keeps, copy.cause) == (
        EventType.FORK,
        EventType.COPY_FROM_DEVICE,
        True,
        Cause.FORK,
    )
    assert (copy.pte_mask, fork.pte_mask) == (pte.MASK_ALL, pte.MASK_WRITE_PROTECT)


def test_fork_poisons_the_childs_page_alone_when_its_copy_fails(carried: Bench) -> None:
    """The device still has the parent's; poison stays poison in a grandchild (the posted code locked it again)."""
    carried.write(0, 2)
    carried.migrate(0, 2)
    carried.memory.fails = lambda _, number: number == 1
    child = carried.call(processes.fork, carried.pid)
    grandchild = carried.call(processes.fork, child)
    carried.memory.fails = lambda _, __: False
    for pid in (child, grandchild):
        assert carried.read(0, pid=pid) == [1]
        with pytest.raises(SegmentationFault) as caught:
            carried.read(1, pid=pid)
        assert caught.value.signal is Signal.BUS_POISON
    assert carried.read(0, 2) == [1, 2]


def test_fork_fails_when_there_is_no_room_for_copies(bench: Bench) -> None:
    """ENOMEM; the child is gone, the parent's pages are where they were."""
    bench.write(0, 4)
    bench.migrate(0, 4)
    bench.fill()
    with pytest.raises(OutOfFramesError):
        bench.call(processes.fork, bench.pid)
    assert (bench.where(0, 4), bench.machine.frames.available) == ("dddd", 2)


def test_mremap_brings_pages_back_before_they_move(bench: Bench) -> None:
    """MIGRATE clears entries of the device, whose driver frees that memory: the pages must be home by then."""
    bench.write(0, 3)
    bench.migrate(0, 3)
    bench.drivers[0].heard()
    moved = bench.call(processes.mremap, bench.pid, START, 3 * PAGE_SIZE, 3 * PAGE_SIZE, 3, START + (1 << 24))
    assert bench.drivers[0].heard() == ["COPY_FROM_DEVICE", "MIGRATE", "MUNMAP"]
    assert bench.bytes_at(moved, 3 * PAGE_SIZE) == page(0) + page(1) + page(2)


def test_mprotect_brings_pages_back_when_they_may_not_be_read_any_more(bench: Bench) -> None:
    """PROT_NONE is MUNMAP to a mirror, and the contents must outlive it; PROT_READ takes WRITE and leaves the page."""
    bench.write(0, 2)
    bench.migrate(0, 2)
    bench.call(processes.mprotect, bench.pid, START, PAGE_SIZE, Prot.READ)
    assert bench.where(0, 2) == "dd"
    bench.call(processes.mprotect, bench.pid, START, 2 * PAGE_SIZE, Prot.NONE)
    assert bench.where(0, 2) == "ss"
    bench.call(processes.mprotect, bench.pid, START, 2 * PAGE_SIZE, RW)
    assert bench.read(0, 2) == [1, 2]


@pytest.mark.parametrize("advice", [Advice.DONTNEED, Advice.FREE])
def test_madvise_discards_or_keeps_pages_of_a_device(bench: Bench, advice: Advice) -> None:
    """DONTNEED drops them where they are; FREE, which keeps what is not reclaimed, brings them back first."""
    bench.write(0, 2)
    bench.migrate(0, 2)
    bench.drivers[0].heard()
    bench.call(processes.madvise, bench.pid, START, 2 * PAGE_SIZE, advice)
    heard = bench.drivers[0].heard()
    assert heard == (["MIGRATE"] if advice is Advice.DONTNEED else ["COPY_FROM_DEVICE", "MIGRATE"])
    assert bench.read(0, 2) == ([0, 0] if advice is Advice.DONTNEED else [1, 2])
    assert bench.used() == 0


def test_munmap_and_exit_free_the_devices_memory(bench: Bench) -> None:
    """Nothing is copied that nobody will see again."""
    bench.write(0, 4)
    bench.migrate(0, 4)
    bench.call(processes.munmap, bench.pid, START, 2 * PAGE_SIZE)
    assert bench.used() == 2
    bench.call(processes.exit_process, bench.pid)
    assert bench.used() == 0
    assert "COPY_FROM_DEVICE" not in bench.drivers[0].heard()


def test_unregister_mirror_brings_everything_back_first(bench: Bench) -> None:
    """Orderly leaving loses nothing; in the posted code the next touch got poison."""
    bench.write(0, 4)
    bench.migrate(0, 4)
    bench.drivers[0].heard()
    bench.call(devices.unregister_mirror, bench.mirrors[0])
    assert bench.drivers[0].heard() == ["COPY_FROM_DEVICE", "MUNMAP"]
    bench.call(devices.unregister_device, bench.cards[0])
    assert bench.read(0, 4) == [1, 2, 3, 4]


def test_unregister_mirror_fails_when_there_is_no_room(bench: Bench) -> None:
    """ENOMEM: it stays registered and keeps its pages."""
    bench.write(0, 4)
    bench.migrate(0, 4)
    filler = bench.fill()
    with pytest.raises(OutOfFramesError):
        bench.call(devices.unregister_mirror, bench.mirrors[0])
    bench.call(processes.exit_process, filler)
    assert bench.migrate(5).moved.npages == 1
    assert bench.read(0, 4) == [1, 2, 3, 4]


def test_unregister_mirror_is_tried_again_by_who_waits_when_it_fails(carried: Bench) -> None:
    """Somebody else's call may fail: then the one that waited for it ends the mirror, whose pages come back."""
    machine, mirror = carried.machine, carried.mirrors[0]
    machine.mirrors[mirror].policy = DeadlinePolicy.FAIL
    carried.write(0)
    assert carried.migrate(0).moved.npages == 1
    first = machine.start(Caller(), devices.unregister_mirror, mirror)
    (copy,) = machine.take_outbox()
    machine.abandon(mirror, copy.sequence)
    machine.answer(mirror, copy.sequence, errno.EIO)  # late
    second = machine.start(Caller(), devices.unregister_mirror, mirror)
    assert (machine.blockers(second), machine.unanswered(second)) == ([first.id], [])
    machine.resume(first.id)
    assert isinstance(first.error, TimedOutError)
    while not second.done:
        machine.resume(second.id)
        for sent in machine.take_outbox():
            results = carried.memory.carry(mirror, sent.event) if sent.event.copy else b""
            machine.answer(mirror, sent.sequence, results=results)
    assert (second.result, mirror in machine.mirrors, carried.read(0)) == (None, False, [1])


def test_evict_device_brings_the_pages_of_mirrors_back(bench: Bench) -> None:
    """Through their drivers."""
    bench.write(0, 4)
    bench.migrate(0, 4)
    assert bench.call(today.evict_device, bench.cards[0]) == 4
    assert (bench.used(), bench.read(0, 4)) == (0, [1, 2, 3, 4])


# ---- from device to device


@pytest.mark.parametrize("copies", [True, False])
def test_migrate_takes_a_page_from_another_device(copies: bool) -> None:
    """The device that has it gives it back, hears of the migration, and the other one gets it: nothing is lost."""
    bench = Bench(copies=copies, cards=2)
    bench.write(0, 2)
    bench.migrate(0, 2)
    for driver in bench.drivers:
        driver.heard()
    assert bench.migrate(0, 2, bench.mirrors[1]).moved.npages == 2
    assert bench.drivers[0].heard() == ["COPY_FROM_DEVICE", "MIGRATE"]
    assert bench.drivers[1].heard() == (["COPY_TO_DEVICE"] if copies else []) + ["DEVICE_RFAULT"]
    assert (bench.used(0), bench.used(1)) == (0, 2)
    bench.machine.check()
    assert bench.read(0, 2) == [1, 2]


def test_device_fault_takes_a_page_from_another_device() -> None:
    """A fault of one device brings the page of another to system memory, as a CPU's would."""
    bench = Bench(cards=2)
    bench.write(0)
    bench.migrate(0)
    faulted = bench.call(devices.fault, bench.mirrors[1], [span(0)], write=True)
    assert pte.pte_test_valid_pfn(faulted.entries).all()
    assert bench.where(0) == "s"


def test_event_of_another_spares_the_pages_of_a_device(carried: Bench) -> None:
    """A driver of today migrates around them: what would clear entries of pages that stay brings them back first."""
    card = carried.call(devices.register_device, "modern", memory_pages=8)
    modern = carried.call(today.attach, card, carried.pid)
    carried.call(today.insert_notifier, modern, START, 16 * PAGE_SIZE)
    carried.write(0, 3)
    carried.migrate(1)
    carried.call(today.migrate_to_device, modern, span(0, 3))
    assert carried.read(0, 3) == [1, 2, 3]


# ---- loss


def lost(bench: Bench, first: int) -> bool:
    """Whether a page is poison: SIGBUS to whoever touches it."""
    with pytest.raises(SegmentationFault) as caught:
        bench.read(first)
    return caught.value.signal is Signal.BUS_POISON


def test_pages_are_lost_with_the_driver_that_has_them(carried: Bench) -> None:
    """A fenced driver's memory is gone: poison for CPUs and devices, never zeroes, and it does not spread."""
    carried.write(0, 3)
    carried.migrate(0, 2)
    carried.machine.fence(carried.mirrors[0], "it died")
    assert carried.where(0, 3) == "xxs"
    assert lost(carried, 0)
    assert carried.read(2) == [3]
    assert carried.used() == 0
    plain = carried.mirror_of(carried.call(devices.register_device, "plain"), carried.pid)
    assert isinstance(carried.call(devices.fault, plain, [span(0)], write=False).parts[0].error, BadAddressError)
    carried.call(processes.madvise, carried.pid, START, PAGE_SIZE, Advice.DONTNEED)
    assert carried.read(0) == [0]


def test_dirty_of_lost_pages_goes_with_them(carried: Bench) -> None:
    """The frames that they had are free: nothing may be noted there any more."""
    carried.write(0, 2)
    carried.migrate(0, 2)
    carried.call(devices.dirty_range, carried.mirrors[0], span(0, 2))
    carried.machine.fence(carried.mirrors[0], "it died")
    carried.machine.check()
    assert carried.used() == 0


def test_pages_outlive_their_driver_when_the_daemon_has_them() -> None:
    """By frames nothing was only with the driver: the pages come back without being asked for."""
    bench = Bench(copies=False)
    bench.write(0, 2)
    bench.migrate(0, 2)
    bench.machine.fence(bench.mirrors[0], "it died")
    bench.machine.check()
    bench.drivers[0].heard()
    assert bench.read(0, 2) == [1, 2]
    assert bench.drivers[0].heard() == []


def test_page_is_poison_when_its_copy_fails(carried: Bench) -> None:
    """VALID cleared for a page: that page is lost, the others are back, and the mirror lives."""
    carried.write(0, 3)
    carried.migrate(0, 3)
    carried.memory.fails = lambda _, number: number == 1
    carried.back(0, 3)
    assert carried.where(0, 3) == "sxs"
    assert (carried.used(), lost(carried, 1)) == (0, True)
    assert carried.machine.mirrors[carried.mirrors[0]].state is MirrorState.LIVE


def test_mirror_is_killed_when_its_copy_is_answered_with_an_error(carried: Bench) -> None:
    """Any error kills that mirror: the page is poison, and what else it has is lost with it."""
    carried.write(0, 3)
    carried.migrate(0, 2)
    carried.drivers[0].heard()
    carried.drivers[0].errors[EventType.COPY_FROM_DEVICE] = errno.EIO
    assert lost(carried, 0)
    assert carried.machine.mirrors[carried.mirrors[0]].state is MirrorState.RELEASED
    assert carried.drivers[0].heard() == ["COPY_FROM_DEVICE", "MUNMAP"]
    assert (carried.where(0, 3), carried.used()) == ("xxs", 0)


def test_page_stays_when_the_daemons_copy_to_the_device_fails() -> None:
    """A page that copy_to_device gives no destination has the entry that it had; it is no error, and happens once."""
    bench = Bench(copies=False)
    bench.write(0, 3)
    bench.call(devices.fault, bench.mirrors[0], [span(0, 3)], write=True)
    bench.call(commands_failures.inject_copy_failure, bench.mirrors[0], 2)
    result = bench.migrate(0, 4)
    assert (result.moved.npages, result.moved.error, bench.where(0, 4), bench.used()) == (3, None, "dsdd", 3)
    assert pte.pte_test_valid_pfn(result.entries).tolist() == [False, True, False, False]
    assert pte.pte_test_write(result.entries).all()
    assert bench.migrate(0, 4).moved.npages == 1
    assert bench.read(0, 4) == [1, 2, 3, 0]
    bench.machine.check()


@pytest.mark.parametrize("touched", [True, False])
def test_page_is_poison_when_the_daemons_copy_back_fails(touched: bool) -> None:
    """As where the driver clears VALID of a page: that one is lost, the others are back, and the mirror lives."""
    bench = Bench(copies=False)
    bench.write(0, 3)
    bench.call(commands_failures.inject_copy_failure, bench.mirrors[0], 3 + 2)
    bench.migrate(0, 3)
    if touched:
        assert bench.read(0) == [1]
        assert lost(bench, 1)
        assert bench.read(2) == [3]
    else:
        bench.back(0, 3)
        assert lost(bench, 1)
    assert (bench.where(0, 3), bench.used()) == ("sxs", 0)
    assert bench.machine.mirrors[bench.mirrors[0]].state is MirrorState.LIVE
    bench.machine.check()


def test_fork_poisons_the_childs_page_alone_when_the_daemons_copy_fails() -> None:
    """As where the driver's copy fails."""
    bench = Bench(copies=False)
    bench.write(0, 2)
    bench.migrate(0, 2)
    bench.call(commands_failures.inject_copy_failure, bench.mirrors[0], 2)
    child = bench.call(processes.fork, bench.pid)
    assert bench.read(0, pid=child) == [1]
    with pytest.raises(SegmentationFault) as caught:
        bench.read(1, pid=child)
    assert caught.value.signal is Signal.BUS_POISON
    bench.machine.check()
    assert bench.read(0, 2) == [1, 2]


def test_page_is_back_when_an_error_answers_what_the_daemon_copied() -> None:
    """By frames the bytes are here: the mirror is killed and nothing is lost."""
    bench = Bench(copies=False)
    bench.write(0, 2)
    bench.migrate(0, 2)
    bench.drivers[0].errors[EventType.COPY_FROM_DEVICE] = errno.EIO
    assert bench.read(0, 2) == [1, 2]
    assert bench.machine.mirrors[bench.mirrors[0]].state is MirrorState.RELEASED
    bench.machine.check()


def test_page_is_lost_when_the_driver_says_it_brought_it_and_did_not(carried: Bench) -> None:
    """A result of 0 without bytes would be a page of zeroes that nobody wrote."""
    carried.write(0)
    carried.migrate(0)
    carried.drivers[0].memory = type("Lazy", (), {"carry": lambda *_: bytes(1)})()  # type: ignore[assignment]
    assert lost(carried, 0)


# ---- copies, as drivers carry them


def copying(bench: Bench, etype: EventType) -> Event:
    """The event of a copy in the middle of it, as it was left to the test."""
    (event,) = [event for event in bench.drivers[0].events if event.etype is etype]
    return event


def test_read_copy_takes_the_devices_permission_to_write(carried: Bench) -> None:
    """Who has asked for the bytes has stopped writing: a later write would be lost, so that it is refused."""
    carried.write(0)
    mirror = carried.mirrors[0]
    carried.call(devices.fault, mirror, [span(0)], write=True)
    carried.drivers[0].heard()

    def look(event: Event) -> None:
        carried.call(devices.device_write, mirror, [(START, 5)], b"early")
        data = carried.call(devices.read_copy, mirror, event.copy, 0, 1)
        assert data[:5] == b"early"
        with pytest.raises(AccessDeniedError):
            carried.call(devices.device_write, mirror, [(START, 4)], b"late")

    carried.drivers[0].meanwhile = look
    carried.migrate(0)
    assert carried.bytes_at(START, 5) == b"early"


def test_copies_fail_when_they_are_not_what_is_asked_for(carried: Bench) -> None:
    """Pages that the copy does not have, the other direction, parts of pages, and copies that have ended."""
    carried.write(0, 2)
    mirror = carried.mirrors[0]

    def to_device(event: Event) -> None:
        with pytest.raises(InvalidRequestError):
            carried.call(devices.read_copy, mirror, event.copy, 1, 2)
        with pytest.raises(InvalidRequestError):
            carried.call(devices.write_copy, mirror, event.copy, 0, page(0))

    def from_device(event: Event) -> None:
        with pytest.raises(InvalidRequestError):
            carried.call(devices.write_copy, mirror, event.copy, 0, b"half a page")
        with pytest.raises(InvalidRequestError):
            carried.call(devices.read_copy, mirror, event.copy, 0, 1)

    carried.drivers[0].meanwhile = to_device
    carried.migrate(0, 2)
    ended = copying(carried, EventType.COPY_TO_DEVICE).copy
    carried.drivers[0].meanwhile = from_device
    assert carried.read(0, 2) == [1, 2]
    with pytest.raises(NoSuchObjectError):
        carried.call(devices.read_copy, mirror, ended, 0, 1)


def test_calls_of_the_driver_on_other_ranges_work_inside_its_copy(carried: Bench) -> None:
    """Only what waits for the copy itself cannot finish: EDEADLK."""
    carried.write(0, 4)

    def inside(_: Event) -> None:
        assert carried.read(3) == [4]
        carried.call(processes.munmap, carried.pid, span(5).start, PAGE_SIZE)
        for command, arguments in ((processes.munmap, (START, PAGE_SIZE)), (processes.read_memory, (START, 1))):
            with pytest.raises(HmmError, match="EDEADLK"):
                carried.call(command, carried.pid, *arguments)

    carried.drivers[0].meanwhile = inside
    assert carried.migrate(0, 2).moved.npages == 2


def test_touch_is_refused_inside_the_last_update_when_the_page_is_on_the_device(bench: Bench) -> None:
    """A mirror whose error ends it still has its pages while it is told: who waits for them there waits for ever."""
    bench.write(0)
    bench.migrate(0)
    driver, refused = bench.drivers[0], []
    driver.errors[EventType.MUNMAP] = errno.EIO

    def touch(event: Event) -> None:
        if event.cause is not None:
            driver.meanwhile = touch  # the munmap itself; the end of the mirror follows
            return
        with pytest.raises(WouldDeadlockError) as error:
            bench.write(0)
        refused.append(error.value.errno)

    driver.meanwhile = touch
    bench.call(processes.munmap, bench.pid, span(8).start, PAGE_SIZE)
    assert refused == [errno.EDEADLK]
    assert bench.machine.mirrors[bench.mirrors[0]].state is MirrorState.RELEASED
