"""What devices and drivers did that they must not, as messages: with the names and times that the core does not know.

**Absent**: finding it (`hmm.sanitizer`, answers.py), who may see it (services/inspection.py).
"""

from __future__ import annotations

from hmm.machine import Machine
from hmm.receiver import Receiver
from hmm.sanitizer import Reports
from hmm_proto.v1 import inspection_pb2, violation_pb2
from hmm_proto.violations import violation_to_proto
from hmm_server.streams import Streams


def mirror_report(streams: Streams, receiver: Receiver, *, gone: bool) -> inspection_pb2.MirrorReport:
    """What one mirror's device did that it must not."""
    reports: Reports = receiver.reports
    served = streams.served.get(receiver.id)
    violations = [violation_to_proto(violation) for violation in reports.kept]
    for violation in violations:
        complete(streams, violation)
    return inspection_pb2.MirrorReport(
        mirror_id=receiver.id,
        device_id=receiver.device.id,
        device_name=receiver.device.name,
        driver_name=served.stream.name if served else "",
        gone=gone,
        counts={kind.name: count for kind, count in reports.counts.items()},
        violations=violations,
    )


def receivers(machine: Machine) -> list[tuple[Receiver, bool]]:
    """All that have something to report, those that are gone first, with whether they are gone."""
    past = [(receiver, True) for receiver in machine.past_receivers]
    return past + [(receiver, False) for receiver in machine.receivers.values()]


def complete(streams: Streams, violation: violation_pb2.AccessViolation) -> None:
    """Fill in who made the call that took the translation, and who acknowledged it when."""
    if not violation.HasField("taking"):
        return
    taking = violation.taking
    executor = streams.executor
    running, ended = executor.running.get(taking.operation_id), executor.operations.get(taking.operation_id)
    if running is not None:
        taking.operation, taking.caller = running.record.name, running.record.caller.name
    elif ended is not None:
        taking.operation, taking.caller = ended.name, ended.caller
    served = streams.served.get(violation.mirror_id)
    if served is not None:
        taking.acknowledged_by = f"{served.stream.name or 'unnamed'} (pid {served.stream.pid})"
        taking.acknowledged_ns = served.when_answered(taking.event_sequence)
