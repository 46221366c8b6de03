"""Stacks that grow down when they are touched below."""

from __future__ import annotations

from typing import Any

import pytest

from hmm.address_space import AddressSpace
from hmm.cpu_access import touch, write_memory
from hmm.errors import SegmentationFault, Signal
from hmm.fault import fault_in
from hmm.mman import MapFlag
from hmm.stack import expand_stack
from hmm.units import PAGE_SIZE, AddressRange
from hmm.vma import Prot

STACK = MapFlag.PRIVATE | MapFlag.FIXED | MapFlag.GROWSDOWN
AT = 1000


def grow(world: Any, space: AddressSpace, number: int) -> Signal | None:
    """Write to the page of that number behind the base."""
    signal: Signal | None = world.run(write_memory(space, (1 << 40) + number * PAGE_SIZE + 8, b"x")).signal
    return signal


def first_page(space: AddressSpace) -> int:
    """Where the stack begins."""
    return (list(space.vmas)[-1].start - (1 << 40)) // PAGE_SIZE


def test_stack_grows_when_a_page_below_is_touched(world: Any, space: AddressSpace) -> None:
    """The VMA is extended down to the page touched; what lies between stays empty: expand_downwards()."""
    world.map(space, 4, flags=STACK, at=AT)
    assert grow(world, space, AT - 100) is None
    assert first_page(space) == AT - 100
    assert len(space.vmas) == 1
    assert space.table.get((1 << 40) + (AT - 50) * PAGE_SIZE) == 0
    assert next(iter(space.vmas)).anon_vma
    space.vmas.check()


def test_stack_grows_when_a_touch_goes_upwards_into_it(world: Any, space: AddressSpace) -> None:
    """A range that starts below the stack makes it grow to its first page."""
    start = world.map(space, 1, flags=STACK, at=AT)
    accessed = world.run(touch(space, AddressRange(start - 3 * PAGE_SIZE, start + PAGE_SIZE), write=False))
    assert (accessed.done, accessed.signal) == (4, None)


def test_stack_does_not_grow_when_it_is_no_cpu_that_faults(world: Any, space: AddressSpace) -> None:
    """get_user_pages() does not expand stacks: the page is simply not mapped (since 6.5)."""
    start = world.map(space, 1, flags=STACK, at=AT)
    with pytest.raises(SegmentationFault):
        world.run(fault_in(space, AddressRange(start - PAGE_SIZE, start), write=True))


def test_stack_does_not_grow_when_it_is_an_ordinary_mapping(world: Any, space: AddressSpace) -> None:
    """Only VM_GROWSDOWN grows."""
    world.map(space, 1, at=AT)
    assert grow(world, space, AT - 1) is Signal.SEGV_MAPERR
    assert grow(world, space, AT + 1) is Signal.SEGV_MAPERR


def test_stack_keeps_the_guard_gap_when_something_is_mapped_below(world: Any, space: AddressSpace) -> None:
    """256 pages stay free above an accessible mapping."""
    world.map(space, 1, at=AT - 300)
    world.map(space, 1, flags=STACK, at=AT)
    assert grow(world, space, AT - 44) is Signal.SEGV_MAPERR
    assert grow(world, space, AT - 43) is None
    assert first_page(space) == AT - 43


def test_stack_ignores_the_gap_when_what_is_below_cannot_be_accessed(world: Any, space: AddressSpace) -> None:
    """A PROT_NONE mapping, or another stack, guards itself; no stack grows into either."""
    world.map(space, 1, prot=Prot.NONE, at=AT - 10)
    world.map(space, 1, flags=STACK, at=AT)
    assert grow(world, space, AT - 9) is None
    assert grow(world, space, AT - 10) is Signal.SEGV_ACCERR
    world.map(space, 1, flags=STACK, at=AT - 11)
    assert len(space.vmas) == 3


def test_stack_does_not_merge_when_it_meets_another(world: Any, space: AddressSpace) -> None:
    """Growing changes the start of one VMA and nothing else."""
    world.map(space, 1, flags=STACK, at=AT - 2)
    world.map(space, 1, flags=STACK, at=AT)
    assert grow(world, space, AT - 1) is None
    assert [vma.npages for vma in space.vmas] == [1, 2]


def test_stack_stops_when_its_limit_is_reached(world: Any) -> None:
    """RLIMIT_STACK counts the whole VMA: acct_stack_growth()."""
    space = world.space(stack_bytes=16 * PAGE_SIZE)
    world.map(space, 4, flags=STACK, at=AT)
    assert grow(world, space, AT - 13) is Signal.SEGV_MAPERR
    assert grow(world, space, AT - 12) is None


def test_stack_stops_when_the_address_space_is_full(world: Any) -> None:
    """RLIMIT_AS counts the growth: may_expand_vm()."""
    space = world.space(address_bytes=10 * PAGE_SIZE)
    world.map(space, 4, flags=STACK, at=AT)
    assert grow(world, space, AT - 7) is Signal.SEGV_MAPERR
    assert grow(world, space, AT - 6) is None


def test_stack_stops_when_it_would_reach_the_lowest_addresses(world: Any, space: AddressSpace) -> None:
    """Nothing is mapped below mmap_min_addr."""
    base = -(1 << 40) // PAGE_SIZE
    world.map(space, 1, flags=STACK, at=base + 40)
    assert grow(world, space, base + 15) is Signal.SEGV_MAPERR
    assert grow(world, space, base + 16) is None


def test_expand_stack_reports_what_is_so_already(world: Any, space: AddressSpace) -> None:
    """Another thread was faster, or the stack has gone, while the caller waited for its turn."""
    start = world.map(space, 2, flags=STACK, at=AT)
    assert expand_stack(space, start + 5)
    assert not expand_stack(space, start + 2 * PAGE_SIZE)


def test_stack_waits_for_its_turn_when_a_call_changes_the_space(world: Any, space: AddressSpace) -> None:
    """Growth changes a VMA, and calls that do so are served one at a time."""
    start = world.map(space, 1, flags=STACK, at=AT)
    operation = write_memory(space, start - 1, b"x")
    with space.notifier.turn() as turn:
        turn.operation_id = 99
        assert world.start(operation).ticket
    assert world.run(operation).done == 1
