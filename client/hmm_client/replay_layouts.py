"""What calls do that say less than the layout they meet: which mappings shmdt takes, where mprotect stopped, ...

A recording says what a program asked for and what it was answered.  Where that leaves something open, the mappings
that a process has at that moment decide, by the kernel's rules.

**Source**: Linux mm/mprotect.c, do_mprotect_pkey(), mprotect_fixup(); ipc/shm.c, ksys_shmdt(); mm/mmap.c,
vm_unmapped_area(); mm/mremap.c, remap_move() of 6.17.

**Absent**: making the calls (`replay_calls`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hmm.units import Address, AddressRange, page_up
from hmm_client.recordings import Interrupted, Protect
from hmm_client.recordings.decode import AIO_RING
from hmm_client.recordings.flags import PROT
from hmm_client.recordings.maps import SHARED_ANONYMOUS
from hmm_client.recordings.segments import NAME
from hmm_client.results import MapsLine

_READ, _WRITE, _EXEC = PROT["PROT_READ"], PROT["PROT_WRITE"], PROT["PROT_EXEC"]


def prot_of(line: MapsLine) -> int:
    """PROT_READ, PROT_WRITE and PROT_EXEC of a mapping."""
    return sum(bit for bit, letter in zip((_READ, _WRITE, _EXEC), line.permissions, strict=False) if letter != "-")


def mapped(lines: Sequence[MapsLine], span: AddressRange) -> Iterator[MapsLine]:
    """The mappings that a range begins with, up to the first hole in it."""
    reached = span.start
    for line in lines:
        if line.end > reached:
            if line.start > reached or reached >= span.end:
                return
            yield line
            reached = line.end


def attached(lines: Sequence[MapsLine], address: Address) -> list[AddressRange]:
    """What is left of the segment or ring that was mapped at an address: pieces that lie where they were put.

    Other things may have been mapped between them.
    """
    pieces = [
        line
        for line in lines
        if line.file_name.startswith((NAME, AIO_RING)) and line.start >= address and line.start - address == line.offset
    ]
    return [piece.span for piece in pieces if piece.file_id == pieces[0].file_id]


def moved_pieces(lines: Sequence[MapsLine], span: AddressRange) -> Iterator[AddressRange]:
    """What an mremap that moves several mappings at once takes along; holes between them stay holes."""
    for line in lines:
        if line.start < span.end and span.start < line.end:
            yield AddressRange(max(line.start, span.start), min(line.end, span.end))


def gap_above(lines: Sequence[MapsLine], mmap_base: Address, address: Address) -> int:
    """How long what was placed at a free address is, in bytes: placement is top-down, so it ends where others begin."""
    above = min((line.start for line in lines if line.start > address), default=mmap_base)
    return max(0, min(above, mmap_base if address < mmap_base else above) - address)


def changed(lines: Sequence[MapsLine], step: Interrupted) -> Address:
    """Up to where an mprotect that failed has changed protections: to the first mapping that cannot have let it pass.

    Of several reasons for ENOMEM this is the one without a hole: a limit, for what becomes writable counts.

    Returns: an address in the range of the call, its start when nothing was changed.
    """
    start = step.attempt.address
    span = AddressRange(start, page_up(start + step.attempt.length))
    if step.errno == "EPERM":
        stops = [sealed for sealed, end in step.sealed if sealed < span.end and span.start < end]
    else:
        may_stop = [line for line in mapped(lines, span) if _stops(line, step)]
        certain = [line for line in may_stop if line.permissions[3] == "p" or line.file_name not in step.writable]
        stops = [line.start for line in certain or may_stop]
    # When nothing is known that could have stopped it, nothing is known that has changed.
    return max(start, min(stops, default=start))


def _stops(line: MapsLine, step: Interrupted) -> bool:
    shared = line.permissions[3] == "s"
    if shared and line.file_name.startswith(SHARED_ANONYMOUS):
        return False
    assert isinstance(step.attempt, Protect)
    asked = step.attempt.prot & ~prot_of(line)
    if step.errno == "EACCES":  # of a file that may not be written, or lies where nothing may be executed
        return bool(line.file_id) and bool(asked & (_EXEC | _WRITE if shared else _EXEC))
    return not shared and bool(asked & _WRITE)
