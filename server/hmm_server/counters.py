"""Counters as messages: what was done, how often, how fast.

**Absent**: counting itself, which is done where things happen.
"""

from __future__ import annotations

import resource
from pathlib import Path

from hmm.events import EventType
from hmm.receiver import EVENTS_OF, Receiver
from hmm_proto.v1 import inspection_pb2
from hmm_server import VERSION
from hmm_server.served import ServedMirror
from hmm_server.streams import Streams
from hmm_server.traffic import Traffic


def daemon_statistics(streams: Streams, uptime_s: float) -> inspection_pb2.DaemonStatistics:
    """Counters of the daemon."""
    executor = streams.executor
    machine, operations = executor.machine, executor.operations
    system = machine.frames.regions[0]
    shared, sharing = machine.ksm.shared_and_sharing()
    return inspection_pb2.DaemonStatistics(
        version=VERSION,
        uptime_ms=round(uptime_s * 1000),
        processes=len(machine.processes),
        spaces=len(machine.spaces),
        devices=len(machine.devices),
        mirrors=len(machine.receivers),
        files=len(machine.files),
        frames_used=system.used,
        frames_total=system.total,
        operations=operations.ended_by_name,
        errors=operations.errors_by_reason,
        operations_pending=len(executor.running),
        streams=len(streams.open),
        resident_bytes=_resident_bytes(),
        rejected_answers=streams.rejected,
        swap_used=machine.frames.swap.used if machine.frames.swap else 0,
        swap_total=machine.limits.swap_pages,
        pages_reclaimed=machine.reclaim.reclaimed,
        ksm_pages_shared=shared,
        ksm_pages_sharing=sharing,
        frames_poisoned=machine.frames.poisoned,
    )


def mirror_statistics(mirror: Receiver, served: ServedMirror | None) -> inspection_pb2.MirrorStatistics:
    """Counters of one mirror."""
    counters = mirror.counted()
    traffic = served.traffic if served else Traffic()
    return inspection_pb2.MirrorStatistics(
        mirror_id=mirror.id,
        events_by_type={etype.name: counters[EVENTS_OF[etype]] for etype in EventType if counters[EVENTS_OF[etype]]},
        events_by_reason=traffic.events_by_reason,
        ranges=traffic.ranges,
        pages=traffic.pages,
        bytes=traffic.bytes_sent,
        acknowledged=counters["acknowledged"],
        refused=counters["refused"],
        fenced=counters["fenced"],
        abandoned=counters["abandoned"],
        stale_answers=counters["repeated_answers"] + counters["late_answers"],
        rejected_answers=served.rejected if served else 0,
        faults=counters["faults"],
        fault_pages=counters["faulted_pages"],
        fault_retries=counters["retries"],
        bytes_read=counters["bytes_read"],
        bytes_written=counters["bytes_written"],
        access_errors=counters["refused_accesses"],
        acknowledgement=_latencies(traffic) if served else None,
    )


def _latencies(traffic: Traffic) -> inspection_pb2.Latencies:
    ordered = sorted(traffic.latencies_s)
    return inspection_pb2.Latencies(
        count=traffic.latency_count,
        sum_us=_microseconds(traffic.latency_sum_s),
        max_us=_microseconds(traffic.latency_max_s),
        p50_us=_microseconds(_quantile(ordered, 50)),
        p99_us=_microseconds(_quantile(ordered, 99)),
    )


def _quantile(ordered: list[float], percent: int) -> float:
    return ordered[(len(ordered) - 1) * percent // 100] if ordered else 0.0


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
