"""Counters by device: those of its mirrors added up, those of mirrors that are gone included.

**Invariants**: a total of a device does not fall while the device is registered.

**Absent**: counting itself, which is done where things happen.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hmm.machine import Machine
from hmm.receiver import MirrorState, Receiver
from hmm.units import DeviceId, MirrorId
from hmm.violation import ViolationKind
from hmm_server.served import ServedMirror
from hmm_server.traffic import LATENCY_BOUNDS_S


@dataclass(slots=True, eq=False)
class DeviceTotals:
    """What was counted for one device.

    Attributes:
        counters: of the core, by its names.
        reasons: events sent, by reason.
        sent: ranges, pages and bytes of events sent.
        latencies: answers by their latency; one bucket for each bound, and one for all beyond.
        fences: mirrors that were fenced.
    """

    counters: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    violations: Counter[ViolationKind] = field(default_factory=Counter)
    latencies: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BOUNDS_S) + 1))
    latency_sum_s: float = 0.0
    fences: int = 0

    def add(self, receiver: Receiver, served: ServedMirror | None) -> None:
        """Add the counters of one mirror."""
        self.counters.update(receiver.counted())
        self.violations.update(receiver.reports.counts)
        self.fences += receiver.state is MirrorState.LOST
        if served is not None:
            traffic = served.traffic
            self.reasons.update(traffic.events_by_reason)
            self.sent.update(ranges=traffic.ranges, pages=traffic.pages, bytes=traffic.bytes_sent)
            self.latencies = [a + b for a, b in zip(self.latencies, traffic.latency_buckets, strict=True)]
            self.latency_sum_s += traffic.latency_sum_s

    def merge(self, other: DeviceTotals) -> None:
        """Add what was counted elsewhere."""
        self.counters.update(other.counters)
        self.reasons.update(other.reasons)
        self.sent.update(other.sent)
        self.violations.update(other.violations)
        self.latencies = [a + b for a, b in zip(self.latencies, other.latencies, strict=True)]
        self.latency_sum_s += other.latency_sum_s
        self.fences += other.fences


class Totals:
    """The totals of all devices of a machine."""

    def __init__(self, machine: Machine, served: dict[MirrorId, ServedMirror]) -> None:
        self._machine = machine
        self._served = served
        self._past: dict[DeviceId, DeviceTotals] = {}

    def keep(self, served: ServedMirror) -> None:
        """A mirror is about to be forgotten: its counters stay."""
        self._past.setdefault(served.receiver.device.id, DeviceTotals()).add(served.receiver, served)

    def now(self) -> dict[str, DeviceTotals]:
        """The totals of the devices that are registered, by name, which several may have."""
        machine = self._machine
        self._past = {number: totals for number, totals in self._past.items() if number in machine.devices}
        found: dict[DeviceId, DeviceTotals] = {}
        for number in machine.devices:
            found[number] = DeviceTotals()
            if number in self._past:
                found[number].merge(self._past[number])
        for receiver in machine.receivers.values():
            if receiver.device.id in found:
                found[receiver.device.id].add(receiver, self._served.get(receiver.id))
        named: dict[str, DeviceTotals] = {}
        for number, totals in found.items():
            named.setdefault(machine.devices[number].name, DeviceTotals()).merge(totals)
        return named
