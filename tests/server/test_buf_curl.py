"""`buf curl`, a gRPC client that was not written here, calls the daemon with nothing but reflection."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BUF = shutil.which("buf", path=str(Path(sys.executable).parent)) or "buf"
BASE = 0x10000000000
pytestmark = pytest.mark.slow


async def _curl(served: Any, method: str, body: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
    path = served.target.removeprefix("unix:")
    curl = await asyncio.create_subprocess_exec(
        *(BUF, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--unix-socket", path),
        *("-d", json.dumps(body), f"http://localhost/hmm.v1.{method}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    output, errors = await curl.communicate()
    return curl.returncode or 0, list(_objects((output or errors).decode()))


def _objects(text: str) -> Any:
    decoder, position = json.JSONDecoder(), 0
    while position < len(text.rstrip()):
        value, position = decoder.raw_decode(text, position)
        yield value
        position += len(text[position:]) - len(text[position:].lstrip())


async def test_unary_method_answers_buf_curl(served: Any) -> None:
    """A unary call by reflection alone; an error shows its code and message."""
    code, (created,) = await _curl(served, "ProcessService/CreateProcess", {"name": "curl"})
    assert (code, created) == (0, {"processId": "1"})
    code, (error,) = await _curl(served, "InspectionService/GetMaps", {"processId": "9"})
    assert code != 0
    assert (error["code"], error["message"]) == ("not_found", "there is no process 9")


async def test_streaming_method_answers_buf_curl(serve: Any) -> None:
    """A server-streaming call by reflection alone: memory in parts."""
    served = await serve(part_bytes=4096)
    pid = await served.new_process()
    await served.mmap(pid, BASE, BASE + 2 * 4096)
    body = {"processId": str(pid), "address": str(BASE), "length": str(2 * 4096)}
    code, parts = await _curl(served, "ProcessService/StreamMemory", body)
    assert code == 0
    assert [len(part["data"]) * 3 // 4 // 4096 for part in parts] == [1, 1]
