"""What can be verified: something with processes, files and CPUs; here the model itself, called in this process.

**Source**: the operations of kernel traces (`hmm_client.recordings.ktrace`), which are Linux's calls.

**Invariants**: a call that fails raises an `HmmError` with the kernel's errno; a signal is a result.

**Absent**: what a trace expects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from hmm import commands_file, commands_process, pagemap
from hmm.address_space import AddressSpace, Thp
from hmm.errors import Signal
from hmm.local import Local
from hmm.units import PAGE_SHIFT, PAGE_SIZE, Address, AddressRange, Entries, ProcessId
from hmm.vma import VmFlag
from hmm_client.drivers.dmirror import Hmm
from hmm_client.drivers.in_process import InProcessHmm, SteppedHmm

_DIGITS = {0x1: pagemap.PRESENT, 0x2: pagemap.SWAP, 0x4: pagemap.FILE, 0x8: pagemap.MMAP_EXCLUSIVE}


class Access(Protocol):
    """How far a CPU's access came; `done` counts bytes, or pages where the access was to one byte of each."""

    @property
    def done(self) -> int:
        """Bytes or pages."""

    @property
    def data(self) -> bytes:
        """What was read."""

    @property
    def signal(self) -> Signal | None:
        """What stopped it."""

    @property
    def address(self) -> Address:
        """Where."""


@dataclass(frozen=True, slots=True)
class Region:
    """One mapping: a line of maps.

    Attributes:
        offset: bytes into the object; 0 for private anonymous memory.
        file_id: of the object; 0 for private anonymous memory.
    """

    start: Address
    end: Address
    permissions: str
    offset: int
    file_id: int


class Devices(Protocol):
    """What a subject needs for operations of devices."""

    @property
    def hmm(self) -> Hmm:
        """Today's interface of HMM."""

    def driver_file(self, name: str) -> int:
        """A device's file, whose mappings are pages of its driver."""

    def pin(self, process_id: ProcessId, address: Address, length: int, *, write: bool) -> int:
        """pin_user_pages() for long; a number for `unpin`."""

    def unpin(self, number: int) -> None:
        """unpin_user_pages()."""


class Subject(Protocol):
    """Something to verify.  Arguments are those of the kernel's calls, in bytes."""

    @property
    def devices(self) -> Devices:
        """How devices act on it."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def create_process(self, fault_around_pages: int, thp: Thp) -> ProcessId:
        """A process with an empty address space: so many pages of a file a read fault maps; where pages may be huge."""

    def fork(self, process_id: ProcessId) -> ProcessId:
        """fork(2)."""

    def exit(self, process_id: ProcessId) -> None:
        """exit(2)."""

    def mmap(
        self, process_id: ProcessId, address: Address, length: int, prot: int, flags: int, file_id: int, offset: int
    ) -> Address:
        """mmap(2)."""

    def munmap(self, process_id: ProcessId, address: Address, length: int) -> None:
        """munmap(2)."""

    def mprotect(self, process_id: ProcessId, address: Address, length: int, prot: int) -> None:
        """mprotect(2)."""

    def madvise(self, process_id: ProcessId, address: Address, length: int, advice: int) -> None:
        """madvise(2)."""

    def mremap(
        self, process_id: ProcessId, address: Address, length: int, new_length: int, flags: int, new_address: Address
    ) -> Address:
        """mremap(2)."""

    def read_pages(self, process_id: ProcessId, address: Address, npages: int) -> Access:
        """Load the byte at `address` and those 4096 bytes, 8192 bytes ... further on."""

    def write_pages(self, process_id: ProcessId, address: Address, values: bytes) -> Access:
        """Store bytes there."""

    def dump(self, process_id: ProcessId, address: Address, npages: int) -> Sequence[Access]:
        """Read each page by itself."""

    def open_file(self, name: str) -> int:
        """A new file of size 0."""

    def truncate(self, file_id: int, size_bytes: int) -> None:
        """ftruncate(2)."""

    def punch(self, file_id: int, offset: int, length: int) -> None:
        """fallocate(2) with PUNCH_HOLE and KEEP_SIZE."""

    def read_file(self, file_id: int, offset: int, length: int) -> bytes:
        """pread(2)."""

    def write_file(self, file_id: int, offset: int, data: bytes) -> None:
        """pwrite(2)."""

    def maps(self, process_id: ProcessId) -> list[Region]:
        """/proc/PID/maps."""

    def pagemaps(self, process_ids: Sequence[ProcessId], span: AddressRange) -> list[bytes]:
        """/proc/PID/pagemap of each process, one digit per page as traces have them."""


class InProcess:
    """A machine of its own in this process, without a daemon.

    Args:
        by_steps: as for `InProcessDevices`.
    """

    def __init__(self, *, by_steps: bool = False) -> None:
        self._local = Local()
        self._by_steps = by_steps

    @property
    def devices(self) -> InProcessDevices:
        """As `Subject`."""
        return InProcessDevices(self._local, by_steps=self._by_steps)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self._local.machine.check()

    def create_process(self, fault_around_pages: int, thp: Thp) -> ProcessId:
        """As `Subject`."""
        return self._local.call(
            commands_process.create_process, "trace", fault_around_pages=fault_around_pages, thp=thp
        )

    def fork(self, process_id: ProcessId) -> ProcessId:
        """As `Subject`."""
        return self._local.call(commands_process.fork, process_id)

    def exit(self, process_id: ProcessId) -> None:
        """As `Subject`."""
        self._local.call(commands_process.exit_process, process_id)

    def mmap(
        self, process_id: ProcessId, address: Address, length: int, prot: int, flags: int, file_id: int, offset: int
    ) -> Address:
        """As `Subject`."""
        mapped = self._local.call(commands_process.mmap, process_id, address, length, prot, flags, file_id, offset)
        return mapped.address

    def munmap(self, process_id: ProcessId, address: Address, length: int) -> None:
        """As `Subject`."""
        self._local.call(commands_process.munmap, process_id, address, length)

    def mprotect(self, process_id: ProcessId, address: Address, length: int, prot: int) -> None:
        """As `Subject`."""
        self._local.call(commands_process.mprotect, process_id, address, length, prot)

    def madvise(self, process_id: ProcessId, address: Address, length: int, advice: int) -> None:
        """As `Subject`."""
        self._local.call(commands_process.madvise, process_id, address, length, advice)

    def mremap(
        self, process_id: ProcessId, address: Address, length: int, new_length: int, flags: int, new_address: Address
    ) -> Address:
        """As `Subject`."""
        return self._local.call(commands_process.mremap, process_id, address, length, new_length, flags, new_address)

    def read_pages(self, process_id: ProcessId, address: Address, npages: int) -> Access:
        """As `Subject`."""
        span, offset = _pages(address, npages)
        return self._local.call(commands_process.read_pages, process_id, span, offset)

    def write_pages(self, process_id: ProcessId, address: Address, values: bytes) -> Access:
        """As `Subject`."""
        span, offset = _pages(address, len(values))
        return self._local.call(commands_process.write_pages, process_id, span, offset, values)

    def dump(self, process_id: ProcessId, address: Address, npages: int) -> Sequence[Access]:
        """As `Subject`."""
        return [
            self._local.call(commands_process.read_memory, process_id, address + (k << PAGE_SHIFT), PAGE_SIZE)
            for k in range(npages)
        ]

    def open_file(self, name: str) -> int:
        """As `Subject`."""
        file: int = self._local.call(commands_file.open_file, name, create=True, exclusive=True)
        self._local.call(commands_file.unlink_file, name)
        return file

    def truncate(self, file_id: int, size_bytes: int) -> None:
        """As `Subject`."""
        self._local.call(commands_file.truncate_file, file_id, size_bytes)

    def punch(self, file_id: int, offset: int, length: int) -> None:
        """As `Subject`."""
        self._local.call(commands_file.punch_file, file_id, offset, length)

    def read_file(self, file_id: int, offset: int, length: int) -> bytes:
        """As `Subject`."""
        return self._local.call(commands_file.read_file, file_id, offset, length)

    def write_file(self, file_id: int, offset: int, data: bytes) -> None:
        """As `Subject`."""
        self._local.call(commands_file.write_file, file_id, offset, data)

    def maps(self, process_id: ProcessId) -> list[Region]:
        """As `Subject`."""
        return [
            Region(vma.start, vma.end, vma.perms, vma.offset_bytes, vma.backing.id if vma.backing else 0)
            for vma in self._space(process_id).vmas
        ]

    def pagemaps(self, process_ids: Sequence[ProcessId], span: AddressRange) -> list[bytes]:
        """As `Subject`."""
        return [digits(self._local.call(commands_process.pagemap, process_id, span)) for process_id in process_ids]

    def _space(self, process_id: ProcessId) -> AddressSpace:
        return self._local.machine.process(process_id).space


class InProcessDevices:
    """Devices that act on the machine of an `InProcess`.

    Args:
        by_steps: migrations are setup, pages and finalize, and not one call.
    """

    def __init__(self, local: Local, *, by_steps: bool = False) -> None:
        self._local = local
        self.hmm = SteppedHmm(local) if by_steps else InProcessHmm(local)

    def driver_file(self, name: str) -> int:
        """As `Devices`."""
        return self._local.call(commands_file.open_device_file, name, VmFlag.MIXEDMAP)

    def pin(self, process_id: ProcessId, address: Address, length: int, *, write: bool) -> int:
        """As `Devices`."""
        span = AddressRange(address, address + length)
        return self._local.call(commands_process.pin, process_id, span, write=write)

    def unpin(self, number: int) -> None:
        """As `Devices`."""
        self._local.call(commands_process.unpin, number)


def digits(words: Entries) -> bytes:
    """A page map as traces write it: a digit per page, from the words of /proc/PID/pagemap."""
    shown = np.zeros(words.size, np.uint8)
    for digit, bit in _DIGITS.items():
        shown |= np.where(words & np.uint64(bit), np.uint8(digit), np.uint8(0))
    return shown.tobytes()


def _pages(address: Address, npages: int) -> tuple[AddressRange, int]:
    offset = address & (PAGE_SIZE - 1)
    start = address - offset
    return AddressRange(start, start + (npages << PAGE_SHIFT)), offset
