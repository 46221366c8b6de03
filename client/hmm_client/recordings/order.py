"""When each recorded call took effect, and which child each fork made.

The kernel acts at some moment between a call's entry and its return; when the log shows lines of other threads in
between, the moment is chosen so that no line contradicts it.  Memory that is given back is free from the entry on
(another thread may get it before munmap returns); memory that is handed out is there when the call returns.  mremap
does both at once: it acts at its return, or earlier, just before another call returns memory that it gave back.
exec acts at its entry, and so does fork: of what other threads do meanwhile, the child knows nothing.  exit_group acts
at its return: what other threads were still answered until then they did, however long strace held it.

Invariants: effects of one thread keep their order; every call of the log is an effect, once.
Absent: what the effects are.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from hmm_client.recordings.arguments import number
from hmm_client.recordings.strace import Call, Ended, Event, Log, Signal, Superseded

CREATING = frozenset({"fork", "vfork", "clone", "clone2", "clone3"})
"""Calls that make a process or a thread."""
EXECUTING = frozenset({"execve", "execveat"})
"""Calls that replace the program."""
EXITING = frozenset({"exit", "exit_group", "_exit"})
"""Calls that never return."""
_ACT_AT_ENTRY = frozenset({"munmap", "shmdt", "io_destroy"}) | CREATING | EXECUTING
_MAPPING = frozenset({"mmap", "mmap2", "old_mmap", "shmat", "map_shadow_stack"})

# A line, and how many effects must come between this one and the line's own.
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

    Cost: O(n log n + n * threads) for n events.
    """
    children = _children(log)
    moved = _before_reuse(log.calls, _spaces(log.calls, children))
    placed: list[tuple[_Position, Effect]] = []
    for event in log.events:
        if isinstance(event, Call):
            position = moved.get(event.line, _usual_position(event))
            placed.append((position, Effect(event, children.get(event.line))))
        elif not isinstance(event, Signal):
            placed.append(((event.line, 0), Effect(event)))
    placed.sort(key=lambda entry: entry[0])
    return [effect for _, effect in placed]


def _usual_position(call: Call) -> _Position:
    return call.line if call.name in _ACT_AT_ENTRY else call.end_line, 0


def _before_reuse(calls: Sequence[Call], spaces: Mapping[int, int]) -> dict[int, _Position]:
    """Where to place each mremap whose old addresses another call got before it returned.

    It stands just before that call, which may be an mremap that stands just before a third one: positions only ever
    move up, until every addressee stands behind its giver.

    Returns: line of the mremap -> position.
    """
    handed_over = _handed_over(calls, spaces)
    positions: dict[int, _Position] = {}
    moving = True
    for _ in range(len(handed_over) + 1):  # a log that contradicts itself ends here
        if not moving:
            break
        moving = False
        for giver, takers in handed_over:
            line, rank = min(positions.get(taker.line, _usual_position(taker)) for taker in takers)
            if (line, rank - 1) < positions.get(giver.line, _usual_position(giver)):
                positions[giver.line] = line, rank - 1
                moving = True
    return positions


def _handed_over(calls: Sequence[Call], spaces: Mapping[int, int]) -> list[tuple[Call, list[Call]]]:
    """Each mremap, with the calls that ran at the same time and got addresses it gave back."""
    takers: dict[int, list[Call]] = {}
    givers: dict[int, Call] = {}
    running: list[Call] = []
    for call in calls:
        running = [other for other in running if other.end_line > call.line]
        for other in running:
            if spaces.get(other.pid, other.pid) != spaces.get(call.pid, call.pid):
                continue
            for giver, taker in ((call, other), (other, call)):
                if _overlap(_exchanged(giver)[0], _exchanged(taker)[1]):
                    givers[giver.line] = giver
                    takers.setdefault(giver.line, []).append(taker)
        if call.is_split:
            running.append(call)
    return [(giver, takers[line]) for line, giver in givers.items()]


def _overlap(left: tuple[int, int] | None, right: tuple[int, int] | None) -> bool:
    return left is not None and right is not None and left[0] < right[1] and right[0] < left[1]


def _exchanged(call: Call) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """The addresses that a call gave back and handed out; of one that is not understood, its step will say so."""
    try:
        return given(call), taken(call)
    except (ValueError, IndexError):
        return None, None


def given(call: Call) -> tuple[int, int] | None:
    """The addresses [start, end) that an mremap gave back.  Raises: ValueError, IndexError as for its step."""
    if call.name != "mremap" or not call.succeeded:
        return None
    start, length, new_length = (number(text) for text in call.arguments[:3])
    if start == call.result:
        return (start + new_length, start + length) if new_length < length else None
    return None if "MREMAP_DONTUNMAP" in call.arguments[3] else (start, start + length)


def taken(call: Call) -> tuple[int, int] | None:
    """The addresses [start, end) that a call handed out.  Raises: as `given`."""
    if call.result is None or not call.succeeded:
        return None
    if call.name == "mremap":
        start, length, new_length = (number(text) for text in call.arguments[:3])
        if start == call.result:
            return (start + length, start + new_length) if new_length > length else None
        return call.result, call.result + new_length
    if call.name not in _MAPPING:
        return None
    length = 1 if call.name == "shmat" else number(call.arguments[1])
    return call.result, call.result + length


def _spaces(calls: Sequence[Call], children: Mapping[int, int]) -> dict[int, int]:
    """For each thread that shares its maker's address space, the process id that stands for the space."""
    spaces: dict[int, int] = {}
    for call in calls:
        child = children.get(call.line)
        if child is not None and (call.name == "vfork" or "CLONE_VM" in call.text):
            spaces[child] = spaces.get(call.pid, call.pid)
    return spaces


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


def _children(log: Log) -> dict[int, int]:
    """Line of each creating call that made something -> process id of what it made.

    A program in a process id namespace of its own is told other ids than the log shows, and a killed parent is told
    none.  Such a child is that of the latest call before it that made nobody the log knows.
    """
    born = _first_lines(log.events)
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
