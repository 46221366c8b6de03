"""A scenario's driver: it notes what it hears, acts by a script, and may call from inside its callbacks.

**Absent**: devices that touch memory by themselves; steps make them do it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from hmm.errors import HmmError, InvalidRequestError
from hmm.units import PAGE_SIZE, AddressRange
from hmm_client.client import Client
from hmm_client.device import Device
from hmm_client.driver import TableDriver
from hmm_client.event import Event
from hmm_client.harness.misbehaviour import FAULTS, Act, Misbehaviour
from hmm_client.interval_mirror import IntervalMirror, IntervalNotifier
from hmm_client.migration import Migration
from hmm_client.mirror import Mirror
from hmm_client.receiver import Answer
from hmm_client.scenario.model import Inside, Interface

T = TypeVar("T")


class Script(Misbehaviour):
    """A script that remembers what came.

    Attributes:
        came: types of the events that came, in order, whatever was done with them; for today's interface, reasons.
    """

    def __init__(self, interface: Interface) -> None:
        super().__init__()
        self.came: list[str] = []
        self._interface = interface

    def deliver(self, event: Event, deliver: Callable[[Event], None], answer: Answer) -> None:
        """Take note, then follow the script."""
        reason = event.reason if self._interface is Interface.TODAY else None
        self.came.append(event.type.name if reason is None else reason.name)
        super().deliver(event, deliver, answer)

    def heard_since(self, start: int, *, faults: bool) -> list[str]:
        """What came from a position on, with or without faults."""
        return [name for name in self.came[start:] if faults or name not in FAULT_NAMES]


FAULT_NAMES = frozenset(kind.name for kind in FAULTS)


class ScenarioDriver(TableDriver):
    """A driver with a table of its own.

    Attributes:
        inside: what it does inside its callbacks, before it answers.
        errors: how these calls ended, in order; None for those that succeeded.
    """

    def __init__(self, inside: Inside) -> None:
        super().__init__()
        self.inside = inside
        self.errors: list[HmmError | None] = []

    async def update(self, event: Event) -> None:
        """Call if told to, then apply the event."""
        if self.inside is not Inside.NOTHING and not event.is_fault:
            try:
                await self._call(event)
            except HmmError as error:
                self.errors.append(error)
            else:
                self.errors.append(None)
        super().update(event)

    def tell(self) -> None:
        """How its calls inside callbacks ended, one each time.

        Raises:
            HmmError: as the call did.
            InvalidRequestError: there was none that was not told yet (EINVAL).
        """
        if not self.errors:
            raise InvalidRequestError("it has called nothing inside a callback, or all is told")
        if (error := self.errors.pop(0)) is not None:
            raise error

    async def _call(self, event: Event) -> None:
        mirror: Mirror = event.mirror
        span = event.spans[-1]
        match self.inside:
            case Inside.FAULT:
                await mirror.fault(span)
            case Inside.FAULT_ELSEWHERE:
                await mirror.fault(AddressRange(span.end, span.end + PAGE_SIZE))
            case _:
                await mirror.process.munmap(span.start, span.size_bytes)


@dataclass(slots=True)
class Driven:
    """A driver, what it serves, and its own connection.

    Attributes:
        mirrors, attached: by process, of the interface of 2015 and of today's.
        subscriptions: of today's interface, by name.
        sequences: of the read sections that it has begun, by subscription.
        migration: the last one that it has begun by steps.
    """

    client: Client
    device: Device
    driver: ScenarioDriver
    script: Script
    mirrors: dict[str, Mirror] = field(default_factory=dict)
    attached: dict[str, IntervalMirror] = field(default_factory=dict)
    subscriptions: dict[str, IntervalNotifier] = field(default_factory=dict)
    sequences: dict[str, int] = field(default_factory=dict)
    migration: Migration | None = None

    def mirror(self, process: str | None = None) -> Mirror:
        """Its mirror of a process; None: its first.  Raises: as `tie`."""
        return self._of(self.mirrors, process, "of 2015")

    def tie(self, process: str | None = None) -> IntervalMirror:
        """Its tie of today's interface to a process; None: its first.

        Raises:
            InvalidRequestError: there is none (EINVAL).
        """
        return self._of(self.attached, process, "of today's interface")

    def of(self, process: str | None = None) -> Mirror | IntervalMirror:
        """Its mirror of a process, of whichever interface; None: its first.  Raises: as `tie`."""
        return self.mirror(process) if self.mirrors else self.tie(process)

    def subscription(self, name: str | None) -> str:
        """The name of one of its subscriptions; None: of the last one.

        Raises:
            InvalidRequestError: there is none (EINVAL).
        """
        if not self.subscriptions or (name is not None and name not in self.subscriptions):
            raise InvalidRequestError(f"{self.device.name} has no subscription{f' {name!r}' if name else ''}")
        return name or list(self.subscriptions)[-1]

    def begun(self) -> Migration:
        """The last migration that it has begun by steps.

        Raises:
            InvalidRequestError: there is none (EINVAL).
        """
        if self.migration is None:
            raise InvalidRequestError(f"{self.device.name} has begun no migration")
        return self.migration

    def sequence(self, name: str) -> int:
        """What the read section began with that is under way in a subscription.

        Raises:
            InvalidRequestError: none was begun (EINVAL).
        """
        if name not in self.sequences:
            raise InvalidRequestError(f"{self.device.name} has begun no read section of {name!r}")
        return self.sequences[name]

    def _of(self, ties: dict[str, T], process: str | None, kind: str) -> T:
        if not ties or (process is not None and process not in ties):
            what = "nothing" if process is None else f"no {process}"
            raise InvalidRequestError(f"{self.device.name} mirrors {what} by a mirror {kind}")
        return ties[process or next(iter(ties))]

    @property
    def ids(self) -> set[int]:
        """What it is known by in events, whatever its interface."""
        return {one.id for one in (*self.mirrors.values(), *self.attached.values())}

    def behave(self, on_update: tuple[Act, ...] | None, on_fault: tuple[Act, ...] | None) -> None:
        """Change the script, or the part that is given."""
        if on_update is not None:
            self.script.behave(*on_update)
        if on_fault is not None:
            self.script.behave(*on_fault, only=FAULTS)
