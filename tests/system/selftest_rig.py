"""What the cases of the kernel's own selftest share: a process, the test driver's devices, and what each mirror heard.

**Source**: Linux tools/testing/selftests/mm/hmm-tests.c, 6.12.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from hmm.address_space import Thp
from hmm.errors import HmmError
from hmm.events import Event
from hmm.units import PAGE_SIZE, AddressRange, ProcessId
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot
from hmm_client import sync
from hmm_client.drivers.dmirror import Card, Handle, Reply, load
from hmm_client.drivers.over_wire import OverWireHmm

BUFFER = 4 << 20
PAGES = BUFFER // PAGE_SIZE
HUGE = 2 << 20
HUGE_PAGES = HUGE // PAGE_SIZE
INTS = PAGE_SIZE // 4
ALL = bool(os.environ.get("SELFTEST_ALL"))
"""Whether to spend minutes on the largest sizes, and to repeat what is repeated as often as the suites of old do."""
DEVICE_PAGES = 1 << (16 if ALL else 13)  # a chunk of the driver is 256 MiB
RW = Prot.READ | Prot.WRITE
PRIVATE = MapFlag.PRIVATE | MapFlag.ANONYMOUS
SHARED = MapFlag.SHARED | MapFlag.ANONYMOUS

Ints = npt.NDArray[np.int32]
Heard = list[tuple[str, list[tuple[int, int]]]]


def ramp(npages: int = PAGES, offset: int = 0) -> Ints:
    """int k has value k + offset."""
    return np.arange(offset, npages * INTS + offset, dtype=np.int32)


def ints(data: bytes) -> Ints:
    """Bytes as ints."""
    return np.frombuffer(data, np.int32)


class Mirror(Handle):
    """An open device file that writes down what it hears."""

    def __init__(self, card: Card, process_id: ProcessId) -> None:
        self.events: list[Event] = []
        super().__init__(card, process_id)

    def update(self, event: Event) -> None:
        """Write down, then do what the driver does."""
        self.events.append(event)
        super().update(event)

    def heard(self, origin: int) -> Heard:
        """What it heard since it was asked last: the reason, and pages counted from `origin`.

        Its own migrations are marked; whatever has no reason of today is left out.
        """
        events, self.events = self.events, []
        return [
            (
                event.reason.name + (" own" if event.initiator == self.id else ""),
                [((s.start - origin) // PAGE_SIZE, (s.end - origin) // PAGE_SIZE) for s in event.spans],
            )
            for event in events
            if event.reason is not None
        ]


class Rig:
    """A process and devices of one variant.

    Attributes:
        coherent: the variant.
        cards: the four devices of the driver.
        mirrors: those that the fixture has opened.
    """

    def __init__(self, client: sync.Client, hmm: OverWireHmm, variant: str, count: int, profile: Any) -> None:
        self.client = client
        self.coherent = variant == "coherent"
        self.cards = load(hmm, pages=DEVICE_PAGES, profile=profile)
        self.process = client.create_process("selftest", thp=Thp.MADVISE)
        first = 2 if self.coherent else 0
        self.mirrors = [self.open(card) for card in self.cards[first : first + count]]

    @property
    def mirror(self) -> Mirror:
        """The first one."""
        return self.mirrors[0]

    def open(self, card: Card, process: sync.Process | None = None) -> Mirror:
        """Open a device file."""
        return Mirror(card, (process or self.process).id)

    def map(self, npages: int = PAGES, prot: Prot = RW, flags: MapFlag = PRIVATE, **more: Any) -> int:
        """mmap.  Returns: the address."""
        return self.process.mmap(npages * PAGE_SIZE, prot, flags, **more).address

    def map_aligned(self, size: int = HUGE, prot: Prot = RW, room: int = 2) -> int:
        """Map `room` times `size`.  Returns: the first address in it that is a multiple of `size`."""
        address = self.map(room * size // PAGE_SIZE, prot)
        return (address + size - 1) // size * size

    def store(self, address: int, values: Ints) -> None:
        """The CPU writes ints."""
        self.process.write(address, values.tobytes())

    def load(self, address: int, npages: int = PAGES) -> Ints:
        """The CPU reads ints."""
        return ints(self.process.read(address, npages * PAGE_SIZE))

    def protect(self, address: int, npages: int, prot: Prot) -> None:
        """mprotect."""
        self.process.mprotect(address, npages * PAGE_SIZE, prot)

    def unmap(self, address: int, npages: int = PAGES) -> None:
        """munmap."""
        self.process.munmap(address, npages * PAGE_SIZE)

    def snapshot(self, address: int, npages: int, mirror: Mirror | None = None) -> list[int]:
        """SNAPSHOT: a byte per page."""
        reply = (mirror or self.mirror).snapshot(address, npages)
        assert reply.cpages == npages
        return list(reply.data)

    def span(self, address: int, npages: int) -> AddressRange:
        """Pages."""
        return AddressRange(address, address + npages * PAGE_SIZE)


def succeeded(reply: Reply, npages: int, values: Ints | None = None, faults: int | None = None) -> None:
    """Check a reply: pages copied, what was read, passes of faulting."""
    assert reply.cpages == npages
    if faults is not None:
        assert reply.faults == faults
    if values is not None:
        assert np.array_equal(ints(reply.data), values)


def failed(number: int, call: Any, *arguments: Any) -> None:
    """Check that a call fails with this errno."""
    with pytest.raises(HmmError) as error:
        call(*arguments)
    assert error.value.errno == number, error.value
