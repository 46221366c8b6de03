"""Comparing a trace with what a subject does, operation by operation, up to the first that acts through a device.

Every field of the result and every state is one comparison of one *aspect*.  The semantic aspects are what a model of
HMM must match; the entries (snapshots and page maps) are counted by themselves.

**Invariants**: after a trace's first difference in a result the trace goes on, so that each operation is counted;
    what a trace does not say is not compared.

**Absent**: what acts through a device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from hmm_client.recordings.ktrace import HANDLE_OPERATIONS, Operation, State, Trace, canonical_maps
from hmm_client.verification.operations import TraceRun, acts_through_device
from hmm_client.verification.subject import PAGEMAP_FILE, PAGEMAP_PRESENT, Subject

CONTEXT_OPERATIONS = 5
"""How many operations before a difference are shown with it."""


class Aspect(Enum):
    """What is compared."""

    RET = "ret"
    ERRNO = "errno"
    SIGNAL = "sig"
    SIGNAL_PAGE = "sigpage"
    VALUES = "vals"
    DATA = "data"
    PROCESSES = "processes"
    MAPS = "maps"
    SNAPSHOT = "snapshot"
    PAGEMAP = "pagemap"

    @property
    def is_semantic(self) -> bool:
        """True for what programs can see; False for what only the page table shows."""
        return self not in _ENTRIES


_ENTRIES = frozenset({Aspect.SNAPSHOT, Aspect.PAGEMAP})
_RESULTS = (Aspect.RET, Aspect.ERRNO, Aspect.SIGNAL, Aspect.SIGNAL_PAGE, Aspect.VALUES, Aspect.DATA)


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
        process: whose state; None for a result.
        before: the operations before it, oldest first.
    """

    trace: Trace
    operation: Operation
    aspect: Aspect
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
    semantic: Counts = field(default_factory=Counts)
    entries: Counts = field(default_factory=Counts)
    differences: list[Difference] = field(default_factory=list)


def verify(trace: Trace, subject: Subject) -> TraceReport:
    """Perform a trace on a subject that nothing was done to yet, and compare after every operation.

    Cost: in process about 100 us per operation, and that of the comparison.
    """
    report = TraceReport(trace)
    run = TraceRun(trace, subject)
    before: deque[Operation] = deque(maxlen=CONTEXT_OPERATIONS)
    for operation in trace.operations:
        if acts_through_device(operation):
            break
        report.operations += 1
        for aspect, process, expected, found in _compared(run, trace, operation):
            counts = report.semantic if aspect.is_semantic else report.entries
            counts.compared += 1
            if expected != found:
                counts.differences += 1
                report.differences.append(Difference(trace, operation, aspect, process, expected, found, tuple(before)))
        before.append(operation)
    return report


def _compared(run: TraceRun, trace: Trace, operation: Operation) -> Iterator[tuple[Aspect, int | None, object, object]]:
    found = run.perform(operation)
    if operation.name not in HANDLE_OPERATIONS:
        for aspect in _RESULTS:
            yield aspect, None, getattr(operation.result, aspect.value), getattr(found, aspect.value)
    yield Aspect.PROCESSES, None, sorted(state.process for state in operation.states), sorted(run.processes)
    for state in operation.states:
        if state.process in run.processes:
            yield from _states(run, trace, state)


def _states(run: TraceRun, trace: Trace, state: State) -> Iterator[tuple[Aspect, int, object, object]]:
    if state.maps is not None:
        maps = run.maps(state.process)
        yield Aspect.MAPS, state.process, canonical_maps(state.maps), canonical_maps(maps)
    if trace.header.thp == "always":  # huge pages populate neighbours, which this part does not
        return
    pages = run.page_states(state.process)
    if pages is not None:
        yield Aspect.SNAPSHOT, state.process, state.s0, pages.snapshot
        shown = bytes(digit & (PAGEMAP_PRESENT | PAGEMAP_FILE) for digit in state.pm)
        yield Aspect.PAGEMAP, state.process, shown, pages.pagemap
