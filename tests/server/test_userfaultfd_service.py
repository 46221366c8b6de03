"""UserfaultfdService: accesses wait for whoever holds the stream, and for nobody once that is gone."""

from __future__ import annotations

import asyncio
import errno as errnos
from typing import Any

import grpc
import pytest

from hmm.range_fault import REQ_FAULT
from hmm_proto.v1 import device_pb2, hmm_pb2, process_pb2, range_pb2, userfaultfd_pb2

PAGE = 4096
BASE = 0x10000000000
END = BASE + 4 * PAGE
WHOLE = range_pb2.AddressRange(start=BASE, end=END)


class Handled:
    """A process with four pages, and a handler of what it misses in them."""

    served: Any
    pid: int
    stream: Any
    fd: int

    def touch(self, page: int = 0, npages: int = 1, **call: Any) -> Any:
        """Begin to touch pages."""
        request = process_pb2.TouchRequest(process_id=self.pid, address=BASE + page * PAGE, length=npages * PAGE)
        return asyncio.ensure_future(self.served.process.Touch(request, **call))

    async def faults(self) -> list[tuple[int, int]]:
        """The next message: pages, and how many are missing there."""
        message = await self.stream.read()
        return [((fault.address - BASE) // PAGE, fault.page_count) for fault in message.faults]

    async def copy(self, page: int, data: bytes, **fields: Any) -> userfaultfd_pb2.UffdCopyResponse:
        """UFFDIO_COPY."""
        request = userfaultfd_pb2.UffdCopyRequest(
            userfaultfd_id=self.fd, address=BASE + page * PAGE, data=data, **fields
        )
        response: userfaultfd_pb2.UffdCopyResponse = await self.served.userfaultfd.UffdCopy(request)
        return response

    async def read(self, page: int) -> bytes:
        """The first byte of a page that is there."""
        request = process_pb2.ReadMemoryRequest(process_id=self.pid, address=BASE + page * PAGE, length=1)
        data: bytes = (await self.served.process.ReadMemory(request)).data
        return data


async def open_userfaultfd(served: Any, pid: int, **call: Any) -> tuple[Any, int]:
    """A stream, and the number that it begins with."""
    stream = served.userfaultfd.OpenUserfaultfd(userfaultfd_pb2.OpenUserfaultfdRequest(process_id=pid), **call)
    return stream, (await stream.read()).userfaultfd_id


@pytest.fixture
async def handled(served: Any) -> Handled:
    """One of these."""
    one = Handled()
    one.served, one.pid = served, await served.new_process()
    await served.mmap(one.pid, BASE, END)
    one.stream, one.fd = await open_userfaultfd(served, one.pid, metadata=(("hmm-caller", "pager"),))
    registered = await served.userfaultfd.UffdRegister(
        userfaultfd_pb2.UffdRegisterRequest(userfaultfd_id=one.fd, range=WHOLE, mode=1)
    )
    assert (registered.result.errno, registered.ioctls) == (0, 0x1C)
    return one


async def test_touch_waits_until_the_handler_has_copied_the_page(handled: Handled) -> None:
    """The handler hears of it, as of others that came together; who is the caller does not matter."""
    touches = [handled.touch(page, 4 - page) for page in range(2)]
    faults = await handled.faults()
    while len(faults) < 2:
        faults += await handled.faults()
    assert sorted(faults) == [(0, 4), (1, 3)]
    copied = await handled.copy(0, b"h" * 4 * PAGE)
    assert (copied.result.errno, copied.bytes_copied) == (0, 4 * PAGE)
    assert [(await touch).pages_touched for touch in touches] == [4, 3]
    assert await handled.read(3) == b"h"


async def test_copy_says_how_far_it_came(handled: Handled) -> None:
    """EAGAIN for what was copied in part, else the error of the first page."""
    await handled.copy(2, b"x" * PAGE)
    part = await handled.copy(0, b"y" * 4 * PAGE)
    assert (part.result.errno, part.bytes_copied) == (errnos.EAGAIN, 2 * PAGE)
    assert part.result.address == BASE + 2 * PAGE
    none = await handled.copy(2, b"z" * PAGE)
    assert (none.result.errno, none.bytes_copied) == (errnos.EEXIST, 0)
    zeroed = await handled.served.userfaultfd.UffdZeropage(
        userfaultfd_pb2.UffdZeropageRequest(
            userfaultfd_id=handled.fd, range=range_pb2.AddressRange(start=END - PAGE, end=END)
        )
    )
    assert zeroed.bytes_zeroed == PAGE
    continued = await handled.served.userfaultfd.UffdContinue(
        userfaultfd_pb2.UffdContinueRequest(userfaultfd_id=handled.fd, range=WHOLE)
    )
    assert (continued.result.errno, continued.bytes_mapped) == (errnos.EINVAL, 0)  # of private memory
    assert await handled.read(1) == b"y"


async def test_pending_names_the_handler_that_does_not_handle(handled: Handled) -> None:
    """Who waits, for which page, for whom, and whether that one knows."""
    touch = handled.touch(1)
    await handled.faults()
    (operation,) = (await handled.served.pending()).operations
    assert (operation.name, operation.process_id) == ("touch", handled.pid)
    assert operation.waits_for == f"the handler of userfaultfd {handled.fd} [{BASE + PAGE:#x}, {BASE + 2 * PAGE:#x})"
    assert (operation.userfault.handler, operation.userfault.told) == ("pager", True)
    assert not (await handled.served.pending()).cycles
    await handled.copy(1, b"x" * PAGE)
    await touch


async def test_waiting_goes_on_with_zeroes_when_the_handler_dies(handled: Handled) -> None:
    """The end of the stream is close(2)."""
    touch = handled.touch(0)
    await handled.faults()
    handled.stream.cancel()
    assert (await touch).pages_touched == 1
    assert await handled.read(0) == b"\0"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await handled.copy(1, b"x" * PAGE)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert (await handled.touch(1)).pages_touched == 1


async def test_waiting_ends_when_its_caller_gives_up(handled: Handled) -> None:
    """As a thread that gets SIGKILL: nothing stays pending."""
    touch = handled.touch(0, timeout=0.05)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await touch
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await handled.served.until(lambda: not handled.served.daemon.executor.running)
    space = handled.served.daemon.machine.userfaultfds[handled.fd]
    assert not space.userfaultfds[handled.fd].faults


async def test_stream_ends_with_its_process(handled: Handled) -> None:
    """What waits ends as well."""
    touch = handled.touch(0)
    await handled.faults()
    await handled.served.process.Exit(process_pb2.ExitRequest(process_id=handled.pid))
    assert await handled.stream.read() is grpc.aio.EOF
    with pytest.raises(grpc.aio.AioRpcError):
        await touch
    await handled.served.until(lambda: not handled.served.daemon.machine.userfaultfds)


async def test_daemon_ends_at_once_when_an_access_waits(serve: Any) -> None:
    """Nobody can handle anything any more: the wait ends, and the stream too."""
    served = await serve(drain_s=60)
    pid = await served.new_process()
    await served.mmap(pid, BASE, END)
    stream, fd = await open_userfaultfd(served, pid)
    await served.userfaultfd.UffdRegister(userfaultfd_pb2.UffdRegisterRequest(userfaultfd_id=fd, range=WHOLE, mode=1))
    touch = asyncio.ensure_future(
        served.process.Touch(process_pb2.TouchRequest(process_id=pid, address=BASE, length=PAGE))
    )
    assert len((await stream.read()).faults) == 1
    await served.daemon.executor.drain(60)
    assert (await touch).result.errno == errnos.EINTR
    assert await stream.read() is grpc.aio.EOF


async def test_userfaultfd_belongs_to_its_opener(handled: Handled) -> None:
    """Another token may not use it."""
    request = userfaultfd_pb2.UffdWakeRequest(userfaultfd_id=handled.fd, range=WHOLE)
    await handled.served.userfaultfd.UffdWake(request)
    process = await handled.served.new_process(metadata=(("hmm-token", "mine"),))
    stream, fd = await open_userfaultfd(handled.served, process, metadata=(("hmm-token", "mine"),))
    request.userfaultfd_id = fd
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await handled.served.userfaultfd.UffdWake(request)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    stream.cancel()


async def test_copy_of_more_than_a_message_is_refused(handled: Handled) -> None:
    """E2BIG, before anything is done."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await handled.copy(0, bytes((1 << 20) + PAGE))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


# ---- range faults


async def attached(handled: Handled) -> tuple[Any, int, int]:
    """A session, and a mirror of the process with one subscription."""
    driver = await handled.served.driver()
    device = await driver.make("register_device", device_pb2.RegisterDeviceRequest(name="card"))
    attach = hmm_pb2.AttachRequest(device_id=device.device_id, process_id=handled.pid)
    mirror = (await driver.make("attach", attach)).mirror_id
    insert = hmm_pb2.InsertNotifierRequest(mirror_id=mirror, start=BASE, length=END - BASE)
    return driver, mirror, (await driver.make("insert_notifier", insert)).notifier_id


async def test_range_fault_waits_for_the_handler_when_it_is_made_in_one_call(handled: Handled) -> None:
    """The raw pair keeps the mmap lock and fails with EFAULT; the one-call form waits, on the handler's own session."""
    driver, mirror, notifier = await attached(handled)
    where = {"mirror_id": mirror, "notifier_id": notifier, "range": WHOLE, "default_flags": REQ_FAULT}
    begun = await driver.make("read_begin", hmm_pb2.ReadBeginRequest(mirror_id=mirror, notifier_id=notifier))
    locked = await driver.make("range_fault", hmm_pb2.RangeFaultRequest(**where, notifier_seq=begun.notifier_seq))
    assert (locked.result.errno, locked.result.address) == (errnos.EFAULT, BASE)
    faulting = await driver.send("range_fault", hmm_pb2.RangeFaultRequest(**where))
    assert await handled.faults() == [(0, 4)]
    await handled.copy(0, b"\xab" * 4 * PAGE)
    assert not (await faulting).range_fault.result.errno
    await driver.bye()


async def test_range_fault_is_busy_at_its_deadline_when_nobody_handles_it(handled: Handled) -> None:
    """EBUSY, and nothing stays pending."""
    driver, mirror, notifier = await attached(handled)
    request = hmm_pb2.RangeFaultRequest(
        mirror_id=mirror, notifier_id=notifier, range=WHOLE, default_flags=REQ_FAULT, deadline_ms=20
    )
    faulted = await driver.make("range_fault", request)
    assert faulted.result.errno == errnos.EBUSY
    assert not (await handled.served.pending()).operations
    await driver.bye()


async def test_pin_ends_with_its_session_when_nobody_handles_it(handled: Handled) -> None:
    """A driver that is gone waits for nothing."""
    driver, *_ = await attached(handled)
    await driver.send("pin_pages", hmm_pb2.PinPagesRequest(process_id=handled.pid, range=WHOLE))
    assert await handled.faults() == [(0, 4)]
    driver.call.cancel()
    await handled.served.until(lambda: not handled.served.daemon.executor.running)
    assert not handled.served.daemon.machine.pins


async def test_userfaultfd_is_refused_when_too_many_are_open(serve: Any) -> None:
    """The setting `userfaultfds`; one that is closed makes room."""
    served = await serve(userfaultfds=1)
    pid = await served.new_process()
    stream, _ = await open_userfaultfd(served, pid)
    second = served.userfaultfd.OpenUserfaultfd(userfaultfd_pb2.OpenUserfaultfdRequest(process_id=pid))
    assert await second.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "userfaultfd" in await second.details()
    stream.cancel()
    await served.until(lambda: not served.daemon.machine.userfaultfds)
    await open_userfaultfd(served, pid)
