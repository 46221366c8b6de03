"""A device that follows a program around: faults pages ahead of it and behind it, and checks everything it sees.

Whoever drives it says where the program is; the device faults pages there in, or pages where the program was before,
for reading or for writing, writes stamps of its own and reads them back, and compares with what a CPU sees.  Whatever
the contract forbids is a violation: an access refused that no event had taken back, a stamp that is gone, a device and
a CPU that see different bytes.  If it has memory, it moves private pages there and back at random, and does all this
wherever they are.

Serves JSON lines: attach, follow, idle, statistics.

**Source**: prefetching of GPU drivers (nouveau_svm.c, the batches of uvm_gpu_replayable_faults.c).

**Invariants**: the same seed, program and interleaving give the same faults; an event is answered when no access
through what it took is under way.

**Absent**: choosing what is worth moving.
"""

from __future__ import annotations

import asyncio
import errno as errnos
import logging
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hmm import pte
from hmm.errors import DeviceLostError, HmmError, NoSuchObjectError, errno_name
from hmm.units import PAGE_SHIFT, PAGE_SIZE, AddressRange, Entries, ProcessId
from hmm_client import calls
from hmm_client.channel import UnavailableError
from hmm_client.client import Client
from hmm_client.device import Device
from hmm_client.device_memory import MemoryDriver
from hmm_client.drivers.accesses import Accesses
from hmm_client.drivers.control import Operation, decode, driver_command, encode
from hmm_client.drivers.releases import Releases
from hmm_client.event import Event
from hmm_client.mirror import MIGRATE_PAGES_MAX, Faulted, Mirror, Segment
from hmm_client.process import Process
from hmm_client.results import Accessed

REMEMBERED_RANGES = 256
"""How many places of a program the device can go back to."""
WAITING_PLACES = 1024
"""How far the device may fall behind its program; places beyond are skipped and counted."""
LATENCIES = 1 << 16
STAMP_BYTES = 8
TO_DEVICE_RATIO = 0.7
"""Of moves; the others are back."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What the device does at each place of the program.

    Attributes:
        seed: of everything it draws.
        pages: at most so many in one fault.
        write_ratio: of faults that are for writing.
        behind_ratio: of faults at a place where the program was before.
        slot: which 8 bytes of a page are this device's own; another one for each device of a process.
        checked_pages: so many are compared with what a CPU sees.
        memory_pages: of the device's own; 0 for none.
        driver_copies: whether this driver has the bytes of that memory, or the daemon.
        migrate_ratio: of places where pages are moved, most of them to the device.
    """

    seed: int = 0
    pages: int = 16
    write_ratio: float = 0.5
    behind_ratio: float = 0.5
    slot: int = 0
    checked_pages: int = 2
    memory_pages: int = 0
    driver_copies: bool = False
    migrate_ratio: float = 0.5


@dataclass(slots=True)
class Statistics:
    """What the device has done and seen.

    Attributes:
        faults, pages: calls, and the pages that came in.
        refused: pages that could not be faulted, and why: unmapped or protected memory is no violation.
        bytes_read, bytes_written: by the device.
        checks: pages compared with what a CPU sees.
        migrated: pages that were moved to the device and by its request back.
        skipped: places of the program that the device was too slow for.
        events: by type.
        latencies_ns: from hearing of an event to having answered it, the last 65,536.
        violations: what the contract forbids, in words.
    """

    faults: int = 0
    pages: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    bytes_read: int = 0
    bytes_written: int = 0
    checks: int = 0
    migrated: int = 0
    skipped: int = 0
    events: Counter[str] = field(default_factory=Counter)
    latencies_ns: deque[int] = field(default_factory=lambda: deque(maxlen=LATENCIES))
    violations: list[str] = field(default_factory=list)

    def latency_us(self, percentile: float) -> float:
        """Microseconds within which so many percent of the events were answered; 0 when there were none."""
        return float(np.percentile(self.latencies_ns, percentile)) / 1000 if self.latencies_ns else 0.0


@dataclass(slots=True)
class _Program:
    """One process that the device follows."""

    mirror: Mirror
    accesses: Accesses = field(default_factory=Accesses)
    places: deque[AddressRange] = field(default_factory=lambda: deque(maxlen=REMEMBERED_RANGES))


class PrefetchDevice(MemoryDriver):
    """The device and its driver.  Made by `register`."""

    def __init__(self, client: Client, device: Device, behaviour: Behaviour) -> None:
        super().__init__(behaviour.memory_pages)
        self.statistics = Statistics()
        self._client = client
        self._device = device
        self._behaviour = behaviour
        self._random = np.random.default_rng(behaviour.seed)
        self._programs: dict[ProcessId, _Program] = {}
        self._by_mirror: dict[int, _Program] = {}
        self._waiting: asyncio.Queue[tuple[_Program, AddressRange]] = asyncio.Queue(WAITING_PLACES)
        self._releases = Releases()
        self._stamp = 0
        self._engine = asyncio.create_task(self._run())
        self._engine.add_done_callback(_tell)

    @classmethod
    async def register(cls, client: Client, name: str, behaviour: Behaviour | None = None) -> PrefetchDevice:
        """Register the device and start it."""
        chosen = behaviour or Behaviour()
        device = await client.register_device(
            name, memory_pages=chosen.memory_pages, driver_copies=chosen.driver_copies
        )
        return cls(client, device, chosen)

    @property
    def mirrors(self) -> list[Mirror]:
        """Those of programs that have not ended."""
        mirrors = [program.mirror for program in self._by_mirror.values()]
        return [mirror for mirror in mirrors if not mirror.released and not mirror.lost]

    # ---- what the daemon calls

    async def update(self, event: Event) -> None:
        """Change the table, then wait for the accesses that began before."""
        began = time.perf_counter_ns()
        self.table(event.mirror).apply(event)
        if not event.is_fault:
            await self._program(event.mirror).accesses.ended(event)
        self.statistics.events[event.type.name] += 1
        self.statistics.latencies_ns.append(time.perf_counter_ns() - began)

    async def release(self, mirror: Mirror) -> None:
        """The program has ended."""
        super().release(mirror)
        await self._program(mirror).accesses.all_ended()
        self.statistics.events["RELEASE"] += 1
        self._releases.note(mirror)

    def lost(self, mirror: Mirror, why: str) -> None:
        """The daemon has given the mirror up: a device that always answers must not be lost."""
        super().lost(mirror, why)
        self.statistics.violations.append(f"{mirror} was lost: {why}")

    # ---- what the program's side calls

    async def attach(self, process: Process) -> None:
        """Follow a process from now on.

        Raises:
            ConflictError: it is followed already (EINVAL).
            NoSuchObjectError: there is no such process (ESRCH).
        """
        mirror = await self._device.mirror(process, self)
        self._programs[process.id] = self._program(mirror)

    def follow(self, process_id: ProcessId, span: AddressRange) -> None:
        """The program is here now."""
        program = self._programs.get(process_id)
        if program is None or program.mirror.released or not span:
            return
        try:
            self._waiting.put_nowait((program, span))
        except asyncio.QueueFull:
            self.statistics.skipped += 1

    async def idle(self) -> None:
        """Wait until the device has caught up.

        Raises: whatever ended the device: UnavailableError when the daemon has gone, anything else if it has a bug.
        """
        caught_up = asyncio.create_task(self._waiting.join())
        await asyncio.wait({caught_up, self._engine}, return_when=asyncio.FIRST_COMPLETED)
        caught_up.cancel()
        if self._engine.done():
            self._engine.result()

    async def stop(self) -> None:
        """Stop faulting.  Mirrors of processes that live stay registered, and events are answered."""
        self._engine.cancel()
        await asyncio.wait({self._engine})
        await self._unregister_released()

    async def access(self, process_id: ProcessId, address: int, length: int, data: bytes | None = None) -> bytes:
        """Read, or write `data`, at once: for whoever does not want to wait for the device to come by.

        Raises:
            NoSuchObjectError: the process is not followed, or has ended (ESRCH).
            BadAddressError, AccessDeniedError: the memory there does not permit it (EFAULT, EACCES).
        """
        program = self._programs.get(process_id)
        if program is None or program.mirror.released:
            raise NoSuchObjectError(f"process {process_id} is not followed")
        table = self.table(program.mirror)
        while (missing := table.missing(address, length, write=data is not None)).size:
            await program.mirror.fault(missing, write=data is not None)
        span = AddressRange(address, address + length).page_aligned()
        entries = table.pages.read(span.start, span.end)
        with program.accesses.to(address, length):
            if data is None:
                return await program.mirror.read([(address, length)], entries=entries)
            await program.mirror.write([(address, length)], data, entries=entries)
            return b""

    async def detach(self, process_id: ProcessId) -> None:
        """Follow a process no more."""
        await self.idle()
        await self._unregister_released()
        program = self._programs.get(process_id)
        if program is not None:
            await self._leave(program.mirror)

    # ---- the engine: one thing at a time, so that nothing but its own program changes what it sees

    async def _run(self) -> None:
        while True:
            program, span = await self._waiting.get()
            try:
                if not program.mirror.released:
                    await self._visit(program, span)
            except (NoSuchObjectError, DeviceLostError) as error:
                _LOG.debug("%r has gone: %s", program.mirror, error)
            finally:
                await self._unregister_released()
                self._waiting.task_done()

    async def _unregister_released(self) -> None:
        while (mirror := self._releases.take()) is not None:
            await self._leave(mirror)

    async def _leave(self, mirror: Mirror) -> None:
        self._programs.pop(mirror.process.id, None)
        await self._releases.unregister(mirror)
        self._by_mirror.pop(mirror.id, None)

    async def _visit(self, program: _Program, span: AddressRange) -> None:
        pages = self._choose(program, span)
        if span not in program.places:
            program.places.append(span)
        write = bool(self._random.random() < self._behaviour.write_ratio)
        faulted = await self._fault(program, pages, write=write)
        if faulted is None:
            return
        reached = self._usable(program, pages, write=write)
        self.statistics.pages += reached.size
        if not reached.size:
            return
        if write:
            await self._stamp_pages(program, reached)
        chosen = reached[: self._behaviour.checked_pages]
        if chosen.size:
            await self._compare(program, chosen, faulted)
        if self._behaviour.memory_pages and self._random.random() < self._behaviour.migrate_ratio:
            await self._move(program, reached)

    async def _move(self, program: _Program, pages: Entries) -> None:
        """Move the range of some pages to the device, or back; memory of files stays where it is."""
        first = int(pages[0])
        span = AddressRange(first, min(int(pages[-1]) + PAGE_SIZE, first + MIGRATE_PAGES_MAX * PAGE_SIZE))
        move = program.mirror.migrate if self._random.random() < TO_DEVICE_RATIO else program.mirror.migrate_back
        try:
            moved = await move(span, partial=True)
        except (NoSuchObjectError, DeviceLostError):
            raise
        except HmmError as error:
            self.statistics.refused[errno_name(error.errno)] += pages.size
        else:
            self.statistics.migrated += moved.npages

    def _choose(self, program: _Program, span: AddressRange) -> Entries:
        """uint64[n]: the next pages of `span`, or pages anywhere in a place where the program was before."""
        behind = program.places and self._random.random() < self._behaviour.behind_ratio
        if behind:
            span = program.places[int(self._random.integers(len(program.places)))]
            numbers = np.unique(self._random.integers(0, span.npages, self._behaviour.pages))
        else:
            numbers = np.arange(min(span.npages, self._behaviour.pages))
        first = span.page_aligned().start
        pages: Entries = np.uint64(first) + (numbers.astype(np.uint64) << np.uint64(PAGE_SHIFT))
        return pages

    async def _fault(self, program: _Program, pages: Entries, *, write: bool) -> Faulted | None:
        self.statistics.faults += 1
        try:
            faulted = await program.mirror.fault(pages, write=write, partial=True)
        except (NoSuchObjectError, DeviceLostError):
            raise
        except HmmError as error:
            self.statistics.refused[errno_name(error.errno)] += pages.size
            return None
        if faulted.error is not None:
            self.statistics.refused[errno_name(faulted.error.errno)] += int(np.count_nonzero(faulted.entries == 0))
        return faulted

    def _usable(self, program: _Program, pages: Entries, *, write: bool) -> Entries:
        entries = self.table(program.mirror).pages.lookup(pages)
        usable = (entries & np.uint64(pte.VALID)) != 0
        if write:
            usable &= pte.pte_test_write(entries)
        reached: Entries = pages[usable]
        return reached

    async def _stamp_pages(self, program: _Program, pages: Entries) -> None:
        """Write the same new stamp to all pages (two of them may be one frame) and read it back."""
        self._stamp += 1
        stamp = self._stamp.to_bytes(STAMP_BYTES, "little")
        segments = self._slots(pages)
        entries = self.table(program.mirror).pages.lookup(pages)
        with program.accesses.to(int(pages[0]), int(pages[-1] - pages[0]) + PAGE_SIZE):
            try:
                await self._scatter(program, segments, stamp * len(segments), entries)
                seen = await self._gather(program, segments, entries)
            except HmmError as error:
                self._refused(program, "write", error)
                return
        self.statistics.bytes_written += len(seen)
        self.statistics.bytes_read += len(seen)
        for page, got in zip(pages.tolist(), _cut(seen), strict=True):
            if got != stamp:
                self._violation(program, f"wrote {stamp.hex()} at {page:#x} and read back {got.hex()}")

    async def _compare(self, program: _Program, pages: Entries, faulted: Faulted) -> None:
        """A CPU and the device must see the same, unless something changed while we looked."""
        before = await self._look(program, pages)
        if before is None:
            return
        process_id = program.mirror.process.id
        outcomes = await self._client.execute(
            [calls.read_memory(process_id, address, length) for address, length in self._slots(pages)]
        )
        after = await self._look(program, pages)
        if after is None or program.mirror.is_stale(faulted):
            return
        for page, first, outcome, last in zip(pages.tolist(), before, outcomes, after, strict=True):
            cpu = outcome.value
            if first == last and isinstance(cpu, Accessed) and cpu.signal is None:
                self.statistics.checks += 1
                if cpu.data != first:
                    self._violation(program, f"at {page:#x} a CPU reads {cpu.data.hex()}, the device {first.hex()}")

    async def _look(self, program: _Program, pages: Entries) -> list[bytes] | None:
        """Read this device's slot of each page; None if not all of them can be read any more."""
        if self._usable(program, pages, write=False).size < pages.size:
            return None
        entries = self.table(program.mirror).pages.lookup(pages)
        with program.accesses.to(int(pages[0]), int(pages[-1] - pages[0]) + PAGE_SIZE):
            try:
                data = await self._gather(program, self._slots(pages), entries)
            except HmmError as error:
                self._refused(program, "read", error)
                return None
        self.statistics.bytes_read += len(data)
        return _cut(data)

    # ---- memory, wherever it is: segments of STAMP_BYTES, each in the page that the entry beside it names

    async def _gather(self, program: _Program, segments: list[Segment], entries: Entries) -> bytes:
        own = self._own(entries)
        if not own.any():
            return await program.mirror.read(segments, entries=entries)
        seen = np.empty((entries.size, STAMP_BYTES), np.uint8)
        theirs = _chosen(segments, ~own)
        if theirs:
            data = await program.mirror.read(theirs, entries=entries[~own])
            seen[~own] = np.frombuffer(data, np.uint8).reshape(-1, STAMP_BYTES)
        offset = self._behaviour.slot * STAMP_BYTES
        seen[own] = self.memory.read(entries[own])[:, offset : offset + STAMP_BYTES]
        return seen.tobytes()

    async def _scatter(self, program: _Program, segments: list[Segment], data: bytes, entries: Entries) -> None:
        own = self._own(entries)
        if not own.any():
            await program.mirror.write(segments, data, entries=entries)
            return
        stamps = np.frombuffer(data, np.uint8).reshape(-1, STAMP_BYTES)
        theirs = _chosen(segments, ~own)
        if theirs:
            await program.mirror.write(theirs, stamps[~own].tobytes(), entries=entries[~own])
        self.memory.write_slots(entries[own], self._behaviour.slot * STAMP_BYTES, stamps[own])

    def _own(self, entries: Entries) -> npt.NDArray[np.bool_]:
        # What is in this driver's own memory; the daemon reaches everything else.
        return pte.pte_test_valid_dev(entries) & self._behaviour.driver_copies

    # ---- bookkeeping

    def _slots(self, pages: Entries) -> list[Segment]:
        return [(page + self._behaviour.slot * STAMP_BYTES, STAMP_BYTES) for page in pages.tolist()]

    def _refused(self, program: _Program, access: str, error: HmmError) -> None:
        if isinstance(error, NoSuchObjectError | DeviceLostError):
            raise error
        if error.errno in (errnos.EFAULT, errnos.EACCES):
            self._violation(program, f"{access} through an entry that no event took back: {error}")
        else:
            raise error

    def _violation(self, program: _Program, what: str) -> None:
        self.statistics.violations.append(f"{program.mirror}: {what}")
        _LOG.error("%r: %s", program.mirror, what)

    def _program(self, mirror: Mirror) -> _Program:
        # Asked for by the first event too, which may come before `attach` has its mirror.
        return self._by_mirror.setdefault(mirror.id, _Program(mirror))


def _tell(engine: asyncio.Task[None]) -> None:
    """Say why the engine has ended, should nobody ask; that the daemon has gone is for its session to say."""
    error = None if engine.cancelled() else engine.exception()
    if error is not None and not isinstance(error, UnavailableError):
        _LOG.error("the device has ended", exc_info=error)


def _chosen(segments: list[Segment], which: npt.NDArray[np.bool_]) -> list[Segment]:
    return [segment for segment, wanted in zip(segments, which.tolist(), strict=True) if wanted]


def _cut(data: bytes) -> list[bytes]:
    return [data[start : start + STAMP_BYTES] for start in range(0, len(data), STAMP_BYTES)]


class PrefetchOperations:
    """The device as another process drives it."""

    def __init__(self, client: Client, device: PrefetchDevice) -> None:
        self._client = client
        self._device = device

    async def attach(self, process: int) -> None:
        """Follow the process of this id."""
        await self._device.attach(self._client.process(process))

    async def follow(self, process: int, start: int, end: int) -> None:
        """The program is here now."""
        self._device.follow(process, AddressRange(start, end))

    async def idle(self) -> None:
        """Wait until the device has caught up."""
        await self._device.idle()

    async def statistics(self) -> dict[str, object]:
        """What the device has done and seen."""
        done = self._device.statistics
        return {
            "faults": done.faults,
            "pages": done.pages,
            "refused": done.refused,
            "bytes_read": done.bytes_read,
            "bytes_written": done.bytes_written,
            "checks": done.checks,
            "skipped": done.skipped,
            "events": done.events,
            "acknowledgement_p50_us": done.latency_us(50),
            "acknowledgement_p99_us": done.latency_us(99),
            "violations": done.violations,
        }


async def operations(client: Client) -> Mapping[str, Operation]:
    """Register a device; what may be asked of it, by name."""
    served = PrefetchOperations(client, await PrefetchDevice.register(client, "prefetch0"))
    return {
        "attach": served.attach,
        "follow": served.follow,
        "idle": served.idle,
        "statistics": served.statistics,
    }


class CertifiedPrefetch:
    """The device as `hmm_client.certify` drives it: it follows every access, and reads there as it likes."""

    def __init__(self, client: Client, device: PrefetchDevice) -> None:
        self._client = client
        self._device = device

    async def mirror(self, process: int) -> None:
        """Follow the process of this id."""
        await self._device.attach(self._client.process(process))

    async def unmirror(self, process: int) -> None:
        """Follow it no more."""
        await self._device.detach(process)

    async def read(self, process: int, address: int, length: int) -> dict[str, str]:
        """Read now."""
        self._device.follow(process, AddressRange(address, address + length).page_aligned())
        return {"data": encode(await self._device.access(process, address, length))}

    async def write(self, process: int, address: int, data: str) -> None:
        """Write now."""
        content = decode(data)
        self._device.follow(process, AddressRange(address, address + len(content)).page_aligned())
        await self._device.access(process, address, len(content), content)


async def certified(client: Client) -> Mapping[str, Operation]:
    """Register a device that stamps nothing; what `hmm_client.certify` asks of it."""
    device = await PrefetchDevice.register(client, "prefetch0", Behaviour(write_ratio=0))
    served = CertifiedPrefetch(client, device)
    return {"mirror": served.mirror, "unmirror": served.unmirror, "read": served.read, "write": served.write}


main = driver_command("prefetch", operations, certified)

if __name__ == "__main__":
    main()
