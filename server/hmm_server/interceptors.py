"""The guard round every RPC: tokens in, errors out, one log line for each.

An HmmError becomes its google.rpc.Status, which names the call and what it was about.  Anything else is a bug: the
client sees INTERNAL without text, the log has the traceback (gRPC's own default is UNKNOWN with the exception's text).
Bytes that are no message reach a handler as the error that they are, to be raised by `require_read`: one message at a
time where requests come in a stream.

**Invariants**: no exception of a service reaches gRPC.

**Absent**: errors of kernel calls that were made; they are in responses (calls.py).
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeAlias

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from hmm.errors import AccessDeniedError, HmmError
from hmm.machine import Machine
from hmm_proto import convert
from hmm_proto.status import DOMAIN, DRAINING_REASON, INTERNAL_REASON, to_status
from hmm_server.callers import Tokens, UnknownTokenError, caller_from
from hmm_server.executor import DrainingError

OUR_METHODS = "/hmm.v1."
log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class Guard(grpc.aio.ServerInterceptor):
    """Wraps the handlers of hmm.v1; others (health, reflection) pass."""

    def __init__(self, machine: Machine, tokens: Tokens) -> None:
        self._machine = machine
        self._tokens = tokens
        self._guarded: dict[str, Handler] = {}
        self._active = 0
        self._quiet = asyncio.Event()
        self._quiet.set()

    async def quiet(self) -> None:
        """Wait until no call of hmm.v1 is under way."""
        await self._quiet.wait()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """The guarded handler of a method; each is made once."""
        method = handler_call_details.method
        if method not in self._guarded:
            handler = await continuation(handler_call_details)
            if handler is None or not method.startswith(OUR_METHODS):
                return handler
            self._guarded[method] = self._guard(method, handler)
        return self._guarded[method]

    def _revision(self, error: HmmError, request: Message | None) -> int:
        # Of the address space that was asked about; of somebody else's nothing is told.
        if isinstance(error, AccessDeniedError):
            return 0
        receiver = self._machine.receivers.get(getattr(request, "mirror_id", 0))
        owner = receiver or self._machine.processes.get(getattr(request, "process_id", 0))
        return owner.space.notifier.revision if owner else 0

    def _guard(self, method: str, handler: Handler) -> Handler:
        kind = ("stream" if handler.request_streaming else "unary", "stream" if handler.response_streaming else "unary")
        behaviour = getattr(handler, "_".join(kind))
        wrap = self._wrap_generator if inspect.isasyncgenfunction(behaviour) else self._wrap_coroutine
        make = getattr(grpc, f"{'_'.join(kind)}_rpc_method_handler")
        guarded: Handler = make(
            wrap(method, behaviour),
            request_deserializer=_reading(_in_words(method), handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )
        return guarded

    def _wrap_coroutine(self, method: str, behaviour: Any) -> Any:
        async def guarded(request: Any, context: Context) -> Any:
            async with self._watching(method, request, context):
                require_read(request)
                return await behaviour(request, context)

        return guarded

    def _wrap_generator(self, method: str, behaviour: Any) -> Any:
        async def guarded(request: Any, context: Context) -> AsyncIterator[Any]:
            async with self._watching(method, request, context):
                require_read(request)
                async with aclosing(behaviour(request, context)) as responses:
                    async for response in responses:
                        yield response

        return guarded

    @asynccontextmanager
    async def _watching(self, method: str, request: Any, context: Context) -> AsyncIterator[None]:
        started_s = time.perf_counter()
        self._active += 1
        self._quiet.clear()
        status: status_pb2.Status | None = None
        fields: dict[str, object] = {}
        try:
            caller = caller_from(context.invocation_metadata())
            fields["caller"] = caller.name
            self._tokens.require(caller)
            yield
        except HmmError as error:
            operation = _in_words(method)
            asked = request if isinstance(request, Message) else None
            status = to_status(error.named(operation), operation, asked, self._revision(error, asked))
            if error.operation_id:
                fields["operation_id"] = error.operation_id
        except UnknownTokenError:
            status = _status(code_pb2.UNAUTHENTICATED, "TOKEN", "a token is needed that this daemon knows")
        except DrainingError:
            status = _status(code_pb2.UNAVAILABLE, DRAINING_REASON, "the daemon is ending")
        except Exception as error:
            operation_id = getattr(error, "operation_id", 0)
            if operation_id:  # the executor has logged it, with its traceback
                fields["operation_id"] = operation_id
            else:
                log.exception("%s hit a bug", method, extra=fields)
            status = _status(code_pb2.INTERNAL, INTERNAL_REASON, "a bug of the daemon; see its log", operation_id)
        finally:
            self._active -= 1
            if not self._active:
                self._quiet.set()
        if status is not None:
            from grpc_status import rpc_status  # noqa: PLC0415 - loaded with the first error

            log.info("%s: %s", method, status.message, extra=fields)
            await context.abort_with_status(rpc_status.to_status(status))
        milliseconds = round((time.perf_counter() - started_s) * 1e3, 3)
        log.debug("%s: %.3f ms", method, milliseconds, extra=fields | {"duration_ms": milliseconds})


def _reading(operation: str, deserialize: Any) -> Any:
    # What is raised while a message is read never reaches the handler; what is read does.
    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            return convert.malformed(str(error)).named(operation)

    return read


def _in_words(method: str) -> str:
    """`read memory` of /hmm.v1.ProcessService/ReadMemory."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", method.rpartition("/")[2]).lower()


def require_read(request: Any) -> None:
    """Raises: InvalidRequestError when what came is no message of its type."""
    if isinstance(request, HmmError):
        raise request


def _status(code: int, reason: str, message: str, operation_id: int = 0) -> status_pb2.Status:
    detail = any_pb2.Any()
    metadata = {"operationId": str(operation_id)} if operation_id else {}
    detail.Pack(error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata))
    return status_pb2.Status(code=code, message=message, details=[detail])
