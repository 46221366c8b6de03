"""The test suite of the 2015 dummy driver, through a daemon and with the driver as a process of its own.

Twelve sanity cases, three of device memory and three of stress, under their names of then.  The program of each case is
here, its device is the driver's.

Source: the list of cases in the dummy driver's test suite (github.com/glisse/hmm-dummy-test-suite).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pytest
from selftest_rig import ALL

import hmm_client
from hmm.units import PAGE_SIZE
from hmm_client import MapFlag, Process, Prot
from hmm_client.drivers.control import decode, encode
from hmm_client.drivers.remote import RemoteError

if TYPE_CHECKING:
    from tests.conftest import Daemon
    from tests.system.conftest import DriverProcess

pytestmark = pytest.mark.slow

T = TypeVar("T")
DRIVER = ("-m", "hmm_client.drivers.dummy")
NPAGES = 1024
SIZE = NPAGES * PAGE_SIZE
RECLAIMS, REMAPS, RACES = (16, 512, 1024) if ALL else (6, 64, 192)
SHARED_ANONYMOUS = MapFlag.SHARED | MapFlag.ANONYMOUS


def pattern(npages: int = NPAGES, seed: int = 0) -> bytes:
    """Pages of which no two words are alike."""
    return (np.arange(npages * PAGE_SIZE // 8, dtype="<u8") * np.uint64(2654435761) + np.uint64(seed)).tobytes()


class Dummy:
    """One minor of the driver, opened for one process."""

    def __init__(self, driver: DriverProcess, device: int, minor: int) -> None:
        self._call = driver.call
        self._where = {"device": device, "minor": minor}

    async def expose(self, process: Process) -> Dummy:
        """EXPOSE_MM."""
        await self._call("expose_mm", **self._where, process=process.id)
        return self

    async def read(self, address: int, size: int) -> tuple[bytes, dict[str, Any]]:
        """READ: the data and the counters."""
        result = await self._call("read", **self._where, address=address, size=size)
        return decode(result.pop("data")), result

    async def write(self, address: int, data: bytes) -> dict[str, Any]:
        """WRITE: the counters."""
        counters: dict[str, Any] = await self._call("write", **self._where, address=address, data=encode(data))
        return counters

    async def migrate(self, address: int, size: int) -> dict[str, Any]:
        """MIGRATE_TO: the counters."""
        counters: dict[str, Any] = await self._call("migrate", **self._where, address=address, size=size)
        return counters

    async def close(self) -> None:
        """Close the file."""
        await self._call("close", **self._where)


@pytest.fixture(scope="module")
async def daemon(start_session_daemon: Callable[..., Awaitable[Daemon]]) -> Daemon:
    """One for all cases."""
    return await start_session_daemon()


@pytest.fixture(scope="module")
async def dummy(start_lasting_driver: Callable[..., Awaitable[DriverProcess]], daemon: Daemon) -> DriverProcess:
    """The dummy driver, as a process of its own."""
    return await start_lasting_driver(daemon, *DRIVER)


@pytest.fixture(scope="module")
def client(daemon: Daemon) -> hmm_client.Client:
    """The program's end of the daemon."""
    return daemon.connect("program")


@pytest.fixture
async def process(client: hmm_client.Client) -> AsyncIterator[Process]:
    """The program."""
    process = await client.create_process("program")
    yield process
    await process.exit()


@pytest.fixture
async def minor(dummy: DriverProcess, process: Process) -> AsyncIterator[Dummy]:
    """The device, opened by the program."""
    minor = await Dummy(dummy, 0, 0).expose(process)
    yield minor
    await minor.close()


async def test_anon001_device_reads_what_the_cpu_wrote(process: Process, minor: Dummy) -> None:
    """The device reads 1024 pages of anonymous memory, faulting each of them once."""
    mapped = await process.mmap(SIZE)
    await process.write(mapped.address, pattern())
    data, counters = await minor.read(mapped.address, SIZE)
    assert data == pattern()
    assert counters == {"nsys_pages": NPAGES, "nfaulted_sys_pages": NPAGES, "ndev_pages": 0, "nfaulted_dev_pages": 0}
    _, again = await minor.read(mapped.address, SIZE)
    assert again["nfaulted_sys_pages"] == 0


async def test_anon002_cpu_reads_what_the_device_wrote(process: Process, minor: Dummy) -> None:
    """The device writes 1024 pages of anonymous memory that nobody has touched yet."""
    mapped = await process.mmap(SIZE)
    counters = await minor.write(mapped.address, pattern())
    assert (counters["nsys_pages"], counters["nfaulted_sys_pages"]) == (NPAGES, NPAGES)
    assert await process.read(mapped.address, SIZE) == pattern()


async def test_anon003_device_write_changes_nothing_when_memory_is_read_only(process: Process, minor: Dummy) -> None:
    """A device may not write where the CPU may not: mprotect takes the permission from a device that had it."""
    mapped = await process.mmap(SIZE)
    await minor.write(mapped.address, pattern())
    await process.mprotect(mapped.address, SIZE, Prot.READ)
    with pytest.raises(Exception, match="EACCES"):
        await minor.write(mapped.address, bytes(SIZE))
    assert await process.read(mapped.address, SIZE) == pattern()
    assert (await minor.read(mapped.address, SIZE))[0] == pattern()


async def test_anon004_device_neither_reads_nor_writes_when_memory_is_protected(process: Process, minor: Dummy) -> None:
    """PROT_NONE keeps devices out, also those that were in before."""
    mapped = await process.mmap(SIZE)
    await minor.write(mapped.address, pattern())
    await process.mprotect(mapped.address, SIZE, Prot.NONE)
    with pytest.raises(Exception, match="EACCES"):
        await minor.read(mapped.address, SIZE)
    with pytest.raises(Exception, match="EACCES"):
        await minor.write(mapped.address, bytes(SIZE))
    await process.mprotect(mapped.address, SIZE, Prot.READ | Prot.WRITE)
    assert (await minor.read(mapped.address, SIZE))[0] == pattern()


async def test_anon005_parent_does_not_see_what_the_childs_device_writes(
    dummy: DriverProcess, process: Process, minor: Dummy
) -> None:
    """After fork, private memory is copied before a device writes; the parent's device goes on reading the old."""
    mapped = await process.mmap(SIZE)
    await process.write(mapped.address, pattern())
    await minor.write(mapped.address, pattern(seed=1))
    child = await process.fork()
    device = await Dummy(dummy, 0, 1).expose(child)
    assert (await device.read(mapped.address, SIZE))[0] == pattern(seed=1)
    await device.write(mapped.address, pattern(seed=2))
    assert await child.read(mapped.address, SIZE) == pattern(seed=2)
    assert await process.read(mapped.address, SIZE) == pattern(seed=1)
    assert (await minor.read(mapped.address, SIZE))[0] == pattern(seed=1)
    await device.close()


async def test_share001_parent_sees_what_the_childs_device_writes_when_memory_is_shared(
    dummy: DriverProcess, process: Process, minor: Dummy
) -> None:
    """Shared memory is one memory, for the CPUs and the devices of both processes."""
    mapped = await process.mmap(SIZE, flags=SHARED_ANONYMOUS)
    child = await process.fork()
    device = await Dummy(dummy, 0, 1).expose(child)
    await device.write(mapped.address, pattern())
    assert await process.read(mapped.address, SIZE) == pattern()
    assert (await minor.read(mapped.address, SIZE))[0] == pattern()
    await device.close()


async def test_file001_device_reads_a_shared_file(client: hmm_client.Client, process: Process, minor: Dummy) -> None:
    """The device reads a file through a shared mapping."""
    file = await client.open_file("data", create=True)
    await file.write(0, pattern())
    mapped = await process.mmap(SIZE, Prot.READ, MapFlag.SHARED, file=file)
    assert (await minor.read(mapped.address, SIZE))[0] == pattern()


async def test_file002_file_keeps_what_the_device_wrote_when_it_is_opened_again(
    client: hmm_client.Client, process: Process, minor: Dummy
) -> None:
    """What a device writes through a shared mapping is in the file, after unmapping, closing and opening it again."""
    file = await client.open_file("data", create=True)
    await file.truncate(SIZE)
    mapped = await process.mmap(SIZE, flags=MapFlag.SHARED, file=file)
    other = await client.open_file("data")
    await minor.write(mapped.address, pattern())
    await process.msync(mapped.address, SIZE, hmm_client.MsyncFlag.SYNC)
    await process.munmap(mapped.address, SIZE)
    await file.close()
    assert await other.read() == pattern()


async def test_file003_device_reads_only_the_first_half_when_the_file_is_truncated(
    client: hmm_client.Client, process: Process, minor: Dummy
) -> None:
    """The half that is left is read; the half that is gone can only fail, with EFAULT."""
    file = await client.open_file("data", create=True)
    await file.write(0, pattern())
    mapped = await process.mmap(SIZE, flags=MapFlag.SHARED, file=file)
    assert (await minor.read(mapped.address, SIZE))[0] == pattern()
    await file.truncate(SIZE // 2)
    assert (await minor.read(mapped.address, SIZE // 2))[0] == pattern()[: SIZE // 2]
    with pytest.raises(Exception, match="EFAULT") as caught:
        await minor.read(mapped.address + SIZE // 2, SIZE // 2)
    assert caught.value.address == mapped.address + SIZE // 2  # type: ignore[attr-defined]


async def test_expose_mm_is_refused_when_the_minor_is_busy(
    dummy: DriverProcess, client: hmm_client.Client, process: Process, minor: Dummy
) -> None:
    """One minor mirrors one process until it is closed: EBUSY for the next."""
    other = await client.create_process("other")
    with pytest.raises(Exception, match="EBUSY"):
        await Dummy(dummy, 0, 0).expose(other)
    await minor.close()
    await Dummy(dummy, 0, 0).expose(other)
    await other.exit()


async def test_rmem001_pages_move_to_the_device(process: Process, minor: Dummy) -> None:
    """256 pages migrate, and as many are counted in device memory."""
    mapped = await process.mmap(256 * PAGE_SIZE)
    await process.write(mapped.address, pattern(256))
    counters = await minor.migrate(mapped.address, 256 * PAGE_SIZE)
    assert (counters["ndev_pages"], counters["nsys_pages"]) == (256, 0)
    assert await process.read(mapped.address, 256 * PAGE_SIZE) == pattern(256)


async def test_rmem002_device_reads_its_own_memory_after_a_migration(process: Process, minor: Dummy) -> None:
    """The pages are read where they are, and the CPU then sees the same."""
    mapped = await process.mmap(256 * PAGE_SIZE)
    await process.write(mapped.address, pattern(256))
    await minor.migrate(mapped.address, 256 * PAGE_SIZE)
    data, counters = await minor.read(mapped.address, 256 * PAGE_SIZE)
    assert data == pattern(256)
    assert counters == {"nsys_pages": 0, "nfaulted_sys_pages": 0, "ndev_pages": 256, "nfaulted_dev_pages": 0}
    assert await process.read(mapped.address, 256 * PAGE_SIZE) == pattern(256)


async def test_rmem003_cpu_sees_what_the_device_wrote_to_its_own_memory(process: Process, minor: Dummy) -> None:
    """What was written after the migration comes back with the pages."""
    mapped = await process.mmap(256 * PAGE_SIZE)
    await process.write(mapped.address, pattern(256))
    await minor.migrate(mapped.address, 256 * PAGE_SIZE)
    counters = await minor.write(mapped.address, pattern(256, seed=1))
    assert (counters["ndev_pages"], counters["nsys_pages"]) == (256, 0)
    assert await process.read(mapped.address, 256 * PAGE_SIZE) == pattern(256, seed=1)
    _, after = await minor.read(mapped.address, 256 * PAGE_SIZE)
    assert (after["ndev_pages"], after["nsys_pages"]) == (0, 256)


async def test_stress001_device_faults_again_when_pages_were_reclaimed(
    start_daemon: Callable[..., Awaitable[Daemon]], start_driver: Callable[..., Awaitable[DriverProcess]]
) -> None:
    """Memory that is too small for all takes pages from CPU and device at any time; every access finds them again."""
    daemon = await start_daemon(frames=3 * NPAGES // 2, swap_pages=4 * NPAGES)
    process = await daemon.connect("program").create_process("program")
    minor = await Dummy(await start_driver(daemon, *DRIVER), 0, 0).expose(process)
    mapped = await process.mmap(SIZE)
    other = await process.mmap(SIZE)
    await process.write(mapped.address, pattern())
    faulted = 0
    for turn in range(RECLAIMS):
        await process.write(other.address, pattern(seed=turn))
        data, counters = await minor.read(mapped.address, SIZE)
        assert data == pattern()
        faulted += counters["nfaulted_sys_pages"]
        assert await process.read(other.address, SIZE) == pattern(seed=turn)
    assert faulted > RECLAIMS // 4 * NPAGES


async def test_stress002_device_reads_what_is_there_now_when_memory_is_mapped_again_and_again(
    process: Process, minor: Dummy
) -> None:
    """Again and again (512 times): map at the same place, write, let the device read, unmap."""
    address = 0
    for turn in range(REMAPS):
        mapped = await process.mmap(4 * PAGE_SIZE)
        address = address or mapped.address
        assert mapped.address == address
        await process.write(mapped.address, pattern(4, seed=turn))
        data, counters = await minor.read(mapped.address, 4 * PAGE_SIZE)
        assert data == pattern(4, seed=turn)
        assert counters["nfaulted_sys_pages"] == 4
        await process.munmap(mapped.address, 4 * PAGE_SIZE)


async def test_stress003_successful_read_is_correct_when_it_races_with_munmap(process: Process, minor: Dummy) -> None:
    """Races (1024) of a device's read with munmap: either EFAULT, or the data that was there."""
    outcomes: list[str] = []
    span = 4 * PAGE_SIZE

    async def after(round_trips: int, call: Awaitable[T]) -> T:
        for _ in range(round_trips):
            await process.brk()
        return await call

    async def prepare(turn: int) -> int:
        address = (await process.mmap(span)).address
        await process.write(address, pattern(4, seed=turn))
        return address

    async def race(turn: int, address: int) -> None:
        # Either has a head start of some round trips, or none; of sixteen one is over before the other begins.
        reading, unmapping = minor.read(address, span), process.munmap(address, span)
        match turn % 16:
            case 0:
                outcomes.append(await outcome(turn, reading))
                await unmapping
            case 1:
                await unmapping
                outcomes.append(await outcome(turn, reading))
            case _:
                racing = asyncio.ensure_future(outcome(turn, after(turn % 5, reading)))
                await after(turn % 3, unmapping)
                outcomes.append(await racing)

    async def outcome(turn: int, reading: Awaitable[tuple[bytes, dict[str, Any]]]) -> str:
        try:
            data, _ = await reading
        except RemoteError as error:
            return error.errno
        return "read" if data == pattern(4, seed=turn) else "wrong data"

    for start in range(0, RACES, 16):
        turns = range(start, start + 16)
        addresses = await asyncio.gather(*map(prepare, turns))  # before any of them is free for another again
        await asyncio.gather(*map(race, turns, addresses))
    assert len(outcomes) == RACES
    assert set(outcomes) == {"read", "EFAULT"}
