"""When each recorded call took effect, and which child each fork made.

The kernel acts at some moment between a call's entry and its return; when the log shows lines of other threads in
between, the moment is chosen so that no line contradicts it.  Memory that is given back is free from the entry on
(another thread may get it before munmap returns); memory that is handed out is there when the call returns.  mremap
does both at once: it acts at its return, or earlier, just before another call returns memory that it gave back.
A process exists before its first line, also when that line precedes the return of the fork that made it.  exec and
exit act at their entry.

Invariants: effects of one thread keep their order; every call of the log is an effect, once.
Absent: what the effects are.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from hmm_client.recordings.arguments import ArgumentError, number
from hmm_client.recordings.strace import Call, Ended, Event, Log, Signal, Superseded

CREATING = frozenset({"fork", "vfork", "clone", "clone2", "clone3"})
"""Calls that make a process or a thread."""
EXECUTING = frozenset({"execve", "execveat"})
"""Calls that replace the program."""
EXITING = frozenset({"exit", "exit_group", "_exit"})
"""Calls that never return."""
_ACT_AT_ENTRY = frozenset({"munmap", "shmdt"}) | EXECUTING | EXITING
_HAND_OUT = frozenset({"mmap", "mmap2", "old_mmap", "mremap", "shmat", "map_shadow_stack"})

_BEFORE, _AT = 0, 1
_Position: TypeAlias = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Effect:
    """One event of the log, at the place where it takes effect.

    Attributes:
        event: what the log shows.
        child: process id of what a creating call made, as the log's lines name it; None when it made nothing.
    """

    event: Call | Ended | Superseded
    child: int | None = None


def effects(log: Log) -> list[Effect]:
    """The events of `log` in the order in which they took effect; signals are left out.

    Cost: O(events log events), and for each split mremap the events that stand inside it.
    """
    born = _first_lines(log.events)
    children = _children(log, born)
    placed: list[tuple[_Position, Effect]] = []
    for event in log.events:
        if isinstance(event, Signal):
            continue
        child = children.get(event.line) if isinstance(event, Call) else None
        position = _position(event, log.events, child, born) if isinstance(event, Call) else (event.line, _AT)
        placed.append((position, Effect(event, child)))
    placed.sort(key=lambda entry: entry[0])
    return [effect for _, effect in placed]


def _position(call: Call, events: tuple[Event, ...], child: int | None, born: dict[int, list[int]]) -> _Position:
    if call.name in _ACT_AT_ENTRY:
        return call.line, _AT
    if child is not None:
        first_line = _next_life(born, child, call.line)
        if first_line is not None and first_line < call.end_line:
            return first_line, _BEFORE
    if call.name == "mremap" and call.is_split and call.succeeded:
        return _before_reuse(call, events)
    return call.end_line, _AT


def _before_reuse(mremap: Call, events: tuple[Event, ...]) -> _Position:
    """Just before the first line that shows the old addresses in other hands; else where mremap returned."""
    start = number(mremap.arguments[0])
    end = start + number(mremap.arguments[1])
    returns = [
        call.end_line
        for call in _between(events, mremap.line, mremap.end_line)
        if call.name in _HAND_OUT and _hands_out(call, start, end)
    ]
    return (min(returns), _BEFORE) if returns else (mremap.end_line, _AT)


def _between(events: tuple[Event, ...], first: int, last: int) -> Iterable[Call]:
    """The calls that returned between two lines."""
    for event in events:
        if event.line >= last:
            return
        if isinstance(event, Call) and first < event.end_line < last:
            yield event


def _hands_out(call: Call, start: int, end: int) -> bool:
    if call.result is None or not call.succeeded:
        return False
    try:
        length = number(call.arguments[2 if call.name == "mremap" else 1])
    except (ArgumentError, IndexError):
        length = 1
    return call.result < end and start < call.result + length


def _first_lines(events: tuple[Event, ...]) -> dict[int, list[int]]:
    """For each process id the lines where it begins to appear: more than one when the kernel used it again."""
    alive: set[int] = set()
    born: dict[int, list[int]] = {}
    for event in events:
        if event.pid not in alive:
            alive.add(event.pid)
            born.setdefault(event.pid, []).append(event.line)
        if isinstance(event, Ended):
            alive.discard(event.pid)
    return born


def _next_life(born: dict[int, list[int]], pid: int, line: int) -> int | None:
    lines = born.get(pid, [])
    index = bisect_right(lines, line)
    return lines[index] if index < len(lines) else None


def _children(log: Log, born: dict[int, list[int]]) -> dict[int, int]:
    """Line of each creating call that made something -> process id of what it made.

    A program in a process id namespace of its own is told other ids than the log shows, and a killed parent is told
    none.  Such a child is that of the latest call before it that made nobody the log knows.
    """
    children: dict[int, int] = {}
    claimed: set[tuple[int, int]] = set()
    unclaimed: list[Call] = []
    for call in log.calls:
        if call.name not in CREATING or call.errno is not None or call.result == 0:
            continue
        first_line = None if call.result is None else _next_life(born, call.result, call.line)
        if call.result is None or first_line is None:
            unclaimed.append(call)
        else:
            claimed.add((call.result, first_line))
        if call.result is not None:
            children[call.line] = call.result
    first_pid = log.events[0].pid if log.events else 0
    lives = sorted((line, pid) for pid, lines in born.items() for line in lines)
    for line, pid in lives:
        if pid == first_pid or (pid, line) in claimed:
            continue
        parents = [call for call in unclaimed if call.line < line]
        if parents:
            children[parents[-1].line] = pid
            unclaimed.remove(parents[-1])
    return children
