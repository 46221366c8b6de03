"""The dummy driver of the 2015 series: devices that read and write the memory of processes.

Four devices with four minors each; a minor mirrors one process after EXPOSE_MM.  READ and WRITE go through the device's
own page table, faulting in what is missing, and count the pages they touched; MIGRATE moves pages to the 32 MiB of
memory that each device has, where READ and WRITE find them.  Serves its ioctls as JSON lines: expose_mm, read, write,
migrate, close.

**Source**: "HMM/dummy: dummy driver for testing and showcasing the HMM API"; its test suite says what must hold;
"HMM/dummy: add fake device memory to dummy HMM device driver".

**Invariants**: an event is answered when no access through what it took is under way.

**Absent**: moving pages back: whoever touches them does it.
"""

from __future__ import annotations

import errno as errnos
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from hmm import pte
from hmm.errors import InUseError, InvalidRequestError, NoSuchObjectError
from hmm.units import PAGE_SHIFT, PAGE_SIZE, Address, AddressRange, Entries, page_down
from hmm_client.client import Client
from hmm_client.device import Device
from hmm_client.device_memory import MemoryDriver
from hmm_client.drivers.accesses import Accesses, accessed
from hmm_client.drivers.control import Mirrored, Operation, decode, driver_command, encode
from hmm_client.event import Event
from hmm_client.mirror import Mirror
from hmm_client.process import Process

DEVICES = 4
MINORS = 4
MEMORY_PAGES = 32 << 20 >> PAGE_SHIFT
"""HMM_DUMMY_RMEM_SIZE: of each device."""
TRANSFER_BYTES = 1 << 20
"""One transfer of the device; larger requests are cut at multiples of this address."""


@dataclass(slots=True)
class Counters:
    """What one READ or WRITE touched.

    Attributes:
        nsys_pages, ndev_pages: pages that were in system memory, in device memory.
        nfaulted_sys_pages, nfaulted_dev_pages: of these, pages that had to be faulted in.
    """

    nsys_pages: int = 0
    nfaulted_sys_pages: int = 0
    ndev_pages: int = 0
    nfaulted_dev_pages: int = 0


class DummyDriver(MemoryDriver):
    """What the daemon calls, for one device."""

    def __init__(self) -> None:
        super().__init__(MEMORY_PAGES)
        self._accesses: dict[int, Accesses] = {}

    def accesses(self, mirror: Mirror) -> Accesses:
        """The accesses under way through a mirror."""
        return self._accesses.setdefault(mirror.id, Accesses())

    async def update(self, event: Event) -> None:
        """Change the table first, so that nothing new starts; then wait for what has started."""
        self.table(event.mirror).apply(event)
        if not event.is_fault:
            await self.accesses(event.mirror).ended(event)

    async def release(self, mirror: Mirror) -> None:
        """The address space ends."""
        super().release(mirror)
        await self.accesses(mirror).all_ended()
        del self._accesses[mirror.id]


class Minor:
    """One opened /dev/hmm_dummy_device: mirrors one process."""

    def __init__(self, device: Device, driver: DummyDriver) -> None:
        self._device = device
        self._driver = driver
        self._mirror: Mirror | None = None
        self._busy = False

    async def expose_mm(self, process: Process) -> Mirror:
        """HMM_DUMMY_EXPOSE_MM: mirror a process from now on.

        Raises:
            InUseError: this minor mirrors a process already (EBUSY).
        """
        if self._busy:
            raise InUseError("expose_mm: this minor mirrors a process already")
        self._busy = True
        try:
            self._mirror = await self._device.mirror(process, self._driver)
        except BaseException:
            self._busy = False
            raise
        return self._mirror

    async def read(self, address: Address, size: int) -> tuple[bytes, Counters]:
        """HMM_DUMMY_READ: the device reads `size` bytes of the process.

        Raises:
            InvalidRequestError: no process is mirrored, or none has such bytes (EINVAL).
            BadAddressError: nothing readable is mapped at `error.address` (EFAULT).
            AccessDeniedError: the mapping there is not readable (EACCES).
        """
        counters = Counters()
        pieces = self._pieces("read", address, size)
        return b"".join([await self._transfer(at, length, None, counters) for at, length in pieces]), counters

    async def write(self, address: Address, data: bytes) -> Counters:
        """HMM_DUMMY_WRITE: the device writes bytes to the process.

        Raises: as `read`, for writing; what lies below the piece that failed is written.
        """
        counters = Counters()
        for at, length in self._pieces("write", address, len(data)):
            await self._transfer(at, length, data[at - address : at - address + length], counters)
        return counters

    async def migrate(self, address: Address, size: int) -> Counters:
        """HMM_DUMMY_MIGRATE_TO: move a range of private memory to the device.

        Returns: of its pages, how many are in device memory now, and how many of these had to be moved there.

        Raises:
            BadAddressError: a part is not mapped (EFAULT).
            InvalidRequestError: a part is not private anonymous memory; or as `read` (EINVAL).
            OutOfFramesError: the device is full; what moved has moved (ENOMEM).
        """
        mirror = self._exposed()
        span = accessed("migrate", address, size)
        if not span:
            return Counters()
        span = span.page_aligned()
        moved = await mirror.migrate(span)
        in_device = int(np.count_nonzero(pte.pte_test_valid_dev(moved.entries)))
        return Counters(span.npages - in_device, 0, in_device, moved.npages)

    async def close(self) -> None:
        """Close the file: the mirror is unregistered, and the minor is free again."""
        mirror, self._mirror = self._mirror, None
        if mirror is None:
            return  # it is not open, or not yet; or somebody else is closing it
        try:
            if not mirror.lost:
                await mirror.unregister()
        finally:
            self._busy = False

    async def _transfer(self, address: Address, length: int, data: bytes | None, counters: Counters) -> bytes:
        mirror = self._exposed()
        write = data is not None
        while True:
            table = self._driver.table(mirror)
            missing = table.missing(address, length, write=write)
            if not missing.size:
                break
            # Ends in `update` with the entries; an invalidation may take them back before we look again.
            await mirror.fault(missing, write=write, omit_entries=True)
            faulted_there = int(np.count_nonzero(pte.pte_test_valid_dev(table.pages.lookup(missing))))
            counters.nfaulted_dev_pages += faulted_there
            counters.nfaulted_sys_pages += missing.size - faulted_there
        entries = table.pages.read(page_down(address), page_down(address + length - 1) + PAGE_SIZE)
        in_device = pte.pte_test_valid_dev(entries)
        counters.ndev_pages += int(np.count_nonzero(in_device))
        counters.nsys_pages += int(np.count_nonzero(~in_device))
        with self._driver.accesses(mirror).to(address, length):
            if not in_device.any():
                return await _in_system(mirror, address, length, data, entries)
            parts = [
                await self._access(mirror, piece, entries, address, data) for piece in _runs(address, length, in_device)
            ]
            return b"".join(parts)

    async def _access(
        self, mirror: Mirror, piece: tuple[Address, int], entries: Entries, start: Address, data: bytes | None
    ) -> bytes:
        """Read or write a piece that is all in system memory, or all in the device's."""
        at, length = piece
        part = None if data is None else data[at - start : at - start + length]
        first = (page_down(at) - page_down(start)) >> PAGE_SHIFT
        own = entries[first : first + AddressRange(at, at + length).npages]
        if not pte.pte_test_valid_dev(int(own[0])):
            return await _in_system(mirror, at, length, part, own)
        memory, offset = self._driver.memory, at - page_down(at)
        if part is None:
            return memory.read(own).reshape(-1)[offset : offset + length].tobytes()
        memory.write(own, offset, part)
        return b""

    def _pieces(self, operation: str, address: Address, size: int) -> list[tuple[Address, int]]:
        self._exposed()
        return _transfers(accessed(operation, address, size))

    def _exposed(self) -> Mirror:
        if self._mirror is None:
            raise InvalidRequestError("this minor mirrors no process")
        return self._mirror


async def _in_system(mirror: Mirror, address: Address, length: int, data: bytes | None, entries: Entries) -> bytes:
    if data is None:
        return await mirror.read([(address, length)], entries=entries)
    await mirror.write([(address, length)], data, entries=entries)
    return b""


def _runs(address: Address, length: int, in_device: npt.NDArray[np.bool_]) -> list[tuple[Address, int]]:
    """Cut a transfer where memory changes from the system's to the device's or back."""
    changes = np.flatnonzero(in_device[1:] != in_device[:-1]) + 1
    inner = (page_down(address) + (changes << PAGE_SHIFT)).tolist()
    bounds = [address, *inner, address + length]
    return [(start, stop - start) for start, stop in pairwise(bounds)]


def _transfers(span: AddressRange) -> list[tuple[Address, int]]:
    cuts = range((span.start // TRANSFER_BYTES + 1) * TRANSFER_BYTES, span.end, TRANSFER_BYTES)
    return [(start, stop - start) for start, stop in pairwise([span.start, *cuts, span.end]) if stop > start]


class DummyDevices:
    """All devices of the driver, as another process drives them."""

    def __init__(self, client: Client, minors: list[list[Minor]]) -> None:
        self._client = client
        self._minors = minors

    @classmethod
    async def register(cls, client: Client) -> DummyDevices:
        """Register the four devices."""
        minors = []
        for number in range(DEVICES):
            name, driver = f"hmm_dummy_device{number}", DummyDriver()
            device = await client.register_device(name, memory_pages=MEMORY_PAGES, driver_copies=True)
            minors.append([Minor(device, driver) for _ in range(MINORS)])
        return cls(client, minors)

    async def expose_mm(self, device: int, minor: int, process: int) -> dict[str, int]:
        """Mirror the process of this id."""
        mirror = await self._minor(device, minor).expose_mm(self._client.process(process))
        return {"mirror": mirror.id}

    async def read(self, device: int, minor: int, address: int, size: int) -> dict[str, int | str]:
        """Read bytes."""
        data, counters = await self._minor(device, minor).read(address, size)
        return {"data": encode(data), **asdict(counters)}

    async def write(self, device: int, minor: int, address: int, data: str) -> dict[str, int]:
        """Write bytes."""
        return asdict(await self._minor(device, minor).write(address, decode(data)))

    async def migrate(self, device: int, minor: int, address: int, size: int) -> dict[str, int]:
        """Move pages to the device."""
        return asdict(await self._minor(device, minor).migrate(address, size))

    async def close(self, device: int, minor: int) -> None:
        """Stop mirroring."""
        await self._minor(device, minor).close()

    def _minor(self, device: int, minor: int) -> Minor:
        if device not in range(DEVICES) or minor not in range(MINORS):
            there = f"devices 0 to {DEVICES - 1} have minors 0 to {MINORS - 1}"
            raise NoSuchObjectError(f"there is no minor {minor} of device {device}: {there}", errnos.ENODEV)
        return self._minors[device][minor]


async def operations(client: Client) -> Mapping[str, Operation]:
    """Register the devices; their ioctls by name."""
    devices = await DummyDevices.register(client)
    return {name: getattr(devices, name) for name in ("expose_mm", "read", "write", "migrate", "close")}


class CertifiedDummy:
    """The devices as `hmm_client.certify` drives them: a minor for each process."""

    def __init__(self, client: Client, device: Device) -> None:
        self._client = client
        self._device = device
        self._driver = DummyDriver()
        self._minors: Mirrored[Minor] = Mirrored()

    async def mirror(self, process: int) -> None:
        """Open a minor and expose the process."""
        minor = Minor(self._device, self._driver)
        await minor.expose_mm(self._client.process(process))
        self._minors[process] = minor

    async def unmirror(self, process: int) -> None:
        """Close it."""
        await self._minors[process].close()
        del self._minors[process]

    async def read(self, process: int, address: int, length: int) -> dict[str, str]:
        """HMM_DUMMY_READ."""
        data, _ = await self._minors[process].read(address, length)
        return {"data": encode(data)}

    async def write(self, process: int, address: int, data: str) -> None:
        """HMM_DUMMY_WRITE."""
        await self._minors[process].write(address, decode(data))


async def certified(client: Client) -> Mapping[str, Operation]:
    """Register one device; what `hmm_client.certify` asks of it."""
    served = CertifiedDummy(client, await client.register_device("hmm_dummy_device0"))
    return {"mirror": served.mirror, "unmirror": served.unmirror, "read": served.read, "write": served.write}


main = driver_command("dummy", operations, certified)

if __name__ == "__main__":
    main()
