"""`hmmctl sanitize`: what devices did that they must not."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from hmm.violation import ViolationKind
from hmm_client.commands.connection import OK, UNEXPECTED, Where, ask, where_options
from hmm_client.commands.ids import DEVICE, MIRROR
from hmm_client.commands.messages import as_value, word
from hmm_client.commands.output import JSON, counted, format_option, print_json, printable
from hmm_proto.v1 import inspection_pb2, violation_pb2

if TYPE_CHECKING:
    from hmm_client.client import Client


@click.command("sanitize")
@click.option("--mirror", "-m", type=MIRROR, metavar="MIRROR", help="Only of this mirror.")
@click.option("--device", "-d", type=DEVICE, metavar="DEVICE", help="Only of this device's mirrors.")
@click.option("--check", is_flag=True, help="Exit with 1 if there is anything.")
@format_option
@where_options
def command(mirror: int | None, device: int | None, check: bool, form: str, where: Where) -> None:
    """Show what devices did that they must not, and which answers of drivers were rejected.

    Of each access that was refused: the rule, the page, which event had taken the translation, which call caused that
    event, and who acknowledged it when.  The first 64 of each mirror are kept in full, all are counted.
    """
    request = inspection_pb2.GetViolationsRequest(mirror_id=mirror or 0, device_id=device or 0)
    answer = ask(where, lambda client: _ask(client, request))
    found = bool(answer.mirrors or answer.rejected_answers)
    if form == JSON:
        print_json(as_value(answer))
    elif not found:
        click.echo("no violations")
    else:
        for line in _lines(answer):
            click.echo(printable(line))
    raise SystemExit(UNEXPECTED if check and found else OK)


async def _ask(client: Client, request: inspection_pb2.GetViolationsRequest) -> inspection_pb2.GetViolationsResponse:
    answer = inspection_pb2.GetViolationsResponse()
    while True:
        part: inspection_pb2.GetViolationsResponse = await client.channel.request(
            client.inspection.GetViolations, request
        )
        answer.mirrors.extend(part.mirrors)
        answer.rejected_answers.extend(part.rejected_answers)
        if not part.next_page_token:
            return answer
        request.page_token = part.next_page_token


def _lines(answer: inspection_pb2.GetViolationsResponse) -> list[str]:
    lines = []
    for report in answer.mirrors:
        whose = f"{report.device_name}, driver {report.driver_name}" if report.driver_name else report.device_name
        gone = ", gone" if report.gone else ""
        lines.append(f"mirror {report.mirror_id} ({whose}{gone})")
        for name, count in sorted(report.counts.items()):
            lines.append(f"  {count:,} x {ViolationKind[name].value}: {ViolationKind[name].rule}")
        for violation in report.violations:
            lines += [f"    {line}" for line in _violation(violation)]
    for rejected in answer.rejected_answers:
        what = f"event {rejected.violation.event_sequence} of mirror {rejected.violation.mirror_id}"
        driver = rejected.driver_name or "unnamed"
        lines.append(f"{_clock(rejected.time_ns)}  {driver} answered {what}, rejected: {rejected.violation.rule}")
    return lines


_ANSWERED = {
    violation_pb2.VIOLATION_KIND_DIRTY_NOT_REPORTED: "written and not reported",
    violation_pb2.VIOLATION_KIND_DMA_MAPPING_KEPT: "still mapped for DMA",
}
"""What was found at an answer, and not at an access."""


def _violation(violation: violation_pb2.AccessViolation) -> list[str]:
    kind = word(violation_pb2.ViolationKind.DESCRIPTOR, violation.kind)
    access = _ANSWERED.get(violation.kind, "write" if violation.write else "read")
    more = f" and {counted(violation.pages - 1, 'more page')}" if violation.pages > 1 else ""
    lines = [f"{access} at {violation.address:#x}{more}, operation {violation.operation_id} ({kind.lower()})"]
    if violation.HasField("taking"):
        taking = violation.taking
        where = f"[{taking.start:#x}, {taking.end:#x})" if taking.event != "RELEASE" else "everything"
        call = f"{taking.operation or 'operation'} {taking.operation_id}" + (
            f" by {taking.caller}" if taking.caller else ""
        )
        lines.append(f"  {taking.event} #{taking.event_sequence} had taken {where} for {call}")
        if taking.acknowledged_ns:
            lines.append(f"  acknowledged by {taking.acknowledged_by} at {_clock(taking.acknowledged_ns)}")
    return lines


def _clock(time_ns: int) -> str:
    seconds = time_ns // 1_000_000_000
    return f"{time.strftime('%H:%M:%S', time.localtime(seconds))}.{time_ns // 1_000_000 % 1000:03}"
