"""What a call on many mappings costs grows with their number, and not with its square: counted in function calls."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from hmm import commands_device, commands_file, commands_process
from hmm.limits import Limits
from hmm.local import Local
from hmm.machine import Machine
from hmm.madvise import Advice
from hmm.mman import MapFlag
from hmm.units import PAGE_SIZE, AddressRange, ProcessId
from hmm.vma import Prot

BASE = 0x10000000000
FEW = 64
LIMITS = Limits(frames=1 << 12, swap_pages=1 << 12)
RW = Prot.READ | Prot.WRITE


class Crowd:
    """A process with so many mappings of a page each, all in use, and a mirror that has them all."""

    def __init__(self, nmappings: int, flags: MapFlag) -> None:
        self.call = Local(Machine(LIMITS)).call
        self.pid: ProcessId = self.call(commands_process.create_process, "crowd")
        self.file = self.call(commands_file.open_file, "/file", create=True)
        self.call(commands_file.truncate_file, self.file, 2 * PAGE_SIZE)
        starts = range(BASE, BASE + 2 * nmappings * PAGE_SIZE, 2 * PAGE_SIZE)
        for number, start in enumerate(starts):
            offset = 0 if flags & MapFlag.ANONYMOUS else number % 2 * PAGE_SIZE
            place = (self.pid, start, PAGE_SIZE, RW, flags | MapFlag.FIXED, self.file, offset)
            self.call(commands_process.mmap, *place)
        self.spans = [AddressRange(start, start + PAGE_SIZE) for start in starts]
        mirror = self.call(
            commands_device.register_mirror, self.call(commands_device.register_device, "gpu0"), self.pid
        )
        self.call(commands_device.fault, mirror, self.spans, write=True)

    def madvise(self, advice: Advice) -> None:
        """Advice for everything, up to the last mapping."""
        span = AddressRange(self.spans[0].start, self.spans[-1].end)
        with pytest.raises(Exception, match="nothing is mapped"):  # in the holes; what is mapped has got the advice
            self.call(commands_process.madvise, self.pid, span.start, span.size_bytes, advice)


def calls_of(action: Callable[[], object]) -> int:
    """How many calls of functions something makes."""
    count = 0

    def note(_: Any, event: str, __: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


PRIVATE, SHARED = MapFlag.PRIVATE | MapFlag.ANONYMOUS, MapFlag.SHARED


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "action"),
    [
        pytest.param(SHARED, lambda one: one.call(commands_file.punch_file, one.file, 0, 2 * PAGE_SIZE), id="punch"),
        pytest.param(SHARED, lambda one: one.call(commands_file.truncate_file, one.file, 0), id="truncate"),
        pytest.param(PRIVATE, lambda one: one.madvise(Advice.COLD), id="cold"),
        pytest.param(PRIVATE, lambda one: one.madvise(Advice.PAGEOUT), id="pageout"),
        pytest.param(SHARED, lambda one: one.madvise(Advice.PAGEOUT), id="pageout of a file"),
        pytest.param(PRIVATE, lambda one: one.madvise(Advice.DONTNEED), id="dontneed"),
        pytest.param(PRIVATE, lambda one: one.call(commands_process.fork, one.pid), id="fork"),
        pytest.param(PRIVATE, lambda one: one.call(commands_process.mlockall, one.pid, 1), id="mlockall"),
        pytest.param(PRIVATE, lambda one: one.call(commands_process.process_mrelease, one.pid), id="mrelease"),
        pytest.param(PRIVATE, lambda one: one.call(commands_process.exit_process, one.pid), id="exit"),
    ],
)
def test_cost_grows_with_the_mappings_when_they_are_many(flags: MapFlag, action: Callable[[Crowd], object]) -> None:
    """Twice as many mappings more cost about twice as much more, whatever a call costs with none."""
    crowds = [Crowd(nmappings, flags) for nmappings in (FEW, 2 * FEW, 4 * FEW)]
    few, more, many = [calls_of(partial(action, crowd)) for crowd in crowds]
    assert many - more < 2.5 * (more - few)
