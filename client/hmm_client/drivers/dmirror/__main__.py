"""The kernel's HMM test driver as a process: today's interface, with a table of the driver's own.

Serves JSON lines, the ioctls of /dev/hmm_dmirror<n>: open, close, read, read_unlocked, write, migrate_to_device,
migrate_to_system, snapshot, exclusive, check_exclusive, release, flags (given as npages).  Addresses are bytes, sizes
pages.

**Source**: Linux lib/test_hmm.c, lib/test_hmm_uapi.h, 6.12 and 7.0.

**Invariants**: every ioctl runs on a thread of its own, as a system call does: what waits keeps nobody else waiting.

**Absent**: the driver itself (`hmm_client.drivers.dmirror`).
"""

from __future__ import annotations

import asyncio
import errno as errnos
import itertools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from hmm.errors import ConflictError, HmmError, NoSuchObjectError
from hmm.units import PAGE_MASK, PAGE_SHIFT
from hmm_client import sync
from hmm_client.client import Client
from hmm_client.drivers.control import Mirrored, Operation, decode, driver_command, encode
from hmm_client.drivers.dmirror import Card, Handle, Reply, load
from hmm_client.drivers.over_wire import OverWireHmm, SteppedOverWireHmm

T = TypeVar("T")

THREADS = 64
"""How many ioctls can be under way."""
MEMORY_PAGES = 1 << 10
"""Of each device."""


class Threads:
    """Where ioctls run."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS, "dmirror")

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function there."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)


class Ioctls:
    """The devices as other processes use them."""

    def __init__(self, cards: list[Card], threads: Threads) -> None:
        self._cards = cards
        self._threads = threads
        self._handles: dict[int, Handle] = {}
        self._numbers = itertools.count(1)

    async def open(self, device: int, process: int) -> dict[str, int]:
        """Open the device file for the process of this id: mirror it."""
        if device not in range(len(self._cards)):
            raise NoSuchObjectError(f"there is no device {device}: 0 to {len(self._cards) - 1}", errnos.ENODEV)
        handle = await self._threads.run(self._cards[device].open, process)
        number = next(self._numbers)
        self._handles[number] = handle
        return {"handle": number}

    async def close(self, handle: int) -> None:
        """Close it."""
        closed = self._find(handle)
        del self._handles[handle]  # nobody else closes it
        await self._threads.run(closed.close)

    async def read(self, handle: int, address: int, npages: int) -> dict[str, int | str]:
        """HMM_DMIRROR_READ."""
        return await self._ioctl(self._find(handle).read, address, npages)

    async def write(self, handle: int, address: int, data: str) -> dict[str, int | str]:
        """HMM_DMIRROR_WRITE."""
        return await self._ioctl(self._find(handle).write, address, decode(data))

    def _find(self, handle: int) -> Handle:
        if handle not in self._handles:
            raise NoSuchObjectError(f"there is no handle {handle}", reason="HANDLE")
        return self._handles[handle]

    async def _ioctl(self, function: Callable[..., Reply], *arguments: Any) -> dict[str, int | str]:
        reply = await self._threads.run(function, *arguments)
        return {"cpages": reply.cpages, "faults": reply.faults, "data": encode(reply.data)}

    def operations(self) -> Mapping[str, Operation]:
        """All of them, by name."""

        def on_range(name: str) -> Operation:
            async def operation(handle: int, address: int, npages: int) -> dict[str, int | str]:
                return await self._ioctl(getattr(self._find(handle), name), address, npages)

            return operation

        ranges = (
            "read_unlocked",
            "migrate_to_device",
            "migrate_to_system",
            "snapshot",
            "exclusive",
            "check_exclusive",
            "release",
            "flags",
        )
        made = {name: on_range(name) for name in ranges}
        return made | {"open": self.open, "close": self.close, "read": self.read, "write": self.write}


async def operations(client: Client) -> Mapping[str, Operation]:
    """Load the driver; its ioctls by name."""
    threads = Threads()
    hmm = OverWireHmm(sync.around(client))
    cards = await threads.run(lambda: load(hmm, pages=MEMORY_PAGES))
    return Ioctls(cards, threads).operations()


class CertifiedMirror:
    """A device as `hmm_client.certify` drives it: every other page is moved to its memory before it is used there.

    Of several pages that it is told to move it takes the steps itself, as the kernel's driver does.
    """

    def __init__(self, card: Card, threads: Threads) -> None:
        self._card = card
        self._threads = threads
        self._handles: Mirrored[Handle] = Mirrored()

    async def mirror(self, process: int) -> None:
        """Open the device file."""
        if process in self._handles:
            raise ConflictError(f"process {process} is mirrored already")
        self._handles[process] = await self._threads.run(self._card.open, process)

    async def unmirror(self, process: int) -> None:
        """Close it."""
        await self._threads.run(self._handles[process].close)
        del self._handles[process]

    async def read(self, process: int, address: int, length: int) -> dict[str, str]:
        """The device reads."""
        return {"data": encode(await self._threads.run(self._load, self._handles[process], address, length))}

    async def write(self, process: int, address: int, data: str) -> None:
        """The device writes."""
        await self._threads.run(self._store, self._handles[process], address, decode(data))

    async def migrate(self, process: int, start: int, end: int) -> None:
        """The device takes pages to its memory, those that can be moved."""
        handle, npages = self._handles[process], (end - start) >> PAGE_SHIFT
        with suppress(NoSuchObjectError):  # not all of them
            await self._threads.run(handle.migrate_to_device, start, npages)

    def _load(self, handle: Handle, address: int, length: int) -> bytes:
        _move(handle, address)
        return handle.load(address, length)

    def _store(self, handle: Handle, address: int, data: bytes) -> None:
        _move(handle, address)
        handle.store(address, data)


def _move(handle: Handle, address: int) -> None:
    if (address >> PAGE_SHIFT) % 2:
        with suppress(HmmError):  # it may be a file's, or gone, or there already
            handle.migrate_to_device(address & PAGE_MASK, 1)


async def certified(client: Client) -> Mapping[str, Operation]:
    """Register one device; what `hmm_client.certify` asks of it."""
    threads = Threads()
    hmm = SteppedOverWireHmm(sync.around(client))
    served = CertifiedMirror(await threads.run(lambda: Card(hmm, "dmirror0", pages=MEMORY_PAGES)), threads)
    return {name: getattr(served, name) for name in ("mirror", "unmirror", "read", "write", "migrate")}


main = driver_command("dmirror", operations, certified)

if __name__ == "__main__":
    main()
