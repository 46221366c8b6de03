"""Verification: a trace that is true shows no difference, and every value that is false shows exactly one."""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hmm_client import sync
from hmm_client.cli import main
from hmm_client.drivers import dmirror
from hmm_client.embedded import PATIENCE, embedded_daemon
from hmm_client.recordings.errors import TraceError
from hmm_client.recordings.ktrace import expand, read_trace
from hmm_client.verification import Aspect, InProcess, Level, Subject, TraceReport, verify
from hmm_client.verification.over_wire import OverWire

TRACES = Path(__file__).parent / "data" / "kernel-traces"
WINDOW = 8
Line = dict[str, Any]


def fingerprint(**values: int) -> str:
    """A page with these bytes (`b3=7`), zero elsewhere, as `data` shows it."""
    page = bytearray(4096)
    for name, value in values.items():
        page[int(name[1:])] = value
    return f"{page[:16].hex()}-{zlib.crc32(page):08x}"


def line(op: str, args: Line, res: Line, *states: Line, p: int = 0) -> Line:
    """One operation of a trace; its number is given later."""
    return {"op": op, "p": p, "args": args, "res": res, "state": list(states)}


def state(p: int, s0: str, pm: str, maps: list[list[object]] | None = None) -> Line:
    """One process after an operation."""
    return {"p": p, "s0": s0, "pm": pm} | ({} if maps is None else {"maps": maps})


ANON = [0, 4, "rw-p", 0, "anon"]
FILE = [4, 8, "r--s", 0, "f0"]
HALVES = [[0, 2, "rw-p", 0, "anon"], [2, 4, "rw-p", 0, "anon"]]
CUT = [[0, 2, "rw-p", 0, "anon"], [2, 3, "r--p", 0, "anon"], [3, 4, "rw-p", 0, "anon"], FILE]
SEVEN, EIGHT, NOTHING = fingerprint(b3=7), fingerprint(b3=8), fingerprint()
DONE: Line = {"ret": 0}
BEFORE = state(0, "ff*8", "0*8", [])
FILLED = "02*2 11*2 01*2 00*2"
SHARED = "01*2 11*2 01*2 00*2"
PARENT = state(0, SHARED, "1*4 d*2 0*2")
ALONE = state(0, SHARED, "9*2 1*2 d*2 0*2")


FIVE = fingerprint(b0=5)
PUNCHED = state(0, "01*2 11*2 00*1 01*1 00*2", "9*2 1*2 0*1 d*1 0*2")
WRITTEN = state(0, "02*1 01*1 11*2 00*1 01*1 00*2", "9*2 1*2 0*1 d*1 0*2")
MOVED = state(0, "22*1 01*1 11*2 00*1 01*1 00*2", "2*1 9*1 1*2 0*1 d*1 0*2") | {"s1": "00*1 01*1 11*2 00*1 01*1 00*2"}
TAKEN = state(0, "00*1 01*1 11*2 00*1 01*1 00*2", "2*1 9*1 1*2 0*1 d*1 0*2")
DRIVEN = state(0, "02*1 01*1 11*2 02*1 01*1 00*2", "9*2 1*2 d*2 0*2")


def true_lines() -> list[Line]:
    """A trace in which every kind of result occurs, each as Linux gives it; device operations at the end."""
    anonymous = {"page": 0, "n": 4, "prot": "rw", "flags": "private", "src": "anon"}
    of_file = {"page": 4, "n": 4, "prot": "r", "flags": "shared", "src": "f0", "off": 0}
    overlapping = {"page": 0, "n": 2, "new": 2, "mode": "move", "to": 1}
    read = {"ret": 4, "sig": "SEGV_MAPERR", "sigpage": 4, "vals": "05*1 06*1 00*2"}
    dumped = {"ret": 0, "data": f"{NOTHING}*1 {SEVEN}*1 {EIGHT}*1 BUS_ADRERR*1"}
    operations = [
        line("open", {"h": 0, "dev": 0}, DONE, BEFORE),
        line("ftruncate", {"f": 0, "n": 2}, DONE, BEFORE),
        line("fwrite", {"f": 0, "page": 0, "n": 2, "off": 3, "val": 7}, {"ret": 2}, BEFORE),
        line("mmap", anonymous, DONE, state(0, "00*4 ff*4", "0*8", [ANON])),
        line("wr", {"page": 0, "n": 2, "off": 0, "val": 5}, {"ret": 2}, state(0, "02*2 00*2 ff*4", "9*2 0*6")),
        line("rd", {"page": 0, "n": 6, "off": 0}, read, state(0, "02*2 11*2 ff*4", "9*2 1*2 0*4")),
        line("mmap", of_file, {"ret": 4}, state(0, "02*2 11*2 00*4", "9*2 1*2 0*4", [ANON, FILE])),
        line("dump", {"page": 3, "n": 4}, dumped, state(0, FILLED, "9*2 1*2 d*2 0*2")),
        line("mprotect", {"page": 2, "n": 1, "prot": "r"}, DONE, state(0, FILLED, "9*2 1*2 d*2 0*2", CUT)),
        line("fork", {"q": 1}, DONE, PARENT, state(1, "01*2 11*2 00*4", "1*4 0*4", CUT)),
        line("munmap", {"page": 0, "n": 8}, DONE, ALONE, state(1, "ff*8", "0*8", []), p=1),
        line("exit", {}, DONE, ALONE, p=1),
        line("mremap", overlapping, {"ret": -1, "errno": "EINVAL"}, ALONE),
        line("fread", {"f": 0, "page": 0, "n": 2}, {"ret": 2, "data": f"{SEVEN}*1 {EIGHT}*1"}, ALONE),
        line("fpunch", {"f": 0, "page": 0, "n": 1}, DONE, state(0, "01*2 11*2 00*1 01*1 00*2", "9*2 1*2 0*1 d*1 0*2")),
        line("snap", {"h": 0, "page": 0, "n": 4}, DONE | {"prot": "01*2 11*2", "cpages": 4}, PUNCHED),
        line("dread", {"h": 0, "page": 0, "n": 1}, DONE | {"data": f"{FIVE}*1", "cpages": 1, "faults": 1}, PUNCHED),
        line("dwrite", {"h": 0, "page": 0, "n": 1, "val": 0}, DONE | {"cpages": 1, "faults": 1}, WRITTEN),
        line("mig_dev", {"h": 0, "page": 0, "n": 1}, DONE | {"data": f"{NOTHING}*1", "cpages": 1}, MOVED),
        line("mig_sys", {"h": 0, "page": 0, "n": 1}, DONE | {"cpages": 1}, WRITTEN),
        line("mig_dev", {"h": 0, "page": 4, "n": 1}, {"ret": -1, "errno": "ENOENT"}, WRITTEN),
        line("excl", {"h": 0, "page": 0, "n": 1}, DONE | {"data": f"{NOTHING}*1", "cpages": 1}, TAKEN),
        line("chk_excl", {"h": 0, "page": 0, "n": 1}, {"ret": -1, "errno": "EPERM"}, TAKEN),
        line("pin", {"page": 0, "n": 1, "write": 1}, DONE, WRITTEN),
        line("mig_sys", {"h": 0, "page": 0, "n": 1}, DONE | {"cpages": 0}, WRITTEN),
        line("unpin", {}, DONE, WRITTEN),
        line("pin", {"page": 0, "n": -1, "write": 1}, {"ret": -1, "errno": "EINVAL"}, WRITTEN),
        line("release", {"h": 0, "page": 0, "n": 1}, DONE, WRITTEN),
        line("mmap", {"page": 4, "n": 1, "prot": "rw", "flags": "shared", "src": "d0"}, {"ret": 4}, DRIVEN),
        line("close", {"h": 0}, DONE, DRIVEN),
    ]
    return [operation | {"i": number} for number, operation in enumerate(operations)]


def write(path: Path, operations: list[Line]) -> Path:
    """A trace as a file."""
    header = {
        "trace": path.stem,
        "window": WINDOW,
        "base": "0x10000000000",
        "class": "scripted",
        "seed": 0,
        "thp": "never",
        "desc": "",
        "kernel": "6.12",
        "set": "base",
        "ops": len(operations),
        "fault_around_pages": 1,
        "first_fix": None,
    }
    path.write_text("".join(json.dumps(value) + "\n" for value in [header, *operations]))
    return path


def verified(path: Path, make: Callable[[], Subject] = InProcess) -> TraceReport:
    """A trace, verified; in process unless told otherwise."""
    with make() as subject:
        return verify(read_trace(path), subject)


@pytest.fixture(scope="module")
def over_wire() -> Iterator[Callable[[], Subject]]:
    """Makes subjects that are processes and devices of a daemon."""
    with (
        embedded_daemon(acknowledgement_s=600.0, **PATIENCE) as target,
        sync.connect(target, name="verify") as client,
    ):
        yield lambda: OverWire(client)


@pytest.fixture(params=["in process", "over the wire"])
def make(request: pytest.FixtureRequest) -> Callable[[], Subject]:
    """Makes subjects of both kinds."""
    if request.param == "in process":
        return InProcess
    made: Callable[[], Subject] = request.getfixturevalue("over_wire")
    return made


@pytest.mark.parametrize("path", expand(TRACES), ids=lambda path: path.name.removesuffix(".jsonl.gz"))
def test_verify_finds_nothing_when_the_kernel_made_the_trace(path: Path) -> None:
    """The model does what Linux 6.12 did."""
    report = verified(path)
    assert not report.differences
    assert report.operations == len(report.trace.operations)
    assert report.counts[Level.SEMANTIC].compared > report.operations


WIRE_TRACES = (
    "base/rmixed-00",
    "base/rmultidev-00",
    "base/s29-exclusive-refused",
    "base/x06-close-mapped",
    "base/x07-close-mapped-fork",
    "thp/trbasic-00",
    "thp/t05-thp-migrate",
)


@pytest.mark.parametrize("name", WIRE_TRACES)
def test_verify_counts_the_same_when_a_daemon_is_verified(name: str, over_wire: Callable[[], Subject]) -> None:
    """One driver, two transports: the same operations, comparisons and results."""
    path = TRACES / f"{name}.jsonl.gz"
    report, in_process = verified(path, over_wire), verified(path)
    assert not report.differences
    assert (report.operations, report.counts) == (in_process.operations, in_process.counts)


STEPPED_TRACES = ("base/rmultidev-00", "base/rmixed-00", "thp/t05-thp-migrate")


@pytest.mark.parametrize("name", STEPPED_TRACES)
def test_verify_finds_nothing_when_the_driver_takes_the_steps_of_migrations(name: str) -> None:
    """Setup, allocate, copy, pages and finalize come to what the kernel's driver came to."""
    path = TRACES / f"{name}.jsonl.gz"
    report, in_one_call = verified(path, partial(InProcess, by_steps=True)), verified(path)
    assert not report.differences
    assert (report.operations, report.counts) == (in_one_call.operations, in_one_call.counts)


def test_verify_finds_nothing_when_the_machine_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """HMM_RANGE_DEFAULT_TIMEOUT of the test driver, one second, is no limit here: traces record no timing."""
    monkeypatch.setattr(dmirror, "monotonic", partial(next, count(step=2)))
    with InProcess() as subject:
        report = verify(read_trace(TRACES / "base" / "rdevice-00.jsonl.gz"), subject)
    assert not report.differences


def test_verify_refuses_steps_when_a_daemon_is_verified() -> None:
    """The driver of a daemon migrates in one call."""
    result = CliRunner().invoke(main, ["verify", "--by-steps", str(TRACES)])
    assert result.exit_code == 2
    assert "--by-steps needs --in-process" in result.output


def test_daemon_is_as_before_when_a_trace_has_ended(tmp_path: Path, over_wire: Callable[[], Subject]) -> None:
    """Devices, mirrors, pins, processes and files of one trace do not get in the way of the next."""
    path = write(tmp_path / "true.jsonl", true_lines())
    for _ in range(12):  # devices of more than one trace would not fit beside each other for long
        assert not verified(path, over_wire).differences


def test_verify_finds_nothing_when_every_operation_is_true(tmp_path: Path, make: Callable[[], Subject]) -> None:
    """All operations are performed and compared, with entries and signals."""
    report = verified(write(tmp_path / "true.jsonl", true_lines()), make)
    assert not report.differences
    assert report.operations == len(true_lines())


ALTERATIONS: list[tuple[Aspect, int, int | None, Callable[[Line], object]]] = [
    (Aspect.RET, 2, None, lambda op: op["res"].update(ret=1)),
    (Aspect.ERRNO, 12, None, lambda op: op["res"].update(errno="EFAULT")),
    (Aspect.SIGNAL, 5, None, lambda op: op["res"].update(sig="SEGV_ACCERR")),
    (Aspect.SIGNAL_PAGE, 5, None, lambda op: op["res"].update(sigpage=5)),
    (Aspect.VALUES, 5, None, lambda op: op["res"].update(vals="05*1 06*1 00*1 01*1")),
    (Aspect.DATA, 7, None, lambda op: op["res"].update(data=f"{NOTHING}*1 {SEVEN}*2 BUS_ADRERR*1")),
    (Aspect.DATA, 7, None, lambda op: op["res"].update(data=f"{NOTHING}*1 {SEVEN}*1 {EIGHT}*1 SEGV_MAPERR*1")),
    (Aspect.DATA, 13, None, lambda op: op["res"].update(data=f"{SEVEN}*2")),
    (Aspect.PROCESSES, 11, None, lambda op: op["state"].append(state(2, "ff*8", "0*8"))),
    (Aspect.MAPS, 6, 0, lambda op: op["state"][0].update(maps=[ANON, [4, 8, "r--s", 1, "f0"]])),
    (Aspect.MAPS, 6, 0, lambda op: op["state"][0].update(maps=[ANON, [4, 8, "r--s", 0, "f1"]])),
    (Aspect.MAPS, 6, 0, lambda op: op["state"][0].update(maps=[ANON, [4, 7, "r--s", 0, "f0"]])),
    (Aspect.MAPS, 9, 1, lambda op: op["state"][1].update(maps=[ANON, FILE])),
    (Aspect.RAW_MAPS, 6, 0, lambda op: op["state"][0].update(maps=[*HALVES, FILE])),
    (Aspect.SNAPSHOT, 9, 1, lambda op: op["state"][1].update(s0="02*1 01*1 11*2 00*4")),
    (Aspect.SNAPSHOT, 18, 0, lambda op: op["state"][0].update(s0="21*1 01*1 11*2 00*1 01*1 00*2")),
    (Aspect.OTHER_SNAPSHOT, 18, 0, lambda op: op["state"][0].update(s1="22*1 01*1 11*2 00*1 01*1 00*2")),
    (Aspect.PAGEMAP, 4, 0, lambda op: op["state"][0].update(pm="d*2 0*6")),
    (Aspect.SHOWN, 15, None, lambda op: op["res"].update(prot="01*3 11*1")),
    (Aspect.COPIED, 19, None, lambda op: op["res"].update(cpages=0)),
    (Aspect.DATA, 16, None, lambda op: op["res"].update(data=f"{SEVEN}*1")),
    (Aspect.FAULTS, 17, None, lambda op: op["res"].update(faults=0)),
    (Aspect.ERRNO, 22, None, lambda op: op["res"].update(errno="EINVAL")),
    (Aspect.RET, 23, None, lambda op: op.update(res={"ret": -1})),
]


@pytest.mark.parametrize(
    ("aspect", "number", "process", "alter"), ALTERATIONS, ids=[f"{row[0].value}-{row[1]}" for row in ALTERATIONS]
)
def test_verify_finds_one_difference_when_one_value_is_false(
    tmp_path: Path,
    make: Callable[[], Subject],
    aspect: Aspect,
    number: int,
    process: int | None,
    alter: Callable[[Line], object],
) -> None:
    """Each field is really compared: a single false value is reported, at its place, and nothing else is."""
    operations = copy.deepcopy(true_lines())  # values stand in several lines
    alter(operations[number])
    report = verified(write(tmp_path / "false.jsonl", operations), make)
    found = [(difference.aspect, difference.operation.index, difference.process) for difference in report.differences]
    assert found == [(aspect, number, process)]
    level = report.differences[0].level
    assert {level: counts.differences for level, counts in report.counts.items()} == {
        other: int(other is level) for other in Level
    }
    assert [operation.index for operation in report.differences[0].before] == list(range(max(0, number - 5), number))


@pytest.mark.parametrize(
    ("number", "level"),
    [(17, Level.MIRROR), (20, Level.MIRROR), (22, Level.MIRROR), (21, Level.SEMANTIC), (3, Level.SEMANTIC)],
)
def test_difference_has_the_level_of_its_kind(tmp_path: Path, number: int, level: Level) -> None:
    """Rounds of faulting, ENOENT and CHECK_EXCLUSIVE depend on the driver's own table; other results are semantic."""
    operations = copy.deepcopy(true_lines())
    operations[number]["res"] = operations[number]["res"] | ({"faults": 7} if number == 17 else {"ret": 7})
    report = verified(write(tmp_path / "false.jsonl", operations))
    assert [difference.level for difference in report.differences] == [level]


def test_command_ends_with_zero_when_only_details_differ(tmp_path: Path) -> None:
    """Exit code 1 is for semantic differences; others are shown and counted."""
    operations = copy.deepcopy(true_lines())
    operations[4]["state"][0].update(pm="d*2 0*6")
    path = write(tmp_path / "false.jsonl", operations)
    result = CliRunner().invoke(main, ["verify", "--in-process", str(path)])
    assert result.exit_code == 0
    assert "pagemap of process 0 (detail)" in result.stdout


def test_verify_refuses_a_trace_when_an_argument_names_nothing(tmp_path: Path) -> None:
    """An unknown advice is an unusable input, and the message has file and line."""
    operations = true_lines()
    operations[8] |= {"op": "madvise", "args": {"page": 0, "n": 1, "adv": "NONSENSE"}}
    with pytest.raises(TraceError, match=r"false\.jsonl:10: madvise: 'NONSENSE'"):
        verified(write(tmp_path / "false.jsonl", operations))


def test_command_prints_counts_when_json_is_asked_for(tmp_path: Path) -> None:
    """One object on stdout, exit code 0."""
    write(tmp_path / "true.jsonl", true_lines())
    result = CliRunner().invoke(main, ["verify", "--in-process", "--format", "json", str(tmp_path)])
    assert result.exit_code == 0
    counts = json.loads(result.stdout)
    assert counts["traces"] == 1
    assert counts["operations"] == len(true_lines())
    assert [counts[level.value]["differences"] for level in Level] == [0, 0, 0]
    assert counts["semantic"]["compared"] > 90


def test_command_shows_the_difference_when_there_is_one(tmp_path: Path) -> None:
    """Exit code 1; the text has the operation, what was expected and found, and what came before."""
    operations = copy.deepcopy(true_lines())
    operations[5]["res"]["vals"] = "05*1 06*1 00*1 01*1"
    path = write(tmp_path / "false.jsonl", operations)
    result = CliRunner().invoke(main, ["verify", "--in-process", str(path)])
    assert result.exit_code == 1
    shown = result.stdout.split("\n\n")[1].splitlines()
    assert shown[0] == f"{path}:7: vals (semantic)"
    assert shown[-4:] == [
        "    after    4 p0 wr n=2 val=5",
        "    in       5 p0 rd n=6",
        "    expected [3] 01",
        "    found    [3] 00",
    ]


def test_command_shows_as_many_differences_as_it_is_asked_for(tmp_path: Path) -> None:
    """The first in full, and how many more there are; counts and exit code are of all."""
    operations = copy.deepcopy(true_lines())
    operations[2]["res"]["ret"], operations[5]["res"]["sigpage"] = 1, 5
    path = write(tmp_path / "false.jsonl", operations)
    result = CliRunner().invoke(main, ["verify", "--in-process", "--show", "1", str(path)])
    assert result.exit_code == 1
    assert f"{path}:4: ret (semantic)" in result.stdout
    assert "sigpage (semantic)" not in result.stdout
    assert "and 1 more" in result.stdout


@pytest.mark.parametrize("content", ["", "{}\n", "no json\n"])
def test_command_ends_with_two_when_a_trace_is_unusable(tmp_path: Path, content: str) -> None:
    """An input that cannot be read is told from a difference; the traces beside it are compared all the same."""
    (tmp_path / "bad.jsonl").write_text(content)
    write(tmp_path / "true.jsonl", true_lines())
    nowhere = str(tmp_path / "nowhere")
    result = CliRunner().invoke(main, ["verify", "--in-process", "--format", "json", nowhere, str(tmp_path)])
    assert result.exit_code == 2
    assert f"hmmctl: {nowhere}: no such file or folder\nhmmctl: {tmp_path / 'bad.jsonl'}" in result.stderr
    assert json.loads(result.stdout)["traces"] == 1


def test_command_prints_no_counts_when_no_trace_is_usable(tmp_path: Path) -> None:
    """Nothing was compared, so nothing agrees."""
    result = CliRunner().invoke(main, ["verify", "--in-process", str(tmp_path)])
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"hmmctl: {tmp_path}: no trace" in result.stderr
