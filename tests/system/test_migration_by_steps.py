"""Drivers, as processes of their own, that die, stop or hang between two steps of a migration.

Whatever happens to them nothing is lost, and whoever waits goes on, at the latest when the migration's lease ends.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hmm.mremap import MremapFlag
from hmm.units import PAGE_SIZE
from hmm_client import Client, Process
from hmm_client.results import Mapped
from hmm_proto.v1 import inspection_pb2

if TYPE_CHECKING:
    from tests.conftest import Daemon
    from tests.system.conftest import DriverProcess

pytestmark = pytest.mark.slow

PAGES = 4
TIMEOUT_S = 60.0
"""Far more than anything takes; a busy machine is no failure."""
STEPPING = Path(__file__).with_name("stepping_driver.py")
LEASE_S = 0.5
"""Of drivers that take no step at all."""

StartDaemon = Callable[..., Awaitable["Daemon"]]
StartDriver = Callable[..., Awaitable["DriverProcess"]]


class Scene:
    """A program with four pages, the last one a hole, and a driver that has taken some steps of moving them."""

    def __init__(self, daemon: Daemon, process: Process, mapped: Mapped, driver: DriverProcess) -> None:
        self.daemon = daemon
        self.process = process
        self.mapped = mapped
        self.driver = driver

    @property
    def client(self) -> Client:
        """The program's."""
        return self.process.client

    async def begin(self, *, fills: bool) -> None:
        """Begin a migration; `fills`: up to the step before the last, again as long as its lease ends before."""
        await self.driver.call("attach", process=self.process.id)
        while True:
            assert await self.driver.call("setup", start=self.mapped.address, end=self.mapped.span.end)
            if not fills or await self.driver.call("fill"):
                return

    async def pending(self) -> inspection_pb2.GetPendingResponse:
        """Who waits for whom."""
        ask, nothing = self.client.inspection.GetPending, inspection_pb2.GetPendingRequest()
        answer: inspection_pb2.GetPendingResponse = await self.client.channel.request(ask, nothing)
        return answer

    async def until(self, holds: Callable[[inspection_pb2.GetPendingResponse], Any]) -> Any:
        """Wait until something holds of what is pending.  Returns: what that says."""
        async with asyncio.timeout(TIMEOUT_S):
            while not (said := holds(await self.pending())):
                pass
        return said

    async def until_waiting(self, name: str) -> inspection_pb2.PendingOperation:
        """Wait until a call of that name waits."""
        found = await self.until(lambda answer: [one for one in answer.operations if one.name == name])
        waiting: inspection_pb2.PendingOperation = found[0]
        return waiting

    async def require_nothing_lost(self) -> None:
        """The pages hold what they held, whoever has them now."""
        assert await self.process.read(self.mapped.address, PAGES * PAGE_SIZE) == contents()


def contents() -> bytes:
    """What the program has written."""
    return b"".join(bytes([1 + page]) * PAGE_SIZE for page in range(PAGES - 1)) + bytes(PAGE_SIZE)


@pytest.fixture
async def set_up(start_daemon: StartDaemon, start_stepping: StartDriver) -> Callable[..., Awaitable[Scene]]:
    """Makes scenes, on a patient daemon unless told otherwise."""

    async def make(*, fills: bool = False, **settings: object) -> Scene:
        daemon = await start_daemon(**settings)
        driver = await start_stepping(daemon)
        process = await daemon.connect("program").create_process("program")
        mapped = await process.mmap(PAGES * PAGE_SIZE)
        await process.write(mapped.address, contents()[: (PAGES - 1) * PAGE_SIZE])
        scene = Scene(daemon, process, mapped, driver)
        await scene.begin(fills=fills)
        return scene

    return make


SetUp = Callable[..., Awaitable[Scene]]


@pytest.mark.parametrize("fills", [False, True], ids=["after setup", "after pages"])
async def test_pages_are_where_they_were_when_their_driver_is_killed(set_up: SetUp, fills: bool) -> None:
    """Whoever waited for them goes on at once."""
    scene = await set_up(fills=fills)
    reading = asyncio.create_task(scene.process.read(scene.mapped.address, 4))
    await scene.until_waiting("read_memory")
    scene.driver.signal(signal.SIGKILL)
    assert await reading == b"\x01" * 4
    await scene.require_nothing_lost()
    assert not (await scene.pending()).holdings


@pytest.mark.parametrize("fills", [False, True], ids=["after setup", "after pages"])
@pytest.mark.parametrize("how", ["hangs", "is stopped"])
async def test_pages_are_where_they_were_when_the_lease_ends(set_up: SetUp, how: str, fills: bool) -> None:
    """A driver that hangs has a process that shows life; one that was stopped is told when it goes on."""
    scene = await set_up(fills=fills, holding_lease_s=LEASE_S)
    if how == "is stopped":
        scene.driver.signal(signal.SIGSTOP)
    written = (PAGES - 1) * PAGE_SIZE  # the hole was filled by `pages`: its driver has to give it back
    assert await scene.process.read(scene.mapped.address, written) == contents()[:written]
    scene.driver.signal(signal.SIGCONT)
    await scene.require_nothing_lost()
    refused = await scene.driver.call("finalize")
    assert f" has ended: its driver took no step for {LEASE_S:g} s, its lease" in refused
    if how == "hangs":
        assert not await scene.driver.call("state")
    assert await scene.driver.call("setup", start=scene.mapped.address, end=scene.mapped.span.end)


async def test_pending_names_the_driver_when_others_wait_for_its_next_step(set_up: SetUp) -> None:
    """Who touches a page, who changes mappings, who forks: all behind one driver, which is named."""
    scene = await set_up()
    process, first = scene.process, scene.mapped.address
    target = first - PAGES * PAGE_SIZE
    calls = [
        asyncio.create_task(process.read(first, 4)),
        asyncio.create_task(process.fork()),
        asyncio.create_task(process.munmap(first + 2 * PAGE_SIZE, PAGE_SIZE)),
    ]
    for name in ("read_memory", "fork", "munmap"):
        await scene.until_waiting(name)
    moving = await scene.until_waiting("migrate_vma_setup")
    assert (moving.migration.driver_name, moving.migration.driver_pid) == ("stepping", scene.driver.process.pid)
    assert moving.migration.lease_ms
    for name in ("read_memory", "fork"):
        assert moving.operation_id in (await scene.until_waiting(name)).blocked_by
    flags = MremapFlag.MAYMOVE | MremapFlag.FIXED
    calls.append(
        asyncio.create_task(process.mremap(first + PAGE_SIZE, PAGE_SIZE, PAGE_SIZE, flags, new_address=target))
    )
    await scene.until_waiting("mremap")
    await scene.driver.call("fill")
    assert not await scene.driver.call("finalize")
    results = await asyncio.gather(*calls)
    assert results[0] == b"\x01" * 4
    assert await process.read(target, 4) == b"\x02" * 4


async def test_exit_waits_when_a_driver_moves_pages(set_up: SetUp) -> None:
    """The address space lives until the migration has ended; then it ends, wherever its pages are."""
    scene = await set_up()
    exiting = asyncio.create_task(scene.process.exit())
    await scene.until_waiting("exit_process")
    await scene.driver.call("fill")
    assert not await scene.driver.call("finalize")
    await exiting


async def test_second_driver_passes_over_pages_when_the_first_has_them(set_up: SetUp, start_driver: Any) -> None:
    """Both hold mmap_lock for reading; a page has one mover at a time."""
    scene = await set_up()
    other = await start_driver(scene.daemon, str(STEPPING))
    await other.call("attach", process=scene.process.id)
    span = {"start": scene.mapped.address, "end": scene.mapped.span.end}
    assert await other.call("setup", **span) == 1  # the hole, which whoever comes first fills
    assert await other.call("fill") == 1
    await scene.driver.call("fill")
    assert not await scene.driver.call("finalize")
    assert not await other.call("finalize")
    await scene.require_nothing_lost()


async def test_pin_stays_when_its_driver_has_nothing_to_say(set_up: SetUp) -> None:
    """The client library shows life by itself: the lease has begun to run, and begins anew."""
    lease_s = 10.0
    scene = await set_up(holding_lease_s=lease_s)
    assert not await scene.driver.call("finalize", abort=True)
    await scene.driver.call("pin", start=scene.mapped.address, end=scene.mapped.span.end)

    def left_ms(answer: inspection_pb2.GetPendingResponse) -> int:
        (held,) = answer.holdings
        return held.lease_ms

    await scene.until(lambda answer: left_ms(answer) < lease_s * 1000)
    await scene.until(lambda answer: left_ms(answer) == lease_s * 1000)
