"""The daemon as its clients see it, on a UNIX socket, against bare sockets and bare gRPC on the same machine.

The client and the drivers run on one CPU, the daemon and the bare servers on another ("two CPUs") or on the same one
("one CPU"): a wake-up of another CPU costs more than many a message, so both are told apart.  Times are microseconds
unless the unit says otherwise; medians of a round, ratios within a round.

Whatever travels on a session costs at least what a bare gRPC stream costs, and what the core takes for the same
request in this process.  Rows that begin with "floor" add these two up: no target can be met below them, and what lies
above is the daemon's and the client library's.  The core takes several times as long right after a message as in a loop
that does nothing else, and a daemon has no loop: of a fault, both are told.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import hmm_client  # before grpc, which reads the environment that this sets

# isort: split

import grpc
import numpy as np
import peers
import uvloop
from measurement import Row, alone, compared, print_rows

from hmm import commands_device as devices
from hmm import commands_process as processes
from hmm.limits import Limits
from hmm.local import Local
from hmm.machine import Machine
from hmm.units import PAGE_SHIFT, PAGE_SIZE
from hmm.unmapped_area import MapFlag
from hmm.vma import Prot
from hmm_client import AddressRange, Client, Mirror, Process
from hmm_client import calls as process_calls
from hmm_proto.v1 import inspection_pb2

MIRRORS = (1, 8, 64, 256)
FURTHER = 3
"""Client processes beside the first one, in the measurement of what a further one costs."""
GIB_PAGES = 1 << 18
ENTRIES = 1 << 16
MESSAGE_BYTES = 32
ID_BYTES = 4
"""Of a mirror in an event: its number and the event's."""
Figures = dict[str, list[float]]


# ---- processes


@contextmanager
def running(arguments: Sequence[str], cpu: int) -> Iterator[int]:
    """A process on one CPU, from its first line of output on; gives its pid.  It ends with its input or by a signal."""
    command = ["taskset", "-c", str(cpu), sys.executable, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if not process.stdout.readline():
                raise RuntimeError(f"{' '.join(arguments)} did not start")
            yield process.pid
        finally:
            process.stdin.close()
            process.terminate()


@dataclass(frozen=True)
class Servers:
    """Where the bare servers and the daemon listen, and the pids of those that speak gRPC."""

    raw: str
    grpc: str
    daemon: str
    grpc_pid: int
    daemon_pid: int


@contextmanager
def serving(server_cpu: int, directory: Path) -> Iterator[Servers]:
    """The daemon and the bare servers, all on one CPU."""
    raw, bare, target = f"{directory}/raw", f"{directory}/grpc", f"unix:{directory}/hmmd"
    peer = str(Path(peers.__file__))
    daemon = ["-m", "hmm_server", f"--socket={directory}/hmmd", "--log-level=warning", "--fault-s=60", "--devices=1024"]
    with ExitStack() as stack:
        stack.enter_context(running([peer, "raw", raw], server_cpu))
        bare_pid = stack.enter_context(running([peer, "grpc", bare], server_cpu))
        daemon_pid = stack.enter_context(running(daemon, server_cpu))
        yield Servers(raw, bare, target, bare_pid, daemon_pid)


def cpu_us(pid: int) -> float:
    """What all threads of a process have used of its CPU, in microseconds."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1000


# ---- yardsticks


class RawClient(asyncio.BufferedProtocol):
    """Asks a `peers.RawServer` for bytes, again and again, without a task in between."""

    def __init__(self) -> None:
        self._buffer = bytearray(1 << 22)
        self._got = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the connection."""
        self._transport: Any = transport

    async def ask(self, nbytes: int, times: int) -> list[float]:
        """Ask `times` times for `nbytes`, one after the other.  Returns: microseconds of each."""
        self._wanted, self._left = nbytes, times
        self._took: list[float] = []
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._send()
        await self._done
        return self._took

    def _send(self) -> None:
        self._got = 0
        self._began = perf_counter()
        self._transport.write(peers.REQUEST.pack(self._wanted))

    def get_buffer(self, _: int) -> memoryview:
        """Where the next bytes go."""
        return memoryview(self._buffer)[self._got :]

    def buffer_updated(self, nbytes: int) -> None:
        """Some bytes have come; ask again when it was all."""
        self._got += nbytes
        if self._got == self._wanted:
            self._took.append((perf_counter() - self._began) * 1e6)
            self._left -= 1
            if self._left:
                self._send()
            else:
                self._done.set_result(None)


class Yardsticks:
    """The bare socket and the bare stream."""

    def __init__(self, raw: RawClient, stream: Any) -> None:
        self._raw = raw
        self._stream = stream

    @classmethod
    async def connect(cls, servers: Servers, channel: grpc.aio.Channel) -> Yardsticks:
        """Connect to both."""
        _, raw = await asyncio.get_running_loop().create_unix_connection(RawClient, servers.raw)
        return cls(raw, channel.stream_stream(peers.STREAM)())

    async def socket(self, nbytes: int, times: int) -> float:
        """Microseconds of a request for `nbytes` on the bare socket."""
        return median(await self._raw.ask(nbytes, times))

    async def stream(self, nbytes: int, times: int) -> float:
        """Microseconds of a request for `nbytes` on the bare stream."""
        return await typical(partial(self.echo, nbytes), times)

    async def echo(self, nbytes: int) -> None:
        """One request for `nbytes` on the bare stream."""
        await self._stream.write(peers.REQUEST.pack(nbytes))
        await self._stream.read()


async def typical(call: Callable[[], Awaitable[Any]], times: int) -> float:
    """Microseconds of a call, the median of some."""
    took = []
    for _ in range(times):
        began = perf_counter()
        await call()
        took.append((perf_counter() - began) * 1e6)
    return median(took)


# ---- the daemon


class Model:
    """What is measured on the daemon: processes whose mirrors are told of their munmaps."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def set_up(self, mirrors: Sequence[int]) -> None:
        """One process for each number of mirrors, all of these in this client; and one for faults, with one mirror."""
        devices = [await self._client.register_device("bench") for _ in range(max(mirrors))]
        self._by_mirrors: dict[int, Process] = {}
        for count in mirrors:
            process = self._by_mirrors[count] = await self._client.create_process("bench")
            for device in devices[:count]:
                await device.mirror(process, hmm_client.Driver(), fault_events=False)
        self._process = await self._client.create_process("bench")
        self._mirror: Mirror = await devices[0].mirror(self._process, hmm_client.Driver(), fault_events=False)
        mapped = await self._process.mmap(GIB_PAGES << PAGE_SHIFT)
        self._start = mapped.address
        await self._process.touch(self._start, GIB_PAGES << PAGE_SHIFT, write=True)

    async def process_for(self, drivers: Sequence[str], target: str, stack: ExitStack, cpu: int) -> Process:
        """A process that is mirrored by as many further client processes as there are `drivers`."""
        process = await self._client.create_process("bench")
        for mirrors in drivers:
            peer = [str(Path(peers.__file__)), "driver", target, mirrors, str(process.id)]
            await asyncio.to_thread(stack.enter_context, running(peer, cpu))
        return process

    async def unary(self, times: int) -> float:
        """Microseconds of a call that does next to nothing."""
        return await typical(lambda: self._client.make(process_calls.brk(self._process.id, 0)), times)

    async def fault(self, npages: int, times: int) -> float:
        """Microseconds of a fault of so many pages, all of which the mirror has."""
        span = AddressRange(self._start, self._start + (npages << PAGE_SHIFT))
        return await typical(lambda: self._mirror.fault(span, write=True), times)

    async def scattered_fault(self, npages: int, times: int) -> float:
        """Microseconds of a fault of so many pages here and there, which the mirror does not have yet."""
        step = GIB_PAGES // npages
        pages = np.arange(npages, dtype=np.uint64) * np.uint64(step * PAGE_SIZE) + np.uint64(self._start)
        whole = AddressRange(self._start, self._start + (GIB_PAGES << PAGE_SHIFT))
        took = []
        for _ in range(times):
            await self._mirror.discard(whole)
            began = perf_counter()
            await self._mirror.fault(pages, write=True)
            took.append((perf_counter() - began) * 1e6)
        return median(took)

    async def munmap(self, process: Process | int, times: int) -> tuple[float, float]:
        """Microseconds of a munmap as the client sees it, and from its start to its end in the daemon."""
        if isinstance(process, int):
            process = self._by_mirrors[process]
        took, inside = [], []
        for _ in range(times):
            mapped = await process.mmap(PAGE_SIZE)
            began = perf_counter()
            done = await process.munmap(mapped.address, PAGE_SIZE)
            took.append((perf_counter() - began) * 1e6)
            request = inspection_pb2.GetOperationRequest(operation_id=done.operation_id)
            response = await self._client.channel.request(self._client.inspection.GetOperation, request)
            inside.append(float(response.operation.duration_us))
        return median(took), median(inside)


class Core:
    """The requests of `Model` made of the core, in this process: no socket, no gRPC, a driver that answers at once."""

    def __init__(self) -> None:
        self._local = Local(Machine(Limits(frames=GIB_PAGES + 1024)))
        self._pid = self._local.call(processes.create_process)
        device = self._local.call(devices.register_device, "bench")
        self._mirror = self._local.call(devices.register_mirror, device, self._pid, update_on_fault=False)
        self._whole = self._map(GIB_PAGES)
        self._local.call(processes.touch, self._pid, self._whole, write=True)

    def _map(self, npages: int) -> AddressRange:
        flags = MapFlag.PRIVATE | MapFlag.ANONYMOUS
        size = npages << PAGE_SHIFT
        start = self._local.call(processes.mmap, self._pid, 0, size, Prot.READ | Prot.WRITE, flags).address
        return AddressRange(start, start + size)

    def fault(self, times: int) -> float:
        """Microseconds of a fault of one page, which the mirror has."""
        return median(self._fault() for _ in range(times))

    async def fault_between(self, message: Callable[[], Awaitable[None]], times: int) -> float:
        """The same with a message before each one, as in a daemon: what it needs has left the caches of the CPU."""
        took = []
        for _ in range(times):
            await message()
            took.append(self._fault())
        return median(took)

    def _fault(self) -> float:
        span = (AddressRange(self._whole.start, self._whole.start + PAGE_SIZE),)
        return self._timed(devices.fault, self._mirror, span, write=True)

    def scattered_fault(self, npages: int, times: int) -> float:
        """Microseconds of a fault of so many pages here and there, which the mirror does not have yet."""
        pages = np.linspace(self._whole.start, self._whole.end, npages, endpoint=False).astype(np.uint64)
        pages &= ~np.uint64(PAGE_SIZE - 1)
        took = []
        for _ in range(times):
            self._local.call(devices.discard_range, self._mirror, self._whole)
            took.append(self._timed(devices.fault, self._mirror, pages, write=True))
        return median(took)

    def munmap(self, times: int) -> float:
        """Microseconds of a munmap that the mirror is told of."""
        spans = [self._map(1) for _ in range(times)]
        return median(self._timed(processes.munmap, self._pid, span.start, PAGE_SIZE) for span in spans)

    def _timed(self, command: Callable[..., Any], *arguments: Any, **options: Any) -> float:
        began = perf_counter()
        self._local.call(command, *arguments, **options)
        return (perf_counter() - began) * 1e6


# ---- measuring


def measure(quick: bool) -> Iterator[Row]:
    """Latencies on two CPUs and on one, fan-out, bulk."""
    cpus = sorted(os.sched_getaffinity(0))
    rounds, times = (3, 40) if quick else (9, 150)
    pinnings = [("one CPU", cpus[-1])] if len(cpus) == 1 else [("two CPUs", cpus[0]), ("one CPU", cpus[-1])]
    for name, server_cpu in pinnings:
        os.sched_setaffinity(0, {cpus[-1]})
        try:
            with tempfile.TemporaryDirectory() as directory, serving(server_cpu, Path(directory)) as servers:
                figures = uvloop.run(_figures(servers, cpus[-1], rounds, times))
        finally:
            os.sched_setaffinity(0, set(cpus))
        yield from _rows(name, figures, split=name == "two CPUs")


async def _figures(servers: Servers, cpu: int, rounds: int, times: int) -> Figures:
    figures: Figures = {}

    def note(name: str, value: float) -> None:
        figures.setdefault(name, []).append(value)

    with ExitStack() as stack:
        async with (
            grpc.aio.insecure_channel(f"unix:{servers.grpc}") as channel,
            hmm_client.connect(servers.daemon, name="bench") as client,
        ):
            yardsticks = await Yardsticks.connect(servers, channel)
            model = Model(client)
            await model.set_up(MIRRORS)
            alone_there = await model.process_for(["1"], servers.daemon, stack, cpu)
            together = await model.process_for(["1"] * (1 + FURTHER), servers.daemon, stack, cpu)
            core = Core()
            few = max(5, times // 10)
            for number in range(rounds + 1):
                if number == 1:
                    figures.clear()  # the first round warms up
                note("socket", await yardsticks.socket(MESSAGE_BYTES, times))
                for what, pid, call in (
                    ("stream", servers.grpc_pid, yardsticks.stream(MESSAGE_BYTES, times)),
                    ("fault", servers.daemon_pid, model.fault(1, times)),
                ):
                    before = cpu_us(pid), cpu_us(os.getpid())
                    note(what, await call)
                    note(f"{what}: server", (cpu_us(pid) - before[0]) / times)
                    note(f"{what}: client", (cpu_us(os.getpid()) - before[1]) / times)
                note("core: fault", core.fault(times))
                echo = partial(yardsticks.echo, MESSAGE_BYTES)
                note("core: fault between messages", await core.fault_between(echo, times))
                note("core: scattered", core.scattered_fault(256, few))
                note("core: munmap", core.munmap(times))
                note("stream of words", await yardsticks.stream(256 * 8, times))
                note("stream of ids", await yardsticks.stream(max(MIRRORS) * ID_BYTES, times))
                note("scattered", await model.scattered_fault(256, few))
                note("unary", await model.unary(times))
                for count in MIRRORS:
                    seen, inside = await model.munmap(count, times // 2)
                    note(f"munmap {count}", seen)
                    note(f"event {count}", inside)
                note("one process", (await model.munmap(alone_there, times // 2))[1])
                note("more processes", (await model.munmap(together, times // 2))[1])
                note("bytes", await yardsticks.socket(ENTRIES * 8, few))
                note("stream bytes", await yardsticks.stream(ENTRIES * 8, few))
                note("range", await model.fault(ENTRIES, few))
                note("gigabyte", await model.fault(GIB_PAGES, 3))
                note("gigabyte of bytes", await yardsticks.socket(GIB_PAGES * 8, 3))
    return figures


def _rows(where: str, figures: Figures, *, split: bool) -> Iterator[Row]:
    def ratio(name: str, ours: Sequence[float], theirs: Sequence[float], target: float | None = None) -> Row:
        return compared(f"{name}, {where}", "us", ours, theirs, target)

    def sums(*names: str) -> list[float]:
        return [sum(values) for values in zip(*(figures[name] for name in names), strict=True)]

    trip, event, unary = figures["fault"], figures["event 1"], figures["unary"]
    least = sums("stream", "core: fault")
    yield ratio("bare gRPC stream / bare socket", figures["stream"], figures["socket"])
    yield ratio("65,536 words, bare gRPC stream / bare socket", figures["stream bytes"], figures["bytes"])
    yield ratio("fault of one page / bare socket", trip, figures["socket"], 2.5 if split else 15.0)
    yield ratio("floor of that: bare gRPC stream + the core", least, figures["socket"])
    least_between = sums("stream", "core: fault between messages")
    yield ratio("floor of that: bare gRPC stream + the core between messages", least_between, figures["socket"])
    between = figures["core: fault between messages"]
    yield ratio("the core between messages / in a loop", between, figures["core: fault"])
    yield ratio("fault of one page / bare gRPC stream", trip, figures["stream"])
    for side in ("server", "client"):
        cost = figures[f"fault: {side}"], figures[f"stream: {side}"]
        yield ratio(f"CPU of the {side}, fault / bare gRPC message", *cost)
    ours = figures["fault: server"], sums("stream: server", "core: fault between messages")
    yield ratio("CPU of the server, fault / bare gRPC message + the core between messages", *ours)
    yield ratio("unary call / fault of one page", unary, trip)
    yield ratio("event and answer, 1 mirror / fault of one page", event, trip, 1.5)
    yield ratio("floor of that: streams + the core's munmap / its fault", sums("stream", "core: munmap"), least)
    yield ratio("event and answer, 1 mirror / bare gRPC stream", event, figures["stream"])
    for count in MIRRORS[1:]:
        target = 1.5 if count == max(MIRRORS) else None
        yield ratio(f"event and answer, {count} mirrors / 1 mirror", figures[f"event {count}"], event, target)
    many = figures[f"event {max(MIRRORS)}"]
    yield ratio(f"event and answer, {max(MIRRORS)} mirrors / bare gRPC stream", many, figures["stream of ids"])
    apiece = [(all_ - one) * 1000 / (max(MIRRORS) - 1) for all_, one in zip(many, event, strict=True)]
    yield alone(f"each further mirror in one process, {where}", "ns", apiece)
    further = [
        (more - one) / FURTHER for more, one in zip(figures["more processes"], figures["one process"], strict=True)
    ]
    yield ratio("each further client process / fault of one page", further, trip, 1.3)
    both = [a + b for a, b in zip(unary, event, strict=True)]
    yield ratio("munmap, 1 mirror / unary call + event and answer", figures["munmap 1"], both, 1.6)
    yield ratio("256 scattered faults in one call / fault of one page", figures["scattered"], trip, 1.5)
    yield ratio("floor of that: streams + the core", sums("stream of words", "core: scattered"), least)
    yield alone(f"256 scattered faults in one call, {where}", "us", figures["scattered"], 720.0)
    yield ratio("fault of 65,536 pages / the bytes on a bare socket", figures["range"], figures["bytes"], 12.0)
    yield ratio("fault of 65,536 pages / the bytes on a bare gRPC stream", figures["range"], figures["stream bytes"])
    per_entry = [value * 1000 / ENTRIES for value in figures["range"]]
    yield alone(f"fault of 65,536 pages, per entry, {where}", "ns", per_entry, 17.0)
    per_word = [value * 1000 / ENTRIES for value in figures["stream bytes"]]
    yield alone(f"floor of that: 65,536 words on a bare gRPC stream, {where}", "ns", per_word)
    yield ratio("fault of 1 GiB / the bytes on a bare socket", figures["gigabyte"], figures["gigabyte of bytes"])


if __name__ == "__main__":
    print_rows(measure("--quick" in sys.argv))
