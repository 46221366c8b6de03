r"""The session: one stream for a driver process, which carries all its mirrors.

A task reads, a pump writes.  The reader hands events to the mirrors' drivers and replies to whoever waits for them, in
the order in which they came.  The pump sends whatever is ready as one message: a message costs more than what is in
it.  Nothing else touches the stream.

    events    -> Mirror.deliver -> driver -> ledger of answers -\
    replies   -> whoever waits                                   > pump
    calls     ---------------------------------------------------/

**Source**: proto/hmm_proto/v1/session.proto, whose rules these are.

**Invariants**: calls are sent in the order in which they were made; an event is handed over before any reply that
came after it; once the session is lost every call raises, and every mirror has been told.

**Absent**: what drivers do; reconnecting, which makes a new session.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import grpc
import grpc.aio
import numpy as np
from google.protobuf.message import Message

from hmm.errors import DeviceLostError
from hmm.units import MirrorId
from hmm_client.acknowledgements import AcknowledgementLedger
from hmm_client.callbacks import Callback, current
from hmm_client.channel import RPC_ERRORS, Channel, DaemonError, as_error, not_made_error
from hmm_client.event import Change
from hmm_client.together import Together
from hmm_proto import wire
from hmm_proto.pump import Pump, Write
from hmm_proto.v1 import event_pb2, session_pb2

PROTOCOL_VERSION = 1
BATCH_BYTES = 1 << 20
"""A batch of calls is sent when it has grown to this size; a single call may be larger."""
BEATS_IN_LEASE = 4
"""How often in a lease of what it holds a session that has nothing to say shows that it lives: by an empty message."""
CLOSE_TIMEOUT_S = 5.0
FEW_MIRRORS = 8
"""So many are told one by one: it takes no longer."""
GROUPS_KEPT = 64
"""Sets of mirrors that are told together."""

_LOG = logging.getLogger(__name__)
_METHOD = f"/{session_pb2.DESCRIPTOR.services_by_name['SessionService'].full_name}/Session"
_CALLS = wire.tag(session_pb2.SessionRequest, "calls")
_REQUEST_ID = wire.number_tag(session_pb2.SessionCall, "request_id")


class Hearer(Protocol):
    """What a session needs of a mirror."""

    def deliver(self, sequence: int, change: Change) -> None:
        """An event came."""

    def rejected(self, sequence: int, rule: str) -> None:
        """The answer to an event did not count."""

    def session_lost(self, why: str) -> None:
        """No event will come any more."""

    async def cancel(self) -> None:
        """Nobody waits for what is under way."""

    @property
    def is_direct(self) -> bool:
        """True when it may be told together with others: its driver is done when it returns."""

    @property
    def is_idle(self) -> bool:
        """True when its driver has nothing to do for a change, and need not be called."""

    def hear(self, sequence: int, change: Change) -> bool:
        """Let the driver handle a change; True when it is done with nothing to say, which the caller has to tell."""

    def join(self, group: Together) -> None:
        """From now on it may also hear with others."""

    def leave(self, group: Together, heard: list[tuple[int, Change]], forgotten: int) -> None:
        """It hears with these others no more; what it heard with them, ascending, is its own."""


_Call: TypeAlias = tuple[asyncio.Future[list[Any]], Callable[[Any], None] | None, list[Any]]
"""A call under way: who waits, who hears of its reply first, the parts of its reply so far."""


class Session:
    """The stream between this process's drivers and the daemon.  Made by `open`.

    Attributes:
        welcome: what the daemon said first: the epoch, limits and deadlines.
        lost: why the session has ended; empty while it lives.
        ledger: answers that are to be sent.
        busy: the mirrors whose callbacks are running.
    """

    def __init__(self, call: Any, target: str) -> None:
        self.welcome = event_pb2.Welcome()
        self.lost = ""
        self.ledger = AcknowledgementLedger()
        self.busy: set[MirrorId] = set()
        self._call = call
        self._target = target
        self._hearers: dict[MirrorId, Hearer] = {}
        self._groups: dict[bytes, Together] = {}
        self._unclaimed: dict[MirrorId, list[tuple[int, Change]]] = {}
        self._waiting: dict[int, _Call] = {}
        self._outgoing: deque[bytes] = deque()
        self._handlers: dict[int, Callable[[Any], None]] = {
            session_pb2.SessionResponse.EVENTS_FIELD_NUMBER: self._deliver,
            session_pb2.SessionResponse.REPLIES_FIELD_NUMBER: self._reply,
            session_pb2.SessionResponse.VIOLATIONS_FIELD_NUMBER: self._note_violation,
        }
        self._loop = asyncio.get_running_loop()
        self._last_request = 0
        self._pump = Pump(self._next_write, (*RPC_ERRORS, grpc.aio.InternalError, asyncio.InvalidStateError))
        self._parting: Iterator[Write] | None = None
        self._silent = False  # nothing was written for some time
        self._wrote = True
        self._beat: asyncio.TimerHandle | None = None
        self._stopped: asyncio.Future[None] | None = None  # done when reading goes on
        self._told = 0  # who have got what they wait for, and have not gone on
        self._reader: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, channel: Channel, *, name: str = "", credit: int = 0) -> Session:
        """Open a session.

        Args:
            name: of the driver, for people.
            credit: how many unanswered events the driver can have; 0: the daemon's default.

        Raises:
            HmmError: the daemon refused it.
            DaemonError: it could not be reached.
        """
        method: Any = channel.grpc.stream_stream(_METHOD, response_deserializer=session_pb2.SessionResponse.FromString)
        hello = session_pb2.Hello(protocol_version=PROTOCOL_VERSION, pid=os.getpid(), name=name, credit=credit)
        try:
            call = method(metadata=channel.metadata)
            await call.write(session_pb2.SessionRequest(hello=hello).SerializeToString())
            first = await call.read()
        except RPC_ERRORS as error:
            raise as_error(error, channel.target) from None
        if not isinstance(first, session_pb2.SessionResponse):
            raise DaemonError(grpc.StatusCode.UNAVAILABLE, f"{channel.target}: the session ended before it began")
        session = cls(call, channel.target)
        session.welcome = first.welcome
        session._start(first)
        return session

    def _start(self, first: session_pb2.SessionResponse) -> None:
        self._dispatch(first)
        self._reader = asyncio.create_task(self._read())
        self._pump.wake()
        self._show_life()

    def _show_life(self) -> None:
        # What this process holds (pins, exclusive access) is its as long as the daemon hears of it.
        self._silent, self._wrote = not self._wrote, False
        if self._silent:
            self._pump.wake()
        if self.welcome.lease_ms:
            beat_s = self.welcome.lease_ms / 1000 / BEATS_IN_LEASE
            self._beat = self._loop.call_later(beat_s, self._show_life)

    # ---- calls

    def call(self, name: str, request: Message, on_reply: Callable[[Any], None] | None = None) -> Awaitable[list[Any]]:
        """Make one call of DeviceService on the session.

        Args:
            name: the field of SessionCall, e.g. "fault".
            on_reply: called by the reader with the last part of a successful reply, before it looks at anything that
                came later.

        Returns: the parts of the reply, most calls have one; to be awaited.

        Raises:
            HmmError: the call was not made.
            DeviceLostError: the session has ended.
        """
        callback = current()
        if callback is not None:
            return self._ask_inside(callback, name, request, on_reply)
        request_id = self._last_request + 1
        return self._ask(name, request, on_reply, request_id, _REQUEST_ID + wire.varint(request_id))

    async def _ask_inside(
        self, callback: Callback, name: str, request: Message, on_reply: Callable[[Any], None] | None
    ) -> list[Any]:
        event, request_id = callback.event, self._last_request + 1
        head = session_pb2.SessionCall(
            request_id=request_id, in_callback_mirror_id=event.mirror.id, in_callback_sequence=event.sequence
        )
        with callback.waiting():
            return await self._ask(name, request, on_reply, request_id, head.SerializeToString())

    def _ask(
        self, name: str, request: Message, on_reply: Callable[[Any], None] | None, request_id: int, head: bytes
    ) -> asyncio.Future[list[Any]]:
        if self.lost:
            self.require_live(name)
        self._last_request = request_id
        future: asyncio.Future[list[Any]] = self._loop.create_future()
        # A SessionRequest with one call in it, as it travels; many of them in a row are one with many calls.
        self._outgoing.append(wire.nested(_CALLS, head, wire.tag(session_pb2.SessionCall, name), request, {}))
        if self._told == 1 and not self._waiting:
            self._pump.begin()  # nobody else goes on now, who might have something to add
        else:
            self._pump.wake()
        self._waiting[request_id] = future, on_reply, []
        return future

    def require_live(self, operation: str) -> None:
        """Raise unless the session lives.

        Raises:
            DeviceLostError: it has ended; its mirrors are fenced (ENODEV).
        """
        if self.lost:
            raise DeviceLostError(f"{operation}: the session has ended: {self.lost}")

    # ---- mirrors

    def bind(self, mirror_id: MirrorId, hearer: Hearer) -> None:
        """From now on `hearer` gets the mirror's events, those first that came before it was known."""
        self.regroup()
        self._hearers[mirror_id] = hearer
        for sequence, change in self._unclaimed.pop(mirror_id, ()):
            hearer.deliver(sequence, change)

    def unbind(self, mirror_id: MirrorId) -> None:
        """The mirror is gone."""
        self.regroup()
        self._hearers.pop(mirror_id, None)
        self.ledger.forget(mirror_id)

    def regroup(self) -> None:
        """Who may be told together is no longer so."""
        for group in self._groups.values():
            group.drop()
        self._groups.clear()

    def answer(self, mirror_id: MirrorId, sequence: int, answer: event_pb2.Answer | None = None) -> None:
        """Tell the daemon, with the next batch, that an event is finished."""
        self.ledger.done(mirror_id, sequence, answer)
        self._pump.wake()

    # ---- what a driver must not do: for tests of whoever has to live with it

    def stop_reading(self) -> None:
        """Read nothing more of the stream, until `go_on_reading`."""
        self._stopped = self._stopped or self._loop.create_future()

    def go_on_reading(self) -> None:
        """Read again."""
        stopped, self._stopped = self._stopped, None
        if stopped is not None and not stopped.done():  # as it is when the reader was cancelled with its loop
            stopped.set_result(None)

    def drop(self) -> None:
        """Break the stream, without a farewell."""
        self.go_on_reading()
        self._call.cancel()

    # ---- the end

    async def wait_lost(self) -> str:
        """Wait until the session has ended.  Returns: why."""
        if self._reader is not None:
            await asyncio.wait([self._reader])
        return self.lost

    async def close(self, reason: str = "") -> None:
        """Say goodbye and wait for the daemon to end the stream; mirrors still registered are fenced."""
        self.go_on_reading()
        hearers = list(self._hearers.values())
        self._parting = self._farewell(reason)
        self._pump.wake()
        if self._reader is not None:
            await asyncio.wait([self._reader, self._pump.ended], timeout=CLOSE_TIMEOUT_S)
        self._end("closed")
        self._call.cancel()
        await asyncio.gather(*(hearer.cancel() for hearer in hearers))

    def _end(self, why: str) -> None:
        if self.lost:
            return
        self.lost = why
        if self._beat is not None:
            self._beat.cancel()
        self._pump.wake()
        for future, _, _ in self._waiting.values():
            if not future.done():
                future.set_exception(DeviceLostError(f"the session has ended: {why}"))
        self._waiting.clear()
        hearers = list(self._hearers.values())
        self._hearers.clear()
        for hearer in hearers:
            hearer.session_lost(why)

    # ---- the two halves

    async def _read(self) -> None:
        why = "the daemon is gone"
        try:
            while isinstance(message := await self._call.read(), session_pb2.SessionResponse):
                self._pump.held = True
                try:
                    self._dispatch(message)
                finally:
                    self._pump.release()  # answers leave before more is asked for
                if self._told:
                    await asyncio.sleep(0)  # and whoever has waited goes on
                    self._told = 0
                if self._stopped is not None:
                    await self._stopped
                if message.HasField("bye"):
                    why = message.bye.reason or "the daemon said goodbye"
        except grpc.aio.AioRpcError as error:
            why = str(as_error(error, self._target))
        except asyncio.CancelledError:
            if not self._call.cancelled():
                raise
            why = "cancelled"
        except Exception as error:  # noqa: BLE001 - a reader that is gone must not look like a driver that hangs
            _LOG.exception("what the daemon sent cannot be handled")
            why = repr(error)
            self._call.cancel()
        finally:
            self._end("closed" if self._parting is not None else why)

    def _next_write(self) -> Write | None:
        if self.lost:
            self._pump.finish()
            return None
        batch = self._next_batch()
        if batch or self._silent:
            self._silent, self._wrote = False, True
            if self._outgoing or self._parting is not None:
                self._pump.wake()
            write: Write = self._call.write(batch)
            return write
        if self._parting is not None:
            self._pump.wake()
            return next(self._parting, None)
        return None

    def _farewell(self, reason: str) -> Iterator[Write]:
        yield self._call.write(session_pb2.SessionRequest(bye=session_pb2.Bye(reason=reason)).SerializeToString())
        yield self._call.done_writing()
        self._pump.finish()

    def _next_batch(self) -> bytes:
        batch: list[bytes] = []
        if self.ledger:
            batch.append(session_pb2.SessionRequest(acknowledgements=self.ledger.take()).SerializeToString())
        size = 0
        while self._outgoing and size < BATCH_BYTES:
            call = self._outgoing.popleft()
            size += len(call)
            batch.append(call)
        return b"".join(batch)

    def _dispatch(self, message: session_pb2.SessionResponse) -> None:
        # Only what is there, in the order of numbers: events come before replies.
        for field, values in message.ListFields():
            handle = self._handlers.get(field.number)
            if handle is not None:
                for value in values[:]:  # a list is gone through in half the time
                    handle(value)

    def _note_violation(self, violation: event_pb2.ProtocolViolation) -> None:
        _LOG.error(
            "the answer to event %d of mirror %d: %s", violation.event_sequence, violation.mirror_id, violation.rule
        )
        hearer = self._hearers.get(violation.mirror_id)
        if hearer is not None:
            hearer.rejected(violation.event_sequence, violation.rule)

    def _deliver(self, message: event_pb2.Event) -> None:
        change = Change(message)
        mirror_ids = message.mirror_ids
        if len(mirror_ids) > FEW_MIRRORS and self._deliver_together(message, change):
            return
        hearers = self._hearers
        for mirror_id, sequence in zip(mirror_ids, message.event_sequences, strict=True):
            hearer = hearers.get(mirror_id)
            if hearer is not None:
                hearer.deliver(sequence, change)
            elif self._registers():
                self._unclaimed.setdefault(mirror_id, []).append((sequence, change))
            else:
                self.answer(mirror_id, sequence)  # nobody here uses it any more

    def _deliver_together(self, message: event_pb2.Event, change: Change) -> bool:
        """Tell many mirrors at once, as far as their drivers are done when they return.  Returns: False: tell each."""
        if not change.invalidates or change.wants_answer:
            return False
        named = np.array(message.mirror_ids, np.int64).tobytes()
        group = self._groups.get(named) or self._gather(named, list(message.mirror_ids))
        if not group.members or not self.busy.isdisjoint(group.everybody):
            return False
        mirror_ids: Sequence[MirrorId] = message.mirror_ids
        sequences: Sequence[int] = message.event_sequences
        numbers = np.array(sequences, np.int64)
        if group.positions is not None:
            mirror_ids, numbers = group.ids, numbers[group.positions]
            sequences = numbers.tolist()
        if not self.ledger.is_next(group.slots, numbers, group.everybody):
            return False
        group.note(numbers, change)
        slots, unfinished = group.slots, group.call(numbers, change)
        if unfinished:
            slots, numbers = np.delete(slots, unfinished), np.delete(numbers, unfinished)
            mirror_ids, sequences = np.delete(group.ids, unfinished).tolist(), numbers.tolist()
        self.ledger.done_together(slots, numbers, mirror_ids, sequences)
        self._pump.wake()
        for position in group.others:
            self._hearers[message.mirror_ids[position]].deliver(message.event_sequences[position], change)
        return True

    def _gather(self, named: bytes, mirror_ids: list[MirrorId]) -> Together:
        """Those of some mirrors that can be told together; nobody, as long as one of all is not known here."""
        hearers = [self._hearers.get(mirror_id) for mirror_id in mirror_ids]
        if None in hearers:
            return Together([], [], [], [], len(mirror_ids))
        if len(self._groups) >= GROUPS_KEPT:
            self.regroup()
        direct = {position: one for position, one in enumerate(hearers) if one is not None and one.is_direct}
        ids = [mirror_ids[position] for position in direct]
        slots = [self.ledger.slot(mirror_id) for mirror_id in ids]
        members = list(direct.values())
        group = self._groups[named] = Together(members, ids, slots, list(direct), len(mirror_ids))
        for member in members:
            member.join(group)
        return group

    def _answer_unclaimed(self) -> None:
        for mirror_id, events in self._unclaimed.items():
            for sequence, _ in events:
                self.answer(mirror_id, sequence)
        self._unclaimed.clear()

    def _registers(self) -> bool:
        # The first events of a mirror may come before the reply that names it.
        return any(on_reply is not None for _, on_reply, _ in self._waiting.values())

    def _reply(self, reply: session_pb2.SessionReply) -> None:
        call = self._waiting.get(reply.request_id)
        if call is None:
            return
        future, on_reply, parts = call
        name = reply.WhichOneof("reply")
        if name is not None and name != "not_made":
            parts.append(getattr(reply, name))
        if reply.more:
            return
        del self._waiting[reply.request_id]
        error = not_made_error(reply.not_made) if name == "not_made" else None
        if on_reply is not None:
            if error is None:
                on_reply(parts[-1])
            if not self._registers():
                self._answer_unclaimed()
        if future.done():
            return
        self._told += 1
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(parts)
