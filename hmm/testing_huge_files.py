"""Random calls about huge pages of files: blocks of files that are mapped, collapsed, and cut.

**Source**: our own.

**Absent**: other calls about files (testing_files.py) and about huge pages (testing_devices.py).
"""

from __future__ import annotations

from hmm import commands_file, commands_process
from hmm.file import File, FileKind
from hmm.madvise import Advice
from hmm.scheduler import Call
from hmm.testing_town import NEAR, Maker, Makers, Town
from hmm.units import PAGE_SIZE, PMD_PAGES, PMD_SIZE, pmd_up
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot, Vma

__all__ = ["FIRST_HUGE_FILES", "HUGE_FILE_CALLS"]

_FILES = (FileKind.FILE, FileKind.SHARED_MEMORY)


def _map(town: Town) -> Call | None:
    """A block, or two, of a file or of new shared memory, mostly where a huge page fits."""
    process, file = town.process(), town.pick(town.machine.file_names.values()) if town.choose(3) else None
    if process is None:
        return None
    first, nblocks = town.choose(town.pages // PMD_PAGES), 1 + town.choose(2)
    length = min(nblocks, town.pages // PMD_PAGES - first) * PMD_SIZE
    flags = MapFlag.FIXED | (MapFlag.PRIVATE if file and town.choose(4) == 0 else MapFlag.SHARED)
    flags |= MapFlag(0) if file else MapFlag.ANONYMOUS
    prot = Prot.READ | Prot.WRITE if town.choose(6) else Prot.READ
    offset = town.choose(3) * PAGE_SIZE if file and town.choose(8) == 0 else 0
    return Call(commands_process.mmap, (process, town.start + first * PMD_SIZE, length, prot, flags, file or 0, offset))


def _mapped(town: Town) -> tuple[int, Vma] | None:
    """A process, and a VMA of it that a huge page of its file could be in."""
    found = [
        (process.id, vma)
        for process in town.machine.processes.values()
        for vma in process.space.vmas
        if isinstance(vma.backing, File) and vma.backing.kind in _FILES and pmd_up(vma.start) + PMD_SIZE <= vma.end
    ]
    return found[town.choose(len(found))] if found else None


def _collapse(town: Town) -> Call | None:
    if (found := _mapped(town)) is None:
        return None
    process, vma = found
    start = pmd_up(vma.start)
    length = PMD_SIZE if town.choose(2) else vma.end - start
    return Call(commands_process.madvise, (process, start, length, Advice.COLLAPSE))


def _touch(town: Town) -> Call | None:
    if (found := _mapped(town)) is None:
        return None
    process, vma = found
    page = vma.start + town.choose(2 * NEAR) * PAGE_SIZE
    if town.choose(2) and vma.writable:
        return Call(commands_process.write_memory, (process, page, bytes([1 + town.choose(255)]) * PAGE_SIZE))
    return Call(commands_process.read_memory, (process, page, PAGE_SIZE))


def _part(town: Town) -> Call | None:
    """Something that concerns a part of a block, or all of it."""
    if (found := _mapped(town)) is None:
        return None
    process, vma = found
    start, length = pmd_up(vma.start), PMD_SIZE
    if town.choose(3):
        start, length = start + town.choose(2 * NEAR) * PAGE_SIZE, (1 + town.choose(3)) * PAGE_SIZE
    advice = (Advice.DONTNEED, Advice.COLD, Advice.PAGEOUT, Advice.REMOVE, Advice.WILLNEED)[town.choose(5)]
    if town.choose(3):
        return Call(commands_process.madvise, (process, start, length, advice))
    return Call(
        commands_process.mprotect, (process, start, length, (Prot.READ, Prot.READ | Prot.WRITE)[town.choose(2)])
    )


def _resize(town: Town) -> Call | None:
    file = town.pick(town.machine.file_names.values())
    if file is None:
        return None
    size = (town.choose(2 * NEAR), PMD_PAGES - NEAR + town.choose(2 * NEAR), 2 * PMD_PAGES)[town.choose(3)] * PAGE_SIZE
    if town.choose(3):
        return Call(commands_file.truncate_file, (file, size + town.choose(2) * 100))
    return Call(commands_file.punch_file, (file, size, (1 + town.choose(2 * NEAR)) * PAGE_SIZE // 2))


HUGE_FILE_CALLS: Makers = ((_map, 12), (_collapse, 40), (_touch, 30), (_part, 16), (_resize, 16))
"""What makes them, and how often."""
FIRST_HUGE_FILES: tuple[Maker, ...] = (_map, _touch, _collapse)
"""What makes the first ones."""
