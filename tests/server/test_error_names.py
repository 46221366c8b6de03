"""Errors name their operation: every RPC is asked for what cannot be, and says what it was that failed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from hmm_proto.status import MESSAGE_BYTES_MAX
from hmm_proto.v1 import (
    device_pb2,
    file_pb2,
    harness_pb2,
    hmm_pb2,
    inspection_pb2,
    process_pb2,
    session_pb2,
    userfaultfd_pb2,
)

PAGE = 4096
BASE = 0x10000000000
MODULES = (
    process_pb2, device_pb2, hmm_pb2, file_pb2, inspection_pb2, userfaultfd_pb2, harness_pb2, session_pb2,
)  # fmt: skip
METHODS = [
    method
    for module in MODULES
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
TAKE_ANYTHING = {"GetPending", "GetStatistics", "GetViolations", "ListDevices", "ScanKsm", "WatchEvents"}
FAILING = [method for method in METHODS if method.name not in TAKE_ANYTHING]
SHORT = {FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_ENUM}
NAMED = re.compile(r"([a-z][a-z0-9_]*( [a-z0-9_]+){0,2}: |mremap of )")


class Wrong:
    """Makes requests in which little is right: texts too long, arrays of half an entry, unknown members, odd numbers.

    Args:
        number: what every number is that has no value in `right`.
        right: fields with values that make sense.
    """

    def __init__(self, number: int, right: Mapping[str, int]) -> None:
        self._number = number
        self._right = right

    def message(self, kind: Descriptor) -> Message:
        """A message of that type."""
        made: Message = message_factory.GetMessageClass(kind)()
        for field in kind.fields:
            if not (field.containing_oneof and made.WhichOneof(field.containing_oneof.name)):
                self._set(made, field)
        return made

    def _set(self, made: Message, field: FieldDescriptor) -> None:
        value = self._value(field)
        if field.is_repeated:
            getattr(made, field.name).extend([value])
        elif isinstance(value, Message):
            getattr(made, field.name).CopyFrom(value)
        else:
            setattr(made, field.name, value)

    def _value(self, field: FieldDescriptor) -> Any:
        if field.message_type is not None:
            return self.message(field.message_type)
        if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
            return b"odd" if field.type == FieldDescriptor.TYPE_BYTES else "x" * 5000
        if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
            return False
        number = self._right.get(field.name, self._number)
        return number & 0x7FFFFFFF if field.cpp_type in SHORT else number


async def told(served: Any, method: MethodDescriptor, wrong: Wrong) -> str:
    """The message of the error that an RPC ends with, or has in its first response; empty when there is none."""
    kinds = ["stream" if streams else "unary" for streams in (method.client_streaming, method.server_streaming)]
    rpc = getattr(served.channel, "_".join(kinds))(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
    )
    request = wrong.message(method.input_type)
    call = rpc(iter([request]) if method.client_streaming else request, timeout=60)
    try:
        response = await (call.read() if method.server_streaming else call)
    except grpc.aio.AioRpcError as error:
        return error.details() or ""
    if method.name == "Execute":
        return str(response.outcomes[0].not_made.message)
    return str(response.result.message) if "result" in method.output_type.fields_by_name else ""


async def everything(served: Any) -> dict[str, int]:
    """A process with a mapping, a device with a mirror, a file: the fields that name them."""
    pid = await served.new_process()
    await served.mmap(pid, BASE, BASE + 4 * PAGE)
    driver = await served.driver()
    mirror = await driver.mirror(await served.new_process())  # another one, whose changes nobody has to answer
    device = (await served.inspection.ListDevices(inspection_pb2.ListDevicesRequest())).devices[0].device_id
    opened = await served.file.OpenFile(file_pb2.OpenFileRequest(name="f", create=True))
    return {
        "process_id": pid, "mirror_id": mirror, "device_id": device, "file_id": opened.file_id,
        "epoch": driver.welcome.epoch,
    }  # fmt: skip


def name_of(method: MethodDescriptor) -> str:
    """An id of the case."""
    return method.full_name.removeprefix("hmm.v1.")


@pytest.mark.parametrize("method", FAILING, ids=name_of)
async def test_error_names_the_operation_when_nothing_is_there(serve: Any, method: MethodDescriptor) -> None:
    """Whatever finds out that there is no such process, the message begins with what was asked for."""
    served = await serve(harness=True)
    assert NAMED.match(await told(served, method, Wrong(99, {})))


@pytest.mark.parametrize("number", [99, BASE + 1, (1 << 31) - PAGE])
async def test_error_names_the_operation_when_only_objects_are_right(serve: Any, number: int) -> None:
    """The same of errors of kernel calls, which are part of a response, where the objects are there."""
    served = await serve(harness=True)
    messages = [
        (method.name, await told(served, method, Wrong(number, await everything(served))))
        for method in FAILING
        if method.name != "UnregisterMirror"  # it succeeds, if the driver answers
    ]
    assert not [(name, message) for name, message in messages if message and not NAMED.match(message)]
    assert sum(bool(message) for _, message in messages) > len(FAILING) / 2


async def test_error_names_the_call_when_it_was_made_on_a_session(served: Any) -> None:
    """A call that was not made says so by its own name, not by that of the session."""
    driver = await served.driver()
    pages = await driver.make("fault", device_pb2.FaultRequest(mirror_id=99, pages=b"odd"))
    table = await driver.make("set_driver_bits", device_pb2.SetDriverBitsRequest(mirror_id=99))
    assert pages.message == "fault: 3 bytes are no whole number of 8-byte entries"
    assert table.message == "set driver bits: there is no mirror 99"


async def test_error_arrives_when_its_message_has_a_long_name(served: Any) -> None:
    """gRPC takes 8 KiB of metadata, where a message travels twice: a longer one is cut off."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.file.OpenFile(file_pb2.OpenFileRequest(name="\N{GRINNING FACE}" * 1000))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    message = caught.value.details() or ""
    assert message.startswith("open: there is no file \N{GRINNING FACE}")
    assert len(message.encode()) <= MESSAGE_BYTES_MAX


async def test_status_tells_the_revision_of_the_space_to_those_who_may_see_it(served: Any) -> None:
    """Whoever has heard of events can tell which of them came before; of others' processes nothing is told."""
    pid = await served.new_process(metadata=(("hmm-token", "mine"),))
    await served.process.Mmap(
        process_pb2.MmapRequest(process_id=pid, address=BASE, length=PAGE, prot=3, flags=0x32),
        metadata=(("hmm-token", "mine"),),
    )
    malformed = inspection_pb2.WalkAddressRequest(process_id=pid, address=1 << 60)
    revision = served.daemon.machine.processes[pid].space.notifier.revision
    told = await _metadata(served.inspection.WalkAddress(malformed, metadata=(("hmm-token", "mine"),)))
    assert (told["operation"], told["processId"]) == ("walk address", str(pid))
    assert int(told.get("revision", 0)) == revision
    assert "revision" not in await _metadata(served.inspection.WalkAddress(malformed))


async def _metadata(call: Any) -> dict[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    status = rpc_status.from_call(caught.value)
    assert status is not None
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return dict(info.metadata)
