"""A driver that takes the steps of migrations as its control socket tells it, and one step at a time.

attach     attach to a process                     setup      begin a migration of a range
fill       allocate, copy and say where pages go   finalize   end it; with `abort`, give it up
pin        pin a range                             state      why the mirror was lost
"""

from __future__ import annotations

from collections.abc import Mapping

from hmm.errors import HmmError, NoSuchObjectError
from hmm.migration import Select
from hmm.units import AddressRange
from hmm_client import Client, Device, IntervalDriver, IntervalMirror, Process
from hmm_client.drivers.control import Operation, driver_command
from hmm_client.migration import Migration

MEMORY_PAGES = 64


class SteppingDriver(IntervalDriver):
    """Does as it is told."""

    def __init__(self, client: Client, device: Device) -> None:
        self._client = client
        self._device = device
        self._process: Process | None = None
        self._mirror: IntervalMirror | None = None
        self._migration: Migration | None = None
        self._lost = ""

    def lost(self, mirror: IntervalMirror, why: str) -> None:
        """Remember."""
        self._lost = why

    async def attach(self, process: int) -> int:
        """Attach to a process."""
        self._process = self._client.process(process)
        self._mirror = await self._device.attach(self._process, self)
        return self._mirror.id

    async def setup(self, start: int, end: int, select: int = Select.SYSTEM) -> int:
        """Begin a migration."""
        assert self._mirror is not None
        self._migration = self._mirror.migrate_vma(AddressRange(start, end), select=select)
        await self._migration.set_up()
        return int(self._migration.movable.size)

    async def fill(self) -> int:
        """Allocate, copy, and say where the pages go.  Returns: how many they are; 0 when the migration has ended."""
        migration = self._current
        try:
            dst = migration.destinations(await migration.allocate(migration.movable.size))
            await migration.copy(dst)
            await migration.pages(dst)
        except NoSuchObjectError:
            return 0
        return int(migration.movable.size)

    async def finalize(self, *, abort: bool = False) -> str:
        """End the migration.  Returns: how the daemon refused it; empty when it did not."""
        try:
            await (self._current.abort() if abort else self._current.finalize())
        except HmmError as error:
            return str(error)
        return ""

    async def pin(self, start: int, end: int) -> int:
        """Pin a range."""
        assert self._process is not None
        return (await self._process.pin(AddressRange(start, end), write=True)).id

    async def state(self) -> str:
        """Why the mirror was lost; empty while it lives."""
        return self._lost

    @property
    def _current(self) -> Migration:
        assert self._migration is not None
        return self._migration


async def operations(client: Client) -> Mapping[str, Operation]:
    """Register a device; what may be asked of it, by name."""
    device = await client.register_device("stepping", memory_pages=MEMORY_PAGES)
    driver = SteppingDriver(client, device)
    return {name: getattr(driver, name) for name in ("attach", "setup", "fill", "finalize", "pin", "state")}


main = driver_command("stepping", operations)

if __name__ == "__main__":
    main()
