"""Performing what a kernel trace says: its operations, in its units, on a subject.

**Source**: Linux tools/testing/selftests/mm; the format of `hmm_client.recordings.ktrace`.

**Invariants**: what is performed is what the trace asked for; what comes back is in the trace's own terms, so that
the two can be compared field by field.

**Absent**: comparing (`comparison`); what devices do (`device_operations`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from hmm.address_space import Thp
from hmm.errors import HmmError, errno_name
from hmm.madvise import Advice
from hmm.mremap import MremapFlag
from hmm.units import PAGE_SHIFT, PAGE_SIZE, Address, AddressRange, ProcessId
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot
from hmm_client.recordings.errors import TraceError
from hmm_client.recordings.ktrace import MapsLine, Operation, Result, Trace, fingerprint
from hmm_client.verification.device_operations import DeviceRun
from hmm_client.verification.subject import Access, Region, Subject

_PROT = {"r": Prot.READ, "w": Prot.WRITE, "x": Prot.EXEC}
_SHARING = {"private": MapFlag.PRIVATE, "shared": MapFlag.SHARED}
_MODES = {
    "inplace": MremapFlag(0),
    "move": MremapFlag.MAYMOVE | MremapFlag.FIXED,
    "dontunmap": MremapFlag.MAYMOVE | MremapFlag.FIXED | MremapFlag.DONTUNMAP,
}
FILES = ("f0", "f1", "f2")
SHARED_MEMORY = "shm"
ANONYMOUS = "anon"


class TraceRun:
    """One trace under way on one subject.

    Attributes:
        processes: the trace's number of each live process -> the subject's.
        files: the subject's id of each of the trace's files.
    """

    def __init__(self, trace: Trace, subject: Subject) -> None:
        header = self._header = trace.header
        self._path = trace.path
        self._subject = subject
        self.processes: dict[int, ProcessId] = {
            0: subject.create_process(header.fault_around_pages, Thp[header.thp.upper()])
        }
        self.files = [subject.open_file(name) for name in FILES]
        self._sources = dict(zip(self.files, FILES, strict=True))
        self._devices = DeviceRun(subject.devices, header.base)
        self._devices.born(0, self.processes[0])
        self._performers: Mapping[str, Callable[[Operation], Result]] = {
            "fork": self._fork,
            "exit": self._exit,
            "mmap": self._mmap,
            "munmap": self._munmap,
            "mprotect": self._mprotect,
            "madvise": self._madvise,
            "mremap": self._mremap,
            "rd": self._rd,
            "wr": self._wr,
            "dump": self._dump,
            "ftruncate": self._ftruncate,
            "fwrite": self._fwrite,
            "fread": self._fread,
            "fpunch": self._fpunch,
        }

    def perform(self, operation: Operation) -> Result:
        """Perform one operation; what it returned, as the trace would write it.

        Raises:
            TraceError: its arguments name something that there is not.
        """
        result = self._returned(operation)
        if self._devices.has_closed:
            self._devices.release_unmapped(self._mapped_files())
        return result

    def _returned(self, operation: Operation) -> Result:
        try:
            if operation.name in self._performers:
                return self._performers[operation.name](operation)
            return self._devices.performers[operation.name](operation, self.processes[operation.process])
        except HmmError as error:
            return Result(-1, errno_name(error.errno))
        except (KeyError, IndexError, ValueError) as error:
            raise TraceError(
                f"{operation.name}: {error} is nothing that is known", self._path, operation.line
            ) from error

    @property
    def window(self) -> AddressRange:
        """The addresses of the trace."""
        return AddressRange(self._header.base, self._header.base + (self._header.window << PAGE_SHIFT))

    def maps(self, process: int) -> tuple[MapsLine, ...]:
        """A process's maps as the trace writes them."""
        return tuple(self._line(region) for region in self._subject.maps(self.processes[process]))

    def pagemaps(self, processes: Sequence[int]) -> list[bytes]:
        """The page map of each process."""
        return self._subject.pagemaps([self.processes[process] for process in processes], self.window)

    def snapshots(self, processes: Sequence[int]) -> list[list[bytes]]:
        """What the two devices see of each process, one byte per page."""
        return self._devices.snapshots(processes, self.window)

    def _mapped_files(self) -> set[int]:
        regions = (region for process_id in self.processes.values() for region in self._subject.maps(process_id))
        return {region.file_id for region in regions if region.file_id}

    def _line(self, region: Region) -> MapsLine:
        source = self._sources.get(region.file_id, SHARED_MEMORY) if region.file_id else ANONYMOUS
        first, end = self._page(region.start), self._page(region.end)
        return MapsLine(first, end, region.permissions, region.offset >> PAGE_SHIFT, source)

    def _page(self, address: Address) -> int:
        return (address - self._header.base) >> PAGE_SHIFT

    def _address(self, page: int) -> Address:
        return self._header.base + (page << PAGE_SHIFT)

    def _where(self, operation: Operation) -> tuple[ProcessId, Address, int]:
        args = operation.args
        return self.processes[operation.process], self._address(args.page) + args.unaligned, args.n << PAGE_SHIFT

    # ---- processes

    def _fork(self, operation: Operation) -> Result:
        child = self.processes[operation.args.q] = self._subject.fork(self.processes[operation.process])
        self._devices.born(operation.args.q, child)
        return Result(0)

    def _exit(self, operation: Operation) -> Result:
        self._subject.exit(self.processes.pop(operation.process))
        return Result(0)

    # ---- mappings

    def _mmap(self, operation: Operation) -> Result:
        process_id, address, length = self._where(operation)
        args = operation.args
        flags = _SHARING[args.flags] | (MapFlag.FIXED_NOREPLACE if args.noreplace else MapFlag.FIXED)
        flags |= MapFlag.POPULATE if args.populate else MapFlag(0)
        file_id = 0
        if args.src == ANONYMOUS:
            flags |= MapFlag.ANONYMOUS
        elif args.src in FILES:
            file_id = self.files[FILES.index(args.src)]
        else:
            file_id = self._devices.file_of(int(args.src.removeprefix("d")))
        at = self._subject.mmap(process_id, address, length, _prot(args.prot), flags, file_id, args.off << PAGE_SHIFT)
        return Result(self._page(at))

    def _munmap(self, operation: Operation) -> Result:
        self._subject.munmap(*self._where(operation))
        return Result(0)

    def _mprotect(self, operation: Operation) -> Result:
        self._subject.mprotect(*self._where(operation), _prot(operation.args.prot))
        return Result(0)

    def _madvise(self, operation: Operation) -> Result:
        self._subject.madvise(*self._where(operation), Advice[operation.args.adv])
        return Result(0)

    def _mremap(self, operation: Operation) -> Result:
        args = operation.args
        flags = _MODES[args.mode]
        to = self._address(args.to) if flags & MremapFlag.FIXED else 0
        at = self._subject.mremap(*self._where(operation), args.new << PAGE_SHIFT, flags, to)
        return Result(self._page(at))

    # ---- accesses

    def _rd(self, operation: Operation) -> Result:
        process_id, address, _ = self._where(operation)
        access = self._subject.read_pages(process_id, address + operation.args.off, operation.args.n)
        return self._accessed(access, access.data)

    def _wr(self, operation: Operation) -> Result:
        process_id, address, _ = self._where(operation)
        values = _values(operation)
        return self._accessed(self._subject.write_pages(process_id, address + operation.args.off, values), None)

    def _accessed(self, access: Access, values: bytes | None) -> Result:
        if access.signal is None:
            return Result(access.done, vals=values)
        return Result(access.done, sig=access.signal.value, sigpage=self._page(access.address), vals=values)

    def _dump(self, operation: Operation) -> Result:
        process_id, address, _ = self._where(operation)
        accesses = self._subject.dump(process_id, address, operation.args.n)
        return Result(0, data=tuple(_fingerprint_or_signal(access) for access in accesses))

    # ---- files

    def _ftruncate(self, operation: Operation) -> Result:
        self._subject.truncate(self.files[operation.args.f], operation.args.n << PAGE_SHIFT)
        return Result(0)

    def _fwrite(self, operation: Operation) -> Result:
        args = operation.args
        for k, value in enumerate(_values(operation)):
            self._subject.write_file(self.files[args.f], ((args.page + k) << PAGE_SHIFT) + args.off, bytes([value]))
        return Result(args.n)

    def _fread(self, operation: Operation) -> Result:
        args = operation.args
        data = self._subject.read_file(self.files[args.f], args.page << PAGE_SHIFT, args.n << PAGE_SHIFT)
        whole = len(data) >> PAGE_SHIFT
        pages = (data[k << PAGE_SHIFT : (k + 1) << PAGE_SHIFT] for k in range(whole))
        return Result(whole, data=tuple(map(fingerprint, pages)))

    def _fpunch(self, operation: Operation) -> Result:
        args = operation.args
        self._subject.punch(self.files[args.f], args.page << PAGE_SHIFT, args.n << PAGE_SHIFT)
        return Result(0)


def _prot(letters: str) -> Prot:
    prot = Prot(0)
    for letter in "" if letters == "none" else letters:
        prot |= _PROT[letter]
    return prot


def _values(operation: Operation) -> bytes:
    return bytes((operation.args.val + k) & 0xFF for k in range(operation.args.n))


def _fingerprint_or_signal(access: Access) -> str:
    if access.signal is not None:
        return access.signal.value
    assert len(access.data) == PAGE_SIZE, len(access.data)
    return fingerprint(access.data)
