"""A process: its memory calls, and what its CPUs do.

**Source**: the system calls of Linux; proto/hmm_proto/v1/process.proto.

**Absent**: what the calls do; the daemon knows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from hmm.smaps import MemoryUse
from hmm.units import PAGE_SHIFT, AddressRange, Entries, ProcessId
from hmm_client import calls
from hmm_client.arguments import names_arguments
from hmm_client.calls import PRIVATE_ANONYMOUS, READ_WRITE, Call
from hmm_client.pin import Pin
from hmm_client.results import Accessed, Completed, Mapped, MappingUse, Maps, MapsLine, ProgramBreak
from hmm_client.userfaultfd import Userfaultfd
from hmm_proto.v1 import inspection_pb2, process_pb2

if TYPE_CHECKING:
    from hmm_client.client import Client

T = TypeVar("T")
PART_BYTES = 1 << 20
"""Reads and writes of more than this travel in parts."""
PAGEMAP_BYTES = PART_BYTES >> 3 << PAGE_SHIFT
"""How much memory one part of a page map describes."""


class OpenFile(Protocol):
    """What a mapping needs of an open file."""

    @property
    def id(self) -> int:
        """Names it."""


@names_arguments
class Process:
    """A handle of a process.  Any number of handles may name the same one.

    Every call raises the `HmmError` that the kernel's call would have ended with: `error.errno` is the kernel's.
    What it says of partial effects holds: mprotect over a hole has changed what lies below `error.address`.
    """

    def __init__(self, client: Client, process_id: ProcessId) -> None:
        self.client = client
        self.id = process_id

    def __repr__(self) -> str:
        return f"<process {self.id}>"

    async def _make(self, call: Call[T]) -> T:
        return await self.client.make(call)

    # ---- mappings

    async def mmap(
        self,
        length: int,
        prot: int = READ_WRITE,
        flags: int = PRIVATE_ANONYMOUS,
        *,
        address: int = 0,
        file: OpenFile | None = None,
        offset: int = 0,
    ) -> Mapped:
        """mmap(2)."""
        file_id = file.id if file is not None else 0
        return await self._make(
            calls.mmap(self.id, length, prot, flags, address=address, file_id=file_id, offset=offset)
        )

    async def munmap(self, address: int, length: int) -> Completed:
        """munmap(2)."""
        return await self._make(calls.munmap(self.id, address, length))

    async def mprotect(self, address: int, length: int, prot: int) -> Completed:
        """mprotect(2)."""
        return await self._make(calls.mprotect(self.id, address, length, prot))

    async def mremap(
        self, address: int, old_length: int, new_length: int, flags: int = 0, *, new_address: int = 0
    ) -> Mapped:
        """mremap(2)."""
        return await self._make(calls.mremap(self.id, address, old_length, new_length, flags, new_address=new_address))

    async def madvise(self, address: int, length: int, advice: int) -> Completed:
        """madvise(2)."""
        return await self._make(calls.madvise(self.id, address, length, advice))

    async def brk(self, address: int = 0) -> ProgramBreak:
        """brk(2), the system call; 0 asks where the break is."""
        return await self._make(calls.brk(self.id, address))

    async def msync(self, address: int, length: int, flags: int) -> Completed:
        """msync(2)."""
        return await self._make(calls.msync(self.id, address, length, flags))

    async def mlock(self, address: int, length: int, flags: int = 0) -> Completed:
        """mlock2(2)."""
        return await self._make(calls.mlock(self.id, address, length, flags))

    async def munlock(self, address: int, length: int) -> Completed:
        """munlock(2)."""
        return await self._make(calls.munlock(self.id, address, length))

    async def mlockall(self, flags: int) -> Completed:
        """mlockall(2)."""
        return await self._make(calls.mlockall(self.id, flags))

    async def munlockall(self) -> Completed:
        """munlockall(2)."""
        return await self._make(calls.munlockall(self.id))

    async def mincore(self, address: int, length: int) -> npt.NDArray[np.bool_]:
        """mincore(2): bool[npages], which pages are in memory."""
        residency = await self._make(calls.mincore(self.id, address, length))
        return (np.frombuffer(residency.pages, np.uint8) & 1).astype(np.bool_)

    async def pagemap(self, span: AddressRange) -> Entries:
        """/proc/PID/pagemap: uint64[npages], with the bits of `hmm.pagemap`; any number of pages, in parts."""
        spans = [
            AddressRange(at, min(at + PAGEMAP_BYTES, span.end)) for at in range(span.start, span.end, PAGEMAP_BYTES)
        ]
        parts = [(await self._make(calls.pagemap(self.id, part.start, part.end))).entries for part in spans]
        return np.concatenate(parts) if parts else np.empty(0, np.uint64)

    async def clear_refs(self, what: int) -> Completed:
        """Write to /proc/PID/clear_refs: 1, 2, 3 forget which pages were used, 4 which were written.

        Raises:
            InvalidRequestError: another number (EINVAL).
        """
        return await self._make(calls.clear_refs(self.id, what))

    async def place(
        self, start: int, end: int, prot: int, flags: int, *, file: OpenFile | None = None, offset: int = 0
    ) -> Completed:
        """Put a mapping where a recorded program had it: one line of its /proc/PID/maps."""
        file_id = file.id if file is not None else 0
        return await self._make(calls.place(self.id, start, end, prot, flags, file_id=file_id, offset=offset))

    async def maps(self) -> Maps:
        """/proc/PID/maps.  More than 1,000 mappings come in parts; what changes meanwhile is told as it is then."""
        request = inspection_pb2.GetMapsRequest(process_id=self.id)
        parts: list[inspection_pb2.GetMapsResponse] = await self._parts_of(self.client.inspection.GetMaps, request)
        lines = tuple(_maps_line(one) for part in parts for one in part.mappings)
        return Maps(lines, parts[-1].brk_start, parts[-1].brk_end, parts[-1].mmap_base)

    async def smaps(self) -> tuple[MappingUse, ...]:
        """/proc/PID/smaps: what each mapping costs, ascending.  More than 100 come in parts, as with `maps`."""
        request = inspection_pb2.GetMemoryUseRequest(process_id=self.id)
        parts = await self._parts_of(self.client.inspection.GetMemoryUse, request)
        return tuple(
            MappingUse(_maps_line(one.mapping), one.vm_flags, MemoryUse(**{name: getattr(one, name) for name in _USES}))
            for part in parts
            for one in part.mappings
        )

    async def _parts_of(self, method: Any, request: Any) -> list[Any]:
        """All parts of a list."""
        parts = [await self.client.channel.request(method, request)]
        while parts[-1].next_page_token:
            request.page_token = parts[-1].next_page_token
            parts.append(await self.client.channel.request(method, request))
        return parts

    # ---- what its CPUs do

    async def read(self, address: int, length: int) -> bytes:
        """A CPU reads bytes.  More than 1 MiB is read in parts, each of them atomic.

        Raises:
            SegmentationFault: a signal came at `error.address`.
        """
        if length <= PART_BYTES:
            accessed = await self._make(calls.read_memory(self.id, address, length))
            return accessed.require(f"read {length} bytes at {address:#x}").data
        request = process_pb2.StreamMemoryRequest(process_id=self.id, address=address, length=length)
        read = calls.read_memory(self.id, address, length).read
        responses = self.client.channel.stream(self.client.processes.StreamMemory, request)
        what = f"read {length} bytes at {address:#x}"
        return b"".join([read(response).require(what).data async for response in responses])

    async def write(self, address: int, data: bytes) -> Completed:
        """A CPU writes bytes.  More than 1 MiB is written in parts, each of them atomic.

        Raises:
            SegmentationFault: a signal came; the bytes below `error.address` are written.
        """
        what = f"write {len(data)} bytes at {address:#x}"
        if len(data) <= PART_BYTES:
            return (await self._make(calls.write_memory(self.id, address, data))).require(what)
        response = await self.client.channel.request(self.client.processes.FillMemory, self._parts(address, data))
        return calls.write_memory(self.id, address, b"").read(response).require(what)

    async def _parts(self, address: int, data: bytes) -> AsyncIterator[process_pb2.FillMemoryRequest]:
        for start in range(0, len(data), PART_BYTES):
            part = data[start : start + PART_BYTES]
            yield process_pb2.FillMemoryRequest(process_id=self.id, address=address + start, data=part)

    async def touch(self, address: int, length: int, *, write: bool) -> Accessed:
        """A CPU touches every page with a byte in the range; no data travels.

        Raises:
            SegmentationFault: a signal came at `error.address`.
        """
        accessed = await self._make(calls.touch(self.id, address, length, write=write))
        return accessed.require(f"touch {length} bytes at {address:#x}")

    async def access_pages(self, address: int, page_count: int, values: bytes | None = None) -> Accessed:
        """A CPU reads one byte in each of many consecutive pages, or writes `values`; a signal is a result here."""
        return await self._make(calls.access_pages(self.id, address, page_count, values))

    # ---- pages that stay

    async def pin(self, span: AddressRange, *, write: bool = False, long_term: bool = True) -> Pin:
        """pin_user_pages(): bring pages in and keep them where they are; the pin ends with the client's session.

        Args:
            write: FOLL_WRITE.
            long_term: FOLL_LONGTERM: pages are moved out of devices' memory first.

        Raises:
            BadAddressError: a page is not mapped, or not for this access; nothing is pinned (EFAULT).
            OutOfFramesError: memory ran out; nothing is pinned (ENOMEM).
        """
        return await Pin.make(self, span, write=write, long_term=long_term)

    # ---- pages that somebody else brings in

    def userfaultfd(self, features: int = 0) -> Userfaultfd:
        """userfaultfd(2): this client brings in pages that the process misses; to be used in `async with`.

        Args:
            features: `UserfaultFeature` values.
        """
        return Userfaultfd(self, features)

    # ---- birth and death

    async def fork(self) -> Process:
        """fork(2): a child with a copy-on-write copy of the address space."""
        return Process(self.client, (await self._make(calls.fork(self.id))).process_id)

    async def vfork(self) -> Process:
        """vfork(2): a child that shares the address space until it calls exec or exits."""
        return Process(self.client, (await self._make(calls.vfork(self.id))).process_id)

    async def thread(self) -> Process:
        """clone(2) with CLONE_VM | CLONE_THREAD: another user of the address space."""
        return Process(self.client, (await self._make(calls.clone_thread(self.id))).process_id)

    async def exec(self, name: str = "", *, mmap_base: int = 0, brk_start: int = 0) -> Completed:
        """execve(2): leave the address space for an empty one."""
        return await self._make(calls.exec_process(self.id, name, mmap_base=mmap_base, brk_start=brk_start))

    async def mrelease(self) -> Completed:
        """process_mrelease(2) of a process that was killed: its private memory goes; it still has to exit.

        Raises:
            RangeBusyError: a driver refused a part, which is still there; the rest is gone (EAGAIN).
        """
        return await self._make(calls.process_mrelease(self.id))

    async def exit(self) -> Completed:
        """exit(2)."""
        return await self._make(calls.exit_process(self.id))


_USES = tuple(one.name for one in dataclasses.fields(MemoryUse))


def _maps_line(line: inspection_pb2.Mapping) -> MapsLine:
    return MapsLine(
        line.start,
        line.end,
        line.permissions,
        line.offset,
        line.file_id,
        line.file_name,
        line.vm_flags,
        line.resident_pages,
        tuple((one.device_name, one.page_count) for one in line.on_devices),
    )
