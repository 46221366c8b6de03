"""What a device did that it must not: values that say which rule, where, and what had taken its translation.

**Source**: our own; the kernel has no such thing, since its devices reach memory without asking.

**Invariants**: a violation is complete in itself: what it tells of may be gone.

**Absent**: finding them (sanitizer.py and whoever checks accesses).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from hmm.units import Address, DeviceId, MirrorId

__all__ = ["Taking", "Violation", "ViolationKind"]


class ViolationKind(Enum):
    """Which rule was broken."""

    USE_AFTER_INVALIDATION = "use after invalidation"
    EARLY_ACKNOWLEDGEMENT = "early acknowledgement"
    READ_ONLY_WRITE = "write through a read-only entry"
    FOREIGN_FRAME = "foreign frame"
    NO_TRANSLATION = "no translation"
    ACCESS_AFTER_FENCE = "access after fence"
    DIRTY_NOT_REPORTED = "dirty not reported"
    DMA_MAPPING_KEPT = "DMA mapping kept"

    @property
    def rule(self) -> str:
        """The rule, in words."""
        return _RULES[self]


_RULES = {
    ViolationKind.USE_AFTER_INVALIDATION: "after its answer to an event a device uses nothing that the event took",
    ViolationKind.EARLY_ACKNOWLEDGEMENT: "an event is answered when the last access through what it takes has landed",
    ViolationKind.READ_ONLY_WRITE: "a device writes only where its entry permits writing",
    ViolationKind.FOREIGN_FRAME: "a device reaches only frames and DMA addresses that were given to this mirror",
    ViolationKind.NO_TRANSLATION: "a device accesses only what was faulted in before",
    ViolationKind.ACCESS_AFTER_FENCE: "a mirror that was fenced has nothing any more",
    ViolationKind.DIRTY_NOT_REPORTED: "what a device wrote is reported at the latest with the answer that gives it up",
    ViolationKind.DMA_MAPPING_KEPT: "what an event takes is unmapped for DMA before the event is answered",
}


_OF_ANSWERS = (ViolationKind.DIRTY_NOT_REPORTED, ViolationKind.DMA_MAPPING_KEPT)


@dataclass(frozen=True, slots=True)
class Taking:
    """What took a translation: an event that the mirror's driver has acknowledged, or its own discarding.

    Attributes:
        sequence: of the event for this mirror.
        event: its type as a name, DISCARD for the driver's own doing.
        cause: what changed the CPU's table, in words; empty for discarding.
        operation_id: the call that caused the event.
        start, end: the range of it that holds the address, bytes.
        settled: every mirror had answered when the access came, and the change was made.
        operation, caller: that call's name, and who made it; empty in the core.
        acknowledged_by, acknowledged_ns: the driver, and when, nanoseconds since 1970; empty in the core.
    """

    sequence: int
    event: str
    cause: str
    operation_id: int
    start: Address
    end: Address
    settled: bool
    operation: str = ""
    caller: str = ""
    acknowledged_by: str = ""
    acknowledged_ns: int = 0

    def __str__(self) -> str:
        where = f"[{self.start:#x}, {self.end:#x})"
        if not self.cause:
            return f"the driver's own discard {where}, operation {self.operation_id}"
        return f"{self.event} #{self.sequence} {where} by {self.cause}, operation {self.operation_id}"


@dataclass(frozen=True, slots=True)
class Violation:
    """One access, or one answer, that breaks a rule.

    Attributes:
        address: the first page concerned, a mirror address in bytes; the DMA address where that stands for none.
        pages: how many pages of the access are concerned.
        write: the access was a write.
        operation_id: the access; for an answer the call that waited for it.
        taking: what had taken the translation; None: nothing that is remembered.
    """

    kind: ViolationKind
    mirror_id: MirrorId
    device_id: DeviceId
    device: str
    address: Address
    pages: int
    write: bool
    operation_id: int
    taking: Taking | None = None

    def __str__(self) -> str:
        access = "answer" if self.kind in _OF_ANSWERS else "write" if self.write else "read"
        more = f" and {self.pages - 1:,} more pages" if self.pages > 1 else ""
        after = f"; acknowledged was {self.taking}" if self.taking else ""
        where = f"{self.address:#x}{more} in mirror {self.mirror_id} ({self.device})"
        return f"{self.kind.value}: device {access} at {where}{after}"
