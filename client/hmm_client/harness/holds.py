"""Holding calls at a point, failures on demand, merging: what `hmmd --harness` can do for a test.

    harness = Harness(client)
    async with harness.hold(HoldPoint.BEFORE_EDIT, "madvise", process=process) as hold:
        discarding = asyncio.create_task(process.madvise(heap.start, heap.size_bytes, Advice.DONTNEED))
        await hold.reached()          # every driver has answered, nothing is discarded yet
        assert await process.read(heap.start, 5) == b"hello"
    await discarding                  # the end of the block has let it go

**Source**: proto/hmm_proto/v1/harness.proto.

**Invariants**: a hold ends with its block at the latest, and the call that it kept has gone on when the block ends.

**Absent**: what drivers do (`misbehaviour.py`).
"""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import Any, Self

from hmm.errors import NoSuchObjectError
from hmm.ksm import KsmPass
from hmm_client.arguments import names_arguments
from hmm_client.channel import RPC_ERRORS, as_error
from hmm_client.client import Client
from hmm_client.device import Device
from hmm_client.interval_mirror import IntervalMirror
from hmm_client.mirror import Mirror
from hmm_client.process import Process
from hmm_proto.v1 import harness_pb2


class HoldPoint(Enum):
    """Where a call can be held; the values are their names in scenario files."""

    BEFORE_EVENT = "before the event"
    """The ranges are busy, no mirror has been told."""
    EVENT_SENT = "event sent"
    """The event has left for a mirror."""
    ACKNOWLEDGED = "acknowledged"
    """A mirror has acknowledged; others may not have."""
    BEFORE_EDIT = "before the edit"
    """All mirrors have answered; no entry has changed, no page is freed."""
    AFTER_WAIT = "after waiting"
    """The call had to wait for others, and may go on."""
    BEFORE_END = "before the end"
    """Everything is done, the caller has not been told."""


class HoldEndedError(Exception):
    """A hold ended before its time: its lease was over, or the daemon is ending.  What it was for did not happen."""


class Hold:
    """A hold.  Made by `Harness.hold`, used in `async with`.

    Attributes:
        id: names it; `hmmctl pending` shows it.
        operation_id: the call that it keeps, once `reached` has returned; 0 before.
        ended: why it has ended; empty while it is in place.
    """

    def __init__(self, client: Client, request: harness_pb2.HoldRequest) -> None:
        self.id = 0
        self.operation_id = 0
        self.ended = ""
        self._client = client
        self._request = request
        self._call: Any = None

    def __repr__(self) -> str:
        point = HoldPoint[harness_pb2.HoldPoint.Name(self._request.point).removeprefix("HOLD_POINT_")]
        return f"<hold {self.id} of {self._request.operation or 'any call'} {point.value}>"

    async def __aenter__(self) -> Self:
        """Put it in place.

        Raises:
            AccessDeniedError: the daemon was not started with `harness` (EPERM).
            NoSuchObjectError: there is no such process (ESRCH).
        """
        try:
            self._call = self._client.harness.Hold(self._request, metadata=self._client.channel.metadata)
        except RPC_ERRORS as error:
            raise as_error(error, self._client.channel.target) from None
        self.id = (await self._read()).hold_id
        return self

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            if not self.ended:
                await self._release()
            if self.ended != "released" and error is None:
                raise HoldEndedError(f"{self!r} ended too early: {self.ended}")
        finally:
            self._call.cancel()

    async def reached(self) -> int:
        """Wait until a call has come to the point.  Returns: its operation id.

        Raises:
            HoldEndedError: the hold ended before one came.
        """
        if not self.operation_id:
            response = await self._read()
            self.operation_id, self.ended = response.operation_id, response.ended
        if not self.operation_id:
            raise HoldEndedError(f"nothing came to {self!r}: {self.ended}")
        return self.operation_id

    async def release(self) -> None:
        """Let the call go on.  When this returns it has gone on as far as it can.

        Raises:
            HoldEndedError: the hold had ended already.
        """
        await self._release()
        if self.ended != "released":
            raise HoldEndedError(f"{self!r} ended too early: {self.ended}")

    async def _release(self) -> None:
        try:
            request = harness_pb2.ReleaseHoldRequest(hold_id=self.id)
            await self._client.channel.request(self._client.harness.ReleaseHold, request)
        except NoSuchObjectError:
            pass  # it has ended; the stream says why
        while not self.ended:
            self.ended = (await self._read()).ended

    async def _read(self) -> harness_pb2.HoldResponse:
        try:
            response = await self._call.read()
        except RPC_ERRORS as error:
            raise as_error(error, self._client.channel.target) from None
        if not isinstance(response, harness_pb2.HoldResponse):
            raise HoldEndedError(f"{self!r} ended: the daemon is gone")
        return response


@names_arguments
class Harness:
    """What a daemon that was started with `harness` does for tests."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def hold(
        self,
        point: HoldPoint,
        operation: str = "",
        *,
        process: Process | None = None,
        mirror: Mirror | IntervalMirror | None = None,
        caller: str = "",
        skip: int = 0,
        lease_s: float | None = None,
    ) -> Hold:
        """Hold the next call that comes to a point; use the result in `async with`.

        Args:
            operation: the call's name, such as "munmap", or several: "fault|range_fault"; empty: any.
            process: whose address space the call is about; None: any.
            mirror: EVENT_SENT and ACKNOWLEDGED: whose event or answer counts; None: the first.
            caller: the name of the client that makes the call; empty: anybody.
            skip: how many calls pass the point before one is held.
            lease_s: seconds after which the hold ends by itself; None: the daemon's lease.
        """
        return Hold(
            self._client,
            harness_pb2.HoldRequest(
                point=harness_pb2.HoldPoint.Value(f"HOLD_POINT_{point.name}"),
                operation=operation,
                process_id=process.id if process else 0,
                mirror_id=mirror.id if mirror else 0,
                caller=caller,
                skip=skip,
                lease_ms=0 if lease_s is None else max(1, round(lease_s * 1000)),
            ),
        )

    async def fail_allocation(self, nth: int) -> None:
        """Make the nth page of system memory from now on impossible to allocate; 0: none any more.

        What is allocated behind it fails too, until a call has ended with ENOMEM.
        """
        await self._inject(harness_pb2.InjectFailureRequest(kind=harness_pb2.FAILURE_KIND_PAGE_ALLOCATION, nth=nth))

    async def fail_dma_mapping(self, device: Device, nth: int) -> None:
        """Make the nth DMA mapping of a device from now on fail, once; 0: none any more."""
        kind = harness_pb2.FAILURE_KIND_DMA_MAPPING
        await self._inject(harness_pb2.InjectFailureRequest(kind=kind, nth=nth, device_id=device.id))

    async def fail_migration(self, mirror: IntervalMirror, nth: int) -> None:
        """Make the nth allocation from now on fail, once, that is made to migrate pages for a mirror; 0: none any more.

        A huge page moves by small ones instead; a small page stays, and on the way back those behind it too.
        """
        kind = harness_pb2.FAILURE_KIND_MIGRATION
        await self._inject(harness_pb2.InjectFailureRequest(kind=kind, nth=nth, mirror_id=mirror.id))

    async def fail_migrate_to_ram(self, device: Device, nth: int) -> None:
        """Make the nth page from now on that is touched in a device's private memory stay there; 0: none any more.

        Whoever touches it gets SIGBUS, once.
        """
        kind = harness_pb2.FAILURE_KIND_MIGRATE_TO_RAM
        await self._inject(harness_pb2.InjectFailureRequest(kind=kind, nth=nth, device_id=device.id))

    async def fail_copy(self, mirror: Mirror | IntervalMirror, nth: int) -> None:
        """Make the copy of the nth page from now on fail, once, to a mirror's device or back; 0: none any more.

        Zeroes that the device is given count, and pages that others touch or evict.  Today such a page stays where it
        is, and a touch is SIGBUS; a mirror of 2015 keeps it in system memory, and loses it on the way back (SIGBUS).

        Raises:
            InvalidRequestError: the device has no memory, or its driver makes the copies and can refuse one (EINVAL).
            DeviceLostError, NoSuchObjectError: the mirror is gone (ENODEV).
        """
        kind = harness_pb2.FAILURE_KIND_COPY
        await self._inject(harness_pb2.InjectFailureRequest(kind=kind, nth=nth, mirror_id=mirror.id))

    async def scan_ksm(self, passes: int = 2) -> KsmPass:
        """Merge equal pages of all memory that asked for it (MADV_MERGEABLE), as the kernel's ksmd does unasked.

        Args:
            passes: a page is merged when it holds what it did one pass ago.

        Returns: what the last pass saw; `merged` of all.
        """
        request = harness_pb2.ScanKsmRequest(passes=passes)
        response = await self._client.channel.request(self._client.harness.ScanKsm, request)
        return KsmPass(**{field.name: getattr(response, field.name) for field in dataclasses.fields(KsmPass)})

    async def _inject(self, request: harness_pb2.InjectFailureRequest) -> None:
        await self._client.channel.request(self._client.harness.InjectFailure, request)
