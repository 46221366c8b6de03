"""Scenario files: what may stand in them, and where and how a wrong one is told so."""

from __future__ import annotations

import errno as errnos
from pathlib import Path

import pytest
from click.testing import CliRunner

from hmm.mirror import DeadlinePolicy
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot
from hmm_client.cli import main
from hmm_client.harness import HoldPoint, answer, delay, hold, refuse
from hmm_client.scenario import Scenario, ScenarioError, read_scenario
from hmm_client.scenario.model import Inside

GOOD = """\
title = "everything"
rule = "a rule"
[daemon]
acknowledgement_s = 0.5
[processes.app]
[files.lib]
size = "4 pages"
[drivers.gpu]
mirrors = ["app"]
policy = "fail"
on_update = ["answer", "delay 0.25", "refuse ENOMEM"]
on_fault = "hold"
inside = "fault elsewhere"
[[steps]]
process = "app"
call = "mmap"
length = "16 KiB"
prot = "r"
flags = "shared populate"
file = "lib"
offset = 4096
as = "text"
[[steps]]
driver = "gpu"
call = "fault"
at = "text+0x1000"
write = true
wait = false
expect = { error = "EACCES", events = { gpu = ["MUNMAP"] }, fenced = ["gpu"], within_s = 1 }
[[steps]]
process = "app"
call = "munmap"
at = "text"
background = "unmap"
note = "a word"
[[steps]]
pending = ["gpu"]
operations = ["munmap"]
[[steps]]
wait = "unmap"
[[steps]]
process = "app"
call = "fork"
as = "child"
[[steps]]
driver = "gpu"
call = "mirror"
process = "child"
[[steps]]
hold = "end"
point = "before the end"
operation = "munmap"
process = "child"
driver = "gpu"
[[steps]]
release = "end"
[[steps]]
fail = "allocation"
nth = 3
[[steps]]
driver = "gpu"
call = "counters"
expect.counters = { stale_answers = 1 }
"""


def read(tmp_path: Path, text: str) -> Scenario:
    """A scenario from its text."""
    path = tmp_path / "scenario.toml"
    path.write_text(text)
    return read_scenario(path)


def test_read_scenario_understands_everything_when_it_is_good(tmp_path: Path) -> None:
    """Values have their kinds, defaults are filled in, and steps know their lines."""
    scenario = read(tmp_path, GOOD)
    assert (scenario.name, scenario.title, scenario.rule) == ("scenario", "everything", "a rule")
    assert (scenario.processes, dict(scenario.files)) == (("app",), {"lib": 4 * 4096})
    assert scenario.settings == {"acknowledgement_s": 0.5}
    gpu = scenario.drivers["gpu"]
    assert (gpu.mirrors, gpu.policy, gpu.dma, gpu.inside) == (
        ("app",), DeadlinePolicy.FAIL, False, Inside.FAULT_ELSEWHERE,
    )  # fmt: skip
    assert gpu.on_update == (answer(), delay(0.25), refuse(errnos.ENOMEM))
    assert gpu.on_fault == (hold(),)
    mapping, fault, unmap, pending, wait, _, mirror, held, release, fail, counters = scenario.steps
    assert mapping.arguments["length"] == 16384
    assert mapping.arguments["prot"] == Prot.READ
    assert mapping.arguments["flags"] == MapFlag.SHARED | MapFlag.POPULATE
    assert (fault.arguments["length"], fault.arguments["wait"]) == (None, False)
    assert fault.expectation.error == "EACCES"
    assert fault.expectation.fenced == {"gpu"}
    assert fault.expectation.events == {"gpu": ("MUNMAP",)}
    assert (unmap.background, unmap.note, wait.subject) == ("unmap", "a word", "unmap")
    assert pending.arguments == {"owing": {"gpu"}, "operations": ("munmap",)}
    assert (mirror.kind, mirror.arguments["process"]) == ("driver", "child")
    assert (held.kind, held.subject, held.arguments["point"]) == ("hold", "end", HoldPoint.BEFORE_END)
    assert (str(release), str(fail), fail.arguments["nth"]) == ("release end", "fail allocation", 3)
    assert counters.expectation.counters == {"stale_answers": 1}
    assert [step.line for step in scenario.steps] == [14, 23, 30, 36, 39, 41, 45, 49, 55, 57, 60]


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("[daemon]", "[daemon", 3, "it is no TOML: Expected"),
        ("[files.lib]", "[folders.lib]", 1, "there is no 'folders' in a scenario"),
        ('mirrors = ["app"]', 'mirrors = ["ap"]', 8, "there is no process 'ap'; there is app"),
        ('"fail"', '"shrug"', 8, "policy: 'shrug' is none of fence, block, fail"),
        ("refuse ENOMEM", "sleep", 8, "on_update: 'sleep' is none of answer, delay, hold, hang"),
        ("refuse ENOMEM", "refuse ENOTHING", 8, "on_update: 'ENOTHING' is no errno"),
        ("delay 0.25", "delay -1", 8, "on_update: -1.0 is no number of seconds"),
        ("delay 0.25", "delay", 8, "on_update: 'delay' is none of"),
        ('"fault elsewhere"', '"fork"', 8, "inside: 'fork' is none of nothing, fault, fault elsewhere, munmap"),
        ('"16 KiB"', '"16 kilo"', 14, "length: '16 kilo' is no number of bytes"),
        ('prot = "r"', 'prot = "q"', 14, "prot: 'q' is no protection"),
        ("shared populate", "shared sparse", 14, "flags: 'sparse' is no flag of mmap"),
        ('file = "lib"', 'file = "libc"', 14, "there is no file 'libc'"),
        ('length = "16 KiB"\n', "", 14, "process mmap: 'length' is missing"),
        ('call = "mmap"', 'call = "map"', 14, "call: 'map' is none of mmap, munmap"),
        ("text+0x1000", "txt+0x1000", 23, "there is no mapping 'txt'; there is text"),
        ("text+0x1000", "text+1 side", 23, "at: '1 side' is no number of bytes"),
        ("write = true", "write = 1", 23, "write: 1 is neither true nor false"),
        ("write = true", "wirte = true", 23, "driver fault: 'wirte' is not known"),
        ('["MUNMAP"]', '["MUNMAPS"]', 23, "there is no type of event 'MUNMAPS'"),
        ('fenced = ["gpu"]', 'fenced = ["tpu"]', 23, "there is no driver 'tpu'"),
        ("within_s = 1", 'within_s = "1"', 23, "within_s: '1' is no number of seconds"),
        ('wait = "unmap"', 'wait = "remap"', 39, "there is no step in the background 'remap'"),
        (
            'pending = ["gpu"]',
            'attending = ["gpu"]',
            36,
            "a step has a call of one of process, driver, program, file, or",
        ),
        ('operations = ["munmap"]', 'operation = ["munmap"]', 36, "pending: 'operation' is not known"),
        ("before the end", "before the beginning", 49, "point: 'before the beginning' is none of before the event"),
        ('release = "end"', 'release = "start"', 55, "there is no hold 'start'; there is end"),
        (
            'fail = "allocation"',
            'fail = "everything"',
            57,
            "fail: 'everything' is none of allocation, dma mapping, migrate to ram",
        ),
        ("nth = 3", "nth = -3", 57, "nth: -3 is no number"),
        ("stale_answers", "stolen_answers", 60, "there is no counter 'stolen_answers'"),
        ("[processes.app]", "[processes.app]\nname = 1", 5, "process app: 'name' is not known"),
        ('"16 KiB"', '"9999999999999 GiB"', 14, "length: '9999999999999 GiB' is more than 64 bits hold"),
        ("text+0x1000", "0x10000000000000000", 23, "at: '0x10000000000000000' is more than 64 bits hold"),
        ("delay 0.25", "delay nan", 8, "on_update: nan is no number of seconds"),
        ("within_s = 1", "within_s = inf", 23, "within_s: inf is no number of seconds"),
        ("nth = 3", "nth = 4294967296", 57, "nth: 4294967296 is no number from 0 to 4,294,967,295"),
        ('note = "a word"', "note = 5", 30, "note: 5 is no text"),
        ('rule = "a rule"', "rule = 5", 2, "rule: 5 is no text"),
        ('wait = "unmap"', 'give_up = "unmap"\n[[steps]]\nwait = "unmap"', 41, "there is no step in the background"),
        ('[[steps]]\nwait = "unmap"\n', "", 30, "nobody hears how the step in the background 'unmap' ends"),
        (
            'background = "unmap"',
            'background = "unmap"\nexpect = { error = "EBUSY" }',
            30,
            "what is expected of a step in",
        ),
        ("expect.counters", "expect.data", 60, "data: {'stale_answers': 1} is no text"),
        ("expect.counters = { stale_answers = 1 }", "expect.error = 'EIO'", 60, "expect: 'error' cannot be expected"),
        (
            "error = ",
            "counters = { stale_answers = 1 }, error = ",
            23,
            "expect: 'counters' cannot be expected of fault",
        ),
        ('as = "child"', 'as = "app"', 41, "there is a process 'app' already"),
        ('release = "end"', 'release = "end"\n[[steps]]\nrelease = "end"', 57, "there is no hold 'end'; there is none"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else "",
)
def test_read_scenario_names_file_and_line_when_it_is_wrong(
    tmp_path: Path, old: str, new: str, line: int, message: str
) -> None:
    """Every mistake is told with its place, and with what would have been right."""
    assert old in GOOD
    with pytest.raises(ScenarioError) as caught:
        read(tmp_path, GOOD.replace(old, new, 1))
    assert str(caught.value).startswith(f"{tmp_path}/scenario.toml:{line}: {message}")


def test_read_scenario_knows_what_is_gone_again(tmp_path: Path) -> None:
    """A pin, a userfaultfd: named before it is made, twice, or after its end."""
    making = '[[steps]]\nprocess = "app"\ncall = "pin"\nat = "0x1000"\nas = "it"\n'
    ending = '[[steps]]\nprocess = "app"\ncall = "unpin"\npin = "it"\n'
    opening = making.replace("pin", "userfaultfd")
    closing = ending.replace("unpin", "close").replace("pin", "userfaultfd")
    start = "[processes.app]\n"
    for make, end, kind in [(making, ending, "pin"), (opening, closing, "userfaultfd")]:
        assert len(read(tmp_path, start + make + end + make).steps) == 3
        for text in (end, make + end + end):
            with pytest.raises(ScenarioError, match=f"there is no {kind} 'it'; there is none"):
                read(tmp_path, start + text)
        with pytest.raises(ScenarioError, match=f"there is a {kind} 'it' already"):
            read(tmp_path, start + make + make)


def test_data_is_refused_where_it_is_no_byte(tmp_path: Path) -> None:
    """It was written as a question mark."""
    text = '[processes.app]\n[[steps]]\nprocess = "app"\ncall = "write"\nat = "0x1000"\ndata = "\u03c0"\n'
    with pytest.raises(ScenarioError, match=r"scenario.toml:2: data: '\u03c0' is no byte"):
        read(tmp_path, text)


PROGRAM = """\
[processes.app]

[programs.gpu]
command = ["python", "driver.py"]

[[steps]]
program = "gpu"
call = "mirror"
background = "tie"

[[steps]]
give_up = "tie"

[[steps]]
pending = ["gpu"]
"""


@pytest.mark.slow
def test_run_names_the_file_when_the_daemon_does_not_understand_its_settings(tmp_path: Path) -> None:
    """A wrong setting is a mistake in the file, exit code 2, and no daemon that cannot be reached."""
    (tmp_path / "wrong.toml").write_text(
        '[daemon]\nframez = 1\n[processes.app]\n[[steps]]\nprocess = "app"\ncall = "exit"\n'
    )
    result = CliRunner().invoke(main, ["run", str(tmp_path / "wrong.toml")])
    assert result.exit_code == 2
    assert f"hmmctl: {tmp_path}/wrong.toml: with the settings of [daemon] hmmd did not start" in result.stderr


def test_read_scenario_refuses_a_file_when_nothing_happens_in_it(tmp_path: Path) -> None:
    """What has no step cannot be as expected."""
    with pytest.raises(ScenarioError, match=r"scenario\.toml:2: a scenario has at least one step"):
        read(tmp_path, "[processes.app]\n")


def test_read_scenario_takes_programs(tmp_path: Path) -> None:
    """Drivers that are processes of their own; what they are asked for may go on in the background and be given up."""
    scenario = read(tmp_path, PROGRAM)
    assert scenario.programs["gpu"].command == ("python", "driver.py")
    assert [(step.kind, step.subject, step.call) for step in scenario.steps] == [
        ("program", "gpu", "mirror"), ("give_up", "tie", ""), ("pending", "gpu", ""),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ('command = ["python", "driver.py"]', "", 3, "program gpu: 'command' is missing"),
        ('["python", "driver.py"]', '"python driver.py"', 3, "command: 'python driver.py' is no list"),
        ('program = "gpu"', 'program = "tpu"', 6, "there is no program 'tpu'; there is gpu"),
        ('"mirror"', '"fault"', 6, "call: 'fault' is none of mirror, unmirror, read, write, kill, stop, go_on, end"),
        ('give_up = "tie"', 'give_up = "bow"', 11, "there is no step in the background 'bow'; there is tie"),
        ('pending = ["gpu"]', 'pending = ["tpu"]', 14, "there is no driver 'tpu'; there is gpu"),
        ('["python", "driver.py"]', "[]", 3, "command: [] starts nothing"),
        ("[programs.gpu]", "[drivers.gpu]\n[programs.gpu]", 4, "there is a driver 'gpu' already"),
    ],
)
def test_read_scenario_names_the_line_of_what_is_wrong_with_a_program(
    tmp_path: Path, old: str, new: str, line: int, message: str
) -> None:
    """As of everything else."""
    assert old in PROGRAM
    with pytest.raises(ScenarioError) as caught:
        read(tmp_path, PROGRAM.replace(old, new, 1))
    assert str(caught.value).startswith(f"{tmp_path}/scenario.toml:{line}: {message}")
