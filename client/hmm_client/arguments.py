"""Arguments that do not fit into their field of a message, such as a length below zero: told by call and argument.

protobuf says "Value out of range: -1", from wherever the message was made.  The handles' methods catch that and say the
rest.  A call that goes well pays for one frame more, about 0.5 us.

**Absent**: what the daemon judges, which is everything that fits.
"""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Callable, Coroutine
from functools import wraps
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

C = TypeVar("C")
P = ParamSpec("P")
T = TypeVar("T")

_MAKERS_OF_MESSAGES = ("hmm_client", "hmm_proto")


class ArgumentError(ValueError, TypeError):
    """An argument does not fit into its field; the call was not made, or not to its end where it travels in parts."""


def names_arguments(handle: type[C]) -> type[C]:
    """A class decorator: its public coroutines raise ArgumentError for arguments that do not fit."""
    for name, method in list(vars(handle).items()):
        if inspect.iscoroutinefunction(method) and not name.startswith("_"):
            setattr(handle, name, _naming(method))
    return handle


def _naming(method: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    @wraps(method)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await method(*args, **kwargs)
        except (TypeError, ValueError) as error:
            if isinstance(error, ArgumentError) or not _from_a_message(error.__traceback__):
                raise
            given = inspect.signature(method).bind(*args, **kwargs).arguments
            shown = ", ".join(f"{name}={reprlib.repr(value)}" for name, value in list(given.items())[1:])
            raise ArgumentError(f"{method.__name__}({shown}): {error}") from None

    return call


def _from_a_message(traceback: TracebackType | None) -> bool:
    """Whether an error came from a place of ours, behind the call itself: not from a callback, nor for want of one."""
    assert traceback is not None
    if traceback.tb_next is None:
        return False  # these are no arguments of that method
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return str(traceback.tb_frame.f_globals.get("__name__")).startswith(_MAKERS_OF_MESSAGES)
