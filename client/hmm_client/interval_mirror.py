"""A mirror of today's interface: subscriptions to a process's memory, of a driver that keeps its own table.

    notifier = await mirror.insert(start, length)
    sequence = await notifier.read_begin()
    faulted = await notifier.range_fault(span, sequence, REQ_FAULT)
    ... under the driver's own lock: if await notifier.read_retry(sequence): start over

or in one call, whose result is thrown away and asked for again by the library while events overtake it:

    faulted = await notifier.fault(span, REQ_FAULT | REQ_WRITE)

Requests and words are those of `hmm.range_fault` (REQ_FAULT, VALID, WRITE, ...), words of migrations those of
`hmm.migrate`.

**Source**: Linux include/linux/mmu_notifier.h, hmm.h, migrate.h, rmap.h; proto/hmm_proto/v1/hmm.proto.

**Invariants**: `fault` never returns words that an event handled meanwhile has taken back.

**Absent**: the driver (`interval_driver.py`), its table (`hmm_client.drivers.dmirror` has one).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hmm.commands_hmm import DmaMapped, Migrated, RangeFaulted, VmaView
from hmm.errors import HmmError, InvalidRequestError, RangeBusyError
from hmm.migration import Select
from hmm.units import PAGE_SHIFT, PAGE_SIZE, Address, AddressRange, Entries, Pfns
from hmm_client.arguments import names_arguments
from hmm_client.interval_driver import Adapter, IntervalDriver
from hmm_client.migration import Migration
from hmm_client.receiver import STALE_RETRIES, Receiver
from hmm_client.session import Session
from hmm_proto.convert import entries_from_proto, entries_of_parts, entries_to_proto, range_to_proto
from hmm_proto.status import from_call_result
from hmm_proto.v1 import hmm_pb2

if TYPE_CHECKING:
    from hmm_client.device import Device
    from hmm_client.process import Process

ACCESS_PAGES = 256
"""Accesses to more pages than this travel in parts."""
MIGRATE_BYTES = 1 << 17 << PAGE_SHIFT
"""Migrations of more than this are several."""


@names_arguments
class IntervalMirror(Receiver):
    """An attached device.  Made by `Device.attach`.

    Attributes:
        driver: who hears of changes.
        address_end: first byte behind what can be mapped.
    """

    def __init__(
        self,
        device: Device,
        process: Process,
        driver: IntervalDriver,
        session: Session,
        response: hmm_pb2.AttachResponse,
        *,
        concurrent: bool = False,
    ) -> None:
        adapter = self._adapter = Adapter(driver)
        super().__init__(
            device, process, adapter, session, response.mirror_id, response.space_id, concurrent=concurrent
        )
        self.driver = driver
        self.address_end = response.address_end

    async def make(self, name: str, request: Any) -> Any:
        """Make one call of `hmm.v1.HmmService`.  Returns: its response; raises what its result says."""
        (response,) = await self.call(name, request)
        self.require(response)
        return response

    # ---- subscriptions

    async def insert(
        self, start: Address, length: int, *, filtered: bool = False, two_pass: bool = False
    ) -> IntervalNotifier:
        """Subscribe to [start, start + length); subscriptions may overlap.

        Args:
            filtered: migrations that this mirror asks for itself do not disturb read sections.
            two_pass: the driver may start in `invalidate_start` and finish in `invalidate_finish`.

        Raises:
            InvalidRequestError: no length, or an end beyond all addresses (EOVERFLOW); the process has exited
                (EINVAL).
        """
        request = hmm_pb2.InsertNotifierRequest(
            mirror_id=self.id, start=start, length=length, filtered=filtered, two_pass=two_pass
        )
        notifier = IntervalNotifier(self, 0, AddressRange(start, start + length), two_pass=two_pass)
        unsettled = self._adapter.unsettled
        if two_pass:
            unsettled.append(notifier.span)
        try:
            notifier.id = (await self.make("insert_notifier", request)).notifier_id
        except HmmError:
            if two_pass:
                unsettled.remove(notifier.span)  # there is none
            raise
        if two_pass:
            self._adapter.two_pass.append(notifier.span)
            unsettled.remove(notifier.span)
        return notifier

    async def remove(self, notifier: IntervalNotifier) -> None:
        """As `IntervalNotifier.remove`."""
        two_pass, unsettled = self._adapter.two_pass, self._adapter.unsettled
        if notifier.two_pass and notifier.span in two_pass:
            two_pass.remove(notifier.span)
            unsettled.append(notifier.span)  # for good, where it is not known whether it is gone
        await self.make("remove_notifier", hmm_pb2.RemoveNotifierRequest(mirror_id=self.id, notifier_id=notifier.id))
        if notifier.two_pass and notifier.span in unsettled:
            unsettled.remove(notifier.span)

    async def detach(self) -> None:
        """End all subscriptions, after callbacks under way; pages that it put on its device stay there.

        Raises:
            WouldDeadlockError: called from inside a callback of this mirror (EDEADLK).
            TimedOutError: its policy is FAIL, and it still owes the answer to an abandoned event (ETIMEDOUT).
        """
        await self.make("detach", hmm_pb2.DetachRequest(mirror_id=self.id))
        self.released = True
        self.unbind()

    # ---- looking

    async def find_vma(self, address: Address) -> VmaView | None:
        """The mapping at an address (`vma_lookup()`).

        Raises:
            NoSuchObjectError: the process has exited (ESRCH).
        """
        response = await self.make("find_vma", hmm_pb2.FindVmaRequest(mirror_id=self.id, address=address))
        if not response.found:
            return None
        return VmaView(response.start, response.end, response.readable, response.writable)

    # ---- moving pages, and taking them

    async def migrate_to_device(
        self, span: AddressRange, *, compound: bool = False, wanted: npt.NDArray[np.bool_] | None = None
    ) -> Migrated:
        """Move what can be moved of a part of one mapping to the device, as far as it has room.

        More than 512 MiB is moved in parts.

        Args:
            compound: huge pages move as such (MIGRATE_VMA_SELECT_COMPOUND); under linux-6.12 they are split all the
                same.
            wanted: bool[npages], the pages that get a destination; None for all.  The others stay where they are, as
                those do whose `dst` a driver of the kernel leaves 0; of a huge page that moves as one the first counts.

        Returns: words, uint64[npages] each: MIGRATE stands in `src` of the pages that were moved, `dst` has their new
        frames.  With COMPOUND one stands for all of a huge page, and the others of that are 0.

        Raises: what parts before have moved stays moved;
            InvalidRequestError: no range of pages of one mapping, or one that nothing can be moved in (EINVAL).
            NoSuchObjectError: the device has no memory (ENODEV), or the process has exited (ESRCH).
        """
        return await self._migrate("migrate_to_device", hmm_pb2.MigrateToDeviceRequest, span, compound, wanted)

    async def migrate_to_system(
        self, span: AddressRange, *, compound: bool = False, wanted: npt.NDArray[np.bool_] | None = None
    ) -> Migrated:
        """Move what the device has of a part of one mapping back to system memory; as `migrate_to_device`."""
        return await self._migrate("migrate_to_system", hmm_pb2.MigrateToSystemRequest, span, compound, wanted)

    def migrate_vma(self, span: AddressRange, *, select: int = Select.SYSTEM) -> Migration:
        """A migration whose steps are taken here: `async with mirror.migrate_vma(span) as migration`.

        Args:
            span: page-aligned, in one mapping, at most 131,072 pages.
            select: what is collected besides holes (`hmm.migration.Select`): of device pages those of this device.

        Returns: the migration, which has not begun; a block that raises gives it up.
        """
        return Migration(self, span, select)

    async def _migrate(
        self, name: str, message: Any, span: AddressRange, compound: bool, wanted: npt.NDArray[np.bool_] | None
    ) -> Migrated:
        if wanted is not None and wanted.shape != (span.npages,):
            raise InvalidRequestError(f"{name}: {wanted.size} pages are wanted or not, of the {span.npages} of {span}")
        spans = [
            AddressRange(at, min(at + MIGRATE_BYTES, span.end)) for at in range(span.start, span.end, MIGRATE_BYTES)
        ]
        parts: list[Any] = []
        for part in spans or [span]:
            request = message(mirror_id=self.id, range=range_to_proto(part), compound=compound)
            if wanted is not None:
                first = (part.start - span.start) // PAGE_SIZE
                request.wanted = wanted[first : first + part.npages].astype(np.uint8).tobytes()
            replies = await self.call(name, request)
            self.require(replies[-1])
            parts += replies
        return Migrated(entries_of_parts(parts, "src"), entries_of_parts(parts, "dst"))

    async def make_exclusive(self, span: AddressRange, *, owned: bool = False) -> Pfns:
        """Take pages from the CPU until it touches them; it is as if nobody had them mapped.

        Args:
            span: at most 65,536 pages.
            owned: the event names this device and mirror.

        Returns: int64[n], frames up to the first page that could not be had, 0 for one that is not private memory.

        Raises:
            BadAddressError: not even the first page can be had (EFAULT).
            AccessDeniedError: it may not be written (EFAULT).
        """
        request = hmm_pb2.MakeExclusiveRequest(mirror_id=self.id, range=range_to_proto(span), owned=owned)
        return entries_from_proto((await self.make("make_exclusive", request)).pfns).view(np.int64)

    # ---- DMA

    async def dma_map(self, addresses: Entries, words: Entries, *, heard: int | None = None) -> DmaMapped:
        """Map pages of a range fault for DMA (`hmm_dma_map_pfn()`); all of them or none.

        Pages that are mapped keep their DMA address, and may be written from now on as their word says.

        Args:
            addresses: uint64[n], each another page; at most 65,536.
            words: uint64[n], what a range fault said of them.
            heard: `mirror.heard` when the driver looked at the words, if that was some time ago; None: now.

        Returns: the words with DMA_MAPPED, to be given to the next range fault and to `dma_unmap`; uint64[n] DMA
        addresses.

        Raises:
            InvalidRequestError: the device does no DMA (EOPNOTSUPP); a page twice, a word without VALID, one with
                DMA_MAPPED of a page that is not mapped, or a page whose last mapping reaches another frame (EINVAL).
            BadAddressError: the word of `error.address` is out of date, or it is in private memory of the device
                (EFAULT).
            OutOfFramesError: the IOMMU maps no more (ENOMEM).
        """
        request = hmm_pb2.DmaMapRequest(
            mirror_id=self.id,
            pages=entries_to_proto(addresses),
            words=entries_to_proto(words),
            heard_sequence=self.heard if heard is None else heard,
        )
        parts = await self.call("dma_map", request)
        self.require(parts[-1])
        return DmaMapped(entries_of_parts(parts, "words"), entries_of_parts(parts, "dma_addresses"))

    async def dma_unmap(self, addresses: Entries, words: Entries) -> Entries:
        """Unmap the pages whose word has VALID and DMA_MAPPED (`hmm_dma_unmap_pfn()`); others are left alone.

        A driver does that with what an event takes, before it returns from its callback.

        Args:
            addresses: uint64[n], each another page; at most 65,536.
            words: uint64[n], as `dma_map` returned them.

        Returns: the words anew; DMA_MAPPED is gone from those of the pages that were unmapped.

        Raises:
            InvalidRequestError: the device does no DMA (EOPNOTSUPP); a page is not mapped whose word says so (EINVAL);
                nothing was unmapped.
        """
        request = hmm_pb2.DmaUnmapRequest(
            mirror_id=self.id, pages=entries_to_proto(addresses), words=entries_to_proto(words)
        )
        parts = await self.call("dma_unmap", request)
        self.require(parts[-1])
        return entries_of_parts(parts, "words")

    # ---- what the device does

    async def read_frames(
        self,
        addresses: Entries,
        pfns: Pfns,
        *,
        offset: int = 0,
        length: int | None = None,
        heard: int | None = None,
    ) -> bytes:
        """The device reads pages, or a part of them, by the driver's table; in steps of 256 pages, each one atomic.

        Args:
            addresses: uint64[n], page-aligned.
            pfns: int64[n], what the driver believes to be there.
            offset: the first byte, within the first page.
            length: how many bytes, of every page at least one; None: all to the end of the last page.
            heard: `mirror.heard` when the driver looked at its table, if that was some time ago; None: now.

        Raises:
            InvalidRequestError: there is no such part of these pages (EINVAL).
            BadAddressError: `error.address` is no longer there (EFAULT).
        """
        return await self._read(addresses, pfns, offset, length, heard)

    async def read_dma(
        self, pages: Entries, *, offset: int = 0, length: int | None = None, heard: int | None = None
    ) -> bytes:
        """As `read_frames`, of pages named by DMA address, uint64[n].

        Raises: as `read_frames`; also
            InvalidRequestError: the device does no DMA (EOPNOTSUPP).
            BadAddressError: nothing is mapped, or no more, at the DMA address `error.address` (EFAULT).
        """
        return await self._read(pages, None, offset, length, heard)

    async def _read(
        self, addresses: Entries, pfns: Pfns | None, offset: int, length: int | None, heard: int | None
    ) -> bytes:
        wanted = addresses.size * PAGE_SIZE - offset if length is None else length
        heard = self.heard if heard is None else heard  # of all parts: the driver has looked once
        parts = []
        for pages, frames, at, end in _parts("read", addresses, pfns, offset, wanted):
            request = hmm_pb2.ReadFramesRequest(mirror_id=self.id, pages=pages, pfns=frames, dma=pfns is None)
            request.heard_sequence = heard
            request.offset, request.length = 0 if at else offset, end - at
            parts.append((await self.make("read_frames", request)).data)
        return b"".join(parts)

    async def write_frames(
        self, addresses: Entries, pfns: Pfns, data: bytes, *, offset: int = 0, heard: int | None = None
    ) -> None:
        """The device writes pages, or a part of them, by the driver's table; in steps of 256 pages, each one atomic.

        Args:
            data: for every page at least one byte.
            offset: where the data begins, within the first page.
            heard: as in `read_frames`.

        Raises: as `read_frames`; also
            AccessDeniedError: `error.address` may not be written (EACCES).
        """
        await self._write(addresses, pfns, data, offset, heard)

    async def write_dma(self, pages: Entries, data: bytes, *, offset: int = 0, heard: int | None = None) -> None:
        """As `write_frames`, of pages named by DMA address, uint64[n].

        Raises: as `read_dma`; also
            AccessDeniedError: the DMA address `error.address` was not mapped for writing (EACCES).
        """
        await self._write(pages, None, data, offset, heard)

    async def _write(self, addresses: Entries, pfns: Pfns | None, data: bytes, offset: int, heard: int | None) -> None:
        heard = self.heard if heard is None else heard
        for pages, frames, at, end in _parts("write", addresses, pfns, offset, len(data)):
            request = hmm_pb2.WriteFramesRequest(
                mirror_id=self.id, pages=pages, pfns=frames, data=data[at:end], dma=pfns is None
            )
            request.heard_sequence = heard
            request.offset = 0 if at else offset
            await self.make("write_frames", request)


@names_arguments
class IntervalNotifier:
    """One subscription: `struct mmu_interval_notifier`.  Made by `IntervalMirror.insert`."""

    def __init__(self, mirror: IntervalMirror, notifier_id: int, span: AddressRange, *, two_pass: bool = False) -> None:
        self.mirror = mirror
        self.id = notifier_id
        self.span = span
        self.two_pass = two_pass

    def __repr__(self) -> str:
        return f"<notifier {self.id} of {self.mirror!r} for {self.span}>"

    async def remove(self) -> None:
        """Unsubscribe; no callback for this range is running afterwards, and none will come.

        Raises:
            WouldDeadlockError: called from inside a callback (EDEADLK).
        """
        await self.mirror.remove(self)

    async def read_begin(self) -> int:
        """Begin a read section; waits while the range is being invalidated.

        Returns: what `read_retry` has to be asked with.  It may be outdated already.
        """
        request = hmm_pb2.ReadBeginRequest(mirror_id=self.mirror.id, notifier_id=self.id)
        notifier_seq: int = (await self.mirror.make("read_begin", request)).notifier_seq
        return notifier_seq

    async def read_retry(self, notifier_seq: int) -> bool:
        """Whether an invalidation came meanwhile, so that everything read has to be thrown away."""
        request = hmm_pb2.ReadRetryRequest(mirror_id=self.mirror.id, notifier_id=self.id, notifier_seq=notifier_seq)
        retry: bool = (await self.mirror.make("read_retry", request)).retry
        return retry

    async def range_fault(
        self,
        span: AddressRange,
        notifier_seq: int,
        default_flags: int = 0,
        pfn_flags_mask: int = 0,
        words: Entries | None = None,
        *,
        partial: bool = False,
    ) -> RangeFaulted:
        """hmm_range_fault(), once; without requests a snapshot, which never faults.

        Args:
            span: at most 262,144 pages.
            notifier_seq: from `read_begin`.
            default_flags: requests for all pages.
            pfn_flags_mask: which bits of `words` count as requests.
            words: uint64[npages], the pages' own requests; None: all 0.
            partial: an error stays in the result, with the words below the failing address; False: it is raised.

        Raises:
            RangeBusyError: an invalidation came since: begin again (EBUSY).
            BadAddressError: a page that is wanted cannot be had, or only by a userfaultfd's handler, for which `fault`
                can wait (EFAULT), `error.address`.
            AccessDeniedError: a page is wanted for writing and its mapping does not permit it (EPERM).
        """
        request = self._request(span, default_flags, pfn_flags_mask, words)
        request.notifier_seq = notifier_seq
        return self._result(await self._fault(request), partial)

    async def fault(
        self,
        span: AddressRange,
        default_flags: int = 0,
        pfn_flags_mask: int = 0,
        words: Entries | None = None,
        *,
        partial: bool = False,
        deadline_s: float | None = None,
    ) -> RangeFaulted:
        """Begin, fault and retry as one call.  What an event has taken back meanwhile is asked for again.

        Args: as `range_fault`; and
            deadline_s: seconds until it gives up; None: the daemon's default.

        Raises: as `range_fault`, where EBUSY means that the range was invalidated, or the handler of a userfaultfd did
            not bring a page in, until the deadline; also
            TimedOutError: another driver did not answer until the deadline (ETIMEDOUT).
            WouldDeadlockError: made inside a callback that it would have to wait for (EDEADLK).
        """
        request = self._request(span, default_flags, pfn_flags_mask, words)
        request.deadline_ms = 0 if deadline_s is None else max(1, round(deadline_s * 1000))
        for _ in range(STALE_RETRIES):
            faulted = self._result(await self._fault(request), partial)
            if not self.is_stale(span, faulted):
                return faulted
        raise RangeBusyError(f"range fault: {span} was invalidated {STALE_RETRIES} times meanwhile")

    def is_stale(self, span: AddressRange, faulted: RangeFaulted) -> bool:
        """True when an event that came later takes back what a fault of `span` returned; no call is made.

        `fault` has looked already; this is for results that were kept for a while, or came to another thread.
        """
        start, end = np.array([span.start], np.uint64), np.array([span.end], np.uint64)
        return self.mirror.has_heard_since(faulted.event_sequence, start, end)

    def _request(
        self, span: AddressRange, default_flags: int, pfn_flags_mask: int, words: Entries | None
    ) -> hmm_pb2.RangeFaultRequest:
        return hmm_pb2.RangeFaultRequest(
            mirror_id=self.mirror.id,
            notifier_id=self.id,
            range=range_to_proto(span),
            default_flags=default_flags,
            pfn_flags_mask=pfn_flags_mask,
            words=b"" if words is None else entries_to_proto(words),
        )

    async def _fault(self, request: hmm_pb2.RangeFaultRequest) -> RangeFaulted:
        parts = await self.mirror.call("range_fault", request)
        last = parts[-1]
        return RangeFaulted(
            words=entries_of_parts(parts, "words"),
            error=from_call_result(last.result),
            notifier_seq=last.notifier_seq,
            event_sequence=last.last_event_sequence,
            retries=last.retries,
        )

    def _result(self, faulted: RangeFaulted, partial: bool) -> RangeFaulted:
        if faulted.error is not None and not (partial and faulted.words.size):
            self.mirror.fail(faulted.error)
        return faulted


def _parts(
    operation: str, addresses: Entries, pfns: Pfns | None, offset: int, length: int
) -> Iterator[tuple[bytes, bytes, int, int]]:
    """Steps of an access: pages, frames if they are named, and which of its bytes are theirs, from one to behind."""
    size = addresses.size * PAGE_SIZE
    if not (0 <= offset < PAGE_SIZE and size - PAGE_SIZE < offset + length <= size):
        raise InvalidRequestError(f"{operation} frames: {length} bytes from {offset} for {addresses.size} pages")
    for first in range(0, addresses.size, ACCESS_PAGES):
        pages = addresses[first : first + ACCESS_PAGES]
        frames = b"" if pfns is None else entries_to_proto(pfns[first : first + ACCESS_PAGES].view(np.uint64))
        at, end = first * PAGE_SIZE - offset, (first + pages.size) * PAGE_SIZE - offset
        yield entries_to_proto(pages), frames, max(0, at), min(length, end)
