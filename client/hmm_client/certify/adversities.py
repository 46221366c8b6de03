"""What happens to a driver, one thing at a time: each an ordinary day of some program, or the last of one.

**Source**: the rules of proto/hmm_proto/v1/event.proto; the races that lib/test_hmm.c and its kselftest leave to
chance: a change while a fault is under way, use beneath an invalidation, exit beneath use.

**Invariants**: an adversity that a right driver meets ends without a finding, on the slowest machine.

**Absent**: what counts as wrong (`findings`, `stage`); chance (`storm`); what others than the process do
(`neighbours`); what happens while the driver migrates (`migrations`).
"""

from __future__ import annotations

import asyncio
import signal
import time
from contextlib import suppress

from hmm.errors import RangeBusyError
from hmm.madvise import Advice
from hmm.mremap import MremapFlag
from hmm.units import PAGE_SIZE
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot
from hmm_client.certify.adversity import FIXED, PAGES, RW, Suite, page, use
from hmm_client.certify.driver_process import DriverGoneError, DriverSilentError, RefusalError
from hmm_client.certify.migrations import MIGRATIONS
from hmm_client.certify.neighbours import NEIGHBOURS
from hmm_client.certify.stage import Stage, stamp
from hmm_client.harness import HoldEndedError, HoldPoint

COME_BACK_S = 30.0
"""How long a driver may take to end or to come back when its session broke."""
HELD_S = 0.3
"""How long a fault is waited for, and then kept until an event has come."""
FAULTS = "fault|range_fault|range_fault_unlocked"
"""What a driver's faults are called, in either interface."""
ROUNDS = 40

ADVERSITIES = Suite()


@ADVERSITIES.add("the device sees what the CPU sees, and the other way round")
async def plain(stage: Stage) -> None:
    """Reads and writes, across pages and in their middle; memory that nobody mapped."""
    process = await stage.process()
    span = await stage.region(process, PAGES)
    for index in range(PAGES):
        await stage.device_reads(process, page(span, index), stamp(index))
    await stage.device_writes(process, page(span, 1) - 4, b"across a page")
    await process.write(page(span, 3) + 100, b"from the CPU")
    await stage.device_reads(process, page(span, 3) + 100, b"from the CPU")
    await stage.device_cannot(process, span.end + (1 << 30))


@ADVERSITIES.add("memory that is unmapped and mapped again is new memory")
async def munmap(stage: Stage) -> None:
    """The device has used it for reading and writing; afterwards it is gone, and then it is somebody else's."""
    process = await stage.process()
    span = await stage.region(process, PAGES)
    await use(stage, process, span)
    await process.munmap(page(span, 0), 4 * PAGE_SIZE)
    await stage.device_cannot(process, page(span, 1))
    await stage.device_cannot(process, page(span, 2), write=True)
    await stage.device_reads(process, page(span, 5), stamp(105))
    await process.mmap(4 * PAGE_SIZE, RW, FIXED, address=span.start)
    for index in range(4):
        await process.write(page(span, index), stamp(200 + index))
        await stage.device_reads(process, page(span, index), stamp(200 + index))
        await stage.device_writes(process, page(span, index), stamp(300 + index))


@ADVERSITIES.add("pages that become read-only are read and not written, until they are writable again")
async def mprotect(stage: Stage) -> None:
    """WRITE_PROTECT, and MUNMAP for PROT_NONE."""
    process = await stage.process()
    span = await stage.region(process, PAGES)
    await use(stage, process, span)
    await process.mprotect(span.start, 4 * PAGE_SIZE, Prot.READ)
    for index in range(2):
        await stage.device_reads(process, page(span, index), stamp(100 + index))
        await stage.device_cannot(process, page(span, index), write=True)
    await process.mprotect(span.start, 4 * PAGE_SIZE, Prot(0))
    await stage.device_cannot(process, page(span, 1))
    await process.mprotect(span.start, 4 * PAGE_SIZE, RW)
    await stage.device_reads(process, page(span, 1), stamp(101))
    await stage.device_writes(process, page(span, 1), stamp(201))


@ADVERSITIES.add("after fork the device's writes go to the parent alone")
async def fork(stage: Stage) -> None:
    """FORK: the parent's pages become copy-on-write."""
    process = await stage.process()
    span = await stage.region(process, PAGES)
    await use(stage, process, span)
    child = await process.fork()
    await stage.device_reads(process, page(span, 0), stamp(100))
    for index in range(4):
        await stage.device_writes(process, page(span, index), stamp(200 + index))
        await stage.cpu_reads(child, page(span, index), stamp(100 + index))
    await child.write(page(span, 5), stamp(500))
    await stage.device_reads(process, page(span, 5), stamp(105))
    await stage.adopt(child)
    await stage.device_reads(child, page(span, 5), stamp(500))
    await stage.device_writes(child, page(span, 6), stamp(606))
    await stage.cpu_reads(process, page(span, 6), stamp(106))


@ADVERSITIES.add("memory that moves is found where it is, and not where it was")
async def mremap(stage: Stage) -> None:
    """MIGRATE of the old range; the destination may have been mapped before."""
    process = await stage.process()
    span = await stage.region(process, PAGES)
    target = await stage.region(process, PAGES)
    await use(stage, process, span)
    await use(stage, process, target)
    await process.mremap(
        span.start, 4 * PAGE_SIZE, 4 * PAGE_SIZE, MremapFlag.MAYMOVE | MremapFlag.FIXED, new_address=target.start
    )
    for index in range(4):
        await stage.device_reads(process, page(target, index), stamp(100 + index))
        await stage.device_cannot(process, page(span, index))
    await stage.device_writes(process, page(target, 0), stamp(200))


@ADVERSITIES.add("a file that is truncated has nothing behind its end")
async def truncate(stage: Stage) -> None:
    """MUNMAP by truncation, with the mapping still there; holes."""
    file = await stage.client.open_file(f"certify-{time.monotonic_ns()}", create=True)
    await file.truncate(PAGES * PAGE_SIZE)
    process = await stage.process()
    span = (await process.mmap(PAGES * PAGE_SIZE, RW, MapFlag.SHARED, file=file)).span
    await use(stage, process, span)
    await file.truncate(4 * PAGE_SIZE)
    await stage.device_reads(process, page(span, 3), stamp(103))
    await stage.device_cannot(process, page(span, 5))
    await stage.device_cannot(process, page(span, 6), write=True)
    await file.truncate(PAGES * PAGE_SIZE)
    await stage.device_reads(process, page(span, 5), bytes(8))
    await file.punch(PAGE_SIZE, PAGE_SIZE)
    await stage.device_reads(process, page(span, 1), bytes(8))
    await stage.device_writes(process, page(span, 1), stamp(201))
    await file.close()


@ADVERSITIES.add("discarded pages are empty")
async def discard(stage: Stage) -> None:
    """MIGRATE by MADV_DONTNEED: the range stays mapped."""
    process = await stage.process()
    span = await stage.region(process, PAGES)
    await use(stage, process, span)
    await process.madvise(page(span, 2), 4 * PAGE_SIZE, Advice.DONTNEED)
    for index in range(2, 6):
        await stage.device_reads(process, page(span, index), bytes(8))
        await stage.device_writes(process, page(span, index), stamp(200 + index))
    await stage.device_reads(process, page(span, 6), stamp(106))


@ADVERSITIES.add("pages that are taken while the device faults them are faulted again")
async def invalidate_during_fault(stage: Stage) -> None:
    """The result of a fault is outdated before it arrives: by chance, and by holding it until the event has come."""
    process = await stage.process()
    span = await stage.region(process, PAGES)
    for number in range(ROUNDS // 4):
        await process.madvise(span.start, span.size_bytes, Advice.DONTNEED)
        await asyncio.gather(
            *(stage.device_may(process, page(span, index), write=bool(index % 3)) for index in range(PAGES)),
            *(process.madvise(page(span, index), PAGE_SIZE, Advice.DONTNEED) for index in range(PAGES)),
            *(process.write(page(span, index), stamp(number)) for index in range(PAGES)),
        )
        await process.write(page(span, number % PAGES), stamp(1000 + number))
        await stage.device_reads(process, page(span, number % PAGES), stamp(1000 + number))
    for index in range(PAGES):
        address = page(span, index)
        await process.madvise(address, PAGE_SIZE, Advice.DONTNEED)
        access: asyncio.Task[None] | None = None
        # A driver that has faulted the page meanwhile does not come to the hold: its lease ends.
        with suppress(HoldEndedError):
            async with stage.harness.hold(HoldPoint.BEFORE_END, FAULTS, process=process, lease_s=HELD_S) as hold:
                access = asyncio.create_task(stage.device_may(process, address, write=bool(index % 2)))
                await hold.reached()
                discarded = await process.madvise(address, PAGE_SIZE, Advice.DONTNEED)
                stage.overtaken.add(discarded.operation_id)
        if access is not None:
            await access
        await stage.device_may(process, address, write=False)


@ADVERSITIES.add("a fault of what is being taken away ends with what is there afterwards")
async def fault_during_invalidation(stage: Stage) -> None:
    """An access that meets a change which the driver has been told of, or has not yet, and which is not made yet."""
    process = await stage.process()
    span = await stage.region(process, PAGES)
    await use(stage, process, span)
    for index in range(PAGES):
        point = (HoldPoint.BEFORE_EDIT, HoldPoint.BEFORE_EVENT)[index % 2]
        access: asyncio.Task[None] | None = None
        # A driver that keeps nothing has nothing to be told of: the call comes to no hold.
        with suppress(HoldEndedError):
            async with stage.harness.hold(point, "madvise", process=process, lease_s=HELD_S) as hold:
                discarding = asyncio.create_task(process.madvise(page(span, index), PAGE_SIZE, Advice.DONTNEED))
                await hold.reached()
                if point is HoldPoint.BEFORE_EDIT:
                    access = asyncio.create_task(stage.device_reads(process, page(span, index), bytes(8)))
                else:
                    access = asyncio.create_task(stage.device_may(process, page(span, index), write=False))
                await asyncio.wait({access}, timeout=HELD_S / 10)  # it has no end, or ends with the old page
        await discarding
        if access is not None:
            await access
        await stage.device_reads(process, page(span, index), bytes(8))
        await stage.device_writes(process, page(span, index), stamp(200 + index))


@ADVERSITIES.add("a fault that finds no memory left fails, and succeeds when there is some again")
async def out_of_frames(stage: Stage) -> None:
    """ENOMEM in the middle of a fault, as when the machine is full."""
    process = await stage.process()
    span = await stage.region(process, PAGES)
    await process.madvise(span.start, span.size_bytes, Advice.DONTNEED)
    for index in range(PAGES):
        await stage.harness.fail_allocation(1)
        await stage.device_may(process, page(span, index), write=True)
        await stage.harness.fail_allocation(0)
        await stage.device_writes(process, page(span, index), stamp(200 + index))


@ADVERSITIES.add("accesses that are under way have landed when their event is answered")
async def invalidate_under_use(stage: Stage) -> None:
    """Reads and writes without a pause, and changes of every kind beneath them."""
    process = await stage.process()
    span = await stage.region(process, PAGES)
    accesses: set[asyncio.Task[None]] = set()
    for number in range(ROUNDS):
        for index in range(4):
            address = page(span, (number + index) % PAGES)
            accesses.add(asyncio.create_task(stage.device_may(process, address, write=bool(index % 2))))
        address = page(span, number % PAGES)
        match number % 4:
            case 0:
                await process.madvise(address, PAGE_SIZE, Advice.DONTNEED)
            case 1:
                await process.mprotect(address, PAGE_SIZE, Prot.READ)
                await process.mprotect(address, PAGE_SIZE, RW)
            case 2:
                await process.munmap(address, PAGE_SIZE)
                await process.mmap(PAGE_SIZE, RW, FIXED, address=address)
            case _:
                await (await process.fork()).exit()
        for ended in [access for access in accesses if access.done()]:
            accesses.remove(ended)
            ended.result()
    await asyncio.gather(*accesses)
    await process.write(span.start, stamp(1))
    await stage.device_reads(process, span.start, stamp(1))


@ADVERSITIES.add("a storm of events is answered in time, all of it")
async def many_events(stage: Stage) -> None:
    """More changes at a time than a session has credit for."""
    process = await stage.process()
    span = await stage.region(process, 64)
    for index in range(0, 64, 4):
        await stage.device_reads(process, page(span, index), stamp(index))
    await asyncio.gather(
        *(process.madvise(page(span, number % 64), PAGE_SIZE, Advice.DONTNEED) for number in range(400))
    )
    await stage.device_reads(process, page(span, 4), bytes(8))


@ADVERSITIES.add("two processes on one device do not disturb one another")
async def two_processes(stage: Stage) -> None:
    """The same addresses, other pages; one ends."""
    first, second = await stage.process("first"), await stage.process("second")
    here, there = await stage.region(first, PAGES), await stage.region(second, PAGES)
    await use(stage, first, here)
    await second.write(there.start, stamp(77))
    await stage.device_reads(second, there.start, stamp(77))
    await stage.device_reads(first, here.start, stamp(100))
    await first.exit()
    await stage.device_writes(second, there.start, stamp(78))


@ADVERSITIES.add("a process that ends beneath its device takes its mirror with it, and nothing else")
async def exit_under_use(stage: Stage) -> None:
    """MUNMAP of everything, then release; the mirror is unregistered afterwards."""
    for _ in range(4):
        process = await stage.process()
        span = await stage.region(process, PAGES)
        accesses = [
            asyncio.create_task(stage.device_may(process, page(span, index % PAGES), write=bool(index % 2)))
            for index in range(4 * PAGES)
        ]
        await process.exit()
        await asyncio.gather(*accesses)
    other = await stage.process()
    await stage.device_reads(other, (await stage.region(other, 1)).start, stamp(0))


@ADVERSITIES.add("memory that is reaped before its process ends is gone")
async def reaped(stage: Stage) -> None:
    """process_mrelease() and the OOM reaper: events that do not block, which a driver answers or refuses."""
    process = await stage.process()
    span = await stage.region(process, PAGES)
    await use(stage, process, span)
    for _ in range(ROUNDS):
        try:
            await process.mrelease()
        except RangeBusyError:  # EAGAIN: refused, and asked again
            continue
        break
    else:
        stage.find("refused", f"process_mrelease was refused {ROUNDS} times")
    await stage.device_may(process, page(span, 1), write=False)


@ADVERSITIES.add("a driver that was stopped, and has lost its mirror, goes on with others")
async def stopped(stage: Stage) -> None:
    """SIGSTOP beyond the deadline: the mirror is fenced."""
    process = await stage.process()
    span = await stage.region(process, PAGES)
    await use(stage, process, span)
    stage.forgiven |= {"unanswered", "access-after-fence"}
    stage.driver.signal(signal.SIGSTOP)
    try:
        await process.munmap(span.start, PAGE_SIZE)
    finally:
        stage.driver.signal(signal.SIGCONT)
    await stage.device_cannot(process, page(span, 2))
    other = await stage.process()
    fresh = await stage.region(other, PAGES)
    await stage.device_reads(other, fresh.start, stamp(0))
    await stage.device_writes(other, fresh.start, stamp(9))


@ADVERSITIES.add("a driver whose daemon died ends, or comes back with a new session")
async def lost_session(stage: Stage) -> None:
    """SIGKILL of the daemon, and another one at the same place."""
    process = await stage.process()
    span = await stage.region(process, PAGES)
    await use(stage, process, span)
    await stage.kill_daemon()
    fresh = await stage.client.create_process("fresh")
    deadline_s = time.monotonic() + COME_BACK_S
    while time.monotonic() < deadline_s:
        if stage.driver.ended:
            return
        try:
            await stage.driver.mirror(fresh.id)
        except RefusalError:
            await stage.driver.wait(0.1)
        except DriverGoneError:
            return
        except DriverSilentError:
            break
        else:
            stage.keep(fresh)
            again = await stage.region(fresh, PAGES)
            await use(stage, fresh, again)
            await fresh.munmap(again.start, PAGE_SIZE)
            return
    stage.find(
        "lost-session", f"within {COME_BACK_S:g} s it has neither ended nor mirrored a process of the new daemon"
    )


ADVERSITIES.update(NEIGHBOURS)
ADVERSITIES.update(MIGRATIONS)
