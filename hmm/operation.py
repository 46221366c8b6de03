"""Operations: calls that may have to wait, written as generators.

An operation yields a *request* and is resumed once that request is satisfied; between two yields it is atomic.
Nothing crosses a yield but values: after it, everything is looked up again by address.

The requests are plain values, so that whoever runs operations can write them down, and `pending` can show them:

    Deliver   every mirror named has answered the event (acknowledged, refused, fenced or abandoned)
    Await     a condition on one address space or mirror holds
    Pause     nothing; others may go first (between the pieces of a long operation)

**Source**: our own; it stands for everything that may sleep in the kernel.

**Invariants**: requests are frozen; nothing else leaves an operation but its result or its exception.

**Absent**: who decides what runs next (local.py, scheduler.py and the server's executor do).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from enum import Enum
from functools import partial, wraps
from itertools import count
from typing import Any, ParamSpec, TypeAlias, TypeVar

from hmm.events import Event
from hmm.units import AddressRange, MirrorId, SpaceId

T = TypeVar("T")
P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class Deliver:
    """Send `event` to all of `mirrors` at once and wait for all; the reply is the Dispatch with their answers."""

    event: Event
    mirrors: tuple[MirrorId, ...]


class WaitFor(Enum):
    """Conditions an operation can wait for."""

    FAULTS = "device faults in the range"
    INVALIDATIONS = "invalidations of the range"
    EDITS = "a call that changes the range's VMAs"
    TURN = "earlier calls that change VMAs of this space"
    CALLBACKS = "callbacks of the mirror"  # up to the event whose sequence is the ticket
    LATE_ANSWERS = "answers to abandoned events"
    SEQUENCE = "the end of all running invalidations"
    COPIES = "copies to or from a device in the range"
    SETTLED = "the end of changes that the mirror has been told of"
    USERFAULT = "the handler of userfaultfd"  # the ticket is that of the wait
    FILE = "a call that changes the file"
    FOLIO = "the lock of a page that is on its way"  # the ticket is the lock's
    MEMORY = "others that reclaim memory"  # the ticket is the number of reclaims that have ended
    DRIVER = "the next step of its driver"  # the ticket is that of the migration
    STEP = "a step of the migration"  # the same


@dataclass(frozen=True, slots=True)
class Await:
    """Wait until the condition holds for the ranges (or the ticket, sequence, mirror, userfaultfd or file) given."""

    wait_for: WaitFor
    space_id: SpaceId = 0
    spans: tuple[AddressRange, ...] = ()
    ticket: int = 0
    mirror_id: MirrorId = 0
    userfaultfd: int = 0
    file_id: int = 0


@dataclass(frozen=True, slots=True)
class Pause:
    """Let others run: sent between the pieces of a long operation."""


@dataclass(slots=True)
class Current:
    """What all address spaces of a machine have in common.

    Attributes:
        operation_id: which operation is being advanced; the machine sets it, events and waits carry it.
        stretch: serial number of what runs now without a yield: within one nobody else changes anything.
        insertions: serial numbers for the VMAs that are put into the reverse map.
    """

    operation_id: int = 0
    stretch: int = 0
    insertions: Iterator[int] = field(default_factory=partial(count, 1))


Request: TypeAlias = Deliver | Await | Pause
Operation: TypeAlias = Generator[Request, Any, T]


def immediate(function: Callable[P, T]) -> Callable[P, Operation[T]]:
    """Make an operation of a function that never has to wait."""

    @wraps(function)
    def operation(*args: P.args, **kwargs: P.kwargs) -> Operation[T]:
        return function(*args, **kwargs)
        yield Pause()  # makes this function a generator

    return operation


@immediate
def _nothing() -> None:
    """There is nothing to wait for."""


AT_ONCE: Operation[None] = _nothing()
"""An operation that is over: what a function returns, instead of one of its own, that found nothing to wait for.

`yield from` gives None at once, time and again; making a generator and running it to its end takes three times as long.
"""
tuple(AT_ONCE)
