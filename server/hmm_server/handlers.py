"""The handlers of a service, made from its description.

The modules that protoc generates for gRPC make them too.  They hold a stub, a base class and a second interface for
each service besides, a megabyte in all, and they register every method: then the accept loop of grpc.aio waits on one
future for each of them at every call (grpc/grpc PR 43461), a tenth of a call's time with this many.

**Invariants**: a service has all methods of its description, or the daemon does not start.

**Absent**: what the methods do (`hmm_server.services`).
"""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass


def handlers_of(description: ServiceDescriptor, service: object) -> grpc.GenericRpcHandler:
    """What a server has to call.

    Args:
        service: has a method of that name for each of the description's.
    """
    methods = {method.name: _handler(method, getattr(service, method.name)) for method in description.methods}
    return grpc.method_handlers_generic_handler(description.full_name, methods)


def _handler(method: MethodDescriptor, behaviour: Any) -> grpc.RpcMethodHandler[Any, Any]:
    asks, answers = (("unary", "stream")[streams] for streams in (method.client_streaming, method.server_streaming))
    handler: grpc.RpcMethodHandler[Any, Any] = getattr(grpc, f"{asks}_{answers}_rpc_method_handler")(
        behaviour,
        request_deserializer=GetMessageClass(method.input_type).FromString,
        response_serializer=GetMessageClass(method.output_type).SerializeToString,
    )
    return handler
