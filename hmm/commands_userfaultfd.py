"""Commands of userfaultfds: what the handler of a process's missing pages calls.

    create_userfaultfd close_userfaultfd     the file descriptor, with UFFDIO_API
    uffd_register uffd_unregister            which ranges it serves
    read_userfaults                          who waits for it
    uffd_copy uffd_zeropage uffd_continue    what it does about that
    uffd_wake

**Source**: Linux fs/userfaultfd.c; `hmm.uffdio` and `hmm.userfaultfd` name the functions.

**Invariants**: a userfaultfd is its creator's alone, and outlives its process until it is closed.

**Absent**: transport; waiting for userfaults (whoever runs the machine sees them come).
"""

from __future__ import annotations

from dataclasses import dataclass

from hmm import uffdio
from hmm.errors import InvalidRequestError
from hmm.machine import Machine
from hmm.operation import Operation, immediate
from hmm.uffdio import Filled, Filling
from hmm.units import Address, AddressRange, ProcessId
from hmm.userfaultfd import Userfaultfd, UserfaultFeature

_FEATURES = int(UserfaultFeature.MISSING_SHMEM | UserfaultFeature.SIGBUS | UserfaultFeature.MINOR_SHMEM)


@dataclass(frozen=True, slots=True)
class UserfaultMessage:
    """`struct uffd_msg` of a page fault.

    Attributes:
        address: of the page that is missing.
        npages: so many pages from there on are missing, and the access is about to touch them.
        write: UFFD_PAGEFAULT_FLAG_WRITE.
        operation_id: the call that waits.
        minor: UFFD_PAGEFAULT_FLAG_MINOR: the pages are in the shared memory, and only not mapped.
    """

    address: Address
    npages: int
    write: bool
    operation_id: int
    minor: bool = False


@immediate
def create_userfaultfd(machine: Machine, process_id: ProcessId, features: int = 0) -> int:
    """A userfaultfd of a process's address space.

    Args:
        features: UserfaultFeature values that it wants.

    Raises:
        InvalidRequestError: a feature that there is not (EINVAL).
        OutOfFramesError: too many userfaultfds (ENOMEM).

    Source: Linux fs/userfaultfd.c, new_userfaultfd(), userfaultfd_api().
    """
    if features & ~_FEATURES:
        raise InvalidRequestError(f"userfaultfd: features {features:#x}: there are only {_FEATURES:#x}")
    machine.require_room("userfaultfds", len(machine.userfaultfds), machine.limits.userfaultfds)
    space, caller = machine.process(process_id).space, machine.caller
    number = machine.next_id("userfaultfd")
    space.userfaultfds[number] = Userfaultfd(
        number, space.id, machine.current, caller.token, caller.name, UserfaultFeature(features)
    )
    machine.userfaultfds[number] = space
    return number


def close_userfaultfd(machine: Machine, userfaultfd_id: int) -> Operation[None]:
    """As `uffdio.close`; closing it once more, while it is being closed, does nothing."""
    space, userfaultfd = machine.userfaultfd(userfaultfd_id)
    yield from uffdio.close(space, userfaultfd)
    machine.userfaultfds.pop(userfaultfd_id, None)


def uffd_register(machine: Machine, userfaultfd_id: int, span: AddressRange, mode: int) -> Operation[int]:
    """As `uffdio.register`."""
    return (yield from uffdio.register(*machine.userfaultfd(userfaultfd_id), span, mode))


def uffd_unregister(machine: Machine, userfaultfd_id: int, span: AddressRange) -> Operation[None]:
    """As `uffdio.unregister`."""
    yield from uffdio.unregister(*machine.userfaultfd(userfaultfd_id), span)


def uffd_copy(machine: Machine, userfaultfd_id: int, address: Address, data: bytes, mode: int = 0) -> Operation[Filled]:
    """UFFDIO_COPY, as `uffdio.fill`: `data` to `address`."""
    space, userfaultfd = machine.userfaultfd(userfaultfd_id)
    span = AddressRange(address, address + len(data))
    return (yield from uffdio.fill(space, userfaultfd, span, Filling.COPY, mode, memoryview(data)))


def uffd_zeropage(machine: Machine, userfaultfd_id: int, span: AddressRange, mode: int = 0) -> Operation[Filled]:
    """UFFDIO_ZEROPAGE, as `uffdio.fill`."""
    return (yield from uffdio.fill(*machine.userfaultfd(userfaultfd_id), span, Filling.ZEROPAGE, mode))


def uffd_continue(machine: Machine, userfaultfd_id: int, span: AddressRange, mode: int = 0) -> Operation[Filled]:
    """UFFDIO_CONTINUE, as `uffdio.fill`: map the pages that the shared memory has."""
    return (yield from uffdio.fill(*machine.userfaultfd(userfaultfd_id), span, Filling.CONTINUE, mode))


@immediate
def uffd_wake(machine: Machine, userfaultfd_id: int, span: AddressRange) -> None:
    """UFFDIO_WAKE, as `uffdio.wake`."""
    _, userfaultfd = machine.userfaultfd(userfaultfd_id)
    uffdio.wake(userfaultfd, span)


@immediate
def read_userfaults(machine: Machine, userfaultfd_id: int, most: int) -> tuple[UserfaultMessage, ...]:
    """read(2): the oldest userfaults that have not been read, at most so many; none if there is none (EAGAIN).

    Source: Linux fs/userfaultfd.c, userfaultfd_read().
    """
    _, userfaultfd = machine.userfaultfd(userfaultfd_id)
    return tuple(
        UserfaultMessage(fault.address, fault.npages, fault.write, fault.operation_id, fault.minor)
        for fault in userfaultfd.read(most)
    )
