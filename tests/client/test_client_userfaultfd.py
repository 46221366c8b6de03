"""The handler's side of a userfaultfd, against a real daemon."""

from __future__ import annotations

import asyncio
import errno as errnos
from typing import TYPE_CHECKING

import pytest

import hmm_client
from hmm.commands_userfaultfd import UserfaultMessage
from hmm.errors import (
    BadAddressError,
    ConflictError,
    InvalidRequestError,
    NoSuchObjectError,
    RangeBusyError,
    SegmentationFault,
)
from hmm.uffdio import IOCTL_CONTINUE, IOCTLS, RegisterMode
from hmm.units import PAGE_SIZE
from hmm.unmapped_area import MapFlag
from hmm.userfaultfd import UserfaultFeature
from hmm_client import Process
from hmm_client.results import Mapped

if TYPE_CHECKING:
    pass


@pytest.fixture
async def heap(process: Process) -> Mapped:
    """Four pages."""
    return await process.mmap(4 * PAGE_SIZE)


async def test_handler_brings_in_what_its_own_client_misses(process: Process, heap: Mapped) -> None:
    """A read that crosses pages asks for each that is missing, with how many more are; plain and async functions do."""
    asked: list[tuple[int, int]] = []

    async def bring(fault: UserfaultMessage) -> bytes:
        asked.append(((fault.address - heap.address) // PAGE_SIZE, fault.npages))
        return bytes([len(asked)]) * PAGE_SIZE

    async with process.userfaultfd() as uffd:
        assert await uffd.register(heap.span) == IOCTLS
        await uffd.zeropage(heap.page(1))
        uffd.serve(bring)
        data = await process.read(heap.address, 4 * PAGE_SIZE)
        assert data[::PAGE_SIZE] == bytes([1, 0, 2, 3])
        assert asked == [(0, 1), (2, 2), (3, 1)]
    async with process.userfaultfd() as again:
        await again.register(heap.span)
        again.serve(lambda _: b"z" * PAGE_SIZE)
        await process.madvise(heap.address, PAGE_SIZE, hmm_client.Advice.DONTNEED)
        assert await process.read(heap.address, 1) == b"z"


async def test_handler_lets_pages_be_mapped_that_shared_memory_has(process: Process) -> None:
    """UFFDIO_REGISTER_MODE_MINOR, UFFDIO_CONTINUE: of itself and by a handler; a page that there is not is EFAULT."""
    file = await process.client.open_file("minor faults", create=True)
    await file.truncate(4 * PAGE_SIZE)
    await file.write(0, b"s" * 3 * PAGE_SIZE)
    heap = await process.mmap(4 * PAGE_SIZE, flags=MapFlag.SHARED, file=file)
    async with process.userfaultfd() as uffd:
        assert await uffd.register(heap.span, RegisterMode.MINOR) == IOCTLS | IOCTL_CONTINUE
        reading = asyncio.create_task(process.read(heap.address, 1))
        (fault,) = await uffd.read()
        assert (fault.address, fault.minor) == (heap.address, True)
        await uffd.continue_range(heap.page(0))
        assert await reading == b"s"
        with pytest.raises(BadAddressError):
            await uffd.continue_range(heap.page(3))
        uffd.serve(lambda _: b"")
        assert await process.read(heap.address, 3 * PAGE_SIZE) == b"s" * 3 * PAGE_SIZE
    await file.close()


async def test_faults_are_iterated_until_the_process_exits(process: Process, heap: Mapped) -> None:
    """A handler that brings in all that an access is about to touch hears of it once."""
    async with process.userfaultfd() as uffd:
        await uffd.register(heap.span)
        touching = asyncio.ensure_future(process.touch(heap.address, 4 * PAGE_SIZE, write=True))
        heard = []
        async for fault in uffd:
            heard.append((fault.npages, fault.write))
            await uffd.copy(fault.address, bytes(fault.npages * PAGE_SIZE))
            assert (await touching).done == 4
            await process.exit()
        assert heard == [(4, True)]


async def test_waiting_goes_on_with_zeroes_when_it_is_closed(process: Process, heap: Mapped) -> None:
    """The end of the block is close(2)."""
    async with process.userfaultfd() as uffd:
        await uffd.register(heap.span)
        reading = asyncio.ensure_future(process.read(heap.address, 1))
        assert [fault.address for fault in await uffd.read()] == [heap.address]
    assert await reading == b"\0"


async def test_error_of_a_handler_is_raised_by_the_end_of_the_block(process: Process, heap: Mapped) -> None:
    """And who waits goes on."""

    def fail(_: UserfaultMessage) -> bytes:
        raise KeyError("no such page")

    async def handle() -> None:
        async with process.userfaultfd() as uffd:
            await uffd.register(heap.span)
            uffd.serve(fail)
            reading.append(asyncio.ensure_future(process.read(heap.address, 1)))
            await asyncio.wait((uffd.serving,))

    reading: list[asyncio.Future[bytes]] = []
    with pytest.raises(KeyError):
        await handle()
    assert await reading[0] == b"\0"


async def test_errors_are_those_of_the_ioctls(process: Process, heap: Mapped) -> None:
    """EEXIST, EAGAIN, ENOENT, EINVAL, EBUSY, ESRCH."""
    async with process.userfaultfd() as uffd, process.userfaultfd() as other:
        await uffd.register(heap.span)
        await uffd.copy(heap.page(2).start, b"c" * PAGE_SIZE)
        with pytest.raises(ConflictError) as taken:
            await uffd.copy(heap.page(2).start, b"c" * PAGE_SIZE)
        assert taken.value.errno == errnos.EEXIST
        with pytest.raises(RangeBusyError) as partial:
            await uffd.copy(heap.address, bytes(4 * PAGE_SIZE))
        assert (partial.value.errno, partial.value.address) == (errnos.EAGAIN, heap.page(2).start)
        with pytest.raises(InvalidRequestError):
            await uffd.copy(heap.address, b"")
        with pytest.raises(ConflictError) as busy:
            await other.register(heap.span)
        assert busy.value.errno == errnos.EBUSY
        await uffd.unregister(heap.span)
        with pytest.raises(NoSuchObjectError) as nowhere:
            await uffd.copy(heap.page(3).start, bytes(PAGE_SIZE))
        assert nowhere.value.errno == errnos.ENOENT
    with pytest.raises(NoSuchObjectError):
        await hmm_client.Process(process.client, 1 << 40).userfaultfd().open()


async def test_access_gets_a_signal_when_the_handler_wants_that(process: Process, heap: Mapped) -> None:
    """UFFD_FEATURE_SIGBUS."""
    async with process.userfaultfd(UserfaultFeature.SIGBUS) as uffd:
        await uffd.register(heap.span)
        with pytest.raises(SegmentationFault):
            await process.read(heap.address, 1)


async def test_access_goes_on_when_the_handler_of_its_page_fails(process: Process, heap: Mapped) -> None:
    """As where a handler's process dies: who waits gets zeroes and not nobody's answer; a second handler is refused."""

    def fail(_: UserfaultMessage) -> bytes:
        raise KeyError("no such page")

    async def handle() -> None:
        async with process.userfaultfd() as uffd:
            await uffd.register(heap.span)
            uffd.serve(fail)
            with pytest.raises(RuntimeError, match="has a handler already"):
                uffd.serve(fail)
            seen.append(await process.read(heap.address, 1))

    seen: list[bytes] = []
    with pytest.raises(KeyError):
        await handle()
    assert seen == [b"\0"]
