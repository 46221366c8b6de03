"""`hmmctl stats`: counters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from hmm_client.commands.connection import Where, ask, where_options
from hmm_client.commands.messages import as_value
from hmm_client.commands.output import JSON, counted, format_option, latency, print_json, print_pairs, print_table, size
from hmm_proto.v1 import inspection_pb2

if TYPE_CHECKING:
    from hmm_client.client import Client


@click.command("stats")
@format_option
@where_options
def command(form: str, where: Where) -> None:
    """Show counters of the daemon, of its calls and of each mirror, since the daemon began to serve.

    ACK is the time from sending an event to its answer: the median, and what 99 of 100 do not exceed.
    """
    answer = ask(where, _ask)
    if form == JSON:
        print_json(as_value(answer))
        return
    daemon = answer.daemon
    mirrors = counted(daemon.mirrors, "mirror")
    print_pairs(
        {
            "version": daemon.version,
            "serving for": f"{daemon.uptime_ms / 1000:,.0f} s",
            "processes": f"{daemon.processes:,} in {counted(daemon.spaces, 'address space')}",
            "devices": f"{daemon.devices:,} with {mirrors} on {counted(daemon.streams, 'stream')}",
            "files": daemon.files,
            "frames": f"{daemon.frames_used:,} of {daemon.frames_total:,} ({size(daemon.frames_used << 12)})",
            "swap": f"{daemon.swap_used:,} of {daemon.swap_total:,} ({size(daemon.swap_used << 12)})",
            "pages reclaimed": f"{daemon.pages_reclaimed:,}",
            "pages merged": f"{daemon.ksm_pages_sharing:,} into {daemon.ksm_pages_shared:,}",
            "frames lost": f"{daemon.frames_poisoned:,}",
            "memory": size(daemon.resident_bytes),
            "calls pending": daemon.operations_pending,
            "answers rejected": daemon.rejected_answers,
        }
    )
    for heading, counters in (("call", daemon.operations), ("error", daemon.errors)):
        if counters:
            click.echo()
            print_table((heading, ">count"), sorted(counters.items()))
    if answer.mirrors:
        click.echo()
        _print_mirrors(answer.mirrors)


async def _ask(client: Client) -> inspection_pb2.GetStatisticsResponse:
    answer: inspection_pb2.GetStatisticsResponse = await client.channel.request(
        client.inspection.GetStatistics, inspection_pb2.GetStatisticsRequest()
    )
    return answer


def _print_mirrors(mirrors: Iterable[inspection_pb2.MirrorStatistics]) -> None:
    heads = (
        ">mirror", ">events", ">pages", ">refused", ">fenced", ">stale", ">rejected",
        ">faults", ">retries", ">read", ">written", ">denied", ">ack p50", ">ack p99",
    )  # fmt: skip
    spare = ("rejected", "stale", "retries", "refused", "denied", "fenced", "read", "written", "ack p50")
    print_table(heads, [_mirror(mirror) for mirror in mirrors], spare=spare)


def _mirror(mirror: inspection_pb2.MirrorStatistics) -> tuple[object, ...]:
    return (
        str(mirror.mirror_id),
        sum(mirror.events_by_type.values()),
        mirror.pages,
        mirror.refused,
        mirror.fenced + mirror.abandoned,
        mirror.stale_answers,
        mirror.rejected_answers,
        mirror.faults,
        mirror.fault_retries,
        size(mirror.bytes_read),
        size(mirror.bytes_written),
        mirror.access_errors,
        latency(mirror.acknowledgement.p50_us),
        latency(mirror.acknowledgement.p99_us),
    )
