"""What tests of today's interface share: a process, a device with memory, and a driver that listens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from area import BASE, RW

from hmm import commands_device, commands_hmm, commands_process
from hmm.address_space import Thp
from hmm.commands_hmm import Migrated
from hmm.events import Event, Reason
from hmm.limits import Limits
from hmm.local import Local
from hmm.machine import Machine
from hmm.semantics import LINUX_6_12, Semantics
from hmm.units import PAGE_SIZE, AddressRange, ProcessId
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot

PRIVATE = MapFlag.PRIVATE | MapFlag.FIXED | MapFlag.ANONYMOUS


class Heard:
    """A driver that keeps what it hears."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.meanwhile: Callable[[Event], object] | None = None

    def update(self, _: int, event: Event) -> int:
        """Keep it, and do once what a test wants done inside the callback."""
        self.events.append(event)
        if self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile(event)
        return 0

    def release(self, _: int) -> None:
        """Nothing to stop."""

    @property
    def reasons(self) -> list[Reason | None]:
        """Of all events, oldest first."""
        return [event.reason for event in self.events]


class Bench:
    """One process with a window of private pages, one device with memory, a mirror between them.

    Attributes:
        notifier: number of the mirror's subscription to everything.
    """

    def __init__(
        self,
        *,
        frames: int = 400,
        memory_pages: int = 32,
        thp: Thp = Thp.NEVER,
        mapped_pages: int = 16,
        hugetlb_pages: int = 0,
        swap_pages: int = 0,
        semantics: Semantics = LINUX_6_12,
        more_memory_pages: int = 224,
    ) -> None:
        limits = Limits(
            frames=frames,
            device_frames=memory_pages + more_memory_pages,
            hugetlb_pages=hugetlb_pages,
            swap_pages=swap_pages,
        )
        self.local = Local(Machine(limits, semantics=semantics))
        self.call = self.local.call
        self.process = self.call(commands_process.create_process, "bench", thp=thp)
        self.device = self.call(commands_device.register_device, "card", memory_pages=memory_pages)
        self.mirror, self.heard = self.attach(self.device, self.process)
        self.notifier = 1
        self.map(mapped_pages)

    def attach(self, device: int, process: ProcessId) -> tuple[int, Heard]:
        """One more mirror that subscribes to everything."""
        mirror = self.call(commands_hmm.attach, device, process)
        heard = Heard()
        self.local.attach(mirror, heard)
        self.call(commands_hmm.insert_notifier, mirror, 0, 1 << 47)
        return mirror, heard

    @staticmethod
    def span(at: int, npages: int = 1) -> AddressRange:
        """Pages of the window."""
        return AddressRange(BASE + at * PAGE_SIZE, BASE + (at + npages) * PAGE_SIZE)

    def map(self, npages: int, prot: Prot = RW, at: int = 0, flags: MapFlag = PRIVATE) -> None:
        """Map pages at page `at` of the window."""
        self.call(commands_process.mmap, self.process, BASE + at * PAGE_SIZE, npages * PAGE_SIZE, prot, flags)

    def write(self, at: int, data: bytes, process: ProcessId = 0) -> None:
        """The CPU writes at page `at`."""
        done = self.call(commands_process.write_memory, process or self.process, BASE + at * PAGE_SIZE, data).done
        assert done == len(data)

    def read(self, at: int, length: int, process: ProcessId = 0) -> bytes:
        """The CPU reads at page `at`."""
        return self.call(commands_process.read_memory, process or self.process, BASE + at * PAGE_SIZE, length).data

    def to_device(self, at: int, npages: int) -> Migrated:
        """Migrate pages."""
        return self.call(commands_hmm.migrate_to_device, self.mirror, self.span(at, npages))

    def to_system(self, at: int, npages: int) -> Migrated:
        """Migrate them back."""
        return self.call(commands_hmm.migrate_to_system, self.mirror, self.span(at, npages))

    def entry(self, at: int, process: ProcessId = 0) -> int:
        """The CPU's entry of page `at`."""
        return self.local.machine.processes[process or self.process].space.table.get(BASE + at * PAGE_SIZE)

    @property
    def used(self) -> int:
        """Frames of the device in use."""
        return self.local.machine.frames.regions[1].used


@pytest.fixture
def bench() -> Bench:
    """A bench with room for 32 pages on the device."""
    return Bench()


@pytest.fixture
def make_bench() -> Callable[..., Bench]:
    """Makes benches of other sizes."""
    return Bench
