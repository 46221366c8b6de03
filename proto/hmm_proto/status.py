"""HmmError <-> google.rpc.Status and CallResult: one table, and the functions that read it side by side.

An error survives the journey: what the client raises has the class, errno, reason, address, notifier sequence and
hole of what the core raised.  It travels in two ways.  A call that was not made is a status with one `ErrorInfo`, whose
metadata say which call it was and what that was about.  A kernel call that was made and failed is a `CallResult` in the
response, since it may have had effects.

**Source**: google/rpc/error_details.proto (ErrorInfo); include/uapi/asm-generic/errno.h for the numbers.

**Invariants**: every class of `hmm.errors` has a row; a reason belongs to one class only; both round trips lose
nothing.

**Absent**: gRPC calls; the daemon's interceptor and the client library turn a Status into one and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from hmm.errors import (
    AccessDeniedError,
    BadAddressError,
    ConflictError,
    DeviceLostError,
    HmmError,
    InUseError,
    InvalidRequestError,
    NoSuchObjectError,
    OutOfFramesError,
    RangeBusyError,
    SegmentationFault,
    Signal,
    TimedOutError,
    WouldDeadlockError,
)
from hmm_proto.v1 import types_pb2
from hmm_proto.violations import violation_from_proto, violation_to_proto

DOMAIN = "hmm.v1"
INTERNAL_REASON = "INTERNAL"
"""Reason of a call that a bug of the daemon ended; its text stays in the daemon's log."""
_NUMBERS = frozenset(
    {
        *("process_id", "device_id", "mirror_id", "notifier_id", "file_id", "pin_id", "userfaultfd_id", "operation_id"),
        "migration_id",
        *("notifier_seq", "event_sequence", "heard_sequence", "epoch"),
    }
)
"""Fields of requests that say in numbers what a call is about."""
MESSAGE_BYTES_MAX = 1024
"""Of a status; what is longer is cut off."""
DRAINING_REASON = "DRAINING"
"""Reason of a call that was not made because the daemon is ending."""


@dataclass(frozen=True, slots=True)
class Row:
    """How one class of errors travels.

    Attributes:
        code: of the status.
        reasons: that instances may carry; the class's own comes first.
        not_made: those that say that the call was never made, so that a kernel call ends with a status as well.
    """

    error: type[HmmError]
    code: grpc.StatusCode
    reasons: tuple[str, ...]
    not_made: frozenset[str] = frozenset()


def _row(error: type[HmmError], code: grpc.StatusCode, *finer: str, not_made: tuple[str, ...] = ()) -> Row:
    return Row(error, code, (error.reason, *finer), frozenset(not_made))


TABLE: tuple[Row, ...] = (
    _row(HmmError, grpc.StatusCode.INVALID_ARGUMENT),
    _row(InvalidRequestError, grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED", not_made=("MALFORMED",)),
    _row(BadAddressError, grpc.StatusCode.OUT_OF_RANGE),
    _row(SegmentationFault, grpc.StatusCode.OUT_OF_RANGE),
    _row(
        AccessDeniedError,
        grpc.StatusCode.PERMISSION_DENIED,
        "NOT_OWNER",
        "HARNESS_OFF",
        not_made=("NOT_OWNER", "HARNESS_OFF"),
    ),
    _row(RangeBusyError, grpc.StatusCode.ABORTED, "STEP_UNDER_WAY"),
    _row(WouldDeadlockError, grpc.StatusCode.FAILED_PRECONDITION, not_made=("INSIDE_CALLBACK",)),
    _row(OutOfFramesError, grpc.StatusCode.RESOURCE_EXHAUSTED, "DEVICE_MEMORY", "LIMIT", not_made=("LIMIT",)),
    _row(
        NoSuchObjectError,
        grpc.StatusCode.NOT_FOUND,
        *("PROCESS", "DEVICE", "MIRROR", "FILE", "OPERATION", "HOLD", "MIGRATION_ENDED"),
        not_made=("NO_SUCH_OBJECT", "PROCESS", "DEVICE", "MIRROR", "FILE", "OPERATION", "HOLD", "MIGRATION_ENDED"),
    ),
    _row(ConflictError, grpc.StatusCode.ALREADY_EXISTS, "OVERLAP"),
    _row(InUseError, grpc.StatusCode.FAILED_PRECONDITION),
    _row(DeviceLostError, grpc.StatusCode.FAILED_PRECONDITION),
    _row(TimedOutError, grpc.StatusCode.DEADLINE_EXCEEDED, "LEASE_ENDED"),
)

_BY_CLASS = {row.error: row for row in TABLE}
_BY_REASON = {reason: row for row in TABLE for reason in row.reasons}


def is_not_made(error: HmmError) -> bool:
    """True when the error says that a kernel call was never made: it is a status then, not a result."""
    return error.reason in _BY_CLASS[type(error)].not_made


# ---- google.rpc.Status


def to_status(
    error: HmmError, operation: str = "", request: Message | None = None, revision: int = 0
) -> status_pb2.Status:
    """The status of a call that was not made.

    Args:
        operation: the call, in words.
        request: what was asked for; ids, ranges and sequences in it go along.
        revision: of the address space that it is about; 0: not told.
    """
    metadata = {"errno": str(error.errno)} | subject(request)
    if operation:
        metadata["operation"] = operation
    metadata |= {
        name: str(value)
        for name, value in (
            ("address", error.address),
            ("notifierSeq", error.notifier_seq),
            ("holeEnd", error.hole_end),
            ("operationId", error.operation_id or None),
            ("revision", revision or None),
        )
        if value is not None
    }
    if isinstance(error, SegmentationFault):
        metadata["signal"] = error.signal.value
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata))
    code: int = _BY_CLASS[type(error)].code.value[0]
    return status_pb2.Status(code=code, message=_shortened(error.message), details=[detail])


def subject(request: Message | None) -> dict[str, str]:
    """What a request is about: its numbers that name something, in JSON names, and the range, as `start` and `end`."""
    found: dict[str, str] = {}
    if request is None:
        return found
    for field, value in request.ListFields():
        if field.name in _NUMBERS:
            found[field.json_name] = str(value)
        elif field.name == "range":
            found |= {"start": str(value.start), "end": str(value.end)}
        elif field.name == "ranges" and value.starts and value.ends:
            found |= {"start": str(value.starts[0]), "end": str(value.ends[-1])}
    length = getattr(request, "length", 0) or getattr(request, "old_length", 0)
    start = getattr(request, "address", 0) or getattr(request, "start", 0)
    if start and length and isinstance(length, int):
        found |= {"start": str(start), "end": str(start + length)}
    return found


def _shortened(message: str) -> str:
    # It travels twice in the metadata, of which gRPC takes 8 KiB, and may have a name that a client gave.
    return message.encode()[:MESSAGE_BYTES_MAX].decode(errors="ignore")


def from_status(status: status_pb2.Status) -> HmmError | None:
    """The error that a status carries; None when it is not one of ours."""
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Unpack(info) and info.domain == DOMAIN and info.reason in _BY_REASON:
            error = _error(
                info.reason,
                status.message,
                int(info.metadata.get("errno", "0")),
                _number(info.metadata, "address"),
                _number(info.metadata, "notifierSeq"),
                _number(info.metadata, "holeEnd"),
                info.metadata.get("signal", ""),
            )
            error.operation_id = _number(info.metadata, "operationId") or 0
            return error
    return None


def _number(metadata: Mapping[str, str], name: str) -> int | None:
    return int(metadata[name]) if name in metadata else None


# ---- CallResult


def to_call_result(error: HmmError | None, operation_id: int = 0, fenced: tuple[int, ...] = ()) -> types_pb2.CallResult:
    """How a kernel call ended."""
    if error is None:
        return types_pb2.CallResult(operation_id=operation_id, fenced_mirrors=fenced)
    result = types_pb2.CallResult(
        operation_id=operation_id,
        errno=error.errno,
        reason=error.reason,
        message=error.message,
        address=error.address,
        hole_end=error.hole_end,
        notifier_seq=error.notifier_seq,
        fenced_mirrors=fenced,
    )
    if isinstance(error, SegmentationFault):
        result.signal = types_pb2.Signal.Value(f"SIGNAL_{error.signal.value}")
    if error.violation is not None:
        result.violation.CopyFrom(violation_to_proto(error.violation))
    return result


def from_call_result(result: types_pb2.CallResult) -> HmmError | None:
    """The error that a kernel call ended with; None on success."""
    if not result.reason:
        return None
    error = _error(
        result.reason,
        result.message,
        result.errno,
        result.address if result.HasField("address") else None,
        result.notifier_seq if result.HasField("notifier_seq") else None,
        result.hole_end if result.HasField("hole_end") else None,
        types_pb2.Signal.Name(result.signal).removeprefix("SIGNAL_") if result.signal else "",
    )
    error.operation_id = result.operation_id
    if result.HasField("violation"):
        error.violation = violation_from_proto(result.violation)
    return error


def _error(
    reason: str,
    message: str,
    errno: int,
    address: int | None,
    notifier_seq: int | None,
    hole_end: int | None,
    signal: str = "",
) -> HmmError:
    row = _BY_REASON.get(reason, TABLE[0])
    if row.error is SegmentationFault and signal:
        return SegmentationFault(message, Signal(signal), address or 0)
    kind = BadAddressError if row.error is SegmentationFault else row.error
    return kind(message, errno, address=address, notifier_seq=notifier_seq, hole_end=hole_end, reason=reason)
