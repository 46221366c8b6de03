"""Injected failures of memory: the nth page from now on, with the partial effects that the kernel leaves."""

from __future__ import annotations

import errno as errnos

import pytest

from hmm.commands_failures import inject_allocation_failure
from hmm.commands_process import create_process, mmap, touch
from hmm.errors import InvalidRequestError, OutOfFramesError
from hmm.local import Local
from hmm.units import PAGE_SIZE, AddressRange
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot

SIZE = 8 * PAGE_SIZE


@pytest.fixture
def local() -> Local:
    """A machine with a process, number 1."""
    local = Local()
    local.call(create_process, "program")
    return local


def mapped(local: Local) -> int:
    """Eight untouched pages."""
    result = local.call(mmap, 1, 0, SIZE, Prot.READ | Prot.WRITE, MapFlag.PRIVATE | MapFlag.ANONYMOUS)
    return int(result.address)


@pytest.mark.parametrize("nth", [1, 3, 8])
def test_nth_page_is_where_memory_runs_out(local: Local, nth: int) -> None:
    """The pages before it are in; the same touch again succeeds."""
    start = mapped(local)
    local.call(inject_allocation_failure, nth)
    with pytest.raises(OutOfFramesError) as caught:
        local.call(touch, 1, AddressRange(start, start + SIZE), write=True)
    assert (caught.value.errno, caught.value.address) == (errnos.ENOMEM, start + (nth - 1) * PAGE_SIZE)
    local.call(touch, 1, AddressRange(start, start + SIZE), write=True)
    local.machine.check()


def test_failure_waits_for_its_page(local: Local) -> None:
    """Eight pages are allocated, the ninth is not; page by page it is the same."""
    local.call(inject_allocation_failure, 9)
    start = mapped(local)
    local.call(touch, 1, AddressRange(start, start + SIZE), write=True)
    start = mapped(local)
    with pytest.raises(OutOfFramesError):
        local.call(touch, 1, AddressRange(start, start + 1), write=True)
    local.call(touch, 1, AddressRange(start, start + 1), write=True)


def test_nothing_fails_when_the_failure_is_taken_back(local: Local) -> None:
    """0 ends it; a negative number is refused."""
    local.call(inject_allocation_failure, 1)
    local.call(inject_allocation_failure, 0)
    start = mapped(local)
    local.call(touch, 1, AddressRange(start, start + SIZE), write=True)
    with pytest.raises(InvalidRequestError):
        local.call(inject_allocation_failure, -1)
