"""`hmmctl pagemap`: what each page of a process is backed by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click
import numpy as np

from hmm import pagemap
from hmm.units import PAGE_SIZE, TASK_SIZE, AddressRange, Entries
from hmm_client.commands.addresses import parse_range
from hmm_client.commands.connection import Where, ask, where_options
from hmm_client.commands.ids import PROCESS
from hmm_client.commands.output import JSON, format_option, print_json, print_table
from hmm_client.commands.progress import Progress

if TYPE_CHECKING:
    from hmm_client.process import Process
    from hmm_client.results import Maps

_EVERYTHING = AddressRange(0, TASK_SIZE)
_FLAGS = (
    ("present", pagemap.PRESENT),
    ("swap", pagemap.SWAP),
    ("file", pagemap.FILE),
    ("exclusive", pagemap.MMAP_EXCLUSIVE),
    ("soft-dirty", pagemap.SOFT_DIRTY),
)


@click.command("pagemap")
@click.argument("pid", type=PROCESS)
@click.argument("span", metavar="[START-END]", required=False, callback=parse_range)
@format_option
@where_options
def command(pid: int, span: AddressRange | None, form: str, where: Where) -> None:
    """Show what each page of a process is backed by, from /proc/PID/pagemap.

    START-END is hexadecimal, as in maps, and is made larger to whole pages; without it the whole address space is
    looked at.  What is not mapped is left out.  Consecutive pages that are alike make one line; FRAME is the frame or,
    of pages in swap, the slot of the first.  Pages in the private memory of a device show as swap without a slot, as in
    the kernel; `maps` names the device.
    """
    runs = ask(where, lambda client: _look(client.process(pid), span or _EVERYTHING, where.timeout_s), limited=False)
    if form == JSON:
        for run in runs:
            print_json({"start": run.start, "end": run.end, "flags": run.flags.split(), "frame": run.frame})
        return
    print_table((">pages", ">start", ">end", ">frame", "flags"), map(_row, runs), empty="nothing is mapped there")


@dataclass(slots=True)
class _Run:
    """Consecutive pages that are alike, and the frame or slot of the first, 0 for none."""

    start: int
    end: int
    flags: str
    frame: int

    def goes_on_with(self, other: _Run) -> bool:
        """Whether the other belongs to the same line."""
        frame = self.frame and self.frame + (self.end - self.start) // PAGE_SIZE
        return (self.end, self.flags, frame) == (other.start, other.flags, other.frame)


def _row(run: _Run) -> tuple[object, ...]:
    return (run.end - run.start) // PAGE_SIZE, f"{run.start:x}", f"{run.end:x}", run.frame or "", run.flags


async def _look(process: Process, span: AddressRange, timeout_s: float) -> list[_Run]:
    """Ask for what is mapped, part by part; each answer must come in time."""
    import asyncio  # noqa: PLC0415 - takes longer than --help may

    async with asyncio.timeout(timeout_s):
        maps = await process.maps()
    runs: list[_Run] = []
    parts = list(_parts(maps, span))
    with Progress("pagemap", len(parts)) as progress:
        for part in parts:
            async with asyncio.timeout(timeout_s):
                words = await process.pagemap(part)
            for run in _runs(part.start, words):
                if runs and runs[-1].goes_on_with(run):
                    runs[-1].end = run.end
                else:
                    runs.append(run)
            progress.advance(what=f"parts, up to {part.end:x}")
    return runs


def _parts(maps: Maps, span: AddressRange) -> Iterator[AddressRange]:
    """What is mapped of a range, in parts of one call each."""
    from hmm_client.process import PAGEMAP_BYTES  # noqa: PLC0415 - takes longer than --help may

    for line in maps.lines:
        start, end = max(line.start, span.start), min(line.end, span.end)
        for at in range(start, end, PAGEMAP_BYTES):
            yield AddressRange(at, min(at + PAGEMAP_BYTES, end))


def _runs(start: int, words: Entries) -> Iterator[_Run]:
    """The runs of pages that are alike, from the words of consecutive pages."""
    flags = words & np.uint64(sum(bit for _, bit in _FLAGS))
    swapped = (words & np.uint64(pagemap.SWAP)) != 0
    frames = words & np.uint64(pagemap.PFN_MASK)
    frames[swapped] >>= np.uint64(pagemap.SWAP_OFFSET_SHIFT)
    follows = (frames[1:] == frames[:-1] + np.uint64(1)) | ((frames[1:] == 0) & (frames[:-1] == 0))
    breaks = np.flatnonzero((flags[1:] != flags[:-1]) | ~follows) + 1
    for first, last in zip((0, *breaks.tolist()), (*breaks.tolist(), words.size), strict=True):
        names = " ".join(name for name, bit in _FLAGS if int(flags[first]) & bit)
        yield _Run(start + first * PAGE_SIZE, start + last * PAGE_SIZE, names, int(frames[first]))
