"""Commands of processes and files: looking things up, and what concerns who is there."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest
from machine_world import World

from hmm import commands_file as files
from hmm import commands_process as processes
from hmm.address_space import Thp
from hmm.errors import AccessDeniedError, ConflictError, InvalidRequestError, NoSuchObjectError, OutOfFramesError
from hmm.file import FileKind
from hmm.limits import Limits
from hmm.local import Local
from hmm.machine import Machine
from hmm.units import PAGE_SIZE, TASK_SIZE, AddressRange
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot, VmFlag

START = 0x1000_0000
RW = Prot.READ | Prot.WRITE
FIXED = MapFlag.PRIVATE | MapFlag.ANONYMOUS | MapFlag.FIXED


@pytest.fixture
def local() -> Local:
    """A machine with process 1 and eight writable pages in it."""
    made = Local(Machine(Limits(frames=256, device_frames=0, files=3)))
    pid = made.call(processes.create_process, "p", brk_start=START - 16 * PAGE_SIZE)
    made.call(processes.mmap, pid, START, 8 * PAGE_SIZE, RW, FIXED)
    return made


@pytest.mark.parametrize("options", [{"mmap_base": 5}, {"brk_start": 1}, {"mmap_base": TASK_SIZE}])
def test_create_process_is_refused_when_an_address_is_none(local: Local, options: dict[str, int]) -> None:
    """EINVAL, and there is no process more."""
    with pytest.raises(InvalidRequestError):
        local.call(processes.create_process, **options)
    assert list(local.machine.processes) == [1]


def test_failed_fork_leaves_no_child_and_no_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """dup_mm(): without directories for the child's table there is no child."""
    local = Local(Machine(Limits(frames=256, device_frames=0, directories=4)))
    pid = local.call(processes.create_process)
    local.call(processes.mmap, pid, START, PAGE_SIZE, RW, FIXED | MapFlag.POPULATE)
    local.machine.limits = Limits(frames=256, device_frames=0, directories=2)
    with pytest.raises(OutOfFramesError):
        local.call(processes.fork, pid)
    assert (list(local.machine.processes), list(local.machine.spaces)) == ([pid], [1])
    local.machine.check()


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        (processes.brk, (START - 8 * PAGE_SIZE,), START - 8 * PAGE_SIZE),
        (processes.msync, (START, PAGE_SIZE, 4), 0),
        (processes.mlock, (START, PAGE_SIZE), 0),
        (processes.munlock, (START, PAGE_SIZE), 0),
        (processes.mlockall, (1,), 0),
        (processes.munlockall, (), 0),
        (processes.mprotect, (START, PAGE_SIZE, Prot.READ), 0),
        (processes.mremap, (START, PAGE_SIZE, PAGE_SIZE), START),
        (processes.madvise, (START, PAGE_SIZE, 4), 0),
    ],
)
def test_call_reaches_the_module_of_its_name(
    local: Local, command: Callable[..., Any], arguments: tuple[Any, ...], expected: int
) -> None:
    """Each looks the process up and leaves the rest to its module."""
    assert local.call(command, 1, *arguments) == expected
    with pytest.raises(NoSuchObjectError) as caught:
        local.call(command, 9, *arguments)
    assert caught.value.errno == errno.ESRCH


def test_mincore_and_one_byte_per_page(local: Local) -> None:
    """Pages written are resident; a byte at an offset of each page is read and written."""
    span = AddressRange(START, START + 3 * PAGE_SIZE)
    assert local.call(processes.write_pages, 1, span, 7, b"\x01\x02\x03").done == 3
    assert local.call(processes.read_pages, 1, span, 7).data == b"\x01\x02\x03"
    assert local.call(processes.mincore, 1, START, 4 * PAGE_SIZE).tolist() == [1, 1, 1, 0]
    with pytest.raises(InvalidRequestError, match="2 values for the 3 pages"):
        local.call(processes.write_pages, 1, span, 0, b"\x01\x02")


def test_mmap_tells_where_the_kernel_would_have_put_it(local: Local) -> None:
    """With an address: the placement without one; without: the address itself; 0 when nothing fits."""
    fixed = local.call(processes.mmap, 1, START + (1 << 30), PAGE_SIZE, RW, FIXED)
    free = local.call(processes.mmap, 1, 0, PAGE_SIZE, RW, FIXED & ~MapFlag.FIXED)
    assert fixed.address == START + (1 << 30)
    assert fixed.placement == free.address == free.placement
    with pytest.raises(OutOfFramesError):
        local.call(processes.mmap, 1, START, TASK_SIZE, RW, MapFlag.PRIVATE | MapFlag.ANONYMOUS)


def test_vfork_shares_the_space_until_exec(local: Local) -> None:
    """CLONE_VFORK: what the child writes the parent sees, until the child execs."""
    child = local.call(processes.vfork, 1)
    local.call(processes.write_memory, child, START, b"shared")
    assert local.call(processes.read_memory, 1, START, 6).data == b"shared"
    local.call(processes.exec_process, child, "next")
    assert local.machine.spaces[1].users == 1
    local.call(processes.exit_process, child)
    assert list(local.machine.processes) == [1]


def test_low_addresses_stay_allowed_when_a_process_forks_or_execs(local: Local) -> None:
    """CAP_SYS_RAWIO is inherited, and kept by root's exec; whoever has it not gets EPERM: cap_mmap_addr()."""
    flags = MapFlag.PRIVATE | MapFlag.ANONYMOUS | MapFlag.FIXED
    privileged = local.call(processes.create_process, "root", low_addresses=True)
    child = local.call(processes.fork, privileged)
    local.call(processes.exec_process, privileged, "next")
    for process in (privileged, child):
        assert local.call(processes.mmap, process, 0, PAGE_SIZE, RW, flags).address == 0
        local.call(processes.write_memory, process, 0, b"page 0")
    with pytest.raises(AccessDeniedError, match="below mmap_min_addr"):
        local.call(processes.mmap, 1, 0, PAGE_SIZE, RW, flags)


def test_file_stays_when_it_is_closed_while_a_call_works_on_it() -> None:
    """fdget(), fget(): what a call has begun with lasts until it ends, and then goes if nothing else holds it."""
    world = World()
    file = world.do(files.open_file, "f", create=True)
    world.do(files.write_file, file, 0, b"bytes")
    world.do(processes.write_memory, world.pid, START, b"x")
    mapping = world.start(processes.mmap, world.pid, START, PAGE_SIZE, RW, MapFlag.SHARED | MapFlag.FIXED, file, 0)
    (told,) = world.sent()
    world.do(files.unlink_file, "f")
    world.do(files.close_file, file)
    world.machine.answer(told.mirror_id, told.sequence)
    world.settle()
    assert mapping.done
    assert world.do(processes.read_memory, world.pid, START, 5).data == b"bytes"
    truncation = world.start(files.truncate_file, file, 0)
    world.do(processes.munmap, world.pid, START, 16 * PAGE_SIZE)
    world.settle()
    assert truncation.done
    assert world.machine.frames.statistics()[0].used == 0


def test_file_is_opened_by_name_and_lives_as_long_as_anything_holds_it(local: Local) -> None:
    """A name, a handle, a mapping: the bytes go with the last of them."""
    file = local.call(files.open_file, "f", create=True)
    assert local.call(files.open_file, "f") == file
    local.call(files.write_file, file, 0, b"bytes")
    local.call(processes.mmap, 1, START, PAGE_SIZE, RW, MapFlag.SHARED | MapFlag.FIXED, file, 0)
    assert files.status(local.machine, file).name == "f"
    local.call(files.unlink_file, "f")
    assert files.status(local.machine, file) == files.FileStatus(file, "", FileKind.FILE, 5, 1, 2)
    local.call(files.close_file, file)
    local.call(files.close_file, file)
    assert local.call(processes.read_memory, 1, START, 5).data == b"bytes"
    local.call(processes.munmap, 1, START, PAGE_SIZE)
    files.forget_unused(local.machine)
    with pytest.raises(NoSuchObjectError, match="no file"):
        local.call(files.read_file, file, 0, 1)
    assert local.machine.frames.statistics()[0].used == 0


def test_open_file_errors_are_those_of_open(local: Local) -> None:
    """ENOENT, EEXIST, EINVAL, and ENOMEM at the limit."""
    with pytest.raises(NoSuchObjectError) as missing:
        local.call(files.open_file, "nothing")
    assert missing.value.errno == errno.ENOENT
    local.call(files.open_file, "f", create=True)
    with pytest.raises(ConflictError) as there:
        local.call(files.open_file, "f", create=True, exclusive=True)
    assert there.value.errno == errno.EEXIST
    with pytest.raises(InvalidRequestError):
        local.call(files.open_file, "", create=True)
    with pytest.raises(NoSuchObjectError):
        local.call(files.unlink_file, "nothing")
    for name in ("g", "h"):
        local.call(files.open_file, name, create=True)
    with pytest.raises(OutOfFramesError):
        local.call(files.open_file, "i", create=True)


def test_limit_of_files_is_not_reached_by_shared_memory_that_is_gone(local: Local) -> None:
    """What nobody holds any more is forgotten before the limit counts."""
    shared = MapFlag.SHARED | MapFlag.ANONYMOUS | MapFlag.FIXED
    for _ in range(5):
        local.call(processes.mmap, 1, START, PAGE_SIZE, RW, shared)
        local.call(processes.munmap, 1, START, PAGE_SIZE)
    assert local.call(files.open_file, "f", create=True)


def test_close_file_is_ebadf_when_no_handle_is_open(local: Local) -> None:
    """A name is no handle; a file without either is gone at once."""
    file = local.call(files.open_file, "f", create=True)
    local.call(files.close_file, file)
    with pytest.raises(NoSuchObjectError) as caught:
        local.call(files.close_file, file)
    assert caught.value.errno == errno.EBADF
    local.call(files.unlink_file, "f")
    assert not local.machine.files


def test_device_file_has_its_name_and_the_flags_of_its_driver(local: Local) -> None:
    """What a driver's mmap adds to the VMA."""
    file = local.call(files.open_device_file, "/dev/thing", VmFlag.IO | VmFlag.PFNMAP)
    assert files.status(local.machine, file).name == "/dev/thing"
    local.call(processes.mmap, 1, START, PAGE_SIZE, RW, MapFlag.SHARED | MapFlag.FIXED, file, 0)
    vma = local.machine.spaces[1].vmas.find(START)
    assert vma is not None
    assert vma.has(VmFlag.PFNMAP)
    with pytest.raises(NoSuchObjectError):
        local.call(files.punch_file, file, 0, PAGE_SIZE)


def test_huge_pages_are_split_below_the_end_of_all_addresses() -> None:
    """The last gigabyte of addresses and the whole address space have ends that no page table entry stands for."""
    local = Local(Machine(Limits(frames=4096, device_frames=0)))
    process = local.call(processes.create_process, "top", thp=Thp.ALWAYS)
    size = 4 << 20
    start = (TASK_SIZE - 2 * size) & -(2 << 20)
    local.call(processes.mmap, process, start, size, RW, FIXED)
    local.call(processes.touch, process, AddressRange(start, start + size), write=True)
    local.call(processes.munmap, process, start + (1 << 20), 2 << 20)
    local.call(processes.exit_process, process)
    local.machine.check()
    assert local.machine.frames.regions[0].used == 0
