"""Where kernels differ: one data object says which of them is modelled.

    linux-6.12   the default, and what recordings are compared with
    linux-7      what current drivers are written for

**Source**: Linux 6.12 and 7.0: mm/hmm.c, hmm_vma_fault(); mm/rmap.c, make_device_exclusive_range(), which became
make_device_exclusive() for one page; fs/userfaultfd.c, userfaultfd_unregister().

**Absent**: huge pages in device memory, which 7.0 has: a migration splits them under either; differences that no
driver and no program can see.
"""

from __future__ import annotations

import errno as errnos
from dataclasses import dataclass

__all__ = ["LINUX_6_12", "LINUX_7", "PROFILES", "Semantics"]


@dataclass(frozen=True, slots=True)
class Semantics:
    """The rules of one kernel, where they are not everybody's.

    Attributes:
        fault_oom_errno: what hmm_range_fault() returns when a fault runs out of memory.
        uffd_unregisters_others: UFFDIO_UNREGISTER takes VMAs from other userfaultfds too.
        exclusive_skips: taking pages from the CPU leaves those alone that are not private memory, and goes on behind
            them; otherwise it stops there, and such a page alone is EOPNOTSUPP.
    """

    name: str
    fault_oom_errno: int
    exclusive_skips: bool
    uffd_unregisters_others: bool


LINUX_6_12 = Semantics("linux-6.12", fault_oom_errno=errnos.EFAULT, exclusive_skips=True, uffd_unregisters_others=True)
LINUX_7 = Semantics("linux-7", fault_oom_errno=errnos.ENOMEM, exclusive_skips=False, uffd_unregisters_others=False)
PROFILES = {semantics.name: semantics for semantics in (LINUX_6_12, LINUX_7)}
