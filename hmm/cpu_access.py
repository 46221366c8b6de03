"""What a CPU does to a process's memory: read, write and touch, with page faults on the way.

An access goes through a range in ascending order and stops at the first page that gets a signal; what lies before
that page has been read or written.  It is made of pieces: the pages of a piece are brought in, with all the waiting
this may take, and then its bytes are transferred without waiting, so that nobody comes between the two.

**Source**: our own; it stands for loads and stores, and for copy_from_user().

**Invariants**: a byte is transferred only through an entry that permits it at that moment; what is written is
recorded as dirty in the entry.

**Absent**: executing, atomic instructions, caches.

Differs: a driver's registers (VM_PFNMAP) have no bytes here: reads give ones, as a bus where nobody answers, and
writes are lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.errors import InvalidRequestError, Signal
from hmm.fault import bring_in, continues, pieces, raise_stop
from hmm.fault_pages import By
from hmm.frames import ZERO_PFN
from hmm.operation import Operation, Pause
from hmm.uio import copy_from_frames, copy_to_frames
from hmm.units import PAGE_SHIFT, PAGE_SIZE, Address, AddressRange, Entries, spans_of_pages

__all__ = ["Accessed", "read_memory", "read_pages", "touch", "write_memory", "write_pages"]

_OFFSET = PAGE_SIZE - 1
_ADDRESSES = 1 << 64
_NO_ANSWER = 0xFF


class Accessed(NamedTuple):
    """How far an access came.

    Attributes:
        done: bytes transferred; of `touch`, `read_pages` and `write_pages` the number of pages.
        data: what was read.
        signal: what stopped the access, None when it was completed.
        address: the first address, in bytes, that could not be accessed.
    """

    done: int
    data: bytes = b""
    signal: Signal | None = None
    address: Address = 0


def read_memory(space: AddressSpace, address: Address, length: int) -> Operation[Accessed]:
    """Read bytes.

    Args:
        address: in bytes; need not be aligned.

    Raises:
        InvalidRequestError: the range is not one of 64-bit addresses (EINVAL).
        OutOfFramesError: memory ran out at `error.address` (ENOMEM).
        TimedOutError: a mirror with policy FAIL did not answer (ETIMEDOUT).
        NoSuchObjectError: the address space is gone (ESRCH).

    Cost: 10 us, and that of copying the bytes; page faults as `fault_in`.
    """
    parts: list[bytes] = []

    def transfer(span: AddressRange) -> None:
        parts.append(_load(space, span))

    done, signal, at = yield from _access(space, _span(address, length), False, transfer)
    return Accessed(done, b"".join(parts), signal, at)


def write_memory(space: AddressSpace, address: Address, data: bytes) -> Operation[Accessed]:
    """Write bytes.

    Args, Raises, Cost: as `read_memory`; bytes before `error.address` have been written.
    """
    view = memoryview(data)

    def transfer(span: AddressRange) -> None:
        _store(space, span, view[span.start - address : span.end - address])

    done, signal, at = yield from _access(space, _span(address, len(data)), True, transfer)
    return Accessed(done, b"", signal, at)


def touch(space: AddressSpace, span: AddressRange, *, write: bool) -> Operation[Accessed]:
    """Touch every page of a range, as one load or store in each would, but change no byte.

    Raises, Cost: as `read_memory`, without the bytes.
    """
    done, signal, at = yield from _access(space, span.page_aligned(), write, lambda _: None)
    return Accessed(done >> PAGE_SHIFT, b"", signal, at)


def read_pages(space: AddressSpace, span: AddressRange, offset: int) -> Operation[Accessed]:
    """Read the byte at `offset` of every page of a range.

    Args:
        span: page-aligned.

    Returns: one byte per page in `data`.

    Raises, Cost: as `read_memory`.
    """
    parts: list[bytes] = []

    def transfer(part: AddressRange) -> None:
        entries = space.table.read(part.start, part.end)
        values = space.frames.read_bytes(_pfns(entries), offset)
        values[_registers(entries)] = _NO_ANSWER
        parts.append(values.tobytes())

    done, signal, at = yield from _access(space, span, False, transfer)
    return Accessed(done >> PAGE_SHIFT, b"".join(parts), signal, _within(at, offset, signal))


def write_pages(
    space: AddressSpace, span: AddressRange, offset: int, values: npt.NDArray[np.uint8]
) -> Operation[Accessed]:
    """Write one byte at `offset` of every page of a range.

    Args:
        span: page-aligned.
        values: uint8[npages].

    Raises, Cost: as `write_memory`.
    """
    assert values.size == span.npages, (span, values.size)

    def transfer(part: AddressRange) -> None:
        entries = space.table.read(part.start, part.end)
        first = (part.start - span.start) >> PAGE_SHIFT
        real = ~_registers(entries)
        chosen = values[first : first + part.npages][real]
        space.frames.write_bytes(cpu_pte.cpu_pfn(entries[real]), offset, chosen)

    done, signal, at = yield from _access(space, span, True, transfer)
    return Accessed(done >> PAGE_SHIFT, b"", signal, _within(at, offset, signal))


def _within(page: Address, offset: int, signal: Signal | None) -> Address:
    return page + offset if signal else page


def _span(address: Address, length: int) -> AddressRange:
    if address < 0 or length < 0 or address + length > _ADDRESSES:
        raise InvalidRequestError(f"access: {length} bytes at {address:#x} are not a range of addresses")
    return AddressRange(address, address + length)


def _access(
    space: AddressSpace, span: AddressRange, write: bool, transfer: Callable[[AddressRange], None]
) -> Operation[tuple[int, Signal | None, Address]]:
    # Bytes done, and the signal with its address.  `transfer` gets every part that may be accessed, at once.
    done = span.start
    for piece in pieces(span.page_aligned()) if span.start < span.end else ():
        assert isinstance(piece, AddressRange)
        if done > span.start:
            yield Pause()
        rest = piece
        while True:
            stop = yield from bring_in(space, rest, write=write, by=By.CPU)
            part = rest if stop is None else AddressRange(rest.start, stop.address)
            if part is not span:
                part = part.intersect(span)
            if part.start < part.end:
                transfer(part)
                done = part.end
            if stop is None:
                break
            if continues(space, rest, stop):
                rest = AddressRange(stop.address, rest.end)
                continue
            if stop.signal is None:
                raise_stop(stop, write=write)
            return done - span.start, stop.signal, max(stop.address, span.start)
    return done - span.start, None, 0


# ---- bytes of pages that are there


def _registers(entries: Entries) -> npt.NDArray[np.bool_]:
    # Memory without struct page that is not the zero page.
    registers: npt.NDArray[np.bool_] = cpu_pte.is_special(entries) & (cpu_pte.cpu_pfn(entries) != ZERO_PFN)
    return registers


def _pfns(entries: Entries) -> npt.NDArray[np.int64]:
    return np.where(_registers(entries), ZERO_PFN, cpu_pte.cpu_pfn(entries))


def _load(space: AddressSpace, span: AddressRange) -> bytes:
    pages = span.page_aligned()
    if pages.size_bytes == PAGE_SIZE:
        entry = space.table.get(pages.start)
        if not entry & cpu_pte.SPECIAL:
            return space.frames.read(cpu_pte.cpu_pfn(entry), span.start & _OFFSET, span.size_bytes)
    entries = space.table.read(pages.start, pages.end)
    data = copy_from_frames(space.frames, _pfns(entries), span.start & _OFFSET, span.size_bytes)
    registers = _registers(entries)
    if registers.any():
        shown = np.repeat(registers, PAGE_SIZE)[span.start - pages.start : span.end - pages.start]
        data = np.where(shown, np.uint8(_NO_ANSWER), np.frombuffer(data, np.uint8)).tobytes()
    return data


def _store(space: AddressSpace, span: AddressRange, data: memoryview) -> None:
    pages = span.page_aligned()
    if pages.size_bytes == PAGE_SIZE:
        entry = space.table.get(pages.start)
        if not entry & cpu_pte.SPECIAL:
            space.frames.write(cpu_pte.cpu_pfn(entry), span.start & _OFFSET, data)
        return
    entries = space.table.read(pages.start, pages.end)
    if not cpu_pte.is_special(entries).any():
        copy_to_frames(space.frames, cpu_pte.cpu_pfn(entries), span.start & _OFFSET, data)
        return
    # The zero page is never writable, so the special ones are registers, where what is written is lost.
    for run in spans_of_pages(np.flatnonzero(~cpu_pte.is_special(entries))):
        part = AddressRange(pages.start + run.start, pages.start + run.end).intersect(span)
        pfns = cpu_pte.cpu_pfn(entries[run.start >> PAGE_SHIFT : run.end >> PAGE_SHIFT])
        chosen = data[part.start - span.start : part.end - span.start]
        copy_to_frames(space.frames, pfns, part.start & _OFFSET, chosen)
