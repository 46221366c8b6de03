"""What tests of huge pages share: blocks of a window, what stands there, and calls about parts of them."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from hmm import commands_process, cpu_pte
from hmm.address_space import AddressSpace
from hmm.events import Cause, Event
from hmm.madvise import Advice
from hmm.mremap import MremapFlag
from hmm.units import PAGE_SIZE, PMD_PAGES, AddressRange, ProcessId
from hmm.vma import Prot

BLOCK = PMD_PAGES
BLOCK_BYTES = BLOCK * PAGE_SIZE
MOVE = MremapFlag.MAYMOVE | MremapFlag.FIXED
RW = Prot.READ | Prot.WRITE
KINDS = (
    (cpu_pte.EXCLUSIVE, "x"),
    (cpu_pte.HUGE | cpu_pte.DEVICE | cpu_pte.WRITE, "D"),
    (cpu_pte.HUGE | cpu_pte.DEVICE, "E"),
    (cpu_pte.DEVICE, "d"),
    (cpu_pte.HUGE | cpu_pte.SPECIAL, "Z"),
    (cpu_pte.HUGE | cpu_pte.WRITE, "W"),
    (cpu_pte.HUGE, "R"),
    (cpu_pte.SPECIAL, "z"),
    (cpu_pte.WRITE, "w"),
    (cpu_pte.PRESENT, "r"),
)
"""What `shown` shows: huge pages with capitals, on a device (D, E read-only), zero pages, writable, read-only."""


def space(bench: Any, process: ProcessId = 0) -> AddressSpace:
    """The address space of a process."""
    found: AddressSpace = bench.local.machine.process(process or bench.process).space
    return found


def shown(bench: Any, npages: int = 2 * BLOCK, process: ProcessId = 0) -> str:
    """The entries of the window in runs, such as "W512 .512"; the machine's invariants hold."""
    bench.local.machine.check()
    entries = space(bench, process).table.read(*edges(bench.span(0, npages)))
    letters = [next((letter for bits, letter in KINDS if entry & bits == bits), ".") for entry in entries.tolist()]
    return " ".join(f"{letter}{sum(1 for _ in run)}" for letter, run in groupby(letters))


def edges(span: AddressRange) -> tuple[int, int]:
    """Start and end."""
    return span.start, span.end


def advise(bench: Any, at: int, npages: int, advice: Advice) -> None:
    """madvise()."""
    span = bench.span(at, npages)
    bench.call(commands_process.madvise, bench.process, span.start, span.size_bytes, advice)


def protect(bench: Any, at: int, npages: int, prot: Prot) -> None:
    """mprotect()."""
    span = bench.span(at, npages)
    bench.call(commands_process.mprotect, bench.process, span.start, span.size_bytes, prot)


def unmap(bench: Any, at: int, npages: int) -> None:
    """munmap()."""
    span = bench.span(at, npages)
    bench.call(commands_process.munmap, bench.process, span.start, span.size_bytes)


def move(bench: Any, at: int, npages: int, to: int, flags: int = MOVE) -> None:
    """mremap()."""
    old, new = bench.span(at, npages), bench.span(to, npages)
    bench.call(commands_process.mremap, bench.process, old.start, old.size_bytes, new.size_bytes, flags, new.start)


def heard(bench: Any) -> list[tuple[Cause | None, list[tuple[int, int]]]]:
    """Cause and ranges, in pages of the window, of the events since the last call."""
    events: list[Event] = bench.heard.events[:]
    bench.heard.events.clear()
    base = bench.span(0).start
    return [
        (event.cause, [((span.start - base) // PAGE_SIZE, (span.end - base) // PAGE_SIZE) for span in event.spans])
        for event in events
    ]
