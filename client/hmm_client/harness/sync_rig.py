"""The rig without await, for tests that are plain functions.

    with SyncRig(target) as rig:
        process = rig.process()
        heap = process.mmap(16 * 4096).span
        mirror = rig.mirror(process, MyDriver())
        with rig.hold(HoldPoint.EVENT_SENT, "munmap", process=process) as hold:
            unmapping = rig.background(process.munmap, heap.start, heap.size_bytes)
            hold.reached()
            ...
        unmapping.result()

**Source**: `hmm_client.harness.rig`, `hmm_client.sync`.

**Absent**: behaviour of its own, but for `background`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from random import Random
from typing import Any, ParamSpec, Self, TypeVar

from hmm.errors import HmmError
from hmm.ksm import KsmPass
from hmm_client import sync
from hmm_client.channel import DaemonError
from hmm_client.harness import holds
from hmm_client.harness.holds import HoldPoint
from hmm_client.harness.misbehaviour import Misbehaviour
from hmm_client.loop_thread import LoopThread
from hmm_client.sync import Client, Device, Driver, IntervalMirror, Mirror, Process
from hmm_proto.v1 import inspection_pb2

P = ParamSpec("P")
T = TypeVar("T")
BACKGROUND_THREADS = 32


class Hold:
    """As `hmm_client.harness.Hold`.  Made by `SyncRig.hold`.

    Attributes:
        aio: the asynchronous hold.
    """

    def __init__(self, aio: holds.Hold, loop: LoopThread) -> None:
        self.aio = aio
        self._loop = loop

    def reached(self) -> int:
        """Wait until a call has come to the point.  Returns: its operation id."""
        return self._loop.run(self.aio.reached())

    def release(self) -> None:
        """Let the call go on."""
        self._loop.run(self.aio.release())


class SyncRig:
    """A daemon, and what a test has made on it.

    Attributes:
        target: where the daemon listens.
        seed: of the test.
        random: chance that the seed repeats.
    """

    def __init__(self, target: str, *, seed: int = 0, token: str = "") -> None:
        """As `Rig`."""
        self.target = target
        self.seed = seed
        self.random = Random(seed)
        self._token = token
        self._loop = LoopThread.shared()
        self._clients: list[Client] = []
        self._processes: list[Process] = []
        self._program: Client | None = None
        self._devices = 0
        self._executor = ThreadPoolExecutor(BACKGROUND_THREADS, "hmm_client rig")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Say goodbye, then let all processes exit.  A daemon that has gone is no error."""
        for client in self._clients:
            if client is not self._program:
                client.close()
        for process in self._processes:
            with suppress(HmmError, DaemonError):
                process.exit()
        if self._program is not None:
            self._program.close()
        self._executor.shutdown()

    def background(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Make a call on another thread while the test goes on; `.result()` waits for it."""
        return self._executor.submit(function, *args, **kwargs)

    def client(self, name: str) -> Client:
        """A client that is closed with the rig."""
        client = sync.connect(self.target, self._token, name=name)
        self._clients.append(client)
        return client

    @property
    def program(self) -> Client:
        """The client that the rig's processes belong to; it serves no device."""
        if self._program is None:
            self._program = self.client("program")
        return self._program

    def process(self, name: str = "program") -> Process:
        """A process with an empty address space, which exits with the rig."""
        process = self.program.create_process(name)
        self._processes.append(process)
        return process

    def device(self, name: str = "", **options: Any) -> Device:
        """A device with a client, and so a stream, of its own."""
        name = name or f"gpu{self._devices}"
        self._devices += 1
        return self.client(name).register_device(name, **options)

    def mirror(
        self, process: Process, driver: Driver | None = None, *, device: Device | None = None, **options: Any
    ) -> Mirror:
        """A mirror of a process; options as of `Device.mirror`."""
        return (device or self.device()).mirror(process, driver or Driver(), **options)

    # ---- holds and failures

    @contextmanager
    def hold(
        self,
        point: HoldPoint,
        operation: str = "",
        *,
        process: Process | None = None,
        mirror: Mirror | None = None,
        **options: Any,
    ) -> Iterator[Hold]:
        """Hold the next call that comes to a point, as `Harness.hold`."""
        aio = self._harness.hold(
            point, operation, process=process.aio if process else None, mirror=mirror.aio if mirror else None, **options
        )
        self._loop.run(aio.__aenter__())
        try:
            yield Hold(aio, self._loop)
        except BaseException as error:
            self._loop.run(aio.__aexit__(type(error), error, error.__traceback__))
            raise
        self._loop.run(aio.__aexit__(None, None, None))

    def fail_allocation(self, nth: int) -> None:
        """Make the nth page of system memory from now on impossible to allocate; 0: none any more."""
        self._loop.run(self._harness.fail_allocation(nth))

    def fail_dma_mapping(self, device: Device, nth: int) -> None:
        """Make the nth DMA mapping of a device from now on fail, once; 0: none any more."""
        self._loop.run(self._harness.fail_dma_mapping(device.aio, nth))

    def fail_migrate_to_ram(self, device: Device, nth: int) -> None:
        """Make the nth page from now on that is touched in a device's private memory stay there; 0: none any more."""
        self._loop.run(self._harness.fail_migrate_to_ram(device.aio, nth))

    def fail_copy(self, mirror: Mirror | IntervalMirror, nth: int) -> None:
        """Make the copy of the nth page from now on fail, once, to a mirror's device or back; 0: none any more."""
        self._loop.run(self._harness.fail_copy(mirror.aio, nth))

    def scan_ksm(self, passes: int = 2) -> KsmPass:
        """Merge equal pages of all memory that asked for it, as `Harness.scan_ksm`."""
        return self._loop.run(self._harness.scan_ksm(passes))

    def wait_held(self, script: Misbehaviour, count: int = 1) -> None:
        """Wait until a script holds so many events."""
        self._loop.run(script.wait_held(count))

    @property
    def _harness(self) -> holds.Harness:
        return holds.Harness(self.program.aio)

    # ---- looking

    def pending(self) -> inspection_pb2.GetPendingResponse:
        """Who waits for whom, and why."""
        request = inspection_pb2.GetPendingRequest()
        channel, inspection = self.program.aio.channel, self.program.aio.inspection
        response: inspection_pb2.GetPendingResponse = self._loop.run(channel.request(inspection.GetPending, request))
        return response
