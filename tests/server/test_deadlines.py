"""Deadlines, windows and giving up: whoever waits, waits no longer than the policy says (protocol rules 12 to 16)."""

from __future__ import annotations

import asyncio
import errno as errnos
import time
from typing import Any

import grpc
import pytest

from hmm_proto.v1 import device_pb2, inspection_pb2, process_pb2, range_pb2, types_pb2
from hmm_server.executor import GRACE_S

PAGE = 4096
BASE = 0x10000000000
END = BASE + 16 * PAGE
SHORT_S = 0.05
"""For drivers that do not answer at all."""


async def _mirrored(served: Any, policy: int, **fields: Any) -> tuple[Any, int, int]:
    pid = await served.new_process()
    await served.mmap(pid, BASE, END)
    driver = await served.driver()
    return driver, pid, await driver.mirror(pid, policy=policy, **fields)


# ---- the three policies


async def test_fence_completes_the_call_and_names_the_mirror(serve: Any) -> None:
    """FENCE: a driver that does not answer is lost, its table is dropped, and the call completes."""
    served = await serve(acknowledgement_s=SHORT_S)
    driver, pid, mirror = await _mirrored(served, types_pb2.DEADLINE_POLICY_FENCE)
    await driver.fault(mirror, BASE, END)
    result = (await served.munmap(pid, BASE, END)).result
    assert (result.errno, list(result.fenced_mirrors)) == (0, [mirror])
    status = await served.mirror_status(mirror)
    assert (status.state, status.entry_count) == ("lost", 0)
    assert "not answered within" in status.lost_because


async def test_driver_is_heard_when_the_daemon_itself_was_late(serve: Any) -> None:
    """A daemon that was stopped, or busy, reads the answers that came meanwhile before it says that none came."""
    served = await serve()
    pid = await served.new_process()
    await served.mmap(pid, BASE, END)
    driver = await served.driver()
    mirror = await driver.mirror(pid)
    await driver.fault(mirror, BASE, END)
    unmapping = served.munmap(pid, BASE, END)
    event = await driver.events.get()
    executor = served.daemon.executor
    (running,) = executor.running.values()
    running.due_s = time.monotonic() - 5.0  # when it should have been looked at
    executor._look_at_deadlines()
    assert 0 < running.due_s - time.monotonic() <= GRACE_S
    await driver.acknowledge(event)
    assert not (await unmapping).result.fenced_mirrors


async def test_fence_spares_the_mirrors_that_answered(serve: Any) -> None:
    """Only those that did not answer are lost."""
    served = await serve()
    driver, pid, hung = await _mirrored(served, types_pb2.DEADLINE_POLICY_FENCE)
    alive = await driver.mirror(pid, "gpu1")
    unmapping = asyncio.ensure_future(served.munmap(pid, BASE, END))
    await driver.events.get()
    await driver.answer(mirror_ids=[alive], acknowledged_up_to=[1])
    while len((await served.pending()).operations[0].events) > 1:
        pass
    await served.let_deadlines_pass()
    assert list((await unmapping).result.fenced_mirrors) == [hung]
    assert (await served.mirror_status(alive)).state == "live"


async def test_fail_ends_the_call_and_changes_nothing(serve: Any) -> None:
    """FAIL: ETIMEDOUT, mapping and mirror are as before, and a late answer is counted."""
    served = await serve(acknowledgement_s=SHORT_S)
    driver, pid, mirror = await _mirrored(served, types_pb2.DEADLINE_POLICY_FAIL)
    await driver.fault(mirror, BASE, END)
    result = (await served.munmap(pid, BASE, END)).result
    assert (result.errno, result.reason) == (errnos.ETIMEDOUT, "NOT_ACKNOWLEDGED")
    maps = await served.inspection.GetMaps(inspection_pb2.GetMapsRequest(process_id=pid))
    assert [(m.start, m.end, m.resident_pages) for m in maps.mappings] == [(BASE, END, 16)]
    assert (await served.mirror_status(mirror)).entry_count == 16
    await driver.acknowledge(await driver.events.get())
    await driver.make("dirty_range", device_pb2.DirtyRangeRequest(mirror_id=mirror, range=_range(BASE, END)))
    statistics = (await served.statistics()).mirrors[0]
    assert (statistics.abandoned, statistics.stale_answers, statistics.fenced) == (1, 1, 0)


async def test_fail_sends_nothing_new_until_the_late_answer(serve: Any) -> None:
    """After an abandoned event a mirror gets no other until it has answered; the next call waits and fails too."""
    served = await serve()
    driver, pid, mirror = await _mirrored(served, types_pb2.DEADLINE_POLICY_FAIL)
    first = asyncio.ensure_future(served.munmap(pid, BASE, END))
    await served.let_deadlines_pass()
    assert (await first).result.errno == errnos.ETIMEDOUT
    second = asyncio.ensure_future(served.munmap(pid, BASE, END))
    await served.until(lambda: len(served.daemon.machine.operations) == 1)
    waiting = (await served.pending()).operations[0]
    assert (waiting.waits_for.startswith("answers to abandoned events"), waiting.events[0].mirror_id) == (True, mirror)
    await served.let_deadlines_pass()
    assert (await second).result.errno == errnos.ETIMEDOUT
    first_event = await driver.events.get()
    assert driver.events.empty()
    third = asyncio.ensure_future(served.munmap(pid, BASE, END))
    await driver.acknowledge(first_event)
    await driver.acknowledge(await driver.events.get())
    assert (await third).result.errno == 0


async def test_unregistering_times_out_when_an_abandoned_event_is_never_answered(serve: Any) -> None:
    """It waits for callbacks that run, but under the policy FAIL not for ever; once the answer came it succeeds."""
    served = await serve()
    driver, pid, mirror = await _mirrored(served, types_pb2.DEADLINE_POLICY_FAIL)
    unmapping = asyncio.ensure_future(served.munmap(pid, BASE, END))
    await served.let_deadlines_pass()
    assert (await unmapping).result.errno == errnos.ETIMEDOUT
    leaving = device_pb2.UnregisterMirrorRequest(mirror_id=mirror)
    reply = await driver.send("unregister_mirror", leaving)
    await served.let_deadlines_pass()
    assert (await reply).unregister_mirror.result.errno == errnos.ETIMEDOUT
    await driver.acknowledge(await driver.events.get())
    reply = await driver.send("unregister_mirror", leaving)
    for _ in range(2):
        await driver.acknowledge(await driver.events.get())
    assert (await reply).unregister_mirror.result.errno == 0


async def test_unregistering_changes_nothing_when_its_own_event_is_not_answered(serve: Any) -> None:
    """FAIL: a driver that does not answer that it stops is still registered, has its pages, and hears of changes."""
    served = await serve()
    driver, pid, mirror = await _mirrored(served, types_pb2.DEADLINE_POLICY_FAIL)
    entries = served.daemon.machine.mirrors[mirror].table.count
    leaving = device_pb2.UnregisterMirrorRequest(mirror_id=mirror)
    reply = await driver.send("unregister_mirror", leaving)
    await served.let_deadlines_pass()
    result = (await reply).unregister_mirror.result
    assert (result.errno, result.message) == (
        errnos.ETIMEDOUT,
        f"mirror {mirror} did not answer in time that it stops; its policy is FAIL",
    )
    status = await served.mirror_status(mirror)
    assert (status.state, status.entry_count) == ("live", entries)
    await driver.acknowledge(await driver.events.get())
    unmapping = asyncio.ensure_future(served.munmap(pid, BASE, BASE + PAGE))
    await driver.acknowledge(await driver.events.get())
    assert (await unmapping).result.errno == 0
    reply = await driver.send("unregister_mirror", leaving)
    for _ in range(2):
        await driver.acknowledge(await driver.events.get())
    assert (await reply).unregister_mirror.result.errno == 0


async def test_exit_ends_when_an_abandoned_event_is_never_answered(serve: Any) -> None:
    """A death is told in the end even to a driver that owes an answer, and goes on without it."""
    served = await serve(acknowledgement_s=SHORT_S)
    _, pid, mirror = await _mirrored(served, types_pb2.DEADLINE_POLICY_FAIL)
    assert (await served.munmap(pid, BASE, END)).result.errno == errnos.ETIMEDOUT
    exited = await served.process.Exit(process_pb2.ExitRequest(process_id=pid))
    assert exited.result.errno == 0
    assert not served.daemon.machine.spaces
    assert (await served.mirror_status(mirror)).state == "released"


async def test_block_waits_and_pending_says_for_whom(serve: Any) -> None:
    """BLOCK: as the kernel does, for ever; `pending` names the driver, and the call ends when it answers."""
    served = await serve(acknowledgement_s=SHORT_S)
    driver, pid, mirror = await _mirrored(served, types_pb2.DEADLINE_POLICY_BLOCK)
    unmapping = asyncio.ensure_future(served.munmap(pid, BASE, END))
    event = await driver.events.get()
    assert event.deadline_ms == 0
    await served.until(lambda: all(not running.due_s for running in served.daemon.executor.running.values()))
    waiting = (await served.pending()).operations[0]
    (unanswered,) = waiting.events
    assert not unmapping.done()
    assert (unanswered.mirror_id, unanswered.driver_name, unanswered.driver_pid) == (mirror, "probe", 42)
    assert not unanswered.HasField("deadline_ms")
    assert unanswered.policy == types_pb2.DEADLINE_POLICY_BLOCK
    await driver.acknowledge(event)
    assert (await unmapping).result.errno == 0


async def test_slow_mirror_delays_no_other_address_space(serve: Any) -> None:
    """A driver that does not answer delays operations that overlap it, never another address space."""
    served = await serve()
    driver, pid, _ = await _mirrored(served, types_pb2.DEADLINE_POLICY_BLOCK)
    other = await served.new_process()
    await served.mmap(other, BASE, END)
    unmapping = asyncio.ensure_future(served.munmap(pid, BASE, END))
    event = await driver.events.get()
    assert (await served.munmap(other, BASE, END)).result.errno == 0
    assert not unmapping.done()
    await driver.acknowledge(event)
    await unmapping


# ---- the window of a stream


async def test_operations_wait_when_credit_is_used_up(serve: Any) -> None:
    """With a credit of one the second event waits in the daemon, visibly, until the first is answered."""
    served = await serve()
    driver = await served.driver(credit=1)
    pids = [await served.new_process() for _ in range(2)]
    for number, pid in enumerate(pids):
        await served.mmap(pid, BASE, END)
        await driver.mirror(pid, f"gpu{number}")
    calls = [asyncio.ensure_future(served.munmap(pid, BASE, END)) for pid in pids]
    first = await driver.events.get()
    await served.until(lambda: len(served.daemon.machine.operations) == 2)
    pending = await served.pending()
    states = [operation.events[0].state for operation in pending.operations]
    assert states == [types_pb2.EVENT_STATE_SENT, types_pb2.EVENT_STATE_QUEUED]
    (stream,) = pending.streams
    assert (stream.unanswered_events, stream.credit, stream.queued_events) == (1, 1, 1)
    assert driver.events.empty()
    await driver.acknowledge(first)
    await driver.acknowledge(await driver.events.get())
    assert [call.result.errno for call in await asyncio.gather(*calls)] == [0, 0]


async def test_waiting_for_credit_is_under_the_deadline(serve: Any) -> None:
    """An event that never left because its driver uses up its credit is fenced like one that was sent."""
    served = await serve(acknowledgement_s=SHORT_S)
    driver = await served.driver(credit=1)
    pids = [await served.new_process() for _ in range(2)]
    for number, pid in enumerate(pids):
        await served.mmap(pid, BASE, END)
        await driver.mirror(pid, f"gpu{number}")
    calls = await asyncio.gather(*(served.munmap(pid, BASE, END) for pid in pids))
    assert [len(call.result.fenced_mirrors) for call in calls] == [1, 1]
    (stream,) = (await served.pending()).streams
    assert (stream.unanswered_events, stream.queued_events) == (0, 0)


async def test_operations_wait_when_bytes_are_used_up(serve: Any) -> None:
    """Unanswered events are bounded in bytes too: large events leave one at a time."""
    served = await serve(queue_bytes=4096)
    driver = await served.driver()
    pids = [await served.new_process() for _ in range(2)]
    mirrors = []
    for number, pid in enumerate(pids):
        await served.mmap(pid, BASE, BASE + 400 * PAGE)
        mirrors.append(await driver.mirror(pid, f"gpu{number}", no_fault_events=False))
    faults = [await driver.send("fault", _fault(mirror, BASE, BASE + 400 * PAGE)) for mirror in mirrors]
    first = await driver.events.get()
    await served.until(lambda: len(served.daemon.machine.operations) == 2)
    assert (await served.pending()).streams[0].queued_events == 1
    assert driver.events.empty()
    await driver.acknowledge(first)
    await driver.acknowledge(await driver.events.get())
    assert [(await fault).fault.result.errno for fault in faults] == [0, 0]


async def test_large_replies_are_refused_when_nobody_reads(serve: Any) -> None:
    """A session whose replies pile up may ask for nothing large; answers and small calls go on."""
    served = await serve(queue_bytes=4096)
    driver, pid, mirror = await _mirrored(served, types_pb2.DEADLINE_POLICY_FENCE)
    await driver.fault(mirror, BASE, END)
    stream = next(iter(served.daemon.streams.open.values()))
    stream.mailbox.reply_bytes += 4096
    read = device_pb2.DeviceReadRequest(mirror_id=mirror, addresses=[BASE], lengths=[PAGE])
    assert (await driver.make("device_read", read)).reason == "LIMIT"
    await driver.make("dirty_range", device_pb2.DirtyRangeRequest(mirror_id=mirror, range=_range(BASE, END)))
    unmapping = asyncio.ensure_future(served.munmap(pid, BASE, END))
    await driver.acknowledge(await driver.events.get())
    assert (await unmapping).result.errno == 0
    stream.mailbox.reply_bytes -= 4096


async def test_calls_are_refused_when_too_many_are_under_way(serve: Any) -> None:
    """The calls of one session that are under way are limited; answers are still taken."""
    served = await serve(session_calls=1)
    driver, _, mirror = await _mirrored(served, types_pb2.DEADLINE_POLICY_FENCE, no_fault_events=False)
    fault = await driver.send("fault", _fault(mirror, BASE, END))
    event = await driver.events.get()
    assert (await driver.fault(mirror, BASE, END)).reason == "LIMIT"
    await driver.acknowledge(event)
    assert (await fault).fault.result.errno == 0


# ---- callers that give up


async def test_cancelled_call_runs_to_its_end(serve: Any) -> None:
    """A caller that gives up half-finishes nothing: the operation goes on and can be asked for."""
    served = await serve()
    driver, pid, _ = await _mirrored(served, types_pb2.DEADLINE_POLICY_FENCE)
    unmapping = served.munmap(pid, BASE, END)
    event = await driver.events.get()
    unmapping.cancel()
    await served.until(lambda: all(running.given_up for running in served.daemon.executor.running.values()))
    assert (await served.pending()).operations[0].abandoned_by_caller
    assert not (await _operation(served, event.operation_id)).done
    await driver.acknowledge(event)
    await served.until(lambda: not served.daemon.machine.operations)
    status = await _operation(served, event.operation_id)
    assert (status.done, status.name, status.result.errno) == (True, "munmap", 0)
    maps = await served.inspection.GetMaps(inspection_pb2.GetMapsRequest(process_id=pid))
    assert not maps.mappings


async def test_operation_is_not_found_when_forgotten_or_foreign(serve: Any, decode: Any) -> None:
    """The daemon remembers so many calls; those of another token it does not tell of."""
    served = await serve(operations_remembered=1)
    await served.new_process(metadata=(("hmm-token", "mine"),))
    with pytest.raises(grpc.aio.AioRpcError) as foreign:
        await _operation(served, 1)
    assert decode(foreign).reason == "NOT_OWNER"
    await served.new_process()
    with pytest.raises(grpc.aio.AioRpcError) as forgotten:
        await _operation(served, 1)
    assert decode(forgotten).reason == "OPERATION"
    assert (await _operation(served, 2)).name == "create_process"


@pytest.mark.parametrize("way", ["session", "unary"])
async def test_fault_times_out_and_goes_on(serve: Any, way: str) -> None:
    """A fault has a deadline of its own: its caller gets ETIMEDOUT, the fault ends when what it waits for has."""
    served = await serve()
    driver, pid, mirror = await _mirrored(served, types_pb2.DEADLINE_POLICY_FENCE)
    dropping = asyncio.ensure_future(
        served.process.Madvise(process_pb2.MadviseRequest(process_id=pid, address=BASE, length=PAGE, advice=4))
    )
    event = await driver.events.get()
    request = _fault(mirror, BASE, END, deadline_ms=20)
    if way == "session":
        result = await driver.make("fault", request)
        assert result.errno == errnos.ETIMEDOUT
    else:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.device.Fault(request)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await driver.acknowledge(event)
    await dropping
    await served.until(lambda: not served.daemon.machine.operations)
    assert (await served.mirror_status(mirror)).entry_count == 16


# ---- long calls


@pytest.mark.slow
async def test_long_call_lets_others_run(serve: Any) -> None:
    """One call over much memory is done in pieces: health checks and small calls pass between them."""
    served = await serve()
    pid, small = await served.new_process(), await served.new_process()
    npages = 1 << 23
    await served.mmap(pid, BASE, BASE + npages * PAGE)
    await served.mmap(small, BASE, END)
    touching = asyncio.ensure_future(
        served.process.Touch(process_pb2.TouchRequest(process_id=pid, address=BASE, length=npages * PAGE))
    )
    await served.until(lambda: bool(served.daemon.machine.operations))
    passed = 0
    while not touching.done():
        request = process_pb2.TouchRequest(process_id=small, address=BASE, length=PAGE)
        assert (await served.process.Touch(request)).pages_touched == 1
        passed += 1
    assert (await touching).pages_touched == npages
    assert passed >= 2


async def _operation(served: Any, operation_id: int) -> Any:
    request = inspection_pb2.GetOperationRequest(operation_id=operation_id)
    return (await served.inspection.GetOperation(request)).operation


def _range(start: int, end: int) -> range_pb2.AddressRange:
    return range_pb2.AddressRange(start=start, end=end)


def _fault(mirror: int, start: int, end: int, **fields: Any) -> device_pb2.FaultRequest:
    ranges = range_pb2.AddressRanges(starts=[start], ends=[end])
    return device_pb2.FaultRequest(mirror_id=mirror, ranges=ranges, write=True, **fields)
