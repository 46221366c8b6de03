"""A rig: one daemon, and everything that a test of a driver needs on it.

    async with Rig(target) as rig:
        process = await rig.process()
        mirror = await rig.mirror(process, MyDriver())
        async with (await rig.harness()).hold(HoldPoint.EVENT_SENT, "munmap"):
            ...

`SyncRig` (sync_rig.py) is the same without await; both are fixtures of pytest (`hmm_client.pytest_plugin`).

**Invariants**: what was made on a rig ends with it: clients say goodbye, processes exit.

**Absent**: starting the daemon (`hmm_client.embedded`).
"""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any, Self

from hmm.errors import HmmError
from hmm_client.channel import DaemonError
from hmm_client.client import Client, connect
from hmm_client.device import Device
from hmm_client.driver import Driver, TableDriver
from hmm_client.harness.holds import Harness
from hmm_client.mirror import Mirror
from hmm_client.process import Process
from hmm_proto.v1 import inspection_pb2


class Rig:
    """A daemon, and what a test has made on it.

    Attributes:
        target: where the daemon listens.
        seed: of the test.
        random: chance that the seed repeats.
    """

    def __init__(self, target: str, *, seed: int = 0, token: str = "") -> None:
        """Make a rig; nothing is connected yet.

        Args:
            token: owner of what is made; empty: everybody's.
        """
        self.target = target
        self.seed = seed
        self.random = random.Random(seed)
        self._token = token
        self._program: Client | None = None
        self._clients: list[Client] = []
        self._processes: list[Process] = []
        self._devices = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Say goodbye, then let all processes exit.  A daemon that has gone is no error."""
        for client in self._clients:
            if client is not self._program:
                await client.close()
        for process in self._processes:
            with suppress(HmmError, DaemonError):
                await process.exit()
        if self._program is not None:
            await self._program.close()

    async def client(self, name: str) -> Client:
        """A client that is closed with the rig.

        Args:
            name: what events, logs and `pending` call it.
        """
        client = connect(self.target, self._token, name=name)
        self._clients.append(client)
        return client

    async def program(self) -> Client:
        """The client that the rig's processes belong to; it serves no device."""
        if self._program is None:
            self._program = await self.client("program")
        return self._program

    async def process(self, name: str = "program") -> Process:
        """A process with an empty address space, which exits with the rig."""
        process = await (await self.program()).create_process(name)
        self._processes.append(process)
        return process

    async def device(self, name: str = "", **options: Any) -> Device:
        """A device with a client, and so a stream, of its own; options as of `Client.register_device`.

        Args:
            name: for people; empty: gpu0, gpu1 and so on.
        """
        name = name or f"gpu{self._devices}"
        self._devices += 1
        return await (await self.client(name)).register_device(name, **options)

    async def mirror(
        self, process: Process, driver: Driver | None = None, *, device: Device | None = None, **options: Any
    ) -> Mirror:
        """A mirror of a process; options as of `Device.mirror`.

        Args:
            driver: None: one that keeps a table and behaves.
            device: None: a new one.
        """
        device = device or await self.device()
        return await device.mirror(process, driver or TableDriver(), **options)

    async def harness(self) -> Harness:
        """Holds and injected failures; the daemon must have been started with `harness`."""
        return Harness(await self.program())

    async def pending(self) -> inspection_pb2.GetPendingResponse:
        """Who waits for whom, and why."""
        client = await self.program()
        response: inspection_pb2.GetPendingResponse = await client.channel.request(
            client.inspection.GetPending, inspection_pb2.GetPendingRequest()
        )
        return response

    async def statistics(self) -> inspection_pb2.GetStatisticsResponse:
        """Counters of the daemon and of each mirror."""
        client = await self.program()
        response: inspection_pb2.GetStatisticsResponse = await client.channel.request(
            client.inspection.GetStatistics, inspection_pb2.GetStatisticsRequest()
        )
        return response
