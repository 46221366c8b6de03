"""Everything that can be set, with its unit and its default: one frozen value, read once at the start.

Defaults < file (TOML) < environment (`HMMD_` and the name in capitals) < flags (`--name-with-dashes`).  The file has
the same names, without sections:

    socket = "/run/hmmd/hmmd.sock"
    acknowledgement_s = 2.5

**Invariants**: every queue, table and message of the daemon has its limit here; a name or a value that is not
understood is an error and not ignored (in the environment only names listed here are looked at).

**Absent**: what the limits mean to the core (`hmm.limits.Limits`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hmm.limits import Limits
from hmm.semantics import PROFILES

ENVIRONMENT_PREFIX = "HMMD_"
PORT_MAX = 65_535
PORT_DIGITS_MAX = 5
INT32_MAX = (1 << 31) - 1
"""Of an option of gRPC."""
UINT32_MAX = (1 << 32) - 1
SECONDS_MAX = UINT32_MAX // 1000
"""Of a time that messages give in milliseconds, uint32: 49 days."""
PAGE_BYTES = 32
"""Of a message that tells of pages, for each: two words, and as much again for ranges and errors."""
Value = str | int | float | bool


class ConfigError(Exception):
    """A name or a value of the configuration that is not understood; says where it stands."""


def is_port(text: str) -> bool:
    """Whether it is the number of a port, in decimal digits."""
    return text.isascii() and text.isdecimal() and len(text) <= PORT_DIGITS_MAX and int(text) <= PORT_MAX


def _setting(default: Value, text: str, *, at_least: float | None = None, at_most: float | None = None) -> Any:
    return field(default=default, metadata={"text": text, "at_least": at_least, "at_most": at_most})


def _limit(default: int, text: str, *, at_most: int | None = None) -> Any:
    return _setting(default, text, at_least=1, at_most=at_most)


@dataclass(frozen=True, slots=True)
class Config:
    """What one daemon may do, and where it listens."""

    # Where it listens
    socket: str = _setting(
        "", "UNIX socket to serve, a path; default $XDG_RUNTIME_DIR/hmmd/hmmd.sock or /run/hmmd/hmmd.sock"
    )
    tcp: str = _setting("", "also serve TCP at HOST:PORT (port 0: any free one); default: no TCP")
    tls_certificate: str = _setting("", "PEM file with the certificate for TCP")
    tls_key: str = _setting("", "PEM file with the key of the certificate")
    tls_client_ca: str = _setting("", "PEM file with the authority that must have signed clients' certificates")
    tcp_plaintext: bool = _setting(False, "serve TCP without TLS")
    health_tcp: str = _setting(
        "", "serve health checks, and nothing else, in plain text at HOST:PORT: for probes that speak no TLS"
    )
    token_file: str = _setting("", "file with the accepted tokens, one a line; default: any token, or none")

    # How much it holds
    frames: int = _limit(1 << 20, "frames of system memory, 4096 bytes each")
    swap_pages: int = _setting(0, "pages of swap, for when frames run out; 0: none, calls fail then", at_least=0)
    swap_file: str = _setting("", "file for them, a path, overwritten; default: the daemon's own memory")
    device_frames: int = _limit(1 << 20, "frames in the memory of all devices together")
    hugetlb_pages: int = _setting(0, "huge pages of system memory set aside for MAP_HUGETLB", at_least=0)
    processes: int = _limit(4096, "processes")
    devices: int = _limit(256, "devices")
    mirrors: int = _limit(4096, "mirrors")
    files: int = _limit(65536, "files")
    userfaultfds: int = _limit(4096, "userfaultfds that are open")
    migrations: int = _limit(256, "migrations at a time whose drivers take the steps themselves")
    vmas: int = _limit(65530, "mappings of one address space")
    dma_pages: int = _limit(1 << 24, "pages that one device can have mapped for DMA")
    directories: int = _limit(1 << 16, "directories of one page table", at_most=INT32_MAX)

    # How much at a time
    message_bytes: int = _setting(
        8 << 20, "largest message in either direction, bytes", at_least=1 << 16, at_most=INT32_MAX
    )
    part_bytes: int = _setting(1 << 20, "largest part of data in one message, bytes", at_least=4096)
    concurrent_calls: int = _limit(
        16384, "calls of all clients that are under way at a time, streams included", at_most=INT32_MAX
    )
    batch_calls: int = _limit(4096, "calls in one Execute")
    fault_pages: int = _limit(1 << 18, "pages in one device fault or migration; 32 bytes of a message each")
    list_entries: int = _limit(1000, "objects in one answer of a list")
    streams: int = _limit(1024, "streams of events that are open at a time")
    credit: int = _limit(256, "events of one stream that are unanswered at a time", at_most=UINT32_MAX)
    queue_bytes: int = _setting(
        4 << 20, "unanswered events, and waiting replies, of one stream, bytes", at_least=4096, at_most=INT32_MAX
    )
    session_calls: int = _limit(4096, "calls of one session that are under way at a time")
    watchers: int = _limit(64, "streams of observations that are open at a time")
    watch_entries: int = _limit(8192, "observations that wait for one watcher; more are dropped and counted")
    watch_bytes: int = _limit(2 << 20, "bytes of observations that wait for one watcher; more are dropped and counted")
    operations_remembered: int = _limit(10_000, "calls that can still be asked for after their end")

    # How long
    acknowledgement_s: float = _setting(
        5.0,
        f"time for a driver to answer an event, seconds, at most {SECONDS_MAX}",
        at_least=0.001,
        at_most=SECONDS_MAX,
    )
    fault_s: float = _setting(1.0, "time for a device fault whose caller names none, seconds", at_least=0.001)
    lease_s: float = _setting(
        30.0, "time that lost mirrors, and their drivers' devices, stay known, seconds", at_least=0
    )
    holding_lease_s: float = _setting(
        30.0,
        "time after which what drivers hold goes back: a migration, without a step of its driver; exclusive access and"
        f" pins, without a word on its stream, which ends; seconds, at most {SECONDS_MAX}, which is 49 days",
        at_least=0.01,
        at_most=SECONDS_MAX,
    )
    drain_s: float = _setting(
        10.0, "time for calls to end after SIGTERM, before drivers are fenced, seconds", at_least=0
    )
    keepalive_ms: int = _limit(1000, "time between two pings of a silent client, milliseconds", at_most=INT32_MAX)
    ping_timeout_ms: int = _limit(3000, "time for the answer of a ping, milliseconds", at_most=INT32_MAX)

    # How it runs
    semantics: str = _setting("linux-6.12", "where kernels differ, the one to be like: linux-6.12 or linux-7")
    cpu: int = _setting(-1, "run on this CPU only; -1: on any", at_least=-1)
    harness: bool = _setting(
        False, "holds and injected failures (HarnessService, MADV_HWPOISON, MADV_SOFT_OFFLINE), for tests"
    )
    reflection: bool = _setting(True, "serve gRPC reflection")
    metrics: str = _setting(
        "", "serve metrics for Prometheus over HTTP at PORT (of 127.0.0.1), HOST:PORT or unix:PATH; default: nowhere"
    )
    log_level: str = _setting("info", "debug, info, warning or error")
    log_format: str = _setting("text", "text or json")

    def __post_init__(self) -> None:
        self._require_bounds()
        self._require_fitting()
        self._require_places()

    def _require_bounds(self) -> None:
        for setting in fields(self):
            at_least, at_most = setting.metadata["at_least"], setting.metadata["at_most"]
            value = getattr(self, setting.name)
            if at_least is not None and not at_least <= value < math.inf:
                raise ConfigError(f"{setting.name} is {value}; it must be at least {at_least:g}")
            if at_most is not None and value > at_most:
                raise ConfigError(f"{setting.name} is {value}; it must be at most {at_most}")
        choices_of = (("log_level", LOG_LEVELS), ("log_format", LOG_FORMATS), ("semantics", tuple(PROFILES)))
        for name, choices in choices_of:
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")

    def _require_fitting(self) -> None:
        if self.part_bytes > self.message_bytes // 2:
            raise ConfigError("part_bytes must be at most half of message_bytes")
        if self.fault_pages * PAGE_BYTES > self.message_bytes:
            raise ConfigError(f"fault_pages must be at most message_bytes / {PAGE_BYTES}")

    def _require_places(self) -> None:
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise ConfigError("tls_certificate and tls_key belong together")
        if "\0" in self.socket + self.swap_file:
            raise ConfigError("a path has no zero byte")
        if self.swap_file and not self.swap_pages:
            raise ConfigError("swap_file needs swap_pages")
        for name in ("tcp", "health_tcp"):
            host, _, port = getattr(self, name).rpartition(":")
            if (host or port) and not (host and is_port(port)):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be HOST:PORT")
        if self.tcp and not self.tls_certificate and not self.tcp_plaintext:
            raise ConfigError("tcp needs tls_certificate and tls_key, or tcp_plaintext")

    @property
    def limits(self) -> Limits:
        """What the core needs of it."""
        return Limits(**{limit.name: getattr(self, limit.name) for limit in fields(Limits)})

    @property
    def socket_path(self) -> Path:
        """The UNIX socket, with the default filled in."""
        if self.socket:
            return Path(self.socket.removeprefix("unix:"))
        return Path(os.environ.get("XDG_RUNTIME_DIR", "/run")) / "hmmd" / "hmmd.sock"


LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")
SETTINGS = fields(Config)


def load(
    flags: Mapping[str, Value], environment: Mapping[str, str] = os.environ, file: str | Path | None = None
) -> Config:
    """Put the configuration together.

    Args:
        flags: settings by name, only those that were given.
        file: TOML; None: the file that HMMD_CONFIG names, if any.

    Raises:
        ConfigError: a name or a value is not understood.
    """
    path = file or environment.get(f"{ENVIRONMENT_PREFIX}CONFIG")
    values: dict[str, Value] = {}
    if path:
        values |= _from_file(Path(path))
    values |= _from_environment(environment)
    values |= flags
    return replace(Config(), **values)  # type: ignore[arg-type]


def _from_file(path: Path) -> dict[str, Value]:
    import tomllib  # noqa: PLC0415 - few have a file

    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    types = {setting.name: type(setting.default) for setting in SETTINGS}
    for name, value in table.items():
        if name not in types:
            raise ConfigError(f"{path}: there is no setting {name!r}")
        if types[name] is float and isinstance(value, int) and not isinstance(value, bool):
            table[name] = float(value)
        elif type(value) is not types[name]:
            raise ConfigError(f"{path}: {name} is {value!r}; it must be {_kind(types[name])}")
    return table


def _from_environment(environment: Mapping[str, str]) -> dict[str, Value]:
    values = {}
    for setting in SETTINGS:
        name = ENVIRONMENT_PREFIX + setting.name.upper()
        if name in environment:
            values[setting.name] = _parse(name, environment[name], type(setting.default))
    return values


def _parse(name: str, text: str, kind: type) -> Value:
    if kind is bool:
        if text.lower() in _BOOLEANS:
            return _BOOLEANS[text.lower()]
        raise ConfigError(f"{name} is {text!r}; it must be {_kind(kind)}")
    try:
        return kind(text)  # type: ignore[no-any-return]
    except ValueError:
        raise ConfigError(f"{name} is {text!r}; it must be {_kind(kind)}") from None


def _kind(kind: type) -> str:
    return {bool: "true or false", int: "an integer", float: "a number", str: "a text"}[kind]


_BOOLEANS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
