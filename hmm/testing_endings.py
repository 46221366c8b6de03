"""The end of a seeded run: everything that it made is ended, in any order, and nothing may be left.

**Source**: our own.

**Invariants**: when there is nobody any more, every frame and slot is free again, but for frames whose memory failed;
DMA addresses are when their device has no mirror any more (`Machine.check`).

**Absent**: ends in the middle of a run, which are calls like others (testing_calls.py).
"""

from __future__ import annotations

from collections.abc import Iterator

from hmm import (
    commands_device,
    commands_file,
    commands_hmm,
    commands_migrate,
    commands_process,
    commands_userfaultfd,
)
from hmm.file import FileKind
from hmm.interval_notifier import IntervalMirror
from hmm.machine import Machine
from hmm.scheduler import Call
from hmm.testing_town import Town

__all__ = ["LeakError", "check_nothing_is_left", "endings"]

_MOST = 400
"""Calls that are enough to end everything: some fail as long as others are under way."""


class LeakError(AssertionError):
    """Something is left when everything has ended."""


def endings(town: Town) -> Iterator[Call]:
    """Calls that end what there is, until there is nothing; those that fail are made again.

    Raises:
        LeakError: something does not end.
    """
    for _ in range(_MOST):
        calls = list(_ends(town.machine))
        if not calls:
            return
        yield calls[town.choose(len(calls))]
    raise LeakError(f"{_MOST} calls do not end {list(_ends(town.machine))}")


def _ends(machine: Machine) -> Iterator[Call]:
    for process in machine.processes:
        yield Call(commands_process.exit_process, (process,))
    for mirror_id, receiver in machine.receivers.items():
        is_of_today = isinstance(receiver, IntervalMirror)
        yield Call(commands_hmm.detach if is_of_today else commands_device.unregister_mirror, (mirror_id,))
    for number, migration in machine.migrations.items():
        if migration.is_idle:
            yield Call(commands_migrate.migrate_vma_finalize, (number,), {"abort": True})
    for number in machine.pins:
        yield Call(commands_process.unpin, (number,))
    for number in machine.userfaultfds:
        yield Call(commands_userfaultfd.close_userfaultfd, (number,))
    for name in machine.file_names:
        yield Call(commands_file.unlink_file, (name,))
    for file in machine.files.values():
        if file.opens > (machine.file_names.get(file.name) == file.id):
            yield Call(commands_file.close_file, (file.id,))
    for device in machine.devices.values():
        if all(receiver.device is not device for receiver in machine.receivers.values()):
            yield Call(commands_device.unregister_device, (device.id,))


def check_nothing_is_left(machine: Machine, used_frames: int) -> None:
    """Raise LeakError when a machine in which everything was ended is not as it was made.

    Args:
        used_frames: of the system's, when it was made.
    """
    commands_file.forget_unused(machine)
    frames, swap = machine.frames, machine.frames.swap
    left = {
        "operations": len(machine.operations),
        "address spaces": len(machine.spaces),
        "devices": len(machine.devices),
        "files": sum(file.kind is not FileKind.DEVICE or file.opens > 0 for file in machine.files.values()),
        "regions of device memory": len(frames.regions) - 1,
        "frames": frames.regions[0].used - used_frames - frames.poisoned,
        "swap slots": 0 if swap is None else swap.used,
    }
    if any(left.values()):
        raise LeakError(f"when all had ended there were {', '.join(f'{n} {what}' for what, n in left.items() if n)}")
