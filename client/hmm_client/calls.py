"""The calls of a process, as values: what to send, and how to read the reply.

    outcomes = await client.execute([calls.mmap(pid, length=4096), calls.munmap(pid, address, 4096)])

A call is made alone by `Client.make`, which raises its error, or with others in one round trip by `Client.execute`,
which returns it.  The handles (`Process`) are made of these.

Every function names its arguments and its errors as the system call does; the daemon judges them.  A number that does
not fit into its field, as one below zero, never reaches it: that is a ValueError, which the handles' methods make an
ArgumentError that names call and argument.

**Source**: proto/hmm_proto/v1/process.proto.

**Absent**: birth of processes from nothing, files (`client.py`, `file.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from hmm.units import PAGE_SHIFT
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot
from hmm_client.results import Accessed, Born, Completed, Mapped, PageMap, ProgramBreak, Residency
from hmm_proto.convert import entries_from_proto, signal_from_proto
from hmm_proto.status import from_call_result
from hmm_proto.v1 import process_pb2, range_pb2, types_pb2

T = TypeVar("T")
READ_WRITE = Prot.READ | Prot.WRITE
PRIVATE_ANONYMOUS = MapFlag.PRIVATE | MapFlag.ANONYMOUS


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One call.

    Attributes:
        name: as in hmm.v1.Call; the method of ProcessService is the same in CamelCase.
        request: the message.
        read: makes the result of the response; raises the call's error.
        reply_bytes: how much data the response may carry.
    """

    name: str
    request: Message
    read: Callable[[Any], T]
    reply_bytes: int = 0

    @property
    def method(self) -> str:
        """The name of the RPC."""
        return self.name.title().replace("_", "")


def _completed(response: Any) -> tuple[int, tuple[int, ...]]:
    """What every result starts with.

    Raises:
        HmmError: the call ended with an errno.
    """
    result: types_pb2.CallResult = response.result
    error = from_call_result(result)
    if error is not None:
        raise error
    return result.operation_id, tuple(result.fenced_mirrors)


def _done(response: Any) -> Completed:
    return Completed(*_completed(response))


def _accessed(response: Any, done: int, data: bytes = b"") -> Accessed:
    signal, address = signal_from_proto(response.signal) or (None, 0)
    return Accessed(*_completed(response), done, data, signal, address)


def mmap(
    process_id: int,
    length: int,
    prot: int = READ_WRITE,
    flags: int = PRIVATE_ANONYMOUS,
    *,
    address: int = 0,
    file_id: int = 0,
    offset: int = 0,
) -> Call[Mapped]:
    """mmap(address, length, prot, flags, file, offset)."""
    request = process_pb2.MmapRequest(
        process_id=process_id, address=address, length=length, prot=prot, flags=flags, file_id=file_id, offset=offset
    )
    return Call("mmap", request, lambda r: Mapped(*_completed(r), r.address, length, r.placement))


def munmap(process_id: int, address: int, length: int) -> Call[Completed]:
    """munmap(address, length)."""
    return Call("munmap", process_pb2.MunmapRequest(process_id=process_id, address=address, length=length), _done)


def mprotect(process_id: int, address: int, length: int, prot: int) -> Call[Completed]:
    """mprotect(address, length, prot).  With ENOMEM the mappings below `error.address` are changed."""
    request = process_pb2.MprotectRequest(process_id=process_id, address=address, length=length, prot=prot)
    return Call("mprotect", request, _done)


def mremap(
    process_id: int, address: int, old_length: int, new_length: int, flags: int = 0, *, new_address: int = 0
) -> Call[Mapped]:
    """mremap(address, old_length, new_length, flags, new_address)."""
    request = process_pb2.MremapRequest(
        process_id=process_id,
        address=address,
        old_length=old_length,
        new_length=new_length,
        flags=flags,
        new_address=new_address,
    )
    return Call("mremap", request, lambda r: Mapped(*_completed(r), r.address, new_length))


def madvise(process_id: int, address: int, length: int, advice: int) -> Call[Completed]:
    """madvise(address, length, advice)."""
    request = process_pb2.MadviseRequest(process_id=process_id, address=address, length=length, advice=advice)
    return Call("madvise", request, _done)


def brk(process_id: int, address: int) -> Call[ProgramBreak]:
    """brk(address): never an error; the break stays where it was when it cannot be moved."""
    request = process_pb2.BrkRequest(process_id=process_id, address=address)
    return Call("brk", request, lambda r: ProgramBreak(*_completed(r), r.address))


def msync(process_id: int, address: int, length: int, flags: int) -> Call[Completed]:
    """msync(address, length, flags)."""
    request = process_pb2.MsyncRequest(process_id=process_id, address=address, length=length, flags=flags)
    return Call("msync", request, _done)


def mlock(process_id: int, address: int, length: int, flags: int = 0) -> Call[Completed]:
    """mlock2(address, length, flags)."""
    request = process_pb2.MlockRequest(process_id=process_id, address=address, length=length, flags=flags)
    return Call("mlock", request, _done)


def munlock(process_id: int, address: int, length: int) -> Call[Completed]:
    """munlock(address, length)."""
    return Call("munlock", process_pb2.MunlockRequest(process_id=process_id, address=address, length=length), _done)


def mlockall(process_id: int, flags: int) -> Call[Completed]:
    """mlockall(flags)."""
    return Call("mlockall", process_pb2.MlockallRequest(process_id=process_id, flags=flags), _done)


def clear_refs(process_id: int, what: int) -> Call[Completed]:
    """A write to /proc/PID/clear_refs; `what` is a `hmm.clear_refs.ClearRefs`."""
    return Call("clear_refs", process_pb2.ClearRefsRequest(process_id=process_id, what=what), _done)


def munlockall(process_id: int) -> Call[Completed]:
    """munlockall()."""
    return Call("munlockall", process_pb2.MunlockallRequest(process_id=process_id), _done)


def mincore(process_id: int, address: int, length: int) -> Call[Residency]:
    """mincore(address, length)."""
    request = process_pb2.MincoreRequest(process_id=process_id, address=address, length=length)
    return Call("mincore", request, lambda r: Residency(*_completed(r), r.residency))


def process_mrelease(process_id: int) -> Call[Completed]:
    """process_mrelease(pidfd), and the SIGKILL before it."""
    return Call("process_mrelease", process_pb2.ProcessMreleaseRequest(process_id=process_id), _done)


def pagemap(process_id: int, start: int, end: int) -> Call[PageMap]:
    """A part of /proc/PID/pagemap; both ends page-aligned, at most 131,072 pages."""
    request = process_pb2.PagemapRequest(process_id=process_id, range=range_pb2.AddressRange(start=start, end=end))
    length = (end - start) >> PAGE_SHIFT << 3
    return Call("pagemap", request, lambda r: PageMap(*_completed(r), entries_from_proto(r.entries)), length)


def place(
    process_id: int, start: int, end: int, prot: int, flags: int, *, file_id: int = 0, offset: int = 0
) -> Call[Completed]:
    """Put a mapping where a recorded program had it: one line of its /proc/PID/maps."""
    request = process_pb2.PlaceRequest(
        process_id=process_id, start=start, end=end, prot=prot, flags=flags, file_id=file_id, offset=offset
    )
    return Call("place", request, _done)


def fork(process_id: int) -> Call[Born]:
    """fork()."""
    request = process_pb2.ForkRequest(process_id=process_id)
    return Call("fork", request, lambda r: Born(*_completed(r), r.child_process_id))


def vfork(process_id: int) -> Call[Born]:
    """vfork(); the parent is not suspended."""
    request = process_pb2.VforkRequest(process_id=process_id)
    return Call("vfork", request, lambda r: Born(*_completed(r), r.child_process_id))


def clone_thread(process_id: int) -> Call[Born]:
    """clone(CLONE_VM | CLONE_THREAD)."""
    request = process_pb2.CloneThreadRequest(process_id=process_id)
    return Call("clone_thread", request, lambda r: Born(*_completed(r), r.thread_process_id))


def exec_process(process_id: int, name: str = "", *, mmap_base: int = 0, brk_start: int = 0) -> Call[Completed]:
    """execve(): the process gets an empty address space."""
    request = process_pb2.ExecRequest(process_id=process_id, name=name, mmap_base=mmap_base, brk_start=brk_start)
    return Call("exec", request, _done)


def exit_process(process_id: int) -> Call[Completed]:
    """exit()."""
    return Call("exit", process_pb2.ExitRequest(process_id=process_id), _done)


def read_memory(process_id: int, address: int, length: int) -> Call[Accessed]:
    """A CPU reads at most 1 MiB."""
    request = process_pb2.ReadMemoryRequest(process_id=process_id, address=address, length=length)
    return Call("read_memory", request, lambda r: _accessed(r, len(r.data), r.data), length)


def write_memory(process_id: int, address: int, data: bytes) -> Call[Accessed]:
    """A CPU writes at most 1 MiB."""
    request = process_pb2.WriteMemoryRequest(process_id=process_id, address=address, data=data)
    return Call("write_memory", request, lambda r: _accessed(r, r.bytes_written))


def touch(process_id: int, address: int, length: int, *, write: bool) -> Call[Accessed]:
    """A CPU touches every page of a range; `done` counts pages."""
    request = process_pb2.TouchRequest(process_id=process_id, address=address, length=length, write=write)
    return Call("touch", request, lambda r: _accessed(r, r.pages_touched))


def access_pages(process_id: int, address: int, page_count: int, values: bytes | None = None) -> Call[Accessed]:
    """A CPU reads one byte in each of many consecutive pages, or writes `values` there; `done` counts pages."""
    request = process_pb2.AccessPagesRequest(
        process_id=process_id, address=address, page_count=page_count, values=values
    )
    return Call("access_pages", request, lambda r: _accessed(r, r.pages_accessed, r.values), page_count)
