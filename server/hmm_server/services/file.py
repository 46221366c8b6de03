"""FileService: named files in the daemon's memory.

**Absent**: what the calls do (`hmm.commands_file`).
"""

from __future__ import annotations

from typing import Any

import grpc

from hmm import commands_file
from hmm.file import FileKind
from hmm.vma import VmFlag
from hmm_proto import convert
from hmm_proto.v1 import file_pb2
from hmm_server.calls import Call, Invocation, invoke, rpc
from hmm_server.config import Config
from hmm_server.executor import Executor
from hmm_server.paging import page_of
from hmm_server.process_calls import DATA_BYTES_MAX, require_at_most

NAME_BYTES_MAX = 4096

Context = grpc.aio.ServicerContext[Any, Any]


def _require_file_name(operation: str, name: str) -> None:
    require_at_most(f"{operation}: bytes of the name", len(name.encode()), NAME_BYTES_MAX)


def _open(q: file_pb2.OpenFileRequest) -> Invocation:
    _require_file_name("open", q.name)
    kind = convert.file_kind_from_proto(q.kind)
    if kind in (FileKind.SHARED_MEMORY, FileKind.HUGETLB):
        raise convert.malformed("open: shared memory is made by mmap")
    if kind is FileKind.DEVICE:
        return invoke(commands_file.open_device_file, q.name, VmFlag(q.vm_flags))
    if q.vm_flags:
        raise convert.malformed("open: VM flags are for device files")
    return invoke(commands_file.open_file, q.name, create=q.create, exclusive=q.exclusive)


def _unlink(q: file_pb2.UnlinkFileRequest) -> Invocation:
    _require_file_name("unlink", q.name)
    return invoke(commands_file.unlink_file, q.name)


def _read(q: file_pb2.ReadFileRequest) -> Invocation:
    require_at_most("read file: bytes", q.length, DATA_BYTES_MAX)
    return invoke(commands_file.read_file, q.file_id, q.offset, q.length)


def _write(q: file_pb2.WriteFileRequest) -> Invocation:
    require_at_most("write file: bytes", len(q.data), DATA_BYTES_MAX)
    return invoke(commands_file.write_file, q.file_id, q.offset, q.data)


_OPEN: Call[Any, Any] = Call(_open, lambda value, _: file_pb2.OpenFileResponse(file_id=value), is_kernel_call=False)
_CLOSE: Call[Any, Any] = Call(
    lambda q: invoke(commands_file.close_file, q.file_id),
    lambda _, result: file_pb2.CloseFileResponse(result=result),
)
_UNLINK: Call[Any, Any] = Call(
    _unlink,
    lambda _, __: file_pb2.UnlinkFileResponse(),
    is_kernel_call=False,
)
_TRUNCATE: Call[Any, Any] = Call(
    lambda q: invoke(commands_file.truncate_file, q.file_id, q.size_bytes),
    lambda _, result: file_pb2.TruncateFileResponse(result=result),
)
_PUNCH: Call[Any, Any] = Call(
    lambda q: invoke(commands_file.punch_file, q.file_id, q.offset, q.length),
    lambda _, result: file_pb2.PunchFileResponse(result=result),
)
_READ: Call[Any, Any] = Call(_read, lambda value, result: file_pb2.ReadFileResponse(result=result, data=value or b""))
_WRITE: Call[Any, Any] = Call(
    _write, lambda value, result: file_pb2.WriteFileResponse(result=result, bytes_written=value or 0)
)


class FileService:
    """Files."""

    def __init__(self, executor: Executor, config: Config) -> None:
        self.executor = executor
        self._config = config

    OpenFile = rpc(_OPEN)
    CloseFile = rpc(_CLOSE)
    UnlinkFile = rpc(_UNLINK)
    TruncateFile = rpc(_TRUNCATE)
    PunchFile = rpc(_PUNCH)
    ReadFile = rpc(_READ)
    WriteFile = rpc(_WRITE)

    async def GetFileStatus(
        self,
        request: file_pb2.GetFileStatusRequest,
        context: Context,
    ) -> file_pb2.GetFileStatusResponse:
        return file_pb2.GetFileStatusResponse(file=self._status(request.file_id))

    async def ListFiles(
        self,
        request: file_pb2.ListFilesRequest,
        context: Context,
    ) -> file_pb2.ListFilesResponse:
        page = page_of(self.executor.machine.files, request, self._config.list_entries)
        files = [self._status(file_id) for file_id in page.keys]
        return file_pb2.ListFilesResponse(files=files, next_page_token=page.next_token)

    def _status(self, file_id: int) -> file_pb2.FileStatus:
        status = commands_file.status(self.executor.machine, file_id)
        return file_pb2.FileStatus(
            file_id=status.id,
            name=status.name,
            kind=convert.file_kind_to_proto(status.kind),
            size_bytes=status.size_bytes,
            resident_pages=status.resident_pages,
            open_count=status.opens,
        )
