"""Where kernels differ: one data object says which of them is modelled.

    linux-6.12   the default, and what recordings are compared with
    linux-7      what current drivers are written for

**Source**: Linux 6.12 and 7.2: mm/rmap.c, make_device_exclusive_range(), which became make_device_exclusive() for one
page; mm/migrate_device.c, migrate_vma_collect_pmd(); fs/userfaultfd.c, userfaultfd_unregister();
arch/x86/mm/hugetlbpage.c, hugetlb_get_unmapped_area(), whose place fs/hugetlbfs/inode.c has taken.

**Absent**: what drivers may use under either: invalidations with two passes, range faults that take the lock
themselves, the words of 6.16 and its helpers for DMA; page locks, so that nobody finds a page of a device busy; a
subscription that keeps huge pages away, which was proposed and refused; differences that no driver and no program can
see.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LINUX_6_12", "LINUX_7", "PROFILES", "Semantics"]


@dataclass(frozen=True, slots=True)
class Semantics:
    """The rules of one kernel, where they are not everybody's.

    Attributes:
        uffd_unregisters_others: UFFDIO_UNREGISTER takes VMAs from other userfaultfds too.
        exclusive_ranges: pages are taken from the CPU in ranges: those that are not private memory, and pages of a
            large folio behind its first, are left alone, and it goes on behind them.  Otherwise pages are taken one by
            one, of large folios too, and the first that is not private memory ends it: such a page alone is EOPNOTSUPP;
            and they stay mapped, so that their folios can be split, which gives them back.
        exclusive_remembers_write: what the CPU gets back from a device may be written if it could be when it was taken
            and its protection has not changed since; otherwise if its mapping permits it now.
        hugetlb_places_apart: a hint for hugetlb memory is rounded down to a huge page, and MAP_32BIT and MAP_ABOVE4G
            are not looked at there.  Otherwise it is rounded up, and they are.
        migration_splits: a migration splits every huge page that it meets, and leaves pages of large folios that are
            mapped by page entries where they are.  Otherwise it splits both, but only those that it selects.
    """

    name: str
    uffd_unregisters_others: bool
    exclusive_ranges: bool
    exclusive_remembers_write: bool
    hugetlb_places_apart: bool
    migration_splits: bool


LINUX_6_12 = Semantics(
    "linux-6.12",
    uffd_unregisters_others=True,
    exclusive_ranges=True,
    exclusive_remembers_write=True,
    hugetlb_places_apart=True,
    migration_splits=True,
)
LINUX_7 = Semantics(
    "linux-7",
    uffd_unregisters_others=False,
    exclusive_ranges=False,
    exclusive_remembers_write=False,
    hugetlb_places_apart=False,
    migration_splits=False,
)
PROFILES = {semantics.name: semantics for semantics in (LINUX_6_12, LINUX_7)}
