"""The scenarios that come with hmmd: each passes, and each of their expectations can fail."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest

import hmm_client
from hmm_client.embedded import EmbeddedDaemon
from hmm_client.harness.holds import HoldPoint
from hmm_client.harness.misbehaviour import Kind
from hmm_client.scenario import Scenario, ScenarioError, StepReport, library, read_scenario, run_scenario
from hmm_client.scenario.junit import write_junit
from hmm_client.scenario.model import Step

if TYPE_CHECKING:
    from tests.conftest import Daemon

Run = Callable[[Scenario], Awaitable[list[StepReport]]]
OTHER_EVENT = "ISDIRTY"


@pytest.fixture(scope="session")
async def run(start_session_daemon: Callable[..., Awaitable[Daemon]]) -> Run:
    """Takes the steps of a scenario, on one daemon for all that have the same settings."""
    daemons: dict[str, Daemon] = {}

    async def take(scenario: Scenario) -> list[StepReport]:
        key = repr(sorted(scenario.settings.items()))
        if key not in daemons:
            daemons[key] = await start_session_daemon(harness=True, **scenario.settings)
        target = daemons[key].target
        return [report async for report in run_scenario(scenario, lambda name: hmm_client.connect(target, name=name))]

    return take


@pytest.mark.slow
@pytest.mark.parametrize("name", library.names())
async def test_scenario_comes_out_as_it_says(run: Run, name: str) -> None:
    """What the library says happens, happens."""
    reports = await run(library.find(name))
    assert [(report.step.line, report.wrong) for report in reports if report.wrong] == []


WRONG = """\
[processes.app]
[drivers.gpu]
mirrors = ["app"]
[drivers.now]
interface = "today"
mirrors = ["app"]
[drivers.idle]
[[steps]]
process = "app"
call = "mmap"
length = 4096
as = "heap"
[[steps]]
driver = "now"
call = "subscribe"
at = "heap"
as = "all"
[[steps]]
driver = "now"
call = "fault"
at = "heap"
[[steps]]
driver = "gpu"
call = "subscribe"
at = "heap"
as = "some"
[[steps]]
driver = "gpu"
call = "range_fault"
at = "heap"
[[steps]]
driver = "now"
call = "read_retry"
[[steps]]
driver = "idle"
call = "table"
at = "heap"
[[steps]]
driver = "gpu"
call = "inside"
[[steps]]
driver = "gpu"
call = "fault"
at = "0xfffffffffffff000"
length = "2 pages"
[[steps]]
process = "app"
call = "read"
at = "0x1000"
[[steps]]
hold = "never"
point = "event sent"
driver = "now"
"""


@pytest.mark.slow
async def test_step_that_ends_with_an_error_says_why(run: Run, tmp_path: Path) -> None:
    """Also where the driver has not what the step is about, which is an error like others and ends nothing else."""
    (tmp_path / "wrong.toml").write_text(WRONG)
    reports = await run(read_scenario(tmp_path / "wrong.toml"))
    wrong = [text.partition(" instead of none: ")[::2] for report in reports for text in report.wrong]
    assert [(error, why) for error, why in wrong if "Value out of range" not in why] == [
        ("error EINVAL", "now mirrors nothing by a mirror of 2015"),
        ("error EINVAL", "gpu mirrors nothing by a mirror of today's interface"),
        ("error EINVAL", "gpu has no subscription"),
        ("error EINVAL", "now has begun no read section of 'all'"),
        ("error EINVAL", "idle mirrors nothing by a mirror of 2015"),
        ("error EINVAL", "it has called nothing inside a callback, or all is told"),
        ("signal SEGV_MAPERR", "read 1 bytes at 0x1000: SEGV_MAPERR at 0x1000"),
    ]
    assert len(wrong) == 8


@pytest.mark.slow
async def test_programs_end_with_their_scenario_when_the_daemon_goes_away(tmp_path: Path) -> None:
    """What cannot be let go any more, a hold, keeps no process alive."""
    program, pid_file = tmp_path / "program.py", tmp_path / "pid"
    program.write_text(
        "import os, pathlib\n"
        f"pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))\n"
        "print('{\"ready\": {}}', flush=True)\n"
        "input()\n"
    )
    (tmp_path / "gone.toml").write_text(
        f'title = "gone"\n[processes.app]\n[programs.gpu]\ncommand = ["python", "{program}"]\n'
        '[[steps]]\nhold = "end"\npoint = "before the end"\noperation = "munmap"\n'
    )
    daemon = EmbeddedDaemon(tmp_path, harness=True)
    try:
        steps = run_scenario(
            read_scenario(tmp_path / "gone.toml"), lambda name: hmm_client.connect(daemon.target, name=name)
        )
        assert not (await anext(steps)).wrong
        daemon.process.kill()
        daemon.process.wait()
        await steps.aclose()
    finally:
        daemon.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", library.names())
async def test_every_expectation_fails_when_it_is_another(run: Run, name: str) -> None:
    """No expectation of the library is met whatever happens."""
    scenario = library.find(name)
    mutants = [mutated(step) for step in scenario.steps]
    reports = await run(replace(scenario, steps=tuple(step for step, _ in mutants)))
    for report, (step, count) in zip(reports, mutants, strict=True):
        assert len(report.wrong) == count, f"line {step.line}: {report.step}: {report.found}: {report.wrong}"


def mutated(step: Step) -> tuple[Step, int]:
    """A step that expects something else in every respect, and in how many."""
    if step.background or step.kind == "give_up":
        return step, 0
    expected = step.expectation
    if step.kind == "pending":
        arguments = dict(step.arguments)
        changes = {"owing": arguments["owing"] ^ {"nobody at all"}}
        if arguments["operations"] is not None:
            changes["operations"] = (*arguments["operations"], "something else")
        hasty = replace(expected, within_s=0.05)
        return replace(step, arguments=arguments | changes, expectation=hasty), len(changes)
    if step.call == "counters":
        counters = {name: count + 1 for name, count in expected.counters.items()}
        return replace(step, expectation=replace(expected, counters=counters, within_s=0.05)), len(counters)
    changes = {"error": "EPERM" if expected.error != "EPERM" else "EIO"}
    if expected.signal:
        changes["signal"] = "SEGV_ELSEWHERE"
    if expected.data is not None:
        changes["data"] = expected.data + b"!"
    if expected.entries is not None:
        changes["entries"] = expected.entries + 1
    if expected.retry is not None:
        changes["retry"] = not expected.retry
    if expected.fenced:
        changes["fenced"] = frozenset()
    count = len(changes)
    if expected.events:
        changes["events"] = {name: (*types, OTHER_EVENT) for name, types in expected.events.items()}
        count += len(expected.events)
    return replace(step, expectation=replace(expected, **changes)), count


def test_library_shows_every_act_and_every_point() -> None:
    """At least twenty scenarios, with titles and rules; nothing that a scenario can do is left out."""
    scenarios = [library.find(name) for name in library.names()]
    assert len(scenarios) >= 20
    assert all(scenario.title.strip() and scenario.rule.endswith(".") for scenario in scenarios)
    assert len({scenario.title for scenario in scenarios}) == len(scenarios)
    acts = {
        act.kind
        for scenario in scenarios
        for given in (*scenario.drivers.values(), *scenario.steps)
        for act in acts_of(given)
    }
    assert acts == set(Kind) - {Kind.KILL_PROCESS, Kind.STOP_PROCESS}
    points = {step.arguments["point"] for scenario in scenarios for step in scenario.steps if step.kind == "hold"}
    assert points == set(HoldPoint)


def acts_of(given: object) -> tuple[object, ...]:
    """The acts that a driver or a step has."""
    arguments = getattr(given, "arguments", None) or {"on_update": getattr(given, "on_update", ())}
    return (*(arguments.get("on_update") or ()), *(arguments.get("on_fault") or ()))


def test_find_says_where_names_are_when_there_is_none(tmp_path: Path) -> None:
    """A typing error in a name, and in a path."""
    with pytest.raises(ScenarioError, match="`hmmctl run --list` names"):
        library.find("hung-driver-is-fined")
    with pytest.raises(ScenarioError, match="No such file"):
        library.find(str(tmp_path / "nothing.toml"))


def test_junit_names_each_scenario_and_what_was_wrong(tmp_path: Path) -> None:
    """A CI system shows which step of which file did not come out as it says."""
    path = tmp_path / "one.toml"
    path.write_text('title = "one"\n[processes.app]\n[[steps]]\nprocess = "app"\ncall = "exit"\n')
    scenario = read_scenario(path)
    (step,) = scenario.steps
    good = StepReport(step, 0.25, "done", ())
    bad = StepReport(step, 0.5, "EIO", ("error EIO instead of none",))
    write_junit(tmp_path / "junit.xml", [(scenario, [good]), (scenario, [good, bad])])
    suite = ET.parse(tmp_path / "junit.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("time")) == ("2", "1", "1.000")
    first, second = suite
    assert first.find("failure") is None
    failure = second.find("failure")
    assert failure is not None
    assert failure.text == f"{path}:3: app exit: error EIO instead of none"
