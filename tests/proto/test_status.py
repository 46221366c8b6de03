"""Errors survive the journey from the core to a client, by status and by result."""

from __future__ import annotations

import errno as errnos
from collections import Counter

import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2

from hmm.errors import AccessDeniedError, BadAddressError, HmmError, OutOfFramesError, SegmentationFault, Signal
from hmm.violation import Taking, Violation, ViolationKind
from hmm_proto import status
from hmm_proto.v1 import device_pb2, hmm_pb2, process_pb2
from hmm_proto.v1.range_pb2 import AddressRange, AddressRanges


def _all_classes(root: type[HmmError]) -> list[type[HmmError]]:
    return [root, *(found for child in root.__subclasses__() for found in _all_classes(child))]


CLASSES = _all_classes(HmmError)


def _example(error_class: type[HmmError]) -> HmmError:
    if error_class is SegmentationFault:
        return SegmentationFault("touch: nothing is mapped", Signal.SEGV_MAPERR, 0x7000)
    return error_class("munmap [0x1000, 0x2000): no", errnos.EBUSY, address=0x1000, notifier_seq=7, hole_end=1 << 46)


def _attributes(error: HmmError) -> tuple[object, ...]:
    return (
        type(error), error.message, error.errno, error.reason, error.address, error.notifier_seq, error.hole_end,
        getattr(error, "signal", None), error.operation_id,
    )  # fmt: skip


TAKING = Taking(5, "MUNMAP", "munmap", 70, 0x1000, 0x4000, True, "munmap", "program", "gpu (pid 7)", 1_700_000_000)


@pytest.mark.parametrize("error_class", CLASSES)
def test_status_returns_equal_error_when_decoded(error_class: type[HmmError]) -> None:
    """Class, errno, reason, address, sequence, hole, operation of every class of errors survive a google.rpc.Status."""
    error = _example(error_class)
    error.operation_id = 12
    decoded = status.from_status(status.to_status(error))
    assert decoded is not None
    assert _attributes(decoded) == _attributes(error)


def test_status_says_which_call_it_was_and_what_that_was_about() -> None:
    """What a program needs to know of a call that another part of it made: objects, range and sequences."""
    error = HmmError("no")
    error.operation_id = 12
    request = hmm_pb2.RangeFaultRequest(mirror_id=3, notifier_id=4, notifier_seq=6, range=AddressRange(start=1, end=9))
    sent = status.to_status(error, "range fault", request, revision=8)
    info = error_details_pb2.ErrorInfo()
    assert sent.details[0].Unpack(info)
    assert dict(info.metadata) == {
        "errno": "22", "operation": "range fault", "operationId": "12", "revision": "8",
        "mirrorId": "3", "notifierId": "4", "notifierSeq": "6", "start": "1", "end": "9",
    }  # fmt: skip
    decoded = status.from_status(sent)
    assert decoded is not None
    assert decoded.operation_id == 12


@pytest.mark.parametrize(
    ("request_", "about"),
    [
        (process_pb2.MunmapRequest(process_id=1, address=4096, length=8192), ("4096", "12288")),
        (process_pb2.MremapRequest(process_id=1, address=4096, old_length=4096), ("4096", "8192")),
        (device_pb2.FaultRequest(ranges=AddressRanges(starts=[4096, 16384], ends=[8192, 20480])), ("4096", "20480")),
        (process_pb2.BrkRequest(process_id=1, address=4096), (None, None)),
        (process_pb2.CreateProcessRequest(name="p"), (None, None)),
    ],
)
def test_status_says_the_range_however_a_request_names_it(request_: Message, about: tuple[str | None, ...]) -> None:
    """First byte and first byte behind; nothing where a call is about no range."""
    found = status.subject(request_)
    assert (found.get("start"), found.get("end")) == about


@pytest.mark.parametrize("error_class", CLASSES)
def test_call_result_returns_equal_error_when_decoded(error_class: type[HmmError]) -> None:
    """The same holds for errors of kernel calls, which travel in responses."""
    error = _example(error_class)
    error.operation_id = 12
    result = status.to_call_result(error, 12, (3, 4))
    decoded = status.from_call_result(result)
    assert decoded is not None
    assert _attributes(decoded) == _attributes(error)
    assert (result.operation_id, list(result.fenced_mirrors)) == (12, [3, 4])


@pytest.mark.parametrize("row", status.TABLE, ids=lambda row: row.error.__name__)
def test_status_keeps_reason_when_finer_than_class(row: status.Row) -> None:
    """Every reason of the table leads back to its own class."""
    if row.error is SegmentationFault:
        return
    for reason in row.reasons:
        decoded = status.from_status(status.to_status(row.error("no", reason=reason)))
        assert decoded is not None
        assert (type(decoded), decoded.reason) == (row.error, reason)


def test_table_names_each_class_and_reason_once() -> None:
    """A reason belongs to one class, or decoding could not tell which to raise."""
    assert Counter(row.error for row in status.TABLE) == Counter(CLASSES)
    reasons = Counter(reason for row in status.TABLE for reason in row.reasons)
    assert set(reasons.values()) == {1}


def test_error_without_address_decodes_to_none() -> None:
    """Zero is an address; its absence is told apart from it."""
    absent = status.from_status(status.to_status(BadAddressError("no")))
    zero = status.from_status(status.to_status(BadAddressError("no", address=0)))
    assert absent is not None
    assert zero is not None
    assert (absent.address, zero.address) == (None, 0)
    result = status.from_call_result(status.to_call_result(BadAddressError("no", address=0)))
    assert result is not None
    assert result.address == 0


def test_call_result_is_no_error_on_success() -> None:
    """A call that succeeded has neither errno nor reason."""
    result = status.to_call_result(None, 5)
    assert (result.errno, result.reason) == (0, "")
    assert status.from_call_result(result) is None


def test_foreign_status_decodes_to_none() -> None:
    """A status of gRPC itself, or of another domain, is not taken for one of ours."""
    foreign = status.to_status(BadAddressError("no"))
    foreign.details[0].value = foreign.details[0].value.replace(b"hmm.v1", b"hmm.v9")
    assert status.from_status(foreign) is None
    del foreign.details[:]
    assert status.from_status(foreign) is None


def test_not_made_tells_ownership_from_protection() -> None:
    """EACCES of mprotect is a result of the call; a process that belongs to another is a call never made."""
    assert status.is_not_made(AccessDeniedError("no", errnos.EPERM, reason="NOT_OWNER"))
    assert not status.is_not_made(AccessDeniedError("no", errnos.EACCES))
    assert status.is_not_made(OutOfFramesError("no", reason="LIMIT"))
    assert not status.is_not_made(OutOfFramesError("no"))


@pytest.mark.parametrize("taking", [None, TAKING])
def test_call_result_keeps_the_violation_of_an_access(taking: Taking | None) -> None:
    """What a device did that it must not reaches its driver whole."""
    error = BadAddressError("gone", address=0x1000)
    error.violation = Violation(ViolationKind.USE_AFTER_INVALIDATION, 1, 2, "gpu", 0x1000, 3, True, 77, taking)
    decoded = status.from_call_result(status.to_call_result(error, 77))
    assert decoded is not None
    assert decoded.violation == error.violation


def test_call_result_of_an_unknown_violation_is_still_its_error() -> None:
    """A newer daemon may know more kinds."""
    result = status.to_call_result(BadAddressError("gone"), 77)
    result.violation.kind = 99  # type: ignore[assignment]
    decoded = status.from_call_result(result)
    assert isinstance(decoded, BadAddressError)
    assert decoded.violation is None
