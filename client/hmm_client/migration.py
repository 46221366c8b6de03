"""A migration whose steps a driver takes itself, as a driver of the kernel does.

    async with mirror.migrate_vma(span) as migration:          # migrate_vma_setup()
        frames = await migration.allocate(migration.movable.size)
        dst = migration.destinations(frames)
        await migration.copy(dst)                              # or read() and write()
        src = await migration.pages(dst)                       # migrate_vma_pages()
        ... update the device's own table
        await migration.finalize()                             # migrate_vma_finalize(), also at the end of the block

Until it is finalized its pages are locked: whoever touches one waits, and so does who changes mappings of the process.
So the daemon ends it when its driver takes no step for `lease_s`; every call of a Migration is a step.

**Source**: Linux include/linux/migrate.h, Documentation/mm/hmm.rst; proto/hmm_proto/v1/hmm.proto.

**Invariants**: a block that ends with an exception leaves every page where it was, but holes that were filled.  One
that has caught the error of a step itself finalizes what is set up: what `pages` did not move is where it was.  Where
that error was the end of the migration there is nothing left to do.

**Absent**: what can be moved and where to (`hmm.migrate_steps`); migrations that are one call (interval_mirror.py).
"""

from __future__ import annotations

import asyncio
import errno as errnos
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from hmm.commands_hmm import Migrated
from hmm.errors import DeviceLostError, HmmError, InvalidRequestError, NoSuchObjectError, TimedOutError
from hmm.migration import MIGRATE, WRITE, Select, migrate_pfn, moving_frames
from hmm.units import PAGE_SIZE, AddressRange, Entries, Pfns
from hmm_client.arguments import names_arguments
from hmm_proto.convert import entries_of_parts, entries_to_proto, range_to_proto
from hmm_proto.v1 import hmm_pb2

if TYPE_CHECKING:
    from hmm_client.device import Device
    from hmm_client.interval_mirror import IntervalMirror

ACCESS_FRAMES = 256
"""Accesses to more frames than this travel in parts."""


@names_arguments
class Migration:
    """One migration.  Made by `IntervalMirror.migrate_vma`; begins with its `async with` block, or with `set_up`.

    When it is over it can be set up again, as another migration of the same pages.

    Attributes:
        span: the pages.
        id: names it; 0 before it has begun.
        src: uint64[npages], as the last step left it; MIGRATE stands in the words of pages that can, or will, be moved.
        lease_s: seconds after which the daemon ends it when no step is taken.
        over: whether it has ended, as far as its steps have said: it was finalized or given up, or a step has failed
            because it had ended.
    """

    def __init__(self, mirror: IntervalMirror, span: AddressRange, select: int = Select.SYSTEM) -> None:
        self.mirror = mirror
        self.span = span
        self.select = select
        self.id = 0
        self.src: Entries = np.zeros(0, np.uint64)
        self.lease_s = 0.0
        self.over = False
        self._asking: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return f"<migration {self.id} of {self.span} by {self.mirror!r}>"

    async def __aenter__(self) -> Self:
        await self.set_up()
        return self

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self.over:
            return
        if error is None:
            await self.finalize()
        else:
            with suppress(HmmError):  # it has ended already, or with it the session
                await self.abort()

    # ---- the steps

    async def set_up(self) -> None:
        """migrate_vma_setup(): what can be moved is collected, unmapped and locked.

        It has to be finalized, also where nothing could be collected; whoever gives up waiting for this gives it up.

        Raises:
            InvalidRequestError: no range of pages of one mapping, or one that nothing can be moved in; it is set up and
                not over (EINVAL).
            NoSuchObjectError: the process has exited (ESRCH).
            OutOfFramesError: too many migrations are under way (ENOMEM).
            TimedOutError: another driver, whose policy is FAIL, did not answer; nothing was moved (ETIMEDOUT).
        """
        if (self._asking is not None and not self._asking.done()) or (self.id and not self.over):
            raise InvalidRequestError(f"set_up: {self!r} is not over yet; for one beside it make another one")
        self.id, self.src, self.over = 0, np.zeros(0, np.uint64), False
        self._asking = asking = asyncio.ensure_future(self._set_up())
        try:
            await asyncio.shield(asking)
        except asyncio.CancelledError:
            asking.add_done_callback(self._forsaken)
            raise

    async def _set_up(self) -> None:
        request = hmm_pb2.MigrateVmaSetupRequest(
            mirror_id=self.mirror.id, range=range_to_proto(self.span), select=self.select
        )
        parts = await self._call("migrate_vma_setup", request)
        self.id, self.lease_s = parts[-1].migration_id, parts[-1].lease_ms / 1000
        self.src = entries_of_parts(parts, "src")

    def _forsaken(self, asking: asyncio.Future[None]) -> None:
        if asking.cancelled() or asking.exception() is not None:
            return

        async def give_up() -> None:
            with suppress(HmmError):
                await self.abort()

        self._giving_up = asyncio.ensure_future(give_up())  # kept until it is done

    async def allocate(self, count: int, *, device: Device | None = None, compound: bool = False) -> Pfns:
        """Frames for destinations, which read as zeroes; those that get no page are freed at the end.

        Args:
            count: in all at most as many frames as there are pages.
            device: in whose memory; None: the mirror's.  Another one needs a mirror of the same process.
            compound: large folios of 512 frames, of which the first ones are returned.

        Returns: int64[n]; fewer than asked for where there are no more.

        Raises:
            NoSuchObjectError: it has ended, which the error explains (ENOENT); the device has no memory (ENODEV).
            InvalidRequestError: more than it has pages, or its destinations are given (EINVAL).
        """
        return await self._allocate(count, (device or self.mirror.device).id, compound)

    async def allocate_system(self, count: int, *, compound: bool = False) -> Pfns:
        """Frames of system memory, for pages that go back; as `allocate`."""
        return await self._allocate(count, 0, compound)

    async def _allocate(self, count: int, device_id: int, compound: bool) -> Pfns:
        request = hmm_pb2.MigrateVmaAllocateRequest(
            migration_id=self.id, count=count, device_id=device_id, compound=compound
        )
        return entries_of_parts(await self._call("migrate_vma_allocate", request), "pfns").view(np.int64)

    async def copy(self, dst: Entries) -> None:
        """Let the device copy each page that has a destination there.

        Args:
            dst: uint64[npages], as for `pages`.

        Raises: as `copy_frames`.
        """
        sources, targets = moving_frames(self.src, dst)
        await self.copy_frames(sources, targets)

    async def copy_frames(self, sources: Pfns, targets: Pfns) -> None:
        """Let the device copy frames, as its copy engine does; no bytes travel.

        Args:
            sources: int64[n], of pages on their way, or destinations.
            targets: int64[n], destinations.

        Raises:
            NoSuchObjectError: it has ended (ENOENT).
            InvalidRequestError: a frame is not the migration's, or not to be filled (EINVAL).
        """
        packed = [entries_to_proto(pfns.view(np.uint64)) for pfns in (sources, targets)]
        request = hmm_pb2.MigrateVmaCopyRequest(migration_id=self.id, sources=packed[0], targets=packed[1])
        await self._call("migrate_vma_copy", request)

    async def read(self, pfns: Pfns) -> bytes:
        """The device reads frames: of pages on their way, or destinations; in steps of 256.

        Raises: as `copy_frames`.
        """
        parts = []
        for frames in _in_parts(pfns):
            packed = entries_to_proto(frames.view(np.uint64))
            request = hmm_pb2.ReadFramesRequest(mirror_id=self.mirror.id, migration_id=self.id, pfns=packed)
            parts += await self._call("read_frames", request)
        return b"".join(part.data for part in parts)

    async def write(self, pfns: Pfns, data: bytes) -> None:
        """The device fills destinations, one page of data each; in steps of 256.

        Raises: as `copy_frames`; also InvalidRequestError: not as much data (EINVAL).
        """
        if len(data) != pfns.size * PAGE_SIZE:
            raise InvalidRequestError(f"write: {len(data)} bytes are not those of {pfns.size} frames")
        at = 0
        for frames in _in_parts(pfns):
            end = at + frames.size * PAGE_SIZE
            packed = entries_to_proto(frames.view(np.uint64))
            request = hmm_pb2.WriteFramesRequest(
                mirror_id=self.mirror.id, migration_id=self.id, pfns=packed, data=data[at:end]
            )
            await self._call("write_frames", request)
            at = end

    async def pages(self, dst: Entries) -> Entries:
        """migrate_vma_pages(): say where each page goes.  Holes are filled now.

        The same call again gets the reply again, as long as the migration is not finalized.

        Args:
            dst: uint64[npages]: VALID and a frame, each one once; 0: the page stays.  Of a huge page that was collected
                as one the first word counts: with COMPOUND it names a large folio; without, it is split.

        Returns: uint64[npages], `src`: MIGRATE is left where a page moves.

        Raises:
            NoSuchObjectError: it has ended (ENOENT).
            InvalidRequestError: a word that cannot be, or called before with other words (EINVAL); nothing was changed.
            RangeBusyError: another step is under way (EBUSY).
            TimedOutError, DeviceLostError: it has ended meanwhile, and its pages are where they were: its lease, or
                another driver did not answer as holes were filled (ETIMEDOUT); its mirror was lost (ENODEV).
            WouldDeadlockError: called from inside a callback that filling holes waits for (EDEADLK); they are filled
                when that has returned, and the same call gets its reply then.
        """
        request = hmm_pb2.MigrateVmaPagesRequest(migration_id=self.id, dst=entries_to_proto(dst))
        self.src = entries_of_parts(await self._step("migrate_vma_pages", request), "src")
        return self.src

    async def finalize(self) -> Migrated:
        """migrate_vma_finalize(): pages with MIGRATE are at their destinations, all others where they were.

        Returns: the words, uint64[npages] each; `dst` has the frames of what was moved.

        Raises: as `pages`.
        """
        return await self._finalize(abort=False)

    async def abort(self) -> Migrated:
        """Give up: every page is where it was, but holes that `pages` has filled stay filled.

        Raises:
            NoSuchObjectError: it has ended (ENOENT).
            RangeBusyError: another step is under way (EBUSY).
        """
        return await self._finalize(abort=True)

    async def _finalize(self, *, abort: bool) -> Migrated:
        request = hmm_pb2.MigrateVmaFinalizeRequest(migration_id=self.id, abort=abort)
        parts = await self._step("migrate_vma_finalize", request)
        self.over, self.src = True, entries_of_parts(parts, "src")
        return Migrated(self.src, entries_of_parts(parts, "dst"))

    async def renew(self) -> None:
        """Take a step that does nothing, so that the lease begins anew: for a device that copies for long by itself.

        Raises:
            NoSuchObjectError: it has ended (ENOENT).
        """
        await self.copy_frames(np.empty(0, np.int64), np.empty(0, np.int64))

    async def _step(self, name: str, request: Any) -> list[Any]:
        try:
            return await self._call(name, request)
        except TimedOutError:  # it has ended meanwhile
            self.over = True
            raise

    async def _call(self, name: str, request: Any) -> list[Any]:
        try:
            parts = await self.mirror.call(name, request)
            self.mirror.require(parts[-1])
        except (NoSuchObjectError, DeviceLostError) as error:
            if self.id and (isinstance(error, DeviceLostError) or error.errno == errnos.ENOENT):
                self.over = True
            raise
        return parts

    # ---- the words

    @property
    def movable(self) -> npt.NDArray[np.intp]:
        """Which pages can be moved, of huge ones that move as one the first: intp[n], ascending; holes too."""
        found: npt.NDArray[np.intp] = np.flatnonzero(self.src & np.uint64(MIGRATE))
        return found

    def destinations(self, pfns: Pfns) -> Entries:
        """Words that give the first movable pages these frames, int64[n], one each: uint64[npages], 0 for the others.

        Raises:
            InvalidRequestError: more frames than pages can be moved (EINVAL).
        """
        movable = self.movable
        if pfns.size > movable.size:
            raise InvalidRequestError(f"destinations: {pfns.size} frames for the {movable.size} pages that can move")
        words = np.zeros(self.src.size, np.uint64)
        words[movable[: pfns.size]] = migrate_pfn(pfns) | np.uint64(WRITE)
        return words


def _in_parts(pfns: Pfns) -> Iterator[Pfns]:
    for first in range(0, pfns.size, ACCESS_FRAMES):
        yield pfns[first : first + ACCESS_FRAMES]
