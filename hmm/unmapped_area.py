"""Where a mapping goes: the addresses that mmap and mremap choose.

The free space below `mmap_base` is filled from the top; when it is full, the space above a third of the address
space is searched from the bottom.  A hint is taken when it is free.  Mappings that could hold huge pages begin
where the huge pages of their object do: private anonymous memory and devices of whole 2 MiB and no hint, and regular
files of which at least one aligned 2 MiB is mapped.

**Source**: Linux mm/mmap.c (__get_unmapped_area(), round_hint_to_min()), arch/x86/kernel/sys_x86_64.c
(arch_get_unmapped_area_topdown()), arch/x86/mm/hugetlbpage.c, mm/huge_memory.c (__thp_get_unmapped_area()), mm/shmem.c
(shmem_get_unmapped_area() with the default huge=never), 6.12 with the correction "no hint" of 6.12.9.

**Invariants**: what is returned is page-aligned, inside the address space, and free unless MAP_FIXED asked for
it; what no address was given for lies above MMAP_MIN_ADDR.

**Absent**: randomisation; the alignment for the caches of AMD family 15h.
"""

from __future__ import annotations

import errno as errnos
from functools import lru_cache

from hmm.address_space import AddressSpace
from hmm.errors import AccessDeniedError, InvalidRequestError, OutOfFramesError
from hmm.file import File, FileKind
from hmm.units import PAGE_SIZE, PMD_SIZE, TASK_SIZE, Address, AddressRange, is_page_aligned, page_down, page_up, pmd_up
from hmm.vma import Flags

__all__ = ["MMAP_MIN_ADDR", "MapFlag", "get_unmapped_area", "map_flags", "place"]

MMAP_MIN_ADDR = 1 << 16
"""vm.mmap_min_addr: what is mapped below was asked for there by whoever may (CAP_SYS_RAWIO)."""
_BOTTOM_UP_BASE = page_up(TASK_SIZE // 3)
_LOW_2G = AddressRange(1 << 30, 1 << 31)
_FOUR_G = 1 << 32


class MapFlag(Flags):
    """The MAP_ flags of mmap(), with the kernel's values."""

    SHARED = 0x1
    PRIVATE = 0x2
    SHARED_VALIDATE = 0x3
    FIXED = 0x10
    ANONYMOUS = 0x20
    LOW_2G = 0x40  # MAP_32BIT
    ABOVE4G = 0x80
    GROWSDOWN = 0x100
    DENYWRITE = 0x800
    EXECUTABLE = 0x1000
    LOCKED = 0x2000
    NORESERVE = 0x4000
    POPULATE = 0x8000
    NONBLOCK = 0x1_0000
    STACK = 0x2_0000
    HUGETLB = 0x4_0000
    SYNC = 0x8_0000
    FIXED_NOREPLACE = 0x10_0000
    UNINITIALIZED = 0x400_0000


map_flags = lru_cache(maxsize=256)(MapFlag)
"""As `vma.vm_flags`."""
_ANYWHERE = MapFlag(0)
# Plain integers: each mmap asks for most of these twice.
_FIXED, _FIXED_NOREPLACE = int(MapFlag.FIXED), int(MapFlag.FIXED_NOREPLACE)
_SHARED, _LOW, _ABOVE4G = int(MapFlag.SHARED), int(MapFlag.LOW_2G), int(MapFlag.ABOVE4G)


def place(
    space: AddressSpace,
    length: int,
    hint: Address = 0,
    flags: MapFlag = MapFlag.PRIVATE | MapFlag.ANONYMOUS,
    file: File | None = None,
    offset: int = 0,
) -> Address:
    """The address that mmap() would choose now; nothing is changed.

    Args:
        length: bytes, positive.
        hint: address wished for, or 0.
        offset: in `file`, bytes.

    Raises: as `get_unmapped_area`.
    """
    if flags._value_ & _FIXED_NOREPLACE:
        flags |= MapFlag.FIXED
    if not flags._value_ & _FIXED:
        hint = page_down(hint)
        if 0 < hint < MMAP_MIN_ADDR:
            hint = MMAP_MIN_ADDR
    return get_unmapped_area(space, page_up(length), hint, flags, file, offset)


def get_unmapped_area(
    space: AddressSpace, length: int, address: Address, flags: MapFlag, file: File | None, offset: int
) -> Address:
    """Choose an address for `length` bytes, a multiple of the page size.

    Args:
        address: with MAP_FIXED the address itself, else a hint, or 0 for none.
        flags: FIXED, SHARED, LOW_2G and ABOVE4G matter here.
        file: what will be mapped; None for anonymous memory, shared or private.
        offset: in `file`, bytes.

    Raises:
        OutOfFramesError: longer than the address space, or nothing free is long enough (ENOMEM).
        InvalidRequestError: MAP_FIXED at an address within a page (EINVAL).
        AccessDeniedError: below MMAP_MIN_ADDR, and the space may not have low addresses (EPERM).

    Cost: O(log VMAs), in bad cases O(VMAs).  Source: Linux mm/mmap.c, __get_unmapped_area(); security/commoncap.c,
    cap_mmap_addr().
    """
    if length > TASK_SIZE:
        raise OutOfFramesError(f"{length:#x} bytes are more than the address space")
    if file is not None and file.kind is FileKind.HUGETLB:
        address = _whole_pages(space, length, address, flags)
    elif not flags._value_ & _FIXED:
        if _wants_huge_pages(length, address, flags, file):
            address = _aligned_area(space, length, address, flags, offset if file else 0)
        else:
            address = _unmapped_area(space, length, address, flags)
    if address > TASK_SIZE - length:
        raise OutOfFramesError(f"{length:#x} bytes at {address:#x} end outside the address space", address=address)
    if not is_page_aligned(address):
        raise InvalidRequestError(f"{address:#x} is not the start of a page", address=address)
    if address < MMAP_MIN_ADDR and not space.low_addresses:
        raise AccessDeniedError(f"{address:#x} is below mmap_min_addr", errnos.EPERM, address=address)
    return address


def _whole_pages(space: AddressSpace, length: int, hint: Address, flags: MapFlag) -> Address:
    """hugetlb_get_unmapped_area()."""
    if (length | (hint if flags._value_ & _FIXED else 0)) & (PMD_SIZE - 1):
        raise InvalidRequestError(f"{length:#x} bytes at {hint:#x} are not whole huge pages", address=hint)
    if flags._value_ & _FIXED:
        return hint
    apart = space.semantics.hugetlb_places_apart
    if hint:
        hint = hint & -PMD_SIZE if apart else pmd_up(hint)  # down maybe to 0, which is too low then
        if hint <= TASK_SIZE - length and space.vmas.is_free(AddressRange(hint, hint + length)):
            return hint
    padded = length + PMD_SIZE - PAGE_SIZE
    return (_unmapped_area(space, padded, 0, _ANYWHERE if apart else flags) + padded - length) & -PMD_SIZE


def _wants_huge_pages(length: int, hint: Address, flags: MapFlag, file: File | None) -> bool:
    if file is not None and file.kind is not FileKind.DEVICE:
        return file.kind is FileKind.FILE
    # A driver's file has no get_unmapped_area() of its own; shared anonymous memory has shmem's.
    return not hint and length % PMD_SIZE == 0 and (file is not None or not flags._value_ & _SHARED)


def _aligned_area(space: AddressSpace, length: int, hint: Address, flags: MapFlag, offset: int) -> Address:
    """An area in which offset and address agree modulo PMD_SIZE: thp_get_unmapped_area()."""
    first_huge = (offset + PMD_SIZE - 1) & -PMD_SIZE
    if offset + length < first_huge + PMD_SIZE:
        return _unmapped_area(space, length, hint, flags)
    try:
        padded = _unmapped_area(space, length + PMD_SIZE, hint, flags)
    except OutOfFramesError:
        return _unmapped_area(space, length, hint, flags)
    if padded == hint:
        return hint
    shift = (offset - padded) & (PMD_SIZE - 1)
    return padded + (shift or PMD_SIZE)


def _unmapped_area(space: AddressSpace, length: int, hint: Address, flags: MapFlag) -> Address:
    """arch_get_unmapped_area_topdown(), and arch_get_unmapped_area() after it."""
    if flags._value_ & _LOW:
        return _bottom_up(space, length, hint, _LOW_2G)
    if hint:
        hint = page_down(hint)
        if hint <= TASK_SIZE - length and space.vmas.is_free(AddressRange(hint, hint + length)):
            return hint
    low = _FOUR_G if flags._value_ & _ABOVE4G else MMAP_MIN_ADDR
    found = space.vmas.unmapped_area_topdown(length, low, space.mmap_base)
    if found is not None:
        return found
    return _bottom_up(space, length, hint, AddressRange(_BOTTOM_UP_BASE, TASK_SIZE))


def _bottom_up(space: AddressSpace, length: int, hint: Address, area: AddressRange) -> Address:
    if hint and hint + length <= area.end and space.vmas.is_free(AddressRange(hint, hint + length)):
        return hint
    found = space.vmas.unmapped_area(length, area.start, area.end)
    if found is None:
        raise OutOfFramesError(f"no {length:#x} bytes are free in {area}")
    return found
