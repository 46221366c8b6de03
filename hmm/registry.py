"""What a machine holds, how commands find it, and whose it is.

Objects have numbers, which are never used again.  What was made with a token can be used with that token only.

**Source**: our own; the objects are those of mm_struct, hmm_device and hmm_mirror.

**Invariants**: a mirror of 2015 is among the receivers too; what else must hold between objects stands in
invariants.py.

**Absent**: what changes them (the commands), and when (machine.py).
"""

from __future__ import annotations

import errno as errnos
from collections import deque
from dataclasses import dataclass
from weakref import WeakValueDictionary

from hmm.address_space import AddressSpace, SpaceLimits
from hmm.device import Device
from hmm.errors import AccessDeniedError, NoSuchObjectError, OutOfFramesError
from hmm.file import File
from hmm.frame_contents import MemoryProvider
from hmm.frames import Frames
from hmm.hugetlb import HugetlbPool
from hmm.ksm import Ksm
from hmm.limits import Limits
from hmm.migrate_steps import PastMigration, SteppedMigration, ended
from hmm.mirror import Mirror
from hmm.notifier import Notifier
from hmm.operation import Current
from hmm.operation_record import Caller
from hmm.pin import Pin
from hmm.receiver import Receiver
from hmm.reclaim import Reclaim
from hmm.semantics import Semantics
from hmm.swap_area import SwapArea
from hmm.units import DeviceId, MirrorId, ProcessId, SpaceId
from hmm.userfaultfd import Userfaultfd

__all__ = ["NOBODY", "Process", "Registry"]

PAST_RECEIVERS = 256
"""Receivers that are gone and whose violations can still be asked for."""
PAST_MIGRATIONS = 256
"""Migrations that have ended and of which it is known how."""
NOBODY = Caller()


@dataclass(slots=True, eq=False)
class Process:
    """A process: a name and the address space that it uses, alone or with its threads."""

    id: ProcessId
    name: str
    owner: str
    space: AddressSpace
    parent: ProcessId = 0

    def __str__(self) -> str:
        return f"process {self.id} ({self.name})"


class Registry:
    """Address spaces, processes, devices, mirrors, files, and the memory that they share.

    Attributes:
        caller: who started the operation that is being advanced.
        notifiers: of the address spaces, of those too that have ended with changes under way: these keep them, as
            mm_count keeps an mm_struct whose mm_users have gone (mmgrab()).
        userfaultfds: the address space to which each belongs, living or not.
    """

    def __init__(self, limits: Limits, semantics: Semantics, swap_memory: MemoryProvider, *, capable: bool) -> None:
        self.limits = limits
        self.semantics = semantics
        self.capable = capable
        self.current = Current()
        self.caller = NOBODY
        self.frames = Frames(limits.frames, limits.device_frames)
        self.hugetlb = HugetlbPool(self.frames, limits.hugetlb_pages)
        self.spaces: dict[SpaceId, AddressSpace] = {}
        self.notifiers: WeakValueDictionary[SpaceId, Notifier] = WeakValueDictionary()
        self.processes: dict[ProcessId, Process] = {}
        self.devices: dict[DeviceId, Device] = {}
        self.receivers: dict[MirrorId, Receiver] = {}
        self.past_receivers: deque[Receiver] = deque(maxlen=PAST_RECEIVERS)
        self.mirrors: dict[MirrorId, Mirror] = {}
        self.files: dict[int, File] = {}
        self.file_names: dict[str, int] = {}
        self.pins: dict[int, Pin] = {}
        self.migrations: dict[int, SteppedMigration] = {}
        self.past_migrations: deque[PastMigration] = deque(maxlen=PAST_MIGRATIONS)
        self.userfaultfds: dict[int, AddressSpace] = {}
        self.reclaim = Reclaim(self.frames, self.spaces, self.files, self.current, self._answering)
        if limits.swap_pages:
            self.frames.swap = SwapArea(limits.swap_pages, swap_memory)
            self.frames.make_room = self.reclaim.make_room
        self.ksm = Ksm(self.frames, self.spaces)
        self._last_id: dict[str, int] = {}

    def next_id(self, kind: str) -> int:
        """A number never used before for this kind of object."""
        number = self._last_id[kind] = self._last_id.get(kind, 0) + 1
        return number

    def new_space(self) -> AddressSpace:
        """An empty address space with one user."""
        limits = SpaceLimits(vmas=self.limits.vmas, directories=self.limits.directories)
        space = AddressSpace(self.next_id("space"), self.frames, self.current, limits, semantics=self.semantics)
        self.spaces[space.id], self.notifiers[space.id] = space, space.notifier
        return space

    def require_room(self, kind: str, count: int, limit: int) -> None:
        """ENOMEM when there are as many objects of a kind as the limits allow."""
        if count >= limit:
            raise OutOfFramesError(f"{kind}: the limit of {limit} is reached", reason="LIMIT")

    def process(self, process_id: ProcessId) -> Process:
        """Look a process up: ESRCH when there is none, EPERM when it belongs to somebody else."""
        process = self.processes.get(process_id)
        if process is None:
            raise NoSuchObjectError(f"there is no process {process_id}", errnos.ESRCH)
        if process.owner:
            self._require_owner(process.owner, process)
        return process

    def device(self, device_id: DeviceId) -> Device:
        """Look a device up: ENODEV when there is none, EPERM when it belongs to somebody else."""
        device = self.devices.get(device_id)
        if device is None:
            raise NoSuchObjectError(f"there is no device {device_id}", errnos.ENODEV)
        self._require_owner(device.owner, device)
        return device

    def receiver(self, mirror_id: MirrorId) -> Receiver:
        """Look up who gets events by this number: ENODEV when nobody, EPERM when it belongs to somebody else."""
        receiver = self.receivers.get(mirror_id)
        if receiver is None:
            raise NoSuchObjectError(f"there is no mirror {mirror_id}", errnos.ENODEV)
        if receiver.owner:
            self._require_owner(receiver.owner, receiver)
        return receiver

    def mirror(self, mirror_id: MirrorId) -> Mirror:
        """Look a mirror of 2015 up: ENODEV when there is none, EPERM when it belongs to somebody else."""
        mirror = self.mirrors.get(mirror_id)
        if mirror is None:
            other = self.receiver(mirror_id)
            raise NoSuchObjectError(f"{other} has no table here: its driver keeps its own", errnos.ENODEV)
        if mirror.owner:
            self._require_owner(mirror.owner, mirror)
        return mirror

    def add_receiver(self, receiver: Receiver) -> None:
        """From now on this one gets the events of its address space."""
        self.receivers[receiver.id] = receiver
        if isinstance(receiver, Mirror):
            self.mirrors[receiver.id] = receiver
        receiver.space.notifier.subscribe(receiver)

    def remove_receiver(self, mirror_id: MirrorId) -> None:
        """Forget one that gets no events any more."""
        receiver = self.receivers.pop(mirror_id, None)
        self.mirrors.pop(mirror_id, None)
        if receiver is not None and receiver.reports.counts:
            self.past_receivers.append(receiver)

    def file(self, file_id: int) -> File:
        """Look a file up: EBADF when there is none."""
        file = self.files.get(file_id)
        if file is None:
            raise NoSuchObjectError(f"there is no file {file_id}", errnos.EBADF)
        return file

    def pin(self, number: int) -> Pin:
        """Look a pin up: ENOENT when there is none, EPERM when it belongs to somebody else."""
        pin = self.pins.get(number)
        if pin is None:
            raise NoSuchObjectError(f"unpin: there is no pin {number}", errnos.ENOENT)
        self._require_owner(pin.owner, f"pin {number}")
        return pin

    def migration(self, number: int) -> SteppedMigration:
        """Look one up whose driver takes the steps: ENOENT when there is none (any more), EPERM when it is not its."""
        migration = self.migrations.get(number)
        if migration is None:
            past = next((one for one in self.past_migrations if one.id == number), None)
            if past is not None and past.owner in ("", self.caller.token):
                raise ended(number, past.why)
            raise NoSuchObjectError(f"there is no migration {number}", errnos.ENOENT)
        self._require_owner(migration.owner, migration)
        return migration

    def migrations_of(self, mirror_id: MirrorId) -> list[SteppedMigration]:
        """Those that a mirror has not finalized."""
        return [one for one in self.migrations.values() if one.mirror_id == mirror_id]

    def userfaultfd(self, number: int) -> tuple[AddressSpace, Userfaultfd]:
        """Look a userfaultfd up, and its address space: EBADF when there is none, EPERM when it is somebody else's."""
        space = self.userfaultfds.get(number)
        if space is None:
            raise NoSuchObjectError(f"there is no userfaultfd {number}", errnos.EBADF)
        userfaultfd = space.userfaultfds[number]
        self._require_owner(userfaultfd.owner, userfaultfd)
        return space, userfaultfd

    def owns(self, token: str, mirror_id: MirrorId) -> bool:
        """Whether a mirror may be used with a token."""
        receiver = self.receivers.get(mirror_id)
        return receiver is not None and receiver.owner in ("", token)

    def _require_owner(self, owner: str, what: object) -> None:
        if owner and owner != self.caller.token and self.current.operation_id:
            raise AccessDeniedError(f"{what} belongs to another owner", errnos.EPERM, reason="NOT_OWNER")

    def _answering(self) -> MirrorId:
        return self.caller.callback[0] if self.caller.callback else 0
