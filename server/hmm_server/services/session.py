"""SessionService: the one bidirectional stream of a driver process.

**Absent**: everything that happens on it (`hmm_server.session`).
"""

from __future__ import annotations

from typing import Any

import grpc

from hmm_proto.v1 import session_pb2
from hmm_server.callers import caller_from
from hmm_server.config import Config
from hmm_server.device_side import DeviceSide
from hmm_server.session import Session
from hmm_server.streams import Streams

Context = grpc.aio.ServicerContext[Any, Any]


NAME: str = session_pb2.DESCRIPTOR.services_by_name["SessionService"].full_name


class SessionService:
    """Sessions."""

    def __init__(self, side: DeviceSide, streams: Streams, config: Config) -> None:
        self._side = side
        self._streams = streams
        self._config = config

    def handler(self) -> grpc.GenericRpcHandler:
        """What the server has to call: as generated, except that responses come serialised."""
        session: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(
            self._session, request_deserializer=session_pb2.SessionRequest.FromString
        )
        return grpc.method_handlers_generic_handler(NAME, {"Session": session})

    # read() and write() of the context are a fifth faster than iterators, so this is a coroutine and no generator.
    async def _session(self, request_iterator: object, context: Context) -> None:
        caller = caller_from(context.invocation_metadata())
        await Session(self._side, self._streams, self._config, caller, context).run()
