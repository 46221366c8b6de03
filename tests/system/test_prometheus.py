"""A real Prometheus server scrapes a real daemon, and promtool has nothing to say against what it is served."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from hmm_client import TableDriver, connect
from hmm_client.embedded import EmbeddedDaemon

pytestmark = pytest.mark.slow

TIMEOUT_S = 60.0
"""Far more than anything takes; a busy machine is no failure."""
PAGE = 4096
CONFIGURATION = """\
global:
  scrape_interval: 200ms
scrape_configs:
  - job_name: hmmd
    static_configs:
      - targets: ["{target}"]
"""


def fetch(url: str) -> str:
    """What a URL gives."""
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
        text: str = response.read().decode()
        return text


@pytest.fixture
async def metrics(tmp_path: Path) -> AsyncIterator[str]:
    """Where a daemon serves metrics in which something has happened: a fault, an event, a refused access."""
    for tool in ("prometheus", "promtool"):
        assert shutil.which(tool), f"{tool} is needed: apt-get install -y prometheus"
    daemon = EmbeddedDaemon(tmp_path, log=tmp_path / "log", metrics="0")
    found = re.search(r"metrics at (\S+)", daemon.read_log())
    assert found is not None
    async with connect(daemon.target, name="test") as client:
        process = await client.create_process("victim")
        mapped = await process.mmap(4 * PAGE)
        mirror = await (await client.register_device("gpu0")).mirror(process, TableDriver())
        await mirror.fault(mapped.span, write=True)
        await process.munmap(mapped.address, PAGE)
        with pytest.raises(Exception, match="MUNMAP"):
            await mirror.read([(mapped.address, 1)])
        yield found[1]
    assert await asyncio.to_thread(daemon.stop) == 0


async def test_promtool_finds_nothing_wrong(metrics: str) -> None:
    """`promtool check metrics` knows the rules of names, units and help texts."""
    process = await asyncio.create_subprocess_exec(
        *("promtool", "check", "metrics"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    text = await asyncio.to_thread(fetch, metrics)
    said, _ = await asyncio.wait_for(process.communicate(text.encode()), TIMEOUT_S)
    assert (process.returncode, said.decode()) == (0, "")


async def test_server_scrapes_and_answers_questions(metrics: str, tmp_path: Path, free_port: int) -> None:
    """The target is up, and what happened can be asked for in PromQL."""
    configuration = tmp_path / "prometheus.yml"
    configuration.write_text(CONFIGURATION.format(target=metrics.removeprefix("http://").removesuffix("/metrics")))
    address = f"127.0.0.1:{free_port}"
    with (tmp_path / "prometheus.log").open("wb") as log:
        server = await asyncio.create_subprocess_exec(
            "prometheus",
            f"--config.file={configuration}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address={address}",
            stdout=asyncio.subprocess.DEVNULL,
            stderr=log,
        )

    async def ask(query: str) -> dict[str, float]:
        url = f"http://{address}/api/v1/query?query={urllib.parse.quote(query)}"
        answer: Any = json.loads(await asyncio.to_thread(fetch, url))
        assert answer["status"] == "success", answer
        return {str(one["metric"].get("device", "")): float(one["value"][1]) for one in answer["data"]["result"]}

    try:
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                try:
                    if (await ask("up")).get("") == 1:
                        break
                except OSError:
                    assert server.returncode is None, (tmp_path / "prometheus.log").read_text()
        assert await ask('hmmd_events_total{type="munmap"}') == {"gpu0": 1}
        assert await ask("hmmd_fault_pages_total") == {"gpu0": 4}
        assert await ask('hmmd_violations_total{kind="use_after_invalidation"}') == {"gpu0": 1}
        quantile = "histogram_quantile(0.99, hmmd_acknowledgement_latency_seconds_bucket)"
        assert 0 < (await ask(quantile))["gpu0"] < 10
    finally:
        server.kill()
        await server.wait()
