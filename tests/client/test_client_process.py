"""The handles of the process side, against a real daemon: values come back as values, errors as errors."""

from __future__ import annotations

import errno as errnos
import os
from typing import TYPE_CHECKING

import numpy as np
import pytest

import hmm_client
from hmm import pagemap
from hmm.errors import (
    AccessDeniedError,
    BadAddressError,
    ConflictError,
    InvalidRequestError,
    NoSuchObjectError,
    SegmentationFault,
    Signal,
)
from hmm.units import PAGE_SIZE
from hmm_client import Advice, FileKind, MapFlag, MremapFlag, MsyncFlag, Process, Prot, calls
from hmm_client.results import Mapped, PageMap

if TYPE_CHECKING:
    from tests.conftest import Daemon


async def test_mmap_returns_where_it_is_and_maps_shows_it(process: Process) -> None:
    """What is mapped stands in the process's maps, with the kernel's permissions, until it is unmapped."""
    mapped = await process.mmap(3 * PAGE_SIZE + 1, Prot.READ)
    assert mapped.operation_id > 0
    assert mapped.span.npages == 4
    assert mapped.page(1).start == mapped.address + PAGE_SIZE
    (line,) = (await process.maps()).lines
    assert (line.span, line.permissions, line.file_id) == (mapped.span, "r--p", 0)
    await process.munmap(mapped.address, mapped.length)
    assert (await process.maps()).lines == ()


async def test_calls_change_mappings_as_the_kernel_does(process: Process) -> None:
    """One of each: mprotect, madvise, mremap, mlock, msync, mincore, brk."""
    mapped = await process.mmap(4 * PAGE_SIZE)
    await process.write(mapped.address, b"x" * (2 * PAGE_SIZE))
    assert (await process.mincore(mapped.address, 4 * PAGE_SIZE)).tolist() == [True, True, False, False]
    await process.mprotect(mapped.address, PAGE_SIZE, Prot.READ)
    assert [line.permissions for line in (await process.maps()).lines] == ["r--p", "rw-p"]
    await process.madvise(mapped.address, PAGE_SIZE, Advice.DONTNEED)
    assert await process.read(mapped.address, 1) == b"\0"
    await process.mprotect(mapped.address, PAGE_SIZE, Prot.READ | Prot.WRITE)
    moved = await process.mremap(mapped.address, 4 * PAGE_SIZE, 1024 * PAGE_SIZE, MremapFlag.MAYMOVE)
    assert await process.read(moved.address + PAGE_SIZE, 1) == b"x"
    await process.mlock(moved.address, 8 * PAGE_SIZE)
    await process.munlock(moved.address, 8 * PAGE_SIZE)
    await process.mlockall(hmm_client.MclFlag.FUTURE)
    await process.munlockall()
    await process.msync(moved.address, 8 * PAGE_SIZE, MsyncFlag.SYNC)
    assert (await process.brk()).address == 0


async def test_brk_moves_the_heap_when_there_is_one(client: hmm_client.Client) -> None:
    """The break is a value: where it is, and where it is after it was moved."""
    process = await client.create_process("heap", brk_start=0x5555_0000_0000)
    assert (await process.brk()).address == 0x5555_0000_0000
    assert (await process.brk(0x5555_0001_0000)).address == 0x5555_0001_0000
    maps = await process.maps()
    assert (maps.brk_start, maps.brk_end) == (0x5555_0000_0000, 0x5555_0001_0000)


async def test_call_raises_the_kernels_errno_when_it_fails(process: Process) -> None:
    """Errors are those of the core, with errno and address; effects below the address stay."""
    with pytest.raises(InvalidRequestError) as invalid:
        await process.mmap(0)
    assert invalid.value.errno == errnos.EINVAL
    mapped = await process.mmap(3 * PAGE_SIZE)
    await process.munmap(mapped.page(1).start, PAGE_SIZE)
    with pytest.raises(BadAddressError) as hole:
        await process.mprotect(mapped.address, 3 * PAGE_SIZE, Prot.READ)
    assert (hole.value.errno, hole.value.address) == (errnos.ENOMEM, mapped.page(1).start)
    assert [line.permissions for line in (await process.maps()).lines] == ["r--p", "rw-p"]
    fixed = MapFlag.PRIVATE | MapFlag.ANONYMOUS | MapFlag.FIXED_NOREPLACE
    with pytest.raises(ConflictError, match="EEXIST"):
        await process.mmap(PAGE_SIZE, flags=fixed, address=mapped.address)


async def test_access_raises_a_segmentation_fault_when_a_signal_comes(process: Process) -> None:
    """A signal is an exception with its address: what lies below was done."""
    mapped = await process.mmap(2 * PAGE_SIZE)
    with pytest.raises(SegmentationFault) as caught:
        await process.write(mapped.address + PAGE_SIZE, b"y" * (2 * PAGE_SIZE))
    assert (caught.value.signal, caught.value.address) == (Signal.SEGV_MAPERR, mapped.span.end)
    assert await process.read(mapped.span.end - 1, 1) == b"y"
    with pytest.raises(SegmentationFault):
        await process.touch(0, 1, write=False)
    await process.mprotect(mapped.address, PAGE_SIZE, Prot.READ)
    with pytest.raises(SegmentationFault) as denied:
        await process.write(mapped.address, b"z")
    assert denied.value.signal is Signal.SEGV_ACCERR


async def test_memory_of_any_size_is_read_and_written_when_it_needs_several_messages(process: Process) -> None:
    """Beyond 1 MiB data travels in parts; a signal in a later part stops it there."""
    mapped = await process.mmap(5 << 20)
    data = np.random.default_rng(1).bytes((5 << 20) - 7)
    await process.write(mapped.address + 7, data)
    assert await process.read(mapped.address + 7, len(data)) == data
    with pytest.raises(SegmentationFault) as caught:
        await process.write(mapped.address + (3 << 20), bytes(3 << 20))
    assert caught.value.address == mapped.span.end
    with pytest.raises(SegmentationFault):
        await process.read(mapped.address + (3 << 20), 3 << 20)


async def test_pages_are_accessed_until_the_first_signal(process: Process) -> None:
    """One byte in each page: a signal is a result here, with the pages before it done."""
    mapped = await process.mmap(3 * PAGE_SIZE)
    written = await process.access_pages(mapped.address + 5, 3, b"abc")
    assert (written.done, written.signal) == (3, None)
    seen = await process.access_pages(mapped.address + 5, 4)
    assert (seen.done, seen.data, seen.signal) == (3, b"abc", Signal.SEGV_MAPERR)
    assert seen.address == mapped.span.end + 5
    assert (await process.touch(mapped.address, 3 * PAGE_SIZE, write=True)).done == 3


async def test_children_are_processes(process: Process) -> None:
    """fork copies, vfork and threads share; exec and exit leave."""
    mapped = await process.mmap(PAGE_SIZE)
    await process.write(mapped.address, b"parent")
    child, thread, vforked = await process.fork(), await process.thread(), await process.vfork()
    await child.write(mapped.address, b"child")
    await thread.write(mapped.address, b"thread")
    assert await process.read(mapped.address, 6) == b"thread"
    assert await child.read(mapped.address, 6) == b"childt"
    await vforked.exec("new")
    assert (await vforked.maps()).lines == ()
    await child.exit()
    with pytest.raises(NoSuchObjectError) as gone:
        await child.read(mapped.address, 1)
    assert gone.value.errno == errnos.ESRCH


async def test_execute_returns_every_outcome_when_calls_fail(client: hmm_client.Client, process: Process) -> None:
    """A batch is one round trip; errors stand where values would."""
    pid = process.id
    (mapped,) = await client.execute([calls.mmap(pid, 2 * PAGE_SIZE)])
    assert isinstance(mapped.value, Mapped)
    address = mapped.value.address
    batch = [
        calls.write_memory(pid, address, b"hello"),
        calls.munmap(pid, address + 1, PAGE_SIZE),
        calls.read_memory(pid, address, 5),
        calls.read_memory(1 << 40, address, 5),
    ]
    outcomes = await client.execute(batch)
    assert [type(outcome.error) for outcome in outcomes] == [
        type(None), InvalidRequestError, type(None), NoSuchObjectError,
    ]  # fmt: skip
    assert outcomes[2].value.data == b"hello"  # type: ignore[attr-defined]
    stopped = await client.execute(batch, stop_at_error=True)
    assert len(stopped) == 2


async def test_execute_splits_when_there_is_more_than_one_batch_holds(
    client: hmm_client.Client, process: Process
) -> None:
    """Any number of calls can be given; the order stays."""
    outcomes = await client.execute([calls.mmap(process.id, PAGE_SIZE) for _ in range(5000)])
    assert len(outcomes) == 5000
    addresses = [outcome.value.address for outcome in outcomes]  # type: ignore[attr-defined]
    assert addresses == sorted(addresses, reverse=True)
    (line,) = (await process.maps()).lines
    assert line.span.npages == 5000


async def test_files_are_read_written_and_mapped(client: hmm_client.Client, process: Process) -> None:
    """A file has contents of its own, which mappings share."""
    name = f"file {os.getpid()} {process.id}"
    with pytest.raises(NoSuchObjectError) as missing:
        await client.open_file(name)
    assert missing.value.errno == errnos.ENOENT
    file = await client.open_file(name, create=True)
    data = np.random.default_rng(2).bytes((2 << 20) + 5)
    await file.write(10, data)
    assert (await file.status()).size_bytes == len(data) + 10
    assert await file.read(10) == data
    assert await file.read(10, 3) == data[:3]
    assert await file.read(len(data) + 10, 3) == b""
    mapped = await process.mmap(PAGE_SIZE, flags=MapFlag.SHARED, file=file)
    await process.write(mapped.address, b"mapped")
    assert await file.read(0, 6) == b"mapped"
    await file.punch(0, PAGE_SIZE)
    assert await process.read(mapped.address, 6) == bytes(6)
    await file.truncate(0)
    with pytest.raises(SegmentationFault) as bus:
        await process.read(mapped.address, 1)
    assert bus.value.signal is Signal.BUS_ADRERR
    status = await file.status()
    assert (status.kind, status.name, status.size_bytes) == (FileKind.FILE, name, 0)
    await file.close()
    device = await client.open_file(name + " of a device", create=True, kind=FileKind.DEVICE)
    assert (await device.status()).kind is FileKind.DEVICE


async def test_unlink_takes_the_name_when_the_file_is_still_mapped(client: hmm_client.Client, process: Process) -> None:
    """unlink(2): the mapping keeps the bytes, the name is free for another file."""
    name = f"unlinked {os.getpid()} {process.id}"
    file = await client.open_file(name, create=True)
    await file.write(0, b"kept")
    mapped = await process.mmap(PAGE_SIZE, flags=MapFlag.SHARED, file=file)
    await file.close()
    await client.unlink_file(name)
    with pytest.raises(NoSuchObjectError) as missing:
        await client.unlink_file(name)
    assert missing.value.errno == errnos.ENOENT
    assert (await (await client.open_file(name, create=True)).status()).size_bytes == 0
    assert await process.read(mapped.address, 4) == b"kept"


async def test_place_puts_a_mapping_where_a_recording_had_it(client: hmm_client.Client) -> None:
    """Lines of a recorded maps file are placed as they are."""
    process = await client.create_process("recorded")
    file = await client.open_file("/usr/bin/recorded", create=True)
    await process.place(0x40_0000, 0x40_2000, Prot.READ, MapFlag.PRIVATE, file=file, offset=PAGE_SIZE)
    (line,) = (await process.maps()).lines
    assert (line.start, line.offset, line.file_name) == (0x40_0000, PAGE_SIZE, "/usr/bin/recorded")


async def test_objects_are_refused_when_they_belong_to_another_token(shared_daemon: Daemon) -> None:
    """What one token created no other may use: EPERM."""
    async with (
        hmm_client.connect(shared_daemon.target, "mine") as mine,
        hmm_client.connect(shared_daemon.target, "theirs") as theirs,
    ):
        process = await mine.create_process("mine")
        with pytest.raises(AccessDeniedError) as denied:
            await theirs.process(process.id).mmap(PAGE_SIZE)
        assert (denied.value.errno, denied.value.reason) == (errnos.EPERM, "NOT_OWNER")


async def test_pagemap_shows_what_backs_each_page(client: hmm_client.Client, process: Process) -> None:
    """/proc/PID/pagemap: in any number of parts, and in a batch like every other call."""
    mapped = await process.mmap(600 << 20)
    far = mapped.span.end - PAGE_SIZE
    await process.write(far, b"x")
    words = await process.pagemap(mapped.span)
    assert words.size == mapped.span.npages
    assert np.flatnonzero(words & np.uint64(pagemap.PRESENT)).tolist() == [words.size - 1]
    (outcome,) = await client.execute([calls.pagemap(process.id, far, far + PAGE_SIZE)])
    assert isinstance(outcome.value, PageMap)
    assert int(outcome.value.entries[0]) & (pagemap.PRESENT | pagemap.FILE) == pagemap.PRESENT


async def test_process_is_refused_when_fault_around_is_no_power_of_two(client: hmm_client.Client) -> None:
    """fault_around_bytes is rounded down to a power of two by the kernel; here it has to be one."""
    with pytest.raises(InvalidRequestError):
        await client.create_process("around", fault_around_pages=3)


async def test_batch_is_sent_in_parts_when_its_reply_would_be_too_long(
    client: hmm_client.Client, process: Process
) -> None:
    """Reading much in one list of calls takes several round trips, not an error."""
    mapped = await process.mmap(6 << 20)
    reads = [calls.read_memory(process.id, mapped.address + (part << 20), 1 << 20) for part in range(6)]
    outcomes = await client.execute(reads)
    assert [outcome.error for outcome in outcomes] == [None] * 6


async def test_maps_are_whole_when_they_come_in_parts(client: hmm_client.Client, process: Process) -> None:
    """More mappings than one answer has, of either kind."""
    await process.mmap(PAGE_SIZE)
    mapped = await process.mmap(1_200 * PAGE_SIZE, Prot.READ)
    pages = range(mapped.address, mapped.span.end, 2 * PAGE_SIZE)
    await client.execute([calls.mprotect(process.id, page, PAGE_SIZE, Prot.NONE) for page in pages])
    lines = (await process.maps()).lines
    assert len(lines) == 1_201
    assert [left.end for left in lines[:-1]] == [right.start for right in lines[1:]]
    assert [use.line for use in await process.smaps()] == list(lines)
