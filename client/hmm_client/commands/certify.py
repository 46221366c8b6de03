"""`hmmctl certify`: put somebody's driver to the test."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import click

from hmm_client.certify.adversities import ADVERSITIES
from hmm_client.certify.certificate import DEADLINE_S, LIMIT_S, Certificate, Trial, certify
from hmm_client.certify.driver_process import DriverGoneError, DriverSilentError
from hmm_client.certify.findings import RULES
from hmm_client.commands.connection import INTERRUPTED, OK, UNEXPECTED, UNUSABLE, Where, fail, failures, run
from hmm_client.commands.output import JSON, counted, format_option, junit_option, print_json
from hmm_client.commands.progress import Progress

SEEDS = "0:20"

_WIDTH = max(map(len, ADVERSITIES))


def _seeds(ctx: click.Context, parameter: click.Parameter, value: str) -> range:  # noqa: ARG001 - click's interface
    first, _, end = value.partition(":")
    if not value.isascii() or not first.isdecimal() or not (end.isdecimal() or (not end and ":" not in value)):
        raise click.BadParameter("write FIRST:END, or one seed")
    seeds = range(int(first), int(end) if end else int(first) + 1)
    if seeds.stop < seeds.start:
        raise click.BadParameter(f"{value} ends before it begins")
    return seeds


def _all_cpus() -> int:
    return len(os.sched_getaffinity(0))


def _list(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:  # noqa: ARG001 - as above
    if value:
        for adversity in ADVERSITIES.values():
            click.echo(f"{adversity.name:{_WIDTH}}  {adversity.title}")
        ctx.exit()


@click.command("certify", context_settings={"ignore_unknown_options": True})
@click.argument("driver", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND...")
@click.option("--seeds", default=SEEDS, callback=_seeds, metavar="FIRST:END", help=f"Storms.  [default: {SEEDS}]")
@click.option(
    "--only", "only", multiple=True, type=click.Choice(list(ADVERSITIES)), metavar="NAME", help="This adversity only."
)
@click.option("--list", is_flag=True, is_eager=True, expose_value=False, callback=_list, help="Name all adversities.")
@click.option(
    "--deadline",
    type=click.FloatRange(min=0.05),
    default=DEADLINE_S,
    metavar="SECONDS",
    help=f"How long the driver has to answer an event.  [default: {DEADLINE_S:g}]",
)
@click.option(
    "--limit",
    type=click.FloatRange(min=1),
    default=LIMIT_S,
    metavar="SECONDS",
    help=f"How long a trial may take before it is broken off.  [default: {LIMIT_S:g}]",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=_all_cpus,
    metavar="N",
    help="How many storms run at a time, each with a daemon and a driver of its own.  [default: one for each CPU]",
)
@junit_option
@format_option
def command(
    driver: tuple[str, ...],
    seeds: range,
    only: tuple[str, ...],
    deadline: float,
    limit: float,
    jobs: int,
    junit: Path | None,
    form: str,
) -> None:
    """Put a driver to the test: everything that can happen to one happens to it.

    COMMAND starts the driver, in whatever language; it finds the daemon at $HMMD_SOCKET and takes its orders as JSON
    lines on standard input: mirror a process, read, write, unmirror.  `pydoc hmm_client.certify` says what is asked of
    it.  A daemon is started for the purpose.  Trials of an order that the driver does not offer are skipped.

    With --only the named adversities run, and storms only if --seeds is given.  Storms that were stopped can be gone on
    with: it is said from which seed.

    A trial that does not end within --limit, whether the driver or hmmd is to blame, has failed: what is pending is
    told, and the next one has a new daemon and a new driver.

    Exit codes: 0 the driver passed; 1 it did not; 2 it did not start.
    """
    context = click.get_current_context()
    if only and context.get_parameter_source("seeds") is click.core.ParameterSource.DEFAULT:
        seeds = range(0)
    told = _print_json_trial if form == JSON else _print_trial
    nowhere = Where(None, "", False, None, None, None, 0.0)
    began = time.monotonic()
    limits = {"deadline_s": deadline, "limit_s": limit}
    with failures(nowhere):
        try:
            certificate = _certify(driver, only or tuple(ADVERSITIES), seeds, limits, jobs, told)
        except (DriverGoneError, DriverSilentError) as error:
            fail(UNUSABLE, f"{' '.join(driver)}: {error}", "What is asked of a driver: `pydoc hmm_client.certify`.")
    if junit is not None:
        junit.write_bytes(as_junit(certificate, " ".join(driver)))
    _print_summary(certificate, driver, limits, form, time.monotonic() - began)
    raise SystemExit(OK if certificate.passed else UNEXPECTED)


def _certify(
    driver: tuple[str, ...],
    names: tuple[str, ...],
    seeds: range,
    limits: Mapping[str, float],
    jobs: int,
    told: Callable[[Trial], None],
) -> Certificate:
    left, failed = set(seeds), 0

    def note(trial: Trial) -> None:
        nonlocal failed
        told(trial)
        if trial.seed is not None:
            left.discard(trial.seed)
            failed += bool(trial.findings)
            progress.advance(1, f"{failed} failed" if failed else "")

    with Progress("storms", len(seeds)) as progress:
        jobs = max(1, min(jobs, len(seeds)))
        work = certify(driver, adversities=names, seeds=seeds, jobs=jobs, told=note, **limits)
        try:
            return run(work)
        except KeyboardInterrupt:
            if not left:
                raise
            how_far = f"{len(seeds) - len(left)} of {len(seeds)} storms, {failed} failed"
            fail(INTERRUPTED, f"{how_far}; go on with --seeds {min(left)}:{seeds.stop}")


def _print_trial(trial: Trial) -> None:
    if trial.seed is not None and not trial.findings:
        return
    mark = "FAIL" if trial.findings else "skip" if trial.skipped else "ok  "
    click.echo(f"{mark} {trial.name:{_WIDTH}} {trial.seconds:6.2f} s  {trial.title}")
    for finding in (*trial.findings, *([trial.skipped] if trial.skipped else ())):
        for line in str(finding).splitlines():
            click.echo(f"       {line}")
    if trial.shortest:
        steps = counted(len(trial.shortest), "step")
        click.echo(f"       shortest: {steps}: {'; '.join(map(str, trial.shortest))}")
    sys.stdout.flush()


def _print_summary(
    certificate: Certificate, driver: tuple[str, ...], limits: Mapping[str, float], form: str, took_s: float
) -> None:
    ran = [trial for trial in certificate.trials if trial.seed is not None]
    failed = sum(bool(trial.findings) for trial in certificate.trials)
    if form == JSON:
        rules = {rule: trial.name for rule, trial in certificate.broken.items()}
        print_json({"driver": driver, "trials": len(certificate.trials), "failed": failed, "broken": rules})
        return
    if ran:
        bad = [str(trial.seed) for trial in ran if trial.findings]
        which = f": seeds {', '.join(bad)}" if bad else ""
        span = f"{ran[0].seed}:{(ran[-1].seed or 0) + 1}"
        click.echo(f"{'FAIL' if bad else 'ok  '} storms {span}, {len(bad)} failed{which}")
    if certificate.passed:
        skipped = sum(bool(trial.skipped) for trial in certificate.trials)
        but = f", {skipped} skipped" if skipped else ""
        click.echo(f"\npassed: {counted(len(certificate.trials) - skipped, 'trial')} in {took_s:.0f} s{but}")
        return
    click.echo(f"\nnot passed: {failed} of {len(certificate.trials):,} trials failed, in {took_s:.0f} s")
    for rule, trial in certificate.broken.items():
        which = f"--only {trial.name}" if trial.seed is None else f"--seeds {trial.seed}"
        click.echo(f"  {rule}: {RULES[rule]}")
        if trial.name != "leave":
            click.echo(f"    hmmctl certify {which}{_as_flags(limits)} -- {shlex.join(driver)}")


def _as_flags(limits: Mapping[str, float]) -> str:
    """The limits that are not the defaults, as they were given."""
    usual = {"deadline_s": DEADLINE_S, "limit_s": LIMIT_S}
    return "".join(f" --{name[:-2]} {value:g}" for name, value in limits.items() if value != usual[name])


def _print_json_trial(trial: Trial) -> None:
    print_json(_as_value(trial))


def _as_value(trial: Trial) -> dict[str, Any]:
    return {
        "trial": trial.name,
        "ok": not trial.findings,
        "ms": round(trial.seconds * 1000),
        "seed": trial.seed,
        "findings": [{"rule": one.rule, "means": RULES[one.rule], "detail": one.detail} for one in trial.findings],
        "shortest": [str(step) for step in trial.shortest],
        "skipped": trial.skipped,
    }


def as_junit(certificate: Certificate, driver: str) -> bytes:
    """The certificate as JUnit XML: one suite, a case for each trial."""
    failed = sum(bool(trial.findings) for trial in certificate.trials)
    seconds = sum(trial.seconds for trial in certificate.trials)
    suite = ET.Element(
        "testsuite",
        name="hmmctl certify",
        tests=str(len(certificate.trials)),
        failures=str(failed),
        errors="0",
        skipped=str(sum(bool(trial.skipped) for trial in certificate.trials)),
        time=f"{seconds:.3f}",
    )
    for trial in certificate.trials:
        case = ET.SubElement(suite, "testcase", classname=driver, name=trial.name, time=f"{trial.seconds:.3f}")
        if trial.skipped:
            ET.SubElement(case, "skipped", message=trial.skipped)
        if trial.findings:
            steps = [f"shortest: {step}" for step in trial.shortest]
            first = trial.findings[0]
            failure = ET.SubElement(case, "failure", type=first.rule, message=str(first).partition("\n")[0])
            failure.text = "\n".join([*map(str, trial.findings), *steps])
    root = ET.Element("testsuites")
    root.append(suite)
    text: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return text
