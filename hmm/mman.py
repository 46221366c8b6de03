"""mmap, munmap and brk.

Each is one turn at the address space: what the request says by itself is looked at first, the rest in its turn,
against what is mapped; what was there before is unmapped, the VMA is made, and pages are populated after the turn.

**Source**: Linux mm/mmap.c (ksys_mmap_pgoff(), do_mmap(), mmap_region(), SYSCALL brk), 6.12.

**Invariants**: a call that fails has changed nothing, but for VMAs that were cut for it, or gone (`mmap`).

**Absent**: where a mapping goes (unmapped_area.py), limits of locked memory and data, modes of files, memory policy.

Differs: MAP_DROPPABLE is refused as where there is no VM_DROPPABLE.
"""

from __future__ import annotations

import errno as errnos
from collections.abc import Callable

from hmm.address_space import AddressSpace
from hmm.device_map import map_device
from hmm.errors import ConflictError, HmmError, InvalidRequestError, NoSuchObjectError, OutOfFramesError
from hmm.file import File, FileKind
from hmm.hugetlb import HugetlbFile
from hmm.operation import Operation
from hmm.populate import populate
from hmm.units import (
    PAGE_SHIFT,
    PAGE_SIZE,
    PMD_SHIFT,
    TASK_SIZE,
    Address,
    AddressRange,
    is_page_aligned,
    page_up,
    pmd_up,
)
from hmm.unmapped_area import MapFlag, get_unmapped_area, place
from hmm.vma import LOCKED_FLAGS, MAY_FLAGS, SPECIAL_FLAGS, STACK_GUARD_GAP, Mapping, Prot, VmFlag, vm_flags
from hmm.vma_edit import cut_out, may_expand, unmap

__all__ = ["MapFlag", "SharedMemoryFactory", "brk", "mmap", "munmap"]

SharedMemoryFactory = Callable[[int], File]
"""Makes the unnamed object behind shared anonymous memory, given its size in bytes: shmem_zero_setup()."""

HugeMemoryFactory = Callable[[int, MapFlag], File]
"""Makes the unnamed file behind hugetlb memory, given its size in bytes and the flags: hugetlb_file_setup()."""

_MAP_TYPE = 0xF
_HUGE_SHIFT, _HUGE_MASK = 26, 0x3F
_LEGACY_FLAGS = 0x7C07_F9F3
"""LEGACY_MAP_MASK: what MAP_SHARED_VALIDATE accepts of a file that knows no MAP_SYNC."""
_FILE_END = 1 << 63
# Plain integers: the operators of an IntFlag cost most of a microsecond each, and `has` a fifth of it.
_VM_FLAGS = {
    int(MapFlag.GROWSDOWN): int(VmFlag.GROWSDOWN),
    int(MapFlag.LOCKED): int(VmFlag.LOCKED),
    int(MapFlag.NORESERVE): int(VmFlag.NORESERVE),
    int(MapFlag.STACK): int(VmFlag.NOHUGEPAGE),
    int(MapFlag.SYNC): int(VmFlag.SYNC),
}
"""calc_vm_flag_bits(), and MAP_NORESERVE where overcommit is allowed."""
_ANONYMOUS, _HUGETLB, _GROWSDOWN = int(MapFlag.ANONYMOUS), int(MapFlag.HUGETLB), int(MapFlag.GROWSDOWN)
_FIXED_NOREPLACE = int(MapFlag.FIXED_NOREPLACE)
_POPULATE, _NONBLOCK = int(MapFlag.POPULATE), int(MapFlag.NONBLOCK)
_MAY, _ACCOUNT, _WRITE = int(MAY_FLAGS), int(VmFlag.ACCOUNT), int(VmFlag.WRITE)
_SPECIAL, _LOCKED = int(SPECIAL_FLAGS), int(VmFlag.LOCKED)
_ACCOUNTING = int(VmFlag.NORESERVE | VmFlag.SHARED | VmFlag.WRITE | VmFlag.HUGETLB)
_PRIVATE, _SHARED = int(MapFlag.PRIVATE), int(MapFlag.SHARED)
_DROPPABLE = 0x8
_SHARED_VALIDATE = int(MapFlag.SHARED_VALIDATE)
_VM_SHARED = int(VmFlag.SHARED | VmFlag.MAYSHARE)
_HEAP_FLAGS = VmFlag.READ | VmFlag.WRITE | MAY_FLAGS | VmFlag.ACCOUNT


def mmap(
    space: AddressSpace,
    address: Address,
    length: int,
    prot: Prot,
    flags: MapFlag,
    file: File | None = None,
    offset: int = 0,
    shared_memory: SharedMemoryFactory | None = None,
    huge_memory: HugeMemoryFactory | None = None,
) -> Operation[Address]:
    """Map a file, or anonymous memory.

    Args:
        address: hint; with MAP_FIXED and MAP_FIXED_NOREPLACE the address; 0 for none.
        length: bytes, rounded up to pages.
        flags: MAP_DENYWRITE and MAP_EXECUTABLE are ignored, and `file` and `offset` with MAP_ANONYMOUS.
        offset: in `file`, bytes, page-aligned.
        shared_memory: needed with MAP_SHARED | MAP_ANONYMOUS.
        huge_memory: for MAP_HUGETLB; without it there are no huge pages (ENOMEM).

    Returns: the address.

    Raises:
        InvalidRequestError: no length, an offset or a fixed address within a page, neither shared nor private, a
            stack that is shared or of a file (EINVAL); the file's offsets end before (EOVERFLOW); a flag that
            MAP_SHARED_VALIDATE does not know, or MAP_DROPPABLE (EOPNOTSUPP).
        NoSuchObjectError: no file without MAP_ANONYMOUS (EBADF).
        OutOfFramesError: no room, too many VMAs, RLIMIT_AS; or too few huge pages are free, and then what MAP_FIXED
            found there is gone already (ENOMEM).
        AccessDeniedError: a fixed address below MMAP_MIN_ADDR (EPERM).
        ConflictError: MAP_FIXED_NOREPLACE over something (EEXIST).
        TimedOutError: MAP_FIXED over something and a mirror with policy FAIL did not answer (ETIMEDOUT).

    Cost: O(log VMAs); with MAP_FIXED as munmap; with MAP_POPULATE as touching every page.
    Source: Linux mm/mmap.c, do_mmap().
    """
    if not is_page_aligned(offset):
        raise InvalidRequestError(f"mmap: offset {offset:#x} is not the start of a page")
    how = flags._value_
    if how & _ANONYMOUS:
        file, offset = None, 0
    elif file is None:
        raise NoSuchObjectError("mmap: neither a file nor MAP_ANONYMOUS", errnos.EBADF)
    elif how & _HUGETLB:
        raise InvalidRequestError(f"mmap: MAP_HUGETLB of {file}, which is no hugetlb file")
    if not length:
        raise InvalidRequestError("mmap: length 0")
    if how & _HUGETLB:
        length = pmd_up(length)
        file = _hugetlb_file(length, flags, huge_memory)
    length = page_up(length)
    with space.notifier.turn() as turn:
        yield from turn.wait()
        if len(space.vmas) > space.limits.vmas:
            raise OutOfFramesError(f"mmap: the space has {len(space.vmas)} VMAs already")
        start = place(space, length, address, flags, file, offset)
        span = AddressRange(start, start + length)
        new_flags = _new_flags(space, span, prot, flags, file, offset)
        populates = new_flags._value_ & _LOCKED or how & (_POPULATE | _NONBLOCK) == _POPULATE
        if new_flags._value_ & _SPECIAL:  # populated, but not locked: vma_supports_mlock() is asked by mmap_region()
            new_flags &= ~LOCKED_FLAGS
        if file is None and new_flags._value_ & _VM_SHARED:
            assert shared_memory is not None, "nothing makes shared anonymous memory"
            file = shared_memory(length)
        delta = 0 if file is None else (offset - start) >> PAGE_SHIFT
        turn.hold(span)
        yield from _mmap_region(space, span, Mapping(new_flags, file, delta))
    if populates:
        yield from populate(space, span)
    return start


def _hugetlb_file(length: int, flags: MapFlag, factory: HugeMemoryFactory | None) -> File:
    if int(flags) >> _HUGE_SHIFT & _HUGE_MASK not in (0, PMD_SHIFT):
        raise InvalidRequestError(f"mmap: no huge pages are of the size that {flags!r} asks for")
    if flags & _MAP_TYPE not in (MapFlag.PRIVATE, MapFlag.SHARED, MapFlag.SHARED_VALIDATE):
        raise InvalidRequestError(f"mmap: no anonymous memory is of the kind {flags!r}")
    if factory is None:
        raise OutOfFramesError("mmap: there are no huge pages")
    return factory(length, flags)


def _new_flags(
    space: AddressSpace, span: AddressRange, prot: Prot, flags: MapFlag, file: File | None, offset: int
) -> VmFlag:
    """The second half of do_mmap(), from where the address is known."""
    how = flags._value_
    if how & _FIXED_NOREPLACE and space.vmas.overlapping(span):
        raise ConflictError(f"mmap: something is mapped in {span}", address=span.start)
    bits = prot._value_ & 7 | _MAY | space.new_flags._value_
    for flag, vm_flag in _VM_FLAGS.items():
        if how & flag:
            bits |= vm_flag
    bits |= _anonymous_flags(flags) if file is None else _file_flags(flags, file, offset, span.size_bytes)
    if bits & _ACCOUNTING == _WRITE:
        bits |= _ACCOUNT
    return vm_flags(bits)


def _anonymous_flags(flags: MapFlag) -> int:
    kind = flags._value_ & _MAP_TYPE
    if kind == _PRIVATE:
        return 0
    if kind == _SHARED and not flags._value_ & _GROWSDOWN:
        return _VM_SHARED
    number = errnos.EOPNOTSUPP if kind == _DROPPABLE else errnos.EINVAL
    raise InvalidRequestError(f"mmap: no anonymous memory is of the kind {flags!r}", number)


def _file_flags(flags: MapFlag, file: File, offset: int, length: int) -> int:
    if file.kind is not FileKind.DEVICE and offset + length >= _FILE_END:
        raise InvalidRequestError(f"mmap: {length:#x} bytes at {offset:#x} are behind any file", errnos.EOVERFLOW)
    kind = flags._value_ & _MAP_TYPE
    if kind == _SHARED_VALIDATE and flags._value_ & ~_LEGACY_FLAGS:
        raise InvalidRequestError(f"mmap: MAP_SHARED_VALIDATE does not know all of {flags!r}", errnos.EOPNOTSUPP)
    if kind not in (_SHARED, _SHARED_VALIDATE, _PRIVATE) or flags._value_ & _GROWSDOWN:
        raise InvalidRequestError(f"mmap: no mapping of a file is of the kind {flags!r}")
    return file.vm_flags._value_ | (0 if kind == _PRIVATE else _VM_SHARED)


def _mmap_region(space: AddressSpace, span: AddressRange, mapping: Mapping) -> Operation[None]:
    if not may_expand(space, span.size_bytes, span):
        yield from cut_out(space, span)  # what goes is gathered before the limit is looked at, and the cuts stay
        raise OutOfFramesError(f"mmap: {span} is more than RLIMIT_AS allows")
    yield from unmap(space, span)
    file = mapping.backing
    if isinstance(file, HugetlbFile) and not mapping.has(VmFlag.NORESERVE):
        file.reserve()  # hugetlbfs_file_mmap(); what was there has given back what it had reserved, and stays unmapped
    if isinstance(file, File):
        file.mapped_by(space)
    space.vmas.assign(span, mapping)
    try:
        yield from map_device(space, span, mapping)
    except OutOfFramesError:
        space.vmas.erase(span)
        raise


def munmap(space: AddressSpace, start: Address, length: int) -> Operation[int]:
    """Unmap a range; it need not be mapped.

    Args:
        start: page-aligned.
        length: bytes, rounded up to pages.

    Returns: 0.

    Raises:
        InvalidRequestError: no length, a start within a page, or an end outside the address space (EINVAL).
        OutOfFramesError: a hole in one VMA would make one VMA too many (ENOMEM).
        TimedOutError: a mirror with policy FAIL did not answer; nothing was changed (ETIMEDOUT).

    Cost: O(VMAs + directories + entries).  Source: Linux mm/vma.c, do_vmi_munmap().
    """
    if not is_page_aligned(start) or start > TASK_SIZE or length > TASK_SIZE - start or not length:
        raise InvalidRequestError(f"munmap: {length:#x} bytes at {start:#x}", address=start)
    with space.notifier.turn() as turn:
        yield from turn.wait()
        yield from unmap(space, AddressRange(start, start + page_up(length)))
    return 0


def brk(space: AddressSpace, address: Address) -> Operation[Address]:
    """Move the end of the heap.

    Args:
        address: the new end, in bytes; 0 asks for the present one.

    Returns: the end as it is now; it has not moved when the request could not be met.

    Raises:
        TimedOutError: shrinking, and a mirror with policy FAIL did not answer; nothing was changed (ETIMEDOUT).

    Cost: as mmap or munmap of the difference.  Source: Linux mm/mmap.c, SYSCALL brk.
    """
    with space.notifier.turn() as turn:
        yield from turn.wait()
        old, new = page_up(space.brk_end), page_up(address)
        if address < space.brk_start:
            return space.brk_end
        if old < new:
            if not _can_grow_heap(space, AddressRange(old, new)):
                return space.brk_end
            mapping = Mapping(_HEAP_FLAGS | space.new_flags)
            # The first piece of heap never joins a VMA that only happens to end there.
            space.vmas.assign(AddressRange(old, new), mapping, merge=old > page_up(space.brk_start))
        elif new < old:
            if not space.vmas.overlapping(AddressRange(new, old)):
                return space.brk_end
            try:
                yield from unmap(space, AddressRange(new, old))
            except (InvalidRequestError, OutOfFramesError):  # a VMA that may not be cut there, or no VMA left for it
                return space.brk_end
        space.brk_end = address
    if old < new and space.default_flags & VmFlag.LOCKED:
        yield from populate(space, AddressRange(old, new))
    return address


def _can_grow_heap(space: AddressSpace, growth: AddressRange) -> bool:
    try:
        get_unmapped_area(space, growth.size_bytes, growth.start, MapFlag.FIXED, None, 0)
    except HmmError:
        return False
    above = space.vmas.find_next(growth.start)
    if above is not None:
        guard = STACK_GUARD_GAP if above.has(VmFlag.GROWSDOWN) else 0
        if growth.end + PAGE_SIZE > above.start - guard:
            return False
    return may_expand(space, growth.size_bytes) and len(space.vmas) <= space.limits.vmas
