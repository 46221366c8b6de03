"""A userfaultfd: this client brings in the pages that a process misses, and accesses wait until it has.

    async with process.userfaultfd() as uffd:
        await uffd.register(heap)
        uffd.serve(lambda fault: b"\\xab" * PAGE_SIZE)      # or: async for fault in uffd: ...
        await process.read(heap.start, 1)                   # waits for the handler, which this client is itself

**Source**: Linux fs/userfaultfd.c; proto/hmm_proto/v1/userfaultfd.proto.

**Invariants**: it is open as long as its block; when that ends, or this client is gone, the daemon closes it, and who
waits goes on with zeroes.

**Absent**: what is missing, and who waits: the daemon knows (`hmm.userfaultfd`, `hmm.uffdio`).
"""

from __future__ import annotations

import asyncio
import errno as errnos
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import grpc.aio

from hmm.commands_userfaultfd import UserfaultMessage
from hmm.errors import ConflictError
from hmm.uffdio import CopyMode, RegisterMode
from hmm.units import PAGE_SIZE, Address, AddressRange
from hmm_client.arguments import names_arguments
from hmm_client.channel import RPC_ERRORS, as_error
from hmm_proto.convert import range_to_proto
from hmm_proto.status import from_call_result
from hmm_proto.v1 import userfaultfd_pb2

if TYPE_CHECKING:
    from hmm_client.process import Process

__all__ = ["Handler", "Userfaultfd"]

PART_BYTES = 1 << 20
"""What one call copies; more travels in parts."""
Handler: TypeAlias = Callable[[UserfaultMessage], "bytes | Awaitable[bytes | None] | None"]
"""What is to come to stand at `fault.address`: whole pages, or None when the handler has seen to it itself.

Of a minor fault anything but None lets the pages be mapped that are there.
"""


@names_arguments
class Userfaultfd:
    """The handler's side.  Made by `Process.userfaultfd`, used in `async with`.

    Attributes:
        id: names it, once it is open; `hmmctl pending` shows it.
        serving: the task that calls the handler of `serve`.
    """

    def __init__(self, process: Process, features: int = 0) -> None:
        self.id = 0
        self.process = process
        self._client = process.client
        self._features = features
        self._call: Any = None
        self.serving: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<userfaultfd {self.id} of {self.process!r}>"

    async def open(self) -> Self:
        """userfaultfd(2) and UFFDIO_API.

        Raises:
            InvalidRequestError: a feature that there is not (EINVAL).
            NoSuchObjectError: there is no such process (ESRCH).
            OutOfFramesError: too many userfaultfds (ENOMEM).
        """
        request = userfaultfd_pb2.OpenUserfaultfdRequest(process_id=self.process.id, features=self._features)
        try:
            self._call = self._client.userfaultfds.OpenUserfaultfd(request, metadata=self._client.channel.metadata)
        except RPC_ERRORS as error:
            raise as_error(error, self._client.channel.target) from None
        first = await self._next()
        assert first is not None
        self.id = first.userfaultfd_id
        return self

    async def close(self) -> None:
        """close(2): what was registered is not any more, and who waits goes on with zeroes."""
        if self.serving is not None:
            self.serving.cancel()
            await asyncio.wait((self.serving,))
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        await self.close()
        failure = None if self.serving is None or self.serving.cancelled() else self.serving.exception()
        if failure is not None and error is None:
            raise failure

    # ---- what is missing

    async def read(self) -> list[UserfaultMessage]:
        """read(2): wait for accesses that miss a page.  One that is cancelled while it waits closes this.

        Returns: those that do; none when the process has ended.
        """
        message = await self._next()
        if message is None:
            return []
        return [
            UserfaultMessage(one.address, one.page_count, one.write, one.operation_id, one.minor)
            for one in message.faults
        ]

    async def __aiter__(self) -> AsyncIterator[UserfaultMessage]:
        while faults := await self.read():
            for fault in faults:
                yield fault

    def serve(self, handler: Handler) -> None:
        """Let `handler` bring in what is missing, one fault after the other, until this is closed.

        A plain function runs where those of drivers do (`connect(executor=...)`).  What it raises closes this, so that
        who waits goes on with zeroes, and is raised again by the end of the `async with` block.

        Raises:
            RuntimeError: it has a handler already.
        """
        if self.serving is not None:
            raise RuntimeError(f"{self!r} has a handler already")
        self.serving = asyncio.get_running_loop().create_task(self._serve(handler))

    async def _serve(self, handler: Handler) -> None:
        try:
            await self._answer(handler)
        except BaseException:
            self._call.cancel()  # else they would wait for ever for a handler that there is not
            raise

    async def _answer(self, handler: Handler) -> None:
        async for fault in self:
            answer: Any
            if self._client.executor is not None and not inspect.iscoroutinefunction(handler):
                answer = await asyncio.get_running_loop().run_in_executor(self._client.executor, handler, fault)
            else:
                answer = handler(fault)
            data: bytes | None = await answer if inspect.isawaitable(answer) else answer
            if data is not None:
                await self._bring(fault, data)

    async def _bring(self, fault: UserfaultMessage, data: bytes) -> None:
        address = fault.address
        try:
            if fault.minor:
                await self.continue_range(AddressRange(address, address + fault.npages * PAGE_SIZE))
            else:
                await self.copy(address, data)
        except ConflictError as error:  # somebody else was faster
            if error.errno != errnos.EEXIST:
                raise
            await self.wake(AddressRange(address, address + PAGE_SIZE))

    async def _next(self) -> userfaultfd_pb2.OpenUserfaultfdResponse | None:
        try:
            message = await self._call.read()
        except RPC_ERRORS as error:
            raise as_error(error, self._client.channel.target) from None
        return None if message is grpc.aio.EOF else message

    # ---- what is done about it

    async def register(self, span: AddressRange, mode: int = RegisterMode.MISSING) -> int:
        """UFFDIO_REGISTER.  Returns: the ioctls that the range permits.

        Args:
            mode: RegisterMode values: pages that are missing, or that shared memory has and that are only not mapped.

        Raises:
            InvalidRequestError: no range, another mode, nothing mapped there, or neither private anonymous nor shared
                memory, or for minor faults no shared memory (EINVAL).
            AccessDeniedError: what may never be written (EPERM).
            InUseError: registered with another userfaultfd (EBUSY).
            OutOfFramesError: too many mappings, or the process has ended (ENOMEM).
        """
        request = userfaultfd_pb2.UffdRegisterRequest(userfaultfd_id=self.id, range=range_to_proto(span), mode=mode)
        ioctls: int = (await self._make("UffdRegister", request)).ioctls
        return ioctls

    async def unregister(self, span: AddressRange) -> None:
        """UFFDIO_UNREGISTER: who waits for a page of the range goes on with zeroes."""
        request = userfaultfd_pb2.UffdUnregisterRequest(userfaultfd_id=self.id, range=range_to_proto(span))
        await self._make("UffdUnregister", request)

    async def copy(self, address: Address, data: bytes, *, wake: bool = True) -> None:
        """UFFDIO_COPY: bring in whole pages where nothing is yet; more than 1 MiB in parts.

        Args:
            wake: False for UFFDIO_COPY_MODE_DONTWAKE.

        Raises:
            RangeBusyError: what lies below `error.address` was brought in, and no more (EAGAIN).
            ConflictError: a page is there already (EEXIST).
            NoSuchObjectError: not one registered mapping (ENOENT), or the process has ended (ESRCH).
            BadAddressError: behind the end of shared memory (EFAULT).
            OutOfFramesError: no frame is left (ENOMEM).
        """
        mode = 0 if wake else int(CopyMode.DONTWAKE)
        for start in range(0, len(data), PART_BYTES) or (0,):
            part = data[start : start + PART_BYTES]
            request = userfaultfd_pb2.UffdCopyRequest(
                userfaultfd_id=self.id, address=address + start, data=part, mode=mode
            )
            await self._make("UffdCopy", request)

    async def zeropage(self, span: AddressRange, *, wake: bool = True) -> None:
        """UFFDIO_ZEROPAGE: as `copy`, with zeroes."""
        mode = 0 if wake else int(CopyMode.DONTWAKE)
        request = userfaultfd_pb2.UffdZeropageRequest(userfaultfd_id=self.id, range=range_to_proto(span), mode=mode)
        await self._make("UffdZeropage", request)

    async def continue_range(self, span: AddressRange, *, wake: bool = True) -> None:
        """UFFDIO_CONTINUE: map pages that the shared memory has.

        Args:
            wake: False for UFFDIO_CONTINUE_MODE_DONTWAKE.

        Raises:
            RangeBusyError: what lies below `error.address` was mapped, and no more (EAGAIN).
            BadAddressError: the shared memory does not have the page (EFAULT), or it is lost (EIO).
            InvalidRequestError: behind its end, or there is none (EINVAL).
            ConflictError: a page is mapped already (EEXIST).
            NoSuchObjectError: not one registered mapping (ENOENT), or the process has ended (ESRCH).
            OutOfFramesError: no frame is left for what comes from swap (ENOMEM).
        """
        mode = 0 if wake else int(CopyMode.DONTWAKE)
        request = userfaultfd_pb2.UffdContinueRequest(userfaultfd_id=self.id, range=range_to_proto(span), mode=mode)
        await self._make("UffdContinue", request)

    async def wake(self, span: AddressRange) -> None:
        """UFFDIO_WAKE: who waits for a page of the range looks again."""
        request = userfaultfd_pb2.UffdWakeRequest(userfaultfd_id=self.id, range=range_to_proto(span))
        await self._make("UffdWake", request)

    async def _make(self, name: str, request: Any) -> Any:
        response = await self._client.channel.request(getattr(self._client.userfaultfds, name), request)
        error = from_call_result(response.result)
        if error is not None:
            raise error
        return response
