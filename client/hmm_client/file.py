"""A file of the daemon: a named object with contents, which processes map.

**Source**: open(2), pread(2), pwrite(2), ftruncate(2), fallocate(2), fstat(2); proto/hmm_proto/v1/file.proto.

**Absent**: files of this machine; none is touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hmm.file import FileKind
from hmm_client.arguments import names_arguments
from hmm_client.results import Completed, FileStatus
from hmm_proto.convert import file_kind_from_proto, file_kind_to_proto
from hmm_proto.status import from_call_result
from hmm_proto.v1 import file_pb2

if TYPE_CHECKING:
    from hmm_client.client import Client

PART_BYTES = 1 << 20


@names_arguments
class File:
    """An open file.  Mappings of it outlive it.

    Attributes:
        name: as it was opened.
    """

    def __init__(self, client: Client, file_id: int, name: str) -> None:
        self.client = client
        self.id: int = file_id
        self.name = name

    def __repr__(self) -> str:
        return f"<file {self.id} {self.name!r}>"

    @classmethod
    async def open(cls, client: Client, name: str, *, create: bool, kind: FileKind, vm_flags: int) -> File:
        """As `Client.open_file`."""
        request = file_pb2.OpenFileRequest(name=name, create=create, kind=file_kind_to_proto(kind), vm_flags=vm_flags)
        response: file_pb2.OpenFileResponse = await client.channel.request(client.files.OpenFile, request)
        return cls(client, response.file_id, name)

    async def _make(self, method: Any, request: Any) -> Any:
        response = await self.client.channel.request(method, request)
        error = from_call_result(response.result)
        if error is not None:
            raise error
        return response

    async def truncate(self, size_bytes: int) -> Completed:
        """ftruncate(2): unmaps what is cut off from every process, after their mirrors have answered."""
        request = file_pb2.TruncateFileRequest(file_id=self.id, size_bytes=size_bytes)
        return _completed(await self._make(self.client.files.TruncateFile, request))

    async def punch(self, offset: int, length: int) -> Completed:
        """fallocate(2) with FALLOC_FL_PUNCH_HOLE: whole pages go, parts of pages are zeroed."""
        request = file_pb2.PunchFileRequest(file_id=self.id, offset=offset, length=length)
        return _completed(await self._make(self.client.files.PunchFile, request))

    async def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """pread(2): up to the end of the file; everything from `offset` on without a length."""
        wanted = length if length is not None else max(0, (await self.status()).size_bytes - offset)
        parts = []
        while wanted > 0:
            request = file_pb2.ReadFileRequest(file_id=self.id, offset=offset, length=min(wanted, PART_BYTES))
            part: bytes = (await self._make(self.client.files.ReadFile, request)).data
            if not part:
                break
            parts.append(part)
            offset, wanted = offset + len(part), wanted - len(part)
        return b"".join(parts)

    async def write(self, offset: int, data: bytes) -> None:
        """pwrite(2): the file grows as needed.

        Raises:
            OutOfFramesError: no memory is left; what was written before stays (ENOMEM).
        """
        for start in range(0, len(data), PART_BYTES):
            part = data[start : start + PART_BYTES]
            request = file_pb2.WriteFileRequest(file_id=self.id, offset=offset + start, data=part)
            await self._make(self.client.files.WriteFile, request)

    async def status(self) -> FileStatus:
        """fstat(2)."""
        response: file_pb2.GetFileStatusResponse = await self.client.channel.request(
            self.client.files.GetFileStatus, file_pb2.GetFileStatusRequest(file_id=self.id)
        )
        file = response.file
        return FileStatus(
            file.file_id, file.name, file_kind_from_proto(file.kind), file.size_bytes, file.resident_pages
        )

    async def close(self) -> None:
        """close(2)."""
        await self._make(self.client.files.CloseFile, file_pb2.CloseFileRequest(file_id=self.id))


def _completed(response: Any) -> Completed:
    return Completed(response.result.operation_id, tuple(response.result.fenced_mirrors))
