"""Frames: allocation, reference and map counts, flags, regions."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from hmm.errors import ConflictError, NoSuchObjectError, OutOfFramesError
from hmm.frame_allocator import FrameAllocator, listed
from hmm.frames import SYSTEM_REGION, ZERO_PFN, Frames, PageFlag, RegionKind, RegionStatistics
from hmm.units import Pfns


def pfns(*numbers: int) -> Pfns:
    """Frame numbers as the methods take them."""
    return np.array(numbers, np.int64)


@pytest.fixture
def frames() -> Frames:
    """64 frames of system memory, one of them the zero page, and room for 64 of devices."""
    return Frames(64, 64)


def test_allocate_gives_consecutive_frames_with_one_reference(frames: Frames) -> None:
    """Frames come in ascending order, so that later operations on them are slices."""
    first, second = frames.allocate(10), frames.allocate(5)
    assert first.tolist() == list(range(1, 11))
    assert second.tolist() == list(range(11, 16))
    assert first.dtype == np.int64
    assert frames.refcount[first].tolist() == [1] * 10
    assert frames.available == 63 - 15
    frames.check()


def test_allocate_gives_freed_frames_again_in_ascending_order(frames: Frames) -> None:
    """What is freed together comes back together, and before frames that were never used."""
    taken = frames.allocate(20)
    frames.put(taken[5:15])
    assert frames.allocate(10).tolist() == taken[5:15].tolist()
    frames.put(pfns(9, 3, 12))
    assert frames.allocate(5).tolist() == [3, 9, 12, 21, 22]
    frames.check()


def test_allocate_gives_one_run_when_frames_were_freed_in_pieces_that_continue_each_other(frames: Frames) -> None:
    """What was freed piece by piece, the upper one first, is a run again, without a look at each frame."""
    frames.allocate(40)
    for piece in (pfns(7, 9), np.arange(20, 30), np.arange(12, 20)):
        frames.put(piece)
    frames.put_one(11)
    assert frames.allocate_mapped_run(12, PageFlag.ANON) == slice(11, 23)
    frames.check()
    frames.put_one(3)
    assert listed(frames.allocate_mapped_run(9, PageFlag.ANON)).tolist() == [3, 7, *range(23, 30)]
    frames.check()


def test_allocate_gives_each_frame_once_when_single_frames_come_and_go(frames: Frames) -> None:
    """However a run on top of the stack is eaten and put back, it stays one, or is known to be none."""
    taken = frames.allocate(20)
    frames.put(taken)
    for step in range(200):
        for pfn in [frames.allocate_one() for _ in range(step % 7)][:: 1 if step % 2 else -1]:
            frames.put_one(pfn)
        frames.put(frames.allocate(step % 11 + 1))
        frames.check()
    assert frames.allocate(20).tolist() == taken.tolist()


def test_frames_beyond_32_bits_are_freed_and_come_again() -> None:
    """Free frames are kept as 32-bit numbers only where all numbers have as many bits."""
    allocator = FrameAllocator(512, (1 << 32) + (1 << 16))
    allocator.add_region((1 << 32) - 512, 1, RegionKind.DEVICE_PRIVATE)
    region = allocator.add_region(64, 2, RegionKind.DEVICE_PRIVATE)
    where, reused = allocator.take(8, region.number)
    taken = listed(where)
    assert (int(taken[0]), reused) == (1 << 32, 0)
    allocator.give_back(taken)
    allocator.give_back_one(allocator.take_one(region.number)[0])
    again, reused = allocator.take(8, region.number)
    assert (listed(again).tolist(), reused) == (taken.tolist(), 8)


def test_allocate_nothing(frames: Frames) -> None:
    """An empty request is not an error."""
    assert frames.allocate(0).tolist() == []
    frames.check()


def test_allocate_changes_nothing_when_frames_run_out(frames: Frames) -> None:
    """ENOMEM is found before anything is touched."""
    frames.allocate(60)
    with pytest.raises(OutOfFramesError, match=r"system memory: 4 frames wanted, 3 of 63 free") as caught:
        frames.allocate(4)
    assert caught.value.errno == errno.ENOMEM
    assert frames.available == 3
    frames.check()
    assert frames.allocate(3).size == 3
    with pytest.raises(OutOfFramesError, match="none of 63"):
        frames.allocate_one()
    frames.check()


def test_allocate_one_takes_freed_frames_first(frames: Frames) -> None:
    """The scalar path hands out the same frames as the other one."""
    assert [frames.allocate_one() for _ in range(3)] == [1, 2, 3]
    assert frames.put_one(2)
    assert frames.allocate_one() == 2
    assert frames.allocate(2).tolist() == [4, 5]
    frames.check()


def test_put_frees_frames_when_their_last_reference_goes(frames: Frames) -> None:
    """A frame lives as long as it has references, and put says which ones it freed."""
    taken = frames.allocate(4)
    frames.get(taken[1:3])
    assert frames.put(taken).tolist() == [1, 4]
    assert frames.put(pfns(3)).tolist() == [3]
    assert frames.put(pfns(2)).tolist() == [2]
    assert frames.available == 63
    frames.check()


def test_put_counts_repeated_frames(frames: Frames) -> None:
    """A frame that is named three times loses three references."""
    taken = frames.allocate(3)
    frames.get(pfns(3, 1, 3, 1))
    assert frames.refcount[taken].tolist() == [3, 1, 3]
    assert frames.put(pfns(3, 1, 3, 1, 3, 2)).tolist() == [2, 3]
    assert frames.refcount[taken].tolist() == [1, 0, 0]
    frames.check()


def test_put_refuses_a_frame_that_nobody_holds(frames: Frames) -> None:
    """A reference too many is a bug of ours, on the scalar and on the vector path."""
    taken = frames.allocate(3)
    frames.put(taken[:1])
    with pytest.raises(AssertionError, match="nobody held"):
        frames.put(taken[:1])
    with pytest.raises(AssertionError, match="nobody held"):
        Frames(8, 0).put_one(2)


def test_get_refuses_a_frame_that_is_free(frames: Frames) -> None:
    """A frame that nobody holds cannot be held: VM_BUG_ON_PAGE() of get_page()."""
    taken = frames.allocate(3)
    frames.put(taken[1:2])
    for call in (frames.get, frames.map, frames.pin):
        for array in (taken, pfns(3, 1, 2), pfns(9)):
            with pytest.raises(AssertionError, match="free frame"):
                call(array)
    frames.check()


def test_put_one_counts_like_put(frames: Frames) -> None:
    """The scalar path."""
    pfn = frames.allocate_one()
    frames.get(pfns(pfn))
    assert frames.put_one(pfn) is False
    assert frames.put_one(pfn) is True
    assert frames.available == 63
    frames.check()


def test_map_holds_a_reference_for_each_entry(frames: Frames) -> None:
    """Two page tables map a frame; unmapping both leaves the page cache's reference."""
    taken = frames.allocate(4)
    frames.map(taken)
    frames.map(taken[::-1].copy())
    assert frames.mapcount[taken].tolist() == [2] * 4
    assert frames.refcount[taken].tolist() == [3] * 4
    assert frames.unmap(np.concatenate((taken, taken))).tolist() == []
    assert frames.put(taken).tolist() == taken.tolist()
    frames.check()


def test_map_new_takes_the_allocations_reference_over(frames: Frames) -> None:
    """folio_add_new_anon_rmap(): a new page's only reference is its entry's."""
    taken = frames.allocate(4)
    frames.map_new(taken)
    frames.belong(taken, 7, taken + 100, PageFlag.ANON | PageFlag.ANON_EXCLUSIVE)
    assert frames.refcount[taken].tolist() == frames.mapcount[taken].tolist() == [1] * 4
    frames.check()
    assert frames.unmap(taken).tolist() == taken.tolist()
    assert not frames.flags[taken].any()
    assert not frames.mapping[taken].any()
    frames.check()
    again = frames.allocate(2)
    frames.map_new(again)
    with pytest.raises(AssertionError, match="mapped already"):
        frames.map_new(again)


def test_allocate_mapped_is_allocate_and_map_new(frames: Frames) -> None:
    """New private pages in one pass, from frames used before and from fresh ones."""
    frames.put(frames.allocate(6)[[1, 3]])
    taken = frames.allocate_mapped(4, PageFlag.ANON)
    assert taken.tolist() == [2, 4, 7, 8]
    assert frames.refcount[taken].tolist() == frames.mapcount[taken].tolist() == [1] * 4
    assert frames.test_flags(taken, PageFlag.ANON).all()
    frames.check()
    assert frames.unmap(taken).tolist() == taken.tolist()
    frames.check()


def test_allocate_mapped_one_is_allocate_mapped_for_one(frames: Frames) -> None:
    """The scalar path."""
    pfn = frames.allocate_mapped_one(PageFlag.ANON)
    assert (frames.refcount[pfn], frames.mapcount[pfn], frames.flags[pfn]) == (1, 1, PageFlag.ANON)
    assert frames.unmap_one(pfn) is True
    frames.check()


def test_unmap_one_counts_like_unmap(frames: Frames) -> None:
    """The scalar path."""
    pfn = frames.allocate_mapped_one(PageFlag.ANON)
    frames.map(pfns(pfn))
    assert (frames.refcount[pfn], frames.mapcount[pfn]) == (2, 2)
    with pytest.raises(AssertionError, match="mapped already"):
        frames.map_new(pfns(pfn))
    assert frames.unmap_one(pfn) is False
    assert frames.unmap_one(pfn) is True
    frames.check()


def test_unmap_refuses_a_frame_that_is_not_mapped(frames: Frames) -> None:
    """An entry too many is a bug of ours."""
    taken = frames.allocate(2)
    with pytest.raises(AssertionError, match="not mapped"):
        frames.unmap(taken)
    with pytest.raises(AssertionError, match="not mapped"):
        Frames(8, 0).unmap_one(3)


def test_put_refuses_to_free_a_mapped_frame(frames: Frames) -> None:
    """Invariant 1: no frame is freed while something can reach it."""
    taken = frames.allocate(2)
    frames.map_new(taken)
    with pytest.raises(AssertionError, match="while mapped"):
        frames.put(taken)
    pfn = frames.allocate_mapped_one(PageFlag.ANON)
    with pytest.raises(AssertionError, match="while mapped"):
        frames.put_one(pfn)


def test_attach_undoes_detach(frames: Frames) -> None:
    """A migration entry holds the reference of the entry that it stands in for, and gives it back."""
    taken = frames.allocate_mapped(3, PageFlag.NONE)
    scattered = taken[[0, 2]]
    frames.detach(scattered)
    assert frames.mapcount[taken].tolist() == [0, 1, 0]
    assert frames.refcount[taken].tolist() == [1, 1, 1]
    frames.attach(scattered)
    assert frames.mapcount[taken].tolist() == [1, 1, 1]
    assert frames.unmap(taken).tolist() == taken.tolist()


def test_pin_keeps_a_frame_that_is_unmapped(frames: Frames) -> None:
    """A long-term pin is a reference and is told apart from others."""
    taken = frames.allocate(3)
    frames.map_new(taken)
    frames.pin(taken[:2])
    frames.pin(pfns(2, 1))
    assert frames.unmap(taken).tolist() == [3]
    assert frames.pincount[taken].tolist() == [2, 2, 0]
    assert frames.pinned == 4
    frames.check()
    assert frames.unpin(pfns(1, 1)).tolist() == [1]
    assert frames.unpin(pfns(2, 2)).tolist() == [2]
    assert not frames.pinned
    frames.check()
    with pytest.raises(AssertionError, match="not pinned"):
        frames.unpin(frames.allocate(1))


def test_counting_the_zero_page_has_no_effect(frames: Frames) -> None:
    """The zero page is not a normal page: neither referenced nor reverse-mapped (vm_normal_page())."""
    taken = frames.allocate(2)
    mixed = pfns(ZERO_PFN, 1, ZERO_PFN, 2)
    frames.get(mixed)
    frames.map(mixed)
    assert frames.refcount[[0, 1, 2]].tolist() == [0, 3, 3]
    assert frames.unmap(mixed).tolist() == []
    assert frames.put(mixed).tolist() == []
    assert frames.put(pfns(ZERO_PFN)).tolist() == []
    assert frames.unmap_one(ZERO_PFN) is False
    assert frames.put_one(ZERO_PFN) is False
    frames.check()
    assert frames.put(taken).size == 2


def test_flags_are_set_tested_and_cleared(frames: Frames) -> None:
    """Flags by frame, scattered or consecutive."""
    taken = frames.allocate(6)
    frames.set_flags(taken, PageFlag.ANON)
    frames.set_flags(pfns(1, 5, 3), PageFlag.ANON_EXCLUSIVE | PageFlag.DIRTY)
    assert frames.test_flags(taken, PageFlag.ANON_EXCLUSIVE).tolist() == [True, False, True, False, True, False]
    frames.clear_flags(pfns(3, 1), PageFlag.DIRTY)
    assert frames.test_flags(pfns(5, 3, 1), PageFlag.DIRTY).tolist() == [True, False, False]
    assert frames.test_flags(taken, PageFlag.ANON | PageFlag.DIRTY).all()
    assert frames.all_have(pfns(5), PageFlag.ANON | PageFlag.DIRTY)
    assert not frames.all_have(pfns(1, 5), PageFlag.ANON | PageFlag.DIRTY)
    frames.set_flags_one(4, PageFlag.DIRTY)
    assert frames.flags_of(4) == PageFlag.ANON | PageFlag.DIRTY
    frames.clear_flags(taken, PageFlag.ANON | PageFlag.ANON_EXCLUSIVE | PageFlag.DIRTY)
    assert not frames.flags.any()
    frames.put(taken)
    frames.check()


@pytest.mark.parametrize("unevictable", [False, True])
@pytest.mark.parametrize("times", [1, 2, 5])
def test_mark_accessed_treats_frames_alike_and_different_ones_the_same(
    frames: Frames, times: int, unevictable: bool
) -> None:
    """What a page becomes when it was used does not depend on those that were used with it."""
    before = (PageFlag.ANON, PageFlag.REFERENCED, PageFlag.ACTIVE, PageFlag.ACTIVE | PageFlag.REFERENCED)
    runs = [frames.allocate(3) for _ in before]
    for run, flags in zip(runs, before, strict=True):
        frames.set_flags(run, flags)
        frames.mark_accessed(run, times, dirty=True, unevictable=unevictable)
    alone = frames.flags[np.concatenate(runs)]
    frames.clear_flags(np.concatenate(runs), PageFlag.REFERENCED | PageFlag.ACTIVE | PageFlag.DIRTY)
    for run, flags in zip(runs, before, strict=True):
        frames.set_flags(run, flags)
    frames.mark_accessed(np.concatenate(runs), times, dirty=True, unevictable=unevictable)
    assert frames.flags[np.concatenate(runs)].tolist() == alone.tolist()
    assert frames.test_flags(runs[1], PageFlag.ACTIVE).all() != unevictable
    frames.mark_accessed(pfns())


def test_belong_says_whose_page_a_frame_is(frames: Frames) -> None:
    """page->mapping and page->index."""
    taken = frames.allocate(3)
    frames.belong(taken, 42, pfns(7, 8, 9))
    assert frames.mapping[taken].tolist() == [42] * 3
    assert frames.index[taken].tolist() == [7, 8, 9]
    frames.belong(pfns(3, 1), 5, pfns(1, 2), PageFlag.DIRTY)
    assert frames.mapping[taken].tolist() == [5, 42, 5]
    assert frames.index[taken].tolist() == [2, 8, 1]
    frames.put(taken)
    frames.check()


def test_check_notices_what_must_not_be(frames: Frames) -> None:
    """Each invariant is asserted."""
    taken = frames.allocate(3)
    frames.check()
    for column, value in ((frames.refcount, 0), (frames.mapcount, 2), (frames.pincount, 2)):
        before = int(column[taken[0]])
        column[taken[0]] = value
        with pytest.raises(AssertionError):
            frames.check()
        column[taken[0]] = before
    frames.set_flags(taken, PageFlag.ANON_EXCLUSIVE)
    with pytest.raises(AssertionError, match="exclusive"):
        frames.check()
    frames.clear_flags(taken, PageFlag.ANON_EXCLUSIVE)
    frames.put(taken)
    frames.flags[taken[1]] = 1
    with pytest.raises(AssertionError, match="free frame"):
        frames.check()
    frames.flags[taken[1]] = 0
    frames.check()
    frames._allocator._push(frames.region(SYSTEM_REGION), taken[:1])
    with pytest.raises(AssertionError):
        frames.check()


def test_region_is_a_run_of_frames_of_its_own(frames: Frames) -> None:
    """memremap_pages(): device memory has frame numbers, records and contents, and its own capacity."""
    region = frames.add_region(10, owner=3)
    assert (region.start, region.end, region.kind) == (64, 74, RegionKind.DEVICE_PRIVATE)
    taken = frames.allocate(8, region.number)
    assert taken.tolist() == list(range(64, 72))
    assert frames.allocate_one(region.number) == 72
    with pytest.raises(OutOfFramesError, match=r"device private memory of device 3: 2 frames wanted, 1 of 10"):
        frames.allocate(2, region.number)
    assert frames.available == 63
    assert frames.region_of(70) is region
    assert frames.region_of(5) is frames.region(SYSTEM_REGION)
    frames.check()


def test_put_frees_frames_of_several_regions_at_once(frames: Frames) -> None:
    """One array of frames may name memory of the system and of several devices."""
    one, two = frames.add_region(10, owner=1), frames.add_region(10, owner=2, kind=RegionKind.DEVICE_COHERENT)
    mixed = np.concatenate([frames.allocate(3, number) for number in (two.number, SYSTEM_REGION, one.number)])
    assert [one.used, two.used] == [3, 3]
    assert frames.put(mixed).tolist() == sorted(mixed.tolist())
    assert [region.used for region in frames.regions] == [0, 0, 0]
    frames.check()
    pfn = frames.allocate_one(two.number)
    assert frames.put_one(pfn)
    assert frames.allocate_one(two.number) == pfn
    frames.check()


def test_region_is_removed_only_when_its_frames_are_free(frames: Frames) -> None:
    """memunmap_pages() waits for the last reference; here the caller is told (EBUSY)."""
    region = frames.add_region(4, owner=1)
    taken = frames.allocate(2, region.number)
    with pytest.raises(ConflictError, match="2 frames are in use") as caught:
        frames.remove_region(region.number)
    assert caught.value.errno == errno.EBUSY
    frames.put(taken)
    frames.remove_region(region.number)
    frames.check()
    for call in (lambda: frames.remove_region(region.number), lambda: frames.allocate(1, region.number)):
        with pytest.raises(NoSuchObjectError) as gone:
            call()
        assert gone.value.errno == errno.ENODEV
    with pytest.raises(NoSuchObjectError):
        frames.allocate_one(region.number)
    with pytest.raises(AssertionError, match="no region"):
        frames.region_of(64)


def test_region_takes_the_lowest_free_frame_numbers(frames: Frames) -> None:
    """The numbers of a removed region are used again, its own number never is."""
    regions = [frames.add_region(20, owner=owner) for owner in (1, 2, 3)]
    assert [region.start for region in regions] == [64, 84, 104]
    with pytest.raises(OutOfFramesError, match="no 5 consecutive frame numbers"):
        frames.add_region(5, owner=4)
    frames.remove_region(regions[1].number)
    small = frames.add_region(8, owner=4)
    assert (small.start, small.number) == (84, 4)
    assert frames.add_region(12, owner=5).start == 92
    frames.check()


def test_frames_of_a_new_region_are_zero_when_their_numbers_were_used_before(frames: Frames) -> None:
    """A device never sees what another one left in its memory."""
    region = frames.add_region(4, owner=1)
    taken = frames.allocate(4, region.number)
    frames.scatter(taken, np.full((4, 4096), 7, np.uint8))
    frames.put(taken)
    frames.remove_region(region.number)
    again = frames.add_region(4, owner=2)
    assert again.start == region.start
    assert not frames.gather(frames.allocate(4, again.number)).any()
    frames.check()


def test_statistics_count_by_region(frames: Frames) -> None:
    """Total, free, used, mapped and the high-water mark of each region."""
    region = frames.add_region(10, owner=9)
    frames.put(frames.allocate(6)[2:])
    frames.map_new(frames.allocate(3, region.number))
    frames.unmap(frames.allocate_mapped(1, PageFlag.NONE))
    assert frames.statistics() == [
        RegionStatistics(0, 0, RegionKind.SYSTEM, total=63, free=61, used=2, mapped=0, high_water=6),
        RegionStatistics(1, 9, RegionKind.DEVICE_PRIVATE, total=10, free=7, used=3, mapped=3, high_water=3),
    ]


def test_migrate_takes_along_what_a_page_is_and_says_whether_the_old_frames_can_go(frames: Frames) -> None:
    """folio_migrate_flags(), folio_migrate_mapping(): not what a frame is by itself, as PG_lru."""
    old, new = frames.allocate(4), frames.allocate(4)
    frames.belong(old, 7, np.arange(4), PageFlag.ANON | PageFlag.SWAPBACKED | PageFlag.LRU)
    frames.write(int(old[2]), 0, b"page")
    assert frames.migrate(new, old, np.arange(20, 24))
    assert frames.read(int(new[2]), 0, 4) == b"page"
    assert frames.flags[new].tolist() == [PageFlag.ANON | PageFlag.SWAPBACKED] * 4
    assert frames.mapping[new].tolist() == [7] * 4
    assert frames.index[new].tolist() == [20, 21, 22, 23]
    frames.put_last(old[::-1])
    frames.put_last(old[:0])
    assert frames.allocate(4).tolist() == old.tolist()
    frames.check()


def test_migrate_leaves_frames_that_others_refer_to_as_they_are(frames: Frames) -> None:
    """They go on holding what they held; where the targets are filled already nothing is moved at all."""
    old, new = frames.allocate(2), frames.allocate(2)
    frames.write(int(old[0]), 0, b"page")
    frames.get(old[:1])
    assert not frames.migrate(new, old, old)
    assert frames.read(int(old[0]), 0, 4) == frames.read(int(new[0]), 0, 4) == b"page"
    frames.write(int(new[0]), 0, b"more")
    frames.put(old[:1])
    assert frames.migrate(new, old, old, filled=True)
    assert frames.read(int(old[0]), 0, 4) == b"page"
    assert frames.read(int(new[0]), 0, 4) == b"more"


@pytest.mark.parametrize("unevictable", [False, True])
@pytest.mark.parametrize("times", [0, 1, 2, 3, 512])
def test_mark_accessed_uses_a_page_so_often(frames: Frames, times: int, unevictable: bool) -> None:
    """folio_mark_accessed(): referenced, active, both; a page on no list only becomes referenced."""
    steps = [PageFlag.NONE, PageFlag.REFERENCED, PageFlag.ACTIVE, PageFlag.REFERENCED | PageFlag.ACTIVE]
    taken = frames.allocate(4)
    for pages in (taken, taken[::-1].copy()):
        for pfn, flags in zip(pages.tolist(), steps, strict=True):
            frames.flags[pfn] = flags | PageFlag.ANON
        frames.mark_accessed(pages, times, dirty=times == 2, unevictable=unevictable)
        after = [max(use, min(times, 1)) if unevictable else min(use + times, 3) for use in range(4)]
        more = PageFlag.ANON | (PageFlag.DIRTY if times == 2 else PageFlag.NONE)
        assert frames.flags[pages].tolist() == [steps[use] | more for use in after]
