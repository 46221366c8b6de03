"""Device accesses, checked against the mirror's table."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest

from hmm import commands_device as devices
from hmm import commands_process as processes
from hmm import pte
from hmm.device_access import Manner
from hmm.errors import AccessDeniedError, BadAddressError, InvalidRequestError
from hmm.limits import Limits
from hmm.local import Local
from hmm.machine import Machine
from hmm.operation_record import Caller
from hmm.units import PAGE_SIZE, TASK_SIZE, AddressRange
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot

START = 0x1000_0000
FIXED = MapFlag.PRIVATE | MapFlag.ANONYMOUS | MapFlag.FIXED


class Bench:
    """Eight writable pages; the first four are faulted for writing."""

    def __init__(self, *, dma: bool = False) -> None:
        self.local = Local(Machine(Limits(frames=256, device_frames=0)))
        self.machine = self.local.machine
        self.call = self.local.call
        self.pid = self.call(processes.create_process)
        self.call(processes.mmap, self.pid, START, 8 * PAGE_SIZE, Prot.READ | Prot.WRITE, FIXED)
        self.device = self.call(devices.register_device, "gpu", dma=dma)
        self.id = self.call(devices.register_mirror, self.device, self.pid)
        span = AddressRange(START, START + 4 * PAGE_SIZE)
        self.entries = self.call(devices.fault, self.id, [span], write=True).entries
        self.mirror = self.machine.mirrors[self.id]

    def read(self, *segments: tuple[int, int], dma: bool = False) -> bytes:
        """A device read."""
        return self.call(devices.device_read, self.id, segments, Manner(dma=dma))

    def write(self, data: bytes, *segments: tuple[int, int], dma: bool = False) -> None:
        """A device write."""
        self.call(devices.device_write, self.id, segments, data, Manner(dma=dma))

    def cpu(self, address: int, length: int) -> bytes:
        """What the CPU reads."""
        return self.call(processes.read_memory, self.pid, address, length).data


@pytest.fixture
def bench() -> Bench:
    """A mirror with frame numbers."""
    return Bench()


@pytest.mark.parametrize(
    "segments",
    [
        [(START, 8)],
        [(START + 4090, 12)],
        [(START + 100, 3 * PAGE_SIZE)],
        [(START, PAGE_SIZE), (START + 2 * PAGE_SIZE, PAGE_SIZE)],
        [(START + 3 * PAGE_SIZE, 5), (START, 5), (START + PAGE_SIZE - 2, 4)],
        [(START, 4 * PAGE_SIZE)],
    ],
)
def test_write_scatters_and_read_gathers(bench: Bench, segments: list[tuple[int, int]]) -> None:
    """The bytes of all segments one after the other; CPU and device see the same memory."""
    total = sum(length for _, length in segments)
    data = bytes(n * 7 % 251 for n in range(total))
    bench.write(data, *segments)
    assert bench.read(*segments) == data
    assert b"".join(bench.cpu(*segment) for segment in segments) == data


def test_read_returns_the_last_write_of_the_cpu(bench: Bench) -> None:
    """There is one copy of every page."""
    bench.call(processes.write_memory, bench.pid, START + 10, b"from the CPU")
    assert bench.read((START + 10, 12)) == b"from the CPU"


def test_write_sets_dirty_in_the_entries_written_through(bench: Bench) -> None:
    """As the device's own MMU would."""
    bench.write(b"x" * 10, (START + PAGE_SIZE - 5, 10))
    entries = bench.call(devices.read_table, bench.id, AddressRange(START, START + 4 * PAGE_SIZE))
    assert pte.pte_test_dirty(entries).tolist() == [True, True, False, False]


@pytest.mark.parametrize("write", [False, True])
def test_access_without_a_valid_entry_is_efault_and_does_nothing(bench: Bench, write: bool) -> None:
    """The address named is the first page that the mirror does not have."""
    segments = [(START, 8), (START + 4 * PAGE_SIZE + 8, 8)]
    with pytest.raises(BadAddressError) as caught:
        bench.write(b"y" * 16, *segments) if write else bench.read(*segments)
    assert (caught.value.errno, caught.value.address) == (errno.EFAULT, START + 4 * PAGE_SIZE)
    assert bench.cpu(START, 8) == bytes(8)
    assert bench.mirror.counters["refused_accesses"] == 1


def test_write_through_a_read_only_entry_is_eacces(bench: Bench) -> None:
    """Nothing of the access is done."""
    bench.call(processes.mprotect, bench.pid, START + PAGE_SIZE, PAGE_SIZE, Prot.READ)
    with pytest.raises(AccessDeniedError) as caught:
        bench.write(b"y" * 2 * PAGE_SIZE, (START, 2 * PAGE_SIZE))
    assert (caught.value.errno, caught.value.address) == (errno.EACCES, START + PAGE_SIZE)
    assert bench.cpu(START, 4) == bytes(4)


@pytest.mark.parametrize(
    ("segments", "data"),
    [
        ([(START, 0)], b""),
        ([(-1, 4)], b"1234"),
        ([(TASK_SIZE, 4)], b"1234"),
        ([(START, 4)], b"12345"),
    ],
)
def test_access_is_refused_when_a_segment_makes_no_sense(
    bench: Bench, segments: list[tuple[int, int]], data: bytes
) -> None:
    """EINVAL."""
    with pytest.raises(InvalidRequestError):
        bench.write(data, *segments)


def test_access_of_no_segments_is_empty(bench: Bench) -> None:
    """Nothing asked for, nothing done."""
    assert bench.read() == b""
    bench.write(b"")


def test_access_is_refused_between_the_answer_and_the_end_of_the_operation() -> None:
    """Acknowledged means that the device no longer uses the range, even while others have still to answer."""
    bench = Bench()
    machine = bench.machine
    other = bench.call(devices.register_device, "slow")
    slow = bench.call(devices.register_mirror, other, bench.pid)
    record = machine.start(Caller(), processes.munmap, bench.pid, START, PAGE_SIZE)
    sent = {delivery.mirror_id: delivery for delivery in machine.take_outbox()}
    assert bench.read((START, 4)) == bytes(4), "until it answers, a device may use what it has"
    machine.answer(bench.id, sent[bench.id].sequence)
    with pytest.raises(BadAddressError, match="given up when event"):
        bench.read((START, 4))
    assert bench.read((START + PAGE_SIZE, 4)) == bytes(4)
    machine.answer(slow, sent[slow].sequence)
    machine.resume(record.id)
    assert record.result == 0


def test_read_is_permitted_between_the_answer_to_a_write_protection_and_its_end() -> None:
    """WRITE_PROTECT takes write access away and no more."""
    bench = Bench()
    machine = bench.machine
    other = bench.call(devices.register_device, "slow")
    bench.call(devices.register_mirror, other, bench.pid)
    machine.start(Caller(), processes.mprotect, bench.pid, START, PAGE_SIZE, Prot.READ)
    sent = {delivery.mirror_id: delivery for delivery in machine.take_outbox()}
    machine.answer(bench.id, sent[bench.id].sequence)
    assert bench.read((START, 4)) == bytes(4)
    with pytest.raises(BadAddressError):
        bench.write(b"late", (START, 4))


@pytest.fixture
def dma() -> Bench:
    """A mirror with DMA addresses."""
    return Bench(dma=True)


def iovas(bench: Bench) -> list[int]:
    """The DMA addresses of the first four pages."""
    entries: Any = bench.entries
    return pte.pte_dma_addr(np.asarray(entries, np.uint64)).tolist()


def test_dma_access_goes_through_the_iommu(dma: Bench) -> None:
    """By DMA address and by mirror address the same page is reached."""
    first, second = iovas(dma)[:2]
    dma.write(b"by DMA" + b"!" * 2, (first + 1, 6), (second, 2), dma=True)
    assert dma.read((START + 1, 6), (START + PAGE_SIZE, 2)) == b"by DMA!!"
    assert dma.cpu(START + 1, 6) == b"by DMA"
    assert dma.read((first + 1, 6), dma=True) == b"by DMA"


def test_dma_access_is_efault_once_the_address_is_unmapped(dma: Bench) -> None:
    """An I/O address is never handed out twice, so a stale one is always caught."""
    (stale, *_) = iovas(dma)
    dma.call(processes.munmap, dma.pid, START, PAGE_SIZE)
    dma.call(processes.mmap, dma.pid, START, PAGE_SIZE, Prot.READ | Prot.WRITE, FIXED)
    (fresh,) = dma.call(devices.fault, dma.id, [AddressRange(START, START + PAGE_SIZE)], write=True).entries.tolist()
    assert pte.pte_dma_addr(fresh) != stale
    with pytest.raises(BadAddressError, match="not mapped for DMA"):
        dma.read((stale, 4), dma=True)


def test_dma_access_is_refused_when_the_device_does_no_dma(bench: Bench) -> None:
    """EINVAL names the device."""
    with pytest.raises(InvalidRequestError, match="does no DMA"):
        bench.read((1 << 32, 4), dma=True)
