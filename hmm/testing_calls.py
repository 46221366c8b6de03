"""Random calls of processes, and of mirrors of 2015 on devices without memory.

**Source**: our own.

**Absent**: where they take place (testing_town.py), files (testing_files.py), what goes wrong (testing_failures.py),
devices with memory (testing_devices.py), little memory (testing_swap.py).
"""

from __future__ import annotations

import numpy as np

from hmm import commands_device, commands_process
from hmm.events import EventType
from hmm.madvise import Advice
from hmm.scheduler import Call
from hmm.testing_failures import FAILURES
from hmm.testing_files import FILE_CALLS
from hmm.testing_town import Makers, Town, register_mirror
from hmm.units import PAGE_SIZE, PMD_MASK
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot

__all__ = ["CALLS", "fork_process", "munlock_all"]


def _create(town: Town) -> Call | None:
    if len(town.machine.processes) >= town.processes:
        return None
    options = {"thp": town.thp, "fault_around_pages": (1, 16)[town.choose(2)]}
    return Call(commands_process.create_process, ("simulated",), options)


def fork_process(town: Town) -> Call | None:
    """A child of some process, or a thread of it."""
    process = town.process()
    if process is None or len(town.machine.processes) >= town.processes:
        return None
    share = town.choose(4) == 0
    if share:
        return Call((commands_process.clone_thread, commands_process.vfork)[town.choose(2)], (process,))
    return Call(commands_process.fork, (process,))


def _exit(town: Town) -> Call | None:
    process = town.process()
    return None if process is None or town.choose(4) else Call(commands_process.exit_process, (process,))


def _mrelease(town: Town) -> Call | None:
    process = town.process()
    return None if process is None or town.choose(4) else Call(commands_process.process_mrelease, (process,))


def _mmap(town: Town) -> Call | None:
    process, span = town.process(), town.span(16)
    if process is None:
        return None
    shared = MapFlag.SHARED if town.choose(3) == 0 else MapFlag.PRIVATE
    file = town.pick(town.machine.file_names.values()) if town.choose(2) == 0 else None
    flags = shared | MapFlag.FIXED | (MapFlag(0) if file else MapFlag.ANONYMOUS)
    if town.choose(5) == 0:
        flags |= MapFlag.POPULATE
    prot = (Prot.READ | Prot.WRITE, Prot.READ | Prot.WRITE, Prot.READ, Prot.NONE)[town.choose(4)]
    offset = town.choose(4) * PAGE_SIZE if file else 0
    return Call(commands_process.mmap, (process, span.start, span.size_bytes, prot, flags, file or 0, offset))


def _munmap(town: Town) -> Call | None:
    process, span = town.process(), town.span()
    return None if process is None else Call(commands_process.munmap, (process, span.start, span.size_bytes))


def _mprotect(town: Town) -> Call | None:
    process, span = town.process(), town.span()
    prot = (Prot.READ | Prot.WRITE, Prot.READ, Prot.NONE)[town.choose(3)]
    return None if process is None else Call(commands_process.mprotect, (process, span.start, span.size_bytes, prot))


def _mremap(town: Town) -> Call | None:
    process, old, new = town.process(), town.span(), town.span()
    if process is None:
        return None
    if town.choose(2):
        old = town.mapped(town.machine.processes[process].space)
    flags = (0, 1, 3, 3, 7)[town.choose(5)]  # none, MAYMOVE, MAYMOVE|FIXED twice, with DONTUNMAP
    length = old.size_bytes if flags == 7 else new.size_bytes
    target = new.start if flags > 1 else 0
    return Call(commands_process.mremap, (process, old.start, old.size_bytes, length, flags, target))


def _madvise(town: Town) -> Call | None:
    process, span = town.process(), town.span()
    advice = [Advice.DONTNEED, Advice.DONTNEED, Advice.FREE, Advice.FREE, Advice.REMOVE, Advice.DONTFORK]
    advice += [Advice.WIPEONFORK, Advice.POPULATE_READ, Advice.POPULATE_WRITE]
    advice += [Advice.HUGEPAGE, Advice.NOHUGEPAGE, Advice.COLLAPSE, Advice.COLLAPSE] if town.thp else []
    chosen = advice[town.choose(len(advice))]
    return None if process is None else Call(commands_process.madvise, (process, span.start, span.size_bytes, chosen))


def _write(town: Town) -> Call | None:
    process, span = town.process(), town.span()
    inset = 0 if town.choose(4) else 50
    data = bytes([1 + town.choose(255)]) * (span.size_bytes - 2 * inset)
    return None if process is None else Call(commands_process.write_memory, (process, span.start + inset, data))


def _write_private(town: Town) -> Call | None:
    process = town.process()
    if process is None:
        return None
    span = town.mapped(town.machine.processes[process].space, private=True)
    data = bytes([1 + town.choose(255)]) * span.size_bytes
    return Call(commands_process.write_memory, (process, span.start, data))


def _write_shared(town: Town) -> Call | None:
    process = town.process()
    if process is None:
        return None
    vmas = [vma for vma in town.machine.processes[process].space.vmas if vma.shared and vma.writable]
    if not vmas:
        return None
    vma = vmas[town.choose(len(vmas))]
    npages = min(1 + town.choose(3), vma.npages)
    return Call(
        commands_process.write_memory, (process, vma.start, bytes([1 + town.choose(255)]) * (npages * PAGE_SIZE))
    )


def _write_each(town: Town) -> Call | None:
    process, span = town.process(), town.span()
    values = bytes([1 + town.choose(255)]) * span.npages
    return None if process is None else Call(commands_process.write_pages, (process, span, 8, values))


def _read_each(town: Town) -> Call | None:
    process, span = town.process(), town.span()
    return None if process is None else Call(commands_process.read_pages, (process, span, 8))


def _read(town: Town) -> Call | None:
    process, span = town.process(), town.span()
    return None if process is None else Call(commands_process.read_memory, (process, span.start, span.size_bytes))


def _exec(town: Town) -> Call | None:
    process = town.process()
    return None if process is None or town.choose(4) else Call(commands_process.exec_process, (process, "other"))


def _mlock(town: Town) -> Call | None:
    process, span = town.process(), town.span()
    if process is None:
        return None
    return Call(commands_process.mlock, (process, span.start, span.size_bytes, town.choose(2)))


def _munlock(town: Town) -> Call | None:
    process, span = town.process(), town.span(12)
    return None if process is None else Call(commands_process.munlock, (process, span.start, span.size_bytes))


def _mlockall(town: Town) -> Call | None:
    process, flags = town.process(), 1 + town.choose(7)  # MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT
    return None if process is None or town.choose(4) else Call(commands_process.mlockall, (process, flags))


def munlock_all(town: Town) -> Call | None:
    """Nothing of some process is locked any more."""
    process = town.process()
    return None if process is None else Call(commands_process.munlockall, (process,))


def _brk(town: Town) -> Call | None:
    process = town.process()
    if process is None:
        return None
    space = town.machine.processes[process].space
    return Call(commands_process.brk, (process, space.brk_start + town.choose(4) * PAGE_SIZE))


def _clear_refs(town: Town) -> Call | None:
    process, what = town.process(), 1 + town.choose(4)
    return None if process is None else Call(commands_process.clear_refs, (process, what))


def _look(town: Town) -> Call | None:
    process, span = town.process(), town.span()
    if process is None:
        return None
    if town.choose(2):
        return Call(commands_process.pagemap, (process, span))
    return Call(commands_process.mincore, (process, span.start, span.size_bytes))


def _register_device(town: Town) -> Call | None:
    if len(town.machine.devices) >= town.devices:
        return None
    return Call(commands_device.register_device, ("simulated",), {"dma": town.choose(2) == 0})


def _register_mirror(town: Town) -> Call | None:
    device, process = town.pick(town.machine.devices), town.process()
    if device is None or process is None:
        return None
    space = town.machine.processes[process].space
    mirrored = [mirror.device.id for mirror in town.machine.mirrors.values() if mirror.space is space]
    if device in mirrored and town.choose(4):
        return None
    return register_mirror(town, device, process)


def _unregister_mirror(town: Town) -> Call | None:
    mirror = town.mirror()
    return None if mirror is None or town.choose(3) else Call(commands_device.unregister_mirror, (mirror,))


def _fault(town: Town) -> Call | None:
    mirror = town.mirror()
    if mirror is None:
        return None
    span = town.mapped(town.machine.mirrors[mirror].space)
    if not town.choose(12):
        etype = (EventType.DEVICE_RFAULT, EventType.DEVICE_WFAULT, EventType.COPY_TO_DEVICE)[town.choose(3)]
        return Call(commands_device.mirror_fault, (mirror, span, etype))
    options = {"write": town.choose(2) == 0, "whole": town.choose(2) == 0, "wait": town.choose(4) != 0}
    if town.choose(3):
        return Call(commands_device.fault, (mirror, (span,)), options)
    span, step = town.span(), (1 + town.choose(3)) * PAGE_SIZE
    first = town.start if not town.thp else span.start & PMD_MASK
    return Call(commands_device.fault, (mirror, np.arange(first, span.end, step, dtype=np.uint64)), options)


def _reached(town: Town, mirror: int) -> int:
    known, _ = town.machine.mirrors[mirror].table.in_use()
    return int(known[town.choose(known.size)]) if known.size else town.span().start


def _device_write(town: Town) -> Call | None:
    mirror = town.mirror()
    if mirror is None:
        return None
    address, byte = _reached(town, mirror), bytes([1 + town.choose(255)])
    segment = (address + 32, 64) if town.choose(2) else (address, PAGE_SIZE)
    return Call(commands_device.device_write, (mirror, (segment,), byte * segment[1]))


def _device_read(town: Town) -> Call | None:
    mirror = town.mirror()
    if mirror is None:
        return None
    return Call(commands_device.device_read, (mirror, ((_reached(town, mirror), PAGE_SIZE),)))


def _bits(town: Town) -> Call | None:
    mirror, span = town.mirror(), town.span()
    if mirror is None:
        return None
    if town.choose(2):
        return Call(commands_device.read_table, (mirror, span))
    return Call(commands_device.set_driver_bits, (mirror, span, town.choose(16)))


def _dirty(town: Town) -> Call | None:
    mirror, span = town.mirror(), town.span()
    return None if mirror is None else Call(commands_device.dirty_range, (mirror, span))


def _discard(town: Town) -> Call | None:
    mirror, span = town.mirror(), town.span()
    return None if mirror is None or town.choose(3) else Call(commands_device.discard_range, (mirror, span))


def _pin(town: Town) -> Call | None:
    process = town.process()
    if process is None or len(town.machine.pins) > town.processes:
        return None
    span = town.mapped(town.machine.processes[process].space, 3)
    options = {"write": town.choose(2) == 0, "long_term": town.choose(2) == 0}
    return Call(commands_process.pin, (process, span), options)


def _unpin(town: Town) -> Call | None:
    number = town.pick(town.machine.pins)
    return None if number is None else Call(commands_process.unpin, (number,))


CALLS: Makers = (
    (_create, 3), (fork_process, 6), (_exit, 2), (_exec, 2), (_mrelease, 2), (_mmap, 10), (_munmap, 4), (_mprotect, 6),
    (_mremap, 4), (_madvise, 6), (_write, 6), (_write_private, 8), (_write_shared, 6), (_read, 8), (_write_each, 2),
    (_read_each, 2), (_mlock, 2), (_munlock, 2), (_mlockall, 1), (munlock_all, 1), (_brk, 1), (_clear_refs, 2),
    (_look, 2), (_pin, 3), (_unpin, 3), (_register_device, 2), (_register_mirror, 8), (_unregister_mirror, 2),
    (_fault, 22), (_device_write, 8), (_device_read, 4), (_bits, 2), (_dirty, 2), (_discard, 2), *FILE_CALLS, *FAILURES,
)  # fmt: skip
"""What makes them, and how often."""
