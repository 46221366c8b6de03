"""Memory that is too small: pages to swap and back, and pages that make room on a full device.

Run it as `python tests/bench/bench_reclaim.py [--quick]`. A process uses twice the memory there is, so that every page
it touches has to come in and another one has to go out; the yardstick is the copying alone, two memcpy of a page. On
the device every page that moves there has another one move back: the yardstick is again two memcpy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from time import perf_counter_ns

import numpy as np
from measurement import Row, compared, keep_memory, print_rows

from hmm import commands_device, commands_hmm, commands_process
from hmm.limits import Limits
from hmm.local import Local
from hmm.machine import Machine
from hmm.units import PAGE_SIZE, AddressRange
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot

START = 0x1000_0000
FLAGS = MapFlag.PRIVATE | MapFlag.ANONYMOUS | MapFlag.FIXED


def _per_page(call: Callable[[], object], npages: int) -> float:
    began = perf_counter_ns()
    call()
    return (perf_counter_ns() - began) / npages


def _copying(npages: int) -> Callable[[], None]:
    source, target = (np.zeros((npages, PAGE_SIZE), np.uint8) for _ in range(2))
    source[:], target[:] = 1, 2

    def copy() -> None:
        target[:] = source
        source[:] = target

    return copy


def _swapping(rounds: int, npages: int, mirrors: int) -> tuple[list[float], list[float]]:
    """Touch every page of twice the memory, again and again, while so many mirrors listen."""
    local = Local(Machine(Limits(frames=npages // 2 + 1, swap_pages=2 * npages, device_frames=0)))
    process = local.call(commands_process.create_process, "bench")
    span = AddressRange(START, START + npages * PAGE_SIZE)
    local.call(commands_process.mmap, process, START, span.size_bytes, Prot.READ | Prot.WRITE, FLAGS)
    local.call(commands_process.write_pages, process, span, 0, bytes(npages))
    for number in range(mirrors):
        device = local.call(commands_device.register_device, f"gpu{number}")
        local.call(commands_device.register_mirror, device, process)
    copying, ours, theirs = _copying(npages), [], []
    for _ in range(rounds):
        ours.append(_per_page(lambda: local.call(commands_process.touch, process, span, write=True), npages))
        theirs.append(_per_page(copying, npages))
    return ours, theirs


def _evicting(rounds: int, npages: int) -> tuple[list[float], list[float]]:
    """Move two ranges by turns to a device that has room for one."""
    local = Local(Machine(Limits(frames=4 * npages, device_frames=npages)))
    process = local.call(commands_process.create_process, "bench")
    halves = [AddressRange(START + at * npages * PAGE_SIZE, START + (at + 1) * npages * PAGE_SIZE) for at in range(2)]
    local.call(commands_process.mmap, process, START, 2 * npages * PAGE_SIZE, Prot.READ | Prot.WRITE, FLAGS)
    local.call(commands_process.write_pages, process, AddressRange(START, halves[1].end), 0, bytes(2 * npages))
    device = local.call(commands_device.register_device, "card", memory_pages=npages, evicts=True)
    mirror = local.call(commands_hmm.attach, device, process)
    local.call(commands_hmm.migrate_to_device, mirror, halves[0])
    copying, ours, theirs = _copying(npages), [], []
    for number in range(rounds):
        half = halves[(number + 1) % 2]
        ours.append(_per_page(lambda half=half: local.call(commands_hmm.migrate_to_device, mirror, half), npages))
        theirs.append(_per_page(copying, npages))
    return ours, theirs


def measure(quick: bool) -> Iterator[Row]:
    """All rows."""
    keep_memory()
    rounds, npages = (3, 4096) if quick else (7, 16384)
    for mirrors in (0, 1):
        name = f"a page in and another out, {npages} over half as much memory, mirrors: {mirrors} / two memcpy"
        yield compared(name, "ns/page", *_swapping(rounds, npages, mirrors))
    name = f"a page to a full device and another back, {npages // 4} / two memcpy"
    yield compared(name, "ns/page", *_evicting(rounds, npages // 4))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller sizes")
    sys.exit(0 if print_rows(measure(parser.parse_args().quick)) else 1)
