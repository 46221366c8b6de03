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

import numpy as np

from hmm import device_access, pte
from hmm.device import Device
from hmm.device_access import PLAIN, Manner, Segment
from hmm.device_fault import Faulted, fault_pages, fault_range, fault_whole_range
from hmm.device_pages import evict
from hmm.errors import ConflictError, InvalidRequestError
from hmm.frames import RegionKind
from hmm.iommu import Iommu
from hmm.machine import Machine
from hmm.mirror import DeadlinePolicy, Mirror, MirrorState
from hmm.operation import Await, Operation, WaitFor, immediate
from hmm.spans import inside
from hmm.units import PAGE_SIZE, TASK_SIZE, AddressRange, DeviceId, Entries, MirrorId, ProcessId, is_page_aligned


@dataclass(frozen=True, slots=True)
class DeviceFaulted:
    """The result of a fault call over any number of ranges or pages.

    Attributes:
        parts: one Faulted per range asked for, or per VMA of scattered pages.
        entries: uint64[n], the mirror's entry of every page asked for, in order; 0 where it has none, and where an
            invalidation has been sent already.
        notifier_seq: the address space's notifier sequence when the entries were read.
        event_sequence: the last event sent to the mirror before the entries were read: a later event that overlaps
            makes this result stale.
    """

    parts: tuple[Faulted, ...]
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
) -> DeviceId:
    """Register a device; with `dma` its mirrors' entries hold DMA addresses of an emulated IOMMU.

    Args:
        memory_pages: size of its own memory.
        kind: whether the CPU can reach that memory.

    Raises:
        InvalidRequestError: an empty name, a negative size, or memory of the system's kind (EINVAL).
        OutOfFramesError: too many devices, or no frame numbers left for so much memory (ENOMEM).

    Source: hmm_device_register(); Linux mm/memremap.c, memremap_pages().
    """
    if not name or memory_pages < 0 or kind is RegionKind.SYSTEM:
        raise InvalidRequestError(f"register device: name {name!r}, {memory_pages} pages of {kind.value} memory")
    machine.require_room("devices", len(machine.devices), machine.limits.devices)
    iommu = Iommu(machine.limits.dma_pages) if dma else None
    number = machine.next_id("device")
    region = machine.frames.add_region(memory_pages, number, kind).number if memory_pages else 0
    machine.devices[number] = Device(number, name, machine.caller.token, iommu, region)
    return number


def unregister_device(machine: Machine, device_id: DeviceId) -> Operation[None]:
    """Unregister a device; what is in its memory comes back to system memory first.

    Raises:
        ConflictError: it still has mirrors, or a page of its memory is in use otherwise (EBUSY).
        OutOfFramesError: there is no room for what is in its memory (ENOMEM); it stays registered.

    Source: hmm_device_unregister(); Linux mm/memremap.c, memunmap_pages().
    """
    device = machine.device(device_id)
    if any(receiver.device is device for receiver in machine.receivers.values()):
        raise ConflictError(f"unregister device: {device} still has mirrors", errnos.EBUSY)
    if device.region:
        region = machine.frames.region(device.region)
        if region.used:
            yield from evict(machine.frames, machine.spaces.values(), region)
        machine.frames.remove_region(device.region)
    machine.devices.pop(device_id, None)


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

    An invalidation that is running already is not delivered; the mirror takes part from its end.

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
    machine.add_receiver(mirror)
    return mirror.id


def unregister_mirror(machine: Machine, mirror_id: MirrorId) -> Operation[None]:
    """Stop mirroring: running callbacks end, everything is taken back, `release` is called, the mirror is gone.

    Raises:
        WouldDeadlockError: called from inside a callback of this mirror (EDEADLK); nothing was changed.
        TimedOutError: its policy is FAIL, and it still owes the answer to an abandoned event (ETIMEDOUT).

    Source: hmm_mirror_unregister(), hmm_mirror_kill().
    """
    mirror = machine.mirror(mirror_id)
    if mirror.unanswered:
        yield _callbacks(mirror)
    if mirror.state is MirrorState.LIVE and not mirror.leaving:
        mirror.leaving = True
        yield from mirror.space.notifier.end((mirror_id,), machine.current.operation_id)
    while mirror_id in machine.mirrors and (mirror.leaving or mirror.unanswered):
        yield _callbacks(mirror)
    machine.remove_receiver(mirror_id)


def _callbacks(mirror: Mirror) -> Await:
    # Not those that come later: a busy process would keep its mirror for ever.
    return Await(WaitFor.CALLBACKS, mirror.space.id, ticket=mirror.sequence, mirror_id=mirror.id)


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
        entries = mirror.table.lookup(target)
    else:
        one = fault_whole_range if whole else fault_range
        parts = []
        for span in target:
            parts.append((yield from one(mirror, span, write=write, wait=wait)))
        entries = _entries_of(mirror, target)
    if mirror.unsettled:
        _leave_out_unsettled(mirror, target, entries)
    return DeviceFaulted(tuple(parts), entries, mirror.space.notifier.sequence, mirror.sequence)


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


@immediate
def inject_dma_failure(machine: Machine, device_id: DeviceId, nth: int) -> None:
    """Make the nth next DMA mapping call of a device fail (1 is the next one, 0 is none)."""
    device = machine.device(device_id)
    if device.iommu is None or nth < 0:
        raise InvalidRequestError(f"inject DMA failure: {device} does no DMA, or {nth} is negative")
    device.iommu.failing = nth


@immediate
def inject_allocation_failure(machine: Machine, nth: int) -> None:
    """Make the nth page of system memory from now on (1 is the next one, 0 is none) impossible to allocate.

    What comes behind it fails too, until a call has ended with ENOMEM.  Source: Linux lib/fault-inject.c.
    """
    if nth < 0:
        raise InvalidRequestError(f"inject allocation failure: {nth} is negative")
    machine.frames.fail_allocation(nth)


def _require_inside(target: Sequence[AddressRange] | Entries) -> None:
    if isinstance(target, np.ndarray):
        end = int(target.max(initial=0))
    else:
        end = max((span.end for span in target), default=0) - PAGE_SIZE
    if end >= TASK_SIZE:
        raise InvalidRequestError(f"fault: {end:#x} is beyond the address space", address=end)


def _entries_of(mirror: Mirror, spans: Sequence[AddressRange]) -> Entries:
    if len(spans) == 1:
        return mirror.table.read(spans[0].start, spans[0].end)
    entries = np.empty(sum(span.npages for span in spans), np.uint64)
    position = 0
    for span in spans:
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


def _mirror_of_range(machine: Machine, mirror_id: MirrorId, span: AddressRange, operation: str) -> Mirror:
    mirror = machine.mirror(mirror_id)
    mirror.require_live(operation)
    if not span or not is_page_aligned(span.start | span.end) or span.end > mirror.span.end:
        raise InvalidRequestError(f"{operation}: {span} is empty, not page-aligned or beyond the address space")
    return mirror
