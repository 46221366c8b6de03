"""What the handler of a userfaultfd does: register ranges, bring missing pages in, wake who waits for them.

    UFFDIO_REGISTER, _UNREGISTER   which VMAs it serves; as mprotect they cut VMAs and merge them again
    UFFDIO_COPY, _ZEROPAGE         pages into places where nothing is yet, in order, up to the first that cannot be
    UFFDIO_CONTINUE                entries for pages that the shared memory has
    UFFDIO_WAKE, close             who waits looks again

**Source**: Linux fs/userfaultfd.c, mm/userfaultfd.c (mfill_atomic()), include/linux/userfaultfd_k.h
(vma_can_userfault()), 6.12; tried on 6.18.

**Invariants**: a page that is there is never replaced; a VMA is registered with one userfaultfd at most.

**Absent**: write-protecting, UFFDIO_MOVE and _POISON; hugetlb memory cannot be registered (EINVAL); EAGAIN while
events are on their way, as there are none.

Differs: when directories of the page table run out, shared memory keeps the pages that were to be mapped.  What
UFFDIO_COPY copies comes with the call and not from the handler's memory, so it has no EFAULT for that.
"""

from __future__ import annotations

import errno as errnos
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, IntFlag

import numpy as np

from hmm import cpu_pte
from hmm.address_space import AddressSpace
from hmm.errors import (
    AccessDeniedError,
    BadAddressError,
    ConflictError,
    HmmError,
    InUseError,
    InvalidRequestError,
    NoSuchObjectError,
    OutOfFramesError,
    RangeBusyError,
)
from hmm.fault_pages import ANON_PAGE, WRITTEN, ZERO_PAGE, prepare_anon_vma
from hmm.file import File, FileKind
from hmm.huge_split import cut
from hmm.operation import Operation, Pause
from hmm.swap import some_room
from hmm.units import PAGE_SHIFT, PAGE_SIZE, PIECE_BYTES, TASK_SIZE, AddressRange, Entries, is_page_aligned
from hmm.unmapped_area import MMAP_MIN_ADDR
from hmm.userfaultfd import Userfaultfd
from hmm.vma import Vma, VmFlag
from hmm.vma_edit import modify

__all__ = [
    "IOCTLS",
    "IOCTL_CONTINUE",
    "CopyMode",
    "Filled",
    "Filling",
    "RegisterMode",
    "close",
    "fill",
    "register",
    "unregister",
    "wake",
]

_OF_SHMEM = (FileKind.SHARED_MEMORY, FileKind.FILE)
"""vma_is_shmem(): all files here are of memory."""
IOCTLS = 1 << 2 | 1 << 3 | 1 << 4
"""_UFFDIO_WAKE, _COPY and _ZEROPAGE: what a registered range permits, as UFFDIO_REGISTER returns it."""
IOCTL_CONTINUE = 1 << 7
"""_UFFDIO_CONTINUE: the same where minor faults are registered."""


class RegisterMode(IntFlag):
    """The UFFDIO_REGISTER_MODE_ bits; the others are EINVAL."""

    MISSING = 1
    MINOR = 4


class CopyMode(IntFlag):
    """The UFFDIO_COPY_MODE_, _ZEROPAGE_MODE_ and _CONTINUE_MODE_ bits; those with WP are EINVAL."""

    DONTWAKE = 1


class Filling(Enum):
    """Which ioctl brings pages in."""

    COPY = "copy"
    ZEROPAGE = "zeropage"
    CONTINUE = "continue"


@dataclass(frozen=True, slots=True)
class Filled:
    """What UFFDIO_COPY, UFFDIO_ZEROPAGE or UFFDIO_CONTINUE has done.

    Attributes:
        done: bytes from the start of the range on that are filled: the kernel's `copy`, `zeropage` or `mapped`, which
            is the negative error when there are none.
        error: why it is not all of the range: what the first page failed with, or EAGAIN when others were filled.
    """

    done: int
    error: HmmError | None


def _require_range(operation: str, span: AddressRange) -> None:
    """validate_range()."""
    if not span or not is_page_aligned(span.start | span.end) or span.start < MMAP_MIN_ADDR or span.end > TASK_SIZE:
        raise InvalidRequestError(f"{operation}: {span} is not a range of pages", address=span.start)


# ---- which VMAs


def register(space: AddressSpace, userfaultfd: Userfaultfd, span: AddressRange, mode: int) -> Operation[int]:
    """UFFDIO_REGISTER: from now on pages of a range that are missing, or only not mapped, are the handler's.

    What was registered before for other modes is registered for these alone.

    Args:
        span: page-aligned; holes in it stay unregistered.
        mode: RegisterMode values.

    Returns: `IOCTLS`, with `IOCTL_CONTINUE` for RegisterMode.MINOR.

    Raises:
        InvalidRequestError: no range, another mode or none, nothing mapped there, or a VMA that is neither private
            anonymous nor of shared memory or a file, or for minor faults private anonymous (EINVAL); nothing was
            changed.
        AccessDeniedError: a mapping that may never be written (EPERM); nothing was changed.
        InUseError: a VMA is registered with another userfaultfd (EBUSY); nothing was changed.
        OutOfFramesError: the process has ended, or too many VMAs (ENOMEM); VMAs below that one are registered.
        TimedOutError: a mirror with policy FAIL did not answer (ETIMEDOUT); nothing was changed.

    Cost: O(VMAs).  Source: Linux fs/userfaultfd.c, userfaultfd_register().
    """
    if not mode or mode & ~int(RegisterMode.MISSING | RegisterMode.MINOR):
        raise InvalidRequestError(f"register: mode {mode:#x}: there are missing pages (1) and minor faults (4)")
    _require_range("register", span)
    _require_alive(space, "register")
    with space.notifier.turn() as turn:
        yield from turn.wait()
        turn.hold(span)
        _require_open(space, userfaultfd)
        pieces = _pieces(space, "register", span)
        for piece in pieces:
            _require_fit("register", piece, minor=bool(mode & RegisterMode.MINOR))
            if not piece.has(VmFlag.MAYWRITE):
                raise AccessDeniedError(f"register: {piece} may never be written", errnos.EPERM, address=piece.start)
            if piece.mapping.userfaultfd not in (0, userfaultfd.id):
                other = piece.mapping.userfaultfd
                raise InUseError(f"register: {piece} is with userfaultfd {other}", address=piece.start)
        modes = VmFlag.UFFD_MISSING if mode & RegisterMode.MISSING else VmFlag.NONE
        if mode & RegisterMode.MINOR:
            modes |= VmFlag.UFFD_MINOR
        yield from _set(space, pieces, userfaultfd.id, modes)
    return IOCTLS | IOCTL_CONTINUE if mode & RegisterMode.MINOR else IOCTLS


def unregister(space: AddressSpace, userfaultfd: Userfaultfd, span: AddressRange) -> Operation[None]:
    """UFFDIO_UNREGISTER: missing pages of a range are zeroes again, and who waits for one gets it.

    Where minor faults alone are registered nobody is woken.

    Raises:
        InvalidRequestError: no range, nothing mapped there, or a VMA that could not be registered, or, under linux-7,
            one that is registered with another userfaultfd (EINVAL); nothing was changed.
        OutOfFramesError: the process has ended, or too many VMAs (ENOMEM); those below that one are unregistered.
        TimedOutError: as `register`.

    Cost: O(VMAs).  Source: Linux fs/userfaultfd.c, userfaultfd_unregister().
    """
    _require_range("unregister", span)
    _require_alive(space, "unregister")
    with space.notifier.turn() as turn:
        yield from turn.wait()
        turn.hold(span)
        _require_open(space, userfaultfd)
        pieces = _pieces(space, "unregister", span)
        for piece in pieces:
            _require_fit("unregister", piece)
            other = piece.mapping.userfaultfd
            if other not in (0, userfaultfd.id) and not space.semantics.uffd_unregisters_others:
                raise InvalidRequestError(f"unregister: {piece} is with userfaultfd {other}", address=piece.start)
        yield from _set(space, pieces, 0)


def close(space: AddressSpace, userfaultfd: Userfaultfd) -> Operation[None]:
    """Close a userfaultfd: its VMAs are unregistered whole, and everybody who waits looks again.

    Source: Linux fs/userfaultfd.c, userfaultfd_release().
    """
    if space.users:
        with space.notifier.turn() as turn, suppress(NoSuchObjectError):  # the process may end before it is its turn
            yield from turn.wait()
            yield from _set(space, _registered(space, userfaultfd), 0)
    else:  # the exit has the turn to its end, and the VMAs will be gone
        for vma in _registered(space, userfaultfd):
            space.vmas.set_mapping(vma, vma.mapping.with_userfaultfd(0))
    space.userfaultfds.pop(userfaultfd.id, None)
    userfaultfd.wake_all()


def _require_alive(space: AddressSpace, operation: str) -> None:
    """mmget_not_zero()."""
    if not space.users:
        raise OutOfFramesError(f"{operation}: the process has ended", reason="NO_SUCH_OBJECT")


def _require_open(space: AddressSpace, userfaultfd: Userfaultfd) -> None:
    if userfaultfd.id not in space.userfaultfds:
        raise NoSuchObjectError(f"{userfaultfd} was closed meanwhile", errnos.EBADF)


def _pieces(space: AddressSpace, operation: str, span: AddressRange) -> list[Vma]:
    pieces = space.vmas.mapped_pieces(span)
    if not pieces:
        raise InvalidRequestError(f"{operation}: nothing is mapped in {span}", address=span.start)
    return pieces


def _require_fit(operation: str, piece: Vma, *, minor: bool = False) -> None:
    """vma_can_userfault()."""
    file = piece.backing
    if minor and file is None:
        raise InvalidRequestError(f"{operation}: {piece} is no shared memory, for minor faults", address=piece.start)
    if isinstance(file, File) and file.kind not in _OF_SHMEM:
        raise InvalidRequestError(f"{operation}: {piece} is neither anonymous nor shared memory", address=piece.start)


def _registered(space: AddressSpace, userfaultfd: Userfaultfd) -> list[Vma]:
    return [vma for vma in space.vmas if vma.mapping.userfaultfd == userfaultfd.id]


def _set(space: AddressSpace, pieces: list[Vma], number: int, modes: VmFlag = VmFlag.NONE) -> Operation[None]:
    changing = [
        piece for piece in pieces if piece.mapping.userfaultfd != number or piece.flags & modes != modes
    ]  # those that have more stay as they are
    yield from cut(space, changing)
    if number and number not in space.userfaultfds:
        raise NoSuchObjectError(f"userfaultfd {number} was closed meanwhile", errnos.EBADF)
    for piece in changing:
        before = space.userfaultfds.get(piece.mapping.userfaultfd)
        if before is not None and not number and piece.has(VmFlag.UFFD_MISSING):
            before.wake(piece.span)
        now = space.vmas.find(piece.start)
        assert now is not None
        modify(space, now.clip(piece.start, piece.end), now.mapping.with_userfaultfd(number, modes))


# ---- their pages


def fill(
    space: AddressSpace,
    userfaultfd: Userfaultfd,
    span: AddressRange,
    filling: Filling,
    mode: int,
    data: memoryview | None = None,
) -> Operation[Filled]:
    """UFFDIO_COPY, _ZEROPAGE, _CONTINUE: bring in pages where nothing is yet, and wake who waits for them.

    Args:
        span: page-aligned.
        mode: CopyMode values.
        data: of COPY as many bytes.

    Returns: how far it came.  The first page fails, and so the call, with
        ENOENT: nothing is mapped there, or not all of the range by one VMA, or that is registered with none.
        EEXIST: a page is there, in shared memory also one that nobody has mapped, except for CONTINUE.
        EFAULT: it is behind the end of the shared memory; for CONTINUE, the shared memory does not have it.
        EINVAL: for CONTINUE, it is behind the end of the shared memory, or that is none.
        EIO: for CONTINUE, its contents are lost.
        ENOMEM: no frame is left.

    Raises:
        InvalidRequestError: no range, or unknown bits in `mode` (EINVAL).
        NoSuchObjectError: the process has ended (ESRCH).

    Cost: O(pages), vectorised.  Source: Linux mm/userfaultfd.c, mfill_atomic().
    """
    operation = filling.value
    _require_range(operation, span)
    if mode & ~int(CopyMode.DONTWAKE):
        raise InvalidRequestError(f"{operation}: mode {mode:#x} has unknown bits")
    at, error = span.start, None
    while at < span.end and error is None:
        if at > span.start:
            yield Pause()
        rest = AddressRange(at, span.end)
        yield from space.notifier.wait_for_edits((rest,))
        npages, error = _fill(space, rest, filling, data[at - span.start :] if data is not None else None)
        at += npages << PAGE_SHIFT
        reclaims = isinstance(error, OutOfFramesError) and space.frames.make_room is not None
        if reclaims and (npages or (yield from some_room(space.frames, rest.npages))):
            error = None
    if at > span.start and not mode & CopyMode.DONTWAKE:
        userfaultfd.wake(AddressRange(span.start, at))
    if error is not None and at > span.start:
        error = RangeBusyError(f"{operation}: {span} up to {at:#x}: {error.message}", errnos.EAGAIN, address=at)
    return Filled(at - span.start, error)


def wake(userfaultfd: Userfaultfd, span: AddressRange) -> None:
    """UFFDIO_WAKE: who waits for a page of a range looks again.

    Raises:
        InvalidRequestError: no range (EINVAL).
    """
    _require_range("wake", span)
    userfaultfd.wake(span)


def _fill(
    space: AddressSpace, rest: AddressRange, filling: Filling, data: memoryview | None
) -> tuple[int, HmmError | None]:
    """Fill the first piece of what is left.  Returns: pages filled, and what the one behind them failed with."""
    vma = space.vmas.find(rest.start)
    if vma is None:
        return 0, NoSuchObjectError(f"nothing is mapped at {rest.start:#x}", errnos.ENOENT, address=rest.start)
    if not vma.shared:
        prepare_anon_vma(space, vma)
    if rest.end > vma.end or not vma.mapping.userfaultfd:
        return 0, NoSuchObjectError(f"{vma} is not registered, or too short", errnos.ENOENT, address=rest.start)
    piece = AddressRange(rest.start, min(rest.end, (rest.start // PIECE_BYTES + 1) * PIECE_BYTES))
    if filling is Filling.CONTINUE:
        npages, error = _mappable(space, vma, piece)
    else:
        npages, error = _room(space, vma, piece, framed=data is not None or vma.shared)
    if not npages:
        return 0, error
    piece = AddressRange(piece.start, piece.start + (npages << PAGE_SHIFT))
    try:
        if filling is Filling.CONTINUE:
            _map_cached(space, vma, piece)
        else:
            _install(space, vma, piece, data)
    except OutOfFramesError as failed:
        return 0, failed
    return npages, error


def _room(space: AddressSpace, vma: Vma, piece: AddressRange, *, framed: bool) -> tuple[int, HmmError | None]:
    """How many pages can be filled, and what is in the way of the next."""
    taken = space.table.read(piece.start, piece.end) != 0
    behind = np.zeros(taken.size, np.bool_)
    if isinstance(vma.backing, File):
        offsets = _offsets(vma, piece)
        behind = offsets >= np.uint64(vma.backing.npages << PAGE_SHIFT)
        if vma.shared:
            taken |= vma.backing.pages.lookup(offsets) != 0
    failing = taken | behind
    npages = int(failing.argmax()) if failing.any() else taken.size
    # A page is allocated before anybody looks whether there is a place for it.
    if framed and space.frames.available < min(npages + 1, taken.size):
        npages = space.frames.available
        address = piece.start + (npages << PAGE_SHIFT)
        return npages, OutOfFramesError(f"{address:#x}: memory ran out", address=address)
    if npages == taken.size:
        return npages, None
    address = piece.start + (npages << PAGE_SHIFT)
    if behind[npages]:
        return npages, BadAddressError(f"{address:#x} is behind the end of {vma.backing}", address=address)
    return npages, ConflictError(f"a page is at {address:#x} already", errnos.EEXIST, address=address)


def _mappable(space: AddressSpace, vma: Vma, piece: AddressRange) -> tuple[int, HmmError | None]:
    """The same for mfill_atomic_pte_continue()."""
    file = vma.backing
    if not isinstance(file, File):
        return 0, InvalidRequestError(f"{vma} is no shared memory", address=piece.start)
    offsets = _offsets(vma, piece)
    behind = offsets >= np.uint64(file.npages << PAGE_SHIFT)
    absent = file.pages.lookup(np.where(behind, np.uint64(0), offsets)) == 0
    lost = file.poisoned(offsets)
    failing = behind | absent | lost | (space.table.read(piece.start, piece.end) != 0)
    if not failing.any():
        return failing.size, None
    npages = int(failing.argmax())
    address = piece.start + (npages << PAGE_SHIFT)
    error: HmmError
    if behind[npages]:
        error = InvalidRequestError(f"{address:#x} is behind the end of {file}", address=address)
    elif absent[npages]:
        error = BadAddressError(f"{file} has no page for {address:#x}", address=address)
    elif lost[npages]:
        error = BadAddressError(f"the page for {address:#x} is lost", errnos.EIO, address=address)
    else:
        error = ConflictError(f"a page is at {address:#x} already", errnos.EEXIST, address=address)
    return npages, error


def _map_cached(space: AddressSpace, vma: Vma, piece: AddressRange) -> None:
    """mfill_atomic_install_pte() for pages that the shared memory has."""
    assert isinstance(vma.backing, File)
    pfns = vma.backing.grab(_offsets(vma, piece))
    flags = WRITTEN if vma.writable and vma.shared else WRITTEN & ~cpu_pte.WRITE
    space.table.fill(piece.start, piece.end, cpu_pte.cpu_entry(pfns, flags))
    space.frames.map(pfns)


def _offsets(vma: Vma, piece: AddressRange) -> Entries:
    first = vma.page_offset(piece.start) << PAGE_SHIFT
    return np.arange(first, first + piece.size_bytes, PAGE_SIZE, dtype=np.uint64)


def _install(space: AddressSpace, vma: Vma, piece: AddressRange, data: memoryview | None) -> None:
    """mfill_atomic_pte() for all pages of a piece."""
    frames, table = space.frames, space.table
    flags = WRITTEN if vma.writable else WRITTEN & ~cpu_pte.WRITE
    if vma.shared:
        assert isinstance(vma.backing, File)
        pfns = vma.backing.grab(_offsets(vma, piece))
        table.fill(piece.start, piece.end, cpu_pte.cpu_entry(pfns, flags))
        frames.map(pfns)
    elif data is None:
        table.fill(piece.start, piece.end, ZERO_PAGE)
        return
    else:
        pfns = frames.allocate_mapped(piece.npages, ANON_PAGE)
        try:
            table.fill(piece.start, piece.end, cpu_pte.cpu_entry(pfns, flags))
        except OutOfFramesError:
            frames.take_back(pfns)
            raise
        space.claim(pfns, piece.start)
    if data is not None:
        frames.scatter(pfns, np.frombuffer(data[: piece.size_bytes], np.uint8).reshape(-1, PAGE_SIZE))
