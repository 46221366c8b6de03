"""A small second opinion on what recorded calls do to a layout: lists of areas, piece by piece.

It replays the steps of a plan at the recorded addresses, and stops where they contradict themselves: memory handed
out where memory still is, a call that fails here and succeeded there, or the reverse.

Absent: pages, contents, placement, limits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

from hmm.units import page_down, page_up
from hmm_client.recordings import (
    FIRST,
    Advise,
    Appear,
    Area,
    Brk,
    Detach,
    Exec,
    Exit,
    Failed,
    Fork,
    GrowStack,
    Ignored,
    Interrupted,
    Map,
    Protect,
    Recording,
    Remap,
    RemapFile,
    Step,
    Sync,
    Unknown,
    Unmap,
    Vfork,
)
from hmm_client.recordings.flags import MADV, MAP, MREMAP, PROT
from hmm_client.recordings.maps import SHARED_ANONYMOUS

_FIXED = MAP["MAP_FIXED"]
_DONTFORK, _DOFORK = MADV["MADV_DONTFORK"], MADV["MADV_DOFORK"]


class ContradictionError(AssertionError):
    """The steps can't have happened like this."""


def perms_of(prot: int, *, shared: bool) -> str:
    """PROT_ bits as maps shows them."""
    letters = zip("rwx", (PROT["PROT_READ"], PROT["PROT_WRITE"], PROT["PROT_EXEC"]), strict=True)
    return "".join(letter if prot & bit else "-" for letter, bit in letters) + ("s" if shared else "p")


@dataclass
class Space:
    """One address space: its areas, ascending and disjoint."""

    areas: list[Area]
    brk: int | None = None
    dontfork: frozenset[int] = frozenset()

    def split(self, start: int, end: int) -> tuple[list[Area], list[Area], list[Area]]:
        """What lies below, inside and above [start, end)."""
        below, inside, above = [], [], []
        for area in self.areas:
            if area.start < start:
                below.append(clip(area, area.start, min(area.end, start)))
            if area.start < end and area.end > start:
                inside.append(clip(area, max(area.start, start), min(area.end, end)))
            if area.end > end:
                above.append(clip(area, max(area.start, end), area.end))
        return below, inside, above

    def put(self, start: int, end: int, areas: Iterable[Area]) -> list[Area]:
        """Replace [start, end) by `areas`; what was there is returned."""
        below, inside, above = self.split(start, end)
        self.areas = [*below, *areas, *above]
        return inside

    def change(self, start: int, end: int, change: Callable[[Area], Area]) -> str | None:
        """Apply `change` up to the first hole; ENOMEM when there is one."""
        _, inside, _ = self.split(start, end)
        reached = start
        changed = []
        for area in inside:
            if area.start != reached:
                break
            changed.append(change(area))
            reached = area.end
        self.put(start, reached, changed)
        return None if reached >= end else "ENOMEM"

    def claim(self, step: Step, start: int, end: int) -> None:
        """Memory that the kernel found a place for lies in free space."""
        _, inside, _ = self.split(start, end)
        if inside and not step.partial:
            raise ContradictionError(f"line {step.call.line}: {step.call.text}: in use: {inside[0]}")


def clip(area: Area, start: int, end: int) -> Area:
    """The part [start, end) of an area."""
    return replace(area, start=start, end=end, offset=area.offset + (start - area.start if area.source else 0))


class LayoutModel:
    """Replays a recording.

    Attributes:
        spaces: process number -> address space; a vforked child shares its parent's object.
    """

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.spaces = {FIRST: Space(list(recording.initial), recording.brk_start)}
        self.final: list[Area] | None = None

    def run(self) -> list[Area]:
        """Take every step; the layout of the first process when it ended."""
        for step in self.recording.plan.steps:
            errno = self.take(step)
            if errno is not None and not step.partial:
                raise ContradictionError(f"line {step.call.line}: {step.call.text}: {errno} here")
        return self.final if self.final is not None else self.spaces[FIRST].areas

    def take(self, step: Step) -> str | None:
        """Take one step; the errno with which it failed against the record."""
        match step:
            case Fork(child=child):
                parent = self.spaces[step.process]
                left = {area.start for area in parent.areas if area.name == "anon_inode:[perf_event]"} | parent.dontfork
                kept = [area for area in parent.areas if area.start not in left]
                self.spaces[child] = Space(kept, parent.brk, parent.dontfork)
            case Vfork(child=child):
                self.spaces[child] = self.spaces[step.process]
            case Appear():
                self.spaces[step.process] = Space([])
            case Exec():
                self.spaces[step.process] = Space([], step.brk_start)
            case Exit():
                space = self.spaces.pop(step.process)
                if step.process == FIRST:
                    self.final = space.areas
            case Failed(attempt=attempt, errno=errno):
                got = self.apply(self.spaces[step.process], attempt) if attempt else errno
                return None if got == errno else f"{got or 'success'} instead of {errno}"
            case Ignored() | Unknown():
                pass
            case _:
                return self.apply(self.spaces[step.process], step)
        return None

    def apply(self, space: Space, step: Step) -> str | None:
        """What a call does to a space; its errno."""
        errno = None
        match step:
            case Map():
                errno = self._map(space, step)
            case Unmap():
                errno = self._unmap(space, step)
            case Protect():
                errno = self._protect(space, step)
            case Remap():
                errno = self._remap(space, step)
            case Advise():
                errno = self._advise(space, step)
            case Sync():
                errno = space.change(page_down(step.address), page_up(step.address + step.length), lambda area: area)
            case Brk():
                self._set_break(space, step)
            case GrowStack(start=start, end=end):
                stack = next(area for area in space.areas if area.start == end)
                space.put(start, stack.end, [replace(stack, start=start)])
            case _:
                self._apply_rarer(space, step)
        return errno

    def _apply_rarer(self, space: Space, step: Step) -> None:
        match step:
            case RemapFile(address=start, offset=offset):
                end = page_up(start + step.length)
                space.change(start, end, lambda area: replace(area, offset=offset + area.start - start))
            case Detach(address=address):
                for area in list(space.areas):
                    if area.name.startswith(("/SYSV", "/[aio]")) and area.start - address == area.offset:
                        space.put(area.start, area.end, [])
            case Interrupted(attempt=Protect()):
                self._protect_in_part(space, step)

    def _unmap(self, space: Space, step: Unmap) -> str | None:
        if step.length == 0 or step.address != page_down(step.address):
            return "EINVAL"
        space.put(step.address, page_up(step.address + step.length), [])
        return None

    def _map(self, space: Space, step: Map) -> str | None:
        shared = bool(step.flags & MAP["MAP_SHARED"])
        fixed = step.flags & (_FIXED | MAP["MAP_FIXED_NOREPLACE"])
        start = step.recorded or step.address
        end = page_up(start + step.length)
        if not step.length:  # a segment: what lies above it ends it
            end = min(area.start for area in space.areas if area.start > start)
        if step.flags & MAP["MAP_FIXED_NOREPLACE"] and space.split(start, end)[1]:
            return "EEXIST"
        if not fixed:
            space.claim(step, start, end)
        name = step.source or (SHARED_ANONYMOUS if shared else "")
        space.put(start, end, [Area(start, end, perms_of(step.prot, shared=shared), step.offset, name)])
        return None

    def _protect_in_part(self, space: Space, step: Interrupted) -> None:
        start, end = step.attempt.address, page_up(step.attempt.address + step.attempt.length)
        for area in space.split(start, end)[1]:
            if area.start != start:
                break
            sealed = [seal[0] for seal in step.sealed if seal[0] < area.end and area.start < seal[1]]
            write = "w" not in area.perms and step.attempt.prot & PROT["PROT_WRITE"]
            if write and ("p" if step.errno == "ENOMEM" else "s") in area.perms and step.errno != "EPERM":
                break
            start = min([area.end, *sealed])
            if sealed:
                break
        if start > step.attempt.address:
            self._protect(space, replace(step.attempt, length=start - step.attempt.address))

    def _protect(self, space: Space, step: Protect) -> str | None:
        start, end = step.address, page_up(step.address + step.length)
        if step.prot & PROT["PROT_GROWSDOWN"]:
            start = next(area.start for area in space.areas if area.end > start)
        return space.change(start, end, lambda area: replace(area, perms=perms_of(step.prot, shared=area.is_shared)))

    def _remap(self, space: Space, step: Remap) -> str | None:
        old, old_end = step.address, page_up(step.address + step.length)
        new, new_end = step.recorded, page_up(step.recorded + step.new_length)
        _, inside, _ = space.split(old, max(old_end, old + 1))
        if len(inside) > 1 and step.length == step.new_length and step.flags & MREMAP["MREMAP_FIXED"]:
            for area in inside:  # Linux 6.17 moves each for itself, and leaves the holes
                space.put(area.start, area.end, [])
                space.put(area.start - old + new, area.end - old + new, [moved_to(area, area.start - old + new)])
            return None
        if not inside or inside[0].start != old or any(a.end != b.start for a, b in pairwise(inside)):
            return "EFAULT"
        if new == old:
            if new_end <= old_end:  # of however many areas
                space.put(new_end, old_end, [])
                return None
            space.claim(step, old_end, new_end)
            space.put(old, new_end, [*inside[:-1], resize(inside[-1], new_end)])
            return None
        if not step.flags & MREMAP["MREMAP_FIXED"]:
            space.claim(step, new, new_end)
        moved = [
            replace(a, start=a.start - old + new, end=a.end - old + new)
            for a in inside
            if a.start - old + new < new_end
        ]
        moved[-1] = resize(moved[-1], new_end)
        if not step.flags & MREMAP["MREMAP_DONTUNMAP"]:
            space.put(old, old_end, [])
        space.put(new, new_end, moved)
        return None

    def _advise(self, space: Space, step: Advise) -> str | None:
        start, end = step.address, page_up(step.address + step.length)
        if step.advice in {_DONTFORK, _DOFORK}:
            space.put(start, end, space.split(start, end)[1])
            starts = {area.start for area in space.split(start, end)[1]}
            space.dontfork = space.dontfork | starts if step.advice == _DONTFORK else space.dontfork - starts
        return space.change(start, end, lambda area: area)

    def _set_break(self, space: Space, step: Brk) -> None:
        if space.brk is not None and step.recorded != space.brk:
            before, after = page_up(space.brk), page_up(step.recorded)
            if after > before:
                space.claim(step, before, after)
                space.put(before, after, [Area(before, after, "rw-p", 0, "[heap]")])
            else:
                space.put(after, before, [])
        space.brk = step.recorded


def moved_to(area: Area, start: int) -> Area:
    """The area at another address."""
    return replace(area, start=start, end=start + area.length)


def resize(area: Area, end: int) -> Area:
    """The area with another end."""
    return replace(area, end=end)
