"""hmmctl as a process of its own, on a daemon with a driver that owes an answer."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import hmm_client
from hmm_client import AddressRange, Driver, Event, Mirror, Process, Prot
from hmm_client.embedded import EmbeddedDaemon
from hmm_client.scenario import library

if TYPE_CHECKING:
    from tests.conftest import Daemon

DATA = Path(__file__).parents[1] / "client" / "data"
TIMEOUT_S = 60.0
"""Far more than anything takes; a busy machine is no failure."""
PAUSE_S = 0.01
"""Between two changes of something that is watched, or will be soon."""


@dataclass
class Done:
    """A command that has ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def values(self) -> list[Any]:
        """Every line of its output as JSON."""
        return [json.loads(line) for line in self.stdout.splitlines()]

    @property
    def value(self) -> Any:
        """Its only line of output as JSON."""
        (value,) = self.values
        return value


async def hmmctl(*arguments: object, environment: dict[str, str] | None = None) -> Done:
    """Run a command to its end, with more in its environment."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hmm_client.cli", *map(str, arguments)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | (environment or {}),
    )
    stdout, stderr = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    assert process.returncode is not None
    return Done(process.returncode, stdout.decode(), stderr.decode())


class Holding(Driver):
    """Answers updates only after `go_on` is set; `reached`: one has come."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.reached = asyncio.Event()

    async def update(self, event: Event) -> None:
        """Wait, but not after faults."""
        if not event.is_fault:
            self.reached.set()
            await self.go_on.wait()


@dataclass
class Mirrored:
    """A process of four pages, whose first two a device mirrors."""

    process: Process
    span: AddressRange
    mirror: Mirror
    driver: Holding

    @asynccontextmanager
    async def stuck(self) -> AsyncIterator[None]:
        """While this lasts, munmap of the first page waits for the device."""
        unmapping = asyncio.create_task(self.process.munmap(self.span.start, 4096))
        await self.driver.reached.wait()
        yield
        self.driver.go_on.set()
        await unmapping


@pytest.fixture
async def mirrored(daemon: Daemon) -> Mirrored:
    """A process, and a device whose driver answers when it is told to."""
    process = await daemon.connect("program").create_process("demo")
    mapped = await process.mmap(4 * 4096)
    await process.write(mapped.address, b"x" * 8192)
    driver = Holding()
    device = await daemon.connect("gpu driver").register_device("gpu")
    mirror = await device.mirror(process, driver)
    await mirror.fault(AddressRange(mapped.address, mapped.address + 8192), write=True)
    return Mirrored(process, mapped.span, mirror, driver)


async def test_ps_lists_what_exists_when_asked(daemon: Daemon, mirrored: Mirrored) -> None:
    """Processes with their mirrors, devices with their drivers; as a table and as JSON."""
    value = (await hmmctl("ps", "-t", daemon.target, "--format", "json")).value
    (process,), (device,) = value["processes"], value["devices"]
    assert (process["process_id"], process["name"], process["resident_pages"]) == (mirrored.process.id, "demo", 2)
    assert process["mirror_ids"] == [mirrored.mirror.id]
    (mirror,) = device["mirrors"]
    assert (device["name"], mirror["state"], mirror["entry_count"]) == ("gpu", "live", 2)
    assert (mirror["driver_name"], mirror["policy"]) == ("gpu driver", "FENCE")
    text = (await hmmctl("ps", "-t", daemon.target)).stdout
    assert "demo" in text
    assert "gpu driver (pid" in text


async def test_ps_says_below_why_a_mirror_was_lost(daemon: Daemon, mirrored: Mirrored) -> None:
    """The table says that it is lost; the reason is a sentence of its own."""
    await mirrored.mirror.device.client.close()
    text = (await hmmctl("ps", "-t", daemon.target)).stdout.splitlines()
    assert text[-1].startswith(f"mirror {mirrored.mirror.id} is lost: stream ")
    assert not any("stream" in line for line in text[:-1])


async def test_maps_looks_like_the_kernels_when_printed(daemon: Daemon, mirrored: Mirrored) -> None:
    """The text is that of /proc/PID/maps."""
    done = await hmmctl("maps", mirrored.process.id, "-t", daemon.target)
    span = mirrored.span
    assert done.stdout == f"{span.start:08x}-{span.end:08x} rw-p 00000000 00:00 0 \n"
    value = (await hmmctl("maps", mirrored.process.id, "-t", daemon.target, "--format", "json")).value
    assert (value["start"], value["end"], value["resident_pages"]) == (span.start, span.end, 2)


async def test_smaps_looks_like_the_kernels_when_printed(daemon: Daemon, mirrored: Mirrored) -> None:
    """The text is that of /proc/PID/smaps, in kilobytes; JSON has bytes."""
    done = await hmmctl("smaps", mirrored.process.id, "-t", daemon.target)
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{mirrored.span.start:08x}-{mirrored.span.end:08x} rw-p")
    assert "Rss:                   8 kB" in lines
    assert lines[-1].startswith("VmFlags: rd wr mr mw me ac")
    value = (await hmmctl("smaps", mirrored.process.id, "-t", daemon.target, "--format", "json")).value
    assert (value["start"], value["rss"], value["swap"]) == (mirrored.span.start, 8192, 0)
    value = (await hmmctl("smaps", mirrored.process.id, "--rollup", "-t", daemon.target, "--format", "json")).value
    assert value["rss"] == 8192


async def test_pagemap_joins_pages_that_are_alike(daemon: Daemon, mirrored: Mirrored) -> None:
    """Two pages with frames, and nothing behind the rest; after clear_refs none counts as written."""
    where = f"{mirrored.span.start:x}-{mirrored.span.end:x}"
    arguments = ("pagemap", mirrored.process.id, where, "-t", daemon.target, "--format", "json")
    first = (await hmmctl(*arguments)).values[0]
    assert (first["start"], first["end"]) == (mirrored.span.start, mirrored.span.start + 8192)
    assert first["flags"] == ["present", "exclusive", "soft-dirty"]
    assert first["frame"] > 0
    mirrored.driver.go_on.set()
    await mirrored.process.clear_refs(4)
    assert (await hmmctl(*arguments)).values[0]["flags"] == ["present", "exclusive"]
    assert "present exclusive" in (await hmmctl(*arguments[:-2])).stdout


async def test_pagemap_shows_what_is_mapped_when_no_range_is_given(daemon: Daemon, mirrored: Mirrored) -> None:
    """All of the address space is looked at, in parts, and a line goes on where a part ends."""
    large = await mirrored.process.mmap(1 << 33, Prot.NONE, address=1 << 40)
    lines = (await hmmctl("pagemap", mirrored.process.id, "-t", daemon.target, "--format", "json")).values
    assert [(line["start"], line["end"]) for line in lines] == [
        (1 << 40, (1 << 40) + large.length),
        (mirrored.span.start, mirrored.span.start + 8192),
        (mirrored.span.start + 8192, mirrored.span.end),
    ]
    elsewhere = await hmmctl("pagemap", mirrored.process.id, "1000-2000", "-t", daemon.target)
    assert (elsewhere.code, elsewhere.stdout) == (0, "nothing is mapped there\n")


async def test_pagemap_says_how_far_it_has_come(daemon: Daemon, mirrored: Mirrored) -> None:
    """On a terminal, where a process has so much mapped that it takes long; nothing of it is in the output."""
    terminal, its_end = os.openpty()
    command = ("-m", "hmm_client.cli", "pagemap", str(mirrored.process.id), "-t", daemon.target)
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, stdout=asyncio.subprocess.PIPE, stderr=its_end
    )
    os.close(its_end)
    shown, _ = await process.communicate()
    said = os.read(terminal, 1 << 16)
    os.close(terminal)
    assert process.returncode == 0
    assert b"pagemap" in said
    assert shown.decode().splitlines()[0].split() == ["pages", "start", "end", "frame", "flags"]


@pytest.mark.parametrize("whose", ["mirror", "cpu"])
async def test_pagetable_draws_a_tree_when_there_are_entries(daemon: Daemon, mirrored: Mirrored, whose: str) -> None:
    """Four levels, one directory each, two entries; a range without entries shows none."""
    number = [mirrored.mirror.id] if whose == "mirror" else [mirrored.process.id, "--cpu"]
    lines = (await hmmctl("pagetable", *number, "-t", daemon.target)).stdout.splitlines()
    assert lines[0].endswith("4 levels, 4 directories, 2 entries")
    assert [line[0] for line in lines[1:]] == ["0", "└", " ", " "]
    assert lines[-1].endswith("  2")
    outside = f"{mirrored.span.start - (4 << 20):x}-{mirrored.span.start - (2 << 20):x}"
    assert (await hmmctl("pagetable", *number, outside, "-t", daemon.target, "--format", "json")).values == []


async def test_walk_shows_each_table_when_a_page_is_mirrored(daemon: Daemon, mirrored: Mirrored) -> None:
    """The CPU and the mirror reach the same frame through tables of their own."""
    arguments = ("walk", mirrored.process.id, f"{mirrored.span.start:x}", "-t", daemon.target)
    cpu, mirror = (await hmmctl(*arguments, "--format", "json")).value["walks"]
    assert len(cpu["steps"]) == len(mirror["steps"]) == 4
    assert cpu["pfn"] == mirror["pfn"] > 0
    assert "write" in cpu["flags"].split()
    assert mirror["flags"] == "valid-pfn write"
    text = (await hmmctl(*arguments)).stdout
    assert f"frame {cpu['pfn']}  valid-pfn write" in text
    assert text.count("level 0") == 2


@pytest.mark.parametrize("daemon", [{"acknowledgement_s": 60.0}], indirect=True)
async def test_pending_names_the_driver_when_it_does_not_answer(daemon: Daemon, mirrored: Mirrored) -> None:
    """Who waits, for which event of which driver, and what happens when; exit code 1 with --check."""
    assert (await hmmctl("pending", "-t", daemon.target)).stdout == "nothing is pending\n"
    async with mirrored.stuck():
        done = await hmmctl("pending", "--check", "-t", daemon.target)
        value = (await hmmctl("pending", "-t", daemon.target, "--format", "json")).value
    assert done.code == 1
    assert "munmap" in done.stdout
    assert f"has not answered MUNMAP #2 of mirror {mirrored.mirror.id}: sent" in done.stdout
    assert "left, then fence" in done.stdout
    (operation,) = value["operations"]
    (event,) = operation["events"]
    assert (operation["name"], operation["caller"], event["driver_name"]) == ("munmap", "program", "gpu driver")


async def test_pending_names_the_handler_when_it_does_not_bring_a_page_in(daemon: Daemon, mirrored: Mirrored) -> None:
    """Who waits, for which page, and whether its handler knows; maps show what is registered."""
    program, pager = mirrored.process, daemon.connect("pager").process(mirrored.process.id)
    page = AddressRange(mirrored.span.start + 3 * 4096, mirrored.span.end)
    async with pager.userfaultfd() as uffd:
        await uffd.register(page)
        reading = asyncio.create_task(program.read(page.start, 1))
        await uffd.read()
        done = await hmmctl("pending", "-t", daemon.target)
        smaps = (await hmmctl("smaps", program.id, "-t", daemon.target)).stdout
    assert f"waits for the handler of userfaultfd {uffd.id} [{page.start:#x}, {page.end:#x})" in done.stdout
    assert "  pager has been told and has not brought it in" in done.stdout
    assert " um " in smaps
    assert await reading == b"\0"


async def test_watch_shows_event_and_answer_when_memory_is_unmapped(daemon: Daemon, mirrored: Mirrored) -> None:
    """One line for what is sent, one for its answer, one for the call that ends; then it has seen enough."""
    watching = asyncio.create_task(hmmctl("watch", "-o", "-n", 3, "-t", daemon.target, "--format", "json"))
    mirrored.driver.go_on.set()
    while not watching.done():  # it may begin to watch later than this begins to unmap
        mapped = await mirrored.process.mmap(4096)
        await mirrored.mirror.fault(mapped.span)
        await mirrored.process.munmap(mapped.address, 4096)
        await asyncio.sleep(PAUSE_S)
    done = await watching
    assert done.code == 0
    assert len(done.values) == 3
    assert all(value["time_ns"] > 0 for value in done.values)
    assert {"event", "settled", "operation"} >= {key for value in done.values for key in value} - {"time_ns"}


async def test_watch_says_that_the_daemon_has_gone_when_it_is_killed(tmp_path: Path) -> None:
    """A connection that breaks is told from a daemon that was never there."""
    daemon = EmbeddedDaemon(tmp_path, log=tmp_path / "log")
    watching = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hmm_client.cli", "watch", "-o", "-t", daemon.target),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert watching.stdout is not None
    async with hmm_client.connect(daemon.target) as client, asyncio.timeout(TIMEOUT_S):
        seen = asyncio.create_task(watching.stdout.readline())
        while not seen.done():
            await client.create_process()
            await asyncio.sleep(PAUSE_S)
        daemon.process.kill()
        _, errors = await watching.communicate()
    daemon.stop()
    assert watching.returncode == 3
    assert errors.decode() == f"hmmctl: the connection to {daemon.target} broke: the daemon has gone\n"


async def test_stats_counts_events_when_a_driver_has_answered(daemon: Daemon, mirrored: Mirrored) -> None:
    """Counters of the daemon and of the mirror, with the time an answer took."""
    mirrored.driver.go_on.set()
    await mirrored.process.munmap(mirrored.span.start, 4096)
    value = (await hmmctl("stats", "-t", daemon.target, "--format", "json")).value
    assert value["daemon"]["operations"]["munmap"] == 1
    (mirror,) = value["mirrors"]
    assert mirror["events_by_type"] == {"DEVICE_WFAULT": 1, "MUNMAP": 1}
    assert mirror["acknowledgement"]["count"] == 2
    text = (await hmmctl("stats", "-t", daemon.target)).stdout
    assert "in 1 address space\n" in text
    assert "ack p99" in text


async def test_kill_ends_processes_when_nobody_else_does(daemon: Daemon, mirrored: Mirrored) -> None:
    """Its mirrors hear of it and answer; what there is not is ESRCH, and those named before it have ended."""
    mirrored.driver.go_on.set()
    other = await daemon.connect().create_process("left behind")
    done = await hmmctl("kill", other.id, 99, "-t", daemon.target)
    assert (done.code, done.stdout) == (4, f"process {other.id} has ended\n")
    assert done.stderr.startswith("hmmctl: ESRCH: ")
    value = (await hmmctl("kill", mirrored.process.id, "-t", daemon.target, "--format", "json")).value
    assert value == {"process_id": mirrored.process.id, "fenced_mirrors": []}
    assert mirrored.mirror.released
    assert (await hmmctl("ps", "-t", daemon.target)).stdout.startswith("no processes\n")


@pytest.mark.parametrize("daemon", [{"acknowledgement_s": 0.5}], indirect=True)
async def test_kill_names_the_mirrors_that_did_not_answer(daemon: Daemon) -> None:
    """The end of a process waits for nobody for ever."""
    client = daemon.connect()
    process = await client.create_process("left behind")
    mapped = await process.mmap(4096)
    mirror = await (await client.register_device("gpu")).mirror(process, Holding(), fault_events=False)
    await mirror.fault(mapped.span)
    done = await hmmctl("kill", process.id, "-t", daemon.target)
    assert (done.code, done.stdout) == (0, f"process {process.id} has ended; fenced: mirror {mirror.id}\n")


async def test_health_is_its_exit_code_when_a_container_asks(daemon: Daemon, tmp_path: Path) -> None:
    """0 while it serves, 1 when nobody is there."""
    done = await hmmctl("health", "-t", daemon.target)
    assert (done.code, done.stdout) == (0, "serving\n")
    assert (await hmmctl("health", "-t", tmp_path / "no.sock")).code == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("maps", 1 << 30),
        ("smaps", 1 << 30),
        ("pagemap", 1 << 30, "0-1000"),
        ("walk", 1 << 30, "1000"),
        ("pagetable", 99999),
    ],
)
async def test_command_ends_with_four_when_the_daemon_refuses(
    shared_daemon: Daemon, arguments: tuple[object, ...]
) -> None:
    """What does not exist is told by the kernel's errno."""
    done = await hmmctl(*arguments, "-t", shared_daemon.target)
    assert done.code == 4
    assert done.stdout == ""
    assert done.stderr.startswith(("hmmctl: ESRCH: ", "hmmctl: ENODEV: "))


@pytest.mark.parametrize("migrating", [(), ("--migrate", "--device-pages", 8)], ids=["swap", "swap and migration"])
async def test_replay_reads_the_same_when_memory_is_small(migrating: tuple[object, ...]) -> None:
    """Pages go to swap and small devices, and come back: layout and contents are those with enough memory."""
    folder = DATA / "real-programs" / "true"
    done = await hmmctl("replay", *migrating, "--memory", 80, "--swap", 4000, "--format", "json", folder)
    assert done.code == 0
    assert (done.value["differences"], done.value["violations"]) == (0, 0)
    assert (await hmmctl("replay", "--memory", 80, folder)).code == 2


async def test_replay_prints_one_object_when_json_is_asked_for() -> None:
    """Without --target it starts a daemon of its own; one line per folder, all of it integers but the name."""
    folder = DATA / "real-programs" / "true"
    done = await hmmctl("replay", "--format", "json", folder, folder)
    assert done.code == 0
    assert len(done.values) == 2
    for value in done.values:
        assert list(value) == [
            "program",
            "calls",
            "vmas",
            "differences",
            "placements",
            "faults",
            "events",
            "violations",
        ]
        assert (value["program"], value["calls"], value["vmas"]) == ("true", 14, 19)
        assert value["differences"] == value["placements"] == value["violations"] == 0
        assert min(value["faults"], value["events"]) > 0


async def test_replay_reports_unknown_calls_when_json_is_asked_for(daemon: Daemon, tmp_path: Path) -> None:
    """Its object has no place for them, so they go to stderr: they are never dropped silently."""
    folder = shutil.copytree(DATA / "real-programs" / "true", tmp_path / "true")
    log = (folder / "strace.log").read_text().replace("brk(NULL)", "mnovel(NULL)", 1)
    (folder / "strace.log").write_text(log)
    done = await hmmctl("replay", "-t", daemon.target, "--format", "json", folder)
    assert len(done.values) == 1
    assert "true: Unknown calls, not replayed:" in done.stderr
    assert "mnovel(NULL)" in done.stderr


async def test_replay_replays_the_others_when_one_recording_is_unusable(daemon: Daemon, tmp_path: Path) -> None:
    """What is wrong with it stands on stderr with its place, and the exit code says that not all was replayed."""
    folder = DATA / "real-programs" / "true"
    arguments = (tmp_path, folder, "/nonexistent", "-t", daemon.target, "--devices", 0, "--format", "json")
    done = await hmmctl("replay", *arguments)
    assert done.code == 2
    assert [value["program"] for value in done.values] == ["true"]
    assert done.stderr.splitlines()[:2] == [
        f"hmmctl: {tmp_path}: not a recording: it has no strace.log and no maps.initial and no maps.final",
        "hmmctl: /nonexistent: no such folder",
    ]


async def test_replay_shows_tables_when_people_look(daemon: Daemon) -> None:
    """Devices, events by type, and that the mappings are the kernel's; nothing is left on the daemon."""
    done = await hmmctl("replay", DATA / "real-programs" / "true", "-t", daemon.target, "--devices", 3)
    assert done.code == 0
    assert all(name in done.stdout for name in ("gpu0", "gpu1", "gpu2", "MUNMAP", "equal to the kernel's"))
    assert (await hmmctl("ps", "-t", daemon.target, "--format", "json")).value["processes"] == []


@pytest.mark.slow
async def test_replay_has_room_when_a_program_locks_more_than_a_daemon_has(tmp_path: Path) -> None:
    """The daemon that replay starts has memory for programs of large machines; one by itself has 4 GiB."""
    folder = shutil.copytree(DATA / "real-programs" / "true", tmp_path / "true")
    log = (folder / "strace.log").read_text()
    end = next(line for line in log.splitlines() if " exit_group(" in line)
    start, length = 0x7000_0000_0000, 5 << 30
    calls = (
        f"mmap({start:#x}, {length}, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_FIXED|MAP_ANONYMOUS, -1, 0) = {start:#x}",
        f"mlock({start:#x}, {length}) = 0",
        f"munmap({start:#x}, {length}) = 0",
    )
    text = "\n".join(f"{end.split()[0]} {call}" for call in calls)
    (folder / "strace.log").write_text(log.replace(end, f"{text}\n{end}"))
    done = await hmmctl("replay", folder, "--devices", 0)
    assert done.code == 0, done.stdout


async def test_replay_ends_with_one_when_something_differs(tmp_path: Path) -> None:
    """A layout that is not the kernel's is a difference, and is shown."""
    folder = tmp_path / "true"
    folder.mkdir()
    for file in (DATA / "real-programs" / "true").iterdir():
        text = file.read_text()
        (folder / file.name).write_text(text.replace("[stack]", "/stack") if file.name == "maps.final" else text)
    done = await hmmctl("replay", folder)
    assert done.code == 1
    assert "Mappings that differ" in done.stdout
    assert "/stack" in done.stdout


@pytest.mark.parametrize("mode", ["own", "given"])
async def test_verify_finds_nothing_when_traces_go_through_a_daemon(
    start_daemon: Callable[..., Awaitable[Daemon]], mode: str
) -> None:
    """The daemon does what Linux did: the whole traces, with exactly the comparisons that are made in process."""
    target = ["-t", (await start_daemon()).target] if mode == "given" else []
    done = await hmmctl("verify", "--format", "json", DATA / "kernel-traces" / "fa", *target)
    assert done.code == 0
    assert done.value["traces"] == 2
    assert done.value["semantic"]["compared"] > 50
    assert done.value["semantic"]["differences"] == 0
    assert (
        done.value == (await hmmctl("verify", "--format", "json", "--in-process", DATA / "kernel-traces" / "fa")).value
    )


SCENARIO = """
title = "A driver that hangs is fenced, and munmap ends"
[daemon]
acknowledgement_s = 2.0
[processes.app]
[drivers.gpu]
mirrors = ["app"]
on_update = ["answer", "hang"]
[drivers.nic]
mirrors = ["app"]
[[steps]]
process = "app"
call = "mmap"
length = "4 pages"
as = "buffer"
[[steps]]
process = "app"
call = "write"
at = "buffer+0x10"
data = "hello"
[[steps]]
driver = "gpu"
call = "fault"
at = "buffer"
write = true
[[steps]]
driver = "gpu"
call = "read"
at = "buffer+0x10"
length = 5
expect.data = "hello"
[[steps]]
process = "app"
call = "mprotect"
at = "buffer"
length = 4096
prot = "r"
expect.events = { gpu = ["WRITE_PROTECT"], nic = ["WRITE_PROTECT"] }
[[steps]]
process = "app"
call = "munmap"
at = "buffer"
background = "unmap"
[[steps]]
pending = ["gpu"]
[[steps]]
wait = "unmap"
expect = { fenced = ["gpu"], events = { gpu = ["MUNMAP"], nic = ["MUNMAP"] } }
[[steps]]
driver = "gpu"
call = "read"
at = "buffer"
length = 1
expect.error = "ENODEV"
[[steps]]
process = "app"
call = "read"
at = "buffer"
length = 1
expect.signal = "SEGV_MAPERR"
"""


async def test_run_meets_all_expectations_when_a_driver_hangs(tmp_path: Path) -> None:
    """The driver that hangs is named by `pending`, fenced after its deadline, and refused from then on."""
    (tmp_path / "hang.toml").write_text(SCENARIO)
    done = await hmmctl("run", tmp_path / "hang.toml", "--format", "json")
    assert [step["wrong"] for step in done.values[:-2]] == [[]] * 10
    assert done.values[-1] == {"scenarios": 1, "failed": 0}
    assert {step["scenario"] for step in done.values[:-1]} == {"hang"}
    assert done.values[-2] == {
        "scenario": "hang", "title": "A driver that hangs is fenced, and munmap ends", "steps": 10, "failed": 0,
    }  # fmt: skip
    assert done.code == 0


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ('expect.data = "hello"', 'expect.data = "hullo"', "data b'hello' instead of b'hullo'"),
        ('fenced = ["gpu"]', 'fenced = ["nic"]', "fenced ['gpu'] instead of ['nic']"),
        ('nic = ["MUNMAP"]', 'nic = ["FORK"]', "nic heard ['MUNMAP'] instead of ['FORK']"),
        ('"ENODEV"', '"EIO"', "error ENODEV instead of EIO"),
        ('"SEGV_MAPERR"', '"SEGV_ACCERR"', "signal SEGV_MAPERR instead of SEGV_ACCERR"),
    ],
)
async def test_run_ends_with_one_when_an_expectation_is_not_met(tmp_path: Path, old: str, new: str, wrong: str) -> None:
    """Each kind of expectation can fail, and says what came instead."""
    assert old in SCENARIO
    (tmp_path / "hang.toml").write_text(SCENARIO.replace(old, new, 1))
    done = await hmmctl("run", tmp_path / "hang.toml")
    assert done.code == 1
    assert wrong in done.stdout
    assert "1 not as expected" in done.stdout


async def test_run_takes_every_scenario_when_it_is_told_to() -> None:
    """--all: one after the other, by name; Ctrl-C between two of them ends it."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hmm_client.cli", "run", "--all", "--format", "json"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    ended: list[str] = []
    while len(ended) < 3:
        value = json.loads(await asyncio.wait_for(process.stdout.readline(), TIMEOUT_S))
        ended += [value["scenario"]] if "title" in value else []
    process.send_signal(signal.SIGINT)
    _, said = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    assert ended == library.names()[:3]
    assert (process.returncode, said) == (130, b"")


async def test_command_ends_in_good_order_when_its_output_is_closed(shared_daemon: Daemon) -> None:
    """Nobody reads what it says, and no socket gets the number of the descriptor that is free."""
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", 'exec "$0" "$@" >&-', sys.executable, "-m", "hmm_client.cli", "ps", "-t", shared_daemon.target),
        stderr=asyncio.subprocess.PIPE,
    )
    assert (await asyncio.wait_for(process.communicate(), TIMEOUT_S))[1] == b""
    assert process.returncode == 0


@pytest.mark.parametrize(("flags", "shown"), [((), True), (("--steps",), True), (("--no-steps",), False)])
async def test_run_shows_steps_when_it_is_told_to(tmp_path: Path, flags: tuple[str, ...], shown: bool) -> None:
    """Each on a line; without, the scenario has a line."""
    path = tmp_path / "one.toml"
    path.write_text('title = "one"\n[processes.app]\n[[steps]]\nprocess = "app"\ncall = "exit"\n')
    done = await hmmctl("run", path, *flags)
    assert done.code == 0
    assert ("ok   line   3  app exit" in done.stdout) == shown
    assert done.stdout.splitlines()[0].startswith("one" if shown else "ok   one ")
