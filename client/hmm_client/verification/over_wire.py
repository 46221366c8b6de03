"""A daemon as the subject of a verification.

**Source**: proto/hmm_proto/v1.

**Absent**: the model in this process (`subject`).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from types import TracebackType
from typing import Self, TypeVar, cast

from hmm.address_space import Thp
from hmm.file import FileKind
from hmm.units import PAGE_SHIFT, PAGE_SIZE, Address, AddressRange, ProcessId
from hmm.vma import VmFlag
from hmm_client import calls, sync
from hmm_client.calls import Call
from hmm_client.drivers.over_wire import OverWireHmm
from hmm_client.verification.subject import Access, Region, digits

T = TypeVar("T")
_RUNS = itertools.count(1)


class OverWire:
    """Processes and files of a daemon.  Those that were made are gone, or empty, when the block ends."""

    def __init__(self, client: sync.Client) -> None:
        self._client = client
        self._prefix = f"/verify/{os.getpid()}-{next(_RUNS)}"
        self._files: dict[int, sync.File] = {}
        self._processes: set[ProcessId] = set()
        self._devices = OverWireDevices(client, self._prefix)

    @property
    def devices(self) -> OverWireDevices:
        """As `Subject`."""
        return self._devices

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            return
        self._devices.close()
        for process_id in sorted(self._processes):
            self._make(calls.exit_process(process_id))
        for file in self._files.values():
            file.truncate(0)
            file.close()

    def _make(self, call: Call[T]) -> T:
        return self._client.make(call)

    def _execute(self, batch: Sequence[Call[T]]) -> list[T]:
        values: list[T] = []
        for outcome in self._client.execute(batch):
            if outcome.error is not None:
                raise outcome.error
            values.append(cast("T", outcome.value))
        return values

    def create_process(self, fault_around_pages: int, thp: Thp) -> ProcessId:
        """As `Subject`."""
        process_id = self._client.create_process("trace", fault_around_pages=fault_around_pages, thp=thp).id
        self._processes.add(process_id)
        return process_id

    def fork(self, process_id: ProcessId) -> ProcessId:
        """As `Subject`."""
        child = self._make(calls.fork(process_id)).process_id
        self._processes.add(child)
        return child

    def exit(self, process_id: ProcessId) -> None:
        """As `Subject`."""
        self._processes.discard(process_id)
        self._make(calls.exit_process(process_id))

    def mmap(
        self, process_id: ProcessId, address: Address, length: int, prot: int, flags: int, file_id: int, offset: int
    ) -> Address:
        """As `Subject`."""
        call = calls.mmap(process_id, length, prot, flags, address=address, file_id=file_id, offset=offset)
        return self._make(call).address

    def munmap(self, process_id: ProcessId, address: Address, length: int) -> None:
        """As `Subject`."""
        self._make(calls.munmap(process_id, address, length))

    def mprotect(self, process_id: ProcessId, address: Address, length: int, prot: int) -> None:
        """As `Subject`."""
        self._make(calls.mprotect(process_id, address, length, prot))

    def madvise(self, process_id: ProcessId, address: Address, length: int, advice: int) -> None:
        """As `Subject`."""
        self._make(calls.madvise(process_id, address, length, advice))

    def mremap(
        self, process_id: ProcessId, address: Address, length: int, new_length: int, flags: int, new_address: Address
    ) -> Address:
        """As `Subject`."""
        return self._make(calls.mremap(process_id, address, length, new_length, flags, new_address=new_address)).address

    def read_pages(self, process_id: ProcessId, address: Address, npages: int) -> Access:
        """As `Subject`."""
        return self._make(calls.access_pages(process_id, address, npages))

    def write_pages(self, process_id: ProcessId, address: Address, values: bytes) -> Access:
        """As `Subject`."""
        return self._make(calls.access_pages(process_id, address, len(values), values))

    def dump(self, process_id: ProcessId, address: Address, npages: int) -> Sequence[Access]:
        """As `Subject`."""
        return self._execute(
            [calls.read_memory(process_id, address + (k << PAGE_SHIFT), PAGE_SIZE) for k in range(npages)]
        )

    def open_file(self, name: str) -> int:
        """As `Subject`."""
        name = f"{self._prefix}/{name}"
        file = self._client.open_file(name, create=True)
        self._client.unlink_file(name)
        self._files[file.id] = file
        return file.id

    def truncate(self, file_id: int, size_bytes: int) -> None:
        """As `Subject`."""
        self._files[file_id].truncate(size_bytes)

    def punch(self, file_id: int, offset: int, length: int) -> None:
        """As `Subject`."""
        self._files[file_id].punch(offset, length)

    def read_file(self, file_id: int, offset: int, length: int) -> bytes:
        """As `Subject`."""
        return self._files[file_id].read(offset, length)

    def write_file(self, file_id: int, offset: int, data: bytes) -> None:
        """As `Subject`."""
        self._files[file_id].write(offset, data)

    def maps(self, process_id: ProcessId) -> list[Region]:
        """As `Subject`."""
        lines = self._client.process(process_id).maps().lines
        return [Region(line.start, line.end, line.permissions, line.offset, line.file_id) for line in lines]

    def pagemaps(self, process_ids: Sequence[ProcessId], span: AddressRange) -> list[bytes]:
        """As `Subject`."""
        found = self._execute([calls.pagemap(process_id, span.start, span.end) for process_id in process_ids])
        return [digits(pagemap.entries) for pagemap in found]


class OverWireDevices:
    """Devices of a daemon.  What was made is gone when it is closed."""

    def __init__(self, client: sync.Client, prefix: str) -> None:
        self._client = client
        self._prefix = prefix
        self._files: list[sync.File] = []
        self._pins: dict[int, sync.Pin] = {}
        self.hmm = OverWireHmm(client)

    def driver_file(self, name: str) -> int:
        """As `Devices`."""
        file = self._client.open_file(f"{self._prefix}/{name}", kind=FileKind.DEVICE, vm_flags=VmFlag.MIXEDMAP)
        self._files.append(file)
        return file.id

    def pin(self, process_id: ProcessId, address: Address, length: int, *, write: bool) -> int:
        """As `Devices`."""
        pin = self._client.process(process_id).pin(AddressRange(address, address + length), write=write)
        self._pins[pin.id] = pin
        return pin.id

    def unpin(self, number: int) -> None:
        """As `Devices`."""
        self._pins.pop(number).unpin()

    def close(self) -> None:
        """Unpin, detach, unregister and close everything."""
        for number in list(self._pins):
            self.unpin(number)
        self.hmm.close()
        for file in self._files:
            file.close()
