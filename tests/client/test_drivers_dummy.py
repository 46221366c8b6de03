"""The dummy driver's devices and minors; what its test suite demands is in tests/system."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

import hmm_client
from hmm.errors import BadAddressError, ConflictError, InvalidRequestError, NoSuchObjectError
from hmm.units import PAGE_SIZE, TASK_SIZE
from hmm_client import Advice, Process
from hmm_client.drivers.dummy import Counters, DummyDevices, DummyDriver, Minor

if TYPE_CHECKING:
    pass


@pytest.fixture
async def minor(client: hmm_client.Client, request: pytest.FixtureRequest) -> Minor:
    """One minor of one device."""
    return Minor(await client.register_device(request.node.name[:60]), DummyDriver())


async def test_transfer_counts_pages_and_faults(minor: Minor, process: Process) -> None:
    """A page that the transfer touches counts once, and once more as faulted when it was missing."""
    await minor.expose_mm(process)
    mapped = await process.mmap(8 * PAGE_SIZE)
    assert await minor.write(mapped.address + PAGE_SIZE - 1, b"ab") == Counters(nsys_pages=2, nfaulted_sys_pages=2)
    assert await minor.read(mapped.address, 3 * PAGE_SIZE) == (
        bytes(PAGE_SIZE - 1) + b"ab" + bytes(2 * PAGE_SIZE - 1),
        Counters(nsys_pages=3, nfaulted_sys_pages=1),
    )
    assert await minor.read(mapped.address, 0) == (b"", Counters())


async def test_transfer_is_cut_when_it_is_larger_than_the_device_can_do_at_once(minor: Minor, process: Process) -> None:
    """Three transfers for two and a bit MiB; a failure leaves what was written before it."""
    await minor.expose_mm(process)
    mapped = await process.mmap(2 << 20)
    data = bytes(range(256)) * 8000
    await minor.write(mapped.address + 5, data)
    assert (await minor.read(mapped.address + 5, len(data)))[0] == data
    with pytest.raises(BadAddressError):
        await minor.write(mapped.address + 5, b"!" * (2 << 20))
    assert await process.read(mapped.address + 5, 2) == b"!!"


async def test_expose_mm_is_refused_when_the_minor_is_busy(
    client: hmm_client.Client, minor: Minor, process: Process
) -> None:
    """EBUSY until the minor is closed; a minor that mirrors nothing transfers nothing."""
    with pytest.raises(InvalidRequestError):
        await minor.read(0, 1)
    await minor.close()
    await minor.expose_mm(process)
    with pytest.raises(ConflictError, match="EBUSY"):
        await minor.expose_mm(await client.create_process("other"))
    await minor.close()
    await minor.expose_mm(process)
    await process.exit()
    await minor.close()


async def test_transfer_is_refused_when_no_process_can_have_its_bytes(minor: Minor, process: Process) -> None:
    """Less than nothing, and addresses beyond all memory, are EINVAL, of a minor that mirrors nothing as well."""
    with pytest.raises(InvalidRequestError, match="mirrors no process"):
        await minor.read(0, 0)
    await minor.expose_mm(process)
    for address, size in [(0, -1), (-PAGE_SIZE, 1), (TASK_SIZE - 1, 2), (1 << 64, 1)]:
        with pytest.raises(InvalidRequestError, match=f"read: no process has {size} bytes"):
            await minor.read(address, size)
        with pytest.raises(InvalidRequestError, match=f"migrate: no process has {size} bytes"):
            await minor.migrate(address, size)
    assert await minor.migrate(100, 0) == Counters()


async def test_minor_is_closed_once_when_two_close_it(client: hmm_client.Client, process: Process) -> None:
    """The second has nothing to do; and who closes before the mirror is there closes nothing."""
    minor = Minor(await client.register_device("closed twice"), DummyDriver())
    exposing = asyncio.create_task(minor.expose_mm(process))
    await asyncio.sleep(0)
    await minor.close()
    with pytest.raises(ConflictError):
        await minor.expose_mm(await client.create_process("other"))
    mirror = await exposing
    await asyncio.gather(minor.close(), minor.close())
    assert mirror.released
    await minor.expose_mm(process)


async def test_minor_stays_free_when_exposing_fails(client: hmm_client.Client, minor: Minor) -> None:
    """A process that does not exist leaves the minor as it was."""
    with pytest.raises(hmm_client.mirror.HmmError, match="ESRCH"):
        await minor.expose_mm(client.process(1 << 40))
    await minor.expose_mm(await client.create_process("program"))


async def test_event_is_answered_after_the_accesses_that_began_before(minor: Minor, process: Process) -> None:
    """Many transfers against many discards: each reads either what was written or zeroes, never fails."""
    await minor.expose_mm(process)
    mapped = await process.mmap(4 * PAGE_SIZE)

    async def transfer() -> None:
        await minor.write(mapped.address, b"\xff" * 4 * PAGE_SIZE)
        data, _ = await minor.read(mapped.address, 4 * PAGE_SIZE)
        assert set(data) <= {0, 255}

    async def discard() -> None:
        await process.madvise(mapped.address, 4 * PAGE_SIZE, Advice.DONTNEED)

    await asyncio.gather(*(transfer() for _ in range(50)), *(discard() for _ in range(100)))


async def test_devices_are_four_with_four_minors(client: hmm_client.Client, process: Process) -> None:
    """Each device mirrors a process once; four devices may mirror the same one."""
    devices = await DummyDevices.register(client)
    for device in range(4):
        await devices.expose_mm(device, device, process.id)
    with pytest.raises(ConflictError, match="EINVAL"):
        await devices.expose_mm(0, 1, process.id)
    for device, minor in [(4, 0), (-1, 0), (0, 4)]:
        with pytest.raises(NoSuchObjectError, match=f"no minor {minor} of device {device}"):
            await devices.expose_mm(device, minor, process.id)
    for device in range(4):
        await devices.close(device, device)
