"""The part of a device driver that its author writes: what to do when the CPU's page table changes.

A driver serves any number of mirrors.  `update` is called before a change takes effect; the device may use the pages
of the event until it returns, and not afterwards.  It may be a plain function, which runs in the event loop and must
not block (the synchronous client runs it on a thread of its own), or `async def`, which may make calls.

**Source**: 2015: `struct hmm_mirror_ops` (release, update, copy_from_device, copy_to_device);
today: `struct mmu_interval_notifier_ops`.

**Absent**: the device itself; see `hmm_client.drivers`.
"""

from __future__ import annotations

import errno as errnos
from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from hmm.units import AddressRange, Entries
from hmm_client.device_table import DeviceTable

if TYPE_CHECKING:
    from hmm_client.event import Event
    from hmm_client.mirror import Mirror

Written: TypeAlias = Sequence[AddressRange] | Entries | None
"""What a device wrote and the daemon does not know of: page-aligned ranges, or uint64[n] page addresses, ascending."""
Copied: TypeAlias = bytes | Sequence[int] | None
"""The results of a copy: a byte for each page, 0 or an errno; None: all 0."""


class Driver:
    """Base of drivers.  As it stands: a device that keeps no translations and has nothing to stop."""

    def update(self, event: Event) -> Written | Awaitable[Written]:
        """Make the device stop using what `event` names, or program it after a fault, before returning.

        A class that leaves it as it is need not be called: its mirrors hear an event for many of them together.

        Returns: pages that the device wrote by other ways than `Mirror.write`, None for none.

        Raises:
            OSError: its errno is the answer, ENOMEM or EIO.  On an invalidation that kills the mirror; on a fault it
                goes to whoever faults.  Any other exception is logged and answered with EIO.
        """

    def copy_to_device(self, event: Event) -> Copied | Awaitable[Copied]:
        """Take pages into the device's memory, for a device that was registered with `driver_copies`.

        Called after `update`, in which the device has stopped using them: `event.read_pages()` has their bytes, and
        `event.device_addresses` says where they go.  When they are there, an update tells of their entries.

        Returns: a byte for each page, 0 or an errno for those that stay in system memory; None when all were copied.

        Raises:
            OSError: nothing was copied; ENOMEM or EIO goes to whoever asked for the migration.
        """
        raise OSError(errnos.ENOMEM, f"{type(self).__name__} has no memory for {event}")

    def copy_from_device(self, event: Event) -> Copied | Awaitable[Copied]:
        """Give pages back with `event.write_pages()`; those that fail are lost.

        Called after `update`, in which the device has stopped using them, unless the event `keeps` them: then they are
        copied for the child of a fork, and the device is not to be disturbed.

        Returns: as `copy_to_device`.

        Raises:
            OSError: all of them are lost, and the mirror is killed.
        """
        raise OSError(errnos.EIO, f"{type(self).__name__} has no memory for {event}")

    def release(self, mirror: Mirror) -> Awaitable[None] | None:
        """Stop everything that uses the address space: it ends, or the mirror was unregistered or killed."""

    def lost(self, mirror: Mirror, why: str) -> None:
        """The mirror was fenced, or the connection broke: nothing of it is valid, and no event will come any more."""


def require_driver(driver: object, callback: str, base: str) -> None:
    """Raise unless a driver is an instance that has its callback: it is called much later, and by somebody else.

    Raises:
        TypeError: it is a class, or of the other interface.
    """
    if isinstance(driver, type):
        raise TypeError(f"{driver.__name__} is a class; a driver is an instance of one: {driver.__name__}(...)")
    if not callable(getattr(driver, callback, None)):
        raise TypeError(f"{type(driver).__name__} has no method `{callback}`; here a {base} is needed")


class TableDriver(Driver):
    """Base of drivers whose device has page tables of its own: one `DeviceTable` for each mirror."""

    def __init__(self) -> None:
        self.tables: dict[int, DeviceTable] = {}

    def table(self, mirror: Mirror) -> DeviceTable:
        """The device's table for a mirror, made when it is first asked for."""
        if mirror.id not in self.tables:
            self.tables[mirror.id] = DeviceTable()
        return self.tables[mirror.id]

    def update(self, event: Event) -> Written | Awaitable[Written]:
        """Apply the event to the device's table."""
        self.table(event.mirror).apply(event)
        return None

    def release(self, mirror: Mirror) -> Awaitable[None] | None:
        """Drop the device's table."""
        self.tables.pop(mirror.id, None)
        return None

    def lost(self, mirror: Mirror, why: str) -> None:  # noqa: ARG002 - for those who override it
        """Drop the device's table."""
        self.tables.pop(mirror.id, None)
