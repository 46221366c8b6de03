"""Scenario files: what may stand in them, and where and how a wrong one is told so."""

from __future__ import annotations

from pathlib import Path

import pytest

from hmm.mirror import DeadlinePolicy
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot
from hmm_client.scenario import Scenario, ScenarioError, read_scenario

GOOD = """\
title = "everything"
[daemon]
acknowledgement_s = 0.5
[processes.app]
[files.lib]
size = "4 pages"
[drivers.gpu]
mirrors = ["app"]
policy = "fail"
on_update = ["answer", "hang"]
delay_s = 0.25
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
expect = { error = "EACCES", events = { gpu = ["MUNMAP"] }, fenced = ["gpu"], within_s = 1 }
[[steps]]
process = "app"
call = "munmap"
at = "text"
background = "unmap"
[[steps]]
pending = ["gpu"]
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
"""


def read(tmp_path: Path, text: str) -> Scenario:
    """A scenario from its text."""
    path = tmp_path / "scenario.toml"
    path.write_text(text)
    return read_scenario(path)


def test_read_scenario_understands_everything_when_it_is_good(tmp_path: Path) -> None:
    """Values have their kinds, defaults are filled in, and steps know their lines."""
    scenario = read(tmp_path, GOOD)
    assert (scenario.title, scenario.processes, dict(scenario.files)) == ("everything", ("app",), {"lib": 4 * 4096})
    assert scenario.settings == {"acknowledgement_s": 0.5}
    gpu = scenario.drivers["gpu"]
    assert (gpu.mirrors, gpu.policy, gpu.dma) == (("app",), DeadlinePolicy.FAIL, False)
    assert (gpu.behaviour.on_update, gpu.behaviour.delay_s) == (("answer", "hang"), 0.25)
    mapping, fault, unmap, pending, wait, _, mirror = scenario.steps
    assert mapping.arguments["length"] == 16384
    assert mapping.arguments["prot"] == Prot.READ
    assert mapping.arguments["flags"] == MapFlag.SHARED | MapFlag.POPULATE
    assert fault.arguments["length"] is None
    assert fault.expectation.error == "EACCES"
    assert fault.expectation.fenced == {"gpu"}
    assert fault.expectation.events == {"gpu": ("MUNMAP",)}
    assert (unmap.background, pending.drivers, wait.subject) == ("unmap", {"gpu"}, "unmap")
    assert (mirror.kind, mirror.arguments["process"]) == ("driver", "child")
    assert [step.line for step in scenario.steps] == [12, 21, 27, 32, 34, 36, 40]


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("[daemon]", "[daemon", 2, "Expected"),
        ("[files.lib]", "[folders.lib]", 1, "there is no 'folders' in a scenario"),
        ('mirrors = ["app"]', 'mirrors = ["ap"]', 7, "there is no process 'ap'; there is app"),
        ('"fail"', '"shrug"', 7, "policy: 'shrug' is none of fence, block, fail"),
        ('"hang"]', '"sleep"]', 7, "on_update: "),
        ("delay_s = 0.25", "delay_s = -1", 7, "delay_s: -1 is no number of seconds"),
        ('"16 KiB"', '"16 kilo"', 12, "length: '16 kilo' is no number of bytes"),
        ('prot = "r"', 'prot = "q"', 12, "prot: 'q' is no protection"),
        ("shared populate", "shared sparse", 12, "flags: 'sparse' is no flag of mmap"),
        ('file = "lib"', 'file = "libc"', 12, "there is no file 'libc'"),
        ('length = "16 KiB"\n', "", 12, "process mmap: 'length' is missing"),
        ('call = "mmap"', 'call = "map"', 12, "call: 'map' is none of mmap, munmap"),
        ("text+0x1000", "txt+0x1000", 21, "there is no mapping 'txt'; there is text"),
        ("write = true", "write = 1", 21, "write: 1 is neither true nor false"),
        ("write = true", "wirte = true", 21, "driver fault: 'wirte' is not known"),
        ('["MUNMAP"]', '["MUNMAPS"]', 21, "there is no type of event 'MUNMAPS'"),
        ('fenced = ["gpu"]', 'fenced = ["tpu"]', 21, "there is no driver 'tpu'"),
        ("within_s = 1", 'within_s = "1"', 21, "within_s: '1' is no number of seconds"),
        ('wait = "unmap"', 'wait = "remap"', 34, "there is no step in the background 'remap'"),
        ('pending = ["gpu"]', 'attending = ["gpu"]', 32, "a step has one of process, driver, file, wait and pending"),
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
