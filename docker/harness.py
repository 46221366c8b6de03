"""A harness for two drivers in containers of their own: one process that both mirror, and what must hold of it.

    python harness.py --dummy /run/hmmd/dummy.sock --rdma /run/hmmd/rdma.sock

Each round makes a process, tells the dummy driver and the network card to mirror it, and checks that CPU and devices
see one memory, and that no device reaches what the CPU took away.  It goes on when a driver or the daemon dies: the
process ends without it, and the next round waits until it is back.  SIGTERM ends it after the round under way.

Exit codes: 0 all that was checked held; 1 something did not, or somebody was away for longer than --patience.
"""

from __future__ import annotations

import asyncio
import signal
import ssl
import sys
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import click

import hmm_client
from hmm.errors import HmmError, errno_name
from hmm_client.commands.connection import Where, where_options
from hmm_client.drivers.control import decode, encode, host_and_port, tls_context
from hmm_client.drivers.remote import RemoteDriver, RemoteError

PAGE = 4096
PAGES = 16
RETRY_S = 0.2
AWAY = {"EIO", "ENODEV", "ETIMEDOUT"}
"""What a driver answers that has lost its daemon, whose device was fenced, or which was too slow."""


@dataclass
class Tally:
    """What was checked, and what came of it."""

    rounds: int = 0
    checks: int = 0
    failed: int = 0
    interruptions: int = 0

    def check(self, what: str, found: object, expected: object) -> None:
        """Compare, count, and say so."""
        self.checks += 1
        self.failed += found != expected
        click.echo(f"ok    {what}" if found == expected else f"FAIL  {what}: {found!r}, not {expected!r}")

    def __str__(self) -> str:
        counts = (
            f"{self.checks} checks in {self.rounds} {'round' if self.rounds == 1 else 'rounds'}, {self.failed} failed"
        )
        return f"{counts}, interrupted {self.interruptions} times" if self.interruptions else counts


@dataclass
class Round:
    """One process and two devices that mirror it, from its birth to its end."""

    client: hmm_client.Client
    dummy: RemoteDriver
    rdma: RemoteDriver
    tally: Tally
    process: hmm_client.Process = field(init=False)
    start: int = 0
    key: int = 0

    async def run(self) -> None:
        """Do everything."""
        self.process = await self.client.create_process("shared")
        try:
            await self.mirror()
            await self.share()
            await self.take_away()
        except (OSError, RemoteError):
            await self.end_without_them()
            raise
        await self.process.exit()
        await self.dummy.call("close", device=0, minor=0)
        self.tally.rounds += 1

    async def mirror(self) -> None:
        """Both devices mirror the process; the network card faults all of it in."""
        self.start = (await self.process.mmap(PAGES * PAGE)).address
        await self.process.write(self.start, bytes(PAGES * PAGE))
        await self.dummy.call("close", device=0, minor=0)  # of a round that was interrupted
        await self.dummy.call("expose_mm", device=0, minor=0, process=self.process.id)
        region = {"process": self.process.id, "address": self.start, "length": PAGES * PAGE}
        self.key = (await self.rdma.call("reg_mr", **region))["key"]

    async def share(self) -> None:
        """Whoever writes, everybody reads it."""
        await self.process.write(self.start, b"from the CPU")
        read = await self.dummy_reads(0, 12), await self.rdma_reads(0, 12)
        self.tally.check("both devices read what the CPU wrote", read, (b"from the CPU",) * 2)
        await self.dummy_writes(1, b"from dummy")
        read = await self.process.read(self.start + PAGE, 10), await self.rdma_reads(1, 10)
        self.tally.check("CPU and rdma read what dummy wrote", read, (b"from dummy",) * 2)
        await self.rdma_writes(2, b"from rdma")
        read = await self.process.read(self.start + 2 * PAGE, 9), await self.dummy_reads(2, 9)
        self.tally.check("CPU and dummy read what rdma wrote", read, (b"from rdma",) * 2)

    async def take_away(self) -> None:
        """What the CPU takes, no device has."""
        await self.process.mprotect(self.start, PAGE, hmm_client.Prot.READ)
        errors = await refused(self.dummy_writes(0, b"x")), await refused(self.rdma_writes(0, b"x"))
        self.tally.check("no device writes where mprotect forbids it", errors, ("EACCES", "EACCES"))
        await self.process.munmap(self.start + PAGE, PAGE)
        errors = await refused(self.dummy_reads(1, 1)), await refused(self.rdma_reads(1, 1))
        self.tally.check("no device reads what munmap took", errors, ("EFAULT", "EFAULT"))

    async def end_without_them(self) -> None:
        """A driver went away: what the process does must end all the same."""
        with suppress(hmm_client.UnavailableError):
            began = time.monotonic()
            done = await self.process.munmap(self.start, PAGES * PAGE)
            lost = f", mirrors fenced by it: {len(done.fenced_mirrors)}" if done.fenced_mirrors else ""
            click.echo(f"      munmap ended without the driver in {time.monotonic() - began:.1f} s{lost}")
            await self.process.exit()

    # ---- what the devices do

    async def dummy_reads(self, page: int, size: int) -> bytes:
        """HMM_DUMMY_READ."""
        place = {"address": self.start + page * PAGE, "size": size}
        return decode((await self.dummy.call("read", device=0, minor=0, **place))["data"])

    async def dummy_writes(self, page: int, data: bytes) -> None:
        """HMM_DUMMY_WRITE."""
        await self.dummy.call("write", device=0, minor=0, address=self.start + page * PAGE, data=encode(data))

    async def rdma_reads(self, page: int, size: int) -> bytes:
        """RDMA READ."""
        place = {"address": self.start + page * PAGE, "length": size}
        return decode((await self.rdma.call("post_read", key=self.key, **place))["data"])

    async def rdma_writes(self, page: int, data: bytes) -> None:
        """RDMA WRITE."""
        await self.rdma.call("post_write", key=self.key, address=self.start + page * PAGE, data=encode(data))


async def refused(access: Awaitable[object]) -> str:
    """The errno that an access is refused with, by name; "0" if it is not."""
    try:
        await access
    except RemoteError as error:
        if error.errno in AWAY:
            raise
        return error.errno
    return "0"


class Harness:
    """Rounds, until there were enough."""

    def __init__(self, where: Where, dummy: str, rdma: str, patience_s: float, pause_s: float) -> None:
        self.where = where
        self.places = (dummy, rdma)
        self.patience_s = patience_s
        self.pause_s = pause_s
        self.tally = Tally()
        self.stop = asyncio.Event()

    async def run(self, rounds: int) -> int:
        """Run them; 0: until SIGTERM.  Returns: an exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.stop.set)
        last, interrupted = time.monotonic(), True
        while not self.stop.is_set() and (self.tally.rounds < rounds or not rounds):
            try:
                async with self.connected() as (client, dummy, rdma):
                    while not self.stop.is_set() and (self.tally.rounds < rounds or not rounds):
                        await Round(client, dummy, rdma, self.tally).run()
                        last, interrupted = time.monotonic(), False
                        await self.rest(self.pause_s)
            except (OSError, RemoteError, HmmError) as error:
                if not _somebody_is_away(error) or time.monotonic() - last > self.patience_s:
                    click.echo(f"harness: {error}", err=True)
                    self.tally.failed += 1
                    break
                self.tally.interruptions += not interrupted
                interrupted = True
                await self.rest(RETRY_S)
        click.echo(f"harness: {self.tally}")
        return 1 if self.tally.failed else 0

    async def rest(self, seconds: float) -> None:
        """Wait, but not after SIGTERM."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.stop.wait(), seconds)

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[tuple[hmm_client.Client, RemoteDriver, RemoteDriver]]:
        """The daemon and both drivers."""
        dummy, rdma = self.places
        async with (
            self.where.connect(name="harness") as client,
            RemoteDriver.connected(dummy, self.tls(dummy)) as first,
            RemoteDriver.connected(rdma, self.tls(rdma)) as second,
        ):
            yield client, first, second

    def tls(self, place: str) -> ssl.SSLContext | None:
        """For a driver on another host."""
        if host_and_port(place) is None or not (self.where.ca and self.where.certificate and self.where.key):
            return None
        return tls_context(self.where.ca, self.where.certificate, self.where.key)


def _somebody_is_away(error: Exception) -> bool:
    if isinstance(error, HmmError):
        return errno_name(error.errno) in AWAY
    return not isinstance(error, RemoteError) or error.errno in AWAY


@click.command(help=__doc__)
@where_options
@click.option("--dummy", metavar="PLACE", required=True, help="The dummy driver's --control.")
@click.option("--rdma", metavar="PLACE", required=True, help="The network card's --control.")
@click.option("--rounds", metavar="N", default=1, show_default=True, help="How many processes; 0: until SIGTERM.")
@click.option("--patience", metavar="SECONDS", default=30.0, show_default=True, help="How long somebody may be away.")
@click.option("--pause", metavar="SECONDS", default=0.0, show_default=True, help="Rest between two processes.")
def main(where: Where, dummy: str, rdma: str, rounds: int, patience: float, pause: float) -> None:
    """Read the options and run."""

    async def run() -> int:
        return await Harness(where, dummy, rdma, patience, pause).run(rounds)

    sys.exit(asyncio.run(run()))


if __name__ == "__main__":
    main()
