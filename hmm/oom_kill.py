"""Reaping: taking the private memory of a process that is as good as dead, without waiting for it to exit.

Whoever reaps may not sleep, so a device's driver may refuse; then its range stays, and the caller tries again.

**Source**: Linux mm/oom_kill.c, process_mrelease(), __oom_reap_task_mm(), 6.12.

**Invariants**: nothing is brought into the address space any more; what a driver refused is still there.

**Absent**: choosing victims; the signal that has to be pending: whoever reaps has sent it.

Differs: all drivers are told at once, where the kernel stops at the first that refuses; those told besides have given
up more than they had to.  Reaping waits for a migration that its driver has not finalized, where the kernel takes
mmap_lock for reading as that does.
"""

from __future__ import annotations

from hmm.address_space import AddressSpace
from hmm.errors import RangeBusyError
from hmm.events import Cause
from hmm.operation import Operation
from hmm.units import AddressRange
from hmm.vma import VmFlag
from hmm.vma_edit import zap

__all__ = ["process_mrelease"]


def process_mrelease(space: AddressSpace) -> Operation[None]:
    """Drop all private memory of an address space that is about to end.

    Raises:
        RangeBusyError: a driver refused a part, which is still there; the rest is gone (EAGAIN).

    Cost: O(VMAs + pages), vectorised; one event for each VMA that is private.
    """
    refusal: RangeBusyError | None = None
    with space.notifier.turn() as turn:  # mmap_lock
        yield from turn.wait()
        space.unstable = True
        for span in [AddressRange(vma.start, vma.end) for vma in space.vmas if _is_reaped(vma.flags)]:
            try:
                with space.notifier.invalidation((span,), Cause.OOM_REAP, blockable=False) as invalidation:
                    yield from invalidation.deliver()
                    yield from zap(space, span)
            except RangeBusyError as error:
                refusal = error
    if refusal is not None:
        raise refusal


def _is_reaped(flags: VmFlag) -> bool:
    return not flags & (VmFlag.HUGETLB | VmFlag.PFNMAP | VmFlag.SHARED)
