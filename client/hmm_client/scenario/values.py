"""How values are written in a scenario: sizes, protections, acts of drivers, names from lists.

**Invariants**: what is not understood raises `WrongValueError`, whose text says what would have been right.

**Absent**: where a value stands; who catches the error knows its line.
"""

from __future__ import annotations

import errno as errnos
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from hmm.units import PAGE_SIZE, ULONG_MAX
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot
from hmm_client.harness.misbehaviour import Act, Kind

Parse = Callable[[object], Any]
_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "page": PAGE_SIZE, "pages": PAGE_SIZE}


class WrongValueError(Exception):
    """A value that is not understood."""


def text(value: object) -> str:
    """A text that is not empty."""
    if not isinstance(value, str) or not value:
        raise WrongValueError(f"{value!r} is no text")
    return value


def flag(value: object) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise WrongValueError(f"{value!r} is neither true nor false")
    return value


def number(value: object) -> int:
    """A number that is not negative, of 32 bits."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 32:
        raise WrongValueError(f"{value!r} is no number from 0 to {(1 << 32) - 1:,}")
    return value


def seconds(value: object) -> float:
    """A time."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise WrongValueError(f"{value!r} is no number of seconds")
    return float(value)


def size(value: object) -> int:
    """A number of bytes that an address space can have."""
    written = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    found = re.fullmatch(r"([0-9]+)\s*([A-Za-z]*)", written) if isinstance(written, str) else None
    if found is None or found[2] not in _UNITS:
        raise WrongValueError(f'{value!r} is no number of bytes; write 4096, "16 KiB" or "4 pages"')
    return _address(int(found[1]) * _UNITS[found[2]], written)


def _address(number_: int, written: object) -> int:
    if number_ > ULONG_MAX:
        raise WrongValueError(f"{written!r} is more than 64 bits hold")
    return number_


def is_address(written: str) -> bool:
    """Whether this is no name, but an address."""
    return re.fullmatch(r"0x[0-9a-fA-F]+", written) is not None


def address(written: str) -> int:
    """An address that is written as one."""
    return _address(int(written, 16), written)


def offset(written: str) -> int:
    """What is added to an address: as `size`, hexadecimal as well."""
    return address(written) if is_address(written) else size(written)


def prot(value: object) -> Prot:
    """A protection: any of the letters r, w and x, or none."""
    letters = {"r": Prot.READ, "w": Prot.WRITE, "x": Prot.EXEC}
    if not isinstance(value, str) or (value != "none" and not set(value) <= set(letters)):
        raise WrongValueError(f'{value!r} is no protection; write "rw", "r" or "none"')
    return Prot(sum(letters[letter] for letter in set(value))) if value != "none" else Prot(0)


def map_flags(value: object) -> MapFlag:
    """Flags of mmap, with blanks between them."""
    flags = MapFlag(0)
    for name in text(value).split():
        if name.upper() not in MapFlag.__members__:
            raise WrongValueError(f"{name!r} is no flag of mmap; there are {', '.join(MapFlag.__members__).lower()}")
        flags |= MapFlag[name.upper()]
    return flags


def one_of(names: Mapping[str, Any]) -> Parse:
    """One of several names; what it stands for."""

    def parse(value: object) -> Any:
        if not isinstance(value, str) or value not in names:
            raise WrongValueError(f"{value!r} is none of {', '.join(names)}")
        return names[value]

    return parse


def data(value: object) -> bytes:
    """Bytes, a character each."""
    if not isinstance(value, str):
        raise WrongValueError(f'{value!r} is no text; bytes are written as in "\\u0000abc"')
    if value and max(value) > "\xff":
        raise WrongValueError(f"{max(value)!r} is no byte: those are \\u0000 to \\u00ff")
    return value.encode("latin-1")


def names(value: object) -> tuple[str, ...]:
    """A list of texts."""
    if not isinstance(value, list):
        raise WrongValueError(f"{value!r} is no list")
    return tuple(map(text, value))


def command(value: object) -> tuple[str, ...]:
    """What starts a program: a list of texts with something in it."""
    words = names(value)
    if not words:
        raise WrongValueError("[] starts nothing")
    return words


def table(value: object) -> dict[str, Any]:
    """A table."""
    if not isinstance(value, dict):
        raise WrongValueError(f"{value!r} is no table")
    return value


def acts(value: object) -> tuple[Act, ...]:
    """What a driver does with its events: one act, or a list."""
    found = (value,) if isinstance(value, str) else names(value)
    if not found:
        raise WrongValueError("a list of acts has at least one")
    return tuple(map(_act, found))


def _act(written: str) -> Act:
    name, _, argument = written.partition(" ")
    if name not in _ACTS or (argument and name not in ("delay", "refuse")) or (name == "delay" and not argument):
        raise WrongValueError(f"{written!r} is none of {', '.join(_ACTS)}, refuse ERRNO, delay SECONDS")
    if name == "delay":
        try:
            return Act(Kind.DELAY, seconds(float(argument)))
        except ValueError:
            raise WrongValueError(f"{argument!r} is no number of seconds") from None
    if argument and not isinstance(getattr(errnos, argument, None), int):
        raise WrongValueError(f"{argument!r} is no errno")
    return Act(_ACTS[name], errno=getattr(errnos, argument or "EIO"))


_ACTS = {kind.value: kind for kind in Kind if kind not in (Kind.KILL_PROCESS, Kind.STOP_PROCESS)}
