"""Making a call: from a request to a command of the core, and from its record to a response.

A `Call` says both for one kind of request, so that the same call can be made alone, in a batch or on a session.

Errors part here.  A kernel call that was made and failed is a response with a `CallResult`; a call that was never
made is raised, and becomes a status (or `not_made` in a batch or on a session).

**Absent**: the calls themselves (process_calls.py, device_calls.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import grpc.aio
from google.protobuf.message import Message

from hmm.errors import HmmError
from hmm.operation_record import Caller, OperationRecord
from hmm_proto.status import DRAINING_REASON, INTERNAL_REASON, is_not_made, to_call_result
from hmm_proto.v1 import types_pb2
from hmm_server.callers import caller_from
from hmm_server.executor import DrainingError, Executor
from hmm_server.logs import about

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)
BREATH_S = 0.005
"""Whoever makes many calls in one message lets others run at the latest after this time."""
log = logging.getLogger(__name__)


class Invocation(NamedTuple):
    """A command of the core with its arguments, ready for `Machine.start`.

    Attributes:
        npages: how many pages it asks for, where that is limited.
    """

    command: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    npages: int = 0


def invoke(command: Callable[..., Any], *arguments: Any, **keywords: Any) -> Invocation:
    """A command with its arguments."""
    return Invocation(command, arguments, keywords)


@dataclass(frozen=True, slots=True)
class Call(Generic[Q, R]):
    """One kind of call.

    Attributes:
        invocation: the command that a request asks for; raises when the request makes no sense.
        response: from the command's value (None when the call failed) and how it ended.
        is_kernel_call: its errors are results; False: every error is raised.
    """

    invocation: Callable[[Q], Invocation]
    response: Callable[[Any, types_pb2.CallResult], R]
    is_kernel_call: bool = True

    def respond(self, record: OperationRecord[Any]) -> R:
        """The response to a call that has ended.

        Raises: what the call raised, when it was never made or is no kernel call.
        """
        error = record.error
        if error is None:
            result = types_pb2.CallResult()
            result.operation_id = record.id
            if record.fenced:
                result.fenced_mirrors.extend(record.fenced)
            return self.response(record.value, result)
        if not (self.is_kernel_call and isinstance(error, HmmError) and not is_not_made(error)):
            raise error
        return self.response(None, to_call_result(error, record.id, tuple(record.fenced)))


async def make(executor: Executor, caller: Caller, call: Call[Q, R], request: Q, within_s: float | None = None) -> R:
    """Make one call and wait for its end.

    Raises:
        HmmError: it was not made, is no kernel call, or has not ended within `within_s` seconds.
        DrainingError: the daemon is ending.
    """
    invocation = call.invocation(request)
    record = await executor.call_within(
        within_s, caller, invocation.command, *invocation.arguments, **invocation.keywords
    )
    return call.respond(record)


def rpc(call: Call[Any, Any]) -> Any:
    """The method of a servicer that makes one call with its `executor`, for whom the RPC's metadata name."""

    async def method(self: Any, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        return await make(self.executor, caller_from(context.invocation_metadata()), call, request)

    return method


async def attempt(
    executor: Executor, caller: Caller, name: str, call: Call[Q, R], request: Q
) -> R | types_pb2.CallResult:
    """As `make`, for the call of that name in a batch.  Returns: the response, or why the call was not made."""
    try:
        return await make(executor, caller, call, request)
    except Exception as error:  # noqa: BLE001 - one call of a batch must not end the others; not_made() logs bugs
        return not_made(name, error)


def not_made(name: str, error: BaseException, record: OperationRecord[Any] | None = None) -> types_pb2.CallResult:
    """Why the call of that name in a batch or on a session was not made, or that it hit a bug.

    Args:
        record: the call, if it was started and its error does not say so.
    """
    operation_id: int = getattr(error, "operation_id", 0) if record is None else record.id
    if isinstance(error, HmmError):
        return to_call_result(error.named(name.replace("_", " ")), operation_id)
    if isinstance(error, DrainingError):
        return types_pb2.CallResult(reason=DRAINING_REASON, message="the daemon is ending")
    if not hasattr(error, "operation_id"):  # what ended the call itself has been logged by the executor
        log.error("%s hit a bug", name, exc_info=error, extra=about(record))
    message = "a bug of the daemon; see its log"
    return types_pb2.CallResult(operation_id=operation_id, reason=INTERNAL_REASON, message=message)
