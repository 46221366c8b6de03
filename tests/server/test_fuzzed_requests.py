"""Requests made up from the descriptors of hmm.v1: none of them hits a bug, whatever is in its fields."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message

from hmm_proto.status import INTERNAL_REASON
from hmm_proto.v1 import (
    device_pb2,
    file_pb2,
    harness_pb2,
    hmm_pb2,
    inspection_pb2,
    process_pb2,
    session_pb2,
    types_pb2,
    userfaultfd_pb2,
)

PAGE = 4096
BASE = 0x10000000000
MODULES = (process_pb2, device_pb2, hmm_pb2, file_pb2, inspection_pb2, userfaultfd_pb2, harness_pb2)
METHODS = [
    method
    for module in MODULES
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
    if not (method.client_streaming or method.server_streaming)
]
NUMBERS = (
    0, 1, 2, 3, 7, 255, PAGE - 1, PAGE, PAGE + 1, BASE, BASE + 1, BASE + PAGE, BASE + 8 * PAGE, (1 << 31) - 1, 1 << 31,
    (1 << 32) - 1, 0x7FFFFFFFF000, 1 << 47, (1 << 63) - 1, 1 << 63, (1 << 64) - PAGE, (1 << 64) - 1,
)  # fmt: skip
TEXTS = ("", "a", "gpu0", "x" * 65, "9" * 5000, "\0", "é" * 70, "-1", "18446744073709551616")
UNSIGNED_32 = (FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_FIXED32)
SIGNED_32 = (FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_ENUM)
BUGS = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DEADLINE_EXCEEDED}


class Fuzz:
    """Fills messages from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def message(self, kind: Any, depth: int = 0) -> Message:
        """A message of that type."""
        made: Message = message_factory.GetMessageClass(kind)()
        self.fill(made, depth)
        return made

    def fill(self, message: Any, depth: int = 0) -> None:
        """Set most fields of a message, and one of each oneof."""
        chosen = {
            oneof.name: self.random.choice(oneof.fields) for oneof in message.DESCRIPTOR.oneofs if len(oneof.fields) > 1
        }
        for field in message.DESCRIPTOR.fields:
            oneof = field.containing_oneof
            if oneof is not None and chosen.get(oneof.name, field) is not field:
                continue
            if oneof is not None or self.random.random() < 0.85:
                self._set(message, field, depth)

    def _set(self, message: Any, field: FieldDescriptor, depth: int) -> None:
        if field.type != FieldDescriptor.TYPE_MESSAGE:
            if field.is_repeated:
                getattr(message, field.name).extend(self._value(field) for _ in range(self.random.choice((0, 1, 1, 2))))
            else:
                setattr(message, field.name, self._value(field))
        elif depth < 4:
            inner = getattr(message, field.name)
            for part in [inner.add() for _ in range(self.random.randrange(3))] if field.is_repeated else [inner]:
                part.SetInParent()
                self.fill(part, depth + 1)

    def _value(self, field: FieldDescriptor) -> Any:
        match field.type:
            case FieldDescriptor.TYPE_BOOL:
                return self.random.random() < 0.5
            case FieldDescriptor.TYPE_STRING:
                return self.random.choice(TEXTS)
            case FieldDescriptor.TYPE_BYTES:
                return self._bytes()
        number = self._number(field.name)
        if field.name == "policy":  # a driver that never answers would be waited for, as BLOCK promises
            return self.random.choice((types_pb2.DEADLINE_POLICY_FENCE, types_pb2.DEADLINE_POLICY_FAIL, 99))
        if field.type in UNSIGNED_32:
            return number & 0xFFFFFFFF
        return number % 100 - 1 if field.type in SIGNED_32 else number

    def _number(self, name: str) -> int:
        choose = self.random
        if name.endswith("_id") and choose.random() < 0.9:
            return choose.randrange(1, 4)
        if name in ("start", "end", "starts", "ends", "address", "addresses") and choose.random() < 0.7:
            return BASE + choose.randrange(20) * PAGE
        if "length" in name and choose.random() < 0.6:
            return choose.choice((1, PAGE, 10 * PAGE))
        return choose.choice(NUMBERS)

    def _bytes(self) -> bytes:
        if self.random.random() < 0.4:
            return bytes(self.random.choice((0, 1, 7, 9, PAGE, PAGE + 1)))
        words = [self.random.choice((BASE + number * PAGE, self._number(""))) for number in range(3)]
        return struct.pack("<3Q", *words)


async def _furnish(served: Any) -> Any:
    for _ in range(2):
        pid = await served.new_process()
        await served.mmap(pid, BASE, BASE + 16 * PAGE)
    driver = await served.driver()
    for name, fields in (("plain", {}), ("memory", {"memory_pages": 64}), ("dma", {"dma": True})):
        device = await driver.make("register_device", device_pb2.RegisterDeviceRequest(name=name, **fields))
        if name != "memory":
            mirroring = device_pb2.RegisterMirrorRequest(device_id=device.device_id, process_id=1, no_fault_events=True)
            await driver.make("register_mirror", mirroring)
        attached = await driver.make("attach", hmm_pb2.AttachRequest(device_id=device.device_id, process_id=1))
        inserting = hmm_pb2.InsertNotifierRequest(mirror_id=attached.mirror_id, start=BASE, length=16 * PAGE)
        await driver.make("insert_notifier", inserting)
    return driver


def _results(message: Any) -> list[Any]:
    """Every CallResult in a response."""
    if message.DESCRIPTOR.name == "CallResult":
        return [message]
    found = []
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE and not field.message_type.GetOptions().map_entry:
            for part in value if field.is_repeated else (value,):
                found += _results(part)
    return found


def _stub(served: Any, method: MethodDescriptor) -> Callable[..., Any]:
    stub: Callable[..., Any] = served.channel.unary_unary(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=message_factory.GetMessageClass(method.input_type).SerializeToString,
        response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
    )
    return stub


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
async def test_no_request_hits_a_bug(serve: Any, seed: int) -> None:
    """Every request is answered in time, by a result or by a status that says whose mistake it was."""
    served = await serve(harness=True, acknowledgement_s=0.05, fault_s=0.05, swap_pages=1024)
    await _furnish(served)
    fuzz = Fuzz(seed)
    for method in fuzz.random.choices(METHODS, k=250):
        request = fuzz.message(method.input_type)
        try:
            response = await _stub(served, method)(request, timeout=120)
        except grpc.aio.AioRpcError as error:
            is_bug = error.code() in BUGS
        else:
            is_bug = any(result.reason == INTERNAL_REASON for result in _results(response))
        assert not is_bug, f"{method.name}: {request}"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
async def test_no_call_of_a_session_hits_a_bug(serve: Any, seed: int) -> None:
    """The same on a session, which survives all of it."""
    served = await serve(harness=True, acknowledgement_s=0.05, fault_s=0.05, swap_pages=1024)
    driver = await _furnish(served)
    fuzz = Fuzz(seed)
    for _ in range(250):
        made: Any = fuzz.message(session_pb2.SessionCall.DESCRIPTOR)
        name = made.WhichOneof("call")
        inside = (made.in_callback_mirror_id, made.in_callback_sequence) if made.in_callback_mirror_id else None
        reply = await (await driver.send(name, getattr(made, name), inside))
        for result in _results(reply):
            assert result.reason != INTERNAL_REASON, str(made)
    assert not driver.ended.done()
