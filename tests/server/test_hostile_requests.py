"""Requests that make no sense, ask for too much, or are not their caller's: clear errors, and nothing changes."""

from __future__ import annotations

import asyncio
import errno as errnos
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from hmm_proto.v1 import (
    device_pb2,
    event_pb2,
    file_pb2,
    harness_pb2,
    hmm_pb2,
    inspection_pb2,
    process_pb2,
    range_pb2,
    session_pb2,
    session_pb2_grpc,
)
from hmm_server.answers import ANSWERS_MAX, REJECTIONS_TOLD
from hmm_server.device_calls import PIECES_MAX
from hmm_server.services import process

PAGE = 4096
BASE = 0x10000000000
MALLORY = (("hmm-token", "mallory"),)
GARBAGE = b"\x0a\xff\xff\xff\xff\x0f"
"""A field of four gigabytes, of which nothing follows."""


async def refused(call: Any) -> grpc.aio.AioRpcError:
    """The error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def logged(caplog: pytest.LogCaptureFixture, level: int) -> list[logging.LogRecord]:
    """What the daemon has logged, from a level on; asyncio may tell at any time of what another test left behind."""
    return [record for record in caplog.records if record.levelno >= level and record.name.startswith("hmm_server")]


# ---- bytes that are no message


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("ProcessService/Mmap", "mmap: "),
        ("InspectionService/GetPending", "get pending: "),
        ("DeviceService/Fault", "fault: "),
    ],
)
async def test_call_is_invalid_when_its_bytes_are_no_message(
    served: Any, method: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Bytes that are no message are the caller's mistake, not the daemon's: the error names the call."""
    error = await refused(served.channel.unary_unary(f"/hmm.v1.{method}")(GARBAGE))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (error.details() or "").startswith(name)
    assert not logged(caplog, logging.WARNING)


async def test_stream_of_responses_is_invalid_when_its_bytes_are_no_message(served: Any) -> None:
    """A call that is answered by a stream ends the same way."""
    call = served.channel.unary_stream("/hmm.v1.ProcessService/StreamMemory")(GARBAGE)
    assert (await refused(call.read())).code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_stream_of_requests_is_invalid_when_a_part_is_no_message(served: Any) -> None:
    """What was written by the parts before it stays written, as when a part fails."""
    pid = await served.new_process()
    await served.mmap(pid, BASE, BASE + PAGE)

    async def parts() -> AsyncIterator[bytes]:
        yield process_pb2.FillMemoryRequest(process_id=pid, address=BASE, data=b"kept").SerializeToString()
        yield GARBAGE

    error = await refused(served.channel.stream_unary("/hmm.v1.ProcessService/FillMemory")(parts()))
    read = await served.process.ReadMemory(process_pb2.ReadMemoryRequest(process_id=pid, address=BASE, length=4))
    assert (error.code(), read.data) == (grpc.StatusCode.INVALID_ARGUMENT, b"kept")


async def test_filling_says_what_was_wrong_when_the_client_still_writes(served: Any) -> None:
    """The call ends when all parts have come: a client that is still writing then would be told INTERNAL."""
    part = process_pb2.FillMemoryRequest(process_id=99, address=BASE, data=bytes(1 << 20))
    for _ in range(10):
        call = served.process.FillMemory(iter([part] * 8))
        assert (await refused(call)).code() is grpc.StatusCode.NOT_FOUND


async def test_filling_ends_when_the_client_neither_writes_nor_ends(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has asked for what cannot be, and then keeps the stream open, is told so all the same."""
    monkeypatch.setattr(process, "SILENCE_S", 0.05)
    call = served.process.FillMemory()
    await call.write(process_pb2.FillMemoryRequest(process_id=99, address=BASE, data=b"never kept"))
    assert (await refused(call)).details() == "fill memory: there is no process 99"


async def test_session_ends_when_a_batch_is_no_message(
    mirrored: tuple[Any, Any, int, int], caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody knows what a broken batch wanted to answer: the session ends, its mirrors are fenced and say why."""
    served, _, pid, _ = mirrored
    call = served.channel.stream_stream("/hmm.v1.SessionService/Session")()
    await call.write(session_pb2.SessionRequest(hello=session_pb2.Hello(protocol_version=1)).SerializeToString())
    epoch = session_pb2.SessionResponse.FromString(await call.read()).welcome.epoch
    device = await served.device.RegisterDevice(device_pb2.RegisterDeviceRequest(name="other"))
    request = device_pb2.RegisterMirrorRequest(device_id=device.device_id, process_id=pid, epoch=epoch)
    mirror = (await served.device.RegisterMirror(request)).mirror_id
    await call.write(GARBAGE)
    assert session_pb2.SessionResponse.FromString(await call.read()).bye.reason.startswith("it could not be read")
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
    status = await served.mirror_status(mirror)
    assert (status.state, "could not be read" in status.lost_because) == ("lost", True)
    assert not logged(caplog, logging.ERROR)


# ---- numbers in texts


@pytest.mark.parametrize("token", ["9" * 5000, str(1 << 64), "-1", "²", "\N{ARABIC-INDIC DIGIT ONE}", "1e3"])
async def test_list_is_invalid_when_the_page_token_is_no_number(served: Any, token: str) -> None:
    """A page token that was not given out is refused, however long it is."""
    request = inspection_pb2.ListProcessesRequest(page_token=token)
    error = await refused(served.inspection.ListProcesses(request))
    assert (error.code(), error.details()) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        f"list processes: page token {token[:32]!r} was not given out here",
    )


@pytest.mark.parametrize("mark", ["9" * 5000 + ":1", "1", "1:", "-1:1", "1:18446744073709551616000"])
async def test_call_is_invalid_when_its_callback_is_no_pair_of_numbers(served: Any, mark: str) -> None:
    """`hmm-in-callback` has to be MIRROR:SEQUENCE."""
    call = served.process.CreateProcess(process_pb2.CreateProcessRequest(), metadata=(("hmm-in-callback", mark),))
    error = await refused(call)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "MIRROR:SEQUENCE" in (error.details() or "")


# ---- too much at a time


async def test_fault_is_refused_when_it_has_too_many_ranges(mirrored: tuple[Any, Any, int, int]) -> None:
    """Each range is a step of its own, during which nobody else is served; scattered pages are one step."""
    served, driver, _, mirror = mirrored
    starts = [BASE + 2 * PAGE * number for number in range(PIECES_MAX + 1)]
    ranges = range_pb2.AddressRanges(starts=starts, ends=[start + PAGE for start in starts])
    refusal = await driver.make("fault", device_pb2.FaultRequest(mirror_id=mirror, ranges=ranges))
    assert (refusal.errno, refusal.reason) == (errnos.E2BIG, "LIMIT")
    assert "fault: ranges: 4097" in refusal.message
    assert served.daemon.machine.mirrors[mirror].table.count == 0


async def test_access_is_refused_when_it_has_too_many_pieces(mirrored: tuple[Any, Any, int, int]) -> None:
    """A byte of each of many pages would be as many pages of memory in the daemon."""
    _, driver, _, mirror = mirrored
    await driver.fault(mirror, BASE, BASE + PAGE)
    addresses, lengths = [BASE] * (PIECES_MAX + 1), [1] * (PIECES_MAX + 1)
    request = device_pb2.DeviceReadRequest(mirror_id=mirror, addresses=addresses, lengths=lengths)
    refusal = await driver.make("device_read", request)
    assert (refusal.errno, refusal.reason) == (errnos.E2BIG, "LIMIT")
    fitting = device_pb2.DeviceReadRequest(mirror_id=mirror, addresses=addresses[1:], lengths=lengths[1:])
    assert (await driver.make("device_read", fitting)).data == bytes(PIECES_MAX)


async def test_batch_is_refused_when_a_malformed_range_hides_what_it_reads(served: Any) -> None:
    """A range that ends before it begins does not make room for others."""
    pid = await served.new_process()
    hiding = process_pb2.PagemapRequest(process_id=pid, range=range_pb2.AddressRange(start=1 << 46, end=0))
    reading = process_pb2.ReadMemoryRequest(process_id=pid, address=BASE, length=1 << 20)
    calls = [process_pb2.Call(pagemap=hiding), *[process_pb2.Call(read_memory=reading)] * 5]
    error = await refused(served.process.Execute(process_pb2.ExecuteRequest(calls=calls)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_scan_is_refused_when_it_has_too_many_passes(serve: Any) -> None:
    """A scan that goes on for ever would keep the daemon from ending."""
    served = await serve(harness=True)
    harness = served.channel.unary_unary(
        "/hmm.v1.HarnessService/ScanKsm", request_serializer=harness_pb2.ScanKsmRequest.SerializeToString
    )
    error = await refused(harness(harness_pb2.ScanKsmRequest(passes=(1 << 32) - 1)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_names_are_refused_when_they_are_too_long(served: Any) -> None:
    """A process that execs gets a name of at most 64 characters, as a new one."""
    pid = await served.new_process()
    error = await refused(served.process.Exec(process_pb2.ExecRequest(process_id=pid, name="x" * 65)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_watch_is_refused_when_it_names_too_many(served: Any) -> None:
    """Each name is looked up before anything is watched."""
    call = served.inspection.Watch(inspection_pb2.WatchRequest(mirror_ids=[1] * 1001))
    assert (await refused(call.read())).code() is grpc.StatusCode.RESOURCE_EXHAUSTED


# ---- answers


async def test_answers_are_rejected_together_when_they_are_too_many(mirrored: tuple[Any, Any, int, int]) -> None:
    """A message of too many answers is rejected as one, and nothing in it counts."""
    served, driver, pid, mirror = mirrored
    await driver.fault(mirror, BASE, BASE + PAGE)
    unmapping = asyncio.ensure_future(served.munmap(pid, BASE, BASE + PAGE))
    event = await driver.events.get()
    too_many = ANSWERS_MAX + 1
    await driver.answer(single_mirror_ids=[mirror] * too_many, single_sequences=[1] * too_many)
    assert "none was taken" in (await driver.violations.get()).rule
    assert not unmapping.done()
    await driver.acknowledge(event)
    assert (await unmapping).result.errno == 0


async def test_rejected_answers_are_summed_up_when_they_are_many(mirrored: tuple[Any, Any, int, int]) -> None:
    """The first are told one by one, the rest as a number; all are counted."""
    served, driver, _, mirror = mirrored
    await driver.answer(single_mirror_ids=[mirror] * 1000, single_sequences=range(1, 1001))
    told = [await driver.violations.get() for _ in range(REJECTIONS_TOLD + 1)]
    assert [violation.event_sequence for violation in told[:-1]] == list(range(1, REJECTIONS_TOLD + 1))
    assert told[-1].rule == f"{1000 - REJECTIONS_TOLD} more answers of the same message were rejected"
    assert (await served.statistics()).daemon.rejected_answers == 1000


async def test_hello_is_a_violation_when_it_comes_again(mirrored: tuple[Any, Any, int, int]) -> None:
    """Hello stands in the first message only; a later one changes nothing."""
    _, driver, _, mirror = mirrored
    await driver.call.write(session_pb2.SessionRequest(hello=session_pb2.Hello(protocol_version=1, name="other")))
    assert (await driver.violations.get()).rule == "Hello comes once, in the first message"
    assert (await driver.fault(mirror, BASE, BASE + PAGE)).result.errno == 0


# ---- what belongs to others


async def test_stream_is_denied_when_it_is_another_owners(served: Any) -> None:
    """Another token's stream takes neither answers nor mirrors nor pins."""
    driver = await served.driver(token="alice")
    pid = await served.new_process()
    device = await served.device.RegisterDevice(device_pb2.RegisterDeviceRequest(name="gpu"), metadata=MALLORY)
    epoch = driver.welcome.epoch
    answers = event_pb2.Acknowledgements(epoch=epoch)
    mirror = {"device_id": device.device_id, "process_id": pid, "epoch": epoch}
    pin = hmm_pb2.PinPagesRequest(process_id=pid, epoch=epoch)
    for call in (
        served.device.Acknowledge(device_pb2.AcknowledgeRequest(acknowledgements=answers), metadata=MALLORY),
        served.device.RegisterMirror(device_pb2.RegisterMirrorRequest(**mirror), metadata=MALLORY),
        served.hmm.Attach(hmm_pb2.AttachRequest(**mirror), metadata=MALLORY),
        served.hmm.PinPages(pin, metadata=MALLORY),
    ):
        assert (await refused(call)).code() is grpc.StatusCode.PERMISSION_DENIED
    assert not served.daemon.machine.receivers


async def test_inspection_is_denied_when_it_names_what_is_another_owners(served: Any) -> None:
    """What is not yours is left out of lists; naming it is refused."""
    alice = (("hmm-token", "alice"),)
    pid = await served.new_process(metadata=alice)
    driver = await served.driver(token="alice")
    mirror = await driver.mirror(pid)
    (device,) = served.daemon.machine.devices
    inspection, look = served.inspection, inspection_pb2
    for call in (
        inspection.GetMaps(look.GetMapsRequest(process_id=pid), metadata=MALLORY),
        inspection.GetPageTable(look.GetPageTableRequest(mirror_id=mirror), metadata=MALLORY).read(),
        inspection.Watch(look.WatchRequest(mirror_ids=[mirror]), metadata=MALLORY).read(),
        inspection.Watch(look.WatchRequest(process_ids=[pid]), metadata=MALLORY).read(),
        inspection.GetViolations(look.GetViolationsRequest(mirror_id=mirror), metadata=MALLORY),
        inspection.GetViolations(look.GetViolationsRequest(device_id=device), metadata=MALLORY),
        inspection.WalkAddress(look.WalkAddressRequest(process_id=pid, address=BASE), metadata=MALLORY),
    ):
        assert (await refused(call)).code() is grpc.StatusCode.PERMISSION_DENIED
    devices = await inspection.ListDevices(look.ListDevicesRequest(), metadata=MALLORY)
    assert not devices.devices


async def test_hold_is_denied_when_it_names_another_owners_process(serve: Any) -> None:
    """Nobody stops the calls of a process that is not theirs by naming it."""
    served = await serve(harness=True)
    pid = await served.new_process(metadata=(("hmm-token", "alice"),))
    hold = served.channel.unary_stream(
        "/hmm.v1.HarnessService/Hold", request_serializer=harness_pb2.HoldRequest.SerializeToString
    )
    call = hold(harness_pb2.HoldRequest(process_id=pid, point=harness_pb2.HOLD_POINT_BEFORE_END), metadata=MALLORY)
    assert (await refused(call.read())).code() is grpc.StatusCode.PERMISSION_DENIED


# ---- clients that do not read


async def test_session_is_not_read_when_its_client_reads_nothing(serve: Any) -> None:
    """Small replies pile up as far as twice the queue; then the client has to read before it is heard again."""
    served = await serve(queue_bytes=4096)
    small_window = (("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1))
    channel = grpc.aio.insecure_channel(served.target, options=small_window)
    call: Any = session_pb2_grpc.SessionServiceStub(channel).Session()
    await call.write(session_pb2.SessionRequest(hello=session_pb2.Hello(protocol_version=1, name="deaf")))
    await served.until(lambda: bool(served.daemon.streams.open))
    asking = [
        session_pb2.SessionCall(request_id=number, dirty_range=device_pb2.DirtyRangeRequest(mirror_id=99))
        for number in range(256)
    ]
    batch = session_pb2.SessionRequest(calls=asking)
    queued_bytes = 0
    while queued_bytes < 4096:
        await asyncio.wait_for(call.write(batch), 60)
        (shown,) = (await served.pending()).streams
        queued_bytes = shown.queued_bytes
    assert queued_bytes < 2 * 4096 + 256
    call.cancel()
    await channel.close()
    await served.until(lambda: not served.daemon.streams.open)


# ---- races


@pytest.mark.slow
async def test_page_table_is_told_to_its_end_when_it_goes_meanwhile(serve: Any) -> None:
    """A reader that is slower than the process tells of what was there when it asked."""
    served = await serve(frames=1 << 15)
    pid = await served.new_process()
    huge = 1 << 21
    for number in range(4200):
        start = BASE + number * huge
        if not number % 600:
            await served.mmap(pid, start, start + 600 * huge)
    calls = [
        process_pb2.Call(touch=process_pb2.TouchRequest(process_id=pid, address=BASE + number * huge, length=PAGE))
        for number in range(4200)
    ]
    for first in (0, 4096):
        await served.process.Execute(process_pb2.ExecuteRequest(calls=calls[first : first + 4096]))
    call = served.inspection.GetPageTable(inspection_pb2.GetPageTableRequest(process_id=pid))
    first = await call.read()
    await served.process.Exit(process_pb2.ExitRequest(process_id=pid))
    parts = [first]
    while (part := await call.read()) is not grpc.aio.EOF:
        parts.append(part)
    assert sum(len(part.directories) for part in parts) > 4200


async def test_reading_a_table_is_answered_when_the_daemon_ends(serve: Any) -> None:
    """A table that is being read when the daemon ends is not left without a last reply."""
    served = await serve(part_bytes=4096, queue_bytes=4096)
    pid = await served.new_process()
    await served.mmap(pid, BASE, BASE + 4096 * PAGE)
    driver = await served.driver()
    mirror = await driver.mirror(pid)
    await driver.fault(mirror, BASE, BASE + 4096 * PAGE, omit_entries=True)
    reading = device_pb2.ReadTableRequest(
        mirror_id=mirror, range=range_pb2.AddressRange(start=BASE, end=BASE + 4096 * PAGE)
    )
    reply = await driver.send("read_table", reading)
    served.daemon.executor.draining = True
    assert (await reply).not_made.reason == "DRAINING"


async def test_file_of_a_name_that_is_too_long_is_refused(served: Any) -> None:
    """The limit is on bytes, not characters."""
    error = await refused(served.file.OpenFile(file_pb2.OpenFileRequest(name="é" * 2049, create=True)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
