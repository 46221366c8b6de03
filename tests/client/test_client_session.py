"""The session and the mirrors on it, against a daemon whose every message the test writes."""

from __future__ import annotations

import asyncio
import errno as errnos
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import pytest

import hmm_client
from hmm.errors import DeviceLostError, NoSuchObjectError, RangeBusyError
from hmm.events import EventType
from hmm.units import PAGE_SIZE, AddressRange
from hmm_client import DaemonError, Driver, Event, Mirror, UnavailableError
from hmm_client.driver import TableDriver
from hmm_client.receiver import REMEMBERED_EVENTS, STALE_RETRIES
from hmm_proto.v1 import device_pb2, event_pb2, range_pb2, session_pb2, types_pb2

if TYPE_CHECKING:
    from tests.client.conftest import ScriptedDaemon

Scripted: TypeAlias = "tuple[ScriptedDaemon, hmm_client.Client]"
START = 0x7000_0000_0000
SPAN = AddressRange(START, START + 4 * PAGE_SIZE)


class Recorder(Driver):
    """Writes down what it is told, and does what the test wants."""

    def __init__(self, act: Callable[[Event], object] = lambda _: None) -> None:
        self.events: list[Event] = []
        self.released: list[int] = []
        self.losses: list[str] = []
        self._act = act

    def update(self, event: Event):  # type: ignore[no-untyped-def]
        """Remember, then act."""
        self.events.append(event)
        return self._act(event)

    def release(self, mirror: Mirror) -> None:
        """Remember."""
        self.released.append(mirror.id)

    def lost(self, mirror: Mirror, why: str) -> None:
        """Remember."""
        self.losses.append(f"{mirror.id}: {why}")


def event(
    sequence: int,
    *mirror_ids: int,
    start: int = START,
    pages: int = 1,
    etype: types_pb2.EventType.ValueType = types_pb2.EVENT_TYPE_MIGRATE,
    **fields: object,
) -> event_pb2.Event:
    """An event with one range, and the same number for all mirrors."""
    return event_pb2.Event(
        mirror_ids=mirror_ids,
        event_sequences=[sequence] * len(mirror_ids),
        type=etype,
        ranges=range_pb2.AddressRanges(starts=[start], ends=[start + pages * PAGE_SIZE]),
        **fields,  # type: ignore[arg-type]
    )


def faulted(entries: list[int], last_event: int = 0, **fields: object) -> device_pb2.FaultResponse:
    """The response to a fault of SPAN."""
    return device_pb2.FaultResponse(
        result=types_pb2.CallResult(operation_id=77),
        range_ends=[SPAN.end],
        range_errnos=[0],
        entries=np.array(entries, "<u8").tobytes(),
        last_event_sequence=last_event,
        **fields,  # type: ignore[arg-type]
    )


async def make_mirror(scripted: Scripted, driver: Driver, mirror_id: int = 31, **options: bool) -> Mirror:
    """Register a device and a mirror."""
    daemon, client = scripted
    registering = asyncio.ensure_future(client.register_device("gpu"))
    hello = (await daemon.received()) if client._session is None else None
    if hello is not None:
        assert hello.hello.protocol_version == 1
    daemon.reply(await daemon.called("register_device"), register_device=device_pb2.RegisterDeviceResponse(device_id=4))
    device = await registering
    mirroring = asyncio.ensure_future(device.mirror(client.process(12), driver, **options))
    call = await daemon.called("register_mirror")
    assert (call.register_mirror.device_id, call.register_mirror.process_id) == (4, 12)
    response = device_pb2.RegisterMirrorResponse(mirror_id=mirror_id, space_id=2)
    daemon.reply(call, register_mirror=response)
    return await mirroring


async def test_open_says_hello_when_the_first_device_is_registered(scripted: Scripted) -> None:
    """A client without devices opens no session; the first one does, once for the whole process."""
    daemon, client = scripted
    mirror = await make_mirror(scripted, Recorder())
    assert mirror.id == 31
    session = await client.session()
    assert session.welcome.epoch == daemon.epoch


async def test_session_shows_life_when_it_has_nothing_to_say(scripted: Scripted) -> None:
    """What the process holds is its as long as it is heard of: an empty message now and then, and nothing else."""
    daemon, client = scripted
    daemon.lease_ms = 20
    opening = asyncio.ensure_future(client.session())
    assert (await daemon.received()).HasField("hello")
    await opening
    for _ in range(3):
        assert not (await daemon.received()).ByteSize()


async def test_update_is_acknowledged_when_it_returns(scripted: Scripted) -> None:
    """The answer to an event is sent after the driver's update has returned, and names it."""
    daemon, _ = scripted
    driver = Recorder()
    await make_mirror(scripted, driver)
    daemon.send(events=[event(1, 31, pages=4, operation="munmap", cause="munmap", caller="somebody")])
    message = await daemon.acknowledged()
    assert (list(message.mirror_ids), list(message.acknowledged_up_to)) == ([31], [1])
    (heard,) = driver.events
    assert (heard.type, heard.spans, heard.operation) == (EventType.MIGRATE, (SPAN,), "munmap")
    assert heard.pages.tolist() == list(range(SPAN.start, SPAN.end, PAGE_SIZE))


async def test_answers_travel_together_when_events_came_together(scripted: Scripted) -> None:
    """All answers to one message are one message, packed."""
    daemon, client = scripted
    drivers = [Recorder(), Recorder()]
    first = await make_mirror(scripted, drivers[0], 31)
    second = asyncio.ensure_future(first.device.mirror(client.process(13), drivers[1]))
    daemon.reply(
        await daemon.called("register_mirror"), register_mirror=device_pb2.RegisterMirrorResponse(mirror_id=32)
    )
    await second
    daemon.send(events=[event(1, 31, 32), event(2, 31)])
    message = await daemon.acknowledged()
    assert dict(zip(message.mirror_ids, message.acknowledged_up_to, strict=True)) == {31: 2, 32: 1}


async def test_update_is_refused_with_its_errno_when_it_raises_oserror(scripted: Scripted) -> None:
    """The errno of an OSError is the driver's answer."""
    daemon, _ = scripted

    def refuse(event: Event) -> None:
        raise OSError(errnos.ENOMEM, "no room")

    await make_mirror(scripted, Recorder(refuse))
    daemon.send(events=[event(1, 31)])
    (answer,) = (await daemon.acknowledged()).answers
    assert (answer.mirror_id, answer.event_sequence, answer.errno) == (31, 1, errnos.ENOMEM)


async def test_update_is_refused_with_eio_and_logged_when_the_driver_has_a_bug(
    scripted: Scripted, caplog: pytest.LogCaptureFixture
) -> None:
    """Any other exception is the driver's bug: the answer is EIO, the traceback is in the log, the session goes on."""
    daemon, _ = scripted
    driver = Recorder(lambda _: 1 // 0)
    await make_mirror(scripted, driver)
    with caplog.at_level(logging.ERROR):
        daemon.send(events=[event(1, 31)])
        (answer,) = (await daemon.acknowledged()).answers
    assert answer.errno == errnos.EIO
    assert "ZeroDivisionError" in caplog.text
    driver._act = lambda _: None
    daemon.send(events=[event(2, 31)])
    assert list((await daemon.acknowledged()).acknowledged_up_to) == [2]


async def test_answer_carries_dirty_pages_when_update_returns_them(scripted: Scripted) -> None:
    """What the device wrote travels with the answer, as ranges or as addresses."""
    daemon, _ = scripted
    driver = Recorder(lambda _: [SPAN])
    await make_mirror(scripted, driver)
    daemon.send(events=[event(1, 31)])
    (answer,) = (await daemon.acknowledged()).answers
    assert (list(answer.dirty.starts), list(answer.dirty.ends)) == ([SPAN.start], [SPAN.end])
    driver._act = lambda _: np.array([START], np.uint64)
    daemon.send(events=[event(2, 31)])
    (answer,) = (await daemon.acknowledged()).answers
    assert np.frombuffer(answer.dirty_pages, "<u8").tolist() == [START]


async def test_answer_is_explicit_when_the_event_wants_one(scripted: Scripted) -> None:
    """An event that asks for an answer of its own is never covered by a mark."""
    daemon, _ = scripted
    await make_mirror(scripted, Recorder())
    daemon.send(events=[event(1, 31, wants_answer=True)])
    (answer,) = (await daemon.acknowledged()).answers
    assert (answer.event_sequence, answer.errno) == (1, 0)


async def test_release_is_called_and_answered_when_the_space_ends(scripted: Scripted) -> None:
    """RELEASE is the driver's `release`, and is acknowledged like any event."""
    daemon, _ = scripted
    driver = Recorder()
    mirror = await make_mirror(scripted, driver)
    daemon.send(events=[event_pb2.Event(mirror_ids=[31], event_sequences=[1], type=types_pb2.EVENT_TYPE_RELEASE)])
    assert list((await daemon.acknowledged()).acknowledged_up_to) == [1]
    assert driver.released == [31]
    assert mirror.released


async def test_events_wait_for_the_mirror_when_they_come_before_its_name(scripted: Scripted) -> None:
    """Callbacks may come before registering returns, even before its reply: they are handled once it is there."""
    daemon, client = scripted
    driver = Recorder()
    first = await make_mirror(scripted, Recorder())
    mirroring = asyncio.ensure_future(first.device.mirror(client.process(13), driver))
    call = await daemon.called("register_mirror")
    daemon.send(events=[event(1, 32)])
    daemon.send(
        events=[event(2, 32)],
        replies=[
            session_pb2.SessionReply(
                request_id=call.request_id, register_mirror=device_pb2.RegisterMirrorResponse(mirror_id=32)
            )
        ],
    )
    await mirroring
    assert list((await daemon.acknowledged()).acknowledged_up_to) == [2]
    assert [heard.sequence for heard in driver.events] == [1, 2]


async def test_event_is_answered_when_nobody_here_knows_the_mirror(scripted: Scripted) -> None:
    """What no driver uses cannot be in use: nobody waits for a mirror that this process has forgotten."""
    daemon, _ = scripted
    await make_mirror(scripted, Recorder())
    daemon.send(events=[event(1, 99)])
    message = await daemon.acknowledged()
    assert (list(message.mirror_ids), list(message.acknowledged_up_to)) == ([99], [1])


async def test_updates_run_one_after_the_other_when_they_are_coroutines(scripted: Scripted) -> None:
    """Events of one mirror are handled in order; the second is not started before the first has ended."""
    daemon, _ = scripted
    gate = asyncio.Event()

    async def wait(event: Event) -> None:
        await gate.wait()

    driver = Recorder(wait)
    await make_mirror(scripted, driver)
    daemon.send(events=[event(1, 31), event(2, 31)])
    daemon.send(events=[event(1, 99)])  # answered at once: what came before it has been looked at
    await daemon.acknowledged()
    assert [heard.sequence for heard in driver.events] == [1]
    gate.set()
    assert list((await daemon.acknowledged()).acknowledged_up_to)[-1] >= 1
    assert [heard.sequence for heard in driver.events] == [1, 2]


async def test_updates_run_at_once_when_the_mirror_is_concurrent(scripted: Scripted) -> None:
    """A concurrent mirror answers event 2 while it handles event 1: single numbers, then the mark."""
    daemon, _ = scripted
    gate = asyncio.Event()

    async def wait(event: Event) -> None:
        if event.sequence == 1:
            await gate.wait()

    await make_mirror(scripted, Recorder(wait), concurrent=True)
    daemon.send(events=[event(1, 31), event(2, 31)])
    assert list((await daemon.acknowledged()).single_sequences) == [2]
    gate.set()
    assert list((await daemon.acknowledged()).acknowledged_up_to) == [2]


async def test_call_inside_an_update_names_it_and_lets_later_events_through(scripted: Scripted) -> None:
    """A fault inside a callback is marked with it, and the event that the fault ends in is handled meanwhile."""
    daemon, _ = scripted
    results = []

    async def refault(event: Event) -> None:
        if not event.is_fault:
            results.append(await event.mirror.fault(SPAN))

    driver = Recorder(refault)
    await make_mirror(scripted, driver)
    daemon.send(events=[event(1, 31, start=START + 64 * PAGE_SIZE)])
    call = await daemon.called("fault")
    assert (call.in_callback_mirror_id, call.in_callback_sequence) == (31, 1)
    daemon.send(events=[event(2, 31, pages=4, etype=types_pb2.EVENT_TYPE_DEVICE_RFAULT, entries=b"\x04" * 32)])
    assert list((await daemon.acknowledged()).single_sequences) == [2]
    daemon.reply(call, fault=faulted([4, 4, 4, 4], last_event=2))
    assert list((await daemon.acknowledged()).acknowledged_up_to) == [2]
    assert results[0].entries.tolist() == [4, 4, 4, 4]


async def test_call_is_not_marked_when_a_task_outlives_its_update(scripted: Scripted) -> None:
    """A task started in a callback may make calls after it: they are not calls from inside it."""
    daemon, _ = scripted
    tasks = []
    gate = asyncio.Event()

    async def later(mirror: Mirror) -> None:
        await gate.wait()
        await mirror.fault(SPAN)

    async def update(event: Event) -> None:
        tasks.append(asyncio.create_task(later(event.mirror)))

    await make_mirror(scripted, Recorder(update))
    daemon.send(events=[event(1, 31)])
    await daemon.acknowledged()
    gate.set()
    call = await daemon.called("fault")
    assert (call.in_callback_mirror_id, call.in_callback_sequence) == (0, 0)
    daemon.reply(call, fault=faulted([4] * 4, last_event=1))
    await tasks[0]


async def test_fault_returns_arrays_when_it_succeeds(scripted: Scripted) -> None:
    """Entries come as numpy arrays; a long reply in parts is put together."""
    daemon, _ = scripted
    mirror = await make_mirror(scripted, Recorder())
    pages = np.array([START, START + PAGE_SIZE * 2, START + PAGE_SIZE * 9, START + PAGE_SIZE * 10], np.uint64)
    faulting = asyncio.ensure_future(mirror.fault(pages, write=True))
    call = await daemon.called("fault")
    assert np.frombuffer(call.fault.pages, "<u8").tolist() == pages.tolist()
    assert call.fault.write
    part = device_pb2.FaultResponse(entries=np.array([0x5014, 0], "<u8").tobytes())
    last = faulted([0x7004, 0x8014], notifier_seq=8, retries=2)
    daemon.send(
        replies=[
            session_pb2.SessionReply(request_id=call.request_id, more=True, fault=part),
            session_pb2.SessionReply(request_id=call.request_id, fault=last),
        ]
    )
    result = await faulting
    assert result.entries.tolist() == [0x5014, 0, 0x7004, 0x8014]
    assert result.pfns.tolist() == [5, 0, 7, 8]
    assert result.writable.tolist() == [True, False, False, True]
    assert (result.notifier_seq, result.retries, result.operation_id) == (8, 2, 77)
    assert result.pages.tolist() == pages.tolist()


async def test_fault_is_repeated_when_its_result_was_overtaken(scripted: Scripted) -> None:
    """A result that a later event takes back is thrown away and asked for again, without the caller noticing."""
    daemon, _ = scripted
    mirror = await make_mirror(scripted, Recorder())
    faulting = asyncio.ensure_future(mirror.fault(SPAN))
    call = await daemon.called("fault")
    reply = session_pb2.SessionReply(request_id=call.request_id, fault=faulted([4] * 4, last_event=0))
    daemon.send(events=[event(1, 31, start=START + PAGE_SIZE)], replies=[reply])
    requests = [await daemon.received(), await daemon.received()]
    (again,) = [one for request in requests for one in request.calls]
    daemon.reply(again, fault=faulted([0x1004] * 4, last_event=1))
    result = await faulting
    assert result.entries.tolist() == [0x1004] * 4
    assert mirror.faults == 2


async def test_fault_is_not_repeated_when_the_later_event_is_elsewhere(scripted: Scripted) -> None:
    """Only an event that overlaps makes a result stale."""
    daemon, _ = scripted
    mirror = await make_mirror(scripted, Recorder())
    faulting = asyncio.ensure_future(mirror.fault(SPAN))
    call = await daemon.called("fault")
    reply = session_pb2.SessionReply(request_id=call.request_id, fault=faulted([4] * 4, last_event=0))
    daemon.send(events=[event(1, 31, start=SPAN.end)], replies=[reply])
    result = await faulting
    assert not mirror.is_stale(result)
    daemon.send(events=[event(2, 31, start=START, pages=1)])
    await daemon.acknowledged()
    await daemon.acknowledged()
    assert mirror.is_stale(result)


async def test_result_counts_as_stale_when_it_is_older_than_what_is_remembered(scripted: Scripted) -> None:
    """Only so many events are remembered; whoever keeps a result longer is told to fault again."""
    daemon, _ = scripted
    mirror = await make_mirror(scripted, Recorder())
    faulting = asyncio.ensure_future(mirror.fault(SPAN))
    daemon.reply(await daemon.called("fault"), fault=faulted([4] * 4, last_event=0))
    result = await faulting
    elsewhere = SPAN.end + PAGE_SIZE
    daemon.send(events=[event(number, 31, start=elsewhere) for number in range(1, REMEMBERED_EVENTS + 1)])
    await daemon.acknowledged()
    assert not mirror.is_stale(result)
    daemon.send(events=[event(REMEMBERED_EVENTS + 1, 31, start=elsewhere)])
    await daemon.acknowledged()
    assert mirror.is_stale(result)


async def test_fault_gives_up_when_every_result_is_overtaken(scripted: Scripted) -> None:
    """EBUSY after many attempts, so that nobody loops for ever."""
    daemon, _ = scripted
    mirror = await make_mirror(scripted, Recorder())
    faulting = asyncio.ensure_future(mirror.fault(SPAN))
    for turn in range(STALE_RETRIES):
        calls = []
        while not calls:
            calls = list((await daemon.received()).calls)
        reply = session_pb2.SessionReply(request_id=calls[0].request_id, fault=faulted([4] * 4, last_event=turn))
        daemon.send(events=[event(turn + 1, 31)], replies=[reply])
    with pytest.raises(RangeBusyError, match="EBUSY"):
        await faulting


async def test_fault_raises_or_reports_when_a_range_failed(scripted: Scripted) -> None:
    """The error of one range is raised; with `partial` it stays in the result, beside what came in."""
    daemon, _ = scripted
    mirror = await make_mirror(scripted, Recorder())
    failed = device_pb2.FaultResponse(
        result=types_pb2.CallResult(
            operation_id=1, errno=errnos.EBUSY, reason="RANGE_INVALIDATED", message="busy", address=START
        ),
        range_ends=[START + PAGE_SIZE],
        range_errnos=[errnos.EBUSY],
        entries=np.array([4, 0, 0, 0], "<u8").tobytes(),
    )
    for partial in (False, True):
        faulting = asyncio.ensure_future(mirror.fault([SPAN], wait=False, partial=partial))
        daemon.reply(await daemon.called("fault"), fault=failed)
        if partial:
            result = await faulting
            assert isinstance(result.error, RangeBusyError)
            assert result.filled.tolist() == [START + PAGE_SIZE]
            assert result.entries.tolist() == [4, 0, 0, 0]
        else:
            with pytest.raises(RangeBusyError) as caught:
                await faulting
            assert caught.value.address == START


async def test_call_raises_the_daemons_error_when_it_was_not_made(scripted: Scripted) -> None:
    """`not_made` becomes the error that the core raised."""
    daemon, _ = scripted
    mirror = await make_mirror(scripted, Recorder())
    unregistering = asyncio.ensure_future(mirror.unregister())
    not_made = types_pb2.CallResult(errno=errnos.ENODEV, reason="MIRROR", message="no mirror 31")
    daemon.reply(await daemon.called("unregister_mirror"), not_made=not_made)
    with pytest.raises(NoSuchObjectError, match="ENODEV: no mirror 31"):
        await unregistering


@pytest.mark.parametrize(("reason", "kind"), [("INTERNAL", DaemonError), ("DRAINING", UnavailableError)])
async def test_call_raises_daemon_error_when_the_daemon_is_at_fault(
    scripted: Scripted, reason: str, kind: type[Exception]
) -> None:
    """A bug of the daemon, or its end, is no error of the model."""
    daemon, _ = scripted
    mirror = await make_mirror(scripted, Recorder())
    asking = asyncio.ensure_future(mirror.dirty(SPAN))
    daemon.reply(await daemon.called("dirty_range"), not_made=types_pb2.CallResult(reason=reason, message="sorry"))
    with pytest.raises(kind, match="sorry"):
        await asking


async def test_session_is_given_up_when_what_comes_cannot_be_handled(
    scripted: Scripted, caplog: pytest.LogCaptureFixture
) -> None:
    """An event of a type that nobody knows cannot be answered: the mirrors are lost, at once and not by a deadline."""
    daemon, client = scripted
    driver = Recorder()
    mirror = await make_mirror(scripted, driver)
    driver.lost = lambda *_: 1 // 0  # type: ignore[assignment, method-assign]
    daemon.send(events=[event(1, 31, etype=99)])  # type: ignore[arg-type]
    assert "event type 99" in await (await client.session()).wait_lost()
    assert "event type 99" in mirror.lost
    assert "ZeroDivisionError" in caplog.text


async def test_mirror_is_lost_when_a_call_says_so(scripted: Scripted) -> None:
    """DEVICE_LOST is told to the driver once; afterwards the mirror refuses without asking the daemon."""
    daemon, _ = scripted
    driver = Recorder()
    mirror = await make_mirror(scripted, driver)
    faulting = asyncio.ensure_future(mirror.fault(SPAN))
    lost = types_pb2.CallResult(errno=errnos.ENODEV, reason="DEVICE_LOST", message="fenced: too slow")
    daemon.reply(await daemon.called("fault"), fault=device_pb2.FaultResponse(result=lost))
    with pytest.raises(DeviceLostError):
        await faulting
    with pytest.raises(DeviceLostError, match="too slow"):
        await mirror.read([(START, 1)])
    assert driver.losses == ["31: fenced: too slow"]


async def test_everything_is_lost_when_the_stream_ends(scripted: Scripted) -> None:
    """A broken stream fences all mirrors: drivers are told, calls under way and later ones raise."""
    daemon, _ = scripted
    driver = Recorder()
    mirror = await make_mirror(scripted, driver)
    faulting = asyncio.ensure_future(mirror.fault(SPAN))
    await daemon.called("fault")
    daemon.send(bye=session_pb2.Bye(reason="the daemon is ending"))
    daemon.end()
    with pytest.raises(DeviceLostError, match="the daemon is ending"):
        await faulting
    assert driver.losses == ["31: the daemon is ending"]
    with pytest.raises(DeviceLostError):
        await mirror.dirty(SPAN)


async def test_close_says_goodbye_when_mirrors_are_registered(scripted: Scripted) -> None:
    """Leaving is announced, so that it is no death; the mirrors that stay behind are lost."""
    daemon, client = scripted
    driver = Recorder()
    await make_mirror(scripted, driver)
    await client.close()
    assert (await daemon.received()).HasField("bye")
    assert driver.losses == ["31: closed"]


async def test_table_driver_follows_events_when_they_fault_and_invalidate(scripted: Scripted) -> None:
    """A device's own table gets a fault's entries, loses WRITE at a write-protect, and everything at a migrate."""
    daemon, _ = scripted
    driver = TableDriver()
    mirror = await make_mirror(scripted, driver)
    entries = np.array([0x1014, 0, 0x3014, 0x4004], "<u8")
    fault = event(1, 31, pages=4, etype=types_pb2.EVENT_TYPE_DEVICE_WFAULT, entries=entries.tobytes())
    daemon.send(events=[fault])
    await daemon.acknowledged()
    table = driver.table(mirror)
    assert table.pages.read(SPAN.start, SPAN.end).tolist() == entries.tolist()
    protect = types_pb2.EVENT_TYPE_WRITE_PROTECT
    daemon.send(events=[event(2, 31, pages=4, etype=protect, pte_mask=~0x10 & (1 << 64) - 1)])
    await daemon.acknowledged()
    assert table.pages.read(SPAN.start, SPAN.end).tolist() == [0x1004, 0, 0x3004, 0x4004]
    assert table.missing(START, 4 * PAGE_SIZE, write=False).tolist() == [START + PAGE_SIZE]
    assert table.missing(START, 1, write=True).tolist() == [START]
    daemon.send(events=[event(3, 31, pages=3)])
    await daemon.acknowledged()
    assert table.pages.read(SPAN.start, SPAN.end).tolist() == [0, 0, 0, 0x4004]
