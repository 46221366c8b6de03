"""Pages in the memory of devices: migrated there, brought back by touch, by request, and by eviction."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from area import BASE

from hmm import (
    commands_device,
    commands_file,
    commands_hmm,
    commands_process,
    commands_userfaultfd,
    cpu_pte,
)
from hmm.errors import InUseError, InvalidRequestError, NoSuchObjectError, OutOfFramesError
from hmm.events import EventType, Reason
from hmm.fault_pages import WRITTEN
from hmm.frames import PageFlag, RegionKind
from hmm.madvise import Advice
from hmm.migration import MIGRATE, VALID, WRITE
from hmm.mremap import MremapFlag
from hmm.operation_record import Caller
from hmm.smaps import memory_use
from hmm.units import PAGE_SIZE, AddressRange
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot


def test_migrate_moves_pages_when_they_are_private_memory(bench: Any) -> None:
    """Present pages go to the device with their contents; the CPU's entry becomes a device's, writable as before."""
    bench.write(0, b"ab" * PAGE_SIZE)
    moved = bench.to_device(0, 2)
    assert ((moved.src & np.uint64(VALID | MIGRATE | WRITE)) == VALID | MIGRATE | WRITE).all()
    assert bench.used == 2
    entry = bench.entry(0)
    assert cpu_pte.is_device_private(entry)
    assert cpu_pte.is_writable(entry)
    bench.local.machine.check()
    assert bench.read(0, 2 * PAGE_SIZE) == b"ab" * PAGE_SIZE
    assert bench.used == 0


def test_entry_is_old_and_clean_when_its_page_was_in_private_memory(bench: Any) -> None:
    """remove_migration_pte(): a device's entry has neither bit, so that none can come back; the folio stays dirty."""
    bench.write(0, b"x")
    frames, bits = bench.local.machine.frames, cpu_pte.ACCESSED | cpu_pte.DIRTY
    assert bench.entry(0) & bits == bits
    for move in (bench.to_device, bench.to_system):
        move(0, 1)
        assert not bench.entry(0) & bits
        assert frames.flags_of(cpu_pte.cpu_pfn(bench.entry(0))) & PageFlag.DIRTY
    assert cpu_pte.is_writable(bench.entry(0))
    assert bench.entry(0) & cpu_pte.SOFT_DIRTY
    bench.write(0, b"y")
    assert bench.entry(0) & bits == bits


@pytest.mark.parametrize(
    ("prot", "flags"),
    [
        (Prot.READ, cpu_pte.PRESENT | cpu_pte.ACCESSED),
        (Prot.READ | Prot.WRITE, WRITTEN),
    ],
)
def test_hole_that_moves_to_coherent_memory_is_as_good_as_touched(bench: Any, prot: Prot, flags: int) -> None:
    """migrate_vma_insert_page(): mk_pte() with vm_page_prot, and pte_mkwrite(pte_mkdirty()) where VM_WRITE."""
    card = bench.call(commands_device.register_device, "card", memory_pages=2, kind=RegionKind.DEVICE_COHERENT)
    mirror, _ = bench.attach(card, bench.process)
    bench.map(1, prot)
    bench.call(commands_hmm.migrate_to_device, mirror, bench.span(0))
    assert cpu_pte.cpu_flags(bench.entry(0)) == flags


def test_migrate_makes_zero_pages_when_nothing_was_there(bench: Any) -> None:
    """Holes and the zero page of anonymous memory become zeroed device pages; a second event tells of the holes."""
    bench.read(1, 1)
    bench.heard.events.clear()
    moved = bench.to_device(0, 3)
    assert ((moved.src & np.uint64(VALID | MIGRATE)) == MIGRATE).all()
    assert bench.heard.reasons == [Reason.MIGRATE, Reason.MIGRATE]
    assert [event.owner for event in bench.heard.events] == [bench.device] * 2
    assert bench.used == 3
    assert bench.read(0, 3 * PAGE_SIZE) == bytes(3 * PAGE_SIZE)
    bench.local.machine.check()


def test_migrate_leaves_pages_when_they_are_shared_memory(bench: Any) -> None:
    """Pages of files and of shared memory never go to a device (migrate_vma_pages())."""
    bench.map(2, flags=MapFlag.SHARED | MapFlag.FIXED | MapFlag.ANONYMOUS, at=32)
    bench.write(32, b"x" * 2 * PAGE_SIZE)
    moved = bench.to_device(32, 2)
    assert not (moved.src & np.uint64(MIGRATE)).any()
    assert bench.used == 0
    assert bench.read(32, 2 * PAGE_SIZE) == b"x" * 2 * PAGE_SIZE
    bench.local.machine.check()


def test_migrate_moves_the_pages_that_get_a_destination(bench: Any) -> None:
    """migrate_vma_pages(): where `dst` is 0 the page, or the hole, is what it was; mirrors hear of all of them."""
    bench.write(0, b"abcd" * (PAGE_SIZE // 2))  # two pages; two holes follow
    moved = bench.call(
        commands_hmm.migrate_to_device, bench.mirror, bench.span(0, 4), wanted=np.array([False, True, True, False])
    )
    assert [bool(word & MIGRATE) for word in moved.src.tolist()] == [False, True, True, False]
    assert [word != 0 for word in moved.dst.tolist()] == [False, True, True, False]
    assert [cpu_pte.is_device_private(bench.entry(at)) for at in range(4)] == [False, True, True, False]
    assert bench.entry(3) == 0
    assert bench.heard.events[0].spans == (bench.span(0, 4),)
    bench.local.machine.check()
    back = bench.call(
        commands_hmm.migrate_to_system, bench.mirror, bench.span(0, 4), wanted=np.array([True, False, True, True])
    )
    assert [bool(word & MIGRATE) for word in back.src.tolist()] == [False, False, True, False]
    assert [cpu_pte.is_device_private(bench.entry(at)) for at in range(4)] == [False, True, False, False]
    assert bench.used == 1
    bench.local.machine.check()
    assert bench.read(0, 2 * PAGE_SIZE) == b"abcd" * (PAGE_SIZE // 2)


@pytest.mark.parametrize("command", [commands_hmm.migrate_to_device, commands_hmm.migrate_to_system])
def test_migrate_is_refused_when_wanted_pages_are_those_of_another_range(bench: Any, command: Any) -> None:
    """EINVAL, and nothing is moved or told."""
    with pytest.raises(InvalidRequestError, match="of the 4 of"):
        bench.call(command, bench.mirror, bench.span(0, 4), wanted=np.ones(3, np.bool_))
    assert not bench.heard.events


def test_migrate_moves_the_first_pages_when_the_device_is_small(make_bench: Any) -> None:
    """Without room the rest stays in system memory; the call succeeds."""
    bench = make_bench(memory_pages=3)
    bench.write(0, bytes(range(1, 6)) * PAGE_SIZE)
    moved = bench.to_device(0, 5)
    assert [bool(word & MIGRATE) for word in moved.src.tolist()] == [True, True, True, False, False]
    bench.local.machine.check()
    assert bench.read(0, 5 * PAGE_SIZE) == bytes(range(1, 6)) * PAGE_SIZE


def test_migrate_leaves_the_page_when_it_is_pinned(bench: Any) -> None:
    """A page with a pin stays, and its entry is what it was."""
    bench.write(0, b"p" * PAGE_SIZE)
    before = bench.entry(0)
    frames = bench.local.machine.frames
    pinned = np.array([cpu_pte.cpu_pfn(before)])
    frames.pin(pinned)
    moved = bench.to_device(0, 1)
    assert moved.src.tolist() == [0]
    assert bench.entry(0) == before
    frames.unpin(pinned)


def test_migrate_fails_when_the_range_is_not_in_one_mapping(bench: Any) -> None:
    """migrate_vma_setup() wants one VMA: EINVAL."""
    with pytest.raises(InvalidRequestError):
        bench.to_device(15, 2)
    with pytest.raises(InvalidRequestError):
        bench.to_device(40, 1)
    with pytest.raises(InvalidRequestError):
        bench.call(commands_hmm.migrate_to_device, bench.mirror, AddressRange(BASE, BASE))


def test_touch_brings_pages_back_when_the_cpu_reads(bench: Any) -> None:
    """migrate_to_ram(): the mirror that put the page there is told to copy it back, others hear MIGRATE."""
    bench.write(0, b"z" * PAGE_SIZE)
    bench.to_device(0, 1)
    bench.heard.events.clear()
    assert bench.read(0, 1) == b"z"
    assert [(event.reason, event.etype) for event in bench.heard.events] == [
        (Reason.MIGRATE, EventType.MIGRATE),
        (None, EventType.COPY_FROM_DEVICE),
    ]
    assert {event.initiator for event in bench.heard.events} == {bench.mirror}


def test_migration_tells_of_a_shared_page_up_to_its_last_mapping(bench: Any) -> None:
    """try_to_migrate(): the walk ends when the page is mapped nowhere (folio_not_mapped()), the parent comes first.

    So who migrates hears of it a second time when it is the parent, and not when it is the child.
    """
    bench.write(0, b"ab")
    child = bench.call(commands_process.fork, bench.process)
    mirror, heard_by_child = bench.attach(bench.device, child)
    bench.heard.events.clear()
    bench.to_device(0, 1)
    assert (bench.heard.reasons, heard_by_child.reasons) == ([Reason.MIGRATE, Reason.CLEAR], [Reason.CLEAR])
    bench.heard.events.clear()
    heard_by_child.events.clear()
    bench.call(commands_hmm.migrate_to_system, mirror, bench.span(0))
    assert (bench.heard.reasons, heard_by_child.reasons) == ([Reason.CLEAR], [Reason.MIGRATE])


def test_migration_tells_nobody_of_another_familys_mapping_at_the_same_offset(bench: Any) -> None:
    """A VMA that was mapped anew where the page was first is not in the tree of its anon_vma."""
    bench.map(1, at=20)
    bench.write(20, b"a")
    flags = MremapFlag.MAYMOVE | MremapFlag.FIXED
    bench.call(
        commands_process.mremap, bench.process, bench.span(20).start, PAGE_SIZE, PAGE_SIZE, flags, bench.span(40).start
    )
    bench.map(1, at=20)
    bench.write(20, b"b")
    child = bench.call(commands_process.fork, bench.process)
    bench.heard.events.clear()
    bench.to_device(40, 1)
    bench.read(40, 1, child)
    assert [event.spans for event in bench.heard.events if event.reason is Reason.CLEAR] == [(bench.span(40),)] * 2


def test_migrate_moves_pages_that_were_touched_first_while_mirrors_were_told(bench: Any) -> None:
    """The touch gives the VMA its anon_vma: what it brought in is found by that when it has moved."""
    machine, span = bench.local.machine, bench.span(0, 2)
    record = machine.start(Caller(), commands_hmm.migrate_to_device, bench.mirror, span)
    (told,) = machine.take_outbox()
    machine.start(Caller(), commands_process.write_memory, bench.process, span.start, b"x" * span.size_bytes)
    machine.answer(told.mirror_id, told.sequence)
    machine.resume(record.id)
    assert record.done
    assert np.count_nonzero(record.result.src & np.uint64(MIGRATE)) == 2
    machine.check()
    assert bench.read(0, 2) == b"xx"


def test_touch_brings_the_page_back_for_all_when_fork_shares_it(bench: Any) -> None:
    """One fault migrates a page for every process that maps it; the other one's mirror hears CLEAR."""
    bench.write(0, b"s" * PAGE_SIZE)
    bench.to_device(0, 1)
    child = bench.call(commands_process.fork, bench.process)
    assert not cpu_pte.is_writable(bench.entry(0))
    bench.heard.events.clear()
    assert bench.read(0, PAGE_SIZE, child) == b"s" * PAGE_SIZE
    assert Reason.CLEAR in bench.heard.reasons
    assert cpu_pte.is_present(bench.entry(0))
    assert bench.used == 0
    bench.local.machine.check()
    bench.write(0, b"t", child)
    assert bench.read(0, 1) == b"s"


def test_migrate_moves_the_page_of_both_when_fork_shares_it(bench: Any) -> None:
    """A page shared by fork goes to the device for both, read-only in each."""
    bench.write(0, b"s" * PAGE_SIZE)
    child = bench.call(commands_process.fork, bench.process)
    bench.to_device(0, 1)
    for process in (bench.process, child):
        entry = bench.entry(0, process)
        assert cpu_pte.is_device_private(entry)
        assert not cpu_pte.is_writable(entry)
    bench.local.machine.check()
    bench.call(commands_process.exit_process, child)
    assert bench.used == 1
    bench.write(0, b"own")
    assert bench.read(0, 4) == b"owns"


def test_migrate_moves_the_page_of_a_relative_when_that_has_moved_its_mapping(bench: Any) -> None:
    """A page of a mapping that mremap has moved is found by its offset, in whichever process it is."""
    bench.write(0, b"s" * PAGE_SIZE)
    child = bench.call(commands_process.fork, bench.process)
    to = BASE + 64 * PAGE_SIZE
    assert bench.call(commands_process.mremap, child, BASE, PAGE_SIZE, PAGE_SIZE, 3, to) == to
    grandchild = bench.call(commands_process.fork, child)
    bench.to_device(0, 1)
    for process, page in ((bench.process, 0), (child, 64), (grandchild, 64)):
        assert cpu_pte.is_device_private(bench.entry(page, process))
    bench.local.machine.check()


def test_migrate_back_moves_only_what_the_device_has(bench: Any) -> None:
    """MIGRATE_VMA_SELECT_DEVICE_PRIVATE leaves system pages and holes alone."""
    bench.write(0, b"a" * PAGE_SIZE)
    bench.write(1, b"b" * PAGE_SIZE)
    bench.to_device(0, 1)
    moved = bench.to_system(0, 3)
    assert [bool(word & MIGRATE) for word in moved.src.tolist()] == [True, False, False]
    assert cpu_pte.is_present(bench.entry(0))
    assert bench.entry(2) == 0
    bench.local.machine.check()


def test_touch_brings_the_page_back_when_it_was_moved_by_mremap(bench: Any) -> None:
    """mremap moves device entries as they are; the page is found at its new place."""
    bench.write(0, b"m" * PAGE_SIZE)
    bench.to_device(0, 1)
    moved = bench.call(commands_process.mremap, bench.process, BASE, PAGE_SIZE, PAGE_SIZE, 3, BASE + 64 * PAGE_SIZE)
    assert moved == BASE + 64 * PAGE_SIZE
    bench.call(commands_hmm.evict_device, bench.device)
    assert cpu_pte.is_present(bench.entry(64))
    assert bench.read(64, 1) == b"m"


def test_munmap_frees_device_pages(bench: Any) -> None:
    """The last mapping that goes frees the device's frame."""
    bench.write(0, b"m" * 4 * PAGE_SIZE)
    bench.to_device(0, 4)
    bench.call(commands_process.munmap, bench.process, BASE, 4 * PAGE_SIZE)
    assert bench.used == 0
    bench.local.machine.check()


def test_evict_brings_everything_back_whoever_has_it(bench: Any) -> None:
    """migrate_device_range() finds pages of all processes by the reverse map; mirrors hear CLEAR without an owner."""
    bench.write(0, b"e" * 4 * PAGE_SIZE)
    bench.to_device(0, 4)
    child = bench.call(commands_process.fork, bench.process)
    bench.heard.events.clear()
    assert bench.call(commands_hmm.evict_device, bench.device) == 4
    assert bench.used == 0
    assert bench.heard.reasons == [Reason.CLEAR]
    assert bench.heard.events[0].owner == 0
    assert bench.read(0, 4 * PAGE_SIZE, child) == b"e" * 4 * PAGE_SIZE
    bench.local.machine.check()


def test_evict_brings_back_pages_of_processes_that_made_them_at_the_same_place(bench: Any) -> None:
    """Their offsets are alike, and the reverse map of each process is asked for each page once."""
    other = bench.call(commands_process.create_process, "other")
    flags = MapFlag.PRIVATE | MapFlag.FIXED | MapFlag.ANONYMOUS
    place = (bench.span(0).start, 4 * PAGE_SIZE)
    bench.call(commands_process.mmap, other, *place, Prot.READ | Prot.WRITE, flags)
    mirror, _ = bench.attach(bench.device, other)
    for at in (0, 3):
        bench.write(at, b"a")
        bench.write(at, b"b", other)
        bench.to_device(at, 1)
        bench.call(commands_hmm.migrate_to_device, mirror, bench.span(at, 1))
    assert bench.call(commands_hmm.evict_device, bench.device) == 4
    bench.local.machine.check()
    assert [bench.read(at, 1, process) for at in (0, 3) for process in (bench.process, other)] == [b"a", b"b"] * 2


def test_evict_fails_when_system_memory_is_short(make_bench: Any) -> None:
    """Nothing is moved and nothing is lost when there is no room."""
    bench = make_bench(frames=12, memory_pages=8)
    bench.write(0, b"e" * 8 * PAGE_SIZE)
    bench.to_device(0, 8)
    bench.map(8, at=32)
    bench.write(32, b"f" * 8 * PAGE_SIZE)
    with pytest.raises(OutOfFramesError):
        bench.call(commands_hmm.evict_device, bench.device)
    assert bench.used == 8
    bench.local.machine.check()


def test_touch_fails_when_system_memory_is_short(make_bench: Any) -> None:
    """A page cannot come back without a frame: the access fails with ENOMEM and the page stays."""
    bench = make_bench(frames=6, memory_pages=8)
    bench.write(0, b"e" * 4 * PAGE_SIZE)
    bench.to_device(0, 4)
    bench.write(4, b"f" * 5 * PAGE_SIZE)
    with pytest.raises(OutOfFramesError):
        bench.read(0, 1)
    assert bench.used == 4
    bench.local.machine.check()


def test_register_fails_when_no_frame_numbers_are_left(make_bench: Any) -> None:
    """A device's memory takes frame numbers, which are limited: ENOMEM."""
    bench = make_bench()
    with pytest.raises(OutOfFramesError):
        bench.call(commands_device.register_device, "huge", memory_pages=1 << 30)
    with pytest.raises(InvalidRequestError):
        bench.call(commands_device.register_device, "negative", memory_pages=-1)


def test_migrate_fails_when_the_device_has_no_memory(bench: Any) -> None:
    """A device registered without memory has no frames to move to: ENODEV."""
    plain = bench.call(commands_device.register_device, "plain")
    mirror, _ = bench.attach(plain, bench.process)
    with pytest.raises(NoSuchObjectError):
        bench.call(commands_hmm.migrate_to_device, mirror, bench.span(0))


def test_unregister_loses_nothing_when_pages_are_on_board(bench: Any) -> None:
    """Unregistering moves everything back first; a device with mirrors stays (EBUSY)."""
    bench.write(0, b"u" * 2 * PAGE_SIZE)
    bench.to_device(0, 2)
    with pytest.raises(InUseError):
        bench.call(commands_device.unregister_device, bench.device)
    bench.call(commands_hmm.detach, bench.mirror)
    bench.call(commands_device.unregister_device, bench.device)
    assert len(bench.local.machine.frames.regions) == 1
    assert bench.read(0, 2 * PAGE_SIZE) == b"u" * 2 * PAGE_SIZE
    bench.local.machine.check()


def test_touch_tells_nobody_to_copy_when_the_mirror_is_gone(bench: Any) -> None:
    """Pages that a detached mirror left on the device come back without it."""
    bench.write(0, b"g" * PAGE_SIZE)
    bench.to_device(0, 1)
    bench.call(commands_hmm.detach, bench.mirror)
    assert bench.read(0, 1) == b"g"


def evicting(bench: Any, pages: int) -> None:
    """Let the bench's mirror be one of a device that has so many pages and evicts."""
    bench.device = bench.call(commands_device.register_device, "small", memory_pages=pages, evicts=True)
    bench.mirror, bench.heard = bench.attach(bench.device, bench.process)


def where(bench: Any, npages: int) -> str:
    """For each page, whether it is on a device or in system memory."""
    return "".join("d" if cpu_pte.is_device_private(bench.entry(page)) else "s" for page in range(npages))


def test_migrate_makes_room_only_for_the_pages_that_get_a_destination(bench: Any) -> None:
    """A device that evicts gives up no more than the call needs."""
    evicting(bench, 4)
    bench.write(0, bytes(range(1, 9)) * PAGE_SIZE)
    bench.to_device(0, 4)
    wanted = np.array([False, False, True, False])
    bench.call(commands_hmm.migrate_to_device, bench.mirror, bench.span(4, 4), wanted=wanted)
    assert where(bench, 8) == "sdddssds"
    bench.local.machine.check()


def test_migrate_moves_as_many_as_there_is_room_for_when_the_device_does_not_evict(bench: Any) -> None:
    """The driver allocates destinations; without one a page stays: migrate_vma_pages()."""
    bench.device = bench.call(commands_device.register_device, "small", memory_pages=4)
    bench.mirror, bench.heard = bench.attach(bench.device, bench.process)
    bench.write(0, b"x" * 6 * PAGE_SIZE)
    bench.to_device(0, 6)
    assert where(bench, 6) == "ddddss"


def test_migrate_evicts_what_went_to_the_device_first_when_it_is_full(bench: Any) -> None:
    """Pages that went there longest ago leave, those of the range itself stay; contents are what they were."""
    evicting(bench, 4)
    for page in range(6):
        bench.write(page, bytes([page]) * PAGE_SIZE)
    bench.to_device(2, 1)
    bench.to_device(0, 2)
    bench.to_device(3, 1)
    bench.to_device(3, 3)
    assert where(bench, 6) == "sdsddd"
    bench.local.machine.check()
    assert [bench.read(page, 1)[0] for page in range(6)] == list(range(6))


def test_migrate_fills_the_device_when_the_range_is_larger(bench: Any) -> None:
    """As much of it moves as the device has memory, and no page goes there and back in one call."""
    evicting(bench, 4)
    bench.write(0, b"x" * 8 * PAGE_SIZE)
    bench.to_device(6, 2)
    bench.to_device(0, 6)
    assert where(bench, 8) == "ddddssss"


def test_migrate_evicts_pages_of_other_processes_when_they_share_the_device(bench: Any) -> None:
    """Two processes that move their pages to one small device by turns: every call ends, and the last one has it."""
    evicting(bench, 4)
    bench.write(0, b"a" * 4 * PAGE_SIZE)
    other = bench.call(commands_process.fork, bench.process)
    bench.write(0, b"b" * 4 * PAGE_SIZE, other)
    mirror, _ = bench.attach(bench.device, other)
    for _ in range(3):
        bench.to_device(0, 4)
        assert where(bench, 4) == "dddd"
        bench.call(commands_hmm.migrate_to_device, mirror, bench.span(0, 4))
        assert where(bench, 4) == "ssss"
    assert bench.read(0, 4 * PAGE_SIZE) == b"a" * 4 * PAGE_SIZE
    assert bench.read(0, 4 * PAGE_SIZE, other) == b"b" * 4 * PAGE_SIZE
    bench.local.machine.check()


def test_migrate_moves_less_when_pinned_pages_fill_the_device(bench: Any) -> None:
    """A coherent page that is pinned for a short time stays where it is."""
    bench.device = bench.call(
        commands_device.register_device, "small", memory_pages=2, kind=RegionKind.DEVICE_COHERENT, evicts=True
    )
    bench.mirror, bench.heard = bench.attach(bench.device, bench.process)
    bench.write(0, b"x" * 4 * PAGE_SIZE)
    bench.to_device(0, 2)
    bench.call(commands_process.pin, bench.process, bench.span(0, 1), write=True, long_term=False)
    moved = bench.to_device(2, 2)
    assert np.count_nonzero(moved.src & np.uint64(MIGRATE)) == 1
    bench.local.machine.check()


@pytest.fixture
def coherent(bench: Any) -> Any:
    """The bench with a device whose memory the CPU reaches."""
    kind = RegionKind.DEVICE_COHERENT
    bench.device = bench.call(commands_device.register_device, "coherent", memory_pages=8, kind=kind)
    bench.mirror, bench.heard = bench.attach(bench.device, bench.process)
    bench.write(0, b"a" * 2 * PAGE_SIZE)
    bench.to_device(0, 2)
    return bench


def on_coherent_device(bench: Any, npages: int, process: int = 0) -> str:
    """For each page, whether the CPU's entry is present and names a frame of a device."""
    system = bench.local.machine.frames.regions[0].end
    entries = [bench.entry(page, process) for page in range(npages)]
    return "".join("d" if cpu_pte.is_present(entry) and cpu_pte.cpu_pfn(entry) >= system else "s" for entry in entries)


def test_cpu_uses_coherent_pages_where_they_are(coherent: Any) -> None:
    """MEMORY_DEVICE_COHERENT: the entry is present, so that reads and writes do not fault the page back."""
    assert on_coherent_device(coherent, 2) == "dd"
    coherent.write(0, b"b")
    assert coherent.read(0, 1) == b"b"
    assert on_coherent_device(coherent, 2) == "dd"
    coherent.local.machine.check()


def test_coherent_pages_are_shared_by_fork_and_copied_to_system_memory_when_written(coherent: Any) -> None:
    """copy_present_pte() shares them like any page; wp_page_copy() allocates from the system."""
    child = coherent.call(commands_process.fork, coherent.process)
    assert on_coherent_device(coherent, 2, child) == "dd"
    coherent.write(0, b"c", child)
    assert (on_coherent_device(coherent, 2, child), on_coherent_device(coherent, 2)) == ("sd", "dd")
    assert (coherent.read(0, 1), coherent.read(0, 1, child)) == (b"a", b"c")
    coherent.local.machine.check()


def test_coherent_pages_come_back_when_their_device_is_evicted(coherent: Any) -> None:
    """migrate_device_range() moves them from every process that maps them."""
    child = coherent.call(commands_process.fork, coherent.process)
    assert coherent.call(commands_hmm.evict_device, coherent.device) == 2
    assert (on_coherent_device(coherent, 2), on_coherent_device(coherent, 2, child)) == ("ss", "ss")
    assert coherent.read(0, 2 * PAGE_SIZE) == b"a" * 2 * PAGE_SIZE
    coherent.local.machine.check()


def test_pages_in_coherent_memory_are_not_freed_lazily(bench: Any) -> None:
    """madvise_free_pte_range() passes over folio_is_zone_device(): the entry stays dirty, the contents stay."""
    kind = RegionKind.DEVICE_COHERENT
    coherent = bench.call(commands_device.register_device, "coherent", memory_pages=8, kind=kind)
    mirror, _ = bench.attach(coherent, bench.process)
    bench.write(0, b"c" * PAGE_SIZE)
    bench.call(commands_hmm.migrate_to_device, mirror, bench.span(0))
    before = bench.entry(0)
    bench.call(commands_process.madvise, bench.process, bench.span(0).start, PAGE_SIZE, Advice.FREE)
    assert bench.entry(0) == before
    assert cpu_pte.is_dirty(before)


def test_zero_page_of_a_file_stays_when_it_was_told_of(bench: Any) -> None:
    """__migrate_device_pages() tells of the first hole; then migrate_vma_insert_page() asks vma_is_anonymous()."""
    file = bench.call(commands_file.open_file, "data", create=True)
    bench.call(commands_file.truncate_file, file, 4 * PAGE_SIZE)
    span = bench.span(0, 4)
    how = Prot.READ | Prot.WRITE, MapFlag.PRIVATE | MapFlag.FIXED
    bench.call(commands_process.mmap, bench.process, span.start, span.size_bytes, *how, file)
    handler = bench.call(commands_userfaultfd.create_userfaultfd, bench.process)
    bench.call(commands_userfaultfd.uffd_register, handler, span, 1)
    bench.call(commands_userfaultfd.uffd_zeropage, handler, bench.span(1))
    bench.heard.events.clear()
    assert not bench.to_device(0, 4).src.any()
    assert [event.spans for event in bench.heard.events] == [(span,), (bench.span(1, 3),)]
    assert bench.used == 0
    bench.local.machine.check()


def test_page_stays_referenced_when_it_moves(bench: Any) -> None:
    """folio_migrate_flags() hands it on; smaps asks folio_test_referenced(), on the device and back."""
    bench.call(commands_hmm.make_exclusive, bench.mirror, bench.span(0))  # FOLL_TOUCH
    bench.call(commands_hmm.give_back_exclusive, bench.mirror)
    space = bench.local.machine.processes[bench.process].space
    vma = space.vmas.find(bench.span(0).start)
    for move in (bench.to_device, bench.to_system):
        move(0, 1)
        assert memory_use(space, vma).referenced == PAGE_SIZE
