"""Certifying drivers: right ones pass, each wrong one fails for what is wrong with it and for nothing else."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from hmm.units import PAGE_SIZE
from hmm_client.certify import RULES, Certificate, certify, driver_process, migrations
from hmm_client.certify import adversities as happenings
from hmm_client.certify import stage as stages
from hmm_client.certify.adversities import ADVERSITIES
from hmm_client.certify.adversity import Adversity, Run
from hmm_client.certify.certificate import LIMIT_S as USUAL_LIMIT_S
from hmm_client.certify.certificate import Trial, certifying
from hmm_client.certify.findings import Finding
from hmm_client.certify.migrations import MIGRATIONS
from hmm_client.certify.stage import Stage
from hmm_client.certify.storm import Step, draw, shortest
from hmm_client.commands.certify import _print_summary
from hmm_client.harness import HoldPoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

WRONG = Path(__file__).with_name("wrong_driver.py")
WRONG_TODAY = Path(__file__).with_name("wrong_interval_driver.py")
DEADLINE_S = 2.0
"""Enough for drivers that answer at once, and short for those that never do."""
ANSWER_S = 3.0
"""As long as it takes to say that a driver does not answer its orders."""
LEASE_S = 0.5
"""For drivers that take no further step of a migration."""
LIMIT_S = 12.0
"""For trials that do not end; those that do have to come to their end in it."""
TIMEOUT_S = 120.0


def ours(name: str) -> list[str]:
    """The command of a driver that is shipped."""
    return [sys.executable, "-m", f"hmm_client.drivers.{name}", "--certified"]


def wrong(kind: str) -> list[str]:
    """The command of a driver that is wrong in one way."""
    script = WRONG_TODAY if kind.startswith("today-") else WRONG
    return [sys.executable, str(script), kind, "--certified"]


def broken(certificate: Certificate) -> set[str]:
    """The rules that were broken."""
    return set(certificate.broken)


@pytest.mark.parametrize(("name", "first"), [("dummy", 0), ("rdma", 1), ("prefetch", 2), ("dmirror", 3)])
async def test_our_driver_passes_its_share_of_the_suite(name: str, first: int) -> None:
    """Every fourth adversity and a storm, without a report; `make certify` has all, and a thousand storms."""
    share = list(ADVERSITIES)[first::4]
    certificate = await certify(ours(name), adversities=share, seeds=range(1))
    assert certificate.passed, certificate.broken
    assert {trial.name for trial in certificate.trials} >= set(share)


async def test_driver_is_gone_when_its_certification_is_broken_off() -> None:
    """Even one that does not leave when its standard input ends."""
    staying = [sys.executable, "-c", "import time; print('{\"ready\": {}}', flush=True); time.sleep(60)"]
    async with certifying(staying, DEADLINE_S, ANSWER_S, LIMIT_S) as certifier:
        driver = await certifier.start_driver()
        assert not driver.ended
    assert driver.ended


async def test_driver_is_gone_when_nobody_waits_for_it_to_be_ready(tmp_path: Path) -> None:
    """Its start is broken off before it has said a word."""
    begun = tmp_path / "pid"
    os.mkfifo(begun)
    script = f"import os, time; open({str(begun)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    starting = asyncio.create_task(driver_process.DriverProcess.start([sys.executable, "-c", script], "nowhere"))
    pid = int(await asyncio.to_thread(begun.read_text))
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_driver_ends_when_it_is_started_by_a_shell(tmp_path: Path) -> None:
    """It hangs; the shell's end alone would leave it behind, with the pipe that its answers are awaited from."""
    alive = tmp_path / "alive"
    os.mkfifo(alive)
    script = f"import time; alive = open({str(alive)!r}, 'w');print('{{\"ready\": {{}}}}', flush=True); time.sleep(600)"
    ended = asyncio.create_task(asyncio.to_thread(alive.read_bytes))  # with whoever holds it open for writing
    shell = ["sh", "-c", '"$0" -c "$1"; exit $?', sys.executable, script]
    driver = await driver_process.DriverProcess.start(shell, "nowhere")
    assert not ended.done()
    await driver.kill()
    assert driver.ended
    await ended


async def test_driver_in_javascript_passes(packages: None) -> None:
    """What is asked of a driver can be met in another language: a share of it; `make certify` has all."""
    driver = Path(__file__).with_name("javascript") / "driver.js"
    share = list(ADVERSITIES)[::4]
    certificate = await certify(["node", str(driver)], adversities=share, seeds=range(1))
    assert certificate.passed, certificate.broken
    assert {trial.name for trial in certificate.trials} >= set(share)


@pytest.mark.parametrize("kind", ["right", "dirty-reported", "today-right"])
async def test_right_driver_passes_when_its_device_is_slow(kind: str) -> None:
    """The one that all wrong ones are made of, and one that reports what its device wrote."""
    names = ("mprotect", "fork", "invalidate-under-use", "exit-under-use")
    certificate = await certify(wrong(kind), adversities=names, seeds=range(1 if kind == "right" else 0))
    assert certificate.passed, certificate.broken


@pytest.mark.parametrize(
    ("kind", "adversities"),
    [
        ("early-acknowledgement", ("plain", "munmap", "invalidate-under-use")),
        ("use-after-invalidation", ("plain", "munmap", "mremap", "discard")),
        ("write-after-write-protect", ("plain", "munmap", "mprotect", "fork")),
        ("write-after-fork", ("plain", "munmap", "mprotect", "fork")),
        ("dirty-not-reported", ("plain", "munmap", "fork")),
        ("unanswered", ("plain", "munmap", "discard")),
        ("refused", ("plain", "munmap", "discard")),
        ("never-sent", ("plain", "munmap")),
        ("old-epoch", ("plain", "munmap")),
        ("leaked-mirror", ("plain", "two-processes")),
        ("foreign-frame", ("plain",)),
        ("no-translation", ("plain",)),
        ("wrong-data", ("plain", "munmap", "discard")),
        ("died", ("plain", "munmap", "fork")),
        ("silent", ("plain",)),
        ("today-use-after-invalidation", ("plain", "munmap", "discard")),
        ("today-early-acknowledgement", ("plain", "munmap", "invalidate-under-use")),
        ("today-write-after-write-protect", ("plain", "munmap", "mprotect")),
        ("today-unanswered", ("plain", "munmap", "discard")),
    ],
)
async def test_wrong_driver_fails_for_what_is_wrong_with_it(kind: str, adversities: Sequence[str]) -> None:
    """One rule is broken, by its name, and no other one is blamed."""
    hasty: dict[str, float] = {"deadline_s": DEADLINE_S} if kind.endswith("unanswered") else {}
    certificate = await certify(
        wrong(kind), adversities=adversities, answer_s=ANSWER_S if kind == "silent" else None, **hasty
    )
    assert broken(certificate) == {kind.removeprefix("today-")}, certificate.trials


@pytest.mark.parametrize("command", [ours("dmirror"), wrong("today-migrates")], ids=["dmirror", "the right one"])
async def test_driver_that_migrates_step_by_step_passes(
    monkeypatch: pytest.MonkeyPatch, command: Sequence[str]
) -> None:
    """It is found at its last step, however long it takes until that; the one that wrong ones are made of as well."""
    monkeypatch.setattr(migrations, "HELD_S", TIMEOUT_S)
    certificate = await certify(command, adversities=MIGRATIONS)
    assert certificate.passed, certificate.broken
    assert not any(trial.skipped for trial in certificate.trials)


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        ("today-lease-over", "lease-over"),
        ("today-lease-over-at-last", "lease-over"),
        ("today-unfinalized", "unfinalized"),
        ("today-lost-contents", "lost-contents"),
        ("today-mixed-contents", "lost-contents"),
        ("today-died-in-migration", "died"),
    ],
)
async def test_driver_that_takes_wrong_steps_fails_for_what_is_wrong_with_them(kind: str, rule: str) -> None:
    """One rule is broken, and the driver is there again for the next trial, where nothing is under way any more."""
    hasty = {"lease_s": LEASE_S, "answer_s": ANSWER_S} if rule == "lease-over" else {}
    certificate = await certify(wrong(kind), adversities=("migrate", "plain"), **hasty)
    assert {trial.name: [finding.rule for finding in trial.findings] for trial in certificate.trials} == {
        "migrate": [rule],
        "plain": [],
        "leave": [],
    }


async def test_trials_are_skipped_when_the_driver_does_not_offer_their_order(tmp_path: Path) -> None:
    """It is said, and not counted as passed."""
    report = tmp_path / "report.xml"
    code, out, _ = await run_hmmctl(
        "--only", "plain", "--only", "migrate", "--junit", str(report), "--", *ours("dummy")
    )
    assert code == 0
    assert re.search(r"^skip migrate .*\n +the driver offers no order 'migrate'$", out, re.MULTILINE), out
    assert re.search(r"^passed: 2 trials in \d+ s, 1 skipped$", out, re.MULTILINE), out
    (suite,) = ET.parse(report).getroot()
    assert (suite.get("tests"), suite.get("skipped")) == ("3", "1")
    assert suite.find("testcase[@name='migrate']/skipped") is not None


@pytest.mark.parametrize("kind", ["stale-fault", "today-stale-fault"])
async def test_driver_that_keeps_stale_fault_results_is_found_out(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A fault's result that an event took back before it arrived is thrown away by right drivers."""
    monkeypatch.setattr(happenings, "HELD_S", TIMEOUT_S)  # this driver comes to every hold, sooner or later
    certificate = await certify(wrong(kind), adversities=("plain", "munmap", "invalidate-during-fault"))
    assert broken(certificate) == {"stale-fault"}, certificate.trials


async def test_driver_that_keeps_pages_of_its_memory_is_found_out() -> None:
    """What migrate_to_ram() took back is the device's no more."""
    names = ("plain", "discard", "other-device-migrates")
    certificate = await certify(wrong("today-device-pages-kept"), adversities=names)
    assert broken(certificate) == {"use-after-invalidation"}, certificate.trials


@pytest.mark.parametrize(
    ("kind", "adversities", "rule", "detail"),
    [
        ("mirrors-nobody", ("plain",), "access-failed", r"it does not mirror .*the device has no context left"),
        ("unanswered-under-block", ("discard",), "unanswered", r"has not answered MIGRATE .* no deadline"),
        ("unanswered-under-fail", ("discard",), "unanswered", r"ETIMEDOUT: madvise dontneed: mirror \d+ did not"),
    ],
)
async def test_driver_is_told_what_it_did_when_it_does_not_take_part(
    kind: str, adversities: Sequence[str], rule: str, detail: str
) -> None:
    """One finding a trial, in the driver's own words where it has any, and the next trial has a driver again."""
    certificate = await certify(
        wrong(kind), adversities=adversities, deadline_s=DEADLINE_S, answer_s=ANSWER_S, limit_s=LIMIT_S
    )
    assert broken(certificate) == {rule}, certificate.trials
    for trial in certificate.trials[:-1]:
        (finding,) = trial.findings
        assert re.search(detail, finding.detail, re.DOTALL), finding.detail


async def wait_for_a_hold(stage: Stage) -> None:
    """A call that does not end, of a daemon that has something to say about it."""
    process = await stage.process()
    span = await stage.region(process, 1)
    async with stage.harness.hold(HoldPoint.BEFORE_EDIT, "munmap", process=process, lease_s=TIMEOUT_S):
        await process.munmap(span.start, PAGE_SIZE)


def daemon_of(stage: Stage) -> int:
    """The process id of a trial's daemon."""
    socket = f"--socket={stage.client.channel.target.removeprefix('unix:')}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # others end while this looks
            found += [int(path.parent.name)] if socket in path.read_bytes() else []
    (pid,) = found
    return pid


async def stop_the_daemon(stage: Stage) -> None:
    """A daemon that does nothing any more."""
    process = await stage.process()
    os.kill(daemon_of(stage), signal.SIGSTOP)
    await process.mmap(PAGE_SIZE)


async def kill_the_daemon(stage: Stage) -> None:
    """A daemon that is gone."""
    process = await stage.process()
    os.kill(daemon_of(stage), signal.SIGKILL)
    await process.mmap(PAGE_SIZE)


@pytest.mark.parametrize(
    ("run", "says_s", "detail"),
    [
        (wait_for_a_hold, TIMEOUT_S, r"^still under way after 12 s\nmunmap \d+ of process \d+ by certify .* held by"),
        (stop_the_daemon, 0.5, r"^still under way after 12 s\nhmmd does not say what is pending: .* within 0\.5 s$"),
        (kill_the_daemon, TIMEOUT_S, r"^hmmd ended in the middle of it, with exit code -9$"),
    ],
)
async def test_trial_is_broken_off_when_it_cannot_end(
    monkeypatch: pytest.MonkeyPatch, run: Run, says_s: float, detail: str
) -> None:
    """It is said what it waits for, the driver is not blamed, and the next trial has a new daemon and driver."""
    monkeypatch.setitem(ADVERSITIES, "endless", Adversity("endless", "a trial that cannot end", run))
    monkeypatch.setattr(stages, "SAYS_S", says_s)
    certificate = await certify(ours("dummy"), adversities=("plain", "endless", "munmap"), limit_s=LIMIT_S)
    assert [trial.name for trial in certificate.trials if trial.findings] == ["endless"]
    (finding,) = certificate.broken["unfinished"].findings
    assert re.search(detail, finding.detail, re.DOTALL), finding.detail


async def test_storm_finds_a_wrong_driver_and_the_shortest_way_to_show_it() -> None:
    """A seed alone finds it, and most of its steps are left out in the end."""
    certificate = await certify(wrong("write-after-fork"), adversities=(), seeds=range(3))
    assert broken(certificate) == {"write-after-fork"}
    best = certificate.broken["write-after-fork"]
    assert best.seed is not None
    assert 1 <= len(best.shortest) <= 8
    assert any(step.what in ("fork", "churn") for step in best.shortest)


def test_storm_has_the_same_steps_when_its_seed_is_the_same() -> None:
    """A seed is a report."""
    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


async def test_shortest_storm_is_the_pair_of_steps_that_matters() -> None:
    """Whatever else there is, is left out."""
    steps = draw(3)
    needed = {steps[5], steps[29]}

    async def run(tried: Sequence[Step]) -> tuple[object, ...]:
        from hmm_client.certify import Finding  # noqa: PLC0415

        return (Finding("wrong-data", "both"),) if needed <= set(tried) else ()

    assert set(await shortest(steps, run, "wrong-data", trials=200)) == needed  # type: ignore[arg-type]


async def run_hmmctl(*arguments: str) -> tuple[int, str, str]:
    """`hmmctl certify` as a process."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hmm_client.cli", "certify", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    stdout, stderr = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    assert process.returncode is not None
    return process.returncode, stdout.decode(), stderr.decode()


async def test_command_reports_in_json_and_junit_when_the_driver_fails(tmp_path: Path) -> None:
    """For gates: exit code 1, one JSON value a line, a JUnit file with the rule as the failure's type."""
    report = tmp_path / "report.xml"
    code, out, _ = await run_hmmctl(
        *("--only", "plain", "--format", "json", "--junit", str(report), "--", *wrong("foreign-frame"))
    )
    assert code == 1
    trial, leave, summary = map(json.loads, out.splitlines())
    assert (trial["trial"], trial["ok"], trial["findings"][0]["rule"]) == ("plain", False, "foreign-frame")
    assert trial["findings"][0]["means"] == RULES["foreign-frame"]
    assert leave["ok"]
    assert summary["broken"] == {"foreign-frame": "plain"}
    (suite,) = ET.parse(report).getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    failure = suite.find("testcase/failure")
    assert failure is not None
    assert failure.get("type") == "foreign-frame"


@pytest.mark.parametrize(
    ("prints", "start_s", "message"),
    [
        ("'ready'", 4.0, """it did not print {"ready": {}} within 4 s; it printed 'ready'"""),
        ("''", 4.0, """it did not print {"ready": {}} within 4 s; it printed ''"""),
        ("", 1.0, """it did not print {"ready": {}} within 1 s, nor anything else (does it flush?)"""),
    ],
    ids=["another word", "nothing on a line", "nothing"],
)
async def test_driver_is_told_what_it_printed_when_it_does_not_say_that_it_is_ready(
    monkeypatch: pytest.MonkeyPatch, prints: str, start_s: float, message: str
) -> None:
    """Whoever writes a driver sees what was expected, and what came instead of it."""
    monkeypatch.setattr(driver_process, "START_S", start_s)
    script = f"import sys; print({prints}, flush=True); sys.stdin.read()" if prints else "input()"
    with pytest.raises(driver_process.DriverSilentError, match=f"^{re.escape(message)}$"):
        await driver_process.DriverProcess.start([sys.executable, "-c", script], "/nowhere")


ECHO = """
import json, sys
print('{"ready": {}}', flush=True)
for line in sys.stdin:
    order = json.loads(line)
    answer = json.dumps({"id": order["id"], "result": {"data": "aG1tZA=="}})
    print(%s, flush=True)
"""
"""A driver that answers everything with the same bytes, and may print other things."""


@pytest.mark.parametrize(
    "prints",
    [
        "'x' * (20 << 20) + chr(10) + answer",
        "'x' * (40 << 20) + chr(10) + '{\"id\": []}' + chr(10) + '[' * 100000 + chr(10) + answer",
    ],
    ids=["a line too long", "what has no meaning"],
)
async def test_driver_is_understood_when_it_prints_other_things(prints: str) -> None:
    """Whatever it prints besides its answers is its own business, however long."""
    driver = await driver_process.DriverProcess.start([sys.executable, "-c", ECHO % prints], "/nowhere", TIMEOUT_S)
    assert await driver.read(1, 0, 4) == b"hmmd"
    assert await driver.leave()


@pytest.mark.parametrize(
    ("prints", "message"),
    [
        ("answer + ' ' * (16 << 20)", "it has not answered 'read' within 6 s; it printed a line of over 16 MiB"),
        ("'no'", "it has not answered 'read' within 6 s; it printed 'no'"),
        ("answer.replace('=', '')", "it answered 'read' without bytes in base64: 'aG1tZA'"),
        ("answer.replace('\"aG1tZA==\"', '[104, 109]')", r"it answered 'read' without bytes in base64: \[104, 109\]"),
        ("answer.replace('data', 'bytes')", "it answered 'read' without bytes in base64: None"),
    ],
    ids=["too long", "another word", "cut off", "numbers", "nothing"],
)
async def test_driver_is_told_what_it_printed_when_it_is_no_answer(prints: str, message: str) -> None:
    """Whoever writes a driver sees what came instead; the certificate counts it as silence."""
    command = [sys.executable, "-c", ECHO % prints]
    driver = await driver_process.DriverProcess.start(command, "/nowhere", 2 * ANSWER_S)
    with pytest.raises(driver_process.DriverSilentError, match=message):
        await driver.read(1, 0, 4)
    assert await driver.leave()


async def test_command_ends_with_2_when_the_driver_does_not_start(tmp_path: Path) -> None:
    """A command that is not there, and one that ends at once."""
    code, _, errors = await run_hmmctl("--", str(tmp_path / "nobody"))
    assert code == 2
    assert "No such file" in errors
    code, _, errors = await run_hmmctl("--", "false")
    assert code == 2
    assert "it ended with exit code 1" in errors


def test_command_says_how_to_show_it_again_for_a_shell(capsys: pytest.CaptureFixture[str]) -> None:
    """With the limits that it was given; a driver's arguments may have blanks in them."""
    trial = Trial("plain", "it works", 1.0, (Finding("silent", "it says nothing"),))
    command = ("sh", "-c", "driver --on 'the card'; exit $?")
    _print_summary(Certificate([trial]), command, {"deadline_s": 0.5, "limit_s": USUAL_LIMIT_S}, "text", 1.0)
    last = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(last) == ["hmmctl", "certify", "--only", "plain", "--deadline", "0.5", "--", *command]


async def test_command_gives_the_driver_the_time_that_it_was_told() -> None:
    """--deadline is that of events, which hmmd says; --limit is that of trials, which are broken off."""
    code, out, _ = await run_hmmctl("--deadline", "0.25", "--only", "discard", "--", *wrong("unanswered"))
    assert code == 1
    assert "was not answered within 0.25 s" in out
    code, out, _ = await run_hmmctl("--limit", "1", "--only", "plain", "--", *wrong("silent"))
    assert code == 1
    assert "unfinished: still under way after 1 s" in out


@pytest.mark.parametrize("jobs", [1, 2])
async def test_command_starts_as_many_drivers_as_jobs(tmp_path: Path, jobs: int) -> None:
    """Each pair of a daemon and a driver takes its share of the storms; a line for each trial, and the verdict."""
    counting = ("sh", "-c", f'echo started >> {tmp_path}/drivers; exec "$@"', "sh", *ours("dummy"))
    code, out, _ = await run_hmmctl("--jobs", str(jobs), "--seeds", "0:2", "--only", "plain", "--", *counting)
    assert code == 0
    assert out.splitlines()[0].startswith("ok   plain")
    assert "ok   storms 0:2, 0 failed" in out
    assert out.splitlines()[-1].startswith("passed: ")
    assert (tmp_path / "drivers").read_text().splitlines() == ["started"] * jobs


async def test_command_lists_the_adversities() -> None:
    """What a driver has to go through."""
    code, out, _ = await run_hmmctl("--list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(ADVERSITIES)
