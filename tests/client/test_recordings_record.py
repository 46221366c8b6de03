"""Recording for real: strace runs programs, and their layouts are caught at the right moments."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from layout_model import LayoutModel

from hmm_client.recordings import Recorded, Recording, RecordingError, compare, record

PROGRAMS = Path(__file__).parent / "data" / "programs"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C programs, compiled; `-static` ones end in `-static`, and `late` has no libc."""
    folder = tmp_path_factory.mktemp("programs")
    for name in ("layout", "threads"):
        compile_program(name, folder / name, "-pthread")
        compile_program(name, folder / f"{name}-static", "-pthread", "-static")
    compile_program("late", folder / "late", "-static", "-nostdlib")
    compile_program("state", folder / "state")
    compile_program("killed", folder / "killed", "-pthread")
    return folder


def compile_program(name: str, target: Path, *options: str) -> None:
    """Compile one of the C programs."""
    subprocess.run(["gcc", "-O1", "-w", *options, "-o", target, PROGRAMS / f"{name}.c"], check=True)


def check(recorded: Recorded) -> None:
    """The recorded steps lead to the recorded final layout."""
    recording = recorded.recording
    differences = compare(recording.final, LayoutModel(recording).run())
    assert not differences, "\n".join(map(str, differences))
    assert recording.plan.incomparable is None


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["true"], 0),
        (["sh", "-c", "ls / | sort | head -1 >/dev/null; exit 3"], 3),
        (["env", "sh", "-c", "true"], 0),
        (["sh", "-c", "sleep 0.01 & exec true"], 0),
    ],
    ids=["dynamic", "pipeline", "exec", "exec-with-child"],
)
def test_record_reproduces_the_final_layout_when_the_program_is_a_shells(
    tmp_path: Path, command: list[str], status: int
) -> None:
    """Children are recorded too; a first process that execs is recorded from its last program on."""
    recorded = record(command, tmp_path)
    assert recorded.status == status
    assert sorted(path.name for path in recorded.recording.folder.iterdir()) == [
        "maps.final",
        "maps.initial",
        "strace.log",
    ]
    check(recorded)


@pytest.mark.parametrize(
    ("name", "arguments", "status"),
    [
        ("layout", [], 0),
        ("layout-static", [], 0),
        ("threads", [], 5),
        ("threads-static", [], 5),
        ("threads", ["last"], 0),
        ("threads", ["exit"], 7),
        ("late", [], 0),
        ("state", [], 0),
    ],
)
def test_record_reproduces_the_final_layout_when_the_program_does_odd_things(
    tmp_path: Path, built: Path, name: str, arguments: list[str], status: int
) -> None:
    """Static programs, threads, no exit_group, a late first brk, calls that others have made mean something else."""
    recorded = record([str(built / name), *arguments], tmp_path)
    assert recorded.status == status
    check(recorded)


@pytest.mark.parametrize(
    ("how", "number"),
    [
        ("fault", signal.SIGSEGV),
        ("blocked", signal.SIGSEGV),
        ("abort", signal.SIGABRT),
        ("raise", signal.SIGRTMIN + 3),
        ("kill", signal.SIGKILL),
        ("child", signal.SIGKILL),
        ("thread", signal.SIGSEGV),
        ("handler", signal.SIGTERM),
    ],
)
def test_record_reproduces_the_layout_before_its_death_when_a_signal_ends_the_program(
    tmp_path: Path, built: Path, how: str, number: int
) -> None:
    """strace is held by the line that announces the signal, or by the kill that nothing else announces."""
    recorded = record([str(built / "killed"), how], tmp_path)
    assert recorded.status == 128 + number
    assert "+++ killed by SIG" in (tmp_path / "strace.log").read_text()
    check(recorded)


def start_recording(folder: Path, *command: str | Path) -> subprocess.Popen[str]:
    """A recording on its own, whose program says its process id first."""
    recording = [sys.executable, "-m", "hmm_client", "record", "-o", folder, "--", *command]
    return subprocess.Popen(recording, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_record_reproduces_the_layout_before_its_death_when_somebody_kills_an_idle_program(
    tmp_path: Path, built: Path
) -> None:
    """Nothing announces that; its layout is read as soon as it has made no call for a while."""
    with start_recording(tmp_path / "out", built / "killed", "sleep") as recording:
        assert recording.stdout is not None
        pid = int(recording.stdout.readline())
        assert recording.stdout.readline() == "idle\n"  # said by the program when it has slept for long enough
        os.kill(pid, signal.SIGKILL)
        recording.communicate()
    assert recording.returncode == 128 + signal.SIGKILL
    check(Recorded(Recording.load(tmp_path / "out"), recording.returncode))


def test_record_says_that_the_last_layout_was_not_seen_when_somebody_kills_a_busy_program(
    tmp_path: Path, built: Path
) -> None:
    """There was no time to look between two of its calls."""
    with start_recording(tmp_path / "out", built / "killed", "busy") as recording:
        assert recording.stdout is not None
        os.kill(int(recording.stdout.readline()), signal.SIGKILL)
        _, said = recording.communicate()
    assert recording.returncode == 2
    assert "killed was not seen: SIGKILL ended it in the middle of its calls" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "no such command: (none given)"),
        (["/no/such/program"], "no such command: /no/such/program"),
    ],
)
def test_record_leaves_nothing_when_it_fails(tmp_path: Path, command: list[str], message: str) -> None:
    """A recording is complete, or is not there."""
    with pytest.raises(RecordingError) as caught:
        record(command, tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_record_ends_its_command_when_it_is_told_to_end(tmp_path: Path, number: int, status: int) -> None:
    """Neither the command nor strace goes on alone, and no half recording is left."""
    start = "from hmm_client.cli import main; main()"
    command = [
        sys.executable,
        "-c",
        start,
        "record",
        "-o",
        tmp_path / "out",
        "--",
        "sh",
        "-c",
        "echo here; exec sleep 60",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as recording:
        assert recording.stdout is not None
        assert recording.stdout.readline() == "here\n"
        recording.send_signal(number)
        assert recording.wait(60) == status
        assert recording.stdout.read() == ""  # nobody is left who could write
    assert not (tmp_path / "out").exists()


def test_record_says_why_when_the_kernel_can_not_execute_the_command(tmp_path: Path) -> None:
    """A file with the right to be executed need not be a program."""
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF and no more")
    program.chmod(0o755)
    with pytest.raises(RecordingError, match="can't be executed: ENOEXEC"):
        record([str(program)], tmp_path / "out")


@pytest.mark.parametrize(
    ("command", "seen"), [(["cat", "/proc/self/status"], "SigIgn:"), (["cat", "/proc/self/environ"], "")]
)
def test_record_starts_the_command_as_it_starts_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], command: list[str], seen: str
) -> None:
    """Ignored signals and the environment, strange entries included, are those that the command has by itself."""
    monkeypatch.delenv("LC_ALL", raising=False)
    monkeypatch.setenv("LC_CTYPE", "C")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("SIGNS", "a=b=c d")
    alone = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    capfd.readouterr()
    record(command, tmp_path)
    recorded = capfd.readouterr().out
    expected, found = (
        sorted(line for part in text.split("\0") for line in part.splitlines() if line.startswith(seen))
        for text in (alone, recorded)
    )
    assert expected
    assert found == expected


def test_record_refuses_a_folder_when_it_holds_something(tmp_path: Path) -> None:
    """Nothing is overwritten, and what was there stays."""
    (tmp_path / "maps.final").write_text("precious")
    with pytest.raises(RecordingError, match="the folder is not empty"):
        record(["true"], tmp_path)
    assert (tmp_path / "maps.final").read_text() == "precious"
    with pytest.raises(RecordingError, match=r"Not a directory|File exists"):
        record(["true"], tmp_path / "maps.final")


def test_record_says_what_to_install_when_there_is_no_strace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """strace is a Debian package, not a dependency of this one."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RecordingError, match="apt-get install strace"):
        record(["/bin/true"], tmp_path / "out")


def test_record_says_what_may_forbid_it_when_strace_records_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A strace that may not trace says so itself and writes no log."""
    fake = tmp_path / "bin" / "strace"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{Path(shutil.which('sh') or '/bin/sh').parent}")
    with pytest.raises(RecordingError, match=r"strace recorded nothing.*ptrace_scope"):
        record(["/bin/true"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_record_command_writes_where_it_is_told(tmp_path: Path) -> None:
    """--output; the command's exit code is its own, and what was recorded stands on stderr."""
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "hmm_client", "record", "--output", folder, "--", "sh", "-c", "exit 3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert re.fullmatch(rf"{folder}: \d+ calls of 1 process, \d+ mappings at the end\n", done.stderr)
    assert (folder / "maps.final").stat().st_size > 0
