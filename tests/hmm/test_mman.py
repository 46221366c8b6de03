"""mmap, munmap and brk."""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import Any

import pytest
from area import BASE, RW, at, layout, pages

from hmm.address_space import MMAP_BASE, AddressSpace
from hmm.cpu_access import read_memory, touch, write_memory
from hmm.errors import (
    AccessDeniedError,
    ConflictError,
    HmmError,
    InvalidRequestError,
    NoSuchObjectError,
    OutOfFramesError,
    Signal,
    TimedOutError,
)
from hmm.events import Cause, EventState, EventType, Reason
from hmm.file import FileKind
from hmm.mman import MapFlag, brk, mmap, munmap
from hmm.operation import Pause, WaitFor
from hmm.units import PAGE_SIZE, PIECE_PAGES, TASK_SIZE, AddressRange
from hmm.vma import MAY_FLAGS, STACK_GUARD_GAP, Mapping, Prot, VmFlag

ANON = MapFlag.PRIVATE | MapFlag.ANONYMOUS
SHARED_ANON = MapFlag.SHARED | MapFlag.ANONYMOUS


# ---- mmap


def test_mmap_makes_a_vma_when_memory_is_private(world: Any, space: AddressSpace) -> None:
    """The address comes back, the length is rounded up to pages, and may change to anything later."""
    start = world.run(mmap(space, 0, 2 * PAGE_SIZE + 1, RW, ANON))
    assert start == MMAP_BASE - 3 * PAGE_SIZE
    (vma,) = space.vmas
    assert (vma.span.npages, vma.perms, vma.backing, vma.mapping.delta) == (3, "rw-p", None, 0)
    assert vma.flags == VmFlag.READ | VmFlag.WRITE | MAY_FLAGS | VmFlag.ACCOUNT


@pytest.mark.parametrize(
    ("prot", "flags", "expected"),
    [
        (Prot.READ, ANON, VmFlag.READ),
        (RW, ANON | MapFlag.NORESERVE, VmFlag.READ | VmFlag.WRITE | VmFlag.NORESERVE),
        (Prot.NONE, ANON | MapFlag.STACK | MapFlag.GROWSDOWN, VmFlag.NOHUGEPAGE | VmFlag.GROWSDOWN),
        (Prot.EXEC, ANON | MapFlag.LOCKED | MapFlag.SYNC, VmFlag.EXEC | VmFlag.LOCKED | VmFlag.SYNC),
        (Prot.READ, ANON | MapFlag.DENYWRITE | MapFlag.EXECUTABLE | MapFlag.UNINITIALIZED, VmFlag.READ),
        (RW, SHARED_ANON, VmFlag.READ | VmFlag.WRITE | VmFlag.SHARED | VmFlag.MAYSHARE),
    ],
)
def test_mmap_sets_vm_flags_when_asked_to(
    world: Any, space: AddressSpace, prot: Prot, flags: MapFlag, expected: VmFlag
) -> None:
    """calc_vm_prot_bits() and calc_vm_flag_bits(); only private writable memory is accounted for."""
    world.run(mmap(space, BASE, PAGE_SIZE, prot, flags, shared_memory=world.shared_memory))
    (vma,) = space.vmas
    assert vma.flags == expected | MAY_FLAGS


def test_mmap_adds_the_flags_of_mlockall_when_it_locked_the_future(world: Any, space: AddressSpace) -> None:
    """def_flags: what is mapped later is locked, and brought in at once."""
    space.default_flags = VmFlag.LOCKED
    start = world.run(mmap(space, BASE, 2 * PAGE_SIZE, RW, ANON))
    assert space.vmas.find(start).has(VmFlag.LOCKED)  # type: ignore[union-attr]
    assert world.frames.available == 1021


def test_mmap_merges_with_its_neighbours_when_they_agree(world: Any, space: AddressSpace) -> None:
    """Untouched anonymous memory of the same kind is one VMA: vma_merge_new_range()."""
    world.map(space, 1, at=0)
    world.map(space, 1, at=2)
    world.map(space, 1, at=1)
    world.map(space, 1, Prot.READ, at=3)
    assert layout(space) == "0-3:rw-p 3-4:r--p"


def test_mmap_merges_file_mappings_when_the_offsets_go_on(world: Any, space: AddressSpace) -> None:
    """Contiguous in memory and in the same file."""
    file = world.file(8)
    world.map(space, 1, Prot.READ, file=file, at=0, offset=3)
    world.map(space, 1, Prot.READ, file=file, at=1, offset=4)
    world.map(space, 1, Prot.READ, file=file, at=2, offset=6)
    assert layout(space) == "0-2:r--p 2-3:r--p"
    assert [vma.offset_bytes // PAGE_SIZE for vma in space.vmas] == [3, 6]
    assert file.mapping_spaces() == [space]


def test_mmap_shares_memory_when_it_is_anonymous_and_shared(world: Any, space: AddressSpace) -> None:
    """shmem_zero_setup(): an unnamed object as long as the mapping, whose offsets begin at 0."""
    start = world.map(space, 2, flags=SHARED_ANON | MapFlag.FIXED, offset=7)
    (vma,) = space.vmas
    assert (vma.backing.size_bytes, vma.offset_bytes) == (2 * PAGE_SIZE, 0)  # type: ignore[union-attr]
    world.run(write_memory(space, start + PAGE_SIZE, b"x"))
    world.run(munmap(space, start, 2 * PAGE_SIZE))
    assert world.frames.available == 1023


def test_mmap_replaces_what_is_there_when_it_is_fixed(world: Any, space: AddressSpace) -> None:
    """MAP_FIXED unmaps the whole range in one event, holes and all, and the new pages are fresh."""
    world.map(space, 2, at=0)
    world.map(space, 2, at=3)
    world.run(write_memory(space, at(0), b"a" * 2 * PAGE_SIZE))
    listener = world.listen(space)
    world.map(space, 3, Prot.READ, at=1)
    assert layout(space) == "0-1:rw-p 1-4:r--p 4-5:rw-p"
    assert [(event.cause, event.spans) for event in listener.events] == [(Cause.MUNMAP, (pages(1, 4),))]
    assert listener.events[0].reason is Reason.UNMAP
    assert listener.events[0].etype is EventType.MUNMAP
    assert world.run(read_memory(space, at(1), 1)).data == b"\0"
    assert world.run(read_memory(space, at(0), 1)).data == b"a"


def test_mmap_tells_nobody_when_nothing_was_there(world: Any, space: AddressSpace) -> None:
    """No VMA, no event."""
    listener = world.listen(space)
    world.map(space, 3, at=1)
    assert not listener.events


def test_mmap_changes_nothing_when_a_mirror_does_not_answer(world: Any, space: AddressSpace) -> None:
    """Policy FAIL: what was mapped there is back, with its pages."""
    world.map(space, 2, at=0)
    world.run(write_memory(space, at(0), b"abc"))
    world.listen(space).state = EventState.ABANDONED
    with pytest.raises(TimedOutError):
        world.map(space, 3, Prot.READ, at=1)
    assert layout(space) == "0-2:rw-p"
    assert world.run(read_memory(space, at(0), 3)).data == b"abc"


def test_mmap_keeps_faults_out_when_it_waits_for_mirrors(world: Any, space: AddressSpace) -> None:
    """A fault on the range waits for the new mapping, as for mmap_lock, and does not find a hole."""
    world.map(space, 2, Prot.READ, at=0)
    world.listen(space)
    fault = touch(space, pages(0, 1), write=True)
    waiting = world.start_meanwhile(fault)
    world.map(space, 1, at=0)
    assert waiting == [WaitFor.EDITS]
    assert world.run(fault).signal is None


def test_mmap_populates_when_asked_to(world: Any, space: AddressSpace) -> None:
    """MAP_POPULATE brings writable private memory in for writing, other memory for reading."""
    populate = MapFlag.POPULATE | MapFlag.FIXED
    world.map(space, 3, flags=ANON | populate, at=0)
    assert world.frames.available == 1020
    world.map(space, 3, Prot.READ, ANON | populate, at=3)
    assert world.frames.available == 1020
    assert space.table.get(at(3))
    world.map(space, 3, flags=ANON | populate | MapFlag.NONBLOCK, at=6)
    assert not space.table.get(at(6))


def test_mmap_succeeds_when_populating_fails(world: Any, space: AddressSpace) -> None:
    """Errors of mm_populate() are nobody's business: no access, behind the end of the file, no memory."""
    world.map(space, 1, Prot.NONE, ANON | MapFlag.POPULATE | MapFlag.FIXED, at=0)
    world.map(space, 2, RW, MapFlag.SHARED | MapFlag.POPULATE | MapFlag.FIXED, world.file(1), at=1)
    world.map(space, 2000, RW, ANON | MapFlag.POPULATE | MapFlag.FIXED, at=3)
    assert layout(space) == "0-1:---p 1-3:rw-s 3-2003:rw-p"
    assert [bool(space.table.get(at(page))) for page in range(4)] == [False, True, False, True]
    assert world.frames.available == 0


def test_mmap_maps_pages_of_a_driver_when_it_is_a_device_file(world: Any, space: AddressSpace) -> None:
    """VM_MIXEDMAP: fresh pages, there at once, which the VMA's kind keeps from merging and from being locked."""
    file = world.device_file(VmFlag.MIXEDMAP | VmFlag.DONTEXPAND)
    world.map(space, 2, flags=MapFlag.SHARED | MapFlag.LOCKED | MapFlag.FIXED, file=file, at=0)
    world.map(space, 2, flags=MapFlag.SHARED | MapFlag.FIXED, file=file, at=2, offset=2)
    assert layout(space) == "0-2:rw-s 2-4:rw-s"
    assert not space.vmas.find(at(0)).has(VmFlag.LOCKED)  # type: ignore[union-attr]
    assert world.frames.available == 1019
    assert world.run(write_memory(space, at(0), b"x")).signal is None


def test_mmap_leaves_a_hole_when_the_driver_finds_no_memory(world: Any, space: AddressSpace) -> None:
    """As when a driver's mmap fails: what MAP_FIXED found is gone, nothing is in its place (ENOMEM)."""
    world.map(space, 4000, Prot.READ)
    with pytest.raises(OutOfFramesError):
        world.map(space, 2000, flags=MapFlag.SHARED | MapFlag.FIXED, file=world.device_file(VmFlag.MIXEDMAP), at=1)
    assert layout(space) == "0-1:r--p 2001-4000:r--p"
    assert world.frames.available == 1023


def test_mmap_waits_when_another_call_has_its_turn(world: Any, space: AddressSpace) -> None:
    """Calls that change VMAs are served one at a time."""
    with space.notifier.turn():
        call = mmap(space, BASE, PAGE_SIZE, RW, ANON)
        assert world.start(call).wait_for is WaitFor.TURN
    world.run(call)
    assert layout(space) == "0-1:rw-p"


@pytest.mark.parametrize(
    ("arguments", "kind", "number"),
    [
        ((BASE, PAGE_SIZE, RW, ANON, None, 5), InvalidRequestError, errno.EINVAL),
        ((BASE, 0, RW, ANON), InvalidRequestError, errno.EINVAL),
        ((BASE, PAGE_SIZE, RW, MapFlag.PRIVATE), NoSuchObjectError, errno.EBADF),
        ((BASE, PAGE_SIZE, RW, MapFlag.ANONYMOUS), InvalidRequestError, errno.EINVAL),
        ((BASE, PAGE_SIZE, RW, MapFlag.ANONYMOUS | MapFlag.SHARED_VALIDATE), InvalidRequestError, errno.EINVAL),
        ((BASE, PAGE_SIZE, RW, MapFlag.ANONYMOUS | MapFlag(8)), InvalidRequestError, errno.EOPNOTSUPP),  # DROPPABLE
        ((BASE, PAGE_SIZE, RW, SHARED_ANON | MapFlag.GROWSDOWN), InvalidRequestError, errno.EINVAL),
        ((BASE, PAGE_SIZE, RW, ANON | MapFlag.HUGETLB), OutOfFramesError, errno.ENOMEM),
        ((BASE + 1, PAGE_SIZE, RW, ANON | MapFlag.FIXED), InvalidRequestError, errno.EINVAL),
        ((PAGE_SIZE, PAGE_SIZE, RW, ANON | MapFlag.FIXED), AccessDeniedError, errno.EPERM),
        ((0, (1 << 64) - 1, RW, ANON), OutOfFramesError, errno.ENOMEM),
        ((TASK_SIZE, PAGE_SIZE, RW, ANON | MapFlag.FIXED), OutOfFramesError, errno.ENOMEM),
        ((BASE, 2 * PAGE_SIZE, RW, ANON | MapFlag.FIXED_NOREPLACE), ConflictError, errno.EEXIST),
    ],
)
def test_mmap_fails_when_the_request_is_wrong(
    world: Any, space: AddressSpace, arguments: tuple[Any, ...], kind: type[HmmError], number: int
) -> None:
    """The kernel's errno, and nothing changed; that the kind of mapping is wrong is found after the address."""
    world.map(space, 1, at=1)
    with pytest.raises(kind) as error:
        world.run(mmap(space, *arguments))
    assert error.value.errno == number
    assert layout(space) == "1-2:rw-p"
    assert not space.notifier.turns


@pytest.mark.parametrize(
    ("flags", "offset", "number"),
    [
        (MapFlag.SHARED_VALIDATE | MapFlag.SYNC, 0, errno.EOPNOTSUPP),
        (MapFlag.SHARED_VALIDATE | MapFlag.FIXED_NOREPLACE, 0, errno.EOPNOTSUPP),
        (MapFlag.SHARED | MapFlag.HUGETLB, 0, errno.EINVAL),
        (MapFlag.SHARED | MapFlag.GROWSDOWN, 0, errno.EINVAL),
        (MapFlag.PRIVATE | MapFlag.GROWSDOWN, 0, errno.EINVAL),
        (MapFlag(0), 0, errno.EINVAL),
        (MapFlag.PRIVATE, (1 << 63) - PAGE_SIZE, errno.EOVERFLOW),
    ],
)
def test_mmap_fails_when_a_file_is_not_mapped_like_that(
    world: Any, space: AddressSpace, flags: MapFlag, offset: int, number: int
) -> None:
    """do_mmap() for files; file_mmap_ok()."""
    with pytest.raises(InvalidRequestError) as error:
        world.run(mmap(space, BASE, PAGE_SIZE, RW, flags, world.file(4), offset))
    assert error.value.errno == number
    assert not len(space.vmas)


def test_mmap_accepts_unknown_flags_when_the_mapping_is_shared_the_old_way(world: Any, space: AddressSpace) -> None:
    """MAP_SHARED ignores what MAP_SHARED_VALIDATE refuses, and a device file has no end."""
    file = world.file(4)
    world.run(mmap(space, BASE, PAGE_SIZE, RW, MapFlag.SHARED | MapFlag(0x200_0000) | MapFlag.FIXED_NOREPLACE, file))
    world.run(mmap(space, at(1), PAGE_SIZE, RW, MapFlag.SHARED_VALIDATE | MapFlag.POPULATE, file))
    device = world.device_file(VmFlag.MIXEDMAP)
    world.run(mmap(space, at(2), PAGE_SIZE, RW, MapFlag.PRIVATE, device, (1 << 63) - PAGE_SIZE))
    assert layout(space) == "0-1:rw-s 1-2:rw-s 2-3:rw-p"


def test_mmap_fails_when_there_are_too_many_vmas(world: Any) -> None:
    """map_count may go one above its limit, which the next mapping is refused for (ENOMEM)."""
    space = world.space(vmas=2)
    for number in range(3):
        world.map(space, 1, at=2 * number)
    with pytest.raises(OutOfFramesError) as error:
        world.map(space, 1, at=8)
    assert error.value.errno == errno.ENOMEM
    assert len(space.vmas) == 3


def test_mmap_fails_when_the_address_space_is_limited(world: Any) -> None:
    """RLIMIT_AS counts what is mapped; what a fixed mapping replaces is not counted twice."""
    space = world.space(address_bytes=4 * PAGE_SIZE)
    world.map(space, 3, at=0)
    world.map(space, 3, Prot.READ, at=1)
    with pytest.raises(OutOfFramesError) as error:
        world.map(space, 1, at=8)
    assert error.value.errno == errno.ENOMEM
    assert layout(space) == "0-1:rw-p 1-4:r--p"


def test_mmap_leaves_the_cuts_of_what_it_would_have_replaced_when_the_address_space_is_limited(world: Any) -> None:
    """__mmap_region() gathers what is to go before may_expand_vm(), and reattach_vmas() joins nothing: 6.12.117."""
    space = world.space(address_bytes=6 * PAGE_SIZE)
    world.map(space, 6)
    world.run(touch(space, pages(0, 6), write=True))
    listener = world.listen(space)
    with pytest.raises(OutOfFramesError):
        world.map(space, 6, Prot.READ, at=2)
    assert layout(space) == "0-2:rw-p 2-6:rw-p"
    space.limits = replace(space.limits, address_bytes=5 * PAGE_SIZE)
    with pytest.raises(OutOfFramesError):
        world.map(space, 1, Prot.READ, at=3)
    assert layout(space) == "0-2:rw-p 2-3:rw-p 3-4:rw-p 4-6:rw-p"
    assert not listener.events
    assert world.frames.available == 1017


# ---- munmap


def test_munmap_removes_the_range_when_it_is_mapped(world: Any, space: AddressSpace) -> None:
    """VMAs are cut, entries and frames go, one event covers the whole request."""
    world.map(space, 6)
    world.run(touch(space, pages(0, 6), write=True))
    listener = world.listen(space)
    assert world.run(munmap(space, at(2), 2 * PAGE_SIZE - 1)) == 0
    assert layout(space) == "0-2:rw-p 4-6:rw-p"
    assert world.frames.available == 1019
    assert [(event.cause, event.spans) for event in listener.events] == [(Cause.MUNMAP, (pages(2, 4),))]
    assert world.run(touch(space, pages(2, 3), write=False)).signal is Signal.SEGV_MAPERR


def test_munmap_succeeds_when_nothing_is_mapped(world: Any, space: AddressSpace) -> None:
    """0, and nobody hears of it."""
    listener = world.listen(space)
    assert world.run(munmap(space, at(2), PAGE_SIZE)) == 0
    assert not listener.events


def test_munmap_keeps_pages_until_mirrors_have_answered(world: Any, space: AddressSpace) -> None:
    """The VMA goes first, the pages after the last answer."""
    world.map(space, 1)
    world.run(write_memory(space, at(0), b"x"))
    world.listen(space)
    seen = []
    world.meanwhile = lambda: seen.append((len(space.vmas), space.table.get(at(0)) != 0, world.frames.available))
    world.run(munmap(space, at(0), PAGE_SIZE))
    assert seen == [(0, True, 1022)]
    assert world.frames.available == 1023


def test_munmap_changes_nothing_when_a_mirror_does_not_answer(world: Any, space: AddressSpace) -> None:
    """Policy FAIL."""
    world.map(space, 4)
    world.run(write_memory(space, at(0), b"abc"))
    world.listen(space).state = EventState.ABANDONED
    with pytest.raises(TimedOutError):
        world.run(munmap(space, at(0), 2 * PAGE_SIZE))
    assert layout(space) == "0-4:rw-p"
    assert world.run(read_memory(space, at(0), 3)).data == b"abc"


def test_munmap_lets_go_of_the_file_when_it_was_the_last_user(world: Any, space: AddressSpace) -> None:
    """The pages of a closed file live until the last mapping of it is gone."""
    file = world.file(2)
    world.map(space, 2, flags=MapFlag.SHARED | MapFlag.FIXED, file=file)
    world.run(touch(space, pages(0, 2), write=True))
    file.close()
    world.run(munmap(space, at(0), PAGE_SIZE))
    assert world.frames.available == 1021
    world.run(munmap(space, at(1), PAGE_SIZE))
    assert world.frames.available == 1023


@pytest.mark.parametrize(
    ("start", "length"),
    [(BASE, 0), (BASE + 1, PAGE_SIZE), (TASK_SIZE + PAGE_SIZE, PAGE_SIZE), (BASE, TASK_SIZE), (BASE, (1 << 64) - 1)],
)
def test_munmap_fails_when_the_range_is_none(world: Any, space: AddressSpace, start: int, length: int) -> None:
    """EINVAL before anything is looked at."""
    world.map(space, 1)
    with pytest.raises(InvalidRequestError) as error:
        world.run(munmap(space, start, length))
    assert error.value.errno == errno.EINVAL
    assert layout(space) == "0-1:rw-p"


def test_munmap_fails_when_a_hole_would_make_one_vma_too_many(world: Any) -> None:
    """map_count: cutting off an end is possible at the limit, a hole is not (ENOMEM)."""
    space = world.space(vmas=1)
    world.map(space, 5)
    with pytest.raises(OutOfFramesError) as error:
        world.run(munmap(space, at(2), PAGE_SIZE))
    assert error.value.errno == errno.ENOMEM
    world.run(munmap(space, at(0), PAGE_SIZE))
    world.run(munmap(space, at(4), PAGE_SIZE))
    assert layout(space) == "1-4:rw-p"


def test_munmap_pauses_when_there_is_much_to_drop(world: Any, space: AddressSpace) -> None:
    """A long call lets others go first between its pieces, and steps over what is empty."""
    world.map(space, 64 * PIECE_PAGES, Prot.READ)
    for page in (0, 1, 40 * PIECE_PAGES, 63 * PIECE_PAGES):
        world.run(touch(space, pages(page, page + 1), write=False))
    world.run(munmap(space, at(0), 64 * PIECE_PAGES * PAGE_SIZE))
    assert world.pauses == 2
    assert next(space.table.walk(0, TASK_SIZE), None) is None


@pytest.mark.breaks_invariants
def test_munmap_leaves_no_bracket_when_it_is_given_up(world: Any, space: AddressSpace) -> None:
    """An operation that is closed while it waits leaves the queue and the list of invalidations."""
    world.map(space, 2 * PIECE_PAGES, Prot.READ)
    world.run(touch(space, AddressRange(at(0), at(2 * PIECE_PAGES)), write=False))
    call = munmap(space, at(0), 2 * PIECE_PAGES * PAGE_SIZE)
    assert isinstance(next(call), Pause)
    call.close()
    assert not space.notifier.turns
    assert not space.notifier.invalidations


# ---- brk


@pytest.fixture
def heap(space: AddressSpace) -> AddressSpace:
    """A space whose heap begins at BASE."""
    space.brk_start = space.brk_end = BASE
    return space


def test_brk_tells_the_break_when_asked_for_nothing(world: Any, heap: AddressSpace) -> None:
    """brk(0), and any address below the start of the heap."""
    assert world.run(brk(heap, 0)) == BASE
    assert world.run(brk(heap, BASE - 1)) == BASE


def test_brk_grows_the_heap_when_there_is_room(world: Any, heap: AddressSpace) -> None:
    """The break is kept to the byte, the VMA to the page."""
    assert world.run(brk(heap, at(1) + 5)) == at(1) + 5
    assert layout(heap) == "0-2:rw-p"
    assert world.run(brk(heap, at(1) + 9)) == at(1) + 9
    assert world.run(brk(heap, at(5))) == at(5)
    assert layout(heap) == "0-5:rw-p"
    assert heap.vmas.find(BASE).has(VmFlag.ACCOUNT)  # type: ignore[union-attr]


def test_brk_does_not_merge_when_a_mapping_ends_where_the_heap_begins(world: Any, heap: AddressSpace) -> None:
    """vma_prev_limit(start_brk): the first piece of heap is a VMA of its own, later ones continue it."""
    heap.vmas.assign(pages(-1, 0), Mapping(VmFlag.READ | VmFlag.WRITE | MAY_FLAGS | VmFlag.ACCOUNT))
    world.run(brk(heap, at(1)))
    world.run(brk(heap, at(2)))
    assert layout(heap) == "-1-0:rw-p 0-2:rw-p"


def test_brk_shrinks_the_heap_when_it_goes_back(world: Any, heap: AddressSpace) -> None:
    """An unmapping like any other; back to the start and forth again gives zeroes."""
    world.run(brk(heap, at(4)))
    world.run(write_memory(heap, at(2), b"x"))
    listener = world.listen(heap)
    assert world.run(brk(heap, at(1) + 1)) == at(1) + 1
    assert layout(heap) == "0-2:rw-p"
    assert [(event.cause, event.spans) for event in listener.events] == [(Cause.MUNMAP, (pages(2, 4),))]
    world.run(brk(heap, at(4)))
    assert world.run(read_memory(heap, at(2), 1)).data == b"\0"
    assert world.run(brk(heap, BASE)) == BASE
    assert not len(heap.vmas)


def test_brk_stays_when_a_mirror_does_not_answer(world: Any, heap: AddressSpace) -> None:
    """Policy FAIL: break and heap are what they were."""
    world.run(brk(heap, at(4)))
    world.listen(heap).state = EventState.ABANDONED
    with pytest.raises(TimedOutError):
        world.run(brk(heap, at(1)))
    assert heap.brk_end == at(4)
    assert layout(heap) == "0-4:rw-p"


def test_brk_stays_when_the_heap_was_unmapped(world: Any, heap: AddressSpace) -> None:
    """Shrinking finds nothing to unmap, growing begins a new VMA."""
    world.run(brk(heap, at(4)))
    world.run(munmap(heap, at(2), 2 * PAGE_SIZE))
    assert world.run(brk(heap, at(3))) == at(4)
    assert world.run(brk(heap, at(5))) == at(5)
    assert layout(heap) == "0-2:rw-p 4-5:rw-p"


@pytest.mark.parametrize(
    ("first", "flags", "fits"),
    [
        (3, VmFlag.NONE, 2),
        (STACK_GUARD_GAP // PAGE_SIZE + 3, VmFlag.GROWSDOWN, 2),
    ],
)
def test_brk_stays_when_something_is_in_the_way(
    world: Any, heap: AddressSpace, first: int, flags: VmFlag, fits: int
) -> None:
    """One page is kept free below the next mapping, and the guard gap below a stack."""
    heap.vmas.assign(pages(first, first + 1), Mapping(VmFlag.READ | flags))
    assert world.run(brk(heap, at(fits + 1))) == BASE
    assert world.run(brk(heap, at(fits))) == at(fits)


def test_brk_stays_when_a_limit_is_reached(world: Any) -> None:
    """The end of the address space, RLIMIT_AS, the number of VMAs: brk does not fail, it does not move."""
    limited = world.space(address_bytes=2 * PAGE_SIZE)
    crowded = world.space(vmas=0)
    crowded.vmas.assign(pages(8, 9), Mapping(VmFlag.READ))
    for space in (limited, crowded):
        space.brk_start = space.brk_end = BASE
    assert world.run(brk(limited, at(3))) == BASE
    assert world.run(brk(limited, at(2))) == at(2)
    assert world.run(brk(limited, TASK_SIZE + 1)) == at(2)
    assert world.run(brk(crowded, at(1))) == BASE


def test_brk_stays_when_shrinking_would_cut_one_vma_too_many(world: Any) -> None:
    """What is mapped at the end of the heap has become one VMA with it; do_vmi_align_munmap() fails: goto out."""
    space = world.space(vmas=1)
    space.brk_start = space.brk_end = BASE
    world.run(brk(space, at(4)))
    heap = space.vmas.find(BASE)
    assert heap is not None
    space.vmas.assign(pages(4, 6), heap.mapping)
    assert world.run(brk(space, at(2))) == at(4)
    assert layout(space) == "0-6:rw-p"
    assert world.run(brk(space, BASE)) == BASE
    assert layout(space) == "4-6:rw-p"


def test_brk_brings_pages_in_when_future_memory_is_locked(world: Any, heap: AddressSpace) -> None:
    """mlockall(MCL_FUTURE) holds for the heap."""
    heap.default_flags = VmFlag.LOCKED
    world.run(brk(heap, at(3)))
    assert world.frames.available == 1020


def test_mmap_does_not_align_when_the_file_kind_says_so(world: Any, space: AddressSpace) -> None:
    """A shared-memory object is mapped where there is room, not where its huge pages would be."""
    file = world.file(1024, FileKind.SHARED_MEMORY)
    assert world.run(mmap(space, 0, 1024 * PAGE_SIZE, RW, MapFlag.SHARED, file)) == MMAP_BASE - 1024 * PAGE_SIZE
