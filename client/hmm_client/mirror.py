"""A mirror: one device's view of one process's memory, as its driver holds it.

**Source**: 2015: `struct hmm_mirror`, `hmm_mirror_fault()`, `hmm_mirror_range_dirty()`, `hmm_mirror_range_discard()`;
today: `hmm_range_fault()` with `mmu_interval_read_retry()`; proto/hmm_proto/v1/device.proto.

**Invariants**: a fault never returns entries that an event handled meanwhile has taken back.

**Absent**: the driver (`driver.py`), the stream (`session.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from hmm import pte
from hmm.errors import HmmError, RangeBusyError
from hmm.units import PAGE_SHIFT, PAGE_SIZE, AddressRange, Entries, Pfns
from hmm_client.arguments import names_arguments
from hmm_client.driver import Driver
from hmm_client.event import pages_of
from hmm_client.receiver import STALE_RETRIES, Receiver
from hmm_client.session import Session
from hmm_proto.convert import entries_from_proto, entries_of_parts, entries_to_proto, range_to_proto
from hmm_proto.status import from_call_result
from hmm_proto.v1 import device_pb2

if TYPE_CHECKING:
    from hmm_client.device import Device
    from hmm_client.process import Process

Target: TypeAlias = AddressRange | Sequence[AddressRange] | Entries
"""One range, many (ascending, disjoint), or scattered pages: uint64[n] addresses, ascending."""
Segment: TypeAlias = tuple[int, int]
"""(address, length in bytes)"""


MIGRATE_PAGES_MAX = 512
"""Pages that one call moves."""
COPY_CALL_PAGES = 256
"""Pages that one call carries, 1 MiB."""


@dataclass(frozen=True, slots=True, eq=False)
class Migrated:
    """What a migration moved.

    Attributes:
        span: how far it went.
        npages: pages that moved; others were there already, or stay because somebody else uses them.
        entries: uint64[n], the mirror's entries of all pages of `span`, 0 for none.
        error: what stopped it, if it is a partial result.
    """

    span: AddressRange
    npages: int
    entries: Entries
    error: HmmError | None = None


class Faulted:
    """What a device fault brought in.  Most of it is read when it is asked for.

    Attributes:
        error: what stopped the fault, if it is a partial result.
        event_sequence: the last event of the mirror that the entries include.
    """

    def __init__(self, target: tuple[AddressRange, ...] | Entries, parts: Sequence[device_pb2.FaultResponse]) -> None:
        """Read a reply.

        Args:
            target: the ranges or pages that were asked for.
        """
        self._target = target
        self._parts = parts
        self._last = last = parts[-1]
        self.error: HmmError | None = from_call_result(last.result)
        self.event_sequence: int = last.last_event_sequence

    @property
    def notifier_seq(self) -> int:
        """The sequence of the address space when the entries were read."""
        return self._last.notifier_seq

    @property
    def retries(self) -> int:
        """How often the fault started over because the range was invalidated."""
        return self._last.retries

    @property
    def operation_id(self) -> int:
        """Names the call."""
        return self._last.result.operation_id

    @cached_property
    def starts(self) -> Entries:
        """uint64[k]: the starts of the ranges asked for; of scattered pages, one range for each page."""
        if isinstance(self._target, np.ndarray):
            return self._target
        return np.array([span.start for span in self._target], np.uint64)

    @cached_property
    def ends(self) -> Entries:
        """uint64[k]: the ends of the same ranges."""
        if isinstance(self._target, np.ndarray):
            return self._target + np.uint64(PAGE_SIZE)
        return np.array([span.end for span in self._target], np.uint64)

    @cached_property
    def filled(self) -> Entries:
        """uint64[k']: for each range (for scattered pages, one in all) where it ended: on success behind its end."""
        return np.fromiter(self._last.range_ends, np.uint64)

    @cached_property
    def errnos(self) -> npt.NDArray[np.int32]:
        """int32[k']: for each of these 0 or what stopped it."""
        return np.fromiter(self._last.range_errnos, np.int32)

    @cached_property
    def entries(self) -> Entries:
        """uint64[npages], read-only: the mirror's entry of every page asked for, 0 for a page that failed.

        Empty if they were not wanted.
        """
        return entries_of_parts(self._parts, "entries")

    @property
    def pages(self) -> Entries:
        """uint64[npages]: the address of every page asked for."""
        return pages_of(self.starts, self.ends)

    @property
    def pfns(self) -> Pfns:
        """int64[npages]: frame numbers; 0 where there is none."""
        return pte.pte_pfn(self.entries)

    @property
    def dma_addresses(self) -> Entries:
        """uint64[npages]: addresses on the device's bus; 0 where there is none."""
        return pte.pte_dma_addr(self.entries)

    @property
    def writable(self) -> npt.NDArray[np.bool_]:
        """bool[npages]: where the device may write."""
        return pte.pte_test_write(self.entries)


@names_arguments
class Mirror(Receiver):
    """A registered mirror of the 2015 interface, whose table the daemon keeps.  Made by `Device.mirror`.

    Attributes:
        driver: who hears of changes.
        address_end: first byte behind what can be mirrored.
        released: True after `Driver.release`.
        faults: how many faults were made, repeats included.
    """

    def __init__(
        self,
        device: Device,
        process: Process,
        driver: Driver,
        session: Session,
        response: device_pb2.RegisterMirrorResponse,
        *,
        concurrent: bool = False,
    ) -> None:
        super().__init__(device, process, driver, session, response.mirror_id, response.space_id, concurrent=concurrent)
        self.driver = driver
        self.address_end = response.address_end
        self.faults = 0

    def is_stale(self, faulted: Faulted) -> bool:
        """True when an event that came later takes back what a fault returned (`mmu_interval_read_retry()`).

        `fault` has looked already; this is for results that were kept for a while, or came to another thread.
        """
        sequence = faulted.event_sequence
        return self.has_news_since(sequence) and self.has_heard_since(sequence, faulted.starts, faulted.ends)

    # ---- calls

    async def fault(
        self,
        target: Target,
        *,
        write: bool = False,
        wait: bool = True,
        first_mapping_only: bool = False,
        partial: bool = False,
        omit_entries: bool = False,
        deadline_s: float | None = None,
    ) -> Faulted:
        """Bring pages in: begin, fault and retry as one call.  Stale results are thrown away and asked for again.

        Args:
            target: one range, many, or scattered pages; together at most 262,144 pages.
            write: every page must come out writable.
            wait: False: EBUSY at once while the range is being invalidated.
            first_mapping_only: each range ends at the end of its first mapping, as hmm_mirror_fault() trims it.
            partial: errors of ranges stay in the result; False: they are raised.
            omit_entries: the event has them; do not send them twice.
            deadline_s: seconds until the fault ends with ETIMEDOUT; None: the daemon's default.

        Raises:
            BadAddressError: nothing usable is mapped at `error.address` (EFAULT).
            AccessDeniedError: the mapping there does not permit it (EACCES).
            OutOfFramesError: no memory is left (ENOMEM).
            RangeBusyError: the range is being invalidated, and `wait` is False; or again and again (EBUSY).
            TimedOutError: the deadline passed (ETIMEDOUT).
            WouldDeadlockError: made inside a callback that it would have to wait for (EDEADLK).
            DeviceLostError: the mirror was fenced (ENODEV).

        Cost: one round trip, 10 ns per page.
        """
        request = device_pb2.FaultRequest()
        request.mirror_id = self.id
        if isinstance(target, np.ndarray):
            request.pages = entries_to_proto(target)
        else:
            target = (target,) if isinstance(target, AddressRange) else _spans(target)
            starts, ends = request.ranges.starts, request.ranges.ends
            for span in target:
                starts.append(span.start)
                ends.append(span.end)
        # Most faults have little of what follows, and a test costs less than a field.
        if write:
            request.write = True
        if not wait:
            request.no_wait = True
        if first_mapping_only:
            request.first_mapping_only = True
        if omit_entries:
            request.omit_entries = True
        if deadline_s is not None:
            request.deadline_ms = max(1, round(deadline_s * 1000))
        for _ in range(STALE_RETRIES):
            self.faults += 1
            try:
                faulted = Faulted(target, await self.ask("fault", request))
            except HmmError as error:
                self.fail(error)
            if faulted.error is not None and not (partial and faulted.errnos.any()):
                self.fail(faulted.error)
            if not self.is_stale(faulted):
                return faulted
        raise RangeBusyError(
            f"fault: the range was invalidated {STALE_RETRIES} times meanwhile", address=_first(target)
        )

    async def migrate(self, span: AddressRange, *, partial: bool = False) -> Migrated:
        """Move what can be moved of a range to the device's memory: `hmm_mirror_fault()` with COPY_TO_DEVICE.

        Pages that others use stay where they are.  Goes on across mappings, in calls of 512 pages.

        Args:
            span: page-aligned, of private anonymous memory.
            partial: what stopped it stays in the result; False: it is raised.

        Raises:
            InvalidRequestError: a part is not private anonymous memory (EINVAL).
            BadAddressError: a part is not mapped (EFAULT).
            OutOfFramesError: the device is full, or its driver has no memory; what moved has moved (ENOMEM).
            NoSuchObjectError: the device has no memory that the CPU cannot reach (ENODEV).
            DeviceLostError: the mirror was fenced (ENODEV).
        """
        return await self._migrate(span, partial, to_system=False)

    async def migrate_back(self, span: AddressRange, *, partial: bool = False) -> Migrated:
        """Bring back to system memory what the device has of a range.

        Raises: as `migrate`; OutOfFramesError: system memory is full (ENOMEM).
        """
        return await self._migrate(span, partial, to_system=True)

    async def _migrate(self, span: AddressRange, partial: bool, *, to_system: bool) -> Migrated:
        at, moved, parts, error = span.start, 0, [np.empty(0, np.uint64)], None
        while at < span.end and error is None:
            piece = AddressRange(at, min(span.end, at + MIGRATE_PAGES_MAX * PAGE_SIZE))
            request = device_pb2.MigrateRequest(mirror_id=self.id, range=range_to_proto(piece), to_system=to_system)
            replies = await self.call("migrate", request)
            last = replies[-1]
            error = from_call_result(last.result)
            if error is not None and not partial:
                self.fail(error)
            moved += last.moved_pages
            entries = entries_of_parts(replies, "entries")
            at = last.end or piece.start
            parts.append(entries[: (at - piece.start) >> PAGE_SHIFT])
        return Migrated(AddressRange(span.start, max(span.start, at)), moved, np.concatenate(parts), error)

    async def read_copy(self, copy: int, first: int, npages: int) -> bytes:
        """As `Event.read_pages`."""
        parts = []
        for at in range(first, first + npages, COPY_CALL_PAGES):
            count = min(COPY_CALL_PAGES, first + npages - at)
            request = device_pb2.ReadCopyRequest(mirror_id=self.id, copy=copy, first_page=at, page_count=count)
            (response,) = await self.call("read_copy", request)
            parts.append(response.data)
        return b"".join(parts)

    async def write_copy(self, copy: int, data: bytes, first: int = 0) -> None:
        """As `Event.write_pages`."""
        view = memoryview(data)
        for at in range(0, len(data), COPY_CALL_PAGES * PAGE_SIZE):
            part = bytes(view[at : at + COPY_CALL_PAGES * PAGE_SIZE])
            page = first + (at >> PAGE_SHIFT)
            request = device_pb2.WriteCopyRequest(mirror_id=self.id, copy=copy, first_page=page, data=part)
            await self.call("write_copy", request)

    async def read(
        self,
        segments: Sequence[Segment],
        *,
        dma: bool = False,
        entries: Entries | None = None,
        heard: int | None = None,
    ) -> bytes:
        """The device gathers bytes, through the mirror's table; it never faults pages in.

        Args:
            segments: (address, length) in any order; together at most 1 MiB.
            dma: the addresses are the device's DMA addresses.
            entries: uint64[npages], those that the device goes by, for all pages of all segments: the daemon compares
                them with the mirror's.  None: it has no table of its own.
            heard: what `self.heard` was when the device looked at its table; None: it does so now.

        Raises:
            BadAddressError: `error.address` has no valid entry; nothing was read (EFAULT).  `error.violation` says
                what had taken it.
            DeviceLostError: the mirror was fenced (ENODEV).
        """
        addresses, lengths = _split(segments)
        request = device_pb2.DeviceReadRequest(
            mirror_id=self.id,
            addresses=addresses,
            lengths=lengths,
            dma=dma,
            heard_sequence=self.heard if heard is None else heard,
        )
        if entries is not None:
            request.entries = entries_to_proto(entries)
        (response,) = await self.call("device_read", request)
        self.require(response)
        data: bytes = response.data
        return data

    async def write(
        self,
        segments: Sequence[Segment],
        data: bytes,
        *,
        dma: bool = False,
        entries: Entries | None = None,
        heard: int | None = None,
        untracked: bool = False,
    ) -> None:
        """The device scatters bytes, through the mirror's table; the entries become dirty.

        Args:
            segments: (address, length) in any order; together as long as `data`, at most 1 MiB.
            dma, entries, heard: as `read`.
            untracked: the device sets no dirty bits: the driver reports what was written, by `dirty` or by what
                `Driver.update` returns.

        Raises: as `read`; also
            AccessDeniedError: the entry of `error.address` is read-only; nothing was written (EACCES).
        """
        addresses, lengths = _split(segments)
        request = device_pb2.DeviceWriteRequest(
            mirror_id=self.id,
            addresses=addresses,
            lengths=lengths,
            dma=dma,
            data=data,
            heard_sequence=self.heard if heard is None else heard,
            untracked=untracked,
        )
        if entries is not None:
            request.entries = entries_to_proto(entries)
        (response,) = await self.call("device_write", request)
        self.require(response)

    async def dirty(self, span: AddressRange) -> None:
        """Report that the device has written in a range in a way of its own (`hmm_mirror_range_dirty()`)."""
        await self.call("dirty_range", device_pb2.DirtyRangeRequest(mirror_id=self.id, range=range_to_proto(span)))

    async def discard(self, span: AddressRange) -> None:
        """Drop a range that the device has stopped using (`hmm_mirror_range_discard()`); no event is sent."""
        await self.call("discard_range", device_pb2.DiscardRangeRequest(mirror_id=self.id, range=range_to_proto(span)))

    async def set_driver_bits(self, span: AddressRange, bits: int) -> None:
        """Set the driver's own bits, 0 to 15, of all valid entries of a range."""
        request = device_pb2.SetDriverBitsRequest(mirror_id=self.id, range=range_to_proto(span), bits=bits)
        await self.call("set_driver_bits", request)

    async def read_table(self, span: AddressRange) -> Entries:
        """uint64[npages]: the entries of a range as they are now, 0 where there is none."""
        entries = np.zeros(span.npages, np.uint64)
        for part in await self.call(
            "read_table", device_pb2.ReadTableRequest(mirror_id=self.id, range=range_to_proto(span))
        ):
            found = entries_from_proto(part.entries)
            first = (part.start - span.start) >> PAGE_SHIFT
            entries[first : first + found.size] = found
        return entries

    async def unregister(self) -> None:
        """Stop mirroring: callbacks under way end, `Driver.release` is called, then the mirror is gone.

        Raises:
            WouldDeadlockError: called from inside a callback of this mirror (EDEADLK).
        """
        (response,) = await self.call("unregister_mirror", device_pb2.UnregisterMirrorRequest(mirror_id=self.id))
        self.require(response)
        self.unbind()


def _first(target: tuple[AddressRange, ...] | Entries) -> int:
    return int(target[0]) if isinstance(target, np.ndarray) else target[0].start


def _spans(target: object) -> tuple[AddressRange, ...]:
    spans = tuple(target) if isinstance(target, Iterable) else (target,)
    if not all(isinstance(span, AddressRange) for span in spans):
        raise TypeError(f"what is faulted in is an AddressRange, several, or an array of addresses; not {target!r}")
    return spans


def _split(segments: Sequence[Segment]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Addresses and lengths of segments."""
    try:
        addresses, lengths = zip(*segments, strict=True) if segments else ((), ())
    except (TypeError, ValueError):
        raise TypeError(f"segments are pairs (address, length), in a list; not {segments!r}") from None
    return addresses, lengths
