"""What pages have to hold while calls run beside each other: a model that knows nothing of frames and tables.

A page is known when all of it was written with one byte, or when it is fresh, and nothing that may change it was under
way at the same time.  From then on it holds that byte wherever it is: in a frame of the system or of a device, in a
slot of the swap area, with a driver that carries it, copied by fork or moved by mremap.  Whoever reads it, CPU or
device, reads that byte.  A call that may change it makes it unknown, until it is written again.

    private page    (address space, address)      shared page    (minus the file, number of the page)

**Source**: our own.

**Invariants**: a known page holds its byte after every step; a read during which a page did not change returns it; a
pinned private page stays in its frame.

**Absent**: private mappings of files; how calls do what they do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.file import File, FileKind
from hmm.frames import ZERO_PFN, PageFlag
from hmm.interval_notifier import IntervalMirror
from hmm.machine import Machine
from hmm.madvise import Advice
from hmm.mirror import MirrorState
from hmm.operation_record import OperationRecord
from hmm.swap import area_of, slots_of
from hmm.testing_memory import CarriedMemory
from hmm.units import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE, AddressRange, Entries, page_down, page_up
from hmm.vma import Vma, VmFlag

Key: TypeAlias = tuple[int, int]
"""A page; see above."""
Part: TypeAlias = tuple[int, int]
"""Start and length, in bytes."""


class WrongContentsError(AssertionError):
    """A page does not hold, or a read did not return, what was written last."""


class MovedPageError(AssertionError):
    """A pinned page is not where it was pinned."""


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """What is known of a page since one moment: the byte that all of it is made of."""

    byte: int


@dataclass(slots=True, eq=False)
class _UnderWay:
    """An operation that has begun.

    Attributes:
        space: that it works on, looked up when it began.
        before: what was known then.
        changed: pages that others may have changed since; None stands for all of a space, or for all files.
        punched: pages that it makes holes of, mapped or not any more.
    """

    space: AddressSpace | None
    before: dict[Key, Known]
    changed: set[Key | tuple[int, None]] = field(default_factory=set)
    punched: set[Key | tuple[int, None]] = field(default_factory=set)

    def is_undisturbed(self, key: Key) -> bool:
        """Whether nobody else may have changed a page."""
        return key not in self.changed and (_group(key), None) not in self.changed


ALL_FILES = -1
"""The number under which all shared pages are changed at once; files have smaller ones."""

_HARMLESS = frozenset(
    {
        "attach", "brk", "clear_refs", "clone_thread", "close_file", "close_userfaultfd", "create_process",
        "create_userfaultfd", "detach", "device_frames", "device_read", "dirty_range", "discard_range", "evict_device",
        "fault", "find_vma", "fork", "give_back_exclusive", "inject_allocation_failure", "inject_copy_failure",
        "inject_dma_failure", "insert_notifier", "make_exclusive", "migrate", "migrate_back", "migrate_to_device",
        "migrate_to_system", "mincore", "mirror_fault", "mlock", "mlockall", "mprotect", "msync", "munlock",
        "munlockall", "open_file", "pagemap", "pin", "range_fault", "range_fault_unlocked", "read_begin", "read_copy",
        "read_dma", "read_file", "read_frames", "read_memory", "read_pages", "read_retry", "read_table",
        "read_userfaults", "register_device", "scan_ksm", "register_mirror", "remove_notifier", "set_driver_bits",
        "touch",
        "uffd_continue", "uffd_register", "uffd_unregister", "uffd_wake", "uffd_zeropage", "unlink_file", "unpin",
        "unregister_device", "unregister_mirror", "vfork", "write_copy", "dma_map", "dma_unmap", "inject_touch_failure",
        "inject_migration_failure", "open_device_file", "migrate_vma_setup", "migrate_vma_allocate", "migrate_vma_copy",
        "migrate_vma_read", "migrate_vma_write", "migrate_vma_pages", "migrate_vma_finalize",
    }
)  # fmt: skip
"""Calls that leave contents alone."""
_ENDING = frozenset({"exit_process", "exec_process", "process_mrelease"})
"""Calls that end private memory, and leave that of files alone."""
_DROPPING = frozenset({Advice.DONTNEED, Advice.FREE, Advice.REMOVE, Advice.DONTNEED_LOCKED, Advice.HWPOISON})
"""Advice that throws contents away."""


@dataclass(slots=True)
class Contents:
    """What pages have to hold.

    Attributes:
        tracked: the pages that are looked at, by address.
        memory: what drivers that carry pages have.
        losing: spaces with a mirror that was lost or killed, or whose copies may fail: there pages may be poison.
        compared: how many pages were compared, and how many pages that calls read.
        pinned: pin -> private page -> the frame where it stays, as long as nothing else is mapped there.
    """

    machine: Machine
    tracked: Sequence[int]
    known: dict[Key, Known] = field(default_factory=dict)
    losing: set[int] = field(default_factory=set)
    compared: int = 0
    pinned: dict[int, dict[Key, int]] = field(default_factory=dict)
    memory: CarriedMemory = field(init=False)
    _under_way: dict[int, _UnderWay] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.memory = CarriedMemory(self.machine)

    def finished(self, record: OperationRecord[Any]) -> None:
        """Take note of what a call did, and look at what it read."""
        one = self._begin(record)
        self._forget(record, one)
        del self._under_way[record.id]
        if record.error is not None or one.space is None:
            return
        match record.name:
            case "write_memory" | "device_write" | "write_frames" | "write_dma":
                self._learn_written(record, one, one.space)
            case "uffd_copy":
                self._learn_filled(record, one, one.space)
            case "mmap":
                self._learn_mapped(record, one, one.space)
            case "madvise":
                self._learn_dropped(record, one, one.space)
            case "mremap":
                self._learn_moved(record, one, one.space)
            case "fork":
                self._learn_forked(record, one, one.space)
            case "pin":
                self._learn_pinned(record, one, one.space)
            case "read_memory" | "device_read" | "read_frames" | "read_dma":
                self._look_at_read(record, one, one.space)

    def check(self, running: Iterable[OperationRecord[Any]]) -> None:
        """Raise WrongContentsError when a page that nobody is changing holds something else."""
        for record in running:
            self._forget(record, self._begin(record))
        for mirror in self.machine.mirrors.values():
            if mirror.state is not MirrorState.LIVE or mirror.id in self.machine.frames.failing_copies:
                self.losing.add(mirror.space.id)
        places: dict[int, list[int]] = {}
        for number, page in self.known:
            places.setdefault(number, []).append(page)
        for number, pages in places.items():
            if number > 0:
                self._check_space(number, pages)
            else:
                self._check_file(number, pages)
        for pin, frames in self.pinned.items():
            if pin in self.machine.pins:
                self._check_pinned(pin, frames)

    # ---- what calls change

    def _begin(self, record: OperationRecord[Any]) -> _UnderWay:
        one = self._under_way.get(record.id)
        if one is None:
            one = self._under_way[record.id] = _UnderWay(self._space_of(record), dict(self.known))
        return one

    def _space_of(self, record: OperationRecord[Any]) -> AddressSpace | None:
        if not record.arguments:
            return None
        if record.name in _OF_MIRRORS:
            receiver = self.machine.receivers.get(record.arguments[0])
            return None if receiver is None else receiver.space
        if record.name == "uffd_copy":
            return self.machine.userfaultfds.get(record.arguments[0])
        process = self.machine.processes.get(record.arguments[0])
        return None if process is None else process.space

    def _forget(self, record: OperationRecord[Any], one: _UnderWay) -> None:
        changed = set(self._changed(record, one.space))
        if record.name == "madvise" and record.arguments[3] is Advice.REMOVE:
            changed = one.punched = one.punched | changed
        if not changed:
            return
        for number, other in self._under_way.items():
            if number != record.id:
                other.changed |= changed
        whole = {number for number, page in changed if page is None}
        gone = set() if one.space is None else {(one.space.id, p) for p in self._pages(self._remapped(record) or ())}
        for frames in self.pinned.values():
            for key in [key for key in frames if key[0] in whole or key in gone]:
                del frames[key]
        for key in [key for key in self.known if key in changed or _group(key) in whole]:
            del self.known[key]

    def _changed(self, record: OperationRecord[Any], space: AddressSpace | None) -> Iterator[Key | tuple[int, None]]:
        """The pages that a call may have changed in the step that was taken."""
        if record.name in _HARMLESS:
            return
        if record.name in ("truncate_file", "punch_file", "write_file"):
            yield ALL_FILES, None
            return
        written, mapped = self._written(record), self._remapped(record)
        if space is None:
            return
        if written is None and mapped is None:
            yield space.id, None
            if record.name not in _ENDING:
                yield ALL_FILES, None
        for page in self._pages(mapped or ()):
            yield space.id, page
        parts = written or ()
        low, high = self.tracked[0], self.tracked[-1] + PAGE_SIZE
        if any(start < low or start + length > high for start, length in parts):
            yield ALL_FILES, None  # which may be mapped somewhere else, too
        for page in self._pages(parts):
            key = self._key(space, page)
            if key is not None:
                yield key
        if self.is_sparse:
            yield from self._shared_pages(space, parts)

    @property
    def is_sparse(self) -> bool:
        """Whether there are pages between those that are tracked."""
        return len(self.tracked) << PAGE_SHIFT < self.tracked[-1] + PAGE_SIZE - self.tracked[0]

    @staticmethod
    def _shared_pages(space: AddressSpace, parts: Sequence[Part]) -> Iterator[Key]:
        """Pages of files at addresses that are not tracked; they may be mapped where they are."""
        for start, length in parts:
            span = AddressRange(start, start + length)
            for vma in [*space.vmas.overlapping(span), *space.detached]:
                if vma.shared and isinstance(vma.backing, File) and vma.start < span.end and span.start < vma.end:
                    first, last = (vma.page_offset(at) for at in (max(start, vma.start), min(span.end, vma.end) - 1))
                    yield from ((-1 - vma.backing.id, number) for number in range(first, last + 1))

    def _written(self, record: OperationRecord[Any]) -> Sequence[Part] | None:  # noqa: PLR0911 - one for each call
        arguments = record.arguments
        match record.name:
            case "write_memory" | "uffd_copy":
                return ((arguments[1], len(arguments[2])),)
            case "write_pages":
                return ((arguments[1].start, arguments[1].size_bytes),)
            case "device_write":
                return tuple(arguments[1])
            case "write_frames":
                return tuple((address, PAGE_SIZE) for address in arguments[1].tolist())
            case "write_dma":
                return self._mapped_for_dma(record)
            case "madvise":
                return ((arguments[1], arguments[2]),) if arguments[3] is Advice.REMOVE else ()
        return None

    def _mapped_for_dma(self, record: OperationRecord[Any]) -> list[Part]:
        mirror = self.machine.receivers.get(record.arguments[0])
        dma = mirror.dma if isinstance(mirror, IntervalMirror) else None
        pages = [] if dma is None else dma.domain.addresses(record.arguments[1]).tolist()
        return [(page, PAGE_SIZE) for page in pages]

    def _remapped(self, record: OperationRecord[Any]) -> Sequence[Part] | None:
        arguments = record.arguments
        match record.name:
            case "mmap" | "munmap":
                return ((arguments[1], arguments[2]),)
            case "madvise":
                return ((arguments[1], arguments[2]),) if arguments[3] in _DROPPING else ()
            case "mremap":
                _, start, old, new, _, target = arguments
                if self.machine.limits.hugetlb_pages:  # of which whole ones are moved
                    old, new = -(-old // PMD_SIZE) * PMD_SIZE, -(-new // PMD_SIZE) * PMD_SIZE
                return (start, max(old, new)), (target, new)
        return None

    def _pages(self, parts: Iterable[Part], *, whole: bool = False) -> Iterator[int]:
        for start, length in parts:
            first, end = (page_up(start), page_down(start + length)) if whole else (page_down(start), start + length)
            yield from (page for page in self.tracked if first <= page < end)

    def _key(self, space: AddressSpace, page: int) -> Key | None:
        vma = _vma(space, page)
        if vma is None or (vma.backing is not None and not vma.shared):
            return None
        if vma.backing is None:
            return space.id, page
        if isinstance(vma.backing, File) and vma.backing.kind is FileKind.DEVICE:
            return None  # its driver's pages are mapped anew each time
        return -1 - vma.backing.id, vma.page_offset(page)

    # ---- what calls make known

    def _learn_written(self, record: OperationRecord[Any], one: _UnderWay, space: AddressSpace) -> None:
        if record.name == "write_memory" and record.result.signal is not None:
            return
        data = record.arguments[-1]
        if record.name in ("device_write", "write_frames", "write_dma"):
            data = next(argument for argument in record.arguments if isinstance(argument, bytes))
        for page in self._pages(self._written(record) or (), whole=True):
            if one.is_undisturbed((space.id, page)):  # else it may have gone to what was mapped there before
                self._learn(self._key(space, page), data[0], one)

    def _learn_filled(self, record: OperationRecord[Any], one: _UnderWay, space: AddressSpace) -> None:
        _, address, data, *_ = record.arguments
        for page in self._pages(((address, record.result.done),)):
            self._learn(self._key(space, page), data[0], one)

    def _learn(self, key: Key | None, byte: int, one: _UnderWay) -> None:
        if key is not None and one.is_undisturbed(key):
            self.known[key] = Known(byte)

    def _learn_mapped(self, record: OperationRecord[Any], one: _UnderWay, space: AddressSpace) -> None:
        """Fresh private memory is zeroes."""
        for page in self._pages(((record.result.address, record.arguments[2]),)):
            vma = _vma(space, page)
            if vma is not None and vma.backing is None:
                self._learn((space.id, page), 0, one)

    def _learn_dropped(self, record: OperationRecord[Any], one: _UnderWay, space: AddressSpace) -> None:
        """So is private memory that was thrown away."""
        _, start, length, advice = record.arguments
        for page in self._pages(((start, length),)):
            vma = _vma(space, page)
            if advice is Advice.DONTNEED and vma is not None and vma.backing is None:
                self._learn((space.id, page), 0, one)

    def _learn_moved(self, record: OperationRecord[Any], one: _UnderWay, space: AddressSpace) -> None:
        _, start, old, new, *_ = record.arguments
        for page in self._pages(((start, min(old, new)),)):
            known, target = one.before.get((space.id, page)), record.result + page - start
            vma = _vma(space, target)
            if known is None or vma is None or vma.backing is not None or target not in self.tracked:
                continue
            if one.is_undisturbed((space.id, page)):
                self._learn((space.id, target), known.byte, one)

    def _learn_forked(self, record: OperationRecord[Any], one: _UnderWay, space: AddressSpace) -> None:
        """A child has what its parent had, unless that changed meanwhile; what it wipes is zeroes."""
        child = self.machine.processes[record.result].space
        if space.id in self.losing:
            self.losing.add(child.id)
        for page in self.tracked:
            vma, known = _vma(child, page), one.before.get((space.id, page))
            if vma is None or vma.backing is not None or known is None or self.known.get((space.id, page)) is not known:
                continue
            self.known[child.id, page] = Known(0 if vma.flags & VmFlag.WIPEONFORK else known.byte)

    def _learn_pinned(self, record: OperationRecord[Any], one: _UnderWay, space: AddressSpace) -> None:
        """A private page is its process's alone now, and stays where it is; a short pin may be of the zero page."""
        _, span, *_ = record.arguments
        pin = self.machine.pins[record.result]
        pfns = pin.pfns.tolist()
        frames = self.pinned[record.result] = {}
        for page in self._pages(((span.start, span.size_bytes),)):
            vma = _vma(space, page)
            if vma is not None and vma.backing is None and one.is_undisturbed((space.id, page)):
                pfn = pfns[(page - span.start) >> PAGE_SHIFT]
                if pin.long_term or pfn != ZERO_PFN:
                    frames[space.id, page] = pfn

    # ---- what calls read

    def _look_at_read(self, record: OperationRecord[Any], one: _UnderWay, space: AddressSpace) -> None:
        result, arguments = record.result, record.arguments
        if record.name == "read_memory":
            self._compare_read(record, one, space, ((arguments[1], result.done),), result.data)
        elif record.name == "device_read":
            self._compare_read(record, one, space, arguments[1], result)
        elif record.name == "read_frames":
            parts = [(address, PAGE_SIZE) for address in arguments[1].tolist()]
            self._compare_read(record, one, space, parts, result)
        elif record.name == "read_dma":
            self._compare_read(record, one, space, self._mapped_for_dma(record), result)

    def _compare_read(
        self, record: OperationRecord[Any], one: _UnderWay, space: AddressSpace, parts: Iterable[Part], data: bytes
    ) -> None:
        position = 0
        for start, length in parts:
            for page in self._pages(((start, length),), whole=True):
                key = self._key(space, page)
                known = None if key is None else self.known.get(key)
                if key is None or known is None or one.before.get(key) is not known:
                    continue
                if not one.is_undisturbed((space.id, page)):
                    continue
                at = position + page - start
                self.compared += 1
                if data[at : at + PAGE_SIZE] != bytes([known.byte]) * PAGE_SIZE:
                    raise WrongContentsError(f"{record.name} read {data[at : at + 4].hex()} at {page:#x}, not {known}")
            position += length

    # ---- what pages hold

    def _check_space(self, number: int, pages: list[int]) -> None:
        space = self.machine.spaces.get(number)
        if space is None or space.notifier.closed:
            for page in pages:
                del self.known[number, page]
            return
        entries = space.table.lookup(np.array(pages, np.uint64))
        lost = cpu_pte.is_poison(entries)
        if lost.any() and number not in self.losing:
            lost[lost] = self.machine.frames.test_flags(cpu_pte.cpu_pfn(entries[lost]), PageFlag.HWPOISON)
        for page in np.array(pages)[lost].tolist():
            del self.known[number, page]
        looked_at = ~(cpu_pte.is_migration(entries) | lost)
        self._compare(number, np.array(pages)[looked_at].tolist(), entries[looked_at])

    def _check_pinned(self, pin: int, frames: dict[Key, int]) -> None:
        for (number, page), pfn in frames.items():
            space = self.machine.spaces.get(number)
            entry = None if space is None or space.notifier.closed else space.table.get(page)
            if entry is None or (_is_there(entry) and cpu_pte.cpu_pfn(entry) == pfn):
                continue
            raise MovedPageError(f"pin {pin}: {page:#x} of space {number} was in frame {pfn}, and is {entry:#x}")

    def _check_file(self, number: int, pages: list[int]) -> None:
        file = self.machine.files.get(-1 - number)
        if file is None or not (file.opens or any(_maps(space, file) for space in self.machine.spaces.values())):
            for page in pages:
                del self.known[number, page]
        else:
            self._compare(number, pages, file.pages.lookup(np.array(pages, np.uint64) << np.uint64(PAGE_SHIFT)))

    def _compare(self, number: int, pages: list[int], entries: Entries) -> None:
        held = self._held(entries)
        expected = np.array([self.known[number, page].byte for page in pages], np.uint8)
        self.compared += len(pages)
        good = (held == expected[:, np.newaxis]).all(axis=1)
        if not good.all():
            at = int(good.argmin())
            raise WrongContentsError(
                f"{pages[at]:#x} of {'space' if number > 0 else 'file'} {abs(number + (number < 0))} holds "
                f"{held[at, :4].tobytes().hex()}, not {expected[at]:02x}; the entry is {int(entries[at]):#x}"
            )

    def _held(self, entries: Entries) -> Any:
        """uint8[n, 4096]: what stands where entries say; zeroes where there is none."""
        frames = self.machine.frames
        held = np.zeros((entries.size, PAGE_SIZE), np.uint8)
        here = cpu_pte.holds_frame(entries)
        held[here] = frames.gather(cpu_pte.cpu_pfn(entries[here]))
        swapped = cpu_pte.is_swap(entries)
        if swapped.any():
            held[swapped] = area_of(frames).gather(slots_of(entries[swapped]))
        for at in np.flatnonzero(here & (cpu_pte.cpu_pfn(entries) >= self.machine.limits.frames)).tolist():
            pfn = cpu_pte.cpu_pfn(int(entries[at]))
            region = frames.region_of(pfn)
            if region.remote:
                place = self.memory.pages.get((region.owner, (pfn - region.start) << PAGE_SHIFT), b"lost")
                held[at] = np.frombuffer(place.ljust(PAGE_SIZE, b"?"), np.uint8)
        return held


_OF_MIRRORS = frozenset({"device_write", "device_read", "read_frames", "write_frames", "read_dma", "write_dma"})


def _is_there(entry: int) -> bool:
    # Migrations look whether a page is pinned when they have taken it.
    return cpu_pte.holds_frame(entry) or cpu_pte.is_migration(entry)


def _maps(space: AddressSpace, file: File) -> bool:
    return any(vma.backing is file for vma in space.vmas_with_entries)


def _group(key: Key) -> int:
    return ALL_FILES if key[0] < 0 else key[0]


def _vma(space: AddressSpace, page: int) -> Vma | None:
    # Of a range that is being unmapped the entries are still there.
    leaving = next((vma for vma in space.detached if vma.start <= page < vma.end), None)
    return leaving or space.vmas.find(page)
