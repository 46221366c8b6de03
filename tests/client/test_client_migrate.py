"""Pages in a device's memory through the client library and a real daemon: there, back, and carried by the driver."""

from __future__ import annotations

import asyncio
import errno as errnos
import re
from typing import TYPE_CHECKING

import numpy as np
import pytest
from click.testing import CliRunner

import hmm_client
from hmm import pte
from hmm.errors import BadAddressError, InvalidRequestError, NoSuchObjectError, OutOfFramesError, SegmentationFault
from hmm.events import EventType
from hmm.units import PAGE_SIZE, AddressRange
from hmm_client import Driver, Event, MemoryDriver, Mirror, Process, TableDriver, sync
from hmm_client.cli import main

if TYPE_CHECKING:
    from tests.conftest import Daemon

CARD_PAGES = 2048


class Card(MemoryDriver):
    """A device whose driver copies, and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__(CARD_PAGES)
        self.heard: list[str] = []
        self.failing: frozenset[int] = frozenset()

    def update(self, event: Event) -> None:
        """Apply and remember."""
        super().update(event)
        self.heard.append(event.type.name)

    async def copy_to_device(self, event: Event) -> bytes:  # type: ignore[override]
        """Take the pages, but those that fail."""
        await self.memory.take(event)
        return bytes(errnos.EIO if number in self.failing else 0 for number in range(event.npages))

    async def copy_from_device(self, event: Event) -> bytes:  # type: ignore[override]
        """Give them back, but those that fail."""
        self.heard.append("copy for a child" if event.keeps else "copy back")
        await self.memory.give(event)
        return bytes(errnos.EIO if number in self.failing else 0 for number in range(event.npages))


@pytest.fixture
async def card(client: hmm_client.Client, process: Process, request: pytest.FixtureRequest) -> tuple[Card, Mirror]:
    """A driver that copies, and its mirror of the process."""
    name = f"card of {request.node.name}"[:60]
    device = await client.register_device(name, memory_pages=CARD_PAGES, driver_copies=True)
    driver = Card()
    return driver, await device.mirror(process, driver)


def pattern(npages: int) -> bytes:
    """Pages of which no two words are alike."""
    return (np.arange(npages * PAGE_SIZE // 8, dtype="<u8") * np.uint64(2654435761)).tobytes()


async def test_migrate_carries_many_pages_there_and_back(process: Process, card: tuple[Card, Mirror]) -> None:
    """More than one call, more than one message for each: every byte is where it was, and the table says where."""
    driver, mirror = card
    npages = 1100
    mapped = await process.mmap(npages * PAGE_SIZE)
    for at in range(0, npages, 200):
        part = min(200, npages - at)
        await process.write(mapped.address + at * PAGE_SIZE, pattern(npages)[at * PAGE_SIZE : (at + part) * PAGE_SIZE])
    migrated = await mirror.migrate(mapped.span)
    assert (migrated.npages, migrated.span, migrated.error) == (npages, mapped.span, None)
    assert pte.pte_test_valid_dev(driver.table(mirror).pages.read(mapped.address, mapped.span.end)).all()
    held = driver.memory.read(migrated.entries).tobytes()
    assert held == pattern(npages)
    back = await mirror.migrate_back(mapped.span)
    assert back.npages == npages
    assert await process.read(mapped.address, 64 * PAGE_SIZE) == pattern(npages)[: 64 * PAGE_SIZE]
    assert not driver.table(mirror).pages.read(mapped.address, mapped.span.end).any()


async def test_page_comes_back_when_the_cpu_touches_it(process: Process, card: tuple[Card, Mirror]) -> None:
    """What the device wrote in its own memory is what the CPU reads; fork gets copies and leaves the pages."""
    driver, mirror = card
    mapped = await process.mmap(2 * PAGE_SIZE)
    await process.write(mapped.address, pattern(2))
    migrated = await mirror.migrate(mapped.span)
    driver.memory.write(migrated.entries[:1], 0, b"from the device")
    driver.heard.clear()
    child = await process.fork()
    assert await child.read(mapped.address, 15) == b"from the device"
    assert driver.heard == ["FORK", "copy for a child"]
    assert await process.read(mapped.address, 15) == b"from the device"
    assert driver.heard[2:] == ["COPY_FROM_DEVICE", "copy back"]


async def test_pages_stay_or_are_lost_when_their_copy_fails(process: Process, card: tuple[Card, Mirror]) -> None:
    """On the way there a page that fails stays; on the way back it is lost: SIGBUS."""
    driver, mirror = card
    mapped = await process.mmap(3 * PAGE_SIZE)
    await process.write(mapped.address, pattern(3))
    driver.failing = frozenset({1})
    migrated = await mirror.migrate(mapped.span)
    assert (migrated.npages, pte.pte_test_valid_dev(migrated.entries).tolist()) == (2, [True, False, True])
    await mirror.migrate_back(mapped.span)
    assert await process.read(mapped.address, PAGE_SIZE) == pattern(1)
    with pytest.raises(SegmentationFault, match="BUS_POISON"):
        await process.read(mapped.address + 2 * PAGE_SIZE, 1)


async def test_migrate_goes_on_across_mappings_and_stops_at_holes(process: Process, card: tuple[Card, Mirror]) -> None:
    """As far as there is private memory; what moved before the error has moved."""
    _, mirror = card
    mapped = await process.mmap(6 * PAGE_SIZE)
    await process.mprotect(mapped.address + 2 * PAGE_SIZE, PAGE_SIZE, hmm_client.Prot.READ)
    await process.munmap(mapped.address + 4 * PAGE_SIZE, PAGE_SIZE)
    migrated = await mirror.migrate(mapped.span, partial=True)
    assert (migrated.npages, migrated.entries.size) == (4, 4)
    assert isinstance(migrated.error, BadAddressError)
    with pytest.raises(BadAddressError):
        await mirror.migrate(AddressRange(mapped.address + 4 * PAGE_SIZE, mapped.span.end))


async def test_migrate_fails_when_the_driver_has_no_memory(client: hmm_client.Client, process: Process) -> None:
    """The base class answers ENOMEM; a device without memory has no such call: ENODEV."""
    mapped = await process.mmap(PAGE_SIZE)
    device = await client.register_device("without code", memory_pages=4, driver_copies=True)
    with pytest.raises(OutOfFramesError):
        await (await device.mirror(process, TableDriver())).migrate(mapped.span)
    plain = await client.register_device("without memory")
    with pytest.raises(NoSuchObjectError):
        await (await plain.mirror(process, Driver())).migrate(mapped.span)
    with pytest.raises(InvalidRequestError):
        await client.register_device("nothing to copy", driver_copies=True)


async def test_device_uses_its_pages_when_the_daemon_has_them(client: hmm_client.Client, process: Process) -> None:
    """Without `driver_copies` nothing is carried, and the device reads and writes through the mirror as ever."""
    device = await client.register_device("by frames", memory_pages=4)
    driver = Card()
    mirror = await device.mirror(process, driver)
    mapped = await process.mmap(2 * PAGE_SIZE)
    await process.write(mapped.address, b"cpu")
    assert (await mirror.migrate(mapped.span)).npages == 2
    assert driver.heard == ["DEVICE_RFAULT"]
    await mirror.write([(mapped.address + 3, 6)], b" + gpu")
    assert await mirror.read([(mapped.address, 9)]) == b"cpu + gpu"
    assert await process.read(mapped.address, 9) == b"cpu + gpu"
    assert driver.heard == ["DEVICE_RFAULT", "COPY_FROM_DEVICE"]


async def test_events_of_others_pass_a_copy_that_is_under_way(process: Process, card: tuple[Card, Mirror]) -> None:
    """A driver answers events of another range, and makes calls, while it copies."""
    driver, mirror = card
    mapped = await process.mmap(4 * PAGE_SIZE)
    await process.write(mapped.address, pattern(4))
    await mirror.fault(AddressRange(mapped.address + 3 * PAGE_SIZE, mapped.span.end), write=True)
    take = driver.memory.take

    async def slowly(event: Event) -> None:
        await process.munmap(mapped.address + 3 * PAGE_SIZE, PAGE_SIZE)
        await take(event)

    driver.memory.take = slowly  # type: ignore[method-assign]
    async with asyncio.timeout(60):
        await mirror.migrate(AddressRange(mapped.address, mapped.address + 2 * PAGE_SIZE))
    assert "MUNMAP" in driver.heard


async def test_unregister_brings_pages_back(process: Process, card: tuple[Card, Mirror]) -> None:
    """Orderly leaving loses nothing."""
    driver, mirror = card
    mapped = await process.mmap(2 * PAGE_SIZE)
    await process.write(mapped.address, pattern(2))
    await mirror.migrate(mapped.span)
    await mirror.unregister()
    assert driver.heard[-2:] == ["copy back", EventType.MUNMAP.name]
    assert await process.read(mapped.address, 2 * PAGE_SIZE) == pattern(2)


async def test_hmmctl_shows_which_pages_are_on_which_device(
    shared_daemon: Daemon, process: Process, card: tuple[Card, Mirror]
) -> None:
    """maps, walk and pagetable name the device: where in its memory a page is, and how many it has."""
    _, mirror = card
    mapped = await process.mmap(4 * PAGE_SIZE)
    await process.write(mapped.address, pattern(4))
    await mirror.migrate(AddressRange(mapped.address + PAGE_SIZE, mapped.span.end))
    name = mirror.device.name

    def shown(*arguments: str) -> str:
        result = CliRunner().invoke(main, [*arguments, "--target", shared_daemon.target], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    maps = await asyncio.to_thread(shown, "maps", str(process.id))
    assert f"({name}: 3 pages)" in maps
    walk = await asyncio.to_thread(shown, "walk", str(process.id), f"{mapped.address + 2 * PAGE_SIZE:x}")
    assert walk.count(f"{name} at 0x1000, frame") == 2
    assert re.search(rf"{re.escape(name)} +3 of {CARD_PAGES:,} ", await asyncio.to_thread(shown, "ps"))
    for arguments in ((str(mirror.id),), (str(process.id), "--cpu")):
        assert f"({name}: 3 pages)" in await asyncio.to_thread(shown, "pagetable", *arguments)


def test_sync_driver_copies_in_plain_functions(shared_daemon: Daemon) -> None:
    """On a worker thread, where `read_pages` and `write_pages` return bytes and nothing is awaited."""

    class Plain(sync.Driver):
        def __init__(self) -> None:
            self.pages: dict[int, bytes] = {}

        def copy_to_device(self, event: sync.Event) -> None:
            data = event.read_pages()
            for number, address in enumerate(event.device_addresses.tolist()):
                self.pages[address] = data[number * PAGE_SIZE : (number + 1) * PAGE_SIZE]

        def copy_from_device(self, event: sync.Event) -> None:
            event.write_pages(b"".join(self.pages.pop(address) for address in event.device_addresses.tolist()))

    with sync.connect(shared_daemon.target) as client:
        process = client.create_process("sync")
        driver = Plain()
        device = client.register_device("sync card", memory_pages=16, driver_copies=True)
        mirror = device.mirror(process, driver)
        mapped = process.mmap(4 * PAGE_SIZE)
        process.write(mapped.address, pattern(4))
        assert mirror.migrate(mapped.span).npages == 4
        assert len(driver.pages) == 4
        assert process.read(mapped.address, 4 * PAGE_SIZE) == pattern(4)


async def test_fork_leaves_the_devices_own_pages_writable(process: Process, card: tuple[Card, Mirror]) -> None:
    """The device's table goes on permitting what the daemon's does: only pages of the system become read-only."""
    driver, mirror = card
    mapped = await process.mmap(2 * PAGE_SIZE)
    await process.write(mapped.address, pattern(2))
    await mirror.fault(mapped.span, write=True)
    await mirror.migrate(AddressRange(mapped.address, mapped.address + PAGE_SIZE))
    await process.fork()
    ours = driver.table(mirror).pages.read(mapped.address, mapped.span.end)
    assert pte.pte_test_write(ours).tolist() == [True, False]
    assert (ours == await mirror.read_table(mapped.span)).all()
