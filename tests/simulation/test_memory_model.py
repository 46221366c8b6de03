"""Random calls of several processes and devices against memory as a plain dictionary.

The model knows nothing of page tables, frames or copy-on-write: a process is a dictionary from page to a cell,
shared memory is a cell that several dictionaries name, fork copies the values of private cells.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hmm import commands_device as devices
from hmm import commands_process as processes
from hmm.errors import HmmError
from hmm.limits import Limits
from hmm.local import Local
from hmm.machine import Machine
from hmm.madvise import Advice
from hmm.reclaim import Reclaim
from hmm.swap import area_of
from hmm.units import PAGE_SIZE, AddressRange, Pfns
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot

START = 0x1000_0000
PAGES = 12
MAXIMUM = 4  # processes
RW = Prot.READ | Prot.WRITE
FIXED = MapFlag.ANONYMOUS | MapFlag.FIXED
PAGING = (Advice.PAGEOUT, Advice.PAGEOUT, Advice.COLD, Advice.WILLNEED)

first_page = st.integers(0, PAGES - 1)
npages = st.integers(1, 4)
byte = st.integers(1, 255)
which = st.integers(0, MAXIMUM - 1)


@dataclass
class Cell:
    """One page of memory: the value of its first byte."""

    value: int = 0
    shared: bool = False


@dataclass
class Page:
    """One page of a process."""

    cell: Cell
    prot: Prot


@dataclass
class ModelProcess:
    """What a process has mapped."""

    pages: dict[int, Page] = field(default_factory=dict)
    mirrors: dict[str, int] = field(default_factory=dict)


class Memory(RuleBasedStateMachine):
    """Every call is made twice: to the machine, and to the dictionaries."""

    limits = Limits(frames=512, device_frames=0, directories=1 << 8)

    def __init__(self) -> None:
        super().__init__()
        self.local = Local(Machine(self.limits))
        self.model: dict[int, ModelProcess] = {}
        self.devices = {
            name: self.local.call(devices.register_device, name, dma=name == "nic") for name in ("gpu", "nic")
        }

    def call(self, command: Any, *arguments: Any, **options: Any) -> Any:
        """A call of the machine."""
        return self.local.call(command, *arguments, **options)

    @initialize()
    def create(self) -> None:
        """A process whose window is mapped, so that most calls meet memory."""
        pid: int = self.call(processes.create_process)
        self.model[pid] = ModelProcess()
        self.map(pid, 0, PAGES)
        self.map(pid, 4, 4, shared=True)

    def pid(self, choice: int) -> int:
        """One of the live processes."""
        return list(self.model)[choice % len(self.model)]

    def span(self, first: int, count: int) -> tuple[int, int, range]:
        """Start, length and pages."""
        pages = range(first, min(first + count, PAGES))
        return START + first * PAGE_SIZE, len(pages) * PAGE_SIZE, pages

    @rule(choice=which, first=first_page, count=npages, shared=st.booleans(), populate=st.booleans())
    def mmap(self, choice: int, first: int, count: int, shared: bool, populate: bool) -> None:
        """Fresh memory, private or shared."""
        self.map(self.pid(choice), first, count, shared=shared, populate=populate)

    def map(self, pid: int, first: int, count: int, *, shared: bool = False, populate: bool = False) -> None:
        """Fresh memory in both."""
        start, length, pages = self.span(first, count)
        flags = FIXED | (MapFlag.SHARED if shared else MapFlag.PRIVATE) | (MapFlag.POPULATE if populate else 0)
        self.call(processes.mmap, pid, start, length, RW, flags)
        self.model[pid].pages.update({page: Page(Cell(shared=shared), RW) for page in pages})

    @rule(choice=which, first=first_page, count=npages)
    def munmap(self, choice: int, first: int, count: int) -> None:
        """Nothing there any more."""
        pid = self.pid(choice)
        start, length, pages = self.span(first, count)
        self.call(processes.munmap, pid, start, length)
        for page in pages:
            self.model[pid].pages.pop(page, None)

    @rule(choice=which, first=first_page, count=npages, prot=st.sampled_from([RW, Prot.READ, Prot.NONE]))
    def mprotect(self, choice: int, first: int, count: int, prot: Prot) -> None:
        """Up to the first hole, as the kernel does."""
        pid = self.pid(choice)
        start, length, pages = self.span(first, count)
        known = self.model[pid].pages
        try:
            self.call(processes.mprotect, pid, start, length, prot)
        except HmmError:
            assert any(page not in known for page in pages)
        for page in pages:
            if page not in known:
                break
            known[page].prot = prot

    @rule(choice=which, first=first_page, count=npages)
    def dontneed(self, choice: int, first: int, count: int) -> None:
        """Private pages read as zeroes again, shared ones keep their contents; holes are skipped."""
        pid = self.pid(choice)
        start, length, pages = self.span(first, count)
        known = self.model[pid].pages
        try:
            self.call(processes.madvise, pid, start, length, 4)
        except HmmError:
            assert any(page not in known for page in pages)
        for page in pages:
            if page in known and not known[page].cell.shared:
                known[page].cell.value = 0

    @rule(choice=which, first=first_page, count=npages, to=first_page)
    def mremap(self, choice: int, first: int, count: int, to: int) -> None:
        """Moves whole, equally mapped pages."""
        pid = self.pid(choice)
        start, length, pages = self.span(first, count)
        target, _, landing = self.span(to, len(pages))
        known = self.model[pid].pages
        if len(landing) < len(pages) or set(pages) & set(landing) or not all(page in known for page in pages):
            return
        try:
            self.call(processes.mremap, pid, start, length, length, 3, target)
        except HmmError:
            # More than one VMA: the target is unmapped already, the source is as it was.
            for page in landing:
                known.pop(page, None)
            return
        moved = [known.pop(page) for page in pages]
        known.update(zip(landing, moved, strict=True))

    @rule(choice=which, page=first_page, value=byte)
    def write(self, choice: int, page: int, value: int) -> None:
        """The CPU stores a byte."""
        pid = self.pid(choice)
        known = self.model[pid].pages.get(page)
        done = self.call(processes.write_memory, pid, START + page * PAGE_SIZE, bytes([value])).done
        assert done == (known is not None and Prot.WRITE in known.prot)
        if done and known is not None:
            known.cell.value = value

    @rule(choice=which, page=first_page, value=byte, device=st.sampled_from(["gpu", "nic"]))
    def device_write(self, choice: int, page: int, value: int, device: str) -> None:
        """A device faults a page for writing and writes it."""
        pid = self.pid(choice)
        mirror = self.mirror(pid, device)
        address = START + page * PAGE_SIZE
        span = AddressRange(address, address + PAGE_SIZE)
        known = self.model[pid].pages.get(page)
        (part,) = self.call(devices.fault, mirror, [span], write=True).parts
        assert (part.error is None) == (known is not None and known.prot == RW)
        if known is not None and part.error is None:
            self.call(devices.device_write, mirror, [(address, 1)], bytes([value]))
            known.cell.value = value

    @rule(choice=which, device=st.sampled_from(["gpu", "nic"]))
    def device_read(self, choice: int, device: str) -> None:
        """A device reads every page that it may read."""
        pid = self.pid(choice)
        mirror = self.mirror(pid, device)
        for page, known in self.model[pid].pages.items():
            address = START + page * PAGE_SIZE
            (part,) = self.call(devices.fault, mirror, [AddressRange(address, address + PAGE_SIZE)], write=False).parts
            assert (part.error is None) == (Prot.READ in known.prot)
            if part.error is None:
                assert self.call(devices.device_read, mirror, [(address, 1)]) == bytes([known.cell.value])

    def mirror(self, pid: int, device: str) -> int:
        """The device's mirror of a process, registered at first use."""
        mirrors = self.model[pid].mirrors
        if device not in mirrors:
            mirrors[device] = self.call(devices.register_mirror, self.devices[device], pid)
        return mirrors[device]

    @precondition(lambda self: len(self.model) < MAXIMUM)
    @rule(choice=which)
    def fork(self, choice: int) -> None:
        """Private pages are copied, shared ones shared."""
        pid = self.pid(choice)
        child: int = self.call(processes.fork, pid)
        copies = {
            page: Page(known.cell if known.cell.shared else Cell(known.cell.value), known.prot)
            for page, known in self.model[pid].pages.items()
        }
        self.model[child] = ModelProcess(copies)

    @precondition(lambda self: len(self.model) > 1)
    @rule(choice=which)
    def exit(self, choice: int) -> None:
        """Everything of it goes."""
        self.end(self.pid(choice))

    def end(self, pid: int) -> None:
        """The end of a process, and of its mirrors."""
        self.call(processes.exit_process, pid)
        for mirror in self.model.pop(pid).mirrors.values():
            self.call(devices.unregister_mirror, mirror)

    @invariant()
    def contents_agree(self) -> None:
        """Every process reads what the dictionaries say, and the machine is sound."""
        for pid, process in self.model.items():
            for page, known in process.pages.items():
                got = self.call(processes.read_memory, pid, START + page * PAGE_SIZE, 1)
                assert got.data == (bytes([known.cell.value]) if known.prot else b""), (pid, page)
        self.local.machine.check()

    def teardown(self) -> None:
        """Nothing leaks when all processes are gone."""
        for pid in list(self.model):
            self.end(pid)
        frames = self.local.machine.frames
        assert frames.statistics()[0].used == 0, frames.statistics()
        assert frames.swap is None or not frames.swap.used


class SwappedMemory(Memory):
    """The same with less memory than one process uses: what is not used goes to swap, and comes back as it was."""

    limits = Limits(frames=9, swap_pages=200, device_frames=0, directories=1 << 8)

    @rule(choice=which, first=first_page, count=npages, advice=st.sampled_from(PAGING))
    def page(self, choice: int, first: int, count: int, advice: Advice) -> None:
        """Advice about paging changes no contents."""
        start, length, pages = self.span(first, count)
        pid = self.pid(choice)
        try:
            self.call(processes.madvise, pid, start, length, advice)
        except HmmError:
            assert any(page not in self.model[pid].pages for page in pages)


Memory.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
SwappedMemory.TestCase.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestMemory = Memory.TestCase
TestSwappedMemory = SwappedMemory.TestCase


def fails() -> bool:
    """Whether the model of memory that is swapped finds something wrong."""
    machine = type("Planted", (SwappedMemory,), {})
    quick = settings(
        derandomize=True,
        max_examples=500,
        stateful_step_count=30,
        deadline=None,
        database=None,
        phases=[Phase.generate],
    )
    try:
        run_state_machine_as_test(machine, settings=quick)
    except Exception:  # noqa: BLE001 - whatever is found
        return True
    return False


def test_model_finds_contents_that_are_lost_on_their_way_to_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: pages are not written to their slots."""

    def write(reclaim: Reclaim, pfns: Pfns, counts: Pfns) -> Pfns:
        return area_of(reclaim.frames).allocate(counts.astype(np.int32))

    monkeypatch.setattr(Reclaim, "_write", write)
    assert fails()
