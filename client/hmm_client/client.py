"""The client: one connection to a daemon, and the objects that are reached through it.

**Source**: proto/hmm_proto/v1.

**Absent**: the session of the device side, which is opened when the first device is registered (`session.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from typing import Any, Self, TypeVar

import grpc

from hmm.address_space import Thp
from hmm.errors import HmmError
from hmm.file import FileKind
from hmm.frames import RegionKind
from hmm.units import ProcessId
from hmm_client.arguments import names_arguments
from hmm_client.calls import Call
from hmm_client.channel import Channel, as_target, default_target, not_made_error
from hmm_client.device import Device
from hmm_client.file import File
from hmm_client.process import Process
from hmm_client.results import Outcome
from hmm_client.session import Session
from hmm_proto import convert
from hmm_proto.v1 import (
    device_pb2_grpc,
    file_pb2,
    file_pb2_grpc,
    harness_pb2_grpc,
    inspection_pb2_grpc,
    process_pb2,
    process_pb2_grpc,
    userfaultfd_pb2_grpc,
)

T = TypeVar("T")
BATCH_CALLS = 4096
BATCH_BYTES = 4 << 20
"""What one batch of calls, and its reply, may hold; longer lists are sent as several."""


def connect(
    target: str | None = None,
    token: str = "",
    *,
    name: str = "",
    credentials: grpc.ChannelCredentials | None = None,
    credit: int = 0,
    executor: Executor | None = None,
) -> Client:
    """A client of the daemon at `target`.  Call it where a loop runs, and use the result in `async with`.

    Args:
        target: "unix:PATH", PATH or "HOST:PORT"; None: `default_target()`.
        token: owner of what this client creates, and its right to use it; empty: everybody's.
        name: what events, logs and `pending` call this client.
        credentials: of TLS (`tls_credentials`); None: none.
        credit: how many unanswered events the drivers can have; 0: the daemon's default.
        executor: where drivers' plain `update` functions run; None: in the loop.
    """
    channel = Channel(
        default_target() if target is None else as_target(target), token=token, name=name, credentials=credentials
    )
    return Client(channel, name=name, credit=credit, executor=executor)


@names_arguments
class Client:
    """A connection.  Made by `connect`.

    Attributes:
        channel: for calls that have no method here, with the stubs below.
        processes, files, devices, userfaultfds, inspection, harness: stubs of the services.
        executor: where drivers' plain functions run; None: in the loop.
        credit: how many events its session, once it is opened, may owe an answer to; 0: what the daemon gives.
    """

    def __init__(self, channel: Channel, *, name: str = "", credit: int = 0, executor: Executor | None = None) -> None:
        self.channel = channel
        self.executor = executor
        self.processes = process_pb2_grpc.ProcessServiceStub(channel.grpc)
        self.files = file_pb2_grpc.FileServiceStub(channel.grpc)
        self.devices = device_pb2_grpc.DeviceServiceStub(channel.grpc)
        self.userfaultfds = userfaultfd_pb2_grpc.UserfaultfdServiceStub(channel.grpc)
        self.inspection = inspection_pb2_grpc.InspectionServiceStub(channel.grpc)
        self.harness = harness_pb2_grpc.HarnessServiceStub(channel.grpc)
        self._name = name
        self.credit = credit
        self._session: Session | None = None
        self._opening = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Say goodbye: mirrors that are still registered are fenced; processes, devices and files stay."""
        if self._session is not None:
            await self._session.close()
        await self.channel.close()

    async def ready(self) -> None:
        """Wait until the daemon can be reached, however long that takes; `asyncio.timeout` bounds it."""
        await self.channel.grpc.channel_ready()

    # ---- objects

    async def create_process(
        self,
        name: str = "",
        *,
        mmap_base: int = 0,
        brk_start: int = 0,
        fault_around_pages: int = 1,
        thp: Thp = Thp.NEVER,
        low_addresses: bool = False,
    ) -> Process:
        """A process with an empty address space.

        Args:
            name: for people.
            mmap_base: mappings are placed downwards from here; 0: the kernel's default.
            brk_start: initial program break; 0: no heap.
            fault_around_pages: how many cached pages of a file a read fault maps at most, a power of two up to 512.
            thp: where the first touch of private memory may bring in a huge page.
            low_addresses: whether it may map addresses below 64 KiB (vm.mmap_min_addr), as with CAP_SYS_RAWIO.
        """
        request = process_pb2.CreateProcessRequest(
            name=name,
            mmap_base=mmap_base,
            brk_start=brk_start,
            fault_around_pages=fault_around_pages,
            huge_pages=convert.thp_to_proto(thp),
            low_addresses=low_addresses,
        )
        response: process_pb2.CreateProcessResponse = await self.channel.request(self.processes.CreateProcess, request)
        return Process(self, response.process_id)

    def process(self, process_id: ProcessId) -> Process:
        """A handle of a process that exists already."""
        return Process(self, process_id)

    async def open_file(
        self, name: str, *, create: bool = False, kind: FileKind = FileKind.FILE, vm_flags: int = 0
    ) -> File:
        """open(2).

        Args:
            create: make it, with size 0, if there is none.
            kind: of a file that is made.
            vm_flags: of a device file: what its driver adds to every mapping, `VmFlag.MIXEDMAP` for pages of its own.

        Raises:
            NoSuchObjectError: there is none, and `create` is False (ENOENT).
        """
        return await File.open(self, name, create=create, kind=kind, vm_flags=vm_flags)

    async def unlink_file(self, name: str) -> None:
        """unlink(2): the name goes at once, the file when it is open and mapped nowhere.

        Raises:
            NoSuchObjectError: there is no file of this name (ENOENT).
        """
        await self.channel.request(self.files.UnlinkFile, file_pb2.UnlinkFileRequest(name=name))

    async def register_device(
        self,
        name: str,
        *,
        dma: bool = False,
        memory_pages: int = 0,
        kind: RegionKind = RegionKind.DEVICE_PRIVATE,
        driver_copies: bool = False,
        evicts: bool = False,
    ) -> Device:
        """Register a device; its mirrors are served by this client's session.

        Args:
            name: for people.
            dma: its page tables hold DMA addresses of an emulated IOMMU instead of frame numbers.
            memory_pages: size of memory of its own.
            kind: whether the CPU can reach that memory.
            driver_copies: the driver has the bytes of that memory and carries pages there and back
                (`Driver.copy_to_device`, `Driver.copy_from_device`); what is there is lost with the driver, and
                with its session: unregister mirrors before closing.
            evicts: pages that are to be moved to that memory when it is full take the place of those that went there
                longest ago.

        Raises:
            OutOfFramesError: too many devices, or no frame numbers left for so much memory (ENOMEM).
        """
        return await Device.register(
            self, name, dma=dma, memory_pages=memory_pages, kind=kind, driver_copies=driver_copies, evicts=evicts
        )

    async def session(self) -> Session:
        """The session of this client's drivers; a new one if there is none or the last one was lost."""
        async with self._opening:
            if self._session is None or self._session.lost:
                self._session = await Session.open(self.channel, name=self._name, credit=self.credit)
            return self._session

    # ---- calls of processes

    async def make(self, call: Call[T]) -> T:
        """Make one call of `hmm_client.calls`.

        Raises:
            HmmError: what the call ended with.
        """
        return call.read(await self.channel.request(getattr(self.processes, call.method), call.request))

    async def execute(self, calls: Sequence[Call[Any]], *, stop_at_error: bool = False) -> list[Outcome]:
        """Make many calls, each after the one before has ended, for one round trip.

        Args:
            stop_at_error: stop behind the first that fails.

        Returns: how each call ended that was tried, in order.
        """
        outcomes: list[Outcome] = []
        for batch in _batches(calls):
            request = process_pb2.ExecuteRequest(
                calls=[process_pb2.Call(**{call.name: call.request}) for call in batch],  # type: ignore[arg-type]
                stop_at_error=stop_at_error,
            )
            response: process_pb2.ExecuteResponse = await self.channel.request(self.processes.Execute, request)
            outcomes += map(_outcome, batch, response.outcomes)
            if stop_at_error and outcomes[-1].error is not None:
                break
        return outcomes


def _batches(calls: Sequence[Call[Any]]) -> Iterator[list[Call[Any]]]:
    batch: list[Call[Any]] = []
    size = 0
    for call in calls:
        length = max(call.request.ByteSize(), call.reply_bytes)
        if batch and (len(batch) == BATCH_CALLS or size + length > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(call)
        size += length
    if batch:
        yield batch


def _outcome(call: Call[Any], message: process_pb2.CallOutcome) -> Outcome:
    which = message.WhichOneof("outcome")
    if which == "not_made":
        return Outcome(error=not_made_error(message.not_made))
    try:
        return Outcome(call.read(getattr(message, str(which))))
    except HmmError as error:
        return Outcome(error=error)
