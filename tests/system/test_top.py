"""hmmctl top and hmmctl sanitize: what happens now, and what devices did that they must not."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from hmm.errors import BadAddressError
from hmm_client import Driver, Event, Mirror, Process
from hmm_client.commands.top import MIRROR_HEADS, Page, Reading
from hmm_proto.v1 import inspection_pb2

if TYPE_CHECKING:
    from tests.conftest import Daemon

pytestmark = pytest.mark.slow

TIMEOUT_S = 60.0
"""Far more than anything takes; a busy machine is no failure."""
PAGE = 4096


class Gate(Driver):
    """Answers events while it is open."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.reached = asyncio.Event()

    async def update(self, event: Event) -> None:
        """Wait at the gate."""
        self.reached.set()
        await self.open.wait()


class Traffic:
    """A program whose munmap waits for a driver."""

    def __init__(self, process: Process, mirror: Mirror, gate: Gate, unmapping: asyncio.Task[object]) -> None:
        self.target = process.client.channel.target
        self.process = process
        self.mirror = mirror
        self.gate = gate
        self.unmapping = unmapping


@pytest.fixture
async def traffic(start_daemon: Callable[..., Awaitable[Daemon]]) -> AsyncIterator[Traffic]:
    """One call that waits for `gpu0`, and some that have ended."""
    daemon = await start_daemon()
    process = await daemon.connect("program").create_process("victim")
    mapped = await process.mmap(4 * PAGE)
    gate = Gate()
    device = await daemon.connect("gpu driver").register_device("gpu0")
    mirror = await device.mirror(process, gate, fault_events=False)
    await mirror.fault(mapped.span, write=True)
    gate.open.clear()
    unmapping = asyncio.create_task(process.munmap(mapped.address, PAGE))
    await gate.reached.wait()
    yield Traffic(process, mirror, gate, unmapping)
    gate.open.set()
    await unmapping


async def hmmctl(*arguments: str) -> tuple[int, str]:
    """Run a command to its end: exit code and standard output."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hmm_client.cli", *arguments), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    assert process.returncode is not None
    return process.returncode, out.decode()


async def test_top_prints_one_page_where_no_terminal_is(traffic: Traffic) -> None:
    """Mirrors, calls, and who waits for whom."""
    code, out = await hmmctl("top", "-t", traffic.target, "--interval", "0.2")
    assert code == 0
    head, calls, _, heads, mirror, *rest = out.splitlines()
    assert head.startswith("hmmd ")
    assert "1 pending" in calls
    assert heads.split()[: len(MIRROR_HEADS)][:3] == ["device", "mirror", "driver"]
    assert mirror.split()[:3] == ["gpu0", str(traffic.mirror.id), "gpu"]
    waiting = rest[2]
    assert waiting.startswith("munmap ")
    assert "gpu driver: MUNMAP #1 of mirror 1" in waiting


async def test_top_prints_pages_in_json_until_it_is_interrupted(traffic: Traffic) -> None:
    """One value a line; Ctrl-C is the way to end it and no failure."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hmm_client.cli", "top", "-t", traffic.target, "-i", "0.1", "--format", "json"),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    pages = [json.loads(await asyncio.wait_for(process.stdout.readline(), TIMEOUT_S)) for _ in range(3)]
    process.send_signal(signal.SIGINT)
    await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    assert process.returncode == 0
    for page in pages:
        (mirror,) = page["mirrors"]
        assert (mirror["device"], mirror["state"], mirror["owed"]) == ("gpu0", "live", 1)
        assert page["pending"][0]["call"] == "munmap"
    assert pages[0]["pending"][0]["age_ms"] < pages[2]["pending"][0]["age_ms"]


def drain(terminal: int) -> None:
    """Read what is written to a terminal until its other end is closed, which is EIO."""
    with suppress(OSError):
        while os.read(terminal, 1 << 16):
            pass


async def test_top_prints_one_page_on_a_terminal_when_it_is_told_to(traffic: Traffic) -> None:
    """With --once it ends by itself where it would go on."""
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hmm_client.cli", "top", "--once", "-t", traffic.target, "-i", "0.1"),
        stdout=theirs,
        env=os.environ | {"TERM": "xterm-256color"},
    )
    os.close(theirs)
    draining = asyncio.to_thread(drain, ours)
    await asyncio.wait_for(asyncio.gather(process.wait(), draining), TIMEOUT_S)
    os.close(ours)
    assert process.returncode == 0


async def test_top_draws_itself_anew_on_a_terminal(traffic: Traffic) -> None:
    """A screen of its own, drawn again and again, left behind as it was at Ctrl-C."""
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hmm_client.cli", "top", "-t", traffic.target, "-i", "0.1"),
        stdout=theirs,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "180", "LINES": "40"},
    )
    os.close(theirs)
    seen = b""
    async with asyncio.timeout(TIMEOUT_S):
        while seen.count(b"gpu0") < 3:
            seen += await asyncio.to_thread(os.read, ours, 1 << 16)
    process.send_signal(signal.SIGINT)
    draining = asyncio.to_thread(drain, ours)  # who cannot write does not end
    await asyncio.wait_for(asyncio.gather(process.wait(), draining), TIMEOUT_S)
    assert process.returncode == 0
    os.close(ours)
    assert b"\x1b[?1049h" in seen  # the alternate screen
    assert b"munmap" in seen


def page_of(mirrors: int) -> Page:
    """What happened on a daemon with so many mirrors, of which the last is the busiest."""
    statistics = inspection_pb2.GetStatisticsResponse()
    statistics.daemon.operations["fault"] = 0
    device = inspection_pb2.DeviceStatus(name="a device with a long name")
    for number in range(1, mirrors + 1):
        statistics.mirrors.add(mirror_id=number, events_by_type={"MUNMAP": 1_000 * (number == mirrors)})
        device.mirrors.add(mirror_id=number, state="live", driver_name="driver", driver_pid=4711)
    devices = inspection_pb2.ListDevicesResponse(devices=[device])
    pending = inspection_pb2.GetPendingResponse()
    pending.operations.add(name="munmap", operation_id=7, waits_for="something that takes many words to say" * 3)
    before = Reading(0.0, inspection_pb2.GetStatisticsResponse(), devices, pending)
    return Page(before, Reading(1.0, statistics, devices, pending))


@pytest.mark.parametrize(("width", "height"), [(80, 24), (100, 40), (200, 24)])
def test_top_fits_the_terminal_when_there_are_many_mirrors(width: int, height: int) -> None:
    """Who waits is on the page however many mirrors there are, and the busiest of them are."""
    lines = [line for line, _ in page_of(256).text(width, height)]
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    assert any(line.startswith("munmap 7") for line in lines)
    shown = [line for line in lines if "  driver  " in line][1:]
    assert "  256  " in shown[-1]
    assert f"and {256 - len(shown)} more" in lines


def test_top_shows_everything_when_no_terminal_is() -> None:
    """What goes to a file is neither cut nor picked."""
    lines = [line for line, _ in page_of(256).text()]
    assert sum("4711" in line for line in lines) == 256
    assert lines[3].split()[: len(MIRROR_HEADS)][:4] == ["device", "mirror", "driver", "pid"]


async def test_sanitize_says_what_the_device_did_and_who_had_taken_its_page(traffic: Traffic) -> None:
    """For people and for gates."""
    traffic.gate.open.set()
    await traffic.unmapping
    assert await hmmctl("sanitize", "-t", traffic.target, "--check") == (0, "no violations\n")
    (line,) = (await traffic.process.maps()).lines
    gone = line.start - PAGE
    with pytest.raises(BadAddressError) as caught:
        await traffic.mirror.write([(gone, 1)], b"x")
    assert caught.value.violation is not None
    code, out = await hmmctl("sanitize", "-t", traffic.target, "--check")
    assert code == 1
    assert out.splitlines()[0] == f"mirror {traffic.mirror.id} (gpu0, driver gpu driver)"
    assert "1 x use after invalidation" in out
    assert f"write at {gone:#x}" in out
    assert "for munmap" in out
    assert "acknowledged by gpu driver (pid" in out
    code, out = await hmmctl("sanitize", "-t", traffic.target, "--mirror", "77", "--format", "json", "--check")
    assert (code, json.loads(out)["mirrors"]) == (0, [])
    device = traffic.mirror.device.id
    for option, number, found in (("--device", device, 1), ("-d", device + 1, 0), ("-m", traffic.mirror.id, 1)):
        assert (await hmmctl("sanitize", "-t", traffic.target, option, str(number), "--check"))[0] == found
