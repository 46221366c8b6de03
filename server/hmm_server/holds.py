"""Holds: calls that are kept at a point of their life, so that a test can do something else meanwhile.

A hold is a breakpoint with an owner and a lease.  The next call that comes to its point stays there until the hold is
released.  The core knows nothing of it: a call's points follow from the requests that it makes, and the executor asks
here before it delivers, resumes or ends one.

    BEFORE_EVENT  the call asks for an event to be delivered     AFTER_WAIT   what it waited for has come about
    EVENT_SENT    the event leaves                               BEFORE_END   the call has a result
    ACKNOWLEDGED  one mirror's answer comes
    BEFORE_EDIT   the last answer is there

**Source**: our own; what a kernel developer does with a delay between invalidate_range_start() and the zap.

**Invariants**: a hold keeps at most one call, a call is kept by at most one hold; a hold that was released is gone.

**Absent**: the clock of the lease and the stream that owns a hold (services/harness.py).  A point between the edit and
the end of its bracket: a call can be kept only where it yields, and from the edit to the end of the bracket it does not
(`hmm/operation.py`: between two yields it is atomic).  A yield there would cost every change a turn of the executor,
and let others in while a call that changes several mappings is half done.  Nor is there anything that a driver could
see: until the end faults of the range wait, and read sections have to be repeated, as they do at BEFORE_EDIT; what its
table loses it has lost with its answer.  The CPU's table alone differs, and that is seen at BEFORE_END.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeAlias

from hmm.dispatch import Dispatch
from hmm.machine import Command, Machine
from hmm.operation import Await, Deliver
from hmm.operation_record import OperationRecord
from hmm.units import MirrorId, ProcessId, SpaceId

Going: TypeAlias = tuple[Dispatch, tuple[MirrorId, ...]]
"""An event, and those of its audience to whom it goes."""


class Point(Enum):
    """Where a call can be held."""

    BEFORE_EVENT = "before the event"
    EVENT_SENT = "event sent"
    ACKNOWLEDGED = "acknowledged"
    BEFORE_EDIT = "before the edit"
    AFTER_WAIT = "after waiting"
    BEFORE_END = "before the end"


@dataclass(frozen=True, slots=True)
class Breakpoint:
    """Which call, and where.  What is empty or 0 may be anything.

    Attributes:
        operation: the call's name, or several that are separated by `|`.
        space_id: the address space of `process_id` when the hold was placed.
        mirror_id: EVENT_SENT and ACKNOWLEDGED: whose event or answer counts.
    """

    point: Point
    operation: str = ""
    process_id: ProcessId = 0
    space_id: SpaceId = 0
    mirror_id: MirrorId = 0
    caller: str = ""

    def __str__(self) -> str:
        words = [self.operation or "any call"]
        words += [f"of process {self.process_id}"] if self.process_id else []
        words += [f"by {self.caller}"] if self.caller else []
        return " ".join(words)

    def matches(self, record: OperationRecord[Any], space_id: SpaceId, mirror_id: MirrorId) -> bool:
        """Whether it is this call, in this address space, with this mirror."""
        return (
            (not self.operation or record.name in self.operation.split("|"))
            and self.caller in ("", record.caller.name)
            and self.space_id in (0, space_id)
            and self.mirror_id in (0, mirror_id)
        )


@dataclass(slots=True, eq=False)
class Hold:
    """One hold.

    Attributes:
        owner, name: the token and the name of whoever placed it.
        until_s: when its lease ends, on the monotonic clock.
        skip: how many calls still pass.
        reached: resolved with the call that it keeps.
        ended: resolved with the reason when it is released.
        withheld: BEFORE_EVENT: what waits to be delivered, in order; a mirror hears its events in theirs.
    """

    id: int
    owner: str
    name: str
    where: Breakpoint
    until_s: float
    skip: int
    reached: asyncio.Future[OperationRecord[Any]]
    ended: asyncio.Future[str]
    withheld: list[Going] = field(default_factory=list)

    @property
    def operation_id(self) -> int:
        """The call that it keeps; 0 for none yet."""
        return self.reached.result().id if self.reached.done() else 0


class Holds:
    """All holds of one daemon, in order of their placing."""

    def __init__(self, machine: Machine) -> None:
        self.placed: dict[int, Hold] = {}
        self._machine = machine
        self._last_id = 0

    def place(self, owner: str, name: str, where: Breakpoint, until_s: float, skip: int) -> Hold:
        """Put a hold in place."""
        self._last_id += 1
        loop = asyncio.get_running_loop()
        hold = Hold(self._last_id, owner, name, where, until_s, skip, loop.create_future(), loop.create_future())
        self.placed[hold.id] = hold
        return hold

    def remove(self, hold: Hold, why: str) -> bool:
        """Take a hold away.  Returns: whether it was there."""
        if self.placed.pop(hold.id, None) is None:
            return False
        hold.ended.set_result(why)
        return True

    def of(self, operation_id: int) -> Hold | None:
        """What keeps a call; None when nothing does."""
        return next((hold for hold in self.placed.values() if hold.operation_id == operation_id), None)

    def keeps(self, point: Point, record: OperationRecord[Any], space_id: SpaceId = 0, mirror_id: MirrorId = 0) -> bool:
        """A call has come to a point.  Returns: whether it stays, now or since an earlier point."""
        if self.of(record.id) is not None:
            return True
        for hold in self.placed.values():
            if hold.where.point is not point or hold.reached.done():
                continue
            if not hold.where.matches(record, space_id or space_of_request(record), mirror_id):
                continue
            if hold.skip:
                hold.skip -= 1
                continue
            hold.reached.set_result(record)
            return True
        return False

    def withhold(self, dispatches: Sequence[Dispatch]) -> list[Going]:
        """Keep the events of calls that are held before them, and those behind them on the way to the same mirror.

        Returns: the others.
        """
        withheld = [(going, hold) for hold in self.placed.values() for going in hold.withheld]
        behind = {mirror_id: hold for (_, mirror_ids), hold in withheld for mirror_id in mirror_ids}
        going: list[Going] = []
        for dispatch in dispatches:
            free = tuple([mirror_id for mirror_id in dispatch.audience.ids if mirror_id not in behind])
            if free and self.keeps(Point.BEFORE_EVENT, self._machine.operations[dispatch.operation_id]):
                hold = self.of(dispatch.operation_id)
                assert hold is not None
                behind.update(dict.fromkeys(free, hold))
                free = ()
            if len(free) == len(dispatch.sequences):
                going.append((dispatch, dispatch.audience.ids))
                continue
            if free:
                going.append((dispatch, free))
            for mirror_id in dispatch.audience.ids:
                if mirror_id not in free:
                    behind[mirror_id].withheld.append((dispatch, (mirror_id,)))
        return going

    def space_of_call(self, command: Command[Any, Any], arguments: tuple[Any, ...]) -> SpaceId:
        """The address space that a call is about to concern, by what it names; 0 for none."""
        given = dict(zip(list(inspect.signature(command).parameters)[1:], arguments, strict=False))
        machine = self._machine
        named = (
            machine.receivers.get(given.get("mirror_id", 0))
            or machine.processes.get(given.get("process_id", 0))
            or machine.migrations.get(given.get("migration_id", 0))
        )
        space = named.space if named else machine.userfaultfds.get(given.get("userfaultfd_id", 0))
        return space.id if space else 0


def space_of_request(record: OperationRecord[Any]) -> SpaceId:
    """The address space that a call's request concerns; 0 for none."""
    request = record.request
    if isinstance(request, Deliver):
        return request.event.space_id
    return request.space_id if isinstance(request, Await) else 0
