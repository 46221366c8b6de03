"""How true to the kernel's test driver ours is.

**Source**: Linux lib/test_hmm.c, 6.12 and 7.0.

**Invariants**: none.

**Absent**: the dangling pointers that the kernel's driver follows.
"""

from __future__ import annotations

import errno as errnos
from dataclasses import dataclass, replace

__all__ = ["CLEAN", "LINUX_6_12_CORRECTED", "LINUX_7_CORRECTED", "Profile"]


@dataclass(frozen=True, slots=True)
class Profile:
    """How the driver behaves where the kernel's is peculiar.

    Attributes:
        batch_pages: how many pages one range fault, snapshot or call for exclusive access is asked for.
        migrate_pages: and one migration.
        compound: huge pages are selected as such.
        tags_holes: pages that were nowhere before they were migrated may be written at once if their VMA may; otherwise
            the first write faults.
        end_included: an event of [a, b) takes the entry of page b too.
        faults_own_pages_back: a device write to a page of its own that is read-only brings the page back and goes on;
            otherwise it fails with EFAULT, as hmm_range_fault() does not enforce writing there.
        range_timeout_s: how long a range fault or a snapshot is repeated that changes overtake; then it is EBUSY.
            HMM_RANGE_DEFAULT_TIMEOUT is one second, which a busy machine may need for nothing at all.
        exclusive_errno: what every failure of EXCLUSIVE is; 0 for what it really was.
        ignores_own_migrations: entries stay while their pages move, and whoever uses the handle at the same time
            reaches pages that are the device's no more; otherwise they go first.
    """

    name: str
    batch_pages: int
    migrate_pages: int
    compound: bool
    tags_holes: bool
    end_included: bool
    faults_own_pages_back: bool
    range_timeout_s: float
    exclusive_errno: int
    ignores_own_migrations: bool


LINUX_6_12_CORRECTED = Profile(
    "6.12-corrected",
    batch_pages=64,
    migrate_pages=64,
    compound=False,
    tags_holes=True,
    end_included=True,
    faults_own_pages_back=False,
    range_timeout_s=1.0,
    exclusive_errno=errnos.EBUSY,
    ignores_own_migrations=True,
)
LINUX_7_CORRECTED = replace(
    LINUX_6_12_CORRECTED,
    name="7-corrected",
    batch_pages=32,
    migrate_pages=512,
    compound=True,
    tags_holes=False,
    exclusive_errno=0,
)
CLEAN = Profile(
    "clean",
    batch_pages=512,
    migrate_pages=512,
    compound=True,
    tags_holes=True,
    end_included=False,
    faults_own_pages_back=True,
    range_timeout_s=60.0,
    exclusive_errno=0,
    ignores_own_migrations=False,
)
