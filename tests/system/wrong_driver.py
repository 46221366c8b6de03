"""A driver that is right, and one that is wrong in exactly one way: `wrong_driver.py early-acknowledgement`.

It is made with the client library, keeps a table of its own and takes orders of `hmmctl certify`.
"""

from __future__ import annotations

import asyncio
import errno as errnos
import os
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from hmm.errors import NoSuchObjectError, OutOfFramesError
from hmm.events import EventType
from hmm.receiver import DeadlinePolicy
from hmm.units import PAGE_SIZE, AddressRange, Entries
from hmm_client import Client, Device, Event, Mirror, TableDriver
from hmm_client.drivers.accesses import Accesses
from hmm_client.drivers.control import Operation, decode, driver_command, encode
from hmm_proto.convert import entries_from_proto, entries_to_proto
from hmm_proto.v1 import device_pb2, event_pb2

LATENCY_S = 0.002
"""How long the device's accesses take: whoever answers events must wait for them."""


class RightDriver(TableDriver):
    """Does everything right."""

    latency_s = LATENCY_S
    policy = DeadlinePolicy.FENCE

    def __init__(self, client: Client, device: Device) -> None:
        super().__init__()
        self.client = client
        self.device = device
        self.mirrors: dict[int, Mirror] = {}
        self.accesses: dict[int, Accesses] = {}

    # ---- what the daemon calls

    async def update(self, event: Event) -> Any:
        """Change the table, then wait for what uses it."""
        self.table(event.mirror).apply(event)
        await self.accesses_of(event.mirror).ended(event)

    async def release(self, mirror: Mirror) -> None:
        """The process has ended."""
        super().release(mirror)
        await self.accesses_of(mirror).all_ended()

    def accesses_of(self, mirror: Mirror) -> Accesses:
        """The accesses of one mirror that are under way."""
        return self.accesses.setdefault(mirror.id, Accesses())

    # ---- what it is asked

    async def mirror(self, process: int) -> None:
        """Mirror a process."""
        self.mirrors[process] = await self.device.mirror(
            self.client.process(process), self, policy=self.policy, fault_events=False
        )

    async def unmirror(self, process: int) -> None:
        """Mirror it no more."""
        mirror = self.mirrors.pop(process)
        if not mirror.lost:
            await mirror.unregister()

    async def read(self, process: int, address: int, length: int) -> dict[str, str]:
        """Let the device read."""
        return {"data": encode(await self.access(self.find(process), address, length, None))}

    async def write(self, process: int, address: int, data: str) -> None:
        """Let the device write."""
        content = decode(data)
        await self.access(self.find(process), address, len(content), content)

    def find(self, process: int) -> Mirror:
        """The mirror of a process that has not ended."""
        mirror = self.mirrors[process]
        if mirror.released:
            raise NoSuchObjectError("the process has ended")
        return mirror

    # ---- the device

    async def access(self, mirror: Mirror, address: int, length: int, data: bytes | None) -> bytes:
        """Fault in what is missing, then access it."""
        table = self.table(mirror)
        while (missing := table.missing(address, length, write=data is not None)).size:
            table.program(missing, await self.fault(mirror, missing, write=data is not None))
        span = AddressRange(address, address + length).page_aligned()
        entries, heard = table.pages.read(span.start, span.end), mirror.heard
        with self.accesses_of(mirror).to(address, length):
            await asyncio.sleep(self.latency_s)
            return await self.transfer(mirror, address, length, data, entries, heard)

    async def fault(self, mirror: Mirror, pages: Entries, *, write: bool) -> Entries:
        """The entries of pages."""
        return (await mirror.fault(pages, write=write)).entries

    async def transfer(
        self, mirror: Mirror, address: int, length: int, data: bytes | None, entries: Entries, heard: int
    ) -> bytes:
        """What goes over the bus."""
        if data is None:
            return await mirror.read([(address, length)], entries=entries, heard=heard)
        await mirror.write([(address, length)], data, entries=entries, heard=heard)
        return b""


# ---- and the wrong ones, each by the rule that it breaks


class EarlyAcknowledgement(RightDriver):
    """Answers while accesses are under way, which take so long that events come meanwhile."""

    latency_s = 25 * LATENCY_S

    async def update(self, event: Event) -> Any:
        """Change the table only."""
        self.table(event.mirror).apply(event)


class UseAfterInvalidation(RightDriver):
    """Keeps its translations when their memory is unmapped."""

    async def update(self, event: Event) -> Any:
        """Ignore MUNMAP, but for what is under way."""
        if event.type is not EventType.MUNMAP:
            await super().update(event)
        await self.accesses_of(event.mirror).ended(event)


class WriteAfterWriteProtect(RightDriver):
    """Goes on writing where it may only read."""

    async def update(self, event: Event) -> Any:
        """Ignore WRITE_PROTECT, but for what is under way."""
        if event.type is not EventType.WRITE_PROTECT:
            await super().update(event)
        await self.accesses_of(event.mirror).ended(event)


class WriteAfterFork(RightDriver):
    """Goes on writing pages that a child shares."""

    async def update(self, event: Event) -> Any:
        """Ignore FORK, but for what is under way."""
        if event.type is not EventType.FORK:
            await super().update(event)
        await self.accesses_of(event.mirror).ended(event)


class DirtyNotReported(RightDriver):
    """Has a device without dirty bits, and reports nothing."""

    async def transfer(
        self, mirror: Mirror, address: int, length: int, data: bytes | None, entries: Entries, heard: int
    ) -> bytes:
        """Write without a trace."""
        if data is None:
            return await super().transfer(mirror, address, length, data, entries, heard)
        await mirror.write([(address, length)], data, entries=entries, heard=heard, untracked=True)
        return b""


class DirtyReported(DirtyNotReported):
    """Has a device without dirty bits, and reports what it wrote: it is right."""

    def __init__(self, client: Client, device: Device) -> None:
        super().__init__(client, device)
        self.written: dict[int, set[int]] = {}

    async def transfer(
        self, mirror: Mirror, address: int, length: int, data: bytes | None, entries: Entries, heard: int
    ) -> bytes:
        """Write, and remember where."""
        if data is not None:
            pages = AddressRange(address, address + length).page_aligned()
            self.written.setdefault(mirror.id, set()).update(range(pages.start, pages.end, PAGE_SIZE))
        return await super().transfer(mirror, address, length, data, entries, heard)

    async def update(self, event: Event) -> Any:
        """Report what was written in the ranges of the event."""
        await super().update(event)
        written = self.written.setdefault(event.mirror.id, set())
        given_up = {page for page in written if event.overlaps(AddressRange(page, page + PAGE_SIZE))}
        written -= given_up
        return np.array(sorted(given_up), np.uint64)


class Unanswered(RightDriver):
    """Hangs in a callback."""

    async def update(self, event: Event) -> Any:
        """Never return from a MIGRATE."""
        if event.type is EventType.MIGRATE:
            await asyncio.Event().wait()
        await super().update(event)


class UnansweredUnderBlock(Unanswered):
    """Hangs in a callback, and may."""

    policy = DeadlinePolicy.BLOCK


class UnansweredUnderFail(Unanswered):
    """Hangs in a callback, at the cost of whoever waits."""

    policy = DeadlinePolicy.FAIL


class Refused(RightDriver):
    """Refuses what cannot be refused."""

    async def update(self, event: Event) -> Any:
        """As a driver that may say EAGAIN, which this event does not allow."""
        await super().update(event)
        if event.type is EventType.MIGRATE:
            raise OSError(errnos.EAGAIN, "not now")


class NeverSent(RightDriver):
    """Answers events that nobody sent."""

    async def update(self, event: Event) -> Any:
        """Answer one of the future, too."""
        (await self.client.session()).answer(event.mirror.id, event.sequence + 1000)
        await super().update(event)


class OldEpoch(RightDriver):
    """Answers in the name of a stream that is gone."""

    async def mirror(self, process: int) -> None:
        """From now on."""
        session = await self.client.session()
        take = session.ledger.take

        def old() -> event_pb2.Acknowledgements:
            message = take()
            message.epoch = session.welcome.epoch - 1
            return message

        session.ledger.take = old  # type: ignore[method-assign]
        await super().mirror(process)


class LeakedMirror(RightDriver):
    """Never unregisters."""

    async def unmirror(self, process: int) -> None:
        """Forget it, and leave it."""
        self.mirrors.pop(process)


class StaleFault(RightDriver):
    """Programs its device with whatever a fault returned, however old."""

    async def fault(self, mirror: Mirror, pages: Entries, *, write: bool) -> Entries:
        """The reply as it came, without looking at what was heard meanwhile."""
        request = device_pb2.FaultRequest(mirror_id=mirror.id, pages=entries_to_proto(pages), write=write)
        (reply,) = await mirror.session.call("fault", request)
        if reply.result.errno:
            raise NoSuchObjectError(reply.result.message)
        return entries_from_proto(reply.entries)


class ForeignFrame(RightDriver):
    """Goes by frame numbers of its own invention."""

    async def transfer(
        self, mirror: Mirror, address: int, length: int, data: bytes | None, entries: Entries, heard: int
    ) -> bytes:
        """Off by one."""
        return await super().transfer(mirror, address, length, data, entries + np.uint64(PAGE_SIZE), heard)


class NoTranslation(RightDriver):
    """Accesses what it never faulted in."""

    async def access(self, mirror: Mirror, address: int, length: int, data: bytes | None) -> bytes:
        """At once."""
        if data is None:
            return await mirror.read([(address, length)])
        await mirror.write([(address, length)], data)
        return b""


class WrongData(RightDriver):
    """Has a cache that nobody invalidates."""

    def __init__(self, client: Client, device: Device) -> None:
        super().__init__(client, device)
        self.cache: dict[tuple[int, int, int], bytes] = {}

    async def access(self, mirror: Mirror, address: int, length: int, data: bytes | None) -> bytes:
        """What was read once is there for good, once it could be reached."""
        seen = await super().access(mirror, address, length, data)
        return self.cache.setdefault((mirror.id, address, length), seen) if data is None else seen


class Silent(RightDriver):
    """Does not answer what it is asked."""

    async def write(self, process: int, address: int, data: str) -> None:
        """Never."""
        await asyncio.Event().wait()


class MirrorsNobody(RightDriver):
    """Is not ready for what it is asked first."""

    async def mirror(self, process: int) -> None:
        """Refuse."""
        raise OutOfFramesError("the device has no context left")


class Died(RightDriver):
    """Ends in the middle of a callback."""

    async def update(self, event: Event) -> Any:
        """At the first FORK."""
        if event.type is EventType.FORK:
            os._exit(7)
        await super().update(event)


DRIVERS = {
    "right": RightDriver,
    "dirty-reported": DirtyReported,
    "early-acknowledgement": EarlyAcknowledgement,
    "use-after-invalidation": UseAfterInvalidation,
    "write-after-write-protect": WriteAfterWriteProtect,
    "write-after-fork": WriteAfterFork,
    "dirty-not-reported": DirtyNotReported,
    "unanswered": Unanswered,
    "refused": Refused,
    "never-sent": NeverSent,
    "old-epoch": OldEpoch,
    "leaked-mirror": LeakedMirror,
    "stale-fault": StaleFault,
    "foreign-frame": ForeignFrame,
    "no-translation": NoTranslation,
    "wrong-data": WrongData,
    "silent": Silent,
    "unanswered-under-block": UnansweredUnderBlock,
    "unanswered-under-fail": UnansweredUnderFail,
    "mirrors-nobody": MirrorsNobody,
    "died": Died,
}


async def certified(client: Client) -> Mapping[str, Operation]:
    """Register a device; what `hmm_client.certify` asks of it."""
    driver = DRIVERS[KIND](client, await client.register_device(KIND))
    return {name: getattr(driver, name) for name in ("mirror", "unmirror", "read", "write")}


KIND = sys.argv.pop(1)
driver_command("wrong", certified, certified)()
