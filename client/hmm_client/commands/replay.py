"""`hmmctl replay`: replay recorded programs while devices mirror them.

**Absent**: replaying (`hmm_client.replay`), the devices (`hmm_client.replay_devices`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from hmm_client.commands.connection import OK, UNEXPECTED, UNUSABLE, Where, failures, run, where_options
from hmm_client.commands.output import JSON, counted, format_option, latency, print_json, print_pairs, print_table
from hmm_client.commands.progress import Progress
from hmm_client.embedded import embedded_daemon
from hmm_client.recordings import Recording, RecordingError, demo_folder
from hmm_client.replay import Replayed, replay
from hmm_client.replay_contents import NoDevices, Stamping, compare_contents
from hmm_client.replay_devices import DeviceReport, ReplayDevices

DEVICES = 2
MIGRATE_PAGES = 64
PATIENCE = {"acknowledgement_s": 30.0, "fault_s": 30.0}
"""Settings of a daemon of our own: a slow machine is no hanging device."""
FRAMES = 1 << 24
"""Memory of a daemon of our own, in pages: programs populate and lock a lot of it.  Unused pages cost nothing."""
SHOWN = 10
UNKNOWN = "Unknown calls, not replayed"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One recording, replayed.

    Attributes:
        contents: where the program's memory ended otherwise than without devices; only looked at when pages migrate
            or memory is small.
    """

    replayed: Replayed
    devices: list[DeviceReport]
    seconds: float
    contents: tuple[str, ...] = ()

    @property
    def violations(self) -> list[str]:
        """Of all devices."""
        return [*self.contents, *(what for device in self.devices for what in device.violations)]

    @property
    def events(self) -> Counter[str]:
        """Of all devices, by type."""
        return sum((device.events for device in self.devices), Counter())

    @property
    def good(self) -> bool:
        """Nothing differs, nothing was violated."""
        return not self.replayed.differences and not self.violations


@click.command("replay")
@click.argument("folders", metavar="[DIR]...", nargs=-1, type=click.Path())
@click.option(
    "--devices",
    type=click.IntRange(min=0, max=8),
    default=DEVICES,
    metavar="N",
    show_default=True,
    help="How many devices mirror the program.",
)
@click.option("--migrate", is_flag=True, help="Let devices move the program's pages to their own memory and back.")
@click.option(
    "--device-pages",
    type=click.IntRange(min=1, max=1 << 16),
    default=MIGRATE_PAGES,
    metavar="N",
    show_default=True,
    help="With --migrate: how many pages of memory each device has.",
)
@click.option(
    "--memory",
    type=click.IntRange(min=64),
    metavar="PAGES",
    help="Replay with so little system memory, in a daemon of its own; with --swap.",
)
@click.option("--swap", type=click.IntRange(min=1), metavar="PAGES", help="With --memory: how many pages of swap.")
@format_option
@where_options
def command(
    folders: tuple[str, ...],
    devices: int,
    migrate: bool,
    device_pages: int,
    memory: int | None,
    swap: int | None,
    form: str,
    where: Where,
) -> None:
    """Replay recorded programs while devices mirror them.

    DIR holds strace.log, maps.initial and maps.final, as `hmmctl record` makes them; without DIR a small recording
    that comes along is taken.  Every memory call of the program and its children is made on the daemon, while each
    device faults pages in ahead of the program and behind it, reads and writes them, and answers every update.  In
    the end the first process's mappings must be those of the kernel.

    With --migrate the program is replayed twice, writing to its memory: once without devices, and once with devices
    that move its private pages to their own memory and back, one in two carrying the bytes themselves.  Whatever it
    reads in the end must be the same.

    With --memory and --swap it is replayed twice as well: in a daemon with all the memory it wants, and in one
    that has so little that pages go to swap and come back.

    Without --target a daemon is started for the purpose.

    Exit codes: 0 as recorded; 1 differences or violations; 2 unusable input, with all other recordings replayed; 3 no
    daemon can be reached.
    """
    if bool(memory) != bool(swap) or (memory and where.target):
        raise click.UsageError("--memory and --swap belong together, and go without --target")
    recordings = list(_usable(folders or (demo_folder(),)))
    with failures(where), ExitStack() as stack:
        if not recordings:
            raise SystemExit(UNUSABLE)
        target = where.target or stack.enter_context(embedded_daemon(frames=FRAMES, **PATIENCE))
        small = target
        if memory and swap:
            small = stack.enter_context(embedded_daemon(frames=memory, swap_pages=swap, **PATIENCE))
        outcomes = []
        for recording in recordings:
            outcomes.append(run(_replay(recording, where, (target, small), devices, device_pages if migrate else 0)))
            if form == JSON:
                print_json(_as_json(outcomes[-1]))
                _print_some(f"{recording.program}: {UNKNOWN}", outcomes[-1].replayed.unknown, err=True)
            else:
                _print(outcomes[-1])
    if len(outcomes) < max(1, len(folders)):
        raise SystemExit(UNUSABLE)
    raise SystemExit(OK if all(outcome.good for outcome in outcomes) else UNEXPECTED)


def _usable(folders: Iterable[Path | str]) -> Iterator[Recording]:
    """The recordings that can be replayed; of the others it is said why they cannot."""
    for folder in folders:
        try:
            recording = Recording.load(folder)
            recording.require_comparable()
        except RecordingError as error:
            click.echo(f"hmmctl: {error}", err=True)
        else:
            yield recording


async def _replay(
    recording: Recording, where: Where, targets: tuple[str, str], count: int, memory_pages: int
) -> Outcome:
    """Replay in the second of two daemons; if that could change contents, in the first one too, for comparison."""
    began = time.monotonic()
    contents: list[str] = []
    roomy, target = targets
    twice = memory_pages > 0 or roomy != target
    with Progress(recording.program, len(recording.plan.steps) * (2 if twice else 1)) as progress:
        async with (
            where.connect(roomy, name=f"replay {recording.program} alone") as undisturbed,
            where.connect(target, name=f"replay {recording.program}") as client,
            ReplayDevices(lambda name: where.connect(target, name=name), count, memory_pages) as devices,
        ):
            if twice:
                alone, among = Stamping(undisturbed, NoDevices()), Stamping(client, devices)
                await replay(recording, undisturbed, alone, progress.advance)
                replayed = await replay(recording, client, among, progress.advance)
                contents = compare_contents(alone.contents, among.contents)
            else:
                replayed = await replay(recording, client, devices, progress.advance)
    return Outcome(replayed, devices.reports, time.monotonic() - began, tuple(contents))


# ---- the report


def _as_json(outcome: Outcome) -> dict[str, Any]:
    replayed = outcome.replayed
    return {
        "program": replayed.program,
        "calls": replayed.calls,
        "vmas": replayed.vmas,
        "differences": replayed.differences,
        "placements": len(replayed.placed),
        "faults": sum(device.faults for device in outcome.devices),
        "events": outcome.events.total(),
        "violations": len(outcome.violations),
    }


def _print(outcome: Outcome) -> None:
    replayed = outcome.replayed
    processes = counted(replayed.processes, "process", "processes")
    click.echo(f"{replayed.program}: {counted(replayed.calls, 'call')} of {processes}")
    click.echo()
    moved = any(device.migrated for device in outcome.devices)
    heads = ["device", ">faults", ">pages", ">refused", ">checked", ">written", *([">moved"] if moved else [])]
    heads += [">events", ">ack p50", ">ack p99"]
    print_table(heads, [_row(device, moved) for device in outcome.devices], spare=("moved",), empty="no devices")
    click.echo()
    print_table(("event", ">count"), sorted(outcome.events.items()), empty="no events")
    click.echo()
    print_pairs(
        {
            "final mappings": f"{replayed.vmas}, "
            + ("equal to the kernel's /proc/PID/maps" if not replayed.layout else f"{len(replayed.layout)} different"),
            "placements": f"{counted(len(replayed.placed), 'mapping')} would have gone elsewhere",
            "differences": replayed.differences,
            "violations": len(outcome.violations),
            "unknown calls": len(replayed.unknown),
            "time": f"{outcome.seconds:.1f} s",
        }
    )
    for heading, items in (
        ("Calls that ended otherwise", replayed.outcomes),
        ("Mappings that differ", replayed.layout),
        ("Violations", outcome.violations),
        (UNKNOWN, replayed.unknown),
        ("Mappings that would have gone elsewhere", replayed.placed),
    ):
        _print_some(heading, [str(item) for item in items])


def _row(device: DeviceReport, moved: bool) -> tuple[object, ...]:
    median, tail = device.acknowledged_us
    return (
        device.name,
        device.faults,
        device.pages,
        device.refused,
        device.checks,
        f"{device.bytes_written:,} B",
        *([device.migrated] if moved else []),
        device.events.total(),
        latency(median),
        latency(tail),
    )


def _print_some(heading: str, items: list[str], *, err: bool = False) -> None:
    if items:
        click.echo(f"\n{heading}:", err=err)
    for item in items[:SHOWN]:
        click.echo(f"  {item}".replace("\n", "\n  "), err=err)
    if len(items) > SHOWN:
        click.echo(f"  and {len(items) - SHOWN:,} more", err=err)
