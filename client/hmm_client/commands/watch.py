"""`hmmctl watch`: events and answers as they happen."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from hmm.errors import errno_name
from hmm_client.commands.connection import OK, UNEXPECTED, Where, ask, where_options
from hmm_client.commands.ids import MIRROR, PROCESS
from hmm_client.commands.messages import as_value, word
from hmm_client.commands.output import JSON, format_option, latency, print_json, printable
from hmm_proto.v1 import event_pb2, inspection_pb2, types_pb2

if TYPE_CHECKING:
    from hmm_client.client import Client

SHOWN_RANGES = 3


@click.command("watch")
@click.option(
    "--process", "-p", "processes", type=PROCESS, multiple=True, metavar="PID", help="Only of these processes."
)
@click.option("--mirror", "-m", "mirrors", type=MIRROR, multiple=True, metavar="MIRROR", help="Only of these mirrors.")
@click.option("--operations", "-o", is_flag=True, help="Calls that end, too.")
@click.option("--count", "-n", type=click.IntRange(min=1), metavar="N", help="End after so many lines.")
@format_option
@where_options
def command(
    processes: tuple[int, ...], mirrors: tuple[int, ...], operations: bool, count: int | None, form: str, where: Where
) -> None:
    """Show events and answers as they happen, until Ctrl-C.

    Watching slows nobody: who watches too slowly misses something and is told how much.
    """
    request = inspection_pb2.WatchRequest(process_ids=processes, mirror_ids=mirrors, operations=operations)

    async def show(client: Client) -> bool:
        lines, dropped = 0, 0
        async for part in client.channel.stream(client.inspection.Watch, request):
            for observation in part.observations:
                print_json(as_value(observation)) if form == JSON else click.echo(printable(_in_words(observation)))
                lines += 1
                if lines == count:
                    return True
            if part.dropped > dropped:
                click.echo(f"hmmctl: {part.dropped - dropped:,} lines lost here", err=True)
                dropped = part.dropped
        return False

    try:
        complete = ask(where, show, limited=False)
    except SystemExit as end:
        raise SystemExit(OK if end.code == 130 else end.code) from None
    if not complete:
        click.echo("hmmctl: the daemon has ended", err=True)
    raise SystemExit(OK if complete or count is None else UNEXPECTED)


def _in_words(seen: inspection_pb2.Observation) -> str:
    seconds = seen.time_ns // 1_000_000_000
    stamp = f"{time.strftime('%H:%M:%S', time.localtime(seconds))}.{seen.time_ns // 1_000_000 % 1000:03}"
    match seen.WhichOneof("what"):
        case "event":
            what = event_line(seen.event)
        case "settled":
            what = _settled(seen.settled)
        case "operation":
            what = _operation(seen.operation)
        case "mirror_lost":
            what = f"mirror {seen.mirror_lost.mirror_id} lost: {seen.mirror_lost.why}"
        case other:
            what = f"{other}"
    return f"{stamp}  {what}"


def event_line(event: event_pb2.Event) -> str:
    """Who hears of what, and why: in the words of 2015, or of today where those of 2015 have none."""
    spans = [f"{start:x}-{end:x}" for start, end in zip(event.ranges.starts, event.ranges.ends, strict=True)]
    where = " ".join(spans[:SHOWN_RANGES]) + (f" and {len(spans) - SHOWN_RANGES} more" * (len(spans) > SHOWN_RANGES))
    kind = word(types_pb2.EventType.DESCRIPTOR, event.type) or word(types_pb2.Reason.DESCRIPTOR, event.reason)
    heard = ", ".join(
        f"mirror {mirror} #{sequence}" for mirror, sequence in zip(event.mirror_ids, event.event_sequences, strict=True)
    )
    by = f"{event.operation} {event.operation_id}" + (f" by {event.caller}" if event.caller else "")
    why = f"{event.cause}; {by}" if event.cause else by
    return f"{kind:14} -> {heard}  {where}  ({why})"


def _settled(settled: inspection_pb2.EventSettled) -> str:
    state = word(types_pb2.EventState.DESCRIPTOR, settled.state).lower()
    refused = f" with {errno_name(settled.errno)}" if settled.errno else ""
    who = f"mirror {settled.mirror_id} #{settled.event_sequence}"
    return f"{'':14} <- {who}  {state}{refused} after {latency(settled.latency_us)}"


def _operation(operation: inspection_pb2.OperationStatus) -> str:
    error = operation.result.errno
    end = errno_name(error) if error else "done"
    by = f" by {operation.caller}" if operation.caller else ""
    return f"{operation.name} {operation.operation_id}{by}: {end} after {latency(operation.duration_us)}"
