"""How a scenario's driver behaves: it answers, late or not at all, or refuses; and it remembers what it heard.

**Absent**: devices that touch memory by themselves; steps make them do it.
"""

from __future__ import annotations

import asyncio
import errno as errnos
from dataclasses import dataclass

from hmm_client.driver import TableDriver
from hmm_client.event import Event
from hmm_client.mirror import Mirror

BEHAVIOURS = ("answer", "hang", "refuse")


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What a driver does with events that take something back.

    Attributes:
        on_update: of BEHAVIOURS; one for each event, the last for all that follow.
        delay_s: before each answer.
    """

    on_update: tuple[str, ...] = ("answer",)
    delay_s: float = 0.0


class ScenarioDriver(TableDriver):
    """A driver with a table of its own.

    Attributes:
        heard: types of the events that came, faults left out.
        lost_mirrors: names of the processes whose mirrors were fenced, and why.
    """

    def __init__(self, behaviour: Behaviour) -> None:
        super().__init__()
        self.heard: list[str] = []
        self.lost_mirrors: dict[int, str] = {}
        self._woken = asyncio.Event()
        self.behave(behaviour)

    def behave(self, behaviour: Behaviour) -> None:
        """Behave like that from now on; updates that hang go on."""
        self._left = list(behaviour.on_update)
        self._delay_s = behaviour.delay_s
        self._woken.set()
        self._woken = asyncio.Event()

    async def update(self, event: Event) -> None:
        """Take note, then do as told."""
        if event.is_fault:
            super().update(event)
            return
        self.heard.append(event.type.name)
        behaviour = self._left.pop(0) if len(self._left) > 1 else self._left[0]
        if self._delay_s:
            await asyncio.sleep(self._delay_s)
        if behaviour == "hang":
            await self._woken.wait()
        if behaviour == "refuse":
            raise OSError(errnos.EIO, "the scenario says so")
        super().update(event)

    def release(self, mirror: Mirror) -> None:
        """Take note."""
        self.heard.append("RELEASE")
        super().release(mirror)

    def lost(self, mirror: Mirror, why: str) -> None:
        """Take note."""
        self.lost_mirrors[mirror.id] = why
        super().lost(mirror, why)
