"""Whole requests in process, from the call to the result: VMAs, frames, CPU table, mirror table, notification.

A round makes the same request for many neighbouring ranges, then the next request for all of them.  The yardstick
is the same work in plain C (requests.c), compiled on the spot, in turns with ours.  What the kernel does beside it and
the model does not (clearing pages, flushing TLBs) is in neither; the kernel's own figures stand below, as context.

Large requests are measured in CPU time on both sides: where others work too, each is interrupted.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter_ns, thread_time_ns
from typing import Any

import numpy as np
from measurement import Row, alone, compared, keep_memory, print_rows

from hmm import commands_device as devices
from hmm import commands_process as processes
from hmm.limits import Limits
from hmm.local import Local
from hmm.machine import Machine
from hmm.units import PAGE_SHIFT, AddressRange
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot

START = 0x7F00_0000_0000
FRAMES = 1 << 19
FLAGS = MapFlag.PRIVATE | MapFlag.ANONYMOUS | MapFlag.FIXED | MapFlag.NORESERVE
FAULT, MIRROR, SNAPSHOT, MUNMAP = "fault in", "mirror what is there", "snapshot", "munmap"
BOTH = "fault in and mirror in one call"
VMAS = 10_000
MADV_POPULATE_WRITE = 23
"""Python's mmap module does not know it."""
TARGETS_NS = {(FAULT, 1): 8_000.0, (FAULT, 512): 20_000.0}
TARGETS_NS_PER_PAGE = {FAULT: 5.0, SNAPSHOT: 2.5, MUNMAP: 10.0}


class Yardstick:
    """The C model, which times itself; nanoseconds of one call each."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            library = Path(directory, "requests.so")
            source = Path(__file__).with_name("requests.c")
            subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
            self._library = ctypes.CDLL(str(library))
        self._library.setup(ctypes.c_int64(FRAMES))

    def _call(self, name: str, span: AddressRange, *arguments: Any) -> float:
        function = getattr(self._library, name)
        function.restype = ctypes.c_double
        nanoseconds: float = function(ctypes.c_uint64(span.start), ctypes.c_uint64(span.end), *arguments)
        return nanoseconds

    def requests(self, npages: int) -> dict[str, Callable[[AddressRange], float]]:
        """How to make each request."""
        out = np.zeros(npages, np.uint64)
        return {
            FAULT: lambda span: self._call("fault_in", span),
            MIRROR: lambda span: self._call("mirror_range", span),
            SNAPSHOT: lambda span: self._call("snapshot", span, ctypes.c_void_p(out.ctypes.data)),
            MUNMAP: lambda span: self._call("unmap", span),
            BOTH: lambda span: self._call("fault_in", span) + self._call("mirror_range", span),
        }


class Model:
    """One process, one mirror that is told nothing of its own faults; its driver answers at once."""

    def __init__(self) -> None:
        self._local = Local(Machine(Limits(frames=FRAMES, device_frames=0)))
        self._pid = self._local.call(processes.create_process)
        device = self._local.call(devices.register_device, "gpu")
        self._mirror = self._local.call(devices.register_mirror, device, self._pid, update_on_fault=False)

    def map(self, span: AddressRange) -> None:
        """Map, untimed."""
        self._local.call(processes.mmap, self._pid, span.start, span.size_bytes, Prot.READ | Prot.WRITE, FLAGS)

    def requests(self, npages: int) -> dict[str, Callable[[AddressRange], float]]:
        """How to make each request."""
        pid, mirror = self._pid, self._mirror
        # The clock of CPU time takes a microsecond itself.
        clock = thread_time_ns if npages > 512 else perf_counter_ns

        def timed(command: Callable[..., Any], *arguments: Any, **options: Any) -> float:
            began = clock()
            self._local.call(command, *arguments, **options)
            return clock() - began

        return {
            FAULT: lambda span: timed(processes.touch, pid, span, write=True),
            MIRROR: lambda span: timed(devices.fault, mirror, (span,), write=True),
            SNAPSHOT: lambda span: timed(devices.read_table, mirror, span),
            MUNMAP: lambda span: timed(processes.munmap, pid, span.start, span.size_bytes),
            BOTH: lambda span: timed(devices.fault, mirror, (span,), write=True),
        }


def _fork(rounds: int) -> Iterator[Row]:
    """fork of many VMAs with a page each, and of one VMA with as many pages."""
    figures: list[list[float]] = []
    for stride in (2, 1):
        local = Local(Machine(Limits(frames=2 * VMAS, device_frames=0)))
        pid = local.call(processes.create_process)
        for at in range(START, START + (VMAS * stride << PAGE_SHIFT), stride << PAGE_SHIFT):
            local.call(processes.mmap, pid, at, 1 << PAGE_SHIFT, Prot.READ | Prot.WRITE, FLAGS)
            local.call(processes.touch, pid, AddressRange(at, at + (1 << PAGE_SHIFT)), write=True)
        figures.append([])
        for _ in range(rounds):
            began = thread_time_ns()
            child = local.call(processes.fork, pid)
            figures[-1].append((thread_time_ns() - began) / VMAS / 1000)
            local.call(processes.exit_process, child)
    yield compared(f"fork, {VMAS} VMAs of a page / of one VMA", "µs/page", *figures)


def _kernel(rounds: int, npages: int) -> Iterator[Row]:
    """What this kernel takes for private memory of this process."""
    populated, unmapped = [], []
    for _ in range(rounds):
        memory = mmap.mmap(-1, npages << PAGE_SHIFT, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        began = perf_counter_ns()
        memory.madvise(MADV_POPULATE_WRITE)
        between = perf_counter_ns()
        memory.close()
        populated.append((between - began) / npages)
        unmapped.append((perf_counter_ns() - between) / npages)
    yield alone(f"the kernel: {FAULT}, pages cleared", "ns/page", populated)
    yield alone(f"the kernel: {MUNMAP}, TLBs flushed", "ns/page", unmapped)


@dataclass
class Figures:
    """Of one request: nanoseconds, ours and the yardstick's, one figure per round."""

    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)


def measure(quick: bool) -> Iterator[Row]:
    """Fault-in, mirroring, snapshot and munmap of 1, 512 and 262,144 pages; fork."""
    keep_memory()
    model, yardstick = Model(), Yardstick()
    gc.collect()
    for npages, repeats in ((1, 100), (512, 10), (1 << 14 if quick else 1 << 18, 1)):
        yield from _measure_size(model, yardstick, npages, repeats, 5 if quick else 9)
    yield from _fork(5)
    yield from _kernel(3, 1 << 14)


def _measure_size(model: Model, yardstick: Yardstick, npages: int, repeats: int, rounds: int) -> Iterator[Row]:
    size = npages << PAGE_SHIFT
    spans = [AddressRange(start, start + size) for start in range(START, START + repeats * size, size)]
    ours, theirs = model.requests(npages), yardstick.requests(npages)
    figures = {name: Figures() for name in ours}
    for _ in range(rounds):
        for names in ((FAULT, MIRROR, SNAPSHOT, MUNMAP), (BOTH, MUNMAP)):
            model.map(AddressRange(spans[0].start, spans[-1].end))
            for name in names:
                figures[name].ours.append(median(map(ours[name], spans)))
                figures[name].theirs.append(median(map(theirs[name], spans)))
    for name, both in figures.items():
        yield from _rows(name, npages, both.ours, both.theirs)


def _rows(name: str, npages: int, ours: Sequence[float], theirs: Sequence[float]) -> Iterator[Row]:
    title = f"{name}, {npages} page{'s' * (npages > 1)}"
    if npages <= 512:
        yield compared(title, "ns", ours, theirs, TARGETS_NS.get((name, npages)), "value")
        return
    per_page = [[value / npages for value in values] for values in (ours, theirs)]
    yield compared(title, "ns/page", per_page[0], per_page[1], 3.0)
    if name in TARGETS_NS_PER_PAGE:
        yield alone(f"{title}, per page", "ns/page", per_page[0], TARGETS_NS_PER_PAGE[name])


if __name__ == "__main__":
    print_rows(measure("--quick" in sys.argv))
