"""The synchronous runner, the scheduler's own rules, the journal, and looking at a machine."""

from __future__ import annotations

import pytest

from hmm import commands_device as devices
from hmm import commands_process as processes
from hmm.errors import InvalidRequestError, NoSuchObjectError
from hmm.events import Event
from hmm.inspection import directories, pending, processes_of, walk
from hmm.journal import digest, replay
from hmm.limits import Limits
from hmm.local import Local
from hmm.machine import Machine
from hmm.mirror import DeadlinePolicy
from hmm.operation import Await, Operation, Pause, WaitFor
from hmm.operation_record import Caller
from hmm.scheduler import Call, Odds, Scheduler, StuckError
from hmm.testing_town import choices
from hmm.units import PAGE_SIZE, TASK_SIZE, AddressRange
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot

START = 0x1000_0000
RW = Prot.READ | Prot.WRITE
FIXED = MapFlag.PRIVATE | MapFlag.ANONYMOUS | MapFlag.FIXED
LIMITS = Limits(frames=256, device_frames=0)
PAGE = AddressRange(START, START + PAGE_SIZE)


def populated(*, recording: bool = False) -> Local:
    """A process with four written pages, mirrored by one device."""
    local = Local(Machine(LIMITS, recording=recording))
    pid = local.call(processes.create_process, "p")
    local.call(processes.mmap, pid, START, 4 * PAGE_SIZE, RW, FIXED)
    local.call(processes.write_memory, pid, START, b"contents" * 512 * 4)
    device = local.call(devices.register_device, "gpu")
    mirror = local.call(devices.register_mirror, device, pid)
    local.call(devices.fault, mirror, [AddressRange(START, START + 4 * PAGE_SIZE)], write=True)
    return local


class Failing:
    """A driver with a bug."""

    def update(self, mirror_id: int, event: Event) -> int:
        """Raise."""
        raise RuntimeError("bug in the driver")

    def release(self, mirror_id: int) -> None:
        """Nothing."""


def test_call_raises_what_an_in_process_driver_raises() -> None:
    """A bug of the driver is not swallowed."""
    local = populated()
    local.attach(1, Failing())
    with pytest.raises(RuntimeError, match="bug in the driver"):
        local.call(processes.munmap, 1, START, PAGE_SIZE)


def waiting_for_ever(machine: Machine) -> Operation[None]:
    """A command that waits for what nobody will do."""
    yield Await(WaitFor.CALLBACKS, ticket=machine.mirrors[1].sequence, mirror_id=1)


def test_call_fails_instead_of_hanging_when_nothing_can_happen() -> None:
    """The synchronous runner says what the operation waits for."""
    local = populated()
    local.machine.start(Caller(), processes.munmap, 1, START, PAGE_SIZE)
    local.machine.take_outbox()
    with pytest.raises(AssertionError, match="waits for ever"):
        local.call(waiting_for_ever)


def test_scheduler_reports_operations_that_wait_for_ever() -> None:
    """A deadlock of the model is an error of its own, naming who waits for what."""
    local = populated()
    machine = local.machine
    machine.start(Caller(), processes.munmap, 1, START, PAGE_SIZE)
    machine.take_outbox()
    scheduler = Scheduler(machine, choices(1), iter([Call(waiting_for_ever)]))
    with pytest.raises(StuckError, match="waiting_for_ever"):
        scheduler.run()


def pausing(machine: Machine) -> Operation[int]:
    """A command in three pieces."""
    del machine
    yield Pause()
    yield Pause()
    return 3


def test_scheduler_stops_when_the_limit_of_steps_is_reached() -> None:
    """A livelock would be found by its length."""
    scheduler = Scheduler(Machine(LIMITS), choices(1), iter([Call(pausing)]))
    with pytest.raises(AssertionError, match="still running"):
        scheduler.run(limit=2)
    assert populated().call(pausing) == 3


def test_scheduler_keeps_a_lost_answer_for_later_when_the_policy_is_block() -> None:
    """BLOCK waits for ever: the answer comes late, nothing is lost."""
    local = populated()
    local.machine.mirrors[1].policy = DeadlinePolicy.BLOCK
    calls = iter([Call(processes.munmap, (1, START, PAGE_SIZE))])
    scheduler = Scheduler(local.machine, choices(3), calls, odds=Odds(refuse=0, lose=2, repeat=0))
    scheduler.run()
    assert local.machine.mirrors[1].counted()["acknowledged"] == 2


def test_replaying_the_inputs_gives_the_same_state() -> None:
    """Same inputs, same state; an input that failed then fails again."""
    local = populated(recording=True)
    machine = local.machine
    with pytest.raises(InvalidRequestError):
        machine.answer(1, 99)
    with pytest.raises(NoSuchObjectError):
        local.call(processes.munmap, 99, START, PAGE_SIZE)
    record = machine.start(Caller(), processes.munmap, 1, START, PAGE_SIZE)
    assert machine.inputs is not None
    assert digest(replay(machine.inputs, LIMITS)) == digest(machine)
    machine.fence(1, "test")
    machine.resume(record.id)
    assert digest(replay(machine.inputs, LIMITS)) == digest(machine)


@pytest.mark.parametrize("change", ["bytes", "prot", "mirror", "process"])
def test_digest_differs_when_anything_that_calls_can_see_differs(change: str) -> None:
    """One byte, one permission, one entry, one process."""
    local = populated()
    before = digest(local.machine)
    match change:
        case "bytes":
            local.call(processes.write_memory, 1, START, b"C")
        case "prot":
            local.call(processes.mprotect, 1, START, PAGE_SIZE, Prot.READ)
        case "mirror":
            local.call(devices.discard_range, 1, PAGE)
        case "process":
            local.call(processes.create_process)
    assert digest(local.machine) != before


def test_walk_shows_every_level_down_to_the_entry_or_the_first_hole() -> None:
    """What a hardware page walk would see."""
    table = populated().machine.spaces[1].table
    steps = walk(table, START)
    assert [step.level for step in steps] == [0, 1, 2, 3]
    assert [step.index for step in steps] == [START >> shift & 511 for shift in (39, 30, 21, 12)]
    assert steps[-1].entry == table.get(START)
    assert not walk(table, START + 8 * PAGE_SIZE)[-1].present
    (missing,) = walk(table, TASK_SIZE - PAGE_SIZE)
    assert not missing.present


def test_directories_lists_what_holds_entries_depth_first() -> None:
    """A level, a span and a count each; a directory is listed once."""
    local = populated()
    local.call(processes.mmap, 1, START + (1 << 21), PAGE_SIZE, RW, FIXED | MapFlag.POPULATE)
    nodes = directories(local.machine.spaces[1].table, AddressRange(0, TASK_SIZE))
    assert [(node.level, node.entries) for node in nodes] == [(0, 1), (1, 1), (2, 2), (3, 4), (3, 1)]
    assert nodes[3].span == AddressRange(START, START + (1 << 21))


def test_processes_of_a_space_are_its_threads() -> None:
    """Ascending."""
    local = populated()
    thread = local.call(processes.clone_thread, 1)
    assert processes_of(local.machine, 1) == [1, thread]


def test_pending_shows_an_operation_between_two_pieces() -> None:
    """A long operation that gave way."""
    machine = Machine(LIMITS)
    machine.start(Caller(), pausing)
    (blocked,) = pending(machine)
    assert blocked.request.startswith("nothing")
