"""The list of inputs is the whole truth: replaying it gives the live state again.

A machine made with `recording=True` writes every input down (`Machine.inputs`).  `replay` feeds such a list to a
fresh machine; `digest` says whether two machines are in the same state.

**Source**: our own.

**Invariants**: `digest(replay(machine.inputs, machine.limits)) == digest(machine)` after every input.

**Absent**: files and formats; a journal on disk is somebody else's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.errors import HmmError
from hmm.frames import Frames
from hmm.interval_notifier import IntervalMirror
from hmm.limits import Limits
from hmm.machine import Machine
from hmm.mirror import Mirror
from hmm.operation_record import Input
from hmm.receiver import Receiver
from hmm.semantics import LINUX_6_12, Semantics
from hmm.swap import area_of, slots_of
from hmm.units import Entries


def replay(
    inputs: Sequence[Input], limits: Limits, semantics: Semantics = LINUX_6_12, *, capable: bool = False
) -> Machine:
    """A machine that got the same inputs.  Errors that an input caused then are caused again, and are no news."""
    machine = Machine(limits, semantics=semantics, capable=capable)
    for entry in inputs:
        try:
            getattr(machine, entry.method)(*entry.arguments, **dict(entry.keywords))
        except HmmError:
            continue
        finally:
            machine.take_outbox()
    return machine


def digest(machine: Machine) -> str:
    """A hash over everything that calls can see: maps, entries, contents, mirrors, waiting operations.

    Cost: O(everything mapped), contents included.
    """
    state = hashlib.sha256()
    for process in machine.processes.values():
        state.update(repr((process.id, process.name, process.parent, process.space.id)).encode())
    for space in machine.spaces.values():
        _add_space(state, space)
    for file in machine.files.values():
        _, entries = file.pages.in_use()
        state.update(repr((file.id, file.name, file.size_bytes)).encode())
        held = cpu_pte.cpu_pfn(entries[cpu_pte.is_present(entries)])
        state.update(machine.frames.gather(held).tobytes())
        _add_swapped(state, machine.frames, entries)
    for receiver in machine.receivers.values():
        _add_receiver(state, receiver)
    for number, pin in machine.pins.items():
        state.update(repr((number, pin.space_id, pin.span, pin.pfns.tolist())).encode())
    for record in machine.operations.values():
        deliveries = record.dispatch.deliveries() if record.dispatch else ()
        sent = [(sent.mirror_id, sent.sequence, sent.state) for sent in deliveries]
        state.update(repr((record.id, record.name, record.request, sent)).encode())
    return state.hexdigest()


def _add_space(state: hashlib._Hash, space: AddressSpace) -> None:
    state.update(repr((space.id, space.users, space.brk_end, space.notifier.sequence, sorted(space.tables))).encode())
    for vma in space.vmas:
        state.update(repr((vma.start, vma.end, vma.perms, vma.name, vma.offset_bytes, vma.anon_vma)).encode())
        if vma.mapping.userfaultfd:
            state.update(repr(vma.mapping.userfaultfd).encode())
    for userfaultfd in space.userfaultfds.values():
        faults = [(fault.ticket, fault.address, fault.told) for fault in userfaultfd.faults.values()]
        state.update(repr((userfaultfd.id, faults)).encode())
    addresses, entries = space.table.in_use()
    state.update(addresses.tobytes() + entries.tobytes())
    held = entries[cpu_pte.holds_frame(entries)]
    state.update(space.frames.gather(cpu_pte.cpu_pfn(held)).tobytes())
    _add_swapped(state, space.frames, entries)


def _add_swapped(state: hashlib._Hash, frames: Frames, entries: Entries) -> None:
    slots = slots_of(entries)
    if slots.size:
        state.update(area_of(frames).gather(slots).tobytes())


def _add_receiver(state: hashlib._Hash, receiver: Receiver) -> None:
    state.update(repr((receiver.id, receiver.state.value, receiver.sequence, receiver.low_water)).encode())
    if isinstance(receiver, Mirror):
        _add_table(state, receiver)
    if isinstance(receiver, IntervalMirror):
        for notifier in receiver.notifiers.values():
            state.update(repr((notifier.id, notifier.span, notifier.sequence, notifier.deferred)).encode())


def _add_table(state: hashlib._Hash, mirror: Mirror) -> None:
    addresses, entries = mirror.table.in_use()
    state.update(addresses.tobytes() + np.asarray(entries).tobytes())
