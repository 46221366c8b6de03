"""Exclusive access: taking pages from the CPU, and losing them again."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest
from machine_world import FIXED, RW, START, World, span

from hmm import commands_device, commands_failures, commands_hmm, commands_process, cpu_pte
from hmm.address_space import Thp
from hmm.clear_refs import ClearRefs
from hmm.errors import AccessDeniedError, BadAddressError, InvalidRequestError, OutOfFramesError
from hmm.events import Event, Reason
from hmm.inspection import holdings
from hmm.limits import Limits
from hmm.madvise import Advice
from hmm.mremap import MremapFlag
from hmm.operation_record import Caller
from hmm.semantics import LINUX_6_12, LINUX_7, Semantics
from hmm.smaps import memory_use
from hmm.units import PAGE_SIZE, PMD_PAGES, PMD_SIZE, AddressRange
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot

MOVE = MremapFlag.MAYMOVE | MremapFlag.FIXED


def take(bench: Any, at: int, npages: int = 1) -> np.ndarray:
    """make_device_exclusive_range()."""
    frames: np.ndarray = bench.call(commands_hmm.make_exclusive, bench.mirror, bench.span(at, npages))
    return frames


def test_take_faults_in_and_leaves_exclusive_entries(bench: Any) -> None:
    """Untouched pages become real ones first; the CPU's entries no longer translate."""
    pfns = take(bench, 0, 2)
    assert (pfns > 0).all()
    assert all(cpu_pte.is_device_exclusive(bench.entry(at)) for at in range(2))
    assert bench.heard.reasons == [Reason.EXCLUSIVE]
    assert bench.heard.events[0].owner == 0
    bench.local.machine.check()


def test_take_uses_the_page_and_leaves_it_dirty(bench: Any) -> None:
    """FOLL_TOUCH refers to it, pte_dirty() becomes the folio's; who has it back has an old entry: pte_mkold()."""
    space = bench.local.machine.processes[bench.process].space
    vma = space.vmas.find(bench.span(0).start)
    assert vma is not None
    take(bench, 0, 2)
    use = memory_use(space, vma)
    assert (use.shared_dirty, use.shared_clean, use.referenced) == (2 * PAGE_SIZE, 0, 2 * PAGE_SIZE)
    bench.call(commands_hmm.give_back_exclusive, bench.mirror)
    assert memory_use(space, vma).private_dirty == 2 * PAGE_SIZE
    assert not bench.entry(0) & cpu_pte.ACCESSED


def test_touch_revokes_when_the_cpu_reads(bench: Any) -> None:
    """Any access gives the page back, writable as it was, with its contents, after telling everybody."""
    bench.write(0, b"q")
    take(bench, 0)
    bench.heard.events.clear()
    assert bench.read(0, 1) == b"q"
    assert bench.heard.reasons == [Reason.EXCLUSIVE]
    entry = bench.entry(0)
    assert cpu_pte.is_present(entry)
    assert cpu_pte.is_writable(entry)


def test_take_again_revokes_first(bench: Any) -> None:
    """A page that is exclusive already is given back and taken anew: two events."""
    first = take(bench, 0)
    bench.heard.events.clear()
    assert take(bench, 0).tolist() == first.tolist()
    assert bench.heard.reasons == [Reason.EXCLUSIVE, Reason.EXCLUSIVE]


def test_take_copies_first_when_the_page_is_shared_by_fork(bench: Any) -> None:
    """The process gets a page of its own, and the child's stays what it was."""
    bench.write(0, b"c")
    child = bench.call(commands_process.fork, bench.process)
    before = cpu_pte.cpu_pfn(bench.entry(0))
    assert take(bench, 0).tolist() != [before]
    assert bench.read(0, 1, child) == b"c"
    assert cpu_pte.is_device_exclusive(bench.entry(0))


def test_take_brings_the_own_page_back_first(bench: Any) -> None:
    """A page in the device's memory is migrated back before it is taken."""
    bench.write(0, b"d")
    bench.to_device(0, 1)
    take(bench, 0)
    assert bench.used == 0


def test_take_leaves_shared_memory(bench: Any) -> None:
    """Only private memory can be taken: 0 for pages of shared memory."""
    bench.map(2, flags=MapFlag.SHARED | MapFlag.FIXED | MapFlag.ANONYMOUS, at=32)
    assert take(bench, 32, 2).tolist() == [0, 0]
    assert cpu_pte.is_present(bench.entry(32))


def test_take_stops_early_when_a_page_cannot_be_had(bench: Any) -> None:
    """Pages below a hole are taken all the same: their frames are the result."""
    assert take(bench, 14, 4).size == 2
    assert cpu_pte.is_device_exclusive(bench.entry(15))


def test_take_fails_when_the_first_page_cannot_be_had(bench: Any) -> None:
    """Nothing mapped, or no permission to write, is EFAULT; an empty range EINVAL."""
    bench.map(1, Prot.READ, at=32)
    with pytest.raises(BadAddressError):
        take(bench, 40)
    with pytest.raises(AccessDeniedError):
        take(bench, 32)
    with pytest.raises(InvalidRequestError):
        take(bench, 0, 0)


def test_take_fails_with_enomem_when_memory_runs_out_at_the_first_page(bench: Any) -> None:
    """make_device_exclusive_range() returns what get_user_pages_remote() does; behind the first page it stops early."""
    bench.call(commands_failures.inject_allocation_failure, 2)
    assert take(bench, 0, 2).size == 1
    with pytest.raises(OutOfFramesError) as caught:
        take(bench, 1)
    assert (caught.value.errno, caught.value.address) == (errno.ENOMEM, bench.span(1).start)
    assert take(bench, 1).size == 1  # the failure has been met


def test_take_works_without_permission_to_read(bench: Any) -> None:
    """VM_WRITE is all that is asked for."""
    bench.map(1, Prot.WRITE, at=32)
    assert take(bench, 32).size == 1


def test_revoked_entry_obeys_the_new_protection(bench: Any) -> None:
    """mprotect keeps the exclusive entry; what it becomes later may not be written."""
    bench.write(0, b"q")
    take(bench, 0)
    bench.call(commands_process.mprotect, bench.process, bench.span(0).start, PAGE_SIZE, Prot.READ)
    assert cpu_pte.is_device_exclusive(bench.entry(0))
    assert bench.read(0, 1) == b"q"
    assert not cpu_pte.is_writable(bench.entry(0))


@pytest.mark.parametrize(("semantics", "writable"), [(LINUX_6_12, False), (LINUX_7, True)])
def test_revoked_entry_obeys_the_last_protection_when_that_changed_twice(
    make_bench: Any, semantics: Semantics, writable: bool
) -> None:
    """change_pte_range() of 6.12 makes the entry readable for good; restore_exclusive_pte() of 7.2 asks the VMA."""
    bench = make_bench(semantics=semantics)
    take(bench, 0)
    for prot in (Prot.READ, RW):
        bench.call(commands_process.mprotect, bench.process, bench.span(0).start, PAGE_SIZE, prot)
    bench.read(0, 1)
    assert cpu_pte.is_writable(bench.entry(0)) == writable
    bench.local.machine.check()


@pytest.mark.parametrize(("semantics", "asks"), [(LINUX_6_12, False), (LINUX_7, True)])
def test_fork_gives_a_page_back_as_the_mapping_is_now(make_bench: Any, semantics: Semantics, asks: bool) -> None:
    """try_restore_exclusive_pte() in copy_nonpresent_pte(): 7.2 asks can_change_pte_writable(), and not the entry."""
    bench = make_bench(semantics=semantics)
    take(bench, 0)
    where = bench.span(0)
    for prot in Prot.READ, RW:
        bench.call(commands_process.mprotect, bench.process, where.start, where.size_bytes, prot)
    bench.call(commands_process.fork, bench.process)
    assert bool(cpu_pte.is_dirty(bench.entry(0))) is asks
    take(bench, 1)
    bench.call(commands_process.clear_refs, bench.process, ClearRefs.SOFT_DIRTY)
    bench.call(commands_process.fork, bench.process)
    assert bool(cpu_pte.is_dirty(bench.entry(1))) is not asks


@pytest.mark.parametrize(("semantics", "written"), [(LINUX_6_12, True), (LINUX_7, False)])
def test_revoked_entry_counts_as_written_when_the_kernel_is_old(
    make_bench: Any, semantics: Semantics, written: bool
) -> None:
    """restore_exclusive_pte() of 6.12 calls pte_mkdirty(); that of 7.2 leaves it to the next write."""
    bench = make_bench(semantics=semantics)
    take(bench, 0)
    bench.call(commands_process.clear_refs, bench.process, ClearRefs.SOFT_DIRTY)
    bench.read(0, 1)
    assert bool(bench.entry(0) & cpu_pte.SOFT_DIRTY) == written
    assert cpu_pte.is_writable(bench.entry(0)) == written


@pytest.mark.parametrize(("cut", "reasons"), [(False, []), (True, [Reason.EXCLUSIVE])])
def test_child_hears_when_its_mapping_comes_first(bench: Any, cut: bool, reasons: list[Reason]) -> None:
    """rmap_walk() tells every mapping where the page could be before it looks, and ends where it was (.done).

    The parent's comes first, unless it begins at a higher offset.
    """
    bench.write(1, b"q")
    child = bench.call(commands_process.fork, bench.process)
    _, heard = bench.attach(bench.device, child)
    bench.write(1, b"r")
    if cut:
        bench.call(commands_process.munmap, bench.process, bench.span(0).start, PAGE_SIZE)
    take(bench, 1)
    assert heard.reasons == reasons


def test_process_hears_of_where_the_page_was_when_its_place_was_kept(bench: Any) -> None:
    """What MREMAP_DONTUNMAP leaves could map the page as well, and comes before what was moved: rmap_walk_anon()."""
    bench.write(1, b"q")
    flags = MOVE | MremapFlag.DONTUNMAP
    source, target = bench.span(1).start, bench.span(40).start
    bench.call(commands_process.mremap, bench.process, source, PAGE_SIZE, PAGE_SIZE, flags, target)
    bench.heard.events.clear()
    take(bench, 40)
    assert [event.spans for event in bench.heard.events] == [(bench.span(40),), (bench.span(1),)]


def test_parent_does_not_hear_when_the_childs_own_page_is_taken(bench: Any) -> None:
    """A page that the child made can never be mapped by the parent, so that it is not asked."""
    bench.write(1, b"q")
    child = bench.call(commands_process.fork, bench.process)
    bench.write(1, b"r", child)
    mirror, _ = bench.attach(bench.device, child)
    bench.heard.events.clear()
    bench.call(commands_hmm.make_exclusive, mirror, bench.span(1))
    assert bench.heard.events == []
    grandchild = bench.call(commands_process.fork, child)
    _, heard = bench.attach(bench.device, grandchild)
    bench.write(1, b"s", child)
    bench.call(commands_process.munmap, child, bench.span(0).start, PAGE_SIZE)
    bench.call(commands_hmm.make_exclusive, mirror, bench.span(1))
    assert bench.heard.events == []
    assert Reason.EXCLUSIVE in heard.reasons  # it descends from the space that made the page, and comes first


def test_parent_hears_when_its_child_uses_the_tree_of_an_ancestor_again(bench: Any) -> None:
    """The child's own pages are in the tree of its grandparent, which has ended, as its parent is: anon_vma_clone()."""
    bench.write(1, b"q")
    grandparent = bench.call(commands_process.fork, bench.process)
    parent = bench.call(commands_process.fork, grandparent)
    bench.call(commands_process.exit_process, grandparent)
    child = bench.call(commands_process.fork, parent)
    _, heard = bench.attach(bench.device, parent)
    mirror, _ = bench.attach(bench.device, child)
    bench.write(1, b"r", child)
    bench.heard.events.clear()
    bench.call(commands_hmm.make_exclusive, mirror, bench.span(1))
    assert heard.reasons == [Reason.EXCLUSIVE]
    assert bench.heard.events == []  # the oldest is in the tree of its own pages alone


def test_give_back_reverts_what_a_mirror_has_to_itself(bench: Any) -> None:
    """Pages that it took and that nobody has touched since, wherever they are mapped now; others' stay."""
    other, _ = bench.attach(bench.device, bench.process)
    take(bench, 0, 4)
    bench.call(commands_hmm.make_exclusive, other, bench.span(6))
    bench.read(1, 1)
    to = bench.span(20)
    bench.call(commands_process.mremap, bench.process, bench.span(2).start, PAGE_SIZE, PAGE_SIZE, MOVE, to.start)
    (holding, others) = holdings(bench.local.machine)
    assert (holding.mirror_id, holding.npages) == (bench.mirror, 3)
    assert holding.spans == (bench.span(0), bench.span(3), to)
    assert (others.mirror_id, others.spans) == (other, (bench.span(6),))
    assert bench.call(commands_hmm.give_back_exclusive, bench.mirror) == 3
    assert [cpu_pte.is_device_exclusive(bench.entry(at)) for at in (0, 3, 6, 20)] == [False, False, True, False]
    assert all(cpu_pte.is_writable(bench.entry(at)) for at in (0, 3, 20))
    assert [holding.mirror_id for holding in holdings(bench.local.machine)] == [other]
    bench.local.machine.check()


def test_give_back_is_still_possible_when_the_mirror_is_lost(bench: Any) -> None:
    """A driver that is gone cannot give back what it has: somebody does it for it."""
    take(bench, 0, 2)
    bench.local.machine.fence(bench.mirror, "gone")
    assert bench.call(commands_hmm.give_back_exclusive, bench.mirror) == 2
    bench.call(commands_hmm.detach, bench.mirror)
    assert bench.mirror not in bench.local.machine.receivers


def test_pins_are_among_the_holdings(bench: Any) -> None:
    """What is pinned, where it was pinned, by whom."""
    number = bench.call(commands_process.pin, bench.process, bench.span(0, 2), write=True)
    (holding,) = holdings(bench.local.machine)
    assert (holding.pin, holding.mirror_id, holding.npages, holding.spans) == (number, 0, 2, (bench.span(0, 2),))


def test_take_stops_at_the_first_refusal_when_the_kernel_is_new(make_bench: Any) -> None:
    """make_device_exclusive() takes one page at a time: behind a page of a file nothing is taken; alone: EOPNOTSUPP."""
    bench = make_bench(semantics=LINUX_7)
    bench.map(1, Prot.READ | Prot.WRITE, at=2, flags=MapFlag.SHARED | MapFlag.FIXED | MapFlag.ANONYMOUS)
    assert take(bench, 0, 4).size == 2
    assert [cpu_pte.is_device_exclusive(bench.entry(at)) for at in range(4)] == [True, True, False, False]
    with pytest.raises(InvalidRequestError) as refused:
        take(bench, 2, 2)
    assert refused.value.errno == errno.EOPNOTSUPP
    old = make_bench()
    old.map(1, Prot.READ | Prot.WRITE, at=2, flags=MapFlag.SHARED | MapFlag.FIXED | MapFlag.ANONYMOUS)
    assert (take(old, 0, 4) == 0).tolist() == [False, False, True, False]


@pytest.mark.parametrize("thp", [Thp.NEVER, Thp.ALWAYS])
def test_take_starts_over_when_the_process_forks_meanwhile(make_bench: Any, thp: Thp) -> None:
    """A child shares what was about to be taken: the process gets pages of its own first.

    Source: the kernel's callers hold mmap_lock from the fault to the taking, and fork waits for it.
    """
    bench = make_bench(frames=4200, thp=thp, mapped_pages=2 * PMD_PAGES)
    bench.write(PMD_PAGES, b"c" * PAGE_SIZE)
    children: list[int] = []

    class Forking:
        def update(self, _: int, event: Event) -> int:
            if event.reason is Reason.EXCLUSIVE and not children:
                children.append(0)
                children.append(bench.call(commands_process.fork, bench.process))
            return 0

        def release(self, _: int) -> None:
            """Nothing to stop."""

    bench.local.attach(bench.mirror, Forking())
    (pfn,) = take(bench, PMD_PAGES).tolist()
    child = children[1]
    assert cpu_pte.is_device_exclusive(bench.entry(PMD_PAGES))
    assert cpu_pte.cpu_pfn(bench.entry(PMD_PAGES, child)) != pfn
    assert bench.read(PMD_PAGES, PAGE_SIZE, child) == b"c" * PAGE_SIZE
    bench.local.machine.check()


def test_take_waits_for_a_fork_that_was_told_of_meanwhile() -> None:
    """mmap_lock: fork's event was answered before the pages are taken, so it may not give them back afterwards."""
    world = World(mirrors=0)
    device = world.do(commands_device.register_device, "card")
    mirror = world.do(commands_hmm.attach, device, world.pid)
    world.do(commands_hmm.insert_notifier, mirror, 0, 1 << 47)
    world.do(commands_process.write_memory, world.pid, START, b"x")
    taking = world.start(commands_hmm.make_exclusive, mirror, span(0))
    (exclusive,) = world.sent()
    forking = world.start(commands_process.fork, world.pid)
    (forked,) = world.sent()
    for delivery in (forked, exclusive):
        world.machine.answer(delivery.mirror_id, delivery.sequence)
    world.resume(taking)
    assert not taking.done
    world.settle()
    assert forking.done
    assert taking.result.tolist() == [cpu_pte.cpu_pfn(world.machine.processes[world.pid].space.table.get(START))]
    assert cpu_pte.is_device_exclusive(world.machine.processes[world.pid].space.table.get(START))
    world.machine.check()


def test_take_waits_until_the_cpu_has_a_page_that_it_is_taking_back(bench: Any) -> None:
    """The driver has answered for it: it would not hear again that what it got meanwhile is gone.

    Source: the kernel's callers keep the page locked until their driver has it; do_swap_page() waits for that lock.
    """
    machine = bench.local.machine
    take(bench, 0)
    touching = machine.start(Caller(), commands_process.touch, bench.process, bench.span(0), write=False)
    (told,) = machine.take_outbox()
    machine.answer(told.mirror_id, told.sequence)
    taking = machine.start(Caller(), commands_hmm.make_exclusive, bench.mirror, bench.span(0))

    def go_on() -> None:
        for _ in range(10):
            for told in machine.take_outbox():
                machine.answer(told.mirror_id, told.sequence)
            if machine.is_ready(taking):
                machine.resume(taking.id)

    go_on()
    assert not taking.done
    machine.resume(touching.id)
    assert touching.done
    go_on()
    assert taking.done
    assert cpu_pte.is_device_exclusive(bench.entry(0))


def test_take_of_a_folio_leaves_no_device_with_a_page_that_it_got_while_others_were_told() -> None:
    """A folio is in two VMAs, whose mirrors hear one after the other: what was told stays busy until it is taken.

    Source: Linux mm/rmap.c, page_make_device_exclusive_one(): the entries go between the notifier's start and end.
    """
    world = World(limits=Limits(frames=4200, device_frames=0))
    machine, (mirror,) = world.machine, world.mirrors
    process = machine.processes[world.pid]
    process.space.thp = Thp.ALWAYS
    world.do(commands_process.mmap, world.pid, START, PMD_SIZE, RW, FIXED)
    world.do(commands_process.write_memory, world.pid, START, b"x")
    second = AddressRange(START + PMD_SIZE // 2, START + PMD_SIZE)
    world.do(commands_process.madvise, world.pid, second.start, second.size_bytes, Advice.SEQUENTIAL)
    card = world.do(commands_device.register_device, "card")
    taking = world.start(commands_hmm.make_exclusive, world.do(commands_hmm.attach, card, world.pid), span(0))
    while (told := world.sent()) and second not in told[0].event.spans:
        machine.answer(told[0].mirror_id, told[0].sequence)
        world.resume(taking)
    faulting = world.start(commands_device.fault, mirror, [span(3)], write=True)
    machine.answer(told[0].mirror_id, told[0].sequence)
    world.settle()
    assert taking.result.all()
    assert faulting.done
    machine.check()


def test_take_tells_relatives_nothing_of_a_mapping_that_went_while_they_were_told_of_another() -> None:
    """The reverse map is walked for pages that are there: mm/rmap.c, folio_lock_anon_vma_read()."""
    world = World(mirrors=0)
    machine, parent = world.machine, world.pid
    card = world.do(commands_device.register_device, "card")
    taker = world.do(commands_hmm.attach, card, parent)
    world.do(commands_process.write_memory, parent, START, b"a" * 4 * PAGE_SIZE)
    child = world.do(commands_process.fork, parent)
    listener = world.do(commands_hmm.attach, card, child)
    world.do(commands_hmm.insert_notifier, listener, START, 16 * PAGE_SIZE)
    world.do(commands_process.write_memory, parent, START, b"b" * 4 * PAGE_SIZE)
    world.do(commands_process.munmap, parent, START, PAGE_SIZE)  # so that the child's mapping comes first
    world.do(commands_process.madvise, parent, span(3).start, PAGE_SIZE, Advice.SEQUENTIAL)

    taking = world.start(commands_hmm.make_exclusive, taker, span(1, 3))
    (told,) = world.sent()
    assert told.event.spans == (span(1, 2),)
    world.do(commands_process.munmap, parent, span(3).start, PAGE_SIZE)
    machine.answer(told.mirror_id, told.sequence)
    heard = []
    while not taking.done:
        world.resume(taking)
        for told in world.sent():
            heard.append(told.event.spans)
            machine.answer(told.mirror_id, told.sequence)
    assert heard == [(span(1, 2),)]
    assert taking.result.size == 2


@pytest.mark.parametrize("semantics", [LINUX_6_12, LINUX_7])
def test_second_of_two_calls_finds_the_page_locked_when_both_want_it(semantics: Semantics) -> None:
    """In 6.12 it goes without; in current kernels it waits, and then takes the page from the first one.

    Source: Linux mm/rmap.c: folio_trylock() of make_device_exclusive_range(), 6.12; folio_lock_killable() of
    make_device_exclusive(), 7.0.
    """
    world = World(mirrors=0)
    machine, process = world.machine, world.pid
    machine.processes[process].space.semantics = semantics
    card = world.do(commands_device.register_device, "card")
    first, second = (world.do(commands_hmm.attach, card, process) for _ in range(2))
    world.do(commands_hmm.insert_notifier, first, START, PAGE_SIZE)
    world.do(commands_process.write_memory, process, START, b"page")
    winning = world.start(commands_hmm.make_exclusive, first, span(0))
    (owed,) = world.settle(first)
    losing = world.start(commands_hmm.make_exclusive, second, span(0, 2))
    assert losing.done == (semantics is LINUX_6_12)
    if losing.done:
        assert (losing.result > 0).tolist() == [False, True]
    else:
        assert machine.blockers(losing) == [winning.id]
    machine.check()
    machine.answer(first, owed.sequence)
    world.settle()
    assert winning.result[0]
    assert losing.done
    machine.check()


@pytest.mark.parametrize("away", [False, True])
@pytest.mark.parametrize(("semantics", "written"), [(LINUX_6_12, True), (LINUX_7, False)])
def test_page_that_may_be_written_is_not_soft_dirty_when_it_is_taken(
    make_bench: Any, semantics: Semantics, *, written: bool, away: bool
) -> None:
    """get_user_pages(FOLL_WRITE) leaves it alone, follow_page_pte(): no fault, only its folio becomes dirty.

    restore_exclusive_pte() of 6.12 makes what could be written dirty, both ways; that of 7.0 forbids writing first.
    """
    bench = make_bench(semantics=semantics)
    bench.write(0, b"x")
    bench.to_device(0, 1)
    bench.call(commands_process.clear_refs, bench.process, ClearRefs.SOFT_DIRTY)
    if not away:
        bench.to_system(0, 1)
        assert bench.entry(0) & (cpu_pte.WRITE | cpu_pte.SOFT_DIRTY) == cpu_pte.WRITE
    take(bench, 0)
    assert bench.entry(0) & (cpu_pte.EXCLUSIVE | cpu_pte.SOFT_DIRTY) == cpu_pte.EXCLUSIVE
    bench.read(0, 1)
    assert bool(bench.entry(0) & cpu_pte.SOFT_DIRTY) == written
