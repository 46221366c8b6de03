"""A machine with a mirrored process, driven one input at a time, so that a test decides what comes next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hmm import commands_device as devices
from hmm import commands_hmm as hmm
from hmm import commands_process as processes
from hmm.errors import HmmError
from hmm.events import Delivery
from hmm.limits import Limits
from hmm.machine import Machine
from hmm.mirror import DeadlinePolicy
from hmm.operation_record import Caller, OperationRecord
from hmm.units import PAGE_SIZE, AddressRange, MirrorId
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot

START = 0x1000_0000
RW = Prot.READ | Prot.WRITE
FIXED = MapFlag.PRIVATE | MapFlag.ANONYMOUS | MapFlag.FIXED
NOBODY = Caller()


def span(first: int, npages: int = 1) -> AddressRange:
    """Pages of the window."""
    return AddressRange(START + first * PAGE_SIZE, START + (first + npages) * PAGE_SIZE)


class World:
    """A process with sixteen writable pages, mirrored by as many devices as asked for."""

    def __init__(
        self,
        mirrors: int = 1,
        policy: DeadlinePolicy = DeadlinePolicy.FENCE,
        limits: Limits = Limits(frames=256, device_frames=0),  # noqa: B008 - a frozen value
    ) -> None:
        self.machine = Machine(limits)
        self.pid = self.do(processes.create_process, "p")
        self.do(processes.mmap, self.pid, START, 16 * PAGE_SIZE, RW, FIXED)
        self.devices = [self.do(devices.register_device, f"gpu{n}") for n in range(mirrors)]
        self.mirrors = [self.do(devices.register_mirror, device, self.pid, policy=policy) for device in self.devices]

    def start(
        self, command: Callable[..., Any], *args: Any, caller: Caller = NOBODY, **kw: Any
    ) -> OperationRecord[Any]:
        """Start a call."""
        return self.machine.start(caller, command, *args, **kw)

    def do(self, command: Callable[..., Any], *args: Any, caller: Caller = NOBODY, **kw: Any) -> Any:
        """Run a call to its end; drivers acknowledge at once."""
        record = self.start(command, *args, caller=caller, **kw)
        self.settle()
        assert record.done
        return record.result

    def settle(self, slow: MirrorId = 0) -> list[Delivery]:
        """Answer everything and resume everything, until nothing moves.  Returns: what `slow` has not answered."""
        owed: list[Delivery] = []
        while True:
            deliveries = self.machine.take_outbox()
            for delivery in deliveries:
                if delivery.mirror_id == slow:
                    owed.append(delivery)
                else:
                    self.machine.answer(delivery.mirror_id, delivery.sequence)
            ready = self.machine.ready()
            if not ready and not deliveries:
                return owed
            for record in ready:
                if not record.done and self.machine.is_ready(record):
                    self.machine.resume(record.id)

    def resume(self, record: OperationRecord[Any]) -> None:
        """Resume one operation, which must be ready."""
        assert record in self.machine.ready()
        self.machine.resume(record.id)

    def sent(self) -> list[Delivery]:
        """What is in the outbox."""
        return self.machine.take_outbox()


def start_migration_of_a_shared_page(world: World) -> tuple[OperationRecord[Any], int, MirrorId, Delivery]:
    """Fork, and migrate the first page, which the CPU has filled.

    Returns: the migration, the child that has the page too, its mirror, and the event that this has to answer.
    """
    child = world.do(processes.fork, world.pid)
    card = world.do(devices.register_device, "card", memory_pages=8)
    slow = world.do(hmm.attach, card, child)
    world.do(hmm.insert_notifier, slow, START, PAGE_SIZE)
    moving = world.start(hmm.migrate_to_device, world.do(hmm.attach, card, world.pid), span(0))
    (owed,) = world.settle(slow)
    return moving, child, slow, owed


def error_of(record: OperationRecord[Any]) -> HmmError:
    """The error that a finished call ended with."""
    assert record.done
    assert isinstance(record.error, HmmError)
    return record.error
