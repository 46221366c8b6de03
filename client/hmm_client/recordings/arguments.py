"""The text of one system call argument, as strace prints it, turned into a value.

strace prints numbers in decimal, octal or hexadecimal, pointers as NULL or hexadecimal, flags as names joined by
`|` with unknown bits left as a number, `7<<MAP_HUGE_SHIFT` for shifted fields, a descriptor as `3</its/path>`
with -y, structures in braces and remarks between `/*` and `*/`.

Source: strace 6.1, src/util.c, src/xlat.c, src/print_fields.h.
Invariants: every function raises ArgumentError with the offending text, or returns.
Absent: which argument means what; lines and files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from hmm_client.recordings.flags import FlagTable

_REMARK = re.compile(r"\s*/\*.*?\*/")
_NUMBER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|[0-9]+)\Z")
_DESCRIPTOR = re.compile(r"(-?\d+|AT_FDCWD)(?:<(.*)>(\(deleted\))?)?\Z", re.DOTALL)
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|[0-7]{1,3}|.)", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "v": "\v", "f": "\f", "a": "\a", "b": "\b", "e": "\x1b"}
_DELETED = " (deleted)"
# One piece of a call's arguments that commas and brackets must not be looked for in: a string, a remark, or what
# stands behind a descriptor or a process id (which may hold one nested pair, `3</dev/null<char 1:3>>`).
_OPAQUE = r'"(?:[^"\\]|\\.)*"|/\*.*?\*/|(?<=[\dDW])<(?![< ])(?:[^<>]|<[^<>]*>)*>'
_TOKEN = re.compile(_OPAQUE + r"|[()\[\]{},]", re.DOTALL)


class ArgumentError(ValueError):
    """The text is not what strace prints for this kind of argument."""


@dataclass(frozen=True, slots=True)
class Descriptor:
    """An open file as strace -y shows it.

    Attributes:
        number: the file descriptor; -1 for none.
        path: what /proc/PID/fd/N pointed to, without ` (deleted)`; None when strace did not know.
    """

    number: int
    path: str | None


def number(text: str) -> int:
    """The value of `NULL`, `0x7f00`, `4096`, `0600` or `-1`; a remark behind it is ignored.

    Raises:
        ArgumentError: it is none of these.
    """
    plain = _REMARK.sub("", text).strip()
    if plain == "NULL":
        return 0
    if not _NUMBER.match(plain):
        raise ArgumentError(f"{text!r} is not a number")
    digits = plain.lstrip("-")
    octal = len(digits) > 1 and digits[0] == "0" and digits[1] not in "xX"
    try:
        return int(plain, 8 if octal else 0)
    except ValueError:
        raise ArgumentError(f"{text!r} is not a number") from None


def flags(text: str, table: FlagTable) -> int:
    """The value of `PROT_READ|PROT_WRITE|0x40`, `21<<MAP_HUGE_SHIFT`, or of a plain number.

    Raises:
        ArgumentError: a name that `table` does not hold.
    """
    value = 0
    for term in _REMARK.sub("", text).split("|"):
        factor, shifted, name = term.strip().rpartition("<<")
        if shifted:
            value |= _flag(factor, table) << _flag(name, table)
        else:
            value |= _flag(name, table)
    return value


def _flag(text: str, table: FlagTable) -> int:
    if text in table:
        return table[text]
    try:
        return number(text)
    except ArgumentError:
        raise ArgumentError(f"unknown flag {text!r}") from None


def flag_names(text: str) -> frozenset[str]:
    """The terms of a flags expression, unvalued: enough to ask whether CLONE_VM is among them."""
    return frozenset(term.strip() for term in _REMARK.sub("", text).split("|"))


def descriptor(text: str) -> Descriptor:
    """The descriptor of `3</lib/libc.so.6>`, `3</memfd:x>(deleted)`, `AT_FDCWD</home>` or `-1`.

    Raises:
        ArgumentError: it is no descriptor.
    """
    found = _DESCRIPTOR.match(text.strip())
    if found is None:
        raise ArgumentError(f"{text!r} is not a file descriptor")
    name, path = found[1], found[2]
    if path is not None:
        path = unescape(path).removesuffix(_DELETED)
    return Descriptor(-100 if name == "AT_FDCWD" else int(name), path)


def string(text: str) -> str:
    r"""The contents of `"a\nb"` or of an abbreviated `"abc"...`.

    Raises:
        ArgumentError: it is not quoted.
    """
    quoted = _REMARK.sub("", text).strip().removesuffix("...")
    if len(quoted) < 2 or quoted[0] != '"' or quoted[-1] != '"':
        raise ArgumentError(f"{text!r} is not a string")
    return unescape(quoted[1:-1])


def unescape(text: str) -> str:
    """Undo C escapes; bytes given in octal or hexadecimal form UTF-8 again where they can, else they stay escaped."""
    if "\\" not in text:
        return text
    raw = bytearray()
    last = 0
    for found in _ESCAPE.finditer(text):
        raw += text[last : found.start()].encode()
        raw += _escaped(found[1])
        last = found.end()
    raw += text[last:].encode()
    return raw.decode("utf-8", "backslashreplace")


def _escaped(code: str) -> bytes:
    if code[0] == "x" and len(code) == 3:
        return bytes([int(code[1:], 16)])
    if code[0] in "01234567":
        return bytes([int(code, 8) & 0xFF])
    return _ESCAPES.get(code, code).encode()


def split(text: str, start: int = 0) -> tuple[tuple[str, ...], int | None]:
    """Cut `a, {b, c}, "d,e") = 0` at its outer commas.

    Args:
        text: begins at `start` with the first argument, behind the opening bracket.

    Returns: the arguments, stripped, and the index behind the closing bracket; None when there is none.

    Cost: O(length).
    """
    parts: list[str] = []
    depth = 0
    begin = start
    for token in _TOKEN.finditer(text, start):
        mark = token[0]
        if mark in {"(", "[", "{"}:
            depth += 1
        elif mark == "," and not depth:
            parts.append(text[begin : token.start()].strip())
            begin = token.end()
        elif mark in {")", "]", "}"}:
            if not depth:
                return _without_nothing(parts, text[begin : token.start()]), token.end()
            depth -= 1
    return _without_nothing(parts, text[begin:]), None


def _without_nothing(parts: list[str], last: str) -> tuple[str, ...]:
    stripped = last.strip()
    return (*parts, stripped) if stripped or parts else ()


def fields(text: str) -> dict[str, str]:
    """The members of `{flags=CLONE_VM, stack=0x7f00}`, or of arguments printed as `name=value`.

    What a call wrote back (`=> {parent_tid=[7]}`) is left out, and so is a member without a name.
    """
    inner = text.strip()
    if inner.startswith("{"):
        parts, _ = split(inner, 1)
    else:
        parts, _ = split(inner)
    named = (part.partition("=") for part in parts)
    return {name.strip(): value.strip() for name, equals, value in named if equals}
