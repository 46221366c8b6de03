"""Looking at a machine without changing it: maps, tables, walks, and who blocks whom.

Everything here is a plain value, made for `hmmctl` and for reports of failing tests.

**Source**: our own; `walk` shows what a hardware page walk would see, `pending` what the kernel cannot tell.

**Invariants**: nothing changes.

**Absent**: ages and deadlines (the server adds them), formatting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.commands_hmm import EXCLUSIVE_PAGES
from hmm.events import Event
from hmm.exclusive import held_exclusively
from hmm.interval_notifier import IntervalMirror
from hmm.machine import Machine
from hmm.migrate_steps import SteppedMigration
from hmm.operation import Await, Deliver, Pause, WaitFor
from hmm.operation_record import OperationRecord
from hmm.page_table import PageTable
from hmm.units import (
    WHOLE_SPACE,
    Address,
    AddressRange,
    MirrorId,
    ProcessId,
    SpaceId,
    spans_of,
)
from hmm.userfaultfd import Userfault, Userfaultfd


@dataclass(frozen=True, slots=True)
class DirectoryNode:
    """One directory of a table, as `pagetable` shows it.

    Attributes:
        level: 0 is the root.
        span: the addresses it translates.
        entries: in use in this directory.
    """

    level: int
    span: AddressRange
    entries: int


@dataclass(frozen=True, slots=True)
class WalkStep:
    """One level of a walk: the index used there and whether it leads on; at the leaf, the entry itself."""

    level: int
    index: int
    present: bool
    entry: int


@dataclass(frozen=True, slots=True)
class Blocked:
    """One operation that waits, and for what.

    Attributes:
        request: in words.
        operations: ids that it waits for directly.
        answers: (mirror, event sequence) that it waits for directly.
        event: the event being delivered, if that is what it waits for.
        cycle: it waits, in the end, for itself.
        userfaultfd, userfault: whose handler it waits for, and the wait.
    """

    operation_id: int
    name: str
    arguments: tuple[Any, ...]
    caller: str
    space_id: SpaceId
    request: str
    operations: tuple[int, ...]
    answers: tuple[tuple[MirrorId, int], ...]
    event: Event | None
    cycle: bool
    userfaultfd: Userfaultfd | None = None
    userfault: Userfault | None = None


@dataclass(frozen=True, slots=True)
class Holding:
    """What somebody has between two calls: pages that a mirror has to itself, a migration, or a pin.

    Attributes:
        owner: the token of who has it.
        mirror_id: that has the pages, or moves them; 0 for a pin.
        pin, migration: which one; 0 for others.
        spans: the pages; of a pin, where they were when they were pinned.
    """

    owner: str
    mirror_id: MirrorId
    pin: int
    space_id: SpaceId
    spans: tuple[AddressRange, ...]
    npages: int
    migration: int = 0


@dataclass(frozen=True, slots=True)
class Broken:
    """An address space that an internal error left half changed.

    Attributes:
        owner: the token of its processes.
        because: what failed, and how.
    """

    owner: str
    space_id: SpaceId
    processes: tuple[ProcessId, ...]
    because: str


def broken(machine: Machine) -> list[Broken]:
    """Every address space that is not to be trusted any more."""
    found: list[Broken] = []
    for space in machine.spaces.values():
        if space.notifier.broken:
            users = processes_of(machine, space.id)
            owner = machine.processes[users[0]].owner if users else ""
            found.append(Broken(owner, space.id, tuple(users), space.notifier.broken))
    return found


def holdings(machine: Machine) -> list[Holding]:
    """Everything that is held: exclusive access, migrations whose drivers have to take a step, pins.

    Cost: O(pages mapped) for every mirror that ever took a page.
    """
    found: list[Holding] = []
    for mirror in machine.receivers.values():
        if isinstance(mirror, IntervalMirror) and mirror.counters[EXCLUSIVE_PAGES] and mirror.space.users:
            held = held_exclusively(mirror.space, mirror.id)
            spans = spans_of(held)
            if spans:
                found.append(Holding(mirror.owner, mirror.id, 0, mirror.space.id, spans, held.size))
    found += [_migration(one) for one in machine.migrations.values()]
    found += [
        Holding(pin.owner, 0, number, pin.space_id, (pin.span,), pin.pfns.size) for number, pin in machine.pins.items()
    ]
    return found


def migration_of(machine: Machine, record: OperationRecord[Any]) -> Holding | None:
    """The migration that an operation does, if it waits for the next step of its driver."""
    if not record.waits_for_driver:
        return None
    assert isinstance(record.request, Await)
    return _migration(machine.migrations[record.request.ticket])


def _migration(one: SteppedMigration) -> Holding:
    return Holding(one.owner, one.mirror_id, 0, one.space.id, (one.span,), one.span.npages, one.id)


def pending(machine: Machine) -> list[Blocked]:
    """Every operation that is under way, oldest first, with what it waits for."""
    return [_blocked(machine, record) for record in machine.operations.values()]


def processes_of(machine: Machine, space_id: SpaceId) -> list[ProcessId]:
    """The processes (threads) that use an address space, ascending."""
    return [process.id for process in machine.processes.values() if process.space.id == space_id]


def resident_pages(space: AddressSpace, span: AddressRange) -> int:
    """Pages of a range that are in memory, the system's or a device's.  Cost: O(directories), or entries with swap."""
    if space.frames.swap is None and span == WHOLE_SPACE:
        return space.table.count
    entries = space.table.valid(span.start, span.end)[1]
    return int(np.count_nonzero(~cpu_pte.is_swap(entries)))


def directories(table: PageTable, span: AddressRange) -> list[DirectoryNode]:
    """The directories of a table that hold entries of `span`, depth first.

    Cost: O(directories in the range).
    """
    nodes: list[DirectoryNode] = []
    seen: set[tuple[int, Address]] = set()
    for run in table.walk(span.start, span.end):
        in_use = int((run.entries != 0).sum())
        for level in range(table.llevel + 1):
            start, end = table.geometry.directory_span(run.start, level)
            if level == table.llevel:
                nodes.append(DirectoryNode(level, AddressRange(start, end), in_use))
            elif (level, start) not in seen:
                seen.add((level, start))
                nodes.append(DirectoryNode(level, AddressRange(start, end), table.reference_count(run.start, level)))
    return nodes


def walk(table: PageTable, address: Address) -> list[WalkStep]:
    """Every level of the walk to `address`, down to the first directory that is missing or to the entry."""
    steps = []
    for level in range(table.llevel + 1):
        index = table.geometry.index(address, level)
        if level == table.llevel:
            entry = table.get(address)
            steps.append(WalkStep(level, index, entry != 0, entry))
            break
        present = table.reference_count(address, level + 1) > 0
        steps.append(WalkStep(level, index, present, 0))
        if not present:
            break
    return steps


def _blocked(machine: Machine, record: OperationRecord[Any]) -> Blocked:
    request = record.request
    event = request.event if isinstance(request, Deliver) else None
    space_id = event.space_id if event else request.space_id if isinstance(request, Await) else 0
    userfaultfd = userfault = None
    if isinstance(request, Await) and request.userfaultfd in machine.userfaultfds:
        userfaultfd = machine.userfaultfds[request.userfaultfd].userfaultfds[request.userfaultfd]
        userfault = userfaultfd.faults.get(request.ticket)
    return Blocked(
        operation_id=record.id,
        name=record.name,
        arguments=record.arguments,
        caller=record.caller.name,
        space_id=space_id,
        request=_in_words(request),
        operations=tuple(machine.blockers(record)),
        answers=tuple(machine.unanswered(record)),
        event=event,
        cycle=machine.waits_for_itself(record),
        userfaultfd=userfaultfd,
        userfault=userfault,
    )


def _in_words(request: object) -> str:
    match request:
        case Deliver(event=event):
            what = event.what
            if event.copy:
                what = f"{event.etype.name.lower().replace('_', ' ')} by its driver ({what})"
            where = ", ".join(map(str, event.spans[:3])) + (" ..." if len(event.spans) > 3 else "")
            return f"acknowledgement of {what} {where}".rstrip()
        case Await(wait_for=wait_for, spans=spans, userfaultfd=userfaultfd, ticket=ticket):
            which = f" {userfaultfd}" if userfaultfd else ""
            if wait_for is WaitFor.DRIVER:
                which = f", in migration {ticket}"
            where = ", ".join(map(str, spans[:3])) + (" ..." if len(spans) > 3 else "")
            return f"{wait_for.value}{which} {where}".rstrip()
        case Pause():
            return "nothing: it is between two pieces of its work"
    return "nothing"
