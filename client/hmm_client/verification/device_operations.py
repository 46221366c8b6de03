"""Performing what a kernel trace does through devices: the two cards of the test driver, their handles, and pins.

Every process is observed through each card besides, for the snapshots that the trace's states show.
The driver runs in the profile of the kernel that the traces are from, but for its time limit.

**Source**: Linux lib/test_hmm.c, mm/gup_test.c and fs/file_table.c, 6.12; the format of `hmm_client.recordings.ktrace`.

**Invariants**: a handle acts on the process that opened it, whoever calls; it lives until it is closed and mapped by
nobody.

**Absent**: comparing (`comparison`); all that is not done through a device (`operations`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from hmm.errors import InvalidRequestError
from hmm.units import PAGE_SHIFT, PAGE_SIZE, Address, AddressRange, ProcessId
from hmm_client.drivers.dmirror import LINUX_6_12_CORRECTED, Card, Handle, Observer, Reply
from hmm_client.recordings.ktrace import Operation, Result, fingerprint
from hmm_client.verification.subject import Devices

CARDS = 2

# Traces record no timing, and the kernel they are from had nothing else to do: a slow machine is no late fault.
_PROFILE = replace(LINUX_6_12_CORRECTED, range_timeout_s=60.0)


@dataclass(slots=True, eq=False)
class _OpenFile:
    """An open file of a card: struct file.

    Attributes:
        id: the subject's, of the file that mappings of it show; 0 until it is mapped.
    """

    handle: Handle
    id: int = 0


class DeviceRun:
    """The devices of one trace under way."""

    def __init__(self, devices: Devices, base: Address) -> None:
        self._devices = devices
        self._base = base
        self._cards = [Card(devices.hmm, f"dmirror{n}", profile=_PROFILE) for n in range(CARDS)]
        self._open_files: dict[int, _OpenFile] = {}
        self._closed: list[_OpenFile] = []
        self._observers: dict[int, list[Observer]] = {}
        self._pinned = 0
        self.performers: Mapping[str, Callable[[Operation, ProcessId], Result]] = {
            "open": self._open,
            "close": self._close,
            "release": self._release,
            "dread": self._dread,
            "dwrite": self._dwrite,
            "mig_dev": self._mig_dev,
            "mig_sys": self._mig_sys,
            "snap": self._snap,
            "excl": self._excl,
            "chk_excl": self._chk_excl,
            "pin": self._pin,
            "unpin": self._unpin,
        }

    def born(self, process: int, process_id: ProcessId) -> None:
        """A process of the trace is there from now on."""
        self._observers[process] = [self._devices.hmm.observe(card.id, process_id) for card in self._cards]

    def snapshots(self, processes: Sequence[int], window: AddressRange) -> list[list[bytes]]:
        """What each card's snapshot of each process shows: one byte per page."""
        observers = [observer for process in processes for observer in self._observers[process]]
        words = self._devices.hmm.snapshots(observers, window)
        shown = [self._cards[number % CARDS].shown(part) for number, part in enumerate(words)]
        return [shown[first : first + CARDS] for first in range(0, len(shown), CARDS)]

    def file_of(self, handle: int) -> int:
        """The file that mappings of a handle show, made when it is first mapped."""
        file = self._open_files[handle]
        file.id = file.id or self._devices.driver_file(f"dmirror-handle{handle}")
        return file.id

    @property
    def has_closed(self) -> bool:
        """A file is closed that its driver has not released."""
        return bool(self._closed)

    def release_unmapped(self, mapped: Collection[int]) -> None:
        """__fput(): the driver releases what is closed and mapped nowhere; `mapped` are the ids of files that are."""
        released = [file for file in self._closed if file.id not in mapped]
        self._closed = [file for file in self._closed if file.id in mapped]
        for file in released:
            file.handle.close()

    def _where(self, operation: Operation) -> tuple[Handle, Address, int]:
        args = operation.args
        return self._open_files[args.h].handle, self._address(operation), args.n

    def _address(self, operation: Operation) -> Address:
        return self._base + (operation.args.page << PAGE_SHIFT) + operation.args.unaligned

    def _open(self, operation: Operation, process_id: ProcessId) -> Result:
        self._open_files[operation.args.h] = _OpenFile(self._cards[operation.args.dev].open(process_id))
        return Result(0)

    def _close(self, operation: Operation, _: ProcessId) -> Result:
        self._closed.append(self._open_files.pop(operation.args.h))
        return Result(0)

    def _release(self, operation: Operation, _: ProcessId) -> Result:
        handle, address, npages = self._where(operation)
        handle.release(address, npages)
        return Result(0)

    def _dread(self, operation: Operation, _: ProcessId) -> Result:
        handle, address, npages = self._where(operation)
        reply = handle.read(address, npages)
        return Result(0, data=_fingerprints(reply), cpages=reply.cpages, faults=reply.faults)

    def _dwrite(self, operation: Operation, _: ProcessId) -> Result:
        handle, address, npages = self._where(operation)
        data = b"".join(bytes([(operation.args.val + k) & 0xFF]) * PAGE_SIZE for k in range(npages))
        reply = handle.write(address, data)
        return Result(0, cpages=reply.cpages, faults=reply.faults)

    def _mig_dev(self, operation: Operation, _: ProcessId) -> Result:
        handle, address, npages = self._where(operation)
        reply = handle.migrate_to_device(address, npages)
        return Result(0, data=_fingerprints(reply), cpages=reply.cpages)

    def _mig_sys(self, operation: Operation, _: ProcessId) -> Result:
        handle, address, npages = self._where(operation)
        return Result(0, cpages=handle.migrate_to_system(address, npages).cpages)

    def _snap(self, operation: Operation, _: ProcessId) -> Result:
        handle, address, npages = self._where(operation)
        reply = handle.snapshot(address, npages)
        return Result(0, prot=reply.data, cpages=reply.cpages)

    def _excl(self, operation: Operation, _: ProcessId) -> Result:
        handle, address, npages = self._where(operation)
        reply = handle.exclusive(address, npages)
        return Result(0, data=_fingerprints(reply), cpages=reply.cpages)

    def _chk_excl(self, operation: Operation, _: ProcessId) -> Result:
        handle, address, npages = self._where(operation)
        handle.check_exclusive(address, npages)
        return Result(0)

    # gup_test keeps one set of pins for all: pin_longterm_test_start().

    def _pin(self, operation: Operation, process_id: ProcessId) -> Result:
        if self._pinned:
            raise InvalidRequestError("pin: pages are pinned already")
        length = operation.args.n << PAGE_SHIFT
        if length < 0:  # unsigned there, and above LONG_MAX
            raise InvalidRequestError(f"pin: the length {length} is negative")
        self._pinned = self._devices.pin(process_id, self._address(operation), length, write=bool(operation.args.write))
        return Result(0)

    def _unpin(self, _: Operation, __: ProcessId) -> Result:
        if self._pinned:
            self._devices.unpin(self._pinned)
            self._pinned = 0
        return Result(0)


def _fingerprints(reply: Reply) -> tuple[str, ...]:
    return tuple(fingerprint(reply.data[at : at + PAGE_SIZE]) for at in range(0, len(reply.data), PAGE_SIZE))
