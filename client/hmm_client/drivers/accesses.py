"""Accesses of a device that are under way, for callbacks that must wait until they have ended.

A device that is told to give a range up first takes the translation out of its table, so that nothing new starts, and
then waits for what has started: only then may the callback return.

**Source**: the dummy driver of the 2015 series, whose `update` does the same; hardware does it in its TLB shootdown.

**Invariants**: when `ended` returns, no access to the event's ranges that began before it is under way.

**Absent**: keeping new accesses out; the table does that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from hmm.errors import InvalidRequestError
from hmm.units import TASK_SIZE, AddressRange
from hmm_client.event import Event


def accessed(operation: str, address: int, length: int) -> AddressRange:
    """The bytes that an application names.

    Raises:
        InvalidRequestError: they are less than none, or no process can have them (EINVAL).
    """
    if length < 0 or not 0 <= address <= TASK_SIZE - length:
        raise InvalidRequestError(f"{operation}: no process has {length:,} bytes at {address:#x}")
    return AddressRange(address, address + length)


@dataclass(slots=True, eq=False)
class _Access:
    span: AddressRange
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Accesses:
    """The accesses of one mirror that are under way."""

    def __init__(self) -> None:
        self._under_way: list[_Access] = []

    @contextmanager
    def to(self, address: int, length: int) -> Iterator[None]:
        """Around an access to [address, address + length); whoever enters has just looked at the table."""
        access = _Access(AddressRange(address, address + length))
        self._under_way.append(access)
        try:
            yield
        finally:
            self._under_way.remove(access)
            access.ended.set()

    async def ended(self, event: Event) -> None:
        """Wait until the accesses that overlap the event, and are under way now, have ended."""
        for access in [access for access in self._under_way if event.overlaps(access.span)]:
            await access.ended.wait()

    async def all_ended(self) -> None:
        """Wait until the accesses that are under way now have ended."""
        for access in list(self._under_way):
            await access.ended.wait()
