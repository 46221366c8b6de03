"""`hmmctl run`: take the steps of scenarios.

**Absent**: the files' format (`hmm_client.scenario`).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from hmm_client.commands.connection import OK, REFUSED, UNEXPECTED, UNUSABLE, Where, fail, failures, run, where_options
from hmm_client.commands.output import JSON, counted, format_option, junit_option, print_json, print_table
from hmm_client.embedded import PATIENCE, EmbeddedDaemonError, embedded_daemon

if TYPE_CHECKING:
    from hmm_client.scenario import Scenario, StepReport


@dataclass(slots=True)
class _Daemons:
    """One daemon for all scenarios that want the same settings."""

    where: Where
    stack: ExitStack
    targets: dict[str, str] = field(default_factory=dict)

    def target(self, scenario: Scenario) -> str:
        """Where a scenario is run: where the user says, or on a daemon of its own.

        Raises:
            ScenarioError: the daemon does not understand the settings; it has said which on stderr.
        """
        from hmm_client.scenario.model import ScenarioError  # noqa: PLC0415 - takes longer than --help may

        if self.where.target:
            return self.where.target
        settings = {**PATIENCE, "log_level": "error", "harness": True, "drain_s": 0.5, **scenario.settings}
        key = repr(sorted(settings.items()))
        if key not in self.targets:
            try:
                self.targets[key] = self.stack.enter_context(embedded_daemon(**settings))
            except EmbeddedDaemonError as error:
                if not scenario.settings:
                    raise
                raise ScenarioError(f"with the settings of [daemon] {error}", scenario.path) from None
        return self.targets[key]


def _complete(context: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:  # noqa: ARG001
    """Names of scenarios, and files."""
    from hmm_client.scenario import library  # noqa: PLC0415 - takes longer than --help may

    names = [CompletionItem(name) for name in library.names() if name.startswith(begun)]
    return names or [CompletionItem(begun, type="file")]


@click.command("run")
@click.argument("scenarios", nargs=-1, metavar="FILE|NAME...", shell_complete=_complete)
@click.option("--all", "everything", is_flag=True, help="Run every scenario that comes with hmmd.")
@click.option("--list", "listed", is_flag=True, help="Name the scenarios that come with hmmd.")
@junit_option
@click.option("--steps/--no-steps", default=None, help="Show every step; default: when there is one scenario.")
@format_option
@where_options
def command(
    scenarios: tuple[str, ...],
    everything: bool,
    listed: bool,
    junit: Path | None,
    steps: bool | None,
    form: str,
    where: Where,
) -> None:
    """Run scenarios: processes, drivers that behave or misbehave, steps, and what must come of them.

    A scenario is a TOML file, or the name of one that comes with hmmd; `pydoc hmm_client.scenario` shows what may
    stand in it.

    Without --target a daemon is started for the purpose, with the settings of the scenario's [daemon].  With it, that
    daemon must have been started with --harness if calls are to be held.

    Exit codes: 0 as expected; 1 not; 2 a file is not understood; 3 no daemon can be reached; 4 a scenario cannot be
    set up.
    """
    from hmm_client.scenario import library  # noqa: PLC0415 - takes longer than --help may

    if listed:
        _list(form)
        return
    names = [*(library.names() if everything else ()), *scenarios]
    if not names:
        fail(UNUSABLE, "which scenario?", "Name a file, or one of those that come with hmmd: `hmmctl run --list`.")
    done: list[tuple[Scenario, list[StepReport]]] = []
    with failures(where), ExitStack() as stack:
        stack.enter_context(_quiet())
        read = [library.find(name) for name in names]
        daemons = _Daemons(where, stack)
        show_steps = len(read) == 1 if steps is None else steps
        for number, scenario in enumerate(read, 1):
            progress = _Progress(scenario, number, len(read), form, show_steps=show_steps)
            done.append((scenario, run(_run(scenario, where, daemons.target(scenario), progress))))
            progress.end(done[-1][1])
    if junit is not None:
        _write_junit(junit, done)
    failed = sum(any(report.wrong for report in reports) for _, reports in done)
    if form == JSON:
        print_json({"scenarios": len(done), "failed": failed})
    elif len(done) > 1:
        click.echo(f"{len(done)} scenarios, {f'{failed} not as expected' if failed else 'all as expected'}")
    raise SystemExit(UNEXPECTED if failed else OK)


def _list(form: str) -> None:
    from hmm_client.scenario import library  # noqa: PLC0415 - takes longer than --help may

    found = [library.find(name) for name in library.names()]
    if form == JSON:
        for scenario in found:
            print_json({"name": scenario.name, "title": scenario.title, "rule": scenario.rule})
    else:
        print_table(("name", "title"), [(scenario.name, scenario.title) for scenario in found])


@contextmanager
def _quiet() -> Iterator[None]:
    # What drivers do wrong here they were told to do.
    log = logging.getLogger("hmm_client")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


async def _run(scenario: Scenario, where: Where, target: str, progress: _Progress) -> list[StepReport]:
    from hmm.errors import HmmError  # noqa: PLC0415 - takes longer than --help may
    from hmm_client.scenario import run_scenario  # noqa: PLC0415

    reports = []
    try:
        async for report in run_scenario(scenario, lambda name: where.connect(target, name=name)):
            reports.append(report)
            progress.step(report, len(reports))
    except HmmError as error:
        fail(REFUSED, f"{scenario.path}: it cannot be set up: {error}")
    return reports


def _write_junit(path: Path, done: list[tuple[Scenario, list[StepReport]]]) -> None:
    from hmm_client.scenario.junit import write_junit  # noqa: PLC0415 - takes longer than --help may

    try:
        write_junit(path, done)
    except OSError as error:
        fail(UNUSABLE, f"{path}: {error.strerror}")


@dataclass(slots=True)
class _Progress:
    """What is shown while a scenario runs, and when it has ended."""

    scenario: Scenario
    number: int
    count: int
    form: str
    show_steps: bool

    def __post_init__(self) -> None:
        if self.form != JSON and self.show_steps:
            click.echo(self.scenario.title)

    def step(self, report: StepReport, taken: int) -> None:
        """A step has ended."""
        if self.form == JSON:
            print_json(
                {
                    "scenario": self.scenario.name,
                    "line": report.step.line,
                    "step": str(report.step),
                    "ok": not report.wrong,
                    "ms": round(report.seconds * 1000),
                    "found": report.found,
                    "wrong": report.wrong,
                }
            )
        elif self.show_steps:
            _print_step(report)
        elif sys.stderr.isatty():
            place = f"[{self.number}/{self.count}] {self.scenario.name}: step {taken} of {len(self.scenario.steps)}"
            click.echo(f"\r\x1b[K{place}", err=True, nl=False)

    def end(self, reports: list[StepReport]) -> None:
        """The scenario has ended."""
        wrong = [report for report in reports if report.wrong]
        if self.form == JSON:
            name, title = self.scenario.name, self.scenario.title
            print_json({"scenario": name, "title": title, "steps": len(reports), "failed": len(wrong)})
            return
        if self.show_steps:
            verdict = f"{len(wrong)} not as expected" if wrong else "all as expected"
            click.echo(f"{counted(len(reports), 'step')}, {verdict}")
            return
        if sys.stderr.isatty():
            click.echo("\r\x1b[K", err=True, nl=False)
        seconds = sum(report.seconds for report in reports)
        mark = "FAIL" if wrong else "ok  "
        steps = counted(len(reports), "step")
        click.echo(f"{mark} {self.scenario.name:36}{steps:>9} {seconds:6.2f} s  {self.scenario.title}")
        for report in wrong:
            for text in report.wrong:
                click.echo(f"     {self.scenario.path}:{report.step.line}: {report.step}: {text}")


def _print_step(report: StepReport) -> None:
    mark = "FAIL" if report.wrong else "ok  "
    click.echo(f"{mark} line {report.step.line:3}  {report.step!s:24}  {report.found}  ({report.seconds:.2f} s)")
    for wrong in report.wrong:
        click.echo(f"               {wrong}")
