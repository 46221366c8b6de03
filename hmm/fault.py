"""Page faults: bring the pages of an address space in, for whoever touches them.

A fault may have to wait: for a call that is changing the VMAs, for mirrors that still use a page about to be
copied, for an entry that somebody else has to resolve, for a page that a userfaultfd's handler has to bring in.
So it is made of attempts (fault_pages.py): each does at once all that needs no waiting and says what is missing;
after every wait everything is looked at again.  The last attempt found nothing missing, and until the next yield
its pages are there.

Mirrors hear of pages that are copied on write, by one event for all pages of a piece, before they are copied.
First touches and upgrades in place are not told to anybody.

**Source**: Linux mm/memory.c (handle_mm_fault()), arch/x86/mm/fault.c (do_user_addr_fault(), access_error()),
6.12.

**Invariants**: while anybody listens, a page is replaced only while an invalidation that was delivered covers it.

**Absent**: the bytes (cpu_access.py), the entry of devices' faults (device_fault.py), huge pages (huge_fault.py),
the handlers of userfaultfds.

Differs: x86 with protection keys refuses to read a mapping that may be executed only; here, as without them,
what may be written or executed may be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.ascending import unique
from hmm.errors import OutOfFramesError, SegmentationFault, Signal
from hmm.events import Cause
from hmm.fault_pages import Attempt, By, Stop, Strangers, fill_empty
from hmm.huge_fault import fault_huge
from hmm.huge_split import block_of, split_pmds
from hmm.hugetlb_fault import fault_hugetlb
from hmm.operation import AT_ONCE, Operation, Pause
from hmm.stack import expand_stack, stack_above
from hmm.swap import some_room
from hmm.units import (
    PAGE_SIZE,
    PIECE_BYTES,
    PIECE_PAGES,
    PMD_MASK,
    Address,
    AddressRange,
    Entries,
    pmd_up,
    spans_of,
)
from hmm.vma import ACCESS_FLAGS, Vma, VmFlag

__all__ = [
    "RESOLVERS",
    "Resolver",
    "addresses_of",
    "bring_in",
    "continues",
    "fault_in",
    "lacking",
    "pieces",
    "raise_stop",
]

Resolver = Callable[[AddressSpace, Strangers, bool], Operation[None]]
RESOLVERS: dict[int, Resolver] = {}
"""Who resolves entries that are not present, by their kind (`DEVICE`, `EXCLUSIVE`, `SWAP` or `MIGRATION`).

Called with the pages of one kind in one VMA, and whether they are to be written.  When it returns, the pages
are looked at again.  One that cannot bring back the first page raises SegmentationFault.  A lost page
(`cpu_pte.POISON`) has no resolver: touching it is a signal.
"""

_NOBODY = np.empty(0, np.uint64)
_ACCESS = int(ACCESS_FLAGS)
_WRITE = int(VmFlag.WRITE)
_HUGETLB = int(VmFlag.HUGETLB)
_READ_BITS = cpu_pte.PRESENT | cpu_pte.ACCESSED
_WRITE_BITS = _READ_BITS | cpu_pte.WRITE | cpu_pte.DIRTY


def fault_in(
    space: AddressSpace,
    target: AddressRange | Entries,
    *,
    write: bool,
    may_retry: bool = True,
    by: By = By.FAULT,
) -> Operation[None]:
    """Bring every page of `target` in: present, and writable when `write`.

    Args:
        target: a page-aligned range, or uint64[n] page addresses, ascending and unique.
        may_retry, by: as for `bring_in`.

    Raises:
        SegmentationFault: nothing is mapped at `error.address`, or not for this access, or the page is behind
            the end of its file or lost, or a userfaultfd with UFFD_FEATURE_SIGBUS misses it (EFAULT); the pages before
            it are in.
        OutOfFramesError: memory ran out at `error.address` (ENOMEM); the pages before it are in.
        TimedOutError: a mirror with policy FAIL did not answer for a page to be copied (ETIMEDOUT).
        NoSuchObjectError: the address space is gone (ESRCH).

    Cost: 8 us for one page; 5 ns per page for untouched private memory; else O(n), vectorised.
    Source: Linux mm/gup.c, faultin_page().
    """
    for number, piece in enumerate(pieces(target)):
        if number:
            yield Pause()
        rest = piece
        while (stop := (yield from bring_in(space, rest, write=write, may_retry=may_retry, by=by))) is not None:
            if not continues(space, rest, stop):
                raise_stop(stop, write=write)
            rest = _rest_of(rest, stop)


def lacking(space: AddressSpace, span: AddressRange, *, write: bool) -> AddressRange | Entries | None:
    """What get_user_pages() has to fault of a range: the pages that are not there, or may not be written.

    Returns: all of it, uint64[n] page addresses, or None for nothing.

    Source: Linux mm/gup.c, follow_page_pte(), can_follow_write_pte(), and their like for huge pages.
    """
    wanted = cpu_pte.PRESENT | (cpu_pte.WRITE if write else 0)
    if space.table.common(span.start, span.end) & wanted == wanted:
        return None
    missing = (space.table.read(span.start, span.end) & np.uint64(wanted)) != wanted
    return span if missing.all() else addresses_of(span)[missing]


def raise_stop(stop: Stop, *, write: bool) -> None:
    """Raise the error that stands for a fault that could not be handled."""
    access = "write" if write else "read"
    if stop.signal is None:
        raise OutOfFramesError(f"{access} of {stop.address:#x}: memory ran out", address=stop.address)
    raise SegmentationFault(f"{access} of {stop.address:#x}: {stop.signal.value}", stop.signal, stop.address)


def continues(space: AddressSpace, target: AddressRange | Entries, stop: Stop) -> bool:
    """Whether `bring_in` stopped only to have what it brought in used before it waits for the rest.

    It waits for memory to be reclaimed, or for the handler of a userfaultfd.
    """
    may_come = stop.userfaultfd or space.frames.make_room is not None
    return stop.signal is None and bool(may_come) and stop.address > _first(target)


def _rest_of(target: AddressRange | Entries, stop: Stop) -> AddressRange | Entries:
    """What is left of `target` from the page on where `bring_in` stopped."""
    if isinstance(target, AddressRange):
        return AddressRange(stop.address, target.end)
    rest: Entries = target[target.searchsorted(np.uint64(stop.address)) :]
    return rest


def pieces(target: AddressRange | Entries) -> Iterable[AddressRange | Entries]:
    """Cut a range or page addresses into pieces of at most PIECE_PAGES pages."""
    if not isinstance(target, AddressRange):
        return (target[first : first + PIECE_PAGES] for first in range(0, target.size, PIECE_PAGES))
    if target.start // PIECE_BYTES == (target.end - 1) // PIECE_BYTES:
        return (target,)
    return _pieces_of_range(target)


def _pieces_of_range(span: AddressRange) -> Iterator[AddressRange]:
    at = span.start
    while at < span.end:
        start, at = at, min((at // PIECE_BYTES + 1) * PIECE_BYTES, span.end)
        yield AddressRange(start, at)


def addresses_of(target: AddressRange | Entries) -> Entries:
    """uint64[npages]: the page addresses of a range, or those that they are already."""
    if isinstance(target, AddressRange):
        return np.arange(target.start, target.end, PAGE_SIZE, dtype=np.uint64)
    return target


def bring_in(
    space: AddressSpace,
    target: AddressRange | Entries,
    *,
    write: bool,
    by: By = By.FAULT,
    may_retry: bool = True,
) -> Operation[Stop | None]:
    """Bring one piece in.  Until the caller yields, the pages before the stop are as they were asked for.

    Args:
        target: at most PIECE_PAGES pages, as for `fault_in`.
        by: who touches the pages.
        may_retry: FAULT_FLAG_ALLOW_RETRY: whether it may wait for the handler of a userfaultfd; else a page that one
            has to bring in is as one behind the end of a file.

    Returns: the first page that cannot be had, None when all are there.  Without a signal memory ran out; if memory can
    be reclaimed, it ran out only when that is the first page of `target`, and else there is to be another call for the
    rest (`continues`).  In the same way it waits for a handler only for the first page.

    Raises: TimedOutError, NoSuchObjectError as `fault_in`.
    """
    notifier = space.notifier
    if not notifier.turns and isinstance(target, AddressRange):
        notifier.require_usable()
        if _fault_at_once(space, target, write):
            return AT_ONCE
    return _bring_in(space, target, write=write, by=by, may_retry=may_retry)


def _bring_in(
    space: AddressSpace, target: AddressRange | Entries, *, write: bool, by: By, may_retry: bool
) -> Operation[Stop | None]:
    notifier = space.notifier
    while True:
        if notifier.turns:
            yield from notifier.wait_for_edits(_concerned(space, target))
        else:
            notifier.require_usable()
        attempt = _attempt(space, target, write, _NOBODY if notifier.subscribers else None, by)
        if attempt.splits:
            yield from split_pmds(space, map(block_of, attempt.splits))
            continue
        if attempt.copies:
            attempt = yield from _tell(attempt, target)
        if attempt.copies or attempt.splits:
            continue
        if attempt.strangers:
            crowded = _crowded(space, attempt.strangers[0], target)
            if crowded is not None:
                return crowded
            stuck = yield from _resolve(space, attempt.strangers, target, write)
            if stuck is not None:
                before = _before(target, stuck.address)  # may have changed while the resolver waited
                sooner = yield from bring_in(space, before, write=write, by=by, may_retry=may_retry)
                return sooner or stuck
            continue
        stop = attempt.stop
        if stop is not None and stop.userfaultfd and not may_retry:
            return Stop(stop.address, Signal.BUS_ADRERR)
        if stop is None or not (yield from _overcome(space, target, stop, write=write, by=by)):
            return stop


def _overcome(
    space: AddressSpace, target: AddressRange | Entries, stop: Stop, *, write: bool, by: By
) -> Operation[bool]:
    """Wait for whoever may bring in the page where an attempt stopped.  Returns: whether to try again."""
    if stop.userfaultfd:
        if stop.address > _first(target):
            return False
        userfaultfd = space.userfaultfds[stop.userfaultfd]
        yield from userfaultfd.handle(stop.address, stop.npages, write=write, minor=stop.minor)
        return True
    if stop.signal is None:
        return (yield from _make_room(space, target, stop))
    return by is By.CPU and stop.signal is Signal.SEGV_MAPERR and (yield from _grow(space, stop.address))


def _first_missing(space: AddressSpace, target: AddressRange | Entries, write: bool) -> Stop | None:
    """The first page that is not there to be used, and SIGBUS for it: check_stable_address_space()."""
    addresses = addresses_of(target)
    entries = space.table.lookup(addresses)
    there = cpu_pte.is_writable(entries) & cpu_pte.is_present(entries) if write else cpu_pte.is_present(entries)
    missing = np.flatnonzero(~there)
    return Stop(int(addresses[missing[0]]), Signal.BUS_ADRERR) if missing.size else None


def _tell(attempt: Attempt, target: AddressRange | Entries) -> Operation[Attempt]:
    # Tell the mirrors what is about to be copied and try again; what was decided before is decided anew.
    space, told = attempt.space, np.concatenate(attempt.copies)
    with space.notifier.invalidation(_spans(told), Cause.COPY_ON_WRITE) as invalidation:
        yield from invalidation.deliver()
        space.notifier.require_usable()
        if space.notifier.edits_overlap(_concerned(space, target), space.current.operation_id):
            return attempt
        return _attempt(space, target, attempt.write, told, attempt.by)


def _spans(target: AddressRange | Entries) -> tuple[AddressRange, ...]:
    if isinstance(target, AddressRange):
        return (target,)
    return spans_of(target)


def _concerned(space: AddressSpace, target: AddressRange | Entries) -> tuple[AddressRange, ...]:
    # What comes may be a huge page, for all of its block.
    spans = _spans(target)
    if not space.thp and not space.huge:
        return spans
    return tuple(AddressRange(span.start & PMD_MASK, pmd_up(span.end)) for span in spans)


def _resolve(
    space: AddressSpace, strangers: list[Strangers], target: AddressRange | Entries, write: bool
) -> Operation[Stop | None]:
    """Returns: the first page that cannot be had; those of mappings before it may have come."""
    came = False
    try:
        for pages in strangers:
            kinds = pages.entries & np.uint64(cpu_pte.NON_PRESENT)
            for kind in unique(kinds).tolist():
                chosen = pages.which(kinds == kind).unchanged(space)  # while those before them were waited for
                if came and chosen.addresses.size and _crowded(space, chosen, target):
                    return None  # those before them would go again
                if chosen.addresses.size:
                    yield from RESOLVERS[kind](space, chosen, write)
                    came = True
    except SegmentationFault as fault:
        missing = _first_missing(space, np.concatenate([pages.addresses for pages in strangers]), write)
        return missing and Stop(missing.address, fault.signal)
    return None


def _first(target: AddressRange | Entries) -> Address:
    return target.start if isinstance(target, AddressRange) else int(target[0])


def _before(target: AddressRange | Entries, address: Address) -> AddressRange | Entries:
    if isinstance(target, AddressRange):
        return AddressRange(target.start, address)
    return target[: int(np.searchsorted(target, np.uint64(address)))]


def _npages(target: AddressRange | Entries) -> int:
    return target.npages if isinstance(target, AddressRange) else target.size


def _crowded(space: AddressSpace, strangers: Strangers, target: AddressRange | Entries) -> Stop | None:
    # Memory is full, and a page that needs some is not the first one: let the caller use what is there, lest the page
    # be brought in at the cost of those before it.
    frames, address = space.frames, int(strangers.addresses[0])
    elsewhere = int(strangers.entries[0]) & (cpu_pte.SWAP | cpu_pte.DEVICE)
    if frames.make_room and elsewhere and not frames.available and address > _first(target):
        return Stop(address, None)
    return None


def _make_room(space: AddressSpace, target: AddressRange | Entries, stop: Stop) -> Operation[bool]:
    # As above; for the first page memory is reclaimed.  A page may need two frames: a file's, and a copy.
    if stop.address > _first(target):
        return False
    return (yield from some_room(space.frames, 2 * _npages(target)))


def _grow(space: AddressSpace, address: Address) -> Operation[bool]:
    if stack_above(space, address) is None:
        return False
    with space.notifier.turn() as turn:
        yield from turn.wait()
        return expand_stack(space, address)


def _attempt(space: AddressSpace, target: AddressRange | Entries, write: bool, told: Entries | None, by: By) -> Attempt:
    attempt = Attempt(space, write, told, by)
    if space.unstable:
        attempt.stop = _first_missing(space, target, write)
    elif isinstance(target, AddressRange):
        _attempt_range(attempt, target)
    else:
        _attempt_pages(attempt, target)
    return attempt


def _attempt_range(attempt: Attempt, span: AddressRange) -> None:
    space, at = attempt.space, span.start
    wanted = _WRITE_BITS if attempt.write else _READ_BITS
    while at < span.end and attempt.stop is None:
        vma = _vma_for(attempt, at)
        if vma is None:
            return
        inside = at == span.start and span.end <= vma.end
        part = span if inside else AddressRange(at, min(vma.end, span.end))
        if vma.mapping.flags._value_ & _HUGETLB:
            fault_hugetlb(attempt, vma, part)
            at = part.end
            continue
        if space.thp or space.huge:
            fault_huge(attempt, vma, part)
            if attempt.splits:
                return
        if vma.backing is None and not space.table.holds(part.start, part.end):
            attempt.fill_empty(vma, part)
        elif space.table.common(part.start, part.end) & wanted != wanted:  # else no page lacks anything
            addresses = np.arange(part.start, part.end, PAGE_SIZE, dtype=np.uint64)
            attempt.fault(vma, addresses, space.table.read(part.start, part.end))
        at = part.end


def _attempt_pages(attempt: Attempt, addresses: Entries) -> None:
    position = 0
    while position < addresses.size and attempt.stop is None:
        vma = _vma_for(attempt, int(addresses[position]))
        if vma is None:
            return
        upto = int(addresses.searchsorted(np.uint64(vma.end)))
        part = addresses[position:upto]
        position = upto
        if vma.mapping.flags._value_ & _HUGETLB:
            fault_hugetlb(attempt, vma, part)
            continue
        if attempt.space.thp or attempt.space.huge:
            fault_huge(attempt, vma, part)
            if attempt.splits:
                return
        attempt.fault(vma, part, attempt.space.table.lookup(part))


def _vma_for(attempt: Attempt, address: Address) -> Vma | None:
    # As access_error().
    vma = attempt.space.vmas.find_again(address)
    if vma is None:
        attempt.stop = Stop(address, Signal.SEGV_MAPERR)
    elif not vma.mapping.flags._value_ & (_WRITE if attempt.write else _ACCESS):
        attempt.stop = Stop(address, Signal.SEGV_ACCERR)
        return None
    return vma


def _fault_at_once(space: AddressSpace, span: AddressRange, write: bool) -> bool:
    # Pages of one VMA that are all there, or untouched private memory: most calls need no attempt.
    start, end, table = span.start, span.end, space.table
    several = end - start != PAGE_SIZE
    vma = space.vmas.find_again(start)
    if vma is None or end > vma.end or space.unstable or (several and (space.thp or space.huge)):
        return False
    mapping = vma.mapping
    permitted, wanted = (_WRITE, _WRITE_BITS) if write else (_ACCESS, _READ_BITS)
    if not mapping.flags._value_ & permitted:
        return False
    there = table.holds(start, end) if several else table.get(start)
    if there or mapping.backing is not None or mapping.userfaultfd or space.thp:
        return (table.common(start, end) if several else there) & wanted == wanted
    try:
        fill_empty(space, vma, span, write=write)
    except OutOfFramesError:
        return False
    return True
