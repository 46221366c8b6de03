"""What hears of the changes of one process's memory for one device: the base of the mirrors of both interfaces.

**Source**: proto/hmm_proto/v1/event.proto.

**Invariants**: every event is answered once; after a loss no call is made.

**Absent**: the calls that each interface has (`mirror.py`, `interval_mirror.py`), the stream (`session.py`).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeAlias

from hmm.errors import DeviceLostError, HmmError
from hmm.events import EventType
from hmm.units import Entries, MirrorId, SpaceId
from hmm_client.callbacks import Callbacks
from hmm_client.driver import Driver
from hmm_client.event import Change, Event
from hmm_client.session import Session
from hmm_client.together import REMEMBERED_EVENTS, Together
from hmm_proto.status import from_call_result
from hmm_proto.v1 import event_pb2

if TYPE_CHECKING:
    from hmm_client.device import Device
    from hmm_client.process import Process

_LOG = logging.getLogger(__name__)

STALE_RETRIES = 100
"""How often a fault whose result was stale is repeated before it ends with EBUSY."""

Answer: TypeAlias = Callable[[Event, event_pb2.Answer | None], None]
"""Sends the answer to an event; None is a plain one."""


class Between(Protocol):
    """Whoever stands between a mirror and its driver (`hmm_client.harness.Misbehaviour`)."""

    def deliver(self, event: Event, deliver: Callable[[Event], None], answer: Answer) -> None:
        """An event came; `deliver` hands it to the driver, `answer` answers it without the driver."""

    def finish(self, event: Event, result: event_pb2.Answer | None, answer: Answer) -> None:
        """The driver has finished an event; `answer` sends its answer."""

    def forget(self, mirror_id: MirrorId) -> None:
        """The mirror has ended."""


class Receiver:
    """One device's tie to one process's address space.

    Attributes:
        id: names it in the daemon.
        device, process: who mirrors whom.
        session: the stream that serves it.
        space_id: the address space, as events name it.
        lost: why it was fenced; empty while it lives.
        released: True once its address space has ended, or it was unregistered.
    """

    def __init__(
        self,
        device: Device,
        process: Process,
        driver: Driver,
        session: Session,
        mirror_id: MirrorId,
        space_id: SpaceId,
        *,
        concurrent: bool = False,
    ) -> None:
        self.id = mirror_id
        self.device = device
        self.process = process
        self.space_id = space_id
        self._between: Between | None = None
        self.lost = ""
        self.released = False
        self._driver = driver
        self.session = session
        self._callbacks = Callbacks(
            driver, self._finish, executor=device.client.executor, concurrent=concurrent, busy=session.busy
        )
        self._recent: deque[tuple[int, Change]] = deque()
        self._forgotten = 0
        self._groups: list[Together] = []

    def __repr__(self) -> str:
        return f"<mirror {self.id} of process {self.process.id} on {self.device.name}>"

    # ---- events

    @property
    def heard(self) -> int:
        """The last event that the driver was told of."""
        if not self._groups:
            return self._callbacks.heard
        return max([self._callbacks.heard, *(group.heard_by(self.id) for group in self._groups)])

    @property
    def between(self) -> Between | None:
        """Who stands between it and its driver; None: nobody."""
        return self._between

    @between.setter
    def between(self, between: Between | None) -> None:
        self._between = between
        self.session.regroup()

    @property
    def is_direct(self) -> bool:
        """True when it may be told together with others: nobody is between, and its driver is done when it returns."""
        return self._between is None and self._callbacks.is_direct

    @property
    def is_idle(self) -> bool:
        """True when its driver has nothing to do for a change, and need not be called."""
        return self._callbacks.driver_is_idle

    def hear(self, sequence: int, change: Change) -> bool:
        """Let the driver handle a change that it is told of together with others.

        Returns: True when it is done with nothing to say; then its answer is the caller's to give.
        """
        return self._callbacks.run(Event(self, sequence, change))

    def join(self, group: Together) -> None:
        """From now on it may also hear with others."""
        self._groups.append(group)

    def leave(self, group: Together, heard: list[tuple[int, Change]], forgotten: int) -> None:
        """It hears with these others no more; what it heard with them, ascending, is its own."""
        self._groups.remove(group)
        if heard:
            self._callbacks.heard = max(self._callbacks.heard, heard[-1][0])
            self._recent = deque(sorted([*self._recent, *heard], key=itemgetter(0)))
        self._forgotten = max(self._forgotten, forgotten)
        while len(self._recent) > REMEMBERED_EVENTS:
            self._forgotten = max(self._forgotten, self._recent.popleft()[0])

    def deliver(self, sequence: int, change: Change) -> None:
        """Hand an event over to the driver; called by the session."""
        if change.invalidates:
            self._recent.append((sequence, change))
            if len(self._recent) > REMEMBERED_EVENTS:
                self._forgotten = self._recent.popleft()[0]
        event = Event(self, sequence, change)
        if self._between is None:
            self._callbacks.deliver(event)
        else:
            self._between.deliver(event, self._callbacks.deliver, self._answer)

    def _finish(self, event: Event, answer: event_pb2.Answer | None) -> None:
        if event.type is EventType.RELEASE:
            self.released = True
        if self._between is None:
            self._answer(event, answer)
        else:
            self._between.finish(event, answer, self._answer)

    def _answer(self, event: Event, answer: event_pb2.Answer | None) -> None:
        if not self.session.lost:
            self.session.answer(self.id, event.sequence, answer)

    def rejected(self, sequence: int, rule: str) -> None:  # noqa: ARG002 - every answer after a loss is rejected
        """An answer did not count; called by the session.  It is how a driver that was too slow hears of its loss."""
        if rule.startswith(DeviceLostError.reason):
            self._lose(rule)

    async def cancel(self) -> None:
        """End updates that are under way, without an answer; called by the session when it is closed."""
        self._forget()
        await self._callbacks.cancel()

    def session_lost(self, why: str) -> None:
        """The stream has ended; called by the session."""
        self._forget()
        self._callbacks.drop()
        self._lose(why)

    def unbind(self) -> None:
        """It is gone, in good order."""
        self.session.unbind(self.id)
        self._forget()

    def _forget(self) -> None:
        if self._between is not None:
            self._between.forget(self.id)

    def _lose(self, why: str) -> None:
        if not self.lost and not self.released:
            self.lost = why
            try:
                self._driver.lost(self, why)  # type: ignore[arg-type]
            except Exception:  # noqa: BLE001 - its other mirrors must be told as well
                _LOG.exception("%r: the driver failed to take note of its loss", self)

    def has_news_since(self, event_sequence: int) -> bool:
        """False when it is certain that no event with a higher number has come that took anything back."""
        if event_sequence < self._forgotten or (bool(self._recent) and self._recent[-1][0] > event_sequence):
            return True
        return bool(self._groups) and any(group.heard_by(self.id) > event_sequence for group in self._groups)

    def has_heard_since(self, event_sequence: int, starts: Entries, ends: Entries) -> bool:
        """True when an event with a higher number has come that overlaps uint64[n] ascending, disjoint ranges.

        Also when it came so long ago that it is not remembered.
        """
        if event_sequence < self._forgotten:
            return True
        for sequence, change in reversed(self._recent):
            if sequence <= event_sequence:
                break
            if change.overlaps(starts, ends):
                return True
        return any(group.has_heard_since(self.id, event_sequence, starts, ends) for group in self._groups)

    # ---- calls

    def ask(self, name: str, request: Any) -> Awaitable[list[Any]]:
        """Begin one call on the session.

        Returns: the parts of its reply, to be awaited; an error that comes of it is for `fail`.

        Raises: as `Session.call`.
        """
        if self.lost:
            raise DeviceLostError(f"{name}: {self!r} was fenced: {self.lost}")
        return self.session.call(name, request)

    async def call(self, name: str, request: Any) -> list[Any]:
        """Make one call on the session: the parts of its reply.  Raises: as `Session.call`."""
        try:
            return await self.ask(name, request)
        except HmmError as error:
            self.fail(error)

    def require(self, response: Any) -> None:
        """Raise what a response's result says, if that is an error."""
        error = from_call_result(response.result)
        if error is not None:
            self.fail(error)

    def fail(self, error: HmmError) -> NoReturn:
        """Raise an error, and take note if it says that the mirror is lost."""
        if isinstance(error, DeviceLostError):
            self._lose(error.message)
        raise error
