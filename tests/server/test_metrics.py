"""Metrics: what is counted, under which names, and that no series of a device ever falls."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from hmm_proto.v1 import device_pb2
from hmm_server import metrics
from hmm_server.config import Config, ConfigError
from hmm_server.endpoint import EndpointError
from hmm_server.metrics import registry_of, serving_metrics

PAGE = 4096
BASE = 0x10000000000
END = BASE + 4 * PAGE
NAME = re.compile(r"hmmd_[a-z_]+|process_[a-z_]+|python_gc_[a-z_]+")


async def get(where: str) -> str:
    """What is served there."""
    if where.startswith("unix:"):
        reader, writer = await asyncio.open_unix_connection(where.removeprefix("unix:"))
    else:
        host, port = where.removeprefix("http://").removesuffix("/metrics").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    assert head.startswith(b"HTTP/1.0 200"), head
    return body.decode()


def values(text: str) -> dict[str, float]:
    """Every sample, as `name{label=value,...}`."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


@pytest.fixture
async def mirrored(serve: Any) -> Any:
    """A daemon that serves metrics on a free port, a driver, its mirror of a process of four pages."""
    return await (await serve(metrics="0")).mirrored(4, filled=True)


async def test_scrape_tells_what_happened_by_device_and_kind(mirrored: Any) -> None:
    """Events, answers, faults, accesses, violations, frames (three pages of four are left), calls ended or not."""
    served, driver, pid, mirror = mirrored
    unmapping = asyncio.ensure_future(served.munmap(pid, BASE, BASE + PAGE))
    event = await driver.events.get()
    before = values(await get(served.daemon.metrics_place))
    await driver.acknowledge(event)
    await unmapping
    late = device_pb2.DeviceWriteRequest(mirror_id=mirror, addresses=[BASE], lengths=[1], data=b"x")
    await driver.make("device_write", late)
    after = values(await get(served.daemon.metrics_place))
    assert before["hmmd_operations_pending{name=munmap}"] == 1
    assert before["hmmd_unanswered_events{device=gpu0}"] == 1
    assert "hmmd_operations_pending{name=munmap}" not in after
    assert after["hmmd_events_total{device=gpu0,type=munmap}"] == 1
    assert after["hmmd_event_reasons_total{device=gpu0,reason=unmap}"] == 1
    assert after["hmmd_answers_total{device=gpu0,outcome=acknowledged}"] == 1
    assert after["hmmd_acknowledgement_latency_seconds_count{device=gpu0}"] == 1
    assert after["hmmd_acknowledgement_latency_seconds_bucket{device=gpu0,le=+Inf}"] == 1
    assert after["hmmd_faults_total{device=gpu0}"] == 1
    assert after["hmmd_fault_pages_total{device=gpu0}"] == 4
    assert after["hmmd_violations_total{device=gpu0,kind=use_after_invalidation}"] == 1
    assert after["hmmd_frames{kind=system,memory=system,state=used}"] == 3
    assert after["hmmd_operations_total{name=munmap}"] == 1
    assert after["process_resident_memory_bytes{}"] > 1 << 20


async def test_series_of_a_device_do_not_fall_when_its_mirror_goes(mirrored: Any) -> None:
    """What a mirror counted stays with its device; with the device it goes."""
    served, driver, _, mirror = mirrored
    before = values(await get(served.daemon.metrics_place))
    unregister = await driver.send("unregister_mirror", device_pb2.UnregisterMirrorRequest(mirror_id=mirror))
    for _ in range(2):
        await driver.acknowledge(await driver.events.get())
    await unregister
    after = values(await get(served.daemon.metrics_place))
    fallen = {
        name
        for name, value in before.items()
        if "device=gpu0" in name and "_total" in name and after.get(name, -1.0) < value
    }
    assert fallen == set()
    assert after["hmmd_faults_total{device=gpu0}"] == 1
    assert after["hmmd_mirrors{device=gpu0,state=live}"] == 0
    await driver.make("unregister_device", device_pb2.UnregisterDeviceRequest(device_id=1))
    assert not [name for name in values(await get(served.daemon.metrics_place)) if "device=gpu0" in name]


async def test_devices_of_one_name_are_one_series(mirrored: Any) -> None:
    """Two series with the same labels would make a scrape worthless: what they count is added up."""
    served, driver, pid, _ = mirrored
    second = await driver.mirror(pid)
    await driver.fault(second, BASE, END)
    text = await get(served.daemon.metrics_place)
    samples = [line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")]
    assert len(samples) == len(set(samples))
    found = values(text)
    assert (found["hmmd_faults_total{device=gpu0}"], found["hmmd_mirrors{device=gpu0,state=live}"]) == (2, 2)


async def test_names_follow_the_conventions(mirrored: Any) -> None:
    """A prefix, base units, help for every family, and no label that a program can fill without bound."""
    served, *_ = mirrored
    families: list[Metric] = list(text_string_to_metric_families(await get(served.daemon.metrics_place)))
    assert len(families) > 25
    labels = {label for family in families for sample in family.samples for label in sample.labels}
    for family in families:
        assert NAME.fullmatch(family.name), family.name
        assert family.documentation, family.name
        assert not re.search(r"_(ms|us|milliseconds|kib|pages_bytes)$", family.name)
    assert labels <= {
        "device", "type", "reason", "outcome", "direction", "kind", "state", "name", "memory", "le", "version",
        "generation",
    }  # fmt: skip


async def test_scrape_on_a_unix_socket_is_for_the_owner_only(served: Any, tmp_path: Any) -> None:
    """As the daemon's own socket; it is gone with the server, and one that was left behind is replaced."""
    path = tmp_path / "metrics.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with serving_metrics(f"unix:{path}", served.daemon.streams) as where:
        assert path.stat().st_mode & 0o777 == 0o600
        assert "hmmd_build_info" in await get(where)
    assert not path.exists()


async def test_place_that_is_not_understood_or_taken_is_refused(served: Any, tmp_path: Any) -> None:
    """A word is no port; a port that somebody listens on is not ours; a file that is no socket is not thrown away."""
    for place in ("everywhere", "localhost:", "127.0.0.1:99999"):
        with pytest.raises(ConfigError, match="PORT"), serving_metrics(place, served.daemon.streams):
            pass
    precious = tmp_path / "precious"
    precious.touch()
    with pytest.raises(EndpointError, match="no socket"), serving_metrics(f"unix:{precious}", served.daemon.streams):
        pass
    assert precious.exists()
    with serving_metrics("0", served.daemon.streams) as where:
        port = where.removesuffix("/metrics").rpartition(":")[2]
        with pytest.raises(EndpointError, match="cannot serve metrics"), serving_metrics(port, served.daemon.streams):
            pass


async def test_scrape_of_a_busy_daemon_is_refused_and_said_in_the_log(
    served: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """503, and a line of the log in place of a traceback between its lines."""
    monkeypatch.setattr(metrics, "SCRAPE_S", 0.01)
    answers: list[bytes] = []

    def scrape(port: int) -> None:
        with socket.create_connection(("127.0.0.1", port)) as asking:
            asking.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            answers.append(asking.recv(100))

    with serving_metrics("0", served.daemon.streams) as where:
        scraping = threading.Thread(target=scrape, args=(int(where.removesuffix("/metrics").rpartition(":")[2]),))
        scraping.start()
        scraping.join()  # the loop does nothing else meanwhile
    assert answers[0].startswith(b"HTTP/1.0 503")
    assert "a scrape was not answered: busy for 0.01 s" in caplog.text
    assert "Traceback" not in capfd.readouterr().err


async def test_connection_that_asks_for_nothing_is_closed(
    served: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each has a thread, which is not left to it."""
    monkeypatch.setattr(metrics._Handler, "timeout", 0.01)
    with serving_metrics("0", served.daemon.streams) as where:
        reader, writer = await asyncio.open_connection("127.0.0.1", where.removesuffix("/metrics").rpartition(":")[2])
        assert await reader.read() == b""
        writer.close()
    assert "Traceback" not in capfd.readouterr().err


def test_place_may_be_an_address_of_ipv6() -> None:
    """In brackets, as everywhere."""
    assert metrics._parse("[::1]:9100") == ("::1", 9100, None)


async def test_nothing_is_served_unless_asked_for(served: Any) -> None:
    """Off by default."""
    assert Config().metrics == ""
    assert served.daemon.metrics_place == ""


async def test_registry_is_made_without_a_scrape(served: Any) -> None:
    """Registering happens on the loop that a scrape would wait for."""
    registry = registry_of(served.daemon.streams)
    text = await asyncio.to_thread(generate_latest, registry)
    assert b"hmmd_processes 0.0" in text
