"""A gRPC client that nobody here wrote: buf curl, with no files of ours, by the daemon's own reflection."""

from __future__ import annotations

import asyncio
import base64
import errno
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from google.rpc import error_details_pb2

if TYPE_CHECKING:
    from tests.conftest import Daemon

BUF = Path(sys.executable).with_name("buf")
TIMEOUT_S = 60.0
SERVICES = (
    "hmm.v1.DeviceService",
    "hmm.v1.FileService",
    "hmm.v1.InspectionService",
    "hmm.v1.ProcessService",
    "hmm.v1.SessionService",
    "grpc.health.v1.Health",
)


async def curl(daemon: Daemon, *arguments: str, data: dict[str, Any] | None = None) -> tuple[int, str, str]:
    """Run buf curl against a daemon; returns status, output and errors."""
    options = ["--unix-socket", str(daemon.socket), "--http2-prior-knowledge", "--protocol", "grpc"]
    options += [] if data is None else ["--data", json.dumps(data)]
    process = await asyncio.create_subprocess_exec(
        BUF, "curl", *options, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


@pytest.fixture
async def daemon(start_daemon: Callable[..., Awaitable[Daemon]]) -> Daemon:
    """A daemon with one process."""
    return await start_daemon()


async def test_buf_curl_lists_the_services_and_calls_a_unary_method(daemon: Daemon) -> None:
    """Reflection tells everything that a stranger needs."""
    status, services, errors = await curl(daemon, "--list-services", "http://hmmd")
    assert status == 0, errors
    assert set(SERVICES) <= set(services.split())
    method = "http://hmmd/hmm.v1.ProcessService/CreateProcess"
    status, output, errors = await curl(daemon, method, data={"name": "made by buf"})
    assert status == 0, errors
    assert json.loads(output)["processId"] == "1"
    status, output, errors = await curl(daemon, "http://hmmd/grpc.health.v1.Health/Check", data={})
    assert (status, json.loads(output)) == (0, {"status": "SERVING"}), errors


async def test_buf_curl_calls_a_streaming_method(daemon: Daemon) -> None:
    """Server streaming: the directories of a populated page table, level by level."""
    client = daemon.connect()
    process = await client.create_process("p")
    mapped = await process.mmap(1 << 21)
    await process.write(mapped.address, b"x" * 4096 * 3)
    method = "http://hmmd/hmm.v1.InspectionService/GetPageTable"
    status, output, errors = await curl(daemon, method, data={"processId": str(process.id)})
    assert status == 0, errors
    levels = [node.get("level", 0) for message in _messages(output) for node in message["directories"]]
    assert levels[:4] == [0, 1, 2, 3]


async def test_buf_curl_shows_the_error_with_its_details(daemon: Daemon) -> None:
    """A status that is not OK carries reason, errno, call and object as google.rpc.ErrorInfo."""
    method = "http://hmmd/hmm.v1.ProcessService/Fork"
    status, _, errors = await curl(daemon, method, data={"processId": "99"})
    assert status != 0
    report = json.loads(errors)
    assert report["code"] == "not_found"
    assert "there is no process 99" in report["message"]
    (detail,) = report["details"]
    assert detail["type"] == "google.rpc.ErrorInfo"
    info = error_details_pb2.ErrorInfo.FromString(base64.b64decode(detail["value"] + "=="))
    assert (info.reason, info.domain) == ("NO_SUCH_OBJECT", "hmm.v1")
    assert dict(info.metadata) == {
        "errno": str(errno.ESRCH),
        "operation": "fork",
        "operationId": "1",
        "processId": "99",
    }


def _messages(output: str) -> list[dict[str, Any]]:
    decoder, position, found = json.JSONDecoder(), 0, []
    while position < len(output.rstrip()):
        message, position = decoder.raw_decode(output, position)
        position += len(output[position:]) - len(output[position:].lstrip())
        found.append(message)
    return found
