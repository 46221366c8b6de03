"""`hmmctl run`: take the steps of a scenario file.

**Absent**: the file's format (`hmm_client.scenario`).
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from hmm_client.commands.connection import OK, UNEXPECTED, Where, failures, run, where_options
from hmm_client.commands.output import JSON, format_option, print_json
from hmm_client.embedded import embedded_daemon
from hmm_client.scenario import Scenario, StepReport, read_scenario, run_scenario


@click.command("run")
@click.argument("file", type=click.Path(path_type=Path))
@format_option
@where_options
def command(file: Path, form: str, where: Where) -> None:
    """Run a scenario: processes, drivers that behave or misbehave, steps, and what must come of them.

    FILE is TOML; `pydoc hmm_client.scenario` shows an example with everything in it.

    Without --target a daemon is started for the purpose, with the settings of the scenario's [daemon].

    Exit codes: 0 as expected; 1 not; 2 the file is not understood; 3 no daemon can be reached.
    """
    with failures(where), ExitStack() as stack:
        scenario = read_scenario(file)
        target = where.target or stack.enter_context(embedded_daemon(**{"log_level": "error", **scenario.settings}))
        if form != JSON:
            click.echo(scenario.title)
        reports = run(_run(scenario, where, target, form))
    failed = sum(bool(report.wrong) for report in reports)
    if form == JSON:
        print_json({"scenario": scenario.title, "steps": len(reports), "failed": failed})
    else:
        click.echo(f"{len(reports)} steps, {f'{failed} not as expected' if failed else 'all as expected'}")
    raise SystemExit(UNEXPECTED if failed else OK)


async def _run(scenario: Scenario, where: Where, target: str, form: str) -> list[StepReport]:
    reports = []
    async for report in run_scenario(scenario, lambda name: where.connect(target, name=name)):
        reports.append(report)
        _print(report, form)
    return reports


def _print(report: StepReport, form: str) -> None:
    if form == JSON:
        print_json(
            {
                "line": report.step.line,
                "step": str(report.step),
                "ok": not report.wrong,
                "ms": round(report.seconds * 1000),
                "found": report.found,
                "wrong": report.wrong,
            }
        )
        return
    mark = "FAIL" if report.wrong else "ok  "
    click.echo(f"{mark} line {report.step.line:3}  {report.step!s:24}  {report.found}  ({report.seconds:.2f} s)")
    for wrong in report.wrong:
        click.echo(f"               {wrong}")
