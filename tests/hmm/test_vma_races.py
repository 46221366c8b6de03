"""Calls that change VMAs, and what comes while drivers are told of the cut."""

from __future__ import annotations

from typing import Any

import pytest
from machine_world import FIXED, RW, START, World

from hmm import commands_hmm as hmm
from hmm import commands_process as processes
from hmm.madvise import Advice
from hmm.mlock import MlockFlag
from hmm.units import PAGE_SIZE, PMD_SIZE

LARGE = START + 2 * PMD_SIZE


@pytest.mark.parametrize(
    ("call", "argument"),
    [(processes.madvise, Advice.SEQUENTIAL), (processes.mlock, int(MlockFlag.ONFAULT))],
)
def test_change_of_flags_keeps_the_family_when_the_first_touch_came_while_drivers_were_told(
    call: Any, argument: int
) -> None:
    """A mapping that got its anon_vma from a touch has it still, so that a child gets what was written.

    Source: Linux mm/vma.c, vma_modify_flags(): what changes is vm_flags alone.
    """
    world = World()
    attached = world.do(hmm.attach, world.devices[0], world.pid)
    world.do(hmm.insert_notifier, attached, 0, 1 << 47)
    world.do(processes.mmap, world.pid, LARGE, PMD_SIZE, RW, FIXED)
    world.do(processes.write_memory, world.pid, START, b"so that there are page tables")
    page = LARGE + PAGE_SIZE
    changing = world.start(call, world.pid, page, PAGE_SIZE, argument)
    (told,) = world.sent()
    world.do(processes.write_memory, world.pid, page, b"first")
    assert not changing.done
    world.machine.answer(told.mirror_id, told.sequence)
    world.settle()
    assert changing.result == 0
    child = world.do(processes.fork, world.pid)
    assert world.do(processes.read_memory, child, page, 5).data == b"first"
