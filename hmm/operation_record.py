"""What a machine writes down: who calls, a call from its start to its result, and an input.

**Source**: our own.

**Invariants**: a record is done, or waits for something, or has not begun; those that wait are in `Machine.operations`.

**Absent**: what a call does (its generator), and when it goes on (machine.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from hmm.dispatch import Dispatch
from hmm.errors import WouldDeadlockError
from hmm.operation import Await, Operation, Request, WaitFor
from hmm.units import MirrorId

__all__ = ["Caller", "Input", "OperationRecord"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call.

    Attributes:
        token: owner of what the call creates; the empty token belongs to everybody.
        name: for people: what `pending` and events show.
        callback: (mirror, event sequence) when the call is made from inside that driver callback.
    """

    token: str = ""
    name: str = ""
    callback: tuple[MirrorId, int] | None = None


@dataclass(slots=True, eq=False)
class OperationRecord(Generic[T]):
    """A call from its start to its result.

    Attributes:
        request: what it waits for; None before the start and when done.
        dispatch: the event that it waits for, on its way to mirrors.
        fenced: the mirrors that were lost while it waited for them.
        refusal: what it will be resumed with: it was called from inside a callback that it has come to wait for.
        replied: its caller has its value already, while it goes on.
        timed_out: its caller's patience has ended, and it ends as soon as it can.
        killed: its caller has gone, and it waits for nobody's userfaultfd any more.
    """

    id: int
    name: str
    arguments: tuple[Any, ...]
    caller: Caller
    generator: Operation[T]
    request: Request | None = None
    dispatch: Dispatch | None = None
    fenced: tuple[MirrorId, ...] = ()
    refusal: WouldDeadlockError | None = None
    timed_out: bool = False
    killed: bool = False
    replied: bool = False
    done: bool = False
    error: BaseException | None = None
    value: T | None = None

    @property
    def result(self) -> T:
        """The value the call returned, or has replied with; raises what it raised."""
        if self.error is not None:
            raise self.error
        assert self.done or self.replied
        return self.value  # type: ignore[return-value]

    @property
    def waits_for_handler(self) -> bool:
        """Whether it waits for the handler of a userfaultfd, for as long as that one likes."""
        return isinstance(self.request, Await) and self.request.wait_for is WaitFor.USERFAULT

    @property
    def waits_for_driver(self) -> bool:
        """Whether it waits for a driver to take the next step of its migration, as long as its lease lasts."""
        return isinstance(self.request, Await) and self.request.wait_for is WaitFor.DRIVER


@dataclass(frozen=True, slots=True)
class Input:
    """One input as written down: the name of a method of the machine and its arguments."""

    method: str
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...] = ()
