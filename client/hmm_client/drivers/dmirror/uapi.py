"""What the ioctls of the test driver take and give back.

**Source**: Linux lib/test_hmm_uapi.h, 6.12 and 7.0.

**Invariants**: none.

**Absent**: the numbers of the ioctls: each is a method of `Handle`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag

__all__ = ["Flag", "Reply", "Snapshot"]


class Flag(IntFlag):
    """What FLAGS sets: HMM_DMIRROR_FLAG_."""

    FAIL_ALLOC = 1


class Snapshot(IntEnum):
    """Bytes of a snapshot: HMM_DMIRROR_PROT_."""

    ERROR = 0xFF
    NONE = 0x00
    READ = 0x01
    WRITE = 0x02
    PMD = 0x04
    ZERO = 0x10
    DEV_PRIVATE_LOCAL = 0x20
    DEV_COHERENT_LOCAL = 0x40
    DEV_COHERENT_REMOTE = 0x50


@dataclass(frozen=True, slots=True)
class Reply:
    """What an ioctl gives back when it succeeds.

    Attributes:
        cpages: pages copied, or moved.
        faults: how often something had to be faulted in.
        data: the bytes read; of a snapshot one byte per page.
    """

    cpages: int = 0
    faults: int = 0
    data: bytes = b""
