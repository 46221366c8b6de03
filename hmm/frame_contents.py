"""The bytes of all frames: one array, `uint8[n, 4096]`, committed as it is first touched.

A frame that is handed out reads as zeroes without having been zeroed: one that was never used is zero
already, and one that was used before is *stale*, which is a mark beside its bytes.  Whoever first looks at
a stale frame clears it; whoever overwrites all of it just takes the mark away.  So populating memory that
nobody reads costs no zeroing, and clearing a page is a store of one byte.

Two frames can trade their rows of the array, so that what a page holds need not be copied when it moves.

**Source**: Linux mm/highmem.c and include/linux/highmem.h: clear_highpage(), copy_highpage(),
memcpy_from_page().

**Invariants** (`check()`): frame 0, the zero page, has row 0, is all zero and not stale.

**Absent**: who uses a frame and how often (frames.py).
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from contextlib import suppress
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from hmm.ascending import is_ascending
from hmm.units import PAGE_SHIFT, PAGE_SIZE, Pfn, Pfns

Bytes: TypeAlias = npt.NDArray[np.uint8]
BytesLike: TypeAlias = bytes | bytearray | memoryview
MemoryProvider: TypeAlias = Callable[[int], mmap.mmap]

ZERO_PFN = 0
"""The frame of the shared zero page: it reads as zeroes, is never written and never counted."""

_MAP_NORESERVE = 0x4000  # not in Python 3.11's mmap module
_COPY_PAGES = 64
"""Pages copied at once: their 256 KiB of temporaries stay in the second-level cache."""
_RUN_PAGES = 16
"""Fewer rows in a row are not given back: to clear them costs less than the call of the kernel and their faults."""
_WEIGHTS = np.arange(1, 2 * (PAGE_SIZE // 8), 2, dtype=np.uint64) * np.uint64(0x9E37_79B9_7F4A_7C15)
"""Of the words of a page in its checksum: odd, so that each word counts with all its bits."""


def anonymous_memory(size_bytes: int) -> mmap.mmap:
    """Private zeroed memory, of which only what is touched is committed."""
    return mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)


def as_slice(pfns: Pfns) -> slice | None:
    """The slice that selects the same frames in the same order, when they are consecutive and ascending.

    Cost: O(1) for most arrays that are not, O(n) vectorised otherwise.
    """
    count = pfns.size
    if not count:
        return slice(0, 0)
    first = int(pfns[0])
    # An ascending array with these ends leaves nothing out; and comparing takes an eighth of the temporary
    # memory that differences would.
    if int(pfns[-1]) - first != count - 1 or not is_ascending(pfns):
        return None
    return slice(first, first + count)


class FrameContents:
    """The bytes of `nframes` frames.

    Args:
        nframes: frames addressable, the zero page included.
        provider: gives zeroed memory of a size in bytes, to be shared with other processes, say; the default
            is private.
    """

    def __init__(self, nframes: int, provider: MemoryProvider = anonymous_memory) -> None:
        memory = provider(nframes << PAGE_SHIFT)
        # A huge page is zeroed as a whole at the first touch of any of its frames.
        with suppress(OSError):
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        self._private = memory if provider is anonymous_memory else None
        # Nobody closes the mapping: it goes with the last view of it.
        self._flat: Bytes = np.frombuffer(memory, np.uint8, nframes << PAGE_SHIFT)
        self._rows: Bytes = self._flat.reshape(nframes, PAGE_SIZE)
        self._view = self._flat.data
        self._stale: npt.NDArray[np.bool_] = np.frombuffer(anonymous_memory(nframes), np.bool_, nframes)
        self._stale_view = self._stale.data
        # How far from its own row the bytes of a frame are: mostly they are there, and none of this is committed.
        self._shift: Pfns = np.frombuffer(anonymous_memory(nframes * 8), np.int64, nframes)
        self._shift_view = self._shift.data

    # -- one page

    def read(self, pfn: Pfn, offset: int = 0, length: int = PAGE_SIZE) -> bytes:
        """Bytes of one frame.

        Cost: 0.5 us.
        """
        assert 0 <= offset <= offset + length <= PAGE_SIZE, (offset, length)
        if self._stale_view[pfn]:
            self._clear_one(pfn)
        start = (pfn + self._shift_view[pfn] << PAGE_SHIFT) + offset
        return bytes(self._view[start : start + length])

    def write(self, pfn: Pfn, offset: int, data: BytesLike) -> None:
        """Store bytes in one frame, which is not the zero page.

        Cost: 0.5 us.
        """
        length = len(data)
        assert pfn != ZERO_PFN
        assert 0 <= offset <= offset + length <= PAGE_SIZE, (offset, length)
        if self._stale_view[pfn]:
            if length == PAGE_SIZE:
                self._stale_view[pfn] = False
            else:
                self._clear_one(pfn)
        start = (pfn + self._shift_view[pfn] << PAGE_SHIFT) + offset
        self._view[start : start + length] = data

    def _clear_one(self, pfn: Pfn) -> None:
        self._rows[pfn + self._shift_view[pfn]] = 0
        self._stale_view[pfn] = False

    # -- many pages

    def gather(self, pfns: Pfns, out: Bytes | None = None) -> Bytes:
        """A copy of the contents of frames.

        Args:
            pfns: int64[n], any order, repetitions and the zero page allowed.
            out: uint8[n, 4096], contiguous; allocated when not given.

        Returns: uint8[n, 4096].

        Cost: about 0.2 us per page, memory bandwidth.
        """
        self._settle(pfns)
        if out is None:
            out = np.empty((pfns.size, PAGE_SIZE), np.uint8)
        places = self._places(pfns)
        run = as_slice(places)
        if run is not None:
            out[...] = self._rows[run]
        else:
            # mode="raise" would copy through a buffer.
            np.take(self._rows, places, axis=0, out=out, mode="clip")
        return out

    def read_through(self, pfns: Pfns, offset: int, length: int) -> bytes:
        """Bytes that run through several frames.

        Args:
            pfns: int64[n], as for `gather`.
            offset: of the first byte in the first frame.
            length: bytes; no frame ends before the first or begins behind the last.

        Cost: that of copying the bytes, twice where their rows are not consecutive.
        """
        run = as_slice(self._places(pfns))
        if run is None:
            return self.gather(pfns).reshape(-1)[offset : offset + length].tobytes()
        self._settle(pfns)
        start = (run.start << PAGE_SHIFT) + offset
        return bytes(self._view[start : start + length])

    def scatter(self, pfns: Pfns, data: Bytes) -> None:
        """Overwrite whole frames.

        Args:
            pfns: int64[n], unique, without the zero page.
            data: uint8[n, 4096].

        Cost: about 0.2 us per page, memory bandwidth.
        """
        _assert_writable(pfns)
        self._rows[as_index(self._places(pfns))] = data
        self._stale[as_index(pfns)] = False

    def copy(self, targets: Pfns, sources: Pfns) -> None:
        """Copy whole frames, `sources[i]` to `targets[i]`; a source must not be an earlier target.

        Args:
            targets: int64[n], unique, without the zero page.
            sources: int64[n], any order; the zero page clears its target.

        Cost: about 0.5 us per page, twice that when neither are consecutive.  Source: Linux mm/util.c, folio_copy().
        """
        assert targets.size == sources.size
        _assert_writable(targets)
        self._settle(sources)
        self._stale[as_index(targets)] = False
        rows, targets, sources = self._rows, self._places(targets), self._places(sources)
        to, since = as_slice(targets), as_slice(sources)
        if to is not None and since is not None:
            rows[to] = rows[since]
        elif to is not None and (around := _apart(sources, to)) is not None:
            np.take(rows[around], sources - around.start, axis=0, out=rows[to], mode="clip")
        elif since is not None and (around := _apart(targets, since)) is not None:
            rows[around][targets - around.start] = rows[since]
        else:
            for at in range(0, targets.size, _COPY_PAGES):
                rows[targets[at : at + _COPY_PAGES]] = rows[sources[at : at + _COPY_PAGES]]

    def load(self, targets: Pfns, other: FrameContents, sources: Pfns) -> None:
        """Copy whole frames of another memory, `sources[i]` there to `targets[i]` here.

        Args:
            targets, sources: as for `copy`.

        Cost: about 0.3 us per page, half as much again when neither are consecutive.
        """
        _assert_writable(targets)
        other._settle(sources)
        self._stale[as_index(targets)] = False
        rows, targets, sources = other._rows, self._places(targets), other._places(sources)
        to, since = as_slice(targets), as_slice(sources)
        if to is not None:
            np.take(rows, sources, axis=0, out=self._rows[to], mode="clip")
        elif since is not None:
            self._rows[targets] = rows[since]
        else:
            for at in range(0, targets.size, _COPY_PAGES):
                self._rows[targets[at : at + _COPY_PAGES]] = rows[sources[at : at + _COPY_PAGES]]

    def exchange(self, targets: Pfns, sources: Pfns) -> None:
        """Let `targets[i]` hold what `sources[i]` holds, and the reverse, while the bytes stay where they are.

        Args:
            targets, sources: int64[n], unique and disjoint, without the zero page.

        Cost: 10 ns per page.
        """
        to, since = as_index(targets), as_index(sources)
        between = sources - targets
        shift = self._shift
        shift[to], shift[since] = shift[since] + between, shift[to] - between
        stale = self._stale[to].copy()
        self._stale[to] = self._stale[since]
        self._stale[since] = stale

    def clear(self, pfns: Pfns) -> None:
        """Make frames read as zeroes.

        Args:
            pfns: int64[n], without the zero page.

        Cost: 1 ns per page now, the zeroing when they are next read.
        """
        _assert_writable(pfns)
        self._stale[as_index(pfns)] = True

    def read_bytes(self, pfns: Pfns, offset: int) -> Bytes:
        """The byte at `offset` of each frame.

        Args:
            pfns: int64[n], any order, repetitions and the zero page allowed.

        Returns: uint8[n].
        """
        assert 0 <= offset < PAGE_SIZE, offset
        self._settle(pfns)
        values: Bytes = self._rows[self._places(pfns), offset]
        return values

    def write_bytes(self, pfns: Pfns, offset: int, values: Bytes) -> None:
        """Store one byte at `offset` of each frame.

        Args:
            pfns: int64[n], without the zero page; of a repeated frame the last value stays.
            values: uint8[n].
        """
        assert 0 <= offset < PAGE_SIZE, offset
        _assert_writable(pfns)
        self._settle(pfns)
        self._rows[self._places(pfns), offset] = values

    def are_zero(self, pfns: Pfns) -> npt.NDArray[np.bool_]:
        """Which frames hold nothing but zeroes: bool[n].

        Cost: that of reading them.
        """
        found = self._stale[pfns]
        held = np.flatnonzero(~found)
        words, places = self._rows.view(np.uint64), self._places(pfns)
        for at in range(0, held.size, _COPY_PAGES):
            part = held[at : at + _COPY_PAGES]
            found[part] = ~words[places[part]].any(axis=1)
        return found

    def checksums(self, pfns: Pfns) -> npt.NDArray[np.uint64]:
        """A number for what each frame holds: uint64[n]; equal for equal contents, and hardly ever for others.

        Cost: that of reading them, and 0.5 us per page.
        """
        sums = np.empty(pfns.size, np.uint64)
        for at in range(0, pfns.size, _COPY_PAGES):
            part = slice(at, at + _COPY_PAGES)
            sums[part] = self.gather(pfns[part]).view(np.uint64) @ _WEIGHTS
        return sums

    def _settle(self, pfns: Pfns) -> None:
        """Zero those of `pfns` that are stale."""
        marks = self._stale[pfns]
        if not np.count_nonzero(marks):
            return
        stale = pfns[marks]
        self._rows[as_index(self._places(stale))] = 0
        self._stale[stale] = False

    def _places(self, pfns: Pfns) -> Pfns:
        """The rows of frames."""
        return pfns + self._shift[pfns]

    def _discard(self, start: Pfn, end: Pfn) -> None:
        """Zero the frames [start, end) and give their memory back where it is ours alone, but for scattered rows."""
        places = self._places(np.arange(start, end))
        if self._private is None:
            self._rows[places] = 0
            self._stale[start:end] = False
            return
        self._stale[start:end] = True
        for first, npages in _long_runs(places):
            self._private.madvise(mmap.MADV_DONTNEED, first << PAGE_SHIFT, npages << PAGE_SHIFT)

    def image(self) -> tuple[object, ...]:
        """Everything that `check()` looks at, as a value."""
        return self._rows[ZERO_PFN].tobytes(), bool(self._stale[ZERO_PFN])

    def check(self) -> None:
        """Assert that the zero page is what its name says."""
        assert not self._rows[ZERO_PFN].any(), "the zero page was written"
        assert not self._stale[ZERO_PFN], "the zero page is stale"


def as_index(pfns: Pfns | slice) -> Pfns | slice:
    """What selects the frames: a slice when they are consecutive."""
    if isinstance(pfns, slice):
        return pfns
    run = as_slice(pfns)
    return pfns if run is None else run


def _long_runs(places: Pfns) -> list[list[int]]:
    """Runs of consecutive rows that are worth a call of the kernel: the first row and how many, of each.

    Args:
        places: int64[n], unique.
    """
    places = np.sort(places)
    first = np.flatnonzero(np.diff(places, prepend=-2) != 1)
    lengths = np.diff(first, append=places.size)
    runs: list[list[int]] = np.column_stack((places[first], lengths))[lengths >= _RUN_PAGES].tolist()
    return runs


def _apart(pfns: Pfns, run: slice) -> slice | None:
    """The frames from the smallest to the largest, unless frames of `run` are among them.

    numpy copies by way of a buffer between views that may share memory, and not between those of two such runs.
    """
    low, high = int(np.minimum.reduce(pfns)), int(np.maximum.reduce(pfns)) + 1
    return slice(low, high) if high <= run.start or run.stop <= low else None


def _assert_writable(pfns: Pfns) -> None:
    assert np.count_nonzero(pfns) == pfns.size, "the zero page is never written"
