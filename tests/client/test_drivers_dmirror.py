"""The kernel's HMM test driver in this process: its ioctls, in both profiles."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

import hmm_client
from hmm import commands_process, commands_userfaultfd
from hmm.commands_hmm import Migrated
from hmm.errors import (
    AccessDeniedError,
    BadAddressError,
    HmmError,
    InvalidRequestError,
    NoSuchObjectError,
    OutOfFramesError,
    RangeBusyError,
)
from hmm.limits import Limits
from hmm.local import Local
from hmm.machine import Machine
from hmm.units import PAGE_SIZE, TASK_SIZE, Address, AddressRange, Entries, MirrorId, Pfns, ProcessId
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot
from hmm_client.drivers.control import decode, encode
from hmm_client.drivers.dmirror import CLEAN, LINUX_6_12_CORRECTED, LINUX_7_CORRECTED, Card, Handle, Profile
from hmm_client.drivers.dmirror.__main__ import operations
from hmm_client.drivers.in_process import InProcessHmm

if TYPE_CHECKING:
    from tests.conftest import Daemon

BASE = 1 << 40
RW = Prot.READ | Prot.WRITE
FIXED = MapFlag.PRIVATE | MapFlag.FIXED | MapFlag.ANONYMOUS


class Bench:
    """One process with 200 private pages, and two cards."""

    def __init__(self, profile: Profile) -> None:
        self.local = Local(Machine(Limits(frames=4000, device_frames=2000, hugetlb_pages=1)))
        self.hmm = InProcessHmm(self.local)
        self.process = self.local.call(commands_process.create_process, "bench")
        self.cards = [Card(self.hmm, f"dmirror{n}", pages=800, profile=profile) for n in range(2)]
        self.map(0, 200)

    def open(self, card: int = 0, process: ProcessId = 0) -> Handle:
        """A handle of one of the cards."""
        return self.cards[card].open(process or self.process)

    def map(self, at: int, npages: int, prot: Prot = RW, sharing: MapFlag = FIXED) -> None:
        """Map pages of the window."""
        self.local.call(commands_process.mmap, self.process, page(at), npages * PAGE_SIZE, prot, sharing)

    def protect(self, at: int, npages: int, prot: Prot) -> None:
        """mprotect."""
        self.local.call(commands_process.mprotect, self.process, page(at), npages * PAGE_SIZE, prot)

    def cpu_write(self, at: int, data: bytes) -> None:
        """The CPU writes at a page."""
        self.local.call(commands_process.write_memory, self.process, page(at), data)

    def cpu_read(self, at: int, length: int) -> bytes:
        """The CPU reads at a page."""
        return self.local.call(commands_process.read_memory, self.process, page(at), length).data


@pytest.fixture(params=[CLEAN, LINUX_6_12_CORRECTED, LINUX_7_CORRECTED], ids=lambda profile: profile.name)
def bench(request: pytest.FixtureRequest) -> Bench:
    """A bench in each profile."""
    return Bench(request.param)


@pytest.fixture
def kernel() -> Bench:
    """A bench as the kernel's driver behaves."""
    return Bench(LINUX_6_12_CORRECTED)


@pytest.fixture
def clean() -> Bench:
    """A bench as one would want it."""
    return Bench(CLEAN)


def page(at: int) -> Address:
    """Address of a page of the window."""
    return BASE + at * PAGE_SIZE


def test_read_shows_what_the_cpu_wrote(bench: Bench) -> None:
    """The first read faults, the second finds everything in the table."""
    bench.cpu_write(0, b"abcd" * PAGE_SIZE)
    handle = bench.open()
    first = handle.read(page(0), 5)
    assert first.data == b"abcd" * PAGE_SIZE + bytes(PAGE_SIZE)
    assert (first.cpages, first.faults) == (5, 1)
    assert handle.read(page(0), 5).faults == 0


def test_read_starts_over_when_the_cpu_takes_a_page_away(bench: Bench) -> None:
    """Unmapping drops the entry; the next read faults, and fails with EFAULT where nothing is mapped."""
    handle = bench.open()
    handle.read(page(0), 4)
    bench.local.call(commands_process.munmap, bench.process, page(1), PAGE_SIZE)
    with pytest.raises(BadAddressError):
        handle.read(page(0), 4)


def test_write_is_seen_by_the_cpu(bench: Bench) -> None:
    """Device writes go to the process's own pages; zero pages are copied first."""
    bench.cpu_read(0, PAGE_SIZE)
    handle = bench.open()
    assert handle.write(page(0), b"w" * 3 * PAGE_SIZE).faults == 1
    assert bench.cpu_read(0, 3 * PAGE_SIZE) == b"w" * 3 * PAGE_SIZE


def test_write_fails_when_the_mapping_is_read_only(bench: Bench) -> None:
    """EPERM, and nothing changes."""
    bench.protect(2, 1, Prot.READ)
    with pytest.raises(AccessDeniedError) as error:
        bench.open().write(page(2), b"w" * PAGE_SIZE)
    assert error.value.errno == errno.EPERM


def test_write_is_refused_when_it_ends_inside_a_page(bench: Bench) -> None:
    """The device writes whole pages; the part was left out, and the write answered as done."""
    with pytest.raises(InvalidRequestError, match="5,000 bytes are no whole pages"):
        bench.open().write(page(0), b"w" * 5000)
    assert bench.cpu_read(0, 1) == b"\0"


class Ending(InProcessHmm):
    """Lets the process end between the two calls that open the device."""

    def insert_notifier(self, mirror_id: MirrorId, start: Address, length: int, *, filtered: bool) -> int:
        """As it is, of a process that has exited."""
        self._local.call(commands_process.exit_process, 1)
        return super().insert_notifier(mirror_id, start, length, filtered=filtered)


def test_open_leaves_no_mirror_when_it_fails(clean: Bench) -> None:
    """Its process ends in the midst of it."""
    card = Card(Ending(clean.local), "unlucky", pages=16)
    with pytest.raises(InvalidRequestError):
        card.open(clean.process)
    assert not clean.local.machine.receivers


@pytest.mark.parametrize(("address", "npages"), [(BASE + 1, 1), (BASE, 0), (-PAGE_SIZE, 1), (BASE, 1 << 60)])
def test_commands_fail_when_the_range_is_malformed(bench: Bench, address: Address, npages: int) -> None:
    """An address inside a page, no pages, and an end beyond all addresses, are EINVAL for every command."""
    handle = bench.open()
    commands: list[Callable[[Address, int], object]] = [
        handle.read, handle.migrate_to_device, handle.migrate_to_system, handle.snapshot,
        handle.exclusive, handle.check_exclusive, handle.release,
    ]  # fmt: skip
    for command in commands:
        with pytest.raises(InvalidRequestError):
            command(address, npages)


@pytest.mark.parametrize("first", [TASK_SIZE - PAGE_SIZE, TASK_SIZE, (1 << 64) - 4 * PAGE_SIZE])
def test_commands_find_nothing_outside_the_address_space(bench: Bench, first: Address) -> None:
    """dmirror_fops_unlocked_ioctl() asks for no address space; hmm_vma_walk_hole() has no VMA there."""
    handle = bench.open()
    for command in (handle.read, handle.read_unlocked):
        with pytest.raises(BadAddressError) as fault:
            command(first, 2)
        assert fault.value.errno == errno.EFAULT
    with pytest.raises(BadAddressError):
        handle.write(first, bytes(2 * PAGE_SIZE))
    for move in (handle.migrate_to_device, handle.migrate_to_system):
        with pytest.raises(InvalidRequestError) as refused:
            move(first, 2)
        assert refused.value.errno == errno.EINVAL
    assert handle.snapshot(first, 2).data == b"\xff\xff"
    with pytest.raises(HmmError) as kept:
        handle.exclusive(first, 2)
    assert kept.value.errno == (errno.EBUSY if bench.cards[0].profile is LINUX_6_12_CORRECTED else errno.EFAULT)
    assert handle.check_exclusive(first, 2).cpages == 0


def test_commands_have_no_buffer_when_the_pages_are_too_many(bench: Bench) -> None:
    """dmirror_bounce_init(): vmalloc() of more than there is memory."""
    with pytest.raises(OutOfFramesError):
        bench.open().read(BASE, 1 << 40)


def test_migrate_moves_pages_and_reads_them_there(bench: Bench) -> None:
    """The reply has the contents; snapshots of the two cards differ; the CPU gets its bytes back."""
    bench.cpu_write(0, b"ab" * PAGE_SIZE)
    handle, other = bench.open(), bench.open(1)
    assert handle.migrate_to_device(page(0), 2).data == b"ab" * PAGE_SIZE
    assert handle.snapshot(page(0), 3).data == bytes([0x22, 0x22, 0x00])
    assert other.snapshot(page(0), 3).data == bytes(3)
    assert handle.write(page(0), b"z" * PAGE_SIZE).faults == 0
    assert bench.cpu_read(0, 1) == b"z"
    assert handle.snapshot(page(0), 2).data == bytes([0x02, 0x22])
    assert handle.migrate_to_system(page(0), 2).cpages == 1


def test_migrate_fails_when_the_table_lacks_a_page(bench: Bench) -> None:
    """Shared memory stays where it is, so that the device has no entry: ENOENT.  With entries it succeeds."""
    bench.map(300, 2, sharing=MapFlag.SHARED | MapFlag.FIXED | MapFlag.ANONYMOUS)
    handle = bench.open()
    with pytest.raises(NoSuchObjectError) as error:
        handle.migrate_to_device(page(300), 2)
    assert error.value.errno == errno.ENOENT
    handle.write(page(300), b"s" * 2 * PAGE_SIZE)
    assert handle.migrate_to_device(page(300), 2).data == b"s" * 2 * PAGE_SIZE


def test_migrate_fails_when_a_part_is_not_readable(bench: Bench) -> None:
    """Holes and mappings without VM_READ are EINVAL; what lies below has moved."""
    bench.cpu_write(0, b"a" * 4 * PAGE_SIZE)
    bench.protect(2, 1, Prot.NONE)
    handle = bench.open()
    with pytest.raises(InvalidRequestError):
        handle.migrate_to_device(page(0), 4)
    assert handle.snapshot(page(0), 4).data == bytes([0x22, 0x22, 0xFF, 0x02])


def test_other_handle_of_the_card_loses_its_entries(bench: Bench) -> None:
    """A migration tells the other handles of the same device, which held pages that are gone."""
    bench.cpu_write(0, b"a" * PAGE_SIZE)
    first, second = bench.open(), bench.open()
    second.read(page(0), 1)
    first.migrate_to_device(page(0), 1)
    assert second.read(page(0), 1).faults == 1
    assert first.read(page(0), 1).faults == 0


def test_close_empties_the_memory_of_the_card(bench: Bench) -> None:
    """Closing any handle moves the pages of all handles back."""
    bench.cpu_write(0, b"a" * 2 * PAGE_SIZE)
    first, second = bench.open(), bench.open()
    first.migrate_to_device(page(0), 2)
    second.close()
    assert first.snapshot(page(0), 2).data == bytes([0x02, 0x02])
    first.migrate_to_device(page(0), 2)
    first.release(page(0), 1)
    assert first.snapshot(page(0), 2).data == bytes([0x02, 0x02])
    bench.local.machine.check()


def test_exclusive_pages_are_the_devices_until_touched(bench: Bench) -> None:
    """CHECK_EXCLUSIVE is EPERM as long as the table has one; the CPU's touch takes it back."""
    bench.cpu_write(0, b"e" * PAGE_SIZE)
    handle = bench.open()
    assert handle.exclusive(page(0), 1).data == b"e" * PAGE_SIZE
    with pytest.raises(AccessDeniedError):
        handle.check_exclusive(page(0), 1)
    assert handle.read(page(0), 1).faults == 0
    assert handle.snapshot(page(0), 1).data == bytes(1)
    assert bench.cpu_read(0, 1) == b"e"
    handle.check_exclusive(page(0), 1)


def test_device_write_revokes_exclusive_pages(bench: Bench) -> None:
    """An exclusive entry does not serve writes: they fault, which gives the page back."""
    handle = bench.open()
    handle.exclusive(page(0), 1)
    assert handle.write(page(0), b"w" * PAGE_SIZE).faults == 1
    handle.check_exclusive(page(0), 1)


def test_exclusive_fails_with_the_errno_of_the_profile_where_hugetlb_memory_is(kernel: Bench, clean: Bench) -> None:
    """check_vma_flags() of gup.c refuses FOLL_SPLIT_PMD there (EOPNOTSUPP); dmirror_exclusive() of 6.12 says EBUSY."""
    for bench, number in ((kernel, errno.EBUSY), (clean, errno.EOPNOTSUPP)):
        bench.map(1024, 512, RW, FIXED | MapFlag.HUGETLB)
        with pytest.raises(HmmError) as raised:
            bench.open().exclusive(page(1024), 1)
        assert raised.value.errno == number


def test_exclusive_fails_with_the_errno_of_the_profile(kernel: Bench, clean: Bench) -> None:
    """The kernel's driver says EBUSY whatever the cause; otherwise it is the cause."""
    for bench, shared, hole in ((kernel, errno.EBUSY, errno.EBUSY), (clean, errno.EOPNOTSUPP, errno.EFAULT)):
        bench.map(300, 1, sharing=MapFlag.SHARED | MapFlag.FIXED | MapFlag.ANONYMOUS)
        for at, number in ((300, shared), (400, hole)):
            with pytest.raises(HmmError) as error:
                bench.open().exclusive(page(at), 1)
            assert error.value.errno == number


def test_commands_fail_when_the_process_has_exited(bench: Bench) -> None:
    """Reads and writes are EFAULT, all that looks at the process's memory EINVAL; no page is exclusive."""
    handle = bench.open()
    handle.exclusive(page(0), 1)
    bench.local.call(commands_process.exit_process, bench.process)
    with pytest.raises(BadAddressError):
        handle.read(page(0), 1)
    with pytest.raises(BadAddressError):
        handle.write(page(0), bytes(PAGE_SIZE))
    for command in (handle.migrate_to_device, handle.migrate_to_system, handle.snapshot, handle.exclusive):
        with pytest.raises(InvalidRequestError):
            command(page(0), 1)
    assert handle.check_exclusive(page(0), 1).cpages == 0
    handle.close()


def test_write_to_a_page_of_the_device_that_became_read_only(kernel: Bench, clean: Bench) -> None:
    """Behind mprotect the kernel's driver fails with EFAULT; otherwise the page comes back and is written."""
    for bench in (kernel, clean):
        bench.cpu_write(0, b"a" * PAGE_SIZE)
        handle = bench.open()
        handle.migrate_to_device(page(0), 1)
        bench.protect(0, 1, RW | Prot.EXEC)
        if bench is kernel:
            with pytest.raises(BadAddressError):
                handle.write(page(0), b"b" * PAGE_SIZE)
            assert handle.read(page(0), 1).data == b"a" * PAGE_SIZE
        else:
            handle.write(page(0), b"b" * PAGE_SIZE)
            assert bench.cpu_read(0, 1) == b"b"


def test_kernel_driver_drops_the_page_behind_an_event(kernel: Bench, clean: Bench) -> None:
    """Its invalidation takes the end of the range as included."""
    for bench, faults in ((kernel, 1), (clean, 0)):
        handle = bench.open()
        handle.read(page(0), 2)
        bench.local.call(commands_process.munmap, bench.process, page(0), PAGE_SIZE)
        assert handle.read(page(1), 1).faults == faults


def test_kernel_driver_faults_in_batches(kernel: Bench) -> None:
    """Batches of 64 pages count from the first page missing; what whole batches brought stays behind an error."""
    handle = kernel.open()
    with pytest.raises(BadAddressError):
        handle.read(page(100), 128)
    assert handle.snapshot(page(100), 100).data == bytes([0x11]) * 100
    assert handle.read(page(100), 64).faults == 0
    assert handle.read(page(164), 36).faults == 1


def test_unlocked_read_waits_for_pages_that_a_handler_brings_in(bench: Bench) -> None:
    """The read that keeps the lock is EFAULT; a process that has exited is EFAULT for both."""
    call, handle = bench.local.call, bench.open()
    fd = call(commands_userfaultfd.create_userfaultfd, bench.process)
    call(commands_userfaultfd.uffd_register, fd, AddressRange(page(0), page(4)), 1)
    asked: list[Address] = []

    def bring(fault: commands_userfaultfd.UserfaultMessage) -> None:
        asked.append(fault.address)
        call(commands_userfaultfd.uffd_copy, fd, fault.address, b"\xab" * PAGE_SIZE)

    bench.local.handle(fd, bring)
    with pytest.raises(BadAddressError):
        handle.read(page(0), 4)
    reply = handle.read_unlocked(page(0), 4)
    assert (reply.cpages, reply.data) == (4, b"\xab" * 4 * PAGE_SIZE)
    assert asked == [page(number) for number in range(4)]
    call(commands_process.exit_process, bench.process)
    with pytest.raises(BadAddressError):
        handle.read_unlocked(page(8), 1)


def test_accesses_of_bytes_reach_parts_of_pages(bench: Bench) -> None:
    """What no ioctl does: any bytes, as one access, faulted in where they are missing."""
    bench.cpu_write(0, b"abcd" * PAGE_SIZE)
    handle = bench.open()
    handle.store(page(1) - 3, b"xyz!")
    assert handle.load(page(1) - 4, 8) == b"axyz!bcd"
    assert bench.cpu_read(0, 3 * PAGE_SIZE)[PAGE_SIZE - 4 : PAGE_SIZE + 4] == b"axyz!bcd"
    bench.protect(1, 1, Prot.READ)
    with pytest.raises(AccessDeniedError):
        handle.store(page(2) - 1, b"--")
    assert handle.load(page(2) - 1, 2) == bench.cpu_read(0, 3 * PAGE_SIZE)[2 * PAGE_SIZE - 1 : 2 * PAGE_SIZE + 1]
    for address, length in ((page(0), 0), (TASK_SIZE - 1, 2)):
        with pytest.raises(InvalidRequestError):
            handle.load(address, length)


class Changing(InProcessHmm):
    """A world in which every range changes before a reply about it is there."""

    def read_retry(self, mirror_id: MirrorId, number: int, sequence: int) -> bool:
        """Always."""
        return True


class Invalidated(InProcessHmm):
    """A world in which every range changes before it is looked at."""

    def range_fault(
        self, mirror_id: MirrorId, number: int, sequence: int, span: AddressRange, default_flags: int
    ) -> Entries:
        """Never."""
        raise RangeBusyError("it changed", address=span.start)


@pytest.mark.parametrize("world", [Changing, Invalidated])
def test_read_gives_up_when_changes_overtake_it_for_too_long(clean: Bench, world: type[InProcessHmm]) -> None:
    """HMM_RANGE_DEFAULT_TIMEOUT in dmirror_range_fault(): EBUSY."""
    handle = hurried(clean, world)
    with pytest.raises(RangeBusyError, match="EBUSY"):
        handle.read(page(0), 1)


def test_snapshot_gives_up_when_changes_overtake_it_for_too_long(clean: Bench) -> None:
    """HMM_RANGE_DEFAULT_TIMEOUT in dmirror_range_snapshot(): EBUSY."""
    handle = hurried(clean, Invalidated)
    with pytest.raises(RangeBusyError, match="EBUSY"):
        handle.snapshot(page(0), 1)


def hurried(bench: Bench, world: type[InProcessHmm]) -> Handle:
    """A handle in a world of its own, which gives up soon."""
    profile = replace(CLEAN, range_timeout_s=0.01)
    return Card(world(bench.local), "hurried", pages=16, profile=profile).open(bench.process)


class Overtaking(InProcessHmm):
    """A world in which the CPU is faster than every reply: it has touched the first page before that is there."""

    process: ProcessId = 0

    def migrate_to_device(self, mirror_id: MirrorId, span: AddressRange, *, compound: bool) -> Migrated:
        """Move, and let the CPU have the first page back."""
        moved = super().migrate_to_device(mirror_id, span, compound=compound)
        self._local.call(commands_process.read_memory, self.process, span.start, 1)
        return moved

    def make_exclusive(self, mirror_id: MirrorId, span: AddressRange) -> Pfns:
        """Take, and let the CPU have the first page back."""
        pfns = super().make_exclusive(mirror_id, span)
        self._local.call(commands_process.read_memory, self.process, span.start, 1)
        return pfns


@pytest.mark.parametrize("profile", [CLEAN, LINUX_6_12_CORRECTED, LINUX_7_CORRECTED], ids=lambda profile: profile.name)
def test_reply_is_not_entered_where_an_event_has_overtaken_it(profile: Profile) -> None:
    """What the CPU has had back before the reply came is faulted again, and not used as if it were the device's."""
    bench = Bench(profile)
    hmm = Overtaking(bench.local)
    hmm.process = bench.process
    handle = Card(hmm, "late", pages=16, profile=profile).open(bench.process)
    bench.cpu_write(0, b"ab" * PAGE_SIZE)
    for take in (handle.migrate_to_device, handle.exclusive):
        with pytest.raises(NoSuchObjectError):
            take(page(0), 2)
        assert handle.load(page(0), 2) == b"ab"
        assert handle.load(page(1), 2) == b"ab"


async def test_ioctls_of_the_process_do_what_those_of_the_kernel_do(shared_daemon: Daemon) -> None:
    """By name, as its control socket takes them; of four devices the first has private memory."""
    async with hmm_client.connect(shared_daemon.target, name="dmirror") as client:
        process = await client.create_process("application")
        start = (await process.mmap(4 * PAGE_SIZE)).address
        await process.write(start, b"hello")
        ioctls = await operations(client)
        handle = (await ioctls["open"](device=0, process=process.id))["handle"]
        read = await ioctls["read"](handle=handle, address=start, npages=1)
        assert (read["cpages"], read["faults"], decode(read["data"])[:5]) == (1, 1, b"hello")
        await ioctls["write"](handle=handle, address=start + PAGE_SIZE, data=encode(b"w" * PAGE_SIZE))
        assert await process.read(start + PAGE_SIZE, 2) == b"ww"
        await ioctls["migrate_to_device"](handle=handle, address=start, npages=2)
        shown = await ioctls["snapshot"](handle=handle, address=start, npages=3)
        assert decode(shown["data"]) == bytes([0x22, 0x22, 0x00])
        await ioctls["close"](handle=handle)
        with pytest.raises(NoSuchObjectError):
            await ioctls["close"](handle=handle)


async def test_ioctls_are_refused_when_there_is_no_such_device_or_handle(shared_daemon: Daemon) -> None:
    """The last device is not number -1; of two that close a handle at a time one finds it gone."""
    async with hmm_client.connect(shared_daemon.target, name="dmirror") as client:
        process = await client.create_process("application")
        ioctls = await operations(client)
        for device in (-1, 4):
            with pytest.raises(NoSuchObjectError, match=f"no device {device}: 0 to 3"):
                await ioctls["open"](device=device, process=process.id)
        handle = (await ioctls["open"](device=0, process=process.id))["handle"]
        closing = [ioctls["close"](handle=handle) for _ in range(2)]
        ends = await asyncio.gather(*closing, return_exceptions=True)
        assert [type(end) for end in ends] == [type(None), NoSuchObjectError]
