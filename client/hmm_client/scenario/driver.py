"""A scenario's driver: it notes what it hears, acts by a script, and may call from inside its callbacks.

**Absent**: devices that touch memory by themselves; steps make them do it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hmm.errors import HmmError
from hmm.units import PAGE_SIZE, AddressRange
from hmm_client.client import Client
from hmm_client.device import Device
from hmm_client.driver import TableDriver
from hmm_client.event import Event
from hmm_client.harness.misbehaviour import FAULTS, Act, Misbehaviour
from hmm_client.interval_mirror import IntervalMirror, IntervalNotifier
from hmm_client.mirror import Mirror
from hmm_client.receiver import Answer
from hmm_client.scenario.model import Inside, Interface


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
    """

    client: Client
    device: Device
    driver: ScenarioDriver
    script: Script
    mirrors: dict[str, Mirror] = field(default_factory=dict)
    attached: dict[str, IntervalMirror] = field(default_factory=dict)
    subscriptions: dict[str, IntervalNotifier] = field(default_factory=dict)
    sequences: dict[str, int] = field(default_factory=dict)

    def mirror(self, process: str | None = None) -> Mirror:
        """Its mirror of a process; None: its first."""
        return self.mirrors[process or next(iter(self.mirrors))]

    def tie(self, process: str | None = None) -> IntervalMirror:
        """Its tie of today's interface to a process; None: its first."""
        return self.attached[process or next(iter(self.attached))]

    def of(self, process: str | None = None) -> Mirror | IntervalMirror:
        """Its mirror of a process, of whichever interface; None: its first."""
        return self.mirror(process) if self.mirrors else self.tie(process)

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
