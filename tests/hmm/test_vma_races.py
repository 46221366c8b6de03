"""Calls that change VMAs, and what comes while drivers are told of the cut."""

from __future__ import annotations

from typing import Any

import pytest
from machine_world import FIXED, RW, START, World, error_of

from hmm import commands_hmm as hmm
from hmm import commands_process as processes
from hmm.errors import TimedOutError
from hmm.limits import Limits
from hmm.madvise import Advice
from hmm.mirror import DeadlinePolicy
from hmm.mlock import MlockFlag
from hmm.units import PAGE_SIZE, PMD_SIZE, AddressRange
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot

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


def test_failed_mprotect_leaves_hugetlb_memory_whole() -> None:
    """It cannot be cut within a page, and neither is it when what lies below it gets its protection back."""
    world = World(policy=DeadlinePolicy.FAIL, limits=Limits(frames=2048, device_frames=0, hugetlb_pages=1))
    huge = AddressRange(LARGE, LARGE + PMD_SIZE)
    world.do(processes.mmap, world.pid, huge.start, PMD_SIZE, RW, FIXED | MapFlag.HUGETLB)
    world.do(processes.write_memory, world.pid, huge.start, b"there")
    world.do(processes.mmap, world.pid, huge.start - PAGE_SIZE, PAGE_SIZE, RW, FIXED)
    world.do(processes.write_memory, world.pid, huge.start - PAGE_SIZE, b"there")
    changing = world.start(processes.mprotect, world.pid, huge.start - PAGE_SIZE, 2 * PAGE_SIZE, Prot.NONE)
    (told,) = world.sent()
    world.machine.abandon(told.mirror_id, told.sequence)
    world.resume(changing)
    assert isinstance(error_of(changing), TimedOutError)
    vmas = world.machine.process(world.pid).space.vmas
    assert [vma.span for vma in vmas.overlapping(huge)] == [huge]
    world.machine.check()
