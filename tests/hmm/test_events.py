"""The table of causes, walked row by row."""

from __future__ import annotations

import pytest

from hmm import pte
from hmm.events import CAUSES, Cause, EventType, Reason


def test_table_has_a_row_for_every_cause() -> None:
    """No change of the CPU's table is without a decision about who hears of it."""
    assert set(CAUSES) == set(Cause)


@pytest.mark.parametrize(
    ("etype", "mask"),
    [
        (EventType.FORK, pte.MASK_WRITE_PROTECT),
        (EventType.WRITE_PROTECT, pte.MASK_WRITE_PROTECT),
        (EventType.ISDIRTY, pte.MASK_ALL),
        (EventType.MIGRATE, 0),
        (EventType.MUNMAP, 0),
        (EventType.DEVICE_RFAULT, pte.MASK_ALL),
        (EventType.DEVICE_WFAULT, pte.MASK_ALL),
    ],
)
def test_pte_mask_is_that_of_the_type(etype: EventType, mask: int) -> None:
    """The type implies the mask, not the reverse (hmm_event_init(), 2015)."""
    assert etype.pte_mask == mask


@pytest.mark.parametrize(
    ("cause", "etype", "reason"),
    [
        (Cause.MUNMAP, EventType.MUNMAP, Reason.UNMAP),
        (Cause.MREMAP_MOVE, EventType.MIGRATE, Reason.UNMAP),
        (Cause.MADV_DONTNEED, EventType.MIGRATE, Reason.CLEAR),
        (Cause.TRUNCATE, EventType.MUNMAP, Reason.CLEAR),
        (Cause.MPROTECT_NONE, EventType.MUNMAP, Reason.PROTECTION_VMA),
        (Cause.MPROTECT_READ, EventType.WRITE_PROTECT, Reason.PROTECTION_VMA),
        (Cause.MPROTECT_WRITE, EventType.NONE, Reason.PROTECTION_VMA),
        (Cause.FORK, EventType.FORK, Reason.PROTECTION_PAGE),
        (Cause.FORK_HUGETLB, EventType.FORK, Reason.CLEAR),
        (Cause.MREMAP_MOVE_HUGETLB, EventType.MIGRATE, Reason.CLEAR),
        (Cause.COPY_ON_WRITE, EventType.MIGRATE, Reason.CLEAR),
        (Cause.CLEAR_SOFT_DIRTY, EventType.WRITE_PROTECT, Reason.SOFT_DIRTY),
        (Cause.WRITE_BACK, EventType.WRITE_PROTECT, Reason.PROTECTION_PAGE),
        (Cause.RECLAIM, EventType.MIGRATE, Reason.CLEAR),
        (Cause.MIGRATE_SHARED, EventType.MIGRATE, Reason.CLEAR),
        (Cause.HUGE_PAGE_SPLIT, EventType.MUNMAP, Reason.CLEAR),
        (Cause.COLLAPSE, EventType.MIGRATE, Reason.CLEAR),
        (Cause.MIGRATE_TO_DEVICE, EventType.MIGRATE, Reason.MIGRATE),
        (Cause.EXCLUSIVE, EventType.MIGRATE, Reason.EXCLUSIVE),
        (Cause.EXIT, EventType.MUNMAP, Reason.RELEASE),
        (Cause.MUNLOCK, EventType.NONE, None),
    ],
)
def test_told_is_what_both_interfaces_hear(cause: Cause, etype: EventType, reason: Reason | None) -> None:
    """2015: mmu_event_to_hmm_event(); today: the senders in mm/ (mmu_notifier_range_init())."""
    assert (cause.told.etype, cause.told.reason) == (etype, reason)


def test_reason_has_the_kernels_values() -> None:
    """include/linux/mmu_notifier.h, enum mmu_notifier_event."""
    assert [reason.name for reason in Reason] == [
        "UNMAP",
        "CLEAR",
        "PROTECTION_VMA",
        "PROTECTION_PAGE",
        "SOFT_DIRTY",
        "RELEASE",
        "MIGRATE",
        "EXCLUSIVE",
    ]
    assert [reason.value for reason in Reason] == list(range(8))
