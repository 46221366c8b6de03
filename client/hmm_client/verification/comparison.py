"""Comparing a trace with what a subject does, operation by operation.

Every field of the result and every state is one comparison of one *aspect*, at one of three levels.

**Invariants**: after a trace's first difference in a result the trace goes on, so that each operation is counted;
    what a trace does not say is not compared.

**Absent**: performing the operations (`operations`, `device_operations`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

from hmm_client.recordings.ktrace import Operation, Result, State, Trace, canonical_maps
from hmm_client.verification.operations import TraceRun
from hmm_client.verification.subject import Subject

CONTEXT_OPERATIONS = 5
"""How many operations before a difference are shown with it."""


class Level(Enum):
    """How much a comparison says.

    SEMANTIC must be equal for a model of HMM; MIRROR depends on which entries the test driver's own table still holds;
    DETAIL is the kernel's bookkeeping.
    """

    SEMANTIC = "semantic"
    MIRROR = "mirror"
    DETAIL = "detail"


class Aspect(Enum):
    """What is compared."""

    RET = "ret"
    ERRNO = "errno"
    SIGNAL = "sig"
    SIGNAL_PAGE = "sigpage"
    VALUES = "vals"
    DATA = "data"
    SHOWN = "prot"
    COPIED = "cpages"
    FAULTS = "faults"
    PROCESSES = "processes"
    MAPS = "maps"
    SNAPSHOT = "snapshot"
    OTHER_SNAPSHOT = "other snapshot"
    RAW_MAPS = "raw maps"
    PAGEMAP = "pagemap"


_RESULTS = (
    Aspect.RET, Aspect.ERRNO, Aspect.SIGNAL, Aspect.SIGNAL_PAGE, Aspect.VALUES, Aspect.DATA, Aspect.SHOWN,
    Aspect.COPIED, Aspect.FAULTS,
)  # fmt: skip
_LEVELS = {Aspect.FAULTS: Level.MIRROR, Aspect.RAW_MAPS: Level.DETAIL, Aspect.PAGEMAP: Level.DETAIL}
_READ_BACK = frozenset({"mig_dev", "excl"})


@dataclass(slots=True)
class Counts:
    """How much was compared, and how much of it differed."""

    compared: int = 0
    differences: int = 0

    def add(self, other: Counts) -> None:
        """Count what the other has counted too."""
        self.compared += other.compared
        self.differences += other.differences


@dataclass(frozen=True, slots=True)
class Difference:
    """One comparison that failed.

    Attributes:
        level: how much it says.
        process: whose state; None for a result.
        before: the operations before it, oldest first.
    """

    trace: Trace
    operation: Operation
    aspect: Aspect
    level: Level
    process: int | None
    expected: object
    found: object
    before: tuple[Operation, ...]


@dataclass(slots=True)
class TraceReport:
    """What became of one trace.

    Attributes:
        operations: performed and compared.
    """

    trace: Trace
    operations: int = 0
    counts: dict[Level, Counts] = field(default_factory=lambda: {level: Counts() for level in Level})
    differences: list[Difference] = field(default_factory=list)


def verify(trace: Trace, subject: Subject) -> TraceReport:
    """Perform a trace on a subject that nothing was done to yet, and compare after every operation.

    Cost: in process about 2 ms per operation, most of it for comparing what every page is after it.
    """
    report = TraceReport(trace)
    run = TraceRun(trace, subject)
    before: deque[Operation] = deque(maxlen=CONTEXT_OPERATIONS)
    for operation in trace.operations:
        report.operations += 1
        for aspect, level, process, expected, found in _compared(run, operation):
            counts = report.counts[level]
            counts.compared += 1
            if expected != found:
                counts.differences += 1
                difference = Difference(trace, operation, aspect, level, process, expected, found, tuple(before))
                report.differences.append(difference)
        before.append(operation)
    return report


_Compared: TypeAlias = "tuple[Aspect, Level, int | None, object, object]"


def _compared(run: TraceRun, operation: Operation) -> Iterator[_Compared]:
    found = run.perform(operation)
    level = _level(operation, found)
    for aspect in _RESULTS:
        expected = getattr(operation.result, aspect.value)
        yield aspect, _LEVELS.get(aspect, level), None, expected, getattr(found, aspect.value)
    alive = sorted(state.process for state in operation.states)
    yield Aspect.PROCESSES, Level.SEMANTIC, None, alive, sorted(run.processes)
    states = [state for state in operation.states if state.process in run.processes]
    processes = [state.process for state in states]
    for state, shown, pagemap in zip(states, run.snapshots(processes), run.pagemaps(processes), strict=True):
        yield from _states(run, state, shown, pagemap)


def _level(operation: Operation, found: Result) -> Level:
    """What depends on the entries of the driver's table: an ENOENT expected or found, and CHECK_EXCLUSIVE."""
    missing = operation.name in _READ_BACK and "ENOENT" in (operation.result.errno, found.errno)
    return Level.MIRROR if missing or operation.name == "chk_excl" else Level.SEMANTIC


def _states(run: TraceRun, state: State, shown: list[bytes], pagemap: bytes) -> Iterator[_Compared]:
    process = state.process
    if state.maps is not None:
        maps = run.maps(process)
        expected, found = canonical_maps(state.maps), canonical_maps(maps)
        yield Aspect.MAPS, Level.SEMANTIC, process, expected, found
        if expected == found:
            yield Aspect.RAW_MAPS, Level.DETAIL, process, state.maps, maps
    yield Aspect.SNAPSHOT, Level.SEMANTIC, process, state.s0, shown[0]
    if state.s1 != state.s0 or shown[1] != shown[0]:
        yield Aspect.OTHER_SNAPSHOT, Level.SEMANTIC, process, state.s1, shown[1]
    yield Aspect.PAGEMAP, Level.DETAIL, process, state.pm, pagemap
