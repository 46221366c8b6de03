"""Accesses under way, and callbacks that wait for them."""

from __future__ import annotations

import asyncio

import pytest

from hmm.units import PAGE_SIZE
from hmm_client.drivers.accesses import Accesses


async def test_access_ends_well_when_a_callback_that_waited_for_it_was_cancelled() -> None:
    """A session that is closed cancels its callbacks: neither the access nor another callback is ended by that."""
    accesses = Accesses()
    with accesses.to(PAGE_SIZE, 8):
        first, second = (asyncio.create_task(accesses.all_ended()) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await asyncio.sleep(0)
        assert not second.done()
    await second
