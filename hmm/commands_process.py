"""Commands of the process side: system calls and CPU accesses of the processes whose memory is modelled.

Every function is a command for `Machine.start`.  It looks the process up and leaves the work to the module named
after the kernel's file; what is here is what concerns processes: who uses which address space, who is born of whom.

**Source**: Linux kernel/fork.c, kernel/exit.c (exit_mm()), fs/exec.c (exec_mmap()).

**Invariants**: an address space ends with its last user, after every mirror of it was released.

**Absent**: signals, scheduling, permissions of files, resource limits other than those of `Limits`.

Differs: the end of an address space waits for a migration that its driver has not finalized before any mirror is told.
In the kernel exit_mmap() tells them and drops the pages beside it, and waits before it frees the page table; and a
driver that has a reference of the mm runs all that itself, by its mmput(), when the process has long gone.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hmm import clear_refs as forgetting
from hmm import cpu_access, mman, oom_kill
from hmm import fork as forking
from hmm import madvise as advising
from hmm import mincore as residence
from hmm import mlock as locking
from hmm import mprotect as protecting
from hmm import mremap as remapping
from hmm import msync as syncing
from hmm import pagemap as page_map
from hmm import pin as pinning
from hmm.address_space import MMAP_BASE, AddressSpace, Thp
from hmm.commands_file import kept, new_huge_memory, new_shared_memory
from hmm.cpu_access import Accessed
from hmm.errors import HmmError, InvalidRequestError, WouldDeadlockError
from hmm.events import Cause
from hmm.file import File
from hmm.ksm import KsmPass
from hmm.machine import Machine
from hmm.mirror import Mirror, MirrorState
from hmm.operation import Deliver, Operation, immediate
from hmm.pin import Pin
from hmm.registry import Process
from hmm.units import TASK_SIZE, WHOLE_SPACE, Address, AddressRange, Entries, ProcessId, is_page_aligned
from hmm.unmapped_area import MapFlag, map_flags, place
from hmm.vma import protection

FAULT_AROUND_MAX = 512
_NOT_FIXED = ~int(MapFlag.FIXED | MapFlag.FIXED_NOREPLACE)


@dataclass(frozen=True, slots=True)
class Mapped:
    """What mmap did.

    Attributes:
        address: where the mapping is.
        placement: where it would be if the kernel had chosen, for this length, hint and flags; 0 when not asked.
    """

    address: Address
    placement: Address = 0


# ---- birth and death


@immediate
def create_process(
    machine: Machine,
    name: str = "",
    *,
    mmap_base: Address = 0,
    brk_start: Address = 0,
    fault_around_pages: int = 1,
    thp: int = Thp.NEVER,
    low_addresses: bool = False,
) -> ProcessId:
    """A process with an empty address space, as right after execve() before anything is mapped.

    Args:
        mmap_base: mappings are placed downwards from here; 0 for the kernel's default without randomisation.
        brk_start: the initial program break; 0 for no heap.
        fault_around_pages: how many cached pages of a file a read fault maps at most, a power of two up to 512.
        thp: where first touches may bring in huge pages, a Thp.
        low_addresses: whether it may map addresses below vm.mmap_min_addr, as with CAP_SYS_RAWIO.

    Raises:
        InvalidRequestError: an address that is unaligned or beyond the address space, or another number of pages
            (EINVAL).
        OutOfFramesError: too many processes (ENOMEM).
    """
    machine.require_room("processes", len(machine.processes), machine.limits.processes)
    if not 1 <= fault_around_pages <= FAULT_AROUND_MAX or fault_around_pages & (fault_around_pages - 1):
        raise InvalidRequestError(f"create process: {fault_around_pages} pages around a fault are no power of two")
    space = _empty_space(machine, mmap_base, brk_start)
    space.fault_around_pages = fault_around_pages
    space.thp, space.low_addresses = Thp(thp), low_addresses
    process = Process(machine.next_id("process"), name, machine.caller.token, space)
    machine.processes[process.id] = process
    return process.id


def fork(machine: Machine, process_id: ProcessId) -> Operation[ProcessId]:
    """A child with a copy-on-write copy of the address space; mirrors of the parent stay the parent's.

    Raises:
        OutOfFramesError: too many processes, or no directories for the child's table (ENOMEM): there is no child.

    Source: kernel/fork.c, dup_mm().
    """
    parent = machine.process(process_id)
    machine.require_room("processes", len(machine.processes), machine.limits.processes)
    space = machine.new_space()
    try:
        yield from forking.fork(parent.space, space)
    except BaseException:
        del machine.spaces[space.id]
        raise
    return _add_user(machine, parent, space)


@immediate
def vfork(machine: Machine, process_id: ProcessId) -> ProcessId:
    """A child that shares the address space until it calls exec or exits.  Source: kernel/fork.c, CLONE_VFORK."""
    return _share(machine, process_id)


@immediate
def clone_thread(machine: Machine, process_id: ProcessId) -> ProcessId:
    """A thread: another user of the same address space.  Source: kernel/fork.c, copy_mm() with CLONE_VM."""
    return _share(machine, process_id)


def exec_process(
    machine: Machine, process_id: ProcessId, name: str = "", *, mmap_base: Address = 0, brk_start: Address = 0
) -> Operation[None]:
    """Leave the address space for an empty one with the same settings of pages.

    Mirrors stay with the old one and are released if it ends.

    Raises: as `create_process`; also
        WouldDeadlockError: made inside a callback that it would wait for (EDEADLK); nothing was changed.

    Source: fs/exec.c, exec_mmap().
    """
    process = machine.process(process_id)
    space = _empty_space(machine, mmap_base, brk_start)
    left, old_name = process.space, process.name
    space.thp, space.fault_around_pages = left.thp, left.fault_around_pages
    space.low_addresses = left.low_addresses
    process.space, process.name = space, name or old_name
    try:
        yield from _leave(machine, left)
    except WouldDeadlockError:
        process.space, process.name = left, old_name
        yield from _leave(machine, space)  # others may have come to use it meanwhile
        raise


def exit_process(machine: Machine, process_id: ProcessId) -> Operation[None]:
    """End a process; its address space ends with it if nobody else uses it.

    Every mirror hears MUNMAP of everything and then `release`; only then are the frames freed.

    Raises:
        WouldDeadlockError: made inside a callback that it would wait for (EDEADLK); nothing was changed.

    Source: mm/mmap.c, exit_mmap(); hmm_notifier_release().
    """
    process = machine.process(process_id)
    del machine.processes[process_id]
    try:
        yield from _leave(machine, process.space)
    except WouldDeadlockError:
        machine.processes[process_id] = process
        raise


def process_mrelease(machine: Machine, process_id: ProcessId) -> Operation[None]:
    """process_mrelease(2), as `oom_kill.process_mrelease`; the process has still to exit."""
    yield from oom_kill.process_mrelease(machine.process(process_id).space)


def _empty_space(machine: Machine, mmap_base: Address, brk_start: Address) -> AddressSpace:
    for value in (mmap_base, brk_start):
        if not 0 <= value < TASK_SIZE or not is_page_aligned(value):
            raise InvalidRequestError(f"create process: {value:#x} is not a page of the address space")
    space = machine.new_space()
    space.mmap_base = mmap_base or MMAP_BASE
    space.brk_start = space.brk_end = brk_start
    return space


def _share(machine: Machine, process_id: ProcessId) -> ProcessId:
    parent = machine.process(process_id)
    machine.require_room("processes", len(machine.processes), machine.limits.processes)
    parent.space.users += 1
    return _add_user(machine, parent, parent.space)


def _add_user(machine: Machine, parent: Process, space: AddressSpace) -> ProcessId:
    child = Process(machine.next_id("process"), parent.name, parent.owner, space, parent.id)
    machine.processes[child.id] = child
    return child.id


def _leave(machine: Machine, space: AddressSpace) -> Operation[None]:
    space.users -= 1
    if space.users:
        return
    try:
        yield from _end(machine, space)
    except WouldDeadlockError:
        space.users += 1
        raise


def _end(machine: Machine, space: AddressSpace) -> Operation[None]:
    with space.notifier.turn() as turn:
        yield from turn.wait()
        with space.notifier.invalidation((WHOLE_SPACE,), Cause.EXIT, certain=True) as invalidation:
            yield from invalidation.deliver()
            space.notifier.closed = True
            yield from _release_mirrors(machine, space)
            if len(space.vmas):  # exit_mmap() unmaps nothing else
                with space.notifier.invalidation((WHOLE_SPACE,), Cause.EXIT_MMAP, certain=True) as unmapping:
                    yield from unmapping.deliver()
            yield from forking.exit_mmap(space)
    del machine.spaces[space.id]


def _release_mirrors(machine: Machine, space: AddressSpace) -> Operation[None]:
    mirrors = [mirror for mirror in machine.mirrors.values() if _mirrors(mirror, space)]
    for mirror in mirrors:
        mirror.release(MirrorState.RELEASED)
    if mirrors:
        release = space.notifier.release_event(machine.current.operation_id)
        yield Deliver(release, tuple(mirror.id for mirror in mirrors))


def _mirrors(mirror: Mirror, space: AddressSpace) -> bool:
    return mirror.space is space and mirror.state is MirrorState.LIVE


# ---- system calls


def mmap(
    machine: Machine,
    process_id: ProcessId,
    address: Address,
    length: int,
    prot: int,
    flags: int,
    file_id: int = 0,
    offset: int = 0,
) -> Operation[Mapped]:
    """mmap(2), as `mman.mmap`; `file_id` 0 stands for no file."""
    space = machine.process(process_id).space
    file = machine.file(file_id) if file_id else None
    how = map_flags(flags)
    anywhere = map_flags(how._value_ & _NOT_FIXED)
    placement = _placement(space, length, anywhere, file, offset) if address and length > 0 else 0
    made: list[File] = []

    def make(file: File) -> File:
        file.calls += 1  # it is not mapped before what it is mapped over has gone
        made.append(file)
        return file

    try:
        with kept(machine, file) if file else nullcontext():
            mapped = yield from mman.mmap(
                space, address, length, protection(prot), how, file, offset,
                lambda size_bytes: make(new_shared_memory(machine, size_bytes)),
                lambda size_bytes, how: make(new_huge_memory(machine, space, size_bytes, how)),
            )  # fmt: skip
    finally:
        for unnamed in made:
            unnamed.calls -= 1
    return Mapped(mapped, placement or mapped)


def _placement(space: AddressSpace, length: int, flags: MapFlag, file: File | None, offset: int) -> Address:
    try:
        return place(space, length, 0, flags, file, offset)
    except HmmError:  # no opinion: the arguments are wrong, or there is no room
        return 0


def munmap(machine: Machine, process_id: ProcessId, start: Address, length: int) -> Operation[int]:
    """munmap(2), as `mman.munmap`."""
    return (yield from mman.munmap(machine.process(process_id).space, start, length))


def brk(machine: Machine, process_id: ProcessId, address: Address) -> Operation[Address]:
    """brk(2), as `mman.brk`.  Returns: the program break, which is unchanged when the call failed."""
    return (yield from mman.brk(machine.process(process_id).space, address))


def mprotect(machine: Machine, process_id: ProcessId, start: Address, length: int, prot: int) -> Operation[int]:
    """mprotect(2), as `mprotect.mprotect`."""
    return (yield from protecting.mprotect(machine.process(process_id).space, start, length, prot))


def mremap(
    machine: Machine,
    process_id: ProcessId,
    old_address: Address,
    old_length: int,
    new_length: int,
    flags: int = 0,
    new_address: Address = 0,
) -> Operation[Address]:
    """mremap(2), as `mremap.mremap`."""
    space = machine.process(process_id).space
    return (yield from remapping.mremap(space, old_address, old_length, new_length, flags, new_address))


def madvise(machine: Machine, process_id: ProcessId, start: Address, length: int, advice: int) -> Operation[int]:
    """madvise(2), as `madvise.madvise`."""
    space = machine.process(process_id).space
    return (yield from advising.madvise(space, start, length, advice, machine.reclaim, capable=machine.capable))


def msync(machine: Machine, process_id: ProcessId, start: Address, length: int, flags: int) -> Operation[int]:
    """msync(2), as `msync.msync`."""
    return (yield from syncing.msync(machine.process(process_id).space, start, length, flags))


def mlock(machine: Machine, process_id: ProcessId, start: Address, length: int, flags: int = 0) -> Operation[int]:
    """mlock2(2), as `mlock.mlock2`."""
    return (yield from locking.mlock2(machine.process(process_id).space, start, length, flags))


def munlock(machine: Machine, process_id: ProcessId, start: Address, length: int) -> Operation[int]:
    """munlock(2), as `mlock.munlock`."""
    return (yield from locking.munlock(machine.process(process_id).space, start, length))


def mlockall(machine: Machine, process_id: ProcessId, flags: int) -> Operation[int]:
    """mlockall(2), as `mlock.mlockall`."""
    return (yield from locking.mlockall(machine.process(process_id).space, flags))


def munlockall(machine: Machine, process_id: ProcessId) -> Operation[int]:
    """munlockall(2), as `mlock.munlockall`."""
    return (yield from locking.munlockall(machine.process(process_id).space))


def mincore(machine: Machine, process_id: ProcessId, start: Address, length: int) -> Operation[npt.NDArray[np.uint8]]:
    """mincore(2), as `mincore.mincore`: uint8[npages], 1 where a touch would not fault for I/O."""
    return (yield from residence.mincore(machine.process(process_id).space, start, length))


@immediate
def pagemap(machine: Machine, process_id: ProcessId, span: AddressRange) -> Entries:
    """/proc/PID/pagemap, as `pagemap.pagemap`: uint64[npages]."""
    return page_map.pagemap(machine.process(process_id).space, span)


def clear_refs(machine: Machine, process_id: ProcessId, what: int) -> Operation[None]:
    """Write to /proc/PID/clear_refs, as `clear_refs.clear_refs`."""
    yield from forgetting.clear_refs(machine.process(process_id).space, what)


def scan_ksm(machine: Machine, passes: int = 1) -> Operation[KsmPass]:
    """Merge equal pages of all processes, as `Ksm.scan`: what the kernel's ksmd does unasked."""
    return (yield from machine.ksm.scan(passes))


# ---- what the CPUs of a process do


def read_memory(machine: Machine, process_id: ProcessId, address: Address, length: int) -> Operation[Accessed]:
    """A CPU reads bytes, as `cpu_access.read_memory`."""
    return (yield from cpu_access.read_memory(machine.process(process_id).space, address, length))


def write_memory(machine: Machine, process_id: ProcessId, address: Address, data: bytes) -> Operation[Accessed]:
    """A CPU writes bytes, as `cpu_access.write_memory`."""
    return (yield from cpu_access.write_memory(machine.process(process_id).space, address, data))


def touch(machine: Machine, process_id: ProcessId, span: AddressRange, *, write: bool) -> Operation[Accessed]:
    """A CPU touches every page of a range, as `cpu_access.touch`."""
    return (yield from cpu_access.touch(machine.process(process_id).space, span, write=write))


def read_pages(machine: Machine, process_id: ProcessId, span: AddressRange, offset: int) -> Operation[Accessed]:
    """A CPU loads one byte of every page of a range, as `cpu_access.read_pages`."""
    return (yield from cpu_access.read_pages(machine.process(process_id).space, span, offset))


def write_pages(
    machine: Machine, process_id: ProcessId, span: AddressRange, offset: int, values: bytes
) -> Operation[Accessed]:
    """A CPU stores one byte in every page of a range, as `cpu_access.write_pages`."""
    if len(values) != span.npages:
        raise InvalidRequestError(f"write pages: {len(values)} values for the {span.npages} pages of {span}")
    stored = np.frombuffer(values, np.uint8)
    return (yield from cpu_access.write_pages(machine.process(process_id).space, span, offset, stored))


# ---- pages that are to stay


def pin(
    machine: Machine, process_id: ProcessId, span: AddressRange, *, write: bool, long_term: bool = True
) -> Operation[int]:
    """Pin pages, as `pin.pin_user_pages`; they outlive the process.

    Returns: a number for `unpin`.
    """
    space = machine.process(process_id).space
    owner = machine.caller.token
    pfns = yield from pinning.pin_user_pages(space, span, write=write, long_term=long_term)
    number = machine.next_id("pin")
    machine.pins[number] = Pin(pfns, space.id, span, owner, long_term)
    return number


@immediate
def unpin(machine: Machine, number: int) -> None:
    """Let pinned pages go.

    Raises:
        NoSuchObjectError: there is no such pin (ENOENT).
        AccessDeniedError: it belongs to another owner (EPERM).

    Source: Linux mm/gup.c, unpin_user_pages().
    """
    machine.frames.unpin(machine.pin(number).pfns)
    del machine.pins[number]
