"""Seeded runs: a workload on a machine, with everything watched that has to hold.

**Source**: our own.

**Absent**: which calls are made (testing_calls.py, and one module for each kind of town), what has to hold (besides the
machine's own check: testing_drivers.py, testing_contents.py, testing_dirty.py, testing_streams.py, testing_endings.py),
who goes next (scheduler.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

from hmm.address_space import Thp
from hmm.events import Delivery, Event
from hmm.journal import digest, replay
from hmm.limits import Limits
from hmm.machine import Machine
from hmm.operation_record import OperationRecord
from hmm.scheduler import Call, Scheduler
from hmm.semantics import LINUX_6_12, LINUX_7, Semantics
from hmm.testing_calls import CALLS
from hmm.testing_contents import Contents
from hmm.testing_dirty import DirtyPages
from hmm.testing_drivers import DeviceModel, IntervalDrivers
from hmm.testing_endings import check_nothing_is_left, endings
from hmm.testing_streams import Streams
from hmm.testing_town import Maker, Makers, Town, choices
from hmm.units import PMD_PAGES

__all__ = ["SMALL", "SimulationError", "simulate"]

SMALL = Limits(frames=400, device_frames=0, processes=8, directories=1 << 10)
"""Limits of a simulated machine: little enough that checking everything is cheap, and that memory runs out."""


class SimulationError(AssertionError):
    """A seed whose run broke an invariant; the message says how to run it again."""


def simulate(
    seed: int,
    *,
    ncalls: int = 60,
    limits: Limits = SMALL,
    more: Makers = (),
    first: tuple[Maker, ...] = (),
    thp: Thp = Thp.NEVER,
    handling: Callable[[Town, OperationRecord[Any]], Call] | None = None,
    semantics: Semantics | None = None,
) -> Scheduler:
    """One seeded run: random calls by several processes and devices, drivers that delay, refuse and lose answers.

    Every invariant is checked after every step, that pages hold what was written to them, wherever they are, and that
    no device uses what it should have given up; after the last call, that replaying the inputs gives the same state.
    Then everything is ended, and nothing may be left.  Every fourth seed follows the rules of `LINUX_7`, unless
    `semantics` says which.

    Args:
        more: what makes calls, besides `testing_calls.CALLS`.
        first: what makes calls before all others.
        handling: what the handler of a userfaultfd does about an operation that waits for it.

    Raises:
        SimulationError: something did not hold; names the seed.
    """
    choose = choices(seed)
    semantics = semantics or (LINUX_6_12 if seed % 4 else LINUX_7)
    machine = Machine(limits, semantics=semantics, recording=True, capable=True)
    drivers = IntervalDrivers(machine)
    pages = 2 * PMD_PAGES if thp else 24
    town = Town(
        machine, choose, pages=pages, makers=CALLS + more, first=first, thp=thp, held=drivers.held,
        former=drivers.former,
    )  # fmt: skip
    used_frames = machine.frames.regions[0].used
    scheduler = Scheduler(machine, choose, chain(town.calls(ncalls), _replayed(machine), endings(town)))
    if handling is not None:
        scheduler.handling = partial(handling, town)
    _Watch(scheduler, drivers, Contents(machine, town.tracked)).begin()
    try:
        scheduler.run()
        if machine.processes:  # a fork that waited for its turn while all others ended
            scheduler.go_on(endings(town))
        check_nothing_is_left(machine, used_frames)
    except Exception as error:
        _give_up(machine)
        raise SimulationError(f"seed {seed} after {scheduler.steps} steps: {error!r}") from error
    return scheduler


def _replayed(machine: Machine) -> Iterator[Call]:
    """No calls.  Raises: AssertionError: a machine that got the same inputs is in another state."""
    assert machine.inputs is not None
    again = replay(machine.inputs, machine.limits, machine.semantics, capable=machine.capable)
    assert digest(again) == digest(machine), "replaying the inputs gives another state"
    _give_up(again)
    yield from ()


def _give_up(machine: Machine) -> None:
    # What waits in a machine that is broken may fail when it is ended, and nobody wants to know.
    for record in machine.operations.values():
        with suppress(Exception):
            record.generator.close()


@dataclass(slots=True)
class _Watch:
    """All that looks on while a scheduler runs."""

    scheduler: Scheduler
    drivers: IntervalDrivers
    contents: Contents
    mirrors: DeviceModel = field(init=False)
    streams: Streams = field(init=False)
    dirty: DirtyPages = field(init=False)

    def begin(self) -> None:
        """From now on."""
        scheduler = self.scheduler
        self.streams = Streams(scheduler.machine)
        self.dirty = DirtyPages(scheduler.machine, scheduler.checked)
        self.mirrors = DeviceModel(scheduler.machine, self.contents.memory, scheduler.checked)
        self.contents.memory.fails = self._fails
        self.contents.memory.coverage = self.drivers.coverage = scheduler.coverage
        self.drivers.forgets = lambda: scheduler.choose(8) == 0
        scheduler.finished, scheduler.answering, scheduler.checking = self._finished, self._answering, self._check
        scheduler.sending = self._sent

    def _fails(self, event: Event, _: int) -> bool:
        failing = self.scheduler.choose(20) == 0
        if failing:
            self.contents.losing.add(event.space_id)
        return failing

    def _sent(self, delivery: Delivery) -> None:
        self.streams.sent(delivery)
        self.dirty.sent(delivery)

    def _finished(self, record: OperationRecord[Any]) -> None:
        self.mirrors.finished(record)
        self.drivers.finished(record)
        self.contents.finished(record)

    def _answering(self, delivery: Delivery, errno: int) -> bytes:
        self.drivers.answering(delivery, errno)
        return self.mirrors.answering(delivery, errno)

    def _check(self) -> None:
        self.mirrors.check()
        self.drivers.check(self.scheduler.running)
        self.contents.check(self.scheduler.running)
        self.streams.check()
        self.dirty.check()
