"""Devices that mirror a replayed program: each a driver with a session of its own.

They fault pages in, for reading and for writing, where the program is going and where it was before, write to them,
and answer every update.  With memory of their own they move the program's pages there and back: of two devices one
has the bytes with its driver, the other with the daemon.

When the program has ended, each device's own page table is compared with the daemon's table
of its mirror: a translation that only the device has would be memory that it can still reach.

**Source**: proto/hmm_proto/v1/inspection.proto for what the daemon has counted.

**Invariants**: the program is at most `LAG_CALLS` places ahead of its devices.

**Absent**: what a device does at a place (`hmm_client.drivers.prefetch`).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from hmm import pte
from hmm.errors import ConflictError
from hmm.units import PAGE_SHIFT, AddressRange, Entries
from hmm_client.client import Client
from hmm_client.drivers.prefetch import Behaviour, PrefetchDevice
from hmm_client.mirror import Mirror
from hmm_client.process import Process
from hmm_proto.v1 import inspection_pb2

LAG_CALLS = 8
FOLLOWED_CALLS = 256
"""So many calls are followed one by one; then every second, after as many again every third, and so on."""


@dataclass(slots=True)
class DeviceReport:
    """What one device did.

    Attributes:
        faults, pages: its calls, and the pages that came in.
        refused: pages that it asked for where no memory was, or none of that permission.
        events: it was told of, by type.
        acknowledged_us: median and 99th percentile from sending an event to its answer, as the daemon counts.
        migrated: pages moved to the device and by its request back.
        violations: what the contract forbids, in words.
    """

    name: str
    faults: int = 0
    pages: int = 0
    refused: int = 0
    checks: int = 0
    bytes_written: int = 0
    events: Counter[str] = field(default_factory=Counter)
    acknowledged_us: tuple[int, int] = (0, 0)
    migrated: int = 0
    violations: list[str] = field(default_factory=list)


class ReplayDevices:
    """The devices of one replay; to be used in `async with`.

    Args:
        memory_pages: of each device; 0 for none, and nothing is moved.

    Attributes:
        reports: after `settle`, one for each device.
    """

    def __init__(self, connect: Callable[[str], Client], count: int, memory_pages: int = 0) -> None:
        self._connect = connect
        self._count = count
        self._memory_pages = memory_pages
        self._stack = AsyncExitStack()
        self._served: list[tuple[str, Client, PrefetchDevice]] = []
        self._calls = 0
        self._followed = 0
        self.reports: list[DeviceReport] = []

    async def __aenter__(self) -> Self:
        for number in range(self._count):
            name = f"gpu{number}"
            client = await self._stack.enter_async_context(self._connect(name))
            carries = self._memory_pages > 0 and number % 2 == 1
            behaviour = Behaviour(seed=number, slot=number, memory_pages=self._memory_pages, driver_copies=carries)
            device = await PrefetchDevice.register(client, name, behaviour)
            self._stack.push_async_callback(device.stop)
            self._served.append((name, client, device))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def attach(self, process: Process) -> None:
        """Mirror a process from now on, if its memory is not mirrored already: a vforked child has its parent's."""
        for _, _, device in self._served:
            try:
                await device.attach(process)
            except ConflictError:
                continue

    async def follow(self, process: Process, span: AddressRange) -> None:
        """The program is here now; it waits now and then for its devices, which in a long program come less often."""
        self._calls += 1
        if self._calls % (1 + self._calls // FOLLOWED_CALLS):
            return
        for _, _, device in self._served:
            device.follow(process.id, span)
        self._followed += 1
        if self._followed % LAG_CALLS == 0:
            await self.idle()

    async def settle(self) -> None:
        """Let all devices finish, compare their tables with the daemon's, and count."""
        await self.idle()
        self.reports = [await _report(*served) for served in self._served]

    async def idle(self) -> None:
        """Let all devices finish what they do."""
        await asyncio.gather(*(device.idle() for _, _, device in self._served))


async def _report(name: str, client: Client, device: PrefetchDevice) -> DeviceReport:
    done = device.statistics
    report = DeviceReport(
        name,
        done.faults,
        done.pages,
        done.refused.total(),
        done.checks,
        done.bytes_written,
        Counter(done.events),
        migrated=done.migrated,
        violations=list(done.violations),
    )
    statistics: inspection_pb2.GetStatisticsResponse = await client.channel.request(
        client.inspection.GetStatistics, inspection_pb2.GetStatisticsRequest()
    )
    counted = {mirror.mirror_id: mirror for mirror in statistics.mirrors}
    for mirror in device.mirrors:
        latencies = counted[mirror.id].acknowledgement
        report.acknowledged_us = max(report.acknowledged_us, (latencies.p50_us, latencies.p99_us))
        report.violations += await _mismatches(mirror, device)
    return report


async def _mismatches(mirror: Mirror, device: PrefetchDevice) -> list[str]:
    """Where the device's own table and the daemon's table of the mirror disagree, one line per directory."""
    found = []
    table = device.table(mirror).pages
    for run in list(table.walk(0, table.last + 1)):
        span = AddressRange(run.start, run.end)
        theirs = await mirror.read_table(span)
        ours = table.read(span.start, span.end)
        differs = _meaning(ours) != _meaning(theirs)
        if differs.any():
            page = span.start + (int(np.flatnonzero(differs)[0]) << PAGE_SHIFT)
            found.append(f"{mirror}: {int(differs.sum())} entries from {page:#x} on are not the daemon's")
    return found


def _meaning(entries: Entries) -> Entries:
    """What an access through uint64[n] entries reaches: the frame and the permission, 0 for none."""
    valid = (entries & np.uint64(pte.VALID)) != 0
    reached = (pte.pte_pfn(entries).astype(np.uint64) << np.uint64(2)) | np.uint64(1)
    reached |= np.where(pte.pte_test_write(entries), np.uint64(2), np.uint64(0))
    return np.where(valid, reached, np.uint64(0))
