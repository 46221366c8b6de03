"""Server reflection, loaded when somebody first asks.

With the descriptions of all messages it is a third of a megabyte that most daemons never need.

**Source**: grpc.reflection.v1alpha, as grpcio-reflection serves it.

**Absent**: whether it is offered (config.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import grpc

NAME = "grpc.reflection.v1alpha.ServerReflection"


class Reflection(grpc.GenericRpcHandler):
    """Says which services and messages there are.

    Args:
        names: of the services, in full.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = (*names, NAME)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """What answers a call, if it is one of reflection."""
        if not handler_call_details.method.startswith(f"/{NAME}/"):
            return None
        return self._handler.service(handler_call_details)

    @cached_property
    def _handler(self) -> grpc.GenericRpcHandler:
        from grpc_reflection.v1alpha import reflection, reflection_pb2  # noqa: PLC0415 - loaded only when asked for

        handler: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(
            reflection.aio.ReflectionServicer(self._names).ServerReflectionInfo,
            request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
            response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(NAME, {"ServerReflectionInfo": handler})
