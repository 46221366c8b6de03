"""A device: what a driver registers before it mirrors processes.

**Source**: 2015: `hmm_device_register()`, `hmm_mirror_register()`; proto/hmm_proto/v1/device.proto.

**Absent**: what the device does with memory (`mirror.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from hmm.frames import RegionKind
from hmm.mirror import DeadlinePolicy
from hmm.units import DeviceId, Pfn
from hmm_client.arguments import names_arguments
from hmm_client.driver import Driver, require_driver
from hmm_client.interval_driver import IntervalDriver
from hmm_client.interval_mirror import IntervalMirror
from hmm_client.mirror import Mirror
from hmm_client.process import Process
from hmm_client.receiver import Between, Receiver
from hmm_client.session import Session
from hmm_proto.convert import memory_kind_to_proto, policy_to_proto
from hmm_proto.status import from_call_result
from hmm_proto.v1 import device_pb2, hmm_pb2

if TYPE_CHECKING:
    from hmm_client.client import Client

M = TypeVar("M", bound=Receiver)


@names_arguments
class Device:
    """A registered device.

    Attributes:
        name: for people.
        dma: entries of its tables are DMA addresses.
        frames: of its own memory, from the first to behind the last; two zeroes without memory.
    """

    def __init__(
        self, client: Client, device_id: DeviceId, name: str, *, dma: bool = False, frames: tuple[Pfn, Pfn] = (0, 0)
    ) -> None:
        self.client = client
        self.id = device_id
        self.name = name
        self.dma = dma
        self.frames = frames

    def __repr__(self) -> str:
        return f"<device {self.id} {self.name!r}>"

    @classmethod
    async def register(
        cls,
        client: Client,
        name: str,
        *,
        dma: bool,
        memory_pages: int,
        kind: RegionKind,
        driver_copies: bool,
        evicts: bool,
    ) -> Device:
        """As `Client.register_device`."""
        session = await client.session()
        request = device_pb2.RegisterDeviceRequest(
            name=name,
            dma=dma,
            memory_pages=memory_pages,
            memory_kind=memory_kind_to_proto(kind),
            driver_copies=driver_copies,
            evicts=evicts,
        )
        (response,) = await session.call("register_device", request)
        return cls(client, response.device_id, name, dma=dma, frames=(response.first_pfn, response.end_pfn))

    async def mirror(
        self,
        process: Process,
        driver: Driver,
        *,
        policy: DeadlinePolicy = DeadlinePolicy.FENCE,
        fault_events: bool = True,
        concurrent: bool = False,
        report_only: bool = False,
        misbehaviour: Between | None = None,
    ) -> Mirror:
        """Mirror a process's address space.  The driver may be called before this returns.

        Args:
            policy: what happens when the driver does not answer in time.
            fault_events: tell the driver of every fault's entries by an event, as in 2015; False: `Mirror.fault`
                returns them and that is all.
            concurrent: handle events at once; False: one after the other.
            report_only: an access that the device must not make is reported (`hmmctl sanitize`) and does not fail: it
                reads ones, its writes go nowhere.
            misbehaviour: makes the driver's events late and its answers wrong, for tests
                (`hmm_client.harness.Misbehaviour`).

        Raises:
            ConflictError: the device mirrors this address space already (EINVAL).
            NoSuchObjectError: there is no such process, or the device is gone (ESRCH, ENODEV).
        """
        require_driver(driver, "update", "Driver")
        request = device_pb2.RegisterMirrorRequest(
            device_id=self.id,
            process_id=process.id,
            policy=policy_to_proto(policy),
            no_fault_events=not fault_events,
            report_only=report_only,
        )
        make = partial(Mirror, self, process, driver, concurrent=concurrent)
        return await self._bind("register_mirror", request, make, misbehaviour)

    async def attach(
        self,
        process: Process,
        driver: IntervalDriver,
        *,
        policy: DeadlinePolicy = DeadlinePolicy.FENCE,
        concurrent: bool = False,
        misbehaviour: Between | None = None,
    ) -> IntervalMirror:
        """Attach to a process with today's interface; the driver hears of what it subscribes to.

        Args:
            policy: what happens when the driver does not answer in time.
            concurrent: handle events at once; False: one after the other.
            misbehaviour: as of `mirror`.

        Raises:
            NoSuchObjectError: there is no such process, or the device is gone (ESRCH, ENODEV).
        """
        require_driver(driver, "invalidate", "IntervalDriver")
        request = hmm_pb2.AttachRequest(device_id=self.id, process_id=process.id, policy=policy_to_proto(policy))
        make = partial(IntervalMirror, self, process, driver, concurrent=concurrent)
        return await self._bind("attach", request, make, misbehaviour)

    async def _bind(
        self, name: str, request: Any, make: Callable[[Session, Any], M], misbehaviour: Between | None
    ) -> M:
        session = await self.client.session()
        made: list[M] = []

        def bind(response: Any) -> None:
            # In the reader: the mirror's first events may follow in the same message.
            mirror = make(session, response)
            mirror.between = misbehaviour
            session.bind(mirror.id, mirror)
            made.append(mirror)

        await session.call(name, request, bind)
        return made[0]

    async def evict(self) -> int:
        """Move everything in the device's memory to system memory, whoever has mapped it.

        Returns: pages moved; those that somebody else uses stay.

        Raises:
            NoSuchObjectError: the device has no memory (ENODEV).
            OutOfFramesError: system memory ran out; what was moved stays moved (ENOMEM).
        """
        response = await self._call("evict_device", hmm_pb2.EvictDeviceRequest(device_id=self.id))
        error = from_call_result(response.result)
        if error is not None:
            raise error
        page_count: int = response.page_count
        return page_count

    async def unregister(self) -> None:
        """Remove the device.

        Raises:
            InUseError: it still has mirrors (EBUSY).
        """
        await self._call("unregister_device", device_pb2.UnregisterDeviceRequest(device_id=self.id))

    async def _call(self, name: str, request: Any) -> Any:
        session: Session = await self.client.session()
        return (await session.call(name, request))[-1]
