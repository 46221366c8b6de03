"""Areas that grew downwards without a call: the stack, and what MAP_GROWSDOWN mapped.

A fault below such an area extends it; no log shows when.  The last layout shows how far, also where calls have cut
holes into what was gained; and a call that succeeds only where all is mapped shows that an area had grown by then.

Source: Linux mm/mmap.c, expand_downwards(); mm/mprotect.c, do_mprotect_pkey() for PROT_GROWSDOWN.
Absent: processes other than the first, whose last layouts are not known; areas that grew and are gone, when no call
    says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple, TypeAlias

from hmm.units import page_down
from hmm_client.recordings.arguments import number
from hmm_client.recordings.flags import MAP, PROT
from hmm_client.recordings.maps import STACK, Area
from hmm_client.recordings.order import given, taken
from hmm_client.recordings.steps import Advise, Ignored, Lock, Map, Protect, Remap, Step, Sync, Unlock
from hmm_client.recordings.strace import Call

_Range: TypeAlias = tuple[int, int]


class Growth:
    """What has grown by the end, and is not yet known to have.

    Args:
        initial: layout of the first process at the start.
        final: its layout at the end.
        calls: all of the recording.
    """

    def __init__(self, initial: Sequence[Area], final: Sequence[Area], calls: Iterable[Call]) -> None:
        self._final = final
        self._calls = [exchange for call in calls if (exchange := _exchange(call)) is not None]
        self._past: list[_Exchange] = [_Exchange(0, (area.start, area.end), None) for area in initial]
        self._starts: set[int] = set()
        self._pending: list[_Range] = []
        for area in initial:
            if area.name == STACK:
                self._expect(area.start, 0)

    def made(self, step: Step) -> None:
        """The first process has made a call."""
        exchange = _exchange(step.call)
        if exchange is not None and not isinstance(step, Ignored):
            self._past.append(exchange)
        match step:
            case Map(flags=flags, recorded=start) if flags & MAP["MAP_GROWSDOWN"]:
                self._expect(start, step.call.line)
            case Remap(address=old, recorded=start) if old in self._starts and start != old:
                self._expect(start, step.call.line)

    def before(self, step: Step) -> list[_Range]:
        """The [start, end) by which areas have grown before a step names them, each once."""
        address = getattr(step, "address", None)
        if address is None:
            return []
        whole = isinstance(step, Protect) and step.prot & PROT["PROT_GROWSDOWN"]
        named = [grown for grown in self._pending if grown[0] <= address and (whole or address < grown[1])]
        return self._take(named) or self._reached(step)

    def _reached(self, step: Step) -> list[_Range]:
        """What must have grown for a call to succeed, which begins below an area that nothing else lies below."""
        if not isinstance(step, Protect | Remap | Lock | Unlock | Advise | Sync):
            return []
        first = page_down(step.address)
        for start in sorted(self._starts):
            if first < start < step.address + step.length and not self._is_mapped(first, start):
                return self._take([(first, start)])
        return []

    def _is_mapped(self, start: int, end: int) -> bool:
        """Whether calls have mapped some of [start, end), and none has taken it away again."""
        open_ranges = [(start, end)]
        for _, brought, removed in reversed(self._past):
            if brought and any(_touch(brought, one) for one in open_ranges):
                return True
            if removed:
                open_ranges = [piece for one in open_ranges for piece in _without(one, removed)]
        return False

    def rest(self) -> list[_Range]:
        """The [start, end) by which areas have grown at the end, as far as no step named them."""
        return self._take(list(self._pending))

    def _take(self, grown: list[_Range]) -> list[_Range]:
        self._pending = [other for other in self._pending if other not in grown]
        for first, start in grown:
            self._starts.discard(start)
            self._starts.add(first)
        return grown

    def _expect(self, start: int, line: int) -> None:
        """Take note of an area that began at `start`, and of where it begins at the end if that is lower."""
        self._starts.add(start)
        later = [exchange for exchange in self._calls if exchange.line > line]
        lowest = start
        for area in reversed(self._final):
            if area.start >= lowest or (area.name and area.name != STACK) or area.is_shared:
                continue
            gained = area.start, min(area.end, lowest)
            if self._is_mapped(*gained) or any(brought and _touch(brought, gained) for _, brought, _ in later):
                break  # calls have mapped it, or will
            if area.end < lowest and not _is_cut(area.end, lowest, later):
                break
            lowest = area.start
        if lowest < start:
            self._pending.append((lowest, start))


class _Exchange(NamedTuple):
    """What a call brought and took away; mremap does both."""

    line: int
    brought: _Range | None
    removed: _Range | None


def _exchange(call: Call) -> _Exchange | None:
    with suppress(ValueError, IndexError):  # its step will say so
        removed = given(call)
        if call.name == "munmap" and call.succeeded:
            start, length = map(number, call.arguments)
            removed = start, start + length
        brought = taken(call)
        return _Exchange(call.line, brought, removed) if brought or removed else None
    return None


def _is_cut(start: int, end: int, later: Iterable[_Exchange]) -> bool:
    """Whether one of some calls cuts the hole [start, end)."""
    return any(removed and removed[0] <= start and end <= removed[1] for _, _, removed in later)


def _touch(one: _Range, other: _Range) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _without(one: _Range, removed: _Range) -> list[_Range]:
    pieces = ((one[0], min(one[1], removed[0])), (max(one[0], removed[1]), one[1]))
    return [(start, end) for start, end in pieces if start < end]
