"""Violations of the core <-> messages of hmm.v1, side by side.

**Invariants**: converting there and back gives an equal value.

**Absent**: who fills in names and times (the daemon).
"""

from __future__ import annotations

from hmm.violation import Taking, Violation, ViolationKind
from hmm_proto.v1 import violation_pb2

_KINDS = {kind: violation_pb2.ViolationKind.Value(f"VIOLATION_KIND_{kind.name}") for kind in ViolationKind}
_MEMBERS = {number: kind for kind, number in _KINDS.items()}


def violation_to_proto(violation: Violation) -> violation_pb2.AccessViolation:
    """One violation."""
    return violation_pb2.AccessViolation(
        kind=_KINDS[violation.kind],
        mirror_id=violation.mirror_id,
        device_id=violation.device_id,
        device_name=violation.device,
        address=violation.address,
        pages=violation.pages,
        write=violation.write,
        operation_id=violation.operation_id,
        taking=_taking_to_proto(violation.taking) if violation.taking else None,
    )


def violation_from_proto(message: violation_pb2.AccessViolation) -> Violation | None:
    """One violation; None for a kind of a later version."""
    if message.kind not in _MEMBERS:
        return None
    return Violation(
        _MEMBERS[message.kind],
        message.mirror_id,
        message.device_id,
        message.device_name,
        message.address,
        message.pages,
        message.write,
        message.operation_id,
        _taking_from_proto(message.taking) if message.HasField("taking") else None,
    )


def _taking_to_proto(taking: Taking) -> violation_pb2.Taking:
    return violation_pb2.Taking(
        event_sequence=taking.sequence,
        event=taking.event,
        cause=taking.cause,
        start=taking.start,
        end=taking.end,
        operation_id=taking.operation_id,
        operation=taking.operation,
        caller=taking.caller,
        settled=taking.settled,
        acknowledged_by=taking.acknowledged_by,
        acknowledged_ns=taking.acknowledged_ns,
    )


def _taking_from_proto(message: violation_pb2.Taking) -> Taking:
    return Taking(
        message.event_sequence,
        message.event,
        message.cause,
        message.operation_id,
        message.start,
        message.end,
        message.settled,
        message.operation,
        message.caller,
        message.acknowledged_by,
        message.acknowledged_ns,
    )
