"""How soon the daemon knows that a driver has died or stopped: from the signal until its mirror is lost."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import peers  # before grpc, whose environment it sets

# isort: split

import uvloop
from measurement import Row, alone, compared, print_rows

import hmm_client
from hmm_client.embedded import embedded_daemon
from hmm_proto.v1 import inspection_pb2

KEEPALIVE_MS, PING_TIMEOUT_MS = 500, 500


async def _lost_after_ms(client: hmm_client.Client, target: str, number: signal.Signals) -> float:
    """Milliseconds from a signal to a driver until whoever watches hears that its mirror is lost."""
    process = await client.create_process("bench")
    command = [sys.executable, str(Path(peers.__file__)), "driver", target, "1", str(process.id)]
    driver = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert driver.stdout is not None
        await driver.stdout.readline()
        watching: Any = client.inspection.Watch(inspection_pb2.WatchRequest(process_ids=[process.id]))
        await watching.read()
        began = perf_counter()
        driver.send_signal(number)
        while not any(seen.HasField("mirror_lost") for seen in (await watching.read()).observations):
            pass
        took_ms = (perf_counter() - began) * 1e3
        watching.cancel()
    finally:
        with suppress(ProcessLookupError):
            driver.kill()
        await driver.wait()
    await process.exit()
    return took_ms


async def _figures(target: str, rounds: int) -> tuple[list[float], list[float]]:
    async with hmm_client.connect(target, name="bench") as client:
        died = [await _lost_after_ms(client, target, signal.SIGKILL) for _ in range(rounds)]
        stopped = [await _lost_after_ms(client, target, signal.SIGSTOP) for _ in range(rounds)]
    return died, stopped


def measure(quick: bool) -> Iterator[Row]:
    """SIGKILL, which its connection tells of, and SIGSTOP, which only a ping without an answer does."""
    rounds = 2 if quick else 5
    with embedded_daemon(keepalive_ms=KEEPALIVE_MS, ping_timeout_ms=PING_TIMEOUT_MS) as target:
        died, stopped = uvloop.run(_figures(target, rounds))
    yield alone("SIGKILL until its mirror is lost", "ms", died, 50.0)
    allowed = [float(KEEPALIVE_MS + PING_TIMEOUT_MS)] * rounds
    yield compared("SIGSTOP until its mirror is lost / keepalive + ping timeout", "ms", stopped, allowed, 1.1)


if __name__ == "__main__":
    print_rows(measure("--quick" in sys.argv))
