"""Today's interface of a daemon, for drivers that are written once and run in both worlds.

Events come on a worker thread while the calling thread waits for its call: a driver keeps its table under a lock.

**Source**: `hmm_client.sync`; the commands of `hmm.commands_hmm`.

**Invariants**: when it is closed, what was made through it is gone: mirrors, pins, devices.

**Absent**: the model in this process (`in_process.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import numpy as np

from hmm.commands_hmm import Migrated, RangeFaulted, VmaView
from hmm.events import Event
from hmm.frames import RegionKind
from hmm.migration import WRITE
from hmm.units import TASK_SIZE, Address, AddressRange, DeviceId, Entries, MirrorId, Pfn, Pfns, ProcessId
from hmm_client import event as aio_event
from hmm_client import sync
from hmm_client.drivers.dmirror import Observer
from hmm_client.harness.holds import Harness
from hmm_client.interval_driver import IntervalDriver

__all__ = ["OverWireHmm", "SteppedOverWireHmm"]


class OverWireHmm:
    """`hmm_client.drivers.dmirror.Hmm` on a client's session."""

    def __init__(self, client: sync.Client) -> None:
        self._client = client
        self._devices: dict[DeviceId, sync.Device] = {}
        self._mirrors: dict[MirrorId, sync.IntervalMirror] = {}
        self._notifiers: dict[tuple[MirrorId, int], sync.IntervalNotifier] = {}

    def close(self) -> None:
        """Detach all mirrors and unregister all devices; what is in their memory comes back first."""
        for mirror_id in list(self._mirrors):
            self.detach(mirror_id)
        for device in self._devices.values():
            device.unregister()
        self._devices.clear()

    def register_device(self, name: str, memory_pages: int, kind: RegionKind = RegionKind.DEVICE_PRIVATE) -> DeviceId:
        """A device with memory."""
        device = self._client.register_device(name, memory_pages=memory_pages, kind=kind)
        self._devices[device.id] = device
        return device.id

    def device_frames(self, device_id: DeviceId) -> tuple[Pfn, Pfn]:
        """The frames of its memory."""
        return self._devices[device_id].frames

    def attach(self, device_id: DeviceId, process_id: ProcessId, update: Callable[[Event], None]) -> MirrorId:
        """Get the events of a process."""
        mirror = self._devices[device_id].attach(self._client.process(process_id), _Callback(update))
        self._mirrors[mirror.id] = mirror
        return mirror.id

    def detach(self, mirror_id: MirrorId) -> None:
        """Get no more events; a mirror that was lost gets none anyhow."""
        mirror = self._mirrors.pop(mirror_id)
        for notifier in [notifier for notifier in self._notifiers if notifier[0] == mirror_id]:
            del self._notifiers[notifier]
        if not mirror.lost:
            mirror.detach()

    def insert_notifier(self, mirror_id: MirrorId, start: Address, length: int, *, filtered: bool) -> int:
        """Subscribe to a range."""
        notifier = self._mirrors[mirror_id].insert(start, length, filtered=filtered)
        self._notifiers[mirror_id, notifier.id] = notifier
        return notifier.id

    def read_begin(self, mirror_id: MirrorId, number: int) -> int:
        """Begin a read section."""
        return self._notifiers[mirror_id, number].read_begin()

    def read_retry(self, mirror_id: MirrorId, number: int, sequence: int) -> bool:
        """Whether it has to be repeated."""
        return self._notifiers[mirror_id, number].read_retry(sequence)

    def find_vma(self, mirror_id: MirrorId, address: Address) -> VmaView | None:
        """The VMA at an address."""
        return self._mirrors[mirror_id].find_vma(address)

    def range_fault(
        self, mirror_id: MirrorId, number: int, sequence: int, span: AddressRange, default_flags: int
    ) -> Entries:
        """hmm_range_fault()."""
        return self._notifiers[mirror_id, number].range_fault(span, sequence, default_flags).words

    def range_fault_unlocked(
        self, mirror_id: MirrorId, number: int, span: AddressRange, default_flags: int
    ) -> tuple[Entries, int]:
        """hmm_range_fault_unlocked_timeout()."""
        faulted = self._notifiers[mirror_id, number].fault(span, default_flags)
        return faulted.words, faulted.notifier_seq

    def observe(self, device_id: DeviceId, process_id: ProcessId) -> Observer:
        """A mirror with one subscription to everything, which nobody listens to."""
        loop, process = self._client.loop, self._client.process(process_id)
        mirror = sync.IntervalMirror(loop.run(self._devices[device_id].aio.attach(process.aio, _Deaf())), loop)
        self._mirrors[mirror.id] = mirror
        return mirror.id, self.insert_notifier(mirror.id, 0, TASK_SIZE, filtered=False)

    def snapshots(self, observers: Sequence[Observer], span: AddressRange) -> list[Entries]:
        """What each of them sees of a range."""

        async def look() -> list[RangeFaulted]:
            return await asyncio.gather(*(self._notifiers[one].aio.fault(span) for one in observers))

        return [faulted.words for faulted in self._client.loop.run(look())]

    def migrate_to_device(self, mirror_id: MirrorId, span: AddressRange, *, compound: bool) -> Migrated:
        """Move a part of one VMA to the device."""
        return self._mirrors[mirror_id].migrate_to_device(span, compound=compound)

    def migrate_to_system(self, mirror_id: MirrorId, span: AddressRange, *, compound: bool) -> Migrated:
        """Move it back."""
        return self._mirrors[mirror_id].migrate_to_system(span, compound=compound)

    def fail_migration(self, mirror_id: MirrorId, nth: int) -> None:
        """Make an allocation fail: the daemon was started with `harness`."""
        self._client.loop.run(Harness(self._client.aio).fail_migration(self._mirrors[mirror_id].aio, nth))

    def evict_device(self, device_id: DeviceId) -> int:
        """Move everything back."""
        return self._devices[device_id].evict()

    def make_exclusive(self, mirror_id: MirrorId, span: AddressRange) -> Pfns:
        """Take pages from the CPU."""
        return self._mirrors[mirror_id].make_exclusive(span)

    def read_frames(
        self, mirror_id: MirrorId, addresses: Entries, pfns: Pfns, *, offset: int = 0, length: int | None = None
    ) -> bytes:
        """The device reads pages."""
        return self._mirrors[mirror_id].read_frames(addresses, pfns, offset=offset, length=length)

    def write_frames(
        self, mirror_id: MirrorId, addresses: Entries, pfns: Pfns, data: bytes, *, offset: int = 0
    ) -> None:
        """The device writes pages."""
        self._mirrors[mirror_id].write_frames(addresses, pfns, data, offset=offset)


class SteppedOverWireHmm(OverWireHmm):
    """The same, but migrations to the device are setup, pages and finalize, and what a driver does in between.

    A page alone moves in one call, as before: in one round trip instead of six.
    """

    def migrate_to_device(self, mirror_id: MirrorId, span: AddressRange, *, compound: bool) -> Migrated:
        """Move a part of one VMA to the device, huge pages in pieces.

        Holes that it fills are read-only in its words: whether the VMA is writable only a fault will say.
        """
        if span.npages == 1:
            return super().migrate_to_device(mirror_id, span, compound=compound)
        with self._mirrors[mirror_id].migrate_vma(span) as migration:
            frames = migration.allocate(migration.movable.size)
            dst = migration.destinations(frames) & (migration.src | ~np.uint64(WRITE))
            migration.copy(dst)
            migration.pages(dst)
            return migration.finalize()


class _Deaf(IntervalDriver):
    # Runs in the loop, where it costs least.
    async def invalidate(self, event: aio_event.Event) -> None:
        """There is nothing to stop."""


class _Callback(sync.IntervalDriver):
    # As the client library wants its drivers; events as the core has them.
    def __init__(self, update: Callable[[Event], None]) -> None:
        self._update = update

    def invalidate(self, event: sync.Event) -> None:
        self._update(event.value)
