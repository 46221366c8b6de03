"""Commands on files: named bytes that processes map, read and write.

**Source**: Linux fs/open.c, fs/namei.c (do_unlinkat()), mm/shmem.c (shmem_zero_setup()).

**Invariants**: a file is there as long as it has a name, an open handle or a mapping, or a call works on it.

**Absent**: directories, modes, locks, write-back to a disk.
"""

from __future__ import annotations

import errno as errnos
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hmm import file as files
from hmm import truncate as truncation
from hmm.address_space import AddressSpace
from hmm.errors import ConflictError, InvalidRequestError, NoSuchObjectError
from hmm.file import File, FileKind
from hmm.hugetlb import HUGETLB_VM_FLAGS, HugetlbFile
from hmm.machine import Machine
from hmm.operation import Operation, immediate
from hmm.unmapped_area import MapFlag
from hmm.vma import SPECIAL_FLAGS, VmFlag

_DRIVER_FLAGS = SPECIAL_FLAGS | VmFlag.DONTCOPY | VmFlag.DONTDUMP


@dataclass(frozen=True, slots=True)
class FileStatus:
    """What a file is: its name is empty for unnamed shared memory and after unlinking."""

    id: int
    name: str
    kind: FileKind
    size_bytes: int
    resident_pages: int
    opens: int


@immediate
def open_file(machine: Machine, name: str, *, create: bool = False, exclusive: bool = False) -> int:
    """Open a file by its name.

    Args:
        create: make an empty one when there is none; `exclusive`: fail when there is one.

    Returns: its id, which names the handle; a file opened twice has one id and two handles.

    Raises:
        NoSuchObjectError: there is none and `create` is False (ENOENT).
        ConflictError: there is one and `exclusive` is True (EEXIST).
        InvalidRequestError: an empty name (EINVAL).
        OutOfFramesError: too many files (ENOMEM).
    """
    if not name:
        raise InvalidRequestError("open: the name is empty")
    file = _named(machine, name)
    if file is None:
        if not create:
            raise NoSuchObjectError(f"open: there is no file {name}", errnos.ENOENT)
        file = _new_file(machine, name, FileKind.FILE)
        file.open()  # the name itself counts as a handle
        file.named = True
    elif exclusive:
        raise ConflictError(f"open: {name} is there already", errnos.EEXIST)
    file.open()
    return file.id


@immediate
def close_file(machine: Machine, file_id: int) -> None:
    """Close one handle.

    Raises:
        NoSuchObjectError: no handle of it is open (EBADF).
    """
    file = machine.file(file_id)
    if file.opens <= _is_named(machine, file):
        raise NoSuchObjectError(f"close: no handle of file {file_id} is open", errnos.EBADF)
    _close(machine, file)


@immediate
def unlink_file(machine: Machine, name: str) -> None:
    """Take a file's name away; its bytes live on while a handle is open or a mapping is there.

    Raises:
        NoSuchObjectError: there is no file of that name (ENOENT).
    """
    file = _named(machine, name)
    if file is None:
        raise NoSuchObjectError(f"unlink: there is no file {name}", errnos.ENOENT)
    del machine.file_names[name]
    file.named = False
    _close(machine, file)


@immediate
def open_device_file(machine: Machine, name: str, vm_flags: VmFlag) -> int:
    """A driver's device file, for processes to map.

    Args:
        vm_flags: what the driver's mmap adds to the VMA: IO and PFNMAP for registers, MIXEDMAP for pages; besides
            DONTEXPAND, DONTCOPY, DONTDUMP.

    Raises:
        InvalidRequestError: a flag that is not a driver's to set (EINVAL).
    """
    if others := int(vm_flags) & ~int(_DRIVER_FLAGS):
        raise InvalidRequestError(f"open: {others:#x} are no VM flags that a driver's mmap adds")
    file = _new_file(machine, name, FileKind.DEVICE)
    file.vm_flags = vm_flags
    file.open()
    return file.id


def truncate_file(machine: Machine, file_id: int, size_bytes: int) -> Operation[None]:
    """ftruncate(2), as `truncate.truncate`."""
    with kept(machine, machine.file(file_id)) as file:
        yield from files.locked(file, machine.current.operation_id, truncation.truncate(file, size_bytes))


def punch_file(machine: Machine, file_id: int, offset: int, length: int) -> Operation[None]:
    """fallocate(2) with PUNCH_HOLE and KEEP_SIZE, as `truncate.punch`."""
    with kept(machine, machine.file(file_id)) as file:
        yield from files.locked(file, machine.current.operation_id, truncation.punch(file, offset, length))


def read_file(machine: Machine, file_id: int, offset: int, length: int) -> Operation[bytes]:
    """pread(2), as `file.read`."""
    with kept(machine, machine.file(file_id)) as file:
        return (yield from files.read(file, offset, length))


def write_file(machine: Machine, file_id: int, offset: int, data: bytes) -> Operation[int]:
    """pwrite(2), as `file.write`."""
    with kept(machine, machine.file(file_id)) as file:
        return (yield from files.locked(file, machine.current.operation_id, files.write(file, offset, data)))


def status(machine: Machine, file_id: int) -> FileStatus:
    """What is known of one file.  Cost: O(directories of its page cache)."""
    file = machine.file(file_id)
    name = file.name if _is_named(machine, file) or file.kind is FileKind.DEVICE else ""
    return FileStatus(file.id, name, file.kind, file.size_bytes, file.resident_pages, file.opens)


def new_shared_memory(machine: Machine, size_bytes: int) -> File:
    """The unnamed object behind shared anonymous memory.  Source: mm/shmem.c, shmem_zero_setup()."""
    file = _new_file(machine, "/dev/zero (deleted)", FileKind.SHARED_MEMORY)
    file.size_bytes = size_bytes
    return file


def new_huge_memory(machine: Machine, space: AddressSpace, size_bytes: int, flags: MapFlag) -> File:
    """The unnamed file behind a mapping of hugetlb memory.  Source: fs/hugetlbfs/inode.c, hugetlb_file_setup()."""
    owner = 0 if flags & (MapFlag.SHARED | MapFlag.NORESERVE) else space.id
    file = HugetlbFile(
        machine.next_id("file"), "/anon_hugepage (deleted)", FileKind.HUGETLB, machine.frames, size_bytes,
        HUGETLB_VM_FLAGS, pool=machine.hugetlb, owner=owner,
    )  # fmt: skip
    _add_file(machine, file)
    return file


@contextmanager
def kept(machine: Machine, file: File) -> Iterator[File]:
    """Keep a file while a call works on it, whoever closes it meanwhile.  Source: fs/file.c, fdget()."""
    file.calls += 1
    try:
        yield file
    finally:
        file.calls -= 1
        if not file.opens and file.release_unused():
            machine.files.pop(file.id, None)


def forget_unused(machine: Machine) -> None:
    """Forget the files that nothing holds any more.  Cost: O(files and the VMAs that may map them)."""
    for file_id in [file.id for file in machine.files.values() if not file.opens and file.release_unused()]:
        del machine.files[file_id]


def _new_file(machine: Machine, name: str, kind: FileKind) -> File:
    file = File(machine.next_id("file"), name, kind, machine.frames)
    _add_file(machine, file)
    return file


def _add_file(machine: Machine, file: File) -> None:
    if len(machine.files) >= machine.limits.files:
        forget_unused(machine)
    machine.require_room("files", len(machine.files), machine.limits.files)
    machine.files[file.id] = file
    if file.kind is FileKind.FILE:
        machine.file_names[file.name] = file.id


def _named(machine: Machine, name: str) -> File | None:
    file_id = machine.file_names.get(name)
    return machine.files[file_id] if file_id is not None else None


def _is_named(machine: Machine, file: File) -> bool:
    return machine.file_names.get(file.name) == file.id


def _close(machine: Machine, file: File) -> None:
    if file.close():
        del machine.files[file.id]
