"""Userfaultfds: somebody else brings in the pages that a process misses, and accesses wait until it has.

A userfaultfd belongs to one address space.  VMAs that are registered with it (`Mapping.userfaultfd`, uffdio.py) do not
get pages by being touched: a touch becomes a `Userfault`, which waits in two steps, as in the kernel:

    pending   its handler has not read it yet
    told      read; it waits until the handler wakes its address

Who is woken looks again, and waits anew if the page is still missing.

**Source**: Linux fs/userfaultfd.c (handle_userfault(), userfaultfd_ctx_read(), wake_userfault()), 6.12.

**Invariants**: what waits is in `faults` exactly until it is woken or given up; a closed userfaultfd has none.

**Absent**: write-protect faults (their mode is EINVAL), events (EVENT_FORK, EVENT_REMAP, EVENT_REMOVE,
EVENT_UNMAP: registrations go as they do without), UFFD_FEATURE_THREAD_ID and EXACT_ADDRESS, UFFD_USER_MODE_ONLY.
The end of one of several processes that share an address space ends no wait; the end of the space ends all.

Differs: a message says how many pages of the access are missing in a row, so that a handler can bring them in at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntFlag

from hmm.operation import Await, Current, Operation, WaitFor
from hmm.units import PAGE_SIZE, Address, AddressRange, SpaceId

__all__ = ["Userfault", "UserfaultFeature", "Userfaultfd"]


class UserfaultFeature(IntFlag):
    """The UFFD_FEATURE_ bits that there are."""

    MISSING_SHMEM = 1 << 5
    SIGBUS = 1 << 7
    MINOR_SHMEM = 1 << 10


_NO_FEATURES = UserfaultFeature(0)


@dataclass(slots=True, eq=False)
class Userfault:
    """One access that waits: `struct userfaultfd_wait_queue`.

    Attributes:
        ticket: numbers the waits of one userfaultfd.
        operation_id: the call that waits.
        address: of the page that it waits for.
        npages: so many pages from there on are missing, and the access is about to touch them.
        write: UFFD_PAGEFAULT_FLAG_WRITE.
        minor: UFFD_PAGEFAULT_FLAG_MINOR: the pages are in the shared memory, and only not mapped.
        told: its handler has read it.
    """

    ticket: int
    operation_id: int
    address: Address
    npages: int
    write: bool
    minor: bool = False
    told: bool = False


@dataclass(slots=True, eq=False)
class Userfaultfd:
    """`struct userfaultfd_ctx`.

    Attributes:
        owner, handler: the token of whoever made it, and the name that `pending` shows.
        faults: what waits, by ticket, the oldest first.
    """

    id: int
    space_id: SpaceId
    current: Current
    owner: str = ""
    handler: str = ""
    features: UserfaultFeature = _NO_FEATURES
    faults: dict[int, Userfault] = field(default_factory=dict)
    _tickets: int = 0

    def __str__(self) -> str:
        return f"userfaultfd {self.id}"

    def handle(self, address: Address, npages: int, *, write: bool, minor: bool = False) -> Operation[None]:
        """Wait until the handler wakes this page: handle_userfault()."""
        self._tickets += 1
        fault = Userfault(self._tickets, self.current.operation_id, address, npages, write, minor)
        self.faults[fault.ticket] = fault
        try:
            page = AddressRange(address, address + PAGE_SIZE)
            yield Await(WaitFor.USERFAULT, self.space_id, (page,), ticket=fault.ticket, userfaultfd=self.id)
        finally:
            self.faults.pop(fault.ticket, None)

    def read(self, most: int) -> list[Userfault]:
        """The oldest faults that the handler has not been told of, at most so many; from now on it has."""
        pending = [fault for fault in self.faults.values() if not fault.told][:most]
        for fault in pending:
            fault.told = True
        return pending

    def wake(self, span: AddressRange) -> None:
        """Let what waits for a page of `span` look again, told or not: wake_userfault()."""
        for fault in [fault for fault in self.faults.values() if span.start <= fault.address < span.end]:
            del self.faults[fault.ticket]

    def wake_all(self) -> None:
        """Let everything that waits look again."""
        self.faults.clear()
