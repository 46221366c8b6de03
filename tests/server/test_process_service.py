"""ProcessService: results of kernel calls in responses, calls that were not made as statuses, batches, streams."""

from __future__ import annotations

import errno as errnos
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from hmm.errors import HmmError
from hmm_proto.v1 import inspection_pb2, process_pb2, types_pb2

PAGE = 4096
BASE = 0x10000000000
RW = 3
PRIVATE_ANONYMOUS = 0x22
FIXED = 0x10
Decode = Callable[[Any], HmmError]


async def test_mmap_maps_where_maps_shows_it(served: Any) -> None:
    """A mapping without an address is placed by the daemon, which tells where."""
    pid = await served.new_process()
    request = process_pb2.MmapRequest(process_id=pid, length=3 * PAGE, prot=RW, flags=PRIVATE_ANONYMOUS)
    mapped = await served.process.Mmap(request)
    maps = await served.inspection.GetMaps(inspection_pb2.GetMapsRequest(process_id=pid))
    assert [(m.start, m.end, m.permissions) for m in maps.mappings] == [
        (mapped.address, mapped.address + 3 * PAGE, "rw-p")
    ]
    assert mapped.placement == mapped.address
    assert mapped.result.operation_id > 0


async def test_mmap_returns_errno_when_kernel_refuses(served: Any) -> None:
    """EINVAL of mmap(2) is the result of a call that was made, not a status."""
    pid = await served.new_process()
    response = await served.process.Mmap(process_pb2.MmapRequest(process_id=pid, length=0, flags=PRIVATE_ANONYMOUS))
    assert response.result.errno == errnos.EINVAL
    assert response.address == 0


async def test_mprotect_returns_partial_effect_when_range_has_a_hole(served: Any) -> None:
    """mprotect over a hole changes what lies below it, answers ENOMEM and says where it stopped."""
    pid = await served.new_process()
    await served.mmap(pid, BASE, BASE + PAGE)
    response = await served.process.Mprotect(
        process_pb2.MprotectRequest(process_id=pid, address=BASE, length=3 * PAGE, prot=1)
    )
    maps = await served.inspection.GetMaps(inspection_pb2.GetMapsRequest(process_id=pid))
    assert response.result.errno == errnos.ENOMEM
    assert maps.mappings[0].permissions == "r--p"


async def test_call_is_not_found_when_process_does_not_exist(served: Any, decode: Decode) -> None:
    """A call on a process that is not there was not made: NOT_FOUND, with errno ESRCH."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.munmap(99, BASE, BASE + PAGE)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert decode(caught).errno == errnos.ESRCH


async def test_call_is_denied_when_process_belongs_to_another_token(served: Any, decode: Decode) -> None:
    """What one token created no other may use; without a token things belong to everybody."""
    pid = await served.new_process(metadata=(("hmm-token", "mine"),))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.munmap(pid, BASE, BASE + PAGE, metadata=(("hmm-token", "yours"),))
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert decode(caught).reason == "NOT_OWNER"
    mine = await served.munmap(pid, BASE, BASE + PAGE, metadata=(("authorization", "Bearer mine"),))
    assert mine.result.errno == 0


async def test_create_process_is_exhausted_when_limit_is_reached(serve: Any, decode: Decode) -> None:
    """A limit of the daemon is RESOURCE_EXHAUSTED with reason LIMIT."""
    served = await serve(processes=1)
    await served.new_process()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.new_process()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (decode(caught).errno, decode(caught).reason) == (errnos.ENOMEM, "LIMIT")


async def test_fork_is_exhausted_when_limit_is_reached(serve: Any) -> None:
    """The limit holds for fork too, and there it is a status as well: the call was not made."""
    served = await serve(processes=1)
    pid = await served.new_process()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.process.Fork(process_pb2.ForkRequest(process_id=pid))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_read_memory_returns_what_was_written(served: Any) -> None:
    """Bytes written by a CPU are read back, across pages and at any alignment."""
    pid = await served.new_process()
    await served.mmap(pid, BASE, BASE + 2 * PAGE)
    data = bytes(range(256)) * 8
    wrote = await served.process.WriteMemory(
        process_pb2.WriteMemoryRequest(process_id=pid, address=BASE + PAGE - 7, data=data)
    )
    read = await served.process.ReadMemory(
        process_pb2.ReadMemoryRequest(process_id=pid, address=BASE + PAGE - 7, length=len(data))
    )
    assert (wrote.bytes_written, read.data) == (len(data), data)
    assert read.signal.signal == types_pb2.SIGNAL_UNSPECIFIED


async def test_write_memory_reports_signal_when_mapping_ends(served: Any) -> None:
    """A CPU stops at the first page without a mapping: SEGV_MAPERR, and what lies before is written."""
    pid = await served.new_process()
    await served.mmap(pid, BASE, BASE + PAGE)
    wrote = await served.process.WriteMemory(
        process_pb2.WriteMemoryRequest(process_id=pid, address=BASE + PAGE - 4, data=b"12345678")
    )
    assert wrote.result.errno == 0
    assert wrote.bytes_written == 4
    assert (wrote.signal.signal, wrote.signal.address) == (types_pb2.SIGNAL_SEGV_MAPERR, BASE + PAGE)


async def test_read_memory_is_exhausted_when_longer_than_one_message(served: Any, decode: Decode) -> None:
    """More than 1 MiB at a time is what StreamMemory is for."""
    pid = await served.new_process()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.process.ReadMemory(
            process_pb2.ReadMemoryRequest(process_id=pid, address=BASE, length=(1 << 20) + 1)
        )
    assert decode(caught).errno == errnos.E2BIG


async def test_stream_memory_returns_what_fill_memory_wrote(serve: Any) -> None:
    """Any amount is written and read in parts; parts continue where the one before ended."""
    served = await serve(part_bytes=1 << 16)
    pid = await served.new_process()
    await served.mmap(pid, BASE, BASE + (1 << 20))
    data = bytes(range(251)) * 1000

    async def parts() -> AsyncIterator[process_pb2.FillMemoryRequest]:
        yield process_pb2.FillMemoryRequest(process_id=pid, address=BASE + 3, data=data[:100_000])
        yield process_pb2.FillMemoryRequest(data=data[100_000:])

    filled = await served.process.FillMemory(parts())
    read = [
        part
        async for part in served.process.StreamMemory(
            process_pb2.StreamMemoryRequest(process_id=pid, address=BASE + 3, length=len(data))
        )
    ]
    assert filled.bytes_written == len(data)
    assert b"".join(part.data for part in read) == data
    assert max(len(part.data) for part in read) == 1 << 16


async def test_stream_memory_ends_when_a_signal_stops_it(serve: Any) -> None:
    """The part with the signal is the last; what lies before it was read."""
    served = await serve(part_bytes=PAGE)
    pid = await served.new_process()
    await served.mmap(pid, BASE, BASE + 2 * PAGE)
    request = process_pb2.StreamMemoryRequest(process_id=pid, address=BASE, length=5 * PAGE)
    read = [part async for part in served.process.StreamMemory(request)]
    assert [len(part.data) for part in read] == [PAGE, PAGE, 0]
    assert read[-1].signal.signal == types_pb2.SIGNAL_SEGV_MAPERR


async def test_fill_memory_counts_up_to_the_signal(served: Any) -> None:
    """Parts behind the first signal are not tried."""
    pid = await served.new_process()
    await served.mmap(pid, BASE, BASE + PAGE)

    async def parts() -> AsyncIterator[process_pb2.FillMemoryRequest]:
        for _ in range(3):
            yield process_pb2.FillMemoryRequest(process_id=pid, address=BASE + PAGE - 2, data=b"1234")

    filled = await served.process.FillMemory(parts())
    assert (filled.bytes_written, filled.signal.address) == (2, BASE + PAGE)


async def test_touch_and_access_pages_work_page_by_page(served: Any) -> None:
    """A touch brings pages in; one byte of each of many pages is written and read in one call."""
    pid = await served.new_process()
    await served.mmap(pid, BASE, BASE + 4 * PAGE)
    touched = await served.process.Touch(
        process_pb2.TouchRequest(process_id=pid, address=BASE + 5, length=2 * PAGE, write=True)
    )
    wrote = await served.process.AccessPages(
        process_pb2.AccessPagesRequest(process_id=pid, address=BASE + 9, page_count=4, values=b"abcd")
    )
    read = await served.process.AccessPages(
        process_pb2.AccessPagesRequest(process_id=pid, address=BASE + 9, page_count=5)
    )
    assert (touched.pages_touched, wrote.pages_accessed) == (3, 4)
    assert (read.values, read.pages_accessed, read.signal.address) == (b"abcd", 4, BASE + 4 * PAGE + 9)


async def test_fork_copies_and_vfork_shares(served: Any) -> None:
    """A forked child has a copy of its own; vfork children and threads use the same address space."""
    pid = await served.new_process()
    await served.mmap(pid, BASE, BASE + PAGE)
    child = (await served.process.Fork(process_pb2.ForkRequest(process_id=pid))).child_process_id
    shared = (await served.process.Vfork(process_pb2.VforkRequest(process_id=pid))).child_process_id
    thread = (await served.process.CloneThread(process_pb2.CloneThreadRequest(process_id=pid))).thread_process_id
    await served.munmap(pid, BASE, BASE + PAGE)
    counts = [
        len((await served.inspection.GetMaps(inspection_pb2.GetMapsRequest(process_id=one))).mappings)
        for one in (pid, child, shared, thread)
    ]
    assert counts == [0, 1, 0, 0]
    for one in (thread, shared, pid):
        assert (await served.process.Exit(process_pb2.ExitRequest(process_id=one))).result.errno == 0
    assert list(served.daemon.machine.processes) == [child]


async def test_exec_leaves_an_empty_address_space(served: Any) -> None:
    """execve() gives the process a new, empty address space and a name."""
    pid = await served.new_process()
    await served.mmap(pid, BASE, BASE + PAGE)
    await served.process.Exec(process_pb2.ExecRequest(process_id=pid, name="next"))
    listed = await served.inspection.ListProcesses(inspection_pb2.ListProcessesRequest())
    assert [(p.name, p.vma_count) for p in listed.processes] == [("next", 0)]


async def test_execute_makes_calls_in_order_and_reports_each(served: Any) -> None:
    """A batch is as the calls one after the other: errnos, and calls that were not made, stand in their place."""
    pid = await served.new_process()
    calls = [
        process_pb2.Call(
            mmap=process_pb2.MmapRequest(
                process_id=pid, address=BASE, length=PAGE, prot=RW, flags=PRIVATE_ANONYMOUS | FIXED
            )
        ),
        process_pb2.Call(write_memory=process_pb2.WriteMemoryRequest(process_id=pid, address=BASE, data=b"x")),
        process_pb2.Call(munmap=process_pb2.MunmapRequest(process_id=pid, address=BASE + 1, length=PAGE)),
        process_pb2.Call(munmap=process_pb2.MunmapRequest(process_id=99, address=BASE, length=PAGE)),
        process_pb2.Call(),
        process_pb2.Call(read_memory=process_pb2.ReadMemoryRequest(process_id=pid, address=BASE, length=1)),
        process_pb2.Call(brk=process_pb2.BrkRequest(process_id=pid)),
    ]
    outcomes = (await served.process.Execute(process_pb2.ExecuteRequest(calls=calls))).outcomes
    kinds = [outcome.WhichOneof("outcome") for outcome in outcomes]
    assert kinds == ["mmap", "write_memory", "munmap", "not_made", "not_made", "read_memory", "brk"]
    assert outcomes[2].munmap.result.errno == errnos.EINVAL
    assert outcomes[3].not_made.errno == errnos.ESRCH
    assert outcomes[3].not_made.operation_id == outcomes[2].munmap.result.operation_id + 1
    assert outcomes[4].not_made.operation_id == 0
    assert outcomes[5].read_memory.data == b"x"


async def test_execute_stops_when_told_to_stop_at_errors(served: Any) -> None:
    """With `stop_at_error` the first call that fails is the last that is tried."""
    pid = await served.new_process()
    bad = process_pb2.Call(munmap=process_pb2.MunmapRequest(process_id=pid, address=1, length=PAGE))
    good = process_pb2.Call(brk=process_pb2.BrkRequest(process_id=pid))
    request = process_pb2.ExecuteRequest(calls=[good, bad, good], stop_at_error=True)
    assert len((await served.process.Execute(request)).outcomes) == 2


async def test_execute_is_exhausted_when_batch_is_too_long(serve: Any, decode: Decode) -> None:
    """One more than the limit of calls is refused as a whole."""
    served = await serve(batch_calls=2)
    pid = await served.new_process()
    call = process_pb2.Call(brk=process_pb2.BrkRequest(process_id=pid))
    assert len((await served.process.Execute(process_pb2.ExecuteRequest(calls=[call] * 2))).outcomes) == 2
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.process.Execute(process_pb2.ExecuteRequest(calls=[call] * 3))
    assert decode(caught).reason == "LIMIT"


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("Brk", process_pb2.BrkRequest()),
        ("Msync", process_pb2.MsyncRequest(address=BASE, length=PAGE, flags=4)),
        ("Mlock", process_pb2.MlockRequest(address=BASE, length=PAGE)),
        ("Munlock", process_pb2.MunlockRequest(address=BASE, length=PAGE)),
        ("Mlockall", process_pb2.MlockallRequest(flags=1)),
        ("Munlockall", process_pb2.MunlockallRequest()),
        ("ClearRefs", process_pb2.ClearRefsRequest(what=1)),
        ("Mincore", process_pb2.MincoreRequest(address=BASE, length=PAGE)),
        ("Madvise", process_pb2.MadviseRequest(address=BASE, length=PAGE, advice=4)),
        ("Mremap", process_pb2.MremapRequest(address=BASE, old_length=PAGE, new_length=2 * PAGE)),
        ("Place", process_pb2.PlaceRequest(start=BASE + 8 * PAGE, end=BASE + 9 * PAGE, prot=1)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_every_other_call_succeeds_on_a_mapping(served: Any, method: str, request_: Any) -> None:
    """Each system call reaches the core and comes back."""
    pid = await served.new_process()
    await served.mmap(pid, BASE, BASE + PAGE)
    request_.process_id = pid
    response = await getattr(served.process, method)(request_)
    assert (response.result.errno, response.result.reason) == (0, "")


async def test_call_is_malformed_when_metadata_is(served: Any, decode: Decode) -> None:
    """A mark of a callback that is not MIRROR:SEQUENCE is refused and not ignored."""
    pid = await served.new_process()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.munmap(pid, BASE, BASE + PAGE, metadata=(("hmm-in-callback", "seven"),))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert decode(caught).reason == "MALFORMED"
