"""A daemon in the test's own process, on a UNIX socket, and a driver that does exactly what the test tells it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import pytest

from hmm.errors import HmmError
from hmm_proto.status import from_status
from hmm_proto.v1 import (
    device_pb2,
    device_pb2_grpc,
    event_pb2,
    file_pb2_grpc,
    hmm_pb2_grpc,
    inspection_pb2,
    inspection_pb2_grpc,
    process_pb2,
    process_pb2_grpc,
    range_pb2,
    session_pb2,
    session_pb2_grpc,
    userfaultfd_pb2_grpc,
)
from hmm_server.config import Config
from hmm_server.daemon import Daemon

PAGE = 4096
PROT_READ, PROT_WRITE = 1, 2
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS = 1, 2, 0x10, 0x20
BASE = 0x10000000000
PATIENCE: dict[str, Any] = {
    "acknowledgement_s": 600.0,
    "fault_s": 600.0,
    "holding_lease_s": 600.0,
    "ping_timeout_ms": 600_000,
}
"""What drivers, faults and connections may take where it is not the subject: a busy machine is no failure."""


class Driver:
    """One session.  A task reads; the test takes events and replies as it likes and answers when it likes."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.welcome = event_pb2.Welcome()
        self.events: asyncio.Queue[event_pb2.Event] = asyncio.Queue()
        self.violations: asyncio.Queue[event_pb2.ProtocolViolation] = asyncio.Queue()
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.parts: dict[int, list[session_pb2.SessionReply]] = {}
        self._replies: dict[int, asyncio.Future[session_pb2.SessionReply]] = {}
        self._last_request = 0
        self._reader: asyncio.Task[None] | None = None

    async def hello(self, **fields: Any) -> Driver:
        """Say hello and hear the welcome."""
        hello = session_pb2.Hello(**{"protocol_version": 1, "pid": 42, "name": "probe"} | fields)
        await self.call.write(session_pb2.SessionRequest(hello=hello))
        first = await self.call.read()
        assert first is not grpc.aio.EOF, await self.call.details()
        self.welcome = first.welcome
        self._reader = asyncio.create_task(self._read())
        return self

    async def _read(self) -> None:
        try:
            while (message := await self.call.read()) is not grpc.aio.EOF:
                self._dispatch(message)
        except grpc.aio.AioRpcError:
            pass
        finally:
            if not self.ended.done():
                self.ended.set_result("cut off")

    def _dispatch(self, message: session_pb2.SessionResponse) -> None:
        for event in message.events:
            self.events.put_nowait(event)
        for violation in message.violations:
            self.violations.put_nowait(violation)
        for reply in message.replies:
            self.parts.setdefault(reply.request_id, []).append(reply)
            if not reply.more:
                expected = self._replies[reply.request_id]
                assert not expected.done() or expected.cancelled(), f"answered twice: {reply}"
                if not expected.cancelled():  # somebody still waits for it
                    expected.set_result(reply)
        if message.HasField("bye") and not self.ended.done():
            self.ended.set_result(message.bye.reason)

    def prepare(
        self, name: str, request: Any, in_callback: tuple[int, int] | None = None
    ) -> tuple[session_pb2.SessionCall, asyncio.Future[session_pb2.SessionReply]]:
        """A call ready to be sent, and where its last reply will be."""
        self._last_request += 1
        reply = self._replies[self._last_request] = asyncio.get_running_loop().create_future()
        call = session_pb2.SessionCall(request_id=self._last_request, **{name: request})
        if in_callback:
            call.in_callback_mirror_id, call.in_callback_sequence = in_callback
        return call, reply

    async def send(
        self, name: str, request: Any, in_callback: tuple[int, int] | None = None
    ) -> asyncio.Future[session_pb2.SessionReply]:
        """Make a call.  Returns: where its last reply will be."""
        call, reply = self.prepare(name, request, in_callback)
        await self.call.write(session_pb2.SessionRequest(calls=[call]))
        return reply

    async def make(self, name: str, request: Any, in_callback: tuple[int, int] | None = None) -> Any:
        """Make a call and wait for its reply: the response, or the CallResult that says why it was not made."""
        reply = await (await self.send(name, request, in_callback))
        return getattr(reply, reply.WhichOneof("reply") or "")

    async def acknowledge(self, event: event_pb2.Event) -> None:
        """Answer one event for all of its mirrors."""
        await self.answer(mirror_ids=event.mirror_ids, acknowledged_up_to=event.event_sequences)

    async def answer(self, **fields: Any) -> None:
        """Send answers as they are given."""
        answers = event_pb2.Acknowledgements(**fields)
        await self.call.write(session_pb2.SessionRequest(acknowledgements=answers))

    async def bye(self) -> None:
        """Leave in good order, and wait until the daemon has seen it."""
        await self.call.write(session_pb2.SessionRequest(bye=session_pb2.Bye()))
        await self.ended

    async def mirror(self, process_id: int, device: str = "gpu0", **fields: Any) -> int:
        """Register a device of that name and mirror a process on it."""
        registered = await self.make("register_device", device_pb2.RegisterDeviceRequest(name=device))
        request = device_pb2.RegisterMirrorRequest(
            **{"device_id": registered.device_id, "process_id": process_id, "no_fault_events": True} | fields
        )
        return (await self.make("register_mirror", request)).mirror_id

    async def fault(self, mirror_id: int, start: int, end: int, *, write: bool = True, **fields: Any) -> Any:
        """Fault a range in."""
        return await self.make("fault", fault_request(mirror_id, start, end, write=write, **fields))


def fault_request(
    mirror_id: int, start: int, end: int, *, write: bool = True, **fields: Any
) -> device_pb2.FaultRequest:
    """A fault of one range."""
    ranges = range_pb2.AddressRanges(starts=[start], ends=[end])
    return device_pb2.FaultRequest(mirror_id=mirror_id, ranges=ranges, write=write, **fields)


@dataclass
class Served:
    """A daemon that serves, and stubs for it."""

    daemon: Daemon
    channel: grpc.aio.Channel
    target: str
    process: Any = field(init=False)
    file: Any = field(init=False)
    device: Any = field(init=False)
    hmm: Any = field(init=False)
    session: Any = field(init=False)
    userfaultfd: Any = field(init=False)
    inspection: Any = field(init=False)

    def __post_init__(self) -> None:
        self.process = process_pb2_grpc.ProcessServiceStub(self.channel)
        self.file = file_pb2_grpc.FileServiceStub(self.channel)
        self.device = device_pb2_grpc.DeviceServiceStub(self.channel)
        self.hmm = hmm_pb2_grpc.HmmServiceStub(self.channel)
        self.session = session_pb2_grpc.SessionServiceStub(self.channel)
        self.userfaultfd = userfaultfd_pb2_grpc.UserfaultfdServiceStub(self.channel)
        self.inspection = inspection_pb2_grpc.InspectionServiceStub(self.channel)

    async def driver(self, *, token: str = "", **hello: Any) -> Driver:
        """A driver that has said hello."""
        metadata = (("hmm-token", token),) if token else ()
        return await Driver(self.session.Session(metadata=metadata)).hello(**hello)

    async def new_process(self, name: str = "victim", **fields: Any) -> int:
        """A process with an empty address space."""
        return (await self.process.CreateProcess(process_pb2.CreateProcessRequest(name=name), **fields)).process_id

    async def mmap(self, process_id: int, start: int, end: int, prot: int = PROT_READ | PROT_WRITE) -> None:
        """Private anonymous memory at a fixed place."""
        request = process_pb2.MmapRequest(
            process_id=process_id, address=start, length=end - start, prot=prot,
            flags=MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED,
        )  # fmt: skip
        response = await self.process.Mmap(request)
        assert response.result.errno == 0, response

    async def mirrored(self, npages: int, *, filled: bool = False) -> tuple[Served, Driver, int, int]:
        """This, a driver, a process with so many pages at BASE, and the driver's mirror, which may have all of them."""
        pid, end = await self.new_process(), BASE + npages * PAGE
        await self.mmap(pid, BASE, end)
        driver = await self.driver()
        mirror = await driver.mirror(pid)
        if filled:
            assert (await driver.fault(mirror, BASE, end)).result.errno == 0
        return self, driver, pid, mirror

    def munmap(self, process_id: int, start: int, end: int, **call: Any) -> Any:
        """Unmap; the call, to be awaited."""
        request = process_pb2.MunmapRequest(process_id=process_id, address=start, length=end - start)
        return self.process.Munmap(request, **call)

    async def pending(self) -> inspection_pb2.GetPendingResponse:
        """Who waits."""
        return await self.inspection.GetPending(inspection_pb2.GetPendingRequest())

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for the daemon's state to be so."""
        while not condition():  # noqa: ASYNC110 - what changes is the daemon's state, which wakes nobody
            await asyncio.sleep(0)

    async def until_answered(self, *mirror_ids: int) -> None:
        """Wait for answers that are on their way: what is asked on another stream may overtake them."""
        receivers = self.daemon.machine.receivers
        await self.until(lambda: not any(receivers[mirror_id].unanswered for mirror_id in mirror_ids))

    async def let_deadlines_pass(self) -> None:
        """The time of drivers is up, as soon as a call waits for them; for daemons that give them for ever."""
        executor = self.daemon.executor
        await self.until(lambda: any(running.due_s for running in executor.running.values()))
        for running in list(executor.running.values()):
            if running.due_s:
                executor._deadline(running)

    async def statistics(self) -> inspection_pb2.GetStatisticsResponse:
        """All counters."""
        return await self.inspection.GetStatistics(inspection_pb2.GetStatisticsRequest())

    async def mirror_status(self, mirror_id: int) -> inspection_pb2.MirrorStatus:
        """One mirror."""
        devices = (await self.inspection.ListDevices(inspection_pb2.ListDevicesRequest())).devices
        return next(mirror for device in devices for mirror in device.mirrors if mirror.mirror_id == mirror_id)


Serve = Callable[..., Awaitable[Served]]


@pytest.fixture
async def serve(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Serve]:
    """Start a daemon with the settings given; it ends with the test."""
    async with AsyncExitStack() as stack:

        async def start(**settings: Any) -> Served:
            path = tmp_path_factory.mktemp("d") / "s"
            config = Config(**{"frames": 1 << 14, "drain_s": 0.2} | PATIENCE | settings)
            daemon = await stack.enter_async_context(Daemon(config).serving(path))
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"unix:{path}"))
            served = Served(daemon, channel, f"unix:{path}")
            stack.callback(daemon.machine.check)
            return served

        yield start


@pytest.fixture
async def served(serve: Serve) -> Served:
    """A daemon whose drivers and faults have all the time that they need."""
    return await serve()


@pytest.fixture
async def mirrored(served: Served) -> tuple[Served, Driver, int, int]:
    """A daemon, a driver, a process with 16 pages mapped, and the driver's mirror of it."""
    return await served.mirrored(16)


def error_of(caught: pytest.ExceptionInfo[grpc.aio.AioRpcError]) -> HmmError:
    """The error of the model that a status carries."""
    from grpc_status import rpc_status  # noqa: PLC0415

    status = rpc_status.from_call(caught.value)
    assert status is not None
    error = from_status(status)
    assert error is not None, status
    return error


@pytest.fixture
def decode() -> Callable[[pytest.ExceptionInfo[grpc.aio.AioRpcError]], HmmError]:
    """Decodes what a call raised."""
    return error_of
