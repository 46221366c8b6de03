"""Replaying on a daemon: true recordings show no difference, and whatever is false in one is found."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hmm import pte
from hmm.errors import NoSuchObjectError
from hmm.units import PAGE_SIZE, AddressRange
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot
from hmm_client import Process
from hmm_client.recordings import Call, Interrupted, Lock, Origin, Recording, RecordingError, Unlock, demo_folder
from hmm_client.replay import Replayed, replay
from hmm_client.replay_calls import make
from hmm_client.replay_contents import OF_THE_FILE, STAMP_OFFSET, Stamping, compare_contents
from hmm_client.replay_contents import NoDevices as Nobody
from hmm_client.replay_devices import ReplayDevices

if TYPE_CHECKING:
    from tests.conftest import Daemon

DATA = Path(__file__).parent / "data"
FOLDERS = [demo_folder(), *sorted(path.parent for path in DATA.glob("*/*/strace.log"))]
TRUE = DATA / "real-programs" / "true"
LAYOUT = DATA / "recorded" / "layout"
STACK = 0x4000_0000


@dataclass
class NoDevices:
    """Nobody mirrors the program; what is asked of devices is written down."""

    attached: list[int] = field(default_factory=list)
    followed: list[AddressRange] = field(default_factory=list)
    settled: int = 0

    async def attach(self, process: Process) -> None:
        """Write it down."""
        self.attached.append(process.id)

    async def follow(self, process: Process, span: AddressRange) -> None:
        """Write it down."""
        self.followed.append(span)

    async def idle(self) -> None:
        """Nothing to finish."""

    async def settle(self) -> None:
        """Write it down."""
        self.settled += 1


@pytest.fixture(scope="module")
async def daemon(start_session_daemon: Callable[..., Awaitable[Daemon]]) -> Daemon:
    """One for all replays, which leave nothing behind."""
    return await start_session_daemon()


@pytest.fixture
def altered(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a recording with one text in one of its files replaced."""

    def alter(folder: Path, file: str, old: str, new: str) -> Path:
        copy = Path(shutil.copytree(folder, tmp_path / folder.name))
        text = (copy / file).read_text()
        assert old in text
        (copy / file).write_text(text.replace(old, new, 1))
        return copy

    return alter


async def replayed(folder: Path, daemon: Daemon) -> Replayed:
    """A recording, replayed without devices."""
    return await replay(Recording.load(folder), daemon.connect(), NoDevices())


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
async def test_replay_equals_the_kernel_when_devices_are_attached(daemon: Daemon, folder: Path) -> None:
    """The last layout is the kernel's, every call ends as it did, and no device sees anything forbidden."""
    recording = Recording.load(folder)
    async with ReplayDevices(daemon.connect, 2) as devices:
        done = await replay(recording, daemon.connect(), devices)
    assert done.layout == []
    assert done.outcomes == []
    assert done.unknown == []
    assert len(devices.reports) == 2
    for report in devices.reports:
        assert report.violations == []
        assert min(report.faults, report.pages, report.checks, report.bytes_written, report.events.total()) > 0
        assert 0 < report.acknowledged_us[0] <= report.acknowledged_us[1]


async def test_replay_counts_what_it_did_when_it_ends(daemon: Daemon) -> None:
    """Calls without the exec that began the program; mappings in canonical form; processes; what devices are told."""
    recording = Recording.load(TRUE)
    devices = NoDevices()
    steps = []
    done = await replay(recording, daemon.connect(), devices, steps.append)
    assert (done.program, done.calls, done.vmas, done.processes) == ("true", 14, 19, 1)
    assert (done.differences, done.placed) == (0, [])
    assert sum(steps) == len(recording.plan.steps)
    assert (len(devices.attached), devices.settled) == (1, 1)
    assert {AddressRange(area.start, area.end) for area in recording.initial} <= set(devices.followed)


async def test_replay_leaves_the_files_that_there_were_when_it_ends(daemon: Daemon) -> None:
    """A program's files are made for it, and go with it; of one that somebody has already it takes the bytes there."""
    recording, client = Recording.load(TRUE), daemon.connect()
    theirs, *others = recording.file_sizes()
    kept = await client.open_file(theirs, create=True)
    await replay(recording, client, NoDevices())
    assert (await (await client.open_file(theirs)).status()).size_bytes == (await kept.status()).size_bytes > 0
    assert others
    for name in others:
        with pytest.raises(NoSuchObjectError):
            await client.open_file(name)


async def test_replay_makes_processes_of_children_when_a_program_forks(daemon: Daemon) -> None:
    """Forks, vforks and execs are processes of the daemon, and all have ended when the replay has."""
    devices = NoDevices()
    done = await replay(Recording.load(DATA / "recorded" / "threads"), daemon.connect(), devices)
    assert done.processes == 5
    assert len(set(devices.attached)) == 5
    with pytest.raises(Exception, match="no process"):
        await daemon.connect().process(devices.attached[0]).maps()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "rw-p 00000000 00:00 0                          [stack]",
            "r--p 00000000 00:00 0                          [stack]",
        ),
        ("/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", "/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.9"),
    ],
    ids=["permissions", "name"],
)
async def test_replay_finds_one_difference_when_the_last_layout_is_false(
    daemon: Daemon, altered: Callable[..., Path], old: str, new: str
) -> None:
    """A line of maps.final that is not what the calls made is reported with both sides."""
    done = await replayed(altered(TRUE, "maps.final", old, new), daemon)
    assert done.differences == len(done.layout) == 1
    (difference,) = done.layout
    assert difference.expected is not None
    assert difference.actual is not None


@pytest.mark.parametrize(
    ("old", "new", "expected", "found"),
    [
        ("brk(0x5633ec6d16a0)               = 0x5633ec6d16a0", "brk(0x8000)  = 0x8000", "0x8000", "0x5633ec6b9000"),
        ("555df87000, 40960, MADV_DONTNEED) = -1", "555df87000, 4096, MADV_DONTNEED) = -1", "ENOMEM", "success"),
        ("7f555df73001, 4096)      = -1 EINVAL (Invalid argument)", "7f555df73001, 4096) = 0", "success", "EINVAL"),
        ("= 0x7f555df87000", "= 0x7f555e17b000", "success", "EEXIST"),
    ],
    ids=["value", "errno", "success", "place"],
)
async def test_replay_finds_a_difference_when_a_call_ended_otherwise(
    daemon: Daemon, altered: Callable[..., Path], old: str, new: str, expected: str, found: str
) -> None:
    """A call that ends otherwise than the log says is reported with its line."""
    folder = altered(LAYOUT, "strace.log", old, new)
    done = await replayed(folder, daemon)
    first = done.outcomes[0]
    assert (first.expected, first.found.split(":")[0]) == (expected, found)
    assert new.split(maxsplit=1)[0] in (folder / "strace.log").read_text().splitlines()[first.line - 1]


async def test_replay_maps_huge_pages_when_the_daemon_sets_none_aside(
    daemon: Daemon, altered: Callable[..., Path]
) -> None:
    """How many the recorded machine had does not matter; unmapping a part of one failed there and is not tried."""
    end = "21460 exit_group(0)"
    huge = "PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS|MAP_HUGETLB|21<<MAP_HUGE_SHIFT, -1, 0"
    calls = (
        f"21460 mmap(NULL, 4194304, {huge}) = 0x7f0000000000\n"
        "21460 munmap(0x7f0000000000, 4096) = -1 EINVAL (Invalid argument)\n"
        "21460 munmap(0x7f0000000000, 4194304) = 0\n"
    )
    done = await replayed(altered(TRUE, "strace.log", end, calls + end), daemon)
    assert (done.outcomes, done.layout) == ([], [])


@pytest.mark.parametrize(
    ("call", "result", "end"),
    [
        ("12288, 20480, 0)", 0x7F0000000000, 5),
        ("12288, 20480, MREMAP_MAYMOVE)", 0x7E0000000000, 5),
        ("12288, 20480, MREMAP_MAYMOVE|MREMAP_FIXED, 0x7e0000000000)", 0x7E0000000000, 5),
        ("12288, 8192, MREMAP_MAYMOVE|MREMAP_FIXED, 0x7e0000000000)", 0x7E0000000000, 2),
        ("12288, 12288, MREMAP_MAYMOVE|MREMAP_DONTUNMAP)", 0x7E0000000000, 3),
    ],
    ids=["grow in place", "grow and move", "grow and be put", "shrink and be put", "stay mapped"],
)
async def test_replay_moves_touched_and_untouched_memory_when_it_is_one_mapping_there(
    daemon: Daemon, altered: Callable[..., Path], call: str, result: int, end: int
) -> None:
    """mm/vma.c, is_mergeable_anon_vma(): since Linux 6.16 memory without pages becomes one mapping with what has some.

    What mlock has brought in stays a mapping of its own here when it is unlocked.
    """
    exit_line = "21460 exit_group(0)                     = ?"
    calls = (
        "21460 mmap(0x7f0000000000, 12288, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x7f0000000000\n"
        "21460 mlock(0x7f0000001000, 4096) = 0\n"
        "21460 munlock(0x7f0000001000, 4096) = 0\n"
        f"21460 mremap(0x7f0000000000, {call} = {result:#x}\n"
        f"21460 mprotect({result:#x}, {end * 4096}, PROT_READ) = 0\n"
        f"21460 mprotect({result:#x}, {(end + 1) * 4096}, PROT_READ) = -1 ENOMEM (Cannot allocate memory)\n"
        f"21460 munmap({result:#x}, {end * 4096}) = 0\n"
        "21460 munmap(0x7f0000000000, 12288) = 0\n"
    )
    done = await replayed(altered(TRUE, "strace.log", exit_line, calls + exit_line), daemon)
    assert (done.outcomes, done.layout) == ([], [])


@pytest.mark.parametrize(
    ("prot", "npages", "locked"),
    [(Prot.READ, 2, True), (Prot.READ, 1, False), (Prot.NONE, 1, True)],
    ids=["hole", "limit", "no access"],
)
async def test_replay_locks_as_far_as_the_call_came_when_it_failed(
    daemon: Daemon, prot: Prot, npages: int, locked: bool
) -> None:
    """mm/mlock.c, do_mlock(): a limit is met first, a hole at its place, pages that cannot come in when all is locked.

    munlock() goes up to the hole as well.
    """
    process = await daemon.connect().create_process("p")
    start = (await process.mmap(4096, prot)).address
    await process.munmap(start + 4096, 4096)
    origin = Origin(0, Call(1, "mlock", (), None, None, 1, 1, ""))
    await make(process, Interrupted(origin, "ENOMEM", Lock(origin, start, npages * 4096, 0)), {})
    assert ("lo" in (await process.smaps())[0].vm_flags) == locked
    await process.mlock(start, 4096, 1)
    await make(process, Interrupted(origin, "ENOMEM", Unlock(origin, start, 8192)), {})
    assert "lo" not in (await process.smaps())[0].vm_flags


async def test_replay_asks_msync_for_no_locks_when_kernels_differ_in_them(
    daemon: Daemon, altered: Callable[..., Path]
) -> None:
    """mm/mremap.c, move_vma(): 6.12.117 splits a locked mapping before MREMAP_DONTUNMAP unlocks a part, others not."""
    exit_line = "21460 exit_group(0)                     = ?"
    calls = (
        "mmap(0x7f0000000000, 8192, PROT_READ, MAP_PRIVATE|MAP_ANONYMOUS|MAP_LOCKED, -1, 0) = 0x7f0000000000",
        "mremap(0x7f0000000000, 4096, 4096, MREMAP_MAYMOVE|MREMAP_DONTUNMAP) = 0x7e0000000000",
        "msync(0x7f0000001000, 4096, MS_ASYNC|MS_INVALIDATE) = 0",
        "msync(0x7f0000001000, 8192, MS_ASYNC|MS_INVALIDATE) = -1 ENOMEM (Cannot allocate memory)",
        "munmap(0x7e0000000000, 4096) = 0",
        "munmap(0x7f0000000000, 8192) = 0",
    )
    text = "".join(f"21460 {call}\n" for call in calls)
    done = await replayed(altered(TRUE, "strace.log", exit_line, text + exit_line), daemon)
    assert (done.outcomes, done.layout) == ([], [])


async def test_replay_finds_a_difference_when_moved_memory_is_not_there(
    daemon: Daemon, altered: Callable[..., Path]
) -> None:
    """mm/mremap.c: what is not mapped, or ends too early, cannot be moved."""
    exit_line = "21460 exit_group(0)                     = ?"
    calls = (
        "21460 mmap(0x7f0000000000, 4096, PROT_READ, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x7f0000000000\n"
        "21460 mremap(0x7f0000000000, 8192, 12288, MREMAP_MAYMOVE) = 0x7e0000000000\n"
        "21460 mremap(0x7f0000001000, 4096, 12288, MREMAP_MAYMOVE) = 0x7d0000000000\n"
        "21460 munmap(0x7f0000000000, 4096) = 0\n"
    )
    done = await replayed(altered(TRUE, "strace.log", exit_line, calls + exit_line), daemon)
    assert [outcome.found.split(":")[0] for outcome in done.outcomes] == ["EFAULT", "EFAULT"]


async def test_replay_maps_low_addresses_when_the_program_had_them(
    daemon: Daemon, altered: Callable[..., Path]
) -> None:
    """fs/binfmt_elf.c, load_elf_binary(): MMAP_PAGE_ZERO maps page 0; and root may ask for it (CAP_SYS_RAWIO)."""
    exit_line = "21460 exit_group(0)                     = ?"
    calls = (
        "mmap(NULL, 4096, PROT_READ, MAP_PRIVATE|MAP_FIXED|MAP_ANONYMOUS, -1, 0) = 0",
        "fork() = 7",
        "mmap(0x8000, 4096, PROT_READ, MAP_PRIVATE|MAP_FIXED_NOREPLACE|MAP_ANONYMOUS, -1, 0) = 0x8000",
        "mremap(0x8000, 4096, 4096, MREMAP_MAYMOVE|MREMAP_FIXED, 0x2000) = 0x2000",
        "munmap(0x2000, 4096) = 0",
    )
    text = "".join(f"21460 {call}\n" for call in calls)
    child = "7 mmap(0x3000, 4096, PROT_READ, MAP_PRIVATE|MAP_FIXED|MAP_ANONYMOUS, -1, 0) = 0x3000\n"
    folder = altered(TRUE, "strace.log", exit_line, text + child + exit_line)
    for name in ("maps.initial", "maps.final"):
        perms = "r-xp" if name == "maps.initial" else "r--p"
        page = f"00000000-00001000 {perms} 00000000 00:00 0 \n"
        (folder / name).write_text(page + (folder / name).read_text())
    async with ReplayDevices(daemon.connect, 1, 0) as devices:
        done = await replay(Recording.load(folder), daemon.connect(), devices)
    assert (done.outcomes, done.layout) == ([], [])
    assert devices.reports[0].violations == []


async def test_replay_counts_a_placement_when_the_kernel_chose_another_place(daemon: Daemon) -> None:
    """Where the daemon would have put a mapping, here into a hole that the kernel did not have, is no difference."""
    recording = Recording.load(TRUE)
    initial = tuple(area for area in recording.initial if area.name != "[vvar]")
    done = await replay(dataclasses.replace(recording, initial=initial), daemon.connect(), NoDevices())
    assert len(done.placed) > 0
    assert done.outcomes == []
    assert {difference.expected.name for difference in done.layout if difference.expected} == {""}


@pytest.mark.parametrize(("entered_first", "differences"), [(True, 0), (False, 1)])
async def test_replay_finds_the_last_layout_when_threads_went_on_after_it_was_read(
    daemon: Daemon, altered: Callable[..., Path], entered_first: bool, differences: int
) -> None:
    """maps.final was read while exit_group was held; a thread that maps memory before that changed it, later not."""
    entered, mapped = (
        "21460 exit_group(0 <unfinished ...>",
        "7 mmap(NULL, 4096, PROT_READ, MAP_PRIVATE|MAP_ANON, -1, 0)",
    )
    lines = [entered, f"{mapped} = 0x7f0000000000"]
    text = "\n".join(lines if entered_first else reversed(lines))
    thread = "21460 clone(child_stack=0x1, flags=CLONE_VM|CLONE_THREAD) = 7"
    old = "21460 exit_group(0)                     = ?"
    folder = altered(TRUE, "strace.log", old, f"{thread}\n{text}\n21460 <... exit_group resumed>) = ?")
    done = await replayed(folder, daemon)
    assert (done.differences, done.vmas) == (differences, 19 + differences)


async def test_replay_reports_a_call_when_nobody_knows_what_it_does(
    daemon: Daemon, altered: Callable[..., Path]
) -> None:
    """A call that is not known is neither dropped silently nor a difference."""
    done = await replayed(altered(TRUE, "strace.log", "brk(NULL)", "mnovel(NULL)"), daemon)
    assert [line.split(": ")[1].split("(")[0] for line in done.unknown] == ["mnovel"]


async def test_replay_refuses_a_recording_when_its_end_is_not_known(
    daemon: Daemon, altered: Callable[..., Path]
) -> None:
    """A first process that execs again has mapped what was not recorded: there is nothing to compare."""
    folder = altered(TRUE, "strace.log", "brk(NULL)", 'execve("/bin/false", [], 0x7ff) = 0\n21460 brk(NULL)')
    with pytest.raises(RecordingError, match="cannot be compared"):
        await replayed(folder, daemon)


async def test_settle_finds_a_violation_when_a_device_has_entries_of_its_own(daemon: Daemon) -> None:
    """A translation that only the device has would be memory that it can still reach after it was taken back."""
    process = await daemon.connect().create_process("p")
    mapped = await process.mmap(4096)
    async with ReplayDevices(daemon.connect, 1) as devices:
        await devices.attach(process)
        await devices.follow(process, mapped.span)
        await devices.settle()
        assert devices.reports[0].violations == []
        ((_, _, device),) = devices._served
        device.table(device.mirrors[0]).pages.set(mapped.address, pte.pte_from_pfn(77) | pte.WRITE)
        await devices.settle()
    assert len(devices.reports[0].violations) == 1
    assert f"{mapped.address:#x}" in devices.reports[0].violations[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "folder", [demo_folder(), *(DATA / "recorded" / name for name in ("shell", "state"))], ids=lambda path: path.name
)
async def test_replay_leaves_the_same_contents_when_devices_migrate_the_program(
    shared_daemon: Daemon, folder: Path
) -> None:
    """Small devices that take its pages and give them back, by frames and carried, change nothing that it can see."""
    recording = Recording.load(folder)
    client = shared_daemon.connect("program")
    alone = Stamping(client, Nobody())
    await replay(recording, client, alone)
    async with ReplayDevices(shared_daemon.connect, 2, memory_pages=24) as devices:
        among = Stamping(client, devices)
        replayed = await replay(recording, client, among)
    assert replayed.differences == 0
    assert [report.violations for report in devices.reports] == [[], []]
    assert all(report.migrated for report in devices.reports)
    assert alone.contents
    assert compare_contents(alone.contents, among.contents) == []


async def test_program_writes_only_where_it_has_memory(shared_daemon: Daemon) -> None:
    """A write into the hole below a stack would make it grow, which the recorded program did not."""
    client = shared_daemon.connect("program")
    process = await client.create_process("program")
    prot, flags = Prot.READ | Prot.WRITE, MapFlag.PRIVATE | MapFlag.ANONYMOUS | MapFlag.FIXED
    await process.mmap(PAGE_SIZE, prot, flags | MapFlag.GROWSDOWN, address=STACK)
    stamping = Stamping(client, Nobody())
    await stamping.attach(process)
    await stamping.follow(process, AddressRange(STACK - 2 * PAGE_SIZE, STACK + PAGE_SIZE))
    await stamping.settle()
    (stack,) = (await process.maps()).lines
    assert (stack.start, stack.end) == (STACK, STACK + PAGE_SIZE)
    assert list(stamping.contents) == [STACK + STAMP_OFFSET]


async def test_contents_of_a_private_file_page_are_compared_if_the_program_wrote_them(shared_daemon: Daemon) -> None:
    """Until somebody has written to it the page is the file's, and a device that writes may come before another CPU."""
    client = shared_daemon.connect("program")
    process, file = await client.create_process("program"), await client.open_file("stamped", create=True)
    await file.truncate(3 * PAGE_SIZE)
    prot = Prot.READ | Prot.WRITE
    shared = (await process.mmap(3 * PAGE_SIZE, prot, MapFlag.SHARED, file=file)).span
    stamping = Stamping(client, Nobody())
    await stamping.attach(process)
    await stamping.follow(process, shared)
    fixed = MapFlag.PRIVATE | MapFlag.FIXED
    private = (await process.mmap(2 * PAGE_SIZE, prot, fixed, address=shared.start, file=file)).span
    await stamping.follow(process, AddressRange(private.start, private.start + PAGE_SIZE))
    await file.write(PAGE_SIZE + STAMP_OFFSET, b"by files")
    await stamping.settle()
    assert list(stamping.contents.values()) == ["02" + 14 * "0", OF_THE_FILE, "01" + 14 * "0"]
    assert compare_contents(stamping.contents, dict.fromkeys(stamping.contents, "00"))[-1].startswith("at ")
    assert len(compare_contents(stamping.contents, dict.fromkeys(stamping.contents, "00"))) == 2


def test_contents_differ_when_a_page_was_lost_or_changed() -> None:
    """What reads otherwise, or not at all, is named with both values."""
    expected = {0x1000: "01", 0x2000: "02", 0x3000: "03"}
    found = compare_contents(expected, {0x1000: "01", 0x2000: "00", 0x4000: "04"})
    assert [line.split(" the program")[0] for line in found] == ["at 0x2000", "at 0x3000", "at 0x4000"]
