"""FileService: named files, shared between processes, and what truncating them does to mappings."""

from __future__ import annotations

import asyncio
import errno as errnos
from typing import Any

import grpc
import pytest

from hmm_proto.v1 import file_pb2, inspection_pb2, process_pb2, types_pb2

PAGE = 4096
BASE = 0x10000000000
VM_PFNMAP, VM_IO, VM_HUGETLB = 0x400, 0x4000, 0x40_0000


async def _create(served: Any, name: str = "/data", size: int = 2 * PAGE) -> int:
    opened = await served.file.OpenFile(file_pb2.OpenFileRequest(name=name, create=True))
    await served.file.TruncateFile(file_pb2.TruncateFileRequest(file_id=opened.file_id, size_bytes=size))
    return opened.file_id


async def _map(served: Any, pid: int, file_id: int, flags: int = 0x11) -> Any:
    return await served.process.Mmap(
        process_pb2.MmapRequest(process_id=pid, address=BASE, length=2 * PAGE, prot=3, flags=flags, file_id=file_id)
    )


async def test_write_file_is_seen_through_a_shared_mapping(served: Any) -> None:
    """pwrite(2) and a shared mapping show the same bytes, in both directions."""
    file_id, pid = await _create(served), await served.new_process()
    await _map(served, pid, file_id)
    wrote = await served.file.WriteFile(file_pb2.WriteFileRequest(file_id=file_id, offset=10, data=b"file"))
    seen = await served.process.ReadMemory(process_pb2.ReadMemoryRequest(process_id=pid, address=BASE + 10, length=4))
    await served.process.WriteMemory(process_pb2.WriteMemoryRequest(process_id=pid, address=BASE + PAGE, data=b"map"))
    read = await served.file.ReadFile(file_pb2.ReadFileRequest(file_id=file_id, offset=PAGE, length=3))
    assert (wrote.bytes_written, seen.data, read.data) == (4, b"file", b"map")


async def test_truncate_tells_mirrors_and_leaves_sigbus(served: Any) -> None:
    """Pages behind the new end go after every mirror has answered; touching them is SIGBUS."""
    file_id, pid = await _create(served), await served.new_process()
    await _map(served, pid, file_id)
    driver = await served.driver()
    mirror = await driver.mirror(pid)
    await driver.fault(mirror, BASE, BASE + 2 * PAGE)
    truncating = asyncio.ensure_future(
        served.file.TruncateFile(file_pb2.TruncateFileRequest(file_id=file_id, size_bytes=PAGE))
    )
    event = await driver.events.get()
    assert (event.cause, list(event.ranges.starts)) == ("truncate", [BASE + PAGE])
    await driver.acknowledge(event)
    assert (await truncating).result.errno == 0
    touched = await served.process.Touch(process_pb2.TouchRequest(process_id=pid, address=BASE, length=2 * PAGE))
    assert (touched.pages_touched, touched.signal.signal) == (1, types_pb2.SIGNAL_BUS_ADRERR)


async def test_punch_file_makes_a_hole(served: Any) -> None:
    """A hole reads as zeroes and the size stays."""
    file_id = await _create(served)
    await served.file.WriteFile(file_pb2.WriteFileRequest(file_id=file_id, offset=0, data=b"x" * PAGE))
    await served.file.PunchFile(file_pb2.PunchFileRequest(file_id=file_id, offset=0, length=PAGE))
    read = await served.file.ReadFile(file_pb2.ReadFileRequest(file_id=file_id, offset=0, length=4))
    status = (await served.file.GetFileStatus(file_pb2.GetFileStatusRequest(file_id=file_id))).file
    assert read.data == bytes(4)
    assert (status.size_bytes, status.resident_pages, status.kind) == (2 * PAGE, 0, file_pb2.FILE_KIND_REGULAR)


async def test_file_lives_on_without_name_while_it_is_open(served: Any) -> None:
    """unlink(2) takes the name, close(2) the handle; the file goes with the last of them."""
    file_id = await _create(served)
    await served.file.UnlinkFile(file_pb2.UnlinkFileRequest(name="/data"))
    assert (await served.file.GetFileStatus(file_pb2.GetFileStatusRequest(file_id=file_id))).file.name == ""
    await served.file.CloseFile(file_pb2.CloseFileRequest(file_id=file_id))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.file.GetFileStatus(file_pb2.GetFileStatusRequest(file_id=file_id))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_open_file_ends_with_status_when_it_cannot(served: Any, decode: Any) -> None:
    """ENOENT without `create`, EEXIST with `exclusive`, EINVAL without a name or for what mmap makes."""
    await _create(served)
    for request, errno in (
        (file_pb2.OpenFileRequest(name="/none"), errnos.ENOENT),
        (file_pb2.OpenFileRequest(name="/data", create=True, exclusive=True), errnos.EEXIST),
        (file_pb2.OpenFileRequest(create=True), errnos.EINVAL),
        (file_pb2.OpenFileRequest(name="/s", create=True, kind=file_pb2.FILE_KIND_SHARED_MEMORY), errnos.EINVAL),
        (file_pb2.OpenFileRequest(name="x" * 4097, create=True), errnos.E2BIG),
        (file_pb2.OpenFileRequest(name="/r", create=True, vm_flags=VM_IO), errnos.EINVAL),
        (file_pb2.OpenFileRequest(name="/d", kind=file_pb2.FILE_KIND_DEVICE, vm_flags=VM_HUGETLB), errnos.EINVAL),
        (file_pb2.OpenFileRequest(name="/d", kind=file_pb2.FILE_KIND_DEVICE, vm_flags=1 << 63), errnos.EINVAL),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.file.OpenFile(request)
        assert decode(caught).errno == errno


async def test_device_file_cannot_be_mirrored(served: Any) -> None:
    """A mapping of a driver's registers has the VM flags its driver asked for, and faults of devices are EFAULT."""
    opened = await served.file.OpenFile(
        file_pb2.OpenFileRequest(name="/dev/gpu0", kind=file_pb2.FILE_KIND_DEVICE, vm_flags=VM_PFNMAP | VM_IO)
    )
    pid = await served.new_process()
    assert (await _map(served, pid, opened.file_id)).result.errno == 0
    maps = await served.inspection.GetMaps(inspection_pb2.GetMapsRequest(process_id=pid))
    driver = await served.driver()
    mirror = await driver.mirror(pid)
    faulted = await driver.fault(mirror, BASE, BASE + PAGE, write=False)
    assert maps.mappings[0].vm_flags & (VM_PFNMAP | VM_IO) == VM_PFNMAP | VM_IO
    assert maps.mappings[0].file_name == "/dev/gpu0"
    assert faulted.result.errno == errnos.EFAULT


async def test_list_files_pages_through_all(serve: Any) -> None:
    """Lists are paged; every file is listed once."""
    served = await serve(list_entries=2)
    for number in range(5):
        await _create(served, f"/f{number}")
    names, token, pages = [], "", 0
    while True:
        listed = await served.file.ListFiles(file_pb2.ListFilesRequest(page_token=token))
        names += [file.name for file in listed.files]
        token, pages = listed.next_page_token, pages + 1
        if not token:
            break
    assert (names, pages) == ([f"/f{number}" for number in range(5)], 3)
    with pytest.raises(grpc.aio.AioRpcError):
        await served.file.ListFiles(file_pb2.ListFilesRequest(page_token="nonsense"))
