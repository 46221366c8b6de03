"""Pinning: which page is pinned, and what pins do to fork and migration."""

from __future__ import annotations

from typing import Any

import pytest

from hmm import commands_file, commands_process, cpu_pte
from hmm.errors import BadAddressError, InvalidRequestError, NoSuchObjectError, OutOfFramesError
from hmm.migrate import MIGRATE
from hmm.units import PAGE_SIZE
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot, VmFlag


def pin(bench: Any, at: int, npages: int = 1, *, write: bool = False) -> int:
    """Pin pages of the window."""
    number: int = bench.call(commands_process.pin, bench.process, bench.span(at, npages), write=write)
    return number


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
    """The parent keeps the pinned page, writable; the child gets a copy of its own."""
    bench.write(0, b"p")
    pin(bench, 0, write=True)
    before = bench.entry(0)
    child = bench.call(commands_process.fork, bench.process)
    assert bench.entry(0) == before
    assert cpu_pte.is_writable(bench.entry(0, child))
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
