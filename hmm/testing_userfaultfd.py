"""Random calls of processes whose missing pages somebody else brings in, and of the handlers that do.

**Source**: our own.

**Invariants**: those of the machine; who waits for a handler keeps nobody else waiting (`Machine.check`).

**Absent**: what devices use (testing_drivers.py).
"""

from __future__ import annotations

from typing import Any

from hmm import commands_process, commands_userfaultfd, testing_devices
from hmm.address_space import Thp
from hmm.madvise import Advice
from hmm.operation import Await
from hmm.operation_record import OperationRecord
from hmm.scheduler import Call, Scheduler
from hmm.testing import simulate
from hmm.testing_town import Makers, Town
from hmm.uffdio import RegisterMode
from hmm.units import PAGE_SIZE, AddressRange
from hmm.userfaultfd import UserfaultFeature

__all__ = ["handle", "simulate_userfaultfds"]

_USERFAULTFDS = 3
_MODES = (RegisterMode.MISSING, RegisterMode.MINOR, RegisterMode.MISSING | RegisterMode.MINOR)
_POPULATE = (Advice.POPULATE_READ, Advice.POPULATE_WRITE)


def _living(town: Town) -> list[int]:
    return [number for number, space in town.machine.userfaultfds.items() if space.users]


def _pick(town: Town) -> int | None:
    """A userfaultfd, mostly one of a process that lives."""
    return town.pick(_living(town) if town.choose(8) else town.machine.userfaultfds)


def _create(town: Town) -> Call | None:
    process = town.process()
    if process is None or len(_living(town)) >= _USERFAULTFDS:
        return None
    features = UserfaultFeature.SIGBUS if town.choose(8) == 0 else 0
    return Call(commands_userfaultfd.create_userfaultfd, (process, int(features)))


def _close(town: Town) -> Call | None:
    number = _pick(town)
    return None if number is None or town.choose(4) else Call(commands_userfaultfd.close_userfaultfd, (number,))


def _register(town: Town) -> Call | None:
    number, span = _pick(town), town.span(12)
    if number is None:
        return None
    files = [vma for vma in town.machine.userfaultfds[number].vmas if vma.backing is not None]
    mode = RegisterMode.MISSING
    if files and town.choose(2):
        mode = _MODES[town.choose(len(_MODES))]
        span = files[town.choose(len(files))].span
    return Call(commands_userfaultfd.uffd_register, (number, span, int(mode)))


def _unregister(town: Town) -> Call | None:
    number, span = _pick(town), town.span()
    return None if number is None else Call(commands_userfaultfd.uffd_unregister, (number, span))


def _registered(town: Town, number: int) -> AddressRange:
    """Some pages of one registered VMA; anything where there is none."""
    vmas = [vma for vma in town.machine.userfaultfds[number].vmas if vma.mapping.userfaultfd == number]
    if not vmas or town.choose(8) == 0:
        return town.span(8)
    vma = vmas[town.choose(len(vmas))]
    first = vma.start + town.choose(min(vma.npages, town.pages)) * PAGE_SIZE
    return AddressRange(first, min(vma.end, first + (1 + town.choose(8)) * PAGE_SIZE))


def _fill(town: Town) -> Call | None:
    number = _pick(town)
    return None if number is None else _bring(town, number, _registered(town, number))


def _access(town: Town) -> Call | None:
    number = _pick(town)
    space = None if number is None else town.machine.userfaultfds[number]
    process = town.pick(process.id for process in town.machine.processes.values() if process.space is space)
    if number is None or process is None:
        return None
    span = _registered(town, number)
    if town.choose(2):
        return Call(commands_process.read_memory, (process, span.start, span.size_bytes))
    return Call(commands_process.write_memory, (process, span.start, bytes([1 + town.choose(255)]) * span.size_bytes))


def _bring(town: Town, number: int, span: AddressRange) -> Call:
    mode = int(town.choose(8) == 0)
    match town.choose(6):
        case 0 | 1:
            return Call(commands_userfaultfd.uffd_zeropage, (number, span, mode))
        case 2:
            return Call(commands_userfaultfd.uffd_continue, (number, span, mode))
    data = bytes([1 + town.choose(255)]) * span.size_bytes
    return Call(commands_userfaultfd.uffd_copy, (number, span.start, data, mode))


def _read(town: Town) -> Call | None:
    number = _pick(town)
    return None if number is None else Call(commands_userfaultfd.read_userfaults, (number, 1 + town.choose(3)))


def _discard(town: Town) -> Call | None:
    process, span = town.process(), town.span()
    args = (process, span.start, span.size_bytes, Advice.DONTNEED)
    return None if process is None else Call(commands_process.madvise, args)


def _populate(town: Town) -> Call | None:
    process, span = town.process(), town.span()
    args = (process, span.start, span.size_bytes, _POPULATE[town.choose(2)])
    return None if process is None else Call(commands_process.madvise, args)


USERFAULTFD_CALLS: Makers = (
    (_create, 8), (_close, 2), (_register, 24), (_unregister, 4), (_fill, 16), (_access, 32), (_read, 4),
    (_discard, 12), (_populate, 8),
)  # fmt: skip
"""What makes calls of handlers, and makes pages missing, and how often."""


def handle(town: Town, record: OperationRecord[Any]) -> Call:
    """What a handler does about an operation that waits for it: mostly what it should, at times less or more."""
    request = record.request
    assert isinstance(request, Await)
    number, page = request.userfaultfd, request.spans[0]
    match town.choose(12):
        case 0:
            return Call(commands_userfaultfd.uffd_wake, (number, page))
        case 1:
            return Call(commands_userfaultfd.uffd_unregister, (number, page))
        case 2:
            return Call(commands_userfaultfd.close_userfaultfd, (number,))
    fault = town.machine.userfaultfds[number].userfaultfds[number].faults[request.ticket]
    span = AddressRange(page.start, page.end + town.choose(3) * PAGE_SIZE)
    if fault.minor and town.choose(4):
        return Call(commands_userfaultfd.uffd_continue, (number, span, 0))
    return _bring(town, number, span)


def simulate_userfaultfds(seed: int, *, ncalls: int = 80) -> Scheduler:
    """As `testing_devices.simulate_devices`, with userfaultfds; on every fourth seed with huge pages.

    Raises: as `simulate`.
    """
    thp = Thp.NEVER if seed % 4 else Thp.ALWAYS
    limits = testing_devices.LARGE_WITH_DEVICES if thp else testing_devices.SMALL_WITH_DEVICES
    more = testing_devices.DEVICE_CALLS + USERFAULTFD_CALLS
    return simulate(seed, ncalls=ncalls, limits=limits, more=more, first=(_create, _register), thp=thp, handling=handle)
