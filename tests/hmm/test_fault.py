"""Page faults: what comes to stand in the page table, who is told, and where faults end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hmm import cpu_pte, fault
from hmm import file as files
from hmm.address_space import AddressSpace
from hmm.cpu_access import read_memory, read_pages, touch, write_memory
from hmm.errors import NoSuchObjectError, OutOfFramesError, SegmentationFault, Signal, TimedOutError
from hmm.events import Cause, EventState, EventType, Reason
from hmm.fault import bring_in, fault_in
from hmm.fault_pages import READ_ONLY, WRITTEN, ZERO_PAGE, Strangers
from hmm.fork import exit_mmap
from hmm.frames import PageFlag
from hmm.mman import MapFlag, munmap
from hmm.mprotect import mprotect
from hmm.operation import Await, Operation, WaitFor
from hmm.units import PAGE_SIZE, PIECE_BYTES, AddressRange, Entries
from hmm.vma import Prot, VmFlag

SHARED = MapFlag.SHARED | MapFlag.FIXED
RW = Prot.READ | Prot.WRITE
FREE = 1023


def pages(start: int, npages: int = 1) -> AddressRange:
    """So many pages from `start` on."""
    return AddressRange(start, start + npages * PAGE_SIZE)


def scattered(start: int, *numbers: int) -> Entries:
    """Addresses of pages counted from `start`."""
    return np.array([start + k * PAGE_SIZE for k in numbers], np.uint64)


def flags(space: AddressSpace, start: int, npages: int = 1) -> list[int]:
    """The flags of the entries of pages."""
    return cpu_pte.cpu_flags(space.table.read(start, start + npages * PAGE_SIZE)).tolist()  # type: ignore[no-any-return]


def pfn(space: AddressSpace, address: int) -> int:
    """The frame of a page."""
    return cpu_pte.cpu_pfn(space.table.get(address))


# ---- private anonymous memory


@pytest.mark.parametrize("npages", [1, 2, 600])
def test_fault_in_maps_the_zero_page_when_anonymous_memory_is_read(
    world: Any, space: AddressSpace, npages: int
) -> None:
    """A read of untouched private memory costs no frame and prepares no anon_vma: do_anonymous_page()."""
    start = world.map(space, npages)
    world.run(fault_in(space, pages(start, npages), write=False))
    assert set(space.table.read(start, start + npages * PAGE_SIZE).tolist()) == {ZERO_PAGE}
    assert world.frames.available == FREE
    assert not next(iter(space.vmas)).anon_vma


@pytest.mark.parametrize("npages", [1, 2, 600])
def test_fault_in_gives_own_pages_when_anonymous_memory_is_written(
    world: Any, space: AddressSpace, npages: int
) -> None:
    """A write gives each page a zeroed frame, exclusive to this process: do_anonymous_page()."""
    start = world.map(space, npages)
    world.run(fault_in(space, pages(start, npages), write=True))
    assert set(flags(space, start, npages)) == {WRITTEN}
    pfns = cpu_pte.cpu_pfn(space.table.read(start, start + npages * PAGE_SIZE))
    assert np.unique(pfns).size == npages
    assert (world.frames.refcount[pfns] == 1).all()
    assert (world.frames.mapcount[pfns] == 1).all()
    assert world.frames.test_flags(pfns, PageFlag.ANON_EXCLUSIVE).all()
    assert next(iter(space.vmas)).anon_vma
    world.frames.check()
    space.table.check()


def test_fault_in_leaves_pages_alone_when_they_are_there(world: Any, space: AddressSpace) -> None:
    """Present pages keep their frames and contents; only what lacks something is touched."""
    start = world.map(space, 8)
    world.run(fault_in(space, pages(start + 5 * PAGE_SIZE), write=False))
    world.run(fault_in(space, pages(start + 4 * PAGE_SIZE, 4), write=True))
    world.run(write_memory(space, start + 3 * PAGE_SIZE, b"x" * PAGE_SIZE))
    before = pfn(space, start + 3 * PAGE_SIZE)
    for _ in range(2):
        world.run(fault_in(space, pages(start, 8), write=True))
        assert pfn(space, start + 3 * PAGE_SIZE) == before
    assert world.run(read_memory(space, start + 3 * PAGE_SIZE, 1)).data == b"x"
    assert world.frames.available == FREE - 8


def test_fault_in_replaces_the_zero_page_when_it_is_written(world: Any, space: AddressSpace) -> None:
    """Zero page to own page is a copy on write of which mirrors hear, as CLEAR and MIGRATE: wp_page_copy()."""
    start = world.map(space, 4)
    listener = world.listen(space)
    world.run(fault_in(space, pages(start, 4), write=False))
    assert listener.events == []
    world.run(fault_in(space, pages(start + PAGE_SIZE, 2), write=True))
    (event,) = listener.events
    assert event.spans == (pages(start + PAGE_SIZE, 2),)
    assert (event.cause, event.etype, event.reason) == (Cause.COPY_ON_WRITE, EventType.MIGRATE, Reason.CLEAR)
    assert flags(space, start, 4) == [ZERO_PAGE, WRITTEN, WRITTEN, ZERO_PAGE]
    assert world.frames.available == FREE - 2


def test_fault_in_tells_nobody_when_pages_are_touched_first(world: Any, space: AddressSpace) -> None:
    """First touches of any kind are no event: nobody can have a translation of what was not there."""
    listener = world.listen(space)
    file = world.file(npages=4)
    for at, where in enumerate((None, file)):
        for kind in (MapFlag.PRIVATE | MapFlag.FIXED, SHARED):
            start = world.map(space, 4, flags=kind, file=where, at=8 * (2 * at + (kind == SHARED)))
            world.run(fault_in(space, pages(start, 4), write=True))
    assert listener.events == []


def test_anon_vma_is_a_neighbours_when_they_could_merge_later(world: Any, space: AddressSpace) -> None:
    """Mappings that differ in protection alone share the family of their pages: find_mergeable_anon_vma()."""
    start = world.map(space, 2)
    above = world.map(space, 2, prot=Prot.READ | Prot.WRITE | Prot.EXEC, at=2)
    apart = world.map(space, 2, at=9)
    for address in (start, above, apart):
        world.run(fault_in(space, pages(address), write=True))
    first, second, third = space.vmas
    assert first.anon_vma == second.anon_vma != third.anon_vma


# ---- copy on write


def test_fault_in_copies_when_another_process_has_the_page(world: Any, space: AddressSpace) -> None:
    """After fork the first writer gets a copy, the other then has the page alone and reuses it: do_wp_page()."""
    start = world.map(space, 3)
    world.run(write_memory(space, start, b"a" * (3 * PAGE_SIZE)))
    child = world.fork(space)
    parents, childs = world.listen(space), world.listen(child)
    world.run(write_memory(child, start + PAGE_SIZE, b"b"))
    (event,) = childs.events
    assert event.spans == (pages(start + PAGE_SIZE),)
    assert world.run(read_memory(space, start + PAGE_SIZE, 2)).data == b"aa"
    assert world.run(read_memory(child, start + PAGE_SIZE, 2)).data == b"ba"
    before = pfn(space, start + PAGE_SIZE)
    world.run(write_memory(space, start + PAGE_SIZE, b"c"))
    assert pfn(space, start + PAGE_SIZE) == before
    assert parents.events == []
    assert world.frames.available == FREE - 4
    world.frames.check()


def test_fault_in_reuses_when_the_other_process_is_gone(world: Any, space: AddressSpace) -> None:
    """A page with one reference left is not copied: wp_can_reuse_anon_folio()."""
    start = world.map(space, 2)
    world.run(write_memory(space, start, b"a" * (2 * PAGE_SIZE)))
    child = world.fork(space)
    listener = world.listen(space)
    world.run(exit_mmap(child))
    before = pfn(space, start)
    world.run(fault_in(space, pages(start, 2), write=True))
    assert pfn(space, start) == before
    assert world.frames.test_flags(np.array([before]), PageFlag.ANON_EXCLUSIVE).all()
    assert listener.events == []


def test_fault_in_copies_when_somebody_else_holds_a_reference(world: Any, space: AddressSpace) -> None:
    """A shared page with any further reference is copied, though it is mapped once: wp_can_reuse_anon_folio()."""
    start = world.map(space, 1)
    world.run(write_memory(space, start, b"a"))
    child = world.fork(space)
    before = pfn(space, start)
    world.frames.get(np.array([before]))
    world.run(exit_mmap(child))
    world.run(fault_in(space, pages(start), write=True))
    assert pfn(space, start) != before
    assert world.run(read_memory(space, start, 1)).data == b"a"


def test_fault_in_sends_one_event_when_many_pages_are_copied(world: Any, space: AddressSpace) -> None:
    """All ranges of a piece travel in one event, exactly those that are copied."""
    start = world.map(space, 10)
    world.run(fault_in(space, scattered(start, 1, 2, 5, 9), write=False))
    listener = world.listen(space)
    world.run(fault_in(space, pages(start, 10), write=True))
    (event,) = listener.events
    assert event.spans == (pages(start + PAGE_SIZE, 2), pages(start + 5 * PAGE_SIZE), pages(start + 9 * PAGE_SIZE))
    assert set(flags(space, start, 10)) == {WRITTEN}


def test_fault_in_keeps_the_old_page_until_mirrors_have_answered(world: Any, space: AddressSpace) -> None:
    """The entry is replaced only after the answer, and the range is being invalidated meanwhile."""
    start = world.map(space, 1)
    world.run(fault_in(space, pages(start), write=False))
    world.listen(space)
    seen = []

    def meanwhile() -> None:
        seen.append((space.table.get(start), space.notifier.invalidations_overlap((pages(start),))))

    world.meanwhile = meanwhile
    world.run(fault_in(space, pages(start), write=True))
    assert seen == [(ZERO_PAGE, True)]
    assert not space.notifier.invalidations


def test_fault_in_changes_nothing_when_a_mirror_does_not_answer(world: Any, space: AddressSpace) -> None:
    """With policy FAIL the page is not copied (ETIMEDOUT)."""
    start = world.map(space, 1)
    world.run(fault_in(space, pages(start), write=False))
    world.listen(space).state = EventState.ABANDONED
    with pytest.raises(TimedOutError):
        world.run(fault_in(space, pages(start), write=True))
    assert space.table.get(start) == ZERO_PAGE


def test_fault_in_decides_again_when_the_page_is_unmapped_meanwhile(world: Any, space: AddressSpace) -> None:
    """What was true before the wait is not relied on after it: the mapping may be gone."""
    start = world.map(space, 2)
    world.run(fault_in(space, pages(start, 2), write=False))
    world.listen(space)
    world.meanwhile = lambda: world.run(munmap(space, start + PAGE_SIZE, PAGE_SIZE))
    with pytest.raises(SegmentationFault) as fault_:
        world.run(fault_in(space, pages(start, 2), write=True))
    assert (fault_.value.signal, fault_.value.address) == (Signal.SEGV_MAPERR, start + PAGE_SIZE)
    assert flags(space, start) == [WRITTEN]


def test_fault_in_reuses_when_the_other_process_exits_meanwhile(world: Any, space: AddressSpace) -> None:
    """The page that was to be copied has become ours alone while mirrors were told: it stays."""
    start = world.map(space, 1)
    world.run(write_memory(space, start, b"a"))
    child = world.fork(space)
    world.listen(space)
    before = pfn(space, start)
    world.meanwhile = lambda: world.run(exit_mmap(child))
    world.run(fault_in(space, pages(start), write=True))
    assert pfn(space, start) == before


def test_fault_in_tells_again_when_more_is_shared_meanwhile(world: Any, space: AddressSpace) -> None:
    """A fork during the wait makes further pages need a copy; they are told before they are copied."""
    start = world.map(space, 4)
    world.run(fault_in(space, pages(start), write=False))
    world.run(fault_in(space, pages(start + 2 * PAGE_SIZE, 2), write=True))
    listener = world.listen(space)
    world.meanwhile = lambda: world.fork(space)
    world.run(fault_in(space, pages(start, 4), write=True))
    copies = [event.spans for event in listener.events if event.cause is Cause.COPY_ON_WRITE]
    assert copies == [(pages(start),), (pages(start + PAGE_SIZE, 3),)]
    assert set(flags(space, start, 4)) == {WRITTEN}
    world.frames.check()


def test_fault_in_waits_again_when_an_edit_began_meanwhile(world: Any, space: AddressSpace) -> None:
    """A call that took hold of the range while mirrors were told goes first; then mirrors are told anew."""
    start = world.map(space, 1)
    world.run(fault_in(space, pages(start), write=False))
    listener = world.listen(space)
    with space.notifier.turn() as turn:
        turn.operation_id = 99
        world.meanwhile = lambda: turn.hold(pages(start))
        operation = fault_in(space, pages(start), write=True)
        deliver = operation.send(None)
        request = operation.send(world.answer(deliver))
        assert isinstance(request, Await)
        assert request.wait_for is WaitFor.EDITS
        assert space.table.get(start) == ZERO_PAGE
    deliver = operation.send(None)
    with pytest.raises(StopIteration):
        operation.send(world.answer(deliver))
    assert len(listener.events) == 2
    assert flags(space, start) == [WRITTEN]


@pytest.mark.parametrize("scatter", [False, True])
def test_fault_in_waits_when_a_call_edits_the_range(world: Any, space: AddressSpace, scatter: bool) -> None:
    """Faults are kept out of ranges whose VMAs and entries disagree for the moment."""
    start = world.map(space, 2)
    target = scattered(start, 1) if scatter else pages(start + PAGE_SIZE)
    with space.notifier.turn() as turn:
        turn.operation_id = 99
        turn.hold(pages(start))
        world.run(fault_in(space, target, write=True))
        turn.hold(pages(start + PAGE_SIZE))
        operation = fault_in(space, target, write=True)
        assert world.start(operation).spans == (pages(start + PAGE_SIZE),)
    world.run(operation)


def test_fault_in_fails_when_the_space_is_gone(world: Any, space: AddressSpace) -> None:
    """The last process has exited (ESRCH), before the fault or while mirrors were told."""
    start = world.map(space, 1)
    world.run(fault_in(space, pages(start), write=False))
    world.listen(space)

    def close() -> None:
        space.notifier.closed = True

    world.meanwhile = close
    with pytest.raises(NoSuchObjectError):
        world.run(fault_in(space, pages(start), write=True))
    with pytest.raises(NoSuchObjectError):
        world.run(fault_in(space, pages(start), write=False))


# ---- files and shared memory


def test_fault_in_maps_writable_when_shared_memory_is_read(world: Any, space: AddressSpace) -> None:
    """A read of a shared writable mapping allocates the page and maps it writable, not dirty: do_read_fault()."""
    start = world.map(space, 3, flags=SHARED)
    world.run(fault_in(space, pages(start, 3), write=False))
    assert set(flags(space, start, 3)) == {READ_ONLY | cpu_pte.WRITE}
    assert world.frames.available == FREE - 3
    world.run(fault_in(space, pages(start, 3), write=True))
    assert set(flags(space, start, 3)) == {WRITTEN}
    world.frames.check()


def test_fault_in_maps_the_same_page_when_two_processes_share(world: Any, space: AddressSpace) -> None:
    """What one writes the other reads, whoever touched it first."""
    start = world.map(space, 2, flags=SHARED)
    child = world.fork(space)
    assert space.table.read(start, start + 2 * PAGE_SIZE).any() == child.table.read(start, start + PAGE_SIZE).any()
    world.run(write_memory(child, start, b"hello"))
    assert world.run(read_memory(space, start, 5)).data == b"hello"
    assert pfn(space, start) == pfn(child, start)
    assert world.frames.mapcount[pfn(space, start)] == 2
    assert world.frames.refcount[pfn(space, start)] == 3


def test_fault_in_upgrades_in_place_when_shared_memory_was_write_protected(world: Any, space: AddressSpace) -> None:
    """A shared page that became read-only, for write-back say, is not copied and not told: wp_page_shared()."""
    start = world.map(space, 1, flags=SHARED)
    world.run(fault_in(space, pages(start), write=True))
    entry = space.table.get(start)
    space.table.set(start, entry & ~(cpu_pte.WRITE | cpu_pte.DIRTY))
    listener = world.listen(space)
    world.run(fault_in(space, pages(start), write=True))
    assert space.table.get(start) == entry
    assert not world.frames.test_flags(np.array([cpu_pte.cpu_pfn(entry)]), PageFlag.ANON_EXCLUSIVE).any()
    assert listener.events == []


def test_fault_in_maps_read_only_when_a_private_file_is_read(world: Any, space: AddressSpace) -> None:
    """A private mapping shows the page of the file until it is written; the copy is told: wp_page_copy()."""
    file = world.file()
    world.run(files.write(file, 0, b"file"))
    start = world.map(space, 1, file=file)
    listener = world.listen(space)
    world.run(fault_in(space, pages(start), write=False))
    assert flags(space, start) == [READ_ONLY]
    assert listener.events == []
    world.run(write_memory(space, start, b"mine"))
    assert len(listener.events) == 1
    assert world.run(files.read(file, 0, 4)) == b"file"
    assert world.run(read_memory(space, start, 4)).data == b"mine"
    assert world.frames.mapcount[cpu_pte.cpu_pfn(file.pages.get(0))] == 0


def test_fault_in_copies_at_once_when_a_private_file_is_written_first(world: Any, space: AddressSpace) -> None:
    """The page of the file is brought into the cache, hole or not, and copied; no event: do_cow_fault()."""
    file = world.file(npages=2)
    world.run(files.write(file, PAGE_SIZE, b"file"))
    start = world.map(space, 2, file=file)
    listener = world.listen(space)
    world.run(fault_in(space, pages(start, 2), write=True))
    assert world.run(read_memory(space, start + PAGE_SIZE, 5)).data == b"file\0"
    assert set(flags(space, start, 2)) == {WRITTEN}
    assert world.frames.available == FREE - 4
    assert listener.events == []
    assert next(iter(space.vmas)).anon_vma


@pytest.mark.parametrize("write", [False, True])
def test_fault_in_stops_when_the_file_ends(world: Any, space: AddressSpace, write: bool) -> None:
    """The page with the last byte can be had, the next is SIGBUS: shmem_fault()."""
    file = world.file(npages=2.5)
    start = world.map(space, 4, flags=SHARED, file=file, offset=1)
    with pytest.raises(SegmentationFault) as fault_:
        world.run(fault_in(space, pages(start, 4), write=write))
    assert (fault_.value.signal, fault_.value.address) == (Signal.BUS_ADRERR, start + 2 * PAGE_SIZE)
    assert [bool(word) for word in flags(space, start, 4)] == [True, True, False, False]


def test_anon_vma_is_there_when_a_private_write_gets_a_signal(world: Any, space: AddressSpace) -> None:
    """do_cow_fault() prepares for the copy before it finds that the file has ended; a read does not."""
    start = world.map(space, 1, file=world.file())
    for write in (False, True):
        with pytest.raises(SegmentationFault):
            world.run(fault_in(space, pages(start), write=write))
        assert bool(next(iter(space.vmas)).anon_vma) == write


# ---- a driver's mapping


def test_fault_in_finds_pages_when_a_driver_mapped_them(world: Any, space: AddressSpace) -> None:
    """VM_MIXEDMAP pages are there from the start, read-only when private; a write copies: dmirror_fops_mmap()."""
    file = world.device_file(VmFlag.MIXEDMAP)
    start = world.map(space, 2, file=file)
    assert set(flags(space, start, 2)) <= {cpu_pte.PRESENT, READ_ONLY}
    listener = world.listen(space)
    world.run(fault_in(space, pages(start, 2), write=False))
    world.run(write_memory(space, start, b"x"))
    assert len(listener.events) == 1
    assert world.run(read_memory(space, start, 2)).data == b"x\0"
    world.frames.check()


@pytest.mark.parametrize("write", [False, True])
def test_fault_in_gets_a_signal_when_a_drivers_page_was_dropped(world: Any, space: AddressSpace, write: bool) -> None:
    """A driver without a fault handler has nothing to give a second time: do_fault()."""
    start = world.map(space, 1, flags=SHARED, file=world.device_file(VmFlag.MIXEDMAP))
    space.zap(start, start + PAGE_SIZE)
    with pytest.raises(SegmentationFault) as fault_:
        world.run(fault_in(space, pages(start), write=write))
    assert fault_.value.signal is Signal.BUS_ADRERR


# ---- protection


@pytest.mark.parametrize(
    ("prot", "readable", "writable"),
    [
        (Prot.NONE, False, False),
        (Prot.READ, True, False),
        (Prot.WRITE, True, True),
        (Prot.EXEC, True, False),
        (Prot.WRITE | Prot.EXEC, True, True),
    ],
)
def test_touch_obeys_the_processor_when_protection_is_partial(
    world: Any, space: AddressSpace, prot: Prot, readable: bool, writable: bool
) -> None:
    """x86 can read whatever it can write or execute, also pages that are there already: access_error()."""
    start = world.map(space, 2)
    world.run(fault_in(space, pages(start), write=True))
    world.run(mprotect(space, start, 2 * PAGE_SIZE, prot))
    for write, permitted in ((False, readable), (True, writable)):
        for address in (start, start + PAGE_SIZE):
            accessed = world.run(touch(space, pages(address), write=write))
            assert accessed.signal is (None if permitted else Signal.SEGV_ACCERR)


def test_fault_in_handles_what_lies_before_when_it_meets_a_hole(world: Any, space: AddressSpace) -> None:
    """Faults are handled in ascending order up to the first that cannot be, across VMAs."""
    start = world.map(space, 2)
    world.map(space, 2, flags=SHARED, at=2)
    world.map(space, 2, at=5)
    with pytest.raises(SegmentationFault) as fault_:
        world.run(fault_in(space, pages(start, 7), write=True))
    assert (fault_.value.signal, fault_.value.address) == (Signal.SEGV_MAPERR, start + 4 * PAGE_SIZE)
    assert set(flags(space, start, 4)) == {WRITTEN}
    assert set(flags(space, start + 4 * PAGE_SIZE, 3)) == {0}


def test_fault_in_handles_scattered_pages_when_given_addresses(world: Any, space: AddressSpace) -> None:
    """Page addresses may lie in several VMAs; only they are brought in."""
    start = world.map(space, 4)
    world.map(space, 4, flags=SHARED, at=4)
    world.run(fault_in(space, scattered(start, 0, 3, 4, 6), write=True))
    assert [bool(word) for word in flags(space, start, 8)] == [True, False, False, True, True, False, True, False]
    with pytest.raises(SegmentationFault) as fault_:
        world.run(fault_in(space, scattered(start, 1, 7, 8, 9), write=False))
    assert fault_.value.address == start + 8 * PAGE_SIZE
    assert flags(space, start + PAGE_SIZE) == [ZERO_PAGE]


def test_fault_in_pauses_when_it_goes_on_to_another_piece(world: Any, space: AddressSpace) -> None:
    """A large request lets others go first between pieces."""
    at = (PIECE_BYTES - PAGE_SIZE) // PAGE_SIZE
    start = world.map(space, 2, at=at)
    world.run(fault_in(space, pages(start, 2), write=True))
    assert world.pauses == 1
    assert set(flags(space, start, 2)) == {WRITTEN}


# ---- memory runs out


@pytest.mark.parametrize("npages", [1, 40])
def test_fault_in_keeps_what_it_had_when_frames_run_out(world: Any, space: AddressSpace, npages: int) -> None:
    """The pages before the first without a frame are in; the error names that page (ENOMEM)."""
    start = world.map(space, npages)
    world.frames.allocate(FREE - npages // 2)
    with pytest.raises(OutOfFramesError) as error:
        world.run(fault_in(space, pages(start, npages), write=True))
    assert error.value.address == start + npages // 2 * PAGE_SIZE
    assert int(np.count_nonzero(space.table.read(start, start + npages * PAGE_SIZE))) == npages // 2
    world.frames.check()


def test_fault_in_counts_every_frame_when_they_run_out(world: Any, space: AddressSpace) -> None:
    """A hole of a private file needs two frames, a cached page one, a page that is there none."""
    file = world.file(npages=6)
    world.run(files.write(file, 0, b"x" * (2 * PAGE_SIZE)))
    start = world.map(space, 6, file=file)
    world.run(fault_in(space, pages(start + PAGE_SIZE), write=True))
    world.frames.allocate(world.frames.available - 6)
    with pytest.raises(OutOfFramesError) as error:
        world.run(fault_in(space, pages(start, 6), write=True))
    assert error.value.address == start + 4 * PAGE_SIZE
    assert world.frames.available == 1
    assert set(flags(space, start, 4)) == {WRITTEN}
    world.frames.check()


def test_fault_in_copies_what_it_can_when_frames_run_out(world: Any, space: AddressSpace) -> None:
    """Copies on write need a frame each, the zero page and upgrades included in the order of addresses."""
    start = world.map(space, 6)
    world.run(fault_in(space, pages(start, 6), write=False))
    world.run(fault_in(space, pages(start + PAGE_SIZE), write=True))
    world.frames.allocate(world.frames.available - 2)
    with pytest.raises(OutOfFramesError) as error:
        world.run(fault_in(space, pages(start, 6), write=True))
    assert error.value.address == start + 3 * PAGE_SIZE
    assert flags(space, start, 6) == [WRITTEN] * 3 + [ZERO_PAGE] * 3


def test_fault_in_tells_of_no_copy_when_it_cannot_come_so_far(world: Any, space: AddressSpace) -> None:
    """Mirrors hear only of pages that are really about to be copied."""
    start = world.map(space, 2)
    world.run(fault_in(space, pages(start + PAGE_SIZE), write=False))
    world.frames.allocate(FREE)
    listener = world.listen(space)
    with pytest.raises(OutOfFramesError):
        world.run(fault_in(space, pages(start, 2), write=True))
    assert listener.events == []


@pytest.mark.parametrize("kind", [MapFlag.PRIVATE | MapFlag.FIXED, SHARED])
def test_fault_in_keeps_frames_for_copies_that_wait(world: Any, space: AddressSpace, kind: MapFlag) -> None:
    """The last frame goes to the first page, though its copy has to wait for mirrors and the next page has not."""
    start = world.map(space, 1)
    world.map(space, 1, flags=kind, at=1)
    world.run(fault_in(space, pages(start), write=False))
    world.frames.allocate(FREE - 1)
    world.listen(space)
    with pytest.raises(OutOfFramesError) as error:
        world.run(fault_in(space, pages(start, 2), write=True))
    assert error.value.address == start + PAGE_SIZE
    assert flags(space, start, 2) == [WRITTEN, 0]


@pytest.mark.parametrize("file_pages", [0, 3])
@pytest.mark.parametrize("npages", [1, 3])
@pytest.mark.parametrize("write", [False, True])
def test_fault_in_loses_no_frame_when_directories_run_out(
    world: Any, file_pages: int, npages: int, write: bool
) -> None:
    """Without directories for the page table the fault fails and everything is as it was (ENOMEM)."""
    space = world.space(directories=3)
    file = world.file(npages=file_pages) if file_pages else None
    start = world.map(space, npages, file=file)
    with pytest.raises(OutOfFramesError) as error:
        world.run(fault_in(space, pages(start, npages), write=write))
    assert error.value.address == start
    if file is not None:
        file.drop_pages(0, 3 * PAGE_SIZE)
    assert world.frames.available == FREE
    world.frames.check()


@pytest.mark.parametrize("npages", [1, 3])
def test_fault_in_counts_no_allocation_when_directories_run_out(world: Any, npages: int) -> None:
    """do_anonymous_page() allocates the page table first: an injected failure of a page is as far away as before."""
    space = world.space(directories=3)
    start = world.map(space, npages)
    world.frames.fail_allocation(20)
    with pytest.raises(OutOfFramesError):
        world.run(fault_in(space, pages(start, npages), write=True))
    assert world.frames.available == 19


# ---- entries that others resolve


def test_touch_gets_a_signal_when_a_page_is_lost(world: Any, space: AddressSpace) -> None:
    """A poisoned entry is SIGBUS, after the pages before it were handled: do_swap_page()."""
    start = world.map(space, 3)
    space.table.set(start + PAGE_SIZE, cpu_pte.cpu_entry(7, cpu_pte.POISON))
    accessed = world.run(touch(space, pages(start, 3), write=True))
    assert (accessed.done, accessed.signal, accessed.address) == (1, Signal.BUS_POISON, start + PAGE_SIZE)


def test_fault_in_asks_the_resolver_when_pages_are_not_present(
    world: Any, space: AddressSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind of entry that is not present goes to its resolver, with all its pages, and is looked at again."""
    start = world.map(space, 6)
    asked: list[tuple[int, list[int], bool]] = []

    def resolver(kind: int) -> fault.Resolver:
        def resolve(space: AddressSpace, pages: Strangers, write: bool) -> Operation[None]:
            asked.append((kind, ((pages.addresses - np.uint64(start)) >> np.uint64(12)).tolist(), write))
            space.table.clear_many(pages.addresses)
            return
            yield

        return resolve

    for kind in (cpu_pte.DEVICE, cpu_pte.SWAP):
        monkeypatch.setitem(fault.RESOLVERS, kind, resolver(kind))
    for number, kind in ((1, cpu_pte.SWAP), (2, cpu_pte.DEVICE), (4, cpu_pte.SWAP)):
        space.table.set(start + number * PAGE_SIZE, cpu_pte.cpu_entry(7, kind))
    world.run(fault_in(space, pages(start, 6), write=True))
    assert asked == [(cpu_pte.DEVICE, [2], True), (cpu_pte.SWAP, [1, 4], True)]
    assert set(flags(space, start, 6)) == {WRITTEN}


# ---- many at once is as one by one

PIECES = st.lists(
    st.tuples(
        st.integers(1, 6),  # pages
        st.sampled_from(["private", "shared", "private file", "shared file", "hole"]),
        st.sampled_from([Prot.READ, RW, Prot.NONE, Prot.WRITE]),
    ),
    min_size=1,
    max_size=5,
)


def build(world: Any, layout: list[Any], touched: list[Any], forks: bool) -> AddressSpace:
    """A space with a history."""
    space: AddressSpace = world.space()
    file = world.file(npages=7.5)
    world.run(files.write(file, 2 * PAGE_SIZE, b"file" * 3000))
    at = 0
    for npages, kind, prot in layout:
        if kind != "hole":
            kind_flags = SHARED if kind.startswith("shared") else MapFlag.PRIVATE | MapFlag.FIXED
            start = world.map(space, npages, RW, kind_flags, file if kind.endswith("file") else None, at=at)
            for number, write in touched:
                if at <= number < at + npages:
                    world.run(touch(space, pages((1 << 40) + number * PAGE_SIZE), write=write))
            world.run(mprotect(space, start, npages * PAGE_SIZE, prot))
        at += npages
    if forks:
        world.fork(space)
    return space


def outcome(world: Any, operation: Any) -> object:
    """How a fault ended."""
    try:
        world.run(operation)
    except SegmentationFault as error:
        return error.signal, error.address
    except OutOfFramesError as error:
        return None, error.address
    return "done"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    layout=PIECES,
    touched=st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=12),
    forks=st.booleans(),
    write=st.booleans(),
    first=st.integers(0, 5),
    last=st.integers(6, 30),
    spare=st.sampled_from([0, 1, 2, 3, 5, 1000]),
    listens=st.booleans(),
)
def test_fault_in_is_the_same_when_pages_come_one_by_one(
    layout: list[Any],
    touched: list[Any],
    forks: bool,
    write: bool,
    first: int,
    last: int,
    spare: int,
    listens: bool,
    request: pytest.FixtureRequest,
) -> None:
    """The pages of a range fault exactly as if each were touched by itself, in ascending order."""
    world_type = type(request.getfixturevalue("world"))
    results = []
    for together in (True, False):
        world = world_type(type(request.getfixturevalue("world").frames)(1024, 64))
        space = build(world, layout, touched, forks)
        if listens:
            world.listen(space)
        world.frames.allocate(max(world.frames.available - spare, 0))
        start = 1 << 40
        span = AddressRange(start + first * PAGE_SIZE, start + last * PAGE_SIZE)
        if together:
            ended = outcome(world, fault_in(space, span, write=write))
        else:
            ended = "done"
            for address in range(span.start, span.end, PAGE_SIZE):
                ended = outcome(world, fault_in(space, scattered(address, 0), write=write))
                if ended != "done":
                    break
        world.frames.check()
        space.table.check()
        entries = space.table.read(start, start + 31 * PAGE_SIZE)
        contents = world.frames.gather(np.where(cpu_pte.is_present(entries), cpu_pte.cpu_pfn(entries), 0))
        results.append((ended, cpu_pte.cpu_flags(entries).tolist(), contents.tobytes(), world.frames.available))
    assert results[0] == results[1]


def test_bring_in_reports_the_stop_when_it_cannot_go_on(world: Any, space: AddressSpace) -> None:
    """The signal is a value for those who go on with what they have."""
    start = world.map(space, 1)
    stop = world.run(bring_in(space, pages(start, 2), write=True))
    assert (stop.address, stop.signal) == (start + PAGE_SIZE, Signal.SEGV_MAPERR)
    assert world.run(bring_in(space, pages(start), write=True)) is None
    assert world.run(read_pages(space, pages(start), 0)).data == b"\0"
