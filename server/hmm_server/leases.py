"""Leases of what drivers hold between calls: how long without a sign of the holder before it goes back.

    what is held                          its sign of life is            without one
    a migration that is not finalized     a step of that migration       it is ended, and its pages are where they were
    exclusive access, pins                anything on its stream, or     the stream is ended, and they go back with it
                                          a call that names that or one
                                          of its mirrors

A migration holds others up: calls that change mappings, and whoever touches its pages.  So a driver whose process
lives and whose handler is stuck must not keep it, and what its session says beside counts for nothing.  The others hold
nobody up.  A pin may be there for hours, with a device writing to it that nobody could stop in time: so it lasts as
long as its driver lives, which the client library shows by itself, and it is never taken in silence: the driver is dead
from then on, as if its stream had broken.

Holders are looked at LOOKS times in a lease, and what is counted is looks without a sign: a daemon that was stopped
itself, or busy, blames nobody for that.

**Invariants**: what was held when its holder gave the last sign goes back between one lease and one look more later.

**Absent**: what goes back when a stream ends (streams.py), and what ends with a migration (`Machine.end_migration`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from hmm.commands_hmm import EXCLUSIVE_PAGES
from hmm.exclusive import held_exclusively
from hmm.machine import Machine
from hmm_server.served import Stream

LOOKS = 8
"""Of a holder in one lease."""


@dataclass(slots=True)
class Lease:
    """One holder's.

    Attributes:
        sign: something that is another thing after each sign of life.
        looks: without a sign.
    """

    sign: object
    looks: int = 0


@dataclass(slots=True)
class Leases:
    """All leases of one daemon.

    Attributes:
        open: its streams, by epoch.
        end_stream: ends one, for a reason.
        pump: what is to follow when a migration was ended.
        steps: of each migration, how many its driver has taken.
    """

    machine: Machine
    lease_s: float
    open: dict[int, Stream]
    end_stream: Callable[[Stream, str], None]
    pump: Callable[[], None]
    steps: dict[int, int] = field(default_factory=dict)
    _migrations: dict[int, Lease] = field(default_factory=dict)
    _streams: dict[int, Lease] = field(default_factory=dict)
    _timer: asyncio.TimerHandle | None = None

    def watch(self) -> None:
        """A stream is open: from now on holders are looked at, as long as there are any."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self.lease_s / LOOKS, self._tick)

    def renew(self, migration_id: int) -> None:
        """The driver of a migration has taken a step."""
        self.steps[migration_id] = self.steps.get(migration_id, 0) + 1

    def left_s(self, stream: Stream | None, migration_id: int = 0) -> float:
        """How long at least what a migration, or a stream, holds stays as it is."""
        if migration_id:
            lease = self._migrations.get(migration_id)
            sign: object = self.steps.get(migration_id)
        else:
            lease = None if stream is None else self._streams.get(stream.epoch)
            sign = None if stream is None else stream.heard_s
        looks = lease.looks if lease is not None and lease.sign == sign else 0
        return self.lease_s * max(0, LOOKS - looks) / LOOKS

    def _tick(self) -> None:
        self._timer = None
        self.look()
        if self.open:
            self.watch()

    def look(self) -> None:
        """Look at every holder once, and end what was held too long."""
        self._look_at_migrations()
        self._look_at_streams()

    def _look_at_migrations(self) -> None:
        migrations = self.machine.migrations
        for kept in (self.steps, self._migrations):
            for number in [number for number in kept if number not in migrations]:
                del kept[number]
        ended = False
        for number, migration in migrations.items():
            if not migration.awaits_driver:
                self._migrations.pop(number, None)  # it waits for others, or a call of its driver does
            elif self._is_over(self._migrations, number, self.steps.get(number)):
                self.machine.end_migration(number, f"its driver took no step for {self.lease_s:g} s, its lease")
                ended = True
        if ended:
            self.pump()

    def _look_at_streams(self) -> None:
        for epoch in [epoch for epoch in self._streams if epoch not in self.open]:
            del self._streams[epoch]
        for epoch, stream in list(self.open.items()):
            if self._is_over(self._streams, epoch, stream.heard_s) and (held := self._held(stream)):
                self.end_stream(stream, f"nothing was heard of it for {self.lease_s:g} s, the lease of {held}")

    @staticmethod
    def _is_over(leases: dict[int, Lease], holder: int, sign: object) -> bool:
        lease = leases.get(holder)
        if lease is None or lease.sign != sign:
            leases[holder] = Lease(sign)
            return False
        lease.looks += 1
        return lease.looks >= LOOKS

    def _held(self, stream: Stream) -> str:
        """What a stream holds, in words; empty for nothing."""
        if stream.pins:
            return f"pin {stream.pins[0]}" + (f" and {len(stream.pins) - 1} more" if len(stream.pins) > 1 else "")
        for mirror_id, served in stream.mirrors.items():
            mirror = served.receiver
            if mirror.counters[EXCLUSIVE_PAGES] and held_exclusively(mirror.space, mirror_id).size:
                return f"the exclusive access of {mirror}"
        return ""
