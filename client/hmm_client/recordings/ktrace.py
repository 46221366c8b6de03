"""Traces of the kernel: what Linux and its HMM test driver did, operation by operation.

A trace is a file of JSON lines, plain or gzipped: a header, then one line per operation with its arguments, its
result and the state of every process behind it.  Addresses are page numbers relative to an empty window at `base`;
runs of equal values are written `value*count` and expanded here, one value per page.

Source: Linux lib/test_hmm.c and tools/testing/selftests/mm, 6.12, which the operations are named after.
Invariants: snapshots are as long as the window; operations are numbered from 0 without a gap, as many as the header
    says; a missing argument has its default; whatever a call is given, it could be given in 64 bits.
Absent: performing the operations, and what of a trace a model must match.
"""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

from hmm.units import PAGE_SHIFT, PAGE_SIZE, PMD_PAGES, TASK_SIZE, is_page_aligned
from hmm_client.recordings.errors import TraceError

_T = TypeVar("_T")
_Json: TypeAlias = Mapping[str, Any]

MANIFEST = "MANIFEST.jsonl"
SUFFIXES = (".jsonl", ".jsonl.gz")
FINGERPRINT_BYTES = 16
"""How many bytes of a page stand in its fingerprint."""
RUN_PAGES_MAX = 1 << 20
"""How many pages the runs of one text may come to: as many are made."""
TOUCHED_PAGES_MAX = 1 << 16
"""How many pages one operation may look at, or make bytes for, one by one."""

VMA_OPERATIONS = frozenset({"mmap", "munmap", "mprotect", "madvise", "mremap"})
ACCESS_OPERATIONS = frozenset({"rd", "wr", "dump", "pin", "unpin"})
FILE_OPERATIONS = frozenset({"ftruncate", "fwrite", "fread", "fpunch"})
PROCESS_OPERATIONS = VMA_OPERATIONS | ACCESS_OPERATIONS | FILE_OPERATIONS | {"fork", "exit"}
HANDLE_OPERATIONS = frozenset({"open", "close"})
DEVICE_OPERATIONS = frozenset({"dread", "dwrite", "mig_dev", "mig_sys", "snap", "excl", "chk_excl", "release"})
OPERATIONS = PROCESS_OPERATIONS | HANDLE_OPERATIONS | DEVICE_OPERATIONS
_PAGE_BY_PAGE = DEVICE_OPERATIONS | {"rd", "wr", "dump", "fwrite", "fread"}
_COUNTED = FILE_OPERATIONS | {"rd", "wr", "dump"}

THP = ("never", "always")
"""What `thp` of a header may be."""
_OPERATION_MEMBERS = frozenset({"i", "op", "p", "args", "res", "drv", "state"})
_STATE_MEMBERS = frozenset({"p", "s0", "s1", "pm", "maps"})
_FILE_PAGES_MAX = (1 << 63) >> PAGE_SHIFT
_SPACE_PAGES_MAX = (1 << 64) >> PAGE_SHIFT


@dataclass(frozen=True, slots=True)
class Header:
    """The first line.

    Attributes:
        trace: name; the file's stem.
        window: pages.
        base: byte address of page 0.
        kind: its class: scripted, or the mix of a random one.
        thp: one of THP.
        ops: number of operations.
        fault_around_pages: how many pages a file read fault maps at most.
        first_fix: the first operation that needed a correction of the stock driver; None when none did.
    """

    trace: str
    window: int
    base: int
    kind: str
    seed: int
    thp: str
    desc: str
    kernel: str
    set: str
    ops: int
    fault_around_pages: int
    first_fix: int | None


@dataclass(frozen=True, slots=True)
class Arguments:
    """Arguments of an operation; those that it has not are as here.

    Attributes:
        page: first page of the window, or of the file in fwrite, fread and fpunch.
        n: pages.  A negative number, of calls that take an unsigned one, is as the kernel takes it in those of VMAs.
        prot: letters of r, w, x; `none` for PROT_NONE.
        flags: `private` or `shared`.
        src: `anon`, `f0`..`f2`, or `d<h>` for a mapping of handle h.
        off: in mmap the file offset in pages, elsewhere the byte offset inside each page.
        noreplace: MAP_FIXED_NOREPLACE instead of MAP_FIXED.
        populate: MAP_POPULATE too.
        adv: advice without MADV_.
        new: mremap's new size in pages, as `n`.
        mode: mremap `inplace`, `move` or `dontunmap`.
        to: page that mremap moves to.
        val: value of the first byte written; page k gets val + k, modulo 256.
        q: the child's number.
        f: number of the file.
        h: number of the device handle.
        dev: number of the device.
        write: pin for writing.
        unaligned: bytes added to the address.
    """

    page: int = 0
    n: int = 1
    prot: str = ""
    flags: str = ""
    src: str = ""
    off: int = 0
    noreplace: int = 0
    populate: int = 0
    adv: str = ""
    new: int = 0
    mode: str = ""
    to: int = 0
    val: int = 0
    q: int = 0
    f: int = 0
    h: int = 0
    dev: int = 0
    write: int = 0
    unaligned: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """What an operation returned; None is what it did not return.

    Attributes:
        ret: return value, -1 with `errno`; a page number for mmap and mremap.
        errno: name.
        sig: signal that stopped rd or wr: SEGV_MAPERR, SEGV_ACCERR or BUS_ADRERR, at page `sigpage`.
        vals: the byte read from each page.
        data: fingerprint of each page, or for dump the signal it raised.
        prot: snapshot byte of each page.
        cpages: pages that the driver's reply counts.
        faults: rounds of retry that it counts.
    """

    ret: int
    errno: str | None = None
    sig: str | None = None
    sigpage: int | None = None
    vals: bytes | None = None
    data: tuple[str, ...] | None = None
    prot: bytes | None = None
    cpages: int | None = None
    faults: int | None = None


@dataclass(frozen=True, slots=True)
class MapsLine:
    """One line of /proc/self/maps inside the window.

    Attributes:
        start: page.
        end: page behind the last.
        perms: `rw-p`.
        offset: pages into the source; 0 for private anonymous memory.
        source: `anon`, `shm` or `f0`..`f2`.
    """

    start: int
    end: int
    perms: str
    offset: int
    source: str


@dataclass(frozen=True, slots=True)
class State:
    """A process after an operation.

    Attributes:
        process: its number.
        s0: snapshot byte of device 0 for each page of the window.
        s1: the same of device 1.
        pm: page map digit of each page.
        maps: lines of the window; None when they were not taken.
    """

    process: int
    s0: bytes
    s1: bytes
    pm: bytes
    maps: tuple[MapsLine, ...] | None


@dataclass(frozen=True, slots=True)
class Corrections:
    """How often the driver needed help in an operation: see `drv` of the format."""

    fix: int = 0
    inv: int = 0
    warn: int = 0


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation.

    Attributes:
        index: its number in the trace.
        line: 1-based line in the file.
        name: one of OPERATIONS.
        process: who performs it.
        states: live processes after it, in ascending order.
    """

    index: int
    line: int
    name: str
    process: int
    args: Arguments
    result: Result
    corrections: Corrections
    states: tuple[State, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """A whole trace."""

    path: Path
    header: Header
    operations: tuple[Operation, ...]


def expand(path: Path | str) -> list[Path]:
    """The traces that a path stands for: itself, or all below a folder, sorted.

    Raises:
        TraceError: no such path, or a folder without traces.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise TraceError("no such file or folder", path)
    found = [
        file
        for file in path.rglob("*.jsonl*")
        if file.name.endswith(SUFFIXES) and file.name != MANIFEST and file.is_file()
    ]
    if not found:
        raise TraceError(f"no trace ({' or '.join('*' + suffix for suffix in SUFFIXES)}) in this folder", path)
    return sorted(found)


def read_trace(path: Path | str) -> Trace:
    """Read one trace.

    Raises:
        TraceError: unreadable, or not in this format; the text names file and line.

    Cost: O(operations * window).
    """
    path = Path(path)
    lines = list(_lines(path))
    if not lines:
        raise TraceError("it is empty", path)
    header = _read(path, 1, lines[0], _header)
    operations = tuple(
        _read(path, number, text, partial(_operation, number=number, header=header))
        for number, text in enumerate(lines[1:], 2)
    )
    if len(operations) != header.ops:
        raise TraceError(f"{len(operations)} operations where the header promises {header.ops}", path)
    for index, operation in enumerate(operations):
        if operation.index != index:
            raise TraceError(f"operation {operation.index} where {index} is due", path, operation.line)
    return Trace(path, header, operations)


def _lines(path: Path) -> Iterator[str]:
    try:
        raw = path.read_bytes()
        if path.name.endswith(".gz"):
            raw = gzip.decompress(raw)
        text = raw.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise TraceError(str(getattr(error, "strerror", None) or error), path) from error
    yield from (line for line in text.split("\n") if line)


def _read(path: Path, number: int, text: str, parse: Callable[[_Json], _T]) -> _T:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"the line is no JSON: {error}", path, number) from error
    try:
        if not isinstance(line, dict):
            raise TypeError("the line is no JSON object")
        return parse(line)
    except KeyError as error:
        raise TraceError(f"{error.args[0]!r} is missing", path, number) from error
    except (ValueError, TypeError) as error:
        raise TraceError(str(error), path, number) from error


def _only(line: _Json, names: Collection[str], what: str) -> None:
    """Refuse what is not known: it would be passed over, and the trace say more than was compared."""
    unknown = line.keys() - names
    if unknown:
        raise ValueError(f"unknown {what} {min(unknown)!r}")


def _get(line: _Json, name: str, kind: type[_T]) -> _T:
    value = line[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name!r} is {value!r}, not of type {kind.__name__}")
    return value


def _optional(line: _Json, name: str, kind: type[_T]) -> _T | None:
    return None if line.get(name) is None else _get(line, name, kind)


def _within(name: str, value: int, first: int, last: int) -> int:
    if not first <= value <= last:
        raise ValueError(f"{name!r} is {value}, not within {first} and {last}")
    return value


def _header(line: _Json) -> Header:
    thp = _get(line, "thp", str)
    if thp not in THP:
        raise ValueError(f"'thp' is {thp!r}, not {' or '.join(THP)}")
    base, window = int(_get(line, "base", str), 0), _within("window", _get(line, "window", int), 1, RUN_PAGES_MAX)
    if not is_page_aligned(base) or not 0 <= base <= TASK_SIZE - (window << PAGE_SHIFT):
        raise ValueError(f"'base' is {base:#x}, where no window of {window} pages can be")
    fault_around = _within("fault_around_pages", _get(line, "fault_around_pages", int), 1, PMD_PAGES)
    if fault_around & (fault_around - 1):
        raise ValueError(f"'fault_around_pages' is {fault_around}, no power of two")
    return Header(
        trace=_get(line, "trace", str),
        window=window,
        base=base,
        kind=_get(line, "class", str),
        seed=_get(line, "seed", int),
        thp=thp,
        desc=_get(line, "desc", str),
        kernel=_get(line, "kernel", str),
        set=_get(line, "set", str),
        ops=_get(line, "ops", int),
        fault_around_pages=fault_around,
        first_fix=_optional(line, "first_fix", int),
    )


def _operation(line: _Json, number: int, header: Header) -> Operation:
    _only(line, _OPERATION_MEMBERS, "member of an operation")
    name = _get(line, "op", str)
    if name not in OPERATIONS:
        raise ValueError(f"unknown operation {name!r}")
    return Operation(
        index=_get(line, "i", int),
        line=number,
        name=name,
        process=_optional(line, "p", int) or 0,
        args=_arguments(name, _get(line, "args", dict), header.base >> PAGE_SHIFT),
        result=_result(_get(line, "res", dict)),
        corrections=_members(Corrections, _optional(line, "drv", dict) or {}),
        states=tuple(_state(state, header.window) for state in _get(line, "state", list)),
    )


def _arguments(operation: str, line: _Json, base_page: int) -> Arguments:
    """Those of an operation, none of them beyond what could be passed to the kernel, or is done in reasonable time."""
    args = _members(Arguments, line)
    pages_max = TOUCHED_PAGES_MAX if operation in _PAGE_BY_PAGE else _SPACE_PAGES_MAX - 1
    pages_min = 0 if operation in _COUNTED else -_SPACE_PAGES_MAX
    _within("n", args.n, pages_min, pages_max)
    _within("new", args.new, pages_min, _SPACE_PAGES_MAX - 1)
    if operation in VMA_OPERATIONS:
        args = replace(args, n=args.n % _SPACE_PAGES_MAX, new=args.new % _SPACE_PAGES_MAX)
    if operation in FILE_OPERATIONS:
        _within("page", args.page, 0, _FILE_PAGES_MAX - 1)
    else:
        _within("page", args.page, -base_page, _SPACE_PAGES_MAX - base_page - 1)
    _within("to", args.to, -base_page, _SPACE_PAGES_MAX - base_page - 1)
    _within("off", args.off, 0, _FILE_PAGES_MAX - 1 if operation == "mmap" else PAGE_SIZE - 1)
    _within("unaligned", args.unaligned, 0, PAGE_SIZE - 1)
    return args


_DEFAULTS: Mapping[type, Mapping[str, Any]] = MappingProxyType(
    {
        cls: {field.name: field.default for field in fields(cls) if field.default is not MISSING}
        for cls in (Arguments, Corrections)
    }
)

_RESULT_MEMBERS = frozenset(field.name for field in fields(Result))


def _members(cls: type[_T], line: _Json) -> _T:
    """A dataclass of integers and strings, each with a default, from the members of a JSON object."""
    defaults = _DEFAULTS[cls]
    _only(line, defaults.keys(), "argument")
    return cls(**{name: _get(line, name, type(defaults[name])) for name in line})


def _result(line: _Json) -> Result:
    _only(line, _RESULT_MEMBERS, "result")
    vals, data, prot = (_optional(line, name, str) for name in ("vals", "data", "prot"))
    return Result(
        ret=_get(line, "ret", int),
        errno=_optional(line, "errno", str),
        sig=_optional(line, "sig", str),
        sigpage=_optional(line, "sigpage", int),
        vals=None if vals is None else expand_bytes(vals),
        data=None if data is None else tuple(_expand(data)),
        prot=None if prot is None else expand_bytes(prot),
        cpages=_optional(line, "cpages", int),
        faults=_optional(line, "faults", int),
    )


def _state(line: object, window: int) -> State:
    if not isinstance(line, dict):
        raise TypeError("a state is no JSON object")
    _only(line, _STATE_MEMBERS, "member of a state")
    s0 = expand_bytes(_get(line, "s0", str))
    s1 = expand_bytes(_get(line, "s1", str)) if "s1" in line else s0
    pm = expand_bytes(_get(line, "pm", str))
    for name, values in (("s0", s0), ("s1", s1), ("pm", pm)):
        if len(values) != window:
            raise ValueError(f"{name!r} shows {len(values)} pages of a window of {window}")
    maps = _optional(line, "maps", list)
    return State(_get(line, "p", int), s0, s1, pm, None if maps is None else tuple(map(_maps_line, maps)))


def _maps_line(line: object) -> MapsLine:
    match line:
        case [int(start), int(end), str(perms), int(offset), str(source)]:
            return MapsLine(start, end, perms, offset, source)
    raise TypeError(f"{line!r} is no line of maps")


def _runs(text: str) -> Iterator[tuple[str, int]]:
    pages = 0
    for run in text.split():
        value, star, count = run.rpartition("*")
        if not star or not count.isdecimal():
            raise ValueError(f"{run!r} is not value*count")
        pages += int(count)
        if pages > RUN_PAGES_MAX:
            raise ValueError(f"{run!r} goes beyond {RUN_PAGES_MAX:,} pages")
        yield value, int(count)


def _expand(text: str) -> Iterator[str]:
    for value, count in _runs(text):
        yield from itertools.repeat(value, count)


def expand_bytes(runs: str) -> bytes:
    """`00*3 ff*1` (hexadecimal values) as one byte per page.

    Raises:
        ValueError: malformed.
    """
    return b"".join(bytes([int(value, 16)]) * count for value, count in _runs(runs))


def fingerprint(page: bytes) -> str:
    """A page as `data` shows it: the first 16 bytes in hexadecimal, a dash, the CRC-32 of all."""
    return f"{page[:FINGERPRINT_BYTES].hex()}-{zlib.crc32(page):08x}"


def canonical_maps(lines: Iterable[MapsLine]) -> tuple[MapsLine, ...]:
    """Neighbours merged that have equal permissions and source and, for a file, contiguous offsets.

    Args:
        lines: ascending.

    Cost: O(lines).
    """
    merged: list[MapsLine] = []
    for line in lines:
        if merged and _continues(merged, line):
            merged[-1] = replace(merged[-1], end=line.end)
        else:
            merged.append(line)
    return tuple(merged)


def _continues(merged: Sequence[MapsLine], line: MapsLine) -> bool:
    last = merged[-1]
    return (last.end, last.perms, last.source) == (line.start, line.perms, line.source) and (
        line.source == "anon" or last.offset + last.end - last.start == line.offset
    )
