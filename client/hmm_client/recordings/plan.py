"""From a log to steps: who is which process, and what each call means for its layout.

Threads (CLONE_THREAD) are their process.  A fork has a space of its own from the start, a vfork and a bare CLONE_VM
from their exec on.  What an exec maps is not recorded, so a process is partial behind it; if that is the first
process, its final layout can't be compared.  A child is partial too when other threads changed the layout while it
was copied: whether before or after, the log does not show.

Source: clone(2), vfork(2), execve(2), exit_group(2).
Invariants: every call of the log gives at least one step; the steps of a process stand behind the one that made it
    and before its Exit, except Ignored ones.
Absent: layouts; execution.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from hmm.units import PAGE_SIZE, TASK_SIZE, page_up
from hmm_client.recordings import flags
from hmm_client.recordings.arguments import ArgumentError, descriptor, fields, flag_names, number, string
from hmm_client.recordings.decode import DECODERS, IGNORED, REPLAYED_ERRORS
from hmm_client.recordings.errors import RecordingError
from hmm_client.recordings.growth import Growth
from hmm_client.recordings.maps import Area
from hmm_client.recordings.order import CREATING, EXECUTING, EXITING, Effect, effects
from hmm_client.recordings.segments import Segments
from hmm_client.recordings.state import Break, HugeFiles, made_executable, reads_execute
from hmm_client.recordings.steps import (
    Appear,
    Brk,
    Detach,
    Exec,
    Exit,
    Failed,
    Fork,
    GrowStack,
    Ignored,
    Interrupted,
    Lock,
    Map,
    Origin,
    ProcessIndex,
    Protect,
    Step,
    Thread,
    ThreadExit,
    Unknown,
    Unlock,
    Unmap,
    Vfork,
)
from hmm_client.recordings.strace import Call, Ended, Event, Log, Signal, Superseded

_SHARED, _WRITE = flags.MAP["MAP_SHARED"], flags.PROT["PROT_WRITE"]
FIRST: ProcessIndex = 0
"""The process whose layouts were recorded."""


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """A process of the recording.

    Attributes:
        index: its number in the plan.
        pid: its id in the log.
        parent: who made it; None for the first, and for one that appears from nowhere.
    """

    index: ProcessIndex
    pid: int
    parent: ProcessIndex | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do to repeat a recording.

    Attributes:
        steps: in the order in which the calls took effect.
        processes: by number.
        incomparable: why the final layout of the first process can't be compared; None when it can.
        ending: line of the log where a thread of the first process began to end it, or got the signal that did.  Its
            final layout was read at some time between this line and its Exit, while other threads may have gone on.
            None when it ends otherwise.
    """

    steps: tuple[Step, ...]
    processes: tuple[ProcessInfo, ...]
    incomparable: str | None
    ending: int | None = None

    def counts(self) -> Counter[str]:
        """How many steps there are of each kind, by class name."""
        return Counter(type(step).__name__ for step in self.steps)


def make_plan(log: Log, initial: Sequence[Area] = (), final: Sequence[Area] = ()) -> Plan:
    """Turn a log into steps.

    Args:
        log: a log with at least one call; the process of the first call is the first process.
        initial: layout of the first process at the start; with `final` it shows whether the stack grew.
        final: layout of the first process at the end.

    Raises:
        RecordingError: a call whose arguments are not understood, with file and line; a log without calls.

    Cost: O(calls log calls).
    """
    calls = log.calls
    if not calls:
        raise RecordingError("no system call was recorded", log.path)
    endings = deque(_endings(log))
    planner = _Planner(log.path, calls, endings, Segments([*initial, *final]), Growth(initial, final, calls))
    for effect in effects(log):
        planner.take(effect)
    return planner.finish()


@dataclass(slots=True)
class _Task:
    """A thread in the log.

    Attributes:
        executable: whether what it maps to be read may be executed, too: READ_IMPLIES_EXEC.
    """

    process: ProcessIndex
    call: Call
    retired: bool = False
    executable: bool = False


@dataclass(slots=True)
class _Planner:
    path: Path | None
    calls: tuple[Call, ...]
    endings: deque[Call | Signal]
    segments: Segments
    growth: Growth
    first: Call = field(init=False)
    began: int = field(init=False)
    steps: list[Step] = field(default_factory=list)
    processes: list[ProcessInfo] = field(default_factory=list)
    tasks: dict[int, _Task] = field(default_factory=dict)
    threads: dict[ProcessIndex, set[int]] = field(default_factory=dict)
    partial: set[ProcessIndex] = field(default_factory=set)
    breaks: dict[ProcessIndex, Break] = field(default_factory=dict)
    huge_files: HugeFiles = field(default_factory=HugeFiles)
    memory_calls: dict[int, list[Call]] = field(default_factory=dict)
    planned: set[int] = field(default_factory=set)
    sealed: dict[ProcessIndex, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    writable: set[str] = field(default_factory=set)
    incomparable: str | None = None
    ending: int | None = None

    def __post_init__(self) -> None:
        self.first = self.calls[0]
        self.new_process(self.first.pid, None, self.first)
        self.began = _first_read(self.first.pid, self.calls)
        for call in self.calls:
            if call.name in DECODERS:
                self.memory_calls.setdefault(call.pid, []).append(call)

    def finish(self) -> Plan:
        if FIRST in self.threads:  # the log ends before the process
            self.grow(self.calls[-1], self.growth.rest())
        return Plan(tuple(self.steps), tuple(self.processes), self.incomparable, self.ending)

    def take(self, effect: Effect) -> None:
        event = effect.event
        if isinstance(event, Ended):
            self.end_of_thread(event)
        elif isinstance(event, Superseded):
            self.tasks.pop(event.by, None)
        elif event.line not in self.planned:
            self.take_call(event, effect.child)

    def take_call(self, call: Call, child: int | None) -> None:
        self.planned.add(call.line)
        self.begin_to_end(call)
        task = self.tasks.get(call.pid) or self.appear(call)
        task.call = call
        origin = self.origin(task)
        executes = call.name in EXECUTING and call.succeeded
        try:
            if call is self.first and executes:
                self.steps.append(Ignored(origin, "the program starts here; its layout was recorded"))
            elif executes:
                self.execute(call, task)
            elif task.retired:
                self.steps.append(Ignored(origin, "its thread was ending"))
            elif call.name in EXITING:
                self.exit(call, task)
            elif child is not None:
                self.create(call, child, task, origin)
            elif call.line < self.began and task.process == FIRST:
                self.steps.append(Ignored(origin, "its effect is in the first layout, which was read later"))
            else:
                self.take_step(self.in_its_state(self.step(call, origin), task))
        except ValueError as error:  # ArgumentError, or a number of arguments that the call does not have
            raise RecordingError(f"{call.name}: {error}", self.path, call.line) from error
        except IndexError:
            raise RecordingError(f"{call.name}: too few arguments", self.path, call.line) from None

    def begin_to_end(self, call: Call) -> None:
        """Take note of every exit_group that was entered, and every signal that was fatal, before a call acts."""
        while self.endings and self.endings[0].line <= call.end_line:
            begun = self.endings.popleft()
            task = self.tasks.get(begun.pid)
            if task is not None and task.process == FIRST and self.ending is None:
                self.ending = begun.line
                self.grow(task.call, self.growth.rest())

    def take_step(self, step: Step) -> None:
        if step.process == FIRST:
            self.grow(step.call, self.growth.before(step))
            self.growth.made(step)
        if isinstance(step, Map) and step.source and step.flags & _SHARED and step.prot & _WRITE:
            self.writable.add(step.source)
        self.steps.append(step)

    def in_its_state(self, step: Step, task: _Task) -> Step:
        """What a step means with all that was set before it."""
        if step.call.name == "personality" and step.call.succeeded:
            task.executable = reads_execute(step.call, before=task.executable)
        if step.call.name == "memfd_create" and step.call.succeeded:
            self.huge_files.created(step.call)
        if isinstance(step, Brk):
            return self.breaks[task.process].step(step, executable=task.executable)
        step = self.huge_files.whole(step)
        return made_executable(step) if task.executable else step

    def step(self, call: Call, origin: Origin) -> Step:
        """The step of a call that neither makes nor ends anybody."""
        if call.name.startswith("?") and not call.returned:
            return Ignored(origin, "its thread was gone before it could be seen")
        if call.name not in _KNOWN:
            return Unknown(origin)
        if call.result is None:
            return Ignored(origin, "it did not return")
        decoder = DECODERS.get(call.name)
        if call.errno is not None:
            return self.failed_step(call, origin, call.errno)
        if decoder is not None:
            return decoder(origin, call.arguments, call.result)
        return self.other_step(call, origin, call.result)

    def failed_step(self, call: Call, origin: Origin, errno: str) -> Step:
        """The step of a call that failed."""
        decoder = DECODERS.get(call.name)
        if decoder is None or errno not in REPLAYED_ERRORS.get(call.name, ()):
            return Failed(origin, errno, None)
        attempt = decoder(origin, call.arguments, 0)
        if isinstance(attempt, Protect | Lock | Unlock):
            sealed, writable = self.sealed.get(origin.process, ()), frozenset(self.writable)
            return Interrupted(origin, errno, attempt, sealed, writable)
        return Failed(origin, errno, None if isinstance(attempt, Ignored | Unknown) or _unsaid(attempt) else attempt)

    def other_step(self, call: Call, origin: Origin, result: int) -> Step:
        """The step of a successful call without decoder."""
        if call.name == "shmat":
            return self.segments.attach(origin, call, result)
        if call.name == "shmdt":
            return Detach(origin, number(call.arguments[0]))
        if call.name == "shmget":
            self.segments.created(call, result)
        if call.name == "mseal":
            start, length = number(call.arguments[0]), number(call.arguments[1])
            self.sealed[origin.process] = (*self.sealed.get(origin.process, ()), (start, page_up(start + length)))
        return Ignored(origin, IGNORED.get(call.name, "it made nobody"))

    def create(self, call: Call, pid: int, parent: _Task, origin: Origin) -> None:
        """fork, vfork, clone or clone3 made `pid`."""
        names = _clone_flags(call)
        if "CLONE_THREAD" in names:
            self.steps.append(Thread(origin, pid))
            self.tasks[pid] = _Task(origin.process, call, executable=parent.executable)
            self.threads[origin.process].add(pid)
            return
        child = self.new_process(pid, origin.process, call)
        if origin.partial or ("CLONE_VM" not in names and self.others_act(call, origin.process)):
            self.partial.add(child)
        self.sealed[child] = self.sealed.get(origin.process, ())
        self.tasks[pid].executable = parent.executable
        shared = self.breaks[origin.process]
        self.breaks[child] = shared if "CLONE_VM" in names else replace(shared)
        if "CLONE_VM" in names:
            self.steps.append(Vfork(origin, child))
        else:
            self.steps.append(Fork(origin, child))

    def others_act(self, fork: Call, process: ProcessIndex) -> bool:
        """Whether another thread may have changed the layout before it was copied, or just afterwards."""
        for pid in self.threads[process] - {fork.pid}:
            calls = self.memory_calls.get(pid, [])
            index = bisect_right(calls, fork.line, key=lambda call: call.end_line)
            if index < len(calls) and calls[index].line < fork.end_line:
                return True
        return False

    def execute(self, call: Call, task: _Task) -> None:
        """The program is replaced: the other threads end, and what is mapped now was not recorded."""
        process = task.process
        if process == FIRST:
            self.incomparable = f"line {call.line}: the first process starts another program, whose layout is unknown"
        self.partial.add(process)
        self.sealed.pop(process, None)
        self.breaks[process] = Break()
        self.retire(process)
        task.retired = task.executable = False
        self.threads[process] = {call.pid}
        later = (brk for brk in self.memory_calls.get(call.pid, ()) if brk.name == "brk" and brk.line > call.line)
        first = next(later, None)
        self.steps.append(Exec(self.origin(task), _program(call), first.result if first else None))

    def exit(self, call: Call, task: _Task) -> None:
        process = task.process
        if call.name != "exit_group" and self.threads[process] != {call.pid}:
            self.end_one_thread(call.pid, task)
            return
        for pid in sorted(self.threads[process]):
            calls = self.memory_calls.get(pid, [])
            index = bisect_right(calls, call.end_line, key=lambda other: other.end_line)
            if index < len(calls) and calls[index].line < call.end_line and calls[index].succeeded:
                # It had been entered, and returned while exit_group waited for the thread: it was done.
                self.take_call(calls[index], None)
        self.end_process(task, number(call.arguments[0]) if call.arguments else None)

    def end_of_thread(self, ended: Ended) -> None:
        """The log says that a thread is gone; its exit was seen before unless a signal ended it."""
        task = self.tasks.get(ended.pid)
        if task is not None and not task.retired:
            if self.threads[task.process] == {ended.pid}:
                self.end_process(task, ended.status)
            else:
                self.end_one_thread(ended.pid, task)
        self.tasks.pop(ended.pid, None)

    def end_one_thread(self, pid: int, task: _Task) -> None:
        self.steps.append(ThreadExit(self.origin(task), pid))
        self.threads[task.process].discard(pid)
        task.retired = True

    def end_process(self, task: _Task, status: int | None) -> None:
        if task.process == FIRST:
            self.grow(task.call, self.growth.rest())
        self.steps.append(Exit(self.origin(task), status))
        self.retire(task.process)
        del self.threads[task.process]

    def retire(self, process: ProcessIndex) -> None:
        for pid in self.threads[process]:
            self.tasks[pid].retired = True

    def grow(self, call: Call, grown: list[tuple[int, int]]) -> None:
        if self.incomparable is None:
            self.steps += [GrowStack(Origin(FIRST, call), start, end) for start, end in grown]

    def appear(self, call: Call) -> _Task:
        """A process whose making the log does not show."""
        process = self.new_process(call.pid, None, call)
        self.partial.add(process)
        self.steps.append(Appear(Origin(process, call, partial=True)))
        return self.tasks[call.pid]

    def new_process(self, pid: int, parent: ProcessIndex | None, call: Call) -> ProcessIndex:
        index = len(self.processes)
        self.processes.append(ProcessInfo(index, pid, parent))
        self.tasks[pid] = _Task(index, call)
        self.threads[index] = {pid}
        self.breaks[index] = Break()
        return index

    def origin(self, task: _Task) -> Origin:
        return Origin(task.process, task.call, task.process in self.partial)


_HELD = "(DELAYED)"
"""What strace writes behind a call that it was told to delay."""
_KNOWN = DECODERS.keys() | IGNORED.keys() | CREATING | EXECUTING | {"shmat", "shmdt"}


def _first_read(pid: int, calls: Sequence[Call]) -> int:
    """Line of the call during which the first layout was read: a first brk that was held; 0 if there is none.

    For the dynamic loader and most programs without it that is their first memory call, but not for all.
    """
    brk = next((call for call in calls if call.pid == pid and call.name == "brk"), None)
    return brk.line if brk is not None and brk.text.endswith(_HELD) else 0


def _endings(log: Log) -> Iterator[Call | Signal]:
    """Where processes begin to end: at each exit_group, and at each signal behind which its thread made no call."""
    last: dict[int, Event] = {}
    fatal = set()
    for event in log.events:
        before = last.get(event.pid)
        if isinstance(event, Ended) and isinstance(before, Signal) and before.name == event.signal:
            fatal.add(before.line)
        last[event.pid] = event
    for event in log.events:
        if isinstance(event, Call | Signal) and (event.line in fatal or event.name == "exit_group"):
            yield event


def _unsaid(attempt: Step) -> bool:
    """Whether a call failed for what neither its arguments nor a layout say: it would have cut a huge page of hugetlb.

    Source: Linux mm/hugetlb.c, hugetlb_vm_op_split().
    """
    if not isinstance(attempt, Unmap):
        return False
    return attempt.address % PAGE_SIZE == 0 and 0 < attempt.length <= TASK_SIZE - attempt.address


def _clone_flags(call: Call) -> frozenset[str]:
    """The CLONE_ flags of a call in CREATING.

    Raises:
        ArgumentError: the log does not say them.
    """
    if call.name == "fork":
        return frozenset()
    if call.name == "vfork":
        return frozenset({"CLONE_VM", "CLONE_VFORK"})
    named = fields(call.arguments[0] if call.name == "clone3" else ", ".join(call.arguments))
    if "flags" not in named:
        raise ArgumentError(f"no flags in {', '.join(call.arguments)!r}")
    return flag_names(named["flags"])


def _program(call: Call) -> str:
    if call.name == "execve":
        return string(call.arguments[0])
    path = string(call.arguments[1])
    return path or descriptor(call.arguments[0]).path or ""
