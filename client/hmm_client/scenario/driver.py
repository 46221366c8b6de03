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
from hmm_client.mirror import Mirror
from hmm_client.receiver import Answer
from hmm_client.scenario.model import Inside


class Script(Misbehaviour):
    """A script that remembers what came.

    Attributes:
        came: type names of the events that came, in order, whatever was done with them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.came: list[str] = []

    def deliver(self, event: Event, deliver: Callable[[Event], None], answer: Answer) -> None:
        """Take note, then follow the script."""
        self.came.append(event.type.name)
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
    """A driver, what it serves, and its own connection."""

    client: Client
    device: Device
    driver: ScenarioDriver
    script: Script
    mirrors: dict[str, Mirror] = field(default_factory=dict)

    def mirror(self, process: str | None = None) -> Mirror:
        """Its mirror of a process; None: its first."""
        return self.mirrors[process or next(iter(self.mirrors))]

    def behave(self, on_update: tuple[Act, ...] | None, on_fault: tuple[Act, ...] | None) -> None:
        """Change the script, or the part that is given."""
        if on_update is not None:
            self.script.behave(*on_update)
        if on_fault is not None:
            self.script.behave(*on_fault, only=FAULTS)
