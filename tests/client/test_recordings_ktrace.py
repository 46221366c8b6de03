"""Kernel traces: every given one is read, and what is no trace is refused with its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from hmm_client.recordings.errors import TraceError
from hmm_client.recordings.ktrace import (
    MapsLine,
    canonical_maps,
    expand,
    expand_bytes,
    fingerprint,
    read_trace,
)

DATA = Path(__file__).parent / "data" / "kernel-traces"
HEADER: dict[str, Any] = {
    "trace": "x", "window": 4, "base": "0x10000000000", "class": "scripted", "seed": 0, "thp": "never", "desc": "",
    "kernel": "6.12", "set": "base", "ops": 1, "fault_around_pages": 1, "first_fix": None,
}  # fmt: skip
STATE: dict[str, Any] = {"p": 0, "s0": "ff*3 00*1", "pm": "0*4", "maps": [[3, 4, "rw-p", 0, "anon"]]}
OPERATION: dict[str, Any] = {"i": 0, "op": "rd", "args": {}, "res": {"ret": 1, "vals": "1f*1"}, "state": [STATE]}


def write(path: Path, *lines: object) -> Path:
    """A trace of these lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("path", expand(DATA), ids=lambda path: path.name.partition(".")[0])
def test_read_gives_every_operation_when_the_trace_is_the_kernels(path: Path) -> None:
    """The header's promises hold: number of operations, pages of each snapshot, a state per live process."""
    trace = read_trace(path)
    assert trace.header.trace == path.name.partition(".")[0]
    assert [op.index for op in trace.operations] == list(range(trace.header.ops))
    live = {0}
    for operation in trace.operations:
        if operation.name == "fork":
            live.add(operation.args.q)
        if operation.name == "exit":
            live.discard(operation.process)
        assert [state.process for state in operation.states] == sorted(live)
        for state in operation.states:
            assert {len(state.s0), len(state.s1), len(state.pm)} == {trace.header.window}


def test_read_fills_in_defaults_when_arguments_are_absent(tmp_path: Path) -> None:
    """A missing process is 0, a missing page count is 1, a missing s1 equals s0."""
    (operation,) = read_trace(write(tmp_path / "x.jsonl", HEADER, OPERATION)).operations
    assert (operation.process, operation.args.page, operation.args.n) == (0, 0, 1)
    assert operation.result.vals == b"\x1f"
    assert operation.result.errno is None
    assert operation.states[0].s0 == operation.states[0].s1 == b"\xff\xff\xff\x00"
    assert operation.states[0].maps == (MapsLine(3, 4, "rw-p", 0, "anon"),)


def test_read_opens_plain_and_gzipped_files_when_both_are_given(tmp_path: Path) -> None:
    """The suffix says how a trace is stored."""
    plain = write(tmp_path / "x.jsonl", HEADER, OPERATION)
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    assert read_trace(plain).operations == read_trace(tmp_path / "y.jsonl.gz").operations


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op": "teleport"}, "unknown operation 'teleport'"),
        ({"args": {"pages": 1}}, "unknown argument 'pages'"),
        ({"args": {"page": "1"}}, "'page' is '1', not of type int"),
        ({"args": {"page": True}}, "'page' is True, not of type int"),
        ({"args": {"n": 1 << 63}}, "'n' is 9223372036854775808, not within 0 and 65536"),
        ({"op": "wr", "args": {"n": -1}}, "'n' is -1, not within 0 and 65536"),
        ({"op": "dwrite", "args": {"n": 1 << 20}}, "'n' is 1048576, not within -4503599627370496 and 65536"),
        ({"op": "munmap", "args": {"n": 1 << 52}}, "'n' is 4503599627370496, not within -4503599627370496 and "),
        ({"op": "munmap", "args": {"page": -(1 << 28) - 1}}, "'page' is -268435457, not within -268435456 and "),
        ({"op": "mremap", "args": {"to": 1 << 52}}, "'to' is 4503599627370496, not within -268435456 and "),
        ({"op": "fpunch", "args": {"n": -1}}, "'n' is -1, not within 0 and "),
        ({"op": "mremap", "args": {"new": 1 << 52}}, "'new' is 4503599627370496, not within -4503599627370496 and "),
        ({"op": "fpunch", "args": {"page": -1}}, "'page' is -1, not within 0 and "),
        ({"op": "mmap", "args": {"off": -1}}, "'off' is -1, not within 0 and "),
        ({"args": {"off": 4096}}, "'off' is 4096, not within 0 and 4095"),
        ({"op": "pin", "args": {"n": -(1 << 53)}}, "'n' is -9007199254740992, not within -4503599627370496 and "),
        ({"op": "dread", "args": {"unaligned": -1}}, "'unaligned' is -1, not within 0 and 4095"),
        ({"res": {}}, "'ret' is missing"),
        ({"res": {"ret": 0, "vals": "1f"}}, "'1f' is not value*count"),
        ({"res": {"ret": 0, "vals": "zz*1"}}, "invalid literal"),
        ({"res": {"ret": 0, "vals": "00*999999999999"}}, "'00*999999999999' goes beyond 1,048,576 pages"),
        ({"res": {"ret": 0, "data": "00*1 00*1048576"}}, "'00*1048576' goes beyond 1,048,576 pages"),
        ({"state": [{**STATE, "s0": "ff*3"}]}, "'s0' shows 3 pages of a window of 4"),
        ({"state": [{**STATE, "maps": [[3, 4, "rw-p", "anon"]]}]}, "is no line of maps"),
        ({"state": [7]}, "a state is no JSON object"),
        ({"i": 1}, "operation 1 where 0 is due"),
        ({"time": 7}, "unknown member of an operation 'time'"),
        ({"res": {"ret": 0, "vals2": "1f*1"}}, "unknown result 'vals2'"),
        ({"state": [{**STATE, "s2": "ff*4"}]}, "unknown member of a state 's2'"),
    ],
)
def test_read_names_file_and_line_when_an_operation_is_malformed(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """What can't be understood is refused with its place, not skipped."""
    path = write(tmp_path / "x.jsonl", HEADER, {**OPERATION, **change})
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert caught.value.line == 2


def test_read_makes_unsigned_what_the_kernel_takes_as_unsigned(tmp_path: Path) -> None:
    """A negative number of pages of an address range is passed as an unsigned long: mm/mremap.c, SYSCALL_DEFINE5."""
    change = {"op": "mremap", "args": {"n": -3, "new": -1, "mode": "inplace"}}
    [operation] = read_trace(write(tmp_path / "x.jsonl", HEADER, {**OPERATION, **change})).operations
    assert (operation.args.n, operation.args.new) == ((1 << 52) - 3, (1 << 52) - 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"{]\n", ":1: the line is no JSON: "),
        (b"[" * 100_000, ":1: the line is no JSON: "),
        (b"[]\n", ":1: the line is no JSON object"),
        (json.dumps({**HEADER, "window": None}).encode(), ":1: 'window' is None"),
        (json.dumps({**HEADER, "window": 0}).encode(), ":1: 'window' is 0, not within 1 and 1048576"),
        (json.dumps({**HEADER, "base": "0x1"}).encode(), ":1: 'base' is 0x1, where no window of 4 pages can be"),
        (json.dumps({**HEADER, "base": hex(1 << 47)}).encode(), ":1: 'base' is 0x800000000000, where no window"),
        (json.dumps({**HEADER, "fault_around_pages": 3}).encode(), ":1: 'fault_around_pages' is 3, no power of two"),
        (json.dumps({**HEADER, "thp": "madvise"}).encode(), ":1: 'thp' is 'madvise', not never or always"),
        (json.dumps(HEADER).encode(), "0 operations where the header promises 1"),
        (b"\xff\xfe", "decode"),
    ],
)
def test_read_refuses_a_file_when_it_is_no_trace(tmp_path: Path, content: bytes, message: str) -> None:
    """A file that begins wrongly, or ends early, is refused as a whole."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=r"x\.jsonl") as caught:
        read_trace(path)
    assert message in str(caught.value)


@pytest.mark.parametrize("content", [b"not gzip at all", gzip.compress(b"{}", mtime=0)[:-6]])
def test_read_refuses_a_file_when_it_can_not_be_unpacked(tmp_path: Path, content: bytes) -> None:
    """Neither a wrong suffix nor a file cut short is a crash."""
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=r"x\.jsonl\.gz"):
        read_trace(path)


def test_expand_finds_traces_in_any_folder_when_it_holds_some(tmp_path: Path) -> None:
    """A path is a file, a set, or a folder of sets; the manifest is no trace."""
    (tmp_path / "set").mkdir()
    trace = write(tmp_path / "set" / "a.jsonl", HEADER)
    write(tmp_path / "MANIFEST.jsonl", {})
    assert expand(trace) == [trace]
    assert expand(tmp_path / "set") == expand(tmp_path) == [trace]
    assert expand(str(DATA / "thp")) == sorted((DATA / "thp").iterdir())


def test_expand_refuses_a_path_when_nothing_is_there(tmp_path: Path) -> None:
    """A mistyped path is an error, not an empty success."""
    with pytest.raises(TraceError, match="no such file or folder"):
        expand(tmp_path / "absent")
    with pytest.raises(TraceError, match="no trace"):
        expand(tmp_path)


def test_canonical_maps_merges_neighbours_when_nothing_tells_them_apart() -> None:
    """Anonymous lines have offset 0 everywhere; lines of files must continue each other."""
    lines = [
        MapsLine(0, 2, "rw-p", 0, "anon"),
        MapsLine(2, 3, "rw-p", 0, "anon"),
        MapsLine(3, 4, "r--p", 0, "anon"),
        MapsLine(4, 6, "rw-s", 1, "f0"),
        MapsLine(6, 7, "rw-s", 3, "f0"),
        MapsLine(7, 8, "rw-s", 3, "f0"),
        MapsLine(9, 10, "rw-s", 4, "f0"),
    ]
    assert canonical_maps(lines) == (
        MapsLine(0, 3, "rw-p", 0, "anon"),
        MapsLine(3, 4, "r--p", 0, "anon"),
        MapsLine(4, 7, "rw-s", 1, "f0"),
        MapsLine(7, 8, "rw-s", 3, "f0"),
        MapsLine(9, 10, "rw-s", 4, "f0"),
    )


def test_fingerprint_is_the_traces_own_when_a_page_is_given() -> None:
    """The CRC-32 of an empty page is c71c0011, as every trace shows it."""
    assert fingerprint(bytes(4096)) == "00" * 16 + "-c71c0011"
    assert fingerprint(bytes([6]) * 4096) == "06" * 16 + "-a6135260"


def test_expand_bytes_gives_one_byte_per_page_when_runs_are_mixed() -> None:
    """Values are hexadecimal, counts decimal."""
    assert expand_bytes("ff*2 00*10") == b"\xff\xff" + bytes(10)
    assert expand_bytes("") == b""
