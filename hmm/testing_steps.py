"""Random migrations whose drivers take the steps, with pauses between them, mistakes, and drivers that stop half-way.

**Source**: our own; what the drivers do is what lib/test_hmm.c does, in another order each time.

**Invariants**: those of the machine, which the simulation checks after every step; what pages hold.

**Absent**: when leases end (scheduler.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from hmm import commands_migrate, testing_devices
from hmm.address_space import Thp
from hmm.large_folio import are_compound
from hmm.migrate_steps import SteppedMigration
from hmm.migration import COMPOUND, MIGRATE, VALID, WRITE, Select, migrate_pfn, pfns_of
from hmm.scheduler import Call, Scheduler
from hmm.semantics import LINUX_7
from hmm.testing import simulate
from hmm.testing_calls import fork_process
from hmm.testing_town import Makers, Town
from hmm.units import PMD_PAGES, Entries, Pfns

__all__ = ["simulate_steps", "step_calls"]

_SELECTIONS = (
    *(Select.SYSTEM, Select.SYSTEM, Select.SYSTEM, Select.SYSTEM | Select.COMPOUND, Select.SYSTEM | Select.COMPOUND),
    *(Select.DEVICE_PRIVATE, Select.DEVICE_COHERENT, sum(Select), sum(Select), sum(Select), 0),
)
_FEW = 3


@dataclass(slots=True)
class _Plans:
    """What the drivers have in mind.

    Attributes:
        words: of the migrations whose pages are copied, the destinations: by number, uint64[npages].
    """

    words: dict[int, Entries] = field(default_factory=dict)

    def set_up(self, town: Town) -> Call | None:
        """Begin one; there are few at a time."""
        mirror = town.pick(town.interval_mirrors())
        if mirror is None or len(town.machine.migrations) >= _FEW:
            return None
        space = town.machine.receivers[mirror].space
        select = _SELECTIONS[town.choose(len(_SELECTIONS))]
        span = town.mapped(space, private=town.choose(8) > 0)
        return Call(commands_migrate.migrate_vma_setup, (mirror, span), {"select": select})

    def go_on(self, town: Town) -> Call | None:
        """Take the next step of one."""
        stepped = self._pick(town)
        if stepped is None:
            return None
        if town.choose(24) == 0:
            return Call(commands_migrate.migrate_vma_finalize, (stepped.id,), {"abort": town.choose(2) == 0})
        if stepped.has_destinations:
            return Call(commands_migrate.migrate_vma_finalize, (stepped.id,))
        if stepped.id in self.words:
            return Call(commands_migrate.migrate_vma_pages, (stepped.id, self.words[stepped.id]))
        if stepped.allocated.size and town.choose(8):
            return self._copy(town, stepped)
        return self._allocate(town, stepped)

    def err(self, town: Town) -> Call | None:
        """Do what is refused, or what only looks like it."""
        stepped = self._pick(town)
        if stepped is None:
            return None
        frames = np.array([town.choose(town.machine.frames.used_end) for _ in range(stepped.span.npages)])
        if town.choose(2):
            return Call(commands_migrate.migrate_vma_write, (stepped.id, frames, b"\xff" * 8))
        twice = stepped.allocated[:1].repeat(stepped.span.npages)
        return Call(commands_migrate.migrate_vma_pages, (stepped.id, migrate_pfn(twice if twice.size > 1 else frames)))

    def look(self, town: Town) -> Call | None:
        """Read a frame; of one that has ended this fails."""
        number = 1 + town.choose(1 + max(town.machine.migrations, default=0))
        stepped = town.machine.migrations.get(number)
        allocated = np.zeros(1, np.int64) if stepped is None else stepped.allocated[:1]
        return Call(commands_migrate.migrate_vma_read, (number, allocated))

    @staticmethod
    def _pick(town: Town) -> SteppedMigration | None:
        number = town.pick(number for number, one in town.machine.migrations.items() if one.is_idle)
        return None if number is None else town.machine.migrations[number]

    @staticmethod
    def _allocate(town: Town, stepped: SteppedMigration) -> Call:
        device = 0 if town.choose(4) == 0 else stepped.device_id
        if town.choose(6) == 0:
            device = town.pick(town.machine.devices) or 0
        room = stepped.span.npages - stepped.allocated.size
        compound = room >= PMD_PAGES and town.choose(3) > 0
        count = room // PMD_PAGES if compound else room if town.choose(4) else town.choose(room + 2)
        options = {"device_id": device, "compound": compound}
        return Call(commands_migrate.migrate_vma_allocate, (stepped.id, count), options)

    def _copy(self, town: Town, stepped: SteppedMigration) -> Call:
        src, _ = stepped.words
        words = np.zeros(src.size, np.uint64)
        free = stepped.allocated
        large = are_compound(town.machine.frames, free)
        folios, small = free[large][::PMD_PAGES].tolist(), free[~large]
        sources: list[Pfns] = []
        targets: list[Pfns] = []
        at = 0
        while at < src.size:
            word, npages = int(src[at]), PMD_PAGES if int(src[at]) & COMPOUND else 1
            if not word & MIGRATE or town.choose(12) == 0:
                at += npages
                continue
            if npages > 1 and folios:
                pfns = folios.pop() + np.arange(PMD_PAGES)
                words[at] = migrate_pfn(pfns[:1])[0] | np.uint64(COMPOUND)
            else:
                pfns, small = small[:npages], small[npages:]
                words[at : at + pfns.size] = migrate_pfn(pfns) | np.uint64(WRITE)
            if word & VALID:
                sources.append(pfns_of(src[at : at + 1]) + np.arange(pfns.size))
                targets.append(pfns)
            at += npages
        self.words[stepped.id] = words
        nothing = np.empty(0, np.int64)
        copied = (np.concatenate([nothing, *sources]), np.concatenate([nothing, *targets]))
        return Call(commands_migrate.migrate_vma_copy, (stepped.id, *copied))


def step_calls() -> Makers:
    """What makes calls of drivers that migrate step by step, of one run, and how often."""
    plans = _Plans()
    return (plans.set_up, 32), (plans.go_on, 160), (plans.err, 6), (plans.look, 3)


def simulate_steps(seed: int, *, ncalls: int = 120) -> Scheduler:
    """As `testing_devices.simulate_devices`, with such migrations; on every fourth seed of huge pages as well.

    Raises: as `simulate`.
    """
    more = testing_devices.DEVICE_CALLS + step_calls()
    if seed % 4:
        limits, first = testing_devices.SMALL_WITH_DEVICES, testing_devices.SUBSCRIBED
        return simulate(seed, ncalls=ncalls, limits=limits, more=more, first=first)
    more += testing_devices.HUGE_CALLS + testing_devices.COMPOUND_CALLS
    limits, first = testing_devices.COMPOUND, (*testing_devices.FIRST_COMPOUND, fork_process)
    return simulate(seed, ncalls=ncalls, limits=limits, more=more, first=first, thp=Thp.ALWAYS, semantics=LINUX_7)
