"""What a driver's author writes without await, and how it is called: the drivers of `sync.py`.

Callbacks are plain functions; they run on worker threads, one mirror's events in order, and may make calls.

**Source**: `hmm_client.driver`, `hmm_client.interval_driver`.

**Absent**: the threads (callbacks.py), the handles (sync.py).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, TypeAlias, cast

from hmm_client import driver as aio_driver
from hmm_client import event as aio_event
from hmm_client import interval_driver as aio_interval_driver
from hmm_client import interval_mirror as aio_interval
from hmm_client import mirror as aio_mirror
from hmm_client.driver import Copied, Written

if TYPE_CHECKING:
    from hmm_client.sync import IntervalMirror, Mirror

__all__ = ["AnyDriver", "Driver", "Event", "IntervalDriver", "adapted", "adapted_interval"]


class Event(aio_event.Event):
    """As `hmm_client.Event`."""


class Driver:
    """As `hmm_client.Driver`, with plain functions, which run on worker threads and may make calls."""

    def update(self, event: Event) -> Written:
        """Make the device stop using what `event` names, or program it after a fault, before returning."""

    def copy_to_device(self, event: Event) -> Copied:
        """Take pages into the device's memory."""
        return aio_driver.Driver.copy_to_device(self, event)  # type: ignore[arg-type, return-value]

    def copy_from_device(self, event: Event) -> Copied:
        """Give pages back."""
        return aio_driver.Driver.copy_from_device(self, event)  # type: ignore[arg-type, return-value]

    def release(self, mirror: Mirror) -> None:
        """Stop everything that uses the address space."""

    def lost(self, mirror: Mirror, why: str) -> None:
        """The mirror was fenced, or the connection broke."""


AnyDriver: TypeAlias = Driver | aio_driver.Driver
"""A driver's functions are called the same way whoever its base is; those that are `async def` run as well."""


class IntervalDriver:
    """As `hmm_client.IntervalDriver`, with plain functions, which run on worker threads and may make calls."""

    def invalidate(self, event: Event) -> None:
        """Make the device stop using what `event` names, before returning."""

    def invalidate_start(self, event: Event) -> object | None:
        """The first pass of a subscription that has two: start; what is returned goes to `invalidate_finish`."""
        return self.invalidate(event)  # type: ignore[func-returns-value]  # an awaitable of an `async def`

    def invalidate_finish(self, event: Event, token: object) -> None:
        """The second pass: wait until the device has stopped."""

    def migrate_to_ram(self, event: Event) -> None:
        """Stop using pages of the device's memory that this mirror put there."""
        self.invalidate(event)

    def lost(self, mirror: IntervalMirror, why: str) -> None:
        """The mirror was fenced, or the connection broke."""


def _submit(executor: ThreadPoolExecutor, what: Callable[..., None], *arguments: object) -> None:
    with suppress(RuntimeError):  # the interpreter ends: nobody is left to be told
        executor.submit(what, *arguments)


class _IntervalAdapter(aio_interval_driver.IntervalDriver):
    """Hands an interval driver the events of this module, and handles that `handle` makes."""

    def __init__(
        self,
        driver: IntervalDriver,
        handle: Callable[[aio_interval.IntervalMirror], IntervalMirror],
        executor: ThreadPoolExecutor,
    ) -> None:
        self._driver = cast("aio_interval_driver.IntervalDriver", driver)
        self._handle = handle
        self._executor = executor

    def invalidate(self, event: aio_event.Event) -> Awaitable[None] | None:
        return self._driver.invalidate(Event.at(event, self._handle(event.mirror)))

    def invalidate_start(self, event: aio_event.Event) -> object | Awaitable[object] | None:
        return self._driver.invalidate_start(Event.at(event, self._handle(event.mirror)))

    def invalidate_finish(self, event: aio_event.Event, token: object) -> Awaitable[None] | None:
        return self._driver.invalidate_finish(Event.at(event, self._handle(event.mirror)), token)

    def migrate_to_ram(self, event: aio_event.Event) -> Awaitable[None] | None:
        return self._driver.migrate_to_ram(Event.at(event, self._handle(event.mirror)))

    def lost(self, mirror: aio_interval.IntervalMirror, why: str) -> None:
        _submit(self._executor, self._driver.lost, self._handle(mirror), why)


class _Adapter(aio_driver.Driver):
    """Hands a driver the events of this module, and handles that `handle` makes."""

    def __init__(
        self, driver: Driver, handle: Callable[[aio_mirror.Mirror], Mirror], executor: ThreadPoolExecutor
    ) -> None:
        self._driver = driver
        self._handle = handle
        self._executor = executor

    def update(self, event: aio_event.Event) -> Written:
        return self._driver.update(Event.at(event, self._handle(event.mirror)))

    def copy_to_device(self, event: aio_event.Event) -> Copied:
        return self._driver.copy_to_device(Event.at(event, self._handle(event.mirror)))

    def copy_from_device(self, event: aio_event.Event) -> Copied:
        return self._driver.copy_from_device(Event.at(event, self._handle(event.mirror)))

    def release(self, mirror: aio_mirror.Mirror) -> Awaitable[None] | None:
        return self._driver.release(self._handle(mirror))  # type: ignore[func-returns-value]  # as `invalidate_start`

    def lost(self, mirror: aio_mirror.Mirror, why: str) -> None:
        _submit(self._executor, self._driver.lost, self._handle(mirror), why)


def adapted(
    driver: AnyDriver, handle: Callable[[aio_mirror.Mirror], Mirror], executor: ThreadPoolExecutor
) -> aio_driver.Driver:
    """A driver as the asynchronous client calls it; this one gets the handle that `handle` makes of its mirror."""
    return _Adapter(cast("Driver", driver), handle, executor)


def adapted_interval(
    driver: IntervalDriver,
    handle: Callable[[aio_interval.IntervalMirror], IntervalMirror],
    executor: ThreadPoolExecutor,
) -> aio_interval_driver.IntervalDriver:
    """As `adapted`, of today's interface."""
    return _IntervalAdapter(driver, handle, executor)
