"""Copies to the memory of devices and back that are made to fail: the page stays where it is.

Source: Linux drivers/gpu/drm/nouveau/nouveau_dmem.c: nouveau_dmem_migrate_copy_one() leaves the destination out where
copy_func() or clear_func() fails, nouveau_dmem_migrate_to_ram() returns VM_FAULT_SIGBUS; mm/migrate_device.c,
migrate_vma_pages() and migrate_vma_finalize(), which put back what has no destination.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from blocks import BLOCK, shown

from hmm import commands_device, commands_failures, commands_hmm, commands_process
from hmm.address_space import Thp
from hmm.errors import BadAddressError, DeviceLostError, HmmError, InvalidRequestError, RangeBusyError, Signal
from hmm.frames import RegionKind
from hmm.madvise import Advice
from hmm.migration import MIGRATE, VALID
from hmm.operation_record import Caller
from hmm.range_fault import REQ_FAULT
from hmm.semantics import LINUX_7
from hmm.units import PAGE_SIZE


def fail(bench: Any, nth: int, mirror: int = 0) -> None:
    """Let the copy of the nth page from now on fail."""
    bench.call(commands_failures.inject_copy_failure, mirror or bench.mirror, nth)


def written(bench: Any, npages: int) -> bytes:
    """Write pages that no other page is like.  Returns: what they hold."""
    data = b"".join(bytes([page + 1]) * PAGE_SIZE for page in range(npages))
    bench.write(0, data)
    return data


def touch(bench: Any, at: int, npages: int) -> tuple[int, Signal | None]:
    """The CPU reads pages.  Returns: how many it came through, and the signal that it got."""
    start = bench.span(at).start
    accessed = bench.call(commands_process.read_memory, bench.process, start, npages * PAGE_SIZE)
    return len(accessed.data) // PAGE_SIZE, accessed.signal


def test_migrate_leaves_the_page_when_its_copy_fails(bench: Any) -> None:
    """It has no destination, and no MIGRATE in its word; it fails once, and what it held is there."""
    data = written(bench, 4)
    fail(bench, 3)
    moved = bench.to_device(0, 4)
    assert (moved.src & np.uint64(VALID | MIGRATE)).tolist() == [VALID | MIGRATE] * 2 + [VALID] + [VALID | MIGRATE]
    assert (moved.dst != 0).tolist() == [True, True, False, True]
    assert (shown(bench, 4), bench.used) == ("d2 w1 d1", 3)
    bench.to_device(0, 4)
    assert shown(bench, 4) == "d4"
    assert bench.read(0, 4 * PAGE_SIZE) == data


def test_migrate_leaves_the_hole_when_it_cannot_be_cleared(bench: Any) -> None:
    """clear_func() fails as copy_func() does."""
    fail(bench, 2)
    moved = bench.to_device(0, 3)
    assert ((moved.src & np.uint64(MIGRATE)) != 0).tolist() == [True, False, True]
    assert (shown(bench, 3), bench.used) == ("d1 .1 d1", 2)


def test_migrate_back_leaves_the_page_when_its_copy_fails(bench: Any) -> None:
    """Pages are counted from one migration to the next; the others come back, the free memory is as before."""
    data = written(bench, 4)
    fail(bench, 6)
    bench.to_device(0, 4)
    available = bench.local.machine.frames.available
    bench.to_system(0, 4)
    assert (shown(bench, 4), bench.used) == ("w1 d1 w2", 1)
    assert available - bench.local.machine.frames.available == 3
    assert bench.read(0, 4 * PAGE_SIZE) == data


@pytest.mark.parametrize("nth", [1, 3, 4])
def test_touch_is_sigbus_when_the_copy_fails(bench: Any, nth: int) -> None:
    """The CPU comes to the pages before it, and not to those behind it; the next touch has the page."""
    data = written(bench, 4)
    bench.to_device(0, 4)
    fail(bench, nth)
    assert touch(bench, 0, 4) == (nth - 1, Signal.BUS_ADRERR)
    assert bench.used == 4 - (nth - 1)
    bench.local.machine.check()
    assert bench.read(0, 4 * PAGE_SIZE) == data
    assert bench.used == 0


def test_touch_is_sigbus_at_the_page_when_others_lie_between(bench: Any) -> None:
    """Pages of two mirrors alternate: those before the failing one are brought back whoever put them there."""
    data = written(bench, 4)
    other, _ = bench.attach(bench.device, bench.process)
    for page in range(4):
        mirror = other if page % 2 else bench.mirror
        bench.call(commands_hmm.migrate_to_device, mirror, bench.span(page))
    fail(bench, 2)
    assert touch(bench, 0, 4) == (2, Signal.BUS_ADRERR)
    assert shown(bench, 3) == "w2 d1"
    assert bench.read(0, 4 * PAGE_SIZE) == data


def test_touch_stops_where_memory_has_gone_when_the_copy_behind_it_fails(bench: Any) -> None:
    """handle_mm_fault() comes to one page after the other: what another thread unmapped meanwhile is first."""
    machine, start = bench.local.machine, bench.span(0).start
    written(bench, 2)
    bench.to_device(1, 1)
    fail(bench, 1)
    record = machine.start(Caller(), commands_process.write_memory, bench.process, start, b"x" * 2 * PAGE_SIZE)
    (told,) = machine.take_outbox()
    unmapping = machine.start(Caller(), commands_process.munmap, bench.process, start, PAGE_SIZE)
    (of_unmapping,) = machine.take_outbox()
    machine.answer(of_unmapping.mirror_id, of_unmapping.sequence)
    machine.resume(unmapping.id)
    assert unmapping.done
    machine.answer(told.mirror_id, told.sequence)
    while not record.done:
        machine.resume(record.id)
        for event in machine.take_outbox():
            machine.answer(event.mirror_id, event.sequence)
    assert (record.result.done, record.result.signal, record.result.address) == (0, Signal.SEGV_MAPERR, start)
    machine.check()


@pytest.mark.parametrize("injected", ["copy", "touch"])
def test_touch_is_sigbus_at_the_page_when_it_is_in_the_second_mapping(bench: Any, injected: str) -> None:
    """handle_mm_fault() comes to one page after the other: those of the first mapping have come back."""
    data = written(bench, 4)
    second = bench.span(2)
    bench.call(commands_process.madvise, bench.process, second.start, 2 * PAGE_SIZE, Advice.DONTFORK)
    bench.to_device(0, 2)
    bench.to_device(2, 2)
    if injected == "copy":
        fail(bench, 3)
    else:
        bench.call(commands_failures.inject_touch_failure, bench.device, 3)
    assert touch(bench, 0, 4) == (2, Signal.BUS_ADRERR)
    assert shown(bench, 4) == "w2 d2"
    assert bench.read(0, 4 * PAGE_SIZE) == data


def test_touch_of_a_child_is_sigbus_when_the_copy_for_its_parents_mirror_fails(bench: Any) -> None:
    """The mirror that put the page there counts, whoever touches it; it stays for both."""
    data = written(bench, 1)
    bench.to_device(0, 1)
    child = bench.call(commands_process.fork, bench.process)
    fail(bench, 1)
    start = bench.span(0).start
    assert bench.call(commands_process.read_memory, child, start, 1).signal is Signal.BUS_ADRERR
    assert (shown(bench, 1), bench.used) == ("d1", 1)
    assert bench.read(0, PAGE_SIZE, child) == data


def test_range_fault_of_another_device_is_a_bad_address_when_the_copy_fails(bench: Any) -> None:
    """hmm_vma_fault(): VM_FAULT_ERROR is EFAULT."""
    written(bench, 1)
    bench.to_device(0, 1)
    card = bench.call(commands_device.register_device, "other")
    other, _ = bench.attach(card, bench.process)
    fail(bench, 1)
    faulted = bench.call(commands_hmm.range_fault_unlocked, other, 1, bench.span(0), REQ_FAULT)
    assert isinstance(faulted.error, BadAddressError)
    assert (faulted.error.address, bench.used) == (bench.span(0).start, 1)
    assert bench.call(commands_hmm.range_fault_unlocked, other, 1, bench.span(0), REQ_FAULT).error is None
    assert bench.used == 0


def test_evict_leaves_the_page_when_its_copy_fails(bench: Any) -> None:
    """migrate_device_pages() passes over it; the device is empty after the next one."""
    data = written(bench, 4)
    bench.to_device(0, 4)
    fail(bench, 2)
    assert bench.call(commands_hmm.evict_device, bench.device) == 3
    assert shown(bench, 4) == "w1 d1 w2"
    assert bench.call(commands_hmm.evict_device, bench.device) == 1
    assert bench.read(0, 4 * PAGE_SIZE) == data


def test_pin_is_refused_when_the_page_cannot_leave_the_device(bench: Any) -> None:
    """migrate_device_coherent_folio() is EBUSY; the CPU goes on using the page where it is."""
    kind = RegionKind.DEVICE_COHERENT
    card = bench.call(commands_device.register_device, "coherent", memory_pages=8, kind=kind)
    mirror, _ = bench.attach(card, bench.process)
    data = written(bench, 1)
    bench.call(commands_hmm.migrate_to_device, mirror, bench.span(0))
    fail(bench, 1, mirror)
    with pytest.raises(RangeBusyError):
        bench.call(commands_process.pin, bench.process, bench.span(0), write=True, long_term=True)
    assert bench.read(0, PAGE_SIZE) == data
    bench.call(commands_process.pin, bench.process, bench.span(0), write=True, long_term=True)


def test_failure_ends_when_it_is_taken_back_or_its_mirror_goes(bench: Any) -> None:
    """0 takes it back; nobody else's copies fail."""
    written(bench, 2)
    other, _ = bench.attach(bench.device, bench.process)
    fail(bench, 1, other)
    fail(bench, 1)
    fail(bench, 0)
    bench.to_device(0, 2)
    bench.call(commands_hmm.detach, other)
    assert (shown(bench, 2), bench.local.machine.frames.failing_copies) == ("d2", {})


@pytest.mark.parametrize("kind", ["negative", "no memory", "gone", "carried"])
def test_inject_is_refused_when_nothing_is_copied_here(bench: Any, kind: str) -> None:
    """Without memory there is nothing to copy; what a driver carries, its own answer makes fail."""
    mirror, nth, refusal = bench.mirror, 1, InvalidRequestError
    if kind == "negative":
        nth = -1
    elif kind == "no memory":
        mirror, _ = bench.attach(bench.call(commands_device.register_device, "plain"), bench.process)
    elif kind == "carried":
        card = bench.call(commands_device.register_device, "carrier", memory_pages=8, driver_copies=True)
        mirror = bench.call(commands_device.register_mirror, card, bench.process)
    else:
        refusal: type[HmmError] = DeviceLostError
        bench.local.machine.fence(mirror, "it died")
    with pytest.raises(refusal):
        bench.call(commands_failures.inject_copy_failure, mirror, nth)


# ---- huge pages


@pytest.fixture
def large(make_bench: Callable[..., Any]) -> Any:
    """A process that gets huge pages, with one written, and a device that huge pages move to as such."""
    options = {"thp": Thp.ALWAYS, "mapped_pages": 2 * BLOCK, "more_memory_pages": 0, "semantics": LINUX_7}
    bench = make_bench(frames=10 * BLOCK, memory_pages=2 * BLOCK, **options)
    bench.write(0, b"huge" * (BLOCK * PAGE_SIZE // 4))
    return bench


def moved(bench: Any, command: Any) -> str:
    """Migrate two blocks, huge pages as such.  Returns: what is where then."""
    bench.call(command, bench.mirror, bench.span(0, 2 * BLOCK), compound=True)
    return shown(bench)


@pytest.mark.parametrize("nth", [1, 100, BLOCK])
def test_huge_page_stays_when_the_copy_of_a_part_fails(large: Any, nth: int) -> None:
    """It moves as one or not at all, and is not split; a huge hole in the same way."""
    fail(large, nth)
    assert moved(large, commands_hmm.migrate_to_device) == "W512 D512"
    fail(large, BLOCK)
    assert moved(large, commands_hmm.migrate_to_device) == "W512 D512"
    assert moved(large, commands_hmm.migrate_to_device) == "D1024"
    fail(large, BLOCK + nth)
    assert moved(large, commands_hmm.migrate_to_system) == "W512 D512"
    assert large.read(0, 8) == b"hugehuge"


def test_huge_page_stays_when_it_was_to_move_by_small_ones(large: Any) -> None:
    """Its allocation has failed, and then the copy of a page: nothing of it has moved, and it is whole."""
    large.call(commands_failures.inject_migration_failure, large.mirror, 1)
    fail(large, 7)
    assert moved(large, commands_hmm.migrate_to_device) == "W512 D512"


def test_touch_of_a_huge_page_is_sigbus_when_the_copy_of_a_part_fails(large: Any) -> None:
    """All of it stays, wherever it was touched."""
    moved(large, commands_hmm.migrate_to_device)
    fail(large, 300)
    assert touch(large, 5, 1) == (0, Signal.BUS_ADRERR)
    assert shown(large) == "D1024"
    fail(large, BLOCK + 1)
    assert touch(large, 5, BLOCK) == (BLOCK - 5, Signal.BUS_ADRERR)
    assert shown(large) == "W512 D512"
    assert touch(large, 5, BLOCK) == (BLOCK, None)
    assert shown(large) == "W1024"


def test_evict_leaves_a_huge_page_when_the_copy_of_a_part_fails(large: Any) -> None:
    """The other one comes back as one."""
    moved(large, commands_hmm.migrate_to_device)
    fail(large, 5)
    assert large.call(commands_hmm.evict_device, large.device) == BLOCK
    assert sorted(shown(large).split()) == ["D512", "W512"]
