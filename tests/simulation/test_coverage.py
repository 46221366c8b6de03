"""What seeded runs came to: counted by command and outcome, and by cause, listener and what it heard."""

from __future__ import annotations

from machine_world import World, span

from hmm import commands_device as devices
from hmm import commands_process as processes
from hmm.commands import COMMANDS
from hmm.operation_record import Caller
from hmm.testing import simulate
from hmm.testing_coverage import Coverage, outcome


def test_commands_are_all_that_a_machine_can_be_asked_for() -> None:
    """Operations by name, and nothing of what they are made of."""
    assert {"mmap", "open_file", "fault", "make_exclusive"} <= set(COMMANDS)
    assert not {"new_shared_memory", "immediate"} & set(COMMANDS)


def test_outcome_names_what_a_call_stopped_at_when_it_returns_it() -> None:
    """A fault of a hole succeeds as a call; what counts is its EFAULT."""
    world = World()
    machine, caller = world.machine, Caller()
    (process,) = machine.processes
    world.do(processes.munmap, process, span(0).start, span(0).size_bytes)
    fault = machine.start(caller, devices.fault, world.mirrors[0], [span(0)], write=False)
    assert (outcome(fault), fault.error) == ("EFAULT", None)
    read = machine.start(caller, processes.read_memory, process, span(0).start, 1)
    assert outcome(read) == "SEGV_MAPERR"
    assert outcome(machine.start(caller, processes.munmap, 77, 0, 4096)) == "ESRCH"


def test_coverage_counts_calls_and_events_when_a_seed_runs() -> None:
    """Each call ends once; a second run counts on."""
    once, again = simulate(3).coverage, simulate(3).coverage
    twice = Coverage()
    twice.add(once)
    twice.add(again)
    assert once.operations > 60
    assert twice.operations == 2 * once.operations
    assert twice.events.total() == 2 * once.events.total() > 0
    assert "mmap" not in once.never_called
    assert "migrate" in once.never_called
