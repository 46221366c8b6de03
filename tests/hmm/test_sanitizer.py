"""The driver sanitizer: each kind of violation is recognised, and attributed to what took the translation."""

from __future__ import annotations

import numpy as np
import pytest

from hmm import commands_device as devices
from hmm import commands_hmm as today
from hmm import commands_process as processes
from hmm import dispatch, pte, sanitizer
from hmm.device_access import PLAIN, Manner
from hmm.errors import AccessDeniedError, BadAddressError, DeviceLostError, HmmError, NoSuchObjectError
from hmm.limits import Limits
from hmm.local import Local
from hmm.machine import Machine
from hmm.madvise import Advice
from hmm.operation_record import Caller
from hmm.units import PAGE_SIZE, AddressRange, Entries
from hmm.unmapped_area import MapFlag
from hmm.violation import Violation, ViolationKind
from hmm.vma import Prot

START = 0x1000_0000
FIXED = MapFlag.PRIVATE | MapFlag.ANONYMOUS | MapFlag.FIXED
SPAN = AddressRange(START, START + 4 * PAGE_SIZE)


class Bench:
    """Eight writable pages; the first four are faulted for writing.  Every event is answered at once."""

    def __init__(self, *, dma: bool = False, lenient: bool = False) -> None:
        self.local = Local(Machine(Limits(frames=256, device_frames=16)))
        self.machine = self.local.machine
        self.call = self.local.call
        self.pid = self.call(processes.create_process)
        self.call(processes.mmap, self.pid, START, 8 * PAGE_SIZE, Prot.READ | Prot.WRITE, FIXED)
        self.device = self.call(devices.register_device, "gpu", dma=dma)
        self.id = self.call(devices.register_mirror, self.device, self.pid, lenient=lenient)
        self.entries = self.fault(write=True)
        self.mirror = self.machine.mirrors[self.id]

    def fault(self, *, write: bool) -> Entries:
        """Bring the four pages in."""
        return self.call(devices.fault, self.id, [SPAN], write=write).entries

    def read(self, address: int = START, manner: Manner = PLAIN) -> bytes:
        """A device read of one page's first bytes."""
        return self.call(devices.device_read, self.id, [(address, 8)], manner)

    def write(self, address: int = START, manner: Manner = PLAIN) -> None:
        """A device write."""
        self.call(devices.device_write, self.id, [(address, 8)], b"written!", manner)

    @property
    def kinds(self) -> list[ViolationKind]:
        """What was reported."""
        return [violation.kind for violation in self.mirror.reports.kept]

    @property
    def last(self) -> Violation:
        """What was reported last."""
        return self.mirror.reports.kept[-1]


@pytest.fixture
def bench() -> Bench:
    """A mirror with frame numbers."""
    return Bench()


def test_read_is_attributed_to_the_event_that_took_the_page(bench: Bench) -> None:
    """Use after invalidation: the event, its number, range, cause and operation; and the error carries it."""
    bench.call(processes.munmap, bench.pid, START, 2 * PAGE_SIZE)
    with pytest.raises(BadAddressError) as caught:
        bench.read(START + PAGE_SIZE)
    violation = caught.value.violation
    assert violation is not None
    assert violation == bench.last
    assert violation.kind is ViolationKind.USE_AFTER_INVALIDATION
    assert (violation.address, violation.pages, violation.write) == (START + PAGE_SIZE, 1, False)
    taking = violation.taking
    assert taking is not None
    assert (taking.event, taking.cause, taking.sequence) == ("MUNMAP", "munmap", bench.mirror.sequence)
    assert (taking.start, taking.end, taking.settled) == (START, START + 2 * PAGE_SIZE, True)
    assert taking.operation_id < violation.operation_id
    assert "MUNMAP" in caught.value.message


@pytest.mark.parametrize(
    ("since", "kind"),
    [(0, ViolationKind.EARLY_ACKNOWLEDGEMENT), (1, ViolationKind.EARLY_ACKNOWLEDGEMENT),
     (2, ViolationKind.USE_AFTER_INVALIDATION), (None, ViolationKind.USE_AFTER_INVALIDATION)],
)  # fmt: skip
def test_access_was_under_way_or_came_later_as_the_sequence_it_names_says(
    bench: Bench, since: int | None, kind: ViolationKind
) -> None:
    """Begun before the driver heard of the event (#2): acknowledged too early; afterwards: used after invalidation."""
    bench.call(processes.munmap, bench.pid, START, PAGE_SIZE)
    assert bench.mirror.sequence == 2
    with pytest.raises(BadAddressError):
        bench.write(START, Manner(since=since))
    assert bench.last.kind is kind


def test_late_write_means_early_acknowledgement_when_the_change_waits_for_others() -> None:
    """Without a sequence: a write between the answer and the change was under way when the driver answered."""
    machine = Machine(Limits(frames=256, device_frames=0))
    local = Local(machine)
    pid = local.call(processes.create_process)
    local.call(processes.mmap, pid, START, 4 * PAGE_SIZE, Prot.READ | Prot.WRITE, FIXED)
    mirrors = []
    for name in ("quick", "slow"):
        device = local.call(devices.register_device, name)
        mirrors.append(local.call(devices.register_mirror, device, pid, update_on_fault=False))
        local.call(devices.fault, mirrors[-1], [SPAN], write=True)
    record = machine.start(Caller(), processes.munmap, pid, START, PAGE_SIZE)
    machine.answer(mirrors[0], 1)
    assert not record.done
    with pytest.raises(BadAddressError) as caught:
        local.call(devices.device_write, mirrors[0], [(START, 1)], b"x")
    assert caught.value.violation is not None
    assert caught.value.violation.kind is ViolationKind.EARLY_ACKNOWLEDGEMENT
    assert caught.value.violation.taking is not None
    assert not caught.value.violation.taking.settled
    local.call(devices.device_write, mirrors[1], [(START, 1)], b"x")


@pytest.mark.parametrize("event", ["FORK", "WRITE_PROTECT"])
def test_write_is_attributed_to_what_took_the_permission(bench: Bench, event: str) -> None:
    """Write through a read-only entry: what took the right to write; reading goes on."""
    if event == "FORK":
        bench.call(processes.fork, bench.pid)
    else:
        bench.call(processes.mprotect, bench.pid, START, PAGE_SIZE, Prot.READ)
    bench.read()
    with pytest.raises(AccessDeniedError) as caught:
        bench.write()
    assert bench.last == caught.value.violation
    assert bench.last.kind is ViolationKind.READ_ONLY_WRITE
    assert bench.last.taking is not None
    assert bench.last.taking.event == event


def test_write_is_attributed_to_nothing_when_the_entry_never_permitted_it(bench: Bench) -> None:
    """A page that was faulted for reading where the CPU may not write."""
    bench.call(processes.mmap, bench.pid, START + 16 * PAGE_SIZE, PAGE_SIZE, Prot.READ, FIXED)
    span = AddressRange(START + 16 * PAGE_SIZE, START + 17 * PAGE_SIZE)
    bench.call(devices.fault, bench.id, [span], write=False)
    with pytest.raises(AccessDeniedError):
        bench.write(span.start)
    assert (bench.last.kind, bench.last.taking) == (ViolationKind.READ_ONLY_WRITE, None)


def test_access_without_a_fault_has_no_translation(bench: Bench) -> None:
    """Nothing took it: it never was there."""
    with pytest.raises(BadAddressError):
        bench.read(START + 5 * PAGE_SIZE)
    assert (bench.last.kind, bench.last.taking) == (ViolationKind.NO_TRANSLATION, None)


def test_named_entry_of_another_frame_is_stale_when_an_event_took_it(bench: Bench) -> None:
    """The device goes by an entry of its own: the mirror's has another frame by now."""
    bench.call(processes.madvise, bench.pid, START, PAGE_SIZE, Advice.DONTNEED)
    bench.call(processes.write_memory, bench.pid, START + 6 * PAGE_SIZE, b"takes the frame")
    fresh = bench.fault(write=True)
    assert fresh[0] != bench.entries[0]
    bench.read(START, Manner(named=fresh[:1]))
    with pytest.raises(BadAddressError):
        bench.read(START, Manner(named=bench.entries[:1]))
    assert bench.last.kind is ViolationKind.USE_AFTER_INVALIDATION
    assert bench.last.taking is not None
    assert bench.last.taking.cause == "madvise dontneed"


def test_named_entry_of_a_frame_it_never_had_is_foreign(bench: Bench) -> None:
    """A frame number that nobody gave to this mirror at this address."""
    with pytest.raises(BadAddressError):
        bench.write(START, Manner(named=bench.entries[1:2]))
    assert (bench.last.kind, bench.last.taking) == (ViolationKind.FOREIGN_FRAME, None)


def test_named_entry_that_is_read_only_permits_no_write(bench: Bench) -> None:
    """What counts is what the device's own table says."""
    with pytest.raises(AccessDeniedError):
        bench.write(START, Manner(named=bench.entries[:1] & np.uint64(pte.MASK_WRITE_PROTECT)))
    assert bench.last.kind is ViolationKind.READ_ONLY_WRITE


def test_dma_address_is_attributed_after_it_was_unmapped() -> None:
    """An iova is never used again: what took the page that it stood for is still known."""
    bench = Bench(dma=True)
    iova = int(pte.pte_dma_addr(bench.entries)[2])
    bench.write(iova, Manner(dma=True))
    bench.call(processes.munmap, bench.pid, START, 4 * PAGE_SIZE)
    with pytest.raises(BadAddressError) as caught:
        bench.write(iova, Manner(dma=True))
    assert caught.value.address == iova
    assert bench.last.address == START + 2 * PAGE_SIZE
    assert bench.last.kind is ViolationKind.USE_AFTER_INVALIDATION
    assert bench.last.taking is not None
    assert bench.last.taking.event == "MUNMAP"


@pytest.mark.parametrize("iova", [0x5000, 1 << 40])
def test_dma_address_of_nobody_is_foreign(iova: int) -> None:
    """It was never handed out to this mirror."""
    bench = Bench(dma=True)
    with pytest.raises(BadAddressError):
        bench.read(iova, Manner(dma=True))
    assert (bench.last.kind, bench.last.address) == (ViolationKind.FOREIGN_FRAME, iova)


def test_access_after_the_fence_is_reported(bench: Bench) -> None:
    """A fenced mirror has nothing any more, and its device is told so."""
    bench.machine.fence(bench.id, "it hung")
    with pytest.raises(DeviceLostError) as caught:
        bench.read()
    assert caught.value.violation == bench.last
    assert bench.last.kind is ViolationKind.ACCESS_AFTER_FENCE


def test_access_after_the_end_of_the_process_is_attributed_to_it(bench: Bench) -> None:
    """2015: MUNMAP of everything, then release."""
    bench.call(processes.exit_process, bench.pid)
    with pytest.raises(NoSuchObjectError):
        bench.read()
    assert bench.last.kind is ViolationKind.USE_AFTER_INVALIDATION
    assert bench.last.taking is not None
    assert bench.last.taking.event == "RELEASE"


def test_access_after_the_drivers_own_discard_is_attributed_to_it(bench: Bench) -> None:
    """hmm_mirror_range_discard(): the driver took it itself."""
    bench.call(devices.discard_range, bench.id, AddressRange(START, START + PAGE_SIZE))
    with pytest.raises(BadAddressError, match="own discard"):
        bench.read(START, Manner(since=bench.mirror.sequence))
    assert bench.last.kind is ViolationKind.USE_AFTER_INVALIDATION
    assert bench.last.taking is not None
    assert bench.last.taking.event == "DISCARD"


@pytest.mark.parametrize("call", ["munmap", "fork", "mprotect", "discard"])
def test_untracked_write_is_lost_when_nobody_reports_it(bench: Bench, call: str) -> None:
    """The device sets no dirty bits, and the driver gave the pages up, or the right to write, without a report."""
    bench.write(START, Manner(untracked=True))
    bench.write(START + PAGE_SIZE, Manner(untracked=True))
    if call == "munmap":
        bench.call(processes.munmap, bench.pid, START, 4 * PAGE_SIZE)
    elif call == "fork":
        bench.call(processes.fork, bench.pid)
    elif call == "mprotect":
        bench.call(processes.mprotect, bench.pid, START, 4 * PAGE_SIZE, Prot.READ)
    else:
        bench.call(devices.discard_range, bench.id, SPAN)
    assert bench.kinds == [ViolationKind.DIRTY_NOT_REPORTED]
    assert (bench.last.address, bench.last.pages) == (START, 2)
    assert bench.last.taking is not None
    assert not bench.mirror.owed.size


def test_untracked_write_is_no_violation_when_it_is_reported_in_time(bench: Bench) -> None:
    """By hmm_mirror_range_dirty(), or with the answer to the event itself."""
    bench.write(START, Manner(untracked=True))
    bench.call(devices.dirty_range, bench.id, AddressRange(START, START + PAGE_SIZE))
    bench.write(START + PAGE_SIZE, Manner(untracked=True))
    record = bench.machine.start(Caller(), processes.munmap, bench.pid, START, 4 * PAGE_SIZE)
    bench.machine.answer(bench.id, bench.mirror.sequence, 0, (AddressRange(START + PAGE_SIZE, START + 2 * PAGE_SIZE),))
    bench.machine.resume(record.id)
    assert record.done
    assert bench.kinds == []


def test_refused_access_does_not_fail_when_the_mirror_is_lenient() -> None:
    """As behind an IOMMU: reads give ones, writes go nowhere; both are reported."""
    bench = Bench(lenient=True)
    bench.call(processes.mprotect, bench.pid, START, PAGE_SIZE, Prot.READ)
    before = bench.read()
    bench.write()
    assert bench.read() == before
    bench.call(processes.munmap, bench.pid, START, PAGE_SIZE)
    assert bench.read() == b"\xff" * 8
    assert bench.kinds == [ViolationKind.READ_ONLY_WRITE, ViolationKind.USE_AFTER_INVALIDATION]


def test_reports_are_bounded_and_all_are_counted(bench: Bench) -> None:
    """The first violations are kept in full."""
    for _ in range(sanitizer.VIOLATIONS_KEPT + 5):
        with pytest.raises(BadAddressError):
            bench.read(START + 6 * PAGE_SIZE)
    assert len(bench.kinds) == sanitizer.VIOLATIONS_KEPT
    assert bench.mirror.reports.counts[ViolationKind.NO_TRANSLATION] == sanitizer.VIOLATIONS_KEPT + 5


def test_history_is_bounded_and_an_old_taking_is_forgotten(bench: Bench) -> None:
    """So many events later nothing is known of the first, and the access counts as one without a translation."""
    bench.call(processes.munmap, bench.pid, START, PAGE_SIZE)
    second = AddressRange(START + PAGE_SIZE, START + 2 * PAGE_SIZE)
    for _ in range(dispatch.EVENTS_KEPT):
        bench.call(devices.fault, bench.id, [second], write=True)
        bench.call(processes.madvise, bench.pid, second.start, PAGE_SIZE, Advice.DONTNEED)
    with pytest.raises(BadAddressError):
        bench.read()
    assert bench.last.kind is ViolationKind.NO_TRANSLATION


def test_reports_outlive_their_mirror(bench: Bench) -> None:
    """Whoever asks at the end finds what happened before."""
    with pytest.raises(BadAddressError):
        bench.read(START + 6 * PAGE_SIZE)
    bench.call(devices.unregister_mirror, bench.id)
    (past,) = bench.machine.past_receivers
    assert past.reports.counts[ViolationKind.NO_TRANSLATION] == 1


class Today:
    """A mirror of today's interface that has seen four pages."""

    def __init__(self) -> None:
        self.local = Local(Machine(Limits(frames=256, device_frames=16)))
        self.call = self.local.call
        self.pid = self.call(processes.create_process)
        self.call(processes.mmap, self.pid, START, 8 * PAGE_SIZE, Prot.READ | Prot.WRITE, FIXED)
        self.call(processes.write_memory, self.pid, START, b"x" * 4 * PAGE_SIZE)
        self.id = self.call(today.attach, self.call(devices.register_device, "gpu"), self.pid)
        self.call(today.insert_notifier, self.id, START, 8 * PAGE_SIZE)
        self.mirror = self.local.machine.receivers[self.id]
        self.pages = np.arange(START, START + 4 * PAGE_SIZE, PAGE_SIZE, dtype=np.uint64)
        entries = self.local.machine.process(self.pid).space.table.lookup(self.pages)
        self.pfns = (entries >> np.uint64(12)).astype(np.int64)

    def refused(self, *, write: bool) -> HmmError:
        """What an access to the first page ends with."""
        try:
            if write:
                self.call(today.write_frames, self.id, self.pages[:1], self.pfns[:1], b"y" * PAGE_SIZE)
            else:
                self.call(today.read_frames, self.id, self.pages[:1], self.pfns[:1])
        except HmmError as error:
            return error
        pytest.fail("the access was not refused")


def test_frame_of_today_is_attributed_to_the_event_that_took_it() -> None:
    """The driver keeps its own table: a frame that the address no longer means was taken by the event that it heard."""
    bench = Today()
    bench.call(processes.madvise, bench.pid, START, PAGE_SIZE, Advice.DONTNEED)
    error = bench.refused(write=False)
    assert error.violation is not None
    assert error.violation.kind is ViolationKind.USE_AFTER_INVALIDATION
    assert error.violation.taking is not None
    assert error.violation.taking.cause == "madvise dontneed"


def test_write_of_today_is_attributed_to_what_took_the_permission() -> None:
    """fork() made the page copy-on-write, and the driver was told."""
    bench = Today()
    bench.call(processes.fork, bench.pid)
    error = bench.refused(write=True)
    assert error.violation is not None
    assert error.violation.kind is ViolationKind.READ_ONLY_WRITE
    assert error.violation.taking is not None
    assert error.violation.taking.event == "FORK"


def test_frame_of_today_is_foreign_when_no_event_explains_it() -> None:
    """A frame that the address never had."""
    bench = Today()
    bench.pfns = bench.pfns[1:]
    error = bench.refused(write=False)
    assert error.violation is not None
    assert error.violation.kind is ViolationKind.FOREIGN_FRAME


def test_frame_of_today_is_refused_once_its_event_was_acknowledged() -> None:
    """Between the answer and the change the CPU's table still has the page; the driver may not use it any more."""
    bench = Today()
    other = bench.call(today.attach, bench.call(devices.register_device, "slow"), bench.pid)
    bench.call(today.insert_notifier, other, START, 8 * PAGE_SIZE)
    machine = bench.local.machine
    record = machine.start(Caller(), processes.munmap, bench.pid, START, PAGE_SIZE)
    bench.call(today.read_frames, bench.id, bench.pages[:1], bench.pfns[:1])
    machine.answer(bench.id, bench.mirror.sequence)
    assert not record.done
    error = bench.refused(write=True)
    assert error.violation is not None
    assert error.violation.kind is ViolationKind.EARLY_ACKNOWLEDGEMENT
