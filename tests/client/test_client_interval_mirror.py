"""Today's interface against a real daemon: subscriptions, range faults, migration, exclusive access, pins."""

from __future__ import annotations

import asyncio
import errno as errnos
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import hmm_client
from hmm import pagemap
from hmm.errors import (
    AccessDeniedError,
    BadAddressError,
    DeviceLostError,
    InvalidRequestError,
    NoSuchObjectError,
    OutOfFramesError,
    RangeBusyError,
    SegmentationFault,
    TimedOutError,
    WouldDeadlockError,
)
from hmm.events import Reason
from hmm.migration import MIGRATE
from hmm.range_fault import DMA_MAPPED, ERROR, REQ_FAULT, REQ_WRITE, VALID, WRITE, word_pfns
from hmm.units import PAGE_SHIFT, PAGE_SIZE, AddressRange, Entries
from hmm.violation import ViolationKind
from hmm_client import Device, Event, IntervalDriver, IntervalMirror, IntervalNotifier, Process, Prot, interval_mirror
from hmm_client.harness import Harness, HoldPoint
from hmm_client.results import Mapped
from hmm_proto.v1 import inspection_pb2

if TYPE_CHECKING:
    from tests.conftest import Daemon

BOTH = REQ_FAULT | REQ_WRITE
FLAGS = np.uint64(VALID | WRITE | ERROR)


class Witness(IntervalDriver):
    """A driver that remembers what it was told, and can be made to wait."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.heard = asyncio.Event()
        self.losses: list[str] = []
        self.inside: Any = None

    async def invalidate(self, event: Event) -> None:
        """Remember, do what the test wants done inside, and wait until the test lets go."""
        self.events.append(event)
        self.heard.set()
        if self.inside is not None:
            await self.inside(event)
        await self.gate.wait()

    def lost(self, mirror: IntervalMirror, why: str) -> None:
        """Remember."""
        self.losses.append(why)

    @property
    def reasons(self) -> list[Reason | None]:
        """Of all events."""
        return [event.reason for event in self.events]


class Bench:
    """A process with 16 private pages, a device with 32 pages of memory, and a mirror that subscribes to everything."""

    client: hmm_client.Client
    process: Process
    mapped: Mapped
    device: Device
    driver: Witness
    mirror: IntervalMirror
    notifier: IntervalNotifier

    @classmethod
    async def make(cls, client: hmm_client.Client) -> Bench:
        """Make all of it."""
        bench = cls()
        bench.client = client
        bench.process = await client.create_process("bench")
        bench.mapped = await bench.process.mmap(16 * PAGE_SIZE)
        bench.device = await client.register_device("card", memory_pages=32)
        bench.driver = Witness()
        bench.mirror = await bench.device.attach(bench.process, bench.driver)
        bench.notifier = await bench.mirror.insert(0, bench.mirror.address_end, filtered=True)
        return bench

    def span(self, at: int, npages: int = 1) -> AddressRange:
        """Pages of the mapping."""
        start = self.mapped.address + at * PAGE_SIZE
        return AddressRange(start, start + npages * PAGE_SIZE)

    def addresses(self, at: int, npages: int = 1) -> Entries:
        """The same as an array."""
        return np.uint64(self.mapped.address) + (np.arange(at, at + npages, dtype=np.uint64) << np.uint64(PAGE_SHIFT))


@pytest.fixture
async def bench(client: hmm_client.Client) -> Bench:
    """A bench of its own for each test."""
    return await Bench.make(client)


async def pending(client: hmm_client.Client) -> inspection_pb2.GetPendingResponse:
    """GetPending."""
    response: inspection_pb2.GetPendingResponse = await client.channel.request(
        client.inspection.GetPending, inspection_pb2.GetPendingRequest()
    )
    return response


async def held(client: hmm_client.Client) -> list[inspection_pb2.Holding]:
    """What GetPending says is held."""
    return list((await pending(client)).holdings)


async def test_events_say_why_where_and_whose(bench: Bench) -> None:
    """Reason, owner, initiator, spans, whether they may block; a driver knows its own migration by the initiator."""
    await bench.process.write(bench.mapped.address, b"x")
    await bench.mirror.migrate_to_device(bench.span(0, 2))
    await bench.process.mprotect(bench.mapped.address, PAGE_SIZE, Prot.READ)
    await bench.process.munmap(bench.mapped.address, 2 * PAGE_SIZE)
    migrate, hole, protect, unmap = bench.driver.events
    assert bench.driver.reasons == [Reason.MIGRATE, Reason.MIGRATE, Reason.PROTECTION_VMA, Reason.UNMAP]
    assert (migrate.owner, migrate.initiator) == (bench.device.id, bench.mirror.id)
    assert migrate.mirror is bench.mirror
    assert (migrate.spans, hole.spans) == ((bench.span(0, 2),), (bench.span(1),))
    assert (protect.owner, protect.initiator, protect.spans) == (0, 0, (bench.span(0),))
    assert unmap.spans == (bench.span(0, 2),)
    assert all(event.blockable for event in bench.driver.events)


async def test_driver_hears_nothing_when_it_has_not_subscribed(bench: Bench) -> None:
    """Only changes that overlap a subscription; a removed one does not count."""
    await bench.notifier.remove()
    one = await bench.mirror.insert(bench.span(4).start, 1)
    await bench.process.mprotect(bench.mapped.address, 2 * PAGE_SIZE, Prot.NONE)
    assert bench.driver.events == []
    await bench.process.munmap(bench.mapped.address, 8 * PAGE_SIZE)
    assert bench.driver.reasons == [Reason.UNMAP]
    await one.remove()
    with pytest.raises(NoSuchObjectError) as gone:
        await one.read_begin()
    assert gone.value.errno == errnos.ENOENT


async def test_insert_fails_as_the_kernels_does(bench: Bench) -> None:
    """No length or an end beyond all addresses is EOVERFLOW, a dead process EINVAL."""
    for start, length in ((0, 0), ((1 << 64) - PAGE_SIZE, 2 * PAGE_SIZE)):
        with pytest.raises(InvalidRequestError) as overflow:
            await bench.mirror.insert(start, length)
        assert overflow.value.errno == errnos.EOVERFLOW
    await bench.process.exit()
    with pytest.raises(InvalidRequestError) as dead:
        await bench.mirror.insert(0, PAGE_SIZE)
    assert dead.value.errno == errnos.EINVAL


async def test_read_section_has_to_be_repeated_when_the_range_changed(bench: Bench) -> None:
    """The raw pair: a fault with an old sequence is EBUSY, read_retry says so as well."""
    sequence = await bench.notifier.read_begin()
    assert not await bench.notifier.read_retry(sequence)
    faulted = await bench.notifier.range_fault(bench.span(0, 2), sequence, REQ_FAULT)
    assert (faulted.words & FLAGS).tolist() == [VALID, VALID]
    await bench.process.mprotect(bench.mapped.address, PAGE_SIZE, Prot.READ)
    assert await bench.notifier.read_retry(sequence)
    assert bench.notifier.is_stale(bench.span(0), faulted)
    assert not bench.notifier.is_stale(bench.span(1), faulted)
    with pytest.raises(RangeBusyError):
        await bench.notifier.range_fault(bench.span(0, 2), sequence, REQ_FAULT)


async def test_read_begin_waits_while_the_range_is_being_invalidated(bench: Bench) -> None:
    """mmu_interval_read_begin() blocks until the callback has returned and the change was made."""
    bench.driver.gate.clear()
    unmapping = asyncio.create_task(bench.process.munmap(bench.mapped.address, PAGE_SIZE))
    await bench.driver.heard.wait()
    beginning = asyncio.create_task(bench.notifier.read_begin())
    while not any(operation.name == "read_begin" for operation in (await pending(bench.client)).operations):
        assert not beginning.done()
    bench.driver.gate.set()
    await unmapping
    assert not await bench.notifier.read_retry(await beginning)


async def test_requests_of_single_pages_count_where_the_mask_says_so(bench: Bench) -> None:
    """(words & mask) | default: one page is wanted, the others are only looked at."""
    words = np.zeros(600, np.uint64)
    words[0] = BOTH
    process = bench.process
    far = await process.mmap(600 * PAGE_SIZE)
    await process.write(far.span.end - PAGE_SIZE, b"x")  # what has no page table at all would be faulted together
    faulted = await bench.notifier.fault(far.span, 0, BOTH, words)
    assert int(faulted.words[0]) & FLAGS == VALID | WRITE
    assert not (faulted.words[512:] & FLAGS).all()  # the directory of the first page was faulted to its end at most
    ignored = await bench.notifier.fault(bench.span(0, 2), 0, 0, words[:2])
    assert ignored.words.tolist() == [0, 0]


async def test_one_call_retries_and_returns_what_it_includes(bench: Bench) -> None:
    """Its own copy-on-write disturbs it once; the events up to its number are included."""
    await bench.process.touch(bench.mapped.address, PAGE_SIZE, write=False)
    faulted = await bench.notifier.fault(bench.span(0, 4), BOTH)
    assert (faulted.words & FLAGS).tolist() == [VALID | WRITE] * 4
    assert faulted.retries == 1
    assert faulted.event_sequence == len(bench.driver.events) == 1
    assert not await bench.notifier.read_retry(faulted.notifier_seq)


async def test_failed_fault_returns_what_lies_below_when_that_is_wanted(bench: Bench) -> None:
    """Words below the failing address are outputs; alone the error is raised, with its address."""
    faulted = await bench.notifier.fault(bench.span(14, 4), REQ_FAULT, partial=True)
    assert (faulted.words & FLAGS).tolist() == [VALID, VALID, 0, 0]
    assert isinstance(faulted.error, BadAddressError)
    with pytest.raises(BadAddressError) as hole:
        await bench.notifier.fault(bench.span(14, 4), REQ_FAULT)
    assert hole.value.address == faulted.error.address == bench.mapped.span.end
    await bench.process.mprotect(bench.mapped.address, PAGE_SIZE, Prot.READ)
    with pytest.raises(AccessDeniedError) as read_only:
        await bench.notifier.fault(bench.span(0), BOTH)
    assert read_only.value.errno == errnos.EPERM


async def test_long_results_come_whole(bench: Bench) -> None:
    """262,144 pages are two parts; one more page is refused, as no message may be longer."""
    mapped = await bench.process.mmap((1 << 30) + PAGE_SIZE)
    last = AddressRange(mapped.address + (1 << 30) - PAGE_SIZE, mapped.address + (1 << 30))
    await bench.process.write(last.start, b"x")
    snapshot = await bench.notifier.fault(AddressRange(mapped.address, last.end))
    assert snapshot.words.size == 1 << 18
    assert np.flatnonzero(snapshot.words).tolist() == [(1 << 18) - 1]
    with pytest.raises(OutOfFramesError) as too_long:
        await bench.notifier.fault(mapped.span)
    assert too_long.value.errno == errnos.E2BIG


async def test_one_call_ends_at_its_deadline(bench: Bench) -> None:
    """EBUSY when the range stays busy; ETIMEDOUT when the fault itself waits for another driver."""
    await bench.process.write(bench.mapped.address, b"x")
    bench.driver.gate.clear()
    protecting = asyncio.create_task(bench.process.mprotect(bench.mapped.address, PAGE_SIZE, Prot.READ))
    await bench.driver.heard.wait()
    with pytest.raises(RangeBusyError):
        await bench.notifier.fault(bench.span(0), REQ_FAULT, deadline_s=0.02)
    bench.driver.gate.set()
    await protecting
    await bench.process.touch(bench.span(1).start, PAGE_SIZE, write=False)
    bench.driver.gate.clear()
    with pytest.raises(TimedOutError):
        await bench.notifier.fault(bench.span(1), BOTH, deadline_s=0.02)
    bench.driver.gate.set()


async def test_fault_from_inside_a_callback_fails_when_it_would_wait_for_it(bench: Bench) -> None:
    """EDEADLK at once on the range that is being invalidated; other ranges are legal."""
    ended: list[BaseException | None] = []
    other = await bench.process.mmap(PAGE_SIZE)

    async def inside(event: Event) -> None:
        for start in (event.spans[0].start, other.address):
            try:
                await bench.notifier.range_fault(
                    AddressRange(start, start + PAGE_SIZE), await bench.notifier.read_begin(), REQ_FAULT
                )
            except WouldDeadlockError as error:
                ended.append(error)
            else:
                ended.append(None)

    bench.driver.inside = inside
    await bench.process.munmap(bench.mapped.address, PAGE_SIZE)
    assert [type(one) for one in ended] == [WouldDeadlockError, WouldDeadlockError]  # read_begin waits for the whole
    with pytest.raises(WouldDeadlockError):
        await raised_inside(bench, bench.notifier.remove)
    with pytest.raises(WouldDeadlockError):
        await raised_inside(bench, bench.mirror.detach)


async def raised_inside(bench: Bench, call: Any) -> None:
    """Make a call inside a callback, and raise what it raised."""
    errors: list[BaseException] = []

    async def inside(_: Event) -> None:
        bench.driver.inside = None
        try:
            await call()
        except WouldDeadlockError as error:
            errors.append(error)

    bench.driver.inside = inside
    mapped = await bench.process.mmap(PAGE_SIZE)
    await bench.process.munmap(mapped.address, PAGE_SIZE)
    for error in errors:
        raise error


async def test_pages_migrate_and_come_back(bench: Bench) -> None:
    """Words say what moved and where to; the device works on its own memory; a touch of the CPU brings pages back."""
    await bench.process.write(bench.mapped.address, b"one" + bytes(PAGE_SIZE - 3) + b"two")
    moved = await bench.mirror.migrate_to_device(bench.span(0, 3))
    assert (moved.src & np.uint64(MIGRATE)).all()
    first, end = bench.device.frames
    pfns = (moved.dst >> np.uint64(6)).view(np.int64)
    assert ((pfns >= first) & (pfns < end)).all()
    data = await bench.mirror.read_frames(bench.addresses(0, 3), pfns)
    assert (data[:3], data[PAGE_SIZE : PAGE_SIZE + 3], data[-1]) == (b"one", b"two", 0)
    await bench.mirror.write_frames(bench.addresses(1), pfns[1:2], b"2" * PAGE_SIZE)
    assert await bench.process.read(bench.span(1).start, 2) == b"22"
    with pytest.raises(BadAddressError) as stale:
        await bench.mirror.read_frames(bench.addresses(0, 3), pfns)
    assert stale.value.address == bench.span(1).start
    back = await bench.mirror.migrate_to_system(bench.span(0, 3))
    assert (back.src & np.uint64(MIGRATE)).astype(bool).tolist() == [True, False, True]
    await bench.mirror.migrate_to_device(bench.span(0, 3))
    assert await bench.device.evict() == 3
    assert await bench.device.evict() == 0


async def test_only_pages_that_are_wanted_migrate(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver chooses page by page, as by leaving `dst` 0, also where a migration travels in parts; or is told why."""
    monkeypatch.setattr(interval_mirror, "MIGRATE_BYTES", 2 * PAGE_SIZE)
    await bench.process.write(bench.mapped.address, b"x" * 3 * PAGE_SIZE)
    wanted = np.array([True, False, True])
    moved = await bench.mirror.migrate_to_device(bench.span(0, 3), wanted=wanted)
    assert (moved.src & np.uint64(MIGRATE)).astype(bool).tolist() == wanted.tolist()
    back = await bench.mirror.migrate_to_system(bench.span(0, 3), wanted=~wanted)
    assert not (back.src & np.uint64(MIGRATE)).any()
    assert await bench.device.evict() == 2
    with pytest.raises(InvalidRequestError, match="2 pages are wanted or not, of the 3"):
        await bench.mirror.migrate_to_device(bench.span(0, 3), wanted=wanted[:2])


async def test_driver_is_told_when_the_cpu_wants_a_page_back(bench: Bench) -> None:
    """migrate_to_ram(): behind the MIGRATE that names the mirror, before the contents are copied."""
    told: list[Event] = []
    bench.driver.migrate_to_ram = told.append  # type: ignore[method-assign, assignment]
    await bench.mirror.migrate_to_device(bench.span(0))
    await bench.process.read(bench.mapped.address, 1)
    (event,) = told
    assert (event.spans, event.initiator, event.reason) == ((bench.span(0),), bench.mirror.id, None)


async def test_migrations_are_refused_when_there_is_nothing_to_migrate(bench: Bench) -> None:
    """EINVAL over the end of a mapping, ENODEV without memory, EINVAL of the kind MALFORMED for no range."""
    with pytest.raises(InvalidRequestError):
        await bench.mirror.migrate_to_device(bench.span(15, 2))
    with pytest.raises(InvalidRequestError):
        await bench.mirror.migrate_to_system(AddressRange(bench.mapped.address, bench.mapped.address))
    plain = await bench.client.register_device("plain")
    mirror = await plain.attach(bench.process, Witness())
    with pytest.raises(NoSuchObjectError) as memory:
        await mirror.migrate_to_device(bench.span(0))
    assert memory.value.errno == errnos.ENODEV
    with pytest.raises(NoSuchObjectError):
        await plain.evict()


async def test_large_accesses_travel_in_parts(bench: Bench) -> None:
    """600 pages are three messages each way."""
    mapped = await bench.process.mmap(600 * PAGE_SIZE)
    faulted = await bench.notifier.fault(mapped.span, BOTH)
    addresses = np.arange(mapped.address, mapped.span.end, PAGE_SIZE, dtype=np.uint64)
    pfns, data = word_pfns(faulted.words), np.random.default_rng(1).bytes(600 * PAGE_SIZE)
    await bench.mirror.write_frames(addresses, pfns, data)
    assert await bench.mirror.read_frames(addresses, pfns) == data
    assert await bench.process.read(mapped.address, len(data)) == data
    with pytest.raises(InvalidRequestError):
        await bench.mirror.write_frames(addresses, pfns, data[:-PAGE_SIZE])


async def test_accesses_reach_a_part_of_their_pages(bench: Bench) -> None:
    """From within the first page to within the last, in one message or several; the CPU's bytes around it stay."""
    mapped = await bench.process.mmap(300 * PAGE_SIZE)
    await bench.process.write(mapped.address, before := np.random.default_rng(2).bytes(300 * PAGE_SIZE))
    faulted = await bench.notifier.fault(mapped.span, BOTH)
    addresses = np.arange(mapped.address, mapped.span.end, PAGE_SIZE, dtype=np.uint64)
    pfns = word_pfns(faulted.words)
    for count in (1, 2, 300):
        end = count * PAGE_SIZE - 50
        await bench.mirror.write_frames(addresses[:count], pfns[:count], written := bytes(end - 100), offset=100)
        seen = await bench.process.read(mapped.address, end + 50)
        assert seen == before[:100] + written + before[end : end + 50]
        part = await bench.mirror.read_frames(addresses[:count], pfns[:count], offset=90, length=end - 80)
        assert part == seen[90 : end + 10]
    for offset, length in ((PAGE_SIZE, 10), (4000, 96), (0, PAGE_SIZE), (-1, PAGE_SIZE + 10), (0, 2 * PAGE_SIZE + 1)):
        with pytest.raises(InvalidRequestError):
            await bench.mirror.read_frames(addresses[:2], pfns[:2], offset=offset, length=length)


async def test_exclusive_pages_go_back_when_their_driver_is_gone(bench: Bench, daemon: Daemon) -> None:
    """They are listed while they are held; the end of the stream gives them back without a touch."""
    async with hmm_client.connect(daemon.target, name="keeper") as keeper:
        other = await Bench.make(keeper)
        pfns = await other.mirror.make_exclusive(other.span(0, 4))
        assert pfns.size == 4
        assert (await other.notifier.fault(other.span(0, 4))).words.tolist() == [0] * 4
        await other.process.read(other.span(1).start, 1)
        pin = await other.process.pin(other.span(8, 2), write=True)
        async with hmm_client.connect(daemon.target, name="looker") as looker:
            exclusive, pinned = await held(looker)
            assert (exclusive.mirror_id, exclusive.page_count) == (other.mirror.id, 3)
            assert list(exclusive.ranges.starts) == [other.span(0).start, other.span(2).start]
            assert (exclusive.driver_name, pinned.driver_name) == ("keeper", "keeper")
            assert (pinned.pin_id, pinned.page_count) == (pin.id, 2)
    async with hmm_client.connect(daemon.target) as looker:
        assert await held(looker) == []
        process = looker.process(other.process.id)
        words = await process.pagemap(other.span(0, 4))
        assert (words >> np.uint64(63)).tolist() == [1] * 4


async def test_pins_keep_pages_where_they_are(bench: Bench) -> None:
    """A pinned page does not migrate; unpinned it does; a pin ends once."""
    pin = await bench.process.pin(bench.span(0, 2), write=True)
    moved = await bench.mirror.migrate_to_device(bench.span(0, 3))
    assert (moved.src & np.uint64(MIGRATE)).astype(bool).tolist() == [False, False, True]
    await pin.unpin()
    moved = await bench.mirror.migrate_to_device(bench.span(0, 2))
    assert (moved.src & np.uint64(MIGRATE)).all()
    with pytest.raises(NoSuchObjectError):
        await pin.unpin()
    with pytest.raises(BadAddressError):
        await bench.process.pin(bench.span(15, 2))


async def test_mappings_are_found_by_address(bench: Bench) -> None:
    """vma_lookup(): where they begin and end, and what they permit; ESRCH when the process is gone."""
    await bench.process.mprotect(bench.mapped.address, 2 * PAGE_SIZE, Prot.READ)
    found = await bench.mirror.find_vma(bench.span(1).start + 5)
    assert found is not None
    assert (found.start, found.end, found.readable, found.writable) == (
        bench.mapped.address,
        bench.span(2).start,
        True,
        False,
    )
    assert await bench.mirror.find_vma(PAGE_SIZE) is None
    await bench.process.exit()
    with pytest.raises(NoSuchObjectError) as gone:
        await bench.mirror.find_vma(PAGE_SIZE)
    assert gone.value.errno == errnos.ESRCH


async def test_mirror_is_gone_when_it_was_detached(bench: Bench) -> None:
    """No event comes any more, no call is possible, and the device can be unregistered."""
    await bench.mirror.detach()
    await bench.process.munmap(bench.mapped.address, PAGE_SIZE)
    assert bench.driver.events == []
    with pytest.raises(NoSuchObjectError):
        await bench.mirror.insert(0, PAGE_SIZE)
    await bench.device.unregister()


async def test_driver_is_lost_when_it_does_not_answer(start_daemon: Any) -> None:
    """The deadline of acknowledgements holds for both interfaces: the mirror is fenced, the call completes."""
    daemon: Daemon = await start_daemon(acknowledgement_s=0.05)
    bench = await Bench.make(daemon.connect())
    await bench.notifier.remove()  # what it does not hear it need not answer in time
    await bench.mirror.make_exclusive(bench.span(8, 2))
    bench.notifier = await bench.mirror.insert(0, bench.mirror.address_end)
    bench.driver.gate.clear()
    done = await bench.process.munmap(bench.mapped.address, PAGE_SIZE)
    assert done.fenced_mirrors == (bench.mirror.id,)
    with pytest.raises(DeviceLostError):
        await bench.notifier.read_begin()
    assert len(bench.driver.losses) == 1
    assert await held(bench.client) == []


class TwoPass(IntervalDriver):
    """A driver that starts first and finishes later, and writes down in which order."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log
        self.refuses = False

    def invalidate_start(self, event: Event) -> object | None:
        """Start."""
        self.log.append(f"start {self.name}")
        if self.refuses and not event.blockable:
            raise BlockingIOError(errnos.EAGAIN, "busy")
        return event.revision

    async def invalidate_finish(self, event: Event, token: object) -> None:
        """Finish."""
        assert event.finishes == token
        self.log.append(f"finish {self.name}")


async def test_drivers_finish_when_all_have_started(bench: Bench) -> None:
    """Two devices stop at the same time: both start, then both finish, then the memory goes."""
    log: list[str] = []
    await bench.mirror.detach()
    for name in ("one", "two"):
        mirror = await bench.device.attach(bench.process, TwoPass(name, log))
        await mirror.insert(0, mirror.address_end, two_pass=True)
    await bench.process.munmap(bench.mapped.address, PAGE_SIZE)
    assert (set(log[:2]), set(log[2:])) == ({"start one", "start two"}, {"finish one", "finish two"})


async def test_device_has_stopped_when_the_first_of_two_passes_is_a_coroutine(bench: Bench) -> None:
    """A driver that leaves `invalidate_start` as it is stops in `invalidate`, whatever kind of function that is."""
    log: list[str] = []

    class OnePass(IntervalDriver):
        async def invalidate(self, event: Event) -> None:
            await asyncio.sleep(0)
            log.append("stopped")

    class Starting(IntervalDriver):
        async def invalidate_start(self, event: Event) -> object:
            await asyncio.sleep(0)
            log.append("started")
            return event.revision

        def invalidate_finish(self, event: Event, token: object) -> None:
            log.append("finished" if token == event.finishes else "another token")

    for driver in (OnePass(), Starting()):
        mirror = await bench.device.attach(bench.process, driver)
        await mirror.insert(0, mirror.address_end, two_pass=True)
    await bench.process.munmap(bench.mapped.address, PAGE_SIZE)
    assert sorted(log) == ["finished", "started", "stopped"]


async def test_device_has_stopped_when_a_subscription_of_two_passes_is_gone(bench: Bench) -> None:
    """Nobody asks for a second pass then: what is told for another subscription is done when it is answered."""
    log: list[str] = []

    class Both(TwoPass):
        def invalidate(self, event: Event) -> None:
            log.append("stop")

    mirror = await bench.device.attach(bench.process, Both("it", log))
    await mirror.insert(0, mirror.address_end)
    with pytest.raises(InvalidRequestError):
        await mirror.insert(bench.mapped.address, 0, two_pass=True)
    two_pass = await mirror.insert(0, mirror.address_end, two_pass=True)
    await bench.process.munmap(bench.span(0).start, PAGE_SIZE)
    await two_pass.remove()
    with pytest.raises(NoSuchObjectError):
        await two_pass.remove()
    await bench.process.munmap(bench.span(1).start, PAGE_SIZE)
    assert log == ["start it", "finish it", "stop"]


async def test_device_has_stopped_when_a_subscription_of_two_passes_comes_or_goes(harness_daemon: Daemon) -> None:
    """The driver does not know whether a second pass will be asked for, and finishes what it starts."""
    log: list[str] = []

    class Finishing(TwoPass):
        async def invalidate_finish(self, event: Event, token: object) -> None:
            log.append("finish" if token == event.revision else "another token")

    async with harness_daemon.connect("two passes") as client:
        process = await client.create_process("victim")
        span = (await process.mmap(2 * PAGE_SIZE)).span
        device = await client.register_device("gpu0")
        mirror = await device.attach(process, Finishing("it", log))
        await mirror.insert(0, mirror.address_end)
        async with Harness(client).hold(HoldPoint.BEFORE_END, "insert_notifier", process=process) as hold:
            inserting = asyncio.create_task(mirror.insert(0, mirror.address_end, two_pass=True))
            await hold.reached()
            await process.munmap(span.start, PAGE_SIZE)
            assert log == ["start it", "finish"]
        notifier = await inserting
        async with Harness(client).hold(HoldPoint.BEFORE_END, "remove_notifier", process=process) as hold:
            removing = asyncio.create_task(notifier.remove())
            await hold.reached()
            await process.munmap(span.start + PAGE_SIZE, PAGE_SIZE)
        await removing
        assert log == ["start it", "finish"] * 2


async def test_access_in_parts_begins_once(harness_daemon: Daemon) -> None:
    """What the driver has heard between two parts makes no use after invalidation of it: it answered too early."""
    async with harness_daemon.connect("parts") as client:
        process = await client.create_process("victim")
        span = (await process.mmap(512 * PAGE_SIZE)).span
        device = await client.register_device("gpu0")
        mirror = await device.attach(process, IntervalDriver())
        notifier = await mirror.insert(0, mirror.address_end)
        pfns = word_pfns((await notifier.fault(span, BOTH)).words)
        addresses = np.arange(span.start, span.end, PAGE_SIZE, dtype=np.uint64)
        accesses: list[Coroutine[Any, Any, object]] = [
            mirror.read_frames(addresses, pfns),
            mirror.write_frames(addresses[:-1], pfns[:-1], bytes(511 * PAGE_SIZE)),
        ]
        for gone, access in enumerate(accesses, 1):
            async with Harness(client).hold(HoldPoint.BEFORE_END, "read_frames|write_frames", process=process) as hold:
                accessing = asyncio.create_task(access)
                await hold.reached()
                await process.munmap(span.end - gone * PAGE_SIZE, PAGE_SIZE)
            with pytest.raises(BadAddressError) as caught:
                await accessing
            assert caught.value.violation is not None
            assert caught.value.violation.kind is ViolationKind.EARLY_ACKNOWLEDGEMENT


async def test_reaping_is_tried_again_when_a_driver_refuses(bench: Bench) -> None:
    """process_mrelease(): EAGAIN, with those finishing who had started; the next time everything goes."""
    log: list[str] = []
    drivers = [TwoPass(name, log) for name in ("one", "two")]
    for driver in drivers:
        mirror = await bench.device.attach(bench.process, driver)
        await mirror.insert(0, mirror.address_end, two_pass=True)
    await bench.process.write(bench.mapped.address, b"x")
    drivers[1].refuses = True
    with pytest.raises(RangeBusyError) as refused:
        await bench.process.mrelease()
    assert refused.value.errno == errnos.EAGAIN
    assert sorted(log) == ["finish one", "start one", "start two"]
    assert (await bench.process.pagemap(bench.span(0)))[0] & np.uint64(pagemap.PRESENT)
    drivers[1].refuses = False
    await bench.process.mrelease()
    assert not (await bench.process.pagemap(bench.span(0)))[0] & np.uint64(pagemap.PRESENT)
    assert not bench.driver.events[-1].blockable
    with pytest.raises(SegmentationFault):
        await bench.process.read(bench.mapped.address, 1)
    await bench.process.exit()


async def test_pages_are_mapped_for_dma_and_unmapped_in_the_callback(bench: Bench) -> None:
    """The device works by DMA address until the driver, told that a page goes, has unmapped it."""
    device = await bench.client.register_device("nic", dma=True)
    driver = Witness()
    mirror = await device.attach(bench.process, driver)
    notifier = await mirror.insert(0, mirror.address_end)
    addresses = bench.addresses(0, 16)
    mapped = await mirror.dma_map(addresses, (await notifier.fault(bench.span(0, 16), BOTH)).words)
    again = await notifier.fault(bench.span(0, 16), BOTH, words=mapped.words)
    assert again.words.tolist() == mapped.words.tolist()
    assert (await mirror.dma_map(addresses, again.words)).dma_addresses.tolist() == mapped.dma_addresses.tolist()
    await mirror.write_dma(mapped.dma_addresses[1:3], b"one" + bytes(PAGE_SIZE - 3) + b"two")
    assert await bench.process.read(bench.span(2).start, 3) == b"two"
    await bench.process.write(bench.span(1).start, b"ONE")
    assert await mirror.read_dma(mapped.dma_addresses[1:], length=14 * PAGE_SIZE + 1, offset=1) == (
        b"NE" + bytes(PAGE_SIZE - 3) + b"two" + bytes(13 * PAGE_SIZE - 1)
    )
    left: list[Entries] = []

    async def inside(_: Event) -> None:
        left.append(await mirror.dma_unmap(addresses[:4], mapped.words[:4]))

    driver.inside = inside
    await bench.process.munmap(bench.mapped.address, 4 * PAGE_SIZE)
    assert not (left[0] & np.uint64(DMA_MAPPED)).any()
    with pytest.raises(BadAddressError) as gone:
        await mirror.read_dma(mapped.dma_addresses[:1])
    assert gone.value.address == int(mapped.dma_addresses[0])
    assert await mirror.read_dma(mapped.dma_addresses[4:], length=12 * PAGE_SIZE) == bytes(12 * PAGE_SIZE)
    with pytest.raises(InvalidRequestError):
        await mirror.dma_unmap(addresses[:4], mapped.words[:4])


async def test_long_mappings_come_whole(bench: Bench) -> None:
    """65,536 pages are two parts on the way back; one more is refused, as no message may be longer."""
    device = await bench.client.register_device("nic", dma=True)
    mirror = await device.attach(bench.process, Witness())
    notifier = await mirror.insert(0, mirror.address_end)
    npages = (1 << 16) + 1
    mapped = await bench.process.mmap(npages * PAGE_SIZE)
    words = (await notifier.fault(mapped.span, REQ_FAULT)).words
    addresses = np.uint64(mapped.address) + (np.arange(npages, dtype=np.uint64) << np.uint64(PAGE_SHIFT))
    with pytest.raises(OutOfFramesError) as too_many:
        await mirror.dma_map(addresses, words)
    assert too_many.value.errno == errnos.E2BIG
    done = await mirror.dma_map(addresses[1:], words[1:])
    assert np.unique(done.dma_addresses).size == done.words.size == npages - 1
    assert not (await mirror.dma_unmap(addresses[1:], done.words) & np.uint64(DMA_MAPPED)).any()
    await mirror.detach()
