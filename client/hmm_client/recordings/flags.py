"""Names and values of the flags in recorded calls, as x86-64 Linux publishes them.

Source: Linux include/uapi/asm-generic/mman-common.h, mman.h, include/uapi/linux/mman.h, sched.h, shm.h, memfd.h,
    arch/x86/include/uapi/asm/mman.h.
Absent: what the flags do.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeAlias

FlagTable: TypeAlias = Mapping[str, int]


def _table(**values: int) -> FlagTable:
    return MappingProxyType(values)


PROT = _table(
    PROT_NONE=0,
    PROT_READ=0x1,
    PROT_WRITE=0x2,
    PROT_EXEC=0x4,
    PROT_SEM=0x8,
    PROT_GROWSDOWN=0x0100_0000,
    PROT_GROWSUP=0x0200_0000,
)

MAP_HUGE_SHIFT = 26
MAP_HUGE_MASK = 0x3F
MAP = _table(
    MAP_FILE=0,
    MAP_SHARED=0x01,
    MAP_PRIVATE=0x02,
    MAP_SHARED_VALIDATE=0x03,
    MAP_DROPPABLE=0x08,
    MAP_FIXED=0x10,
    MAP_ANONYMOUS=0x20,
    MAP_ANON=0x20,
    MAP_32BIT=0x40,
    MAP_ABOVE4G=0x80,
    MAP_GROWSDOWN=0x0100,
    MAP_DENYWRITE=0x0800,
    MAP_EXECUTABLE=0x1000,
    MAP_LOCKED=0x2000,
    MAP_NORESERVE=0x4000,
    MAP_POPULATE=0x8000,
    MAP_NONBLOCK=0x1_0000,
    MAP_STACK=0x2_0000,
    MAP_HUGETLB=0x4_0000,
    MAP_SYNC=0x8_0000,
    MAP_FIXED_NOREPLACE=0x10_0000,
    MAP_UNINITIALIZED=0x400_0000,
    MAP_HUGE_SHIFT=MAP_HUGE_SHIFT,
)

MREMAP = _table(MREMAP_MAYMOVE=1, MREMAP_FIXED=2, MREMAP_DONTUNMAP=4)

MADV = _table(
    MADV_NORMAL=0,
    MADV_RANDOM=1,
    MADV_SEQUENTIAL=2,
    MADV_WILLNEED=3,
    MADV_DONTNEED=4,
    MADV_FREE=8,
    MADV_REMOVE=9,
    MADV_DONTFORK=10,
    MADV_DOFORK=11,
    MADV_MERGEABLE=12,
    MADV_UNMERGEABLE=13,
    MADV_HUGEPAGE=14,
    MADV_NOHUGEPAGE=15,
    MADV_DONTDUMP=16,
    MADV_DODUMP=17,
    MADV_WIPEONFORK=18,
    MADV_KEEPONFORK=19,
    MADV_COLD=20,
    MADV_PAGEOUT=21,
    MADV_POPULATE_READ=22,
    MADV_POPULATE_WRITE=23,
    MADV_DONTNEED_LOCKED=24,
    MADV_COLLAPSE=25,
    MADV_HWPOISON=100,
    MADV_SOFT_OFFLINE=101,
    MADV_GUARD_INSTALL=102,
    MADV_GUARD_REMOVE=103,
)

MS = _table(MS_ASYNC=1, MS_INVALIDATE=2, MS_SYNC=4)
MLOCK = _table(MLOCK_ONFAULT=1)
MCL = _table(MCL_CURRENT=1, MCL_FUTURE=2, MCL_ONFAULT=4)
MFD = _table(
    MFD_CLOEXEC=0x1,
    MFD_ALLOW_SEALING=0x2,
    MFD_HUGETLB=0x4,
    MFD_NOEXEC_SEAL=0x8,
    MFD_EXEC=0x10,
    MFD_HUGE_SHIFT=MAP_HUGE_SHIFT,
)
SHM = _table(SHM_RDONLY=0o10000, SHM_RND=0o20000, SHM_REMAP=0o40000, SHM_EXEC=0o100000)

HUGE_PAGE_SHIFT_DEFAULT = 21
"""Size of a MAP_HUGETLB page when the flags name none: 2 MiB on x86-64."""
