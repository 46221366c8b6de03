"""`hmmctl verify`: replay kernel traces and compare.

**Absent**: what is compared, and how (`hmm_client.verification`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click

from hmm_client.commands.connection import OK, UNEXPECTED, UNUSABLE, Where, failures, where_options
from hmm_client.commands.output import JSON, format_option, print_json, print_table
from hmm_client.commands.progress import Progress
from hmm_client.embedded import PATIENCE, embedded_daemon
from hmm_client.recordings import TraceError, ktrace
from hmm_client.recordings.ktrace import Arguments, Operation
from hmm_client.verification import Counts, Difference, InProcess, Level, Subject, TraceReport, verify

SHOWN_DIFFERENCES = 5
_DEFAULTS = Arguments()


@click.command("verify")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.Path())
@click.option("--in-process", is_flag=True, help="Verify the model itself, without a daemon.")
@click.option(
    "--by-steps", is_flag=True, help="With --in-process: the driver migrates by setup, pages and finalize, and copies."
)
@click.option(
    "--show",
    type=click.IntRange(min=0),
    default=SHOWN_DIFFERENCES,
    metavar="N",
    show_default=True,
    help="How many differences are shown in full.",
)
@format_option
@where_options
def command(paths: tuple[str, ...], in_process: bool, by_steps: bool, show: int, form: str, where: Where) -> None:
    """Compare the model with what Linux did, operation by operation.

    PATH is a kernel trace (*.jsonl, *.jsonl.gz) or a folder, whose traces are all taken.  After every operation what
    it returned, what it read, and every process's mappings and pages must be as in the trace.  Differences are counted
    on three levels: semantic; mirror, which depends on the entries that the kernel's test driver still holds; detail,
    the kernel's bookkeeping.

    Without --target a daemon is started for the purpose.

    Exit codes: 0 no semantic difference; 1 semantic differences; 2 unusable input, with all other traces compared; 3
    no daemon can be reached.
    """
    if by_steps and not in_process:
        raise click.UsageError("--by-steps needs --in-process")
    unusable: list[TraceError] = []
    with failures(where), ExitStack() as stack:
        files = _expanded(paths, unusable)
        subject = partial(InProcess, by_steps=by_steps) if in_process else stack.enter_context(_daemon(where))
        reports = _verify(files, subject, unusable)
    for error in unusable:
        click.echo(f"hmmctl: {error}", err=True)
    if reports and form == JSON:
        print_json(_as_json(reports))
    elif reports:
        _print(reports, show)
    if unusable:
        raise SystemExit(UNUSABLE)
    raise SystemExit(UNEXPECTED if _sum(reports, Level.SEMANTIC).differences else OK)


@contextmanager
def _daemon(where: Where) -> Iterator[Callable[[], Subject]]:
    from hmm_client import sync, tls_credentials  # noqa: PLC0415 - imports gRPC, which --in-process does without
    from hmm_client.verification.over_wire import OverWire  # noqa: PLC0415

    with ExitStack() as stack:
        target = where.target or stack.enter_context(embedded_daemon(acknowledgement_s=60.0, **PATIENCE))
        secure = where.tls or where.ca or where.certificate
        credentials = tls_credentials(where.ca, where.certificate, where.key) if secure else None
        client = stack.enter_context(sync.connect(target, where.token, name="hmmctl verify", credentials=credentials))
        yield lambda: OverWire(client)


def _expanded(paths: Sequence[str], unusable: list[TraceError]) -> list[Path]:
    """The traces that can be found; why others cannot is added to `unusable`."""
    files: list[Path] = []
    for path in paths:
        try:
            files += ktrace.expand(path)
        except TraceError as error:
            unusable.append(error)
    return files


def _verify(
    files: Sequence[Path], subject: Callable[[], AbstractContextManager[Subject]], unusable: list[TraceError]
) -> list[TraceReport]:
    """Compare those that can be read and performed; why others cannot is added to `unusable`."""
    reports = []
    with Progress("verifying", len(files)) as progress:
        for file in files:
            try:
                trace = ktrace.read_trace(file)
                with subject() as fresh:
                    reports.append(verify(trace, fresh))
                progress.advance(what=f"{trace.header.set}/{trace.header.trace}")
            except TraceError as error:
                unusable.append(error)
                progress.advance(what=file.name)
    return reports


# ---- the report


def _sum(reports: list[TraceReport], level: Level) -> Counts:
    counts = Counts()
    for report in reports:
        counts.add(report.counts[level])
    return counts


def _as_json(reports: list[TraceReport]) -> dict[str, Any]:
    totals: dict[str, Any] = {
        "traces": len(reports),
        "operations": sum(report.operations for report in reports),
    }
    for level in Level:
        counts = _sum(reports, level)
        totals[level.value] = {"compared": counts.compared, "differences": counts.differences}
    return totals


def _print(reports: list[TraceReport], show: int) -> None:
    groups: dict[tuple[str, str], list[TraceReport]] = {}
    for report in reports:
        groups.setdefault((report.trace.header.set, report.trace.header.kind), []).append(report)
    rows = [(*group, *_row(groups[group])) for group in sorted(groups)]
    of_levels = (head for level in Level for head in (f">{level.value}", ">differ"))
    heads = ("set", "class", ">traces", ">ops", *of_levels)
    print_table(heads, [*rows, ("all", "", *_row(reports))])
    found = [difference for report in reports for difference in report.differences]
    differences = sorted(found, key=lambda difference: list(Level).index(difference.level))
    for difference in differences[:show]:
        click.echo()
        _print_difference(difference)
    if len(differences) > show:
        click.echo(f"\nand {len(differences) - show:,} more")


def _row(reports: list[TraceReport]) -> tuple[int, ...]:
    sums = [_sum(reports, level) for level in Level]
    operations = sum(report.operations for report in reports)
    return (len(reports), operations, *(n for counts in sums for n in (counts.compared, counts.differences)))


def _print_difference(difference: Difference) -> None:
    whose = "" if difference.process is None else f" of process {difference.process}"
    where = f"{difference.trace.path}:{difference.operation.line}"
    click.echo(f"{where}: {difference.aspect.value}{whose} ({difference.level.value})")
    for operation in difference.before:
        click.echo(f"    after    {_in_words(operation)}")
    click.echo(f"    in       {_in_words(difference.operation)}")
    expected, found = _contrast(difference.expected, difference.found)
    click.echo(f"    expected {expected}\n    found    {found}")


def _in_words(operation: Operation) -> str:
    args = operation.args
    given = [
        f"{name}={getattr(args, name)}" for name in args.__slots__ if getattr(args, name) != getattr(_DEFAULTS, name)
    ]
    return f"{operation.index} p{operation.process} {operation.name} {' '.join(given)}".rstrip()


def _contrast(expected: object, found: object) -> tuple[str, str]:
    """Both sides; of long sequences the part where they begin to differ."""
    if isinstance(expected, tuple | bytes) and isinstance(found, tuple | bytes):
        pairs = zip(expected, found, strict=False)
        at = next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(found)))
        return _from(expected, at), _from(found, at)
    return _alone(expected), _alone(found)


def _alone(value: object) -> str:
    return _from(value, 0) if isinstance(value, tuple | bytes) else str(value)


def _from(values: tuple[object, ...] | bytes, at: int) -> str:
    shown = [f"{value:02x}" if isinstance(values, bytes) else str(value) for value in values[at : at + 8]]
    text = " ".join(shown) if shown else "nothing"
    return f"[{at}] {text}" + (" ..." if len(values) > at + 8 else "")
