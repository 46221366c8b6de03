"""fork and exit: what a child gets, who is told, what comes back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hmm import cpu_pte
from hmm import file as files
from hmm.address_space import AddressSpace
from hmm.cpu_access import read_memory, touch, write_memory
from hmm.errors import NoSuchObjectError, OutOfFramesError, TimedOutError
from hmm.events import Cause, EventState, EventType, Reason
from hmm.fault_pages import ZERO_PAGE
from hmm.fork import exit_mmap, fork
from hmm.frames import PageFlag
from hmm.madvise import Advice, madvise
from hmm.mlock import mlock2
from hmm.mman import MapFlag, mmap
from hmm.mprotect import mprotect
from hmm.operation import Deliver, WaitFor
from hmm.pin import pin_user_pages
from hmm.units import PAGE_SIZE, PIECE_PAGES, WHOLE_SPACE, AddressRange
from hmm.vma import LOCKED_FLAGS, Prot, VmFlag

SHARED = MapFlag.SHARED | MapFlag.FIXED
FREE = 1023


def pages(start: int, npages: int = 1) -> AddressRange:
    """So many pages from `start` on."""
    return AddressRange(start, start + npages * PAGE_SIZE)


def forked(world: Any, space: AddressSpace) -> AddressSpace:
    """A child of a space."""
    child: AddressSpace = world.fork(space)
    world.frames.check()
    child.table.check()
    child.vmas.check()
    return child


def fill(world: Any, space: AddressSpace, start: int, npages: int = 1) -> None:
    """Write the number of each page into it."""
    for number in range(npages):
        world.run(write_memory(space, start + number * PAGE_SIZE, bytes([number + 1])))


# ---- pages


def test_fork_shares_pages_read_only_when_they_are_private(world: Any, space: AddressSpace) -> None:
    """Both get the same frames without permission to write, exclusive to nobody: copy_present_ptes()."""
    start = world.map(space, 3)
    fill(world, space, start, 3)
    child = forked(world, space)
    parents, childs = (each.table.read(start, start + 3 * PAGE_SIZE) for each in (space, child))
    pfns = cpu_pte.cpu_pfn(parents)
    assert np.array_equal(pfns, cpu_pte.cpu_pfn(childs))
    assert not (cpu_pte.is_writable(parents) | cpu_pte.is_writable(childs)).any()
    assert (cpu_pte.is_dirty(parents) & cpu_pte.is_dirty(childs)).all()
    assert not (childs & np.uint64(cpu_pte.ACCESSED)).any()
    assert (world.frames.mapcount[pfns] == 2).all()
    assert not world.frames.test_flags(pfns, PageFlag.ANON_EXCLUSIVE).any()
    assert world.frames.available == FREE - 3


def test_fork_copies_the_zero_page_when_the_vma_has_private_pages(world: Any, space: AddressSpace) -> None:
    """Entries of the zero page are copied as they are, and cost nothing."""
    start = world.map(space, 3)
    fill(world, space, start)
    world.run(touch(space, pages(start + 2 * PAGE_SIZE), write=False))
    child = forked(world, space)
    copied = cpu_pte.cpu_flags(child.table.read(start, start + 3 * PAGE_SIZE)) != 0
    assert copied.tolist() == [True, False, True]
    assert child.table.get(start + 2 * PAGE_SIZE) | cpu_pte.ACCESSED == ZERO_PAGE


def test_fork_copies_nothing_when_the_vma_has_no_private_pages(world: Any, space: AddressSpace) -> None:
    """Without anon_vma everything can be faulted in again: vma_needs_copy()."""
    start = world.map(space, 2)
    world.run(touch(space, pages(start, 2), write=False))
    file = world.file()
    world.run(files.write(file, 0, b"file"))
    private = world.map(space, 1, file=file, at=4)
    world.run(touch(space, pages(private), write=False))
    shared = world.map(space, 1, flags=SHARED, at=6)
    world.run(write_memory(space, shared, b"shared"))
    child = forked(world, space)
    assert not child.table.read(start, start + 8 * PAGE_SIZE).any()
    assert world.run(read_memory(child, private, 4)).data == b"file"
    assert world.run(read_memory(child, shared, 6)).data == b"shared"


def test_fork_copies_pages_of_the_file_when_some_were_written(world: Any, space: AddressSpace) -> None:
    """A private file mapping with a copied page has all of its entries copied."""
    file = world.file()
    world.run(files.write(file, 0, b"x" * (3 * PAGE_SIZE)))
    start = world.map(space, 3, file=file)
    world.run(touch(space, pages(start, 2), write=False))
    world.run(write_memory(space, start, b"y"))
    child = forked(world, space)
    assert (child.table.read(start, start + 3 * PAGE_SIZE) != 0).tolist() == [True, True, False]
    frame = cpu_pte.cpu_pfn(child.table.get(start + PAGE_SIZE))
    assert frame == cpu_pte.cpu_pfn(file.pages.get(PAGE_SIZE))
    assert world.frames.mapcount[frame] == 2


def test_fork_keeps_contents_apart_when_both_write(world: Any, space: AddressSpace) -> None:
    """Parent, child and grandchild each see their own writes."""
    start = world.map(space, 2)
    world.run(write_memory(space, start, b"a" * (2 * PAGE_SIZE)))
    child = forked(world, space)
    world.run(write_memory(child, start, b"b"))
    grandchild = forked(world, child)
    world.run(write_memory(space, start, b"c"))
    world.run(write_memory(grandchild, start, b"d"))
    read = [world.run(read_memory(each, start, 2)).data for each in (space, child, grandchild)]
    assert read == [b"ca", b"ba", b"da"]
    for each in (child, space, grandchild):
        world.run(exit_mmap(each))
        world.frames.check()
    assert world.frames.available == FREE


def test_fork_copies_a_drivers_pages_when_they_could_not_fault_again(world: Any, space: AddressSpace) -> None:
    """VM_MIXEDMAP and VM_PFNMAP entries are copied, writable when shared, clean in the child."""
    mixed = world.map(space, 2, flags=SHARED, file=world.device_file(VmFlag.MIXEDMAP))
    world.run(write_memory(space, mixed, b"x"))
    registers = world.map(space, 1, flags=SHARED, file=world.device_file(VmFlag.PFNMAP), at=4)
    listener = world.listen(space)
    child = forked(world, space)
    assert listener.events == []
    entry = child.table.get(mixed)
    assert cpu_pte.is_writable(entry)
    assert not cpu_pte.is_dirty(entry)
    assert world.run(read_memory(child, mixed, 1)).data == b"x"
    assert child.table.get(registers) == space.table.get(registers) & ~cpu_pte.ACCESSED  # pte_mkold()


def test_fork_takes_a_drivers_private_pages_back_to_read_only(world: Any, space: AddressSpace) -> None:
    """A private mapping of driver pages is copy-on-write and told, although no page was written."""
    start = world.map(space, 1, file=world.device_file(VmFlag.MIXEDMAP))
    listener = world.listen(space)
    child = forked(world, space)
    assert [event.spans for event in listener.events] == [(pages(start),)]
    assert cpu_pte.cpu_pfn(child.table.get(start)) == cpu_pte.cpu_pfn(space.table.get(start))


def test_fork_gives_exclusive_pages_back_when_a_device_holds_them(world: Any, space: AddressSpace) -> None:
    """What a device held exclusively is present and read-only in both: copy_nonpresent_pte()."""
    start = world.map(space, 2)
    fill(world, space, start, 2)
    entry = space.table.get(start)
    space.table.set(start, cpu_pte.cpu_entry(cpu_pte.cpu_pfn(entry), cpu_pte.EXCLUSIVE | cpu_pte.WRITE))
    child = forked(world, space)
    for each in (space, child):
        assert cpu_pte.is_present(each.table.get(start))
        assert not each.table.get(start) & (cpu_pte.EXCLUSIVE | cpu_pte.WRITE)
    assert world.run(read_memory(child, start, 1)).data == b"\1"


def test_fork_shares_device_pages_read_only_when_they_are_on_a_device(world: Any, space: AddressSpace) -> None:
    """A device-private entry is copied without permission to write, in both: copy_nonpresent_pte()."""
    start = world.map(space, 1)
    fill(world, space, start)
    frame = cpu_pte.cpu_pfn(space.table.get(start))
    space.table.set(start, cpu_pte.cpu_entry(frame, cpu_pte.DEVICE | cpu_pte.WRITE))
    child = forked(world, space)
    for each in (space, child):
        assert each.table.get(start) == cpu_pte.cpu_entry(frame, cpu_pte.DEVICE)
    assert world.frames.mapcount[frame] == 2


def test_fork_pauses_when_there_is_much_to_copy(world: Any, space: AddressSpace) -> None:
    """Between pieces others may go first, but no fault of the parent: its range is held."""
    npages = PIECE_PAGES + 100
    start = world.map(space, npages)
    fill(world, space, start)
    world.run(touch(space, pages(start, npages), write=False))
    child = world.space()
    operation = fork(space, child)
    operation.send(None)
    world.current.operation_id = 2
    write = write_memory(space, start + PAGE_SIZE, b"x")
    assert world.start(write).wait_for is WaitFor.EDITS
    world.run(operation)
    assert world.run(write).done == 1
    assert np.count_nonzero(child.table.read(start, start + npages * PAGE_SIZE)) == npages


# ---- VMAs


def test_fork_copies_the_layout_when_it_copies_a_space(world: Any, space: AddressSpace) -> None:
    """VMAs with their cuts, the program break, the placement; locks and MCL_FUTURE are not inherited: dup_mmap()."""
    start = world.map(space, 2)
    world.map(space, 2, prot=Prot.READ, at=2)
    world.map(space, 2, flags=SHARED, at=9)
    space.mmap_base, space.brk_start, space.brk_end = 1 << 41, 4096, 8192
    space.fault_around_pages = 16
    space.default_flags = VmFlag.LOCKED
    world.run(mlock2(space, start, PAGE_SIZE, 0))
    child = forked(world, space)
    assert [(vma.start, vma.end, vma.perms, vma.backing) for vma in child.vmas] == [
        (vma.start, vma.end, vma.perms, vma.backing) for vma in space.vmas
    ]
    assert (child.mmap_base, child.brk_start, child.brk_end) == (1 << 41, 4096, 8192)
    assert child.fault_around_pages == 16
    assert child.default_flags == VmFlag.NONE
    assert not any(vma.has(LOCKED_FLAGS) for vma in child.vmas)
    assert any(vma.has(VmFlag.LOCKED) for vma in space.vmas)


def test_fork_gives_new_families_when_vmas_have_private_pages(world: Any, space: AddressSpace) -> None:
    """Each VMA of the child gets an anon_vma of its own and remembers its ancestors': anon_vma_fork()."""
    start = world.map(space, 1)
    fill(world, space, start)
    world.map(space, 1, at=4)
    child = forked(world, space)
    first, second = child.vmas
    assert first.anon_vma
    assert first.mapping.cloned
    assert (second.anon_vma, second.mapping.cloned) == (0, False)
    world.map(child, 1, at=1)
    assert len(child.vmas) == 3


def test_fork_leaves_out_and_empties_when_advised(world: Any, space: AddressSpace) -> None:
    """DONTFORK is not there in the child, WIPEONFORK is there and empty; neither is told."""
    start = world.map(space, 2)
    wiped = world.map(space, 2, at=4)
    fill(world, space, start, 2)
    fill(world, space, wiped, 2)
    world.run(madvise(space, start, 2 * PAGE_SIZE, Advice.DONTFORK))
    world.run(madvise(space, wiped, 2 * PAGE_SIZE, Advice.WIPEONFORK))
    listener = world.listen(space)
    child = forked(world, space)
    (vma,) = child.vmas
    assert (vma.start, vma.anon_vma) == (wiped, 0)
    assert vma.has(VmFlag.WIPEONFORK)
    assert world.run(read_memory(child, wiped, 2)).data == b"\0\0"
    assert listener.events == []
    assert cpu_pte.is_writable(space.table.get(wiped))


# ---- who is told


def test_fork_tells_the_parents_mirrors_once_when_pages_become_read_only(world: Any, space: AddressSpace) -> None:
    """One event with every VMA that is private, may be written and needs copying: copy_page_range()."""
    start = world.map(space, 4)
    fill(world, space, start)
    world.map(space, 2, at=8)
    shared = world.map(space, 2, flags=SHARED, at=12)
    fill(world, space, shared)
    protected = world.map(space, 2, at=16)
    fill(world, space, protected, 2)
    listener = world.listen(space)
    forked(world, space)
    (event,) = listener.events
    assert event.spans == (pages(start, 4), pages(protected, 2))
    assert (event.cause, event.etype, event.reason) == (Cause.FORK, EventType.FORK, Reason.PROTECTION_PAGE)


def test_fork_write_protects_only_after_mirrors_have_answered(world: Any, space: AddressSpace) -> None:
    """Until then the parent's entries are as they were and the child has nothing."""
    start = world.map(space, 1)
    fill(world, space, start)
    world.listen(space)
    child = world.space()
    operation = fork(space, child)
    request = operation.send(None)
    assert isinstance(request, Deliver)
    assert cpu_pte.is_writable(space.table.get(start))
    assert space.notifier.edits_overlap((WHOLE_SPACE,))
    with pytest.raises(StopIteration):
        operation.send(world.answer(request))
    assert not cpu_pte.is_writable(space.table.get(start))
    assert not space.notifier.turns


def test_fork_changes_nothing_when_a_mirror_does_not_answer(world: Any, space: AddressSpace) -> None:
    """With policy FAIL there is no child and the parent keeps writing (ETIMEDOUT)."""
    start = world.map(space, 1)
    fill(world, space, start)
    world.listen(space).state = EventState.ABANDONED
    child = world.space()
    with pytest.raises(TimedOutError):
        world.run(fork(space, child))
    assert cpu_pte.is_writable(space.table.get(start))
    assert not len(child.vmas)


def test_fork_fails_when_the_parent_is_gone(world: Any, space: AddressSpace) -> None:
    """The space was closed while the call waited for its turn (ESRCH)."""
    space.notifier.closed = True
    with pytest.raises(NoSuchObjectError):
        world.run(fork(space, world.space()))


@pytest.mark.parametrize("directories", [1, 3, 4])
def test_fork_leaves_no_child_when_directories_run_out(world: Any, space: AddressSpace, directories: int) -> None:
    """The child is empty again, every frame is counted once, the parent goes on (ENOMEM)."""
    start = world.map(space, 1)
    far = world.run(
        mmap(
            space,
            1 << 30,
            PAGE_SIZE,
            Prot.READ | Prot.WRITE,
            SHARED ^ MapFlag.SHARED | MapFlag.PRIVATE | MapFlag.ANONYMOUS,
        )
    )
    fill(world, space, far)
    fill(world, space, start)
    world.map(space, 1, flags=SHARED, at=4)
    child = world.space(directories=directories)
    with pytest.raises(OutOfFramesError):
        world.run(fork(space, child))
    assert not len(child.vmas)
    world.frames.check()
    assert world.frames.available == FREE - 2
    assert world.run(write_memory(space, start, b"x")).done == 1
    assert world.frames.available == FREE - 2


def test_fork_copies_pinned_pages_alone_when_neighbouring_mappings_have_others(world: Any, space: AddressSpace) -> None:
    """What is pinned gets a copy with its own VMA's permission, all else is shared: copy_present_page()."""
    readable, rest = world.map(space, 2), world.map(space, 2, at=3)
    fill(world, space, readable, 2)
    fill(world, space, rest, 2)
    pfns = world.run(pin_user_pages(space, pages(readable), write=True, long_term=True))
    world.run(mprotect(space, readable, 2 * PAGE_SIZE, Prot.READ))
    pinned_too = world.run(pin_user_pages(space, pages(rest, 1), write=True, long_term=True))
    child = forked(world, space)
    entries = [child.table.get(at) for at in (readable, readable + PAGE_SIZE, rest, rest + PAGE_SIZE)]
    parents = [space.table.get(at) for at in (readable, readable + PAGE_SIZE, rest, rest + PAGE_SIZE)]
    shared = [cpu_pte.cpu_pfn(a) == cpu_pte.cpu_pfn(b) for a, b in zip(entries, parents, strict=True)]
    assert shared == [False, True, False, True]
    assert [cpu_pte.is_writable(entry) for entry in entries] == [False, False, True, False]
    assert [cpu_pte.is_writable(entry) for entry in parents] == [False, False, True, False]
    for number, at in enumerate((readable, readable + PAGE_SIZE, rest, rest + PAGE_SIZE)):
        assert world.run(read_memory(child, at, 1)).data == bytes([number % 2 + 1])
    world.frames.unpin(np.concatenate((pfns, pinned_too)))


def test_fork_leaves_pages_writable_when_directories_ran_out_before_them(world: Any, space: AddressSpace) -> None:
    """The VMAs are copied in order: the parent's pages are read-only as far as fork came: copy_page_range()."""
    near, far, behind = (world.map(space, 1, at=at) for at in (0, 1 << 20, (1 << 20) + 2))
    for start in (near, far, behind):
        fill(world, space, start)
    with pytest.raises(OutOfFramesError):
        world.run(fork(space, world.space(directories=4)))
    assert [cpu_pte.is_writable(space.table.get(start)) for start in (near, far, behind)] == [False, False, True]
    world.frames.check()


# ---- exit


def test_exit_mmap_returns_everything_when_the_space_ends(world: Any, space: AddressSpace) -> None:
    """Private pages, shared memory and page tables go."""
    start = world.map(space, 4)
    fill(world, space, start, 4)
    shared = world.map(space, 4, flags=SHARED, at=8)
    fill(world, space, shared, 4)
    world.run(exit_mmap(space))
    assert world.frames.available == FREE
    assert not len(space.vmas)
    assert space.table.directories == 1
    world.run(exit_mmap(space))
    world.frames.check()
