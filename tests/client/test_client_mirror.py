"""Devices and mirrors against a real daemon: what the core does reaches the driver's hands."""

from __future__ import annotations

import asyncio
import errno as errnos
from typing import TYPE_CHECKING

import numpy as np
import pytest

import hmm_client
from hmm import pte
from hmm.errors import (
    AccessDeniedError,
    BadAddressError,
    ConflictError,
    DeviceLostError,
    InUseError,
    NoSuchObjectError,
    WouldDeadlockError,
)
from hmm.events import EventType, Reason
from hmm.units import PAGE_SIZE, AddressRange, Entries
from hmm_client import Device, Driver, Event, Mirror, Process, Prot, TableDriver

if TYPE_CHECKING:
    pass


class Witness(TableDriver):
    """A device with a table, that remembers what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.released: list[Mirror] = []

    def update(self, event: Event) -> None:
        """Apply and remember."""
        super().update(event)
        self.events.append(event)

    def release(self, mirror: Mirror) -> None:
        """Drop and remember."""
        super().release(mirror)
        self.released.append(mirror)

    @property
    def heard(self) -> list[EventType]:
        """The types of all events."""
        return [event.type for event in self.events]


@pytest.fixture
async def device(client: hmm_client.Client, request: pytest.FixtureRequest) -> Device:
    """A device of its own for each test."""
    return await client.register_device(f"gpu of {request.node.name}"[:60])


async def test_fault_fills_the_devices_table_and_the_device_reads_and_writes(device: Device, process: Process) -> None:
    """A fault ends in an event with the entries; through them the device and the CPU see one memory."""
    driver = Witness()
    mirror = await device.mirror(process, driver)
    mapped = await process.mmap(8 * PAGE_SIZE)
    await process.write(mapped.address, b"cpu")
    faulted = await mirror.fault(mapped.span, write=True)
    assert faulted.writable.all()
    assert (faulted.pfns > 0).all()
    assert faulted.filled.tolist() == [mapped.span.end]
    assert driver.heard[-1] is EventType.DEVICE_WFAULT
    table = driver.table(mirror).pages.read(mapped.span.start, mapped.span.end)
    assert np.array_equal(table, faulted.entries)
    assert np.array_equal(await mirror.read_table(mapped.span), faulted.entries)
    await mirror.write([(mapped.address + 1, 2), (mapped.address + PAGE_SIZE - 1, 2)], b"xyzw")
    assert await mirror.read([(mapped.address, 3), (mapped.address + PAGE_SIZE, 1)]) == b"cxyw"
    assert await process.read(mapped.address, 3) == b"cxy"
    assert pte.pte_test_dirty(await mirror.read_table(mapped.span)).tolist()[:2] == [True, True]


async def test_event_says_why_when_memory_is_unmapped(device: Device, process: Process) -> None:
    """The event names ranges, the call, its caller, and the words of both interfaces."""
    driver = Witness()
    mirror = await device.mirror(process, driver)
    mapped = await process.mmap(4 * PAGE_SIZE)
    await mirror.fault(mapped.span)
    done = await process.munmap(mapped.address, 2 * PAGE_SIZE)
    event = driver.events[-1]
    assert (event.type, event.reason, event.cause) == (EventType.MUNMAP, Reason.UNMAP, "munmap")
    assert event.spans == (AddressRange(mapped.address, mapped.address + 2 * PAGE_SIZE),)
    assert (event.operation, event.operation_id, event.caller) == ("munmap", done.operation_id, "test")
    assert (event.pte_mask, event.blockable, event.owner, event.space_id) == (0, True, 0, mirror.space_id)
    assert event.deadline_s
    assert event.overlaps(mapped.page(0))
    assert driver.table(mirror).pages.read(mapped.address, mapped.address + 2 * PAGE_SIZE).tolist() == [0, 0]
    with pytest.raises(BadAddressError):
        await mirror.read([(mapped.address, 1)])


async def test_fault_takes_scattered_pages_when_given_an_array(device: Device, process: Process) -> None:
    """Any pages, one call; pages that cannot come leave 0 and their errno, if partial results are wanted."""
    mirror = await device.mirror(process, Driver(), fault_events=False)
    mapped = await process.mmap(64 * PAGE_SIZE)
    await process.munmap(mapped.page(32).start, PAGE_SIZE)
    numbers: Entries = np.array([1, 5, 32, 63], np.uint64)
    pages = np.uint64(mapped.address) + numbers * np.uint64(PAGE_SIZE)
    with pytest.raises(BadAddressError) as caught:
        await mirror.fault(pages)
    assert caught.value.address == mapped.page(32).start
    faulted = await mirror.fault(pages, partial=True)
    assert (faulted.entries != 0).tolist() == [True, True, False, True]
    assert isinstance(faulted.error, BadAddressError)


async def test_fault_is_refused_when_the_mapping_does_not_permit_it(device: Device, process: Process) -> None:
    """EACCES for writing where the CPU may only read; the read fault succeeds."""
    mirror = await device.mirror(process, Driver())
    mapped = await process.mmap(PAGE_SIZE, Prot.READ)
    with pytest.raises(AccessDeniedError):
        await mirror.fault(mapped.span, write=True)
    assert not (await mirror.fault(mapped.span)).writable.any()
    with pytest.raises(AccessDeniedError):
        await mirror.write([(mapped.address, 1)], b"x")


async def test_range_of_the_table_is_managed_by_the_driver(device: Device, process: Process) -> None:
    """dirty, discard, and bits of its own."""
    mirror = await device.mirror(process, Driver())
    mapped = await process.mmap(4 * PAGE_SIZE)
    await mirror.fault(mapped.span, write=True)
    await mirror.dirty(mapped.page(1))
    await mirror.set_driver_bits(mapped.page(2), 9)
    await mirror.discard(mapped.page(3))
    entries = await mirror.read_table(AddressRange(mapped.address - PAGE_SIZE, mapped.span.end))
    assert pte.pte_test_dirty(entries).tolist() == [False, False, True, False, False]
    assert pte.pte_driver(entries).tolist() == [0, 0, 0, 9, 0]
    assert (entries == 0).tolist() == [True, False, False, False, True]


async def test_dma_device_reads_by_dma_address(client: hmm_client.Client, process: Process) -> None:
    """A DMA device's entries are bus addresses."""
    device = await client.register_device("dma of a test", dma=True)
    mirror = await device.mirror(process, Driver())
    mapped = await process.mmap(2 * PAGE_SIZE)
    await process.write(mapped.address, b"x" * PAGE_SIZE + b"y" * PAGE_SIZE)
    addresses = (await mirror.fault(mapped.span)).dma_addresses.tolist()
    assert await mirror.read([(addresses[1], 1), (addresses[0], 1)], dma=True) == b"yx"
    await mirror.unregister()
    await device.unregister()


async def test_fork_write_protects_and_copy_on_write_migrates(device: Device, process: Process) -> None:
    """The parent's mirror hears FORK, and MIGRATE when its own write fault breaks copy-on-write."""
    driver = Witness()
    mirror = await device.mirror(process, driver)
    mapped = await process.mmap(PAGE_SIZE)
    await mirror.fault(mapped.span, write=True)
    child = await process.fork()
    assert driver.heard[-1] is EventType.FORK
    before = (await mirror.read_table(mapped.span))[0]
    await mirror.fault(mapped.span, write=True)
    assert driver.heard[-2:] == [EventType.MIGRATE, EventType.DEVICE_WFAULT]
    assert (await mirror.read_table(mapped.span))[0] >> np.uint64(12) != before >> np.uint64(12)
    assert child.id != process.id


async def test_release_comes_when_the_process_exits(device: Device, process: Process) -> None:
    """The end of the space is MUNMAP of everything, then `release`; the mirror is gone then."""
    driver = Witness()
    mirror = await device.mirror(process, driver)
    mapped = await process.mmap(PAGE_SIZE)
    await mirror.fault(mapped.span)
    await process.exit()
    assert driver.heard[-1] is EventType.MUNMAP
    assert driver.released == [mirror]
    with pytest.raises(NoSuchObjectError) as gone:
        await mirror.fault(mapped.span)
    assert gone.value.errno == errnos.ENODEV


async def test_mirror_is_refused_when_the_device_has_one_of_that_process(device: Device, process: Process) -> None:
    """One mirror for each pair of device and address space; unregistering makes room, and calls `release`."""
    driver = Witness()
    mirror = await device.mirror(process, driver)
    with pytest.raises(ConflictError, match="EINVAL"):
        await device.mirror(process, Driver())
    with pytest.raises(InUseError, match="EBUSY") as busy:
        await device.unregister()
    assert busy.value.reason == "IN_USE"
    await mirror.unregister()
    assert driver.released == [mirror]
    again = await device.mirror(process, Driver())
    assert again.id != mirror.id


async def test_unregister_is_refused_when_it_is_called_inside_a_callback(device: Device, process: Process) -> None:
    """It would wait for the callback that it is called in: EDEADLK."""
    errors = []

    class Leaving(Driver):
        async def update(self, event: Event) -> None:
            try:
                await event.mirror.unregister()
            except WouldDeadlockError as error:
                errors.append(error.errno)

    await device.mirror(process, Leaving())
    mapped = await process.mmap(PAGE_SIZE)
    await process.munmap(mapped.address, PAGE_SIZE)
    assert errors == [errnos.EDEADLK]


async def test_two_devices_hear_the_same_change_and_are_waited_for_together(
    client: hmm_client.Client, device: Device, process: Process
) -> None:
    """All mirrors are told at once: the second is told although the first has not answered."""
    both = asyncio.Barrier(2)

    class Meeting(Driver):
        async def update(self, event: Event) -> None:
            if not event.is_fault:
                await both.wait()

    other = await client.register_device("other device of a test")
    for one in (device, other):
        await one.mirror(process, Meeting())
    mapped = await process.mmap(PAGE_SIZE)
    assert (await process.munmap(mapped.address, PAGE_SIZE)).fenced_mirrors == ()
    assert both.n_waiting == 0


async def test_new_session_serves_new_mirrors_when_the_last_one_was_lost(
    client: hmm_client.Client, device: Device, process: Process
) -> None:
    """A broken stream loses its mirrors, not the device: the driver mirrors again, on a session of a new epoch."""
    losses = []

    class Losing(Driver):
        def lost(self, mirror: Mirror, why: str) -> None:
            losses.append((mirror.id, why))

    mirror = await device.mirror(process, Losing())
    session = await client.session()
    session._call.cancel()
    assert await session.wait_lost() == "cancelled"
    assert losses == [(mirror.id, "cancelled")]
    with pytest.raises(DeviceLostError):
        await mirror.fault(AddressRange(0, PAGE_SIZE))
    driver = Witness()
    again = await device.mirror(process, driver)
    assert (await client.session()).welcome.epoch > session.welcome.epoch
    mapped = await process.mmap(PAGE_SIZE)
    await again.fault(mapped.span)
    assert (await process.munmap(mapped.address, PAGE_SIZE)).fenced_mirrors == ()
    assert driver.heard[-1] is EventType.MUNMAP


async def test_fault_and_unmap_race_without_a_stale_entry(device: Device, process: Process) -> None:
    """Whatever the order of faults and events, in the end the device's table is the daemon's."""
    driver = Witness()
    mirror = await device.mirror(process, driver)
    mapped = await process.mmap(64 * PAGE_SIZE)

    async def fault(turn: int) -> None:
        await mirror.fault(mapped.page(turn % 64), write=bool(turn % 2))

    async def discard(turn: int) -> None:
        await process.madvise(mapped.page(turn % 64).start, PAGE_SIZE, hmm_client.Advice.DONTNEED)

    await asyncio.gather(*(fault(turn * 7) for turn in range(200)), *(discard(turn * 5) for turn in range(200)))
    theirs = await mirror.read_table(mapped.span)
    ours = driver.table(mirror).pages.read(mapped.span.start, mapped.span.end)
    assert np.array_equal(theirs, ours)


# ---- mistakes


async def test_mirror_names_the_mistake_when_its_driver_is_none(device: Device, process: Process) -> None:
    """A class, or a driver of the other interface, is found when it is handed over and not when it is called."""
    with pytest.raises(TypeError, match=r"Witness is a class; a driver is an instance of one: Witness\(\.\.\.\)"):
        await device.mirror(process, Witness)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="IntervalDriver has no method `update`; here a Driver is needed"):
        await device.mirror(process, hmm_client.IntervalDriver())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Witness has no method `invalidate`; here a IntervalDriver is needed"):
        await device.attach(process, Witness())  # type: ignore[arg-type]


async def test_calls_name_the_mistake_when_an_address_stands_for_a_range(device: Device, process: Process) -> None:
    """Ranges and segments are told from numbers before anything is sent."""
    mirror = await device.mirror(process, Witness())
    for wrong in (4096, (4096, 8192)):
        with pytest.raises(TypeError, match="an AddressRange, several, or an array of addresses; not "):
            await mirror.fault(wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"segments are pairs \(address, length\), in a list; not "):
            await mirror.read(wrong)  # type: ignore[arg-type]


async def test_mirror_says_what_its_driver_answered_when_that_was_its_end(
    device: Device, process: Process, caplog: pytest.LogCaptureFixture
) -> None:
    """An invalidation cannot be refused: the log has the error, and whatever is asked of the mirror later does."""

    class Refusing(Driver):
        async def update(self, event: Event) -> None:
            if event.type is EventType.MIGRATE:
                raise WouldDeadlockError("forgotten")

    span = (await process.mmap(PAGE_SIZE)).span
    mirror = await device.mirror(process, Refusing())
    await mirror.fault(span)
    await process.madvise(span.start, PAGE_SIZE, hmm_client.Advice.DONTNEED)
    with pytest.raises(NoSuchObjectError, match="was released: its driver answered MIGRATE #2 with EIO"):
        await mirror.fault(span)
    assert "MIGRATE" in caplog.text
    assert "ends a mirror of 2015: EDEADLK: forgotten" in caplog.text
