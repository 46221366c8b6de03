"""The bytes of all frames: one array, `uint8[n, 4096]`, committed as it is first touched.

A frame that is handed out reads as zeroes without having been zeroed: one that was never used is zero
already, and one that was used before is *stale*, which is a mark beside its bytes.  Whoever first looks at
a stale frame clears it; whoever overwrites all of it just takes the mark away.  So populating memory that
nobody reads costs no zeroing, and clearing a page is a store of one byte.

**Source**: Linux mm/highmem.c and include/linux/highmem.h: clear_highpage(), copy_highpage(),
memcpy_from_page().

**Invariants** (`check()`): frame 0, the zero page, is all zero and not stale.

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

    # -- one page

    def read(self, pfn: Pfn, offset: int = 0, length: int = PAGE_SIZE) -> bytes:
        """Bytes of one frame.

        Cost: 0.5 us.
        """
        assert 0 <= offset <= offset + length <= PAGE_SIZE, (offset, length)
        if self._stale_view[pfn]:
            self._clear_one(pfn)
        start = (pfn << PAGE_SHIFT) + offset
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
        start = (pfn << PAGE_SHIFT) + offset
        self._view[start : start + length] = data

    def _clear_one(self, pfn: Pfn) -> None:
        self._rows[pfn] = 0
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
        run = as_slice(pfns)
        if run is not None:
            out[...] = self._rows[run]
        else:
            # mode="raise" would copy through a buffer.
            np.take(self._rows, pfns, axis=0, out=out, mode="clip")
        return out

    def scatter(self, pfns: Pfns, data: Bytes) -> None:
        """Overwrite whole frames.

        Args:
            pfns: int64[n], unique, without the zero page.
            data: uint8[n, 4096].

        Cost: about 0.2 us per page, memory bandwidth.
        """
        _assert_writable(pfns)
        run = as_slice(pfns)
        target = pfns if run is None else run
        self._rows[target] = data
        self._stale[target] = False

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
        rows = self._rows
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
        self._stale[targets if to is None else to] = False

    def clear(self, pfns: Pfns) -> None:
        """Make frames read as zeroes.

        Args:
            pfns: int64[n], without the zero page.

        Cost: 1 ns per page now, the zeroing when they are next read.
        """
        _assert_writable(pfns)
        run = as_slice(pfns)
        self._stale[pfns if run is None else run] = True

    def read_bytes(self, pfns: Pfns, offset: int) -> Bytes:
        """The byte at `offset` of each frame.

        Args:
            pfns: int64[n], any order, repetitions and the zero page allowed.

        Returns: uint8[n].
        """
        assert 0 <= offset < PAGE_SIZE, offset
        self._settle(pfns)
        values: Bytes = self._rows[pfns, offset]
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
        self._rows[pfns, offset] = values

    def are_zero(self, pfns: Pfns) -> npt.NDArray[np.bool_]:
        """Which frames hold nothing but zeroes: bool[n].

        Cost: that of reading them.
        """
        found = self._stale[pfns]
        held = np.flatnonzero(~found)
        words = self._rows.view(np.uint64)
        for at in range(0, held.size, _COPY_PAGES):
            part = held[at : at + _COPY_PAGES]
            found[part] = ~words[pfns[part]].any(axis=1)
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
        run = as_slice(stale)
        if run is not None:
            self._rows[run] = 0
        else:
            self._rows[stale] = 0
        self._stale[stale] = False

    def _discard(self, start: Pfn, end: Pfn) -> None:
        """Zero the frames [start, end) and give their memory back where it is ours alone."""
        if start == end:
            return
        if self._private is not None:
            self._private.madvise(mmap.MADV_DONTNEED, start << PAGE_SHIFT, (end - start) << PAGE_SHIFT)
        else:
            self._rows[start:end] = 0
        self._stale[start:end] = False

    def image(self) -> tuple[object, ...]:
        """Everything that `check()` looks at, as a value."""
        return self._rows[ZERO_PFN].tobytes(), bool(self._stale[ZERO_PFN])

    def check(self) -> None:
        """Assert that the zero page is what its name says."""
        assert not self._rows[ZERO_PFN].any(), "the zero page was written"
        assert not self._stale[ZERO_PFN], "the zero page is stale"


def _apart(pfns: Pfns, run: slice) -> slice | None:
    """The frames from the smallest to the largest, unless frames of `run` are among them.

    numpy copies by way of a buffer between views that may share memory, and not between those of two such runs.
    """
    low, high = int(np.minimum.reduce(pfns)), int(np.maximum.reduce(pfns)) + 1
    return slice(low, high) if high <= run.start or run.stop <= low else None


def _assert_writable(pfns: Pfns) -> None:
    assert np.count_nonzero(pfns) == pfns.size, "the zero page is never written"
