"""HmmService: today's interface for clients that make one call at a time.

**Absent**: what the calls do (`hmm.commands_hmm`, `hmm.commands_migrate`), how requests become commands (hmm_calls.py);
events and answers, which come by DeviceService's stream.
"""

from __future__ import annotations

from typing import Any

import grpc

from hmm_server.callers import caller_from
from hmm_server.device_side import DeviceSide

Context = grpc.aio.ServicerContext[Any, Any]


def _rpc(name: str) -> Any:
    async def rpc(self: HmmService, request: Any, context: Context) -> Any:
        return await self.side.make(caller_from(context.invocation_metadata()), name, request)

    return rpc


class HmmService:
    """Interval notifiers, range faults, migration, exclusive access, DMA, pins."""

    def __init__(self, side: DeviceSide) -> None:
        self.side = side

    Attach = _rpc("attach")
    Detach = _rpc("detach")
    InsertNotifier = _rpc("insert_notifier")
    RemoveNotifier = _rpc("remove_notifier")
    ReadBegin = _rpc("read_begin")
    ReadRetry = _rpc("read_retry")
    FindVma = _rpc("find_vma")
    RangeFault = _rpc("range_fault")
    MigrateToDevice = _rpc("migrate_to_device")
    MigrateToSystem = _rpc("migrate_to_system")
    MigrateVmaSetup = _rpc("migrate_vma_setup")
    MigrateVmaAllocate = _rpc("migrate_vma_allocate")
    MigrateVmaCopy = _rpc("migrate_vma_copy")
    MigrateVmaPages = _rpc("migrate_vma_pages")
    MigrateVmaFinalize = _rpc("migrate_vma_finalize")
    EvictDevice = _rpc("evict_device")
    MakeExclusive = _rpc("make_exclusive")
    DmaMap = _rpc("dma_map")
    DmaUnmap = _rpc("dma_unmap")
    ReadFrames = _rpc("read_frames")
    WriteFrames = _rpc("write_frames")
    PinPages = _rpc("pin_pages")
    UnpinPages = _rpc("unpin_pages")
