"""What a scenario's driver of today's interface does: read sections, range faults, migration, exclusive access.

**Source**: Documentation/mm/hmm.rst; `hmm_client.interval_mirror`.

**Absent**: drivers with the mirror of 2015 (`actions.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hmm.commands_hmm import RangeFaulted
from hmm.migration import MIGRATE, Select
from hmm.range_fault import VALID
from hmm.units import AddressRange
from hmm_client.scenario.driver import Driven
from hmm_client.scenario.model import Step

MIGRATIONS = frozenset({"to_device", "to_system"})
"""Calls of drivers with the mirror of 2015 as well."""
RANGED = MIGRATIONS | {"exclusive"}
STEPS = frozenset({"setup", "place", "finalize", "abort"})
CALLS = frozenset({"subscribe", "unsubscribe", "read_begin", "read_retry", "range_fault", "detach"}) | RANGED | STEPS


async def today_call(driven: Driven, step: Step, span: AddressRange | None) -> object:
    """Do what a step says.

    Args:
        span: that it is about; None for calls without one.

    Returns: a number of pages, whether to retry, or None.

    Raises:
        HmmError: how the call ended.
    """
    given = step.arguments
    if step.call == "subscribe":
        assert span is not None
        tie = driven.tie(given["mirrors"])
        driven.subscriptions[given["as"]] = await tie.insert(span.start, span.size_bytes)
        return None
    if step.call == "detach":
        await driven.tie(given["mirrors"]).detach()
        return None
    if step.call in STEPS:
        return await _take_step(driven, step, span)
    if step.call in RANGED:
        assert span is not None
        return await _move(driven, step, span.page_aligned())
    return await _read_section(driven, step, span)


async def _move(driven: Driven, step: Step, span: AddressRange) -> int:
    tie = driven.tie(step.arguments["mirrors"])
    if step.call == "exclusive":
        return int((await tie.make_exclusive(span) != 0).sum())
    moved = await (tie.migrate_to_device(span) if step.call == "to_device" else tie.migrate_to_system(span))
    return int(((moved.src & np.uint64(MIGRATE)) != 0).sum())


async def _take_step(driven: Driven, step: Step, span: AddressRange | None) -> int:
    if step.call == "setup":
        assert span is not None
        tie = driven.tie(step.arguments["mirrors"])
        driven.migration = tie.migrate_vma(span.page_aligned(), select=step.arguments["select"])
        await driven.migration.set_up()
    migration = driven.begun()
    match step.call:
        case "place":
            count = migration.movable.size
            there = migration.select & Select.SYSTEM
            dst = migration.destinations(
                await (migration.allocate(count) if there else migration.allocate_system(count))
            )
            await migration.copy(dst)
            await migration.pages(dst)
        case "finalize":
            await migration.finalize()
        case "abort":
            await migration.abort()
    return int(migration.movable.size)


async def _read_section(driven: Driven, step: Step, span: AddressRange | None) -> object:
    name = driven.subscription(step.arguments["subscription"])
    notifier = driven.subscriptions[name]
    match step.call:
        case "unsubscribe":
            await notifier.remove()
            del driven.subscriptions[name]
            return None
        case "read_begin":
            driven.sequences[name] = await notifier.read_begin()
            return None
        case "read_retry":
            return await notifier.read_retry(driven.sequence(name))
        case _:
            assert span is not None
            faulted = await _range_fault(driven, name, step.arguments, span.page_aligned())
            return int(((faulted.words & np.uint64(VALID)) != 0).sum())


async def _range_fault(driven: Driven, name: str, given: Mapping[str, Any], span: AddressRange) -> RangeFaulted:
    notifier = driven.subscriptions[name]
    if given["deadline_s"] is not None:
        return await notifier.fault(span, given["want"], deadline_s=given["deadline_s"])
    return await notifier.range_fault(span, driven.sequence(name), given["want"])
