"""A network card that reaches memory by DMA address and faults on demand (ODP), as RDMA cards do.

A memory region is registered once and named by a key.  The card keeps a translation for each of its pages; reads and
writes that are posted with the key go through these to DMA addresses.  When the process changes its mappings the card
drops translations and lets posted work finish; the next post faults them in again.  Nothing is pinned.

Serves JSON lines: reg_mr, dereg_mr, post_read, post_write, statistics.

**Source**: Linux drivers/infiniband/core/umem_odp.c, drivers/infiniband/hw/mlx5/odp.c; ibv_reg_mr(3).

**Invariants**: a post uses a translation only while the driver has not given it up.

**Absent**: queue pairs, the wire, two cards talking to one another.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from hmm import pte
from hmm.errors import AccessDeniedError, InvalidRequestError, NoSuchObjectError
from hmm.units import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, Address, AddressRange, Entries, ProcessId
from hmm_client.client import Client
from hmm_client.device import Device
from hmm_client.driver import Driver
from hmm_client.drivers.accesses import Accesses, accessed
from hmm_client.drivers.control import Operation, decode, driver_command, encode
from hmm_client.drivers.releases import Releases
from hmm_client.event import Event
from hmm_client.mirror import Mirror, Segment
from hmm_client.process import Process

MAX_POST_BYTES = 1 << 20
"""The card's largest message (max_msg_sz)."""
MAX_REGION_BYTES = 1 << 36
"""The card's largest region (max_mr_size)."""
FAULT_PAGES = 1 << 16
"""A region is faulted in so many pages at a time."""


@dataclass(slots=True)
class Statistics:
    """What the card has done.

    Attributes:
        page_faults, pages_faulted: faults on demand, and the pages that they brought in.
        invalidations, pages_dropped: events, and the translations that they took.
        stale_posts: posts that found a translation gone and faulted it in again.
    """

    reads: int = 0
    writes: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    page_faults: int = 0
    pages_faulted: int = 0
    invalidations: int = 0
    pages_dropped: int = 0
    stale_posts: int = 0


class MemoryRegion:
    """A registered piece of a process's memory.

    Attributes:
        key: names it in posts.
        span: its pages.
        entries: uint64[npages], the card's translations: DMA entries of the mirror, 0 where there is none.
    """

    def __init__(self, key: int, mirror: Mirror, address: Address, length: int, *, writable: bool) -> None:
        self.key = key
        self.mirror = mirror
        self.address = address
        self.length = length
        self.writable = writable
        self.span = AddressRange(address, address + length).page_aligned()
        self.entries = np.zeros(self.span.npages, np.uint64)

    def drop(self, event: Event) -> int:
        """Take the translations of an event's ranges away, or what its mask takes of them.  Returns: how many."""
        before = np.count_nonzero(self.entries)
        for span in event.spans:
            lost = span.intersect(self.span)
            if lost:
                entries = self.entries[self._index(lost.start) : self._index(lost.end)]
                entries &= np.uint64(event.pte_mask)
        return int(before - np.count_nonzero(self.entries))

    def missing(self, address: Address, length: int, *, write: bool) -> Entries:
        """uint64[n]: the pages of a part that cannot be translated for such an access."""
        first, last = self._index(address), self._index(address + length - 1)
        usable = pte.pte_test_valid_dma(self.entries[first : last + 1])
        if write:
            usable &= pte.pte_test_write(self.entries[first : last + 1])
        return (np.flatnonzero(~usable).astype(np.uint64) << np.uint64(PAGE_SHIFT)) + np.uint64(address & PAGE_MASK)

    def program(self, addresses: Entries, entries: Entries) -> None:
        """Store translations for uint64[n] pages."""
        self.entries[(addresses - np.uint64(self.span.start)) >> np.uint64(PAGE_SHIFT)] = entries

    def segments(self, address: Address, length: int) -> list[Segment]:
        """A part as (DMA address, length) pieces, one for each page."""
        first, last = self._index(address), self._index(address + length - 1)
        bases = pte.pte_dma_addr(self.entries[first : last + 1]).tolist()
        offset, left = address - (address & PAGE_MASK), length
        pieces = []
        for base in bases:
            size = min(PAGE_SIZE - offset, left)
            pieces.append((base + offset, size))
            offset, left = 0, left - size
        return pieces

    def _index(self, address: Address) -> int:
        return (address - self.span.start) >> PAGE_SHIFT


class RdmaCard(Driver):
    """The card and its driver."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._mirrors: dict[ProcessId, Mirror] = {}
        self._regions: dict[int, MemoryRegion] = {}
        self._accesses: dict[int, Accesses] = {}
        self._releases = Releases()
        self._mirroring = asyncio.Lock()
        self._keys = itertools.count(0x1000)
        self.statistics = Statistics()

    @classmethod
    async def register(cls, client: Client, name: str = "rdma0") -> RdmaCard:
        """Register a card with the daemon."""
        return cls(await client.register_device(name, dma=True))

    # ---- what the daemon calls

    async def update(self, event: Event) -> None:
        """Drop translations, then let the posts that use them finish."""
        self.statistics.invalidations += 1
        for region in self._regions.values():
            if region.mirror is event.mirror:
                self.statistics.pages_dropped += region.drop(event)
        await self._accesses_of(event.mirror).ended(event)

    async def release(self, mirror: Mirror) -> None:
        """The process is gone: so are its regions.  The mirror goes later, since this is a callback of it."""
        self._forget(mirror)
        await self._accesses_of(mirror).all_ended()
        self._releases.note(mirror)

    def lost(self, mirror: Mirror, why: str) -> None:  # noqa: ARG002 - the interface
        """The mirror was fenced: its regions are gone."""
        self._forget(mirror)

    # ---- what applications call

    async def reg_mr(self, process: Process, address: Address, length: int, *, writable: bool = True) -> MemoryRegion:
        """ibv_reg_mr(IBV_ACCESS_ON_DEMAND): register memory and fault all of it in.

        Raises:
            InvalidRequestError: it is empty or too large, or no process has it (EINVAL).
            BadAddressError: nothing usable is mapped at `error.address` (EFAULT).
            AccessDeniedError: the mapping there does not permit it (EACCES).
        """
        if not 0 < accessed("reg_mr", address, length).size_bytes <= MAX_REGION_BYTES:
            raise InvalidRequestError(f"reg_mr: a region has 1 to {MAX_REGION_BYTES:,} bytes, not {length:,}")
        mirror = await self.mirror(process)
        region = MemoryRegion(next(self._keys), mirror, address, length, writable=writable)
        self._regions[region.key] = region  # from now on events reach it
        try:
            missing = region.missing(address, length, write=writable)
            for first in range(0, missing.size, FAULT_PAGES):
                await self._fault(region, missing[first : first + FAULT_PAGES], write=writable)
        except BaseException:
            self._regions.pop(region.key, None)  # its process may have ended meanwhile
            raise
        return region

    def dereg_mr(self, key: int) -> None:
        """ibv_dereg_mr: the key is not valid any more."""
        del self._regions[self._region(key).key]

    async def post_read(self, key: int, address: Address, length: int) -> bytes:
        """RDMA READ: the card reads memory that was registered.

        Raises:
            NoSuchObjectError: the key is not valid (ENODEV).
            InvalidRequestError: the part is empty, too large or outside of the region (EINVAL).
            BadAddressError: nothing is mapped at `error.address` any more (EFAULT).
        """
        region = self._part(key, address, length)
        await self._translate(region, address, length, write=False)
        with self._accesses_of(region.mirror).to(address, length):
            data = await region.mirror.read(region.segments(address, length), dma=True)
        self.statistics.reads += 1
        self.statistics.bytes_read += length
        return data

    async def post_write(self, key: int, address: Address, data: bytes) -> None:
        """RDMA WRITE: the card writes memory that was registered as writable.

        Raises: as `post_read`; also
            AccessDeniedError: the region, or its mapping, is not writable (EACCES).
        """
        region = self._part(key, address, len(data))
        if not region.writable:
            raise AccessDeniedError(f"post_write: region {key:#x} is registered for reading only", address=address)
        await self._translate(region, address, len(data), write=True)
        with self._accesses_of(region.mirror).to(address, len(data)):
            await region.mirror.write(region.segments(address, len(data)), data, dma=True)
        self.statistics.writes += 1
        self.statistics.bytes_written += len(data)

    # ---- faulting on demand

    async def _translate(self, region: MemoryRegion, address: Address, length: int, *, write: bool) -> None:
        # Returns with all translations there; the caller uses them before anything else can run.
        missing = region.missing(address, length, write=write)
        self.statistics.stale_posts += bool(missing.size)
        while missing.size:
            await self._fault(region, missing, write=write)
            self._region(region.key)  # events do not reach it any more if it has gone meanwhile
            missing = region.missing(address, length, write=write)

    async def _fault(self, region: MemoryRegion, pages: Entries, *, write: bool) -> None:
        self.statistics.page_faults += 1
        faulted = await region.mirror.fault(pages, write=write)
        # Not stale, says the library; and nothing has run since.
        region.program(pages, faulted.entries)
        self.statistics.pages_faulted += pages.size

    # ---- mirrors

    async def mirror(self, process: Process) -> Mirror:
        """The mirror of a process, made when it is first asked for."""
        await self._unregister_released()
        async with self._mirroring:  # a process has one, however many ask at a time
            mirror = self._mirrors.get(process.id)
            if mirror is None:
                mirror = await self._device.mirror(process, self, fault_events=False)
                self._mirrors[process.id] = mirror
        return mirror

    async def unmirror(self, process: Process) -> None:
        """Forget all regions of a process, and stop mirroring it."""
        mirror = self._mirrors.get(process.id)
        if mirror is not None:
            self._forget(mirror)
            await self._leave(mirror)
        await self._unregister_released()

    async def _unregister_released(self) -> None:
        while (mirror := self._releases.take()) is not None:
            await self._leave(mirror)

    async def _leave(self, mirror: Mirror) -> None:
        await self._releases.unregister(mirror)
        self._accesses.pop(mirror.id, None)

    # ---- bookkeeping

    def _region(self, key: int) -> MemoryRegion:
        if key not in self._regions:
            raise NoSuchObjectError(f"there is no memory region {key:#x}", reason="REGION")
        return self._regions[key]

    def _part(self, key: int, address: Address, length: int) -> MemoryRegion:
        region = self._region(key)
        inside = region.address <= address and address + length <= region.address + region.length
        if not 0 < length <= MAX_POST_BYTES or not inside:
            raise InvalidRequestError(f"post: {length} bytes at {address:#x} are no part of region {key:#x}")
        return region

    def _accesses_of(self, mirror: Mirror) -> Accesses:
        return self._accesses.setdefault(mirror.id, Accesses())

    def _forget(self, mirror: Mirror) -> None:
        for key in [key for key, region in self._regions.items() if region.mirror is mirror]:
            del self._regions[key]
        self._mirrors.pop(mirror.process.id, None)


class RdmaOperations:
    """A card as another process uses it."""

    def __init__(self, client: Client, card: RdmaCard) -> None:
        self._client = client
        self._card = card

    async def reg_mr(self, process: int, address: int, length: int, *, writable: bool = True) -> dict[str, int]:
        """Register memory of the process of this id."""
        region = await self._card.reg_mr(self._client.process(process), address, length, writable=writable)
        return {"key": region.key}

    async def dereg_mr(self, key: int) -> None:
        """Forget a region."""
        self._card.dereg_mr(key)

    async def post_read(self, key: int, address: int, length: int) -> dict[str, str]:
        """Read."""
        return {"data": encode(await self._card.post_read(key, address, length))}

    async def post_write(self, key: int, address: int, data: str) -> None:
        """Write."""
        await self._card.post_write(key, address, decode(data))

    async def statistics(self) -> dict[str, int]:
        """What the card has done."""
        return asdict(self._card.statistics)


async def operations(client: Client) -> Mapping[str, Operation]:
    """Register a card; what applications may ask of it, by name."""
    served = RdmaOperations(client, await RdmaCard.register(client))
    return {
        "reg_mr": served.reg_mr,
        "dereg_mr": served.dereg_mr,
        "post_read": served.post_read,
        "post_write": served.post_write,
        "statistics": served.statistics,
    }


class CertifiedCard:
    """A card as `hmm_client.certify` drives it: every place that is accessed is registered once, and stays so."""

    def __init__(self, client: Client, card: RdmaCard) -> None:
        self._client = client
        self._card = card
        self._keys: dict[tuple[int, AddressRange, bool], int] = {}

    async def mirror(self, process: int) -> None:
        """Mirror a process."""
        await self._card.mirror(self._client.process(process))

    async def unmirror(self, process: int) -> None:
        """Deregister everything of a process, and its mirror."""
        for place in [place for place in self._keys if place[0] == process]:
            del self._keys[place]
        await self._card.unmirror(self._client.process(process))

    async def read(self, process: int, address: int, length: int) -> dict[str, str]:
        """RDMA READ."""
        key = await self._key(process, AddressRange(address, address + length), writable=False)
        return {"data": encode(await self._card.post_read(key, address, length))}

    async def write(self, process: int, address: int, data: str) -> None:
        """RDMA WRITE."""
        content = decode(data)
        key = await self._key(process, AddressRange(address, address + len(content)), writable=True)
        await self._card.post_write(key, address, content)

    async def _key(self, process: int, span: AddressRange, *, writable: bool) -> int:
        place = (process, span.page_aligned(), writable)
        if place not in self._keys:
            pages = place[1]
            region = await self._card.reg_mr(
                self._client.process(process), pages.start, pages.size_bytes, writable=writable
            )
            self._keys[place] = region.key
        return self._keys[place]


async def certified(client: Client) -> Mapping[str, Operation]:
    """Register a card; what `hmm_client.certify` asks of it."""
    served = CertifiedCard(client, await RdmaCard.register(client))
    return {"mirror": served.mirror, "unmirror": served.unmirror, "read": served.read, "write": served.write}


main = driver_command("rdma", operations, certified)

if __name__ == "__main__":
    main()
