"""`hmmctl top`: what happens now: devices, calls and who waits, as rates.

On a terminal the page is drawn anew every interval, until Ctrl-C, and fits the terminal; elsewhere it is printed once,
whole.

**Invariants**: a rate is a difference of two readings over the time between them.

**Absent**: counters since the start (`stats`), everything about who waits (`pending`).
"""

from __future__ import annotations

import asyncio
import heapq
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import click

from hmm_client.commands.connection import OK, Where, ask, where_options
from hmm_client.commands.messages import word
from hmm_client.commands.output import JSON, counted, format_option, latency, print_json, size, table_lines
from hmm_proto.v1 import inspection_pb2, types_pb2

if TYPE_CHECKING:
    from hmm_client.client import Client

SHOWN_CALLS = 8
SHOWN_PENDING = 8
SHOWN_MIRRORS = 4
"""So many mirrors at least, however low the terminal is."""
MIRROR_HEADS = (
    "device", ">mirror", "driver", ">pid", "state", ">entries", ">owed", ">events/s", ">faults/s", ">pages/s",
    ">retries/s", ">read/s", ">written/s", ">denied/s", ">ack p50", ">ack p99",
)  # fmt: skip
SPARE = ("retries/s", "denied/s", "read/s", "written/s", "pid", "entries", "ack p50", "faults/s")
STYLES = {"heading": "reverse", "waits": "yellow", "lost": "red"}
PENDING_HEADS = ("call", "by", ">for", "waits for")
CALL_HEADS = ("call", ">per second", ">in all", ">pending")


@dataclass(frozen=True, slots=True)
class Reading:
    """Everything as it was at one moment; `at_s` on the monotonic clock."""

    at_s: float
    statistics: inspection_pb2.GetStatisticsResponse
    devices: inspection_pb2.ListDevicesResponse
    pending: inspection_pb2.GetPendingResponse

    @classmethod
    async def take(cls, client: Client) -> Reading:
        """Ask the daemon."""
        request, inspection = client.channel.request, client.inspection
        statistics, devices, pending = await asyncio.gather(
            request(inspection.GetStatistics, inspection_pb2.GetStatisticsRequest()),
            request(inspection.ListDevices, inspection_pb2.ListDevicesRequest()),
            request(inspection.GetPending, inspection_pb2.GetPendingRequest()),
        )
        return cls(time.monotonic(), statistics, devices, pending)


class Page:
    """What happened between two readings."""

    def __init__(self, before: Reading, after: Reading) -> None:
        self._seconds = max(1e-6, after.at_s - before.at_s)
        self._before = before
        self._after = after

    def value(self) -> dict[str, Any]:
        """The page for programs."""
        daemon = self._after.statistics.daemon
        return {
            "seconds": round(self._seconds, 3),
            "daemon": {
                "uptime_ms": daemon.uptime_ms,
                "resident_bytes": daemon.resident_bytes,
                "frames_used": daemon.frames_used,
                "frames_total": daemon.frames_total,
                "operations_per_second": self._all_calls(),
                "operations_pending": daemon.operations_pending,
            },
            "mirrors": self.mirrors(),
            "calls": self.calls(),
            "pending": self.pending(),
        }

    def lines(self) -> list[str]:
        """The head of the page."""
        daemon = self._after.statistics.daemon
        frames = f"{daemon.frames_used:,} of {daemon.frames_total:,} frames ({size(daemon.frames_used << 12)})"
        calls = f"{self._all_calls():,.0f} calls/s, {daemon.operations_pending:,} pending"
        objects = ", ".join(
            (
                counted(daemon.processes, "process", "processes"),
                counted(daemon.devices, "device"),
                counted(daemon.streams, "stream"),
            )
        )
        return [
            f"hmmd {daemon.version}, up {daemon.uptime_ms / 1000:,.0f} s, {size(daemon.resident_bytes)}, {frames}",
            f"{calls}; {objects}; {counted(daemon.rejected_answers, 'answer')} rejected",
        ]

    def mirrors(self) -> list[dict[str, Any]]:
        """Each mirror: what it is and what it does each second."""
        after = {one.mirror_id: one for one in self._after.statistics.mirrors}
        before = {one.mirror_id: one for one in self._before.statistics.mirrors}
        rows = []
        for device in self._after.devices.devices:
            for status in device.mirrors:
                now = after.get(status.mirror_id, inspection_pb2.MirrorStatistics())
                then = before.get(status.mirror_id, inspection_pb2.MirrorStatistics())
                events = sum(now.events_by_type.values()) - sum(then.events_by_type.values())
                rows.append(
                    {
                        "device": device.name,
                        "mirror": status.mirror_id,
                        "driver": status.driver_name,
                        "pid": status.driver_pid,
                        "state": status.state,
                        "entries": status.entry_count,
                        "owed": status.last_event_sequence - status.answered_up_to,
                        "events_per_second": self._rate(events),
                        "faults_per_second": self._rate(now.faults - then.faults),
                        "pages_per_second": self._rate(now.fault_pages - then.fault_pages),
                        "retries_per_second": self._rate(now.fault_retries - then.fault_retries),
                        "bytes_read_per_second": self._rate(now.bytes_read - then.bytes_read),
                        "bytes_written_per_second": self._rate(now.bytes_written - then.bytes_written),
                        "denied_per_second": self._rate(now.access_errors - then.access_errors),
                        "acknowledgement_p50_us": now.acknowledgement.p50_us,
                        "acknowledgement_p99_us": now.acknowledgement.p99_us,
                    }
                )
        return rows

    def calls(self) -> list[dict[str, Any]]:
        """The calls that end or wait most often."""
        now, then = self._after.statistics.daemon.operations, self._before.statistics.daemon.operations
        waiting = [operation.name for operation in self._after.pending.operations]
        rows: list[dict[str, Any]] = [
            {
                "call": name,
                "per_second": self._rate(now.get(name, 0) - then.get(name, 0)),
                "in_all": now.get(name, 0),
                "pending": waiting.count(name),
            }
            for name in {*now, *waiting}
        ]
        rows.sort(key=lambda row: (-row["pending"], -row["per_second"], -row["in_all"], row["call"]))
        return rows[:SHOWN_CALLS]

    def pending(self) -> list[dict[str, Any]]:
        """The calls that have waited longest, and for whom."""
        waiting = sorted(self._after.pending.operations, key=lambda operation: -operation.age_ms)
        return [
            {
                "operation_id": operation.operation_id,
                "call": operation.name,
                "caller": operation.caller,
                "age_ms": operation.age_ms,
                "waits_for": _waits_for(operation),
            }
            for operation in waiting[:SHOWN_PENDING]
        ]

    def _all_calls(self) -> float:
        now, then = self._after.statistics.daemon.operations, self._before.statistics.daemon.operations
        return self._rate(sum(now.values()) - sum(then.values()))

    def _rate(self, difference: int) -> float:
        return round(difference / self._seconds, 1)

    # ---- as text

    def text(self, width: int | None = None, height: int | None = None) -> Iterator[tuple[str, str]]:
        """The page in lines, each with its style: "", "bold", "heading", "waits", "lost".

        Args:
            width: of the terminal, in characters; None: as wide as it comes.
            height: of the terminal, in lines, for which the busiest mirrors are picked; None: all of them.
        """
        for number, line in enumerate(self.lines()):
            yield line, "" if number else "bold"
        waiting, calls, mirrors, all_mirrors = self.pending(), self.calls(), self.mirrors(), len(self.mirrors())
        if height is not None:
            others = sum(len(rows) + 2 for rows in (waiting, calls) if rows)
            mirrors = _busiest(mirrors, max(SHOWN_MIRRORS, height - len(self.lines()) - others - 3))
        yield "", ""
        if mirrors:
            heading, *lines = table_lines(MIRROR_HEADS, map(_mirror_row, mirrors), width, SPARE)
            yield heading, "heading"
            for line, mirror in zip(lines, mirrors, strict=True):
                yield line, "lost" if mirror["state"] == "lost" else ""
        else:
            yield "no mirrors", ""
        if len(mirrors) < all_mirrors:
            yield f"and {all_mirrors - len(mirrors):,} more", ""
        for heads, rows, style in (
            (PENDING_HEADS, [*map(_pending_row, waiting)], "waits"),
            (CALL_HEADS, [*map(_call_row, calls)], ""),
        ):
            if rows:
                yield "", ""
                heading, *lines = table_lines(heads, rows, width)
                yield heading, "heading"
                yield from ((line, style) for line in lines)


def _busiest(mirrors: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Those that owe most and then those that hear most, in the order in which they were."""
    order = heapq.nlargest(
        count, range(len(mirrors)), key=lambda index: (mirrors[index]["owed"], mirrors[index]["events_per_second"])
    )
    return [mirrors[index] for index in sorted(order)]


def _mirror_row(row: dict[str, Any]) -> tuple[object, ...]:
    return (
        row["device"],
        str(row["mirror"]),
        row["driver"] or "-",
        str(row["pid"] or "-"),
        row["state"],
        row["entries"],
        row["owed"],
        *(f"{row[f'{name}_per_second']:,.0f}" for name in ("events", "faults", "pages", "retries")),
        *(size(round(row[f"bytes_{name}_per_second"])) for name in ("read", "written")),
        f"{row['denied_per_second']:,.0f}",
        *(latency(row[f"acknowledgement_{name}_us"]) for name in ("p50", "p99")),
    )


def _call_row(row: dict[str, Any]) -> tuple[object, ...]:
    return row["call"], f"{row['per_second']:,.1f}", row["in_all"], row["pending"]


def _pending_row(row: dict[str, Any]) -> tuple[object, ...]:
    call = f"{row['call']} {row['operation_id']}"
    return call, row["caller"] or "-", f"{row['age_ms'] / 1000:.1f} s", row["waits_for"]


def _waits_for(operation: inspection_pb2.PendingOperation) -> str:
    if not operation.events:
        return operation.waits_for
    event = operation.events[0]
    more = f" and {len(operation.events) - 1} more" if len(operation.events) > 1 else ""
    kind = word(types_pb2.EventType.DESCRIPTOR, event.type)
    who = event.driver_name or "its driver"
    left = f", {event.deadline_ms / 1000:.1f} s left" if event.HasField("deadline_ms") else ""
    return f"{who}: {kind} #{event.event_sequence} of mirror {event.mirror_id}{more}{left}"


@click.command("top")
@click.option(
    "--interval",
    "-i",
    type=click.FloatRange(min=0.1),
    default=1.0,
    metavar="SECONDS",
    help="Time between two readings.  [default: 1]",
)
@click.option("--once", is_flag=True, help="Print one page and end, on a terminal too.")
@format_option
@where_options
def command(interval: float, once: bool, form: str, where: Where) -> None:
    """Show what happens now: mirrors, calls and who waits, as rates.

    On a terminal until Ctrl-C; elsewhere, and with --once, one page about one interval.  With --format json one page a
    line.  A low terminal shows the busiest mirrors, a narrow one the most telling columns.

    OWED is how many events a driver has not answered; ACK is the time from sending an event to its answer, since the
    mirror was registered.
    """
    live = form != JSON and not once and sys.stdout.isatty()
    endless = live or (form == JSON and not once)

    async def read(client: Client) -> Reading:
        async with asyncio.timeout(where.timeout_s):
            return await Reading.take(client)

    async def show(client: Client) -> None:
        before = await read(client)
        with _Screen(live) as screen:
            while True:
                await asyncio.sleep(interval)
                after = await read(client)
                page = Page(before, after)
                if form == JSON:
                    print_json(page.value())
                    sys.stdout.flush()
                else:
                    screen.show(page)
                if not endless:
                    return
                before = after

    try:
        ask(where, show, limited=False)
    except SystemExit as end:
        raise SystemExit(OK if end.code == 130 else end.code) from None


class _Screen:
    """Where pages are shown: the whole terminal, or standard output."""

    def __init__(self, live: bool) -> None:
        self._live: Any = None
        if live:
            from rich.live import Live  # noqa: PLC0415 - not needed where no terminal is

            self._live = Live(screen=True, auto_refresh=False)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, page: Page) -> None:
        """Show a page."""
        if self._live is None:
            for line, _ in page.text(shutil.get_terminal_size().columns if sys.stdout.isatty() else None):
                click.echo(line)
            return
        from rich.text import Text  # noqa: PLC0415 - not needed where no terminal is

        drawn = Text(no_wrap=True, overflow="ellipsis")
        for line, style in page.text(*shutil.get_terminal_size()):
            drawn.append(f"{line}\n", STYLES.get(style, style))
        self._live.update(drawn, refresh=True)
