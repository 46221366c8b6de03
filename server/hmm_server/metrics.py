"""Metrics for Prometheus: what the counters say, by device and kind, whenever somebody asks.

Nothing is counted here: a scrape reads the counters that are kept anyway, on the event loop, and the text is made and
sent by a thread of its own.  Counters of mirrors are added up by the name of their device, those of mirrors that are
gone included, so that no series ever falls while its devices are there.

    hmmd_events_total{device="gpu0",type="munmap"} 12

**Source**: the naming rules of Prometheus: base units (seconds, bytes), `_total` for counters, no label whose values
a program can make without bound: devices have a limit, addresses, processes and mirrors are none of them.

**Invariants**: no series comes twice; a series of a device does not fall while the device is registered; a scrape
never delays a callback by more than the reading of the counters.

**Absent**: per mirror figures (`GetStatistics`), who asks (endpoint: anybody who can connect).
"""

from __future__ import annotations

import asyncio
import logging
import socket
import socketserver
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector, make_wsgi_app
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from hmm.events import EventType
from hmm.receiver import EVENTS_OF, MirrorState
from hmm_server import VERSION
from hmm_server.config import ConfigError, is_port
from hmm_server.device_totals import DeviceTotals
from hmm_server.endpoint import EndpointError, remove_stale
from hmm_server.streams import Streams
from hmm_server.traffic import LATENCY_BOUNDS_S

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

SCRAPE_S = 5.0
"""How long a scrape waits for the event loop."""
IDLE_S = 10.0
"""How long a connection may say nothing: each has a thread."""
BUCKETS = [*(f"{bound:g}" for bound in LATENCY_BOUNDS_S), "+Inf"]
log = logging.getLogger(__name__)
_OUTCOMES = ("acknowledged", "refused", "fenced", "abandoned")


class DaemonCollector(Collector):
    """Reads the counters of one daemon.  Scrapes come from other threads; the reading is done on the loop."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._loop = asyncio.get_running_loop()

    def collect(self) -> Iterable[Metric]:
        """All families of metrics, as they are now.

        Raises:
            TimeoutError: the loop does not come to it within SCRAPE_S.
            RuntimeError: the loop has ended.
        """
        found: Future[list[Metric]] = Future()

        def read() -> None:
            if found.set_running_or_notify_cancel():
                try:
                    found.set_result(list(self.read()))
                except Exception as error:  # noqa: BLE001 - it is the scrape's
                    found.set_exception(error)

        self._loop.call_soon_threadsafe(read)
        try:
            return found.result(SCRAPE_S)
        finally:
            found.cancel()

    def describe(self) -> Iterable[Metric]:
        """Nothing in advance: registering must not wait for the loop that it is done on."""
        return ()

    def read(self) -> Iterator[Metric]:
        """All families; on the loop's thread."""
        yield from self._daemon()
        yield from self._frames()
        totals = self._streams.totals.now()
        yield from _events(totals)
        yield from _faults(totals)
        yield from self._mirrors()

    # ---- the daemon

    def _daemon(self) -> Iterator[Metric]:
        executor = self._streams.executor
        machine = executor.machine
        yield InfoMetricFamily("hmmd_build", "Version of the daemon.", {"version": VERSION})
        for name, text, number in (
            ("processes", "Processes that exist.", len(machine.processes)),
            ("address_spaces", "Address spaces that exist.", len(machine.spaces)),
            ("devices", "Devices that are registered.", len(machine.devices)),
            ("files", "Files that exist.", len(machine.files)),
            ("streams", "Streams of events that are open.", len(self._streams.open)),
        ):
            yield GaugeMetricFamily(f"hmmd_{name}", text, number)
        calls = CounterMetricFamily("hmmd_operations", "Calls that have ended, by name.", labels=["name"])
        for name, count in sorted(executor.operations.ended_by_name.items()):
            calls.add_metric([name], count)
        yield calls
        errors = CounterMetricFamily(
            "hmmd_operation_errors", "Calls that ended with an error, by reason.", labels=["reason"]
        )
        for reason, count in sorted(executor.operations.errors_by_reason.items()):
            errors.add_metric([reason], count)
        yield errors
        pending = GaugeMetricFamily("hmmd_operations_pending", "Calls that have not ended, by name.", labels=["name"])
        names = [running.record.name for running in executor.running.values()]
        for name in sorted(set(names)):
            pending.add_metric([name], names.count(name))
        yield pending
        text = "Answers that were rejected: never sent, from an old epoch, after a fence."
        yield CounterMetricFamily("hmmd_rejected_answers", text, self._streams.rejected)

    def _frames(self) -> Iterator[Metric]:
        machine = self._streams.executor.machine
        counts: Counter[tuple[str, ...]] = Counter()
        for region in machine.frames.regions:
            device = machine.devices.get(region.owner)
            memory = device.name if device else "system"
            counts[memory, region.kind.value, "used"] += region.used
            counts[memory, region.kind.value, "free"] += region.free
        yield _gauge("frames", "Frames of 4096 bytes, by memory and state.", ("memory", "kind", "state"), counts)

    def _mirrors(self) -> Iterator[Metric]:
        machine = self._streams.executor.machine
        names = [device.name for device in machine.devices.values()]
        mirrors: Counter[tuple[str, ...]] = Counter({(name, state.value): 0 for name in names for state in MirrorState})
        unanswered: Counter[tuple[str, ...]] = Counter({(name,): 0 for name in names})
        for receiver in machine.receivers.values():
            mirrors[receiver.device.name, receiver.state.value] += 1
            unanswered[receiver.device.name,] += len(receiver.unanswered)
        yield _gauge("mirrors", "Mirrors that exist, by device and state.", ("device", "state"), mirrors)
        text = "Events that drivers have not answered yet, by device."
        yield _gauge("unanswered_events", text, ("device",), unanswered)


def _gauge(name: str, text: str, labels: Sequence[str], counts: Mapping[tuple[str, ...], int]) -> Metric:
    # Counted first, since two devices may have one name.
    family = GaugeMetricFamily(f"hmmd_{name}", text, labels=labels)
    for values, count in counts.items():
        family.add_metric(values, count)
    return family


# ---- devices


def _events(totals: dict[str, DeviceTotals]) -> Iterator[Metric]:
    types = CounterMetricFamily(
        "hmmd_events", "Events made for mirrors, in the words of 2015, by device and type.", labels=["device", "type"]
    )
    reasons = CounterMetricFamily(
        "hmmd_event_reasons", "Events sent, in the words of today, by device and reason.", labels=["device", "reason"]
    )
    answers = CounterMetricFamily(
        "hmmd_answers", "Events by how they ended, by device and outcome.", labels=["device", "outcome"]
    )
    stale = CounterMetricFamily(
        "hmmd_stale_answers", "Answers that came again or too late to count, by device.", labels=["device"]
    )
    latency = HistogramMetricFamily(
        "hmmd_acknowledgement_latency_seconds", "From sending an event to its answer, by device.", labels=["device"]
    )
    for device, total in totals.items():
        counters = total.counters
        for etype in EventType:
            if count := counters[EVENTS_OF[etype]]:
                types.add_metric([device, etype.name.lower()], count)
        for reason, count in sorted(total.reasons.items()):
            reasons.add_metric([device, reason.lower()], count)
        for outcome in _OUTCOMES:
            answers.add_metric([device, outcome], counters[outcome])
        stale.add_metric([device], counters["repeated_answers"] + counters["late_answers"])
        latency.add_metric([device], _cumulative(total.latencies), total.latency_sum_s)
    yield from (types, reasons, answers, stale, latency)
    for name, text in (("ranges", "Ranges"), ("pages", "Pages"), ("bytes", "Bytes")):
        family = CounterMetricFamily(f"hmmd_event_{name}", f"{text} of events sent, by device.", labels=["device"])
        for device, total in totals.items():
            family.add_metric([device], total.sent[name])
        yield family


def _faults(totals: dict[str, DeviceTotals]) -> Iterator[Metric]:
    for name, counter, text in (
        ("faults", "faults", "Device faults that ended well, by device."),
        ("fault_pages", "faulted_pages", "Pages that device faults brought in, by device."),
        ("fault_retries", "retries", "How often device faults started over, by device."),
        ("refused_accesses", "refused_accesses", "Accesses of devices that were refused, by device."),
    ):
        family = CounterMetricFamily(f"hmmd_{name}", text, labels=["device"])
        for device, total in totals.items():
            family.add_metric([device], total.counters[counter])
        yield family
    accesses = CounterMetricFamily(
        "hmmd_access_bytes", "Bytes that devices accessed, by device and direction.", labels=["device", "direction"]
    )
    violations = CounterMetricFamily(
        "hmmd_violations", "What devices did that they must not, by device and kind.", labels=["device", "kind"]
    )
    fences = CounterMetricFamily("hmmd_fenced_mirrors", "Mirrors that were fenced, by device.", labels=["device"])
    for device, total in totals.items():
        for direction in ("read", "written"):
            accesses.add_metric([device, direction], total.counters[f"bytes_{direction}"])
        for kind, count in total.violations.items():
            violations.add_metric([device, kind.name.lower()], count)
        fences.add_metric([device], total.fences)
    yield from (accesses, violations, fences)


def _cumulative(counts: list[int]) -> list[tuple[str, float]]:
    running, buckets = 0, []
    for bound, count in zip(BUCKETS, counts, strict=True):
        running += count
        buckets.append((bound, float(running)))
    return buckets


# ---- serving


def registry_of(streams: Streams) -> CollectorRegistry:
    """Everything that is told: the daemon's, the process's and the interpreter's metrics.  To be made on the loop."""
    registry = CollectorRegistry()
    registry.register(DaemonCollector(streams))
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - the interface
        """Somebody asked for nothing, or did not wait for the answer."""
        log.debug("a scrape was broken off: %r", sys.exception())


class _Server6(_Server):
    address_family = socket.AF_INET6


class _UnixServer(socketserver.UnixStreamServer, _Server):
    def server_bind(self) -> None:
        socketserver.UnixStreamServer.server_bind(self)
        self.server_name, self.server_port = "localhost", 0
        self.setup_environ()


class _Handler(WSGIRequestHandler):
    timeout = IDLE_S

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the interface
        """A scrape every few seconds is nothing to be told."""

    def get_environ(self) -> dict[str, Any]:
        """As CGI wants it; who asks on a UNIX socket has no address."""
        self.client_address = self.client_address or ("", 0)
        return super().get_environ()


@contextmanager
def serving_metrics(place: str, streams: Streams) -> Iterator[str]:
    """Serve /metrics over HTTP until the block ends.

    Args:
        place: PORT, HOST:PORT (port 0: any free one) or unix:PATH; a port alone is of 127.0.0.1.

    Yields: where it is served, as a URL or a path.

    Raises:
        ConfigError: the place is not understood.
        EndpointError: it cannot listen there.
    """
    app = _patient(make_wsgi_app(registry_of(streams)))
    host, port, path = _parse(place)
    try:
        if path:
            remove_stale(path)
            server: WSGIServer = _UnixServer(str(path), _Handler)
            server.set_app(app)
            path.chmod(0o600)
            where = f"unix:{path}"
        else:
            is_v6 = ":" in host
            server = make_server(host, port, app, _Server6 if is_v6 else _Server, _Handler)
            where = f"http://{f'[{host}]' if is_v6 else host}:{server.server_port}/metrics"
    except OSError as error:
        raise EndpointError(f"cannot serve metrics at {place}: {error.strerror or error}") from error
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        yield where
    finally:
        server.shutdown()
        server.server_close()
        if path:
            path.unlink(missing_ok=True)


def _parse(place: str) -> tuple[str, int, Path | None]:
    if place.startswith("unix:"):
        return "", 0, Path(place.removeprefix("unix:"))
    host, _, port = place.rpartition(":")
    if not is_port(port):
        raise ConfigError(f"metrics is {place!r}; it must be PORT, HOST:PORT or unix:PATH")
    return host.strip("[]") or "127.0.0.1", int(port), None


def _patient(app: WSGIApplication) -> WSGIApplication:
    """The same, but a daemon that is too busy to be read, or is ending, says so to who asks and not to its log."""

    def asked(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            return app(environ, start_response)
        except (TimeoutError, RuntimeError) as error:
            busy = isinstance(error, TimeoutError)
            log.warning("a scrape was not answered: %s", f"busy for {SCRAPE_S:g} s" if busy else error)
            start_response("503 Service Unavailable", [("Content-Type", "text/plain")])
            return [b"the daemon is busy or ending\n"]

    return asked
