"""SessionService: the one bidirectional stream of a driver process.

**Absent**: everything that happens on it (`hmm_server.session`).
"""

from __future__ import annotations

from typing import Any

import grpc

from hmm_proto.v1 import session_pb2_grpc
from hmm_server.callers import caller_from
from hmm_server.config import Config
from hmm_server.device_side import DeviceSide
from hmm_server.session import Session
from hmm_server.streams import Streams

Context = grpc.aio.ServicerContext[Any, Any]


class SessionService(session_pb2_grpc.SessionServiceServicer):
    """Sessions."""

    def __init__(self, side: DeviceSide, streams: Streams, config: Config) -> None:
        self._side = side
        self._streams = streams
        self._config = config

    # read() and write() of the context are a fifth faster than iterators, so this is a coroutine and no generator.
    async def Session(self, request_iterator: object, context: Context) -> None:  # type: ignore[override]
        caller = caller_from(context.invocation_metadata())
        await Session(self._side, self._streams, self._config, caller, context).run()
