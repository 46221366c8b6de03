"""The daemon: everything put together, served, and ended in good order.

To end in good order: take no new calls, let those under way end (or fence whoever they wait for), say goodbye to
every stream, stop.

**Absent**: where settings come from (config.py), signals (command.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2

from hmm.machine import Machine
from hmm.semantics import PROFILES
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
from hmm_server.callers import Tokens
from hmm_server.config import Config, ConfigError
from hmm_server.device_side import DeviceSide
from hmm_server.endpoint import claimed, listen, listen_for_health
from hmm_server.executor import Executor
from hmm_server.handlers import handlers_of
from hmm_server.interceptors import Guard
from hmm_server.observers import Observers
from hmm_server.operation_log import OperationLog
from hmm_server.services.device import DeviceService
from hmm_server.services.file import FileService
from hmm_server.services.harness import HarnessService
from hmm_server.services.hmm import HmmService
from hmm_server.services.inspection import InspectionService
from hmm_server.services.process import ProcessService
from hmm_server.services.reflection import Reflection
from hmm_server.services.session import SessionService
from hmm_server.services.userfaultfd import UserfaultfdService
from hmm_server.streams import Streams
from hmm_server.swap_file import swap_memory

STOP_S = 1.0
"""Time for streams to end after their farewell."""
LAST_S = 0.1
"""Time for the last messages to leave; then what is not ours is cut off: health checks that watch."""
_DESCRIPTIONS = {
    name: module.DESCRIPTOR.services_by_name[name]
    for module, name in (
        (process_pb2, "ProcessService"),
        (file_pb2, "FileService"),
        (device_pb2, "DeviceService"),
        (hmm_pb2, "HmmService"),
        (session_pb2, "SessionService"),
        (inspection_pb2, "InspectionService"),
        (userfaultfd_pb2, "UserfaultfdService"),
        (harness_pb2, "HarnessService"),
    )
}
SERVICES = tuple(description.full_name for description in _DESCRIPTIONS.values())
log = logging.getLogger(__name__)


def _machine(config: Config) -> Machine:
    semantics, swap = PROFILES[config.semantics], swap_memory(config)
    try:
        return Machine(config.limits, semantics=semantics, swap_memory=swap, capable=config.harness)
    except (OSError, OverflowError, MemoryError) as error:
        held = f"{config.frames} frames, {config.device_frames} of devices, and {config.swap_pages} pages of swap"
        raise ConfigError(f"there is no address space for {held}") from error


class Daemon:
    """One machine and its server.  Has to be made on the loop that it will run on.

    Attributes:
        targets: what clients connect to, once it serves.
        health_target: where health checks are answered in plain text, if they are.
        metrics_place: where metrics are served, if they are.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.machine = _machine(config)
        self.executor = Executor(self.machine, OperationLog(config.operations_remembered), config.acknowledgement_s)
        self.observers = Observers(config.watch_entries, config.watch_bytes)
        self.streams = Streams(self.executor, self.observers, config)
        self.guard = Guard(self.machine, Tokens(config.token_file))
        self.targets: list[str] = []
        self.health_target = ""
        self.metrics_place = ""
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            interceptors=[self.guard],
            options=self._options(),
            maximum_concurrent_rpcs=config.concurrent_calls,
        )
        self._add_services()

    def _options(self) -> list[tuple[str, int]]:
        return [
            ("grpc.so_reuseport", 0),  # a second daemon on a TCP port fails to bind instead of stealing calls
            ("grpc.keepalive_time_ms", self.config.keepalive_ms),
            ("grpc.keepalive_timeout_ms", self.config.ping_timeout_ms),
            ("grpc.http2.ping_timeout_ms", self.config.ping_timeout_ms),  # the one that has an effect in 1.85
            ("grpc.max_receive_message_length", self.config.message_bytes),
            ("grpc.max_send_message_length", self.config.message_bytes),
        ]

    def _add_services(self) -> None:
        side = DeviceSide(self.executor, self.streams, self.config)
        services = (
            ProcessService(self.executor, self.config),
            FileService(self.executor, self.config),
            DeviceService(side, self.streams),
            HmmService(side),
            InspectionService(self.executor, self.streams, self.observers, self.config),
            UserfaultfdService(self.executor),
            HarnessService(self.executor, self.config),
        )
        handlers = [handlers_of(_DESCRIPTIONS[type(service).__name__], service) for service in services]
        handlers += SessionService(side, self.streams, self.config).handler(), self._health_handlers()
        if self.config.reflection:
            handlers.append(Reflection((*SERVICES, health.SERVICE_NAME)))
        self._server.add_generic_rpc_handlers(handlers)

    def _health_handlers(self) -> grpc.GenericRpcHandler:
        description: Any = health_pb2.DESCRIPTOR.services_by_name["Health"]
        return handlers_of(description, self._health)

    @asynccontextmanager
    async def serving(self, path: Path | None = None) -> AsyncIterator[Daemon]:
        """Serve until the end of the block, then end in good order.

        Args:
            path: of the UNIX socket; None: as configured.

        Raises:
            EndpointError: it cannot listen there.
        """
        with claimed(path or self.config.socket_path) as socket:
            self.targets = listen(self._server, self.config, socket)
            for service in ("", *SERVICES):
                await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
            async with self._serving_health():
                await self._server.start()
                log.info("serving %s", " and ".join(self.targets))
                try:
                    with self._serving_metrics():
                        yield self
                finally:
                    await self.drain()

    @contextmanager
    def _serving_metrics(self) -> Iterator[None]:
        if not self.config.metrics:
            yield
            return
        from hmm_server.metrics import serving_metrics  # noqa: PLC0415 - loaded only when served

        with serving_metrics(self.config.metrics, self.streams) as self.metrics_place:
            log.info("metrics at %s", self.metrics_place)
            yield

    @asynccontextmanager
    async def _serving_health(self) -> AsyncIterator[None]:
        """A second server beside the first, for probes; it answers until the first has stopped."""
        if not self.config.health_tcp:
            yield
            return
        server = grpc.aio.server(options=self._options())
        server.add_generic_rpc_handlers([self._health_handlers()])
        self.health_target = listen_for_health(server, self.config)
        await server.start()
        log.info("health checks at %s", self.health_target)
        try:
            yield
        finally:
            await server.stop(LAST_S)

    async def drain(self) -> None:
        """End in good order."""
        log.info("draining: %d calls under way, %d streams open", len(self.executor.running), len(self.streams.open))
        await self._health.enter_graceful_shutdown()
        await self.executor.drain(self.config.drain_s)  # refuses what starts; answers that come one by one are taken
        for stream in list(self.streams.open.values()):
            stream.mailbox.close("the daemon is ending")
        self.observers.close()
        stopping = asyncio.ensure_future(self._server.stop(STOP_S + LAST_S))
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                await self.guard.quiet()
        await self._server.stop(LAST_S)
        await stopping
        log.info("stopped")
