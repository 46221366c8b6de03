"""Errors of the model, cut by what the caller should do next.

    HmmError
    ├── InvalidRequestError   fix the call                       EINVAL EOVERFLOW EOPNOTSUPP
    ├── BadAddressError       map something there first          EFAULT ENOENT ENOMEM
    │   └── SegmentationFault a CPU access that gets a signal    EFAULT, and a `Signal`
    ├── AccessDeniedError     ask for less                       EPERM EACCES
    ├── RangeBusyError        read the sequence again, retry     EBUSY EAGAIN
    ├── WouldDeadlockError    leave the callback first           EDEADLK
    ├── OutOfFramesError      evict, retry                       ENOMEM
    ├── NoSuchObjectError     -                                  ESRCH ENODEV ENOENT EBADF
    ├── ConflictError         choose another                     EEXIST EINVAL
    │   └── InUseError        end what uses it first             EBUSY
    ├── DeviceLostError       register again                     ENODEV EIO
    └── TimedOutError         ask `pending`                      ETIMEDOUT

The errno belongs to the instance: it is the kernel's errno at the kernel's point.  `str(error)` names the
operation, the range and the rule; what looks something up for any operation leaves its name to the caller (`named`).
A bug of ours is an AssertionError and never one of these.

**Absent**: how an error travels; `hmm_proto.status` turns it into a google.rpc.Status and back.
"""

from __future__ import annotations

import errno as errnos
import re
from enum import Enum
from typing import ClassVar, Self

from hmm.violation import Violation

EHWPOISON = 133
"""The contents of the page are lost; Python's errno module does not know it."""

# errno.errorcode names some numbers by their alias (EDEADLK prints EDEADLOCK): the names are fixed here.
_ALIASES = {errnos.EDEADLK: "EDEADLK", errnos.EAGAIN: "EAGAIN", errnos.EOPNOTSUPP: "EOPNOTSUPP", EHWPOISON: "EHWPOISON"}


_NAMES_AN_OPERATION = re.compile(r"[a-z][a-z0-9_-]*( [a-z0-9_-]+){0,2}: ")


def errno_name(number: int) -> str:
    """The kernel's name of an errno; "0" for success."""
    if not number:
        return "0"
    return _ALIASES.get(number) or errnos.errorcode.get(number, str(number))


class HmmError(Exception):
    """Base of all errors that a request can cause.

    Attributes:
        errno: the kernel's errno, positive.
        address: the failing address in bytes, when there is one.
        notifier_seq: the sequence to start again from, when the caller raced with an invalidation.
        hole_end: end of the unmapped hole that holds `address`, so that a caller can skip all of it.
        reason: a constant for programs; finer than the class where one class has several.
        violation: what a device did that it must not; None for every other error.
        operation_id: the call that ended with it, where a runner notes that; 0: none.
    """

    operation_id: int = 0
    errno_default: ClassVar[int] = errnos.EINVAL
    reason: str = "INVALID"

    def __init__(
        self,
        message: str,
        errno: int | None = None,
        *,
        address: int | None = None,
        notifier_seq: int | None = None,
        hole_end: int | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.errno = self.errno_default if errno is None else errno
        self.address = address
        self.notifier_seq = notifier_seq
        self.hole_end = hole_end
        self.violation: Violation | None = None
        if reason is not None:
            self.reason = reason

    def __str__(self) -> str:
        return f"{errno_name(self.errno)}: {self.args[0]}"

    @property
    def message(self) -> str:
        """The text without the errno."""
        return str(self.args[0])

    def named(self, operation: str) -> Self:
        """Itself; a message that begins with no operation begins with this one from now on."""
        if not _NAMES_AN_OPERATION.match(self.message):
            self.args = (f"{operation}: {self.message}",)
        return self


class InvalidRequestError(HmmError):
    """The call itself is wrong; repeating it cannot help."""

    reason = "INVALID_ARGUMENT"


class BadAddressError(HmmError):
    """Nothing usable is mapped at `address`."""

    errno_default = errnos.EFAULT
    reason = "NO_MAPPING"


class Signal(Enum):
    """Why a CPU access got a signal, by the kernel's si_code names; BUS_POISON stands for BUS_MCEERR_AR."""

    SEGV_MAPERR = "SEGV_MAPERR"
    SEGV_ACCERR = "SEGV_ACCERR"
    BUS_ADRERR = "BUS_ADRERR"
    BUS_POISON = "BUS_POISON"


class SegmentationFault(BadAddressError):  # noqa: N818 - the field's own name
    """A CPU access was answered with a signal at `address`."""

    reason = "SIGNAL"

    def __init__(self, message: str, signal: Signal, address: int) -> None:
        super().__init__(message, address=address)
        self.signal = signal


class AccessDeniedError(HmmError):
    """The mapping is there and does not permit this access; or the object belongs to somebody else."""

    errno_default = errnos.EACCES
    reason = "PROTECTION"


class RangeBusyError(HmmError):
    """The range is being invalidated, or was meanwhile."""

    errno_default = errnos.EBUSY
    reason = "RANGE_INVALIDATED"


class WouldDeadlockError(HmmError):
    """A call from inside a callback that could only finish after that callback."""

    errno_default = errnos.EDEADLK
    reason = "INSIDE_CALLBACK"


class OutOfFramesError(HmmError):
    """No frame, page-table directory or other counted resource is left."""

    errno_default = errnos.ENOMEM
    reason = "SYSTEM_MEMORY"


class NoSuchObjectError(HmmError):
    """The process, device, mirror or file does not exist (any more)."""

    errno_default = errnos.ESRCH
    reason = "NO_SUCH_OBJECT"


class ConflictError(HmmError):
    """Something of that name or at that place is there already."""

    errno_default = errnos.EEXIST
    reason = "DUPLICATE"


class InUseError(ConflictError):
    """Somebody else has it, or still needs it."""

    errno_default = errnos.EBUSY
    reason = "IN_USE"


class DeviceLostError(HmmError):
    """The mirror was fenced: its driver died or did not answer in time."""

    errno_default = errnos.ENODEV
    reason = "DEVICE_LOST"


class TimedOutError(HmmError):
    """The operation was not finished within its deadline and changed nothing."""

    errno_default = errnos.ETIMEDOUT
    reason = "NOT_ACKNOWLEDGED"
