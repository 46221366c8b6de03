"""Memory calls as steps: which argument means what.

Source: mmap(2), mremap(2), mprotect(2), madvise(2), brk(2), mlock(2), msync(2), remap_file_pages(2), io_setup(2),
    and Linux mm/, fs/aio.c (aio_setup_ring()).
Invariants: a call in `DECODERS` becomes one step whatever its arguments, or raises ArgumentError.
Absent: processes, System V segments (`segments`), and calls that change no layout (`IGNORED` gives the reason).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

from hmm.units import PAGE_SHIFT
from hmm_client.recordings import flags as kernel
from hmm_client.recordings.arguments import ArgumentError, descriptor, flags, number
from hmm_client.recordings.steps import (
    Advise,
    Brk,
    Detach,
    Ignored,
    Lock,
    LockAll,
    Map,
    Origin,
    Protect,
    Remap,
    RemapFile,
    Step,
    Sync,
    Unknown,
    Unlock,
    UnlockAll,
    Unmap,
)

Decoder: TypeAlias = Callable[[Origin, tuple[str, ...], int], Step]

HUGE_ANONYMOUS = "/anon_hugepage"
"""What maps calls anonymous MAP_HUGETLB memory."""
AIO_RING = "/[aio]"
"""What maps calls the ring that io_setup(2) maps."""


def _mmap(origin: Origin, arguments: tuple[str, ...], result: int) -> Step:
    address, length, prot, flag_text, file, offset = arguments
    flag_bits = flags(flag_text, kernel.MAP)
    if flag_bits & _MAP_TYPE == kernel.MAP["MAP_SHARED_VALIDATE"]:  # which refuses flags; these were good
        flag_bits &= ~kernel.MAP["MAP_PRIVATE"]
    size = number(length)
    source = None
    if not flag_bits & kernel.MAP["MAP_ANONYMOUS"]:
        source = descriptor(file).path
        if source is None:
            raise ArgumentError(f"{file!r} does not say which file it is; record with strace -y")
    if flag_bits & kernel.MAP["MAP_HUGETLB"]:  # an equivalent mmap needs no huge pages set aside
        size = whole_huge_pages(size, flag_bits)
        source = source or HUGE_ANONYMOUS
        flag_bits &= ~(kernel.MAP["MAP_ANONYMOUS"] | kernel.MAP["MAP_HUGETLB"] | _HUGE_SIZE)
    return Map(
        origin,
        address=number(address),
        length=size,
        prot=flags(prot, kernel.PROT),
        flags=flag_bits,
        source=source,
        offset=number(offset) if source else 0,
        recorded=result,
    )


_MAP_TYPE = 0xF
_HUGE_SIZE = kernel.MAP_HUGE_MASK << kernel.MAP_HUGE_SHIFT


def whole_huge_pages(length: int, flag_bits: int) -> int:
    """A length rounded up to huge pages of the size that flags of mmap or memfd_create name."""
    shift = flag_bits >> kernel.MAP_HUGE_SHIFT & kernel.MAP_HUGE_MASK or kernel.HUGE_PAGE_SHIFT_DEFAULT
    return -(-length >> shift) << shift


def _map_shadow_stack(origin: Origin, arguments: tuple[str, ...], result: int) -> Step:
    address = number(arguments[0])
    flag_bits = kernel.MAP["MAP_PRIVATE"] | kernel.MAP["MAP_ANONYMOUS"]
    flag_bits |= kernel.MAP["MAP_FIXED_NOREPLACE"] if address else 0
    prot = kernel.PROT["PROT_READ"] | kernel.PROT["PROT_WRITE"]
    return Map(origin, address, number(arguments[1]), prot, flag_bits, None, 0, result)


def _munmap(origin: Origin, arguments: tuple[str, ...], _result: int) -> Step:
    address, length = arguments
    return Unmap(origin, number(address), number(length))


def _mprotect(origin: Origin, arguments: tuple[str, ...], _result: int) -> Step:
    address, length, prot = arguments[:3]  # pkey_mprotect has a fourth, which no layout shows
    return Protect(origin, number(address), number(length), flags(prot, kernel.PROT))


def _mremap(origin: Origin, arguments: tuple[str, ...], result: int) -> Step:
    address, length, new_length, flag_text = arguments[:4]
    target = number(arguments[4]) if len(arguments) > 4 else 0
    flag_bits = flags(flag_text, kernel.MREMAP)
    return Remap(origin, number(address), number(length), number(new_length), flag_bits, target, result)


def _madvise(origin: Origin, arguments: tuple[str, ...], _result: int) -> Step:
    address, length, advice = arguments
    value = flags(advice, kernel.MADV)
    if value not in kernel.MADV.values():
        return Unknown(origin)
    reason = _ADVICE_WITHOUT_LAYOUT.get(value)
    return Ignored(origin, reason) if reason else Advise(origin, number(address), number(length), value)


_ADVICE_WITHOUT_LAYOUT = {
    kernel.MADV["MADV_HWPOISON"]: "it concerns frames of the machine that was recorded",
    kernel.MADV["MADV_SOFT_OFFLINE"]: "it concerns frames of the machine that was recorded",
    kernel.MADV["MADV_GUARD_INSTALL"]: "it forbids accesses, and maps shows nothing of it",
    kernel.MADV["MADV_GUARD_REMOVE"]: "it allows accesses again, and maps shows nothing of it",
}


def _brk(origin: Origin, arguments: tuple[str, ...], result: int) -> Step:
    return Brk(origin, number(arguments[0]), result)


def _mlock(origin: Origin, arguments: tuple[str, ...], _result: int) -> Step:
    flag_bits = flags(arguments[2], kernel.MLOCK) if len(arguments) > 2 else 0
    return Lock(origin, number(arguments[0]), number(arguments[1]), flag_bits)


def _munlock(origin: Origin, arguments: tuple[str, ...], _result: int) -> Step:
    address, length = arguments
    return Unlock(origin, number(address), number(length))


def _mlockall(origin: Origin, arguments: tuple[str, ...], _result: int) -> Step:
    return LockAll(origin, flags(arguments[0], kernel.MCL))


def _munlockall(origin: Origin, _arguments: tuple[str, ...], _result: int) -> Step:
    return UnlockAll(origin)


def _msync(origin: Origin, arguments: tuple[str, ...], _result: int) -> Step:
    address, length, flag_text = arguments
    return Sync(origin, number(address), number(length), flags(flag_text, kernel.MS))


def _remap_file_pages(origin: Origin, arguments: tuple[str, ...], _result: int) -> Step:
    address, length, _prot, page_offset = arguments[:4]
    return RemapFile(origin, number(address), number(length), number(page_offset) << PAGE_SHIFT)


def _io_setup(origin: Origin, arguments: tuple[str, ...], _result: int) -> Step:
    """The ring is as long as the kernel has processors: the layout says it."""
    address = number(arguments[1].strip("[]"))
    prot = kernel.PROT["PROT_READ"] | kernel.PROT["PROT_WRITE"]
    return Map(origin, 0, 0, prot, kernel.MAP["MAP_SHARED"], AIO_RING, 0, address)


def _io_destroy(origin: Origin, arguments: tuple[str, ...], _result: int) -> Step:
    return Detach(origin, number(arguments[0]))


DECODERS: Mapping[str, Decoder] = MappingProxyType(
    {
        "mmap": _mmap,
        "mmap2": _mmap,  # strace prints its offset in bytes too
        "old_mmap": _mmap,
        "map_shadow_stack": _map_shadow_stack,
        "munmap": _munmap,
        "mprotect": _mprotect,
        "pkey_mprotect": _mprotect,
        "mremap": _mremap,
        "madvise": _madvise,
        "brk": _brk,
        "mlock": _mlock,
        "mlock2": _mlock,
        "munlock": _munlock,
        "mlockall": _mlockall,
        "munlockall": _munlockall,
        "msync": _msync,
        "remap_file_pages": _remap_file_pages,
        "io_setup": _io_setup,
        "io_destroy": _io_destroy,
    }
)
"""Calls that act on a layout, by name."""

REPLAYED_ERRORS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "mmap": frozenset({"EEXIST"}),
        "munmap": frozenset({"EINVAL"}),
        "mprotect": frozenset({"ENOMEM", "EACCES", "EPERM"}),
        "pkey_mprotect": frozenset({"ENOMEM", "EACCES", "EPERM"}),
        "mlock": frozenset({"ENOMEM"}),
        "mlock2": frozenset({"ENOMEM"}),
        "munlock": frozenset({"ENOMEM"}),
        "madvise": frozenset({"ENOMEM"}),
        "msync": frozenset({"ENOMEM"}),
    }
)
"""Errors that follow from layout and arguments, with whatever the call did before it met them."""

_REASONS = {
    "it asks, and changes nothing": "mincore get_mempolicy cachestat shmctl membarrier process_vm_readv",
    "memory policy says which node, not what is mapped": (
        "mbind set_mempolicy set_mempolicy_home_node migrate_pages move_pages"
    ),
    "it makes an object; mapping it is a call of its own": (
        "memfd_create memfd_secret userfaultfd shmget pkey_alloc pkey_free"
    ),
    "it advises about pages of another process": "process_madvise process_mrelease process_vm_writev",
    "sealed memory shows when a later call fails": "mseal",
    "it waits or sends a signal": (
        "wait4 waitid waitpid kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_open pidfd_send_signal pause"
    ),
    "signal handling": (
        "rt_sigaction rt_sigprocmask rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigpending sigaltstack sigreturn "
        "sigaction sigprocmask signalfd signalfd4 restart_syscall"
    ),
    "it concerns the thread, not its memory": (
        "arch_prctl set_tid_address set_robust_list get_robust_list rseq set_thread_area get_thread_area"
    ),
    "it concerns no memory of the process": (
        "io_uring_register fchmodat2 futex_wake futex_wait futex_requeue statmount listmount listns lsm_get_self_attr "
        "lsm_set_self_attr lsm_list_modules setxattrat getxattrat listxattrat removexattrat open_tree_attr "
        "file_getattr file_setattr"
    ),
    "it says what later calls may execute": "personality",
    "it concerns the process, not its memory": "unshare setns setpgid setsid getpid gettid getppid prlimit64",
}
IGNORED: Mapping[str, str] = MappingProxyType(
    {name: reason for reason, names in _REASONS.items() for name in names.split()}
)
"""Calls that change no layout, by name, each with the reason."""
