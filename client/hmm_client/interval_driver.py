"""The part of a driver of today's interface that its author writes: what to do when a subscribed range changes.

A driver with subscriptions of two passes starts to stop its device in `invalidate_start`, and waits for it in
`invalidate_finish`, which is called when the drivers of all other mirrors have started as well.

**Source**: Linux include/linux/mmu_notifier.h, `struct mmu_interval_notifier_ops`; include/linux/memremap.h,
`struct dev_pagemap_ops` (migrate_to_ram).

**Absent**: subscriptions and calls (`interval_mirror.py`); the device itself; see `hmm_client.drivers.dmirror`.
"""

from __future__ import annotations

import errno
import inspect
import os
from collections.abc import Awaitable
from typing import TYPE_CHECKING

from hmm.events import EventType
from hmm.units import AddressRange
from hmm_client.driver import Driver

if TYPE_CHECKING:
    from hmm_client.event import Event
    from hmm_client.interval_mirror import IntervalMirror


class IntervalDriver:
    """Base of drivers.  As it stands: a device that keeps no translations and has nothing to stop."""

    def invalidate(self, event: Event) -> Awaitable[None] | None:
        """Make the device stop using what `event` names before returning; `event.reason` says why.

        The ranges are those of the change, not clipped to subscriptions.  A driver may leave its table alone when it
        asked for the change itself: `event.initiator == event.mirror.id`.

        Raises:
            BlockingIOError: the event is not `blockable` and the driver cannot finish at once (EAGAIN): its caller
                tries again.  Anything else that is raised is logged and counts as done.
        """

    def invalidate_start(self, event: Event) -> object | Awaitable[object] | None:
        """The first pass of a subscription that has two: start, and do not wait.

        Returns: what `invalidate_finish` is to be called with; None: there is nothing left to finish.

        Raises: as `invalidate`.
        """
        return self.invalidate(event)

    def invalidate_finish(self, event: Event, token: object) -> Awaitable[None] | None:
        """The second pass: wait until the device has stopped.

        `event` is the first one, under a number of its own; the very same while the subscription comes or goes, when
        the daemon may ask for no second pass.
        """

    def migrate_to_ram(self, event: Event) -> Awaitable[None] | None:
        """Stop using pages of the device's memory that this mirror put there: they go back to the CPU, which asked."""
        return self.invalidate(event)

    def lost(self, mirror: IntervalMirror, why: str) -> None:
        """The mirror was fenced, or the connection broke: nothing that it read is valid, and no event will come."""


class Adapter(Driver):
    """An interval driver as callbacks want it.

    Attributes:
        two_pass: the ranges that are subscribed with two passes.
        unsettled: those that may be, or may not be any more: the daemon has not said.  Whoever starts there finishes at
            once, which is right in either case.
    """

    def __init__(self, driver: IntervalDriver) -> None:
        self.two_pass: list[AddressRange] = []
        self.unsettled: list[AddressRange] = []
        self._driver = driver
        self._tokens: dict[tuple[int, int], object] = {}
        if inspect.iscoroutinefunction(driver.invalidate):
            self.update = self._update  # type: ignore[method-assign]

    async def _update(self, event: Event) -> None:
        # A coroutine function, so that it runs in the loop and not on a thread.
        done = Adapter.update(self, event)
        if done is not None:
            await done

    def update(self, event: Event) -> Awaitable[None] | None:
        """As `IntervalDriver.invalidate`, one of its two passes, or `migrate_to_ram`."""
        if event.type is EventType.COPY_FROM_DEVICE:
            return self._driver.migrate_to_ram(event)
        if event.finishes:
            return self._driver.invalidate_finish(event, self._tokens.pop((event.mirror.id, event.finishes)))
        two_pass = any(event.overlaps(span) for span in self.two_pass)
        if not two_pass and not any(event.overlaps(span) for span in self.unsettled):
            return self._driver.invalidate(event)
        started = self._driver.invalidate_start(event)
        if inspect.isawaitable(started):
            return self._start(event, started, two_pass)
        return self._started(event, started, two_pass)

    async def _start(self, event: Event, started: Awaitable[object], two_pass: bool) -> None:
        finished = self._started(event, await started, two_pass)
        if finished is not None:
            await finished

    def _started(self, event: Event, token: object, two_pass: bool) -> Awaitable[None] | None:
        if token is None:
            return None
        if not two_pass:
            return self._driver.invalidate_finish(event, token)
        self._tokens[event.mirror.id, event.revision] = token
        raise BlockingIOError(errno.EINPROGRESS, os.strerror(errno.EINPROGRESS))

    def lost(self, mirror: IntervalMirror, why: str) -> None:  # type: ignore[override]
        """As `IntervalDriver.lost`."""
        self._tokens.clear()
        self._driver.lost(mirror, why)
