"""The calls of ProcessService, by the names that they have in a batch.

**Absent**: how they are made (calls.py), what they do (`hmm.commands_process`).
"""

from __future__ import annotations

import errno as errnos
from collections.abc import Mapping
from typing import Any

from hmm import commands_process
from hmm.cpu_access import Accessed
from hmm.errors import OutOfFramesError
from hmm.units import PAGE_SHIFT, PAGE_SIZE, TASK_SIZE, AddressRange, page_down
from hmm.unmapped_area import MapFlag
from hmm_proto import convert
from hmm_proto.v1 import process_pb2, types_pb2
from hmm_server.callers import NAME_LENGTH_MAX
from hmm_server.calls import Call, Invocation, invoke

DATA_BYTES_MAX = 1 << 20
"""Bytes that one unary call reads or writes."""
MINCORE_PAGES_MAX = 1 << 22
PAGEMAP_PAGES_MAX = DATA_BYTES_MAX >> 3
ACCESS_PAGES_MAX = 1 << 20

Result = types_pb2.CallResult


def require_at_most(what: str, amount: int, most: int) -> None:
    """Refuse what is larger than one message may be.

    Raises:
        OutOfFramesError: it is (E2BIG, reason LIMIT).
    """
    if amount > most:
        raise OutOfFramesError(f"{what}: {amount} is more than {most} at a time", errnos.E2BIG, reason="LIMIT")


def _mmap(q: process_pb2.MmapRequest) -> Invocation:
    return invoke(commands_process.mmap, q.process_id, q.address, q.length, q.prot, q.flags, q.file_id, q.offset)


def _mmap_response(mapped: commands_process.Mapped | None, result: Result) -> process_pb2.MmapResponse:
    if mapped is None:
        return process_pb2.MmapResponse(result=result)
    return process_pb2.MmapResponse(result=result, address=mapped.address, placement=mapped.placement)


def _mremap(q: process_pb2.MremapRequest) -> Invocation:
    return invoke(commands_process.mremap, q.process_id, q.address, q.old_length, q.new_length, q.flags, q.new_address)


def _place(q: process_pb2.PlaceRequest) -> Invocation:
    flags = q.flags | MapFlag.FIXED_NOREPLACE | (0 if q.file_id else MapFlag.ANONYMOUS)
    if not flags & (MapFlag.SHARED | MapFlag.PRIVATE):
        flags |= MapFlag.PRIVATE
    length = max(0, q.end - q.start)
    return invoke(commands_process.mmap, q.process_id, q.start, length, q.prot, flags, q.file_id, q.offset)


def require_name(what: str, name: str) -> None:
    """Raises: InvalidRequestError when a name that a client gives is too long (EINVAL)."""
    if len(name) > NAME_LENGTH_MAX:
        raise convert.malformed(f"{what}: the name has more than {NAME_LENGTH_MAX} characters")


def _exec(q: process_pb2.ExecRequest) -> Invocation:
    require_name("exec", q.name)
    return invoke(commands_process.exec_process, q.process_id, q.name, mmap_base=q.mmap_base, brk_start=q.brk_start)


def _mincore(q: process_pb2.MincoreRequest) -> Invocation:
    require_at_most("mincore: pages", q.length >> PAGE_SHIFT, MINCORE_PAGES_MAX)
    return invoke(commands_process.mincore, q.process_id, q.address, q.length)


def _pagemap(q: process_pb2.PagemapRequest) -> Invocation:
    span = convert.range_from_proto(q.range)
    require_at_most("pagemap: pages", span.npages, PAGEMAP_PAGES_MAX)
    return invoke(commands_process.pagemap, q.process_id, span)


def _read_memory(q: process_pb2.ReadMemoryRequest) -> Invocation:
    require_at_most("read memory: bytes", q.length, DATA_BYTES_MAX)
    return invoke(commands_process.read_memory, q.process_id, q.address, q.length)


def _read_memory_response(accessed: Accessed | None, result: Result) -> process_pb2.ReadMemoryResponse:
    data = accessed.data if accessed else b""
    return process_pb2.ReadMemoryResponse(result=result, data=data, signal=_signal(accessed))


def _write_memory(q: process_pb2.WriteMemoryRequest) -> Invocation:
    require_at_most("write memory: bytes", len(q.data), DATA_BYTES_MAX)
    return invoke(commands_process.write_memory, q.process_id, q.address, q.data)


def _write_memory_response(accessed: Accessed | None, result: Result) -> process_pb2.WriteMemoryResponse:
    done = accessed.done if accessed else 0
    return process_pb2.WriteMemoryResponse(result=result, bytes_written=done, signal=_signal(accessed))


def _touch(q: process_pb2.TouchRequest) -> Invocation:
    span = _span(q.address, q.length)
    return invoke(commands_process.touch, q.process_id, span, write=q.write)


def _touch_response(accessed: Accessed | None, result: Result) -> process_pb2.TouchResponse:
    done = accessed.done if accessed else 0
    return process_pb2.TouchResponse(result=result, pages_touched=done, signal=_signal(accessed))


def _access_pages(q: process_pb2.AccessPagesRequest) -> Invocation:
    require_at_most("access pages: pages", q.page_count, ACCESS_PAGES_MAX)
    start = page_down(q.address)
    span = _span(start, q.page_count * PAGE_SIZE)
    if q.HasField("values"):
        return invoke(commands_process.write_pages, q.process_id, span, q.address - start, q.values)
    return invoke(commands_process.read_pages, q.process_id, span, q.address - start)


def _access_pages_response(accessed: Accessed | None, result: Result) -> process_pb2.AccessPagesResponse:
    done, values = (accessed.done, accessed.data) if accessed else (0, b"")
    return process_pb2.AccessPagesResponse(result=result, pages_accessed=done, values=values, signal=_signal(accessed))


def _span(address: int, length: int) -> AddressRange:
    if address + length > TASK_SIZE:
        raise convert.malformed(f"[{address:#x}, {address + length:#x}) is beyond the address space")
    return AddressRange(address, address + length)


def _signal(accessed: Accessed | None) -> types_pb2.SignalReport | None:
    if accessed is None or accessed.signal is None:
        return None
    return convert.signal_to_proto(accessed.signal, accessed.address)


CALLS: Mapping[str, Call[Any, Any]] = {
    "mmap": Call(_mmap, _mmap_response),
    "munmap": Call(
        lambda q: invoke(commands_process.munmap, q.process_id, q.address, q.length),
        lambda _, result: process_pb2.MunmapResponse(result=result),
    ),
    "mprotect": Call(
        lambda q: invoke(commands_process.mprotect, q.process_id, q.address, q.length, q.prot),
        lambda _, result: process_pb2.MprotectResponse(result=result),
    ),
    "mremap": Call(_mremap, lambda value, result: process_pb2.MremapResponse(result=result, address=value)),
    "madvise": Call(
        lambda q: invoke(commands_process.madvise, q.process_id, q.address, q.length, q.advice),
        lambda _, result: process_pb2.MadviseResponse(result=result),
    ),
    "brk": Call(
        lambda q: invoke(commands_process.brk, q.process_id, q.address),
        lambda value, result: process_pb2.BrkResponse(result=result, address=value),
    ),
    "msync": Call(
        lambda q: invoke(commands_process.msync, q.process_id, q.address, q.length, q.flags),
        lambda _, result: process_pb2.MsyncResponse(result=result),
    ),
    "mlock": Call(
        lambda q: invoke(commands_process.mlock, q.process_id, q.address, q.length, q.flags),
        lambda _, result: process_pb2.MlockResponse(result=result),
    ),
    "munlock": Call(
        lambda q: invoke(commands_process.munlock, q.process_id, q.address, q.length),
        lambda _, result: process_pb2.MunlockResponse(result=result),
    ),
    "mlockall": Call(
        lambda q: invoke(commands_process.mlockall, q.process_id, q.flags),
        lambda _, result: process_pb2.MlockallResponse(result=result),
    ),
    "munlockall": Call(
        lambda q: invoke(commands_process.munlockall, q.process_id),
        lambda _, result: process_pb2.MunlockallResponse(result=result),
    ),
    "clear_refs": Call(
        lambda q: invoke(commands_process.clear_refs, q.process_id, q.what),
        lambda _, result: process_pb2.ClearRefsResponse(result=result),
    ),
    "mincore": Call(
        _mincore,
        lambda value, result: process_pb2.MincoreResponse(
            result=result, residency=b"" if value is None else value.tobytes()
        ),
    ),
    "process_mrelease": Call(
        lambda q: invoke(commands_process.process_mrelease, q.process_id),
        lambda _, result: process_pb2.ProcessMreleaseResponse(result=result),
    ),
    "pagemap": Call(
        _pagemap,
        lambda value, result: process_pb2.PagemapResponse(
            result=result, entries=b"" if value is None else convert.entries_to_proto(value)
        ),
    ),
    "place": Call(_place, lambda _, result: process_pb2.PlaceResponse(result=result)),
    "fork": Call(
        lambda q: invoke(commands_process.fork, q.process_id),
        lambda value, result: process_pb2.ForkResponse(result=result, child_process_id=value),
    ),
    "vfork": Call(
        lambda q: invoke(commands_process.vfork, q.process_id),
        lambda value, result: process_pb2.VforkResponse(result=result, child_process_id=value),
    ),
    "clone_thread": Call(
        lambda q: invoke(commands_process.clone_thread, q.process_id),
        lambda value, result: process_pb2.CloneThreadResponse(result=result, thread_process_id=value),
    ),
    "exec": Call(_exec, lambda _, result: process_pb2.ExecResponse(result=result)),
    "exit": Call(
        lambda q: invoke(commands_process.exit_process, q.process_id),
        lambda _, result: process_pb2.ExitResponse(result=result),
    ),
    "read_memory": Call(_read_memory, _read_memory_response),
    "write_memory": Call(_write_memory, _write_memory_response),
    "touch": Call(_touch, _touch_response),
    "access_pages": Call(_access_pages, _access_pages_response),
}
