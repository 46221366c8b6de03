"""Device memory in process: pages that move to a device and back, range faults and snapshots, exclusive access.

What is moved is compared with memcpy of as many pages, scattered over both memories as the model's are, and with the
least that it can cost here: an empty call that tells the mirror, and one step of numpy for each column of the frames,
and each state of the table, that 512 pages pass through.  The bookkeeping alone, which its target is about, is that of
a call that tells nobody, as the mirror has no interval notifier there; its least is the steps of numpy.  The yardstick
of a snapshot is the kernel's own, /proc/self/pagemap of as many pages of this process.  Both are taken some times in a
row, since the first one finds in the caches what the other has left there, and the median counts.

Of the interface of 2015 there is the way to the device, with the update that tells the driver its entries, and the way
back by a touch of the CPU.

All of it is CPU time, in turns: where others work too, each is interrupted.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import thread_time_ns
from typing import Any

import numpy as np
from measurement import Row, alone, compared, keep_memory, print_rows

from hmm import commands_device as devices
from hmm import commands_hmm as today
from hmm import commands_process as processes
from hmm.address_space import Thp
from hmm.limits import Limits
from hmm.local import Local
from hmm.machine import Machine
from hmm.madvise import Advice
from hmm.range_fault import REQ_FAULT, REQ_WRITE
from hmm.semantics import LINUX_6_12, LINUX_7
from hmm.units import PAGE_SHIFT, PAGE_SIZE, AddressRange
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot

START = 0x7F00_0000_0000
BLOCK = 512
"""Pages of 2 MiB."""
IN_A_ROW = 5
CONTENTS = np.arange(BLOCK * PAGE_SIZE // 8).tobytes()
"""Of a block, different in every page."""
FLAGS = MapFlag.PRIVATE | MapFlag.ANONYMOUS | MapFlag.FIXED | MapFlag.NORESERVE


class Memcpy:
    """Copies pages between two arrays, compiled on the spot."""

    def __init__(self, npages: int) -> None:
        with tempfile.TemporaryDirectory() as directory:
            library = Path(directory, "requests.so")
            source = Path(__file__).with_name("requests.c")
            subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
            self._library = ctypes.CDLL(str(library))
        self._library.copy_pages.restype = ctypes.c_double
        chance = np.random.default_rng(1)
        self._memories = [np.ones((npages, PAGE_SIZE), np.uint8) for _ in range(2)]
        self._order = [chance.permutation(npages) for _ in range(2)]

    def nanoseconds(self, first: int, npages: int) -> float:
        """To copy pages [first, first + npages) of both orders."""
        pointers = [ctypes.c_void_p(memory.ctypes.data) for memory in self._memories]
        places = [ctypes.c_void_p(order[first : first + npages].ctypes.data) for order in self._order]
        took: float = self._library.copy_pages(*pointers, *places, ctypes.c_int64(npages))
        return took


class Model:
    """One process, a device with memory, and its mirror, which hears of everything and answers at once.

    Args:
        posted: it is a mirror of the interface as posted in 2015.
        told: without, its driver subscribes to nothing, and there is no event.
    """

    def __init__(
        self, npages: int, memory_pages: int, *, huge: bool = False, posted: bool = False, told: bool = True
    ) -> None:
        limits = Limits(frames=2 * npages + 1024, device_frames=memory_pages)
        self.local = Local(Machine(limits, semantics=LINUX_7 if huge else LINUX_6_12))
        self.frames = self.local.machine.frames
        if not huge:
            self._shuffle()
        self.process = self.local.call(processes.create_process, thp=Thp.ALWAYS if huge else Thp.NEVER)
        device = self.local.call(devices.register_device, "card", memory_pages=memory_pages)
        self.whole = AddressRange(START, START + (npages << PAGE_SHIFT))
        size = self.whole.size_bytes + PAGE_SIZE  # and a page that nothing is in
        if posted:
            self.mirror = self.local.call(devices.register_mirror, device, self.process)
        else:
            self.mirror = self.local.call(today.attach, device, self.process)
            if told:
                self.notifier = self.local.call(today.insert_notifier, self.mirror, START, size)
        self.local.call(processes.mmap, self.process, START, size, Prot.READ | Prot.WRITE, FLAGS)
        for span in self.blocks():
            self.local.call(processes.write_memory, self.process, span.start, CONTENTS)

    def _shuffle(self) -> None:
        # As in a machine that has run for a while: what is allocated together does not lie together.
        taken = self.frames.allocate(self.frames.available)
        for pfn in np.random.default_rng(2).permutation(taken).tolist():
            self.frames.put_one(pfn)

    def blocks(self) -> list[AddressRange]:
        """The mapping, 2 MiB by 2 MiB."""
        step = BLOCK << PAGE_SHIFT
        return [AddressRange(start, start + step) for start in range(self.whole.start, self.whole.end, step)]

    def timed(self, command: Callable[..., Any], *arguments: Any, **options: bool) -> float:
        """Nanoseconds of a call."""
        began = thread_time_ns()
        self.local.call(command, *arguments, **options)
        return thread_time_ns() - began

    def there_and_back(self, **options: bool) -> tuple[float, float]:
        """Nanoseconds of migrating 2 MiB to the device, and back."""
        there, back = [], []
        for span in self.blocks():
            there.append(self.timed(today.migrate_to_device, self.mirror, span, **options))
            back.append(self.timed(today.migrate_to_system, self.mirror, span, **options))
        return median(there), median(back)

    def whole_there(self) -> float:
        """Nanoseconds of migrating all of it to the device in one call; then it comes back."""
        took = self.timed(today.migrate_to_device, self.mirror, self.whole)
        self.local.call(today.migrate_to_system, self.mirror, self.whole)
        return took

    def posted_there_and_back(self) -> tuple[float, float]:
        """The same by the interface of 2015, and back by a touch."""
        there, back = [], []
        for span in self.blocks():
            there.append(self.timed(devices.migrate, self.mirror, span))
            back.append(self.timed(processes.touch, self.process, span, write=False))
        return median(there), median(back)

    def check(self) -> None:
        """Assert that the model is sound, and that all pages hold what they held at first."""
        self.local.machine.check()
        for span in self.blocks():
            held = self.local.call(processes.read_memory, self.process, span.start, span.size_bytes)
            assert held.data == CONTENTS, f"{span} holds something else"

    def empty_event(self) -> float:
        """Nanoseconds of a call that tells the mirror of a page and finds nothing there."""
        page = self.whole.end
        return median(
            self.timed(processes.madvise, self.process, page, PAGE_SIZE, Advice.DONTNEED) for _ in self.blocks()
        )

    def range_fault(self, span: AddressRange, flags: int) -> float:
        """Nanoseconds of a range fault, its read section included."""
        began = thread_time_ns()
        sequence = self.local.call(today.read_begin, self.mirror, self.notifier)
        faulted = self.local.call(today.range_fault, self.mirror, self.notifier, sequence, span, flags)
        took = thread_time_ns() - began
        assert faulted.error is None
        return took


class Columns:
    """What moving pages changes in frames and tables, in as few steps of numpy as there can be; it decides nothing."""

    def __init__(self, npages: int) -> None:
        order = np.random.default_rng(3).permutation(2 * npages)
        self._old, self._new = np.sort(order[:npages]), np.sort(order[npages:])
        self._counts = [np.ones(2 * npages, np.int32) for _ in range(2)]
        self._flags = np.ones(2 * npages, np.uint16)
        self._words = [np.zeros(2 * npages, np.int64) for _ in range(3)]  # where it belongs, its holder, its age
        self._free = np.arange(2 * npages, dtype=np.uint32)
        self._table = self._old.astype(np.uint64) << np.uint64(PAGE_SHIFT) | np.uint64(1)

    def move(self, first: int, npages: int) -> float:
        """Nanoseconds."""
        part = slice(first, first + npages)
        began = thread_time_ns()
        entries = self._table[part].copy()
        old, new = (entries >> np.uint64(PAGE_SHIFT)).view(np.int64), self._new[part].copy()
        self._table[part] = entries | np.uint64(2)
        for counts in self._counts:
            left = counts[old]
            left -= np.int32(1)
            counts[old] = left
            counts[new] = 1
        self._flags[new] = self._flags[old]
        self._flags[old] = 0
        for column in self._words:
            column[new] = first
        self._table[part] = new.view(np.uint64) << np.uint64(PAGE_SHIFT)
        self._free[part] = old
        took = thread_time_ns() - began
        self._table[part] = entries
        for counts in self._counts:
            counts[old] = 1
        return took


def _migration(rounds: int) -> Iterator[Row]:
    npages = 64 * BLOCK
    memcpy, model, huge = Memcpy(npages), Model(npages, npages), Model(npages, npages, huge=True)
    posted, silent = Model(npages, npages, posted=True), Model(npages, npages, told=False)
    columns, blocks = Columns(npages), range(0, npages, BLOCK)
    there, back, copied, as_one, event, least, much, much_copied = [], [], [], [], [], [], [], []
    posted_there, posted_back, untold = [], [], []
    for _ in range(rounds):
        to_device, to_system = model.there_and_back()
        there.append(to_device)
        back.append(to_system)
        to_device, to_system = posted.posted_there_and_back()
        posted_there.append(to_device)
        posted_back.append(to_system)
        copied.append(median(memcpy.nanoseconds(at, BLOCK) for at in blocks))
        untold.append(silent.there_and_back()[0] / 1000)
        least.append(median(columns.move(at, BLOCK) for at in blocks) / 1000)
        event.append(model.empty_event() / 1000)
        as_one.append(huge.there_and_back(compound=True)[0])
        much.append(model.whole_there())
        much_copied.append(memcpy.nanoseconds(0, npages))
    model.check()
    huge.check()
    posted.check()
    silent.check()
    yield compared("migrate 2 MiB to the device / memcpy", "ns", there, copied, 1.3)
    yield compared("migrate 2 MiB back / memcpy", "ns", back, copied, 1.3)
    yield compared("2015: migrate 2 MiB to the device / memcpy", "ns", posted_there, copied)
    yield compared("2015: 2 MiB back by a touch of the CPU / memcpy", "ns", posted_back, copied)
    per_page = [[each / npages for each in each_round] for each_round in (much, much_copied)]
    yield compared(f"migrate {npages >> 8} MiB to the device / memcpy", "ns/page", *per_page, 0.3)
    yield compared("migrate a huge page / 2 MiB of small ones", "ns", as_one, there, 1.3)
    took = [each / 1000 for each in there]
    both = [sum(each) for each in zip(event, least, strict=True)]
    yield compared("migrate 2 MiB to the device / the least with an event", "us", took, both)
    yield compared("the bookkeeping of it, without an event / the least", "us", untold, least, 30.0, "value")


def _pagemap(npages: int) -> Callable[[], float]:
    memory = mmap.mmap(-1, npages * PAGE_SIZE)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    view = np.frombuffer(memory, np.uint8)
    view[::PAGE_SIZE] = 1

    def read() -> float:
        start = view.ctypes.data >> PAGE_SHIFT  # the function keeps the memory mapped
        descriptor = os.open("/proc/self/pagemap", os.O_RDONLY)
        began = thread_time_ns()
        words = os.pread(descriptor, npages * 8, start * 8)
        took = thread_time_ns() - began
        os.close(descriptor)
        assert np.bitwise_and.reduce(np.frombuffer(words, np.uint64)) >> np.uint64(63), "a page is not there"
        return took

    return read


def _ranges(npages: int, rounds: int) -> Iterator[Row]:
    kernel = _pagemap(npages)
    local = Local(Machine(Limits(frames=npages + 1024, device_frames=16)))
    model = Model.__new__(Model)
    model.local = local
    model.process = local.call(processes.create_process)
    device = local.call(devices.register_device, "card", memory_pages=16)
    model.mirror = local.call(today.attach, device, model.process)
    model.whole = AddressRange(START, START + (npages << PAGE_SHIFT))
    model.notifier = local.call(today.insert_notifier, model.mirror, START, model.whole.size_bytes)
    local.call(processes.mmap, model.process, START, model.whole.size_bytes, Prot.READ | Prot.WRITE, FLAGS)
    local.call(processes.touch, model.process, model.whole, write=True)
    measured = {
        "snapshot": partial(model.range_fault, model.whole, 0),
        "range fault, all there": partial(model.range_fault, model.whole, REQ_FAULT | REQ_WRITE),
        "pagemap": kernel,
    }
    figures: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(rounds):
        for name, measure_once in measured.items():
            figures[name].append(median(measure_once() for _ in range(IN_A_ROW)) / npages)
    pagemap = figures.pop("pagemap")
    for name, ours in figures.items():
        yield compared(f"{name} of {npages:,} pages / pagemap", "ns/page", ours, pagemap, 0.25)
        yield alone(f"{name} of {npages:,} pages, per page", "ns/page", ours, 2.5 if name == "snapshot" else None)
    few = AddressRange(START, START + (BLOCK << PAGE_SHIFT))
    short = [median(model.range_fault(few, REQ_FAULT) for _ in range(50)) / 1000 for _ in range(rounds)]
    yield alone("range fault of 2 MiB, all there", "us", short)
    taken = []
    for _ in range(rounds):
        taken.append(model.timed(today.make_exclusive, model.mirror, few) / 1000)
        local.call(processes.touch, model.process, few, write=True)
    yield alone("exclusive access to 2 MiB", "us", taken)


def measure(quick: bool) -> Iterator[Row]:
    """All rows; `quick` takes fewer rounds and smaller sizes."""
    keep_memory()
    rounds = 3 if quick else 9
    yield from _migration(rounds)
    yield from _ranges(1 << (16 if quick else 18), rounds)


if __name__ == "__main__":
    print_rows(measure("--quick" in sys.argv))
