"""Fakes for tests: the memory of devices whose drivers copy, and what pages hold wherever they are.

`CarriedMemory` is the far end of COPY_TO_DEVICE and COPY_FROM_DEVICE: it keeps what it was given under the address
where it was told to put it, and gives back what it finds there.  So a page whose place was given to another one, or was
freed too early, is seen by its bytes.

`Contents` remembers what was written last to private pages, and looks for it in system memory, in the frames of devices
that the daemon has, and at the far end.

**Source**: linux-mm, "HMM/dummy: add fake device memory to dummy HMM device driver".

**Absent**: which pages are where (mirror_memory.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hmm import commands_device, cpu_pte, pte
from hmm.address_space import AddressSpace
from hmm.events import Event, EventType
from hmm.machine import Caller, Machine, OperationRecord
from hmm.mirror import MirrorState
from hmm.units import PAGE_SHIFT, PAGE_SIZE, MirrorId, page_down, page_up

EIO = 5
"""What a page that failed is answered with."""


class LostPageError(AssertionError):
    """A device is asked for a page that it was never given."""


@dataclass(slots=True)
class CarriedMemory:
    """The memories of all devices of a machine.

    Attributes:
        pages: what stands where: (device, address in its memory) -> 4096 bytes.
        fails: which pages of a copy fail, by their number in the event.
    """

    machine: Machine
    pages: dict[tuple[int, int], bytes] = field(default_factory=dict)
    fails: Callable[[Event, int], bool] = lambda _, __: False

    def carry(self, mirror_id: MirrorId, event: Event) -> bytes:
        """Do what a driver does with the event of a copy.  Returns: its results."""
        caller = Caller(name="driver", token=self.machine.receivers[mirror_id].owner)
        failed = [self.fails(event, number) for number in range(event.npages)]
        places = [(event.owner, address) for address in self.addresses(event)]
        if event.etype is EventType.COPY_TO_DEVICE:
            record = self.machine.start(caller, commands_device.read_copy, mirror_id, event.copy, 0, event.npages)
            if record.error is not None:  # the daemon no longer waits for this copy
                return bytes(event.npages)
            for number, place in enumerate(places):
                if not failed[number]:
                    self.pages[place] = record.result[number << PAGE_SHIFT : (number + 1) << PAGE_SHIFT]
            return bytes(EIO * one for one in failed)
        for number, place in enumerate(places):
            if failed[number]:
                continue
            if place not in self.pages:
                raise LostPageError(f"mirror {mirror_id} has nothing at {place[1]:#x}, asked by {event}")
            data = self.pages[place]
            brought = self.machine.start(caller, commands_device.write_copy, mirror_id, event.copy, number, data)
            if not event.keeps and brought.error is None:
                del self.pages[place]
        return bytes(EIO * one for one in failed)

    @staticmethod
    def addresses(event: Event) -> list[int]:
        """Where in the device's memory the pages of a copy are, in order."""
        addresses: list[int] = pte.pte_dev_addr(np.frombuffer(event.entries, "<u8").copy()).tolist()
        return addresses

    def write(self, device_id: int, address: int, data: bytes) -> None:
        """The device writes the start of a page of its memory."""
        old = self.pages[device_id, address]
        self.pages[device_id, address] = data + old[len(data) : PAGE_SIZE]


class WrongContentsError(AssertionError):
    """A page does not hold what was written to it last."""


_HARMLESS = frozenset(
    {
        "read_memory", "fault", "migrate", "migrate_back", "fork", "clone_thread", "create_process", "mprotect",
        "mlock", "msync", "register_device", "register_mirror", "unregister_mirror", "unregister_device",
        "dirty_range", "discard_range", "open_file", "pin", "unpin", "read_copy", "write_copy",
        "evict_device", "truncate_file", "punch_file", "unlink_file",
    }
)  # fmt: skip
"""Calls that leave contents alone."""


@dataclass(slots=True)
class Contents:
    """What private pages have to hold: (address space, page) -> the byte that all of it is made of.

    A page is known from a write of all of it, which no other call that may change it overlapped, to the start of one.

    Attributes:
        losing: spaces with a mirror that was lost or killed, or failed to copy a page: there pages may be poison.
    """

    machine: Machine
    memory: CarriedMemory
    known: dict[tuple[int, int], int] = field(default_factory=dict)
    losing: set[int] = field(default_factory=set)
    _writing: dict[int, set[int]] = field(default_factory=dict)  # by operation: the pages that others may have changed

    def finished(self, record: OperationRecord[Any]) -> None:
        """Take note of what a call wrote."""
        self._forget(record)
        overlapped = self._writing.pop(record.id, set())
        if record.name != "write_memory" or record.error is not None or record.result.signal is not None:
            return
        process, address, data = record.arguments
        space = self.machine.processes[process].space if process in self.machine.processes else None
        for page in range(page_up(address), page_down(address + len(data)), PAGE_SIZE):
            vma = space.vmas.find(page) if space is not None else None
            if space is not None and vma is not None and vma.backing is None and page not in overlapped:
                self.known[space.id, page] = data[0]

    def check(self, running: Iterable[OperationRecord[Any]]) -> None:
        """Raise WrongContentsError when a page that nobody is changing holds something else."""
        for record in running:
            if record.name == "write_memory":
                self._writing.setdefault(record.id, set())
            self._forget(record)
        for mirror in self.machine.mirrors.values():
            if mirror.state is not MirrorState.LIVE:
                self.losing.add(mirror.space.id)
        for (number, page), byte in list(self.known.items()):
            space = self.machine.spaces.get(number)
            if space is None or space.notifier.closed:
                del self.known[number, page]
            else:
                self._check_page(space, page, byte)

    def _check_page(self, space: AddressSpace, page: int, byte: int) -> None:
        entry = space.table.get(page)
        if cpu_pte.is_migration(entry) or cpu_pte.is_swap(entry):
            return
        if cpu_pte.is_poison(entry) and space.id in self.losing:
            del self.known[space.id, page]
            return
        held = self._held(entry)
        if held != bytes([byte]) * PAGE_SIZE:
            raise WrongContentsError(
                f"{page:#x} of space {space.id} holds {held[:4].hex()}, not {byte:02x}; the CPU's entry is {entry:#x}"
            )

    def _held(self, entry: int) -> bytes:
        pfn = cpu_pte.cpu_pfn(entry)
        if not entry or cpu_pte.is_poison(entry):
            return b""
        region = self.machine.frames.region_of(pfn)
        if region.remote:
            return self.memory.pages.get((region.owner, (pfn - region.start) << PAGE_SHIFT), b"")
        data: bytes = self.machine.frames.gather(np.array([pfn])).tobytes()
        return data

    def _forget(self, record: OperationRecord[Any]) -> None:
        if record.name in _HARMLESS:
            return
        process = self.machine.processes.get(record.arguments[0])
        mirror = self.machine.mirrors.get(record.arguments[0])
        spaces = {one.space.id for one in (process, mirror) if one is not None}
        pages = _touched(record)
        for number, overlapped in self._writing.items():
            written = self.machine.operations.get(number)
            if number != record.id and written is not None:
                overlapped.update((_touched(written) if pages is None else pages) or ())
        for key in [key for key in self.known if key[0] in spaces and (pages is None or key[1] in pages)]:
            del self.known[key]


def _touched(record: OperationRecord[Any]) -> set[int] | None:
    """The pages that a call may change; None for all."""
    arguments = record.arguments
    if record.name in ("mmap", "munmap", "madvise"):
        spans = [(arguments[1], arguments[2])]
    elif record.name == "write_memory":
        spans = [(arguments[1], len(arguments[2]))]
    elif record.name == "mremap":
        _, start, old, new, _, target = arguments
        spans = [(start, max(old, new)), (target, new)]
    elif record.name == "device_write":
        spans = arguments[1]
    else:
        return None
    return {page for start, length in spans for page in range(page_down(start), start + length, PAGE_SIZE)}
