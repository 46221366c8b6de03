"""Reader of strace's log: lines in, calls out.

A call that another thread's line interrupts stands on two lines, `munmap(0x1000, 4096 <unfinished ...>` and
`<... munmap resumed>) = 0`; it becomes one `Call` that knows both.  The log must have been written to a file
(`strace -o`), where every line of a log with several processes names its process; a log of a single process
may name none.

Source: strace 6.1, src/strace.c, src/syscall.c; strace(1).
Invariants: events are in the order of their first line; a line that means something is an event, or part of one.
Absent: what calls mean (`plan`), and what their arguments mean (`arguments`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeAlias

from hmm_client.recordings.arguments import split
from hmm_client.recordings.errors import RecordingError

_PREFIX = re.compile(
    r"(?:\[pid\s+(\d+)\]\s+|(\d+)(?:<[^>]*>)?\s+)?"  # process: the second form, of -o, may carry a name (-Y)
    r"(?:\d\d:\d\d:\d\d(?:\.\d+)?\s+|\s*\d+\.\d+\s+)*"  # -t, -tt, -ttt, -r
)
_CALL = re.compile(r"([a-zA-Z_]\w*|\?{3,4})\s*\(")
_RESUMED = re.compile(r"<\.\.\. (\S+) resumed>")
_UNFINISHED = re.compile(
    r"\s*<(?:(?:unfinished|detached) \.\.\.|Cannot restart pid \d+ with ptrace\(\w+\): [^>]*)>(\)\s*=\s*\?)?$"
)
_MOVED = re.compile(r"\s*<pid changed to (\d+) \.\.\.>$")
_SECONDS = re.compile(r"\s+<\d+\.\d+>$")
_RESULT = re.compile(r"\s*=\s*(\?|-?(?:0x[0-9a-f]+|\d+))(?:<(?:[^<>]|<[^<>]*>)*>(?:\(deleted\))?)?(.*)$", re.DOTALL)
_ERRNO = re.compile(r"\s+(E[A-Z0-9_]+)\b|\s+\(errno (\d+)\)")
_EXITED = re.compile(r"\+\+\+ exited with (\d+) \+\+\+$")
_KILLED = re.compile(r"\+\+\+ killed by (\S+)(?: \(core dumped\))? \+\+\+$")
_SUPERSEDED = re.compile(r"\+\+\+ superseded by execve in pid (\d+) \+\+\+$")
_SIGNAL = re.compile(r"--- (?:stopped by )?(\S+)")
# Said by strace itself, about itself.
_REMARK = re.compile(r"strace: |\[ Process PID=\d+ runs in .* mode\. \]$")
_YOUNGER = (
    "cachestat fchmodat2 map_shadow_stack futex_wake futex_wait futex_requeue statmount listmount lsm_get_self_attr "
    "lsm_set_self_attr lsm_list_modules mseal setxattrat getxattrat listxattrat removexattrat open_tree_attr "
    "file_getattr file_setattr listns"
)
_NAMES_BY_NUMBER = {f"syscall_{number:#x}": name for number, name in enumerate(_YOUNGER.split(), 451)}
"""Calls younger than the strace that Debian 12 ships: it takes a number that it does not know for one of %memory."""


@dataclass(frozen=True, slots=True)
class Call:
    """One system call.

    Attributes:
        pid: the thread that made it; 0 in a log without process ids.
        name: the call's name; `???` or `????` when strace could not tell.
        arguments: their texts; see `arguments`.
        result: the return value; None when the call did not return (`= ?`, exit, a killed or unfinished thread).
        errno: name of the error; None when it succeeded or did not return.  A restarted call has no result and
            the kernel's internal name here, ERESTARTSYS.
        line: 1-based line where the call was entered.
        end_line: line where it returned; equal to `line` unless the call was split.
        text: the call as strace would have printed it on one line, without the process id.
    """

    pid: int
    name: str
    arguments: tuple[str, ...]
    result: int | None
    errno: str | None
    line: int
    end_line: int
    text: str

    @property
    def failed(self) -> bool:
        """True when the call returned an error."""
        return self.result is not None and self.errno is not None

    @property
    def succeeded(self) -> bool:
        """True when the call returned without an error."""
        return self.result is not None and self.errno is None

    @property
    def returned(self) -> bool:
        """True when the call came back to the program."""
        return self.result is not None

    @property
    def is_split(self) -> bool:
        """True when lines of other threads may stand between entry and return."""
        return self.line != self.end_line


@dataclass(frozen=True, slots=True)
class Ended:
    """`+++ exited with 0 +++`, `+++ killed by SIGKILL +++`: one thread is gone.

    Attributes:
        status: exit status; None when a signal ended it.
        signal: name of that signal; None otherwise.
    """

    pid: int
    line: int
    status: int | None
    signal: str | None


@dataclass(frozen=True, slots=True)
class Superseded:
    """`+++ superseded by execve in pid N +++`: thread N called execve and took over the process id `pid`."""

    pid: int
    line: int
    by: int


@dataclass(frozen=True, slots=True)
class Signal:
    """`--- SIGCHLD {...} ---`: a signal was delivered, or stopped the thread."""

    pid: int
    line: int
    name: str


Event: TypeAlias = Call | Ended | Superseded | Signal


@dataclass(frozen=True, slots=True)
class Log:
    """A whole log.

    Attributes:
        path: the file, for messages; None when the lines came from elsewhere.
        events: everything in it, ordered by first line.
        lines: number of lines read.
    """

    path: Path | None
    events: tuple[Event, ...]
    lines: int

    @property
    def calls(self) -> tuple[Call, ...]:
        """The system calls alone."""
        return tuple(event for event in self.events if isinstance(event, Call))


def read_log(path: Path) -> Log:
    """Read a log from a file.

    Raises:
        RecordingError: unreadable, cut short within a line, or a line that strace does not write.

    Cost: O(length), about 15 µs per line.
    """
    try:
        text = path.read_bytes().decode("utf-8", "backslashreplace")
    except OSError as error:
        raise RecordingError(error.strerror or str(error), path) from error
    log = parse_log(text.removesuffix("\n").split("\n"), path)
    if text and not text.endswith(("\n", "+++")):
        raise RecordingError("the line has no end: is the log cut short?", path, log.lines)
    return log


def parse_log(lines: Iterable[str], path: Path | None = None) -> Log:
    """Read a log from its lines; `path` serves for messages.

    Raises:
        RecordingError: a line that strace does not write, with its number.
    """
    reader = LogReader(path)
    for line in lines:
        reader.read(line)
    return reader.finish()


class Entered(NamedTuple):
    """The first part of a call that has not returned yet, and its line."""

    line: int
    text: str


@dataclass(slots=True)
class LogReader:
    """Reads a log line by line, as it grows.

    Attributes:
        path: the file, for messages.
        line: number of lines read so far.
        events: what was read so far; whoever follows a log may empty it.
        entered: calls that have not returned yet, by process id.
    """

    path: Path | None
    line: int = 0
    events: list[Event] = field(default_factory=list)
    entered: dict[int, Entered] = field(default_factory=dict)
    _moving: dict[int, Entered] = field(default_factory=dict)
    _named: bool | None = None

    def read(self, raw: str) -> None:
        """Take one line, without its end.

        Raises:
            RecordingError: strace does not write such a line.
        """
        self.line += 1
        text = raw.rstrip()
        if not text or _REMARK.match(text):
            return
        prefix = _PREFIX.match(text)
        assert prefix is not None, "every part of the prefix may be absent"
        pid_text = prefix[1] or prefix[2]
        if self._named is not None and self._named != bool(pid_text):
            raise self._error("some lines name their process and some do not; record with strace -f -o FILE")
        self._named = bool(pid_text)
        self._read_event(int(pid_text or 0), text[prefix.end() :])

    def _read_event(self, pid: int, text: str) -> None:
        if text.startswith("+++"):
            self.events.append(self._end_of_thread(pid, text))
        elif text.startswith("---"):
            signal = _SIGNAL.match(text)
            if signal is None:
                raise self._error(f"not a line of strace: {text[:80]!r}")
            self.events.append(Signal(pid, self.line, signal[1]))
        elif resumed := _RESUMED.match(text):
            self._resume(pid, resumed[1], text[resumed.end() :])
        else:
            self._enter(pid, Entered(self.line, text))

    def _enter(self, pid: int, entered: Entered) -> None:
        """Take the whole text of a call, or its first part."""
        line, text = entered
        if moved := _MOVED.search(text):
            self._moving[int(moved[1])] = Entered(line, text[: moved.start()])
            return
        unfinished = _UNFINISHED.search(text)
        if unfinished is None:
            self.events.append(self._call(pid, line, text))
        elif unfinished[1]:
            self.events.append(self._call(pid, line, text[: unfinished.start()], unfinished=True))
        else:
            self.entered[pid] = Entered(line, text[: unfinished.start()])

    def _resume(self, pid: int, name: str, rest: str) -> None:
        entered = self.entered.pop(pid, None)
        if entered is None:
            raise self._error(f"{name} resumes, but process {pid or 'without id'} has entered no call")
        self._enter(pid, Entered(entered.line, entered.text + rest))

    def _call(self, pid: int, line: int, text: str, *, unfinished: bool = False) -> Call:
        head = _CALL.match(text)
        if head is None:
            raise self._error(f"not a line of strace: {text[:80]!r}")
        arguments, end = split(text, head.end())
        result, errno = (None, None) if unfinished else self._result(text, end)
        name = _NAMES_BY_NUMBER.get(head[1], head[1])
        return Call(pid, name, arguments, result, errno, line, self.line, text)

    def _result(self, text: str, end: int | None) -> tuple[int | None, str | None]:
        found = None if end is None else _RESULT.match(_SECONDS.sub("", text), end)
        if found is None:
            raise self._error(f"the call has no result: {text[:80]!r}; is the log cut short?")
        value, rest = found[1], found[2]
        errno = _ERRNO.match(rest) if value in {"-1", "?"} else None
        return None if value == "?" else int(value, 0), (errno[1] or f"errno {errno[2]}") if errno else None

    def _end_of_thread(self, pid: int, text: str) -> Event:
        entered = self.entered.pop(pid, None)
        if entered is not None:  # killed inside a call: strace says no more about it
            self.events.append(self._call(pid, *entered, unfinished=True))
        if superseded := _SUPERSEDED.match(text):
            by = int(superseded[1])
            execve = self._moving.pop(pid, None) or self.entered.pop(by, None)
            if execve is not None:  # it will return under the process id it took over
                self.entered[pid] = execve
            return Superseded(pid, self.line, by)
        if exited := _EXITED.match(text):
            return Ended(pid, self.line, int(exited[1]), None)
        if killed := _KILLED.match(text):
            return Ended(pid, self.line, None, killed[1])
        raise self._error(f"not a line of strace: {text[:80]!r}")

    def finish(self) -> Log:
        """Everything read, with the calls that never returned."""
        for pid, (line, text) in self.entered.items():
            self.events.append(self._call(pid, line, text, unfinished=True))
        self.events.sort(key=lambda event: event.line)
        return Log(self.path, tuple(self.events), self.line)

    def _error(self, text: str) -> RecordingError:
        return RecordingError(text, self.path, self.line)
