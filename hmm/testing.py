"""Fakes for tests: a device that remembers its translations, and seeded workloads.

`DeviceModel` is the device at the far end: it uses what it was told until its driver answers that it no longer
does.  So it sees what the model of the daemon cannot see by itself: an event that was never sent, or an edit that
came before the answer.

Source: our own.
Invariants: as long as a device may use a translation, the CPU's table has the same frame at that address, with no
less permission (invariant 1 and 3 of the project, seen from the device).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hmm import cpu_pte, pte
from hmm.commands_device import DeviceFaulted
from hmm.events import Event, EventType
from hmm.machine import Delivery, Machine, OperationRecord
from hmm.mirror import MirrorState
from hmm.scheduler import Call, Choose
from hmm.units import PAGE_SIZE, AddressRange, MirrorId

_WORD = (1 << 64) - 1


class LostTranslationError(AssertionError):
    """A device still uses a translation that the CPU's table no longer has."""


@dataclass(slots=True)
class DeviceModel:
    """What one device may use at the moment, per mirror: page address -> (frame, may write)."""

    machine: Machine
    translations: dict[MirrorId, dict[int, tuple[int, bool]]] = field(default_factory=dict)

    def answering(self, delivery: Delivery) -> None:
        """The driver handled an event and is about to answer: the device has done what the event asks."""
        held = self.translations.setdefault(delivery.mirror_id, {})
        event = delivery.event
        if event.etype is EventType.RELEASE:
            held.clear()
        elif event.etype in (EventType.DEVICE_RFAULT, EventType.DEVICE_WFAULT):
            self._program(delivery.mirror_id, event.spans, np.frombuffer(event.entries, "<u8"))
        else:
            _give_up(held, event)

    def finished(self, record: OperationRecord[Any]) -> None:
        """A fault of a mirror that gets no update for its own faults tells the device by its result."""
        result = None if record.error else record.result
        if isinstance(result, DeviceFaulted):
            mirror_id, target = record.arguments[0], record.arguments[1]
            mirror = self.machine.mirrors.get(mirror_id)
            if mirror is not None and not mirror.update_on_fault and not mirror.unanswered:
                spans = tuple(target) if not isinstance(target, np.ndarray) else _single_pages(target)
                self._program(mirror_id, spans, result.entries)

    def check(self) -> None:
        """Raise LostTranslationError when a device could reach a frame that is no longer its page's."""
        for mirror_id, held in self.translations.items():
            mirror = self.machine.mirrors.get(mirror_id)
            if mirror is None or mirror.state is not MirrorState.LIVE:
                held.clear()  # the daemon lets no access through any more
                continue
            for address, (pfn, writable) in held.items():
                entry = mirror.space.table.get(address)
                same = cpu_pte.is_present(entry) and cpu_pte.cpu_pfn(entry) == pfn
                if not same or (writable and not cpu_pte.is_writable(entry)):
                    raise LostTranslationError(
                        f"{mirror} uses frame {pfn} at {address:#x}{' for writing' if writable else ''}, "
                        f"the CPU's entry is {entry:#x}"
                    )

    def _program(self, mirror_id: MirrorId, spans: tuple[AddressRange, ...], entries: Any) -> None:
        mirror = self.machine.mirrors[mirror_id]
        held = self.translations.setdefault(mirror_id, {})
        addresses = [address for span in spans for address in range(span.start, span.end, PAGE_SIZE)]
        pfns = mirror.pfns(np.asarray(entries, np.uint64)).tolist()
        for address, entry, pfn in zip(addresses, np.asarray(entries).tolist(), pfns, strict=True):
            if entry & pte.VALID:
                held[address] = (pfn, bool(entry & pte.WRITE))


def _give_up(held: dict[int, tuple[int, bool]], event: Event) -> None:
    for address in [
        address for address in held if event.overlaps(AddressRange(address, address + PAGE_SIZE))
    ]:
        if event.etype.pte_mask == pte.MASK_NONE:
            del held[address]
        elif event.etype.pte_mask == pte.MASK_WRITE_PROTECT:
            held[address] = (held[address][0], False)


def _single_pages(addresses: Any) -> tuple[AddressRange, ...]:
    return tuple(AddressRange(address, address + PAGE_SIZE) for address in addresses.tolist())


def choices(seed: int) -> Choose:
    """The choices of a seed: numbers from a generator of our own (splitmix64), the same everywhere and always."""
    state = seed & _WORD

    def choose(n: int) -> int:
        nonlocal state
        state = (state + 0x9E3779B97F4A7C15) & _WORD
        mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _WORD
        return (mixed ^ (mixed >> 31)) % n

    return choose


Maker = Callable[[Machine, Choose], Call | None]
"""Makes one call that fits the present state, or None when there is none of its kind."""


def workload(machine: Machine, choose: Choose, makers: list[Maker], ncalls: int) -> Iterator[Call]:
    """`ncalls` calls, each made by one of `makers` at the moment it is started."""
    made = 0
    while made < ncalls:
        call = makers[choose(len(makers))](machine, choose)
        if call is not None:
            made += 1
            yield call
