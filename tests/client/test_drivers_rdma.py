"""The card that faults on demand: translations come by faults, go by events, and a post never uses one that is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest

import hmm_client
from hmm.errors import AccessDeniedError, BadAddressError, ConflictError, InvalidRequestError, NoSuchObjectError
from hmm.units import PAGE_SIZE
from hmm_client import Advice, Process, Prot
from hmm_client.drivers.rdma import RdmaCard
from hmm_client.harness import Harness, HoldPoint
from hmm_client.results import Mapped

if TYPE_CHECKING:
    from tests.conftest import Daemon

NPAGES = 16


@pytest.fixture
async def client(harness_daemon: Daemon) -> AsyncIterator[hmm_client.Client]:
    """A client of its own for each test."""
    async with hmm_client.connect(harness_daemon.target, name="rdma") as client:
        yield client


@pytest.fixture
async def card(client: hmm_client.Client, request: pytest.FixtureRequest) -> RdmaCard:
    """A card of its own for each test."""
    return await RdmaCard.register(client, request.node.name[:60])


@pytest.fixture
async def mapped(process: Process) -> Mapped:
    """Its memory."""
    return await process.mmap(NPAGES * PAGE_SIZE)


async def test_posts_reach_memory_when_the_region_is_registered(
    card: RdmaCard, process: Process, mapped: Mapped
) -> None:
    """Any alignment, across pages; the CPU sees what the card wrote, and the card what the CPU wrote."""
    region = await card.reg_mr(process, mapped.address + 100, 8 * PAGE_SIZE)
    assert card.statistics.pages_faulted == 9
    data = bytes(range(256)) * 40
    await card.post_write(region.key, mapped.address + 300, data)
    assert await process.read(mapped.address + 300, len(data)) == data
    await process.write(mapped.address + 301, b"cpu")
    assert await card.post_read(region.key, mapped.address + 299, 6) == b"\0\0cpu\x04"
    assert (card.statistics.page_faults, card.statistics.stale_posts) == (1, 0)


async def test_post_faults_again_when_an_event_took_its_translations(
    card: RdmaCard, process: Process, mapped: Mapped
) -> None:
    """Nothing is pinned: discarded pages are faulted in anew, and hold zeroes."""
    region = await card.reg_mr(process, mapped.address, NPAGES * PAGE_SIZE)
    await card.post_write(region.key, mapped.address, b"x" * NPAGES * PAGE_SIZE)
    await process.madvise(mapped.address, 4 * PAGE_SIZE, Advice.DONTNEED)
    assert (card.statistics.invalidations, card.statistics.pages_dropped) == (1, 4)
    assert await card.post_read(region.key, mapped.address + 2 * PAGE_SIZE, 3 * PAGE_SIZE) == (
        bytes(2 * PAGE_SIZE) + b"x" * PAGE_SIZE
    )
    assert (card.statistics.stale_posts, card.statistics.pages_faulted) == (1, NPAGES + 2)


async def test_write_permission_goes_alone_when_the_process_forks(
    card: RdmaCard, process: Process, mapped: Mapped
) -> None:
    """fork takes WRITE and leaves the translation: reads go on without a fault, a write faults and copies."""
    region = await card.reg_mr(process, mapped.address, PAGE_SIZE)
    await card.post_write(region.key, mapped.address, b"before")
    child = await process.fork()
    faults = card.statistics.page_faults
    assert await card.post_read(region.key, mapped.address, 6) == b"before"
    assert card.statistics.page_faults == faults
    await card.post_write(region.key, mapped.address, b"after!")
    assert card.statistics.page_faults == faults + 1
    assert await child.read(mapped.address, 6) == b"before"
    assert await process.read(mapped.address, 6) == b"after!"


async def test_post_fails_when_the_memory_is_gone_or_protected(
    card: RdmaCard, process: Process, mapped: Mapped
) -> None:
    """EFAULT where nothing is mapped any more, EACCES where the mapping does not permit it."""
    region = await card.reg_mr(process, mapped.address, NPAGES * PAGE_SIZE)
    await process.munmap(mapped.address, PAGE_SIZE)
    with pytest.raises(BadAddressError) as gone:
        await card.post_read(region.key, mapped.address, 1)
    assert gone.value.address == mapped.address
    await process.mprotect(mapped.page(1).start, PAGE_SIZE, Prot.READ)
    assert await card.post_read(region.key, mapped.page(1).start, 1) == b"\0"
    with pytest.raises(AccessDeniedError):
        await card.post_write(region.key, mapped.page(1).start, b"x")


async def test_post_is_refused_when_key_or_part_are_wrong(card: RdmaCard, process: Process, mapped: Mapped) -> None:
    """A key that was given back, a part outside of the region, a write to a region for reading."""
    region = await card.reg_mr(process, mapped.address, PAGE_SIZE, writable=False)
    with pytest.raises(InvalidRequestError):
        await card.post_read(region.key, mapped.address + 1, PAGE_SIZE)
    with pytest.raises(AccessDeniedError):
        await card.post_write(region.key, mapped.address, b"x")
    card.dereg_mr(region.key)
    with pytest.raises(NoSuchObjectError):
        await card.post_read(region.key, mapped.address, 1)
    with pytest.raises(InvalidRequestError):
        await card.reg_mr(process, mapped.address, 0)
    with pytest.raises(BadAddressError):
        await card.reg_mr(process, mapped.span.end, PAGE_SIZE)


async def test_region_is_refused_when_no_card_or_process_can_have_it(card: RdmaCard, process: Process) -> None:
    """Nothing is made for it: no translations of a petabyte."""
    for address, length in [(-PAGE_SIZE, PAGE_SIZE), (0, -1), (1 << 64, 1), (0, 1 << 60)]:
        with pytest.raises(InvalidRequestError, match="reg_mr: no process has"):
            await card.reg_mr(process, address, length)
    with pytest.raises(InvalidRequestError, match="1 to 68,719,476,736 bytes"):
        await card.reg_mr(process, 0, (1 << 36) + 1)


async def test_region_is_faulted_in_when_it_is_larger_than_one_fault(card: RdmaCard, process: Process) -> None:
    """The daemon takes 262,144 pages at most; a region of more comes in by several faults."""
    mapped = await process.mmap((1 << 30) + PAGE_SIZE, Prot.READ)
    await card.reg_mr(process, mapped.address, mapped.length, writable=False)
    assert card.statistics.pages_faulted == 262_145


async def test_process_is_mirrored_once_when_two_register_at_a_time(
    card: RdmaCard, process: Process, mapped: Mapped
) -> None:
    """Neither is refused because the other one's mirror is being made."""
    regions = await asyncio.gather(*(card.reg_mr(process, mapped.page(page).start, PAGE_SIZE) for page in range(2)))
    assert regions[0].mirror is regions[1].mirror


async def test_post_is_refused_when_its_region_goes_while_it_faults(
    client: hmm_client.Client, card: RdmaCard, process: Process, mapped: Mapped
) -> None:
    """No event reaches a region that was given back, so that no translation of it can be used."""
    region = await card.reg_mr(process, mapped.address, 2 * PAGE_SIZE)
    await process.madvise(mapped.address, PAGE_SIZE, Advice.DONTNEED)
    async with Harness(client).hold(HoldPoint.BEFORE_END, "fault", process=process) as hold:
        post = asyncio.create_task(card.post_read(region.key, mapped.address, 2 * PAGE_SIZE))
        await hold.reached()
        card.dereg_mr(region.key)
        await process.madvise(mapped.page(1).start, PAGE_SIZE, Advice.DONTNEED)
    with pytest.raises(NoSuchObjectError, match="no memory region"):
        await post


async def test_registration_fails_as_its_fault_does_when_the_process_ends_meanwhile(
    client: hmm_client.Client, card: RdmaCard, process: Process, mapped: Mapped
) -> None:
    """The region is gone by then, which is no reason to fail in another way."""
    async with Harness(client).hold(HoldPoint.BEFORE_END, "fault", process=process) as hold:
        registering = asyncio.create_task(card.reg_mr(process, mapped.address, PAGE_SIZE))
        await hold.reached()
        await process.exit()
    with pytest.raises(NoSuchObjectError):
        await registering


async def test_process_is_mirrored_no_more_when_it_is_let_go(card: RdmaCard, process: Process, mapped: Mapped) -> None:
    """Once, while it lives; it may be mirrored again."""
    region = await card.reg_mr(process, mapped.address, PAGE_SIZE)
    await card.unmirror(process)
    assert region.mirror.released
    assert not card._accesses
    await card.reg_mr(process, mapped.address, PAGE_SIZE)


async def test_regions_go_when_their_process_exits(card: RdmaCard, process: Process, mapped: Mapped) -> None:
    """`release` takes the keys; a region of another process can be registered afterwards."""
    region = await card.reg_mr(process, mapped.address, PAGE_SIZE)
    await process.exit()
    with pytest.raises(NoSuchObjectError):
        await card.post_read(region.key, mapped.address, 1)


async def test_posts_and_events_race_without_an_access_to_what_is_gone(
    card: RdmaCard, process: Process, mapped: Mapped
) -> None:
    """Every post succeeds whatever is discarded meanwhile: no DMA address is used after its event was answered."""
    region = await card.reg_mr(process, mapped.address, NPAGES * PAGE_SIZE)

    async def post(turn: int) -> None:
        address = mapped.address + turn * 997 % (12 * PAGE_SIZE)
        await card.post_write(region.key, address, bytes(turn % 251 for _ in range(2 * PAGE_SIZE)))

    async def discard(turn: int) -> None:
        await process.madvise(mapped.page(turn % 14).start, 2 * PAGE_SIZE, Advice.DONTNEED)

    await asyncio.gather(*(post(turn) for turn in range(100)), *(discard(turn) for turn in range(100)))
    assert card.statistics.writes == 100


async def test_mirror_is_unregistered_after_its_process_has_exited(
    client: hmm_client.Client, card: RdmaCard, process: Process, mapped: Mapped
) -> None:
    """A released mirror is given back at the next registration: the device can go when all processes have."""
    await card.reg_mr(process, mapped.address, PAGE_SIZE)
    await process.exit()
    other = await client.create_process("other")
    memory = await other.mmap(PAGE_SIZE)
    await card.reg_mr(other, memory.address, PAGE_SIZE)
    with pytest.raises(ConflictError, match="EBUSY"):
        await card._device.unregister()
    await card._mirrors[other.id].unregister()
    await card._device.unregister()
