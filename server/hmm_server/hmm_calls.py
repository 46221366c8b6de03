"""The calls of today's interface, by the names that they have on a session.

**Absent**: how they are made (calls.py), what they do (`hmm.commands_hmm`), streams.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hmm import commands_hmm, commands_migrate, commands_process
from hmm.commands_hmm import DmaMapped, Migrated, RangeFaulted, VmaView
from hmm.commands_migrate import MigrationSetUp
from hmm.iommu import IOVA_LAST
from hmm.machine import Machine
from hmm.units import PAGE_SHIFT, TASK_SIZE, Entries, Pfns, is_page_aligned
from hmm_proto import convert
from hmm_proto.status import to_call_result
from hmm_proto.v1 import hmm_pb2, types_pb2
from hmm_server.calls import Call, Invocation, invoke
from hmm_server.process_calls import DATA_BYTES_MAX, require_at_most
from hmm_server.replies import FEW, ArrayReply

Result = types_pb2.CallResult
MIGRATE_PAGES_MAX = 1 << 17
FRAMES_MAX = DATA_BYTES_MAX >> PAGE_SHIFT
DMA_PAGES_MAX = 1 << 16


def attach_response(machine: Machine, mirror_id: int) -> hmm_pb2.AttachResponse:
    """What a driver wants to know of its new mirror."""
    mirror = machine.receivers[mirror_id]
    return hmm_pb2.AttachResponse(
        mirror_id=mirror_id,
        space_id=mirror.space.id,
        policy=convert.policy_to_proto(mirror.policy),
        address_end=TASK_SIZE,
    )


def _attach(q: hmm_pb2.AttachRequest) -> Invocation:
    return invoke(commands_hmm.attach, q.device_id, q.process_id, policy=convert.policy_from_proto(q.policy))


def _insert_notifier(q: hmm_pb2.InsertNotifierRequest) -> Invocation:
    return invoke(
        commands_hmm.insert_notifier, q.mirror_id, q.start, q.length, filtered=q.filtered, two_pass=q.two_pass
    )


def _find_vma_response(vma: VmaView | None, result: Result) -> hmm_pb2.FindVmaResponse:
    if vma is None:
        return hmm_pb2.FindVmaResponse(result=result)
    return hmm_pb2.FindVmaResponse(
        result=result, found=True, start=vma.start, end=vma.end, readable=vma.readable, writable=vma.writable
    )


# ---- range faults


def _range_fault(q: hmm_pb2.RangeFaultRequest) -> Invocation:
    span = convert.range_from_proto(q.range)
    words = convert.entries_from_proto(q.words) if q.words else None
    flags = (q.default_flags, q.pfn_flags_mask, words)
    if q.notifier_seq:
        arguments = (q.mirror_id, q.notifier_id, q.notifier_seq, span, *flags)
        return Invocation(commands_hmm.range_fault, arguments, {}, span.npages)
    return Invocation(commands_hmm.range_fault_unlocked, (q.mirror_id, q.notifier_id, span, *flags), {}, span.npages)


def _range_fault_response(faulted: RangeFaulted | None, result: Result) -> hmm_pb2.RangeFaultResponse | ArrayReply:
    if faulted is None:
        return hmm_pb2.RangeFaultResponse(result=result)
    if faulted.error is not None:
        result = to_call_result(faulted.error, result.operation_id, tuple(result.fenced_mirrors))
    response = hmm_pb2.RangeFaultResponse(
        result=result,
        notifier_seq=faulted.notifier_seq,
        last_event_sequence=faulted.event_sequence,
        retries=faulted.retries,
    )
    if faulted.words.size <= FEW:
        response.words = convert.entries_to_proto(faulted.words)
        return response
    return ArrayReply(response, {"words": faulted.words})


# ---- migration and exclusive access


def _to_device(q: hmm_pb2.MigrateToDeviceRequest) -> Invocation:
    return _migration(commands_hmm.migrate_to_device, q)


def _to_system(q: hmm_pb2.MigrateToSystemRequest) -> Invocation:
    return _migration(commands_hmm.migrate_to_system, q)


def _migration(command: Any, q: hmm_pb2.MigrateToDeviceRequest | hmm_pb2.MigrateToSystemRequest) -> Invocation:
    span = convert.range_from_proto(q.range)
    require_at_most("migrate: pages", span.npages, MIGRATE_PAGES_MAX)
    wanted = None
    if q.wanted:
        flags = np.frombuffer(q.wanted, np.uint8)
        if flags.max() > 1:
            raise convert.malformed("migrate: pages are wanted (1) or not (0)")
        wanted = flags.astype(np.bool_)
    return invoke(command, q.mirror_id, span, compound=q.compound, wanted=wanted)


def _migrated(response: Any, migrated: Migrated | None) -> ArrayReply:
    return ArrayReply(response, {} if migrated is None else {"src": migrated.src, "dst": migrated.dst})


def _set_up(q: hmm_pb2.MigrateVmaSetupRequest) -> Invocation:
    span = convert.range_from_proto(q.range)
    require_at_most("migrate: pages", span.npages, MIGRATE_PAGES_MAX)
    return invoke(commands_migrate.migrate_vma_setup, q.mirror_id, span, select=q.select)


def _set_up_response(begun: MigrationSetUp | None, result: Result) -> ArrayReply:
    if begun is None:
        return ArrayReply(hmm_pb2.MigrateVmaSetupResponse(result=result), {})
    response = hmm_pb2.MigrateVmaSetupResponse(result=result, migration_id=begun.migration_id)
    return ArrayReply(response, {"src": begun.src})


def _allocate(q: hmm_pb2.MigrateVmaAllocateRequest) -> Invocation:
    require_at_most("migrate: frames", q.count, MIGRATE_PAGES_MAX)
    keywords = {"device_id": q.device_id, "compound": q.compound}
    return invoke(commands_migrate.migrate_vma_allocate, q.migration_id, q.count, **keywords)


def _allocate_response(pfns: Pfns | None, result: Result) -> ArrayReply:
    response = hmm_pb2.MigrateVmaAllocateResponse(result=result)
    return ArrayReply(response, {} if pfns is None else {"pfns": pfns.view(np.uint64)})


def _copy(q: hmm_pb2.MigrateVmaCopyRequest) -> Invocation:
    sources, targets = convert.entries_from_proto(q.sources), convert.entries_from_proto(q.targets)
    require_at_most("migrate: frames", sources.size, MIGRATE_PAGES_MAX)
    return invoke(commands_migrate.migrate_vma_copy, q.migration_id, sources.view(np.int64), targets.view(np.int64))


def _pages_step(q: hmm_pb2.MigrateVmaPagesRequest) -> Invocation:
    return invoke(commands_migrate.migrate_vma_pages, q.migration_id, convert.entries_from_proto(q.dst))


def _pages_response(migrated: Migrated | None, result: Result) -> ArrayReply:
    response = hmm_pb2.MigrateVmaPagesResponse(result=result)
    return ArrayReply(response, {} if migrated is None else {"src": migrated.src})


def _make_exclusive(q: hmm_pb2.MakeExclusiveRequest) -> Invocation:
    return invoke(commands_hmm.make_exclusive, q.mirror_id, convert.range_from_proto(q.range), owned=q.owned)


def _make_exclusive_response(pfns: Any, result: Result) -> hmm_pb2.MakeExclusiveResponse:
    packed = b"" if pfns is None else convert.entries_to_proto(pfns.view(np.uint64))
    return hmm_pb2.MakeExclusiveResponse(result=result, pfns=packed)


# ---- DMA


def _pages(what: str, packed: bytes, limit: int, end: int = TASK_SIZE) -> Entries:
    pages = convert.entries_from_proto(packed)
    require_at_most(f"{what}: pages", pages.size, limit)
    if pages.size and (not is_page_aligned(int(np.bitwise_or.reduce(pages))) or int(pages.max()) >= end):
        raise convert.malformed(f"{what}: addresses that are no pages of the address space")
    return pages


def _mapped(q: hmm_pb2.DmaMapRequest | hmm_pb2.DmaUnmapRequest) -> tuple[Entries, Entries]:
    return _pages("DMA", q.pages, DMA_PAGES_MAX), convert.entries_from_proto(q.words)


def _dma_map_response(mapped: DmaMapped | None, result: Result) -> ArrayReply:
    arrays = {} if mapped is None else {"words": mapped.words, "dma_addresses": mapped.dma_addresses}
    return ArrayReply(hmm_pb2.DmaMapResponse(result=result), arrays)


def _dma_unmap_response(words: Entries | None, result: Result) -> ArrayReply:
    return ArrayReply(hmm_pb2.DmaUnmapResponse(result=result), {} if words is None else {"words": words})


# ---- what the device does


def _frames(q: hmm_pb2.ReadFramesRequest | hmm_pb2.WriteFramesRequest) -> tuple[Entries, ...]:
    """The pages, and their frames unless they are named by DMA address."""
    pages = _pages("device access", q.pages, FRAMES_MAX, IOVA_LAST if q.dma else TASK_SIZE)
    pfns = convert.entries_from_proto(q.pfns)
    if pfns.size != (0 if q.dma else pages.size):
        raise convert.malformed(f"device access: {pages.size} pages{' for DMA' * q.dma} and {pfns.size} frames")
    return (pages,) if q.dma else (pages, pfns.view(np.int64))


def _heard(q: hmm_pb2.ReadFramesRequest | hmm_pb2.WriteFramesRequest | hmm_pb2.DmaMapRequest) -> int | None:
    return q.heard_sequence if q.HasField("heard_sequence") else None


def _frames_of_migration(q: hmm_pb2.ReadFramesRequest | hmm_pb2.WriteFramesRequest) -> tuple[int, Pfns]:
    pfns = convert.entries_from_proto(q.pfns)
    require_at_most("device access: frames", pfns.size, FRAMES_MAX)
    if q.dma or q.pages:
        raise convert.malformed(f"device access: frames of migration {q.migration_id} are named by number alone")
    return q.migration_id, pfns.view(np.int64)


def _read_frames(q: hmm_pb2.ReadFramesRequest) -> Invocation:
    if q.migration_id:
        place = {"offset": q.offset, "length": q.length or None}
        return invoke(commands_migrate.migrate_vma_read, *_frames_of_migration(q), **place)
    command = commands_hmm.read_dma if q.dma else commands_hmm.read_frames
    return invoke(command, q.mirror_id, *_frames(q), _heard(q), offset=q.offset, length=q.length or None)


def _write_frames(q: hmm_pb2.WriteFramesRequest) -> Invocation:
    if q.migration_id:
        return invoke(commands_migrate.migrate_vma_write, *_frames_of_migration(q), q.data, offset=q.offset)
    command = commands_hmm.write_dma if q.dma else commands_hmm.write_frames
    return invoke(command, q.mirror_id, *_frames(q), q.data, _heard(q), offset=q.offset)


def _pin_pages(q: hmm_pb2.PinPagesRequest) -> Invocation:
    span = convert.range_from_proto(q.range)
    return invoke(commands_process.pin, q.process_id, span, write=q.write, long_term=q.long_term)


CALLS: Mapping[str, Call[Any, Any]] = {
    "attach": Call(
        _attach,
        lambda value, _: hmm_pb2.AttachResponse(mirror_id=value),
        is_kernel_call=False,
    ),
    "detach": Call(
        lambda q: invoke(commands_hmm.detach, q.mirror_id),
        lambda _, result: hmm_pb2.DetachResponse(result=result),
    ),
    "insert_notifier": Call(
        _insert_notifier,
        lambda value, result: hmm_pb2.InsertNotifierResponse(result=result, notifier_id=value or 0),
    ),
    "remove_notifier": Call(
        lambda q: invoke(commands_hmm.remove_notifier, q.mirror_id, q.notifier_id),
        lambda _, result: hmm_pb2.RemoveNotifierResponse(result=result),
    ),
    "read_begin": Call(
        lambda q: invoke(commands_hmm.read_begin, q.mirror_id, q.notifier_id),
        lambda value, result: hmm_pb2.ReadBeginResponse(result=result, notifier_seq=value or 0),
    ),
    "read_retry": Call(
        lambda q: invoke(commands_hmm.read_retry, q.mirror_id, q.notifier_id, q.notifier_seq),
        lambda value, result: hmm_pb2.ReadRetryResponse(result=result, retry=bool(value)),
    ),
    "find_vma": Call(
        lambda q: invoke(commands_hmm.find_vma, q.mirror_id, q.address),
        _find_vma_response,
    ),
    "range_fault": Call(_range_fault, _range_fault_response),
    "migrate_to_device": Call(
        _to_device, lambda value, result: _migrated(hmm_pb2.MigrateToDeviceResponse(result=result), value)
    ),
    "migrate_to_system": Call(
        _to_system, lambda value, result: _migrated(hmm_pb2.MigrateToSystemResponse(result=result), value)
    ),
    "migrate_vma_setup": Call(_set_up, _set_up_response),
    "migrate_vma_allocate": Call(_allocate, _allocate_response),
    "migrate_vma_copy": Call(_copy, lambda _, result: hmm_pb2.MigrateVmaCopyResponse(result=result)),
    "migrate_vma_pages": Call(_pages_step, _pages_response),
    "migrate_vma_finalize": Call(
        lambda q: invoke(commands_migrate.migrate_vma_finalize, q.migration_id, abort=q.abort),
        lambda value, result: _migrated(hmm_pb2.MigrateVmaFinalizeResponse(result=result), value),
    ),
    "evict_device": Call(
        lambda q: invoke(commands_hmm.evict_device, q.device_id),
        lambda value, result: hmm_pb2.EvictDeviceResponse(result=result, page_count=value or 0),
    ),
    "make_exclusive": Call(_make_exclusive, _make_exclusive_response),
    "dma_map": Call(
        lambda q: invoke(commands_hmm.dma_map, q.mirror_id, *_mapped(q), _heard(q)),
        _dma_map_response,
    ),
    "dma_unmap": Call(
        lambda q: invoke(commands_hmm.dma_unmap, q.mirror_id, *_mapped(q)),
        _dma_unmap_response,
    ),
    "read_frames": Call(
        _read_frames,
        lambda value, result: hmm_pb2.ReadFramesResponse(result=result, data=value or b""),
    ),
    "write_frames": Call(_write_frames, lambda _, result: hmm_pb2.WriteFramesResponse(result=result)),
    "pin_pages": Call(
        _pin_pages,
        lambda value, result: hmm_pb2.PinPagesResponse(result=result, pin_id=value or 0),
    ),
    "unpin_pages": Call(
        lambda q: invoke(commands_process.unpin, q.pin_id),
        lambda _, result: hmm_pb2.UnpinPagesResponse(result=result),
    ),
}
