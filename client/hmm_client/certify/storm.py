"""Everything at random: steps drawn from a seed, a model that says what must come of each, and the shortest failure.

Eight pages are compared, one access at a time; sixteen others are accessed all the while and changed beneath, where
only the daemon's checks say what is right.  The steps are drawn before the first is taken and each makes sense in any
state, so that leaving some out is a storm as well: that is how the shortest one is looked for.

**Invariants**: the same seed gives the same steps; a storm's own calls never fail.

**Absent**: what counts as wrong (`findings`, `stage`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import numpy as np

from hmm.clear_refs import ClearRefs
from hmm.errors import HmmError
from hmm.madvise import Advice
from hmm.mremap import MremapFlag
from hmm.units import PAGE_SIZE, AddressRange
from hmm.vma import Prot
from hmm_client.certify.adversity import FIXED, RW, page
from hmm_client.certify.findings import Finding
from hmm_client.certify.neighbours import exclude_some, other_device
from hmm_client.certify.stage import Stage, stamp
from hmm_client.interval_mirror import IntervalMirror
from hmm_client.process import Process

STEPS = 40
COMPARED = 8
NOISY = 16
TRIALS = 40
"""How many shorter storms are tried in search of the shortest, if nobody says."""
_WEIGHTS = {
    "device reads": 8, "device writes": 8, "CPU writes": 5, "munmap": 3, "mmap": 4, "discard": 3, "protect": 3,
    "unprotect": 3, "fork": 2, "move": 2, "send away": 3, "exclude": 2, "page out": 2, "watch": 1, "use": 6, "churn": 5,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Step:
    """One step: what, from which page, how many pages, with which number."""

    what: str
    page: int
    pages: int
    number: int

    def __str__(self) -> str:
        return f"{self.what} page {self.page}" + (f" to {self.page + self.pages - 1}" if self.pages > 1 else "")


def draw(seed: int) -> list[Step]:
    """The steps of a seed."""
    random = np.random.default_rng(seed)
    weights = np.array(list(_WEIGHTS.values()), float)
    kinds = random.choice(list(_WEIGHTS), STEPS, p=weights / weights.sum())
    steps = []
    for number, what in enumerate(kinds.tolist()):
        first = int(random.integers(NOISY if what in ("use", "churn") else COMPARED))
        steps.append(Step(what, first, int(random.integers(1, 4)), number + 1))
    return steps


class Storm:
    """One storm on a stage."""

    def __init__(
        self, stage: Stage, process: Process, other: IntervalMirror, compared: AddressRange, noisy: AddressRange
    ) -> None:
        self._stage = stage
        self._other = other
        self._process = process
        self._compared = compared
        self._noisy = noisy
        self._content: list[bytes | None] = [stamp(index) for index in range(COMPARED)]  # None: not mapped
        self._writable = [True] * COMPARED
        self._under_way: set[asyncio.Task[None]] = set()

    @classmethod
    @asynccontextmanager
    async def gathered(cls, stage: Stage) -> AsyncIterator[Storm]:
        """With a process, its memory, and another device that mirrors it."""
        process = await stage.process()
        async with other_device(stage, process) as other:
            compared = await stage.region(process, COMPARED)
            yield cls(stage, process, other, compared, await stage.region(process, NOISY))

    async def rage(self, steps: Sequence[Step]) -> None:
        """Take all steps."""
        for step in steps:
            act: Callable[[Step], Awaitable[None]] = getattr(self, f"_{step.what.replace(' ', '_').lower()}")
            await act(step)
        await asyncio.gather(*self._under_way)

    def _range(self, step: Step) -> range:
        return range(step.page, min(COMPARED, step.page + step.pages))

    async def _device_reads(self, step: Step) -> None:
        content, address = self._content[step.page], page(self._compared, step.page)
        if content is None:
            await self._stage.device_cannot(self._process, address)
        else:
            await self._stage.device_reads(self._process, address, content)

    async def _device_writes(self, step: Step) -> None:
        address = page(self._compared, step.page)
        if self._content[step.page] is None or not self._writable[step.page]:
            await self._stage.device_cannot(self._process, address, write=True)
        else:
            self._content[step.page] = stamp(step.number)
            await self._stage.device_writes(self._process, address, stamp(step.number))

    async def _cpu_writes(self, step: Step) -> None:
        if self._content[step.page] is not None and self._writable[step.page]:
            self._content[step.page] = stamp(step.number)
            await self._process.write(page(self._compared, step.page), stamp(step.number))

    async def _munmap(self, step: Step) -> None:
        for index in self._range(step):
            self._content[index] = None
        await self._process.munmap(page(self._compared, step.page), len(self._range(step)) * PAGE_SIZE)

    async def _mmap(self, step: Step) -> None:
        for index in self._range(step):
            self._content[index], self._writable[index] = bytes(8), True
        length = len(self._range(step)) * PAGE_SIZE
        await self._process.mmap(length, RW, FIXED, address=page(self._compared, step.page))

    async def _discard(self, step: Step) -> None:
        if self._content[step.page] is not None:
            self._content[step.page] = bytes(8)
            await self._process.madvise(page(self._compared, step.page), PAGE_SIZE, Advice.DONTNEED)

    async def _protect(self, step: Step, prot: Prot = Prot.READ) -> None:
        for index in self._range(step):
            if self._content[index] is not None:
                self._writable[index] = Prot.WRITE in prot
                await self._process.mprotect(page(self._compared, index), PAGE_SIZE, prot)

    async def _unprotect(self, step: Step) -> None:
        await self._protect(step, RW)

    async def _fork(self, step: Step) -> None:
        child = await self._process.fork()
        before = self._content[step.page]
        await self._device_writes(step)
        if before is not None:
            await self._stage.cpu_reads(child, page(self._compared, step.page), before)
        await child.exit()

    async def _move(self, step: Step) -> None:
        content = self._content[step.page]
        if content is None:
            return
        here, there = page(self._compared, step.page), self._noisy.start - (1 << 20)
        flags = MremapFlag.MAYMOVE | MremapFlag.FIXED
        await self._process.mremap(here, PAGE_SIZE, PAGE_SIZE, flags, new_address=there)
        await self._stage.device_reads(self._process, there, content)
        await self._stage.device_cannot(self._process, here)
        await self._process.mremap(there, PAGE_SIZE, PAGE_SIZE, flags, new_address=here)

    async def _send_away(self, step: Step) -> None:
        with suppress(HmmError):  # nothing is mapped there, or more than one mapping
            await self._other.migrate_to_device(self._part(step))

    async def _exclude(self, step: Step) -> None:
        await exclude_some(self._other, self._part(step))

    async def _page_out(self, step: Step) -> None:
        if self._content[step.page] is not None:
            await self._process.madvise(page(self._compared, step.page), PAGE_SIZE, Advice.PAGEOUT)

    async def _watch(self, step: Step) -> None:  # noqa: ARG002 - it concerns the whole process
        await self._process.clear_refs(ClearRefs.SOFT_DIRTY)

    def _part(self, step: Step) -> AddressRange:
        indices = self._range(step)
        return AddressRange(page(self._compared, indices.start), page(self._compared, indices.stop))

    async def _use(self, step: Step) -> None:
        for index in range(step.page, min(NOISY, step.page + step.pages)):
            access = self._stage.device_may(self._process, page(self._noisy, index), write=bool(step.number % 2))
            self._under_way.add(asyncio.create_task(access))
        for ended in [access for access in self._under_way if access.done()]:
            self._under_way.remove(ended)
            ended.result()

    async def _churn(self, step: Step) -> None:
        address = page(self._noisy, step.page)
        match step.number % 6:
            case 0:
                await self._process.madvise(address, PAGE_SIZE, Advice.DONTNEED)
            case 1:
                await self._process.mprotect(address, PAGE_SIZE, Prot.READ)
                await self._process.mprotect(address, PAGE_SIZE, RW)
            case 2:
                await self._process.munmap(address, PAGE_SIZE)
                await self._process.mmap(PAGE_SIZE, RW, FIXED, address=address)
            case 3:
                await exclude_some(self._other, AddressRange(address, address + PAGE_SIZE))
            case 4:
                await self._other.migrate_to_device(AddressRange(address, address + PAGE_SIZE))
            case _:
                await (await self._process.fork()).exit()


async def shortest(
    steps: Sequence[Step],
    run: Callable[[Sequence[Step]], Awaitable[tuple[Finding, ...]]],
    rule: str,
    trials: int = TRIALS,
) -> list[Step]:
    """The fewest steps found that still break a rule: halves and pieces are left out as long as it does.

    Args:
        run: takes steps and says what was wrong.
        trials: how many shorter storms are tried at most.
    """
    kept, size, left = list(steps), max(1, len(steps) // 2), trials
    while size and left:
        start, shrunk = 0, False
        while start < len(kept) and left:
            shorter = kept[:start] + kept[start + size :]
            left -= 1
            if shorter and any(finding.rule == rule for finding in await run(shorter)):
                kept, shrunk = shorter, True
            else:
                start += size
        if not shrunk or size > len(kept):
            size //= 2
    return kept
