"""What others than the process do to a driver's pages: another device, and the kernel on its own account.

**Source**: lib/test_hmm.c and its kselftest (migration, exclusive access); fs/proc/task_mmu.c, clear_refs_write();
mm/khugepaged.c, collapse_file() and collapse_huge_page(); mm/vmscan.c, shrink_folio_list().

**Invariants**: as in `adversities`.

**Absent**: what the process itself does (`adversities`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import TypeAlias

from hmm.clear_refs import ClearRefs
from hmm.errors import HmmError
from hmm.madvise import Advice
from hmm.units import PAGE_SIZE, PMD_SIZE, AddressRange
from hmm_client.certify.adversity import PAGES, Suite, page, use
from hmm_client.certify.stage import Stage, stamp
from hmm_client.interval_driver import IntervalDriver
from hmm_client.interval_mirror import IntervalMirror
from hmm_client.process import Process

ROUNDS = 12
Taking: TypeAlias = Callable[[IntervalMirror, AddressRange], Awaitable[object]]

NEIGHBOURS = Suite()


@asynccontextmanager
async def other_device(stage: Stage, process: Process) -> AsyncIterator[IntervalMirror]:
    """Another device that mirrors the process, with memory of its own; pages that it still has come back."""
    device = await stage.client.register_device("certify", memory_pages=4 * PAGES)
    mirror = await device.attach(process, IntervalDriver())
    await mirror.insert(0, mirror.address_end)
    try:
        yield mirror
    finally:
        await mirror.detach()
        await device.evict()
        await device.unregister()


async def exclude_some(other: IntervalMirror, span: AddressRange) -> None:
    """Take what can be taken of a range."""
    with suppress(HmmError):  # somebody was faster
        await other.make_exclusive(span)


async def have_back(stage: Stage, take: Taking, meanwhile: Taking) -> None:
    """Another device takes pages, which the driver's device uses then, and others while it uses them."""
    process = await stage.process()
    span = await stage.region(process, PAGES)
    await use(stage, process, span)
    async with other_device(stage, process) as other:
        await take(other, AddressRange(span.start, page(span, 4)))
        for index in range(4):
            await stage.device_reads(process, page(span, index), stamp(100 + index))
            await stage.device_writes(process, page(span, index), stamp(200 + index))
        for number in range(ROUNDS):
            accesses = [stage.device_may(process, page(span, index), write=bool(index % 2)) for index in range(PAGES)]
            await asyncio.gather(*accesses, meanwhile(other, span))
            await stage.device_writes(process, page(span, number % PAGES), stamp(300 + number))


@NEIGHBOURS.add("pages that another device moves to its memory are had back")
async def other_device_migrates(stage: Stage) -> None:
    """MIGRATE by somebody else; the device's fault brings the page back."""
    await have_back(stage, IntervalMirror.migrate_to_device, IntervalMirror.migrate_to_device)


@NEIGHBOURS.add("pages that another device takes for itself are had back")
async def other_device_excludes(stage: Stage) -> None:
    """EXCLUSIVE: atomic access of somebody else, until the CPU or a device touches the page."""
    await have_back(stage, IntervalMirror.make_exclusive, exclude_some)


@NEIGHBOURS.add("pages whose writes are watched anew are faulted for writing again")
async def clear_refs(stage: Stage) -> None:
    """Soft-dirty tracking: checkpointing tools write to /proc/PID/clear_refs."""
    process = await stage.process()
    span = await stage.region(process, PAGES)
    await use(stage, process, span)
    for number in range(3):
        await process.clear_refs(ClearRefs.SOFT_DIRTY)
        for index in range(PAGES):
            await stage.device_writes(process, page(span, index), stamp(200 + 10 * number + index))


@NEIGHBOURS.add("small pages that become a huge one, and the huge one in pieces, are where they were")
async def collapse(stage: Stage) -> None:
    """CLEAR: the contents move to other frames beneath the same addresses."""
    process = await stage.process()
    mapped = await process.mmap(2 * PMD_SIZE)
    start = -(-mapped.address // PMD_SIZE) * PMD_SIZE
    span = AddressRange(start, start + PMD_SIZE)
    for index in range(0, 512, 64):
        await stage.device_writes(process, page(span, index), stamp(100 + index))
    await process.madvise(span.start, PMD_SIZE, Advice.COLLAPSE)
    for index in range(0, 512, 32):
        expected = bytes(8) if index % 64 else stamp(100 + index)
        await stage.device_reads(process, page(span, index), expected)
        await stage.device_writes(process, page(span, index), stamp(1000 + index))
    await process.madvise(page(span, 64), PAGE_SIZE, Advice.DONTNEED)
    for index in range(0, 512, 32):
        await stage.device_reads(process, page(span, index), bytes(8) if index == 64 else stamp(1000 + index))


@NEIGHBOURS.add("pages that go to swap come back")
async def pageout(stage: Stage) -> None:
    """MADV_PAGEOUT, as reclaim does it."""
    process = await stage.process()
    span = await stage.region(process, PAGES)
    await use(stage, process, span)
    for number in range(3):
        await process.madvise(span.start, span.size_bytes, Advice.PAGEOUT)
        expected = 100 if not number else 200 + 10 * (number - 1)
        for index in range(PAGES):
            await stage.device_reads(process, page(span, index), stamp(expected + index))
            await stage.device_writes(process, page(span, index), stamp(200 + 10 * number + index))
