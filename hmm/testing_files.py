"""Random calls about files: their bytes, what processes map of them, and what drivers map of their own.

**Source**: our own.

**Absent**: what else processes do (testing_calls.py).
"""

from __future__ import annotations

from hmm import commands_file, commands_process
from hmm.file import File, FileKind
from hmm.scheduler import Call
from hmm.testing_town import Makers, Town
from hmm.units import PAGE_SIZE, AddressRange
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot, Vma, VmFlag

__all__ = ["FILE_CALLS", "write_file"]

_DEVICE_FLAGS = (VmFlag.MIXEDMAP, VmFlag.MIXEDMAP, VmFlag.IO | VmFlag.PFNMAP)
"""What a driver's mmap adds: pages of its own, or registers."""
_DEVICE_FILES = 2


def _open(town: Town) -> Call | None:
    return Call(commands_file.open_file, (f"file{town.choose(2)}",), {"create": True})


def write_file(town: Town) -> Call | None:
    """Some bytes of a file."""
    file = town.pick(town.machine.file_names.values())
    offset, data = town.choose(8) * PAGE_SIZE // 2, bytes([1 + town.choose(255)]) * (1 + town.choose(4 * PAGE_SIZE))
    return None if file is None else Call(commands_file.write_file, (file, offset, data))


def _read_file(town: Town) -> Call | None:
    file = town.pick(town.machine.file_names.values())
    return None if file is None else Call(commands_file.read_file, (file, town.choose(PAGE_SIZE), 8 * PAGE_SIZE))


def _truncate(town: Town) -> Call | None:
    file = town.pick(town.machine.file_names.values())
    return None if file is None else Call(commands_file.truncate_file, (file, town.choose(12) * PAGE_SIZE // 2))


def _close(town: Town) -> Call | None:
    file = town.pick(town.machine.file_names.values())
    return None if file is None or town.choose(2) else Call(commands_file.close_file, (file,))


def _unlink(town: Town) -> Call | None:
    names = list(town.machine.file_names)
    return None if not names or town.choose(2) else Call(commands_file.unlink_file, (names[town.choose(len(names))],))


def _punch(town: Town) -> Call | None:
    file = town.pick(town.machine.file_names.values())
    offset = town.choose(6) * PAGE_SIZE
    return None if file is None else Call(commands_file.punch_file, (file, offset, (1 + town.choose(3)) * PAGE_SIZE))


def _msync(town: Town) -> Call | None:
    process = town.process()
    if process is None:
        return None
    vmas = [vma for vma in town.machine.processes[process].space.vmas if vma.backing is not None and vma.shared]
    span = vmas[town.choose(len(vmas))].span if vmas and town.choose(4) else town.span()
    return Call(commands_process.msync, (process, span.start, span.size_bytes, 4))


def _map_file(town: Town) -> Call | None:
    process, span = town.process(), town.span(8)
    file = town.pick(town.machine.file_names.values())
    if process is None or file is None:
        return None
    flags = MapFlag.FIXED | (MapFlag.PRIVATE if town.choose(3) == 0 else MapFlag.SHARED)
    place = (process, span.start, span.size_bytes)
    return Call(commands_process.mmap, (*place, Prot.READ | Prot.WRITE, flags, file, town.choose(3) * PAGE_SIZE))


def _mapped(town: Town, process: int, kind: FileKind) -> Vma | None:
    vmas = [
        vma
        for vma in town.machine.processes[process].space.vmas
        if vma.shared and isinstance(vma.backing, File) and vma.backing.kind is kind
    ]
    return vmas[town.choose(len(vmas))] if vmas else None


def _dirty_file(town: Town) -> Call | None:
    process = town.process()
    vma = None if process is None else _mapped(town, process, FileKind.FILE)
    if vma is None:
        return None
    data = bytes([1 + town.choose(255)]) * (min(1 + town.choose(3), vma.npages) * PAGE_SIZE)
    return Call(commands_process.write_memory, (process, vma.start, data))


def _sync_file(town: Town) -> Call | None:
    process = town.process()
    vma = None if process is None else _mapped(town, process, FileKind.FILE)
    return None if vma is None else Call(commands_process.msync, (process, vma.start, vma.span.size_bytes, 4))


def _open_device(town: Town) -> Call | None:
    if len(_device_files(town)) >= _DEVICE_FILES:
        return None
    return Call(commands_file.open_device_file, ("card", _DEVICE_FLAGS[town.choose(len(_DEVICE_FLAGS))]))


def _device_files(town: Town) -> list[int]:
    return [file.id for file in town.machine.files.values() if file.kind is FileKind.DEVICE]


def _map_device(town: Town) -> Call | None:
    process, span, file = town.process(), town.span(4), town.pick(_device_files(town))
    if process is None or file is None:
        return None
    if town.thp:
        span = AddressRange(span.start, min(span.end, span.start + 4 * PAGE_SIZE))
    flags = MapFlag.FIXED | (MapFlag.PRIVATE if town.choose(3) == 0 else MapFlag.SHARED)
    prot = (Prot.READ | Prot.WRITE, Prot.READ)[town.choose(2)]
    return Call(commands_process.mmap, (process, span.start, span.size_bytes, prot, flags, file, 0))


FILE_CALLS: Makers = (
    (_open, 4), (write_file, 8), (_read_file, 2), (_close, 1), (_unlink, 1), (_truncate, 2), (_punch, 2), (_msync, 2),
    (_map_file, 5), (_dirty_file, 6), (_sync_file, 6), (_open_device, 1), (_map_device, 2),
)  # fmt: skip
"""What makes them, and how often."""
