"""Events: what a mirror is told, and why.

One table, `CAUSES`, says for every cause of a change to the CPU page table what each of the two driver interfaces
hears: the 2015 event type with the mask that is applied to the mirror's entries after the driver answered, and
today's reason.  A side that has NONE is not told.

**Source**: 2015: `enum hmm_etype` and `hmm_update()` of "HMM: introduce heterogeneous memory management v4",
`enum mmu_event` of "mmu_notifier: add event information"; today: include/linux/mmu_notifier.h,
`enum mmu_notifier_event`, and its senders in mm/.

**Invariants**: tests walk the table; every cause is sent from exactly the places that its comment names.

**Absent**: who listens (notifier.py), what an entry looks like (pte.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import NamedTuple

from hmm.pte import MASK_ALL, MASK_NONE, MASK_WRITE_PROTECT
from hmm.spans import meets
from hmm.units import AddressRange, MirrorId, SpaceId


class EventType(IntEnum):
    """2015: `hmm_event.etype`, in the order of the posted enum; RELEASE stands for the `release` callback."""

    NONE = 0
    FORK = 1
    ISDIRTY = 2
    MIGRATE = 3
    MUNMAP = 4
    DEVICE_RFAULT = 5
    DEVICE_WFAULT = 6
    WRITE_PROTECT = 7
    COPY_FROM_DEVICE = 8
    COPY_TO_DEVICE = 9
    RELEASE = 10

    @property
    def pte_mask(self) -> int:
        """What is kept of every entry of the range once the driver has answered."""
        return PTE_MASKS[self]

    @property
    def is_invalidation(self) -> bool:
        """True when the driver must stop using something; an error answer then kills the mirror."""
        return IS_INVALIDATION[self]


# Indexed by type: an enum member in a set or a dict is hashed in Python.
IS_INVALIDATION = tuple(
    etype in (EventType.FORK, EventType.ISDIRTY, EventType.MIGRATE, EventType.MUNMAP, EventType.WRITE_PROTECT)
    for etype in EventType
)
"""`is_invalidation` of each type."""
_KEEPING = {
    EventType.FORK: MASK_WRITE_PROTECT,
    EventType.MIGRATE: MASK_NONE,
    EventType.MUNMAP: MASK_NONE,
    EventType.WRITE_PROTECT: MASK_WRITE_PROTECT,
    EventType.RELEASE: MASK_NONE,
}
PTE_MASKS = tuple(_KEEPING.get(etype, MASK_ALL) for etype in EventType)
"""`pte_mask` of each type."""
TAKES = tuple(
    etype in (EventType.NONE, EventType.COPY_TO_DEVICE, EventType.COPY_FROM_DEVICE) or mask != MASK_ALL
    for etype, mask in zip(EventType, PTE_MASKS, strict=True)
)
"""Which types take something from a mirror; NONE has a reason of today, and there it takes everything."""


class Reason(IntEnum):
    """Today: `enum mmu_notifier_event`, with the kernel's values."""

    UNMAP = 0
    CLEAR = 1
    PROTECTION_VMA = 2
    PROTECTION_PAGE = 3
    SOFT_DIRTY = 4
    RELEASE = 5
    MIGRATE = 6
    EXCLUSIVE = 7


@dataclass(frozen=True, slots=True)
class Told:
    """What the two interfaces hear of one cause."""

    etype: EventType
    reason: Reason | None


class Cause(Enum):
    """Why the CPU page table changes; named after the kernel's path that does it."""

    MUNMAP = "munmap"  # munmap, MAP_FIXED over something, brk and mremap shrinking
    MREMAP_MOVE = "mremap move"  # move_page_tables(): the old range
    MREMAP_MOVE_HUGETLB = "mremap move of hugetlb memory"  # move_hugetlb_page_tables()
    MADV_DONTNEED = "madvise dontneed"
    MADV_FREE = "madvise free"
    TRUNCATE = "truncate"  # ftruncate, hole punch, MADV_REMOVE: unmap_mapping_range()
    MPROTECT_NONE = "mprotect none"  # the range can no longer be read
    MPROTECT_READ = "mprotect read"  # it can be read, not written
    MPROTECT_WRITE = "mprotect write"  # an upgrade
    FORK = "fork"  # copy_page_range(): the parent's pages become copy-on-write
    FORK_HUGETLB = "fork of hugetlb memory"  # copy_hugetlb_page_range()
    COPY_ON_WRITE = "copy on write"  # wp_page_copy()
    CLEAR_SOFT_DIRTY = "clear soft-dirty"
    WRITE_BACK = "write back"  # page_mkclean()
    RECLAIM = "reclaim"
    MIGRATE_SHARED = "migrate shared page"  # try_to_migrate(): every other mapping of a page that migrates
    KSM = "page merging"  # write_protect_page(), replace_page()
    SOFT_OFFLINE = "soft offline"  # migrate_pages() of soft_offline_in_use_page()
    MEMORY_FAILURE = "memory failure"  # try_to_unmap() of hwpoison_user_mappings()
    HUGE_PAGE_SPLIT = "huge page split"  # __split_huge_pmd(), split_folio()
    VMA_CUT = "VMA cut"  # vma_adjust_trans_huge(): a VMA is cut inside a block of 2 MiB, huge page or not
    COLLAPSE = "collapse"
    MIGRATE_TO_DEVICE = "migrate to device"
    MIGRATE_TO_SYSTEM = "migrate to system"
    EXCLUSIVE = "exclusive access"
    EXIT = "exit"
    OOM_REAP = "oom reap"  # __oom_reap_task_mm(): private memory of a process that is as good as dead
    EXIT_MMAP = "exit mmap"  # unmap_vmas() behind RELEASE: those who are still subscribed
    MUNLOCK = "munlock"

    __hash__ = object.__hash__  # that of an Enum is written in Python

    @property
    def told(self) -> Told:
        """The row of the table for this cause."""
        return CAUSES[self]

    @property
    def discards(self) -> bool:
        """True when the contents of the range are to go: a page in a device's memory need not come back first."""
        return self in _DISCARDING


_DISCARDING = frozenset({Cause.MUNMAP, Cause.MADV_DONTNEED, Cause.TRUNCATE, Cause.EXIT})

CAUSES: dict[Cause, Told] = {
    Cause.MUNMAP: Told(EventType.MUNMAP, Reason.UNMAP),
    Cause.MREMAP_MOVE: Told(EventType.MIGRATE, Reason.UNMAP),
    Cause.MREMAP_MOVE_HUGETLB: Told(EventType.MIGRATE, Reason.CLEAR),
    Cause.MADV_DONTNEED: Told(EventType.MIGRATE, Reason.CLEAR),
    Cause.MADV_FREE: Told(EventType.MIGRATE, Reason.CLEAR),
    Cause.TRUNCATE: Told(EventType.MUNMAP, Reason.CLEAR),
    Cause.MPROTECT_NONE: Told(EventType.MUNMAP, Reason.PROTECTION_VMA),
    Cause.MPROTECT_READ: Told(EventType.WRITE_PROTECT, Reason.PROTECTION_VMA),
    Cause.MPROTECT_WRITE: Told(EventType.NONE, Reason.PROTECTION_VMA),
    Cause.FORK: Told(EventType.FORK, Reason.PROTECTION_PAGE),
    Cause.FORK_HUGETLB: Told(EventType.FORK, Reason.CLEAR),
    Cause.COPY_ON_WRITE: Told(EventType.MIGRATE, Reason.CLEAR),
    Cause.CLEAR_SOFT_DIRTY: Told(EventType.WRITE_PROTECT, Reason.SOFT_DIRTY),
    Cause.WRITE_BACK: Told(EventType.WRITE_PROTECT, Reason.PROTECTION_PAGE),
    Cause.RECLAIM: Told(EventType.MIGRATE, Reason.CLEAR),
    Cause.MIGRATE_SHARED: Told(EventType.MIGRATE, Reason.CLEAR),
    Cause.KSM: Told(EventType.MIGRATE, Reason.CLEAR),
    Cause.SOFT_OFFLINE: Told(EventType.MIGRATE, Reason.CLEAR),
    Cause.MEMORY_FAILURE: Told(EventType.MIGRATE, Reason.CLEAR),
    Cause.HUGE_PAGE_SPLIT: Told(EventType.MUNMAP, Reason.CLEAR),
    Cause.VMA_CUT: Told(EventType.NONE, Reason.CLEAR),
    Cause.COLLAPSE: Told(EventType.MIGRATE, Reason.CLEAR),
    Cause.MIGRATE_TO_DEVICE: Told(EventType.MIGRATE, Reason.MIGRATE),
    Cause.MIGRATE_TO_SYSTEM: Told(EventType.MIGRATE, Reason.MIGRATE),
    Cause.EXCLUSIVE: Told(EventType.MIGRATE, Reason.EXCLUSIVE),
    Cause.EXIT: Told(EventType.MUNMAP, Reason.RELEASE),
    Cause.OOM_REAP: Told(EventType.MIGRATE, Reason.UNMAP),
    Cause.EXIT_MMAP: Told(EventType.MUNMAP, Reason.UNMAP),
    Cause.MUNLOCK: Told(EventType.NONE, None),
}


class EventState(Enum):
    """Life of one event for one mirror; all but SENT are final, except that ABANDONED still expects its answer."""

    SENT = "sent"
    ACKNOWLEDGED = "acknowledged"
    REFUSED = "refused"
    FENCED = "fenced"
    ABANDONED = "abandoned"


def pte_mask_of(etype: EventType, keeps: bool) -> int:
    """`Event.pte_mask` of events of that type."""
    moving = etype in (EventType.COPY_TO_DEVICE, EventType.COPY_FROM_DEVICE) and not keeps
    return MASK_NONE if moving else etype.pte_mask


class Event(NamedTuple):
    """One change, as every mirror concerned hears it.

    Attributes:
        operation_id: the call that causes it.
        space_id: the address space that changes.
        revision: per address space, ascending.
        spans: page-aligned, ascending, disjoint; one message carries all ranges of an operation.
        owner: the device whose own migration or exclusive access this is; 0 for nobody.
        initiator: the mirror that asked for it, or that put the page where it has to come back from; 0 for none.
        blockable: False only for the OOM reaper and process_mrelease, which accept a refusal.
        entries: of all pages of `spans`, little-endian uint64.  DEVICE_RFAULT and DEVICE_WFAULT: the mirror's;
            COPY_TO_DEVICE and COPY_FROM_DEVICE: where in the device's memory.
        copy: COPY_TO_DEVICE and COPY_FROM_DEVICE that the driver carries out: names the pages on their way, see
            `mirror_memory.Copy`; the answer has a result for each.  0: nothing is asked but to stop using them.
        keeps: COPY_FROM_DEVICE for fork: the device goes on using what was copied.
        finishes: the revision of the event whose second pass this is; 0 for all others.
    """

    operation_id: int
    space_id: SpaceId
    revision: int
    etype: EventType
    reason: Reason | None
    cause: Cause | None
    spans: tuple[AddressRange, ...]
    owner: int = 0
    blockable: bool = True
    entries: bytes = b""
    initiator: MirrorId = 0
    copy: int = 0
    keeps: bool = False
    finishes: int = 0

    @property
    def what(self) -> str:
        """What happens, for people: its cause, or its type where it has none."""
        return self.cause.value if self.cause is not None else self.etype.name.lower()

    @property
    def npages(self) -> int:
        """Of all its ranges."""
        return sum([span.npages for span in self.spans])

    @property
    def pte_mask(self) -> int:
        """What a device keeps of its entries of the ranges when it has answered.

        Pages on their way to the device are told of again when they are there, with the fault's update.

        Differs: pages that came back are faulted in again at their new place; the posted code left entries of it.
        """
        return pte_mask_of(self.etype, self.keeps)

    def overlaps(self, span: AddressRange) -> bool:
        """True when a range of the event shares a byte with `span`."""
        return meets(span, self.spans)


@dataclass(slots=True, eq=False)
class Delivery:
    """One event for one mirror, from its sending to its final state.

    Attributes:
        sequence: the event's number for that mirror.
        operation_id: the call that waits for the answer.
        errno: what the driver's callback returned, positive; 0 is success.
        dirty: ranges that the device wrote and reports with its answer.
        results: of a copy: one byte per page, 0 or an errno.
        unfinished: the driver has only started to stop using the ranges, and wants to be called again to finish.
    """

    mirror_id: MirrorId
    sequence: int
    event: Event
    operation_id: int
    state: EventState = EventState.SENT
    errno: int = 0
    dirty: tuple[AddressRange, ...] = ()
    results: bytes = b""
    unfinished: bool = False
