"""Userfaultfds: who waits for a missing page, what its handler may do, and what becomes of registrations.

What is said of errors, cuts and moves was tried on Linux 6.18 as well.
"""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest
from machine_world import FIXED, NOBODY, RW, START, World, error_of, span

from hmm import commands_device, commands_file, commands_hmm, cpu_pte, inspection
from hmm import commands_process as processes
from hmm import commands_userfaultfd as uffd
from hmm.address_space import Thp
from hmm.errors import HmmError, Signal
from hmm.journal import digest, replay
from hmm.limits import Limits
from hmm.local import Local
from hmm.machine import Machine
from hmm.madvise import Advice
from hmm.mirror import DeadlinePolicy
from hmm.mremap import MremapFlag
from hmm.operation_record import Caller, OperationRecord
from hmm.range_fault import REQ_FAULT, VALID
from hmm.semantics import LINUX_6_12, LINUX_7, Semantics
from hmm.smaps import vm_flag_letters
from hmm.uffdio import IOCTL_CONTINUE, IOCTLS, CopyMode, Filled, RegisterMode
from hmm.units import PAGE_SIZE, PMD_SIZE, AddressRange
from hmm.unmapped_area import MapFlag
from hmm.userfaultfd import UserfaultFeature
from hmm.vma import Prot, VmFlag

SHARED = MapFlag.SHARED | MapFlag.ANONYMOUS | MapFlag.FIXED


class Town(World):
    """A process with sixteen private pages, and a userfaultfd that serves some of them.

    Attributes:
        file: what is mapped there instead, in some tests.
    """

    file: int

    def __init__(self, registered: tuple[int, int] = (0, 16), features: int = 0) -> None:
        super().__init__(mirrors=0)
        self.fd = self.do(uffd.create_userfaultfd, self.pid, features)
        if registered[1]:
            assert self.do(uffd.uffd_register, self.fd, span(*registered), 1) == IOCTLS

    @property
    def space(self) -> Any:
        """The process's address space."""
        return self.machine.processes[self.pid].space

    def touch(self, first: int, npages: int = 1, *, write: bool = False) -> OperationRecord[Any]:
        """Begin to touch pages."""
        record = self.start(processes.touch, self.pid, span(first, npages), write=write)
        self.settle()
        return record

    def faults(self) -> list[tuple[int, int, bool]]:
        """What the handler reads: page, pages in a row, whether it is a write."""
        messages = self.do(uffd.read_userfaults, self.fd, 16)
        return [((message.address - START) // PAGE_SIZE, message.npages, message.write) for message in messages]

    def copy(self, first: int, text: str, mode: int = 0) -> Filled:
        """UFFDIO_COPY: a page of each letter."""
        data = b"".join(letter.encode() * PAGE_SIZE for letter in text)
        filled: Filled = self.do(uffd.uffd_copy, self.fd, span(first).start, data, mode)
        return filled

    def zero(self, first: int, npages: int = 1) -> Filled:
        """UFFDIO_ZEROPAGE."""
        filled: Filled = self.do(uffd.uffd_zeropage, self.fd, span(first, npages))
        return filled

    def read(self, first: int, length: int = 1) -> bytes:
        """What the CPU reads of pages that are there."""
        data: bytes = self.do(processes.read_memory, self.pid, span(first).start, length).data
        return data

    def layout(self) -> str:
        """What is mapped, by pages; a star marks what is registered."""
        return " ".join(
            f"{(vma.start - START) // PAGE_SIZE}-{(vma.end - START) // PAGE_SIZE}" + "*" * (vma.mapping.userfaultfd > 0)
            for vma in self.space.vmas
        )

    def unmap(self, first: int, npages: int = 1) -> None:
        """Munmap pages."""
        self.do(processes.munmap, self.pid, span(first).start, npages * PAGE_SIZE)

    def map_shared(self, npages: int) -> None:
        """Put shared memory over the pages."""
        self.do(processes.mmap, self.pid, START, npages * PAGE_SIZE, RW, SHARED)


@pytest.fixture
def town() -> Town:
    """All sixteen pages are registered."""
    return Town()


def fails(town: World, command: Any, *args: Any, **keywords: Any) -> str:
    """The errno that a call fails with."""
    record = town.start(command, *args, **keywords)
    town.settle()
    return errno.errorcode[error_of(record).errno]


def ends_with(filled: Filled) -> tuple[int, str]:
    """Pages filled, and the errno."""
    return filled.done // PAGE_SIZE, errno.errorcode[filled.error.errno] if filled.error else ""


# ---- waiting


def test_touch_waits_for_the_handler_when_its_page_is_missing(town: Town) -> None:
    """The handler is told once and copies a page; then the touch goes on (fs/userfaultfd.c, handle_userfault())."""
    touch = town.touch(3)
    assert not touch.done
    assert [one.request for one in inspection.pending(town.machine)] == [
        f"the handler of userfaultfd {town.fd} {span(3)}"
    ]
    assert town.faults() == [(3, 1, False)]
    assert town.faults() == []
    assert ends_with(town.copy(3, "a")) == (1, "")
    assert touch.result.done == 1
    assert town.read(3) == b"a"
    town.machine.check()


def test_access_takes_what_is_there_before_it_waits_for_the_next_page(town: Town) -> None:
    """A write of four pages stores in the first, which is there, and is told of by the page that is missing."""
    town.copy(0, "z")
    record = town.start(processes.write_memory, town.pid, START, b"w" * 4 * PAGE_SIZE)
    town.settle()
    assert town.faults() == [(1, 3, True)]
    assert town.read(0) == b"w"
    town.copy(1, "ab")
    assert town.faults() == [(3, 1, True)]
    town.zero(3)
    assert record.result.done == 4 * PAGE_SIZE


def test_faults_of_several_accesses_are_read_oldest_first(town: Town) -> None:
    """They wait each for itself, and are read at most so many at a time (userfaultfd_read())."""
    touches = [town.touch(page, write=page == 5) for page in (9, 5, 7)]
    first = town.do(uffd.read_userfaults, town.fd, 2)
    assert [message.operation_id for message in first] == [touches[0].id, touches[1].id]
    assert town.faults() == [(7, 1, False)]
    town.copy(5, "abcde")
    assert all(touch.done for touch in touches)


def test_wait_goes_on_when_the_handler_wakes_without_a_page(town: Town) -> None:
    """Who is woken faults again, which is news to the handler; other pages' waits are not woken."""
    touch, other = town.touch(3), town.touch(8)
    assert town.faults() == [(3, 1, False), (8, 1, False)]
    town.do(uffd.uffd_wake, town.fd, span(0, 8))
    assert town.faults() == [(3, 1, False)]
    assert not touch.done
    assert not other.done


def test_copy_wakes_nobody_when_it_says_so(town: Town) -> None:
    """UFFDIO_COPY_MODE_DONTWAKE: the page is there and who waits for it sleeps until UFFDIO_WAKE."""
    touch = town.touch(3)
    town.copy(3, "a", CopyMode.DONTWAKE)
    assert not touch.done
    town.do(uffd.uffd_wake, town.fd, span(3))
    assert touch.done


@pytest.mark.parametrize("how", ["unregister", "close"])
def test_wait_ends_with_zeroes_when_nobody_handles_it_any_more(town: Town, how: str) -> None:
    """userfaultfd_unregister() and userfaultfd_release() wake, and the fault is an ordinary one."""
    touch = town.touch(3)
    if how == "close":
        town.do(uffd.close_userfaultfd, town.fd)
    else:
        town.do(uffd.uffd_unregister, town.fd, span(0, 16))
    assert touch.result.done == 1
    assert town.read(3) == b"\0"
    assert town.layout() == "0-16"


def test_wait_outlives_its_mapping_until_the_handler_wakes_it(town: Town) -> None:
    """Munmap wakes nobody; woken, the access finds that nothing is mapped."""
    touch = town.touch(3)
    town.unmap(3)
    assert not touch.done
    assert ends_with(town.copy(3, "a")) == (0, "ENOENT")
    town.do(uffd.uffd_wake, town.fd, span(3))
    assert touch.result.signal is Signal.SEGV_MAPERR


def test_wait_ends_when_the_process_exits(town: Town) -> None:
    """What waits is as dead as its process; the userfaultfd is still there to be closed, and good for nothing else."""
    touch = town.touch(3)
    town.do(processes.exit_process, town.pid)
    assert error_of(touch).errno == errno.ESRCH
    assert fails(town, uffd.uffd_copy, town.fd, START, bytes(PAGE_SIZE)) == "ESRCH"
    assert fails(town, uffd.uffd_register, town.fd, span(0), 1) == "ENOMEM"
    assert fails(town, uffd.uffd_unregister, town.fd, span(0)) == "ENOMEM"
    town.do(uffd.uffd_wake, town.fd, span(0))
    town.do(uffd.close_userfaultfd, town.fd)
    assert fails(town, uffd.uffd_wake, town.fd, span(0)) == "EBADF"


def test_wait_ends_when_the_process_is_reaped(town: Town) -> None:
    """Process_mrelease() kills it; nothing can be brought in any more (check_stable_address_space())."""
    touch = town.touch(3)
    town.do(processes.process_mrelease, town.pid)
    assert touch.result.signal is Signal.BUS_ADRERR


def test_wait_ends_when_its_caller_is_killed(town: Town) -> None:
    """TASK_KILLABLE: EINTR at once, also if it comes to wait only later."""
    touch = town.touch(3)
    town.machine.kill(touch.id)
    assert error_of(touch).errno == errno.EINTR
    assert town.faults() == []
    later = town.touch(3, 2)
    town.machine.operations[later.id].killed = True
    town.copy(3, "a")
    assert error_of(later).errno == errno.EINTR


def test_page_behind_the_end_of_shared_memory_is_a_signal_and_no_wait(town: Town) -> None:
    """shmem_get_folio_gfp() looks at the size first."""
    town.map_shared(4)
    town.do(uffd.uffd_register, town.fd, span(0, 4), 1)
    town.space.vmas.find(START).backing.size_bytes = 2 * PAGE_SIZE
    touch = town.touch(1, 3)
    assert town.faults() == [(1, 1, False)]
    town.zero(1)
    assert (touch.result.done, touch.result.signal) == (1, Signal.BUS_ADRERR)


def test_access_gets_a_signal_when_the_handler_asked_for_it() -> None:
    """UFFD_FEATURE_SIGBUS: nothing waits and nobody is told."""
    town = Town(features=UserfaultFeature.SIGBUS)
    assert town.touch(0).result.signal is Signal.BUS_ADRERR
    assert town.faults() == []
    town.copy(0, "a")
    assert town.touch(0).result.done == 1


def test_pages_that_are_there_are_not_missing(town: Town) -> None:
    """The zero page is copied on write; DONTNEED makes a page missing again (without EVENT_REMOVE)."""
    town.zero(0)
    assert town.touch(0, write=True).done
    town.do(processes.madvise, town.pid, START, PAGE_SIZE, Advice.DONTNEED)
    assert not town.touch(0).done


def test_anon_vma_is_there_before_a_write_waits(town: Town) -> None:
    """do_anonymous_page() prepares it first for a write, and for a read not at all."""
    town.touch(0)
    assert not town.space.vmas.find(START).anon_vma
    town.touch(1, write=True)
    assert town.space.vmas.find(START).anon_vma


# ---- registering


def test_register_cuts_and_merges_as_mprotect_does() -> None:
    """vma_modify_flags_uffd(): neighbours merge when their userfaultfd is the same."""
    town = Town((4, 4))
    assert town.layout() == "0-4 4-8* 8-16"
    town.do(uffd.uffd_register, town.fd, span(2, 4), 1)
    assert town.layout() == "0-2 2-8* 8-16"
    other = town.do(uffd.create_userfaultfd, town.pid)
    town.do(uffd.uffd_register, other, span(8, 2), 1)
    assert town.layout() == "0-2 2-8* 8-10* 10-16"
    town.do(uffd.uffd_unregister, town.fd, span(0, 6))
    assert town.layout() == "0-6 6-8* 8-10* 10-16"
    town.do(uffd.close_userfaultfd, other)
    town.do(uffd.close_userfaultfd, town.fd)
    assert town.layout() == "0-16"
    town.machine.check()


def test_register_refuses_what_cannot_be_served() -> None:
    """In the order of userfaultfd_register(); nothing is changed."""
    town = Town((0, 0))
    assert fails(town, uffd.uffd_register, town.fd, span(0), 0) == "EINVAL"
    assert fails(town, uffd.uffd_register, town.fd, span(0), 2) == "EINVAL"
    assert fails(town, uffd.uffd_register, town.fd, span(0, 0), 1) == "EINVAL"
    assert fails(town, uffd.uffd_register, town.fd, span(20), 1) == "EINVAL"
    device = town.do(commands_file.open_device_file, "/dev/x", VmFlag.MIXEDMAP)
    town.do(processes.mmap, town.pid, span(15).start, PAGE_SIZE, RW, MapFlag.SHARED | MapFlag.FIXED, device)
    assert fails(town, uffd.uffd_register, town.fd, span(0, 16), 1) == "EINVAL"
    other = town.do(uffd.create_userfaultfd, town.pid)
    town.do(uffd.uffd_register, other, span(8), 1)
    assert fails(town, uffd.uffd_register, town.fd, span(0, 15), 1) == "EBUSY"
    assert town.layout() == "0-8 8-9* 9-15 15-16"
    assert fails(town, uffd.create_userfaultfd, town.pid, 1 << 40) == "EINVAL"


def test_register_leaves_holes_and_protection_alone(town: Town) -> None:
    """A range may have holes, not be one; what no one may access can be registered and filled."""
    town.do(uffd.uffd_unregister, town.fd, span(0, 16))
    town.unmap(3, 2)
    town.do(processes.mprotect, town.pid, span(6).start, 10 * PAGE_SIZE, Prot.NONE)
    town.do(uffd.uffd_register, town.fd, span(0, 16), 1)
    assert town.layout() == "0-3* 5-6* 6-16*"
    assert fails(town, uffd.uffd_register, town.fd, span(3, 2), 1) == "EINVAL"
    assert ends_with(town.copy(6, "a")) == (1, "")
    assert not cpu_pte.is_writable(town.space.table.get(span(6).start))


@pytest.mark.parametrize(("semantics", "outcome"), [(LINUX_6_12, ""), (LINUX_7, "EINVAL")])
def test_unregister_takes_from_others_when_the_kernel_lets_it(semantics: Semantics, outcome: str) -> None:
    """6.12 does not look whose registration it is; later kernels refuse."""
    town = Town()
    town.space.semantics = semantics
    other = town.do(uffd.create_userfaultfd, town.pid)
    touch = town.touch(0)
    record = town.start(uffd.uffd_unregister, other, span(0, 16))
    town.settle()
    assert (errno.errorcode[error_of(record).errno] if record.error else "") == outcome
    assert touch.done == (not outcome)


def test_userfaultfd_is_its_creators_alone(town: Town) -> None:
    """Another token may neither use nor close it."""
    mine = town.do(uffd.create_userfaultfd, town.pid, caller=Caller(token="mine"))
    assert fails(town, uffd.uffd_wake, mine, span(0), caller=Caller(token="yours")) == "EPERM"
    assert fails(town, uffd.close_userfaultfd, mine, caller=NOBODY) == "EPERM"


# ---- filling


def test_copy_stops_at_the_first_page_that_it_cannot_fill(town: Town) -> None:
    """mfill_atomic(): what lies before is filled and woken (EAGAIN); else the page's own error."""
    town.copy(3, "x")
    touch = town.touch(1)
    assert ends_with(town.copy(0, "abcde")) == (3, "EAGAIN")
    assert touch.done
    assert ends_with(town.copy(3, "de")) == (0, "EEXIST")
    assert town.read(0, 4 * PAGE_SIZE)[::PAGE_SIZE] == b"abcx"
    assert ends_with(town.zero(3)) == (0, "EEXIST")
    assert ends_with(town.zero(2, 3)) == (0, "EEXIST")


def test_copy_wants_one_registered_vma(town: Town) -> None:
    """validate_dst_vma(): ENOENT for a hole, what is not registered, and a range that reaches out."""
    town.do(uffd.uffd_unregister, town.fd, span(8, 8))
    assert ends_with(town.copy(20, "a")) == (0, "ENOENT")
    assert ends_with(town.copy(9, "a")) == (0, "ENOENT")
    assert ends_with(town.copy(7, "ab")) == (0, "ENOENT")
    other = town.do(uffd.create_userfaultfd, town.pid)
    assert ends_with(town.do(uffd.uffd_copy, other, START, bytes(PAGE_SIZE))) == (1, "")


def test_copy_refuses_what_is_no_range(town: Town) -> None:
    """validate_range(), and modes that there are not."""
    for start, data, mode in ((START + 1, bytes(PAGE_SIZE), 0), (START, b"", 0), (START, b"x", 0), (0, bytes(4096), 0)):
        assert fails(town, uffd.uffd_copy, town.fd, start, data, mode) == "EINVAL"
    assert fails(town, uffd.uffd_copy, town.fd, START, bytes(PAGE_SIZE), 2) == "EINVAL"
    assert fails(town, uffd.uffd_zeropage, town.fd, span(0), 2) == "EINVAL"
    assert fails(town, uffd.uffd_wake, town.fd, span(0, 0)) == "EINVAL"


def test_copy_stops_when_memory_runs_out() -> None:
    """The pages for which there are frames are filled; the first without is ENOMEM."""
    town = Town()
    held = town.machine.frames.available
    rest = town.machine.frames.allocate(held - 2)
    assert ends_with(town.copy(0, "abc")) == (2, "EAGAIN")
    assert ends_with(town.copy(2, "c")) == (0, "ENOMEM")
    assert ends_with(town.zero(2, 4)) == (4, "")
    town.machine.frames.put(rest)


def test_copy_of_shared_memory_fills_the_object(town: Town) -> None:
    """A page of it that nobody has mapped is there already; behind its end is EFAULT (shmem_mfill_atomic_pte())."""
    town.map_shared(8)
    child = town.do(processes.fork, town.pid)
    town.do(uffd.uffd_register, town.fd, span(0, 8), 1)
    town.do(processes.write_memory, child, span(2).start, b"child")
    assert ends_with(town.copy(0, "abc")) == (2, "EAGAIN")
    assert town.touch(2).done
    assert ends_with(town.copy(2, "c")) == (0, "EEXIST")
    assert town.do(processes.read_memory, child, span(1).start, 1).data == b"b"
    town.space.vmas.find(START).backing.size_bytes = 5 * PAGE_SIZE
    assert ends_with(town.zero(3, 4)) == (2, "EAGAIN")
    assert ends_with(town.copy(5, "f")) == (0, "EFAULT")
    town.machine.check()


def test_filled_pages_are_what_a_touch_would_have_made(town: Town) -> None:
    """mfill_atomic_install_pte(): dirty, writable as the VMA is, exclusive."""
    town.copy(0, "a")
    entry = town.space.table.get(START)
    assert cpu_pte.is_writable(entry)
    assert cpu_pte.is_dirty(entry)
    before = cpu_pte.cpu_pfn(entry)
    town.touch(0, write=True)
    assert cpu_pte.cpu_pfn(town.space.table.get(START)) == before


# ---- what other calls do with it


def test_registration_does_not_move_when_mremap_does(town: Town) -> None:
    """mremap_userfaultfd_prep(): what has moved is not registered, nor is what it merged with; in place it grows."""
    town.unmap(4, 4)
    town.do(processes.mremap, town.pid, span(0).start, 2 * PAGE_SIZE, 2 * PAGE_SIZE, 3, span(6).start)
    assert town.layout() == "2-4* 6-16"
    town.do(processes.mremap, town.pid, span(2).start, 2 * PAGE_SIZE, 3 * PAGE_SIZE)
    assert town.layout() == "2-5* 6-16"


def test_registration_stays_behind_when_mremap_leaves_the_old_range(town: Town) -> None:
    """MREMAP_DONTUNMAP: a touch of the old place waits for the handler."""
    town.copy(0, "a")
    flags = MremapFlag.MAYMOVE | MremapFlag.FIXED | MremapFlag.DONTUNMAP
    town.do(processes.mremap, town.pid, START, 4 * PAGE_SIZE, 4 * PAGE_SIZE, flags, span(20).start)
    assert town.layout() == "0-16* 20-24"
    assert town.read(20) == b"a"
    assert not town.touch(0).done


def test_child_is_not_served_by_its_parents_userfaultfd(town: Town) -> None:
    """dup_userfaultfd() without EVENT_FORK: the child's VMAs have none."""
    town.copy(0, "a")
    child = town.do(processes.fork, town.pid)
    assert town.do(processes.read_memory, child, START, 2 * PAGE_SIZE).data[::PAGE_SIZE] == b"a\0"
    assert not town.touch(1).done


@pytest.mark.parametrize("advice", [Advice.POPULATE_READ, Advice.POPULATE_WRITE])
def test_populating_waits_for_the_handler(town: Town, advice: Advice) -> None:
    """madvise_populate(), mlock and pins may drop the lock (FOLL_UNLOCKABLE)."""
    record = town.start(processes.madvise, town.pid, START, 4 * PAGE_SIZE, advice)
    town.settle()
    assert town.faults() == [(0, 4, advice is Advice.POPULATE_WRITE)]
    town.copy(0, "abcd")
    assert record.done


def test_closing_it_leaves_nothing_registered_while_its_process_is_ending() -> None:
    """The exit waits for a driver, and a device's fault may still come."""
    world = World()
    fd = world.do(uffd.create_userfaultfd, world.pid)
    world.do(uffd.uffd_register, fd, span(0, 16), 1)
    fault = (world.mirrors[0], [span(0)])
    world.do(commands_device.fault, *fault, write=False)
    ending = world.start(processes.exit_process, world.pid)
    closing = world.start(uffd.close_userfaultfd, fd)
    assert closing.done
    assert not ending.done
    late = world.start(commands_device.fault, *fault, write=True)
    world.machine.check()
    world.settle()
    assert ending.done
    assert late.done
    world.machine.check()


def test_closing_it_ends_when_the_process_has_ended_before_its_turn(town: Town) -> None:
    """close(2) cannot fail: what it waited to unregister is gone."""
    device = town.do(commands_device.register_device, "gpu")
    mirror = town.do(commands_device.register_mirror, device, town.pid)
    town.copy(0, "a")
    town.do(commands_device.fault, mirror, [span(0)], write=False)
    munmap = town.start(processes.munmap, town.pid, START, PAGE_SIZE)
    exiting = town.start(processes.exit_process, town.pid)
    closing = town.start(uffd.close_userfaultfd, town.fd)
    assert not (munmap.done)
    assert not (exiting.done)
    town.settle()
    assert closing.done
    assert closing.error is None
    assert not town.machine.userfaultfds


def test_closing_it_leaves_nothing_registered_when_a_call_before_the_exit_takes_its_change_back() -> None:
    """An munmap that a driver does not answer puts the mapping back, without the userfaultfd that was closed since."""
    world = World(policy=DeadlinePolicy.FAIL)
    (mirror,) = world.mirrors
    fd = world.do(uffd.create_userfaultfd, world.pid)
    world.do(uffd.uffd_register, fd, span(0, 16), 1)
    world.do(uffd.uffd_zeropage, fd, span(0))
    world.do(commands_device.fault, mirror, [span(0)], write=False)
    munmap = world.start(processes.munmap, world.pid, START, PAGE_SIZE)
    (owed,) = world.sent()
    exiting = world.start(processes.exit_process, world.pid)
    world.do(uffd.close_userfaultfd, fd)
    world.machine.abandon(mirror, owed.sequence)
    world.resume(munmap)
    assert error_of(munmap).errno == errno.ETIMEDOUT
    world.machine.check()
    world.settle()
    world.machine.answer(mirror, owed.sequence)
    world.settle()
    assert exiting.done


def test_register_fails_when_it_is_closed_while_drivers_are_told_of_a_cut() -> None:
    """The process is ending, so that closing waits for nobody: EBADF."""
    world = World()
    listener = world.do(commands_hmm.attach, world.devices[0], world.pid)
    world.do(commands_hmm.insert_notifier, listener, 0, 1 << 47)
    large = START + 2 * PMD_SIZE
    world.do(processes.mmap, world.pid, large, PMD_SIZE, RW, FIXED)
    world.do(processes.write_memory, world.pid, START, b"so that there are page tables")
    fd = world.do(uffd.create_userfaultfd, world.pid)
    registering = world.start(uffd.uffd_register, fd, AddressRange(large, large + PAGE_SIZE), 1)
    (told,) = world.sent()
    exiting = world.start(processes.exit_process, world.pid)
    world.do(uffd.close_userfaultfd, fd)
    world.machine.answer(told.mirror_id, told.sequence)
    world.resume(registering)
    assert error_of(registering).errno == errno.EBADF
    world.machine.check()
    world.settle()
    assert exiting.done


@pytest.mark.parametrize("command", [processes.mlock, processes.pin])
def test_locking_and_pinning_wait_for_the_handler(town: Town, command: Any) -> None:
    """populate_vma_page_range(), pin_user_pages()."""
    more = {"write": False} if command is processes.pin else {}
    args = (span(0, 2),) if command is processes.pin else (START, 2 * PAGE_SIZE)
    record = town.start(command, town.pid, *args, **more)
    town.settle()
    assert [fault[0] for fault in town.faults()] == [0]
    town.copy(0, "a")
    assert [fault[0] for fault in town.faults()] == [1]
    town.copy(1, "b")
    assert record.done
    assert record.error is None


def test_no_huge_page_comes_where_the_handler_is_to_bring_pages() -> None:
    """do_huge_pmd_anonymous_page() asks the handler for the page that is touched."""
    local = Local(Machine(Limits(frames=2048)))
    pid = local.call(processes.create_process, "p", thp=Thp.ALWAYS)
    local.call(processes.mmap, pid, 1 << 30, PMD_SIZE, RW, FIXED)
    fd = local.call(uffd.create_userfaultfd, pid)
    whole = AddressRange(1 << 30, (1 << 30) + PMD_SIZE)
    local.call(uffd.uffd_register, fd, whole, 1)
    asked: list[int] = []

    def bring(message: uffd.UserfaultMessage) -> None:
        asked.append(message.address)
        local.call(uffd.uffd_copy, fd, message.address, b"h" * PAGE_SIZE)

    local.handle(fd, bring)
    at = (1 << 30) + 5 * PAGE_SIZE
    assert local.call(processes.read_memory, pid, at, 1).data == b"h"
    assert asked == [at]
    space = local.machine.processes[pid].space
    assert space.table.count == 1
    with pytest.raises(HmmError, match="a userfaultfd misses a page") as raised:
        local.call(processes.madvise, pid, 1 << 30, PMD_SIZE, Advice.COLLAPSE)
    assert raised.value.errno == errno.EBUSY  # hpage_collapse_scan_pmd(), madvise_collapse_errno()


# ---- what devices do with it


class Card:
    """A device of today beside a process with a userfaultfd."""

    def __init__(self) -> None:
        self.local = Local(Machine(Limits(frames=400, device_frames=64)))
        self.call = self.local.call
        self.pid = self.call(processes.create_process, "p")
        self.call(processes.mmap, self.pid, START, 4 * PAGE_SIZE, RW, FIXED)
        self.fd = self.call(uffd.create_userfaultfd, self.pid)
        self.call(uffd.uffd_register, self.fd, span(0, 4), 1)
        device = self.call(commands_device.register_device, "card", memory_pages=16)
        self.mirror = self.call(commands_hmm.attach, device, self.pid)
        self.notifier = self.call(commands_hmm.insert_notifier, self.mirror, 0, 1 << 47)
        self.asked: list[int] = []

    def serve(self) -> None:
        """Bring in every page that is asked for."""
        self.local.handle(self.fd, self._bring)

    def _bring(self, message: uffd.UserfaultMessage) -> None:
        self.asked.append((message.address - START) // PAGE_SIZE)
        self.call(uffd.uffd_copy, self.fd, message.address, b"\xab" * PAGE_SIZE)


def test_range_fault_fails_when_the_handler_would_have_to_run() -> None:
    """hmm_vma_fault() keeps the mmap lock, so handle_userfault() has SIGBUS for it: EFAULT; nobody is told."""
    card = Card()
    card.serve()
    sequence = card.call(commands_hmm.read_begin, card.mirror, card.notifier)
    args = (card.mirror, card.notifier, sequence, span(0, 4))
    faulted = card.call(commands_hmm.range_fault, *args, REQ_FAULT)
    assert faulted.error is not None
    assert (faulted.error.errno, faulted.error.address) == (errno.EFAULT, START)
    assert card.asked == []
    assert card.call(commands_hmm.range_fault, *args).words.tolist() == [0] * 4


def test_unlocked_range_fault_waits_for_the_handler() -> None:
    """hmm_range_fault_unlocked_timeout(): the handler may drop the lock; one message for each missing page."""
    card = Card()
    card.serve()
    faulted = card.call(commands_hmm.range_fault_unlocked, card.mirror, card.notifier, span(0, 4), REQ_FAULT)
    assert card.asked == [0, 1, 2, 3]
    assert ((faulted.require() & np.uint64(VALID)) != 0).all()
    assert card.call(processes.read_memory, card.pid, START, 4 * PAGE_SIZE).data == b"\xab" * 4 * PAGE_SIZE


def test_unlocked_range_fault_ends_when_its_callers_patience_does() -> None:
    """EBUSY at the deadline, as when the range is invalidated all the time."""
    card = Card()
    machine = card.local.machine
    record = machine.start(NOBODY, commands_hmm.range_fault_unlocked, card.mirror, card.notifier, span(0, 4), REQ_FAULT)
    assert not record.done
    machine.time_out(record.id)
    assert record.result.error.errno == errno.EBUSY
    assert not card.call(uffd.read_userfaults, card.fd, 16)


def test_exclusive_access_fails_where_pages_are_missing() -> None:
    """make_device_exclusive_range() gives get_user_pages_remote() no leave to drop the lock: EFAULT."""
    card = Card()
    card.serve()
    with pytest.raises(HmmError, match="EFAULT"):
        card.call(commands_hmm.make_exclusive, card.mirror, span(0, 2))
    assert card.asked == []


def test_holes_are_not_migrated_where_pages_are_missing() -> None:
    """migrate_vma_insert_page() backs off; what is there moves."""
    card = Card()
    card.call(uffd.uffd_copy, card.fd, START, b"x" * PAGE_SIZE)
    card.call(uffd.uffd_zeropage, card.fd, span(1))
    moved = card.call(commands_hmm.migrate_to_device, card.mirror, span(0, 4))
    assert (moved.src != 0).tolist() == [True, False, False, False]
    card.local.machine.check()


def test_fault_of_2015_fails_where_pages_are_missing() -> None:
    """It faults with the mmap lock held and no FAULT_FLAG_ALLOW_RETRY: EFAULT."""
    card = Card()
    device = card.call(commands_device.register_device, "old")
    mirror = card.call(commands_device.register_mirror, device, card.pid)
    (part,) = card.call(commands_device.fault, mirror, [span(0, 2)], write=False).parts
    assert part.error is not None
    assert part.error.errno == errno.EFAULT


def test_migration_of_2015_leaves_alone_what_is_missing() -> None:
    """What is there moves, as with migrate_vma_insert_page(); nobody gets pages behind the handler's back."""
    card = Card()
    card.call(uffd.uffd_copy, card.fd, span(1).start, b"x" * PAGE_SIZE)
    card.call(uffd.uffd_zeropage, card.fd, span(2))
    device = card.call(commands_device.register_device, "old", memory_pages=8)
    mirror = card.call(commands_device.register_mirror, device, card.pid)
    migrated = card.call(commands_device.migrate, mirror, span(0, 4))
    assert (migrated.moved.npages, migrated.moved.error) == (1, None)
    card.serve()
    assert card.call(processes.read_memory, card.pid, START, 3 * PAGE_SIZE).data[::PAGE_SIZE] == b"\xabx\0"
    assert card.asked == [0]
    card.local.machine.check()


def test_waits_and_registrations_are_replayed(town: Town) -> None:
    """The list of inputs gives the same state, with accesses that wait and that were killed."""
    machine = Machine(recording=True)
    pid = machine.start(NOBODY, processes.create_process, "p").result
    machine.start(NOBODY, processes.mmap, pid, START, 16 * PAGE_SIZE, RW, FIXED)
    fd = machine.start(NOBODY, uffd.create_userfaultfd, pid).result
    machine.start(NOBODY, uffd.uffd_register, fd, span(0, 8), 1)
    touches = [machine.start(NOBODY, processes.touch, pid, span(page), write=True) for page in range(4)]
    machine.start(NOBODY, uffd.read_userfaults, fd, 2)
    machine.start(NOBODY, uffd.uffd_copy, fd, START, b"q" * PAGE_SIZE)
    machine.resume(touches[0].id)
    machine.kill(touches[1].id)
    assert machine.inputs is not None
    assert digest(replay(machine.inputs, machine.limits)) == digest(machine)
    assert [touch.done for touch in touches] == [True, True, False, False]


@pytest.mark.parametrize("sharing", [MapFlag.SHARED, MapFlag.PRIVATE])
def test_handler_brings_in_what_a_mapping_of_a_file_misses(sharing: MapFlag) -> None:
    """vma_is_shmem(): what the file has is there, of private mappings too; who writes a private page gets a copy."""
    town = Town((0, 0))
    file = town.do(commands_file.open_file, "data", create=True)
    town.do(commands_file.truncate_file, file, 4 * PAGE_SIZE)
    town.do(commands_file.write_file, file, 0, b"f" * PAGE_SIZE)
    town.do(processes.mmap, town.pid, START, 4 * PAGE_SIZE, RW, sharing | MapFlag.FIXED, file)
    assert town.do(uffd.uffd_register, town.fd, span(0, 4), 1) == IOCTLS
    assert town.read(0) == b"f"
    waits = town.touch(1, write=True)
    assert not waits.done
    assert town.faults() == [(1, 1, True)]
    assert ends_with(town.copy(1, "a")) == (1, "")
    assert waits.done
    assert town.read(1) == b"a"
    in_file = town.do(commands_file.read_file, file, PAGE_SIZE, 1)
    assert in_file == (b"a" if sharing is MapFlag.SHARED else b"\0")
    assert ends_with(town.copy(4, "b")) == (0, "ENOENT")


# ---- minor faults


@pytest.fixture
def minor() -> Town:
    """Four pages of a file, mapped shared and registered for minor faults, of which the file has the first two."""
    town = Town((0, 0))
    file = town.do(commands_file.open_file, "f", create=True)
    town.do(commands_file.truncate_file, file, 4 * PAGE_SIZE)
    town.do(commands_file.write_file, file, 0, b"a" * PAGE_SIZE + b"b" * PAGE_SIZE)
    flags = MapFlag.SHARED | MapFlag.FIXED
    town.do(processes.mmap, town.pid, START, 4 * PAGE_SIZE, RW, flags, file)
    town.file = file
    assert town.do(uffd.uffd_register, town.fd, span(0, 4), RegisterMode.MINOR) == IOCTLS | IOCTL_CONTINUE
    return town


def go_on(town: Town, first: int, npages: int = 1, mode: int = 0) -> Filled:
    """UFFDIO_CONTINUE."""
    filled: Filled = town.do(uffd.uffd_continue, town.fd, span(first, npages), mode)
    return filled


def test_touch_waits_when_the_page_is_there_and_not_mapped(minor: Town) -> None:
    """shmem_get_folio_gfp(): userfaultfd_minor(); UFFDIO_CONTINUE maps the page and wakes; holes are nobody's."""
    record = minor.touch(0, 4)
    assert not record.done
    (message,) = minor.do(uffd.read_userfaults, minor.fd, 16)
    assert (message.address, message.npages, message.write, message.minor) == (START, 2, False, True)
    assert ends_with(go_on(minor, 0, 2)) == (2, "")
    assert record.done
    assert minor.read(0, 2 * PAGE_SIZE) == b"a" * PAGE_SIZE + b"b" * PAGE_SIZE
    entry = minor.space.table.get(START)
    assert entry & cpu_pte.WRITE
    assert entry & cpu_pte.DIRTY
    minor.machine.check()


def test_handler_hears_which_pages_are_missing_and_which_are_minor(minor: Town) -> None:
    """VM_UFFD_MISSING and VM_UFFD_MINOR at once: each run of pages is of one kind."""
    both = RegisterMode.MISSING | RegisterMode.MINOR
    minor.do(uffd.uffd_register, minor.fd, span(0, 4), both)
    record = minor.touch(0, 4, write=True)
    for first, is_minor in ((0, True), (2, False)):
        (message,) = minor.do(uffd.read_userfaults, minor.fd, 16)
        assert ((message.address - START) // PAGE_SIZE, message.npages, message.minor) == (first, 2, is_minor)
        assert ends_with(go_on(minor, 0, 2) if is_minor else minor.zero(2, 2)) == (2, "")
    assert record.done
    assert {"um", "ui"} <= set(vm_flag_letters(minor.space, next(iter(minor.space.vmas))).split())


def test_register_takes_minor_faults_of_shared_memory_alone(town: Town) -> None:
    """vma_can_userfault(), UFFD_API_REGISTER_MODES; what has the mode already stays as it is."""
    for mode in (0, 2, 8, RegisterMode.MINOR):
        assert fails(town, uffd.uffd_register, town.fd, span(0), mode) == "EINVAL"
    town.map_shared(4)
    town.do(uffd.uffd_register, town.fd, span(0, 4), 5)
    town.do(uffd.uffd_register, town.fd, span(1), RegisterMode.MINOR)
    assert town.layout() == "0-4* 4-16*"
    town.do(uffd.uffd_register, town.fd, span(4), RegisterMode.MISSING)
    town.do(uffd.uffd_unregister, town.fd, span(0, 16))
    assert town.layout() == "0-4 4-16"


def test_continue_fails_at_the_first_page_that_cannot_be_mapped(minor: Town) -> None:
    """mfill_atomic_pte_continue(): behind the end EINVAL, no page EFAULT, a lost one EIO, an entry EEXIST."""
    minor.machine.capable = True
    assert ends_with(go_on(minor, 2)) == (0, "EFAULT")
    assert ends_with(go_on(minor, 0, 4)) == (2, "EAGAIN")
    assert ends_with(go_on(minor, 1)) == (0, "EEXIST")
    minor.do(processes.madvise, minor.pid, span(1).start, PAGE_SIZE, Advice.HWPOISON)
    minor.do(processes.madvise, minor.pid, START, 4 * PAGE_SIZE, Advice.DONTNEED)
    assert ends_with(go_on(minor, 1)) == (0, "EIO")
    minor.do(commands_file.truncate_file, minor.file, 0)
    assert ends_with(go_on(minor, 0)) == (0, "EINVAL")
    assert ends_with(go_on(minor, 3, 2)) == (0, "ENOENT")
    assert fails(minor, uffd.uffd_continue, minor.fd, span(0), 2) == "EINVAL"
    minor.do(uffd.uffd_register, minor.fd, span(8), RegisterMode.MISSING)
    assert ends_with(go_on(minor, 8)) == (0, "EINVAL")
    minor.machine.check()


def test_private_mapping_shows_the_page_and_may_not_write_it(minor: Town) -> None:
    """mfill_atomic_install_pte(): a page of the cache is writable in a shared mapping only."""
    minor.do(processes.mmap, minor.pid, START, 4 * PAGE_SIZE, RW, MapFlag.PRIVATE | MapFlag.FIXED, minor.file)
    minor.do(uffd.uffd_register, minor.fd, span(0, 4), RegisterMode.MINOR)
    record = minor.touch(0, write=True)
    assert not record.done
    go_on(minor, 0)
    assert record.done  # copied
    go_on(minor, 1)
    assert not minor.space.table.get(span(1).start) & cpu_pte.WRITE
    minor.do(processes.write_memory, minor.pid, START, b"x")
    assert minor.do(commands_file.read_file, minor.file, 0, 1) == b"a"


def test_unregister_wakes_nobody_where_minor_faults_alone_are_registered(minor: Town) -> None:
    """userfaultfd_unregister() wakes for userfaultfd_missing(); close and UFFDIO_WAKE do."""
    record = minor.touch(0)
    minor.do(uffd.uffd_unregister, minor.fd, span(0, 4))
    assert not record.done
    minor.do(uffd.uffd_wake, minor.fd, span(0))
    assert record.done


def test_reads_map_nothing_around_where_minor_faults_are_registered(minor: Town) -> None:
    """uffd_disable_fault_around()."""
    minor.space.fault_around_pages = 16
    record = minor.touch(3)
    assert record.done
    assert [bool(minor.space.table.get(span(at).start)) for at in range(4)] == [False, False, False, True]


def test_continue_reads_a_page_from_swap() -> None:
    """shmem_get_folio() with SGP_NOALLOC swaps in."""
    town = Town((0, 0))
    town.machine = Machine(Limits(frames=256, device_frames=0, swap_pages=64))
    town.pid = town.do(processes.create_process, "p")
    town.fd = town.do(uffd.create_userfaultfd, town.pid, UserfaultFeature.MINOR_SHMEM)
    town.map_shared(2)
    town.do(processes.write_memory, town.pid, START, b"s" * PAGE_SIZE)
    town.do(processes.madvise, town.pid, START, PAGE_SIZE, Advice.PAGEOUT)
    town.do(uffd.uffd_register, town.fd, span(0, 2), RegisterMode.MINOR)
    record = town.touch(0)
    assert not record.done
    go_on(town, 0)
    assert record.done
    assert town.read(0) == b"s"
    town.machine.check()
