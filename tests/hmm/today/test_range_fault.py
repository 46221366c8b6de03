"""hmm_range_fault(): what comes out for every state of a page, and where it fails."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest
from area import RW

from hmm import commands_device, commands_file, commands_hmm, commands_process, cpu_pte
from hmm.address_space import Thp
from hmm.errors import AccessDeniedError, BadAddressError, HmmError, InvalidRequestError, RangeBusyError
from hmm.events import Reason
from hmm.interval_notifier import IntervalMirror
from hmm.madvise import Advice
from hmm.operation_record import Caller
from hmm.range_fault import ERROR, REQ_FAULT, REQ_WRITE, STICKY, VALID, WRITE, HmmRange, range_fault, word_pfns
from hmm.semantics import LINUX_6_12, LINUX_7
from hmm.units import PAGE_SIZE, PIECE_PAGES, AddressRange
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot, VmFlag

BOTH = REQ_FAULT | REQ_WRITE


def fault(bench: Any, at: int, npages: int, flags: int = 0, mirror: int = 0) -> np.ndarray:
    """The words of pages of the window."""
    mirror = mirror or bench.mirror
    while True:
        sequence = bench.call(commands_hmm.read_begin, mirror, 1)
        try:
            faulted = bench.call(commands_hmm.range_fault, mirror, 1, sequence, bench.span(at, npages), flags)
            words: np.ndarray = faulted.require()
        except RangeBusyError:
            continue
        return words


def flags_of(words: np.ndarray) -> list[int]:
    """VALID, WRITE and ERROR of words."""
    return [word & (VALID | WRITE | ERROR) for word in words.tolist()]


def test_snapshot_never_faults(bench: Any) -> None:
    """Nothing there is 0; present pages are shown with their permission; no mapping is ERROR."""
    bench.write(0, b"x")
    bench.read(1, 1)
    assert flags_of(fault(bench, 0, 3)) == [VALID | WRITE, VALID, 0]
    assert bench.entry(2) == 0
    assert flags_of(fault(bench, 15, 3)) == [0, ERROR, ERROR]


@pytest.mark.parametrize("flags", [0, REQ_FAULT, BOTH])
@pytest.mark.parametrize("ours", [(Prot.READ,), (Prot.READ | Prot.WRITE,), (Prot.READ, Prot.READ | Prot.WRITE)])
def test_words_are_the_same_when_pages_are_asked_for_one_by_one(bench: Any, ours: tuple[Prot, ...], flags: int) -> None:
    """The short way for plain memory and the long one see the same."""
    bench.write(0, b"x" * 16 * PAGE_SIZE)
    for at in range(16):
        start = bench.span(at).start
        bench.call(commands_process.mprotect, bench.process, start, PAGE_SIZE, ours[at % len(ours)])
    sequence = bench.call(commands_hmm.read_begin, bench.mirror, 1)
    words = np.full(16, flags | 1, np.uint64)  # not blank, but for a bit that means nothing
    arguments = (bench.mirror, 1, sequence, bench.span(0, 16))
    short = bench.call(commands_hmm.range_fault, *arguments, flags)
    long = bench.call(commands_hmm.range_fault, *arguments, 0, BOTH, words)
    assert type(short.error) is type(long.error)
    if short.error is None:
        assert short.words.tolist() == long.words.tolist()


def test_read_request_brings_the_zero_page(bench: Any) -> None:
    """Untouched anonymous memory is VALID and not WRITE behind a read fault."""
    words = fault(bench, 0, 4, REQ_FAULT)
    assert flags_of(words) == [VALID] * 4
    assert word_pfns(words).tolist() == [0] * 4


def test_write_request_brings_pages_of_their_own(bench: Any) -> None:
    """REQ_WRITE comes out WRITE, also where the zero page was; the driver hears of the copies and starts over."""
    bench.read(0, PAGE_SIZE)
    words = fault(bench, 0, 4, BOTH)
    assert flags_of(words) == [VALID | WRITE] * 4
    assert np.unique(word_pfns(words)).size == 4
    assert [event.spans for event in bench.heard.events] == [(bench.span(0),)]


@pytest.mark.parametrize(
    ("prot", "flags", "number"),
    [
        (Prot.NONE, REQ_FAULT, errno.EFAULT),
        (Prot.NONE, BOTH, errno.EFAULT),
        (Prot.WRITE, BOTH, errno.EFAULT),
        (Prot.READ, BOTH, errno.EPERM),
    ],
)
def test_fault_fails_when_the_mapping_does_not_permit_it(bench: Any, prot: Prot, flags: int, number: int) -> None:
    """Without VM_READ it is EFAULT, for writing without VM_WRITE EPERM; pages below have been faulted in."""
    bench.map(2, prot, at=16)
    with pytest.raises(HmmError) as error:
        fault(bench, 14, 4, flags)
    assert error.value.errno == number
    assert error.value.address == bench.span(16).start
    assert cpu_pte.is_present(bench.entry(15))


def test_fault_fails_when_nothing_is_mapped(bench: Any) -> None:
    """A hole is EFAULT at its first address."""
    with pytest.raises(BadAddressError) as error:
        fault(bench, 14, 4, REQ_FAULT)
    assert error.value.address == bench.span(16).start


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_words_of_what_cannot_be_had_stay_inputs_when_any_page_of_it_is_wanted(
    bench: Any, *, mapped: bool, wanted: bool
) -> None:
    """hmm_vma_walk_hole() and hmm_vma_walk_test() get all of a hole, or of a VMA, however large it is."""
    npages = 2 * PIECE_PAGES
    if mapped:
        bench.map(npages, Prot.NONE, at=16)
    words = np.ones(npages, np.uint64)
    words[-1] |= np.uint64(REQ_FAULT if wanted else 0)
    before = words.copy()
    sequence = bench.call(commands_hmm.read_begin, bench.mirror, 1)
    arguments = (bench.mirror, 1, sequence, bench.span(16, npages), 0, REQ_FAULT, words)
    faulted = bench.call(commands_hmm.range_fault, *arguments)
    if wanted:
        assert faulted.error.address == bench.span(16).start
        assert np.array_equal(faulted.words, before)
    else:
        assert faulted.error is None
        assert (faulted.words == ERROR).all()


def test_words_above_the_failing_address_are_still_inputs(bench: Any) -> None:
    """On an error outputs end where it happened; the sticky bits survive in all."""
    mirror = bench.local.machine.receivers[bench.mirror]
    assert isinstance(mirror, IntervalMirror)
    words = np.full(4, STICKY | 7, np.uint64)
    request = HmmRange(
        mirror, 1, bench.call(commands_hmm.read_begin, bench.mirror, 1), bench.span(14, 4), words, REQ_FAULT
    )
    with pytest.raises(BadAddressError):
        for _ in range_fault(request):
            pass
    assert (words[:2] & np.uint64(VALID | STICKY) == VALID | STICKY).all()
    assert words[2:].tolist() == [STICKY | 7] * 2


@pytest.mark.parametrize(
    ("flags", "outdated", "expected"),
    [
        (REQ_FAULT, 0, [VALID, VALID, 0, 0]),
        (REQ_FAULT, 1, [0, 0, 0, 0]),
        (0, 0, [0, 0, ERROR, ERROR]),
    ],
)
def test_words_become_zero_behind_a_failure_when_nobody_has_written_them(
    bench: Any, flags: int, outdated: int, expected: list[int]
) -> None:
    """What memory for words held before is nothing that a caller may see."""
    mirror = bench.local.machine.receivers[bench.mirror]
    assert isinstance(mirror, IntervalMirror)
    words = np.full(4, 0xFFFF_FFFF_FFFF_FFFF, np.uint64)
    sequence = bench.call(commands_hmm.read_begin, bench.mirror, 1) + 2 * outdated
    request = HmmRange(mirror, 1, sequence, bench.span(14, 4), words, flags, BOTH, blank=True)
    try:
        for _ in range_fault(request):
            pass
    except (BadAddressError, RangeBusyError):
        assert flags
    assert flags_of(words) == expected
    assert not word_pfns(words[2:]).any()


def test_page_requests_count_when_the_mask_says_so(bench: Any) -> None:
    """Each page is asked for by its own word; what nobody asks for may be faulted in too, but need not."""
    words = np.array([0, REQ_FAULT, 0, 0], np.uint64)
    sequence = bench.call(commands_hmm.read_begin, bench.mirror, 1)
    found = bench.call(commands_hmm.range_fault, bench.mirror, 1, sequence, bench.span(0, 4), 0, BOTH, words).require()
    assert flags_of(found)[1] == VALID
    bench.write(8, b"x")
    words = np.array([0, 0, BOTH], np.uint64)
    sequence = bench.call(commands_hmm.read_begin, bench.mirror, 1)
    found = bench.call(commands_hmm.range_fault, bench.mirror, 1, sequence, bench.span(8, 3), 0, BOTH, words).require()
    assert flags_of(found) == [VALID | WRITE, 0, VALID | WRITE]


def test_pages_without_a_page_table_are_asked_for_together_when_one_is_wanted(bench: Any) -> None:
    """hmm_vma_walk_hole() faults all of them, for writing if one is wanted so, from the first on."""
    words = np.array([0, REQ_FAULT, BOTH, 0], np.uint64)
    sequence = bench.call(commands_hmm.read_begin, bench.mirror, 1)
    found = bench.call(commands_hmm.range_fault, bench.mirror, 1, sequence, bench.span(0, 4), 0, BOTH, words).require()
    assert flags_of(found) == [VALID | WRITE] * 4


def test_fault_fails_when_the_section_is_outdated(bench: Any) -> None:
    """An invalidation since read_begin is EBUSY, with the sequence to start again from."""
    sequence = bench.call(commands_hmm.read_begin, bench.mirror, 1)
    bench.call(commands_process.munmap, bench.process, bench.span(9).start, PAGE_SIZE)
    with pytest.raises(RangeBusyError):
        bench.call(commands_hmm.range_fault, bench.mirror, 1, sequence, bench.span(0), REQ_FAULT).require()


def test_fault_fails_when_the_request_is_malformed(bench: Any) -> None:
    """An empty range, or words that are not as many as pages, are EINVAL."""
    for words in (None, np.zeros(3, np.uint64)):
        span = bench.span(0, 2 if words is not None else 0)
        with pytest.raises(InvalidRequestError):
            bench.call(commands_hmm.range_fault, bench.mirror, 1, 1, span, REQ_FAULT, 0, words)


def test_own_pages_are_reported_where_they_are(bench: Any) -> None:
    """A page in the asking device's memory is VALID with the device's frame, whatever is requested."""
    bench.write(0, b"x" * 2 * PAGE_SIZE)
    bench.to_device(0, 2)
    first, end = bench.call(commands_hmm.device_frames, bench.device)
    words = fault(bench, 0, 2, BOTH)
    assert flags_of(words) == [VALID | WRITE] * 2
    assert ((word_pfns(words) >= first) & (word_pfns(words) < end)).all()


def test_own_read_only_page_is_valid_though_writing_was_requested(bench: Any) -> None:
    """The kernel does not enforce REQ_WRITE for own device pages: success without WRITE."""
    bench.write(0, b"x")
    bench.to_device(0, 1)
    for prot in (Prot.READ, Prot.READ | Prot.WRITE):
        bench.call(commands_process.mprotect, bench.process, bench.span(0).start, PAGE_SIZE, prot)
    assert flags_of(fault(bench, 0, 1, BOTH)) == [VALID]


def test_own_pages_behind_a_needy_one_come_back(bench: Any) -> None:
    """One page that needs a fault makes everything behind it fault, own device pages included; those before stay."""
    bench.write(0, b"x" * 4 * PAGE_SIZE)
    bench.call(commands_process.madvise, bench.process, bench.span(2).start, PAGE_SIZE, 4)
    bench.to_device(0, 2)
    bench.to_device(3, 1)
    fault(bench, 0, 4, REQ_FAULT)
    kinds = [cpu_pte.is_device_private(bench.entry(at)) for at in range(4)]
    assert kinds == [True, True, False, False]


def test_pages_of_another_device_are_nothing_or_come_back(bench: Any) -> None:
    """In a snapshot they are 0 and stay; a request pulls them to system memory."""
    bench.write(0, b"x")
    bench.to_device(0, 1)
    other = bench.call(commands_device.register_device, "other")
    mirror, _ = bench.attach(other, bench.process)
    assert flags_of(fault(bench, 0, 1, 0, mirror)) == [0]
    assert flags_of(fault(bench, 0, 1, REQ_FAULT, mirror)) == [VALID | WRITE]
    assert bench.used == 0


@pytest.mark.parametrize("taken", ["by another device", "for atomic access"])
def test_pages_behind_what_a_device_has_are_faulted_for_writing(make_bench: Any, taken: str) -> None:
    """hmm_pte_need_fault() is asked as if nothing were there: what a writable entry of a device says does not count.

    So what lies behind, and a huge page in the next directory, comes for writing at once, and no zero page is replaced.
    """
    bench = make_bench(frames=3000, mapped_pages=1024, thp=Thp.NEVER)
    bench.write(510, b"x")
    other, heard = bench.attach(bench.call(commands_device.register_device, "other"), bench.process)
    if taken == "by another device":
        bench.to_device(510, 1)
    else:
        bench.call(commands_hmm.make_exclusive, bench.mirror, bench.span(510))
    heard.events.clear()
    machine = bench.local.machine
    machine.process(bench.process).space.thp = Thp.ALWAYS
    assert flags_of(fault(bench, 510, 514, BOTH, other)) == [VALID | WRITE] * 514
    revoked = Reason.MIGRATE if taken == "by another device" else Reason.EXCLUSIVE
    assert [(event.reason, event.spans) for event in heard.events] == [(revoked, (bench.span(510),))]
    assert cpu_pte.is_huge(bench.entry(512))


def test_page_that_comes_back_for_a_device_is_not_written_yet(bench: Any) -> None:
    """do_swap_page() returns behind migrate_to_ram(): a writable entry is all that the fault for writing looks for."""
    bench.write(0, b"x")
    bench.to_device(0, 1)
    bench.call(commands_process.clear_refs, bench.process, 4)
    other, _ = bench.attach(bench.call(commands_device.register_device, "other"), bench.process)
    assert flags_of(fault(bench, 0, 1, BOTH, other)) == [VALID | WRITE]
    assert not bench.entry(0) & (cpu_pte.DIRTY | cpu_pte.SOFT_DIRTY)


@pytest.mark.parametrize(("replaced", "error", "found"), [(True, RangeBusyError, 0), (False, BadAddressError, 4)])
def test_words_are_outputs_up_to_a_failure_in_another_directory(
    make_bench: Any, error: type[HmmError], found: int, *, replaced: bool
) -> None:
    """hmm_range_fault() walks on from where it faulted: what lies before a page that cannot be had is written by then.

    Not what is faulted together with it.  If a page was replaced before, that is noticed before anybody comes to the
    one that cannot be had: -EBUSY.
    """
    bench = make_bench(mapped_pages=1)
    span = file_that_ends(bench, at=508, npages=8, mapped=10)
    bench.read(0, 1)
    if replaced:
        bench.read(509, 1)
    sequence = bench.call(commands_hmm.read_begin, bench.mirror, 1)
    faulted = bench.call(commands_hmm.range_fault, bench.mirror, 1, sequence, span, BOTH)
    assert isinstance(faulted.error, error)
    assert flags_of(faulted.words) == [VALID | WRITE] * found + [0] * (10 - found)
    assert cpu_pte.is_present(bench.entry(515))


def file_that_ends(bench: Any, at: int, npages: int, mapped: int) -> AddressRange:
    """Map more pages of a file than it has, as private memory.  Returns: where."""
    file = bench.call(commands_file.open_file, "f", create=True)
    bench.call(commands_file.truncate_file, file, npages * PAGE_SIZE)
    span: AddressRange = bench.span(at, mapped)
    private = MapFlag.PRIVATE | MapFlag.FIXED
    bench.call(commands_process.mmap, bench.process, span.start, span.size_bytes, RW, private, file)
    return span


@pytest.mark.parametrize(("table", "found"), [(False, 0), (True, 512)])
def test_words_stay_inputs_when_a_page_without_a_page_table_cannot_be_had(
    make_bench: Any, *, table: bool, found: int
) -> None:
    """hmm_vma_walk_hole() gives hmm_vma_fault() a whole GiB; where that has a table of directories, 2 MiB of it."""
    bench = make_bench(mapped_pages=1, frames=1000)
    span = file_that_ends(bench, at=1024, npages=520, mapped=1024)
    if table:
        bench.read(0, 1)
    sequence = bench.call(commands_hmm.read_begin, bench.mirror, 1)
    faulted = bench.call(commands_hmm.range_fault, bench.mirror, 1, sequence, span, REQ_FAULT)
    assert isinstance(faulted.error, BadAddressError)
    assert faulted.error.address == span.start + 520 * PAGE_SIZE
    assert flags_of(faulted.words) == [VALID] * found + [0] * (1024 - found)


@pytest.mark.parametrize(("table", "found"), [(False, 0), (True, PIECE_PAGES)])
def test_words_stay_inputs_when_a_page_far_behind_without_a_page_table_cannot_be_had(
    make_bench: Any, *, table: bool, found: int
) -> None:
    """hmm_vma_walk_hole() faults up to a GiB before anybody comes to a word of it."""
    npages = PIECE_PAGES + 8
    bench = make_bench(mapped_pages=1, frames=npages + 1000)
    first = PIECE_PAGES - bench.span(0).start // PAGE_SIZE % PIECE_PAGES
    span = file_that_ends(bench, at=first, npages=npages, mapped=npages + 8)
    if table:
        bench.read(first, 1)
    sequence = bench.call(commands_hmm.read_begin, bench.mirror, 1)
    faulted = bench.call(commands_hmm.range_fault, bench.mirror, 1, sequence, span, REQ_FAULT)
    assert isinstance(faulted.error, BadAddressError)
    assert faulted.error.address == span.start + npages * PAGE_SIZE
    assert cpu_pte.is_present(bench.entry(first + npages - 1))
    assert np.array_equal(faulted.words & np.uint64(VALID) != 0, np.arange(npages + 8) < found)


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize(
    ("present", "found"),
    [
        ([0, 1, 2, 3, 4, 5], 4),  # hmm_vma_handle_pte() comes to the lost page: -EFAULT
        ([0, 1, 3, 4], 2),  # hmm_vma_fault() begins at the third, and comes to it in vain
        ([0, 1, 2, 3], 4),  # nobody comes to the one behind it
    ],
)
def test_words_between_a_missing_page_and_a_lost_one_stay_inputs(
    bench: Any, present: list[int], found: int, *, one_by_one: bool
) -> None:
    """hmm_vma_fault() of Linux 6.12 ends with -EFAULT, and hmm_range_fault() does not walk again."""
    bench.local.machine.capable = True
    for at in [*present, 4]:
        bench.write(at, b"x")
    lost = bench.span(4)
    bench.call(commands_process.madvise, bench.process, lost.start, lost.size_bytes, Advice.HWPOISON)
    sequence = bench.call(commands_hmm.read_begin, bench.mirror, 1)
    requests = (0, BOTH, np.full(8, REQ_FAULT | 1, np.uint64)) if one_by_one else (REQ_FAULT,)
    faulted = bench.call(commands_hmm.range_fault, bench.mirror, 1, sequence, bench.span(0, 8), *requests)
    assert isinstance(faulted.error, BadAddressError)
    assert faulted.error.address == lost.start
    assert flags_of(faulted.words) == [VALID | WRITE] * found + [REQ_FAULT if one_by_one else 0] * (8 - found)
    assert [bool(cpu_pte.is_present(bench.entry(at))) for at in range(5, 8)] == [at in present for at in range(5, 8)]


def test_fault_fails_behind_the_end_of_a_file(bench: Any) -> None:
    """A fault that the CPU would get SIGBUS for is EFAULT."""
    file = bench.call(commands_file.open_file, "f", create=True)
    bench.call(commands_file.truncate_file, file, PAGE_SIZE)
    span = bench.span(32, 2)
    shared = MapFlag.SHARED | MapFlag.FIXED
    bench.call(commands_process.mmap, bench.process, span.start, span.size_bytes, Prot.READ, shared, file)
    with pytest.raises(BadAddressError) as error:
        fault(bench, 32, 2, REQ_FAULT)
    assert error.value.address == span.start + PAGE_SIZE


def test_fault_spans_directories_and_mappings(make_bench: Any) -> None:
    """A range over many directories and two mappings is one call; holes in it are filled."""
    bench = make_bench(frames=4000)
    bench.map(1500, at=500)
    bench.map(100, Prot.READ, at=2000)
    bench.write(700, b"x")
    words = fault(bench, 500, 1600, REQ_FAULT)
    assert flags_of(words)[200] == VALID | WRITE
    assert (words & np.uint64(VALID) != 0).all()
    with pytest.raises(AccessDeniedError) as error:
        fault(bench, 500, 1600, BOTH)
    assert error.value.address == bench.span(2000).start
    assert (fault(bench, 500, 1500) & np.uint64(WRITE) != 0).all()
    bench.local.machine.check()


def test_registers_are_errors(bench: Any) -> None:
    """A driver's registers have no pages: ERROR in a snapshot, EFAULT when requested."""
    registers = bench.call(commands_file.open_device_file, "regs", VmFlag.IO | VmFlag.PFNMAP)
    span = bench.span(40, 1)
    shared = MapFlag.SHARED | MapFlag.FIXED
    bench.call(commands_process.mmap, bench.process, span.start, span.size_bytes, Prot.READ, shared, registers)
    assert flags_of(fault(bench, 40, 1)) == [ERROR]
    with pytest.raises(BadAddressError):
        fault(bench, 40, 1, REQ_FAULT)


def unlocked(bench: Any, at: int, npages: int, flags: int = 0, **more: Any) -> Any:
    """The one-call form."""
    return bench.call(
        commands_hmm.range_fault_unlocked, bench.mirror, bench.notifier, bench.span(at, npages), flags, **more
    )


def test_one_call_begins_faults_and_retries(bench: Any) -> None:
    """A write fault replaces the zero page, which disturbs the read section: it starts over and says so."""
    bench.read(0, 1)
    faulted = unlocked(bench, 0, 2, BOTH)
    assert flags_of(faulted.require()) == [VALID | WRITE] * 2
    assert (faulted.retries, faulted.event_sequence) == (1, 1)
    assert not bench.call(commands_hmm.read_retry, bench.mirror, bench.notifier, faulted.notifier_seq)
    assert unlocked(bench, 0, 2, BOTH).retries == 0


def test_one_call_returns_what_lies_below_the_failing_address(bench: Any) -> None:
    """Outputs up to there, inputs behind it; the error names the address."""
    words = np.full(4, REQ_FAULT, np.uint64)
    faulted = unlocked(bench, 14, 4, 0, pfn_flags_mask=REQ_FAULT, words=words)
    assert isinstance(faulted.error, BadAddressError)
    assert faulted.error.address == bench.span(16).start
    assert flags_of(faulted.words) == [VALID, VALID, REQ_FAULT, REQ_FAULT]
    with pytest.raises(BadAddressError):
        faulted.require()


def busy(bench: Any) -> tuple[Any, Any]:
    """An munmap whose callback is not answered, and a one-call fault that waits for it."""
    machine = bench.local.machine
    span = bench.span(0, 4)
    unmapping = machine.start(Caller(), commands_process.munmap, bench.process, span.start, span.size_bytes)
    waiting = machine.start(Caller(), commands_hmm.range_fault_unlocked, bench.mirror, bench.notifier, span, REQ_FAULT)
    assert machine.blockers(waiting) == [unmapping.id]
    return unmapping, waiting


def test_one_call_ends_with_ebusy_when_its_time_is_up(bench: Any) -> None:
    """hmm_range_fault_unlocked_timeout(): the retry budget is spent while the range is being invalidated."""
    unmapping, waiting = busy(bench)
    bench.local.machine.time_out(waiting.id)
    assert waiting.result.error.errno == errno.EBUSY
    (delivery,) = bench.local.machine.take_outbox()
    bench.local.machine.answer(delivery.mirror_id, delivery.sequence)
    bench.local.machine.resume(unmapping.id)
    assert unmapping.done


def test_one_call_goes_on_when_the_invalidation_ends_in_time(bench: Any) -> None:
    """What it waited for is gone, and so is the mapping: EFAULT."""
    unmapping, waiting = busy(bench)
    (delivery,) = bench.local.machine.take_outbox()
    bench.local.machine.answer(delivery.mirror_id, delivery.sequence)
    bench.local.machine.resume(unmapping.id)
    bench.local.machine.resume(waiting.id)
    assert waiting.result.error.errno == errno.EFAULT


def test_one_call_ends_behind_its_own_event_when_its_time_is_up_meanwhile(bench: Any) -> None:
    """Events that are out are waited for; then it does not retry any more."""
    bench.read(0, 1)
    machine = bench.local.machine
    record = machine.start(
        Caller(), commands_hmm.range_fault_unlocked, bench.mirror, bench.notifier, bench.span(0), BOTH
    )
    machine.time_out(record.id)
    assert not record.done
    (delivery,) = machine.take_outbox()
    machine.answer(delivery.mirror_id, delivery.sequence)
    machine.resume(record.id)
    assert record.result.error.errno == errno.EBUSY
    assert cpu_pte.is_writable(bench.entry(0))


@pytest.mark.parametrize("semantics", [LINUX_6_12, LINUX_7])
def test_fault_is_efault_when_memory_runs_out(make_bench: Any, semantics: Any) -> None:
    """hmm_vma_fault() of 6.12 and of 7.2 makes EFAULT of every VM_FAULT_ERROR of handle_mm_fault()."""
    bench = make_bench(frames=8, semantics=semantics)
    with pytest.raises(BadAddressError) as error:
        fault(bench, 0, 12, BOTH)
    assert error.value.errno == errno.EFAULT
