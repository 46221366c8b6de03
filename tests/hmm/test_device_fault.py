"""Device faults of the 2015 series, rule by rule (hmm_mirror_fault() and what it calls)."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from machine_world import FIXED, RW, START, span

from hmm import commands_device as devices
from hmm import commands_failures, pte
from hmm import commands_file as files
from hmm import commands_process as processes
from hmm.commands_device import DeviceFaulted
from hmm.errors import (
    AccessDeniedError,
    BadAddressError,
    DeviceLostError,
    HmmError,
    InvalidRequestError,
    NoSuchObjectError,
    OutOfFramesError,
)
from hmm.events import Event, EventType
from hmm.frames import PageFlag
from hmm.limits import Limits
from hmm.local import Local
from hmm.machine import Machine
from hmm.mirror import MirrorState
from hmm.operation_record import Caller
from hmm.units import PAGE_SIZE, PIECE_BYTES, PMD_SIZE, AddressRange, Entries
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot, VmFlag

DONTNEED = 4


def addresses_of(*numbers: int) -> Entries:
    """uint64[n]: pages of the window."""
    return np.array([span(number).start for number in numbers], np.uint64)


class Recorder:
    """A driver that keeps what it heard and answers as it is told."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.released = 0
        self.errno = 0
        self.inside: Callable[[Event], None] = lambda _: None

    def update(self, mirror_id: int, event: Event) -> int:
        """Record and answer."""
        self.events.append(event)
        self.inside(event)
        return self.errno

    def release(self, mirror_id: int) -> None:
        """Record."""
        self.released += 1

    @property
    def types(self) -> list[EventType]:
        """The types heard, in order."""
        return [event.etype for event in self.events]


class Bench:
    """One process, one device, one mirror with a recording driver."""

    def __init__(
        self, *, dma: bool = False, frames: int = 2048, update_on_fault: bool = True, hugetlb_pages: int = 0
    ) -> None:
        self.local = Local(Machine(Limits(frames=frames, device_frames=0, hugetlb_pages=hugetlb_pages)))
        self.call = self.local.call
        self.machine = self.local.machine
        self.pid = self.call(processes.create_process, "p")
        self.device = self.call(devices.register_device, "gpu", dma=dma)
        self.id = self.call(devices.register_mirror, self.device, self.pid, update_on_fault=update_on_fault)
        self.mirror = self.machine.mirrors[self.id]
        self.driver = Recorder()
        self.local.attach(self.id, self.driver)

    def map(self, pages: AddressRange, prot: Prot = RW, flags: MapFlag = FIXED, file: int = 0, offset: int = 0) -> None:
        """Map pages of the window."""
        self.call(processes.mmap, self.pid, pages.start, pages.size_bytes, prot, flags, file, offset)

    def fault(self, *pages: AddressRange, write: bool = False, **options: Any) -> DeviceFaulted:
        """Fault ranges."""
        return self.call(devices.fault, self.id, pages, write=write, **options)

    def error(self, *pages: AddressRange, write: bool = False, **options: Any) -> HmmError:
        """The error of a fault of one range, which must have one."""
        (part,) = self.fault(*pages, write=write, **options).parts
        assert part.error is not None
        return part.error

    def entries(self, pages: AddressRange) -> list[int]:
        """The mirror's entries."""
        return self.call(devices.read_table, self.id, pages).tolist()

    def write(self, pages: AddressRange, value: int) -> None:
        """The CPU fills pages."""
        self.call(processes.write_memory, self.pid, pages.start, bytes([value]) * pages.size_bytes)


@pytest.fixture
def bench() -> Bench:
    """Sixteen writable pages, one mirror that holds frame numbers."""
    made = Bench()
    made.map(span(0, 16))
    return made


def test_fault_fills_the_mirror_and_then_updates_the_driver(bench: Bench) -> None:
    """Fault = HMM fills entries, then update(); the event carries the entries."""
    result = bench.fault(span(0, 4), write=True)
    (event,) = bench.driver.events
    assert (event.etype, event.spans) == (EventType.DEVICE_WFAULT, (span(0, 4),))
    assert np.frombuffer(event.entries, "<u8").tolist() == result.entries.tolist() == bench.entries(span(0, 4))
    assert all(entry & (pte.VALID_PFN | pte.WRITE) == pte.VALID_PFN | pte.WRITE for entry in result.entries.tolist())
    bench.machine.check()


def test_fault_tells_nobody_when_the_mirror_wants_no_updates() -> None:
    """The result alone tells the driver."""
    bench = Bench(update_on_fault=False)
    bench.map(span(0, 4))
    bench.fault(span(0, 4), write=True)
    assert not bench.driver.events


def test_read_fault_of_untouched_memory_mirrors_the_zero_page_read_only(bench: Bench) -> None:
    """Its dirty is never propagated, for it cannot be written."""
    bench.fault(span(0, 2))
    assert bench.entries(span(0, 2)) == [pte.VALID_PFN] * 2
    assert bench.driver.types == [EventType.DEVICE_RFAULT]


def test_read_fault_grants_write_when_the_cpu_entry_permits_it(bench: Bench) -> None:
    """WRITE is copied if the CPU pte is writable."""
    bench.write(span(0), 1)
    bench.fault(span(0, 2))
    assert [bool(entry & pte.WRITE) for entry in bench.entries(span(0, 2))] == [True, False]


def test_write_fault_replaces_the_zero_page_and_the_mirror_hears_of_it(bench: Bench) -> None:
    """Copy-on-write invalidates after the fault has left, else it would wait for itself."""
    bench.fault(span(0))
    bench.driver.events.clear()
    bench.fault(span(0), write=True)
    assert bench.driver.types == [EventType.MIGRATE, EventType.DEVICE_WFAULT]
    assert bench.entries(span(0))[0] & pte.WRITE


def test_fault_ends_at_the_end_of_its_vma(bench: Bench) -> None:
    """Trim event.end to vma.end: success covers one VMA, the caller re-issues."""
    bench.call(processes.mprotect, bench.pid, span(4).start, 4 * PAGE_SIZE, Prot.READ)
    (part,) = bench.fault(span(2, 6), whole=False).parts
    assert (part.error, part.end) == (None, span(4).start)
    (part,) = bench.fault(span(2, 6)).parts
    assert (part.error, part.end) == (None, span(8).start)


def test_fault_is_efault_when_nothing_is_mapped_and_says_how_far_the_hole_goes(bench: Bench) -> None:
    """No VMA intersecting: EFAULT; one that starts later: EFAULT with its start."""
    nothing = bench.error(span(100))
    assert isinstance(nothing, BadAddressError)
    assert nothing.errno == errno.EFAULT
    bench.map(span(20, 2))
    later = bench.error(span(18, 4))
    assert (later.errno, later.address, later.hole_end) == (errno.EFAULT, span(18).start, span(20).start)


@pytest.mark.parametrize(("prot", "write"), [(Prot.NONE, False), (Prot.NONE, True), (Prot.READ, True)])
def test_fault_is_eacces_when_the_vma_forbids_it(bench: Bench, prot: Prot, write: bool) -> None:
    """WFAULT without VM_WRITE: EACCES; PROT_NONE is not readable by a device either, as the 2015 suite demands."""
    bench.call(processes.mprotect, bench.pid, START, PAGE_SIZE, prot)
    refused = bench.error(span(0), write=write)
    assert isinstance(refused, AccessDeniedError)
    assert refused.errno == errno.EACCES


@pytest.mark.parametrize("flags", [VmFlag.IO | VmFlag.PFNMAP, VmFlag.MIXEDMAP])
def test_fault_is_efault_when_the_vma_maps_a_device(bench: Bench, flags: VmFlag) -> None:
    """VM_IO, VM_PFNMAP, VM_MIXEDMAP: EFAULT."""
    file = bench.call(files.open_device_file, "/dev/thing", flags)
    bench.map(span(32, 2), file=file, flags=MapFlag.SHARED | MapFlag.FIXED)
    assert bench.error(span(32)).errno == errno.EFAULT


def test_fault_mirrors_hugetlb_memory_by_pages() -> None:
    """As v12 does, whether a huge page is there or not: its test for "none" was inverted."""
    bench = Bench(hugetlb_pages=2)
    huge = AddressRange(PMD_SIZE, 3 * PMD_SIZE)
    bench.map(huge, flags=FIXED | MapFlag.HUGETLB)
    bench.call(processes.write_memory, bench.pid, huge.start, b"there")
    for start in (huge.start, huge.start + PMD_SIZE):
        (part,) = bench.fault(AddressRange(start, start + 4 * PAGE_SIZE), write=True).parts
        assert part.error is None
    first = bench.entries(AddressRange(huge.start, huge.start + 4 * PAGE_SIZE))
    pfn = pte.pte_pfn(first[0])
    assert first == [pte.pte_from_pfn(pfn + number) | pte.WRITE for number in range(4)]
    assert bench.call(devices.device_read, bench.id, [(huge.start, 5)]) == b"there"
    bench.call(processes.munmap, bench.pid, huge.start, huge.size_bytes)
    assert not bench.mirror.table.count
    bench.machine.check()


def test_fault_beyond_the_end_of_a_file_is_efault_and_keeps_what_came_before(bench: Bench) -> None:
    """VM_FAULT_SIGBUS becomes EFAULT."""
    file = bench.call(files.open_file, "f", create=True)
    bench.call(files.truncate_file, file, 2 * PAGE_SIZE)
    bench.map(span(32, 4), file=file, flags=MapFlag.SHARED | MapFlag.FIXED)
    (part,) = bench.fault(span(32, 4)).parts
    assert part.error is not None
    assert (part.error.errno, part.error.address, part.end) == (errno.EFAULT, span(34).start, span(34).start)
    assert [entry != 0 for entry in bench.entries(span(32, 4))] == [True, True, False, False]


def test_fault_is_enomem_when_frames_run_out() -> None:
    """VM_FAULT_OOM becomes ENOMEM; nothing is lost and the machine is sound."""
    bench = Bench(frames=8)
    bench.map(span(0, 16))
    (part,) = bench.fault(span(0, 16), write=True).parts
    assert isinstance(part.error, OutOfFramesError)
    assert part.end == span(7).start, "one frame is the zero page"
    assert [entry != 0 for entry in bench.entries(span(0, 16))] == [True] * 7 + [False] * 9
    bench.machine.check()


@pytest.mark.parametrize(
    ("pages", "text"), [(AddressRange(START, START), "empty"), (AddressRange(START + 1, START + 4096), "page-aligned")]
)
def test_fault_is_refused_when_the_range_makes_no_sense(bench: Bench, pages: AddressRange, text: str) -> None:
    """hmm_event_init(): EINVAL, and nothing is changed."""
    with pytest.raises(InvalidRequestError, match=text):
        bench.fault(pages)


def test_error_of_the_driver_goes_to_the_faulting_caller_and_kills_nothing(bench: Bench) -> None:
    """On fault the error goes to the caller."""
    for answer in (errno.ENOMEM, errno.EIO):
        bench.driver.errno = answer
        assert bench.error(span(0), write=True).errno == answer
    bench.driver.errno = 0
    assert bench.mirror.state is MirrorState.LIVE
    bench.fault(span(0), write=True)


def test_scattered_pages_are_faulted_vma_by_vma(bench: Bench) -> None:
    """One pass per VMA; a hole fails alone; the entries come in the order asked for."""
    bench.call(processes.munmap, bench.pid, span(4).start, PAGE_SIZE)
    addresses = np.array([span(n).start for n in (0, 2, 3, 4, 6, 9, 12, 14, 15)], np.uint64)
    result = bench.call(devices.fault, bench.id, addresses, write=True)
    assert [part.error is None for part in result.parts] == [True, False, True]
    assert (result.entries != 0).tolist() == [True, True, True, False, True, True, True, True, True]
    bench.machine.check()


@pytest.mark.parametrize("numbers", [(0, 15, 16), (14, 15, 16, 17), (16,), (15, 40)])
def test_scattered_pages_behind_the_last_mapping_fail_alone(bench: Bench, numbers: tuple[int, ...]) -> None:
    """The page right behind a mapping is not the mapping's, and what is behind all mappings is one hole."""
    result = bench.call(devices.fault, bench.id, np.array([span(n).start for n in numbers], np.uint64), write=True)
    mapped = [n < 16 for n in numbers]
    assert (result.entries != 0).tolist() == mapped
    assert [part.error is None for part in result.parts] == ([True] if any(mapped) else []) + [False]
    bench.machine.check()


def test_many_scattered_pages_take_the_path_of_arrays(bench: Bench) -> None:
    """More than a handful of lone pages are gathered and stored together."""
    bench.map(span(32, 256))
    addresses = np.arange(span(32).start, span(288).start, 2 * PAGE_SIZE, dtype=np.uint64)
    result = bench.call(devices.fault, bench.id, addresses, write=True)
    assert len(result.parts) == 1
    assert (result.entries != 0).all()
    with pytest.raises(InvalidRequestError, match="ascending"):
        bench.call(devices.fault, bench.id, addresses[::-1].copy(), write=True)


def test_fault_keeps_dirty_and_the_drivers_bits_of_entries_that_are_there(bench: Bench) -> None:
    """Only HMM's own bits are filled in; an entry that is valid stays the driver's."""
    bench.fault(span(0, 2), write=True)
    assert bench.call(devices.set_driver_bits, bench.id, span(0), 5) == 1
    bench.call(devices.dirty_range, bench.id, span(0))
    before = bench.entries(span(0))
    bench.fault(span(0, 2), write=True)
    assert bench.entries(span(0)) == before
    assert before[0] & pte.DIRTY
    assert pte.pte_driver(before[0]) == 5


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("pages", [(span(0, 4),), addresses_of(0, 1, 2, 3)])
def test_fault_of_what_the_mirror_has_changes_nothing_and_tells_the_driver_again(
    bench: Bench, pages: Any, write: bool
) -> None:
    """hmm_mirror_fault() calls update() whatever was there."""
    bench.fault(span(0, 4), write=True)
    before = bench.entries(span(0, 4))
    again = bench.call(devices.fault, bench.id, pages, write=write)
    assert again.entries.tolist() == bench.entries(span(0, 4)) == before
    assert bench.driver.types[1:] == [EventType.DEVICE_WFAULT if write else EventType.DEVICE_RFAULT]
    assert np.frombuffer(bench.driver.events[1].entries, "<u8").tolist() == before


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("dma", [False, True])
@pytest.mark.parametrize(
    "pages",
    [(span(3),), (span(0, 8),), (span(0, 3), span(5, 3)), addresses_of(1, 2, 5), addresses_of(*range(0, 16, 2))],
)
def test_result_has_what_the_table_has_whatever_was_there_before(pages: Any, dma: bool, write: bool) -> None:
    """The entries of a result are the mirror's: new ones, those that were there, those with bits of their own."""
    bench = Bench(dma=dma, update_on_fault=False)
    bench.map(span(0, 16))
    asked = pages if isinstance(pages, tuple) else [AddressRange(page, page + PAGE_SIZE) for page in pages.tolist()]
    for before in (span(5), span(0, 2), span(0, 16)):
        result = bench.call(devices.fault, bench.id, pages, write=write).entries.tolist()
        assert result == [entry for one in asked for entry in bench.entries(one)]
        assert all(result)
        bench.fault(before, write=True)
        bench.call(devices.set_driver_bits, bench.id, before, 5)
        bench.call(devices.dirty_range, bench.id, before)
    bench.machine.check()


def test_fault_of_what_the_mirror_has_is_one_step_however_many_pieces_it_is() -> None:
    """Others may go first between the pieces that it fills; where it fills none, there is nothing in between."""
    bench = Bench(update_on_fault=False)
    across = AddressRange(START - PAGE_SIZE, START + PAGE_SIZE)
    assert START % PIECE_BYTES == 0
    bench.map(across)
    first = bench.fault(across, write=True)
    again = bench.machine.start(Caller(), devices.fault, bench.id, (across,), write=True)
    assert again.done
    assert again.result.entries.tolist() == first.entries.tolist() == bench.entries(across)


@pytest.mark.parametrize("pages", [(span(0, 4),), addresses_of(0, 1, 2, 3)])
def test_fault_fills_the_rest_when_the_mirror_has_the_first_pages(bench: Bench, pages: Any) -> None:
    """What is there says nothing of the pages behind it: absent, read-only, protected since."""
    bench.fault(span(0, 3), write=True)
    bench.call(devices.discard_range, bench.id, span(1))
    bench.call(processes.mprotect, bench.pid, span(2).start, PAGE_SIZE, Prot.READ)
    bench.call(processes.mprotect, bench.pid, span(2).start, PAGE_SIZE, RW)
    result = bench.call(devices.fault, bench.id, pages, write=True)
    assert all(entry & pte.WRITE and entry & pte.VALID_PFN for entry in result.entries.tolist())
    bench.machine.check()


def test_event_with_mask_zero_erases_driver_bits_and_write_protect_keeps_them(bench: Bench) -> None:
    """Mask 0 also erases driver bits; ~WRITE keeps them (hmm_event.pte_mask)."""
    bench.fault(span(0, 2), write=True)
    bench.call(devices.set_driver_bits, bench.id, span(0, 2), 9)
    bench.call(processes.mprotect, bench.pid, START, PAGE_SIZE, Prot.READ)
    bench.call(processes.madvise, bench.pid, span(1).start, PAGE_SIZE, DONTNEED)
    first, second = bench.entries(span(0, 2))
    assert pte.pte_driver(first) == 9
    assert not first & pte.WRITE
    assert second == 0


def test_dirty_reaches_the_frame_before_the_entry_is_gone(bench: Bench) -> None:
    """Propagation test-and-clears DIRTY, then dirties the page (hmm_pte_update())."""
    bench.fault(span(0), write=True)
    (pfn,) = bench.mirror.pfns(np.array(bench.entries(span(0)), np.uint64)).tolist()
    frames = bench.machine.frames
    frames.clear_flags(np.array([pfn]), PageFlag.DIRTY)
    bench.call(devices.device_write, bench.id, [(START, 4)], b"data")
    assert not frames.test_flags(np.array([pfn]), PageFlag.DIRTY)[0]
    bench.call(processes.mprotect, bench.pid, START, PAGE_SIZE, Prot.READ)
    assert frames.test_flags(np.array([pfn]), PageFlag.DIRTY)[0]
    assert not bench.entries(span(0))[0] & pte.DIRTY


def test_dirty_range_marks_only_entries_that_are_valid_and_writable(bench: Bench) -> None:
    """hmm_mirror_range_dirty(); the posted code asked for VALID_DMA and VALID_PFN at once and marked nothing."""
    bench.fault(span(0), write=True)
    bench.fault(span(1))
    bench.call(devices.dirty_range, bench.id, span(0, 4))
    assert [bool(entry & pte.DIRTY) for entry in bench.entries(span(0, 4))] == [True, False, False, False]


def test_discard_drops_entries_without_a_callback(bench: Bench) -> None:
    """hmm_mirror_range_discard(): no update(), no waiting; dirty is propagated and directories go."""
    bench.fault(span(0, 4), write=True)
    bench.call(devices.dirty_range, bench.id, span(0, 4))
    bench.driver.events.clear()
    bench.call(devices.discard_range, bench.id, span(0, 3))
    assert not bench.driver.events
    assert [entry != 0 for entry in bench.entries(span(0, 4))] == [False, False, False, True]
    bench.call(devices.discard_range, bench.id, span(0, 4))
    assert bench.mirror.table.directories == 1


def test_ranged_calls_are_refused_when_the_range_makes_no_sense(bench: Bench) -> None:
    """EINVAL names the call and the range."""
    for command in (devices.dirty_range, devices.discard_range, devices.read_table):
        with pytest.raises(InvalidRequestError, match="not page-aligned"):
            bench.call(command, bench.id, AddressRange(START, START + 5))
    with pytest.raises(InvalidRequestError, match="driver's bits"):
        bench.call(devices.set_driver_bits, bench.id, span(0), 16)


def test_driver_may_fault_another_range_inside_its_callback(bench: Bench) -> None:
    """Legal, and served while the first event is unanswered."""
    bench.fault(span(0, 2), write=True)
    results = []

    def inside(event: Event) -> None:
        if event.etype is EventType.MUNMAP:
            results.append(bench.fault(span(8), write=True))

    bench.driver.inside = inside
    bench.call(processes.munmap, bench.pid, START, PAGE_SIZE)
    assert results[0].parts[0].error is None


def test_result_has_no_entry_whose_invalidation_was_sent() -> None:
    """The driver may have answered for that page already."""
    bench = Bench(update_on_fault=False)
    bench.map(span(0, 16))
    bench.fault(span(0, 4), write=True)
    seen = []

    def inside(event: Event) -> None:
        if event.etype is EventType.MUNMAP:
            addresses = np.array([span(n).start for n in (0, 2, 9)], np.uint64)
            seen.append(bench.call(devices.fault, bench.id, addresses, write=True).entries.tolist())

    bench.driver.inside = inside
    bench.call(processes.munmap, bench.pid, START, PAGE_SIZE)
    assert [entry != 0 for entry in seen[0]] == [False, True, True]


def test_fault_after_release_is_enodev(bench: Bench) -> None:
    """A mirror may outlive its mm binding; faults then give ENODEV."""
    bench.call(processes.exit_process, bench.pid)
    assert bench.driver.released == 1
    with pytest.raises(NoSuchObjectError) as caught:
        bench.fault(span(0))
    assert caught.value.errno == errno.ENODEV


def test_fault_after_a_fence_is_device_lost(bench: Bench) -> None:
    """Later calls and accesses of a lost mirror get DEVICE_LOST."""
    bench.machine.fence(bench.id, "gone")
    with pytest.raises(DeviceLostError, match="gone"):
        bench.fault(span(0))
    with pytest.raises(DeviceLostError):
        bench.call(devices.device_read, bench.id, [(START, 1)])


# ---- DMA


@pytest.fixture
def dma() -> Bench:
    """A device that does DMA: its mirror holds DMA addresses."""
    made = Bench(dma=True)
    made.map(span(0, 16))
    return made


def iommu_of(bench: Bench) -> Any:
    """The device's IOMMU."""
    iommu = bench.machine.devices[bench.device].iommu
    assert iommu is not None
    return iommu


def test_dma_entries_hold_dma_addresses_and_keep_write(dma: Bench) -> None:
    """WRITE and DIRTY survive the conversion of a frame number to a DMA address; SELECT does not."""
    (entry,) = dma.fault(span(0), write=True).entries.tolist()
    assert entry & (pte.VALID_DMA | pte.VALID_PFN | pte.SELECT | pte.WRITE) == pte.VALID_DMA | pte.WRITE
    assert iommu_of(dma).mapped_pages == 1
    dma.machine.check()


def test_dma_mapping_is_upgraded_in_place_when_a_write_fault_follows(dma: Bench) -> None:
    """The posted code skipped an existing DMA entry, so that WRITE was never added."""
    file = dma.call(files.open_file, "f", create=True)
    dma.call(files.truncate_file, file, PAGE_SIZE)
    dma.map(span(32), prot=Prot.READ, file=file, flags=MapFlag.SHARED | MapFlag.FIXED)
    (before,) = dma.fault(span(32)).entries.tolist()
    dma.call(processes.mprotect, dma.pid, span(32).start, PAGE_SIZE, RW)
    (after,) = dma.fault(span(32), write=True).entries.tolist()
    assert not before & pte.WRITE
    assert after & pte.WRITE
    assert pte.pte_dma_addr(before) == pte.pte_dma_addr(after)
    assert iommu_of(dma).mapped_pages == 1


@pytest.mark.parametrize(("command", "pages"), [("mprotect", 4), ("dontneed", 2), ("munmap", 0), ("exit", 0)])
def test_dma_is_unmapped_exactly_when_the_mask_clears_the_entry(dma: Bench, command: str, pages: int) -> None:
    """Unmap exactly when the mask clears VALID_DMA: write-protecting keeps the mapping."""
    dma.fault(span(0, 4), write=True)
    match command:
        case "mprotect":
            dma.call(processes.mprotect, dma.pid, START, 4 * PAGE_SIZE, Prot.READ)
        case "dontneed":
            dma.call(processes.madvise, dma.pid, START, 2 * PAGE_SIZE, DONTNEED)
        case "munmap":
            dma.call(processes.munmap, dma.pid, START, 4 * PAGE_SIZE)
        case "exit":
            dma.call(processes.exit_process, dma.pid)
    assert iommu_of(dma).mapped_pages == pages
    dma.machine.check()


def test_dma_mapping_failure_is_enomem_and_maps_nothing(dma: Bench) -> None:
    """A mapping error is ENOMEM; a second try succeeds."""
    dma.call(commands_failures.inject_dma_failure, dma.device, 1)
    error = dma.error(span(0, 2), write=True)
    assert error.errno == errno.ENOMEM
    assert iommu_of(dma).mapped_pages == 0
    assert dma.entries(span(0, 2)) == [0, 0]
    dma.fault(span(0, 2), write=True)
    assert iommu_of(dma).mapped_pages == 2


def test_dma_mapping_fails_beyond_the_limit(dma: Bench) -> None:
    """An IOMMU has room for so many pages."""
    iommu_of(dma).limit_pages = 3
    assert dma.error(span(0, 4), write=True).errno == errno.ENOMEM
    dma.fault(span(0, 3), write=True)


def test_inject_dma_failure_is_refused_when_the_device_does_no_dma(bench: Bench) -> None:
    """EINVAL."""
    with pytest.raises(InvalidRequestError):
        bench.call(commands_failures.inject_dma_failure, bench.device, 1)


def test_dma_entry_appears_once_when_two_faults_race(dma: Bench) -> None:
    """A lost race unmaps nothing twice: the entry that is there is kept."""
    dma.fault(span(0, 2), write=True)
    dma.fault(span(0, 4), write=True)
    assert iommu_of(dma).mapped_pages == 4
    dma.machine.check()


def test_fork_write_protects_the_parents_mirror_and_gives_the_child_none(bench: Bench) -> None:
    """FORK has mask ~WRITE; a child starts without hmm."""
    bench.fault(span(0), write=True)
    bench.driver.events.clear()
    child = bench.call(processes.fork, bench.pid)
    assert bench.driver.types == [EventType.FORK]
    assert not bench.entries(span(0))[0] & pte.WRITE
    assert not bench.machine.processes[child].space.notifier.subscribers
    bench.machine.check()
