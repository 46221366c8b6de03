"""The synchronous runner: calls commands of a machine and serves in-process drivers directly.

For unit tests, notebooks and library users.  An event is handed to its driver at once, oldest first; a driver may
make calls of its own from inside its callback, as the kernel lets it.  The handler of a userfaultfd is called when
nothing else can go on.

**Source**: our own.

**Absent**: concurrency (scheduler.py), deadlines (the server's executor).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, Protocol, TypeAlias, TypeVar

from hmm.commands_userfaultfd import UserfaultMessage, read_userfaults
from hmm.events import Delivery, Event, EventType
from hmm.machine import Command, Machine
from hmm.operation_record import Caller, OperationRecord
from hmm.units import MirrorId

T = TypeVar("T")
P = ParamSpec("P")
Handler: TypeAlias = Callable[[UserfaultMessage], object]
_CALLER = Caller(name="local")
_MESSAGES = 16


class Driver(Protocol):
    """A device driver in the same process."""

    def update(self, mirror_id: MirrorId, event: Event) -> int | bytes:
        """Handle one event before it takes effect.

        Returns: 0, or a positive errno; the results of a copy, one byte per page.
        """

    def release(self, mirror_id: MirrorId) -> None:
        """The address space is going away: stop everything that uses it."""


class Local:
    """Runs one machine's operations to their end, one call at a time."""

    def __init__(self, machine: Machine | None = None) -> None:
        self.machine = machine or Machine()
        self.drivers: dict[MirrorId, Driver] = {}
        self.handlers: dict[int, Handler] = {}
        self._callbacks: list[tuple[MirrorId, int]] = []
        self._queue: list[Delivery] = []

    def attach(self, mirror_id: MirrorId, driver: Driver) -> None:
        """Let `driver` serve the callbacks of a mirror; without one they are acknowledged at once."""
        self.drivers[mirror_id] = driver

    def handle(self, userfaultfd: int, handler: Handler) -> None:
        """Let `handler` bring in what a userfaultfd's ranges miss."""
        self.handlers[userfaultfd] = handler

    def call(self, command: Command[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a command to its end, or until it has given its result.

        Raises: what the command raises; AssertionError when it waits for something that nobody can bring about.
        """
        caller = Caller(name="local", callback=self._callbacks[-1]) if self._callbacks else _CALLER
        record = self.machine.start(caller, command, *args, **kwargs)
        while not (record.done or record.replied):
            self._step(record)
        return record.result

    def _step(self, record: OperationRecord[T]) -> None:
        self._queue += self.machine.take_outbox()
        if self._queue:
            self._serve(self._queue.pop(0))
            return
        ready = self.machine.ready()
        if not ready and self._serve_userfaults():
            return
        assert ready, f"operation {record.id} ({record.name}) waits for ever: {record.request}"
        self.machine.resume(ready[0].id)

    def _serve_userfaults(self) -> bool:
        came = False
        for number, handler in list(self.handlers.items()):
            for message in self.call(read_userfaults, number, _MESSAGES):
                handler(message)
                came = True
        return came

    def _serve(self, delivery: Delivery) -> None:
        driver = self.drivers.get(delivery.mirror_id)
        answer: int | bytes = 0
        if driver is not None:
            self._callbacks.append((delivery.mirror_id, delivery.sequence))
            try:
                if delivery.event.etype is EventType.RELEASE:
                    driver.release(delivery.mirror_id)
                else:
                    answer = driver.update(delivery.mirror_id, delivery.event)
            finally:
                self._callbacks.pop()
        if delivery.mirror_id in self.machine.receivers:
            errno, results = (0, answer) if isinstance(answer, bytes) else (answer, b"")
            self.machine.answer(delivery.mirror_id, delivery.sequence, errno, results=results)


__all__ = ["Driver", "Handler", "Local"]
