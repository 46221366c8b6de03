"""Stacks: a VMA that grows downwards when the page below it is touched.

**Source**: Linux mm/mmap.c: expand_downwards(), acct_stack_growth(), 6.12.

**Invariants**: a stack never comes closer to another accessible mapping than the guard gap.

**Absent**: which accesses may make a stack grow (the CPU's do, a device's do not); locked-memory limits.
"""

from __future__ import annotations

from hmm.address_space import AddressSpace
from hmm.fault_pages import prepare_anon_vma
from hmm.units import Address, AddressRange, page_down
from hmm.unmapped_area import MMAP_MIN_ADDR
from hmm.vma import ACCESS_FLAGS, STACK_GUARD_GAP, Vma, VmFlag
from hmm.vma_edit import may_expand

__all__ = ["expand_stack", "stack_above"]


def stack_above(space: AddressSpace, address: Address) -> Vma | None:
    """The stack that would have to grow down to `address`, where nothing is mapped; None if there is none."""
    above = space.vmas.find_next(address)
    return above if above is not None and above.has(VmFlag.GROWSDOWN) else None


def expand_stack(space: AddressSpace, address: Address) -> bool:
    """Let the stack above `address` grow down to its page; the caller has the turn.

    Returns: False when there is no stack, or it may not grow so far.

    Cost: O(log VMAs), or O(VMAs) with a limit on the address space.
    """
    stack = stack_above(space, address)
    start = page_down(address)
    if stack is None or start >= stack.start:
        return stack is not None
    below = space.vmas.find_prev(stack.start)
    guarded = below is not None and not below.has(VmFlag.GROWSDOWN) and below.has(ACCESS_FLAGS)
    if start < MMAP_MIN_ADDR or (guarded and below is not None and start - below.end < STACK_GUARD_GAP):
        return False
    prepare_anon_vma(space, stack)
    stack = stack_above(space, address)
    assert stack is not None
    growth = stack.start - start
    too_long = stack.end - start > space.limits.stack_bytes
    if too_long or stack.page_offset(start) < 0 or not may_expand(space, growth):
        return False
    space.vmas.assign(AddressRange(start, stack.end), stack.mapping, merge=False)
    return True
