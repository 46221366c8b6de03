"""What may stand in a scenario: every kind of step, every call with its arguments, every expectation.

**Absent**: where it stands (`format.py`), what it does (`run.py`, `actions.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hmm.madvise import Advice
from hmm.migration import Select
from hmm.mirror import DeadlinePolicy
from hmm.range_fault import REQ_FAULT, REQ_WRITE
from hmm.vma import Prot
from hmm_client.harness.holds import HoldPoint
from hmm_client.harness.misbehaviour import answer
from hmm_client.scenario import values
from hmm_client.scenario.model import WITHIN_S, Inside, Interface

REQUIRED = object()
"""The default of what has none."""

Arguments = dict[str, tuple[values.Parse, Any]]
"""How each argument is read, and its default."""

_ADVICE = values.one_of({advice.name.lower(): advice for advice in Advice})
_POLICY = values.one_of({policy.name.lower(): policy for policy in DeadlinePolicy})
_POINT = values.one_of({point.value: point for point in HoldPoint})
_INSIDE = values.one_of({inside.value: inside for inside in Inside})
_INTERFACE = values.one_of({interface.value: interface for interface in Interface})
_SELECTED = values.one_of({"system": Select.SYSTEM, "device": Select.DEVICE_PRIVATE})
_WANTED = values.one_of({"nothing": 0, "reading": REQ_FAULT, "writing": REQ_FAULT | REQ_WRITE})
_SUBSCRIPTION: Arguments = {"subscription": (values.text, None)}
_RANGE: Arguments = {"at": (values.text, REQUIRED), "length": (values.size, None)}
_MIRRORS: Arguments = {"mirrors": (values.text, None)}
_BYTES: Arguments = {"at": (values.text, REQUIRED), "data": (values.data, REQUIRED)}

_OF: Arguments = {"process": (values.text, None)}

CALLS: Mapping[str, Mapping[str, Arguments]] = {
    "process": {
        "mmap": {
            "length": (values.size, REQUIRED),
            "prot": (values.prot, Prot.READ | Prot.WRITE),
            "flags": (values.map_flags, None),
            "at": (values.text, None),
            "file": (values.text, None),
            "offset": (values.size, 0),
            "as": (values.text, None),
        },
        "munmap": _RANGE,
        "mprotect": _RANGE | {"prot": (values.prot, REQUIRED)},
        "mremap": _RANGE
        | {"new_length": (values.size, REQUIRED), "to": (values.text, None), "as": (values.text, None)},
        "madvise": _RANGE | {"advice": (_ADVICE, REQUIRED)},
        "read": _RANGE,
        "write": _BYTES,
        "touch": _RANGE | {"write": (values.flag, False)},
        "pin": _RANGE | {"write": (values.flag, True), "as": (values.text, REQUIRED)},
        "unpin": {"pin": (values.text, REQUIRED)},
        "userfaultfd": _RANGE | {"as": (values.text, REQUIRED)},
        "copy": _BYTES | {"userfaultfd": (values.text, REQUIRED)},
        "close": {"userfaultfd": (values.text, REQUIRED)},
        "fork": {"as": (values.text, REQUIRED)},
        "mrelease": {},
        "clear_refs": {"what": (values.number, 4)},
        "exit": {},
    },
    "driver": {
        "mirror": {"process": (values.text, REQUIRED), "policy": (_POLICY, DeadlinePolicy.FENCE)},
        "unregister": _MIRRORS,
        "fault": _RANGE | _MIRRORS | {"write": (values.flag, False), "wait": (values.flag, True)},
        "read": _RANGE | _MIRRORS,
        "write": _BYTES | _MIRRORS,
        "table": _RANGE | _MIRRORS,
        "dirty": _RANGE | _MIRRORS,
        "discard": _RANGE | _MIRRORS,
        "behave": {
            "on_update": (values.acts, None),
            "on_fault": (values.acts, None),
            "inside": (_INSIDE, None),
        },
        "held": {"count": (values.number, 1)},
        "release": {},
        "read_on": {},
        "answer": _MIRRORS | {"sequence": (values.number, REQUIRED), "times": (values.number, 1)},
        "inside": {},
        "counters": _MIRRORS,
        "die": {},
        "leave": {},
        "to_device": _RANGE | _MIRRORS,
        "to_system": _RANGE | _MIRRORS,
        "attach": {"process": (values.text, REQUIRED)},
        "subscribe": _RANGE | _MIRRORS | {"as": (values.text, REQUIRED)},
        "unsubscribe": _SUBSCRIPTION,
        "read_begin": _SUBSCRIPTION,
        "read_retry": _SUBSCRIPTION,
        "range_fault": _RANGE | _SUBSCRIPTION | {"want": (_WANTED, REQ_FAULT), "deadline_s": (values.seconds, None)},
        "setup": _RANGE | _MIRRORS | {"select": (_SELECTED, Select.SYSTEM)},
        "place": {},
        "finalize": {},
        "abort": {},
        "exclusive": _RANGE | _MIRRORS,
        "detach": _MIRRORS,
    },
    "program": {
        "mirror": _OF,
        "unmirror": _OF,
        "read": _RANGE | _OF,
        "write": _BYTES | _OF,
        "kill": {},
        "stop": {},
        "go_on": {},
        "end": {},
    },
    "file": {
        "truncate": {"size": (values.size, REQUIRED)},
        "punch": {"offset": (values.size, REQUIRED), "length": (values.size, REQUIRED)},
        "write": {"offset": (values.size, 0), "data": (values.data, REQUIRED)},
    },
}
"""Every call: its arguments, how they are read, and their defaults.  `mirrors` says which process's memory is meant,
where a driver mirrors several; a `length` that is not given reaches to the end of what is mapped as `at`.  From
`userfaultfd` on, which registers a range, calls are those of whoever brings in what a process misses there.  From
`attach` on they are those of today's interface; a `subscription` that is not named is the last one, and a range fault
with a `deadline_s` begins and retries by itself until then.  `setup` begins a migration by steps, `place` allocates,
copies and says where the pages go.  A program is asked for what `hmm_client.certify` asks of a
driver; a `process` that is not named is the first."""

FAILURES = values.one_of({name: name for name in ("allocation", "dma mapping", "migrate to ram", "copy")})
STEPS: Mapping[str, tuple[values.Parse, Arguments]] = {
    "hold": (
        values.text,
        {
            "point": (_POINT, REQUIRED),
            "operation": (values.text, ""),
            "process": (values.text, None),
            "driver": (values.text, None),
            "skip": (values.number, 0),
        },
    ),
    "reached": (values.text, {}),
    "release": (values.text, {}),
    "fail": (FAILURES, {"nth": (values.number, REQUIRED), "driver": (values.text, None)} | _MIRRORS),
    "wait": (values.text, {}),
    "give_up": (values.text, {}),
    "pending": (values.names, {"operations": (values.names, None)}),
}
"""Every kind of step that is no call: what stands behind its name, and its arguments."""

EXPECT: Arguments = {
    "error": (values.text, ""),
    "signal": (values.text, ""),
    "data": (values.data, None),
    "entries": (values.number, None),
    "retry": (values.flag, None),
    "fenced": (values.names, ()),
    "events": (values.table, {}),
    "counters": (values.table, {}),
    "within_s": (values.seconds, WITHIN_S),
}
_LOOKING = frozenset({"within_s"})
EXPECTED: Mapping[str, frozenset[str]] = {
    "pending": _LOOKING,
    "counters": _LOOKING | {"counters"},
    "give_up": frozenset(),
    "": frozenset(EXPECT) - {"counters"},
}
"""What may be expected of a step, by its kind or call; "" is of all others."""
DRIVER: Arguments = {
    "mirrors": (values.names, ()),
    "policy": (_POLICY, DeadlinePolicy.FENCE),
    "on_update": (values.acts, (answer(),)),
    "on_fault": (values.acts, (answer(),)),
    "inside": (_INSIDE, Inside.NOTHING),
    "dma": (values.flag, False),
    "interface": (_INTERFACE, Interface.MIRROR_2015),
    "memory": (values.size, 0),
    "credit": (values.number, 0),
}
PROGRAM: Arguments = {"command": (values.command, REQUIRED)}
FILE: Arguments = {"size": (values.size, 0)}
