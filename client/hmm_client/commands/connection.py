"""Where the daemon is, and what happens when it is not there: options, connecting, exit codes.

**Invariants**: whatever a command ends with, it is one line on stderr and an exit code, never a traceback.

**Absent**: what is asked of the daemon.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hmm_client.client import Client

P = ParamSpec("P")
T = TypeVar("T")

OK = 0
UNEXPECTED = 1
UNUSABLE = 2
UNREACHABLE = 3
REFUSED = 4
INTERRUPTED = 130
TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Where:
    """How to reach a daemon, as the options say it.

    Attributes:
        target: `unix:PATH`, a path or HOST:PORT; None: the default, or a daemon of one's own.
    """

    target: str | None
    token: str
    tls: bool
    ca: str | None
    certificate: str | None
    key: str | None
    timeout_s: float

    def connect(self, target: str | None = None, *, name: str = "hmmctl") -> Client:
        """A client; to be made where a loop runs."""
        from hmm_client import client, tls_credentials  # noqa: PLC0415 - takes longer than --help may

        secure = self.tls or self.ca or self.certificate
        credentials = tls_credentials(self.ca, self.certificate, self.key) if secure else None
        return client.connect(target or self.target, self.token, name=name, credentials=credentials)


def _token(context: click.Context, parameter: click.Parameter, value: str) -> str:
    from hmm_client.channel import require_token  # noqa: PLC0415 - takes longer than --help may

    try:
        require_token(value)
    except ValueError as error:
        raise click.BadParameter(str(error), context, parameter) from None
    return value


def where_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say where the daemon is; the command gets them as `where`."""

    @functools.wraps(command)
    def with_where(
        *args: Any,
        target: str | None,
        token: str,
        tls: bool,
        tls_ca: str | None,
        tls_certificate: str | None,
        tls_key: str | None,
        timeout: float,
        **options: Any,
    ) -> Any:
        if bool(tls_certificate) != bool(tls_key):
            raise click.UsageError("--tls-certificate and --tls-key belong together")
        where = Where(target or None, token, tls, tls_ca, tls_certificate, tls_key, timeout)
        return command(*args, where=where, **options)

    for option in reversed(
        (
            click.option(
                "--target",
                "-t",
                metavar="TARGET",
                type=click.Path(),
                help="Where hmmd listens: a socket's path or HOST:PORT.",
            ),
            click.option(
                "--token",
                envvar="HMMD_TOKEN",
                default="",
                callback=_token,
                help="Whose objects these are.  [$HMMD_TOKEN]",
            ),
            click.option("--tls", is_flag=True, help="Use TLS, with the system's authorities."),
            click.option(
                "--tls-ca",
                metavar="FILE",
                type=click.Path(),
                help="Use TLS; who signed the daemon's certificate (PEM).",
            ),
            click.option(
                "--tls-certificate",
                metavar="FILE",
                type=click.Path(),
                help="Use TLS with this certificate of ours (PEM).",
            ),
            click.option("--tls-key", metavar="FILE", type=click.Path(), help="The key of our certificate (PEM)."),
            click.option(
                "--timeout",
                type=click.FloatRange(min=0, min_open=True),
                default=TIMEOUT_S,
                metavar="SECONDS",
                help=f"How long the daemon may take to answer a question.  [default: {TIMEOUT_S:g}]",
            ),
        )
    ):
        with_where = option(with_where)
    return with_where


def ask(where: Where, question: Callable[[Client], Coroutine[Any, Any, T]], *, limited: bool = True) -> T:
    """Connect, ask, and hand the answer over; on failure the command ends here with a message.

    Args:
        limited: the answer must come within `where.timeout_s`.
    """
    import asyncio  # noqa: PLC0415 - takes longer than --help may

    async def work() -> T:
        async with where.connect() as client, asyncio.timeout(where.timeout_s if limited else None):
            return await question(client)

    with failures(where):
        return run(work())


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on a loop of its own.  Ctrl-C cancels it, and is raised when all has been put away.

    Before and after the coroutine too: a loop that is left half made or half closed says so on stderr.  A second Ctrl-C
    is raised where it comes.
    """
    try:
        return _run(work)
    finally:
        work.close()  # when it was never begun


def _run(work: Coroutine[Any, Any, T]) -> T:
    import asyncio  # noqa: PLC0415 - takes longer than --help may

    import uvloop  # noqa: PLC0415

    under_way: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []
    interrupts = 0

    def interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the interface
        nonlocal interrupts
        interrupts += 1
        if interrupts > 1:
            raise KeyboardInterrupt
        for loop, task in under_way:
            loop.call_soon_threadsafe(task.cancel)

    async def interruptible() -> T:
        task = asyncio.current_task()
        assert task is not None
        under_way.append((asyncio.get_running_loop(), task))
        try:
            if interrupts:
                raise asyncio.CancelledError
            return await work
        finally:
            under_way.clear()

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return uvloop.run(work)
    signal.signal(signal.SIGINT, interrupt)
    try:
        result = uvloop.run(interruptible())
    except asyncio.CancelledError:
        if not interrupts:
            raise
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if interrupts:  # while it was put away
        raise KeyboardInterrupt
    return result


@contextmanager
def failures(where: Where) -> Iterator[None]:
    """Turn what can go wrong into a line on stderr and an exit code; of files, `hmm_client.cli` does so."""
    from hmm.errors import HmmError  # noqa: PLC0415 - takes longer than --help may
    from hmm_client.channel import DaemonError, UnavailableError, default_target  # noqa: PLC0415
    from hmm_client.embedded import EmbeddedDaemonError  # noqa: PLC0415
    from hmm_client.recordings.errors import InputError  # noqa: PLC0415

    try:
        yield
    except UnavailableError as error:
        if error.broke:
            fail(UNREACHABLE, f"the connection to {error.target} broke: the daemon has gone")
        if error.silent:
            fail(UNREACHABLE, f"{error.target} does not answer: something listens there, which is stopped or no hmmd")
        if not error.refused:
            fail(UNREACHABLE, error.message)
        fail(
            UNREACHABLE,
            f"nobody listens at {error.target}",
            f"Start a daemon with `hmmd{_flag(error.target)}`, or say where it is with --target or $HMMD_SOCKET.",
        )
    except TimeoutError:
        fail(UNREACHABLE, f"{where.target or default_target()} did not answer within {where.timeout_s:g} s")
    except EmbeddedDaemonError as error:
        fail(UNREACHABLE, str(error))
    except DaemonError as error:  # a bug of the daemon is no refusal
        fail(UNEXPECTED if error.code.name == "INTERNAL" else REFUSED, str(error))
    except InputError as error:
        fail(UNUSABLE, str(error))
    except HmmError as error:
        fail(REFUSED, str(error))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def fail(code: int, message: str, hint: str = "") -> NoReturn:
    """End the command with a message."""
    click.echo(f"hmmctl: {message}", err=True)
    if hint:
        click.echo(hint, err=True)
    sys.exit(code)


def _flag(target: str) -> str:
    """What makes hmmd listen there; nothing for where it listens anyway."""
    from hmm_client.channel import default_target  # noqa: PLC0415 - takes longer than --help may

    if target == default_target({name: value for name, value in os.environ.items() if name != "HMMD_SOCKET"}):
        return ""
    return f" --socket {target.removeprefix('unix:')}" if target.startswith("unix:") else f" --tcp {target}"
