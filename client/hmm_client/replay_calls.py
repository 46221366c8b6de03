"""Making one recorded call on a daemon, and seeing whether it ends as recorded.

Addresses are the recorded ones.  A mapping that the kernel found a place for is put there with
MAP_FIXED_NOREPLACE, so that the place must be free here too; an area that the kernel moved is moved there with
MREMAP_FIXED.

**Source**: mmap(2), mremap(2), brk(2), remap_file_pages(2).

**Absent**: which process, in which order (`replay`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hmm.mremap import MremapFlag
from hmm.units import PAGE_SIZE, AddressRange, page_down, page_up
from hmm.unmapped_area import MapFlag
from hmm_client.file import File
from hmm_client.process import Process
from hmm_client.recordings import (
    Advise,
    Brk,
    GrowStack,
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

_FIXED = MapFlag.FIXED | MapFlag.FIXED_NOREPLACE
_NOWHERE = AddressRange(0, 0)


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
        case Unmap(address=address, length=length):
            await process.munmap(address, length)
        case Protect(address=address, length=length, prot=prot):
            await process.mprotect(address, length, prot)
        case Advise(address=address, length=length, advice=advice):
            await process.madvise(address, length, advice)
        case Sync(address=address, length=length, flags=flags):
            await process.msync(address, length, flags)
        case GrowStack(start=start):
            await process.touch(start, 1, write=True)
        case _:
            await _lock(process, step)
    return made


async def _lock(process: Process, step: Step) -> None:
    match step:
        case Lock(address=address, length=length, flags=flags):
            await process.mlock(address, length, flags)
        case Unlock(address=address, length=length):
            await process.munlock(address, length)
        case LockAll(flags=flags):
            await process.mlockall(flags)
        case UnlockAll():
            await process.munlockall()
        case _:
            raise AssertionError(f"a step that is no call: {step}")


async def _map(process: Process, step: Map, files: Mapping[str, File]) -> Made:
    flags = MapFlag(step.flags)
    chosen = bool(step.recorded) and not flags & _FIXED
    if chosen:  # a layout that is not known in full cannot tell whether a place is free
        flags |= MapFlag.FIXED if step.partial else MapFlag.FIXED_NOREPLACE
    mapped = await process.mmap(
        step.length,
        step.prot,
        flags,
        address=step.recorded or step.address,
        file=files.get(step.source or ""),
        offset=step.offset,
    )
    hinted = bool(step.address) and page_down(step.address) == step.recorded
    elsewhere = chosen and not hinted and mapped.placement != step.recorded
    return Made(placement=mapped.placement if elsewhere else 0)


async def _remap(process: Process, step: Remap) -> Made:
    flags, target = MremapFlag(step.flags), step.target
    if step.recorded not in (0, step.address):
        flags, target = flags | MremapFlag.MAYMOVE | MremapFlag.FIXED, step.recorded
    moved = await process.mremap(step.address, step.length, step.new_length, flags, new_address=target)
    return Made(f"{step.recorded:#x}", f"{moved.address:#x}")


async def _brk(process: Process, step: Brk) -> Made:
    # What was not granted is not asked for again: the reason may have been a limit.
    granted = step.address == step.recorded
    found = (await process.brk(step.address if granted else 0)).address
    if granted:
        return Made(f"{step.recorded:#x}", f"{found:#x}")
    return Made(f"{page_up(step.recorded):#x}", f"{page_up(found):#x}")


async def _remap_file(process: Process, step: RemapFile, files: Mapping[str, File]) -> None:
    """remap_file_pages() is emulated, as in Linux since 4.0: mm/mmap.c, SYSCALL_DEFINE5(remap_file_pages)."""
    area = next(line for line in (await process.maps()).lines if step.address in line.span)
    prot = sum(bit for bit, letter in zip((1, 2, 4), area.permissions, strict=False) if letter != "-")
    flags = MapFlag.SHARED | MapFlag.FIXED
    length = page_up(step.length) or PAGE_SIZE
    await process.mmap(
        length, prot, flags, address=page_down(step.address), file=files[area.file_name], offset=step.offset
    )
