"""Commands that make something fail, for tests of drivers: memory, DMA, migrations and their copies.

`nth` counts from now on: 1 is the next one, 0 is none.

**Source**: Linux lib/fault-inject.c, lib/test_hmm.c; each function names its own.

**Absent**: failures of memory itself, which madvise injects (memory_failure.py, soft_offline.py).
"""

from __future__ import annotations

from hmm.commands_hmm import hearing_mirror
from hmm.errors import InvalidRequestError
from hmm.machine import Machine
from hmm.operation import immediate
from hmm.units import DeviceId, MirrorId

__all__ = [
    "inject_allocation_failure",
    "inject_copy_failure",
    "inject_dma_failure",
    "inject_migration_failure",
    "inject_touch_failure",
]


@immediate
def inject_allocation_failure(machine: Machine, nth: int) -> None:
    """Make the nth page of system memory from now on (1 is the next one, 0 is none) impossible to allocate.

    What comes behind it fails too, until a call has ended with ENOMEM.  Source: Linux lib/fault-inject.c.
    """
    if nth < 0:
        raise InvalidRequestError(f"inject allocation failure: {nth} is negative")
    machine.frames.fail_allocation(nth)


@immediate
def inject_dma_failure(machine: Machine, device_id: DeviceId, nth: int) -> None:
    """Make the nth next DMA mapping call of a device fail (1 is the next one, 0 is none)."""
    device = machine.device(device_id)
    if device.iommu is None or nth < 0:
        raise InvalidRequestError(f"inject DMA failure: {device} does no DMA, or {nth} is negative")
    device.iommu.failing = nth


@immediate
def inject_migration_failure(machine: Machine, mirror_id: MirrorId, nth: int) -> None:
    """Make the nth allocation from now on fail that is made to migrate pages for a mirror (1 is the next, 0 is none).

    It is that of a frame, or of a large folio, on the device or on the way back.

    A huge page that was to move as one moves by small pages instead.  A small page on its way to the device stays where
    it is; on the way back it does, and those behind it too.

    Source: Linux lib/test_hmm.c, HMM_DMIRROR_FLAG_FAIL_ALLOC, 7.0.
    """
    if nth < 0:
        raise InvalidRequestError(f"inject migration failure: {nth} is negative")
    hearing_mirror(machine, mirror_id).failing_allocation = nth


@immediate
def inject_touch_failure(machine: Machine, device_id: DeviceId, nth: int) -> None:
    """Let the nth page from now on that is touched in a device's private memory (1 is the next one, 0 is none) stay.

    Who touches it gets SIGBUS (BUS_ADRERR), once.  Source: Linux mm/memory.c, do_swap_page(); lib/test_hmm.c,
    dmirror_devmem_fault(), which returns VM_FAULT_SIGBUS.

    Raises:
        InvalidRequestError: the device has no memory, or `nth` is negative (EINVAL).
    """
    device = machine.device(device_id)
    if not device.region or nth < 0:
        raise InvalidRequestError(f"inject touch failure: {device} has no memory, or {nth} is negative")
    machine.frames.region(device.region).failing_touches = nth


@immediate
def inject_copy_failure(machine: Machine, mirror_id: MirrorId, nth: int) -> None:
    """Let the copy of the nth page from now on (1 is the next one, 0 is none) fail, to a mirror's device or back.

    Pages count that are filled for the mirror on its device, zeroes too, and those that come back from where its driver
    has put them, for whatever reason.  It fails once, and what becomes of the page is what became of it when a driver's
    own copy fails:

    - 2015: on its way to the device it stays where it is; on the way back, and for the child of a fork, it is lost.
    - Today: it stays where it is, and so does all of a huge page that was to move as one.  Where a CPU or another
      device touched it, that is SIGBUS (BUS_ADRERR), or EFAULT to a range fault.

    Source: linux-mm, "HMM: new callback for copying memory from and to device memory"; Linux
    drivers/gpu/drm/nouveau/nouveau_dmem.c, nouveau_dmem_migrate_copy_one(), nouveau_dmem_migrate_to_ram().

    Raises:
        InvalidRequestError: its device has no memory, or its driver carries the copies, or `nth` is negative (EINVAL).
        DeviceLostError, NoSuchObjectError: the mirror is gone (ENODEV).
    """
    mirror = machine.receiver(mirror_id)
    mirror.require_live("inject copy failure")
    region = machine.frames.region(mirror.device.region) if mirror.device.region else None
    if region is None or region.remote or nth < 0:
        raise InvalidRequestError(
            f"inject copy failure: {mirror.device} has no memory that pages are copied to here, or {nth} is negative"
        )
    machine.frames.failing_copies.pop(mirror_id, None)
    if nth:
        machine.frames.failing_copies[mirror_id] = nth
