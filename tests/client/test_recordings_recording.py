"""A folder as a whole: what it is called, where things lie in it, and what makes it unusable."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hmm_client.recordings import GrowStack, InputError, Recording, RecordingError, demo_folder

DATA = Path(__file__).parent / "data"
PROGRAMS = DATA / "real-programs"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a small recording, to be spoilt."""
    return Path(shutil.copytree(PROGRAMS / "true", tmp_path / "true"))


def test_recording_knows_its_program_when_it_is_loaded() -> None:
    """A recording is called what its folder is called; the program is the one of its first exec."""
    sqlite = Recording.load(PROGRAMS / "sqlite")
    assert (sqlite.program, sqlite.command) == ("sqlite", "/usr/bin/sqlite3")
    assert len(sqlite.log.calls) == 139


def test_recording_gives_the_places_of_the_address_space_when_asked() -> None:
    """Placement begins below the stack where the loader ends; the break is the first answer of brk."""
    recording = Recording.load(str(PROGRAMS / "true"))
    assert recording.mmap_base == 0x7F14E38D0000
    assert recording.brk_start == 0x556F4CFF6000
    assert [area.name for area in recording.initial if area.grows_down] == ["[stack]"]
    assert not any(area.name == "[vsyscall]" for area in recording.initial + recording.final)


def test_placement_begins_at_the_loader_when_the_program_lies_above_it(folder: Path) -> None:
    """With an unlimited stack the base lies below the program; [vdso] is placed beside the loader all the same."""
    maps = (folder / "maps.initial").read_text()
    stack = next(line for line in maps.splitlines(True) if "[stack]" in line)
    program = "7f20e4c00000-7f20e4c01000 r--p 00000000 fe:00 7                                  /home/user/program\n"
    (folder / "maps.initial").write_text(maps.replace(stack, program + stack))
    assert Recording.load(folder).mmap_base == 0x7F14E38D0000
    (folder / "maps.initial").write_text(maps.replace("[vdso]", "").replace(stack, program + stack))
    assert Recording.load(folder).mmap_base == 0x7F20E4C01000


def test_recording_has_no_break_when_the_program_never_asked(folder: Path) -> None:
    """A static program without malloc makes no call of brk."""
    log = (folder / "strace.log").read_text()
    (folder / "strace.log").write_text("".join(line for line in log.splitlines(True) if "brk(" not in line))
    assert Recording.load(folder).brk_start is None


def test_recording_has_no_command_when_the_log_begins_behind_its_exec(folder: Path) -> None:
    """strace -p joins a program that runs already."""
    log = (folder / "strace.log").read_text()
    (folder / "strace.log").write_text(log.partition("\n")[2])
    assert Recording.load(folder).command == ""


def test_recording_of_the_demo_shows_many_ways_to_use_memory() -> None:
    """It forks, vforks, runs threads, shares, moves, protects, advises, writes back and unmaps."""
    recording = Recording.load(demo_folder())
    counts = recording.plan.counts()
    wanted = {"Map", "Unmap", "Protect", "Remap", "Advise", "Brk", "Sync", "Fork", "Vfork", "Thread", "Exec", "Exit"}
    assert wanted <= counts.keys()
    assert recording.program == "demo"
    assert 100 <= len(recording.log.calls) <= 500


def test_recording_shows_how_the_stack_grew_when_it_did() -> None:
    """Faults extend the stack without a call: the two layouts tell."""
    recording = Recording.load(DATA / "recorded" / "layout")
    (growth,) = (step for step in recording.plan.steps if isinstance(step, GrowStack))
    before = next(area for area in recording.initial if area.name == "[stack]")
    assert growth.start < growth.end == before.start


@pytest.mark.parametrize("name", ["strace.log", "maps.initial", "maps.final"])
def test_load_refuses_a_folder_when_a_file_is_missing(folder: Path, name: str) -> None:
    """The message names the folder and the file."""
    (folder / name).unlink()
    with pytest.raises(RecordingError, match=f"true: not a recording: it has no {name}"):
        Recording.load(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("strace.log", "", "strace.log: no system call was recorded"),
        ("strace.log", "hello\n", "strace.log:1: not a line of strace"),
        ("strace.log", "1 mmap(NULL, 1, 0, MAP_X, -1, 0) = 0x1000\n", "strace.log:1: mmap: unknown flag 'MAP_X'"),
        ("maps.initial", "", "maps.initial: no memory is mapped"),
        ("maps.final", "hello\n", "maps.final:1: not a line of /proc/PID/maps"),
    ],
)
def test_load_refuses_a_folder_when_a_file_is_not_what_it_should_be(
    folder: Path, name: str, content: str, message: str
) -> None:
    """The message names the file, and the line where there is one."""
    (folder / name).write_text(content)
    with pytest.raises(InputError) as caught:
        Recording.load(folder)
    assert message in str(caught.value)


def test_load_reads_the_same_when_lines_end_as_elsewhere(folder: Path) -> None:
    """A recording may have come through a system that ends lines with CR and LF."""
    before = Recording.load(folder)
    for name in ("strace.log", "maps.initial", "maps.final"):
        text = (folder / name).read_bytes()
        (folder / name).write_bytes(text.replace(b"\n", b"\r\n"))
    after = Recording.load(folder)
    assert (after.initial, after.final, after.plan) == (before.initial, before.final, before.plan)


def test_load_refuses_a_log_when_it_is_cut_anywhere_in_a_line(folder: Path) -> None:
    """Half an address is an address too."""
    text = (folder / "strace.log").read_text()
    begin = text.index("mmap(")
    for end in range(begin + 1, text.index("\n", begin)):
        (folder / "strace.log").write_text(text[:end])
        with pytest.raises(RecordingError, match=r"strace.log:\d+: (not a line of strace|.*is the log cut short\?)"):
            Recording.load(folder)


def test_load_refuses_a_layout_when_no_process_can_have_it(folder: Path) -> None:
    """The kernel's half of the addresses begins behind the last page of a process."""
    maps = (folder / "maps.initial").read_text().splitlines(True)[:-1]
    (folder / "maps.initial").write_text("".join([*maps, "7fffffffe000-800000000000 rw-p 00000000 00:00 0 \n"]))
    with pytest.raises(RecordingError, match=r"maps.initial: no process has memory at 0x7fffffffffff"):
        Recording.load(folder)


def test_load_refuses_a_path_when_it_is_no_folder(tmp_path: Path, folder: Path) -> None:
    """A mistyped path and a file are told apart."""
    with pytest.raises(RecordingError, match="absent: no such folder"):
        Recording.load(tmp_path / "absent")
    with pytest.raises(RecordingError, match=r"strace\.log: not a folder"):
        Recording.load(folder / "strace.log")
    with pytest.raises(RecordingError, match=r"no strace\.log and no maps\.initial and no maps\.final"):
        Recording.load(tmp_path)
