"""Bytes in and out of consecutive pages whose frames lie anywhere.

**Source**: Linux lib/iov_iter.c, copy_page_to_iter(), copy_page_from_iter().

**Absent**: which frames, and whether they may be read or written.
"""

from __future__ import annotations

import numpy as np

from hmm.frames import Frames
from hmm.units import PAGE_SHIFT, PAGE_SIZE, Pfns

__all__ = ["copy_from_frames", "copy_to_frames"]


def copy_from_frames(frames: Frames, pfns: Pfns, offset: int, length: int) -> bytes:
    """Read bytes that run through several frames.

    Args:
        pfns: int64[n], the frames of consecutive pages; repetitions and the zero page allowed.
        offset: of the first byte in the first frame.
        length: bytes; the last one lies in the last frame.

    Cost: as `FrameContents.read_through`.
    """
    if pfns.size == 1:
        return frames.read(int(pfns[0]), offset, length)
    return frames.read_through(pfns, offset, length)


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
