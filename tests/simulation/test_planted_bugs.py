"""Bugs planted on purpose, each of a kind that somebody could make, in the towns whose seeds have to find it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from hmm import (
    cpu_pte,
    device_access,
    directory_tree,
    eviction,
    exclusive,
    fork,
    frame_access,
    huge_split,
    memory_failure,
    migrate_steps,
    mirror_memory,
    reclaim,
    swap_in,
    vma_edit,
)
from hmm.address_space import AddressSpace
from hmm.dispatch import Audience
from hmm.errors import RangeBusyError
from hmm.events import Cause, Event
from hmm.fault import RESOLVERS
from hmm.fault_pages import Strangers
from hmm.frame_contents import FrameContents
from hmm.frames import Frames
from hmm.interval_notifier import IntervalMirror
from hmm.iommu import Domain
from hmm.machine import Machine
from hmm.mirror import Mirror, MirrorState
from hmm.mirror_memory import MirrorMemory
from hmm.notifier import Invalidation, Notifier
from hmm.operation import Operation, Pause, WaitFor
from hmm.receiver import Receiver
from hmm.reclaim import Reclaim
from hmm.swap_area import Slots, SwapArea
from hmm.testing import SimulationError
from hmm.testing_swap import TOWNS
from hmm.units import PMD_MASK, Address, Entries, Pfns

pytestmark = pytest.mark.slow
SEEDS = 120

Plant = Callable[[pytest.MonkeyPatch], None]


def found(town: str, first: int) -> str:
    """What the first seed from there on that fails says; empty when none does."""
    for seed in range(first, first + SEEDS):
        try:
            TOWNS[town](seed)
        except SimulationError as error:
            return str(error)
    return ""


class But:
    """A module, but for some of its names."""

    def __init__(self, module: ModuleType, **names: Any) -> None:
        self.__dict__.update(vars(module), **names)


def copies_on_write_are_empty(patch: pytest.MonkeyPatch) -> None:
    """A page copied on write has a frame, and not what the other one has."""
    patch.setattr(FrameContents, "copy", lambda *_: None)


def fork_leaves_pages_writable(patch: pytest.MonkeyPatch) -> None:
    """The parent goes on writing to what its child has now, too."""
    patch.setattr(fork, "_read_only", lambda entries: entries)


def fault_ignores_invalidations(patch: pytest.MonkeyPatch) -> None:
    """A device fault is not told to start over by an invalidation that began meanwhile."""

    def back_off(*_: object) -> Operation[None]:
        return
        yield Pause()

    patch.setattr(Notifier, "back_off", back_off)


def second_pass_is_left_out(patch: pytest.MonkeyPatch) -> None:
    """Who has only started is taken to have finished."""

    def finish(*_: object) -> Operation[list[int]]:
        return []
        yield Pause()

    patch.setattr(Notifier, "_finish", finish)


def exclusive_pages_come_back_in_silence(patch: pytest.MonkeyPatch) -> None:
    """The CPU touches what a device has to itself, and nobody tells the device."""

    def revoke(space: AddressSpace, touched: Strangers, _: bool) -> Operation[None]:
        entries = space.table.lookup(touched.addresses)
        held = cpu_pte.is_device_exclusive(entries)
        given = exclusive.restored(space, touched.addresses[held], entries[held])
        space.table.store(touched.addresses[held], given)
        return
        yield Pause()

    patch.setitem(RESOLVERS, cpu_pte.EXCLUSIVE, revoke)


def pages_move_without_their_contents(patch: pytest.MonkeyPatch) -> None:
    """A page that moves has another frame, and not what its old one has."""
    patch.setattr(FrameContents, "exchange", lambda *_: None)


def split_loses_a_page(patch: pytest.MonkeyPatch) -> None:
    """The first entry of a huge page is gone when it is split, its frame is not."""
    split = AddressSpace.split_huge_pmd

    def lossy(space: AddressSpace, address: Address) -> None:
        was = space.table.get(address)
        split(space, address)
        if was & cpu_pte.HUGE and not space.table.get(address) & cpu_pte.HUGE:
            space.table.set(address & PMD_MASK, 0)

    patch.setattr(AddressSpace, "split_huge_pmd", lossy)


def split_folios_keep_only_their_zeroes(patch: pytest.MonkeyPatch) -> None:
    """Every page of a split folio is taken for one that was never written."""
    remap = huge_split._remap
    patch.setattr(huge_split, "_remap", lambda place, head, zero: remap(place, head, np.ones_like(zero)))


def written_pages_are_dropped(patch: pytest.MonkeyPatch) -> None:
    """Reclaim drops lazily freed pages that were written since."""
    patch.setattr(reclaim, "cpu_pte", But(cpu_pte, is_dirty=lambda entries: np.zeros(entries.size, np.bool_)))


def slots_are_mixed_up(patch: pytest.MonkeyPatch) -> None:
    """Of several pages that come back from swap each gets what another one had."""
    read_in = swap_in.read_in

    def mixed(frames: Any, slots: Pfns) -> Pfns:
        return read_in(frames, slots[::-1])

    patch.setattr(swap_in, "read_in", mixed)


def reclaim_tells_nobody(patch: pytest.MonkeyPatch) -> None:
    """Frames go to others while devices use them."""

    def tell(_: Reclaim, mapped: list[object], __: object) -> Operation[list[object]]:
        return mapped
        yield Pause()

    patch.setattr(Reclaim, "_tell", tell)


def drivers_are_not_asked_for_pages(patch: pytest.MonkeyPatch) -> None:
    """What a driver was to bring is taken as brought."""
    carry = MirrorMemory.carry

    def careless(self: MirrorMemory, *arguments: Any, **options: Any) -> Any:
        outcome, carried = yield from carry(self, *arguments, **options)
        return outcome, np.ones_like(carried)

    patch.setattr(MirrorMemory, "carry", careless)


def last_mirror_is_not_told(patch: pytest.MonkeyPatch) -> None:
    """The last mirror is missing from every list of those to be told."""
    audience = Notifier.audience

    def forgetful(notifier: Notifier, event: Event) -> Audience | None:
        everybody = audience(notifier, event)
        some = everybody.receivers[:-1] if everybody is not None else ()
        return Audience(some) if some else None

    patch.setattr(Notifier, "audience", forgetful)


def frames_are_freed_before_the_acknowledgement(patch: pytest.MonkeyPatch) -> None:
    """munmap zaps first and tells the mirrors afterwards."""
    spaces: dict[int, AddressSpace] = {}
    new_space, deliver = Machine.new_space, Invalidation.deliver

    def remembering(machine: Machine) -> AddressSpace:
        space = new_space(machine)
        spaces[id(space.notifier)] = space
        return space

    def hasty(invalidation: Invalidation) -> Operation[object]:
        if invalidation.cause is Cause.MUNMAP:
            for span in invalidation.spans:
                spaces[id(invalidation.notifier)].zap(span.start, span.end)
        return (yield from deliver(invalidation))

    patch.setattr(Machine, "new_space", remembering)
    patch.setattr(Invalidation, "deliver", hasty)


def walks_skip_live_directories(patch: pytest.MonkeyPatch) -> None:
    """A missing entry makes a walk go on behind the directory that holds it (hmm_pt v3)."""

    def behind_the_directory(page: int, shift: int, _: int) -> int:
        return ((page >> (shift + 9)) + 1) << (shift + 9)

    patch.setattr(directory_tree, "after_hole", behind_the_directory)


def values_cross_a_yield(patch: pytest.MonkeyPatch) -> None:
    """Entries looked up before the mirrors are told are what is dropped afterwards."""

    def remembering_zap(space: AddressSpace, span: object) -> Iterator[object]:
        entries = space.table.zap(span.start, span.end)  # type: ignore[attr-defined]
        yield from ()
        space.drop(entries)
        space.drop(entries[:1])

    patch.setattr(vma_edit, "zap", remembering_zap)


def pages_name_drivers_that_are_gone(patch: pytest.MonkeyPatch) -> None:
    """Pages of a lost mirror still name it as the one to be told; somebody waits for ever."""

    def release(self: IntervalMirror, state: MirrorState, why: str = "") -> None:
        Receiver.release(self, state, why)

    patch.setattr(IntervalMirror, "release", release)


def evictions_leave_their_entries(patch: pytest.MonkeyPatch) -> None:
    """An eviction forgets to put its pages back; their map counts are wrong, or they are lost."""
    patch.setattr(eviction, "replace", lambda *_: None)


def lost_pages_read_as_zeroes(patch: pytest.MonkeyPatch) -> None:
    """Pages of a driver that is gone are dropped instead of poisoned."""

    def drop(space: AddressSpace, addresses: Entries) -> None:
        space.drop(space.table.clear_many(addresses))

    patch.setattr(mirror_memory, "lose", drop)


def pages_are_not_brought_back_first(patch: pytest.MonkeyPatch) -> None:
    """mremap and mprotect go on although pages are on a device, whose driver frees them when it hears."""

    def vacate(*_: object) -> Operation[int]:
        return 0
        yield Pause()

    patch.setattr(MirrorMemory, "vacate", vacate)
    patch.setattr(MirrorMemory, "has_pages", lambda *_: False)


def others_are_not_told_of_a_migration(patch: pytest.MonkeyPatch) -> None:
    """Other mirrors go on using pages that have moved to a device."""
    hears = Mirror.hears

    def hears_less(self: Mirror, event: Event) -> bool:
        return hears(self, event) and event.cause is not Cause.MIGRATE_TO_DEVICE

    patch.setattr(Mirror, "hears", hears_less)


def slots_are_freed_too_early(patch: pytest.MonkeyPatch) -> None:
    """The first entry that goes takes the slot with it."""
    put = SwapArea.put

    def eager(area: SwapArea, slots: Slots) -> Slots:
        area.counts[slots] = 1
        return put(area, slots)

    patch.setattr(SwapArea, "put", eager)


def fork_does_not_count_swap_entries(patch: pytest.MonkeyPatch) -> None:
    """The child's entries name slots that go with the parent's."""
    patch.setattr(SwapArea, "duplicate", lambda *_: None)


def fork_shares_pinned_pages(patch: pytest.MonkeyPatch) -> None:
    """The next write takes a copy, and leaves the device the page that it has pinned."""
    patch.setattr(fork, "_pinned", lambda _, entries: np.zeros(entries.size, np.bool_))


def pins_are_never_undone(patch: pytest.MonkeyPatch) -> None:
    """Pages are no longer pinned, and keep a reference of the pin."""
    undo = Frames.unpin

    def unpin(frames: Frames, pfns: Pfns) -> Pfns:
        frames.get(pfns)
        return undo(frames, pfns)

    patch.setattr(Frames, "unpin", unpin)


def failed_pages_stay_with_relatives(patch: pytest.MonkeyPatch) -> None:
    """Memory failure takes a page from one process, and leaves it to its child."""
    places = memory_failure.anonymous_places

    def nearest(relatives: list[AddressSpace], *arguments: Any) -> Any:
        return places(relatives[:1], *arguments)

    patch.setattr(memory_failure, "anonymous_places", nearest)


def write_back_tells_nobody(patch: pytest.MonkeyPatch) -> None:
    """Pages are clean, and devices go on writing to them."""
    deliver = Invalidation.deliver

    def tell(invalidation: Invalidation) -> Operation[None]:
        if invalidation.cause is not Cause.WRITE_BACK:
            yield from deliver(invalidation)

    patch.setattr(Invalidation, "deliver", tell)


def reaping_ignores_refusals(patch: pytest.MonkeyPatch) -> None:
    """Memory is taken from drivers that have said that they cannot give it up at once."""
    take = Notifier._take_outcomes

    def go_on(self: Notifier, dispatch: Any, *, certain: bool) -> Operation[None]:
        with suppress(RangeBusyError):
            yield from take(self, dispatch, certain=certain)

    patch.setattr(Notifier, "_take_outcomes", go_on)


def answers_count_for_nothing(patch: pytest.MonkeyPatch) -> None:
    """Devices reach pages although their drivers have answered that they no longer do."""
    patch.setattr(device_access, "inside", lambda pages, _: np.zeros(pages.size, np.bool_))
    patch.setattr(frame_access, "inside", lambda pages, _: np.zeros(pages.size, np.bool_))


def dma_addresses_are_mixed_up(patch: pytest.MonkeyPatch) -> None:
    """Of several pages that are mapped for DMA each gets the address of another one."""
    mapped = Domain.map
    patch.setattr(Domain, "map", lambda self, pfns, addresses: mapped(self, pfns, addresses)[::-1])


def dirty_is_lost_with_its_entry(patch: pytest.MonkeyPatch) -> None:
    """What devices wrote is not noted when their entries go."""
    patch.setattr(Mirror, "_propagate_dirty", lambda *_: None)


def ending_mirrors_are_nobodys(patch: pytest.MonkeyPatch) -> None:
    """Who waits for the end of a mirror cannot say for whom."""
    blockers = Machine.blockers

    def some(machine: Machine, record: Any) -> list[int]:
        ends = getattr(record.request, "wait_for", None) is WaitFor.CALLBACKS
        return [] if ends else blockers(machine, record)

    patch.setattr(Machine, "blockers", some)


def frames_without_a_page_are_kept(patch: pytest.MonkeyPatch) -> None:
    """What a driver allocated for a migration and gave no page is not freed when it ends."""
    patch.setattr(migrate_steps, "np", But(np, setdiff1d=lambda *_: np.empty(0, np.int64)))


def destinations_are_taken_unseen(patch: pytest.MonkeyPatch) -> None:
    """A driver's destinations may be anybody's frames, and one may be given twice."""
    patch.setattr(migrate_steps.SteppedMigration, "_require_destinations", lambda *_: None)


def readers_hold_nobody_up(patch: pytest.MonkeyPatch) -> None:
    """Mappings change while a driver moves pages of them."""
    patch.setattr(Notifier, "_before", lambda *_: [])


WRONG_BYTES, STALE, LOST = "WrongContentsError", "StaleTranslationError", "LostTranslationError"
MOVED, LEAK, AFTER = "MovedPageError", "LeakError", "AccessAfterAnswerError"
BUGS: list[tuple[str, Plant, str, int]] = [
    ("mirrors", last_mirror_is_not_told, "", 0),
    ("mirrors", frames_are_freed_before_the_acknowledgement, "reaches pages", 0),
    ("mirrors", walks_skip_live_directories, "", 0),
    ("mirrors", values_cross_a_yield, "", 0),
    ("mirrors", copies_on_write_are_empty, WRONG_BYTES, 1),
    ("mirrors", fork_leaves_pages_writable, WRONG_BYTES, 1),
    ("mirrors", fault_ignores_invalidations, LOST, 11),
    ("mirrors", fork_shares_pinned_pages, MOVED, 164),
    ("mirrors", pins_are_never_undone, LEAK, 1),
    ("mirrors", failed_pages_stay_with_relatives, "contents are lost", 63),
    ("mirrors", write_back_tells_nobody, "", 40),
    ("mirrors", reaping_ignores_refusals, "", 141),
    ("mirrors", answers_count_for_nothing, AFTER, 5),
    ("mirrors", ending_mirrors_are_nobodys, "waits for nobody", 1),
    ("devices", answers_count_for_nothing, AFTER, 10),
    ("devices", dma_addresses_are_mixed_up, "", 3),
    ("mirrors", dirty_is_lost_with_its_entry, "is not noted", 1),
    ("memory", dirty_is_lost_with_its_entry, "is not noted", 2),
    ("devices", pages_name_drivers_that_are_gone, "", 1),
    ("devices", evictions_leave_their_entries, "", 7),
    ("devices", second_pass_is_left_out, STALE, 2),
    ("devices", exclusive_pages_come_back_in_silence, STALE, 4),
    ("devices", pages_move_without_their_contents, WRONG_BYTES, 0),
    ("huge", split_loses_a_page, "times, not", 1),
    ("huge", split_folios_keep_only_their_zeroes, WRONG_BYTES, 1),
    ("memory", lost_pages_read_as_zeroes, "holds", 42),
    ("memory", drivers_are_not_asked_for_pages, "", 1),
    ("memory", pages_are_not_brought_back_first, "", 4),
    ("memory", others_are_not_told_of_a_migration, "", 0),
    ("steps", frames_without_a_page_are_kept, "", 0),
    ("steps", destinations_are_taken_unseen, "", 5),
    ("steps", readers_hold_nobody_up, "", 0),
    ("swap", reclaim_tells_nobody, "", 6),
    ("swap", slots_are_freed_too_early, "", 6),
    ("swap", fork_does_not_count_swap_entries, "", 6),
    ("swap", written_pages_are_dropped, WRONG_BYTES, 228),
    ("swap", slots_are_mixed_up, WRONG_BYTES, 6),
    ("swap-devices", exclusive_pages_come_back_in_silence, STALE, 3),
    ("swap-devices", reclaim_tells_nobody, "", 2),
    ("swap-memory", drivers_are_not_asked_for_pages, "", 1),
    ("swap-memory", reclaim_tells_nobody, "reaches pages", 0),
]
"""A town, what is planted there, what must be said of it, and the first seed that is tried: one that finds it.

Where the workload has changed since, it may be one of those behind it.
"""


@pytest.mark.parametrize(
    ("town", "plant", "shown", "first"), BUGS, ids=[f"{town}-{plant.__name__}" for town, plant, *_ in BUGS]
)
def test_simulate_finds_a_planted_bug(
    monkeypatch: pytest.MonkeyPatch, town: str, plant: Plant, shown: str, first: int
) -> None:
    """A seed of the town fails, by what the bug does."""
    plant(monkeypatch)
    said = found(town, first)
    assert "seed" in said
    assert shown in said
