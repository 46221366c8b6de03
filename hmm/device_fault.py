"""A device faults: fill a mirror from the CPU's table, faulting pages in on the way.

The order is the contract: the fault enlists only when no overlapping invalidation runs, fills the mirror's entries,
tells the driver, and leaves.  What the CPU's table lacks is faulted in after leaving, because breaking
copy-on-write invalidates the range and would wait for us.

**Source**: linux-mm, "HMM: add device page fault support v3", hmm_mirror_fault(), hmm_mirror_handle_fault().

**Invariants**: an entry is written only while its fault is enlisted, so no overlapping invalidation is past its start.

**Absent**: CPU faults (fault.py); what entries are made of (mirror_entries.py); moving pages to the device
(mirror_migrate.py); queueing of requests.

Differs: the posted code looped for ever (v8) or returned EBUSY (v9) when it raced with an invalidation; here the
caller says which.  The posted code did not test VM_READ; a mapping without it is EACCES here, as its test suite
demands.
"""

from __future__ import annotations

import errno as errnos
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hmm import cpu_pte, pte
from hmm.address_space import AddressSpace
from hmm.dispatch import Dispatch
from hmm.errors import (
    AccessDeniedError,
    BadAddressError,
    HmmError,
    InvalidRequestError,
    NoSuchObjectError,
    OutOfFramesError,
    RangeBusyError,
    SegmentationFault,
    TimedOutError,
)
from hmm.events import Event, EventState, EventType
from hmm.fault import addresses_of, fault_in, pieces
from hmm.mirror import Mirror
from hmm.mirror_entries import entries_of, held_for_writing, install
from hmm.operation import Await, Deliver, Operation, Pause, WaitFor
from hmm.spans import Spans
from hmm.units import (
    PAGE_SHIFT,
    PAGE_SIZE,
    Address,
    AddressRange,
    Entries,
    spans_of,
)
from hmm.vma import Vma, VmFlag

_UNMIRRORABLE = int(VmFlag.IO | VmFlag.PFNMAP | VmFlag.MIXEDMAP)
_READ, _WRITE = int(VmFlag.READ), int(VmFlag.WRITE)
SCATTERED = 8
"""From this many gaps on, pages are handled together as an array of addresses, else range by range."""

_PAGE_SIZE = np.uint64(PAGE_SIZE)


class Faulted(NamedTuple):
    """What a device fault did.

    Attributes:
        span: as asked for.
        end: how far the mirror is filled; less than `span.end` after an error, or at the end of a VMA.
        error: why it stopped, None on success.
        entries: uint64[npages], what the mirror has of all that was asked for now, if that is known; only whoever is
            told at once can use it.
    """

    span: AddressRange
    end: int
    error: HmmError | None = None
    retries: int = 0
    entries: Entries | None = None


class _Pages:
    """What is to be filled: one range, or uint64[n] addresses of scattered pages of one VMA; it is never empty.

    Attributes:
        whole: from the first page to the last.
        npages: how many pages.
        entries: uint64[npages], the mirror's; None where they are not known, as after every yield.
    """

    __slots__ = ("_spans", "entries", "npages", "target", "whole")

    def __init__(self, target: AddressRange | Entries) -> None:
        self.target = target
        self.entries: Entries | None = None
        self._spans: tuple[AddressRange, ...] = ()
        if isinstance(target, AddressRange):
            self.whole, self.npages = target, target.end - target.start >> PAGE_SHIFT
        else:
            self.whole = AddressRange(int(target[0]), int(target[-1]) + PAGE_SIZE)
            self.npages = target.size

    @property
    def spans(self) -> tuple[AddressRange, ...]:
        """The same as ranges."""
        if not self._spans:
            target = self.target
            self._spans = (target,) if isinstance(target, AddressRange) else spans_of(target)
        return self._spans

    def up_to(self, end: Address) -> _Pages:
        """The part below `end`, which is not empty."""
        if isinstance(self.target, AddressRange):
            return _Pages(AddressRange(self.target.start, min(self.target.end, end)))
        return _Pages(self.target[: self.target.searchsorted(np.uint64(end))])

    def first(self, count: int) -> _Pages:
        """As many of the first pages."""
        if isinstance(self.target, AddressRange):
            return self.up_to(self.target.start + (count << PAGE_SHIFT))
        return _Pages(self.target[:count])

    def after(self, end: Address) -> _Pages:
        """The part from `end` on, which is not empty."""
        if isinstance(self.target, AddressRange):
            return _Pages(AddressRange(end, self.target.end))
        return _Pages(self.target[self.target.searchsorted(np.uint64(end)) :])

    def before(self, missing: AddressRange | Entries) -> _Pages:
        """The part below the first page that is missing, or that page when it is the first of all."""
        first = missing.start if isinstance(missing, AddressRange) else int(missing[0])
        return self.up_to(max(first, self.whole.start + PAGE_SIZE))

    def end_of_range(self, address: Address) -> Address:
        """Where the range ends that holds `address`."""
        if isinstance(self.target, AddressRange):
            return self.target.end
        return next(span.end for span in self.spans if address in span)

    def pieces(self) -> Iterable[AddressRange | Entries]:
        """At most PIECE_PAGES each; pages that are few ranges come as these."""
        if isinstance(self.target, AddressRange):
            return pieces(self.target)
        breaks = np.count_nonzero(self.target[1:] - self.target[:-1] != _PAGE_SIZE)
        if breaks < SCATTERED:
            return chain.from_iterable(map(pieces, self.spans))
        return pieces(self.target)


def fault_range(
    mirror: Mirror, span: AddressRange, *, write: bool, wait: bool = True, whole: bool = False
) -> Operation[Faulted]:
    """Fault one range, up to the end of the VMA that holds its start, as `hmm_mirror_fault` does.

    Args:
        whole: go on across VMAs: what a driver would do by issuing the fault again from where it stopped.

    Raises:
        InvalidRequestError: empty or unaligned (EINVAL).
        DeviceLostError, NoSuchObjectError: the mirror no longer mirrors (ENODEV).
        RangeBusyError: `wait` is False and the range is or was being invalidated (EBUSY).

    Returns: how far it came; errors of the range itself are in the result, with what was filled before.
    """
    if span.start >= span.end or (span.start | span.end) & (PAGE_SIZE - 1):
        raise InvalidRequestError(f"fault: {span} is empty or not page-aligned")
    fault = _fault_in_parts if mirror.space.frames.make_room else _fault
    done = yield from fault(mirror, _Pages(span), write, wait)
    if not whole or done.error or done.end >= span.end:
        return done
    retries = done.retries
    while done.error is None and done.end < span.end:
        yield Pause()
        done = yield from fault(mirror, _Pages(AddressRange(done.end, span.end)), write, wait)
        retries += done.retries
    return Faulted(span, done.end, done.error, retries)


def fault_pages(mirror: Mirror, addresses: Entries, *, write: bool, wait: bool = True) -> Operation[list[Faulted]]:
    """Fault scattered pages, VMA by VMA, each VMA's pages in one pass.

    Args:
        addresses: uint64[n], page-aligned, ascending, unique.

    Returns: one Faulted per VMA (or hole) that holds pages; a failure in one does not stop the others.

    Cost: O(n) vectorised, plus O(VMAs touched).
    """
    unaligned = int(np.bitwise_or.reduce(addresses)) & (PAGE_SIZE - 1)
    if unaligned or not addresses.size or np.count_nonzero(addresses[1:] <= addresses[:-1]):
        raise InvalidRequestError("fault: the addresses must be page-aligned, ascending and unique")
    results = []
    position, last = 0, int(addresses[-1])
    while position < addresses.size:
        first = int(addresses[position])
        vma = mirror.space.vmas.find_next(first)
        upto = addresses.size
        end = last + 1 if vma is None else vma.end if vma.start <= first else vma.start
        if end <= last:
            upto = int(addresses.searchsorted(np.uint64(end)))
        fault = _fault_in_parts if mirror.space.frames.make_room else _fault
        done = yield from fault(mirror, _Pages(addresses[position:upto]), write, wait)
        results.append(done)
        # A VMA that lost its end while the fault waited leaves pages to be done by the rules of where they are now.
        position = upto
        if done.error is None and done.end <= last:
            position = int(addresses.searchsorted(np.uint64(done.end)))
    return results


def _fault_in_parts(mirror: Mirror, pages: _Pages, write: bool, wait: bool) -> Operation[Faulted]:
    """`_fault` where memory is reclaimed: what is asked for need not be in memory at one time.

    A part that was filled may be taken back, by an event, while the next one is filled.
    """
    asked, retries = pages.whole, 0
    while True:
        done = yield from _fault(mirror, pages.first(mirror.space.frames.batch_pages), write, wait)
        retries += done.retries
        if done.error or done.end >= pages.whole.end or _is_vma_end(mirror.space, done.end):
            return Faulted(asked, done.end, done.error, retries)
        pages = pages.after(done.end)
        yield Pause()


def _is_vma_end(space: AddressSpace, address: Address) -> bool:
    vma = space.vmas.find(address - PAGE_SIZE)
    return vma is None or vma.end == address


def _fault(mirror: Mirror, pages: _Pages, write: bool, wait: bool) -> Operation[Faulted]:
    asked = pages.whole
    notifier = mirror.space.notifier
    failure, upto, retries, missed = None, 0, 0, False
    mirror.counters["faults"] += 1
    while True:
        if notifier.turns or mirror.owes:
            yield from wait_to_start(mirror, pages.spans, wait=wait)
        mirror.require_filling("fault")
        notifier.note_filling(mirror.id, asked)
        if notifier.closed or notifier.broken:
            notifier.require_usable()
        try:
            vma = mirrorable_vma(mirror.space, asked.start, asked.end, write=write)
        except HmmError as error:
            return Faulted(asked, error.address or asked.start, error, retries)
        if asked.end > vma.end:
            pages = pages.up_to(vma.end)
        if notifier.invalidations and notifier.invalidations_overlap(pages.spans):
            yield _wait_or_busy(mirror, Await(WaitFor.INVALIDATIONS, notifier.space_id, pages.spans), wait)
            retries += 1
            continue
        pages.entries = held_for_writing(mirror, pages.target)
        targets = tuple(pages.pieces()) if pages.entries is None else ()
        missing, present = _missing(mirror, targets, pages, write) if targets else (None, None)
        if missing is not None:
            pages, missing = _narrowed(mirror, pages, missing, missed)
            missed = True
            failed = yield from bring_in(mirror, missing, write=write)
            if failed is not None:
                if (failed.address or 0) <= asked.start:
                    return Faulted(asked, asked.start, failed, retries)
                # What lies before is there now, and is filled before the failure is reported.
                failure = failed
                pages = pages.up_to(failed.address or 0)
                upto = pages.npages
            continue
        filled = not targets and not mirror.update_on_fault
        try:
            filled = filled or (yield from _fill(mirror, targets, present, pages, write))
        except HmmError as error:
            return Faulted(asked, asked.start, error, retries)
        if filled:
            mirror.counters["faulted_pages"] += pages.npages
            # Fewer pages: the mapping ends before the one that failed by now, or fewer were there at one time.
            end = failure.address if failure is not None and pages.npages == upto else None
            whole = pages.whole
            entries = pages.entries if whole.end == asked.end else None
            return Faulted(asked, end or whole.end, failure if end else None, retries, entries)
        _require_patience(mirror, wait, f"{asked} was invalidated meanwhile")
        retries += 1
        mirror.counters["retries"] += 1


def _narrowed(
    mirror: Mirror, pages: _Pages, missing: AddressRange | Entries, missed: bool
) -> tuple[_Pages, AddressRange | Entries]:
    """What to fill, and what of it to bring in first; fewer pages when some were reclaimed before the last came in.

    Those before the first that is missing are there.  So it succeeds in the end, if need be page by page.
    """
    if not missed or mirror.space.frames.make_room is None:
        return pages, missing
    fewer = pages.before(missing)
    return fewer, fewer.target


def wait_to_start(mirror: Mirror, spans: tuple[AddressRange, ...], *, wait: bool) -> Operation[None]:
    """Wait until no call is changing these mappings and the driver may be sent an event."""
    notifier = mirror.space.notifier
    while True:
        if notifier.edits_overlap(spans, notifier.current.operation_id):
            yield _wait_or_busy(mirror, Await(WaitFor.EDITS, notifier.space_id, spans), wait)
        elif mirror.update_on_fault and mirror.awaits_late_answer():
            late = Await(WaitFor.LATE_ANSWERS, notifier.space_id, spans, mirror_id=mirror.id)
            yield _wait_or_busy(mirror, late, wait)
        else:
            return


def _wait_or_busy(mirror: Mirror, request: Await, wait: bool) -> Await:
    _require_patience(mirror, wait, f"{request.spans[0]} waits for {request.wait_for.value}")
    return request


def _require_patience(mirror: Mirror, wait: bool, why: str) -> None:
    if not wait:
        raise RangeBusyError(f"fault: {why}", notifier_seq=mirror.space.notifier.sequence)


def bring_in(mirror: Mirror, missing: AddressRange | Entries, *, write: bool) -> Operation[HmmError | None]:
    """Fault in what the CPU's table lacks.  Returns: why that ended early, at `error.address`.

    The posted code faults with the mmap lock held and without FAULT_FLAG_ALLOW_RETRY, so that it cannot wait for a
    userfaultfd's handler (which Linux got a release later): what is missing there is EFAULT.
    """
    try:
        yield from fault_in(mirror.space, missing, write=write, may_retry=False)
    except SegmentationFault as error:
        return BadAddressError(f"fault: {error.signal.value} at {error.address or 0:#x}", address=error.address)
    except OutOfFramesError as error:
        return error
    except NoSuchObjectError:
        mirror.require_live("fault")  # the address space has ended, and every mirror with it
        raise
    return None


def mirrorable_vma(space: AddressSpace, start: int, end: int, *, write: bool) -> Vma:
    """The VMA that a fault at `start` is for: hmm_mirror_fault(), with its tests in their order.

    Raises:
        BadAddressError: nothing is mapped there, or what a driver maps of its own (EFAULT).
        AccessDeniedError: it does not permit the access (EACCES).
    """
    vma = space.vmas.find_next(start)
    if vma is None or vma.start >= end:
        raise BadAddressError(f"fault: nothing is mapped in {AddressRange(start, end)}", address=start)
    if vma.start > start:
        raise BadAddressError(
            f"fault: nothing is mapped at {start:#x}; the next mapping starts at {vma.start:#x}",
            address=start,
            hole_end=vma.start,
        )
    flags = vma.mapping.flags._value_
    if flags & _UNMIRRORABLE:
        raise BadAddressError(f"fault: {vma} maps a device file, which is not mirrored", address=start)
    if not flags & _READ:
        raise AccessDeniedError(f"fault: {vma} is not readable", errnos.EACCES, address=start)
    if write and not flags & _WRITE:
        raise AccessDeniedError(f"write fault: {vma} is not writable", errnos.EACCES, address=start)
    return vma


def _fill(
    mirror: Mirror, targets: Sequence[AddressRange | Entries], present: Entries | None, pages: _Pages, write: bool
) -> Operation[bool]:
    """Fill the mirror, and let its driver know.  Returns: False when an invalidation wants to go first.

    Args:
        targets: the pieces to be filled; none where the mirror has all of it.
        present: the CPU's entries, where it is one piece and they are known.
    """
    # Nothing that is enlisted can be invalidated: what is not missing now is still there when it is installed.
    notifier = mirror.space.notifier
    enlisted = notifier.start_fault(mirror.id, pages)
    try:
        for index, target in enumerate(targets):
            if index:
                yield Pause()
                mirror.require_filling("fault")
            if enlisted.backoff:
                return False
            if len(targets) == 1:
                pages.entries = install(mirror, target, present, write=write)
            elif held_for_writing(mirror, target) is None:
                install(mirror, target, write=write)
        if mirror.update_on_fault:
            entries = entries_of(mirror.table, pages.target) if pages.entries is None else pages.entries
            pages.entries = None
            yield from update(mirror, enlisted.spans, entries, write=write)
    finally:
        notifier.end_fault(enlisted)
    return True


def _missing(
    mirror: Mirror, targets: Sequence[AddressRange | Entries], pages: _Pages, write: bool
) -> tuple[AddressRange | Entries | None, Entries | None]:
    """What has to be faulted in first, None when all is there; and then, of one piece, the CPU's entries.

    Of a range it is all from the first such page on, so that one CPU fault brings all of it in, unless that would
    also bring pages back from the device.
    """
    table, at_home = mirror.space.table, mirror.home is not None and mirror.home.region.used > 0
    wanted = cpu_pte.PRESENT | (cpu_pte.WRITE if write else 0)
    entries = None
    for target in targets:
        if isinstance(target, AddressRange) and not at_home:
            if table.get(target.start) & wanted != wanted:
                return AddressRange(target.start, pages.end_of_range(target.start)), None
            if target.end - target.start == PAGE_SIZE:
                continue
            if len(targets) > 1 and table.common(target.start, target.end) & wanted == wanted:
                continue
        entries = entries_of(table, target)
        if int(np.bitwise_and.reduce(entries)) & wanted == wanted:
            continue
        lacking = (entries & np.uint64(wanted)) != wanted
        own = _on_own_device(mirror, target, entries) if at_home else None
        if own is not None and own.any():
            lacking &= ~own
            if not lacking.any():
                continue
        elif isinstance(target, AddressRange):
            first = target.start + int(lacking.argmax()) * PAGE_SIZE
            return AddressRange(first, pages.end_of_range(first)), None
        found: Entries = addresses_of(target)[lacking]
        return found, None
    return None, entries if len(targets) == 1 else None


def _on_own_device(mirror: Mirror, target: AddressRange | Entries, entries: Entries) -> npt.NDArray[np.bool_]:
    # Which of the CPU's entries are of pages that the mirror has in its device's memory.
    own: npt.NDArray[np.bool_] = cpu_pte.is_device_private(entries)
    if own.any():
        own &= pte.pte_test_valid_dev(mirror.table.lookup(addresses_of(target)))
    return own


def update(mirror: Mirror, spans: Spans, entries: Entries, *, write: bool) -> Operation[None]:
    """Let the driver program its device from the mirror; its error is the caller's and kills nothing.

    Args:
        entries: uint64[n], the mirror's, of all pages of `spans`.

    Raises:
        TimedOutError: it did not answer, and its policy is FAIL (ETIMEDOUT).
        OutOfFramesError, BadAddressError: it answered ENOMEM, or EIO.
        DeviceLostError, NoSuchObjectError: the mirror ended meanwhile (ENODEV).
    """
    notifier = mirror.space.notifier
    event = Event(
        operation_id=notifier.current.operation_id,
        space_id=mirror.space.id,
        revision=notifier.next_revision(),
        etype=EventType.DEVICE_WFAULT if write else EventType.DEVICE_RFAULT,
        reason=None,
        cause=None,
        spans=spans,
        entries=entries.astype("<u8", copy=False).tobytes(),
    )
    dispatch: Dispatch = yield Deliver(event, (mirror.id,))
    mirror.require_live("fault")
    told = dispatch.outcomes.get(mirror.id)
    if told is None:
        return  # as most do: done, and nothing more to say
    if told.state is EventState.ABANDONED:
        raise TimedOutError(f"fault: the driver of {mirror} did not acknowledge in time")
    mirror.settle(told)
    if told.errno == errnos.ENOMEM:
        raise OutOfFramesError(f"fault: the driver of {mirror} answered ENOMEM")
    if told.errno:
        raise BadAddressError(f"fault: the driver of {mirror} answered EIO", errnos.EIO)


__all__ = [
    "Faulted",
    "bring_in",
    "fault_pages",
    "fault_range",
    "mirrorable_vma",
    "update",
    "wait_to_start",
]
