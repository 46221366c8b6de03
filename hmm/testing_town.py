"""Where random calls take place: a window of few pages in a few processes, so that everything overlaps.

**Source**: our own.

**Absent**: which calls are made (testing_calls.py and those above it); what has to hold (testing.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from hmm import commands_device, commands_process
from hmm.address_space import AddressSpace, Thp
from hmm.interval_notifier import IntervalMirror
from hmm.machine import Machine
from hmm.mirror import DeadlinePolicy, MirrorState
from hmm.scheduler import Call, Choose
from hmm.units import PAGE_SHIFT, PAGE_SIZE, PMD_MASK, PMD_PAGES, AddressRange, MirrorId
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot

__all__ = ["NEAR", "Maker", "Makers", "Town", "choices", "register_mirror"]

_WORD = (1 << 64) - 1


def choices(seed: int) -> Choose:
    """The choices of a seed: numbers from a generator of our own (splitmix64), the same everywhere and always."""
    state = seed & _WORD

    def choose(n: int) -> int:
        nonlocal state
        state = (state + 0x9E3779B97F4A7C15) & _WORD
        mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _WORD
        return (mixed ^ (mixed >> 31)) % n

    return choose


NEAR = 6
"""How far from the edge of a block most calls go, in pages, where pages are huge."""

Maker: TypeAlias = "Callable[[Town], Call | None]"
Makers: TypeAlias = "tuple[tuple[Maker, int], ...]"
"""What makes random calls, and how often each does."""


@dataclass(frozen=True, slots=True)
class Town:
    """Where a random workload takes place: a window of few pages, so that everything overlaps.

    Attributes:
        processes, devices: as many are kept alive at the most.
        pages: of the window, at `start` of every process.
        thp: where first touches bring in huge pages; then calls are about whole blocks, or pages near the edges of one.
        makers: what makes calls.
        first: what makes calls before all others.
        held: what devices of today may use: mirror -> page address -> (frame, may write).
        former: what they gave up lately.
    """

    machine: Machine
    choose: Choose
    processes: int = 3
    devices: int = 2
    pages: int = 24
    start: int = 0x1000_0000
    makers: Makers = ()
    first: tuple[Maker, ...] = ()
    thp: Thp = Thp.NEVER
    held: Mapping[MirrorId, Mapping[int, tuple[int, bool]]] = field(default_factory=dict)
    former: Mapping[MirrorId, Mapping[int, tuple[int, bool]]] = field(default_factory=dict)

    def calls(self, ncalls: int) -> Iterator[Call]:
        """`ncalls` calls, each made at the moment it is started, so that it fits the state of that moment."""
        yield from self._first_calls()
        makers = [maker for maker, weight in self.makers for _ in range(weight)]
        made = 0
        while made < ncalls:
            call = makers[self.choose(len(makers))](self)
            if call is not None:
                made += 1
                yield call

    def _first_calls(self) -> Iterator[Call]:
        # Somebody to talk to: without it most of a short run would be calls that find nothing.
        yield Call(commands_process.create_process, ("simulated",), {"thp": self.thp})
        (process,) = self.machine.processes
        shared_pages = NEAR if self.thp else self.pages // 3
        for npages, kind in ((self.pages, MapFlag.PRIVATE), (shared_pages, MapFlag.SHARED)):
            flags = kind | MapFlag.FIXED | MapFlag.ANONYMOUS
            place = (process, self.start, npages * PAGE_SIZE)
            yield Call(commands_process.mmap, (*place, Prot.READ | Prot.WRITE, flags))
        for dma in (False, True):
            yield Call(commands_device.register_device, ("simulated",), {"dma": dma})
        for device in list(self.machine.devices):
            yield register_mirror(self, device, process)
        yield from filter(None, (maker(self) for maker in self.first))

    @property
    def tracked(self) -> tuple[int, ...]:
        """The pages of the window that calls are mostly about, by address."""
        near = NEAR if self.thp else PMD_PAGES
        pages = (page for page in range(self.pages) if min(page % PMD_PAGES, -page % PMD_PAGES) <= near)
        return tuple(self.start + page * PAGE_SIZE for page in pages)

    def span(self, most: int = 5) -> AddressRange:
        """One to `most` pages of the window, or whole blocks of it."""
        if not self.thp:
            first = self.choose(self.pages)
            npages = min(1 + self.choose(most), self.pages - first)
        elif self.choose(2):
            edge = self.choose(self.pages // PMD_PAGES + 1) * PMD_PAGES
            first = min(max(edge - NEAR + self.choose(2 * NEAR), 0), self.pages - 1)
            npages = min(1 + self.choose(most), self.pages - first)
        else:
            first = self.choose(self.pages // PMD_PAGES) * PMD_PAGES
            npages = min((1 + self.choose(2)) * PMD_PAGES, self.pages - first)
        start = self.start + first * PAGE_SIZE
        return AddressRange(start, start + npages * PAGE_SIZE)

    def pick(self, ids: Iterable[int]) -> int | None:
        """One of some identifiers; None when there is none."""
        known = list(ids)
        return known[self.choose(len(known))] if known else None

    def process(self) -> int | None:
        """A live process."""
        return self.pick(self.machine.processes)

    def mirror(self) -> int | None:
        """A mirror of 2015, mostly a live one."""
        mirrors = self.machine.mirrors
        live = [mirror.id for mirror in mirrors.values() if mirror.state is MirrorState.LIVE]
        return self.pick(live if live and self.choose(8) else mirrors)

    def interval_mirrors(self) -> list[MirrorId]:
        """The mirrors of today's drivers."""
        return [receiver.id for receiver in self.machine.receivers.values() if isinstance(receiver, IntervalMirror)]

    def mapped(self, space: AddressSpace, most: int = 5, *, private: bool = False) -> AddressRange:
        """Some pages of one VMA, mostly such as are there; once in a while anything."""
        vmas = [vma for vma in space.vmas if not private or (vma.backing is None and vma.readable)]
        if not vmas or not self.choose(8):
            return self.span(most)
        vma = vmas[self.choose(len(vmas))]
        touched = space.table.valid(vma.start, vma.end)[0].tolist()
        page = touched[self.choose(len(touched))] if touched and self.choose(4) else vma.start
        if self.thp and not self.choose(3):
            page = max(page & PMD_MASK, vma.start)
            most = PMD_PAGES
        first = (page - vma.start) >> PAGE_SHIFT
        npages = min(1 + self.choose(most) if most < PMD_PAGES else most, vma.npages - first)
        return AddressRange(page, page + npages * PAGE_SIZE)


def register_mirror(town: Town, device: int, process: int) -> Call:
    """A mirror with one of the policies."""
    policy = (DeadlinePolicy.FENCE, DeadlinePolicy.BLOCK, DeadlinePolicy.FAIL)[town.choose(3)]
    options = {"policy": policy, "update_on_fault": town.choose(2) == 0}
    return Call(commands_device.register_mirror, (device, process), options)
