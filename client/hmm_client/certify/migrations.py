"""What happens to a driver that takes the steps of a migration itself, for those that offer the order `migrate`.

**Source**: Linux Documentation/mm/hmm.rst; mm/migrate_device.c, migrate_vma_setup(), _pages() and _finalize().

**Invariants**: as in `adversities`.

**Absent**: migrations of other devices (`neighbours`).
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress

from hmm.madvise import Advice
from hmm.units import PAGE_SIZE, AddressRange
from hmm_client.certify.adversity import FIXED, PAGES, RW, Suite, page, use
from hmm_client.certify.driver_process import DriverGoneError
from hmm_client.certify.neighbours import exclude_some, other_device
from hmm_client.certify.stage import Stage, stamp
from hmm_client.harness import HoldEndedError, HoldPoint
from hmm_client.process import Process

MIGRATE = "migrate"
"""The order."""
ROUNDS = 6
HELD_S = 0.3
"""How long the step before the last is waited for, and then kept."""
TOUCH_S = 0.03
"""How long a touch of pages that cannot be touched is waited for."""

MIGRATIONS = Suite(order=MIGRATE)


@MIGRATIONS.add("pages that the driver moves step by step hold what they held")
async def migrate(stage: Stage) -> None:
    """To the device, and had back by the CPU, and by the device, in turns; one of them is a hole."""
    process = await stage.process()
    span = await stage.region(process, PAGES)
    await process.madvise(page(span, 3), PAGE_SIZE, Advice.DONTNEED)
    expected = [bytes(8) if index == 3 else stamp(index) for index in range(PAGES)]
    await stage.device_migrates(process, span)
    await _require_contents(stage, process, span, expected)
    await use(stage, process, AddressRange(span.start, page(span, 2)))
    await stage.device_migrates(process, span)
    await stage.device_migrates(process, span)  # what is there stays there
    for index, content in enumerate([stamp(100), stamp(101), *expected[2:]]):
        await stage.device_reads(process, page(span, index), content)
        await stage.device_writes(process, page(span, index), stamp(200 + index))


@MIGRATIONS.add("pages that are used while they move step by step hold what was written last")
async def migrate_under_use(stage: Stage) -> None:
    """The CPU and the device touch them, by chance, and when all but the last step is taken: they wait."""
    process = await stage.process()
    span = await stage.region(process, PAGES)
    written = [stamp(index) for index in range(PAGES)]

    async def touch() -> None:
        await _require_contents(stage, process, span, written)

    for number in range(ROUNDS):
        written = [stamp(100 * (number + 1) + index) for index in range(PAGES)]
        await asyncio.gather(
            stage.device_migrates(process, span, may_fail=True),
            *(process.write(page(span, index), written[index]) for index in range(0, PAGES, 2)),
            *(stage.device_writes(process, page(span, index), written[index]) for index in range(1, PAGES, 2)),
        )
        await touch()
    await _before_the_last_step(stage, process, span, touch)


@MIGRATIONS.add("mappings that change while their pages move step by step are what they became")
async def migrate_under_change(stage: Stage) -> None:
    """Unmapped and mapped again, discarded, and forked: the child has what the parent had."""
    process = await stage.process()
    span = await stage.region(process, PAGES)

    async def remap() -> None:
        await process.munmap(page(span, 4), 2 * PAGE_SIZE)
        await process.mmap(2 * PAGE_SIZE, RW, FIXED, address=page(span, 4))

    for number in range(ROUNDS):
        content = [stamp(100 * (number + 1) + index) for index in range(PAGES)]
        for index, data in enumerate(content):
            await process.write(page(span, index), data)
        _, child, *_ = await asyncio.gather(
            stage.device_migrates(process, span, may_fail=True),
            process.fork(),
            remap(),
            process.madvise(page(span, 6), PAGE_SIZE, Advice.DONTNEED),
        )
        await _require_contents(stage, child, AddressRange(span.start, page(span, 4)), content[:4])
        await child.exit()
        await _require_contents(stage, process, span, [*content[:4], *[bytes(8)] * 3, content[7]])


@MIGRATIONS.add("pages that others take while they move step by step hold what they held")
async def migrate_beside_others(stage: Stage) -> None:
    """Some are in the memory of another device, which moves or excludes them meanwhile."""
    process = await stage.process()
    span = await stage.region(process, PAGES)
    content = [stamp(index) for index in range(PAGES)]
    async with other_device(stage, process) as other:
        for number in range(ROUNDS):
            await other.migrate_to_device(AddressRange(page(span, 2), page(span, 5)))
            taking = other.migrate_to_device(span) if number % 2 else exclude_some(other, span)
            await asyncio.gather(stage.device_migrates(process, span, may_fail=True), taking)
            await _require_contents(stage, process, span, content)


@MIGRATIONS.add("a driver that is killed between two steps takes nothing with it, and others go on")
async def migrate_killed(stage: Stage) -> None:
    """SIGKILL when all but the last step is taken; somebody waits for the pages."""
    process = await stage.process()
    span = await stage.region(process, PAGES)
    stage.forgiven |= {"died", "access-after-fence"}
    numbers = [stamp(index) for index in range(PAGES)]

    async def kill() -> None:
        reading = asyncio.create_task(_require_contents(stage, process, span, numbers))
        await asyncio.wait({reading}, timeout=TOUCH_S / 3)
        stage.driver.signal(signal.SIGKILL)
        await reading

    async with other_device(stage, process) as other:
        with suppress(DriverGoneError):
            await _before_the_last_step(stage, process, span, kill)
        await other.migrate_to_device(span)
        await _require_contents(stage, process, span, numbers)


async def _before_the_last_step(
    stage: Stage, process: Process, span: AddressRange, meanwhile: Callable[[], Coroutine[None, None, None]]
) -> None:
    """Let the driver migrate, and something happen when it has said where the pages go, and does not know it yet."""
    moving: asyncio.Task[None] | None = None
    happening: asyncio.Task[None] | None = None
    with suppress(HoldEndedError):  # a driver that does not take this step does not come to the hold
        async with stage.harness.hold(HoldPoint.BEFORE_END, "migrate_vma_pages", lease_s=HELD_S) as hold:
            moving = asyncio.create_task(stage.device_migrates(process, span, may_fail=True))
            await hold.reached()
            happening = asyncio.create_task(meanwhile())
            await asyncio.wait({happening}, timeout=TOUCH_S)
    await (happening or meanwhile())
    if moving is not None:
        await moving


async def _require_contents(stage: Stage, process: Process, span: AddressRange, expected: Sequence[bytes]) -> None:
    """Let the CPU have the pages: each has to begin with these bytes."""
    data = await process.read(span.start, span.size_bytes)
    for index, content in enumerate(expected):
        seen = data[index * PAGE_SIZE :][: len(content)]
        if seen != content:
            stage.find("lost-contents", f"at {page(span, index):#x} there is {seen.hex()}, not {content.hex()}")
