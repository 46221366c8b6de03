"""Commands of a driver that takes the steps of a migration itself.

    migrate_vma_setup       what can be moved is out of the page tables and locked, and its driver gets its words
    migrate_vma_allocate    frames for destinations: of a device, or of the system
    migrate_vma_copy        the device copies frames; _read and _write move bytes between it and its driver
    migrate_vma_pages       where each page goes
    migrate_vma_finalize    the pages are where they go; or, where that is given up, where they were

**Source**: Linux mm/migrate_device.c, include/linux/migrate.h, 6.12; modules called name theirs.

**Invariants**: only whoever began a migration takes its steps.

**Absent**: the migration itself (migrate_steps.py); those that are one call (commands_hmm.py); leases.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from hmm.commands_hmm import Migrated, live_mirror, memory_of
from hmm.errors import InvalidRequestError
from hmm.frames import SYSTEM_REGION, Region
from hmm.interval_notifier import IntervalMirror
from hmm.machine import Machine
from hmm.migrate_steps import PastMigration, Step, SteppedMigration
from hmm.migration import Select
from hmm.operation import Operation, immediate
from hmm.receiver import MirrorState
from hmm.units import PAGE_SIZE, AddressRange, DeviceId, Entries, MirrorId, Pfns
from hmm.zone_device import forget_holder

_SELECT = sum(Select)


@dataclass(frozen=True, slots=True, eq=False)
class MigrationSetUp:
    """A migration that waits for its driver.

    Attributes:
        migration_id: names it from now on.
        src: uint64[npages]; MIGRATE stands in those of the pages that can be moved.  A hole has nothing else.
    """

    migration_id: int
    src: Entries


def migrate_vma_setup(
    machine: Machine, mirror_id: MirrorId, span: AddressRange, *, select: int = Select.SYSTEM
) -> Operation[MigrationSetUp | Migrated]:
    """Begin a migration of a part of one VMA: collect what is selected, unmap and lock it.

    It replies with a MigrationSetUp; the operation itself ends with the migration, with its words, and holds mmap_lock
    for reading until then.  It has to be finalized, also where nothing could be collected.

    Args:
        select: `Select`, of which device's pages the mirror's own; 0 selects holes only.

    Raises:
        InvalidRequestError: an unknown flag, an empty or unaligned range, not in one VMA, or a VMA that nothing can be
            moved in (EINVAL).
        NoSuchObjectError: the process has exited (ESRCH).
        OutOfFramesError: too many migrations are under way (ENOMEM).
        TimedOutError: a mirror with policy FAIL did not answer; nothing was moved (ETIMEDOUT).

    Cost: O(pages), vectorised.  Source: Linux mm/migrate_device.c, migrate_vma_setup().
    """
    if select & ~_SELECT:
        raise InvalidRequestError(f"migrate_vma_setup: select {select:#x} has unknown flags")
    mirror = live_mirror(machine, mirror_id)
    require_room = partial(machine.require_room, "migrations", limit=machine.limits.migrations)
    require_room(len(machine.migrations))
    number, operation_id = machine.next_id("migration"), machine.current.operation_id
    stepped = SteppedMigration(
        number, machine.caller.token, mirror_id, mirror.device.id, mirror.space, span, operation_id
    )

    def set_up() -> None:
        mirror.require_live("migrate_vma_setup")  # it may have been lost meanwhile
        require_room(len(machine.migrations))  # others may have been quicker
        machine.migrations[number] = stepped
        stepped.fences_told = len(machine.operations[operation_id].fenced)
        machine.reply(MigrationSetUp(number, stepped.words[0]))

    try:
        yield from stepped.run(Select(select), set_up)
    finally:
        if machine.migrations.pop(number, None) is not None:
            machine.past_migrations.append(PastMigration(number, stepped.owner, stepped.why))
        for holder in stepped.holders:
            receiver = machine.receivers.get(holder)
            if receiver is None or receiver.state is not MirrorState.LIVE:  # it was lost meanwhile
                forget_holder(machine.frames, holder)
    return Migrated(*stepped.words)


def migrate_vma_allocate(
    machine: Machine, migration_id: int, count: int, *, device_id: DeviceId = 0, compound: bool = False
) -> Operation[Pfns]:
    """Allocate destinations, as many as there is room for; those that get no page are freed when the migration ends.

    Args:
        device_id: whose memory; 0 for the system's.  Another device than the mirror's has a live mirror of this
            address space, which is told when pages have to come back from there.
        compound: large folios, of which the first frames are returned.

    Returns: int64[n], n <= count, frames that read as zeroes.

    Raises:
        NoSuchObjectError: there is no such migration, or it has ended (ENOENT); the device has no memory (ENODEV).
        InvalidRequestError: more than the migration has pages; its destinations are given; no live mirror on that
            device (EINVAL).
        AccessDeniedError: it is somebody else's migration, or device (EPERM).

    Source: lib/test_hmm.c, dmirror_devmem_alloc_page(); drivers/gpu/drm/amd/amdkfd/kfd_migrate.c,
    svm_migrate_get_vram_page().
    """
    stepped = machine.migration(migration_id)
    region, holder = _region(machine, stepped, device_id)
    return (yield from stepped.allocate(count, region, holder, compound=compound))


def _region(machine: Machine, stepped: SteppedMigration, device_id: DeviceId) -> tuple[Region, MirrorId]:
    if not device_id:
        return machine.frames.region(SYSTEM_REGION), 0
    device = machine.device(device_id)
    region = memory_of(machine, device)
    if device_id == stepped.device_id:
        return region, stepped.mirror_id
    for mirror in machine.receivers.values():
        is_its = mirror.device is device and mirror.space is stepped.space and isinstance(mirror, IntervalMirror)
        if is_its and mirror.state is MirrorState.LIVE:
            return region, mirror.id
    raise InvalidRequestError(f"allocate: {device} has no live mirror of the address space of {stepped}")


@immediate
def migrate_vma_copy(machine: Machine, migration_id: int, sources: Pfns, targets: Pfns) -> None:
    """As `SteppedMigration.copy`: the device's copy engine."""
    machine.migration(migration_id).copy(sources, targets)


@immediate
def migrate_vma_read(
    machine: Machine, migration_id: int, pfns: Pfns, *, offset: int = 0, length: int | None = None
) -> bytes:
    """The device reads frames of a migration, or a part of them.

    Args:
        offset: the first byte, of the frames one behind the other.
        length: how many bytes; None: all that there are.

    Raises:
        NoSuchObjectError: there is no such migration, or it has ended (ENOENT).
        InvalidRequestError: a frame is not the migration's, or the part is not in them (EINVAL).
    """
    stepped = machine.migration(migration_id)
    length = _part("read", pfns, offset, length)
    return stepped.read(pfns).reshape(-1)[offset : offset + length].tobytes()


@immediate
def migrate_vma_write(machine: Machine, migration_id: int, pfns: Pfns, data: bytes, *, offset: int = 0) -> None:
    """The device writes destinations of a migration, or a part of them.  Args, Raises: as `migrate_vma_read`."""
    stepped = machine.migration(migration_id)
    _part("write", pfns, offset, len(data))
    stepped.write(pfns, data, offset)


def _part(operation: str, pfns: Pfns, offset: int, length: int | None) -> int:
    size = pfns.size * PAGE_SIZE
    wanted = size - offset if length is None else length
    if not (0 <= offset <= offset + wanted <= size):
        raise InvalidRequestError(f"{operation}: {wanted} bytes from {offset} are no part of {pfns.size} frames")
    return wanted


def migrate_vma_pages(machine: Machine, migration_id: int, dst: Entries) -> Operation[Migrated]:
    """Say where each page goes, as `SteppedMigration.set_destinations`; holes are filled now.

    The same call again gets the reply again, as long as the migration is not finalized.

    Returns: the words: MIGRATE is left in `src` where the page moves.

    Raises:
        NoSuchObjectError: there is no such migration, or it has ended (ENOENT).
        InvalidRequestError: a word that cannot be, or `pages` was called before with other words (EINVAL); nothing was
            changed.
        RangeBusyError: another step is under way (EBUSY).
        TimedOutError: a mirror with policy FAIL did not answer when holes were to be filled, or its lease ended
            meanwhile; the migration has ended, and its pages are where they were (ETIMEDOUT).
        WouldDeadlockError: called from inside a callback that filling holes waits for (EDEADLK); they are filled when
            that has returned.  The same call gets its reply then.

    Source: Linux mm/migrate_device.c, migrate_vma_pages().
    """
    stepped = machine.migration(migration_id)
    if stepped.was_told(dst):
        yield from _telling(machine, stepped, stepped.taken(Step.PAGES))
    else:
        stepped.require_idle("pages")
        stepped.set_destinations(dst)
        yield from _telling(machine, stepped, stepped.take(Step.PAGES))
    return Migrated(*stepped.words)


def migrate_vma_finalize(machine: Machine, migration_id: int, *, abort: bool = False) -> Operation[Migrated]:
    """End a migration: pages with MIGRATE are at their destinations, all others where they were.

    Without `migrate_vma_pages` before it nothing has a destination.

    Args:
        abort: nothing is moved, but for holes that were filled.

    Returns: the words; `dst` has the frames of what was moved.

    Raises:
        NoSuchObjectError: there is no such migration, or it has ended (ENOENT).
        RangeBusyError: another step is under way (EBUSY).
        TimedOutError, DeviceLostError: it has ended meanwhile: its lease, or its mirror was lost (ETIMEDOUT, ENODEV).

    Source: Linux mm/migrate_device.c, migrate_vma_finalize().
    """
    stepped = machine.migration(migration_id)
    step = Step.ABORT if abort else Step.FINALIZE
    stepped.require_idle(step.value)
    yield from _telling(machine, stepped, stepped.take(step))
    return Migrated(*stepped.words)


def _telling(machine: Machine, stepped: SteppedMigration, step: Operation[None]) -> Operation[None]:
    """Take a step.  Its call tells of the mirrors that were lost since the last one, or since the setup."""
    taking, moving = machine.operations[machine.current.operation_id], machine.operations[stepped.operation_id]
    try:
        yield from step
    finally:
        taking.fenced += moving.fenced[stepped.fences_told :]
        stepped.fences_told = len(moving.fenced)
