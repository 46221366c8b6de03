"""Pinning: which page is pinned, and what pins do to fork and migration."""

from __future__ import annotations

from typing import Any

import pytest

from hmm import commands_device, commands_file, commands_hmm, commands_process, cpu_pte
from hmm.clear_refs import ClearRefs
from hmm.errors import (
    AccessDeniedError,
    BadAddressError,
    InvalidRequestError,
    NoSuchObjectError,
    OutOfFramesError,
    RangeBusyError,
)
from hmm.fault_pages import WRITTEN
from hmm.frames import PageFlag, RegionKind
from hmm.madvise import Advice
from hmm.migration import MIGRATE
from hmm.operation_record import Caller
from hmm.units import PAGE_SIZE
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot, VmFlag

RW = Prot.READ | Prot.WRITE
FILE = MapFlag.PRIVATE | MapFlag.FIXED


def pin(bench: Any, at: int, npages: int = 1, *, write: bool = False) -> int:
    """Pin pages of the window."""
    number: int = bench.call(commands_process.pin, bench.process, bench.span(at, npages), write=write)
    return number


def pin_to_write(bench: Any) -> None:
    """pin_user_pages(FOLL_WRITE) of the first pages."""
    pin(bench, 0, 3, write=True)


def populate_to_write(bench: Any) -> None:
    """faultin_page_range(FOLL_WRITE) of the first pages."""
    bench.call(commands_process.madvise, bench.process, bench.span(0).start, 3 * PAGE_SIZE, Advice.POPULATE_WRITE)


def pinned(bench: Any, at: int) -> int:
    """How often the page at `at` is pinned."""
    count: int = bench.local.machine.frames.pincount[cpu_pte.cpu_pfn(bench.entry(at))]
    return count


def test_pin_for_reading_copies_the_zero_page(bench: Any) -> None:
    """A long-term pin of untouched private memory is one of a page of its own, still read-only."""
    number = pin(bench, 0)
    entry = bench.entry(0)
    assert not cpu_pte.is_special(entry)
    assert not cpu_pte.is_writable(entry)
    assert pinned(bench, 0) == 1
    bench.call(commands_process.unpin, number)
    assert pinned(bench, 0) == 0
    bench.local.machine.check()


def test_short_pin_for_reading_takes_the_pages_of_files_and_the_zero_page(bench: Any) -> None:
    """gup_must_unshare(): without FOLL_LONGTERM only pages that are PageAnon() and shared are copied."""
    file = bench.call(commands_file.open_file, "f", create=True)
    bench.call(commands_file.truncate_file, file, PAGE_SIZE)
    bench.call(commands_process.mmap, bench.process, bench.span(1).start, PAGE_SIZE, RW, FILE, file)
    bench.write(2, b"x")
    bench.call(commands_process.fork, bench.process)
    told = len(bench.heard.events)
    pin_number = bench.call(commands_process.pin, bench.process, bench.span(0, 3), write=False, long_term=False)
    assert [event.spans for event in bench.heard.events[told:]] == [(bench.span(2),)]
    assert cpu_pte.is_special(bench.entry(0))
    assert not bench.local.machine.frames.flags_of(cpu_pte.cpu_pfn(bench.entry(1))) & PageFlag.ANON
    bench.call(commands_process.unpin, pin_number)
    bench.local.machine.check()


@pytest.mark.parametrize("write", [False, True])
def test_pin_uses_no_page_that_is_there(bench: Any, write: bool) -> None:
    """pin_user_pages() is without FOLL_TOUCH, so that follow_page_pte() leaves entry and folio as they are."""
    bench.write(0, b"x")
    span = bench.span(0, 1)
    bench.call(commands_process.madvise, bench.process, span.start, span.size_bytes, Advice.FREE)
    pin(bench, 0, 2, write=write)
    assert pinned(bench, 0) == pinned(bench, 1) == 1
    assert not bench.entry(0) & (cpu_pte.DIRTY | cpu_pte.ACCESSED)
    assert bench.entry(1) & cpu_pte.ACCESSED


@pytest.mark.parametrize("call", [pin_to_write, populate_to_write])
def test_page_that_comes_back_from_its_device_is_not_written_by_get_user_pages(bench: Any, call: Any) -> None:
    """do_swap_page() returns behind migrate_to_ram(), and follow_page_pte() finds an entry that may be written."""
    bench.write(0, b"x" * 2 * PAGE_SIZE)
    bench.to_device(0, 2)
    bench.call(commands_process.clear_refs, bench.process, ClearRefs.SOFT_DIRTY)
    bench.to_system(1, 1)
    call(bench)
    for at in range(2):
        assert bench.entry(at) & (cpu_pte.WRITE | cpu_pte.DIRTY | cpu_pte.SOFT_DIRTY) == cpu_pte.WRITE
    assert bench.entry(2) & (cpu_pte.WRITE | cpu_pte.SOFT_DIRTY) == cpu_pte.WRITE | cpu_pte.SOFT_DIRTY
    bench.local.machine.check()


def test_pin_copies_what_is_known_of_the_page(bench: Any) -> None:
    """wp_page_copy() for FAULT_FLAG_UNSHARE keeps the soft-dirty bit, and unmaps the old page without using it."""
    bench.write(0, b"f")
    bench.call(commands_process.fork, bench.process)
    pin(bench, 0)
    assert bench.entry(0) & cpu_pte.SOFT_DIRTY
    file = bench.call(commands_file.open_file, "f", create=True)
    bench.call(commands_file.truncate_file, file, PAGE_SIZE)
    start = bench.span(32).start
    bench.call(commands_process.mmap, bench.process, start, PAGE_SIZE, Prot.READ, FILE, file)
    bench.read(32, 1)
    page = cpu_pte.cpu_pfn(bench.entry(32))
    pin(bench, 32)
    assert cpu_pte.cpu_pfn(bench.entry(32)) != page
    assert not bench.local.machine.frames.flags_of(page) & (PageFlag.REFERENCED | PageFlag.ACTIVE)


def test_pin_copies_when_the_page_is_shared_by_fork(bench: Any) -> None:
    """The pinned page is the process's own from then on; when nobody else has it, it is not copied."""
    bench.write(0, b"f")
    child = bench.call(commands_process.fork, bench.process)
    before = bench.entry(0)
    pin(bench, 0)
    assert cpu_pte.cpu_pfn(bench.entry(0)) != cpu_pte.cpu_pfn(before)
    assert bench.entry(0, child) == before & ~cpu_pte.ACCESSED
    bench.write(1, b"g")
    other = bench.call(commands_process.fork, bench.process)
    bench.call(commands_process.exit_process, other)
    alone = bench.entry(1)
    pin(bench, 1)
    assert bench.entry(1) == alone
    bench.local.machine.check()


def test_fork_copies_pinned_pages_at_once(bench: Any) -> None:
    """The parent keeps the pinned page, writable; the child gets a copy, as if it had written it: mk_pte()."""
    bench.write(0, b"p")
    pin(bench, 0, write=True)
    before = bench.entry(0)
    child = bench.call(commands_process.fork, bench.process)
    assert bench.entry(0) == before
    assert cpu_pte.cpu_flags(bench.entry(0, child)) == WRITTEN
    assert bench.read(0, 1, child) == b"p"
    assert cpu_pte.cpu_pfn(bench.entry(0, child)) != cpu_pte.cpu_pfn(before)
    bench.local.machine.check()


def test_pinned_page_stays_when_it_is_to_migrate(bench: Any) -> None:
    """A device cannot have a page that another one uses; shared memory with a pin stays as well."""
    pin(bench, 0, write=True)
    assert not bench.to_device(0, 1).src[0] & MIGRATE
    bench.map(1, flags=MapFlag.SHARED | MapFlag.FIXED | MapFlag.ANONYMOUS, at=32)
    pin(bench, 32)
    entry = bench.entry(32)
    bench.to_device(32, 1)
    assert bench.entry(32) == entry
    bench.local.machine.check()


def test_pin_brings_the_page_back_from_the_device(bench: Any) -> None:
    """A page in private device memory cannot be pinned there."""
    bench.write(0, b"x")
    bench.to_device(0, 1)
    pin(bench, 0)
    assert bench.used == 0


def test_pin_fails_when_a_page_cannot_be_had(bench: Any) -> None:
    """No mapping, no permission or no page behind it is EFAULT, and nothing stays pinned."""
    bench.map(1, Prot.READ, at=16)
    for at, write in ((15, True), (16, False)):
        with pytest.raises(BadAddressError):
            pin(bench, at, 2, write=write)
    file = bench.call(commands_file.open_file, "f", create=True)
    span = bench.span(40)
    bench.call(
        commands_process.mmap, bench.process, span.start, PAGE_SIZE, Prot.READ, MapFlag.SHARED | MapFlag.FIXED, file
    )
    with pytest.raises(BadAddressError):
        pin(bench, 40)
    assert not bench.local.machine.frames.pincount[: bench.local.machine.limits.frames].any()


def test_pin_has_unshared_pages_before_the_one_that_cannot_be_had(bench: Any) -> None:
    """__get_user_pages() goes page by page: those before the end of the file have become the process's own copies."""
    file = bench.call(commands_file.open_file, "f", create=True)
    bench.call(commands_file.truncate_file, file, 2 * PAGE_SIZE)
    bench.call(commands_process.mmap, bench.process, bench.span(32).start, 4 * PAGE_SIZE, RW, FILE, file)
    bench.read(32, 2)
    with pytest.raises(BadAddressError, match="EFAULT"):
        pin(bench, 32, 4)
    pfns = [cpu_pte.cpu_pfn(bench.entry(page)) for page in (32, 33)]
    frames = bench.local.machine.frames
    assert all(frames.flags_of(pfn) & PageFlag.ANON_EXCLUSIVE for pfn in pfns)
    assert frames.pincount[pfns].tolist() == [0, 0]
    frames.check()


def test_pin_fails_when_the_request_is_malformed(bench: Any) -> None:
    """No pages is EINVAL, an unknown pin ENOENT."""
    with pytest.raises(InvalidRequestError):
        pin(bench, 0, 0)
    with pytest.raises(NoSuchObjectError):
        bench.call(commands_process.unpin, 7)


def test_pin_fails_when_memory_runs_out(make_bench: Any) -> None:
    """ENOMEM, and nothing stays pinned."""
    bench = make_bench(frames=4)
    with pytest.raises(OutOfFramesError):
        pin(bench, 0, 8, write=True)
    bench.local.machine.check()


def test_drivers_own_mapping_can_be_pinned_and_not_migrated(bench: Any) -> None:
    """Pages that a driver inserted are pinned as they are (VM_MIXEDMAP)."""
    file = bench.call(commands_file.open_device_file, "dev", VmFlag.MIXEDMAP)
    span, flags = bench.span(48), MapFlag.SHARED | MapFlag.FIXED
    bench.call(commands_process.mmap, bench.process, span.start, PAGE_SIZE, Prot.READ | Prot.WRITE, flags, file)
    pin(bench, 48, write=True)
    assert pinned(bench, 48) == 1
    with pytest.raises(InvalidRequestError):
        bench.to_device(48, 1)


@pytest.mark.parametrize("long_term", [False, True])
def test_pin_moves_pages_out_of_coherent_memory_when_it_is_for_long(bench: Any, long_term: bool) -> None:
    """migrate_device_coherent_folio(): a short pin leaves them where they are, and keeps them there."""
    kind = RegionKind.DEVICE_COHERENT
    card = bench.call(commands_device.register_device, "coherent", memory_pages=8, kind=kind)
    mirror, _ = bench.attach(card, bench.process)
    bench.write(0, b"data")
    bench.call(commands_hmm.migrate_to_device, mirror, bench.span(0))
    number = bench.call(commands_process.pin, bench.process, bench.span(0), write=True, long_term=long_term)
    first, end = bench.call(commands_hmm.device_frames, card)
    assert (first <= cpu_pte.cpu_pfn(bench.entry(0)) < end) is not long_term
    assert bench.read(0, 4) == b"data"
    moved = bench.call(commands_hmm.migrate_to_system, mirror, bench.span(0))
    assert not moved.src[0] & MIGRATE
    bench.call(commands_process.unpin, number)
    bench.local.machine.check()


def test_pin_fails_when_a_short_one_holds_the_page_on_the_device(bench: Any) -> None:
    """A page that cannot be moved out of coherent memory cannot be pinned for long: EBUSY."""
    kind = RegionKind.DEVICE_COHERENT
    card = bench.call(commands_device.register_device, "coherent", memory_pages=8, kind=kind)
    mirror, _ = bench.attach(card, bench.process)
    bench.write(0, b"data")
    bench.call(commands_hmm.migrate_to_device, mirror, bench.span(0))
    bench.call(commands_process.pin, bench.process, bench.span(0), write=True, long_term=False)
    with pytest.raises(RangeBusyError):
        pin(bench, 0, write=True)
    assert pinned(bench, 0) == 1
    bench.local.machine.check()


def test_unpin_is_refused_when_the_pin_is_somebody_elses(bench: Any) -> None:
    """A pin has an owner like everything else that a token made."""
    machine = bench.local.machine
    owner = Caller(token="mine")
    record = machine.start(owner, commands_process.pin, bench.process, bench.span(0), write=True)
    with pytest.raises(AccessDeniedError):
        assert machine.start(Caller(token="yours"), commands_process.unpin, record.result).result
    machine.start(owner, commands_process.unpin, record.result)
    assert not machine.pins


@pytest.mark.parametrize("prot", [Prot.READ, Prot.READ | Prot.WRITE])
def test_fork_gives_a_pinned_page_back_from_its_device_as_written_when_the_cpu_may_write_it(
    bench: Any, prot: Prot
) -> None:
    """restore_exclusive_pte() calls pte_mkdirty() if the exclusive entry is a writable one, and else leaves it."""
    pin(bench, 0, write=True)
    bench.call(commands_hmm.make_exclusive, bench.mirror, bench.span(0))
    bench.call(commands_process.mprotect, bench.process, bench.span(0).start, PAGE_SIZE, prot)
    bench.call(commands_process.clear_refs, bench.process, ClearRefs.SOFT_DIRTY)
    bench.call(commands_process.fork, bench.process)
    assert bool(bench.entry(0) & cpu_pte.SOFT_DIRTY) == bool(prot & Prot.WRITE)
    bench.local.machine.check()
