"""What can be verified: something with processes, files and CPUs; here the model itself, called in this process.

**Source**: the operations of kernel traces (`hmm_client.recordings.ktrace`), which are Linux's calls.

**Invariants**: a call that fails raises an `HmmError` with the kernel's errno; a signal is a result.

**Absent**: what a trace expects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from hmm import commands_file, commands_process, cpu_pte
from hmm.address_space import AddressSpace
from hmm.errors import Signal
from hmm.frames import PageFlag
from hmm.local import Local
from hmm.units import PAGE_SHIFT, PAGE_SIZE, Address, AddressRange, ProcessId
from hmm.vma import Vma

_Bytes: TypeAlias = npt.NDArray[np.uint8]

SNAPSHOT_NONE = 0xFF
SNAPSHOT_EMPTY = 0x00
SNAPSHOT_READ = 0x01
SNAPSHOT_WRITE = 0x02
SNAPSHOT_ZERO = 0x10
PAGEMAP_PRESENT = 0x1
PAGEMAP_FILE = 0x4


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


@dataclass(frozen=True, slots=True)
class PageStates:
    """What the CPU's table shows of each page of a range.

    Attributes:
        snapshot: bytes as the test driver's snapshot of a device that holds no page.
        pagemap: bits 1 (present) and 4 (file or shared memory) of the page map.
    """

    snapshot: bytes
    pagemap: bytes


class Subject(Protocol):
    """Something to verify.  Arguments are those of the kernel's calls, in bytes."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def create_process(self, fault_around_pages: int) -> ProcessId:
        """A process with an empty address space; a read fault of a file maps at most so many pages."""

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

    def page_states(self, process_id: ProcessId, span: AddressRange) -> PageStates | None:
        """What the CPU's table shows; None if this subject cannot tell."""


class InProcess:
    """A machine of its own in this process, without a daemon."""

    def __init__(self) -> None:
        self._local = Local()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self._local.machine.check()

    def create_process(self, fault_around_pages: int) -> ProcessId:
        """As `Subject`."""
        process_id = self._local.call(commands_process.create_process, "trace")
        self._space(process_id).fault_around_pages = fault_around_pages
        return process_id

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
        return self._local.call(commands_file.open_file, name, create=True, exclusive=True)

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

    def page_states(self, process_id: ProcessId, span: AddressRange) -> PageStates:
        """As `Subject`."""
        space = self._space(process_id)
        snapshot = np.full(span.npages, SNAPSHOT_NONE, np.uint8)
        pagemap = np.zeros(span.npages, np.uint8)
        for vma in space.vmas.mapped_pieces(span):
            pages = slice((vma.start - span.start) >> PAGE_SHIFT, (vma.end - span.start) >> PAGE_SHIFT)
            _show(space, vma, snapshot[pages], pagemap[pages])
        return PageStates(snapshot.tobytes(), pagemap.tobytes())

    def _space(self, process_id: ProcessId) -> AddressSpace:
        return self._local.machine.process(process_id).space


def _show(space: AddressSpace, vma: Vma, snapshot: _Bytes, pagemap: _Bytes) -> None:
    entries = space.table.read(vma.start, vma.end)
    present = cpu_pte.is_present(entries)
    zero = cpu_pte.is_special(entries)
    shown = np.where(cpu_pte.is_writable(entries), SNAPSHOT_WRITE, SNAPSHOT_READ)
    shown = np.where(present, shown | np.where(zero, SNAPSHOT_ZERO, 0), SNAPSHOT_EMPTY)
    snapshot[:] = shown if vma.readable else SNAPSHOT_NONE
    ours = np.zeros(entries.size, np.bool_)
    held = present & ~zero
    ours[held] = ~space.frames.test_flags(cpu_pte.cpu_pfn(entries[held]), PageFlag.ANON)
    pagemap[:] = np.where(present, PAGEMAP_PRESENT, 0) | np.where(ours, PAGEMAP_FILE, 0)


def _pages(address: Address, npages: int) -> tuple[AddressRange, int]:
    offset = address & (PAGE_SIZE - 1)
    start = address - offset
    return AddressRange(start, start + (npages << PAGE_SHIFT)), offset
