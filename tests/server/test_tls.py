"""TCP with TLS: encrypted, and with a client authority only for clients that it has signed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hmm_proto.v1 import process_pb2, process_pb2_grpc
from hmm_server.config import Config
from hmm_server.daemon import Daemon

FILES = Path(__file__).with_name("tls")
AUTHORITY = (FILES / "authority.pem").read_bytes()
CLIENT_KEY, CLIENT_CERTIFICATE = (FILES / "client.key").read_bytes(), (FILES / "client.pem").read_bytes()


@pytest.fixture
async def daemon(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Daemon]:
    """A daemon that serves TLS, demands client certificates, and answers probes without."""
    config = Config(
        tcp="127.0.0.1:0",
        health_tcp="127.0.0.1:0",
        tls_certificate=str(FILES / "server.pem"),
        tls_key=str(FILES / "server.key"),
        tls_client_ca=str(FILES / "authority.pem"),
        frames=1 << 14,
    )
    async with Daemon(config).serving(tmp_path_factory.mktemp("t") / "s") as daemon:
        yield daemon


@pytest.fixture
def target(daemon: Daemon) -> str:
    """Where it serves TLS."""
    return daemon.targets[1]


async def _create_process(channel: grpc.aio.Channel) -> int:
    async with channel:
        created = await process_pb2_grpc.ProcessServiceStub(channel).CreateProcess(process_pb2.CreateProcessRequest())
    return int(created.process_id)


async def test_client_is_served_when_authority_has_signed_it(target: str) -> None:
    """Both sides show certificates of the authority."""
    credentials = grpc.ssl_channel_credentials(AUTHORITY, CLIENT_KEY, CLIENT_CERTIFICATE)
    assert await _create_process(grpc.aio.secure_channel(target, credentials)) == 1


@pytest.mark.parametrize("way", ["without certificate", "without TLS"])
async def test_client_is_cut_off_when_it_shows_no_certificate(target: str, way: str) -> None:
    """Without a certificate, or without TLS at all, nothing is served."""
    if way == "without TLS":
        channel = grpc.aio.insecure_channel(target)
    else:
        channel = grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(AUTHORITY))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _create_process(channel)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_probe_without_tls_is_answered_and_nothing_else_is(daemon: Daemon) -> None:
    """A port of its own has the health service alone, since the probes of Kubernetes speak no TLS."""
    async with grpc.aio.insecure_channel(daemon.health_target) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(service="hmm.v1.ProcessService"))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _create_process(grpc.aio.insecure_channel(daemon.health_target))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_probe_hears_that_the_daemon_drains(daemon: Daemon) -> None:
    """Nobody new is sent to a daemon that ends."""
    async with grpc.aio.insecure_channel(daemon.health_target) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        await daemon.drain()
        answer = await health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
