"""`/proc/PID/maps`: its lines, and what of them one compares.

The kernel decides by anonymous-page bookkeeping whether neighbours share a line, and names the same memory in
several ways.  `canonical` takes both out: neighbours with equal permissions and equal source (and, for files,
contiguous offsets) become one line; ` (deleted)` is dropped; names in brackets ([heap], [stack], [vdso],
[anon:...]) are anonymous memory; shared anonymous memory is /dev/zero whatever its name ([anon_shmem:...]); and
[vsyscall], which no process maps, is left out.  A file that was renamed after it was mapped has its last name.

Source: Linux fs/proc/task_mmu.c, show_map_vma().
Invariants: areas are ascending and disjoint; a canonical list holds no two neighbours that could be one.
Absent: /proc/PID/smaps.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hmm.units import PAGE_SIZE
from hmm_client.recordings.errors import RecordingError
from hmm_client.recordings.flags import PROT

_LINE = re.compile(
    r"([0-9a-f]+)-([0-9a-f]+) ([r-][w-][x-][sp]) ([0-9a-f]+) ([0-9a-f]+:[0-9a-f]+) (\d+)\s*(.*)$", re.DOTALL
)
_NAME_COLUMN = 73
_DELETED = " (deleted)"
SHARED_ANONYMOUS = "/dev/zero"
"""What shared anonymous memory is called in maps."""
VSYSCALL = "[vsyscall]"
STACK = "[stack]"
VDSO = "[vdso]"


@dataclass(frozen=True, slots=True)
class Area:
    """One line of maps.

    Attributes:
        start: first byte address, page-aligned.
        end: byte address behind the last, page-aligned.
        perms: four letters, `rw-p`.
        offset: byte offset in the source; 0 for private anonymous memory.
        name: the last column, escaped newlines undone; empty for unnamed memory.
        device: major and minor number, `fe:00`.
        inode: number of the file's inode; 0 without file.
    """

    start: int
    end: int
    perms: str
    offset: int = 0
    name: str = ""
    device: str = "00:00"
    inode: int = 0

    @property
    def length(self) -> int:
        """Size in bytes."""
        return self.end - self.start

    @property
    def prot(self) -> int:
        """PROT_READ, PROT_WRITE and PROT_EXEC as in `perms`."""
        bits = (PROT["PROT_READ"], PROT["PROT_WRITE"], PROT["PROT_EXEC"])
        return sum(bit for bit, letter in zip(bits, self.perms, strict=False) if letter != "-")

    @property
    def is_shared(self) -> bool:
        """True for MAP_SHARED."""
        return self.perms[3] == "s"

    @property
    def grows_down(self) -> bool:
        """True for the stack of the first thread, which faults below it extend."""
        return self.name == STACK

    @property
    def source(self) -> str | None:
        """What is mapped: a name without ` (deleted)`; None for private anonymous memory."""
        name = self.name.removesuffix(_DELETED)
        if not name or name.startswith("["):
            return SHARED_ANONYMOUS if self.is_shared else None
        return name

    def __str__(self) -> str:
        columns = f"{self.start:08x}-{self.end:08x} {self.perms} {self.offset:08x} {self.device} {self.inode}"
        name = self.name.replace("\n", "\\012")
        return f"{columns.ljust(_NAME_COLUMN)}{name}" if name else f"{columns} "


@dataclass(frozen=True, slots=True)
class Difference:
    """One place where two layouts disagree; one side may have nothing there."""

    expected: Area | None
    actual: Area | None

    def __str__(self) -> str:
        if self.actual is None:
            return f"missing    {self.expected}".rstrip()
        if self.expected is None:
            return f"unexpected {self.actual}".rstrip()
        return f"expected   {self.expected}".rstrip() + f"\n     found {self.actual}".rstrip()


def read_maps(path: Path) -> tuple[Area, ...]:
    """Read a copy of /proc/PID/maps.

    Raises:
        RecordingError: unreadable, empty, or not in this format.
    """
    try:
        text = path.read_bytes().decode("utf-8", "backslashreplace")
    except OSError as error:
        raise RecordingError(error.strerror or str(error), path) from error
    areas = parse_maps(text, path)
    if not areas:
        raise RecordingError("no memory is mapped: was it read after the process had ended?", path)
    return areas


def parse_maps(text: str, path: Path | None = None) -> tuple[Area, ...]:
    """Read the text of /proc/PID/maps; `path` serves for messages.

    Raises:
        RecordingError: a line in another format, unaligned, or out of order.
    """
    areas: list[Area] = []
    end = 0
    lines = text.split("\n")
    if all(line.endswith("\r") for line in lines if line):  # it came through a system that ends lines so
        lines = [line.removesuffix("\r") for line in lines]
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        area = _parse_line(line)
        if area is None or not end <= area.start < area.end or (area.start | area.end) % PAGE_SIZE:
            raise RecordingError(f"not a line of /proc/PID/maps: {line[:80]!r}", path, number)
        end = area.end
        areas.append(area)
    return tuple(areas)


def _parse_line(line: str) -> Area | None:
    found = _LINE.match(line)
    if found is None:
        return None
    start, end, perms, offset, device, inode, name = found.groups()
    # The kernel escapes the newline alone: a backslash stands for itself.
    name = name.replace("\\012", "\n")
    return Area(int(start, 16), int(end, 16), perms, int(offset, 16), name, device, int(inode))


def canonical(areas: Iterable[Area]) -> tuple[Area, ...]:
    """The areas in the form in which two layouts are compared.

    Args:
        areas: ascending.

    Returns: merged areas; their names are their sources, their devices and inodes are gone.

    Cost: O(areas).
    """
    merged: list[Area] = []
    for area in areas:
        if area.name == VSYSCALL:
            continue
        source = area.source
        # What maps shows as "\\012" may be a newline, or just that: a backslash is not escaped.
        name = (source or "").replace("\n", "\\012")
        plain = Area(area.start, area.end, area.perms, area.offset if source else 0, name)
        if merged and _continues(merged[-1], plain):
            merged[-1] = replace(merged[-1], end=plain.end)
        else:
            merged.append(plain)
    return tuple(merged)


def _continues(left: Area, right: Area) -> bool:
    return (
        left.end == right.start
        and left.perms == right.perms
        and left.name == right.name
        and (not left.name or left.offset + left.length == right.offset)
    )


def compare(expected: Iterable[Area], actual: Iterable[Area]) -> list[Difference]:
    """Where two layouts differ after canonical merging; empty when they are the same.

    Lines that begin at the same address and differ are one difference.

    Args:
        expected: the kernel's, with the names that files have at the end.
        actual: with the names that files had when they were mapped.

    Cost: O(areas log areas).
    """
    last = tuple(expected)
    wanted = {area.start: area for area in canonical(last)}
    found = {area.start: area for area in canonical(_renamed(last, tuple(actual)))}
    return [
        Difference(wanted.get(start), found.get(start))
        for start in sorted(wanted.keys() | found.keys())
        if wanted.get(start) != found.get(start)
    ]


def _renamed(last: Sequence[Area], areas: Sequence[Area]) -> list[Area]:
    """The areas with the names that their files have in `last`.

    Of a rename no memory call tells.  Where the same bytes lie at the same place under another name, the file was
    renamed if its old name is gone, or only deleted files have it, or its new one is new, and all of the file has the
    new one.
    """
    starts = [area.start for area in last]
    old, new = {area.source for area in areas}, {area.source for area in last if not area.name.endswith(_DELETED)}
    names: dict[tuple[str, int], set[str]] = {}
    for area in last:
        names.setdefault((area.device, area.inode), set()).add(area.source or "")
    found = []
    for area in areas:
        index = bisect_right(starts, area.start) - 1
        other = last[index] if index >= 0 else area
        same_bytes = area.start < other.end and area.offset - area.start == other.offset - other.start
        alone = other.inode and len(names[other.device, other.inode]) == 1
        if area.source and same_bytes and alone and (area.source not in new or other.source not in old):
            area = replace(area, name=other.name)  # noqa: PLW2901
        found.append(area)
    return found


def render(areas: Sequence[Area]) -> str:
    """The areas as the text of /proc/PID/maps, one line each."""
    return "".join(f"{area}\n" for area in areas)
