"""The session: events and answers, calls and replies, and every way in which it ends (protocol rules 1 to 16)."""

from __future__ import annotations

import asyncio
import errno as errnos
from typing import Any

import grpc
import numpy as np
import pytest

from hmm import pte
from hmm_proto.v1 import device_pb2, event_pb2, hmm_pb2, inspection_pb2, process_pb2, range_pb2, session_pb2, types_pb2

PAGE = 4096
BASE = 0x10000000000
END = BASE + 16 * PAGE


# ---- events and answers


async def test_munmap_returns_after_the_acknowledgement(mirrored: Any) -> None:
    """The call that changes the address space ends only when the driver has answered; the event says everything."""
    served, driver, pid, mirror = mirrored
    await driver.fault(mirror, BASE, END)
    unmapping = asyncio.ensure_future(served.munmap(pid, BASE, END, metadata=(("hmm-caller", "me"),)))
    event = await driver.events.get()
    assert not unmapping.done()
    assert served.daemon.machine.mirrors[mirror].table.count == 16
    assert (list(event.mirror_ids), list(event.event_sequences)) == ([mirror], [1])
    assert (event.type, event.reason, event.pte_mask) == (types_pb2.EVENT_TYPE_MUNMAP, types_pb2.REASON_UNMAP, 0)
    assert (list(event.ranges.starts), list(event.ranges.ends)) == ([BASE], [END])
    assert (event.caller, event.operation, event.cause) == ("me", "munmap", "munmap")
    assert event.notifier_seq % 2 == 0  # no subscription of today's interface hears of it
    assert 0 < event.deadline_ms <= 600_000
    await driver.acknowledge(event)
    result = (await unmapping).result
    assert (result.errno, result.operation_id) == (0, event.operation_id)
    assert served.daemon.machine.mirrors[mirror].table.count == 0


async def test_event_names_all_mirrors_of_a_session_once(mirrored: Any) -> None:
    """One operation is one event for each driver process, whatever the number of its mirrors."""
    served, driver, pid, first = mirrored
    others = [await driver.mirror(pid, f"gpu{n}") for n in range(1, 5)]
    unmapping = asyncio.ensure_future(served.munmap(pid, BASE, END))
    event = await driver.events.get()
    assert list(event.mirror_ids) == [first, *others]
    assert list(event.event_sequences) == [1] * 5
    await driver.answer(mirror_ids=event.mirror_ids[:4], acknowledged_up_to=event.event_sequences[:4])
    await served.until_answered(*event.mirror_ids[:4])
    pending = (await served.pending()).operations
    assert [e.mirror_id for e in pending[0].events] == [others[-1]]
    await driver.answer(mirror_ids=event.mirror_ids[4:], acknowledged_up_to=event.event_sequences[4:])
    assert (await unmapping).result.errno == 0


async def test_answers_count_in_any_order(mirrored: Any) -> None:
    """A driver may answer event n + 1 while it still handles n: two calls on different processes do not wait."""
    served, driver, pid, first = mirrored
    other_pid = await served.new_process()
    await served.mmap(other_pid, BASE, END)
    second = await driver.mirror(other_pid, "gpu1")
    one = asyncio.ensure_future(served.munmap(pid, BASE, END))
    first_event = await driver.events.get()
    two = asyncio.ensure_future(served.munmap(other_pid, BASE, END))
    second_event = await driver.events.get()
    await driver.answer(single_mirror_ids=[second], single_sequences=second_event.event_sequences)
    await two
    assert not one.done()
    await driver.answer(single_mirror_ids=[first], single_sequences=first_event.event_sequences)
    assert (await one).result.errno == 0


async def test_error_answer_kills_that_mirror_and_no_other(mirrored: Any) -> None:
    """An errno of `update` on an invalidation kills the mirror; the call succeeds, the other mirror lives (2015)."""
    served, driver, pid, first = mirrored
    second = await driver.mirror(pid, "gpu1")
    unmapping = asyncio.ensure_future(served.munmap(pid, BASE, BASE + PAGE))
    event = await driver.events.get()
    sequence = event.event_sequences[0]
    await driver.answer(
        answers=[event_pb2.Answer(mirror_id=first, event_sequence=sequence, errno=errnos.EIO)],
        mirror_ids=event.mirror_ids,
        acknowledged_up_to=event.event_sequences,
    )
    for etype in (types_pb2.EVENT_TYPE_MUNMAP, types_pb2.EVENT_TYPE_RELEASE):
        ending = await driver.events.get()
        assert (ending.type, list(ending.mirror_ids)) == (etype, [first])
        await driver.acknowledge(ending)
    assert (await unmapping).result.errno == 0
    assert (await served.mirror_status(first)).state == "released"
    assert (await served.mirror_status(second)).state == "live"


async def test_dirty_ranges_of_an_answer_reach_the_pages(mirrored: Any) -> None:
    """What a driver reports dirty with its answer is propagated before the entry that says so is gone."""
    served, driver, pid, mirror = mirrored
    await driver.fault(mirror, BASE, END)
    unmapping = asyncio.ensure_future(
        served.process.Madvise(process_pb2.MadviseRequest(process_id=pid, address=BASE, length=2 * PAGE, advice=4))
    )
    event = await driver.events.get()
    pages = np.array([BASE], "<u8").tobytes()
    answer = event_pb2.Answer(
        mirror_id=mirror,
        event_sequence=event.event_sequences[0],
        dirty=range_pb2.AddressRanges(starts=[BASE + PAGE], ends=[BASE + 2 * PAGE]),
        dirty_pages=pages,
    )
    await driver.answer(answers=[answer])
    assert (await unmapping).result.errno == 0


# ---- answers that do not count


async def test_answer_of_the_future_is_rejected_and_counted(mirrored: Any) -> None:
    """An answer to an event that was never sent is reported, counted, and changes nothing."""
    served, driver, _, mirror = mirrored
    await driver.answer(mirror_ids=[mirror], acknowledged_up_to=[1])
    violation = await driver.violations.get()
    assert (violation.mirror_id, violation.event_sequence) == (mirror, 1)
    statistics = await served.statistics()
    assert statistics.mirrors[0].rejected_answers == 1
    assert statistics.daemon.rejected_answers == 1


async def test_answer_of_an_old_epoch_is_rejected(mirrored: Any) -> None:
    """An answer that names another stream is none of this one's."""
    served, driver, pid, mirror = mirrored
    unmapping = asyncio.ensure_future(served.munmap(pid, BASE, END))
    event = await driver.events.get()
    await driver.answer(
        epoch=driver.welcome.epoch - 1, mirror_ids=event.mirror_ids, acknowledged_up_to=event.event_sequences
    )
    assert "epoch" in (await driver.violations.get()).rule
    assert not unmapping.done()
    await driver.acknowledge(event)
    assert (await unmapping).result.fenced_mirrors == []
    assert (await served.mirror_status(mirror)).answered_up_to == 1


async def test_answer_for_a_foreign_mirror_is_rejected(mirrored: Any) -> None:
    """A session answers for its own mirrors only."""
    served, driver, pid, mirror = mirrored
    other = await served.driver(name="other")
    unmapping = asyncio.ensure_future(served.munmap(pid, BASE, END))
    event = await driver.events.get()
    await other.answer(mirror_ids=[mirror], acknowledged_up_to=[1])
    assert "not served" in (await other.violations.get()).rule
    assert not unmapping.done()
    await driver.acknowledge(event)
    await unmapping


async def test_answer_is_rejected_when_arrays_differ_in_length(mirrored: Any) -> None:
    """Half a pair is no answer."""
    _, driver, _, mirror = mirrored
    await driver.answer(mirror_ids=[mirror], acknowledged_up_to=[])
    assert "as many" in (await driver.violations.get()).rule


async def test_answer_is_rejected_when_its_dirty_ranges_are_malformed(mirrored: Any) -> None:
    """An answer that makes no sense does not count; the event waits for one that does."""
    served, driver, pid, mirror = mirrored
    unmapping = asyncio.ensure_future(served.munmap(pid, BASE, END))
    event = await driver.events.get()
    dirty = range_pb2.AddressRanges(starts=[BASE + 1], ends=[BASE + PAGE])
    await driver.answer(answers=[event_pb2.Answer(mirror_id=mirror, event_sequence=1, dirty=dirty)])
    assert "page-aligned" in (await driver.violations.get()).rule
    assert not unmapping.done()
    await driver.acknowledge(event)
    await unmapping


async def test_repeated_answer_does_no_harm(mirrored: Any) -> None:
    """An answer that comes again is counted and changes nothing."""
    served, driver, pid, mirror = mirrored
    unmapping = asyncio.ensure_future(served.munmap(pid, BASE, END))
    event = await driver.events.get()
    for _ in range(3):
        await driver.answer(single_mirror_ids=[mirror], single_sequences=event.event_sequences)
    await unmapping
    await driver.make("dirty_range", device_pb2.DirtyRangeRequest(mirror_id=mirror, range=_range(BASE, END)))
    statistics = await served.statistics()
    assert (statistics.mirrors[0].acknowledged, statistics.mirrors[0].stale_answers) == (1, 2)
    assert driver.violations.empty()


# ---- calls


async def test_fault_returns_entries_and_sequences(mirrored: Any) -> None:
    """A fault brings pages in and returns their entries, the notifier's sequence and the last event included."""
    _, driver, _, mirror = mirrored
    faulted = await driver.fault(mirror, BASE, BASE + 3 * PAGE)
    entries = np.frombuffer(faulted.entries, "<u8")
    assert faulted.result.errno == 0
    assert (list(faulted.range_ends), list(faulted.range_errnos)) == ([BASE + 3 * PAGE], [0])
    assert pte.pte_test_valid_pfn(entries).all()
    assert pte.pte_test_write(entries).all()
    assert (faulted.notifier_seq % 2, faulted.last_event_sequence) == (0, 0)


async def test_fault_of_scattered_pages_reports_each_hole(mirrored: Any) -> None:
    """Scattered pages come in one call; those in holes have entry 0 and their errno."""
    _, driver, _, mirror = mirrored
    pages = np.array([BASE, BASE + 5 * PAGE, END + PAGE], "<u8")
    faulted = await driver.make("fault", device_pb2.FaultRequest(mirror_id=mirror, pages=pages.tobytes(), write=True))
    entries = np.frombuffer(faulted.entries, "<u8")
    assert (entries != 0).tolist() == [True, True, False]
    assert list(faulted.range_errnos) == [0, errnos.EFAULT]
    assert faulted.result.errno == errnos.EFAULT


async def test_fault_comes_in_parts_when_it_is_long(serve: Any) -> None:
    """Entries travel in parts so that events can pass between them; the last part says how the fault ended."""
    served = await serve(part_bytes=4096)
    pid = await served.new_process()
    await served.mmap(pid, BASE, BASE + 1200 * PAGE)
    driver = await served.driver()
    mirror = await driver.mirror(pid)
    await driver.fault(mirror, BASE, BASE + 1200 * PAGE)
    parts = driver.parts[max(driver.parts)]
    assert [len(part.fault.entries) // 8 for part in parts] == [512, 512, 176]
    assert [part.more for part in parts] == [True, True, False]
    assert parts[-1].fault.range_ends == [BASE + 1200 * PAGE]


async def test_fault_leaves_entries_out_when_told_to(mirrored: Any) -> None:
    """`omit_entries` saves the bytes; everything else is reported."""
    _, driver, _, mirror = mirrored
    faulted = await driver.fault(mirror, BASE, END, omit_entries=True)
    assert (faulted.entries, list(faulted.range_ends)) == (b"", [END])


async def test_fault_ends_with_its_event_when_the_mirror_wants_it(mirrored: Any) -> None:
    """2015: a fault ends in `update`; its reply comes after the driver has answered that event."""
    served, driver, _, _ = mirrored
    pid = await served.new_process()
    await served.mmap(pid, BASE, END)
    mirror = await driver.mirror(pid, "gpu1", no_fault_events=False)
    reply = await driver.send("fault", _fault(mirror, BASE, END))
    event = await driver.events.get()
    assert event.type == types_pb2.EVENT_TYPE_DEVICE_WFAULT
    assert len(event.entries) == 16 * 8
    assert not reply.done()
    await driver.acknowledge(event)
    assert (await reply).fault.entries == event.entries


async def test_fault_is_refused_when_it_asks_for_too_many_pages(serve: Any) -> None:
    """One page more than the limit is RESOURCE_EXHAUSTED on a unary call, and `not_made` here."""
    served = await serve(fault_pages=16)
    pid = await served.new_process()
    await served.mmap(pid, BASE, END + PAGE)
    driver = await served.driver()
    mirror = await driver.mirror(pid)
    assert (await driver.fault(mirror, BASE, END)).result.errno == 0
    assert (await driver.fault(mirror, BASE, END + PAGE)).reason == "LIMIT"


async def test_device_accesses_go_through_the_mirrors_table(mirrored: Any) -> None:
    """A device reads what the CPU wrote and writes what the CPU reads, but only where its table has entries."""
    served, driver, pid, mirror = mirrored
    await served.process.WriteMemory(process_pb2.WriteMemoryRequest(process_id=pid, address=BASE, data=b"cpu"))
    await driver.fault(mirror, BASE, BASE + PAGE)
    read = await driver.make(
        "device_read", device_pb2.DeviceReadRequest(mirror_id=mirror, addresses=[BASE + 1, BASE], lengths=[2, 1])
    )
    await driver.make(
        "device_write",
        device_pb2.DeviceWriteRequest(mirror_id=mirror, addresses=[BASE], lengths=[3], data=b"gpu"),
    )
    seen = await served.process.ReadMemory(process_pb2.ReadMemoryRequest(process_id=pid, address=BASE, length=3))
    outside = await driver.make(
        "device_read", device_pb2.DeviceReadRequest(mirror_id=mirror, addresses=[BASE + PAGE], lengths=[1])
    )
    assert (read.data, seen.data) == (b"puc", b"gpu")
    assert (outside.result.errno, outside.result.address) == (errnos.EFAULT, BASE + PAGE)


async def test_read_table_returns_entries_in_parts(mirrored: Any) -> None:
    """A table's entries come in parts that start where directories exist; the last reply closes them."""
    _, driver, _, mirror = mirrored
    await driver.fault(mirror, BASE, BASE + 2 * PAGE)
    await driver.make(
        "set_driver_bits", device_pb2.SetDriverBitsRequest(mirror_id=mirror, range=_range(BASE, END), bits=5)
    )
    await driver.make("read_table", device_pb2.ReadTableRequest(mirror_id=mirror, range=_range(BASE, END)))
    parts = [part.read_table for part in driver.parts[max(driver.parts)]]
    entries = np.frombuffer(parts[0].entries, "<u8")
    assert parts[0].start == BASE
    assert (entries >> 8 & 15).tolist()[:2] == [5, 5]
    assert parts[-1].entries == b""


async def test_call_is_not_made_when_it_makes_no_sense(mirrored: Any) -> None:
    """A session survives calls that would be statuses alone: unknown kinds, malformed ranges, foreign objects."""
    served, driver, pid, mirror = mirrored
    unknown, reply = driver.prepare("fault", device_pb2.FaultRequest())
    unknown.ClearField("fault")
    await driver.call.write(session_pb2.SessionRequest(calls=[unknown]))
    assert (await reply).not_made.reason == "MALFORMED"
    missing = device_pb2.ReadTableRequest(mirror_id=77, range=_range(BASE, END))
    assert (await driver.make("read_table", missing)).errno == errnos.ENODEV
    assert (await driver.make("fault", device_pb2.FaultRequest(mirror_id=mirror))).reason == "MALFORMED"
    assert (await driver.make("unregister_device", device_pb2.UnregisterDeviceRequest(device_id=77))).errno == (
        errnos.ENODEV
    )
    assert (
        await driver.make("unregister_device", device_pb2.UnregisterDeviceRequest(device_id=1))
    ).errno == errnos.EBUSY
    duplicate = device_pb2.RegisterMirrorRequest(device_id=1, process_id=pid)
    assert (await driver.make("register_mirror", duplicate)).errno == errnos.EINVAL
    theirs = await served.driver(token="theirs")
    their_device = await theirs.make("register_device", device_pb2.RegisterDeviceRequest(name="theirs"))
    taking = device_pb2.UnregisterDeviceRequest(device_id=their_device.device_id)
    assert (await driver.make("unregister_device", taking)).reason == "NOT_OWNER"


async def test_call_that_was_started_and_not_made_names_its_operation(mirrored: Any) -> None:
    """It can be asked for, as any other; what was not even started has no number."""
    served, driver, _, _ = mirrored
    refused = await driver.make("discard_range", device_pb2.DiscardRangeRequest(mirror_id=99))
    request = inspection_pb2.GetOperationRequest(operation_id=refused.operation_id)
    operation = (await served.inspection.GetOperation(request)).operation
    assert (operation.name, operation.result.reason) == ("discard_range", refused.reason)
    assert (await driver.make("fault", device_pb2.FaultRequest(mirror_id=99))).operation_id == 0


async def test_call_is_not_made_when_its_number_is_under_way(mirrored: Any) -> None:
    """Request numbers are unique among the calls under way; the first call is not disturbed."""
    served, driver, _, _ = mirrored
    pid = await served.new_process()
    await served.mmap(pid, BASE, END)
    mirror = await driver.mirror(pid, "gpu1", no_fault_events=False)
    call, reply = driver.prepare("fault", _fault(mirror, BASE, END))
    await driver.call.write(session_pb2.SessionRequest(calls=[call, call]))
    assert (await reply).not_made.reason == "DUPLICATE"
    await driver.acknowledge(await driver.events.get())


async def test_others_run_when_one_message_has_many_calls(mirrored: Any) -> None:
    """A message may hold very many calls: the daemon does other things in between."""
    served, driver, _, mirror = mirrored
    page = range_pb2.AddressRange(start=BASE, end=BASE + PAGE)
    discard = device_pb2.DiscardRangeRequest(mirror_id=mirror, range=page)
    prepared = [driver.prepare("discard_range", discard) for _ in range(2000)]
    await driver.call.write(session_pb2.SessionRequest(calls=[call for call, _ in prepared]))
    ended, seen = served.daemon.executor.operations.ended_by_name, set()
    while not prepared[-1][1].done():
        seen.add(ended["discard_range"])
        await asyncio.sleep(0)
    assert seen - {0, len(prepared)}


async def test_replies_stay_few_when_one_message_has_many_calls(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more calls of a message are made than the driver reads replies of."""
    monkeypatch.setattr("hmm_server.session.BREATH_S", 60.0)
    served = await serve(queue_bytes=4096)
    driver = await served.driver()
    (stream,) = served.daemon.streams.open.values()
    discard = device_pb2.DiscardRangeRequest(mirror_id=99)
    prepared = [driver.prepare("discard_range", discard) for _ in range(500)]
    await driver.call.write(session_pb2.SessionRequest(calls=[call for call, _ in prepared]))
    most = 0
    while not prepared[-1][1].done():
        most = max(most, stream.mailbox.reply_bytes)
        await asyncio.sleep(0)
    assert 4096 < most < 3 * 4096


async def test_unregister_mirror_ends_with_release(mirrored: Any) -> None:
    """Unregistering takes everything back, calls `release`, and the mirror is gone; its device can go too."""
    served, driver, _, mirror = mirrored
    reply = await driver.send("unregister_mirror", device_pb2.UnregisterMirrorRequest(mirror_id=mirror))
    for etype in (types_pb2.EVENT_TYPE_MUNMAP, types_pb2.EVENT_TYPE_RELEASE):
        event = await driver.events.get()
        assert event.type == etype
        await driver.acknowledge(event)
    assert (await reply).unregister_mirror.result.errno == 0
    await driver.make("unregister_device", device_pb2.UnregisterDeviceRequest(device_id=1))
    assert not served.daemon.machine.mirrors
    assert not served.daemon.machine.devices
    assert not served.daemon.streams.served


# ---- calls from inside a callback


async def test_fault_inside_its_own_callback_would_deadlock(mirrored: Any) -> None:
    """A blocking fault on the range whose invalidation is being handled can never finish: EDEADLK at once."""
    served, driver, pid, mirror = mirrored
    dropping = asyncio.ensure_future(served.process.Madvise(_dontneed(pid, BASE, BASE + PAGE)))
    event = await driver.events.get()
    callback = (mirror, event.event_sequences[0])
    same = await driver.make("fault", _fault(mirror, BASE, BASE + PAGE), callback)
    elsewhere = await driver.make("fault", _fault(mirror, BASE + 4 * PAGE, END), callback)
    assert (same.errno, same.reason) == (errnos.EDEADLK, "INSIDE_CALLBACK")
    assert elsewhere.result.errno == 0
    assert not dropping.done()
    await driver.acknowledge(event)
    assert (await dropping).result.errno == 0


async def test_munmap_inside_a_callback_would_deadlock(mirrored: Any, decode: Any) -> None:
    """A call that changes VMAs of the space would wait for the one whose callback it is made from."""
    served, driver, pid, mirror = mirrored
    unmapping = asyncio.ensure_future(served.munmap(pid, BASE, BASE + PAGE))
    event = await driver.events.get()
    mark = (("hmm-in-callback", f"{mirror}:{event.event_sequences[0]}"),)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.munmap(pid, BASE + 8 * PAGE, END, metadata=mark)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert decode(caught).errno == errnos.EDEADLK
    await driver.acknowledge(event)
    await unmapping


async def test_unmarked_fault_waits_and_pending_shows_the_wait(mirrored: Any) -> None:
    """Without the mark a fault on the range waits for the invalidation, visibly, and goes on after it."""
    served, driver, pid, mirror = mirrored
    dropping = asyncio.ensure_future(served.process.Madvise(_dontneed(pid, BASE, BASE + PAGE)))
    event = await driver.events.get()
    fault = await driver.send("fault", _fault(mirror, BASE, END))
    busy = await driver.make("fault", _fault(mirror, BASE, END, no_wait=True))
    pending = (await served.pending()).operations
    assert busy.result.errno == errnos.EBUSY
    assert [operation.name for operation in pending] == ["madvise", "fault"]
    assert list(pending[1].blocked_by) == [pending[0].operation_id]
    await driver.acknowledge(event)
    await dropping
    assert (await fault).fault.result.errno == 0


async def test_pending_shows_no_cycle_when_calls_wait_in_line(mirrored: Any) -> None:
    """A second call on the same address space waits for the first, as under mmap_lock; that is no cycle."""
    served, driver, pid, _ = mirrored
    one = asyncio.ensure_future(served.munmap(pid, BASE, BASE + PAGE))
    event = await driver.events.get()
    two = asyncio.ensure_future(served.munmap(pid, BASE + 8 * PAGE, END))
    await served.until(lambda: len(served.daemon.machine.operations) == 2)
    pending = await served.pending()
    assert list(pending.cycles) == []
    assert list(pending.operations[1].blocked_by) == [pending.operations[0].operation_id]
    await driver.acknowledge(event)
    await driver.acknowledge(await driver.events.get())
    await asyncio.gather(one, two)


async def test_pending_shows_no_cycle_when_a_driver_hears_of_its_own_fault(mirrored: Any) -> None:
    """A fault ends in an event to whoever asked for it: it was made before that event, so not inside its callback."""
    served, driver, pid, _ = mirrored
    mirror = await driver.mirror(pid, "gpu1", no_fault_events=False)
    fault = await driver.send("fault", _fault(mirror, BASE, END))
    event = await driver.events.get()
    pending = await served.pending()
    assert [operation.name for operation in pending.operations] == ["fault"]
    assert list(pending.cycles) == []
    await driver.acknowledge(event)
    assert (await fault).fault.result.errno == 0


async def _handling_two(mirrored: Any) -> tuple[list[Any], list[Any], list[tuple[int, int]], int]:
    """Two calls on two processes, each waiting for an answer of the same driver, which handles both events."""
    served, driver, pid, _ = mirrored
    other_pid = await served.new_process()
    await served.mmap(other_pid, BASE, END)
    second = await driver.mirror(other_pid, "gpu1")
    calls, events = [], []
    for one in (pid, other_pid):
        calls.append(asyncio.ensure_future(served.process.Madvise(_dontneed(one, BASE, BASE + PAGE))))
        events.append(await driver.events.get())
    return calls, events, [(event.mirror_ids[0], event.event_sequences[0]) for event in events], second


async def test_call_that_would_close_a_circle_fails_at_once(mirrored: Any) -> None:
    """Two callbacks, each faulting where the other's event is handled: the second fault can never end."""
    _, driver, _, first = mirrored
    calls, events, callbacks, second = await _handling_two(mirrored)
    fault = await driver.send("fault", _fault(second, BASE, END), callbacks[0])
    assert (await driver.make("fault", _fault(first, BASE, END), callbacks[1])).errno == errnos.EDEADLK
    for event in events:
        await driver.acknowledge(event)
    assert [call.result.errno for call in await asyncio.gather(*calls)] == [0, 0]
    assert (await fault).fault.result.errno == 0


async def test_pending_shows_the_circle_when_calls_carry_no_mark(mirrored: Any) -> None:
    """Without marks the daemon cannot know, but it can suspect, and `pending` shows the circle until a deadline."""
    served, driver, _, first = mirrored
    calls, events, _, second = await _handling_two(mirrored)
    faults = [await driver.send("fault", _fault(mirror, BASE, END)) for mirror in (second, first)]
    await served.until(lambda: len(served.daemon.machine.operations) == 4)
    pending = await served.pending()
    ids = [operation.operation_id for operation in pending.operations]
    assert {operation_id for cycle in pending.cycles for operation_id in cycle.operation_ids} == set(ids)
    assert {mirror for cycle in pending.cycles for mirror in cycle.mirror_ids} == {first, second}
    assert all(cycle.suspected for cycle in pending.cycles)
    for event in events:
        await driver.acknowledge(event)
    assert [call.result.errno for call in await asyncio.gather(*calls)] == [0, 0]
    assert [(await fault).fault.result.errno for fault in faults] == [0, 0]


# ---- how it ends


async def test_cut_off_session_fences_its_mirrors_at_once(mirrored: Any) -> None:
    """A stream that ends without Bye is a death: operations that wait for it finish and say who was fenced."""
    served, driver, pid, mirror = mirrored
    await driver.fault(mirror, BASE, END)
    unmapping = asyncio.ensure_future(served.munmap(pid, BASE, END))
    await driver.events.get()
    driver.call.cancel()
    result = (await unmapping).result
    assert (result.errno, list(result.fenced_mirrors)) == (0, [mirror])
    status = await served.mirror_status(mirror)
    assert (status.state, status.entry_count, status.epoch) == ("lost", 0, 0)
    assert status.lost_because


async def test_cut_off_session_fences_all_its_mirrors_when_calls_wait_for_one(mirrored: Any) -> None:
    """A mirror that is being unregistered goes while the others are fenced; none is left out, and nothing waits."""
    served, driver, pid, first = mirrored
    await driver.fault(first, BASE, END)
    device = await driver.make("register_device", device_pb2.RegisterDeviceRequest(name="exclusive"))
    attach = hmm_pb2.AttachRequest(device_id=device.device_id, process_id=pid)
    second, third = [(await driver.make("attach", attach)).mirror_id for _ in range(2)]
    await driver.make("insert_notifier", hmm_pb2.InsertNotifierRequest(mirror_id=third, start=BASE, length=PAGE))
    page = range_pb2.AddressRange(start=END - PAGE, end=END)
    exclusive = await driver.send("make_exclusive", hmm_pb2.MakeExclusiveRequest(mirror_id=second, range=page))
    await driver.acknowledge(await driver.events.get())
    assert (await exclusive).make_exclusive.result.errno == 0
    unmapping = asyncio.ensure_future(served.munmap(pid, BASE, BASE + PAGE))
    await driver.events.get()
    await driver.send("unregister_mirror", device_pb2.UnregisterMirrorRequest(mirror_id=first))
    await served.until(lambda: len(served.daemon.executor.running) == 2)
    driver.call.cancel()
    await served.until(lambda: not served.daemon.streams.open)
    assert {mirror.state.value for mirror in served.daemon.machine.receivers.values()} == {"lost"}
    await unmapping


async def test_session_ends_as_a_bug_when_its_writer_has_one(mirrored: Any, caplog: pytest.LogCaptureFixture) -> None:
    """What cannot be written is no end in good order: the log has the traceback, the driver no more than INTERNAL."""
    served, driver, _, _ = mirrored
    (stream,) = served.daemon.streams.open.values()
    no_posting: Any = object()
    stream.mailbox.post(no_posting)
    stream.mailbox.begin()
    assert await driver.call.code() is grpc.StatusCode.INTERNAL
    assert "hit a bug" in caplog.text


async def test_half_closed_session_without_bye_is_a_death(mirrored: Any) -> None:
    """The end of the client's half looks like a death, because a killed driver looks the same."""
    served, driver, _, mirror = mirrored
    await driver.call.done_writing()
    await driver.ended
    assert (await served.mirror_status(mirror)).state == "lost"


async def test_bye_flushes_replies_and_fences_what_is_left(mirrored: Any) -> None:
    """Calls made before Bye get their replies; mirrors that are still registered are fenced."""
    served, driver, _, mirror = mirrored
    call, reply = driver.prepare("dirty_range", device_pb2.DirtyRangeRequest(mirror_id=mirror, range=_range(BASE, END)))
    await driver.call.write(session_pb2.SessionRequest(calls=[call], bye=session_pb2.Bye(reason="done")))
    await reply
    assert "bye" in await driver.ended
    assert await driver.call.code() is grpc.StatusCode.OK
    assert (await served.mirror_status(mirror)).state == "lost"


async def test_lost_mirrors_and_devices_go_when_the_lease_ends(serve: Any) -> None:
    """What a dead driver held stays known for its lease and is then removed: nothing leaks."""
    served = await serve(lease_s=0.0)
    pid = await served.new_process()
    driver = await served.driver()
    await driver.mirror(pid)
    await driver.bye()
    await served.until(lambda: not served.daemon.machine.mirrors and not served.daemon.machine.devices)
    assert not served.daemon.streams.served


async def test_lost_mirror_answers_device_lost(serve: Any) -> None:
    """Accesses and late answers of a fenced mirror get DEVICE_LOST."""
    served = await serve(acknowledgement_s=0.02)
    pid = await served.new_process()
    await served.mmap(pid, BASE, END)
    driver = await served.driver()
    mirror = await driver.mirror(pid)
    assert list((await served.munmap(pid, BASE, END)).result.fenced_mirrors) == [mirror]
    await driver.acknowledge(await driver.events.get())
    assert "DEVICE_LOST" in (await driver.violations.get()).rule
    assert (await driver.fault(mirror, BASE, END)).result.reason == "DEVICE_LOST"


# ---- how it begins


@pytest.mark.parametrize(
    "first",
    [
        session_pb2.SessionRequest(),
        session_pb2.SessionRequest(bye=session_pb2.Bye()),
        session_pb2.SessionRequest(hello=session_pb2.Hello(protocol_version=2)),
    ],
    ids=["empty", "bye", "version"],
)
async def test_session_is_refused_when_it_does_not_begin_with_hello(served: Any, first: Any) -> None:
    """A session begins with a Hello of a version that is spoken here."""
    call = served.session.Session()
    await call.write(first)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_session_is_refused_when_there_are_too_many(serve: Any) -> None:
    """The number of streams is limited; one that ends makes room."""
    served = await serve(streams=1)
    driver = await served.driver()
    call = served.session.Session()
    await call.write(session_pb2.SessionRequest(hello=session_pb2.Hello(protocol_version=1)))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await driver.bye()
    assert (await served.driver()).welcome.epoch > driver.welcome.epoch


async def test_welcome_grants_at_most_the_limits(serve: Any) -> None:
    """A driver gets the credit it asks for, up to the daemon's limit."""
    served = await serve(credit=8)
    assert (await served.driver(credit=3)).welcome.credit == 3
    assert (await served.driver(credit=9)).welcome.credit == 8
    assert (await served.driver()).welcome.credit == 8


def _range(start: int, end: int) -> range_pb2.AddressRange:
    return range_pb2.AddressRange(start=start, end=end)


def _dontneed(pid: int, start: int, end: int) -> process_pb2.MadviseRequest:
    return process_pb2.MadviseRequest(process_id=pid, address=start, length=end - start, advice=4)


def _fault(mirror: int, start: int, end: int, **fields: Any) -> device_pb2.FaultRequest:
    ranges = range_pb2.AddressRanges(starts=[start], ends=[end])
    return device_pb2.FaultRequest(mirror_id=mirror, ranges=ranges, write=True, **fields)
