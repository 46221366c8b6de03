"""What must hold of a machine between any two steps: in each of its parts, and between parts.

A part asserts in its own `check()` what it can see by itself.  Here stands what takes several of them: the entries of
all page tables against the counts of frames and of swap slots, devices' memory and DMA mappings against who uses them,
and calls that wait against what they wait for.

**Source**: our own; the counts are _mapcount of mm/rmap.c and swap_map of mm/swapfile.c.

**Absent**: whether calls do what they should (testing_contents.py, testing_dirty.py, testing_streams.py).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from hmm import cpu_pte
from hmm.checked import Checked
from hmm.frames import ZERO_PFN, Frames, PageFlag
from hmm.operation import Deliver
from hmm.operation_record import OperationRecord
from hmm.registry import Registry
from hmm.swap import slots_of
from hmm.swap_area import SwapArea
from hmm.zone_device import used_frames

__all__ = ["check"]


def check(registry: Registry, operations: Collection[OperationRecord[Any]], checked: Checked) -> None:
    """Assert every invariant of every part, and those between them.  Cost: O(everything mapped).

    Args:
        operations: those that have not ended.
        checked: what earlier checks saw; what has not changed since is not checked again.
    """
    checked.begin()
    _check_memory(registry, checked, idle=not operations)
    for receiver in registry.receivers.values():
        receiver.check(checked)
    for migration in registry.migrations.values():
        migration.check()
    _check_dma(registry)
    for record in operations:
        _check_operation(registry, record)


def _check_memory(registry: Registry, checked: Checked, *, idle: bool) -> None:
    frames, spaces, files = registry.frames, registry.spaces.values(), registry.files.values()
    state = checked.number(frames)
    if checked.is_new(frames, state):
        frames.check()
    registry.hugetlb.check()
    for space in spaces:
        space.check(checked)
    tables = [number for space in spaces for number in (space.id, checked.number(space.table))]
    if checked.is_new(registry, state, idle, *tables):
        _check_map_counts(registry, checked, idle=idle)
        if idle:
            _check_device_memory(frames)
    if frames.swap is not None:
        tables += [number for file in files for number in (file.id, checked.number(file.pages))]
        if checked.is_new(frames.swap, state, checked.number(frames.swap), *tables):
            _check_swap(registry, frames.swap, checked)


def _check_map_counts(registry: Registry, checked: Checked, *, idle: bool) -> None:
    frames = registry.frames
    mapcount = frames.mapcount[: frames.used_end]
    counted = np.zeros_like(mapcount)
    for space in registry.spaces.values():
        _, entries = checked.look(space.table, space.table.in_use)
        moving = cpu_pte.cpu_pfn(entries[cpu_pte.is_migration(entries)])
        assert not (idle and moving.size), f"space {space.id} has migration entries and nothing migrates"
        nobodys = moving[(moving != ZERO_PFN) & ~frames.locks.are_locked(moving)]
        assert not nobodys.size, f"space {space.id} has a migration entry of frame {nobodys[0]}, which nobody moves"
        held = entries[cpu_pte.holds_frame(entries)]
        np.add.at(counted, cpu_pte.cpu_pfn(held), np.int32(1))
        writable = cpu_pte.cpu_pfn(held[cpu_pte.is_writable(held)])
        merged = frames.test_flags(writable, PageFlag.KSM)
        assert not merged.any(), f"space {space.id} may write merged page {writable[merged][0]}"
    lost = np.flatnonzero(frames.test_flags(np.arange(mapcount.size), PageFlag.HWPOISON) & (mapcount > 0))
    if idle and lost.size:  # a driver's own pages stay mapped
        taken = frames.test_flags(lost, PageFlag.ANON)
        for file in registry.files.values():
            taken |= np.isin(lost, cpu_pte.cpu_pfn(checked.look(file.pages, file.pages.in_use)[1]))
        assert not taken.any(), "a page is mapped whose contents are lost"
    wrong = np.flatnonzero(counted != mapcount)
    assert not wrong.size, f"frame {wrong[0]} is mapped {counted[wrong[0]]} times, not {mapcount[wrong[0]]}"


def _check_device_memory(frames: Frames) -> None:
    # While nothing is on its way, a device's frame in use is a page of somebody's.
    for region in frames.regions[1:]:
        pfns = used_frames(frames, region.number)
        leaked = pfns[(frames.mapcount[pfns] == 0) & (frames.pincount[pfns] == 0)]
        assert not leaked.size, f"{region}: frame {leaked[0]} is in use, and nobody's"


def _check_swap(registry: Registry, area: SwapArea, checked: Checked) -> None:
    area.check()
    named, private = np.zeros_like(area.counts), registry.frames.private
    for table in [space.table for space in registry.spaces.values()] + [file.pages for file in registry.files.values()]:
        np.add.at(named, slots_of(checked.look(table, table.in_use)[1]), np.int32(1))
    wrong = np.flatnonzero(named != area.counts)
    assert not wrong.size, f"swap slot {wrong[0]} is named {named[wrong[0]]} times, not {area.counts[wrong[0]]}"
    slots = np.flatnonzero(area.cached)
    assert np.array_equal(private[area.cached[slots]], slots), "the swap cache has other pages"
    assert np.count_nonzero(private) == slots.size, "a page says that it is in the swap cache"


def _check_dma(registry: Registry) -> None:
    # What a mirror has mapped, its own check counts.
    mirrored = {receiver.device.id for receiver in registry.receivers.values()}
    for device in registry.devices.values():
        leaked = device.iommu.mapped_pages if device.iommu and device.id not in mirrored else 0
        assert not leaked, f"{device} has {leaked} pages mapped for DMA, and no mirror"


def _check_operation(registry: Registry, record: OperationRecord[Any]) -> None:
    assert record.request is not None
    assert not record.done
    assert isinstance(record.request, Deliver) == (record.dispatch is not None)
    if record.dispatch is not None:
        record.dispatch.check()
    if record.waits_for_handler:  # for as long as somebody outside likes: nobody may have to wait for it in turn
        for space in registry.spaces.values():
            assert record.id not in space.notifier.holders, f"{record.name} waits for a handler and holds up others"
