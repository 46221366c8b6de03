"""The mlock family, and the population of locked memory."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest
from area import BASE, RW, SHARED, at

from hmm.address_space import AddressSpace
from hmm.cpu_access import touch
from hmm.errors import BadAddressError, HmmError, InvalidRequestError, OutOfFramesError, RangeBusyError
from hmm.mlock import MclFlag, MlockFlag, mlock, mlock2, mlockall, munlock, munlockall
from hmm.operation import Operation
from hmm.populate import populate
from hmm.units import PAGE_SIZE, AddressRange
from hmm.vma import MAY_FLAGS, Mapping, Prot, VmFlag

FREE = 1023


def locks(space: AddressSpace) -> str:
    """Pages and locks of every VMA: L locked, F locked on fault, - neither; such as "0-3:L"."""
    letters = {VmFlag.NONE: "-", VmFlag.LOCKED: "L", VmFlag.LOCKED | VmFlag.LOCKONFAULT: "F"}
    return " ".join(
        f"{(vma.start - BASE) // PAGE_SIZE}-{(vma.end - BASE) // PAGE_SIZE}:"
        f"{letters[vma.flags & (VmFlag.LOCKED | VmFlag.LOCKONFAULT)]}"
        for vma in space.vmas
    )


# ---- ranges


def test_mlock_brings_the_range_in(world: Any, space: AddressSpace) -> None:
    """The pages that the bytes touch; the VMA is cut."""
    world.map(space, 4)
    assert world.run(mlock(space, at(1) + 5, PAGE_SIZE)) == 0
    assert locks(space) == "0-1:- 1-3:L 3-4:-"
    assert world.frames.available == FREE - 2


def test_mlock_brings_nothing_in_when_told_to_wait_for_faults(world: Any, space: AddressSpace) -> None:
    """MLOCK_ONFAULT; a plain mlock2 is mlock."""
    world.map(space, 2)
    assert world.run(mlock2(space, at(0), PAGE_SIZE, MlockFlag.ONFAULT)) == 0
    assert world.frames.available == FREE
    assert world.run(mlock2(space, at(1), PAGE_SIZE, 0)) == 0
    assert locks(space) == "0-1:F 1-2:L"
    assert world.frames.available == FREE - 1


def test_munlock_makes_the_vma_whole_again(world: Any, space: AddressSpace) -> None:
    """The pages stay in."""
    world.map(space, 3)
    world.run(touch(space, AddressRange(at(1), at(2)), write=True))
    world.run(mlock(space, at(1), PAGE_SIZE))
    assert world.run(munlock(space, at(0), 2 * PAGE_SIZE)) == 0
    assert locks(space) == "0-3:-"
    assert world.frames.available == FREE - 1


@pytest.mark.parametrize("call", [mlock, munlock])
def test_mlock_does_nothing_when_there_is_no_length(
    world: Any, space: AddressSpace, call: Callable[[AddressSpace, int, int], Operation[int]]
) -> None:
    """0 without a look at the mappings, also when the length rounds to nothing; an unaligned start has a page."""
    assert world.run(call(space, at(0), 0)) == 0
    assert world.run(call(space, at(0), (1 << 64) - 1)) == 0
    with pytest.raises(BadAddressError):
        world.run(call(space, at(0) + 1, 0))


@pytest.mark.parametrize("call", [mlock, munlock])
def test_mlock_fails_when_the_range_ends_nowhere(
    world: Any, space: AddressSpace, call: Callable[[AddressSpace, int, int], Operation[int]]
) -> None:
    """EINVAL."""
    with pytest.raises(InvalidRequestError) as error:
        world.run(call(space, at(0), (1 << 64) - PAGE_SIZE))
    assert error.value.errno == errno.EINVAL


@pytest.mark.parametrize(("first", "locked"), [(1, "0-1:- 1-2:L 3-4:-"), (2, "0-2:- 3-4:-")])
def test_mlock_stops_at_the_hole_when_there_is_one(world: Any, space: AddressSpace, first: int, locked: str) -> None:
    """ENOMEM: what lies below is locked and not brought in."""
    world.map(space, 2, at=0)
    world.map(space, 1, at=3)
    with pytest.raises(BadAddressError) as error:
        world.run(mlock(space, at(first), 3 * PAGE_SIZE))
    assert (error.value.errno, error.value.address) == (errno.ENOMEM, at(2))
    assert locks(space) == locked
    assert world.frames.available == FREE


def test_mlock_fails_when_a_page_cannot_be_brought_in(world: Any, space: AddressSpace) -> None:
    """EFAULT becomes ENOMEM: no access, or behind the end of the file; the lock stays."""
    world.map(space, 1, Prot.NONE, at=0)
    world.map(space, 2, RW, SHARED, world.file(1), at=1)
    for first in (0, 1):
        with pytest.raises(BadAddressError) as error:
            world.run(mlock(space, at(first), 2 * PAGE_SIZE))
        assert error.value.errno == errno.ENOMEM
    assert locks(space) == "0-1:L 1-3:L"


def test_mlock_fails_when_no_frame_is_left(world: Any, space: AddressSpace) -> None:
    """ENOMEM becomes EAGAIN; the lock stays."""
    world.map(space, FREE + 1)
    with pytest.raises(RangeBusyError) as error:
        world.run(mlock(space, at(0), (FREE + 1) * PAGE_SIZE))
    assert error.value.errno == errno.EAGAIN
    assert locks(space) == f"0-{FREE + 1}:L"


def test_mlock_fails_when_there_are_too_many_vmas(world: Any) -> None:
    """ENOMEM of split_vma()."""
    space = world.space(vmas=2)
    world.map(space, 3)
    with pytest.raises(OutOfFramesError) as error:
        world.run(mlock(space, at(1), PAGE_SIZE))
    assert error.value.errno == errno.ENOMEM


def test_mlock_passes_over_special_mappings(world: Any, space: AddressSpace) -> None:
    """mlock_fixup(): a driver's mapping is not locked, and that is no error."""
    world.map(space, 1, RW, SHARED, world.device_file(VmFlag.MIXEDMAP), at=0)
    world.map(space, 1, at=1)
    assert world.run(mlock(space, at(0), 2 * PAGE_SIZE)) == 0
    assert locks(space) == "0-1:- 1-2:L"


def test_mlock2_fails_when_a_flag_is_unknown(world: Any, space: AddressSpace) -> None:
    """EINVAL before anything is looked at."""
    with pytest.raises(InvalidRequestError) as error:
        world.run(mlock2(space, at(0), PAGE_SIZE, 2))
    assert error.value.errno == errno.EINVAL


# ---- everything


def test_mlockall_locks_what_is_mapped(world: Any, space: AddressSpace) -> None:
    """MCL_CURRENT: pages are brought in where they can be; later mappings are not locked."""
    world.map(space, 2, at=0)
    world.map(space, 1, Prot.NONE, at=2)
    assert world.run(mlockall(space, MclFlag.CURRENT)) == 0
    world.map(space, 1, at=4)
    assert locks(space) == "0-2:L 2-3:L 4-5:-"
    assert world.frames.available == FREE - 2
    assert world.run(munlockall(space)) == 0
    assert locks(space) == "0-2:- 2-3:- 4-5:-"


def test_mlockall_locks_what_will_be_mapped(world: Any, space: AddressSpace) -> None:
    """MCL_FUTURE leaves alone what there is; the next call decides anew."""
    world.map(space, 1, at=0)
    world.run(mlockall(space, MclFlag.FUTURE | MclFlag.ONFAULT))
    world.map(space, 1, at=2)
    world.run(mlockall(space, MclFlag.FUTURE))
    world.map(space, 1, at=4)
    assert locks(space) == "0-1:- 2-3:F 4-5:L"
    world.run(munlockall(space))
    world.map(space, 1, at=6)
    assert locks(space) == "0-1:- 2-3:- 4-5:- 6-7:-"


def test_mlockall_brings_nothing_in_when_told_to_wait_for_faults(world: Any, space: AddressSpace) -> None:
    """MCL_CURRENT | MCL_ONFAULT."""
    world.map(space, 1)
    world.run(mlockall(space, MclFlag.CURRENT | MclFlag.ONFAULT))
    assert locks(space) == "0-1:F"
    assert world.frames.available == FREE


@pytest.mark.parametrize("flags", [0, MclFlag.ONFAULT, 8, 9])
def test_mlockall_fails_when_the_flags_are_wrong(world: Any, space: AddressSpace, flags: int) -> None:
    """None, MCL_ONFAULT alone, unknown ones (EINVAL)."""
    with pytest.raises(InvalidRequestError) as error:
        world.run(mlockall(space, flags))
    assert error.value.errno == errno.EINVAL


# ---- population


def test_populate_reads_when_the_mapping_is_shared_or_read_only(world: Any, space: AddressSpace) -> None:
    """Only writable private memory is populated as if it were written; memory that may only be written is too."""
    file = world.file(1)
    world.map(space, 1, RW, SHARED, file, at=0)
    world.map(space, 1, Prot.READ, at=1)
    world.map(space, 1, Prot.WRITE, at=2)
    world.run(populate(space, AddressRange(at(0), at(9)), ignore_errors=False))
    assert space.table.read(at(0), at(3)).all()
    assert world.frames.available == FREE - 2


def test_populate_leaves_registers_out(world: Any, space: AddressSpace) -> None:
    """VM_IO and VM_PFNMAP have nothing to bring in, and holes are no errors."""
    space.vmas.assign(AddressRange(at(0), at(1)), Mapping(VmFlag.READ | VmFlag.IO | MAY_FLAGS, world.file(1)))
    world.map(space, 1, at=2)
    world.run(populate(space, AddressRange(at(0), at(5)), ignore_errors=False))
    assert [bool(entry) for entry in space.table.read(at(0), at(3))] == [False, False, True]


def test_populate_goes_on_with_the_next_vma_when_errors_are_ignored(world: Any, space: AddressSpace) -> None:
    """As mmap and mlockall do; else the first one is raised."""
    world.map(space, 3, RW, SHARED, world.file(2), at=0)
    world.map(space, 1, at=3)
    with pytest.raises(HmmError) as error:
        world.run(populate(space, AddressRange(at(0), at(4)), ignore_errors=False))
    assert error.value.errno == errno.EFAULT
    world.run(populate(space, AddressRange(at(0), at(4))))
    assert [bool(entry) for entry in space.table.read(at(0), at(4))] == [True, True, False, True]
