"""Commands of today's interface: what a driver of a current kernel calls.

    interval notifiers   attach detach insert_notifier remove_notifier read_begin read_retry
    looking and faulting find_vma range_fault range_fault_unlocked
    moving               migrate_to_device migrate_to_system evict_device
    exclusive access     make_exclusive give_back_exclusive
    DMA                  dma_map dma_unmap
    the device itself    read_frames write_frames read_dma write_dma

A driver attaches a device to a process once and gets one numbered stream of events for it; it inserts as many
interval notifiers there as it likes.

**Source**: Linux include/linux/mmu_notifier.h, hmm.h, migrate.h, rmap.h; the modules called name theirs.

**Invariants**: a driver reaches only processes that it attached to.

**Absent**: transport; a driver's answers (`Machine.answer`).
"""

from __future__ import annotations

import errno as errnos
from dataclasses import dataclass, replace

import numpy as np

from hmm import device_pages, eviction, exclusive, frame_access, hmm_dma
from hmm.device import Device
from hmm.errors import (
    AccessDeniedError,
    BadAddressError,
    HmmError,
    InUseError,
    InvalidRequestError,
    NoSuchObjectError,
    RangeBusyError,
)
from hmm.frames import Region
from hmm.interval_notifier import IntervalMirror
from hmm.machine import Machine
from hmm.migration import Migration
from hmm.operation import Operation, immediate
from hmm.range_fault import HmmRange
from hmm.range_fault import range_fault as fault_range
from hmm.receiver import DeadlinePolicy, MirrorState
from hmm.units import Address, AddressRange, DeviceId, Entries, MirrorId, Pfn, Pfns, ProcessId
from hmm.zone_device import forget_holder

EXCLUSIVE_PAGES = "exclusive_pages"
"""The counter of pages that a mirror has taken."""


@dataclass(frozen=True, slots=True)
class VmaView:
    """A VMA as drivers look at it."""

    start: Address
    end: Address
    readable: bool
    writable: bool


@dataclass(frozen=True, slots=True, eq=False)
class RangeFaulted:
    """What a range fault left in the words of a range.

    Attributes:
        words: uint64[npages]; behind the failing address they are what they were.
        error: why it failed: a BadAddressError, AccessDeniedError or RangeBusyError.
        notifier_seq: the sequence of the subscription that the words hold for.
        event_sequence: the last event sent to the mirror before the words were read: a later one that overlaps makes
            them stale.
        retries: how often the fault started over because the range was invalidated.
    """

    words: Entries
    error: HmmError | None
    notifier_seq: int
    event_sequence: int
    retries: int = 0

    def require(self) -> Entries:
        """The words; raises the error if there is one."""
        if self.error is not None:
            raise self.error
        return self.words


@dataclass(frozen=True, slots=True)
class Migrated:
    """Words of a migration, uint64[npages] each, in the layout of `hmm.migration`.

    Attributes:
        src: MIGRATE stands in those of the pages that were moved; of a huge page that moved as one only in the first
            word, with COMPOUND, and the rest are 0.
        dst: the destinations of these.
    """

    src: Entries
    dst: Entries


@dataclass(frozen=True, slots=True)
class DmaMapped:
    """Pages that are mapped for DMA.

    Attributes:
        words: uint64[n], with DMA_MAPPED.
        dma_addresses: uint64[n], in bytes.
    """

    words: Entries
    dma_addresses: Entries


@immediate
def attach(
    machine: Machine,
    device_id: DeviceId,
    process_id: ProcessId,
    *,
    policy: DeadlinePolicy = DeadlinePolicy.FENCE,
) -> MirrorId:
    """Let a device's driver subscribe to changes of a process's address space.  It may do so several times.

    Raises:
        OutOfFramesError: too many mirrors (ENOMEM).
        InUseError: the device has memory that mirrors of 2015 use, or whose driver copies (EBUSY).
    """
    device = machine.device(device_id)
    process = machine.process(process_id)
    mirrored = any(mirror.device is device for mirror in machine.mirrors.values())
    if device.region and (mirrored or machine.frames.region(device.region).remote):
        raise InUseError(f"attach: the memory of {device} is for mirrors of 2015")
    machine.require_room("mirrors", len(machine.receivers), machine.limits.mirrors)
    mirror = IntervalMirror(machine.next_id("mirror"), device, process.space, process_id, machine.caller.token, policy)
    machine.add_receiver(mirror)
    return mirror.id


def detach(machine: Machine, mirror_id: MirrorId) -> Operation[None]:
    """Remove all interval notifiers of a mirror, and the mirror, lost or not; running callbacks end first.

    Pages that it put on its device stay there.

    Raises:
        WouldDeadlockError: called from inside a callback of this mirror (EDEADLK); nothing was changed.
        TimedOutError: its policy is FAIL, and it still owes the answer to an abandoned event (ETIMEDOUT); nothing was
            changed.
        InUseError: a migration of it is not finalized (EBUSY).
    """
    mirror = _attached(machine, mirror_id)
    if unfinished := machine.migrations_of(mirror_id):
        raise InUseError(f"detach: {unfinished[0]} of {mirror} is not finalized")
    if mirror.owes:  # where this fails, it has to hear what comes after
        yield mirror.callbacks()
    yield from mirror.remove(list(mirror.notifiers))
    while mirror.owes and mirror_id in machine.receivers:
        yield mirror.callbacks()
    mirror.release(MirrorState.RELEASED)
    machine.remove_receiver(mirror_id)


@immediate
def insert_notifier(
    machine: Machine,
    mirror_id: MirrorId,
    start: Address,
    length: int,
    *,
    filtered: bool = False,
    two_pass: bool = False,
) -> int:
    """As `IntervalMirror.insert`; `filtered`: the mirror's own migrations do not disturb its read sections."""
    return hearing_mirror(machine, mirror_id).insert(start, length, filtered=filtered, two_pass=two_pass).id


def remove_notifier(machine: Machine, mirror_id: MirrorId, number: int) -> Operation[None]:
    """As `IntervalMirror.remove`."""
    yield from hearing_mirror(machine, mirror_id).remove((number,))


def read_begin(machine: Machine, mirror_id: MirrorId, number: int) -> Operation[int]:
    """As `IntervalMirror.read_begin`."""
    return (yield from hearing_mirror(machine, mirror_id).read_begin(number))


@immediate
def read_retry(machine: Machine, mirror_id: MirrorId, number: int, sequence: int) -> bool:
    """As `IntervalMirror.read_retry`."""
    return hearing_mirror(machine, mirror_id).read_retry(number, sequence)


@immediate
def find_vma(machine: Machine, mirror_id: MirrorId, address: Address) -> VmaView | None:
    """The VMA at an address.

    Raises:
        NoSuchObjectError: the process has exited (ESRCH).

    Source: include/linux/mm.h, vma_lookup().
    """
    vma = live_mirror(machine, mirror_id).space.vmas.find(address)
    return None if vma is None else VmaView(vma.start, vma.end, vma.readable, vma.writable)


def range_fault(
    machine: Machine,
    mirror_id: MirrorId,
    number: int,
    sequence: int,
    span: AddressRange,
    default_flags: int = 0,
    pfn_flags_mask: int = 0,
    words: Entries | None = None,
    *,
    may_retry: bool = False,
) -> Operation[RangeFaulted]:
    """As `range_fault.range_fault`, once; without flags a snapshot, which never faults.

    Args:
        words: uint64[npages], the pages' own requests; not changed.
        may_retry: whether it may wait for the handlers of userfaultfds.

    Raises:
        InvalidRequestError: an empty or unaligned range, or not as many words as pages (EINVAL).
        NoSuchObjectError: there is no such subscription (ENOENT), or the process has exited (ESRCH).
    """
    mirror = live_mirror(machine, mirror_id)
    copied = np.empty(span.npages, np.uint64) if words is None else words.copy()
    words_for = (span, copied, default_flags, pfn_flags_mask, mirror.device.id)
    request = HmmRange(mirror, number, sequence, *words_for, blank=words is None, may_retry=may_retry)
    error: HmmError | None = None
    try:
        yield from fault_range(request)
    except (BadAddressError, AccessDeniedError, RangeBusyError) as failed:
        error = failed
    return RangeFaulted(request.words, error, sequence, mirror.sequence)


def range_fault_unlocked(
    machine: Machine,
    mirror_id: MirrorId,
    number: int,
    span: AddressRange,
    default_flags: int = 0,
    pfn_flags_mask: int = 0,
    words: Entries | None = None,
) -> Operation[RangeFaulted]:
    """Begin a read section, fault, and do both again as long as the range is invalidated meanwhile.

    It waits for the handlers of userfaultfds; `range_fault`, which keeps the mmap lock, fails with EFAULT there.  When
    its caller's patience ends (`Machine.time_out`) it ends with EBUSY.

    Args, Raises: as `range_fault`.

    Source: hmm_range_fault_unlocked_timeout(), as posted in 2026.
    """
    retries = 0
    while True:
        mirror = live_mirror(machine, mirror_id)
        sequence = mirror.notifier(number).sequence
        try:
            sequence = yield from mirror.read_begin(number)
            args = (mirror_id, number, sequence, span, default_flags, pfn_flags_mask, words)
            faulted = yield from range_fault(machine, *args, may_retry=True)
        except RangeBusyError as error:  # its patience ended while it waited
            outputs = np.zeros(span.npages, np.uint64) if words is None else words.copy()
            faulted = RangeFaulted(outputs, error, sequence, mirror.sequence)
        if not isinstance(faulted.error, RangeBusyError) or machine.is_timed_out:
            return replace(faulted, retries=retries)
        retries += 1


def migrate_to_device(
    machine: Machine,
    mirror_id: MirrorId,
    span: AddressRange,
    *,
    compound: bool = False,
    wanted: device_pages.Wanted | None = None,
) -> Operation[Migrated]:
    """Move what can be moved of a part of one VMA to the mirror's device, as `device_pages.migrate_to_device`.

    If the device evicts, pages that went there longest ago make room (`eviction.make_room`).

    Raises: also
        InvalidRequestError: `wanted` is not of one page each (EINVAL).
        NoSuchObjectError: the device has no memory (ENODEV), or the process has exited (ESRCH).
    """
    npages = _wanted_pages(span, wanted)
    mirror = live_mirror(machine, mirror_id)
    region = memory_of(machine, mirror.device)
    if mirror.device.evicts and npages > region.free:
        yield from eviction.make_room(mirror.space, machine.spaces, span, region, wanted)
        live_mirror(machine, mirror_id)
    moving = device_pages.migrate_to_device(mirror.space, span, region, mirror_id, compound=compound, wanted=wanted)
    migration = yield from moving
    if mirror.state is not MirrorState.LIVE:  # it was lost meanwhile
        forget_holder(machine.frames, mirror_id)
    return _words(migration)


def migrate_to_system(
    machine: Machine,
    mirror_id: MirrorId,
    span: AddressRange,
    *,
    compound: bool = False,
    wanted: device_pages.Wanted | None = None,
) -> Operation[Migrated]:
    """Move what the mirror's device has of a part of one VMA back, as `device_pages.migrate_to_system`.

    Raises: as `migrate_to_device`.
    """
    _wanted_pages(span, wanted)
    mirror = live_mirror(machine, mirror_id)
    region = memory_of(machine, mirror.device)
    moving = device_pages.migrate_to_system(mirror.space, span, region, mirror_id, compound=compound, wanted=wanted)
    return _words((yield from moving))


def _wanted_pages(span: AddressRange, wanted: device_pages.Wanted | None) -> int:
    if wanted is None:
        return span.npages
    if wanted.size != span.npages:
        raise InvalidRequestError(f"migrate: {wanted.size} pages are wanted or not, of the {span.npages} of {span}")
    return int(np.count_nonzero(wanted))


@immediate
def device_frames(machine: Machine, device_id: DeviceId) -> tuple[Pfn, Pfn]:
    """The frames of a device's memory, from the first to behind the last.

    Raises: NoSuchObjectError: it has none (ENODEV).
    """
    region = memory_of(machine, machine.device(device_id))
    return region.start, region.end


def evict_device(machine: Machine, device_id: DeviceId) -> Operation[int]:
    """Move everything in a device's memory to system memory, as `eviction.evict`."""
    region = memory_of(machine, machine.device(device_id))
    return (yield from eviction.evict(machine.frames, machine.spaces, region, machine.current.operation_id))


def make_exclusive(
    machine: Machine, mirror_id: MirrorId, span: AddressRange, *, owned: bool = False
) -> Operation[Pfns]:
    """As `exclusive.make_device_exclusive_range`; `owned`: the event names the device and the mirror.

    The pages are the mirror's until the CPU, or a device's fault, touches them.
    """
    mirror = live_mirror(machine, mirror_id)
    owner, initiator = (mirror.device.id, mirror_id) if owned else (0, 0)
    taken = exclusive.make_device_exclusive_range(mirror.space, span, owner, initiator, holder=mirror_id)
    pfns = yield from taken
    mirror.counters[EXCLUSIVE_PAGES] += int(np.count_nonzero(pfns))
    if mirror.state is not MirrorState.LIVE:  # it was lost meanwhile
        yield from exclusive.give_back(mirror.space, exclusive.held_exclusively(mirror.space, mirror_id))
    return pfns


def give_back_exclusive(machine: Machine, mirror_id: MirrorId) -> Operation[int]:
    """Let the CPU have all pages again that a mirror has to itself; a mirror that was lost has none any more after it.

    Returns: how many there were.
    """
    mirror = machine.receiver(mirror_id)
    addresses = exclusive.held_exclusively(mirror.space, mirror_id)
    yield from exclusive.give_back(mirror.space, addresses)
    return int(addresses.size)


@immediate
def dma_map(
    machine: Machine, mirror_id: MirrorId, addresses: Entries, words: Entries, since: int | None = None
) -> DmaMapped:
    """As `hmm_dma.dma_map_pfns`."""
    return DmaMapped(*hmm_dma.dma_map_pfns(live_mirror(machine, mirror_id), addresses, words, since))


@immediate
def dma_unmap(machine: Machine, mirror_id: MirrorId, addresses: Entries, words: Entries) -> Entries:
    """As `hmm_dma.dma_unmap_pfns`; also when the process has exited."""
    return hmm_dma.dma_unmap_pfns(hearing_mirror(machine, mirror_id), addresses, words)


@immediate
def read_dma(
    machine: Machine,
    mirror_id: MirrorId,
    pages: Entries,
    since: int | None = None,
    *,
    offset: int = 0,
    length: int | None = None,
) -> bytes:
    """As `hmm_dma.read_dma`."""
    return hmm_dma.read_dma(hearing_mirror(machine, mirror_id), pages, since, offset=offset, length=length)


@immediate
def write_dma(
    machine: Machine, mirror_id: MirrorId, pages: Entries, data: bytes, since: int | None = None, *, offset: int = 0
) -> None:
    """As `hmm_dma.write_dma`."""
    hmm_dma.write_dma(hearing_mirror(machine, mirror_id), pages, data, since, offset=offset)


@immediate
def read_frames(
    machine: Machine,
    mirror_id: MirrorId,
    addresses: Entries,
    pfns: Pfns,
    since: int | None = None,
    *,
    offset: int = 0,
    length: int | None = None,
) -> bytes:
    """As `frame_access.read_frames`."""
    mirror = hearing_mirror(machine, mirror_id)
    return frame_access.read_frames(mirror, addresses, pfns, since, offset=offset, length=length)


@immediate
def write_frames(
    machine: Machine,
    mirror_id: MirrorId,
    addresses: Entries,
    pfns: Pfns,
    data: bytes,
    since: int | None = None,
    *,
    offset: int = 0,
) -> None:
    """As `frame_access.write_frames`."""
    if addresses.size != pfns.size:
        raise InvalidRequestError(f"write frames: {addresses.size} pages and {pfns.size} frames")
    mirror = hearing_mirror(machine, mirror_id)
    frame_access.write_frames(mirror, addresses, pfns, data, since, offset=offset)


def _attached(machine: Machine, mirror_id: MirrorId) -> IntervalMirror:
    mirror = machine.receiver(mirror_id)
    if not isinstance(mirror, IntervalMirror):
        raise NoSuchObjectError(f"{mirror} has no interval notifiers", errnos.ENODEV)
    return mirror


def hearing_mirror(machine: Machine, mirror_id: MirrorId) -> IntervalMirror:
    """A mirror of today's interface that hears."""
    mirror = _attached(machine, mirror_id)
    mirror.require_live()
    return mirror


def live_mirror(machine: Machine, mirror_id: MirrorId) -> IntervalMirror:
    """A mirror that hears, of a process that lives (ESRCH)."""
    mirror = hearing_mirror(machine, mirror_id)
    if not mirror.space.users:
        raise NoSuchObjectError(f"the process of {mirror} has exited", errnos.ESRCH)
    return mirror


def memory_of(machine: Machine, device: Device) -> Region:
    """A device's memory; it has some, or ENODEV."""
    if not device.region:
        raise NoSuchObjectError(f"{device} has no memory", errnos.ENODEV)
    return machine.frames.region(device.region)


def _words(migration: Migration) -> Migrated:
    return Migrated(*migration.arrays)
