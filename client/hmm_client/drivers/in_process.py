"""Today's interface of the model in this process, for drivers that need no daemon.

Migrations are one call of the model, or the steps of a driver (`SteppedHmm`), which come to the same.

**Source**: the commands of `hmm.commands_hmm` and `hmm.commands_migrate`; Linux lib/test_hmm.c,
dmirror_migrate_alloc_and_copy(), dmirror_devmem_fault_alloc_and_copy().

**Absent**: a daemon.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from hmm import commands_device, commands_failures, commands_hmm, commands_migrate
from hmm.commands_hmm import Migrated, VmaView
from hmm.commands_migrate import MigrationSetUp
from hmm.events import Event
from hmm.frames import RegionKind
from hmm.local import Local
from hmm.migration import COMPOUND, MIGRATE, VALID, WRITE, Select, migrate_pfn, moving_frames
from hmm.units import TASK_SIZE, Address, AddressRange, DeviceId, Entries, MirrorId, Pfn, Pfns, ProcessId
from hmm_client.drivers.dmirror import Observer

__all__ = ["InProcessHmm", "SteppedHmm"]


class InProcessHmm:
    """`hmm_client.drivers.dmirror.Hmm` on a machine of this process."""

    def __init__(self, local: Local) -> None:
        self._local = local

    def register_device(self, name: str, memory_pages: int, kind: RegionKind = RegionKind.DEVICE_PRIVATE) -> DeviceId:
        """A device with memory."""
        return self._local.call(commands_device.register_device, name, memory_pages=memory_pages, kind=kind)

    def device_frames(self, device_id: DeviceId) -> tuple[Pfn, Pfn]:
        """The frames of its memory."""
        return self._local.call(commands_hmm.device_frames, device_id)

    def attach(self, device_id: DeviceId, process_id: ProcessId, update: Callable[[Event], None]) -> MirrorId:
        """Get the events of a process."""
        mirror_id = self._local.call(commands_hmm.attach, device_id, process_id)
        self._local.attach(mirror_id, _Callback(update))
        return mirror_id

    def detach(self, mirror_id: MirrorId) -> None:
        """Get no more events."""
        self._local.call(commands_hmm.detach, mirror_id)

    def insert_notifier(self, mirror_id: MirrorId, start: Address, length: int, *, filtered: bool) -> int:
        """Subscribe to a range."""
        return self._local.call(commands_hmm.insert_notifier, mirror_id, start, length, filtered=filtered)

    def read_begin(self, mirror_id: MirrorId, number: int) -> int:
        """Begin a read section."""
        return self._local.call(commands_hmm.read_begin, mirror_id, number)

    def read_retry(self, mirror_id: MirrorId, number: int, sequence: int) -> bool:
        """Whether it has to be repeated."""
        return self._local.call(commands_hmm.read_retry, mirror_id, number, sequence)

    def find_vma(self, mirror_id: MirrorId, address: Address) -> VmaView | None:
        """The VMA at an address."""
        return self._local.call(commands_hmm.find_vma, mirror_id, address)

    def range_fault(
        self, mirror_id: MirrorId, number: int, sequence: int, span: AddressRange, default_flags: int
    ) -> Entries:
        """hmm_range_fault()."""
        faulted = self._local.call(commands_hmm.range_fault, mirror_id, number, sequence, span, default_flags)
        return faulted.require()

    def range_fault_unlocked(
        self, mirror_id: MirrorId, number: int, span: AddressRange, default_flags: int
    ) -> tuple[Entries, int]:
        """hmm_range_fault_unlocked_timeout()."""
        faulted = self._local.call(commands_hmm.range_fault_unlocked, mirror_id, number, span, default_flags)
        return faulted.require(), faulted.notifier_seq

    def observe(self, device_id: DeviceId, process_id: ProcessId) -> Observer:
        """A mirror with one subscription to everything, which nobody listens to."""
        mirror_id = self._local.call(commands_hmm.attach, device_id, process_id)
        return mirror_id, self._local.call(commands_hmm.insert_notifier, mirror_id, 0, TASK_SIZE)

    def snapshots(self, observers: Sequence[Observer], span: AddressRange) -> list[Entries]:
        """What each of them sees of a range."""
        return [self._local.call(commands_hmm.range_fault_unlocked, *one, span).require() for one in observers]

    def migrate_to_device(self, mirror_id: MirrorId, span: AddressRange, *, compound: bool) -> Migrated:
        """Move a part of one VMA to the device."""
        return self._local.call(commands_hmm.migrate_to_device, mirror_id, span, compound=compound)

    def migrate_to_system(self, mirror_id: MirrorId, span: AddressRange, *, compound: bool) -> Migrated:
        """Move it back."""
        return self._local.call(commands_hmm.migrate_to_system, mirror_id, span, compound=compound)

    def fail_migration(self, mirror_id: MirrorId, nth: int) -> None:
        """Make an allocation fail."""
        self._local.call(commands_failures.inject_migration_failure, mirror_id, nth)

    def evict_device(self, device_id: DeviceId) -> int:
        """Move everything back."""
        return self._local.call(commands_hmm.evict_device, device_id)

    def make_exclusive(self, mirror_id: MirrorId, span: AddressRange) -> Pfns:
        """Take pages from the CPU."""
        return self._local.call(commands_hmm.make_exclusive, mirror_id, span)

    def read_frames(
        self, mirror_id: MirrorId, addresses: Entries, pfns: Pfns, *, offset: int = 0, length: int | None = None
    ) -> bytes:
        """The device reads pages."""
        return self._local.call(commands_hmm.read_frames, mirror_id, addresses, pfns, offset=offset, length=length)

    def write_frames(
        self, mirror_id: MirrorId, addresses: Entries, pfns: Pfns, data: bytes, *, offset: int = 0
    ) -> None:
        """The device writes pages."""
        self._local.call(commands_hmm.write_frames, mirror_id, addresses, pfns, data, offset=offset)


class SteppedHmm(InProcessHmm):
    """The same, but migrations are setup, pages and finalize, and what a driver does in between."""

    def __init__(self, local: Local) -> None:
        super().__init__(local)
        self._kinds: dict[DeviceId, RegionKind] = {}
        self._attached: dict[MirrorId, DeviceId] = {}

    def register_device(self, name: str, memory_pages: int, kind: RegionKind = RegionKind.DEVICE_PRIVATE) -> DeviceId:
        """A device with memory."""
        device_id = super().register_device(name, memory_pages, kind)
        self._kinds[device_id] = kind
        return device_id

    def attach(self, device_id: DeviceId, process_id: ProcessId, update: Callable[[Event], None]) -> MirrorId:
        """Get the events of a process."""
        mirror_id = super().attach(device_id, process_id, update)
        self._attached[mirror_id] = device_id
        return mirror_id

    def migrate_to_device(self, mirror_id: MirrorId, span: AddressRange, *, compound: bool) -> Migrated:
        """Move a part of one VMA to the device."""
        vma = self.find_vma(mirror_id, span.start)
        fresh = WRITE if vma is not None and vma.writable else 0
        return self._migrate(mirror_id, span, Select.SYSTEM, self._attached[mirror_id], fresh=fresh, compound=compound)

    def migrate_to_system(self, mirror_id: MirrorId, span: AddressRange, *, compound: bool) -> Migrated:
        """Move it back."""
        private = self._kinds[self._attached[mirror_id]] is RegionKind.DEVICE_PRIVATE
        select = Select.DEVICE_PRIVATE if private else Select.DEVICE_COHERENT
        return self._migrate(mirror_id, span, select, 0, fresh=None, compound=compound)

    def _migrate(
        self,
        mirror_id: MirrorId,
        span: AddressRange,
        select: Select,
        device_id: DeviceId,
        *,
        fresh: int | None,
        compound: bool,
    ) -> Migrated:
        # `fresh` goes into the words of holes that are to be filled; None: they stay holes.
        call = self._local.call
        chosen = select | Select.COMPOUND if compound else select
        begun = call(commands_migrate.migrate_vma_setup, mirror_id, span, select=chosen)
        assert isinstance(begun, MigrationSetUp)
        number, src = begun.migration_id, begun.src
        dst = np.zeros_like(src)
        for large in (True, False):
            wanted = MIGRATE if fresh is not None else MIGRATE | VALID
            kind = COMPOUND if large else 0
            pages = np.flatnonzero((src & np.uint64(wanted | COMPOUND)) == wanted | kind)
            allocate = commands_migrate.migrate_vma_allocate
            pfns = call(allocate, number, pages.size, device_id=device_id, compound=large)
            there = pages[: pfns.size]
            dst[there] = migrate_pfn(pfns) | (src[there] & np.uint64(WRITE)) | np.uint64(kind)
            dst[there[(src[there] & np.uint64(VALID)) == 0]] |= np.uint64(fresh or 0)
        call(commands_migrate.migrate_vma_copy, number, *moving_frames(src, dst))
        call(commands_migrate.migrate_vma_pages, number, dst)
        return call(commands_migrate.migrate_vma_finalize, number)


class _Callback:
    # As hmm.local wants its drivers.
    def __init__(self, update: Callable[[Event], None]) -> None:
        self._update = update

    def update(self, _: MirrorId, event: Event) -> int:
        self._update(event)
        return 0

    def release(self, _: MirrorId) -> None:
        """Interval notifiers have no such callback: the end is an event like others."""
