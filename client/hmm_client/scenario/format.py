"""Reading a scenario: what may stand in it, and what is wrong with it, with the line.

**Invariants**: a scenario that was read names only what it has declared; a call has all its arguments.

**Absent**: what the calls do (`run`).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from hmm.events import EventType
from hmm.madvise import Advice
from hmm.mirror import DeadlinePolicy
from hmm.units import PAGE_SIZE
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot
from hmm_client.recordings.errors import InputError
from hmm_client.scenario.driver import BEHAVIOURS, Behaviour

REQUIRED = object()
WITHIN_S = 30.0
"""How long a step may take at most if it does not say."""


class ScenarioError(InputError):
    """A scenario that is not understood."""


class _WrongError(Exception):
    """A value that is not understood; who catches it knows where it stands."""


@dataclass(frozen=True, slots=True)
class DriverSpec:
    """A driver and its device."""

    mirrors: tuple[str, ...]
    policy: DeadlinePolicy
    behaviour: Behaviour
    dma: bool


@dataclass(frozen=True, slots=True)
class Expectation:
    """What must come of a step.

    Attributes:
        error: name of the errno that it ends with; "" for success.
        signal: that a CPU gets, by its si_code; "" for none.
        data: that is read; None: any.
        fenced: drivers whose mirrors are lost by it.
        events: what drivers hear from its start to its end, faults left out, in order; drivers that are not named
            may hear anything.
        within_s: how long it may take.
    """

    error: str = ""
    signal: str = ""
    data: bytes | None = None
    fenced: frozenset[str] = frozenset()
    events: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    within_s: float = WITHIN_S


@dataclass(frozen=True, slots=True)
class Step:
    """One step.

    Attributes:
        line: of its `[[steps]]`.
        kind: process, driver, file, wait or pending.
        subject: name of the process, driver, file or background step.
        call: what it does; "" for wait and pending.
        drivers: of `pending`: who owes an answer.
    """

    line: int
    kind: str
    subject: str
    call: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    background: str = ""
    drivers: frozenset[str] = frozenset()
    expectation: Expectation = field(default_factory=Expectation)

    def __str__(self) -> str:
        if self.kind == "pending":
            return f"pending {' '.join(sorted(self.drivers)) or 'nobody'}"
        return " ".join(filter(None, (self.kind if self.kind == "wait" else "", self.subject, self.call)))


@dataclass(frozen=True, slots=True)
class Scenario:
    """A scenario that makes sense.

    Attributes:
        settings: of the daemon, by name.
        files: size in bytes by name.
    """

    path: Path
    title: str
    settings: Mapping[str, object]
    processes: tuple[str, ...]
    files: Mapping[str, int]
    drivers: Mapping[str, DriverSpec]
    steps: tuple[Step, ...]


# ---- values


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise _WrongError(f"{value!r} is no text")
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise _WrongError(f"{value!r} is neither true nor false")
    return value


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise _WrongError(f"{value!r} is no number of seconds")
    return float(value)


_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "page": PAGE_SIZE, "pages": PAGE_SIZE}


def _size(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    found = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", value) if isinstance(value, str) else None
    if found is None or found[2] not in _UNITS:
        raise _WrongError(f'{value!r} is no number of bytes; write 4096, "16 KiB" or "4 pages"')
    return int(found[1]) * _UNITS[found[2]]


def _prot(value: object) -> Prot:
    letters = {"r": Prot.READ, "w": Prot.WRITE, "x": Prot.EXEC}
    if not isinstance(value, str) or (value != "none" and not set(value) <= set(letters)):
        raise _WrongError(f'{value!r} is no protection; write "rw", "r" or "none"')
    return Prot(sum(letters[letter] for letter in set(value))) if value != "none" else Prot(0)


def _map_flags(value: object) -> MapFlag:
    flags = MapFlag(0)
    for name in _text(value).split():
        if name.upper() not in MapFlag.__members__:
            raise _WrongError(f"{name!r} is no flag of mmap; there are {', '.join(MapFlag.__members__).lower()}")
        flags |= MapFlag[name.upper()]
    return flags


def _one_of(names: Mapping[str, Any]) -> Callable[[object], Any]:
    def parse(value: object) -> Any:
        if not isinstance(value, str) or value not in names:
            raise _WrongError(f"{value!r} is none of {', '.join(names)}")
        return names[value]

    return parse


def _data(value: object) -> bytes:
    if not isinstance(value, str):
        raise _WrongError(f'{value!r} is no text; bytes are written as in "\\u0000abc"')
    return value.encode("latin-1", "replace")


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise _WrongError(f"{value!r} is no list")
    return tuple(map(_text, value))


def _behaviours(value: object) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else _names(value)
    wrong = [name for name in names if name not in BEHAVIOURS]
    if wrong or not names:
        raise _WrongError(f"{value!r} is none of {', '.join(BEHAVIOURS)}")
    return tuple(map(str, names))


_ADVICE = _one_of({advice.name.lower(): advice for advice in Advice})
_POLICY = _one_of({policy.name.lower(): policy for policy in DeadlinePolicy})

Arguments = dict[str, tuple[Callable[[object], Any], Any]]
_RANGE: Arguments = {"at": (_text, REQUIRED), "length": (_size, None)}
_BEHAVE: Arguments = {"on_update": (_behaviours, ("answer",)), "delay_s": (_seconds, 0.0)}
CALLS: Mapping[str, Mapping[str, Arguments]] = {
    "process": {
        "mmap": {
            "length": (_size, REQUIRED),
            "prot": (_prot, Prot.READ | Prot.WRITE),
            "flags": (_map_flags, None),
            "at": (_text, None),
            "file": (_text, None),
            "offset": (_size, 0),
            "as": (_text, None),
        },
        "munmap": _RANGE,
        "mprotect": _RANGE | {"prot": (_prot, REQUIRED)},
        "mremap": _RANGE | {"new_length": (_size, REQUIRED), "to": (_text, None), "as": (_text, None)},
        "madvise": _RANGE | {"advice": (_ADVICE, REQUIRED)},
        "read": _RANGE,
        "write": {"at": (_text, REQUIRED), "data": (_data, REQUIRED)},
        "touch": _RANGE | {"write": (_flag, False)},
        "fork": {"as": (_text, REQUIRED)},
        "exit": {},
    },
    "driver": {
        "mirror": {"process": (_text, REQUIRED), "policy": (_POLICY, DeadlinePolicy.FENCE)},
        "unregister": {"mirrors": (_text, None)},
        "fault": _RANGE | {"write": (_flag, False), "wait": (_flag, True), "mirrors": (_text, None)},
        "read": _RANGE | {"mirrors": (_text, None)},
        "write": {"at": (_text, REQUIRED), "data": (_data, REQUIRED), "mirrors": (_text, None)},
        "behave": _BEHAVE,
        "die": {},
    },
    "file": {
        "truncate": {"size": (_size, REQUIRED)},
        "punch": {"offset": (_size, REQUIRED), "length": (_size, REQUIRED)},
        "write": {"offset": (_size, 0), "data": (_data, REQUIRED)},
    },
}
"""Every call: its arguments, how they are read, and their defaults.  `mirrors` says which process's memory is meant,
where a driver mirrors several; a `length` that is not given reaches to the end of what is mapped as `at`."""

_EXPECT: Arguments = {
    "error": (_text, ""),
    "signal": (_text, ""),
    "data": (_data, None),
    "fenced": (_names, ()),
    "events": (lambda value: value, {}),
    "within_s": (_seconds, WITHIN_S),
}
_DRIVER: Arguments = _BEHAVE | {
    "mirrors": (_names, ()),
    "policy": (_POLICY, DeadlinePolicy.FENCE),
    "dma": (_flag, False),
}


# ---- the file


def read_scenario(path: Path | str) -> Scenario:
    """Read a scenario.

    Raises:
        ScenarioError: it is not understood; the text has file and line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        tables = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(str(getattr(error, "strerror", None) or error), path) from error
    except tomllib.TOMLDecodeError as error:
        at = re.search(r" \(at line (\d+), column \d+\)$", str(error))
        message = str(error)[: at.start()] if at else str(error)
        raise ScenarioError(message, path, int(at[1]) if at else None) from error
    return _Reader(path, text.split("\n"), tables).read()


class _Reader:
    """One file being read."""

    def __init__(self, path: Path, lines: list[str], tables: dict[str, Any]) -> None:
        self._path = path
        self._lines = lines
        self._tables = tables
        self._drivers: dict[str, DriverSpec] = {}
        self._processes: list[str] = []
        self._files: dict[str, int] = {}
        self._labels: set[str] = set()
        self._background: set[str] = set()

    def read(self) -> Scenario:
        unknown = self._tables.keys() - {"title", "daemon", "processes", "files", "drivers", "steps"}
        if unknown:
            self._fail(self._line_of(min(unknown)), f"there is no {min(unknown)!r} in a scenario")
        self._processes += self._table("processes")
        for name, table in self._table("files").items():
            line = self._line_of(f"files.{name}")
            self._files[name] = self._arguments(line, f"file {name}", table, {"size": (_size, 0)})["size"]
        for name, table in self._table("drivers").items():
            self._drivers[name] = self._driver(name, table)
        tables = self._tables.get("steps", [])
        lines = [number for number, line in enumerate(self._lines, 1) if re.match(r"\s*\[\[\s*steps\s*\]\]", line)]
        if not isinstance(tables, list) or len(lines) != len(tables):
            self._fail(self._line_of("steps"), "steps are written as [[steps]], one after the other")
        initial = tuple(self._processes)
        steps = tuple(self._step(line, table) for line, table in zip(lines, tables, strict=True))
        title = str(self._tables.get("title", self._path.stem))
        return Scenario(self._path, title, self._table("daemon"), initial, self._files, self._drivers, steps)

    def _driver(self, name: str, table: Any) -> DriverSpec:
        line = self._line_of(f"drivers.{name}")
        given = self._arguments(line, f"driver {name}", table, _DRIVER)
        for process in given["mirrors"]:
            self._known(line, "process", process, self._processes)
        behaviour = Behaviour(given["on_update"], given["delay_s"])
        return DriverSpec(given["mirrors"], given["policy"], behaviour, given["dma"])

    def _step(self, line: int, table: dict[str, Any]) -> Step:
        kinds = [kind for kind in (*CALLS, "wait", "pending") if kind in table]
        # A driver's `mirror` call has an argument `process` of its own.
        kind = "driver" if kinds[:2] == ["process", "driver"] else kinds[0] if kinds else ""
        if not kind:
            self._fail(line, f"a step has one of {', '.join(CALLS)}, wait and pending")
        left = {key: value for key, value in table.items() if key not in (kind, "call", "expect", "background")}
        expectation = self._expectation(line, table.get("expect", {}))
        if kind == "pending":
            drivers = frozenset(self._value(line, "pending", _names, table[kind]))
            for name in drivers:
                self._known(line, "driver", name, self._drivers)
            return Step(line, kind, "", drivers=drivers, expectation=expectation)
        subject = self._value(line, kind, _text, table[kind])
        if kind == "wait":
            self._known(line, "step in the background", subject, self._background)
            return Step(line, kind, subject, expectation=expectation)
        self._known(line, kind, subject, self._subjects(kind))
        call = self._value(line, "call", _one_of({name: name for name in CALLS[kind]}), table.get("call"))
        arguments = self._arguments(line, f"{kind} {call}", left, CALLS[kind][call])
        self._declare(line, kind, call, arguments)
        background = str(table.get("background", ""))
        self._background |= {background} - {""}
        return Step(line, kind, subject, call, arguments, background, expectation=expectation)

    def _subjects(self, kind: str) -> list[str]:
        return {"process": self._processes, "driver": list(self._drivers), "file": list(self._files)}[kind]

    def _declare(self, line: int, kind: str, call: str, arguments: dict[str, Any]) -> None:
        """Check the names that a call uses, and note those that it makes."""
        for key, names in (("process", self._processes), ("mirrors", self._processes), ("file", self._files)):
            if arguments.get(key) is not None:
                self._known(line, "file" if key == "file" else "process", arguments[key], names)
        for key in ("at", "to"):
            label = str(arguments.get(key) or "0x0").partition("+")[0].strip()
            if label not in self._labels and not re.fullmatch(r"0x[0-9a-fA-F]+", label):
                self._known(line, "mapping", label, self._labels)
        made = arguments.get("as")
        if made is not None and call == "fork":
            self._processes.append(made)
        elif made is not None and kind == "process":
            self._labels.add(made)

    def _expectation(self, line: int, table: Any) -> Expectation:
        given = self._arguments(line, "expect", table, _EXPECT)
        for name in given["fenced"]:
            self._known(line, "driver", name, self._drivers)
        events = {}
        for name, types in given["events"].items():
            self._known(line, "driver", name, self._drivers)
            events[name] = self._value(line, f"events of {name}", _names, types)
            for kind in events[name]:
                self._known(line, "type of event", kind, EventType.__members__)
        given |= {"events": events, "fenced": frozenset(given["fenced"])}
        return Expectation(**given)

    # ---- what is wrong

    def _table(self, name: str) -> dict[str, Any]:
        table = self._tables.get(name, {})
        if not isinstance(table, dict):
            self._fail(self._line_of(name), f"{name!r} is no table")
        return table

    def _arguments(self, line: int, what: str, table: Any, known: Arguments) -> dict[str, Any]:
        if not isinstance(table, dict):
            self._fail(line, f"{what} is no table")
        unknown = table.keys() - known.keys()
        if unknown:
            expected = ", ".join(known) or "nothing"
            self._fail(line, f"{what}: {min(unknown)!r} is not known; there may be {expected}")
        values = {}
        for name, (parse, default) in known.items():
            if name not in table and default is REQUIRED:
                self._fail(line, f"{what}: {name!r} is missing")
            values[name] = self._value(line, name, parse, table[name]) if name in table else default
        return values

    def _value(self, line: int, name: str, parse: Callable[[object], Any], value: object) -> Any:
        try:
            return parse(value)
        except _WrongError as error:
            self._fail(line, f"{name}: {error}")

    def _known(self, line: int, kind: str, name: object, names: Any) -> None:
        if name not in names:
            self._fail(line, f"there is no {kind} {name!r}; there is {', '.join(names) or 'none'}")

    def _line_of(self, heading: str) -> int:
        pattern = rf"\s*(\[+\s*{re.escape(heading)}\s*\]|{re.escape(heading)}\s*[=.])"
        return next((number for number, line in enumerate(self._lines, 1) if re.match(pattern, line)), 1)

    def _fail(self, line: int, message: str) -> NoReturn:
        raise ScenarioError(message, self._path, line)
