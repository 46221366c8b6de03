"""What tests of the client share: clients, and a daemon's end of a session that the test plays.

What a `ScriptedDaemon` says is written down in the test, word for word.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import grpc.aio
import pytest

import hmm_client
from hmm_proto.v1 import event_pb2, session_pb2, session_pb2_grpc

if TYPE_CHECKING:
    from tests.conftest import Daemon

Requests = asyncio.Queue["session_pb2.SessionRequest | None"]


class ScriptedDaemon(session_pb2_grpc.SessionServiceServicer):
    """Serves one session: hands over what comes in, sends what it is told to send.

    Attributes:
        requests: what the client sent, message by message; None at the end of the stream.
        epoch, lease_ms: of the next session.
    """

    def __init__(self) -> None:
        self.requests: Requests = asyncio.Queue()
        self.epoch = 7
        self.lease_ms = 0
        self._responses: asyncio.Queue[session_pb2.SessionResponse | None] = asyncio.Queue()

    async def Session(  # type: ignore[override]  # noqa: N802 - the name of the RPC
        self, request_iterator: AsyncIterator[session_pb2.SessionRequest], _context: object
    ) -> AsyncIterator[session_pb2.SessionResponse]:
        """The two halves of the stream."""
        reader = asyncio.create_task(self._receive(request_iterator))
        welcome = event_pb2.Welcome(epoch=self.epoch, credit=64, protocol_version=1, lease_ms=self.lease_ms)
        yield session_pb2.SessionResponse(welcome=welcome)
        while (response := await self._responses.get()) is not None:
            yield response
        reader.cancel()

    async def _receive(self, request_iterator: AsyncIterator[session_pb2.SessionRequest]) -> None:
        async for request in request_iterator:
            self.requests.put_nowait(request)
            if request.HasField("bye"):
                self.end()
        self.requests.put_nowait(None)

    def send(self, **fields: object) -> None:
        """Send one SessionResponse with these fields."""
        self._responses.put_nowait(session_pb2.SessionResponse(**fields))  # type: ignore[arg-type]

    def end(self) -> None:
        """End the stream."""
        self._responses.put_nowait(None)

    async def received(self) -> session_pb2.SessionRequest:
        """The next message of the client."""
        request = await self.requests.get()
        assert request is not None, "the client has ended the stream"
        return request

    async def called(self, name: str) -> session_pb2.SessionCall:
        """The next call of the client, which must be the only thing in its message, and of this name."""
        (call,) = (await self.received()).calls
        assert call.WhichOneof("call") == name
        return call

    def reply(self, call: session_pb2.SessionCall, **reply: object) -> None:
        """Answer a call: `reply(call, fault=FaultResponse(...))`."""
        self.send(replies=[session_pb2.SessionReply(request_id=call.request_id, **reply)])  # type: ignore[arg-type]

    async def acknowledged(self) -> event_pb2.Acknowledgements:
        """The acknowledgements in the next message, which holds nothing else."""
        request = await self.received()
        assert not request.calls
        return request.acknowledgements


@pytest.fixture
async def client(shared_daemon: Daemon) -> AsyncIterator[hmm_client.Client]:
    """A client of its own for each test; what it registered goes when it is closed."""
    async with hmm_client.connect(shared_daemon.target, name="test") as client:
        yield client


@pytest.fixture
async def process(client: hmm_client.Client) -> hmm_client.Process:
    """A process of its own for each test."""
    return await client.create_process("test")


@pytest.fixture
async def scripted(tmp_path: Path) -> AsyncIterator[tuple[ScriptedDaemon, hmm_client.Client]]:
    """A scripted daemon, and a client that is connected to it."""
    daemon = ScriptedDaemon()
    server = grpc.aio.server()
    session_pb2_grpc.add_SessionServiceServicer_to_server(daemon, server)
    server.add_insecure_port(f"unix:{tmp_path}/scripted.sock")
    await server.start()
    async with hmm_client.connect(f"{tmp_path}/scripted.sock", name="under test") as client:
        yield daemon, client
    await server.stop(None)
