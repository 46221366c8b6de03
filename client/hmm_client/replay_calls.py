"""Making one recorded call on a daemon, and seeing whether it ends as recorded.

Addresses are the recorded ones.  A mapping that the kernel found a place for is put there with
MAP_FIXED_NOREPLACE, so that the place must be free here too; an area that the kernel moved is moved there with
MREMAP_FIXED.

**Source**: mmap(2), mremap(2), brk(2), remap_file_pages(2), shmat(2); Linux kernel/events/core.c, perf_mmap().

**Absent**: which process, in which order (`replay`); what a call means on the layout it meets (`replay_layouts`).
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from hmm.errors import BadAddressError, InvalidRequestError, OutOfFramesError, RangeBusyError
from hmm.madvise import Advice
from hmm.mremap import MremapFlag
from hmm.units import PAGE_SIZE, AddressRange, page_down, page_up
from hmm.unmapped_area import MMAP_MIN_ADDR, MapFlag
from hmm_client.file import File
from hmm_client.process import Process
from hmm_client.recordings import (
    Advise,
    Brk,
    Detach,
    GrowStack,
    Interrupted,
    Lock,
    LockAll,
    Map,
    Protect,
    Remap,
    RemapFile,
    Step,
    Sync,
    Unlock,
    UnlockAll,
    Unmap,
)
from hmm_client.recordings.flags import MS
from hmm_client.replay_layouts import attached, changed, gap_above, mapped, moved_pieces, prot_of
from hmm_client.results import MapsLine

_FIXED = MapFlag.FIXED | MapFlag.FIXED_NOREPLACE
_NOWHERE = AddressRange(0, 0)
_MS_INVALIDATE = MS["MS_INVALIDATE"]
_NOT_INHERITED = "anon_inode:[perf_event]"
"""Files whose mappings a forked child does not get: perf_mmap() sets VM_DONTCOPY."""


@dataclass(frozen=True, slots=True)
class Made:
    """How a call ended.

    Attributes:
        expected, found: what it answered there and here, in words; equal when it did not matter.
        placement: the other address that the daemon would have chosen if left alone; 0 for none.
    """

    expected: str = ""
    found: str = ""
    placement: int = 0


def reached(step: Step) -> tuple[AddressRange, AddressRange]:
    """Where a program is before and after a call: what the call is about, and what it brings.  May be empty."""
    match step:
        case Map(recorded=start, length=length) | Remap(recorded=start, new_length=length):
            after = AddressRange(start, page_up(start + length))
            return (_span(step.address, step.length) if isinstance(step, Remap) else _NOWHERE), after
        case Interrupted(attempt=attempt):
            return _span(attempt.address, attempt.length), _NOWHERE
        case Unmap() | Protect() | Advise() | Sync():
            return _span(step.address, step.length), _NOWHERE
        case Brk(address=address, recorded=recorded) if address == recorded:
            return _NOWHERE, AddressRange(page_down(recorded - 1), page_up(recorded))
        case GrowStack(start=start, end=end):
            return _NOWHERE, AddressRange(start, end)
    return _NOWHERE, _NOWHERE


def _span(address: int, length: int) -> AddressRange:
    return AddressRange(page_down(address), page_up(address + length))


async def make(process: Process, step: Step, files: Mapping[str, File]) -> Made:
    """Make one call.

    Args:
        files: the open files, by the names that steps call them.

    Raises:
        HmmError: it failed.
    """
    made = Made()
    match step:
        case Map():
            made = await _map(process, step, files)
        case Remap():
            made = await _remap(process, step)
        case Brk():
            made = await _brk(process, step)
        case RemapFile():
            await _remap_file(process, step, files)
        case Detach(address=address):
            for piece in attached((await process.maps()).lines, address):
                await process.munmap(piece.start, piece.end - piece.start)
        case Interrupted():
            await _change_in_part(process, step)
        case Lock() | Unlock() | LockAll() | UnlockAll():
            await _lock(process, step)
        case _:
            await _change(process, step)
    return made


async def _change(process: Process, step: Step) -> None:
    match step:
        case Unmap(address=address, length=length):
            await process.munmap(address, length)
        case Protect(address=address, length=length, prot=prot):
            await process.mprotect(address, length, prot)
        case Advise(address=address, length=length, advice=Advice.COLLAPSE):
            with suppress(InvalidRequestError, RangeBusyError, OutOfFramesError):  # contents decide: not recorded
                await process.madvise(address, length, Advice.COLLAPSE)
        case Advise(address=address, length=length, advice=advice):
            await process.madvise(address, length, advice)
        case Sync(address=address, length=length, flags=flags):
            # MS_INVALIDATE asks whether memory is locked, and does nothing more.  What is depends on the kernel: some
            # have MREMAP_DONTUNMAP unlock all of a mapping of which it moves a part.
            await process.msync(address, length, flags & ~_MS_INVALIDATE)
        case GrowStack(start=start):
            await process.touch(start, 1, write=True)
        case _:
            raise AssertionError(f"a step that is no call: {step}")


async def _lock(process: Process, step: Lock | Unlock | LockAll | UnlockAll) -> None:
    match step:
        case Lock(address=address, length=length, flags=flags):
            await process.mlock(address, length, flags)
        case Unlock(address=address, length=length):
            await process.munlock(address, length)
        case LockAll(flags=flags):
            await process.mlockall(flags)
        case UnlockAll():
            await process.munlockall()


async def _map(process: Process, step: Map, files: Mapping[str, File]) -> Made:
    flags = MapFlag(step.flags)
    file = files.get(step.source or "")
    if not step.length and file is not None:
        step = await _with_length(process, step, file)
    chosen = bool(step.recorded) and not flags & _FIXED
    if chosen:  # a layout that is not known in full cannot tell whether a place is free
        flags |= MapFlag.FIXED if step.partial else MapFlag.FIXED_NOREPLACE
    mapped = await process.mmap(
        step.length,
        step.prot,
        flags,
        address=step.recorded or step.address,
        file=file,
        offset=step.offset,
    )
    if step.source == _NOT_INHERITED:
        await process.madvise(mapped.address, page_up(step.length), Advice.DONTFORK)
    hinted = bool(step.address) and max(page_down(step.address), MMAP_MIN_ADDR) == step.recorded
    elsewhere = chosen and not hinted and mapped.placement != step.recorded
    return Made(placement=mapped.placement if elsewhere else 0)


async def _remap(process: Process, step: Remap) -> Made:
    flags, target = MremapFlag(step.flags), step.target
    span = _span(step.address, min(step.length, step.new_length))
    if step.recorded and flags & MremapFlag.FIXED and step.length == step.new_length:
        pieces = list(moved_pieces((await process.maps()).lines, span))
        if pieces != [span]:  # Linux 6.17 moves all that lies there, and leaves what a hole comes to
            await _remap_pieces(process, step, pieces)
            return Made()
    if step.recorded not in (0, step.address):
        flags, target = flags | MremapFlag.MAYMOVE | MremapFlag.FIXED, step.recorded
    try:
        moved = await process.mremap(step.address, step.length, step.new_length, flags, new_address=target)
    except BadAddressError as error:
        pieces = list(moved_pieces((await process.maps()).lines, span))
        covered = sum(piece.end - piece.start for piece in pieces) == span.end - span.start
        if error.errno != errno.EFAULT or not (step.recorded and pieces and covered):
            raise
        # One mapping there: since Linux 6.16 touched memory and untouched become one, and touches are not recorded.
        await _remap_pieces(process, step, pieces)
        return Made()
    return Made(f"{step.recorded:#x}", f"{moved.address:#x}")


async def _remap_pieces(process: Process, step: Remap, pieces: Sequence[AddressRange]) -> None:
    """An mremap of what is several mappings here; the last one may grow."""
    distance = step.recorded - step.address
    if distance:
        flags = MremapFlag(step.flags) | MremapFlag.MAYMOVE | MremapFlag.FIXED
        for piece in pieces:
            length = piece.end - piece.start
            await process.mremap(piece.start, length, length, flags, new_address=piece.start + distance)
    growth = page_up(step.new_length) - page_up(step.length)
    if growth > 0:
        last = pieces[-1]
        length = last.end - last.start
        await process.mremap(last.start + distance, length, length + growth)


async def _brk(process: Process, step: Brk) -> Made:
    # What was not granted is not asked for again: the reason may have been a limit.
    granted = step.address == step.recorded
    found = (await process.brk(step.address if granted else 0)).address
    if granted:
        return Made(f"{step.recorded:#x}", f"{found:#x}")
    return Made(f"{page_up(step.recorded):#x}", f"{page_up(found):#x}")


async def _with_length(process: Process, step: Map, segment: File) -> Map:
    """A segment or ring of which the recording does not say how large it is."""
    maps = await process.maps()
    length = PAGE_SIZE if step.address else gap_above(maps.lines, maps.mmap_base, step.recorded) or PAGE_SIZE
    if (await segment.status()).size_bytes < length:
        await segment.truncate(length)
    return replace(step, length=length)


async def _change_in_part(process: Process, step: Interrupted) -> None:
    """An mprotect, mlock or munlock that failed, as far as it came."""
    attempt = step.attempt
    span = _span(attempt.address, attempt.length)
    lines = (await process.maps()).lines
    pieces = list(mapped(lines, span))
    hole = not pieces or pieces[-1].end < span.end
    if not isinstance(attempt, Protect):
        # Without a hole it met a limit, and did nothing; or pages that nobody may touch, and all is locked.
        if hole or any(line.permissions.startswith("---") for line in pieces):
            with suppress(BadAddressError):
                await _lock(process, attempt)
    elif step.errno == "ENOMEM" and hole:
        with suppress(BadAddressError):  # which it must meet, at the hole
            await process.mprotect(attempt.address, attempt.length, attempt.prot)
    elif (end := changed(lines, step)) > attempt.address:
        await process.mprotect(attempt.address, end - attempt.address, attempt.prot)


async def _remap_file(process: Process, step: RemapFile, files: Mapping[str, File]) -> None:
    """remap_file_pages() is emulated, as in Linux since 4.0: mm/mmap.c, SYSCALL_DEFINE5(remap_file_pages)."""
    lines = (await process.maps()).lines
    area = next((line for line in lines if step.address in line.span), None)
    if area is None:
        raise InvalidRequestError(f"remap_file_pages: nothing is mapped at {step.address:#x}")
    start, length = page_down(step.address), page_up(step.length) or PAGE_SIZE
    flags = MapFlag.SHARED | MapFlag.FIXED
    file = files.get(area.file_name)
    if file is not None:
        await process.mmap(length, prot_of(area), flags, address=start, file=file, offset=step.offset)
    elif source := _where(lines, area.file_id, step.offset):
        # Unnamed memory: mremap() of length 0 maps once more what is mapped somewhere.
        second = await process.mremap(source, 0, length, MremapFlag.MAYMOVE)
        await process.mprotect(second.address, length, prot_of(area))
        await process.mremap(second.address, length, length, MremapFlag.MAYMOVE | MremapFlag.FIXED, new_address=start)
    else:  # pages that nothing maps any more cannot be reached from here; others of the same name take their place
        other = await process.client.open_file(area.file_name, create=True)
        if (await other.status()).size_bytes < step.offset + length:
            await other.truncate(step.offset + length)
        await process.mmap(length, prot_of(area), flags, address=start, file=other, offset=step.offset)
        await other.close()


def _where(lines: Sequence[MapsLine], file_id: int, offset: int) -> int:
    """An address where a byte of a file is mapped; 0 for none."""
    for line in lines:
        if line.file_id == file_id and line.offset <= offset < line.offset + line.end - line.start:
            return line.start + offset - line.offset
    return 0
