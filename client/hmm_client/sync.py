"""The same client without await, for scripts and notebooks.

    with hmm_client.sync.connect() as client:
        process = client.create_process("demo")
        mapped = process.mmap(1 << 20)
        process.write(mapped.address, b"hello")

A loop on a thread of its own serves the session, also while the caller blocks: a driver must hear the events that its
own calls cause.

Every method is the asynchronous one of the same name and has its arguments, results and errors.

**Source**: `hmm_client.client` and the handles.

**Absent**: behaviour of its own; drivers (sync_driver.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from functools import partial, update_wrapper
from threading import Thread
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

import grpc
import numpy as np
import numpy.typing as npt

from hmm.address_space import Thp
from hmm.commands_hmm import RangeFaulted
from hmm.commands_userfaultfd import UserfaultMessage
from hmm.file import FileKind
from hmm.frames import RegionKind
from hmm.migration import Select
from hmm.mirror import DeadlinePolicy
from hmm.units import Address, AddressRange, DeviceId, Entries, Pfn, Pfns, ProcessId
from hmm_client import client as aio_client
from hmm_client import device as aio_device
from hmm_client import driver as aio_driver
from hmm_client import file as aio_file
from hmm_client import interval_mirror as aio_interval
from hmm_client import migration as aio_migration
from hmm_client import mirror as aio_mirror
from hmm_client import pin as aio_pin
from hmm_client import process as aio_process
from hmm_client import userfaultfd as aio_userfaultfd
from hmm_client.calls import Call
from hmm_client.loop_thread import LoopThread
from hmm_client.receiver import Between
from hmm_client.results import Outcome
from hmm_client.sync_driver import AnyDriver, Driver, Event, IntervalDriver, adapted, adapted_interval

__all__ = [
    "AnyDriver",
    "Client",
    "Device",
    "Driver",
    "Event",
    "File",
    "IntervalDriver",
    "IntervalMirror",
    "IntervalNotifier",
    "Migration",
    "Mirror",
    "Pin",
    "Process",
    "Userfaultfd",
    "around",
    "connect",
]

P = ParamSpec("P")
T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B", bound=AbstractAsyncContextManager[Any])
F = TypeVar("F", bound=Callable[..., object])

CALLBACK_THREADS = 64
"""How many callbacks can run, or wait for calls of their own, at a time."""
CALLBACK_END_S = 5.0
"""How long `Client.close` waits for callbacks."""
_LOG = logging.getLogger(__name__)


class blocking(Generic[P, T]):  # noqa: N801 - used like a decorator
    """An asynchronous method as a blocking one: `munmap = blocking(aio.Process.munmap)`."""

    def __init__(self, method: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]) -> None:
        self._method = method
        self.__doc__ = method.__doc__

    def __get__(self, handle: _Handle[Any], owner: type) -> Callable[P, T]:
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            return handle.loop.run(self._method(handle.aio, *args, **kwargs))

        return update_wrapper(call, self._method)


def documented_as(method: Callable[..., object]) -> Callable[[F], F]:
    """A function that has the arguments and errors of another one, and its documentation for `help()`."""

    def documented(function: F) -> F:
        function.__doc__ = method.__doc__
        return function

    return documented


class _Handle(Generic[A]):
    """A handle here: the asynchronous one, and the loop that it lives on.

    Attributes:
        aio: the asynchronous handle.
        loop: where it lives.
    """

    def __init__(self, aio: A, loop: LoopThread) -> None:
        self.aio = aio
        self.loop = loop

    def __repr__(self) -> str:
        return repr(self.aio)


class _Block(_Handle[B]):
    """A handle that is to be used in `with`."""

    def __enter__(self) -> Self:
        self.loop.run(self.aio.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.loop.run(self.aio.__aexit__(kind, error, traceback))


class Process(_Handle[aio_process.Process]):
    """As `hmm_client.Process`."""

    @property
    def id(self) -> ProcessId:
        """Names the process."""
        return self.aio.id

    mmap = blocking(aio_process.Process.mmap)
    munmap = blocking(aio_process.Process.munmap)
    mprotect = blocking(aio_process.Process.mprotect)
    mremap = blocking(aio_process.Process.mremap)
    madvise = blocking(aio_process.Process.madvise)
    brk = blocking(aio_process.Process.brk)
    msync = blocking(aio_process.Process.msync)
    mlock = blocking(aio_process.Process.mlock)
    munlock = blocking(aio_process.Process.munlock)
    mlockall = blocking(aio_process.Process.mlockall)
    munlockall = blocking(aio_process.Process.munlockall)
    mincore = blocking(aio_process.Process.mincore)
    pagemap = blocking(aio_process.Process.pagemap)
    place = blocking(aio_process.Process.place)
    maps = blocking(aio_process.Process.maps)
    smaps = blocking(aio_process.Process.smaps)
    clear_refs = blocking(aio_process.Process.clear_refs)
    read = blocking(aio_process.Process.read)
    write = blocking(aio_process.Process.write)
    touch = blocking(aio_process.Process.touch)
    access_pages = blocking(aio_process.Process.access_pages)
    exec = blocking(aio_process.Process.exec)
    mrelease = blocking(aio_process.Process.mrelease)
    exit = blocking(aio_process.Process.exit)

    def pin(self, span: AddressRange, *, write: bool = False, long_term: bool = True) -> Pin:
        """pin_user_pages()."""
        return Pin(self.loop.run(self.aio.pin(span, write=write, long_term=long_term)), self.loop)

    def userfaultfd(self, features: int = 0) -> Userfaultfd:
        """userfaultfd(2); to be used in `with`."""
        return Userfaultfd(self.aio.userfaultfd(features), self.loop)

    def fork(self) -> Process:
        """fork(2)."""
        return Process(self.loop.run(self.aio.fork()), self.loop)

    def vfork(self) -> Process:
        """vfork(2)."""
        return Process(self.loop.run(self.aio.vfork()), self.loop)

    def thread(self) -> Process:
        """clone(2) with CLONE_VM | CLONE_THREAD."""
        return Process(self.loop.run(self.aio.thread()), self.loop)


class File(_Handle[aio_file.File]):
    """As `hmm_client.File`."""

    @property
    def id(self) -> int:
        """Names the open file."""
        return self.aio.id

    truncate = blocking(aio_file.File.truncate)
    punch = blocking(aio_file.File.punch)
    read = blocking(aio_file.File.read)
    write = blocking(aio_file.File.write)
    status = blocking(aio_file.File.status)
    close = blocking(aio_file.File.close)


class Pin(_Handle[aio_pin.Pin]):
    """As `hmm_client.pin.Pin`."""

    @property
    def id(self) -> int:
        """Names the pin."""
        return self.aio.id

    unpin = blocking(aio_pin.Pin.unpin)


class Userfaultfd(_Block[aio_userfaultfd.Userfaultfd]):
    """As `hmm_client.userfaultfd.Userfaultfd`, to be used in `with`; handlers run on worker threads."""

    @property
    def id(self) -> int:
        """Names it."""
        return self.aio.id

    def serve(self, handler: Callable[[UserfaultMessage], bytes | None]) -> None:
        """Let `handler` bring in what is missing, one fault after the other, until this is closed."""

        async def serve() -> None:
            self.aio.serve(handler)

        self.loop.run(serve())

    read = blocking(aio_userfaultfd.Userfaultfd.read)
    register = blocking(aio_userfaultfd.Userfaultfd.register)
    unregister = blocking(aio_userfaultfd.Userfaultfd.unregister)
    copy = blocking(aio_userfaultfd.Userfaultfd.copy)
    zeropage = blocking(aio_userfaultfd.Userfaultfd.zeropage)
    continue_range = blocking(aio_userfaultfd.Userfaultfd.continue_range)
    wake = blocking(aio_userfaultfd.Userfaultfd.wake)


class Mirror(_Handle[aio_mirror.Mirror]):
    """As `hmm_client.Mirror`."""

    @property
    def id(self) -> int:
        """Names the mirror."""
        return self.aio.id

    @property
    def lost(self) -> str:
        """Why the mirror was fenced; empty while it lives."""
        return self.aio.lost

    def is_stale(self, faulted: aio_mirror.Faulted) -> bool:
        """True when a later event takes back what a fault returned; to be asked under the device's own lock."""
        return self.aio.is_stale(faulted)

    fault = blocking(aio_mirror.Mirror.fault)
    migrate = blocking(aio_mirror.Mirror.migrate)
    migrate_back = blocking(aio_mirror.Mirror.migrate_back)
    read_copy = blocking(aio_mirror.Mirror.read_copy)
    write_copy = blocking(aio_mirror.Mirror.write_copy)
    read = blocking(aio_mirror.Mirror.read)
    write = blocking(aio_mirror.Mirror.write)
    dirty = blocking(aio_mirror.Mirror.dirty)
    discard = blocking(aio_mirror.Mirror.discard)
    set_driver_bits = blocking(aio_mirror.Mirror.set_driver_bits)
    read_table = blocking(aio_mirror.Mirror.read_table)
    unregister = blocking(aio_mirror.Mirror.unregister)


class IntervalNotifier(_Handle[aio_interval.IntervalNotifier]):
    """As `hmm_client.IntervalNotifier`."""

    @property
    def id(self) -> int:
        """Names it among those of its mirror."""
        return self.aio.id

    def is_stale(self, span: AddressRange, faulted: RangeFaulted) -> bool:
        """True when a later event takes back what a fault returned; to be asked under the driver's own lock."""
        return self.aio.is_stale(span, faulted)

    remove = blocking(aio_interval.IntervalNotifier.remove)
    read_begin = blocking(aio_interval.IntervalNotifier.read_begin)
    read_retry = blocking(aio_interval.IntervalNotifier.read_retry)
    range_fault = blocking(aio_interval.IntervalNotifier.range_fault)
    fault = blocking(aio_interval.IntervalNotifier.fault)


class Migration(_Block[aio_migration.Migration]):
    """As `hmm_client.migration.Migration`: `with mirror.migrate_vma(span) as migration`."""

    @property
    def id(self) -> int:
        """Names the migration."""
        return self.aio.id

    @property
    def src(self) -> Entries:
        """uint64[npages], as the last step left it."""
        return self.aio.src

    @property
    def lease_s(self) -> float:
        """Seconds after which the daemon ends it when no step is taken."""
        return self.aio.lease_s

    @property
    def over(self) -> bool:
        """Whether it has ended, as far as its steps have said."""
        return self.aio.over

    @property
    def movable(self) -> npt.NDArray[np.intp]:
        """As of the asynchronous one."""
        return self.aio.movable

    @documented_as(aio_migration.Migration.destinations)
    def destinations(self, pfns: Pfns) -> Entries:  # noqa: D102 - documented as the asynchronous one
        return self.aio.destinations(pfns)

    @documented_as(aio_migration.Migration.allocate)
    def allocate(self, count: int, *, device: Device | None = None, compound: bool = False) -> Pfns:  # noqa: D102
        other = None if device is None else device.aio
        return self.loop.run(self.aio.allocate(count, device=other, compound=compound))

    set_up = blocking(aio_migration.Migration.set_up)
    allocate_system = blocking(aio_migration.Migration.allocate_system)
    copy = blocking(aio_migration.Migration.copy)
    copy_frames = blocking(aio_migration.Migration.copy_frames)
    read = blocking(aio_migration.Migration.read)
    write = blocking(aio_migration.Migration.write)
    pages = blocking(aio_migration.Migration.pages)
    finalize = blocking(aio_migration.Migration.finalize)
    abort = blocking(aio_migration.Migration.abort)
    renew = blocking(aio_migration.Migration.renew)


class IntervalMirror(_Handle[aio_interval.IntervalMirror]):
    """As `hmm_client.IntervalMirror`."""

    @property
    def id(self) -> int:
        """Names the mirror."""
        return self.aio.id

    @property
    def lost(self) -> str:
        """Why the mirror was fenced; empty while it lives."""
        return self.aio.lost

    def insert(
        self, start: Address, length: int, *, filtered: bool = False, two_pass: bool = False
    ) -> IntervalNotifier:
        """Subscribe to a range."""
        inserted = self.aio.insert(start, length, filtered=filtered, two_pass=two_pass)
        return IntervalNotifier(self.loop.run(inserted), self.loop)

    @documented_as(aio_interval.IntervalMirror.migrate_vma)
    def migrate_vma(self, span: AddressRange, *, select: int = Select.SYSTEM) -> Migration:  # noqa: D102
        return Migration(self.aio.migrate_vma(span, select=select), self.loop)

    find_vma = blocking(aio_interval.IntervalMirror.find_vma)
    migrate_to_device = blocking(aio_interval.IntervalMirror.migrate_to_device)
    migrate_to_system = blocking(aio_interval.IntervalMirror.migrate_to_system)
    make_exclusive = blocking(aio_interval.IntervalMirror.make_exclusive)
    dma_map = blocking(aio_interval.IntervalMirror.dma_map)
    dma_unmap = blocking(aio_interval.IntervalMirror.dma_unmap)
    read_frames = blocking(aio_interval.IntervalMirror.read_frames)
    write_frames = blocking(aio_interval.IntervalMirror.write_frames)
    read_dma = blocking(aio_interval.IntervalMirror.read_dma)
    write_dma = blocking(aio_interval.IntervalMirror.write_dma)
    detach = blocking(aio_interval.IntervalMirror.detach)


class Device(_Handle[aio_device.Device]):
    """As `hmm_client.Device`."""

    @documented_as(aio_device.Device.mirror)
    def mirror(
        self,
        process: Process,
        driver: AnyDriver,
        *,
        policy: DeadlinePolicy = DeadlinePolicy.FENCE,
        fault_events: bool = True,
        concurrent: bool = False,
        report_only: bool = False,
        misbehaviour: Between | None = None,
    ) -> Mirror:
        """Mirror a process's address space."""
        aio_driver.require_driver(driver, "update", "Driver")
        executor = self.aio.client.executor
        assert isinstance(executor, ThreadPoolExecutor)
        adapter = adapted(driver, partial(Mirror, loop=self.loop), executor)
        options = {"policy": policy, "fault_events": fault_events, "concurrent": concurrent}
        options |= {"report_only": report_only, "misbehaviour": misbehaviour}
        mirror = self.loop.run(self.aio.mirror(process.aio, adapter, **options))  # type: ignore[arg-type]
        return Mirror(mirror, self.loop)

    @documented_as(aio_device.Device.attach)
    def attach(
        self,
        process: Process,
        driver: IntervalDriver,
        *,
        policy: DeadlinePolicy = DeadlinePolicy.FENCE,
        concurrent: bool = False,
        misbehaviour: Between | None = None,
    ) -> IntervalMirror:
        """Attach to a process with today's interface."""
        aio_driver.require_driver(driver, "invalidate", "IntervalDriver")
        executor = self.aio.client.executor
        assert isinstance(executor, ThreadPoolExecutor)
        adapter = adapted_interval(driver, partial(IntervalMirror, loop=self.loop), executor)
        options = {"policy": policy, "concurrent": concurrent, "misbehaviour": misbehaviour}
        mirror = self.loop.run(self.aio.attach(process.aio, adapter, **options))  # type: ignore[arg-type]
        return IntervalMirror(mirror, self.loop)

    @property
    def id(self) -> DeviceId:
        """Names the device."""
        return self.aio.id

    @property
    def frames(self) -> tuple[Pfn, Pfn]:
        """The frames of its own memory, from the first to behind the last."""
        return self.aio.frames

    evict = blocking(aio_device.Device.evict)
    unregister = blocking(aio_device.Device.unregister)


class Client(_Handle[aio_client.Client]):
    """As `hmm_client.Client`.  Made by `connect`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Say goodbye; mirrors that are still registered are fenced.  Callbacks that are running have some time to end.

        One that does not is told in the log, since Python does not end before it either.
        """
        self.loop.run(self.aio.close())
        assert self.aio.executor is not None
        ending = Thread(target=self.aio.executor.shutdown, daemon=True)
        ending.start()
        ending.join(CALLBACK_END_S)
        if ending.is_alive():
            _LOG.warning("a driver's callback has not returned %g s after the end of its client", CALLBACK_END_S)

    @documented_as(aio_client.Client.create_process)
    def create_process(
        self,
        name: str = "",
        *,
        mmap_base: int = 0,
        brk_start: int = 0,
        fault_around_pages: int = 1,
        thp: Thp = Thp.NEVER,
        low_addresses: bool = False,
    ) -> Process:
        """A process with an empty address space."""
        made = self.aio.create_process(
            name,
            mmap_base=mmap_base,
            brk_start=brk_start,
            fault_around_pages=fault_around_pages,
            thp=thp,
            low_addresses=low_addresses,
        )
        return Process(self.loop.run(made), self.loop)

    def process(self, process_id: ProcessId) -> Process:
        """A handle of a process that exists already."""
        return Process(self.aio.process(process_id), self.loop)

    def open_file(self, name: str, *, create: bool = False, kind: FileKind = FileKind.FILE, vm_flags: int = 0) -> File:
        """open(2)."""
        return File(self.loop.run(self.aio.open_file(name, create=create, kind=kind, vm_flags=vm_flags)), self.loop)

    def unlink_file(self, name: str) -> None:
        """unlink(2)."""
        self.loop.run(self.aio.unlink_file(name))

    @documented_as(aio_client.Client.register_device)
    def register_device(
        self,
        name: str,
        *,
        dma: bool = False,
        memory_pages: int = 0,
        kind: RegionKind = RegionKind.DEVICE_PRIVATE,
        driver_copies: bool = False,
        evicts: bool = False,
    ) -> Device:
        """Register a device; its mirrors are served by this client's session."""
        made = self.aio.register_device(
            name, dma=dma, memory_pages=memory_pages, kind=kind, driver_copies=driver_copies, evicts=evicts
        )
        return Device(self.loop.run(made), self.loop)

    def make(self, call: Call[T]) -> T:
        """Make one call of `hmm_client.calls`."""
        return self.loop.run(self.aio.make(call))

    def execute(self, calls: Sequence[Call[Any]], *, stop_at_error: bool = False) -> list[Outcome]:
        """Make many calls for one round trip."""
        return self.loop.run(self.aio.execute(calls, stop_at_error=stop_at_error))


def connect(
    target: str | None = None,
    token: str = "",
    *,
    name: str = "",
    credentials: grpc.ChannelCredentials | None = None,
    credit: int = 0,
) -> Client:
    """A client of the daemon at `target`; to be used in `with`.

    Args:
        target: "unix:PATH", PATH or "HOST:PORT"; None: $HMMD_SOCKET or where hmmd listens by default.
        token: owner of what this client creates, and its right to use it; empty: everybody's.
        name: what events, logs and `hmmctl pending` call this client.
        credentials: of TLS (`hmm_client.tls_credentials`); None: none.
        credit: how many unanswered events the drivers can have; 0: the daemon's default.
    """
    loop = LoopThread.shared()
    executor = ThreadPoolExecutor(CALLBACK_THREADS, "hmm_client callback")

    async def make() -> aio_client.Client:
        return aio_client.connect(target, token, name=name, credentials=credentials, credit=credit, executor=executor)

    return Client(loop.run(make()), loop)


def around(client: aio_client.Client) -> Client:
    """An asyncio client of the running loop, for other threads; its drivers' plain callbacks run on threads then.

    Closing it is left to whoever made the client.
    """
    client.executor = client.executor or ThreadPoolExecutor(CALLBACK_THREADS, "hmm_client callback")
    return Client(client, LoopThread.running())
