"""Checking after every step: what has not changed is left out, and whatever changes is seen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from machine_world import START, World, span

from hmm import commands_device as devices
from hmm import pte
from hmm.address_space import AddressSpace
from hmm.checked import Checked
from hmm.mirror import Mirror
from hmm.units import PAGE_SIZE


class Part:
    """Something whose state is a number."""

    def __init__(self) -> None:
        self.state = 0
        self.copies = 0

    def image(self) -> object:
        """The number."""
        self.copies += 1
        return self.state


def test_number_stays_until_the_part_changes() -> None:
    """The number of a state is that of the last round exactly when the state is."""
    checked, part = Checked(), Part()
    checked.begin()
    first = checked.number(part)
    checked.begin()
    assert checked.number(part) == first
    part.state = 1
    checked.begin()
    assert checked.number(part) > first


def test_number_copies_a_part_once_in_a_round() -> None:
    """However many checks compare themselves with a part."""
    checked, part = Checked(), Part()
    checked.begin()
    assert len({checked.number(part) for _ in range(3)}) == part.copies == 1


def test_is_new_is_false_when_all_that_a_check_looks_at_is_as_it_was() -> None:
    """One difference is enough for a new check."""
    checked = Checked()
    assert checked.is_new("part", 1, 2)
    assert not checked.is_new("part", 1, 2)
    assert checked.is_new("other part", 1, 2)
    assert checked.is_new("part", 1, 3)


def _shift_entry(world: World) -> None:
    world.machine.spaces[1].table.set(START, world.machine.spaces[1].table.get(START + PAGE_SIZE))


def _count_more(world: World) -> None:
    world.machine.frames.mapcount[1] += 1


def _break_directory(world: World) -> None:
    tree = world.machine.spaces[1].table._tree
    tree.arena.counts[tree.leaf(START >> 12) >> 9] += 1


def _lose_vma(world: World) -> None:
    world.machine.spaces[1].vmas.erase(span(0))


def _permit_more(world: World) -> None:
    world.machine.mirrors[world.mirrors[0]].table.update(span(4).start, span(4).end, _add_dirty)


def _add_dirty(entries: object) -> None:
    entries |= pte.DIRTY  # type: ignore[operator]


def _owe_an_answer(world: World) -> None:
    world.machine.mirrors[world.mirrors[0]].space.notifier.owing.add(world.mirrors[0])


@pytest.mark.breaks_invariants
@pytest.mark.parametrize(
    "corrupt", [_shift_entry, _count_more, _break_directory, _lose_vma, _permit_more, _owe_an_answer]
)
def test_check_sees_what_changed_since_the_last_check(corrupt: Callable[[World], None]) -> None:
    """A machine that passed is not let off afterwards."""
    world, checked = World(), Checked()
    world.do(devices.fault, world.mirrors[0], [span(0, 4)], write=True)
    world.do(devices.fault, world.mirrors[0], [span(4, 4)], write=False)
    world.machine.check(checked)
    world.machine.check(checked)
    corrupt(world)
    with pytest.raises(AssertionError):
        world.machine.check(checked)


@pytest.mark.breaks_invariants
def test_check_looks_at_nothing_twice_when_nothing_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the tables nor the entries are gone through again."""
    world, checked = World(mirrors=2), Checked()
    world.machine.check(checked)
    looked: list[object] = []
    monkeypatch.setattr(Mirror, "_check_entries", looked.append)
    monkeypatch.setattr(AddressSpace, "_check_entries", looked.append)
    world.machine.check(checked)
    assert not looked
