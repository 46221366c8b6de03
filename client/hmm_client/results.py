"""What calls return: values of the model, not messages.

**Source**: the responses of proto/hmm_proto/v1.

**Absent**: errors; they are raised, as the classes of `hmm.errors`.
"""

from __future__ import annotations

from dataclasses import dataclass

from hmm.errors import HmmError, SegmentationFault, Signal
from hmm.file import FileKind
from hmm.smaps import MemoryUse
from hmm.units import PAGE_SIZE, Address, AddressRange, Entries, MirrorId, page_up
from hmm_client.channel import DaemonError


@dataclass(frozen=True, slots=True)
class Completed:
    """A call that was made and succeeded.

    Attributes:
        operation_id: names the call in events, logs and `pending`.
        fenced_mirrors: mirrors that were lost while the call waited for them.
    """

    operation_id: int
    fenced_mirrors: tuple[MirrorId, ...]


@dataclass(frozen=True, slots=True)
class Mapped(Completed):
    """A mapping was made or moved.

    Attributes:
        address: its first byte.
        length: as asked for, in bytes.
        placement: where the daemon would have put it by itself; 0 when it was not asked.
    """

    address: Address
    length: int
    placement: Address = 0

    @property
    def span(self) -> AddressRange:
        """The pages of the mapping."""
        return AddressRange(self.address, page_up(self.address + self.length))

    def page(self, index: int) -> AddressRange:
        """One of its pages, from 0."""
        return AddressRange(self.address + index * PAGE_SIZE, self.address + (index + 1) * PAGE_SIZE)


@dataclass(frozen=True, slots=True)
class ProgramBreak(Completed):
    """The program break after brk(): where it was when it could not be moved."""

    address: Address


@dataclass(frozen=True, slots=True)
class Residency(Completed):
    """What mincore() says: one byte for each page, bit 0 for *in memory*."""

    pages: bytes


@dataclass(frozen=True, slots=True, eq=False)
class PageMap(Completed):
    """What /proc/PID/pagemap says: uint64[npages], read-only; the bits are those of `hmm.pagemap`."""

    entries: Entries


@dataclass(frozen=True, slots=True)
class Born(Completed):
    """A child or a thread was made.

    Attributes:
        process_id: of the child.
    """

    process_id: int


@dataclass(frozen=True, slots=True)
class Accessed(Completed):
    """How far a CPU's access came.

    Attributes:
        done: bytes, or pages for `touch` and `access_pages`.
        data: what was read.
        signal: what stopped the CPU; None when the access was completed.
        address: the byte that could not be accessed; 0 without a signal.
    """

    done: int
    data: bytes = b""
    signal: Signal | None = None
    address: Address = 0

    def require(self, what: str) -> Accessed:
        """Itself, if no signal came.

        Raises:
            SegmentationFault: one came; what is below `error.address` was done.
        """
        if self.signal is not None:
            raise SegmentationFault(f"{what}: {self.signal.value} at {self.address:#x}", self.signal, self.address)
        return self


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one call of a batch ended: with a value or with an error.

    Attributes:
        value: what the call alone would have returned.
        error: what it would have raised.
    """

    value: object = None
    error: HmmError | DaemonError | None = None


@dataclass(frozen=True, slots=True)
class MapsLine:
    """One mapping of a process: a line of /proc/PID/maps.

    Attributes:
        permissions: four characters such as "rw-p".
        offset: in the file, bytes; 0 for private anonymous memory.
        file_id, file_name: 0 and "" for anonymous memory.
        vm_flags: the kernel's VM_ bits.
        resident_pages: pages that have a frame.
        on_devices: of these those that are in the memory of devices: name and number of pages.
    """

    start: Address
    end: Address
    permissions: str
    offset: int
    file_id: int
    file_name: str
    vm_flags: int
    resident_pages: int
    on_devices: tuple[tuple[str, int], ...] = ()

    @property
    def span(self) -> AddressRange:
        """The addresses of the mapping."""
        return AddressRange(self.start, self.end)


@dataclass(frozen=True, slots=True)
class Maps:
    """The mappings of a process, ascending, and where more of them would go."""

    lines: tuple[MapsLine, ...]
    brk_start: Address
    brk_end: Address
    mmap_base: Address


@dataclass(frozen=True, slots=True)
class MappingUse:
    """One mapping of a process, as /proc/PID/smaps shows it.

    Attributes:
        vm_flags: two letters for each.
        use: what it costs, in bytes.
    """

    line: MapsLine
    vm_flags: str
    use: MemoryUse


@dataclass(frozen=True, slots=True)
class FileStatus:
    """What fstat() says of a file."""

    file_id: int
    name: str
    kind: FileKind
    size_bytes: int
    resident_pages: int
