"""`hmmctl pagemap`: what each page of a range is backed by."""

from __future__ import annotations

from collections.abc import Iterator

import click
import numpy as np

from hmm import pagemap
from hmm.units import PAGE_SIZE, AddressRange, Entries
from hmm_client.commands.addresses import parse_range
from hmm_client.commands.connection import Where, ask, where_options
from hmm_client.commands.output import JSON, format_option, print_json, print_table

_FLAGS = (
    ("present", pagemap.PRESENT),
    ("swap", pagemap.SWAP),
    ("file", pagemap.FILE),
    ("exclusive", pagemap.MMAP_EXCLUSIVE),
    ("soft-dirty", pagemap.SOFT_DIRTY),
)


@click.command("pagemap")
@click.argument("pid", type=click.IntRange(min=1))
@click.argument("span", metavar="START-END", callback=parse_range)
@format_option
@where_options
def command(pid: int, span: AddressRange, form: str, where: Where) -> None:
    """Show what each page of a range is backed by, from /proc/PID/pagemap.

    START-END is hexadecimal, as in maps, and is made larger to whole pages.  Consecutive pages that are alike make one
    line; FRAME is the frame or, of pages in swap, the slot of the first.
    """
    words = ask(where, lambda client: client.process(pid).pagemap(span))
    rows = list(_runs(span.start, words))
    if form == JSON:
        for start, end, flags, frame in rows:
            print_json({"start": start, "end": end, "flags": flags.split(), "frame": frame})
        return
    print_table((">pages", ">start", ">end", ">frame", "flags"), [_row(*row) for row in rows])


def _row(start: int, end: int, flags: str, frame: int) -> tuple[object, ...]:
    return (end - start) // PAGE_SIZE, f"{start:x}", f"{end:x}", frame or "", flags


def _runs(start: int, words: Entries) -> Iterator[tuple[int, int, str, int]]:
    """First byte, first byte behind, flags in words, and frame or slot, of runs of pages that are alike."""
    flags = words & np.uint64(sum(bit for _, bit in _FLAGS))
    swapped = (words & np.uint64(pagemap.SWAP)) != 0
    frames = words & np.uint64(pagemap.PFN_MASK)
    frames[swapped] >>= np.uint64(pagemap.SWAP_OFFSET_SHIFT)
    follows = (frames[1:] == frames[:-1] + np.uint64(1)) | ((frames[1:] == 0) & (frames[:-1] == 0))
    breaks = np.flatnonzero((flags[1:] != flags[:-1]) | ~follows) + 1
    for first, last in zip((0, *breaks.tolist()), (*breaks.tolist(), words.size), strict=True):
        names = " ".join(name for name, bit in _FLAGS if int(flags[first]) & bit)
        yield start + first * PAGE_SIZE, start + last * PAGE_SIZE, names, int(frames[first])
