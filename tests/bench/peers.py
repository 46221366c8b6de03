"""The processes that bench_rpc.py talks to beside the daemon: bare echo servers, and drivers of their own.

    python tests/bench/peers.py raw PATH                     the socket itself, on uvloop
    python tests/bench/peers.py grpc PATH                    the same on a bidirectional gRPC stream
    python tests/bench/peers.py driver TARGET MIRRORS PID... a client process, with mirrors of each process of the model

Each prints a line when it is ready, and ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import struct
import sys
from typing import Any

import uvloop

import hmm_client  # before grpc, which reads the environment that this sets

REQUEST = struct.Struct("<I")
"""Of the bare socket: how many bytes are wanted back."""
STREAM = "/bench/Echo"
_ANSWER = memoryview(bytes(1 << 24))


class RawServer(asyncio.Protocol):
    """Answers every request with as many bytes as it asks for."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the connection."""
        self._transport: Any = transport
        self._received = b""

    def data_received(self, data: bytes) -> None:
        """Answer every request that is complete."""
        self._received += data
        while len(self._received) >= REQUEST.size:
            (wanted,) = REQUEST.unpack_from(self._received)
            self._received = self._received[REQUEST.size :]
            self._transport.write(_ANSWER[:wanted])


async def serve_raw(path: str) -> None:
    """Serve the bare socket."""
    await asyncio.get_running_loop().create_unix_server(RawServer, path)
    await stay()


async def serve_grpc(path: str) -> None:
    """Serve a stream that answers every message with as many bytes as it asks for; nothing is encoded."""
    import grpc  # noqa: PLC0415 - only this peer serves gRPC

    async def echo(_: Any, context: Any) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            await context.write(_ANSWER[: REQUEST.unpack(message)[0]].tobytes())

    class Handler(grpc.GenericRpcHandler):
        def service(self, _: grpc.HandlerCallDetails) -> Any:
            return grpc.stream_stream_rpc_method_handler(echo)

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Handler(),))
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    await stay()
    await server.stop(None)


async def drive(target: str, mirrors: str, *process_ids: str) -> None:
    """Mirror processes; their drivers have nothing to stop."""
    async with hmm_client.connect(target, name="bench") as client:
        for _ in range(int(mirrors)):
            device = await client.register_device("bench")
            for process_id in process_ids:
                await device.mirror(client.process(int(process_id)), hmm_client.Driver(), fault_events=False)
        await stay()


async def stay() -> None:
    """Say that all is ready, and wait for the end of the input."""
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    kind, *arguments = sys.argv[1:]
    uvloop.run({"raw": serve_raw, "grpc": serve_grpc, "driver": drive}[kind](*arguments))
