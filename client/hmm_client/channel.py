"""The connection to a daemon: where it listens, how calls are made on it, and what its errors become.

**Source**: gRPC's core options; the metadata of hmm.v1 as written in process.proto.

**Absent**: sessions (`session.py`); what is called.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno as errnos
import os
import ssl
from collections.abc import AsyncIterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message
from grpc_status import rpc_status

from hmm.errors import HmmError
from hmm_client.callbacks import waiting
from hmm_proto.status import DRAINING_REASON, INTERNAL_REASON, from_call_result, from_status
from hmm_proto.v1 import types_pb2

MESSAGE_BYTES = 8 << 20
"""Largest message in either direction; what is larger travels in parts."""
WINDOW_BYTES = 2 << 20
"""What may be on its way to this client and not read: two parts of a reply.  With HTTP/2's own 64 KiB the daemon waits
for leave in the middle of every larger reply."""
RPC_ERRORS = (grpc.aio.AioRpcError, grpc.aio.UsageError)
"""What gRPC raises of a call: it failed, or its channel is closed."""
SYSTEM_SOCKET = "/run/hmmd/hmmd.sock"
KEPT_BUFFER_BYTES = 32 << 20
"""Freed memory up to this size is used again instead of being given back to the kernel."""

_NOT_FOUND = ("errors resolving", "empty address list")
_NO_ADDRESS = "the target uri is not valid"
"""How gRPC begins to say that a name has no address, and what it says of a target that it does not understand."""
_NO_HANDSHAKE = "Tls handshake failed"
_CLOSED = ("Socket closed", "Secure read failed (Socket closed)")
_UNIX_PATH_BYTES_MAX = 107

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

Metadata = tuple[tuple[str, str], ...]


class DaemonError(Exception):
    """A call failed for a reason that is not one of the model's: transport, or a bug of the daemon.

    Attributes:
        code: what gRPC says.
        message: the same in words.
    """

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message


class UnavailableError(DaemonError, ConnectionError):
    """Nobody listens there, the target is no address, the connection broke, or the daemon or this client has ended.

    Attributes:
        target: where the daemon was looked for; empty where the daemon itself said so.
        refused: nobody listens there.
        broke: it was there and has gone, in the middle of a call.
        silent: something listens there and says nothing, as a daemon that is stopped.
    """

    refused = False
    broke = False
    silent = False

    def __init__(self, message: str, target: str = "") -> None:
        super().__init__(grpc.StatusCode.UNAVAILABLE, message)
        self.target = target


def default_target(environment: Mapping[str, str] = os.environ) -> str:
    """Where hmmd listens unless told otherwise: $HMMD_SOCKET, $XDG_RUNTIME_DIR/hmmd/hmmd.sock, /run/hmmd/hmmd.sock."""
    if socket := environment.get("HMMD_SOCKET"):
        return as_target(socket)
    if runtime := environment.get("XDG_RUNTIME_DIR"):
        return f"unix:{runtime}/hmmd/hmmd.sock"
    return f"unix:{SYSTEM_SOCKET}"


def as_target(place: str) -> str:
    """A gRPC target: a path becomes `unix:PATH`, everything else (`unix:...`, `HOST:PORT`) stays."""
    return f"unix:{place}" if place.startswith(("/", "./")) or ":" not in place else place


def tls_credentials(
    ca: str | Path | None = None, certificate: str | Path | None = None, key: str | Path | None = None
) -> grpc.ChannelCredentials:
    """Credentials for TCP with TLS, from PEM files.

    Args:
        ca: who signed the daemon's certificate; None: the system's authorities.
        certificate, key: the client's own, when the daemon demands one.

    Raises:
        OSError: a file cannot be read, or holds something else.
    """
    pem = [Path(path).read_bytes() if path is not None else None for path in (ca, key, certificate)]
    _require_usable(ca, certificate, key)
    return grpc.ssl_channel_credentials(*pem)


def _require_usable(ca: str | Path | None, certificate: str | Path | None, key: str | Path | None) -> None:
    """gRPC takes everything for credentials, and then finds nobody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if ca is not None:
            context.load_verify_locations(ca)
    except ssl.SSLError:
        raise OSError(errnos.EINVAL, "it holds no certificates in PEM", str(ca)) from None
    try:
        if certificate is not None:
            context.load_cert_chain(certificate, key)
    except ssl.SSLError:
        text = f"it is no certificate in PEM, or {key} is not its key"
        raise OSError(errnos.EINVAL, text, str(certificate)) from None


@cache
def keep_buffers() -> None:
    """Let malloc keep what a large reply occupied; mapped and faulted in anew, it would cost more than its bytes.

    These are the values that glibc comes to by itself once it has seen a buffer of that size freed.  Nothing is changed
    when the environment has settings of its own (mallopt(3)), or there is no glibc.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and not any(name.startswith("MALLOC_") for name in os.environ):
        libc.mallopt(_M_MMAP_THRESHOLD, KEPT_BUFFER_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * KEPT_BUFFER_BYTES)


class Channel:
    """A gRPC channel with the options, metadata and errors of hmm.v1.  Belongs to the loop that runs when it is made.

    Attributes:
        target: where the daemon listens.
        grpc: the channel itself, for stubs.
        metadata: sent with every call.
    """

    def __init__(
        self, target: str, *, token: str = "", name: str = "", credentials: grpc.ChannelCredentials | None = None
    ) -> None:
        """Make a channel; it connects with its first call.

        Raises:
            UnavailableError: the path of a UNIX socket is too long.
            ValueError: a token that cannot travel.
        """
        if target.startswith("unix:") and len(os.fsencode(target.removeprefix("unix:"))) > _UNIX_PATH_BYTES_MAX:
            too_long = f"the path of a UNIX socket has at most {_UNIX_PATH_BYTES_MAX} bytes"
            raise UnavailableError(f"{target}: {too_long}", target)
        keep_buffers()
        self.target = target
        require_token(token)
        named = {"hmm-token": token, "hmm-caller": _in_ascii(name)}
        self.metadata: Metadata = tuple((key, value) for key, value in named.items() if value)
        options = [
            ("grpc.max_receive_message_length", MESSAGE_BYTES),
            ("grpc.max_send_message_length", MESSAGE_BYTES),
            ("grpc.http2.bdp_probe", 0),  # else a client that reads late is sent 4 MiB of events first
            ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 5000),  # how long one attempt may take; refused ones end at once
            ("grpc.use_local_subchannel_pool", 1),  # two clients in one process do not share a connection
        ]
        if credentials is None:
            self.grpc = grpc.aio.insecure_channel(target, options=options)
        else:
            self.grpc = grpc.aio.secure_channel(target, credentials, options=options)

    async def request(self, method: Any, message: Message | AsyncIterator[Message]) -> Any:
        """Make one call with one response.

        Args:
            method: of a stub made on `grpc`, e.g. `stub.Mmap`, whose response type the result has.

        Raises:
            HmmError: the daemon refused the call.
            DaemonError: it could not be made; UnavailableError: nobody listens, or this client is closed.
        """
        with waiting() as callback:
            mark = (("hmm-in-callback", str(callback)),) if callback else ()
            try:
                return await method(message, metadata=self.metadata + mark)
            except RPC_ERRORS as error:
                raise as_error(error, self.target) from None
            except asyncio.CancelledError:
                if _is_cancelled():
                    raise
                raise _closed(self.target) from None  # while the call was under way

    async def stream(self, method: Any, message: Message) -> AsyncIterator[Any]:
        """Make one call whose responses come in parts; raises as `request`."""
        call = None
        try:
            call = method(message, metadata=self.metadata)
            async for response in call:
                yield response
        except RPC_ERRORS as error:
            raise as_error(error, self.target) from None
        finally:
            if call is not None:
                call.cancel()

    async def close(self) -> None:
        """Close the connection; calls under way end with an error."""
        await self.grpc.close()


def require_token(token: str) -> None:
    """Nothing for a token that can travel as metadata.

    Raises:
        ValueError: it has other characters than the printable ones of ASCII.
    """
    if not (token.isascii() and token.isprintable()):
        raise ValueError("a token has printable characters of ASCII, and no line end")


def _in_ascii(name: str) -> str:
    """A name as metadata can hold it, and as long: a question mark stands for each other character."""
    return "".join(one if one.isascii() and one.isprintable() else "?" for one in name)


def not_made_error(result: types_pb2.CallResult) -> HmmError | DaemonError:
    """Why one call of a batch or of a session was not made."""
    if result.reason == INTERNAL_REASON:
        return DaemonError(grpc.StatusCode.INTERNAL, result.message)
    if result.reason == DRAINING_REASON:
        return UnavailableError(result.message)
    return from_call_result(result) or DaemonError(grpc.StatusCode.UNKNOWN, "a call was not made, without a reason")


def as_error(error: Exception, target: str) -> Exception:
    """What a call raises that ended with one of RPC_ERRORS: the model's own error where the daemon sent one."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return _closed(target)
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    ours = from_status(status) if status is not None else None
    if ours is not None:
        return ours
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        # CANCELLED: the daemon ended beneath the call.  What this side cancels is an asyncio.CancelledError instead.
        return _unavailable(error.details() or "", target)
    if _NO_ADDRESS in (error.details() or ""):
        return UnavailableError(f"{target} is no address", target)
    return DaemonError(error.code(), error.details() or "")


def _is_cancelled() -> bool:
    """Whether this task is being cancelled; what it waited for may have been cancelled by itself."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def _closed(target: str) -> UnavailableError:
    return UnavailableError(f"{target}: this client is closed", target)


def _unavailable(details: str, target: str) -> UnavailableError:
    why = details.rpartition(": ")[2]  # gRPC says the address three times; the last word is why
    if details.startswith(_NOT_FOUND):
        return UnavailableError(f"{target} cannot be found: {why.rstrip(']')}", target)
    if not details.startswith("failed to connect"):
        broken = UnavailableError(f"the connection to {target} broke: {details}", target)
        broken.broke = True
        return broken
    if (at := details.find(_NO_HANDSHAKE)) >= 0:
        return UnavailableError(f"{target} is there, but {_why_no_handshake(details[at:])}", target)
    if why.endswith(_CLOSED) and not target.startswith("unix:"):
        wants = "it may want TLS, or another certificate of ours"
        return UnavailableError(f"{target} closes the connection: {wants}", target)
    if "timed out before receiving SETTINGS" in why:
        silent = UnavailableError(f"{target} does not answer: {why}", target)
        silent.silent = True
        return silent
    nobody = UnavailableError(f"nobody listens at {target}: {why}", target)
    nobody.refused = True
    return nobody


def _why_no_handshake(details: str) -> str:
    if "WRONG_VERSION_NUMBER" in details:
        return "speaks no TLS"
    if "CERTIFICATE_VERIFY_FAILED" in details:
        why = details.partition("CERTIFICATE_VERIFY_FAILED")[2].removesuffix(": OK").lstrip(": ")
        return f"its certificate is not trusted: {why}"
    return f"TLS fails: {details}"
