"""The command `hmmd`: settings from flags, environment and file; then serve until SIGTERM or SIGINT.

When the daemon serves it prints one line on stdout, and on the descriptor of `--ready-fd` if one is given:

    hmmd serving unix:/run/hmmd/hmmd.sock

Whoever starts it for themselves gives it a pipe, `--until-fd`: it ends with them, even if they are killed.

Exit codes: 0 ended in good order; 1 it cannot listen there; 2 a setting or a descriptor is of no use.
"""

from __future__ import annotations

import errno as errnos
import fcntl
import gc
import os
import select
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from hmm_server import VERSION
from hmm_server.config import ENVIRONMENT_PREFIX, SETTINGS, Config, ConfigError, load
from hmm_server.logs import set_up

if TYPE_CHECKING:
    import asyncio

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
MALLOC_THRESHOLD_BYTES = 1 << 30
STDERR = 2
HELP = f"""A daemon that gives device-driver authors the contract of Linux HMM over gRPC.

Settings come from defaults, a TOML file, the environment ({ENVIRONMENT_PREFIX} and the name in capitals) and flags,
the later ones winning.  SIGTERM and SIGINT end the daemon in good order.
"""


def _options(function: Callable[..., None]) -> Callable[..., None]:
    for setting in reversed(SETTINGS):
        flag = f"--{setting.name.replace('_', '-')}"
        default = "" if setting.default in ("", False) else f"  [default: {setting.default}]"
        text = f"{setting.metadata['text']}{default}"
        kind = type(setting.default)
        if kind is bool:
            option = click.option(f"{flag}/--no-{flag[2:]}", setting.name, default=None, help=text)
        else:
            option = click.option(flag, setting.name, type=kind, default=None, metavar=_metavar(kind), help=text)
        function = option(function)
    return function


def _metavar(kind: type) -> str:
    return {int: "N", float: "SECONDS", str: "TEXT"}[kind]


@click.command(help=HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@_options
@click.option("--config", "config_file", metavar="FILE", help="settings in TOML; default: $HMMD_CONFIG, if set")
@click.option("--ready-fd", type=int, metavar="FD", help="write the ready line here too, and close it")
@click.option("--until-fd", type=int, metavar="FD", help="end when the other end of this pipe is closed, too")
@click.version_option(VERSION, prog_name="hmmd")
def command(config_file: str | None, ready_fd: int | None, until_fd: int | None, **flags: Any) -> None:
    """Read the settings and serve."""
    _open_standard_streams()
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        config = load(given, file=config_file)
        _require_open("ready-fd", ready_fd, unlike=os.O_RDONLY)
        _require_open("until-fd", until_fd, unlike=os.O_WRONLY)
    except ConfigError as error:
        click.echo(f"hmmd: {error}", err=True)
        sys.exit(2)
    set_up(config.log_level, config.log_format)
    sys.exit(_run(config, ready_fd, until_fd))


def _open_standard_streams() -> None:
    # Where one is closed (`<&-`) the first socket would have its number, and libuv ends a process that closes that.
    while (number := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        pass
    os.close(number)


def _require_open(flag: str, descriptor: int | None, *, unlike: int) -> None:
    """Raises: ConfigError when a descriptor is not open, cannot be used that way or, if read, not waited for."""
    if descriptor is None:
        return
    try:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == unlike:
            raise OSError(errnos.EBADF, os.strerror(errnos.EBADF))
        if unlike == os.O_WRONLY:
            with select.epoll() as epoll:
                epoll.register(descriptor, select.EPOLLIN)
    except (OSError, OverflowError, ValueError) as error:
        needed = "one that can be written to" if unlike == os.O_RDONLY else "the reading end of a pipe, or a socket"
        raise ConfigError(f"{flag} is {descriptor}; it must be {needed}") from error


def _tune(config: Config) -> None:
    """Pin the process, and keep large buffers: each is mapped, faulted in and unmapped again otherwise."""
    import ctypes  # noqa: PLC0415 - not needed for --help

    if config.cpu >= 0:
        try:
            os.sched_setaffinity(0, {config.cpu})
        except OSError:
            allowed = ", ".join(map(str, sorted(os.sched_getaffinity(0))))
            raise ConfigError(f"cpu is {config.cpu}; it must be one of {allowed}") from None
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, MALLOC_THRESHOLD_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, MALLOC_THRESHOLD_BYTES)


def _settle() -> None:
    """Give back what starting left over; what is here now stays, so collections need not look at it."""
    import ctypes  # noqa: PLC0415 - not needed for --help

    gc.collect()
    gc.freeze()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _run(config: Config, ready_fd: int | None, until_fd: int | None) -> int:
    import uvloop  # noqa: PLC0415 - not needed for --help

    from hmm.errors import HmmError  # noqa: PLC0415
    from hmm_server.endpoint import EndpointError, UnusablePlaceError  # noqa: PLC0415 - imports gRPC

    try:
        _tune(config)
        uvloop.run(_serve(config, ready_fd, until_fd))
    except (EndpointError, ConfigError, HmmError) as error:
        elsewhere = "" if config.socket else "\nSay where else with --socket, $HMMD_SOCKET or $XDG_RUNTIME_DIR."
        click.echo(f"hmmd: {error}{elsewhere if isinstance(error, UnusablePlaceError) else ''}", err=True)
        return 1 if isinstance(error, EndpointError) else 2
    return 0


async def _serve(config: Config, ready_fd: int | None, until_fd: int | None) -> None:
    import asyncio  # noqa: PLC0415 - not needed for --help

    from hmm_server.daemon import Daemon  # noqa: PLC0415 - imports gRPC

    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    if until_fd is not None:
        loop.add_reader(until_fd, _end_with, until_fd, loop, ended)
    async with Daemon(config).serving() as daemon:
        _settle()
        _announce(f"hmmd serving {' '.join(daemon.targets)}\n", ready_fd)
        await ended.wait()


def _end_with(descriptor: int, loop: asyncio.AbstractEventLoop, ended: asyncio.Event) -> None:
    if not os.read(descriptor, 1 << 12):
        loop.remove_reader(descriptor)
        ended.set()


def _announce(line: str, ready_fd: int | None) -> None:
    click.echo(line, nl=False)
    if ready_fd is not None:
        with suppress(BrokenPipeError):  # whoever asked for it has gone
            os.write(ready_fd, line.encode())
        os.close(ready_fd)
