"""A scenario as it was read: what it declares, its steps, and what is expected of each.

**Invariants**: a scenario that was read names only what it has declared; a call has all its arguments.

**Absent**: the file (`format.py`), and what comes of it (`run.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from hmm.receiver import DeadlinePolicy
from hmm_client.harness.misbehaviour import Act
from hmm_client.recordings.errors import InputError

WITHIN_S = 30.0
"""How long a step may take at most if it does not say."""


class ScenarioError(InputError):
    """A scenario that is not understood."""


class Inside(Enum):
    """What a driver does inside its callbacks, before it answers."""

    NOTHING = "nothing"
    FAULT = "fault"
    FAULT_ELSEWHERE = "fault elsewhere"
    MUNMAP = "munmap"


class Interface(Enum):
    """How a driver is tied to a process."""

    MIRROR_2015 = "2015"
    TODAY = "today"


@dataclass(frozen=True, slots=True)
class DriverSpec:
    """A driver and its device.

    Attributes:
        mirrors: the processes that it mirrors from the start.
        policy: what happens when an answer is late.
        on_update, on_fault: its acts, with events that take something back and with those of its own faults.
        inside: what it does inside its callbacks.
        dma: its table holds DMA addresses.
        interface: the mirror of 2015, or today's interval notifiers.
        memory: bytes of its device's own.
        credit: how many events it may owe an answer to; 0: what the daemon gives.
    """

    mirrors: tuple[str, ...]
    policy: DeadlinePolicy
    on_update: tuple[Act, ...]
    on_fault: tuple[Act, ...]
    inside: Inside
    dma: bool
    interface: Interface
    memory: int
    credit: int


@dataclass(frozen=True, slots=True)
class ProgramSpec:
    """A driver that is a process of its own.

    Attributes:
        command: starts it; `python` is the interpreter that runs the scenario.
    """

    command: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Expectation:
    """What must come of a step.

    Attributes:
        error: name of the errno that it ends with, "gone" when a program has ended; "" for success.
        signal: that a CPU gets, by its si_code; "" for none.
        data: that is read; None: any.
        entries: valid entries that `table` finds, pages that a fault brought in, or that moved; None: any.
        retry: whether a read section has to be repeated; None: any.
        fenced: drivers whose mirrors are lost by it.
        events: what drivers hear from its start to its end, in order; faults are left out unless one is named, and
            drivers that are not named may hear anything.
        counters: of the driver's mirror, by the names of MirrorStatistics.
        within_s: how long it may take.
    """

    error: str = ""
    signal: str = ""
    data: bytes | None = None
    entries: int | None = None
    retry: bool | None = None
    fenced: frozenset[str] = frozenset()
    events: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    counters: Mapping[str, int] = field(default_factory=dict)
    within_s: float = WITHIN_S


@dataclass(frozen=True, slots=True)
class Step:
    """One step.

    Attributes:
        line: of its `[[steps]]`.
        kind: process, driver, program, file, wait, give_up, pending, hold, reached, release or fail.
        subject: name of the process, driver, program, file, background step or hold, or what fails.
        call: what a process, driver, program or file does; "" for other kinds.
        background: the name by which a later step waits for it; "" for a step that is waited for at once.
        note: what it is there for, in words.
    """

    line: int
    kind: str
    subject: str
    call: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    background: str = ""
    note: str = ""
    expectation: Expectation = field(default_factory=Expectation)

    def __str__(self) -> str:
        return " ".join(filter(None, ("" if self.call else self.kind, self.subject, self.call)))


@dataclass(frozen=True, slots=True)
class Scenario:
    """A scenario that makes sense.

    Attributes:
        title: what happens in it, as a sentence.
        rule: the rule that it shows, in words; "" for none.
        settings: of the daemon, by name.
        files: size in bytes by name.
    """

    path: Path
    title: str
    rule: str
    settings: Mapping[str, object]
    processes: tuple[str, ...]
    files: Mapping[str, int]
    drivers: Mapping[str, DriverSpec]
    programs: Mapping[str, ProgramSpec]
    steps: tuple[Step, ...]

    @property
    def name(self) -> str:
        """By which it is run when it is of the library."""
        return self.path.stem
