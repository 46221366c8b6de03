"""Words of range faults become DMA addresses: mapping, unmapping, what a device does there, and what drivers forget."""

from __future__ import annotations

import errno as errnos
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from area import BASE

from hmm import commands_device, commands_failures, commands_hmm, commands_process
from hmm.dma_map import DmaMap
from hmm.errors import (
    AccessDeniedError,
    BadAddressError,
    DeviceLostError,
    InvalidRequestError,
    NoSuchObjectError,
    OutOfFramesError,
)
from hmm.events import Event
from hmm.iommu import Domain, Iommu
from hmm.machine import Machine
from hmm.madvise import Advice
from hmm.page_table import PageTable
from hmm.range_fault import DMA_MAPPED, ERROR, REQ_FAULT, REQ_WRITE, VALID, WRITE, word_pfns
from hmm.units import PAGE_SIZE, TASK_SIZE, Entries
from hmm.violation import ViolationKind
from hmm.vma import Prot

BOTH = REQ_FAULT | REQ_WRITE
MAPPED = np.uint64(DMA_MAPPED)


class Card:
    """A mirror of the bench's process whose device does DMA, and a driver that unmaps what it is told to.

    Attributes:
        words: uint64[16], the driver's: those of the window.
        forgetful: it does not unmap.
    """

    def __init__(self, bench: Any, **device: Any) -> None:
        self.bench, self.forgetful = bench, False
        self.id = bench.call(commands_device.register_device, "nic", dma=True, **device)
        self.mirror, self.heard = bench.attach(self.id, bench.process)
        self.words = np.zeros(16, np.uint64)
        self.heard.update = self.update

    def update(self, _: int, event: Event) -> int:
        """Unmap, and forget what was mapped."""
        self.heard.events.append(event)
        if not self.forgetful:
            for span in event.spans:
                first, end = (int(np.clip((at - BASE) // PAGE_SIZE, 0, 16)) for at in (span.start, span.end))
                self.unmap(first, end - first)
                self.words[first:end] = 0
        return 0

    @staticmethod
    def addresses(at: int, npages: int = 1) -> Entries:
        """Pages of the window."""
        return np.arange(BASE + at * PAGE_SIZE, BASE + (at + npages) * PAGE_SIZE, PAGE_SIZE, dtype=np.uint64)

    def fault(self, at: int, npages: int = 1, flags: int = REQ_FAULT) -> None:
        """A range fault, which is given the driver's words."""
        part = slice(at, at + npages)
        faulted = self.bench.call(
            commands_hmm.range_fault_unlocked, self.mirror, 1, self.bench.span(at, npages), flags, 0, self.words[part]
        )
        self.words[part] = faulted.require()

    def map(self, at: int, npages: int = 1) -> Entries:
        """Map by the driver's words."""
        part = slice(at, at + npages)
        mapped = self.bench.call(commands_hmm.dma_map, self.mirror, self.addresses(at, npages), self.words[part])
        self.words[part] = mapped.words
        addresses: Entries = mapped.dma_addresses
        return addresses

    def have(self, at: int, npages: int = 1, flags: int = REQ_FAULT) -> Entries:
        """Fault and map."""
        self.fault(at, npages, flags)
        return self.map(at, npages)

    def unmap(self, at: int, npages: int = 1) -> list[bool]:
        """Unmap by the driver's words.  Returns: which pages were mapped."""
        part = slice(at, at + npages)
        words = self.bench.call(commands_hmm.dma_unmap, self.mirror, self.addresses(at, npages), self.words[part])
        were = ((words ^ self.words[part]) & MAPPED) != 0
        self.words[part] = words
        return [bool(one) for one in were]

    def read(self, pages: Entries, **part: int) -> bytes:
        """The device reads."""
        return bytes(self.bench.call(commands_hmm.read_dma, self.mirror, pages, **part))

    def write(self, pages: Entries, data: bytes, **part: int) -> None:
        """The device writes."""
        self.bench.call(commands_hmm.write_dma, self.mirror, pages, data, **part)

    @property
    def mapped_pages(self) -> int:
        """How many the IOMMU maps."""
        iommu = self.bench.local.machine.devices[self.id].iommu
        assert iommu is not None
        return int(iommu.mapped_pages)

    @property
    def kinds(self) -> list[ViolationKind]:
        """What was reported."""
        return [violation.kind for violation in self.bench.local.machine.receivers[self.mirror].reports.kept]


@pytest.fixture
def card(bench: Any) -> Card:
    """One of these."""
    return Card(bench)


def test_map_gives_each_page_one_address_when_it_is_asked_again(card: Card) -> None:
    """hmm_dma_map_pfn(): DMA_MAPPED is set, and a page that is mapped keeps its address."""
    card.fault(0, 4)
    addresses = card.map(0, 4)
    assert (card.words[:4] & MAPPED).all()
    assert np.unique(addresses).size == 4
    assert np.array_equal(card.map(0, 4), addresses)
    assert np.array_equal(card.have(2, 4)[:2], addresses[2:])
    assert card.mapped_pages == 6
    card.bench.local.machine.check()


def test_address_stays_when_a_fault_for_writing_upgrades_the_page(card: Card) -> None:
    """The sticky bit survives hmm_range_fault(), so that READ becomes WRITE without a new mapping; COW needs one."""
    card.bench.write(0, b"x")
    card.bench.call(commands_process.mprotect, card.bench.process, BASE, PAGE_SIZE, Prot.READ)
    before = card.have(0)
    card.forgetful = True  # PROTECTION_VMA leaves the page where it is
    card.bench.call(commands_process.mprotect, card.bench.process, BASE, PAGE_SIZE, Prot.READ | Prot.WRITE)
    with pytest.raises(AccessDeniedError):
        card.write(before, b"y")
    card.fault(0, flags=BOTH)
    assert int(card.words[0]) & (DMA_MAPPED | WRITE) == DMA_MAPPED | WRITE
    assert card.map(0).tolist() == before.tolist()
    card.write(before, b"y")
    assert card.bench.read(0, 1) == b"y"
    assert card.kinds == [ViolationKind.READ_ONLY_WRITE]


def test_unmap_says_what_was_mapped(card: Card) -> None:
    """hmm_dma_unmap_pfn(): false unless VALID and DMA_MAPPED both stand in the word."""
    card.have(0, 2)
    card.fault(2)
    assert card.unmap(0, 4) == [True, True, False, False]
    assert card.unmap(0, 4) == [False] * 4
    assert card.mapped_pages == 0
    again = card.map(0, 2)
    assert card.words[3] == 0
    card.words[0] &= ~np.uint64(VALID)
    assert card.unmap(0, 2) == [False, True]
    card.bench.local.machine.check()
    assert card.read(again[:1])


@pytest.mark.parametrize(
    ("word", "rule"),
    [(0, "says of no frame"), (ERROR, "says of no frame"), (VALID | DMA_MAPPED, "is not mapped")],
)  # fmt: skip
def test_map_is_refused_when_a_word_says_of_no_frame(card: Card, word: int, rule: str) -> None:
    """Of such a word the kernel makes an address of nothing; EINVAL, and no other page is mapped."""
    card.fault(0, 2)
    card.words[1] = np.uint64(word) | (card.words[1] & ~np.uint64(VALID) if word & VALID else np.uint64(0))
    with pytest.raises(InvalidRequestError, match=rule) as refused:
        card.map(0, 2)
    assert (refused.value.errno, refused.value.address) == (errnos.EINVAL, BASE + PAGE_SIZE)
    assert card.mapped_pages == 0


def test_requests_are_refused_when_pages_and_words_do_not_fit(card: Card) -> None:
    """As many words as pages, each page once."""
    card.fault(0, 2)
    for pages in (card.addresses(0), np.repeat(card.addresses(0), 2)):
        with pytest.raises(InvalidRequestError):
            card.bench.call(commands_hmm.dma_map, card.mirror, pages, card.words[:2])
    with pytest.raises(InvalidRequestError, match="is not mapped"):
        card.bench.call(commands_hmm.dma_unmap, card.mirror, card.addresses(0, 2), card.words[:2] | MAPPED)
    assert card.mapped_pages == 0


def test_map_is_refused_when_the_device_does_no_dma(bench: Any) -> None:
    """hmm_dma_map_alloc(): EOPNOTSUPP."""
    empty = np.empty(0, np.uint64)
    for call in ((commands_hmm.dma_map, empty, empty), (commands_hmm.dma_unmap, empty, empty),
                 (commands_hmm.read_dma, empty), (commands_hmm.write_dma, empty, b"")):  # fmt: skip
        with pytest.raises(InvalidRequestError) as refused:
            bench.call(call[0], bench.mirror, *call[1:])
        assert refused.value.errno == errnos.EOPNOTSUPP


def test_map_is_refused_when_the_page_is_private_memory_of_the_device(bench: Any) -> None:
    """Device-private frames are no addresses on a bus (Linux Documentation/mm/hmm.rst): EFAULT."""
    card = Card(bench, memory_pages=8)
    bench.write(0, b"x")
    bench.call(commands_hmm.migrate_to_device, card.mirror, bench.span(0))
    card.fault(0)
    with pytest.raises(BadAddressError, match="private memory") as refused:
        card.map(0)
    assert refused.value.address == BASE
    assert card.kinds == []


def test_map_is_refused_when_the_word_is_out_of_date(card: Card) -> None:
    """A driver that does not ask read_retry() maps a page that is somebody else's: EFAULT, and reported."""
    card.bench.write(0, b"x")
    card.fault(0)
    words = card.words.copy()
    card.bench.call(commands_process.munmap, card.bench.process, BASE, PAGE_SIZE)
    card.words = words
    with pytest.raises(BadAddressError):
        card.map(0)
    assert card.kinds == [ViolationKind.USE_AFTER_INVALIDATION]


def test_map_fails_as_a_whole_when_the_iommu_does(card: Card) -> None:
    """DMA_MAPPING_ERROR: ENOMEM, no page is mapped, and what was mapped before stays."""
    card.have(0, 2)
    card.fault(2, 4)
    card.bench.call(commands_failures.inject_dma_failure, card.id, 1)
    with pytest.raises(OutOfFramesError):
        card.map(0, 6)
    assert card.mapped_pages == 2
    assert card.map(0, 6).size == 6
    card.bench.local.machine.check()


def test_map_leaves_nothing_when_directories_run_out() -> None:
    """Nothing was mapped, and the IOMMU has its pages back."""
    iommu = Iommu(64)
    dma = DmaMap(Domain(iommu), PageTable(TASK_SIZE - 1, max_directories=4))
    far = np.array([1 << 20, 1 << 40], np.uint64)
    with pytest.raises(OutOfFramesError):
        dma.map(far, np.array([1, 2]), np.ones(2, np.bool_))
    assert iommu.mapped_pages == 0
    dma.check()


def test_device_reads_and_writes_what_the_cpu_sees(card: Card) -> None:
    """In the order that the DMA addresses are given, and in part."""
    card.bench.write(0, b"a" * PAGE_SIZE + b"b" * PAGE_SIZE)
    pages = card.have(0, 2, BOTH)
    assert card.read(pages[::-1]) == b"b" * PAGE_SIZE + b"a" * PAGE_SIZE
    card.write(pages, b"cd", offset=PAGE_SIZE - 1)
    assert card.bench.read(0, 2 * PAGE_SIZE)[PAGE_SIZE - 1 : PAGE_SIZE + 1] == b"cd"
    assert card.read(pages[1:], offset=0, length=2) == b"db"


def test_write_is_refused_when_the_page_was_mapped_for_reading(card: Card) -> None:
    """A word without WRITE maps for reading, whatever the CPU may do."""
    card.bench.write(0, b"x")
    card.fault(0, flags=BOTH)
    card.words[0] &= ~np.uint64(WRITE)
    pages = card.map(0)
    with pytest.raises(AccessDeniedError) as denied:
        card.write(pages, b"y")
    assert (denied.value.errno, denied.value.address) == (errnos.EACCES, int(pages[0]))
    assert card.read(pages, length=1) == b"x"
    card.words[0] |= np.uint64(WRITE)
    assert card.map(0).tolist() == pages.tolist()
    card.write(pages, b"y")


def test_access_is_refused_when_the_page_was_unmapped(card: Card) -> None:
    """A DMA address is never given again; which event took the page is told, or that none did, or that none could."""
    pages = card.have(0, 3)
    card.unmap(0)
    card.bench.call(commands_process.munmap, card.bench.process, BASE + PAGE_SIZE, PAGE_SIZE)
    for page, kind in (
        (pages[:1], ViolationKind.NO_TRANSLATION),
        (pages[1:2], ViolationKind.USE_AFTER_INVALIDATION),
        (pages[2:] + np.uint64(1 << 30), ViolationKind.FOREIGN_FRAME),
    ):
        with pytest.raises(BadAddressError) as refused:
            card.read(page)
        assert refused.value.violation is not None
        assert refused.value.violation.kind is kind
        assert refused.value.address == int(page[0])
    assert card.read(pages[2:])


def test_kept_mapping_is_reported_when_the_event_was_answered(card: Card) -> None:
    """It stays mapped and reaches nothing; the page can be mapped again when it was unmapped."""
    card.bench.write(0, b"old" * 4)
    pages = card.have(0, 4)
    card.forgetful = True
    card.bench.call(commands_process.madvise, card.bench.process, BASE, 2 * PAGE_SIZE, Advice.DONTNEED)
    (violation,) = card.bench.local.machine.receivers[card.mirror].reports.kept
    assert (violation.kind, violation.address, violation.pages) == (ViolationKind.DMA_MAPPING_KEPT, BASE, 2)
    assert violation.taking is not None
    assert violation.taking.sequence == card.bench.local.machine.receivers[card.mirror].sequence
    assert str(violation).startswith("DMA mapping kept: device answer at")
    assert card.mapped_pages == 4
    with pytest.raises(BadAddressError):
        card.read(pages[:1])
    assert card.read(pages[2:])
    old = card.words.copy()
    card.words[:2] = 0
    card.fault(0, 2, BOTH)
    with pytest.raises(InvalidRequestError, match="another frame"):
        card.map(0, 2)
    new, card.words = card.words, old
    assert card.unmap(0, 2) == [True, True]
    card.words = new
    assert not np.isin(card.map(0, 2), pages).any()
    card.bench.local.machine.check()


def test_unmapping_driver_is_not_reported_when_pages_are_taken(card: Card) -> None:
    """Each event that takes pages, and each that only takes the right to write."""
    card.bench.write(0, b"x" * 8 * PAGE_SIZE)
    card.have(0, 8, BOTH)
    card.bench.call(commands_process.fork, card.bench.process)
    card.have(0, 8)
    card.bench.to_device(0, 2)
    card.bench.call(commands_process.munmap, card.bench.process, BASE, 4 * PAGE_SIZE)
    assert card.kinds == []
    assert card.mapped_pages == 4
    card.bench.call(commands_process.exit_process, card.bench.process)
    assert (card.kinds, card.mapped_pages) == ([], 0)


def test_kept_mapping_is_reported_once_when_the_process_exits(card: Card) -> None:
    """RELEASE asks for nothing of which UNMAP does not ask; the mapping can be undone afterwards, and none made."""
    card.have(0, 2)
    card.forgetful = True
    card.bench.call(commands_process.exit_process, card.bench.process)
    assert card.kinds == [ViolationKind.DMA_MAPPING_KEPT]
    with pytest.raises(NoSuchObjectError):
        card.map(0, 2)
    assert card.unmap(0, 2) == [True, True]


def test_kept_mapping_is_not_reported_when_the_migration_was_its_own(bench: Any) -> None:
    """A driver may ignore events of its own migrations; the mapping reaches nothing all the same."""
    card = Card(bench, memory_pages=8)
    bench.write(0, b"x")
    pages = card.have(0, flags=BOTH)
    card.forgetful = True
    bench.call(commands_hmm.migrate_to_device, card.mirror, bench.span(0))
    assert card.kinds == []
    with pytest.raises(BadAddressError):
        card.read(pages)


@pytest.mark.parametrize("end", ["detach", "lose"])
def test_everything_is_unmapped_when_the_mirror_goes(card: Card, end: str) -> None:
    """By itself, and when it was fenced; then nothing can be unmapped any more."""
    card.have(0, 4)
    machine: Machine = card.bench.local.machine
    if end == "detach":
        card.bench.call(commands_hmm.detach, card.mirror)
    else:
        machine.fence(card.mirror, "the driver is gone")
        with pytest.raises(DeviceLostError):
            card.unmap(0, 4)
    assert card.mapped_pages == 0
    machine.check()


def test_map_is_made_for_many_pages_at_once(make_bench: Callable[..., Any]) -> None:
    """Thousands of pages in one call, in any order."""
    bench = make_bench(frames=5000, mapped_pages=4096)
    card = Card(bench)
    faulted = bench.call(commands_hmm.range_fault_unlocked, card.mirror, 1, bench.span(0, 4096), BOTH).require()
    pages = card.addresses(0, 4096)[::-1].copy()
    mapped = bench.call(commands_hmm.dma_map, card.mirror, pages, faulted[::-1].copy())
    assert np.unique(mapped.dma_addresses).size == 4096
    assert np.array_equal(word_pfns(mapped.words & ~MAPPED), word_pfns(faulted)[::-1])
    assert not (bench.call(commands_hmm.dma_unmap, card.mirror, pages, mapped.words) & MAPPED).any()
    assert card.mapped_pages == 0
