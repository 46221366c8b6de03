"""A driver of today's interface that is right, and ones that are wrong in exactly one way, as in `wrong_driver.py`.

Each keeps a table of its own: frame words by page.  Odd pages are moved to the device's memory before they are used.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from hmm.commands_hmm import RangeFaulted
from hmm.errors import HmmError, NoSuchObjectError, RangeBusyError
from hmm.events import Reason
from hmm.migration import moving_frames
from hmm.range_fault import REQ_FAULT, REQ_WRITE, WRITE, word_pfns
from hmm.units import PAGE_SIZE, AddressRange, Entries
from hmm_client import Client, Device, Event, IntervalDriver, IntervalMirror, IntervalNotifier
from hmm_client.drivers.accesses import Accesses
from hmm_client.drivers.control import Operation, decode, driver_command, encode
from hmm_client.migration import Migration

LATENCY_S = 0.002
"""How long the device's accesses take: whoever answers events must wait for them."""


@dataclass(eq=False)
class Attached:
    """One process."""

    mirror: IntervalMirror
    notifier: IntervalNotifier
    table: dict[int, int] = field(default_factory=dict)
    accesses: Accesses = field(default_factory=Accesses)

    def drop(self, event: Event) -> None:
        """Forget what an event takes."""
        for address in [address for address in self.table if event.overlaps(AddressRange(address, address + 1))]:
            del self.table[address]


class RightDriver(IntervalDriver):
    """Does everything right."""

    latency_s = LATENCY_S

    def __init__(self, client: Client, device: Device) -> None:
        self.client = client
        self.device = device
        self.attached: dict[int, Attached] = {}

    def of(self, mirror: IntervalMirror) -> Attached:
        """What belongs to a mirror."""
        return next(one for one in self.attached.values() if one.mirror is mirror)

    # ---- what the daemon calls

    async def invalidate(self, event: Event) -> None:
        """Change the table, then wait for what uses it."""
        attached = self.of(event.mirror)  # type: ignore[arg-type]
        attached.drop(event)
        await attached.accesses.ended(event)

    # ---- what it is asked

    async def mirror(self, process: int) -> None:
        """Mirror a process."""
        mirror = await self.device.attach(self.client.process(process), self)
        self.attached[process] = Attached(mirror, await mirror.insert(0, mirror.address_end))

    async def unmirror(self, process: int) -> None:
        """Mirror it no more."""
        mirror = self.attached[process].mirror
        if not mirror.lost:
            await mirror.detach()
        del self.attached[process]

    async def read(self, process: int, address: int, length: int) -> dict[str, str]:
        """Let the device read."""
        return {"data": encode(await self.access(self.attached[process], address, length, None))}

    async def write(self, process: int, address: int, data: str) -> None:
        """Let the device write."""
        content = decode(data)
        await self.access(self.attached[process], address, len(content), content)

    # ---- the device

    async def access(self, attached: Attached, address: int, length: int, data: bytes | None) -> bytes:
        """Fault in what is missing, then access it."""
        span = AddressRange(address, address + length).page_aligned()
        pages = range(span.start, span.end, PAGE_SIZE)
        wanted = WRITE if data is not None else 0
        if address // PAGE_SIZE % 2 and any(page not in attached.table for page in pages):
            await self.move(attached, span)
        while any(page not in attached.table or attached.table[page] & wanted != wanted for page in pages):
            await self.fault(attached, span, write=data is not None)
        mirror, heard = attached.mirror, attached.mirror.heard
        pfns = word_pfns(np.array([attached.table[page] for page in pages], np.uint64))
        with attached.accesses.to(address, length):
            await asyncio.sleep(self.latency_s)
            addresses, offset = np.array(pages, np.uint64), address % PAGE_SIZE
            if data is None:
                return await mirror.read_frames(addresses, pfns, offset=offset, length=length, heard=heard)
            await mirror.write_frames(addresses, pfns, data, offset=offset, heard=heard)
            return b""

    async def move(self, attached: Attached, span: AddressRange) -> None:
        """Move pages to the device, if they can be moved; what they are there is faulted as everything is."""
        try:
            await attached.mirror.migrate_to_device(span)
        except HmmError:
            return  # they are a file's, or nothing is mapped there

    async def fault(self, attached: Attached, span: AddressRange, *, write: bool) -> None:
        """Begin a read section, fault, and take the result if no event has come meanwhile."""
        sequence = await attached.notifier.read_begin()
        flags = REQ_FAULT | (REQ_WRITE if write else 0)
        try:
            faulted = await attached.notifier.range_fault(span, sequence, flags)
        except RangeBusyError:
            return
        if await self.has_changed(attached, span, sequence, faulted):
            return
        words = faulted.words.tolist()
        if write and not all(word & WRITE for word in words):
            await attached.mirror.migrate_to_system(span)  # nobody makes a page of the device's own writable
            return
        attached.table.update(zip(range(span.start, span.end, PAGE_SIZE), words, strict=True))

    async def has_changed(self, attached: Attached, span: AddressRange, sequence: int, faulted: RangeFaulted) -> bool:
        """Whether a read section has to be repeated: by the daemon, and by what was heard since it said so."""
        notifier = attached.notifier
        return await notifier.read_retry(sequence) or notifier.is_stale(span, faulted)


# ---- and the wrong ones, each by the rule that it breaks


class StaleFault(RightDriver):
    """Skips mmu_interval_read_retry()."""

    async def has_changed(self, *_: object) -> bool:
        """Never."""
        return False


class UseAfterInvalidation(RightDriver):
    """Keeps its pages when their memory is unmapped or discarded."""

    async def invalidate(self, event: Event) -> None:
        """Heed protections only; what is under way ends."""
        attached = self.of(event.mirror)  # type: ignore[arg-type]
        if event.reason in (Reason.PROTECTION_VMA, Reason.PROTECTION_PAGE):
            attached.drop(event)
        await attached.accesses.ended(event)

    async def migrate_to_ram(self, event: Event) -> None:
        """As it should."""
        await super().invalidate(event)


class DevicePagesKept(RightDriver):
    """Goes on using pages of its memory that went back to the CPU: breaks `use-after-invalidation`."""

    async def invalidate(self, event: Event) -> None:
        """Ignore migrations."""
        if event.reason is not Reason.MIGRATE:
            await super().invalidate(event)
        await self.of(event.mirror).accesses.ended(event)  # type: ignore[arg-type]

    async def migrate_to_ram(self, event: Event) -> None:
        """Forget to forget."""
        await self.of(event.mirror).accesses.ended(event)  # type: ignore[arg-type]


class EarlyAcknowledgement(RightDriver):
    """Answers while accesses are under way, which take so long that events come meanwhile."""

    latency_s = 25 * LATENCY_S

    async def invalidate(self, event: Event) -> None:
        """Change the table only."""
        self.of(event.mirror).drop(event)  # type: ignore[arg-type]


class WriteAfterWriteProtect(RightDriver):
    """Goes on writing where it may only read."""

    async def invalidate(self, event: Event) -> None:
        """Ignore what takes no page."""
        if event.reason is not Reason.PROTECTION_VMA:
            await super().invalidate(event)
        await self.of(event.mirror).accesses.ended(event)  # type: ignore[arg-type]


class Unanswered(RightDriver):
    """Hangs in a callback."""

    async def invalidate(self, event: Event) -> None:
        """Never return when memory is discarded."""
        if event.reason is Reason.CLEAR:
            await asyncio.Event().wait()
        await super().invalidate(event)


class Migrates(RightDriver):
    """Takes the steps of migrations."""

    async def migrate(self, process: int, start: int, end: int) -> None:
        """Move what can be moved."""
        async with self.attached[process].mirror.migrate_vma(AddressRange(start, end)) as migration:
            await self.go_on(migration)

    async def go_on(self, migration: Migration) -> None:
        """Take the steps between setup and finalize."""
        dst = migration.destinations(await migration.allocate(migration.movable.size))
        await self.copy(migration, dst)
        await migration.pages(dst)

    async def copy(self, migration: Migration, dst: Entries) -> None:
        """Fill the destinations."""
        await migration.copy(dst)


class LeaseOver(Migrates):
    """Hangs between two steps."""

    async def go_on(self, migration: Migration) -> None:
        """Never return."""
        await asyncio.Event().wait()


class LeaseOverAtLast(Migrates):
    """Takes its time before the last step, and says that all is well."""

    async def go_on(self, migration: Migration) -> None:
        """Wait until the lease is over for certain: somebody else has the pages."""
        await super().go_on(migration)
        while not migration.over:
            await asyncio.sleep(2 * migration.lease_s)
            with suppress(NoSuchObjectError):
                await migration.renew()


class Unfinalized(Migrates):
    """Goes on without finalizing."""

    async def migrate(self, process: int, start: int, end: int) -> None:
        """Take all steps but the last."""
        migration = self.attached[process].mirror.migrate_vma(AddressRange(start, end))
        await migration.set_up()
        await self.go_on(migration)


class LostContents(Migrates):
    """Fills no destination."""

    async def copy(self, migration: Migration, dst: Entries) -> None:
        """Do nothing."""


class MixedContents(Migrates):
    """Fills destinations with each other's contents: breaks `lost-contents`."""

    async def copy(self, migration: Migration, dst: Entries) -> None:
        """Copy each page where the next one goes."""
        sources, targets = moving_frames(migration.src, dst)
        await migration.copy_frames(sources, np.roll(targets, 1))


class DiedInMigration(Migrates):
    """Ends between two steps: breaks `died`."""

    async def copy(self, migration: Migration, dst: Entries) -> None:
        """Exit."""
        os._exit(7)


DRIVERS = {
    "today-right": RightDriver,
    "today-stale-fault": StaleFault,
    "today-use-after-invalidation": UseAfterInvalidation,
    "today-device-pages-kept": DevicePagesKept,
    "today-early-acknowledgement": EarlyAcknowledgement,
    "today-write-after-write-protect": WriteAfterWriteProtect,
    "today-unanswered": Unanswered,
    "today-migrates": Migrates,
    "today-lease-over": LeaseOver,
    "today-lease-over-at-last": LeaseOverAtLast,
    "today-unfinalized": Unfinalized,
    "today-lost-contents": LostContents,
    "today-mixed-contents": MixedContents,
    "today-died-in-migration": DiedInMigration,
}


async def certified(client: Client) -> Mapping[str, Operation]:
    """Register a device; what `hmm_client.certify` asks of it."""
    driver = DRIVERS[KIND](client, await client.register_device(KIND, memory_pages=256))
    names = ("mirror", "unmirror", "read", "write", "migrate")
    return {name: getattr(driver, name) for name in names if hasattr(driver, name)}


KIND = sys.argv.pop(1)
driver_command("wrong", certified, certified)()
