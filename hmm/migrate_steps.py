"""A migration whose steps its driver takes: setup, pages and finalize are calls of their own.

    setup      as migrate.py has it; the pages are locked from now on, and their driver gets their source words
    between    the driver allocates frames, reads the pages, fills the frames: only frames of this migration
    pages      it says where each page goes; what could not go there has lost MIGRATE
    finalize   entries become entries of the new pages; of the old ones where it says no destination, or gives up

One operation does all of it, and waits for its driver in between, with mmap_lock held for reading and the pages locked,
as a driver of the kernel has them.  The driver's calls hand it the next step and wait until that is taken.

A migration can be ended from outside as long as it is not finalized: its lease is over, or its mirror is lost.  Every
page is where it was then, but holes that `pages` has filled stay filled: anybody may have used them since.

**Source**: Linux Documentation/mm/hmm.rst, "Migration to and from device memory"; lib/test_hmm.c,
dmirror_migrate_to_device(); drivers/gpu/drm/amd/amdkfd/kfd_migrate.c, svm_migrate_vma_to_vram(), 6.12.

**Invariants**: a frame that was allocated for a migration is one of its destinations, or free when it ends; a driver
reaches frames of its migration only, and those of pages only for reading.

**Absent**: which calls there are (commands_migrate.py), when a lease ends (whoever has a clock).

Differs: `finalize` before `pages` gives up, and so it can after it, where the kernel's pages have their destinations
already; a driver's frames are chosen here, as the daemon keeps the books of its memory.
"""

from __future__ import annotations

import errno as errnos
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hmm.address_space import AddressSpace
from hmm.errors import HmmError, InvalidRequestError, NoSuchObjectError, RangeBusyError, WouldDeadlockError
from hmm.frames import SYSTEM_REGION, Frames, Region
from hmm.migrate import migrate_vma
from hmm.migration import COMPOUND, NOT_MIGRATE, PFN_SHIFT, VALID, WRITE, Migration, Select, pfns_of
from hmm.operation import Await, Operation, WaitFor
from hmm.swap import some_room
from hmm.units import PMD_PAGES, ULONG_MAX, AddressRange, DeviceId, Entries, MirrorId, Pfn, Pfns

__all__ = ["PastMigration", "Step", "SteppedMigration", "ended"]

_NO_FRAMES = np.empty(0, np.int64)
_MEANT = np.uint64(VALID | WRITE | COMPOUND | ULONG_MAX >> PFN_SHIFT << PFN_SHIFT)
"""What is looked at of a driver's destination word."""
_VALID, _COMPOUND = np.uint64(VALID), np.uint64(COMPOUND)


class Step(Enum):
    """What a driver has its migration do next."""

    PAGES = "pages"
    FINALIZE = "finalize"
    ABORT = "abort"


class PastMigration(NamedTuple):
    """What is kept of a migration that has ended."""

    id: int
    owner: str
    why: str


@dataclass(slots=True, eq=False)
class SteppedMigration:
    """One migration, from the end of its setup to its own.

    Attributes:
        owner: the token of whoever may take its steps.
        operation_id: the operation that does it, which has the pages locked.
        step: what it is to do next, or does; None: it waits for its driver.
        calls: how many calls of its driver are under way.
        ending: why it was ended from outside; it ends as soon as it waits for its driver.
        bug: what it has ended with that is no error of a call.
        over: it has ended; `why`: how.
        allocated: int64[n], the frames that its driver got.
        folios: int64[n], where large folios among them begin.
        holders: the mirrors that are told when pages have to come back from them.
        fences_told: how many of the mirrors that were lost meanwhile its driver has been told of.
    """

    id: int
    owner: str
    mirror_id: MirrorId
    device_id: DeviceId
    space: AddressSpace
    span: AddressRange
    operation_id: int
    step: Step | None = None
    calls: int = 0
    ending: HmmError | None = None
    bug: Exception | None = None
    over: bool = False
    why: str = ""
    allocated: Pfns = field(default_factory=_NO_FRAMES.copy)
    folios: Pfns = field(default_factory=_NO_FRAMES.copy)
    holders: set[MirrorId] = field(default_factory=set)
    fences_told: int = 0
    _migration: Migration | None = None
    _said: Entries | None = None  # what `pages` was called with
    _given: Pfns | None = None  # the destinations: since `pages`

    def __str__(self) -> str:
        return f"migration {self.id}"

    @property
    def frames(self) -> Frames:
        """Physical memory."""
        return self.space.frames

    def is_ready(self, wait_for: WaitFor) -> bool:
        """Whether its driver, or whoever ends it, has done something (DRIVER); whether a step is taken (STEP)."""
        return self.step is None if wait_for is WaitFor.STEP else self.step is not None or self.ending is not None

    @property
    def migration(self) -> Migration:
        """The words."""
        assert self._migration is not None, f"{self} is not set up"
        return self._migration

    # ---- the operation

    def run(self, select: Select, set_up: Callable[[], None]) -> Operation[Migration]:
        """All of it.

        Args:
            set_up: called when its driver is to go on.

        Raises: as `migrate_vma`; and what it was ended with.
        """

        def copy(migration: Migration) -> Operation[None]:
            self._migration, migration.filled = migration, True
            set_up()
            yield from self._driver()

        try:
            moved = yield from migrate_vma(
                self.space, self.span, copy,
                select=select, owner=self.device_id, initiator=self.mirror_id, settle=self._settle,
            )  # fmt: skip
        except HmmError as error:
            self.ending, self.why = error, self._reason_of(error)
            raise
        except Exception as error:
            self.bug, self.why = error, f"a bug: {error!r}"
            raise
        else:
            self.why = "it was given up" if self.step is Step.ABORT else "it was finalized"
            return moved
        finally:
            self.over, self.step = True, None
            given = _NO_FRAMES if self._given is None else self._given
            self.frames.put(np.setdiff1d(self.allocated, given))

    def _driver(self) -> Operation[None]:
        """Wait for the driver's next step."""
        while self.step is None and self.ending is None:
            yield Await(WaitFor.DRIVER, self.space.id, (self.span,), self.id)
        if self.ending is not None:
            raise _again(self.ending)

    def _settle(self, migration: Migration) -> Operation[None]:
        """What comes between `pages` and `finalize`."""
        if self.step is not Step.PAGES:
            return
        self.step = None
        filled = migration.holes
        pfns = migration.target_pfns(filled)
        self.frames.get(pfns)  # its driver may still be filling them
        try:
            with self.frames.locks.lock(pfns, self.operation_id):
                yield from self._driver()
        except HmmError:
            migration.dst[filled] = 0  # these are their mappings' by now
            raise
        finally:
            self.frames.put(pfns)
        if self.step is Step.ABORT:
            migration.src[migration.pages] &= NOT_MIGRATE

    # ---- the driver's calls

    @property
    def is_idle(self) -> bool:
        """Whether it can be told a step."""
        return self.step is None and self.ending is None

    @property
    def awaits_driver(self) -> bool:
        """Whether nobody but its driver can go on: no call of it waits for others."""
        return self.is_idle and not self.calls

    @property
    def has_destinations(self) -> bool:
        """Whether `pages` was called."""
        return self._given is not None

    def take(self, step: Step) -> Operation[None]:
        """Have the operation take a step, and wait until it has.

        Raises:
            RangeBusyError: it takes one already (EBUSY).
            HmmError, WouldDeadlockError, RuntimeError: as `taken`.
        """
        self.require_idle(step.value)
        self.step = step
        yield from self.taken(step)

    def taken(self, step: Step) -> Operation[None]:
        """Wait until the operation has taken a step that it was told.

        Raises:
            HmmError: what it has ended with meanwhile.
            WouldDeadlockError: the call may not wait for it (EDEADLK); it is taken all the same.
            RuntimeError: it has ended with a bug.
        """
        with self._called():
            try:
                while self.step is step:
                    yield Await(WaitFor.STEP, self.space.id, (self.span,), self.id)
            except WouldDeadlockError as error:
                then = "; the same call gets its reply then" if step is Step.PAGES else ""
                goes_on = f"{self} takes this step all the same, when that has returned{then}"
                raise WouldDeadlockError(f"{error.message}; {goes_on}", error.errno, reason=error.reason) from error
        if self.bug is not None:
            raise RuntimeError(f"{step.value}: {self} has ended with a bug") from self.bug
        if self.ending is not None and step is not Step.ABORT:
            raise _again(self.ending)

    @contextmanager
    def _called(self) -> Iterator[None]:
        self.calls += 1
        try:
            yield
        finally:
            self.calls -= 1

    def end(self, error: HmmError) -> None:
        """End it as soon as it waits for its driver, with this error."""
        if self.ending is None:
            self.ending = error

    def require_open(self) -> None:
        """Raise when it has ended, or is about to (ENOENT)."""
        if self.over or self.ending is not None:
            raise ended(self.id, self.why if self.ending is None else self._reason_of(self.ending))

    def _reason_of(self, error: HmmError) -> str:
        return error.message.removeprefix(f"{self}: ")

    def require_idle(self, operation: str) -> None:
        """Raise when it has ended (ENOENT), or takes another step (EBUSY)."""
        self.require_open()
        if self.step is not None:
            raise RangeBusyError(f"{operation}: {self} is busy with {self.step.value}", reason="STEP_UNDER_WAY")

    @property
    def words(self) -> tuple[Entries, Entries]:
        """The source words and the destination words, as they are now."""
        src, dst = self.migration.arrays
        return src.copy(), dst.copy()

    def allocate(self, count: int, region: Region, holder: MirrorId, *, compound: bool) -> Operation[Pfns]:
        """Frames for destinations, which read as zeroes.

        Args:
            region: of a device, or the system's.
            holder: the mirror that is told when pages have to come back from there.
            compound: large folios: as many, each of PMD_PAGES frames.

        Returns: int64[m], m <= count where no more are free: the frames, or the first of each folio.

        Raises:
            InvalidRequestError: more than the migration has pages (EINVAL).
        """
        self._require_before_pages("allocate")
        unit = PMD_PAGES if compound else 1
        self._require_room(count * unit)
        count = self._before_failure(count)
        if region.number == SYSTEM_REGION and self.frames.available < count * unit:
            with self._called():
                yield from some_room(self.frames, count * unit)
            self._require_before_pages("allocate")  # other calls may have been quicker
            self._require_room(count * unit)
        if compound:
            pfns = self._folios(count, region)
            self.folios = np.concatenate((self.folios, pfns[::PMD_PAGES]))
        else:
            pfns = self.frames.allocate(min(count, region.available), region.number)
        if region.number != SYSTEM_REGION:
            self.frames.zone_device_data[pfns] = holder
            self.holders.add(holder)
        self.allocated = np.concatenate((self.allocated, pfns))
        return pfns[::unit]

    def _require_room(self, more: int) -> None:
        if more < 0 or self.allocated.size + more > self.span.npages:
            has = f"{self.allocated.size} of at most {self.span.npages}"
            raise InvalidRequestError(f"allocate: {more} more frames for {self}, which has {has}")

    def _folios(self, count: int, region: Region) -> Pfns:
        found: list[Pfns] = []
        while len(found) < count and (folio := self.frames.allocate_folio(region.number)) is not None:
            found.append(folio)
        return np.concatenate(found) if found else _NO_FRAMES

    def _before_failure(self, count: int) -> int:
        # As many allocations as come before the one that was made to fail.
        mirror = self.space.notifier.subscribers.get(self.mirror_id)
        if mirror is None or not mirror.failing_allocation:
            return count
        nth = mirror.failing_allocation
        mirror.failing_allocation = max(0, nth - count)
        return min(count, nth - 1)

    def read(self, pfns: Pfns) -> npt.NDArray[np.uint8]:
        """uint8[n, 4096]: what frames hold, of pages that are on their way or of destinations.

        Raises: InvalidRequestError: a frame is not the migration's (EINVAL).
        """
        self._require_own("read", pfns, np.concatenate((self._sources(), self.allocated)))
        return self.frames.gather(pfns)

    def write(self, pfns: Pfns, data: bytes, offset: int) -> None:
        """Fill destinations, or a part of them: from `offset` on, of the frames one behind the other.

        Raises: as `read`; sources are not written.
        """
        self._require_own("write", pfns, self.allocated)
        pages = self.frames.gather(pfns)
        pages.reshape(-1)[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
        self.frames.scatter(pfns, pages)

    def copy(self, sources: Pfns, targets: Pfns) -> None:
        """The device copies frames, as its copy engine does.

        Args:
            sources, targets: int64[n] each.

        Raises: as `read`, and as `write`.
        """
        if sources.size != targets.size:
            raise InvalidRequestError(f"copy: {sources.size} frames to {targets.size}")
        self._require_own("copy", sources, np.concatenate((self._sources(), self.allocated)))
        self._require_own("copy", targets, self.allocated)
        self.frames.copy(targets, sources)

    def _sources(self) -> Pfns:
        return self.migration.source_pfns(self.migration.pages)

    def _require_own(self, operation: str, pfns: Pfns, own: Pfns) -> None:
        self.require_open()
        strange = pfns[~np.isin(pfns, own)]
        if strange.size:
            kind = "a page or a destination" if operation == "read" else "a frame that may be filled"
            raise InvalidRequestError(f"{operation}: frame {strange[0]} is not {kind} of {self}")

    def _require_before_pages(self, operation: str) -> None:
        self.require_open()
        if self.has_destinations:
            raise InvalidRequestError(f"{operation}: the pages of {self} have their destinations already")

    def was_told(self, words: Entries) -> bool:
        """Whether `pages` was called with these very words."""
        return self._said is not None and np.array_equal(words, self._said)

    def set_destinations(self, words: Entries) -> None:
        """Take the driver's destination words: uint64[npages]; nothing is changed when they are refused.

        A word without VALID is no destination.  Of a huge page that is to move as one the first word counts: with
        COMPOUND it names a large folio; without, all have words of their own, and it is split.

        Raises:
            InvalidRequestError: `pages` was called before, not one word for each page, a frame that was not allocated
                for this migration, one that is given twice, or a part of a large folio (EINVAL).
        """
        self._require_before_pages("pages")
        migration = self.migration
        if words.size != self.span.npages:
            raise InvalidRequestError(f"pages: {words.size} words for the {self.span.npages} pages of {self}")
        said = words.copy()
        words = np.where((words & _VALID) != 0, words & _MEANT, np.uint64(0))
        compound = (words & _COMPOUND) != 0
        for head in migration.heads.tolist():
            block = slice(head, head + PMD_PAGES)
            if compound[head]:
                self._require_folio(migration, head, int(words[head]) >> PFN_SHIFT)
                words[block] = words[head] + (np.arange(PMD_PAGES, dtype=np.uint64) << np.uint64(PFN_SHIFT))
                compound[block] = False
            elif not words[head]:
                words[block], compound[block] = 0, False
        words[compound] = 0  # a large folio for small pages: they stay
        self._require_destinations(migration, words)
        migration.dst[:] = words
        self._said = said
        self._given = pfns_of(words[words != 0])

    def _require_folio(self, migration: Migration, head: int, pfn: Pfn) -> None:
        if not (self.folios == pfn).any():
            address = int(migration.addresses[head])
            rule = f"is not the first of a large folio of {self}"
            raise InvalidRequestError(f"pages: frame {pfn} for {address:#x} {rule}", address=address)

    def _require_destinations(self, migration: Migration, words: Entries) -> None:
        given = np.flatnonzero(words)
        pfns = pfns_of(words[given])
        wrong = ~np.isin(pfns, self.allocated)
        rule = "was not allocated for"
        if not wrong.any() and self.folios.size:
            small = (words[given] & _COMPOUND) == 0
            wrong, rule = small & np.isin(pfns // PMD_PAGES, self.folios // PMD_PAGES), "is part of a large folio of"
        if not wrong.any():
            again = np.ones(pfns.size, np.bool_)
            again[np.unique(pfns, return_index=True)[1]] = False
            wrong, rule = again, "is given twice by"
        if wrong.any():
            at = int(wrong.argmax())
            address = int(migration.addresses[given[at]])
            raise InvalidRequestError(f"pages: frame {pfns[at]} for {address:#x} {rule} {self}", address=address)

    def check(self) -> None:
        """Assert that its frames are its own: nobody else has one before `pages`, and none of them is free."""
        assert (self.frames.refcount[self.allocated] > 0).all(), f"{self}: a frame that it allocated is free"
        if not self.has_destinations:
            assert not self.frames.mapcount[self.allocated].any(), f"{self}: a destination is mapped before `pages`"


def _again(error: HmmError) -> HmmError:
    # Each call that fails with it has an error of its own.
    return type(error)(error.message, error.errno, reason=error.reason)


def ended(number: int, why: str) -> NoSuchObjectError:
    """What a call gets that names a migration that has ended (ENOENT)."""
    return NoSuchObjectError(f"migration {number} has ended: {why}", errnos.ENOENT, reason="MIGRATION_ENDED")
