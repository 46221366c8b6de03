"""What the test driver needs of today's interface, wherever it is: of the model in this process, or of a daemon.

**Source**: include/linux/hmm.h, migrate.h, mmu_notifier.h and rmap.h of Linux, as far as lib/test_hmm.c uses them.

**Invariants**: a call that fails raises an `HmmError` with the kernel's errno, wherever the model is.

**Absent**: those who have it (`in_process.py`, `over_wire.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from hmm.commands_hmm import Migrated, VmaView
from hmm.events import Event
from hmm.frames import RegionKind
from hmm.units import Address, AddressRange, DeviceId, Entries, MirrorId, Pfn, Pfns, ProcessId

__all__ = ["Hmm", "Observer"]

Observer: TypeAlias = tuple[MirrorId, int]
"""A mirror and its subscription."""


class Hmm(Protocol):
    """What the driver needs of today's interface; the commands of `hmm.commands_hmm`."""

    def register_device(self, name: str, memory_pages: int, kind: RegionKind) -> DeviceId:
        """A device with memory of its own."""

    def device_frames(self, device_id: DeviceId) -> tuple[Pfn, Pfn]:
        """The frames of its memory, from the first to behind the last."""

    def attach(self, device_id: DeviceId, process_id: ProcessId, update: Callable[[Event], None]) -> MirrorId:
        """Get the events of a process; `update` is called for each and has handled it when it returns."""

    def detach(self, mirror_id: MirrorId) -> None:
        """Get no more events."""

    def insert_notifier(self, mirror_id: MirrorId, start: Address, length: int, *, filtered: bool) -> int:
        """Subscribe to a range."""

    def read_begin(self, mirror_id: MirrorId, number: int) -> int:
        """Begin a read section."""

    def read_retry(self, mirror_id: MirrorId, number: int, sequence: int) -> bool:
        """Whether it has to be repeated."""

    def find_vma(self, mirror_id: MirrorId, address: Address) -> VmaView | None:
        """The VMA at an address."""

    def range_fault(
        self, mirror_id: MirrorId, number: int, sequence: int, span: AddressRange, default_flags: int
    ) -> Entries:
        """hmm_range_fault()."""

    def range_fault_unlocked(
        self, mirror_id: MirrorId, number: int, span: AddressRange, default_flags: int
    ) -> tuple[Entries, int]:
        """hmm_range_fault_unlocked_timeout().  Returns: the words, and the sequence that they hold for."""

    def observe(self, device_id: DeviceId, process_id: ProcessId) -> Observer:
        """A mirror with one subscription to everything, which nobody listens to; for `snapshots`."""

    def snapshots(self, observers: Sequence[Observer], span: AddressRange) -> list[Entries]:
        """What each of them sees of a range, in one round trip."""

    def migrate_to_device(self, mirror_id: MirrorId, span: AddressRange, *, compound: bool) -> Migrated:
        """Move a part of one VMA to the device."""

    def migrate_to_system(self, mirror_id: MirrorId, span: AddressRange, *, compound: bool) -> Migrated:
        """Move it back."""

    def fail_migration(self, mirror_id: MirrorId, nth: int) -> None:
        """Make the nth allocation from now on fail that a migration of this mirror needs; 0: none."""

    def evict_device(self, device_id: DeviceId) -> int:
        """Move everything back."""

    def make_exclusive(self, mirror_id: MirrorId, span: AddressRange) -> Pfns:
        """Take pages from the CPU."""

    def read_frames(
        self, mirror_id: MirrorId, addresses: Entries, pfns: Pfns, *, offset: int = 0, length: int | None = None
    ) -> bytes:
        """The device reads pages, or the bytes from `offset` in the first."""

    def write_frames(
        self, mirror_id: MirrorId, addresses: Entries, pfns: Pfns, data: bytes, *, offset: int = 0
    ) -> None:
        """The device writes pages, or a part of them."""
