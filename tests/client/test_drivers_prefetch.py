"""The device that follows a program: it faults around it, answers everything, and finds what the contract forbids."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import hmm_client
from hmm.errors import ConflictError
from hmm.units import PAGE_SIZE, AddressRange
from hmm_client import Advice, MapFlag, MremapFlag, Process, Prot
from hmm_client.drivers.prefetch import Behaviour, PrefetchDevice
from hmm_client.embedded import EmbeddedDaemon

if TYPE_CHECKING:
    pass

NPAGES = 64


async def test_device_faults_and_checks_where_the_program_is(client: hmm_client.Client, process: Process) -> None:
    """Ahead for the first place, ahead or behind for later ones; for reading and for writing; all of it checked."""
    device = await PrefetchDevice.register(client, "prefetch a", Behaviour(seed=1, pages=8))
    await device.attach(process)
    for _ in range(20):
        mapped = await process.mmap(NPAGES * PAGE_SIZE)
        device.follow(process.id, mapped.span)
    await device.idle()
    done = device.statistics
    assert done.faults == 20
    assert 80 <= done.pages <= 160
    assert done.bytes_written > 0
    assert done.checks > 0
    assert done.violations == []
    assert {"DEVICE_RFAULT", "DEVICE_WFAULT"} <= set(done.events)
    assert done.latency_us(50) > 0
    await device.stop()


async def test_program_is_followed_no_more_when_it_is_let_go(client: hmm_client.Client, process: Process) -> None:
    """Once, while it lives; then it may be followed again, but not twice at a time."""
    device = await PrefetchDevice.register(client, "prefetch letting go")
    await device.attach(process)
    (mirror,) = device.mirrors
    await device.detach(process.id)
    assert mirror.released
    assert not device.mirrors
    await device.attach(process)
    with pytest.raises(ConflictError):
        await device.attach(process)
    await process.exit()
    await device.detach(process.id)
    await device.stop()


async def test_device_does_the_same_when_the_seed_is_the_same(client: hmm_client.Client) -> None:
    """What is faulted follows from seed and program alone."""
    seen = []
    for turn in range(2):
        process = await client.create_process("program")
        device = await PrefetchDevice.register(client, f"prefetch b{turn}", Behaviour(seed=7))
        await device.attach(process)
        for size in (3, 40, 17, 99):
            device.follow(process.id, (await process.mmap(size * PAGE_SIZE)).span)
            await device.idle()
        seen.append((device.statistics.events, device.statistics.pages, device.statistics.bytes_written))
        await device.stop()
    assert seen[0] == seen[1]


async def test_unmapped_and_protected_places_are_no_violation(client: hmm_client.Client, process: Process) -> None:
    """The program may be gone from where the device looks: that is counted as refused."""
    device = await PrefetchDevice.register(client, "prefetch c", Behaviour(write_ratio=1.0))
    await device.attach(process)
    device.follow(process.id, AddressRange(PAGE_SIZE * 100, PAGE_SIZE * 110))
    read_only = await process.mmap(4 * PAGE_SIZE, Prot.READ)
    device.follow(process.id, read_only.span)
    await device.idle()
    assert device.statistics.refused["EFAULT"] > 0
    assert device.statistics.violations == []
    await device.stop()


@pytest.mark.slow
async def test_two_devices_agree_with_the_cpu_while_the_program_changes_everything(
    client: hmm_client.Client, process: Process
) -> None:
    """Unmapping, moving, discarding, protecting, forking beneath two devices that write: no violation."""
    devices = [
        await PrefetchDevice.register(client, f"prefetch d{slot}", Behaviour(seed=slot, slot=slot)) for slot in (0, 1)
    ]
    for device in devices:
        await device.attach(process)
    random = np.random.default_rng(3)
    shared = MapFlag.SHARED | MapFlag.ANONYMOUS
    mappings = [await process.mmap(NPAGES * PAGE_SIZE) for _ in range(4)]
    mappings += [await process.mmap(NPAGES * PAGE_SIZE, flags=shared) for _ in range(2)]
    children: list[Process] = []
    for turn in range(150):
        number = int(random.integers(len(mappings)))
        mapped = mappings[number]
        part = mapped.page(int(random.integers(NPAGES - 8))).start
        for device in devices:
            device.follow(process.id, mapped.span)
        match turn % 6:
            case 0:
                await process.madvise(part, 8 * PAGE_SIZE, Advice.DONTNEED)
            case 1:
                await process.mprotect(part, 8 * PAGE_SIZE, Prot.READ)
                await process.mprotect(part, 8 * PAGE_SIZE, Prot.READ | Prot.WRITE)
            case 2:
                mappings[number] = await process.mremap(
                    mapped.address,
                    mapped.length,
                    mapped.length,
                    MremapFlag.MAYMOVE | MremapFlag.FIXED,
                    new_address=0x1000_0000_0000 + (turn << 30),
                )
            case 3:
                await process.munmap(mapped.address, mapped.length)
                mappings[number] = await process.mmap(mapped.length)
            case 4 if turn < 60:
                child = await process.fork()
                children.append(child)
                for device in devices:
                    await device.attach(child)
                    device.follow(child.id, mapped.span)
            case _:
                # Not where the devices write: they read back what they wrote.
                await process.write(part + 64, bytes(PAGE_SIZE - 64))
    await asyncio.gather(*(device.idle() for device in devices))
    for child in children:
        await child.exit()
    await process.exit()
    for device in devices:
        assert device.statistics.violations == []
        assert device.statistics.checks > 0
        assert device.statistics.skipped == 0
        assert {"MUNMAP", "MIGRATE", "FORK", "WRITE_PROTECT", "RELEASE"} <= set(device.statistics.events)
        await device.stop()


async def test_violation_is_found_when_the_device_keeps_what_an_event_took(
    client: hmm_client.Client, process: Process
) -> None:
    """A planted bug: a device whose table ignores events uses what was taken back, and says so."""
    device = await PrefetchDevice.register(client, "prefetch e", Behaviour(write_ratio=1.0, behind_ratio=0.0))
    await device.attach(process)
    mapped = await process.mmap(4 * PAGE_SIZE)
    device.follow(process.id, mapped.span)
    await device.idle()
    program = device._programs[process.id]
    table = device.table(program.mirror)
    device.tables[program.mirror.id] = type(table)()  # events go to another table from now on
    await process.munmap(mapped.address, mapped.length)
    device.tables[program.mirror.id] = table
    pages = np.arange(mapped.span.start, mapped.span.end, PAGE_SIZE, dtype=np.uint64)
    await device._stamp_pages(program, device._usable(program, pages, write=True))
    (violation,) = device.statistics.violations
    assert "no event took back" in violation
    await device.stop()


@pytest.mark.slow
async def test_device_ends_quietly_when_its_daemon_is_killed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """While it waits for what a CPU reads: its session says who has gone, and asyncio has nothing to add."""

    async def lose(daemon: EmbeddedDaemon) -> None:
        async with hmm_client.connect(daemon.target) as client:
            device = await PrefetchDevice.register(client, "prefetch alone", Behaviour(write_ratio=0))
            process = await client.create_process("program")
            await device.attach(process)
            device.follow(process.id, (await process.mmap(NPAGES * PAGE_SIZE)).span)
            while not device.statistics.bytes_read:  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0)
            daemon.process.kill()
            await (await client.session()).wait_lost()

    daemon = await asyncio.to_thread(EmbeddedDaemon, tmp_path)
    await lose(daemon)
    await asyncio.to_thread(daemon.stop)
    gc.collect()
    assert "never retrieved" not in caplog.text
