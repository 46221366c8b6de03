"""Migrations whose driver takes the steps: setup, pages and finalize as calls of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from area import at, pages
from machine_world import World, error_of

from hmm import commands_device, commands_failures, commands_hmm, commands_migrate, commands_process, cpu_pte
from hmm.address_space import Thp
from hmm.commands_migrate import MigrationSetUp
from hmm.errors import (
    DeviceLostError,
    HmmError,
    InUseError,
    InvalidRequestError,
    NoSuchObjectError,
    OutOfFramesError,
    RangeBusyError,
    TimedOutError,
    WouldDeadlockError,
)
from hmm.frames import RegionKind
from hmm.inspection import pending
from hmm.limits import Limits
from hmm.migrate_steps import SteppedMigration
from hmm.migration import COMPOUND, MIGRATE, VALID, WRITE, Select, migrate_pfn, moving_frames, pfns_of
from hmm.mirror import DeadlinePolicy
from hmm.operation import Await, WaitFor
from hmm.operation_record import Caller, OperationRecord
from hmm.semantics import LINUX_7
from hmm.units import PAGE_SIZE, PMD_PAGES, Entries, Pfns
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot

READ_WRITE = Prot.READ | Prot.WRITE
PRIVATE = MapFlag.PRIVATE | MapFlag.ANONYMOUS | MapFlag.FIXED


class Stepper:
    """A driver that migrates pages of a bench by steps of its own."""

    def __init__(self, bench: Any, first: int, npages: int, select: int = Select.SYSTEM) -> None:
        self.bench, self.call = bench, bench.call
        begun = self.call(commands_migrate.migrate_vma_setup, bench.mirror, bench.span(first, npages), select=select)
        assert isinstance(begun, MigrationSetUp)
        self.id, self.src = begun.migration_id, begun.src

    def allocate(self, count: int, device: int | None = None, *, compound: bool = False) -> Pfns:
        """Frames of the bench's device, or of another; 0: of the system."""
        device = self.bench.device if device is None else device
        allocate = commands_migrate.migrate_vma_allocate
        return self.call(allocate, self.id, count, device_id=device, compound=compound)

    def move(self, dst: Entries) -> Entries:
        """Copy what has a destination, say so; return the source words that are left."""
        moving = np.flatnonzero((self.src & np.uint64(VALID)) != 0)
        moving = moving[dst[moving] != 0]
        self.call(commands_migrate.migrate_vma_copy, self.id, pfns_of(self.src[moving]), pfns_of(dst[moving]))
        return self.pages(dst)

    def pages(self, dst: Entries) -> Entries:
        """Say where pages go; return the source words that are left."""
        return self.call(commands_migrate.migrate_vma_pages, self.id, dst).src

    def finalize(self, *, abort: bool = False) -> Any:
        """End it."""
        return self.call(commands_migrate.migrate_vma_finalize, self.id, abort=abort)


def is_left(words: Entries) -> list[bool]:
    """Which words have MIGRATE."""
    return ((words & np.uint64(MIGRATE)) != 0).tolist()


def test_move_pages_to_the_device_when_their_driver_takes_the_steps(bench: Any) -> None:
    """Collected, copied by the driver, installed: lib/test_hmm.c, dmirror_migrate_to_device()."""
    bench.write(0, b"a" * PAGE_SIZE + b"b" * PAGE_SIZE)
    stepper = Stepper(bench, 0, 3)
    assert (stepper.src & np.uint64(VALID | WRITE | MIGRATE)).tolist() == [VALID | WRITE | MIGRATE] * 2 + [MIGRATE]
    assert cpu_pte.is_migration(bench.entry(0))
    words = migrate_pfn(stepper.allocate(3)) | np.uint64(WRITE)
    assert is_left(stepper.move(words)) == [True] * 3
    moved = stepper.finalize()
    assert moved.dst.tolist() == words.tolist()
    assert [cpu_pte.cpu_pfn(bench.entry(page)) for page in range(3)] == pfns_of(words).tolist()
    assert bench.used == 3
    bench.local.machine.check()
    assert bench.read(0, 3 * PAGE_SIZE) == b"a" * PAGE_SIZE + b"b" * PAGE_SIZE + bytes(PAGE_SIZE)
    assert bench.used == 0


def test_move_pages_back_when_their_driver_writes_them_itself(bench: Any) -> None:
    """The other way: selected are the device's own pages, destinations are the system's."""
    bench.write(0, b"a" * PAGE_SIZE + b"b" * PAGE_SIZE)
    bench.to_device(0, 2)
    stepper = Stepper(bench, 0, 2, Select.DEVICE_PRIVATE)
    targets = stepper.allocate(2, 0)
    data = bench.call(commands_migrate.migrate_vma_read, stepper.id, pfns_of(stepper.src), offset=PAGE_SIZE, length=5)
    assert data == b"b" * 5
    bench.call(commands_migrate.migrate_vma_write, stepper.id, targets, b"A" * PAGE_SIZE + b"B" * PAGE_SIZE)
    bench.call(commands_migrate.migrate_vma_write, stepper.id, targets, b"!", offset=PAGE_SIZE + 1)
    stepper.pages(migrate_pfn(targets))
    stepper.finalize()
    assert bench.used == 0
    assert bench.read(PAGE_SIZE // PAGE_SIZE, 3) == b"B!B"
    assert bench.read(0, 1) == b"A"


def test_move_pages_to_another_device_when_it_has_a_mirror_of_the_space(bench: Any) -> None:
    """A destination may be any device's page that its driver has; who has to give it back is that device's mirror."""
    other = bench.call(commands_device.register_device, "other", memory_pages=4)
    bench.write(0, b"page")
    bench.to_device(0, 1)
    stepper = Stepper(bench, 0, 1, Select.DEVICE_PRIVATE)
    with pytest.raises(InvalidRequestError, match="has no live mirror of the address space"):
        stepper.allocate(1, other)
    mirror, heard = bench.attach(other, bench.process)
    stepper.move(migrate_pfn(stepper.allocate(1, other)))
    stepper.finalize()
    assert bench.used == 0
    assert bench.local.machine.frames.zone_device_data[cpu_pte.cpu_pfn(bench.entry(0))] == mirror
    heard.events.clear()
    assert bench.read(0, 4) == b"page"
    assert heard.events


def test_tell_the_live_mirror_of_another_device_when_one_beside_it_was_lost(bench: Any) -> None:
    """A lost mirror hears nothing; a device that has no other gets no pages."""
    machine = bench.local.machine
    other = bench.call(commands_device.register_device, "other", memory_pages=4)
    lost, _ = bench.attach(other, bench.process)
    machine.fence(lost, "its driver died")
    bench.write(0, b"page")
    stepper = Stepper(bench, 0, 1)
    with pytest.raises(InvalidRequestError, match="has no live mirror of the address space"):
        stepper.allocate(1, other)
    live, heard = bench.attach(other, bench.process)
    stepper.move(migrate_pfn(stepper.allocate(1, other)))
    stepper.finalize()
    assert machine.frames.zone_device_data[cpu_pte.cpu_pfn(bench.entry(0))] == live
    heard.events.clear()
    assert bench.read(0, 4) == b"page"
    assert heard.events


def test_leave_pages_where_they_are_when_their_word_is_0(bench: Any) -> None:
    """A driver that cannot place a page leaves its destination 0: migrate_vma_pages() takes MIGRATE away."""
    bench.write(0, b"a" * 2 * PAGE_SIZE)
    stepper = Stepper(bench, 0, 3)
    words = np.zeros(3, np.uint64)
    words[1:2] = migrate_pfn(stepper.allocate(1))
    assert is_left(stepper.move(words)) == [False, True, False]
    stepper.finalize()
    assert cpu_pte.is_present(bench.entry(0))
    assert cpu_pte.is_device_private(bench.entry(1))
    assert bench.entry(2) == 0
    assert bench.used == 1


@pytest.mark.parametrize("after_pages", [False, True])
@pytest.mark.parametrize("abort", [False, True])
def test_put_pages_back_when_the_driver_gives_up(bench: Any, abort: bool, after_pages: bool) -> None:
    """The kernel's driver finalizes with dst 0; here it may even give up behind `pages`, holes excepted."""
    bench.write(0, b"page")
    stepper = Stepper(bench, 0, 2)
    words = migrate_pfn(stepper.allocate(2))
    if after_pages:
        stepper.pages(words)
    moved = stepper.finalize(abort=abort)
    stays = abort or not after_pages
    assert is_left(moved.src) == [not stays, after_pages]
    assert cpu_pte.is_present(bench.entry(0)) == stays
    assert (bench.entry(1) != 0) == after_pages
    assert bench.used == after_pages + (not stays)
    if stays:
        assert bench.read(0, 4) == b"page"
    with pytest.raises(NoSuchObjectError, match="has ended: it was"):
        stepper.finalize()


def refused(stepper: Stepper, words: Entries, match: str) -> None:
    """These destinations are refused."""
    with pytest.raises(InvalidRequestError, match=match):
        stepper.pages(words)


def test_refuse_destinations_when_a_word_cannot_be(bench: Any) -> None:
    """A frame of somebody else, one given twice, too few words: nothing is changed, and `pages` may come again."""
    bench.write(0, b"a" * 2 * PAGE_SIZE)
    bench.to_device(8, 1)
    stepper = Stepper(bench, 0, 2)
    own, foreign = stepper.allocate(2), cpu_pte.cpu_pfn(bench.entry(8))
    refused(stepper, migrate_pfn(np.array([own[0], foreign])), f"frame {foreign} for 0x.* was not allocated")
    refused(stepper, migrate_pfn(np.array([own[0], own[0]])), "is given twice")
    refused(stepper, migrate_pfn(own[:1]), "1 words for the 2 pages")
    source = pfns_of(stepper.src)
    refused(stepper, migrate_pfn(source), "was not allocated")
    src = stepper.move(migrate_pfn(own))
    refused(stepper, migrate_pfn(own[::-1]), "have their destinations already")
    assert stepper.pages(migrate_pfn(own)).tolist() == src.tolist()
    with pytest.raises(InvalidRequestError, match="have their destinations already"):
        stepper.allocate(0)
    stepper.finalize()
    assert bench.used == 3


def test_refuse_access_when_a_frame_is_not_the_migrations(bench: Any) -> None:
    """Pages on their way are read and not written; nothing else is reached."""
    bench.write(0, b"page")
    bench.write(4, b"other")
    stepper = Stepper(bench, 0, 1)
    own, other = stepper.allocate(1), np.array([cpu_pte.cpu_pfn(bench.entry(4))])
    source = pfns_of(stepper.src)
    for pfns in (other, source):
        with pytest.raises(InvalidRequestError, match=r"is not a frame that may be filled"):
            bench.call(commands_migrate.migrate_vma_write, stepper.id, pfns, b"x" * PAGE_SIZE)
        with pytest.raises(InvalidRequestError, match=r"is not a frame that may be filled"):
            bench.call(commands_migrate.migrate_vma_copy, stepper.id, own, pfns)
    with pytest.raises(InvalidRequestError, match=r"is not a page or a destination"):
        bench.call(commands_migrate.migrate_vma_read, stepper.id, other)
    with pytest.raises(InvalidRequestError, match=r"no part of 1 frames"):
        bench.call(commands_migrate.migrate_vma_read, stepper.id, own, offset=1, length=PAGE_SIZE)
    with pytest.raises(InvalidRequestError, match="1 frames to 2"):
        bench.call(commands_migrate.migrate_vma_copy, stepper.id, own, np.concatenate((own, own)))
    stepper.finalize()
    assert bench.read(0, 4) == b"page"


def test_give_fewer_frames_when_the_device_has_no_more(make_bench: Callable[..., Any]) -> None:
    """A driver allocates as much as there is and leaves the rest where it is."""
    bench = make_bench(memory_pages=2)
    bench.write(0, b"a" * 3 * PAGE_SIZE)
    stepper = Stepper(bench, 0, 3)
    own = stepper.allocate(3)
    assert own.size == 2
    assert stepper.allocate(1).size == 0
    with pytest.raises(InvalidRequestError, match="2 more frames for migration 1, which has 2 of at most 3"):
        stepper.allocate(2)
    words = np.zeros(3, np.uint64)
    words[:2] = migrate_pfn(own)
    stepper.move(words)
    stepper.finalize()
    assert bench.used == 2
    assert bench.read(0, 3 * PAGE_SIZE) == b"a" * 3 * PAGE_SIZE


def test_give_fewer_frames_when_an_allocation_is_made_to_fail(bench: Any) -> None:
    """HMM_DMIRROR_FLAG_FAIL_ALLOC counts a driver's own allocations too."""
    bench.call(commands_failures.inject_migration_failure, bench.mirror, 3)
    stepper = Stepper(bench, 0, 8)
    assert stepper.allocate(1).size == 1
    assert stepper.allocate(4).size == 1
    assert stepper.allocate(4).size == 4
    stepper.finalize()
    assert bench.used == 0


def test_refuse_setup_when_the_range_cannot_be(bench: Any) -> None:
    """migrate_vma_setup() fails with EINVAL; flags that do not exist are one reason more here."""
    setup = commands_migrate.migrate_vma_setup
    for span, select in ((bench.span(0, 0), 1), (bench.span(14, 4), 1), (bench.span(0, 1), 16)):
        with pytest.raises(InvalidRequestError):
            bench.call(setup, bench.mirror, span, select=select)
    assert not bench.local.machine.migrations
    bench.local.machine.check()


def test_collect_holes_only_when_nothing_is_selected(bench: Any) -> None:
    """Without a selection nothing that is there is taken: migrate_vma_collect_pmd()."""
    bench.write(0, b"page")
    stepper = Stepper(bench, 0, 2, 0)
    assert is_left(stepper.src) == [False, True]
    stepper.finalize()


def test_keep_filled_holes_when_their_driver_has_not_finalized(bench: Any) -> None:
    """migrate_vma_insert_page() maps them; the driver holds a reference until it finalizes, so nobody frees them."""
    stepper = Stepper(bench, 0, 1)
    frames = stepper.allocate(1, 0)
    stepper.pages(migrate_pfn(frames))
    refcount = bench.local.machine.frames.refcount
    assert bench.read(0, 1) == b"\0"
    assert refcount[frames].tolist() == [2]
    bench.call(commands_migrate.migrate_vma_write, stepper.id, frames, b"late")
    assert bench.read(0, 4) == b"late"
    stepper.finalize()
    assert refcount[frames].tolist() == [1]


def test_refuse_to_detach_when_a_migration_is_not_finalized(bench: Any) -> None:
    """A driver ends what it began first."""
    stepper = Stepper(bench, 0, 1)
    with pytest.raises(InUseError, match=r"migration 1 of mirror 1 .* is not finalized"):
        bench.call(commands_hmm.detach, bench.mirror)
    stepper.finalize()
    bench.call(commands_hmm.detach, bench.mirror)


def test_leave_pages_of_files_where_they_are_when_system_memory_is_their_destination(bench: Any) -> None:
    """The page cache names its frames: pages of files do not move."""
    bench.map(2, at=0, flags=MapFlag.SHARED | MapFlag.FIXED | MapFlag.ANONYMOUS)
    bench.write(0, b"page")
    stepper = Stepper(bench, 0, 1)
    assert is_left(stepper.move(migrate_pfn(stepper.allocate(1, 0)))) == [False]
    stepper.finalize()
    bench.local.machine.check()
    assert bench.read(0, 4) == b"page"


def test_frames_to_copy_are_those_of_words_that_are_valid_on_both_sides() -> None:
    """Holes need no copy, pages that stay neither; of large folios all frames are copied."""
    src = np.array(
        [3 << 6 | VALID | MIGRATE, MIGRATE, 9 << 6 | VALID | MIGRATE, 512 << 6 | VALID | COMPOUND], np.uint64
    )
    dst = migrate_pfn(np.array([70, 71, 0, 1024]))
    dst[2] = 0
    dst[3] |= np.uint64(COMPOUND)
    sources, targets = moving_frames(src, dst)
    assert sources.tolist() == [3, *range(512, 512 + PMD_PAGES)]
    assert targets.tolist() == [70, *range(1024, 1024 + PMD_PAGES)]


# ---- huge pages


@pytest.fixture
def huge(make_bench: Callable[..., Any]) -> Any:
    """A bench with a huge page, under the rules of Linux 7."""
    bench = make_bench(
        frames=3000, memory_pages=1200, mapped_pages=1, thp=Thp.ALWAYS, semantics=LINUX_7, more_memory_pages=2048
    )
    bench.map(PMD_PAGES, at=0)
    bench.write(0, b"huge")
    assert cpu_pte.is_huge(bench.entry(0))
    return bench


def test_move_a_huge_page_as_one_when_it_gets_a_large_folio(huge: Any) -> None:
    """The first words of a block stand for all of it."""
    stepper = Stepper(huge, 0, PMD_PAGES, Select.SYSTEM | Select.COMPOUND)
    assert stepper.src[0] & np.uint64(COMPOUND)
    assert not stepper.src[1:].any()
    (folio,) = stepper.allocate(1, compound=True)
    run = np.arange(PMD_PAGES)
    sources = int(stepper.src[0]) >> 6
    huge.call(commands_migrate.migrate_vma_copy, stepper.id, sources + run, folio + run)
    words = np.zeros(PMD_PAGES, np.uint64)
    small = migrate_pfn(np.array([folio]))
    words[:1] = small
    refused(stepper, words, "is part of a large folio")
    words[:1] = small | np.uint64(COMPOUND)
    assert is_left(stepper.pages(words))[0]
    stepper.finalize()
    entry = huge.entry(0)
    assert cpu_pte.is_huge(entry)
    assert cpu_pte.cpu_pfn(entry) == folio
    huge.local.machine.check()
    assert huge.read(0, 4) == b"huge"


def test_split_a_huge_page_when_it_gets_small_destinations(huge: Any) -> None:
    """migrate_vma_split_unmapped_folio(); a block without a first destination stays."""
    stepper = Stepper(huge, 0, PMD_PAGES, Select.SYSTEM | Select.COMPOUND)
    small = stepper.allocate(PMD_PAGES)
    words = migrate_pfn(small)
    words[1:] |= np.uint64(COMPOUND)  # which says nothing behind a first word without it
    words[100] = 0
    run = np.arange(PMD_PAGES)
    huge.call(commands_migrate.migrate_vma_copy, stepper.id, (int(stepper.src[0]) >> 6) + run, small)
    words = np.where(words != 0, words & ~np.uint64(COMPOUND), words)
    assert is_left(stepper.pages(words)) == [page != 100 for page in range(PMD_PAGES)]
    stepper.finalize()
    assert not cpu_pte.is_huge(huge.entry(0))
    assert cpu_pte.is_present(huge.entry(100))
    huge.local.machine.check()
    assert huge.read(0, 4) == b"huge"


def test_leave_a_huge_page_when_its_first_word_is_0(huge: Any) -> None:
    """It stays as one, whatever the other words say."""
    stepper = Stepper(huge, 0, PMD_PAGES, Select.SYSTEM | Select.COMPOUND)
    words = migrate_pfn(stepper.allocate(PMD_PAGES))
    words[0] = 0
    assert not any(is_left(stepper.pages(words)))
    stepper.finalize()
    assert cpu_pte.is_huge(huge.entry(0))
    assert huge.used == 0
    huge.local.machine.check()


# ---- meanwhile


class Steps(World):
    """A process with a page that a driver of a card is about to move by steps."""

    def __init__(self, npages: int = 1, policy: DeadlinePolicy = DeadlinePolicy.FENCE) -> None:
        super().__init__(mirrors=0, limits=Limits(frames=64, device_frames=16))
        self.card = self.do(commands_device.register_device, "card", memory_pages=8)
        self.mirror = self.do(commands_hmm.attach, self.card, self.pid, policy=policy)
        self.do(commands_process.mmap, self.pid, at(0), 4 * PAGE_SIZE, READ_WRITE, PRIVATE)
        self.do(commands_process.write_memory, self.pid, at(0), b"page")
        self.moving = self.setup(npages)
        self.id = self.value_of(self.moving).migration_id

    def setup(self, npages: int = 1, mirror: int = 0, first: int = 0) -> OperationRecord[Any]:
        """Begin a migration."""
        return self.start(commands_migrate.migrate_vma_setup, mirror or self.mirror, pages(first, first + npages))

    @staticmethod
    def value_of(record: OperationRecord[Any]) -> MigrationSetUp:
        """What setup has replied with."""
        assert record.replied
        assert isinstance(record.value, MigrationSetUp)
        return record.value

    def step(self, record: OperationRecord[Any]) -> Any:
        """Let a step be taken, and everybody go on who can.  Returns: its value."""
        self.go_on()
        assert record.done
        return record.result

    def go_on(self) -> None:
        """Resume everybody who can go on."""
        while ready := self.machine.ready():
            self.machine.resume(ready[0].id)

    def finalize(self, number: int = 0) -> Any:
        """End a migration."""
        return self.step(self.start(commands_migrate.migrate_vma_finalize, number or self.id))

    def entry(self, page: int = 0) -> int:
        """The CPU's entry."""
        return self.machine.processes[self.pid].space.table.get(at(page))


def test_wait_for_the_driver_when_a_cpu_touches_a_page_on_its_way() -> None:
    """migration_entry_wait(): the CPU goes on when the page is unlocked, and it can be said who it waits for."""
    world = Steps()
    reading = world.start(commands_process.read_memory, world.pid, at(0), 4)
    assert isinstance(reading.request, Await)
    assert reading.request.wait_for is WaitFor.FOLIO
    (moving, waiting) = pending(world.machine)
    assert moving.request == f"the next step of its driver, in migration {world.id} {pages(0, 1)}"
    assert waiting.operations == (moving.operation_id,)
    world.finalize()
    assert reading.result.data == b"page"


@pytest.mark.parametrize(
    "call",
    [
        lambda world: world.start(commands_process.munmap, world.pid, at(0), PAGE_SIZE),
        lambda world: world.start(commands_process.fork, world.pid),
        lambda world: world.start(commands_process.mremap, world.pid, at(0), PAGE_SIZE, PAGE_SIZE, 3, at(8)),
        lambda world: world.start(commands_process.exit_process, world.pid),
    ],
    ids=["munmap", "fork", "mremap", "exit"],
)
def test_wait_for_finalize_when_somebody_changes_mappings(call: Callable[[Steps], OperationRecord[Any]]) -> None:
    """mmap_lock is held for reading from setup to finalize."""
    world = Steps()
    changing = call(world)
    assert isinstance(changing.request, Await)
    assert changing.request.wait_for is WaitFor.TURN
    assert world.machine.blockers(changing) == [world.moving.id]
    world.finalize()
    world.go_on()
    assert changing.done
    assert changing.error is None
    world.machine.check()


def test_pass_over_a_page_when_another_migration_has_it() -> None:
    """folio_trylock() fails; both hold mmap_lock for reading, so neither waits for the other."""
    world = Steps()
    other = world.do(commands_device.register_device, "other", memory_pages=4)
    mirror = world.do(commands_hmm.attach, other, world.pid)
    second = world.value_of(world.setup(2, mirror))
    assert is_left(second.src) == [False, True]
    assert not is_left(world.do(commands_hmm.migrate_to_device, mirror, pages(0, 1)).src)[0]
    world.finalize(second.migration_id)
    world.finalize()


def test_let_whoever_changes_mappings_go_first_when_a_reader_comes_later() -> None:
    """Readers queue behind a writer that waits: kernel/locking/rwsem.c."""
    world = Steps()
    unmapping = world.start(commands_process.munmap, world.pid, at(3), PAGE_SIZE)
    second = world.setup(1, first=1)
    assert not second.replied
    assert world.machine.blockers(second) == [unmapping.id]
    world.finalize()
    world.go_on()
    assert unmapping.done
    world.finalize(world.value_of(second).migration_id)


def test_put_pages_back_when_the_lease_ends() -> None:
    """Whoever waits goes on; later calls are told why."""
    world = Steps(2)
    reading = world.start(commands_process.read_memory, world.pid, at(0), 4)
    world.do(commands_migrate.migrate_vma_allocate, world.id, 2, device_id=world.card)
    world.machine.end_migration(world.id, "its driver has done nothing for 30 s")
    world.go_on()
    assert reading.result.data == b"page"
    error = error_of(world.moving)
    assert isinstance(error, TimedOutError)
    assert error.reason == "LEASE_ENDED"
    for command, arguments in (
        (commands_migrate.migrate_vma_allocate, (1,)),
        (commands_migrate.migrate_vma_pages, (np.zeros(2, np.uint64),)),
        (commands_migrate.migrate_vma_finalize, ()),
    ):
        late = error_of(world.start(command, world.id, *arguments))
        assert str(late) == "ENOENT: migration 1 has ended: its driver has done nothing for 30 s"
    world.machine.check()
    assert world.machine.frames.regions[1].used == 0


def test_leave_holes_filled_when_the_lease_ends_behind_pages() -> None:
    """They are mapped since `pages`: others may have used them."""
    world = Steps(2)
    frames = world.do(commands_migrate.migrate_vma_allocate, world.id, 2, device_id=world.card)
    world.step(world.start(commands_migrate.migrate_vma_pages, world.id, migrate_pfn(frames)))
    touching = world.start(commands_process.touch, world.pid, pages(1, 2), write=False)
    assert isinstance(touching.request, Await)  # its driver may still be filling it
    assert touching.request.wait_for is WaitFor.FOLIO
    world.machine.end_migration(world.id, "enough")
    world.go_on()
    assert isinstance(error_of(world.moving), TimedOutError)
    assert cpu_pte.is_present(world.entry(0))
    for delivery in world.sent():
        world.machine.answer(delivery.mirror_id, delivery.sequence)
    world.go_on()
    assert touching.done
    world.machine.check()
    assert world.machine.frames.regions[1].used == 0


def test_keep_only_how_a_migration_ended_when_it_has() -> None:
    """Its words and frames, and the address space, are not kept alive by it."""
    world = Steps()
    world.finalize()
    assert list(world.machine.past_migrations) == [(world.id, "", "it was finalized")]


def test_put_pages_back_when_the_mirror_is_fenced() -> None:
    """Its driver is gone: nobody else could finalize."""
    world = Steps()
    world.machine.fence(world.mirror, "its driver died")
    world.go_on()
    assert isinstance(error_of(world.moving), DeviceLostError)
    assert cpu_pte.is_present(world.entry())
    late = error_of(world.start(commands_migrate.migrate_vma_finalize, world.id))
    assert "its driver died" in str(late)
    world.machine.check()


def test_tell_who_was_fenced_in_the_step_that_waited_for_it() -> None:
    """Not in the result of the setup alone, that its driver had long before; and once."""
    world = Steps(2)
    others = [world.do(commands_device.register_device, name) for name in ("second", "third")]
    second, third = (world.do(commands_hmm.attach, other, world.pid) for other in others)
    for mirror in (second, third):
        world.do(commands_hmm.insert_notifier, mirror, at(1), PAGE_SIZE)
    frames = world.do(commands_migrate.migrate_vma_allocate, world.id, 2, device_id=world.card)
    filling = world.start(commands_migrate.migrate_vma_pages, world.id, migrate_pfn(frames))
    world.go_on()
    busy = world.start(commands_migrate.migrate_vma_finalize, world.id)
    assert isinstance(error_of(busy), RangeBusyError)
    for delivery in world.sent():
        if delivery.mirror_id == second:
            world.machine.fence(second, "it did not answer in time")
        else:
            world.machine.answer(delivery.mirror_id, delivery.sequence)
    world.go_on()
    finalizing = world.start(commands_migrate.migrate_vma_finalize, world.id)
    world.go_on()
    assert (busy.fenced, filling.fenced, finalizing.fenced, world.moving.fenced) == ((), (second,), (), (second,))
    assert finalizing.done


def test_end_a_step_when_the_lease_ends_while_it_is_taken() -> None:
    """Whoever asked for it gets the reason, not silence."""
    world = Steps(2, DeadlinePolicy.BLOCK)
    other = world.do(commands_device.register_device, "other", memory_pages=4)
    mirror = world.do(commands_hmm.attach, other, world.pid)
    world.do(commands_hmm.insert_notifier, mirror, at(0), 4 * PAGE_SIZE)
    frames = world.do(commands_migrate.migrate_vma_allocate, world.id, 2, device_id=world.card)
    words = np.zeros(2, np.uint64)
    words[1:] = migrate_pfn(frames[:1])
    filling = world.start(commands_migrate.migrate_vma_pages, world.id, words)
    world.go_on()
    (delivery,) = world.sent()
    busy = error_of(world.start(commands_migrate.migrate_vma_finalize, world.id))
    assert isinstance(busy, RangeBusyError)
    world.machine.end_migration(world.id, "enough")
    world.machine.answer(delivery.mirror_id, delivery.sequence)
    world.go_on()
    assert isinstance(error_of(filling), TimedOutError)
    assert isinstance(error_of(world.moving), TimedOutError)
    world.machine.check()


def test_end_a_migration_when_a_mirror_does_not_answer_as_a_hole_is_filled() -> None:
    """Where the kernel would wait for ever; its pages are where they were."""
    world = Steps(2)
    other = world.do(commands_device.register_device, "other", memory_pages=4)
    mirror = world.do(commands_hmm.attach, other, world.pid, policy=DeadlinePolicy.FAIL)
    world.do(commands_hmm.insert_notifier, mirror, at(1), PAGE_SIZE)
    frames = world.do(commands_migrate.migrate_vma_allocate, world.id, 2, device_id=world.card)
    filling = world.start(commands_migrate.migrate_vma_pages, world.id, migrate_pfn(frames))
    world.go_on()
    (delivery,) = world.sent()
    world.machine.abandon(delivery.mirror_id, delivery.sequence)
    world.go_on()
    assert isinstance(error_of(filling), TimedOutError)
    assert isinstance(error_of(world.moving), HmmError)
    assert cpu_pte.is_present(world.entry())
    world.machine.check()
    assert world.machine.frames.regions[1].used == 0


def test_give_the_reply_when_pages_is_repeated_after_a_deadlock() -> None:
    """Inside a callback it fails and says what becomes of the step; afterwards the same call has its words."""
    world = Steps(2, DeadlinePolicy.BLOCK)
    gpu = world.do(commands_device.register_device, "gpu")
    mirror = world.do(commands_device.register_mirror, gpu, world.pid, policy=DeadlinePolicy.BLOCK)
    words = np.zeros(2, np.uint64)
    words[1:] = migrate_pfn(world.do(commands_migrate.migrate_vma_allocate, world.id, 1, device_id=world.card))
    faulting = world.start(commands_device.fault, mirror, (pages(1, 3),), write=False)
    (delivery,) = world.sent()
    inside = Caller(callback=(delivery.mirror_id, delivery.sequence))
    errors = []
    for _ in range(2):
        filling = world.machine.start(inside, commands_migrate.migrate_vma_pages, world.id, words)
        world.go_on()
        errors.append(error_of(filling))
    assert all(isinstance(error, WouldDeadlockError) for error in errors)
    assert str(errors[0]).endswith(
        "; migration 1 takes this step all the same, when that has returned; the same call gets its reply then"
    )
    again = world.start(commands_migrate.migrate_vma_pages, world.id, words)
    world.machine.answer(delivery.mirror_id, delivery.sequence)
    world.settle()
    assert faulting.done
    assert is_left(again.result.src) == [False, True]
    assert is_left(world.finalize().src) == [False, True]
    world.machine.check()


def test_fail_a_step_when_the_migration_ends_by_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no error of a call is no success either."""
    world = Steps()
    bug = AssertionError("a bug")

    def fail(*_: Any) -> None:
        raise bug

    monkeypatch.setattr(SteppedMigration, "_driver", fail)  # as it begins to wait for finalize
    filling = world.start(commands_migrate.migrate_vma_pages, world.id, np.zeros(1, np.uint64))
    world.go_on()
    assert world.moving.error is bug
    with pytest.raises(RuntimeError, match="pages: migration 1 has ended with a bug") as caught:
        _ = filling.result
    assert caught.value.__cause__ is bug
    late = error_of(world.start(commands_migrate.migrate_vma_finalize, world.id))
    assert "migration 1 has ended: a bug: AssertionError('a bug')" in str(late)


def test_refuse_setup_when_others_have_taken_the_last_place_meanwhile() -> None:
    """The limit holds after a wait too; what was collected goes back."""
    world = Steps()
    world.finalize()
    other = world.do(commands_device.register_device, "other", memory_pages=4)
    mirror = world.do(commands_hmm.attach, other, world.pid)
    world.do(commands_hmm.insert_notifier, mirror, at(0), 4 * PAGE_SIZE)
    world.machine.limits = replace(world.machine.limits, migrations=1)
    first, second = world.setup(), world.setup(first=1)
    world.settle()
    assert first.replied
    assert isinstance(error_of(second), OutOfFramesError)
    world.finalize(world.value_of(first).migration_id)
    world.machine.check()


def test_hold_the_limit_of_frames_when_several_allocate_calls_wait_for_memory() -> None:
    """Those that come too late are refused; nobody but others is waited for meanwhile."""
    world = World(mirrors=0, limits=Limits(frames=64, device_frames=8, swap_pages=128))
    card = world.do(commands_device.register_device, "card", memory_pages=8)
    mirror = world.do(commands_hmm.attach, card, world.pid)
    world.do(commands_process.mmap, world.pid, at(0), 100 * PAGE_SIZE, READ_WRITE, PRIVATE)
    world.do(commands_process.touch, world.pid, pages(0, world.machine.frames.available), write=True)
    slow = world.do(commands_hmm.attach, card, world.pid, policy=DeadlinePolicy.BLOCK)
    world.do(commands_hmm.insert_notifier, slow, at(8), 92 * PAGE_SIZE)
    moving = world.start(commands_migrate.migrate_vma_setup, mirror, pages(0, 8))
    number = Steps.value_of(moving).migration_id
    stepped = world.machine.migrations[number]
    assert stepped.awaits_driver
    allocating = [world.start(commands_migrate.migrate_vma_allocate, number, 8) for _ in range(3)]
    assert not any(one.done for one in allocating)
    assert stepped.is_idle
    assert not stepped.awaits_driver
    world.settle()
    assert stepped.awaits_driver
    assert sorted(one.error is None for one in allocating) == [False, False, True]
    has = f"which has {stepped.allocated.size} of at most 8"
    assert str(allocating[-1].error) == f"EINVAL: allocate: 8 more frames for migration 1, {has}"
    assert 0 < stepped.allocated.size <= 8
    world.do(commands_migrate.migrate_vma_finalize, number)
    world.machine.check()


def test_refuse_somebody_elses_migration_when_it_is_named() -> None:
    """Only whoever began it takes its steps."""
    world = World(mirrors=0, limits=Limits(frames=64, device_frames=16))
    mine, theirs = Caller(token="mine"), Caller(token="theirs")
    pid = world.do(commands_process.create_process, "mine", caller=mine)
    world.do(commands_process.mmap, pid, at(0), PAGE_SIZE, READ_WRITE, PRIVATE, caller=mine)
    card = world.do(commands_device.register_device, "card", memory_pages=8, caller=mine)
    mirror = world.do(commands_hmm.attach, card, pid, caller=mine)
    moving = world.machine.start(mine, commands_migrate.migrate_vma_setup, mirror, pages(0, 1))
    number = Steps.value_of(moving).migration_id
    stolen = world.machine.start(theirs, commands_migrate.migrate_vma_finalize, number)
    assert error_of(stolen).errno == 1
    world.machine.end_migration(number, "enough")
    world.machine.resume(moving.id)
    after = error_of(world.machine.start(theirs, commands_migrate.migrate_vma_finalize, number))
    assert str(after) == f"ENOENT: there is no migration {number}"


def test_go_on_when_setup_is_called_inside_a_callback() -> None:
    """Setup has replied: the callback that it was made in does not wait for the rest of it."""
    world = Steps(policy=DeadlinePolicy.BLOCK)
    world.finalize()
    world.do(commands_process.write_memory, world.pid, at(3), b"shared")
    world.do(commands_process.fork, world.pid)
    world.do(commands_hmm.insert_notifier, world.mirror, at(3), PAGE_SIZE)
    other = world.start(commands_process.write_memory, world.pid, at(3), b"copied")
    (delivery,) = world.sent()
    inside = Caller(callback=(delivery.mirror_id, delivery.sequence))
    moving = world.machine.start(inside, commands_migrate.migrate_vma_setup, world.mirror, pages(0, 1))
    number = world.value_of(moving).migration_id
    assert not world.machine.waits_for_itself(moving)
    world.machine.answer(delivery.mirror_id, delivery.sequence)
    world.go_on()
    assert other.done
    world.finalize(number)


def test_move_coherent_pages_when_they_are_selected(make_bench: Callable[..., Any]) -> None:
    """SELECT_DEVICE_COHERENT, of its own device."""
    bench = make_bench()
    card = bench.call(commands_device.register_device, "coherent", memory_pages=4, kind=RegionKind.DEVICE_COHERENT)
    bench.device = card
    bench.mirror, _ = bench.attach(card, bench.process)
    bench.write(0, b"page")
    bench.to_device(0, 1)
    assert not any(is_left(Stepper(bench, 0, 1, Select.DEVICE_PRIVATE).src))
    bench.call(commands_migrate.migrate_vma_finalize, 1)
    stepper = Stepper(bench, 0, 1, Select.DEVICE_COHERENT)
    assert is_left(stepper.move(migrate_pfn(stepper.allocate(1, 0)))) == [True]
    stepper.finalize()
    assert bench.read(0, 4) == b"page"
