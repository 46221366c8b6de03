"""`hmmctl pending`: who is waiting for whom, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from hmm_client.commands.connection import OK, UNEXPECTED, Where, ask, where_options
from hmm_client.commands.messages import as_value, word
from hmm_client.commands.output import JSON, driver_of, format_option, print_json, print_table, printable, size
from hmm_proto.v1 import inspection_pb2, range_pb2, types_pb2

if TYPE_CHECKING:
    from hmm_client.client import Client

SHOWN_RANGES = 3
_HOLDING_HEADS = ("driver", ">pid", "holds", ">pages", ">space", ">lease", "at")


@click.command("pending")
@click.option("--check", is_flag=True, help="Exit with 1 if something is pending.")
@format_option
@where_options
def command(check: bool, form: str, where: Where) -> None:
    """Show who is waiting for whom, and why.

    Of each call that has not ended: how long it has been under way, what it waits for, which driver has not answered
    which event, how long that driver still has, and what happens then.  Then address spaces that a bug of hmmd has
    broken, and what drivers hold between two calls: pages that a device has to itself, migrations and pins, each with
    what is left of its lease.
    """
    answer = ask(where, _ask)
    if form == JSON:
        print_json(as_value(answer))
    else:
        _print(answer)
    raise SystemExit(UNEXPECTED if check and answer.operations else OK)


async def _ask(client: Client) -> inspection_pb2.GetPendingResponse:
    answer: inspection_pb2.GetPendingResponse = await client.channel.request(
        client.inspection.GetPending, inspection_pb2.GetPendingRequest()
    )
    return answer


def calls_that_wait(answer: inspection_pb2.GetPendingResponse) -> list[str]:
    """The calls that have not ended and whom each waits for, in lines for people."""
    names = {operation.operation_id: operation.name for operation in answer.operations}
    lines = [] if answer.operations else ["nothing is pending"]
    for operation in answer.operations:
        lines += _operation(operation, names)
    for cycle in answer.cycles:
        calls = " -> ".join(f"{names.get(number, 'call')} {number}" for number in cycle.operation_ids)
        inside = ", ".join(f"mirror {number}" for number in cycle.mirror_ids)
        wait = "seem to wait" if cycle.suspected else "wait"
        lines += ["", f"These {wait} for one another: {calls}" + (f", inside callbacks of {inside}" if inside else "")]
    for hold in answer.holds:
        if not hold.operation_id:
            lines += ["", f"{_hold(hold)}: nothing has come, it is for {hold.awaits}"]
    for space in answer.broken_spaces:
        whose = ", ".join(f"process {number}" for number in space.process_ids)
        lines += ["", f"The memory of {whose} is broken, and no call changes it any more: {space.because}"]
    return lines


def _print(answer: inspection_pb2.GetPendingResponse) -> None:
    for line in calls_that_wait(answer):
        click.echo(printable(line))
    if answer.holdings:
        click.echo()
        print_table(_HOLDING_HEADS, [_holding(holding) for holding in answer.holdings])
    waiting = [stream for stream in answer.streams if stream.unanswered_events or stream.queued_events]
    if waiting:
        click.echo()
        heads = ("driver", ">pid", "mirrors", ">unanswered", ">credit", ">queued", ">bytes", ">silent for")
        print_table(heads, [_stream(stream) for stream in waiting])


def _operation(operation: inspection_pb2.PendingOperation, names: dict[int, str]) -> list[str]:
    whose = f" of process {operation.process_id}" if operation.process_id else ""
    caller = f" by {operation.caller}" if operation.caller else ""
    gone = ", whose caller has given up," if operation.abandoned_by_caller else ""
    lines = [f"{operation.name} {operation.operation_id}{whose}{caller}{gone} under way for {_s(operation.age_ms)}"]
    lines.append(f"  waits for {operation.waits_for}")
    if operation.ranges.starts:
        lines.append(f"  at {_ranges(operation.ranges)}")
    lines += [f"  after {names.get(number, 'call')} {number}" for number in operation.blocked_by]
    lines += [f"  {_event(event)}" for event in operation.events]
    lines += [_userfault(operation.userfault)] if operation.HasField("userfault") else []
    lines += [_migration(operation.migration)] if operation.HasField("migration") else []
    lines += [f"  held by {_hold(operation.held)}"] if operation.HasField("held") else []
    return lines


def _userfault(userfault: inspection_pb2.PendingUserfault) -> str:
    handler = userfault.handler or f"the handler of userfaultfd {userfault.userfaultfd_id}"
    return f"  {handler} {'has been told and has not brought it in' if userfault.told else 'has not been told yet'}"


def _migration(migration: inspection_pb2.Holding) -> str:
    who = driver_of(migration.driver_name or "its driver", migration.driver_pid)
    return f"  {who} has to go on with migration {migration.migration_id}: {_s(migration.lease_ms)} of its lease left"


def _hold(hold: inspection_pb2.HoldStatus) -> str:
    owner = f" of {hold.owner}" if hold.owner else ""
    return f"hold {hold.hold_id}{owner}, {hold.point}, {_s(hold.lease_ms)} left"


def _ranges(ranges: range_pb2.AddressRanges) -> str:
    spans = [f"{start:x}-{end:x}" for start, end in zip(ranges.starts, ranges.ends, strict=True)]
    more = f" and {len(spans) - SHOWN_RANGES} more" if len(spans) > SHOWN_RANGES else ""
    return " ".join(spans[:SHOWN_RANGES]) + more


def _holding(holding: inspection_pb2.Holding) -> tuple[object, ...]:
    return (
        holding.driver_name or "-",
        str(holding.driver_pid or "-"),
        _held(holding),
        holding.page_count,
        str(holding.space_id),
        _s(holding.lease_ms),
        _ranges(holding.ranges),
    )


def _held(holding: inspection_pb2.Holding) -> str:
    if holding.migration_id:
        return f"migration {holding.migration_id}, mirror {holding.mirror_id}"
    return f"exclusive access, mirror {holding.mirror_id}" if holding.mirror_id else f"pin {holding.pin_id}"


def _event(event: inspection_pb2.PendingEvent) -> str:
    who = driver_of(event.driver_name or "its driver", event.driver_pid)
    kind = word(types_pb2.EventType.DESCRIPTOR, event.type)
    state = word(types_pb2.EventState.DESCRIPTOR, event.state).lower()
    due = "no deadline"
    if event.HasField("deadline_ms"):
        policy = word(types_pb2.DeadlinePolicy.DESCRIPTOR, event.policy).lower()
        due = f"{_s(event.deadline_ms)} left, then {policy}"
    what = f"{kind} #{event.event_sequence} of mirror {event.mirror_id}"
    return f"{who} has not answered {what}: {state} {_s(event.age_ms)} ago, {due}"


def _stream(stream: inspection_pb2.StreamStatus) -> tuple[object, ...]:
    return (
        stream.driver_name or "-",
        str(stream.driver_pid or "-"),
        " ".join(map(str, stream.mirror_ids)) or "-",
        stream.unanswered_events,
        stream.credit,
        stream.queued_events,
        size(stream.queued_bytes),
        _s(stream.silent_ms),
    )


def _s(milliseconds: int) -> str:
    return f"{milliseconds / 1000:.1f} s"
