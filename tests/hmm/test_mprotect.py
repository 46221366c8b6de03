"""mprotect: VMAs, what mirrors hear, and what the entries permit afterwards."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest
from area import BASE, PRIVATE, RW, SHARED, at, layout, pages

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.cpu_access import touch, write_memory
from hmm.errors import (
    AccessDeniedError,
    BadAddressError,
    HmmError,
    InvalidRequestError,
    OutOfFramesError,
    Signal,
    TimedOutError,
)
from hmm.events import Cause, EventState, EventType, Reason
from hmm.mman import MapFlag
from hmm.mprotect import ProtGrow, mprotect
from hmm.operation import WaitFor
from hmm.units import PAGE_SIZE, PIECE_PAGES, AddressRange
from hmm.vma import MAY_FLAGS, Mapping, Prot, VmFlag

GIB = 1 << 30


def entries(space: AddressSpace, first: int, last: int) -> str:
    """A letter per page: w writable, r present, d on a device and writable, D not, x exclusive, . nothing."""
    letters = {
        0: ".",
        cpu_pte.PRESENT: "r",
        cpu_pte.PRESENT | cpu_pte.WRITE: "w",
        cpu_pte.DEVICE: "D",
        cpu_pte.DEVICE | cpu_pte.WRITE: "d",
        cpu_pte.EXCLUSIVE: "x",
    }
    kinds = space.table.read(at(first), at(last)) & np.uint64(
        cpu_pte.PRESENT | cpu_pte.WRITE | cpu_pte.DEVICE | cpu_pte.EXCLUSIVE
    )
    return "".join(letters[kind] for kind in kinds.tolist())


def protect(world: Any, space: AddressSpace, first: int, last: int, prot: int) -> int:
    """mprotect of pages [first, last)."""
    result: int = world.run(mprotect(space, at(first), (last - first) * PAGE_SIZE, prot))
    return result


# ---- VMAs


def test_mprotect_cuts_the_vma_when_the_range_is_inside(world: Any, space: AddressSpace) -> None:
    """And puts it together again when the protection is the same: vma_modify_flags()."""
    world.map(space, 5)
    assert protect(world, space, 1, 3, Prot.READ) == 0
    assert layout(space) == "0-1:rw-p 1-3:r--p 3-5:rw-p"
    protect(world, space, 1, 3, RW)
    assert layout(space) == "0-5:rw-p"


def test_mprotect_crosses_vmas_when_they_touch(world: Any, space: AddressSpace) -> None:
    """Each is changed by itself, and those that become equal become one."""
    world.map(space, 2, at=0)
    world.map(space, 2, Prot.NONE, at=2)
    world.map(space, 2, Prot.READ, at=4)
    protect(world, space, 1, 5, Prot.READ)
    assert layout(space) == "0-1:rw-p 1-6:r--p"


def test_mprotect_rounds_the_length_up(world: Any, space: AddressSpace) -> None:
    """One byte of a page is all of it; no length is nothing."""
    world.map(space, 3)
    assert world.run(mprotect(space, at(0), PAGE_SIZE + 1, Prot.READ)) == 0
    assert layout(space) == "0-2:r--p 2-3:rw-p"
    assert world.run(mprotect(space, at(8), 0, Prot.READ)) == 0


def test_mprotect_accounts_for_memory_when_it_becomes_writable(world: Any, space: AddressSpace) -> None:
    """mprotect_fixup(): VM_ACCOUNT comes with VM_WRITE, and goes with it while nothing was written."""
    world.map(space, 2, Prot.READ)
    protect(world, space, 0, 2, RW)
    assert space.vmas.find(at(0)).has(VmFlag.ACCOUNT)  # type: ignore[union-attr]
    protect(world, space, 0, 2, Prot.READ)
    assert not space.vmas.find(at(0)).has(VmFlag.ACCOUNT)  # type: ignore[union-attr]
    protect(world, space, 0, 2, RW)
    world.run(write_memory(space, at(0), b"x"))
    protect(world, space, 0, 2, Prot.READ)
    assert space.vmas.find(at(0)).has(VmFlag.ACCOUNT)  # type: ignore[union-attr]


def test_mprotect_applies_up_to_the_hole_when_there_is_one(world: Any, space: AddressSpace) -> None:
    """ENOMEM, and what lies below the hole has changed."""
    world.map(space, 2, at=0)
    world.map(space, 2, at=3)
    with pytest.raises(BadAddressError) as error:
        protect(world, space, 1, 5, Prot.READ)
    assert (error.value.errno, error.value.address) == (errno.ENOMEM, at(2))
    assert layout(space) == "0-1:rw-p 1-2:r--p 3-5:rw-p"


@pytest.mark.parametrize("first", [2, 3])
def test_mprotect_changes_nothing_when_it_begins_in_a_hole(world: Any, space: AddressSpace, first: int) -> None:
    """ENOMEM, whether or not something is mapped behind."""
    world.map(space, 2, at=0)
    world.map(space, 2, at=4)
    with pytest.raises(BadAddressError) as error:
        protect(world, space, first, first + 2, Prot.READ)
    assert error.value.errno == errno.ENOMEM
    assert layout(space) == "0-2:rw-p 4-6:rw-p"


def test_mprotect_stops_when_a_mapping_may_never_permit_it(world: Any, space: AddressSpace) -> None:
    """EACCES for what VM_MAYWRITE forbids; the VMA below has changed."""
    world.map(space, 1, Prot.READ, at=0)
    flags = VmFlag.READ | VmFlag.MAYREAD | VmFlag.MAYEXEC | VmFlag.MAYSHARE
    space.vmas.assign(pages(1, 2), Mapping(flags, world.file(1)))
    with pytest.raises(AccessDeniedError) as error:
        protect(world, space, 0, 2, RW)
    assert (error.value.errno, error.value.address) == (errno.EACCES, at(1))
    assert layout(space) == "0-1:rw-p 1-2:r--s"
    protect(world, space, 1, 2, Prot.READ | Prot.EXEC)
    assert layout(space) == "0-1:rw-p 1-2:r-xs"


def test_mprotect_stops_when_there_are_too_many_vmas(world: Any) -> None:
    """ENOMEM of split_vma(): a VMA cut at its start stays cut, and nothing is protected."""
    space = world.space(vmas=3)
    world.map(space, 1, Prot.READ, at=8)
    world.map(space, 4, at=0)
    with pytest.raises(OutOfFramesError) as error:
        protect(world, space, 1, 3, Prot.READ)
    assert error.value.errno == errno.ENOMEM
    assert layout(space) == "0-1:rw-p 1-4:rw-p 8-9:r--p"
    protect(world, space, 0, 1, Prot.READ)
    assert layout(space) == "0-1:r--p 1-4:rw-p 8-9:r--p"
    with pytest.raises(OutOfFramesError):
        protect(world, space, 2, 4, Prot.READ)
    assert layout(space) == "0-1:r--p 1-4:rw-p 8-9:r--p"
    protect(world, space, 1, 2, Prot.READ)
    assert layout(space) == "0-2:r--p 2-4:rw-p 8-9:r--p"


def test_mprotect_leaves_a_vma_where_the_reverse_map_has_it_when_it_may_not_be_cut(world: Any) -> None:
    """split_vma() looks at sysctl_max_map_count before anything is taken out of a tree: vma_prepare() comes later."""
    space = world.space(vmas=3)
    for page in (0, 5, 10):
        world.map(space, 4, at=page)
    before = [(vma.inserted, vma.chained) for vma in space.vmas]
    for first, last in ((5, 7), (6, 8), (7, 9)):
        with pytest.raises(OutOfFramesError):
            protect(world, space, first, last, Prot.READ)
    assert [(vma.inserted, vma.chained) for vma in space.vmas] == before
    assert layout(space) == "0-4:rw-p 5-9:rw-p 10-14:rw-p"


@pytest.mark.parametrize(
    ("start", "length", "prot", "kind", "number"),
    [
        (BASE + 1, PAGE_SIZE, Prot.READ, InvalidRequestError, errno.EINVAL),
        (BASE, PAGE_SIZE, 0x10, InvalidRequestError, errno.EINVAL),
        (BASE, PAGE_SIZE, ProtGrow.DOWN | ProtGrow.UP, InvalidRequestError, errno.EINVAL),
        (BASE, PAGE_SIZE, ProtGrow.UP, InvalidRequestError, errno.EINVAL),
        (BASE, PAGE_SIZE, ProtGrow.DOWN, InvalidRequestError, errno.EINVAL),
        (BASE, (1 << 64) - 1, Prot.READ, BadAddressError, errno.ENOMEM),
        (BASE, (1 << 64) - 1, 0x10, BadAddressError, errno.ENOMEM),
    ],
)
def test_mprotect_fails_when_the_request_is_wrong(
    world: Any, space: AddressSpace, start: int, length: int, prot: int, kind: type[HmmError], number: int
) -> None:
    """The errors of do_mprotect_pkey(), in its order."""
    world.map(space, 2)
    with pytest.raises(kind) as error:
        world.run(mprotect(space, start, length, prot))
    assert error.value.errno == number
    assert layout(space) == "0-2:rw-p"


def test_mprotect_accepts_prot_sem(world: Any, space: AddressSpace) -> None:
    """PROT_SEM is known and means nothing."""
    world.map(space, 2)
    protect(world, space, 0, 2, Prot.READ | 0x8)
    assert layout(space) == "0-2:r--p"


def test_mprotect_begins_at_the_stack_when_it_is_to_grow_down(world: Any, space: AddressSpace) -> None:
    """PROT_GROWSDOWN: from the start of the VMA on, if it is one that grows."""
    world.map(space, 4, flags=PRIVATE | MapFlag.GROWSDOWN, at=2)
    protect(world, space, 4, 5, Prot.READ | ProtGrow.DOWN)
    assert layout(space) == "2-5:r--p 5-6:rw-p"
    protect(world, space, 0, 6, RW | ProtGrow.DOWN)
    assert layout(space) == "2-6:rw-p"


# ---- entries


def test_mprotect_takes_write_access_when_it_is_no_longer_permitted(world: Any, space: AddressSpace) -> None:
    """RW to R: no writable entry stays, and a write is SEGV_ACCERR."""
    world.map(space, 4)
    world.run(touch(space, pages(0, 2), write=True))
    world.run(touch(space, pages(2, 3), write=False))
    assert entries(space, 0, 4) == "wwr."
    protect(world, space, 0, 4, Prot.READ)
    assert entries(space, 0, 4) == "rrr."
    assert world.run(touch(space, pages(0, 1), write=True)).signal is Signal.SEGV_ACCERR


def test_mprotect_gives_write_access_back_when_the_page_is_exclusive(world: Any, space: AddressSpace) -> None:
    """R to RW: private pages that nobody shares at once, the zero page and pages shared by fork not."""
    world.map(space, 4)
    world.run(touch(space, pages(0, 2), write=True))
    world.fork(space)
    world.run(touch(space, pages(1, 3), write=True))
    world.run(touch(space, pages(3, 4), write=False))
    protect(world, space, 0, 4, Prot.READ)
    assert entries(space, 0, 4) == "rrrr"
    protect(world, space, 0, 4, RW)
    assert entries(space, 0, 4) == "rwwr"


def test_mprotect_gives_write_access_back_when_the_mapping_is_shared(world: Any, space: AddressSpace) -> None:
    """vm_page_prot of shared memory permits writing; a private mapping's page of the file is nobody's own."""
    file = world.file(4)
    world.map(space, 2, Prot.READ, SHARED, file, at=0)
    world.map(space, 2, Prot.READ, PRIVATE, file, at=2, offset=2)
    world.run(touch(space, pages(0, 4), write=False))
    protect(world, space, 0, 4, RW)
    assert entries(space, 0, 4) == "wwrr"
    protect(world, space, 0, 4, Prot.NONE)
    assert entries(space, 0, 4) == "rrrr"
    assert world.run(touch(space, pages(0, 1), write=False)).signal is Signal.SEGV_ACCERR


@pytest.mark.parametrize("prot", [Prot.READ, RW | Prot.EXEC, Prot.NONE])
def test_mprotect_makes_device_pages_read_only_when_anything_changes(
    world: Any, space: AddressSpace, prot: Prot
) -> None:
    """change_pte_range(): a writable device-private entry becomes readable for good, an exclusive one stays."""
    world.map(space, 4)
    space.table.set(at(0), cpu_pte.cpu_entry(7, cpu_pte.DEVICE | cpu_pte.WRITE))
    space.table.set(at(1), cpu_pte.cpu_entry(8, cpu_pte.DEVICE))
    space.table.set(at(2), cpu_pte.cpu_entry(9, cpu_pte.EXCLUSIVE))
    protect(world, space, 0, 4, prot)
    assert entries(space, 0, 4) == "DDx."
    protect(world, space, 0, 4, RW)
    assert entries(space, 0, 4) == "DDx."


def test_mprotect_leaves_everything_when_nothing_changes(world: Any, space: AddressSpace) -> None:
    """The same protection again: no event, and device pages stay writable."""
    world.map(space, 2)
    space.table.set(at(0), cpu_pte.cpu_entry(7, cpu_pte.DEVICE | cpu_pte.WRITE))
    listener = world.listen(space)
    protect(world, space, 0, 2, RW)
    assert entries(space, 0, 2) == "d."
    assert not listener.events


def test_mprotect_copies_locked_pages_when_they_become_writable(world: Any, space: AddressSpace) -> None:
    """A private locked mapping has its copies made by the call, so that no access faults later."""
    world.map(space, 2, Prot.READ, PRIVATE | MapFlag.LOCKED, world.file(2))
    assert entries(space, 0, 2) == "rr"
    protect(world, space, 0, 1, RW)
    assert entries(space, 0, 2) == "wr"


# ---- events


@pytest.mark.parametrize(
    ("prot", "cause", "etype"),
    [
        (Prot.NONE, Cause.MPROTECT_NONE, EventType.MUNMAP),
        (Prot.WRITE, Cause.MPROTECT_NONE, EventType.MUNMAP),
        (Prot.READ, Cause.MPROTECT_READ, EventType.WRITE_PROTECT),
        (Prot.READ | Prot.EXEC, Cause.MPROTECT_READ, EventType.WRITE_PROTECT),
    ],
)
def test_mprotect_tells_mirrors_when_it_takes_access(
    world: Any, space: AddressSpace, prot: Prot, cause: Cause, etype: EventType
) -> None:
    """2015: unmapped when nothing can be read, else write-protected; today always PROTECTION_VMA."""
    world.map(space, 3)
    world.run(touch(space, pages(0, 3), write=True))
    listener = world.listen(space)
    protect(world, space, 0, 2, prot)
    (event,) = listener.events
    assert (event.cause, event.etype, event.reason) == (cause, etype, Reason.PROTECTION_VMA)
    assert event.spans == (pages(0, 2),)


def test_mprotect_tells_nobody_in_the_old_way_when_it_gives_access(world: Any, space: AddressSpace) -> None:
    """An upgrade is no event of 2015: EventType.NONE, with today's reason."""
    world.map(space, 2, Prot.READ)
    world.run(touch(space, pages(0, 2), write=False))
    listener = world.listen(space)
    protect(world, space, 0, 2, RW)
    assert not listener.events
    assert Cause.MPROTECT_WRITE.told.reason is Reason.PROTECTION_VMA


def test_mprotect_tells_once_when_several_vmas_change(world: Any, space: AddressSpace) -> None:
    """One event with the parts that really changed and have page tables."""
    world.map(space, 2, at=0)
    world.map(space, 2, Prot.READ, at=2)
    world.map(space, 2, Prot.READ | Prot.EXEC, at=4)
    world.run(touch(space, pages(0, 6), write=False))
    listener = world.listen(space)
    protect(world, space, 0, 6, Prot.READ)
    assert [event.spans for event in listener.events] == [(pages(0, 2), pages(4, 6))]


def test_mprotect_tells_nobody_when_no_page_was_touched(world: Any, space: AddressSpace) -> None:
    """change_pud_range() says nothing of a range whose tables do not exist."""
    world.map(space, 2)
    listener = world.listen(space)
    protect(world, space, 0, 2, Prot.READ)
    assert not listener.events
    assert layout(space) == "0-2:r--p"


def test_mprotect_tells_of_untouched_pages_when_their_gibibyte_has_tables(world: Any, space: AddressSpace) -> None:
    """change_pud_range() asks whether the table of 1 GiB exists, whatever it holds of the range."""
    world.map(space, 2)
    world.map(space, 1, at=9)
    world.run(touch(space, pages(9, 10), write=False))
    listener = world.listen(space)
    protect(world, space, 0, 2, Prot.READ)
    assert [event.spans for event in listener.events] == [(pages(0, 2),)]


def test_mprotect_tells_from_the_first_populated_gibibyte_on(world: Any, space: AddressSpace) -> None:
    """The event begins at the first table of 1 GiB that exists and ends with the range."""
    npages = 4 * GIB // PAGE_SIZE
    world.map(space, npages)
    page = (2 * GIB + 5 * PAGE_SIZE) // PAGE_SIZE
    world.run(touch(space, pages(page, page + 1), write=True))
    listener = world.listen(space)
    protect(world, space, 0, npages, Prot.READ)
    assert [event.spans for event in listener.events] == [(AddressRange(BASE + 2 * GIB, BASE + 4 * GIB),)]


def test_mprotect_tells_of_what_changed_when_it_fails_later(world: Any, space: AddressSpace) -> None:
    """The part below the hole has changed, so its mirrors hear of it before the call fails."""
    world.map(space, 2)
    world.run(touch(space, pages(0, 2), write=True))
    listener = world.listen(space)
    with pytest.raises(BadAddressError):
        protect(world, space, 0, 4, Prot.READ)
    assert [event.spans for event in listener.events] == [(pages(0, 2),)]
    assert entries(space, 0, 2) == "rr"


def test_mprotect_changes_nothing_when_a_mirror_does_not_answer(world: Any, space: AddressSpace) -> None:
    """Policy FAIL: protection and entries are what they were."""
    world.map(space, 4)
    world.run(touch(space, pages(0, 4), write=True))
    world.listen(space).state = EventState.ABANDONED
    with pytest.raises(TimedOutError):
        protect(world, space, 1, 3, Prot.READ)
    assert layout(space) == "0-4:rw-p"
    assert entries(space, 0, 4) == "wwww"


def test_mprotect_keeps_faults_out_when_it_waits_for_mirrors(world: Any, space: AddressSpace) -> None:
    """Between the change of the VMA and that of the entries nobody touches the range."""
    world.map(space, 2)
    world.run(touch(space, pages(0, 2), write=True))
    world.listen(space)
    fault = touch(space, pages(0, 1), write=True)
    waiting = world.start_meanwhile(fault)
    protect(world, space, 0, 1, Prot.READ)
    assert waiting == [WaitFor.EDITS]
    assert world.run(fault).signal is Signal.SEGV_ACCERR


def test_mprotect_pauses_when_there_is_much_to_change(world: Any, space: AddressSpace) -> None:
    """A long call lets others go first between its pieces."""
    npages = 3 * PIECE_PAGES
    world.map(space, npages, Prot.READ)
    world.run(touch(space, pages(0, npages), write=False))
    paused = world.pauses
    protect(world, space, 0, npages, Prot.NONE)
    assert world.pauses == paused + 2


def test_mprotect_keeps_the_flags_that_are_not_about_access(world: Any, space: AddressSpace) -> None:
    """Only VM_ACCESS_FLAGS change."""
    world.map(space, 1, flags=PRIVATE | MapFlag.STACK | MapFlag.NORESERVE)
    protect(world, space, 0, 1, Prot.EXEC)
    (vma,) = space.vmas
    assert vma.flags == VmFlag.EXEC | MAY_FLAGS | VmFlag.NOHUGEPAGE | VmFlag.NORESERVE
