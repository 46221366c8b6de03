"""What exists, as messages of InspectionService: processes, devices, mappings, tables and walks.

**Absent**: who may see what (services/inspection.py), who waits for whom (waits.py), counters (counters.py).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from hmm import cpu_pte, inspection, pte, smaps
from hmm.address_space import AddressSpace
from hmm.device import Device
from hmm.interval_notifier import IntervalMirror
from hmm.machine import Machine
from hmm.mirror import Mirror
from hmm.page_table import PageTable
from hmm.receiver import Receiver
from hmm.registry import Process
from hmm.units import PAGE_SHIFT, WHOLE_SPACE, Address, AddressRange, Entries, Pfn, Pfns
from hmm.vma import Vma
from hmm.zone_device import owners
from hmm_proto import convert
from hmm_proto.status import INTERNAL_REASON, to_call_result
from hmm_proto.v1 import inspection_pb2, types_pb2
from hmm_server.operation_log import Ended
from hmm_server.served import ServedMirror

_NO_FRAMES = np.empty(0, np.int64)
DIRECTORIES_IN_PART = 4096
"""Directories in one message."""

CPU_FLAGS = (
    ("present", cpu_pte.PRESENT),
    ("write", cpu_pte.WRITE),
    ("dirty", cpu_pte.DIRTY),
    ("accessed", cpu_pte.ACCESSED),
    ("soft-dirty", cpu_pte.SOFT_DIRTY),
    ("huge", cpu_pte.HUGE),
    ("special", cpu_pte.SPECIAL),
    ("device", cpu_pte.DEVICE),
    ("exclusive", cpu_pte.EXCLUSIVE),
    ("swap", cpu_pte.SWAP),
    ("migration", cpu_pte.MIGRATION),
    ("poison", cpu_pte.POISON),
)
MIRROR_FLAGS = (
    ("valid-dev", pte.VALID_DEV),
    ("valid-dma", pte.VALID_DMA),
    ("valid-pfn", pte.VALID_PFN),
    ("select", pte.SELECT),
    ("write", pte.WRITE),
    ("dirty", pte.DIRTY),
)


def process_status(
    machine: Machine, process: Process, operations: int, sees: Callable[[str], bool]
) -> inspection_pb2.ProcessStatus:
    """One process, with the mirrors that may be seen.  Cost: O(mappings + directories)."""
    space = process.space
    return inspection_pb2.ProcessStatus(
        process_id=process.id,
        name=process.name,
        parent_process_id=process.parent,
        space_id=space.id,
        space_users=space.users,
        vma_count=len(space.vmas),
        mapped_bytes=sum(vma.end - vma.start for vma in space.vmas),
        resident_pages=inspection.resident_pages(space, WHOLE_SPACE),
        mirror_ids=[one.id for one in machine.receivers.values() if one.space is space and sees(one.owner)],
        operation_count=operations,
        broken=space.notifier.broken,
    )


def device_status(
    machine: Machine, device: Device, mirrors: Sequence[inspection_pb2.MirrorStatus]
) -> inspection_pb2.DeviceStatus:
    """One device with the mirrors it has."""
    status = inspection_pb2.DeviceStatus(
        device_id=device.id, name=device.name, dma=device.iommu is not None, mirrors=mirrors
    )
    if device.region:
        memory = machine.frames.region(device.region)
        status.memory_pages, status.memory_used_pages = memory.total, memory.used
        status.driver_copies = memory.remote
    return status


def mirror_status(mirror: Receiver, served: ServedMirror | None) -> inspection_pb2.MirrorStatus:
    """One mirror of either interface, and the stream that serves it.  Cost: O(directories)."""
    stream = served.stream if served else None
    table = mirror.table if isinstance(mirror, Mirror) else None
    return inspection_pb2.MirrorStatus(
        mirror_id=mirror.id,
        device_id=mirror.device.id,
        space_id=mirror.space.id,
        state=mirror.state.value,
        policy=convert.policy_to_proto(mirror.policy),
        entry_count=table.count if table else 0,
        directory_count=table.directories if table else 0,
        last_event_sequence=mirror.sequence,
        answered_up_to=mirror.low_water,
        epoch=stream.epoch if stream and stream.open else 0,
        driver_name=stream.name if stream else "",
        driver_pid=stream.pid if stream else 0,
        lost_because=mirror.lost_because,
        notifier_count=len(mirror.notifiers) if isinstance(mirror, IntervalMirror) else 0,
    )


def operation_status(ended: Ended) -> inspection_pb2.OperationStatus:
    """A call that has ended."""
    result = to_call_result(ended.error, ended.id, ended.fenced)
    if ended.reason == INTERNAL_REASON:
        result = types_pb2.CallResult(operation_id=ended.id, reason=INTERNAL_REASON)
    return inspection_pb2.OperationStatus(
        operation_id=ended.id,
        name=ended.name,
        caller=ended.caller,
        done=True,
        result=result,
        duration_us=round(ended.duration_s * 1e6),
    )


# ---- mappings


def mapping_use(machine: Machine, space: AddressSpace, vma: Vma) -> inspection_pb2.MappingUse:
    """What one mapping costs.  Cost: O(entries)."""
    return inspection_pb2.MappingUse(
        mapping=mapping(machine, space, vma),
        vm_flags=smaps.vm_flag_letters(space, vma),
        **dataclasses.asdict(smaps.memory_use(space, vma)),
    )


def mapping(machine: Machine, space: AddressSpace, vma: Vma) -> inspection_pb2.Mapping:
    """One mapping.  Cost: O(directories below it)."""
    resident, away = 0, [_NO_FRAMES]
    for run in space.table.walk(vma.start, vma.end):
        used = run.entries[(run.entries != 0) & ~cpu_pte.is_swap(run.entries)]
        resident += used.size
        away.append(cpu_frames(used))
    return inspection_pb2.Mapping(
        start=vma.start,
        end=vma.end,
        permissions=vma.perms,
        offset=vma.offset_bytes,
        file_id=vma.backing.id if vma.backing else 0,
        file_name=vma.name,
        vm_flags=int(vma.flags),
        resident_pages=resident,
        anon_vma=vma.anon_vma,
        on_devices=on_devices(machine, np.concatenate(away)),
    )


def cpu_frames(entries: Entries) -> Pfns:
    """int64[n]: the frames that entries of a CPU's table name."""
    return cpu_pte.cpu_pfn(entries[cpu_pte.holds_frame(entries)])


def on_devices(machine: Machine, pfns: Pfns) -> list[inspection_pb2.DevicePages]:
    """How many of some frames are in the memory of which device.  Cost: O(n * devices with memory)."""
    if len(machine.frames.regions) == 1 or not pfns.size:
        return []
    numbers, counts = np.unique(owners(machine.frames, pfns), return_counts=True)
    return [
        inspection_pb2.DevicePages(device_id=number, device_name=machine.devices[number].name, page_count=count)
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True)
        if number
    ]


# ---- tables


def directory_parts(
    machine: Machine, table: PageTable, span: AddressRange, frames: Callable[[Entries], Pfns]
) -> Iterator[inspection_pb2.GetPageTableResponse]:
    """The directories of a table in messages, depth first.  What changes between two of them is told as it is then.

    Args:
        frames: the frames that entries of this table name.
    """

    def devices_of(node: inspection.DirectoryNode) -> list[inspection_pb2.DevicePages]:
        if node.level < table.llevel or len(machine.frames.regions) == 1:
            return []
        entries = table.read(node.span.start, node.span.end)
        return on_devices(machine, frames(entries[entries != 0]))

    levels = table.llevel + 1
    nodes = inspection.directories(table, span)
    for first in range(0, max(1, len(nodes)), DIRECTORIES_IN_PART):
        yield inspection_pb2.GetPageTableResponse(
            level_count=0 if first else levels,
            directories=[
                inspection_pb2.Directory(
                    level=node.level,
                    start=node.span.start,
                    end=node.span.end,
                    valid_count=node.entries,
                    reference_count=table.reference_count(node.span.start, node.level),
                    on_devices=devices_of(node),
                )
                for node in itertools.islice(nodes, first, first + DIRECTORIES_IN_PART)
            ],
        )


def cpu_walk(machine: Machine, space: AddressSpace, address: Address) -> inspection_pb2.TableWalk:
    """The walk of a CPU."""
    walk = _walk(space.table, address, CPU_FLAGS)
    entry = walk.steps[-1].entry
    if cpu_pte.holds_frame(entry):
        _name_frame(machine, walk, cpu_pte.cpu_pfn(entry))
    return walk


def _name_frame(machine: Machine, walk: inspection_pb2.TableWalk, pfn: Pfn) -> None:
    walk.pfn = pfn
    region = machine.frames.region_of(pfn)
    if region.owner:
        walk.device_name = machine.devices[region.owner].name
        walk.device_address = (pfn - region.start) << PAGE_SHIFT


def mirror_walk(machine: Machine, mirror: Mirror, address: Address) -> inspection_pb2.TableWalk:
    """The walk of a device."""
    walk = _walk(mirror.table, address, MIRROR_FLAGS)
    walk.mirror_id = mirror.id
    entry = walk.steps[-1].entry
    if entry & pte.VALID:
        _name_frame(machine, walk, int(mirror.pfns(np.array([entry], np.uint64))[0]))
    driver_bits = (entry & pte.DRIVER_MASK) >> pte.HW_SHIFT
    if driver_bits:
        walk.flags += f" driver={driver_bits:#x}"
    return walk


def _walk(table: PageTable, address: Address, names: tuple[tuple[str, int], ...]) -> inspection_pb2.TableWalk:
    steps = [
        inspection_pb2.TableStep(level=step.level, index=step.index, entry=step.entry, present=step.present)
        for step in inspection.walk(table, address)
    ]
    last = steps[-1].entry
    return inspection_pb2.TableWalk(steps=steps, flags=" ".join(name for name, bit in names if last & bit))
