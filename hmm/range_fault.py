"""hmm_range_fault(): what the CPU's page table says of a range, after faulting in what is asked for.

Each page has one word.  Going in it may say what is wanted (REQ_FAULT, REQ_WRITE), going out it says what is there:

    VALID      the page may be read; WRITE: and written; the low bits name its frame
    ERROR      the device must fail an access
    0          nothing there now, and a fault could succeed
    order      the CPU maps a naturally aligned 2^order pages by one entry

A huge page in the private memory of another device is ERROR as long as it is not wanted, where a small one is 0.

The walk is ascending.  The first page that needs a fault makes the kernel fault everything behind it, up to the end of
the request, of the VMA or of the directory: pages of the own device that lie there come back to system memory.  The
pages of a huge page are asked for together, and so are those without a page table.

**Source**: Linux mm/hmm.c, include/linux/hmm.h; 6.12, with the bits of the words as of 6.16.

**Invariants**: when an error is raised, words below the failing address are outputs and all others still inputs.  Pages
that were faulted together with that address are above it in this: they were faulted in, and nobody came to their words.

**Absent**: DMA mapping of the result (hmm_dma.py).

Differs: where pages are replaced in several directories, mirrors hear of up to PIECE_PAGES at once, and -EBUSY comes
behind them; the kernel comes back with it from every directory, and the next is faulted by the next call.
"""

from __future__ import annotations

import errno as errnos
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.errors import AccessDeniedError, BadAddressError, HmmError, InvalidRequestError, RangeBusyError
from hmm.fault import addresses_of, bring_in, continues, pieces
from hmm.fault_pages import Stop
from hmm.frames import ZERO_PFN
from hmm.huge_fault import has_table
from hmm.huge_split import has_directory
from hmm.interval_notifier import IntervalMirror
from hmm.migration_entries import migration_entry_wait
from hmm.operation import Operation, Pause
from hmm.units import (
    PAGE_SHIFT,
    PIECE_BYTES,
    PMD_PAGES,
    PMD_SHIFT,
    PMD_SIZE,
    PUD_SIZE,
    TASK_SIZE,
    Address,
    AddressRange,
    DeviceId,
    Entries,
    Pfns,
    is_page_aligned,
)
from hmm.vma import Vma, VmFlag
from hmm.zone_device import owners

__all__ = [
    "DMA_MAPPED",
    "ERROR",
    "ORDER_SHIFT",
    "REQ_FAULT",
    "REQ_WRITE",
    "STICKY",
    "VALID",
    "WRITE",
    "HmmRange",
    "range_fault",
    "word_pfns",
]

VALID = 1 << 63
WRITE = 1 << 62
ERROR = 1 << 61
REQ_FAULT = VALID
REQ_WRITE = WRITE
DMA_MAPPED = 1 << 60
STICKY = 0b111 << 58
"""DMA_MAPPED, P2PDMA, P2PDMA_BUS: they survive from input to output."""
ORDER_SHIFT = 53
_PFN_MASK = np.uint64((1 << ORDER_SHIFT) - 1)
_TO_WRITE = np.uint64(WRITE.bit_length() - cpu_pte.WRITE.bit_length())
_TO_PFN = np.array(cpu_pte.PFN_SHIFT, np.uint64)
_WITH_DEVICES = cpu_pte.DEVICE | cpu_pte.EXCLUSIVE
_IN_HUGE_PAGE = np.uint64(PMD_PAGES - 1)
_PMD_ORDER = np.uint64(PMD_SHIFT - PAGE_SHIFT << ORDER_SHIFT)

_Mask = npt.NDArray[np.bool_]


def word_pfns(words: Entries) -> Pfns:
    """int64[n]: the frames that words name."""
    return (words & _PFN_MASK).view(np.int64)


@dataclass(slots=True, eq=False)
class HmmRange:
    """`struct hmm_range`.

    Attributes:
        notifier, sequence: the subscription that covers the range, and what its read_begin returned.
        words: uint64[npages], in and out.
        default_flags: requests for all pages.
        pfn_flags_mask: which bits of the input words count as requests.
        owner: dev_private_owner: the device whose private pages are reported and not faulted back; 0 for none.
        blank: nobody has written `words` yet: only the default flags count, and what is not reached becomes 0.
        may_retry: the mmap lock may be dropped to wait for the handler of a userfaultfd.
        written: up to here `words` are written.
        failure: a fault failed that begins at this address; words below it are written before that is said.
    """

    mirror: IntervalMirror
    notifier: int
    sequence: int
    span: AddressRange
    words: Entries
    default_flags: int = 0
    pfn_flags_mask: int = 0
    owner: DeviceId = 0
    blank: bool = False
    may_retry: bool = False
    written: Address = 0
    failure: tuple[Address, BadAddressError] | None = None

    @property
    def space(self) -> AddressSpace:
        """Whose page table is looked at."""
        return self.mirror.space

    def slice(self, span: AddressRange) -> Entries:
        """The words of a part, to be written."""
        first = (span.start - self.span.start) >> PAGE_SHIFT
        return self.words[first : first + span.npages]

    def wants(self, span: AddressRange) -> tuple[_Mask, _Mask]:
        """bool[n] twice: which pages of a part have to come out VALID, and which with WRITE."""
        requests = (self.slice(span) & np.uint64(self.pfn_flags_mask)) | np.uint64(self.default_flags)
        fault: _Mask = (requests & np.uint64(REQ_FAULT)) != 0
        write: _Mask = fault & ((requests & np.uint64(REQ_WRITE)) != 0)
        return fault, write

    def wants_any(self, span: AddressRange) -> bool:
        """Whether a page of a part has to come out VALID."""
        requests = self.default_flags
        if not self.uniform:
            requests |= int(np.bitwise_or.reduce(self.slice(span))) & self.pfn_flags_mask
        return requests & REQ_FAULT != 0

    @property
    def may_fault(self) -> bool:
        """Whether it is more than a snapshot."""
        return (self.default_flags | self.pfn_flags_mask) & REQ_FAULT != 0

    @property
    def uniform(self) -> bool:
        """Whether all pages are asked for alike."""
        return not self.pfn_flags_mask & (REQ_FAULT | REQ_WRITE)


@dataclass(frozen=True, slots=True)
class _Look:
    # A part of one VMA as it is: the CPU's entries, words, and bool[n]: what has to be faulted, for writing, what can
    # not be had; and what is asked for together; and whether devices have pages in it.
    entries: Entries
    words: Entries
    need: _Mask
    need_write: _Mask
    hopeless: _Mask
    at_once: list[slice]
    with_devices: bool


def range_fault(request: HmmRange) -> Operation[None]:
    """Fill `request.words`.

    Raises:
        InvalidRequestError: an empty or unaligned range, or not as many words as pages (EINVAL).
        RangeBusyError: an invalidation came since read_begin: begin again (EBUSY).
        AccessDeniedError: a page is wanted for writing and its VMA does not permit it (EPERM), `error.address`.
        BadAddressError: a page that is wanted cannot be had: no mapping, no permission to read, behind the end of its
            file, registers, lost, missing for a userfaultfd while the lock may not be dropped, or no memory (EFAULT),
            `error.address`.  Pages below it have been faulted in.  Words are outputs up to the first of them that is
            faulted together with it.

    Cost: O(pages + VMAs), vectorised.
    """
    _check(request)
    at = request.written = request.span.start
    request.failure = None
    try:
        while at < request.span.end:
            _require_current(request)
            stop = (at // PIECE_BYTES + 1) * PIECE_BYTES
            if stop < request.span.end and request.may_fault and not has_directory(request.space, at):
                stop = (at // PUD_SIZE + 1) * PUD_SIZE  # as much as hmm_vma_walk_hole() is given
            stop = min(stop, request.span.end)
            if request.failure is not None:
                failing, error = request.failure
                if at == failing:
                    raise error
                stop = min(stop, failing)
            at = yield from _part(request, at, stop)
            if at < request.span.end and at == stop:
                yield Pause()
    except HmmError:
        if request.blank:
            request.slice(AddressRange(request.written, request.span.end)).fill(0)
        raise


def _check(request: HmmRange) -> None:
    span = request.span
    if not span or not is_page_aligned(span.start | span.end) or span.end > TASK_SIZE:
        raise InvalidRequestError(f"range fault: {span} is not a range of pages")
    if request.words.size != span.npages:
        raise InvalidRequestError(f"range fault: {request.words.size} words for the {span.npages} pages of {span}")


def _require_current(request: HmmRange) -> None:
    if request.mirror.read_retry(request.notifier, request.sequence):
        raise RangeBusyError(
            f"range fault: {request.span} was invalidated since its read section began",
            notifier_seq=request.space.notifier.sequence,
        )


def _part(request: HmmRange, at: Address, stop: Address) -> Operation[Address]:
    """What there is at `at`: a hole, or a part of one VMA.  Returns: how far its words are outputs."""
    vma = request.space.vmas.find(at)
    if vma is None:
        above = request.space.vmas.find_next(at)
        return _refuse(request, at, stop, above.start if above else TASK_SIZE, "nothing is mapped there")
    if not vma.readable or vma.has(VmFlag.IO | VmFlag.PFNMAP):
        return _refuse(request, at, stop, vma.end, f"{vma} cannot be read by a device")
    span = AddressRange(at, min(stop, vma.end))
    if _all_there(request, span):
        return span.end
    look = _look(request, vma, span)
    done = _done(look)
    out = request.slice(span)
    out[:done] = (out[:done] & np.uint64(STICKY)) | look.words[:done]
    if done == span.npages:
        return span.end
    failing = at + (done << PAGE_SHIFT)
    if look.hopeless[done]:
        raise BadAddressError(f"range fault: {failing:#x} is not memory that can be had", address=failing)
    yield from _fault(request, vma, span, look, done)
    return failing


def _refuse(request: HmmRange, at: Address, stop: Address, end: Address, why: str) -> Address:
    """hmm_vma_walk_test() and hmm_vma_walk_hole(): fail if a page is wanted up to `end`, before any word is written.

    Returns: how far words are outputs.
    """
    span = AddressRange(at, min(stop, end))
    out = request.slice(span)
    if request.blank:
        out.fill(0)
        request.written = span.end
    if request.wants_any(AddressRange(at, min(end, request.span.end))):
        raise BadAddressError(f"range fault: {at:#x}: {why}", address=at)
    out[:] = (out & np.uint64(STICKY)) | np.uint64(ERROR)
    return span.end


def _all_there(request: HmmRange, span: AddressRange) -> bool:
    """Fill in a part of one VMA when all pages are present that nobody has to fault: the short way.

    They are small pages, the zero page among them: registers are in VMAs that were refused.
    """
    if not request.blank:
        return False
    space, out = request.space, request.slice(span)
    request.written = span.end
    entries = space.table.view(span.start, span.end)
    if entries is None:
        entries = space.table.read(span.start, span.end, out)
    every = int(np.bitwise_and.reduce(entries))
    wanted = cpu_pte.PRESENT | (cpu_pte.WRITE if request.default_flags & REQ_WRITE else 0)
    if every & wanted != wanted or (space.huge and int(np.bitwise_or.reduce(entries)) & cpu_pte.HUGE):
        out.fill(0)
        return False
    flags: np.uint64 | Entries = np.uint64(VALID | WRITE)
    if not every & cpu_pte.WRITE:
        flags = (entries & np.uint64(cpu_pte.WRITE)) << _TO_WRITE | np.uint64(VALID)
    np.right_shift(entries, _TO_PFN, out=out)
    out |= flags
    return True


def _look(request: HmmRange, vma: Vma, span: AddressRange) -> _Look:
    """hmm_vma_handle_pte() for all pages of a part of one VMA."""
    space = request.space
    entries = space.table.read(span.start, span.end)
    pfns = cpu_pte.cpu_pfn(entries)
    fault, write = request.wants(span)
    at_once = [] if request.uniform else _asked_at_once(space, vma, span, entries)
    hugetlb = vma.has(VmFlag.HUGETLB) and has_directory(space, span.start)
    if at_once and hugetlb:
        for pages in at_once:  # hmm_vma_walk_hugetlb_entry() looks at the first word only
            fault[pages], write[pages] = fault[pages.start], write[pages.start]
    present = cpu_pte.is_present(entries)
    own = cpu_pte.is_device_private(entries)
    if own.any():
        own[own] = owners(space.frames, pfns[own]) == (request.owner or -1)
    writable = cpu_pte.is_writable(entries)
    registers = present & cpu_pte.is_special(entries) & (pfns != ZERO_PFN)
    words = np.zeros(entries.size, np.uint64)
    shown = present | own
    words[shown] = pfns[shown].view(np.uint64) | np.uint64(VALID)
    words[shown & writable] |= np.uint64(WRITE)
    huge = cpu_pte.is_huge(entries) if space.huge else None
    if huge is not None and huge.any():
        words[huge & shown] |= _PMD_ORDER
        words[huge & cpu_pte.is_device_private(entries) & ~own] = np.uint64(ERROR)
    if hugetlb:  # hmm_vma_walk_hugetlb_entry() says of an empty entry, too, how large it is
        absent = np.flatnonzero(entries == 0)
        words[absent] = (absent.view(np.uint64) + np.uint64(span.start >> PAGE_SHIFT)) & _IN_HUGE_PAGE | _PMD_ORDER
    need_write = write & ~(present & writable | own)
    need = np.where(present, need_write, fault & ~own)
    for pages in at_once:
        need[pages], need_write[pages] = need[pages].any(), need_write[pages].any()
    hopeless = (registers & fault & ~need) | (cpu_pte.is_poison(entries) & fault)
    words[registers] = np.uint64(ERROR)
    with_devices = int(np.bitwise_or.reduce(entries)) & _WITH_DEVICES != 0
    return _Look(entries, words, need, need_write, hopeless, at_once, with_devices)


def _asked_at_once(space: AddressSpace, vma: Vma, span: AddressRange, entries: Entries) -> list[slice]:
    """Which pages of a part of one VMA are faulted from the first on when one of them needs it, and as all need it.

    Those of a huge page, and those that have no page table.

    Args:
        entries: uint64[n], those of the part.

    Source: Linux mm/hmm.c, hmm_range_need_fault(), as hmm_vma_walk_hole() and hmm_vma_handle_pmd() call it.
    """
    found, at = [], span.start
    small = {number << PMD_SHIFT & -PUD_SIZE for number in space.tables}  # GiBs with a page table, maybe an empty one
    while at < span.end:
        first = (at - span.start) >> PAGE_SHIFT
        below = vma.has(VmFlag.HUGETLB) or at & -PUD_SIZE in small or has_directory(space, at)
        size = PMD_SIZE if below else PUD_SIZE
        end = min(span.end, (at & -size) + size)
        if size == PUD_SIZE or cpu_pte.is_huge(int(entries[first])) or not has_table(space, at & -size):
            found.append(slice(first, (end - span.start) >> PAGE_SHIFT))
        at = end
    return found


def _done(look: _Look) -> int:
    stopping = look.need | look.hopeless
    first = int(stopping.argmax())
    return first if stopping[first] else stopping.size


def _fault(request: HmmRange, vma: Vma, span: AddressRange, look: _Look, first: int) -> Operation[None]:
    """hmm_vma_fault(): fault from the first page on that needs it, in each directory to its end."""
    space = request.space
    target, write = _to_be_faulted(request, span, look, first)
    together = look.at_once if look.at_once or not _crosses(span) else _asked_at_once(space, vma, span, look.entries)
    address = span.start + (first << PAGE_SHIFT)
    if space.frames.locks.held or space.notifier.copies:
        still = yield from _not_moving(space, target)
        if still is None:
            return
        target = still
    if write and not vma.writable:
        raise AccessDeniedError(f"range fault: {vma} may not be written", errnos.EPERM, address=address)
    stop = yield from _bring_in(request, target, look, write=write)
    if stop is None or continues(space, target, stop):
        return
    why = "memory ran out" if stop.signal is None else stop.signal.value
    error = BadAddressError(f"range fault: {stop.address:#x}: {why}", address=stop.address)
    begun = _begun(span, look, together, stop.address)
    if begun <= address:
        raise error
    request.failure = begun, error


def _crosses(span: AddressRange) -> bool:
    return span.start >> PMD_SHIFT != (span.end - 1) >> PMD_SHIFT


def _begun(span: AddressRange, look: _Look, together: list[slice], failing: Address) -> Address:
    """The first page that was faulted together with one that cannot be had."""
    page = (failing - span.start) >> PAGE_SHIFT
    first = (max(span.start, failing & -PMD_SIZE) - span.start) >> PAGE_SHIFT
    first += int((look.need & ~look.hopeless)[first : page + 1].argmax())
    first = next((pages.start for pages in together if pages.start <= page < pages.stop), first)
    return span.start + (first << PAGE_SHIFT)


def _bring_in(request: HmmRange, target: AddressRange | Entries, look: _Look, *, write: bool) -> Operation[Stop | None]:
    """`bring_in`, but of what devices have only that it comes back: whether it may be written is looked at then.

    Source: Linux mm/memory.c, do_swap_page(): it returns behind migrate_to_ram() and remove_device_exclusive_entry().
    """
    space, may_retry = request.space, request.may_retry
    if not (write and look.with_devices):
        for number, piece in enumerate(pieces(target)):
            if number:
                yield Pause()
                _require_current(request)
            stop = yield from bring_in(space, piece, write=write, may_retry=may_retry)
            if stop is not None:
                return stop
        return None
    addresses = addresses_of(target)
    away = (space.table.lookup(addresses) & np.uint64(_WITH_DEVICES)) != 0
    back, rest = addresses[away], addresses[~away]
    stop = None
    if rest.size:
        stop = yield from bring_in(space, rest, write=True, may_retry=may_retry)
        if stop is not None:
            back = back[back < stop.address]
    if back.size:
        sooner = yield from bring_in(space, back, write=False, may_retry=may_retry)
        stop = sooner or stop
    return stop


def _not_moving(space: AddressSpace, target: AddressRange | Entries) -> Operation[AddressRange | Entries | None]:
    """What of the pages is not on its way: that may need no fault when it has arrived.

    Returns: None when the first of them was, and has been waited for.

    Source: Linux mm/hmm.c, hmm_vma_handle_pte(): after migration_entry_wait() the page is looked at again.
    """
    addresses = addresses_of(target)
    entries = space.table.lookup(addresses)
    moving = cpu_pte.is_migration(entries)
    if moving[0]:
        yield from migration_entry_wait(space, addresses[:1], entries[:1])
        return None
    return addresses[~moving] if moving.any() else target


def _to_be_faulted(
    request: HmmRange, span: AddressRange, look: _Look, first: int
) -> tuple[AddressRange | Entries, bool]:
    """What is faulted, and whether for writing."""
    start = span.start >> PAGE_SHIFT
    if request.uniform:
        if look.need.all() and not look.hopeless.any():
            return span, bool(look.need_write[0])
        # In every directory at once: what comes, and where that ends, is as if one came after the other.
        pages = np.arange(start, start + look.need.size)
        blocks = pages >> (PMD_SHIFT - PAGE_SHIFT)
        needy = pages[look.need & ~look.hopeless]
        which, positions = np.unique(needy >> (PMD_SHIFT - PAGE_SHIFT), return_index=True)
        begins = np.full(int(blocks[-1] - blocks[0]) + 1, np.iinfo(np.int64).max)
        begins[which - blocks[0]] = needy[positions]
        limit = int(pages[-1]) + 1
        if look.hopeless.any():  # one behind a needy page is faulted, in vain; at another one the walk ends
            hopeless = int(pages[look.hopeless.argmax()])
            in_vain = int(begins[(hopeless >> (PMD_SHIFT - PAGE_SHIFT)) - int(blocks[0])]) < hopeless
            limit = hopeless + in_vain
        chosen = pages[(pages >= begins[blocks - blocks[0]]) & (pages < limit)]
        write = bool(look.need_write[first])
        if chosen.size == int(chosen[-1]) - int(chosen[0]) + 1:
            return AddressRange(int(chosen[0]) << PAGE_SHIFT, (int(chosen[-1]) + 1) << PAGE_SHIFT), write
        return (chosen << PAGE_SHIFT).view(np.uint64), write
    page = start + first
    end = min(start + look.need.size, (page // PMD_PAGES + 1) * PMD_PAGES)
    end = next((start + pages.stop for pages in look.at_once if pages.start == first), end)
    return AddressRange(page << PAGE_SHIFT, end << PAGE_SHIFT), bool(look.need_write[first])
