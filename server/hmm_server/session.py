"""One session: reads a driver's batches, starts its calls, and writes whatever its mailbox holds.

The reader takes answers before calls and waits for nothing but the next message, and for a driver that asks without
reading; a pump is the only one that writes.  The session ends when either does: at Bye, at the end of the stream (a
death), or when the daemon ends.

**Source**: `ServicerContext.read` returns the end of the stream for a driver that was killed, as for one that closed
its half: only Bye tells them apart.

**Absent**: what calls do (device_side.py), what answers do (streams.py).
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc

from hmm.errors import ConflictError, HmmError, OutOfFramesError
from hmm.operation_record import Caller, OperationRecord
from hmm_proto import convert
from hmm_proto.pump import Pump, Write
from hmm_proto.v1 import device_pb2, event_pb2, session_pb2
from hmm_server.callers import NAME_LENGTH_MAX
from hmm_server.calls import BREATH_S, not_made
from hmm_server.config import Config
from hmm_server.device_side import DeviceSide, Result
from hmm_server.interceptors import require_read
from hmm_server.mailbox import Mailbox
from hmm_server.replies import ArrayReply, encoded
from hmm_server.served import Stream
from hmm_server.streams import PROTOCOL_VERSION, Streams

FAREWELL_S = 5.0
"""Time for the last replies to be written after Bye."""
REASON_LENGTH_MAX = 256
"""Characters of a farewell that are kept."""
LARGE_REPLIES = frozenset(
    {
        *("fault", "device_read", "read_table", "migrate", "read_copy"),
        *("range_fault", "migrate_to_device", "migrate_to_system", "read_frames", "dma_map", "dma_unmap"),
        *("migrate_vma_setup", "migrate_vma_allocate"),
    }
)

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(slots=True, eq=False)
class UnderWay:
    """A call whose reply has not been given.

    Attributes:
        record: None: it is made of several (read_table).
        replied: it has, or will not be given.
    """

    request_id: int
    name: str
    request: Any
    record: OperationRecord[Any] | None = None
    timer: asyncio.TimerHandle | None = None
    task: asyncio.Task[None] | None = None
    replied: bool = False


class Session:
    """The session of one driver process."""

    def __init__(self, side: DeviceSide, streams: Streams, config: Config, caller: Caller, context: Context) -> None:
        self._side = side
        self._executor = side.executor
        self._streams = streams
        self._config = config
        self._context = context
        self._caller = caller
        self._calls: dict[int, UnderWay] = {}
        self._loop = asyncio.get_running_loop()

    async def run(self) -> None:
        """Serve the session to its end.

        Raises:
            HmmError: it does not begin with a Hello that is understood, or there are too many streams.
        """
        first = await self._context.read()
        stream = self._open(first)
        mailbox = stream.mailbox
        pump = self._pump = Pump(partial(self._next_write, mailbox), (grpc.aio.InternalError, grpc.aio.UsageError))
        mailbox.wake, mailbox.begin = pump.wake, pump.begin
        pump.wake()
        reader = asyncio.create_task(self._read(stream, first))
        halves: list[asyncio.Future[Any]] = [reader, pump.ended]
        why = "its client was cut off"
        try:
            await asyncio.wait(halves, return_when=asyncio.FIRST_COMPLETED)
            if reader.done():
                why = _why_ended(reader)
                self._streams.disconnect(stream, why)
                await asyncio.wait([pump.ended], timeout=FAREWELL_S)
                reader.result()  # what made no sense is its caller's error
            elif mailbox.closed:
                why = "the daemon ended it"
            if pump.ended.done():
                pump.ended.result()  # a bug is not an end in good order
        finally:
            self._streams.disconnect(stream, why)
            reader.cancel()
            pump.finish()
            self._forget_calls()

    def _open(self, first: Any) -> Stream:
        require_read(first)
        if not isinstance(first, session_pb2.SessionRequest) or not first.HasField("hello"):
            raise convert.malformed("the first message is no Hello")
        hello = first.hello
        if hello.protocol_version != PROTOCOL_VERSION:
            raise convert.malformed(f"protocol version {hello.protocol_version} is not spoken here, only 1")
        name = hello.name[:NAME_LENGTH_MAX] or self._caller.name
        self._caller = Caller(self._caller.token, name)
        return self._streams.connect(self._caller.token, name, hello.pid, hello.credit)

    # ---- the two halves

    def _next_write(self, mailbox: Mailbox) -> Write | None:
        message = mailbox.next()
        if message is not None:
            return self._context.write(message)
        if mailbox.closed:
            self._pump.finish()
        return None

    async def _read(self, stream: Stream, first: session_pb2.SessionRequest) -> str:
        message: Any = first
        mailbox, pump = stream.mailbox, self._pump
        while message is not grpc.aio.EOF:
            require_read(message)
            stream.heard_s = breathed_s = time.monotonic()
            pump.held = True
            try:
                if message.HasField("hello") and message is not first:
                    mailbox.reject([event_pb2.ProtocolViolation(rule="Hello comes once, in the first message")])
                if message.HasField("acknowledgements"):
                    violations = self._streams.acknowledge(stream, message.acknowledgements)
                    if violations:
                        mailbox.reject(violations)
                calls = message.calls[:]  # a list is gone through in half the time
                for call in calls:
                    self._start(stream, call)
                    is_overfull = mailbox.reply_bytes >= mailbox.reply_bytes_max
                    if is_overfull or (len(calls) > 1 and time.monotonic() - breathed_s > BREATH_S):
                        await self._breathe(mailbox)
                        breathed_s = time.monotonic()
            finally:
                pump.release()  # the replies leave before the next message is asked for
            if message.HasField("bye"):
                return f"bye: {message.bye.reason[:REASON_LENGTH_MAX]}" if message.bye.reason else "bye"
            message = await self._context.read()
        return "its driver went away without Bye"

    # ---- calls

    async def _breathe(self, mailbox: Mailbox) -> None:
        self._pump.release()
        if mailbox.reply_bytes >= mailbox.reply_bytes_max:
            await mailbox.room()  # nothing more is asked for, not even what has small replies
        else:
            await asyncio.sleep(0)
        self._pump.held = True

    def _start(self, stream: Stream, call: session_pb2.SessionCall) -> None:
        name, request_id = call.WhichOneof("call") or "", call.request_id
        if not name or self._calls or stream.mailbox.reply_bytes:  # else there is no reason for one
            refusal = self._refusal(stream, request_id, name)
            if refusal is not None:
                self._reply(stream, request_id, name or "session", refusal)
                return
        request = getattr(call, name)
        caller = self._inside(call) if call.in_callback_mirror_id else self._caller
        if name == "read_table":
            under_way = self._calls[request_id] = UnderWay(request_id, name, request)
            under_way.task = asyncio.create_task(self._send_table(stream, under_way, caller))
            return
        try:
            record = self._side.begin(caller, name, request)
        except Exception as error:  # noqa: BLE001 - one call must not end the session; not_made() logs bugs
            self._reply(stream, request_id, name, error)
            return
        if self._executor.is_over(record):  # as most are, and need not be remembered or timed
            self._reply(stream, request_id, name, self._result(stream, name, request, record), record)
        else:
            self._wait_for(stream, UnderWay(request_id, name, request, record), record)
        if self._executor.running:
            self._executor.pump()

    def _wait_for(self, stream: Stream, under_way: UnderWay, record: OperationRecord[Any]) -> None:
        self._calls[under_way.request_id] = under_way
        running = self._executor.running[record.id]
        running.epoch, running.then = stream.epoch, partial(self._ended, stream, under_way)
        patience_s = self._side.patience_s(under_way.name, under_way.request)
        if patience_s is not None:
            under_way.timer = self._loop.call_later(patience_s, self._give_up, stream, under_way, record, patience_s)

    def _give_up(self, stream: Stream, under_way: UnderWay, record: OperationRecord[Any], patience_s: float) -> None:
        error = self._side.give_up(record, patience_s)
        if error is not None:
            self._settle(stream, under_way, error)

    def _refusal(self, stream: Stream, request_id: int, name: str) -> HmmError | None:
        if not name:
            return convert.malformed("a call of no known kind")
        if request_id in self._calls:
            return ConflictError(f"request {request_id} is under way already")
        if len(self._calls) >= self._config.session_calls:
            return OutOfFramesError(f"{self._config.session_calls} calls are under way already", reason="LIMIT")
        if stream.mailbox.is_full and name in LARGE_REPLIES:
            return OutOfFramesError("replies wait that were not read: nothing large can be asked for", reason="LIMIT")
        return None

    def _inside(self, call: session_pb2.SessionCall) -> Caller:
        callback = (call.in_callback_mirror_id, call.in_callback_sequence)
        return Caller(self._caller.token, self._caller.name, callback)

    def _ended(self, stream: Stream, under_way: UnderWay, record: OperationRecord[Any]) -> None:
        self._settle(stream, under_way, self._result(stream, under_way.name, under_way.request, record))

    def _result(self, stream: Stream, name: str, request: Any, record: OperationRecord[Any]) -> Result:
        try:
            return self._side.response(name, request, stream, record)
        except Exception as error:  # noqa: BLE001 - as in _start()
            return error

    def _settle(self, stream: Stream, under_way: UnderWay, result: Result) -> None:
        if under_way.replied:
            return  # it ended after its caller's patience
        under_way.replied = True
        del self._calls[under_way.request_id]
        if under_way.timer is not None:
            under_way.timer.cancel()
        self._reply(stream, under_way.request_id, under_way.name, result, under_way.record)

    def _reply(
        self, stream: Stream, request_id: int, name: str, result: Result, record: OperationRecord[Any] | None = None
    ) -> None:
        if isinstance(result, BaseException):
            stream.mailbox.reply(encoded(request_id, "not_made", not_made(name, result, record)))
        elif isinstance(result, ArrayReply):
            for response, arrays, more in result.parts(self._config.part_bytes):
                stream.mailbox.reply(encoded(request_id, name, response, arrays, more=more))
        else:
            stream.mailbox.reply(encoded(request_id, name, result))

    async def _send_table(self, stream: Stream, under_way: UnderWay, caller: Caller) -> None:
        try:
            async for start, entries in self._side.table_parts(caller, under_way.request):
                await stream.mailbox.room()
                part = device_pb2.ReadTableResponse(start=start)
                stream.mailbox.reply(encoded(under_way.request_id, "read_table", part, {"entries": entries}, more=True))
        except Exception as error:  # noqa: BLE001 - as in _start()
            self._settle(stream, under_way, error)
        else:
            self._settle(stream, under_way, device_pb2.ReadTableResponse())

    def _forget_calls(self) -> None:
        for under_way in list(self._calls.values()):
            under_way.replied = True
            if under_way.record is not None:
                self._executor.forsake(under_way.record)
            if under_way.timer is not None:
                under_way.timer.cancel()
            if under_way.task is not None:
                under_way.task.cancel()
        self._calls.clear()


def _why_ended(reader: asyncio.Task[str]) -> str:
    error = reader.exception()
    return reader.result() if error is None else f"it could not be read: {error}"
