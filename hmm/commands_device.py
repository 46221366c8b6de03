"""Commands of the device side: what a driver can ask of the machine.

Every function is a command for `Machine.start`: a generator over the machine that takes and returns plain values.

**Source**: linux-mm, "HMM: introduce heterogeneous memory management v4" for the life cycle; the modules called name
theirs.

**Absent**: transport; a driver's answers, which are inputs of their own (`Machine.answer`).
"""

from __future__ import annotations

import errno as errnos
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hmm import cpu_pte, device_access, pte
from hmm.device import Device
from hmm.device_access import PLAIN, Manner, Segment
from hmm.device_fault import Faulted, fault_pages, fault_range
from hmm.errors import (
    ConflictError,
    HmmError,
    InUseError,
    InvalidRequestError,
    NoSuchObjectError,
    OutOfFramesError,
    TimedOutError,
)
from hmm.events import EventType
from hmm.eviction import evict, make_room
from hmm.frames import RegionKind
from hmm.iommu import Iommu
from hmm.machine import Machine
from hmm.mirror import DeadlinePolicy, Mirror, MirrorState
from hmm.mirror_memory import MirrorMemory
from hmm.mirror_migrate import MakeRoom, Moved, migrate_range
from hmm.operation import Operation, Pause, immediate
from hmm.spans import inside
from hmm.units import (
    PAGE_SIZE,
    TASK_SIZE,
    Address,
    AddressRange,
    DeviceId,
    Entries,
    MirrorId,
    ProcessId,
    is_page_aligned,
)

RANGES_IN_STEP = 64
"""Ranges that a fault brings in before others may go on."""


class DeviceFaulted(NamedTuple):
    """The result of a fault call over any number of ranges or pages.

    Attributes:
        parts: one Faulted per range asked for, or per VMA of scattered pages.
        entries: uint64[n], the mirror's entry of every page asked for, in order; 0 where it has none, where an
            invalidation has been sent already, and of pages on their way to or from the device.
        notifier_seq: the address space's notifier sequence when the entries were read.
        event_sequence: the last event sent to the mirror before the entries were read: a later event that overlaps
            makes this result stale.
    """

    parts: tuple[Faulted, ...]
    entries: Entries
    notifier_seq: int
    event_sequence: int


@dataclass(frozen=True, slots=True)
class DeviceMigrated:
    """The result of a migration of pages to or from a device's memory.

    Attributes:
        moved: what was done.
        entries, notifier_seq, event_sequence: as in DeviceFaulted, for the pages of `moved.span`.
    """

    moved: Moved
    entries: Entries
    notifier_seq: int
    event_sequence: int


@immediate
def register_device(
    machine: Machine,
    name: str,
    *,
    dma: bool = False,
    memory_pages: int = 0,
    kind: RegionKind = RegionKind.DEVICE_PRIVATE,
    driver_copies: bool = False,
    evicts: bool = False,
) -> DeviceId:
    """Register a device; with `dma` its mirrors' entries hold DMA addresses of an emulated IOMMU.

    Args:
        memory_pages: size of its own memory.
        kind: whether the CPU can reach that memory.
        driver_copies: the driver has the bytes of that memory, and carries pages there and back (COPY_TO_DEVICE,
            COPY_FROM_DEVICE); else the daemon has them.  Only memory that the CPU cannot reach.
        evicts: pages that are to be moved to that memory when it is full take the place of those that went there
            longest ago; else as many are moved as there is room for.

    Raises:
        InvalidRequestError: an empty name, a negative size, memory of the system's kind, or copies by the driver
            without private memory (EINVAL).
        OutOfFramesError: too many devices, or no frame numbers left for so much memory (ENOMEM).

    Source: hmm_device_register(); Linux mm/memremap.c, memremap_pages().
    """
    fitting = memory_pages > 0 and kind is RegionKind.DEVICE_PRIVATE
    if not name or memory_pages < 0 or kind is RegionKind.SYSTEM or (driver_copies and not fitting):
        raise InvalidRequestError(f"register device: name {name!r}, {memory_pages} pages of {kind.value} memory")
    machine.require_room("devices", len(machine.devices), machine.limits.devices)
    iommu = Iommu(machine.limits.dma_pages) if dma else None
    number = machine.next_id("device")
    memory = machine.frames.add_region(memory_pages, number, kind, remote=driver_copies) if memory_pages else None
    region = memory.number if memory else 0
    machine.devices[number] = Device(number, name, machine.caller.token, iommu, region, evicts)
    return number


def unregister_device(machine: Machine, device_id: DeviceId) -> Operation[None]:
    """Unregister a device; what is in its memory comes back to system memory first.

    Raises:
        InUseError: it still has mirrors, or a page of its memory is in use otherwise (EBUSY).
        OutOfFramesError: there is no room for what is in its memory (ENOMEM); it stays registered.

    Source: hmm_device_unregister(); Linux mm/memremap.c, memunmap_pages().
    """
    device = _device_without_mirrors(machine, device_id)
    if device.region:
        region = machine.frames.region(device.region)
        if region.used:
            yield from evict(machine.frames, machine.spaces, region, machine.current.operation_id)
            device = _device_without_mirrors(machine, device_id)  # one may have come, or another call was quicker
        machine.frames.remove_region(device.region)
    del machine.devices[device_id]


def _device_without_mirrors(machine: Machine, device_id: DeviceId) -> Device:
    device = machine.device(device_id)
    if any(receiver.device is device for receiver in machine.receivers.values()):
        raise InUseError(f"unregister device: {device} still has mirrors")
    return device


@immediate
def register_mirror(
    machine: Machine,
    device_id: DeviceId,
    process_id: ProcessId,
    *,
    policy: DeadlinePolicy = DeadlinePolicy.FENCE,
    update_on_fault: bool = True,
    lenient: bool = False,
) -> MirrorId:
    """Mirror a process's address space.  Callbacks may come before the caller has the result.

    An invalidation that is running already is not delivered; the mirror takes part from its end.  When the device has
    memory that the CPU cannot reach, pages can be moved there through the mirror.

    Args:
        update_on_fault: deliver DEVICE_RFAULT and DEVICE_WFAULT for the mirror's own faults, as in 2015; without,
            the result of the fault alone tells the driver.
        lenient: refused accesses of the device are reported, and do not fail.

    Raises:
        ConflictError: the device mirrors this address space already (EINVAL).
        OutOfFramesError: too many mirrors (ENOMEM).

    Source: hmm_mirror_register().  Differs: the posted code tested a NULL local, so that duplicates slipped through.
    """
    device = machine.device(device_id)
    process = machine.process(process_id)
    space = process.space
    for other in machine.mirrors.values():
        if other.device is device and other.space is space and other.state is MirrorState.LIVE:
            raise ConflictError(f"register mirror: {device} mirrors {process} already ({other})", errnos.EINVAL)
    if device.region and any(
        other.device is device and not isinstance(other, Mirror) for other in machine.receivers.values()
    ):
        raise InUseError(f"register mirror: {device} has memory, and a driver of today's interface")
    machine.require_room("mirrors", len(machine.receivers), machine.limits.mirrors)
    mirror = Mirror(
        machine.next_id("mirror"),
        device,
        space,
        process_id,
        machine.caller.token,
        policy,
        update_on_fault=update_on_fault,
        lenient=lenient,
        directories=machine.limits.directories,
    )
    if device.region and machine.frames.region(device.region).kind is RegionKind.DEVICE_PRIVATE:
        mirror.home = MirrorMemory(mirror, machine.frames.region(device.region))
    machine.add_receiver(mirror)
    return mirror.id


def unregister_mirror(machine: Machine, mirror_id: MirrorId) -> Operation[None]:
    """Stop mirroring: running callbacks end, everything is taken back, `release` is called, the mirror is gone.

    What it has in its device's memory is brought back first, so that nothing is lost.

    Raises:
        WouldDeadlockError: called from inside a callback of this mirror (EDEADLK); nothing was changed.
        TimedOutError: its policy is FAIL, and it did not answer in time that it stops, or still owes the answer to an
            earlier event (ETIMEDOUT): it stays registered as it was.  Or it did not answer `release` (ETIMEDOUT): it is
            released, and gone when it is unregistered again after that answer.
        OutOfFramesError: there is no room for what is in its device's memory (ENOMEM); it stays registered.

    Source: hmm_mirror_unregister(), hmm_mirror_kill().
    """
    mirror = machine.mirror(mirror_id)
    if mirror.owes:
        yield mirror.callbacks()
    while mirror.state is MirrorState.LIVE:
        if mirror.leaving:  # another call ends it, unless that one fails
            yield mirror.callbacks()
        else:
            yield from _end_mirror(mirror, machine.current.operation_id)
    while mirror_id in machine.mirrors and mirror.owes:
        yield mirror.callbacks()
    machine.remove_receiver(mirror_id)


def _end_mirror(mirror: Mirror, operation_id: int) -> Operation[None]:
    mirror.leaving = operation_id
    try:
        if mirror.home is not None:
            yield from mirror.home.vacate((mirror.span,))
        if mirror.state is MirrorState.LIVE:
            yield from mirror.space.notifier.end((mirror.id,), operation_id, certain=False)
    except HmmError:
        if mirror.leaving == operation_id:  # else its own answer to another event is its end meanwhile
            mirror.leaving = 0
        raise


def fault(
    machine: Machine,
    mirror_id: MirrorId,
    target: Sequence[AddressRange] | Entries,
    *,
    write: bool,
    wait: bool = True,
    whole: bool = True,
) -> Operation[DeviceFaulted]:
    """Fault ranges or scattered pages in: begin, fault and retry in one call.

    Args:
        target: ranges, page-aligned; or uint64[n] page addresses, ascending and unique.
        wait: False answers EBUSY instead of waiting for an invalidation.
        whole: go on across the ends of VMAs; False stops at the first end, as `hmm_mirror_fault` does.

    Raises, Source: as `device_fault.fault_range`.

    Cost: O(pages), vectorised.
    """
    mirror = machine.mirror(mirror_id)
    mirror.require_filling("fault")
    _require_inside(target)
    if isinstance(target, np.ndarray):
        parts = yield from fault_pages(mirror, target, write=write, wait=wait)
    else:
        parts = []
        for span in target:
            if len(parts) % RANGES_IN_STEP == RANGES_IN_STEP - 1:
                yield Pause()
            parts.append((yield from fault_range(mirror, span, write=write, wait=wait, whole=whole)))
    entries = parts[0].entries if len(parts) == 1 else None
    if entries is None:
        entries = _entries_of(mirror, target)
    if mirror.space.notifier.dispatches or mirror.space.notifier.copies:
        _leave_out_unsettled(mirror, target, entries)
    for part in parts:
        if isinstance(part.error, OutOfFramesError):
            machine.frames.fail_allocation(0)  # an injected failure has been met
    return DeviceFaulted(tuple(parts), entries, mirror.space.notifier.sequence, mirror.sequence)


def mirror_fault(
    machine: Machine, mirror_id: MirrorId, span: AddressRange, etype: EventType
) -> Operation[Faulted | Moved]:
    """One fault as posted: DEVICE_RFAULT and DEVICE_WFAULT fill the mirror, COPY_TO_DEVICE moves pages to its device.

    Raises:
        InvalidRequestError: another type, COPY_FROM_DEVICE too (EINVAL); `migrate_back` is for that.
        As `device_fault.fault_range` and `migrate`.

    Source: hmm_mirror_fault().
    """
    mirror = machine.mirror(mirror_id)
    mirror.require_filling("fault")
    _require_inside((span,))
    if etype is EventType.COPY_TO_DEVICE:
        return (yield from migrate_range(_memory(mirror), span, _making_room(machine, mirror)))
    if etype not in (EventType.DEVICE_RFAULT, EventType.DEVICE_WFAULT):
        raise InvalidRequestError(f"fault: {etype.name} is no fault of a device")
    return (yield from fault_range(mirror, span, write=etype is EventType.DEVICE_WFAULT))


def migrate(machine: Machine, mirror_id: MirrorId, span: AddressRange) -> Operation[DeviceMigrated]:
    """Move what can be moved of a range to the device's memory, as `mirror_migrate.migrate_range`.

    It is `mirror_fault` with COPY_TO_DEVICE, and returns the entries too.

    Raises: also NoSuchObjectError: the device has no memory that pages could move to (ENODEV).
    """
    mirror = machine.mirror(mirror_id)
    mirror.require_filling("migrate")
    _require_inside((span,))
    moved = yield from migrate_range(_memory(mirror), span, _making_room(machine, mirror))
    return _migrated(mirror, moved)


def _making_room(machine: Machine, mirror: Mirror) -> MakeRoom | None:
    def make(span: AddressRange) -> Operation[int]:
        return (yield from make_room(mirror.space, machine.spaces, span, _memory(mirror).region))

    return make if mirror.device.evicts else None


def migrate_back(machine: Machine, mirror_id: MirrorId, span: AddressRange) -> Operation[DeviceMigrated]:
    """Bring back to system memory what the mirror has of a range in its device's memory.

    Posted as a use of hmm_mirror_fault() with COPY_FROM_DEVICE, which that function answers with EINVAL.

    Returns: what was moved; an error that stopped it is in the result, with what was moved before.

    Raises: as `migrate`.
    """
    mirror = _mirror_of_range(machine, mirror_id, span, "migrate")
    memory = _memory(mirror)
    before, error = mirror.on_device(span).size, None
    try:
        yield from memory.vacate((span,))
    except (OutOfFramesError, TimedOutError) as failure:
        error = failure
    mirror.require_live("migrate")
    left = mirror.on_device(span)
    end = int(left[0]) if left.size else span.end
    return _migrated(mirror, Moved(span, end, max(0, before - left.size), error))


def _migrated(mirror: Mirror, moved: Moved) -> DeviceMigrated:
    entries = _entries_of(mirror, (moved.span,))
    if mirror.space.notifier.dispatches or mirror.space.notifier.copies:
        _leave_out_unsettled(mirror, (moved.span,), entries)
    return DeviceMigrated(moved, entries, mirror.space.notifier.sequence, mirror.sequence)


@immediate
def read_copy(machine: Machine, mirror_id: MirrorId, number: int, first: int, npages: int) -> bytes:
    """As `MirrorMemory.read_copy`: what the driver asks for while it handles COPY_TO_DEVICE."""
    return _memory(machine.mirror(mirror_id)).read_copy(number, first, npages)


@immediate
def write_copy(machine: Machine, mirror_id: MirrorId, number: int, first: int, data: bytes) -> None:
    """As `MirrorMemory.write_copy`: what the driver brings while it handles COPY_FROM_DEVICE."""
    _memory(machine.mirror(mirror_id)).write_copy(number, first, data)


def _memory(mirror: Mirror) -> MirrorMemory:
    if not isinstance(mirror.home, MirrorMemory):
        raise NoSuchObjectError(f"{mirror.device} has no memory that pages could move to", errnos.ENODEV)
    return mirror.home


@immediate
def device_read(machine: Machine, mirror_id: MirrorId, segments: Sequence[Segment], manner: Manner = PLAIN) -> bytes:
    """As `device_access.device_read`."""
    return device_access.device_read(machine.mirror(mirror_id), segments, manner)


@immediate
def device_write(
    machine: Machine,
    mirror_id: MirrorId,
    segments: Sequence[Segment],
    data: bytes,
    manner: Manner = PLAIN,
) -> None:
    """As `device_access.device_write`."""
    device_access.device_write(machine.mirror(mirror_id), segments, data, manner)


@immediate
def dirty_range(machine: Machine, mirror_id: MirrorId, span: AddressRange) -> None:
    """Report that the device wrote in a range: sets DIRTY on its valid and writable entries.

    Source: hmm_mirror_range_dirty().
    """
    mirror = _mirror_of_range(machine, mirror_id, span, "dirty")
    mirror.mark_dirty(span)


@immediate
def discard_range(machine: Machine, mirror_id: MirrorId, span: AddressRange) -> None:
    """Drop the mirror's entries of a range, which the device has stopped using already; no callback, no waiting.

    Source: hmm_mirror_range_discard().
    """
    mirror = _mirror_of_range(machine, mirror_id, span, "discard")
    mirror.discard(span)


@immediate
def set_driver_bits(machine: Machine, mirror_id: MirrorId, span: AddressRange, bits: int) -> int:
    """Set the driver's private bits of all valid entries of a range.

    Args:
        bits: 0 to 15.

    Returns: number of entries changed.  An event that clears an entry clears these bits with it.
    """
    mirror = _mirror_of_range(machine, mirror_id, span, "set driver bits")
    if not 0 <= bits <= pte.DRIVER_MASK >> pte.HW_SHIFT:
        raise InvalidRequestError(f"set driver bits: {bits:#x} does not fit the driver's bits")
    addresses, entries = mirror.table.valid(span.start, span.end)
    mirror.table.store(addresses, pte.pte_set_driver(entries, bits))
    return addresses.size


@immediate
def read_table(machine: Machine, mirror_id: MirrorId, span: AddressRange) -> Entries:
    """uint64[npages]: the mirror's entries of a range, 0 where there is none."""
    mirror = _mirror_of_range(machine, mirror_id, span, "read table")
    return mirror.table.read(span.start, span.end)


def _require_inside(target: Sequence[AddressRange] | Entries) -> None:
    if isinstance(target, np.ndarray):
        if target.size:
            _require_page_inside(int(target[-1]))  # they ascend, or are refused for that
        return
    for span in target:
        if span.end > TASK_SIZE:
            _require_page_inside(span.end - PAGE_SIZE)


def _require_page_inside(page: Address) -> None:
    if page >= TASK_SIZE:
        raise InvalidRequestError(f"fault: {page:#x} is beyond the address space", address=page)


def _entries_of(mirror: Mirror, target: Sequence[AddressRange] | Entries) -> Entries:
    if isinstance(target, np.ndarray):
        return mirror.table.lookup(target)
    if len(target) == 1:
        return mirror.table.read(target[0].start, target[0].end)
    entries = np.empty(sum(span.npages for span in target), np.uint64)
    position = 0
    for span in target:
        mirror.table.read(span.start, span.end, entries[position : position + span.npages])
        position += span.npages
    return entries


def _leave_out_unsettled(mirror: Mirror, target: Sequence[AddressRange] | Entries, entries: Entries) -> None:
    # The driver may have answered for these pages, or will without knowing of this result.
    if isinstance(target, np.ndarray):
        addresses = target
    else:
        addresses = np.concatenate([np.arange(span.start, span.end, PAGE_SIZE, dtype=np.uint64) for span in target])
    for sent in mirror.unsettled.values():
        entries[inside(addresses, sent.event.spans)] = 0
    if mirror.space.notifier.copies:
        entries[cpu_pte.is_migration(mirror.space.table.lookup(addresses))] = 0


def _mirror_of_range(machine: Machine, mirror_id: MirrorId, span: AddressRange, operation: str) -> Mirror:
    mirror = machine.mirror(mirror_id)
    mirror.require_live(operation)
    if not span or not is_page_aligned(span.start | span.end) or span.end > mirror.span.end:
        raise InvalidRequestError(f"{operation}: {span} is empty, not page-aligned or beyond the address space")
    return mirror
