"""Bytes in and out of consecutive pages whose frames lie anywhere.

**Source**: Linux lib/iov_iter.c, copy_page_to_iter(), copy_page_from_iter().

**Absent**: which frames, and whether they may be read or written.
"""

from __future__ import annotations

import numpy as np

from hmm.frames import Frames
from hmm.units import PAGE_SHIFT, PAGE_SIZE, Pfns

__all__ = ["copy_from_frames", "copy_to_frames"]

_BLOCK_PAGES = 64
"""Pages copied at once: the temporary stays in the second-level cache, and its memory is used again and again."""


def copy_from_frames(frames: Frames, pfns: Pfns, offset: int, length: int) -> bytes:
    """Read bytes that run through several frames.

    Args:
        pfns: int64[n], the frames of consecutive pages; repetitions and the zero page allowed.
        offset: of the first byte in the first frame.
        length: bytes; the last one lies in the last frame.

    Cost: that of copying the bytes, once out of the cache.
    """
    if pfns.size == 1:
        return frames.read(int(pfns[0]), offset, length)
    parts = []
    for first in range(0, pfns.size, _BLOCK_PAGES):
        flat = frames.gather(pfns[first : first + _BLOCK_PAGES]).reshape(-1)
        start = first << PAGE_SHIFT
        parts.append(flat[max(offset - start, 0) : offset + length - start].tobytes())
    return parts[0] if len(parts) == 1 else b"".join(parts)


def copy_to_frames(frames: Frames, pfns: Pfns, offset: int, data: memoryview) -> None:
    """Write bytes that run through several frames.

    Args:
        pfns: int64[n], unique, without the zero page.
        offset: of the first byte in the first frame.
        data: bytes; the last one goes to the last frame.

    Cost: that of copying the bytes.
    """
    if offset or data.nbytes < PAGE_SIZE:
        head = min(data.nbytes, PAGE_SIZE - offset)
        frames.write(int(pfns[0]), offset, data[:head])
        pfns, data = pfns[1:], data[head:]
    whole = data.nbytes >> PAGE_SHIFT
    if whole:
        rows = np.frombuffer(data, np.uint8, whole << PAGE_SHIFT).reshape(whole, PAGE_SIZE)
        frames.scatter(pfns[:whole], rows)
    tail = data[whole << PAGE_SHIFT :]
    if tail.nbytes:
        frames.write(int(pfns[whole]), 0, tail)
