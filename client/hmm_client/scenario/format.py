"""Reading a scenario: what stands in the file, and what is wrong with it, with the line.

**Invariants**: those of `model.py`.

**Absent**: what may stand in it (`grammar.py`), what the calls do (`run.py`).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any, NoReturn

from hmm.events import EventType, Reason
from hmm_client.scenario import grammar, values
from hmm_client.scenario.grammar import CALLS, REQUIRED, STEPS, Arguments
from hmm_client.scenario.model import DriverSpec, Expectation, ProgramSpec, Scenario, ScenarioError, Step
from hmm_proto.v1 import inspection_pb2

TABLES = frozenset({"title", "rule", "daemon", "processes", "files", "drivers", "programs", "steps"})


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
        raise ScenarioError(f"it is no TOML: {message}", path, int(at[1]) if at else None) from error
    return _Reader(path, text.split("\n"), tables).read()


class _Reader:
    """One file being read."""

    def __init__(self, path: Path, lines: list[str], tables: dict[str, Any]) -> None:
        self._path = path
        self._lines = lines
        self._tables = tables
        self._drivers: dict[str, DriverSpec] = {}
        self._programs: dict[str, ProgramSpec] = {}
        self._processes: list[str] = []
        self._files: dict[str, int] = {}
        self._labels: set[str] = set()
        self._background: dict[str, int] = {}  # those that nothing has waited for yet, with their lines
        self._holds: set[str] = set()
        self._made: dict[str, set[str]] = {"subscription": set(), "pin": set(), "userfaultfd": set()}

    def read(self) -> Scenario:
        unknown = self._tables.keys() - TABLES
        if unknown:
            self._fail(self._line_of(min(unknown)), f"there is no {min(unknown)!r} in a scenario")
        for name, table in self._table("processes").items():
            self._arguments(self._line_of(f"processes.{name}"), f"process {name}", table, {})
            self._processes.append(name)
        for name, table in self._table("files").items():
            line = self._line_of(f"files.{name}")
            self._files[name] = self._arguments(line, f"file {name}", table, grammar.FILE)["size"]
        for name, table in self._table("drivers").items():
            self._drivers[name] = self._driver(name, table)
        for name, table in self._table("programs").items():
            line = self._line_of(f"programs.{name}")
            self._programs[name] = ProgramSpec(**self._arguments(line, f"program {name}", table, grammar.PROGRAM))
            if name in self._drivers:
                self._fail(line, f"there is a driver {name!r} already")
        tables = self._tables.get("steps", [])
        lines = [number for number, line in enumerate(self._lines, 1) if re.match(r"\s*\[\[\s*steps\s*\]\]", line)]
        if not isinstance(tables, list) or len(tables) != len(lines):
            self._fail(self._line_of("steps"), "each step is a [[steps]] of its own")
        if not tables:
            self._fail(len(self._lines), "a scenario has at least one step, [[steps]]")
        processes = tuple(self._processes)
        steps = tuple(self._step(line, dict(table)) for line, table in zip(lines, tables, strict=True))
        for name, line in self._background.items():
            self._fail(line, f"nobody hears how the step in the background {name!r} ends: nothing waits for it")
        return Scenario(
            path=self._path,
            title=self._value(self._line_of("title"), "title", values.text, self._tables.get("title", self._path.stem)),
            rule=self._text(self._line_of("rule"), self._tables, "rule"),
            settings=self._table("daemon"),
            processes=processes,
            files=self._files,
            drivers=self._drivers,
            programs=self._programs,
            steps=steps,
        )

    def _driver(self, name: str, table: Any) -> DriverSpec:
        line = self._line_of(f"drivers.{name}")
        given = self._arguments(line, f"driver {name}", table, grammar.DRIVER)
        for process in given["mirrors"]:
            self._known(line, "process", process, self._processes)
        return DriverSpec(**given)

    def _step(self, line: int, table: dict[str, Any]) -> Step:
        expected = table.pop("expect", {})
        expectation = self._expectation(line, expected)
        background, note = self._text(line, table, "background"), self._text(line, table, "note")
        table.pop("background", None)
        table.pop("note", None)
        kind = self._kind(line, table)
        written = table.pop(kind)
        if kind in STEPS:
            parse, known = STEPS[kind]
            subject = self._value(line, kind, parse, written)
            arguments = self._arguments(line, kind, table, known)
            if kind == "pending":
                for name in subject:
                    self._known(line, "driver", name, self._who)
                arguments["owing"], subject = frozenset(subject), " ".join(subject) or "nobody"
            call = ""
        else:
            subject = self._value(line, kind, values.text, written)
            self._known(line, kind, subject, self._subjects(kind))
            call = self._value(line, "call", values.one_of({one: one for one in CALLS[kind]}), table.pop("call", None))
            arguments = self._arguments(line, f"{kind} {call}", table, CALLS[kind][call])
        self._require_known(line, kind, subject, arguments)
        self._require_expectable(line, call or kind, background, expected)
        self._declare(line, kind, call, subject, arguments)
        if background:
            self._new(line, "step in the background", background, self._background)
            self._background[background] = line
        return Step(line, kind, subject, call, arguments, background, note, expectation)

    def _kind(self, line: int, table: dict[str, Any]) -> str:
        # What a step is about comes before its arguments, some of which have the names of other kinds.
        order = ("program", "driver", "process", "file") if "call" in table else tuple(STEPS)
        kind = next((kind for kind in order if kind in table), None)
        if kind is None:
            self._fail(line, f"a step has a call of one of {', '.join(CALLS)}, or one of {', '.join(STEPS)}")
        return kind

    @property
    def _who(self) -> list[str]:
        """All who may owe an answer."""
        return [*self._drivers, *self._programs]

    def _subjects(self, kind: str) -> list[str]:
        programs, drivers, files = list(self._programs), list(self._drivers), list(self._files)
        return {"process": self._processes, "program": programs, "driver": drivers, "file": files}[kind]

    def _require_known(self, line: int, kind: str, subject: str, arguments: dict[str, Any]) -> None:
        if kind in ("wait", "give_up"):
            self._known(line, "step in the background", subject, sorted(self._background))
        elif kind in ("reached", "release"):
            self._known(line, "hold", subject, sorted(self._holds))
        places = (("process", self._processes), ("mirrors", self._processes), ("file", self._files))
        for key, names in (*places, ("driver", self._drivers)):
            if arguments.get(key) is not None:
                self._known(line, key if key in ("file", "driver") else "process", arguments[key], names)
        for key, made in self._made.items():
            if arguments.get(key) is not None:
                self._known(line, key, arguments[key], sorted(made))
        for key in ("at", "to"):
            label, plus, offset = (part.strip() for part in str(arguments.get(key) or "0x0").partition("+"))
            if plus:
                self._value(line, key, values.offset, offset)
            if label in self._labels:
                continue
            if not values.is_address(label):
                self._known(line, "mapping", label, sorted(self._labels))
            self._value(line, key, values.address, label)

    def _require_expectable(self, line: int, what: str, background: str, expected: dict[str, Any]) -> None:
        if background and expected:
            self._fail(line, "what is expected of a step in the background stands at the step that waits for it")
        known = grammar.EXPECTED.get(what, grammar.EXPECTED[""])
        for name in expected:
            if name not in known:
                there = ", ".join(one for one in grammar.EXPECT if one in known) or "nothing"
                self._fail(line, f"expect: {name!r} cannot be expected of {what}; there may be {there}")

    def _declare(self, line: int, kind: str, call: str, subject: str, arguments: dict[str, Any]) -> None:
        """Note the names that a step makes, and those that it takes away."""
        made = arguments.get("as")
        match call or kind:
            case "hold":
                self._new(line, "hold", subject, self._holds)
                self._holds.add(subject)
            case "wait" | "give_up":
                del self._background[subject]
            case "release" if kind == "release":
                self._holds.remove(subject)
            case "fork":
                self._new(line, "process", made, self._processes)
                self._processes.append(str(made))
            case "subscribe" | "pin" | "userfaultfd":
                names = self._made["subscription" if call == "subscribe" else call]
                self._new(line, call, made, names)
                names.add(str(made))
            case "unpin":
                self._made["pin"].remove(arguments["pin"])
            case "close":
                self._made["userfaultfd"].remove(arguments["userfaultfd"])
            case _ if made is not None:
                self._labels.add(made)

    def _expectation(self, line: int, table: Any) -> Expectation:
        given = self._arguments(line, "expect", table, grammar.EXPECT)
        for name in given["fenced"]:
            self._known(line, "driver", name, self._who)
        events = {}
        for name, types in given["events"].items():
            self._known(line, "driver", name, self._drivers)
            events[name] = self._value(line, f"events of {name}", values.names, types)
            for kind in events[name]:
                self._known(line, "type of event", kind, EventType.__members__ | Reason.__members__)
        for name, count in given["counters"].items():
            fields = inspection_pb2.MirrorStatistics.DESCRIPTOR.fields_by_name
            self._known(line, "counter", name, [one for one in fields if fields[one].message_type is None])
            self._value(line, f"counter {name}", values.number, count)
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
        given = {}
        for name, (parse, default) in known.items():
            if name not in table and default is REQUIRED:
                self._fail(line, f"{what}: {name!r} is missing")
            given[name] = self._value(line, name, parse, table[name]) if name in table else default
        return given

    def _value(self, line: int, name: str, parse: Callable[[Any], Any], value: object) -> Any:
        try:
            return parse(value)
        except values.WrongValueError as error:
            self._fail(line, f"{name}: {error}")

    def _text(self, line: int, table: dict[str, Any], name: str) -> str:
        written: str = self._value(line, name, values.text, table[name]) if name in table else ""
        return written

    def _new(self, line: int, kind: str, name: object, names: Container[object]) -> None:
        if name in names:
            self._fail(line, f"there is a {kind} {name!r} already")

    def _known(self, line: int, kind: str, name: object, names: Any) -> None:
        if name not in names:
            self._fail(line, f"there is no {kind} {name!r}; there is {', '.join(names) or 'none'}")

    def _line_of(self, heading: str) -> int:
        pattern = rf"\s*(\[+\s*{re.escape(heading)}\s*\]|{re.escape(heading)}\s*[=.])"
        return next((number for number, line in enumerate(self._lines, 1) if re.match(pattern, line)), 1)

    def _fail(self, line: int, message: str) -> NoReturn:
        raise ScenarioError(message, self._path, line)
