"""A driver that does what a driver must not, as its control socket tells it.

It is made with the client library and answers every event in the way that `behave` chose last.

    mirror     mirror a process                        behave     choose how events are answered
    fault      fault a range                           go_on      let hanging updates return
    migrate    move a range to its memory              unregister give a mirror up in good order
    read       read memory                             say        answer an event by hand, once more or too soon
    state      what was heard and what came of it
"""

from __future__ import annotations

import asyncio
import errno as errnos
from collections.abc import Mapping

from hmm.errors import HmmError, errno_name
from hmm.mirror import DeadlinePolicy
from hmm.units import AddressRange
from hmm_client import Client, Device, Driver, Event, Mirror
from hmm_client.device_memory import DeviceMemory
from hmm_client.drivers.control import Operation, driver_command, encode

MEMORY_PAGES = 64


class MisbehavingDriver(Driver):
    """Answers as it is told to."""

    def __init__(self, client: Client, device: Device) -> None:
        self._client = client
        self._device = device
        self._mirrors: dict[int, Mirror] = {}
        self._memory = DeviceMemory(MEMORY_PAGES)
        self._behaviour = "answer"
        self._span: AddressRange | None = None
        self._gate = asyncio.Event()
        self._wanted: asyncio.Queue[tuple[Mirror, AddressRange, asyncio.Future[None]]] = asyncio.Queue()
        self._outside_task = asyncio.create_task(self._serve_outside())
        self._events: list[dict[str, object]] = []
        self._inside: list[str] = []
        self._released: list[int] = []
        self._lost: dict[str, str] = {}

    # ---- what the daemon calls

    async def update(self, event: Event) -> None:
        """Behave."""
        self._events.append({"type": event.type.name, "operation": event.operation, "sequence": event.sequence})
        if event.is_fault and self._behaviour != "refuse_fault":
            return
        await getattr(self, f"_{self._behaviour}")(event)

    async def copy_to_device(self, event: Event) -> None:
        """Take pages, unless `update` did not return."""
        await self._memory.take(event)

    async def copy_from_device(self, event: Event) -> bytes | None:
        """Give pages back, or say that they are broken."""
        if self._behaviour == "break_pages":
            return bytes([errnos.EIO]) * event.npages
        await self._memory.give(event)
        return None

    def release(self, mirror: Mirror) -> None:
        """Remember."""
        self._released.append(mirror.id)

    def lost(self, mirror: Mirror, why: str) -> None:
        """Remember."""
        self._lost[str(mirror.id)] = why

    async def _answer(self, event: Event) -> None:
        pass

    _break_pages = _answer

    async def _hang(self, event: Event) -> None:
        await self._gate.wait()

    async def _refuse(self, event: Event) -> None:
        raise OSError(errnos.EIO, "I will not")

    async def _refuse_fault(self, event: Event) -> None:
        if event.is_fault:
            raise OSError(errnos.ENOMEM, "no room")

    async def _fault(self, event: Event) -> None:
        await self._try(event.mirror.fault(self._span or event.spans[0]))

    async def _munmap(self, event: Event) -> None:
        span = self._span or event.spans[0]
        await self._try(event.mirror.process.munmap(span.start, span.size_bytes))

    async def _fault_unmarked(self, event: Event) -> None:
        # In a task of its own that knows nothing of this callback: the daemon cannot tell that it will never end.
        await self._try(self._outside(event.mirror, event.spans[0]))

    async def _outside(self, mirror: Mirror, span: AddressRange) -> None:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._wanted.put_nowait((mirror, span, future))
        await future

    async def _serve_outside(self) -> None:
        while True:
            mirror, span, future = await self._wanted.get()
            try:
                await mirror.fault(span, deadline_s=20)
                future.set_result(None)
            except HmmError as error:
                future.set_exception(error)

    async def _try(self, call: object) -> None:
        try:
            await call  # type: ignore[misc]
        except HmmError as error:
            self._inside.append(errno_name(error.errno))
        else:
            self._inside.append("0")

    # ---- what the test calls

    async def mirror(self, process: int, policy: str = "fence", *, fault_events: bool = True) -> int:
        """Mirror a process; the mirror's id."""
        made = await self._device.mirror(
            self._client.process(process),
            self,
            policy=DeadlinePolicy(policy),
            concurrent=True,
            fault_events=fault_events,
        )
        self._mirrors[made.id] = made
        return made.id

    async def behave(self, how: str, start: int = 0, end: int = 0) -> None:
        """Answer events like this from now on; calls from inside are about [start, end), or the event's range."""
        self._behaviour = how
        self._span = AddressRange(start, end) if end else None

    async def go_on(self) -> None:
        """Let hanging updates return, and hang no more."""
        self._behaviour = "answer"
        self._gate.set()

    async def say(self, mirror: int, sequence: int) -> None:
        """Answer one event, whether it was answered before, or was never sent."""
        session = await self._client.session()
        session.answer(mirror, sequence)

    async def fault(self, mirror: int, start: int, end: int, *, write: bool = False) -> int:
        """Fault a range; how many pages came."""
        faulted = await self._mirrors[mirror].fault(AddressRange(start, end), write=write)
        return int((faulted.entries != 0).sum())

    async def migrate(self, mirror: int, start: int, end: int) -> int:
        """Move a range to the device; how many pages moved."""
        return (await self._mirrors[mirror].migrate(AddressRange(start, end))).npages

    async def unregister(self, mirror: int) -> None:
        """Give a mirror up."""
        await self._mirrors[mirror].unregister()

    async def read(self, mirror: int, address: int, length: int) -> str:
        """Read memory."""
        return encode(await self._mirrors[mirror].read([(address, length)]))

    async def state(self) -> dict[str, object]:
        """What was heard: events, how calls from inside ended, releases and losses."""
        return {"events": self._events, "inside": self._inside, "released": self._released, "lost": self._lost}


async def operations(client: Client) -> Mapping[str, Operation]:
    """Register a device; what may be asked of it, by name."""
    device = await client.register_device("misbehaving", memory_pages=MEMORY_PAGES, driver_copies=True)
    driver = MisbehavingDriver(client, device)
    names = ("mirror", "behave", "go_on", "say", "fault", "migrate", "unregister", "read", "state")
    return {name: getattr(driver, name) for name in names}


main = driver_command("misbehaving", operations)

if __name__ == "__main__":
    main()
