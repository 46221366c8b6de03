"""The bytes of frames: reading, writing, copying, and zeroes that nobody wrote."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from hmm.frame_contents import as_slice
from hmm.frames import ZERO_PFN, Frames
from hmm.units import PAGE_SIZE, Pfns

SCATTERED = [9, 2, 5, 30]


def pfns(*numbers: int) -> Pfns:
    """Frame numbers as the methods take them."""
    return np.array(numbers, np.int64)


def pattern(npages: int, seed: int = 1) -> np.ndarray:
    """Pages that differ in every byte."""
    values = np.arange(npages * PAGE_SIZE, dtype=np.uint64) * np.uint64(2654435761 + seed) >> np.uint64(7)
    return values.astype(np.uint8).reshape(npages, PAGE_SIZE)


@pytest.fixture
def frames() -> Frames:
    """300 frames in use, so that any of them may be written."""
    frames = Frames(400, 0)
    frames.allocate(300)
    return frames


@pytest.fixture
def soiled() -> Frames:
    """40 frames that were full of ones and are allocated anew."""
    frames = Frames(41, 0)
    frames.scatter(frames.allocate(40), np.full((40, PAGE_SIZE), 255, np.uint8))
    frames.put(np.arange(1, 41))
    frames.allocate(40)
    return frames


def test_read_returns_what_was_written(frames: Frames) -> None:
    """Any part of a page, beside untouched zeroes."""
    frames.write(7, 100, b"hello")
    assert frames.read(7, 98, 9) == b"\0\0hello\0\0"
    frames.write(7, PAGE_SIZE - 3, memoryview(b"end"))
    assert frames.read(7) == bytes(100) + b"hello" + bytes(PAGE_SIZE - 108) + b"end"
    assert frames.read(8) == bytes(PAGE_SIZE)
    frames.write(7, 0, bytearray(PAGE_SIZE))
    assert frames.read(7) == bytes(PAGE_SIZE)
    assert frames.read(7, PAGE_SIZE, 0) == b""


@pytest.mark.parametrize(("offset", "length"), [(-1, 2), (0, PAGE_SIZE + 1), (PAGE_SIZE, 1), (4, -1)])
def test_access_beyond_a_page_is_refused(frames: Frames, offset: int, length: int) -> None:
    """A frame ends after 4096 bytes; what crosses pages is cut by the caller."""
    with pytest.raises(AssertionError):
        frames.read(3, offset, length)
    if length > 0:
        with pytest.raises(AssertionError):
            frames.write(3, offset, bytes(length))


def test_zero_page_is_readable_and_never_written(frames: Frames) -> None:
    """Every way to write refuses the zero page."""
    assert frames.read(ZERO_PFN) == bytes(PAGE_SIZE)
    page = pattern(1)
    for write in (
        lambda: frames.write(ZERO_PFN, 0, b"x"),
        lambda: frames.scatter(pfns(ZERO_PFN), page),
        lambda: frames.copy(pfns(3, ZERO_PFN), pfns(4, 5)),
        lambda: frames.clear(pfns(ZERO_PFN)),
        lambda: frames.write_bytes(pfns(1, ZERO_PFN), 0, pfns(1, 2).astype(np.uint8)),
    ):
        with pytest.raises(AssertionError):
            write()
    frames.check()


@pytest.mark.parametrize("where", [pfns(*SCATTERED), pfns(4, 5, 6, 7), pfns(8)])
def test_gather_returns_what_was_scattered(frames: Frames, where: Pfns) -> None:
    """Whole pages in the order asked for."""
    data = pattern(where.size)
    frames.scatter(where, data)
    assert np.array_equal(frames.gather(where), data)
    backwards = where[::-1].copy()
    out = np.empty((where.size, PAGE_SIZE), np.uint8)
    assert frames.gather(backwards, out) is out
    assert np.array_equal(out, data[::-1])


def test_gather_reads_the_zero_page_and_repetitions(frames: Frames) -> None:
    """A read of private memory names the zero page as often as it has untouched pages."""
    frames.scatter(pfns(6), pattern(1))
    got = frames.gather(pfns(ZERO_PFN, 6, ZERO_PFN, 6))
    assert not got[[0, 2]].any()
    assert np.array_equal(got[[1, 3]], np.repeat(pattern(1), 2, axis=0))
    assert frames.gather(pfns()).shape == (0, PAGE_SIZE)


def test_copy_moves_contents_in_order(frames: Frames) -> None:
    """Consecutive and scattered frames, more of them than are copied at a time."""
    data = pattern(100)
    frames.scatter(np.arange(1, 101), data)
    frames.copy(np.arange(101, 201), np.arange(1, 101))
    assert np.array_equal(frames.gather(np.arange(101, 201)), data)
    order = np.random.default_rng(5).permutation(100)
    frames.copy(np.arange(201, 301), 1 + order)
    assert np.array_equal(frames.gather(np.arange(201, 301)), data[order])
    frames.copy(101 + order, np.arange(1, 101))
    assert np.array_equal(frames.gather(101 + order), data)


def test_copy_of_the_zero_page_clears_its_target(frames: Frames) -> None:
    """Copy-on-write of an untouched page gives zeroes."""
    frames.scatter(pfns(3, 4), pattern(2))
    frames.copy(pfns(3), pfns(ZERO_PFN))
    assert frames.read(3) == bytes(PAGE_SIZE)
    frames.copy(pfns(4, 9, 6), pfns(ZERO_PFN, 3, ZERO_PFN))
    assert not frames.gather(pfns(4, 9, 6)).any()


@pytest.mark.parametrize("targets", [np.arange(1, 101), 200 - np.arange(100)])
@pytest.mark.parametrize("sources", [np.arange(11, 111), 1 + np.random.default_rng(6).permutation(100)])
def test_load_copies_from_another_memory(frames: Frames, targets: Pfns, sources: Pfns) -> None:
    """Consecutive and scattered frames, some of them stale or in the rows of others, on both sides."""
    other = Frames(200, 0)
    other.scatter(other.allocate(150), pattern(150))
    other.clear(pfns(20))
    other.exchange(pfns(30, 31), pfns(131, 60))
    frames.exchange(pfns(50, 51), pfns(140, 250))
    frames.clear(pfns(7, 190))
    expected = other.gather(sources)
    frames.load(targets, other, sources)
    assert np.array_equal(frames.gather(targets), expected)
    assert np.array_equal(other.gather(sources), expected)
    frames.check()


def test_frames_that_trade_places_hold_what_the_others_held(frames: Frames) -> None:
    """Consecutive and scattered ones, again and again, and stale ones too; then every access finds the right row."""
    frames.scatter(np.arange(1, 31), pattern(30))
    frames.clear(pfns(3))
    expected = {number: frames.read(number) for number in range(1, 31)}
    for targets, sources in (((11, 12, 13), (1, 2, 3)), ((2, 21, 9), (12, 4, 30)), ((12,), (2,)), ((), ())):
        frames.exchange(pfns(*targets), pfns(*sources))
        for target, source in zip(targets, sources, strict=True):
            expected[target], expected[source] = expected[source], expected[target]
    everyone = np.arange(1, 31)
    assert frames.gather(everyone).tobytes() == b"".join(expected.values())
    assert frames.read_bytes(everyone, 7).tolist() == [page[7] for page in expected.values()]
    assert frames.are_zero(everyone).tolist() == [not any(page) for page in expected.values()]
    frames.write(11, 5, b"written")
    frames.write_bytes(pfns(2, 21), 9, np.array([1, 2], np.uint8))
    frames.scatter(pfns(12, 30), pattern(2, seed=4))
    frames.copy(pfns(40, 41, 42), pfns(11, 2, 12))
    assert frames.read(40) == expected[11][:5] + b"written" + expected[11][12:]
    assert frames.read(41, 8, 3) == bytes((expected[2][8], 1, expected[2][10]))
    assert frames.read(42) == frames.read(12) == pattern(1, seed=4).tobytes()
    assert frames.read(13) == bytes(PAGE_SIZE)
    frames.check()


def test_move_takes_contents_along_and_copies_what_others_hold(frames: Frames) -> None:
    """folio_migrate_copy(): a frame that somebody else has as well goes on holding what it held."""
    data = pattern(4)
    frames.scatter(pfns(1, 2, 5, 9), data)
    frames.get(pfns(2))
    frames.move(pfns(101, 102, 103, 104), pfns(1, 2, 5, 9))
    assert np.array_equal(frames.gather(pfns(101, 102, 103, 104)), data)
    assert np.array_equal(frames.gather(pfns(2)), data[1:2])
    frames.move(pfns(105), pfns(ZERO_PFN))
    assert frames.read(105) == bytes(PAGE_SIZE)
    frames.move(pfns(106, 107), pfns(101, 102))
    assert np.array_equal(frames.gather(pfns(106, 107)), data[:2])
    frames.check()


def test_frames_of_a_removed_region_read_as_zeroes_whoever_has_their_rows() -> None:
    """Pages that went home left rows of system memory behind; what the region had is in use there."""
    frames = Frames(100, 100)
    region = frames.add_region(64, owner=1)
    here, there = frames.allocate(40), frames.allocate(40, region.number)
    frames.scatter(here, pattern(40))
    frames.scatter(there, pattern(40, seed=4))
    frames.move(here[10:13], there[10:13])
    frames.put(there)
    frames.remove_region(region.number)
    assert np.array_equal(frames.gather(here[10:13]), pattern(40, seed=4)[10:13])
    assert np.array_equal(frames.gather(here[13:]), pattern(40)[13:])
    again = frames.allocate(64, frames.add_region(64, owner=1).number)
    assert set(there.tolist()) <= set(again.tolist())
    assert not frames.gather(again).any()
    frames.check()


@pytest.mark.parametrize("numbers", [[4, 5, 6], [9, 2, 5], [5, ZERO_PFN, 5], [7], []])
def test_bytes_are_read_through_several_frames(frames: Frames, numbers: list[int]) -> None:
    """From the middle of the first to the middle of the last, wherever their rows are, stale ones too."""
    frames.scatter(np.arange(1, 11), pattern(10))
    frames.clear(pfns(6))
    frames.exchange(pfns(2), pfns(20))
    whole = frames.gather(pfns(*numbers)).tobytes()
    assert frames.read_through(pfns(*numbers), 0, len(whole)) == whole
    assert frames.read_through(pfns(*numbers), 3, max(len(whole) - 7, 0)) == whole[3 : max(len(whole) - 4, 3)]


def test_clear_makes_frames_read_as_zeroes(frames: Frames) -> None:
    """clear_highpage(), for consecutive and scattered frames."""
    frames.scatter(np.arange(1, 21), pattern(20))
    frames.clear(np.arange(1, 5))
    frames.clear(pfns(19, 7))
    got = frames.gather(np.arange(1, 21))
    cleared = [0, 1, 2, 3, 6, 18]
    assert not got[cleared].any()
    kept = [at for at in range(20) if at not in cleared]
    assert np.array_equal(got[kept], pattern(20)[kept])


def test_bytes_at_one_offset_are_read_and_written_for_many_frames(frames: Frames) -> None:
    """A program that touches one byte of each page."""
    frames.write_bytes(pfns(4, 9, 4), 17, np.array([1, 2, 3], np.uint8))
    assert frames.read_bytes(pfns(9, 4, ZERO_PFN, 5, 9), 17).tolist() == [2, 3, 0, 0, 2]
    assert frames.read(4, 16, 3) == b"\0\3\0"
    for offset in (-1, PAGE_SIZE):
        with pytest.raises(AssertionError):
            frames.read_bytes(pfns(1), offset)
        with pytest.raises(AssertionError):
            frames.write_bytes(pfns(1), offset, np.array([1], np.uint8))


def test_reused_frame_reads_as_zeroes_in_every_way(soiled: Frames) -> None:
    """A frame that is allocated again shows nothing of its former life, whoever looks first and however."""
    assert soiled.read(1, 5, 3) == bytes(3)
    assert not soiled.gather(pfns(2, 3, 4)).any()
    assert not soiled.gather(pfns(*SCATTERED)).any()
    assert soiled.read_bytes(pfns(12, 11), 9).tolist() == [0, 0]
    soiled.copy(pfns(13), pfns(14))
    assert soiled.read(13) == soiled.read(14) == bytes(PAGE_SIZE)
    pfn = int(soiled.put(pfns(20))[0])
    assert soiled.allocate_one() == pfn
    assert soiled.read(pfn) == bytes(PAGE_SIZE)


def test_reused_frame_keeps_zeroes_beside_a_partial_write(soiled: Frames) -> None:
    """A write of a part of a stale page must not bring the rest of its old contents back."""
    soiled.write(1, 8, b"ab")
    assert soiled.read(1, 6, 6) == b"\0\0ab\0\0"
    soiled.write_bytes(pfns(3, 2), 8, np.array([1, 2], np.uint8))
    assert soiled.read(3, 7, 3) == b"\0\1\0"


def test_reused_frame_is_what_overwrote_it(soiled: Frames) -> None:
    """Overwriting a whole stale page takes the mark away without zeroing, and the data stays."""
    soiled.write(1, 0, b"x" * PAGE_SIZE)
    soiled.scatter(pfns(2, 3), pattern(2))
    soiled.scatter(pfns(9, 5), pattern(2, seed=4))
    soiled.copy(pfns(11, 12), pfns(2, 3))
    soiled.copy(pfns(20, 18), pfns(3, 2))
    assert soiled.read(1) == b"x" * PAGE_SIZE
    assert np.array_equal(soiled.gather(pfns(2, 3)), pattern(2))
    assert np.array_equal(soiled.gather(pfns(9, 5)), pattern(2, seed=4))
    assert np.array_equal(soiled.gather(pfns(11, 12)), pattern(2))
    assert np.array_equal(soiled.gather(pfns(18, 20)), pattern(2))


def test_contents_live_in_the_memory_that_was_given() -> None:
    """A provider may hand out memory that others see too; a removed region is zeroed there."""
    given = []

    def provider(size_bytes: int) -> mmap.mmap:
        given.append(mmap.mmap(-1, size_bytes, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS))
        return given[0]

    frames = Frames(8, 8, provider)
    frames.allocate(2)
    frames.write(2, 1, b"seen")
    assert given[0][2 * PAGE_SIZE : 2 * PAGE_SIZE + 6] == b"\0seen\0"
    region = frames.add_region(4, owner=1)
    pfn = frames.allocate_one(region.number)
    frames.write(pfn, 0, b"gone")
    frames.put_one(pfn)
    frames.remove_region(region.number)
    assert given[0][pfn * PAGE_SIZE : pfn * PAGE_SIZE + 4] == bytes(4)
    frames.remove_region(frames.add_region(4, owner=1).number)
    frames.check()


def test_check_notices_a_written_zero_page(frames: Frames) -> None:
    """The zero page is zero."""
    frames._flat[17] = 1
    with pytest.raises(AssertionError, match="zero page"):
        frames.check()


def test_check_notices_two_frames_with_one_row(frames: Frames) -> None:
    """What one of them is written, the other one would show."""
    frames._shift[17] = 1
    with pytest.raises(AssertionError, match="share a row"):
        frames.check()


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([], slice(0, 0)),
        ([5], slice(5, 6)),
        ([5, 6], slice(5, 7)),
        ([5, 6, 7, 8], slice(5, 9)),
        ([6, 5], None),
        ([5, 7], None),
        ([5, 5], None),
        ([5, 7, 6, 8], None),
        ([5, 5, 7, 8], None),
    ],
)
def test_consecutive_frames_become_a_slice(numbers: list[int], expected: slice | None) -> None:
    """Only ascending frames without a gap or a repetition."""
    assert as_slice(pfns(*numbers)) == expected
